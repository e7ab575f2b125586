"""A document's row is the same bits alone, in any batch, in any order, in shards, and through Ray."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rwkv_stream as rs
from rwkv_stream.kernels import available
from rwkv_stream.model import Model, load
from rwkv_stream.tables.columns import embedding
from rwkv_stream.tables.embed_jobs import embed_job

N = 60
BUDGETS = (64, 256, 1024)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    rng = random.Random(4)
    words = "the keeper walked over an old stone bridge toward the light while gulls cried".split()  # noqa: SIM905
    return [" ".join(rng.choices(words, k=rng.choice((1, 3, 9, 30, 120)))) + f" {i}" for i in range(N)]


@pytest.fixture
def table(documents: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


@pytest.fixture(scope="module")
def alone(documents: list[str], bytes_model: Model) -> np.ndarray:
    return np.concatenate([rs.embed([text], model=bytes_model, budget=64) for text in documents])


def test_alone_in_batches_and_in_two_orders(documents: list[str], alone: np.ndarray, bytes_model: Model) -> None:
    """Bit for bit in calls of one size; between sizes of calls products may differ in the last bit."""
    if available()["cpu"] is not None:
        pytest.skip("the fallback gives 1e-5, see test_embeddings.py")
    assert len(np.unique(alone, axis=0)) == N
    assert np.array_equal(rs.embed(documents, model=bytes_model, budget=64), alone)
    assert np.array_equal(rs.embed(documents[::-1], model=bytes_model, budget=64)[::-1], alone)
    for budget in BUDGETS:
        together = rs.embed(documents, model=bytes_model, budget=budget)
        singly = np.concatenate([rs.embed([text], model=bytes_model, budget=budget) for text in documents[::9]])
        assert np.array_equal(together[::9], singly), budget
        assert np.abs(together - alone).max() <= 1e-6, budget


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def made(folder: Path, table: Path, model: Model, shard: tuple[int, int] = (0, 1)) -> None:
    embed_job(folder, [str(table)], model=model, units=("document",), budget=64, part_rows=9).run(shard)


def test_in_three_shards(table: Path, alone: np.ndarray, bytes_model: Model, tmp_path: Path) -> None:
    made(tmp_path / "one", table, bytes_model)
    for i in (2, 0, 1):
        made(tmp_path / "three", table, bytes_model, (i, 3))
    whole, shards = rows_of(tmp_path / "one"), rows_of(tmp_path / "three")
    assert shards.equals(whole)
    assert whole["id"].to_pylist() == [str(i) for i in range(N)]
    if available()["cpu"] is None:
        assert np.array_equal(embedding(whole), alone)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra `ray`)")
def test_through_ray(table: Path, alone: np.ndarray, bytes_model_path: Path, tmp_path: Path) -> None:
    import ray

    from rwkv_stream.tables import ray_engine

    model = load(bytes_model_path, device="cpu")
    job = embed_job(tmp_path / "ray", [str(table)], model=model, units=("document",), budget=64, part_rows=9)
    try:
        ray_engine.run(job, workers=2)
    finally:
        ray.shutdown()
    rows = rows_of(tmp_path / "ray")
    assert rows["id"].to_pylist() == [str(i) for i in range(N)]
    if available()["cpu"] is None:
        assert np.array_equal(embedding(rows), alone)
