"""States as immutable files named by the SHA-256 of their bytes: the only place that knows how a state is coded.

`Objects` reads and writes bytes by their names and trusts nothing but those; `encode_state` and `decode_arrays` are the
codec `exact`. docs/store-format.md has the tables. A frame's four planes of bytes keep signs and exponents together,
which zstd packs better.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]

from rwkv_stream.errors import MismatchError
from rwkv_stream.files import make_folder, publish
from rwkv_stream.store.records import IDENTITY_CHECKS, LAST_HIDDEN, NewSnapshot, Snapshot, StoredObject
from rwkv_stream.store.sealed import (
    PREFIX,
    SMALL_FILE_LIMIT,
    check,
    damaged,
    header_length,
    is_count,
    is_text,
    newer,
    read_file,
    unpack,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rwkv_stream.model.state import State
    from rwkv_stream.store.records import Arrays

EXACT = "exact"
ZSTD_LEVEL = 3
OBJECT = b"rwkv-obj"
OBJECT_VERSION = 1
HEADER_LIMIT = PREFIX.size + SMALL_FILE_LIMIT  # bytes at an object's start that hold its header
_SMALL_STATE_BYTES, _MAX_RATIO = 1 << 28, 64  # a larger state that packs better than this is none, but a bomb


class Objects:
    """Bytes under the SHA-256 of them, each in a file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, stored: StoredObject) -> bytes:
        """All bytes of an object, checked against its size and name.

        raises  SnapshotError for damage or a missing file, PermissionError
        """
        path = self.path(stored.name)
        try:
            data = read_file(path, stored.size_bytes)
        except FileNotFoundError as error:
            raise damaged(path, f"an object of {stored.size_bytes} bytes", "no file") from error
        if len(data) != stored.size_bytes:
            raise damaged(path, f"{stored.size_bytes} bytes", f"{len(data)}: it is truncated")
        if hashlib.sha256(data).hexdigest() != stored.name:
            raise damaged(path, "it as it was written", "bytes that were changed since")
        return data

    def write(self, data: bytes, codec: str, *, temp_tag: str) -> StoredObject:
        """Publish an object, durable on return; raises OSError as the operating system does."""
        name = hashlib.sha256(data).hexdigest()
        make_folder(self.path(name).parent)
        publish(self.path(name), data, kind="object", temp_tag=temp_tag)
        return StoredObject(name, codec, len(data))

    def load(self, snapshot: Snapshot) -> Arrays:
        """As `Snapshot.arrays`."""
        stored = exact_object(snapshot)
        return decode_arrays(self.read(stored), snapshot, self.path(stored.name))


def exact_object(snapshot: Snapshot) -> StoredObject:
    """The object in codec `exact`; MismatchError if there is none."""
    for stored in snapshot.objects:
        if stored.codec == EXACT:
            return stored
    found = ", ".join(stored.codec for stored in snapshot.objects) or "nothing, as it was removed"
    raise MismatchError(
        f"loading snapshot '{snapshot.id}': expected codec '{EXACT}', found {found}; use a newer rwkv-stream"
    )


def encode_state(new: NewSnapshot, state: State, last_hidden: Tensor, state_digest: str) -> tuple[bytes, int]:
    """The bytes of an object in codec `exact`, and how many bytes its tensors take decoded."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    tensors: list[tuple[str, list[int], int]] = []
    frames: list[bytes] = []
    raw_bytes = 0
    for name, tensor in (*state.items(), (LAST_HIDDEN, last_hidden)):
        array = _as_array(tensor)
        frame = compressor.compress(_split_planes(array))
        tensors.append((name, list(array.shape), len(frame)))
        frames.append(frame)
        raw_bytes += array.nbytes
    header = msgpack.packb(
        {
            "codec": EXACT,
            "model": new.model,
            "start_digest": new.start_digest,
            "chain": new.chain,
            "tokens": new.tokens,
            "state_digest": state_digest,
            "tensors": tensors,
        }
    )
    return b"".join((PREFIX.pack(OBJECT, OBJECT_VERSION, len(header)), header, *frames)), raw_bytes


def decode_header(prefix: bytes, where: Path) -> tuple[dict[str, Any], int]:
    """The header of an object, and where its frames begin.

    prefix  the first `HEADER_LIMIT` bytes of the object, or all where it is smaller
    raises  SnapshotError, MismatchError for a newer version or another codec
    """
    start, length = PREFIX.size, header_length(prefix, OBJECT, OBJECT_VERSION, "an object", where)
    if length > SMALL_FILE_LIMIT or start + length > len(prefix):
        raise damaged(where, f"a header of at most {SMALL_FILE_LIMIT} bytes", length)
    header = unpack(prefix[start : start + length], where)
    check(header, {"codec": is_text, "tensors": _is_tensors, **IDENTITY_CHECKS}, where)
    if header["codec"] != EXACT:
        raise newer(where, f"codec '{EXACT}'", header["codec"])
    return header, start + length


def check_header(prefix: bytes, snapshot: Snapshot, where: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and stored bytes of every tensor of an object, once its header is seen to be that of `snapshot`.

    prefix and raises as of `decode_header`
    """
    header, position = decode_header(prefix, where)
    for name in IDENTITY_CHECKS:
        if header[name] != getattr(snapshot, name):
            raise damaged(where, f"the object of snapshot '{snapshot.id}'", f"that of another {name}")
    tensors = [(name, tuple(shape), stored_bytes) for name, shape, stored_bytes in header["tensors"]]
    sizes = (
        position + sum(stored_bytes for _, _, stored_bytes in tensors),
        sum(math.prod(shape) * 4 for _, shape, _ in tensors),
    )
    if sizes[1] > max(_SMALL_STATE_BYTES, _MAX_RATIO * sizes[0]):
        raise damaged(where, f"at most {_MAX_RATIO} times its {sizes[0]} bytes of state", sizes[1])
    recorded = (exact_object(snapshot).size_bytes, snapshot.state_bytes)
    if sizes != recorded:
        raise damaged(where, f"{recorded[0]} bytes that hold {recorded[1]}", f"{sizes[0]} that hold {sizes[1]}")
    return tensors


def decode_arrays(data: bytes, snapshot: Snapshot, where: Path) -> Arrays:
    """As `Snapshot.arrays`, of an object's bytes; SnapshotError unless they are the ones that were stored."""
    import zstandard

    from rwkv_stream.model.state import digest

    layout = check_header(data[:HEADER_LIMIT], snapshot, where)
    decompressor = zstandard.ZstdDecompressor()
    position = len(data) - sum(stored_bytes for _, _, stored_bytes in layout)
    arrays: Arrays = {}
    for name, shape, stored_bytes in layout:
        frame = memoryview(data)[position : position + stored_bytes]
        position += stored_bytes
        try:
            content_size = zstandard.get_frame_parameters(frame).content_size
            if content_size != math.prod(shape) * 4:
                raise damaged(where, f"'{name}' of shape {shape}", f"{content_size} bytes")
            planes = decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise damaged(where, f"a zstd frame of '{name}'", error) from error
        arrays[name] = _join_planes(planes, shape)
    if digest({name: array for name, array in arrays.items() if name != LAST_HIDDEN}) != snapshot.state_digest:
        raise damaged(where, f"the state of snapshot '{snapshot.id}'", "another")
    return arrays


def _is_tensors(value: Any) -> bool:
    """A list of [name, shape, stored bytes], names different, the last one that of the last hidden state."""
    if type(value) is not list or not 1 < len(value) <= 64:
        return False
    for tensor in value:
        if type(tensor) is not list or len(tensor) != 3 or not is_text(tensor[0]) or not is_count(tensor[2]):
            return False
        shape = tensor[1]
        if type(shape) is not list or not 0 < len(shape) <= 8:
            return False
        if not all(is_count(n) and 0 < n < 1 << 32 for n in shape):
            return False
    names = [tensor[0] for tensor in value]
    return len(set(names)) == len(names) and names[-1] == LAST_HIDDEN


def _as_array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np
    import torch

    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy(), dtype="<f4")


def _split_planes(array: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    """fp32 values as four planes of bytes: signs and exponents lie together, which zstd packs better."""
    planes: bytes = array.reshape(-1).view("u1").reshape(-1, 4).T.tobytes()
    return planes


def _join_planes(planes: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np

    array = np.empty(shape, dtype="<f4")
    array.reshape(-1).view("u1").reshape(-1, 4)[...] = np.frombuffer(planes, dtype="u1").reshape(4, -1).T
    return array
