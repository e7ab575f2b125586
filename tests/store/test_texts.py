"""Kept text: what was written comes back byte by byte and place by place, from extents that prove themselves, and is
gone when nothing leads to it any more."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from fake_snapshots import CHUNK, MODEL, fake, fake_text, put, read, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_stream.errors import MismatchError, NotFoundError, SnapshotError
from rwkv_stream.store import Store, texts
from rwkv_stream.store.layout import files
from rwkv_stream.store.texts import KeptText, Stretch, parts
from rwkv_stream.text.postings import Indexer

PROSE = (
    "The keeper found the lamp at Porto. It was old, Dr. Elm said; nobody knew how old.\n\n"
    "Ωμέγα came later — in a café, at 8 o'clock. \U0001f56f\U0001f56f Then came the rain…\n"
) * 40


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


def kept(store: Store, name: str, n_bytes: int) -> KeptText:
    return KeptText(store._files.texts, "book.txt", name, n_bytes, store._sessions.save_postings)


def written(store: Store, text: bytes, ends: list[int], after: str | None = None, start: int = 0) -> str:
    """The last extent of a text that was cut at these bytes."""
    writer = store.text_writer(after, {"id": "a7"}, has_lines=True)
    name = ""
    for byte_start, byte_end in itertools.pairwise([start, *ends]):
        name = writer.write(Stretch(byte_start, text[byte_start:byte_end], []))
    return name


def sentences(text: KeptText) -> list[tuple[int, int]]:
    return [span for p in text.postings() for span in zip(p.starts.tolist(), p.ends.tolist(), strict=True)]


def in_one_pass(text: bytes) -> list[tuple[int, int]]:
    indexer = Indexer()
    indexer.push(text)
    made = indexer.cut(final=True)
    return list(zip(made.starts.tolist(), made.ends.tolist(), strict=True))


# ---- one text ----


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), repeats=st.sampled_from([0, 1, 8]))
def test_a_text_comes_back_however_it_was_cut(data: st.DataObject, repeats: int, tmp_path: Path) -> None:
    """Within characters too; and gone on with later, it is the same."""
    text = (PROSE * repeats + PROSE[:50]).encode()
    ends = sorted({*data.draw(st.lists(st.integers(1, len(text)), max_size=6)), len(text)})
    store = Store(tmp_path / "a.store", create=True)
    name = written(store, text, ends)
    found = kept(store, name, len(text))
    assert (found.document, found.byte_start, found.byte_end) == ("book.txt", 0, len(text))
    pieces = [*found.pieces()]
    assert b"".join(pieces) == text
    assert [*itertools.accumulate(map(len, pieces))] == ends
    a, b = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    assert found.read(a, b) == text[a:b]
    assert found.place(min(a, len(text) - 1)) == {"id": "a7", "line": text.count(b"\n", 0, min(a, len(text) - 1)) + 1}
    assert sentences(found) == in_one_pass(text)
    k = data.draw(st.integers(0, len(ends) - 1))
    before = written(store, text, ends[:k]) if k else None
    assert written(store, text, ends[k:], before, ends[k - 1] if k else 0) == name, "as if it had never stopped"


def test_equal_beginnings_are_kept_once(store: Store) -> None:
    text = PROSE.encode()
    written(store, text, [1000, 2000, 3000])
    n_before = len([*files(store._files.texts.folder)])
    written(store, text[:2000] + b"Another end.", [1000, 2000, 2012])
    assert len([*files(store._files.texts.folder)]) == n_before + 1


def test_no_extent_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text or of places; a long id has one of its own, and where it is cut does not depend on what comes after."""
    monkeypatch.setattr(texts, "EXTENT_BYTES", 1000)
    rng = random.Random(5)
    places = [(at, {"row": i, "id": "i" * rng.choice([1, 50, 700, 3000])}) for i, at in enumerate(range(3, 9000, 37))]
    stretch = Stretch(0, bytes(9000), places)
    found = [*parts(stretch)]
    assert b"".join(part.text for part in found) == stretch.text
    assert [section for part in found for section in part.sections] == places
    for part in found:
        assert 0 < len(part.text) <= 1000
        assert all(part.byte_start <= at < part.byte_end for at, _ in part.sections)
        assert sum(texts.weight(place) for _, place in part.sections[:-1]) <= 1000
    ends = [part.byte_end for part in found]
    assert len(ends) > 60
    for byte in (1500, 4444, 8999):
        shorter = Stretch(0, bytes(byte), [section for section in places if section[0] < byte])
        assert [part.byte_end for part in parts(shorter)][:-1] == [end for end in ends if end < byte]


def test_postings_that_are_missing_damaged_or_older_are_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PROSE * 8).encode()
    found = kept(store, written(store, text, [17_000, 17_001, 30_000, len(text)]), len(text))
    paths = [*files(store._files.texts.postings_folder)]
    assert len(paths) == 4
    whole = {path: path.read_bytes() for path in paths}
    expected = sentences(found)
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(whole[path][:-1] + b"x"),
        lambda path: path.write_bytes(b"rwkv-pst" + (99).to_bytes(4, "little") + whole[path][12:]),
    ):
        for path in paths:
            damage(path)
        assert sentences(found) == expected
        assert {path: path.read_bytes() for path in paths} == whole, "and saved"
    paths[0].unlink()
    assert store.verify().indexed == 1
    assert store.verify().indexed == 0
    paths[0].unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    readonly = Store(store.path)
    assert sentences(kept(readonly, found._name(3), len(text))) == expected
    assert readonly.verify().indexed == 0
    assert not paths[0].exists()


def test_an_id_is_kept_whatever_it_is(store: Store) -> None:
    ids: list[Any] = [10**30, -1, "", '\x00\ud7ff\U0010ffff"\\', "x" * 100_000]
    sections = [(10 * i, {"row": i, "id": id}) for i, id in enumerate(ids)]
    writer = store.text_writer(None, {}, has_lines=False)
    found = kept(store, writer.write(Stretch(0, b"0123456789" * 5, sections)), 50)
    assert [found.place(10 * i + 9) for i in range(5)] == [place for _, place in sections]


# ---- damage ----


def test_every_changed_byte_is_found(store: Store) -> None:
    """In the header by opening the text, elsewhere by reading it."""
    name = written(store, b"Some words. Others.", [10, 19])
    path = store._files.texts.path(name)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises((SnapshotError, MismatchError), match=r"texts/.."):
            kept(store, name, 19).read(0, 19)
    for size in (0, 5, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(SnapshotError):
            kept(store, name, 19)
    path.write_bytes(data[:8] + (9).to_bytes(4, "little") + data[12:])
    with pytest.raises(MismatchError, match="newer"):
        kept(store, name, 19)
    path.unlink()
    with pytest.raises(SnapshotError, match="expected kept text, found no file"):
        kept(store, name, 19)


@pytest.mark.parametrize(
    "lie",
    [
        {"byte_end": 20},
        {"byte_end": 10},
        {"byte_start": 9, "byte_end": 18},
        {"byte_end": 10 + (1 << 20) + 1},
        {"previous": None},
        {"previous": "f" * 64},
        {"previous": 5},
        {"decided": 20},
        {"decided": -1},
        {"language": b"en"},
        {"line": 0.5},
        {"other": 1},
    ],
    ids=str,
)
def test_an_extent_that_lies_of_itself_is_refused(store: Store, lie: dict[str, Any]) -> None:
    """Under the right name, with right checksums."""
    before = written(store, b"Some words. Others.", [10])
    values = {"previous": before, "byte_start": 10, "byte_end": 19, "decided": 0, "language": None, "line": 0}
    name = _put(store, texts.encode({**values, **lie}, b"s. Others", b"[{},[]]"))
    with pytest.raises(SnapshotError):
        found = kept(store, name, 19)
        found.read(0, 19)


@pytest.mark.parametrize(
    "places",
    [b"", b"[{}]", b"[[],[]]", b'[{"line":1.5},[]]', b"[{},[[20,{}]]]", b"[{},[[12,{}],[11,{}]]]", b"[" * 9000],
)
def test_places_that_are_none_are_refused(store: Store, places: bytes) -> None:
    values = {"previous": None, "byte_start": 0, "byte_end": 19, "decided": 0, "language": None, "line": 0}
    name = _put(store, texts.encode(values, b"Some words. Others.", places))
    with pytest.raises(SnapshotError, match="places of its text"):
        kept(store, name, 19).read(0, 1)


def _put(store: Store, data: bytes) -> str:
    name = texts.hashlib.sha256(data).hexdigest()
    store._files.texts.path(name).parent.mkdir(exist_ok=True)
    store._files.texts.path(name).write_bytes(data)
    return name


# ---- in a store ----


def text_of(store: Store, ref: str) -> bytes | None:
    found = store.text(store.get(ref))
    return b"".join(found.pieces()) if found is not None else None


def test_a_snapshot_has_its_text_or_none(store: Store) -> None:
    made = read(store, n=3)
    assert text_of(store, "book.txt") == fake_text("a text", 3 * 48)
    assert text_of(store, "book.txt~2") == fake_text("a text", 48)
    fork = put(store, fake(7, start=made[0].id, start_digest=made[0].state_digest, how="ask"))
    assert fork.text is None and store.text(fork) is None
    store.rm(made[1].id)
    removed = store._files.read_record(made[1].id)
    assert removed is not None and removed.text is None
    assert text_of(store, "book.txt") == fake_text("a text", 3 * 48)


def test_a_shared_snapshot_gets_the_text_that_it_lacked(store: Store) -> None:
    """And keeps it where it is read again without."""
    [without] = [put(store, fake(CHUNK))]
    assert without.text is None
    [made] = read(store, "other.txt", n=1)
    assert made.id == without.id and made.document == "book.txt"
    assert text_of(store, made.id[:12]) == fake_text("a text", 48)
    again = put(store, fake(CHUNK))
    assert again.text == made.text
    store.keep_text(made.id, made.text or "")
    with pytest.raises(SnapshotError, match="expected text up to byte 48, found up to 10"):
        store.keep_text(made.id, written(store, b"Some words", [10]))
    with pytest.raises(NotFoundError):
        store.keep_text("0" * 64, made.text or "")
    assert store.verify(read_data=True).damaged == []


def everything(folder: Path) -> bytes:
    """The bytes of all files, and what their zstd frames hold."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found.append(data)
            at = data.find(zstandard.FRAME_HEADER)
            while at >= 0:
                with contextlib.suppress(zstandard.ZstdError):
                    found.append(zstandard.ZstdDecompressor().decompressobj().decompress(data[at:]))
                at = data.find(zstandard.FRAME_HEADER, at + 1)
    return b"\n".join(found)


def test_nothing_of_a_text_is_left_once_it_is_removed(store: Store) -> None:
    secret = b"The abracadabra stands under the zanzibar stone."
    for name, text in (("secret.txt", secret), ("open.txt", b"Nothing to see at this place, go on to others.")):
        with store.writing(name, MODEL):
            writer = store.text_writer(None, {"id": f"place of {name}"}, has_lines=True)
            new = fake(CHUNK, name, document=name, bytes=len(text))
            made = put(store, replace(new, text=writer.write(Stretch(0, text, []))))
            store.move_head(name, MODEL, made.id)
    there = everything(store.path)
    assert all(word in there for word in (secret, b"abracadabra", b"zanzibar", b"place of secret", b"Nothing to see"))
    store.rm(store.get("secret.txt").id)
    done = store.prune()
    assert (done.snapshots, done.objects, done.texts) == (1, 1, 1)
    there = everything(store.path)
    for word in (secret, b"abracadabra", b"zanzibar", b"place of secret"):
        assert word not in there
    assert b"Nothing to see" in there and b"place of open" in there
    assert text_of(store, "open.txt") is not None


def test_text_stays_as_long_as_a_snapshot_leads_to_it(store: Store) -> None:
    made = read(store, n=4)
    names = [*files(store._files.texts.folder)]
    assert len(names) == 4
    store.rm(made[3].id)
    assert store.prune().texts == 1
    store.rm(made[0].id)
    assert store.prune().texts == 0, "the text of the others begins with it"
    assert text_of(store, "book.txt") == fake_text("a text", 3 * 48)
    stray = written(store, b"Never named.", [5, 12])
    assert store.prune(dry_run=True).texts == 2
    assert store._files.texts.path(stray).exists()
    assert store.prune().texts == 2
    assert not store._files.texts.path(stray).exists() and not store._files.texts.postings_path(stray).exists()


def test_postings_without_their_text_are_pruned(store: Store) -> None:
    [made] = read(store, n=1)
    assert made.text is not None
    stray = store._files.texts.postings_path("ab" * 32)
    stray.parent.mkdir()
    stray.write_bytes(b"of a text that is gone")
    assert store.verify(read_data=True).damaged == []
    store.prune()
    assert not stray.exists()


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:-3])
    elif how == "header":
        path.write_bytes(data[:20] + b"x" + data[21:])
    else:
        path.write_bytes(data[:-3] + b"xxx")


@pytest.mark.parametrize("how", ["gone", "cut", "header", "frame"])
def test_damaged_text_is_named_moved_aside_and_kept_again(store: Store, how: str) -> None:
    made = read(store, n=3)
    before = told(store)
    path = store._files.texts.path(made[1].text or "")
    spoil(path, how)
    report = store.verify(read_data=True)
    assert {damage.path for damage in report.damaged} == {str(path.relative_to(store.path))}
    if how != "frame":
        assert {damage.path for damage in store.verify().damaged} == {str(path.relative_to(store.path))}
        with pytest.raises(SnapshotError, match=path.name):
            store.text(made[2])
        with pytest.raises(SnapshotError, match="pruning"):
            store.prune()
    else:
        with pytest.raises(SnapshotError, match=path.name):
            text_of(store, "book.txt")
    assert made[2].state() is not None, "states are whole"
    repaired = Store.repair(store.path)
    assert repaired.lost == []
    assert (how == "gone") == (path.name not in {kept.name for kept in files(store._files.quarantine)})
    assert store.verify(read_data=True).damaged == []
    assert told(store) == before | {"texts": {made[0].id: before["texts"][made[0].id]}}
    assert text_of(store, made[0].id) == fake_text("a text", 48)
    assert text_of(store, made[1].id) is None and text_of(store, made[2].id) is None
    read(store, n=3)
    assert text_of(store, made[2].id) == fake_text("a text", 3 * 48)


def test_text_under_another_name_goes_home(store: Store) -> None:
    made = read(store, n=2)
    path = store._files.texts.path(made[0].text or "")
    path.rename(path.with_name("0" * 64))
    (store._files.texts.folder / "notes.txt").write_text("mine")
    (store._files.texts.postings_folder / "notes.txt").write_text("mine")
    store._files.texts.postings_path(made[1].text or "").write_bytes(b"damaged")
    damaged = {damage.path for damage in store.verify(read_data=True).damaged}
    assert damaged == {
        str(path.relative_to(store.path)),
        str(path.with_name("0" * 64).relative_to(store.path)),
        "texts/notes.txt",
        "postings/notes.txt",
    }
    repaired = Store.repair(store.path)
    assert path.exists()
    assert [note.reason for note in repaired.restored] == ["it lay under another name"]
    assert repaired.indexed == 1
    assert {note.path for note in repaired.quarantined} == damaged - {str(path.relative_to(store.path))}
    assert store.verify(read_data=True).damaged == []
    assert text_of(store, "book.txt") == fake_text("a text", 96)


# ---- elsewhere ----


@pytest.mark.parametrize("only", [False, True])
def test_text_goes_to_another_store(store: Store, tmp_path: Path, only: bool) -> None:
    made = read(store, n=3)
    file = io.BytesIO()
    store.export(["book.txt"], file, only=only)
    other = Store(tmp_path / "other.store", create=True)
    other.import_(io.BytesIO(file.getvalue()))
    assert text_of(other, "book.txt") == fake_text("a text", 3 * 48)
    assert other.verify(read_data=True).damaged == []
    assert sentences(other.text(other.get("book.txt"))) == sentences(store.text(made[2]))  # type: ignore[arg-type]
    if only:
        assert [s.text for s in other._files.ancestors(other.get("book.txt"))] == [None, None]
    else:
        assert text_of(other, "book.txt~2") == fake_text("a text", 48)


def test_text_stays_at_home_where_that_is_asked(store: Store, tmp_path: Path) -> None:
    """And is given later to the snapshots that came without."""
    read(store, n=2)
    file = io.BytesIO()
    store.export(["book.txt"], file, keep_text=False)
    assert fake_text("a text", 48)[:30] not in file.getvalue()
    other = Store(tmp_path / "other.store", create=True)
    other.import_(io.BytesIO(file.getvalue()))
    assert text_of(other, "book.txt") is None
    assert other.verify(read_data=True).damaged == []
    file = io.BytesIO()
    store.export(["book.txt"], file)
    assert (other.import_(io.BytesIO(file.getvalue())).added) == 0
    assert text_of(other, "book.txt") == fake_text("a text", 96)
    assert other.verify(read_data=True).damaged == []


def test_an_export_without_some_of_its_text_is_refused(store: Store, tmp_path: Path) -> None:
    made = read(store, n=2)
    path = store._files.texts.path(made[0].text or "")
    data = path.read_bytes()
    file = io.BytesIO()
    store.export(["book.txt"], file)
    blocks = -(-len(data) // 512) * 512
    at = file.getvalue().find(path.name.encode()) - len(f"texts/{path.name[:2]}/")
    without = file.getvalue()[:at] + file.getvalue()[at + 512 + blocks :]
    other = Store(tmp_path / "other.store", create=True)
    with pytest.raises(SnapshotError, match=f"texts/{path.name[:2]}/{path.name}: missing"):
        other.import_(io.BytesIO(without))
    spoilt = file.getvalue().replace(data[-20:], bytes(20))
    with pytest.raises(SnapshotError, match="agree with its name"):
        other.import_(io.BytesIO(spoilt))
    assert list(other.list()) == [] and not [*files(other._files.texts.folder)]
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(SnapshotError, match=path.name):
        store.export(["book.txt"], io.BytesIO())
