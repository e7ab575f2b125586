"""The wheel: what it contains, and that the program runs from it outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
        "rwkv_stream/evaluation/story.txt",
        "rwkv_stream/answers/ranker.json",
        "rwkv_stream/answers/spans.safetensors",
        "rwkv_stream/answers/word_classes.txt",
        "rwkv_stream/text/stop_words.txt",
        "rwkv_stream/text/irregular.txt",
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


UNPINNED = {"triton"}  # each build of torch wants one of its own, or none


def pins() -> dict[str, str]:
    """Package → its version in constraints.txt for this Python and system."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    here = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(set(names)) == len(names), "one version of each"
    assert all(str(pin.specifier).startswith("==") for pin in here)
    return {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, here, strict=True)}


def required(name: str, extra: str) -> list[Requirement]:
    requirements = map(Requirement, metadata.requires(name) or [])
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]


@pytest.mark.parametrize("extra", ["dev", "ray"])
def test_the_constraints_hold_what_we_ask_for(extra: str) -> None:
    pinned = pins()
    for requirement in required("rwkv-stream", extra):
        name = canonicalize_name(requirement.name)
        assert name in {"rwkv-stream", *UNPINNED} or pinned[name] in requirement.specifier, requirement


def test_the_constraints_hold_all_that_it_brings() -> None:
    """Each package that `[dev]` has here through others, at the version that is here."""
    pinned = pins()
    wanted, found = [("rwkv-stream", "dev")], dict[tuple[str, str], str]()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) not in found:
            found[name, extra] = metadata.version(name).split("+")[0]  # without that of torch's builds, as 2.13.0+cpu
            for requirement in required(name, extra):
                wanted += [(canonicalize_name(requirement.name), further) for further in ("", *requirement.extras)]
    here = {name: version for (name, _), version in found.items() if name not in {"rwkv-stream", *UNPINNED}}
    if any(version != pinned[name] for name, version in here.items() if name in pinned):
        pytest.skip("the packages here are not those of constraints.txt")
    assert len(here) > 50
    assert {name: pinned.get(name) for name in here} == here


def test_the_makefile_installs_from_constraints_alone() -> None:
    """Each `pip install` takes its versions from a file, but that of the tool which writes the files."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    free = [line.strip() for line in lines if "pip install" in line and "--constraint " not in line]
    assert free == ["build/uv/bin/pip install --quiet uv"]
