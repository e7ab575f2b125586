"""RWKV-6 "Finch" (x060): a matrix for every head, token shift and decays that depend on the data.

Shapes as in `network`; mixing vectors are 0 for the token itself. D is the rank of mixing, E that of the decay. Blocks
that are prepared hold the mixing vectors as rows of `att.mix_x` (for what depends on the data), `att.mix` (w k v r g)
and `ffn.mix` (k r), and the second matrices of mixing one by one, `att.maa_w2` to `att.maa_g2`. A model that was
trained with the "spike fix" of its keys cannot be told from others, and is read without it.
Source: Eagle and Finch paper (arXiv 2404.05892), section 4; BlinkDL/RWKV-LM: RWKV-v5/src/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.config import Config, Shapes, n_blocks, shape_of
from rwkv_stream.model.network import (
    Block,
    Projections,
    TokenShift,
    gated_channel_mix,
    group_norm,
    in_heads,
    linear,
    low_rank,
    mixing_rows,
    transposed,
)

UNUSED: tuple[str, ...] = ()

MIXED = "wkvrg"  # the order inside `time_maa_w1` and `time_maa_w2`


def config(version: str, shapes: Shapes) -> Config:
    """The dimensions, from the canonical shapes of a checkpoint. Raises CheckpointError."""
    V, C = shape_of(shapes, "emb.weight", "VC")
    H, N = shape_of(shapes, "blocks.0.att.time_faaaa", "HN")
    d_ffn, _ = shape_of(shapes, "blocks.0.ffn.key.weight", "FC")
    if H * N != C:
        raise CheckpointError(f"expected {H} heads of {N} to make the width, found width {C}; get the file again")
    return Config(
        version,
        n_layer=n_blocks(shapes),
        n_embd=C,
        n_head=H,
        head_size=N,
        d_ffn=d_ffn,
        vocab_size=V,
        low_ranks=(
            ("mix", shape_of(shapes, "blocks.0.att.time_maa_w2", "5RC")[1]),
            ("decay", shape_of(shapes, "blocks.0.att.time_decay_w1", "CR")[1]),
        ),
    )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → canonical shape of every tensor of a checkpoint with these dimensions."""
    V, C, d_ffn = config.vocab_size, config.n_embd, config.d_ffn
    D, E = (rank for _, rank in config.low_ranks)
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        expected |= {f"{block}.att.time_maa_{j}": (C,) for j in "xwkvrg"}
        expected |= {f"{block}.ffn.time_maa_{j}": (C,) for j in "kr"}
        expected |= {f"{block}.att.time_maa_w1": (C, 5 * D), f"{block}.att.time_maa_w2": (5, D, C)}
        expected |= {f"{block}.att.time_decay_w1": (C, E), f"{block}.att.time_decay_w2": (E, C)}
        expected[f"{block}.att.time_decay"] = (C,)
        expected[f"{block}.att.time_faaaa"] = (config.n_head, config.head_size)
        expected |= {f"{block}.att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "gate", "output")}
        expected |= {f"{block}.ffn.key.weight": (d_ffn, C), f"{block}.ffn.value.weight": (C, d_ffn)}
        expected[f"{block}.ffn.receptance.weight"] = (C, C)
    return expected | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def prepare(block: Block, config: Config) -> dict[str, Tensor]:
    """The tensors of `block` with what concerns mixing in the form that is computed with."""
    ready = dict(block)
    ready["att.mix_x"] = mixing_rows(ready, "att.time_maa_x")
    ready["att.mix"] = mixing_rows(ready, *(f"att.time_maa_{j}" for j in MIXED))
    ready["ffn.mix"] = mixing_rows(ready, *(f"ffn.time_maa_{j}" for j in "kr"))
    ready["att.maa_1"] = ready.pop("att.time_maa_w1")
    return ready | {f"att.maa_{j}2": w2 for j, w2 in zip(MIXED, ready.pop("att.time_maa_w2"), strict=True)}


def before_wkv(mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
    """Token shift and projections: r w k v [B, T, H, N] (w is log-decay), u [H, N], gate [B, T, C]."""
    u = block["att.time_faaaa"]
    z = linear(mix(block["att.mix_x"])[0], transposed(block["att.maa_1"]), "tanh", is_read_next=True)  # [B, T, 5 D]
    parts = zip(MIXED, z.chunk(5, dim=-1), strict=True)
    xw, xk, xv, xr, xg = mix(block["att.mix"], [linear(part, transposed(block[f"att.maa_{j}2"])) for j, part in parts])

    w = block["att.time_decay"] + low_rank(xw, block["att.time_decay_w1"], block["att.time_decay_w2"], "tanh")
    r, k, v = (
        in_heads(linear(x, block[f"att.{name}.weight"]), u)
        for x, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
    )
    gate = linear(xg, block["att.gate.weight"], "silu")
    return Projections((r, in_heads(-torch.exp(w), u), k, v), (u,), gate=gate)


def after_wkv(y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
    """GroupNorm, gate and output: y [B, T, H, N] → [B, T, C]."""
    return linear(group_norm(y, block, group_norm_eps) * projections.gate, block["att.output.weight"])


def channel_mix(mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """[B, T, C], to be added."""
    return gated_channel_mix(mix, block)
