"""The store as its users see it: what is put is what is got, by every name, in the order that keeps it whole."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_snapshots import (
    CHUNK,
    MODEL,
    OTHER_MODEL,
    START,
    Shape,
    digest,
    fake,
    fake_hidden,
    fake_state,
    in_child,
    put,
    read,
    start_child,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_stream import files
from rwkv_stream.errors import (
    MismatchError,
    NotFoundError,
    OutputError,
    SnapshotError,
    StoreLockedError,
    UsageError,
)
from rwkv_stream.model.state import State, layout
from rwkv_stream.store import Listed, Snapshot, Store, codecs, objects, records, sealed, sessions
from rwkv_stream.store import layout as store_layout
from rwkv_stream.store import store as store_module
from rwkv_stream.store.catalog import SORTS, Catalog
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.verify import Damage

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time; one test below looks at what is synced."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def ids(snapshots: Iterator[Listed]) -> list[str]:
    return [snapshot.id for snapshot in snapshots]


# ---- what is put is what is got ----


def test_a_snapshot_comes_back_to_the_bit(store: Store) -> None:
    made = store.put(fake(48), fake_state(3), fake_hidden(3))
    got = Store(store.path).get(made.id)
    assert got == made
    assert list(got.state()) == list(fake_state(3))
    assert all(torch.equal(got.state()[name], tensor) for name, tensor in fake_state(3).items())
    assert torch.equal(got.last_hidden(), fake_hidden(3))
    assert got.size_bytes == sum(p.stat().st_size for p in (store.path / "objects").rglob("*") if p.is_file())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bits_round_trip(tmp_path: Path, data: st.DataObject) -> None:
    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        n_bytes = 4 * int(np.prod(shape))
        bits = data.draw(st.one_of(st.binary(min_size=n_bytes, max_size=n_bytes), st.just(bytes(n_bytes))))
        return torch.from_numpy(np.frombuffer(bits, "<f4").copy().reshape(shape))

    shape = Shape(n_layer=data.draw(st.integers(1, 3)), n_embd=data.draw(st.integers(1, 5)), head_size=2)
    state = State({name: tensor((1, *s)) for name, s in layout(shape).items()})  # type: ignore[arg-type]
    hidden = tensor((shape.n_embd,))
    made = Store(tmp_path / "a.store", create=True).put(fake(16, chain=digest(uuid.uuid4())), state, hidden)
    for name, expected in state.items():
        assert made.state()[name].numpy().tobytes() == expected.numpy().tobytes(), name
    assert made.last_hidden().numpy().tobytes() == hidden.numpy().tobytes()


def test_states_of_real_weights_get_smaller(store: Store) -> None:
    state = State({"att_kv": torch.randn(1, 4, 2, 64, 64)})
    made = store.put(fake(16), state, torch.zeros(8))
    assert made.size_bytes < 0.95 * state.nbytes


def test_a_batch_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="batch 1, found 3"):
        store.put(fake(16), fake_state(1).repeat(3), fake_hidden(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "two words"},
        {"tokens": -1},
        {"chain": "beef"},
        {"decided_byte": -2},
        {"parent": "x"},
        {"numerics": {"a": 1.5}},
    ],
    ids=str,
)
def test_values_that_no_record_may_hold_are_refused(store: Store, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        store.put(replace(fake(16), **changes), fake_state(1), fake_hidden(1))  # type: ignore[arg-type]
    assert not list((store.path / "objects").rglob("*"))


@pytest.mark.parametrize("name", ["caf\udce9.txt", "x" * 70_000], ids=["no text", "too long"])
def test_names_that_cannot_be_written_down(store: Store, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        put(store, fake(16, document=name))


# ---- identity ----


def test_ids_do_not_depend_on_name_path_time_parent_or_codec(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = put(store, fake(32))
    other = Store(tmp_path / "b.store", create=True)
    parent = put(other, fake(16))
    monkeypatch.setattr(objects, "ZSTD_LEVEL", 19)
    monkeypatch.setattr(store_module, "now", lambda: "1999-01-01T00:00:00Z")
    again = put(
        other, fake(32, document="z", model_path="/m", parent=parent.id, numerics={}, exact=False, encoding="x")
    )
    assert again.id == first.id
    assert again.created != first.created
    assert again.objects != first.objects


@pytest.mark.parametrize("name", ["model", "start_digest", "chain", "tokens", "state"])
def test_ids_depend_on_who_read_what_from_where(store: Store, name: str) -> None:
    new, state = fake(32), fake_state(1)
    if name == "state":
        state = State({**state, "att_x_prev": -state["att_x_prev"]})
    else:
        new = replace(new, **{name: {"model": OTHER_MODEL, "tokens": 33}.get(name, digest(name))})
    assert store.put(new, state, fake_hidden(1)).id != store.put(fake(32), fake_state(1), fake_hidden(1)).id


def test_an_id_can_be_computed_from_the_format_document(store: Store) -> None:
    import hashlib

    made = put(store, fake(32))
    parts = ["rwkv-stream snapshot", made.model, made.start_digest, made.chain, str(made.tokens), made.state_digest]
    assert made.id == hashlib.sha256("\n".join(parts).encode()).hexdigest()
    assert made.state_digest == made.state().digest()


# ---- order ----


class Recorder:
    """What reaches the disk, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        publish, publish_all, changing = files.publish, files.publish_all, Catalog.changing
        unlink = Path.unlink

        def recorded_publish(path: Path, data: bytes, *, kind: str, temp_tag: str, durable: bool = True) -> None:
            publish(path, data, kind=kind, temp_tag=temp_tag, durable=durable)
            self.events.append(kind)

        def recorded_publish_all(made: list[tuple[Path, bytes]], *, kind: str, temp_tag: str) -> None:
            publish_all(made, kind=kind, temp_tag=temp_tag)
            self.events += [kind] * len(made)

        @contextlib.contextmanager
        def recorded_changing(catalog: Catalog) -> Iterator[None]:
            with changing(catalog):
                yield
            self.events.append("catalog")

        def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            if path.parent.name not in ("writers", "locks"):
                self.events.append(f"unlink {path.parent.name}")

        for module in (objects, sessions):
            monkeypatch.setattr(module, "publish", recorded_publish)
        monkeypatch.setattr(sessions, "publish_all", recorded_publish_all)
        monkeypatch.setattr(Catalog, "changing", recorded_changing)
        monkeypatch.setattr(Path, "unlink", recorded_unlink)


def test_order_of_publishing_and_removing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.rebuild()
    recorder = Recorder(monkeypatch)
    first, second = read(store, n=2)
    assert recorder.events == ["text", "postings", "object", "record", "head", "catalog"] * 2
    recorder.events.clear()
    store.tag("here", first.id)
    store.rm(second.id)
    assert recorder.events == ["tag", "catalog", "catalog", "rm.head", "rm.record"]
    recorder.events.clear()
    store.untag("here")
    store.rm(first.id)
    assert recorder.events == ["catalog", "unlink tags", "catalog", "unlink heads", "rm.record"]


def test_each_file_is_synced_renamed_and_its_folder_synced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    rename = os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append((f"rename {target}", str(source)))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    read(store, n=1)
    renames = [i for i, (what, _) in enumerate(events) if what.startswith("rename")]
    folders = [Path(what.removeprefix("rename ")).relative_to(store.path).parts[0] for what, _ in events if " " in what]
    assert folders == ["texts", "postings", "objects", "records", "refs"]
    for i, folder in zip(renames, folders, strict=True):
        what, temp = events[i]
        if folder == "postings":
            assert events[i - 1] != ("fsync", temp), "they are made again where they are lost"
            continue
        assert events[i - 1] == ("fsync", temp)
        assert events[i + 1] == ("fsync", str(Path(what.removeprefix("rename ")).parent))


def test_a_reading_that_made_no_head_is_listed_after_its_session(store: Store) -> None:
    with store.writing():
        made = put(store, fake(16))
        assert ids(store.list()) == [made.id], "its own writer sees it at once"
    assert ids(Store(store.path).list()) == [made.id]


# ---- references ----


@pytest.fixture(scope="module")
def library_to_copy(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("library") / "a.store", create=True)
    read(store, "books/book.txt", "first edition", n=3)
    read(store, "books/book.txt", "second edition", n=5)
    read(store, "logs/web.log", "lines", n=2)
    store.tag("half way", store.get("books/book.txt@48").id)
    return store


@pytest.fixture
def library(library_to_copy: Store, tmp_path: Path) -> Store:
    """Two documents, a tag, and a reading of book.txt that a later one has superseded."""
    return Store(shutil.copytree(library_to_copy.path, tmp_path / "library.store"))


@pytest.mark.parametrize(
    ("ref", "document", "tokens"),
    [
        ("half way", "books/book.txt", 48),
        ("books/book.txt", "books/book.txt", 80),
        ("book.txt", "books/book.txt", 80),
        ("book", "books/book.txt", 80),
        ("books/book@48", "books/book.txt", 48),
        ("web.log", "logs/web.log", 32),
        ("book.txt@48", "books/book.txt", 48),
        ("book.txt@63", "books/book.txt", 48),
        ("book.txt@64", "books/book.txt", 64),
        ("book.txt@999999", "books/book.txt", 80),
        ("book.txt@50%", "books/book.txt", 32),
        ("book.txt@60%", "books/book.txt", 48),
        ("book.txt@59.99%", "books/book.txt", 32),
        ("book.txt@100%", "books/book.txt", 80),
        ("book.txt@byte:143", "books/book.txt", 32),
        ("book.txt@byte:144", "books/book.txt", 48),
        ("book.txt~0", "books/book.txt", 80),
        ("book.txt~2", "books/book.txt", 48),
        ("book.txt~4", "books/book.txt", 16),
    ],
)
def test_references(library: Store, ref: str, document: str, tokens: int) -> None:
    got = library.get(ref)
    assert (got.document, got.tokens) == (document, tokens)
    assert got.chain == digest("second edition" if document == "books/book.txt" else "lines", tokens)


@pytest.mark.parametrize("n_digits", [8, 9, 63, 64])
def test_ids_by_their_first_digits(library: Store, n_digits: int) -> None:
    for entry in list(library.list()):
        assert library.get(entry.id[:n_digits]).id == entry.id


@pytest.mark.parametrize(
    "ref",
    ["", "nothing", "txt", "ook.txt", "oks/book.txt", "ook", "book.txt@15", "book.txt@byte:47", "book.txt@5%",
     "book.txt~5", "book.txt@", "book.txt~x", "half way@16", "half way~1", "0123456", "f" * 8, "f" * 64, "../format",
     "a" * 5000, "\0", "book.txt@" + "9" * 30, "%", "@1", "~1"],
)  # fmt: skip
def test_references_to_nothing(library: Store, ref: str) -> None:
    with pytest.raises(NotFoundError, match="expected"):
        library.get(ref)


def test_an_id_of_seven_digits_is_too_short(library: Store) -> None:
    with pytest.raises(NotFoundError):
        library.get(library.get("web.log").id[:7])


@pytest.mark.parametrize("ref", ["book.txt@101%", "caf\udce9"])
def test_references_that_make_no_sense(library: Store, ref: str) -> None:
    with pytest.raises(UsageError):
        library.get(ref)


def test_a_trailing_part_that_fits_two_documents(library: Store) -> None:
    read(library, "old/book.txt", "an old edition", n=2)
    for ref in ("book.txt", "book.txt~1", "book", "book~1", "book.txt@50%"):
        with pytest.raises(UsageError, match=r"found 2: .*books/book\.txt.*old/book\.txt"):
            library.get(ref)
    assert library.get("old/book.txt~1").tokens == 16
    assert library.get("books/book.txt~1").tokens == 64
    with pytest.raises(UsageError, match=r"books/book\.txt, old/book\.txt"):
        list(library.list("book.txt"))


def test_a_name_ends_with_whole_parts_of_a_path(library: Store) -> None:
    read(library, "telephone.txt", "numbers", n=1)
    for ref in ("phone.txt", "phone", "phone.txt~0"):
        with pytest.raises(NotFoundError, match=r"near it 'telephone\.txt'"):
            library.get(ref)
    found = library.get("telephone")
    assert found.document == "telephone.txt"
    with pytest.raises(NotFoundError, match="an id is given by its first 8 digits or more; run"):
        library.get(found.id[:7])


def test_a_stem_goes_after_what_ends_so(library: Store) -> None:
    read(library, "drafts/book", "a draft", n=1)
    assert library.get("book").document == "drafts/book"


def test_a_whole_name_goes_before_an_abbreviation(library: Store) -> None:
    read(library, "book.txt", "another", n=1)
    assert library.get("book.txt").tokens == 16


def test_documents_whose_two_names_mean_one_snapshot(library: Store) -> None:
    newest = library.get("web.log")
    library.move_head("copies/web.log", MODEL, newest.id)
    assert library.get("web.log") == newest


def test_a_document_named_like_a_place(library: Store) -> None:
    read(library, "web.log@16", "strange", n=1)
    assert library.get("web.log@16").tokens == 16
    read(library, "web.log", "lines", n=2)
    with pytest.raises(UsageError, match="found 2"):
        library.get("web.log@16")


@pytest.mark.parametrize(("name", "other"), [("a@5", "a"), ("sale@150%", "sale"), ("a~2", "a"), ("a@byte:5", "a")])
@pytest.mark.parametrize("folder", ["", "dir/"], ids=["whole name", "last part"])
def test_a_reading_that_fails_hides_no_other(store: Store, name: str, other: str, folder: str) -> None:
    read(store, other, "another", n=1)
    [made] = read(store, folder + name, "strange", n=1)
    assert store.get(name).id == made.id
    store.rm(made.id)
    with pytest.raises((NotFoundError, UsageError), match=r"expected one there|at most 100 %"):
        store.get(name)


def test_a_whole_name_settles_where_a_place_is_looked_for(store: Store) -> None:
    """An abbreviation is no way round a place that the document of that name does not have."""
    read(store, "a", "another", n=1)
    read(store, "dir/a", "a text", n=3)
    assert store.get("dir/a~2").tokens == 16
    with pytest.raises(NotFoundError, match="expected one there"):
        store.get("a~2")


def test_the_damaged_head_of_another_model_hides_nothing(library: Store) -> None:
    read(library, "books/book.txt", "second edition", n=4, model=OTHER_MODEL)
    library._files.head_path("books/book.txt", OTHER_MODEL).write_bytes(b"damaged")
    assert library.get("book.txt", model=MODEL).tokens == 80


def test_a_document_that_took_the_name_of_a_tag(library: Store) -> None:
    read(library, "half way", "a novel", n=1)
    with pytest.raises(UsageError, match=r"tag 'half way'.*document 'half way'"):
        library.get("half way")
    assert library.get("half way~0").chain == digest("a novel", 16)


def test_an_abbreviation_that_is_both_name_and_id(library: Store) -> None:
    prefix = library.get("web.log").id[:8]
    read(library, f"notes/{prefix}", "notes", n=1)
    with pytest.raises(UsageError, match="found 2"):
        library.get(prefix)
    read(library, prefix, "whole name", n=1)
    assert library.get(prefix).chain == digest("whole name", 16)


def test_two_ids_with_the_same_beginning(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = records.snapshot_id

    def alike(*parts: object) -> str:
        return "abcdef12" + real(*parts)[8:]  # type: ignore[arg-type]

    monkeypatch.setattr(records, "snapshot_id", alike)
    one, two = put(store, fake(16)), put(store, fake(32))
    with pytest.raises(UsageError, match="found 2"):
        store.get("abcdef12")
    assert store.get(one.id) == one
    assert store.get(two.id) == two


def test_models_of_a_document(library: Store) -> None:
    read(library, "books/book.txt", "second edition", n=4, model=OTHER_MODEL)
    with pytest.raises(UsageError, match="--model"):
        library.get("book.txt")
    assert library.get("book.txt", model=OTHER_MODEL).tokens == 64
    assert library.get("book.txt~1", model=MODEL).tokens == 64
    assert library.get("half way", model=MODEL).tokens == 48
    for ref in ("half way", "web.log", "web.log~1", library.get("web.log").id):
        with pytest.raises(
            MismatchError, match=rf"made by model {MODEL}.*/models/tiny\.pth.*this model is {OTHER_MODEL}"
        ):
            library.get(ref, model=OTHER_MODEL)


def test_references_pass_over_removed_snapshots(library: Store) -> None:
    for tokens in (64, 32):
        library.rm(library.get(f"books/book.txt@{tokens}").id)
    assert [library.get(f"book.txt~{n}").tokens for n in range(3)] == [80, 48, 16]
    assert library.get("book.txt@79").tokens == 48
    assert library.get("book.txt@50%").tokens == 16
    assert [s.tokens for s in library.ancestors(library.get("book.txt"))] == [48, 16]
    with pytest.raises(NotFoundError):
        library.get("book.txt~3")


def test_a_reference_opens_few_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = read(store, n=60)[-1]
    opened: list[Path] = []
    read_file = sealed.read_file

    def counted(path: Path, limit: int) -> bytes:
        opened.append(path)
        return read_file(path, limit)

    monkeypatch.setattr(store_layout, "read_file", counted)
    for ref in ("book.txt", "book.txt~55", "book.txt@20", "book.txt@3%", newest.id[:10]):
        opened.clear()
        store.get(ref)
        assert len(opened) <= 5, ref
    opened.clear()
    assert len(list(store.list())) == 60
    assert opened == []


# ---- heads ----


def test_the_head_of_a_document(store: Store) -> None:
    assert store.head("book.txt", MODEL) is None
    made = read(store, n=2)
    assert store.head("book.txt", MODEL) == made[-1]
    assert store.head("book.txt", OTHER_MODEL) is None
    assert store.head("txt", MODEL) is None, "a head is asked for by its whole name"
    store.move_head("book.txt", MODEL, made[0].id)
    assert store.head("book.txt", MODEL) == made[0]


def test_the_encoding_is_the_documents_own(store: Store) -> None:
    """Two texts of the same characters in different encodings share their snapshots."""
    made = read(store, "latin.txt", n=2, encoding="latin-1")[-1]
    store.move_head("utf.txt", MODEL, made.id, encoding="utf-8")
    for document, encoding in (("latin.txt", "latin-1"), ("utf.txt", "utf-8")):
        head = store.head(document, MODEL)
        assert head is not None
        assert (head.id, head.encoding) == (made.id, encoding)


def test_the_chunk_is_the_documents_own(store: Store) -> None:
    """Two readings of the same tokens share their snapshots, whatever chunks they are read in."""
    made = read(store, n=1, chunk=8)[-1]
    store.move_head("other.txt", MODEL, made.id, chunk=32)
    for document, chunk, leaf in (("book.txt", 8, False), ("other.txt", 32, True)):
        head = store.head(document, MODEL)
        assert head is not None
        assert (head.id, head.chunk, head.leaf) == (made.id, chunk, leaf)
    assert store.get("other.txt") == made, "as it was recorded"
    with pytest.raises(UsageError, match="chunks of 1 token"):
        store.move_head("other.txt", MODEL, made.id, chunk=0)


def test_an_exported_head_keeps_what_is_the_documents_own(store: Store, tmp_path: Path) -> None:
    made = read(store, n=2)[-1]
    store.move_head("other.txt", MODEL, made.id, encoding="latin-1", chunk=32)
    file = io.BytesIO()
    store.export([made.id], file)
    file.seek(0)
    elsewhere = Store(tmp_path / "elsewhere.store", create=True)
    elsewhere.import_(file)
    head = elsewhere.head("other.txt", MODEL)
    assert head is not None
    assert (head.id, head.encoding, head.chunk) == (made.id, "latin-1", 32)


def test_a_head_stands_only_at_what_exists_and_is_its_models(store: Store) -> None:
    made = read(store, n=2)
    with pytest.raises(NotFoundError):
        store.move_head("x", MODEL, digest("nothing"))
    with pytest.raises(MismatchError):
        store.move_head("x", OTHER_MODEL, made[0].id)
    store.rm(made[0].id)
    with pytest.raises(NotFoundError, match="removed"):
        store.move_head("x", MODEL, made[0].id)
    assert store.verify().damaged == []


# ---- tags ----


def test_tags_come_and_go(library: Store) -> None:
    library.tag("half way", library.get("half way").id)
    library.tag(".dotted/and ünïcode", library.get("web.log").id)
    assert dict(library.tags()) == {
        "half way": library.get("book.txt@48").id,
        ".dotted/and ünïcode": library.get("web.log").id,
    }
    assert library.get(".dotted/and ünïcode").document == "logs/web.log"
    library.untag("half way")
    with pytest.raises(NotFoundError):
        library.get("half way")
    with pytest.raises(NotFoundError):
        library.untag("half way")
    assert library.verify().damaged == []


def test_a_tag_is_not_taken_away_silently(library: Store) -> None:
    other = library.get("web.log").id
    with pytest.raises(UsageError, match="on '"):
        library.tag("half way", other)
    library.tag("half way", other, move=True)
    assert library.get("half way").id == other


@pytest.mark.parametrize("name", ["half way", "books/book.txt", "a@5", "deadbeef", " x"])
def test_a_tag_is_checked_before_there_is_a_snapshot_for_it(library: Store, name: str) -> None:
    with pytest.raises(UsageError, match="tagging"):
        library.check_tag(name)
    library.check_tag("free")
    assert dict(library.tags()).keys() == {"half way"}


@pytest.mark.parametrize("name", ["", " x", "a@5", "a~1", "deadbeef", "a\nb", "x" * 300, "caf\udce9", "books/book.txt"])
def test_names_that_cannot_be_tags(library: Store, name: str) -> None:
    with pytest.raises(UsageError, match="tagging"):
        library.tag(name, library.get("web.log").id)


# ---- listing and finding ----


def test_list_is_of_all_or_of_a_document_or_model_oldest_first(library: Store) -> None:
    everything = list(library.list())
    assert len(everything) == 3 + 5 + 2
    assert sorted(s.created for s in everything) == [s.created for s in everything]
    assert {s.document for s in library.list("web.log")} == {"logs/web.log"}
    assert [s.tokens for s in library.list("logs/web.log")] == [16, 32]
    assert len(list(library.list("book.txt"))) == 8, "superseded readings are there to be looked at"
    assert list(library.list("no such document")) == []
    assert list(library.list(model=OTHER_MODEL)) == []
    first = library.get(everything[0].id)
    assert everything[0] == tuple(getattr(first, name) for name in Listed._fields)


def test_an_order_that_is_none_is_refused(library: Store) -> None:
    with pytest.raises(UsageError, match=r"expected an order of .*created.*, found 'age'"):
        next(iter(library.list(sort="age")))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_lists_are_sorted(library: Store, sort: str, reverse: bool) -> None:
    def key(entry: Listed) -> object:
        return getattr(entry, {"size": "size_bytes"}.get(sort, sort))

    entries = list(library.list(sort=sort, reverse=reverse))
    assert len(entries) == 10
    assert [key(e) for e in entries] == sorted(map(key, entries), reverse=reverse)  # type: ignore[type-var]


def test_a_documents_list_has_what_it_shares_with_others(library: Store) -> None:
    library.move_head("copy.log", MODEL, library.get("web.log").id)
    assert ids(library.list("copy.log")) == ids(library.list("web.log"))


def test_removed_snapshots_are_not_listed_nor_found(library: Store) -> None:
    gone = library.get("book.txt~1")
    library.rm(gone.id)
    assert gone.id not in ids(library.list())
    for ref in (gone.id, gone.id[:8]):
        with pytest.raises(NotFoundError):
            library.get(ref)


def test_reach_is_that_of_the_next_snapshots(library: Store) -> None:
    def reach(parent: str | None, limit: int = 1000) -> int | None:
        return library.reach(MODEL, START, parent, limit)

    book = [library.get(f"books/book.txt@{16 * n}") for n in range(1, 6)]
    assert (reach(None), reach(None, 15), reach(book[0].id), reach(book[0].id, 31)) == (16, None, 32, None)
    library.rm(book[1].id)
    library.rm(book[3].id)
    assert reach(book[0].id) == 48
    assert reach(book[2].id) == 80, "over the removed one"
    assert reach(book[4].id) is None
    assert library.reach(OTHER_MODEL, START, None, 1000) is None
    assert library.reach(MODEL, digest("another start"), None, 1000) is None


def test_reach_sees_first_snapshots_under_removed_ones(store: Store) -> None:
    made = read(store, n=3)
    store.rm(made[0].id)
    assert store.reach(MODEL, START, None, 1000) == 32


def test_reach_and_match_look_things_up(library: Store) -> None:
    """They must not go through all readings of a store with a hundred thousand of them."""
    with contextlib.closing(sqlite3.connect(library.path / "catalog.sqlite")) as db:
        statements: list[str] = []
        index = Catalog(db)
        db.set_trace_callback(statements.append)
        index.reach(MODEL, START, None, 1000)
        index.with_chain(MODEL, START, 16, digest("lines", 16))
        db.set_trace_callback(None)
        for statement in statements:
            plan = [step for *_, step in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not [step for step in plan if step.startswith("SCAN r")], plan


def match(store: Store, text: str, tokens: int, **numerics: str) -> Snapshot | None:
    return store.match(MODEL, START, tokens, digest(text, tokens), numerics=numerics)


def test_match_is_by_the_tokens(library: Store) -> None:
    book = library.get("books/book.txt@32")
    assert match(library, "second edition", 32) == book
    assert match(library, "third edition", 32) is None
    assert library.match(MODEL, START, 33, book.chain, numerics={}) is None
    assert library.match(OTHER_MODEL, START, 32, book.chain, numerics={}) is None
    assert library.match(MODEL, digest("another start"), 32, book.chain, numerics={}) is None
    library.rm(book.id)
    assert match(library, "second edition", 32) is None


def test_match_prefers_the_same_numerics_then_exact_ones(store: Store) -> None:
    gpu, cpu = {"device": "cuda"}, {"device": "cpu"}
    made = [
        store.put(fake(16, exact=exact, numerics=numerics), fake_state(seed), fake_hidden(seed))
        for seed, (exact, numerics) in enumerate([(False, gpu), (True, gpu), (False, cpu), (True, cpu)])
    ]
    for n in (3, 2, 1, 0):
        assert match(store, "a text", 16, device="cpu") == made[n]
        store.rm(made[n].id)
    assert match(store, "a text", 16, device="cpu") is None


# ---- publishing again ----


def test_publishing_again_keeps_what_was_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(store, fake(32))
    before = {
        path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file() and "locks" not in path.parts
    }
    monkeypatch.setattr(store_module, "now", lambda: "2099-01-01T00:00:00Z")
    assert put(store, fake(32, document="copy")) == first
    after = {
        path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file() and "locks" not in path.parts
    }
    assert after == before, "nothing is written"


def test_a_nearer_parent_replaces_a_farther_one(store: Store) -> None:
    a, b, c = (put(store, fake(tokens)) for tokens in (16, 32, 48))
    last = fake(64)
    parents = []
    for parent in (None, b.id, a.id, None, c.id, b.id):
        made = put(store, fake(64, parent=parent))
        parents.append(made.parent)
        assert store.get(made.id).parent == made.parent
    assert parents == [None, b.id, b.id, b.id, c.id, c.id]
    store.move_head("book.txt", MODEL, made.id)
    assert [store.get(f"book.txt~{n}").tokens for n in range(2)] == [64, 48]
    assert last.tokens == 64


def test_a_parent_must_be_there_and_lie_before(store: Store) -> None:
    later = put(store, fake(48))
    for parent in (later.id, digest("nothing")):
        with pytest.raises(UsageError, match=r"expected .* before it"):
            put(store, fake(32, parent=parent))
    with pytest.raises(UsageError, match="found it at token 48"):
        put(store, fake(48, "another", parent=later.id))


def test_an_exact_reading_replaces_an_inexact_one_not_the_other_way(store: Store) -> None:
    new, old = {"device": "cpu", "threads": 2}, {"device": "cpu", "threads": 8}
    put(store, fake(32, exact=False, numerics=old))
    exact = put(store, fake(32, numerics=new))
    assert (exact.exact, exact.numerics) == (True, new)
    inexact = put(store, fake(32, exact=False, numerics=old))
    assert inexact == exact
    assert put(store, fake(32, numerics=old)).numerics == old, "the last exact reading is the one to go on from"


def test_a_removed_snapshot_can_be_read_again(store: Store) -> None:
    made = read(store, n=3)
    store.rm(made[1].id)
    again = put(store, fake(32, document="other name"))
    assert again.id == made[1].id
    assert (again.document, again.parent) == ("other name", made[0].id)
    assert [s.tokens for s in store.ancestors(made[2])] == [32, 16]
    assert torch.equal(again.last_hidden(), made[1].last_hidden())


def test_reading_again_heals_a_damaged_object_and_record(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    made = put(store, fake(32))
    [stored] = [p for p in (store.path / "objects").rglob("*") if p.is_file()]
    stored.write_bytes(b"rot")
    put(store, fake(32))
    assert "is being replaced" in caplog.text
    assert made.state().digest() == made.state_digest
    (store.path / "records" / made.id[:2] / made.id).write_bytes(b"rot")
    put(store, fake(32))
    assert store.verify().damaged == []


# ---- removing ----


def test_removing_moves_heads_to_the_nearest_ancestor(store: Store) -> None:
    made = read(store, n=3)
    store.move_head("copy", MODEL, made[2].id, encoding="latin-1")
    store.rm(made[1].id)
    store.rm(made[2].id)
    copy = store.head("copy", MODEL)
    assert copy is not None
    assert (copy.id, copy.encoding) == (made[0].id, "latin-1")
    assert store.get("book.txt").id == made[0].id
    store.rm(made[0].id)
    assert store.head("book.txt", MODEL) is None
    with pytest.raises(NotFoundError):
        store.get("copy")
    assert store.verify().damaged == []
    assert list(store.list()) == []


def test_a_tagged_snapshot_is_not_removed(library: Store) -> None:
    tagged = library.get("half way")
    with pytest.raises(UsageError, match="half way"):
        library.rm(tagged.id)
    library.untag("half way")
    library.rm(tagged.id)


@pytest.mark.parametrize("ref", ["book.txt", "f" * 64])
def test_what_is_not_there_is_not_removed(library: Store, ref: str) -> None:
    with pytest.raises(NotFoundError):
        library.rm(ref)


def test_loading_what_was_removed_meanwhile(store: Store) -> None:
    made = put(store, fake(16))
    store.rm(made.id)
    assert made.state().digest() == made.state_digest, "its object waits for a prune"


# ---- opening ----


def test_no_store(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError, match="expected a store"):
            Store(path)
    (tmp_path / "file").touch()
    with pytest.raises(NotFoundError):
        Store(tmp_path / "file")
    with pytest.raises(UsageError, match="found a file"):
        Store(tmp_path / "file", create=True)
    with pytest.raises(UsageError, match="found 'file' in it"):
        Store(tmp_path, create=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_creating_a_store_that_is_there_changes_nothing(library: Store) -> None:
    assert ids(Store(library.path, create=True).list()) == ids(library.list())


def of_the_next_version(data: bytes) -> bytes:
    version = int.from_bytes(data[8:12], "little") + 1
    import hashlib

    body = data[:8] + version.to_bytes(4, "little") + data[12:-32]
    return body + hashlib.sha256(body).digest()


def test_a_store_of_a_newer_version(library: Store) -> None:
    path = library.path / "format"
    path.write_bytes(of_the_next_version(path.read_bytes()))
    version = sealed.VERSION
    for create in (False, True):
        with pytest.raises(
            MismatchError, match=f"expected format {version} or older, found {version + 1}; use a newer"
        ):
            Store(library.path, create=create)


def test_a_record_ref_or_object_of_a_newer_version(library: Store) -> None:
    newest = library.get("web.log")
    record = library.path / "records" / newest.id[:2] / newest.id
    whole = record.read_bytes()
    record.write_bytes(of_the_next_version(whole))
    with pytest.raises(MismatchError, match="newer"):
        library.get("web.log")
    assert len(library.verify().damaged) >= 1
    record.write_bytes(whole)
    for path in [*(library.path / "refs" / "heads").iterdir(), library.path / "refs" / "tags" / "half%20way"]:
        path.write_bytes(of_the_next_version(path.read_bytes()))
    for ref in ("web.log", "half way"):
        with pytest.raises(MismatchError, match="newer"):
            library.get(ref)


def test_an_object_in_a_codec_of_the_future(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "EXACT", "int2")
        for module in (codecs, objects):
            patch.setattr(module, "CODECS", codecs.CODECS | {"int2": codecs.Integers("int2", 1)})
        made = put(store, fake(16))
    with pytest.raises(MismatchError, match="expected a codec of exact, int16, int8, found int2; use a newer"):
        store.get(made.id).state()


# ---- the catalog ----


def spoil_header(path: Path) -> None:
    path.write_bytes(b"not sqlite" + path.read_bytes()[10:])


def spoil_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 2] = os.urandom(len(data) // 2 - 4096)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [Path.unlink, spoil_header, spoil_middle, truncate, empty])
def test_a_lost_or_damaged_catalog_is_made_anew(library: Store, spoil: object) -> None:
    expected = ids(library.list()), dict(library.tags()), library.get("book.txt~3").id
    spoil(library.path / "catalog.sqlite")  # type: ignore[operator]
    again = Store(library.path)
    assert (ids(again.list()), dict(again.tags()), again.get("book.txt~3").id) == expected
    assert again.verify().damaged == []
    read(again, "logs/web.log", "lines", n=3)


@pytest.mark.parametrize("spoil", [Path.unlink, spoil_header, spoil_middle, empty])
def test_writing_with_a_lost_or_damaged_catalog(library: Store, spoil: object) -> None:
    with library.writing("logs/web.log", MODEL):
        parent = library.get("web.log")
        made = put(library, fake(48, "lines", document="logs/web.log", parent=parent.id))
        spoil(library.path / "catalog.sqlite")  # type: ignore[operator]
        library.move_head("logs/web.log", MODEL, made.id)
    assert library.verify().damaged == []
    assert library.get("web.log~1") == parent
    spoil(library.path / "catalog.sqlite")  # type: ignore[operator]
    library.rm(parent.id)
    spoil(library.path / "catalog.sqlite")  # type: ignore[operator]
    library.untag("half way")
    assert library.verify().damaged == []
    assert parent.id not in ids(library.list())


def test_rebuild_counts_records(library: Store) -> None:
    library.rm(library.get("web.log").id)
    assert library.rebuild() == 10
    assert len(list(library.list())) == 9
    assert library.verify().damaged == []


def test_a_ring_in_the_catalog_is_not_walked_for_ever(library: Store) -> None:
    newest = library.get("web.log")
    with contextlib.closing(sqlite3.connect(library.path / "catalog.sqlite")) as db, db:
        db.execute("UPDATE records SET parent = ? WHERE document = 'logs/web.log'", (newest.id,))
    with pytest.raises(NotFoundError):
        library.get("web.log~2")
    assert library.verify().damaged == []


def test_verify_compares_the_catalog_row_by_row(library: Store) -> None:
    for change in (
        "UPDATE records SET tokens = tokens + 1 WHERE tokens = 48",
        "UPDATE records SET parent = NULL WHERE tokens = 32",
        "DELETE FROM records WHERE tokens = 80",
        "UPDATE heads SET snapshot = 'x' WHERE document LIKE 'logs%'",
        "UPDATE records SET file = x'00' WHERE tokens = 64",
        "DELETE FROM tags",
    ):
        with contextlib.closing(sqlite3.connect(library.path / "catalog.sqlite")) as db, db:
            db.execute(change)
        [damage] = library.verify().damaged
        assert (damage.path, "rebuild" in damage.reason) == ("catalog.sqlite", True), change
        library.rebuild()
        assert library.verify().damaged == []
    with contextlib.closing(sqlite3.connect(library.path / "catalog.sqlite")) as db, db:
        db.execute(
            "INSERT INTO records SELECT 'ffff', document, model, start_digest, start, parent, tokens, chain,"
            " text_bytes, leaf, created, size_bytes, removed, text, how, edge, stamp, file FROM records LIMIT 1"
        )
        db.execute("INSERT INTO heads VALUES ('ghost', 'm', 'x', 'y', '', '')")
        db.execute("INSERT INTO tags VALUES ('ghost', 'x', 'y', '', '')")
    missing = ("records/ff/ffff", f"refs/heads/{store_layout.head_key('ghost', 'm')}", "refs/tags/ghost")
    assert library.verify().damaged == [Damage(path, "missing; the catalog has it") for path in missing]


# ---- verify ----


def test_verify_counts_every_file(library: Store) -> None:
    n_files = sum(p.is_file() and "locks" not in p.parts for p in library.path.rglob("*"))
    report = library.verify()
    assert (report.checked, report.damaged) == (n_files, [])


def test_verify_finds_what_is_missing_or_strange(library: Store) -> None:
    books = [library.get(f"book.txt~{n}") for n in range(5)]
    web = library.get("web.log")
    stored = books[0].objects[0].name
    for path in (
        f"objects/{stored[:2]}/{stored}",
        f"records/{books[2].id[:2]}/{books[2].id}",
        f"records/{web.id[:2]}/{web.id}",
    ):
        (library.path / path).unlink()
    (library.path / "objects" / "ab").mkdir(exist_ok=True)
    (library.path / "objects" / "ab" / "notes.txt").write_text("mine")
    (library.path / "objects" / "ab" / f"{files.TEMP_PREFIX}1234-x").write_text("of a live writer")
    damaged = {d.path: d.reason for d in library.verify().damaged}
    assert set(damaged) == {
        f"objects/{stored[:2]}/{stored}",
        f"records/{books[2].id[:2]}/{books[2].id}",
        f"records/{web.id[:2]}/{web.id}",
        "objects/ab/notes.txt",
    }
    assert books[0].id in damaged[f"objects/{stored[:2]}/{stored}"]


def test_objects_that_nothing_refers_to_are_no_damage(library: Store) -> None:
    library.rm(library.get("web.log").id)
    assert library.verify().damaged == []


# ---- locks ----


def hold(path: Path, document: str, seconds: float = 60) -> subprocess.Popen[bytes]:
    """A process that writes to a document until it ends or is killed."""
    code = f"""
import sys, time
from rwkv_stream.store import Store
with Store({str(path)!r}).writing({document!r}, {MODEL!r}):
    print("held", flush=True)
    time.sleep({seconds})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    return child


def test_one_writer_of_a_document(library: Store) -> None:
    child = hold(library.path, "logs/web.log")
    try:
        with pytest.raises(StoreLockedError, match="--wait"), library.writing("logs/web.log", MODEL):
            pass
        with pytest.raises(StoreLockedError):
            library.rm(library.get("web.log").id)
        assert library.get("web.log").tokens == 32, "readers need no lock"
        read(library, "books/book.txt", "third edition", n=1)
        with library.writing("logs/web.log", OTHER_MODEL):
            pass
    finally:
        child.kill()
        child.wait()
    read(library, "logs/web.log", "lines", n=1)


@pytest.mark.parametrize("ending", ["ends", "is killed"])
def test_waiting_for_a_lock(library: Store, ending: str) -> None:
    child = hold(library.path, "logs/web.log", seconds=0.3 if ending == "ends" else 60)
    if ending == "is killed":
        killer = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(0.3); os.kill({child.pid}, {signal.SIGKILL})"]
        )
    started = time.monotonic()
    with library.writing("logs/web.log", MODEL, wait=True):
        assert time.monotonic() - started < 30
    child.wait()
    if ending == "is killed":
        killer.wait()
    with Store(library.path, wait=True).writing("logs/web.log", MODEL):
        pass


def test_a_marker_taken_for_a_dead_writers_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may look between the making of a marker and its locking."""
    flock, taken = fcntl.flock, list[Path]()

    def late_flock(descriptor: int, operation: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.parent.name == "writers" and not taken:
            taken.append(path)
            Store(store.path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late_flock)
    with store.writing():
        assert taken
        assert [path for path in (store.path / "locks" / "writers").iterdir() if path not in taken] != []
        assert Store(store.path)._sessions.current is None
        assert len(list((store.path / "locks" / "writers").iterdir())) == 1


def test_a_head_that_is_moved_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rm` moves the head away and removes the snapshot after a reader has seen where the head stood."""
    made = read(store, n=2)
    live = StoreFiles.live
    seen: list[str] = []

    def late_live(self: StoreFiles, identity: str) -> Snapshot:
        seen.append(identity)
        if len(seen) == 1:
            Store(store.path).rm(made[1].id)
        return live(self, identity)

    monkeypatch.setattr(StoreFiles, "live", late_live)
    assert store.head("book.txt", MODEL) == made[0]


def test_an_exclusive_holder_keeps_writers_out(library: Store) -> None:
    with (library.path / "locks" / "store").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreLockedError, match="clearing up"):
            put(library, fake(16))
    put(library, fake(16))


def test_sessions_nest(store: Store) -> None:
    with store.writing("book.txt", MODEL), store.writing("book.txt", MODEL), store.writing():
        put(store, fake(16))
        assert len(list((store.path / "locks" / "writers").iterdir())) == 1
    assert not list((store.path / "locks" / "writers").iterdir())


def test_two_stores_in_one_process(store: Store) -> None:
    other = Store(store.path)
    with store.writing("a", MODEL):
        with other.writing("b", MODEL):
            made = put(other, fake(16))
            other.move_head("b", MODEL, made.id)
        with pytest.raises(StoreLockedError), other.writing("a", MODEL):
            pass
        assert store.get("b") == made


def test_writers_of_different_documents_at_once(store: Store) -> None:
    """The same text under three names: they publish the same ids at the same time."""

    def child(name: str) -> None:
        read(Store(store.path), name, "a shared text", n=12)

    pids = [start_child(lambda name=name: child(name)) for name in ("one", "two", "three")]  # type: ignore[misc]
    for _ in range(20):
        list(store.list())
        assert store.verify().damaged == []
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert store.verify().damaged == []
    assert len(list(store.list())) == 12
    assert store.get("one") == store.get("two") == store.get("three")
    assert len(list(store.ancestors(store.get("one")))) == 11
    assert not list((store.path / "locks" / "writers").iterdir())


# ---- read only ----


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users may look into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_a_reader(work: Callable[[], object]) -> None:
    """Do `work` in a child that is a user who may not write; what is needed has been imported by now."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()

    assert in_child(child) == 0


@pytest.mark.parametrize("catalog", ["whole", "absent", "damaged", "in use", "behind a dead writer"])
def test_a_store_that_may_only_be_read(shared_folder: Path, catalog: str) -> None:
    store = Store(shared_folder / "a.store", create=True)
    made = read(store, n=2)
    store.tag("here", made[0].id)

    def work() -> None:
        reader = Store(store.path)
        assert not reader.writable
        assert [s.tokens for s in reader.list()] == [16, 32]
        assert [reader.get(ref).tokens for ref in ("book.txt", "book~1", "here", made[0].id[:8])] == [32, 16, 16, 16]
        assert reader.get("here").state().digest() == made[0].state_digest
        damaged = ["catalog.sqlite"] if catalog in ("damaged", "behind a dead writer") else []
        assert [damage.path for damage in reader.verify().damaged] == damaged

    with contextlib.ExitStack() as stack:
        if catalog == "absent":
            (store.path / "catalog.sqlite").unlink()
        elif catalog == "damaged":
            spoil_header(store.path / "catalog.sqlite")
        elif catalog == "in use":
            stack.enter_context(store.writing())
            stack.enter_context(store._sessions.catalog())
        elif catalog == "behind a dead writer":
            Catalog.rebuild(store.path / "catalog.sqlite", lambda index: None)
            (store.path / "locks" / "writers" / "0123").touch()
        as_a_reader(work)


@pytest.mark.parametrize("what", ["rm", "tag", "rebuild", "create"])
def test_a_reader_cannot_write(shared_folder: Path, what: str) -> None:
    store = Store(shared_folder / "a.store", create=True)
    [made] = read(store, n=1)

    def work() -> None:
        reader = Store(store.path)
        with pytest.raises((OutputError, PermissionError)):
            if what == "create":
                Store(shared_folder / "b.store", create=True)
            else:
                {"rm": reader.rm, "tag": lambda i: reader.tag("x", i), "rebuild": lambda i: reader.rebuild()}[what](
                    made.id
                )

    as_a_reader(work)
    assert store.verify().damaged == []
    assert [path.name for path in shared_folder.iterdir()] == ["a.store"]


def test_a_store_made_read_only_raises_output_error(store: Store) -> None:
    made = read(store, n=1)
    store._sessions.writable = False
    with pytest.raises(OutputError, match="read-only"):
        store.rm(made[0].id)
    assert store.get("book.txt") == made[0]


# ---- what the record says ----


def test_facts_are_ready_for_json(store: Store) -> None:
    import json

    made = put(store, fake(CHUNK + 1))
    facts = json.loads(json.dumps(made.facts()))
    assert facts["id"] == made.id
    assert facts["leaf"] is True
    assert facts["numerics"] == {"device": "cpu", "threads": 1}
    assert {f.name for f in fields(made)} - {"reader", "text", "inline_extent"} <= set(facts)
    assert facts["kept_text"] is None
    assert facts["size_bytes"] == made.size_bytes
    assert len({made}) == 1


def test_records_hold_nothing_that_is_unpickled(store: Store) -> None:
    source = "".join(path.read_text() for path in Path(store_module.__file__ or "").parent.glob("*.py"))
    assert "import pickle" not in source
    assert "torch.load" not in source


def test_a_pipe_in_the_place_of_a_record_does_not_hang(store: Store) -> None:
    made = put(store, fake(16))
    path = store.path / "records" / made.id[:2] / made.id
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SnapshotError, match="something else"):
        store.get(made.id)


def test_a_huge_file_in_the_place_of_a_record_is_not_read(store: Store) -> None:
    made = put(store, fake(16))
    for path in (
        store.path / "records" / made.id[:2] / made.id,
        made.reader.objects.path(made.objects[0].name),
    ):
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # sparse
    with pytest.raises(SnapshotError, match="at most 65536 bytes"):
        store.get(made.id)
    with pytest.raises(SnapshotError, match="at most"):
        made.state()


def test_children_see_nothing_of_torch_when_listing(library: Store) -> None:
    code = (
        f"import sys\nfrom rwkv_stream.store import Store\nn = len(list(Store({str(library.path)!r}).list()))\n"
        "print(n, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "10 False False\n"


def test_a_failing_child_is_seen(store: Store) -> None:
    assert in_child(lambda: store.get("nothing")) != 0
