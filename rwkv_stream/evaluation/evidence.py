"""How well sentences that answer questions are found in whole documents: articles of SQuAD and tales of FairytaleQA.

A sentence is right that holds an answer of an annotator, word for word, within the passage that the question was asked
on. An article is put together from its passages.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np

from rwkv_stream.answers import evidence, ranker
from rwkv_stream.answers.candidates import REACH, WIDTH, Text, candidates
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.text import terms
from rwkv_stream.training import data

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.postings import Postings
    from rwkv_stream.training.split import Part, Split

Kind = Literal["article", "tale"]
KINDS: tuple[Kind, ...] = ("article", "tale")
ARTICLES = "qa-squad.jsonl.zst"
TALES = (("stories.jsonl.zst", "qa-fairytale.jsonl.zst"), ("valid-stories.jsonl.zst", "valid-qa-fairytale.jsonl.zst"))
BOOKS = "books-0{}.jsonl.zst"
_PLACES = 6  # where a document may be put into a shelf
_WORDS = re.compile(r"\w+")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the passage that it was asked on (characters of the document), and its answers; none: it has none."""

    text: str
    passage: Span
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the questions on it."""

    name: str
    kind: Kind
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, eq=False)
class Judged:
    """Candidates for one question, in the order of their first scores.

    kind       of the document that the question is about
    sentences  in the text
    values     float32 [n, F]: features
    right      bool [n]: whether the sentence answers
    held       bool [n]: whether it or a neighbour does
    """

    question: str
    kind: Kind
    sentences: int
    values: NDArray[np.float32]
    right: NDArray[np.bool_]
    held: NDArray[np.bool_]


def documents(corpus: Path, split: Split, part: Part) -> Iterator[Document]:
    """The articles and tales of a part of the training data in the folder `corpus`, as far as they have questions."""
    passages: dict[str, dict[str, list[Question]]] = {}
    for record in data.records(corpus / ARTICLES):
        if split.part(ARTICLES, record) == part:
            answers = () if record["unanswerable"] else tuple(record["answers"])
            asked = passages.setdefault(record["title"], {}).setdefault(record["context"], [])
            asked.append(Question(record["question"], (0, 0), answers))
    for title, contexts in passages.items():
        text, questions = "", []
        for context, asked in contexts.items():
            text += "\n\n" * bool(text)
            span = (len(text), len(text) + len(context))
            questions += [replace(question, passage=span) for question in asked]
            text += context
        yield Document(title, "article", text, tuple(questions))
    for stories, name in TALES:
        texts = {record["id"]: record["text"] for record in data.records(corpus / stories)}
        on_tales: dict[str, list[Question]] = {}
        for record in data.records(corpus / name):
            if split.part(name, record) != part:
                continue
            passage = _found(record["context"], texts[record["document"]])
            if passage is not None:
                asked = on_tales.setdefault(record["document"], [])
                asked.append(Question(record["question"], passage, tuple(record["answers"])))
        for document, asked in on_tales.items():
            yield Document(document, "tale", texts[document], tuple(asked))


class Shelf:
    """Texts one after the other, as one."""

    document = "shelf"

    def __init__(self, texts: Sequence[MemoryText]) -> None:
        self.texts = tuple(texts)
        self.starts = [0, *np.cumsum([text.byte_end for text in texts]).tolist()]

    def read(self, byte_start: int, byte_end: int) -> bytes:
        """These bytes of the texts."""
        parts = zip(self.texts, self.starts, strict=False)
        return b"".join(z.read(max(byte_start - at, 0), max(byte_end - at, 0)) for z, at in parts)

    def postings(self) -> Iterator[Postings]:
        """The postings of all texts."""
        for text, at in zip(self.texts, self.starts, strict=False):
            for postings in text.postings():
                yield replace(postings, starts=postings.starts + at, ends=postings.ends + at)

    def with_text(self, text: MemoryText, random: Random) -> tuple[Shelf, int]:
        """The shelf with one text more, at a random place, and the byte where that begins."""
        place = random.randrange(len(self.texts) + 1)
        shelf = Shelf((*self.texts[:place], text, *self.texts[place:]))
        return shelf, shelf.starts[place]


def shelf(corpus: Path, characters: int, number: int) -> Shelf:
    """So many characters of books in file `number` of the training data, in parts of like size."""
    joined = ""
    for record in data.records(corpus / BOOKS.format(number)):
        joined += record["text"] + "\n\n"
        if len(joined) >= characters:
            break
    part = characters // _PLACES
    return Shelf([MemoryText(joined[at : at + part]) for at in range(0, part * _PLACES, part)])


def spans(text: Text) -> list[Span]:
    """Bytes of the sentences of a text."""
    found: list[Span] = []
    for postings in text.postings():
        found += zip(postings.starts.tolist(), postings.ends.tolist(), strict=True)
    return found


def excerpt(text: MemoryText, around: Span, sentences: int, random: Random) -> tuple[MemoryText, int]:
    """So many sentences of a text, at random those of `around` among them, and the byte where they begin."""
    found = spans(text)
    at = found.index(around)
    first = random.randrange(max(at - sentences + 1, 0), at + 1)
    begin, end = found[first][0], found[min(first + sentences, len(found)) - 1][1]
    return MemoryText(text.read(begin, end).decode()), begin


def right(document: Document, text: MemoryText) -> list[frozenset[Span]]:
    """For each question on a document: bytes of the sentences that answer it."""
    sentences = spans(text)
    squashed = [_squashed(text.read(*span).decode()) for span in sentences]
    found = []
    for question in document.questions:
        begin, end = (len(document.text[:at].encode()) for at in question.passage)
        answers = [answer for answer in map(_squashed, question.answers) if answer.strip()]
        within = [i for i, (a, b) in enumerate(sentences) if a < end and b > begin]
        found.append(frozenset(sentences[i] for i in within if any(answer in squashed[i] for answer in answers)))
    return found


def judged(
    question: str,
    kind: Kind,
    text: Text,
    answers: frozenset[Span],
    start: int = 0,
    *,
    kept: Mapping[str, float],
    neutral: bool = False,
) -> Judged:
    """Candidates for a question whose document begins at byte `start` of a text; the last two as in `features`."""
    found = candidates(question, [text])
    shifted = {(a + start, b + start) for a, b in answers}
    is_right = np.array([[tuple(span) in shifted for span in row] for row in found.spans.tolist()], bool)
    is_right = is_right.reshape(len(found), WIDTH)
    values = np.zeros((0, 0), np.float32)
    if len(found):
        _, values = ranker.features(found, evidence.sentences(found, [text]), kept, neutral=neutral)
    held = is_right[:, REACH - 1] | is_right[:, REACH] | is_right[:, REACH + 1]
    return Judged(question, kind, found.asked.sentences, values, is_right[:, REACH], held)


@dataclass(frozen=True, eq=False)
class Calibration:
    """How confidence agrees with what is right, in bins of like many questions, least sure first.

    confidence   [bins]: the mean
    right        [bins]: the share
    half_widths  [bins]: of that, at 95 %
    error        mean distance of confidence and share, each bin by its questions (expected calibration error)
    """

    confidence: NDArray[np.floating]
    right: NDArray[np.floating]
    half_widths: NDArray[np.floating]
    error: float


def calibration(confidence: NDArray[np.floating], right: NDArray[np.bool_], bins: int) -> Calibration:
    """How n ≥ bins confidences agree with what was right."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    sizes = np.array([len(part) for part in parts])
    means, shares = (np.array([values[part].mean() for part in parts]) for values in (confidence, right))
    widths = 1.96 * np.sqrt(shares * (1 - shares) / sizes)
    return Calibration(means, shares, widths, float(np.average(np.abs(means - shares), weights=sizes)))


def kept_words(documents: Sequence[Document]) -> dict[str, float]:
    """How often a sentence that answers has a word of its question, by stems.

    Of stems that 12 questions have, on 4 documents: those on few are names.
    """
    asked: Counter[str] = Counter()
    on: dict[str, set[str]] = {}
    seen: Counter[str] = Counter()
    analyzer = terms.Analyzer("en")
    for document in documents:
        text = MemoryText(document.text)
        for question, spans in zip(document.questions, right(document, text), strict=True):
            if spans:
                held = {term for span in spans for term in analyzer.terms(text.read(*span).decode())}
                sought = {analyzer.term(z) for z in terms.words(question.text) if z not in analyzer.stop_words}
                asked.update(sought)
                for term in sought:
                    on.setdefault(term, set()).add(document.name)
                seen.update(sought & held)
    return {
        term: round((seen[term] + 5 * ranker.KEPT) / (n + 5), 2)
        for term, n in sorted(asked.items())
        if n >= 12 and len(on[term]) >= 4
    }


def _squashed(text: str) -> str:
    return f" {' '.join(_WORDS.findall(text.lower()))} "


def _found(passage: str, text: str) -> Span | None:
    """The characters of a passage in a text, white space aside."""
    at = text.find(passage)
    if at >= 0:
        return at, at + len(passage)
    match = re.search(r"\s+".join(map(re.escape, passage.split())), text)
    return match.span() if match else None
