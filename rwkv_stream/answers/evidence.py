"""Evidence: the sentences of texts that speak of what a question asks, with how sure that is. No model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.answers import ranker
from rwkv_stream.answers.candidates import REACH, Candidates, Text, candidates
from rwkv_stream.answers.passages import Found, around
from rwkv_stream.errors import UsageError
from rwkv_stream.text.postings import Indexer, Postings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.readers.places import Place

_EXTENT = 1 << 20  # characters of a text in memory that are indexed together
_READ_AT_ONCE = 1 << 16  # bytes


@dataclass(frozen=True, slots=True)
class Evidence:
    """A sentence in its passage that may hold an answer.

    text_index                     which of the texts it is of
    byte_start, byte_end           the sentence, in decoded UTF-8
    passage_start, passage_end     the sentence with the one before and the one after
    score                          by which evidence for one question is ordered
    confidence                     that the passage holds the answer, 0 to 1
    """

    text_index: int
    document: str
    byte_start: int
    byte_end: int
    passage_start: int
    passage_end: int
    sentence: str
    passage: str
    score: float
    confidence: float


def find(question: str, texts: Sequence[Text], k: int = 5) -> list[Evidence]:
    """Evidence for the answer to a question, the best k sentences of all texts, best first.

    A sentence that an earlier one's passage holds is left out. Nothing where the texts do not speak of what is asked:
    it does not say that no text holds the answer.
    raises  UsageError for k < 1
    """
    if k < 1:
        raise UsageError(f"searching for evidence: expected at least 1 sentence to be found, found k={k}")
    told = spoken_of(question, texts)
    found = told.candidates
    evidence: list[Evidence] = []
    for i in range(len(found)):
        index, (start, end) = int(found.texts[i]), found.spans[i, REACH].tolist()
        if any(z.text_index == index and z.passage_start <= start < z.passage_end for z in evidence):
            continue
        around = found.spans[i, REACH - 1 : REACH + 2]
        around = around[around[:, 0] >= 0]
        first, last = int(around[0, 0]), int(around[-1, 1])
        passage = texts[index].read(first, last)
        evidence.append(
            Evidence(
                index,
                texts[index].document,
                start,
                end,
                first,
                last,
                passage[start - first : end - first].decode(),
                passage.decode(),
                float(told.scores[i]),
                float(told.confidence[i]),
            )
        )
        if len(evidence) == k:
            break
    return evidence


def spoken_of(question: str, texts: Sequence[Text]) -> Ranked:
    """All candidates, best first; none where the texts do not speak of what is asked."""
    found = ranked(question, texts)
    asked = found.candidates.asked
    is_told = len(found.candidates) and found.confidence[0] >= ranker.shipped().threshold(
        asked.language, asked.sentences
    )
    return found if is_told else found.best(np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class Ranked:
    """Candidates, best first.

    values       float32 [n, F]: the ranker's features
    scores       float32 [n]
    confidence   float32 [n]: that the passage holds the answer
    """

    candidates: Candidates
    values: NDArray[np.float32]
    scores: NDArray[np.float32]
    confidence: NDArray[np.float32]

    def best(self, order: NDArray[np.integer]) -> Ranked:
        """These candidates, in this order."""
        rows = (self.values, self.scores, self.confidence)
        return Ranked(self.candidates.best(order), *(row[order] for row in rows))

    def passages(self, texts: Sequence[Text]) -> Iterator[Found]:
        """Their passages, as short answers are sought in them."""
        return around(self.candidates, self.scores, self.confidence, texts)


def ranked(question: str, texts: Sequence[Text]) -> Ranked:
    """All candidates for a question."""
    found = candidates(question, texts)
    none = np.zeros(0, np.float32)
    if not len(found):
        return Ranked(found, np.zeros((0, 0), np.float32), none, none)
    used = ranker.shipped()
    _, values = ranker.features(found, sentences(found, texts), used.kept)
    scores = used.scores(values)
    confidence = used.confidence(values, scores, found.asked.sentences)
    return Ranked(found, values, scores, confidence).best(np.argsort(-scores, kind="stable"))


def sentences(found: Candidates, texts: Sequence[Text]) -> list[str]:
    """The sentences of candidates. What lies close together is read at once, each text from its beginning on."""
    made = [""] * len(found)
    spans = found.spans[:, REACH]
    order = np.lexsort((spans[:, 0], found.texts))
    first = 0
    while first < len(order):
        text, begin = found.texts[order[first]], int(spans[order[first], 0])
        near = (found.texts[order[first:]] == text) & (spans[order[first:], 1] <= begin + _READ_AT_ONCE)
        together = order[first : first + max(1, int(near.sum()))]
        read = texts[int(text)].read(begin, int(spans[together, 1].max()))
        for i in together:
            made[i] = read[spans[i, 0] - begin : spans[i, 1] - begin].decode()
        first += len(together)
    return made


class MemoryText:
    """A text in memory, indexed as one that a store keeps."""

    def __init__(self, text: str, document: str = "text") -> None:
        self.document = document
        self.byte_start = 0
        self._data = text.encode()
        self.byte_end = len(self._data)
        self._postings: list[Postings] = []
        indexer = Indexer()
        for at in range(0, len(text), _EXTENT):
            indexer.push(text[at : at + _EXTENT].encode())
            self._postings.append(indexer.cut())
        self._postings.append(indexer.cut(final=True))

    def read(self, byte_start: int, byte_end: int) -> bytes:
        """These bytes of the text."""
        return self._data[byte_start:byte_end]

    def place(self, byte: int) -> Place:
        """The line of a byte."""
        return {"line": self._data.count(b"\n", 0, byte) + 1}

    def postings(self, byte_start: int = 0) -> Iterator[Postings]:
        """The postings, one extent at a time; those may be left out whose sentences all begin before `byte_start`."""
        return (one for one in self._postings if len(one) and one.starts[-1] >= byte_start)
