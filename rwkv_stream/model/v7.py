"""RWKV-7 "Goose" (x070), and 7a with DeepEmbed: the equations between two calls of the recurrence.

The same functions serve reading, decoding and training. Shapes as in `network`; `att.r_k` is `[H, N]` fp32. Prepared
blocks hold the mixing vectors as rows of `att.mix` (r w k v a g) and `ffn.mix` (k; for DeepEmbed then 0, the token
itself).
Source: RWKV-7 paper (arXiv 2503.14456), section 4; BlinkDL/RWKV-LM: RWKV-v7/rwkv_v7_demo.py; for 7a
BlinkDL/ChatRWKV: rwkv_pip_package/src/rwkv/model.py (RWKV_DE_VERSION=1).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.config import Config, Shapes, n_blocks, shape_of
from rwkv_stream.model.network import (
    Block,
    Projections,
    TokenShift,
    group_norm,
    in_heads,
    linear,
    low_rank,
    mixing_rows,
    transposed,
)

DECAY_SCALE = math.exp(-0.5)  # log decay lies in (-exp(-1/2), 0)

UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # saved by the training code, read by nothing


def config(version: str, shapes: Shapes) -> Config:
    """The dimensions, from the canonical shapes of a checkpoint. Raises CheckpointError."""
    V, C = shape_of(shapes, "emb.weight", "VC")
    H, N = shape_of(shapes, "blocks.0.att.r_k", "HN")
    d_ffn, _ = shape_of(shapes, "blocks.0.ffn.key.weight", "FC")
    if H * N != C:
        raise CheckpointError(f"expected {H} heads of {N} to make the width, found width {C}; get the file again")
    L = n_blocks(shapes)
    ranks = [(j, shape_of(shapes, f"blocks.0.att.{j}1", "CR")[1]) for j in "wag"]
    if L > 1:
        ranks.append(("v", shape_of(shapes, "blocks.1.att.v1", "CR")[1]))
    if version == "7a":
        ranks.append(("s", shape_of(shapes, "blocks.0.ffn.s1", "CR")[1]))
    return Config(
        version, n_layer=L, n_embd=C, n_head=H, head_size=N, d_ffn=d_ffn, vocab_size=V, low_ranks=tuple(ranks)
    )


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
            if j == "s":
                expected |= {f"{block}.ffn.s1": (C, rank), f"{block}.ffn.s2": (rank, d_ffn)}
                expected |= {f"{block}.ffn.s_emb.weight": (V, rank**2), f"{block}.ffn.s_emb_x.weight": (rank**2, C)}
                expected[f"{block}.ffn.s0"] = (d_ffn,)
            elif j != "v" or i > 0:
                expected |= {f"{block}.att.{j}1": (C, rank), f"{block}.att.{j}2": (rank, C)}
                if j != "g":
                    expected[f"{block}.att.{j}0"] = (C,)
    return expected | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def prepare(block: Block, config: Config) -> dict[str, Tensor]:
    """The tensors of `block`, with the mixing vectors as rows of matrices."""
    ready = dict(block)
    ready["att.mix"] = mixing_rows(ready, *(f"att.x_{j}" for j in "rwkvag"))
    ready["ffn.mix"] = mixing_rows(ready, "ffn.x_k")
    if "ffn.s0" in ready:
        ready["ffn.mix"] = F.pad(ready["ffn.mix"], (0, 0, 0, 1))
    return ready


def before_wkv(mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
    """Token shift and projections: r w k v a b [B, T, H, N] (w is log-decay), gate [B, T, C], v_first."""
    r_k = block["att.r_k"]
    xr, xw, xk, xv, xa, xg = mix(block["att.mix"])

    r = linear(xr, block["att.receptance.weight"])
    w = -DECAY_SCALE * torch.sigmoid(block["att.w0"] + low_rank(xw, block["att.w1"], block["att.w2"], "tanh"))
    k = linear(xk, block["att.key.weight"])
    v = linear(xv, block["att.value.weight"])
    a = torch.sigmoid(block["att.a0"] + low_rank(xa, block["att.a1"], block["att.a2"]))  # in-context learning rate
    g = low_rank(xg, block["att.g1"], block["att.g2"], "sigmoid")
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * torch.sigmoid(block["att.v0"] + low_rank(xv, block["att.v1"], block["att.v2"]))

    kk = F.normalize(in_heads(k * block["att.k_k"], r_k), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * block["att.k_a"])
    r, w, k, v, a = (in_heads(z, r_k) for z in (r, w, k, v, a))
    return Projections((r, w, k, v, -kk, kk * a), gate=g, v_first=v_first)


def after_wkv(y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
    """GroupNorm, bonus, gate and output: y [B, T, H, N] → [B, T, C]."""
    r, _, k, v, _, _ = projections.inputs
    normed = group_norm(y, block, group_norm_eps)
    bonus = (r * k * block["att.r_k"]).sum(-1, keepdim=True) * v
    return linear((normed + bonus.reshape(normed.shape)) * projections.gate, block["att.output.weight"])


def channel_mix(mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """[B, T, C], to be added; tokens [B, T] and embedded [B, T, C] matter to DeepEmbed alone."""
    xk, *h = mix(block["ffn.mix"])
    if not h:
        k = linear(xk, block["ffn.key.weight"], "relu2", is_read_next=True)
        return linear(k, block["ffn.value.weight"])
    of_token = F.embedding(tokens, block["ffn.s_emb.weight"]).float()
    table = of_token + linear(embedded, block["ffn.s_emb_x.weight"])
    z = linear(h[0], transposed(block["ffn.s1"])).unsqueeze(-2)
    rank = z.shape[-1]
    of_text = linear((z @ table.view(*table.shape[:-1], rank, rank)).squeeze(-2), transposed(block["ffn.s2"]))
    k = linear(xk, block["ffn.key.weight"], "relu2") * (of_text + block["ffn.s0"])
    return linear(k, block["ffn.value.weight"])
