"""The recurrences as Triton kernels: parallel over blocks of time as well as over heads, on tensor cores.

A text is cut into blocks of BLOCK tokens, each inside one segment. All that concerns one block alone is computed for
every block at once; only the state passes from block to block, one after the other. So a single long document fills a
GPU. Products accumulate in fp32, states and decays are fp32; there are no atomics, and no sum is ever split between
programs, so a result does not depend on how the work is scheduled.

Under TRITON_INTERPRET=1 (set before the import) the same kernels run on the CPU.
Source of the forms: RWKV-7 paper (arXiv 2503.14456), section 4 and appendix on the chunked form; for RWKV-5 and 6
"Gated Linear Attention" (arXiv 2312.06635), section 4.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

Tensors = tuple[Tensor, ...]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

BLOCK = 32  # tokens; |log-decay| of RWKV-7 < exp(-1/2), so factors taken from the middle stay within exp(±10)
PAIRS = 16  # tokens whose decays of RWKV-5 and 6 are taken pair by pair
GROUPS = 4  # of so many tokens, in a block of RWKV-4 to 6


# ---- RWKV-7 ----


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):
    """x y, accumulated in fp32; PRECISION is that of fp32 factors on tensor cores."""
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _of_tokens(first, length, block, head, t, n, H, N: tl.constexpr):
    """Where a block's tokens t and numbers n of a head lie in [n, H, N], and which of them there are."""
    inside = (t < tl.load(length + block))[:, None] & (n < N)[None, :]
    return ((tl.load(first + block).to(tl.int64) + t)[:, None] * H + head) * N + n[None, :], inside


@triton.jit
def _state_at(states, block, head, n, H, N: tl.constexpr):
    """The state of a head at a block, [key, value], of `states` [blocks, H, N value, N key]."""
    at = states + (block * H + head) * N * N + n[None, :] * N + n[:, None]
    return tl.load(at, (n < N)[None, :] & (n < N)[:, None], 0.0)


@triton.jit
def wkv7_blocks(
    r, w, k, v, a, b,  # in, [n, H, N]
    first, length,  # in, int32 [blocks]: first token and number of tokens of each block
    read, write,  # out, [blocks, H, T, N] in the dtype of r: W' and U', what reads the state and what stands without it
    inverse,  # out, [blocks, H, T, T] in the dtype of r: (I - P)⁻¹, if KEEP
    H, N: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each block and head W' = (I - P)⁻¹ (A exp e) and U' = (I - P)⁻¹ Q V.

    P >= N and T are powers of two, T is 2 to the LEVELS.
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, n = tl.arange(0, T), tl.arange(0, P)
    at, inside = _of_tokens(first, length, block, head, t, n, H, N)
    wt = tl.load(w + at, inside, 0.0).to(tl.float32)
    kt, bt = tl.load(k + at, inside, 0.0).to(tl.float32), tl.load(b + at, inside, 0.0).to(tl.float32)
    at_ = tl.load(a + at, inside, 0.0).to(tl.float32)
    vt = tl.load(v + at, inside, 0.0).to(KIND)
    c = tl.cumsum(wt, 0)
    e = c - wt
    middle = tl.sum(tl.where((t == T // 2)[:, None], c, 0.0), 0)[None, :]
    later = tl.exp(middle - c)
    ae = (at_ * tl.exp(e - middle)).to(KIND)
    earlier = t[:, None] > t[None, :]
    p = tl.where(earlier, _product(ae, tl.trans((bt * later).to(KIND)), PRECISION), 0.0)
    q = tl.where(earlier, _product(ae, tl.trans((kt * later).to(KIND)), PRECISION), 0.0)
    solved = _inverse(p, T, LEVELS, PRECISION).to(KIND)
    if KEEP:
        here = ((block * H + head) * T + t)[:, None] * T + t[None, :]
        tl.store(inverse + here, solved.to(inverse.dtype.element_ty))
    place = ((block * H + head) * T + t)[:, None] * N + n[None, :]
    reads = _product(solved, (at_ * tl.exp(e)).to(KIND), PRECISION)
    writes = _product(solved, _product(q.to(KIND), vt, PRECISION).to(KIND), PRECISION)
    tl.store(read + place, reads.to(read.dtype.element_ty), (n < N)[None, :])
    tl.store(write + place, writes.to(write.dtype.element_ty), (n < N)[None, :])


@triton.jit
def _inverse(p, T: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I - p)⁻¹ of a strictly lower triangular p [T, T]: inverses of twice the size from those of the diagonal blocks.

    With X those of size s side by side and M the blocks of I - p that join two of them, X - X M X are those of 2 s. In
    fp32 throughout: a solution that is off is carried on by every later token.
    """
    t = tl.arange(0, T)
    row, column = t[:, None], t[None, :]
    x = tl.where(row == column, 1.0, 0.0)
    for doubling in tl.static_range(LEVELS):
        joins = (row >> doubling > column >> doubling) & (row >> (doubling + 1) == column >> (doubling + 1))
        m = tl.where(joins, p, 0.0)
        x += _product(_product(x, m, PRECISION), x, PRECISION)
    return x


@triton.jit
def wkv7_pass(
    w, k, v, b,  # in, [n, H, N]
    first, length, begin, count,  # in, int32: of each block; first block and number of blocks of each segment
    state, state_stride, start,  # in, rows [H, N value, N key] fp32, so far apart; int [S]: that a segment starts from
    read, write,  # in, from wkv7_blocks; out: write becomes U
    starts,  # out, [blocks, H, N value, N key] fp32: the state before each block
    final, final_stride, to,  # out, rows [H, N value, N key] fp32; in, int [S]: that a segment ends in, -1 for none
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V values of the state of one head, from block to block of a segment."""
    segment, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, n, j = tl.arange(0, T), tl.arange(0, P), tile * V + tl.arange(0, V)
    is_key, is_value = n < N, j < N
    of_state = j[None, :] * N + n[:, None]
    in_state = is_value[None, :] & is_key[:, None]
    of_head = head * N * N + of_state
    S = tl.load(state + tl.load(start + segment).to(tl.int64) * state_stride + of_head, in_state, 0.0)  # [key, value]
    begin_here = tl.load(begin + segment).to(tl.int64)
    for i in range(tl.load(count + segment)):
        block = begin_here + i
        real = (t < tl.load(length + block))[:, None]
        at = ((tl.load(first + block).to(tl.int64) + t)[:, None] * H + head) * N
        keys, values = at + n[None, :], at + j[None, :]
        mask = real & is_key[None, :]
        wt = tl.load(w + keys, mask, 0.0).to(tl.float32)
        kt, bt = tl.load(k + keys, mask, 0.0).to(tl.float32), tl.load(b + keys, mask, 0.0).to(tl.float32)
        vt = tl.load(v + values, real & is_value[None, :], 0.0).to(KIND)
        total = tl.sum(wt, 0)
        rest = tl.exp(total[None, :] - tl.cumsum(wt, 0))  # what is left at the block's end of what is written here
        tl.store(starts + (block * H + head) * N * N + of_state, S, in_state)
        place = ((block * H + head) * T + t)[:, None] * N
        reads = tl.load(read + place + n[None, :], is_key[None, :], 0.0).to(KIND)
        u = tl.load(write + place + j[None, :], is_value[None, :], 0.0).to(tl.float32)
        u += _product(reads, S.to(KIND), PRECISION)
        tl.store(write + place + j[None, :], u.to(write.dtype.element_ty), is_value[None, :])
        S = S * tl.exp(total)[:, None]
        S += _product(tl.trans((bt * rest).to(KIND)), u.to(KIND), PRECISION)
        S += _product(tl.trans((kt * rest).to(KIND)), vt, PRECISION)
    row = tl.load(to + segment).to(tl.int64)
    if row >= 0:
        tl.store(final + row * final_stride + of_head, S, in_state)


@triton.jit
def wkv7_outputs(
    r, w, k, v, b,  # in, [n, H, N]
    first, length,  # in, int32 [blocks]
    u, starts,  # in, from wkv7_pass
    y,  # out, [n, H, N]
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each block and head Y = B U + G V + (R exp c) Sᵀ, with S the state before the block."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, n = tl.arange(0, T), tl.arange(0, P)
    is_key = (n < N)[None, :]
    at, inside = _of_tokens(first, length, block, head, t, n, H, N)
    wt, rt = tl.load(w + at, inside, 0.0).to(tl.float32), tl.load(r + at, inside, 0.0).to(tl.float32)
    kt, bt = tl.load(k + at, inside, 0.0).to(tl.float32), tl.load(b + at, inside, 0.0).to(tl.float32)
    vt = tl.load(v + at, inside, 0.0).to(KIND)
    c = tl.cumsum(wt, 0)
    middle = tl.sum(tl.where((t == T // 2)[:, None], c, 0.0), 0)[None, :]
    later = tl.exp(middle - c)
    rc = (rt * tl.exp(c - middle)).to(KIND)
    until = t[:, None] >= t[None, :]
    of_b = tl.where(until, _product(rc, tl.trans((bt * later).to(KIND)), PRECISION), 0.0)
    of_k = tl.where(until, _product(rc, tl.trans((kt * later).to(KIND)), PRECISION), 0.0)
    ut = tl.load(u + ((block * H + head) * T + t)[:, None] * N + n[None, :], is_key, 0.0).to(KIND)
    S = _state_at(starts, block, head, n, H, N)
    out = _product(of_b.to(KIND), ut, PRECISION) + _product(of_k.to(KIND), vt, PRECISION)
    out += _product((rt * tl.exp(c)).to(KIND), S.to(KIND), PRECISION)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)


@triton.jit
def wkv7_back_blocks(
    r, w, b, dy,  # in, [n, H, N]
    first, length,  # in, int32 [blocks]
    starts, read, u,  # in, from wkv7_pass and wkv7_blocks; out: what stands without the state becomes U
    du,  # out, [blocks, H, T, N] in the dtype of u: of the gradient of U what comes from the block's outputs, Bᵀ dY
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each block and head U = U' + W' Sᵀ, with S the state before the block, and where its gradient begins."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, n = tl.arange(0, T), tl.arange(0, P)
    is_key = (n < N)[None, :]
    at, inside = _of_tokens(first, length, block, head, t, n, H, N)
    place = ((block * H + head) * T + t)[:, None] * N + n[None, :]
    S = _state_at(starts, block, head, n, H, N)
    reads = tl.load(read + place, is_key, 0.0).to(KIND)
    ut = tl.load(u + place, is_key, 0.0).to(tl.float32) + _product(reads, S.to(KIND), PRECISION)
    tl.store(u + place, ut.to(u.dtype.element_ty), is_key)
    wt, rt = tl.load(w + at, inside, 0.0).to(tl.float32), tl.load(r + at, inside, 0.0).to(tl.float32)
    bt, dyt = tl.load(b + at, inside, 0.0).to(tl.float32), tl.load(dy + at, inside, 0.0).to(KIND)
    c = tl.cumsum(wt, 0)
    middle = tl.sum(tl.where((t == T // 2)[:, None], c, 0.0), 0)[None, :]
    rc, bl = (rt * tl.exp(c - middle)).to(KIND), (bt * tl.exp(middle - c)).to(KIND)
    of_b = tl.where(t[:, None] >= t[None, :], _product(rc, tl.trans(bl), PRECISION), 0.0)
    dut = _product(tl.trans(of_b.to(KIND)), dyt, PRECISION)
    tl.store(du + place, dut.to(du.dtype.element_ty), is_key)


@triton.jit
def wkv7_back_pass(
    r, w, b, dy,  # in, [n, H, N]
    first, length, begin, count,  # in, int32: of each block; first block and number of blocks of each segment
    d_final,  # in, [S, H, N value, N key] fp32
    read, du,  # in, from wkv7_back_blocks; out: du becomes the gradient of U
    d_ends,  # out, [blocks, H, N value, N key] fp32: the gradient of the state after each block
    d_start,  # out, [S, H, N value, N key] fp32
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V values of the gradient of the state of one head, from block to block of a segment, beginning with the last."""
    segment, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, n, j = tl.arange(0, T), tl.arange(0, P), tile * V + tl.arange(0, V)
    is_key, is_value = n < N, j < N
    of_state = j[None, :] * N + n[:, None]
    in_state = is_value[None, :] & is_key[:, None]
    of_segment = (segment * H + head) * N * N + of_state
    dS = tl.load(d_final + of_segment, in_state, 0.0)  # [key, value]
    blocks = tl.load(count + segment)
    last = tl.load(begin + segment).to(tl.int64) + blocks - 1
    for i in range(blocks):
        block = last - i
        real = (t < tl.load(length + block))[:, None]
        at = ((tl.load(first + block).to(tl.int64) + t)[:, None] * H + head) * N
        keys, mask = at + n[None, :], real & is_key[None, :]
        wt, rt = tl.load(w + keys, mask, 0.0).to(tl.float32), tl.load(r + keys, mask, 0.0).to(tl.float32)
        bt = tl.load(b + keys, mask, 0.0).to(tl.float32)
        dyt = tl.load(dy + at + j[None, :], real & is_value[None, :], 0.0).to(KIND)
        c, total = tl.cumsum(wt, 0), tl.sum(wt, 0)
        tl.store(d_ends + (block * H + head) * N * N + of_state, dS, in_state)
        place = ((block * H + head) * T + t)[:, None] * N
        reads = tl.load(read + place + n[None, :], is_key[None, :], 0.0).to(KIND)
        dut = tl.load(du + place + j[None, :], is_value[None, :], 0.0).to(tl.float32)
        dut += _product((bt * tl.exp(total[None, :] - c)).to(KIND), dS.to(KIND), PRECISION)
        tl.store(du + place + j[None, :], dut.to(du.dtype.element_ty), is_value[None, :])
        dS = dS * tl.exp(total)[:, None]
        dS += _product(tl.trans((rt * tl.exp(c)).to(KIND)), dyt, PRECISION)
        dS += _product(tl.trans(reads), dut.to(KIND), PRECISION)
    tl.store(d_start + of_segment, dS, in_state)


@triton.jit
def wkv7_back_outputs(
    r, w, k, v, a, b, dy,  # in, [n, H, N]
    first, length,  # in, int32 [blocks]
    starts, inverse, u, du, d_ends,  # in, from the kernels before this one
    dr, dw, dk, dv, da, db,  # out, [n, H, N]
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each block and head the gradients of what it reads.

    With X = (I - P)⁻ᵀ dU: dP = X Uᵀ, dQ = X Vᵀ, dB = dY Uᵀ, dG = dY Vᵀ, each where its matrix is not zero, and from
    these those of their factors. That of a decay is the sum over all factors that it is in; they are taken as they were
    rounded, so that what two tokens behind the decay have in common cancels. Tensors are read where they are needed,
    some twice: registers are scarce here.
    """
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, n = tl.arange(0, T), tl.arange(0, P)
    is_key = (n < N)[None, :]
    inside = (t < tl.load(length + block))[:, None] & is_key
    row = (tl.load(first + block).to(tl.int64) * H + head) * N  # of the block's first token
    at = t[:, None] * (H * N) + n[None, :]
    here = block * H + head  # of what the other kernels left
    place, of_state = t[:, None] * N + n[None, :], n[None, :] * N + n[:, None]
    in_state = is_key & (n < N)[:, None]
    wt = tl.load(w + row + at, inside, 0.0).to(tl.float32)
    c, total = tl.cumsum(wt, 0), tl.sum(wt, 0)
    e = c - wt
    middle = tl.sum(tl.where((t == T // 2)[:, None], c, 0.0), 0)[None, :]
    later = tl.exp(middle - c)
    earlier, until = t[:, None] > t[None, :], t[:, None] >= t[None, :]
    kt, bt = tl.load(k + row + at, inside, 0.0).to(tl.float32), tl.load(b + row + at, inside, 0.0).to(tl.float32)
    kl, bl = (kt * later).to(KIND), (bt * later).to(KIND)
    vt, dyt = tl.load(v + row + at, inside, 0.0).to(KIND), tl.load(dy + row + at, inside, 0.0).to(KIND)
    ut = tl.load(u + here * T * N + place, is_key, 0.0).to(KIND)
    solved = tl.load(inverse + here * T * T + t[:, None] * T + t[None, :]).to(KIND)
    x = _product(tl.trans(solved), tl.load(du + here * T * N + place, is_key, 0.0).to(KIND), PRECISION).to(KIND)
    dp = tl.where(earlier, _product(x, tl.trans(ut), PRECISION), 0.0).to(KIND)
    dq = tl.where(earlier, _product(x, tl.trans(vt), PRECISION), 0.0).to(KIND)
    d_of_b = tl.where(until, _product(dyt, tl.trans(ut), PRECISION), 0.0).to(KIND)
    d_of_k = tl.where(until, _product(dyt, tl.trans(vt), PRECISION), 0.0).to(KIND)

    S = tl.load(starts + here * N * N + of_state, in_state, 0.0).to(KIND)  # [key, value]
    at_ = tl.load(a + row + at, inside, 0.0).to(tl.float32)
    ae = (at_ * tl.exp(e - middle)).to(KIND)
    of_ae = _product(dp, bl, PRECISION) + _product(dq, kl, PRECISION)
    of_start = _product(x, tl.trans(S), PRECISION)
    of_a = of_ae * tl.exp(e - middle) + of_start * tl.exp(e)
    tl.store(da + row + at, of_a.to(da.dtype.element_ty), inside)
    de = ae.to(tl.float32) * of_ae + at_ * tl.exp(e) * of_start

    rt = tl.load(r + row + at, inside, 0.0).to(tl.float32)
    rc = (rt * tl.exp(c - middle)).to(KIND)
    of_rc = _product(d_of_b, bl, PRECISION) + _product(d_of_k, kl, PRECISION)
    of_start = _product(dyt, tl.trans(S), PRECISION)
    of_r = of_rc * tl.exp(c - middle) + of_start * tl.exp(c)
    tl.store(dr + row + at, of_r.to(dr.dtype.element_ty), inside)
    dc = rc.to(tl.float32) * of_rc + rt * tl.exp(c) * of_start

    S = tl.load(starts + here * N * N + of_state, in_state, 0.0)
    dS = tl.load(d_ends + here * N * N + of_state, in_state, 0.0)
    d_total = tl.exp(total) * tl.sum(S * dS, 1)
    dS = dS.to(KIND)
    q = tl.where(earlier, _product(ae, tl.trans(kl), PRECISION), 0.0).to(KIND)
    of_k = tl.where(until, _product(rc, tl.trans(kl), PRECISION), 0.0).to(KIND)
    of_v = _product(tl.trans(q), x, PRECISION) + _product(tl.trans(of_k), dyt, PRECISION)
    rest = tl.exp(total[None, :] - c)
    k_rest = (tl.load(k + row + at, inside, 0.0).to(tl.float32) * rest).to(KIND)
    of_v += _product(k_rest, dS, PRECISION)
    tl.store(dv + row + at, of_v.to(dv.dtype.element_ty), inside)
    of_kl = _product(tl.trans(dq), ae, PRECISION) + _product(tl.trans(d_of_k), rc, PRECISION)
    of_rest = _product(vt, tl.trans(dS), PRECISION)
    tl.store(dk + row + at, (of_kl * later + of_rest * rest).to(dk.dtype.element_ty), inside)
    to_end = k_rest.to(tl.float32) * of_rest
    dc -= kl.to(tl.float32) * of_kl + to_end
    d_total += tl.sum(to_end, 0)

    b_rest = (tl.load(b + row + at, inside, 0.0).to(tl.float32) * rest).to(KIND)
    of_bl = _product(tl.trans(dp), ae, PRECISION) + _product(tl.trans(d_of_b), rc, PRECISION)
    of_rest = _product(ut, tl.trans(dS), PRECISION)
    tl.store(db + row + at, (of_bl * later + of_rest * rest).to(db.dtype.element_ty), inside)
    to_end = b_rest.to(tl.float32) * of_rest
    dc -= bl.to(tl.float32) * of_bl + to_end
    d_total += tl.sum(to_end, 0)

    of_w = tl.cumsum(dc + de, 0, reverse=True) - de + d_total[None, :]
    tl.store(dw + row + at, of_w.to(dw.dtype.element_ty), inside)


# ---- RWKV-5 and 6 ----


@triton.jit
def wkv6_pass(
    w, k, v,  # in, [n, H, N]
    first, length, begin, count,  # in, int32: of each block; first block and number of blocks of each segment
    state, start,  # in, [R, H, N key, N value] fp32, and int64 [S]: the row of it that a segment starts from
    starts, final,  # out, [blocks, H, N, N]: the state before each block, and [S, H, N, N]
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V values of the state of one head, from block to block of a segment."""
    segment, head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, n, j = tl.arange(0, T), tl.arange(0, P), tile * V + tl.arange(0, V)
    is_key, is_value = n < N, j < N
    of_state = n[:, None] * N + j[None, :]
    in_state = is_key[:, None] & is_value[None, :]
    S = tl.load(state + (tl.load(start + segment) * H + head) * N * N + of_state, in_state, 0.0)
    begin_here = tl.load(begin + segment).to(tl.int64)
    for i in range(tl.load(count + segment)):
        block = begin_here + i
        tokens = tl.load(length + block)
        at = ((tl.load(first + block) + t)[:, None] * H + head) * N
        mask = (t < tokens)[:, None] & is_key[None, :]
        wt = tl.load(w + at + n[None, :], mask, 0.0).to(tl.float32)
        later = tl.load(w + at + H * N + n[None, :], mask & (t + 1 < tokens)[:, None], 0.0).to(tl.float32)
        rest = tl.cumsum(later, 0, reverse=True)  # of the tokens after each; a difference of sums would lose small ones
        kt = tl.load(k + at + n[None, :], mask, 0.0).to(tl.float32)
        vt = tl.load(v + at + j[None, :], (t < tokens)[:, None] & is_value[None, :], 0.0).to(KIND)
        tl.store(starts + (block * H + head) * N * N + of_state, S, in_state)
        S = S * tl.exp(tl.sum(wt, 0))[:, None]
        S += _product(tl.trans((kt * tl.exp(rest)).to(KIND)), vt, PRECISION)
    tl.store(final + (segment * H + head) * N * N + of_state, S, in_state)


@triton.jit
def wkv6_outputs(
    r, w, k, v, u,  # in, [n, H, N]; u [H, N]
    first, length,  # in, int32 [blocks]
    starts,  # in, from wkv6_pass
    y,  # out, [n, H, N]
    H, N: tl.constexpr, T: tl.constexpr, P: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y of one head for G tokens of a block: what they read of the state before the block, of earlier groups of G
    tokens, of earlier tokens of their own group, and of themselves. Every exponent is a sum of log-decays."""
    block, head, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    tokens = tl.load(length + block)
    g, n = tl.arange(0, G), tl.arange(0, P)
    is_key = n < N
    row = (tl.load(first + block).to(tl.int64) * H + head) * N  # of the block's first token
    step = H * N
    t = group * G + g
    mask = (t < tokens)[:, None] & is_key[None, :]
    at = row + t[:, None] * step + n[None, :]
    rt, kt = tl.load(r + at, mask, 0.0).to(tl.float32), tl.load(k + at, mask, 0.0).to(tl.float32)
    vt = tl.load(v + at, mask, 0.0).to(KIND)
    ut = tl.load(u + head * N + n, is_key, 0.0).to(tl.float32)
    last = tl.load(w + at - step, mask & (g > 0)[:, None], 0.0).to(tl.float32)
    before = tl.cumsum(last, 0)  # of the group's tokens before each

    # Earlier tokens of the group, from the last to the first; `between` is the sum of those between it and each t.
    A = tl.where(g[:, None] == g[None, :], tl.sum(rt * ut[None, :] * kt, 1)[:, None], 0.0)
    between = tl.zeros((G, P), tl.float32)
    for back in range(1, G):
        i = G - 1 - back
        here = row + (group * G + i) * step + n
        place = tl.full((P,), group * G + i, tl.int32)
        k_i = tl.load(k + here, is_key & (place < tokens), 0.0).to(tl.float32)
        w_after = tl.load(w + here + step, is_key & (place + 1 < tokens), 0.0).to(tl.float32)
        between = tl.where((g > i + 1)[:, None], between + w_after[None, :], 0.0)
        column = tl.sum(rt * k_i[None, :] * tl.exp(between), 1)
        A += tl.where((g[None, :] == i) & (g > i)[:, None], column[:, None], 0.0)
    out = _product(A.to(KIND), vt, PRECISION)

    # Earlier groups, from the last to the first; `gap` is the sum of those between it and this one.
    gap = tl.zeros((P,), tl.float32)
    reads = rt * tl.exp(before)
    for back in range(1, group + 1):
        i = (group - back) * G + g
        here = row + i[:, None] * step + n[None, :]
        is_real = (i < tokens)[:, None] & is_key[None, :]
        w_i = tl.load(w + here, is_real, 0.0).to(tl.float32)
        after = tl.load(w + here + step, is_real & (g + 1 < G)[:, None], 0.0).to(tl.float32)
        rest = tl.cumsum(after, 0, reverse=True) + gap[None, :]
        k_i = tl.load(k + here, is_real, 0.0).to(tl.float32) * tl.exp(rest)
        v_i = tl.load(v + here, is_real, 0.0).to(KIND)
        part = _product(reads.to(KIND), tl.trans(k_i.to(KIND)), PRECISION)
        out += _product(part.to(KIND), v_i, PRECISION)
        gap += tl.sum(w_i, 0)

    S = tl.load(
        starts + (block * H + head) * N * N + n[:, None] * N + n[None, :], is_key[:, None] & is_key[None, :], 0.0
    )
    out += _product((reads * tl.exp(gap)[None, :]).to(KIND), S.to(KIND), PRECISION)
    tl.store(y + at, out.to(y.dtype.element_ty), mask)


# ---- RWKV-4 ----


@triton.jit
def _add(num, den, top, other_num, other_den, other_top):
    """Two sums, each num exp(top) and den exp(top), as one."""
    q = tl.maximum(top, other_top)
    x, y = tl.exp(top - q), tl.exp(other_top - q)
    return x * num + y * other_num, x * den + y * other_den, q


@triton.jit
def wkv4_blocks(
    w, k, v,  # in, [n, C]
    first, length,  # in, int32 [blocks]
    sums,  # out, [blocks, 4, C] fp32: num, den, max of a block by itself, and its sum of log-decays
    C, V: tl.constexpr,
):  # fmt: skip
    block, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    inside = c < C
    at = tl.load(first + block).to(tl.int64) * C + c
    num, den = tl.zeros((V,), tl.float32), tl.zeros((V,), tl.float32)
    top, total = tl.full((V,), -1e30, tl.float32), tl.zeros((V,), tl.float32)
    for t in range(tl.load(length + block)):
        wt = tl.load(w + at + t * C, inside, 0.0).to(tl.float32)
        kt = tl.load(k + at + t * C, inside, 0.0).to(tl.float32)
        vt = tl.load(v + at + t * C, inside, 0.0).to(tl.float32)
        num, den, top = _add(num, den, top + wt, vt, 1.0, kt)
        total += wt
    here = sums + block * 4 * C + c
    tl.store(here, num, inside)
    tl.store(here + C, den, inside)
    tl.store(here + 2 * C, top, inside)
    tl.store(here + 3 * C, total, inside)


@triton.jit
def wkv4_pass(
    sums,  # in, from wkv4_blocks; out, [blocks, 4, C]: num, den, max before each block
    begin, count,  # in, int32 [S]: first block and number of blocks of each segment
    state, start,  # in, [R, 3, C] fp32, and int64 [S]
    final,  # out, [S, 3, C]
    C, V: tl.constexpr,
):  # fmt: skip
    segment, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    inside = c < C
    here = state + tl.load(start + segment) * 3 * C + c
    num, den, top = tl.load(here, inside, 0.0), tl.load(here + C, inside, 0.0), tl.load(here + 2 * C, inside, 0.0)
    block = sums + tl.load(begin + segment).to(tl.int64) * 4 * C + c
    for _ in range(tl.load(count + segment)):
        own, own_den = tl.load(block, inside, 0.0), tl.load(block + C, inside, 0.0)
        own_top, total = tl.load(block + 2 * C, inside, 0.0), tl.load(block + 3 * C, inside, 0.0)
        tl.store(block, num, inside)
        tl.store(block + C, den, inside)
        tl.store(block + 2 * C, top, inside)
        num, den, top = _add(num, den, top + total, own, own_den, own_top)
        block += 4 * C
    here = final + segment * 3 * C + c
    tl.store(here, num, inside)
    tl.store(here + C, den, inside)
    tl.store(here + 2 * C, top, inside)


@triton.jit
def wkv4_outputs(
    w, k, v, u,  # in, [n, C]; u [C]
    first, length,  # in, int32 [blocks]
    sums,  # in, from wkv4_pass
    y,  # out, [n, C]
    C, V: tl.constexpr,
):  # fmt: skip
    block, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * V + tl.arange(0, V)
    inside = c < C
    at = tl.load(first + block).to(tl.int64) * C + c
    here = sums + block * 4 * C + c
    num, den, top = tl.load(here, inside, 0.0), tl.load(here + C, inside, 0.0), tl.load(here + 2 * C, inside, 0.0)
    ut = tl.load(u + c, inside, 0.0).to(tl.float32)
    for t in range(tl.load(length + block)):
        wt = tl.load(w + at + t * C, inside, 0.0).to(tl.float32)
        kt = tl.load(k + at + t * C, inside, 0.0).to(tl.float32)
        vt = tl.load(v + at + t * C, inside, 0.0).to(tl.float32)
        all_num, all_den, _ = _add(num, den, top, vt, 1.0, ut + kt)
        tl.store(y + at + t * C, (all_num / all_den).to(y.dtype.element_ty), inside)
        num, den, top = _add(num, den, top + wt, vt, 1.0, kt)


# ---- calls ----


class Blocks(NamedTuple):
    """What segments are cut into, each block within one segment; all int32."""

    first: Tensor  # [blocks], first token
    length: Tensor  # [blocks], number of tokens
    begin: Tensor  # [S], first block of each segment
    n_blocks: Tensor  # [S], number of blocks of each segment


def blocks_of(offsets: Tensor, size: int) -> Blocks:
    """The blocks of up to `size` tokens that segments offsets int64 [S + 1] are cut into."""
    lengths = offsets.diff()
    count = (lengths + size - 1) // size
    begin = count.cumsum(0) - count
    segment = torch.repeat_interleave(torch.arange(len(count), device=offsets.device), count)
    inside = torch.arange(len(segment), device=offsets.device) - begin[segment]
    first = offsets[segment] + inside * size
    length = torch.minimum(lengths[segment] - inside * size, torch.tensor(size, device=offsets.device))
    return Blocks(first.int(), length.int(), begin.int(), count.int())


def block_tokens(dtype: torch.dtype) -> int:
    """The size of the blocks of RWKV-7 whose products are made in a dtype."""
    return PAIRS if dtype == torch.float16 else BLOCK  # fp16 has the range of exp(±11)


def _kind(dtype: torch.dtype) -> dict[str, Any]:
    """How products are made of tensors of a dtype: fp32 exactly, 16 bits as they are.

    Triton's interpreter cannot multiply bfloat16; there the factors are fp32.
    """
    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    kind = tl.float32 if INTERPRETED and dtype == torch.bfloat16 else kinds[dtype]
    return {"KIND": kind, "PRECISION": "ieee"}


def _size7(v: Tensor) -> dict[str, Any]:
    """The sizes that all kernels of RWKV-7 take, and how products are made of tensors like v [n, H, N]."""
    _, H, N = v.shape
    return {"H": H, "N": N, "T": block_tokens(v.dtype), "P": max(16, triton.next_power_of_2(N))} | _kind(v.dtype)


def _blocks7(inputs: Tensors, blocks: Blocks, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """W', U', and if they are to be kept the inverses, of each block."""
    v, size = inputs[3], _size7(inputs[3])
    T, shape = size["T"], (len(blocks.first), size["H"], size["T"])
    read, write = v.new_empty(*shape, size["N"]), v.new_empty(*shape, size["N"])
    inverse = v.new_empty(*shape, T) if keep else write
    wkv7_blocks[shape[:2]](
        *inputs, blocks.first, blocks.length, read, write, inverse, LEVELS=T.bit_length() - 1, KEEP=keep, **size
    )
    return read, write, inverse


def wkv7(inputs: Tensors, state: Tensor, start: Tensor, blocks: Blocks, y: Tensor, final: Tensor, to: Tensor) -> Tensor:
    """RWKV-7 over the blocks of S segments, `block_tokens` long, from rows `start` of a state to rows `to` of another.

    inputs       r w k v a b, each [n, H, N], contiguous; products are made in the dtype of v
    state        fp32 [R, H, N value, N key], its rows contiguous; start int [S]
    y            out, [n, H, N]
    final        out, fp32 [K, H, N value, N key], its rows contiguous; to int [S], -1 for none
    returns      the states before each block, fp32 [blocks, H, N value, N key]
    """
    r, w, k, v, _, b = inputs
    _, H, N = r.shape
    first, length, begin, count = blocks
    size, V = _size7(v), min(_size7(v)["P"], 32)
    read, write, _ = _blocks7(inputs, blocks, keep=False)
    starts = state.new_empty(len(first), H, N, N)
    wkv7_pass[len(start), H, triton.cdiv(N, V)](
        w, k, v, b, first, length, begin, count, state, state.stride(0), start, read, write, starts,
        final, final.stride(0), to, V=V, **size,
    )  # fmt: skip
    wkv7_outputs[len(first), H](r, w, k, v, b, first, length, write, starts, y, **size)
    return starts


def wkv7_backward(inputs: Tensors, starts: Tensor, blocks: Blocks, dy: Tensor, d_final: Tensor) -> Tensors:
    """The gradients of r w k v a b, each [n, H, N], and of the states that S segments start from, fp32 [S, H, N, N].

    inputs    as `wkv7` had them; starts as it returned them
    dy        [n, H, N], of its outputs, contiguous
    d_final   fp32 [S, H, N value, N key], of the state that each segment ends in, contiguous
    """
    r, w, _, v, _, b = inputs
    _, H, N = r.shape
    first, length, begin, count = blocks
    size, V = _size7(v), min(_size7(v)["P"], 32)
    read, u, inverse = _blocks7(inputs, blocks, keep=True)
    du, d_ends, d_start = torch.empty_like(u), torch.empty_like(starts), torch.empty_like(d_final)
    gradients = tuple(torch.empty_like(z) for z in inputs)
    wkv7_back_blocks[len(first), H](r, w, b, dy, first, length, starts, read, u, du, **size)
    wkv7_back_pass[len(count), H, triton.cdiv(N, V)](
        r, w, b, dy, first, length, begin, count, d_final, read, du, d_ends, d_start, V=V, **size
    )
    wkv7_back_outputs[len(first), H](
        *inputs, dy, first, length, starts, inverse, u, du, d_ends, *gradients, num_warps=8, **size
    )
    return *gradients, d_start


class _Wkv7(torch.autograd.Function):
    """`wkv7` with gradients, which keep the state before each block and compute all else again."""

    @staticmethod
    def forward(ctx: Any, blocks: Blocks, start: Tensor, state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, final = torch.empty_like(inputs[3]), state.new_empty(len(start), *state.shape[1:])
        starts = wkv7(inputs, state, start, blocks, y, final, torch.arange(len(start), device=start.device))
        ctx.blocks, ctx.n_rows = blocks, len(state)
        ctx.save_for_backward(start, starts, *inputs)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        start, starts, *inputs = ctx.saved_tensors
        *gradients, d_start = wkv7_backward(tuple(inputs), starts, ctx.blocks, *(z.contiguous() for z in d_outputs))
        d_state = d_start.new_zeros(ctx.n_rows, *d_start.shape[1:]).index_put_((start,), d_start, accumulate=True)
        return None, None, d_state, *gradients


def _segments7(
    inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
) -> tuple[Tensor, Tensors]:
    """RWKV-7 over segments, as `kernels.Recurrence` defines it."""
    inputs, given = tuple(z.contiguous() for z in inputs), state[0].contiguous()
    blocks = blocks_of(offsets, block_tokens(inputs[3].dtype))
    y, final = _Wkv7.apply(blocks, start, given, *inputs)
    return y, (final[keep],)


def _segments6(
    inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
) -> tuple[Tensor, Tensors]:
    """RWKV-5 and 6 over segments, as `kernels.Recurrence` defines it."""
    r, w, k, v = (z.contiguous() for z in inputs)
    given, u = state[0].contiguous(), constants[0].contiguous()
    _, H, N = r.shape
    P = max(16, triton.next_power_of_2(N))
    first, length, begin, count = blocks_of(offsets, GROUPS * PAIRS)
    starts, final = given.new_empty(len(first), H, N, N), given.new_empty(len(start), H, N, N)
    y, size, V = torch.empty_like(v), {"H": H, "N": N, "T": GROUPS * PAIRS, "P": P} | _kind(v.dtype), min(P, 32)
    wkv6_pass[len(start), H, triton.cdiv(N, V)](
        w, k, v, first, length, begin, count, given, start, starts, final, V=V, **size
    )
    wkv6_outputs[len(first), H, GROUPS](r, w, k, v, u, first, length, starts, y, G=PAIRS, **size)
    return y, (final[keep],)


def _segments4(
    inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
) -> tuple[Tensor, Tensors]:
    """RWKV-4 over segments, as `kernels.Recurrence` defines it."""
    w, k, v = (z.contiguous() for z in inputs)
    given, u = torch.stack(state, dim=1), constants[0].contiguous()
    C, V = v.shape[-1], 128
    first, length, begin, count = blocks_of(offsets, GROUPS * PAIRS)
    sums, final = given.new_empty(len(first), 4, C), given.new_empty(len(start), 3, C)
    y, tiles = torch.empty_like(v), triton.cdiv(C, V)
    wkv4_blocks[len(first), tiles](w, k, v, first, length, sums, C, V=V)
    wkv4_pass[len(start), tiles](sums, begin, count, given, start, final, C, V=V)
    wkv4_outputs[len(first), tiles](w, k, v, u, first, length, sums, y, C, V=V)
    return y, final[keep].unbind(1)


SEGMENTS = {4: _segments4, 6: _segments6, 7: _segments7}


def rows(version: int, inputs: Tensors, constants: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
    """Rows of equal length as segments, as `kernels.Recurrence` defines it."""
    B, T = inputs[0].shape[:2]
    device = inputs[0].device
    every = torch.arange(B, device=device)
    offsets = torch.arange(0, B * T + 1, T, device=device)
    flat = tuple(z.flatten(0, 1) for z in inputs)
    y, new = SEGMENTS[version](flat, constants, state, offsets, every, every)
    return y.view(B, T, *y.shape[1:]), new
