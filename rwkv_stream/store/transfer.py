"""Snapshots out of a store as one file, and from such a file into a store."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder
from rwkv_stream.store import archive, records
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.catalog_keeper import CatalogKeeper
from rwkv_stream.store.layout import StoreFiles, files, publishing_failpoints
from rwkv_stream.store.records import READING, Head, Snapshot, Tag, now
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.verify import check_files, hash_file

FAILPOINTS = (
    "import.unpacked",
    "import.checked",
    "import.object",
    "import.objects",
    *publishing_failpoints("import.record"),
    *publishing_failpoints("import.head"),
    *publishing_failpoints("import.tag"),
    "import.merged",
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export holds."""

    snapshots: int  # without the removed ones, which are there for their place in the lineage
    bytes: int  # of the file


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: snapshots that are new here and that were here, names set, names that stand elsewhere."""

    added: int
    known: int
    heads: list[str]
    tags: list[str]
    kept: list[str]


def export(
    sessions: Sessions, snapshots: Iterable[Snapshot], file: BinaryIO, *, only: bool, keep_text: bool
) -> Exported:
    """Write snapshots, with all before them, into one file; see `Store.export`."""
    store, named = sessions.store, {snapshot.id: snapshot for snapshot in snapshots}
    held: dict[str, Snapshot] = {}
    for snapshot in named.values():
        held.setdefault(snapshot.id, snapshot)
        for ancestor in store.ancestors(snapshot):
            kept = ancestor.id in named or not only
            held.setdefault(ancestor.id, ancestor if kept else ancestor.tombstone())
        if not only and snapshot.how == READING:
            for one in sessions.ask(lambda catalog: chunk_states(store, catalog, snapshot)):  # noqa: B023 - asked at once
                held.setdefault(one.id, one)
    for snapshot in list(held.values()):
        if not snapshot.keeps_state and not snapshot.removed and snapshot.start is not None:
            start = store.live(snapshot.start)  # its state is made from this one
            if held.setdefault(start.id, start).removed:
                held[start.id] = start
            for ancestor in store.ancestors(start):
                held.setdefault(ancestor.id, ancestor.tombstone())
    ordered = sorted(held.values(), key=lambda s: (s.tokens, s.id))
    if not keep_text:
        for snapshot in ordered:
            if not snapshot.keeps_state and not snapshot.removed:
                raise UsageError(
                    f"exporting snapshot {snapshot.id[:12]} of '{snapshot.document}' without its text: expected a kept "
                    "state, found one that is made from the text; export it without --no-text, or read the document "
                    "with `ingest --restart --no-text`, which keeps its state"
                )
        ordered = [replace(snapshot, text=None, inline_extent=None) for snapshot in ordered]
    names = sessions.ask(lambda catalog: names_at(store, catalog, named.values()))
    n_bytes = archive.pack(store, ordered, names, file)
    return Exported(sum(not snapshot.removed for snapshot in ordered), n_bytes)


def chunk_states(store: StoreFiles, catalog: Catalog, snapshot: Snapshot) -> list[Snapshot]:
    """The states of the stretches that a snapshot has read."""
    found = catalog.chunk_states(snapshot.document, snapshot.model, snapshot.start_digest)
    states = [CatalogKeeper(store).snapshot(*row) for row in found]
    return [one for one in states if one.bytes <= snapshot.bytes]


def names_at(store: StoreFiles, catalog: Catalog, snapshots: Iterable[Snapshot]) -> list[Head | Tag]:
    """The names by which another store is to know these snapshots: their tags, and the heads of their documents, each
    at the furthest of them."""
    named = {snapshot.id: snapshot for snapshot in snapshots}
    tags = [Tag(name, at, now()) for name, at in catalog.tags() if at in named]
    heads: dict[tuple[str, str], Head] = {}
    for snapshot in sorted(named.values(), key=lambda s: s.tokens):
        for head in _heads_at(store, catalog, snapshot):
            heads[head.document, head.model] = head
    return [*heads.values(), *tags]


def _heads_at(store: StoreFiles, catalog: Catalog, snapshot: Snapshot) -> list[Head]:
    """The heads that stand at a snapshot, or the one that its reading had there."""
    standing = catalog.heads_at(snapshot.id)
    if not standing and snapshot.how == READING:
        standing = [(snapshot.document, snapshot.model)]
    heads: list[Head] = []
    for document, model in standing:
        own = store.read_head(store.head_path(document, model))
        head = own or Head(document, model, snapshot.id, snapshot.encoding, now(), snapshot.chunk)
        mark = head.mark if head.snapshot == snapshot.id else None
        heads.append(replace(head, snapshot=snapshot.id, moved=now(), mark=mark))
    return heads


def import_(sessions: Sessions, file: BinaryIO) -> Imported:
    """Take over what an export holds, once all of it is seen to be whole; see `Store.import_`."""
    with sessions.writing() as session:
        target = sessions.store
        staged = StoreFiles(target.path / f"{TEMP_PREFIX}{session.tag}-import")
        staged.path.mkdir()
        try:
            archive.unpack(file, staged)
            failpoint("import.unpacked")
            found = check_files(staged, None, read_data=True).damaged
            if found:
                raise SnapshotError(
                    f"importing snapshots: expected a whole export, found {found[0].path}: {found[0].reason}"
                )
            failpoint("import.checked")
            heads = [head for head in map(staged.read_head, files(staged.heads)) if head is not None]
            for head in heads:  # too many to be held at once: each is again while it is moved
                with sessions.held(head.document, head.model):
                    pass  # StoreLockedError, before anything is changed, where another writes to it
            report = Merge(sessions, staged).run(heads)
        finally:
            shutil.rmtree(staged.path)
            fsync_folder(target.path)
        failpoint("import.merged")
        return report


class Merge:
    """Objects, texts, records, heads and tags of a checked store into that of a session, in this order."""

    def __init__(self, sessions: Sessions, staged: StoreFiles) -> None:
        self.sessions, self.staged, self.store = sessions, staged, sessions.store

    def run(self, staged_heads: list[Head]) -> Imported:
        """All of it; the heads are held."""
        for path in files(self.staged.objects.folder):
            self._object(path, self.store.objects.path(path.name))
        for path in files(self.staged.texts.folder):
            self._object(path, self.store.texts.path(path.name))
        failpoint("import.objects")
        return self.take_over(staged_heads)

    def take_over(self, staged_heads: list[Head]) -> Imported:
        """Records, heads and tags, whose objects and texts are there."""
        added, known = self._records()
        heads, tags, kept = list[str](), list[str](), list[str]()
        for head in staged_heads:
            (heads if self._head(head) else kept).append(head.document)
        for path in files(self.staged.tags):
            tag = self.staged.read_tag(path)
            assert tag is not None
            (tags if self._tag(tag) else kept).append(tag.name)
        return Imported(added, known, heads, tags, kept)

    def _object(self, path: Path, target: Path) -> None:
        """A file that is named by its bytes."""
        if not target.exists() or hash_file(target) != path.name:
            make_folder(target.parent)
            path.replace(target)
            fsync_folder(target.parent)
            failpoint("import.object")

    def _records(self) -> tuple[int, int]:
        """How many snapshots are new here, and how many were known."""
        added = known = 0
        order: list[tuple[bool, int, str]] = []
        for path in files(self.staged.records):
            record = self.staged.read_record(path.name)
            assert record is not None
            order.append((not record.keeps_state and not record.removed, record.tokens, record.id))
        for _, _, identity in sorted(order):  # none before the one that it goes on from, or is made from
            snapshot = self.staged.read_record(identity)
            assert snapshot is not None
            make_folder(self.store.record_path(identity).parent)
            with self.sessions.publishing():
                here = self.store.known(identity)
                is_new = here is None or here.removed
                added += is_new and not snapshot.removed
                known += not is_new and not snapshot.removed
                gained = merged(here, snapshot)
                if gained is not None:
                    self.sessions.publish_record(identity, records.encode_record(gained), "import.record")
        return added, known

    def _head(self, head: Head) -> bool:
        """Whether the head now stands at the import's snapshot."""
        path = self.store.head_path(head.document, head.model)
        with self.sessions.held(head.document, head.model), self.sessions.publishing():
            here = self.store.read_head(path)
            target = self.store.read_record(head.snapshot)
            if target is None or target.removed:  # by somebody else, since it was imported
                return False
            lineage = (ancestor.id for ancestor in (target, *self.store.ancestors(target)))
            if here is not None and here.snapshot not in lineage:
                return False
            self.sessions.publish(path, records.encode_head(head), "import.head")
            self.sessions.commit(lambda catalog: self.sessions.keeper.enter(path, catalog))
        return True

    def _tag(self, tag: Tag) -> bool:
        """Whether the tag now stands at the import's snapshot."""
        path = self.store.tag_path(tag.name)
        assert path is not None
        with self.sessions.publishing():
            here = self.store.read_tag(path)
            if here is not None:
                return here.snapshot == tag.snapshot
            target = self.store.read_record(tag.snapshot)
            if target is None or target.removed:  # by somebody else, since it was imported
                return False
            if self.sessions.ask(lambda catalog: catalog.heads_named(tag.name)):
                return False
            self.sessions.publish(path, records.encode_tag(tag), "import.tag")
            self.sessions.commit(lambda catalog: self.sessions.keeper.enter(path, catalog))
        return True


def merged(here: Snapshot | None, new: Snapshot) -> Snapshot | None:
    """What a store that has the record `here` of a snapshot takes over from another's; None: nothing.

    One that is gone here comes back; one that is here gains the exact state and the text, where it has none.
    """
    if here is None:
        return new
    if new.removed or here.removed:
        return new if here.removed and not new.removed else None
    gains_bits = new.is_kept_exactly and not here.is_kept_exactly
    text = here if here.text is not None else new
    objects = new.objects if gains_bits else here.objects
    gained = replace(here, text=text.text, inline_extent=text.inline_extent, objects=objects)
    return gained if gained != here else None
