"""What RWKV-7 computes between its matrix products, as Triton kernels: the equations of `reference` on a GPU.

One kernel each before and after the recurrence of `recurrence.triton`; where every segment is one token, one kernel
for all three. Everything is computed in fp32 from inputs of any dtype and rounded once, when it is stored. There are no
atomics and no sum is split between programs. What one of these kernels gives for a token does not depend on the other
tokens of the call, nor on where in it the token stands; for the recurrence the blocks of the token's own segment count.
Under TRITON_INTERPRET=1 (set before the import) the kernels run on the CPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rwkv_stream.kernels.layers import LAYER_NORM_EPS
from rwkv_stream.kernels.memory import sent
from rwkv_stream.kernels.recurrence.triton import Blocks, block_tokens, blocks_of, wkv7

TILE = 1024  # elements of [tokens, head size] that a program holds of each tensor: 8 for each of 128 threads
STATE_TILE = 4096  # elements of a state that a program of `time_mix_step` holds: 32 for each of 128 threads
RELU2_BLOCK = 2048
NORM_EPS = tl.constexpr(LAYER_NORM_EPS)

# ---- kernels ----


@triton.jit
def _normed(x, weight, bias, inside, C):
    """LayerNorm of one row x, of which C elements are inside."""
    d = tl.where(inside, x - tl.sum(x, 0) / C, 0.0)
    return d * tl.rsqrt(tl.sum(d * d, 0) / C + NORM_EPS) * weight + bias


@triton.jit(do_not_specialize=["n"])
def norm_shift_mix_rows(
    x, weight, bias, mix,  # in, fp32: [n, C], [C], [C], [M, C]
    x_prev, x_prev_stride,  # in, fp32 rows [C], so far apart
    before, after,  # in, int32 [n + E], from `plan`
    out,  # out, [M, n, C]
    last, last_stride,  # out, fp32 rows [C]
    n, C, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One token, of P >= C elements, a power of two; or what a segment without tokens hands on."""
    i, c = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    inside = c < C
    source, target = tl.load(before + i).to(tl.int64), tl.load(after + i).to(tl.int64)
    if i < n:
        wt, bt = tl.load(weight + c, inside, 0.0), tl.load(bias + c, inside, 0.0)
        h = _normed(tl.load(x + i * C + c, inside, 0.0), wt, bt, inside, C)
        if source < 0:
            previous = _normed(tl.load(x + (i - 1) * C + c, inside, 0.0), wt, bt, inside, C)
        else:
            previous = tl.load(x_prev + source * x_prev_stride + c, inside, 0.0)
        d = previous - h
        for m in tl.static_range(M):
            mixed = h + d * tl.load(mix + m * C + c, inside, 0.0)
            tl.store(out + (i + m * n) * C + c, mixed.to(out.dtype.element_ty), inside)
    else:
        h = tl.load(x_prev + source * x_prev_stride + c, inside, 0.0)
    if target >= 0:
        tl.store(last + target * last_stride + c, h, inside)


@triton.jit
def relu2_elements(z, count, BLOCK: tl.constexpr):
    """z = relu(z)², [count], in place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(tl.load(z + at, at < count, 0.0).to(tl.float32), 0.0)
    tl.store(z + at, (positive * positive).to(z.dtype.element_ty), at < count)


@triton.jit
def _fp32(z, mask):
    return tl.load(z, mask, 0.0).to(tl.float32)


@triton.jit
def _value(v, v_mix, v_first, v0, at, of_head, mask, MIXED: tl.constexpr):
    """v, in all layers but the first mixed with that of the first."""
    vt = _fp32(v + at, mask)
    if MIXED:
        vt += (_fp32(v_first + at, mask) - vt) * tl.sigmoid(tl.load(v0 + of_head, mask, 0.0) + _fp32(v_mix + at, mask))
    return vt


@triton.jit
def _of_keys(k, w, a, w0, a0, k_k, k_a, at, of_head, mask):
    """w k a b of the recurrence, each [tokens, P], for heads that lie along axis 1; w is log-decay."""
    log_decay = -0.6065306597126334 * tl.sigmoid(tl.load(w0 + of_head, mask, 0.0) + _fp32(w + at, mask))  # exp(-1/2)
    rate = tl.sigmoid(tl.load(a0 + of_head, mask, 0.0) + _fp32(a + at, mask))
    kt = _fp32(k + at, mask)
    kk = kt * tl.load(k_k + of_head, mask, 0.0)
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk, 1)), 1e-12)[:, None]
    return log_decay, kt * (1 + (rate - 1) * tl.load(k_a + of_head, mask, 0.0)), -kk, kk * rate


@triton.jit(do_not_specialize=["n"])
def time_mix_inputs(
    k, v, w, a, v_mix, v_first,  # in, [n, H, N]
    w0, a0, v0, k_k, k_a,  # in, fp32 [H, N]
    log_decay, key, value, remove, write,  # out, [n, H, N]: w k v a b of the recurrence; without MIXED no v
    n, H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """T tokens of one head; P >= N and T are powers of two."""
    t, head = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1)
    c = tl.arange(0, P)[None, :]
    mask = (t < n)[:, None] & (c < N)
    at, of_head = (t[:, None] * H + head) * N + c, head * N + c
    wt, kt, at_, bt = _of_keys(k, w, a, w0, a0, k_k, k_a, at, of_head, mask)
    tl.store(log_decay + at, wt, mask)
    tl.store(key + at, kt.to(key.dtype.element_ty), mask)
    tl.store(remove + at, at_.to(remove.dtype.element_ty), mask)
    tl.store(write + at, bt.to(write.dtype.element_ty), mask)
    if MIXED:
        vt = _value(v, v_mix, v_first, v0, at, of_head, mask, MIXED)
        tl.store(value + at, vt.to(value.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def time_mix_outputs(
    y, r, key, value, g,  # in, [n, H, N]: of the recurrence, and the gate
    r_k, weight, bias, eps,  # in, fp32 [H, N]; of the GroupNorm
    out,  # out, [n, H, N]
    n, H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """T tokens of one head; P >= N and T are powers of two."""
    t, head = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T), tl.program_id(1)
    c = tl.arange(0, P)[None, :]
    mask = (t < n)[:, None] & (c < N)
    at, of_head = (t[:, None] * H + head) * N + c, head * N + c
    yt = _fp32(y + at, mask)
    d = tl.where(mask, yt - tl.sum(yt, 1)[:, None] / N, 0.0)
    normed = d * tl.rsqrt(tl.sum(d * d, 1) / N + eps)[:, None]
    normed = normed * tl.load(weight + of_head, mask, 0.0) + tl.load(bias + of_head, mask, 0.0)
    bonus = tl.sum(_fp32(r + at, mask) * _fp32(key + at, mask) * tl.load(r_k + of_head, mask, 0.0), 1)[:, None]
    gated = (normed + bonus * _fp32(value + at, mask)) * _fp32(g + at, mask)
    tl.store(out + at, gated.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def time_mix_step(
    r, k, v, w, a, g, v_mix, v_first,  # in, [n, H, N]
    w0, a0, v0, k_k, k_a, r_k, weight, bias, eps,  # in, fp32 [H, N]; of the GroupNorm
    state, state_stride,  # in, fp32 rows [H, N value, N key], so far apart
    before, after,  # in, int32 [n + E], from `plan`
    out,  # out, [n, H, N]
    new_state, new_stride,  # out, fp32 rows [H, N value, N key]
    n, H, N: tl.constexpr, P: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """One token of one head, V values of the state at a time; or the state that a segment without tokens hands on.

    P = V TILES >= N, powers of two.
    """
    i, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, target = tl.load(before + i).to(tl.int64), tl.load(after + i).to(tl.int64)
    given, new = state + source * state_stride + head * N * N, new_state + target * new_stride + head * N * N
    c, j = tl.arange(0, P)[None, :], tl.arange(0, V)
    is_key, row, of_head = c < N, (i * H + head) * N, head * N
    if i < n:
        wt, kt, at, bt = _of_keys(k, w, a, w0, a0, k_k, k_a, row + c, of_head + c, is_key)
        rt, decay = _fp32(r + row + c, is_key), tl.exp(wt)
        tile = tl.arange(0, TILES)[:, None]
        y = tl.zeros((TILES, V), tl.float32)
        for i_tile in range(TILES):
            values = i_tile * V + j
            is_value = values < N
            mask = is_value[:, None] & is_key
            S = tl.load(given + values[:, None] * N + c, mask, 0.0)
            vt = _value(v, v_mix, v_first, v0, row + values, of_head + values, is_value, MIXED)
            S = S * decay + tl.sum(S * at, 1)[:, None] * bt + vt[:, None] * kt
            if target >= 0:
                tl.store(new + values[:, None] * N + c, S, mask)
            y = tl.where(tile == i_tile, tl.sum(S * rt, 1)[None, :], y)
        values = tile * V + j[None, :]
        is_value = values < N
        d = tl.where(is_value, y - tl.sum(tl.sum(y, 1), 0) / N, 0.0)
        normed = d * tl.rsqrt(tl.sum(tl.sum(d * d, 1), 0) / N + eps)
        normed = normed * tl.load(weight + of_head + values, is_value, 0.0)
        normed += tl.load(bias + of_head + values, is_value, 0.0)
        bonus = tl.sum(rt * kt * tl.load(r_k + of_head + c, is_key, 0.0), 1)[:, None]  # [1, 1]
        vt = _value(v, v_mix, v_first, v0, row + values, of_head + values, is_value, MIXED)
        gated = (normed + bonus * vt) * _fp32(g + row + values, is_value)
        tl.store(out + row + values, gated.to(out.dtype.element_ty), is_value)
    elif target >= 0:
        for i_tile in range(TILES):
            rows = (i_tile * V + j)[:, None]
            in_state = (rows < N) & is_key
            tl.store(new + rows * N + c, tl.load(given + rows * N + c, in_state, 0.0), in_state)


# ---- calls ----


class Plan(NamedTuple):
    """Where tokens of segments take up a state and leave one: the same for all layers, and made once. int32.

    before   [n + E], for each token the row of the given state that it goes on from, -1 for the token before it; then
             the rows that the E segments without tokens hand on
    after    [n + E], the row of the new state that is complete with this token or segment, -1 for none
    start    [S], row of the given state that each segment goes on from
    to       [S], row of the new state that it ends in, -1 for none
    blocks   of `recurrence.triton`
    is_step  whether no segment has more than one token
    dtype    of the products
    """

    before: Tensor
    after: Tensor
    start: Tensor
    to: Tensor
    blocks: Blocks
    is_step: bool
    dtype: torch.dtype


def plan(offsets: Tensor, start: Tensor, to: Tensor, dtype: torch.dtype, device: torch.device) -> Plan:
    """For segments as `reference` has them, and products in a dtype. The sizes of all launches follow from it."""
    offsets, start, to = (z.cpu() for z in (offsets, start, to))
    n, lengths = int(offsets[-1]), offsets.diff()
    has_tokens = lengths > 0
    is_handed_on = ~has_tokens & (to >= 0)
    before, after = start.new_full((n,), -1), to.new_full((n,), -1)
    before[offsets[:-1][has_tokens]] = start[has_tokens]
    after[offsets[1:][has_tokens] - 1] = to[has_tokens]
    before, after = torch.cat([before, start[is_handed_on]]), torch.cat([after, to[is_handed_on]])
    parts = [before, after, start, to, *blocks_of(offsets, block_tokens(dtype))]
    # One transfer; each part begins at a multiple of 16 bytes, since Triton compiles for that and its absence apart.
    padded = [F.pad(part.int(), (0, -len(part) % 4)) for part in parts]
    there = sent(torch.cat(padded), device).split([len(part) for part in padded])
    before, after, start, to, *blocks = (z[: len(part)] for z, part in zip(there, parts, strict=True))
    return Plan(before, after, start, to, Blocks(*blocks), bool((lengths <= 1).all()), dtype)


def norm_shift_mix(
    x: Tensor, norm: tuple[Tensor, Tensor], mix: Tensor, x_prev: Tensor, segments: Plan, out: Tensor, last: Tensor
) -> None:
    """`reference.norm_shift_mix`: x fp32 [n, C], norm (weight, bias), mix fp32 [M, C] → out [M, n, C] of any dtype.

    Rows of x_prev fp32 [R, C] and last fp32 [K, C] are contiguous, and may be apart.
    """
    n, C = x.shape
    P = triton.next_power_of_2(C)
    norm_shift_mix_rows[(len(segments.before),)](
        x, *norm, mix, x_prev, x_prev.stride(0), segments.before, segments.after, out, last, last.stride(0),
        n, C, M=len(mix), P=P, num_warps=min(16, max(1, P // 256)),
    )  # fmt: skip


def relu2_(z: Tensor) -> None:
    """z = relu(z)², contiguous, in place."""
    relu2_elements[(triton.cdiv(z.numel(), RELU2_BLOCK),)](z, z.numel(), BLOCK=RELU2_BLOCK)


def time_mix(
    projections: Sequence[Tensor],
    vectors: Sequence[Tensor],
    eps: float,
    state: Tensor,
    segments: Plan,
    out: Tensor,
    new_state: Tensor,
) -> None:
    """`reference.time_mix`: projections [n, C] of one dtype, in which products of the recurrence are made, too.

    Rows of state fp32 [R, H, N, N] and new_state fp32 [K, H, N, N] are contiguous, and may be apart.
    """
    (r, k, v, w, a, g, v_mix, v_first), is_mixed = _complete(projections)
    w0, a0, v0, k_k, k_a, r_k, *norm = vectors
    n, (H, N) = len(r), state.shape[1:3]
    P = triton.next_power_of_2(N)
    T = max(1, TILE // P)
    log_decay = torch.empty_like(r, dtype=torch.float32)
    key, remove, write, y = r.new_empty(4, *r.shape)
    value = torch.empty_like(v) if is_mixed else v
    tiles = triton.cdiv(n, T), H
    time_mix_inputs[tiles](
        k, v, w, a, v_mix, v_first, w0, a0, v0, k_k, k_a, log_decay, key, value, remove, write,
        n, H, N=N, T=T, P=P, MIXED=is_mixed,
    )  # fmt: skip
    inputs = tuple(z.view(n, H, N) for z in (r, log_decay, key, value, remove, write))
    wkv7(inputs, state, segments.start, segments.blocks, y, new_state, segments.to)
    time_mix_outputs[tiles](y, r, key, value, g, r_k, *norm, eps, out, n, H, N=N, T=T, P=P)


def step(
    projections: Sequence[Tensor],
    vectors: Sequence[Tensor],
    eps: float,
    state: Tensor,
    segments: Plan,
    out: Tensor,
    new_state: Tensor,
) -> None:
    """What `time_mix` does, for segments of one token at most, by the recurrence itself and in fp32 throughout."""
    projections, is_mixed = _complete(projections)
    H, N = state.shape[1:3]
    P = triton.next_power_of_2(N)
    V = min(P, STATE_TILE // P)
    time_mix_step[len(segments.before), H](
        *projections, *vectors, eps, state, state.stride(0), segments.before, segments.after, out,
        new_state, new_state.stride(0), len(out), H, N=N, P=P, V=V, TILES=P // V, MIXED=is_mixed,
    )  # fmt: skip


def _complete(projections: Sequence[Tensor]) -> tuple[Sequence[Tensor], bool]:
    """Eight projections, where the first layer has six, and whether v is mixed: where it is not, others stand in."""
    is_mixed = len(projections) == 8
    return projections if is_mixed else [*projections, *projections[:2]], is_mixed
