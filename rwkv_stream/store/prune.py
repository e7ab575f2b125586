"""Removing what nothing in a store refers to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import failpoint, fsync_folder, remove
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.layout import StoreFiles, files, temps
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, is_digest, read_file
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.verify import verify

FAILPOINTS = ("prune.uncatalogued", "prune.record.removed", "prune.object.removed", "prune.swept")


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be: how many files of each kind, and how many bytes they are."""

    snapshots: int  # records, those of removed snapshots too
    objects: int
    strays: int  # temp files, and locks of heads
    bytes: int


def prune(sessions: Sessions, *, dry_run: bool) -> Pruned:
    """Remove what nothing refers to; see `Store.prune`."""
    store = sessions.store
    with sessions.alone(), sessions.publishing():
        try:
            _check_refs(sessions)
            sessions.note_changing()  # until all is done
            sessions.index.rebuild()
        except SnapshotError as error:
            raise SnapshotError(
                f"pruning store '{store.path}': expected every record and ref whole: {error}"
            ) from error
        with sessions.index.open(writable=True) as index:
            return _remove(store, index, dry_run=dry_run)


def _check_refs(sessions: Sessions) -> None:
    """SnapshotError unless every record and ref is whole, and what they refer to is there; the catalog knows what was
    there."""
    store = sessions.store
    for damage in verify(sessions, read_data=False).damaged:
        path = store.path / damage.path
        if store.records in path.parents or store.tags.parent in path.parents:
            if path.is_file():
                store.decode(path, read_file(path, SMALL_FILE_LIMIT))  # MismatchError for a newer version
            raise SnapshotError(f"'{damage.path}': {damage.reason}; run `rwkv-stream snapshots repair`")


def _remove(store: StoreFiles, index: Catalog, *, dry_run: bool) -> Pruned:
    """Remove the snapshots that no head or tag, nor what these go on or started from, reaches; then the objects that no
    record names; then temp files and the locks of heads.

    index  a catalog just made from the files; nobody else may be at work in the store
    Order: catalog, records (none before those that go on from it), objects; each durable before the next.
    """
    n_snapshots = index.mark_unreached()
    size = sum(store.record_path(identity).stat().st_size for identity, _ in index.unreached())
    if not dry_run and n_snapshots:
        _remove_records(store, index)
    n_objects = 0
    folder: Path | None = None
    for path in files(store.objects.folder):
        if not is_digest(path.name) or store.objects.path(path.name) != path or index.is_needed(path.name):
            continue  # what is not ours is `repair`'s matter
        n_objects += 1
        size += path.stat().st_size
        if not dry_run:
            path.unlink()
            failpoint("prune.object.removed")
            if folder not in (None, path.parent):
                fsync_folder(folder)
            folder = path.parent
    if folder is not None:
        fsync_folder(folder)
    n_strays = 0
    for path in (*temps(store.path), *store.locks.glob("head-*")):
        n_strays += 1
        size += path.stat().st_size
        if not dry_run:
            remove(path)
    if not dry_run:
        failpoint("prune.swept")
    return Pruned(n_snapshots, n_objects, n_strays, size)


def _remove_records(store: StoreFiles, index: Catalog) -> None:
    with index.changing():
        index.drop_unreached()
    failpoint("prune.uncatalogued")
    folders: set[Path] = set()
    last: int | None = None
    for identity, tokens in index.unreached():
        if tokens != last:  # those that go on from these are gone for good
            for folder in sorted(folders):
                fsync_folder(folder)
            folders.clear()
            last = tokens
        path = store.record_path(identity)
        path.unlink()
        folders.add(path.parent)
        failpoint("prune.record.removed")
    for folder in sorted(folders):
        fsync_folder(folder)
