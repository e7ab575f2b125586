"""How much of what a model writes stands word for word in what it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.model import Model
from rwkv_stream.model.generation import Batch
from rwkv_stream.model.sampling import Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words64 = NDArray[np.uint64]

WINDOW = 50  # tokens that are looked for as one
PROMPT = 32  # tokens
BASE = 0x9E3779B97F4A7C15  # of the hashes; odd, so that it has an inverse among numbers of 64 bits


def prompts(texts: Sequence[Sequence[int]], n: int, seed: int) -> list[list[int]]:
    """Prompts of PROMPT tokens from random places of tokenised texts, longer ones more often."""
    random, weights = Random(f"prompts {seed}"), [max(0, len(text) - PROMPT) for text in texts]
    drawn = random.choices(texts, weights, k=n)
    begins = [random.randrange(len(text) - PROMPT) for text in drawn]
    return [list(text[begin : begin + PROMPT]) for text, begin in zip(drawn, begins, strict=True)]


def continued(model: Model, given: Iterable[Sequence[int]], tokens: int) -> list[list[int]]:
    """What a model writes greedily after each prompt, tokenised again; so many tokens, fewer where a text ends."""
    batch, (_, start) = Batch(model), model.start()
    rows = [batch.add(prompt, start, Sampling(temperature=0, max_tokens=tokens)) for prompt in given]
    for _ in batch.run():
        pass
    return [model.tokenizer.encode(row.text) for row in rows]


def share(written: Iterable[Sequence[int]], corpus: Iterable[Sequence[int]], window: int = WINDOW) -> float:
    """The share of all windows of the written texts that stand in the corpus, whose texts are read one by one.

    Windows are compared by hashes of 64 bits. 0 where there is no window.
    """
    sought = np.concatenate([np.empty(0, np.uint64), *(_hashes(text, window) for text in written)])
    different, found = np.unique(sought), np.zeros(0, np.uint64)
    for text in corpus:
        found = np.union1d(found, np.intersect1d(_hashes(text, window), different))
    return float(np.isin(sought, found).mean()) if len(sought) else 0.0


def _hashes(tokens: Sequence[int], window: int) -> Words64:
    """The hash of every window [n - window + 1]: sum (token + 1) BASE^place, mod 2^64 (Rabin and Karp 1987)."""
    n = len(tokens)
    if n < window:
        return np.empty(0, np.uint64)
    powers = np.cumprod(np.full(n, BASE, np.uint64))
    sums = np.cumsum((np.asarray(tokens, np.uint64) + np.uint64(1)) * powers)
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    inverse = np.cumprod(np.full(n - window + 1, pow(BASE, -1, 1 << 64), np.uint64))
    hashes: Words64 = (sums[window:] - sums[:-window]) * inverse
    return hashes
