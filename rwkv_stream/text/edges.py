"""Where a document has edges: bytes at which a chapter, a page, or a line of some kind begins.

They are found while the text streams past, and are a function of it alone, however its bytes arrive: what lies before
`decided` is known, and whoever cuts there waits until that is far enough.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rwkv_stream.errors import UsageError
from rwkv_stream.text.headings import CHAPTER_LEVEL, LEAST_LEVEL, Headings, Lines
from rwkv_stream.text.readers.places import Place

KINDS = ("chapter", "page", "heading")


class Listened(Protocol):
    """A text that says where its sections begin; `readers.Text` is one."""

    on_section: list[Callable[[int, Place], object]]

    @property
    def has_lines(self) -> bool: ...


def check(at: str) -> None:
    """Raise UsageError for what is neither a kind nor a regular expression."""
    if at not in KINDS:
        try:
            if not at:
                raise re.error("it is empty")
            re.compile(at)
        except re.error as error:
            raise UsageError(
                f"finding edges: expected {', '.join(KINDS)} or a regular expression, found '{at}': {error}"
            ) from error


class Edges:
    """The edges of a text of which nothing was drawn.

    decided  bytes before which all edges are known
    found    how many there are in what went past, but for the text's own beginning
    left     how many were left, as there were more in a chunk than `most`
    """

    def __init__(self, at: str, text: Listened, most: int | None = None) -> None:
        """`at` is one of KINDS, or a regular expression for lines; chapters of plain text are those that its headings
        begin."""
        self.decided = self.found = self.left = 0
        self._most = most
        self._seen = 0
        self._edges: deque[int] = deque()
        self._headings: Headings | None = None
        self._pattern: re.Pattern[str] | None = None
        self._lines: Lines | None = None
        self._kind = "page" if at == "page" else "chapter"
        self._last: str | int | None = None
        if at not in KINDS:
            self._pattern = re.compile(at)
        elif at != "page" and text.has_lines:
            self._headings = Headings(CHAPTER_LEVEL if at == "chapter" else LEAST_LEVEL)
        if self._pattern is None and self._headings is None:
            text.on_section.append(self._begin)
        else:
            self._lines = Lines()

    def pieces(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, looked at."""
        for piece in pieces:
            self._seen += len(piece)
            if self._lines is not None:
                self._look(self._lines.push(piece))
            else:
                self.decided = self._seen
            yield piece
        if self._lines is not None:
            self._look(self._lines.close())
            if self._headings is not None:
                self._add(heading.byte for heading in self._headings.close())
        self.decided = self._seen

    def before(self, byte: int) -> Iterator[int]:
        """The edges before a byte, in order, each once."""
        while self._edges and self._edges[0] < byte:
            yield self._edges.popleft()

    def taken(self, edges: list[int]) -> list[int]:
        """Of the edges within a chunk those that are taken; the others are counted."""
        n = len(edges) if self._most is None else min(self._most, len(edges))
        self.left += len(edges) - n
        return edges[:n]

    def _begin(self, byte: int, place: Place) -> None:
        now = place.get(self._kind)
        if now is not None and now != self._last:
            self._add([byte])
        self._last = now

    def _look(self, lines: Iterable[tuple[int, str]]) -> None:
        assert self._lines is not None
        for byte, line in lines:
            if self._headings is not None:
                self._add(heading.byte for heading in self._headings.push(byte, line))
            elif self._pattern is not None and self._pattern.search(line):
                self._add([byte])
        pending = self._headings.pending if self._headings is not None else None
        self.decided = self._lines.decided if pending is None else pending

    def _add(self, edges: Iterable[int]) -> None:
        for byte in edges:
            if byte:
                self._edges.append(byte)
                self.found += 1
