"""Codecs of states: how near, in how many bytes, and what stays true of a store whose states were recoded."""

from __future__ import annotations

import hashlib
import io
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_snapshots import CHUNK, MODEL, START, fake, fake_hidden, fake_state, library, put, read

from rwkv_stream.errors import NotFoundError, SnapshotError, StoreLockedError, UsageError
from rwkv_stream.model.state import State
from rwkv_stream.store import Snapshot, Store, objects
from rwkv_stream.store.codecs import BLOCK, CODECS, EXACT, Integers

INTEGERS = [codec for codec in CODECS.values() if isinstance(codec, Integers)]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    """Blocks of very different sizes."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape) * np.exp(random.uniform(-20, 20, (*shape[:-1], 1)))
    return values.astype(np.float32)


@pytest.mark.parametrize("codec", INTEGERS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("shape", [(1, 2, 3, 64, 64), (1, 2, 8, 8), (1, 1, 65), (3,)])
def test_no_value_is_off_by_more_than_half_a_scale(codec: Integers, shape: tuple[int, ...]) -> None:
    given = array(*shape)
    data = codec.encode(given)
    found = codec.decode(data, shape)
    assert len(data) == codec.n_bytes(shape) and found.dtype == np.float32 and found.shape == shape
    pad = -given.size % BLOCK
    blocks, off = (np.pad(values.reshape(-1), (0, pad)).reshape(-1, BLOCK) for values in (given, abs(found - given)))
    scales = abs(blocks).max(1) / (2 ** (8 * codec.itemsize - 1) - 1)
    assert (off <= 0.5001 * scales[:, None] + 1e-7 * abs(blocks)).all()
    assert np.array_equal(np.sign(found[abs(given) == 0]), np.sign(given[abs(given) == 0]))
    assert codec.encode(found) == data, "what was decoded is coded alike"


def test_exact_is_every_bit() -> None:
    given = np.array([[0.0, -0.0, 1e-45, -3.4e38, float("inf"), float("nan")]], np.float32)
    codec = CODECS[EXACT]
    assert codec.decode(codec.encode(given), given.shape).tobytes() == given.tobytes()


def test_the_bytes_of_a_codec_stay_what_they_are() -> None:
    """A store is read for ever."""
    given = (np.arange(-100, 100, dtype=np.float32) / 7).reshape(2, 100)
    found = {name: hashlib.sha256(codec.encode(given)).hexdigest()[:16] for name, codec in CODECS.items()}
    assert found == {"exact": "48490e369e91616d", "int16": "657ec1898a585378", "int8": "6c1be80911553cd5"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    for codec in INTEGERS:
        with pytest.raises(UsageError, match="expected finite numbers, found others"):
            codec.encode(np.array([1, value], np.float32))


def test_zeros() -> None:
    for codec in INTEGERS:
        assert not codec.decode(codec.encode(np.zeros((2, 70), np.float32)), (2, 70)).any()


# ---- stores ----


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return library(tmp_path / "a.store")


def values(store: Store) -> dict[str, Snapshot]:
    return {entry.id: store.get(entry.id) for entry in store.list()}


@pytest.mark.parametrize("codec", ["int16", "int8"])
def test_ids_stay_and_states_stay_near(store: Store, codec: str) -> None:
    before = values(store)
    arrays = {identity: snapshot.arrays() for identity, snapshot in before.items()}
    planned = store.recode(codec, dry_run=True)
    assert values(store) == before
    report = store.recode(codec)
    assert report == planned and report.snapshots > 0 and report.exact > 0
    after = values(store)
    assert after.keys() == before.keys()
    recoded = [identity for identity, snapshot in after.items() if snapshot.codec == codec]
    assert len(recoded) == report.snapshots
    for identity in recoded:
        most = 0.51 / (2 ** (15 if codec == "int16" else 7) - 1)
        for name, found in after[identity].arrays().items():
            assert abs(found - arrays[identity][name]).max() <= most * abs(arrays[identity][name]).max()
    assert store.verify(read_data=True).damaged == []
    assert store.prune(dry_run=True).objects == 0, "what was kept before is gone"
    assert store.recode(codec).snapshots == 0


def test_what_a_reading_needs_stays_exact(store: Store) -> None:
    store.recode("int8")
    tagged = {at for _, at in store.tags()}
    for document, model, at in store.heads():
        head = store.head(document, model)
        assert head is not None and head.id == at and head.is_kept_exactly
        lineage = [head, *store.ancestors(head)]
        assert any(one.is_kept_exactly and not one.leaf for one in lineage)
    assert all(store.get(at).is_kept_exactly for at in tagged)


def test_more_may_be_kept_exact(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    made = read(store, n=5)
    store.recode("int8", "book.txt", keep_exact=3)
    assert [store.get(one.id).codec for one in made] == ["int8", "int8", EXACT, EXACT, EXACT]


def test_only_states_of_an_age_are_recoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "a.store", create=True)
    monkeypatch.setattr("rwkv_stream.store.store.now", lambda: "2026-03-01T10:00:00Z")
    old = read(store, n=4)
    monkeypatch.setattr("rwkv_stream.store.store.now", lambda: "2026-03-02T10:00:00Z")
    read(store, "web.log", text="lines", n=4)
    noon = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert store.recode("int8", older_than=noon, dry_run=True).snapshots == 0, "10:00 UTC is noon there"
    assert store.recode("int8", older_than=noon + timedelta(seconds=1)).snapshots == 3
    recoded = {entry.id for entry in store.list() if store.get(entry.id).codec == "int8"}
    assert recoded == {one.id for one in old[:3]}
    with pytest.raises(UsageError, match="expected a moment with a zone"):
        store.recode("int8", older_than=datetime(2026, 3, 1))


def test_a_leaf_at_the_end_keeps_the_one_before_it_exact(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    made = read(store, n=3)
    with store.writing("book.txt", MODEL):
        leaf = put(store, fake(3 * CHUNK + 5, parent=made[-1].id))
        store.move_head("book.txt", MODEL, leaf.id)
    store.recode("int16")
    assert [store.get(one.id).codec for one in (*made, leaf)] == ["int16", "int16", EXACT, EXACT]


def test_reading_again_makes_it_exact_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    made = read(store, n=3)
    arrays = made[0].arrays()
    store.recode("int8")
    assert not store.get(made[0].id).is_kept_exactly
    assert [one.id for one in read(store, n=3)] == [one.id for one in made]
    again = store.get(made[0].id)
    assert again.is_kept_exactly and all((again.arrays()[name] == arrays[name]).all() for name in arrays)
    assert store.prune().objects == 2, "those that were recoded"
    assert store.verify(read_data=True).damaged == []


def test_no_reading_goes_on_from_what_is_only_near(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    made = read(store, n=3)
    new = fake(CHUNK)
    place = MODEL, START, new.tokens, new.chain
    assert store.match(*place, numerics={}) == made[0]
    store.recode("int8")
    assert store.match(*place, numerics={}) is None


def test_an_import_brings_exact_states(tmp_path: Path) -> None:
    store, other = library(tmp_path / "a.store"), Store(tmp_path / "b.store", create=True)
    whole = io.BytesIO()
    store.export([at for _, _, at in store.heads()], whole)
    store.recode("int8")
    near = io.BytesIO()
    store.export([at for _, _, at in store.heads()], near)
    for file, codecs in ((near, {"int8", EXACT}), (whole, {EXACT})):
        file.seek(0)
        other.import_(file)
        assert {other.get(entry.id).codec for entry in other.list()} == codecs
        assert other.verify(read_data=True).damaged == []


def test_an_import_of_what_is_exact_already_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same state may lie there as other bytes, as another compressor made them."""
    store, other = Store(tmp_path / "a.store", create=True), Store(tmp_path / "b.store", create=True)
    (made,) = read(store, n=1)
    monkeypatch.setattr(objects, "ZSTD_LEVEL", 19)
    (again,) = read(other, n=1)
    assert again.id == made.id and again.objects != made.objects
    file = io.BytesIO()
    other.export([again.id], file)
    file.seek(0)
    store.import_(file)
    assert store.get(made.id).objects == made.objects


def test_every_flipped_byte_of_an_object_is_seen(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    made = read(store, n=2)
    store.recode("int16")
    snapshot = store.get(made[0].id)
    path = tmp_path / "a.store" / "objects" / snapshot.objects[0].name[:2] / snapshot.objects[0].name
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(SnapshotError):
            snapshot.arrays()
    path.write_bytes(whole)
    snapshot.arrays()


def test_what_cannot_be_done_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ingest the document again"):
        store.recode("exact")
    with pytest.raises(UsageError, match=r"expected a codec of exact, int16, int8, found 'int4'"):
        store.recode("int4")
    with pytest.raises(NotFoundError, match=r"expected snapshots of it in store .*, found none"):
        store.recode("int8", "nothing.txt")
    with pytest.raises(UsageError, match="expected to keep 1 exact or more, found 0"):
        store.recode("int8", keep_exact=0)
    with store.writing(), pytest.raises(StoreLockedError):
        store.recode("int8")


def test_a_state_that_holds_no_numbers_stays_exact(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """And the others are recoded all the same."""
    broken = State({name: torch.full_like(tensor, float("nan")) for name, tensor in fake_state(1).items()})
    made = store.put(fake(9 * CHUNK, "a broken model"), broken, fake_hidden(1))
    assert store.recode("int8").snapshots > 0
    assert store.get(made.id).is_kept_exactly and "stays exact: " in caplog.text
    assert store.verify(read_data=True).damaged == []
