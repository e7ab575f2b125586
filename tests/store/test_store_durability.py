"""What a power cut leaves: after every single write, sync, rename and removal, with all that was not synced lost."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_snapshots import CHUNK, MODEL, digest, fake, fake_hidden, fake_state, library, put, read, told
from recording_filesystem import UNSEEN, Disk, Event, Recorder, power_cuts

from rwkv_stream.errors import NotFoundError
from rwkv_stream.store import Store
from rwkv_stream.store.sessions import Change

Work = Callable[[Path, Callable[[], None]], object]


class Operation(NamedTuple):
    """What is done to a store that `prepare` made; it calls its second argument whenever something was reported."""

    prepare: Callable[[Path], object]
    work: Work
    needs_repair: bool = False


TO_REMOVE = [
    "9033f5d7f7bcaeca6a88aa5d60886f6cbc56c279bd2974ec82b19144db405b52",  # book.txt@64
    "96047ce7b2aaa548afa23c53ad96a304cb89ff43e4f6f13e3720f32974cbda9a",  # notes/other.log@32
    "228d17c4c60a89420e6b084a6f73da1a959316590e80ccc87faae3ff0a916b72",  # notes/other.log@16
]


def nothing(path: Path) -> None:
    pass


def reading(path: Path, tell: Callable[[], None]) -> None:
    store = Store(path, create=True)
    with store.writing("new.txt", MODEL):
        parent = None
        for i in (1, 2):
            parent = put(store, fake(CHUNK * i, "new", document="new.txt", parent=parent)).id
            store.move_head("new.txt", MODEL, parent)
            tell()


def reading_together(path: Path, tell: Callable[[], None]) -> None:
    """Three documents, whose records and heads wait for each other, and two of which have one text."""
    store = Store(path, create=True)
    texts = {"a.txt": "a", "b.txt": "b", "c.txt": "c", "a too.txt": "a"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.writing())
        for name in texts:
            stack.enter_context(store.writing(name, MODEL))
        session = store._sessions.current
        assert session is not None

        def one(name: str, text: str) -> None:
            new = fake(CHUNK, text, document=name)
            store.put(new, fake_state(1), fake_hidden(1), head=(name, "utf-8", CHUNK, ""))

        with ThreadPoolExecutor(len(texts)) as threads:
            with session.turn:
                begun = [threads.submit(contextvars.copy_context().run, one, *item) for item in texts.items()]
                while len(session.waiting) < len(texts) and not any(future.done() for future in begun):
                    time.sleep(0.001)
            for future in begun:
                future.result()
    tell()


def test_a_thread_whose_record_waits_twice_has_its_own_published(tmp_path: Path) -> None:
    """Whichever of the two has the turn."""
    store, made, identity = Store(tmp_path / "a.store", create=True), list[str](), digest("an id")
    with store.writing():
        session = store._sessions.current
        assert session is not None
        session.waiting.append(Change(identity, lambda: made.append("first"), None))
        store._sessions.publish_together(Change(identity, lambda: made.append("own"), None))
        assert not session.waiting
    assert made == ["first", "own"]


def reading_again(path: Path, tell: Callable[[], None]) -> None:
    """With a nearer parent, a dedupe hit, and a snapshot that was removed."""
    store = Store(path)
    read(store, n=5)
    tell()


def naming(path: Path, tell: Callable[[], None]) -> None:
    store = Store(path)
    store.tag("new", store.get("book.txt").id)
    tell()
    store.tag("half", store.get("notes/other.log").id, move=True)
    tell()
    with contextlib.suppress(NotFoundError):  # done before the cut
        store.untag("a fork")
    tell()


def removing(path: Path, tell: Callable[[], None]) -> None:
    """The end of one document, and the whole of the other."""
    store = Store(path)
    for identity in TO_REMOVE:
        with contextlib.suppress(NotFoundError):  # done before the cut
            store.rm(identity)
        tell()


def superseded(path: Path) -> None:
    store = library(path)
    store.untag("a fork")
    store.untag("half")
    store.rm(store.get("book.txt~1").id)
    read(store, text="an edited text", n=2)


def with_gaps(path: Path) -> None:
    store = library(path)
    store.rm(store.get("book.txt~1").id)


def damaged(path: Path) -> None:
    store = library(path)
    newest = store.get("book.txt")
    for file in (store._files.record_path(store.get("book.txt~1").id), store._files.tags / "half"):
        file.write_bytes(file.read_bytes()[:-1])
    (path / "objects" / newest.objects[0].name[:2] / newest.objects[0].name).write_bytes(b"gone")
    store._files.head_path("notes/other.log", MODEL).unlink()


def importing(export: bytes) -> Work:
    def work(path: Path, tell: Callable[[], None]) -> None:
        Store(path, create=True).import_(io.BytesIO(export))
        tell()

    return work


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_disks() -> Iterator[None]:
    """The power is cut in the log alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = io.BytesIO()
    library(tmp_path_factory.mktemp("library") / "a.store").export(["book.txt", "notes/other.log", "a fork"], file)
    return file.getvalue()


OPERATIONS: dict[str, Callable[[bytes], Operation]] = {
    "reading into no store": lambda _: Operation(nothing, reading),
    "reading": lambda _: Operation(library, reading),
    "reading together": lambda _: Operation(library, reading_together),
    "reading again": lambda _: Operation(with_gaps, reading_again),
    "naming": lambda _: Operation(library, naming),
    "removing": lambda _: Operation(library, removing),
    "pruning": lambda _: Operation(superseded, lambda path, tell: (Store(path).prune(), tell())),
    "repairing": lambda _: Operation(damaged, lambda path, tell: (Store.repair(path), tell()), needs_repair=True),
    "importing into no store": lambda export: Operation(nothing, importing(export)),
    "importing what is there in part": lambda export: Operation(with_gaps, importing(export)),
    "rebuilding": lambda _: Operation(library, lambda path, tell: (Store(path).rebuild(), tell())),
}


class Recorded(NamedTuple):
    operation: Operation
    start: Path  # a copy of the store before
    log: list[Event]
    end: Path


@pytest.fixture(params=OPERATIONS)
def recorded(request: pytest.FixtureRequest, export: bytes, tmp_path: Path) -> Recorded:
    operation = OPERATIONS[request.param](export)
    start, end = tmp_path / "start" / "a.store", tmp_path / "end" / "a.store"
    start.parent.mkdir()
    operation.prepare(start)
    if start.exists():
        shutil.copytree(start, end)
    else:
        end.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(end, patch)
        operation.work(end, lambda: recorder.tell(None))
    return Recorded(operation, start, recorder.log, end)


def tolds(path: Path) -> Any:
    return told(Store(path)) if (path / "format").exists() else None


def contents(root: Path) -> dict[str, bytes | None]:
    """All but catalog and locks that are only ever held."""
    paths = {str(path.relative_to(root)): path for path in root.rglob("*")}
    return {n: None if p.is_dir() else p.read_bytes() for n, p in paths.items() if n not in UNSEEN}


def test_the_recorder_misses_nothing(recorded: Recorded) -> None:
    """The log, replayed, is the folder."""
    disk = Disk(recorded.start)
    for event in recorded.log:
        disk.replay(event)
    seen = {name: getattr(node, "synced", None) for name, node in disk.seen.items() if name != "."}
    there = contents(recorded.end)
    assert seen.keys() == there.keys()
    durable = [name for name in seen if not name.startswith("postings/")]
    assert {name: seen[name] for name in durable} == {name: there[name] for name in durable}
    left = [name for name in disk.unsure() if not name.startswith(("locks", "quarantine", "postings"))]
    assert left == [], "all that matters is on the disk at the end"


def test_each_file_is_whole_on_the_disk_before_it_has_its_name(recorded: Recorded) -> None:
    """Written, synced, renamed, and its folder synced before anything that may refer to it gets its name."""
    disk = Disk(recorded.start)
    order = {"objects": 0, "texts": 0, "records": 1, "refs": 2}
    pending: dict[str, int] = {}
    for event in recorded.log:
        if event.kind == "move" and event.to.split("/")[0] in (*order, "format"):
            assert disk.seen[event.path].synced != b"", f"{event.to} had its name before its bytes"
            rank = order.get(event.to.split("/")[0], -1)
            assert not [name for name, other in pending.items() if other < rank], f"{event.to} before {pending}"
            pending[event.to] = rank
        if event.kind == "catalog":
            assert pending == {}, "the catalog before what it indexes"
        if event.kind == "sync folder":
            pending = {name: rank for name, rank in pending.items() if str(Path(name).parent) != event.path}
        disk.replay(event)
    assert pending == {}


def test_a_power_cut_loses_nothing_that_was_reported(recorded: Recorded, tmp_path: Path) -> None:
    """After each event the store opens, every file is whole, each listed snapshot loads, what was reported is there,
    and the same work done again ends as if nothing had happened."""
    reported = [None] * (len(recorded.log) + 1) if recorded.operation.needs_repair else views(recorded, tmp_path)
    end = tolds(recorded.end)
    n_cuts = n_again = 0
    for count, way, image in power_cuts(
        Disk(recorded.start), recorded.log, tmp_path, keeps_catalog=recorded.operation.needs_repair
    ):
        n_cuts += 1
        said = f"after event {count} ({recorded.log[count - 1][:3]}) with {way}"
        if recorded.operation.needs_repair:
            Store.repair(image)
        try:
            store = Store(image)
        except NotFoundError:
            assert reported[count] is None, said
        else:
            assert store.verify(read_data=True).damaged == [], said
            check_kept(reported[count], told(store), end, said)
        if n_cuts % 4 == 0:
            n_again += 1
            recorded.operation.work(image, lambda: None)
            again = tolds(image)
            assert again["snapshots"].keys() == end["snapshots"].keys(), said
            assert (again["heads"], again["tags"]) == (end["heads"], end["tags"]), said
    assert n_cuts >= 4
    assert n_again > 0


def check_kept(before: Any, now: Any, end: Any, said: str) -> None:
    """What was reported last is there unless the operation, now under way, takes it away."""
    if before is None:
        return
    for kind in ("snapshots", "heads", "tags"):
        for name, value in before[kind].items():
            if end[kind].get(name) == value:
                assert now[kind].get(name) == value, f"{kind} {name} {said}"


def views(recorded: Recorded, tmp_path: Path) -> list[Any]:
    """What the store said when something was last reported, for each number of events."""
    path = tmp_path / "views" / "a.store"
    path.parent.mkdir()
    if recorded.start.exists():
        shutil.copytree(recorded.start, path)
    seen: list[Any] = [tolds(path)]
    recorded.operation.work(path, lambda: seen.append(tolds(path)))
    of_events, last = [seen[0]], 0
    for event in recorded.log:
        last += event.kind == "told"
        of_events.append(seen[last])
    return of_events
