"""Readers: sources as documents, and a document as a stream of valid UTF-8, whatever it is kept in.

A `Document` names a text; `Document.text()` opens it as an iterator of UTF-8 pieces whose concatenation is the text, so
that byte offsets are those of the pieces, and `Text.place` says what a person would cite for a byte. The same file
gives the same text however its bytes arrive. What stays out: tokens.

* Around a file one layer of gzip, zstd, xz or bz2 is taken off; bytes decide what it is, names only help (`kinds`).
* Plain text, pages, JSON lines and CSV have an encoding, decided once: as soon as the text is more than ASCII
  (`encodings`). Naming it skips that, and lets a slow pipe begin at once.
* Of what is damaged the smallest part that can be is lost: a page, a chapter, a row, a member, what follows a byte. A
  reader yields an `InputError` in its place, which says what, where and why, and goes on; `Text.losses` has them. A
  document of which nothing can be read fails with the first.
* A text of sections (pages, chapters, rows) is these, joined by a separator that depends on the kind alone.
* An archive is as many documents as it has members with text (`archives`), one archive deep inside another. A table is
  one document with its rows as sections, or with `rows` as many documents as it has rows (`tables`).
* Of members of an archive that have one name the last is read, as tar does; a hard link is what it links to.
* A folder is read recursively in the order of names, without hidden files, links to folders, what a `.gitignore` names,
  empty files and files without text; a glob and an archive give theirs by the same rules. One line names and counts
  what was left out. What cannot be opened there is a document that fails when read, with one line that says why: a
  locked folder, a row that is none, the rest of an archive.
* Memory does not grow with a file, except where its module says so (`markup`, `epub`, `pdf`, `docx`, `tables`).
"""

from __future__ import annotations

import glob
import importlib
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.extras import needed
from rwkv_stream.text.readers import docx, epub, folders, markup, pdf, remote, tables
from rwkv_stream.text.readers.archives import OPENERS, Archive, Entry, Member, listed
from rwkv_stream.text.readers.encodings import SAMPLE_BYTES, Decision, Decoded, codec, utf8
from rwkv_stream.text.readers.folders import LeftOut, Patterns
from rwkv_stream.text.readers.kinds import ARCHIVES, NAMES, TABLES, Kind, NotTextError, Served, kind, whole
from rwkv_stream.text.readers.places import Found, Lines, LossError, Place, Section, Sections
from rwkv_stream.text.readers.streams import (
    READ_BYTES,
    Broken,
    Content,
    File,
    Opened,
    Origin,
    Stdin,
    explained,
    parsing,
    printable,
    reversible,
)
from rwkv_stream.text.readers.tables import Columns, TableRow

__all__ = ["READ_BYTES", "SAMPLE_BYTES", "Document", "Place", "Text", "document", "documents"]

log = logging.getLogger(__name__)

NESTED = 2  # an archive may be in an archive, no deeper
MESSAGES = 10  # of a damaged archive
LOSSES = 1000  # of a document are kept; more are counted
_SEPARATORS = {"html": "\n\n", "epub": "\n\n", "docx": "", "pdf": "\n", "jsonl": "\n", "csv": "\n", "parquet": "\n"}
_PACKAGES = {  # the module that is imported, and the package that brings it
    "html": ("lxml.etree", "lxml"),
    "epub": ("lxml.etree", "lxml"),
    "docx": ("lxml.etree", "lxml"),
    "pdf": ("pypdf", "pypdf"),
}


@dataclass(frozen=True, slots=True)
class Document:
    """A named text that can be opened.

    name        its path or URL as typed (with the way inside a folder or archive), or the name that was given; of a
                record `#` and its number come after that of the file, of a row too; a byte that is not UTF-8 is `\\xe9`
    path        that of the file, None for stdin
    reopenable  False where it can be read only once: stdin, pipes
    encoding    what the user named, or a server said, or None
    id          of a row, what its table says; of a record, its address
    kind        of `kinds`, or "row"; None where that is known only on reading: stdin, pipes, what cannot be opened
    place       what a person would cite for all of it
    flaw        what is odd with it, though it is read: a loss of its text
    """

    name: str
    path: str | None
    reopenable: bool
    encoding: str | None = None
    id: str | int | None = None
    kind: str | None = None
    place: Place = field(default_factory=dict)
    origin: Origin = field(kw_only=True, repr=False)
    opened: Opened | None = field(default=None, kw_only=True, repr=False)  # what was looked into and can be read once
    hint: str | None = field(default=None, kw_only=True, repr=False)  # a name that may say what it is
    served: Served | None = field(default=None, kw_only=True, repr=False)
    flaw: str | None = field(default=None, kw_only=True, repr=False)
    columns: Columns = field(default=Columns(), kw_only=True, repr=False)

    def text(self, encoding: str | None = None) -> Text:
        """Open it; an encoding that is given (the user's, or that of an earlier reading) is not decided again.

        Raises InputError, UsageError (an unknown encoding).
        """
        return Text(self, encoding or self.encoding)


class Text:
    """An open document: an iterator of UTF-8 pieces on character edges, and how far it is.

    encoding        name of the Python codec, "ascii" while all is that; "utf-8" where the format knows of none
    encoding_source how it was found, as of an `encodings.Decision`; None where the format knows of none
    replaced_bytes  undecodable bytes so far
    losses          what could not be read so far, one line each, the first LOSSES of `n_losses`
    raw_bytes_read  bytes read from the file so far, before decompression and decoding
    raw_size        size of the file, None where it is not known
    on_section      what is called where a section of the text begins, with that byte and its place, before its piece
                    is given
    """

    def __init__(self, document: Document, encoding: str | None) -> None:
        named = None if encoding is None else codec(encoding)
        self.replaced_bytes = self.n_losses = 0
        self.losses: list[InputError] = []
        self.on_section: list[Callable[[int, Place], object]] = []
        self._document = document
        self._share: float | None = None
        self._n_bytes = 0
        self._is_said = False
        self._opened = document.opened or Opened(document.origin, document.name)
        try:
            found = Kind("row", Decision("utf-8", "named")) if document.kind == "row" else self._kind(named)
            self._kind_name = found.name
            self._sections = Sections()
            self._lines = Lines() if found.name == "text" else None
            self._decoded = Decoded(self._read, found.decision, document.name) if found.decision else None
            self._pieces = self._joined(self._extracted()) if found.name in _SEPARATORS else self._plain()
            if document.flaw is not None:
                self._lose(InputError(f"reading '{document.name}': {document.flaw}"))
        except BaseException:
            self.close()
            raise

    @property
    def encoding(self) -> str:
        return self._decoded.decision.name if self._decoded is not None else "utf-8"

    @property
    def encoding_source(self) -> str | None:
        return self._decoded.decision.source if self._decoded is not None else None

    @property
    def raw_bytes_read(self) -> int:
        raw = self._opened.raw
        if self._share is not None and raw.size is not None:
            return round(self._share * raw.size)
        return raw.n_read

    @property
    def raw_size(self) -> int | None:
        return self._opened.raw.size

    @property
    def has_lines(self) -> bool:
        """Whether places are lines, which newlines tell; else they are those of sections."""
        return self._lines is not None

    def place(self, byte: int) -> Place:
        """What a person would cite for that byte of the text: {"line": 12}, {"page": 3}, {"chapter": "Of Lamps"},
        {"row": 7, "id": "a7"}, …; {} where there is nothing.

        Bytes are asked for in rising order, none more than 1 MiB behind what has been read.
        """
        found = self._lines.at(byte) if self._lines is not None else self._sections.at(byte)
        return {**self._document.place, **found}

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = next(self._pieces, b"")
        self._n_bytes += len(piece)
        if piece:
            return piece
        self.say_replaced()
        if not self._n_bytes and self.losses and self._document.flaw is None:
            raise self._all_lost()
        raise StopIteration

    def say_replaced(self) -> None:
        """Say once how many bytes could not be decoded so far; at its end the text does."""
        if self.replaced_bytes and not self._is_said:
            self._is_said = True
            _say_replaced(self._document.name, self.replaced_bytes)

    def _lose(self, loss: InputError) -> None:
        self.n_losses += 1
        if self.n_losses <= LOSSES:
            self.losses.append(loss)

    def _all_lost(self) -> InputError:
        """Why nothing at all could be read."""
        first = self.losses[0]
        if self.n_losses == 1:
            return first
        what = "rows" if self._kind_name in TABLES else "parts"
        why = f"{first.part}: {first.problem}" if isinstance(first, LossError) else str(first)
        return InputError(
            f"reading '{self._document.name}': expected {what}, found {self.n_losses} that are none; the first is {why}"
        )

    def _read(self, size: int) -> bytes:
        """The bytes that can be read."""
        while True:
            try:
                return self._opened.read(size)
            except InputError as error:
                self._lose(error)

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Text:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kind(self, named: str | None) -> Kind:
        document = self._document
        found = kind(self._opened, document.hint, named, document.columns.text, document.served)
        if found.name in ARCHIVES:
            raise InputError(
                f"reading '{document.name}': expected one text, found {NAMES[found.name]}; pass it as a file"
            )
        if found.name in _PACKAGES:
            module, package = _PACKAGES[found.name]
            with needed(package, "books", f"reading '{document.name}'", InputError):
                importlib.import_module(module)
        return found

    def _plain(self) -> Iterator[bytes]:
        assert self._decoded is not None
        for piece in self._decoded:
            self.replaced_bytes = self._decoded.replaced_bytes
            if self._lines is not None:
                self._lines.push(piece)
            yield piece

    def _joined(self, found: Iterator[Found]) -> Iterator[bytes]:
        """The sections as pieces, separated; their places are noted."""
        separator = _SEPARATORS[self._kind_name].encode()
        n_bytes, begun, n_surrogates = 0, None, 0
        while True:
            try:
                with explained(self._document.name, whole(self._kind_name)), parsing():
                    section = next(found, None)
            except InputError as error:
                section = error  # the last: a generator that has raised is at its end
            if section is None:
                break
            if isinstance(section, InputError):
                self._lose(section)
                continue
            begun = begun if section.place is None else {name: _whole(v) for name, v in section.place.items()}
            self._share = section.share
            for start in range(0, len(section.text), READ_BYTES // 4):
                piece, n_replaced = utf8(section.text[start : start + READ_BYTES // 4])
                n_surrogates += n_replaced
                self.replaced_bytes = n_surrogates + (0 if self._decoded is None else self._decoded.replaced_bytes)
                if begun is not None:
                    piece = separator + piece if n_bytes else piece
                    self._begin(n_bytes + (len(separator) if n_bytes else 0), begun)
                    begun = None
                n_bytes += len(piece)
                yield piece

    def _begin(self, byte: int, place: Place) -> None:
        self._sections.begin(byte, place)
        for listener in self.on_section:
            listener(byte, {**self._document.place, **place})

    def _extracted(self) -> Iterator[Found]:
        match self._kind_name:
            case "html":
                return markup.page(self._decoded or ())
            case "epub":
                return epub.sections(self._opened)
            case "pdf":
                return pdf.sections(self._opened)
            case "docx":
                return docx.sections(self._opened)
        return self._rows()

    def _rows(self) -> Iterator[Found]:
        """The rows with text as sections; those that are none are lost."""
        name = self._document.name
        rows = tables.rows(
            self._kind_name, self._opened, self._decoded or (), self._document.columns, self._document.hint
        )
        for row in rows:
            if (problem := row.problem or row.flaw) is not None:
                yield LossError(name, f"row {row.number}", problem)
            if row.problem is None:
                yield Section(_row_place(row), row.text, row.share)


def _whole(value: str | int) -> str | int:
    """A text without halves of characters."""
    return utf8(value)[0].decode() if isinstance(value, str) else value


def documents(
    sources: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    encoding: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rows: bool = False,
) -> Iterator[Document]:
    """The documents of files, folders, glob patterns, URLs and "-" (stdin, which needs a name), in the order given.

    text_column  of tables: the column of the text, and of the id
    id_column
    include      patterns, as of `.gitignore`, of the files of folders that are read; without any all of them
    exclude      patterns of those that are not
    rows         each row of a table is a document
    raises       InputError (nothing there, a folder without text), UsageError (an unknown encoding, a pattern
                 that is none; one name for several files)
    """
    if encoding is not None:
        codec(encoding)
    patterns = Patterns(tuple(include), tuple(exclude))
    search = _Search(name, encoding, Columns(text_column, id_column), patterns, rows)
    n_found = 0
    for source in sources:
        for file in search.files(_path(source)):
            n_found += 1
            if name is not None and n_found > 1:
                raise UsageError(f"naming a document '{name}': expected one source, found several; read them singly")
            yield from file


def document(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    encoding: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
) -> Document:
    """The one document of `source`; raises as `documents` does, and UsageError where there are several."""
    found = documents([source], name=name, encoding=encoding, text_column=text_column, id_column=id_column)
    first = list(itertools.islice(found, 2))
    if len(first) != 1:
        raise UsageError(f"reading '{source}': expected one document, found several; pass them one by one")
    return first[0]


def _path(source: str | os.PathLike[str]) -> str:
    try:
        return os.fsdecode(source)
    except TypeError:
        raise UsageError(f"reading {source!r:.40}: expected a path or a URL, found {type(source).__name__}") from None


@dataclass(frozen=True, slots=True)
class _Search:
    """What is looked for in every source."""

    name: str | None
    encoding: str | None
    columns: Columns
    patterns: Patterns
    rows: bool

    def files(self, source: str) -> Iterator[Iterator[Document]]:
        """For each file of a source that has text its documents."""
        found: Iterable[Document]
        left = LeftOut()
        if source == "-":
            if self.name is None:
                raise UsageError("reading stdin: expected a name for the document, found none; pass --name")
            yield self._in(Document(self.name, None, False, self.encoding, columns=self.columns, origin=Stdin()))
            return
        if remote.is_url(source):
            urls = remote.urls(source)
            if urls is None:
                yield self._in(self._file(source, remote.Remote(source)))
                return
            found = self._remote(urls, left)
            kind_of_source = "a folder or pattern"
        else:
            try:
                mode = os.stat(source).st_mode  # noqa: PTH116 -- Path takes an empty name for the current folder
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                if not glob.has_magic(source):
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    raise InputError(
                        f"reading '{printable(source)}': expected a file or folder, found: {reason}; check the path"
                    ) from error
                matches = glob.iglob(source, recursive=True)  # noqa: PTH207 -- the pattern may be absolute
                paths = (path for path in sorted(matches) if folders.may_be_file(path))
                found = (self._file(path, File(path)) for path in paths)
                kind_of_source = "files that match the pattern"
            else:
                if not stat.S_ISDIR(mode):
                    yield self._in(self._file(source, File(source), stat.S_ISREG(mode)))
                    return
                found, kind_of_source = self._folder(source, left), "a folder"
        n_texts = 0
        for file in found:
            inside = self._in(file, left)
            first = next(inside, None)
            if first is not None:
                n_texts += 1
                yield itertools.chain([first], inside)
        if not n_texts:
            raise InputError(
                f"reading '{printable(source)}': expected {kind_of_source} with text, found none"
                + (f"; left out: {left}; what is named itself is read" if left else "")
            )
        _say_left_out(source, left)

    def _remote(self, urls: Iterable[tuple[str, str | None]], left: LeftOut) -> Iterator[Document]:
        unwanted = self.patterns.matcher()
        for url, path in urls:
            if path is not None and (why := unwanted(path)) is not None:
                left.add(why, reversible(path))
            else:
                yield self._file(url, remote.Remote(url))

    def _folder(self, folder: str, left: LeftOut) -> Iterator[Document]:
        """The files below `folder` that are wanted; a folder that cannot be listed is a document that fails."""
        for path, error in folders.files(folder, self.patterns, left):
            if error is None:
                yield self._file(path, File(path))
                continue
            message = f"expected to list it, found: {error.strerror}; check permissions"
            yield _failing(self._file(path, File(path)), f"reading folder '{self.name or reversible(path)}': {message}")

    def _file(self, path: str, origin: Origin, reopenable: bool = True) -> Document:
        name = self.name or reversible(path)
        return Document(name, path, reopenable, self.encoding, columns=self.columns, origin=origin, hint=path)

    def _in(self, file: Document, left: LeftOut | None = None) -> Iterator[Document]:
        """The documents in a file; none where it has no text and is one among others, of which `left` are left out."""
        if not file.reopenable and not self.rows:
            yield file  # what it is will be seen on reading
            return
        try:
            opened = Opened(file.origin, file.name)
        except InputError:
            yield file  # reading it will say why
            return
        if not file.reopenable:
            yield from self._inside(replace(file, opened=opened), opened, left, depth=0)
            return
        with opened:
            yield from self._inside(file, opened, left, depth=0)

    def _inside(self, file: Document, opened: Opened, left: LeftOut | None, depth: int) -> Iterator[Document]:
        try:
            if left is not None and not opened.peek(1):
                left.add("empty", file.name)
                return
            found = kind(opened, file.hint, file.encoding, self.columns.text, file.served)
        except InputError as error:
            if left is not None and isinstance(error, NotTextError):
                left.add("without text", file.name)
            else:
                yield file  # reading it will say why, or be told the encoding
            return
        if found.name in TABLES and self.rows:
            yield from self._rows(file, opened, found)
        elif found.name not in ARCHIVES or not file.reopenable:
            yield replace(file, kind=found.name)
        elif depth == NESTED:
            yield _failing(
                file,
                f"reading '{file.name}': expected an archive in an archive at the most, found a deeper one; unpack it",
            )
        else:
            yield from self._members(file, opened, found.name, left, depth)

    def _members(
        self, file: Document, opened: Opened, kind: str, around: LeftOut | None, depth: int
    ) -> Iterator[Document]:
        n_texts = 0
        left = LeftOut() if around is None else around
        try:
            archive = OPENERS[kind](opened)
            with explained(file.name, whole(kind)):
                for entry in listed(archive, file.origin, file.name):
                    if entry.left_out is not None:
                        left.add(entry.left_out, f"{file.name}/{reversible(entry.name)}")
                        continue
                    for document in self._member(file, archive, entry, kind, left, depth):
                        n_texts += 1
                        yield document
        except InputError as error:
            yield _failing(file, str(error))
            return
        if archive.losses:
            shown = "; ".join(archive.losses[:MESSAGES]) + (" …" if len(archive.losses) > MESSAGES else "")
            yield _failing(file, f"reading '{file.name}': expected {whole(kind)}, found damage ({shown})")
            return
        if around is None and not n_texts:
            why = f"; left out: {left}" if left else ""
            yield _failing(file, f"reading '{file.name}': expected {NAMES[kind]} with text, found none in it{why}")
        elif around is None:
            _say_left_out(file.name, left)

    def _member(
        self, file: Document, archive: Archive, entry: Entry, kind: str, left: LeftOut, depth: int
    ) -> Iterator[Document]:
        member = replace(
            file,
            name=f"{file.name}{'#' if kind in ('warc', 'arc') else '/'}{reversible(entry.name)}",
            id=entry.id,
            place={} if entry.id is None else {"id": entry.id},
            origin=Member(file.origin, kind, entry.key),
            hint=None if kind in ("warc", "arc") else entry.name,
            served=entry.served,
        )
        if entry.problem is not None:
            yield _failing(member, f"reading '{member.name}': expected {entry.problem}")
            return
        try:
            with explained(member.name, whole(kind)):
                is_behind = entry.key < archive.at - 1  # what a link leads to
                raw = member.origin.open(member.name) if is_behind else archive.open(entry.key)
            inner = Opened(raw, member.name)
        except InputError as error:
            yield _failing(member, str(error))
            return
        with inner:
            yield from self._inside(member, inner, left, depth=depth + 1)

    def _rows(self, file: Document, opened: Opened, found: Kind) -> Iterator[Document]:
        losses: list[InputError] = []

        def read(size: int) -> bytes:
            while True:
                try:
                    return opened.read(size)
                except InputError as error:
                    losses.append(error)

        decoded = Decoded(read, found.decision, file.name) if found.decision else None
        try:
            with explained(file.name, whole(found.name)), parsing():
                for row in tables.rows(found.name, opened, decoded or (), self.columns, file.hint):
                    named = replace(
                        file,
                        name=f"{file.name}#{row.number}",
                        reopenable=True,
                        encoding="utf-8",
                        id=row.id,
                        kind="row",
                        opened=None,
                        place=_row_place(row),
                        origin=Content(utf8(row.text)[0]),
                        flaw=row.flaw,
                    )
                    yield named if row.problem is None else _failing(named, f"reading '{named.name}': {row.problem}")
        except InputError as error:
            losses.append(error)
        for loss in losses:
            yield _failing(file, str(loss))
        if decoded is not None and decoded.replaced_bytes:
            _say_replaced(file.name, decoded.replaced_bytes)


def _say_left_out(source: str, left: LeftOut) -> None:
    if left:
        log.warning("'%s': left out: %s; what is named itself is read", printable(source), left)


def _say_replaced(name: str, n_bytes: int) -> None:
    log.warning("'%s': %d bytes could not be decoded and became U+FFFD", name, n_bytes)


def _failing(document: Document, message: str) -> Document:
    """A document that raises InputError when it is opened."""
    return replace(document, kind=None, origin=Broken(message), opened=None)


def _row_place(row: TableRow) -> Place:
    return {"row": row.number} if row.id is None else {"row": row.number, "id": row.id}
