"""What the program does before it loads anything heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_stream.cli import program
from rwkv_stream.store import Store

PROBE = """
import json, sys
from rwkv_stream.cli.program import run
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    found.append((run(), [name for name in ("torch", "pyarrow") if name in sys.modules]))
print(json.dumps(found))
"""


def test_an_unknown_reference_is_told_without_loading_torch(tmp_path: Path) -> None:
    store, text = tmp_path / "store", tmp_path / "text.txt"
    Store(store, create=True)
    text.write_text("some text")
    from_nothing = ["--store", str(store), "--from-snapshot", "nothing"]
    commands = [
        ["ask", "who?", *from_nothing],
        ["ask", "who?", *from_nothing, "--model", "whatever.pth"],
        ["ask", "--interactive", "--prompt-template", "{question}", *from_nothing],
        ["summarize", "--each", *from_nothing],
        ["generate", *from_nothing],
        ["score", str(text), "--top", "3", *from_nothing],
        ["ingest", str(text), *from_nothing],
        ["finetune", str(text), "--state", "-o", str(tmp_path / "tuned"), *from_nothing],
        ["snapshots", "diff", "nothing", "nothing", "--store", str(store)],
        ["snapshots", "show", "nothing", "--store", str(store)],
    ]
    done = subprocess.run([sys.executable, "-Ic", PROBE, json.dumps(commands)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [[10, []]] * len(commands), done.stderr
    assert done.stderr.count("'nothing'") == len(commands)


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["neither", "count", "policy"],
)
def test_threads_do_not_spin_at_barriers_unless_they_are_told_to(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["rwkv-stream", "--version"])
    program.run()
    assert os.environ.get("GOMP_SPINCOUNT") == found
