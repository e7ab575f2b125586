"""What the program says beside its data: notices and progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import logging
import re
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from rwkv_stream.errors import PartialFailureError

if TYPE_CHECKING:
    from rwkv_stream.cli.global_options import GlobalOptions


BLOCK_LINES = 500
GAP = 2  # spaces between the columns of a table
FOLDED = 24  # cells that a column keeps which is folded
ERRORS = 10  # of a kind
SPARKS = 48  # characters of a curve
KINDS = 1000
KIND_CHARS = 200
_SURROGATE = re.compile("[\ud800-\udfff]")  # of names that are not UTF-8
_VARYING = re.compile(r"'[^']*'|\d+")  # within a kind


class _Notices(logging.Handler):
    """Each message once: inputs are gone through more than once."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            click.echo(f"note: {message}", err=True)


def show_log(settings: GlobalOptions) -> None:
    """Show what the library logs: warnings, with `-v` its remarks, with `-q` nothing."""
    logger = logging.getLogger("rwkv_stream")
    logger.handlers[:] = [_Notices()]
    logger.setLevel(logging.CRITICAL if settings.quiet else logging.INFO if settings.verbose else logging.WARNING)


def error(message: str) -> None:
    """Show an error, which `-q` does not silence."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)


def partly(n_losses: int, done: str, listed: str = "") -> PartialFailureError:
    """What ends a command that read documents but for some parts."""
    losses = "1 loss" if n_losses == 1 else f"{n_losses} losses"
    return PartialFailureError(f"{losses} in documents{listed}; the rest is {done}")


class Errors:
    """Errors of many inputs: of a kind ERRORS are shown, and how many more there were."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __enter__(self) -> Errors:
        return self

    @property
    def n(self) -> int:
        """How many there were."""
        return self._counts.total()

    def show(self, message: str) -> None:
        kind = _VARYING.sub("…", message)[:KIND_CHARS]
        if len(self._counts) == KINDS and kind not in self._counts:
            kind = "other errors"
        self._counts[kind] += 1
        if self._counts[kind] <= ERRORS:
            error(message)

    def __exit__(self, *_: object) -> None:
        for kind, n in self._counts.items():
            if n > ERRORS:
                error(f"{n - ERRORS:,} more such as: {kind}")


def emit_json(value: Any) -> None:
    """One JSON object on a line of stdout."""
    emit_json_lines([value])


def emit_json_lines(values: Iterable[Any]) -> None:
    """JSON objects, one a line; escaped where stdout is not UTF-8, which may have no bytes for a character."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    encode = json.JSONEncoder(ensure_ascii=not is_utf8).encode
    emit_lines(_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", encode(value)) for value in values)


def emit_lines(lines: Iterable[str]) -> None:
    """Lines of stdout, many at once, in constant memory."""
    lines = iter(lines)
    while block := list(itertools.islice(lines, BLOCK_LINES)):
        click.echo("\n".join(block))


def emit_stream(pieces: Iterable[str]) -> None:
    """A text on stdout, each piece as soon as it is there; its line ends even where the text is broken off. On a
    terminal its lines are broken between words."""
    is_begun = False
    if sys.stdout.isatty():
        pieces = _wrapped(pieces, shutil.get_terminal_size().columns)
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
            flush()
            is_begun = True
    except BaseException:
        if is_begun:
            click.echo()
        raise
    click.echo()


def _wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """The same text in lines of `width` cells: each word as soon as it has ended, or fills a line."""
    from rich.cells import cell_len

    column = 0  # where the line stands
    gap = word = ""  # what waits

    def placed() -> str:
        nonlocal column, gap, word
        cells = cell_len(gap) + cell_len(word)
        if column and column + cells > width:
            shown, column = f"\n{word}", cell_len(word)
        else:
            shown, column = gap + word, column + cells
        gap = word = ""
        return shown

    for char in itertools.chain.from_iterable(pieces):
        if char == "\n":
            yield f"{placed() if word else ''}\n"
            column, gap = 0, ""
        elif char.isspace():
            if word:
                yield placed()
            gap += char
        else:
            if word and (cell_len(char) > 1 or cell_len(word) == width):  # of scripts that have no words between blanks
                yield placed()
            word += char
    if word:
        yield placed()


def flush() -> None:
    """Show at once what was written to stdout."""
    sys.stdout.flush()


def emit_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, folded: Sequence[str] = (), spare: Sequence[str] = ()
) -> None:
    """A table on stdout: fitted to the width of a terminal; tab-separated with a header line for a pipe, in constant
    memory.

    folded  columns that go on in further lines where they are too long; default the last one
    spare   columns that a narrow terminal leaves out, the first of them first; that is said on stderr
    """
    if not sys.stdout.isatty():
        emit_lines(map("\t".join, itertools.chain([columns], rows)))
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    output, body = Console(), [dict(zip(columns, row, strict=True)) for row in rows]
    folded = folded or columns[-1:]
    widths = {name: max(map(cell_len, (name, *(row[name] for row in body)))) for name in columns}
    widths |= {name: min(widths[name], FOLDED) for name in folded}
    shown = [name for name in columns if not body or any(row[name] for row in body)]
    left_out = []

    def is_too_wide() -> bool:
        return sum(widths[name] + GAP for name in shown) - GAP > output.width

    for name in spare:
        if is_too_wide() and name in shown:
            shown.remove(name)
            left_out.append(name)
    is_folded = is_too_wide()  # even so: every column then
    table = Table(box=None, header_style="bold", padding=(0, GAP, 0, 0), pad_edge=False)
    for name in shown:
        table.add_column(name, no_wrap=name not in folded and not is_folded, overflow="fold")
    for row in body:
        table.add_row(*(Text(row[name]) for name in shown))  # square brackets are no markup
    output.print(table)
    if left_out:
        click.echo(f"left out: {', '.join(left_out)}; a wider terminal, a pipe or --json has them", err=True)


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


Parts = Sequence[tuple[str, str]]  # texts, each with its style


def emit_paragraphs(*paragraphs: tuple[int, Parts]) -> None:
    """Texts on stdout, each indented by so many spaces: on a terminal with styles, and wrapped between words."""
    if not sys.stdout.isatty():
        for indent, parts in paragraphs:
            click.echo(textwrap.indent("".join(part for part, _ in parts), " " * indent))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    output = Console(highlight=False)
    for indent, parts in paragraphs:
        output.print(Padding(Text.assemble(*parts), (0, 0, 0, indent), expand=False))


def sparkline(values: Sequence[float | None]) -> str:
    """A curve in one line of at most SPARKS characters, its least value at the bottom; each stands for the mean of as
    many values as any other, a blank for none."""
    if not values:
        return ""
    n = -(-len(values) // SPARKS)
    parts = [[value for value in values[i : i + n] if value is not None] for i in range(0, len(values), n)]
    means = [sum(part) / len(part) if part else None for part in parts]
    known = [mean for mean in means if mean is not None]
    least, width = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    marks = "▁▂▃▄▅▆▇█"
    top = len(marks) - 1
    return "".join(
        " " if mean is None else marks[round((mean - least) / width * top) if width else 0] for mean in means
    )


def excerpt(text: str, *, is_cut_before: bool = False, is_cut_behind: bool = False) -> str:
    """Text of a place in one line, cut on edges of words, with an ellipsis where it was cut."""
    words = text.split()
    if is_cut_before and len(words) > 1:
        words = ["…", *words[not text[0].isspace() :]]
    if is_cut_behind and len(words) > 1:
        words = [*words[: None if text[-1].isspace() else -1], "…"]
    return " ".join(words)


def named(values: Mapping[str, object]) -> str:
    """Values behind their names, as a person would say a place."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def counted(n: int, noun: str) -> str:
    """So many of a noun that has its plural in -s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Bar(NamedTuple):
    """What a progress bar shows.

    done     of `total`, where that is known; in whatever unit
    before   of `done`: what was there when the work began, which says nothing of its speed
    figures  words beside the bar
    """

    done: float
    total: float | None
    figures: Sequence[str] = ()
    before: float = 0


@contextlib.contextmanager
def progress_bar(settings: GlobalOptions, name: str, state: Callable[[float], Bar]) -> Iterator[None]:
    """A live line with what `state(elapsed_s)` is, and the time left. Only on a terminal."""
    if settings.quiet or settings.json or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    began = time.monotonic()

    def line() -> Table:
        elapsed_s = max(time.monotonic() - began, 1e-9)
        bar = state(elapsed_s)
        now = bar.done - bar.before
        left = ""
        if bar.total is not None and now > 0:
            left = f"{timedelta(seconds=round(max(bar.total - bar.done, 0) * elapsed_s / now))} left"
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(name, overflow="ellipsis", no_wrap=True),
            ProgressBar(bar.total, bar.done, width=30, pulse=bar.total is None),
            *(Text(words, no_wrap=True) for words in (*bar.figures, left) if words),
        )
        return grid

    with Live(get_renderable=line, console=Console(stderr=True), transient=True, refresh_per_second=5):
        yield


@contextlib.contextmanager
def bytes_bar(settings: GlobalOptions, name: str) -> Iterator[Callable[[int, int], None]]:
    """A live line with bytes that are done, of all, and how many a second."""
    calls: list[tuple[int, int]] = []  # the first and the last

    def show(done: int, total: int) -> None:
        calls[1:] = [(done, total)]

    def state(elapsed_s: float) -> Bar:
        if not calls:
            return Bar(0, None)
        (before, _), (done, total) = calls[0], calls[-1]
        figures = f"{size(done)} of {size(total)}", f"{size((done - before) / elapsed_s)}/s"
        return Bar(done, total, figures, before)

    with progress_bar(settings, name, state):
        yield show
