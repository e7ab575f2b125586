"""What the program does before it loads anything heavy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_stream.cli import program
from rwkv_stream.model import load
from rwkv_stream.reading.ingest import ingest
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


def test_the_store_is_looked_at_without_loading_torch_or_a_model(
    tmp_path: Path, bytes_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copy(bytes_model_path, tmp_path)
    os.utime(model, ns=(10**18, 10**18))  # as it is, its fingerprint is remembered
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "store"))
    (tmp_path / "text.txt").write_text("The keeper lit the lamp.")
    loaded = load(model)
    ingest(tmp_path / "text.txt", model=loaded, store=Store(tmp_path / "store", create=True))
    commands = [
        ["snapshots", "list", "--model", model],
        ["snapshots", "show", "text.txt"],
        ["snapshots", "show", "text.txt", "--model", model, "--json"],
        ["snapshots", "tree"],
        ["snapshots", "verify", "--read-data"],
        ["summarize", "--from-snapshot", "text.txt", "--style", "extract"],
    ]
    done = subprocess.run([sys.executable, "-Ic", PROBE, json.dumps(commands)], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, []]] * len(commands), done.stderr
    assert loaded.fingerprint[:8] in done.stdout
    assert "read last        The keeper lit the lamp." in done.stdout or "read last\tThe keeper lit" in done.stdout


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
