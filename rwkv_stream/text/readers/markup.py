"""Markup: the text that a reader of an HTML page or of a chapter of an EPUB would see, as it streams past.

Paragraphs, headings, lists and tables are set apart by an empty line, lines and rows by a newline, cells by a tab;
white space is collapsed as a browser does, but kept in `pre`. Left out are the head, scripts, styles, navigation,
buttons, embedded things, and what is hidden by its own attributes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html.entities import html5
from typing import Any

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.encodings import decided, declared, decoded, utf8
from rwkv_stream.text.readers.places import Found, Place, Section
from rwkv_stream.text.readers.streams import PART_BYTES, READ_BYTES, DamageError, printable, said

PAGE_BYTES = 256 * 2**20
HEADING_CHARS = 200  # of a heading these name the chapter


def _tags(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SKIPPED = _tags(
    "head title script style template noscript nav svg iframe object audio video canvas map select datalist button "
    "textarea noframes"
)
_PARAGRAPHS = _tags(
    "p h1 h2 h3 h4 h5 h6 ul ol dl table blockquote pre hr section article header footer main aside figure address "
    "fieldset form details"
)
_LINES = _tags("div li dt dd tr br caption figcaption summary legend center body thead tbody tfoot")
_CELLS = _tags("td th")
_HEADINGS = _tags("h1 h2 h3")
_PREFORMATTED = _tags("pre listing xmp")
_BREAKS = ("", " ", "\t", "\n", "\n\n")  # what separates more comes later
_SPACE = " \t\n\r\f"
_SPACES = re.compile(r"[ \t\n\r\f]+")
_INVISIBLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"
_EMPTY_RAW = re.compile(rb"<(title|script|style|textarea|iframe|noscript|noframes|xmp)(\s[^<>]*)?/>", re.IGNORECASE)
_NAMED = re.compile(rb"&(?!(?:amp|lt|gt|quot|apos);)([A-Za-z][A-Za-z0-9]{1,31});")
_ENTITY_DECLARED = re.compile(rb"<!ENTITY\b", re.IGNORECASE)


class Prose:
    """Push the events of a parser of HTML or XHTML; take the text as sections.

    anchors  ids of elements and the chapters that begin there; None: headings begin chapters
    """

    def __init__(self, anchors: Mapping[str, Place] | None = None) -> None:
        self.n_events = 0
        self._anchors = anchors
        self._told: list[Section] = []
        self._parts: list[str] = []  # of the section that goes on
        self._place: Place | None = None  # of the section that begins with them
        self._heading: list[str] | None = None  # what has been read of one
        self._skipped = 0  # the depth in what is left out
        self._preformatted = 0
        self._is_at_pre = False  # a newline here is none
        self._break = 0
        self._is_empty = True  # nothing of this section has been told

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.n_events += 1
        tag = _local(tag)
        if self._anchors is not None and (place := self._anchors.get(attributes.get("id", ""))) is not None:
            self._begin(place)
        if self._skipped or tag in _SKIPPED or _is_hidden(attributes):
            self._skipped += 1
            return
        if tag in _HEADINGS and self._anchors is None:
            self._begin(None)
            self._heading = []
        self._preformatted += tag in _PREFORMATTED
        self._is_at_pre = tag in _PREFORMATTED
        if tag == "br" and self._break == 3:
            self._break = 4
        self._edge(tag)

    def end(self, tag: str) -> None:
        self.n_events += 1
        if self._skipped:
            self._skipped -= 1
            return
        tag = _local(tag)
        if tag in _HEADINGS and self._heading is not None:
            self._named()
        self._preformatted -= tag in _PREFORMATTED
        if tag != "br":
            self._edge(tag)

    def data(self, text: str) -> None:
        self.n_events += 1
        if self._skipped:
            return
        if self._preformatted:
            if self._is_at_pre:
                text = text.removeprefix("\n")
                self._is_at_pre = False
            if text := text.lstrip("\n") if self._is_empty else text:
                self._tell(text)
            return
        words = _SPACES.sub(" ", text)
        if words[:1] == " ":
            self._break = max(self._break, 1)
        if body := words.strip(" "):
            self._tell(body)
            self._break = int(words[-1] == " ")

    def close(self) -> None:
        self._begin(None)

    def take(self) -> list[Section]:
        """What is known by now."""
        if self._parts and self._heading is None:
            self._flush()
        told, self._told = self._told, []
        return told

    def _edge(self, tag: str) -> None:
        """A break where an element begins or ends."""
        if tag in _PARAGRAPHS:
            self._break = 4
        elif tag in _LINES:
            self._break = max(self._break, 3)
        elif tag in _CELLS:
            self._break = max(self._break, 2)

    def _tell(self, text: str) -> None:
        separator = "" if self._is_empty else _BREAKS[self._break]
        self._parts += [separator, text]
        self._is_empty, self._break = False, 0
        if self._heading is not None:
            self._heading += [separator, text]
            if sum(map(len, self._heading)) > 10 * HEADING_CHARS:
                self._named()

    def _begin(self, place: Place | None) -> None:
        """A section ends; the next one begins, at `place` where that is known."""
        if self._heading is not None:
            self._named()
        self._flush()
        if place is not None:
            self._place = place
            self._is_empty = True

    def _named(self) -> None:
        """The heading is known, and so where the section is that it begins; one without text begins none."""
        assert self._heading is not None
        title = " ".join("".join(self._heading).split())[:HEADING_CHARS]
        self._heading = None
        if title:
            while self._parts and self._parts[0] in _BREAKS:
                self._parts.pop(0)
            self._place = {"chapter": title}
            self._flush()

    def _flush(self) -> None:
        text = "".join(self._parts)
        self._parts.clear()
        if text:
            self._told.append(Section(self._place, text))
            self._place = None


def _local(tag: str) -> str:
    return tag.rpartition("}")[2].lower()


def _is_hidden(attributes: Mapping[str, str]) -> bool:
    """Page numbers of the printed book stand in the middle of sentences, and are no part of them."""
    is_page_number = attributes.get(EPUB_TYPE) == "pagebreak" or attributes.get("role") == "doc-pagebreak"
    return "hidden" in attributes or is_page_number or bool(_INVISIBLE.search(attributes.get("style", "")))


# ---- a page ----


def page(pieces: Iterable[bytes]) -> Iterator[Section]:
    """The text of an HTML page, given as UTF-8; its headings begin chapters.

    No tree is made of it, but libxml2 keeps what it is fed: PAGE_BYTES at most.
    """
    from lxml import etree

    prose = Prose()
    parser = etree.HTMLParser(target=prose, encoding="utf-8")
    n_bytes = n_waiting = 0
    for piece in pieces:
        n_bytes += len(piece)
        if n_bytes > PAGE_BYTES:
            raise DamageError(f"more than {PAGE_BYTES >> 20} MiB")
        n_events = prose.n_events
        parser.feed(piece)
        n_waiting = 0 if prose.n_events > n_events else n_waiting + len(piece)
        if n_waiting > PART_BYTES // 4:
            raise DamageError(f"a tag or comment of over {n_waiting >> 20} MiB")
        yield from prose.take()
    parser.close()
    yield from prose.take()


# ---- XML ----


def xml(data: bytes, name: str, part: str) -> tuple[Any, InputError | None]:
    """The root element of a part of a package, an lxml element; where it is not well-formed, of what can be read of it,
    and what is to be told. Raises InputError, DamageError."""
    from lxml import etree

    refuse_entities(data, name, part)
    options = {"resolve_entities": False, "no_network": True, "huge_tree": True}
    try:
        return etree.fromstring(data, etree.XMLParser(**options)), None
    except etree.XMLSyntaxError as error:
        root = etree.fromstring(data, etree.XMLParser(**options, recover=True))
        if root is None:
            raise DamageError(said(error)) from error
        return root, InputError(
            f"reading '{name}': expected a whole '{printable(part)}', found damage ({said(error)}); what can be read "
            "of it is"
        )


def refuse_entities(data: bytes, name: str, part: str) -> None:
    if _ENTITY_DECLARED.search(data[:READ_BYTES].replace(b"\0", b"")):  # in UTF-16 too
        raise InputError(
            f"reading '{name}': expected XML without entities of its own, found such in '{printable(part)}'; "
            "they are how small files grow without bound"
        )


def chapter(data: bytes, anchors: Mapping[str, Place] | None, name: str, part: str) -> list[Found]:
    """The text of a chapter of an EPUB: XHTML, or what is near enough; raises InputError."""
    from lxml import etree

    refuse_entities(data, name, part)
    try:
        prose = Prose(anchors)
        parser = etree.XMLParser(target=prose, resolve_entities=False, no_network=True)
        parser.feed(_NAMED.sub(_numbered, data))
        parser.close()
    except etree.XMLSyntaxError:
        prose = Prose(anchors)
        parser = etree.HTMLParser(target=prose, encoding="utf-8")
        decision = decided(data, None, declared(data))
        parser.feed(_EMPTY_RAW.sub(rb"<\1\2></\1>", utf8(decoded(data, decision.name if decision else "utf-8"))[0]))
        parser.close()
    return list(prose.take())


def _numbered(entity: re.Match[bytes]) -> bytes:
    """An entity of HTML, which no parser of XML knows, by number."""
    characters = html5.get(entity[1].decode() + ";", "")
    return b"".join(b"&#%d;" % ord(character) for character in characters) or entity[0]
