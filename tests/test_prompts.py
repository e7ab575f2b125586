"""Which family a model is of, what a question becomes, and files of questions."""

from __future__ import annotations

import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_stream import prompts
from rwkv_stream.errors import InputError, RwkvStreamError, UsageError
from rwkv_stream.prompts import FAMILIES, Question, clean, family, fill, questions


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("world", "RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world"),
        ("world", "rwkv7-g1-0.4b-20250324-ctx4096.pth", "g1"),
        ("world", "rwkv7a-g1d-0.1b-20260212-ctx8192.safetensors", "g1"),
        ("world", "RWKV7-G0a3-7.2B.pth", "g1"),
        ("world", "big1.pth", "world"),
        ("world", "model.safetensors", "world"),
        ("bpe", "rwkv7-g1.safetensors", "rwkv-stream"),
        ("bytes", "model.safetensors", "rwkv-stream"),
        ("json", "model.safetensors", "rwkv-stream"),
    ],
)
def test_family(kind: str, file: str, name: str) -> None:
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(kind=kind), path=f"/models/g1/{file}")
    assert family(model).name == name


def test_the_table() -> None:
    assert fill(FAMILIES["rwkv-stream"].template, "Who?") == "\n\nQuestion: Who?\nAnswer:"
    assert fill(FAMILIES["world"].template, "Who?") == "\n\nUser: Who?\n\nAssistant:"
    for entry in FAMILIES.values():
        assert not entry.template.endswith(" ")
        assert entry.sampling.temperature == 0
        prompt = fill(entry.template, "Who?")
        assert any(stop in prompt for stop in entry.stop), "what ends an answer is what begins the next turn"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" Who? \n", "Who?"),
        ("a\r\nb", "a\nb"),
        ("a\r\n\r\n\n\nb\n\nc", "a\nb\nc"),
        ("{question} {x}", "{question} {x}"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
    assert fill("<{question}> {other}", text) == f"<{cleaned}> {{other}}"


@pytest.mark.parametrize("text", ["", "  ", "\r\n\n \t"])
def test_an_empty_question(text: str) -> None:
    with pytest.raises(UsageError, match="question"):
        clean(text)


def test_a_template_without_a_place() -> None:
    with pytest.raises(UsageError, match=r"\{question\}.*'Q: \{q\}'"):
        fill("Q: {q}", "Who?")


def ask_file(tmp_path: Path, data: bytes | str, name: str = "q.txt") -> list[Question]:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(questions(str(path)))


def test_one_a_line(tmp_path: Path) -> None:
    assert ask_file(tmp_path, "\ufeffWho?\r\n\n  What “é”?  \nlast") == [
        Question("Who?", "1", 0),
        Question("What “é”?", "3", 1),
        Question("last", "4", 2),
    ]


@pytest.mark.parametrize("name", ["q.jsonl", "q.txt"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [{"id": "a", "question": "Who?"}, {"id": 7, "question": "What?"}, {"question": "Where?", "answer": "x"}]
    text = "\n" + "\n\n".join(json.dumps(line) for line in lines)
    assert ask_file(tmp_path, text, name) == [
        Question("Who?", "a", 0),
        Question("What?", "7", 1),
        Question("Where?", "6", 2),
    ]


@pytest.mark.parametrize(
    ("data", "name", "line", "code"),
    [
        (b"Who?\n\xff\xfe?\n", "q.txt", 2, 1),
        ('{"question": "Who?"}\nWhat?\n', "q.txt", 2, 1),
        ("Who?\n", "q.jsonl", 1, 1),
        ('{"question": "a"}\n{"question": 3}', "q.jsonl", 2, 1),
        ('{"question": "a"}\n["question"]', "q.jsonl", 2, 1),
        ('{"question": "a"}\n{"question": " "}', "q.jsonl", 2, 2),
        ('{"question": "a", "id": [1]}', "q.jsonl", 1, 1),
        ("[" * 100_000, "q.jsonl", 1, 1),
    ],
)
def test_errors_name_the_line(tmp_path: Path, data: bytes | str, name: str, line: int, code: int) -> None:
    with pytest.raises(RwkvStreamError, match=rf"'.*{name}', line {line}: expected") as caught:
        ask_file(tmp_path, data, name)
    assert caught.value.exit_code == code


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        ask_file(tmp_path, "\n \n")
    with pytest.raises(InputError, match=r"nothing\.txt.*No such file"):
        list(questions(str(tmp_path / "nothing.txt")))
    with pytest.raises(InputError, match="directory"):
        list(questions(str(tmp_path)))


def test_a_line_without_end_is_refused_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        n_read = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"x" * len(buffer)
            self.n_read += len(buffer)
            return len(buffer)

    source = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(source)))
    with pytest.raises(InputError, match="'stdin', line 1"):
        next(questions("-"))
    assert source.n_read < 2 * prompts.LINE_BYTES


def test_questions_are_read_as_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.BytesIO(b"a?\nb?\n" * 100_000)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
    first = list(itertools.islice(questions("-"), 3))
    assert [q.text for q in first] == ["a?", "b?", "a?"]
    assert stdin.tell() < 100
