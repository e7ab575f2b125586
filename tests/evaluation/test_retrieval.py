"""The right text's rank, with ties in the middle; BM25 finds rare words."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_stream.evaluation import retrieval


def test_ranks_count_what_scores_higher_and_half_of_what_scores_alike() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    found = retrieval.reciprocal_ranks(scores, [0, 2, 1])
    assert found.tolist() == pytest.approx([1, 1 / 3, 1 / 2])


def test_documents_of_several_texts_are_searched() -> None:
    def record(document: str, context: str, question: str, **fields: bool) -> dict[str, str | bool]:
        return {"document": document, "context": context, "question": question, **fields}

    found = retrieval.searched(
        [
            record("a", "one", "q1"),
            record("b", "alone", "q2"),
            record("a", "two", "q3"),
            record("a", "one", "q4"),
            record("a", "three", "q5", unanswerable=True),
        ]
    )
    assert found == [retrieval.Searched(("one", "two"), ("q1", "q3", "q4"), (0, 1, 0))]


def test_bm25_finds_the_text_with_the_rare_word() -> None:
    pytest.importorskip("bm25s")
    texts = ("the cat sat on the mat", "a dog ran over the hill", "the cat and the dog slept")
    one = retrieval.Searched(texts, ("where did the dog run over a hill", "of the"), (1, 0))
    scores = retrieval.bm25(one)
    assert scores[0].argmax() == 1 and not scores[1].any()


def test_cosines() -> None:
    one = retrieval.Searched(("x", "y"), ("q",), (0,))
    found = retrieval.cosines(one, np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0]]))
    assert found.tolist() == [pytest.approx([2**-0.5, 0])]
