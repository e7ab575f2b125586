"""Means of trials, as tables, pictures and one page that needs nothing beside it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rwkv_stream.evaluation import report as reports
from rwkv_stream.evaluation.cells import SCHEMA
from rwkv_stream.evaluation.report import Report, Score, report


def table(path: Path, *trials: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(trials), schema=SCHEMA), path)
    return path


def niah(length: int, depth: float, score: float) -> dict[str, Any]:
    return {
        "task": "niah_single", "method": None, "length": length, "depth": depth, "score": score, "floor": 0.001,
        "tokens": 100, "computed": 50, "question": "<b>Where?</b>", "answers": ["7"],
        "answer": "<script>alert(1)</script>",
    }  # fmt: skip


@pytest.fixture
def found(tmp_path: Path) -> Report:
    recalled = [niah(1024, 0, 1), niah(1024, 100, 0), niah(4096, 0, 0.5), niah(4096, 0, 1.0)]
    vt = {"task": "vt", "length": 1024, "score": 0.25, "floor": 0.25, "tokens": 10, "computed": 10}
    bits = [("a", 64, 64, 100, 300.0), ("a", 128, 64, 100, 200.0), ("b", 64, 10, 50, 75.0)]
    positions = [
        {"task": "position", "document": d, "length": end, "tokens": t, "bytes": n, "bits": b}
        for d, end, t, n, b in bits
    ]
    qa = [
        {
            "task": "qa",
            "method": "state",
            "score": s,
            "exact": e,
            "quoted": q,
            "answer": a,
            "answers": [],
            "question": "?",
        }
        for s, e, q, a in (
            (1.0, True, True, "x"),
            (0.5, False, True, "y"),
            (None, None, False, ""),
            (None, None, False, "z"),
        )
    ]
    retrieval = [{"task": "retrieval", "method": "bm25", "score": s, "floor": 0.4} for s in (1.0, 0.5)]
    pairs = [{"task": "similarity", "method": "words", "score": s, "gold": g} for s, g in ((0, 1), (1, 2), (2, 0))]
    return report(
        table(tmp_path / "t.parquet", *recalled, vt, *positions, *qa, *retrieval, *pairs), "models/<m>.pth", "f" * 64
    )


def test_means(found: Report) -> None:
    assert [(s.task, s.length, s.n, s.score) for s in found.recall] == [
        ("niah_single", 1024, 2, 0.5), ("niah_single", 4096, 2, 0.75), ("vt", 1024, 1, 0.25)
    ]  # fmt: skip
    assert [s.error for s in found.recall] == [pytest.approx(0.5), pytest.approx(0.25), None]
    assert [(s.length, s.depth, s.score) for s in found.depths] == [(1024, 0, 1), (1024, 100, 0), (4096, 0, 0.75)]
    assert (found.tokens, found.computed) == (410, 210)
    first, second = found.position
    assert (first.token_start, first.token_end, first.documents, first.bits_per_byte) == (0, 64, 2, 2.5)
    assert (second.token_start, second.token_end, second.documents, second.bits_per_byte) == (64, 128, 1, 2.0)
    (answers,) = found.qa
    assert (answers.n, answers.f1, answers.exact, answers.quoted) == (2, 0.75, 0.5, 1.0)
    assert (answers.unanswerable, answers.declined) == (2, 0.5)
    assert found.retrieval[0].score == 0.75 and found.retrieval[0].floor == 0.4
    assert found.similarity[0].spearman == pytest.approx(-0.5)


def test_the_table_is_that_of_papers(found: Report) -> None:
    columns, rows = found.recall_table()
    assert columns == ["task", "floor", "1024", "4096"]
    assert rows == [["niah_single", "0.1", "50.0", "75.0"], ["vt", "25.0", "25.0", ""], ["mean", "", "37.5", "75.0"]]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_beside_it_and_runs_nothing(found: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = reports.page(found, [niah(1024, 0, 1)] * 9)
    tags = Page(text).tags
    assert not {"script", "b", "link", "m"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:image/png;base64,").startswith("data:image/png;base64,")
    assert len([tag for tag, _ in tags if tag == "img"]) == 2 == len([tag for tag, _ in tags if tag == "source"])
    assert "prefers-color-scheme: dark" in text and not re.search(r"url\(|@import|https?:", text)
    assert text.count("&lt;script&gt;") == reports.SHOWN, "of many answers the first are shown"


def test_files_are_written_whole(found: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    reports.write(found, tmp_path / "t.parquet", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "heatmaps.png", "position.png", "report.html", "scores.json", "t.parquet"
    ]  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["recall"][0] == {
        "task": "niah_single", "length": 1024, "n": 2, "score": 0.5, "error": 0.5, "floor": 0.001, "depth": None
    }  # fmt: skip
    assert (tmp_path / "heatmaps.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_there_is_not_drawn(found: Report) -> None:
    pytest.importorskip("matplotlib")
    assert reports.heat_maps([]) is None and reports.curve([]) is None
    light, dark = (reports.heat_maps(found.depths, theme) for theme in (reports.LIGHT, reports.DARK))
    assert light is not None and dark is not None and light != dark
    some = [Score(task, 8, 1, 0.5, None, 0.1, depth) for task in ("passkey", "look_up", "vt") for depth in (0.0, 9.0)]
    assert reports.heat_maps(some) is not None
