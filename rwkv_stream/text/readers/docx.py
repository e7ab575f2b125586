"""DOCX: the paragraphs of a document, those in tables and text boxes among them; headings begin chapters.

Cells are set apart by tabs, rows by newlines, empty cells stay. Equations are written on a line; footnotes, endnotes
and documents of another kind that are embedded (altChunk) stand where they are referred to. The main part is what the
package says, of any type that Word writes (documents, templates, with macros, strict); what else it refers to may be
missing. A part that is no well-formed XML is read as far as it can be, and told of.

The trees of the text, of its notes and of its styles are held: PART_BYTES at most.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator
from typing import Any
from zipfile import ZipFile

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers import markup
from rwkv_stream.text.readers.encodings import Decoded, decided, declared
from rwkv_stream.text.readers.places import Found, Section
from rwkv_stream.text.readers.streams import (
    Opened,
    explained,
    parsing,
    printable,
    unlisted,
    zip_file,
    zip_part,
)

TITLE_CHARS = 200
STYLES = 100  # a style may be based on another, no deeper
COLUMNS = 64  # the most that Word has
_MAIN = "word/document.xml"
_HEADINGS = ("title", "heading 1", "heading 2", "heading 3")
_CHARACTERS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_WRAPPERS = frozenset(("sdtContent", "sdt", "customXml", "smartTag", "ins", "moveTo"))
_SKIPPED = frozenset(
    (
        "p",  # of a text box: it comes by itself
        "pPr",
        "rPr",
        "moveFrom",
        "del",
        "instrText",
        "Fallback",  # says the same again
        "footnotePr",
        "endnotePr",
    )
)


def sections(opened: Opened) -> Iterator[Found]:
    """Raises InputError."""
    with zip_file(opened) as archive:
        if (problem := unlisted(opened, archive)) is not None:
            yield InputError(f"reading '{opened.name}': expected {problem}")
        yield from _Package(archive, opened.name).sections()


class _Package:
    def __init__(self, archive: ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        self._parts = {part.lower(): part for part in archive.namelist()}
        self._losses: list[InputError] = []
        self._main = next((part for kind, part in self._relations("").values() if kind == "officeDocument"), _MAIN)
        self._related = self._relations(self._main)
        self._notes: dict[str, dict[str, Any]] = {}

    def sections(self) -> Iterator[Found]:
        root = self._xml(self._main)
        if root is None:
            raise self._losses[0]
        headings = self._headings()
        self._notes = {kind: self._note_elements(kind) for kind in ("footnote", "endnote")}
        yield from self._taken()
        for element in root.iter("{*}p", "{*}altChunk"):
            if any(True for _ in element.iterancestors("{*}Fallback")):
                continue
            if _local(element) == "altChunk":
                yield from self._embedded(element)
                yield from self._taken()
                continue
            text = "".join(self._texts(element)).strip("\n")
            after = _break_after(element)
            if not text.strip() and after == "\n\n":
                continue
            style = element.find("{*}pPr/{*}pStyle")
            if style is not None and _value(style) in headings and text.strip():
                yield Section({"chapter": " ".join(text.split())[:TITLE_CHARS]}, text + after)
            else:
                yield Section(None, text + after)
            yield from self._taken()

    def _taken(self) -> Iterator[InputError]:
        yield from self._losses
        self._losses.clear()

    # ---- the parts of the package ----

    def _xml(self, part: str, is_needed: bool = True) -> Any:
        """The root of a part; None, and a loss, where there is none. Where it is not well-formed, what can be read."""
        name = self._parts.get(part.lower())
        if name is None and not is_needed:
            return None
        try:
            with explained(self._name, f"a whole '{printable(part)}'"), parsing():
                root, loss = markup.xml(zip_part(self._archive, name or part, self._name), self._name, part)
                self._losses += [loss] if loss is not None else []
                return root
        except InputError as error:
            self._losses.append(error)
            return None

    def _lose(self, what: str, found: str) -> None:
        self._losses.append(InputError(f"reading '{self._name}': expected {what}, found {found}"))

    def _relations(self, part: str) -> dict[str, tuple[str, str]]:
        """What a part is related to: the kind of each and its name, by their ids; those outside are left out."""
        folder, file = posixpath.split(part)
        root = self._xml(posixpath.join(folder, "_rels", f"{file}.rels"), is_needed=False)
        found = {}
        for relation in root.iterfind("{*}Relationship") if root is not None else ():
            if relation.get("TargetMode") != "External":
                target = posixpath.normpath(posixpath.join("/", folder, relation.get("Target", "")))
                found[relation.get("Id", "")] = relation.get("Type", "").rpartition("/")[2], target.lstrip("/")
        return found

    def _part_of(self, kind: str) -> Any:
        """The root of the part of that kind, None where the document has none."""
        part = next((part for related, part in self._related.values() if related == kind), None)
        return None if part is None else self._xml(part, is_needed=False)

    def _headings(self) -> set[str]:
        """The ids of styles that are headings, or are based on one."""
        root = self._part_of("styles")
        names: dict[str, str] = {}
        bases: dict[str, str] = {}
        for style in root.iterfind("{*}style") if root is not None else ():
            id = _attribute(style, "styleId")
            names[id] = _value(style.find("{*}name")).lower()
            bases[id] = _value(style.find("{*}basedOn"))
        found = {id for id, name in names.items() if name in _HEADINGS}
        for _ in range(STYLES):
            more = {id for id, base in bases.items() if base in found} - found
            if not more:
                break
            found |= more
        return found

    def _note_elements(self, kind: str) -> dict[str, Any]:
        root = self._part_of(f"{kind}s")
        notes = root.iterfind(f"{{*}}{kind}") if root is not None else ()
        return {_attribute(note, "id"): note for note in notes}

    # ---- the text ----

    def _texts(self, element: Any) -> Iterator[str]:
        for child in element:
            tag = _local(child)
            if tag == "t":
                yield child.text or ""
            elif tag in _CHARACTERS:
                yield _CHARACTERS[tag]
            elif tag == "oMath":
                yield _equation(child)
            elif tag in ("footnoteReference", "endnoteReference"):
                yield self._note(tag.removesuffix("Reference"), _attribute(child, "id"))
            elif tag == "sym":
                yield _symbol(child)
            elif tag not in _SKIPPED:
                yield from self._texts(child)

    def _note(self, kind: str, id: str) -> str:
        note = self._notes.get(kind, {}).get(id)
        if note is None:
            self._lose(f"a {kind} '{printable(id)}'", "none")
            return ""
        return " [" + " ".join("".join(self._texts(p)).strip() for p in note.iter("{*}p")).strip() + "]"

    def _embedded(self, element: Any) -> Iterator[Found]:
        """The text of a part of another kind."""
        part = self._related.get(_attribute(element, "id"), ("", ""))[1]
        what = f"an embedded document '{printable(part)}'"
        name = self._parts.get(part.lower())
        if name is None:
            self._lose(what, "none")
            return
        try:
            with explained(self._name, what), parsing():
                data = zip_part(self._archive, name, self._name)
                yield from self._embedded_text(data, what)
        except InputError as error:
            self._losses.append(error)

    def _embedded_text(self, data: bytes, what: str) -> Iterator[Found]:
        if data.startswith(b"PK"):
            with ZipFile(io.BytesIO(data)) as archive:
                inner = _Package(archive, self._name)
                inner._related = {id: (kind, p) for id, (kind, p) in inner._related.items() if kind != "aFChunk"}
                yield from inner.sections()
            return
        if data.lstrip().startswith(b"{\\rtf"):
            self._lose(what, "one in RTF, which is not read; save the document in Word")
            return
        decision = decided(data, None, declared(data))
        if decision is None:
            self._lose(what, "binary data")
            return
        rest = iter((data, b""))
        pieces = Decoded(lambda _: next(rest, b""), decision, self._name)
        if b"<" in data[:4096]:
            yield from markup.page(pieces)
        else:
            yield Section(None, b"".join(pieces).decode())
        yield Section(None, "\n\n")


def _local(element: Any) -> str:
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _attribute(element: Any, name: str) -> str:
    """An attribute, of whatever name space."""
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _value(element: Any) -> str:
    return "" if element is None else _attribute(element, "val")


def _symbol(element: Any) -> str:
    try:
        code = int(_attribute(element, "char"), 16)
    except ValueError:
        return ""
    return chr(code) if 32 <= code < 0xD800 else ""  # others are private to a font


def _break_after(paragraph: Any) -> str:
    """An empty line; in a table a tab between cells, a newline between rows and between the paragraphs of a cell."""
    cell = paragraph.getparent()
    while cell is not None and _local(cell) in _WRAPPERS:
        cell = cell.getparent()
    if cell is None or _local(cell) != "tc":
        return "\n\n"
    if _is_followed(paragraph, "p", "tbl"):
        return "\n"
    span = _value(cell.find("{*}tcPr/{*}gridSpan"))
    extra = min(int(span), COLUMNS) - 1 if span.isdecimal() and int(span) else 0
    return "\t" * extra + ("\t" if _is_followed(cell, "tc") else "\n")


def _is_followed(element: Any, *tags: str) -> bool:
    """Whether one of these follows, in whatever is wrapped around both."""
    while True:
        for other in element.itersiblings():
            if _local(other) in tags or (
                _local(other) in _WRAPPERS and any(_local(inner) in tags for inner in other.iter())
            ):
                return True
        element = element.getparent()
        if element is None or _local(element) not in _WRAPPERS:
            return False


# ---- equations ----


def _equation(element: Any) -> str:
    """An equation on a line, as in Office's linear format: a/b, x^2, √(x), ∑_(i=1)^n."""
    return "".join(_math(child) for child in element)


def _math(element: Any) -> str:
    tag = _local(element)

    def part(name: str) -> str:
        found = element.find(f"{{*}}{name}")
        return "" if found is None else _equation(found)

    match tag:
        case "t":
            return element.text or ""
        case "f":
            return f"{_grouped(part('num'))}/{_grouped(part('den'))}"
        case "sSup":
            return f"{_grouped(part('e'))}^{_grouped(part('sup'))}"
        case "sSub":
            return f"{_grouped(part('e'))}_{_grouped(part('sub'))}"
        case "sSubSup":
            return f"{_grouped(part('e'))}_{_grouped(part('sub'))}^{_grouped(part('sup'))}"
        case "rad":
            degree = part("deg")
            return f"{degree and '(' + degree + ')'}√({part('e')})"
        case "nary":
            sign = _value(element.find("{*}naryPr/{*}chr")) or "∫"
            sub, sup = part("sub"), part("sup")
            limits = (f"_{_grouped(sub)}" if sub else "") + (f"^{_grouped(sup)}" if sup else "")
            return f"{sign}{limits} {part('e')}"
        case "d":
            marks = element.find("{*}dPr")
            begin, end = (_mark(marks, name, default) for name, default in (("begChr", "("), ("endChr", ")")))
            return begin + "|".join(_equation(e) for e in element.iterfind("{*}e")) + end
        case "m":
            rows = ("&".join(_equation(e) for e in row.iterfind("{*}e")) for row in element.iterfind("{*}mr"))
            return "[" + "; ".join(rows) + "]"
        case "func":
            return f"{part('fName')} {part('e')}"
        case _ if tag.endswith("Pr"):
            return ""
        case _:
            return _equation(element)


def _mark(marks: Any, name: str, default: str) -> str:
    found = None if marks is None else marks.find(f"{{*}}{name}")
    return default if found is None else _value(found)


def _grouped(text: str) -> str:
    return text if len(text) < 2 or text.isalnum() else f"({text})"
