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
    awaited: list[Snapshot] = []  # the deepest first
    base: Snapshot | None = None
    for one in snapshot.lineage():
        if awaited and not from_start and _may_begin(one, snapshot.chunk):
            base = one
            break
        awaited.append(one)
    state = base.state() if base is not None else _beginning(snapshot, model, store)
    chunks = chained_chunks(text, model.tokenizer, snapshot.chunk, after=base, max_tokens=snapshot.tokens)
    numerics = model.numerics(snapshot.chunk)
    begun = same_up_to = base.tokens if base is not None else 0
    checked, differs, largest = 0, None, None
    stored = snapshot
    for output in forward_chunks(model, chunks, state.to(model.device)):
        while awaited[-1].tokens < output.item.chunk.end_token:  # off this grid: another document's
            awaited.pop()
        if awaited[-1].tokens > output.item.chunk.end_token:
            continue
        stored = awaited.pop()
        if output.item.chain.hex() != stored.chain:
            raise _other_text(stored)
        checked += 1
        if output.state.digest() != stored.state_digest:
            differs = stored.id, stored.tokens
            largest = _largest(output.state, stored) if stored.is_kept_exactly else None
            break
        same_up_to = stored.tokens
    if awaited and differs is None:  # the text ended before
        raise _other_text(snapshot)
    differing = tuple(resume.differing(stored, numerics))
    return Proof(snapshot.id, differs is None, begun, stored.tokens, checked, same_up_to, differs, largest, differing)


def _may_begin(snapshot: Snapshot, chunk: int) -> bool:
    return snapshot.is_kept_exactly and snapshot.tokens % chunk == 0 and snapshot.decided_byte >= 0


def _text(snapshot: Snapshot, store: Store) -> HashedText:
    """The kept text, as far as there is any beyond the snapshot: what follows a token may decide it."""
    head = store.head(snapshot.document, snapshot.model)
    goes_on = head is not None and head.text is not None and any(one.id == snapshot.id for one in head.lineage())
    kept = store.text(head if head is not None and goes_on else snapshot)
    if kept is None:
        raise InputError(
            f"proving snapshot {snapshot.id[:12]}: expected its text to be kept, found none; ingest "
            f"'{snapshot.document}' again without --no-text"
        )
    if kept.byte_end < snapshot.decided_byte:
        raise _other_text(snapshot)
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
