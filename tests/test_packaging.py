"""The wheel: what it contains, and that the program runs from it outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("rwkv_stream-*.whl")
    return path


def test_the_wheel_holds_one_package_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"rwkv_stream"}
    for wanted in (
        "rwkv_stream/cli/ingest.py",
        "rwkv_stream/kernels/recurrence/reference.py",
        "rwkv_stream/shipped/model.safetensors",
        "rwkv_stream/shipped/tokenizer.json",
        "rwkv_stream/shipped/README.md",
    ):
        assert wanted in names
    assert any(name.startswith("rwkv_stream/kernels/") and name.endswith(".so") for name in names)
    assert [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))] == []


def test_the_wheel_is_for_every_python_three(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name


def test_the_program_runs_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    probe = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; sys.path += {sys.path!r}; sys.argv[1:] = ['--help'];"
        "import rwkv_stream.cli as cli; print(cli.__file__); cli.main()"
    )
    command = [sys.executable, "-ISc", probe]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "site") in shown
    assert "ingest" in shown


def test_the_shipped_model_is_small(wheel: Path) -> None:
    info = zipfile.ZipFile(wheel).getinfo("rwkv_stream/shipped/model.safetensors")
    assert 1_000_000 < info.file_size <= 12_000_000
