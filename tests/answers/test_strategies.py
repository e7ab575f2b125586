"""Each strategy answers what `ask` or a prompt would, says what it needs, and is known by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import program

import rwkv_stream as rs
from rwkv_stream.answers import prompts
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import STRATEGIES, named, replies
from rwkv_stream.answers.strategy import Subject
from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate
from rwkv_stream.store.references import Found

QUESTIONS = ["Who keeps the light?", "Why?"]


def test_state_answers_as_ask_does(bytes_model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The keeper walked over an old stone bridge toward the light. " * 30)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(tmp_path / "text.txt", model=bytes_model, store=store)
    snapshot = store.get("text.txt")
    asked = rs.ask(QUESTIONS, snapshot=snapshot, model=bytes_model)
    subject = Subject("text.txt", bytes_model, rs.snapshot_at("text.txt", model=bytes_model, store=store).state())
    found = [one for _, (one,) in replies(map(Question, QUESTIONS), STRATEGIES["state"], subject)]
    assert [(one.text, one.made, one.spans) for one in found] == [(z.answer, z.tokens, None) for z in asked]


def test_passage_answers_on_its_own_passage_alone(bytes_model: Model) -> None:
    form = prompts.family(bytes_model)
    posed = [Question(question, passage=f"Passage {number}.") for number, question in enumerate(QUESTIONS)]
    found = [one.text for _, (one,) in replies(posed, STRATEGIES["passage"], Subject("d", bytes_model))]
    expected = [
        "".join(
            generate(
                bytes_model,
                one.passage + prompts.fill(form.template, one.text),  # type: ignore[operator]
                state=bytes_model.start()[1],
                sampling=prompts.answering(form),
            )
        ).strip()
        for one in posed
    ]
    assert found == expected


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_a_strategy_needs_and_has_not_is_said(bytes_model: Model, name: str) -> None:
    assert STRATEGIES[name].name == name
    with pytest.raises(UsageError, match="answering on 'book': expected "):
        list(replies([Question("Who?")], STRATEGIES[name], Subject("book", bytes_model)))


@pytest.mark.parametrize("strategy", ["auto", "quote", "reread", "state"])
def test_a_reference_is_looked_up_for_its_reading_and_for_its_position(
    program_folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    Path("story.txt").write_text("The keeper of the light was old. He slept by day. " * 3)
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    monkeypatch.delenv("RWKV_STREAM_MODEL")
    asked, locate = list[str](), rs.Store.locate

    def counted(store: rs.Store, ref: str, **more: str | None) -> Found:
        asked.append(ref)
        return locate(store, ref, **more)

    monkeypatch.setattr(rs.Store, "locate", counted)
    options = () if strategy == "quote" else ("--max-tokens", 2)
    assert program("ask", "Who was old?", "--from-snapshot", "story.txt", "--strategy", strategy, *options).code == 0
    assert asked == ["story.txt"] * 2


def test_names() -> None:
    assert named("state") is STRATEGIES["state"]
    with pytest.raises(UsageError, match=r"expected a strategy of state, .*, found 'guess'"):
        named("guess")
