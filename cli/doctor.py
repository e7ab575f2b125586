"""`rwkv-stream doctor`: what there is to compute with, and why a kernel is not used."""

from __future__ import annotations

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example


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
        facts["computed with"] = ", ".join(f"{name} {value}" for name, value in model.numerics(1).items())
        facts["state"] = console.size(model.zero_state().nbytes)
    except RwkvStreamError as error:
        facts["model"] = f"cannot be used: {error}"
    store = settings.store_path
    facts["store"] = f"{store} ({'present' if store.exists() else 'not made yet'})"
    if settings.json:
        console.emit_json(facts)
    else:
        console.emit_table(("what", "found"), iter(facts.items()))
