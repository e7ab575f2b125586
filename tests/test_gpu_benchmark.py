"""The benchmark of GPUs, rehearsed without one, and its refusal to time what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    sys.path.append(str(PROGRAM.parent))
    try:
        return importlib.import_module("gpu")
    finally:
        sys.path.remove(str(PROGRAM.parent))


def test_all_of_it_is_rehearsed_under_the_interpreter(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code = (
        "import quick_interpreter, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = sys.argv[0].rpartition('/')[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(PROGRAM), "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("REHEARSAL")
    assert not out.exists(), "what measures nothing is written nowhere"
    checks = [line for line in lines if line.startswith(("right", "told", "WRONG"))]
    assert len(checks) >= 30 and not any(line.startswith("WRONG") for line in checks)
    entries = [entry for _, entry, _ in gpu.entries(["tiny"], 1)]
    titles = [line.strip().removesuffix(" (rehearsal: no measurement)") for line in lines if "no measurement)" in line]
    assert titles == entries
    assert {entry.split()[0] for entry in entries} == {*gpu.PARTS} - {"correctness"}
    assert any("flash-linear-attention" in line and "not measured" in line for line in lines)


def test_nothing_is_timed_where_a_check_fails(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks = [gpu.Check("one", "this", "this", True), gpu.Check("other", "this", "that", False)]
    timed: list[str] = []

    def time_it(*_: object) -> dict[str, Any]:
        timed.append("wkv")
        return {}

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "correctness", lambda device: checks)
    monkeypatch.setattr(gpu, "entries", lambda *_: [("wkv", "wkv", time_it)])
    with pytest.raises(SystemExit) as ended:
        gpu.gpu((), None, 1, "cpu", tmp_path / "gpu.json")
    assert ended.value.code == 1 and not timed
    assert "other: expected this, found that\n1 of 2 checks failed: nothing is timed\n" in capsys.readouterr().out
    checks[1] = gpu.Check("other", "this", "that", False, needed=False)
    gpu.gpu((), None, 1, "cpu", tmp_path / "gpu.json")
    assert timed == ["wkv"]


def test_checks_can_fail(gpu: ModuleType) -> None:
    wanted = torch.linspace(-1, 1, 50, dtype=torch.float64)
    plain = wanted.bfloat16()
    assert gpu.within_twice("right", plain, plain, wanted).is_right
    assert not gpu.within_twice("off", plain + 0.05, plain, wanted).is_right
    assert not gpu.within_twice("not a number", torch.full_like(plain, float("nan")), plain, wanted).is_right


def test_a_model_that_is_wrong_is_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu.Device(torch.device("cpu"), torch.float32, gpu.REHEARSAL)
    logits = iter([torch.ones(3, 4).numpy(), 1.1 * torch.ones(3, 4).numpy()])
    monkeypatch.setattr(gpu, "model_of", lambda *_: None)
    monkeypatch.setattr(gpu, "in_plain_torch", lambda model: model)
    monkeypatch.setattr(gpu, "all_logits", lambda *_: next(logits))
    with pytest.raises(SystemExit):
        gpu.Models(device).get("tiny")


class Reader:
    """As much of a model as reading takes: calls of more than 16 tokens find no memory, or are wrong."""

    def __init__(self, *, is_wrong: bool) -> None:
        self.is_wrong = is_wrong

    def forward(self, tokens: torch.Tensor, state: object, logits: str) -> tuple[torch.Tensor, object]:
        if tokens.shape[1] > 16 and not self.is_wrong:
            raise torch.OutOfMemoryError("CUDA out of memory\nof much")
        return torch.ones(1, 4) * (2 if tokens.shape[1] > 16 else 1), "state"


def test_sizes_of_calls_that_do_not_fit_have_a_reason(gpu: ModuleType) -> None:
    device = gpu.Device(torch.device("cpu"), torch.float32, gpu.REHEARSAL)
    assert gpu.REHEARSAL.calls == (16, 32)
    rates, figures = gpu.sweep(device, Reader(is_wrong=False), torch.zeros(1, 32, dtype=torch.int64))
    assert list(rates) == [16]
    assert figures["in calls of 32"] == {"absent": "CUDA out of memory"}
    with pytest.raises(SystemExit):
        gpu.sweep(device, Reader(is_wrong=True), torch.zeros(1, 32, dtype=torch.int64))


@pytest.mark.parametrize(("name", "parameters"), [("0.1b", 0.191), ("1.5b", 1.53), ("2.9b", 2.95), ("7.2b", 7.20)])
def test_shapes_are_those_of_released_models(gpu: ModuleType, name: str, parameters: float) -> None:
    from rwkv_stream.model import v7

    sizes = v7.shapes(gpu.config_of(gpu.SHAPES[name])).values()
    assert sum(torch.Size(size).numel() for size in sizes) / 1e9 == pytest.approx(parameters, rel=0.005)


def test_figures_are_entered_one_after_the_other(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(gpu, "about", lambda device: {"versions": {}})
    device = gpu.Device(torch.device("cuda"), torch.bfloat16, gpu.REAL)
    results = gpu.Results(device, tmp_path / "new" / "gpu.json")
    figures: dict[str, Any] = {"B = 1": gpu.figure([3.0, 1.0, 2.0], "tokens/s"), "B = 512": gpu.absent("no memory\n")}
    results.measured("decode 1.5b", figures)
    results.measured("wkv", {gpu.TO_FLA: gpu.figure([1.6])})
    found = json.loads(results.out.read_text())["a GPU"]
    assert found["decode 1.5b"]["figures"] == {
        "B = 1": {"median": 2.0, "lowest": 1.0, "highest": 3.0, "unit": "tokens/s"},
        "B = 512": {"absent": "no memory"},
    }
    assert found["decode 1.5b"]["shape"]["n_embd"] == 2048
    assert found["wkv"]["shape"] is None


def test_every_aim_is_of_a_figure_that_there_is(gpu: ModuleType) -> None:
    entries = {entry for _, entry, _ in gpu.entries(list(gpu.SHAPES), 1)}
    assert {entry for entry, _ in gpu.AIMS} <= entries
    assert gpu.Aim(0.6).is_met(0.6) and not gpu.Aim(0.6).is_met(0.59)
    assert gpu.Aim(0.02, is_least=False).is_met(-0.1) and not gpu.Aim(0.02, is_least=False).is_met(0.03)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--device", "cpu"], "expected TRITON_INTERPRET=1"),
        (["--only", "speed"], "found speed"),
        pytest.param(
            [], "found no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_explained(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        gpu.command()(arguments)
    assert ended.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())
