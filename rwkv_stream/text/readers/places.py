"""Places: what a person would cite for a byte of a text, at constant memory.

A place is one or more of {"line": int}, {"page": int}, {"chapter": str}, {"row": int}, {"id": str | int}; lines, pages
and rows count from 1. Bytes are asked for in rising order while the text is read; what lies more than LOOKBACK_BYTES
behind the newest piece is forgotten, and gets the place of the oldest byte that is not.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from rwkv_stream.errors import InputError

Place = dict[str, str | int]
LOOKBACK_BYTES = 1 << 20


class Section(NamedTuple):
    """Some text of a document.

    place  where a new section begins; None where the text goes on the one before
    share  of the file, that has been read by then; None where the count of its bytes tells
    """

    place: Place | None
    text: str
    share: float | None = None


class LossError(InputError):
    """Why a part of a document cannot be read: what it is, and what was expected and found there."""

    def __init__(self, name: str, part: str, problem: str) -> None:
        super().__init__(f"reading '{name}', {part}: {problem}")
        self.part, self.problem = part, problem


Found = Section | InputError  # what a reader of a format yields: text, or why some of it cannot be read


class Sections:
    """The places of sections."""

    def __init__(self) -> None:
        self._begun: deque[tuple[int, Place]] = deque([(0, {})])

    def begin(self, byte: int, place: Place) -> None:
        self._begun.append((byte, place))
        self._drop(byte - LOOKBACK_BYTES)

    def at(self, byte: int) -> Place:
        self._drop(byte)
        return self._begun[0][1]

    def _drop(self, byte: int) -> None:
        """Forget the sections that end at or before `byte`."""
        while len(self._begun) > 1 and self._begun[1][0] <= byte:
            self._begun.popleft()


class Lines:
    """The numbers of lines, which a newline ends."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._start = 0  # the byte where the first of them begins
        self._end = 0
        self._seen = 0  # newlines are counted up to this byte of the first piece
        self._line = 1

    def push(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._end += len(piece)
        while self._end - self._start - len(self._pieces[0]) > LOOKBACK_BYTES:
            self._pass()

    def at(self, byte: int) -> Place:
        while len(self._pieces) > 1 and byte >= self._start + len(self._pieces[0]):
            self._pass()
        if self._pieces and byte - self._start > self._seen:
            self._line += self._pieces[0].count(b"\n", self._seen, byte - self._start)
            self._seen = byte - self._start
        return {"line": self._line}

    def _pass(self) -> None:
        piece = self._pieces.popleft()
        self._line += piece.count(b"\n", self._seen)
        self._start += len(piece)
        self._seen = 0
