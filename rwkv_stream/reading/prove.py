"""Restored is recomputed: the kept text is read again up to a snapshot, and the states are compared bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.errors import InputError, MismatchError
from rwkv_stream.reading import resume
from rwkv_stream.reading.passes import HashedText, chained_chunks, forward_chunks
from rwkv_stream.store.records import check_model

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot, Store


@dataclass(frozen=True, slots=True)
class Proof:
    """What reading again showed.

    equal       whether every state on the way is, bit for bit, what was stored
    from_token  where the reading began: at a snapshot, or 0
    checked     snapshots that were compared
    differs     the first of them that differs: its id, and its token; what lies up to `same_up_to` is equal
    largest     difference of a value of that state, where that is kept exactly
    numerics    names of those that differ from the ones it was made under
    """

    snapshot: str
    equal: bool
    from_token: int
    to_token: int
    checked: int
    same_up_to: int
    differs: tuple[str, int] | None
    largest: float | None
    numerics: tuple[str, ...]


def prove(snapshot: Snapshot, *, model: Model, store: Store, from_start: bool = False) -> Proof:
    """Read the kept text again from the exact snapshot before one, or from its start, up to it, and compare.

    from_start  compare all snapshots on the way, too
    raises      MismatchError for another model's snapshot, or where the state that the document was started from is not
                to be had; InputError where the text is not kept; SnapshotError for damage
    """
    check_model(snapshot, model)
    text = _text(snapshot, store)
    lineage = [snapshot, *store.ancestors(snapshot)]
    base = None if from_start else next((s for s in lineage[1:] if _may_begin(s, snapshot.chunk)), None)
    awaited = {one.tokens: one for one in lineage if base is None or one.tokens > base.tokens}
    state = base.state() if base is not None else _beginning(snapshot, model, store)
    chunks = chained_chunks(text, model.tokenizer, snapshot.chunk, after=base, max_tokens=snapshot.tokens)
    begun = same_up_to = base.tokens if base is not None else 0
    checked = 0
    for output in forward_chunks(model, chunks, state.to(model.device)):
        stored = awaited.pop(output.item.chunk.end_token, None)
        if stored is None:
            continue
        if output.item.chain.hex() != stored.chain:
            raise _other_text(stored)
        checked += 1
        numerics = resume.differing(stored, model.numerics(snapshot.chunk))
        if output.state.digest() != stored.state_digest:
            largest = _largest(output.state, stored) if stored.is_kept_exactly else None
            differs = stored.id, stored.tokens
            return Proof(
                snapshot.id, False, begun, stored.tokens, checked, same_up_to, differs, largest, tuple(numerics)
            )
        same_up_to = stored.tokens
    if snapshot.tokens in awaited:
        raise _other_text(snapshot)
    numerics = resume.differing(snapshot, model.numerics(snapshot.chunk))
    return Proof(snapshot.id, True, begun, snapshot.tokens, checked, same_up_to, None, None, tuple(numerics))


def _may_begin(snapshot: Snapshot, chunk: int) -> bool:
    return snapshot.is_kept_exactly and snapshot.tokens % chunk == 0 and snapshot.decided_byte >= 0


def _text(snapshot: Snapshot, store: Store) -> HashedText:
    """The kept text, as far as there is any beyond the snapshot: what follows a token may decide it."""
    head = store.head(snapshot.document, snapshot.model)
    reaches = head is not None and any(one.id == snapshot.id for one in (head, *store.ancestors(head)))
    kept = store.text(head if head is not None and reaches and head.text is not None else snapshot)
    if kept is None:
        raise InputError(
            f"proving snapshot {snapshot.id[:12]}: expected its text to be kept, found none; ingest "
            f"'{snapshot.document}' again without --no-text"
        )
    return HashedText(kept.pieces())


def _beginning(snapshot: Snapshot, model: Model, store: Store) -> State:
    """The state before the first token, as the model is fed it."""
    if snapshot.start is None:
        return model.start()[1]
    start = store.get(snapshot.start, model=model.fingerprint)
    state = start.state()
    if state.digest() != snapshot.start_digest:
        raise MismatchError(
            f"proving snapshot {snapshot.id[:12]}: expected the state that its document was started from, found "
            f"snapshot {start.id[:12]} kept as {start.codec} since; prove a snapshot further on, or read the document "
            "again"
        )
    return state


def _other_text(snapshot: Snapshot) -> InputError:
    return InputError(
        f"proving snapshot {snapshot.id[:12]}: expected the tokens that it has read, found others in the kept text, "
        "which ends before what decided them; prove a snapshot further on"
    )


def _largest(state: State, stored: Snapshot) -> float:
    kept = stored.state()
    return max(float((state[name].cpu() - kept[name]).abs().max()) for name in kept)
