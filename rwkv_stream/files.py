"""Files that are either whole or absent: the one way in which this project publishes a file.

Temp in the same folder → write → check length → fsync → rename → fsync folder. What takes long to write is `resuming`.
A temp is locked for as long as its writer lives; one that nobody holds is removed by the next writer into its folder.
`failpoint` marks the places between these steps; the crash tests kill the process there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

FAILPOINT_VARIABLE = "RWKV_STREAM_FAILPOINT"  # "name" or "name:n": SIGKILL at the n-th passing of `name`
TEMP_PREFIX = ".tmp-"
UNTAGGED = re.compile(rf"{re.escape(TEMP_PREFIX)}-[0-9a-f]{{16}}")  # whose leftovers no owner clears
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems without them

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
def publishing(path: Path, *, kind: str = "file", temp_tag: str = "", durable: bool = True) -> Iterator[IO[bytes]]:
    """Yield a binary file that becomes `path` when the block ends without an exception, and vanishes otherwise.

    `kind` names the failpoints `<kind>.written`, `<kind>.synced`, `<kind>.renamed`, `<kind>.published`;
    `temp_tag` enters the temp's name, for an owner that clears its leftovers itself.
    Without `durable` nothing is synced, and the file may be anything after a power cut.
    Raises OSError as the operating system does, with a file's name; the temp file is removed then.
    """
    if not temp_tag:
        sweep(path.parent)
    temp = _temp(path.parent, temp_tag)
    try:  # a signal may raise as soon as the file is there
        with _created(temp) as file:
            yield file
            file.flush()
            failpoint(f"{kind}.written")
            if durable:
                os.fsync(file.fileno())
                failpoint(f"{kind}.synced")
            temp.replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temp.unlink()
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a disk that is full
            error.filename = str(path)
        raise
    failpoint(f"{kind}.renamed")
    if durable:
        fsync_folder(path.parent)
        failpoint(f"{kind}.published")


def publish(path: Path, data: bytes, *, kind: str = "file", temp_tag: str = "", durable: bool = True) -> None:
    """Publish `data` as `path`; see `publishing`."""
    with publishing(path, kind=kind, temp_tag=temp_tag, durable=durable) as file:
        file.write(data)
        file.flush()
        written = os.fstat(file.fileno()).st_size
        if written != len(data):
            raise OSError(f"short write of '{path}': expected {len(data)} bytes on disk, found {written}")


def publish_all(files: Sequence[tuple[Path, bytes]], *, kind: str, temp_tag: str) -> None:
    """Publish files together, each step for all of them before the next: as durable as one by one, and far sooner.

    Of an error some may be there, each whole; the temps are removed. Parameters and failpoints as of `publishing`.
    """
    temps: list[Path] = []
    with contextlib.ExitStack() as stack:
        try:
            written = []
            for path, data in files:
                temps.append(_temp(path.parent, temp_tag))
                file = stack.enter_context(_created(temps[-1]))
                with _named(path):
                    file.write(data)
                    file.flush()
                found = os.fstat(file.fileno()).st_size
                if found != len(data):
                    raise OSError(f"short write of '{path}': expected {len(data)} bytes on disk, found {found}")
                written.append((path, temps[-1], file))
                failpoint(f"{kind}.written")
            for path, _, file in written:
                with _named(path):
                    os.fsync(file.fileno())
                failpoint(f"{kind}.synced")
            for path, temp, _ in written:
                with _named(path):
                    temp.replace(path)
                failpoint(f"{kind}.renamed")
        except BaseException:
            for temp in temps:
                temp.unlink(missing_ok=True)
            raise
    for folder in dict.fromkeys(path.parent for path, _ in files):
        fsync_folder(folder)
        failpoint(f"{kind}.published")


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of a file that is not known by its name, as of a disk that is full, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` that vanishes when the block ends."""
    sweep(parent)
    folder = _temp(parent)
    try:
        while True:
            folder.mkdir(mode=0o700, exist_ok=True)
            with _opened(folder, os.O_RDONLY) as descriptor:
                _lock(descriptor)
                if _is_named(descriptor, folder):
                    yield folder
                    return
    finally:
        with contextlib.suppress(FileNotFoundError):
            remove(folder)


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


def _temp(folder: Path, tag: str = "") -> Path:
    return folder / f"{TEMP_PREFIX}{tag}-{secrets.token_hex(8)}"


def sweep(folder: Path) -> None:
    """Remove what writers that died left in `folder`, as far as this process may."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if UNTAGGED.fullmatch(path.name):
                with contextlib.suppress(OSError), _opened(path, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_named(descriptor, path):  # else it was published since it was opened
                        remove(path)


@contextlib.contextmanager
def _created(temp: Path) -> Iterator[IO[bytes]]:
    """A new file, locked until it is closed."""
    while True:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask applies
        with os.fdopen(descriptor, "wb") as file:
            _lock(descriptor)
            if _is_named(descriptor, temp):  # else it was swept before it was locked
                yield file
                return


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file, made if there is none, open at its end and locked against all who open it here."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(file.fileno(), path):  # else it was published or removed since it was opened
                file.seek(0, os.SEEK_END)
                yield file
                return


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still is the name of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
