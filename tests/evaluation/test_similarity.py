"""Pairs with scores, and rank correlation as it is defined."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rwkv_stream.errors import InputError
from rwkv_stream.evaluation.similarity import Pair, pairs, spearman


def test_spearman() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 5000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 1.125, variances 1.125 and 1.25
    assert spearman([1, 2, 2, 5], [0, 7, 3, 9]) == pytest.approx(1.125 / math.sqrt(1.125 * 1.25))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_pairs_are_read_and_what_is_none_is_lost_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"sentence1": "a", "sentence2": "b", "score": 3}\n'
        '{"sentence1": "a", "score": 3}\n'
        '{"sentence1": "a", "sentence2": "b", "score": true}\n'
        '{"sentence1": "a", "sentence2": "b", "score": NaN}\n'
        "nothing\n"
        '{"id": "x", "sentence1": "a", "sentence2": "b", "score": 0.5}\n'
    )
    first, *lost, last = pairs(path)
    assert first == Pair("1", ("a", "b"), 3.0) and last == Pair("x", ("a", "b"), 0.5)
    told = [str(error) for error in lost if isinstance(error, InputError)]
    assert len(told) == 4
    for error, reason in zip(told, ("texts sentence1 and", "a number", "a number", "expected JSON"), strict=True):
        assert "p.jsonl', row " in error and reason in error
