"""RWKV-5 "Eagle" (5.0, 5.1, 5.2): a matrix for every head, decays that do not depend on the data.

Shapes as in `network`. Prepared blocks hold `att.w` (log-decay) and `att.u` (bonus) `[H, N]`, and the mixing vectors as
rows of `att.mix` (k v r g) and `ffn.mix` (k r), 0 for the token itself. 5.0 has no gate; 5.0 and 5.1 have one decay and
bonus for a head, 5.2 for each channel.
Source: Eagle and Finch paper (arXiv 2404.05892), section 4; BlinkDL/ChatRWKV: rwkv_pip_package/src/rwkv/model.py.
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
    mixing_rows,
)

UNUSED: tuple[str, ...] = ()


def config(version: str, shapes: Shapes) -> Config:
    """The dimensions, from the canonical shapes of a checkpoint. Raises CheckpointError."""
    V, C = shape_of(shapes, "emb.weight", "VC")
    H = shape_of(shapes, "blocks.0.att.time_decay", "HN" if version == "5.2" else "H")[0]
    d_ffn, _ = shape_of(shapes, "blocks.0.ffn.key.weight", "FC")
    if C % H != 0:
        raise CheckpointError(f"expected {H} heads to divide the width, found width {C}; get the file again")
    return Config(
        version,
        n_layer=n_blocks(shapes),
        n_embd=C,
        n_head=H,
        head_size=C // H,
        d_ffn=d_ffn,
        vocab_size=V,
        is_bonus_log="blocks.0.att.time_first" in shapes,
    )


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → canonical shape of every tensor of a checkpoint with these dimensions."""
    V, C, d_ffn = config.vocab_size, config.n_embd, config.d_ffn
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    per_head = (config.n_head, config.head_size) if config.version == "5.2" else (config.n_head,)
    has_gate = config.version != "5.0"
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        expected[f"{block}.att.time_decay"] = per_head
        expected[f"{block}.att.{'time_first' if config.is_bonus_log else 'time_faaaa'}"] = per_head
        expected |= {f"{block}.att.time_mix_{j}": (C,) for j in ("kvrg" if has_gate else "kvr")}
        expected |= {f"{block}.ffn.time_mix_{j}": (C,) for j in "kr"}
        expected |= {f"{block}.att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        if has_gate:
            expected[f"{block}.att.gate.weight"] = (C, C)
        expected |= {f"{block}.ffn.key.weight": (d_ffn, C), f"{block}.ffn.value.weight": (C, d_ffn)}
        expected[f"{block}.ffn.receptance.weight"] = (C, C)
    return expected | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def prepare(block: Block, config: Config) -> dict[str, Tensor]:
    """The tensors of `block` with decay, bonus and mixing vectors in the form that is computed with."""
    ready = dict(block)
    H, N = config.n_head, config.head_size
    ready["att.w"] = -torch.exp(ready.pop("att.time_decay")).view(H, -1).expand(H, N).contiguous()
    bonus = ready.pop("att.time_first").exp() if config.is_bonus_log else ready.pop("att.time_faaaa")
    ready["att.u"] = bonus.view(H, -1).expand(H, N).contiguous()
    has_gate = "att.gate.weight" in ready
    ready["att.mix"] = 1 - mixing_rows(ready, *(f"att.time_mix_{j}" for j in ("kvrg" if has_gate else "kvr")))
    ready["ffn.mix"] = 1 - mixing_rows(ready, *(f"ffn.time_mix_{j}" for j in "kr"))
    return ready


def before_wkv(mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
    """Token shift and projections: r w k v [B, T, H, N] (w is log-decay), u [H, N], gate [B, T, C]."""
    w, u = block["att.w"], block["att.u"]
    xk, xv, xr, *xg = mix(block["att.mix"])
    r, k, v = (
        in_heads(linear(x, block[f"att.{name}.weight"]), w)
        for x, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
    )
    gate = linear(xg[0], block["att.gate.weight"], "silu") if xg else 1.0
    return Projections((r, w.expand_as(k), k, v), (u,), gate=gate)


def after_wkv(y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
    """GroupNorm, gate and output: y [B, T, H, N] → [B, T, C]."""
    return linear(group_norm(y, block, group_norm_eps) * projections.gate, block["att.output.weight"])


def channel_mix(mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """[B, T, C], to be added."""
    return gated_channel_mix(mix, block)
