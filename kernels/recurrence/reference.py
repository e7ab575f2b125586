"""The recurrences in plain torch: of each the sequential form, which is the truth, and the form over blocks of tokens.

All run on any device, in the dtype of their inputs, and are differentiable in all of them.
Source of RWKV-7: paper (arXiv 2503.14456), section 4; BlinkDL/RWKV-LM: RWKV-v7/rwkv_v7_demo_rnn.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Rows = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]

BLOCK_TOKENS = 64  # |log-decay| < exp(-1/2), so a block's decays sum to less than 39: exp(±39) is safe in float32
PAIRS_TOKENS = 16  # of blocks in which every pair of tokens has its own exponents


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


def wkv6_recurrent(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-5 and RWKV-6 recurrence over T tokens, one after the other.

        y = r (S + diag(u) kᵀ v)        S = diag(exp w) S + kᵀ v        (S is read before it is written)

    r w k v : [B, T, H, N], one dtype; w is log-decay, w <= 0
    u       : [H, N], the bonus of the token itself
    state   : [B, H, N key, N value], read only
    returns : y [B, T, H, N], new state
    source  : Eagle and Finch paper (arXiv 2404.05892), section 4
    """
    S, ys = state, []
    for rt, wt, kt, vt in zip(*(z.unbind(1) for z in (r, w, k, v)), strict=True):  # each [B, H, N]
        kv = kt.unsqueeze(-1) * vt.unsqueeze(-2)
        ys.append((rt.unsqueeze(-2) @ (S + u.unsqueeze(-1) * kv)).squeeze(-2))
        S = wt.exp().unsqueeze(-1) * S + kv
    return torch.stack(ys, dim=1), S


def wkv6_chunked(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same over blocks of up to 16 tokens, each from the state before it; for any log-decay w <= 0.

    Within a block, with W(i, t) the sum of w of the tokens after i and before t, 0 the state's own place:
        A[t, i] = sum_n r_t k_i exp W(i, t)  (i < t),   A[t, t] = sum_n r_t u k_t
        Y = A V + (R exp W(0, t)) S       S = diag(exp W(0, T + 1)) S + (K exp W(i, T + 1))ᵀ V
    Decays of RWKV-6 have no bound, so those between two tokens are neither split into two factors nor taken as the
    difference of two sums. Arguments and results as `wkv6_recurrent`.
    """
    outputs = []
    for start in range(0, r.shape[1], PAIRS_TOKENS):
        rb, wb, kb, vb = (z[:, start : start + PAIRS_TOKENS].transpose(1, 2) for z in (r, w, k, v))  # [B, H, t, N]
        before, between, after = _sums_of_decays(wb)
        A = torch.einsum("bhtn,bhin,bhtin->bhti", rb, kb, between.exp())
        A = A + torch.diag_embed((rb * u.unsqueeze(1) * kb).sum(-1))
        outputs.append(A @ vb + (rb * before.exp()) @ state)
        total = before[:, :, -1] + wb[:, :, -1]
        state = total.exp().unsqueeze(-1) * state + (kb * after.exp()).transpose(-1, -2) @ vb
    return torch.cat(outputs, dim=2).transpose(1, 2), state


def _sums_of_decays(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w [..., t, N] → its sums before each token, between two tokens [..., t, i, N] (-inf unless i < t), after each."""
    t = w.shape[-2]
    last = torch.cat([torch.zeros_like(w[..., :1, :]), w[..., :-1, :]], dim=-2)  # of the token before
    index = torch.arange(t, device=w.device)
    is_between = (index[:, None] - 1 > index)[..., None]
    between = torch.where(is_between, last.unsqueeze(-2), 0).cumsum(-3)
    between = between.masked_fill((index[:, None] <= index)[..., None], -torch.inf)
    after = torch.cat([w[..., 1:, :], torch.zeros_like(w[..., :1, :])], dim=-2).flip(-2).cumsum(-2).flip(-2)
    return last.cumsum(-2), between, after


def wkv4_recurrent(
    w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RWKV-4 recurrence over T tokens, one after the other: an average of v, weighted by exp k, that decays by exp w.

        q = max(top, u + k)    y = (exp(top - q) num + exp(u + k - q) v) / (exp(top - q) den + exp(u + k - q))
        q = max(top + w, k)    num = exp(top + w - q) num + exp(k - q) v,  den the same without v,  top = q

    w k v        : [B, T, C], one dtype; w is log-decay, w <= 0
    u            : [C], the bonus of the token itself
    num den top  : [B, C], read only; the sums are num exp(top) and den exp(top)
    returns      : y [B, T, C], new num, den, top
    source       : RWKV-4 paper (arXiv 2305.13048), appendix on numerical stability
    """
    ys = []
    for wt, kt, vt in zip(*(z.unbind(1) for z in (w, k, v)), strict=True):  # each [B, C]
        q = torch.maximum(top, u + kt)
        old, new = (top - q).exp(), (u + kt - q).exp()
        ys.append((old * num + new * vt) / (old * den + new))
        q = torch.maximum(top + wt, kt)
        old, new = (top + wt - q).exp(), (kt - q).exp()
        num, den, top = old * num + new * vt, old * den + new, q
    return torch.stack(ys, dim=1), num, den, top


def wkv4_chunked(
    w: Tensor, k: Tensor, v: Tensor, u: Tensor, num: Tensor, den: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same over blocks of up to 16 tokens, each from the sums before it.

    Token t reads these sums at exponent top + W(0, t), an earlier token i at W(i, t) + k_i, itself at u + k_t, with W
    as in `wkv6_chunked`; the largest of these is taken off before they are raised. Arguments and results as
    `wkv4_recurrent`.
    """
    outputs = []
    for start in range(0, w.shape[1], PAIRS_TOKENS):
        wb, kb, vb = (z[:, start : start + PAIRS_TOKENS] for z in (w, k, v))  # [B, t, C]
        before, between, after = _sums_of_decays(wb)
        values = torch.cat([num[:, None], vb], dim=1)  # [B, 1 + t, C], the sums before the block first
        weights = torch.cat([den[:, None], torch.ones_like(vb)], dim=1)
        itself = torch.eye(wb.shape[1], dtype=torch.bool, device=w.device)[..., None]
        between = torch.where(itself, (u + kb).unsqueeze(1), between + kb.unsqueeze(1))  # [B, t, i, C]
        exponents = torch.cat([(top[:, None] + before).unsqueeze(2), between], dim=2)  # [B, t, 1 + t, C]
        raised = (exponents - exponents.amax(2, keepdim=True)).exp()
        outputs.append((raised * values[:, None]).sum(2) / (raised * weights[:, None]).sum(2))
        exponents = torch.cat([(top + before[:, -1] + wb[:, -1])[:, None], after + kb], dim=1)  # [B, 1 + t, C]
        top = exponents.amax(1)
        raised = (exponents - top[:, None]).exp()
        num, den = (raised * values).sum(1), (raised * weights).sum(1)
    return torch.cat(outputs, dim=1), num, den, top


def padded_with(padding: tuple[float | None, ...], inputs: Tensors, is_padding: Tensor) -> Tensors:
    """The inputs [B, T, ...] with `padding` (`kernels.Recurrence`) where is_padding [B, T] says so."""
    return tuple(
        z if value is None else z.masked_fill(is_padding.view(*z.shape[:2], *[1] * (z.ndim - 2)), value)
        for z, value in zip(inputs, padding, strict=True)
    )


def segments(
    rows: Rows,
    padding: tuple[float | None, ...],
    inputs: Tensors,
    constants: Tensors,
    state: Tensors,
    offsets: Tensor,
    start: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensors]:
    """Segments laid end to end, as `kernels.Recurrence` defines it, through the recurrence over `rows`.

    Segments of more than 2^(j-1) and up to 2^j tokens are padded to one batch: at most twice the work.
    """
    lengths = offsets.diff()
    doublings = torch.tensor([(length - 1).bit_length() for length in lengths.tolist()], device=offsets.device)
    y, last = torch.empty_like(inputs[-1]), tuple(part[start] for part in state)
    for j in set(doublings.tolist()):
        chosen = (doublings == j).nonzero()[:, 0]
        T = int(lengths[chosen].max())
        token = torch.arange(T, device=offsets.device)
        is_real = token < lengths[chosen, None]  # [B, T]
        index = (offsets[chosen, None] + token) * is_real
        padded = padded_with(padding, tuple(z[index] for z in inputs), ~is_real)
        out, new = rows(padded, constants, tuple(part[start[chosen]] for part in state))
        y[index[is_real]] = out[is_real]
        for part, of_chosen in zip(last, new, strict=True):
            part[chosen] = of_chosen
    return y, tuple(part[keep] for part in last)


FORMS: dict[int, tuple[Callable[..., Tensors], Callable[..., Tensors]]] = {  # version → over tokens, over blocks
    4: (wkv4_recurrent, wkv4_chunked),
    6: (wkv6_recurrent, wkv6_chunked),
    7: (wkv7_recurrent, wkv7_chunked),
}
