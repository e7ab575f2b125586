"""Removing what nothing in a store refers to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import failpoint, fsync_folder, remove
from rwkv_stream.store import retention
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.layout import StoreFiles, files, temps
from rwkv_stream.store.retention import Rule, Thinned
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, is_digest, read_file
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.verify import check_store

FAILPOINTS = (
    "prune.uncatalogued",
    "prune.record.removed",
    "prune.object.removed",
    "prune.postings.removed",
    "prune.text.removed",
    "prune.cache.removed",
    "prune.swept",
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be: how many files of each kind, and how many bytes they are."""

    snapshots: int  # records, those of removed snapshots too
    objects: int
    texts: int  # extents of kept text, with their postings
    strays: int  # temp files, and locks of heads
    bytes: int
    made: int = 0  # states in the cache
    thinned: tuple[Thinned, ...] = ()  # what a rule took of readings; their states are among the objects


def prune(sessions: Sessions, rule: Rule, *, dry_run: bool) -> Pruned:
    """Remove what nothing refers to; see `Store.prune`."""
    store = sessions.store
    with sessions.alone(), sessions.publishing():
        try:
            _check_refs(sessions)
            sessions.note_changing()  # until all is done
            sessions.keeper.rebuild()
        except SnapshotError as error:
            raise SnapshotError(
                f"pruning store '{store.path}': expected every record and ref whole: {error}"
            ) from error
        with sessions.keeper.open(writable=True) as catalog:
            found = _remove(store, catalog, dry_run=dry_run or bool(rule))
        if not rule:
            return found
        plan = retention.plan(sessions, rule, store.size_bytes() - found.bytes)
        if not dry_run:
            retention.drop(sessions, plan.ids)
            with sessions.keeper.open(writable=True) as catalog:
                found = _remove(store, catalog, dry_run=False)
        n_objects, n_bytes = found.objects + len(plan.ids), found.bytes + plan.n_bytes
        return replace(found, objects=n_objects, bytes=n_bytes, thinned=tuple(plan.readings))


def _check_refs(sessions: Sessions) -> None:
    """SnapshotError unless every record and ref is whole, and what they refer to is there; the catalog knows what was
    there."""
    store = sessions.store
    for damage in check_store(sessions, read_data=False).damaged:
        path = store.path / damage.path
        if store.texts.folder in path.parents:
            if path.is_file():
                store.texts.extent(path.name)  # MismatchError for a newer version
            raise SnapshotError(f"'{damage.path}': {damage.reason}; run `rwkv-stream snapshots repair`")
        if store.records in path.parents or store.tags.parent in path.parents:
            if path.is_file():
                store.decode(path, read_file(path, SMALL_FILE_LIMIT))  # MismatchError for a newer version
            raise SnapshotError(f"'{damage.path}': {damage.reason}; run `rwkv-stream snapshots repair`")


def _remove(store: StoreFiles, catalog: Catalog, *, dry_run: bool) -> Pruned:
    """Remove the snapshots that no head or tag, nor what these go on or started from, reaches; then the objects that no
    record names, and the text that no record leads to; then what the cache holds, temp files and the locks of heads.

    catalog  a catalog just made from the files; nobody else may be at work in the store
    Order: catalog, records (none before those that go on from it), objects, postings, texts; each durable before the
    next.
    """
    n_snapshots = catalog.mark_unreached()
    size = sum(store.record_path(identity).stat().st_size for identity, _ in catalog.unreached())
    if not dry_run and n_snapshots:
        _remove_records(store, catalog)
    catalog.mark_texts(lambda name: (extent.name for extent in store.texts.chain(name)))
    kinds = (
        ("object", store.objects.folder, store.objects.path, catalog.is_needed),
        ("postings", store.texts.postings_folder, store.texts.postings_path, catalog.is_text_needed),
        ("text", store.texts.folder, store.texts.path, catalog.is_text_needed),
    )
    n_files: dict[str, int] = {}
    for kind, folder, home, is_needed in kinds:
        n_files[kind], n_bytes = _remove_files(kind, folder, home, is_needed, dry_run=dry_run)
        size += n_bytes
    n_made = 0
    for path in files(store.cache):
        if store.is_cached(path):
            n_made += 1
            size += path.stat().st_size
            if not dry_run:
                path.unlink()
                failpoint("prune.cache.removed")
    n_strays = 0
    for path in (*temps(store.path), *store.locks.glob("head-*")):
        n_strays += 1
        size += path.stat().st_size
        if not dry_run:
            remove(path)
    if not dry_run:
        failpoint("prune.swept")
    return Pruned(n_snapshots, n_files["object"], n_files["text"], n_strays, size, n_made)


def _remove_files(
    kind: str, folder: Path, home: Callable[[str], Path], is_needed: Callable[[str], bool], *, dry_run: bool
) -> tuple[int, int]:
    """Remove the files of a folder that nothing needs, durably; how many they are, and their bytes.

    home  where the file of a name lies; what lies elsewhere is not ours, and `repair`'s matter
    """
    n_files = size = 0
    unsynced: Path | None = None
    for path in files(folder):
        if not is_digest(path.name) or home(path.name) != path or is_needed(path.name):
            continue
        n_files += 1
        size += path.stat().st_size
        if not dry_run:
            path.unlink()
            failpoint(f"prune.{kind}.removed")
            if unsynced not in (None, path.parent):
                fsync_folder(unsynced)
            unsynced = path.parent
    if unsynced is not None:
        fsync_folder(unsynced)
    return n_files, size


def _remove_records(store: StoreFiles, catalog: Catalog) -> None:
    with catalog.changing():
        catalog.drop_unreached()
    failpoint("prune.uncatalogued")
    folders: set[Path] = set()
    last: int | None = None
    for identity, tokens in catalog.unreached():
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
