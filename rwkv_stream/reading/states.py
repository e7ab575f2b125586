"""States that are not kept, made from the text when they are asked for, in the calls of `ingest`.

A short text keeps no state, only the digest of it. What is made under the numerics that it was read with is that state,
bit for bit; under others its last bits may be others, and it serves for forks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.model.state import digest
from rwkv_stream.reading import resume
from rwkv_stream.reading.passes import HashedText, chained_chunks, forward_chunks
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.records import LAST_HIDDEN, StateElsewhere, check_model

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.reading.passes import ChunkOutput
    from rwkv_stream.store import Snapshot
    from rwkv_stream.store.records import Arrays

log = logging.getLogger(__name__)


def with_state(snapshot: Snapshot, model: Model) -> Snapshot:
    """The snapshot, its state to be loaded: itself where that is kept, else with one that is made now.

    Where other numerics make another state, that is said, and the snapshot is marked as not exact.
    raises  MismatchError for another model's snapshot; SnapshotError for damaged text; UsageError where what its
            document was started from was removed
    """
    check_model(snapshot, model)
    if snapshot.keeps_state or snapshot.removed or not isinstance(snapshot.reader, StoreFiles):
        return snapshot
    text = snapshot.reader.text(snapshot)
    assert text is not None, "what has no state has text"
    pieces = HashedText(text.pieces())
    chunks = chained_chunks(pieces, model.tokenizer, chunk_of(snapshot), max_tokens=snapshot.tokens)
    last = last_of(forward_chunks(model, chunks, start_of(snapshot, model)))
    if last is None or last.item.chain.hex() != snapshot.chain:
        raise SnapshotError(
            f"making the state of snapshot {snapshot.id[:12]} from its text: expected the {snapshot.tokens:,} tokens "
            f"that '{snapshot.document}' was read as, found others; read it again with `ingest --restart`"
        )
    return made(snapshot, arrays_of(last), model)


def last_of(outputs: Iterable[ChunkOutput]) -> ChunkOutput | None:
    """The last one, of which alone something is to be kept."""
    return next(iter(deque(outputs, maxlen=1)), None)


def arrays_of(output: ChunkOutput) -> Arrays:
    """The state after a chunk, with the last token's hidden state, as a snapshot has them."""
    tensors = {**output.state.to("cpu"), LAST_HIDDEN: output.hidden[-1].cpu()}
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def made(snapshot: Snapshot, arrays: Arrays, model: Model) -> Snapshot:
    """The snapshot, with a state that was made; where that is another than was read, that is said, and marked."""
    is_same = digest({name: array for name, array in arrays.items() if name != LAST_HIDDEN}) == snapshot.state_digest
    if not is_same:
        names = ", ".join(resume.differing(snapshot, model.numerics(chunk_of(snapshot)))) or "the same by name"
        log.warning(
            "the state of '%s' is made from its text under other numerics than it was read with (%s): it is near what "
            "was read, not equal to it",
            *(snapshot.document, names),
        )
    reader = StateElsewhere(snapshot.reader, snapshot.id, lambda: {**arrays})
    return replace(snapshot, exact=snapshot.exact and is_same, reader=reader)


def chunk_of(snapshot: Snapshot) -> int:
    """Tokens of the calls that a snapshot was read in; a head shows it on its document's own grid."""
    return int(snapshot.numerics.get("chunk", snapshot.chunk))


def start_of(reading: Snapshot, model: Model) -> State:
    """The state that a reading began with, after the model's start token. Raises UsageError where it was removed."""
    if reading.start is None:
        return model.start()[1]
    found = next(reading.starts(), None)
    if found is None or found.removed:
        raise UsageError(
            f"going on from the start of '{reading.document}': expected the snapshot {reading.start[:12]}, which it "
            "was started from, found none"
        )
    return with_state(found, model).state().to(model.device)
