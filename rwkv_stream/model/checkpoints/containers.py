"""Checkpoint files and folders: told apart by their first bytes, opened without reading a tensor.

Here stand safetensors and folders in the Hugging Face layout (`config.json` beside one weights file, or several with an
index); `.pth`, GGUF and rwkv.cpp have modules of their own.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import safetensors
import torch

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.checkpoints import pth
from rwkv_stream.model.checkpoints.names import HuggingFaceFolder, OfficialFile
from rwkv_stream.model.checkpoints.sources import Container, MappedFile, Source, a_few
from rwkv_stream.model.dtypes import DTYPE_NAMES, DTYPES

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a folder; the first that is there, alone or by its index
MAX_JSON_BYTES = 1 << 24
SHARED = 2  # a storage may stand for two tensors, as for `emb.weight` and `head.weight`


def open_container(path: Path) -> Container:
    """Open a checkpoint; its tensors, in fp32, bf16 or fp16, are read as they are used. Raises CheckpointError."""
    try:
        if path.is_dir():
            return _read_folder(path)
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(b"GGUF"):
            from rwkv_stream.model.checkpoints import gguf

            return gguf.read(path)
        if start.startswith(b"fmgg"):
            from rwkv_stream.model.checkpoints import rwkv_cpp

            return rwkv_cpp.read(path)
        return _read_file(path, start)
    except (OSError, ValueError) as error:  # of a name that no file can have
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"expected a model file, found: {reason.lower()}") from error


def _read_file(path: Path, start: bytes) -> Container:
    if start[8:] == b"{":  # behind the length of its header, the header
        container = _read_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):  # torch's zip form, and its older form of pickles in a row
        container = pth.read(path)
    else:
        raise CheckpointError(
            "expected a checkpoint (.pth, .safetensors, .gguf, rwkv.cpp's .bin or a Hugging Face folder), "
            "found another kind of file"
        )
    for name, source in container.sources.items():
        if source.dtype not in DTYPE_NAMES:
            raise _unsupported(name, str(source.dtype).removeprefix("torch."))
    size_bytes = path.stat().st_size
    if (claimed := sum(source.nbytes for source in container.sources.values())) > SHARED * size_bytes:
        raise CheckpointError(
            f"expected tensors of at most {SHARED * size_bytes} bytes ({SHARED} times the file's), found {claimed}; "
            "get it again"
        )
    return container


def _unsupported(name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"expected tensors in {', '.join(DTYPES)}, found '{name:.80}' in {dtype}; get the unquantised file"
    )


def _read_safetensors(path: Path) -> Container:
    file = MappedFile(path)
    try:
        with safetensors.safe_open(path, framework="np"):  # its header is sound
            pass
        (n_header,) = struct.unpack_from("<Q", file.mapping)
        header = json.loads(file.mapping[8 : 8 + n_header])
        metadata = header.pop("__metadata__", None) or {}
        sources = {}
        for name, described in header.items():
            if described["dtype"] not in SAFETENSORS_DTYPES:
                raise _unsupported(name, described["dtype"])
            dtype, (begin, end) = SAFETENSORS_DTYPES[described["dtype"]], described["data_offsets"]
            sources[name] = _safetensor(file, 8 + n_header + begin, tuple(described["shape"]), dtype)
            if sources[name].nbytes != end - begin or 8 + n_header + end > len(file):
                raise ValueError("it changed while it was being read")
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"expected a whole safetensors file, found a damaged one ({str(error)[:160]}); get it again"
        ) from error
    return OfficialFile("safetensors", (path,), sources, metadata)


def _safetensor(file: MappedFile, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Source:
    return Source(shape, dtype, lambda: file.read(start, math.prod(shape), dtype).view(shape))


# ---- folders ----


def _read_folder(folder: Path) -> Container:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            "expected a model file or a Hugging Face folder, found that it is a directory without 'config.json'; "
            "pass the model file in it"
        )
    config = _read_json(config_path)
    for name in WEIGHTS:
        index_path = folder / f"{name}.index.json"
        if (folder / name).is_file():
            container = _read_weights(folder / name)
            return HuggingFaceFolder("hf", (*container.files, config_path), container.sources, config)
        if index_path.is_file():
            shards = _shards(_read_json(index_path), index_path.name)
            break
    else:
        raise CheckpointError(
            f"expected {' or '.join(WEIGHTS)} (or an index of their parts) in the folder, found none; "
            "get the whole folder"
        )
    sources: dict[str, Source] = {}
    for shard, indexed in shards.items():
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"expected the file '{shard:.80}' that '{index_path.name}' names, found none; get the whole folder"
            )
        held = _read_weights(folder / shard).sources
        if missing := indexed - held.keys():
            raise CheckpointError(
                f"expected {a_few(indexed)} in '{shard:.80}', as '{index_path.name}' says, "
                f"found {a_few(missing)} missing; get the whole folder"
            )
        if twice := sources.keys() & held.keys():
            raise CheckpointError(
                f"expected each tensor in one part, found {a_few(twice)} again in '{shard:.80}'; get the whole folder"
            )
        sources |= held
    return HuggingFaceFolder("hf", (*(folder / shard for shard in shards), index_path, config_path), sources, config)


def _read_weights(path: Path) -> Container:
    try:
        with path.open("rb") as file:
            return _read_file(path, file.read(9))
    except CheckpointError as error:
        raise CheckpointError(f"in '{path.name}': {error}") from error


def _shards(index: dict[str, Any], index_name: str) -> dict[str, set[str]]:
    """File name → the tensors that the index says it holds, by sorted name."""
    shards: dict[str, set[str]] = {}
    named = index.get("weight_map")
    for tensor, name in sorted(named.items()) if isinstance(named, dict) else ():
        if not isinstance(name, str) or name != Path(name).name or "\0" in name:
            raise CheckpointError(
                f"expected '{index_name}' to name files of its own folder, found {str(name)[:80]!r}; "
                "get the folder again"
            )
        shards.setdefault(name, set()).add(tensor)
    if not shards:
        raise CheckpointError(f"expected a 'weight_map' in '{index_name}', found none; get the folder again")
    return dict(sorted(shards.items()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"longer than {MAX_JSON_BYTES} bytes")
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"expected '{path.name}' as a JSON object, found: {str(error)[:160]}; get the folder again"
        ) from error
    return found
