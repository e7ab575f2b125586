"""torch's `.pth` files, of both forms: zip, and the older one of pickles in a row with the storages behind them.

The pickle inside is not unpickled. Its opcodes are interpreted here, into plain values and the places of tensors in the
file; anything else that they ask for is refused. So no code from a file can run, no length in it is believed before it
is compared with the file, and tensors stay mapped until they are read.
Source: pytorch/pytorch, torch/serialization.py; the opcodes: CPython, Lib/pickletools.py.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.checkpoints.names import OfficialFile
from rwkv_stream.model.checkpoints.sources import MappedFile, Source

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {  # opcodes whose argument is the value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_AXES = 8
MAX_OPCODES = 1 << 20  # about 30 for a tensor
MAX_READ_BYTES = 1 << 22  # of a zip's directory, or of a pickle in it: about 300 for a tensor

Places = dict[str, tuple[int, int]]  # storage → first byte in the file, number of bytes


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    length: int  # elements


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as the pickle describes it, known to lie inside its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> OfficialFile:
    """Open a `.pth` file; its tensors are read as they are used. Raises CheckpointError."""
    file = MappedFile(path)
    try:
        is_zip = file.mapping[:2] == b"PK"
        found, places = _read_zip(path, file.mapping) if is_zip else _read_legacy(file.mapping)
        sources = _sources(found, file, places)
    except CheckpointError:
        raise
    except Exception as error:  # what damaged bytes raise is of any kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(f"expected a whole .pth file, found a damaged one ({reason}); get it again") from error
    return OfficialFile("pth", (path,), sources)


class _Limited(io.BufferedReader):
    """A file for `zipfile`, which would read a directory of any size and make much larger objects of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_READ_BYTES:
            raise ValueError(f"{size} bytes of directory or pickle")
        return super().read(size)


def _read_zip(path: Path, mapping: mmap.mmap) -> tuple[object, Places]:
    with _Limited(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for member in members.values():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"'{member.filename:.80}' is compressed")
            if member.file_size > len(mapping):
                raise ValueError(f"'{member.filename:.80}' is longer than the file")
        (pickle,) = (name for name in members if name.endswith("/data.pkl"))
        folder = pickle.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        found, storages = _interpret(archive.read(pickle))
    places = {}
    for key in storages:
        member = members[f"{folder}data/{key}"]
        # A member begins with 30 bytes, its name and an extra field, whose length is not that of the directory's entry.
        name_length, extra_length = struct.unpack_from("<HH", mapping, member.header_offset + 26)
        places[key] = member.header_offset + 30 + name_length + extra_length, member.file_size
    return found, places


def _read_legacy(mapping: mmap.mmap) -> tuple[object, Places]:
    if _interpret(mapping)[0] != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch's pickles do")
    _version, system = _interpret(mapping)[0], _interpret(mapping)[0]
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    found, storages = _interpret(mapping)
    keys, _ = _interpret(mapping)
    if not isinstance(keys, list) or {*keys} != storages.keys() or len(keys) != len(storages):
        raise ValueError("its storages are not those of its tensors")
    places, at = {}, mapping.tell()
    for key in keys:
        (length,) = struct.unpack_from("<q", mapping, at)
        if length != storages[key].length:
            raise ValueError(f"storage '{key:.80}' is of another length than its tensors")
        places[key] = at + 8, length * storages[key].dtype.itemsize
        at += 8 + length * storages[key].dtype.itemsize
    return found, places


def _sources(found: object, file: MappedFile, places: Places) -> dict[str, Source]:
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"expected a dict of tensors by name, found {type(found).__name__}; save the model's `state_dict()`"
        )
    if "_strategy" in found or "_version" in found:
        raise CheckpointError(
            "expected an official checkpoint, found one converted for ChatRWKV (already transposed for one strategy); "
            "get the file that it was made from"
        )
    sources = {}
    for name, tensor in found.items():
        if not isinstance(tensor, _Stored):
            raise CheckpointError(
                f"expected nothing but tensors by name, found {type(tensor).__name__} under '{name:.80}'; "
                "save the model's `state_dict()`"
            )
        first, n_bytes = places[tensor.storage.key]
        if tensor.storage.length * tensor.storage.dtype.itemsize > n_bytes or first + n_bytes > len(file):
            raise ValueError(f"'{name:.80}' ends behind its storage or the file")
        sources[name] = Source(tensor.shape, tensor.storage.dtype, _reader(file, first, tensor))
    return sources


def _reader(file: MappedFile, first: int, tensor: _Stored) -> Callable[[], Tensor]:
    dtype = tensor.storage.dtype

    def read() -> Tensor:
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=dtype)
        flat = file.read(first + tensor.offset * dtype.itemsize, _last(tensor) + 1, dtype)
        return flat.as_strided(tensor.shape, tensor.strides).contiguous()

    return read


def _last(tensor: _Stored) -> int:
    """How many elements the tensor's last one lies behind its first one; no axis is empty."""
    return sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))


# ---- pickles ----


def _interpret(stream: Any) -> tuple[Any, dict[str, _Storage]]:
    """The value of the pickle that begins here, and the storages its tensors lie in, by key; `stream` ends behind it.

    Raises CheckpointError where it wants more than values, lists, dicts and tensors, and anything if it is damaged.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    storages: dict[str, _Storage] = {}
    argument: Any
    for n, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if n == MAX_OPCODES:
            raise ValueError("a pickle without end")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop(), storages
            case name if name in VALUES:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(opcode.name[-1]))])))
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items, stack = stack, outer.pop()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, outer.pop()
                _set(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_named(f"{module}.{attribute}"))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(stack.pop()(*arguments))
            case "BUILD":  # the attributes of a `state_dict()`: versions of its modules
                stack.pop()
            case "BINPERSID":
                storage = _storage(*stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"storage '{storage.key:.80}' is of two kinds")
                stack.append(storage)
            case _:
                raise _refused(opcode.name)
    raise EOFError("a pickle without its end")


def _set(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError(f"items of a {type(target).__name__} by other keys than names")
    target.update(zip(keys, values, strict=True))


def _refused(name: str) -> CheckpointError:
    return CheckpointError(
        f"expected nothing but tensors, found pickled code ({name[:80]}); this program refuses "
        "to run code from a model file: get the plain weights, best as safetensors"
    )


def _named(name: str) -> Any:
    """What stands for a class or function that a pickle names."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    kind = name.removeprefix("torch.")
    if kind == name or kind not in STORAGES:
        raise _refused(name)
    return STORAGES[kind]


def _storage(kind: Any, dtype: Any, key: Any, _location: Any, length: Any, view: Any = None) -> _Storage:
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or view is not None:
        raise ValueError("a storage of unknown kind")
    return _Storage(key, dtype, _count(length))


def _stored(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Stored:
    """`torch._utils._rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks)`."""
    if not isinstance(storage, _Storage) or not len(shape) == len(strides) <= MAX_AXES:
        raise ValueError("a tensor without storage or shape")
    tensor = _Stored(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, strides)))
    if 0 not in tensor.shape and tensor.offset + _last(tensor) >= storage.length:
        raise ValueError("a tensor that ends behind its storage")
    if math.prod(n for n in tensor.shape if n) >= 2**31 and 0 in tensor.shape:
        raise ValueError("an empty tensor of absurd shape")
    return tensor


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("a length that is none")
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor": _stored,
    "torch._utils._rebuild_tensor_v2": _stored,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, backward_hooks: data,
}
