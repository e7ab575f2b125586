"""Stores made by each version of the program, as its writers left them: they open for ever and say what they said.

`golden/v1.json` says what the store in `golden/v1` says. Each was made once, by the first commit that wrote its
version (v1: c1b629d): `fake_snapshots.library`, then the third snapshot of book.txt removed; since v2 with surprise
recorded of book.txt, since v3 with a head that has a chunk of its own, since v4 with the text of both documents, since
v5 with a head that follows files, book.txt at edges, which its head names, with norms and drift, and a short text
whose state is not kept. They never change; a new version of the format adds its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fake_snapshots import MODEL, fake_hidden, fake_state, library, short, told

from rwkv_stream.store import Store, sealed

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
CATALOGS = ["its catalog", "no catalog", "an empty catalog"]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def expected(version: str) -> Any:
    return json.loads((GOLDEN / f"{version}.json").read_text())


@pytest.fixture
def said(expected: Any) -> Any:
    """Snapshots, heads, tags and texts."""
    return {name: expected.get(name, {}) for name in ("snapshots", "heads", "tags", "texts")}


@pytest.fixture
def path(version: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / version, tmp_path / "a.store"))


def set_catalog(path: Path, catalog: str) -> None:
    if catalog != "its catalog":
        (path / "catalog.sqlite").unlink()
    if catalog == "an empty catalog":
        sqlite3.connect(path / "catalog.sqlite").close()


def only_for_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, bytes]:
    """Let the store seem one that this user may not write to, be that root; its files."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda name, mode: not mode & os.W_OK and real(name, mode))
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_there_is_a_store_of_each_version() -> None:
    assert {int(version[1:]) for version in VERSIONS} == set(range(1, sealed.VERSION + 1))


@pytest.mark.parametrize("catalog", CATALOGS)
def test_it_says_what_it_said(path: Path, said: Any, catalog: str) -> None:
    set_catalog(path, catalog)
    store = Store(path)
    assert told(store) == said
    assert store.verify(read_data=True).damaged == []


@pytest.mark.parametrize("catalog", CATALOGS)
def test_it_may_only_be_read(path: Path, said: Any, catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_catalog(path, catalog)
    before = only_for_reading(path, monkeypatch)
    store = Store(path)
    assert not store.writable
    assert told(store) == said
    assert store.verify(read_data=True).damaged == [], "an older or empty catalog is none yet"
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_without_its_locks_and_empty_folders(path: Path, said: Any) -> None:
    """As a tool that copies files alone leaves it."""
    for name in said["tags"]:
        Store(path).untag(name)
    (path / "refs" / "tags").rmdir()
    shutil.rmtree(path / "locks")
    store = Store(path)
    assert told(store) == said | {"tags": {}}
    assert store.verify(read_data=True).damaged == []
    for name, snapshot in said["tags"].items():
        store.tag(name, snapshot)
    assert told(store) == said


def test_the_states_are_those_that_were_put_in(path: Path) -> None:
    for listed in Store(path).list():
        snapshot = Store(path).get(listed.id)
        if not snapshot.keeps_state:
            assert snapshot.document == "note.txt"
            continue
        seed = int(snapshot.chain[:8], 16)
        assert snapshot.state().digest() == fake_state(seed).digest()
        assert snapshot.last_hidden().equal(fake_hidden(seed))


def test_surprise_is_known_where_it_was_recorded(path: Path, expected: Any) -> None:
    store = Store(path)
    found = {identity: store.get(identity) for identity in expected["sampled"]}
    assert {i: [s.sampled_bits, s.sampled_tokens] for i, s in found.items()} == expected["sampled"]


def test_health_is_known_where_it_was_recorded(path: Path, expected: Any) -> None:
    store = Store(path)
    of_all = {listed.id: store.get(listed.id) for listed in store.list()}
    none: Any = {identity: [{}, {}] for identity in of_all}
    assert {i: [s.norms, s.drift] for i, s in of_all.items()} == expected.get("health", none)


def test_a_document_keeps_its_chunk(path: Path, expected: Any) -> None:
    heads = {document: Store(path).head(document, MODEL) for document in expected["chunks"]}
    assert {document: head.chunk for document, head in heads.items() if head is not None} == expected["chunks"]


def test_a_document_keeps_its_place_in_the_files_that_it_follows(path: Path, expected: Any) -> None:
    store = Store(path)
    marks = {document: store.mark(document, MODEL) for document, _, _ in store.heads()}
    assert {document: mark for document, mark in marks.items() if mark is not None} == expected.get("marks", {})


def test_edges_are_known_where_they_were_recorded(path: Path, expected: Any, said: Any) -> None:
    store = Store(path)
    edges = {document: store.edges(document, MODEL) for document in ("book.txt", "notes/other.log")}
    assert edges == expected.get("edges", dict.fromkeys(edges, ""))
    assert sorted(i for i in said["snapshots"] if store.get(i).edge) == expected.get("at_edges", [])


def test_text_is_kept_where_there_was_some(path: Path, version: str, said: Any) -> None:
    store = Store(path)
    for document in ("book.txt", "notes/other.log"):
        assert (store.text(store.get(document)) is not None) == (version >= "v4")
    assert store.text(store.get("a fork")) is None
    if version >= "v5":
        note = store.text(store.get("note.txt"))
        assert note is not None and sum(map(len, note.postings())) > 0
    store.verify()  # makes the postings of an older version of terms again
    assert store.verify().indexed == 0


def test_references(path: Path, said: Any) -> None:
    store = Store(path)
    of_book = {tokens: i for i, (document, tokens, *_) in said["snapshots"].items() if document == "book.txt"}
    for ref, tokens in (("book.txt", 64), ("book.txt~1", 32), ("book.txt@50%", 32), ("book.txt@31", 16), ("half", 32)):
        assert store.get(ref).id == of_book[tokens]
    assert store.get("other.log").tokens == 32
    assert store.get("a fork").start == of_book[32]
    head = store.head("book.txt", MODEL)
    assert head is not None and head.id == of_book[64]


def test_it_is_written_to_and_goes_on(path: Path, said: Any, tmp_path: Path) -> None:
    short(library(path))
    store, anew = Store(path), library(tmp_path / "anew.store")
    short(anew)
    assert told(store) == told(anew), "with what had been removed"
    assert store.verify(read_data=True).damaged == []
    assert store._files.check_format() == sealed.VERSION


def test_prune_repair_and_rebuild(path: Path, said: Any) -> None:
    store = Store(path)
    assert store.prune().snapshots == 0
    assert store.rebuild() == len(said["snapshots"]) + 1, "and the one that was removed"
    repaired = Store.repair(path)
    assert (repaired.restored, repaired.quarantined, repaired.lost) == ([], [], [])
    assert told(Store(path)) == said
