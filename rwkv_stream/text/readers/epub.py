"""EPUB: the chapters of a book in the order of its spine, each named as its table of contents names it.

What a chapter is, is told by its bytes, not by its media type; where an item of the spine is none, its fallback is
read. A part is found as reading systems find it: by its name, else without a leading slash, with `\\` as `/`, in any
case, unquoted or not, in whatever encoding its ZIP has it. What cannot be read is told of, and the rest is read; a book
whose table of contents cannot be read has the chapters that its headings name.

A chapter is read at a time; besides it, the directory of the ZIP and the table of contents are held.
"""

from __future__ import annotations

import logging
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote
from zipfile import ZipFile

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.markup import EPUB_TYPE, chapter, xml
from rwkv_stream.text.readers.places import Found, Place, Section
from rwkv_stream.text.readers.streams import Opened, explained, parsing, printable, unlisted, zip_file, zip_part

log = logging.getLogger(__name__)

CONTENTS_BYTES = 4 * 2**20
TITLE_CHARS = 200
_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_CHAPTERS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")
_PICTURE = re.compile(r"(?:image|audio|video|font)/", re.IGNORECASE)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\x00]*<")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_FLAG_UTF8 = 0x800
_Anchors = dict[str, dict[str, Place]]  # part, then id of an element ("" is its start): the chapter that begins there


def sections(opened: Opened) -> Iterator[Found]:
    """Raises InputError, etree.XMLSyntaxError."""
    with zip_file(opened) as archive:
        if (problem := unlisted(opened, archive)) is not None:
            yield InputError(f"reading '{opened.name}': expected {problem}")
        book = _Book(archive, opened.name)
        if book.damage is not None:
            yield book.damage
        spine = book.spine()
        anchors = book.anchors()
        yield from book.left_out(spine, anchors)
        place: Place = {}
        for i, item in enumerate(spine):
            share = (i + 1) / len(spine)
            if isinstance(item, InputError):
                yield item
                continue
            here = dict(anchors.get(item, {}))
            place = here.pop("", place)
            yield Section(place, "")
            try:
                with explained(opened.name, f"a whole chapter '{printable(item)}'"), parsing():
                    found = book.chapter(item, here if anchors else None)
            except InputError as error:
                yield error
                continue
            for part in found:
                if isinstance(part, InputError):
                    yield part
                else:
                    place = part.place or place
                    yield part._replace(share=share)


class _Book:
    """The package of a book."""

    def __init__(self, archive: ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        self._parts = set(archive.namelist())
        self._known: dict[str, str] = {}  # all that a part may be called, and its name in the archive
        for info in archive.infolist():
            for spelling in _spellings(info.filename, bool(info.flag_bits & _FLAG_UTF8)):
                self._known.setdefault(spelling, info.filename)
        package = self._package_part()
        self._package, self.damage = self._parsed(package)
        self._folder = posixpath.dirname(package)
        self._items: dict[str, Any] = {e.get("id", ""): e for e in self._package.iterfind("{*}manifest/{*}item")}

    def _parsed(self, part: str) -> tuple[Any, InputError | None]:
        return xml(zip_part(self._archive, part, self._name, CONTENTS_BYTES), self._name, part)

    def _xml(self, part: str) -> Any:
        root, damage = self._parsed(part)
        if damage is not None:
            log.warning("%s", damage)
        return root

    def _package_part(self) -> str:
        """The name of the package document; that of the first one in the archive where the container does not say."""
        try:
            with explained(self._name, "a whole container"), parsing():
                roots = self._xml(_CONTAINER).iterfind(".//{*}rootfile")
                path = next((root.get("full-path", "") for root in roots), "")
            if (found := self._found("", path)) is None:
                raise self._problem(f"'{printable(path)}' in it", "found none; get the file again")
            return found
        except InputError as error:
            package = next((part for part in self._archive.namelist() if part.endswith(".opf")), None)
            if package is None:
                raise
            log.warning("%s; '%s' is read", error, printable(package))
            return package

    def _found(self, folder: str, href: str) -> str | None:
        """The name in the archive of what a link in `folder` leads to, None where nothing is there."""
        target = href.partition("#")[0]
        paths = [
            posixpath.normpath(full)
            for path in (target, unquote(target), unquote(target).replace("\\", "/"))
            for full in (posixpath.join(folder, path), path.lstrip("/"), posixpath.join(folder, path.lstrip("/")))
        ]
        exact = next((path for path in paths if path in self._parts), None)
        return exact or next((self._known[key] for key in map(_folded, paths) if key in self._known), None)

    def _problem(self, what: str, problem: str) -> InputError:
        return InputError(f"reading '{self._name}': expected {what}, {problem}")

    # ---- the spine ----

    def spine(self) -> list[str | InputError]:
        """The parts that hold the chapters, in their order, and why some of them cannot be read."""
        locked = self._locked()
        parts = [self._part(ref, locked) for ref in self._refs()]
        found = [part for part in parts if part is not None]
        if not found:
            raise InputError(f"reading '{self._name}': expected chapters in the spine of an EPUB, found none")
        if found and all(isinstance(part, InputError) for part in found):
            raise found[0]  # type: ignore[misc]
        return found

    def left_out(self, spine: list[str | InputError], anchors: _Anchors) -> Iterator[InputError]:
        """The chapters that the table of contents names and the spine does not."""
        items = (self._items[id] for id in self._refs() if id in self._items)
        tried = {self._found(self._folder, item.get("href", "")) for item in items}
        for part in anchors:
            if part not in tried and part not in spine:
                yield self._problem(f"'{printable(part)}', which its contents name, in its spine", "found it not there")

    def _refs(self) -> list[str]:
        """The ids of the items of the spine."""
        return [ref.get("idref", "") for ref in self._package.iterfind("{*}spine//{*}itemref")]

    def _part(self, id: str, locked: set[str]) -> str | InputError | None:
        """The part of an item that is a chapter, or of the first of its fallbacks that is; None for a picture."""
        tried: set[str] = set()
        problem: InputError | None = None
        what = f"a chapter for the item '{printable(id)}' of its spine"
        while id not in tried:
            tried.add(id)
            item = self._items.get(id)
            if item is None:
                problem = problem or self._problem(what, "found none in its manifest")
                break
            href, media_type = item.get("href", ""), item.get("media-type", "")
            part = self._found(self._folder, href)
            if part is None:
                where = "one outside of it" if _REMOTE.match(href) else "no such part"
                problem = problem or self._problem(f"'{printable(href)}' in it", f"found {where}")
            elif part in locked:
                problem = problem or self._problem(
                    "an EPUB without copy protection", f"found encrypted chapters, '{printable(part)}'; get it without"
                )
            elif self._is_chapter(part, media_type):
                return part
            elif not _PICTURE.match(media_type):
                problem = problem or self._problem(what, f"found '{printable(media_type)}' in '{printable(part)}'")
            id = item.get("fallback", id)
        return problem

    def _is_chapter(self, part: str, media_type: str) -> bool:
        if media_type.partition(";")[0].strip().lower() in _CHAPTERS:
            return True
        if _PICTURE.match(media_type):
            return False
        with explained(self._name, "a whole ZIP archive"), parsing(), self._archive.open(part) as file:
            return _MARKUP.match(file.read(512)) is not None

    def _locked(self) -> set[str]:
        """The parts that are encrypted. Fonts may be, chapters not."""
        if _ENCRYPTION not in self._parts:
            return set()
        links = (e.get("URI", "") for e in self._xml(_ENCRYPTION).iterfind(".//{*}CipherReference"))
        return {self._found("", link) or link for link in links}

    def chapter(self, part: str, anchors: dict[str, Place] | None) -> list[Found]:
        return chapter(zip_part(self._archive, part, self._name), anchors, self._name, part)

    # ---- the table of contents ----

    def anchors(self) -> _Anchors:
        """Where the table of contents says that chapters begin: that of EPUB 3, else that of EPUB 2; none where it
        cannot be read."""
        nav = next((e for e in self._items.values() if "nav" in e.get("properties", "").split()), None)
        spine = self._package.find("{*}spine")
        ncx = self._items.get("" if spine is None else spine.get("toc", ""))
        for item, links in ((nav, _nav_links), (ncx, _ncx_links)):
            if item is not None and (anchors := self._anchors(item.get("href", ""), links)):
                return anchors
        return {}

    def _anchors(self, href: str, links: Callable[[Any], Iterator[tuple[str, str]]]) -> _Anchors:
        part = self._found(self._folder, href)
        anchors: _Anchors = {}
        try:
            if part is None:
                raise self._problem(f"its contents '{printable(href)}'", "found no such part")
            with explained(self._name, "a whole table of contents"), parsing():
                found = list(links(self._xml(part)))
        except InputError as error:
            log.warning("%s; its headings name the chapters", error)
            return {}
        for link, title in found:
            name = " ".join(title.split())[:TITLE_CHARS]
            target = self._found(posixpath.dirname(part), link) if name else None
            if target is not None:
                anchors.setdefault(target, {})[link.partition("#")[2]] = {"chapter": name}
        if not anchors:
            log.warning("'%s': its contents '%s' name no chapters; its headings do", self._name, printable(part))
        return anchors


def _nav_links(root: Any) -> Iterator[tuple[str, str]]:
    for nav in root.iterfind(".//{*}nav"):
        if nav.get(EPUB_TYPE) == "toc":
            for link in nav.iterfind(".//{*}a"):
                yield link.get("href", ""), "".join(link.itertext())


def _ncx_links(root: Any) -> Iterator[tuple[str, str]]:
    for point in root.iterfind(".//{*}navPoint"):
        content, title = point.find("{*}content"), point.find("{*}navLabel/{*}text")
        if content is not None and title is not None:
            yield content.get("src", ""), title.text or ""


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _spellings(part: str, is_utf8: bool) -> Iterator[str]:
    """What a part of a ZIP may be called in links; a name that is not marked as UTF-8 was read as cp437."""
    yield _folded(part)
    yield _folded(part.replace("\\", "/").lstrip("/"))
    if not is_utf8 and not part.isascii():
        raw = part.encode("cp437", "replace")
        for encoding in ("utf-8", "cp1252"):
            yield _folded(raw.decode(encoding, "replace"))
