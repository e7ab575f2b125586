"""What a snapshot had read last: the end of its text, from the document where that still lies."""

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
    from rwkv_stream.text.readers.places import Place


class LastWords(NamedTuple):
    """The end of what was read, decoded, and the place of its last character."""

    text: str
    place: Place


def last_words(snapshot: Snapshot, n_bytes: int) -> LastWords | None:
    """At most `n_bytes` of text before a snapshot; None unless its document is a file here that still holds that text.

    Reads the document up to the snapshot.
    """
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
