"""Tensors that are still in their files: what every container gives, and every name map passes on.

Nothing is read until `Source.read` is called, so that a checkpoint is made ready, hashed or rewritten one tensor at a
time, whatever its container and however it has to be renamed, transposed or dequantised.
"""

from __future__ import annotations

import abc
import math
import mmap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_stream.model.config import GROUP_NORM_EPS


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


class MappedFile:
    """All bytes of a file that is not empty, mapped: what stands in it later under its name is not seen.

    Pages that were read count as memory of the process. Each `read` gives those back that were read before; a tensor
    over them stays right, unless it was written to.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self.mapping)

    def read(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """dtype [count], as the bytes from `start` on are; a copy where torch could not use them where they are."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)
        found = torch.frombuffer(self.mapping, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        if found.data_ptr() % dtype.itemsize:  # not every format aligns its tensors
            found = found.clone()
        return found.view(dtype)


Sources = Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Container(abc.ABC):
    """What a checkpoint file, or a folder of them, holds, and what it means.

    kind      "pth", "safetensors", "hf", "gguf" or "rwkv.cpp"
    files     all files that were opened: their size, time of change and inode are the identity of the checkpoint
    sources   tensor name → source, names as the container has them
    metadata  of the container: `config.json` of a Hugging Face folder, the keys of a GGUF, those of safetensors
    """

    kind: str
    files: tuple[Path, ...]
    sources: Sources
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @abc.abstractmethod
    def official(self) -> dict[str, Source]:
        """The tensors by official names, in official shapes. Raises CheckpointError."""

    def group_norm_eps(self, version: str, head_size: int) -> float:
        """Of the norm of every head, as the program computes it that the container is made for."""
        return GROUP_NORM_EPS


def a_few(names: Collection[str]) -> str:
    """A few of these names, for a message."""
    shown = ", ".join(f"'{name[:80]}'" for name in sorted(names)[:3])
    return (shown or "nothing") + (f" and {len(names) - 3} more" if len(names) > 3 else "")
