"""Inputs that grow, change and go away under a job, restarts, and the parts of a table."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_snapshots import in_child
from kills import killed, stop_at, wait_until

import rwkv_stream as rs
from rwkv_stream.errors import StoreLockedError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.tables import switch
from rwkv_stream.tables.embed_jobs import EmbeddingWork, embed_job, embed_table
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.jobs import FAILED, RESTART, Job
from rwkv_stream.tables.whitening import SUFFIX, Whitening

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"budget": 64, "part_rows": 3}


def texts(first: int, end: int) -> list[dict[str, Any]]:
    return [{"id": i, "text": f"Text {i} of the keeper."} for i in range(first, end)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def job(model: Model, *sources: str, folder: str = "out", **options: Any) -> Job:
    return embed_job(folder, sources or ["in"], model=model, **{**SMALL, **options})


def rows_of(folder: str = "out") -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet")))


def times(folder: str = "out") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.parquet")}


def assert_like_new(model: Model, *sources: str, **options: Any) -> None:
    """Rows of the job in `out`, grown or not, are those of one over the inputs as they are now."""
    job(model, *sources, folder="new", **options).run()
    grown, new = (rows_of(name).sort_by([("document", "ascending"), ("index", "ascending")]) for name in ("out", "new"))
    assert grown.equals(new)
    assert [path.name for path in Path("out").rglob(f"{TEMP_PREFIX}*")] == []


# ---- kinds of inputs that grow ----


def csv(n: int) -> None:
    Path("in").mkdir(exist_ok=True)
    Path("in/a.csv").write_text("id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in texts(0, n)))


def parquet(n: int) -> None:
    Path("in").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(texts(0, n)), "in/a.parquet", row_group_size=2)


def folder(n: int) -> None:
    """New names stand before and between the old ones."""
    Path("in").mkdir(exist_ok=True)
    for i in range(n):
        Path(f"in/{i * 7 % 10}.txt").write_text(f"Text {i} of the keeper.")


def warc(n: int) -> None:
    pytest.importorskip("warcio")
    from warcio.warcwriter import WARCWriter

    Path("in").mkdir(exist_ok=True)
    with Path("in/a.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for i in range(n):
            headers = {"Content-Type": "text/plain"}
            writer.write_record(
                writer.create_warc_record(
                    f"http://a.example/{i}",
                    "resource",
                    payload=io.BytesIO(f"Text {i} of the keeper.".encode()),
                    warc_content_type=headers["Content-Type"],
                )
            )


def tar(n: int) -> None:
    Path("in").mkdir(exist_ok=True)
    with tarfile.open("in/a.tar", "w") as archive:
        for i in range(n):
            data = f"Text {i} of the keeper.".encode()
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def zip_(n: int) -> None:
    Path("in").mkdir(exist_ok=True)
    with zipfile.ZipFile("in/a.zip", "w") as archive:
        for i in range(n):
            archive.writestr(f"{i}.txt", f"Text {i} of the keeper.")


def compressed(write: Callable[[bytes], bytes], name: str) -> Callable[[int], None]:
    """JSON Lines that grow by a member, and a file behind them that does not."""

    def make(n: int) -> None:
        Path("in").mkdir(exist_ok=True)
        members = [lines(texts(0, 5))] + ([lines(texts(5, n))] if n > 5 else [])
        Path("in", name).write_bytes(b"".join(map(write, members)))
        Path("in/b.jsonl").write_bytes(lines(texts(100, 104)))

    return make


KINDS: dict[str, Callable[[int], None]] = {
    "jsonl": compressed(lambda data: data, "a.jsonl"),
    "gzip": compressed(gzip.compress, "a.jsonl.gz"),
    "bz2": compressed(bz2.compress, "a.jsonl.bz2"),
    **{"csv": csv, "parquet": parquet, "folder": folder, "warc": warc, "tar": tar, "zip": zip_},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_new_makes_new_parts(bytes_model: Model, kind: str) -> None:
    KINDS[kind](5)
    before = job(bytes_model)
    before.run()
    made = times()
    KINDS[kind](9)
    grown = job(bytes_model)
    assert grown.parts[: len(before.parts)] == before.parts
    assert sum(part.documents for part in grown.parts) == sum(part.documents for part in before.parts) + 4
    totals = grown.run()
    assert {name: time for name, time in times().items() if name in made} == made
    assert totals.documents == len(rows_of()) == totals.skipped + 4
    assert job(bytes_model).parts == grown.parts
    assert_like_new(bytes_model)


def test_it_grows_again_and_in_several_files(bytes_model: Model) -> None:
    """Three generations of parts, the last of which was given up before; new sources may stand anywhere."""
    for n in (4, 5, 9):
        for name in ("a", "b"):
            Path(f"{name}.jsonl").write_bytes(lines(texts(0, n)))
        made = job(bytes_model, "a.jsonl", "b.jsonl")
        if n != 5:
            made.run()
    assert [part.generation for part in made.parts] == [0, 0, 0, 1, 2, 2, 2]
    Path("0.jsonl").write_bytes(lines(texts(0, 2)))
    job(bytes_model, "a.jsonl", "0.jsonl", "b.jsonl").run()
    assert_like_new(bytes_model, "a.jsonl", "0.jsonl", "b.jsonl")
    with pytest.raises(UsageError, match=r"found 'b\.jsonl' left out or elsewhere"):
        job(bytes_model, "b.jsonl", "a.jsonl", "0.jsonl")


def test_stdin_and_pipes_are_read_once(bytes_model: Model) -> None:
    options: dict[str, Any] = {"reading": {"name": "feed", "text_column": "text"}}
    for n in (4, 9):
        with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines(texts(0, n))))):
            job(bytes_model, "-", **options).run()
    assert rows_of()["document"].to_pylist() == [f"feed#{i}" for i in range(1, 10)]
    assert len(times()) == 2 + 2
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(lines(texts(0, 4))))
    writer.start()
    job(bytes_model, "pipe", folder="piped", reading={"text_column": "text"}).run()
    writer.join()
    assert rows_of("piped")["document"].to_pylist() == [f"pipe#{i}" for i in range(1, 5)]
    assert [path.name for path in Path().rglob(f"{TEMP_PREFIX}*")] == []


def test_shards_share_what_is_new(bytes_model: Model) -> None:
    KINDS["jsonl"](5)
    job(bytes_model).run()
    KINDS["jsonl"](19)
    totals = [job(bytes_model).run((i, 2)) for i in (1, 0)]
    assert sum(total.rows for total in totals) == 19 + 4
    assert_like_new(bytes_model)


def test_a_job_that_was_stopped_grows_meanwhile(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["jsonl"](5)
    monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.recorded:2")
    assert killed(in_child(lambda: job(bytes_model).run()))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert len(times()) == 2
    KINDS["jsonl"](9)
    job(bytes_model).run()
    assert_like_new(bytes_model)


def test_search_finds_what_is_new(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with an index, of which only what new parts touch is built again."""
    pytest.importorskip("usearch", reason="usearch is not installed (extra `index`)")
    monkeypatch.setattr("rwkv_stream.tables.search.ROWS", 1)
    monkeypatch.setattr("rwkv_stream.tables.vector_index.SEGMENT_ROWS", 4)
    found = []
    for n in (8, 12):
        Path("in.jsonl").write_bytes(lines(texts(0, n)))
        job(bytes_model, "in.jsonl").run()
        (query,) = rs.embed([f"Text {n - 1} of the keeper."], model=bytes_model, budget=64)
        (hit,) = rs.search(query, "out", k=1)
        assert (hit.document, hit.search) == (f"in.jsonl#{n}", "approximate")
        found.append({path.name: path.stat().st_mtime_ns for path in Path("out/_index").iterdir() if path.is_dir()})
    assert [len(segments) for segments in found] == [2, 3]
    assert found[0].items() < found[1].items()


def test_parts_are_decided_once(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a trial of the model, for about a minute; however fast a later run finds it."""
    KINDS["jsonl"](12)
    borders = []
    for speed in (1.0, 1000.0):  # documents have about 21 bytes; 60 bytes are 64, to a power of two
        monkeypatch.setattr(EmbeddingWork, "bytes_per_s", lambda work, speed=speed: speed)
        begun = embed_job("out", ["in"], model=bytes_model, budget=64)
        borders.append([part.documents for part in begun.parts])
    assert borders == [[4, 4, 3, 3, 2]] * 2
    assert len(embed_job("new", ["in"], model=bytes_model, budget=64).parts) == 1
    with pytest.raises(UsageError, match="begun with part_rows 20000, found 5"):
        embed_job("out", ["in"], model=bytes_model, budget=64, part_rows=5)


def test_the_trial_is_of_the_model(bytes_model: Model) -> None:
    assert 1 < EmbeddingWork(bytes_model, Embedding(budget=64)).bytes_per_s() < 1e12


def half_a_row(n: int) -> None:
    """A log whose last row is being written."""
    data = lines(texts(0, n))
    Path("in/a.jsonl").write_bytes(data if n > 5 else data[:-9])


def half_a_member(n: int) -> None:
    data = gzip.compress(lines(texts(0, n)), compresslevel=0)
    Path("in/a.jsonl").unlink(missing_ok=True)
    Path("in/a.jsonl.gz").write_bytes(data if n > 5 else data[:150])


def only_the_whole_rows(n: int) -> None:
    """What was being written is taken back."""
    half_a_row(5)
    if n > 5:
        Path("in/a.jsonl").write_bytes(lines(texts(0, 4)))


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("make", "lost"), [(half_a_row, 1), (half_a_member, 2), (only_the_whole_rows, 1)])
def test_what_was_not_whole_is_read_again(
    bytes_model: Model, make: Callable[[int], None], lost: int, whiten: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its part is made again, no other. (Of a member, a row is half one, and what follows is told of as one, too.)"""
    KINDS["jsonl"](5)
    make(5)
    begun = job(bytes_model, whiten=whiten)
    assert begun.run().failed == lost
    assert job(bytes_model, whiten=whiten).parts == begun.parts
    made = {path.name: path.stat().st_mtime_ns for path in Path("out/_progress").iterdir()}
    make(9)
    grown = job(bytes_model, whiten=whiten)
    assert grown.run().failed == 0
    assert not Path("out", FAILED).exists()
    again = {name for name, time in made.items() if Path("out/_progress", name).stat().st_mtime_ns != time}
    assert len(again) == 1
    assert (
        "could not be read before can be read now" in caplog.text and "not the table that was made" not in caplog.text
    )
    assert job(bytes_model, whiten=whiten).parts == grown.parts
    assert_like_new(bytes_model, whiten=whiten)


# ---- inputs that do not grow ----


def changed_row() -> None:
    Path("in/a.jsonl").write_bytes(lines([*texts(0, 4), {"id": 4, "text": "Text 5 of the keeper."}, *texts(5, 9)]))


def changed_id() -> None:
    Path("in/a.jsonl").write_bytes(lines([{"id": 7, "text": "Text 0 of the keeper."}, *texts(1, 5)]))


def fewer_rows() -> None:
    Path("in/a.jsonl").write_bytes(lines(texts(0, 4)))


def removed() -> None:
    Path("in/a.jsonl").unlink()


def longer_text() -> None:
    Path("in/c.txt").write_text("A text. And more of it.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_row, r"documents 4 to 5 of 'in/a\.jsonl' .* found as many bytes, but others"),
        (changed_id, r"documents 1 to 3 of 'in/a\.jsonl' .* found as many bytes, but others"),
        (fewer_rows, r"documents 4 to 5 of 'in/a\.jsonl' .* found no more than 4"),
        (removed, r"documents 1 to 3 of 'in/a\.jsonl', with which it was begun, found none in their place"),
        (longer_text, r"document 1 of 'in/c\.txt' .* found 23 bytes of text instead of 7"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_changes_are_refused_by_name(bytes_model: Model, change: Callable[[], None], message: str) -> None:
    KINDS["jsonl"](5)
    Path("in/c.txt").write_text("A text.")
    job(bytes_model).run()
    made = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    change()
    with pytest.raises(UsageError, match=message + ".*--restart"):
        job(bytes_model)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == made


def test_a_file_that_changes_while_it_is_embedded(bytes_model: Model) -> None:
    KINDS["jsonl"](5)
    begun = job(bytes_model)
    changed_row()
    with pytest.raises(UsageError, match="changed while it ran"):
        begun.run()
    assert sorted(times()) == ["part-00000.parquet"]


# ---- restarts ----


def test_a_restart_leaves_the_old_job_until_it_is_whole(bytes_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    KINDS["jsonl"](8)
    Path("in/a.jsonl").write_bytes(lines([*texts(0, 7), {"id": 7, "text": 5}]))
    job(bytes_model).run()
    assert Path("out", FAILED).exists()
    old = {path.name: path.read_bytes() for path in Path("out").glob("*.*")}
    KINDS["jsonl"](5)
    for shard in ((0, 2), (1, 2)):
        assert {path.name: path.read_bytes() for path in Path("out").glob("*.*")} == old
        job(bytes_model, pooling="last", restart=True).run(shard)
    assert "its 4 parts stay until the new ones are whole" in caplog.text
    assert not Path("out", FAILED).exists() and not Path("out", RESTART).exists()
    assert job(bytes_model, pooling="last").missing() == []
    assert_like_new(bytes_model, pooling="last")


def test_a_restart_goes_on_while_it_fits(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS["jsonl"](5)
    job(bytes_model).run()
    monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.recorded:2")
    assert killed(in_child(lambda: job(bytes_model, restart=True).run()))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    begun = times("out/_restart")
    assert len(begun) == 2
    again = job(bytes_model, restart=True)
    assert times("out/_restart") == begun and len(again.missing()) == 1
    assert len(job(bytes_model, restart=True, pooling="last").missing()) == 3
    assert times("out/_restart") == {}


def test_a_restart_with_and_without_whitening(bytes_model: Model) -> None:
    """All that belongs to the old job goes, all that belongs to the new one comes."""
    KINDS["jsonl"](5)
    for whiten in (False, True, False):
        job(bytes_model, whiten=whiten, restart=True).run()
        job(bytes_model, whiten=whiten, folder=f"new {whiten}").run()
        names = {str(path.relative_to("out")) for path in Path("out").rglob("*")}
        assert names == {str(path.relative_to(f"new {whiten}")) for path in Path(f"new {whiten}").rglob("*")}
        assert rows_of().equals(rows_of(f"new {whiten}"))


def test_a_folder_within_its_inputs_is_refused(bytes_model: Model) -> None:
    KINDS["jsonl"](5)
    with pytest.raises(UsageError, match="found it in 'in'"):
        job(bytes_model, folder="in/out")
    assert not Path("in/out").exists()


# ---- whitening ----


def fitted(folder: str = "out") -> Whitening | None:
    """What all tables that are there were whitened by; it lies beside them."""
    found = {pq.read_schema(path).metadata[b"whitening"].decode() for path in Path(folder).glob("*.parquet")}
    assert len(found) <= 1
    if not found:
        return None
    whitening = Whitening.load(f"{folder}/_rows{SUFFIX}")
    assert found == {whitening.digest}
    return whitening


def test_a_whitened_job_is_fitted_again(bytes_model: Model) -> None:
    KINDS["csv"](5)
    job(bytes_model, whiten=True).run()
    first = fitted()
    KINDS["csv"](9)
    for shard in ((0, 2), (1, 2)):
        assert fitted().digest == first.digest and len(rows_of()) == 5  # type: ignore[union-attr]
        job(bytes_model, whiten=True).run(shard)
    assert fitted().rows == 9  # type: ignore[union-attr]
    assert_like_new(bytes_model, whiten=True)
    made = times()
    job(bytes_model, whiten=True).run()
    assert times() == made


# ---- tables ----


def table(model: Model, output: str = "out.parquet", **options: Any) -> Any:
    return embed_table(["in"], Path(output), model=model, **{**SMALL, **options})


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_a_table_keeps_its_parts_until_it_is_whole(
    bytes_model: Model, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS["jsonl"](5)
    table(bytes_model, f"whole{Path(output).suffix}")
    Path(output).write_text("of old")
    monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.recorded:2")
    assert killed(in_child(lambda: table(bytes_model, output)))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert Path(output).read_text() == "of old"
    totals = table(bytes_model, output)
    assert (totals.rows, totals.skipped) == (9, 6)
    assert Path(output).read_bytes() == Path(f"whole{Path(output).suffix}").read_bytes()
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in", output, f"whole{Path(output).suffix}"])


def test_parts_of_another_table_are_left(
    bytes_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    KINDS["jsonl"](5)
    for options in ({"pooling": "last"}, {"restart": True}, {}):
        monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.recorded:2")
        assert killed(in_child(lambda: table(bytes_model)))
        monkeypatch.delenv(FAILPOINT_VARIABLE)
        if not options:
            changed_row()
        caplog.clear()
        assert table(bytes_model, **options).skipped == 0
        assert "into 'out.parquet'" in caplog.text and "is left, and it begins anew" in caplog.text
    assert sorted(path.name for path in Path().iterdir()) == ["in", "out.parquet"]


def test_what_an_earlier_run_could_not_read_is_told_again(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").mkdir()
    Path("in/a.jsonl").write_bytes(lines([{"text": 5}, *texts(0, 9)]))
    monkeypatch.setenv(FAILPOINT_VARIABLE, "job.part.recorded:2")
    assert killed(in_child(lambda: table(bytes_model, on_failure=lambda failure: None)))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    told: list[str] = []
    assert table(bytes_model, on_failure=lambda failure: told.append(failure.document)).failed == 1
    assert told == ["in/a.jsonl#1"]


def test_a_table_that_another_run_is_at_work_on(bytes_model: Model, tmp_path: Path) -> None:
    KINDS["jsonl"](5)
    stopped = tmp_path / "stopped"
    pid = os.fork()
    if pid == 0:
        try:
            stop_at("job.part.whole", stopped)
            table(bytes_model)
        finally:
            os._exit(0)
    wait_until(stopped.exists)
    with pytest.raises(StoreLockedError, match=r"begun with pooling .* another run is at work"):
        table(bytes_model, pooling="last")
    with pytest.raises(StoreLockedError, match=r"1 more parts, .* on part-00000"):
        table(bytes_model)
    stopped.unlink()
    os.waitpid(pid, 0)
    assert table(bytes_model, "again.parquet").rows == len(pq.read_table("out.parquet"))
    assert pq.read_table("out.parquet").equals(pq.read_table("again.parquet"))


# ---- killed at every step of publishing ----


def steps(kind: str) -> list[str]:
    return [f"{kind}.{step}" for step in ("written", "synced", "renamed", "published")]


def is_old_job() -> None:
    """The parts of the old job are as they were."""
    assert rows_of().slice(0, 9).equals(pq.read_table("old.parquet"))


def is_one_job() -> None:
    """What is there is of the old job or of the new one; all of either until the switch."""
    poolings = {pq.read_schema(path).metadata[b"pooling"].decode() for path in Path("out").glob("*.parquet")}
    assert len(poolings) <= 1
    if Path("out", RESTART).exists():
        assert poolings == {"mean"} and len(rows_of()) == 9


def is_one_fit() -> None:
    """Tables are there only with what they were fitted by; all of them but in the switch."""
    fitted()
    if not any(Path("out", name).exists() for name in (switch.READY, switch.ARRIVING)):
        assert len(rows_of()) in (9, 13)


def is_a_table() -> None:
    """It is the old one or the new one, and search finds what it was fitted by."""
    whole = pq.read_table("out.parquet")
    assert len(whole) in (9, 13)
    digests = {Whitening.load(path).digest for path in Path().glob(f"*{SUFFIX}")}
    assert whole.schema.metadata[b"whitening"].decode() in digests


Case = tuple[list[str], Callable[[Model], object], Callable[[Model], object], Callable[[], None]]
CASES: dict[str, Case] = {  # where it is killed, what was there, what is killed, what must hold whenever it is
    "grow": (
        [*steps("job"), *steps("table")],
        lambda model: job(model).run(),
        lambda model: job(model).run(),
        is_old_job,
    ),
    "restart": (
        [*steps("job"), *switch.FAILPOINTS],
        lambda model: job(model).run(),
        lambda model: job(model, pooling="last", restart=True).run(),
        is_one_job,
    ),
    "whiten": (
        [*steps("job"), *steps("table"), "job.part.fitted", *switch.FAILPOINTS],
        lambda model: job(model, whiten=True).run(),
        lambda model: job(model, whiten=True).run(),
        is_one_fit,
    ),
    "table": (
        [*steps("table"), "job.part.recorded", "job.fit.renamed"],
        lambda model: table(model, whiten=True),
        lambda model: table(model, whiten=True),
        is_a_table,
    ),
}


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CASES[case][0]])
def test_killed_at_a_step(bytes_model: Model, case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first passing; then, going on, at its second and third. In the end it is as if it had not been."""
    _, prepare, run, check = CASES[case]
    KINDS["jsonl"](5)
    prepare(bytes_model)
    if case == "grow":
        embed_table(["in"], Path("old.parquet"), model=bytes_model, budget=64)
    KINDS["jsonl"](9)
    kills = 0
    for count in (1, 2, 3):
        monkeypatch.setenv(FAILPOINT_VARIABLE, f"{name}:{count}")
        kills += killed(in_child(lambda: run(bytes_model)))
        check()
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert kills >= 1
    if case == "restart":  # a restart that has ended is not made again
        options: dict[str, Any] = {"pooling": "last"}
        ended = not Path("out", RESTART).exists() and not Path("out", switch.READY).exists()
        job(bytes_model, restart=not ended, **options).run()
        assert_like_new(bytes_model, **options)
    elif case == "table":
        run(bytes_model)
        embed_table(["in"], Path("new.parquet"), model=bytes_model, whiten=True, **SMALL)
        assert pq.read_table("out.parquet").equals(pq.read_table("new.parquet"), check_metadata=True)
        names = ["in", "new.parquet", f"new{SUFFIX}", "out.parquet", f"out{SUFFIX}"]
        assert sorted(path.name for path in Path().iterdir()) == names
    else:
        run(bytes_model)
        assert_like_new(bytes_model, whiten=case == "whiten")
    check()
