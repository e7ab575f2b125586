"""Archives: the members of ZIP and tar archives and the records of WARC files, streamed; nothing is ever unpacked.

ZIP is opened at any member; tar and WARC are read forward, so that members read in their order cost one pass. An
archive that has been read from stays open until another is wanted, for the next member of it. Where one is damaged,
what follows is read from the next header of a member on.

Of members with one name the last is the file, as where an archive is unpacked; of a tar that takes a pass over it, and
its names are held. A hard link in it is read as what it links to.

Of WARC a document is what a server answered (status 200), a resource or a conversion, of ARC, the older form, what a
server answered; its id is the address.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import posixpath
import re
import stat
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from rwkv_stream.errors import InputError
from rwkv_stream.extras import needed
from rwkv_stream.text.readers.kinds import Served
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
    said,
    unlisted,
    zip_file,
)

log = logging.getLogger(__name__)

HEADER_BYTES = 2**20  # the longest header of a member
LINE_BYTES = 256
_ARC_LINE = re.compile(rb"(\S+) \S+ \d{14} \S* (?:\S+ )*?(\d{1,18})\r?\n")  # address, IP, date, type, …, length
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_ODD_NAME = re.compile(r"[\x00-\x1f\x7f]|^[/\\]|^[A-Za-z]:|(?:^|[/\\])\.\.(?:[/\\]|$)")


class Entry(NamedTuple):
    """A member as it is listed.

    key       what it is opened by; rising
    name      its path, or the number of the record
    id        of a record, its address
    served    of a record, what the server said
    problem   why it is not read, None where it is
    link      of a hard link, the name of what it leads to
    left_out  why it is no document, None where it may be one
    """

    key: int
    name: str
    id: str | None = None
    served: Served | None = None
    problem: str | None = None
    link: str | None = None
    left_out: str | None = None


class Archive(Protocol):
    """An open archive. Raises what `explained` translates, where nothing more can be read.

    at      the key from which on members can be opened
    opened  its bytes
    losses  what could not be read of what has been listed, besides members
    """

    at: int
    opened: Opened
    losses: list[str]

    def entries(self) -> Iterator[Entry]: ...
    def open(self, key: int) -> Raw: ...
    def close(self) -> None: ...


def listed(archive: Archive, origin: Origin, name: str) -> Iterator[Entry]:
    """The entries of an archive that are to be read: of a name the last, links by what they lead to."""
    if isinstance(archive, _Warc):
        yield from archive.entries()
        return
    last: dict[str, int] = {}
    targets: dict[int, int] = {}  # links and what they lead to
    others = archive.entries() if isinstance(archive, _Zip) else _entries(origin, name)
    for entry in others:
        path = posixpath.normpath(entry.name)
        if entry.left_out is not None:
            continue
        if entry.link is not None:
            target = last.get(posixpath.normpath(entry.link))
            if target is None:
                continue
            targets[entry.key] = targets.get(target, target)
        if entry.problem is None:
            last[path] = entry.key
    for entry in archive.entries():
        if entry.left_out is not None:
            yield entry
        elif entry.problem is None and last.get(posixpath.normpath(entry.name), entry.key) != entry.key:
            log.warning("'%s' holds '%s' more than once; the last is read", name, printable(entry.name))
        elif entry.key in targets:
            yield entry._replace(key=targets[entry.key])
        elif entry.link is not None:
            yield entry._replace(problem=f"'{printable(entry.link)}' before it in the archive, found none to link to")
        else:
            yield entry


def _entries(origin: Origin, name: str) -> Iterator[Entry]:
    """The entries of a tar archive, as far as it can be read, opened anew."""
    with contextlib.suppress(InputError, DamageError, OSError, EOFError), Opened(origin, name) as opened:
        yield from _Tar(opened).entries()


# ---- ZIP ----


class _Zip:
    at = 0

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.losses: list[str] = []
        self._stack = contextlib.ExitStack()
        self._archive = self._stack.enter_context(zip_file(opened))
        if (problem := unlisted(opened, self._archive)) is not None:
            self.losses.append(f"expected {problem}")

    def entries(self) -> Iterator[Entry]:
        for key, info in enumerate(self._archive.infolist()):
            if info.filename.endswith("/"):
                continue
            left_out = "symbolic links" if stat.S_ISLNK(info.external_attr >> 16) else None
            left_out = left_out or _left_out(info.filename, info.file_size)
            yield Entry(key, info.filename, problem=_name_problem(info.filename), left_out=left_out)

    def open(self, key: int) -> Raw:
        with parsing():
            info = self._archive.infolist()[key]
            file = open_zip_member(self._archive, info, f"{self.opened.name}/{info.filename}")
        return Raw(_parsed(file.read1), info.file_size, file.close)

    def close(self) -> None:
        self._stack.close()
        self.opened.close()


# ---- what is read forward ----


class _Forward:
    """A file that only goes forward, and refuses to read overlong headers."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._byte = 0
        self._unread = b""
        self.last = b""  # what was read last

    def tell(self) -> int:
        return self._byte

    def read(self, size: int) -> bytes:
        if size > HEADER_BYTES:
            raise DamageError(f"a header of more than {HEADER_BYTES >> 20} MiB")
        self.last, self._unread = self._unread[:size], self._unread[size:]
        if not self.last:
            self.last = read_up_to(self._opened.read, size)
        self._byte += len(self.last)
        return self.last

    def line(self, size: int) -> bytes:
        """Up to the next newline, and it, of at most `size` bytes; empty only at the end."""
        parts: list[bytes] = []
        n_bytes = 0
        while n_bytes < size and (data := self.read(min(size - n_bytes, LINE_BYTES))):
            end = data.find(b"\n") + 1
            if end:
                parts.append(data[:end])
                self.unread(data[end:])
                break
            parts.append(data)
            n_bytes += len(data)
        return b"".join(parts)

    def unread(self, data: bytes) -> None:
        """Read these again."""
        self._unread = data + self._unread
        self._byte -= len(data)

    def seek(self, byte: int) -> None:
        if byte < self._byte:
            raise DamageError("a header that leads back")
        while self._byte < byte and self.read(min(READ_BYTES, byte - self._byte)):
            pass


class _Tar:
    def __init__(self, opened: Opened) -> None:
        self.at = 0
        self.opened = opened
        self.losses: list[str] = []
        self._file = _Forward(opened)
        self._info: tarfile.TarInfo | None = None  # the member before `at`
        with explained(opened.name, "a whole tar archive"), parsing():
            self._tar = tarfile.TarFile(fileobj=cast("BinaryIO", self._file))

    def entries(self) -> Iterator[Entry]:
        while (info := self._next()) is not None:
            problem = _name_problem(info.name)
            if info.issparse():
                problem = "a file without holes, found one with; unpack it and pass the folder"
            if info.isdir():
                continue
            left_out = None if info.isreg() or info.islnk() else "symbolic links" if info.issym() else "no files"
            left_out = left_out or _left_out(info.name, 1 if info.islnk() else info.size)
            link = info.linkname if info.islnk() else None
            yield Entry(self.at - 1, info.name, problem=problem, link=link, left_out=left_out)
        self._check_rest()

    def _check_rest(self) -> None:
        """Read what lies behind the mark of the end: only there is the checksum of what the archive is packed in."""
        is_empty = True
        while data := self._file.read(READ_BYTES):
            is_empty = is_empty and not data.strip(b"\0")
        if not is_empty:
            self.losses.append("more behind the mark of its end, which is not read")

    def open(self, key: int) -> Raw:
        while self.at <= key:
            if self._next() is None:
                raise DamageError("fewer members than before")
        if self._info is None or not self._info.isreg():
            raise DamageError("another member than before")
        with parsing():
            file = self._tar.extractfile(self._info)
        assert file is not None, "it is a regular file"
        return Raw(_parsed(cast("io.BufferedReader", file).read1), self._info.size, file.close)

    def _next(self) -> tarfile.TarInfo | None:
        """The next member whose header is whole, None at the end."""
        self.at += 1
        with parsing():
            try:
                self._info = self._tar.next()
            except tarfile.ReadError as error:
                self._pass_over(f"member {self.at}: {said(error)}")
            else:
                if self._info is None and self._file.last.strip(b"\0"):
                    self._pass_over(f"member {self.at}: a header that is none")
        self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
        if self._info is None and len(self._file.last) < tarfile.BLOCKSIZE:
            raise DamageError("an end without the mark of one")
        return self._info

    def _pass_over(self, loss: str) -> None:
        """Go on to the next header: that of this member is damaged, and so where it ends is not known."""
        while len(block := self._file.read(tarfile.BLOCKSIZE)) == tarfile.BLOCKSIZE:
            with contextlib.suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                self._file.unread(block)
                self._tar.offset = self._file.tell()
                self.losses.append(loss)
                self._info = self._tar.next()
                return
        raise DamageError("an end without the mark of one")

    def close(self) -> None:
        self.opened.close()


class _Record:
    """A record of a WARC file.

    headers  of its own, by their names in small letters
    http     those of a response, and its status, None where there are none
    length   of what follows these
    body     what follows these
    """

    def __init__(self, headers: dict[str, str], body: Any, http: Any) -> None:
        self.headers, self.body, self.http = headers, body, http
        self.length = body.left
        self.type = headers.get("warc-type", "")

    def http_header(self, name: str) -> str:
        return (self.http is not None and self.http.get_header(name)) or ""


class _Body:
    """So many bytes of a file, as far as they can be read: behind damage another record begins."""

    def __init__(self, file: _Forward, size: int, boundary: bytes | None) -> None:
        self._file = file
        self._boundary = boundary
        self.left = size
        self._last = b""
        self.n_records = 0  # that seem to begin in what was read
        self.damage: InputError | None = None

    def read(self, size: int = READ_BYTES) -> bytes:
        if not self.left:
            return b""
        with self._ending():
            data = self._file.read(min(size, self.left, READ_BYTES))
        if not data:
            raise EOFError
        self.left -= len(data)
        if self._boundary is not None:
            self.n_records += (self._last + data).count(self._boundary)
            self._last = data[1 - len(self._boundary) :]
        return data

    def readline(self, size: int = -1) -> bytes:
        with self._ending():
            line = self._file.line(min(self.left, HEADER_BYTES if size < 0 else size))
        self.left -= len(line)
        return line

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.damage, self.left = error, 0
            raise


class _Warc:
    _begins = re.compile(rb"WARC/")
    _boundary: bytes | None = b"\r\n\r\nWARC/1."  # where records seem to begin within another
    _n_empty = 2  # lines behind a record

    def __init__(self, opened: Opened) -> None:
        with needed("warcio", "web", f"reading '{opened.name}'", InputError):
            from warcio.statusandheaders import StatusAndHeadersParser

        self.at = 0
        self.opened = opened
        self.losses: list[str] = []
        self._http = StatusAndHeadersParser(["HTTP/0.9", "HTTP/1.0", "HTTP/1.1", "HTTP/2.0", "HTTP/2", "HTTP/3"])
        self._file = _Forward(opened)
        self._record: _Record | None = None  # the one before `at`

    def entries(self) -> Iterator[Entry]:
        while (record := self._next()) is not None:
            if record.type not in ("response", "resource", "conversion"):
                continue
            if record.type == "response" and (record.http is None or record.http.get_statuscode() != "200"):
                continue
            problem = None
            packing = _packing(record)
            if packing not in ("", "identity", "gzip", "x-gzip", "deflate"):
                problem = f"a body that is plain, or packed with gzip, found '{printable(packing)}'"
            elif _is_chunked(record) and record.length > PART_BYTES:  # warcio holds a chunk, which may be the whole
                problem = f"a chunked body of at most {PART_BYTES >> 20} MiB, found {record.length >> 20}"
            address = record.headers.get("warc-target-uri")
            yield Entry(self.at - 1, str(self.at), address, _served(record), problem)

    def open(self, key: int) -> Raw:
        from warcio.bufferedreaders import ChunkedDataReader

        while self.at <= key:
            if self._next() is None:
                raise DamageError("fewer records than before")
        record = self._record
        assert record is not None
        body = ChunkedDataReader(record.body) if _is_chunked(record) else record.body
        read = body.read  # gzip is taken off as it is of any file
        if _packing(record) == "deflate":
            read = Bounded(_Inflated(read).read, lambda: record.length)
        return Raw(_parsed(read), None, lambda: None)

    def _next(self) -> _Record | None:
        """The next record whose header is whole, None at the end."""
        loss = self._left()
        self.at += 1
        self._record = None
        while True:
            line = self._file.line(HEADER_BYTES)
            if not line:
                break
            if self._begins.match(line):
                try:
                    with parsing():
                        self._record = self._read(line)
                    break
                except (DamageError, InputError, EOFError) as error:
                    loss = loss or f"record {self.at}: {said(error) or 'its header breaks off'}"
            elif line.strip():
                loss = loss or f"record {self.at}: a line that begins no record"
        if loss is not None:
            self.losses.append(loss)
        return self._record

    def _left(self) -> str | None:
        """Read what is left of the last record; what is wrong with it."""
        if self._record is None:
            return None
        body = self._record.body
        if body.damage is not None:  # whoever read the body met it
            return f"record {self.at}: {body.damage}"
        try:
            while body.read():
                pass
            end = b"".join(self._file.line(8) for _ in range(self._n_empty))
        except InputError as error:  # of what is compressed, of which the next part may be whole
            return f"record {self.at}: {error}"
        if end.strip() or not end:
            self._file.unread(end)
            inside = f", and {body.n_records} more in it" if body.n_records else ""
            return f"record {self.at} has a wrong length{inside}"
        return None

    def _read(self, version: bytes) -> _Record:
        headers: dict[str, str] = {}
        n_bytes = len(version)
        name = ""
        while (line := self._file.line(HEADER_BYTES)).strip():
            n_bytes += len(line)
            if n_bytes >= HEADER_BYTES:
                raise DamageError(f"a header of more than {HEADER_BYTES >> 20} MiB")
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if text[:1] in " \t" and name:
                headers[name] += " " + text.strip()
                continue
            name, colon, value = text.partition(":")
            if not colon:
                raise DamageError("a header that is none")
            name = name.strip().lower()
            headers[name] = value.strip()
        if not line:
            raise DamageError("a header that breaks off")
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise DamageError(f"a length of '{printable(length)}'")
        is_http = headers.get("content-type", "").lower().replace(" ", "").startswith("application/http")
        return self._opened(headers, int(length), headers.get("warc-type") == "response" and is_http)

    def _opened(self, headers: dict[str, str], length: int, is_http: bool) -> _Record:
        body = _Body(self._file, length, self._boundary)
        http = None
        if is_http:
            with contextlib.suppress(EOFError):
                http = self._http.parse(body)
        return _Record(headers, body, http)

    def close(self) -> None:
        self.opened.close()


class _Arc(_Warc):
    """ARC, version 1 and 2: a line with the address and the length, and what a server answered."""

    _begins = _ARC_LINE
    _boundary = None
    _n_empty = 1

    def _read(self, line: bytes) -> _Record:
        found = _ARC_LINE.fullmatch(line)
        assert found is not None, "it has begun a record"
        address = found[1].decode("utf-8", "replace")
        is_http = re.match("https?:", address, re.IGNORECASE) is not None
        headers = {"warc-type": "response" if is_http else "", "warc-target-uri": address}
        return self._opened(headers, int(found[2]), is_http)


class _Inflated:
    """What is deflated, with or without the header of zlib."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._body: Any = None

    def read(self, size: int) -> bytes:
        while True:
            data = self._body.unconsumed_tail if self._body is not None else b""
            data = data or self._read(READ_BYTES)
            if self._body is None:
                is_zlib = len(data) > 1 and data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
                self._body = zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
            if self._body.eof:
                return b""
            if not data:
                raise EOFError
            if out := self._body.decompress(data, size):
                return bytes(out)


def _packing(record: _Record) -> str:
    return record.http_header("content-encoding").strip().lower()


def _is_chunked(record: _Record) -> bool:
    return record.http_header("transfer-encoding").strip().lower() == "chunked"


def _served(record: _Record) -> Served:
    header = record.http_header("content-type") if record.http is not None else ""
    found = _CHARSET.search(header)
    return Served(header.partition(";")[0].strip().lower(), found[1] if found else None)


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


def _left_out(name: str, size: int) -> str | None:
    """Why a member of that name and size is none to be read; None where it may be."""
    if _name_problem(name) is None and any(
        part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts
    ):
        return "hidden"
    return None if size else "empty"


OPENERS: dict[str, Callable[[Opened], Archive]] = {"zip": _Zip, "tar": _Tar, "warc": _Warc, "arc": _Arc}


# ---- members on their own ----


@dataclass(frozen=True, slots=True)
class Member:
    """The origin of a member's bytes."""

    archive: Origin
    kind: str
    key: int

    def open(self, name: str) -> Raw:
        around = _taken(self, name)
        around.archive.opened.name = name  # what fails is told by it
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
    close_idle()
    opened = Opened(member.archive, name)
    try:
        return _Around(member.archive, stamp, OPENERS[member.kind](opened))
    except BaseException:
        opened.close()
        raise


@atexit.register
def close_idle() -> None:
    """Close the archives that nobody reads from."""
    while True:
        with _lock:
            if not _idle:
                return
            around = _idle.pop()
        around.archive.close()  # which gives back the one that it is in


def _stamp(origin: Origin) -> object:
    """What changes when a file does."""
    if isinstance(origin, Member):
        return _stamp(origin.archive)
    if not isinstance(origin, File):
        return None
    status = Path(origin.path).stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
