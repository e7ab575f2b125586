"""Any position of a document is a snapshot: from the nearest exact one before it the model reads on over the kept text.

The state is that of `ingest --max-tokens`, bit for bit: the same tokens in the same calls. It is a leaf, which no file
of the store is of until something durable goes on from it; the cache keeps it for the next time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import NotFoundError
from rwkv_stream.reading import resume
from rwkv_stream.reading.passes import HashedText, chained_chunks, forward_chunks
from rwkv_stream.reading.states import arrays_of, chunk_of, last_of, made, start_of, with_state
from rwkv_stream.store.records import POSITION, Snapshot, now, snapshot_id
from rwkv_stream.text.chunker import CHAIN_START, chain

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Store
    from rwkv_stream.store.references import Found
    from rwkv_stream.store.texts import KeptText

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """The snapshot that a reference names, its state to be loaded, and what that cost.

    tokens_read  by the model, for the state
    is_nearest   whether it stands before the position that was asked for, not there
    why          words for that, where the exact position was wanted
    """

    snapshot: Snapshot
    tokens_read: int = 0
    is_nearest: bool = False
    why: str | None = None


def snapshot_at(ref: str, *, model: Model, store: Store) -> Snapshot:
    """The snapshot that a reference names, at exactly that position, its state to be loaded.

    Where it stands between two snapshots of a document whose text is kept, or its state is not kept, the state is made.
    raises  as `take`
    """
    return take(ref, model=model, store=store).snapshot


def take(ref: str, *, model: Model, store: Store, nearest: bool = False, cache_bytes: int | None = None) -> Taken:
    """As `snapshot_at`, with what that cost.

    nearest      the nearest snapshot at or before a position instead
    cache_bytes  of the states that were made and are kept for the next time; as of `Store.keep_made`
    raises       as `Store.get`; MismatchError, UsageError and SnapshotError as `with_state`
    """
    found = store.locate(ref, model=model.fingerprint)
    why = None
    if not nearest and found.head is not None and (found.token, found.byte) != (None, None):
        text = store.text(found.head)
        if text is None:
            why = f"the text of '{found.head.document}' is not kept"
        else:
            position = _Position.of(ref, found, found.head, text, model)
            if position is not None:
                return _at(position, text, model, store, cache_bytes)
            why = "the kept text ends before what decided its last tokens"
    snapshot = found.snapshot or store.get(ref, model=model.fingerprint)  # which says that there is none
    taken = _with_state(snapshot, model, store, cache_bytes)
    return replace(taken, is_nearest=not found.is_there, why=why)


def keep_position(ref: str, *, model: Model, store: Store) -> Snapshot | None:
    """Keep the state at the position that a reference names as a snapshot of its own, as something is to go on from it;
    None where the reference names one that is there."""
    found = store.locate(ref, model=model.fingerprint)
    if found.is_there and found.snapshot is not None and found.snapshot.how != POSITION:
        return None
    taken = take(ref, model=model, store=store)
    if taken.is_nearest:
        at = taken.snapshot
        log.warning(
            "'%s': taken is the nearest before, token %d of '%s', as %s", ref, at.tokens, at.document, taken.why
        )
    return keep(taken.snapshot, store)


def keep(snapshot: Snapshot, store: Store) -> Snapshot:
    """Keep a state that was made at a position as a snapshot, with its text; others are as they are."""
    if snapshot.keeps_state or snapshot.how != POSITION:
        return snapshot
    with store.writing():
        return store.put(snapshot, *snapshot.load())


def _with_state(snapshot: Snapshot, model: Model, store: Store, cache_bytes: int | None) -> Taken:
    """A snapshot with its state: kept, made before, or made now."""
    if snapshot.keeps_state or snapshot.how == POSITION:
        return Taken(snapshot)
    numerics = model.numerics(chunk_of(snapshot))
    before = store.made(snapshot.model, snapshot.start_digest, snapshot.chain, snapshot.tokens, numerics)
    if before is not None:
        return Taken(made(snapshot, before[1], model))
    ready = with_state(snapshot, model)
    digest = ready.state().digest()
    identity = snapshot_id(ready.model, ready.start_digest, ready.chain, ready.tokens, digest)
    store.keep_made(replace(ready, state_digest=digest, id=identity), ready.arrays(), numerics, cache_bytes)
    return Taken(ready, ready.tokens)


@dataclass(frozen=True, slots=True)
class _Position:
    """A token of a document, between two snapshots.

    base   the exact one that is read on from; None: the document's start
    chain  digest of the tokens up to there
    there  the snapshot that stands there, if one does
    """

    head: Snapshot
    base: Snapshot | None
    tokens: int
    chain: str
    there: Snapshot | None = None

    @property
    def base_tokens(self) -> int:
        return self.base.tokens if self.base is not None else 0

    @classmethod
    def of(cls, ref: str, found: Found, head: Snapshot, text: KeptText, model: Model) -> _Position | None:
        """Where a reference points to; None where the kept text does not say what its tokens are."""
        token = None if found.token is None else min(found.token, head.tokens)
        byte = None if found.byte is None else min(found.byte, head.bytes)

        def is_passed(one: Snapshot) -> bool:
            return one.tokens > token if token is not None else byte is not None and one.bytes > byte

        base, behind = None, head
        for one in head.lineage():
            if not is_passed(one) and (one.tokens == token or one.bytes == byte) and one.is_kept_exactly:
                return cls(head, one, one.tokens, one.chain, one)
            if not is_passed(one) and one.id == head.id and not one.keeps_state:
                return cls(head, None, one.tokens, one.chain, one)
            on_grid = one.tokens % head.chunk == 0
            if is_passed(one):
                behind = one if on_grid else behind
            elif on_grid and one.is_kept_exactly and 0 <= one.decided_byte <= head.bytes:
                base = one
                break
        at, link = (base.tokens, base.chain) if base is not None else (0, CHAIN_START.hex())
        last = link
        items = chained_chunks(
            HashedText(text.pieces()), model.tokenizer, head.chunk, after=base, max_tokens=behind.tokens
        )
        end = 0
        try:
            for item in items:
                chunk = item.chunk
                n = (token or 0) - chunk.start_token
                if byte is not None:  # the last token that ends there or before
                    n = int(np.searchsorted(chunk.ends, byte, side="right"))
                if n > 0:
                    ids = chunk.ids[:n]
                    at, link = chunk.start_token + len(ids), chain(bytes.fromhex(last), ids).hex()
                last, end = item.chain.hex(), chunk.end_token
        except UnicodeDecodeError:  # it ends within a character, where the reading ended by order
            return None
        if (end, last) != (behind.tokens, behind.chain):
            return None
        if at == 0:
            raise NotFoundError(f"finding snapshot '{ref}': expected some text before there, found none")
        return cls(head, base, at, link, base if base is not None and at == base.tokens else None)


def _at(position: _Position, text: KeptText, model: Model, store: Store, cache_bytes: int | None) -> Taken:
    head, base = position.head, position.base
    if position.there is not None:
        return _with_state(position.there, model, store, cache_bytes)
    numerics = model.numerics(head.chunk)
    where = model.fingerprint, head.start_digest, position.chain, position.tokens
    kept = store.match(*where[:2], position.tokens, position.chain, numerics=numerics)
    if kept is not None and kept.is_kept_exactly:
        return Taken(kept)
    before = store.made(*where, numerics)
    if before is not None:
        snapshot, arrays = before
        name, inline = text.cut(snapshot.bytes)
        return Taken(made(replace(snapshot, objects=(), text=name, inline_extent=inline), arrays, model))
    differing = resume.differing(base, numerics) if base is not None else []
    if differing:
        log.warning(
            "'%s' is read on from token %d under other numerics than it was read with (%s): the state is not bit-equal "
            "to that of one reading",
            *(head.document, position.base_tokens, ", ".join(differing)),
        )
    state = base.state().to(model.device) if base is not None else start_of(head, model)
    pieces = HashedText(text.pieces())
    chunks = chained_chunks(pieces, model.tokenizer, head.chunk, after=base, max_tokens=position.tokens)
    last = last_of(forward_chunks(model, chunks, state))
    assert last is not None, "a position lies behind a token"
    arrays, chunk, state_digest = arrays_of(last), last.item.chunk, last.state.digest()
    name, inline = text.cut(chunk.byte_end)
    snapshot = Snapshot(
        document=head.document,
        model=model.fingerprint,
        model_path=model.path,
        tokenizer=model.tokenizer.id,
        start_digest=head.start_digest,
        start=head.start,
        chain=position.chain,
        tokens=chunk.end_token,
        bytes=chunk.byte_end,
        chunk=head.chunk,
        leaf=chunk.end_token % head.chunk != 0,
        parent=base.id if base is not None else None,
        how=POSITION,
        exact=(base is None or base.exact) and not differing,
        numerics=numerics,
        encoding=head.encoding,
        decided_byte=chunk.decided_byte,
        text_digest=last.item.text_digest,
        anchor_byte=chunk.anchor_byte,
        anchor_token=chunk.anchor_token,
        text=name,
        inline_extent=inline,
        id=snapshot_id(model.fingerprint, head.start_digest, position.chain, chunk.end_token, state_digest),
        state_digest=state_digest,
        state_bytes=sum(array.nbytes for array in arrays.values()),
        objects=(),
        created=now(),
        reader=head.reader,
    )
    store.keep_made(snapshot, arrays, numerics, cache_bytes)
    return Taken(made(snapshot, arrays, model), chunk.end_token - position.base_tokens)
