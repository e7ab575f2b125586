"""`rwkv-stream generate`: plain continuation from a snapshot."""

from __future__ import annotations

from typing import Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import CONTINUING, Command, example, given, position_options, sampling_options


@click.command(
    cls=Command,
    name="generate",
    short_help="Continue the text of a snapshot.",
    epilog=example(
        'rwkv-stream generate --from-snapshot book.txt@50% --prompt "The next morning" --max-tokens 200 --seed 1'
    ),
)
@click.option("--from-snapshot", metavar="REF", required=True, help="The snapshot to go on from.")
@position_options
@click.option("--prompt", metavar="TEXT", help="Text read before the continuation.")
@sampling_options(CONTINUING)
@click.pass_obj
def command(settings: GlobalOptions, /, from_snapshot: str, prompt: str | None, **arguments: Any) -> None:
    """Go on writing where the snapshot stands, after TEXT if there is one. The text is streamed to stdout."""
    from rwkv_stream.model.sampling import Sampling

    sampling = Sampling(**given(arguments))
    _, snapshot, model = settings.fork(from_snapshot)
    from rwkv_stream.model.generation import generate

    state, last_hidden = snapshot.load()
    pieces = generate(model, prompt or None, state=state, last_hidden=last_hidden, sampling=sampling)
    if settings.json:
        console.emit_json({"snapshot": snapshot.id, "prompt": prompt or "", "text": "".join(pieces)} | settings.taken)
        return
    console.emit_stream(pieces)
