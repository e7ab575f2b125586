"""RWKV-4 "Dove" (Pile, Raven, Novel, World): one running average per channel, no heads.

Shapes as in `network`. Prepared blocks hold `att.w` (log-decay) and `att.u` `[C]`, and the mixing vectors as rows of
`att.mix` (k v r) and `ffn.mix` (k r), 0 for the token itself (files have 1 for it).
Source: RWKV-4 paper (arXiv 2305.13048), section 3; BlinkDL/ChatRWKV: RWKV_in_150_lines.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_stream.model.config import Config, Shapes, n_blocks, shape_of
from rwkv_stream.model.network import Block, Projections, TokenShift, gated_channel_mix, linear, mixing_rows

UNUSED: tuple[str, ...] = ()


def config(version: str, shapes: Shapes) -> Config:
    """The dimensions, from the canonical shapes of a checkpoint; every channel is a head. Raises CheckpointError."""
    V, C = shape_of(shapes, "emb.weight", "VC")
    d_ffn, _ = shape_of(shapes, "blocks.0.ffn.key.weight", "FC")
    return Config(version, n_layer=n_blocks(shapes), n_embd=C, n_head=C, head_size=1, d_ffn=d_ffn, vocab_size=V)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → canonical shape of every tensor of a checkpoint with these dimensions."""
    V, C, d_ffn = config.vocab_size, config.n_embd, config.d_ffn
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        norms += [f"{block}.ln1", f"{block}.ln2"]
        expected |= {f"{block}.att.{name}": (C,) for name in ("time_decay", "time_first")}
        expected |= {f"{block}.att.time_mix_{j}": (C,) for j in "kvr"}
        expected |= {f"{block}.ffn.time_mix_{j}": (C,) for j in "kr"}
        expected |= {f"{block}.att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        expected |= {f"{block}.ffn.key.weight": (d_ffn, C), f"{block}.ffn.value.weight": (C, d_ffn)}
        expected[f"{block}.ffn.receptance.weight"] = (C, C)
    return expected | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def prepare(block: Block, config: Config) -> dict[str, Tensor]:
    """The tensors of `block` with decay, bonus and mixing vectors in the form that is computed with."""
    ready = dict(block)
    ready["att.w"] = -torch.exp(ready.pop("att.time_decay"))
    ready["att.u"] = ready.pop("att.time_first")
    ready["att.mix"] = 1 - mixing_rows(ready, *(f"att.time_mix_{j}" for j in "kvr"))
    ready["ffn.mix"] = 1 - mixing_rows(ready, *(f"ffn.time_mix_{j}" for j in "kr"))
    return ready


def before_wkv(mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
    """Token shift and projections: w k v [B, T, C] (w is log-decay), u [C], gate [B, T, C]."""
    xk, xv, xr = mix(block["att.mix"])
    k, v = linear(xk, block["att.key.weight"]), linear(xv, block["att.value.weight"])
    r = linear(xr, block["att.receptance.weight"], "sigmoid")
    return Projections((block["att.w"].expand_as(k), k, v), (block["att.u"],), gate=r)


def after_wkv(y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
    """Receptance and output: y [B, T, C] → [B, T, C]."""
    return linear(projections.gate * y, block["att.output.weight"])


def channel_mix(mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """[B, T, C], to be added."""
    return gated_channel_mix(mix, block)
