"""`rwkv-stream ingest`: read texts into the store."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example, reading_options, rule_options
from rwkv_stream.errors import (
    BackendError,
    PartialFailureError,
    RwkvStreamError,
    StoppedError,
    StoreLockedError,
    UsageError,
)

if TYPE_CHECKING:
    from rwkv_stream.interrupts import StopRequest
    from rwkv_stream.model import Model
    from rwkv_stream.reading.ingest import Begun, Estimate, ReadingProgress, ReadingReport
    from rwkv_stream.reading.isolated import ChunkStates, Cost
    from rwkv_stream.reading.reading import Reading
    from rwkv_stream.store import Store


@click.command(
    cls=Command,
    name="ingest",
    short_help="Read texts into the store.",
    epilog=example(
        "rwkv-stream ingest book.txt",
        "zcat access.log.gz | rwkv-stream ingest - --name access.log",
        "rwkv-stream ingest notes/ --snapshot-every 4096",
        "rwkv-stream ingest book.epub --snapshot-at chapter",
        "rwkv-stream ingest access.log --keep 16 --max-store-size 20GB",
        "rwkv-stream ingest src/ --include '*.py' --exclude 'tests/'",
        "rwkv-stream ingest --follow /var/log/app.log --name app --snapshot-seconds 60",
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
@click.option(
    "--snapshot-at",
    metavar="chapter|page|heading|REGEX",
    help="Snapshots also where the document has such edges, or lines that REGEX is found in; kept by a document.",
)
@rule_options
@click.option("--restart", is_flag=True, help="Read from the start whatever the store has.")
@click.option("--from-snapshot", metavar="REF", help="A new document that starts from this snapshot's state.")
@click.option("--approx", "approximate", is_flag=True, help="Start from a state even if a codec keeps it only nearly.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after so many tokens of each document."
)
@reading_options
@click.option(
    "--instruction", metavar="TEXT", help="Read this before a new document: what is to be done with what follows."
)
@click.option(
    "--cells",
    is_flag=True,
    help="Keep a state of each chunk of 2,000 tokens too, read by itself, for `ask --strategy cells`.",
)
@click.option("--no-text", is_flag=True, help="Keep the states alone, not the text.")
@click.option(
    "--follow",
    is_flag=True,
    help="Read a file, its rotated files first, or a pipe, and then what is written to it, until this is stopped.",
)
@click.option(
    "--snapshot-seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With --follow: a snapshot of what is new after so many seconds, too.",
)
@click.option("--dry-run", is_flag=True, help="Only say how many tokens, how long, how large.")
@click.option("--wait", is_flag=True, help="Wait for a locked store instead of ending with 11.")
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    sources: tuple[str, ...],
    name: str | None,
    text_column: str | None,
    id_column: str | None,
    include: list[str],
    exclude: list[str],
    cells: bool,
    no_text: bool,
    follow: bool,
    snapshot_seconds: float | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Read each SOURCE (file, folder, glob, URL, or - for stdin) through the model; keep its text, and snapshots of the
    state.

    Goes on by itself where an earlier run stopped; a finished text is not read again. Prints the id of the last
    snapshot of each document.

    With --follow it goes on until it is stopped, or a pipe ends, through whatever rotates the file. What cannot be
    found any more is told at once, and exit code 3 at the end, but for the 130 or 143 of a signal.
    """
    from rwkv_stream.errors import NotFoundError
    from rwkv_stream.reading.reading import Reading
    from rwkv_stream.text.readers import documents

    if cells and no_text:
        raise click.UsageError("--cells keeps states of chunks of a kept text; it does not go with --no-text")
    if cells and options["max_store_size"] is not None:
        raise click.UsageError("--cells keeps a state of each chunk, and none of them goes: not with --max-store-size")
    reading = Reading(keep_text=not no_text, **options)
    if snapshot_seconds is not None and not follow:
        raise click.UsageError("--snapshot-seconds goes with --follow")
    if follow:
        odd = {
            "--cells": cells,
            "--no-text": no_text,
            "--dry-run": dry_run,
            "--text-column": text_column,
            "--id-column": id_column,
            "--include": include,
            "--exclude": exclude,
        }
        for option, value in odd.items():
            if value:
                raise click.UsageError(f"--follow reads the lines of one file and keeps them; it takes no {option}")
        _follow(settings, sources, reading, name, snapshot_seconds)
        return
    found = list(
        documents(
            sources,
            name=name,
            encoding=reading.encoding,
            text_column=text_column,
            id_column=id_column,
            include=include,
            exclude=exclude,
        )
    )
    names = [document.name for document in found]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise UsageError(
            f"ingesting {len(names)} documents: expected different names, found '{twice}' twice; "
            "ingest them one by one with --name"
        )
    if reading.from_snapshot is not None:
        settings.check_reference(settings.open_store(), reading.from_snapshot)
    from rwkv_stream.interrupts import StopRequest
    from rwkv_stream.reading.ingest import Readings, estimate

    stop = StopRequest()
    model = settings.load_model()
    try:
        store = settings.open_store(create=not dry_run, wait=reading.wait)
    except NotFoundError:
        if not dry_run or reading.from_snapshot:
            raise
        store = None
    failures: list[RwkvStreamError] = []
    n_losses = 0
    totals = _Totals(len(found))
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(console.Errors())

        @contextlib.contextmanager
        def of_one() -> Iterator[None]:
            """What fails in the block fails for one document of several."""
            try:
                yield
            except (StoppedError, StoreLockedError, BackendError):  # of no document alone
                raise
            except RwkvStreamError as error:
                if len(found) == 1:
                    raise
                errors.show(str(error))
                failures.append(error)

        def show(i: int, begun: Begun) -> None:
            nonlocal n_losses
            with of_one():
                report = begun.report()
                for loss in report.losses:
                    errors.show(loss)
                n_losses += report.n_losses
                totals.add(report)
                states = None
                if cells:
                    with stop.receiving():
                        states = _keep_chunk_states(settings, report, model, store, stop)
                _show_report(settings, report, states, totals.place(i))

        if dry_run or store is None:
            for document in found:
                with of_one():
                    _show_estimate(settings, estimate(document, reading, model=model, store=store), model, cells)
        else:
            with stop.receiving():
                readings = stack.enter_context(Readings(model, store, reading, stop))
            begun: deque[tuple[int, Begun]] = deque()
            try:
                for i, document in enumerate(found, 1):
                    name_shown = f"{totals.place(i)}{document.name}"
                    with of_one(), _progress_bar(settings, name_shown) as on_progress, stop.receiving():
                        begun.append((i, readings.read(document, on_progress)))
                    while begun and begun[0][1].is_done:
                        show(*begun.popleft())
            finally:
                while begun:
                    show(*begun.popleft())
    totals.show(settings)
    if failures and len(failures) < len(found):
        raise PartialFailureError(f"{len(failures)} of {len(found)} documents failed; the rest are read")
    if failures:
        raise failures[0]
    if n_losses:
        raise console.partly(n_losses, "read")


def _follow(
    settings: GlobalOptions,
    sources: tuple[str, ...],
    reading: Reading,
    name: str | None,
    snapshot_seconds: float | None,
) -> None:
    """Read one source for as long as it goes on. Gaps and lag are told as they are met."""
    from rwkv_stream.interrupts import StopRequest
    from rwkv_stream.reading.follow import Followed, follow

    if len(sources) > 1:
        raise click.UsageError(
            f"--follow reads one document, found {len(sources)} sources; start it once for each, with the same --store"
        )
    document = Followed(sources[0], name=name, encoding=reading.encoding, snapshot_seconds=snapshot_seconds)
    if reading.from_snapshot is not None:
        settings.check_reference(settings.open_store(), reading.from_snapshot)
    model, stop = settings.load_model(), StopRequest()
    store = settings.open_store(create=True, wait=reading.wait)
    with _progress_bar(settings, document.name) as on_progress, stop.receiving():
        report = follow(document, reading, model=model, store=store, on_progress=on_progress, stop=stop)
    _show_report(settings, report, None, "")
    if report.n_losses:
        raise console.partly(report.n_losses, "read")


@contextlib.contextmanager
def _progress_bar(settings: GlobalOptions, document: str) -> Iterator[Callable[[ReadingProgress], None]]:
    """Tokens, tokens/s and position in the text of one reading."""
    first: ReadingProgress | None = None
    last: ReadingProgress | None = None

    def on_progress(progress: ReadingProgress) -> None:
        nonlocal first, last
        first, last = first or progress, progress

    def state(_elapsed_s: float) -> console.Bar:
        if first is None or last is None:
            return console.Bar(0, None)
        rate = (last.tokens - last.resumed_from_token) / max(last.elapsed_s, 1e-9)
        figures = f"{last.tokens:,} tokens", f"{rate:,.0f} tok/s", console.size(last.bytes)
        # plain text is read ahead, packed text is shorter
        done, before = (min(at.bytes, at.raw_bytes_read) for at in (last, first))
        return console.Bar(done, last.raw_size, figures, before if last.resumed_from_token else 0)

    with console.progress_bar(settings, document, state):
        yield on_progress


def _show_estimate(settings: GlobalOptions, plan: Estimate, model: Model, cells: bool) -> None:
    from rwkv_stream.reading.isolated import cost

    chunk_states = cost(plan.tokens, model) if cells else None
    if settings.json:
        more = {} if chunk_states is None else {"chunk_states": asdict(chunk_states)}
        console.emit_json(asdict(plan) | more)
        return
    more_told = "" if chunk_states is None else f"\t{_told(chunk_states)}"
    click.echo(
        f"{plan.document}\t{plan.tokens} tokens, {plan.tokens - plan.resumed_from_token} to read\t"
        f"about {plan.elapsed_s:.0f} s\t{plan.snapshots} snapshots, at most {console.size(plan.store_bytes)}{more_told}"
    )


def _told(chunk_states: Cost) -> str:
    from rwkv_stream.reading.isolated import CHUNK_TOKENS

    return (
        f"{console.counted(chunk_states.states, 'state')} of chunks of {CHUNK_TOKENS:,} tokens, at most "
        f"{console.size(chunk_states.bytes)}"
    )


def _keep_chunk_states(
    settings: GlobalOptions, report: ReadingReport, model: Model, store: Store, stop: StopRequest
) -> ChunkStates:
    """Keep the states of the chunks of a document that was read; what that takes is said first."""
    from rwkv_stream.reading.isolated import cost, keep_chunk_states

    settings.notice(f"{report.document}: {_told(cost(report.head_tokens, model))}")
    done = 0

    def note(byte: int) -> None:
        nonlocal done
        done = byte

    with console.progress_bar(settings, report.document, lambda _: console.Bar(done, report.bytes, (), 0)):
        return keep_chunk_states(store.get(report.head), model=model, store=store, stop=stop, on_progress=note)


class _Totals:
    """What was read of several documents."""

    def __init__(self, n_documents: int) -> None:
        self._n_documents = n_documents
        self._began = time.monotonic()
        self._done = self._unchanged = self._tokens = self._snapshots = 0

    def place(self, i: int) -> str:
        """Before the name of the i-th document: nothing where it is the only one."""
        return f"{i:,} of {self._n_documents:,} " if self._n_documents > 1 else ""

    def add(self, report: ReadingReport) -> None:
        self._done += 1
        self._unchanged += report.tokens == report.resumed_from_token
        self._tokens += report.tokens - report.resumed_from_token
        self._snapshots += report.snapshots_written

    def show(self, settings: GlobalOptions) -> None:
        if self._n_documents > 1 and self._done and not settings.json:
            unchanged = f" ({self._unchanged:,} had been read already)" if self._unchanged else ""
            elapsed_s = time.monotonic() - self._began
            settings.notice(
                f"{self._done:,} of {self._n_documents:,} documents{unchanged}: {self._tokens:,} tokens, "
                f"{self._snapshots:,} snapshots, {elapsed_s:,.1f} s",
            )


def _show_report(settings: GlobalOptions, report: ReadingReport, states: ChunkStates | None, place: str) -> None:
    """The id on stdout; of one document of several a person at the terminal sees its first digits, in one line."""
    if settings.json:
        console.emit_json(asdict(report) | ({} if states is None else {"chunk_states": asdict(states)}))
        return
    is_seen = bool(place) and sys.stdout.isatty() and not settings.quiet
    if not is_seen:
        click.echo(report.snapshot)
    shown = f"{place}{report.document}{f' [{report.snapshot[:12]}]' if is_seen else ''}"
    if report.head != report.snapshot:
        settings.notice(
            f"{shown}: the head stands further on, at token {report.head_tokens:,}, and stays there; "
            f"`rwkv-stream snapshots tag {report.snapshot[:12]} NAME` keeps this shorter reading from being pruned",
        )
    if states is not None:
        gone = f", {states.removed:,} of another text removed" if states.removed else ""
        settings.notice(f"{shown}: {console.counted(states.states, 'chunk state')}, {states.made:,} of them new{gone}")
    if report.tokens == report.resumed_from_token:
        settings.notice(f"{shown}: already read, {report.tokens:,} tokens; nothing to do")
        return
    resumed = f", going on from token {report.resumed_from_token:,}" if report.resumed_from_token else ""
    if report.shared_with is not None:
        resumed += f" of '{report.shared_with}'"
    if report.saved_s:
        resumed += f" ({report.saved_s:,.0f} s saved)"
    inexact = "" if report.exact else " (not exact: other numerics)"
    edges = f" ({report.edges:,} at edges)" if report.edges else ""
    settings.notice(
        f"{shown}: {report.tokens:,} tokens{resumed}; {console.counted(report.snapshots_written, 'snapshot')}{edges}, "
        f"{report.elapsed_s:.1f} s, {report.rate_tok_s:,.0f} tok/s{inexact}",
    )
