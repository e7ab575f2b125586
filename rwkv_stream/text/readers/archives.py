"""Archives: the members of ZIP and tar archives and the records of WARC files, streamed; nothing is ever unpacked.

ZIP is opened at any member; tar and WARC are read forward, so that members read in their order cost one pass. An
archive that has been read from stays open until another is wanted, for the next member of it.

Of WARC a document is what a server answered (status 200), a resource or a conversion; its id is the address.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from rwkv_stream.errors import InputError
from rwkv_stream.extras import needed
from rwkv_stream.text.readers.encodings import web_codec
from rwkv_stream.text.readers.streams import (
    NAME_CHARS,
    PART_BYTES,
    READ_BYTES,
    Bounded,
    DamageError,
    File,
    Opened,
    Origin,
    Raw,
    explained,
    open_zip_member,
    parsing,
    printable,
    read_up_to,
    zip_file,
)

HEADER_BYTES = 2**20  # the longest header of a member
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_ODD_NAME = re.compile(r"[\x00-\x1f\x7f]|^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")


class Entry(NamedTuple):
    """A member as it is listed.

    key       what it is opened by; rising
    name      its path, or the number of the record
    id        of a record, its address
    encoding  of a record, as the server said
    problem   why it is not read, None where it is
    """

    key: int
    name: str
    id: str | None = None
    encoding: str | None = None
    problem: str | None = None


class Archive(Protocol):
    """An open archive; `at` is the key from which on members can be opened. Raises what `explained` translates."""

    at: int

    def entries(self) -> Iterator[Entry]: ...
    def open(self, key: int) -> Raw: ...
    def close(self) -> None: ...


# ---- ZIP ----


class _Zip:
    at = 0

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._stack = contextlib.ExitStack()
        self._archive = self._stack.enter_context(zip_file(opened))

    def entries(self) -> Iterator[Entry]:
        names: set[str] = set()
        for key, info in enumerate(self._archive.infolist()):
            if info.filename.endswith("/") or stat.S_ISLNK(info.external_attr >> 16) or not info.file_size:
                continue
            problem = _name_problem(info.filename)
            if info.filename in names:
                problem = "each name once, found this one twice; unpack it and pass the folder"
            names.add(info.filename)
            if problem or not _is_hidden(info.filename):
                yield Entry(key, info.filename, problem=problem)

    def open(self, key: int) -> Raw:
        with parsing():
            info = self._archive.infolist()[key]
            file = open_zip_member(self._archive, info, f"{self._opened.name}/{info.filename}")
        return Raw(_parsed(file.read1), info.file_size, file.close)

    def close(self) -> None:
        self._stack.close()
        self._opened.close()


# ---- what is read forward ----


class _Forward:
    """A file that only goes forward, and refuses to read overlong headers."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._byte = 0
        self.last = b""  # what was read last
        self.limit: int | None = None  # no byte is read from here on

    def tell(self) -> int:
        return self._byte

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES or (self.limit is not None and self._byte >= self.limit):
            raise DamageError(f"a header of more than {HEADER_BYTES >> 20} MiB")
        self.last = read_up_to(self._opened.read, size)
        self._byte += len(self.last)
        return self.last

    def seek(self, byte: int) -> None:
        if byte < self._byte:
            raise DamageError("a header that leads back")
        while self._byte < byte and self.read(min(READ_BYTES, byte - self._byte)):
            pass


class _Tar:
    def __init__(self, opened: Opened) -> None:
        self.at = 0
        self._opened = opened
        self._file = _Forward(opened)
        self._info: tarfile.TarInfo | None = None  # the member before `at`
        with explained(opened.name, "a whole tar archive"), parsing():
            self._tar = tarfile.TarFile(fileobj=cast("BinaryIO", self._file))

    def entries(self) -> Iterator[Entry]:
        while (info := self._next()) is not None:
            problem = _name_problem(info.name)
            if info.issparse():
                problem = "a file without holes, found one with; unpack it and pass the folder"
            if info.isreg() and info.size and (problem or not _is_hidden(info.name)):
                yield Entry(self.at - 1, info.name, problem=problem)

    def open(self, key: int) -> Raw:
        while self.at <= key:
            if self._next() is None:
                raise DamageError("fewer members than before")
        assert self._info is not None
        with parsing():
            file = self._tar.extractfile(self._info)
        assert file is not None, "entries are regular files"
        return Raw(_parsed(cast("io.BufferedReader", file).read1), self._info.size, file.close)

    def _next(self) -> tarfile.TarInfo | None:
        with parsing():
            self._info = self._tar.next()
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        self.at += 1
        if self._info is None and (len(self._file.last) < tarfile.BLOCKSIZE or self._file.last.strip(b"\0")):
            raise DamageError("an end without the mark of one")
        return self._info

    def close(self) -> None:
        self._opened.close()


class _Warc:
    def __init__(self, opened: Opened) -> None:
        with needed("warcio", "web", f"reading '{opened.name}'", InputError):
            from warcio.archiveiterator import ArchiveIterator

        logging.getLogger("warcio").addHandler(logging.NullHandler())  # what it mends is not ours to tell
        self.at = 0
        self._opened = opened
        self._file = _Forward(opened)
        self._records = ArchiveIterator(self._file)
        self._records.INC_RECORD = ""  # it would tell stderr of wrong lengths, of which `err_count` tells us
        self._record: Any = None  # the one before `at`

    def entries(self) -> Iterator[Entry]:
        while (record := self._next()) is not None:
            if record.rec_type not in ("response", "resource", "conversion"):
                continue
            headers = record.http_headers
            if record.rec_type == "response" and (headers is None or headers.get_statuscode() != "200"):
                continue
            problem = None
            packing = _packing(record)
            if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
                problem = f"a body that is plain, or packed with gzip, found '{printable(packing)}'"
            elif _is_chunked(record) and record.length > PART_BYTES:  # warcio holds a chunk, which may be the whole
                problem = f"a chunked body of at most {PART_BYTES >> 20} MiB, found {record.length >> 20}"
            address = record.rec_headers.get_header("WARC-Target-URI")
            yield Entry(self.at - 1, str(self.at), address, _charset(record), problem)

    def open(self, key: int) -> Raw:
        from warcio.bufferedreaders import ChunkedDataReader

        while self.at <= key:
            if self._next() is None:
                raise DamageError("fewer records than before")
        record = self._record
        if _packing(record) == "deflate":
            read = Bounded(record.content_stream().read, lambda: record.length)
        else:  # gzip is taken off as it is of any file
            read = (ChunkedDataReader(record.raw_stream) if _is_chunked(record) else record.raw_stream).read
        return Raw(_parsed(read), None, lambda: None)

    def _next(self) -> Any:
        if self._record is not None:
            body = self._record.raw_stream
            while body.read(READ_BYTES):
                pass
            if body.limit:
                raise EOFError
        self._file.limit = self._file.tell() + HEADER_BYTES
        with parsing():
            self._record = next(self._records, None)
        self._file.limit = None
        self.at += 1
        if self._records.err_count or (self._record is not None and self._record.length is None):
            raise DamageError(f"record {self.at} after one, or with one, of a wrong length")
        return self._record

    def close(self) -> None:
        self._opened.close()


def _http(record: Any, header: str) -> str:
    return (record.http_headers and record.http_headers.get_header(header)) or ""


def _packing(record: Any) -> str:
    return _http(record, "content-encoding").strip().lower()


def _is_chunked(record: Any) -> bool:
    return _http(record, "transfer-encoding").strip().lower() == "chunked"


def _charset(record: Any) -> str | None:
    found = _CHARSET.search(_http(record, "content-type"))
    return web_codec(found[1]) if found else None


def _parsed(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def read1(size: int) -> bytes:
        with parsing():
            return read(size)

    return read1


def _name_problem(name: str) -> str | None:
    """Nothing is ever written by such a name; an archive that has one means no good."""
    if not name or _ODD_NAME.search(name) or len(name) > NAME_CHARS:
        return "a path below the archive's own folder, found another"
    return None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


OPENERS: dict[str, Callable[[Opened], Archive]] = {"zip": _Zip, "tar": _Tar, "warc": _Warc}


# ---- members on their own ----


@dataclass(frozen=True, slots=True)
class Member:
    """The origin of a member's bytes."""

    archive: Origin
    kind: str
    key: int

    def open(self, name: str) -> Raw:
        around = _taken(self, name)
        try:
            raw = around.archive.open(self.key)
        except BaseException:
            around.archive.close()
            raise

        def close() -> None:
            raw.close()
            with _lock:
                _idle.append(around)

        return Raw(raw.read1, raw.size, close)


@dataclass(frozen=True, slots=True, eq=False)
class _Around:
    """An open archive, where it is from, and what that was then."""

    origin: Origin
    stamp: object
    archive: Archive


_idle: list[_Around] = []  # in each the next member can be opened at once
_lock = threading.Lock()


def _taken(member: Member, name: str) -> _Around:
    """The archive around a member, an idle one if there is one that has not gone past it."""
    stamp = _stamp(member.archive)
    with _lock:
        for i, around in enumerate(_idle):
            if (around.origin, around.stamp) == (member.archive, stamp) and around.archive.at <= member.key:
                return _idle.pop(i)
        others = _idle[:]
        _idle.clear()
    for around in others:
        around.archive.close()  # which gives back the one that it is in
    opened = Opened(member.archive, name)
    try:
        return _Around(member.archive, stamp, OPENERS[member.kind](opened))
    except BaseException:
        opened.close()
        raise


def _stamp(origin: Origin) -> object:
    """What changes when a file does."""
    if isinstance(origin, Member):
        return _stamp(origin.archive)
    if not isinstance(origin, File):
        return None
    status = Path(origin.path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
