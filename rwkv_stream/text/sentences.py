"""Sentences of a text that streams past, in any language, as byte spans, at constant memory.

`sentencex` decides where a sentence ends, by terminators and abbreviations of some 300 languages; what it is shown is
decided here, by rules on the text alone, so that spans never depend on how the text arrives:

1. a line of nothing but white space ends a paragraph, and no sentence goes beyond one;
2. a paragraph is shown whole, or in windows of WINDOW characters, the next of which begins where the last sentence
   that is surely whole ended; a window without such an end is cut at its last white space, else at its end.

A span begins and ends with a character that is not white space; only white space lies between spans.
"""

from __future__ import annotations

import re
from functools import lru_cache

WINDOW = 16_384  # characters
PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n")
_SPACE_TO_WORD = re.compile(r".*\s(?=\S)", re.DOTALL)
_SPACE = re.compile(r"[^\S\n\r\t ]")  # sentencex 1.0 panics on "A\u2028."


@lru_cache(maxsize=4096)
def is_abbreviation(word: str, language: str = "en") -> bool:
    """Whether a stop after a word is part of it, as in "Mr.", and ends no sentence."""
    import sentencex

    return len(sentencex.get_sentence_boundaries(language, f"{word}. A")) == 1


class Splitter:
    """Push the pieces of a text; take the spans that they decide.

    >>> splitter = Splitter()
    >>> splitter.push("It rained. It st".encode()), splitter.finish("opped.".encode())
    ([], [(0, 10), (11, 22)])

    decided  bytes of the text whose sentences have been told
    """

    def __init__(self, language: str = "en") -> None:
        """`language` as ISO 639-1 code: whose abbreviations count; an unknown one has none."""
        self.decided = 0
        self._language = language
        self._held = ""  # the text from `decided` on

    def push(self, piece: bytes) -> list[tuple[int, int]]:
        """(byte_start, byte_end) of the sentences that are decided now; `piece` is valid UTF-8, whole characters."""
        self._held += piece.decode()
        spans: list[tuple[int, int]] = []
        at = 0
        while True:
            paragraph_end = PARAGRAPH_END.search(self._held, at, at + WINDOW)
            if paragraph_end is not None:
                ends = self._ends(at, paragraph_end.end())
            elif len(self._held) >= at + WINDOW:
                ends = self._ends(at, at + WINDOW)[:-1] or [self._cut(at)]
            else:
                self._held = self._held[at:]
                return spans
            spans += self._spans(at, ends)
            at = ends[-1]

    def finish(self, piece: bytes = b"") -> list[tuple[int, int]]:
        """The same for the last piece."""
        spans = self.push(piece)
        spans += self._spans(0, self._ends(0, len(self._held)))
        self._held = ""
        return spans

    def _ends(self, start: int, end: int) -> list[int]:
        """Where the sentences of this part of the text end, white space after them included; the last ends it."""
        import sentencex

        part = _SPACE.sub(" ", self._held[start:end])
        return [start + found["end_index"] for found in sentencex.get_sentence_boundaries(self._language, part)]

    def _cut(self, start: int) -> int:
        """Where a full window without the end of a sentence is cut."""
        to_last_word = _SPACE_TO_WORD.match(self._held, start, start + WINDOW)
        return to_last_word.end() if to_last_word else start + WINDOW

    def _spans(self, start: int, ends: list[int]) -> list[tuple[int, int]]:
        """What is decided now: the sentences that end at `ends`, the first of which starts at `start`."""
        spans = []
        for end in ends:
            sentence = self._held[start:end]
            words = sentence.strip()
            if words:
                first = self.decided + len(sentence[: sentence.index(words)].encode())
                spans.append((first, first + len(words.encode())))
            self.decided += len(sentence.encode())
            start = end
        return spans
