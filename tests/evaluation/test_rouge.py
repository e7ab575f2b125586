"""ROUGE against figures of the package rouge-score 0.1.2, counted by hand too."""

from __future__ import annotations

import pytest

from rwkv_stream.evaluation.rouge import rouge, words


@pytest.mark.parametrize(
    ("summary", "reference", "expected"),
    [
        # 6 of 10 and 8 words; the pairs "the keeper" and "ship sail"; "lit the keeper ship sail" or so: 4 in order
        ("The keeper lit the lamps, and the ship sailed home.", "Lamps were lit by the keeper; ships sailed.", None),
        ("a b c", "a b c", (1, 1, 1)),
        ("a b", "c d", (0, 0, 0)),
        ("", "a", (0, 0, 0)),
        ("a a a b", "a b b", (4 / 7, 2 / 5, 4 / 7)),
        ("c a b", "a b c", (1, 1 / 2, 2 / 3)),
    ],
)
def test_figures(summary: str, reference: str, expected: tuple[float, float, float] | None) -> None:
    found = rouge(words(summary), words(reference))
    assert found == pytest.approx(expected or (2 / 3, 1 / 4, 4 / 9))


def test_words_are_stems_of_lower_case() -> None:
    assert words("The Ships' sailing, 1,234 boats—was it?") == ["the", "ship", "sail", "1", "234", "boat", "was", "it"]
