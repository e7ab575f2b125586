"""What the bytes of a store's files mean; where the files lie and when they are written is `store.py`'s matter.

Small files (`format`, records, heads, tags):

| bytes   | content                                                                        |
|---------|--------------------------------------------------------------------------------|
| 8       | magic: `rwkv-fmt`, `rwkv-rec`, `rwkv-hed` or `rwkv-tag`                          |
| 4       | version, uint32 little-endian: 3 for `format`, 2 for records and heads, 1 for tags |
| …       | msgpack map                                                                    |
| last 32 | SHA-256 of all bytes before it; holds in every version, so damage is told from a newer format |

Objects, named by the SHA-256 of all their bytes:

| bytes   | content                                                                        |
|---------|--------------------------------------------------------------------------------|
| 8       | magic `rwkv-obj`                                                               |
| 4       | version, uint32 little-endian; 1                                               |
| 4       | length of the header, uint32 little-endian, at most 64 KiB                      |
| …       | header, a msgpack map: codec, identity of the snapshot, name/shape/stored bytes of every tensor |
| …       | one zstd frame per tensor (with content size and checksum), in the header's order, no more |

Codec `exact`: a frame holds the fp32 little-endian bytes of its tensor as four planes: all first bytes, all second, …
Nothing is unpickled, no name in a file is looked up as code, and every length is checked before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

from rwkv_stream.errors import MismatchError, SnapshotError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State

VERSION = 3  # of a store: the highest of what its files may have
SMALL_FILE_LIMIT = 64 * 1024  # bytes of a record, head, tag or object header
EXACT = "exact"
ZSTD_LEVEL = 3
LAST_HIDDEN = "last_hidden"
_SMALL_STATE_BYTES, _MAX_RATIO = 1 << 28, 64  # a larger state that packs better than this is none, but a bomb

_FORMAT, _RECORD, _HEAD, _TAG = b"rwkv-fmt", b"rwkv-rec", b"rwkv-hed", b"rwkv-tag"
_VERSIONS = {_FORMAT: VERSION, _RECORD: 2, _HEAD: 2, _TAG: 1}
_OBJECT_VERSION = 1
_ADDED: dict[bytes, dict[int, dict[str, Any]]] = {  # fields by version, with what older files stand for
    _RECORD: {2: {"sampled_bits": 0.0, "sampled_tokens": 0}},
    _HEAD: {2: {"chunk": 0}},
}

_PREFIX = struct.Struct("<8sI")
_OBJECT_PREFIX = struct.Struct("<8sII")
_OBJECT_MAGIC = b"rwkv-obj"
HEADER_LIMIT = _OBJECT_PREFIX.size + SMALL_FILE_LIMIT  # bytes at an object's start that hold its header
_DIGEST_BYTES = 32
_HEX = frozenset("0123456789abcdef")


class StoredObject(NamedTuple):
    """One object that holds a snapshot's state: its name (SHA-256 of its bytes), how it is coded, its size."""

    name: str
    codec: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSnapshot:
    """What is known of a snapshot before it is stored; `bytes` and all offsets count the decoded UTF-8 text."""

    document: str
    model: str  # fingerprint
    model_path: str  # where that model was last seen
    tokenizer: str
    start_digest: str  # of the state before the first token, start token not yet fed
    start: str | None  # id of the snapshot whose state that was (`--from-snapshot`)
    chain: str  # chain digest of the token ids
    tokens: int
    bytes: int
    chunk: int
    leaf: bool  # off the chunk grid: can be forked, not continued
    parent: str | None
    how: str
    exact: bool
    numerics: Mapping[str, str | int] = field(hash=False)
    encoding: str
    decided_byte: int  # bytes of text that fix the tokens, -1: all of it and its end
    text_digest: str  # of the text through `decided_byte`
    anchor_byte: int
    anchor_token: int
    sampled_bits: float = 0.0  # surprise of the model, summed over every so manyth token since the start
    sampled_tokens: int = 0  # how many tokens that were, 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(NewSnapshot):
    """A snapshot in a store. Its facts are plain fields; `load` reads the object that holds its tensors."""

    id: str
    state_digest: str
    state_bytes: int  # of the decoded tensors, `last_hidden` included
    objects: tuple[StoredObject, ...]  # none: removed, only its place in the lineage is kept
    created: str  # UTC, ISO 8601
    folder: Path = field(repr=False, compare=False)  # where objects lie

    @property
    def size_bytes(self) -> int:
        """Bytes of its objects on disk."""
        return sum(stored.size_bytes for stored in self.objects)

    @property
    def removed(self) -> bool:
        return not self.objects

    def load(self) -> tuple[State, Tensor]:
        """The state, batch 1, and the hidden state fp32 [C] of the last token after `ln_out`, both on the CPU.

        raises  SnapshotError if one bit is not as it was stored, MismatchError for a codec of a newer version
        """
        return decode_state(read_object(self), self)

    def state(self) -> State:
        """The first of what `load` gives."""
        return self.load()[0]

    def last_hidden(self) -> Tensor:
        """The second of what `load` gives."""
        return self.load()[1]

    def facts(self) -> dict[str, Any]:
        """Everything recorded, ready for JSON."""
        names = [f.name for f in fields(self) if f.name not in ("id", "folder", "objects", "numerics")]
        return {
            "id": self.id,
            **{name: getattr(self, name) for name in names},
            "size_bytes": self.size_bytes,
            "numerics": dict(self.numerics),
            "objects": [stored._asdict() for stored in self.objects],
        }


@dataclass(frozen=True, slots=True)
class Head:
    """The newest snapshot of a document by a model; encoding and chunk are the document's own, as documents of the same
    tokens share their snapshots."""

    document: str
    model: str
    snapshot: str
    encoding: str
    moved: str  # UTC, ISO 8601
    chunk: int = 0  # tokens of a model call, 0: as the snapshot has it

    def view(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot where it stands, as the document has it: with its own encoding, on its own chunk grid."""
        chunk = self.chunk or snapshot.chunk
        leaf = snapshot.leaf if chunk == snapshot.chunk else snapshot.tokens % chunk != 0
        return replace(snapshot, encoding=self.encoding, chunk=chunk, leaf=leaf)


@dataclass(frozen=True, slots=True)
class Tag:
    """A name for one snapshot."""

    name: str
    snapshot: str
    created: str  # UTC, ISO 8601


def snapshot_id(model: str, start_digest: str, chain: str, tokens: int, state_digest: str) -> str:
    """Who a snapshot is: nothing of clock, path, document, parent or codec enters."""
    text = "\n".join(("rwkv-stream snapshot", model, start_digest, chain, str(tokens), state_digest))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in lower-case hex."""
    return type(value) is str and len(value) == 64 and _HEX.issuperset(value)


# ---- small files ----


def encode_format() -> bytes:
    return _seal(_FORMAT, {})


def decode_format(data: bytes, where: Path) -> int:
    """The version of a store; SnapshotError for damage, MismatchError for a newer one."""
    _unseal(_FORMAT, data, where)
    return int(_PREFIX.unpack_from(data)[1])


_RECORD_NAMES = [f.name for f in fields(Snapshot) if f.name not in ("id", "folder")]


def encode_record(snapshot: Snapshot) -> bytes:
    """UsageError where names in it are too long or are not text."""
    values = {name: getattr(snapshot, name) for name in _RECORD_NAMES}
    return _seal(_RECORD, values | {"numerics": dict(snapshot.numerics)})


def decode_row(data: bytes, folder: Path, where: Path, identity: str) -> Snapshot:
    """As `decode_record`, for bytes that were decoded before: only their checksum is looked at again."""
    return _snapshot(identity, folder, _unseal(_RECORD, data, where))


def decode_record(data: bytes, folder: Path, where: Path) -> Snapshot:
    """The snapshot of a record; SnapshotError if the bytes are damaged, MismatchError if of a newer version."""
    values = _unseal(_RECORD, data, where)
    _check(values, _RECORD_CHECKS, where)
    identity = snapshot_id(
        values["model"], values["start_digest"], values["chain"], values["tokens"], values["state_digest"]
    )
    return _snapshot(identity, folder, values)


def _snapshot(identity: str, folder: Path, values: dict[str, Any]) -> Snapshot:
    objects = tuple(StoredObject(*stored) for stored in values["objects"])
    return Snapshot(**values | {"id": identity, "folder": folder, "objects": objects})


def encode_head(head: Head) -> bytes:
    return _seal(_HEAD, {f.name: getattr(head, f.name) for f in fields(head)})


def decode_head(data: bytes, where: Path) -> Head:
    """Raises as `decode_record` does."""
    values = _unseal(_HEAD, data, where)
    _check(values, _HEAD_CHECKS, where)
    return Head(**values)


def encode_tag(tag: Tag) -> bytes:
    return _seal(_TAG, {f.name: getattr(tag, f.name) for f in fields(tag)})


def decode_tag(data: bytes, where: Path) -> Tag:
    """Raises as `decode_record` does."""
    values = _unseal(_TAG, data, where)
    _check(values, _TAG_CHECKS, where)
    return Tag(**values)


def read_file(path: Path, limit: int, *, is_prefix: bool = False) -> bytes:
    """All bytes of a plain file of at most `limit` bytes, or the first `limit` bytes of any.

    raises  FileNotFoundError, PermissionError; SnapshotError for everything else that cannot be such a file
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits, should it be a pipe
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or (found.st_size > limit and not is_prefix):
                raise damaged(path, f"a file of at most {limit} bytes", _kind(found))
        except BaseException:
            os.close(descriptor)
            raise
        with os.fdopen(descriptor, "rb") as file:
            return file.read(min(found.st_size, limit))
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, path) from error
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        raise damaged(path, "a readable file", error.strerror) from error


def damaged(where: Path, expected: str, found: object) -> SnapshotError:
    """The error for a file whose bytes are not what was written."""
    return SnapshotError(f"reading '{where}': expected {expected}, found {found}; run `rwkv-stream snapshots repair`")


def _newer(where: Path, expected: str, found: object) -> MismatchError:
    return MismatchError(f"reading '{where}': expected {expected}, found {found}; use a newer rwkv-stream")


def _kind(found: os.stat_result) -> str:
    return f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "something else"


def _seal(magic: bytes, values: dict[str, Any]) -> bytes:
    try:
        body = _PREFIX.pack(magic, _VERSIONS[magic]) + msgpack.packb(values)
    except UnicodeEncodeError as error:
        raise UsageError(f"naming a snapshot: expected valid text, found {error.object!r}; use --name") from error
    if len(body) + _DIGEST_BYTES > SMALL_FILE_LIMIT:
        raise UsageError(
            f"recording a snapshot: expected names that fit {SMALL_FILE_LIMIT} bytes, found {len(body)}; use --name"
        )
    return bytes(body + hashlib.sha256(body).digest())


def _unseal(magic: bytes, data: bytes, where: Path) -> dict[str, Any]:
    """The map of a small file of any version, with the fields of the present one."""
    body = data[:-_DIGEST_BYTES]
    if len(body) < _PREFIX.size or hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise damaged(where, "bytes that agree with their checksum", f"{len(data)} others")
    found_magic, version = _PREFIX.unpack_from(body)
    if found_magic != magic:
        raise damaged(where, f"a file that starts with {magic!r}", repr(found_magic))
    if version > _VERSIONS[magic]:
        raise _newer(where, f"format {_VERSIONS[magic]} or older", version)
    values = _unpack(body[_PREFIX.size :], where)
    for since, added in _ADDED.get(magic, {}).items():
        if version < since:
            if values.keys() & added.keys():
                raise damaged(where, f"the fields of version {version}", sorted(map(str, values)))
            values |= added
    return values


def _unpack(data: bytes, where: Path) -> dict[str, Any]:
    try:
        values = msgpack.unpackb(data)  # takes no memory for lengths beyond len(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(where, "msgpack", error) from error
    if type(values) is not dict:
        raise damaged(where, "a map", type(values).__name__)
    return values


def _check(values: dict[str, Any], checks: Mapping[str, Callable[[Any], bool]], where: Path) -> None:
    if values.keys() != checks.keys():
        raise damaged(where, f"the fields {sorted(checks)}", sorted(map(str, values)))
    for name, check in checks.items():
        if not check(values[name]):
            raise damaged(where, f"another value of '{name}'", repr(values[name])[:80])


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_digest_or_none(value: Any) -> bool:
    return value is None or is_digest(value)


def _is_model(value: Any) -> bool:
    return type(value) is str and bool(value) and value.isascii() and value.isprintable() and " " not in value


def _is_numerics(value: Any) -> bool:
    return type(value) is dict and all(type(k) is str and type(v) in (str, int) for k, v in value.items())


def _is_objects(value: Any) -> bool:
    return type(value) is list and all(
        type(item) is list and len(item) == 3 and is_digest(item[0]) and _is_text(item[1]) and _is_count(item[2])
        for item in value
    )


_RECORD_CHECKS: dict[str, Callable[[Any], bool]] = dict.fromkeys(_RECORD_NAMES, _is_text) | {
    "model": _is_model,
    "start_digest": is_digest,
    "start": _is_digest_or_none,
    "chain": is_digest,
    "tokens": _is_count,
    "bytes": _is_count,
    "chunk": _is_count,
    "leaf": _is_bool,
    "parent": _is_digest_or_none,
    "exact": _is_bool,
    "numerics": _is_numerics,
    "decided_byte": lambda value: value == -1 or _is_count(value),
    "anchor_byte": _is_count,
    "anchor_token": _is_count,
    "sampled_bits": lambda value: type(value) is float and 0 <= value < math.inf,
    "sampled_tokens": _is_count,
    "state_digest": is_digest,
    "state_bytes": _is_count,
    "objects": _is_objects,
}


_HEAD_CHECKS = {f.name: _is_text for f in fields(Head)} | {"snapshot": is_digest, "chunk": _is_count}
_TAG_CHECKS = {f.name: _is_text for f in fields(Tag)} | {"snapshot": is_digest}


def check_new(new: NewSnapshot) -> None:
    """UsageError unless a record of `new` could be read back."""
    for name in (f.name for f in fields(NewSnapshot)):
        value = getattr(new, name)
        if not _RECORD_CHECKS[name](dict(value) if name == "numerics" else value):
            raise UsageError(f"storing a snapshot: expected another value of '{name}', found {str(value)[:80]!r}")


# ---- objects ----


_IDENTITY_CHECKS: dict[str, Callable[[Any], bool]] = {
    name: _RECORD_CHECKS[name] for name in ("model", "start_digest", "chain", "tokens", "state_digest")
}


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
    return b"".join((_OBJECT_PREFIX.pack(_OBJECT_MAGIC, _OBJECT_VERSION, len(header)), header, *frames)), raw_bytes


def object_path(folder: Path, name: str) -> Path:
    return folder / name[:2] / name


def read_object(snapshot: Snapshot) -> bytes:
    """The object of a snapshot, checked against its size and name.

    raises  SnapshotError for damage or a missing file, MismatchError if no object is in a codec of this version
    """
    name, _, size_bytes = exact_object(snapshot)
    path = object_path(snapshot.folder, name)
    try:
        data = read_file(path, size_bytes)
    except FileNotFoundError as error:
        raise damaged(path, f"the object of snapshot '{snapshot.id}'", "no file") from error
    if len(data) != size_bytes:
        raise damaged(path, f"{size_bytes} bytes", f"{len(data)}: it is truncated")
    if hashlib.sha256(data).hexdigest() != name:
        raise damaged(path, "bytes that agree with the file's name", "others")
    return data


def exact_object(snapshot: Snapshot) -> StoredObject:
    """The object in codec `exact`; MismatchError if there is none."""
    for stored in snapshot.objects:
        if stored.codec == EXACT:
            return stored
    found = ", ".join(stored.codec for stored in snapshot.objects) or "nothing, as it was removed"
    raise MismatchError(
        f"loading snapshot '{snapshot.id}': expected codec '{EXACT}', found {found}; use a newer rwkv-stream"
    )


def decode_header(prefix: bytes, where: Path) -> tuple[dict[str, Any], int]:
    """The header of an object, and where its frames begin.

    prefix  the first `HEADER_LIMIT` bytes of the object, or all where it is smaller
    raises  SnapshotError, MismatchError for a newer version or another codec
    """
    start = _OBJECT_PREFIX.size
    if len(prefix) < start:
        raise damaged(where, "an object", f"{len(prefix)} bytes")
    magic, version, length = _OBJECT_PREFIX.unpack_from(prefix)
    if magic != _OBJECT_MAGIC:
        raise damaged(where, f"a file that starts with {_OBJECT_MAGIC!r}", repr(magic))
    if version > _OBJECT_VERSION:
        raise _newer(where, f"format {_OBJECT_VERSION} or older", version)
    if length > SMALL_FILE_LIMIT or start + length > len(prefix):
        raise damaged(where, f"a header of at most {SMALL_FILE_LIMIT} bytes", length)
    header = _unpack(prefix[start : start + length], where)
    _check(header, {"codec": _is_text, "tensors": _is_tensors} | _IDENTITY_CHECKS, where)
    if header["codec"] != EXACT:
        raise _newer(where, f"codec '{EXACT}'", header["codec"])
    return header, start + length


def check_header(prefix: bytes, snapshot: Snapshot, where: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and stored bytes of every tensor of an object, once its header is seen to be that of `snapshot`.

    prefix and raises as of `decode_header`
    """
    header, position = decode_header(prefix, where)
    for name in _IDENTITY_CHECKS:
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


def decode_state(data: bytes, snapshot: Snapshot) -> tuple[State, Tensor]:
    """State and last hidden state of an object; SnapshotError unless they are the ones that were stored."""
    import torch
    import zstandard

    from rwkv_stream.model.state import State

    where = object_path(snapshot.folder, exact_object(snapshot).name)
    layout = check_header(data[:HEADER_LIMIT], snapshot, where)
    decompressor = zstandard.ZstdDecompressor()
    position = len(data) - sum(stored_bytes for _, _, stored_bytes in layout)
    tensors: dict[str, Tensor] = {}
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
        tensors[name] = torch.from_numpy(_join_planes(planes, shape))
    last_hidden = tensors.pop(LAST_HIDDEN)
    state = State(tensors)
    if state.digest() != snapshot.state_digest:
        raise damaged(where, f"the state of snapshot '{snapshot.id}'", "another")
    return state, last_hidden


def _is_tensors(value: Any) -> bool:
    """A list of [name, shape, stored bytes], names different, the last one that of the last hidden state."""
    if type(value) is not list or not 1 < len(value) <= 64:
        return False
    for tensor in value:
        if type(tensor) is not list or len(tensor) != 3 or not _is_text(tensor[0]) or not _is_count(tensor[2]):
            return False
        shape = tensor[1]
        if type(shape) is not list or not 0 < len(shape) <= 8:
            return False
        if not all(_is_count(n) and 0 < n < 1 << 32 for n in shape):
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


def check_model(snapshot: Snapshot, model: Model) -> None:
    """Raise MismatchError if another model made the snapshot."""
    if snapshot.model != model.fingerprint:
        raise MismatchError(
            f"using snapshot {snapshot.id[:12]}: expected its model {snapshot.model}, last seen at "
            f"'{snapshot.model_path}', found {model.fingerprint} at '{model.path}'; pass --model with the first one"
        )
