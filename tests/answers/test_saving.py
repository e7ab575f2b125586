"""Conversations that are kept: names are checked first, of one that fails nothing stays, sources lead to the book."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from program import program

from rwkv_stream.answers.ask import Conversation, keep_fork
from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.store import NewSnapshot, Snapshot, Store

BOOK = "The keeper lit the lamp. The sea was calm.\n" * 30
ASK = ("ask", "Who?", "--max-tokens", 4)


@pytest.fixture(autouse=True)
def store(program_folder: Path) -> Store:
    """A store in the environment that has read a book, of which one snapshot has a tag."""
    Path("book.txt").write_text(BOOK)
    assert program("ingest", "book.txt", "--chunk", 64, "--snapshot-every", 512).code == 0
    store = Store("store")
    store.tag("taken", store.get("book.txt@512").id)
    return store


def sources(*arguments: object) -> list[dict[str, Any]]:
    ended = program(*ASK, "--json", *arguments)
    assert ended.code == 0, ended.err
    found: list[dict[str, Any]] = json.loads(ended.out)["sources"]
    return found


# ---- names ----


@pytest.mark.parametrize(
    "options",
    [
        ["--save", "taken"],
        ["--save", "book.txt"],
        ["--save", "a@5"],
        ["-o", "answers.csv"],
        ["-o", "no/such/answers.jsonl"],
        ["--prompt-template", "Q:"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_kept_is_refused_before_a_model_is_loaded(
    store: Store, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rwkv_stream.cli.options.GlobalOptions.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    before = list(store.list()), list(store.tags()), sorted(Path().iterdir())
    ended = program(*ASK, "--from-snapshot", "book.txt", *options)
    assert (ended.code in (1, 2), ended.out) == (True, "")
    assert options[1] in ended.err
    assert (list(store.list()), list(store.tags()), sorted(Path().iterdir())) == before


@pytest.mark.parametrize(("text", "code"), [(None, 1), ("", 1), ('{"question": 5}', 1), ('{"question": " "}', 2)])
def test_questions_are_looked_at_before_a_model_is_loaded(
    text: str | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rwkv_stream.cli.options.GlobalOptions.load_model", lambda *_: pytest.fail("a model was loaded")
    )
    if text is not None:
        Path("questions.jsonl").write_text(text)
    ended = program("ask", "--questions", "questions.jsonl", "--from-snapshot", "book.txt")
    assert (ended.code, "questions.jsonl" in ended.err) == (code, True)


def test_of_a_name_that_is_taken_meanwhile_nothing_stays(
    store: Store, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = store.get("book.txt")
    conversation = Conversation(snapshot, bytes_model)
    list(conversation.ask("Who?"))
    fork = conversation.fork()
    before = list(store.list())
    monkeypatch.setattr(Store, "check_tag", lambda store, name: None)  # as if the name had been free
    with pytest.raises(UsageError, match="expected a new name"):
        keep_fork("taken", fork, snapshot, model=bytes_model, store=store)
    assert list(store.list()) == before
    kept = keep_fork("mine", fork, snapshot, model=bytes_model, store=store)
    store.untag("mine")
    with pytest.raises(UsageError, match="expected a new name"):
        keep_fork("taken", fork, snapshot, model=bytes_model, store=store)
    assert store.get(kept.id) == kept


# ---- sources ----


def whole(snapshot: Snapshot) -> dict[str, Any]:
    """The source that is all that a snapshot has read of its document."""
    span = {"byte_start": 0, "byte_end": snapshot.bytes}
    return {"document": snapshot.document, **span, "text": None, "place": None, "snapshot": snapshot.id}


def test_sources_of_forks_of_forks_are_those_of_the_book(store: Store) -> None:
    head = store.get("book.txt")
    book = whole(head)
    assert sources("--from-snapshot", "book.txt", "--save", "one") == [book]
    assert sources("--from-snapshot", "one", "--save", "two") == [book]
    assert sources("--from-snapshot", "two") == [book]
    store.rm(head.id)  # its place in the lineage is kept
    assert sources("--from-snapshot", "two") == [book]


def test_sources_of_a_reading_that_started_from_another_are_both(store: Store) -> None:
    first = store.get("book.txt@512")
    assert sources("--from-snapshot", first.id, "--save", "asked")[0]["byte_end"] == first.bytes
    Path("part2.txt").write_text("A ship went by.")
    assert program("ingest", "part2.txt", "--from-snapshot", "asked").code == 0
    second = store.get("part2.txt")
    assert sources("--from-snapshot", "part2.txt") == [whole(second), whole(first)]


def test_a_lineage_that_is_a_ring_is_damage(store: Store) -> None:
    head = store.get("book.txt")
    values = {field.name: getattr(head, field.name) for field in fields(NewSnapshot)}
    ring = store.put(NewSnapshot(**values | {"start": head.id}), *head.load())
    with pytest.raises(SnapshotError, match="no ring"):
        list(store.starts(ring))
