"""What tensors of a checkpoint are kept in while a model is loaded, and the names of dtypes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rwkv_stream.model.checkpoints.sources import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Rows of these are used, not the whole; and small tensors beside the vectors that are computed with in fp32.
TABLES = ("emb.weight", "ffn.s_emb.weight")
LOW_RANKS = re.compile(r"att\.([wagv]|time_decay_w|maa_[wkvrg]?)[12]|ffn\.s[12]")  # [in, out]
FP32 = ("att.r_k", "att.time_decay", "att.time_first", "att.time_faaaa")


def dtype_in_memory(name: str, source: Source, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept in while the model is loaded with this dtype."""
    if name.endswith(TABLES):
        return source.dtype
    return torch.float32 if len(source.shape) == 1 or name.endswith(FP32) else dtype
