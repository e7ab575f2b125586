"""PDF: the text of each page, one at a time, in the order in which it is drawn.

Words that are hyphenated at the end of a line are put together, ligatures taken apart. pypdf holds the directory of the
file and what pages share, some 10 KiB a page, and has its own limits on what a hostile file may unpack to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.places import Section
from rwkv_stream.text.readers.streams import Opened

_HYPHENATED = re.compile(r"(?<=[^\W\d_])-\n(?=([^\W\d_]))")
_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"})


def sections(opened: Opened) -> Iterator[Section]:
    """Raises InputError, and whatever pypdf does of a damaged file."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").addHandler(logging.NullHandler())  # what it mends is not ours to tell
    reader = PdfReader(opened.file())
    if reader.is_encrypted and not reader.decrypt(""):
        raise InputError(f"reading '{opened.name}': expected a PDF without a password, found one; save it without")
    n_pages = len(reader.pages)
    is_empty = True
    for i in range(n_pages):
        text = reader.pages[i].extract_text().translate(_LIGATURES)
        text = _HYPHENATED.sub(lambda found: "" if found[1].islower() else found[0], text).strip("\n")
        is_empty = is_empty and not text.strip()
        yield Section({"page": i + 1}, text, (i + 1) / n_pages)
    if is_empty:
        raise InputError(
            f"reading '{opened.name}': expected a PDF with text, found {n_pages} pages without any, which may be "
            "pictures of pages; run OCR over it first, for example with ocrmypdf"
        )
