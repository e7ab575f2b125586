"""Jobs that are killed, sharded, doubled and changed: every document has its rows once, in the order of the input."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_snapshots import in_child
from kills import killed, stop_at, wait_until

from rwkv_stream.errors import InputError, MismatchError, StoreLockedError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.tables.embed_jobs import embed_job, embed_table
from rwkv_stream.tables.jobs import FAILED, FAILPOINTS, Job

pytestmark = pytest.mark.usefixtures("one_thread")

N_ROWS = 70
WHITENING = "_rows.whitening.safetensors"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """A table of N_ROWS documents, two of which are none, a folder of small texts, and a larger text."""
    rng = random.Random(0)
    words = "the keeper walked over an old stone bridge toward the light".split()  # noqa: SIM905
    table = tmp_path / "table.jsonl"
    lines = [json.dumps({"id": f"a{i}", "text": " ".join(rng.choices(words, k=rng.randint(1, 30)))}) for i in range(70)]
    lines[3], lines[41] = "no JSON", json.dumps({"id": "x", "text": 5})
    table.write_text("\n".join(lines))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=20)) + ". Then it was night.")
    (tmp_path / "book.txt").write_text("The lamp was lit. " * 100)
    return [str(table), str(folder), str(tmp_path / "book.txt")]


def job(folder: Path, sources: list[str], model: Model, **options: Any) -> Job:
    small = {"units": ("sentence", "document"), "budget": 256, "part_rows": 18}
    return embed_job(folder, sources, model=model, **{**small, **options})


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


@pytest.fixture
def whole(tmp_path: Path, sources: list[str], bytes_model: Model) -> pa.Table:
    """The rows of a table that was written in one go."""
    path = tmp_path / "whole.parquet"
    embed_table(
        sources, path, model=bytes_model, units=("sentence", "document"), budget=256, on_failure=lambda failure: None
    )
    return pq.read_table(path)


def assert_whole(folder: Path, whole: pa.Table) -> None:
    assert rows_of(folder).equals(whole)
    assert [path.name for path in folder.rglob(f"{TEMP_PREFIX}*")] == []
    failed = [json.loads(line)["document"] for line in (folder / FAILED).read_text().splitlines()]
    assert [name.rpartition("#")[2] for name in failed] == ["4", "42"]


def test_a_job_is_the_table_in_parts(tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table) -> None:
    done = job(tmp_path / "out", sources, bytes_model)
    failures: list[str] = []
    progress = done.run(on_failure=lambda failure: failures.append(failure.document))
    assert_whole(tmp_path / "out", whole)
    assert len(done.parts) == 5
    assert (progress.rows, progress.documents, progress.failed) == (len(whole), N_ROWS - 2 + 9 + 1, 2)
    assert progress.total_documents == N_ROWS + 9 + 1
    assert len(failures) == 2
    order = list(dict.fromkeys(whole["document"].to_pylist()))
    assert order[:3] == [f"{sources[0]}#{i}" for i in (1, 2, 3)] and order[-1] == sources[2]


def test_again_nothing_is_made(tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table) -> None:
    first = job(tmp_path / "out", sources, bytes_model).run()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    again = job(tmp_path / "out", sources, bytes_model).run()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == times
    assert (again.rows, again.documents, again.failed) == (first.rows, first.documents, first.failed)
    assert again.tokens_now == 0 < first.tokens_now == again.tokens


def test_a_job_that_cannot_begin_leaves_no_folder(tmp_path: Path, sources: list[str], bytes_model: Model) -> None:
    for folder in (tmp_path / "out", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="expected a file or folder"):
            job(folder, [*sources, str(tmp_path / "missing.txt")], bytes_model)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "there").exists()
    begun = job(tmp_path / "out", sources, bytes_model)
    with pytest.raises(InputError, match="expected a file or folder"):
        job(tmp_path / "out", [*sources, str(tmp_path / "missing.txt")], bytes_model)
    assert begun.run().failed == 2


@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_job_killed_at_a_failpoint_goes_on(
    tmp_path: Path,
    sources: list[str],
    bytes_model: Model,
    whole: pa.Table,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    n_kills = 0
    for count in (1, 2, 4):
        monkeypatch.setenv(FAILPOINT_VARIABLE, f"{name}:{count}")
        n_kills += killed(in_child(lambda: job(out, sources, bytes_model).run()))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert n_kills >= 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    job(out, sources, bytes_model).run()
    assert_whole(out, whole)
    made_again = [path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns]
    assert len(made_again) <= 1


def test_a_job_killed_at_any_moment_goes_on(
    tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table
) -> None:
    out = tmp_path / "out"
    rng = random.Random(1)
    began = time.monotonic()
    assert not killed(in_child(lambda: job(tmp_path / "timed", sources, bytes_model).run()))
    whole_s = time.monotonic() - began
    n_kills = 0
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            try:
                job(out, sources, bytes_model).run()
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.02, 0.5) * whole_s)
        os.kill(pid, signal.SIGKILL)
        n_kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert n_kills >= 1
    job(out, sources, bytes_model).run()
    assert_whole(out, whole)


def test_shards_together_are_the_whole(tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table) -> None:
    out = tmp_path / "out"
    totals = [job(out, sources, bytes_model).run((i, 3)) for i in (2, 0, 1)]
    assert_whole(out, whole)
    assert sum(progress.rows for progress in totals) == len(whole)
    assert all(progress.rows for progress in totals)


def test_two_at_once_do_no_harm(tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table) -> None:
    out, stopped = tmp_path / "out", tmp_path / "stopped"
    pid = os.fork()
    if pid == 0:
        try:
            stop_at("job.part.begun", stopped)
            job(out, sources, bytes_model).run()
        finally:
            os._exit(0)
    wait_until(stopped.exists)
    with pytest.raises(StoreLockedError, match="part-00000"):
        job(out, sources, bytes_model).run()
    assert len(list(out.glob("*.parquet"))) == len(job(out, sources, bytes_model).parts) - 1
    stopped.unlink()
    os.waitpid(pid, 0)
    assert_whole(out, whole)


def test_a_part_that_was_taken_away_is_made_again(
    tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table
) -> None:
    out = tmp_path / "out"
    job(out, sources, bytes_model).run()
    (out / "part-00002.parquet").unlink()
    job(out, sources, bytes_model).run()
    assert_whole(out, whole)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("file", ["part-00002.parquet", "_progress/00002.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_part_that_is_not_the_one_that_was_made_is_made_again(
    tmp_path: Path,
    sources: list[str],
    bytes_model: Model,
    file: str,
    damage: str,
    whiten: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    job(out, sources, bytes_model, whiten=whiten).run()
    before = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    data = (out / file).read_bytes()
    at = len(data) // 2
    flipped = data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :]
    (out / file).write_bytes({"cut": data[:at], "empty": b"", "flipped": flipped}[damage])
    job(out, sources, bytes_model, whiten=whiten).run()
    assert {path.name: path.read_bytes() for path in out.glob("part-*.parquet")} == before
    assert "part-00002.parquet' is not the table that was made" in caplog.text


def test_another_job_is_refused(tmp_path: Path, sources: list[str], bytes_model: Model, bpe_model: Model) -> None:
    out = tmp_path / "out"
    job(out, sources, bytes_model).run((0, 2))
    others: dict[str, Any] = {"units": ("document",), "text": False, "pooling": "last"}
    for name, value in others.items():
        with pytest.raises(UsageError, match=f"begun with {name}"):
            job(out, sources, bytes_model, **{name: value})
    with pytest.raises(UsageError, match="inputs"):
        job(out, sources[:1], bytes_model)
    with pytest.raises(MismatchError, match=f"expected the model {bytes_model.fingerprint[:12]}"):
        job(out, sources, bpe_model)
    (tmp_path / "texts" / "4.txt").write_text("Another text.")
    with pytest.raises(UsageError, match=r"document 1 of '.*4\.txt' as it was begun with, found 13 bytes"):
        job(out, sources, bytes_model)


def test_a_folder_of_other_tables_is_refused(tmp_path: Path, sources: list[str], bytes_model: Model) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(UsageError, match="another folder"):
        job(tmp_path / "out", sources, bytes_model)


def test_whitening_is_kept_beside_its_table(tmp_path: Path, sources: list[str], bytes_model: Model) -> None:
    from rwkv_stream.tables.embeddings import rows
    from rwkv_stream.tables.whitening import SUFFIX, Whitening
    from rwkv_stream.text.readers import documents

    path = tmp_path / "white.parquet"
    embed_table(sources, path, model=bytes_model, budget=256, whiten=True, on_failure=lambda failure: None)
    fitted = Whitening.load(path.with_suffix(SUFFIX))
    table = pq.read_table(path)
    assert table.schema.metadata[b"whitening"].decode() == fitted.digest
    wanted = rows(
        documents(sources, rows=True), model=bytes_model, budget=256, whitening=fitted, on_failure=lambda failure: None
    )
    assert pa.Table.from_batches(list(wanted), wanted.schema)["embedding"].equals(table["embedding"])
    assert not list(tmp_path.glob(f"{TEMP_PREFIX}*"))


def test_a_table_none_of_whose_documents_can_be_read(tmp_path: Path, bytes_model: Model) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 5}\n{"text": 6}\n')
    with pytest.raises(InputError, match="all 2 documents"):
        embed_table([str(tmp_path / "bad.jsonl")], tmp_path / "out.parquet", model=bytes_model, on_failure=print)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def whitened_by(folder: Path) -> pa.Table:
    from rwkv_stream.tables.whitening import Whitening

    fitted = Whitening.load(folder / WHITENING)
    for path in sorted(folder.glob("*.parquet")):
        assert pq.read_schema(path).metadata[b"whitening"].decode() == fitted.digest
    return rows_of(folder)


def test_a_whitened_job_is_the_whitened_table(
    tmp_path: Path, sources: list[str], bytes_model: Model, whole: pa.Table
) -> None:
    import numpy as np

    from rwkv_stream.tables.columns import embedding
    from rwkv_stream.tables.whitening import Whitening

    job(tmp_path / "out", sources, bytes_model, whiten=True).run()
    made = whitened_by(tmp_path / "out")
    assert made.drop(["embedding"]).equals(whole.drop(["embedding"]))
    fitted = Whitening.load(tmp_path / "out" / WHITENING)
    assert fitted.rows == len(whole)
    assert np.array_equal(embedding(made.combine_chunks()), fitted.apply(embedding(whole)))
    vectors = embedding(whole).astype(np.float64)
    assert np.allclose(fitted.mean, vectors.mean(0), atol=1e-12)
    with pytest.raises(UsageError, match="begun with whiten"):
        job(tmp_path / "out", sources, bytes_model)


def test_shards_together_whiten_as_one(tmp_path: Path, sources: list[str], bytes_model: Model) -> None:
    job(tmp_path / "one", sources, bytes_model, whiten=True).run()
    for i in (2, 0, 1):
        assert not (tmp_path / "three" / "_rows.whitening.safetensors").exists()
        job(tmp_path / "three", sources, bytes_model, whiten=True).run((i, 3))
    assert whitened_by(tmp_path / "three").equals(whitened_by(tmp_path / "one"))
    (tmp_path / "three" / "part-00002.parquet").unlink()
    job(tmp_path / "three", sources, bytes_model, whiten=True).run()
    assert whitened_by(tmp_path / "three").equals(whitened_by(tmp_path / "one"))
