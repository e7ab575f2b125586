"""What a snapshot had read last: the end of its text, as it was kept, else from the document where that still lies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.reading.passes import HashedText
from rwkv_stream.text import readers

if TYPE_CHECKING:
    from rwkv_stream.store import Snapshot
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.readers.places import Place


class LastWords(NamedTuple):
    """The end of what was read, decoded, and the place of its last character."""

    text: str
    place: Place


def last_words(snapshot: Snapshot, n_bytes: int, kept: KeptText | None) -> LastWords | None:
    """At most `n_bytes` of text before a snapshot; None where its text was not kept, and its document is no file here
    that still holds it.

    Reads the document up to the snapshot where the text was not kept.
    raises  SnapshotError for kept text that is damaged
    """
    if kept is not None:
        words = kept.read(kept.byte_end - n_bytes, kept.byte_end).decode("utf-8", "ignore")
        return LastWords(words, kept.place(max(0, kept.byte_end - 1)))
    if not Path(snapshot.document).is_file():
        return None
    with contextlib.suppress(InputError, UsageError):  # no text any more, or several documents: the words are not there
        tail = bytearray()
        with readers.document(snapshot.document, encoding=snapshot.encoding).text() as text:
            if HashedText(_watched(text, snapshot.bytes, n_bytes, tail)).holds(snapshot):
                return LastWords(tail.decode("utf-8", "ignore"), text.place(max(0, snapshot.bytes - 1)))
    return None


def _watched(pieces: Iterable[bytes], end: int, n_bytes: int, tail: bytearray) -> Iterator[bytes]:
    """The same pieces; the last `n_bytes` before byte `end` of what went past are in `tail`."""
    position = 0
    for piece in pieces:
        tail += piece[: max(0, end - position)]
        del tail[:-n_bytes]
        position += len(piece)
        yield piece
