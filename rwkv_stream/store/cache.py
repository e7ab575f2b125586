"""States that were made when they were asked for, kept for the next time in a bounded folder: derived, as postings are.

Nothing here is synced, and anything may be deleted at any time: what is missing or damaged is made again. A file is
named by what its state is after (model, start, tokens) and by the numerics that it was made under, so that no state is
taken for one of other last bits. What was used least recently goes first.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv_stream.errors import MismatchError, SnapshotError
from rwkv_stream.store import records
from rwkv_stream.store.codecs import EXACT
from rwkv_stream.store.layout import files
from rwkv_stream.store.objects import decode_arrays, encode_arrays
from rwkv_stream.store.records import POSITION, Snapshot, StateElsewhere, StoredObject
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, damaged, newer, read_file

if TYPE_CHECKING:
    from rwkv_stream.store.layout import StoreFiles
    from rwkv_stream.store.records import Arrays

CACHED, CACHED_VERSION = b"rwkv-cch", 1
DEFAULT_BYTES, DEFAULT_SHARE = 10**9, 0.05  # the smaller one, of a store's states

_PREFIX = struct.Struct("<8sIII")  # magic, version, bytes of the record and of the extent behind it
_DIGEST_BYTES = 32


class Cached(NamedTuple):
    """What a file holds: a snapshot, and where its state lies in the file's bytes."""

    snapshot: Snapshot
    state: bytes


def key(model: str, start_digest: str, chain: str, tokens: int, numerics: Mapping[str, str | int]) -> str:
    """The name of the file for the state after these tokens."""
    values = "rwkv-stream cache", model, start_digest, chain, str(tokens), json.dumps(dict(numerics), sort_keys=True)
    return hashlib.sha256("\n".join(values).encode()).hexdigest()


class Cache:
    """The folder of a store in which made states are kept."""

    def __init__(self, store: StoreFiles) -> None:
        self._store, self.folder = store, store.cache

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def read(self, name: str) -> Cached | None:
        """What the file of this name holds; None where there is none, or it is damaged or newer: it is made again."""
        path = self.path(name)
        try:
            cached = self._decode(read_file(path, path.stat().st_size), path)
        except (FileNotFoundError, SnapshotError, MismatchError):
            return None
        return cached

    def load(self, name: str) -> tuple[Snapshot, Arrays] | None:
        """As `read`, with the state, bit for bit."""
        found = self.read(name)
        if found is None:
            return None
        try:
            return found.snapshot, decode_arrays(found.state, found.snapshot, self.path(name))
        except (SnapshotError, MismatchError):
            return None

    def names(self) -> Iterator[str]:
        return (path.name for path in files(self.folder) if self._store.is_cached(path))

    def listed(self) -> Iterator[tuple[str, Snapshot]]:
        """The name and the record of each; the state, which is not looked at, may be damaged."""
        for name in self.names():
            path = self.path(name)
            try:
                data = read_file(path, _PREFIX.size + SMALL_FILE_LIMIT, is_prefix=True)
                yield name, self._record(data, path)[0]
            except (FileNotFoundError, SnapshotError, MismatchError):
                continue  # removed since, or no good: it is made again

    def position(self, prefix: str, model: str | None) -> Snapshot | None:
        """The one state that was made at a position, and whose id begins so; it is loaded from here.

        model  fingerprint, None: of any
        """
        fits: dict[str, Snapshot] = {}
        for name, listed in self.listed():
            if listed.how == POSITION and listed.id.startswith(prefix) and model in (None, listed.model):
                found = self.read(name)
                if found is not None:
                    reader = StateElsewhere(self._store, listed.id, functools.partial(self._state, name, listed.id))
                    fits[listed.id] = replace(found.snapshot, objects=(), reader=reader)
        return next(iter(fits.values())) if len(fits) == 1 else None

    def _state(self, name: str, identity: str) -> Arrays:
        found = self.load(name)
        if found is None or found[0].id != identity:
            raise damaged(self.path(name), "a state that was made", "none any more")
        return found[1]

    def touch(self, name: str) -> None:
        """Note that it was used."""
        try:
            os.utime(self.path(name))
        except OSError:  # removed since, or a store that may only be read
            return

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def shrink(self, limit: int, but: str) -> None:
        """Remove what was used least recently, until what is left takes `limit` bytes, or only the file `but` is."""
        found = []
        for name in self.names():
            try:
                status = self.path(name).stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime_ns, name, status.st_size))
        size = sum(n_bytes for _, _, n_bytes in found)
        for _, name, n_bytes in sorted(found):
            if size <= limit:
                return
            if name != but:
                self.remove(name)
                size -= n_bytes

    def _decode(self, data: bytes, where: Path) -> Cached:
        body = data[:-_DIGEST_BYTES]
        if hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
            raise damaged(where, "it as it was written", f"{len(data)} bytes that were changed or cut short since")
        snapshot, at, extent = self._record(body, where)
        if extent:
            snapshot = replace(snapshot, inline_extent=body[at : at + extent])
        return Cached(snapshot, body[at + extent :])

    def _record(self, data: bytes, where: Path) -> tuple[Snapshot, int, int]:
        """The record, where it ends, and the bytes of the extent behind it."""
        if len(data) < _PREFIX.size:
            raise damaged(where, "a state that was made", f"{len(data)} bytes")
        magic, version, record, extent = _PREFIX.unpack_from(data)
        if magic != CACHED:
            raise damaged(where, f"a file that starts with {CACHED!r}", repr(magic))
        if version > CACHED_VERSION:
            raise newer(where, f"format {CACHED_VERSION} or older", version)
        at = _PREFIX.size + record
        return records.decode_record(data[_PREFIX.size : at], self._store, where), at, extent


def encode(snapshot: Snapshot, arrays: Arrays) -> bytes:
    """The bytes of a file: of a snapshot whose state was made."""
    state = encode_arrays(snapshot, arrays, snapshot.state_digest, EXACT)
    stored = StoredObject(hashlib.sha256(state).hexdigest(), EXACT, len(state))
    extent = snapshot.inline_extent or b""
    record = records.encode_record(replace(snapshot, objects=(stored,), inline_extent=None))
    body = b"".join((_PREFIX.pack(CACHED, CACHED_VERSION, len(record), len(extent)), record, extent, state))
    return body + hashlib.sha256(body).digest()
