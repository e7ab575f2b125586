"""Files that are followed: what is read is what was written, through every rotation, and what is missing is told."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rotations import WAYS, Log

from rwkv_stream.errors import InputError
from rwkv_stream.text import follow
from rwkv_stream.text.follow import FollowedFile, FollowedPipe, Mark, PipeMark, as_map, family, from_map


class Follower:
    """A followed file, what was read of it, and the gaps that were told."""

    def __init__(self, path: Path, mark: Mark | None = None, read: bytes = b"") -> None:
        self.gaps: list[str] = []
        self.read = read
        self.file = FollowedFile(str(path), self.gaps.append, mark)

    def step(self) -> bytes:
        data = self.file.read()
        self.read += data
        return data

    def drain(self) -> None:
        while self.step():
            pass

    def again(self) -> Follower:
        """As after a kill: another one, where this one stands."""
        mark = from_map(as_map(self.file.mark))
        assert isinstance(mark, Mark)
        self.file.close()
        return Follower(Path(self.file.path), mark, self.read)


@pytest.fixture(params=WAYS)
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Log:
    return Log(tmp_path, request.param)


def test_rotations_while_it_is_followed(log: Log) -> None:
    follower = Follower(log.path)
    for n in range(1, 60):
        log.write(n % 4)
        if n % 3:
            follower.step()
        if n % 10 == 0:
            log.rotate()
    follower.drain()
    assert follower.read == log.written
    assert follower.gaps == []


def test_rotations_while_nobody_follows(log: Log) -> None:
    log.write(30)
    follower = Follower(log.path)
    follower.drain()
    for _ in range(3):
        log.write(40)
        log.rotate()
        log.write(20)
        log.rotate()
        log.write(7)
        follower = follower.again()
        follower.drain()
        assert follower.read == log.written
    assert follower.gaps == []


def test_any_schedule(log: Log) -> None:
    """Written, rotated, read and killed in any order."""
    rng = random.Random(sum(log.way.encode()))
    follower = Follower(log.path)
    for _ in range(400):
        match rng.randrange(8):
            case 0 | 1 | 2:
                log.write(rng.randrange(40))
            case 3 | 4 | 5:
                follower.step()
            case 6 if follower.read and follower.file.mark.end:  # no mark is kept of a file of which nothing was read
                follower = follower.again()
            case 7 if rng.random() < 0.3:
                log.rotate()
    log.write()
    follower.drain()
    assert follower.read == log.written
    assert follower.gaps == []


def test_what_was_rotated_before_is_read_first(log: Log) -> None:
    for _ in range(4):
        log.write(10)
        log.rotate()
    log.write(3)
    follower = Follower(log.path)
    follower.drain()
    assert follower.read == log.written


def test_a_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    follower = Follower(log.path)
    log.append(b"one line\nhalf a li")
    assert (follower.step(), follower.step()) == (b"one line\n", b"")
    log.append(b"ne\n")
    assert follower.step() == b"half a line\n"
    log.append(b"cut by a rotation")
    log.rotate()
    assert follower.step() == b"", "it may still be written to"
    log.append(b"next\n")
    assert (follower.step(), follower.step()) == (b"cut by a rotation", b"next\n")


def test_a_line_without_end_does_not_wait(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.append(b"x" * (follow.READ_BYTES + 10))
    follower = Follower(log.path)
    follower.drain()
    assert follower.read == b"x" * follow.READ_BYTES


def test_the_old_file_is_read_as_long_as_it_is_written_to(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    with log.path.open("ab", buffering=0) as file:
        file.write(b"one\n")
        follower = Follower(log.path)
        follower.drain()
        log.rotate()
        follower.drain()
        file.write(b"two\n")
        follower.drain()
        log.append(b"three\n")
        file.write(b"four, by a second writer\n")
        follower.drain()
        assert follower.read == b"one\ntwo\nfour, by a second writer\nthree\n"
        assert follower.gaps == []
        file.write(b"too late\n")
        follower.drain()
    assert follower.gaps == [f"'{log.path}' was written to after the next file had been begun: 9 bytes are missing"]


def test_lines_between_copy_and_cut_are_a_gap_where_they_were_seen(tmp_path: Path) -> None:
    log = Log(tmp_path, "copied and cut")
    log.write(10)
    follower = Follower(log.path)
    follower.drain()
    read = log.written
    log.rotate(before_the_cut=lambda: (log.append(b"never read\n"), follower.file.waiting()))
    log.write(2)
    follower.drain()
    assert follower.read == read + log.written[len(read) + 11 :]
    assert follower.gaps == [
        f"'{log.path}.1' was cut, and what was written to it before is in no copy: 11 bytes are missing"
    ]


def test_lines_between_copy_and_cut_that_were_read_are_no_gap(tmp_path: Path) -> None:
    log = Log(tmp_path, "copied and cut")
    log.write(40)
    follower = Follower(log.path)
    follower.drain()

    def write_and_read() -> None:
        log.write(3)
        follower.drain()

    log.rotate(before_the_cut=write_and_read)
    log.write(2)
    follower.drain()
    assert follower.read == log.written
    assert follower.gaps == []


def test_a_file_that_begins_anew_without_a_copy(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.write(5)
    follower = Follower(log.path)
    follower.drain()
    log.path.write_bytes(b"other lines, and more of them than there were before\n" * 10)
    follower.drain()
    assert follower.read == log.written + log.path.read_bytes()
    assert follower.gaps == [], "nothing is known to be missing"


def test_what_is_gone_is_a_gap(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.write(20)
    follower = Follower(log.path)
    follower.step()
    log.rotate()
    log.write(2)
    first = Path(f"{log.path}.1")
    n = len(follower.read)
    first.unlink()
    again = follower.again()
    again.drain()
    assert again.read == log.written
    assert len(again.gaps) == 1 and f"was read to byte {n:,}, and neither it nor a copy of it" in again.gaps[0]


def test_an_older_file_is_not_read_again(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.write(5)
    log.rotate()
    log.write(5)
    follower = Follower(log.path)
    follower.drain()
    os.utime(f"{log.path}.1", ns=(1, 1))
    log.path.unlink()
    again = follower.again()
    again.drain()
    assert again.read == log.written
    log.write(2)
    again.drain()
    assert again.read == log.written
    assert len(again.gaps) == 1


def test_a_hole_in_the_numbers_is_a_gap(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.write(5)
    follower = Follower(log.path)
    follower.drain()
    read = log.written
    for _ in range(3):
        log.rotate()
        log.write(2)
    Path(f"{log.path}.2").unlink()
    again = follower.again()
    assert again.step() == b"", "files may be being renamed just now"
    assert again.gaps == []
    again.drain()
    assert again.gaps == [f"of the rotated files of '{log.path}' 1 are not there: 2"]
    lines = log.written[len(read) :].splitlines(keepends=True)
    assert again.read == read + b"".join(lines[2:])


def test_a_damaged_packed_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed, packed at once")
    log.write(3000)
    log.rotate()
    log.write(1)
    packed = Path(f"{log.path}.1.gz")
    packed.write_bytes(packed.read_bytes()[:-2000])
    follower = Follower(log.path)
    follower.drain()
    assert len(follower.gaps) == 1 and "ends too early" in follower.gaps[0]
    assert follower.read.endswith(log.written.splitlines(keepends=True)[-1])
    assert log.written.startswith(follower.read[:20_000])


def test_a_hole_at_the_start_of_a_file_is_skipped(tmp_path: Path) -> None:
    log = Log(tmp_path, "renamed")
    log.write(5)
    follower = Follower(log.path)
    follower.drain()
    with log.path.open("r+b") as file:  # by a writer that goes on where it stood
        file.truncate()
        file.seek(1 << 20)
        file.write(b"behind a hole\n")
    follower.drain()
    assert follower.read == log.written + b"behind a hole\n"


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "late.log")
    assert follower.step() == b""
    (tmp_path / "late.log").write_bytes(b"now\n")
    follower.drain()
    assert follower.read == b"now\n"
    with pytest.raises(InputError, match="its folder"):
        Follower(tmp_path / "nowhere" / "late.log")


NAMES = {
    "app.log": [
        *("app.log.12.gz", "app.log.3", "app.log.2.zst", "app.log.1"),
        *("app.log-20240101", "app.log-20240102.xz", "app.log-20240102-1704187000", "app-2024-01-03.log"),
        *("app.2024-01-03T10-00-00.000.log", "app.log.2024-01-04_12", "app.log"),
    ],
    "syslog": ["syslog.2.gz", "syslog.1", "syslog"],
}


@pytest.mark.parametrize("name", NAMES)
def test_rotated_files_are_found_in_order(name: str, tmp_path: Path) -> None:
    for i, one in enumerate(NAMES[name]):
        (tmp_path / one).write_bytes(b"x")
        os.utime(tmp_path / one, (i, i))
    for other in ("app.log.gz.part", "other.log", "app.log.bak", "myapp.log.1", "app.log.1~", "app.log.x1", "app2.log"):
        (tmp_path / other).write_bytes(b"x")
    (tmp_path / f"{name}.7").mkdir()
    assert [Path(one.path).name for one in family(str(tmp_path / name))] == NAMES[name]


def test_a_file_that_is_being_packed_is_read_once(tmp_path: Path) -> None:
    for name in ("app.log", "app.log.1", "app.log.1.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert [Path(one.path).name for one in family(str(tmp_path / "app.log"))] == ["app.log.1", "app.log"]


def test_a_link_to_the_file_of_the_day(tmp_path: Path) -> None:
    link = tmp_path / "app.log"
    (tmp_path / "app.log-20260101").write_bytes(b"20260101\n")
    link.symlink_to("app.log-20260101")
    follower = Follower(link)
    follower.drain()
    (tmp_path / "app.log-20260102").write_bytes(b"20260102\n")
    follower.drain()
    link.unlink()
    link.symlink_to("app.log-20260102")
    follower.drain()
    assert follower.read == b"20260101\n20260102\n"


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        with contextlib.suppress(OSError):
            os.close(write)


def test_a_pipe() -> None:
    with pipe() as (read, write):
        followed = FollowedPipe(read)
        assert followed.read() == b""
        os.write(write, b"one\ntwo\nhalf")
        assert (followed.read(), followed.read()) == (b"one\ntwo\n", b"")
        assert followed.mark == PipeMark(whole=0)
        os.close(write)
        assert followed.read() == b"half"
        assert followed.is_over
        assert followed.mark == PipeMark(whole=1)


def test_marks_of_strangers_are_refused() -> None:
    mark = as_map(PipeMark(whole=1))
    assert from_map(mark) == PipeMark(whole=1)
    for changes in ({"kind": "tape"}, {"whole": "1"}, {"pending": "zz"}, {"more": 1}):
        with pytest.raises(ValueError, match=r"expected a place|non-hexadecimal"):
            from_map(mark | changes)
