"""An evaluation is a folder of cells: it goes on where it was stopped, grows, and refuses what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.evaluation import cells, run
from rwkv_stream.evaluation.cells import OTHERS, Evaluation, Measures
from rwkv_stream.evaluation.report import report
from rwkv_stream.evaluation.tasks import TASKS
from rwkv_stream.interrupts import Interruption
from rwkv_stream.model import Model

SMALL: dict[str, Any] = {
    "lengths": (700, 900),
    "depths": (0.0, 100.0),
    "trials": 1,
    "tasks": ("niah_single", "passkey"),
}


def trials(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of cells, as they are measured."""
    found: list[str] = []
    before = Measures.trials

    def noted(self: Measures, cell: cells.Cell) -> Iterator[cells.Trial]:
        found.append(cell["key"])
        return before(self, cell)

    monkeypatch.setattr(Measures, "trials", noted)
    return found


def test_what_was_stopped_goes_on_and_is_what_it_would_have_been(
    bytes_model: Model, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Evaluation(**SMALL)
    whole = run.run(asked, bytes_model, tmp_path / "whole")
    keys = ["niah_single 700", "niah_single 900", "passkey 700", "passkey 900"]
    assert [cell["key"] for cell in whole.cells] == measured == keys and not whole.failures
    measured.clear()
    noted = Measures.trials

    def stopped(self: Measures, cell: cells.Cell) -> Iterator[cells.Trial]:
        found = noted(self, cell)
        yield next(found)
        if cell["key"] == keys[2]:
            raise Interruption(2)
        yield from found

    with monkeypatch.context() as patch:
        patch.setattr(Measures, "trials", stopped)
        with pytest.raises(Interruption):
            run.run(asked, bytes_model, tmp_path / "stopped")
    parts = sorted(path.name for path in (tmp_path / "stopped/cells").iterdir() if not path.name.startswith("_"))
    assert parts == ["part-00000.parquet", "part-00001.parquet"], "what is whole, and nothing else"
    measured.clear()
    progress = run.Progress()
    again = run.run(asked, bytes_model, tmp_path / "stopped", progress)
    assert measured == keys[2:] and (progress.before, progress.done, progress.total) == (2, 4, 4)

    def comparable(path: Path) -> list[dict[str, Any]]:  # what was shared differs where it began
        return [{**trial, "computed": None} for trial in trials(path)]

    assert comparable(again.trials) == comparable(whole.trials)


def test_a_folder_grows_by_what_is_asked_for_next(bytes_model: Model, tmp_path: Path, measured: list[str]) -> None:
    run.run(Evaluation(**SMALL | {"lengths": (700,)}), bytes_model, tmp_path)
    before = trials(tmp_path / run.TRIALS)
    measured.clear()
    found = run.run(Evaluation(**SMALL | {"tasks": ("copy", "passkey"), "lengths": (900, 700)}), bytes_model, tmp_path)
    assert measured == ["copy 900", "copy 700", "passkey 900"]
    keys = ["niah_single 700", "passkey 700", *measured]
    assert [cell["key"] for cell in found.cells] == keys
    assert trials(found.trials)[: len(before)] == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "'niah_single 700' was begun with seed 0, found 1"),
        ({"trials": 2}, "was begun with trials 1, found 2"),
        ({"depths": (50.0,)}, r"was begun with depths \[0.0, 100.0\], found \[50.0\]"),
        ({"haystack": "other.txt"}, "was begun with haystack "),
        ({"lengths": (90, 700)}, None),
    ],
)
def test_what_would_be_measured_otherwise_is_refused(
    bytes_model: Model, tmp_path: Path, change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("Another text. " * 40)
    run.run(Evaluation(**SMALL | {"lengths": (700,)}), bytes_model, tmp_path / "out")
    plan = (tmp_path / "out" / run.PLAN).read_bytes()
    told = r"making 'niah_single': expected \d+ tokens or more, found 90"
    with pytest.raises(UsageError, match=told if reason is None else reason + ".*; use the same inputs and options"):
        run.run(Evaluation(**SMALL | {"lengths": (900, 700)} | change), bytes_model, tmp_path / "out")
    assert (tmp_path / "out" / run.PLAN).read_bytes() == plan


def test_another_model_is_refused(bytes_model: Model, bpe_model: Model, tmp_path: Path) -> None:
    run.run(Evaluation(**SMALL | {"lengths": (700,)}), bytes_model, tmp_path)
    with pytest.raises(MismatchError, match=f"expected the model {bytes_model.fingerprint[:12]} that began it"):
        run.run(Evaluation(**SMALL), bpe_model, tmp_path)


def test_a_plan_that_is_none_is_said(bytes_model: Model, tmp_path: Path) -> None:
    (tmp_path / run.PLAN).write_text("{}\n")
    with pytest.raises(UsageError, match="expected what an evaluation wrote"):
        run.run(Evaluation(**SMALL), bytes_model, tmp_path)


def inputs(folder: Path) -> dict[str, Any]:
    """Questions on two documents and on one without a text, pairs, and texts of several kinds."""
    rows = [
        {"document": name, "question": f"{ask} {name}?", "answers": [name], "context": f"{name} was {ask} in spring."}
        for name in ("Ann", "Bo", "Cy")
        for ask in ("here", "there")
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"question": "?"}\n')
    texts = [{"id": name, "text": f"{name} was here. {name} was there. " * 3} for name in ("Ann", "Bo")]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pairs = [("a cat", "a cat sat", 4.0), ("a cat", "no dogs", 1.0), ("one two", "one two three", 5.0)]
    lines = [json.dumps({"sentence1": a, "sentence2": b, "score": score}) for a, b, score in pairs]
    (folder / "p.jsonl").write_text("\n".join(lines))
    (folder / "long.txt").write_text("The keeper walked over an old stone bridge. " * 12)
    (folder / "short.txt").write_text("The end.")
    sources = (str(folder / "long.txt"), str(folder / "short.txt"))
    return {
        "sources": sources, "data": folder / "q.jsonl", "texts": folder / "t.jsonl", "pairs": folder / "p.jsonl"
    }  # fmt: skip


def test_questions_passages_pairs_and_positions_are_measured(bytes_model: Model, tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    asked = Evaluation(tasks=tuple(OTHERS), **inputs(tmp_path))
    measured = run.run(asked, bytes_model, tmp_path / "out")
    told = [str(failure) for failure in measured.failures]
    assert len(told) == 3 and "q.jsonl', row 7: expected the text 'question'" not in told[0]
    assert "row 7: expected texts as 'answers'" in told[0]
    for of_strategy in told[1:]:  # each that needs the text
        assert "expected one with the id 'Cy', found none" in of_strategy
    found = report(measured.trials, "m", "f")
    assert [(answers.strategy, answers.n) for answers in found.qa] == [("state", 4), ("passage", 6), ("quote", 4)]
    assert [(one.method, one.n) for one in found.retrieval] == [("vectors", 6), ("bm25", 6)]
    assert found.retrieval[0].floor == pytest.approx(3 / 4) and found.retrieval[1].score == 1
    assert [(one.method, one.n) for one in found.similarity] == [("vectors", 3), ("words", 3)]
    assert found.similarity[1].spearman == pytest.approx(1)
    size = 12 * len("The keeper walked over an old stone bridge. ")
    assert [(p.token_start, p.token_end, p.documents) for p in found.position] == [
        (0, 64, 2), (64, 128, 1), (128, 256, 1), (256, 512, 1), (512, 1024, 1)
    ]  # fmt: skip
    assert sum(p.bytes for p in found.position) in (size + 8, size + 6), "a first byte may have no prediction"
    assert not found.recall


def test_a_pipe_cannot_be_read_again(bytes_model: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    asked = Evaluation(tasks=("position",), sources=(str(tmp_path / "pipe"),))
    with pytest.raises(UsageError, match="expected a file, which is read more than once, found a pipe"):
        run.run(asked, bytes_model, tmp_path / "out")


def test_positions_are_the_bits_that_score_counts(bytes_model: Model, tmp_path: Path) -> None:
    from rwkv_stream.tables.score import score

    given = inputs(tmp_path)["sources"]
    measured = run.run(Evaluation(tasks=("position",), sources=given), bytes_model, tmp_path / "out")
    for source in given:
        scored = score(source, model=bytes_model, unit="token")
        units = list(scored)
        rows = [trial for trial in trials(measured.trials) if trial["document"] == source]
        assert sum(row["bits"] for row in rows) == pytest.approx(scored.bits)
        assert sum(row["tokens"] for row in rows) == len(units)
        inside = [unit for unit in units if 64 <= unit.token_start < 128]
        assert [row["tokens"] for row in rows if row["length"] == 128] == ([len(inside)] if inside else [])


def test_another_strategy_or_more_documents_measure_no_question_twice(
    bytes_model: Model, tmp_path: Path, measured: list[str]
) -> None:
    given = {**inputs(tmp_path), "texts": None, "sources": (), "pairs": None, "tasks": ("qa",)}
    run.run(Evaluation(**given, strategies=("passage",), limit=2), bytes_model, tmp_path / "out")
    assert measured == ["qa passage Ann 0", "qa passage Bo 2"]
    measured.clear()
    run.run(Evaluation(**given), bytes_model, tmp_path / "out")
    assert measured == [
        *("qa state Ann 0", "qa state Bo 2", "qa state Cy 4", "qa passage Cy 4"),
        *("qa quote Ann 0", "qa quote Bo 2", "qa quote Cy 4"),
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tasks": ("niah",)}, "expected tasks of niah_single, .*, found 'niah'"),
        ({"tasks": ("qa",)}, "expected --data for the task qa, found none"),
        ({"tasks": ("position",)}, "expected documents for the task position"),
        ({"lengths": (0,)}, "expected lengths from 1 to"),
        ({"lengths": (5, 5)}, "each once, found 5, 5"),
        ({"depths": (101.0,)}, "expected depths from 0 to 100"),
        ({"trials": 0}, "expected 1 trial or more"),
        ({"haystack": "-"}, "found stdin; write it to a file"),
        ({"sources": ("a", "-")}, "found stdin; write it to a file"),
        ({"strategies": ("guess",)}, "expected a strategy of"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Evaluation(**options)


def test_without_a_choice_all_is_measured_that_there_are_inputs_for() -> None:
    assert Evaluation().chosen == tuple(TASKS)
    assert Evaluation(sources=("x",), data=Path("q")).chosen == (*TASKS, "position", "qa", "retrieval")
    assert Evaluation(tasks=("vt", "vt"), sources=("x",)).chosen == ("vt",)


@pytest.mark.parametrize("name", ["data", "pairs", "haystack"])
def test_inputs_that_are_missing_are_said_before_anything_is_measured(
    bytes_model: Model, tmp_path: Path, name: str
) -> None:
    task = {"data": "qa", "pairs": "similarity", "haystack": "vt"}[name]
    missing: Any = tmp_path / "none.jsonl" if name != "haystack" else str(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run.run(Evaluation(tasks=(task,), **{name: missing}), bytes_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
