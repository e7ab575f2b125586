"""Questions to a fork: batches, turns, what was shown."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted import TEXT, Scripted, Taken, plainly, read, taken

from rwkv_stream.answers import strategies
from rwkv_stream.answers.ask import Conversation, ask
from rwkv_stream.answers.prompts import FAMILIES, Question
from rwkv_stream.errors import MismatchError, UsageError
from rwkv_stream.model import generation
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.tables.score import score

QUESTIONS = ["Who?", "What did the keeper do when the sea was calm and the wind came?", "Why “é”?", "a", "Where is it?"]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1, "seed": 5}, {"presence_penalty": 1, "seed": 1}]
)
def test_a_batch_answers_as_one_by_one(model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sampling(max_tokens=12, **options)
    snapshot = taken(model)
    alone = [ask(Question(q, index=i), snapshot=snapshot, model=model, sampling=s) for i, q in enumerate(QUESTIONS)]
    for rows, prefill in ((32, 2048), (2, 2048), (3, 12)):
        monkeypatch.setattr(strategies, "ROWS", rows)
        monkeypatch.setattr(generation, "PREFILL_TOKENS", prefill)
        assert list(ask(QUESTIONS, snapshot=snapshot, model=model, sampling=s)) == alone
    assert len({answer.answer for answer in alone}) > 1


def test_rows_end_each_at_their_own_time(model: Any) -> None:
    """The stops are frequent bytes, so that some rows leave the batch early and others go on."""
    snapshot = taken(model)
    questions = [f"Question {i}" for i in range(12)]
    s = Sampling(max_tokens=25, temperature=1, seed=2, stop=tuple("aeiouty\n"))
    together = list(ask(questions, snapshot=snapshot, model=model, sampling=s))
    assert len({answer.tokens for answer in together}) > 3
    for i, (question, answer) in enumerate(zip(questions, together, strict=True)):
        assert answer == ask(Question(question, index=i), snapshot=snapshot, model=model, sampling=s)


def test_an_answer_is_that_of_plain_calls(model: Any) -> None:
    snapshot = taken(model)
    answer = ask(
        "Who is\r\n\r\nit? ",
        snapshot=snapshot,
        model=model,
        template="[{question}]",
        sampling=Sampling(temperature=0, max_tokens=15),
    )
    tokens = plainly(model, *read(model, "[Who is\nit?]", snapshot.state()), 15, lambda text: "\n" in text)
    text = model.tokenizer.decode(tokens).decode("utf-8", "replace").split("\n")[0]
    assert (answer.answer, answer.tokens) == (text.strip(), len(tokens))
    assert (answer.question, answer.snapshot, answer.id) == ("Who is\r\n\r\nit? ", snapshot.id, None)
    assert dataclasses.asdict(answer)["sources"] == (
        {
            "document": "book.txt",
            "byte_start": 0,
            "byte_end": len(TEXT.encode()),
            "text": None,
            "place": None,
            "snapshot": snapshot.id,
        },
    )


def test_the_family_decides_unless_told_otherwise(model: Any) -> None:
    snapshot = taken(model)
    family = FAMILIES["rwkv-stream"]
    plain = Sampling(temperature=0, max_tokens=family.sampling.max_tokens, stop=family.stop)
    told = ask("Who?", snapshot=snapshot, model=model, sampling=plain, template="\n\nQuestion: {question}\nAnswer:")
    assert ask("Who?", snapshot=snapshot, model=model) == told


def scripted(script: bytes) -> tuple[Any, Any]:
    """A model that says `script` after any prompt of 16 bytes, and a snapshot of it."""
    model: Any = Scripted(b"." * 16 + script)
    model.fingerprint = model.path = "scripted"
    return model, Taken("scripted", State({"position": torch.zeros(1, 1)}), torch.zeros(1), 0)


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_familys_stop_ends_every_answer(stop: tuple[str, ...]) -> None:
    model, snapshot = scripted(b" the keeper\nand more")
    s = Sampling(temperature=0, stop=stop)
    answers = ask(["Q"], snapshot=snapshot, model=model, sampling=s, template="{question}" + "." * 15)
    assert [answer.answer for answer in answers] == ["the keeper"]


@given(pieces=st.lists(st.text(st.sampled_from("a \n\u2003"), max_size=4)))
def test_stripped_pieces_are_the_stripped_text(pieces: list[str]) -> None:
    shown = list(generation.stripped(pieces))
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


def test_bad_questions(model: Any) -> None:
    snapshot = taken(model)
    with pytest.raises(UsageError, match="empty"):
        ask(" \n", snapshot=snapshot, model=model)
    with pytest.raises(UsageError, match="empty"):
        list(ask(["Who?", ""], snapshot=snapshot, model=model))
    with pytest.raises(UsageError, match="template"):
        ask("Who?", snapshot=snapshot, model=model, template="Q:")
    for question in (None, 5):
        with pytest.raises(UsageError, match="expected questions as texts"):
            ask(question, snapshot=snapshot, model=model)  # type: ignore[call-overload]
        with pytest.raises(UsageError, match="expected questions as texts"):
            list(ask([question], snapshot=snapshot, model=model))  # type: ignore[list-item]


def test_questions_without_end_are_answered_as_they_come(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "ROWS", 2)
    drawn = itertools.count()
    answers = ask(
        (f"Q{i}?" for i in drawn), snapshot=taken(model), model=model, sampling=Sampling(max_tokens=2, temperature=0)
    )
    assert [answer.question for answer in itertools.islice(answers, 3)] == ["Q0?", "Q1?", "Q2?"]
    assert next(drawn) == 4


def test_another_models_snapshot(bytes_model: Any) -> None:
    snapshot = taken(bytes_model)
    snapshot.model = "f" * 64
    uses = [
        lambda: ask("Who?", snapshot=snapshot, model=bytes_model),
        lambda: ask(["Who?"], snapshot=snapshot, model=bytes_model),
        lambda: Conversation(snapshot, bytes_model),
        lambda: score("nothing.txt", model=bytes_model, snapshot=snapshot),
    ]
    for use in uses:
        with pytest.raises(MismatchError) as caught:
            use()
        for part in ("f" * 64, bytes_model.fingerprint, snapshot.model_path):
            assert part in str(caught.value)


# ---- conversations ----


def test_each_turn_knows_the_turns_before(model: Any) -> None:
    snapshot = taken(model)
    s = Sampling(temperature=0, max_tokens=10)
    conversation = Conversation(snapshot, model, sampling=s)
    state, heard = snapshot.state(), ""
    for turn, question in enumerate(QUESTIONS[:3]):
        shown = list(conversation.ask(question))
        prompt = f"\n\nQuestion: {question}\nAnswer:"
        hidden, state = read(model, prompt, state)
        tokens = plainly(model, hidden, state, 10, lambda text: "\n" in text)
        text = model.tokenizer.decode(tokens).decode("utf-8", "replace").split("\n")[0].strip()
        assert conversation.answer is not None
        assert "".join(shown) == conversation.answer.answer == text
        if turn == 0:
            assert conversation.answer == ask(question, snapshot=snapshot, model=model, sampling=s)
        spoken = f" {text}" if text else ""
        heard += prompt + spoken
        if spoken:
            hidden, state = read(model, spoken, state)
        fork = conversation.fork()
        assert fork.text == heard
        assert model.tokenizer.decode(fork.tokens).decode() == heard
        for name in state:
            torch.testing.assert_close(fork.state[name], state[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fork.last_hidden, hidden, atol=1e-4, rtol=1e-4)


def test_turns_have_their_own_random_numbers_and_read_the_last_answer(model: Any) -> None:
    snapshot = taken(model)
    s = Sampling(seed=3, max_tokens=8)
    conversation = Conversation(snapshot, model, sampling=s, template="<{question}>")
    state, heard = snapshot.state(), ""
    for index, question in enumerate(QUESTIONS[:3]):
        shown = "".join(conversation.ask(question))
        made = "".join(generate(model, f"{heard}<{question}>", state=state, sampling=s, index=index))
        assert shown == made.split("\n")[0].strip()
        state = read(model, f"{heard}<{question}>", state)[1]
        heard = f" {shown}" if shown else ""


def test_an_interrupted_answer_is_what_was_shown() -> None:
    model, snapshot = scripted(b"one two three four")
    conversation = Conversation(snapshot, model, template="{question}" + "." * 14)
    pieces = conversation.ask("Q?")
    assert [next(pieces) for _ in range(5)] == ["o", "n", "e", " t", "w"]
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.answer is not None
    assert conversation.answer.answer == "one tw"
    assert conversation.fork().text == "Q?.............. one tw"
