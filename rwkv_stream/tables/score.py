"""How surprising a document is to a model: bits of each token, line or chunk.

Memory does not grow with the document: logits are computed for HEAD_TOKENS positions at a time, and a line is cut at
LINE_TOKENS.
"""

from __future__ import annotations

import copy
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model.finite import not_finite
from rwkv_stream.reading.passes import ChunkOutput, HashedText, OpenText, chained_chunks, forward_chunks
from rwkv_stream.reading.states import with_state
from rwkv_stream.store.records import check_model
from rwkv_stream.text.chunker import CHUNK_TOKENS, Chunk
from rwkv_stream.text.readers import Document, document
from rwkv_stream.text.units import Window

if TYPE_CHECKING:
    import pyarrow as pa

    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot

HEAD_TOKENS = 128  # 33 MB of logits for 65,536 entries
LINE_TOKENS = 2048  # a longer line is scored in parts

UnitKind = Literal["token", "line", "chunk"]


@dataclass(frozen=True, slots=True)
class Surprise:
    """One unit of a scored document: what the model expected least has the most bits.

    `index` counts units from 0; of an overlong line all parts have its index. `bits` is the sum over the unit's tokens,
    `line` the one in which it begins, from 1; None where its unit is another and the document's format has no lines.
    """

    document: str
    unit: str
    index: int
    text: str
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    bits: float
    line: int | None = None

    @property
    def label(self) -> str:
        """What a person would call it."""
        within = "" if self.line is None else f" (line {self.line})"
        return f"line {self.line}" if self.unit == "line" else f"{self.unit} {self.index}{within}"

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(1, self.byte_end - self.byte_start)  # a unit that another token covers spans no byte


class Score(Iterator[Surprise]):
    """The units of a document in order, computed as they are asked for; totals of what has been scored so far.

    tokens, bytes, bits  of the tokens that had a prediction
    losses               what of the text could not be read, the first 1,000 of `n_losses`
    strangest            the `top` units with the most bits a byte, most first (by bits alone the longest ones win)
    """

    def __init__(self, units: Callable[[Score], Iterator[tuple[Surprise, int, int]]], top: int) -> None:
        self.losses: list[InputError] = []
        self.tokens = self.bytes = self.n_losses = 0
        self.bits = 0.0
        self._units = units(self)
        self._top = top
        self._heap: list[tuple[float, int, Surprise]] = []
        self._n_units = 0

    def __next__(self) -> Surprise:
        unit, tokens, n_bytes = next(self._units)
        self.tokens += tokens
        self.bytes += n_bytes
        self.bits += unit.bits
        self._n_units += 1
        if self._top:
            entry = (unit.bits_per_byte, -self._n_units, unit)  # of equals the first is stranger
            if len(self._heap) < self._top:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)
        return unit

    @property
    def strangest(self) -> list[Surprise]:
        return [unit for _, _, unit in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]

    @property
    def bits_per_byte(self) -> float | None:
        """None where nothing had a prediction."""
        return self.bits / self.bytes if self.bytes else None


def score(
    source: str | Path | Document,
    *,
    model: Model,
    unit: UnitKind = "line",
    snapshot: Snapshot | None = None,
    top: int = 0,
    name: str | None = None,
    encoding: str | None = None,
) -> Score:
    """How many bits each token, line or chunk (of 1,024 tokens) of a document costs the model.

    The first token is predicted from the start token, or from `snapshot`, whose state the document then continues.
    Where a family has no start token, the first token has no prediction and is not scored: its bits count nowhere.
    A token belongs to the line of its first byte that is not white space (else of its first byte); a line without a
    token of its own has no unit; a line of more than 2,048 tokens is scored in parts of so many.
    raises  MismatchError if another model made the snapshot, UsageError for another unit; while iterating InputError
    """
    if unit not in _GROUPINGS:
        raise UsageError(f"scoring: expected a unit of {', '.join(_GROUPINGS)}, found '{unit}'")
    if top < 0:
        raise UsageError(f"scoring: expected top to be 0 or more, found {top}")
    if snapshot is not None:
        check_model(snapshot, model)
    named = source if isinstance(source, Document) else document(str(source), name=name, encoding=encoding)
    return Score(functools.partial(_units, named, model, unit, snapshot), top)


def score_schema() -> pa.Schema:
    """The columns of a table of Surprise."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("document", "unit", "text")]
    counts = [(name, pa.int64()) for name in ("index", "line", "byte_start", "byte_end", "token_start", "token_end")]
    return pa.schema([*texts, *counts, ("bits", pa.float64())])


class _Window(Window):
    """The same, with its lines."""

    def pieces(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.push(piece)
            yield piece

    def home(self, start: int, end: int) -> int:
        """The byte by which a token that spans start..end belongs to a unit: its first that is not white space."""
        data = self.bytes(start, end)
        word = data.lstrip()
        return end - len(word) if word else start

    def line_end(self, start: int, end: int) -> int | None:
        """Where the first line that ends in start..end does, after its newline."""
        at = self._buffer.find(b"\n", start - self._base, end - self._base)
        return None if at < 0 else self._base + at + 1


@dataclass(slots=True)
class _Tally:
    """A unit that is being gathered: tokens, bytes and bits of what had a prediction."""

    index: int
    byte_start: int
    token_start: int
    gathered: int = 0
    tokens: int = 0
    bytes: int = 0
    bits: float = 0.0

    def add(self, n_bytes: int, bits: float) -> None:
        self.gathered += 1
        if not math.isnan(bits):
            self.tokens += 1
            self.bytes += n_bytes
            self.bits += bits


_TallyEnd = tuple[_Tally, int]  # a unit and the byte where it ends
_ScoredChunk = tuple[Chunk, list[float]]  # a chunk and the bits of its tokens


def _units(
    source: Document, model: Model, unit: UnitKind, snapshot: Snapshot | None, totals: Score
) -> Iterator[tuple[Surprise, int, int]]:
    hidden, state = _begun(model, snapshot)
    window = _Window()
    any_token = False
    with source.text() as text:
        chunks = chained_chunks(HashedText(window.pieces(text)), model.tokenizer, CHUNK_TOKENS)
        scored = _scored(model, forward_chunks(model, chunks, state), hidden, f"scoring '{source.name}'")
        for tally, byte_end in _GROUPINGS[unit](scored, window):
            any_token = True
            if tally.tokens:
                place = {"line": tally.index + 1} if unit == "line" else text.place(tally.byte_start)
                line = cast("int | None", place.get("line"))
                surprise = _surprise(source.name, unit, tally, byte_end, window, line)
                yield surprise, tally.tokens, tally.bytes
            window.drop(byte_end)
        totals.losses, totals.n_losses = text.losses, text.n_losses
    if not any_token:
        raise InputError(f"scoring '{source.name}': expected some text, found none")


def _scored(model: Model, outputs: Iterable[ChunkOutput], hidden: Tensor | None, doing: str) -> Iterator[_ScoredChunk]:
    """Each chunk with the bits of its tokens, NaN for one without a prediction; hidden [C] predicts the first."""
    for output in outputs:
        ids, out = torch.from_numpy(output.item.chunk.ids), output.hidden
        before = out[:-1] if hidden is None else torch.cat([hidden[None], out[:-1]])
        predicted = ids[len(ids) - len(before) :]
        bits = [math.nan] * (len(ids) - len(before))
        for start in range(0, len(before), HEAD_TOKENS):
            nats = model.surprise(before[start : start + HEAD_TOKENS], predicted[start : start + HEAD_TOKENS])
            bits += (nats.double() / math.log(2)).tolist()
        odd = next((i for i in range(len(ids) - len(before), len(ids)) if not math.isfinite(bits[i])), None)
        if odd is not None:
            raise not_finite(model, doing, output.state, output.item.chunk.start_token + odd)
        yield output.item.chunk, bits
        if not output.item.chunk.is_paused:
            hidden = out[-1]


def _by_token(scored: Iterable[_ScoredChunk], _window: _Window) -> Iterator[_TallyEnd]:
    for chunk, bits in scored:
        for i, (start, end) in enumerate(zip(chunk.starts.tolist(), chunk.ends.tolist(), strict=True)):
            tally = _Tally(chunk.start_token + i, start, chunk.start_token + i)
            tally.add(end - start, bits[i])
            yield tally, end


def _by_chunk(scored: Iterable[_ScoredChunk], _window: _Window) -> Iterator[_TallyEnd]:
    for number, (chunk, bits) in enumerate(scored):
        starts, ends = chunk.starts.tolist(), chunk.ends.tolist()
        tally = _Tally(number, starts[0], chunk.start_token)
        for start, end, token_bits in zip(starts, ends, bits, strict=True):
            tally.add(end - start, token_bits)
        yield tally, ends[-1]


@dataclass(slots=True)
class _Lines:
    """Gathers tokens into lines.

    line  the number of the one that `tally` is of
    seen  up to this byte newlines were looked for
    end   of the last token
    """

    line: int = 0
    seen: int = 0
    end: int = 0
    tally: _Tally | None = None

    def push(self, chunk: Chunk, bits: list[float], window: _Window) -> Iterator[_TallyEnd]:
        """The lines that what a chunk begins with ends."""
        for i, (start, end) in enumerate(zip(chunk.starts.tolist(), chunk.ends.tolist(), strict=True)):
            home = window.home(start, end)
            byte_start = start
            line_end = window.line_end(self.seen, home)
            if self.tally is not None and (line_end is not None or self.tally.gathered == LINE_TOKENS):
                yield self.tally, start if line_end is None else line_end
                self.tally = None
            while line_end is not None:
                self.line, self.seen, byte_start = self.line + 1, line_end, line_end
                line_end = window.line_end(self.seen, home)
            self.seen, self.end = max(self.seen, home), end
            if self.tally is None:
                self.tally = _Tally(self.line, byte_start, chunk.start_token + i)
            self.tally.add(end - start, bits[i])

    def last(self, window: _Window, *, is_over: bool) -> Iterator[_TallyEnd]:
        """The line at the end, where its own has come."""
        if self.tally is not None:
            line_end = window.line_end(self.seen, self.end)
            if line_end is not None or is_over:
                yield self.tally, line_end or self.end


def _by_line(scored: Iterable[_ScoredChunk], window: _Window) -> Iterator[_TallyEnd]:
    lines = _Lines()
    for chunk, bits in scored:
        yield from lines.push(chunk, bits, window)
    yield from lines.last(window, is_over=True)


def alerts(
    text: OpenText, *, name: str, model: Model, bits_per_byte: float, snapshot: Snapshot | None = None
) -> Iterator[Surprise]:
    """The lines of an open text that cost the model so many bits a byte, or more, as they come.

    Where the text waits, the tokens since the last edge are scored by then, and again with their whole chunk, as the
    state goes on from that; a line is told once.
    raises  as `score`
    """
    if snapshot is not None:
        check_model(snapshot, model)
    hidden, state = _begun(model, snapshot)
    window, lines, told = _Window(), _Lines(), 0
    chunks = chained_chunks(HashedText(window.pieces(text)), model.tokenizer, CHUNK_TOKENS, pauses=True)
    for chunk, bits in _scored(model, forward_chunks(model, chunks, state), hidden, f"scoring '{name}'"):
        now = copy.deepcopy(lines) if chunk.is_paused else lines
        for tally, end in itertools.chain(now.push(chunk, bits, window), now.last(window, is_over=False)):
            if end <= told:
                continue
            told = end
            surprise = _surprise(name, "line", tally, end, window, tally.index + 1)
            if tally.tokens and surprise.bits_per_byte >= bits_per_byte:
                yield surprise
        if not chunk.is_paused:
            window.drop(lines.tally.byte_start if lines.tally is not None else lines.end)


def _surprise(name: str, unit: str, tally: _Tally, byte_end: int, window: _Window, line: int | None) -> Surprise:
    unit_text = window.text(tally.byte_start, byte_end)
    return Surprise(
        document=name,
        unit=unit,
        index=tally.index,
        text=unit_text.rstrip("\r\n") if unit == "line" else unit_text,
        byte_start=tally.byte_start,
        byte_end=byte_end,
        token_start=tally.token_start,
        token_end=tally.token_start + tally.gathered,
        bits=tally.bits,
        line=line,
    )


def _begun(model: Model, snapshot: Snapshot | None) -> tuple[Tensor | None, State]:
    """What predicts the first token, and the state before it."""
    if snapshot is None:
        return model.start()
    state, last_hidden = with_state(snapshot, model).load()
    return last_hidden.to(model.last_device), state


_GROUPINGS = {"token": _by_token, "line": _by_line, "chunk": _by_chunk}
