"""A store elsewhere: the files of one, under the same names, at a URL that `fsspec` opens; no locks, no catalog.

What comes from there is not trusted: names are those that a store gives, no file is larger than its kind allows, and
who reads one compares its bytes with its name or its checksum. What goes there is looked at once it has arrived: by its
size and the MD5 that the server has of it, where it tells one, else by reading it back.

In a bucket a file is whole or absent by itself. Elsewhere it is sent under a temporary name, and renamed.

`Remote.swap` replaces a file that no other program has replaced meanwhile. A bucket of S3 sees to that itself; in a
folder of this machine it is a lock, elsewhere nothing is, which is said.

All that goes through here raises RwkvStreamError with the file's address, and nothing of it that is secret.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fcntl import LOCK_EX
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar, cast

from rwkv_stream import interrupts
from rwkv_stream.errors import InputError, OutputError, RwkvStreamError, SnapshotError
from rwkv_stream.files import TEMP_PREFIX, make_folder, publish, publishing
from rwkv_stream.filesystems import answered, open_url, shown
from rwkv_stream.store.layout import publishing_failpoints
from rwkv_stream.store.locks import flocked
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, damaged

FAILPOINTS = publishing_failpoints("sent")
TRIES = 3
PARALLEL = 4  # files on their way at once
BLOCK_BYTES = 8 << 20  # at a time, to and from a remote

_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}
_NEVER_TRIED_AGAIN = (FileNotFoundError, PermissionError, FileExistsError)
_FULL = (errno.ENOSPC, errno.EDQUOT)

_swapping = threading.Lock()  # of this program's own threads

T = TypeVar("T")
log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What a remote says of a file; `md5` where it has computed that itself."""

    size: int
    md5: str | None


class Seen(NamedTuple):
    """A small file as it was read, None where there was none, and what tells it from one that replaces it."""

    data: bytes | None
    mark: str | None


class Remote:
    """The files of a store at a URL. Any number of threads may use it at once."""

    def __init__(self, url: str) -> None:
        """Raises InputError where the URL, or what its protocol needs, is not known."""
        self.url = url
        self._system, root = open_url(url, f"opening remote '{shown(url)}'", InputError)
        self._root = root.rstrip("/")
        protocol = self._system.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else {*protocol}
        self._folders: set[str] = set()
        self._is_stopping = False

    def shown(self, name: str = "") -> str:
        """The address of a file, as a message may have it."""
        return f"{shown(self.url).rstrip('/')}/{name}".rstrip("/")

    def each(self, work: Callable[[T], object], items: Iterable[T]) -> None:
        """Do a work with each item, several at once; raises what the first raises that fails, when no other goes on."""
        errors: list[BaseException] = []

        def do(item: T) -> None:
            try:
                if not self._is_stopping:
                    work(item)
            except BaseException as error:
                errors.append(error)
                self._is_stopping = True
                raise

        threads, pending = ThreadPoolExecutor(PARALLEL, thread_name_prefix="remote"), set[Future[None]]()
        try:
            for item in items:
                with interrupts.blocked():  # a thread that was begun is to be known
                    pending.add(threads.submit(do, item))
                if len(pending) >= 2 * PARALLEL:
                    pending = wait(pending, return_when=FIRST_COMPLETED).not_done
                if errors:
                    break
            wait(pending)
        except BaseException:
            self._is_stopping = True
            raise
        finally:
            threads.shutdown(cancel_futures=True)
            self._is_stopping = False
        if errors:
            raise errors[0]

    # ---- reading ----

    def listed(self, folder: str) -> dict[str, Entry | None]:
        """What lies in a folder, by its name there; None: another folder. Nothing where there is none."""

        def ask() -> dict[str, Entry | None]:
            self._system.invalidate_cache()  # of listings, which other programs change
            try:
                found = self._system.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            entries = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in found}
            return {name: _entry(info) if info["type"] == "file" else None for name, info in entries.items() if name}

        return self._tried(f"listing remote '{self.shown(folder)}'", InputError, ask)

    def entry(self, name: str) -> Entry | None:
        """What the remote says of a file, None where there is none."""

        def ask() -> Entry | None:
            self._system.invalidate_cache()
            try:
                return _entry(self._system.info(self._path(name)))
            except FileNotFoundError:
                return None

        return self._tried(self._reading(name), InputError, ask)

    def read(self, name: str) -> bytes | None:
        """All of a small file, None where there is none; SnapshotError for one that is too large for that."""

        def ask() -> bytes | None:
            try:
                return self._block(name, 0, SMALL_FILE_LIMIT + 1)
            except FileNotFoundError:
                return None

        data = self._tried(self._reading(name), InputError, ask)
        if data is not None and len(data) > SMALL_FILE_LIMIT:
            raise self.damaged(name, f"at most {SMALL_FILE_LIMIT} bytes", "more")
        return data

    def seen(self, name: str) -> Seen:
        """A small file that `swap` is to replace."""
        before = self._mark(name)  # first: what replaces it from now on has another one
        data = self.read(name)
        return Seen(data, None if data is None else before)

    def fetch(self, name: str, file: IO[bytes], limit: int, *, on_bytes: Callable[[int], object]) -> None:
        """Write all bytes of a file, whose name ends with their SHA-256, to an empty one.

        limit     most bytes that there may be
        on_bytes  is given how many have come each time that some have
        raises    SnapshotError where it is missing or damaged
        """
        for left in range(TRIES)[::-1]:
            file.seek(0)
            file.truncate()
            try:
                found = self._copy(name, file, limit, on_bytes)
            except FileNotFoundError as error:
                raise self.damaged(name, "the file that a record names", "none") from error
            if found == name.rpartition("/")[2]:
                return
            log.info("'%s' did not arrive as it was written%s", self.shown(name), "; once more" if left else "")
        raise self.damaged(name, "bytes that agree with its name", "others")

    def _copy(self, name: str, file: IO[bytes], limit: int, on_bytes: Callable[[int], object]) -> str:
        """Copy a file in blocks; the SHA-256 of what came."""
        digest, at, is_ended = hashlib.sha256(), 0, False
        while not is_ended:
            start, size = at, min(BLOCK_BYTES, limit + 1 - at)
            block = self._tried(self._reading(name), InputError, lambda: self._block(name, start, start + size))  # noqa: B023
            digest.update(block)
            file.write(block)
            on_bytes(len(block))
            at += len(block)
            if at > limit:
                raise self.damaged(name, f"at most {limit} bytes", "more")
            is_ended = len(block) < size or self._size(name) == at
        return digest.hexdigest()

    def _size(self, name: str) -> int:
        entry = self.entry(name)
        return -1 if entry is None else entry.size

    def _block(self, name: str, start: int, end: int) -> bytes:
        return cast("bytes", self._system.cat_file(self._path(name), start=start, end=end))

    # ---- writing ----

    def send(self, name: str, path: Path, *, on_bytes: Callable[[int], object]) -> None:
        """Send a file whose bytes have the SHA-256 that its name says.

        raises  SnapshotError where they don't, OutputError where they don't arrive
        """
        sums = _sums(path)

        def put(name: str) -> None:
            if self._is_local:
                with path.open("rb") as source, publishing(Path(self._path(name)), kind="sent") as file:
                    while block := source.read(BLOCK_BYTES):
                        file.write(block)
            else:
                options = {"chunksize": BLOCK_BYTES, "max_concurrency": 2} if "s3" in self._protocols else {}
                self._system.put_file(str(path), self._path(name), **options)

        self._arrive(name, put, lambda name: self._is_whole(name, sums))
        on_bytes(sums.size)

    def has(self, name: str, path: Path) -> bool:
        """Whether a file has arrived whole that was sent before; raises SnapshotError as `send` does."""
        return self._is_whole(name, _sums(path))

    def _is_whole(self, name: str, sums: _Sums) -> bool:
        entry = self.entry(name)
        if entry is None or entry.size != sums.size:
            return False
        nowhere = cast("IO[bytes]", _Nowhere())
        return entry.md5 in sums.md5s or self._copy(name, nowhere, sums.size, lambda n_bytes: None) == sums.sha256

    def put(self, name: str, data: bytes) -> None:
        """Send a small file; OutputError where it does not arrive."""
        self._arrive(name, lambda name: self._pipe(name, data), lambda name: self.read(name) == data)

    def swap(self, name: str, seen: Seen, data: bytes) -> bool:
        """Replace a small file, or make it, unless it is another by now than `seen` has it; whether it was not.

        raises  OutputError
        """
        with _swapping, contextlib.ExitStack() as stack:
            if "s3" in self._protocols:
                return self._swap_in_bucket(name, seen, data)
            if self._is_local:
                stack.enter_context(flocked(Path(self._path("format")), LOCK_EX, wait=True))
            if self.read(name) != seen.data:
                return False
            self.put(name, data)
            return True

    @property
    def has_swap(self) -> bool:
        """Whether `swap` heeds what other programs do."""
        return self._is_local or bool(self._protocols & {"s3", "memory"})

    def _swap_in_bucket(self, name: str, seen: Seen, data: bytes) -> bool:
        """By the server itself, which refuses to replace another file than the one that was seen."""
        condition = {"IfNoneMatch": "*"} if seen.data is None else {"IfMatch": f'"{seen.mark}"'}
        try:
            self._tried(self._writing(name), OutputError, lambda: self._pipe(name, data, **condition), times=1)
        except OutputError:
            found = self.read(name)
            if found == seen.data:  # it was no refusal
                raise
            return found == data  # it may have come, and its answer not
        return True

    def _pipe(self, name: str, data: bytes, **options: str) -> None:
        if self._is_local:
            publish(Path(self._path(name)), data, kind="sent")
        else:
            self._system.pipe_file(self._path(name), data, **options)

    def _arrive(self, name: str, put: Callable[[str], object], is_whole: Callable[[str], bool]) -> None:
        """Put a file and look at it, again where it did not arrive; under its name only once it is whole."""
        self._make_folder(name)
        folder, _, last = name.rpartition("/")
        is_renamed = not self._is_local and not self._protocols & _BUCKETS
        first = f"{folder}/{TEMP_PREFIX}{last[:8]}-{secrets.token_hex(8)}".lstrip("/") if is_renamed else name
        for left in range(TRIES)[::-1]:
            self._tried(self._writing(name), OutputError, lambda: put(first))
            if is_whole(first):
                break
            log.info("'%s' did not arrive as it was sent%s", self.shown(name), "; once more" if left else "")
            if not left:
                raise OutputError(
                    f"{self._writing(name)}: expected the bytes that were sent, found others; check the connection, "
                    "and run it again"
                )
        if is_renamed:
            self._tried(self._writing(name), OutputError, lambda: self._rename(self._path(first), self._path(name)))

    def _rename(self, first: str, path: str) -> None:
        try:
            self._system.mv(first, path)
        except FileExistsError:  # of systems that replace nothing
            self._system.rm_file(path)
            self._system.mv(first, path)

    def _make_folder(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if folder in self._folders or self._protocols & _BUCKETS:
            return
        if self._is_local:
            make_folder(Path(self._path(folder)))
        else:
            doing = self._writing(folder)
            self._tried(doing, OutputError, lambda: self._system.makedirs(self._path(folder), exist_ok=True))
        self._folders.add(folder)

    # ---- errors ----

    def damaged(self, name: str, expected: str, found: object) -> SnapshotError:
        """The error for a file of the remote that is not what was written."""
        return SnapshotError(
            f"{self._reading(name)}: expected {expected}, found {found}; push it again from a store that has it"
        )

    def _tried(self, doing: str, kind: type[RwkvStreamError], work: Callable[[], T], times: int = TRIES) -> T:
        """What `work` returns; done again where the remote fails as connections do."""
        for left in range(times)[::-1]:
            if self._is_stopping:
                raise OutputError(f"{doing}: stopped")
            try:
                with answered(self.url):
                    return work()
            except FileNotFoundError:
                if kind is InputError:
                    raise
                raise self._failed(doing, kind, f"no '{self.shown()}'") from None
            except OSError as error:
                if not left or isinstance(error, _NEVER_TRIED_AGAIN) or error.errno in _FULL:
                    raise self._failed(doing, kind, error.strerror or error) from error
                log.info("%s: %s; once more", doing, error.strerror)
        raise AssertionError("tried at least once")

    def _failed(self, doing: str, kind: type[RwkvStreamError], found: object) -> RwkvStreamError:
        return kind(
            f"{doing}: expected an answer, found {found}; check the address, the rights and the connection, and run "
            "it again: what has arrived is not sent again"
        )

    def _reading(self, name: str) -> str:
        return f"reading remote '{self.shown(name)}'"

    def _writing(self, name: str) -> str:
        return f"writing remote '{self.shown(name)}'"

    # ---- the file system ----

    @property
    def _is_local(self) -> bool:
        return "file" in self._protocols

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _mark(self, name: str) -> str | None:
        entry = self.entry(name) if "s3" in self._protocols else None
        return entry.md5 if entry is not None else None


def _entry(info: dict[str, Any]) -> Entry:
    tag = info.get("ETag")
    return Entry(int(info.get("size") or 0), tag.strip('"') if isinstance(tag, str) else None)


class _Sums(NamedTuple):
    """Size and digests of a file: SHA-256, and the MD5s that S3 tells of what came as a whole or in blocks."""

    size: int
    sha256: str
    md5s: set[str]


def _sums(path: Path) -> _Sums:
    """Of a file whose name is its SHA-256; SnapshotError where it is not."""
    size, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    parts: list[bytes] = []
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                size += len(block)
                sha256.update(block)
                md5.update(block)
                parts.append(hashlib.md5(block, usedforsecurity=False).digest())
    except FileNotFoundError as error:
        raise damaged(path, "a file that a record names", "none") from error
    if sha256.hexdigest() != path.name:
        raise damaged(path, "it as it was written", "bytes that were changed since")
    of_parts = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    return _Sums(size, sha256.hexdigest(), {md5.hexdigest(), f"{of_parts}-{len(parts)}"})


class _Nowhere:
    """A file that is not kept."""

    def write(self, data: bytes) -> int:
        return len(data)
