"""One `Store` used by many threads: nothing that was reported is lost, and no lock is skipped.

`Watch` stands beside the locks: whoever holds one that another thread holds, or changes a file or the catalog without
the lock for it, is found out. CI runs each test for a moment; `--all-moments` for a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_snapshots import CHUNK, MODEL, fake, put, read

from rwkv_stream.errors import NotFoundError, StoreLockedError, UsageError
from rwkv_stream.store import Store, locks, objects, sessions
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.layout import temps

SNAPSHOTS = 12  # of a reading
SHARED = "shared.txt"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def duration_s(request: pytest.FixtureRequest) -> float:
    return 60.0 if request.config.getoption("--all-moments") else 1.5


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


class Watch:
    """Knows who holds which lock of one store, from what is done under them."""

    def __init__(self, store: Store, patch: pytest.MonkeyPatch) -> None:
        self.store = store
        self.guard = threading.Lock()
        self.holders: dict[str, list[tuple[bool, int, str]]] = {}  # lock → (alone, thread, tag of its session)
        self.waits: Counter[str] = Counter()
        real_publish, real_changing = sessions.publish, Catalog.changing
        real_flocked, real_passing = locks.flocked, locks.passing

        @contextlib.contextmanager
        def flocked(path: Path, operation: int, **options: Any) -> Iterator[None]:
            with self.guard:
                self.waits[path.name.partition("-")[0]] += path.name in self.holders
            with real_flocked(path, operation, **options), self._held(path.name, operation == fcntl.LOCK_EX):
                yield

        @contextlib.contextmanager
        def passing(path: Path, **options: Any) -> Iterator[None]:
            with self.guard:
                self.waits[path.name.partition("-")[0]] += path.name in self.holders
            with real_passing(path, **options), self._held(path.name, True):
                yield

        def publish(path: Path, data: bytes, *, kind: str, temp_tag: str) -> None:
            if kind != "object":
                self._assert_mine("publish")
            if path.parent == store._files.heads:
                tag = self._tag()
                assert self._holders(f"head-{path.name}") == [tag], f"{kind} without its lock"
            assert temp_tag == self._tag()
            real_publish(path, data, kind=kind, temp_tag=temp_tag)

        @contextlib.contextmanager
        def changing(catalog: Catalog) -> Iterator[None]:
            self._assert_mine("publish")
            with real_changing(catalog):
                yield
                self._assert_mine("publish")

        patch.setattr(sessions, "flocked", flocked)
        patch.setattr(sessions, "passing", passing)
        for module in (sessions, objects):
            patch.setattr(module, "publish", publish)
        patch.setattr(Catalog, "changing", changing)

    def _tag(self) -> str:
        session = self.store._sessions.current
        return session.tag if session is not None else ""

    @contextlib.contextmanager
    def _held(self, lock: str, alone: bool) -> Iterator[None]:
        mine = (alone, threading.get_ident(), self._tag())
        with self.guard:
            others = self.holders.setdefault(lock, [])
            assert not others or not (alone or others[0][0]), f"{lock} is held by {others}"
            others.append(mine)
        try:
            yield
        finally:
            with self.guard:
                self.holders[lock].remove(mine)
                if not self.holders[lock]:
                    del self.holders[lock]

    def _assert_mine(self, lock: str) -> None:
        with self.guard:
            assert [thread for _, thread, _ in self.holders.get(lock, [])] == [threading.get_ident()], f"no {lock}"

    def _holders(self, lock: str) -> list[str]:
        with self.guard:
            return [tag for _, _, tag in self.holders.get(lock, [])]


class Worker:
    """One thread: what it has been told is kept, and what it does next."""

    def __init__(self, number: int, store: Store) -> None:
        self.number, self.store, self.rng = number, store, random.Random(number)
        self.heads: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.kept: set[str] = set()
        self.done: Counter[str] = Counter()

    def run(self, until: float) -> None:
        works = (
            [self.ingest]
            if self.number == 0
            else [self.write, self.share, self.name, self.remove, self.look, self.tidy]
        )
        while time.monotonic() < until:
            work = self.rng.choice(works)
            work()
            self.done[work.__name__] += 1

    def ingest(self) -> None:
        """A reading, as `reading` does it: the snapshots are stored on a thread that takes part in the session."""
        document = f"book-{self.done['ingest']}.txt"
        with self.store.writing(document, MODEL), ThreadPoolExecutor(1) as publisher:
            parent: str | None = None
            for i in range(1, SNAPSHOTS + 1):
                context = contextvars.copy_context()
                parent = publisher.submit(context.run, self.step, document, document, i, parent).result()
                assert [s.tokens for s in self.store.get(document).ancestors()] == [
                    CHUNK * n for n in range(i - 1, 0, -1)
                ]

    def step(self, document: str, text: str, i: int, parent: str | None) -> str:
        made = put(self.store, fake(i * CHUNK, text, document=document, parent=parent))
        self.kept.add(made.id)
        self.store.move_head(document, MODEL, made.id)
        self.heads[document] = made.id
        return made.id

    def write(self) -> None:
        """Every step a session of its own."""
        document, parent = f"dir{self.number}/{self.done['write']}.txt", None
        for i in range(1, self.rng.randint(2, 5)):
            parent = self.step(document, document, i, parent)

    def share(self) -> None:
        """Two writers of one document: one at a time, and the other is told or waits."""
        try:
            with self.store.writing(SHARED, MODEL, wait=self.rng.random() < 0.5):
                head = self.store.head(SHARED, MODEL)
                tokens = head.tokens if head is not None else 0
                made = put(
                    self.store,
                    fake(tokens + CHUNK, SHARED, document=SHARED, parent=head.id if head is not None else None),
                )
                time.sleep(0.001)
                self.store.move_head(SHARED, MODEL, made.id)
                assert self.store.head(SHARED, MODEL) == made, "somebody else moved it"
                self.kept.add(made.id)
                self.done["shared steps"] += 1
        except StoreLockedError:
            self.done["told that it is locked"] += 1

    def name(self) -> None:
        name = f"tag {self.number} {self.rng.randrange(5)}"
        if name in self.tags:
            with pytest.raises(UsageError):
                self.store.check_tag(name)
            self.store.untag(name)
            del self.tags[name]
        elif self.kept:
            self.store.check_tag(name)
            identity = self.rng.choice(sorted(self.kept))
            self.store.tag(name, identity)
            self.tags[name] = identity

    def remove(self) -> None:
        """The newest of a document: its head goes to the one before."""
        document = self.rng.choice(sorted(self.heads)) if self.heads else None
        if document is None or self.heads[document] in self.tags.values():
            return
        newest = self.store.get(document)
        before = next(newest.ancestors(), None)
        self.store.rm(newest.id)
        self.kept.discard(newest.id)
        if before is None:
            del self.heads[document]
        else:
            self.heads[document] = before.id

    def look(self) -> None:
        """What others do beside it never shows: lists are whole, readings only grow."""
        for document, snapshot in list(self.heads.items())[-3:]:
            assert self.store.get(document).id == snapshot
            assert snapshot in {listed.id for listed in self.store.list(document)}
        with contextlib.suppress(NotFoundError):
            before = self.store.get(SHARED)
            assert before.tokens <= self.store.get(SHARED).tokens
            assert before.load()[0].digest() == before.state_digest
        assert dict(self.store.tags()).items() >= self.tags.items()

    def tidy(self) -> None:
        """What needs the store for itself is told that others write, or does no harm."""
        work: Callable[[], object] = self.rng.choice([self.store.rebuild, self.store.verify, self.store.prune])
        if self.done["tidy"] % 5 == 0:
            with contextlib.suppress(StoreLockedError):
                work()


@pytest.mark.parametrize("n_threads", [2, 8])
def test_many_threads(store: Store, monkeypatch: pytest.MonkeyPatch, duration_s: float, n_threads: int) -> None:
    watch = Watch(store, monkeypatch)
    workers = [Worker(number, store) for number in range(n_threads)]
    until = time.monotonic() + duration_s
    with ThreadPoolExecutor(n_threads) as pool:
        for ended in [pool.submit(worker.run, until) for worker in workers]:
            ended.result()
    done = sum((worker.done for worker in workers), Counter[str]())
    print(n_threads, "threads:", dict(done), "found a lock taken:", dict(watch.waits))
    assert watch.holders == {}
    assert store.verify(read_data=True).damaged == []
    assert list((store.path / "locks" / "writers").iterdir()) == []
    assert list(temps(store.path)) == []
    assert dict(store.tags()) == {name: at for worker in workers for name, at in worker.tags.items()}
    heads = {document: at for document, _, at in store.heads()}
    shared = heads.pop(SHARED, None)
    assert heads == {document: at for worker in workers for document, at in worker.heads.items()}
    if shared is not None:
        assert store.get(shared).tokens == CHUNK * done["shared steps"], "no step on another's shoulders"
    listed = {entry.id for entry in store.list()}
    assert listed >= {identity for worker in workers for identity in worker.kept}
    assert done["ingest"] > 0


def test_threads_write_one_document_after_the_other(store: Store) -> None:
    with store.writing("book.txt", MODEL), ThreadPoolExecutor(1) as other:
        with pytest.raises(StoreLockedError, match="only writer"):
            other.submit(read, store, n=1).result()
        with pytest.raises(StoreLockedError, match="clearing up"):
            other.submit(store.prune).result()
        assert other.submit(read, store, "another.txt", n=1).result() != []
    assert read(store, n=1) != []


def test_a_thread_in_a_copy_of_the_context_takes_part(store: Store) -> None:
    with store.writing("book.txt", MODEL), ThreadPoolExecutor(1) as other:
        other.submit(contextvars.copy_context().run, read, store, n=2).result()
        assert len(list((store.path / "locks" / "writers").iterdir())) == 1
        assert store.get("book.txt").tokens == 2 * CHUNK


def test_a_context_that_outlives_a_session_has_one_of_its_own(store: Store) -> None:
    with store.writing("book.txt", MODEL):
        context = contextvars.copy_context()
    with store.writing("book.txt", MODEL), ThreadPoolExecutor(1) as other, pytest.raises(StoreLockedError):
        other.submit(context.run, read, store, n=1).result()


def test_tasks_of_one_thread_have_sessions_of_their_own(store: Store) -> None:
    told: list[str] = []

    async def write(name: str, document: str) -> None:
        try:
            with store.writing(document, MODEL):
                await asyncio.sleep(0.05)
                await asyncio.to_thread(read, store, document, n=1)
        except StoreLockedError:
            told.append(name)

    async def both() -> None:
        await asyncio.gather(write("one", "book.txt"), write("two", "book.txt"), write("three", "another.txt"))

    asyncio.run(both())
    assert told == ["two"]
    assert {document for document, _, _ in store.heads()} == {"book.txt", "another.txt"}


def test_a_list_is_drawn_by_one_thread_after_the_other(store: Store) -> None:
    made = read(store, n=5)
    listed = store.list()
    found = [next(listed).id]
    with ThreadPoolExecutor(1) as other:
        found += [entry.id for entry in other.submit(lambda: [next(listed), next(listed)]).result()]
    assert [*found, *(entry.id for entry in listed)] == [snapshot.id for snapshot in made]
