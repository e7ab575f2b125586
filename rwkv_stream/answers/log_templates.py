"""What the lines of a log have in common: its most frequent templates, and the strangest.

A template is a line with placeholders for what varies: times, mail addresses, IP addresses, paths and URLs, UUIDs and
hexadecimal numbers, other words that hold a digit. Its surprisal is the mean over its other words, each once, of -log2
of the share of lines that hold the word.

Lines pass twice. The first pass counts words by a hash of them, and keeps the templates that may be frequent in
COUNTERS counters (Misra and Gries 1982: none that more than one line in COUNTERS follows is missed); the second counts
these exactly, and finds the strangest. So memory does not grow with the log.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rwkv_stream.answers.summary import Extract, Ranges, Text, Why
from rwkv_stream.errors import SnapshotError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FREQUENT, STRANGE = 10, 5  # templates that are told
COUNTERS = 4096
BUCKETS = 1 << 18
LINE_BYTES = 1 << 12  # of a line that count
SEEN_LINES, FEWEST_LINES = 1000, 20  # from which is told whether a text is a log
TIME_CHARS = 100  # of a line, in which its time begins
_READ_BYTES = 1 << 16
_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_CLOCK = r"\d{1,2}:\d{2}:\d{2}(?:[.,]\d+)?"
_ZONE = r"(?: ?(?:Z|UTC|[+-]\d{2}:?\d{2})\b)?"
_VARYING = re.compile(
    "|".join(
        f"(?P<{name}>{pattern})"
        for name, pattern in {
            "time": rf"\b\d{{4}}-\d{{2}}-\d{{2}}(?:[T ]{_CLOCK}{_ZONE})?|\b\d{{1,2}}/{_MONTH}/\d{{4}}:{_CLOCK}{_ZONE}"
            rf"|\b(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )?{_MONTH} +\d{{1,2}} {_CLOCK}(?: \d{{4}})?|\b{_CLOCK}{_ZONE}",
            "mail": r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            "ip": r"\b\d{1,3}(?:\.\d{1,3}){3}\b|(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{1,4}\b",
            "path": r"(?<![\w+.-])[a-z][a-z0-9+.-]*://[^\s\"'<>]+|(?<![\w.)])(?:[A-Za-z]:)?[\\/][^\s\"'<>,;)\]]*",
            "id": r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
            r"|\b(?:0x[0-9a-fA-F]+|(?=[a-fA-F]*\d)[0-9a-fA-F]{8,})\b",
            "n": r"(?<!\w)[+-]?\w*\d\w*(?:[.,:-]\w*\d\w*)*%?",
        }.items()
    )
)
_PLACEHOLDER = re.compile("<(?:time|mail|ip|path|id|n)>")
_WORD = re.compile(r"[^\W\d_]+")


class Line(NamedTuple):
    """A line of a text, without its end: the byte where it begins and the one behind it."""

    byte_start: int
    byte_end: int
    text: str


def template_of(text: str) -> str:
    """A line with placeholders for what varies, and single blanks."""
    return " ".join(_VARYING.sub(lambda found: f"<{found.lastgroup}>", text).split())


def is_log(text: Text) -> bool:
    """Whether half of the lines at a text's beginning, FEWEST_LINES at least, hold a time near their beginning, and
    half follow a template that others follow too. Of a damaged text the lines before the damage tell."""
    seen: list[str] = []
    with contextlib.suppress(SnapshotError):  # whoever reads on is told
        seen += (template_of(one.text) for one in islice(lines(text, [(0, text.byte_end)]), SEEN_LINES))
    n_timed = sum("<time>" in template[:TIME_CHARS] for template in seen)
    n_shared = sum(n for n in Counter(seen).values() if n > 1)
    return len(seen) >= FEWEST_LINES and 2 * n_timed >= len(seen) and 2 * n_shared >= len(seen)


def lines(text: Text, ranges: Ranges) -> Iterator[Line]:
    """The lines of a text that begin in the ranges and are not blank; of one longer than LINE_BYTES its beginning."""
    for first, last in ranges:
        is_within = first > 0 and text.read(first - 1, first) != b"\n"  # of a line that began before
        for one in islice(_lines(text, first), int(is_within), None):
            if one.byte_start >= last:
                break
            if one.text.strip():
                yield one


def _lines(text: Text, first: int) -> Iterator[Line]:
    """All lines from a byte on."""
    start, held, size = first, b"", 0  # of the line that goes on: its first bytes, and how many it has
    for at in range(first, text.byte_end, _READ_BYTES):
        for i, piece in enumerate(text.read(at, at + _READ_BYTES).split(b"\n")):
            if i:
                yield Line(start, start + size, held.decode(errors="ignore").rstrip())
                start, held, size = start + size + 1, b"", 0
            held += piece[: LINE_BYTES - len(held)]
            size += len(piece)
    yield Line(start, start + size, held.decode(errors="ignore").rstrip())


def templates(text: Text, ranges: Ranges) -> list[Extract]:
    """The FREQUENT templates that most lines follow, most first, then the STRANGE of the greatest surprisal among the
    others, strangest first; each with its first line. Raises SnapshotError for a damaged text."""
    bits, maybe = _counted(text, ranges)
    frequent: dict[str, _Seen] = {}
    strange: dict[str, _Seen] = {}
    floor = (-1.0, 0)
    for one in lines(text, ranges):
        template = template_of(one.text)
        if template in maybe:
            frequent.setdefault(template, _Seen(one)).count += 1
        if template in strange:
            strange[template].count += 1
        elif (key := (_bits(template, bits), -one.byte_start)) > floor:  # none that was left out comes in again
            strange[template] = _Seen(one, key, 1)
            if len(strange) > FREQUENT + STRANGE:  # among which the frequent ones may be
                del strange[min(strange, key=lambda name: strange[name].key)]
                floor = min(seen.key for seen in strange.values())
    often = sorted(
        (name for name in frequent if frequent[name].count > 1),
        key=lambda name: (-frequent[name].count, frequent[name].line.byte_start),
    )[:FREQUENT]
    rare = sorted(({*strange} - {*often}), key=lambda name: strange[name].key, reverse=True)[:STRANGE]
    return [
        *(_extract(text, "frequent", name, frequent[name], bits) for name in often),
        *(_extract(text, "strange", name, strange[name], bits) for name in rare),
    ]


class _Seen:
    """A template's first line, its place in the order of the strange ones, and how many lines follow it."""

    def __init__(self, line: Line, key: tuple[float, int] = (0.0, 0), count: int = 0) -> None:
        self.line, self.key, self.count = line, key, count


def _counted(text: Text, ranges: Ranges) -> tuple[NDArray[np.float64], set[str]]:
    """First pass: the surprisal of each word by its hash, and the templates that may be frequent."""
    held = np.zeros(BUCKETS, np.int64)
    counters: dict[str, int] = {}
    n_lines = 0
    for one in lines(text, ranges):
        n_lines += 1
        template = template_of(one.text)
        np.add.at(held, _buckets(template), 1)
        if template in counters or len(counters) < COUNTERS:
            counters[template] = counters.get(template, 0) + 1
        else:
            counters = {name: n - 1 for name, n in counters.items() if n > 1}
    return np.log2(max(n_lines, 1) / np.maximum(held, 1)), set(counters)


def _buckets(template: str) -> list[int]:
    """The words of a template by their hash, each once."""
    words = _WORD.findall(_PLACEHOLDER.sub(" ", template).casefold())
    return list({zlib.crc32(word.encode()) % BUCKETS: None for word in words})


def _bits(template: str, bits: NDArray[np.float64]) -> float:
    """The surprisal of a template; 0 of one without a word."""
    found = _buckets(template)
    return float(bits[found].mean()) if found else 0.0


def _extract(text: Text, why: Why, template: str, seen: _Seen, bits: NDArray[np.float64]) -> Extract:
    line = seen.line
    place = text.place(line.byte_start) or None
    return Extract(line.byte_start, line.byte_end, line.text, place, why, template, seen.count, _bits(template, bits))
