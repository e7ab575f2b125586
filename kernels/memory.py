"""Memory as the system counts it: large tensors in pages of their own, copies to devices, free memory given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_BYTES = 1 << 22
MAPPED_BYTES = 1 << 25  # what malloc maps anew each time, whatever it was asked for before


def pages(*shape: int, dtype: torch.dtype, own_bytes: int = HUGE_BYTES) -> Tensor:
    """A tensor with undefined contents; from `own_bytes` on in pages of its own, huge ones where the system has them.

    A fresh page costs more than computing what stands in it, and a matrix has more small pages than the processor
    remembers.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < own_bytes:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a wish: the system may have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Buffers(threading.local):
    """Tensors with undefined contents, by name, that each thread uses again in its next call.

    For each name a thread keeps at most HUGE_BYTES, or four times what its last call needed: what is larger goes back
    to the system.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """The tensor of a name, which stays valid until this thread asks for the name again."""
        n_bytes = math.prod(shape) * dtype.itemsize
        kept = self._kept.get(name)
        if kept is None or kept.nbytes < n_bytes or kept.nbytes > max(4 * n_bytes, HUGE_BYTES):
            self._kept.pop(name, None)
            self._kept[name] = kept = pages(n_bytes, dtype=torch.uint8)
        return kept[:n_bytes].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes that this thread keeps."""
        return sum(kept.nbytes for kept in self._kept.values())


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU from pinned memory, so that nobody waits for what the GPU does before."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def give_back() -> None:
    """Let the C library return what is free: glibc keeps the holes that freed tensors leave between small objects.

    Other C libraries are left to themselves.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
