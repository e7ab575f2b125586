"""docs/store-format.md describes the format, once: magics, versions, fields and names are those that are written."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import msgpack
from fake_snapshots import library

from rwkv_stream.store import cache, objects, sealed, texts
from rwkv_stream.store.layout import StoreFiles, files
from rwkv_stream.store.records import Head, Snapshot, Tag

PAGE = (Path(__file__).parents[2] / "docs" / "store-format.md").read_text(encoding="utf8")
OF_DATA = {
    cache.CACHED: cache.CACHED_VERSION,
    objects.OBJECT: objects.OBJECT_VERSION,
    texts.TEXT: texts.TEXT_VERSION,
    texts.POSTINGS: texts.POSTINGS_VERSION,
}
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


def words(text: str) -> list[str]:
    """What stands in backticks outside of parentheses."""
    return [word for word in re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", text)) if "[" not in word]


def test_magics_and_versions() -> None:
    told = {row[1].strip("`").encode(): int(row[2]) for row in ROWS if len(row) == 3 and row[1].startswith("`rwkv-")}
    assert told == sealed.VERSIONS | OF_DATA
    assert PAGE.startswith(f"# The format of a store, version {sealed.VERSION}\n")
    since = [int(row[0]) for row in ROWS if len(row) == 3 and row[0].isdigit() and row[1].count(".") == 2]
    assert since == list(range(1, sealed.VERSION + 1)), "each version of a store has its row"


def test_fields() -> None:
    told = {
        kind: {word for row in ROWS if row[0].startswith(kind) for word in words(row[-1])}
        for kind in ("record", "head", "tag")
    }
    names = {kind: {f.name for f in fields(of)} for kind, of in (("record", Snapshot), ("head", Head), ("tag", Tag))}
    assert told["record"] - {"rwkv-rec"} == names["record"] - {"id", "reader"}
    assert told["head"] - {"rwkv-hed"} == names["head"]
    assert told["tag"] - {"rwkv-tag"} == names["tag"]


def test_what_is_written_has_them(tmp_path: Path) -> None:
    store = StoreFiles(library(tmp_path / "a.store").path)
    for magic, path in (
        (sealed.FORMAT, store.format),
        (sealed.RECORD, next(files(store.records))),
        (sealed.HEAD, next(files(store.heads))),
        (sealed.TAG, next(files(store.tags))),
        (objects.OBJECT, next(files(store.objects.folder))),
        (texts.TEXT, next(files(store.texts.folder))),
        (texts.POSTINGS, next(files(store.texts.postings_folder))),
    ):
        data = path.read_bytes()
        version = (sealed.VERSIONS | OF_DATA)[magic]
        assert (data[:8], int.from_bytes(data[8:12], "little")) == (magic, version)
    record = msgpack.unpackb(next(files(store.records)).read_bytes()[12:-32])
    assert record.keys() == {f.name for f in fields(Snapshot)} - {"id", "reader"}


def test_an_extent_has_them(tmp_path: Path) -> None:
    store = StoreFiles(library(tmp_path / "a.store").path)
    data = next(files(store.texts.folder)).read_bytes()
    header = msgpack.unpackb(data[16 : 16 + int.from_bytes(data[12:16], "little")])
    [told] = [words(row[1]) for row in ROWS if row[1].startswith("header, a msgpack map: `previous`")]
    assert {*told} == header.keys()


def test_files_and_when_they_change(tmp_path: Path) -> None:
    """`format` is replaced by the first writer of a newer version: test_store_upkeep sees it do so."""
    [row] = [row for row in ROWS if row[0] == "`format`" and "map" in row[1]]
    assert row[2] == "replaced by the first writer of a newer version"
    told = {
        word.partition("/")[0]
        for row in ROWS
        for word in words(row[0])
        if "rwkv" not in row[1] or "small file" in row[1]
    }
    assert StoreFiles(tmp_path).own_names() <= told
