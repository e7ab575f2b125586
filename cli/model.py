"""`rwkv-stream model`: what a checkpoint is, rewriting it, and the folder of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Group, example

if TYPE_CHECKING:
    from rwkv_stream.model.checkpoints.checkpoint import Checkpoint

RESUMED = "what was written is kept, and the same command goes on from there"


@click.group(
    cls=Group,
    name="model",
    short_help="What a checkpoint is; convert, list and pull models.",
    epilog=example("rwkv-stream model info rwkv7-g1-0.4b-20250324-ctx4096.pth"),
)
def command() -> None:
    """Look at checkpoints, rewrite them as the safetensors that load fastest, and keep a folder of models by name."""


@command.command(epilog=example("rwkv-stream model info rwkv7-g1-0.4b-20250324-ctx4096.pth"))
@click.argument("name", metavar="[NAME|PATH]", required=False)
@click.option("--fingerprint", is_flag=True, help="Compute it, which reads the whole file, where it is not known yet.")
@click.pass_obj
def info(settings: GlobalOptions, /, name: str | None, fingerprint: bool) -> None:
    """Show what a checkpoint is, without loading its tensors. [default: the model of --model, else the shipped one]"""
    from rwkv_stream.model.checkpoints import checkpoint
    from rwkv_stream.model.checkpoints.library import find, shipped

    given = name or settings.model
    file = checkpoint.read(find(given) if given else shipped())
    facts = _facts(settings, file, fingerprint=fingerprint)
    if settings.json:
        console.emit_json(facts)
        return
    shown = [(name.replace("_", " "), _shown(name, value)) for name, value in facts.items() if value is not None]
    console.emit_table(("what", "found"), iter(shown))


def _facts(settings: GlobalOptions, file: Checkpoint, *, fingerprint: bool) -> dict[str, Any]:
    from rwkv_stream.errors import TokenizerError
    from rwkv_stream.kernels import available
    from rwkv_stream.model.checkpoints import checkpoint
    from rwkv_stream.model.dtypes import DTYPE_NAMES, dtype_in_memory
    from rwkv_stream.model.state import State
    from rwkv_stream.text.tokenizer import find as find_tokenizer

    config = file.config
    dtypes = sorted({DTYPE_NAMES[source.dtype] for source in file.tensors.values()})
    memory = {
        name: sum(
            source.numel * dtype_in_memory(tensor, source, dtype).itemsize for tensor, source in file.tensors.items()
        )
        for dtype, name in DTYPE_NAMES.items()
    }
    try:
        tokenizer = find_tokenizer(settings.loading.tokenizer, file.path, config.vocab_size, file.container.metadata)
        kind, problem = f"{tokenizer.kind} ({tokenizer.vocab_size:,} tokens)", None
        identify = checkpoint.fingerprint if fingerprint else checkpoint.known_fingerprint
        known = identify(file, tokenizer.id)
    except TokenizerError as error:
        kind, problem, known = None, str(error), None
    return {
        "path": str(file.path),
        "version": config.version,
        "container": file.container.kind,
        "dtypes": dtypes,
        "parameters": sum(source.numel for source in file.tensors.values()),
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "head_size": config.head_size,
        "ffn_width": config.d_ffn,
        "vocabulary": config.vocab_size,
        "low_ranks": dict(config.low_ranks),
        "group_norm_eps": config.group_norm_eps,
        "file_bytes": sum(size for size, _, _ in file.identity),
        "state_bytes": State.initial(config).nbytes,
        "memory_bytes": memory,
        "tokenizer": kind,
        "tokenizer_problem": problem,
        "fingerprint": known,
        "backends": [name for name, reason in available().items() if reason is None],
    }


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return str(console.size(value))
    if isinstance(value, dict):
        return (
            ", ".join(f"{key} {console.size(n) if name.endswith('_bytes') else n}" for key, n in value.items())
            or "none"
        )
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


@command.command(
    epilog=example("rwkv-stream model convert RWKV-x070-World-0.4B.pth -o rwkv7-0.4b.safetensors --dtype bf16"),
    kept=RESUMED,
)
@click.argument("source", metavar="NAME|PATH")
@click.option("-o", "--output", metavar="FILE", required=True, help="A name that ends in .safetensors, not there yet.")
@click.pass_obj
def convert(settings: GlobalOptions, /, source: str, output: str) -> None:
    """Rewrite any checkpoint as one safetensors file with official names; stopped, it goes on where it was.

    With --dtype its matrices become fp32, bf16 or fp16; otherwise all is kept, the fingerprint too. --lora and
    --initial-state are written into it.
    """
    from rwkv_stream.model.checkpoints.convert import convert as rewrite
    from rwkv_stream.model.checkpoints.library import find

    loading = settings.loading
    dtype = "keep" if loading.dtype == "auto" else loading.dtype
    changes = {"lora": loading.lora, "lora_alpha": loading.lora_alpha, "initial_state": loading.initial_state}
    with console.bytes_bar(settings, Path(output).name) as show:
        done = rewrite(find(source), output, dtype=dtype, **changes, progress=show)
    if settings.json:
        console.emit_json(
            {
                "path": str(done.path),
                "size_bytes": done.size,
                "resumed_from_byte": done.resumed_from,
                "tokenizer": None if done.tokenizer is None else str(done.tokenizer),
            }
        )
    else:
        click.echo(done.path)


@command.command("list", epilog=example("rwkv-stream model list"))
@click.pass_obj
def list_(settings: GlobalOptions, /) -> None:
    """List the models folder (RWKV_STREAM_MODELS); each of them can be named as --model."""
    from rwkv_stream.errors import CheckpointError
    from rwkv_stream.model.checkpoints import checkpoint
    from rwkv_stream.model.checkpoints.library import folder, models
    from rwkv_stream.model.dtypes import DTYPE_NAMES

    rows = []
    for name, path in models():
        row: dict[str, Any] = {"name": name, "path": str(path)}
        try:
            file = checkpoint.read(path)
            dtypes = sorted({DTYPE_NAMES[source.dtype] for source in file.tensors.values()})
            row |= {"version": file.config.version, "size_bytes": sum(size for size, _, _ in file.identity)}
            row |= {"dtypes": dtypes, "problem": None}
        except CheckpointError as error:
            row |= {"version": None, "size_bytes": None, "dtypes": [], "problem": str(error)}
        rows.append(row)
    if settings.json:
        console.emit_json_lines(rows)
        return
    if not rows:
        settings.notice(f"no models in '{folder()}'; put checkpoints there, or `rwkv-stream model pull OWNER/NAME`")
        return
    table = (
        (row["name"], f"RWKV-{row['version']}", console.size(row["size_bytes"]), ", ".join(row["dtypes"]), "")
        if row["problem"] is None
        else (row["name"], "", "", "", row["problem"])
        for row in rows
    )
    console.emit_table(("name", "family", "size", "dtype", "problem"), table)


@command.command(
    epilog=example("rwkv-stream model pull BlinkDL/rwkv7-g1 --file rwkv7-g1-0.4b-20250324-ctx4096.pth"), kept=RESUMED
)
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--revision", default="main", show_default=True, metavar="REV", help="Branch, tag or commit.")
@click.option("--file", metavar="NAME", help="Which of several models in the repository.")
@click.pass_obj
def pull(settings: GlobalOptions, /, repo_id: str, revision: str, file: str | None) -> None:
    """Bring a model from a Hugging Face hub into the models folder. Stopped, it goes on where it was."""
    from rwkv_stream.model.checkpoints.library import pull as download

    with console.bytes_bar(settings, repo_id) as show:
        done = download(repo_id, revision=revision, file=file, progress=show)
    if settings.json:
        console.emit_json({"path": str(done.path), "files": [str(path) for path in done.files], "commit": done.commit})
    else:
        click.echo(done.path)
