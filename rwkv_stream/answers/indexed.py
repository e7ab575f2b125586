"""The text of a document that no store keeps, with its places and an index of its sentences, to be looked into."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_stream.errors import InputError, OutputError, UsageError
from rwkv_stream.files import scratch
from rwkv_stream.store.texts import EXTENT_BYTES, KeptText, Stretch, Texts, TextWriter, weight

if TYPE_CHECKING:
    from rwkv_stream.tables.parts import Watched
    from rwkv_stream.text.readers.places import Place


@contextlib.contextmanager
def indexed(document: Watched) -> Iterator[KeptText]:
    """The text of a document, read to its end, while this context lasts: in a temporary folder, as a store would keep
    it, so that memory does not grow with it. What a process that was killed left of such folders the next one removes.

    raises  InputError where it cannot be read to its end, or has no text; OutputError where the folder has no room
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch(_parent()))
            texts = Texts(folder / "texts", folder / "postings")
            name, byte = _fill(texts, document)
        except OSError as error:
            where = tempfile.gettempdir()
            raise OutputError(f"indexing '{document.name}' in '{where}': {error.strerror or error}") from error
        except UsageError as error:  # a place that is too long
            raise InputError(f"reading '{document.name}': {str(error).partition(';')[0]}") from error
        if name is None:
            raise InputError(f"reading '{document.name}': expected some text, found none")
        yield KeptText(texts, document.name, name, byte, lambda name, data: _write(texts.postings_path(name), data))


def _parent() -> Path:
    """The folder of this user's temporary folders; PermissionError where it is another's."""
    path = Path(tempfile.gettempdir(), f"rwkv-stream-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"expected '{path.name}' to be a folder of yours; set TMPDIR to another")
    return path


def _fill(texts: Texts, document: Watched) -> tuple[str | None, int]:
    """Write the text of a document; the name of its last extent, None where it has no text, and where it ends."""

    def publish(name: str, extent: bytes, postings: bytes) -> None:
        _write(texts.path(name), extent)
        _write(texts.postings_path(name), postings)

    with document.text() as text:
        writer = TextWriter(texts, None, document.place, has_lines=text.has_lines, publish=publish)
        held = _Held(writer)
        text.on_section(held.begin)
        for piece in text:
            held.add(piece)
    held.write()
    return writer.name, held.byte


class _Held:
    """Text on its way into extents, and the sections that begin in it or where it ends; `byte` is where it begins."""

    def __init__(self, writer: TextWriter) -> None:
        self.byte = 0
        self._writer = writer
        self._text = bytearray()
        self._sections: list[tuple[int, Place]] = []
        self._weight = 0

    def begin(self, byte: int, place: Place) -> None:
        self._sections.append((byte, place))
        self._weight += weight(place)

    def add(self, piece: bytes) -> None:
        self._text += piece
        if max(len(self._text), self._weight) >= EXTENT_BYTES:
            self.write()

    def write(self) -> None:
        if not self._text:
            return
        end = self.byte + len(self._text)
        self._writer.write(Stretch(self.byte, bytes(self._text), [one for one in self._sections if one[0] < end]))
        self._sections = [one for one in self._sections if one[0] >= end]
        self._weight = sum(weight(place) for _, place in self._sections)
        self._text.clear()
        self.byte = end


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
