"""Where the files of a store lie, and what they say; writes nothing and trusts nothing but checksums.

Whoever reads here takes no lock: a file is whole or absent, what a file refers to was durable before it, and a head or
tag is moved away from a snapshot before that snapshot goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from rwkv_stream.errors import MismatchError, NotFoundError, SnapshotError
from rwkv_stream.files import TEMP_PREFIX
from rwkv_stream.store import records
from rwkv_stream.store.objects import Objects, held_object
from rwkv_stream.store.records import Head, Snapshot, Tag
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, damaged, decode_format, is_digest, read_file
from rwkv_stream.store.texts import KeptText, SavePostings, Texts
from rwkv_stream.store.texts import decode as decode_extent

if TYPE_CHECKING:
    from rwkv_stream.store.records import Arrays

ID_PREFIX = re.compile(r"[0-9a-f]{8,64}")
NETWORK_FILESYSTEMS = {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre"}
NETWORK_FILESYSTEMS |= {"nfs", "nfs4", "smb3", "smbfs"}
_TAG_FILE_LIMIT = 200  # bytes of a quoted tag, which names a file

log = logging.getLogger(__name__)


class StoreFiles:
    """The folder of a store: the reader of its snapshots.

    All that reads raises SnapshotError for damage and MismatchError for a file of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format = path / "format"
        self.objects = Objects(path / "objects")
        self.texts = Texts(path / "texts", path / "postings")
        self.records = path / "records"
        self.heads = path / "refs" / "heads"
        self.tags = path / "refs" / "tags"
        self.catalog = path / "catalog.sqlite"
        self.cache = path / "cache"
        self.quarantine = path / "quarantine"
        self.locks = path / "locks"
        self.markers = path / "locks" / "writers"

    # ---- paths ----

    def own_names(self) -> set[str]:
        """What lies in the folder."""
        data = (self.objects.folder, self.texts.folder, self.texts.postings_folder)
        paths = (self.format, *data, self.records, self.heads, self.catalog, self.cache, self.quarantine, self.locks)
        return {path.relative_to(self.path).parts[0] for path in paths}

    def record_path(self, identity: str) -> Path:
        return self.records / identity[:2] / identity

    def head_path(self, document: str, model: str) -> Path:
        return self.heads / head_key(document, model)

    def tag_path(self, name: str) -> Path | None:
        """None for what cannot be a tag, as it would be read as another kind of reference."""
        if not name or name != name.strip() or not name.isprintable() or re.search("[@~]", name):
            return None
        quoted = quote(name, safe="")
        quoted = f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
        return self.tags / quoted if len(quoted) <= _TAG_FILE_LIMIT and not ID_PREFIX.fullmatch(name) else None

    # ---- files ----

    def check_format(self) -> int:
        """The version of the store; FileNotFoundError where there is none."""
        return decode_format(read_file(self.format, SMALL_FILE_LIMIT), self.format)

    def read_record(self, identity: str) -> Snapshot | None:
        """The record of a whole id, removed or not; None where there is none."""
        path = self.record_path(identity)
        try:
            return self.decode_record(read_file(path, SMALL_FILE_LIMIT), path)
        except FileNotFoundError:
            return None

    def known(self, identity: str) -> Snapshot | None:
        """As `read_record`, where a record is about to be made again: a damaged one counts as none and is replaced."""
        try:
            return self.read_record(identity)
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return None

    def has_state(self, snapshot: Snapshot) -> bool:
        """Whether its object is there and whole; a damaged one is replaced."""
        if not snapshot.keeps_state:
            return False
        try:
            self.objects.read(held_object(snapshot))
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return False
        return True

    def decode_record(self, data: bytes, path: Path) -> Snapshot:
        """What the bytes of the record file at `path` say."""
        snapshot = records.decode_record(data, self, path)
        if self.record_path(snapshot.id) != path:
            raise damaged(path, "the record of that id", f"that of '{snapshot.id}'")
        return snapshot

    def read_head(self, path: Path) -> Head | None:
        """None where there is none."""
        try:
            return self.decode_head(read_file(path, SMALL_FILE_LIMIT), path)
        except FileNotFoundError:
            return None

    def decode_head(self, data: bytes, path: Path) -> Head:
        """What the bytes of the head file at `path` say."""
        head = records.decode_head(data, path)
        if self.head_path(head.document, head.model) != path:
            raise damaged(path, "the head of that name", f"that of '{head.document}'")
        return head

    def read_tag(self, path: Path) -> Tag | None:
        """None where there is none."""
        try:
            return self.decode_tag(read_file(path, SMALL_FILE_LIMIT), path)
        except FileNotFoundError:
            return None

    def decode_tag(self, data: bytes, path: Path) -> Tag:
        """What the bytes of the tag file at `path` say."""
        tag = records.decode_tag(data, path)
        if self.tag_path(tag.name) != path:
            raise damaged(path, "the tag of that name", f"that of '{tag.name}'")
        return tag

    def decode(self, path: Path, data: bytes) -> Snapshot | Head | Tag:
        """What the bytes of the record, head or tag file at `path` say."""
        if path.parent == self.heads:
            return self.decode_head(data, path)
        if path.parent == self.tags:
            return self.decode_tag(data, path)
        return self.decode_record(data, path)

    def decode_row(self, identity: str, record: bytes) -> Snapshot:
        """The snapshot of a record that was decoded when the catalog got it."""
        return records.decode_row(record, self, self.catalog, identity)

    def is_cached(self, path: Path) -> bool:
        """Whether a file in the cache is where one of its is; see `Cache`."""
        return is_digest(path.name) and path.parent == self.cache / path.name[:2]

    def size_bytes(self) -> int:
        """Of all files of the store, but for locks and the catalog, which is derived."""
        size = 0
        for entry in self._all_files(self.path):
            with contextlib.suppress(FileNotFoundError):  # another writer's, on its way
                size += entry.stat(follow_symlinks=False).st_size
        return size

    def _all_files(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith(self.catalog.name):
                        yield entry
                elif entry.name != self.locks.name:
                    yield from self._all_files(Path(entry.path))

    # ---- snapshots ----

    def live(self, identity: str) -> Snapshot:
        """The snapshot of a whole id; NotFoundError unless it exists."""
        snapshot = self.read_record(identity) if is_digest(identity) else None
        if snapshot is None or snapshot.removed:
            found = "none" if snapshot is None else "that it was removed"
            raise NotFoundError(f"finding snapshot '{identity}' in store '{self.path}': expected one, found {found}")
        return snapshot

    def with_prefix(self, prefix: str) -> Iterator[Snapshot]:
        """Those that exist and whose id starts so, by the files' names."""
        for path in files(self.records / prefix[:2]):
            if path.name.startswith(prefix):
                snapshot = self.read_record(path.name)
                if snapshot is not None and not snapshot.removed:
                    yield snapshot

    def newest(self, document: str, model: str) -> tuple[Head, Snapshot] | None:
        """The head of a document, by its whole name, and the snapshot where it stands."""
        path = self.head_path(document, model)
        head = self.read_head(path)
        while head is not None:
            try:
                return head, self.target(head.snapshot, path)
            except SnapshotError:
                again = self.read_head(path)
                if again == head:
                    raise
                head = again
        return None

    def target(self, identity: str, ref: Path) -> Snapshot:
        """The snapshot that a ref names; one that does not exist is damage."""
        try:
            return self.live(identity)
        except NotFoundError as error:
            raise damaged(ref, "a snapshot that exists", f"'{identity}'") from error

    def arrays(self, snapshot: Snapshot) -> Arrays:
        """As `Snapshot.arrays`."""
        try:
            return self.objects.load(snapshot)
        except SnapshotError as error:
            known = self.read_record(snapshot.id)
            if not snapshot.removed and known is not None and known.removed:
                raise NotFoundError(
                    f"loading snapshot {snapshot.id[:12]}: expected its state, found that it was removed meanwhile; "
                    "take the one before it"
                ) from error
            raise

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshots it goes on from, nearest first, removed ones too."""
        child = snapshot
        while child.parent is not None:
            record = self.read_record(child.parent)
            if record is None:
                return
            self.check_descent(record.id, record.tokens, child.tokens)
            yield record
            child = record

    def starts(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshot whose state its reading started from, and so on, removed ones too."""
        passed: set[str] = set()
        while snapshot.start is not None and (record := self.read_record(snapshot.start)) is not None:
            if record.id in passed:
                raise damaged(self.record_path(record.id), "a start that is no ring", f"'{record.id}' again")
            passed.add(record.id)
            yield record
            snapshot = record

    def text(self, snapshot: Snapshot, save: SavePostings | None = None) -> KeptText | None:
        """As `Store.text`; `save` is given postings that had to be made."""
        if snapshot.text is None:
            return None
        inline = snapshot.inline_extent
        return KeptText(self.texts, snapshot.document, snapshot.text, snapshot.bytes, save, inline=inline)

    def start_gap(self, snapshot: Snapshot) -> tuple[Path, str] | None:
        """What is wrong with the snapshot that the state of one without a state is made from: its record, and why."""
        if snapshot.keeps_state or snapshot.removed or snapshot.start is None:
            return None
        path = self.record_path(snapshot.start)
        try:
            start = self.read_record(snapshot.start)
        except (SnapshotError, MismatchError) as error:
            return path, str(error)
        is_there = start is not None and start.keeps_state
        return None if is_there else (path, f"no state; that of snapshot '{snapshot.id}' is made from it")

    def text_gap(self, snapshot: Snapshot) -> tuple[Path, str] | None:
        """What is wrong with the text that a record leads to: the file, and why. None where it is whole by the headers
        of its extents, as far as to the text of its nearest ancestor that exists, which is that one's matter."""
        try:
            ancestor = next((ancestor for ancestor in self.ancestors(snapshot) if not ancestor.removed), None)
        except (SnapshotError, MismatchError):
            ancestor = None
        name, byte_end = snapshot.text, snapshot.bytes
        if name is not None and snapshot.inline_extent is not None:
            path = self.record_path(snapshot.id)
            try:
                extent = decode_extent(snapshot.inline_extent, path / name).extent
            except (SnapshotError, MismatchError) as error:
                return path, str(error)
            stretch = extent.byte_start, extent.byte_end
            return (path, f"expected text of {byte_end} bytes, found {stretch}") if stretch != (0, byte_end) else None
        while name is not None and (ancestor is None or name != ancestor.text):
            path = self.texts.path(name)
            if not path.exists():
                return path, f"missing; it holds text of snapshot '{snapshot.id}'"
            try:
                extent = self.texts.extent(name)
            except (SnapshotError, MismatchError) as error:
                return path, str(error)
            if extent.byte_end != byte_end:
                return path, f"expected text of snapshot '{snapshot.id}' up to byte {byte_end}, found {extent.byte_end}"
            name, byte_end = extent.previous, extent.byte_start
        return None

    def check_descent(self, parent: str, tokens: int, child_tokens: int) -> None:
        """Parents lie before their children, so that no chain can be a ring."""
        if tokens >= child_tokens:
            raise damaged(self.record_path(parent), f"a parent before token {child_tokens}", f"token {tokens}")


def files(folder: Path) -> Iterator[Path]:
    """The files of a folder and its folders, by name; temp files are left out, an absent folder has none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except FileNotFoundError:
        return
    for name, is_folder in found:
        if name.startswith(TEMP_PREFIX):
            continue
        if is_folder:
            yield from files(folder / name)
        else:
            yield folder / name


def temps(folder: Path) -> Iterator[Path]:
    """The temp files and folders under a folder."""
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in found:
        if name.startswith(TEMP_PREFIX):
            yield folder / name
        elif is_folder:
            yield from temps(folder / name)


def stamp(path: Path) -> str:
    """Tells a file from the one that it replaced: every publishing makes a new file."""
    found = path.stat()
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def filesystem(path: Path) -> str | None:
    """Type of the filesystem that a path lies on, as Linux tells it; None elsewhere."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    target = f"{path.resolve()}/"
    longest, found = 0, None
    for line in lines:  # "36 35 98:0 /root /mount/point options - type source options"
        left, _, right = line.partition(" - ")
        mount = left.split(" ")[4].encode().decode("unicode_escape").rstrip("/") + "/"
        if target.startswith(mount) and len(mount) >= longest:
            longest, found = len(mount), right.split(" ")[0]
    return found


def publishing_failpoints(kind: str) -> tuple[str, ...]:
    """Those that `files.publish` passes for files of a kind."""
    return tuple(f"{kind}.{step}" for step in ("written", "synced", "renamed", "published"))


def head_key(document: str, model: str) -> str:
    """What the files of one (document, model) are called."""
    return hashlib.sha256(f"{document}\0{model}".encode()).hexdigest()
