"""Data: documents of texts and records, what of them is learnt, and their tokens; which are held out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rwkv_stream.answers.prompts import FAMILIES, around
from rwkv_stream.errors import InputError
from rwkv_stream.text import tokenizer
from rwkv_stream.training import data, prepare
from rwkv_stream.training.data import Encoded, Piece, TokenFile
from rwkv_stream.training.recipe import Data, Recipe, Stage, Validation, Vocabulary
from rwkv_stream.training.split import Split, key

TALE = "The fox sat under the oak."
QUESTIONS: list[dict[str, Any]] = [
    {"context": TALE, "question": "Who sat under the oak?", "answer": "the fox"},
    {"context": TALE, "question": " Where did the fox sit? ", "answer": "under the oak\n"},
    {"title": "Mills", "question": "What is a mill?", "answer": "a house that grinds corn"},
    {"context": "Two pages.", "summary": "Pages."},
    {"context": "Two pages.", "question": "Who wrote them?", "answer": None},
]
RECORDS = [{"text": f"text {i}", "from": "a", "to": "b"} for i in range(5)]


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(folder: Path, path: str, **fields: Any) -> list[list[tuple[str, bool]]]:
    found = data.read(Data("x", path=path, **fields), folder)
    return [[tuple(piece) for piece in document] for document in found]


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), path)


CONTAINERS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_bytes(lines(RECORDS)),
    "x.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(lines(RECORDS))),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(RECORDS))),
    "x.parquet": parquet,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_records(tmp_path: Path, name: str) -> None:
    CONTAINERS[name](tmp_path / name)
    assert read(tmp_path, name) == [[(f"text {i}", True)] for i in range(5)]
    assert read(tmp_path, "x.*", template="From {from}: {text}!", learn=("text",))[1] == [
        ("From ", False), ("a", False), (": ", False), ("text 1", True), ("!", False),
    ]  # fmt: skip
    assert read(tmp_path, name, template="{from}{to}")[0] == [("a", True), ("b", True)]


def test_a_question_is_put_as_ask_puts_it() -> None:
    assert FAMILIES["rwkv-stream"].template == data.QUESTION


def test_questions_follow_their_passage(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(lines(QUESTIONS))
    found = read(tmp_path, "q.jsonl", form="questions")
    assert ["".join(text for text, _ in document) for document in found] == [
        f"{TALE}\n\nQuestion: Who sat under the oak?\nAnswer: the fox\n"
        "\n\nQuestion: Where did the fox sit?\nAnswer: under the oak\n",
        "Mills\n\nQuestion: What is a mill?\nAnswer: a house that grinds corn\n",
        "Two pages.\n\nQuestion: What is the text about?\nAnswer: Pages.\n"
        "\n\nQuestion: Who wrote them?\nAnswer: Not in this text.\n",
    ]
    assert [text for text, is_learnt in found[0] if is_learnt] == [TALE, " the fox\n", " under the oak\n"]
    only = read(tmp_path, "q.jsonl", form="questions", learn=("answer",))
    assert [text for text, is_learnt in only[0] if is_learnt] == [" the fox\n", " under the oak\n"]


def test_questions_stand_before_their_passage_too(tmp_path: Path) -> None:
    asked = [{"context": TALE, "question": f"Who is {i}? ", "answer": f"fox {i}"} for i in range(data.FIRST + 1)]
    (tmp_path / "q.jsonl").write_bytes(lines(asked))
    *_, last = read(tmp_path, "q.jsonl", form="questions twice", learn=("answer",))
    assert "".join(text for text, _ in last) == (
        f"{around(FAMILIES['rwkv-stream'], f'Who is {data.FIRST}?', TALE)} fox {data.FIRST}\n"
    )
    first, _ = read(tmp_path, "q.jsonl", form="questions twice")
    assert first[0][0].count("Question: Who is") == data.FIRST and first[1] == (TALE, True)
    assert [text for text, is_learnt in first[2:] if is_learnt] == [" fox 0\n", " fox 1\n", " fox 2\n"]


def test_preferences_are_pairs(tmp_path: Path) -> None:
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    (tmp_path / "p.jsonl").write_bytes(lines([record]))
    found = read(tmp_path, "p.jsonl", form="preferences")
    assert found == [[("Q", False), (answer, True)] for answer in ("good", "bad")]
    (tmp_path / "p.jsonl").write_bytes(lines([record | {"rejected": ""}]))
    with pytest.raises(InputError, match="expected two answers to a prompt, found an empty one to 'Q'"):
        read(tmp_path, "p.jsonl", form="preferences")


def test_texts_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("first")
    (tmp_path / "texts" / "more" / "b.html").write_text("<p>second</p>")
    (tmp_path / "texts" / "c.epub").write_bytes(b"PK\x03\x04 no archive")
    found = read(tmp_path, "texts")
    assert [document[0][0].strip() for document in found] == ["first", "second"]
    assert "c.epub" in caplog.text, "what cannot be read is said"
    with pytest.raises(InputError, match=r"c\.epub"):
        read(tmp_path, "texts/c.epub")


@pytest.mark.parametrize(
    ("content", "fields", "problem"),
    [
        (b"[1]\n", {}, "row 1: expected a JSON object, found an array"),
        (b'{"text": "a"}\n{"text"', {}, "row 2: expected JSON, found an error"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', {}, "expected UTF-8, found bytes that are none"),
        (b'{"body": "a"}\n', {}, "expected records with the text 'text', found body"),
        (b'{"text": 3}\n', {}, "expected records with the text 'text'"),
        (b'{"text": "a"}\n', {"template": "{text}", "learn": ("body",)}, "of the template, text, found 'body'"),
    ],
)
def test_wrong_records(tmp_path: Path, content: bytes, fields: dict[str, Any], problem: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read(tmp_path, "x.jsonl", **fields)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected files at '.*none', found none"):
        read(tmp_path, "none")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="expected a Parquet file"):
        read(tmp_path, "x.parquet")


def test_a_split_keeps_documents_apart(tmp_path: Path) -> None:
    records = [{"title": f"Book {i}", "text": f"{i}"} for i in range(4)]
    for name in ("books.jsonl", "valid-a.jsonl"):
        (tmp_path / name).write_bytes(lines(records))
    split = Split(files=("valid-*",), report=(key({"title": "book  1!"}),), tune=(key({"id": "x/Book 2"}),))
    parts = {
        part: [document[0].text for document in data.read(Data("x", path="*.jsonl"), tmp_path, split, part)]
        for part in ("train", "tune", "report")
    }
    assert parts == {"train": ["0", "3"], "tune": ["2"], "report": ["1", "0", "1", "2", "3"]}


# ---- tokens ----


def test_token_files_hold_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BATCH_TOKENS", 20)
    rng = np.random.default_rng(0)
    documents = [Encoded(rng.integers(0, 70_000, n), rng.random(n) < 0.5) for n in (7, 0, 30, 1, 12, 9)]
    assert data.write(tmp_path / "x.arrow", iter(documents)) == 59
    file = TokenFile(tmp_path / "x.arrow")
    whole = [document for document in documents if len(document.tokens)]
    assert file.lengths.tolist() == [7, 30, 1, 12, 9]
    for i, document in enumerate(whole):
        for begin, end in ((0, len(document.tokens)), (len(document.tokens) // 2, len(document.tokens))):
            found = file.read(i, begin, end)
            assert found.tokens.tolist() == document.tokens[begin:end].tolist()
            assert found.is_learnt.tolist() == document.is_learnt[begin:end].tolist()


def test_pieces_are_tokenised_alone() -> None:
    found = data.encoded([Piece("ab"), Piece("", True), Piece("c", True)], tokenizer.raw_bytes().encode)
    assert found.tokens.tolist() == [97, 98, 99] and found.is_learnt.tolist() == [False, False, True]


def test_preparation_makes_a_tokenizer_and_holds_documents_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": f"document {i} " * 20} for i in range(9)]))
    recipe = Recipe(
        (Data("x", path="x.jsonl"),),
        (Stage(1),),
        tokenizer=Vocabulary(vocab_size=300),
        validation=Validation(held=0.25),
    )
    made = prepare.prepare(recipe, tmp_path, tmp_path / "work")

    def texts(name: str) -> list[str]:
        file = TokenFile(prepare.path_of(tmp_path / "work", name))
        whole = (file.read(i, 0, int(n)).tokens.tolist() for i, n in enumerate(file.lengths))
        return [made.decode(tokens).decode()[:10] for tokens in whole]

    assert texts("x") == [f"document {i}" for i in (0, 1, 2, 4, 5, 6, 8)]
    assert texts(prepare.VALIDATION) == ["document 3", "document 7"]
    assert made.vocab_size <= 300 and made.start_token == 0
    (tmp_path / "x.jsonl").unlink()
    assert prepare.prepare(recipe, tmp_path, tmp_path / "work").id == made.id, "what is there already stays"


def test_texts_without_a_token_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": ""}]))
    recipe = Recipe((Data("x", path="x.jsonl"),), (Stage(1),))
    with pytest.raises(InputError, match="the data 'x': expected text, found none that is trained on"):
        prepare.prepare(recipe, tmp_path, tmp_path / "work", tokenizer.raw_bytes())
