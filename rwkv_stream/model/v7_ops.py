"""RWKV-7 as a CPU reads it: the equations of `v7` in about a dozen ops a layer, for segments of tokens laid end to end.

Without gradients, for matrices that are packed (`prepare`). The projections and low ranks of a layer stand in tensors
that are kept for the thread's next call, so that reading allocates nothing but its results.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels.ops import Weight, linear, norm_shift_mix, time_mix
from rwkv_stream.model.config import Config
from rwkv_stream.model.network import Block, layer_norm
from rwkv_stream.state import State

VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")


def prepare(block: Block) -> dict[str, Tensor]:
    """The mixing vectors as rows of one matrix [6, C], and views of it under their names."""
    mix = torch.stack([block[f"att.x_{j}"] for j in "rwkvag"])
    named = {f"att.x_{j}": mix[i] for i, j in enumerate("rwkvag")}
    v0 = block.get("att.v0", mix[0])  # layer 0 has none and reads none
    return {**block, **named, "att.x": mix, "att.v0": v0}


def forward(
    config: Config,
    outer: Block,
    blocks: Sequence[Block],
    tokens: Tensor,
    state: State,
    segments: Sequence[Tensor],
    n_kept: int,
) -> tuple[Tensor, State]:
    """Read tokens int64 [n]: hidden fp32 [n, C] after ln_out, new state of `n_kept` rows.

    segments  offsets int64 [S + 1], start int64 [S] and to int64 [S], as `ops_ref` has them
    """
    n, C = len(tokens), config.n_embd
    dtype = blocks[0]["att.output.weight"].input_dtype
    new = State({name: z.new_empty(n_kept, *z.shape[1:]) for name, z in state.items()})
    att_x_prev, S, ffn_x_prev = state.values()
    new_att_x_prev, new_S, new_ffn_x_prev = new.values()

    mixed = _buffer("mixed", dtype, 6, n, C)
    xr, xw, xk, xv, xa, xg = mixed
    r, k, w, a, g, v_mix, v_first, v_layer = _buffer("projections", torch.float32, 8, n, C)
    ranks = dict(config.low_ranks)
    zw, za, zg, zv = (_buffer(f"rank {j}", dtype, n, ranks.get(j, 0)) for j in "wagv")
    out = _buffer("out", dtype, n, C)
    key = _buffer("key", dtype, n, config.d_ffn)

    x = layer_norm(F.embedding(tokens, outer["emb.weight"]).float(), outer, "ln0")
    for i, block in enumerate(blocks):
        att = {name: block[f"att.{name}.weight"] for name in ("receptance", "key", "value", "output")}
        norm_shift_mix(x, _norm(block, "ln1"), block["att.x"], att_x_prev[:, i], segments, mixed, new_att_x_prev[:, i])
        v = v_first if i == 0 else v_layer
        linear(xr, att["receptance"], r)
        linear(xk, att["key"], k)
        linear(xv, att["value"], v)
        _low_rank(xw, block, "w", "tanh", zw, w)
        _low_rank(xa, block, "a", "none", za, a)
        _low_rank(xg, block, "g", "sigmoid", zg, g)
        projections = [r, k, v, w, a, g]
        if i > 0:
            _low_rank(xv, block, "v", "none", zv, v_mix)
            projections += [v_mix, v_first]
        vectors = [block[f"att.{name}"] for name in VECTORS]
        time_mix(projections, vectors, config.group_norm_eps, S[:, i], segments, out, new_S[:, i])
        linear(out, att["output"], x, add=True)

        xk_ffn = mixed[:1]
        norm_shift_mix(
            x, _norm(block, "ln2"), block["ffn.x_k"][None], ffn_x_prev[:, i], segments, xk_ffn, new_ffn_x_prev[:, i]
        )
        linear(xk_ffn[0], block["ffn.key.weight"], key, "relu2")
        linear(key, block["ffn.value.weight"], x, add=True)
    return layer_norm(x, outer, "ln_out"), new


def _norm(block: Block, name: str) -> tuple[Tensor, Tensor]:
    return block[f"{name}.weight"], block[f"{name}.bias"]


def _low_rank(x: Tensor, block: Block, name: str, activation: str, z: Tensor, y: Tensor) -> None:
    first: Weight = block[f"att.{name}1"]
    second: Weight = block[f"att.{name}2"]
    linear(x, first, z, activation)
    linear(z, second, y)


_buffers = threading.local()


def _buffer(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose contents are undefined, kept for the next call with this name."""
    size = torch.Size(shape).numel()
    kept: Tensor | None = getattr(_buffers, name, None)
    if kept is None or kept.dtype != dtype or kept.numel() < size:
        kept = torch.empty(size, dtype=dtype)
        setattr(_buffers, name, kept)
    return kept[:size].view(shape)
