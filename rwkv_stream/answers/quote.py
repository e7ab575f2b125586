"""Answers quoted from texts: the few words that answer, in their sentence and passage, with their place. No model is
needed: what is said stands in the text, at the bytes that are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.answers import evidence, spans
from rwkv_stream.answers.candidates import REACH
from rwkv_stream.answers.spans import Passage
from rwkv_stream.errors import UsageError
from rwkv_stream.text.sentences import PARAGRAPH_END

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.answers.candidates import Candidates, Text

AROUND = 2  # sentences of such a passage on each side of the one that was found


@dataclass(frozen=True, slots=True)
class Quote:
    """An answer that stands in a text; all offsets are bytes of the decoded UTF-8.

    text_index                  which of the texts it is of
    answer                      the words that answer, as they stand there; of a text that is not English the sentence
    byte_start, byte_end        those
    sentence_start, sentence_end, passage_start, passage_end  their sentence, and that with its neighbours
    passage                     the text of the latter
    confidence                  that the passage holds the answer, 0 to 1
    """

    text_index: int
    document: str
    answer: str
    byte_start: int
    byte_end: int
    sentence_start: int
    sentence_end: int
    passage_start: int
    passage_end: int
    passage: str
    confidence: float


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that was found.

    text_index   of the texts
    sentences    bytes of its sentences
    passage      these as `spans` reads them
    confidence   that it or a neighbour holds the answer
    """

    text_index: int
    sentences: tuple[tuple[int, int], ...]
    passage: Passage
    confidence: float

    @property
    def span(self) -> tuple[int, int]:
        """Bytes of the sentence that was found."""
        return self.sentences[self.passage.found]

    def byte(self, word: spans.Word, character: int) -> int:
        """The byte of the text where a character of a word's sentence lies."""
        return self.sentences[word.sentence][0] + len(self.passage.sentences[word.sentence][:character].encode())


def passages(question: str, texts: Sequence[Text], most: int) -> list[Found]:
    """The passages that fit a question best, best first, as far as they don't overlap; none where the texts do not
    speak of what is asked."""
    return around(*evidence.spoken_of(question, texts), texts, most)


def around(
    found: Candidates,
    scores: NDArray[np.floating],
    confidence: NDArray[np.floating],
    texts: Sequence[Text],
    most: int,
) -> list[Found]:
    """The passages of candidates that stand in the order of their scores."""
    fit = np.exp(scores - scores.max(initial=-np.inf))
    fits = {_where(found, i): float(fit[i]) for i in range(len(found))}
    taken, chosen = set[tuple[int, int]](), list[Found]()
    for i in range(len(found)):
        if _where(found, i) not in taken:
            made = _passage(found, i, texts, fits, float(confidence[i]))
            taken |= {(made.text_index, start) for start, _ in made.sentences}
            chosen.append(made)
            if len(chosen) == most:
                break
    return chosen


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
    return Found(index, tuple(bytes_of), passage, confidence)


def quotes(question: str, texts: Sequence[Text], k: int = 1) -> list[Quote]:
    """The k best answers that stand in the texts, best first; none where the texts do not speak of what is asked, which
    does not say that no text holds the answer.

    raises  UsageError for k < 1
    """
    if k < 1:
        raise UsageError(f"quoting: expected at least 1 answer to be asked for, found k={k}")
    return [_quote(question, one, texts[one.text_index]) for one in passages(question, texts, k)]


def is_english(text: Text) -> bool:
    """Whether the words of a text are ones that `spans` knows."""
    return next((postings.language for postings in text.postings() if len(postings)), "") == spans.LANGUAGE


def _quote(question: str, one: Found, text: Text) -> Quote:
    start, end = one.span
    if is_english(text):
        (span,) = spans.shipped().find(question, [one.passage])
        start, end = one.byte(span.first, span.first.start), one.byte(span.last, span.last.end)
    within = next(i for i, (_, sentence_end) in enumerate(one.sentences) if start < sentence_end)
    first = one.sentences[max(within - 1, 0)][0]
    last = max(one.sentences[min(within + 1, len(one.sentences) - 1)][1], end)
    passage = text.read(first, last)
    return Quote(
        one.text_index,
        text.document,
        passage[start - first : end - first].decode(),
        start,
        end,
        *one.sentences[within],
        first,
        last,
        passage.decode(),
        one.confidence,
    )
