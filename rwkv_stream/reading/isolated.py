"""States beside those of a reading: of stretches of a document, each read by itself, and of an instruction before one.

A chunk state has read what its document was started from, and CHUNK_TOKENS tokens of the document, nothing before
them. A question is read into all of them, so a detail is as near in the last as in the first. They lie beside the
snapshots of the reading, as records of their own kind, and go with it; each says which bytes of the document it has
read, and their digest, so that those of a text that was changed are told from those that still hold.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.reading.states import start_of
from rwkv_stream.store import NewSnapshot
from rwkv_stream.store.records import CHUNK_STATE, INSTRUCTION
from rwkv_stream.store.texts import Stretch
from rwkv_stream.text.chunker import chain, chunks

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.interrupts import StopRequest
    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.chunker import Chunk
    from rwkv_stream.text.tokenizer import Tokenizer

CHUNK_TOKENS = 2000
ROWS = 4  # chunks that are read side by side, where that leaves their bits as they are
NAME_CHARS = 60  # of an instruction, by which it is listed


@dataclass(frozen=True, slots=True)
class ChunkStates:
    """What was done.

    states   that there are now
    made     of them, those that were computed
    removed  that were of another text
    bytes    of the states that were made, in memory; on disk they are a little smaller
    """

    states: int
    made: int
    removed: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What states of all chunks of a document take: how many there are, and bytes, at the most."""

    states: int
    bytes: int


def cost(tokens: int, model: Model, size: int = CHUNK_TOKENS) -> Cost:
    """Of a document of so many tokens."""
    n = math.ceil(tokens / size)
    return Cost(n, n * model.zero_state().nbytes)


def keep_chunk_states(
    snapshot: Snapshot,
    *,
    model: Model,
    store: Store,
    size: int = CHUNK_TOKENS,
    stop: StopRequest | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ChunkStates:
    """Keep a state of each chunk of what a snapshot has read; those that hold already stay, and those of what a longer
    reading has read behind it; those of another text go.

    size         tokens of a chunk; all of a text that has fewer is one
    on_progress  is told how many bytes of the text are done
    raises       UsageError for a snapshot that is none of a reading, InputError where its text was not kept,
                 SnapshotError, StoreLockedError, StoppedError (those that are made stay), OSError of a full disk
    """
    text = store.text(snapshot)
    if text is None:
        raise InputError(
            f"keeping states of chunks of '{snapshot.document}': expected its text in the store, found none; read it "
            "again without --no-text"
        )
    start = start_of(snapshot, model)
    with store.writing():
        known = {(one.anchor_byte, one.bytes): one for one in store.chunk_states(snapshot)}
        n_known, n_made, n_bytes = len(known), 0, 0
        missing = _missing(text, known, model.tokenizer, size, on_progress)
        guarded = missing if stop is None else stop.guard(missing)
        for some in _alike(guarded, ROWS if model.backend == "cpu" else 1):
            for chunk, state, hidden in _read(some, start, model, snapshot.document):
                new = _of_chunk(chunk, snapshot, model, text, size)
                n_made, n_bytes = n_made + 1, n_bytes + state.nbytes
                store.put(new, state, hidden)
        head = store.head(snapshot.document, model.fingerprint)
        is_all = head is not None and head.id == snapshot.id
        gone = [one for one in known.values() if is_all or one.bytes <= snapshot.bytes]
        for one in gone:
            store.rm(one.id)
    return ChunkStates(n_known - len(gone) + n_made, n_made, len(gone), n_bytes)


class Readable(Protocol):
    """A text of which bytes can be read."""

    def read(self, byte_start: int, byte_end: int) -> bytes: ...


def holds(state: Snapshot, text: Readable) -> bool:
    """Whether a chunk state has read what stands now where it says."""
    stretch = text.read(state.anchor_byte, state.bytes)
    return len(stretch) == state.bytes - state.anchor_byte and hashlib.sha256(stretch).hexdigest() == state.text_digest


def _missing(
    text: KeptText,
    known: dict[tuple[int, int], Snapshot],
    tokenizer: Tokenizer,
    size: int,
    on_progress: Callable[[int], None] | None,
) -> Iterator[Chunk]:
    """The chunks of a text of which no state is known; those that are found are taken out of `known`."""
    for chunk in chunks(tokenizer.stream(text.pieces()), size):
        span = int(chunk.starts[0]), chunk.byte_end
        one = known.get(span)
        if one is not None and one.tokens == len(chunk.ids) and holds(one, text):
            del known[span]
        else:
            yield chunk
        if on_progress is not None:
            on_progress(chunk.byte_end)


def _alike(found: Iterable[Chunk], rows: int) -> Iterator[list[Chunk]]:
    """Chunks of one length, so many together."""
    for _, group in itertools.groupby(found, key=lambda chunk: len(chunk.ids)):
        while some := list(itertools.islice(group, rows)):
            yield some


def _read(some: list[Chunk], start: State, model: Model, document: str) -> Iterator[tuple[Chunk, State, Tensor]]:
    """Each chunk read from the start: the state after it, and the hidden state of its last token."""
    import torch

    from rwkv_stream.model.finite import not_finite

    ids = torch.from_numpy(np.stack([chunk.ids for chunk in some]))
    hidden, states = model.forward(ids, start.repeat(len(some)), logits="none")
    for i, chunk in enumerate(some):
        state = states.row(i)
        if not hidden[i].isfinite().all():
            raise not_finite(model, f"reading '{document}' from token {chunk.start_token:,}", state)
        yield chunk, state.to("cpu"), hidden[i, -1].clone().to("cpu")
    model.trim()


def _of_chunk(chunk: Chunk, reading: Snapshot, model: Model, text: KeptText, size: int) -> NewSnapshot:
    begin, end = int(chunk.starts[0]), chunk.byte_end
    return NewSnapshot(
        document=reading.document,
        model=model.fingerprint,
        model_path=model.path,
        tokenizer=model.tokenizer.id,
        start_digest=reading.start_digest,
        start=reading.start,
        chain=chain(_apart(CHUNK_STATE, f"{reading.document}\n{begin}"), chunk.ids).hex(),
        tokens=len(chunk.ids),
        bytes=end,
        chunk=size,
        leaf=True,
        parent=None,
        how=CHUNK_STATE,
        exact=True,
        numerics=model.numerics(size),
        encoding=reading.encoding,
        decided_byte=-1,
        text_digest=hashlib.sha256(text.read(begin, end)).hexdigest(),
        anchor_byte=begin,
        anchor_token=chunk.start_token,
    )


def _apart(how: str, what: str) -> bytes:
    """What a chain of tokens begins with that no reading of a document has: so none goes on from it, and each chunk
    state stands for one place."""
    return hashlib.sha256(f"rwkv-stream {how}\n{what}".encode()).digest()


# ---- instructions ----


def read_instruction(text: str, model: Model) -> tuple[NewSnapshot, State, Tensor]:
    """The state that has read an instruction, from the model's own start, and what is to be recorded of it.

    raises  UsageError for an empty one
    """
    from rwkv_stream.model.generation import read

    words = " ".join(text.split())
    if not words:
        raise UsageError("reading an instruction: expected some text, found none")
    told = f"{text.strip()}\n\n"
    ids = model.tokenizer.encode_prompt(told)
    hidden, state = read(model, ids, model.start()[1])
    data = told.encode()
    new = NewSnapshot(
        document=f"instruction: {words[:NAME_CHARS]}",
        model=model.fingerprint,
        model_path=model.path,
        tokenizer=model.tokenizer.id,
        start_digest=model.zero_state().digest(),
        start=None,
        chain=chain(_apart(INSTRUCTION, ""), np.array(ids, dtype=np.int64)).hex(),
        tokens=len(ids),
        bytes=len(data),
        chunk=len(ids),
        leaf=True,
        parent=None,
        how=INSTRUCTION,
        exact=True,
        numerics=model.numerics(1),
        encoding="utf-8",
        decided_byte=-1,
        text_digest=hashlib.sha256(data).hexdigest(),
        anchor_byte=0,
        anchor_token=0,
    )
    return new, state, hidden


def keep_instruction(text: str, *, model: Model, store: Store) -> Snapshot:
    """Keep the state that has read an instruction, and its text, in a session of `Store.writing`. It has no name, and
    stays as long as a document that was started from it."""
    new, state, hidden = read_instruction(text, model)
    writer = store.text_writer(None, {}, has_lines=True)
    kept = writer.write(Stretch(0, f"{text.strip()}\n\n".encode(), []))
    return store.put(replace(new, text=kept), state.to("cpu"), hidden.to("cpu"))
