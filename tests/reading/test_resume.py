"""Where a reading starts, without a model and without a store."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rwkv_stream.errors import UsageError
from rwkv_stream.reading import resume
from rwkv_stream.reading.passes import ChainedChunk, HashedText
from rwkv_stream.reading.reading import SNAPSHOT_EVERY_TOKENS, Reading
from rwkv_stream.store import Snapshot

TEXT = bytes(range(32, 127)) * 4
T = 8
OWN = resume.Start("own digest")


@dataclass(frozen=True)
class Mark:
    """What is looked at of a snapshot after `tokens` tokens of one byte each."""

    tokens: int
    decided_byte: int
    text_digest: str
    chunk: int = T
    encoding: str = "latin-1"
    start_digest: str = OWN.digest
    start: str | None = None
    is_kept_exactly: bool = True
    keeps_state: bool = True

    @property
    def id(self) -> str:
        return f"snapshot {self.tokens}"

    @property
    def bytes(self) -> int:
        return self.tokens


def mark(tokens: int, text: bytes = TEXT, *, at_end: bool = False, **others: Any) -> Snapshot:
    decided = -1 if at_end else tokens + 2
    seen = text[:tokens] if at_end else text[: tokens + 2]
    return cast(Snapshot, Mark(tokens, decided, hashlib.sha256(seen).hexdigest(), **others))


def hashed(text: bytes, piece: int = 7) -> HashedText:
    return HashedText(text[i : i + piece] for i in range(0, len(text), piece))


def planned(head: Snapshot | None, **options: Any) -> resume.Plan:
    return resume.plan("book", Reading(**options), head, None, OWN)


def test_a_text_holds_what_was_made_of_the_same_bytes() -> None:
    assert hashed(TEXT).holds(mark(40))
    assert not hashed(TEXT).holds(mark(40, b"x" + TEXT))
    assert not hashed(TEXT[:41]).holds(mark(40)), "it ends before the byte that fixed the tokens"
    assert hashed(TEXT[:40]).holds(mark(40, at_end=True))
    assert not hashed(TEXT[:41]).holds(mark(40, at_end=True)), "its end fixed the tokens, and it went on"
    text = hashed(TEXT)
    assert text.holds(mark(40))
    assert text.holds(mark(80))
    assert not text.holds(mark(16)), "it was hashed beyond that"


def test_by_bytes() -> None:
    lineage = [mark(83, TEXT[:83], at_end=True), mark(64), mark(32)]
    cases: list[tuple[bytes, int | None, int | None, bool]] = [
        (TEXT[:83], None, 83, True),
        (TEXT[:90], None, 64, False),
        (TEXT[:60] + b"!" + TEXT[61:], None, None, False),
        (TEXT[:83], 64, 64, False),
        (TEXT[:83], 50, 32, False),
        (TEXT[:83], 20, None, False),
        (TEXT[:83], 83, 83, True),
    ]
    for text, limit, tokens, is_whole in cases:
        plan = planned(lineage[0], max_tokens=limit)
        base, found_whole = resume.by_bytes(plan, lineage, hashed(text))
        assert (base.tokens if base else None, found_whole) == (tokens, is_whole)


def test_by_bytes_goes_by_the_documents_own_grid() -> None:
    lineage = [mark(48, chunk=32), mark(40, chunk=32), mark(32, chunk=8)]
    base, _ = resume.by_bytes(planned(lineage[0]), lineage, hashed(TEXT))
    assert base is lineage[2]


def test_by_bytes_passes_over_what_is_only_near() -> None:
    lineage = [mark(83, TEXT[:83], at_end=True), mark(64, is_kept_exactly=False), mark(32)]
    base, is_whole = resume.by_bytes(planned(lineage[0]), lineage, hashed(TEXT[:90]))
    assert (base, is_whole) == (lineage[2], False)


def chunk(end: int) -> ChainedChunk:
    return cast(ChainedChunk, SimpleNamespace(chunk=SimpleNamespace(end_token=end)))


@pytest.mark.parametrize(
    ("snapshots", "base", "drawn", "n_left"),
    [
        ([], None, [], 8),
        ([24], 24, [], 5),
        ([16, 32], 32, [], 4),
        ([16, 37], 16, [24, 32, 40], 3),  # another text's, beyond which nothing may match
    ],
    ids=str,
)
def test_by_tokens_draws_no_further_than_a_snapshot_may_match(
    snapshots: list[int], base: int | None, drawn: list[int], n_left: int
) -> None:
    items = iter([chunk(end) for end in range(T, 65, T)])

    def match(item: ChainedChunk) -> Snapshot | None:
        end = item.chunk.end_token
        return mark(end) if end in snapshots else None

    def reach(parent: str | None, limit: int) -> int | None:
        at = 0 if parent is None else int(parent.split()[1])
        assert limit == at + resume.SEARCH_TOKENS
        return next((n for n in snapshots if n > at), None)

    noted: list[Snapshot] = []
    found, kept = resume.by_tokens(None, items, match, reach, noted.append)
    assert (found.tokens if found else None, [item.chunk.end_token for item in kept]) == (base, drawn)
    assert len(list(items)) == n_left
    assert noted[-1:] == [found] * (found is not None)


@pytest.mark.parametrize(
    ("ends", "base", "drawn"), [([8, 16], 16, []), ([8, 16, 24, 32], 8, [16, 24]), ([8, 16, 20], 8, [16, 20])], ids=str
)
def test_by_tokens_goes_on_from_no_snapshot_without_a_state(ends: list[int], base: int, drawn: list[int]) -> None:
    items = iter([chunk(end) for end in ends])
    known = {8: mark(8), 16: mark(16, keeps_state=False)}
    noted: list[Snapshot] = []
    found, kept = resume.by_tokens(
        None, items, lambda item: known.get(item.chunk.end_token), lambda parent, limit: 16, noted.append
    )
    assert found is not None and found.tokens == base
    assert [item.chunk.end_token for item in kept] == drawn
    assert noted == [known[8]]


def test_a_prefix_is_seen_by_the_next_snapshot_of_the_longer_reading() -> None:
    lineage = [mark(96), mark(64), mark(32)]
    assert resume.is_prefix(mark(40), lineage, hashed(TEXT[:70]))
    assert not resume.is_prefix(mark(40), lineage, hashed(TEXT[:50] + b"!" + TEXT[51:]))
    assert not resume.is_prefix(mark(40), lineage, hashed(TEXT[:60]))
    assert resume.is_prefix(lineage[2], lineage, hashed(b""))
    assert not resume.is_prefix(mark(100), lineage, hashed(TEXT))


def test_a_plan_keeps_to_what_the_document_keeps_to() -> None:
    head = mark(64, chunk=32, start_digest="A's", start="A")
    plan = resume.plan("book", Reading(max_tokens=50), head, None, OWN)
    assert (plan.chunk, plan.encoding, plan.start) == (32, "latin-1", resume.Start("A's", "A"))
    assert (plan.limit, plan.leaves_head) == (50, True)
    assert resume.plan("book", Reading(chunk=32, encoding="cp1252"), head, plan.start, OWN).encoding == "cp1252"
    assert resume.plan("book", Reading(), mark(64, encoding="ascii"), None, OWN).encoding is None
    new = resume.plan("book", Reading(), None, None, OWN)
    assert (new.chunk, new.snapshot_every, new.encoding, new.start) == (1024, SNAPSHOT_EVERY_TOKENS, None, OWN)
    assert (new.limit, new.leaves_head) == (math.inf, False)
    again = resume.plan("book", Reading(restart=True, chunk=T), head, None, OWN)
    assert (again.head, again.chunk, again.start, again.encoding) == (None, T, OWN, None)


def test_a_plan_refuses_what_the_document_does_not_keep_to() -> None:
    head = mark(64, chunk=32, start_digest="A's", start="A")
    with pytest.raises(UsageError, match="chunks of 32 tokens, found --chunk 8"):
        resume.plan("book", Reading(chunk=8), head, None, OWN)
    with pytest.raises(UsageError, match="multiple of the chunk of 32"):
        resume.plan("book", Reading(snapshot_every=40), head, None, OWN)
    with pytest.raises(UsageError, match="started from snapshot A and stands at token 64"):
        resume.plan("book", Reading(), head, resume.Start("B's", "B"), OWN)


def test_numerics_differ_but_for_the_chunk() -> None:
    base = cast(Snapshot, SimpleNamespace(numerics={"chunk": 8, "threads": 1, "gone": "x"}))
    assert resume.differing(base, {"chunk": 16, "threads": 1, "gone": "x"}) == []
    assert resume.differing(base, {"chunk": 8, "threads": 2, "new": "y"}) == ["gone", "new", "threads"]
