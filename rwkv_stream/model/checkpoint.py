"""Checkpoint files: a container in, canonical tensors and the dimensions of their model out.

Containers are told apart by their first bytes: official BlinkDL `.pth` (weights only, no code is run) and safetensors
with the same names. Tensors stay mapped from the file, in its dtype. Canonical are the official names, vectors as 1-D
`(C)`, `att.r_k` as `[H, N]`, and no tensor that the model does not read. Versions are recognised by their keys; those
that this program does not run are refused by name.
Source of the keys: BlinkDL/RWKV-LM (RWKV-v4neo to RWKV-v7, train_temp/src/model.py), BlinkDL/ChatRWKV (rwkv/model.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import time
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import platformdirs
import safetensors
import torch
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.files import make_folder, publish
from rwkv_stream.model import v7
from rwkv_stream.model.config import Config, Shapes

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ELSEWHERE = {b"GGUF": "GGUF", b"fmgg": "rwkv.cpp", b"lmgg": "ggml"}  # first bytes of containers of other programs
SETTLED_NS = 2_000_000_000  # a file changed more recently may change again within one tick of its clock

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint file; `identity` is its size, time of change (ns) and inode when it was opened."""

    path: Path
    identity: tuple[int, int, int]
    config: Config
    tensors: Mapping[str, Tensor]


def read(path: str | Path) -> Checkpoint:
    """Open a checkpoint; its tensors are read as they are used. Raises CheckpointError."""
    path = Path(path).absolute()
    try:
        try:
            identity = _identity(path)
            with path.open("rb") as file:
                start = file.read(9)
        except OSError as error:
            raise CheckpointError(f"expected a model file, found: {str(error.strerror).lower()}") from error
        if start[8:] == b"{":  # behind the length of its header, the header
            found = _from_safetensors(path)
        elif start.startswith((b"PK", b"\x80")):  # torch's zip form, and its older form of pickles in a row
            found = _from_pth(path, is_zip=start.startswith(b"PK"))
        elif start[:4] in ELSEWHERE:
            raise CheckpointError(
                f"expected a .pth or .safetensors file, found the {ELSEWHERE[start[:4]]} format, which this version "
                "does not read; get the official file"
            )
        else:
            raise CheckpointError("expected a checkpoint (.pth or .safetensors), found another kind of file")
        tensors = _tensors(found, identity[0])
        _check_version({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        tensors = _canonical(tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        config = v7.config(shapes)
        _check_shapes(shapes, v7.shapes(config))
    except CheckpointError as error:
        raise CheckpointError(f"loading checkpoint '{path}': {error}") from error
    return Checkpoint(path, identity, config, tensors)


# ---- containers: path → name → whatever the file holds under it ----


def _from_safetensors(path: Path) -> dict[str, object]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"expected a whole safetensors file, found a damaged one ({error}); get it again"
        ) from error


def _from_pth(path: Path, *, is_zip: bool) -> dict[str, object]:
    # Only the zip form can be mapped, and by the suffix of a path torch would take it for safetensors.
    mapped = is_zip and path.suffix != ".safetensors"
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # what they say is said by the errors below
            found = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        code = f"pickled code ({named[1]})" if named else "pickled code or damage"
        raise CheckpointError(
            f"expected nothing but tensors, found {code}; this program refuses "
            "to run code from a model file: get the plain weights, best as safetensors"
        ) from error
    except Exception as error:  # what torch raises for damaged bytes is of any kind
        raise CheckpointError(
            f"expected a whole .pth file, found a damaged one ({_first_line(error)}); get it again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"expected a dict of tensors by name, found {type(found).__name__}; save the model's `state_dict()`"
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _tensors(found: Mapping[str, object], size_bytes: int) -> dict[str, Tensor]:
    """The same, known to be plain tensors of a supported dtype that together fit in the file."""
    if "_strategy" in found or "_version" in found:
        raise CheckpointError(
            "expected an official checkpoint, found one converted for ChatRWKV (already transposed for one strategy); "
            "get the file that it was made from"
        )
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"expected nothing but tensors by name, found {type(tensor).__name__} under '{name}'; "
                "save the model's `state_dict()`"
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(
                f"expected tensors in {', '.join(DTYPES.values())}, found '{name}' in "
                f"{str(tensor.dtype).removeprefix('torch.')} ({str(tensor.layout).removeprefix('torch.')}, "
                f"{tensor.device}); get the unquantised file"
            )
        tensors[name] = tensor.detach()
    if (claimed := sum(tensor.nbytes for tensor in tensors.values())) > size_bytes:
        raise CheckpointError(
            f"expected tensors of at most {size_bytes} bytes (the file's), found {claimed}; get it again"
        )
    return tensors


# ---- what the tensors are ----


def _check_version(shapes: Shapes) -> None:
    """Raises CheckpointError, with the name of what was found, for anything but RWKV-7."""

    def has(name: str) -> bool:
        return f"blocks.0.{name}" in shapes

    def refuse(name: str, reason: str) -> NoReturn:
        raise CheckpointError(
            f"expected an official RWKV-7 checkpoint, found {name}, {reason}; pass an official RWKV-7 one"
        )

    later = "which is not supported yet by this version"
    if has("att.r_k"):
        if any(name.startswith("blocks.0.qkv.") for name in shapes):
            refuse("RWKV-7b (attention over all tokens)", "whose state grows with the text and is not supported")
        if has("ffn.enn.weight"):
            refuse("RWKV-8 rc00", "a research version that is not supported")
        if has("ffn.s_emb.weight"):
            refuse("RWKV-7a (DeepEmbed)", later)
    elif has("att.time_maa_x"):
        if has("att.gate.weight"):
            refuse("RWKV-6 (Finch)", later)
        refuse("an experiment on RWKV-6 (x060a, b or c)", "which is not supported")
    elif has("att.ln_x.weight"):
        decay = shapes.get("blocks.0.att.time_decay", ())
        per_channel = len(decay) == 2 and decay[-1] > 1
        refuse(f"RWKV-5.{0 if not has('att.gate.weight') else 2 if per_channel else 1} (Eagle)", later)
    elif has("att.time_decay"):
        refuse("RWKV-4", later)
    elif shapes and all(name.endswith(".att.time_state") for name in shapes):
        refuse("a tuned initial state", "which is no model")
    elif any(re.match(r"(rwkv|model)\.(blocks|layers|embeddings)\.", name) for name in shapes):
        refuse("a model in the Hugging Face layout", later)
    else:
        refuse(f"other tensors ({_some(shapes)})", "which have none of RWKV's official names")


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By sorted name, without what is not read, vectors as 1-D."""
    return {
        name: tensor[0, 0] if tensor.ndim == 3 and tensor.shape[:2] == (1, 1) else tensor
        for name, tensor in sorted(tensors.items())
        if name not in v7.UNUSED
    }


def _check_shapes(found: Shapes, expected: Shapes) -> None:
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"expected {len(expected)} tensors, found {_some(missing)} missing; get the file again")
    if unexpected := found.keys() - expected.keys():
        raise CheckpointError(
            f"expected the tensors of RWKV-7, found {_some(unexpected)} besides, which would not be used; "
            "pass the model without them"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"expected tensor '{name}' as {list(shape)}, found {list(found[name])}; get the file again"
            )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:3])
    return (shown or "nothing") + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- fingerprint ----


def fingerprint(checkpoint: Checkpoint, tokenizer_id: str) -> str:
    """SHA-256 that tells models apart: of the canonical tensors as the file has them, and of the tokenizer.

    The part for the tensors is remembered in the user's cache folder by path, size, time of change and inode; where
    that cannot be written, every load computes it. Raises CheckpointError if the file changed since it was opened.
    """
    known = _cached()
    key, identity = str(checkpoint.path), list(checkpoint.identity)
    match known.get(key):
        case [remembered, str(digest)] if remembered == identity:
            pass
        case _:
            digest = _digest(checkpoint.tensors)
            if time.time_ns() - checkpoint.identity[1] > SETTLED_NS:
                _remember({**known, key: [identity, digest]})
    if not checkpoint.path.exists() or _identity(checkpoint.path) != checkpoint.identity:
        raise CheckpointError(f"loading checkpoint '{key}': the file changed while it was being read; run again")
    return hashlib.sha256(f"rwkv-stream model 1\n{digest}\n{tokenizer_id}\n".encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _cache_path() -> Path:
    return platformdirs.user_cache_path("rwkv-stream") / "fingerprints.json"


def _cached() -> dict[str, object]:
    """What is remembered: nothing if there is no such file or it is damaged."""
    try:
        known = json.loads(_cache_path().read_bytes())
    except (OSError, ValueError) as error:
        _log.debug("no fingerprints remembered: %s", error)
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: Mapping[str, object]) -> None:
    path = _cache_path()
    try:
        make_folder(path.parent)
        publish(path, json.dumps(known).encode())
    except OSError as error:
        _log.debug("fingerprint not remembered: %s", error)
