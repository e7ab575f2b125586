"""How the next tokens of many rows are chosen from their logits on a GPU, as `rwkv_stream.model.sampling` describes it.

One program has one row, and reads it in tiles, several times: for the largest logit, for the sum of exponentials, for
the logit where top_p and where top_k cut, and for the sums of tiles that a random number falls into. Nothing is sorted:
a cut is found by bisection on the bits of the logits, taken as integers of the same order. It ends at a logit that is
there, with no tolerance; a pass over the row looks at three cuts, so that 17 passes do for 32 bits.

Sums are made without atomics in an order that depends on the vocabulary alone: a row's token is the same in any batch.
In a bisection each of TILE lanes adds up its V / TILE numbers in fp32, and the lanes are added as a tree: about
V / TILE + log2(TILE) roundings, at most 2e-6 of the sum for 65,536 tokens. What is not in a sum is in it as 0, and
rounding keeps order, so that a sum of more tokens is never less, and the bisection cannot be misled. The sums that a
random number is laid against are fp64: fp32 would make tokens of 1e-5 more or less likely by a hundredth.

Logits and penalties are fp32 here, on the host fp64: only tokens whose chances differ by about 1e-6 of themselves can
change places, and with them those that top_p keeps.
Under TRITON_INTERPRET=1 (set before the import) the kernels run on the CPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits that a program holds: 16 for each of 256 threads
WARPS = 8
PENALTY_TILE = 1024
LOWEST = tl.constexpr(-2139095041)  # `_ordered` of minus infinity
SCALES = 2.0**-126, 2.0**127  # of 1 / temperature: neither infinite nor rounded to 0

# ---- kernels ----


@triton.jit
def penalise(
    logits, logits_stride,  # in, fp32 rows [V], so far apart
    counts,  # in and out, fp32 [B, V]: of each token made before, -1 for one that was not
    presence, frequency, decay,
    out,  # out, fp32 [B, V]
    V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The logits with their penalties; the counts as they are before the new token adds 1."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    count = tl.load(counts + row * V + at, at < V, -1.0)
    x = tl.load(logits + row * logits_stride + at, at < V, 0.0)
    is_made = count >= 0
    tl.store(out + row * V + at, tl.where(is_made, x - (presence + frequency * count), x), at < V)
    tl.store(counts + row * V + at, tl.where(is_made, count * decay, count), at < V)


@triton.jit
def _logits(row, i, V: tl.constexpr, TILE: tl.constexpr):
    """Tile i of a row: ids, logits; beyond V minus infinity, which is never drawn. -0 is 0: they are equally likely."""
    at = i * TILE + tl.arange(0, TILE)
    x = tl.load(row + at, at < V, -float("inf"))
    return at, tl.where(x == 0, 0.0, x)


@triton.jit
def _ordered(x):
    """The bits of fp32 numbers as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _reached(row, V: tl.constexpr, largest, a, b, c, COUNTED: tl.constexpr, TILE: tl.constexpr):
    """The sums of exp(x - largest), or COUNTED how many there are, for x from each of three cuts on."""
    of_a, of_b, of_c = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for i in range(tl.cdiv(V, TILE)):
        _, x = _logits(row, i, V, TILE)
        key = _ordered(x)
        p = tl.full((TILE,), 1.0, tl.float32) if COUNTED else tl.exp(x - largest)  # counts are exact to 16,777,216
        of_a += tl.where(key >= a, p, 0.0)
        of_b += tl.where(key >= b, p, 0.0)
        of_c += tl.where(key >= c, p, 0.0)
    return tl.sum(of_a, 0), tl.sum(of_b, 0), tl.sum(of_c, 0)


@triton.jit
def _cut(row, V: tl.constexpr, largest, low, wanted, COUNTED: tl.constexpr, TILE: tl.constexpr):
    """The last cut from `low` on from which `wanted` is reached; `low` where it is not reached from there either."""
    low, end = low.to(tl.int64), _ordered(largest).to(tl.int64) + 1
    while end - low > 1:
        step = tl.maximum((end - low) // 4, 1)
        a, b, c = low + step, tl.minimum(low + 2 * step, end - 1), tl.minimum(low + 3 * step, end - 1)
        of_a, of_b, of_c = _reached(row, V, largest, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), COUNTED, TILE)
        if of_c >= wanted:
            low = c
        elif of_b >= wanted:
            low, end = b, c
        elif of_a >= wanted:
            low, end = a, b
        else:
            end = a
    return low.to(tl.int32)


@triton.jit
def _limits(
    row, V: tl.constexpr, largest, top_p, top_k, TOP_P: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """From which cut on tokens are kept, and of those that lie at it how many."""
    cut, allowed = tl.full((), LOWEST, tl.int32), tl.full((), V, tl.int32)
    if TOP_P:
        total, _, _ = _reached(row, V, largest, cut, cut, cut, False, TILE)
        cut = _cut(row, V, largest, cut, top_p * total, False, TILE)
    if TOP_K:  # of what top_p keeps
        cut = _cut(row, V, largest, cut, top_k.to(tl.float32), True, TILE)
        above, _, _ = _reached(row, V, largest, cut + 1, cut + 1, cut + 1, True, TILE)
        allowed = top_k - above.to(tl.int32)
    return cut, allowed


@triton.jit
def _weights(
    row, i, V: tl.constexpr, largest, scale, cut, allowed, before, TOP_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Tile i: ids, p^(1/temperature) of what is kept as fp64, and with TOP_K how many lie at the cut up to its end."""
    at, x = _logits(row, i, V, TILE)
    key = _ordered(x)
    is_kept = key >= cut
    if TOP_K:
        is_last = (key == cut).to(tl.int32)
        is_kept = (key > cut) | ((is_last == 1) & (before + tl.cumsum(is_last, 0) <= allowed))
        before += tl.sum(is_last, 0)
    return at, tl.where(is_kept, tl.exp((x - largest) * scale), 0.0).to(tl.float64), before


@triton.jit
def _drawn(
    row, V: tl.constexpr, largest, share, scale, cut, allowed,
    TOP_K: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The id of the first token at which the sum of weights in the order of ids is more than that share of all."""
    tile = tl.arange(0, P)
    sums, lasts = tl.zeros((P,), tl.float64), tl.zeros((P,), tl.int32)
    before = tl.zeros((), tl.int32)
    for i in range(tl.cdiv(V, TILE)):
        lasts = tl.where(tile == i, before, lasts)
        _, weights, before = _weights(row, i, V, largest, scale, cut, allowed, before, TOP_K, TILE)
        sums = tl.where(tile == i, tl.sum(weights, 0), sums)
    wanted = share * tl.sum(sums, 0)
    # Where rounding leaves nothing beyond `wanted`, the last that has a weight.
    i = tl.min(tl.where((tl.cumsum(sums, 0) > wanted) & (sums > 0), tile, P), 0)
    i = tl.where(i < P, i, tl.max(tl.where(sums > 0, tile, 0), 0))
    start = tl.sum(tl.where(tile < i, sums, 0.0), 0)
    before = tl.sum(tl.where(tile == i, lasts, 0), 0)
    at, weights, _ = _weights(row, i, V, largest, scale, cut, allowed, before, TOP_K, TILE)
    chosen = tl.min(tl.where((start + tl.cumsum(weights, 0) > wanted) & (weights > 0), at, V), 0)
    return tl.where(chosen < V, chosen, tl.max(tl.where(weights > 0, at, 0), 0))


@triton.jit(do_not_specialize=["top_k"])
def choose(
    logits, logits_stride,  # in, fp32 rows [V], so far apart, with their penalties
    shares,  # in, fp64 [B]: random numbers from 0 to below 1; not used if GREEDY
    scale, top_p, top_k,  # 1 / temperature
    counts,  # out, fp32 [B, V]: of `penalise`
    tokens,  # out, int64 [B]; -1 where the largest logit is not finite, or one is NaN
    GREEDY: tl.constexpr, TOP_P: tl.constexpr, TOP_K: tl.constexpr, COUNTS: tl.constexpr,
    V: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The token of one row; P is a power of two, at least the number of tiles."""
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * logits_stride
    lanes = tl.full((TILE,), -float("inf"), tl.float32)
    for i in range(tl.cdiv(V, TILE)):
        _, x = _logits(row, i, V, TILE)
        lanes = tl.maximum(lanes, tl.where(x == x, x, float("inf")))
    largest = tl.max(lanes, 0)
    token = tl.full((), -1, tl.int32)
    if tl.abs(largest) < float("inf"):
        if GREEDY:
            firsts = tl.full((TILE,), V, tl.int32)
            for i in range(tl.cdiv(V, TILE)):
                at, x = _logits(row, i, V, TILE)
                firsts = tl.minimum(firsts, tl.where(x == largest, at, V))
            token = tl.min(firsts, 0)
        else:
            cut, allowed = _limits(row, V, largest, top_p, top_k, TOP_P, TOP_K, TILE)
            token = _drawn(row, V, largest, tl.load(shares + b), scale, cut, allowed, TOP_K, TILE, P)
        if COUNTS:
            count = tl.load(counts + b * V + token)
            tl.store(counts + b * V + token, tl.maximum(count, 0.0) + 1)
    tl.store(tokens + b, token.to(tl.int64))


# ---- calls ----


class Sampler:
    """Chooses the tokens of `rows` texts, all with the same settings; counts of tokens are kept only for penalties.

    temperature, top_p, top_k, presence_penalty, frequency_penalty, penalty_decay  of `model.sampling.Sampling`
    """

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        device: torch.device,
        *,
        temperature: float,
        top_p: float,
        top_k: int,
        presence_penalty: float,
        frequency_penalty: float,
        penalty_decay: float,
    ) -> None:
        self._vocab_size = vocab_size
        self._is_greedy = temperature == 0
        least, most = SCALES
        self._scale = most if temperature < 1 / most else max(least, 1 / temperature)
        self._top_p = float(top_p)
        self._top_k = min(top_k, vocab_size)
        self._penalties = float(presence_penalty), float(frequency_penalty), float(penalty_decay)
        self._counts: Tensor | None = None
        if presence_penalty != 0 or frequency_penalty != 0:
            self._counts = torch.full((rows, vocab_size), -1.0, device=device)

    def __call__(self, logits: Tensor, shares: Tensor | None = None) -> Tensor:
        """The next tokens int64 [B], -1 for a row of logits that has a NaN, or whose largest is not finite.

        logits  fp32 [B, V], left unchanged; rows are contiguous, and may be apart
        shares  fp64 [B], a random number from 0 to below 1 for each row; None only for temperature 0. It is laid
                against the sums of chances in the order of ids, on the host in that of likelihood: other tokens for the
                same numbers, with the same chances.
        """
        (B, V), counts = logits.shape, self._counts
        assert (logits.dtype, V, logits.stride(1)) == (torch.float32, self._vocab_size, 1)
        assert self._is_greedy or (shares is not None and (shares.dtype, shares.shape) == (torch.float64, (B,)))
        if counts is not None:
            assert len(counts) == B
            penalised = torch.empty_like(counts)
            penalise[B, triton.cdiv(V, PENALTY_TILE)](
                logits, logits.stride(0), counts, *self._penalties, penalised, V=V, TILE=PENALTY_TILE
            )
            logits = penalised
        tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
        choose[(B,)](
            logits, logits.stride(0), shares, self._scale, self._top_p, self._top_k, counts, tokens,
            GREEDY=self._is_greedy, TOP_P=self._top_p < 1, TOP_K=self._top_k > 0, COUNTS=counts is not None,
            V=V, TILE=TILE, P=triton.next_power_of_2(triton.cdiv(V, TILE)), num_warps=WARPS,
        )  # fmt: skip
        return tokens

    def add(self, rows: int) -> None:
        """So many more rows, after those that are there."""
        if self._counts is not None:
            self._counts = torch.cat([self._counts, self._counts.new_full((rows, self._vocab_size), -1.0)])

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows at these places go on, in this order."""
        if self._counts is not None:
            self._counts = self._counts[torch.tensor(places, dtype=torch.int64, device=self._counts.device)]
