"""Streams: bytes from wherever a source has them, without the compression around them, at constant memory.

An *origin* says where bytes are and opens them anew for each reading; it is plain data that can be sent to another
process (stdin cannot). `Opened` takes one layer of gzip, zstd, xz or bz2 off, told by its first bytes, any number of
members, and refuses decompression bombs.

Where data are damaged, `Opened.read` gives what comes before, raises InputError once, and then goes on with what can
be read behind it: nothing, or the next member of a file of several.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import io
import logging
import lzma
import os
import re
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from rwkv_stream.errors import InputError, RwkvStreamError

log = logging.getLogger(__name__)

READ_BYTES = 65_536
INPUT_BYTES = 512  # so much at a time: what unpacks before damage is given, and little of it is held
ZSTD_INPUT_BYTES = 128  # a zstd block of 4 bytes may stand for 128 KiB: what these give stays within 4 MiB
OUTPUT_BYTES = 65_536
MEMBER_BYTES = 18  # of the shortest compressed file: fewer behind one are no part of another
RATIO = 200  # what unpacks to more than so many times its size ...
FREE_BYTES = 64 * 2**20  # ... and to more than this is refused
PART_BYTES = 32 * 2**20  # the largest part of a file that is ever held: a chapter
NAME_CHARS = 1000
MESSAGE_CHARS = 200  # of what a library says of a damaged file
SPOOL_BYTES = 4 * 2**30  # the largest file that goes to a temporary one because its reader must jump about in it

_COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
)
COMPRESSED = _COMPRESSED.pattern
_MAGIC_BYTES = 16
ZIP_END_BYTES = 65_536 + 22
_ZIP_END = re.compile(rb"PK\x05\x06.{6}(..)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ESCAPED = re.compile(
    rf"(?P<slashes>\\*)(?P<odd>{_CONTROL.pattern})|(?P<slashes_>\\+)(?=x[0-9a-f]{{2}}|u[0-9a-f]{{4}})"
)


class DamageError(Exception):
    """What was found instead of a whole file; `explained` puts the name before it."""


class BombError(Exception):
    """What unpacks to far more than it is."""


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Whatever a library raises of hostile bytes, as DamageError; what `explained` knows passes, and interruptions."""
    try:
        yield
    except (RwkvStreamError, DamageError, BombError, EOFError, OSError, zlib.error, lzma.LZMAError, MemoryError):
        raise
    except Exception as error:
        raise DamageError(f"{type(error).__name__}: {said(error)}") from error


def said(error: Exception) -> str:
    """What a library says, on one line."""
    return printable(" ".join(str(error).split()))[:MESSAGE_CHARS]


def printable(text: str) -> str:
    """A text from a stranger on one line: control characters, and bytes of a name that are not UTF-8, as U+FFFD."""
    return _CONTROL.sub("\ufffd", text)[:NAME_CHARS]


def reversible(path: str) -> str:
    """A path as a name on one line, a different one for each: `\\xe9` is a byte that is not UTF-8, `\\u000a` a control
    character; of backslashes right before either, or before what looks like it, there are twice as many."""
    return _ESCAPED.sub(_escape, path)


def _escape(found: re.Match[str]) -> str:
    code = found["odd"]
    if code is None:
        return 2 * found["slashes_"]
    number = ord(code)
    return 2 * found["slashes"] + (f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number < 0xDD00 else f"\\u{number:04x}")


@contextlib.contextmanager
def explained(name: str, what: str = "whole data", raw: Raw | None = None) -> Iterator[None]:
    """What the operating system, a decompressor or an archive raises, as an InputError."""
    try:
        yield
    except EOFError as error:
        where = f", after {raw.n_read} bytes" if raw is not None else ""
        raise InputError(
            f"reading '{name}': expected {what}, found that it ends too early{where}; get the file again"
        ) from error
    except BombError as error:
        raise InputError(
            f"reading '{name}': expected a text, found {error}; unpack it first if it is to be read"
        ) from error
    except (OSError, zlib.error, lzma.LZMAError, DamageError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(
                f"reading '{name}': expected a readable file, found: {error.strerror}; {_advice(error.errno)}"
            ) from error
        where = f" within the first {raw.n_read} bytes" if raw is not None else ""
        raise InputError(
            f"reading '{name}': expected {what}, found damage{where} ({said(error)}); get the file again"
        ) from error


def _advice(number: int) -> str:
    """What to do about an error of the operating system."""
    match number:
        case errno.EACCES | errno.EPERM:
            return "check its permissions"
        case errno.ENOSPC | errno.EDQUOT:
            return f"make room in '{tempfile.gettempdir()}', or set TMPDIR: it must be unpacked there to be read"
        case errno.EMFILE | errno.ENFILE:
            return "close other programs, or raise the limit of open files (`ulimit -n`)"
        case errno.ECONNREFUSED | errno.ECONNRESET | errno.ENETUNREACH | errno.EHOSTUNREACH | errno.ETIMEDOUT:
            return "check the address, and that the server can be reached"
        case errno.EIO:  # of a disk, or whatever a remote file system says
            return "try again; if it stays, check the disk, or the address"
    return "check the path"


# ---- where bytes are ----


class Origin(Protocol):
    """Where bytes are; `open` raises InputError or OSError."""

    def open(self, name: str) -> Raw: ...


@dataclass(frozen=True, slots=True)
class File:
    """A file, or a pipe with a path."""

    path: str

    def open(self, name: str) -> Raw:
        file = Path(self.path).open("rb")  # noqa: SIM115 -- closed by Raw
        status = os.fstat(file.fileno())
        is_regular = stat.S_ISREG(status.st_mode)
        if is_regular:
            return Raw(file.read1, status.st_size, file.close, file=file)
        return Raw(file.read1, None, file.close, is_pipe=True)


@dataclass(frozen=True, slots=True)
class Stdin:
    def open(self, name: str) -> Raw:
        if sys.stdin is None:
            raise InputError("reading stdin: expected an open stream, found none; pass a file")
        file = cast("io.BufferedReader", sys.stdin.buffer)
        size = None
        with contextlib.suppress(io.UnsupportedOperation):  # a stdin that is no file of the system
            status = os.fstat(file.fileno())
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
        return Raw(file.read1, size, lambda: None, is_pipe=True)  # not ours to close


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes in hand: a row of a table."""

    data: bytes

    def open(self, name: str) -> Raw:
        file = io.BytesIO(self.data)
        return Raw(file.read1, len(self.data), file.close)


@dataclass(frozen=True, slots=True)
class Broken:
    """What cannot be read, and why."""

    message: str

    def open(self, name: str) -> Raw:
        raise InputError(self.message)


class Raw:
    """Open bytes, counted; `read` waits for all it is asked for, `read1` takes what has arrived. After one of them has
    raised there are no more.

    size     of all, None where it is not known
    file     the same bytes as a file to jump about in, None where there is none
    is_pipe  they may be long in coming
    """

    def __init__(
        self,
        read1: Callable[[int], bytes],
        size: int | None,
        close: Callable[[], None],
        *,
        file: BinaryIO | None = None,
        is_pipe: bool = False,
    ) -> None:
        self.n_read = 0
        self.size, self.file, self.is_pipe = size, file, is_pipe
        self._read1, self._close = read1, close
        self._is_closed = self._is_ended = False
        self._head = b""

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._close()

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read; fewer only at the end."""
        self._head = self.read(size)
        return self._head

    def read(self, size: int) -> bytes:
        return read_up_to(self.read1, size)

    def read1(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        if self._is_ended:
            return b""
        try:
            data = self._read1(size)
        except BaseException:
            self._is_ended = True
            raise
        self.n_read += len(data)
        return data


# ---- without the compression ----


class Opened:
    """Open bytes without the compression around them. Raises InputError, always with the name in it."""

    def __init__(self, origin: Origin | Raw, name: str) -> None:
        self.name = name
        self.is_compressed = False
        self._spool: BinaryIO | None = None
        self._head = b""
        self._failure: InputError | None = None  # met while peeking, behind the head
        with explained(name):
            self.raw = origin if isinstance(origin, Raw) else origin.open(name)
        try:
            with self._explained():
                self._read, self.is_compressed = _decompressed(self.raw, name)
        except BaseException:
            self.close()
            raise

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read; fewer only at the end, or before damage, which raises where there are
        none."""
        while len(self._head) < size and self._failure is None:
            try:
                with self._explained():
                    data = self._read(size - len(self._head))
            except InputError as error:
                if not self._head:
                    raise
                self._failure = error
                break
            if not data:
                break
            self._head += data
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """Some bytes, none only at the end; after it has raised it goes on behind what cannot be read."""
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        try:
            with self._explained():
                return self._read(size)
        except InputError as error:
            if isinstance(error.__cause__, BombError):
                self._read = lambda _: b""
            raise

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.name, "whole compressed data" if self.is_compressed else "whole data", self.raw)

    def file(self) -> BinaryIO:
        """All bytes as a file to jump about in, for a reader that must: a nameless temporary one where need be.

        Nothing may have been read before, only peeked at.
        """
        if self._spool is None and self.raw.file is not None and not self.is_compressed:
            self.raw.file.seek(0)
            return self.raw.file
        if self._spool is None:
            self._spool = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 -- closed by `close`
            n_written = 0
            while data := self.read(READ_BYTES):
                n_written += len(data)
                if n_written > SPOOL_BYTES:
                    raise InputError(
                        f"reading '{self.name}': expected at most {SPOOL_BYTES >> 30} GiB where the whole file is "
                        "needed, found more; unpack it and pass the file"
                    )
                self._spool.write(data)
        self._spool.seek(0)
        return self._spool

    def close(self) -> None:
        self.raw.close()
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Member(Protocol):
    """A decompressor of one member: as those of `bz2`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """A member of a gzip file. zlib's own reader of these forgets what it unpacked before it meets damage."""

    def __init__(self) -> None:
        self.eof = False
        self.unused_data = b""
        self._head = b""  # what has come of the header, None behind it
        self._is_in_header = True
        self._body = zlib.decompressobj(-zlib.MAX_WBITS)
        self._crc = self._n_bytes = 0

    @property
    def needs_input(self) -> bool:
        return not self._body.unconsumed_tail and not (self._body.eof and len(self._head) >= 8)

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        if self._is_in_header:
            self._head += data
            end = _gzip_header_end(self._head)
            if end is None:
                return b""
            self._is_in_header = False
            data, self._head = self._head[end:], b""
        out = b""
        if not self._body.eof:
            out = self._body.decompress(self._body.unconsumed_tail + data, max(0, max_length))
            self._crc = zlib.crc32(out, self._crc)
            self._n_bytes += len(out)
            data = self._body.unused_data
        if self._body.eof:
            self._head += data  # the trailer
            if len(self._head) >= 8 and not out:  # else what was unpacked is given first
                self._end()
        return out

    def _end(self) -> None:
        trailer = self._head[:8]
        self.eof, self.unused_data = True, self._head[8:]
        if trailer != struct.pack("<II", self._crc, self._n_bytes & 0xFFFF_FFFF):
            raise zlib.error("CRC check failed")


def _gzip_header_end(data: bytes) -> int | None:
    """Where the header ends that `data` begins with, None where more of it is to come (RFC 1952)."""
    if len(data) < 10:
        return None
    if data[2] != 8 or data[3] & 0xE0:
        raise zlib.error("unknown compression method")
    end = 10
    if data[3] & 4:
        if len(data) < end + 2:
            return None
        end += 2 + int.from_bytes(data[end : end + 2], "little")
    for flag in (8, 16):  # name, comment
        if data[3] & flag:
            end = data.find(b"\0", end) + 1
            if not end:
                if len(data) > READ_BYTES:
                    raise zlib.error("a header without end")
                return None
    end += 2 if data[3] & 2 else 0
    return end if len(data) >= end else None


class _Zstd:
    """A frame of Zstandard."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._frame = zstandard.ZstdDecompressor().decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        try:
            return self._frame.decompress(data)
        except self._error as error:
            raise zlib.error(str(error)) from error


_MEMBERS: dict[str, tuple[Callable[[], _Member], int]] = {  # and how much each is fed
    "gzip": (_Gzip, INPUT_BYTES),
    "zstd": (_Zstd, ZSTD_INPUT_BYTES),
    "xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), INPUT_BYTES),
    "bz2": (bz2.BZ2Decompressor, INPUT_BYTES),
}


class _Members:
    """Compressed members in a row. The readers of the libraries take what was cut off, or is damaged, for the end.

    What stands behind the last one is told of where it is too short to have been another. After damage it goes on with
    the next member that can be seen.
    """

    def __init__(self, raw: Raw, kind: str, name: str) -> None:
        self._raw, self._kind, self._name = raw, kind, name
        self._new, self._step = _MEMBERS[kind]
        self._member: _Member | None = None
        self._before = self._input = b""  # what was read last, and before that
        self._at = self._start = 0  # of the input: so much is used, and the member begins there
        self._output = memoryview(b"")
        self._error: Exception | None = None  # met behind the output
        self._is_end = False

    def read1(self, size: int) -> bytes:
        while not self._output and not self._is_end:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            self._output = memoryview(self._block())
        data, self._output = self._output[:size], self._output[size:]
        return bytes(data)

    def _block(self) -> bytes:
        """What the input that has come unpacks to, or some of it; what is met behind it is kept in `_error`."""
        parts = []
        n_bytes = 0
        try:
            while n_bytes < OUTPUT_BYTES and not self._is_end:
                parts.append(self._unpacked())
                n_bytes += len(parts[-1])
                if n_bytes and self._at == len(self._input):
                    break  # more may be long in coming
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, DamageError, InputError) as error:
            self._error = zlib.error(str(error)) if isinstance(error, ValueError) else error
            self._recover()
        return b"".join(parts)

    def _unpacked(self) -> bytes:
        """The next bytes, none where more input is needed; `_is_end` at the end."""
        if self._member is None:
            if not self._has_input():
                self._is_end = True
                return b""
            if self._kind in ("gzip", "xz") and self._input[self._at] == 0:  # padding
                rest = self._input[self._at :].lstrip(b"\0")
                self._at = len(self._input) - len(rest)
                return b""
            self._has_input(MEMBER_BYTES)
            found = _COMPRESSED.match(self._input, self._at)
            if found is None or found.lastgroup != self._kind:
                self._pass_over()
                return b""
            self._member, self._start = self._new(), self._at
        member = self._member
        data = b""
        if member.needs_input:
            if not self._has_input():
                raise EOFError
            data = self._input[self._at : self._at + self._step]
            self._at += len(data)
        out = member.decompress(data, OUTPUT_BYTES)
        if member.eof:
            self._member = None
            self._at -= len(member.unused_data)
        return out

    def _has_input(self, size: int = 1) -> bool:
        """Have so many bytes of input that are not used; fewer only at the end, False where there are none."""
        while len(self._input) - self._at < size and (data := self._raw.read1(READ_BYTES)):
            self._before, self._input = self._input[: self._at], self._input[self._at :] + data
            self._start -= self._at
            self._at = 0
        return self._at < len(self._input)

    def _pass_over(self) -> None:
        """What comes is no member: a little of it at the end is left out, more is damage."""
        rest = self._input[self._at :]
        if len(rest) >= MEMBER_BYTES:
            raise zlib.error("what follows a compressed member is no other")
        log.warning("'%s': %d bytes behind the compressed data are left out: %r", self._name, len(rest), rest)
        self._at = len(self._input)

    def _recover(self) -> None:
        """Go to the next that can be a member."""
        data = self._before + self._input
        start = len(self._before) + (self._at if self._member is None else self._start) + 1
        self._member = None
        data = data[max(0, start) :]
        while data:
            for found in _COMPRESSED.finditer(data):
                if found.lastgroup == self._kind and self._begins(data[found.start() :]):
                    self._before, self._input, self._at = b"", data, found.start()
                    return
            following = self._raw.read1(READ_BYTES)
            data = data[-_MAGIC_BYTES:] + following if following else b""
        self._before = self._input = b""
        self._at = 0

    def _begins(self, data: bytes) -> bool:
        """Whether a member that begins so can be unpacked, as far as that can be seen."""
        member = self._new()
        try:
            for start in range(0, min(len(data), 4 * INPUT_BYTES), ZSTD_INPUT_BYTES):
                while not (member.needs_input or member.eof):
                    member.decompress(b"", OUTPUT_BYTES)
                member.decompress(data[start : start + ZSTD_INPUT_BYTES], OUTPUT_BYTES)
                if member.eof:
                    break
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
            return False
        return True


class Bounded:
    """Reads what `packed` bytes unpack to; raises BombError where that is far too much."""

    def __init__(self, read: Callable[[int], bytes], packed: Callable[[], int]) -> None:
        self._read, self._packed = read, packed
        self._n_given = 0

    def __call__(self, size: int) -> bytes:
        data = self._read(size)
        self._n_given += len(data)
        check_ratio(self._n_given, self._packed())
        return data


def check_ratio(unpacked_bytes: int, packed_bytes: int) -> None:
    """Raises BombError."""
    if unpacked_bytes > max(FREE_BYTES, RATIO * packed_bytes):
        raise BombError(f"{packed_bytes} bytes that unpack to {unpacked_bytes} and more, a decompression bomb")


def _decompressed(raw: Raw, name: str) -> tuple[Callable[[int], bytes], bool]:
    """A function that reads up to so many bytes of what `raw` holds without the compression, and if there was any."""
    found = _COMPRESSED.match(raw.peek(_MAGIC_BYTES))
    if found is None:
        return raw.read1, False
    return Bounded(_Members(raw, str(found.lastgroup), name).read1, lambda: raw.n_read), True


def read_up_to(read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    parts = []
    while size and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---- ZIP, which EPUB and DOCX are too ----


@contextlib.contextmanager
def zip_file(opened: Opened) -> Iterator[zipfile.ZipFile]:
    """The archive that `opened` holds; raises InputError where it is damaged, or unpacks to far too much."""
    file = opened.file()
    with explained(opened.name, "a whole ZIP archive"), parsing():
        archive = zipfile.ZipFile(file)
        check_ratio(sum(member.file_size for member in archive.infolist()), file.seek(0, os.SEEK_END))
    with archive:
        yield archive


def unlisted(opened: Opened, archive: zipfile.ZipFile) -> str | None:
    """What is wrong where an archive says that it holds more members than its directory lists."""
    file = opened.file()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - ZIP_END_BYTES))
    found = _ZIP_END.findall(file.read(ZIP_END_BYTES))
    n_said = int.from_bytes(found[-1], "little") if found else 0
    n_listed = len(archive.infolist())
    if n_listed < n_said < 0xFFFF:  # which stands for a number elsewhere
        return f"{n_said} members, found {n_listed} in its directory"
    return None


def zip_part(archive: zipfile.ZipFile, part: str, name: str, limit: int = PART_BYTES) -> bytes:
    """A part that must be there, and must fit in memory."""
    shown = printable(part)
    try:
        info = archive.getinfo(part)
    except KeyError:
        raise InputError(f"reading '{name}': expected '{shown}' in it, found none; get the file again") from None
    if info.file_size > limit:
        raise InputError(
            f"reading '{name}': expected '{shown}' to have at most {limit >> 20} MiB, found {info.file_size >> 20}"
        )
    with explained(name, "a whole ZIP archive"), parsing(), open_zip_member(archive, info, name) as file:
        return file.read()


def open_zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> zipfile.ZipExtFile:
    """Raises InputError for one that needs a password, and whatever `zipfile` does."""
    if info.flag_bits & 1:
        raise InputError(f"reading '{name}': expected an archive without a password, found one; unpack it first")
    return cast("zipfile.ZipExtFile", archive.open(info))
