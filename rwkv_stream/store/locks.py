"""flock'ed files: locks that end with the process that held them at the latest, and the markers of live writers.

A lock belongs to one opening of its file, so threads exclude each other as processes do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from rwkv_stream.errors import OutputError, StoreLockedError
from rwkv_stream.files import failpoint, fsync_folder
from rwkv_stream.store.layout import files

FAILPOINTS = ("writer.marked",)


@contextlib.contextmanager
def passing(path: Path, *, wait: bool, busy: str) -> Iterator[None]:
    """Hold a lock alone, whose file is there only while somebody does; as `flocked`."""
    while True:
        with _opened(path, fcntl.LOCK_EX, wait=wait, busy=busy) as descriptor:
            if os.fstat(descriptor).st_nlink == 0:  # removed by who held it, before it was locked
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def flocked(path: Path, operation: int, *, wait: bool, busy: str = "") -> Iterator[None]:
    """Hold a lock, `fcntl.LOCK_SH` or `LOCK_EX`; StoreLockedError saying `busy` where it is taken, unless `wait`."""
    with _opened(path, operation, wait=wait, busy=busy):
        yield


@contextlib.contextmanager
def _opened(path: Path, operation: int, *, wait: bool, busy: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise StoreLockedError(busy) from error
            fcntl.flock(descriptor, operation)
        except OSError as error:
            raise OutputError(
                f"locking '{path}': expected a filesystem with locks, found {error.strerror}; keep the store elsewhere"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """The marker of a writer that lives, named by its tag; whoever ends well removes it."""
    while True:
        marker = folder / uuid.uuid4().hex
        descriptor = os.open(marker, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink == 0:  # taken for a dead writer's before it was locked
                continue
            fsync_folder(folder)
            failpoint("writer.marked")
            yield marker
            return
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def dead_writers(folder: Path) -> Iterator[set[str]]:
    """Tags of the writers that died, which nobody else takes for alive meanwhile."""
    dead = set()
    with contextlib.ExitStack() as stack:
        for path in files(folder):
            with contextlib.suppress(FileNotFoundError):  # ended since it was listed
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                with contextlib.suppress(BlockingIOError):  # it lives
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may be looking too
                    if os.fstat(descriptor).st_nlink:
                        dead.add(path.name)
        yield dead
