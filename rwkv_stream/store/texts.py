"""The kept text of a store: what a document's readings were given, as a chain of extents, and the postings over it.

An extent is an immutable file named by the SHA-256 of its bytes, with the text of one stretch of a document, its
places, and the name of the extent before it, as git's commits have it: equal beginnings are kept once, and the name of
the last extent of a text stands for all of it. Postings, which say what sentences of an extent hold which terms, are
derived: they are not synced, and made again from the extents where they are missing, damaged or older.
docs/store-format.md has the tables.

Offsets are bytes of the decoded UTF-8 text from the document's start. An extent may end within a character.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.store.sealed import (
    PREFIX,
    SMALL_FILE_LIMIT,
    Checks,
    check,
    damaged,
    header_length,
    is_count,
    is_digest,
    read_file,
    unpack,
)

if TYPE_CHECKING:
    from rwkv_stream.text.postings import Postings
    from rwkv_stream.text.readers.places import Place

TEXT, TEXT_VERSION = b"rwkv-txt", 1
POSTINGS, POSTINGS_VERSION = b"rwkv-pst", 1
EXTENT_BYTES = 1 << 20  # of text in an extent; of its places about as many
ZSTD_LEVEL = 3

_PLACES_LIMIT = 1 << 27  # a single place may be as long as a row of a table, with each character escaped
_SMALL_BYTES, _MAX_RATIO = 1 << 23, 64  # what is larger and packs better than this is no text, but a bomb
_POSTINGS_LIMIT = 1 << 27
_DIGEST_BYTES = 32
_POSTINGS_PREFIX = struct.Struct("<8sIII")
HEADER_LIMIT = PREFIX.size + SMALL_FILE_LIMIT + _DIGEST_BYTES  # bytes at an extent's start that hold its header
FILE_LIMIT = HEADER_LIMIT + 2 * (EXTENT_BYTES + _PLACES_LIMIT)

Sections = Sequence[tuple[int, "Place"]]  # where each begins, and its place
SavePostings = Callable[[str, bytes], object]  # is given the name of an extent, and its postings


class Stretch(NamedTuple):
    """Text that goes on where the text before it ended, and the sections that begin in it."""

    byte_start: int
    text: bytes
    sections: Sections

    @property
    def byte_end(self) -> int:
        return self.byte_start + len(self.text)


@dataclass(frozen=True, slots=True)
class Extent:
    """What an extent says of itself.

    previous  name of the extent before it, None at the document's start
    decided   byte where the text whose sentences are not yet decided begins
    language  of its sentences, ISO 639-1; "" where there is none, None while that is not decided
    line      newlines before it, None where the document is not one of lines
    places, frame  bytes of its places as JSON, and of the frame that holds text and places
    position  where in its file the frame begins
    """

    name: str
    position: int
    previous: str | None
    byte_start: int
    byte_end: int
    decided: int
    language: str | None
    line: int | None
    places: int
    frame: int

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.byte_end - self.byte_start

    @property
    def file_bytes(self) -> int:
        """Bytes of its file."""
        return self.position + self.frame


class Contents(NamedTuple):
    """What an extent holds: its text, the place that holds where it begins, and the sections that begin in it."""

    extent: Extent
    text: bytes
    place: Place
    sections: Sections

    def place_at(self, byte: int) -> Place:
        """As `KeptText.place`, of a byte of this extent or of its end."""
        i = bisect.bisect_right(self.sections, byte, key=lambda section: section[0])
        place = self.sections[i - 1][1] if i else self.place
        if self.extent.line is None:
            return dict(place)
        return {**place, "line": self.line_at(byte) + 1}

    def line_at(self, byte: int) -> int:
        """Newlines of the document before a byte."""
        assert self.extent.line is not None
        return self.extent.line + self.text.count(b"\n", 0, byte - self.extent.byte_start)


class Texts:
    """The extents and postings of a store; writes nothing and trusts nothing but checksums.

    All that reads raises SnapshotError for damage or a missing file, MismatchError for a file of a newer version.
    """

    def __init__(self, folder: Path, postings_folder: Path) -> None:
        self.folder, self.postings_folder = folder, postings_folder

    def path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def postings_path(self, name: str) -> Path:
        """Of the extent of that name."""
        return self.postings_folder / name[:2] / name

    def extent(self, name: str) -> Extent:
        """What the header of an extent says, which has a checksum of its own; the rest may be damaged still."""
        path = self.path(name)
        try:
            extent = decode_header(read_file(path, HEADER_LIMIT, is_prefix=True), path)
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise _missing(path) from error
        if size != extent.file_bytes:
            raise damaged(path, f"{extent.file_bytes} bytes", size)
        return extent

    def read(self, name: str) -> Contents:
        """All of an extent, checked against its name."""
        path = self.path(name)
        try:
            data = read_file(path, FILE_LIMIT)
        except FileNotFoundError as error:
            raise _missing(path) from error
        return decode(data, path)

    def chain(self, name: str | None) -> Iterator[Extent]:
        """An extent and those before it, nearest first, each going on where the one before it ended."""
        child: Extent | None = None
        while name is not None:
            extent = self.extent(name)
            if child is not None and extent.byte_end != child.byte_start:
                raise damaged(self.path(name), f"text up to byte {child.byte_start}", f"up to {extent.byte_end}")
            yield extent
            child, name = extent, extent.previous

    def tail(self, name: str | None, byte: int) -> bytes:
        """The text from a byte to the end of an extent."""
        parts: list[bytes] = []
        for extent in self.chain(name):
            if extent.byte_end <= byte:
                break
            parts.append(self.read(extent.name).text[max(0, byte - extent.byte_start) :])
        return b"".join(reversed(parts))

    # ---- postings ----

    def postings(self, name: str) -> tuple[Postings, Postings]:
        """Of an extent, as they were saved: of the sentences that its text decided, and of what is open at its end."""
        path = self.postings_path(name)
        try:
            return _decode_postings(read_file(path, _POSTINGS_LIMIT), path)
        except FileNotFoundError as error:
            raise damaged(path, "postings", "no file") from error

    def made_postings(self, name: str) -> bytes:
        """The bytes of an extent's postings, made from its text."""
        extent = self.extent(name)
        before = self.extent(extent.previous) if extent.previous is not None else None
        decided, language = (before.decided, before.language) if before is not None else (0, None)
        return _indexed(self.tail(name, decided), decided, language).encode()


class KeptText:
    """The text that a snapshot has read, all of it, from the document's start.

    document    its name, as of the snapshot
    byte_start  0
    byte_end    where the snapshot stands
    size_bytes  on disk, without the postings

    Holds 40 bytes for each extent, and one extent. Every method raises SnapshotError for damage.
    """

    byte_start = 0

    def __init__(
        self,
        texts: Texts,
        document: str,
        name: str,
        byte_end: int,
        save: SavePostings | None,
        *,
        inline: bytes | None = None,
    ) -> None:
        """The text whose last extent has that name.

        save    is given the postings that had to be made again
        inline  the bytes of the last extent, where it is in no file
        """
        self.document, self.byte_end = document, byte_end
        self._texts, self._save = texts, save
        self._contents: Contents | None = None
        self._inline = None if inline is None else decode(inline, texts.path(name))
        self._inline_bytes = inline
        self._inline_postings: tuple[Postings, Postings] | None = None
        self.size_bytes = 0
        starts, names = array("q"), bytearray()
        last = [] if self._inline is None else [self._inline.extent]
        for extent in itertools.chain(last, texts.chain(last[0].previous if last else name)):
            if not starts and extent.byte_end != byte_end:
                raise damaged(texts.path(name), f"text up to byte {byte_end}", f"up to {extent.byte_end}")
            starts.append(extent.byte_start)
            names += bytes.fromhex(extent.name)
            self.size_bytes += extent.file_bytes
        self._starts, self._names = starts[::-1], bytes(names)

    def read(self, byte_start: int, byte_end: int) -> bytes:
        """The text between two bytes."""
        parts = []
        at = max(byte_start, 0)
        while at < min(byte_end, self.byte_end):
            contents = self._at(at)
            first = at - contents.extent.byte_start
            parts.append(contents.text[first : byte_end - contents.extent.byte_start])
            at = contents.extent.byte_end
        return b"".join(parts)

    def place(self, byte: int) -> Place:
        """What a person would cite for a byte, as the document's reader said."""
        return self._at(byte).place_at(byte)

    @property
    def has_lines(self) -> bool:
        """Whether newlines tell its places."""
        return self._load(0).extent.line is not None

    @property
    def starts(self) -> Sequence[int]:
        """Where the extents begin."""
        return self._starts

    def byte_of_line(self, line: int) -> int | None:
        """Where a line begins, counted from 1; None behind the last. Of a text that `has_lines`."""
        if line <= 1:
            return 0
        i = max(0, bisect.bisect_left(range(len(self._starts)), line - 1, key=self._newlines_before) - 1)
        contents = self._load(i)
        missing, at = line - 1 - (contents.extent.line or 0), -1
        while missing and (at := contents.text.find(b"\n", at + 1)) >= 0:
            missing -= 1
        byte = contents.extent.byte_start + at + 1
        return None if missing or byte >= self.byte_end else byte

    def _newlines_before(self, i: int) -> int:
        extent = self._texts.extent(self._name(i))
        if extent.line is None:
            raise damaged(self._texts.path(extent.name), "an extent of a text of lines", "one of another text")
        return extent.line

    def sections(self) -> Iterator[tuple[int, Place]]:
        """Where sections begin, and their places without the line, in order; the first begins at byte 0."""
        for i in range(len(self._starts)):
            contents = self._load(i)
            if i == 0:
                yield 0, contents.place
            yield from contents.sections

    def cut(self, byte: int) -> tuple[str, bytes | None]:
        """The name of the last extent of the text up to a byte of it, and its bytes, where it is in no file."""
        contents = self._at(byte - 1)
        extent = contents.extent
        if extent.byte_end == byte:
            is_inline = self._inline is not None and extent.name == self._inline.extent.name
            return extent.name, self._inline_bytes if is_inline else None
        before = self._texts.extent(extent.previous) if extent.previous is not None else None
        values = {
            "previous": extent.previous,
            "byte_start": extent.byte_start,
            "byte_end": byte,
            "decided": before.decided if before is not None else 0,
            "language": before.language if before is not None else None,
            "line": extent.line,
        }
        sections = [section for section in contents.sections if section[0] < byte]
        data = encode(values, contents.text[: byte - extent.byte_start], _as_json(contents.place, sections))
        return hashlib.sha256(data).hexdigest(), data

    def pieces(self) -> Iterator[bytes]:
        """The text, an extent at a time; a piece may end within a character."""
        for i in range(len(self._starts)):
            yield self._load(i).text

    def postings(self, byte_start: int = 0) -> Iterator[Postings]:
        """Which sentences hold which terms, in the order of the text; made again where they are not there.

        byte_start  only sentences that begin before it may be left out
        """
        for i in range(self._holding(byte_start), len(self._starts)):
            decided, still_open = self._postings(i)
            yield decided
            if i == len(self._starts) - 1:
                yield still_open

    def _postings(self, i: int) -> tuple[Postings, Postings]:
        name = self._name(i)
        if self._inline is not None and i == len(self._starts) - 1:
            if self._inline_postings is None:
                previous = self._inline.extent.previous
                before = self._texts.extent(previous) if previous is not None else None
                decided, language = (before.decided, before.language) if before is not None else (0, None)
                text = self.read(decided, self.byte_end)
                made = _indexed(text, decided, language)
                self._inline_postings = made.sentences, made.still_open
            return self._inline_postings
        try:
            return self._texts.postings(name)
        except SnapshotError:
            data = self._texts.made_postings(name)
            if self._save is not None:
                self._save(name, data)
            return _decode_postings(data, self._texts.postings_path(name))

    def _name(self, i: int) -> str:
        at = len(self._names) - _DIGEST_BYTES * (i + 1)  # the last extent's comes first
        return self._names[at : at + _DIGEST_BYTES].hex()

    def _at(self, byte: int) -> Contents:
        return self._load(self._holding(byte))

    def _holding(self, byte: int) -> int:
        """Which extent holds a byte; the first one for a byte before the text, the last for one behind it."""
        return max(0, bisect.bisect_right(self._starts, byte) - 1)

    def _load(self, i: int) -> Contents:
        if self._inline is not None and i == len(self._starts) - 1:
            return self._inline
        name = self._name(i)
        if self._contents is None or self._contents.extent.name != name:
            self._contents = self._texts.read(name)
        return self._contents


class TextWriter:
    """Writes a document's text as extents, on from the one before.

    name   of the last extent, None while there is none
    place  that holds at its end, but for the line
    """

    def __init__(
        self,
        texts: Texts,
        after: str | None,
        place: Place,
        *,
        has_lines: bool,
        publish: Callable[[str, bytes, bytes], None],
    ) -> None:
        """Go on after the extent of this name, or begin.

        place      of the document, where one begins
        has_lines  whether newlines tell the places of one that begins
        publish    is given the name of an extent, its bytes and those of its postings, and lets them be in the store
        raises     SnapshotError where the extent before is damaged
        """
        self.name = after
        self._publish = publish
        self._byte = self._decided = 0
        self._language: str | None = None
        self.place: Place = place
        self._line = 0 if has_lines else None
        self._open = b""  # the text from `_decided` on
        if after is not None:
            last = texts.read(after)
            self._byte, self._decided, self._language = last.extent.byte_end, last.extent.decided, last.extent.language
            self.place = last.sections[-1][1] if last.sections else last.place
            self._line = None if last.extent.line is None else last.line_at(self._byte)
            self._open = texts.tail(after, self._decided)

    @property
    def has_lines(self) -> bool:
        """Whether newlines tell the places of the text."""
        return self._line is not None

    def write(self, stretch: Stretch) -> str:
        """Keep what comes next; durable, but for the postings, on return. The name of the last extent."""
        assert stretch.byte_start == self._byte, "text is kept without gaps"
        for part in parts(stretch):
            self._write(part)
        assert self.name is not None, "a text begins with some"
        return self.name

    def inline(self, stretch: Stretch, limit: int) -> tuple[str, bytes] | None:
        """The name and the bytes of one extent of at most `limit` bytes that comes next and is to be in no file; None
        where it would be larger. It is not written, and is the last: which of its sentences are decided is left open.
        """
        assert stretch.byte_start == self._byte, "text is kept without gaps"
        if len(stretch.text) > _MAX_RATIO * limit or sum(weight(place) for _, place in stretch.sections) > EXTENT_BYTES:
            return None
        data = self._encoded(stretch, self._decided, self._language)
        return (hashlib.sha256(data).hexdigest(), data) if len(data) <= limit else None

    def _encoded(self, part: Stretch, decided: int, language: str | None) -> bytes:
        values = {
            "previous": self.name,
            "byte_start": part.byte_start,
            "byte_end": part.byte_end,
            "decided": decided,
            "language": language,
            "line": self._line,
        }
        return encode(values, part.text, _as_json(self.place, part.sections))

    def _write(self, part: Stretch) -> None:
        indexed = _indexed(self._open + part.text, self._decided, self._language)
        data = self._encoded(part, indexed.decided, indexed.language)
        name = hashlib.sha256(data).hexdigest()
        self._publish(name, data, indexed.encode())
        self.name, self._byte = name, part.byte_end
        self._open = (self._open + part.text)[indexed.decided - self._decided :]
        self._decided, self._language = indexed.decided, indexed.language
        self.place = part.sections[-1][1] if part.sections else self.place
        if self._line is not None:
            self._line += part.text.count(b"\n")


def parts(stretch: Stretch) -> Iterator[Stretch]:
    """A stretch in parts that fit an extent each: of EXTENT_BYTES of text at most, and about as many of places."""
    start, first, n_places = stretch.byte_start, 0, 0

    def part(end: int, i: int) -> Stretch:
        text = stretch.text[start - stretch.byte_start : end - stretch.byte_start]
        return Stretch(start, text, stretch.sections[first:i])

    for i, (byte, place) in enumerate(stretch.sections):
        while byte - start > EXTENT_BYTES:
            yield part(start + EXTENT_BYTES, i)
            start, first, n_places = start + EXTENT_BYTES, i, 0
        n_places += weight(place)
        if n_places > EXTENT_BYTES and byte > start:
            yield part(byte, i)
            start, first, n_places = byte, i, weight(place)
    while start < stretch.byte_end:
        end = min(start + EXTENT_BYTES, stretch.byte_end)
        yield part(end, len(stretch.sections))
        start, first = end, len(stretch.sections)


def weight(place: Place) -> int:
    """About how many bytes a section takes among an extent's places."""
    return 32 + sum(len(value) for value in place.values() if isinstance(value, str))


# ---- as bytes ----


def _as_json(place: Place, sections: Sections) -> bytes:
    return json.dumps([place, sections], ensure_ascii=False, separators=(",", ":")).encode()


def encode(values: dict[str, Any], text: bytes, places: bytes) -> bytes:
    """The bytes of an extent; UsageError for a place that is too long to be kept."""
    import zstandard

    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(text + places)
    if len(places) > _PLACES_LIMIT or _is_bomb(len(text) + len(places), len(frame)):
        raise UsageError(
            f"keeping text: expected ids and titles of {_SMALL_BYTES} bytes at most, found {len(places)}; "
            "pass --no-text"
        )
    header = msgpack.packb({**values, "places": len(places), "frame": len(frame)})
    prefix = PREFIX.pack(TEXT, TEXT_VERSION, len(header)) + header
    return b"".join((prefix, hashlib.sha256(prefix).digest(), frame))


def _is_bomb(content: int, frame: int) -> bool:
    return content > max(_SMALL_BYTES, _MAX_RATIO * frame)


def decode_header(prefix: bytes, where: Path) -> Extent:
    """What an extent says of itself, under the name of its file.

    prefix  the first bytes of the extent, or all
    raises  SnapshotError, MismatchError for a newer version
    """
    start, length = PREFIX.size, header_length(prefix, TEXT, TEXT_VERSION, "a kept text", where)
    end = start + length
    if length > SMALL_FILE_LIMIT or hashlib.sha256(prefix[:end]).digest() != prefix[end : end + _DIGEST_BYTES]:
        raise damaged(where, "its header as it was written", "bytes that were changed or cut short since")
    values = unpack(prefix[start:end], where)
    check(values, _HEADER_CHECKS, where)
    extent = Extent(where.name, end + _DIGEST_BYTES, **values)
    if (
        not is_digest(where.name)
        or not 0 < extent.size <= EXTENT_BYTES
        or extent.decided > extent.byte_end
        or extent.places > _PLACES_LIMIT
        or _is_bomb(extent.size + extent.places, extent.frame)
        or (extent.previous is None) != (extent.byte_start == 0)
    ):
        raise damaged(where, "a stretch of text", str(values)[:200])
    return extent


def decode(data: bytes, where: Path) -> Contents:
    """What an extent holds; SnapshotError unless its bytes are those that its name says."""
    import zstandard

    extent = decode_header(data, where)
    if hashlib.sha256(data).hexdigest() != where.name:
        raise damaged(where, "it as it was written", "bytes that were changed since")
    frame = memoryview(data)[extent.position :]
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if len(frame) != extent.frame or size != extent.size + extent.places:
            raise damaged(where, f"a frame of {extent.size + extent.places} bytes", f"{len(frame)} that hold {size}")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        place, sections = json.loads(content[extent.size :])
    except zstandard.ZstdError as error:
        raise damaged(where, "a zstd frame", error) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(where, "the places of its text", error) from error
    if not _is_place(place) or not _are_sections(sections, extent):
        raise damaged(where, "the places of its text", str(place)[:80])
    return Contents(extent, content[: extent.size], place, [(byte, at) for byte, at in sections])


def _is_place(value: Any) -> bool:
    return type(value) is dict and all(type(part) in (str, int) for part in value.values())


def _are_sections(value: Any, extent: Extent) -> bool:
    last = extent.byte_start
    if type(value) is not list:
        return False
    for section in value:
        if type(section) is not list or len(section) != 2 or not is_count(section[0]) or not _is_place(section[1]):
            return False
        if not last <= section[0] < extent.byte_end:
            return False
        last = section[0]
    return True


_HEADER_CHECKS: Checks = {f.name: is_count for f in fields(Extent)[2:]} | {
    "previous": lambda value: value is None or is_digest(value),
    "language": lambda value: value is None or (type(value) is str and len(value) <= 8),
    "line": lambda value: value is None or is_count(value),
}


class _Indexed(NamedTuple):
    """The postings of some text, and what is known after it, as of `Extent`."""

    sentences: Postings
    still_open: Postings
    decided: int
    language: str | None

    def encode(self) -> bytes:
        """The bytes of a file of postings."""
        first, second = self.sentences.to_bytes(), self.still_open.to_bytes()
        body: bytes = _POSTINGS_PREFIX.pack(POSTINGS, POSTINGS_VERSION, len(first), len(second)) + first + second
        return body + hashlib.sha256(body).digest()


def _indexed(text: bytes, byte: int, language: str | None) -> _Indexed:
    """Of a text that begins at a byte, where the sentences before it end; an unfinished character at its end is left
    to what comes next."""
    from rwkv_stream.text.postings import Indexer
    from rwkv_stream.text.utf8 import n_whole

    indexer = Indexer(byte=byte, language=language)
    indexer.push(text[: n_whole(text)])
    sentences = indexer.cut()
    decided, language = indexer.decided, indexer.language
    return _Indexed(sentences, indexer.cut(final=True), decided, language)


def _decode_postings(data: bytes, where: Path) -> tuple[Postings, Postings]:
    """SnapshotError for damage, and for those of another version, which are made again too."""
    from rwkv_stream.text.postings import Postings

    body, start = data[:-_DIGEST_BYTES], _POSTINGS_PREFIX.size
    if len(body) < start or hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise damaged(where, "it as it was written", f"{len(data)} bytes that were changed or cut short since")
    magic, version, first, second = _POSTINGS_PREFIX.unpack_from(body)
    if magic != POSTINGS or version != POSTINGS_VERSION or start + first + second != len(body):
        raise damaged(where, f"postings of version {POSTINGS_VERSION}", f"{magic!r} of version {version}")
    try:
        return Postings.from_bytes(body[start : start + first]), Postings.from_bytes(body[start + first :])
    except ValueError as error:
        raise damaged(where, "postings", error) from error


def _missing(path: Path) -> SnapshotError:
    return damaged(path, "kept text", "no file")
