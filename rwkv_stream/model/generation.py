"""Text out of a model: prompts read into forks of a state, tokens chosen, pieces of text that hold whole characters.

A state is forked, never changed: models return new states. Memory does not grow with what is given: prompts are read in
pieces of PREFILL_TOKENS.

One row's text depends on its own logits and its own random numbers. A matrix product may still change in the last
bit with its number of rows, so that under a batch of another size a choice between two tokens can, very rarely, go
the other way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.sampling import Sampler, Sampling, not_finite, random_numbers
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import TextDecoder

if TYPE_CHECKING:
    import numpy as np

    from rwkv_stream.kernels.sampling import triton as sampling_triton
    from rwkv_stream.model import Model

PREFILL_TOKENS = 2048  # of all rows together, per model call


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
            from rwkv_stream.kernels.sampling import triton as sampling_triton

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


def decode(model: Model, hidden: Tensor, state: State, rows: Sequence[Row]) -> Iterator[tuple[int, str]]:
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


def prefill(model: Model, rows: Sequence[Sequence[int]], state: State) -> tuple[Tensor, State]:
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
    hidden, forks = prefill(model, [model.tokenizer.encode_prompt(prompt) for prompt in prompts], state)
    for i, piece in decode(model, hidden, forks, rows):
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
        hidden, state = prefill(model, [tokens], state)
    else:
        assert last_hidden is not None
        hidden = last_hidden.to(model.device)[None]
    for _, piece in decode(model, hidden, state, [Row(model, sampling, sampling.stop, index)]):
        yield piece
