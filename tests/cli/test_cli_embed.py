"""`embed` as a user meets it: tables and folders, exit codes, signals that leave nothing half."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from kills import wait_until
from program import program, started

from rwkv_stream.files import TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.tables.columns import embedding
from rwkv_stream.tables.jobs import LOCK, MANIFEST
from rwkv_stream.tables.whitening import Whitening


@pytest.fixture(autouse=True)
def place(program_folder: Path) -> Path:
    """A folder with a text and a table, the current one, and a model in the environment."""
    Path("book.txt").write_text("The lamp was lit. The sea was calm.\nA ship went by.")
    table = [{"key": f"k{i}", "body": f"Text number {i}. It is short."} for i in range(5)]
    Path("table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return program_folder


def test_a_table(bytes_model: Model) -> None:
    ended = program("embed", "book.txt", "-o", "out.parquet", "--unit", "sentence,document", "--json")
    report = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert {name: report[name] for name in ("output", "rows", "documents", "failed")} == {
        "output": "out.parquet",
        "rows": 4,
        "documents": 1,
        "failed": 0,
    }
    file = pq.ParquetFile("out.parquet")
    table = file.read()
    text = Path("book.txt").read_bytes()
    sentences = [row for row in table.to_pylist() if row["unit"] == "sentence"]
    assert [row["text"] for row in sentences] == ["The lamp was lit.", "The sea was calm.", "A ship went by."]
    assert [text[row["byte_start"] : row["byte_end"]].decode() for row in sentences] == [r["text"] for r in sentences]
    assert [row["line"] for row in sentences] == [1, 1, 2]
    assert table.column_names[:4] == ["document", "unit", "index", "text"]
    assert np.allclose(np.linalg.norm(np.array(table["embedding"].to_pylist()), axis=1), 1, atol=1e-6)
    metadata = table.schema.metadata
    assert metadata[b"model"].decode() == bytes_model.fingerprint == report["model"]
    assert {b"tokenizer", b"pooling", b"normalized", b"version"} <= set(metadata)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_json_lines_of_a_table_without_texts() -> None:
    options = ["--text-column", "body", "--id-column", "key", "--unit", "sentence", "--no-text"]
    ended = program("embed", "table.jsonl", "-o", "out.jsonl", *options)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert (ended.code, ended.out) == (0, "10\n")
    assert [(row["id"], row["index"]) for row in rows] == [(f"k{i}", j) for i in range(5) for j in range(2)]
    assert {row["text"] for row in rows} == {None}


def test_from_a_snapshot() -> None:
    assert program("ingest", "book.txt").code == 0
    options = ["--text-column", "body", "-o"]
    assert program("embed", "table.jsonl", *options, "plain.parquet").code == 0
    assert program("embed", "table.jsonl", *options, "after.parquet", "--from-snapshot", "book.txt").code == 0
    plain, after = pq.read_table("plain.parquet"), pq.read_table("after.parquet")
    assert plain.drop(["embedding"]).equals(after.drop(["embedding"]))
    assert not plain["embedding"].equals(after["embedding"])


def test_some_fail_and_all_fail() -> None:
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    ended = program("embed", "bad.jsonl", "-o", "out.parquet")
    assert (ended.code, ended.out) == (3, "1\n")
    assert "bad.jsonl#2" in ended.err and "1 of 2 documents failed" in ended.err
    assert pq.read_table("out.parquet").num_rows == 1
    Path("bad.jsonl").write_text('{"text": 5}\n')
    for output in ("none.parquet", "none/"):
        ended = program("embed", "bad.jsonl", "-o", output)
        assert (ended.code, "all 1 documents failed" in ended.err) == (1, True)
    assert not Path("none.parquet").exists()


def test_a_job_and_its_shards() -> None:
    job = ["embed", "table.jsonl", "book.txt", "--text-column", "body"]
    ended = program(*job, "-o", "one/", "--json")
    assert (ended.code, json.loads(ended.out)["rows"], json.loads(ended.out)["parts"]) == (0, 6, 1)
    for shard, rows in (("2/2", 0), ("1/2", 6)):
        assert program(*job, "-o", "two/", "--shard", shard).out == f"{rows}\n"
    assert pq.read_table("one/part-00000.parquet").equals(pq.read_table("two/part-00000.parquet"))
    assert program(*job, "-o", "one/").code == 0
    ended = program(*job, "-o", "one/", "--pooling", "last")
    assert (ended.code, "pooling" in ended.err) == (2, True)


def test_a_job_grows_and_is_made_anew() -> None:
    job = ["embed", "table.jsonl", "--text-column", "body", "--part-rows", 2, "-o", "out/"]
    assert program(*job).out == "5\n"
    with Path("table.jsonl").open("a") as file:
        file.writelines(json.dumps({"key": "new", "body": f"New number {i}."}) + "\n" for i in range(3))
    ended = program(*job, "--json")
    report = json.loads(ended.out)
    assert (ended.code, report["rows"], report["documents"], report["parts"]) == (0, 8, 8, 5)
    assert "new documents: 3, new parts: 2" in ended.err
    Path("table.jsonl").write_text('{"body": "Another text."}\n')
    ended = program(*job)
    assert (ended.code, "documents 1 to 2 of 'table.jsonl'" in ended.err, "--restart" in ended.err) == (2, True, True)
    ended = program(*job, "--restart")
    assert (ended.code, ended.out, "its 5 parts stay" in ended.err) == (0, "1\n", True)
    assert [path.name for path in Path("out").glob("*.parquet")] == ["part-00000.parquet"]


def test_whitening_is_kept_beside_the_rows() -> None:
    """Of a table and of a job, whose shards fit it together: the run that makes the last part."""
    texts = ["embed", "table.jsonl", "--text-column", "body", "--unit", "sentence", "-o"]
    assert program(*texts, "plain/").code == 0
    assert program(*texts, "white.parquet", "--whiten").code == 0
    assert program(*texts, "white/", "--whiten", "--shard", "1/2").code == 0
    fitted = Whitening.load("white/_rows.whitening.safetensors")
    assert fitted.digest == Whitening.load("white.whitening.safetensors").digest
    plain, white = (pq.read_table(f"{name}/part-00000.parquet") for name in ("plain", "white"))
    assert white.schema.metadata[b"whitening"].decode() == fitted.digest
    np.testing.assert_array_equal(embedding(white), fitted.apply(embedding(plain)))
    assert white.drop(["embedding"]).equals(plain.drop(["embedding"]))
    assert white.equals(pq.read_table("white.parquet"))
    ended = program(*texts, "white/")
    assert (ended.code, "whiten" in ended.err) == (2, True)
    found = json.loads(program("search", "Text number 3.", "white/", "--k", 1, "--json").out)
    assert (found["text"], found["score"]) == ("Text number 3.", pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "out.csv"],
        ["-o", "out.parquet", "--shard", "1/2"],
        ["-o", "out/", "--shard", "0/2"],
        ["-o", "out/", "--shard", "3/2"],
        ["-o", "out.parquet", "--unit", "word"],
        ["-o", "out.parquet", "--isolated", "--unit", "sentence,document"],
        [],
    ],
    ids=" ".join,
)
def test_usage(options: list[str]) -> None:
    before = sorted(Path().iterdir())
    assert program("embed", "book.txt", *options).code == 2
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("output", "number", "code"),
    [
        ("out.parquet", signal.SIGINT, 130),
        ("out.parquet", signal.SIGTERM, 143),
        ("out.jsonl", signal.SIGTERM, 143),
        ("out/", signal.SIGINT, 130),
    ],
)
def test_a_signal_leaves_nothing_half(place: Path, output: str, number: signal.Signals, code: int) -> None:
    Path("long.txt").write_text("The keeper walked over the bridge. " * 100_000)
    process = started("embed", "long.txt", "--unit", "sentence", "-o", output)
    wait_until(lambda: any(place.rglob(f"{TEMP_PREFIX}part-00000-*")) or process.poll() is not None)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    kept = {f"out/{MANIFEST}", f"out/{LOCK}"} if output == "out/" else set()
    found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert found - {"book.txt", "table.jsonl", "long.txt"} == kept
