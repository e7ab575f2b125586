"""The commands that read sources read the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import program

CALLS = [["ingest"], ["embed", "-o", "rows.jsonl"], ["score", "-o", "rows.jsonl"]]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_source_tree(program_folder: Path, call: list[str]) -> None:
    for name in ("src/a.py", "src/lib/b.py", "src/lib/c.md", "src/tests/d.py", "src/e.log"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("first\nsecond line\n")
    Path("src/.gitignore").write_text("*.log\n")
    ended = program(*call, "src", "--include", "*.py", "--include", "*.log", "--exclude", "tests/", "--json")
    assert ended.code == 0, ended.err
    assert "left out: 1 hidden (src/.gitignore); 1 ignored by .gitignore (src/e.log); 1 not included" in ended.err
    rows = ended.out if call == ["ingest"] else Path("rows.jsonl").read_text()
    assert sorted({json.loads(row)["document"] for row in rows.splitlines()}) == ["src/a.py", "src/lib/b.py"]
    if call[0] == "score":
        assert [json.loads(row)["line"] for row in rows.splitlines()] == [1, 2, 1, 2]
