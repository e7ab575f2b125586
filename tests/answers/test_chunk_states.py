"""A question is read into the states of all chunks: the surest that does not abstain answers, at constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from program import program
from torch import Tensor

import rwkv_stream as rs
from rwkv_stream.answers import chunk_states, prompts
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import STRATEGIES, replies, subject
from rwkv_stream.answers.strategy import ChunkState, Reply, Span, Subject
from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.state import State
from rwkv_stream.reading.isolated import keep_chunk_states
from rwkv_stream.text import tokenizer

ENDS = 10  # a newline, which ends an answer
SHARP = 20.0  # nats by which a sure first token is ahead


class Tellers:
    """A model whose state says what it is to answer, and how sure of the first token it is; it counts the rows that it
    is given. A state is of `answers[i]`, at a place in it: -1 while the prompt is read."""

    def __init__(self, answers: list[tuple[str, float]], joins: str = "joined") -> None:
        self.tokenizer = tokenizer.raw_bytes()
        self.config = SimpleNamespace(vocab_size=self.tokenizer.vocab_size, n_embd=3, version="7")
        self.path, self.fingerprint, self.backend = "tellers", "5" * 64, "cpu"
        self.device = self.last_device = torch.device("cpu")
        self.answers = [*answers, (joins, SHARP)]
        self.rows: list[int] = []

    def state(self, i: int) -> State:
        return State({"at": torch.tensor([[float(i), -1.0]])})

    def start(self) -> tuple[Tensor, State]:
        return torch.zeros(3), self.state(len(self.answers) - 1)

    def forward_packed(self, tokens: Tensor, lengths: Tensor, state: State, start: Tensor | None = None) -> Any:
        self.rows.append(len(lengths))
        at = state["at"] if start is None else state["at"][start]
        after = torch.stack([at[:, 0], torch.zeros(len(at))], 1)
        return after.repeat_interleave(lengths, 0), State({"at": after})

    def forward(self, tokens: Tensor, state: State, logits: str = "last") -> Any:
        self.rows.append(len(tokens))
        after = state["at"] + torch.tensor([[0.0, 1.0]])
        return after[:, None], State({"at": after})

    def head(self, hidden: Tensor) -> Tensor:
        made = torch.zeros(len(hidden), self.config.vocab_size)
        for row, (i, place) in enumerate(hidden.tolist()):
            text, sure = self.answers[int(i)]
            following = [*f" {text}".encode(), ENDS][int(place)]
            made[row, following] = sure if place == 0 else SHARP
        return made

    def trim(self) -> None: ...


def asked(model: Tellers, name: str, n: int = 1) -> list[Reply]:
    """What a strategy answers, of a text of ten bytes for each state, to questions 1 to n."""
    told = model.answers[:-1]
    chunks = [
        ChunkState(Span(0, 10 * i, 10 * i + 10), SimpleNamespace(state=lambda i=i: model.state(i)))  # type: ignore[arg-type, misc]
        for i in range(len(told))
    ]
    given = Subject("book", model, None, [MemoryText("x" * 10 * len(told))], chunks)  # type: ignore[arg-type]
    questions = [Question(f"Who is {i}?", index=i) for i in range(n)]
    return [one for _, (one,) in replies(questions, STRATEGIES[name], given)]


@pytest.fixture(autouse=True)
def stop_at_newlines(monkeypatch: pytest.MonkeyPatch) -> None:
    form = prompts.FAMILIES["rwkv-stream"]
    monkeypatch.setattr(prompts, "family", lambda model: form)


def test_the_surest_that_does_not_abstain_answers() -> None:
    model = Tellers([("Ann", 3.0), ("unknown", 9.0), ("Bo", 6.0), ("", 8.0), ("Cy", 6.0), ("I don't know.", 12.0)])
    (one,) = asked(model, "cells")
    assert (one.text, one.spans) == ("Bo", (Span(0, 20, 30),))  # of two that are as sure the first
    prompt = len(model.tokenizer.encode_prompt(prompts.fill(prompts.family(model).template, "Who is 0?")))  # type: ignore[arg-type]
    assert one.read == 6 * prompt
    (none,) = asked(Tellers([("unknown", 9.0), ("Not mentioned.", 3.0)]), "cells")
    assert (none.text, none.spans) == (None, ())


def test_the_surest_may_be_in_any_group() -> None:
    for best in (0, chunk_states.ROWS, 3 * chunk_states.ROWS):
        told = [("wrong", 2.0)] * (3 * chunk_states.ROWS + 1)
        told[best] = ("right", 7.0)
        assert asked(Tellers(told), "cells")[0].text == "right"


def test_many_states_take_no_more_rows_than_few() -> None:
    """For several questions, too."""
    most: dict[int, int] = {}
    for n in (20, 400):
        model = Tellers([(f"a{i}", 1 + i / n) for i in range(n)])
        found = asked(model, "cells", 3)
        assert [one.text for one in found] == [f"a{n - 1}"] * 3
        most[n] = max(model.rows)
    assert most[20] == most[400] == chunk_states.ROWS
    model = Tellers([(f"a{i}", 1 + i / 400) for i in range(400)])
    (one,) = asked(model, "map-reduce")
    assert one.spans is not None and len(one.spans) == chunk_states.PARTS and max(model.rows) <= chunk_states.ROWS


def test_what_the_chunks_answer_is_joined() -> None:
    model = Tellers([("Bo", 3.0), ("unknown", 9.0), ("Ann", 6.0), ("Bo", 1.0)], joins="Ann and Bo")
    read: list[str] = []
    encode = model.tokenizer.encode_prompt
    model.tokenizer = SimpleNamespace(  # type: ignore[assignment]
        encode_prompt=lambda text: read.append(text) or encode(text),
        encode=model.tokenizer.encode, decode=model.tokenizer.decode, end_tokens=model.tokenizer.end_tokens,
        vocab_size=model.tokenizer.vocab_size, kind="bytes",
    )  # fmt: skip
    (one,) = asked(model, "map-reduce")
    assert one.text == "Ann and Bo" and one.spans == (Span(0, 0, 10), Span(0, 20, 30), Span(0, 30, 40))
    assert "Bo\nAnn\n\nQuestion: Who is 0?" in read[-1]
    for told, text, spans in ([("Ann", 3.0), ("unknown", 9.0)], "Ann", 1), ([("unknown", 9.0)], None, 0):
        (one,) = asked(Tellers(told), "map-reduce")
        assert (one.text, len(one.spans or ())) == (text, spans)


def test_entropy_is_that_of_the_first_token() -> None:
    model: Any = Tellers([("Ann", 3.0)])
    (found,) = chunk_states._asked(
        [Question("Who?")],
        Subject(
            "b",
            model,
            None,
            [MemoryText("x")],
            [ChunkState(Span(0, 0, 1), SimpleNamespace(state=lambda: model.state(0)))],
        ),  # type: ignore[arg-type]
        chunk_states.Manner(),
    )
    n = model.config.vocab_size
    p = math.exp(3.0) / (math.exp(3.0) + n - 1)
    rest = (1 - p) / (n - 1)
    assert found.entropies == pytest.approx([-p * math.log(p) - (n - 1) * rest * math.log(rest)], rel=1e-4)


# ---- with a store ----

TEXT = "".join(f"The keeper of tower {i} lit lamp {i * 7 % 13}, and the sea was calm. " for i in range(12))


@pytest.fixture
def ingested(tmp_path: Path, bytes_model: Model) -> Callable[[str], tuple[rs.Store, rs.Snapshot]]:
    store = rs.Store(tmp_path / "store", create=True)

    def ingest(text: str) -> tuple[rs.Store, rs.Snapshot]:
        path = tmp_path / "book.txt"
        path.write_text(text)
        report = rs.ingest(path, name="book.txt", model=bytes_model, store=store, chunk=64, snapshot_every=128)
        return store, store.get(report.snapshot)

    return ingest


def test_a_subject_is_all_of_the_text_in_stretches(ingested: Any, bytes_model: Model) -> None:
    store, snapshot = ingested(TEXT)
    needs = STRATEGIES["cells"].needs
    with subject(snapshot, store, needs, bytes_model) as given:
        assert given.chunks == []
        with pytest.raises(UsageError, match="ingest --cells"):
            list(replies([Question("Who?")], STRATEGIES["cells"], given))
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=200)
    store, grown = ingested(TEXT + "Then the ship came.")
    _, edited = ingested(TEXT[:200] + "X" + TEXT[201:])
    for one, kept in ((snapshot, None), (grown, None), (edited, 1), (store.get(f"{snapshot.id}"), None)):
        with subject(one, store, needs, bytes_model) as given:
            spans = [chunk.span for chunk in given.chunks]
            assert [span.byte_end for span in spans[:-1]] == [span.byte_start for span in spans[1:]]
            assert (spans[0].byte_start, spans[-1].byte_end) == (0, one.bytes)
            missing = [chunk.span for chunk in given.chunks if chunk.snapshot is None]
            if kept is not None:
                assert missing == [Span(0, 200, 400)]
            elif one is grown:
                assert len(missing) == 1 and missing[0].byte_end == grown.bytes
            else:
                assert missing == []


def test_a_stretch_without_a_state_is_read_when_it_is_asked(
    ingested: Any, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, snapshot = ingested(TEXT)
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=200)
    strategy, question = STRATEGIES["cells"], Question("Who lit lamp 7?")
    with subject(snapshot, store, strategy.needs, bytes_model) as given:
        (_, (all_kept,)) = next(replies([question], strategy, given))
    for one in list(store.chunk_states(snapshot))[1:3]:
        store.rm(one.id)
    with subject(snapshot, store, strategy.needs, bytes_model) as given:
        (_, (some_read,)) = next(replies([question], strategy, given))
        assert some_read.read > all_kept.read
        monkeypatch.setattr(chunk_states, "CHUNK_TOKENS", 100)
        with pytest.raises(UsageError, match=r"expected states of the chunks of 'book.txt' from byte 200 to 600"):
            next(replies([question], strategy, given))


def test_from_the_program(program_folder: Path) -> None:
    Path("book.txt").write_text(TEXT)
    assert program("ingest", "book.txt", "--chunk", 64, "--cells").code == 0
    for strategy in ("cells", "map-reduce"):
        options = ("--from-snapshot", "book.txt", "--strategy", strategy, "--max-tokens", 3)
        ended = program("ask", "Who lit lamp 7?", *options)
        assert ended.code == 0 and "book.txt, line 1, bytes 0 to" in ended.out, ended
    assert program("snapshots", "rm", "--cells", "book.txt").code == 0
    ended = program("ask", "Who lit lamp 7?", "--from-snapshot", "book.txt", "--strategy", "cells")
    assert (ended.code, ended.out) == (2, "") and "`ingest --cells` keeps" in ended.err
