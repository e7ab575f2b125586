"""The Ray engine: the local engine's rows, bit for bit, and one each whoever dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kills import wait_until
from program import program

from rwkv_stream.answers.ask_jobs import AskingWork
from rwkv_stream.answers.prompts import Question
from rwkv_stream.errors import BackendError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.tables import ray_engine
from rwkv_stream.tables.embed_jobs import embed_job
from rwkv_stream.tables.jobs import FAILED, MANIFEST, PROGRESS, Job

pytestmark = pytest.mark.usefixtures("one_thread")

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'rwkv-stream[ray]'")

N_PARTS = 12
SLOW = {"budget": 16}  # many calls of the model, so that there is time to kill in


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """No process of Ray outlives a test."""
    before = _ray_processes()
    yield
    ray.shutdown()
    wait_until(lambda: _ray_processes() <= before, limit_s=60)


def _ray_processes() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            mine = folder.stat().st_uid == os.getuid()
            if mine and (b"/raylet" in command or b"gcs_server" in command or b"ray::" in command):
                found.add(int(folder.name))
    return found


@pytest.fixture
def short() -> Iterator[str]:
    """A folder with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> str:
    """A table of which one row is none; the current folder is its own."""
    rng = random.Random(0)
    words = "the keeper walked over an old stone bridge toward the light".split()  # noqa: SIM905
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 60)))}) for _ in range(N_PARTS * 10)]
    lines[41] = "no JSON"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    Path("table.jsonl").write_text("\n".join(lines))
    return "table.jsonl"


@pytest.fixture
def model(bytes_model: Model) -> Model:
    return bytes_model


def job(folder: str, source: str, model: Model) -> Job:
    return embed_job(folder, [source], model=model, part_rows=10, units=("sentence", "document"), **SLOW)


def assert_like_local(folder: str, source: str, model: Model) -> None:
    """Same parts, rows in the same order, manifest and list of failures; nothing else."""
    made = job("local", source, model)
    made.run(on_failure=lambda failure: None)
    assert len(made.parts) == N_PARTS
    names = sorted(path.name for path in Path("local").glob("*.parquet"))
    assert sorted(path.name for path in Path(folder).glob("*.parquet")) == names
    for name in names:
        assert pq.read_table(Path(folder, name)).equals(pq.read_table(Path("local", name)), check_metadata=True), name
    for name in (MANIFEST, FAILED):
        assert Path(folder, name).read_bytes() == Path("local", name).read_bytes()
    assert [path.name for path in Path(folder).rglob(f"{TEMP_PREFIX}*")] == []


def records(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder, PROGRESS).glob("*.json")}


def started(short: str, num_cpus: int) -> None:
    ray.init(include_dashboard=False, num_cpus=num_cpus, object_store_memory=100 << 20, _temp_dir=short)


def test_rows_are_those_of_the_local_engine(short: str, source: str, model: Model) -> None:
    started(short, 2)
    failures: list[str] = []
    progress = ray_engine.run(job("out", source, model), on_failure=lambda failure: failures.append(failure.document))
    assert_like_local("out", source, model)
    assert failures == [f"{source}#42"]
    assert (progress.documents, progress.failed) == (N_PARTS * 10 - 1, 1)
    assert progress.tokens == progress.tokens_now > 0
    before = records("out")
    again = ray_engine.run(job("out", source, model))
    assert records("out") == before
    assert (again.rows, again.tokens, again.tokens_now) == (progress.rows, progress.tokens, 0)


def test_answers_are_those_of_the_local_engine(short: str, source: str) -> None:
    """A work that asks no model."""
    started(short, 2)
    work = AskingWork((Question("Who walked toward the light?", "q"), Question("What was colonised?")))
    failures: list[str] = []
    progress = ray_engine.run(
        Job("out", [source], work, part_rows=30), on_failure=lambda f: failures.append(f.document)
    )
    Job("local", [source], work, part_rows=30).run(on_failure=lambda failure: None)
    names = [f"part-{i:05}.parquet" for i in range(4)]
    assert sorted(path.name for path in Path("out").glob("*.parquet")) == names
    for name in names:
        assert pq.read_table(Path("out", name)).equals(pq.read_table(Path("local", name)), check_metadata=True)
    assert (progress.rows, failures) == (2 * (N_PARTS * 10 - 1), [f"{source}#42"])


def test_an_actor_that_is_killed(short: str, source: str, model: Model) -> None:
    started(short, 2)
    kills: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(records("out")) >= 2, limit_s=60)
        kills.extend(_actors()[:1])
        os.kill(kills[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    made = job("out", source, model)
    killer.start()
    ray_engine.run(made)
    killer.join()
    assert kills
    assert_like_local("out", source, model)


def _actors() -> list[int]:
    """Processes that hold an actor."""
    found = []
    for pid in _ray_processes():
        with contextlib.suppress(OSError):
            if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return sorted(found)


def test_a_node_that_is_lost(short: str, source: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_TMPDIR", short)  # a cluster writes its address into a folder that it does not make
    Path(short, "ray").mkdir()
    options = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False, "temp_dir": short})
    try:
        node = cluster.add_node(**options)
        ray.init(address=cluster.address)
        lost: list[int] = []

        def lose() -> None:
            """Take a node away while both work: the first actor waits for the other, which may start much later."""
            wait_until(lambda: len(records("out")) >= 2, limit_s=300)
            held = _actors()
            for pid in held:
                os.kill(pid, signal.SIGSTOP)
            try:
                wait_until(lambda: len(_actors()) == 2, limit_s=300)
                lost.append(len(records("out")))
                cluster.remove_node(node, allow_graceful=False)
            finally:
                for pid in held:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

        loser = threading.Thread(target=lose)
        made = job("out", source, model)
        loser.start()
        ray_engine.run(made, workers=2)
        loser.join()
        assert lost and lost[0] < N_PARTS
        assert_like_local("out", source, model)
    finally:
        ray.shutdown()
        cluster.shutdown()


CHILD = """
import json, sys
from rwkv_stream.tables import ray_engine
from rwkv_stream.tables.embed_jobs import embed_job
from rwkv_stream.model import load
source, options = sys.argv[1], json.loads(sys.argv[2])
job = embed_job("out", [source], model=load(device="cpu", path=sys.argv[3], threads=1), **options)
ray_engine.run(job, workers=2)
"""


def test_a_driver_that_is_killed_goes_on(source: str, model: Model) -> None:
    options = {"part_rows": 10, "units": ["sentence", "document"], **SLOW}
    child = subprocess.Popen([sys.executable, "-c", CHILD, source, json.dumps(options), model.path])
    wait_until(lambda: len(records("out")) >= 3 or child.poll() is not None, limit_s=60)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    wait_until(lambda: not _actors(), limit_s=60)
    before = records("out")
    assert 3 <= len(before) < N_PARTS
    ray_engine.run(job("out", source, model))
    assert {path: time_ns for path, time_ns in records("out").items() if path in before} == before
    assert_like_local("out", source, model)


def test_an_actor_that_always_dies(source: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job("out", source, model)
    monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.rows:1")
    with pytest.raises(BackendError, match="3 times in a row"):
        ray_engine.run(made, workers=1)
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert records("out") == {}


def test_the_program(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    ended = program("embed", source, "-o", "out/", "--engine", "ray", "--workers", "1", "--json")
    assert (ended.code, json.loads(ended.out)["rows"]) == (3, N_PARTS * 10 - 1)
    assert program("embed", source, "-o", "one/", "--json").code == 3
    assert pq.read_table("out/part-00000.parquet").equals(pq.read_table("one/part-00000.parquet"))
    for options in (["-o", "out.parquet", "--engine", "ray"], ["-o", "out/", "--workers", "2"]):
        assert program("embed", source, *options).code == 2


def test_without_the_package(source: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"rwkv-stream\[ray\]"):
        ray_engine.run(job("out", source, model))
