"""Files that are either whole or absent: the one way in which this project publishes a file.

Temp in the same folder → write → check length → fsync → rename → fsync folder. What takes long to write is `resuming`.
`failpoint` marks the places between these steps; the crash tests kill the process there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FAILPOINT_VARIABLE = "RWKV_STREAM_FAILPOINT"  # "name" or "name:n": SIGKILL at the n-th passing of `name`
TEMP_PREFIX = ".tmp-"

_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL here if the environment asks for it; otherwise do nothing."""
    wanted = os.environ.get(FAILPOINT_VARIABLE)
    if not wanted:
        return
    wanted_name, _, count = wanted.partition(":")
    if wanted_name != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def fsync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, durably."""
    missing = []
    probe = folder
    while not probe.exists():
        missing.append(probe)
        probe = probe.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def publishing(path: Path, *, kind: str = "file", temp_tag: str = "") -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends without an exception, and vanishes otherwise.

    `kind` names the failpoints `<kind>.written`, `<kind>.synced`, `<kind>.renamed`, `<kind>.published`;
    `temp_tag` enters the temp's name, so that its owner's leftovers can be told from others'.
    Raises OSError as the operating system does; the temp file is removed then.
    """
    temp = path.parent / f"{TEMP_PREFIX}{temp_tag}-{secrets.token_hex(8)}"
    try:  # a signal may raise as soon as the file is there
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask applies
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            failpoint(f"{kind}.written")
            os.fsync(file.fileno())
        failpoint(f"{kind}.synced")
        temp.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temp.unlink()
        raise
    failpoint(f"{kind}.renamed")
    fsync_folder(path.parent)
    failpoint(f"{kind}.published")


def publish(path: Path, data: bytes, *, kind: str = "file", temp_tag: str = "") -> None:
    """Publish `data` as `path`; see `publishing`."""
    with publishing(path, kind=kind, temp_tag=temp_tag) as file:
        file.write(data)
        file.flush()
        written = os.fstat(file.fileno()).st_size
        if written != len(data):
            raise OSError(f"short write of '{path}': expected {len(data)} bytes on disk, found {written}")


@contextlib.contextmanager
def resuming(path: Path, key: str) -> Iterator[IO[bytes]]:
    """Yield a binary file, open at its end, that becomes `path` when the block ends without an exception.

    Otherwise what was written stays beside `path`, unless the block made it empty, and is yielded again to the next
    call with the same `key`, which says what is being written; a call with another key removes it. After a power cut
    the end of it may be anything.
    Raises BlockingIOError where another process is at it, else OSError as the operating system does.
    """
    stem = f"{TEMP_PREFIX}part-{_short_digest(path.name)}-"
    temp = path.with_name(stem + _short_digest(key))
    for stale in path.parent.glob(f"{stem}*"):
        if stale != temp:
            with _locked(stale):
                stale.unlink()
    with _locked(temp) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temp.replace(path)
        except BaseException:
            if os.fstat(file.fileno()).st_size == 0:
                temp.unlink()
            raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file, made if there is none, open at its end and locked against all who open it here."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_current = False
            if is_current:  # else it was published or removed since it was opened
                file.seek(0, os.SEEK_END)
                yield file
                return


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
