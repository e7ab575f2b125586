"""Snapshots on disk: written one durable step at a time, found by many names, believed only with their checksums.

    STORE/format                    which version of this layout it is
    STORE/objects/ab/<sha256>       one state in one codec, immutable, named by its bytes
    STORE/records/ab/<id>           one snapshot: identity, position, parent, objects (none: it was removed)
    STORE/refs/heads/<sha256>       the newest snapshot of one (document, model)
    STORE/refs/tags/<quoted name>   a name for one snapshot
    STORE/catalog.sqlite            an index of records and refs; may be deleted at any time
    STORE/locks/                    flock'ed files, empty

What the bytes mean is in `snapshot_codec.py`, the reading of files in `store_files.py`, REFs in `references.py`; this
module knows who may write, when, and in which order.

Order. Publishing goes object → record → ref → catalog, each durable before the next; removing goes the other way.
Records and refs change under `locks/publish`, held for one change. Whoever gets it finds a catalog that agrees with the
files, but for records without a ref of sessions that are under way: they enter it with the next ref, or at the end.

Locks. A writer shares `locks/store` during its session, so that nothing is pruned, and holds `locks/head-<sha256>` of
each head that it moves. Readers take none.

Crashes. A session keeps `locks/writers/<tag>` flock'ed and puts its tag into the names of its temp files. A marker that
nobody holds is a session that died: who next may write removes its temp files, makes the catalog anew from the files,
and only then removes the marker.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rwkv_stream import catalog, references, snapshot_codec
from rwkv_stream.catalog import Catalog, CatalogDamagedError
from rwkv_stream.errors import MismatchError, NotFoundError, OutputError, SnapshotError, StoreLockedError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder, publish
from rwkv_stream.snapshot_codec import (
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
from rwkv_stream.store_files import StoreFiles, files, head_key
from rwkv_stream.verify import Damage, Report, verify

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.state import State

__all__ = ["FAILPOINTS", "Damage", "NewSnapshot", "Report", "Snapshot", "Store"]


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
)

T = TypeVar("T")
log = logging.getLogger(__name__)


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
        self.path = Path(path)
        self.wait = wait
        self._files = StoreFiles(self.path)
        self._session: _Session | None = None
        self._is_publishing = False
        self._is_indexed_in_memory = False
        if create and not self._files.format.exists():
            self._create()
        try:
            self._files.check_format()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"opening store '{self.path}': expected a store, found none; ingest makes one"
            ) from error
        self.writable = os.access(self.path, os.W_OK) and os.access(self._files.locks, os.W_OK)
        if self.writable and self._has_dead_writers():
            with self._publishing():
                pass

    # ---- reading ----

    def get(self, ref: str, *, model: str | None = None) -> Snapshot:
        """The snapshot that a reference names: a tag, a document (`name`, `name@…`, `name~n`) or an id.

        model   fingerprint; chooses among the readings of a document
        raises  NotFoundError; UsageError where `ref` fits several snapshots; MismatchError where it fits one of another
                model; SnapshotError for a damaged record or ref
        """
        return self._indexed(lambda index: references.resolve(_text(ref), model, self._files, index))

    def head(self, document: str, model: str) -> Snapshot | None:
        """The newest snapshot of a document, by its whole name, with the document's own encoding; None without one.

        raises  SnapshotError, MismatchError for a newer format
        """
        found = self._files.newest(_text(document), model)
        return None if found is None else replace(found[1], encoding=found[0].encoding)

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshots it goes on from that exist, nearest first, each read from its record.

        raises  SnapshotError, MismatchError for a newer format
        """
        return (ancestor for ancestor in self._files.ancestors(snapshot) if not ancestor.removed)

    def find(
        self, model: str, start_digest: str, parent: str | None, *, numerics: Mapping[str, str | int] | None = None
    ) -> Iterator[tuple[int, str, str]]:
        """(tokens, chain, id) of the snapshots whose nearest existing ancestor is `parent` (None: that have none).

        By tokens; of the same tokens those of these numerics first, then exact ones. For looking: what is built upon is
        to be had by `get` of the id, from its record.
        """

        def work(index: Catalog) -> Iterable[Snapshot]:
            found = (self._from_row(*row) for row in index.descendants(model, start_digest, parent))
            return sorted(found, key=lambda s: (s.tokens, s.numerics != numerics, not s.exact))

        for snapshot in self._indexed(work):
            yield snapshot.tokens, snapshot.chain, snapshot.id

    def tags(self) -> Iterator[tuple[str, str]]:
        """(tag, snapshot id), by tag."""
        yield from self._indexed(lambda index: sorted(index.tags()))

    def list(self, document: str | None = None, *, model: str | None = None) -> Iterator[Snapshot]:
        """The snapshots, oldest first: all, or those of a document, or of a model.

        A document's are those published under its name and those that its heads descend from.
        raises  UsageError where `document` ends the names of several
        """
        if document is not None:
            _text(document)
        after: tuple[str, str, int, str] | None = None
        is_mended = False
        while True:
            try:
                with self._index() as index:
                    name = references.whole_name(document, index) if document is not None else None
                    for place, record in index.listed(name, model, after):
                        snapshot = self._from_row(place[-1], record)
                        after = place
                        yield snapshot
                return
            except CatalogDamagedError as error:
                if is_mended:
                    raise
                self._mend(error)
                is_mended = True

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

    def move_head(self, document: str, model: str, snapshot: str, *, encoding: str | None = None) -> None:
        """Let the head of (document, model) stand at the snapshot of this id; durable on return.

        encoding  of the document, where the snapshot was first made from a text in another
        raises    NotFoundError, MismatchError for another model's snapshot, StoreLockedError, OutputError
        """
        with self.writing(document, model), self._publishing():
            target = self._files.live(snapshot)
            if target.model != model:
                raise references.another_model(snapshot, target, model)
            path = self._files.head_path(document, model)
            head = Head(document, model, snapshot, encoding or target.encoding, _now())
            known = self._files.read_head(path)
            if known is not None and replace(known, moved=head.moved) == head:
                fsync_folder(path.parent)  # its writer may have died before it did so
            else:
                self._publish(path, snapshot_codec.encode_head(head), "head")
            self._commit(lambda index: index.put_head(head))

    def tag(self, name: str, snapshot: str, *, move: bool = False) -> None:
        """Give the snapshot of this id a name; durable on return.

        move    take the name away from another snapshot
        raises  UsageError for a name that is taken or cannot be a tag, NotFoundError, StoreLockedError, OutputError
        """
        path = self._files.tag_path(name)
        if path is None:
            raise UsageError(
                f"tagging a snapshot: expected a short name with no '@' or '~' and is not like an id, found '{name}'"
            )
        with self.writing(), self._publishing():
            self._files.live(snapshot)
            known = self._files.read_tag(path)
            if known is not None and known.snapshot != snapshot and not move:
                raise UsageError(f"tagging a snapshot: expected a new name, found '{name}' on '{known.snapshot}'")
            if self._indexed(lambda index: index.heads_named(name, whole=True)):
                raise UsageError(f"tagging a snapshot: expected a new name, found a document '{name}'")
            if known is None or known.snapshot != snapshot:
                known = Tag(name, snapshot, _now())
                self._publish(path, snapshot_codec.encode_tag(known), "tag")
            tag = known
            self._commit(lambda index: index.put_tag(tag))

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
                    for document, model in standing:
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
            index.put_record(catalog.row(tombstone, record))
            for head in heads:
                index.drop_head(head.document, head.model)
            for head in moved:
                index.put_head(head)

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

    def verify(self) -> Report:
        """Check every file against its name and checksums, records and refs against what they refer to, and a catalog
        against them row by row. Others may write meanwhile.

        Objects that nothing refers to, and temp files, are not damage.
        """
        with contextlib.ExitStack() as stack:
            try:
                index = stack.enter_context(Catalog.open(self._files.catalog, writable=self.writable))
            except CatalogDamagedError as error:
                is_absent = not self._files.catalog.exists()
                report = verify(self._files, None, self._quiet)
                damage = Damage(self._files.catalog.name, f"{error}; run `rwkv-stream snapshots rebuild`")
                return report if is_absent else Report(report.checked + 1, [*report.damaged, damage])
            return verify(self._files, index, self._quiet)

    def rebuild(self) -> int:
        """Make the catalog anew from records and refs; damaged ones are left out and logged.

        returns  how many records it has, those of removed snapshots too
        raises   OutputError for a read-only store
        """
        self._check_writable()
        with self._publishing():
            return self._rebuild()

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
        self._session.is_catalogued = False
        publish(path, data, kind=kind, temp_tag=self._session.tag)

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
        self._session.is_catalogued = False
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
                path = self._files.record_path(identity)
                data = read_file(path, SMALL_FILE_LIMIT)
                index.put_record(catalog.row(self._files.decode_record(data, path), data))
            change(index)

    def _rebuild(self) -> int:
        log.info("making the catalog of store '%s' anew", self.path)
        failpoint("rebuild.begin")
        Catalog.rebuild(self._files.catalog, self._fill)
        failpoint("rebuild.done")
        with Catalog.open(self._files.catalog, writable=True) as index:
            return index.count()

    def _fill(self, index: Catalog) -> None:
        """All that the files say and that is whole."""
        for path in files(self._files.records):
            with _left_out():
                data = read_file(path, SMALL_FILE_LIMIT)
                index.put_record(catalog.row(self._files.decode_record(data, path), data))
        for path in files(self._files.heads):
            with _left_out():
                head = self._files.read_head(path)
                if head is not None:
                    index.put_head(head)
        for path in files(self._files.tags):
            with _left_out():
                tag = self._files.read_tag(path)
                if tag is not None:
                    index.put_tag(tag)

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
    def _opened_session(self, wait: bool) -> Iterator[None]:
        self._check_writable()
        busy = (
            f"writing to store '{self.path}': expected no clearing up, found it under way; wait for it, or pass --wait"
        )
        with _flocked(self._files.locks / "store", fcntl.LOCK_SH, wait=wait, busy=busy), self._marked() as marker:
            self._session = _Session(marker.name)
            try:
                yield
            finally:
                try:
                    if self._session.pending or not self._session.is_catalogued:
                        with self._publishing():
                            self._commit(lambda index: None)
                    marker.unlink()  # stays if the catalog could not be brought up to date: the next writer does so
                finally:
                    self._session = None

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
    def _publishing(self) -> Iterator[None]:
        """The lock under which records, refs and catalog change."""
        if self._is_publishing:
            yield
            return
        with _flocked(self._files.locks / "publish", fcntl.LOCK_EX, wait=True, busy=""):
            self._is_publishing = True
            try:
                self._recover()
                if self._session is not None and not self._session.is_catalogued:  # something failed in this session
                    self._rebuild()
                    self._session.is_catalogued = True
                yield
                if self._session is not None:
                    self._session.is_catalogued = True
            finally:
                self._is_publishing = False

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        """A block during which nothing is published, as far as this user can see to that."""
        return self._publishing() if self.writable else contextlib.nullcontext()

    def _has_dead_writers(self) -> bool:
        with self._dead_writers() as dead:
            return bool(dead)

    @contextlib.contextmanager
    def _dead_writers(self) -> Iterator[set[str]]:
        """Tags of the writers that died; their markers are locked, so that nobody else sees to them."""
        dead = set()
        with contextlib.ExitStack() as stack:
            for path in files(self._files.markers):
                if self._session is not None and path.name == self._session.tag:
                    continue
                with contextlib.suppress(FileNotFoundError):  # ended since it was listed
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, descriptor)
                    with contextlib.suppress(BlockingIOError):  # it lives
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if os.fstat(descriptor).st_nlink:
                            dead.add(path.name)
            yield dead

    def _recover(self) -> None:
        """Clear up behind writers that died: their temp files, and what the catalog lacks of what they published."""
        with self._dead_writers() as dead:
            if not dead:
                return
            log.info("clearing up in store '%s' behind %d writers that died", self.path, len(dead))
            starts = tuple(f"{TEMP_PREFIX}{tag}-" for tag in dead)
            store = self._files
            for folder in (store.heads, store.tags, *store.objects.iterdir(), *store.records.iterdir()):
                for path in folder.iterdir():
                    if path.name.startswith(starts):
                        path.unlink()
            failpoint("recover.swept")
            self._rebuild()
            for tag in dead:
                (store.markers / tag).unlink()
            failpoint("recover.done")


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
