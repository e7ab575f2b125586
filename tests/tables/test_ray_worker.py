"""What a worker of the Ray engine does with what it is sent, without Ray: the same numerics, or none."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from rwkv_stream import kernels
from rwkv_stream.errors import BackendError
from rwkv_stream.model import Loading, Model, load
from rwkv_stream.tables import ray_engine
from rwkv_stream.tables.embed_jobs import embed_job
from rwkv_stream.tables.jobs import Job
from rwkv_stream.tables.ray_engine import SentJob

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVE = kernels.available()["cpu"] is None


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The keeper lit the lamp. The sea was calm.")


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def worked(job: Job) -> list[Any]:
    """The errors of a worker that makes all parts of a job."""
    sent = pickle.loads(pickle.dumps(SentJob.of(job)))
    made = ray_engine._Actor(sent)({"item": [part.number for part in job.parts]})
    return [error for error in made["error"] if error is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bf16"},
        pytest.param({"weights": "int8"}, marks=pytest.mark.skipif(not NATIVE, reason="no native kernels")),
        {"backend": "reference"},
    ],
    ids=["plain", "bf16", "int8", "reference"],
)
def test_a_worker_loads_what_the_job_did(bytes_model_path: Path, options: dict[str, Any]) -> None:
    model = load(bytes_model_path, device="cpu", **options)
    assert worked(job("there", model)) == []
    job("here", model).run()
    here, there = (pq.read_table(f"{folder}/part-00000.parquet") for folder in ("here", "there"))
    assert there.equals(here, check_metadata=True)


def test_a_worker_with_other_numerics_stops_the_job(bytes_model: Model, precision: None) -> None:
    made = job("out", bytes_model)
    torch.set_float32_matmul_precision("high")
    (error,) = worked(made)
    assert isinstance(error, BackendError)
    assert "found on" in str(error) and "matmul 'high' instead of 'highest'" in str(error)
    assert made.missing() == made.parts


def test_a_worker_of_another_version_stops_the_job(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job("out", bytes_model)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    (error,) = worked(made)
    assert "version '9.9' instead of" in str(error)


@pytest.mark.parametrize(
    ("given", "stages", "wanted"),
    [("auto", 1, "cuda:0"), ("cuda:1", 1, "cuda:0"), ("cuda:2,cuda:3", 2, "cuda:0,cuda:1")],
)
def test_gpus_are_those_that_ray_shows_a_worker(given: str, stages: int, wanted: str) -> None:
    loading = Loading("model.pth", device=given, gpu_memory=1 << 30)
    model: Any = SimpleNamespace(
        loading=loading, device=torch.device("cuda", 3), stages=[None] * stages, backend="triton"
    )
    sent = ray_engine._loading(model)
    assert (sent.device, sent.gpu_memory, sent.backend, sent.threads) == (wanted, 1 << 30, "triton", 1)


def test_a_cpu_stays_one_where_a_worker_has_a_gpu(bytes_model_path: Path) -> None:
    assert ray_engine._loading(load(bytes_model_path)).device == ("cuda:0" if torch.cuda.is_available() else "cpu")


def job(folder: str, model: Model) -> Job:
    return embed_job(folder, ["book.txt"], model=model, units="sentence", budget=16)
