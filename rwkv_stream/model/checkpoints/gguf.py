"""GGUF, the files of llama.cpp: a header of keys and tensor descriptions, then the tensors, and their official names.

The header is walked here and not by the `gguf` package, whose reader believes the counts and offsets of a damaged file.
The package (extra `gguf`) dequantises; files in F32, F16 and BF16 do without it. The maps of `official` undo what
llama.cpp's converter does: rwkv6 and rwkv7 have vectors as `(C)`, low ranks transposed and mixing vectors stacked.
Source: ggml-org/ggml (docs/gguf.md), ggml-org/llama.cpp (convert_hf_to_gguf.py, src/llama-model.cpp).
"""

from __future__ import annotations

import functools
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.extras import needed
from rwkv_stream.model.checkpoints.sources import Container, MappedFile, Source
from rwkv_stream.model.config import LAYER_NORM_EPS

MAX_TENSORS = 1 << 16
MAX_VALUES = 1 << 20  # of all keys and their arrays; a vocabulary has three for each of its tokens
MAX_DIMS, MAX_NAME_BYTES = 4, 64  # GGML's own

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # GGML's numbers of the types; all others are blocks
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

Bytes = NDArray[np.uint8]


# ---- bytes of a file, which may say anything ----


class Cursor:
    """Takes one value after the other, little endian. Raises CheckpointError where the bytes end."""

    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, n: int) -> Bytes:
        left = len(self.data) - self.at
        if not 0 <= n <= left:
            raise CheckpointError(
                f"expected {n} bytes more at byte {self.at}, found {left} to the end of the file; get it again"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def numbers(self, codes: str) -> tuple[Any, ...]:
        """By the format characters of `struct`."""
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")).data)

    def text(self, n: int) -> str:
        start = self.at
        try:
            return self.take(n).tobytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"expected UTF-8 in the name or text at byte {start}; get the file again") from error


def check_count(what: str, n: int, limit: int) -> None:
    """Raises CheckpointError where a file counts more than any model has."""
    if n > limit:
        raise CheckpointError(f"expected at most {limit} {what}, found {n}; get the file again")


def stored(file: MappedFile, start: int, name: str, shape: tuple[int, ...], kind: int) -> tuple[Source, int]:
    """A tensor whose bytes begin at `start`, and their number; `kind` is GGML's number of its type.

    shape as torch has it. F32, F16 and BF16 stay in the file, everything else is dequantised to float32 by each `read`.
    Raises CheckpointError for a type that is not known, a shape that does not suit it and bytes that are not there.
    """
    n_values, block, block_bytes = math.prod(shape), *_block(kind)
    n_bytes = n_values // block * block_bytes
    if not 1 <= len(shape) <= MAX_DIMS or n_values < 1 or shape[-1] % block:
        raise CheckpointError(
            f"expected '{name}' with 1 to {MAX_DIMS} axes, the last a multiple of {block}, found {list(shape)}; "
            "get the file again"
        )
    if start + n_bytes > len(file):
        raise CheckpointError(
            f"expected '{name}' to end within {len(file)} bytes (the file's), found {start + n_bytes}; get it again"
        )

    def plain() -> Tensor:
        return file.read(start, n_values, PLAIN[kind]).view(shape)

    def dequantised() -> Tensor:
        import gguf

        raw = file.read(start, n_bytes, torch.uint8).numpy()
        with np.errstate(all="ignore"):  # damaged scales make infinities, as they do for everybody
            values = gguf.dequantize(raw.reshape(math.prod(shape[:-1]), -1), gguf.GGMLQuantizationType(kind))
        return torch.from_numpy(values).view(shape)

    return Source(shape, PLAIN.get(kind, torch.float32), plain if kind in PLAIN else dequantised), n_bytes


@functools.cache
def _block(kind: int) -> tuple[int, int]:
    """Values and bytes of one block of a type. Raises CheckpointError for one that cannot be dequantised."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    with needed("gguf", "gguf", "dequantising tensors", CheckpointError):
        import gguf
    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), type_)
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"expected tensors in a type that the installed package gguf dequantises, found type {kind} ({error}); "
            "upgrade the package, or get the model in another type, best F16 or Q8_0"
        ) from error
    return block, block_bytes


# ---- container ----


def read(path: Path) -> Gguf:
    """Open a GGUF; its metadata are the keys with their values, arrays as lists.

    Raises CheckpointError, and OSError as the operating system does.
    """
    file = MappedFile(path)
    header = Cursor(np.frombuffer(file.mapping, np.uint8))
    if (magic := header.take(4).tobytes()) != b"GGUF":
        raise CheckpointError(f"expected a file that begins with GGUF, found {magic!r}; get it again")
    (version,) = header.numbers("I")
    if version not in (2, 3):
        found = "one for big-endian machines" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(f"expected GGUF of version 2 or 3, found {found}; get another file")
    n_tensors, n_keys = header.numbers("QQ")
    check_count("tensors", n_tensors, MAX_TENSORS)
    metadata = _metadata(header, n_keys)
    described = [_description(header) for _ in range(n_tensors)]

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise CheckpointError(f"expected general.alignment as a multiple of 8, found {alignment!r}; get the file again")
    start = -(-header.at // alignment) * alignment
    sources: dict[str, Source] = {}
    claimed = start
    for name, shape, kind, offset in described:
        if name in sources:
            raise CheckpointError(f"expected each tensor once, found '{name}' twice; get the file again")
        if offset % alignment:
            raise CheckpointError(f"expected '{name}' at a multiple of {alignment}, found {offset}; get the file again")
        sources[name], n_bytes = stored(file, start + offset, name, shape, kind)
        claimed += n_bytes
    if claimed > len(file):
        raise CheckpointError(
            f"expected tensors that do not overlap, found {claimed} bytes of them in {len(file)}; get the file again"
        )
    return Gguf("gguf", (path,), sources, metadata)


def _metadata(header: Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    n_values = n_keys
    check_count("values of keys", n_values, MAX_VALUES)
    for _ in range(n_keys):
        (length,) = header.numbers("Q")
        key = header.text(length)
        if key in metadata:
            raise CheckpointError(f"expected each key once, found '{key[:80]}' twice; get the file again")
        (kind,) = header.numbers("I")
        if kind == ARRAY:
            kind, n = header.numbers("IQ")
            n_values += n
            check_count("values of keys", n_values, MAX_VALUES)
            metadata[key] = list(_values(header, kind, n))
        else:
            (metadata[key],) = _values(header, kind, 1)
    return metadata


def _values(header: Cursor, kind: int, n: int) -> tuple[Any, ...]:
    if kind == STRING:
        return tuple(header.text(header.numbers("Q")[0]) for _ in range(n))
    if kind not in SCALARS:
        raise CheckpointError(f"expected a type of value that GGUF has, found {kind} at byte {header.at}; get it again")
    return header.numbers(f"{n}{SCALARS[kind]}")


def _description(header: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in torch's order of axes, type and offset of a tensor."""
    (length,) = header.numbers("Q")
    check_count("bytes of a tensor's name", length, MAX_NAME_BYTES)
    name = header.text(length)
    (n_dims,) = header.numbers("I")
    check_count(f"axes of '{name}'", n_dims, MAX_DIMS)
    shape = header.numbers(f"{n_dims}Q")[::-1]
    kind, offset = header.numbers("IQ")
    return name, shape, kind, offset


# ---- names ----

HYBRID = "a hybrid with RMSNorm and SwiGLU layers, which is not supported"
REFUSED = {"arwkv7": HYBRID, "rwkv6qwen2": HYBRID}
PARTS = ("weight", "bias")

OUTER = {"token_embd.weight": "emb.weight", "output.weight": "head.weight"}
OUTER |= {f"token_embd_norm.{part}": f"blocks.0.ln0.{part}" for part in PARTS}
OUTER |= {f"output_norm.{part}": f"ln_out.{part}" for part in PARTS}

_SHARED = {
    f"{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in (("attn_norm", "ln1"), ("attn_norm_2", "ln2"), ("time_mix_ln", "att.ln_x"))
    for part in PARTS
}
_SHARED |= {
    f"time_mix_{name}.weight": f"att.{name}.weight" for name in ("receptance", "key", "value", "gate", "output")
}
_SHARED |= {f"channel_mix_{name}.weight": f"ffn.{name}.weight" for name in ("receptance", "key", "value")}
INNER = {
    "rwkv6": _SHARED
    | {f"time_mix_lerp_{j}.weight": f"att.time_maa_{j}" for j in "xwkvrg"}
    | {f"time_mix_{j}.weight": f"att.time_maa_{j}" for j in ("w1", "w2")}
    | {f"time_mix_{j}.weight": f"att.time_{j}" for j in ("decay", "decay_w1", "decay_w2")}
    | {"time_mix_first.weight": "att.time_faaaa"}
    | {f"channel_mix_lerp_{j}.weight": f"ffn.time_maa_{j}" for j in "kr"},
    "rwkv7": _SHARED
    | {f"time_mix_lerp_{j}.weight": f"att.x_{j}" for j in "rwkvag"}
    | {f"time_mix_{j}{i}.weight": f"att.{j}{i}" for j in "wavg" for i in "012" if (j, i) != ("g", "0")}
    | {f"time_mix_{name}.weight": f"att.{name}" for name in ("k_k", "k_a", "r_k")}
    | {"channel_mix_lerp_k.weight": "ffn.x_k"},
}
FUSED = {"rwkv6": "wkvrg", "rwkv7": "rwkvag"}  # the order of the rows of `time_mix_lerp_fused`

TRANSPOSED = re.compile(r"att\.(time_maa_w[12]|time_decay_w[12]|[wavg][12])")
PER_HEAD = ("att.time_faaaa", "att.r_k")  # (H, N), here perhaps (C)
UNUSED = {("rwkv7", "0"): ("att.v0", "att.v1", "att.v2")}  # by block; copies of a0, a1, a2
RESCALED = ("att.output.weight", "ffn.value.weight")


class Gguf(Container):
    """A GGUF file, by the names and in the shapes of llama.cpp."""

    def official(self) -> dict[str, Source]:
        """The tensors by official names, in canonical shapes. Raises CheckpointError for what is not rwkv6 or rwkv7."""
        architecture = str(self.metadata.get("general.architecture"))
        if architecture not in INNER:
            reason = REFUSED.get(architecture, "which is no RWKV model")
            raise CheckpointError(
                f"expected the architecture {' or '.join(INNER)}, found '{architecture[:80]}', {reason}; "
                "pass another file"
            )
        head_size, rescale_every = _checked(self, architecture)
        inner, order = INNER[architecture], FUSED[architecture]
        found: dict[str, Source] = {}
        for theirs, source in self.sources.items():
            match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", theirs)
            if match is None:
                renamed = {OUTER.get(theirs, theirs): source}  # an unknown name is refused like any file's
            elif match[2] == "time_mix_lerp_fused.weight":
                parts = rows(theirs, source, len(order))
                renamed = {inner[f"time_mix_lerp_{j}.weight"]: part for j, part in zip(order, parts, strict=True)}
            elif (name := inner.get(match[2], match[2])) in UNUSED.get((architecture, match[1]), ()):
                continue
            else:
                if TRANSPOSED.fullmatch(name):
                    source = transposed(theirs, source)
                elif name in PER_HEAD:
                    source = _per_head(theirs, source, head_size)
                elif name in RESCALED and rescale_every:
                    source = _scaled(source, int(match[1]) // rescale_every)
                renamed = {name: source}
            for name, part in renamed.items():
                full = name if match is None else f"blocks.{match[1]}.{name}"
                if full in found:
                    raise CheckpointError(f"expected each tensor once, found '{full}' again as '{theirs}'")
                found[full] = part
        return found


def _checked(container: Container, architecture: str) -> tuple[int, int]:
    """The head size, and after how many layers each the weights are stored halved once more (0: never)."""
    metadata, sources = container.metadata, container.sources

    def wrong(key: str, expected: object) -> CheckpointError:
        found = str(metadata.get(key))[:80]
        return CheckpointError(f"expected '{key}' {expected}, found {found}; get the file again")

    if metadata.get("split.count", 1) != 1:
        raise CheckpointError("expected a whole model, found a part of one; join all with `llama-gguf-split --merge`")
    if "token_embd.weight" not in sources:
        raise CheckpointError("expected a tensor 'token_embd.weight', found none; get the file again")
    n_blocks = len({name.split(".")[1] for name in sources if name.startswith("blk.")})
    n_embd = sources["token_embd.weight"].shape[-1]
    for name, expected in (("block_count", n_blocks), ("embedding_length", n_embd)):
        if metadata.get(key := f"{architecture}.{name}") != expected:
            raise wrong(key, f"{expected}, as the tensors say")
    eps = metadata.get(key := f"{architecture}.attention.layer_norm_epsilon")
    if not isinstance(eps, float) or not math.isclose(eps, LAYER_NORM_EPS, rel_tol=1e-6):
        raise wrong(key, LAYER_NORM_EPS)

    head_size = metadata.get(key := f"{architecture}.wkv.head_size")
    first = sources.get(
        "blk.0.time_mix_first.weight"
    )  # of rwkv6 only; files that were quantised later lack an axis of 1
    if first is not None and len(first.shape) == 2:
        if head_size not in (None, first.shape[1]):
            raise wrong(key, f"{first.shape[1]}, as the tensors say")
        head_size = first.shape[1]
    if type(head_size) is not int or head_size < 1:
        raise wrong(key, "as a count")
    rescale_every = metadata.get(key := f"{architecture}.rescale_every_n_layers", 0)
    if type(rescale_every) is not int or rescale_every < 0:
        raise wrong(key, "as a count")
    return head_size, rescale_every


def rows(name: str, source: Source, n: int) -> list[Source]:
    """The `n` vectors that are stacked in `source`, with or without axes of 1 between. Raises CheckpointError."""
    if len(source.shape) < 2 or source.shape[0] != n or math.prod(source.shape[1:-1]) != 1:
        raise _misshapen(name, f"{n} vectors", source)

    def row(i: int) -> Source:
        return source.map(lambda tensor: tensor[i].flatten(), source.shape[-1:])

    return [row(i) for i in range(n)]


def transposed(name: str, source: Source) -> Source:
    """With the last two axes exchanged. Raises CheckpointError."""
    if len(source.shape) < 2:
        raise _misshapen(name, "a matrix", source)
    *outer, m, n = source.shape
    return source.map(lambda tensor: tensor.transpose(-1, -2), (*outer, n, m))


def _per_head(name: str, source: Source, head_size: int) -> Source:
    n_heads, rest = divmod(math.prod(source.shape), head_size)
    if rest:
        raise _misshapen(name, f"vectors of {head_size}", source)
    return source.map(lambda tensor: tensor.reshape(n_heads, head_size), (n_heads, head_size))


def _scaled(source: Source, power: int) -> Source:
    """Times 2^power, in float32 since float16 does not hold every such factor."""
    factor = torch.tensor(power)
    return source.map(lambda tensor: torch.ldexp(tensor.float(), factor).to(tensor.dtype), source.shape)


def _misshapen(name: str, expected: str, source: Source) -> CheckpointError:
    return CheckpointError(f"expected '{name}' as {expected}, found {list(source.shape)}; get the file again")
