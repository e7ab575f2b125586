"""Contexts are read as a whole prompt would be, though what they begin with is read once; answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_stream.answers.prompts import family
from rwkv_stream.evaluation import recall
from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.evaluation.recall import Trial, Trunk
from rwkv_stream.evaluation.tasks import TASKS, Context, Maker, Query
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling

TEXT = "".join(f"In the year {year} the miller counted {year * 7 % 1000} sacks. " for year in range(60))
DEPTHS = (0.0, 40.0, 100.0)


def maker_of(model: Model) -> Maker:
    return Maker(model.tokenizer, family(model), Haystack.of("sacks", [TEXT.encode()], model.tokenizer))


@pytest.mark.parametrize(
    ("answer", "right", "share"),
    [
        ("It is 1234567.", ["1234567"], 1),
        ("12345678", ["1234567"], 0),
        ("abcde, FGHIJ and more", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"], 0.5),
        ("catalogue", ["cat"], 0),
        ("the hat of Ann (red)", ["the hat", "(red)"], 1),
        ("", ["x"], 0),
    ],
)
def test_score(answer: str, right: Sequence[str], share: float) -> None:
    assert recall.score(answer, right) == share


class Recorder:
    """A model that notes how many tokens it is given."""

    def __init__(self, model: Model) -> None:
        self._model, self.tokens = model, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward_packed(self, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        self.tokens += len(tokens)
        return self._model.forward_packed(tokens, *arguments, **options)


@pytest.mark.parametrize("name", ["niah_single", "niah_multiquery", "vt", "look_up", "copy"])
def test_trials_are_those_of_whole_prompts(bpe_model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "KEPT", 2)
    maker, model = maker_of(bpe_model), Recorder(bpe_model)
    made = list(TASKS[name].contexts(maker, 2500, 2, DEPTHS, 0))
    found = list(recall.trials(model, maker, made, Trunk(model, maker.haystack)))  # type: ignore[arg-type]
    asked = [(number, context, query) for number, context in made for query in context.queries]
    assert [(trial.number, trial.query) for trial in found] == [(number, query) for number, _, query in asked]
    for trial, (_, context, query) in zip(found, asked, strict=True):
        prompt = [*whole(maker, context), *maker.tokenizer.encode_prompt(query.prompt)]
        sampling = Sampling(temperature=0, max_tokens=200, stop=maker.form.stop)
        expected = "".join(generate(bpe_model, prompt, state=bpe_model.zero_state(), sampling=sampling))
        assert trial.answer and expected.strip().startswith(trial.answer)
        assert trial.tokens == len(prompt)
        assert trial.score == recall.score(trial.answer, query.answers)
    assert sum(trial.computed for trial in found) == model.tokens


def whole(maker: Maker, context: Context) -> list[int]:
    tokens = list(context.opening)
    for part in context.parts:
        tokens += maker.haystack.tokens(part.start, part.stop).tolist() if isinstance(part, range) else part
    return tokens


def test_what_several_begin_with_is_read_once(bytes_model: Model) -> None:
    """Of needles at 0, 40 and 100 % in the same text no more than the openings and the rests is read."""
    maker = maker_of(bytes_model)
    made = list(TASKS["passkey"].contexts(maker, 6000, 6, DEPTHS, 0))
    found = list(recall.trials(bytes_model, maker, made, Trunk(bytes_model, maker.haystack)))
    tokens, computed = (sum(getattr(trial, part) for trial in found) for part in ("tokens", "computed"))
    rests = 6 * (1 + 0.6 + 0) + 1
    assert computed / tokens == pytest.approx(rests / 18, abs=0.03)


def test_a_context_is_asked_several_things_for_one_reading(bytes_model: Model) -> None:
    maker = maker_of(bytes_model)
    (number_and_context,) = TASKS["vt"].contexts(maker, 3000, 1, DEPTHS, 0)
    found = list(recall.trials(bytes_model, maker, [number_and_context], Trunk(bytes_model, maker.haystack)))
    assert len(found) == 4 and sum(trial.computed for trial in found) < 1.6 * 3000


def test_the_states_that_are_kept_are_few(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "KEPT", 3)
    trunk = Trunk(bytes_model, maker_of(bytes_model).haystack)
    computed = [trunk.at((), place)[1] for place in (10, 20, 30, 40, 20, 5)]
    assert computed == [10, 10, 10, 10, 20, 5], "20 was left for 40"
    state, _ = trunk.at((), 40)
    _, expected = bytes_model.forward(torch.from_numpy(maker_of(bytes_model).haystack.tokens(0, 40))[None])
    assert all(torch.allclose(state[name], expected[name], atol=1e-5) for name in expected)


def test_an_answer_is_as_long_as_what_is_right_asks_for(bytes_model: Model) -> None:
    maker = maker_of(bytes_model)
    context = Context((1, 2), ([3],), (Query("a", ("x" * 10,), 0.1), Query("a", ("x" * 100,), 0.1)))
    short, long = recall.trials(bytes_model, maker, [(0, context)], Trunk(bytes_model, maker.haystack))
    assert isinstance(short, Trial) and short.tokens == 4
    assert len(long.answer) > len(short.answer) and long.answer[:20] == short.answer[:20]
