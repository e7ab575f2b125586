"""The dimensions of a model, all of them read from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_stream.errors import CheckpointError
from rwkv_stream.kernels.layers import LAYER_NORM_EPS as LAYER_NORM_EPS

Shapes = Mapping[str, tuple[int, ...]]  # tensor name → shape

GROUP_NORM_EPS: float = LAYER_NORM_EPS * 8**2


@dataclass(frozen=True, slots=True)
class Config:
    """
    version         "4", "5.0", "5.1", "5.2", "6", "7" or "7a" (`architectures.VERSIONS`)
    low_ranks       (name, rank) of the low-rank maps: RWKV-6 has mix and decay, RWKV-7 w, a, g, beyond one layer v,
                    and 7a s
    group_norm_eps  of the norm of every head: 1e-5 · head_size_divisor², the divisor being 8 in every released model;
                    a property of where the file comes from, as nothing in it tells
    is_bonus_log    of RWKV-5: the bonus is stored as its logarithm (`time_first`, else `time_faaaa`)
    """

    version: str
    n_layer: int
    n_embd: int
    n_head: int
    head_size: int
    d_ffn: int
    vocab_size: int
    low_ranks: tuple[tuple[str, int], ...] = ()
    group_norm_eps: float = GROUP_NORM_EPS
    is_bonus_log: bool = False


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


def n_blocks(shapes: Shapes) -> int:
    """How many blocks there are. Raises CheckpointError where one is missing."""
    found = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    if found != set(range(len(found))):
        raise CheckpointError(
            f"expected blocks 0 to {max(found)}, found {len(found)} of them; the file is incomplete, get it again"
        )
    return len(found)
