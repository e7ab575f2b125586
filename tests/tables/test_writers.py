"""Tables are whole or absent, hold what was written, and are cut into bounded row groups."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkv_stream.errors import OutputError, UsageError
from rwkv_stream.tables import writers
from rwkv_stream.tables.writers import Writer

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("bits", pa.float64()),
        ("parts", pa.list_(pa.struct([("a", pa.int64())]))),
    ]
)


pytestmark = pytest.mark.filterwarnings("error")  # complaints of collected objects among them


def rows(n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        yield {"name": f"Zeile {i} “é漢”\n", "size": i, "bits": i / 3, "parts": [{"a": i}], "not a column": 0}


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pq.read_table(path).to_pylist()


def expected(n: int) -> list[dict[str, Any]]:
    return [{name: row[name] for name in SCHEMA.names} for row in rows(n)]


@pytest.fixture(params=[".jsonl", ".parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"table{request.param}"


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_what_was_written_is_read(path: Path, n: int) -> None:
    with Writer(path, SCHEMA) as writer:
        writer.write(rows(n))
        assert not path.exists()
    assert writer.rows == n
    assert read(path) == expected(n)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_several_writes_are_one_table(path: Path) -> None:
    with Writer(path, SCHEMA) as writer:
        for row in rows(300):
            writer.write([row])
    assert read(path) == expected(300)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("n", [3, 700])
def test_an_exception_leaves_the_old_table(path: Path, error: type[BaseException], n: int) -> None:
    path.write_bytes(b"old")

    def failing() -> Iterator[dict[str, Any]]:
        yield from rows(n)
        raise error("of the caller")

    with pytest.raises(error, match="of the caller"), Writer(path, SCHEMA) as writer:
        writer.write(failing())
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("limit", [0, 100, 3000])
def test_a_full_disk_leaves_the_old_table(path: Path, limit: int) -> None:
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match=r"table\..*File too large") as caught, Writer(path, SCHEMA) as writer:
            writer.write(rows(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    missing = path.parent / "no" / path.name
    with pytest.raises(OutputError, match=f"{missing}.*No such file"), Writer(missing, SCHEMA):
        pytest.fail("the block was entered")


def test_a_folder_of_that_name(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OutputError, match=f"{path}.*folder"), Writer(path, SCHEMA):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("name", ["table.csv", "table", "table.jsonl.gz", ".parquet"])
def test_other_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.jsonl or \.parquet"):
        Writer(tmp_path / name, SCHEMA)
    assert list(tmp_path.iterdir()) == []


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "GROUP_BYTES", 20_000)
    path = tmp_path / "table.parquet"
    long = [{"name": "x" * (30_000 if i == 500 else 50), "size": i, "bits": 0.0, "parts": []} for i in range(2000)]
    with Writer(path, SCHEMA) as writer:
        writer.write(long)
    assert read(path) == long
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    table = pq.ParquetFile(path)
    sizes = [table.read_row_group(i).nbytes for i in range(len(groups))]
    assert len(groups) > 5
    assert sum(size > 25_000 for size in sizes) <= 1  # the row that is larger than a group stands almost alone
    assert max(g.num_rows for g in groups) < 400


def test_parquet_metadata_and_compression(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    with Writer(path, SCHEMA, {"rwkv_stream.model": "3f9c"}) as writer:
        writer.write(rows(10))
    file = pq.ParquetFile(path)
    assert file.schema_arrow.metadata[b"rwkv_stream.model"] == b"3f9c"
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.schema_arrow.equals(SCHEMA)
