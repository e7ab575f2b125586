"""SIGKILL in the midst of everything that changes a store: at every named failpoint, and at seeded moments.

Each operation is first done once unkilled, to see which failpoints it passes, how long it takes, and what the store
says after each of its steps. Then copies of the store that it starts from are taken through a kill. Afterwards the
store opens and verifies, each name and snapshot is as before or as after the step under way, done again the operation
ends as if never killed, and a prune leaves no stray file.

Children are forked from this process, which has torch and the model loaded already, so that a kill costs milliseconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_snapshots import CHUNK, MODEL, fake, in_child, keep, library, put, read, short, start_child, told
from kills import assert_nothing_stray, assert_sound, at_failpoints, hold, killed, on_disk, wait_until

from rwkv_stream.errors import NotFoundError
from rwkv_stream.files import FAILPOINT_VARIABLE
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import FAILPOINTS as INGEST_FAILPOINTS
from rwkv_stream.reading.ingest import ReadingProgress, ingest
from rwkv_stream.reading.positions import take
from rwkv_stream.store import FAILPOINTS as STORE_FAILPOINTS
from rwkv_stream.store import Store, remote
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.retention import Rule
from rwkv_stream.store.verify import check_files

pytestmark = pytest.mark.crash

FAILPOINTS = [*STORE_FAILPOINTS, *INGEST_FAILPOINTS]
T = 32
EVERY = 128
CI_MOMENTS, ALL_MOMENTS = 20, 200
CI_OPERATIONS = 3  # killed at each failpoint
SMALL_STORE = 15_000  # bytes, fewer than the library has
GOLDEN = Path(__file__).parents[1] / "golden"
Said = dict[str, dict[str, Any]]
Work = Callable[[Path], object]


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_disks() -> Iterator[None]:
    """A kill does not lose what was written, synced or not. Files travel one by one, so that kills can be counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(remote, "PARALLEL", 1)
        yield


def nothing(path: Path) -> None:
    """Before there is a store."""


@dataclass(frozen=True)
class Operation:
    """Steps, each of which may be done again, on the store that `prepare` makes in a folder.

    beside      what another process does meanwhile: it calls `hold` of its second argument on the way, and goes on then
    is_damaged  whether `prepare` leaves a store that only a repair brings back
    check       what else must hold of the folder in the end, after so many kills
    """

    prepare: Work
    steps: Sequence[Work]
    beside: Callable[[Path, Path], object] | None = None
    is_damaged: bool = False
    check: Callable[[Path, int], object] | None = None

    @contextlib.contextmanager
    def started(self, path: Path, failpoint: str = "", visit: Callable[[str], object] | None = None) -> Iterator[int]:
        """A child that does it, is killed at a failpoint or calls `visit` at each, and notes each step that is done in
        the file `done`. The block gets its process id and waits for it; the process beside it ends after that."""
        beside, held, done = self.beside, path.with_name("held"), path.with_name("done")
        done.touch()
        if beside is not None:
            other = start_child(lambda: beside(path, held))
            wait_until(held.exists)

        def work() -> None:
            if visit is not None:
                at_failpoints(visit)
            with done.open("a", buffering=1) as log:
                for i, step in enumerate(self.steps, 1):
                    step(path)
                    log.write(f"{i}\n")

        yield start_child(work, **{FAILPOINT_VARIABLE: failpoint})
        if beside is not None:
            held.unlink()
            assert os.waitpid(other, 0)[1] == 0

    def done(self, path: Path) -> int:
        """How many of its steps were ever done."""
        return max((int(line) for line in path.with_name("done").read_text().split()), default=0)


# ---- the operations ----


def steps(*works: Callable[[Store], object]) -> list[Work]:
    return [lambda path, work=work: work(Store(path)) for work in works]  # type: ignore[misc]


def read_one(store: Store, document: str, text: str, n: int) -> None:
    """The `n`-th snapshot of a fake reading, which goes on where it stopped."""
    with store.writing(document, MODEL):
        head = store.head(document, MODEL)
        lineage = {s.tokens: s for s in (head, *store.ancestors(head))} if head is not None else {}
        parent = lineage.get(CHUNK * (n - 1))
        new = fake(CHUNK * n, text, document=document, parent=parent.id if parent is not None else None)
        made = put(store, keep(store, new, text, parent))
        if made.tokens not in lineage:
            store.move_head(document, MODEL, made.id)


def reading(n: int) -> list[Work]:
    """An ingest by a fake model, in a session a snapshot."""
    return steps(*(lambda store, i=i: read_one(store, "new.txt", "a new text", i) for i in range(1, n + 1)))  # type: ignore[misc]


def found(store: Store, document: str, tokens: int) -> str | None:
    return next((s.id for s in store.list() if (s.document, s.tokens) == (document, tokens)), None)


def removing(document: str, tokens: int) -> Callable[[Store], None]:
    def step(store: Store) -> None:
        identity = found(store, document, tokens)
        if identity is not None:  # not done before the kill
            store.rm(identity)

    return step


def save_a_fork(store: Store) -> None:
    start = store.get("book.txt").id
    with store.writing():
        asked = fake(5, "asked again", document="saved", start=start, chunk=5, how="ask", exact=False)
        store.tag("saved", put(store, asked).id, move=True)


def reading_and_thinning(tokens: int) -> Callable[[Store], None]:
    """The snapshot of the book at a token, unless it was read before; after it little of the past stays."""

    def step(store: Store) -> None:
        with store.writing("book.txt", MODEL):
            head = store.head("book.txt", MODEL)
            assert head is not None
            thinning = store.thinning("book.txt", MODEL, Rule(keep=1), head)
            if head.tokens < tokens:
                made = put(store, keep(store, fake(tokens, parent=head.id), "a text", head))
                store.move_head("book.txt", MODEL, made.id)
                thinning.add(made)
            thinning.thin()

    return step


def untag(store: Store) -> None:
    with contextlib.suppress(NotFoundError):
        store.untag("a fork")


def full_of_leftovers(path: Path) -> None:
    store = library(path)
    read(store, text="an edited text", n=2)
    removing("notes/other.log", 16)(store)
    removing("notes/other.log", 32)(store)
    put(store, fake(16, "never named"))
    short(store)
    short(store, text="another note")


def with_a_note(path: Path) -> Store:
    store = library(path)
    short(store)
    return store


def without_catalog(path: Path) -> None:
    library(path)
    (path / "catalog.sqlite").unlink()


def flip(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


def stored(store: Store) -> dict[tuple[str, int], tuple[Path, Path]]:
    """Record and object of each snapshot by document and tokens."""
    snapshots = [store.get(listed.id) for listed in store.list()]
    return {
        (s.document, s.tokens): (store._files.record_path(s.id), s.reader.objects.path(s.objects[0].name))
        for s in snapshots
    }


def with_damaged_small_files(path: Path) -> None:
    store = library(path)
    at = stored(store)
    flip(at["book.txt", 32][0])
    at["book.txt", 64][0].unlink()
    store._files.head_path("book.txt", MODEL).unlink()
    flip(store._files.head_path("notes/other.log", MODEL))
    flip(store._files.tags / "half")
    flip(store._files.format)


def with_damaged_objects(path: Path) -> None:
    at = stored(library(path))
    newest, gone = at["book.txt", 64][1], at["notes/other.log", 32][1]
    newest.write_bytes(newest.read_bytes()[:-20])
    gone.unlink()
    one, two = at["book.txt", 16][1], at["book.txt", 32][1]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def with_damaged_texts(path: Path) -> None:
    store = library(path)
    texts = store._files.texts
    ends = {ref: store.get(ref).text or "" for ref in ("book.txt", "book.txt@32", "book.txt@16", "notes/other.log")}
    flip(texts.path(ends["book.txt@32"]))
    moved = texts.path(ends["notes/other.log"])
    moved.rename(moved.with_name("0" * 64))
    texts.postings_path(ends["book.txt@16"]).unlink()
    flip(texts.postings_path(ends["notes/other.log"]))
    (texts.folder / "notes.txt").write_text("mine")


def with_damage_and_no_catalog(path: Path) -> None:
    store = library(path)
    at = stored(store)
    flip(store._files.head_path("book.txt", MODEL))
    misplaced = at["book.txt", 32][0]
    misplaced.rename(misplaced.with_name("0" * 64))
    flip(at["notes/other.log", 32][0])
    at["book.txt", 48][1].unlink()
    store._files.catalog.unlink()


def with_a_part(path: Path) -> None:
    """Of the library: half a document, a removed snapshot, and names that stand elsewhere."""
    store = Store(path, create=True)
    made = read(store, n=2)
    read(store, "notes/other.log", "another edition", n=1)
    store.tag("half", made[0].id)
    store.rm(made[1].id)


def elsewhere(path: Path) -> Path:
    """Where the store is pushed to."""
    return path.with_name("remote")


def pushed_in_part(path: Path) -> None:
    """The library, of which a remote has one document."""
    library(path).push(os.fspath(elsewhere(path)), ["notes/other.log"])


def is_pushed(path: Path, kills: int) -> None:
    """What lies elsewhere is whole, and all that there is here."""
    assert check_files(StoreFiles(elsewhere(path)), None, read_data=True).damaged == []
    copied = Store(path.with_name("pulled.store"), create=True)
    copied.pull(os.fspath(elsewhere(path)))
    assert told(copied) == told(Store(path))


def behind_one_killed_at(name: str) -> Work:
    def prepare(path: Path) -> None:
        library(path)

        def life() -> None:
            read(Store(path), "new.txt", "new", n=2)
            removing("book.txt", 64)(Store(path))

        assert killed(in_child(life, **{FAILPOINT_VARIABLE: name}))

    return prepare


def read_shared(store: Store, document: str, n: int) -> None:
    read_one(store, document, "shared" if n <= 3 else document, n)


def one_writer(path: Path) -> None:
    store = Store(path)
    with store.writing("one.txt", MODEL):
        for n in range(1, 6):
            read_shared(store, "one.txt", n)


def other_writer(path: Path, held: Path) -> None:
    """Reads a text that begins as the one of the killed writer; in the middle, again and again what it has read."""
    store = Store(path, create=True)
    with store.writing("other.txt", MODEL):
        read_shared(store, "other.txt", 1)
        read_shared(store, "other.txt", 2)
        held.touch()
        while held.exists():
            read_shared(store, "other.txt", 1)
            read_shared(store, "other.txt", 2)
        read_shared(store, "other.txt", 3)
        read_shared(store, "other.txt", 4)


class Reader:
    """A model that reads texts, and the notes of how far each reading came."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model = model
        self.folder = folder
        words = ["sea", "light", "stone", "keeper", "the", "over", "old"]
        rng = random.Random(11)
        text = " ".join(rng.choice(words) for _ in range(200))
        self.texts = {"book.txt": text, "edited.txt": text[:700] + "!" + text[701:]}
        self.texts |= {"short.txt": text[: EVERY - 10], "shorter.txt": text[20:60]}
        for name, content in self.texts.items():
            (folder / name).write_text(content)
        model.forward(torch.zeros(1, T, dtype=torch.int64), model.start()[1])  # loads the kernels, not in each child

    def read(
        self, path: Path, text: str, on_progress: Callable[[ReadingProgress], None], name: str = "book.txt"
    ) -> None:
        ingest(
            str(self.folder / text),
            name=name,
            model=self.model,
            store=Store(path, create=True),
            chunk=T,
            snapshot_every=EVERY,
            on_progress=on_progress,
        )

    def ask_at_a_position(self, path: Path) -> None:
        for ref in ("book.txt@300", "book.txt@50%"):
            take(ref, model=self.model, store=Store(path), cache_bytes=50_000)

    def noted(self, path: Path) -> None:
        """Read the book; note what was published before, and every chunk."""
        store = Store(path, create=True)
        with path.with_name("progress").open("a", buffering=1) as log:

            def note(progress: ReadingProgress) -> None:
                log.write(f"chunk {progress.resumed_from_token} {progress.tokens}\n")

            log.write(f"published {max((s.tokens for s in store.list()), default=0)}\n")
            self.read(path, "book.txt", note)

    def read_little_twice(self, path: Path, kills: int) -> None:
        """Each run went on from the last snapshot published; a kill cost the interval being stored, the one being read
        meanwhile, and the chunk at hand."""
        n_read = published = 0
        for line in path.with_name("progress").read_text().splitlines():
            kind, *numbers = line.split()
            if kind == "published":
                published = int(numbers[0])
                continue
            resumed, at = map(int, numbers)
            assert resumed >= published // T * T
            n_read += at - max(resumed, (at - 1) // T * T)
        assert n_read <= len(self.texts["book.txt"]) + kills * (2 * EVERY + T)

    def beside(self, path: Path, held: Path) -> None:
        """Read the other edition, which begins as the book; hold after its first snapshot, while the next is read."""
        store = Store(path, create=True)
        if store.head("edited.txt", self.model.fingerprint) is not None:  # read beside one that was killed
            hold(held)

        def on_progress(progress: ReadingProgress) -> None:
            if progress.tokens == EVERY + T:
                wait_until(lambda: store.head("edited.txt", self.model.fingerprint) is not None)
                hold(held)

        self.read(path, "edited.txt", on_progress, name="edited.txt")


def operations(reader: Reader, export: bytes) -> dict[str, Operation]:
    def quietly(progress: ReadingProgress) -> None:
        pass

    def import_(store: Store) -> None:
        store.import_(io.BytesIO(export))

    def pull(store: Store) -> None:
        store.pull(os.fspath(reader.folder / "remote"))

    def push(path: Path) -> None:
        Store(path).push(os.fspath(elsewhere(path)))

    return {
        "ingest": Operation(nothing, [reader.noted], check=reader.read_little_twice),
        "ingest of short texts": Operation(
            lambda path: reader.read(path, "shorter.txt", quietly, "short.txt"),
            [lambda path, name=name: reader.read(path, name, quietly, name) for name in ("short.txt", "shorter.txt")],  # type: ignore[misc]
        ),
        "ingest of an edited text": Operation(
            lambda path: reader.read(path, "book.txt", quietly), [lambda path: reader.read(path, "edited.txt", quietly)]
        ),
        "ingest by a fake model": Operation(library, reading(3)),
        "ingest into a store of version 1": Operation(lambda path: shutil.copytree(GOLDEN / "v1", path), reading(2)),
        "names": Operation(
            library,
            steps(
                save_a_fork,
                lambda store: store.tag("half", store.get("book.txt@48").id, move=True),
                untag,
            ),
        ),
        "rm": Operation(
            with_a_note,
            steps(
                removing("note.txt", 20),
                removing("book.txt", 48),
                removing("book.txt", 64),
                removing("notes/other.log", 16),
                removing("notes/other.log", 32),
            ),
        ),
        "a position": Operation(
            lambda path: reader.read(path, "book.txt", quietly),
            [reader.ask_at_a_position, lambda path: Store(path).prune(), reader.ask_at_a_position],
        ),
        "prune": Operation(full_of_leftovers, steps(lambda store: store.prune())),
        "prune by a rule": Operation(full_of_leftovers, steps(lambda store: store.prune(Rule(keep=1)))),
        "prune to a size": Operation(library, steps(lambda store: store.prune(Rule(max_bytes=SMALL_STORE)))),
        "a reading that is thinned on its way": Operation(library, steps(*map(reading_and_thinning, (80, 96)))),
        "recode": Operation(library, steps(lambda store: store.recode("int8"))),
        "rebuild": Operation(library, steps(lambda store: store.rebuild())),
        "rebuild of a catalog that is gone": Operation(without_catalog, steps(lambda store: store.rebuild())),
        "repair of small files": Operation(with_damaged_small_files, [Store.repair], is_damaged=True),
        "repair of objects": Operation(with_damaged_objects, [Store.repair], is_damaged=True),
        "repair of texts": Operation(with_damaged_texts, [Store.repair], is_damaged=True),
        "repair without a catalog": Operation(with_damage_and_no_catalog, [Store.repair], is_damaged=True),
        "import into an empty store": Operation(lambda path: Store(path, create=True), steps(import_)),
        "import of what is there in part": Operation(with_a_part, steps(import_)),
        "pull into an empty store": Operation(lambda path: Store(path, create=True), steps(pull)),
        "pull of what is there in part": Operation(with_a_part, steps(pull)),
        "push": Operation(library, [push], check=is_pushed),
        "push of what is there in part": Operation(pushed_in_part, [push], check=is_pushed),
        "two writers": Operation(nothing, [one_writer], beside=other_writer),
        "two readings": Operation(nothing, [lambda path: reader.read(path, "book.txt", quietly)], beside=reader.beside),
    } | {
        f"clearing up behind one killed at {name}": Operation(behind_one_killed_at(name), steps(lambda store: None))
        for name in ("object.written", "record.renamed", "head.synced", "rm.uncatalogued", "rm.head.renamed")
    }


# ---- unkilled ----


def says(path: Path) -> Said:
    """What a store says; whose text a snapshot was first read from is left out, as it depends on who came first."""
    if not (path / "format").exists():
        return {"snapshots": {}, "heads": {}, "tags": {}, "texts": {}}
    said = told(Store(path))
    return said | {"snapshots": {identity: values[1:] for identity, values in said["snapshots"].items()}}


def copy(path: Path, to: Path) -> Path:
    if path.exists():
        shutil.copytree(path, to)
    return to


class Unkilled:
    """One operation done to its end: which failpoints it passes and how often, what it takes, what there is then.

    said  what the store says before it and after each step; of a damaged store, before as after
    """

    def __init__(self, operation: Operation, folder: Path) -> None:
        self.operation, self.folder = operation, folder
        folder.mkdir()
        self.before = folder / "before.store"
        operation.prepare(self.before)
        whole, log = self.fresh("whole"), folder / "passed"
        with log.open("a", buffering=1) as file:
            started = time.perf_counter()
            with operation.started(whole, visit=lambda name: file.write(f"{name}\n")) as pid:
                assert not killed(os.waitpid(pid, 0)[1])
                self.duration_s = time.perf_counter() - started
        self.passed = Counter(log.read_text().split())
        self.said = [] if operation.is_damaged else [says(self.fresh("copied"))]
        if operation.beside is None:
            path = self.fresh("in steps")
            for i, step in enumerate(operation.steps, 1):
                assert in_child(lambda step=step: step(path)) == 0  # type: ignore[misc]
                self.said.append(says(copy(path, folder / f"{i}.store")))
        else:
            self.said.append(says(whole))
        if operation.is_damaged:
            self.said *= 2
        assert says(whole) == self.said[-1]
        self.pruned = pruned(whole)

    def fresh(self, name: str) -> Path:
        """A copy of the store before it, in a folder of its own."""
        (self.folder / name).mkdir()
        copy(elsewhere(self.before), elsewhere(self.folder / name / "a.store"))
        return copy(self.before, self.folder / name / "a.store")


def pruned(path: Path) -> set[str]:
    """The files that a prune leaves, which are those that are needed; what was quarantined, and postings, aside."""
    Store(path).prune()
    assert_nothing_stray(path)
    return {name for name in on_disk(path) if not name.startswith(("quarantine/", "postings/"))}


@pytest.fixture(scope="module")
def unkilled(bytes_model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unkilled]:
    folder = tmp_path_factory.mktemp("unkilled")
    export = io.BytesIO()
    whole = with_a_note(folder / "library.store")
    whole.export(["book.txt", "notes/other.log", "a fork", "note.txt"], export)
    whole.push(os.fspath(folder / "remote"))
    made = operations(Reader(bytes_model, folder), export.getvalue())
    return {name: Unkilled(operation, folder / str(i)) for i, (name, operation) in enumerate(made.items())}


# ---- killed ----


class Life:
    """A copy of the store that an operation starts from, in which it is killed, perhaps again and again."""

    def __init__(self, unkilled: Unkilled, name: str) -> None:
        self.unkilled, self.operation, self.path = unkilled, unkilled.operation, unkilled.fresh(name)
        self.kept = kept_bytes(self.path) if self.operation.is_damaged else set()
        self.said = unkilled.said[0]
        self.kills = 0

    def run(self, failpoint: str = "", kill_after_s: float | None = None) -> bool:
        """Whether it was killed."""
        with self.operation.started(self.path, failpoint) as pid:
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                os.kill(pid, signal.SIGKILL)
            was_killed = killed(os.waitpid(pid, 0)[1])
        self.kills += was_killed
        self.check()
        return was_killed

    def check(self) -> None:
        """Of a copy, so that the next to open the store finds it as it was left."""
        copied = copy(self.path, self.path.with_name("checked.store"))
        if not self.operation.is_damaged and (copied / "format").exists():
            assert_sound(copied)
            said = says(copied)
            done = self.operation.done(self.path)
            before, after = self.unkilled.said[done], self.unkilled.said[min(done + 1, len(self.operation.steps))]
            for kind in said:
                for name in {*said[kind], *before[kind], *after[kind]}:
                    values = list(dict.fromkeys(map(repr, way(kind, name, before, after))))
                    value, last = repr(said[kind].get(name)), repr(self.said[kind].get(name))
                    assert value in values, f"{kind} {name}"
                    assert last not in values or values.index(value) >= values.index(last), f"{kind} {name} went back"
            self.said = said
            pruned(copied)
            assert_sound(copied)
        shutil.rmtree(copied, ignore_errors=True)

    def finish(self) -> None:
        """Do it again: it ends as if it had never been killed."""
        assert not self.run()
        assert_sound(self.path)
        assert says(self.path) == self.unkilled.said[-1]
        assert self.kept <= kept_bytes(self.path)
        if self.operation.check is not None:
            self.operation.check(self.path, self.kills)
        assert pruned(self.path) == self.unkilled.pruned
        assert_sound(self.path)
        shutil.rmtree(self.path.parent)


def way(kind: str, name: str, before: Said, after: Said) -> Iterable[Any]:
    """The values that a name may have from `before` to `after`, in this order; heads may pass new snapshots."""
    yield before[kind].get(name)
    new: list[str] = []
    parent = after[kind].get(name) if kind == "heads" else None
    while parent is not None and parent not in before["snapshots"]:
        new.append(parent)
        parent = after["snapshots"][parent][1]
    yield from reversed(new)
    yield after[kind].get(name)


def kept_bytes(path: Path) -> set[str]:
    """Digests of all files, in place or moved aside; not of the catalog, postings and locks."""
    names = {name for name in on_disk(path) if not name.startswith(("catalog.sqlite", "postings/", "locks/"))}
    return {hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}


def test_every_failpoint_has_a_name(unkilled: dict[str, Unkilled]) -> None:
    assert set().union(*(whole.passed for whole in unkilled.values())) <= set(FAILPOINTS)


@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_at_a_failpoint(unkilled: dict[str, Unkilled], name: str, request: pytest.FixtureRequest) -> None:
    """In every operation that passes it, at its first passing, one in the middle and the last."""
    rng = random.Random(name)
    passing = {operation: whole.passed[name] for operation, whole in unkilled.items() if whole.passed[name]}
    assert passing, f"{name} is never passed"
    kills = [(operation, at) for operation, n in passing.items() for at in sorted({1, (n + 1) // 2, n})]
    if not request.config.getoption("--all-moments"):
        operations = rng.sample([*passing], min(len(passing), CI_OPERATIONS))
        kills = [(operation, rng.randint(1, passing[operation])) for operation in operations]
    for operation, at in kills:
        print(f"{operation}, killed at {name}:{at}")
        life = Life(unkilled[operation], f"{name}-{at}")
        assert life.run(f"{name}:{at}"), "not killed"
        life.finish()


@pytest.mark.parametrize("moment", range(ALL_MOMENTS))
def test_killed_at_a_moment(unkilled: dict[str, Unkilled], moment: int, request: pytest.FixtureRequest) -> None:
    """Up to four times, before the operation is let to its end."""
    if moment >= CI_MOMENTS and not request.config.getoption("--all-moments"):
        pytest.skip("run by `make crash`")
    rng = random.Random(moment)
    operation = rng.choice([*unkilled, *["ingest", "two readings"] * 4])
    life = Life(unkilled[operation], f"moment-{moment}")
    for _ in range(rng.randint(1, 4)):
        share = rng.random()
        print(f"{operation}, killed at {share:.1%} of its time")
        life.run(kill_after_s=share * life.unkilled.duration_s)
    life.finish()
