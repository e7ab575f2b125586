"""How the next token is chosen from its logits; knows nothing of text, models or batches.

The order is that of BlinkDL's `rwkv` package (ChatRWKV: rwkv_pip_package/src/rwkv/utils.py, `sample_logits` and
`generate`), which differs from other libraries: the temperature comes last.

1. logit -= presence_penalty + count · frequency_penalty, for every token made before in this text; the counts are
   multiplied by `penalty_decay` each step before the new token adds 1
2. softmax
3. the smallest set of most likely tokens whose sum is ≥ top_p, tokens as likely as the last of them kept
4. of these the top_k most likely (0 is no limit; of equally likely ones the lower ids)
5. p^(1/temperature), renormalised; temperature 0 takes the most likely token after step 1

That package counts tokens of white space and digits as 0 in step 1; here every token counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rwkv_stream.errors import UsageError

NEAREST = (1e-2, 1e-4, 0.0)  # tokens that are at least so likely, of the most likely; at last all


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is made. Raises UsageError for values that make no sense.

    max_tokens  tokens to make at most, one at least
    stop        texts before which the text ends
    seed        same seed, same text; None takes a new one each time
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.85  # with temperature 1 the defaults of the `rwkv` package, but without its penalties
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        expected = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 <= self.top_p <= 1, "0 to 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a number"),
            "penalty_decay": (0 <= self.penalty_decay <= 1, "0 to 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of texts, none of them empty"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (holds, wanted) in expected.items():
            if not holds:
                raise UsageError(f"sampling: expected {name} to be {wanted}, found {getattr(self, name)!r}")

    @property
    def penalises(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def random_numbers(sampling: Sampling, index: int) -> np.random.Generator:
    """Of one text; each token that is not greedy takes one, of `random()`. Keyed by (seed, index), never by a batch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(sampling.seed, spawn_key=(index,))))


class Sampler:
    """Chooses the tokens of one text, on the host."""

    def __init__(self, sampling: Sampling, index: int, vocab_size: int) -> None:
        self._sampling = sampling
        self._random = random_numbers(sampling, index)
        self._made = np.zeros(vocab_size * sampling.penalises, dtype=bool)
        self._counts = np.zeros(vocab_size * sampling.penalises)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token: logits [V] fp32, left unchanged; -1 where one is NaN, or the largest infinite."""
        s = self._sampling
        given = logits.astype(np.float64)
        if s.penalises:
            given -= s.presence_penalty * self._made + s.frequency_penalty * self._counts
        largest = given.max()  # NaN, if there is one
        if not np.isfinite(largest):
            return -1
        token = int(given.argmax()) if s.temperature == 0 else self._draw(given, largest)
        if s.penalises:
            self._counts *= s.penalty_decay
            self._counts[token] += 1
            self._made[token] = True
        return token

    def _draw(self, logits: npt.NDArray[np.float64], largest: np.float64) -> int:
        """From the most likely token on to where a random number falls; sorting all of them would cost more than a step
        of a small model, so those that are near the most likely come first."""
        s, share = self._sampling, self._random.random()
        p = np.exp(logits - largest)
        total = p.sum()
        for least in NEAREST:
            order = np.flatnonzero(p >= least)
            order = order[np.argsort(-p[order], kind="stable")]
            n = len(p)
            if s.top_p < 1:
                # Where the sum is ≥ for the first time.
                reached = int(np.searchsorted(p[order].cumsum(), s.top_p * total))
                if reached == len(order) < n:
                    continue
                n = int(np.count_nonzero(p >= p[order[min(reached, len(order) - 1)]]))
            n = min(n, s.top_k or n)
            edges = (p[order[:n]] ** (1 / s.temperature)).cumsum()  # of the most likely 1, so that not all underflow
            whole = edges[-1] if n <= len(order) else (p ** (1 / s.temperature)).sum() if n == len(p) else math.inf
            chosen = int(np.searchsorted(edges, share * whole, side="right"))
            if chosen < len(edges) or n <= len(order):
                break
        return int(order[min(chosen, len(edges) - 1)])
