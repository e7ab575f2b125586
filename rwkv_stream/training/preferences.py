"""Preferences: of two answers to a prompt one is made likelier than the other (DPO, Rafailov et al. 2023, eq. 7).

What counts is the log-ratio to the model before training, so that the answers' length and commonness do not.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import Encoded, TokenFile
from rwkv_stream.training.lanes import Batch, Cursor, framed, laid_out
from rwkv_stream.training.loss import Network

NAME = "preferences"  # of their place in the cursor


class Pairs:
    """Pairs of documents in a file, all of them once in each epoch, shuffled; each is read whole from the start."""

    def __init__(self, file: TokenFile, lanes: int, tokenizer: Tokenizer, seed: int, cursor: Cursor) -> None:
        self._file, self._lanes, self._seed, self.cursor = file, lanes, seed, cursor
        self._start, ends = tokenizer.start_token, tokenizer.end_tokens
        self._end = ends[0] if ends else None

    def __len__(self) -> int:
        return len(self._file.lengths) // 2

    def pair(self, i: int) -> list[Encoded]:
        """The preferred answer behind its prompt, then the other."""
        lengths = self._file.lengths
        whole = (self._file.read(place, 0, int(lengths[place])) for place in (2 * i, 2 * i + 1))
        return [framed(document, self._start, self._end) for document in whole]

    def window(self, tokens: int) -> Batch:
        """As many pairs as fill the lanes with `tokens` each, one at least: segments preferred, other, preferred, …"""
        found, room = list[Encoded](), tokens * self._lanes
        while room > 0:
            number = self.cursor.drawn.get(NAME, 0)
            self.cursor.drawn[NAME] = number + 1
            epoch, place = divmod(number, len(self))
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self))
            pair = self.pair(int(order[place]))
            found += pair
            room -= sum(len(document.tokens) - 1 for document in pair)
        return laid_out(found)


class Preferences:
    """How much more the answers that are preferred gained over a reference than the others."""

    def __init__(self, network: Network, reference: Network, beta: float) -> None:
        self._network, self._reference, self._beta = network, reference, beta

    def margins(self, batch: Batch) -> Tensor:
        """`beta` times what the log-ratio of each pair's preferred answer has over the other's, fp32 [pairs]."""
        with torch.no_grad():
            before = _log_likelihoods(self._reference, batch)
        gain = _log_likelihoods(self._network, batch) - before
        return self._beta * (gain[0::2] - gain[1::2])

    def loss(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Nats a pair, and the state of the lanes, which pairs do not have."""
        return -F.logsigmoid(self.margins(batch)).mean(), state


def _log_likelihoods(network: Network, batch: Batch) -> Tensor:
    """Of each segment's learnt tokens, fp32 [S]."""
    nats, _ = network.nats(batch, network.start(0))
    segment = torch.repeat_interleave(batch.lengths)
    return -nats.new_zeros(len(batch.lengths)).index_add(0, segment, nats)
