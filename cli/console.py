"""What the program says beside its data: notices and progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rwkv_stream.cli.options import Settings
    from rwkv_stream.reading.ingest import ReadingProgress


BLOCK_LINES = 500


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"note: {record.getMessage()}", err=True)


def listen(settings: Settings) -> None:
    """Show what the library logs: warnings, with `-v` its remarks, with `-q` nothing."""
    logger = logging.getLogger("rwkv_stream")
    logger.handlers[:] = [_Notices()]
    logger.setLevel(logging.CRITICAL if settings.quiet else logging.INFO if settings.verbose else logging.WARNING)


def say(settings: Settings, message: str) -> None:
    """A line for the person at the terminal."""
    if not settings.quiet:
        click.echo(message, err=True)


def complain(message: str) -> None:
    """An error, which `-q` does not silence."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)


def emit_json(value: Any) -> None:
    """One JSON object on a line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=False))


def emit_json_lines(values: Iterable[Any]) -> None:
    """JSON objects, one a line."""
    emit_lines(map(json.JSONEncoder(ensure_ascii=False).encode, values))


def emit_lines(lines: Iterable[str]) -> None:
    """Lines of stdout, many at once, in constant memory."""
    lines = iter(lines)
    while block := list(itertools.islice(lines, BLOCK_LINES)):
        click.echo("\n".join(block))


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout: rich on a terminal, tab-separated with a header line for a pipe (constant memory)."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns, box=None, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))  # square brackets are no markup
        Console().print(table)
        return
    emit_lines(map("\t".join, itertools.chain([columns], rows)))


def emit_styled(lines: Iterable[Iterable[tuple[str, str]]]) -> None:
    """Lines on stdout, each of parts (text, rich style); styled on a terminal, cut at its edge."""
    if not sys.stdout.isatty():
        emit_lines("".join(text for text, _ in line) for line in lines)
        return
    from rich.console import Console
    from rich.text import Text

    output = Console()
    for line in lines:
        output.print(Text.assemble(*line), no_wrap=True, overflow="ellipsis")


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def reading_bar(settings: Settings, document: str) -> Iterator[Callable[[ReadingProgress], None] | None]:
    """A live line for one reading: tokens, tokens/s, position in the text, time left. Only on a terminal."""
    if settings.quiet or settings.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[rate]:,.0f} tok/s"),
        TextColumn("{task.fields[position]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(document, total=None, tokens=0, rate=0.0, position="")

        def show(progress: ReadingProgress) -> None:
            computed = progress.tokens - progress.resumed_from_token
            bar.update(
                task,
                total=progress.raw_size,
                completed=min(
                    progress.bytes, progress.raw_bytes_read
                ),  # plain text is read ahead, packed text is shorter
                tokens=progress.tokens,
                rate=computed / max(progress.elapsed_s, 1e-9),
                position=size(progress.bytes),
            )

        yield show


def flush() -> None:
    """Show streamed text at once."""
    sys.stdout.flush()
