"""What a model gives on texts that it was not trained on: the loss of what is learnt in them, and preferences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F

from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import Encoded
from rwkv_stream.training.lanes import laid_out
from rwkv_stream.training.loss import Network
from rwkv_stream.training.preferences import Preferences

ROWS = 8  # documents that are read side by side
WINDOW = 1024  # tokens of each in one call


@dataclass(frozen=True, slots=True)
class Held:
    """What was found on held texts.

    documents      that were measured on; of preferences, pairs
    loss           nats a learnt token; of preferences, a pair
    bits_per_byte  of the learnt tokens' text
    accuracy       of preferences: the share of pairs whose preferred answer gained more; ties count half
    """

    documents: int
    loss: float
    bits_per_byte: float | None = None
    accuracy: float | None = None


@torch.no_grad()
def held_texts(network: Network, documents: Iterable[Encoded], tokenizer: Tokenizer) -> Held:
    """Measure on documents that are read whole, the state carried from window to window."""
    documents = iter(documents)
    nats, n_tokens, n_bytes, count = 0.0, 0, 0, 0
    while rows := list(islice(documents, ROWS)):
        count += len(rows)
        for row in rows:
            learnt = row.tokens[1:][row.is_learnt[1:]]
            n_tokens, n_bytes = n_tokens + len(learnt), n_bytes + len(tokenizer.decode(learnt.tolist()))
        state, at = network.start(len(rows)), 0
        while rows:
            parts = [row.part(at, at + WINDOW + 1) for row in rows]
            at += WINDOW
            is_going_on = [len(row.tokens) > at + 1 for row in rows]
            batch = laid_out(parts)
            start, keep = torch.arange(len(rows)), torch.tensor(is_going_on).nonzero()[:, 0]
            of_tokens, state = network.nats(batch._replace(start=start, keep=keep).to(network.device), state)
            nats += of_tokens.sum().item()
            rows = [row for row, goes_on in zip(rows, is_going_on, strict=True) if goes_on]
    return Held(count, nats / max(1, n_tokens), nats / math.log(2) / max(1, n_bytes))


@torch.no_grad()
def held_pairs(preferences: Preferences, pairs: Iterable[list[Encoded]]) -> Held:
    """Measure on pairs of a preferred and another answer."""
    margins = torch.cat([preferences.margins(laid_out(pair)).cpu() for pair in pairs])
    right = (margins > 0).float() + 0.5 * (margins == 0).float()
    return Held(len(margins), -F.logsigmoid(margins).mean().item(), accuracy=right.mean().item())
