"""Any checkpoint rewritten as the one that loads fastest: official names, canonical shapes, one safetensors file.

The bytes follow from the tensors and the dtype alone: the header is known from the shapes, the tensors follow in its
order, and neither time nor path enters. So a conversion that was stopped goes on behind the last whole tensor.
Source of the format: huggingface/safetensors (README.md, "Format").
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from rwkv_stream.errors import OutputError, RwkvStreamError, UsageError
from rwkv_stream.files import failpoint, publish, resuming
from rwkv_stream.model.checkpoints import adapters, checkpoint
from rwkv_stream.model.checkpoints.checkpoint import TIME_STATE, Checkpoint
from rwkv_stream.model.checkpoints.containers import SAFETENSORS_DTYPES
from rwkv_stream.model.checkpoints.library import TOKENIZER, checkpoints
from rwkv_stream.model.checkpoints.sources import Source
from rwkv_stream.model.config import GROUP_NORM_EPS, Config
from rwkv_stream.model.dtypes import DTYPES, TABLES, dtype_in_memory

FORMAT = 1
FAILPOINTS = ("convert.header", "convert.tensor", "convert.tensors")

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Progress = Callable[[int, int], None]  # bytes that are written, of all


@dataclass(frozen=True, slots=True)
class Converted:
    """`resumed_from` bytes were left by an earlier conversion; `tokenizer` is what was put beside the model."""

    path: Path
    size: int
    resumed_from: int
    tokenizer: Path | None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str = "keep",
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    initial_state: str | Path | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write the checkpoint `source` as the file `output`, one tensor at a time, and its own tokenizer beside it.

    lora    merged into it, as in `Loading`; initial_state: becomes the checkpoint's own
    dtype   of the tensors: keep, fp32, bf16 or fp16; where it is kept, so is the fingerprint. Vectors, which are
            computed with in fp32, do not become narrower, so the model is what loading it with this dtype makes of it,
            but for its embedding, which takes the dtype too.
    raises  CheckpointError for a source that cannot be read, UsageError for arguments and for weights that do not fit
            in fp16, OutputError for a file that is there already or cannot be written

    What a stopped conversion has written is gone on with, if the source is the same and the machine was not restarted.
    """
    output = Path(output).absolute()
    if output.suffix != ".safetensors":
        raise UsageError(f"converting to '{output}': expected a name that ends in .safetensors; pass one")
    if dtype not in ("keep", *DTYPES):
        raise UsageError(f"converting to '{output}': expected dtype keep, {', '.join(DTYPES)}, found '{dtype}'")
    if output.exists():
        raise OutputError(f"converting to '{output}': expected no such file yet, found one; remove it or pass another")
    file, changes = checkpoint.read(source), list[str]()
    if lora is not None:
        file, change = adapters.merged(file, lora, lora_alpha)
        changes.append(change)
    if initial_state is not None:
        file, change = adapters.with_state(file, initial_state)
        changes.append(change)
    dtypes = {
        name: tensor.dtype if dtype == "keep" else _dtype(name, tensor, DTYPES[dtype])
        for name, tensor in file.tensors.items()
    }
    try:
        tokenizer = _own_tokenizer(file.path, output)
        resumed_from, size = _write(file, changes, dtypes, output, progress)
    except BlockingIOError as error:
        raise OutputError(
            f"converting to '{output}': expected to be alone, found another conversion at work; wait for it"
        ) from error
    except OSError as error:
        goes_on = "; make room and run the same command again, it goes on from there"
        raise OutputError(
            f"converting to '{output}': expected to write it, found: {str(error.strerror).lower()}"
            + (goes_on if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "")
        ) from error
    return Converted(output, size, resumed_from, None if tokenizer is None else output.with_name(TOKENIZER))


def _write(
    file: Checkpoint, changes: list[str], dtypes: dict[str, torch.dtype], output: Path, progress: Progress | None
) -> tuple[int, int]:
    """Write the model and put its tokenizer beside it; where it went on from and its size, both in bytes.

    changes  by adapters, each told by a line
    """
    # Wider numbers first, so that each tensor is aligned to its dtype, then by name.
    order = sorted(file.tensors, key=lambda name: (-dtypes[name].itemsize, name))
    ends: dict[str, int] = {}
    end = 0
    for name in order:
        end += file.tensors[name].numel * dtypes[name].itemsize
        ends[name] = end
    header = _header(file, dtypes, ends)
    size = len(header) + end
    # What a killed process wrote is on its way to the disk; what was written before a power cut may be lost.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    with resuming(output, f"{boot} {file.path} {file.identity} {changes} {header!r}") as out:
        whole = [0, len(header), *(len(header) + ends[name] for name in order)]
        resumed_from = max(edge for edge in whole if edge <= out.tell())
        out.seek(resumed_from)
        out.truncate()
        if resumed_from == 0:
            out.write(header)
            failpoint("convert.header")
        for name in order:
            if len(header) + ends[name] > resumed_from:
                out.write(_bytes(_in_dtype(name, file.tensors[name].read(), dtypes[name], out)))
                failpoint("convert.tensor")
                if progress is not None:
                    progress(len(header) + ends[name], size)
        try:
            checkpoint.check_unchanged(file)
            tokenizer = _own_tokenizer(file.path, output)  # again: other models may have come meanwhile
        except RwkvStreamError:
            out.truncate(0)
            raise
        failpoint("convert.tensors")
        # Only when nothing but a rename can still fail: a tokenizer without its model would be that of others, and a
        # model is never there without its own.
        out.flush()
        os.fsync(out.fileno())
        if tokenizer is not None and not output.with_name(TOKENIZER).exists():
            publish(output.with_name(TOKENIZER), tokenizer)
    return resumed_from, size


def _header(file: Checkpoint, dtypes: dict[str, torch.dtype], ends: dict[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata(file.config)}
    start = 0
    for name, end in ends.items():
        shape = list(file.tensors[name].shape)
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def metadata(config: Config) -> dict[str, str]:
    """What a safetensors file says of its model beside the tensors."""
    found = {"format": "pt", "rwkv_stream_format": str(FORMAT), "rwkv_version": config.version}
    return found if config.group_norm_eps == GROUP_NORM_EPS else found | {"group_norm_eps": repr(config.group_norm_eps)}


def _dtype(name: str, tensor: Source, wanted: torch.dtype) -> torch.dtype:
    is_vector = not name.endswith(TABLES) and dtype_in_memory(name, tensor, torch.float16) == torch.float32
    is_narrower = wanted.itemsize <= tensor.dtype.itemsize
    return tensor.dtype if is_narrower and (is_vector or name.endswith(TIME_STATE)) else wanted


def _in_dtype(name: str, tensor: Tensor, dtype: torch.dtype, out: IO[bytes]) -> Tensor:
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all():
        out.truncate(0)
        raise UsageError(
            f"converting a model: expected weights that fit in fp16, found a larger one in '{name}'; pass --dtype bf16"
        )
    return converted


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _own_tokenizer(source: Path, output: Path) -> bytes | None:
    """The source's own tokenizer.json; None where it has none. Raises OutputError where another is beside the output.

    Whatever lies there is the tokenizer of every model in that folder, so none is changed or added for others.
    """
    own, path = (source if source.is_dir() else source.parent) / TOKENIZER, output.with_name(TOKENIZER)
    data = own.read_bytes() if own.exists() else None
    if path.exists():
        if path.read_bytes() != data:
            raise OutputError(
                f"converting to '{output}': expected no '{TOKENIZER}' of another model beside it, found one; "
                "pass a name in a folder of its own"
            )
    elif data is not None and (others := checkpoints(output.parent)):
        raise OutputError(
            f"converting to '{output}': expected no other model where its '{TOKENIZER}' goes, found "
            f"'{others[0].name}'; pass a name in a folder of its own"
        )
    return data
