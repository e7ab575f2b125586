"""Who may write to a store, when, and in which order; what dead writers left; a catalog that agrees with the files.

Order. Publishing goes object and text → record → ref → catalog, each durable before the next; removing goes the other
way. Postings, which are made again where they are missing, follow their text and are not durable.
Records and refs change under `locks/publish`, held for one change, or for those that threads of a session want at the
same time: all their records, then all their heads, then one transaction of the catalog (`publish_together`). Whoever
gets it finds a catalog that agrees with the files, but for records without a ref of sessions that are under way: they
enter it with the next ref, or at the end.

Locks. A writer shares `locks/store` during its session and holds `locks/head-<sha256>` of each head that it moves;
`prune` and `repair` hold `locks/store` alone. Readers take none. They are taken in this order: store, heads by their
keys, publish.

Threads. A session belongs to the context (`contextvars`) that opened it: to one thread, or one task. Another thread
has its own, and its own openings of the locks, which exclude those of this one as those of another process would. What
runs in a copy of the context (`copy_context().run`, `asyncio.to_thread`) takes part in the session, and is to end
before it does. `locks/publish` belongs to the thread that holds it, whatever its session.

Crashes. A session keeps `locks/writers/<tag>` flock'ed and puts its tag into the names of its temp files. A marker that
nobody holds is a session that died: who next may write removes its temp files, enters what is new or was replaced into
the catalog, and only then removes the marker.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rwkv_stream.errors import OutputError, RwkvStreamError, StoreLockedError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder, publish, publish_all, remove
from rwkv_stream.store import locks
from rwkv_stream.store.catalog import Catalog, CatalogDamagedError
from rwkv_stream.store.catalog_keeper import CatalogKeeper
from rwkv_stream.store.layout import (
    NETWORK_FILESYSTEMS,
    StoreFiles,
    filesystem,
    head_key,
    publishing_failpoints,
    temps,
)
from rwkv_stream.store.locks import dead_writers, flocked, marked, passing
from rwkv_stream.store.sealed import VERSION, encode_format

FAILPOINTS = (*publishing_failpoints("format"), *locks.FAILPOINTS, "recover.swept", "recover.done")

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """One writer: its tag, the heads it holds, and the records that are not in the catalog yet."""

    tag: str
    heads: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    is_catalogued: bool = True  # all else that it published is
    is_over: bool = False  # a copy of its context may outlive it
    waiting: deque[Change] = field(default_factory=deque)
    turn: threading.Lock = field(default_factory=threading.Lock)  # of the thread that publishes what waits
    asking: threading.RLock = field(default_factory=threading.RLock)  # of the thread that asks `catalog`
    catalog: Catalog | None = None  # kept open, as a session asks for every document
    catalog_file: int = 0  # its inode
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # closes it

    def close_catalog(self) -> None:
        """Whoever asks next opens it again."""
        self.catalog = None
        self.opened.close()


@dataclass(slots=True, eq=False)
class Change:
    """A record, and a head that is to stand there, which a thread of a session wants published.

    record  what its file is to hold; None: it does so already, and its writer may have died before it was durable
    head    its path, and as `record`
    """

    identity: str
    record: Callable[[], bytes | None]
    head: tuple[Path, Callable[[], bytes | None]] | None
    is_done: bool = False
    error: BaseException | None = None


_SESSIONS: ContextVar[Mapping[Sessions, Session]] = ContextVar("sessions")


class _Thread(threading.local):
    is_publishing = False


class Sessions:
    """The writers of one opened store, and the catalog that they and the readers ask.

    version   that of the store's `format`
    wait      wait for locks instead of raising StoreLockedError
    writable  whether this user may write to it
    """

    def __init__(self, store: StoreFiles, *, version: int, wait: bool) -> None:
        self.store = store
        self.keeper = CatalogKeeper(store, self._let_go)
        self.wait = wait
        self.writable = os.access(store.path, os.W_OK) and (not store.locks.exists() or os.access(store.locks, os.W_OK))
        self._version = version
        self._is_indexed_in_memory = False
        self._thread = _Thread()
        self.room = threading.Lock()  # of the thread that writes into what a limit of bytes leaves

    # ---- sessions ----

    @property
    def current(self) -> Session | None:
        """The session that this context takes part in."""
        session = _SESSIONS.get({}).get(self)
        return None if session is None or session.is_over else session

    @contextlib.contextmanager
    def writing(self, *, wait: bool = False) -> Iterator[Session]:
        """The session of this context, or one of its own; see `Store.writing`."""
        session = self.current
        if session is not None:
            yield session
            return
        with self._opened(wait or self.wait) as session:
            yield session

    @contextlib.contextmanager
    def alone(self) -> Iterator[Session]:
        """A session during which nobody else writes."""
        if self.current is not None:
            raise StoreLockedError(
                f"clearing up in store '{self.store.path}': expected no writer at work, found this program itself"
            )
        with self._opened(self.wait, alone=True) as session:
            yield session

    @contextlib.contextmanager
    def held(self, document: str, model: str, *, wait: bool = False) -> Iterator[None]:
        """The lock of one head, for the session of this context."""
        session = self._session()
        key = head_key(document, model)
        if key in session.heads:
            yield
            return
        busy = (
            f"writing '{document}': expected to be its only writer, found another at work; wait for it, or pass --wait"
        )
        with passing(self.store.locks / f"head-{key}", wait=wait or self.wait, busy=busy):
            session.heads.add(key)
            try:
                yield
            finally:
                session.heads.discard(key)

    @contextlib.contextmanager
    def unpruned(self) -> Iterator[None]:
        """A block during which nobody clears up or recodes, as far as this user can see to that; no session of its
        own."""
        if self.current is not None or not self.writable:
            yield
            return
        busy = f"reading store '{self.store.path}': expected nobody clearing up, found one; wait for it, or pass --wait"
        with flocked(self.store.locks / "store", fcntl.LOCK_SH, wait=self.wait, busy=busy):
            yield

    def check_writable(self) -> None:
        """OutputError for a read-only store."""
        if not self.writable:
            raise OutputError(
                f"writing to store '{self.store.path}': expected a folder writable by this user, found a read-only "
                "one; pass --store"
            )

    @contextlib.contextmanager
    def _opened(self, wait: bool, *, alone: bool = False) -> Iterator[Session]:
        self.check_writable()
        path = self.store.path
        doing, other = ("clearing up in", "writer") if alone else ("writing to", "clearing up")
        busy = f"{doing} store '{path}': expected no {other} at work, found one; wait for it, or pass --wait"
        operation = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        kind = filesystem(path)
        if kind in NETWORK_FILESYSTEMS:
            log.warning("store '%s' is on a network filesystem (%s): let one machine write to it", path, kind)
        with flocked(self.store.locks / "store", operation, wait=wait, busy=busy), marked(self.store.markers) as marker:
            session = Session(marker.name)
            token = _SESSIONS.set({**_SESSIONS.get({}), self: session})
            try:
                if self._version < VERSION:
                    self._raise_version()
                yield session
            finally:
                try:
                    if session.pending or not session.is_catalogued:
                        with self.publishing():
                            self.commit()
                    marker.unlink()  # stays if the catalog could not be brought up to date: the next writer does so
                finally:
                    session.is_over = True
                    session.close_catalog()
                    _SESSIONS.reset(token)

    def _session(self) -> Session:
        session = self.current
        assert session is not None, "outside of `writing`"
        return session

    def _raise_version(self) -> None:
        """Older programs are to refuse the store before they meet a file that they cannot read."""
        with self.publishing():
            self.publish(self.store.format, encode_format(), "format")
        self._version = VERSION

    # ---- publishing ----

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """The lock under which records, refs and catalog change."""
        if self._thread.is_publishing:
            yield
            return
        lock = self.store.locks / "publish"
        with flocked(lock, fcntl.LOCK_EX, wait=True):
            self._thread.is_publishing = True
            try:
                self._recover()
                if lock.stat().st_size:  # whoever held it before died or failed in a change
                    self.keeper.update()
                    self._note_catalogued(True)
                yield
                if self.current is not None:
                    self._note_catalogued(True)
            finally:
                self._thread.is_publishing = False

    def publish(self, path: Path, data: bytes, kind: str) -> None:
        """A small file, durable on return; inside `publishing`."""
        assert self._thread.is_publishing
        session = self._session()
        self._note_catalogued(False)
        make_folder(path.parent)
        publish(path, data, kind=kind, temp_tag=session.tag)

    def publish_files(self, files: Sequence[tuple[Path, bytes]], kind: str) -> None:
        """Small files, in folders that are there, durable together on return; inside `publishing`."""
        assert self._thread.is_publishing
        self._note_catalogued(False)
        publish_all(files, kind=kind, temp_tag=self._session().tag)

    def publish_text(self, name: str, data: bytes, postings: bytes | None) -> None:
        """An extent, durable on return, and its postings, which need not be; None: they are made when needed."""
        path = self.store.texts.path(name)
        with self.writing() as session:
            make_folder(path.parent)
            publish(path, data, kind="text", temp_tag=session.tag)
            if postings is not None:
                self._publish_postings(name, postings, session)

    def save_made(self, path: Path, data: bytes) -> bool:
        """A state for the cache, where this user may write, and nobody is clearing up; whether that was so."""
        if not self.writable:
            return False
        try:
            with self.writing() as session:
                path.parent.mkdir(parents=True, exist_ok=True)
                publish(path, data, kind="cache", temp_tag=session.tag, durable=False)
        except (StoreLockedError, OutputError, OSError) as error:
            log.info("a state was made, but is not kept for the next time: %s", error)
            return False
        return True

    def save_postings(self, name: str, data: bytes) -> bool:
        """Postings that were made again, where this user may write, and nobody is clearing up; whether that was so."""
        if not self.writable:
            return False
        try:
            with self.writing() as session:
                if self.store.texts.path(name).exists():  # else it was pruned, and nothing of it is to be left
                    self._publish_postings(name, data, session)
        except (StoreLockedError, OutputError, OSError) as error:
            log.warning("the postings of '%s' are made, but not saved: %s", self.store.texts.path(name), error)
            return False
        return True

    def _publish_postings(self, name: str, data: bytes, session: Session) -> None:
        path = self.store.texts.postings_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, data, kind="postings", temp_tag=session.tag, durable=False)

    def publish_together(self, change: Change) -> None:
        """Publish a change, durable on return, together with those that other threads of the session want meanwhile.

        All records, then all heads, then one transaction of the catalog.
        """
        if self._thread.is_publishing:
            self._publish_group([change])
        else:
            session = self._session()
            session.waiting.append(change)
            with session.turn:
                while not change.is_done:  # unless the thread before took it along; after others of the same record
                    self._publish_group(_distinct(session.waiting))
        if change.error is not None:
            raise change.error

    def _publish_group(self, group: Sequence[Change]) -> None:
        """Errors are those of the change whose file cannot be made, or of all where the disk is at fault."""
        try:
            with self.publishing():
                records = self._publish_files("record", group)
                self._publish_files("head", group)
                heads = [change.head[0] for change in group if change.head is not None and change.error is None]
                if heads:
                    self.commit(functools.partial(self._enter, heads), records)
                else:
                    self._session().pending.update(records)
        except BaseException as error:
            for change in group:
                change.error = change.error or error
            raise
        finally:
            for change in group:
                change.is_done = True

    def _enter(self, paths: Iterable[Path], catalog: Catalog) -> None:
        for path in paths:
            self.keeper.enter(path, catalog)

    def _publish_files(self, kind: str, group: Iterable[Change]) -> list[str]:
        """The records or heads of a group that are not there yet; the ids of the snapshots that these are of."""
        files, identities = [], []
        for change in group:
            try:
                if change.error is not None:
                    continue
                if kind == "record":
                    path, made = self.store.record_path(change.identity), change.record()
                elif change.head is not None:
                    path, made = change.head[0], change.head[1]()
                else:
                    continue
                make_folder(path.parent)
                if made is None:
                    fsync_folder(path.parent)
                else:
                    files.append((path, made))
                    identities.append(change.identity)
            except (RwkvStreamError, OSError) as error:
                change.error = error
        if files:
            self._note_catalogued(False)
            publish_all(files, kind=kind, temp_tag=self._session().tag)
        return identities

    def publish_record(self, identity: str, data: bytes, kind: str) -> None:
        """A record, which comes into the catalog with the next ref, or at the end of the session."""
        self.publish(self.store.record_path(identity), data, kind)
        self._session().pending.add(identity)

    def commit(self, change: Callable[[Catalog], None] | None = None, records: Iterable[str] = ()) -> None:
        """Bring the records published so far, these, and a change, into the catalog; inside `publishing`."""
        assert self._thread.is_publishing
        session = self._session()
        self._note_catalogued(False)
        self.keeper.change({*session.pending, *records}, change)
        session.pending.clear()

    def note_changing(self) -> None:
        """Note that the catalog may differ from the files until `publishing` ends well."""
        assert self._thread.is_publishing
        self._note_catalogued(False)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """A block during which nothing is published, as far as this user can see to that."""
        return self.publishing() if self.writable else contextlib.nullcontext()

    def _note_catalogued(self, is_catalogued: bool) -> None:
        """Note, in the lock file too, whether the catalog has all that this session published.

        The locks of a process that is killed end in any order: who gets this one may find the session's still held.
        """
        os.truncate(self.store.locks / "publish", 0 if is_catalogued else 1)
        session = self.current
        if session is not None:
            session.is_catalogued = is_catalogued

    # ---- asking ----

    @contextlib.contextmanager
    def catalog(self) -> Iterator[Catalog]:
        """The catalog, made anew where that is needed; in memory where it cannot be written."""
        self._commit_pending()
        with contextlib.ExitStack() as stack:
            try:
                catalog = stack.enter_context(self._catalog())
            except CatalogDamagedError as error:
                self.mend(error)
                catalog = stack.enter_context(self._catalog())
            yield catalog

    def ask(self, work: Callable[[Catalog], T]) -> T:
        """What the catalog answers; asked once more, made anew, if it turns out to be damaged."""
        session = self.current
        try:
            if session is not None and not self._is_indexed_in_memory:
                self._commit_pending()  # before the lock: who publishes may ask
                with session.asking:
                    return work(self._kept_open(session))
            with self.catalog() as catalog:
                return work(catalog)
        except CatalogDamagedError as error:
            self.mend(error)
        with self.catalog() as catalog:
            return work(catalog)

    def _commit_pending(self) -> None:
        session = self.current
        if session is not None and session.pending:
            with self.publishing():
                self.commit()

    def _let_go(self) -> None:
        """Close the catalog of the session, which is about to be made anew."""
        session = self.current
        if session is not None:
            with session.asking:
                session.close_catalog()

    def _kept_open(self, session: Session) -> Catalog:
        """The catalog by the connection of a session; by a new one where another file took its place."""
        try:
            found = self.store.catalog.stat().st_ino
        except FileNotFoundError:
            found = 0
        if session.catalog is None or session.catalog_file != found:
            session.close_catalog()
            session.catalog, session.catalog_file = session.opened.enter_context(self._catalog()), found
        return session.catalog

    def mend(self, reason: CatalogDamagedError) -> None:
        """Make the catalog anew; where user or disk do not let us, make one in memory for every use from now on."""
        if self.writable:
            try:
                with self.publishing():
                    self.keeper.rebuild()
                return
            except OSError as error:
                log.warning("the catalog of store '%s' cannot be written: %s", self.store.path, error)
        log.info("indexing store '%s' in memory: %s", self.store.path, reason)
        self._is_indexed_in_memory = True

    def _catalog(self) -> contextlib.AbstractContextManager[Catalog]:
        if self._is_indexed_in_memory or (not self.writable and self._has_dead_writers()):
            return self.keeper.in_memory()
        return self.keeper.open(writable=self.writable)

    # ---- dead writers ----

    def clear_up(self) -> None:
        """Clear up behind writers that died, if there are any."""
        make_folder(self.store.markers)  # a copy of a store may lack its empty folders
        if self._has_dead_writers():
            with self.publishing():
                pass

    def _has_dead_writers(self) -> bool:
        with dead_writers(self.store.markers) as dead:
            return bool(dead)

    def _recover(self) -> None:
        """Remove the temp files of writers that died, and enter what the catalog lacks of what they published."""
        with dead_writers(self.store.markers) as dead:
            if not dead:
                return
            log.info("clearing up in store '%s' behind %d writers that died", self.store.path, len(dead))
            starts = tuple(f"{TEMP_PREFIX}{tag}-" for tag in dead)
            for path in temps(self.store.path):
                if path.name.startswith(starts):
                    remove(path)
            failpoint("recover.swept")
            self.keeper.update()
            for tag in dead:
                (self.store.markers / tag).unlink()
            failpoint("recover.done")


def _distinct(waiting: deque[Change]) -> list[Change]:
    """Take those that wait, but for a second one of the same record: what it finds is what the first one leaves."""
    taken: dict[str, Change] = {}
    for change in [waiting.popleft() for _ in range(len(waiting))]:
        if change.identity in taken:
            waiting.append(change)
        else:
            taken[change.identity] = change
    return list(taken.values())


def create(store: StoreFiles) -> None:
    """Make a store in an empty folder, or in none; UsageError where there is something else."""
    if store.path.exists():
        if not store.path.is_dir():
            raise UsageError(f"making store '{store.path}': expected nothing there, found a file")
        found = {path.name for path in store.path.iterdir() if not path.name.startswith(TEMP_PREFIX)}
        theirs = found - store.own_names()
        if theirs:
            raise UsageError(f"making store '{store.path}': expected an empty folder, found '{min(theirs)}' in it")
    make_folder(store.locks)
    with flocked(store.locks / "create", fcntl.LOCK_EX, wait=True):
        if store.format.exists():
            return
        for path in store.path.glob(f"{TEMP_PREFIX}*"):  # of a process that died here
            path.unlink()
        data = (store.objects.folder, store.texts.folder)
        for folder in (store.markers, *data, store.records, store.heads, store.tags):
            make_folder(folder)
        publish(store.format, encode_format(), kind="format")
