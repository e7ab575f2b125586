"""`rwkv-stream score`: how surprising a text is to the model, part by part."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example, position_options, reading_options
from rwkv_stream.errors import InputError, PartialFailureError, UsageError

if TYPE_CHECKING:
    from rwkv_stream.tables.score import Score


@click.command(
    cls=Command,
    name="score",
    short_help="Measure how surprising a text is.",
    epilog=example(
        "rwkv-stream score access.log --top 10",
        "rwkv-stream score access.log -o surprise.parquet --unit token --from-snapshot yesterday.log",
        "rwkv-stream score access.log --plot surprise.png",
        "rwkv-stream score --follow access.log --alert-bits 2.5 --from-snapshot access.log",
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
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw bits a byte along the text, the strangest units marked: .png, .svg or .pdf.",
)
@click.option("--follow", is_flag=True, help="Go on with what is written to a file, through its rotations, or a pipe.")
@click.option(
    "--alert-bits",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="With --follow: print each line of X bits a byte or more, as it comes.",
)
@click.option("--from-snapshot", metavar="REF", help="Read as going on from this snapshot.")
@position_options
@click.option("--name", help="Name of the document; stdin needs one. [default: the path as typed]")
@reading_options
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    source: str,
    output: Path | None,
    unit: str,
    top: int,
    plot: Path | None,
    follow: bool,
    alert_bits: float | None,
    from_snapshot: str | None,
    **reading: Any,
) -> None:
    """Score SOURCE: surprise in bits of each token, line or chunk; prints the bits per byte of the whole.

    Of a folder or an archive each document is scored on its own; all rows go to one output.

    With --follow it prints surprising lines, and goes on until it is stopped or a pipe ends. From a snapshot that
    `ingest --follow` made of the same file, the newest one, it goes on where that stands; else it begins with the file.
    """
    if follow or alert_bits is not None:
        odd = {"--output": output, "--top": top, "--plot": plot, "--unit": unit if unit != "line" else None}
        names = ("text_column", "id_column", "include", "exclude")
        odd |= {f"--{name.replace('_', '-')}": reading[name] for name in names}
        if not follow or alert_bits is None:
            raise click.UsageError("--follow and --alert-bits go together")
        if wrong := [option for option, value in odd.items() if value]:
            raise click.UsageError(f"--follow prints lines of one file as they come; it takes no {wrong[0]}")
        _follow(settings, source, alert_bits, from_snapshot, reading["name"], reading["encoding"])
        return
    from rwkv_stream.tables.plot import MARKED, SurpriseMap, check_plot
    from rwkv_stream.tables.writers import Writer, check_output
    from rwkv_stream.text.readers import documents

    if output is not None:
        check_output(output)
    found = list(documents([source], **reading))
    if plot is not None:
        check_plot(plot)
        if len(found) > 1:
            raise UsageError(f"drawing '{plot}': expected one document, found {len(found)}; score them one by one")
    if from_snapshot is not None:
        _, snapshot, model = settings.fork(from_snapshot)
    else:
        snapshot, model = None, settings.load_model()
    from rwkv_stream.tables.score import score, score_schema

    failures: list[InputError] = []
    n_losses = 0
    with (
        console.Errors() as errors,
        contextlib.nullcontext() if output is None else Writer(output, score_schema()) as writer,
    ):
        for document in found:
            marked = top if plot is None else max(top, MARKED)
            scored = score(document, model=model, unit=unit, snapshot=snapshot, top=marked)  # type: ignore[arg-type]
            surprise = SurpriseMap()
            units = scored if plot is None else surprise.watch(scored)
            try:
                if writer is None:
                    for _ in units:
                        pass
                else:
                    writer.write(asdict(row) for row in units)
            except InputError as error:
                if len(found) > 1:
                    errors.show(str(error))
                failures.append(error)
            else:
                for loss in scored.losses:
                    errors.show(str(loss))
                n_losses += scored.n_losses
                if plot is not None:
                    surprise.draw(plot, scored.strangest[:MARKED], title=document.name)
                _show(settings, document.name, scored, model.fingerprint, top, is_alone=len(found) == 1)
        if len(failures) == len(found):
            raise failures[0]
    if writer is not None:
        settings.notice(f"{console.counted(writer.rows, 'row')} in '{output}'")
    if failures:
        raise PartialFailureError(f"{len(failures)} of {len(found)} documents failed; the rest are scored")
    if n_losses:
        raise console.partly(n_losses, "scored")


def _follow(
    settings: GlobalOptions, source: str, bits: float, ref: str | None, name: str | None, encoding: str | None
) -> None:
    """Print surprising lines as they come; gaps are told as they are met."""
    from rwkv_stream.reading.follow import Followed, opened_after
    from rwkv_stream.tables.score import alerts

    document = Followed(source, name=name, encoding=encoding)
    store, snapshot, model = settings.fork(ref) if ref is not None else (None, None, settings.load_model())
    with opened_after(document, store, snapshot) as text:
        for line in alerts(text, name=document.name, model=model, bits_per_byte=bits, snapshot=snapshot):
            if settings.json:
                console.emit_json(asdict(line))
            else:
                click.echo(f"{line.bits_per_byte:6.2f} bits/byte\t{line.label}\t{line.text.strip()}")
            console.flush()
    if text.n_losses:
        raise console.partly(text.n_losses, "scored")


def _show(settings: GlobalOptions, document: str, scored: Score, model: str, top: int, *, is_alone: bool) -> None:
    if settings.json:
        totals = {
            "tokens": scored.tokens,
            "bytes": scored.bytes,
            "bits": scored.bits,
            "bits_per_byte": scored.bits_per_byte,
        }
        strangest = [asdict(unit) for unit in scored.strangest[:top]]
        console.emit_json({"document": document, **totals, "model": model, "top": strangest} | settings.taken)
        return
    for strange in scored.strangest[:top]:
        click.echo(f"{strange.bits_per_byte:6.2f} bits/byte\t{strange.label}\t{strange.text.strip()}")
    if scored.bits_per_byte is not None:
        click.echo(f"{scored.bits_per_byte:.4f} bits per byte" + ("" if is_alone else f"\t{document}"))
