"""Where a reading starts: what its document keeps to, and the last snapshot that still holds for its text.

1. By bytes: the newest chunk-edge snapshot of the document's head holds if the text is unchanged through the byte that
   fixed its tokens; then nothing before it is tokenised again.
2. By tokens: from there on, or from the start, snapshots of any document are matched by the chain digest of the token
   ids, chunk by chunk.

Nothing here computes with a model or writes to a store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.errors import UsageError
from rwkv_stream.text.chunker import CHUNK_TOKENS
from rwkv_stream.text.readers.encodings import ASCII

if TYPE_CHECKING:
    from rwkv_stream.reading.passes import ChainedChunk, HashedText
    from rwkv_stream.reading.reading import Reading
    from rwkv_stream.store import Snapshot

# How far past the last match tokens are held, 8 bytes each, while a further snapshot may still match. A past that was
# thinned has holes as large as that.
SEARCH_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class Start:
    """The state before the first token: its digest, before the start token, and the snapshot it is of (else None)."""

    digest: str
    snapshot: str | None = None

    def __str__(self) -> str:
        return f"snapshot {self.snapshot}" if self.snapshot is not None else "the model's own start"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one reading of a document keeps to.

    head            where the document stands; None where there is nothing to go on from
    chunk           T
    snapshot_every  tokens between snapshots
    snapshot_at     edges of the document at which there are snapshots too, as of `text.edges`; "" for none
    limit           tokens of the document after which the reading ends; infinite unless that was asked for
    is_restart      whether snapshots are to be left unused
    """

    head: Snapshot | None
    start: Start
    chunk: int
    snapshot_every: int
    snapshot_at: str
    encoding: str | None
    limit: float
    is_restart: bool

    @property
    def leaves_head(self) -> bool:
        return self.head is not None and self.limit < self.head.tokens


def plan(
    document: str, reading: Reading, head: Snapshot | None, start: Start | None, own: Start, kept_edges: str = ""
) -> Plan:
    """Join what was asked for with what the document keeps to.

    head    where the document stands, with the document's own T and encoding
    kept_edges  at which it has snapshots
    start   what was asked for to start from; None: what the document started from, else `own`, the model's
    raises  UsageError where the two contradict each other
    """
    if reading.restart:
        head = None
    chunk = reading.chunk or CHUNK_TOKENS
    if head is not None:
        if reading.chunk not in (None, head.chunk):
            raise UsageError(
                f"reading '{document}': it is read in chunks of {head.chunk} tokens, found --chunk {chunk}; "
                "leave the option away, or pass --restart to read it again from the start"
            )
        chunk, kept = head.chunk, Start(head.start_digest, head.start)
        if start is not None and start.digest != kept.digest:
            raise UsageError(
                f"reading '{document}': it was started from {kept} and stands at token {head.tokens}, snapshot "
                f"{head.id}; found another start, {start}; leave --from-snapshot or --instruction away to go on, "
                "or pass --restart to read it from there and leave that reading"
            )
        start = kept
    encoding = reading.encoding
    if encoding is None and head is not None and head.encoding != ASCII.name:  # which what follows may still decide
        encoding = head.encoding
    limit = math.inf if reading.max_tokens is None else reading.max_tokens
    snapshot_at = kept_edges if reading.snapshot_at is None else reading.snapshot_at
    return Plan(head, start or own, chunk, reading.interval(chunk), snapshot_at, encoding, limit, reading.restart)


def by_bytes(plan: Plan, lineage: Iterable[Snapshot], text: HashedText) -> tuple[Snapshot | None, bool]:
    """The newest snapshot of a lineage that the bytes of a text prove untokenised, and whether it is all there is.

    lineage  the head of the plan and its ancestors, nearest first
    text     of which nothing was drawn
    """
    head = plan.head
    assert head is not None
    on_grid = (s for s in lineage if s.tokens % plan.chunk == 0)  # may be another document's leaf
    grid = (s for s in on_grid if s.decided_byte >= 0 and s.is_kept_exactly)
    edge = next((s for s in grid if s.tokens <= plan.limit), None)
    if edge is not None and not text.holds(edge):
        return None, False
    # what the end of the text fixed holds only where the text still ends
    may_be_whole = head.tokens == plan.limit or (head.decided_byte < 0 and head.tokens < plan.limit)
    return (head, True) if may_be_whole and text.holds(head) else (edge, False)


def by_tokens(
    base: Snapshot | None,
    items: Iterator[ChainedChunk],
    match: Callable[[ChainedChunk], Snapshot | None],
    reach: Callable[[str | None, int], int | None],
    note: Callable[[Snapshot], None],
) -> tuple[Snapshot | None, list[ChainedChunk]]:
    """The last snapshot from `base` on whose tokens are the text's, and the chunks drawn already that follow it.

    items  the chunks after `base`
    match  the snapshot that stands after just the tokens up to the end of a chunk
    reach  most tokens, up to a limit, of the snapshots that come next after the one of this id
    note   is told of each that is found, and that the reading may go on from

    One whose state is not kept is found only where the text ends with it.
    """
    drawn: list[ChainedChunk] = []
    following: ChainedChunk | None = None

    def furthest() -> int | None:
        tokens, parent = (base.tokens, base.id) if base is not None else (0, None)
        return reach(parent, tokens + SEARCH_TOKENS)

    limit = furthest()
    while limit is not None and (item := following or next(items, None)) is not None:
        following = None
        drawn.append(item)
        found = match(item)
        if found is not None and not found.keeps_state and (following := next(items, None)) is None:
            return found, []
        if found is not None and found.keeps_state:
            base, drawn = found, []
            note(found)
            limit = furthest()
        elif item.chunk.end_token >= limit:
            break
    return base, drawn if following is None else [*drawn, following]


def is_prefix(last: Snapshot, lineage: Iterable[Snapshot], text: HashedText) -> bool:
    """Whether a text is seen to have, beyond the tokens of `last`, those of a longer reading as far as a snapshot.

    lineage  the longer reading's newest snapshot and its ancestors, nearest first
    text     as far as it was drawn to read `last`
    """
    beyond: Snapshot | None = None
    for snapshot in lineage:
        if snapshot.tokens < last.tokens:
            break
        beyond = snapshot
    return beyond is not None and (beyond.id == last.id or text.holds(beyond))


def differing(base: Snapshot, numerics: Mapping[str, str | int]) -> list[str]:
    """Names of the numerics that differ from those which a snapshot was computed with.

    T is none of them: a snapshot that a reading goes on from was made in calls that this one would make too.
    """
    names = (numerics.keys() | base.numerics.keys()) - {"chunk"}
    return sorted(name for name in names if numerics.get(name) != base.numerics.get(name))
