"""States as immutable files named by the SHA-256 of their bytes: the only place that knows how a state is coded.

`Objects` reads and writes bytes by their names and trusts nothing but those; `encode_state` and `decode_arrays` lay the
tensors out, each coded as `codecs` does. docs/store-format.md has the tables.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

from rwkv_stream.errors import MismatchError, UsageError
from rwkv_stream.files import make_folder, publish
from rwkv_stream.store.codecs import CODECS, EXACT, codec_named
from rwkv_stream.store.records import IDENTITY_CHECKS, LAST_HIDDEN, NewSnapshot, Snapshot, StoredObject
from rwkv_stream.store.sealed import (
    PREFIX,
    SMALL_FILE_LIMIT,
    Checks,
    check,
    damaged,
    header_length,
    is_count,
    is_digest,
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

ZSTD_LEVEL = 3
OBJECT = b"rwkv-obj"
OBJECT_VERSION = 1
HEADER_LIMIT = PREFIX.size + SMALL_FILE_LIMIT  # bytes at an object's start that hold its header
_SMALL_STATE_BYTES, _MAX_RATIO = 1 << 28, 64  # a larger state that packs better than this is none, but a bomb


class Layout(NamedTuple):
    """How an object holds its tensors.

    tensors         name, shape and stored bytes of each
    decoded_digest  of what they decode to, `last_hidden` included, where that is not the state itself
    """

    codec: str
    tensors: list[tuple[str, tuple[int, ...], int]]
    decoded_digest: str | None


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
        stored = held_object(snapshot)
        return decode_arrays(self.read(stored), snapshot, self.path(stored.name))


def held_object(snapshot: Snapshot) -> StoredObject:
    """The object that holds its state; MismatchError if it has none in a codec that is known, UsageError if it is made
    from its text."""
    if not snapshot.keeps_state and not snapshot.removed:
        raise UsageError(
            f"loading snapshot {snapshot.id[:12]} of '{snapshot.document}': expected a kept state, found one that is "
            "made from its text; rs.snapshot_at(REF, model=..., store=...) makes it"
        )
    for stored in snapshot.objects:
        if stored.codec in CODECS:
            return stored
    found = ", ".join(stored.codec for stored in snapshot.objects) or "nothing, as it was removed"
    raise MismatchError(
        f"loading snapshot '{snapshot.id}': expected a codec of {', '.join(CODECS)}, found {found}; "
        "use a newer rwkv-stream"
    )


def encode_state(
    new: NewSnapshot, state: State, last_hidden: Tensor, state_digest: str, codec: str = EXACT
) -> tuple[bytes, int]:
    """The bytes of an object, and how many bytes its tensors take as fp32.

    raises  UsageError for a codec that is none, or cannot hold the state
    """
    arrays = {name: _as_array(tensor) for name, tensor in state.items()} | {LAST_HIDDEN: _as_array(last_hidden)}
    return encode_arrays(new, arrays, state_digest, codec), sum(array.nbytes for array in arrays.values())


def encode_arrays(new: NewSnapshot, arrays: Arrays, state_digest: str, codec: str) -> bytes:
    """As `encode_state`, of arrays such as `Snapshot.arrays` gives."""
    import zstandard

    from rwkv_stream.model.state import digest

    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    coded = {name: codec_named(codec).encode(array) for name, array in arrays.items()}
    frames = [compressor.compress(data) for data in coded.values()]
    header = {
        "codec": codec,
        "model": new.model,
        "start_digest": new.start_digest,
        "chain": new.chain,
        "tokens": new.tokens,
        "state_digest": state_digest,
        "tensors": [(name, list(arrays[name].shape), len(frame)) for name, frame in zip(coded, frames, strict=True)],
    }
    if codec != EXACT:
        decoded = {name: CODECS[codec].decode(data, arrays[name].shape) for name, data in coded.items()}
        header["decoded_digest"] = digest(decoded)
    packed = msgpack.packb(header)
    return b"".join((PREFIX.pack(OBJECT, OBJECT_VERSION, len(packed)), packed, *frames))


def decode_header(prefix: bytes, where: Path) -> tuple[dict[str, Any], int]:
    """The header of an object, and where its frames begin.

    prefix  the first `HEADER_LIMIT` bytes of the object, or all where it is smaller
    raises  SnapshotError, MismatchError for a newer version or another codec
    """
    start, length = PREFIX.size, header_length(prefix, OBJECT, OBJECT_VERSION, "an object", where)
    if length > SMALL_FILE_LIMIT or start + length > len(prefix):
        raise damaged(where, f"a header of at most {SMALL_FILE_LIMIT} bytes", length)
    header = unpack(prefix[start : start + length], where)
    codec = header.get("codec")
    if is_text(codec) and codec not in CODECS:
        raise newer(where, f"a codec of {', '.join(CODECS)}", codec)
    decoded: Checks = {} if codec == EXACT else {"decoded_digest": is_digest}
    check(header, {"codec": is_text, "tensors": _is_tensors, **IDENTITY_CHECKS, **decoded}, where)
    return header, start + length


def check_header(prefix: bytes, snapshot: Snapshot, where: Path) -> Layout:
    """What an object says of its tensors, once its header is seen to be that of `snapshot`.

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
    stored = held_object(snapshot)
    if sizes != (stored.size_bytes, snapshot.state_bytes):
        recorded = f"{stored.size_bytes} bytes that hold {snapshot.state_bytes}"
        raise damaged(where, recorded, f"{sizes[0]} that hold {sizes[1]}")
    if header["codec"] != stored.codec:
        raise damaged(where, f"codec '{stored.codec}'", header["codec"])
    return Layout(header["codec"], tensors, header.get("decoded_digest"))


def decode_arrays(data: bytes, snapshot: Snapshot, where: Path) -> Arrays:
    """As `Snapshot.arrays`, of an object's bytes; SnapshotError unless they are the ones that were stored."""
    import zstandard

    from rwkv_stream.model.state import digest

    layout = check_header(data[:HEADER_LIMIT], snapshot, where)
    codec, decompressor = CODECS[layout.codec], zstandard.ZstdDecompressor()
    position = len(data) - sum(stored_bytes for _, _, stored_bytes in layout.tensors)
    arrays: Arrays = {}
    for name, shape, stored_bytes in layout.tensors:
        frame = memoryview(data)[position : position + stored_bytes]
        position += stored_bytes
        try:
            content_size = zstandard.get_frame_parameters(frame).content_size
            if content_size != codec.n_bytes(shape):
                raise damaged(where, f"'{name}' of shape {shape}", f"{content_size} bytes")
            coded = decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise damaged(where, f"a zstd frame of '{name}'", error) from error
        arrays[name] = codec.decode(coded, shape)
    if layout.decoded_digest is None:
        found, expected = digest({k: v for k, v in arrays.items() if k != LAST_HIDDEN}), snapshot.state_digest
    else:
        found, expected = digest(arrays), layout.decoded_digest
    if found != expected:
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
