"""The approximate index of a folder: what it finds against the exact search, and when it is built, built again, kept,
or done without."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kills import killed
from program import program

import rwkv_stream as rs
from rwkv_stream.errors import UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.tables import search, vector_index
from rwkv_stream.tables.columns import FORMAT, schema
from rwkv_stream.tables.search import Hit, Vectors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("usearch") is None, reason="the extra `index` is not installed"
)

D, K, N_QUERIES = 32, 10, 20
Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index from 1,000 rows on, of segments of 3,000."""
    monkeypatch.setattr(search, "ROWS", 1000)
    monkeypatch.setattr(vector_index, "SEGMENT_ROWS", 3000)


def clustered(n: int, rng: np.random.Generator, centres: Array) -> Array:
    """Vectors around centres, as texts lie around subjects; of any length."""
    near = centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, centres.shape[1]))
    return (near * rng.uniform(0.1, 1e5, (n, 1))).astype(np.float32)


def write_part(path: Path, given: Array, units: Sequence[str] = ("sentence",), first: int = 0, **made_by: str) -> None:
    """A part with these vectors; the row i of all is of document str(i), and units take turns."""
    n = len(given)
    names = [str(first + i) for i in range(n)]
    columns: dict[str, Any] = {name: [0] * n for name in schema(given.shape[1]).names}
    columns |= {"document": names, "unit": [units[i % len(units)] for i in range(n)], "text": ["x"] * n}
    columns["excerpt"] = [None] * n
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(given.ravel()), given.shape[1])
    metadata = {
        "format": FORMAT,
        "model": "m",
        "pooling": "mean",
        "normalized": "false",
        "whitening": "",
        "budget": "256",
    }
    path.parent.mkdir(exist_ok=True)
    made = pa.table(columns, schema=schema(given.shape[1]).with_metadata({**metadata, **made_by}))
    pq.write_table(made, path, row_group_size=700)


def write_parts(folder: Path, given: Array, size: int = 2500, **options: Any) -> None:
    for number, first in enumerate(range(0, len(given), size)):
        write_part(folder / f"part-{number:05}.parquet", given[first : first + size], first=first, **options)


def segments(folder: Path) -> dict[str, int]:
    """The inodes of the folders of segments."""
    return {path.name: path.stat().st_ino for path in (folder / "_index").iterdir() if path.is_dir()}


def ways(hits: Sequence[Hit]) -> set[str]:
    return {hit.search for hit in hits}


def test_recall_and_scores_are_those_of_the_exact_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((100, D)).astype(np.float32)
    units = ("sentence",) * 9 + ("document",)
    write_parts(tmp_path, clustered(10_000, rng, centres), units=units)
    opened = Vectors(tmp_path)
    for unit in (None, "sentence", "document"):
        found = 0
        for query in clustered(N_QUERIES, rng, centres):
            near = opened.nearest(query, k=K, unit=unit)
            exact = opened.nearest(query, k=K, unit=unit, exact=True)
            assert (ways(near), ways(exact)) == ({"approximate"}, {"exact"})
            assert [hit.rank for hit in near] == list(range(1, K + 1))
            assert unit is None or {hit.unit for hit in near} == {unit}
            scores = {hit.document: hit.score for hit in exact}
            both = [hit for hit in near if hit.document in scores]
            assert all(hit.score == scores[hit.document] for hit in both)
            found += len(both)
        assert found / (N_QUERIES * K) >= 0.95
    assert len(segments(tmp_path)) == 4
    assert {path.stat().st_mode for path in (tmp_path / "_index").iterdir() if path.is_dir()} == {
        (tmp_path / "_index").stat().st_mode  # others may read it
    }
    with pytest.raises(UsageError, match="document or sentence, found 'chunk'"):
        opened.nearest(query, unit="chunk")
    assert all(len(opened.nearest(query, k=k, unit="document")) == 1000 for k in (1000, 1001))  # as many as there are


def test_rows_that_are_alike_are_all_found(tmp_path: Path) -> None:
    """Nine of ten rows are one of three vectors, as in a log; a few have no direction."""
    rng = np.random.default_rng(1)
    given = rng.standard_normal((8000, D)).astype(np.float32)
    common = rng.random(8000) < 0.9
    given[common] = given[:3][rng.integers(0, 3, common.sum())]
    given[[5, 4000]] = 0
    write_parts(tmp_path, given)
    opened, queries, found = Vectors(tmp_path), (*given[:3], *given[np.flatnonzero(~common)[:20]]), 0
    for query in queries:
        near = opened.nearest(query, k=K)
        assert ways(near) == {"approximate"}
        exact = {(hit.document, hit.score) for hit in opened.nearest(query, k=K, exact=True)}
        found += len(exact & {(hit.document, hit.score) for hit in near})
    assert found / (K * len(queries)) >= 0.9  # the graph is built by several threads: not twice the same


def test_small_folders_and_files_are_searched_exactly(tmp_path: Path) -> None:
    given = np.random.default_rng(2).standard_normal((1001, D)).astype(np.float32)
    write_parts(tmp_path / "small", given[:1000])
    write_part(tmp_path / "large.parquet", given)
    for name in ("small", "large.parquet"):
        assert ways(rs.search(given[0], tmp_path / name)) == {"exact"}
    assert {path.name for path in tmp_path.rglob("*")} == {"small", "part-00000.parquet", "large.parquet"}
    write_parts(tmp_path / "small", given)
    assert ways(rs.search(given[0], tmp_path / "small")) == {"approximate"}
    assert ways(rs.search(given[0], tmp_path / "small", exact=True)) == {"exact"}


def test_it_is_built_again_where_parts_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = np.random.default_rng(3).standard_normal((9000, D)).astype(np.float32)
    write_parts(tmp_path, given[:7500])
    rs.search(given[0], tmp_path)
    first = segments(tmp_path)
    assert [record.args[1:] for record in caplog.records] == [(7500,)]  # type: ignore[index]
    rs.search(given[1], tmp_path)
    assert segments(tmp_path) == first
    write_part(tmp_path / "part-00003.parquet", given[7500:], first=7500)
    assert rs.search(given[8999], tmp_path)[0].document == "8999"
    grown = segments(tmp_path)
    assert len(grown.items() & first.items()) == 2  # only the last segment has new rows
    assert [record.args[1:] for record in caplog.records] == [(7500,), (3000,)]  # type: ignore[index]
    given[4000] = -given[4000]
    write_part(tmp_path / "part-00001.parquet", given[2500:5000], first=2500)
    assert rs.search(given[4000], tmp_path)[0].document == "4000"
    assert len(segments(tmp_path)) == 3
    assert len(segments(tmp_path).items() & grown.items()) == 1  # that without rows of the part
    (tmp_path / "part-00003.parquet").unlink()
    assert "8999" not in {hit.document for hit in rs.search(given[8999], tmp_path)}


@pytest.mark.parametrize("step", ["index.written", "index.published"])
def test_a_killed_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    given = np.random.default_rng(4).standard_normal((7500, D)).astype(np.float32)
    write_parts(tmp_path, given)
    child = os.fork()
    if not child:
        os.environ[FAILPOINT_VARIABLE] = f"{step}:2"
        rs.search(given[0], tmp_path)
        os._exit(0)
    assert killed(os.waitpid(child, 0)[1])
    strays = list((tmp_path / "_index").glob(f"{TEMP_PREFIX}*"))
    left = {name: inode for name, inode in segments(tmp_path).items() if not name.startswith(TEMP_PREFIX)}
    assert (len(left), len(strays)) == ((1, 1) if step == "index.written" else (2, 0))
    assert [hit.document for hit in rs.search(given[7000], tmp_path, k=1)] == ["7000"]
    assert left.items() < segments(tmp_path).items()
    assert len(segments(tmp_path)) == 3
    assert {path.name for path in (tmp_path / "_index").iterdir()} == {"lock", *segments(tmp_path)}


def test_where_there_can_be_no_index_the_search_is_exact_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = np.random.default_rng(5).standard_normal((1500, D)).astype(np.float32)
    write_parts(tmp_path, given)

    def said(hits: Sequence[Hit]) -> str:
        assert (ways(hits), hits[0].document) == ({"exact"}, "7")
        (record,) = caplog.records
        caplog.clear()
        return record.getMessage()

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "usearch", None)
        patch.delitem(sys.modules, "usearch.index", raising=False)
        assert "pip install 'rwkv-stream[index]'" in said(rs.search(given[7], tmp_path))
    (tmp_path / "_index").write_text("no folder")
    assert "there can be no index" in said(rs.search(given[7], tmp_path))
    (tmp_path / "_index").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(vector_index, "make_folder", read_only)
        assert "Read-only file system" in said(rs.search(given[7], tmp_path))
    assert not (tmp_path / "_index").exists()
    (tmp_path / "_index").mkdir()
    with (tmp_path / "_index" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is making" in said(rs.search(given[7], tmp_path))
    assert ways(rs.search(given[7], tmp_path)) == {"approximate"}
    caplog.clear()
    with monkeypatch.context() as patch:  # one that is there serves
        patch.setattr(vector_index, "make_folder", read_only)
        assert ways(rs.search(given[7], tmp_path)) == {"approximate"}
    graph = next((tmp_path / "_index").rglob("0.usearch"))
    graph.write_bytes(graph.read_bytes()[:-1])
    assert "damaged index" in said(rs.search(given[7], tmp_path))


def read_only(folder: Path) -> None:
    raise OSError(30, os.strerror(30), str(folder))


def test_a_model_that_is_loaded_after_a_search_has_its_native_kernels(tmp_path: Path, bytes_model_path: Path) -> None:
    """usearch comes with an OpenMP runtime of its own, beside which they cannot be loaded any more."""
    given = np.random.default_rng(7).standard_normal((1500, D)).astype(np.float32)
    write_parts(tmp_path, given)
    probe = f"""
import sys, numpy as np, rwkv_stream as rs, rwkv_stream.tables.search
rwkv_stream.tables.search.ROWS = 1000
if sys.argv[1:]:
    print(rs.search(np.ones({D}, np.float32), {str(tmp_path)!r})[0].search)
print(rs.load({str(bytes_model_path)!r}, device="cpu").backend)
"""
    alone, after = (
        subprocess.run([sys.executable, "-Ic", probe, *args], capture_output=True, text=True, check=True).stdout.split()
        for args in ([], ["search"])
    )
    assert after == ["approximate", *alone]


def test_the_program_says_which_search_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model: Model, bytes_model_path: Path
) -> None:
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.setattr(logging.getLogger("rwkv_stream"), "handlers", [])
    given = np.random.default_rng(6).standard_normal((1500, bytes_model.config.n_embd)).astype(np.float32)
    write_parts(tmp_path / "rows", given, model=bytes_model.fingerprint)
    for options, way, note in (
        (["--exact"], "exact", ""),
        ([], "approximate", "note: indexing"),
        ([], "approximate", ""),
    ):
        ended = program("search", "gulls", tmp_path / "rows", "--json", *options)
        assert ended.code == 0, ended.err
        assert {json.loads(line)["search"] for line in ended.out.splitlines()} == {way}
        assert ended.err.startswith(note) and bool(ended.err) == bool(note)
