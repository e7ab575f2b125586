"""PDF: the text of each page, one at a time, in the order in which it is drawn.

Words that are hyphenated at the end of a line are put together, ligatures taken apart. A page that cannot be read is
told of; so is one whose contents are missing or break off, of which what is there is read. pypdf holds the directory of
the file and what pages share, some 10 KiB a page, and has its own limits on what a hostile file may unpack to.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterator
from typing import Any

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.places import Found, LossError, Section
from rwkv_stream.text.readers.streams import DamageError, Opened, parsing

_HYPHENATED = re.compile("(?<=[^\\W\\d_])(?P<hyphen>[-\u2010\u00ad])\n(?=(?P<next>[^\\W\\d_]))")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})
_DEFLATED = ("/FlateDecode", "/Fl")


def sections(opened: Opened) -> Iterator[Found]:
    """Raises InputError, and whatever pypdf does of a damaged file."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").addHandler(logging.NullHandler())  # what it mends is not ours to tell
    reader = PdfReader(opened.file())
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
    if is_empty:
        raise InputError(
            f"reading '{opened.name}': expected a PDF with text, found {n_pages} pages without any, which may be "
            "pictures of pages; run OCR over it first, for example with ocrmypdf"
        )
    missing = _n_said(reader) - n_pages
    if missing > 0:
        yield InputError(
            f"reading '{opened.name}': expected {n_pages + missing} pages, found {n_pages}; get the file again"
        )


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
