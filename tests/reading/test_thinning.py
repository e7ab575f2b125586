"""Readings that thin their past as they go on: what stays, that they go on, and that what stays can be proved."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from program import program

from rwkv_stream.errors import OutputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.reading import resume
from rwkv_stream.reading.ingest import ReadingReport, ingest
from rwkv_stream.reading.prove import prove
from rwkv_stream.store import Store
from rwkv_stream.store.retention import need

T = 16


def text(n: int) -> str:
    rng = random.Random(5)
    words = "the keeper of an old light walked over stone bridges toward gulls".split()  # noqa: SIM905
    return "".join(rng.choice(words) + rng.choice([" ", ".\n", "\n\n# Part\n\n"]) for _ in range(n))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


def read(told: str, store: Store, model: Model, **options: object) -> ReadingReport:
    path = store.path.parent / "book.txt"
    path.write_text(told)
    return ingest(path, name="book.txt", model=model, store=store, chunk=T, snapshot_every=T, **options)


def held(store: Store) -> list[int]:
    return sorted(entry.tokens for entry in store.list("book.txt"))


def test_a_reading_is_thinned_as_it_goes_on(store: Store, bytes_model: Model, tmp_path: Path) -> None:
    told = text(250)
    read(told[:700], store, bytes_model, keep=4)
    grown = read(told, store, bytes_model, keep=4)
    last = len(told)
    on = last // T * T
    # that from which it can go on stays, too; the end of the shorter reading does not
    assert held(store) == sorted({at for at in range(T, on, T) if need(at, last) <= 4} | {on, last})
    assert grown.resumed_from_token == 700 // T * T
    whole = Store(tmp_path / "whole", create=True)
    assert read(told, whole, bytes_model).snapshot == grown.snapshot, "the same ids"
    everywhere = {entry.tokens: entry.id for entry in whole.list()}
    assert {entry.tokens: entry.id for entry in store.list()}.items() <= everywhere.items()
    lineage = [one.id for one in store._files.ancestors(store.get("book.txt"))]
    assert lineage == [one.id for one in whole.get("book.txt").ancestors()]
    for at in held(store):
        proof = prove(store.get(f"book.txt@{at}"), model=bytes_model, store=store)
        assert proof.equal and proof.to_token == at
    assert prove(store.get("book.txt"), model=bytes_model, store=store, from_start=True).checked == len(held(store)) - (
        last % T == 0
    )
    edited = told[:900] + "~" + told[901:]
    resumed = read(edited, store, bytes_model, keep=4)
    assert resumed.resumed_from_token == max(at for at in everywhere if at <= 900 - T and need(at, last) <= 4)
    assert store.verify(read_data=True).damaged == []
    assert store.prune().objects >= 0 and read(edited, store, bytes_model).snapshots_written == 0


def test_a_stream_goes_on_behind_the_holes_of_a_thinned_past(
    store: Store, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read twice is compared snapshot by snapshot, from its start."""
    told = text(300)

    def pipe(n: int) -> ReadingReport:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(told[:n].encode())))
        rest: dict[str, Any] = {"chunk": T, "snapshot_every": T, "keep": 1}
        return ingest("-", name="book.txt", model=bytes_model, store=store, **rest)

    pipe(1400)
    assert held(store)[0] == 1024, "the first hole is the largest"
    assert pipe(1500).resumed_from_token == 1392
    monkeypatch.setattr(resume, "SEARCH_TOKENS", 1000)
    assert pipe(1600).resumed_from_token == 0, "beyond what is held nothing is found"


def test_edges_and_tags_stay(store: Store, bytes_model: Model) -> None:
    told = text(200)
    edges = [at for at in range(1, len(told)) if told.startswith("# Part", at) and told[at - 2 : at] == "\n\n"]
    read(told[:300], store, bytes_model)
    tagged = store.get("book.txt@96")
    store.tag("here", tagged.id)
    report = read(told, store, bytes_model, keep=1, snapshot_at="heading")
    assert report.edges > 3
    at_edges = {entry.tokens for entry in store.list() if entry.edge}
    assert at_edges <= set(edges) and len(at_edges) == report.edges
    assert tagged.tokens in held(store) and 112 not in held(store)


def test_a_reading_keeps_to_the_size_of_its_store(store: Store, bytes_model: Model) -> None:
    told = text(400)
    limit, most = 40 * 65_000, 0
    state = 65_000

    def look(_: object) -> None:
        nonlocal most
        most = max(most, store._files.size_bytes())

    read(told, store, bytes_model, max_store_size=limit, on_progress=look)
    assert limit - 3 * state < most <= limit + state, "the room is used, and no more than one snapshot over it"
    assert len(held(store)) < len(told) // T
    holes = [b - a for a, b in itertools.pairwise([0, *held(store)])]
    assert max(holes) <= len(told) / 4
    assert store.verify(read_data=True).damaged == []
    read(told + " and more", store, bytes_model, max_store_size=limit)


def test_what_does_not_fit_is_said_before_it_is_written(store: Store, bytes_model: Model) -> None:
    read(text(60), store, bytes_model)
    before, size = held(store), store._files.size_bytes()
    told = r"--max-store-size, 100,000 bytes, found [\d,]+ bytes that must stay beside [\d,]+ for what"
    with pytest.raises(OutputError, match=told):
        read(text(400), store, bytes_model, max_store_size=100_000)
    assert (held(store), store._files.size_bytes()) == (before, size)
    for wrong in ({"keep": 0}, {"max_store_size": 0}):
        with pytest.raises(UsageError, match="thinning snapshots: expected"):
            read(text(60), store, bytes_model, **wrong)


def test_by_the_program(program_folder: Path) -> None:
    Path("book.txt").write_text(text(200))
    options = ("--chunk", T, "--snapshot-every", T)
    assert program("ingest", "book.txt", *options).code == 0
    would = program("snapshots", "prune", "--keep", 4, "--dry-run")
    assert would.code == 0 and "book.txt: " in would.out and "would go" in would.out and "at the most" in would.out
    told = json.loads(program("snapshots", "prune", "--keep", 4, "--dry-run", "--json").out)
    done = json.loads(program("snapshots", "prune", "--keep", 4, "--json").out)
    assert (told["thinned"], told["objects"]) == (done["thinned"], done["objects"]) and done["objects"] > 10
    assert program("snapshots", "verify", "--read-data").code == 0
    refused = program("snapshots", "prune", "--max-store-size", "100kB")
    assert refused.code == 1 and "bytes that must stay" in refused.err
    Path("book.txt").write_text(text(300))
    stopped = program("ingest", "book.txt", *options, "--max-store-size", "100kB")
    assert stopped.code == 1 and "reading 'book.txt' at token" in stopped.err
    assert program("ingest", "book.txt", *options, "--keep", 4).code == 0
    aged = program("snapshots", "recode", "--codec", "int8", "--older-than", "1d")
    assert aged.code == 0 and aged.out.startswith("0 states now kept as int8")
    aged = program("snapshots", "recode", "--codec", "int8", "--older-than", "2100-01-01", "--dry-run")
    assert aged.code == 0 and not aged.out.startswith("0 states")
    wrong = program("snapshots", "recode", "--codec", "int8", "--older-than", "soon")
    assert wrong.code == 2 and "expected an age such as 30d" in wrong.err
