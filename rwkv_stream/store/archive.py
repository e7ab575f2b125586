"""One file that holds snapshots for another store: an uncompressed tar of a store with `format` first.

    format, objects/ab/<digest>, texts/ab/<digest>, records/ab/<id>, refs/heads/<digest>, refs/tags/<name>

Plain files only. What is read is not trusted: a member's name must be one of these, no member is larger than its kind
allows or than the archive itself, and nothing is unpacked but into the folder given.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import make_folder
from rwkv_stream.store import records
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.objects import HEADER_LIMIT, decode_header, held_object
from rwkv_stream.store.records import Head, Snapshot, Tag
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, encode_format, read_file
from rwkv_stream.store.texts import FILE_LIMIT, decode

_MEMBER = re.compile(
    r"format|(?:objects|texts|records)/([0-9a-f]{2})/\1[0-9a-f]{62}|refs/heads/[0-9a-f]{64}|refs/tags/(?!\.)[\w%.-]{1,200}",
    re.ASCII,
)
_LONG_NAME_LIMIT = 512  # bytes of a name that does not fit a header
_BLOCK_BYTES = 1 << 20


def pack(store: StoreFiles, snapshots: Iterable[Snapshot], refs: Iterable[Head | Tag], file: BinaryIO) -> int:
    """Write snapshots (removed ones: their place in the lineage) and refs; returns how many bytes that took.

    raises  SnapshotError where an object or a text is damaged
    """
    n_bytes = 0
    packed: set[bytes] = set()  # extents

    def add(path: Path, data: bytes) -> None:
        nonlocal n_bytes
        member = tarfile.TarInfo(path.relative_to(store.path).as_posix())
        member.size = len(data)
        for part in (member.tobuf(tarfile.GNU_FORMAT, "ascii"), data, bytes(-len(data) % tarfile.BLOCKSIZE)):
            _write(file, part)
            n_bytes += len(part)

    add(store.format, encode_format())
    for snapshot in snapshots:
        if snapshot.keeps_state:
            stored = held_object(snapshot)
            add(store.objects.path(stored.name), store.objects.read(stored))
        for extent in store.texts.chain(snapshot.last_extent):
            if bytes.fromhex(extent.name) in packed:
                break  # what comes before it is there
            packed.add(bytes.fromhex(extent.name))
            home = store.texts.path(extent.name)
            data = read_file(home, FILE_LIMIT)
            decode(data, home)
            add(home, data)
        add(store.record_path(snapshot.id), records.encode_record(snapshot))
    for ref in refs:
        if isinstance(ref, Head):
            add(store.head_path(ref.document, ref.model), records.encode_head(ref))
        else:
            path = store.tag_path(ref.name)
            assert path is not None
            add(path, records.encode_tag(ref))
    _write(file, bytes(2 * tarfile.BLOCKSIZE))
    return n_bytes + 2 * tarfile.BLOCKSIZE


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: a file without a buffer, as standard output may be, takes less at times."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def unpack(file: BinaryIO, store: StoreFiles) -> None:
    """Write the members of an archive into an empty folder, each file checked by itself.

    raises  SnapshotError for what is no such archive or is damaged, MismatchError for one of a newer format
    """
    names = set[str]()
    for name, size in _members(file):
        if (name == "format") == bool(names) or name in names:
            raise _refused("'format' first and every member once", f"'{name}'")
        names.add(name)
        path = store.path / name
        make_folder(path.parent)
        with path.open("xb") as out:
            digest = _copy(file, out, size, name)
            out.flush()
            os.fsync(out.fileno())
        if store.objects.folder in path.parents:
            if digest != path.name:
                raise _refused(f"bytes of '{name}' that agree with its name", "others")
            decode_header(read_file(path, HEADER_LIMIT, is_prefix=True), path)
        elif store.texts.folder in path.parents:
            if digest != path.name:
                raise _refused(f"bytes of '{name}' that agree with its name", "others")
            store.texts.extent(path.name)
        else:
            _check_small(store, path)
    if not names:
        raise _refused("'format' first", "nothing")


def _check_small(store: StoreFiles, path: Path) -> None:
    if path == store.format:
        store.check_format()
    elif store.records in path.parents:
        store.read_record(path.name)
    elif path.parent == store.heads:
        store.read_head(path)
    else:
        store.read_tag(path)


def _members(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each member; its bytes are to be read before the next is asked for."""
    long_name: str | None = None
    while True:
        header = _exactly(file, tarfile.BLOCKSIZE, "a header")
        if not header.strip(b"\0"):
            if _exactly(file, tarfile.BLOCKSIZE, "the end").strip(b"\0") or long_name is not None:
                raise _refused("a member and two blocks of zeros at the end", "others")
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise _refused("a tar header", error) from error
        name = long_name or member.name
        if member.type == tarfile.GNUTYPE_LONGNAME and long_name is None and 0 < member.size <= _LONG_NAME_LIMIT:
            raw = _exactly(file, member.size + -member.size % tarfile.BLOCKSIZE, "a name")[: member.size]
            long_name = raw.rstrip(b"\0").decode("ascii", "replace")
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not _MEMBER.fullmatch(name):
            raise _refused("plain files of a store", f"'{name[:200]}' of type {member.type!r}")
        if member.size < 0 or (not name.startswith("objects/") and member.size > _limit(name)):
            raise _refused(f"at most {_limit(name)} bytes of '{name}'", member.size)
        long_name = None
        yield name, member.size


def _limit(name: str) -> int:
    """Most bytes of a member that is no object."""
    return FILE_LIMIT if name.startswith("texts/") else SMALL_FILE_LIMIT


def _copy(file: BinaryIO, out: IO[bytes], size: int, name: str) -> str:
    """Copy a member's bytes and skip its padding; the SHA-256 of the bytes."""
    digest = hashlib.sha256()
    left = size
    while left:
        block = _exactly(file, min(left, _BLOCK_BYTES), f"'{name}'")
        digest.update(block)
        out.write(block)
        left -= len(block)
    _exactly(file, -size % tarfile.BLOCKSIZE, f"'{name}'")
    return digest.hexdigest()


def _exactly(file: BinaryIO, size: int, what: str) -> bytes:
    """So many bytes, however few a pipe gives at once."""
    blocks: list[bytes] = []
    left = size
    while left:
        block = file.read(left)
        if not block:
            raise _refused(f"{left} bytes more of {what}", "the end of the file: it is truncated or no export")
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def _refused(expected: str, found: object) -> SnapshotError:
    return SnapshotError(f"importing snapshots: expected {expected}, found {found}; export them again")
