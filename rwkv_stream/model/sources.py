"""Tensors that are still in their files: what every container gives, and every name map passes on.

Nothing is read until `Source.read` is called, so that a checkpoint is made ready, hashed or rewritten one tensor at a
time, whatever its container and however it has to be renamed, transposed or dequantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a checkpoint file.

    shape, dtype  of what `read` returns: float32, bfloat16 or float16 (quantised tensors are dequantised to float32)
    read          a contiguous CPU tensor, mapped from the file where its bytes are stored as they are
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Source:
        """The same tensor after `function`, which gives `shape` and keeps the dtype."""
        return Source(shape, self.dtype, lambda: function(self.read()).contiguous())


def of(tensor: Tensor) -> Source:
    """A tensor at hand."""
    return Source(tuple(tensor.shape), tensor.dtype, lambda: tensor)


Sources = Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Container:
    """What a checkpoint file, or a folder of them, holds.

    kind      "pth", "safetensors", "hf", "gguf" or "rwkv.cpp"
    files     all files that were opened: their size, time of change and inode are the identity of the checkpoint
    sources   tensor name → source, names as the container has them
    metadata  of the container: `config.json` of a Hugging Face folder, the keys of a GGUF, those of safetensors
    """

    kind: str
    files: tuple[Path, ...]
    sources: Sources
    metadata: Mapping[str, Any] = field(default_factory=dict)
