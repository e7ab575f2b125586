"""Snapshots out of a store as one file, and from such a file into a store."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder
from rwkv_stream.store import archive, records
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
    named = {snapshot.id: snapshot for snapshot in snapshots}
    held: dict[str, Snapshot] = {}
    for snapshot in named.values():
        held.setdefault(snapshot.id, snapshot)
        for ancestor in sessions.store.ancestors(snapshot):
            kept = ancestor.id in named or not only
            held.setdefault(ancestor.id, ancestor if kept else ancestor.tombstone())
        if not only and snapshot.how == READING:
            for one in _chunk_states(sessions, snapshot):
                held.setdefault(one.id, one)
    tags = [Tag(name, at, now()) for name, at in sessions.ask(lambda catalog: [*catalog.tags()]) if at in named]
    heads: dict[tuple[str, str], Head] = {}
    for snapshot in sorted(named.values(), key=lambda s: s.tokens):
        for head in _heads_at(sessions, snapshot):
            heads[head.document, head.model] = head
    ordered = sorted(held.values(), key=lambda s: (s.tokens, s.id))
    if not keep_text:
        ordered = [replace(snapshot, text=None) for snapshot in ordered]
    n_bytes = archive.pack(sessions.store, ordered, [*heads.values(), *tags], file)
    return Exported(sum(not snapshot.removed for snapshot in ordered), n_bytes)


def _chunk_states(sessions: Sessions, snapshot: Snapshot) -> list[Snapshot]:
    """The states of the stretches that a snapshot has read."""
    key = snapshot.document, snapshot.model, snapshot.start_digest
    found = sessions.ask(lambda catalog: [sessions.keeper.snapshot(*row) for row in catalog.chunk_states(*key)])
    return [one for one in found if one.bytes <= snapshot.bytes]


def _heads_at(sessions: Sessions, snapshot: Snapshot) -> list[Head]:
    """The heads that stand at a snapshot, or the one that its reading had there."""
    standing = sessions.ask(lambda catalog: catalog.heads_at(snapshot.id))
    if not standing and snapshot.how == READING:
        standing = [(snapshot.document, snapshot.model)]
    heads: list[Head] = []
    for document, model in standing:
        own = sessions.store.read_head(sessions.store.head_path(document, model))
        head = own or Head(document, model, snapshot.id, snapshot.encoding, now(), snapshot.chunk)
        heads.append(replace(head, snapshot=snapshot.id, moved=now()))
    return heads


def import_(sessions: Sessions, file: BinaryIO) -> Imported:
    """Take over what an export holds, once all of it is seen to be whole; see `Store.import_`."""
    with sessions.writing() as session, contextlib.ExitStack() as stack:
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
            for head in heads:  # in the order of their keys, as whoever holds several
                stack.enter_context(sessions.held(head.document, head.model))
            report = _Merge(sessions, staged).run(heads)
        finally:
            shutil.rmtree(staged.path)
            fsync_folder(target.path)
        failpoint("import.merged")
        return report


class _Merge:
    """Objects, texts, records, heads and tags of a checked store into that of a session, in this order."""

    def __init__(self, sessions: Sessions, staged: StoreFiles) -> None:
        self.sessions, self.staged, self.store = sessions, staged, sessions.store

    def run(self, staged_heads: list[Head]) -> Imported:
        for path in files(self.staged.objects.folder):
            self._object(path, self.store.objects.path(path.name))
        for path in files(self.staged.texts.folder):
            self._object(path, self.store.texts.path(path.name))
        failpoint("import.objects")
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
        order: list[tuple[int, str]] = []
        for path in files(self.staged.records):
            record = self.staged.read_record(path.name)
            assert record is not None
            order.append((record.tokens, record.id))
        for _, identity in sorted(order):  # none before the one that it goes on from
            snapshot = self.staged.read_record(identity)
            assert snapshot is not None
            make_folder(self.store.record_path(identity).parent)
            with self.sessions.publishing():
                here = self.store.known(identity)
                if here is None or (here.removed and not snapshot.removed):
                    self.sessions.publish_record(identity, records.encode_record(snapshot), "import.record")
                    added += not snapshot.removed
                    continue
                known += not snapshot.removed
                if here.removed:
                    continue
                gains_bits = snapshot.is_kept_exactly and not here.is_kept_exactly
                objects = snapshot.objects if gains_bits else here.objects
                gained = replace(here, text=here.text or snapshot.text, objects=objects)
                if gained != here:
                    self.sessions.publish_record(identity, records.encode_record(gained), "import.record")
        return added, known

    def _head(self, head: Head) -> bool:
        """Whether the head now stands at the import's snapshot."""
        path = self.store.head_path(head.document, head.model)
        with self.sessions.publishing():
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
