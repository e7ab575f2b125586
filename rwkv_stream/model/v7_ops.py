"""RWKV-7 as a CPU reads it: the equations of `v7`, all layers in one call, for segments of tokens laid end to end.

Without gradients. What lies between the matrices stands in tensors that are kept for the thread's next call, so that
reading allocates nothing but its results.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels.memory import MAPPED_BYTES, pages
from rwkv_stream.kernels.ops import Weight, layer_table, rwkv7_layers
from rwkv_stream.model.config import Config
from rwkv_stream.model.network import Block, layer_norm
from rwkv_stream.state import State


class Layers(list[Block]):
    """Blocks with packed matrices, and the table by which C++ finds what is in them."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(_prepared(block) for block in blocks)
        self.table = layer_table(self)


def _prepared(block: Block) -> Block:
    """The mixing vectors as rows of one matrix [6, C], and views of it under their names."""
    mix = torch.stack([block[f"att.x_{j}"] for j in "rwkvag"])
    named = {f"att.x_{j}": mix[i] for i, j in enumerate("rwkvag")}
    v0 = block.get("att.v0", mix[0])  # layer 0 has none, and reads none
    return {**block, **named, "att.mix": mix, "att.v0": v0}


def forward(
    config: Config,
    outer: Block,
    layers: Layers,
    tokens: Tensor,
    state: State,
    segments: Sequence[Tensor],
    n_kept: int,
) -> tuple[Tensor, State]:
    """Read tokens int64 [n]: hidden fp32 [n, C] after ln_out, new state of `n_kept` rows.

    segments  offsets int64 [S + 1], start int64 [S] and to int64 [S], as `kernels.ops_ref` has them
    """
    n, C = len(tokens), config.n_embd
    output: Weight = layers[0]["att.output.weight"]
    dtype = output.input_dtype
    ranks = sum(rank for _, rank in config.low_ranks)
    buffers = (
        _buffer("mixed", dtype, 6, n, C),
        _buffer("projections", torch.float32, 8, n, C),
        _buffer("ranks", dtype, n, ranks),
        _buffer("out", dtype, n, C),
        _buffer("hidden", dtype, n, config.d_ffn),
    )
    x = layer_norm(F.embedding(tokens, outer["emb.weight"]).float(), outer, "ln0")
    given = [z.contiguous() for z in state.values()]
    new = State({name: pages(n_kept, *z.shape[1:], dtype=z.dtype, own_bytes=MAPPED_BYTES) for name, z in state.items()})
    rwkv7_layers(layers.table, config.group_norm_eps, x, given, list(new.values()), segments, buffers)
    return layer_norm(x, outer, "ln_out"), new


_buffers = threading.local()


def _buffer(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose contents are undefined, kept for the next call with this name."""
    size = torch.Size(shape).numel()
    kept: Tensor | None = getattr(_buffers, name, None)
    if kept is None or kept.dtype != dtype or kept.numel() < size:
        kept = pages(size, dtype=dtype)
        setattr(_buffers, name, kept)
    return kept[:size].view(shape)
