"""Vectors of words by the company that they keep."""

from __future__ import annotations

import numpy as np

from rwkv_stream.training.word_vectors import word_vectors, words_of


def test_words_in_like_company_are_alike() -> None:
    random = np.random.default_rng(0)
    animals, drinks = ["cat", "dog", "cow"], ["tea", "milk", "wine"]
    texts = [
        " ".join(
            f"the {random.choice(animals)} runs home ."
            if random.random() < 0.5
            else f"we drink hot {random.choice(drinks)} now !"
            for _ in range(50)
        )
        for _ in range(20)
    ]
    words, vectors = word_vectors(texts, 20, 4)
    assert words[0] in ("the", "runs", "home", ".", "we", "drink", "hot", "now", "!")
    assert vectors.shape == (len(words) + 1, 4) and not vectors[-1].any()
    of = dict(zip(words, vectors, strict=False))
    for one, other, odd in [("cat", "dog", "tea"), ("tea", "wine", "cow")]:
        assert of[one] @ of[other] > 0.9 > of[one] @ of[odd] + 0.3


def test_the_commonest_words_are_kept() -> None:
    words, vectors = word_vectors(["a a a b b c", "a b"], 2, 1)
    assert words == ["a", "b"] and len(vectors) == 3
    assert words_of("Don't stop, Jean-Luc!") == ["don't", "stop", ",", "jean-luc", "!"]
