"""The text around the hits of a search, cut from the documents that they name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rwkv_stream.errors import InputError
from rwkv_stream.tables.search import Hit
from rwkv_stream.text.readers import Document
from rwkv_stream.text.units import Window


def surroundings(hits: Sequence[Hit], documents: Iterator[Document], around: int) -> dict[int, str]:
    """By rank, the text of hits with `around` bytes before and after, cut from those of the documents that they name.

    Of a unit without text (a document) only its first `around` bytes. Left out: hits of documents that are not there,
    that cannot be read, or no longer hold the row's text at its span. Each document is read once, to its last hit.
    """
    found: dict[int, str] = {}
    wanted: dict[str, list[Hit]] = {}
    for hit in hits:
        wanted.setdefault(hit.document, []).append(hit)
    for document in documents:
        if document.name in wanted:
            with contextlib.suppress(InputError):  # the row's own text serves
                found.update(_cut(document, wanted.pop(document.name), around))
        if not wanted:
            break
    return found


def _cut(document: Document, hits: Sequence[Hit], around: int) -> dict[int, str]:
    def span(hit: Hit) -> tuple[int, int]:
        end = hit.byte_end if hit.text is not None else min(hit.byte_end, hit.byte_start)
        return max(0, hit.byte_start - around), end + around

    waiting = sorted(hits, key=span)
    window = Window()
    n_bytes = 0
    found: dict[int, str] = {}

    def take(limit: int | None) -> None:
        """Cut what lies before byte `limit`, or all that waits."""
        for hit in [hit for hit in waiting if limit is None or span(hit)[1] <= limit]:
            waiting.remove(hit)
            start, end = span(hit)
            if hit.text is None or hit.text.strip() in window.text(hit.byte_start, hit.byte_end):
                found[hit.rank] = window.bytes(start, end).decode("utf-8", "ignore")

    with document.text() as text:
        for piece in text:
            window.push(piece)
            n_bytes += len(piece)
            take(n_bytes)
            if not waiting:
                return found
            window.drop(min(n_bytes, min(span(hit)[0] for hit in waiting)))
        take(None)
    return found
