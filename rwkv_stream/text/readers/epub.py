"""EPUB: the chapters of a book in the order of its spine, each named as its table of contents names it.

A chapter is read at a time; besides it, the directory of the ZIP and the table of contents are held.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag
from zipfile import ZipFile

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.markup import EPUB_TYPE, chapter, xml
from rwkv_stream.text.readers.places import Place, Section
from rwkv_stream.text.readers.streams import Opened, zip_file, zip_part

CONTENTS_BYTES = 4 * 2**20
TITLE_CHARS = 200
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_CHAPTERS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
_Anchors = dict[str, dict[str, Place]]  # part, then id of an element ("" is its start): the chapter that begins there


def sections(opened: Opened) -> Iterator[Section]:
    """Raises InputError, etree.XMLSyntaxError."""
    with zip_file(opened) as archive:
        book = _Book(archive, opened.name)
        parts = book.spine()
        book.refuse_locked(parts)
        anchors = book.anchors()
        place: Place = {}
        for i, part in enumerate(parts):
            here = dict(anchors.get(part, {}))
            place = here.pop("", place)
            yield Section(place, "")
            data = zip_part(archive, part, opened.name)
            for section in chapter(data, here if anchors else None, opened.name, part):
                place = section.place or place
                yield section._replace(share=(i + 1) / len(parts))


class _Book:
    """The package of a book."""

    def __init__(self, archive: ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        container = self._xml(_CONTAINER)
        package = next((e.get("full-path", "") for e in container.iterfind(".//{*}rootfile")), "")
        self._package = self._xml(package)
        self._folder = posixpath.dirname(package)
        self._items: dict[str, Any] = {e.get("id", ""): e for e in self._package.iterfind("{*}manifest/{*}item")}

    def _xml(self, part: str) -> Any:
        return xml(zip_part(self._archive, part, self._name, CONTENTS_BYTES), self._name, part)

    def spine(self) -> list[str]:
        """The parts that hold the chapters."""
        found = [self._items.get(e.get("idref", "")) for e in self._package.iterfind("{*}spine/{*}itemref")]
        parts = [_joined(self._folder, e.get("href", "")) for e in found if e is not None and _is_chapter(e)]
        if not parts:
            raise InputError(f"reading '{self._name}': expected chapters in the spine of an EPUB, found none")
        return parts

    def refuse_locked(self, parts: list[str]) -> None:
        """Fonts may be obfuscated, chapters not."""
        if _ENCRYPTION in self._archive.namelist():
            locked = {unquote(e.get("URI", "")) for e in self._xml(_ENCRYPTION).iterfind(".//{*}CipherReference")}
            if locked.intersection(parts):
                raise InputError(
                    f"reading '{self._name}': expected an EPUB without copy protection, found encrypted chapters; "
                    "get it without"
                )

    def anchors(self) -> _Anchors:
        """Where the table of contents says that chapters begin: that of EPUB 3, else that of EPUB 2."""
        nav = next((e for e in self._items.values() if "nav" in e.get("properties", "").split()), None)
        ncx = self._items.get(self._package.find("{*}spine").get("toc", ""))
        anchors: _Anchors = {}
        for item, links in ((nav, self._nav_links), (ncx, self._ncx_links)):
            if item is None or anchors:
                continue
            part = _joined(self._folder, item.get("href", ""))
            for href, title in links(self._xml(part)):
                target, fragment = urldefrag(href)
                chapter = " ".join(title.split())[:TITLE_CHARS]
                if chapter:
                    anchors.setdefault(_joined(posixpath.dirname(part), target), {})[fragment] = {"chapter": chapter}
        return anchors

    @staticmethod
    def _nav_links(root: Any) -> Iterator[tuple[str, str]]:
        for nav in root.iterfind(".//{*}nav"):
            if nav.get(EPUB_TYPE) == "toc":
                for link in nav.iterfind(".//{*}a"):
                    yield link.get("href", ""), "".join(link.itertext())

    @staticmethod
    def _ncx_links(root: Any) -> Iterator[tuple[str, str]]:
        for point in root.iterfind(".//{*}navPoint"):
            content, title = point.find("{*}content"), point.find("{*}navLabel/{*}text")
            if content is not None and title is not None:
                yield content.get("src", ""), title.text or ""


def _is_chapter(item: Any) -> bool:
    return item.get("media-type", "") in _CHAPTERS


def _joined(folder: str, href: str) -> str:
    return posixpath.normpath(posixpath.join(folder, unquote(urldefrag(href)[0])))
