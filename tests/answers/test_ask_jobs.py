"""Many questions on many documents: each document by itself, each row once, whoever is killed on the way."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_snapshots import in_child
from kills import killed
from program import program

import rwkv_stream as rs
from rwkv_stream.answers import indexed, prompts, strategies
from rwkv_stream.answers.answer import answer_schema
from rwkv_stream.answers.ask_jobs import AskingWork
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.quote import quotes
from rwkv_stream.answers.strategy import Manner, Subject
from rwkv_stream.errors import OutputError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE
from rwkv_stream.model import Model
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.store import Store, texts
from rwkv_stream.tables import ray_engine
from rwkv_stream.tables.jobs import FAILED, Job, make_table
from rwkv_stream.tables.parts import Watched
from rwkv_stream.tables.ray_engine import SentJob
from rwkv_stream.text.readers.places import Place

pytestmark = pytest.mark.usefixtures("one_thread")

KEEPERS = ["Jonas Weller", "Ada Brandt", "Henrik Aske", "Mila Storm", "Otto Vane", "Ines Karr", "Paul Ede"]
PLACES = ["Marrow Point", "Brindle", "Lund", "Vell", "Cape Orrin", "Tarn", "Sable Reach"]
ASKED = ("Who kept the lighthouse?", "Where did the keeper plant a walnut tree?", "Which planet was colonised?")
QUESTIONS = tuple(Question(text, f"q{i}", i) for i, text in enumerate(ASKED))


def tale(i: int) -> str:
    return (
        f"The rain had stopped by noon.\n\n{KEEPERS[i]} kept the lighthouse at {PLACES[i]}. In spring the keeper "
        f"planted a walnut tree behind the tower of {PLACES[i]}.\n\nThe ferry came on Tuesdays. Nobody read letters.\n"
    )


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder of four tales, and a table of three, with ids that are numbers, and a row that is none."""
    monkeypatch.chdir(tmp_path)
    Path("tales").mkdir()
    for i in range(4):
        Path("tales", f"{i}.txt").write_text(tale(i))
    rows = [json.dumps({"id": 100 + i, "text": tale(i)}) for i in range(4, 7)]
    Path("table.jsonl").write_text("\n".join([rows[0], "no JSON", *rows[1:]]))
    return ["tales", "table.jsonl"]


NAMES = [*(f"tales/{i}.txt" for i in range(4)), *(f"table.jsonl#{i}" for i in (1, 3, 4))]


def job(folder: str, sources: list[str], work: AskingWork | None = None, **options: Any) -> Job:
    return Job(folder, sources, work or AskingWork(QUESTIONS), **{"part_rows": 2, **options})


def rows_of(folder: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pa.concat_tables(
        pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))
    ).to_pylist()
    return found


@pytest.fixture
def whole(sources: list[str]) -> list[dict[str, Any]]:
    """The rows of a table that was written in one go."""
    failures: list[str] = []
    work = AskingWork(QUESTIONS)
    make_table(Path("whole.parquet"), sources, work, part_rows=99, on_failure=lambda f: failures.append(f.document))
    assert failures == ["table.jsonl#2"]
    return pq.read_table("whole.parquet").to_pylist()


def test_each_document_is_asked_by_itself(whole: list[dict[str, Any]]) -> None:
    assert pq.read_schema("whole.parquet").names == ["document", *answer_schema().names]
    asked = [(row["document"], row["id"], row["question"]) for row in whole]
    assert asked == [(name, one.id, one.text) for name, one in itertools.product(NAMES, QUESTIONS)]
    for i, rows in enumerate(zip(*[iter(whole)] * len(QUESTIONS), strict=True)):
        data = tale(i).encode()
        for row, question in zip(rows, QUESTIONS, strict=True):
            expected = next(iter(quotes(question.text, [MemoryText(tale(i))])), None)
            assert row["answer"] == (expected and expected.answer)
            assert (row["strategy"], row["tokens"], row["snapshot"]) == ("quote", 0, None)
            for source in row["sources"]:
                assert (source["document"], source["snapshot"]) == (row["document"], None)
                assert data[source["byte_start"] : source["byte_end"]].decode() == source["text"]
                line = data[: row["byte_start"]].count(b"\n") + 1
                place = {"row": [1, 3, 4][i - 4], "id": str(100 + i)} if i >= 4 else {"line": line}
                assert {name: value for name, value in source["place"].items() if value is not None} == place
        assert KEEPERS[i] in rows[0]["answer"] and rows[2]["answer"] is None


def test_a_text_is_indexed_as_one_in_memory_in_however_many_extents(
    sources: list[str], whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (texts, indexed):
        monkeypatch.setattr(module, "EXTENT_BYTES", 50)
    job("out", sources).run()
    assert rows_of("out") == whole


class Sectioned:
    """A document of two chapters, which says where both begin before it gives a piece."""

    name, place, has_lines = "book", Place(), False

    def text(self) -> Sectioned:
        return self

    def __enter__(self) -> Sectioned:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def on_section(self, told: Callable[[int, Place], object]) -> None:
        self.told = told

    def __iter__(self) -> Iterator[bytes]:
        self.told(0, {"chapter": "A"})
        self.told(6, {"chapter": "B"})
        yield from (b"Some. ", b"Then more.")


@pytest.mark.parametrize("extent_bytes", [6, 7, 1000])
def test_chapters_begin_where_they_do(extent_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "EXTENT_BYTES", extent_bytes)
    with indexed.indexed(cast(Watched, Sectioned())) as text:
        assert [text.place(byte)["chapter"] for byte in (0, 5, 6, 15)] == ["A", "A", "B", "B"]
        assert text.read(0, 99) == b"Some. Then more."


def test_what_a_killed_process_left_is_removed(
    sources: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    Path("temporary").mkdir()
    made = job("out", sources)
    with monkeypatch.context() as patch:
        patch.setattr(strategies, "answers", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert killed(in_child(made.run))
    (own,) = Path("temporary").iterdir()
    assert len([*own.iterdir()]) == 1 and own.stat().st_mode & 0o777 == 0o700
    job("out", sources).run()
    assert [*own.iterdir()] == []
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="a folder of yours"):
        job("other", sources).run()


@pytest.mark.parametrize("name", ["job.part.rows", "job.part.whole", "table.written", "job.part.recorded"])
def test_a_job_that_is_killed_loses_and_doubles_no_row(
    sources: list[str], whole: list[dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_kills = 0
    for count in (1, 2):
        monkeypatch.setenv(FAILPOINT_VARIABLE, f"{name}:{count}")
        n_kills += killed(in_child(lambda: job("out", sources).run()))
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    assert n_kills == 2 and len(job("out", sources).missing()) > 0
    totals = job("out", sources).run()
    assert rows_of("out") == whole
    assert (totals.rows, totals.documents, totals.failed) == (len(whole), 7, 1)


def test_a_job_grows_with_its_documents(sources: list[str], whole: list[dict[str, Any]]) -> None:
    job("out", ["tales"]).run()
    assert rows_of("out") == whole[: 4 * len(QUESTIONS)]
    job("out", sources).run()
    assert rows_of("out") == whole


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"questions": QUESTIONS[:2]}, 'questions "3 ('),
        ({"questions": (*QUESTIONS[:2], Question("Who?", "q2", 2))}, 'questions "3 ('),
        ({"k": 2}, "k 1, found 2"),
    ],
    ids=str,
)
def test_other_questions_are_refused(sources: list[str], other: dict[str, Any], named: str) -> None:
    job("out", sources).run()
    before = rows_of("out")
    with pytest.raises(UsageError, match="asking into 'out'") as refused:
        job("out", sources, AskingWork(**{"questions": QUESTIONS, **other}))
    assert named in str(refused.value)
    assert rows_of("out") == before


def test_another_strategy_is_refused_and_begun_anew(sources: list[str], bytes_model: Model) -> None:
    work = AskingWork(QUESTIONS[:1], "state", model=bytes_model, sampling=Sampling(temperature=0, max_tokens=2))
    job("out", ["tales"]).run()
    with pytest.raises(UsageError, match='strategy "quote", found "state"'):
        job("out", ["tales"], work)
    job("out", ["tales"], work, restart=True).run()
    assert {row["strategy"] for row in rows_of("out")} == {"state"}
    with pytest.raises(UsageError, match='strategy "state", found "quote"'):
        job("out", ["tales"])


def test_a_state_answers_as_that_of_a_snapshot(sources: list[str], bytes_model: Model, tmp_path: Path) -> None:
    sampling = Sampling(temperature=1, seed=3, max_tokens=6)
    work = AskingWork(QUESTIONS, "state", model=bytes_model, sampling=sampling)
    totals = job("out", ["tales"], work).run()
    store = Store(tmp_path / "store", create=True)
    rows = rows_of("out")
    for i in range(4):
        name = f"tales/{i}.txt"
        rs.ingest(name, model=bytes_model, store=store)
        expected = list(rs.ask(QUESTIONS, snapshot=store.get(name), model=bytes_model, sampling=sampling))
        mine = [row for row in rows if row["document"] == name]
        assert [(row["answer"], row["tokens"], row["id"]) for row in mine] == [
            (one.answer, one.tokens, one.id) for one in expected
        ]
        assert all(row["sources"][0]["byte_end"] == len(tale(i).encode()) for row in mine)
    assert totals.tokens == sum(row["tokens"] for row in rows) > 0


def test_passages_are_read_again(sources: list[str], bytes_model: Model) -> None:
    work = AskingWork(QUESTIONS, "reread", model=bytes_model, sampling=Sampling(temperature=0, max_tokens=4))
    make_table(Path("out.parquet"), ["tales/0.txt"], work)
    rows = pq.read_table("out.parquet").to_pylist()
    subject = Subject("tale", bytes_model, texts=[MemoryText(tale(0))])
    found = strategies.replies(QUESTIONS, strategies.named("reread"), subject, Manner(sampling=work.sampling))
    expected = [reply for _, (reply,) in found]
    assert [row["answer"] for row in rows] == [one.text for one in expected]
    assert [source["text"] for row in rows for source in row["sources"]] == [
        subject.texts[0].read(*span[1:]).decode() for one in expected for span in one.spans or ()
    ]
    assert pq.read_schema("out.parquet").metadata[b"model"].decode() == bytes_model.fingerprint


@pytest.mark.parametrize(
    "arguments",
    [
        {"questions": ()},
        {"questions": (Question(" "),)},
        {"questions": QUESTIONS, "k": 0},
        {"questions": QUESTIONS, "strategy": "state"},
        {"questions": QUESTIONS, "strategy": "passage"},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        AskingWork(**arguments)


@pytest.mark.parametrize("strategy", ["quote", "state"])
def test_a_worker_of_ray_makes_the_same_rows(
    sources: list[str], whole: list[dict[str, Any]], strategy: str, bytes_model: Model
) -> None:
    """By what it is sent, without Ray."""
    work = AskingWork(QUESTIONS)
    if strategy == "state":
        work = AskingWork(QUESTIONS, "state", model=bytes_model, sampling=Sampling(temperature=0, max_tokens=2))
        make_table(Path("whole.parquet"), sources, work, on_failure=lambda failure: None)
        whole = pq.read_table("whole.parquet").to_pylist()
    here = job("out", sources, work)
    sent = pickle.loads(pickle.dumps(SentJob.of(here)))
    made = ray_engine._Actor(sent)({"item": [part.number for part in here.parts]})
    assert made["error"] == [None] * len(here.parts) and len(here.parts) == 4
    assert rows_of("out") == whole


# ---- the program ----


@pytest.fixture
def questions(sources: list[str]) -> str:
    Path("q.jsonl").write_text("".join(json.dumps({"question": one.text, "id": one.id}) + "\n" for one in QUESTIONS))
    return "q.jsonl"


def test_a_damaged_document_is_one_line_and_the_rest_is_asked(
    sources: list[str], whole: list[dict[str, Any]], questions: str
) -> None:
    asked = ("ask", "--questions", questions, "--documents", "tales", "--documents", "table.jsonl")
    ended = program(*asked, "-o", "out/", "--json")
    assert (ended.code, ended.err.count("table.jsonl#2")) == (3, 1), ended.err
    said = json.loads(ended.out)
    assert (said["rows"], said["documents"], said["failed"], said["model"]) == (len(whole), 7, 1, None)
    assert rows_of("out") == whole
    assert [json.loads(line)["document"] for line in Path("out", FAILED).read_text().splitlines()] == ["table.jsonl#2"]
    assert program(*asked, "-o", "out.jsonl").code == 3
    assert [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()] == whole
    ended = program(*asked, "-o", "out/", "--strategy", "state", "--max-tokens", 2)
    assert (ended.code, 'strategy "quote", found "state"' in ended.err) == (2, True)


def test_shards_are_of_one_job(sources: list[str], whole: list[dict[str, Any]], questions: str) -> None:
    asked = ("ask", "--questions", questions, "--documents", "tales", "-o", "out/", "--part-rows", 1)
    for i in (1, 2):
        assert program(*asked, "--shard", f"{i}/2").code == 0
    assert rows_of("out") == whole[: 4 * len(QUESTIONS)]


def test_torch_is_loaded_by_no_question(sources: list[str], questions: str) -> None:
    probe = (
        "import sys; from rwkv_stream.cli.program import run; "
        f"sys.argv[1:] = ['ask', '--questions', '{questions}', '--documents', 'tales', '-o', 'out/']; "
        "code = run(); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-Ic", probe], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert len(rows_of("out")) == 4 * len(QUESTIONS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["Who?", "--documents", "tales"], "QUESTION"),
        (["--documents", "tales", "--all", "--questions", "q.jsonl", "-o", "out/"], "--all"),
        (["--documents", "tales", "--within", "line:1", "--questions", "q.jsonl", "-o", "out/"], "--within"),
        (["--documents", "tales", "--until", "x", "--questions", "q.jsonl", "-o", "out/"], "--until"),
        (["--documents", "tales", "--questions", "q.jsonl", "-o", "out/", "--strategy", "cells"], "found 'cells'"),
        (["--documents", "tales", "--questions", "q.jsonl"], "-o"),
        (["--documents", "tales", "-o", "out/"], "--questions"),
        (["--documents", "tales", "--questions", "q.jsonl", "-o", "out/", "--seed", "1"], "--seed"),
        (["--documents", "tales", "--questions", "q.jsonl", "-o", "out/", "--strategy", "state", "--k", "2"], "--k"),
        (["--documents", "tales", "--questions", "q.jsonl", "-o", "o.jsonl", "--shard", "1/2"], "--shard"),
        (["Who?", "--all", "--part-rows", "4"], "--part-rows"),
        (["Who?", "--all", "--id-column", "x"], "--id-column"),
        (["Who?", "--all", "--name", "x"], "--name"),
        (["--documents", "-", "--questions", "q.jsonl", "-o", "out.jsonl"], "--name"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(questions: str, options: list[str], told: str) -> None:
    ended = program("ask", *options)
    assert (ended.code, ended.out, told in ended.err) == (2, "", True), ended.err
    assert not list(Path().glob("out*"))


def test_answers_of_the_model_are_sampled_as_its_family_is(
    sources: list[str], questions: str, bytes_model: Model, bytes_model_path: Path
) -> None:
    asked = ("ask", "--questions", questions, "--documents", "tales/0.txt", "--model", bytes_model_path)
    assert program(*asked, "-o", "a.parquet", "--strategy", "state", "--max-tokens", 3, "--threads", 1).code == 0
    stated = pq.read_table("a.parquet").to_pylist()
    sampling = prompts.family(bytes_model).sampling
    assert max(row["tokens"] for row in stated) <= 3 < sampling.max_tokens
