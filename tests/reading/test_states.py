"""Short texts keep no state: it is made from the text when it is asked for, and is that of a reading to the bit."""

from __future__ import annotations

import io
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import on_disk

import rwkv_stream as rs
from rwkv_stream.answers.ask import ask
from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.state import State
from rwkv_stream.reading.ingest import ReadingReport, estimate, ingest
from rwkv_stream.reading.prove import prove
from rwkv_stream.reading.states import with_state
from rwkv_stream.store import Snapshot, Store
from rwkv_stream.tables.score import score
from rwkv_stream.text.readers import document

GRID: dict[str, Any] = {"chunk": 32, "snapshot_every": 1024}
NOTE = "The keeper of the light was called Ansel. He kept it for thirty years, and nobody ever asked him why."
LONG = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz 0123456789.,;", k=3600))


class Desk:
    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.store = model, folder, Store(folder / "a.store", create=True)

    def read(self, text: str, name: str = "note", store: Store | None = None, **options: Any) -> ReadingReport:
        path = self.folder / f"{name}.txt"
        path.write_text(text)
        return ingest(path, model=self.model, store=store or self.store, name=name, **(GRID | options))

    def kept(self, text: str, **options: Any) -> Snapshot:
        """Of a reading that keeps its state."""
        store = Store(self.folder / "kept.store", create=True)
        return store.get(self.read(text, store=store, keep_text=False, **options).snapshot)

    def made(self, ref: str) -> Snapshot:
        return rs.snapshot_at(ref, model=self.model, store=self.store)


@pytest.fixture
def desk(model: Model, tmp_path: Path) -> Desk:
    return Desk(model, tmp_path)


def same(a: Snapshot, b: Snapshot) -> bool:
    left, right = a.load(), b.load()
    assert all(torch.equal(left[0][name], right[0][name]) for name in left[0]), "state"
    return a.id == b.id and torch.equal(left[1], right[1])


def files(store: Store) -> set[str]:
    """What is there beside records, heads and what belongs to the store as a whole."""
    own = ("records/", "refs/heads/", "locks/", "catalog.sqlite", "format")
    return {name for name in on_disk(store.path) if not name.startswith(own)}


def test_a_short_text_is_a_record_and_a_head(desk: Desk) -> None:
    report = desk.read(NOTE)
    snapshot = desk.store.get("note")
    assert not snapshot.keeps_state and not snapshot.removed and not snapshot.is_kept_exactly
    assert files(desk.store) == set()
    assert sum(name.startswith(("records/", "refs/", "locks/head")) for name in on_disk(desk.store.path)) == 2
    text = desk.store.text(snapshot)
    assert text is not None and text.read(0, 1000) == NOTE.encode() and text.place(80) == {"line": 1}
    assert sum(map(len, text.postings())) == 2, "sentences"
    with pytest.raises(UsageError, match=r"made from its text; rs.snapshot_at\(REF"):
        snapshot.state()
    made = desk.made("note")
    assert same(made, desk.kept(NOTE)) and made.exact and made.state_bytes == desk.kept(NOTE).state_bytes
    assert with_state(made, desk.model) is made
    assert (report.snapshots_written, report.tokens) == (1, snapshot.tokens)
    assert estimate(document(str(desk.folder / "note.txt"), name="b"), model=desk.model, store=None).store_bytes == 0


def test_a_text_too_long_for_a_record_has_extents(desk: Desk) -> None:
    desk.read(LONG, snapshot_every=4096)
    snapshot = desk.store.get("note")
    assert not snapshot.keeps_state and snapshot.inline_extent is None
    assert {name.split("/")[0] for name in files(desk.store)} == {"texts", "postings"}
    assert same(desk.made("note"), desk.kept(LONG, snapshot_every=4096))
    assert desk.store.verify(read_data=True).damaged == []


def test_what_may_go_on_and_what_ends_by_order_keeps_its_state(desk: Desk) -> None:
    desk.read(NOTE, "cut", max_tokens=20)
    desk.read(NOTE, "bare", keep_text=False)
    desk.read(LONG[:200], "deep", snapshot_every=32)
    assert all(desk.store.get(name).keeps_state for name in ("cut", "bare", "deep"))


def test_on_the_edge_of_a_chunk_that_may_go_on(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.read(LONG[:64])
    assert desk.store.get("note").keeps_state
    assert desk.read(LONG[:100]).resumed_from_token == 64


def test_it_is_not_read_again_until_it_grows(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = desk.read(NOTE)
    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", lambda *_, **__: pytest.fail("read again"))
        assert desk.read(NOTE).resumed_from_token == before.tokens
        again = desk.read(NOTE, "of another name")
        assert (again.snapshot, again.shared_with) == (before.snapshot, "note")
    grown = desk.read(f"{NOTE} And {NOTE}")
    assert grown.resumed_from_token == 0
    assert same(desk.made("note"), desk.kept(f"{NOTE} And {NOTE}"))
    assert desk.store.prune().snapshots == 0 and desk.store.verify(read_data=True).damaged == [], "still the other's"


def test_on_the_edge_of_a_chunk_that_may_not(bpe_model: Model, tmp_path: Path) -> None:
    """Its last token is decided by the end of the text, so a longer one is read from its start."""
    desk, ids = Desk(bpe_model, tmp_path), bpe_model.tokenizer.encode(LONG)
    text = bpe_model.tokenizer.decode(ids[:64]).decode()
    assert len(bpe_model.tokenizer.encode(text)) == 64
    desk.read(text)
    longer = text + NOTE
    assert desk.read(longer, "longer").resumed_from_token == 0
    assert same(desk.made("longer"), desk.kept(longer))


def test_it_is_asked_scored_and_proven(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.read(NOTE)
    snapshot, kept = desk.store.get("note"), desk.kept(NOTE)
    for one in (snapshot, kept):
        assert ask("Who?", snapshot=one, model=desk.model).answer == ask("Who?", snapshot=kept, model=desk.model).answer
    source = desk.folder / "note.txt"
    bits = [score(source, model=desk.model, snapshot=one).bits for one in (snapshot, kept)]
    assert bits[0] == bits[1]
    rows = [rs.embed(["a text"], model=desk.model, start=one) for one in (snapshot, kept)]
    assert (rows[0] == rows[1]).all()
    assert prove(snapshot, model=desk.model, store=desk.store).equal
    (summary,) = rs.summarize(snapshot=snapshot, model=desk.model, mode="each")
    assert summary.byte_end == len(NOTE)
    assert caplog.text == ""


def other(state: State) -> State:
    return State({name: tensor * 1.001 for name, tensor in state.items()})


def test_other_numerics_serve_for_forks_and_are_no_damage(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.read(NOTE)
    kept, found = desk.kept(NOTE), desk.store.get("note")
    elsewhere = replace(found, numerics={**found.numerics, "threads": 97})
    made = desk.store.put(elsewhere, other(kept.state()), kept.last_hidden(), keep_state=False)
    assert made.id != found.id
    with caplog.at_level(logging.WARNING):
        near = desk.made(made.id)
        near.load(), near.load()
    assert not near.exact and near.state().digest() == kept.state_digest
    (line,) = caplog.messages
    assert "other numerics" in line and "threads" in line and "damage" not in line
    assert desk.store.verify(read_data=True).damaged == []


def test_started_from_a_short_text(desk: Desk, tmp_path: Path) -> None:
    """The start keeps its state from then on, what is started from it does not."""
    desk.read(NOTE, "first")
    first = desk.store.get("first").id
    desk.read(NOTE[::-1], "second", from_snapshot="first")
    assert desk.store.get("first").keeps_state and desk.store.get("first").id == first
    second = desk.store.get("second")
    assert not second.keeps_state and second.start == first
    kept = Store(tmp_path / "other.store", create=True)
    desk.read(NOTE, "first", kept, keep_text=False)
    desk.read(NOTE[::-1], "second", kept, keep_text=False, from_snapshot="first")
    assert same(desk.made("second"), kept.get("second"))
    with pytest.raises(UsageError, match="'second'; remove them first"):
        desk.store.rm(first)
    export = io.BytesIO()
    desk.store.export(["second"], export, only=True)
    export.seek(0)
    target = Store(tmp_path / "target.store", create=True)
    target.import_(export)
    assert same(rs.snapshot_at("second", model=desk.model, store=target), kept.get("second"))
    assert target.verify(read_data=True).damaged == []
    desk.store._files.objects.path(desk.store.get(first).objects[0].name).unlink()
    assert len(desk.store.verify().damaged) == 1
    assert {lost.document for lost in Store.repair(desk.store.path).lost} == {"first", "second"}
    assert desk.store.verify(read_data=True).damaged == []


def test_upkeep(desk: Desk, tmp_path: Path) -> None:
    desk.read(NOTE)
    desk.read(LONG, "long", snapshot_every=4096)
    said = {entry.id: entry for entry in desk.store.list()}
    assert all(entry.size_bytes == 0 and not entry.removed for entry in said.values())
    assert desk.store.prune().snapshots == 0 and desk.store.rebuild() == 2
    recoded = desk.store.recode("int8")
    assert (recoded.snapshots, recoded.exact) == (0, 2)
    repaired = Store.repair(desk.store.path)
    assert (repaired.restored, repaired.quarantined, repaired.lost) == ([], [], [])
    assert {entry.id: entry for entry in desk.store.list()} == said
    export = io.BytesIO()
    desk.store.export(["note", "long"], export)
    with pytest.raises(UsageError, match="export it without --no-text"):
        desk.store.export(["note"], io.BytesIO(), keep_text=False)
    export.seek(0)
    target = Store(tmp_path / "target.store", create=True)
    assert target.import_(export).added == 2
    assert same(rs.snapshot_at("long", model=desk.model, store=target), desk.made("long"))
    tree = list(desk.store.family())
    assert len(tree) == 2 and not any(entry.removed for entry in tree)


def test_a_lost_text_is_a_lost_state(desk: Desk) -> None:
    desk.read(LONG, snapshot_every=4096)
    text = desk.store._files.texts.path(str(desk.store.get("note").text))
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(SnapshotError):
        desk.made("note")
    assert desk.store.verify().damaged
    (lost,) = Store.repair(desk.store.path).lost
    assert (lost.document, lost.from_token) == ("note", 0)
    assert desk.store.verify(read_data=True).damaged == [] and list(desk.store.list()) == []
    desk.read(LONG, snapshot_every=4096)
    assert same(desk.made("note"), desk.kept(LONG, snapshot_every=4096))


def test_a_state_is_kept_once_it_is_to_be(desk: Desk) -> None:
    desk.read(NOTE)
    made = desk.read(NOTE, restart=True, keep_text=False)
    snapshot = desk.store.get("note")
    assert snapshot.id == made.snapshot and snapshot.keeps_state and same(snapshot, desk.kept(NOTE))
    desk.read(NOTE, restart=True)
    assert desk.store.get("note").keeps_state, "what is there is not thrown away"
