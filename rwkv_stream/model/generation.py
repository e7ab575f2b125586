"""Text out of a model: prompts read into forks of a state, tokens chosen, pieces of text that hold whole characters.

A *row* is one text that is being made; a *lane* is its place in the tensors of a `Batch`, which changes when others
leave. A row waits until its prompt is read, then it decodes, a token each step, until it ends or is dropped.

>>> batch = Batch(model)
>>> row = batch.add(prompt_tokens, state, Sampling(temperature=0))
>>> while batch:
...     for row, piece in batch.step(): print(piece, end="")

A state is forked, never changed: models return new states. Memory does not grow with what is given: prompts are read in
pieces of PREFILL_TOKENS, and of all that wait one at most has a state of its own.

One row's text depends on its own logits and its own random numbers. With the native kernels its logits have the same
bits whatever its neighbours; elsewhere a matrix product may change in the last bit with its number of rows, so that
under a batch of another size a choice between two tokens can, very rarely, go the other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.config import Config
from rwkv_stream.model.finite import Named, not_finite
from rwkv_stream.model.sampling import Sampler, Sampling, random_numbers
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import TextDecoder, Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from rwkv_stream.kernels.sampling import triton as sampling_triton

PREFILL_TOKENS = 2048  # of all prompts together, per step


class LanguageModel(Named, Protocol):
    """What generation needs of a `Model`."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def config(self) -> Config: ...
    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def last_device(self) -> torch.device: ...
    def forward(
        self, tokens: Tensor, state: State | None = None, logits: Literal["all", "last", "none"] = "last"
    ) -> tuple[Tensor, State]: ...
    def forward_packed(
        self, tokens: Tensor, lengths: Tensor, state: State, start: Tensor | None = None
    ) -> tuple[Tensor, State]: ...
    def head(self, hidden: Tensor) -> Tensor: ...
    def start(self) -> tuple[Tensor | None, State]: ...


# ---- text out of tokens ----


class _Output:
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


def stripped(pieces: Iterable[str]) -> Iterator[str]:
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


# ---- tokens out of a model ----


class Row:
    """One text that is being made; `Batch.add` makes it.

    text    what can be shown of it: whole characters, and nothing that may be the beginning of a stop text
    read    tokens of its prompt
    tokens  how many have been made
    ended   whether it is complete
    """

    def __init__(self, model: LanguageModel, sampling: Sampling, index: int, read: int) -> None:
        self.text = ""
        self.read, self.tokens = read, 0
        self.ended = False
        self.sampling, self.index = sampling, index
        self._end_tokens = model.tokenizer.end_tokens
        self._decoder = TextDecoder(model.tokenizer)
        self._output = _Output(sampling.stop)

    def push(self, token: int) -> str:
        """Go on by a token; what can be shown after it."""
        is_end = token in self._end_tokens
        if not is_end:
            self.tokens += 1
        shown = "" if is_end else self._output.push(self._decoder.feed(token))
        self.ended = is_end or self._output.stopped or self.tokens == self.sampling.max_tokens
        if self.ended and not self._output.stopped:
            shown += self._output.push(self._decoder.flush(), final=True)
        self.text += shown
        return shown


class _Chooser:
    """Chooses the tokens of rows with the same settings: where the logits lie, if there is a way, else on the host.

    Of 512 rows with 65,536 tokens the logits are 134 MB a step; the tokens and random numbers are 8 kB.
    """

    def __init__(self, model: LanguageModel, settings: Sampling) -> None:
        s, self._vocab_size = settings, model.config.vocab_size
        self.rows: list[Row] = []
        self._is_greedy = s.temperature == 0
        self._is_largest = self._is_greedy and not s.penalises
        self._on_device: sampling_triton.Sampler | None = None
        self._random: dict[Row, np.random.Generator] = {}
        self._on_host: dict[Row, Sampler] = {}
        if not self._is_largest and model.backend == "triton":
            from rwkv_stream.kernels.sampling import triton as sampling_triton

            self._on_device = sampling_triton.Sampler(
                0, self._vocab_size, model.last_device, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
                penalty_decay=s.penalty_decay,
            )  # fmt: skip

    @staticmethod
    def settings(sampling: Sampling) -> Sampling:
        """What decides how a token is chosen: rows for which it is equal may share a chooser."""
        if sampling.temperature == 0 and not sampling.penalises:
            return Sampling(temperature=0)
        return replace(sampling, max_tokens=1, stop=(), seed=None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self._on_device is not None:
            self._on_device.add(1)
            self._random[row] = random_numbers(row.sampling, row.index)
        elif not self._is_largest:
            self._on_host[row] = Sampler(row.sampling, row.index, self._vocab_size)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, int64 [B], -1 where nothing can be chosen: logits fp32 [B, V]."""
        if self._is_largest:
            largest, place = logits.max(-1)  # NaN, if there is one; of equals the first
            return torch.where(largest.isfinite(), place, -1)
        if self._on_device is not None:
            tokens: Tensor = self._on_device(logits, None if self._is_greedy else self._shares(logits.device))
            return tokens
        on_host = zip(self.rows, logits.cpu().numpy(), strict=True)
        return torch.tensor([self._on_host[row](values) for row, values in on_host])

    def _shares(self, device: torch.device) -> Tensor:
        """A random number fp64 for each row."""
        from rwkv_stream.kernels.memory import sent

        shares = torch.tensor([self._random[row].random() for row in self.rows], dtype=torch.float64)
        there: Tensor = sent(shares, device)
        return there

    def remove(self, leaving: set[Row]) -> None:
        """These rows leave, where they are here; the others stay in their order."""
        staying = [place for place, row in enumerate(self.rows) if row not in leaving]
        if len(staying) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in staying]
        if self._on_device is not None:
            self._on_device.keep(staying)
        for row in leaving:
            self._random.pop(row, None)
            self._on_host.pop(row, None)


@dataclass(slots=True)
class _Waiting:
    """A row without a lane: what is left of its prompt, the state before that, the hidden state if nothing is left."""

    row: Row
    tokens: Sequence[int]
    state: State
    last_hidden: Tensor | None


class Batch:
    """Texts that are made together; rows join and leave at any time. Not for two threads.

    Each step reads at most PREFILL_TOKENS of prompts, in the order in which they were added, and makes one token of
    each row whose prompt is read. Every row has its own `Sampling`. After an error nothing more can be made with it.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._waiting: list[_Waiting] = []
        self._lanes: list[Row] = []
        self._tokens: list[int] = []  # of each lane the last made, not read yet
        self._hidden: Tensor | None = None  # [lanes, C], of each lane's last read token
        self._state: State | None = None
        self._choosers: dict[Sampling, _Chooser] = {}

    def __len__(self) -> int:
        """How many rows have not ended."""
        return len(self._waiting) + len(self._lanes)

    def add(
        self,
        tokens: Sequence[int],
        state: State,
        sampling: Sampling,
        *,
        last_hidden: Tensor | None = None,
        index: int = 0,
    ) -> Row:
        """A new row, that reads these tokens into a fork of `state` and goes on from there.

        tokens       the prompt; none where the text goes on from the state itself
        state        batch 1, left unchanged; rows that are given the same object share it until their prompts are read
        last_hidden  [C], of the last token that `state` has read; needed only without a prompt
        index        which of several texts with one seed this is
        raises       UsageError where there is nothing to continue, or for a token outside the vocabulary
        """
        if state.batch != 1:
            raise UsageError(f"generating: expected a state of one row, found {state.batch}; pass one row of it")
        size = self._model.config.vocab_size
        if outside := [token for token in tokens if not 0 <= token < size]:
            raise UsageError(f"generating: expected tokens from 0 to {size - 1}, found {outside[0]}")
        if not tokens and last_hidden is None:
            raise UsageError("generating: expected a prompt, or a state with its last hidden state; found neither")
        row = Row(self._model, sampling, index, len(tokens))
        self._waiting.append(_Waiting(row, tokens, state, last_hidden))
        return row

    def drop(self, row: Row) -> None:
        """Make no more of a row's text; nothing where it has ended already."""
        self._waiting = [waiting for waiting in self._waiting if waiting.row is not row]
        if row in self._lanes:
            self._leave({row})

    def step(self) -> list[tuple[Row, str]]:
        """Read a piece of the prompts and make a token of each text: the rows that have something new to show, with it.

        Raises BackendError where logits are not finite.
        """
        self._read_made()
        self._read_prompts()
        if not self._lanes:
            return []
        shown = []
        self._tokens = self._choose()
        for row, token in zip(self._lanes, self._tokens, strict=True):
            piece = row.push(token)
            if piece:
                shown.append((row, piece))
        self._leave({row for row in self._lanes if row.ended})
        return shown

    def run(self) -> Iterator[tuple[Row, str]]:
        """Step until no row is left."""
        while self:
            yield from self.step()

    def _read_made(self) -> None:
        """Read the token that each lane has made last."""
        if self._lanes:
            tokens = torch.tensor(self._tokens)[:, None]
            hidden, self._state = self._model.forward(tokens, self._state, logits="none")
            self._hidden = hidden[:, -1]

    def _read_prompts(self) -> None:
        """Read the next PREFILL_TOKENS of the prompts in one call; rows whose prompts end there get lanes."""
        for waiting in self._waiting:
            if waiting.last_hidden is not None and not waiting.tokens:
                hidden = waiting.last_hidden[None].to(self._model.last_device)
                self._fill_lanes([waiting.row], hidden, waiting.state.to(self._model.device))
        self._waiting = [waiting for waiting in self._waiting if waiting.tokens]
        pieces: list[Sequence[int]] = []
        states: dict[int, State] = {}  # each once, however many rows go on from it
        left = PREFILL_TOKENS
        for waiting in self._waiting:
            if left == 0:
                break
            pieces.append(waiting.tokens[:left])
            left -= len(pieces[-1])
            states[id(waiting.state)] = waiting.state
        if not pieces:
            return
        places = {identity: place for place, identity in enumerate(states)}
        reading, lengths = self._waiting[: len(pieces)], torch.tensor([len(piece) for piece in pieces])
        hidden, state = self._model.forward_packed(
            torch.tensor([token for piece in pieces for token in piece]),
            lengths,
            joined([state.to(self._model.device) for state in states.values()]),
            start=torch.tensor([places[id(waiting.state)] for waiting in reading]),
        )
        n, last = len(pieces), reading[-1]
        last.tokens = last.tokens[len(pieces[-1]) :]
        if last.tokens:  # the only one of which something can be left
            n, last.state = n - 1, state.row(n - 1)
        self._waiting = self._waiting[n:]
        if n:
            ends = (lengths[:n].cumsum(0) - 1).to(hidden.device)
            state = state if n == len(pieces) else _rows(state, slice(n))
            self._fill_lanes([waiting.row for waiting in reading[:n]], hidden[ends], state)

    def _fill_lanes(self, rows: Sequence[Row], hidden: Tensor, state: State) -> None:
        """New lanes after those that are there: hidden [n, C] and state of batch n, where the rows stand."""
        if self._hidden is None or self._state is None:
            self._hidden, self._state = hidden, state
        else:
            self._hidden, self._state = torch.cat([self._hidden, hidden]), joined([self._state, state])
        self._lanes += rows
        for row in rows:
            settings = _Chooser.settings(row.sampling)
            if settings not in self._choosers:
                self._choosers[settings] = _Chooser(self._model, settings)
            self._choosers[settings].add(row)

    def _choose(self) -> list[int]:
        """The next token of each lane."""
        assert self._hidden is not None
        logits = self._model.head(self._hidden)
        lanes = {row: lane for lane, row in enumerate(self._lanes)}
        chosen = []  # on a GPU nothing is waited for until all are asked for
        for chooser in self._choosers.values():
            mine = [lanes[row] for row in chooser.rows]
            chosen.append((chooser.rows, chooser(logits if len(mine) == len(lanes) else logits[mine])))
        tokens = {row: token for rows, made in chosen for row, token in zip(rows, made.tolist(), strict=True)}
        if min(tokens.values()) < 0:
            raise not_finite(self._model, "choosing a token", self._state)
        return [tokens[row] for row in self._lanes]

    def _leave(self, leaving: set[Row]) -> None:
        """These rows leave their lanes; the others close up."""
        if not leaving:
            return
        for settings, chooser in list(self._choosers.items()):
            chooser.remove(leaving)
            if not chooser.rows:
                del self._choosers[settings]
        staying = [lane for lane, row in enumerate(self._lanes) if row not in leaving]
        self._lanes = [self._lanes[lane] for lane in staying]
        self._tokens = [self._tokens[lane] for lane in staying]
        if not staying:
            self._hidden = self._state = None
            return
        assert self._hidden is not None and self._state is not None
        index = torch.tensor(staying)
        self._hidden = self._hidden[index.to(self._hidden.device)]
        self._state = _rows(self._state, index.to(self._model.device))


def _rows(state: State, index: Any) -> State:
    """Some rows of a state: a slice, which is a view, or an index, which is a copy."""
    return State({name: tensor[index] for name, tensor in state.items()})


def joined(states: Sequence[State]) -> State:
    """The rows of states, one after the other; of one state itself."""
    if len(states) == 1:
        return states[0]
    return State({name: torch.cat([state[name] for state in states]) for name in states[0]})


def read(model: LanguageModel, tokens: Sequence[int], state: State) -> tuple[Tensor, State]:
    """Read tokens (one at least) into a fork of a state of batch 1: hidden [C] of the last, the state after it."""
    for begin in range(0, len(tokens), PREFILL_TOKENS):
        piece = torch.tensor(tokens[begin : begin + PREFILL_TOKENS])
        hidden, state = model.forward_packed(piece, torch.tensor([len(piece)]), state)
    return hidden[-1], state


def complete(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[int]],
    states: Sequence[State],
    sampling: Sampling,
    indices: Sequence[int],
) -> list[Row]:
    """The rows of one batch, ended: for each a prompt, as text or tokens, the state of batch 1 that it goes on from,
    and its index."""
    batch = Batch(model)
    rows = [
        batch.add(
            model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt, state, sampling, index=index
        )
        for prompt, state, index in zip(prompts, states, indices, strict=True)
    ]
    for _ in batch.run():
        pass
    return rows


def generate(
    model: LanguageModel,
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
    raises       UsageError where there is nothing to continue, or for a token outside the vocabulary
    """
    if state is None:
        last_hidden, state = model.start()
    tokens = model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt or ())
    batch = Batch(model)
    batch.add(tokens, state, sampling or Sampling(), last_hidden=last_hidden, index=index)
    return (piece for _, piece in batch.run())
