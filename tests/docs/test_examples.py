"""The examples in `samples/` run, from the root of the repository, as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *command: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"PATH": path}
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_book_is_forked(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((ROOT / "samples/story.txt").read_text(encoding="utf-8")[:35_000])
    out = run(tmp_path, sys.executable, "samples/fork_a_book.py", str(tmp_path / "text.txt"), str(tmp_path / "a.store"))
    first, *answers = out.splitlines()
    assert "3 new snapshots" in first
    assert [line.split(" tokens: ")[0] for line in answers] == ["after 4,096", f"after {first.split()[1]}"]


def test_passages_are_found(tmp_path: Path) -> None:
    out = run(tmp_path, sys.executable, "samples/find_passages.py", "bees")
    assert len(out.splitlines()) == 3


def test_strange_lines(tmp_path: Path) -> None:
    out = run(tmp_path, "sh", "samples/strange_lines.sh", str(tmp_path / "access.log"))
    assert len(out.splitlines()) >= 5


def test_a_model_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = run(tmp_path, "sh", "samples/measure_a_model.sh", str(tmp_path / "report"))
    assert [line.split("\t")[:2] for line in out.splitlines() if line.startswith("state")] == [["state", "48"]]
    assert "niah_single" in (tmp_path / "report/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [*(ROOT / "samples").glob("*.py"), *(ROOT / "samples").glob("*.sh")], ids=lambda p: p.name
)
def test_every_example_stands_in_the_table(path: Path) -> None:
    assert f"`{path.name}`" in (ROOT / "samples/README.md").read_text(encoding="utf-8")
