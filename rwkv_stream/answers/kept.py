"""What a store has for questions: the texts that a snapshot has read, or those of all documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rwkv_stream.answers.answer import readings
from rwkv_stream.errors import InputError, RwkvStreamError, SnapshotError
from rwkv_stream.reading.texts import text_of

if TYPE_CHECKING:
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.postings import Postings
    from rwkv_stream.text.readers.places import Place


class ReadText:
    """A text that a snapshot has read, and that remembers whether it was found to be damaged.

    reading  that snapshot
    """

    def __init__(self, text: KeptText, reading: Snapshot) -> None:
        self.document, self.byte_end = text.document, text.byte_end
        self.reading = reading
        self.is_damaged = False
        self._text = text

    def read(self, byte_start: int, byte_end: int) -> bytes:
        with self._watching():
            return self._text.read(byte_start, byte_end)

    def place(self, byte: int) -> Place:
        with self._watching():
            return self._text.place(byte)

    def postings(self) -> Iterator[Postings]:
        with self._watching():
            yield from self._text.postings()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except SnapshotError:
            self.is_damaged = True
            raise


@contextlib.contextmanager
def read_texts(snapshot: Snapshot, store: Store) -> Iterator[list[ReadText]]:
    """The texts that a snapshot has read, the last first, while this context lasts.

    raises  InputError where no text was kept and the document is not to be had any more, SnapshotError for a damaged
            text
    """
    with contextlib.ExitStack() as stack:
        yield [ReadText(stack.enter_context(text_of(one, store)), one) for one in readings(snapshot)]


@contextlib.contextmanager
def all_texts(
    store: Store, model: str | None, on_failure: Callable[[RwkvStreamError], None]
) -> Iterator[list[ReadText]]:
    """The texts of all documents that stand in a store, each once, while this context lasts.

    model       fingerprint of the one whose readings count; None: of all, the furthest of each document
    on_failure  is told of a document whose text is not to be had
    """
    furthest: dict[str, Snapshot] = {}
    for document, by, identity in store.heads():
        if model in (None, by):
            try:
                head = store.get(identity)
            except SnapshotError as error:
                on_failure(error)
                continue
            if document not in furthest or furthest[document].tokens < head.tokens:
                furthest[document] = replace(head, document=document)
    with contextlib.ExitStack() as stack:
        texts = []
        for one in furthest.values():
            try:
                texts.append(ReadText(stack.enter_context(text_of(one, store)), one))
            except (InputError, SnapshotError) as error:
                on_failure(error)
        yield texts
