"""Streams: bytes from wherever a source has them, without the compression around them, at constant memory.

An *origin* says where bytes are and opens them anew for each reading; it is plain data that can be sent to another
process (stdin cannot). `Opened` takes one layer of gzip, zstd, xz or bz2 off, told by its first bytes, any number of
members, and refuses decompression bombs.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from rwkv_stream.errors import InputError, RwkvStreamError

READ_BYTES = 65_536
ZSTD_INPUT_BYTES = 128  # a zstd block of 4 bytes may stand for 128 KiB: what these give stays within 4 MiB
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
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


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
                f"reading '{name}': expected a readable file, found: {error.strerror}; check the path and permissions"
            ) from error
        where = f" within the first {raw.n_read} bytes" if raw is not None else ""
        raise InputError(
            f"reading '{name}': expected {what}, found damage{where} ({said(error)}); get the file again"
        ) from error


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
    """Open bytes, counted; `read` waits for all it is asked for, `read1` takes what has arrived.

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
        self._is_closed = False
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
        data = self._read1(size)
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
        with explained(name):
            self.raw = origin if isinstance(origin, Raw) else origin.open(name)
        try:
            with self._explained():
                self._read, self.is_compressed = _decompressed(self.raw)
        except BaseException:
            self.close()
            raise

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read; fewer only at the end."""
        if len(self._head) < size:
            with self._explained():
                self._head += read_up_to(self._read, size - len(self._head))
        return self._head[:size]

    def read(self, size: int) -> bytes:
        """Some bytes, none only at the end."""
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        with self._explained():
            return self._read(size)

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


class _Zstd:
    """Zstandard frames in a row. The library's stream reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: Raw) -> None:
        import zstandard

        self._raw = raw
        self._library = zstandard
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = self._output = memoryview(b"")

    def read1(self, size: int) -> bytes:
        while not self._output:
            if not self._input:
                self._input = memoryview(self._raw.read1(READ_BYTES))
            if not self._input:
                if self._frame is not None:
                    raise EOFError
                return b""
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            part, self._input = self._input[:ZSTD_INPUT_BYTES], self._input[ZSTD_INPUT_BYTES:]
            try:
                self._output = memoryview(self._frame.decompress(part))
            except self._library.ZstdError as error:
                raise zlib.error(str(error)) from error
            if self._frame.eof:
                if self._frame.unused_data:
                    self._input = memoryview(self._frame.unused_data + bytes(self._input))
                self._frame = None
        data, self._output = self._output[:size], self._output[size:]
        return bytes(data)


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


def _decompressed(raw: Raw) -> tuple[Callable[[int], bytes], bool]:
    """A function that reads up to so many bytes of what `raw` holds without the compression, and if there was any."""
    found = _COMPRESSED.match(raw.peek(_MAGIC_BYTES))
    file = cast("BinaryIO", raw)  # `read` is all that these use
    read: Callable[[int], bytes]
    match found and found.lastgroup:
        case "gzip":
            read = gzip.GzipFile(fileobj=file).read1
        case "xz":
            read = lzma.LZMAFile(file).read1  # noqa: SIM115 -- `raw` is what is open
        case "bz2":
            read = bz2.BZ2File(file).read1
        case "zstd":
            read = _Zstd(raw).read1
        case _:
            return raw.read1, False
    return Bounded(read, lambda: raw.n_read), True


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
