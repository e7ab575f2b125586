"""`rwkv-stream doctor`: what there is to compute with, and why a kernel is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example

if TYPE_CHECKING:
    from rwkv_stream.model import Model

PROBE = "The keeper lit the lamp, and ships far out at sea saw it. " * 4


@click.command(
    cls=Command, name="doctor", short_help="Show devices, kernels and versions.", epilog=example("rwkv-stream doctor")
)
@click.pass_obj
def command(settings: GlobalOptions, /) -> None:
    """Show versions, devices, kernels (and why one is not used), the model and the store."""
    import platform
    from importlib.metadata import version

    import torch

    from rwkv_stream import kernels
    from rwkv_stream.errors import RwkvStreamError

    facts: dict[str, str] = {
        "rwkv-stream": version("rwkv-stream"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cuda": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
    }
    for name, reason in kernels.available().items():
        facts[f"kernel {name}"] = "ready" if reason is None else f"not used: {reason}"
    try:
        model = settings.load_model()
        facts["model"] = f"{model.path} (RWKV-{model.config.version}, {model.fingerprint[:12]})"
        facts["computed with"] = console.named(model.numerics(1))
        facts["state"] = console.size(model.zero_state().nbytes)
        facts["numbers"] = _numbers(model)
    except RwkvStreamError as error:
        facts["model"] = f"cannot be used: {error}"
    store = settings.store_path
    facts["store"] = f"{store} ({'present' if store.exists() else 'not made yet'})"
    if settings.json:
        console.emit_json(facts)
    else:
        console.emit_table(("what", "found"), iter(facts.items()))


def _numbers(model: Model) -> str:
    """Whether the weights, and what the model makes of a short text, are finite."""
    import torch

    from rwkv_stream.model.finite import first_odd, odd_layer, odd_tensors

    if odd := odd_tensors(model.outer, model.blocks):
        return f"NaN or infinity in {len(odd)} tensors: " + ", ".join(odd[:8]) + (", …" if len(odd) > 8 else "")
    ids = model.tokenizer.encode(PROBE)
    hidden, state = model.forward(torch.tensor([ids]), model.start()[1], logits="none")
    token, layer = int(first_odd(hidden[0])), odd_layer(state)
    if token < len(ids) or layer is not None:
        where = "the last layer" if layer is None else f"layer {layer}"
        return f"weights finite; NaN or infinity from token {token} of a short text on, first in {where}"
    return "finite: weights, and what is made of a short text"
