"""`rwkv-stream ingest`: read texts into the store."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.options import Command, Settings, example, reading_options
from rwkv_stream.errors import (
    InterruptedReadingError,
    PartialFailureError,
    RwkvStreamError,
    StoreLockedError,
    UsageError,
)

if TYPE_CHECKING:
    from rwkv_stream.reading.ingest import Estimate, ReadingReport


@click.command(
    cls=Command,
    name="ingest",
    short_help="Read texts into the store.",
    epilog=example(
        "rwkv-stream ingest book.txt",
        "zcat access.log.gz | rwkv-stream ingest - --name access.log",
        "rwkv-stream ingest notes/ --snapshot-every 4096",
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--name", help="Name of the document in the store; stdin needs one. [default: the path as typed]")
@click.option(
    "--snapshot-every", type=click.IntRange(min=1), metavar="N", help="Tokens between snapshots. [default: 16384]"
)
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    metavar="T",
    help="Tokens per model call; kept by a document for ever. [default: 1024]",
)
@click.option("--restart", is_flag=True, help="Read from the start whatever the store has.")
@click.option("--from-snapshot", metavar="REF", help="A new document that starts from this snapshot's state.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after so many tokens of each document."
)
@reading_options
@click.option("--dry-run", is_flag=True, help="Only say how many tokens, how long, how large.")
@click.option("--wait", is_flag=True, help="Wait for a locked store instead of ending with 11.")
@click.pass_obj
def command(
    settings: Settings,
    /,
    sources: tuple[str, ...],
    name: str | None,
    text_column: str | None,
    id_column: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Read each SOURCE (file, folder, glob, URL, or - for stdin) through the model and keep snapshots of its state.

    Goes on by itself where an earlier run stopped; a finished text is not read again. Prints the id of the last
    snapshot of each document.
    """
    from rwkv_stream.errors import NotFoundError
    from rwkv_stream.reading.reading import Reading
    from rwkv_stream.text.readers import documents

    console.listen(settings)
    reading = Reading(**options)
    found = list(documents(sources, name=name, encoding=reading.encoding, text_column=text_column, id_column=id_column))
    names = [document.name for document in found]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UsageError(
            f"ingesting {len(names)} documents: expected different names, found '{twice}' twice; "
            "ingest them one by one with --name"
        )
    from rwkv_stream.reading.ingest import StopRequest, estimate, ingest

    stop = StopRequest()
    model = settings.load_model()
    try:
        store = settings.open_store(create=not dry_run, wait=reading.wait)
    except NotFoundError:
        if not dry_run or reading.from_snapshot:
            raise
        store = None
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    failures: list[RwkvStreamError] = []
    for document in found:
        try:
            if dry_run:
                _show_estimate(settings, estimate(document, reading, model=model, store=store))
                continue
            assert store is not None
            with console.reading_bar(settings, document.name) as on_progress:
                report = ingest(document, reading, model=model, store=store, on_progress=on_progress, stop=stop)
        except (InterruptedReadingError, StoreLockedError):
            raise
        except RwkvStreamError as error:
            if len(found) == 1:
                raise
            console.complain(str(error))
            failures.append(error)
        else:
            _show_report(settings, report)
    if failures and len(failures) < len(found):
        raise PartialFailureError(f"{len(failures)} of {len(found)} documents failed; the rest are read")
    if failures:
        raise failures[0]


def _show_estimate(settings: Settings, plan: Estimate) -> None:
    if settings.json:
        console.emit_json(asdict(plan))
        return
    click.echo(
        f"{plan.document}\t{plan.tokens} tokens, {plan.tokens - plan.resumed_from_token} to read\t"
        f"about {plan.elapsed_s:.0f} s\t{plan.snapshots} snapshots, at most {console.size(plan.store_bytes)}"
    )


def _show_report(settings: Settings, report: ReadingReport) -> None:
    if settings.json:
        console.emit_json(asdict(report))
        return
    click.echo(report.snapshot)
    if report.head != report.snapshot:
        console.say(
            settings,
            f"{report.document}: the head stands further on, at token {report.head_tokens:,}, and stays there; "
            f"`rwkv-stream snapshots tag {report.snapshot[:12]} NAME` keeps this shorter reading from being pruned",
        )
    if report.tokens == report.resumed_from_token:
        console.say(settings, f"{report.document}: already read, {report.tokens:,} tokens; nothing to do")
        return
    resumed = f", going on from token {report.resumed_from_token:,}" if report.resumed_from_token else ""
    if report.shared_with is not None:
        resumed += f" of '{report.shared_with}'"
    if report.saved_s:
        resumed += f" ({report.saved_s:,.0f} s saved)"
    inexact = "" if report.exact else " (not exact: other numerics)"
    console.say(
        settings,
        f"{report.document}: {report.tokens:,} tokens{resumed}; {report.snapshots_written} snapshots, "
        f"{report.elapsed_s:.1f} s, {report.rate_tok_s:,.0f} tok/s{inexact}",
    )
