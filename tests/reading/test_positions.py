"""Any position of a document is the snapshot that `ingest --max-tokens` would have left there, to the bit."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_stream as rs
from rwkv_stream.errors import NotFoundError, SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.reading.positions import Taken, take
from rwkv_stream.store import Snapshot, Store

WORDS = [
    "the",
    "keeper",
    "of",
    "light",
    "walked",
    "over",
    "an",
    "old",
    "stone",
    "bridge",
    "1883",
    "é",
    "漢字",
    "“storm”",
]


def prose(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", ", ", ".\n"]) for _ in range(n))


class Desk:
    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.store = model, folder, Store(folder / "a.store", create=True)
        self.tokens = 0

    def read(self, text: str | bytes, store: Store | None = None, name: str = "book.txt", **options: Any) -> Snapshot:
        path = self.folder / "text"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        options = {"chunk": 32, "snapshot_every": 128, **options}
        store = store or self.store
        report = ingest(path, name=name, model=self.model, store=store, **options)
        return store.get(report.snapshot)

    def ended(self, text: str | bytes, tokens: int, **options: Any) -> Snapshot:
        """Where a reading of its own ends."""
        store = Store(self.folder / "ended.store", create=True)
        for name in ("first.txt",) if "from_snapshot" in options else ():
            self.read(prose(30, 9), store, name, chunk=32)
        return self.read(text, store, restart=True, max_tokens=tokens, **options)

    def take(self, ref: str, **options: Any) -> Taken:
        return take(ref, model=self.model, store=self.store, **options)


@pytest.fixture
def desk(model: Model, tmp_path: Path) -> Desk:
    return Desk(model, tmp_path)


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    assert (found.tokens, found.bytes, found.chain) == (expected.tokens, expected.bytes, expected.chain)
    facts = "decided_byte", "text_digest", "anchor_byte", "anchor_token", "encoding", "leaf", "chunk", "start", "exact"
    for name in facts:
        assert getattr(found, name) == getattr(expected, name), name
    (state, hidden), (left, right) = found.load(), expected.load()
    assert all(torch.equal(state[name], left[name]) for name in left) and torch.equal(hidden, right)
    assert found.id == expected.id


@pytest.mark.parametrize("chunk", [16, 32])
def test_tokens_on_and_off_the_grid(desk: Desk, chunk: int) -> None:
    text = prose(130)
    head = desk.read(text, chunk=chunk)
    for tokens in (1, chunk - 1, chunk, 100, 128, 129, 160, head.tokens - 1, head.tokens):
        taken = desk.take(f"book.txt@{tokens}")
        assert taken.snapshot.tokens == tokens and not taken.is_nearest
        bases = [s.tokens for s in head.lineage() if s.decided_byte >= 0 and s.tokens <= tokens]
        assert taken.tokens_read == (0 if tokens in (128, head.tokens) else tokens - max(bases, default=0))
        assert_same(taken.snapshot, desk.ended(text, tokens, chunk=chunk))
        kept = desk.store.text(taken.snapshot)
        assert kept is not None and kept.read(0, 10**9) == text.encode()[: taken.snapshot.bytes]
        ends = [int(one.ends[-1]) for one in kept.postings() if len(one)]
        assert not ends or max(ends) <= taken.snapshot.bytes, "nothing is told of what comes later"
    assert desk.take(f"book.txt@{head.tokens + 999}").snapshot.id == head.id
    assert desk.store.verify(read_data=True).damaged == []
    assert len(list(desk.store.list())) == -(-head.tokens // 128)


def test_bytes_and_shares(desk: Desk) -> None:
    text = prose(130).encode()
    head = desk.read(text)
    ends = [0]
    for block in desk.model.tokenizer.stream([text]):
        ends += [int(end) for end in block.ends]
    inside = text.index("漢".encode()) + 1
    for byte in (ends[5], inside, ends[140] - 1, ends[140], ends[140] + 1, len(text)):
        taken = desk.take(f"book.txt@byte:{byte}").snapshot
        assert taken.tokens == sum(end <= byte for end in ends) - 1
        assert taken.bytes == max(end for end in ends if end <= byte)
    half = desk.take("book.txt@50%").snapshot
    assert_same(half, desk.ended(text, half.tokens))
    assert half.bytes == max(end for end in ends if end <= len(text) // 2)
    with pytest.raises(NotFoundError):
        desk.take("book.txt@0")
    assert desk.take("book.txt").snapshot.id == desk.take("book.txt~0").snapshot.id == head.id


def test_behind_a_change_of_encoding_and_from_a_start(desk: Desk) -> None:
    text = prose(60).encode("ascii", "ignore") + prose(60, 1).encode()
    desk.read(text)
    assert_same(desk.take("book.txt@210").snapshot, desk.ended(text, 210))
    desk.read(prose(30, 9), name="first.txt")
    story = prose(100, 2)
    desk.read(story, name="story", from_snapshot="first.txt")
    for tokens in (20, 150):
        found = desk.take(f"story@{tokens}").snapshot
        assert_same(found, desk.ended(story, tokens, name="story", from_snapshot="first.txt"))


def test_it_is_kept_for_the_next_time_as_far_as_there_is_room(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.read(prose(130))
    first = desk.take("book.txt@100")
    assert first.tokens_read == 100
    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", lambda *_, **__: pytest.fail("read again"))
        again = desk.take("book.txt@100")
        assert_same(again.snapshot, first.snapshot)
        assert again.tokens_read == 0
        by_id = desk.store.get(first.snapshot.id[:12])
        assert_same(by_id, first.snapshot)
        assert desk.take(first.snapshot.id).snapshot.id == first.snapshot.id
    size = sum(path.stat().st_size for path in desk.store._files.cache.rglob("*") if path.is_file())
    for at in (101, 102):
        desk.take(f"book.txt@{at}", cache_bytes=int(2.5 * size))
        os.utime(desk.store._cache.path(next(n for n, s in desk.store._cache.listed() if s.tokens == 100)))
    assert {one.tokens for one in desk.store.positions()} == {100, 102}, "101 was used least recently"
    desk.take("book.txt@103", cache_bytes=0)
    assert {one.tokens for one in desk.store.positions()} == {100, 102}
    desk.take("book.txt@104", cache_bytes=1)
    assert {one.tokens for one in desk.store.positions()} == {104}
    assert not any(one.how == "position" for one in desk.store.list())
    (kept,) = desk.store.positions()
    desk.store.rm(kept.id)
    with pytest.raises(NotFoundError):
        desk.store.get(kept.id)
    desk.take("book.txt@104")
    assert desk.store.prune().made == 1 and list(desk.store.positions()) == []


def test_a_damaged_file_of_the_cache_is_made_again(desk: Desk) -> None:
    desk.read(prose(130))
    expected = desk.take("book.txt@100").snapshot
    (path,) = (path for path in desk.store._files.cache.rglob("*") if path.is_file())
    for data in (b"", path.read_bytes()[:-5], path.read_bytes().replace(b"rwkv-cch", b"rwkv-xxx"), os.urandom(999)):
        path.write_bytes(data)
        assert desk.store.verify(read_data=True).damaged == []
        taken = desk.take("book.txt@100")
        assert taken.tokens_read == 100
        assert_same(taken.snapshot, expected)
    stray = desk.store._files.cache / "notes.txt"
    stray.write_text("mine")
    assert [one.path for one in desk.store.verify().damaged] == ["cache/notes.txt"]
    assert [one.path for one in Store.repair(desk.store.path).quarantined] == ["cache/notes.txt"]


def test_the_nearest_where_that_is_asked_for_or_all_there_is(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.read(prose(130))
    taken = desk.take("book.txt@200", nearest=True)
    assert (taken.snapshot.tokens, taken.tokens_read, taken.is_nearest, taken.why) == (128, 0, True, None)
    assert not desk.take("book.txt@128", nearest=True).is_nearest
    with pytest.raises(NotFoundError):
        desk.take("book.txt@100", nearest=True)
    desk.read(prose(130, 3), name="bare", keep_text=False)
    with caplog.at_level("WARNING"):
        desk.read(prose(9), name="next", from_snapshot="bare@200")
    assert "the nearest before, token 128 of 'bare', as the text of 'bare' is not kept" in caplog.text
    assert desk.store.get("next").start == desk.store.get("bare@128").id
    bare = desk.take("bare@200")
    assert bare.snapshot.tokens == 128 and bare.is_nearest and "not kept" in str(bare.why)
    assert desk.store.get("book.txt@200").tokens == 128


def test_what_something_durable_goes_on_from_is_kept(desk: Desk) -> None:
    text = prose(130)
    desk.read(text)
    at = desk.take("book.txt@140").snapshot
    with desk.store.writing():
        kept = desk.store.put(at, *at.load())
    assert_same(kept, desk.ended(text, 140))
    found = desk.store.get(at.id)
    assert found.keeps_state and found.inline_extent is None and found.how == "position"
    whole = desk.store.text(found)
    assert whole is not None and b"".join(whole.pieces()) == text.encode()[: at.bytes]
    assert desk.store.verify(read_data=True).damaged == []
    assert desk.take("book.txt@140").tokens_read == 0
    report = ingest(desk.folder / "text", name="again", model=desk.model, store=desk.store, from_snapshot="book.txt@77")
    assert desk.store.get(report.snapshot).start == desk.ended(text, 77).id


def test_a_short_text_has_positions_too(desk: Desk) -> None:
    text = prose(12)
    head = desk.read(text)
    assert not head.keeps_state
    assert_same(desk.take("book.txt@7").snapshot, desk.ended(text, 7))
    assert desk.take("book.txt").tokens_read == head.tokens
    assert desk.take("book.txt@100%").tokens_read == 0, "it was kept for the next time"
    assert desk.take("book.txt").snapshot.state().digest() == head.state_digest
    assert rs.snapshot_at("book.txt@7", model=desk.model, store=desk.store).tokens == 7


def test_a_text_cut_before_what_decided_its_last_tokens(bpe_model: Model, tmp_path: Path) -> None:
    """Its tokens are those of the longer text, which is not kept."""
    desk, text = Desk(bpe_model, tmp_path), prose(130)
    whole = desk.ended(text, 10**6)
    for end in range(135, 150):
        desk.read(text, name=f"to {end}", max_tokens=end)
        taken = desk.take(f"to {end}@{end - 2}")
        if taken.is_nearest:
            assert taken.snapshot.tokens == 128 and "decided" in str(taken.why)
        else:
            ended = desk.ended(text, end - 2)
            assert taken.snapshot.id == ended.id and taken.snapshot.state().digest() == ended.state_digest
    assert whole.tokens > 150


def test_numerics_of_another_machine(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.read(prose(130))
    store = desk.store
    base = store.get("book.txt@128")
    elsewhere = replace(base, numerics={**base.numerics, "threads": 97})
    path = store._files.record_path(base.id)
    from rwkv_stream.store.records import encode_record

    path.write_bytes(encode_record(elsewhere))
    store.rebuild()
    taken = desk.take("book.txt@150")
    assert not taken.snapshot.exact and "threads" in caplog.text
    with pytest.raises((UsageError, SnapshotError, NotFoundError)):
        store.get("book.txt@0")
