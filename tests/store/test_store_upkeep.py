"""Pruning, exporting and importing: what stays, what goes, what another store makes of it."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
import tarfile
from pathlib import Path

import pytest
from fake_snapshots import CHUNK, MODEL, OTHER_MODEL, fake, in_child, put, read, short, told

from rwkv_stream.errors import MismatchError, NotFoundError, OutputError, SnapshotError, StoreLockedError
from rwkv_stream.store import Exported, Imported, Pruned, Snapshot, Store, records, sealed, sessions
from rwkv_stream.store.layout import filesystem


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tokens(store: Store, document: str | None = None) -> list[tuple[str, int]]:
    return sorted((entry.document, entry.tokens) for entry in store.list(document))


def held(store: Store) -> set[str]:
    """Files of the store, but for catalog and locks."""
    paths = (path.relative_to(store.path) for path in store.path.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "locks" and not path.name.startswith("catalog")}


# ---- prune ----


def test_what_nothing_leads_to_is_pruned(store: Store) -> None:
    superseded = read(store, n=4)
    read(store, text="an edited text", n=2)
    read(store, "web.log", text="lines", n=2)
    before = held(store)
    would = store.prune(dry_run=True)
    assert held(store) == before
    done = store.prune()
    assert done == would == Pruned(snapshots=4, objects=4, texts=4, strays=0, bytes=done.bytes)
    gone = {f"records/{s.id[:2]}/{s.id}" for s in superseded}
    gone |= {f"objects/{s.objects[0].name[:2]}/{s.objects[0].name}" for s in superseded}
    gone |= {f"{kind}/{text[:2]}/{text}" for s in superseded if (text := s.text) for kind in ("texts", "postings")}
    assert before - held(store) == gone
    assert tokens(store) == [("book.txt", 16), ("book.txt", 32), ("web.log", 16), ("web.log", 32)]
    assert store.prune() == Pruned(0, 0, 0, 0, 0)
    assert store.verify(read_data=True).damaged == []


def test_bytes_of_a_prune_are_what_the_disk_gets_back(store: Store) -> None:
    read(store, n=4)
    read(store, text="an edited text", n=1)

    def size() -> int:
        return sum((store.path / name).stat().st_size for name in held(store))

    before = size()
    assert store.prune().bytes == before - size() > 0


def test_tags_and_forks_hold_what_they_lead_back_to(store: Store) -> None:
    """A tag holds the snapshots before it; a fork the one whose state it started from, and those before that."""
    first = read(store, n=4)
    fork = fake(7, "a question", document="a fork", start=first[1].id, start_digest=first[1].state_digest, how="ask")
    with store.writing():
        store.tag("a fork", put(store, fork).id)
    read(store, text="an edited text", n=1)
    assert store.prune().snapshots == 2
    assert tokens(store) == [("a fork", 7), ("book.txt", 16), ("book.txt", 16), ("book.txt", 32)]
    store.untag("a fork")
    assert store.prune().snapshots == 3
    assert tokens(store) == [("book.txt", 16)]


def test_places_in_a_lineage_stay_while_something_goes_on_from_them(store: Store) -> None:
    made = read(store, n=4)
    store.rm(made[1].id)
    store.rm(made[3].id)
    n_bytes = store_bytes(store, made[1], made[3])
    assert store.prune() == Pruned(snapshots=1, objects=2, texts=1, strays=0, bytes=n_bytes)
    assert [s.tokens for s in store.ancestors(store.get("book.txt"))] == [16]
    for snapshot in (made[0], made[2]):
        store.rm(snapshot.id)
    assert store.prune().snapshots == 3
    assert held(store) == {"format"}


def store_bytes(store: Store, *removed: Snapshot) -> int:
    """Bytes that go with these: their objects, and record and text of the last."""
    objects = sum(snapshot.size_bytes for snapshot in removed)
    name = removed[-1].text
    assert name is not None
    text = [store._files.texts.path(name), store._files.texts.postings_path(name)]
    return objects + len(records.encode_record(removed[-1].tombstone())) + sum(path.stat().st_size for path in text)


def test_a_snapshot_that_was_put_and_not_named_is_pruned(store: Store) -> None:
    put(store, fake(16))
    assert store.prune().snapshots == 1


def test_leftovers_are_pruned(store: Store) -> None:
    read(store)
    for folder in ("objects/ab", "records/cd", "refs/heads", "refs/tags", "."):
        path = store.path / folder / ".tmp-gone-1"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    (store.path / "locks" / "head-of-one-killed").touch()
    assert store.prune() == Pruned(0, 0, 0, strays=6, bytes=20)
    assert not list(store.path.rglob(".tmp-*"))
    assert not list((store.path / "locks").glob("head-*"))


def test_what_is_not_of_the_store_is_left_alone(store: Store) -> None:
    made = read(store)
    (store.path / "README").write_text("mine")
    (store.path / "objects" / "notes.txt").write_text("mine")
    misplaced = store.path / "objects" / "00" / made[0].objects[0].name
    misplaced.parent.mkdir(exist_ok=True)
    misplaced.write_text("mine")
    store.prune()
    assert {"README", "objects/notes.txt", str(misplaced.relative_to(store.path))} <= held(store)


@pytest.mark.parametrize("kind", ["records", "refs/heads", "refs/tags"])
def test_nothing_is_pruned_while_something_is_unreadable(store: Store, kind: str) -> None:
    made = read(store)
    store.tag("here", made[2].id)
    put(store, fake(16, "unnamed"))
    path = next(path for path in (store.path / kind).rglob("*") if path.is_file())
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = held(store)
    for dry_run in (True, False):
        with pytest.raises(SnapshotError, match=r"pruning store .* expected every record and ref whole: .* repair"):
            store.prune(dry_run=dry_run)
    assert held(store) == before


def test_pruning_waits_for_nobody_unless_asked(store: Store) -> None:
    read(store)
    with Store(store.path).writing("web.log", MODEL), pytest.raises(StoreLockedError, match="no writer at work"):
        store.prune()
    with store.writing(), pytest.raises(StoreLockedError, match="this program itself"):
        store.prune()
    store.prune()


def test_pruning_does_not_believe_the_catalog(store: Store) -> None:
    """A head that the catalog does not know holds its snapshots all the same."""
    import contextlib
    import sqlite3

    read(store)
    with contextlib.closing(sqlite3.connect(store.path / "catalog.sqlite")) as db, db:
        db.execute("DELETE FROM heads")
    assert store.prune().snapshots == 0
    assert store.get("book.txt").tokens == 5 * CHUNK


# ---- export and import ----


def exported(store: Store, *refs: str, only: bool = False) -> tuple[io.BytesIO, Exported]:
    file = io.BytesIO()
    report = store.export(refs, file, only=only)
    assert report.bytes == len(file.getvalue())
    file.seek(0)
    return file, report


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "b.store", create=True)


def test_a_document_goes_to_another_store(store: Store, other: Store) -> None:
    made = read(store, n=4)
    read(store, "web.log", text="lines")
    store.tag("here", made[3].id)
    store.tag("there", made[1].id)
    file, report = exported(store, "book.txt")
    assert report.snapshots == 4
    assert other.import_(file) == Imported(added=4, known=0, heads=["book.txt"], tags=["here"], kept=[])
    assert tokens(other) == [("book.txt", 16 * n) for n in range(1, 5)]
    for snapshot in made:
        here = other.get(snapshot.id)
        assert here == snapshot
        assert here.state().digest() == snapshot.state_digest
    assert [other.get(ref).tokens for ref in ("book.txt", "book.txt~1", "book.txt@50%", "here")] == [64, 48, 32, 64]
    assert other.verify(read_data=True).damaged == []
    assert other.prune().snapshots == 0, "what was imported is held by its names"


def test_an_export_is_a_tar_of_a_store(store: Store, tmp_path: Path) -> None:
    """Should this program be lost, tar and the format document are enough."""
    read(store, n=2)
    long_name = "é" * 30  # 180 bytes quoted, more than a plain tar header holds
    store.tag(long_name, store.get("book.txt").id)
    file, _ = exported(store, "book.txt")
    with tarfile.open(fileobj=file) as tar:
        tar.extractall(tmp_path / "by-hand", filter="data")
    by_hand = Store(tmp_path / "by-hand")
    assert by_hand.verify(read_data=True).damaged == []
    assert by_hand.get(long_name) == store.get("book.txt")


def test_only_what_was_named_with_its_place(store: Store, other: Store) -> None:
    made = read(store, n=4)
    file, report = exported(store, "book.txt@50%", only=True)
    assert report.snapshots == 1
    assert other.import_(file) == Imported(added=1, known=0, heads=["book.txt"], tags=[], kept=[])
    assert other.get("book.txt") == made[1]
    assert list(other.ancestors(made[1])) == []
    assert other.verify(read_data=True).damaged == []
    whole, _ = exported(store, "book.txt")
    assert other.import_(whole) == Imported(added=3, known=1, heads=["book.txt"], tags=[], kept=[])
    assert [s.tokens for s in other.ancestors(other.get("book.txt"))] == [48, 32, 16]


def test_importing_twice_changes_nothing(store: Store, other: Store) -> None:
    read(store, n=3)
    file, _ = exported(store, "book.txt")
    other.import_(file)
    before = {name: (other.path / name).read_bytes() for name in held(other) if not name.startswith("refs")}
    file.seek(0)
    assert other.import_(file).known == 3
    assert {name: (other.path / name).read_bytes() for name in held(other) if not name.startswith("refs")} == before


def test_names_that_stand_elsewhere_stay(store: Store, other: Store) -> None:
    mine = read(other, text="my own edition", n=2)
    other.tag("here", mine[0].id)
    read(other, "there", text="a document of that name", n=1)
    made = read(store, n=3)
    store.tag("here", made[2].id)
    store.tag("there", made[2].id)
    file, _ = exported(store, "book.txt")
    assert other.import_(file) == Imported(added=3, known=0, heads=[], tags=[], kept=["book.txt", "here", "there"])
    assert (other.get("book.txt"), other.get("here")) == (mine[1], mine[0])
    assert other.get(made[2].id[:12]) == made[2]


def test_a_head_goes_on_but_not_back(store: Store, other: Store) -> None:
    made = read(store, n=2)
    early, _ = exported(store, "book.txt")
    made += [put(store, fake(16 * n, parent=made[n - 2].id)) for n in (3,)]
    store.move_head("book.txt", MODEL, made[-1].id)
    late, _ = exported(store, "book.txt")
    other.import_(early)
    assert other.import_(late).heads == ["book.txt"]
    early.seek(0)
    assert other.import_(early).kept == ["book.txt"]
    assert other.get("book.txt").tokens == 48


def test_removed_and_damaged_snapshots_come_back(store: Store, other: Store) -> None:
    made = read(store, n=3)
    file, _ = exported(store, "book.txt")
    other.import_(file)
    other.rm(other.get("book.txt~1").id)
    stored = other.path / "objects" / made[0].objects[0].name[:2] / made[0].objects[0].name
    stored.write_bytes(b"damaged")
    file.seek(0)
    assert other.import_(file).added == 1
    assert other.verify(read_data=True).damaged == []
    assert [s.tokens for s in other.ancestors(other.get("book.txt"))] == [32, 16]


def test_a_shared_snapshot_goes_under_the_name_that_was_asked_for(store: Store, other: Store) -> None:
    made = read(store, n=2)
    store.move_head("copy.txt", MODEL, made[1].id)
    other.import_(exported(store, "copy.txt")[0])
    assert other.get("copy.txt").id == made[1].id


def test_several_refs_and_models_in_one_file(store: Store, other: Store) -> None:
    read(store, n=2)
    read(store, text="another reader", n=2, model=OTHER_MODEL)
    file = io.BytesIO()
    refs = [store.get("book.txt", model=model).id for model in (MODEL, OTHER_MODEL)]
    store.export(refs, file)
    file.seek(0)
    assert other.import_(file).added == 4
    assert {other.get("book.txt", model=model).model for model in (MODEL, OTHER_MODEL)} == {MODEL, OTHER_MODEL}


def test_a_damaged_object_is_not_exported(store: Store) -> None:
    made = read(store, n=2)
    stored = store.path / "objects" / made[0].objects[0].name[:2] / made[0].objects[0].name
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    with pytest.raises(SnapshotError, match="changed since"):
        store.export(["book.txt"], io.BytesIO())


def test_what_cannot_be_exported(store: Store) -> None:
    with pytest.raises(NotFoundError):
        store.export(["no such book"], io.BytesIO())


def test_an_import_while_its_document_is_written_to(store: Store, other: Store) -> None:
    read(store)
    file, _ = exported(store, "book.txt")
    with Store(other.path).writing("book.txt", MODEL), pytest.raises(StoreLockedError):
        other.import_(file)
    assert held(other) == {"format"}


def test_an_import_of_more_documents_than_files_may_be_open(store: Store, other: Store) -> None:
    with store.writing():
        for i in range(100):
            short(store, f"{i}.txt", f"note {i}")
    file, _ = exported(store, *(f"{i}.txt" for i in range(100)))

    def import_() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/dev/fd").iterdir()]) + 30, hard))
        Store(other.path).import_(file)

    assert in_child(import_) == 0
    assert told(other) == told(store)


def test_an_export_of_a_newer_format(store: Store, other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read(store, n=1)
    with monkeypatch.context() as patch:
        patch.setitem(sealed.VERSIONS, b"rwkv-fmt", sealed.VERSION + 1)
        file, _ = exported(store, "book.txt")
    with pytest.raises(MismatchError, match="use a newer"):
        other.import_(file)
    assert held(other) == {"format"}


# ---- versions and filesystems ----


def test_the_first_writer_raises_the_version(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sealed.VERSIONS, b"rwkv-fmt", 1)
        old = Store(tmp_path / "old.store", create=True)
    assert old._files.check_format() == 1
    again = Store(old.path)
    assert list(again.list()) == []
    assert again._files.check_format() == 1, "reading changes nothing"
    read(again, n=1)
    assert again._files.check_format() == sealed.VERSION


def test_a_copy_without_its_empty_folders_opens(store: Store) -> None:
    for folder in ("locks/writers", "refs/tags", "refs/heads", "refs", "records", "objects"):
        (store.path / folder).rmdir()
    again = Store(store.path)
    assert list(again.list()) == []
    read(again, n=1)
    again.tag("here", again.get("book.txt").id)
    assert again.verify(read_data=True).damaged == []


def test_filesystems_are_told() -> None:
    assert filesystem(Path("/proc/self")) == "proc"
    assert filesystem(Path("/")) is not None


def test_a_network_filesystem_is_said(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sessions, "filesystem", lambda path: "nfs4")
    read(store, n=1)
    assert "is on a network filesystem (nfs4): let one machine write to it" in caplog.text


def test_a_filesystem_without_locks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OutputError, match="expected a filesystem with locks, found No locks available"):
        read(store, n=1)


def test_a_killed_import_leaves_nothing(store: Store, other: Store, tmp_path: Path) -> None:
    read(store, n=3)
    path = tmp_path / "export"
    with path.open("wb") as file:
        store.export(["book.txt"], file)

    def work() -> None:
        with path.open("rb") as file:
            Store(other.path).import_(file)

    assert in_child(work, RWKV_STREAM_FAILPOINT="import.checked") != 0
    assert any(p.name.endswith("-import") for p in other.path.iterdir())
    again = Store(other.path)
    assert held(again) == {"format"}
    work()
    assert tokens(again) == [("book.txt", 16), ("book.txt", 32), ("book.txt", 48)]
