"""Strategies that ask others take the one that fits, or the answer that most give, and say which and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from program import program

import rwkv_stream as rs
from rwkv_stream.answers import choosing, prompts
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import STRATEGIES, answers, replies, subject
from rwkv_stream.answers.strategy import ChunkState, Manner, Reply, Span, Subject
from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model
from rwkv_stream.reading.isolated import keep_chunk_states

STORY = (
    "The rain had stopped by noon. Old Jonas Weller kept the lighthouse at Marrow Point. He slept by day. "
    + "The sea was calm and grey. " * 6
    + "The ferry from Brindle came on Tuesdays. Its captain carried the post in a green bag. Nobody wrote to him."
)
SPOKEN, UNSPOKEN = "Who kept the lighthouse at Marrow Point?", "Which planet did the astronauts colonise?"


def voting(monkeypatch: pytest.MonkeyPatch, told: dict[str, str | None], chunks: bool = True) -> Reply:
    """What is elected where each way answers so."""

    def answering(self: Any, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        text = told[self.name]
        return [[Reply(text, (Span(0, 0, 1),) if text else (), read=10, made=1)] for _ in questions]

    for way in (choosing.Reread, choosing.Nearest, choosing.Cells, choosing.Quote):
        monkeypatch.setattr(way, "replies", answering)
    states = [ChunkState(Span(0, 0, 1), None)] if chunks else []
    given = Subject("book", None, None, [MemoryText("x")], states)
    ((_, (one,)),) = replies([Question("Who?")], STRATEGIES["vote"], given)
    return one


def test_the_answer_that_most_agree_on_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str | None] = {"reread": "Bo", "nearest": "an old Man.", "cells": "unknown", "quote": "The old man"}
    one = voting(monkeypatch, told)
    assert (one.text, one.by, one.why) == ("an old Man.", "nearest", "2 of 4 agree: nearest, quote")
    assert (one.read, one.made) == (40, 4)
    # of answers that as many agree on the earliest way's
    one = voting(monkeypatch, {"reread": "Cy", "nearest": "Bo", "cells": "bo", "quote": "cy"})
    assert (one.text, one.by) == ("Cy", "reread")
    # those who abstain have no vote, and where all do there is no answer
    one = voting(monkeypatch, {"reread": None, "nearest": "unknown", "cells": "", "quote": "Bo"})
    assert (one.text, one.why) == ("Bo", "1 of 4 agree: quote")
    one = voting(monkeypatch, dict.fromkeys(told, None))
    assert (one.text, one.read) == (None, 40)
    # no states of chunks, no such voter
    assert voting(monkeypatch, told, chunks=False).why == "2 of 3 agree: nearest, quote"


def test_voting_in_fact(tmp_path: Path, bytes_model: Model) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(path, name="story.txt", model=bytes_model, store=store, chunk=64, snapshot_every=128)
    snapshot, strategy = store.get("story.txt"), STRATEGIES["vote"]
    with subject(snapshot, store, strategy.needs, bytes_model) as given:
        (one,) = answers([Question(SPOKEN)], strategy, given, snapshot=snapshot)
    assert one == rs.ask(SPOKEN, snapshot=snapshot, model=bytes_model, store=store, strategy="vote")
    with pytest.raises(UsageError, match=r"asking by vote: expected the store that 'story.txt' was read into"):
        rs.ask(SPOKEN, snapshot=snapshot, model=bytes_model, strategy="vote")
    assert one.why is not None and one.strategy in ("reread", "nearest", "quote") and one.sources


def ways(snapshot: rs.Snapshot, store: rs.Store, model: Model) -> list[tuple[str, str | None]]:
    strategy = STRATEGIES["auto"]
    with subject(snapshot, store, strategy.needs, model) as given:
        found = list(answers(map(Question, (SPOKEN, UNSPOKEN)), strategy, given, snapshot=snapshot))
    return [(one.strategy, one.why) for one in found]


def test_auto_takes_what_fits_the_question_and_the_store(
    tmp_path: Path, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    store = rs.Store(tmp_path / "store", create=True)
    options: dict[str, Any] = {"name": "story.txt", "model": bytes_model, "store": store, "chunk": 64}
    rs.ingest(path, **options, keep_text=False)
    snapshot = store.get("story.txt")
    path.unlink()  # so that it cannot be read again
    assert ways(snapshot, store, bytes_model) == [("state", "its text was not kept")] * 2
    path.write_text(STORY)
    rs.ingest(path, **options)
    snapshot = store.get("story.txt")
    (spoken, unspoken) = ways(snapshot, store, bytes_model)
    assert spoken[0] == "reread" and spoken[1] is not None and spoken[1].startswith("the text speaks of it, 0.")
    assert unspoken == ("state", "the text is not seen to speak of it")
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=200)
    assert ways(snapshot, store, bytes_model) == [spoken, ("cells", "the text is not seen to speak of it")]
    # an answer that abstains is passed on to the next way
    monkeypatch.setattr(prompts, "abstains", lambda answer: True)
    last = "the text is not seen to speak of it, and the states of its chunks abstain"
    assert ways(snapshot, store, bytes_model) == [("state", last)] * 2


def test_auto_quotes_for_a_model_that_has_not_learned_to_answer(tmp_path: Path, bpe_model: Model) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(path, name="story.txt", model=bpe_model, store=store)
    assert ways(store.get("story.txt"), store, bpe_model) == [("quote", choosing.NOT_LEARNED)] * 2


@pytest.mark.parametrize("strategy", ["state", "nearest", "cells", "map-reduce", "vote"])
def test_states_of_all_documents_are_not_asked(program_folder: Path, strategy: str) -> None:
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    ended = program("ask", SPOKEN, "--all", "--strategy", strategy)
    assert (ended.code, ended.out) == (2, "") and f"--strategy {strategy} asks the states of one document" in ended.err


def test_the_program_says_what_auto_did(program_folder: Path, bpe_model_path: Path) -> None:
    Path("story.txt").write_text(STORY)
    Path("q.txt").write_text(f"{SPOKEN}\n{UNSPOKEN}\n{SPOKEN}\n")
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    asked = ("ask", "--from-snapshot", "story.txt", "--max-tokens", 2)
    ended = program(*asked, SPOKEN, "--json")
    said = json.loads(ended.out)
    assert said["strategy"] == "reread" and f"by reread: {said['why']}" in ended.err
    ended = program(*asked, "--questions", "q.txt", "--json")
    assert [json.loads(line)["strategy"] for line in ended.out.splitlines()] == ["reread", "state", "reread"]
    assert "by reread: 2 questions" in ended.err and "by state: 1 question" in ended.err
    model = ("--model", bpe_model_path, "--store", "other")
    assert program("ingest", "story.txt", *model).code == 0
    ended = program("ask", SPOKEN, "--from-snapshot", "story.txt", *model)
    assert ended.code == 0 and f"by quote: {choosing.NOT_LEARNED}" in ended.err and "Weller" in ended.out
