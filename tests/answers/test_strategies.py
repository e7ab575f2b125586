"""Each strategy answers what `ask` or a prompt would, says what it needs, and is known by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

import rwkv_stream as rs
from rwkv_stream.answers import prompts
from rwkv_stream.answers.strategies import STRATEGIES, Posed, Reply, Subject, named
from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate

QUESTIONS = ["Who keeps the light?", "Why?"]


def test_state_answers_as_ask_does(bytes_model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The keeper walked over an old stone bridge toward the light. " * 30)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(tmp_path / "text.txt", model=bytes_model, store=store)
    snapshot = store.get("text.txt")
    asked = rs.ask(QUESTIONS, snapshot=snapshot, model=bytes_model)
    subject = Subject(bytes_model, "text.txt", state=snapshot.state())
    found = list(STRATEGIES["state"].replies([Posed(question) for question in QUESTIONS], subject))
    assert found == [Reply(answer.answer) for answer in asked]


def test_passage_answers_on_its_own_passage_alone(bytes_model: Model) -> None:
    form = prompts.family(bytes_model)
    posed = [Posed(question, f"Passage {number}.") for number, question in enumerate(QUESTIONS)]
    found = [reply.text for reply in STRATEGIES["passage"].replies(posed, Subject(bytes_model, "d"))]
    expected = [
        "".join(
            generate(
                bytes_model,
                one.passage + prompts.fill(form.template, one.question),  # type: ignore[operator]
                state=bytes_model.start()[1],
                sampling=prompts.answering(form),
            )
        ).strip()
        for one in posed
    ]
    assert found == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_needs_and_has_not_is_said(bytes_model: Model, name: str) -> None:
    assert STRATEGIES[name].name == name and STRATEGIES[name].needs <= {"state", "text", "passage"}
    with pytest.raises(UsageError, match="answering on 'book': expected a"):
        list(STRATEGIES[name].replies([Posed("Who?")], Subject(bytes_model, "book")))


def test_names() -> None:
    assert named("state") is STRATEGIES["state"]
    with pytest.raises(UsageError, match="expected a strategy of state, passage, quote, reread, found 'guess'"):
        named("guess")
