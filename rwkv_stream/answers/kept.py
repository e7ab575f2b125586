"""What a store has for questions: the texts that a snapshot has read, or those of all documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rwkv_stream.answers.answer import readings
from rwkv_stream.answers.strategy import ChunkState, Span
from rwkv_stream.errors import InputError, RwkvStreamError, SnapshotError, UsageError
from rwkv_stream.reading.isolated import holds
from rwkv_stream.reading.texts import text_of

if TYPE_CHECKING:
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.parts import Part
    from rwkv_stream.text.postings import Postings
    from rwkv_stream.text.readers.places import Place


class ReadText:
    """A text that a snapshot has read, and that remembers whether it was found to be damaged.

    reading               that snapshot; None of a text that no store keeps
    byte_start, byte_end  the part of it that is looked into
    """

    def __init__(self, text: KeptText, reading: Snapshot | None, part: tuple[int, int] | None = None) -> None:
        self.document, self.reading = text.document, reading
        self.byte_start, self.byte_end = part or (0, text.byte_end)
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
            for postings in self._text.postings():
                yield postings.within(self.byte_start, self.byte_end)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except SnapshotError:
            self.is_damaged = True
            raise


@contextlib.contextmanager
def read_texts(snapshot: Snapshot, store: Store, within: Part | None = None) -> Iterator[list[ReadText]]:
    """The texts that a snapshot has read, the last first, while this context lasts; or a part of the last alone.

    raises  InputError where no text was kept and the document is not to be had any more, SnapshotError for a damaged
            text, UsageError where there is no such part
    """
    with contextlib.ExitStack() as stack:
        if within is None:
            yield [ReadText(stack.enter_context(text_of(one, store)), one) for one in readings(snapshot)]
            return
        own = next(readings(snapshot))
        text = stack.enter_context(text_of(own, store))
        yield [ReadText(text, own, within.bytes(text))]


def until(ref: str, snapshot: Snapshot, store: Store) -> Snapshot:
    """The snapshot that a reference names, of those that this one has gone on or started from; of a position the
    nearest before, or where the document stands.

    raises  UsageError where it is none of them, and as `Store.get`
    """
    found = store.locate(ref, model=snapshot.model).near
    for one in readings(snapshot):
        if any(found.id == before.id for before in one.lineage()):
            return found
    raise UsageError(
        f"--until '{ref}': expected a snapshot that '{snapshot.document}' has gone on from, found that of "
        f"'{found.document}' at token {found.tokens:,}"
    )


def chunk_states(texts: Sequence[ReadText], store: Store) -> list[ChunkState]:
    """The parts of texts that are looked into, as stretches in their order: those whose states were kept and hold for
    what stands there now, and what is left between them; of a text without any such state none."""
    found = list[ChunkState]()
    for index, text in enumerate(texts):
        at, own = text.byte_start, list[ChunkState]()
        for one in store.chunk_states(text.reading) if text.reading is not None else ():
            if at <= one.anchor_byte and one.bytes <= text.byte_end and holds(one, text):
                if at < one.anchor_byte:
                    own.append(ChunkState(Span(index, at, one.anchor_byte), None))
                own.append(ChunkState(Span(index, one.anchor_byte, one.bytes), one))
                at = one.bytes
        if own and at < text.byte_end:
            own.append(ChunkState(Span(index, at, text.byte_end), None))
        found += own
    return found


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
