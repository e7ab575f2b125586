"""Snapshots on disk: written one durable step at a time, found by many names, believed only with their checksums.

    STORE/format                    which version of this layout it is
    STORE/objects/ab/<sha256>       one state in one codec, immutable, named by its bytes
    STORE/records/ab/<id>           one snapshot: identity, position, parent, objects (none: it was removed)
    STORE/refs/heads/<sha256>       the newest snapshot of one (document, model)
    STORE/refs/tags/<quoted name>   a name for one snapshot
    STORE/catalog.sqlite            an index of records and refs; may be deleted at any time
    STORE/locks/                    flock'ed files, empty
    STORE/quarantine/               what `repair` moved aside

What the bytes mean is in `snapshot_codec.py`, the reading of files in `store_files.py`, REFs in `references.py`,
checking, repairing, pruning and packing in modules of their names; this one knows who may write, when, and in which
order.

Order. Publishing goes object → record → ref → catalog, each durable before the next; removing goes the other way.
Records and refs change under `locks/publish`, held for one change. Whoever gets it finds a catalog that agrees with the
files, but for records without a ref of sessions that are under way: they enter it with the next ref, or at the end.

Locks. A writer shares `locks/store` during its session and holds `locks/head-<sha256>` of each head that it moves;
`prune` and `repair` hold `locks/store` alone. Readers take none.

Crashes. A session keeps `locks/writers/<tag>` flock'ed and puts its tag into the names of its temp files. A marker that
nobody holds is a session that died: who next may write removes its temp files, enters what is new or was replaced into
the catalog, and only then removes the marker.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from rwkv_stream.errors import MismatchError, NotFoundError, OutputError, SnapshotError, StoreLockedError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder, publish, remove
from rwkv_stream.store import archive, catalog, prune, references, repair, snapshot_codec
from rwkv_stream.store.catalog import Catalog, CatalogAbsentError, CatalogDamagedError, Listed
from rwkv_stream.store.layout import NETWORK_FILESYSTEMS, StoreFiles, files, filesystem, head_key, stamp, temps
from rwkv_stream.store.prune import Pruned
from rwkv_stream.store.repair import Lost, Repaired
from rwkv_stream.store.snapshot_codec import (
    EXACT,
    SMALL_FILE_LIMIT,
    Head,
    NewSnapshot,
    Snapshot,
    StoredObject,
    Tag,
    object_path,
    read_file,
    snapshot_id,
)
from rwkv_stream.store.verify import Damage, Report, hash_file, verify

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model.state import State

__all__ = [
    "FAILPOINTS",
    "Damage",
    "Exported",
    "Imported",
    "Listed",
    "Lost",
    "NewSnapshot",
    "Pruned",
    "Repaired",
    "Report",
    "Snapshot",
    "Store",
]


def _steps(kind: str) -> tuple[str, ...]:
    return tuple(f"{kind}.{step}" for step in ("written", "synced", "renamed", "published"))


FAILPOINTS = (
    *_steps("format"),
    "writer.marked",
    *_steps("object"),
    *_steps("record"),
    *_steps("head"),
    *_steps("tag"),
    "tag.uncatalogued",
    "tag.removed",
    *catalog.FAILPOINTS,
    "rm.uncatalogued",
    *_steps("rm.head"),
    "rm.head.removed",
    *_steps("rm.record"),
    "rebuild.begin",
    "rebuild.done",
    "recover.swept",
    "recover.done",
    *prune.FAILPOINTS,
    *_steps("repair.file"),
    *repair.FAILPOINTS,
    "import.unpacked",
    "import.checked",
    "import.object",
    "import.objects",
    *_steps("import.record"),
    *_steps("import.head"),
    *_steps("import.tag"),
    "import.merged",
)

_NOT_YET = ""  # the stamp of a file that is about to be published

T = TypeVar("T")
log = logging.getLogger(__name__)


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


@dataclass(slots=True)
class _Session:
    """One writer: its tag, the heads it holds, and the records that are not in the catalog yet."""

    tag: str
    heads: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    is_catalogued: bool = True  # all else that it published is


class Store:
    """A folder of snapshots. Reading takes no lock; writing happens in `writing`, or in a session of its own.

    path      the folder
    writable  whether this user may write to it
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False, wait: bool = False) -> None:
        """Open a store, clearing up behind writers that died.

        create  make it where there is none
        wait    wait for locks instead of raising StoreLockedError
        raises  NotFoundError, MismatchError for a newer format, SnapshotError, UsageError for a folder of other things
        """
        self._attach(Path(path), wait)
        if create and not self._files.format.exists():
            self._create()
        try:
            version = self._files.check_format()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"opening store '{self.path}': expected a store, found none; ingest makes one"
            ) from error
        self._attach(Path(path), wait)  # what was made now may be written to
        self._version = version
        if self.writable:
            make_folder(self._files.markers)  # a copy of a store may lack its empty folders
            if self._has_dead_writers():
                with self._publishing():
                    pass

    def _attach(self, path: Path, wait: bool) -> None:
        self.path = path
        self.wait = wait
        self._files = StoreFiles(path)
        self._session: _Session | None = None
        self._is_publishing = False
        self._is_indexed_in_memory = False
        self._version = snapshot_codec.VERSION
        locks = self._files.locks
        self.writable = os.access(path, os.W_OK) and (not locks.exists() or os.access(locks, os.W_OK))

    # ---- reading ----

    def get(self, ref: str, *, model: str | None = None) -> Snapshot:
        """The snapshot that a reference names: a tag, a document (`name`, `name@…`, `name~n`) or an id.

        model   fingerprint; chooses among the readings of a document
        raises  NotFoundError; UsageError where `ref` fits several snapshots; MismatchError where it fits one of another
                model; SnapshotError for a damaged record or ref
        """
        return self._indexed(lambda index: references.resolve(_text(ref), model, self._files, index))

    def head(self, document: str, model: str) -> Snapshot | None:
        """The newest snapshot of a document, by its whole name; None without one.

        Its `encoding`, `chunk` and `leaf` are the document's own: documents of the same tokens share their snapshots,
        whatever chunks they are read in. What the document started from, its `start` and `start_digest`, is part of
        who a snapshot is.
        raises  SnapshotError, MismatchError for a newer format
        """
        found = self._files.newest(_text(document), model)
        return None if found is None else found[0].view(found[1])

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshots it goes on from that exist, nearest first, each read from its record.

        raises  SnapshotError, MismatchError for a newer format
        """
        return (ancestor for ancestor in self._files.ancestors(snapshot) if not ancestor.removed)

    def starts(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshot whose state its reading started from, the one that that started from, and so on to the first
        reading or to one that is not here; removed ones too.

        raises  SnapshotError, MismatchError for a newer format
        """
        return self._files.starts(snapshot)

    def reach(self, model: str, start_digest: str, parent: str | None, limit: int) -> int | None:
        """How far, up to token `limit`, the snapshots that come next after `parent` lie (None: the first of readings).

        Next are those whose nearest ancestor that exists is `parent`; None where there is none.
        """
        return self._indexed(lambda index: index.reach(model, start_digest, parent, limit))

    def match(
        self, model: str, start_digest: str, tokens: int, chain: str, *, numerics: Mapping[str, str | int]
    ) -> Snapshot | None:
        """The snapshot that stands after just these tokens, of whatever document, read from its record.

        chain    digest of the tokens
        numerics of several that stand there one of these numerics is preferred, then an exact one
        raises   SnapshotError, MismatchError for a newer format
        """

        def work(index: Catalog) -> list[Snapshot]:
            return [self._from_row(*row) for row in index.with_chain(model, start_digest, tokens, chain)]

        found = self._indexed(work)
        if not found:
            return None
        best = min(found, key=lambda s: (s.numerics != numerics, not s.exact, s.id))
        return self._files.target(best.id, self._files.record_path(best.id))

    def tags(self) -> Iterator[tuple[str, str]]:
        """(tag, snapshot id), by tag."""
        yield from self._indexed(lambda index: sorted(index.tags()))

    def heads(self) -> Iterator[tuple[str, str, str]]:
        """(document, model, snapshot id), by document."""
        yield from self._indexed(lambda index: list(index.heads()))

    def family(self, document: str | None = None) -> Iterator[Listed]:
        """The snapshots among which a document's lineage runs, or all, oldest first, removed ones too: its own, what
        they go on or started from, and what goes on or started from them.

        raises  UsageError where `document` ends the names of several
        """
        if document is not None:
            _text(document)

        def rows(index: Catalog) -> Iterable[Listed]:
            name = references.whole_name(document, index) if document is not None else None
            return [*index.family(name)]

        yield from self._indexed(rows)

    def list(
        self, document: str | None = None, *, model: str | None = None, sort: str = "created", reverse: bool = False
    ) -> Iterator[Listed]:
        """The snapshots: all, or those of a document, or of a model; in the order of `catalog.SORTS`.

        A document's are those published under its name and those that its heads descend from.
        raises  UsageError where `document` ends the names of several; SnapshotError where the catalog turned out to be
                damaged on the way (it has been made anew)
        """
        if document is not None:
            _text(document)

        def rows(index: Catalog) -> Iterator[Listed]:
            name = references.whole_name(document, index) if document is not None else None
            return index.listed(name, model, sort, reverse)

        listed = 0
        try:
            with self._index() as index:
                for entry in rows(index):
                    yield entry
                    listed += 1
            return
        except CatalogDamagedError as error:
            self._mend(error)
            if listed:
                raise
        with self._index() as index:
            yield from rows(index)

    # ---- writing ----

    @contextlib.contextmanager
    def writing(self, document: str | None = None, model: str | None = None, *, wait: bool = False) -> Iterator[None]:
        """A writer's session: nothing that it refers to is pruned, nobody else writes to (document, model).

        Sessions of one `Store` may be nested; the outermost is the session.
        raises  StoreLockedError unless waiting was asked for here or of the store; OutputError for a read-only store
        """
        with contextlib.ExitStack() as stack:
            if self._session is None:
                stack.enter_context(self._opened_session(wait or self.wait))
            if document is not None:
                assert model is not None
                stack.enter_context(self._held(_text(document), model, wait or self.wait))
            yield

    def put(self, new: NewSnapshot, state: State, last_hidden: Tensor) -> Snapshot:
        """Store a snapshot: object, then record, each durable; `move_head` or `tag` then make it easy to find.

        state, last_hidden   of batch 1; fp32 [C]
        returns  the snapshot as recorded. One that is there already keeps its object, document and time of creation; an
                 exact reading replaces what is recorded of how it was read, and a nearer parent a farther one
        raises   UsageError for values that no record may hold, StoreLockedError, OutputError, OSError of a full disk
        """
        snapshot_codec.check_new(new)
        if state.batch != 1:
            raise UsageError(f"storing a snapshot of '{new.document}': expected batch 1, found {state.batch}")
        state_digest = state.digest()
        identity = snapshot_id(new.model, new.start_digest, new.chain, new.tokens, state_digest)
        path = self._files.record_path(identity)
        with self.writing():
            assert self._session is not None
            known = self._known(identity)
            if known is not None and self._has_object(known):
                objects, state_bytes = known.objects, known.state_bytes
            else:
                objects, state_bytes = self._put_object(new, state, last_hidden, state_digest)
            make_folder(path.parent)
            with self._publishing():
                known = self._known(identity)
                parent = self._nearer_parent(known, new)
                if known is None or known.removed:
                    reading, document, created = new, new.document, _now()
                else:
                    reading = new if new.exact or not known.exact else known
                    document, created = known.document, known.created
                snapshot = Snapshot(
                    **{f.name: getattr(reading, f.name) for f in fields(NewSnapshot)}
                    | {"document": document, "parent": parent},
                    id=identity,
                    state_digest=state_digest,
                    state_bytes=state_bytes,
                    objects=objects,
                    created=created,
                    folder=self._files.objects,
                )
                if snapshot == known:
                    fsync_folder(path.parent)  # its writer may have died before it did so
                else:
                    self._publish(path, snapshot_codec.encode_record(snapshot), "record")
                    self._session.pending.add(identity)
            return snapshot

    def move_head(
        self, document: str, model: str, snapshot: str, *, encoding: str | None = None, chunk: int | None = None
    ) -> None:
        """Let the head of (document, model) stand at the snapshot of this id; durable on return.

        encoding, chunk  of the document, where they are not those that the snapshot was first made with
        raises  UsageError for a chunk of no tokens, NotFoundError, MismatchError for another model's snapshot,
                StoreLockedError, OutputError
        """
        if chunk is not None and chunk < 1:
            raise UsageError(f"moving the head of '{document}': expected chunks of 1 token or more, found {chunk}")
        with self.writing(document, model), self._publishing():
            target = self._files.live(snapshot)
            if target.model != model:
                raise references.another_model(snapshot, target, model)
            path = self._files.head_path(document, model)
            head = Head(document, model, snapshot, encoding or target.encoding, _now(), chunk or target.chunk)
            known = self._files.read_head(path)
            if known is not None and replace(known, moved=head.moved) == head:
                fsync_folder(path.parent)  # its writer may have died before it did so
            else:
                self._publish(path, snapshot_codec.encode_head(head), "head")
            self._commit(lambda index: self._enter(path, index))

    def tag(self, name: str, snapshot: str, *, move: bool = False) -> None:
        """Give the snapshot of this id a name; durable on return.

        move    take the name away from another snapshot
        raises  UsageError for a name that is taken or cannot be a tag, NotFoundError, StoreLockedError, OutputError
        """
        path = self._tag_path(name)
        with self.writing(), self._publishing():
            self._files.live(snapshot)
            known = self._files.read_tag(path)
            is_elsewhere = known is not None and known.snapshot != snapshot
            self._check_free(name, known if is_elsewhere and not move else None)
            if known is None or is_elsewhere:
                self._publish(path, snapshot_codec.encode_tag(Tag(name, snapshot, _now())), "tag")
            self._commit(lambda index: self._enter(path, index))

    def check_tag(self, name: str) -> None:
        """Raise UsageError unless `name` can be a tag and no tag or document has it.

        raises  SnapshotError for a damaged tag of that name
        """
        self._check_free(name, self._files.read_tag(self._tag_path(name)))

    def _tag_path(self, name: str) -> Path:
        path = self._files.tag_path(name)
        if path is None:
            raise UsageError(
                f"tagging a snapshot: expected a short name with no '@' or '~' and is not like an id, found '{name}'"
            )
        return path

    def _check_free(self, name: str, taken: Tag | None) -> None:
        if taken is not None:
            raise UsageError(f"tagging a snapshot: expected a new name, found '{name}' on '{taken.snapshot}'")
        if self._indexed(lambda index: index.heads_named(name, whole=True)):
            raise UsageError(f"tagging a snapshot: expected a new name, found a document '{name}'")

    def untag(self, name: str) -> None:
        """Take a tag away; the snapshot stays.

        raises  NotFoundError, StoreLockedError, OutputError
        """
        path = self._files.tag_path(name)
        with self.writing(), self._publishing():
            if path is None or not path.exists():
                raise NotFoundError(f"removing tag '{name}' of store '{self.path}': expected a tag, found none")
            self._commit(lambda index: index.drop_tag(name))
            failpoint("tag.uncatalogued")
            path.unlink()
            fsync_folder(path.parent)
            failpoint("tag.removed")

    def rm(self, snapshot: str) -> None:
        """Remove the snapshot of this id: its record keeps its place in the lineage, its object waits for a prune.

        Heads that stand there go to its nearest ancestor, or away where it has none.
        raises  NotFoundError, UsageError for a tagged one, StoreLockedError while one of those documents is written to
        """
        with self.writing():
            is_done = False
            while not is_done:
                standing = self._indexed(lambda index: index.heads_at(snapshot))
                with contextlib.ExitStack() as stack:
                    for document, model in sorted(standing, key=lambda reading: head_key(*reading)):
                        stack.enter_context(self._held(document, model, self.wait))
                    stack.enter_context(self._publishing())
                    if self._indexed(lambda index: index.heads_at(snapshot)) == standing:
                        self._rm(snapshot, standing)
                        is_done = True

    def _rm(self, identity: str, standing: Iterable[tuple[str, str]]) -> None:
        snapshot = self._files.live(identity)
        tags = self._indexed(lambda index: index.tags_at(identity))
        if tags:
            raise UsageError(
                f"removing snapshot '{identity}': expected no tags, found {', '.join(tags)}; remove them first"
            )
        nearest = next(self.ancestors(snapshot), None)
        paths = [self._files.head_path(document, model) for document, model in standing]
        heads = [head for head in map(self._files.read_head, paths) if head is not None]
        moved = [replace(head, snapshot=nearest.id, moved=_now()) for head in heads] if nearest is not None else []
        tombstone = replace(snapshot, objects=())
        record = snapshot_codec.encode_record(tombstone)

        def change(index: Catalog) -> None:
            index.put_record(tombstone, _NOT_YET, record)
            for head in heads:
                index.drop_head(head.document, head.model)
            for head in moved:
                path = self._files.head_path(head.document, head.model)
                index.put_head(head, path.name, _NOT_YET, snapshot_codec.encode_head(head))

        self._commit(change)
        failpoint("rm.uncatalogued")
        for head in moved:
            path = self._files.head_path(head.document, head.model)
            self._publish(path, snapshot_codec.encode_head(head), "rm.head")
        if not moved:
            for path in paths:
                path.unlink()
                fsync_folder(path.parent)
                failpoint("rm.head.removed")
        self._publish(self._files.record_path(identity), record, "rm.record")

    # ---- looking after it ----

    def verify(self, *, read_data: bool = False) -> Report:
        """Check records and refs against their checksums and what they refer to, the objects' presence, sizes and
        headers, and a catalog row by row; others may write meanwhile.

        read_data  read the objects too: hash each file and decode each state
        Objects that nothing refers to, and temp files, are not damage.
        """
        with contextlib.ExitStack() as stack:
            try:
                index = stack.enter_context(Catalog.open(self._files.catalog, writable=self.writable))
            except CatalogAbsentError:
                return verify(self._files, None, self._quiet, read_data=read_data)
            except CatalogDamagedError as error:
                report = verify(self._files, None, self._quiet, read_data=read_data)
                damage = Damage(self._files.catalog.name, f"{error}; run `rwkv-stream snapshots rebuild`")
                return Report(report.checked + 1, [*report.damaged, damage])
            return verify(self._files, index, self._quiet, read_data=read_data)

    def rebuild(self) -> int:
        """Make the catalog anew from records and refs; damaged ones are left out and logged.

        returns  how many records it has, those of removed snapshots too
        raises   OutputError for a read-only store
        """
        self._check_writable()
        with self._publishing():
            return self._rebuild()

    def prune(self, *, dry_run: bool = False) -> Pruned:
        """Remove what nothing refers to: snapshots that no head or tag, nor what these go on or started from, reaches
        (readings superseded by others), objects that no record names, temp files, locks of heads.

        dry_run  only say what would go
        raises   SnapshotError where a record or ref is damaged, as what it refers to is not known; MismatchError for
                 one of a newer version; StoreLockedError while others write, OutputError
        """
        with self._alone(), self._publishing():
            try:
                self._check_refs()
                self._note_catalogued(False)  # until all is done
                self._rebuild()
            except SnapshotError as error:
                raise SnapshotError(
                    f"pruning store '{self.path}': expected every record and ref whole: {error}"
                ) from error
            with Catalog.open(self._files.catalog, writable=True) as index:
                return prune.prune(self._files, index, dry_run=dry_run)

    def _check_refs(self) -> None:
        """SnapshotError unless every record and ref is whole, and what they refer to is there; the catalog knows what
        was there."""
        for damage in self.verify().damaged:
            path = self.path / damage.path
            if self._files.records in path.parents or self._files.tags.parent in path.parents:
                if path.is_file():
                    self._decoded(path, read_file(path, SMALL_FILE_LIMIT))  # MismatchError for a newer version
                raise SnapshotError(f"'{damage.path}': {damage.reason}; run `rwkv-stream snapshots repair`")

    @classmethod
    def repair(cls, path: str | os.PathLike[str], *, wait: bool = False) -> Repaired:
        """Make a damaged store one that verifies: restore what can be, move the rest to its quarantine folder.

        raises  NotFoundError, StoreLockedError while others write, OutputError, MismatchError for a store or file of a
                newer version
        """
        store = cls.__new__(cls)
        store._attach(Path(path), wait)
        files = store._files
        if not any(folder.is_dir() for folder in (files.objects, files.records)):
            raise NotFoundError(f"repairing store '{path}': expected a store, found none")
        with contextlib.suppress(SnapshotError, FileNotFoundError):  # to be put right
            store._version = files.check_format()
        store._check_writable()
        make_folder(files.markers)
        with store._alone(), store._publishing(), contextlib.ExitStack() as stack:
            assert store._session is not None
            quarantine = files.quarantine / f"{_now().replace(':', '')}-{store._session.tag[:8]}"
            try:
                index: Catalog | None = stack.enter_context(Catalog.open(files.catalog, writable=True))
                assert index is not None
                index.check()
            except CatalogDamagedError:
                index = None
            report = repair.repair(files, index, quarantine, store._publish_repaired, _now())
            stack.close()
            store._rebuild()
        return report

    # ---- to and from other stores ----

    def export(self, refs: Sequence[str], file: BinaryIO, *, only: bool = False) -> Exported:
        """Write the snapshots that the references name, with all before them, as one file that `import_` takes.

        only    without the snapshots before them; those keep their places in the lineage
        Tags on them go along, and heads, which stand at the furthest of each document's.
        raises  as `get`; SnapshotError where an object is damaged
        """
        named = {snapshot.id: snapshot for snapshot in map(self.get, refs)}
        held: dict[str, Snapshot] = {}
        for snapshot in named.values():
            held.setdefault(snapshot.id, snapshot)
            for ancestor in self._files.ancestors(snapshot):
                kept = ancestor.id in named or not only
                held.setdefault(ancestor.id, ancestor if kept else replace(ancestor, objects=()))
        tags = [Tag(name, target, _now()) for name, target in self.tags() if target in named]
        heads: dict[tuple[str, str], Head] = {}
        for snapshot in sorted(named.values(), key=lambda s: s.tokens):
            standing = self._indexed(lambda index, at=snapshot.id: index.heads_at(at))  # type: ignore[misc]
            if not standing and snapshot.how == "ingest":
                standing = [(snapshot.document, snapshot.model)]
            for document, model in standing:
                head = self._files.read_head(self._files.head_path(document, model))
                encoding, chunk = (head.encoding, head.chunk) if head is not None else (snapshot.encoding, 0)
                heads[document, model] = Head(document, model, snapshot.id, encoding, _now(), chunk or snapshot.chunk)
        ordered = sorted(held.values(), key=lambda s: (s.tokens, s.id))
        n_bytes = archive.pack(self._files, ordered, [*heads.values(), *tags], file)
        return Exported(sum(not snapshot.removed for snapshot in ordered), n_bytes)

    def import_(self, file: BinaryIO) -> Imported:
        """Take over what an export holds; nothing is changed unless all of it is whole.

        Heads go on where the import's goes on from this store's; other names that are taken stay where they stand.
        raises  SnapshotError for a damaged file or none of ours, MismatchError for one of a newer format, OutputError,
                StoreLockedError, OSError of a full disk
        """
        with self.writing(), contextlib.ExitStack() as stack:
            assert self._session is not None
            staged = StoreFiles(self.path / f"{TEMP_PREFIX}{self._session.tag}-import")
            staged.path.mkdir()
            try:
                archive.unpack(file, staged)
                failpoint("import.unpacked")
                found = verify(staged, None, read_data=True).damaged
                if found:
                    raise SnapshotError(
                        f"importing snapshots: expected a whole export, found {found[0].path}: {found[0].reason}"
                    )
                failpoint("import.checked")
                for path in files(staged.heads):  # in the order of their keys, as whoever holds several
                    head = staged.read_head(path)
                    assert head is not None
                    stack.enter_context(self._held(head.document, head.model, self.wait))
                report = self._merge(staged)
            finally:
                shutil.rmtree(staged.path)
                fsync_folder(self.path)
            failpoint("import.merged")
            return report

    def _merge(self, staged: StoreFiles) -> Imported:
        """Objects, records, heads and tags of a checked store into this one, in this order."""
        for path in files(staged.objects):
            target = object_path(self._files.objects, path.name)
            if not target.exists() or hash_file(target) != path.name:
                make_folder(target.parent)
                path.replace(target)
                fsync_folder(target.parent)
                failpoint("import.object")
        failpoint("import.objects")
        added = known = 0
        order: list[tuple[int, str]] = []
        for path in files(staged.records):
            record = staged.read_record(path.name)
            assert record is not None
            order.append((record.tokens, record.id))
        for _, identity in sorted(order):  # none before the one that it goes on from
            snapshot = staged.read_record(identity)
            assert snapshot is not None and self._session is not None
            target = self._files.record_path(snapshot.id)
            make_folder(target.parent)
            with self._publishing():
                here = self._known(snapshot.id)
                if here is None or (here.removed and not snapshot.removed):
                    self._publish(target, snapshot_codec.encode_record(snapshot), "import.record")
                    self._session.pending.add(snapshot.id)
                    added += not snapshot.removed
                else:
                    known += not snapshot.removed
        heads, tags, kept = list[str](), list[str](), list[str]()
        for path in files(staged.heads):
            head = staged.read_head(path)
            assert head is not None
            (heads if self._merge_head(head) else kept).append(head.document)
        for path in files(staged.tags):
            tag = staged.read_tag(path)
            assert tag is not None
            (tags if self._merge_tag(tag) else kept).append(tag.name)
        return Imported(added, known, heads, tags, kept)

    def _merge_head(self, head: Head) -> bool:
        """Whether the head now stands at the import's snapshot."""
        path = self._files.head_path(head.document, head.model)
        with self._publishing():
            here = self._files.read_head(path)
            target = self._files.read_record(head.snapshot)
            if target is None or target.removed:  # by somebody else, since it was imported
                return False
            lineage = (ancestor.id for ancestor in (target, *self._files.ancestors(target)))
            if here is not None and here.snapshot not in lineage:
                return False
            self._publish(path, snapshot_codec.encode_head(head), "import.head")
            self._commit(lambda index: self._enter(path, index))
        return True

    def _merge_tag(self, tag: Tag) -> bool:
        """Whether the tag now stands at the import's snapshot."""
        path = self._files.tag_path(tag.name)
        assert path is not None
        with self._publishing():
            here = self._files.read_tag(path)
            if here is not None:
                return here.snapshot == tag.snapshot
            target = self._files.read_record(tag.snapshot)
            if target is None or target.removed:  # by somebody else, since it was imported
                return False
            if self._indexed(lambda index: index.heads_named(tag.name, whole=True)):
                return False
            self._publish(path, snapshot_codec.encode_tag(tag), "import.tag")
            self._commit(lambda index: self._enter(path, index))
        return True

    # ---- files ----

    def _known(self, identity: str) -> Snapshot | None:
        """The record that a reading is about to make again; a damaged one counts as none and is replaced."""
        try:
            return self._files.read_record(identity)
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return None

    def _has_object(self, snapshot: Snapshot) -> bool:
        """Whether its object is there and whole; a damaged one is replaced."""
        if snapshot.removed:
            return False
        try:
            snapshot_codec.read_object(snapshot)
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return False
        return True

    def _put_object(
        self, new: NewSnapshot, state: State, last_hidden: Tensor, state_digest: str
    ) -> tuple[tuple[StoredObject, ...], int]:
        data, state_bytes = snapshot_codec.encode_state(new, state, last_hidden, state_digest)
        name = hashlib.sha256(data).hexdigest()
        path = object_path(self._files.objects, name)
        make_folder(path.parent)
        assert self._session is not None
        publish(path, data, kind="object", temp_tag=self._session.tag)
        return (StoredObject(name, EXACT, len(data)),), state_bytes

    def _nearer_parent(self, known: Snapshot | None, new: NewSnapshot) -> str | None:
        """Of the parent on record and that of this reading the one with more tokens, so that `~` and `@` see it."""
        recorded = known.parent if known is not None else None
        if new.parent is None or new.parent == recorded:
            return recorded
        parent = self._files.read_record(new.parent)
        if parent is None or parent.tokens >= new.tokens:
            found = "none" if parent is None else f"it at token {parent.tokens}"
            raise UsageError(
                f"storing a snapshot at token {new.tokens}: expected '{new.parent}' before it, found {found}"
            )
        other = self._files.read_record(recorded) if recorded is not None else None
        return parent.id if other is None or other.tokens < parent.tokens else recorded

    def _publish(self, path: Path, data: bytes, kind: str) -> None:
        assert self._session is not None and self._is_publishing
        self._note_catalogued(False)
        make_folder(path.parent)
        publish(path, data, kind=kind, temp_tag=self._session.tag)

    def _publish_repaired(self, path: Path, data: bytes) -> None:
        self._publish(path, data, "repair.file")

    # ---- catalog ----

    @contextlib.contextmanager
    def _index(self) -> Iterator[Catalog]:
        """The catalog, made anew where that is needed; in memory where it cannot be written."""
        if self._session is not None and self._session.pending:
            with self._publishing():
                self._commit(lambda index: None)
        with contextlib.ExitStack() as stack:
            try:
                index = self._opened_catalog(stack)
            except CatalogDamagedError as error:
                self._mend(error)
                index = self._opened_catalog(stack)
            yield index

    def _opened_catalog(self, stack: contextlib.ExitStack) -> Catalog:
        if self._is_indexed_in_memory or (not self.writable and self._has_dead_writers()):
            return stack.enter_context(Catalog.in_memory(self._fill))
        return stack.enter_context(Catalog.open(self._files.catalog, writable=self.writable))

    def _indexed(self, work: Callable[[Catalog], T]) -> T:
        """Ask the catalog, and once more, made anew, if it turns out to be damaged."""
        try:
            with self._index() as index:
                return work(index)
        except CatalogDamagedError as error:
            self._mend(error)
        with self._index() as index:
            return work(index)

    def _mend(self, reason: CatalogDamagedError) -> None:
        """Make the catalog anew; where user or disk do not let us, make one in memory for every use from now on."""
        if self.writable:
            try:
                with self._publishing():
                    self._rebuild()
                return
            except OSError as error:
                log.warning("the catalog of store '%s' cannot be written: %s", self.path, error)
        log.info("indexing store '%s' in memory: %s", self.path, reason)
        self._is_indexed_in_memory = True

    def _commit(self, change: Callable[[Catalog], None]) -> None:
        """Bring the records published so far, and a change, into the catalog; into a new one where it is damaged."""
        assert self._session is not None and self._is_publishing
        self._note_catalogued(False)
        try:
            self._change_catalog(change)
        except CatalogDamagedError:
            self._rebuild()
            self._change_catalog(change)
        self._session.pending.clear()

    def _change_catalog(self, change: Callable[[Catalog], None]) -> None:
        assert self._session is not None
        with Catalog.open(self._files.catalog, writable=True) as index, index.changing():
            for identity in sorted(self._session.pending):
                self._enter(self._files.record_path(identity), index)
            change(index)

    def _rebuild(self) -> int:
        """From nothing."""
        log.info("making the catalog of store '%s' anew", self.path)
        failpoint("rebuild.begin")
        Catalog.rebuild(self._files.catalog, self._fill)
        failpoint("rebuild.done")
        with Catalog.open(self._files.catalog, writable=True) as index:
            return index.count()

    def _update(self) -> None:
        """Enter what is new or was replaced. What the catalog has and is gone or damaged stays: whoever removes a file
        takes it out of the catalog first, so that `repair` can put it back."""
        try:
            with Catalog.open(self._files.catalog, writable=True) as index, index.changing():
                self._fill(index, skip_known=True)
        except CatalogDamagedError:
            self._rebuild()

    def _fill(self, index: Catalog, *, skip_known: bool = False) -> None:
        """All that the files say and that is whole."""
        folders = {"records": self._files.records, "heads": self._files.heads, "tags": self._files.tags}
        for table, folder in folders.items():
            for path in files(folder):
                with _left_out():
                    if not skip_known or index.stamp(table, path.name) != stamp(path):
                        self._enter(path, index)

    def _enter(self, path: Path, index: Catalog) -> None:
        """A record, head or tag file into the catalog; raises as reading it does."""
        mark = stamp(path)
        data = read_file(path, SMALL_FILE_LIMIT)
        entry = self._decoded(path, data)
        if isinstance(entry, Head):
            index.put_head(entry, path.name, mark, data)
        elif isinstance(entry, Tag):
            index.put_tag(entry, path.name, mark, data)
        else:
            index.put_record(entry, mark, data)

    def _decoded(self, path: Path, data: bytes) -> Snapshot | Head | Tag:
        """What the bytes of a record, head or tag file say."""
        if path.parent == self._files.heads:
            return self._files.decode_head(data, path)
        if path.parent == self._files.tags:
            return self._files.decode_tag(data, path)
        return self._files.decode_record(data, path)

    def _from_row(self, identity: str, record: bytes) -> Snapshot:
        try:
            return snapshot_codec.decode_row(record, self._files.objects, self._files.catalog, identity)
        except SnapshotError as error:
            raise CatalogDamagedError(str(error)) from error

    # ---- locks and sessions ----

    def _create(self) -> None:
        if self.path.exists():
            if not self.path.is_dir():
                raise UsageError(f"making store '{self.path}': expected nothing there, found a file")
            ours = {path.relative_to(self.path).parts[0] for path in vars(self._files).values() if path != self.path}
            theirs = {path.name for path in self.path.iterdir() if not path.name.startswith(TEMP_PREFIX)} - ours
            if theirs:
                raise UsageError(f"making store '{self.path}': expected an empty folder, found '{min(theirs)}' in it")
        make_folder(self._files.locks)
        with _flocked(self._files.locks / "create", fcntl.LOCK_EX, wait=True, busy=""):
            if self._files.format.exists():
                return
            for path in self.path.glob(f"{TEMP_PREFIX}*"):  # of a process that died here
                path.unlink()
            store = self._files
            for folder in (store.markers, store.objects, store.records, store.heads, store.tags):
                make_folder(folder)
            publish(store.format, snapshot_codec.encode_format(), kind="format")

    def _check_writable(self) -> None:
        if not self.writable:
            raise OutputError(
                f"writing to store '{self.path}': expected a folder writable by this user, found a read-only one; "
                "pass --store"
            )

    @contextlib.contextmanager
    def _opened_session(self, wait: bool, *, alone: bool = False) -> Iterator[None]:
        self._check_writable()
        doing, other = ("clearing up in", "writer") if alone else ("writing to", "clearing up")
        busy = f"{doing} store '{self.path}': expected no {other} at work, found one; wait for it, or pass --wait"
        operation = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        kind = filesystem(self.path)
        if kind in NETWORK_FILESYSTEMS:
            log.warning("store '%s' is on a network filesystem (%s): let one machine write to it", self.path, kind)
        with _flocked(self._files.locks / "store", operation, wait=wait, busy=busy), self._marked() as marker:
            self._session = _Session(marker.name)
            try:
                if self._version < snapshot_codec.VERSION:
                    self._raise_version()
                yield
            finally:
                try:
                    if self._session.pending or not self._session.is_catalogued:
                        with self._publishing():
                            self._commit(lambda index: None)
                    marker.unlink()  # stays if the catalog could not be brought up to date: the next writer does so
                finally:
                    self._session = None

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """A session during which nobody else writes."""
        if self._session is not None:
            raise StoreLockedError(
                f"clearing up in store '{self.path}': expected no writer at work, found this program itself"
            )
        return self._opened_session(self.wait, alone=True)

    def _raise_version(self) -> None:
        """Older programs are to refuse the store before they meet a file that they cannot read."""
        with self._publishing():
            self._publish(self._files.format, snapshot_codec.encode_format(), "format")
        self._version = snapshot_codec.VERSION

    @contextlib.contextmanager
    def _marked(self) -> Iterator[Path]:
        """The marker of a writer that lives."""
        while True:
            marker = self._files.markers / uuid.uuid4().hex
            descriptor = os.open(marker, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink == 0:  # taken for a dead writer's before it was locked
                    continue
                fsync_folder(self._files.markers)
                failpoint("writer.marked")
                yield marker
                return
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _held(self, document: str, model: str, wait: bool) -> Iterator[None]:
        """The lock of one head."""
        assert self._session is not None
        key = head_key(document, model)
        if key in self._session.heads:
            yield
            return
        busy = (
            f"writing '{document}': expected to be its only writer, found another at work; wait for it, or pass --wait"
        )
        with _flocked(self._files.locks / f"head-{key}", fcntl.LOCK_EX, wait=wait, busy=busy):
            self._session.heads.add(key)
            try:
                yield
            finally:
                self._session.heads.discard(key)

    @contextlib.contextmanager
    def _publishing(self, *, is_recovering: bool = True) -> Iterator[None]:
        """The lock under which records, refs and catalog change."""
        if self._is_publishing:
            yield
            return
        with _flocked(self._files.locks / "publish", fcntl.LOCK_EX, wait=True, busy=""):
            self._is_publishing = True
            try:
                if is_recovering:
                    self._recover()
                if (self._files.locks / "publish").stat().st_size:  # whoever held it before died or failed in a change
                    self._update()
                    self._note_catalogued(True)
                yield
                if self._session is not None:
                    self._note_catalogued(True)
            finally:
                self._is_publishing = False

    def _note_catalogued(self, is_catalogued: bool) -> None:
        """Note, in the lock file too, whether the catalog has all that this session published.

        The locks of a process that is killed end in any order: who gets this one may find the session's still held.
        """
        os.truncate(self._files.locks / "publish", 0 if is_catalogued else 1)
        if self._session is not None:
            self._session.is_catalogued = is_catalogued

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        """A block during which nothing is published, as far as this user can see to that."""
        return self._publishing() if self.writable else contextlib.nullcontext()

    def _has_dead_writers(self) -> bool:
        with self._dead_writers() as dead:
            return bool(dead)

    @contextlib.contextmanager
    def _dead_writers(self) -> Iterator[set[str]]:
        """Tags of the writers that died."""
        dead = set()
        with contextlib.ExitStack() as stack:
            for path in files(self._files.markers):
                if self._session is not None and path.name == self._session.tag:
                    continue
                with contextlib.suppress(FileNotFoundError):  # ended since it was listed
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                    with contextlib.suppress(BlockingIOError):  # it lives
                        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may be looking too
                        if os.fstat(descriptor).st_nlink:
                            dead.add(path.name)
            yield dead

    def _recover(self) -> None:
        """Clear up behind writers that died: their temp files, and what the catalog lacks of what they published."""
        with self._dead_writers() as dead:
            if not dead:
                return
            log.info("clearing up in store '%s' behind %d writers that died", self.path, len(dead))
            self._sweep(dead)
            failpoint("recover.swept")
            self._update()
            for tag in dead:
                (self._files.markers / tag).unlink()
            failpoint("recover.done")

    def _sweep(self, tags: set[str] | None) -> None:
        """Remove the temp files of these writers, None: of all."""
        starts = TEMP_PREFIX if tags is None else tuple(f"{TEMP_PREFIX}{tag}-" for tag in tags)
        for path in temps(self.path):
            if path.name.startswith(starts):
                remove(path)


@contextlib.contextmanager
def _flocked(path: Path, operation: int, *, wait: bool, busy: str) -> Iterator[None]:
    """A lock that ends with the process at the latest; StoreLockedError saying `busy` unless `wait`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise StoreLockedError(busy) from error
            fcntl.flock(descriptor, operation)
        except OSError as error:
            raise OutputError(
                f"locking '{path}': expected a filesystem with locks, found {error.strerror}; keep the store elsewhere"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """What cannot be read is left out of the catalog: `verify` reports it, and using it raises."""
    try:
        yield
    except FileNotFoundError:
        pass  # removed since it was listed
    except (SnapshotError, MismatchError) as error:
        log.warning("left out of the catalog: %s", error)


def _text(name: str) -> str:
    """The name itself; UsageError for a file's name whose bytes are no text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"naming a document: expected valid text, found {name!r}; use --name") from error
    return name


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
