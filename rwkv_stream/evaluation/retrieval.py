"""How well a question finds the text that answers it, among all texts of one document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rwkv_stream.errors import UsageError
from rwkv_stream.extras import needed
from rwkv_stream.training import heads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Searched:
    """Texts of one document, and questions of which each is answered by one of them: right [questions]."""

    texts: tuple[str, ...]
    questions: tuple[str, ...]
    right: tuple[int, ...]


def searched(records: Iterable[Mapping[str, Any]]) -> list[Searched]:
    """The documents of records with `question`, `context` and `document` or `title`, that have several contexts."""
    found: dict[str, tuple[dict[str, int], list[str], list[int]]] = {}
    for record in records:
        if record.get("unanswerable"):
            continue
        texts, questions, right = found.setdefault(record.get("document") or record["title"], ({}, [], []))
        right.append(texts.setdefault(record["context"], len(texts)))
        questions.append(record["question"])
    return [Searched(tuple(t), tuple(q), tuple(r)) for t, q, r in found.values() if len(t) > 1]


def reciprocal_ranks(scores: Scores, right: Sequence[int]) -> Scores:
    """1 / rank of the right text for each question; among texts that score alike it is taken to stand in the middle.

    scores  [questions, texts], high where a text fits
    """
    found: Scores = heads.reciprocal_ranks(torch.from_numpy(scores), right).numpy()
    return found


def bm25(one: Searched) -> Scores:
    """BM25 of each question and text (the library bm25s, Lucene's form), English stop words left out.

    Raises UsageError where it is not installed.
    """
    with needed("bm25s", "eval", "searching by words", UsageError):
        import bm25s

    index = bm25s.BM25(corpus=None)
    index.index(bm25s.tokenize(list(one.texts), stopwords="en", show_progress=False), show_progress=False)
    asked = bm25s.tokenize(list(one.questions), stopwords="en", return_ids=False, show_progress=False)
    return np.stack([index.get_scores(words) if words else np.zeros(len(one.texts)) for words in asked])


def cosines(one: Searched, texts: Scores, questions: Scores) -> Scores:
    """Cosine of each question's vector [questions, D] and text's [texts, D]; of a vector of zeros 0."""
    unit = [z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (questions, texts)]
    products: Scores = unit[0] @ unit[1].T
    return products
