"""RWKV-6 "Finch" (x060): a matrix for every head, token shift and decays that depend on the data.

Shapes as in `network`; mixing vectors are 0 for the token itself. D is the rank of mixing, E that of the decay. A model
that was trained with the "spike fix" of its keys cannot be told from others, and is read without it.
Source: Eagle and Finch paper (arXiv 2404.05892), section 4; BlinkDL/RWKV-LM: RWKV-v5/src/model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.config import Config, Shapes, n_blocks, shape_of
from rwkv_stream.model.network import Before, Block, gated_channel_mix, group_norm, linear, low_rank

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
    """The tensors of `block`, with the static part of mixing as one `att.maa` [5, 1, 1, C]."""
    ready = {name.replace("ffn.time_maa_", "ffn.x_"): value for name, value in block.items()}
    ready["att.maa"] = torch.stack([ready.pop(f"att.time_maa_{j}") for j in MIXED])[:, None, None]
    return ready


def before_wkv(h: Tensor, previous: Tensor, block: Block, v_first: Tensor | None) -> Before:
    """Token shift and projections: h, previous [B, T, C] → r w k v [B, T, H, N] (w is log-decay), u [H, N], gate."""
    B, T, C = h.shape
    w1, w2, u = block["att.time_maa_w1"], block["att.time_maa_w2"], block["att.time_faaaa"]
    d = previous - h
    z = torch.tanh(((h + d * block["att.time_maa_x"]).to(w1.dtype) @ w1).float())  # [B, T, 5 D]
    m = torch.bmm(z.view(B * T, 5, -1).transpose(0, 1).to(w2.dtype), w2).float().view(5, B, T, C)
    xw, xk, xv, xr, xg = h + d * (block["att.maa"] + m)

    w = block["att.time_decay"] + low_rank(xw, block["att.time_decay_w1"], block["att.time_decay_w2"], torch.tanh)
    r, k, v = (
        linear(x, block[f"att.{name}.weight"]).view(B, T, *u.shape)
        for x, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
    )
    gate = F.silu(linear(xg, block["att.gate.weight"]))
    return Before((r, -torch.exp(w).view(B, T, *u.shape), k, v), (u,), gate=gate)


def after_wkv(y: Tensor, before: Before, block: Block, group_norm_eps: float) -> Tensor:
    """GroupNorm, gate and output: y [B, T, H, N] → [B, T, C]."""
    return linear(group_norm(y, block, group_norm_eps) * before.gate, block["att.output.weight"])


def channel_mix(h: Tensor, previous: Tensor, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """h, previous [B, T, C] → [B, T, C]."""
    return gated_channel_mix(h, previous, block)
