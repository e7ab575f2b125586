"""Answers quoted from texts: the few words that answer, in their sentence and passage, with their place. No model is
needed: what is said stands in the text, at the bytes that are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.answers import english, evidence, spans
from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from rwkv_stream.answers.candidates import Text
    from rwkv_stream.answers.passages import Found


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


def passages(question: str, texts: Sequence[Text], most: int) -> list[Found]:
    """The passages that fit a question best, best first, as far as they don't overlap; none where the texts do not
    speak of what is asked."""
    chosen: list[Found] = []
    taken = set[tuple[int, int]]()
    for one in evidence.spoken_of(question, texts).passages(texts):
        if (one.text_index, one.span[0]) not in taken:
            taken |= {(one.text_index, start) for start, _ in one.sentences}
            chosen.append(one)
            if len(chosen) == most:
                break
    return chosen


def quotes(question: str, texts: Sequence[Text], k: int = 1) -> list[Quote]:
    """The k best answers that stand in the texts, best first; none where the texts do not speak of what is asked, which
    does not say that no text holds the answer.

    raises  UsageError for k < 1
    """
    if k < 1:
        raise UsageError(f"quoting: expected at least 1 answer to be asked for, found k={k}")
    return [of_passage(question, one, texts[one.text_index].document) for one in passages(question, texts, k)]


def of_passage(question: str, one: Found, document: str) -> Quote:
    """The words of a passage that answer a question best, whether or not it speaks of what is asked.

    document  whose name the quote has
    """
    start, end = one.span
    if one.language == english.LANGUAGE:
        (span,) = spans.shipped().find(question, [one.passage])
        start, end = one.byte(span.first, span.first.start), one.byte(span.last, span.last.end)
    within = next(i for i, (_, sentence_end) in enumerate(one.sentences) if start < sentence_end)
    first = one.sentences[max(within - 1, 0)][0]
    last = max(one.sentences[min(within + 1, len(one.sentences) - 1)][1], end)
    return Quote(
        one.text_index,
        document,
        one.read(start, end),
        start,
        end,
        *one.sentences[within],
        first,
        last,
        one.read(first, last),
        one.confidence,
    )
