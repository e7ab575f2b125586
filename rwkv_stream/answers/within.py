"""Parts of a document, as a person names them: `chapter:3..7`, `page:12`, `line:100..200`, `row:5`, `chapter:Of Lamps`.

Chapters are counted as their titles count them ("Chapter 3", "III. The mill"), or in the order of the text where the
titles don't; a title names its chapter, too. Sections pass one at a time, so only the titles of chapters are held.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.readers.places import Place

KINDS = ("chapter", "page", "line", "row")
_FORM = re.compile(rf"({'|'.join(KINDS)}):(.+?)(?:\.\.(.+))?", re.DOTALL)
# "Chapter 3", "Chapter 3 The mill", "3. The mill", "III", "CHAPTER III: The mill"; not "39 steps", "Mix it".
_NUMBERED = re.compile(
    r"\W*(?:(?:chapter|kapitel|chapitre|cap[ií]t(?:ulo|olo)|hoofdstuk|глава|part|teil|book)\s+(\d{1,6}|[ivxlc]+)\b"
    r"|(\d{1,6}|[ivxlc]+)\s*(?:$|[.:)–—]))",
    re.IGNORECASE,
)
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
_SHOWN = 60  # characters of a title


@dataclass(frozen=True, slots=True)
class Within:
    """What is asked for: the parts of a kind from one to another, both included."""

    kind: str
    first: str
    last: str

    @classmethod
    def of(cls, text: str) -> Within:
        """What a text asks for. Raises UsageError where it is not of the form."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"--within: expected {', '.join(f'{kind}:' for kind in KINDS)} and one or two with .. between them, "
                f"such as chapter:3..7, found '{text:.80}'"
            )
        kind, first = match[1], match[2].strip()
        last = first if match[3] is None else match[3].strip()
        numbers = first.isdecimal() and last.isdecimal()
        if (kind != "chapter" and not numbers) or (numbers and int(first) > int(last)):
            raise UsageError(
                f"--within: expected two numbers, the smaller first, as in {kind}:3..7, found '{text:.80}'"
            )
        return cls(kind, first, last)

    def bytes(self, text: KeptText) -> tuple[int, int]:
        """Where that lies in a text, end excluded.

        raises  UsageError where the text has no such parts, or not these; SnapshotError for damage
        """
        if self.kind == "line":
            return self._lines(text)
        if self.kind == "chapter":
            return self._chapters(text)
        low, high = int(self.first), int(self.last)
        return self._sections(text, lambda place: low <= int(place[self.kind]) <= high)

    def _sections(self, text: KeptText, is_within: Callable[[Place], bool]) -> tuple[int, int]:
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

    def _lines(self, text: KeptText) -> tuple[int, int]:
        if not text.has_lines:
            raise self._missing(text, self._none(text, {name for _, place in text.sections() for name in place}))
        low, high = int(self.first), int(self.last)
        line, start, byte = 1, 0 if low <= 1 else -1, 0
        for piece in text.pieces():
            at = piece.find(b"\n")
            while at >= 0:
                line += 1
                if line == low:
                    start = byte + at + 1
                elif line == high + 1:
                    return start, byte + at + 1
                at = piece.find(b"\n", at + 1)
            byte += len(piece)
        if start < 0 or start >= text.byte_end:
            raise self._missing(text, f"{line:,} lines")
        return start, text.byte_end

    def _chapters(self, text: KeptText) -> tuple[int, int]:
        titles, starts, known = list[str](), list[int](), set[str]()
        end = text.byte_end
        for byte, place in text.sections():
            known.update(place)
            title = str(place["chapter"]) if "chapter" in place else ""
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
            return next((i for i in named if titles[i].casefold() == asked.casefold()), None)
        numbers = {i: number for i in named if (number := _number(titles[i])) is not None}
        if numbers:
            return next((i for i, number in numbers.items() if number == int(asked)), None)
        return named[int(asked) - 1] if 1 <= int(asked) <= len(named) else None

    def _none(self, text: KeptText, known: set[str]) -> str:
        kinds = sorted(known & {*KINDS}) + ["line"] * text.has_lines
        return f"none; what it has is {', '.join(f'{kind}:' for kind in kinds)}" if kinds else "none, nor others"

    def _missing(self, text: KeptText, found: str) -> UsageError:
        parts = f"{self.kind} {self.first}" if self.first == self.last else f"{self.kind}s {self.first} to {self.last}"
        return UsageError(f"--within '{text.document}': expected {parts}, found {found}")


def _number(title: str) -> int | None:
    """The number of a chapter, as its title says it."""
    match = _NUMBERED.match(title)
    if match is None:
        return None
    told = (match[1] or match[2]).lower()
    if told.isdecimal():
        return int(told)
    digits = [_ROMAN[digit] for digit in told]
    return sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0], strict=True))
