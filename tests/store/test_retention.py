"""Thinning: what stays of a reading by a rule, of a store as a whole and while it goes on."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from fake_snapshots import CHUNK, MODEL, fake, fake_hidden, fake_state, keep, put, read, told

from rwkv_stream.errors import NotFoundError, OutputError, StoreLockedError, UsageError
from rwkv_stream.store import Snapshot, Store, retention
from rwkv_stream.store.retention import Candidate, Rule, Thinned, need


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tokens(store: Store, document: str = "book.txt") -> list[int]:
    return sorted(entry.tokens for entry in store.list(document))


# ---- the lattice ----


def left(count: int, keep: int, step: int = 1) -> list[int]:
    """Positions that stay of a reading that is thinned at every `step`-th of its snapshots."""
    held: list[int] = []
    for newest in range(1, count + 1):
        held.append(newest)
        if newest % step == 0:
            candidates = [(need(at, newest), Candidate(str(at), at, 1)) for at in held if at != newest]
            gone, _ = retention.going(candidates, keep, 0)
            held = [at for at in held if at not in {one.tokens for one in gone}]
    return held


@pytest.mark.parametrize("keep", [1, 4, 16])
def test_what_stays_does_not_depend_on_when_it_is_looked_at(keep: int) -> None:
    for count in (100, 1000, 1024):
        assert left(count, keep) == left(count, keep, step=count), "thinned on the way, or once at the end"


@pytest.mark.parametrize("keep", [2, 4, 16, 64])
def test_there_are_as_many_for_each_doubling_of_the_distance(keep: int) -> None:
    newest = 1 << 14
    held = [at for at in range(1, newest) if need(at, newest) <= keep]
    for level in range(20):
        near, far = keep << level, keep << (level + 1)
        if far < newest:
            n = sum(near < newest - at <= far for at in held)
            assert keep / 2 <= n <= keep, (near, n)
    for before, after in zip([0, *held], [*held, newest], strict=True):
        assert after - before <= max(1, 2 * (newest - before) / keep), "no hole is larger than its distance says"


def test_a_limit_of_bytes_takes_first_what_the_smallest_rule_would_take() -> None:
    newest, rng = 4096, random.Random(2)
    candidates = [(need(at, newest), Candidate(str(at), at, 10)) for at in range(1, newest)]
    for n_free in (0, 1, 10, 5000, 40_000):
        gone, n_over = retention.going(rng.sample(candidates, len(candidates)), None, n_free)
        assert len(gone) == -(-n_free // 10) and n_over == n_free - 10 * len(gone)
        rest = [needed for needed, one in candidates if one not in gone]
        assert not gone or max(rest) <= min(need(one.tokens, newest) for one in gone)
    assert retention.going(candidates, None, 10 * newest)[1] == 10, "all of them are not enough"


# ---- prune ----


def test_a_rule_thins_every_reading_and_nothing_that_must_stay(store: Store) -> None:
    made = read(store, n=32)
    other = read(store, "web.log", text="lines", n=3)
    store.tag("here", made[2].id)
    started = fake(7, "asked", document="a fork", start=made[6].id, start_digest=made[6].state_digest, how="ask")
    store.tag("a fork", put(store, started).id)
    before = told(store)
    would = store.prune(Rule(keep=2), dry_run=True)
    assert told(store) == before
    done = store.prune(Rule(keep=2))
    assert done == replace(would, strays=done.strays)
    kept = [at for at in range(CHUNK, 32 * CHUNK, CHUNK) if need(at, 32 * CHUNK) <= 2]
    stays = sorted({*kept, 3 * CHUNK, 7 * CHUNK, 32 * CHUNK})
    assert tokens(store) == stays
    assert tokens(store, "web.log") == [one.tokens for one in other if need(one.tokens, 48) <= 2 or one.tokens == 48]
    assert [one.document for one in done.thinned] == ["book.txt"]
    holes = [b - a for a, b in zip([0, *stays], stays, strict=False)]
    assert done.thinned[0].hole == max(holes)
    assert store.verify(read_data=True).damaged == []
    assert [one.id for one in store._files.ancestors(made[-1])] == [one.id for one in made[-2::-1]], "as text"
    text = store.text(store.get("book.txt"))
    assert text is not None and text.byte_end == made[-1].bytes
    assert store.prune(Rule(keep=2)).thinned == ()


def test_what_is_at_an_edge_stays(store: Store) -> None:
    made: list[Snapshot] = []
    with store.writing("book.txt", MODEL):
        for i in range(1, 20):
            new = fake(i * CHUNK, parent=made[-1].id if made else None, edge=i in (3, 5))
            made.append(put(store, keep(store, new, "a text", made[-1] if made else None)))
        store.move_head("book.txt", MODEL, made[-1].id)
    store.prune(Rule(keep=1))
    assert {3 * CHUNK, 5 * CHUNK} <= set(tokens(store))
    assert 7 * CHUNK not in tokens(store)


def test_what_two_documents_have_read_stays_as_long_as_one_needs_it(store: Store) -> None:
    made = read(store, n=16)
    with store.writing("short.txt", MODEL):
        store.move_head("short.txt", MODEL, made[6].id)
    store.prune(Rule(keep=1))
    by_short = [at for at in range(1, 8) if need(at * CHUNK, 7 * CHUNK) <= 1]
    by_long = [at for at in range(1, 17) if need(at * CHUNK, 16 * CHUNK) <= 1]
    assert tokens(store) == sorted(at * CHUNK for at in {*by_short, *by_long, 7, 16})
    assert 6 in by_short and 6 not in by_long


def test_what_it_costs_to_have_it_again(store: Store) -> None:
    read(store, n=8)
    (found,) = store.prune(Rule(keep=1), dry_run=True).thinned
    assert [at for at in range(1, 8) if need(at, 8) <= 1] == [4, 6, 7]
    # 1 to 3 are read again from the start, 5 from 4
    assert found == Thinned("book.txt", MODEL, 4, found.bytes, hole=4 * CHUNK, reread=(3 + 1) * CHUNK)


def test_a_store_is_thinned_until_it_fits(store: Store) -> None:
    read(store, n=40)
    read(store, "web.log", text="lines", n=10)
    full = store._files.size_bytes()
    for share in (0.9, 0.8):
        limit = int(share * full)
        would = store.prune(Rule(max_bytes=limit), dry_run=True)
        done = store.prune(Rule(max_bytes=limit))
        assert (done.objects, done.bytes) == (would.objects, would.bytes) and done.objects > 0
        state = store.get("book.txt").size_bytes
        assert limit - 2 * state < store._files.size_bytes() <= limit, "no more went than had to"
    held = tokens(store), tokens(store, "web.log")
    with pytest.raises(OutputError, match=r"--max-store-size, 1,000 bytes, found [\d,]+ bytes that must stay"):
        store.prune(Rule(max_bytes=1000))
    assert (tokens(store), tokens(store, "web.log")) == held, "nothing went"


def test_without_a_rule_nothing_of_a_reading_goes(store: Store) -> None:
    read(store, n=20)
    assert (store.prune().thinned, len(tokens(store))) == ((), 20)
    assert store.prune(Rule(keep=1000)).thinned == ()
    for wrong in (0, -1, 1.5):
        with pytest.raises(UsageError, match="expected keep to be 1 or more"):
            Rule(keep=wrong)  # type: ignore[arg-type]


# ---- while a reading goes on ----


def go_on(store: Store, rule: Rule, first: int, last: int, document: str = "book.txt") -> list[Snapshot]:
    """A reading from its `first` snapshot to its `last`, thinned on the way."""
    head = store.head(document, MODEL)
    made: list[Snapshot] = []
    with store.writing(document, MODEL):
        thinning = store.thinning(document, MODEL, rule, head)
        parent = head
        for i in range(first, last + 1):
            new = fake(i * CHUNK, "a text", document=document, parent=parent.id if parent is not None else None)
            with thinning.room(new.tokens, 2000):
                parent = put(store, keep(store, new, "a text", parent))
            store.move_head(document, MODEL, parent.id)
            thinning.add(parent)
            thinning.thin()
            made.append(parent)
    return made


def test_a_reading_is_thinned_on_its_way_as_at_its_end(store: Store, tmp_path: Path) -> None:
    go_on(store, Rule(keep=4), 1, 40)
    go_on(store, Rule(keep=4), 41, 100)
    whole = Store(tmp_path / "whole", create=True)
    read(whole, n=100)
    whole.prune(Rule(keep=4))
    assert tokens(store) == tokens(whole) != tokens(Store(tmp_path / "b", create=True))
    assert store.verify(read_data=True).damaged == []
    assert len(list(store._files.ancestors(store.get("book.txt")))) == 99
    assert store.prune().objects == 0, "what went is off the disk"


def test_a_reading_fits_its_store_or_stops_before_it_writes(store: Store) -> None:
    read(store, "web.log", text="lines", n=5)
    limit = store._files.size_bytes() + 60_000
    largest = 0
    head = None
    with store.writing("book.txt", MODEL):
        thinning = store.thinning("book.txt", MODEL, Rule(max_bytes=limit), None)
        with pytest.raises(OutputError, match=r"reading 'book.txt' at token .*prune --max-store-size"):
            for i in range(1, 400):
                new = fake(i * CHUNK, parent=head.id if head is not None else None)
                with thinning.room(new.tokens, 3000):
                    head = put(store, keep(store, new, "a text", head))
                store.move_head("book.txt", MODEL, head.id)
                thinning.add(head)
                size = store._files.size_bytes()
                largest = max(largest, size)
                assert size <= limit + 3000
    assert largest > limit - 10_000, "the room is used"
    assert len(tokens(store, "web.log")) == 5, "of another document nothing goes"
    assert store.get("book.txt").id == head.id and store.verify(read_data=True).damaged == []  # type: ignore[union-attr]


def test_what_other_documents_have_read_or_a_tag_names_is_held(store: Store) -> None:
    made = read(store, n=10)
    with store.writing("copy.txt", MODEL):
        store.move_head("copy.txt", MODEL, made[4].id)
    store.tag("here", made[7].id)
    go_on(store, Rule(keep=1), 11, 20)
    stays = set(tokens(store))
    assert {at * CHUNK for at in (1, 2, 3, 4, 5, 8, 20)} <= stays
    assert not {at * CHUNK for at in (7, 9, 11, 13)} & stays


def test_a_state_that_is_put_again_while_it_is_thinned_is_written_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a writer who had seen the object that goes meanwhile."""
    made = read(store, n=8)
    gone, new = made[2], fake(3 * CHUNK, parent=made[1].id)
    real = store._files.has_state

    def thinned_then(snapshot: Snapshot) -> bool:
        found = real(snapshot)
        with other.writing():
            retention.drop(other._sessions, [gone.id])
        return found

    other = Store(store.path)
    monkeypatch.setattr(store._files, "has_state", thinned_then)
    again = put(store, new)
    assert again.id == gone.id and again.state().digest() == fake_state(int(new.chain[:8], 16)).digest()
    assert again.last_hidden().equal(fake_hidden(int(new.chain[:8], 16)))
    assert store.verify(read_data=True).damaged == []


def test_a_state_that_went_while_it_was_asked_for_is_said_to_be_removed(store: Store) -> None:
    made = read(store, n=8)
    held = store.get("book.txt@48")
    with store.writing():
        assert retention.drop(store._sessions, [made[2].id, made[-1].id]) == [made[2].id]
        assert retention.drop(store._sessions, [made[2].id]) == []
    with pytest.raises(NotFoundError, match="found that it was removed meanwhile"):
        held.state()
    assert store.get("book.txt@48").tokens == 32


def test_nobody_prunes_beside_a_reading(store: Store) -> None:
    read(store, n=4)
    with store.writing(), pytest.raises(StoreLockedError):
        Store(store.path).prune(Rule(keep=1))
