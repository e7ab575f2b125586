"""The sentences around candidates, as short answers are sought in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.answers.candidates import REACH
from rwkv_stream.answers.spans import Passage
from rwkv_stream.text.sentences import PARAGRAPH_END

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.answers import spans
    from rwkv_stream.answers.candidates import Candidates, Text

AROUND = 2  # sentences of a passage on each side of the one that was found


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that was found.

    text_index   of the texts
    language     of that
    sentences    bytes of its sentences
    text         what stands from the first of them to the end of the last
    passage      the sentences as `spans` reads them
    confidence   that it or a neighbour holds the answer
    """

    text_index: int
    language: str
    sentences: tuple[tuple[int, int], ...]
    text: bytes
    passage: Passage
    confidence: float

    @property
    def span(self) -> tuple[int, int]:
        """Bytes of the sentence that was found."""
        return self.sentences[self.passage.found]

    def byte(self, word: spans.Word, character: int) -> int:
        """The byte of the text where a character of a word's sentence lies."""
        return self.sentences[word.sentence][0] + len(self.passage.sentences[word.sentence][:character].encode())

    def read(self, byte_start: int, byte_end: int) -> str:
        """What stands between these bytes of the text."""
        first = self.sentences[0][0]
        return self.text[byte_start - first : byte_end - first].decode()


def around(
    found: Candidates, scores: NDArray[np.floating], confidence: NDArray[np.floating], texts: Sequence[Text]
) -> Iterator[Found]:
    """The passages of candidates with their scores, in their order."""
    fit = np.exp(scores - scores.max(initial=-np.inf))
    fits = {_where(found, i): float(fit[i]) for i in range(len(found))}
    for i in range(len(found)):
        yield _passage(found, i, texts, fits, float(confidence[i]))


def _where(found: Candidates, i: int) -> tuple[int, int]:
    """The text of a candidate and the byte where it begins."""
    return int(found.texts[i]), int(found.spans[i, REACH, 0])


def _passage(
    found: Candidates, i: int, texts: Sequence[Text], fits: dict[tuple[int, int], float], confidence: float
) -> Found:
    index = int(found.texts[i])
    near = found.spans[i, REACH - AROUND : REACH + AROUND + 1].tolist()
    bytes_of = [(start, end) for start, end in near if start >= 0]
    own = bytes_of.index(tuple(near[AROUND]))
    first = bytes_of[0][0]
    read = texts[index].read(first, bytes_of[-1][1])
    told = [read[start - first : end - first].decode() for start, end in bytes_of]
    gaps = [read[bytes_of[j][1] - first : bytes_of[j + 1][0] - first].decode() for j in range(len(bytes_of) - 1)]
    breaks = np.concatenate([[0], np.cumsum([bool(PARAGRAPH_END.search(gap)) for gap in gaps])])
    apart = [bool(paragraph != breaks[own]) for paragraph in breaks]
    passage = Passage(told, own, [fits.get((index, start), 0.0) for start, _ in bytes_of], apart)
    return Found(index, found.asked.written[index], tuple(bytes_of), read, passage, confidence)
