"""The text of a reading on its way into the store: held as it goes past, until a snapshot of it is published.

Text is kept without gaps from the document's start. A reading goes on after the text of the snapshot that it goes on
from. Where that has none, or one whose places may be another document's, the text goes past anyway while it is compared
with the snapshot, and is kept from the start. Lines are a function of the text; pages, chapters and rows are not.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rwkv_stream.errors import SnapshotError
from rwkv_stream.store.records import INLINE_BYTES
from rwkv_stream.store.texts import EXTENT_BYTES, Stretch, parts, weight

if TYPE_CHECKING:
    from rwkv_stream.reading.passes import Named, OpenText
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import TextWriter
    from rwkv_stream.text.readers.places import Place

log = logging.getLogger(__name__)


class Keeping:
    """Holds what was drawn and is not yet written: besides what is drawn ahead of the model about EXTENT_BYTES.

    `write` and `write_full` are called by one thread at a time, in the order of the text.
    """

    def __init__(self, store: Store, document: Named, text: OpenText) -> None:
        """The text is one of which nothing was drawn."""
        self._store, self._document, self._source = store, document, text
        self._writer = store.text_writer(None, document.place, has_lines=text.has_lines)
        self._text = bytearray()  # what is held
        self._byte = self._seen = 0  # where that begins, and how much went past
        self._sections: deque[tuple[int, Place]] = deque()  # that begin in it, or where it ends
        self._weight = 0
        self._settled = 0  # up to here the text is known to be the snapshot's that the reading goes on from
        self._is_over = False
        text.on_section.append(self._begin)

    @property
    def name(self) -> str | None:
        """Of the last extent that was written."""
        return self._writer.name

    def pieces(self) -> Iterator[bytes]:
        """The pieces of the text, held."""
        for piece in self._source:
            if not self._is_over:
                self._text += piece[max(0, self._byte - self._seen) :]
                self._seen += len(piece)
                self._settle()
            yield piece

    def _begin(self, byte: int, place: Place) -> None:
        if byte >= self._byte and not self._is_over:
            self._sections.append((byte, place))
            self._weight += weight(place)

    def reach(self, snapshot: Snapshot) -> None:
        """Note that the reading goes on from a snapshot or from one beyond it, and let its text be kept."""
        writer = self._after(snapshot)
        if writer is not None:
            self._writer = writer
            self._drop(snapshot.bytes)
        self._settled = snapshot.bytes
        self._settle()

    def _after(self, snapshot: Snapshot) -> TextWriter | None:
        """What goes on after the text of a snapshot; None where that is missing, damaged, or of other places."""
        if snapshot.text is None or snapshot.inline_extent is not None:
            return None
        place, has_lines = self._document.place, self._source.has_lines
        try:
            writer = self._store.text_writer(snapshot.text, place, has_lines=has_lines)
        except SnapshotError as error:
            log.warning("%s; the text of '%s' is kept again", error, self._document.name)
            return None
        alike = writer.place == place if has_lines else snapshot.document == self._document.name
        return writer if alike and writer.has_lines == has_lines else None

    def _settle(self) -> None:
        """Write what is settled, as far as it fills an extent or the snapshot is reached."""
        if self._byte < self._settled <= self._seen:
            self.write(self.take(self._settled))
        elif self._seen < self._settled and self.is_full(self._seen):
            self.write_full(self._seen)

    def take(self, byte: int) -> Stretch:
        """The text that is held up to a byte, to be written; it is not held any more."""
        stretch = self._stretch(byte)
        self._drop(byte)
        return stretch

    def write(self, stretch: Stretch) -> str:
        """As `TextWriter.write`."""
        return self._writer.write(stretch)

    def inline(self, stretch: Stretch) -> tuple[str, bytes] | None:
        """As `TextWriter.inline`, of what a record holds; None where the text began before it, too."""
        return self._writer.inline(stretch, INLINE_BYTES) if self.name is None else None

    def is_full(self, byte: int) -> bool:
        """Whether what is held up to a byte fills an extent."""
        return byte - self._byte > EXTENT_BYTES or (byte > self._byte and self._weight > EXTENT_BYTES)

    def write_full(self, byte: int) -> None:
        """Write what is held up to a byte, as far as it fills extents."""
        *full, rest = parts(self._stretch(byte))
        for part in full:
            self.write(part)
        self._drop(rest.byte_start)

    def close(self) -> None:
        """Hold nothing any more."""
        self._is_over = True
        self._drop(self._seen)

    def _stretch(self, byte: int) -> Stretch:
        sections = [section for section in self._sections if section[0] < byte]
        return Stretch(self._byte, bytes(self._text[: byte - self._byte]), sections)

    def _drop(self, byte: int) -> None:
        """Hold nothing before a byte, which may be yet to come."""
        del self._text[: byte - self._byte]
        self._byte = byte
        while self._sections and self._sections[0][0] < byte:
            self._weight -= weight(self._sections.popleft()[1])
