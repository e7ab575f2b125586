"""How well questions on passages are answered: overlap-F1 and exact match, and the share of answers that quote.

A question stands after the passage, before it, or before and after it.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rwkv_stream.answers.prompts import Order, answering, around, family
from rwkv_stream.model import Model
from rwkv_stream.model.generation import complete

ORDERS: tuple[Order, ...] = ("after", "before", "both")
ROWS = 16  # questions that are answered side by side
ARTICLES = {"a", "an", "the"}
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question on a passage, and what are right answers; none where the passage does not say."""

    passage: str
    question: str
    answers: tuple[str, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Asked:
        """That of a record with `context`, `question`, `answers` or `answer`, and maybe `unanswerable`."""
        answers = () if record.get("unanswerable") else tuple(record.get("answers") or [record["answer"]])
        return cls(record["context"], record["question"], answers)


@dataclass(frozen=True, slots=True)
class Answered:
    """Of n questions that have an answer: means of F1 and exact match, and the share whose answer the passage holds.

    All 0 to 1. An answer of no words is held by no passage.
    """

    n: int
    f1: float
    exact: float
    quoted: float


def words(text: str) -> list[str]:
    """The words that count (SQuAD 1.1: evaluate-v1.1.py, `normalize_answer`)."""
    return [word for word in text.lower().translate(NO_PUNCTUATION).split() if word not in ARTICLES]


def overlap_f1(answer: str, right: str) -> float:
    """F1 of the words of both, each counted as often as it occurs (SQuAD 1.1: evaluate-v1.1.py, `f1_score`)."""
    given, expected = words(answer), words(right)
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected)) if shared else 0.0


def is_quoted(answer: str, passage: str) -> bool:
    """Whether the words of an answer stand in a passage, one after the other."""
    found = words(answer)
    return bool(found) and f" {' '.join(found)} " in f" {' '.join(words(passage))} "


def answers(model: Model, asked: Iterable[Asked], order: Order = "after") -> Iterator[str]:
    """What a model writes for each question, greedily, several side by side."""
    form, asked = family(model), iter(asked)
    sampling = answering(form)
    _, start = model.start()
    while some := list(islice(asked, ROWS)):
        prompts = [around(form, one.question, one.passage, order) for one in some]
        rows = complete(model, prompts, [start] * len(some), sampling, range(len(some)))
        yield from (row.text.strip() for row in rows)


def judged(asked: Iterable[Asked], given: Iterable[str]) -> Answered:
    """How good answers are; of several right ones the nearest counts. Questions without an answer are left out."""
    f1, exact, quoted = list[float](), list[bool](), list[bool]()
    for one, answer in zip(asked, given, strict=True):
        if one.answers:
            f1.append(max(overlap_f1(answer, right) for right in one.answers))
            exact.append(any(words(answer) == words(right) for right in one.answers))
            quoted.append(is_quoted(answer, one.passage))
    n = len(f1)
    return Answered(n, sum(f1) / n, sum(exact) / n, sum(quoted) / n)
