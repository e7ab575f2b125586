"""What is done with a snapshot or a model once a text has been read: generate, ask, score.

A snapshot's state is forked, never changed: models return new states. All three hold memory that does not grow with
what they are given: questions are answered in batches of ROWS, prompts are read in pieces of PREFILL_TOKENS, logits
are computed for HEAD_TOKENS positions at a time, and a line is cut at LINE_TOKENS.

One row's text depends on its own logits and its own random numbers. A matrix product may still change in the last
bit with its number of rows, so that under a batch of another size a choice between two tokens can, very rarely, go
the other way.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream import prompts
from rwkv_stream.chunker import CHUNK_TOKENS, Chunk, chunks
from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.prompts import Question
from rwkv_stream.readers import Document, document
from rwkv_stream.sampling import Sampler, Sampling, not_finite, random_numbers
from rwkv_stream.state import State
from rwkv_stream.tokenizer import TextDecoder
from rwkv_stream.units import Window

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rwkv_stream.kernels import sampling_triton
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot

ROWS = 32  # questions answered as one batch
PREFILL_TOKENS = 2048  # of all rows together, per model call
HEAD_TOKENS = 128  # 33 MB of logits for 65,536 entries
LINE_TOKENS = 2048  # a longer line is scored in parts

Unit = Literal["token", "line", "chunk"]


# ---- text out of tokens ----


class _Text:
    """Text in, text out, but nothing that may turn out to be the beginning of a stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = stop
        self._held = ""

    def push(self, text: str, *, final: bool = False) -> str:
        """What can be shown after `text`; with `final` all that is left."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of `"".join(pieces).strip()`, as soon as they are known."""
    held = ""
    started = False
    for piece in pieces:
        text = held + (piece if started else piece.lstrip())
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            started = True
            yield shown


class Row:
    """One text that is being made: its tokens, its text, and whether it has ended."""

    def __init__(self, model: Model, sampling: Sampling, stop: Sequence[str], index: int) -> None:
        self.tokens = 0
        self.token = 0
        self.ended = False
        self.sampling = sampling
        self.index = index
        self._end_tokens = model.tokenizer.end_tokens
        self._decoder = TextDecoder(model.tokenizer)
        self._text = _Text(stop)

    def step(self, token: int) -> str:
        """Go on by a token; the text that can be shown after it."""
        self.token = token
        is_end = self.token in self._end_tokens
        if not is_end:
            self.tokens += 1
        shown = "" if is_end else self._text.push(self._decoder.feed(self.token))
        self.ended = is_end or self._text.stopped or self.tokens == self.sampling.max_tokens
        if self.ended and not self._text.stopped:
            shown += self._text.push(self._decoder.flush(), final=True)
        return shown


class _Choice:
    """Chooses the tokens of rows that have one Sampling: where the logits lie, if there is a way, else on the host.

    Of 512 rows with 65,536 tokens the logits are 134 MB a step; the tokens and random numbers are 8 kB.
    """

    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        s, vocab_size = rows[0].sampling, model.config.vocab_size
        assert all(row.sampling == s for row in rows), "rows of one batch have one Sampling"
        self._is_greedy = s.temperature == 0
        self._is_largest = self._is_greedy and not s.penalises
        self._on_device: sampling_triton.Sampler | None = None
        self._random: list[np.random.Generator] = []
        self._on_host: list[Sampler] = []
        if self._is_largest:
            return
        if model.backend == "triton":
            from rwkv_stream.kernels import sampling_triton

            self._on_device = sampling_triton.Sampler(
                len(rows), vocab_size, model.last_device, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
                penalty_decay=s.penalty_decay,
            )  # fmt: skip
            self._random = [random_numbers(s, row.index) for row in rows]
        else:
            self._on_host = [Sampler(s, row.index, vocab_size) for row in rows]

    def __call__(self, logits: Tensor) -> list[int]:
        """The next token of each row: logits fp32 [B, V]. Raises BackendError for NaN, or if a largest is infinite."""
        if self._is_largest:
            largest, tokens = logits.max(-1)  # NaN, if there is one; of equals the first
            found = torch.where(largest.isfinite(), tokens, -1).tolist()
        elif self._on_device is not None:
            found = self._on_device(logits, self._shares(logits.device)).tolist()
        else:
            found = [sampler(row) for sampler, row in zip(self._on_host, logits.cpu().numpy(), strict=True)]
        if min(found) < 0:
            raise not_finite()
        return found

    def _shares(self, device: torch.device) -> Tensor | None:
        """A random number fp64 for each row."""
        from rwkv_stream.kernels.memory import sent

        if self._is_greedy:
            return None
        shares = torch.tensor([numbers.random() for numbers in self._random], dtype=torch.float64)
        there: Tensor = sent(shares, device)
        return there

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows at these places go on, in this order."""
        if self._on_device is not None:
            self._on_device.keep(places)
            self._random = [self._random[place] for place in places]
        elif self._on_host:
            self._on_host = [self._on_host[place] for place in places]


def _decode(model: Model, hidden: Tensor, state: State, rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
    """Make the texts of all rows at once: (row, piece of its text) until all have ended; a row that has ended leaves.

    hidden [B, C] and state of batch B: where each row stands.
    """
    live, choice = list(range(len(rows))), _Choice(model, rows)
    logits = model.head(hidden)
    while True:
        for i, token in zip(live, choice(logits), strict=True):
            piece = rows[i].step(token)
            if piece:
                yield i, piece
        going = [place for place, i in enumerate(live) if not rows[i].ended]
        if not going:
            return
        if len(going) < len(live):
            index = torch.tensor(going, device=model.device)
            state = State({name: tensor[index] for name, tensor in state.items()})
            live = [live[place] for place in going]
            choice.keep(going)
        tokens = torch.tensor([[rows[i].token] for i in live])
        logits, state = model.forward(tokens, state, logits="last")


# ---- tokens in ----


def _prefill(model: Model, rows: Sequence[Sequence[int]], state: State) -> tuple[Tensor, State]:
    """Read the tokens of each row (one at least): hidden state [B, C] of each row's last token, state of batch B.

    state  of batch B, or of one row that all go on from: it is not copied for each of them
    """
    ended: dict[int, tuple[Tensor, State]] = {}
    live, begin = list(range(len(rows))), 0
    start = torch.arange(len(rows)) if state.batch > 1 else torch.zeros(len(rows), dtype=torch.int64)
    while live:
        end = begin + max(1, PREFILL_TOKENS // len(live))
        pieces = [torch.tensor(rows[i][begin:end]) for i in live]
        lengths = torch.tensor([len(piece) for piece in pieces])
        hidden, state = model.forward_packed(torch.cat(pieces), lengths, state, start=start)
        for place, (i, last) in enumerate(zip(live, (lengths.cumsum(0) - 1).tolist(), strict=True)):
            if len(rows[i]) <= end:
                ended[i] = hidden[last], state.row(place)
        going = [place for place, i in enumerate(live) if i not in ended]
        live, start, begin = [live[place] for place in going], torch.tensor(going), end
    hiddens, states = zip(*(ended[i] for i in range(len(rows))), strict=True)
    return torch.stack(hiddens), State({name: torch.cat([part[name] for part in states]) for name in state})


def complete(model: Model, prompts: Sequence[str], state: State, rows: Sequence[Row]) -> list[str]:
    """Read a prompt into a fork of `state` (one row, or batch B) for each row, and make all texts as one batch."""
    texts: list[list[str]] = [[] for _ in rows]
    hidden, forks = _prefill(model, [model.tokenizer.encode_prompt(prompt) for prompt in prompts], state)
    for i, piece in _decode(model, hidden, forks, rows):
        texts[i].append(piece)
    return ["".join(text) for text in texts]


def generate(
    model: Model,
    prompt: str | Sequence[int] | None = None,
    *,
    state: State | None = None,
    last_hidden: Tensor | None = None,
    sampling: Sampling | None = None,
    index: int = 0,
) -> Iterator[str]:
    """Continue `prompt`, or without one what `state` has read, as pieces of text that hold whole characters.

    state        batch 1, left unchanged; without one the model's start, as if nothing had been read
    last_hidden  [C], of the last token that `state` has read; needed only without a prompt
    index        which of several texts with one seed this is
    raises       UsageError where there is nothing to continue; while iterating for a token outside the vocabulary
    """
    if state is None:
        last_hidden, state = model.start()
    tokens = model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt or ())
    if not tokens and last_hidden is None:
        raise UsageError("generating: expected a prompt, or a state with its last hidden state; found neither")
    sampling = sampling or Sampling()
    return _pieces(model, tokens, state, last_hidden, sampling, index)


def _pieces(
    model: Model, tokens: Sequence[int], state: State, last_hidden: Tensor | None, sampling: Sampling, index: int
) -> Iterator[str]:
    if tokens:
        hidden, state = _prefill(model, [tokens], state)
    else:
        assert last_hidden is not None
        hidden = last_hidden.to(model.device)[None]
    for _, piece in _decode(model, hidden, state, [Row(model, sampling, sampling.stop, index)]):
        yield piece


# ---- ask ----


@dataclass(frozen=True, slots=True)
class Source:
    """A part of a document that an answer rests on."""

    document: str
    byte_start: int
    byte_end: int
    snapshot: str


@dataclass(frozen=True, slots=True)
class Answer:
    """`tokens` counts those made for the answer; `id` is the question's, where it has one."""

    question: str
    answer: str
    snapshot: str
    strategy: str
    tokens: int
    sources: tuple[Source, ...]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a conversation stands: what was read since the snapshot (text and tokens), and the state after it."""

    state: State
    last_hidden: Tensor
    tokens: tuple[int, ...]
    text: str


class Conversation:
    """One fork of a snapshot, asked question after question; each answer knows the turns before it.

    >>> for piece in conversation.ask("Who keeps the light?"): print(piece, end="")
    >>> conversation.answer.tokens
    """

    def __init__(
        self, snapshot: Snapshot, model: Model, *, sampling: Sampling | None = None, template: str | None = None
    ) -> None:
        """Raises MismatchError if another model made the snapshot."""
        check_model(snapshot, model)
        self.answer: Answer | None = None
        self._form = _Form(snapshot, model, sampling, template)
        self._model = model
        self._state, hidden = snapshot.load()
        self._hidden = hidden.to(model.device)
        self._tokens: list[int] = []
        self._unread: list[int] = []  # the last answer: read with the next question
        self._text = ""
        self._turns = 0

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces; afterwards it is in `answer`. What was shown is what the next turn knows."""
        asked = Question(question, index=self._turns)
        prompt = self._form.prompt(asked)
        return self._answer(asked, prompt)

    def _answer(self, question: Question, prompt: str) -> Iterator[str]:
        self._read([*self._unread, *self._model.tokenizer.encode_prompt(prompt)])
        self._text += prompt
        self._turns += 1
        row = self._form.row(question)
        pieces: list[str] = []
        try:
            for piece in _stripped(p for _, p in _decode(self._model, self._hidden[None], self._state, [row])):
                pieces.append(piece)
                yield piece
        finally:
            text = "".join(pieces)
            self.answer = self._form.answer(question, text, row)
            spoken = f" {text}" if text else ""
            self._unread = self._model.tokenizer.encode(spoken)
            self._text += spoken

    def fork(self) -> Fork:
        """The conversation so far, its last answer read too."""
        self._read(self._unread)
        self._unread = []
        return Fork(self._state, self._hidden, tuple(self._tokens), self._text)

    def _read(self, tokens: list[int]) -> None:
        if tokens:
            hidden, self._state = _prefill(self._model, [tokens], self._state)
            self._hidden = hidden[0]
            self._tokens += tokens


class _Form:
    """How a snapshot is asked: its prompts, its stop texts, its answers."""

    def __init__(self, snapshot: Snapshot, model: Model, sampling: Sampling | None, template: str | None) -> None:
        family = prompts.family(model)
        self._model = model
        self._template = family.template if template is None else template
        self._sampling = sampling or family.sampling
        self._stop = (*family.stop, *self._sampling.stop)
        self._snapshot = snapshot.id
        self._sources = (Source(snapshot.document, 0, snapshot.bytes, snapshot.id),)

    def prompt(self, question: Question) -> str:
        return prompts.fill(self._template, question.text)

    def row(self, question: Question) -> Row:
        return Row(self._model, self._sampling, self._stop, question.index)

    def answer(self, question: Question, text: str, row: Row) -> Answer:
        return Answer(question.text, text.strip(), self._snapshot, "fork", row.tokens, self._sources, question.id)


@overload
def ask(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
    question: str | Question,
    *,
    snapshot: Snapshot,
    model: Model,
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Answer: ...
@overload
def ask(
    question: Iterable[str | Question],
    *,
    snapshot: Snapshot,
    model: Model,
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Iterator[Answer]: ...
def ask(
    question: str | Question | Iterable[str | Question],
    *,
    snapshot: Snapshot,
    model: Model,
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Answer | Iterator[Answer]:
    """Fork the snapshot and answer: one question now, several in batches, their answers in order as batches are done.

    Every question has its own fork and knows nothing of the others. Plain texts get their place as index.
    sampling  default: that of the model's prompt family, which is greedy; the family's stop texts always hold
    template  the prompt, with {question} in it; default: the family's
    raises    MismatchError if another model made the snapshot, UsageError for an empty question or a bad template
    """
    check_model(snapshot, model)
    form = _Form(snapshot, model, sampling, template)
    if isinstance(question, str | Question):
        return next(_answers([question], form, snapshot, model))
    return _answers(question, form, snapshot, model)


def _answers(questions: Iterable[str | Question], form: _Form, snapshot: Snapshot, model: Model) -> Iterator[Answer]:
    state = snapshot.state()
    numbered = (q if isinstance(q, Question) else Question(q, index=i) for i, q in enumerate(questions))
    while batch := list(itertools.islice(numbered, ROWS)):
        rows = [form.row(question) for question in batch]
        texts = complete(model, [form.prompt(question) for question in batch], state, rows)
        for question, text, row in zip(batch, texts, rows, strict=True):
            yield form.answer(question, text, row)


def check_model(snapshot: Snapshot, model: Model) -> None:
    """Raise MismatchError if another model made the snapshot."""
    if snapshot.model != model.fingerprint:
        raise MismatchError(
            f"using snapshot {snapshot.id[:12]}: expected its model {snapshot.model}, last seen at "
            f"'{snapshot.model_path}', found {model.fingerprint} at '{model.path}'; pass --model with the first one"
        )


# ---- score ----


@dataclass(frozen=True, slots=True)
class Surprise:
    """One unit of a scored document: what the model expected least has the most bits.

    `index` counts units from 0; of an overlong line all parts have its index. `bits` is the sum over the unit's tokens.
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

    @property
    def bits_per_byte(self) -> float:
        return self.bits / max(1, self.byte_end - self.byte_start)  # a unit that another token covers spans no byte


class Score(Iterator[Surprise]):
    """The units of a document in order, computed as they are asked for; totals of what has been scored so far.

    tokens, bytes, bits  of the tokens that had a prediction
    strangest            the `top` units with the most bits a byte, most first (by bits alone the longest ones win)
    """

    def __init__(self, units: Iterator[tuple[Surprise, int, int]], top: int) -> None:
        self.tokens = self.bytes = 0
        self.bits = 0.0
        self._units = units
        self._top = top
        self._heap: list[tuple[float, int, Surprise]] = []
        self._seen = 0

    def __next__(self) -> Surprise:
        unit, tokens, n_bytes = next(self._units)
        self.tokens += tokens
        self.bytes += n_bytes
        self.bits += unit.bits
        self._seen += 1
        if self._top:
            entry = (unit.bits_per_byte, -self._seen, unit)  # of equals the first is stranger
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
    source: str | Document,
    *,
    model: Model,
    unit: Unit = "line",
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
    named = source if isinstance(source, Document) else document(source, name=name, encoding=encoding)
    return Score(_units(named, model, unit, snapshot), top)


def score_schema() -> pa.Schema:
    """The columns of a table of Surprise."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("document", "unit", "text")]
    counts = [(name, pa.int64()) for name in ("index", "byte_start", "byte_end", "token_start", "token_end")]
    return pa.schema([*texts, *counts, ("bits", pa.float64())])


def answer_schema() -> pa.Schema:
    """The columns of a table of Answer."""
    import pyarrow as pa

    span = [("byte_start", pa.int64()), ("byte_end", pa.int64())]
    source = [("document", pa.string()), *span, ("snapshot", pa.string())]
    texts = [(name, pa.string()) for name in ("id", "question", "answer", "snapshot", "strategy")]
    return pa.schema([*texts, ("tokens", pa.int64()), ("sources", pa.list_(pa.struct(source)))])


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
class _Part:
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


_Ended = tuple[_Part, int]  # a unit and the byte where it ends
_Chunk = tuple[Chunk, list[float]]  # a chunk and the bits of its tokens


def _units(
    source: Document, model: Model, unit: Unit, snapshot: Snapshot | None
) -> Iterator[tuple[Surprise, int, int]]:
    if snapshot is None:
        hidden, state = model.start()
    else:
        state, last_hidden = snapshot.load()
        hidden = last_hidden.to(model.last_device)
    window = _Window()
    any_token = False
    with source.text() as text:
        cut = chunks(model.tokenizer.stream(window.pieces(text)), CHUNK_TOKENS)
        for part, byte_end in _GROUPINGS[unit](_scored(model, cut, state, hidden), window):
            any_token = True
            if part.tokens:
                text_of_part = window.text(part.byte_start, byte_end)
                surprise = Surprise(
                    document=source.name,
                    unit=unit,
                    index=part.index,
                    text=text_of_part.rstrip("\r\n") if unit == "line" else text_of_part,
                    byte_start=part.byte_start,
                    byte_end=byte_end,
                    token_start=part.token_start,
                    token_end=part.token_start + part.gathered,
                    bits=part.bits,
                )
                yield surprise, part.tokens, part.bytes
            window.drop(byte_end)
    if not any_token:
        raise InputError(f"scoring '{source.name}': expected some text, found none")


def _scored(model: Model, cut: Iterable[Chunk], state: State, hidden: Tensor | None) -> Iterator[_Chunk]:
    """Each chunk with the bits of its tokens, NaN for one without a prediction; hidden [C] predicts the first."""
    for chunk in cut:
        ids = torch.from_numpy(chunk.ids).to(model.last_device)
        out, state = model.forward(ids[None], state, logits="none")
        before = out[0, :-1] if hidden is None else torch.cat([hidden[None], out[0, :-1]])
        predicted = ids[len(ids) - len(before) :]
        bits = [math.nan] * (len(ids) - len(before))
        for start in range(0, len(before), HEAD_TOKENS):
            logits = model.head(before[start : start + HEAD_TOKENS])
            nats = F.cross_entropy(logits, predicted[start : start + HEAD_TOKENS], reduction="none")
            bits += (nats.double() / math.log(2)).tolist()
        yield chunk, bits
        hidden = out[0, -1]


def _by_token(scored: Iterable[_Chunk], _window: _Window) -> Iterator[_Ended]:
    for chunk, bits in scored:
        for i, (start, end) in enumerate(zip(chunk.starts.tolist(), chunk.ends.tolist(), strict=True)):
            part = _Part(chunk.start_token + i, start, chunk.start_token + i)
            part.add(end - start, bits[i])
            yield part, end


def _by_chunk(scored: Iterable[_Chunk], _window: _Window) -> Iterator[_Ended]:
    for number, (chunk, bits) in enumerate(scored):
        starts, ends = chunk.starts.tolist(), chunk.ends.tolist()
        part = _Part(number, starts[0], chunk.start_token)
        for start, end, token_bits in zip(starts, ends, bits, strict=True):
            part.add(end - start, token_bits)
        yield part, ends[-1]


def _by_line(scored: Iterable[_Chunk], window: _Window) -> Iterator[_Ended]:
    part: _Part | None = None
    line = seen = end = 0  # the line that `part` is of; newlines were looked for up to byte `seen`
    for chunk, bits in scored:
        for i, (start, end) in enumerate(zip(chunk.starts.tolist(), chunk.ends.tolist(), strict=True)):
            home = window.home(start, end)
            byte_start = start
            line_end = window.line_end(seen, home)
            if part is not None and (line_end is not None or part.gathered == LINE_TOKENS):
                yield part, start if line_end is None else line_end
                part = None
            while line_end is not None:
                line, seen, byte_start = line + 1, line_end, line_end
                line_end = window.line_end(seen, home)
            seen = max(seen, home)
            if part is None:
                part = _Part(line, byte_start, chunk.start_token + i)
            part.add(end - start, bits[i])
    if part is not None:
        yield part, window.line_end(seen, end) or end


_GROUPINGS = {"token": _by_token, "line": _by_line, "chunk": _by_chunk}
