"""`eval`: tables on stdout, a folder that goes on, and one line for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from program import program
from tiny_models import official_weights, save

from rwkv_stream.evaluation import cells
from rwkv_stream.interrupts import Interruption

FEW = ("eval", "--task", "passkey,look_up", "--lengths", "300,400", "--depths", "0,100", "--trials", "1")


def test_tables_are_printed_and_nothing_is_kept(program_folder: Path) -> None:
    ended = program(*FEW)
    assert ended.code == 0
    title, head, *rows = ended.out.splitlines()
    assert title == "Recall, % (tokens read)" and head.split("\t") == ["task", "floor", "300", "400"]
    assert [row.split("\t")[0] for row in rows] == ["passkey", "look_up", "mean"]
    assert "computed: " in ended.err
    assert [*program_folder.iterdir()] == []


def test_a_folder_has_all_and_goes_on(program_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    before = cells.Measures.trials

    def stopped(self: cells.Measures, cell: cells.Cell) -> Iterator[cells.Trial]:
        yield from before(self, cell)
        if cell["key"] == "passkey 400":
            raise Interruption(2)

    with monkeypatch.context() as patch:
        patch.setattr(cells.Measures, "trials", stopped)
        ended = program(*FEW, "-o", "out")
    assert ended.code == 130 and "stopped by SIGINT; what is measured is kept" in ended.err and ended.out == ""
    assert len([*(program_folder / "out/cells").glob("part-*.parquet")]) == 1
    ended = program(*FEW, "-o", "out", "--json")
    assert ended.code == 0 and "4 cells in 'out', the page is 'out/report.html'" in ended.err
    found = json.loads(ended.out)
    assert [(score["task"], score["length"], score["n"]) for score in found["recall"]] == [
        ("passkey", 300, 2), ("passkey", 400, 2), ("look_up", 300, 2), ("look_up", 400, 2)
    ]  # fmt: skip
    assert json.loads((program_folder / "out/scores.json").read_text()) == found
    page = (program_folder / "out/report.html").read_text()
    assert page.startswith("<!doctype html>") and "look_up" in page


def test_rows_that_are_none_end_with_3(program_folder: Path) -> None:
    row = {"question": "Who?", "answers": ["Ann"], "context": "Ann came.", "title": "t"}
    (program_folder / "q.jsonl").write_text(f"{json.dumps(row)}\nnothing\n{json.dumps(row)}\n")
    ended = program("eval", "--data", "q.jsonl", "--task", "qa")
    assert ended.code == 3
    assert "reading 'q.jsonl', row 2: expected JSON" in ended.err
    assert "error: 1 row or document failed; the rest is measured" in ended.err
    shown = [line.split("\t")[:2] for line in ended.out.splitlines()[2:]]
    assert shown == [["state", "2"], ["passage", "2"], ["quote", "2"]]


def test_where_nothing_can_be_measured_it_ends_with_1(program_folder: Path) -> None:
    (program_folder / "q.jsonl").write_text('{"question": "Who?", "answers": ["Ann"], "title": "t"}\n')
    ended = program("eval", "--data", "q.jsonl", "--task", "qa")
    assert ended.code == 1 and ended.out == ""
    assert "asking about 't': expected rows with 'context', or texts with its text, found neither" in ended.err
    assert "error: evaluating: all that was to be measured failed" in ended.err


def test_a_model_that_gives_nan_is_one_error(tmp_path: Path, program_folder: Path) -> None:
    weights = official_weights()
    weights["blocks.1.ffn.value.weight"] = torch.full_like(weights["blocks.1.ffn.value.weight"], float("nan"))
    path = save(weights, tmp_path / "nan.safetensors")
    ended = program(*FEW, "--model", path)
    assert ended.code == 1 and ended.out == ""
    assert ended.err.count("error:") == 1 and "found NaN or infinity" in ended.err and "nan.safetensors" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "needles"], "expected tasks of niah_single"),
        (["--lengths", "many"], "expected numbers with commas between them, found 'many'"),
        (["--task", "qa"], "expected --data for the task qa"),
        (["--strategies", "guess"], "expected a strategy of state"),
        (["--lengths", "30", "--task", "vt"], "making 'vt': expected"),
    ],
)
def test_what_makes_no_sense_ends_with_2(program_folder: Path, arguments: list[str], told: str) -> None:
    ended = program("eval", *arguments)
    assert ended.code == 2 and told in ended.err and ended.out == ""
