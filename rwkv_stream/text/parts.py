"""Parts of a document, as a person names them: `chapter:3..7`, `page:12`, `line:100..200`, `row:5`, `chapter:Of Lamps`,
and of a log `time:2026-11-02T10:00`.

Chapters are counted as their titles count them ("Chapter 3", "III. The mill"), or in the order of the text where the
titles don't; a title names its chapter, too, with its number or without. Those of plain text are what its headings
begin. Sections pass one at a time, so only the titles of chapters are held.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from rwkv_stream.errors import UsageError
from rwkv_stream.text.headings import Lines, headings, number, unnumbered
from rwkv_stream.text.readers.places import Place
from rwkv_stream.text.times import asked_time, clock, line_time

KINDS = ("chapter", "page", "line", "row")
TIME = "time"
_FORM = re.compile(rf"({'|'.join(KINDS)}):(.+?)(?:\.\.(.+))?", re.DOTALL)
_SHOWN = 60  # characters of a title
_PIECE_BYTES = 1 << 16  # that are looked at for a first time


class Placed(Protocol):
    """A text whose places are known; `store.texts.KeptText` is one.

    starts  where its extents begin, which are looked for alone
    """

    document: str
    byte_end: int

    @property
    def has_lines(self) -> bool: ...

    @property
    def starts(self) -> Sequence[int]: ...

    def sections(self) -> Iterator[tuple[int, Place]]: ...

    def pieces(self) -> Iterator[bytes]: ...

    def read(self, byte_start: int, byte_end: int) -> bytes: ...

    def byte_of_line(self, line: int) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Part:
    """What is asked for: the parts of a kind from one to another, both included, or from a time on.

    asking  what asks for it, for messages
    """

    kind: str
    first: str
    last: str
    asking: str

    @classmethod
    def of(cls, text: str, asking: str) -> Part:
        """The parts that a text asks for. Raises UsageError where it is not of the form."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{asking}: expected {', '.join(f'{kind}:' for kind in KINDS)} and one or two with .. between them, "
                f"such as chapter:3..7, found '{text:.80}'"
            )
        kind, first = match[1], match[2].strip()
        last = first if match[3] is None else match[3].strip()
        return cls(kind, first, last, asking)._checked()

    @classmethod
    def at(cls, kind: str, which: str, asking: str) -> Part:
        """One part, by its number, its title, or the time that it begins at or after. Raises UsageError for none."""
        which = which.strip()
        if len(which) > 2 and which[0] == which[-1] and which[0] in "\"'":
            which = which[1:-1]
        return cls(kind, which, which, asking)._checked()

    def _checked(self) -> Part:
        if self.kind == TIME:
            asked_time(self.first, self.asking)
            return self
        numbers = self.first.isdecimal() and self.last.isdecimal()
        if (self.kind != "chapter" and not numbers) or (numbers and int(self.first) > int(self.last)):
            found = self.first if self.first == self.last else f"{self.first}..{self.last}"
            raise UsageError(
                f"{self.asking}: expected two numbers, the smaller first, as in {self.kind}:3..7, or one, found "
                f"'{self.kind}:{found:.80}'"
            )
        return self

    def bytes(self, text: Placed) -> tuple[int, int]:
        """Where that lies in a text, end excluded.

        raises  UsageError where the text has no such parts, or not these; SnapshotError for damage
        """
        if self.kind == TIME:
            return self._time(text), text.byte_end
        if self.kind == "line":
            return self._lines(text)
        if self.kind == "chapter":
            return self._chapters(text)
        low, high = int(self.first), int(self.last)
        return self._sections(text, lambda place: low <= int(place[self.kind]) <= high)

    def _sections(self, text: Placed, is_within: Callable[[Place], bool]) -> tuple[int, int]:
        start: int | None = None
        least: int | str | None = None
        most: int | str | None = None
        known: set[str] = set()
        for byte, place in text.sections():
            known.update(place)
            if self.kind in place:
                least, most = place[self.kind] if least is None else least, place[self.kind]
            if self.kind in place and is_within(place):
                start = byte if start is None else start
            elif start is not None:
                return start, byte
        if start is None:
            found = self._none(text, known) if most is None else f"{self.kind}s {least} to {most}"
            raise self._missing(text, found)
        return start, text.byte_end

    def _lines(self, text: Placed) -> tuple[int, int]:
        if not text.has_lines:
            raise self._missing(text, self._none(text, {name for _, place in text.sections() for name in place}))
        start, end = text.byte_of_line(max(1, int(self.first))), text.byte_of_line(int(self.last) + 1)
        if start is None:
            raise self._missing(text, f"{self._count(text):,} lines")
        return start, text.byte_end if end is None else end

    def _count(self, text: Placed) -> int:
        """How many lines a text has."""
        counted = sum(piece.count(b"\n") for piece in text.pieces())
        return counted + (text.read(text.byte_end - 1, text.byte_end) != b"\n")

    def _chapters(self, text: Placed) -> tuple[int, int]:
        titles, starts, known = list[str](), list[int](), set[str]()
        end = text.byte_end
        for byte, title in _titles(text, known):
            if not titles or title != titles[-1]:
                titles.append(title)
                starts.append(byte)
        named = [i for i, title in enumerate(titles) if title]
        if not named:
            raise self._missing(text, self._none(text, known))
        first, last = self._place(self.first, titles, named), self._place(self.last, titles, named)
        if first is None or last is None or last < first:
            count = f"{len(named)} chapters" if len(named) > 1 else "1 chapter"
            shown = ", ".join(f"'{titles[i]:.{_SHOWN}}'" for i in dict.fromkeys((named[0], named[-1])))
            raise self._missing(text, f"{count}: {shown.replace(', ', ' to ')}")
        return starts[first], starts[last + 1] if last + 1 < len(starts) else end

    def _place(self, asked: str, titles: list[str], named: list[int]) -> int | None:
        """Which of the titles is asked for."""
        if not asked.isdecimal():
            told = [*((titles[i], i) for i in named), *((unnumbered(titles[i]), i) for i in named)]
            return next((i for title, i in told if title.casefold() == asked.casefold()), None)
        numbers = {i: counted for i in named if (counted := number(titles[i])) is not None}
        if numbers:
            return next((i for i, counted in numbers.items() if counted == int(asked)), None)
        return named[int(asked) - 1] if 1 <= int(asked) <= len(named) else None

    def _time(self, text: Placed) -> int:
        """Where the first line begins whose time is not before the one that is asked for; times are taken to rise."""
        starts, asked = text.starts, asked_time(self.first, self.asking)
        firsts: dict[int, datetime | None] = {}

        def first_from(i: int) -> datetime | None:
            """The first time in an extent or behind it."""
            for j in range(i, len(starts)):
                if j not in firsts:
                    end = starts[j + 1] if j + 1 < len(starts) else text.byte_end
                    firsts[j] = next((time for _, time in _times(text, starts[j], end)), None)
                if (found := firsts[j]) is not None:
                    return found
            return None

        first = first_from(0)
        if first is None:
            raise self._missing(text, "no line that begins with one")
        told = clock(asked, first)
        wanted = told(asked)

        def is_reached(i: int) -> bool:
            time = first_from(i)
            return time is None or told(time) >= wanted

        i = bisect.bisect_left(range(len(starts)), True, key=is_reached)
        last = first
        for byte, time in _times(text, starts[max(0, i - 1)], text.byte_end):
            if told(time) >= wanted:
                return byte
            last = time
        raise self._missing(text, f"lines from {first:%m-%dT%H:%M:%S} to {last:%m-%dT%H:%M:%S}")

    def _none(self, text: Placed, known: set[str]) -> str:
        kinds = sorted(known & {*KINDS}) + ["line"] * text.has_lines
        return f"none; what it has is {', '.join(f'{kind}:' for kind in kinds)}" if kinds else "none, nor others"

    def _missing(self, text: Placed, found: str) -> UsageError:
        parts = f"{self.kind} {self.first}" if self.first == self.last else f"{self.kind}s {self.first} to {self.last}"
        return UsageError(f"{self.asking} '{text.document}': expected {parts}, found {found}")


def _titles(text: Placed, known: set[str]) -> Iterator[tuple[int, str]]:
    """Where chapters begin, and their titles; what else its sections tell is noted in `known`."""
    if text.has_lines:
        yield from headings(text.pieces())
        return
    for byte, place in text.sections():
        known.update(place)
        yield byte, str(place.get("chapter", ""))


def _times(text: Placed, byte_start: int, byte_end: int) -> Iterator[tuple[int, datetime]]:
    """The lines that begin in a stretch with a time, and that."""
    byte = max(0, byte_start - 1)  # it tells whether a line begins where the stretch does
    lines = Lines(byte)
    while byte < text.byte_end:
        piece = text.read(byte, min(byte + _PIECE_BYTES, text.byte_end))
        byte += len(piece)
        last = lines.close() if byte >= text.byte_end else ()
        for at, line in itertools.chain(lines.push(piece), last):
            if at >= byte_end:
                return
            if at >= byte_start and (time := line_time(line.encode())) is not None:
                yield at, time
