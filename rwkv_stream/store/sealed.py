"""Small files that prove their own bytes: magic, version, a map, a checksum. The tables are in docs/store-format.md.

The checksum holds in every version, so damage is told from a newer format. Nothing is unpickled, no name in a file is
looked up as code, and every length is checked before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from rwkv_stream.errors import MismatchError, SnapshotError, UsageError

VERSION = 5  # of a store: raised with that of any of its files
SMALL_FILE_LIMIT = 64 * 1024  # bytes of a record, head, tag or object header
REPAIR = "run `rwkv-stream snapshots repair`"

FORMAT, RECORD, HEAD, TAG = b"rwkv-fmt", b"rwkv-rec", b"rwkv-hed", b"rwkv-tag"
VERSIONS = {FORMAT: VERSION, RECORD: 4, HEAD: 3, TAG: 1}
_ADDED: dict[bytes, dict[int, dict[str, Any]]] = {  # fields by version, with what older files stand for
    RECORD: {
        2: {"sampled_bits": 0.0, "sampled_tokens": 0},
        3: {"text": None},
        4: {"inline_extent": None, "norms": {}, "drift": {}, "edge": False},
    },
    HEAD: {2: {"chunk": 0}, 3: {"mark": None, "snapshot_at": ""}},
}

PREFIX = struct.Struct("<8sII")  # of a file that is more than one map: magic, version, bytes of the header behind it
_PREFIX = struct.Struct("<8sI")
_DIGEST_BYTES = 32
_HEX = frozenset("0123456789abcdef")

Checks = Mapping[str, Callable[[Any], bool]]  # of the fields of a map


def seal(magic: bytes, values: Mapping[str, Any]) -> bytes:
    """The bytes of a small file; UsageError where names in it are too long or are not text."""
    try:
        body = _PREFIX.pack(magic, VERSIONS[magic]) + msgpack.packb(values)
    except UnicodeEncodeError as error:
        raise UsageError(f"naming a snapshot: expected valid text, found {error.object!r}; use --name") from error
    if len(body) + _DIGEST_BYTES > SMALL_FILE_LIMIT:
        raise UsageError(
            f"recording a snapshot: expected names that fit {SMALL_FILE_LIMIT} bytes, found {len(body)}; use --name"
        )
    return bytes(body + hashlib.sha256(body).digest())


def unseal(magic: bytes, data: bytes, where: Path) -> dict[str, Any]:
    """The map of a small file of any version, with the fields of the present one.

    raises  SnapshotError for damage, MismatchError for a newer version
    """
    body = data[:-_DIGEST_BYTES]
    if len(body) < _PREFIX.size or hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise damaged(where, "it as it was written", f"{len(data)} bytes that were changed or cut short since")
    found_magic, version = _PREFIX.unpack_from(body)
    if found_magic != magic:
        raise damaged(where, f"a file that starts with {magic!r}", repr(found_magic))
    if version > VERSIONS[magic]:
        raise newer(where, f"format {VERSIONS[magic]} or older", version)
    values = unpack(body[_PREFIX.size :], where)
    for since, added in _ADDED.get(magic, {}).items():
        if version < since:
            if values.keys() & added.keys():
                raise damaged(where, f"the fields of version {version}", sorted(map(str, values)))
            values |= added
    return values


def header_length(prefix: bytes, magic: bytes, version: int, what: str, where: Path) -> int:
    """Bytes of the header behind the PREFIX that a file begins with; `version` is the newest that is known.

    raises  SnapshotError for another file, MismatchError for a newer version
    """
    if len(prefix) < PREFIX.size:
        raise damaged(where, what, f"{len(prefix)} bytes")
    found_magic, found_version, length = PREFIX.unpack_from(prefix)
    if found_magic != magic:
        raise damaged(where, f"a file that starts with {magic!r}", repr(found_magic))
    if found_version > version:
        raise newer(where, f"format {version} or older", found_version)
    return int(length)


def encode_format() -> bytes:
    """The bytes of a store's `format` file."""
    return seal(FORMAT, {})


def decode_format(data: bytes, where: Path) -> int:
    """The version of a store; SnapshotError for damage, MismatchError for a newer one."""
    unseal(FORMAT, data, where)
    return int(_PREFIX.unpack_from(data)[1])


def unpack(data: bytes, where: Path) -> dict[str, Any]:
    """A msgpack map; SnapshotError for anything else."""
    try:
        values = msgpack.unpackb(data)  # takes no memory for lengths beyond len(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(where, "msgpack", error) from error
    if type(values) is not dict:
        raise damaged(where, "a map", type(values).__name__)
    return values


def check(values: Mapping[str, Any], checks: Checks, where: Path) -> None:
    """SnapshotError unless a map has just the fields that are checked, each with a value that may be."""
    if values.keys() != checks.keys():
        raise damaged(where, f"the fields {sorted(checks)}", sorted(map(str, values)))
    for name, is_valid in checks.items():
        if not is_valid(values[name]):
            raise damaged(where, f"another value of '{name}'", repr(values[name])[:80])


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
    return SnapshotError(f"reading '{where}': expected {expected}, found {found}; {REPAIR}")


def newer(where: Path, expected: str, found: object) -> MismatchError:
    """The error for a file of a version that is not known yet."""
    return MismatchError(f"reading '{where}': expected {expected}, found {found}; use a newer rwkv-stream")


def _kind(found: os.stat_result) -> str:
    return f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "something else"


def is_digest(value: object) -> bool:
    """Whether this is a SHA-256 in lower-case hex."""
    return type(value) is str and len(value) == 64 and _HEX.issuperset(value)


def is_text(value: object) -> bool:
    return type(value) is str


def is_count(value: object) -> bool:
    """Whether this is a number that fits sqlite's and is not negative."""
    return type(value) is int and 0 <= value < 1 << 63
