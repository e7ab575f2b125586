"""PDF: the text of each page, one at a time, in the order in which it is drawn.

Words that are hyphenated at the end of a line are put together, ligatures taken apart. A page that cannot be read is
told of; so is one whose contents are missing or break off, of which what is there is read. pypdf holds the directory of
the file and what pages share, some 10 KiB a page, and has its own limits on what a hostile file may unpack to.
"""

from __future__ import annotations

import io
import logging
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.places import Found, LossError, Section
from rwkv_stream.text.readers.streams import READ_BYTES, DamageError, Opened, parsing

if TYPE_CHECKING:
    from pypdf import PdfReader
    from pypdf.errors import PdfReadError

_HYPHENATED = re.compile("(?<=[^\\W\\d_])(?P<hyphen>[-\u2010\u00ad])\n(?=(?P<next>[^\\W\\d_]))")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_CATALOG = re.compile(rb"(?<!\d)(?P<object>\d{1,10} \d{1,5}) obj\s*<<(?:(?!endobj)[\s\S]){0,500}?/Type\s*/Catalog\b")
_CATALOG_BYTES = 600  # of a match, at most
_EDGE = re.compile(rb"\bendobj\b|(?<!end)stream(?=\r?\n)")
_DEFLATED = ("/FlateDecode", "/Fl")


def sections(opened: Opened) -> Iterator[Found]:
    """Raises InputError, and whatever pypdf does of a damaged file."""
    logging.getLogger("pypdf").addHandler(logging.NullHandler())  # what it mends is not ours to tell
    reader, cut = _opened(opened)
    if reader.is_encrypted and not reader.decrypt(""):
        raise InputError(f"reading '{opened.name}': expected a PDF without a password, found one; save it without")
    n_pages = len(reader.pages)
    is_empty = True
    first: dict[int, int] = {}  # the page that an object is
    for i in range(n_pages):
        text = ""
        try:
            with parsing():
                page = reader.pages[i]
                problem = _problem(page)
                reference = page.indirect_reference
                if reference is not None and (before := first.setdefault(reference.idnum, i)) != i:
                    problem = problem or f"found page {before + 1} again"
                text = page.extract_text()
                if problem is None and text.count("\ufffd") > len(text) // 2:
                    problem = "found characters that no font of it names"
        except DamageError as error:
            problem = f"found damage ({error})"
        if problem is not None:
            is_empty = False
            yield LossError(opened.name, f"page {i + 1}", f"expected a whole page, {problem}")
        text = _HYPHENATED.sub(_joined, text.translate(_LIGATURES)).replace("\u00ad", "").strip("\n")
        is_empty = is_empty and not text.strip()
        yield Section({"page": i + 1}, text, (i + 1) / n_pages)
    if is_empty and cut is not None:
        raise cut
    if is_empty:
        raise InputError(
            f"reading '{opened.name}': expected a PDF with text, found {n_pages} pages without any, which may be "
            "pictures of pages; run OCR over it first, for example with ocrmypdf"
        )
    if cut is not None:
        yield InputError(
            f"reading '{opened.name}': expected a whole PDF document, found that its end is missing, and "
            "what stood there of its pages; get the file again"
        )
    missing = _n_said(reader) - n_pages
    if missing > 0:
        yield InputError(
            f"reading '{opened.name}': expected {n_pages + missing} pages, found {n_pages}; get the file again"
        )


def _opened(opened: Opened) -> tuple[PdfReader, PdfReadError | None]:
    """A reader, and what is wrong where the end of the file is missing, and with it the directory: the objects that are
    there are looked up one by one then."""
    from pypdf import PdfReader
    from pypdf.errors import PdfReadError

    try:
        return PdfReader(opened.file()), None
    except PdfReadError as error:
        file = opened.file()
        file.seek(0)
        root, end, is_in_stream = _left(file)
        if root is None:
            raise
        tail = b"\nendstream\nendobj" if is_in_stream else b""
        tail += b"\ntrailer\n<< /Root %s R >>\nstartxref\n0\n%%%%EOF\n" % root
        return PdfReader(io.BufferedReader(_WithTail(file, end, tail))), error


def _left(file: BinaryIO) -> tuple[bytes | None, int, bool]:
    """Of a document that was cut: number and generation of its catalog, None where that is packed; where its last whole
    object ends, or the contents of one that were begun, and which of the two that is."""
    root, end, is_in_stream = None, 0, False
    kept, at = b"", 0  # what was read last, and where it begins
    while data := file.read(READ_BYTES):
        kept += data
        for match in _CATALOG.finditer(kept):
            root = match["object"]
        for match in _EDGE.finditer(kept):
            end, is_in_stream = at + match.end(), match[0] == b"stream"
        at += max(0, len(kept) - _CATALOG_BYTES)
        kept = kept[-_CATALOG_BYTES:]
    return root, at + len(kept) if is_in_stream else end, is_in_stream


class _WithTail(io.RawIOBase):
    """The first `end` bytes of a file, with some others behind them."""

    def __init__(self, file: BinaryIO, end: int, tail: bytes) -> None:
        self._file, self._end, self._tail, self._at = file, end, tail, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end + len(self._tail)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at < self._end:
            self._file.seek(self._at)
            data = self._file.read(min(len(buffer), self._end - self._at))
        else:
            data = self._tail[self._at - self._end :][: len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _joined(hyphen: re.Match[str]) -> str:
    """A hyphen at the end of a line belongs to a word that goes on in small letters; a soft one to any."""
    return "" if hyphen["hyphen"] == "\u00ad" or hyphen["next"].islower() else hyphen[0]


def _n_said(reader: Any) -> int:
    """How many pages the file says that it has."""
    try:
        with parsing():
            return int(reader.root_object["/Pages"].get_object()["/Count"])
    except DamageError:
        return 0


def _problem(page: Any) -> str | None:
    """What is wrong with the contents of a page; pypdf takes what it can of them, and says nothing."""
    contents = page.get("/Contents")
    contents = None if contents is None else contents.get_object()
    if contents is None or type(contents).__name__ == "NullObject":
        return "found one without contents"
    for part in contents if isinstance(contents, list) else [contents]:
        stream = part.get_object()
        data = getattr(stream, "_data", None)
        if data is None:
            return "found that some of its contents are missing"
        filters = stream.get("/Filter")
        first = filters[0] if isinstance(filters, list) and filters else filters
        if first in _DEFLATED and not _is_whole(data):
            return "found contents that break off or are damaged"
    return None


def _is_whole(data: bytes) -> bool:
    """Whether deflated data unpack to their end."""
    unpacker = zlib.decompressobj()
    try:
        while data and not unpacker.eof:
            unpacker.decompress(data, 1 << 20)
            data = unpacker.unconsumed_tail
    except zlib.error:
        return False
    return unpacker.eof
