"""The tasks of recall: one who knows scores 1, one who guesses the floor, and nothing that was trained is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.evaluation import recall
from rwkv_stream.evaluation.recall import Item
from rwkv_stream.model import Model, load
from rwkv_stream.training import exercises

TEXT = " ".join(f"In the year {year} the miller of the valley counted {year * 7 % 1000} sacks." for year in range(900))
Task = Callable[[Model, int], Iterator[Item]]
TASKS: dict[str, Task] = {
    "copies": lambda model, n: recall.copies(model, TEXT, 64, n, 3),
    "far copies": lambda model, n: recall.copies(model, TEXT, 1500, n, 3),
    "look-ups": lambda model, n: recall.look_ups(model, 4, n, 3),
    "other words": lambda model, n: recall.look_ups(model, 4, n, 3, wording="Look up the entry of {}."),
    "facts": lambda model, n: recall.facts(model, n, 3),
    "passkeys": lambda model, n: recall.passkeys(model, TEXT, 1300, n, 3),
}


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load(device="cpu")


Read = list[tuple[int, ...]]  # by each row


class Answerer:
    """Stands for a model: `answer` chooses what it writes in place of each item's answer."""

    def __init__(self, model: Model, items: list[Item], answer: Callable[[Item], tuple[int, ...]]) -> None:
        self.tokenizer, self.start_token, self._size = model.tokenizer, model.start_token, model.config.vocab_size
        self._written = [(item.tokens, (*item.tokens[: -item.n_answer], *answer(item))) for item in items]

    def zero_state(self, rows: int) -> Read:
        return [()] * rows

    def forward(
        self, tokens: Tensor, state: list[tuple[int, ...]], logits: str
    ) -> tuple[Tensor, list[tuple[int, ...]]]:
        read = [(*before, *row.tolist()) for before, row in zip(state, tokens, strict=True)]
        return torch.stack([self._hidden(row)[-tokens.shape[1] :] for row in read]), read

    def _hidden(self, read: tuple[int, ...]) -> Tensor:
        """What it writes after each token that it has read."""
        for given, written in self._written:
            n = min(len(read), len(given) - 1)
            if read[:n] == given[:n]:
                following = [*written[1:], *[0] * len(read)][: len(read)]
                return F.one_hot(torch.tensor(following), self._size).float()
        raise AssertionError("it was given what no item holds")

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def scored(model: Model, items: list[Item], answer: Callable[[Item], tuple[int, ...]]) -> recall.Score:
    return recall.score(Answerer(model, items, answer), items)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_one_who_knows_scores_1_and_one_who_is_off_by_a_token_0(shipped: Model, task: str) -> None:
    items = list(TASKS[task](shipped, 12))
    known = scored(shipped, items, lambda item: item.tokens[-item.n_answer :])
    assert (known.n, known.exact, known.tokens) == (12, 1.0, 1.0)
    wrong = scored(shipped, items, lambda item: (*item.tokens[-item.n_answer : -1], item.tokens[-1] + 1))
    assert wrong.exact == 0 and wrong.tokens == pytest.approx(1 - 12 / sum(item.n_answer for item in items))


def test_one_who_takes_any_value_scores_the_floor(shipped: Model) -> None:
    """Of four values in the list, each of as many tokens, any."""
    items, random = list(recall.look_ups(shipped, 4, 600, 1)), Random(0)

    def any_value(item: Item) -> tuple[int, ...]:
        text = shipped.tokenizer.decode(list(item.tokens[: -item.n_answer])).decode()
        lines = [line.rpartition(": ")[2] for line in text.partition("\n\n")[0].splitlines()]
        ids = tuple(shipped.tokenizer.encode(f" {random.choice(lines)}"))
        return (*ids, *[0] * item.n_answer)[: item.n_answer]

    found = scored(shipped, items, any_value)
    assert found.floor == 0.25
    assert found.exact == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 600) ** 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_items_are_a_function_of_the_seed(shipped: Model, task: str) -> None:
    first, again = (list(TASKS[task](shipped, 5)) for _ in range(2))
    assert first == again and len(set(first)) == 5


def test_keys_and_templates_are_not_those_of_training(shipped: Model) -> None:
    trained = [sentence.partition("{")[0] for told, _ in exercises.FACTS.values() for sentence in told]
    for item in recall.facts(shipped, 30, 0):
        text = shipped.tokenizer.decode(list(item.tokens)).decode()
        assert not any(len(begin) > 3 and begin in text for begin in trained), text


def test_lengths_and_distances_are_as_asked(shipped: Model) -> None:
    start = len(recall._start(shipped))
    for item in recall.copies(shipped, TEXT, 300, 3, 0):
        tokens = item.tokens[start:]
        assert tokens[: recall.ROW] == tokens[300 : 300 + recall.ROW] and len(tokens) == 300 + recall.ROW
    assert {len(item.tokens) for item in recall.passkeys(shipped, TEXT, 500, 3, 0)} == {500 + start}


def test_a_real_model_is_scored_alike_in_any_company(shipped: Model) -> None:
    """By its own greedy tokens, read one item at a time."""
    items = [*recall.look_ups(shipped, 3, 3, 0), *recall.copies(shipped, TEXT, 40, 3, 0)]
    alone = 0
    for item in items:
        logits, _ = shipped.forward(torch.tensor([item.tokens[:-1]]), logits="all")
        alone += int((logits[0, -item.n_answer :].argmax(-1) == torch.tensor(item.tokens[-item.n_answer :])).sum())
    found = recall.score(shipped, items)
    assert found.tokens == pytest.approx(alone / sum(item.n_answer for item in items))
