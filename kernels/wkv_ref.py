"""The RWKV-7 recurrence in plain torch: the sequential form, which is the truth, and its matrix form.

Both run on any device, in the dtype of their inputs, and are differentiable in all of them.
Source: RWKV-7 paper (arXiv 2503.14456), section 4; BlinkDL/RWKV-LM: RWKV-v7/rwkv_v7_demo_rnn.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Wkv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

BLOCK_TOKENS = 64  # |log-decay| < exp(-1/2), so a block's decays sum to less than 39: exp(±39) is safe in float32


def wkv7_recurrent(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """RWKV-7 recurrence over T tokens, one after the other.

        S = S diag(exp w) + (S a) bᵀ + v kᵀ        y = S r        (S is read after it is written)

    r w k v a b : [B, T, H, N], one dtype; w is log-decay, w <= 0
    state       : [B, H, N value, N key], read only
    returns     : y [B, T, H, N], new state
    """
    S, ys = state, []
    for rt, wt, kt, vt, at, bt in zip(*(z.unbind(1) for z in (r, w, k, v, a, b)), strict=True):  # each [B, H, N]
        sa = S @ at.unsqueeze(-1)  # [B, H, N, 1]
        S = S * wt.exp().unsqueeze(-2) + sa * bt.unsqueeze(-2) + vt.unsqueeze(-1) * kt.unsqueeze(-2)
        ys.append((S @ rt.unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=1), S


def wkv7_chunked(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by matrix products over blocks of up to 64 tokens, for log-decays in (-exp(-1/2), 0] as the model makes.

    Within a block, with c the running sum of w, e = c - w, and one row per token:
        U = S_{t-1} a_t solves (I - P) U = Q V + (A exp e) Sᵀ     P, Q: a against b, k of earlier tokens
        Y = B U + G V + (R exp c) Sᵀ                              B, G: r against b, k of tokens up to its own
    Decays between two tokens are products of two factors, taken from the middle of the block so that neither leaves
    the range of float32. Arguments and results as `wkv7_recurrent`.
    """
    outputs = []
    for start in range(0, r.shape[1], BLOCK_TOKENS):
        rows = slice(start, start + BLOCK_TOKENS)
        rb, wb, kb, vb, ab, bb = (z[:, rows].transpose(1, 2) for z in (r, w, k, v, a, b))
        y, state = _block(rb, wb, kb, vb, ab, bb, state)
        outputs.append(y)
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _block(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One block, its inputs and y [B, H, t, N]."""
    t = r.shape[2]
    c = w.cumsum(2)
    e = c - w
    middle = c[:, :, t // 2 : t // 2 + 1]
    later = (middle - c).exp()  # what a write at this token is multiplied by to stand at the middle
    kl, bl = (k * later).transpose(-1, -2), (b * later).transpose(-1, -2)
    rc, ae = r * (c - middle).exp(), a * (e - middle).exp()
    P, Q = (ae @ bl).tril(-1), (ae @ kl).tril(-1)
    B, G = (rc @ bl).tril(), (rc @ kl).tril()
    S = state.transpose(-1, -2)  # [B, H, N key, N value]
    U = torch.linalg.solve_triangular(
        torch.eye(t, dtype=r.dtype, device=r.device) - P, Q @ v + (a * e.exp()) @ S, upper=False, unitriangular=True
    )
    y = B @ U + G @ v + (r * c.exp()) @ S
    total = c[:, :, -1:]
    rest = (total - c).exp()  # decay from after this token to the end of the block
    new = state * total.exp() + U.transpose(-1, -2) @ (b * rest) + v.transpose(-1, -2) @ (k * rest)
    return y, new


def wkv7_packed(
    wkv: Wkv,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    state: Tensor,
    start: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:
    """Segments laid end to end, as `kernels.packed` defines it, through a `wkv` that takes [B, T, H, N].

    Segments of more than 2^(j-1) and up to 2^j tokens are padded to one batch: at most twice the work.
    """
    lengths = offsets.diff()
    doublings = torch.tensor([(length - 1).bit_length() for length in lengths.tolist()], device=r.device)
    y, last = torch.empty_like(v), state[start]  # [n, H, N], [S, H, N, N]
    for j in set(doublings.tolist()):
        segments = (doublings == j).nonzero()[:, 0]
        T = int(lengths[segments].max())
        token = torch.arange(T, device=r.device)
        is_real = token < lengths[segments, None]  # [B, T]
        index = (offsets[segments, None] + token) * is_real
        real = is_real[..., None, None]
        wb, kb, vb, ab, bb = (z[index] * real for z in (w, k, v, a, b))  # padding: decay 1, nothing written
        out, new = wkv(r[index], wb, kb, vb, ab, bb, state[start[segments]])
        y[index[is_real]], last[segments] = out[is_real], new
    return y, last[keep]
