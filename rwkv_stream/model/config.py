"""The dimensions of a model, all of them read from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_stream.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]  # tensor name → shape


@dataclass(frozen=True, slots=True)
class Config:
    """`low_ranks` holds (name, rank) of the low-rank maps; RWKV-7 has w, a, g and, beyond one layer, v."""

    version: int
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    d_ffn: int
    vocab_size: int
    low_ranks: tuple[tuple[str, int], ...] = ()


def shape_of(shapes: Shapes, name: str, axes: str) -> tuple[int, ...]:
    """The shape of a tensor that fixes dimensions, one letter of `axes` for each. Raises CheckpointError."""
    found = shapes.get(name)
    if found is None:
        raise CheckpointError(f"expected a tensor '{name}', found none; the file is incomplete, get it again")
    if len(found) != len(axes) or 0 in found:
        raise CheckpointError(
            f"expected tensor '{name}' as [{', '.join(axes)}], found {list(found)}; get the file again"
        )
    return found
