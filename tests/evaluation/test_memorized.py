"""Windows that stand in a corpus are found wherever they stand, and no others."""

from __future__ import annotations

from random import Random

import pytest

from rwkv_stream.evaluation import memorized
from rwkv_stream.model import load


def test_share_counts_the_windows_of_a_text_that_a_corpus_holds() -> None:
    random = Random(5)
    corpus = [[random.randrange(1000) for _ in range(size)] for size in (3, 400, 90)]
    copied = corpus[1][137:207] + [1001] * 30  # 70 tokens of it: 21 windows of 50; 30 more hold what it has not
    assert memorized.share([copied], corpus) == pytest.approx(21 / 51)
    assert memorized.share([corpus[2][:50], [7] * 50, [1]], corpus) == pytest.approx(1 / 2)
    assert memorized.share([[1, 2]], corpus) == 0.0


def test_a_window_in_another_order_is_another_window() -> None:
    row = list(range(50))
    assert memorized.share([row], [row[::-1]]) == 0.0
    assert memorized.share([row], [row]) == 1.0


def test_prompts_are_continued_greedily() -> None:
    model = load(device="cpu")
    text = model.tokenizer.encode("The old clock in the hall had stopped at a quarter to nine, nobody knew why. " * 4)
    given = memorized.prompts([text, [1, 2]], 3, 0)
    assert [len(prompt) for prompt in given] == [memorized.PROMPT] * 3
    assert all(prompt == text[begin : begin + memorized.PROMPT] for prompt in given for begin in [_place(prompt, text)])
    written = memorized.continued(model, given, 12)
    alone = memorized.continued(model, given[1:2], 12)
    assert written[1:2] == alone and all(1 <= len(row) <= 14 for row in written)


def _place(part: list[int], whole: list[int]) -> int:
    return next(i for i in range(len(whole)) if whole[i : i + len(part)] == part)
