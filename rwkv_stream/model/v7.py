"""RWKV-7 "Goose" (x070): the equations between two calls of the recurrence, for any number of tokens.

Shapes: B batch, T time, C width, H heads, N head size, C = H N. A `Block` is the mapping of one layer's tensors by
their official names without `blocks.{i}.`; vectors are 1-D fp32, `att.r_k` is `[H, N]` fp32, matrices may be fp32 or
bf16. The residual stream, the norms, the low-rank nonlinearities and everything around the recurrence are fp32.

The same functions serve reading, decoding and training: only the function `wkv` that computes the recurrence differs.
Source: RWKV-7 paper (arXiv 2503.14456), section 4; BlinkDL/RWKV-LM: RWKV-v7/rwkv_v7_demo.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.config import Config, Shapes, shape_of
from rwkv_stream.state import State

Block = Mapping[str, Tensor]
Wkv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
WkvPacked = Callable[..., tuple[Tensor, Tensor]]  # see `kernels.packed`

DECAY_SCALE = math.exp(-0.5)  # log decay lies in (-exp(-1/2), 0)
LN_EPS = 1e-5
GROUP_NORM_EPS = 64e-5  # 1e-5 · head_size_divisor², the divisor being 8 in every released model

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # saved by the training code, read by nothing


def config(shapes: Shapes) -> Config:
    """The dimensions, from the canonical shapes of a checkpoint. Raises CheckpointError."""
    V, C = shape_of(shapes, "emb.weight", "VC")
    H, N = shape_of(shapes, "blocks.0.att.r_k", "HN")
    d_ffn, _ = shape_of(shapes, "blocks.0.ffn.key.weight", "FC")
    if H * N != C:
        raise CheckpointError(f"expected {H} heads of {N} to make the width, found width {C}; get the file again")
    found = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    L = len(found)
    if found != set(range(L)):
        raise CheckpointError(
            f"expected blocks 0 to {max(found)}, found {L} of them; the file is incomplete, get it again"
        )
    ranks = [(j, shape_of(shapes, f"blocks.0.att.{j}1", "CR")[1]) for j in "wag"]
    if L > 1:
        ranks.append(("v", shape_of(shapes, "blocks.1.att.v1", "CR")[1]))
    return Config(7, n_layer=L, n_embd=C, n_head=H, head_size=N, d_ffn=d_ffn, vocab_size=V, low_ranks=tuple(ranks))


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → canonical shape of every tensor of a checkpoint with these dimensions."""
    V, C, d_ffn = config.vocab_size, config.n_embd, config.d_ffn
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        expected |= {f"{block}.att.x_{j}": (C,) for j in "rwkvag"}
        expected |= {f"{block}.{name}": (C,) for name in ("att.k_k", "att.k_a", "ffn.x_k")}
        expected |= {f"{block}.att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        expected |= {f"{block}.ffn.key.weight": (d_ffn, C), f"{block}.ffn.value.weight": (C, d_ffn)}
        expected[f"{block}.att.r_k"] = (config.n_head, config.head_size)
        for j, rank in config.low_ranks:
            if j != "v" or i > 0:
                expected |= {f"{block}.att.{j}1": (C, rank), f"{block}.att.{j}2": (rank, C)}
                if j != "g":
                    expected[f"{block}.att.{j}0"] = (C,)
    return expected | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def layer_norm(x: Tensor, block: Block, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"], LN_EPS)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`weight x` in the weight's dtype, returned in fp32; weight `[out, in]`."""
    return F.linear(x.to(weight.dtype), weight).float()


def low_rank(x: Tensor, block: Block, name: str, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`activation(x @ w1) @ w2` in fp32; w1 `[C, rank]`, w2 `[rank, C]`."""
    w1, w2 = block[f"att.{name}1"], block[f"att.{name}2"]
    z = (x.to(w1.dtype) @ w1).float()
    if activation is not None:
        z = activation(z)
    return (z.to(w2.dtype) @ w2).float()


def shift(h: Tensor, x_prev: Tensor, firsts: Tensor | None = None) -> Tensor:
    """The input of the previous token for each token: h `[B, T, C]`, x_prev `[B, C]` → `[B, T, C]`.

    With firsts int64 [S], h `[1, n, C]` holds S segments that begin at these tokens, and x_prev is `[S, C]`.
    """
    if firsts is None:
        return torch.cat([x_prev.unsqueeze(1), h[:, :-1]], dim=1)
    before = h.roll(1, dims=1)
    before[0, firsts] = x_prev
    return before


def before_wkv(
    x: Tensor, x_prev: Tensor, v_first: Tensor | None, block: Block, firsts: Tensor | None = None
) -> tuple[Tensor, ...]:
    """ln1, token shift and the projections of time-mix.

    x [B, T, C] fp32, x_prev [B, C], v_first [B, T, C] or None in layer 0; firsts and its shapes as in `shift`
    returns r w k v a b [B, T, H, N] (w is log-decay), g [B, T, C], v_first [B, T, C], h [B, T, C] (ln1 output)
    """
    B, T, _ = x.shape
    H, N = block["att.r_k"].shape
    h = layer_norm(x, block, "ln1")
    d = shift(h, x_prev, firsts) - h
    xr, xw, xk, xv, xa, xg = (h + d * block[f"att.x_{j}"] for j in "rwkvag")

    r = linear(xr, block["att.receptance.weight"])
    w = -DECAY_SCALE * torch.sigmoid(block["att.w0"] + low_rank(xw, block, "w", torch.tanh))
    k = linear(xk, block["att.key.weight"])
    v = linear(xv, block["att.value.weight"])
    a = torch.sigmoid(block["att.a0"] + low_rank(xa, block, "a"))  # the in-context learning rate
    g = low_rank(xg, block, "g", torch.sigmoid)
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(block["att.v0"] + low_rank(xv, block, "v"))

    kk = F.normalize((k * block["att.k_k"]).view(B, T, H, N), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * block["att.k_a"])
    r, w, k, v, a = (z.view(B, T, H, N) for z in (r, w, k, v, a))
    return r, w, k, v, -kk, kk * a, g, v_first, h


def after_wkv(
    x: Tensor,
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    x_prev: Tensor,
    block: Block,
    firsts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rest of time-mix, then channel-mix, both added to the residual stream.

    x [B, T, C], y r k v [B, T, H, N], g [B, T, C], x_prev [B, C] of channel-mix; returns x [B, T, C], h (ln2 output)
    """
    B, T, H, N = y.shape
    C = H * N
    y = F.group_norm(y.reshape(B * T, C), H, block["att.ln_x.weight"], block["att.ln_x.bias"], GROUP_NORM_EPS)
    bonus = (r * k * block["att.r_k"]).sum(-1, keepdim=True) * v
    x = x + linear((y.view(B, T, C) + bonus.reshape(B, T, C)) * g, block["att.output.weight"])

    h = layer_norm(x, block, "ln2")
    xk = h + (shift(h, x_prev, firsts) - h) * block["ffn.x_k"]
    return x + linear(torch.relu(linear(xk, block["ffn.key.weight"])) ** 2, block["ffn.value.weight"]), h


def forward(
    outer: Mapping[str, Tensor],
    blocks: Sequence[Block],
    tokens: Tensor,
    state: State,
    wkv: Wkv,
    lengths: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Read T tokens: tokens int64 [B, T], state of batch B (unchanged) → hidden [B, T, C] fp32 after ln_out, new state.

    outer    : the tensors outside the blocks, and `ln0` (`emb.weight`, `ln0.*`, `ln_out.*`)
    lengths  : int64 [B] or None; row b is made of its first lengths[b] tokens, what follows does not touch its state,
               and the hidden states there mean nothing
    """
    x = layer_norm(F.embedding(tokens, outer["emb.weight"]).float(), outer, "ln0")
    real = None
    if lengths is not None:
        real = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])[..., None, None].float()
    new: dict[str, list[Tensor]] = {name: [] for name in state}
    v_first = None
    for i, block in enumerate(blocks):
        r, w, k, v, a, b, g, v_first, h = before_wkv(x, state["att_x_prev"][:, i], v_first, block)
        new["att_x_prev"].append(_last(h, state["att_x_prev"][:, i], lengths))
        if real is not None:  # decay 1 and nothing written: padding leaves the state as it is
            w, k, v, a, b = (z * real for z in (w, k, v, a, b))
        y, kv = wkv(r, w, k, v, a, b, state["att_kv"][:, i])
        new["att_kv"].append(kv)
        x, h = after_wkv(x, y, r, k, v, g, state["ffn_x_prev"][:, i], block)
        new["ffn_x_prev"].append(_last(h, state["ffn_x_prev"][:, i], lengths))
    return layer_norm(x, outer, "ln_out"), State({name: torch.stack(parts, dim=1) for name, parts in new.items()})


def forward_packed(
    outer: Mapping[str, Tensor],
    blocks: Sequence[Block],
    tokens: Tensor,
    lengths: Tensor,
    state: State,
    start: Tensor,
    keep: Tensor,
    wkv: WkvPacked,
) -> tuple[Tensor, State]:
    """Read segments of several texts, laid end to end, as one row: only token shift and recurrence know their edges.

    tokens   : int64 [n]; lengths int64 [S], each 1 or more, together n
    state    : batch R; start int64 [S], the row of it that each segment starts from
    keep     : int64 [K], the segments whose state comes back
    returns  : hidden [n, C] fp32 after ln_out, state of batch K
    """
    ends = lengths.cumsum(0)
    firsts, lasts = ends - lengths, (ends - 1)[keep]
    offsets = F.pad(ends, (1, 0))
    x = layer_norm(F.embedding(tokens[None], outer["emb.weight"]).float(), outer, "ln0")
    new: dict[str, list[Tensor]] = {name: [] for name in state}
    v_first = None
    for i, block in enumerate(blocks):
        before = state["att_x_prev"][start, i]
        r, w, k, v, a, b, g, v_first, h = before_wkv(x, before, v_first, block, firsts)
        new["att_x_prev"].append(h[0, lasts])
        y, kv = wkv(*(z[0] for z in (r, w, k, v, a, b)), offsets, state["att_kv"][:, i], start, keep)
        new["att_kv"].append(kv)
        x, h = after_wkv(x, y[None], r, k, v, g, state["ffn_x_prev"][start, i], block, firsts)
        new["ffn_x_prev"].append(h[0, lasts])
    hidden = layer_norm(x, outer, "ln_out")[0]
    return hidden, State({name: torch.stack(parts, dim=1) for name, parts in new.items()})


def _last(h: Tensor, x_prev: Tensor, lengths: Tensor | None) -> Tensor:
    """The row that the next token will see as its previous one: [B, T, C], [B, C] → [B, C]."""
    if lengths is None:
        return h[:, -1].clone()  # not a view, which would keep all of h
    return torch.cat([x_prev.unsqueeze(1), h], dim=1)[torch.arange(len(h), device=h.device), lengths]
