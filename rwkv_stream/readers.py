"""Readers: files, folders, globs and stdin as documents, and a document as a stream of valid UTF-8.

A `Document` names a text; `Document.text()` opens it as an iterator of UTF-8 pieces whose concatenation is the text, so
that byte offsets are those of the pieces. Memory does not grow with the file. What stays out: tokens, and any format
that is not text (a reader of one gives the same two classes).

* Around the text one layer of gzip, zstd, xz or bz2 is taken off, told by its first bytes, any number of members.
* The encoding is decided once, from the first 64 KiB after that: a byte order mark; UTF-8 where they are valid (a
  character cut at their end is), or where at least ten whole characters stand against each undecodable byte; else
  `charset-normalizer`. Naming it skips that, and lets a slow pipe begin at once.
* A byte order mark is dropped, CRLF and NUL stay, each undecodable byte becomes one U+FFFD and is counted.
* What begins like a known binary format is refused; so is, where no encoding was named, what is full of control
  characters or is neither UTF-8 nor free of NUL.
* A folder is read recursively in the order of names, without hidden files, links to folders, empty files and binary
  files; a glob gives files by the same rules. A file that cannot be opened there is a document that fails when read.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from rwkv_stream.errors import InputError, UsageError

READ_BYTES = 65_536
SAMPLE_BYTES = 65_536  # the encoding is decided from these
ZSTD_INPUT_BYTES = 128  # a zstd block of 4 bytes may stand for 128 KiB: what these give stays within 4 MiB

_BOMS = [  # UTF-32 first: its mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
)
_MAGIC_BYTES = 16
_BINARY = [  # how it begins, what it is, what to do
    (rb"%PDF-", "a PDF document", "extract its text first, for example with pdftotext"),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a ZIP archive (EPUB, DOCX and ODT are such)", "extract its text first"),
    (rb".{257}ustar", "a tar archive", "unpack it and pass the folder"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive", "unpack it and pass the folder"),
    (_COMPRESSED.pattern, "compressed data inside compressed data", "unpack it once"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document", "save it as text first"),
    (rb"SQLite format 3\x00", "an SQLite database", "export its text first"),
    (rb"PAR1", "a Parquet table", "export its text first"),
    (rb"\x7fELF|MZ\x90\x00|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe", "a program", "pass a text"),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\x00|MM\x00\*", "an image", "pass a text"),
    (rb"ID3[\x02-\x04]|OggS\x00|fLaC\x00|RIFF.{4}WAVE|.{4}ftyp", "a sound or film", "pass a text"),
]
_BINARY_PATTERNS = [(re.compile(pattern, re.DOTALL), what, advice) for pattern, what, advice in _BINARY]
_CONTROL = re.compile("[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")  # not backspace, white space and escape, which logs hold
_SURROGATE = re.compile("[\ud800-\udfff]")
_ERRORS = "rwkv_stream.surrogate"


class _BinaryError(InputError):
    """This is not text."""


def _surrogates(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler: one lone surrogate, which no text holds, for each undecodable byte."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _surrogates)


@dataclass(frozen=True, slots=True)
class Document:
    """A named text that can be opened.

    name        its path as typed (with the way inside a folder), or the name that was given
    path        None for stdin
    reopenable  False where it can be read only once: stdin, pipes
    encoding    what the user named, or None
    """

    name: str
    path: str | None
    reopenable: bool
    encoding: str | None = None

    def text(self, encoding: str | None = None) -> Text:
        """Open it; an encoding that is given (the user's, or that of an earlier reading) is not decided again.

        Raises InputError, UsageError (an unknown encoding).
        """
        return Text(self, encoding or self.encoding)


class Text:
    """An open document: an iterator of UTF-8 pieces on character edges, and how far it is.

    encoding        name of the Python codec
    replaced_bytes  undecodable bytes so far
    raw_bytes_read  bytes read from the file so far, before decompression and decoding
    raw_size        size of the file, None where it is not known
    """

    def __init__(self, document: Document, encoding: str | None) -> None:
        codec = None if encoding is None else _codec(encoding)
        self._name = document.name
        self.replaced_bytes = 0
        self._raw = _Raw(document)
        try:
            with self._explained():
                self._read = _decompressed(self._raw)
                self._sample = _read_up_to(self._read, SAMPLE_BYTES if codec is None else _MAGIC_BYTES)
            self.encoding = _checked_encoding(self._sample, codec, document.name)
        except BaseException:
            self.close()
            raise
        self._decoder = codecs.getincrementaldecoder(self.encoding)(_ERRORS)
        self._is_start = True
        self._is_end = False

    @property
    def raw_bytes_read(self) -> int:
        return self._raw.n_read

    @property
    def raw_size(self) -> int | None:
        return self._raw.size

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._is_end:
            if self._sample:
                data, self._sample = self._sample, b""
            else:
                with self._explained():
                    data = self._read(READ_BYTES)
            self._is_end = not data
            piece = self._utf8(self._decoder.decode(data, final=self._is_end))
            if piece:
                return piece
        raise StopIteration

    def _utf8(self, text: str) -> bytes:
        if self._is_start:
            text = text.removeprefix("\ufeff")
            self._is_start = False
        try:
            return text.encode()
        except UnicodeEncodeError:
            text, n_replaced = _SURROGATE.subn("\ufffd", text)
            self.replaced_bytes += n_replaced
            return text.encode()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What the operating system or a decompressor raises, as an InputError."""
        try:
            yield
        except EOFError as error:
            raise InputError(
                f"reading '{self._name}': expected whole compressed data, found that it ends too early, "
                f"after {self.raw_bytes_read} bytes; get the file again"
            ) from error
        except (OSError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"reading '{self._name}': expected a readable file, found: {error}") from error
            raise InputError(
                f"reading '{self._name}': expected whole compressed data, found damage within the first "
                f"{self.raw_bytes_read} bytes ({error}); get the file again"
            ) from error

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> Text:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def documents(sources: Sequence[str], *, name: str | None = None, encoding: str | None = None) -> Iterator[Document]:
    """The documents of files, folders, glob patterns and "-" (stdin, which needs a name), in the order given.

    Raises InputError (nothing there, a folder without text), UsageError (an unknown encoding; one name for several).
    """
    if encoding is not None:
        _codec(encoding)
    n_found = 0
    for source in sources:
        for document in _documents(source, name, encoding):
            n_found += 1
            if name is not None and n_found > 1:
                raise UsageError(f"naming a document '{name}': expected one source, found several; read them singly")
            yield document


def document(source: str, *, name: str | None = None, encoding: str | None = None) -> Document:
    """The one document of `source`; raises as `documents` does, and UsageError where there are several."""
    found = list(itertools.islice(documents([source], name=name, encoding=encoding), 2))
    if len(found) != 1:
        raise UsageError(f"reading '{source}': expected one document, found several; pass them one by one")
    return found[0]


def _documents(source: str, name: str | None, encoding: str | None) -> Iterator[Document]:
    if source == "-":
        if name is None:
            raise UsageError("reading stdin: expected a name for the document, found none; pass --name")
        yield Document(name, None, False, encoding)
        return
    try:
        mode = os.stat(source).st_mode  # noqa: PTH116 -- Path takes an empty name for the current folder
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if not glob.has_magic(source):
            reason = error.strerror if isinstance(error, OSError) else str(error)
            message = f"reading '{_printable(source)}': expected a file or folder, found: {reason}; check the path"
            raise InputError(message) from error
        matches = glob.iglob(source, recursive=True)  # noqa: PTH207 -- the pattern may be absolute
        paths: Iterable[str] = sorted(path for path in matches if Path(path).is_file())
        kind = "files that match the pattern"
    else:
        if not stat.S_ISDIR(mode):
            yield Document(name or _printable(source), source, stat.S_ISREG(mode), encoding)
            return
        paths, kind = _files(source), "a folder"
    n_texts = 0
    for path in paths:
        document = Document(name or _printable(path), path, True, encoding)
        if _may_be_text(document):
            n_texts += 1
            yield document
    if not n_texts:
        raise InputError(
            f"reading '{_printable(source)}': expected {kind} with text, found none; "
            "hidden, empty and binary files do not count"
        )


def _files(folder: str) -> Iterator[str]:
    """The regular files below `folder` that are not hidden, sorted by name, without following links to folders."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"reading folder '{_printable(folder)}': expected to list it, found: {error.strerror}; check permissions"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.is_file():
            yield entry.path


def _may_be_text(document: Document) -> bool:
    try:
        with document.text() as text:
            return text.raw_size != 0
    except _BinaryError:
        return False
    except InputError:
        return True  # what it is nobody knows: reading it will say why it fails


def _printable(path: str) -> str:
    """A path as Unicode text: bytes of a file name that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


# ---- bytes ----


class _Raw:
    """The bytes of a file or stdin, counted; `read` waits for all it is asked for, `read1` takes what has arrived."""

    def __init__(self, document: Document) -> None:
        self.n_read = 0
        self.size: int | None = None
        self._head = b""
        self._is_ours = document.path is not None
        if document.path is not None:
            try:
                self._file = Path(document.path).open("rb")  # noqa: SIM115 -- closed by `close`
            except OSError as error:
                raise InputError(
                    f"reading '{document.name}': expected a readable file, found: {error.strerror}; "
                    "check the path and permissions"
                ) from error
        elif sys.stdin is None:
            raise InputError("reading stdin: expected an open stream, found none; pass a file")
        else:
            self._file = cast("io.BufferedReader", sys.stdin.buffer)
        with contextlib.suppress(io.UnsupportedOperation):  # a stdin that is no file of the system
            status = os.fstat(self._file.fileno())
            self.size = status.st_size if stat.S_ISREG(status.st_mode) else None

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read; fewer only at the end."""
        self._head = self.read(size)
        return self._head

    def read(self, size: int) -> bytes:
        return _read_up_to(self.read1, size)

    def read1(self, size: int) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        data = self._file.read1(size)
        self.n_read += len(data)
        return data

    def close(self) -> None:
        if self._is_ours:
            self._file.close()


class _Zstd:
    """Zstandard frames in a row. The library's stream reader takes a file that was cut off for one that ended."""

    def __init__(self, raw: _Raw) -> None:
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


def _decompressed(raw: _Raw) -> Callable[[int], bytes]:
    """A function that reads up to so many bytes of what `raw` holds, without the compression around it."""
    found = _COMPRESSED.match(raw.peek(_MAGIC_BYTES))
    file = cast("BinaryIO", raw)  # `read` is all that these use
    match found and found.lastgroup:
        case "gzip":
            return gzip.GzipFile(fileobj=file).read1
        case "xz":
            return lzma.LZMAFile(file).read1
        case "bz2":
            return bz2.BZ2File(file).read1
        case "zstd":
            return _Zstd(raw).read1
    return raw.read1


def _read_up_to(read: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end."""
    parts = []
    while size and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---- encodings ----


def _codec(encoding: str) -> str:
    """Python's name of an encoding of text; raises UsageError."""
    try:
        b"a".decode(encoding, _ERRORS)
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"decoding text: expected the name of an encoding, found '{encoding}'; "
            "pass one such as utf-8, cp1252 or shift_jis"
        ) from error
    return name


def _checked_encoding(sample: bytes, codec: str | None, name: str) -> str:
    """The encoding of a text that begins so: `codec` where it is named; raises _BinaryError where this is no text."""
    for pattern, what, advice in _BINARY_PATTERNS:
        if pattern.match(sample):
            raise _BinaryError(f"reading '{name}': expected text, found {what}; {advice}")
    mark = next((encoding for bom, encoding in _BOMS if sample.startswith(bom)), None)
    if codec == "utf-8-sig":
        return "utf-8"
    if codec in ("utf-16", "utf-32"):
        return mark if mark and mark.startswith(codec) else f"{codec}-le"
    if codec is not None:
        return codec
    encoding = mark or _guessed(sample)
    if encoding is not None:
        text = _decoded(sample, encoding)
        n_odd = len(_CONTROL.findall(text)) + len(_SURROGATE.findall(text))
        if n_odd <= max(32, 0.3 * len(text)):
            return encoding
    raise _BinaryError(
        f"reading '{name}': expected text, found binary data; "
        "if it is text, name its encoding, for example --encoding utf-16-le"
    )


def _guessed(sample: bytes) -> str | None:
    """The encoding of a text that begins so, without a byte order mark; None where it has none."""
    text = _decoded(sample, "utf-8")
    n_bad = len(_SURROGATE.findall(text))
    n_good = sum(not character.isascii() for character in text) - n_bad if n_bad else 0
    if n_good >= 10 * n_bad:
        return "utf-8"
    if b"\0" in sample:
        return None
    import charset_normalizer

    # The library refuses an encoding in which the sample ends within a character: end it after a byte that is no part
    # of a larger character in any.
    end = max(map(sample.rfind, (b"\n", b" ", b"\r", b"\t", b",", b"."))) + 1
    matches = charset_normalizer.from_bytes(sample[:end] if end > len(sample) // 2 else sample)
    best = matches.best()
    if best is None:
        return None
    # The library takes the first of equals, in the order of names; Western European is the likeliest of them.
    is_western = any("cp1252" in match.could_be_from_charset and match.coherence >= best.coherence for match in matches)
    return "cp1252" if is_western else codecs.lookup(best.encoding).name


def _decoded(sample: bytes, encoding: str) -> str:
    """The sample as text, a lone surrogate for each undecodable byte; a character cut at its end is left out."""
    return codecs.getincrementaldecoder(encoding)(_ERRORS).decode(sample)
