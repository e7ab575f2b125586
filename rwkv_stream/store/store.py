"""A store of snapshots: what can be done with it. docs/store-format.md has its files, byte by byte.

This module has the verbs that put and move and remove; who may write when, and in which order, is in `sessions.py`,
where files lie and what they say in `layout.py`, what their bytes mean in `sealed.py`, `records.py` and `objects.py`,
REFs in `references.py`; what looks after a store, or copies it, in modules of their names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rwkv_stream.errors import NotFoundError, SnapshotError, UsageError
from rwkv_stream.files import failpoint, fsync_folder, make_folder
from rwkv_stream.store import (
    cache,
    catalog_keeper,
    exchange,
    prune,
    recode,
    records,
    references,
    repair,
    retention,
    sessions,
    transfer,
    verify,
)
from rwkv_stream.store.catalog import SORTS, Catalog, CatalogDamagedError, Listed
from rwkv_stream.store.codecs import EXACT
from rwkv_stream.store.exchange import Progress, Pulled, Pushed
from rwkv_stream.store.layout import ID_PREFIX, StoreFiles, head_key, publishing_failpoints
from rwkv_stream.store.objects import encode_state
from rwkv_stream.store.prune import Pruned
from rwkv_stream.store.recode import Recoded
from rwkv_stream.store.records import Head, NewSnapshot, Snapshot, StoredObject, Tag, now
from rwkv_stream.store.references import Found
from rwkv_stream.store.repair import Repaired
from rwkv_stream.store.retention import Rule, Thinning
from rwkv_stream.store.sealed import VERSION
from rwkv_stream.store.sessions import Change, Sessions
from rwkv_stream.store.texts import KeptText, TextWriter, decode_header
from rwkv_stream.store.transfer import Exported, Imported
from rwkv_stream.store.verify import Report

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model.state import State
    from rwkv_stream.store.records import Arrays
    from rwkv_stream.text.readers.places import Place

FAILPOINTS = (
    *sessions.FAILPOINTS,
    *publishing_failpoints("object"),
    *publishing_failpoints("text"),
    "postings.written",
    "postings.renamed",
    "cache.written",
    "cache.renamed",
    *publishing_failpoints("record"),
    *publishing_failpoints("head"),
    *publishing_failpoints("tag"),
    "tag.uncatalogued",
    "tag.removed",
    "rm.uncatalogued",
    *publishing_failpoints("rm.head"),
    "rm.head.removed",
    *publishing_failpoints("rm.record"),
    *catalog_keeper.FAILPOINTS,
    *prune.FAILPOINTS,
    *recode.FAILPOINTS,
    *retention.FAILPOINTS,
    *repair.FAILPOINTS,
    *transfer.FAILPOINTS,
    *exchange.FAILPOINTS,
)

_NOT_YET = ""  # the stamp of a file that is about to be published


class Store:
    """A folder of snapshots. Reading takes no lock; writing happens in `writing`, or in a session of its own.

    One `Store` may be used by any number of threads and tasks at once. Each has sessions of its own, which keep out of
    each other's way as those of other processes do: who writes what another one is writing waits, or gets
    StoreLockedError. A thread that is to take part in a session runs in a copy of its context (`contextvars`).

    path      the folder
    wait      wait for locks instead of raising StoreLockedError
    writable  whether this user may write to it
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False, wait: bool = False) -> None:
        """Open a store, clearing up behind writers that died.

        create  make it where there is none
        wait    wait for locks instead of raising StoreLockedError
        raises  NotFoundError, MismatchError for a newer format, SnapshotError, UsageError for a folder of other things
        """
        store = StoreFiles(Path(path))
        if create and not store.format.exists():
            sessions.create(store)
        try:
            version = store.check_format()
        except FileNotFoundError as error:
            raise NotFoundError(f"opening store '{path}': expected a store, found none; ingest makes one") from error
        self._files = store
        self._sessions = Sessions(store, version=version, wait=wait)
        self._cache = cache.Cache(store)
        if self.writable:
            self._sessions.clear_up()

    @property
    def path(self) -> Path:
        return self._files.path

    @property
    def wait(self) -> bool:
        return self._sessions.wait

    @property
    def writable(self) -> bool:
        return self._sessions.writable

    # ---- reading ----

    def get(self, ref: str, *, model: str | None = None) -> Snapshot:
        """The snapshot that a reference names: a tag, a document (`name`, `name@…`, `name~n`) or an id.

        model   fingerprint; chooses among the readings of a document
        raises  NotFoundError; UsageError where `ref` fits several snapshots; MismatchError where it fits one of another
                model; SnapshotError for a damaged record or ref
        """
        try:
            return self._sessions.ask(lambda catalog: references.resolve(_text(ref), model, self._files, catalog))
        except NotFoundError:
            if (found := self._cached_position(ref, model)) is not None:
                return found
            raise

    def locate(self, ref: str, *, model: str | None = None) -> Found:
        """What a reference names, with the position in a document that it asks for, before which there need be no
        snapshot; as `get`."""
        try:
            return self._sessions.ask(lambda catalog: references.locate(_text(ref), model, self._files, catalog))
        except NotFoundError:
            if (found := self._cached_position(ref, model)) is not None:
                return Found(found)
            raise

    def _cached_position(self, ref: str, model: str | None) -> Snapshot | None:
        """A state that was made at a position, by its id."""
        return self._cache.position(ref, model) if ID_PREFIX.fullmatch(ref) else None

    def head(self, document: str, model: str) -> Snapshot | None:
        """The newest snapshot of a document, by its whole name; None without one.

        Its `encoding`, `chunk` and `leaf` are the document's own: documents of the same tokens share their snapshots,
        whatever chunks they are read in. What the document started from, its `start` and `start_digest`, is part of
        who a snapshot is.
        raises  SnapshotError, MismatchError for a newer format
        """
        found = self._files.newest(_text(document), model)
        return None if found is None else found[0].view(found[1])

    def mark(self, document: str, model: str) -> Mapping[str, str | int] | None:
        """Where the head of a document, by its whole name, stands in the files that it follows; None where it follows
        none, or where that is not known, as of one that was imported or whose newest snapshot was removed.

        raises  SnapshotError, MismatchError for a newer format
        """
        head = self._files.read_head(self._files.head_path(_text(document), model))
        return None if head is None else head.mark

    def edges(self, document: str, model: str) -> str:
        """The edges of a document, by its whole name, at which it has snapshots; "" for none.

        raises  as `head`
        """
        found = self._files.newest(_text(document), model)
        return "" if found is None else found[0].snapshot_at

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshots it goes on from that exist, nearest first, each read from its record.

        raises  SnapshotError, MismatchError for a newer format
        """
        return (ancestor for ancestor in self._files.ancestors(snapshot) if not ancestor.removed)

    def starts(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """As `Snapshot.starts`."""
        return self._files.starts(snapshot)

    def reach(self, model: str, start_digest: str, parent: str | None, limit: int) -> int | None:
        """How far, up to token `limit`, the snapshots that come next after `parent` lie (None: the first of readings).

        Next are those whose nearest ancestor that exists, and is not at an edge, is `parent`; None where there is none.
        """
        return self._sessions.ask(lambda catalog: catalog.reach(model, start_digest, parent, limit))

    def match(
        self, model: str, start_digest: str, tokens: int, chain: str, *, numerics: Mapping[str, str | int]
    ) -> Snapshot | None:
        """The snapshot that stands after just these tokens, of whatever document, read from its record; one that is
        kept exactly, or whose state is not kept.

        chain    digest of the tokens
        numerics of several that stand there one with a state is preferred, one of these numerics, then an exact one
        raises   SnapshotError, MismatchError for a newer format
        """

        def work(catalog: Catalog) -> list[Snapshot]:
            rows = catalog.with_chain(model, start_digest, tokens, chain)
            return [self._sessions.keeper.snapshot(*row) for row in rows]

        found = [one for one in self._sessions.ask(work) if one.is_kept_exactly or not one.keeps_state]
        if not found:
            return None
        best = min(found, key=lambda s: (not s.keeps_state, s.numerics != numerics, not s.exact, s.id))
        return self._files.target(best.id, self._files.record_path(best.id))

    def text(self, snapshot: Snapshot) -> KeptText | None:
        """The text that a snapshot has read, from the document's start; None where none was kept.

        raises  SnapshotError where some of it is damaged or missing, MismatchError for a newer format
        """
        return self._files.text(snapshot, self._sessions.save_postings)

    # ---- states that were made when they were asked for ----

    def made(
        self, model: str, start_digest: str, chain: str, tokens: int, numerics: Mapping[str, str | int]
    ) -> tuple[Snapshot, Arrays] | None:
        """The state after these tokens that was made before under these numerics, if it is in the cache."""
        name = cache.key(model, start_digest, chain, tokens, numerics)
        found = self._cache.load(name)
        if found is not None:
            self._cache.touch(name)
        return found

    def keep_made(
        self, snapshot: Snapshot, arrays: Arrays, numerics: Mapping[str, str | int], limit: int | None = None
    ) -> None:
        """Keep a state that was made in the cache, as far as this user may write; what was used least recently goes.

        snapshot  with the digest of this state
        limit     bytes of the cache, which holds one state at least; 0: nothing is kept. None: the smaller of 1 GB and
                  5 % of the store's states
        """
        if limit == 0:
            return
        name = cache.key(snapshot.model, snapshot.start_digest, snapshot.chain, snapshot.tokens, numerics)
        if self._sessions.save_made(self._cache.path(name), cache.encode(snapshot, arrays)):
            if limit is None:
                states = self._sessions.ask(lambda catalog: catalog.state_bytes())
                limit = min(cache.DEFAULT_BYTES, int(cache.DEFAULT_SHARE * states))
            self._cache.shrink(limit, name)

    def positions(self, document: str | None = None, *, model: str | None = None) -> Iterator[Listed]:
        """The states that were made at positions of documents, or of one, and are in the cache, oldest first."""
        name = None
        if document is not None:
            _text(document)
            name = self._sessions.ask(lambda catalog: references.whole_name(document, catalog))
        found = []
        for key, s in self._cache.listed():
            if s.how == records.POSITION and name in (None, s.document) and model in (None, s.model):
                size = self._cache.path(key).stat().st_size
                at = (s.id, s.document, s.tokens, s.bytes, size, s.parent, s.start, s.created, s.model, s.how, s.leaf)
                found.append(Listed(*at, edge=False))
        yield from sorted(found, key=lambda one: (one.created, one.document, one.tokens, one.id))

    def tags(self) -> Iterator[tuple[str, str]]:
        """(tag, snapshot id), by tag."""
        yield from self._sessions.ask(lambda catalog: sorted(catalog.tags()))

    def heads(self) -> Iterator[tuple[str, str, str]]:
        """(document, model, snapshot id), by document."""
        yield from self._sessions.ask(lambda catalog: list(catalog.heads()))

    def family(self, document: str | None = None) -> Iterator[Listed]:
        """The snapshots among which a document's lineage runs, or all, oldest first, removed ones too: its own, what
        they go on or started from, and what goes on or started from them.

        raises  UsageError where `document` ends the names of several
        """
        if document is not None:
            _text(document)

        def rows(catalog: Catalog) -> Iterable[Listed]:
            name = references.whole_name(document, catalog) if document is not None else None
            return [*catalog.family(name)]

        yield from self._sessions.ask(rows)

    def chunk_states(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The states of the stretches of a snapshot's document, by its model and from what it was started from, in the
        order of the text; of what was read later, or of an older text, too."""

        def work(catalog: Catalog) -> Sequence[Snapshot]:
            found = catalog.chunk_states(snapshot.document, snapshot.model, snapshot.start_digest)
            return [self._sessions.keeper.snapshot(*row) for row in found]

        yield from self._sessions.ask(work)

    def list(
        self,
        document: str | None = None,
        *,
        model: str | None = None,
        sort: str = "created",
        reverse: bool = False,
        chunk_states: bool = False,
    ) -> Iterator[Listed]:
        """The snapshots: all, or those of a document, or of a model; in the order of `catalog.SORTS`.

        A document's are those published under its name and those that its heads descend from.
        chunk_states  the states of stretches of documents among them
        raises  UsageError for another order, or where `document` ends the names of several; SnapshotError where the
                catalog turned out to be damaged on the way (it has been made anew)
        """
        if sort not in SORTS:
            raise UsageError(f"listing snapshots: expected an order of {', '.join(SORTS)}, found '{sort}'")
        if document is not None:
            _text(document)
        return self._listed(document, model, sort, reverse, chunk_states)

    def _listed(
        self, document: str | None, model: str | None, sort: str, reverse: bool, chunk_states: bool
    ) -> Iterator[Listed]:
        def rows(catalog: Catalog) -> Iterator[Listed]:
            name = references.whole_name(document, catalog) if document is not None else None
            return catalog.listed(name, model, sort, reverse, chunk_states)

        listed = 0
        try:
            with self._sessions.catalog() as catalog:
                for entry in rows(catalog):
                    yield entry
                    listed += 1
            return
        except CatalogDamagedError as error:
            self._sessions.mend(error)
            if listed:
                raise
        with self._sessions.catalog() as catalog:
            yield from rows(catalog)

    # ---- writing ----

    @contextlib.contextmanager
    def writing(self, document: str | None = None, model: str | None = None, *, wait: bool = False) -> Iterator[None]:
        """A writer's session: nothing that it refers to is pruned, nobody else writes to (document, model).

        Nested in one thread or task, the outermost is the session.
        raises  StoreLockedError unless waiting was asked for here or of the store; OutputError for a read-only store
        """
        with self._sessions.writing(wait=wait), contextlib.ExitStack() as stack:
            if document is not None:
                assert model is not None
                stack.enter_context(self._sessions.held(_text(document), model, wait=wait))
            yield

    def put(
        self,
        new: NewSnapshot,
        state: State,
        last_hidden: Tensor,
        *,
        head: tuple[str, str, int, str] | None = None,
        mark: Mapping[str, str | int] | None = None,
        keep_state: bool = True,
    ) -> Snapshot:
        """Store a snapshot: object, then record, each durable; `move_head` or `tag` then make it easy to find.

        What threads of one session put at the same time is made durable together.

        state, last_hidden   of batch 1; fp32 [C]
        head        name, encoding, chunk and edges of a document whose head is to stand there; held by `writing`
        mark        where the snapshot stands in the files that this document follows; one file says both
        keep_state  else there is no object, and the state is made from the text, which `new` has, when asked for
        An inline extent that no record holds, as it is too long or goes on after another, becomes a file.
        returns  the snapshot as recorded. One that is there already keeps its object, if that is exact, document and
                 time of creation; an exact reading replaces what is recorded of how it was read, a nearer parent a
                 farther one, and text that is given what was kept before
        raises   UsageError for values that no record may hold, StoreLockedError, OutputError, OSError of a full disk
        """
        if new.inline_extent is not None and not self._may_be_inline(new):
            self._sessions.publish_text(str(new.text), new.inline_extent, None)
            new = replace(new, inline_extent=None)
        records.check_new(new)
        if not keep_state and new.text is None:
            raise UsageError(f"storing a snapshot of '{new.document}' without a state: expected its text, found none")
        if state.batch != 1:
            raise UsageError(f"storing a snapshot of '{new.document}': expected batch 1, found {state.batch}")
        state_digest = state.digest()
        identity = records.snapshot_id(new.model, new.start_digest, new.chain, new.tokens, state_digest)
        with self._sessions.writing() as session:
            known = self._files.known(identity)
            objects: tuple[StoredObject, ...]
            if known is not None and known.is_kept_exactly and self._files.has_state(known):
                objects, state_bytes = known.objects, known.state_bytes
            elif not keep_state:
                tensors = [tensor for _, tensor in state.items()]
                objects, state_bytes = (), 4 * sum(tensor.numel() for tensor in (*tensors, last_hidden))
            else:
                data, state_bytes = encode_state(new, state, last_hidden, state_digest)
                objects = (self._files.objects.write(data, EXACT, temp_tag=session.tag),)
            snapshot: Snapshot

            def record() -> bytes | None:
                nonlocal snapshot, objects, state_bytes
                if not all(self._files.objects.exists(stored.name) for stored in objects):  # thinned away meanwhile
                    data, state_bytes = encode_state(new, state, last_hidden, state_digest)
                    objects = (self._files.objects.write(data, EXACT, temp_tag=session.tag),)
                known = self._files.known(identity)
                parent = self._nearer_parent(known, new)
                if not objects and new.start is not None:
                    self._files.live(new.start)  # NotFoundError where it was removed since
                if known is None or known.removed:
                    reading, document, created = new, new.document, now()
                else:
                    reading = new if new.exact or not known.exact else known
                    document, created = known.document, known.created
                text = new if new.text is not None or known is None else known
                kept = {"text": text.text, "inline_extent": text.inline_extent}
                edge = new.edge or (known is not None and known.edge)
                snapshot = Snapshot(
                    **{f.name: getattr(reading, f.name) for f in fields(NewSnapshot)}
                    | {"document": document, "parent": parent, "edge": edge, **kept},
                    id=identity,
                    state_digest=state_digest,
                    state_bytes=state_bytes,
                    objects=objects,
                    created=created,
                    reader=self._files,
                )
                return None if snapshot == known else records.encode_record(snapshot)

            self._sessions.publish_together(
                Change(identity, record, self._head_change(identity, new.model, head, mark))
            )
            return snapshot

    def _may_be_inline(self, new: NewSnapshot) -> bool:
        """Whether the last extent of its text may lie in a record; else it becomes a file."""
        assert new.inline_extent is not None and new.text is not None
        extent = decode_header(new.inline_extent, self._files.texts.path(new.text))
        return len(new.inline_extent) <= records.INLINE_BYTES and extent.previous is None

    def text_writer(self, after: str | None, place: Place, *, has_lines: bool) -> TextWriter:
        """What keeps the text of a document; as `TextWriter`. It is to be used in `writing`, and the name of the last
        extent to be put into a snapshot: a prune removes what none leads to."""
        publish = self._sessions.publish_text
        return TextWriter(self._files.texts, after, place, has_lines=has_lines, publish=publish)

    def keep_text(self, snapshot: str, text: str) -> None:
        """Let the snapshot of this id have the text whose last extent has this name; durable on return.

        raises  NotFoundError, SnapshotError for a text that does not end where the snapshot stands, StoreLockedError,
                OutputError
        """
        with self._sessions.writing(), self._sessions.publishing():
            found = replace(self._files.live(snapshot), text=text, inline_extent=None)
            self.text(found)
            self._sessions.publish_record(snapshot, records.encode_record(found), "record")

    def _head_change(
        self,
        snapshot: str,
        model: str,
        head: tuple[str, str, int, str] | None,
        mark: Mapping[str, str | int] | None,
    ) -> tuple[Path, Callable[[], bytes | None]] | None:
        if head is None:
            return None
        document, encoding, chunk, snapshot_at = head
        path = self._files.head_path(document, model)
        moved = Head(document, model, snapshot, encoding, now(), chunk, mark, snapshot_at)
        return path, lambda: self._moved_head(path, moved)

    def _moved_head(self, path: Path, head: Head) -> bytes | None:
        """What the file is to hold; None where it does so, but for the time."""
        known = self._files.read_head(path)
        same = known is not None and replace(known, moved=head.moved) == head
        return None if same else records.encode_head(head)

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

    def move_head(
        self,
        document: str,
        model: str,
        snapshot: str,
        *,
        encoding: str | None = None,
        chunk: int | None = None,
        snapshot_at: str = "",
    ) -> None:
        """Let the head of (document, model) stand at the snapshot of this id; durable on return.

        encoding, chunk  of the document, where they are not those that the snapshot was first made with
        snapshot_at      edges of the document at which there are snapshots
        raises  UsageError for a chunk of no tokens, NotFoundError, MismatchError for another model's snapshot,
                StoreLockedError, OutputError
        """
        if chunk is not None and chunk < 1:
            raise UsageError(f"moving the head of '{document}': expected chunks of 1 token or more, found {chunk}")
        with self.writing(document, model), self._sessions.publishing():
            target = self._files.live(snapshot)
            if target.model != model:
                raise references.another_model(snapshot, target, model)
            path = self._files.head_path(document, model)
            own = encoding or target.encoding, now(), chunk or target.chunk
            head = Head(document, model, snapshot, *own, snapshot_at=snapshot_at)
            made = self._moved_head(path, head)
            if made is None:
                fsync_folder(path.parent)  # its writer may have died before it did so
            else:
                self._sessions.publish(path, made, "head")
            self._sessions.commit(lambda catalog: self._sessions.keeper.enter(path, catalog))

    def tag(self, name: str, snapshot: str, *, move: bool = False) -> None:
        """Give the snapshot of this id a name; durable on return.

        move    take the name away from another snapshot
        raises  UsageError for a name that is taken or cannot be a tag, NotFoundError, StoreLockedError, OutputError
        """
        path = self._tag_path(name)
        with self._sessions.writing(), self._sessions.publishing():
            self._files.live(snapshot)
            known = self._files.read_tag(path)
            is_elsewhere = known is not None and known.snapshot != snapshot
            self._check_free(name, known if is_elsewhere and not move else None)
            if known is None or is_elsewhere:
                self._sessions.publish(path, records.encode_tag(Tag(name, snapshot, now())), "tag")
            self._sessions.commit(lambda catalog: self._sessions.keeper.enter(path, catalog))

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
        if self._sessions.ask(lambda catalog: catalog.heads_named(name)):
            raise UsageError(f"tagging a snapshot: expected a new name, found a document '{name}'")

    def untag(self, name: str) -> None:
        """Take a tag away; the snapshot stays.

        raises  NotFoundError, StoreLockedError, OutputError
        """
        path = self._files.tag_path(name)
        with self._sessions.writing(), self._sessions.publishing():
            if path is None or not path.exists():
                raise NotFoundError(f"removing tag '{name}' of store '{self.path}': expected a tag, found none")
            self._sessions.commit(lambda catalog: catalog.drop_tag(name))
            failpoint("tag.uncatalogued")
            path.unlink()
            fsync_folder(path.parent)
            failpoint("tag.removed")

    def rm(self, snapshot: str) -> None:
        """Remove the snapshot of this id: its record keeps its place in the lineage, object and text wait for a prune.

        Heads that stand there go to its nearest ancestor, or away where it has none.
        raises  NotFoundError, UsageError for a tagged one and for the start of a document whose states are made from
                its text, StoreLockedError while one of those documents is written to
        """
        with self._sessions.writing():
            is_done = self._uncache(snapshot)
            while not is_done:
                standing = self._sessions.ask(lambda catalog: catalog.heads_at(snapshot))
                with contextlib.ExitStack() as stack:
                    for document, model in sorted(standing, key=lambda reading: head_key(*reading)):
                        stack.enter_context(self._sessions.held(document, model))
                    stack.enter_context(self._sessions.publishing())
                    if self._sessions.ask(lambda catalog: catalog.heads_at(snapshot)) == standing:
                        self._rm(snapshot, standing)
                        is_done = True

    def _uncache(self, identity: str) -> bool:
        """Remove the states of a snapshot from the cache; whether that is all there is of it."""
        names = [name for name, one in self._cache.listed() if one.id == identity]
        for name in names:
            self._cache.remove(name)
        return bool(names) and self._files.read_record(identity) is None

    def _rm(self, identity: str, standing: Iterable[tuple[str, str]]) -> None:
        snapshot = self._files.live(identity)
        tags = self._sessions.ask(lambda catalog: catalog.tags_at(identity))
        if tags:
            raise UsageError(
                f"removing snapshot '{identity}': expected no tags, found {', '.join(tags)}; remove them first"
            )
        made = self._sessions.ask(lambda catalog: catalog.made_from(identity))
        if made:
            raise UsageError(
                f"removing snapshot '{identity}': expected no state that is made from it, found that of "
                f"{len(made)} documents, such as '{made[0]}'; remove them first"
            )
        nearest = next(self.ancestors(snapshot), None)
        paths = [self._files.head_path(document, model) for document, model in standing]
        heads = [head for head in map(self._files.read_head, paths) if head is not None]
        moved = (
            [replace(head, snapshot=nearest.id, moved=now(), mark=None) for head in heads]
            if nearest is not None
            else []
        )
        tombstone = snapshot.tombstone()
        record = records.encode_record(tombstone)

        def change(catalog: Catalog) -> None:
            catalog.put_record(tombstone, _NOT_YET, record)
            for head in heads:
                catalog.drop_head(head.document, head.model)
            for head in moved:
                path = self._files.head_path(head.document, head.model)
                catalog.put_head(head, path.name, _NOT_YET, records.encode_head(head))

        self._sessions.commit(change)
        failpoint("rm.uncatalogued")
        for head in moved:
            path = self._files.head_path(head.document, head.model)
            self._sessions.publish(path, records.encode_head(head), "rm.head")
        if not moved:
            for path in paths:
                path.unlink()
                fsync_folder(path.parent)
                failpoint("rm.head.removed")
        self._sessions.publish(self._files.record_path(identity), record, "rm.record")

    # ---- looking after it ----

    def verify(self, *, read_data: bool = False) -> Report:
        """Check records and refs against their checksums and what they refer to, the objects' and texts' presence,
        sizes and headers, and a catalog row by row; others may write meanwhile.

        read_data  read objects and texts too: hash each file and decode what it holds
        Objects and texts that nothing refers to, and temp files, are not damage; nor are missing or damaged postings,
        which are made again where this user may write.
        """
        return verify.verify(self._sessions, read_data=read_data)

    def rebuild(self) -> int:
        """Make the catalog anew from records and refs; damaged ones are left out and logged.

        returns  how many records it has, those of removed snapshots too
        raises   OutputError for a read-only store
        """
        self._sessions.check_writable()
        with self._sessions.publishing():
            return self._sessions.keeper.rebuild()

    def thinning(self, document: str, model: str, rule: Rule, last: Snapshot | None) -> Thinning:
        """What thins the reading of (document, model) as it goes on from `last`, by a rule; to be used while `writing`
        holds its head. See `store.retention`."""
        return Thinning(self._sessions, document, model, rule, last)

    def prune(self, rule: Rule | None = None, *, dry_run: bool = False) -> Pruned:
        """Remove what nothing refers to: snapshots that no head or tag, nor what these go on or started from, reaches
        (readings superseded by others), objects that no record names, text that no record leads to, states that were
        made, temp files, locks of heads. Without a rule nothing else goes.

        rule     what is to stay of each reading; see `store.retention`
        dry_run  only say what would go
        raises   SnapshotError where a record or ref is damaged, as what it refers to is not known; MismatchError for
                 one of a newer version; StoreLockedError while others write; OutputError, too where more must stay than
                 the rule's limit, and nothing was removed
        """
        return prune.prune(self._sessions, rule or Rule(), dry_run=dry_run)

    def recode(
        self,
        codec: str,
        document: str | None = None,
        *,
        keep_exact: int = 1,
        older_than: datetime | None = None,
        dry_run: bool = False,
    ) -> Recoded:
        """Keep the exact states of a document, or of all, in a codec of fewer bytes; ids stay what they are.

        codec       "int16" or "int8"; see `store.codecs`
        keep_exact  so many of the newest snapshots of each reading stay exact, so that it can go on; what is tagged,
                    and what readings were started from, does too
        older_than  only states that were made before this moment, which has a zone
        dry_run     only say what that would do
        What was kept before is removed: only reading again brings the last bits back.
        raises  UsageError, NotFoundError, SnapshotError for a damaged state, StoreLockedError while others write,
                OutputError
        """
        name = None
        if document is not None:
            _text(document)
            name = self._sessions.ask(lambda catalog: references.whole_name(document, catalog))
        return recode.recode(
            self._sessions, codec, document=name, keep_exact=keep_exact, older_than=older_than, dry_run=dry_run
        )

    @classmethod
    def repair(cls, path: str | os.PathLike[str], *, wait: bool = False) -> Repaired:
        """Make a damaged store one that verifies: restore what can be, move the rest to its quarantine folder.

        raises  NotFoundError, StoreLockedError while others write, OutputError, MismatchError for a store or file of a
                newer version
        """
        store = StoreFiles(Path(path))
        if not any(folder.is_dir() for folder in (store.objects.folder, store.records)):
            raise NotFoundError(f"repairing store '{path}': expected a store, found none")
        version = VERSION
        with contextlib.suppress(SnapshotError, FileNotFoundError):  # to be put right
            version = store.check_format()
        opened = Sessions(store, version=version, wait=wait)
        opened.check_writable()
        make_folder(store.markers)
        return repair.repair(opened)

    # ---- to and from other stores ----

    def export(self, refs: Sequence[str], file: BinaryIO, *, only: bool = False, keep_text: bool = True) -> Exported:
        """Write the snapshots that the references name, with all before them, as one file that `import_` takes.

        only       without the snapshots before them; those keep their places in the lineage
        keep_text  with the text that they have read, where it was kept
        Tags on them go along, and heads, which stand at the furthest of each document's.
        raises  as `get`; SnapshotError where an object is damaged
        """
        return transfer.export(self._sessions, map(self.get, refs), file, only=only, keep_text=keep_text)

    def import_(self, file: BinaryIO) -> Imported:
        """Take over what an export holds; nothing is changed unless all of it is whole.

        Heads go on where the import's goes on from this store's; other names that are taken stay where they stand.
        raises  SnapshotError for a damaged file or none of ours, MismatchError for one of a newer format, OutputError,
                StoreLockedError, OSError of a full disk
        """
        return transfer.import_(self._sessions, file)

    def push(
        self, url: str, refs: Sequence[str] = (), *, force: bool = False, on_progress: Progress | None = None
    ) -> Pushed:
        """Send snapshots, with all that they go on or started from, to the store at a URL; what is there already is
        not sent.

        url          any that `fsspec` opens (extra `remote`), or a path; made a store where there is nothing
        refs         none: all that heads and tags lead to
        force        move heads and tags of the remote to where they stand here, whatever stood there
        on_progress  is given bytes that have arrived, and bytes in all
        Objects and text go before records, those before heads and tags. Heads go on, and else stay where they are.
        raises  as `get`; SnapshotError for a damaged file here, MismatchError for a remote of a newer format,
                UsageError for a place of other things, InputError and OutputError of the remote, StoreLockedError while
                others clear up here
        """
        chosen = [*map(self.get, refs)] if refs else None
        return exchange.push(self._sessions, url, chosen, force=force, on_progress=on_progress)

    def pull(self, url: str, refs: Sequence[str] = (), *, on_progress: Progress | None = None) -> Pulled:
        """Take over snapshots, with all that they go on or started from, from the store at a URL; what is here already
        is not fetched.

        url, on_progress  as of `push`
        refs              references as `get` takes them, in that store; none: all that its heads and tags lead to
        Heads and tags are taken over as `import_` does.
        raises  NotFoundError where there is no store; else as `import_`, and InputError of the remote
        """
        return exchange.pull(self._sessions, url, refs, on_progress=on_progress)


def _text(name: str) -> str:
    """The name itself; UsageError for a file's name whose bytes are no text."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"naming a document: expected valid text, found {name!r}; use --name") from error
    return name
