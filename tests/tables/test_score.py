"""Bits of tokens, lines and chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TEXT, Scripted, taken
from torch import Tensor

from rwkv_stream.answers.answer import answer_schema
from rwkv_stream.answers.ask import ask
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.reading.follow import Followed, opened_after
from rwkv_stream.tables import score as scoring
from rwkv_stream.tables.score import Surprise, alerts, score, score_schema
from rwkv_stream.tables.writers import Writer
from rwkv_stream.text import tokenizer


def plain_bits(model: Any, text: str, start: tuple[Tensor | None, State]) -> list[float]:
    """Bits of each token of the text from all logits at once; NaN for a first token without a prediction."""
    hidden, state = start
    ids = model.tokenizer.encode(text)
    logits = model.forward(torch.tensor([ids]), state, logits="all")[0][0].double()
    before = logits[:-1] if hidden is None else torch.cat([model.head(hidden)[None].double(), logits[:-1]])
    nats = -torch.log_softmax(before, -1)[range(len(before)), ids[len(ids) - len(before) :]]
    return [math.nan] * (len(ids) - len(before)) + (nats / math.log(2)).tolist()


def unsure(words: tokenizer.Tokenizer, *, starts: bool = False) -> Any:
    """A model that finds all tokens equally likely; unless it `starts` the first has no prediction."""
    model: Any = Scripted([], words)
    model.head = lambda hidden: torch.zeros(*hidden.shape[:-1], words.vocab_size)
    if not starts:
        model.start = lambda: (None, State({"position": torch.zeros(1, 1)}))
    return model


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.mark.parametrize("continued", [False, True])
def test_bits_are_those_of_all_logits_at_once(
    model: Any, book: Path, continued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 50)
    monkeypatch.setattr(scoring, "HEAD_TOKENS", 7)
    snapshot = taken(model, "Before that. ") if continued else None
    bits = plain_bits(model, TEXT, (snapshot.hidden, snapshot.tensors) if snapshot else model.start())
    first = sum(math.isnan(b) for b in bits)
    assert first == (0 if continued or model.start_token is not None else 1)
    result = score(str(book), model=model, unit="token", snapshot=snapshot)
    units = list(result)
    assert [unit.bits for unit in units] == pytest.approx(bits[first:], abs=1e-3)
    assert [unit.token_start for unit in units] == list(range(first, len(bits)))
    data = TEXT.encode()
    assert [data[u.byte_start : u.byte_end].decode("utf-8", "replace") for u in units] == [u.text for u in units]
    assert b"".join(data[u.byte_start : u.byte_end] for u in units) == data[units[0].byte_start :]
    assert result.tokens == len(units)
    assert result.bits_per_byte == pytest.approx(sum(bits[first:]) / (len(data) - units[0].byte_start))


def test_every_unit_has_the_same_bits_in_all(model: Any, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 32)
    results = {unit: score(str(book), model=model, unit=unit) for unit in ("token", "line", "chunk")}  # type: ignore[arg-type]
    units = {name: list(result) for name, result in results.items()}
    assert len(units["token"]) > len(units["chunk"]) > 1
    assert (
        len({result.tokens for result in results.values()}) == len({result.bytes for result in results.values()}) == 1
    )
    for result in results.values():
        assert result.bits == pytest.approx(results["token"].bits)
    of_token = {unit.token_start: unit.bits for unit in units["token"]}
    for name in ("line", "chunk"):
        for unit in units[name]:
            span = range(unit.token_start, unit.token_end)
            assert unit.bits == pytest.approx(sum(of_token.get(i, 0) for i in span))
        assert [u.token_end for u in units[name]][:-1] == [u.token_start for u in units[name]][1:]


def test_lines_are_those_of_the_text(model: Any, book: Path) -> None:
    lines = list(score(str(book), model=model, unit="line"))
    data = TEXT.encode()
    wanted = [(i, line) for i, line in enumerate(TEXT.split("\n")) if line]
    found = [(unit.index, unit.text) for unit in lines if unit.text]
    assert found == [(i, line.rstrip("\r")) for i, line in wanted]
    for unit in lines:
        assert data[unit.byte_start : unit.byte_end].decode().rstrip("\r\n") == unit.text
        assert unit.byte_start == 0 or data[unit.byte_start - 1 : unit.byte_start] == b"\n"


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab;.\n\r\t é漢"), min_size=1, max_size=200),
    cut=st.integers(2, 40),
    longest=st.integers(1, 60),
)
def test_each_token_is_in_one_line_whatever_the_text(
    text: str, cut: int, longest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """World tokens such as ";\\n\\n" span lines; every token is 16 bits for a model that knows nothing."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(text.encode())
    model = unsure(tokenizer.world(), starts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CHUNK_TOKENS", cut)
        patch.setattr(scoring, "LINE_TOKENS", longest)
        result = score(str(path), model=model, unit="line")
        lines = list(result)
    ids = model.tokenizer.encode(text)
    assert result.bits == pytest.approx(16 * len(ids))
    position = byte = 0
    for unit in lines:
        assert unit.token_start == position
        assert 0 < unit.token_end - unit.token_start <= longest
        assert unit.bits == pytest.approx(16 * (unit.token_end - unit.token_start))
        assert unit.byte_start >= byte
        assert text.encode()[byte : unit.byte_start].strip() == b"", "only white space is in no line's unit"
        assert text.encode()[: unit.byte_start].count(b"\n") == unit.index
        assert b"\n" not in text.encode()[unit.byte_start : unit.byte_end - 1]
        position, byte = unit.token_end, unit.byte_end
    assert position == len(ids)
    assert text.encode()[byte:].strip() == b""


def test_a_line_without_end_is_scored_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LINE_TOKENS", 100)
    longest = 0

    class Window(scoring._Window):
        def home(self, start: int, end: int) -> int:
            nonlocal longest
            longest = max(longest, len(self._buffer))
            return super().home(start, end)

    monkeypatch.setattr(scoring, "_Window", Window)
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * 200_000)
    result = score(str(path), model=unsure(tokenizer.raw_bytes()), unit="line")
    parts = list(result)
    assert result.bits == pytest.approx(8 * 199_999)
    assert {unit.index for unit in parts} == {0}
    assert {unit.text for unit in parts} == {"x" * 100}
    assert [unit.byte_start for unit in parts] == list(range(0, 200_000, 100))
    assert longest < 2 * 65_536 + 4096


def test_tokens_that_begin_with_newlines_are_in_the_line_of_their_word(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n+\w+"), "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("zero\n\ntwo and two\nthree\n\n")
    model = unsure(tokenizer.from_file(tmp_path / "tokenizer.json"))
    lines = list(score(str(tmp_path / "text.txt"), model=model, snapshot=None))
    assert [(unit.index, unit.text, unit.token_start) for unit in lines] == [(2, "two and two", 1), (3, "three", 3)]
    assert [(unit.byte_start, unit.byte_end) for unit in lines] == [(6, 18), (18, 24)]


def test_lines_count_from_1(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\nthree is longer\nfour\n" * 3)
    for unit in ("line", "token"):
        found = list(score(path, model=model, unit=unit))  # type: ignore[arg-type]
        text = path.read_bytes()
        assert [row.line for row in found] == [text[: row.byte_start].count(b"\n") + 1 for row in found]
        assert found[-1].label == ("line 12" if unit == "line" else f"token {found[-1].index} (line 12)")


def test_the_strangest(model: Any, book: Path) -> None:
    for unit in ("token", "line"):
        result = score(str(book), model=model, unit=unit, top=5)  # type: ignore[arg-type]
        units = list(result)
        by_strangeness = sorted(units, key=lambda u: (-u.bits / max(1, u.byte_end - u.byte_start), u.byte_start))
        assert result.strangest == by_strangeness[:5]
    assert score(str(book), model=model).strangest == []


def test_of_equally_strange_units_the_first_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "same.txt"
    path.write_text("abc\n" * 20)
    result = score(str(path), model=unsure(tokenizer.raw_bytes()), unit="line", top=3)
    list(result)
    assert [unit.index for unit in result.strangest] == [1, 2, 3]  # the first line's first byte has no prediction


def test_texts_with_nothing_to_score(bytes_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"text\.txt.*found none"):
        list(score(str(path), model=bytes_model))
    path.write_bytes(b"a")
    result = score(str(path), model=bytes_model)
    assert list(result) == []
    assert result.bits_per_byte is None
    with pytest.raises(UsageError, match=r"token, line, chunk.*'word'"):
        score(str(path), model=bytes_model, unit="word")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="top"):
        score(str(path), model=bytes_model, top=-1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_schemas_fit_their_rows(model: Any, book: Path, tmp_path: Path, suffix: str) -> None:
    scores, answers = tmp_path / f"scores{suffix}", tmp_path / f"answers{suffix}"
    with Writer(scores, score_schema()) as writer:
        writer.write(dataclasses.asdict(unit) for unit in score(str(book), model=model))
    with Writer(answers, answer_schema()) as writer:
        s = Sampling(max_tokens=2, temperature=0)
        writer.write(
            dataclasses.asdict(a) for a in ask(["Who?", "Where?"], snapshot=taken(model), model=model, sampling=s)
        )
    assert writer.rows == 2
    assert set(score_schema().names) == {field.name for field in dataclasses.fields(Surprise)}


LINES = [f"2026-11-{1 + i % 28:02} line {i} of a log\n".encode() for i in range(40)]
ODD = 31


@pytest.mark.parametrize("pauses", [False, True], ids=["at once", "line by line"])
def test_alerts_are_the_surprising_lines_each_once(bytes_model: Model, tmp_path: Path, pauses: bool) -> None:
    """Of a text that waits as of one that does not."""
    data = [*LINES[:ODD], b"\x7f~{}zzzz ???? \xc3\xa9\xc3\xa9\n", *LINES[ODD:]]
    path = tmp_path / "app.log"
    path.write_bytes(b"".join(data))
    scored = list(score(path, model=bytes_model, unit="line", encoding="utf-8"))
    limit = sorted(line.bits_per_byte for line in scored)[-5]

    def wait(_: float) -> None:
        if (line := next(coming, None)) is None:
            raise KeyboardInterrupt
        with path.open("ab") as file:
            file.write(line)

    coming = iter(data[20:] if pauses else ())
    if pauses:
        path.write_bytes(b"".join(data[:20]))
    told = []
    with opened_after(Followed(str(path), name=str(path), wait=wait)) as text, contextlib.suppress(KeyboardInterrupt):
        for line in alerts(text, name=str(path), model=bytes_model, bits_per_byte=limit - 1e-4):
            told.append(line)
    wanted = [line for line in scored if line.bits_per_byte >= limit - 1e-4]
    assert [(line.line, line.text, line.byte_start, line.byte_end, line.token_start) for line in told] == [
        (line.line, line.text, line.byte_start, line.byte_end, line.token_start) for line in wanted
    ]
    assert [line.bits for line in told] == pytest.approx([line.bits for line in wanted], rel=1e-4)
