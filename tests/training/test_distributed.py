"""Runs of several processes: the losses of one, whoever stops or dies on the way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_snapshots import in_child
from torch.distributed import run

from rwkv_stream.errors import UsageError
from rwkv_stream.training import distributed
from rwkv_stream.training import recipe as recipes
from rwkv_stream.training.distributed import DistributedRun
from rwkv_stream.training.run import CHECKPOINT, Run, train
from rwkv_stream.training.start import start

pytestmark = pytest.mark.usefixtures("one_thread")

BOOKS = [{"text": f"Row {i} of the mill. " * (40 + 7 * i)} for i in range(8)]
RECIPE = """
save_every = 4
[model]
n_layer = 2
n_embd = 64
head_size = 32
[tokenizer]
vocab_size = 280
[optimizer]
average = 0.9
[validation]
held = 0.25
[[data]]
name = "books"
path = "books.jsonl"
[[data]]
name = "lists"
exercises = ["lists", "copies"]
[[stages]]  # the first process has one lane, the second two
tokens = 192
lanes = 3
window = 16
stretch = 64
shares = {books = 0.8, lists = 0.2}
[[stages]]
tokens = 384
lanes = 2
window = 32
stretch = 128
shares = {books = 1}
"""
CHILD = """
import os, signal, sys
from pathlib import Path
from rwkv_stream.training import recipe
from rwkv_stream.training.distributed import DistributedRun, agreed, first_alone, processes
from rwkv_stream.training.run import train
from rwkv_stream.training.start import start
import torch

folder = Path(sys.argv[1])
with processes("cpu") as rank:
    with first_alone():
        begun = start(recipe.read(folder / "recipe.toml"), folder, folder / "several")
    run = DistributedRun(folder / "several", begun.recipe, begun.tokenizer, begun.tuned, dtype=torch.float32)
    train(run, stop=agreed(lambda: rank == 1 and run.step == 3))
    kept = torch.load(folder / "several" / "checkpoint.pt", weights_only=True)
    assert (run.step, kept["step"], len(kept["state"]["att_kv"])) == (3, 3, 3)

    def dies() -> bool:
        if rank == 1 and run.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    train(run, stop=agreed(dies))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(book) + "\n" for book in BOOKS))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def begin(folder: Path, work: str, kind: type[Run] = Run) -> Run:
    begun = start(recipes.read(folder / "recipe.toml"), folder, folder / work)
    return kind(folder / work, begun.recipe, begun.tokenizer, begun.tuned, dtype=torch.float32)


def by_two(folder: Path, *command: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of torchrun with two processes; torchrun itself in a fork of this one."""

    def launch() -> None:
        sys.stdout, sys.stderr = ((folder / name).open("w", buffering=1) for name in ("out", "err"))
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        run.main(["--standalone", "--log-dir", str(folder / "logs"), "--nproc-per-node", "2", *command])

    status = in_child(launch, OMP_NUM_THREADS="1")
    return os.waitstatus_to_exitcode(status), (folder / "out").read_text(), (folder / "err").read_text()


def test_two_processes_take_the_steps_of_one(folder: Path) -> None:
    """The second asks both to stop, later it dies; then the program goes on to the end."""
    (folder / "child.py").write_text(CHILD)
    one = begin(folder, "one")
    train(one)

    def kept(name: str) -> Any:
        return torch.load(folder / name / CHECKPOINT, weights_only=True)

    code, _, said = by_two(folder, str(folder / "child.py"), str(folder))
    assert code != 0 and "SIGKILL" in said, said[-3000:]
    assert kept("several")["step"] == 4
    program = ["--module", "rwkv_stream.cli", "train", str(folder / "recipe.toml"), "-o", str(folder / "several")]
    code, out, said = by_two(folder, *program, "--device", "cpu", "--dtype", "fp32", "-q")
    assert code == 0, said[-3000:]
    assert out.splitlines() == [str(folder / "several" / "model.safetensors")], "the first one alone tells"

    several = begin(folder, "several")
    assert [row.learnt for row in several.measured] == [row.learnt for row in one.measured]
    for name in ("loss", "gradient_norm", "held_loss"):
        found, wanted = ([getattr(row, name) for row in run.measured] for run in (several, one))
        assert [z is None for z in found] == [z is None for z in wanted]
        assert [z for z in found if z] == pytest.approx([z for z in wanted if z], rel=1e-4), name
    assert kept("several")["cursor"] == kept("one")["cursor"]
    for of in ("parameters", "average", "state"):
        for name, tensor in kept("one")[of].items():
            torch.testing.assert_close(kept("several")[of][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_stage_of_fewer_lanes_than_processes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    with pytest.raises(UsageError, match=r"training by 3 processes: expected texts, and a lane .* found a stage of 2"):
        begin(folder, "work", DistributedRun)
