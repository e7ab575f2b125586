"""DOCX: the paragraphs of a document, those in tables and text boxes among them; headings begin chapters.

python-docx holds the whole package: PACKAGE_BYTES at most, unpacked, and the tree of its text beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.markup import refuse_entities
from rwkv_stream.text.readers.places import Section
from rwkv_stream.text.readers.streams import PART_BYTES, Opened, open_zip_member, zip_file

PACKAGE_BYTES = 256 * 2**20
TITLE_CHARS = 200
_PROLOG_BYTES = 4096
_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_PARAGRAPH, _CELL, _ROW = _W + "p", _W + "tc", _W + "tr"
_CHARACTERS = {_W + "tab": "\t", _W + "br": "\n", _W + "cr": "\n", _W + "noBreakHyphen": "-"}
_SKIPPED = frozenset(
    (
        _PARAGRAPH,  # of a text box: it comes by itself
        _W + "pPr",
        _W + "moveFrom",
        "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",  # says the same again
    )
)


def sections(opened: Opened) -> Iterator[Section]:
    """Raises InputError, and whatever python-docx does of a damaged package."""
    import docx

    _check(opened)
    document = docx.Document(opened.file())
    headings = {style.style_id for style in document.styles if _is_heading(style.name or "")}
    body = document.element.body
    for paragraph in body.iter(_PARAGRAPH):
        if any(True for _ in paragraph.iterancestors("{*}Fallback")):
            continue
        text = "".join(_texts(paragraph)).strip("\n")
        if not text.strip():
            continue
        style = paragraph.find(f"{_W}pPr/{_W}pStyle")
        if style is not None and style.get(_W + "val") in headings:
            yield Section({"chapter": " ".join(text.split())[:TITLE_CHARS]}, text + "\n\n")
        else:
            yield Section(None, text + _break_after(paragraph))


def _is_heading(style_name: str) -> bool:
    return style_name in ("Title", "Heading 1", "Heading 2", "Heading 3")


def _texts(element: Any) -> Iterator[str]:
    for child in element:
        if child.tag == _W + "t":
            yield child.text or ""
        elif child.tag in _CHARACTERS:
            yield _CHARACTERS[child.tag]
        elif child.tag not in _SKIPPED:
            yield from _texts(child)


def _break_after(paragraph: Any) -> str:
    """An empty line; in a table a tab between cells, a newline between rows and between the paragraphs of a cell."""
    cell = paragraph.getparent()
    if cell.tag != _CELL:
        return "\n\n"
    if paragraph.getnext() is not None:
        return "\n"
    return "\t" if cell.getnext() is not None else "\n"


def _check(opened: Opened) -> None:
    with zip_file(opened) as archive:
        n_bytes = sum(member.file_size for member in archive.infolist())
        n_text = sum(member.file_size for member in archive.infolist() if member.filename.endswith(".xml"))
        if n_bytes > PACKAGE_BYTES or n_text > PART_BYTES:
            raise InputError(
                f"reading '{opened.name}': expected a DOCX of at most {PART_BYTES >> 20} MiB of text and "
                f"{PACKAGE_BYTES >> 20} MiB in all, unpacked, found {n_text >> 20} and {n_bytes >> 20}; save it as text"
            )
        for member in archive.infolist():
            if member.filename.endswith((".xml", ".rels")):
                with open_zip_member(archive, member, opened.name) as file:
                    refuse_entities(file.read(_PROLOG_BYTES), opened.name, member.filename)
