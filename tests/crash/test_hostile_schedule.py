"""Several processes at work in one store at once, some of them killed: nothing that was promised is lost.

Each process notes in one common log what it is about to do and what it has been told is durable. In the end the log is
held against the store. The races that a schedule meets too rarely are staged one by one below it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_snapshots import CHUNK, MODEL, fake, fake_state, in_child, library, put, read, start_child
from kills import assert_nothing_stray, assert_sound, hold, killed, stop_at, wait_until

from rwkv_stream.errors import NotFoundError, SnapshotError, StoreLockedError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.store import Store, retention, sessions
from rwkv_stream.store.layout import StoreFiles, head_key
from rwkv_stream.store.records import Snapshot
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.transfer import Merge

pytestmark = pytest.mark.crash

CI_S, ALL_S = 5.0, 30.0
N_WORKERS = 4
N_SHARED, N_OWN = 2, 2  # snapshots that all documents begin with, and that follow in each edition of one
DOCUMENTS = ("one.txt", "two.txt", "three.txt")


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not lose what was written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


# ---- the log ----


class Log:
    """Events of all processes in one order, each written whole before the call returns."""

    def __init__(self, path: Path, worker: int) -> None:
        self.path, self.worker = path, worker

    def note(self, event: str, *what: object) -> None:
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps([self.worker, event, *what]) + "\n")

    def events(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


# ---- what a process does ----


class Worker:
    def __init__(self, path: Path, log: Log, seed: object, export: bytes) -> None:
        self.path, self.log, self.export = path, log, export
        self.rng = random.Random(repr(seed))
        self.tags: list[str] = []
        self.n_tags = 0

    def work(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        operations = {
            **{self.ingest: 6, self.fork: 3, self.remove: 3, self.untag: 1, self.move_tag: 1},
            **{
                self.prune: 3,
                self.verify: 1,
                self.list: 1,
                self.load: 2,
                self.import_: 1,
                self.rebuild: 1,
                self.thin: 3,
            },
        }
        while time.monotonic() < end:
            self.store = Store(self.path, wait=self.rng.random() < 0.5)
            [operation] = self.rng.choices([*operations], [*operations.values()])
            try:
                operation()
                self.log.note("done", operation.__name__)
            except StoreLockedError:
                self.log.note("locked", operation.__name__)

    def ingest(self) -> None:
        document, edition = self.rng.choice(DOCUMENTS), self.rng.choice("ab")
        with self.store.writing(document, MODEL):
            self.log.note("reading", document)
            parent = None
            for n in range(1, self.rng.randint(1, N_SHARED + N_OWN) + 1):
                text = "shared" if n <= N_SHARED else f"{document} {edition}"
                made = put(self.store, fake(CHUNK * n, text, document=document, parent=parent))
                try:
                    self.store.move_head(document, MODEL, made.id)
                except NotFoundError:  # removed by another in between
                    return
                self.log.note("read", document, made.id)
                parent = made.id

    def fork(self) -> None:
        with self.store.writing():
            start = self.some_snapshot()
            if start is None:
                return
            self.n_tags += 1
            tag = f"{self.log.worker}-{self.n_tags}"
            asked = fake(5, tag, document=tag, start=start.id, start_digest=start.state_digest, chunk=5, how="ask")
            made = put(self.store, asked)
            try:
                self.store.tag(tag, made.id)
            except NotFoundError:  # removed by another in between
                return
            self.log.note("tagged", tag, made.id)
            self.tags.append(tag)

    def move_tag(self) -> None:
        snapshot = self.some_snapshot()
        if snapshot is None or not self.tags:
            return
        tag = self.rng.choice(self.tags)
        self.log.note("moving", tag)
        with contextlib.suppress(NotFoundError):
            self.store.tag(tag, snapshot.id, move=True)
            self.log.note("tagged", tag, snapshot.id)

    def untag(self) -> None:
        if self.tags:
            tag = self.rng.choice(self.tags)
            self.log.note("moving", tag)
            self.store.untag(tag)
            self.tags.remove(tag)

    def remove(self) -> None:
        snapshot = self.some_snapshot()
        if snapshot is None:
            return
        self.log.note("removing", snapshot.id)
        try:
            self.store.rm(snapshot.id)
        except (NotFoundError, UsageError, StoreLockedError) as error:  # gone, tagged, or its document is written to
            self.log.note("not removed", snapshot.id)
            if isinstance(error, StoreLockedError):
                raise
        else:
            self.log.note("removed", snapshot.id)

    def thin(self) -> None:
        """One of the past of a document that others do not have, too."""
        document = self.rng.choice(DOCUMENTS)
        with self.store.writing(document, MODEL):
            head = self.store.head(document, MODEL)
            past = [] if head is None else [*head.ancestors()]
            if past:
                identity = self.rng.choice(past).id
                self.log.note("removing", identity)
                gone = retention.drop(self.store._sessions, [identity], but_of=(document, MODEL))
                self.log.note("removed" if gone else "not removed", identity)

    def prune(self) -> None:
        self.store.prune(dry_run=self.rng.random() < 0.1)

    def verify(self) -> None:
        damaged = self.store.verify(read_data=self.rng.random() < 0.5).damaged
        assert damaged == []

    def rebuild(self) -> None:
        self.store.rebuild()

    def list(self) -> None:
        for listed in self.store.list(self.rng.choice([None, *DOCUMENTS])):
            assert listed.tokens > 0

    def load(self) -> None:
        """What is loaded is right; a snapshot that cannot be loaded was removed just now."""
        snapshot = self.some_snapshot()
        if snapshot is None:
            return
        try:
            assert snapshot.state().digest() == fake_state(int(snapshot.chain[:8], 16)).digest()
        except (SnapshotError, NotFoundError):
            with pytest.raises(NotFoundError):
                Store(self.path).get(snapshot.id)

    def import_(self) -> None:
        """Of documents that nobody else writes to; one begins as all do."""
        self.log.note("importing")
        self.store.import_(io.BytesIO(self.export))
        self.log.note("imported")

    def some_snapshot(self) -> Snapshot | None:
        with contextlib.suppress(IndexError, NotFoundError):
            if self.rng.random() < 0.5:
                return self.store.head(self.rng.choice(DOCUMENTS), MODEL)
            return self.store.get(self.rng.choice(list(self.store.list())).id)
        return None


# ---- the schedule ----


def export_of_others(path: Path) -> bytes:
    store = Store(path, create=True)
    read(store, "imported.txt", "shared", n=N_SHARED)
    read(store, "imported too.txt", "another text", n=2)
    file = io.BytesIO()
    store.export(["imported.txt", "imported too.txt"], file)
    return file.getvalue()


@pytest.mark.parametrize("is_killing", [False, True], ids=["all live", "some are killed"])
def test_hostile_schedule(store: Store, tmp_path: Path, is_killing: bool, request: pytest.FixtureRequest) -> None:
    seconds = ALL_S if request.config.getoption("--all-moments") else CI_S
    export = export_of_others(tmp_path / "other.store")
    rng = random.Random(is_killing)
    log_path = tmp_path / "log"
    end = time.monotonic() + seconds
    children: list[int] = []
    n_started = n_killed = 0
    try:
        while time.monotonic() < end or children:
            while len(children) < N_WORKERS and (left := end - time.monotonic()) > 0:
                worker = Worker(store.path, Log(log_path, n_started), (is_killing, n_started), export)
                children.append(start_child(lambda worker=worker, left=left: worker.work(left)))  # type: ignore[misc]
                n_started += 1
            time.sleep(rng.uniform(0.05, 0.4))
            if is_killing and children and time.monotonic() < end:
                os.kill(rng.choice(children), signal.SIGKILL)
                n_killed += 1
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.remove(pid)
                    assert killed(status) <= is_killing
            assert time.monotonic() < end + 60, "some wait for each other"
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    events = Log(log_path, -1).events()
    done = [event for _, event, *_ in events]
    print(f"{len(events)} events, {done.count('done')} operations, {done.count('locked')} refused, {n_killed} killed")
    assert_sound(store.path)
    assert_promises_kept(store.path, events)
    Store(store.path).prune()
    assert_sound(store.path)
    assert_nothing_stray(store.path)
    assert_promises_kept(store.path, events)


def assert_promises_kept(path: Path, events: list[list[Any]]) -> None:
    """What was reported durable, is reached by a head or tag and was not removed since, is there and loads."""
    store = Store(path)
    removals = open_removals(events)
    promised = 0
    for document, ids in last_readings(events).items():
        head = store.head(document, MODEL)
        lineage = {s.id for s in (head, *store.ancestors(head))} if head is not None else set()
        for identity, at in ids.items():
            if removals.get(identity, -1) < at:
                assert identity in lineage, f"{document} lost {identity}"
                promised += 1
    tags = dict(store.tags())
    for tag, (identity, _) in last_tags(events).items():
        assert tags.get(tag) == identity, f"tag {tag} is lost"
        promised += 1
    assert promised > 0
    for listed in store.list():
        snapshot = store.get(listed.id)
        assert snapshot.state().digest() == fake_state(int(snapshot.chain[:8], 16)).digest()


def open_removals(events: list[list[Any]]) -> dict[str, float]:
    """Until which event a snapshot may have been removed; by one that was killed, at any time after."""
    until: dict[str, float] = {}
    under_way: dict[int, str] = {}
    for i, (worker, event, *what) in enumerate(events):
        if event == "removing":
            under_way[worker] = what[0]
        elif event in ("removed", "not removed"):
            identity = under_way.pop(worker)
            if event == "removed":
                until[identity] = i
    return until | dict.fromkeys(under_way.values(), float("inf"))


def last_readings(events: list[list[Any]]) -> dict[str, dict[str, int]]:
    """Of each document the snapshots of its last reading, with the event before which that reading began.

    A document's readings follow each other; one that was killed before its first snapshot leaves open where the head
    stands.
    """
    last: dict[str, dict[str, int]] = {}
    began: dict[str, int] = {}
    for i, (_, event, *what) in enumerate(events):
        if event == "reading":
            began[what[0]] = i
            last[what[0]] = {}
        elif event == "read":
            last[what[0]][what[1]] = began[what[0]]
    return last


def last_tags(events: list[list[Any]]) -> dict[str, tuple[str, int]]:
    last: dict[str, tuple[str, int]] = {}
    for i, (_, event, *what) in enumerate(events):
        if event == "tagged":
            last[what[0]] = what[1], i
        elif event == "moving":
            last.pop(what[0], None)
    return last


# ---- races, staged ----


def after(function: str, stopped: Path, *, call: int = 1) -> None:
    """From now on, let this process wait at the end of the `call`-th call of a method of a store's files."""
    real, calls = getattr(StoreFiles, function), [0]

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == call:
            hold(stopped)
        return result

    setattr(StoreFiles, function, patched)


@contextlib.contextmanager
def stopping(stopped: Path, stop: Callable[[], None], work: Callable[[], object]) -> Iterator[int]:
    """A child does `work` and has stopped where `stop` lets it; it goes on when the block deletes `stopped`, and ends
    well."""

    def stop_and_work() -> None:
        stop()
        work()

    pid = start_child(stop_and_work)
    try:
        wait_until(stopped.exists)
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        stopped.unlink(missing_ok=True)
        status = os.waitpid(pid, 0)[1]
    killed(status)


def superseded(store: Store) -> Snapshot:
    """A snapshot that a prune would remove, with its object there."""
    made = read(store, "a.txt", "a first edition", n=1)
    read(store, "a.txt", "another edition", n=1)
    return made[0]


def read_again(store: Store, wait: bool = False) -> None:
    """The text of the superseded snapshot, under another name."""
    with store.writing("b.txt", MODEL, wait=wait):
        made = put(store, fake(CHUNK, "a first edition", document="b.txt"))
        store.move_head("b.txt", MODEL, made.id)


def assert_all_there(store: Store, snapshot: Snapshot) -> None:
    assert store.head("b.txt", MODEL).id == snapshot.id  # type: ignore[union-attr]
    assert store.get("b.txt").state().digest() == snapshot.state_digest
    store.prune()
    assert_sound(store.path)
    assert_nothing_stray(store.path)


def test_a_prune_waits_for_a_writer_that_found_its_object_there(store: Store, tmp_path: Path) -> None:
    snapshot, stopped = superseded(store), tmp_path / "stopped"
    with stopping(stopped, lambda: after("has_state", stopped), lambda: read_again(Store(store.path))):
        with pytest.raises(StoreLockedError):
            store.prune()
        waiting = start_child(lambda: Store(store.path, wait=True).prune())
        time.sleep(0.2)
        assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    assert os.waitpid(waiting, 0)[1] == 0
    assert_all_there(store, snapshot)


@pytest.mark.parametrize("is_killed", [False, True], ids=["goes on", "is killed"])
@pytest.mark.parametrize(
    "name", ["rebuild.done", "prune.uncatalogued", "prune.record.removed", "prune.object.removed", "prune.swept"]
)
def test_a_writer_waits_for_a_prune(store: Store, tmp_path: Path, name: str, is_killed: bool) -> None:
    """Whatever is gone already is made again, what is still there is found."""
    snapshot, stopped = superseded(store), tmp_path / "stopped"
    with stopping(stopped, lambda: stop_at(name, stopped), lambda: Store(store.path).prune()) as pid:
        with pytest.raises(StoreLockedError):
            read_again(Store(store.path))
        waiting = start_child(lambda: read_again(Store(store.path), wait=True))
        time.sleep(0.1)
        assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
        if is_killed:
            os.kill(pid, signal.SIGKILL)
    assert os.waitpid(waiting, 0)[1] == 0
    assert_all_there(store, snapshot)


def test_a_snapshot_removed_behind_a_writer_that_found_it_there(store: Store, tmp_path: Path) -> None:
    snapshot, stopped = superseded(store), tmp_path / "stopped"
    with stopping(stopped, lambda: after("has_state", stopped), lambda: read_again(Store(store.path))):
        store.rm(snapshot.id)
    assert_all_there(store, snapshot)


@pytest.mark.parametrize("name", ["_head", "_tag"])
def test_a_snapshot_removed_behind_an_import(store: Store, tmp_path: Path, name: str) -> None:
    """Between its record and the names that are to lead to it."""
    other, file, stopped = Store(tmp_path / "b.store", create=True), io.BytesIO(), tmp_path / "stopped"
    made = read(other, n=2)
    other.tag("newest", made[1].id)
    other.export(["book.txt"], file)
    file.seek(0)

    def stop() -> None:
        real = getattr(Merge, name)
        setattr(Merge, name, lambda self, ref: (hold(stopped), real(self, ref))[1])

    with stopping(stopped, stop, lambda: Store(store.path).import_(file)), contextlib.suppress(StoreLockedError):
        store.rm(made[1].id)
    assert_sound(store.path)


def test_an_import_and_a_removal_do_not_wait_for_each_other(store: Store, tmp_path: Path) -> None:
    """Both need the locks of two heads, and wait for them."""
    names = sorted(("one.txt", "two.txt", "three.txt"), key=lambda name: head_key(name, MODEL))
    assert names != sorted(names), "their order by name is another than by lock"
    [made] = read(store, names[0], n=1)
    for name in names[1:]:
        store.move_head(name, MODEL, made.id)
    file = io.BytesIO()
    store.export([made.id], file)
    file.seek(0)

    def slowly(work: Callable[[Store], object]) -> int:
        def patched_work() -> None:
            real = Sessions.held

            @contextlib.contextmanager
            def held(*args: Any) -> Iterator[None]:
                with real(*args):
                    time.sleep(0.2)
                    yield

            Sessions.held = held  # type: ignore[method-assign]
            work(Store(store.path, wait=True))

        return start_child(patched_work)

    pids = [slowly(lambda store: store.import_(file)), slowly(lambda store: store.rm(made.id))]
    end = time.monotonic() + 10
    while pids and time.monotonic() < end:
        ended, status = os.waitpid(pids[0], os.WNOHANG)
        if ended:
            assert status == 0
            pids.pop(0)
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not pids, "they waited for each other"
    assert_sound(store.path)


@pytest.mark.parametrize("name", ["record.renamed", "head.renamed", "tag.renamed"])
def test_what_a_dead_writer_published_is_seen_while_another_looks_for_the_dead(
    store: Store, tmp_path: Path, name: str
) -> None:
    """Whoever opens the store looks whether markers are held; a writer must not take that for a sign of life."""
    made, stopped = read(store, n=3), tmp_path / "stopped"

    def die() -> None:
        if name.startswith("tag"):
            store.tag("here", made[1].id)
        else:
            with store.writing("copy.txt", MODEL):
                put(store, fake(CHUNK, "more", document="copy.txt"))
                store.move_head("copy.txt", MODEL, made[1].id)

    assert killed(in_child(die, **{FAILPOINT_VARIABLE: name}))

    def stop() -> None:
        real = sessions.dead_writers

        @contextlib.contextmanager
        def dead_writers(folder: Path) -> Iterator[set[str]]:
            sessions.dead_writers = real
            with real(folder) as dead:
                hold(stopped)
                yield dead

        sessions.dead_writers = dead_writers

    with stopping(stopped, stop, lambda: Store(store.path)), contextlib.suppress(UsageError):
        Store(store.path).rm(made[1].id)  # but for a tag
    assert_sound(store.path)


@pytest.mark.parametrize("name", ["head.renamed", "tag.renamed"])
def test_who_waits_for_one_that_is_killed_sees_what_it_published(store: Store, tmp_path: Path, name: str) -> None:
    """The locks of a killed process end one after the other: who gets the one for publishing finds the marker of the
    dead still held every other time."""
    stopped = tmp_path / "stopped"

    def publish(label: str, snapshot: str) -> None:
        if name.startswith("tag"):
            store.tag(label, snapshot)
        else:
            store.move_head(label, MODEL, snapshot)

    def remove(snapshot: str) -> None:
        with contextlib.suppress(UsageError):  # tagged
            Store(store.path, wait=True).rm(snapshot)  # for the head's lock, which may end after that of publishing

    for i in range(10):
        snapshot = read(store, n=2)[1].id
        with stopping(stopped, lambda: stop_at(name, stopped), partial(publish, f"copy {i}", snapshot)) as pid:
            waiting = start_child(partial(remove, snapshot))
            time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
        assert os.waitpid(waiting, 0)[1] == 0
        assert_sound(store.path)


# ---- locks of the dead ----


def read_new(path: Path) -> None:
    read(Store(path, create=True), "new.txt", "a new text", n=2)


def prune(path: Path) -> None:
    Store(path).prune()


def import_the_same(path: Path) -> None:
    store, file = Store(path), io.BytesIO()
    store.export(["book.txt"], file)
    file.seek(0)
    store.import_(file)


@pytest.mark.parametrize(
    ("lock", "name", "work", "then"),
    [
        ("create", "format.written", read_new, read_new),
        ("store", "object.written", read_new, prune),
        ("store", "prune.swept", prune, read_new),
        ("store", "repair.begin", Store.repair, read_new),
        ("head-*", "head.written", read_new, read_new),
        ("head-*", "import.head.written", import_the_same, import_the_same),
        ("publish", "record.renamed", read_new, prune),
        ("publish", "catalog.written", read_new, read_new),
        ("writers/*", "writer.marked", read_new, read_new),
        ("writers/*", "recover.swept", read_new, read_new),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_locks_end_with_who_held_them(
    tmp_path: Path, lock: str, name: str, work: Callable[[Path], object], then: Callable[[Path], object]
) -> None:
    """SIGKILL while a lock is held: the next to come waits for nothing."""
    path, stopped = tmp_path / "a.store", tmp_path / "stopped"
    if lock != "create":
        library(path)
    if name.startswith("recover."):
        assert killed(in_child(lambda: work(path), **{FAILPOINT_VARIABLE: "record.renamed"}))
    with stopping(stopped, lambda: stop_at(name, stopped), lambda: work(path)) as pid:
        assert any(is_held(file) for file in (path / "locks").glob(lock))
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert not any(is_held(file) for file in (path / "locks").glob(lock))
        started = time.monotonic()
        assert in_child(lambda: then(path)) == 0
        assert time.monotonic() - started < 5
    assert_sound(path)


def test_temp_files_of_a_live_writer_stay(store: Store) -> None:
    """Only those of the dead are swept."""
    with store.writing():
        session = store._sessions.current
        assert session is not None
        mine = store.path / "refs" / "heads" / f"{TEMP_PREFIX}{session.tag}-1"
        mine.touch()
        assert killed(in_child(lambda: read_new(store.path), **{FAILPOINT_VARIABLE: "object.written"}))
        other = Store(store.path)
        assert list(store.path.rglob(f"{TEMP_PREFIX}*")) == [mine]
        assert other.verify().damaged == []
        mine.unlink()
    assert_sound(store.path)


def is_held(file: Path) -> bool:
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
