"""RWKV-7 as a CPU reads it: the equations of `v7`, all layers in one call, for segments of tokens laid end to end.

Without gradients. What lies between the matrices stands in tensors that are kept for the thread's next call, so that
reading allocates nothing but its results.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rwkv_stream.kernels.layers.cpu import Weight, layer_table, rwkv7_layers
from rwkv_stream.kernels.memory import MAPPED_BYTES, Buffers, pages
from rwkv_stream.model.config import Config
from rwkv_stream.model.network import Block, PackedBatch, Stream
from rwkv_stream.model.state import State

buffer = Buffers()


class Layers(list[Block]):
    """Blocks with packed matrices, and the table by which C++ finds what is in them."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)
        self.table = layer_table(self)


def layers(config: Config, blocks: Layers, stream: Stream, batch: PackedBatch) -> tuple[Stream, State]:
    """As `network.layers`, for tokens [1, n]; the stream is written over."""
    n, C = batch.tokens.shape[1], config.n_embd
    output: Weight = blocks[0]["att.output.weight"]
    dtype = output.input_dtype
    ranks = sum(rank for _, rank in config.low_ranks)
    buffers = (
        buffer("mixed", dtype, 6, n, C),
        buffer("projections", torch.float32, 8, n, C),
        buffer("ranks", dtype, n, ranks),
        buffer("out", dtype, n, C),
        buffer("hidden", dtype, n, config.d_ffn),
    )
    state, new = {name: z.contiguous() for name, z in batch.state.items()}, {}
    for name, z in state.items():
        new[name] = pages(batch.n_kept, *z.shape[1:], dtype=z.dtype, own_bytes=MAPPED_BYTES)
    sequences = list(state.values()), list(new.values()), batch.segments
    rwkv7_layers(blocks.table, config.group_norm_eps, stream.x[0], *sequences, buffers)
    return stream, State(new)
