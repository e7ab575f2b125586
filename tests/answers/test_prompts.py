"""Which family a model is of, what a question becomes, and files of questions."""

from __future__ import annotations

import copy
import io
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_stream.answers import ask as asking
from rwkv_stream.answers import prompts
from rwkv_stream.answers.prompts import FAMILIES, Question, choose, clean, family, fill, questions
from rwkv_stream.errors import InputError, RwkvStreamError, UsageError
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import raw_bytes, world


@pytest.mark.parametrize(
    ("kind", "version", "file", "name"),
    [
        ("world", "7", "RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world"),
        ("world", "6", "RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", "world"),
        ("world", "5.2", "RWKV-5-World-0.4B-v2-20231113-ctx4096.pth", "world"),
        ("world", "4", "RWKV-4-World-0.1B-v1-20230520-ctx4096.pth", "world-4"),
        ("world", "7", "rwkv7-g1-0.4b-20250324-ctx4096.pth", "g1"),
        ("world", "7a", "rwkv7a-g1d-0.1b-20260212-ctx8192.safetensors", "g1"),
        ("world", "7", "RWKV7-G0a3-7.2B.pth", "g1"),
        ("world", "7", "rwkv7-g1c-1.5B-Q4_K_M.gguf", "g1"),
        ("world", "7", "rwkv7-0.4B-g1", "g1"),
        ("world", "7", "rwkv7-0.4B-g1/model.safetensors", "g1"),
        ("world", "7", "rwkv7-0.4B-g1/model-00001-of-00002.safetensors", "g1"),
        ("world", "7", "g1/big1.pth", "world"),
        ("world", "7", "finetuned/model.safetensors", "world"),
        ("neox", "4", "RWKV-4-Raven-7B-v12-Eng98%-Other2%-20230521-ctx8192.pth", "raven"),
        ("neox", "4", "rwkv-raven-1b5", "raven"),
        ("neox", "4", "rwkv-raven-1b5/pytorch_model.bin", "raven"),
        ("neox", "4", "RWKV-4-Pile-430M-20220808-8066.pth", "pile"),
        ("neox", "7", "RWKV-x070-Pile-168M-20241120-ctx4096.pth", "pile"),
        ("bpe", "7", "rwkv7-g1.safetensors", "rwkv-stream"),
        ("bytes", "4", "model.safetensors", "rwkv-stream"),
        ("json", "7", "raven/model.safetensors", "rwkv-stream"),
    ],
)
def test_family(kind: str, version: str, file: str, name: str) -> None:
    path, config = f"/models/{file}", SimpleNamespace(version=version)
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(kind=kind), path=path, config=config)
    assert family(model).name == choose(kind, model.config, path).name == name


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("rwkv-stream", "Question: Who?\nAnswer:"),
        ("world", "User: Who?\n\nAssistant:"),
        ("g1", "User: Who?\n\nAssistant:"),
        ("world-4", "Question: Who?\n\nAnswer:"),
        ("pile", "Question: Who?\n\nAnswer:"),
        (
            "raven",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n# Instruction:\nWho?\n\n# Response:\n",
        ),
    ],
)
def test_a_prompt_stands_apart_and_ends_without_a_space(name: str, prompt: str) -> None:
    assert fill(FAMILIES[name].template, " Who? ") == f"\n\n{prompt}"
    assert not prompt.endswith(" ")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_an_answer_is_what_begins_the_next_turn(name: str) -> None:
    assert FAMILIES[name].sampling.temperature == 0
    prompt = fill(FAMILIES[name].template, "Who?")
    assert all(stop in prompt for stop in FAMILIES[name].stop)


def test_answers_of_g_models_and_raven_may_hold_blank_lines() -> None:
    assert {name for name, entry in FAMILIES.items() if not {"\n", "\n\n"} & {*entry.stop}} == {"g1", "raven"}


def test_a_thinking_prompt_leaves_the_last_bracket_to_the_model() -> None:
    asked = fill("\n\nUser: {question}\n\nAssistant: <think", "hi")
    ids = world().encode_prompt(asked)
    assert ids == [261, 24281, 59, 4571, 261, 5585, 41693, 59, 295, 35762]
    closed = world().encode_prompt(f"{asked}>")
    assert closed[:-1] == ids and world().encode(f"{asked}></think")[: len(closed)] != closed


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


class Recorder:
    """A model that keeps the tokens it is given; its prompts end in token 7."""

    fingerprint = path = "recorder"
    device = last_device = torch.device("cpu")
    config = SimpleNamespace(n_embd=1, vocab_size=256)

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.tokenizer = copy.copy(raw_bytes())
        self.tokenizer.encode_prompt = lambda text: [*text.encode(), 7]  # type: ignore[method-assign]

    def forward_packed(self, tokens: Tensor, lengths: Tensor, state: State, start: Any = None) -> tuple[Tensor, State]:
        self.seen += tokens.tolist()
        return torch.zeros(len(tokens), 1), state

    def head(self, hidden: Tensor) -> Tensor:
        return torch.zeros(len(hidden), 256)


def test_whatever_is_asked_is_read_as_a_prompt() -> None:
    """As blank lines at its end are not those of a text for Pile models."""
    state = State({"none": torch.zeros(1, 1)})
    load = {"load": lambda: (state, torch.zeros(1)), "state": lambda: state, "starts": lambda: iter(())}
    snapshot: Any = SimpleNamespace(
        model="recorder", id="5" * 64, document="d", start=None, how="ingest", bytes=0, keeps_state=True, **load
    )
    sampling = Sampling(temperature=0, max_tokens=1)
    for act in (
        lambda model: list(generate(model, "Q", state=state, sampling=sampling)),
        lambda model: asking.ask("Q", snapshot=snapshot, model=model, sampling=sampling, template=prompts.PLACE),
        lambda model: list(asking.Conversation(snapshot, model, sampling=sampling, template=prompts.PLACE).ask("Q")),
    ):
        model: Any = Recorder()
        act(model)
        assert model.seen == [ord("Q"), 7]
