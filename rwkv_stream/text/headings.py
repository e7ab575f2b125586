"""Headings of plain text: Markdown's `## The mill`, and lines such as "CHAPTER III. The mill" that stand by themselves.

Of headings with nothing but headings between them the first is where a part begins and the last is its title ("PART
ONE", "Chapter 1"); more than RUN of them are a table of contents, and none. What stands in a fence of code is no
heading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LINE_BYTES = 4096  # of a line that are looked at
RUN = 2  # headings in a row that are no table of contents
GAP_BYTES = 1 << 16  # of nothing behind a heading, after which no other is waited for
CHAPTER_LEVEL, LEAST_LEVEL = 2, 6  # of Markdown's: the least that begins a chapter, and of all
_TITLE_CHARS = 120

_WORD = r"chapter|kapitel|chapitre|cap[ií]t(?:ulo|olo)|hoofdstuk|глава|part|teil|book"
# "Chapter 3", "Chapter 3 The mill", "3. The mill", "III", "CHAPTER III: The mill"; not "39 steps", "Mix it".
_NUMBERED = re.compile(
    rf"\W*(?:(?:{_WORD})\s+(\d{{1,6}}|[ivxlc]+)\b|(\d{{1,6}}|[ivxlc]+)\s*(?:$|[.:)–—]))", re.IGNORECASE
)
_ALONE = re.compile(rf"\W*(?:{_WORD})\s+(?:\d{{1,6}}|[ivxlc]+)\s*(?:$|[.:)–—])", re.IGNORECASE)  # "Chapter 3. The mill"
_IN_CAPITALS = re.compile(rf"\W*(?:{_WORD})\s+\S", re.IGNORECASE)  # "CHAPTER THE FIRST"
_MARKDOWN = re.compile(r"(#{1,6})[ \t]+(.*?\S)[ \t]*#*[ \t]*")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}


class Heading(NamedTuple):
    """Where a part of a text begins, and its title."""

    byte: int
    title: str


def number(title: str) -> int | None:
    """The number of a chapter, as its title says it."""
    match = _NUMBERED.match(title)
    if match is None:
        return None
    told = (match[1] or match[2]).lower()
    if told.isdecimal():
        return int(told)
    digits = [_ROMAN[digit] for digit in told]
    return sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0], strict=True))


def unnumbered(title: str) -> str:
    """A chapter's title without its number: "The mill" of "CHAPTER III. The mill"."""
    match = _NUMBERED.match(title)
    return title if match is None else title[match.end() :].strip(" \t.:)–—-")


class Lines:
    """The lines of a text that streams past from a byte on, without what ends them, as far as they are looked at."""

    def __init__(self, byte: int = 0) -> None:
        self._start = self._seen = byte  # of the line, and what went past
        self._line = bytearray()  # its first bytes
        self._is_given = False  # it is longer than what is looked at

    def push(self, piece: bytes) -> Iterator[tuple[int, str]]:
        """The lines that a piece ends, or makes longer than LINE_BYTES: where each begins, and the text."""
        at = 0
        while at < len(piece):
            end = piece.find(b"\n", at)
            stop = len(piece) if end < 0 else end
            if not self._is_given:
                self._line += piece[at : min(stop, at + LINE_BYTES - len(self._line))]
                if end >= 0 or len(self._line) == LINE_BYTES:
                    yield from self._given()
            at = stop + 1
            if end >= 0:
                self._is_given = False
                self._start = self._seen + at
        self._seen += len(piece)

    def close(self) -> Iterator[tuple[int, str]]:
        """The last line, where no newline ends it."""
        if self._line:
            yield from self._given()
        self._is_given = True

    @property
    def decided(self) -> int:
        """The byte before which all lines that begin were given."""
        return self._seen if self._is_given else self._start

    def _given(self) -> Iterator[tuple[int, str]]:
        line = self._line.decode(errors="replace").removesuffix("\r")
        self._line.clear()
        self._is_given = True
        yield self._start, line


class Headings:
    """The headings among lines; `pending` is where the first of those begins that are not decided yet.

    level  the least of Markdown's that counts
    """

    def __init__(self, level: int = LEAST_LEVEL) -> None:
        self.pending: int | None = None
        self._level = level
        self._run = 0
        self._title = ""
        self._is_after_gap = True
        self._fence = ""

    def push(self, byte: int, line: str) -> Iterator[Heading]:
        """Those that a line decides."""
        if not line.strip():
            self._is_after_gap = True
            if self.pending is not None and byte - self.pending > GAP_BYTES:
                yield from self.close()
            return
        title = None if self._is_code(line) or not self._is_after_gap else self._heading(line)
        if title is None:
            yield from self.close()
            self._is_after_gap = False
            return
        self._run, self._title = self._run + 1, title
        if self._run == 1:
            self.pending = byte
        elif self._run > RUN:
            self.pending = None

    def close(self) -> Iterator[Heading]:
        """The last one."""
        if self.pending is not None:
            yield Heading(self.pending, self._title)
        self.pending, self._run = None, 0

    def _is_code(self, line: str) -> bool:
        """Whether a line is in a fence, or one."""
        fence = _FENCE.match(line)
        if fence is not None and not self._fence:
            self._fence = fence[1]
        elif fence is not None and fence[1].startswith(self._fence):
            self._fence = ""
            return True
        return bool(self._fence)

    def _heading(self, line: str) -> str | None:
        if len(line) > _TITLE_CHARS:
            return None
        if match := _MARKDOWN.fullmatch(line):
            return match[2] if len(match[1]) <= self._level else None
        line = line.strip()
        return line if _ALONE.match(line) or (line.isupper() and _IN_CAPITALS.match(line)) else None


def headings(pieces: Iterable[bytes], level: int = CHAPTER_LEVEL) -> Iterator[Heading]:
    """The headings of a text, in order."""
    lines, found = Lines(), Headings(level)
    for piece in pieces:
        for line in lines.push(piece):
            yield from found.push(*line)
    for line in lines.close():
        yield from found.push(*line)
    yield from found.close()
