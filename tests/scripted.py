"""A model that says what it is told, and snapshots without a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.text import tokenizer

TEXT = "The keeper lit the lamp. The sea was calm;\n\n  the wind came from the north. “Who is it?” asked é漢字.\r\n" * 3


class Scripted:
    """A model that says what it is told: token i of the script, whatever it has read; its state counts tokens."""

    def __init__(self, script: Iterable[int], words: tokenizer.Tokenizer | None = None) -> None:
        self.tokenizer = words or tokenizer.raw_bytes()
        self.config = SimpleNamespace(vocab_size=self.tokenizer.vocab_size, n_embd=1)
        self.device = self.last_device = torch.device("cpu")
        self.script = torch.tensor([*script, 0])

    def forward(self, tokens: Tensor, state: State, logits: str = "last", lengths: Tensor | None = None) -> Any:
        hidden = state["position"][:, None] + torch.arange(1, tokens.shape[1] + 1)[:, None]
        new = State({"position": hidden[:, -1]})
        return (hidden if logits == "none" else self.head(hidden[:, -1])), new

    def forward_packed(self, tokens: Tensor, lengths: Tensor, state: State, start: Tensor | None = None) -> Any:
        start = torch.arange(len(lengths)) if start is None else start
        within = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
        hidden = state["position"][start].repeat_interleave(lengths, 0) + within[:, None]
        return hidden, State({"position": hidden[lengths.cumsum(0) - 1]})

    def head(self, hidden: Tensor) -> Tensor:
        following = self.script[hidden[..., 0].long().clamp(max=len(self.script) - 1)]
        return torch.nn.functional.one_hot(following, self.config.vocab_size).float()

    surprise, trim = Model.surprise, Model.trim

    def start(self) -> tuple[Tensor, State]:
        return torch.zeros(1), State({"position": torch.zeros(1, 1)})

    def pieces(self, **options: Any) -> Iterator[str]:
        options = {"temperature": 0, "max_tokens": len(self.script) - 1, **options}
        hidden, state = self.start()
        model: Any = self
        return generate(model, state=state, last_hidden=hidden, sampling=Sampling(**options))


@dataclasses.dataclass
class Taken:
    """What tasks use of a snapshot, without a store."""

    model: str
    tensors: State
    hidden: Tensor
    bytes: int
    document: str = "book.txt"
    id: str = "5" * 64
    model_path: str = "models/tiny.safetensors"
    start: str | None = None
    how: str = "ingest"
    keeps_state: bool = True

    def starts(self) -> Iterator[Taken]:
        return iter(())

    def load(self) -> tuple[State, Tensor]:
        return self.tensors.clone(), self.hidden.clone()

    def state(self) -> State:
        return self.load()[0]


def read(model: Any, text: str, start: State | None = None) -> tuple[Tensor, State]:
    """The hidden state [C] of the last token of `text`, and the state, from one call."""
    state = model.start()[1] if start is None else start
    hidden, state = model.forward(torch.tensor([model.tokenizer.encode(text)]), state, logits="none")
    return hidden[0, -1], state


def taken(model: Any, text: str = TEXT) -> Any:
    hidden, state = read(model, text)
    return Taken(model.fingerprint, state, hidden, len(text.encode()))


def plainly(
    model: Any, hidden: Tensor, state: State, n: int, ends: Callable[[str], bool] = lambda _: False
) -> list[int]:
    """Greedy tokens, one call each."""
    tokens: list[int] = []
    logits = model.head(hidden)
    while len(tokens) < n and not ends(model.tokenizer.decode(tokens).decode("utf-8", "replace")):
        token = int(logits.argmax())
        if token in model.tokenizer.end_tokens:
            break
        tokens.append(token)
        out, state = model.forward(torch.tensor([tokens[-1:]]), state, logits="last")
        logits = out[0]
    return tokens
