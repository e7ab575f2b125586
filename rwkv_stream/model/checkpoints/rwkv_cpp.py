"""The `.bin` files of rwkv.cpp: a header, then one tensor after the other without padding, and their official names.

Versions are 4, 5.0 (called 5.1 there), 5.1, 5.2, 6 and 7. Its converter stores exponentials of decays, adds and
removes axes of 1, transposes low ranks and stacks the mixing vectors of version 7; `official` undoes that.
Source: RWKV/rwkv.cpp (docs/FILE_FORMAT.md, rwkv_file_format.inc, python/convert_pytorch_to_ggml.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.checkpoints.gguf import (
    MAX_DIMS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    Cursor,
    check_count,
    rows,
    stored,
    transposed,
)
from rwkv_stream.model.checkpoints.sources import Container, MappedFile, Source

GGML_KINDS = {0: 0, 1: 1, 2: 2, 3: 3, 7: 6, 8: 7, 9: 8}  # FP32, FP16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
HEADER_KEYS = ("n_vocab", "n_embed", "n_layer")
V5_EPS = 1e-5
LEAST_DECAY = 2.0**-150  # is 0 in float32, where 0 itself would become an infinite log-decay


def read(path: Path) -> RwkvCpp:
    """Open a `.bin`; its metadata are the counts of its header. Raises CheckpointError, OSError."""
    file = MappedFile(path)
    header = Cursor(np.frombuffer(file.mapping, np.uint8))
    if (magic := header.take(4).tobytes()) != b"fmgg":
        raise CheckpointError(f"expected a file of rwkv.cpp, which begins with fmgg, found {magic!r}; get it again")
    version, *counts, _ = header.numbers("5I")
    if version not in (100, 101):
        raise CheckpointError(f"expected version 100 or 101 of rwkv.cpp's format, found {version}; get another file")
    sources: dict[str, Source] = {}
    while header.at < len(file):
        n_dims, n_name, kind = header.numbers("3I")
        check_count("axes of a tensor", n_dims, MAX_DIMS)
        check_count("bytes of a tensor's name", n_name, MAX_NAME_BYTES)
        shape = header.numbers(f"{n_dims}I")[::-1]
        name = header.text(n_name)
        if kind not in GGML_KINDS or (version == 100 and kind > 1):
            raise CheckpointError(
                f"expected tensors in FP32, FP16 or the blocks of version 101, found '{name}' in type {kind} of "
                f"version {version}, which rwkv.cpp no longer reads either; convert the official file again"
            )
        if name in sources:
            raise CheckpointError(f"expected each tensor once, found '{name}' twice; get the file again")
        sources[name], n_bytes = stored(file, header.at, name, shape, GGML_KINDS[kind])
        header.take(n_bytes)
        check_count("tensors", len(sources), MAX_TENSORS)
    return RwkvCpp("rwkv.cpp", (path,), sources, dict(zip(HEADER_KEYS, counts, strict=True)))


class RwkvCpp(Container):
    """A file of rwkv.cpp, by official names but in shapes and forms of its own."""

    def official(self) -> dict[str, Source]:
        """The tensors by official names, in canonical shapes. Raises CheckpointError."""
        sources = self.sources
        n_layer = len({name.split(".")[1] for name in sources if name.startswith("blocks.")})
        embedding = sources["emb.weight"].shape if "emb.weight" in sources else ()
        if [*embedding, n_layer] != [self.metadata[key] for key in HEADER_KEYS]:
            raise CheckpointError(
                f"expected {dict(self.metadata)}, as the header says, found embeddings of {list(embedding)} and "
                f"{n_layer} layers; get the file again"
            )
        undo = _undo(sources.keys())
        found: dict[str, Source] = {}
        for name, source in sources.items():
            block, _, part = name.rpartition("att.")
            if part == "x_rwkvag":
                found |= zip((f"{block}att.x_{j}" for j in "rwkvag"), rows(name, source, 6), strict=True)
            else:
                found[name] = undo[part](name, source) if block and part in undo else source
        return found

    def group_norm_eps(self, version: str, head_size: int) -> float:
        """That of RWKV-5 is not what the model was trained with."""
        return V5_EPS if version.startswith("5") else Container.group_norm_eps(self, version, head_size)


Undo = Callable[[str, Source], Source]


def _undo(names: Collection[str]) -> dict[str, Undo]:
    """Name within `att` → what makes the official tensor of it, by the version that has such names."""
    if "blocks.0.att.ln_x.weight" not in names:  # 4
        return {"time_decay": _elementwise(lambda decay: (-decay).log())}
    if "blocks.0.att.time_mix_k" in names:  # 5
        log_of_log = _elementwise(lambda decay: (-decay.clamp(min=LEAST_DECAY).log()).log())
        return {"time_decay": log_of_log, "time_first": _elementwise(Tensor.log), "time_faaaa": _squeezed}
    low_ranks = {f"{name}{i}": transposed for name in ("time_maa_w", "time_decay_w", *"wavg") for i in "12"}
    return {"time_decay": _flat, "time_faaaa": _squeezed, **low_ranks}  # 6, 7


def _elementwise(function: Callable[[Tensor], Tensor]) -> Undo:
    """Computed in float64, for the result to be within rounding of what was converted."""

    def undo(name: str, source: Source) -> Source:
        squeezed = _squeezed(name, source)
        return squeezed.map(lambda tensor: function(tensor.double()).to(tensor.dtype), squeezed.shape)

    return undo


def _flat(name: str, source: Source) -> Source:
    return source.map(Tensor.flatten, (math.prod(source.shape),))


def _squeezed(name: str, source: Source) -> Source:
    """Without the axes of one value at the end."""
    shape = source.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return source.map(lambda tensor: tensor.reshape(shape), shape)
