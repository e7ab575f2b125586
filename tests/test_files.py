"""Temps of writers that died are removed by the next writer into their folder, those of living ones never."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_stream import files
from rwkv_stream.files import TEMP_PREFIX, publish, publishing, scratch

WRITER = """
import sys
from pathlib import Path
from rwkv_stream.files import publishing, scratch
with {block} as made:
    print("ready", flush=True)
    sys.stdin.read()
"""


def temps(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{TEMP_PREFIX}*"))


@pytest.fixture(params=["publishing(Path(sys.argv[1], 'file'))", "scratch(Path(sys.argv[1]))"], ids=["file", "folder"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process whose temp is in `tmp_path`, until its stdin ends."""
    command = [sys.executable, "-Ic", WRITER.format(block=request.param), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


def test_a_living_writer_keeps_its_temp(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    before = temps(tmp_path)
    assert len(before) == 1
    publish(tmp_path / "other", b"bytes")
    with scratch(tmp_path):
        pass
    assert temps(tmp_path) == before
    assert writer.communicate("") == ("", None)
    assert writer.returncode == 0
    assert temps(tmp_path) == []


def test_the_next_writer_sweeps_what_a_dead_one_left(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    left = temps(tmp_path)
    if left[0].is_dir():
        (left[0] / "inside").write_text("half")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert temps(tmp_path) == left
    publish(tmp_path / "other", b"bytes")
    assert temps(tmp_path) == []
    assert (tmp_path / "other").read_bytes() == b"bytes"


def test_two_writers_of_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    with publishing(tmp_path / "a") as a, publishing(tmp_path / "b") as b, scratch(tmp_path) as folder:
        assert len(temps(tmp_path)) == 3
        a.write(b"a")
        b.write(b"b")
        (folder / "c").touch()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


def test_only_what_a_writer_may_have_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    kept = [
        tmp_path / f"{TEMP_PREFIX}{name}" for name in ("tag-0123456789abcdef", "part-0-0", "-mine", "-0123456789abcde")
    ]
    for path in kept:
        path.touch()
    link = tmp_path / f"{TEMP_PREFIX}-0123456789abcdef"
    link.symlink_to("elsewhere")
    os.mkfifo(tmp_path / f"{TEMP_PREFIX}-fedcba9876543210")
    publish(tmp_path / "other", b"")
    assert all(path.exists() for path in kept)
    assert link.is_symlink() and (tmp_path / "elsewhere").exists()


def test_a_temp_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer may come between the two steps."""
    sweeps = []
    lock = files._lock

    def swept_first(descriptor: int) -> None:
        if not sweeps:
            sweeps.append(temps(tmp_path))
            files.sweep(tmp_path)
            assert temps(tmp_path) == []
        lock(descriptor)

    monkeypatch.setattr(files, "_lock", swept_first)
    publish(tmp_path / "file", b"bytes")
    assert len(sweeps[0]) == 1
    assert (tmp_path / "file").read_bytes() == b"bytes"
    sweeps.clear()
    with scratch(tmp_path) as folder:
        (folder / "file").touch()
    assert len(sweeps[0]) == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    publish(tmp_path / "file", b"bytes")
    assert (tmp_path / "file").read_bytes() == b"bytes"


def test_a_full_disk_is_told_with_the_file_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        publish(tmp_path / "a.bin", b"data")
    assert caught.value.filename == str(tmp_path / "a.bin") and not list(tmp_path.iterdir())
