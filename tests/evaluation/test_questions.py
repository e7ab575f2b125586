"""Rows of questions: read, grouped, asked of a passage or of the state of their document, and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rwkv_stream.answers.strategies import STRATEGIES
from rwkv_stream.answers.strategy import Reply
from rwkv_stream.errors import InputError
from rwkv_stream.evaluation import questions
from rwkv_stream.evaluation.questions import (
    QuestionRow,
    SpooledText,
    Texts,
    groups,
    judged,
    rows,
    text_of,
    whole,
)
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.reading.passes import state_of
from rwkv_stream.store import Store


def written(path: Path, *records: object) -> Path:
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())
    return path


GOOD: dict[str, Any] = {"question": "Who?", "answers": ["Ann", "she"]}


def test_rows_of_every_form_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "q.jsonl.zst",
        {**GOOD, "id": "a/1", "document": "a", "context": "Ann was here."},
        {"question": "Where?", "answer": "there", "title": "b", "unanswerable": False},
        {"question": "Why?", "answer": "nobody says", "title": "b", "unanswerable": True},
        {**GOOD, "id": 7},
    )
    assert list(rows(path)) == [
        QuestionRow("a/1", "a", "Who?", ("Ann", "she"), "Ann was here."),
        QuestionRow("2", "b", "Where?", ("there",), None),
        QuestionRow("3", "b", "Why?", (), None),
        QuestionRow("7", "7", "Who?", ("Ann", "she"), None),
    ]
    assert [[row.id for row in group] for group in groups(whole(rows(path)))] == [["a/1"], ["2", "3"], ["7"]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{", "expected JSON"),
        ("[1]", "expected a JSON object"),
        ({"answers": ["x"]}, "expected the text 'question', found none"),
        ({"question": " ", "answers": ["x"]}, "expected the text 'question', found ' '"),
        ({"question": "Who?"}, "expected texts as 'answers', or 'unanswerable', found none"),
        ({"question": "Who?", "answers": [1]}, "expected texts as 'answers'"),
        ({"question": "Who?", "answers": "Ann"}, "expected texts as 'answers'"),
        ({**GOOD, "context": 3}, "expected 'context' to be a text, found 3"),
    ],
)
def test_a_row_that_is_none_is_lost_alone(tmp_path: Path, record: object, reason: str) -> None:
    first, lost, last = rows(written(tmp_path / "q.jsonl", GOOD, record, GOOD))
    assert isinstance(first, QuestionRow) and isinstance(last, QuestionRow) and last.id == "3"
    assert isinstance(lost, InputError) and f"q.jsonl', row 2: {reason}" in str(lost)


def test_texts_are_found_in_any_order_and_gone_through_once_in_theirs(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", *({"id": name, "text": f"text {name}"} for name in ("a", "b", 3)))
    texts = Texts(path, [])
    for name in ("a", "3", "b", "b", "a"):
        assert texts.find(name).read(0, 99) == f"text {name}".encode()
    with pytest.raises(InputError, match="expected one with the id 'c', found none"):
        texts.find("c")


def test_a_text_that_is_no_table_has_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once.")
    texts = Texts(tmp_path / "story.txt", [])
    for name in ("story.txt", str(tmp_path / "story.txt"), "story.txt"):
        assert texts.find(name).read(0, 9) == b"Once."
    with pytest.raises(InputError, match=r"expected one with the id 'tory\.txt', found none"):
        texts.find("tory.txt")


def test_without_texts_a_document_is_its_passages_each_once() -> None:
    group = [QuestionRow(str(i), "d", "Who?", ("x",), passage) for i, passage in enumerate(("one", "two", "one", None))]
    assert text_of(group, None).read(0, 99) == b"one\n\ntwo"
    with pytest.raises(InputError, match=r"about 'd'.*found neither"):
        text_of(group[3:], None)


def test_a_spooled_text_finds_answers_across_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "SPOOL_BYTES", 16)
    monkeypatch.setattr(questions, "BLOCK_BYTES", 40)
    monkeypatch.setattr(questions, "OVERLAP_BYTES", 30)
    data = ("word " * 7 + "The Red Hat, then. " + "end " * 30).encode()
    text = SpooledText("d", [data[:9], data[9:]])
    assert text.holds("a red hat then") and not text.holds("hat red") and not text.holds("")
    assert b"".join(text.pieces()) == data and text.byte_end == len(data)
    assert text.read(5, 9) == data[5:9]


def test_the_state_of_a_document_is_that_of_its_snapshot(bytes_model: Model, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("The keeper walked over the bridge. " * 80)
    store = Store(tmp_path / "store", create=True)
    ingest(tmp_path / "d.txt", model=bytes_model, store=store)
    state, tokens = state_of(bytes_model, SpooledText("d", [(tmp_path / "d.txt").read_bytes()]).pieces(), "d")
    snapshot = store.get("d.txt")
    assert state.digest() == snapshot.state_digest and tokens == snapshot.tokens
    with pytest.raises(InputError, match="reading 'e': expected some text, found none"):
        state_of(bytes_model, SpooledText("e", []).pieces(), "e")


class Parrot:
    """A strategy that answers what it was told, and notes what it had."""

    def __init__(self, needs: set[str], *answers: str) -> None:
        self.name, self.needs, self._answers = "parrot", frozenset(needs), answers
        self.had: list[tuple[bool, bool]] = []

    def replies(self, questions: Any, subject: Any, manner: Any) -> Any:
        self.had.append((subject.state is not None, bool(subject.texts)))
        return [[Reply(answer)] for _, answer in zip(questions, self._answers, strict=True)]


def test_replies_are_judged_by_the_nearest_answer_and_the_text_that_was_had(bytes_model: Model) -> None:
    group = [
        QuestionRow("1", "d", "Who?", ("Ann Lee", "Bo"), "Bo and Ann came."),
        QuestionRow("2", "d", "Who?", (), "Nobody came."),
        QuestionRow("3", "d", "Who?", ("x",), None),
    ]
    strategy = Parrot({"passage"}, "the bo!", "nobody came")
    first, second = judged(group, strategy, bytes_model, None)  # type: ignore[arg-type]
    assert (first.f1, first.exact, first.is_quoted) == (1.0, True, True)
    assert (second.f1, second.exact, second.is_quoted) == (None, None, True)
    strategy.needs, strategy._answers = frozenset({"state"}), ("Ann", "Nobody Bo", "Bo")
    found = list(judged(group, strategy, bytes_model, None))  # type: ignore[arg-type]
    assert [one.f1 for one in found] == [pytest.approx(2 / 3), None, 0.0]
    assert [one.is_quoted for one in found] == [True, False, True]
    assert [one.tokens for one in found] == [len("Bo and Ann came.\n\nNobody came."), 0, 0]
    assert strategy.had == [(False, False), (True, True)]


def test_the_known_strategies_answer_rows(bytes_model: Model) -> None:
    group = [
        QuestionRow("1", "d", "Who?", ("Bo",), "Bo came. " * 9),
        QuestionRow("2", "d", "When?", ("x",), "At nine."),
    ]
    for strategy in STRATEGIES.values():
        found = list(judged(group, strategy, bytes_model, None))
        assert [one.row.id for one in found] == ["1", "2"] and all(one.f1 is not None for one in found)
