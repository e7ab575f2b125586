"""SIGKILL during ingest, at seeded moments and at every named failpoint; then the same command again.

Children are forked from this process, which has torch and the model loaded already, so that a kill costs milliseconds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_stream.errors import NotFoundError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.pipeline import FAILPOINTS as INGEST_FAILPOINTS
from rwkv_stream.pipeline import Progress, ingest
from rwkv_stream.store import FAILPOINTS as STORE_FAILPOINTS
from rwkv_stream.store import Store

pytestmark = pytest.mark.crash

T = 32
EVERY = 128
CI_MOMENTS, ALL_MOMENTS = 10, 25
INGESTING = [
    *INGEST_FAILPOINTS,
    *(name for name in STORE_FAILPOINTS if not name.startswith(("rm.", "tag.", "rebuild."))),
]


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(11)
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(" ".join(rng.choice(["sea", "light", "stone", "keeper", "the", "over", "old"]) for _ in range(300)))
    return path


def in_child(work: Callable[[], None], environment: dict[str, str], kill_after_s: float | None = None) -> int:
    """Run `work` in a forked child, kill it after a while if asked to; the wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(environment)
            torch.set_num_threads(1)  # no thread of the parent's pool lives on in the child
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 (the child must not return into pytest)
            traceback.print_exc()
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


class Bench:
    """A folder in which readings of one text are killed, and how far each of them came."""

    def __init__(self, whole: Whole, folder: Path) -> None:
        self.model, self.text, self.whole, self.folder = whole.model, whole.text, whole, folder
        self.progress = folder / "progress"
        self.progress.touch()

    def read(self, store: Path) -> None:
        with self.progress.open("a", buffering=1) as log:
            started_at: list[int] = []

            def note(progress: Progress) -> None:
                if not started_at:
                    started_at.append(progress.resumed_from_token)
                    log.write(f"from {progress.resumed_from_token}\n")
                log.write(f"{progress.tokens}\n")

            ingest(
                str(self.text),
                name="book.txt",
                model=self.model,
                store=Store(store, create=True),
                chunk=T,
                snapshot_every=EVERY,
                on_progress=note,
            )

    def newest(self, store: Path) -> int:
        """Tokens of the last snapshot that was published, 0 for none: what the next run must not fall behind."""
        try:
            return max((s.tokens for s in Store(store).list(document="book.txt")), default=0)
        except NotFoundError:  # killed before there was a store, or a document in it
            return 0

    def finish(self, store: Path, kills: int) -> None:
        """Run again and hold the result against the uninterrupted one."""
        published = self.newest(store)
        assert in_child(lambda: self.read(store), {}) == 0
        assert ids(store) == self.whole.ids
        assert Store(store).verify().damaged == []
        assert [p for p in store.rglob("*") if p.name.startswith(TEMP_PREFIX)] == []
        runs = self.runs()
        if published < self.whole.n_tokens:
            assert runs[-1][0] >= published // T * T, "the last run started at or after the last published snapshot"
        assert sum(end - start for start, end in runs) <= self.whole.n_tokens + kills * (EVERY + T)

    def runs(self) -> list[tuple[int, int]]:
        """(first, last) token of each run that computed anything."""
        runs: list[tuple[int, int]] = []
        for line in self.progress.read_text().split("\n"):
            if line.startswith("from "):
                runs.append((int(line[5:]), int(line[5:])))
            elif line and runs:
                runs[-1] = (runs[-1][0], int(line))
        return runs


class Whole:
    """One text, one model, and the result of an uninterrupted reading."""

    def __init__(self, model: Model, text: Path, folder: Path) -> None:
        self.model, self.text = model, text
        started = time.perf_counter()
        assert in_child(lambda: Bench(self, folder).read(folder / "whole.store"), {}) == 0
        self.duration_s = time.perf_counter() - started
        self.ids = ids(folder / "whole.store")
        self.n_tokens = max(self.ids)


def ids(store_path: Path) -> dict[int, tuple[str, str]]:
    """Tokens → id and state digest of the snapshots of the book."""
    store = Store(store_path)
    newest = store.get("book.txt")
    return {s.tokens: (s.id, s.state().digest()) for s in (newest, *store.ancestors(newest))}


@pytest.fixture(scope="module")
def whole(bytes_model: Model, text_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(bytes_model, text_path, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def bench(whole: Whole, tmp_path: Path) -> Bench:
    return Bench(whole, tmp_path)


def killed_at(bench: Bench, store: Path, name: str, passing: int) -> bool:
    """Whether a reading into `store` passed the failpoint so often, and so was killed there."""
    status = in_child(lambda: bench.read(store), {FAILPOINT_VARIABLE: f"{name}:{passing}"})
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGKILL
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("name", INGESTING)
def test_killed_at_a_failpoint(bench: Bench, name: str, request: pytest.FixtureRequest) -> None:
    store = bench.folder / "killed.store"
    earlier = 0
    if name.startswith("recover."):  # passed only behind a writer that died
        assert killed_at(bench, store, "record.published", 2)
        earlier = 1
    passings = [1, 2, 3, 5] if request.config.getoption("--all-moments") else [2]
    kills = earlier + sum(killed_at(bench, store, name, passing) for passing in passings)
    if kills == earlier:  # passed once in the life of a store
        shutil.rmtree(store)
        bench.progress.write_text("")
        if earlier:
            assert killed_at(bench, store, "record.published", 2)
        assert killed_at(bench, store, name, 1), f"{name} is never passed"
        kills = earlier + 1
    bench.finish(store, kills)


@pytest.mark.parametrize("moment", range(ALL_MOMENTS))
def test_killed_at_a_moment(bench: Bench, moment: int, request: pytest.FixtureRequest) -> None:
    if moment >= CI_MOMENTS and not request.config.getoption("--all-moments"):
        pytest.skip("run by `make crash`")
    rng = random.Random(moment)
    store = bench.folder / "killed.store"
    kills = 0
    for _ in range(rng.randint(1, 4)):
        before = bench.newest(store)
        status = in_child(lambda: bench.read(store), {}, kill_after_s=rng.uniform(0, bench.whole.duration_s))
        kills += os.WIFSIGNALED(status)
        assert bench.newest(store) >= before, "a kill lost a snapshot"
    bench.finish(store, kills)
