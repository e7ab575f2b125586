"""What tensors of a checkpoint are kept in while a model is loaded, and the names of dtypes."""

from __future__ import annotations

import re
from typing import Protocol

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Rows of these are used, not the whole; and small tensors beside the vectors that are computed with in fp32.
TABLES = ("emb.weight", "ffn.s_emb.weight")
LOW_RANKS = re.compile(r"att\.([wagv]|time_decay_w|maa_[wkvrg]?)[12]|ffn\.s[12]")  # [in, out]
FP32 = ("att.r_k", "att.time_decay", "att.time_first", "att.time_faaaa")


class Stored(Protocol):
    """A tensor as its checkpoint has it, read or not."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...


def dtype_in_memory(name: str, stored: Stored, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept in while the model is loaded with this dtype."""
    if name.endswith(TABLES):
        return stored.dtype
    return torch.float32 if len(stored.shape) == 1 or name.endswith(FP32) else dtype
