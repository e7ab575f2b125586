"""Repair: what is put back from where, what is moved aside under which path, what is said to be lost, and the next
reading that makes it again. That any fault is repaired is shown in `test_store_faults.py`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_snapshots import MODEL, OTHER_MODEL, fake, library, put, read, told
from program import program

from rwkv_stream.errors import NotFoundError, OutputError, SnapshotError, StoreLockedError
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Lost, Repaired, Store, records
from rwkv_stream.store.records import Head, Snapshot, Tag


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not lose what was written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return library(tmp_path_factory.mktemp("whole") / "a.store")


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Store:
    return Store(shutil.copytree(whole.path, tmp_path / "a.store"))


def record_path(store: Store, ref: str) -> Path:
    return store._files.record_path(store.get(ref).id)


def object_of(snapshot: Snapshot) -> Path:
    return snapshot.reader.objects.path(snapshot.objects[0].name)


def without_catalog(store: Store) -> None:
    (store.path / "catalog.sqlite").unlink()


def relative(store: Store, *paths: Path) -> list[str]:
    return sorted(str(path.relative_to(store.path)) for path in paths)


def aside(store: Store) -> dict[str, bytes]:
    """What lies in quarantine, by the path that it had."""
    folders = (store.path / "quarantine").glob("*")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_sound(store: Store) -> Store:
    again = Store(store.path)
    assert again.verify(read_data=True).damaged == []
    before = sorted((path, path.stat().st_ino) for path in store.path.rglob("*") if "catalog" not in path.name)
    assert Store.repair(store.path) == Repaired()
    assert sorted((p, p.stat().st_ino) for p in store.path.rglob("*") if "catalog" not in p.name) == before
    return again


def test_a_sound_store_stays_as_it_is(store: Store, whole: Store) -> None:
    assert_sound(store)
    assert not (store.path / "quarantine").exists()
    assert told(store) == told(whole)


# ---- small files ----


def test_small_files_come_back_from_the_catalog(store: Store, whole: Store) -> None:
    victims = [
        record_path(store, "half"),
        record_path(store, "book.txt"),
        store._files.head_path("book.txt", MODEL),
        store._files.head_path("notes/other.log", MODEL),
        store._files.tags / "half",
        store._files.tags / "a%20fork",
    ]
    rotten = victims[::2]
    original = {path: path.read_bytes() for path in victims}
    for path in victims:
        path.unlink()
    for path in rotten:
        path.write_bytes(b"rot " + path.name.encode())
    report = Store.repair(store.path)
    assert sorted(damage.path for damage in report.restored) == relative(store, *victims)
    assert (report.quarantined, report.lost) == ([], [])
    assert {path: path.read_bytes() for path in victims} == original
    assert aside(store) == {str(path.relative_to(store.path)): b"rot " + path.name.encode() for path in rotten}
    assert told(assert_sound(store)) == told(whole)


def test_a_copy_in_the_catalog_is_believed_only_with_its_checksum(store: Store) -> None:
    tag = store._files.tags / "half"
    with sqlite3.connect(store.path / "catalog.sqlite") as db:
        db.execute("UPDATE tags SET file = ?", (tag.read_bytes()[:-1] + b"x",))
    tag.write_bytes(b"rot")
    report = Store.repair(store.path)
    assert [damage.path for damage in report.quarantined] == ["refs/tags/half"]
    with pytest.raises(NotFoundError):
        assert_sound(store).get("half")


@pytest.mark.parametrize("data", [None, b"", b"rot", b"another kind's"])
@pytest.mark.parametrize("is_with_catalog", [True, False])
def test_format_is_made_anew(store: Store, whole: Store, data: bytes | None, is_with_catalog: bool) -> None:
    path = store._files.format
    path.unlink()
    if data is not None:
        path.write_bytes(store._files.head_path("book.txt", MODEL).read_bytes() if data.startswith(b"ano") else data)
    if not is_with_catalog:
        without_catalog(store)
    with pytest.raises((NotFoundError, SnapshotError)):
        Store(store.path)
    report = Store.repair(store.path)
    assert [damage.path for damage in report.restored] == ["format"]
    assert told(assert_sound(store)) == told(whole)


def test_a_damaged_head_is_found_again_among_the_records_of_its_name(store: Store, whole: Store) -> None:
    head = store._files.head_path("book.txt", MODEL)
    head.write_bytes(b"rot")
    without_catalog(store)
    report = Store.repair(store.path)
    assert [damage.path for damage in report.restored] == relative(store, head)
    assert aside(store) == {relative(store, head)[0]: b"rot"}
    assert told(assert_sound(store)) == told(whole)


def test_a_damaged_head_whose_document_has_no_records_left_is_moved_aside(store: Store) -> None:
    head = store._files.head_path("unheard of", MODEL)
    head.write_bytes(b"rot")
    report = Store.repair(store.path)
    assert [damage.path for damage in report.quarantined] == relative(store, head)
    assert not head.exists()
    assert_sound(store)


def test_a_head_found_again_is_that_of_the_model(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.store", create=True)
    mine = read(store, n=2)
    read(store, n=3, model=OTHER_MODEL)
    store._files.head_path("book.txt", MODEL).write_bytes(b"rot")
    without_catalog(store)
    Store.repair(store.path)
    assert assert_sound(store).get("book.txt", model=MODEL).id == mine[-1].id


def test_a_lost_record_without_a_catalog_ends_the_lineage_there(store: Store, whole: Store) -> None:
    middle, after = record_path(store, "half"), store.get("book.txt~1")
    middle.unlink()
    without_catalog(store)
    report = Store.repair(store.path)
    assert [damage.path for damage in report.restored] == relative(store, store._files.record_path(after.id))
    again = assert_sound(store)
    assert [s.tokens for s in again.ancestors(again.get("book.txt"))] == [48]
    library(store.path)
    assert told(again) == told(whole), "the next reading joins it again"


def test_whole_small_files_under_each_others_names(store: Store, whole: Store) -> None:
    pairs = [
        (record_path(store, "half"), record_path(store, "book.txt")),
        (store._files.head_path("book.txt", MODEL), store._files.head_path("notes/other.log", MODEL)),
        (store._files.tags / "half", store._files.tags / "a%20fork"),
    ]
    for one, two in pairs:
        one_data, two_data = one.read_bytes(), two.read_bytes()
        one.write_bytes(two_data)
        two.write_bytes(one_data)
    without_catalog(store)
    report = Store.repair(store.path)
    assert sorted(damage.path for damage in report.restored) == relative(
        store, *(path for pair in pairs for path in pair)
    )
    assert report.lost == []
    assert told(assert_sound(store)) == told(whole)


# ---- objects ----


def spoilt(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    return path.read_bytes()


def test_a_lost_state_in_the_middle(store: Store, whole: Store) -> None:
    """Its tokens are told, its tag goes with it, the reading after it stands."""
    lost = store.get("half")
    path = object_of(lost)
    data = spoilt(path)
    report = Store.repair(store.path)
    assert report.lost == [Lost(lost.id, "book.txt", 16, 32)]
    assert sorted(damage.path for damage in report.quarantined) == sorted([*relative(store, path), "refs/tags/half"])
    kept = aside(store)
    assert kept[relative(store, path)[0]] == data
    assert kept["refs/tags/half"] == (whole.path / "refs" / "tags" / "half").read_bytes()
    again = assert_sound(store)
    assert [again.get(ref).tokens for ref in ("book.txt", "book.txt~1", "book.txt~2")] == [64, 48, 16]
    with pytest.raises(NotFoundError):
        again.get("half")
    assert again.get("a fork").start == lost.id, "what started from it stands by itself"
    library(store.path)
    assert told(again) == told(whole)


def test_lost_states_at_the_end(store: Store, whole: Store) -> None:
    """The head goes to the last snapshot that is there; each range is told from the snapshot before."""
    newest, before = store.get("book.txt"), store.get("book.txt~1")
    for snapshot in (newest, before):
        object_of(snapshot).unlink()
    report = Store.repair(store.path)
    assert sorted(report.lost, key=lambda lost: lost.to_token) == [
        Lost(before.id, "book.txt", 32, 48),
        Lost(newest.id, "book.txt", 32 if report.lost[0].snapshot == before.id else 48, 64),
    ]
    assert report.quarantined == []
    again = assert_sound(store)
    assert again.get("book.txt").tokens == 32
    library(store.path)
    assert told(again) == told(whole)


def test_all_states_of_a_document_lost(store: Store, whole: Store) -> None:
    for ref in ("other.log", "other.log~1"):
        object_of(store.get(ref)).write_bytes(b"rot")
    report = Store.repair(store.path)
    head = store._files.head_path("notes/other.log", MODEL)
    assert relative(store, head)[0] in [damage.path for damage in report.quarantined]
    assert {(lost.document, lost.to_token) for lost in report.lost} == {
        ("notes/other.log", 16),
        ("notes/other.log", 32),
    }
    again = assert_sound(store)
    with pytest.raises(NotFoundError):
        again.get("other.log")
    library(store.path)
    assert told(again) == told(whole)


def test_states_under_each_others_names(store: Store, whole: Store) -> None:
    one, two = object_of(store.get("half")), object_of(store.get("book.txt"))
    one_data, two_data = one.read_bytes(), two.read_bytes()
    one.write_bytes(two_data)
    two.write_bytes(one_data)
    report = Store.repair(store.path)
    assert sorted(damage.path for damage in report.restored) == relative(store, one, two)
    assert report.lost == []
    assert told(assert_sound(store)) == told(whole)


def test_a_state_in_the_wrong_folder(store: Store, whole: Store) -> None:
    path = object_of(store.get("half"))
    elsewhere = path.parents[1] / "zz" / "some name"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    assert [damage.path for damage in Store.repair(store.path).restored] == relative(store, path)
    assert told(assert_sound(store)) == told(whole)


def test_an_object_that_is_whole_but_holds_another_state(store: Store, whole: Store) -> None:
    """Its bytes agree with its name, but a record claims what they are not."""
    half, newest = store.get("half"), store.get("book.txt")
    path = store._files.record_path(half.id)
    path.write_bytes(records.encode_record(replace(half, objects=newest.objects)))
    without_catalog(store)
    report = Store.repair(store.path)
    assert half.id in [lost.snapshot for lost in report.lost]
    again = assert_sound(store)
    library(store.path)
    assert told(again) == told(whole)


# ---- refs that lead nowhere ----


def test_a_tag_and_a_head_of_nothing(store: Store) -> None:
    tag, head = store._files.tags / "gone", store._files.head_path("gone.txt", MODEL)
    tag.write_bytes(records.encode_tag(Tag("gone", "0" * 64, "2025-01-01T00:00:00Z")))
    head.write_bytes(records.encode_head(Head("gone.txt", MODEL, "0" * 64, "utf-8", "2025-01-01T00:00:00Z")))
    report = Store.repair(store.path)
    assert sorted(damage.path for damage in report.quarantined) == relative(store, tag, head)
    assert (report.restored, report.lost) == ([], [])
    assert_sound(store)


def test_a_head_whose_record_is_lost_goes_to_the_newest_of_its_name(store: Store, whole: Store) -> None:
    record_path(store, "book.txt").unlink()
    without_catalog(store)
    report = Store.repair(store.path)
    assert [damage.path for damage in report.restored] == relative(store, store._files.head_path("book.txt", MODEL))
    again = assert_sound(store)
    assert again.get("book.txt").tokens == 48
    library(store.path)
    assert told(again) == told(whole)


# ---- aside ----


def strangers(store: Store) -> Iterator[Path]:
    yield store.path / "objects" / "ab" / "notes.txt"
    yield store.path / "objects" / "stray"
    yield store.path / "objects" / "ab" / "cd" / "deep"
    yield store.path / "records" / "ab" / "x"
    yield store.path / "records" / ("ab" * 32)
    yield store.path / "refs" / "heads" / "deep" / "x"
    yield store.path / "refs" / "tags" / "half~"
    yield store.path / "refs" / "tags" / "deep" / "half"


def test_foreign_files_are_moved_aside_under_their_paths(store: Store, whole: Store) -> None:
    put_there = {}
    for path in strangers(store):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"a stranger at {path.name}")
        put_there[str(path.relative_to(store.path))] = path.read_bytes()
    report = Store.repair(store.path)
    assert sorted(damage.path for damage in report.quarantined) == sorted(put_there)
    assert aside(store) == put_there
    assert report.lost == report.restored == []
    assert told(assert_sound(store)) == told(whole)


def test_an_object_that_nothing_refers_to_stays_for_prune(store: Store) -> None:
    name = hashlib.sha256(b"whatever").hexdigest()
    path = store._files.objects.path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"whatever")
    assert Store.repair(store.path) == Repaired()
    assert path.exists()


def test_each_repair_has_a_folder_of_its_own(store: Store) -> None:
    tag = store._files.tags / "half~"
    for data in (b"one", b"two"):
        tag.write_bytes(data)
        Store.repair(store.path)
    assert sorted(path.read_bytes() for path in (store.path / "quarantine").glob("*/refs/tags/half~")) == [
        b"one",
        b"two",
    ]


def test_two_files_of_one_name_are_both_kept(store: Store) -> None:
    """The newest head is damaged, and so is what takes its place within one repair."""
    object_of(store.get("book.txt")).unlink()
    head = store._files.head_path("book.txt", MODEL)
    was = head.read_bytes()
    head.write_bytes(b"rot")
    Store.repair(store.path)
    kept = {data for path, data in aside(store).items() if head.name in path}
    assert kept == {b"rot", was}
    assert assert_sound(store).get("book.txt").tokens == 48


def test_bytes_of_records_that_change_are_kept(store: Store) -> None:
    lost = store.get("half")
    record = store._files.record_path(lost.id).read_bytes()
    object_of(lost).unlink()
    Store.repair(store.path)
    assert record in aside(store).values()


# ---- who may ----


def test_repair_is_alone(store: Store) -> None:
    with store.writing(), pytest.raises(StoreLockedError, match="no writer at work"):
        Store.repair(store.path)
    Store.repair(store.path)


@pytest.mark.parametrize("there", ["nothing", "a folder", "a file"])
def test_what_is_no_store_is_not_repaired(tmp_path: Path, there: str) -> None:
    path = tmp_path / "x"
    if there == "a folder":
        path.mkdir()
        (path / "letter.txt").touch()
    elif there == "a file":
        path.touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotFoundError):
        Store.repair(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_may_only_be_read_is_not_repaired(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(OutputError, match="read-only"):
        Store.repair(store.path)


# ---- the next reading ----


@pytest.mark.parametrize("lost", ["newest", "middle", "first", "all"])
@pytest.mark.parametrize("what", ["object", "record", "record and catalog"])
def test_the_next_ingest_reads_again_what_was_lost(tmp_path: Path, bytes_model: Model, lost: str, what: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The keeper lit the lamp over the sea; gulls cried. " * 8)

    def reading(store: Store, **options: bool) -> int:
        options = {"chunk": 16, "snapshot_every": 64, **options}
        return ingest(str(text), name="book.txt", model=bytes_model, store=store, **options).resumed_from_token

    store = Store(tmp_path / "a.store", create=True)
    reading(store)
    right = told(store)
    newest = store.get("book.txt")
    lineage = [newest, *store.ancestors(newest)]
    assert len(lineage) == 7
    for snapshot in {"newest": lineage[:1], "middle": lineage[3:4], "first": lineage[-1:], "all": lineage}[lost]:
        path = object_of(snapshot) if what == "object" else store._files.record_path(snapshot.id)
        path.write_bytes(path.read_bytes()[:-1])
    if what == "record and catalog":
        without_catalog(store)
    report = Store.repair(store.path)
    resumed = reading(assert_sound(store))
    newest_left = {"newest": 384, "all": 0}.get(lost, newest.tokens)
    assert resumed == (newest.tokens if what == "record" else newest_left)
    assert store.get("book.txt").id == newest.id
    if what == "object" and lost in ("middle", "first"):
        [gap] = report.lost
        assert gap.snapshot not in told(store)["snapshots"], "what lies after it stands; only a restart reads it again"
    reading(store, restart=True)
    assert told(assert_sound(store)) == right


# ---- the program ----


def test_the_program_says_what_was_done(store: Store) -> None:
    lost, newest = store.get("half"), store.get("book.txt")
    spoilt(object_of(lost))
    head = store._files.head_path("notes/other.log", MODEL)
    head.unlink()
    assert program("snapshots", "verify", "--read-data", "--store", store.path).code == 12
    ended = program("snapshots", "repair", "--store", store.path)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert f"restored\t{relative(store, head)[0]}\tmissing; the catalog had it" in lines
    assert f"lost\t{lost.id}\tbook.txt: tokens 16-32" in lines
    assert any(line.startswith(f"quarantined\t{relative(store, object_of(lost))[0]}\t") for line in lines)
    assert "restored 1, quarantined 2, lost 1 snapshots" in ended.err
    assert program("snapshots", "verify", "--read-data", "--store", store.path).code == 0
    assert program("snapshots", "show", newest.id, "--store", store.path).code == 0
    again = program("snapshots", "repair", "--store", store.path, "--json")
    assert json.loads(again.out) == {"restored": [], "quarantined": [], "lost": [], "indexed": 0}


def test_the_program_on_a_lost_format_and_on_nothing(store: Store, tmp_path: Path) -> None:
    store._files.format.unlink()
    assert program("snapshots", "list", "--store", store.path).code == 10
    ended = program("snapshots", "repair", "--store", store.path)
    assert (ended.code, ended.out.split("\t")[:2]) == (0, ["restored", "format"])
    assert program("snapshots", "list", "--store", store.path).code == 0
    assert program("snapshots", "repair", "--store", tmp_path / "nothing").code == 10
    with store.writing():
        assert program("snapshots", "repair", "--store", store.path).code == 11


def test_json_of_a_loss(store: Store) -> None:
    lost = store.get("book.txt")
    object_of(lost).unlink()
    report = json.loads(program("snapshots", "repair", "--store", store.path, "--json").out)
    assert report["lost"] == [{"snapshot": lost.id, "document": "book.txt", "from_token": 48, "to_token": 64}]
    assert [note["path"] for note in report["restored"]] == relative(store, store._files.head_path("book.txt", MODEL))
    assert report["quarantined"] == []


def test_a_fork_of_a_lost_snapshot_stands_by_itself(store: Store) -> None:
    start = store.get("half")
    fork = put(store, fake(9, "more", document="another fork", start=start.id, start_digest=start.state_digest))
    store.tag("another fork", fork.id)
    object_of(start).unlink()
    Store.repair(store.path)
    again = assert_sound(store)
    assert again.get("another fork").state().digest() == fork.state_digest
