"""`rwkv-stream score`: how surprising a text is to the model, part by part."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.options import Command, Settings, example


@click.command(
    cls=Command,
    name="score",
    short_help="Measure how surprising a text is.",
    epilog=example(
        "rwkv-stream score access.log --top 10",
        "rwkv-stream score access.log -o surprise.parquet --unit token --from-snapshot yesterday.log",
    ),
)
@click.argument("source")
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write .parquet or .jsonl, a row a unit."
)
@click.option(
    "--unit",
    type=click.Choice(["token", "line", "chunk"]),
    default="line",
    show_default=True,
    help="What a row stands for.",
)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Print the K units with the most bits a byte.",
)
@click.option("--from-snapshot", metavar="REF", help="Read as going on from this snapshot.")
@click.option("--name", help="Name of the document; stdin needs one. [default: the path as typed]")
@click.option("--encoding", metavar="NAME", help="Encoding of the text. [default: found out]")
@click.pass_obj
def command(
    settings: Settings,
    /,
    source: str,
    output: Path | None,
    unit: str,
    top: int,
    from_snapshot: str | None,
    name: str | None,
    encoding: str | None,
) -> None:
    """Score SOURCE: surprise in bits of each token, line or chunk; prints the bits per byte of the whole."""
    from rwkv_stream.tasks import score, score_schema
    from rwkv_stream.writers import Writer

    console.listen(settings)
    if from_snapshot is not None:
        _, snapshot, model = settings.fork(from_snapshot)
    else:
        snapshot, model = None, settings.load_model()
    scored = score(source, model=model, unit=unit, snapshot=snapshot, top=top, name=name, encoding=encoding)  # type: ignore[arg-type]
    if output is None:
        for _ in scored:
            pass
    else:
        with Writer(output, score_schema()) as writer:
            writer.write(asdict(row) for row in scored)
        console.say(settings, f"{writer.rows} rows in '{output}'")
    if settings.json:
        totals = {
            "tokens": scored.tokens,
            "bytes": scored.bytes,
            "bits": scored.bits,
            "bits_per_byte": scored.bits_per_byte,
        }
        console.emit_json(
            {
                "document": name or source,
                **totals,
                "model": model.fingerprint,
                "top": [asdict(u) for u in scored.strangest],
            }
        )
        return
    for strange in scored.strangest:
        click.echo(f"{strange.bits_per_byte:6.2f} bits/byte\t{strange.unit} {strange.index}\t{strange.text.strip()}")
    if scored.bits_per_byte is not None:
        click.echo(f"{scored.bits_per_byte:.4f} bits per byte")
