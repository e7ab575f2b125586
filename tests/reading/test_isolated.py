"""States of chunks, each read by itself, and instructions before a document: what they have read, and how they stay."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from program import program

import rwkv_stream as rs
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.reading import isolated
from rwkv_stream.reading.isolated import cost, holds, keep_chunk_states

TEXT = "".join(f"The keeper of tower {i} lit lamp {i * 7 % 13}, and the sea was calm. " for i in range(12))
SIZE = 100


@pytest.fixture
def store(tmp_path: Path) -> rs.Store:
    return rs.Store(tmp_path / "store", create=True)


def read(store: rs.Store, model: Model, text: str = TEXT, name: str = "book.txt", **options: object) -> rs.Snapshot:
    path = store.path.with_name(name)
    path.write_text(text)
    report = rs.ingest(path, name=name, model=model, store=store, chunk=64, snapshot_every=128, **options)
    return store.get(report.snapshot)


def test_each_state_has_read_its_chunk_and_nothing_else(
    store: rs.Store, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = read(store, bytes_model)
    n = -(-snapshot.tokens // SIZE)
    assert (cost(snapshot.tokens, bytes_model, SIZE).states, n > 4) == (n, True)
    rows, forward = list[int](), Model.forward

    def counted(model: Model, ids: torch.Tensor, *args: Any, **more: Any) -> Any:
        rows.append(len(ids))
        return forward(model, ids, *args, **more)

    monkeypatch.setattr(Model, "forward", counted)
    report = keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE)
    assert (report.states, report.made, report.removed) == (n, n, 0)
    assert max(rows) <= isolated.ROWS and len(rows) < n
    states = list(store.chunk_states(snapshot))
    edges = [(one.anchor_byte, one.bytes) for one in states]
    assert [end for _, end in edges[:-1]] == [begin for begin, _ in edges[1:]] and edges[-1][1] == snapshot.bytes
    text = store.text(snapshot)
    assert text is not None
    for one, (begin, end) in zip(states, edges, strict=True):
        ids = torch.tensor([bytes_model.tokenizer.encode(TEXT[begin:end])])
        hidden, state = forward(bytes_model, ids, bytes_model.start()[1], logits="none")
        assert one.state().digest() == state.digest() and torch.equal(one.last_hidden(), hidden[0, -1])
        assert holds(one, text) and (one.leaf, one.parent, one.tokens) == (True, None, ids.shape[1])


def test_a_short_text_is_one_chunk(store: rs.Store, bytes_model: Model) -> None:
    snapshot = read(store, bytes_model, "Nobody came. ")
    assert keep_chunk_states(snapshot, model=bytes_model, store=store).states == 1
    (one,) = store.chunk_states(snapshot)
    assert (one.anchor_byte, one.bytes, one.id == snapshot.id) == (0, snapshot.bytes, False)


def test_those_that_hold_stay_and_those_of_another_text_go(store: rs.Store, bytes_model: Model) -> None:
    keep_chunk_states(read(store, bytes_model), model=bytes_model, store=store, size=SIZE)
    snapshot = store.get("book.txt")
    before = {one.id for one in store.chunk_states(snapshot)}
    assert keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE).made == 0
    grown = read(store, bytes_model, TEXT + "Then the ship came. " * 10)
    report = keep_chunk_states(grown, model=bytes_model, store=store, size=SIZE)
    after = {one.id for one in store.chunk_states(grown)}
    assert (report.removed, len(before - after), report.made) == (
        1,
        1,
        len(after - before),
    )  # the last, which was short
    edited = read(store, bytes_model, TEXT.replace("tower 3", "tower x"))
    text = store.text(edited)
    assert text is not None
    n_whole = sum(holds(one, text) for one in store.chunk_states(edited))
    assert 0 < n_whole < len(before)
    report = keep_chunk_states(edited, model=bytes_model, store=store, size=SIZE)
    assert all(holds(one, text) for one in store.chunk_states(edited)) and report.made == report.states - n_whole


def test_a_shorter_reading_leaves_those_behind_it(store: rs.Store, bytes_model: Model) -> None:
    snapshot = read(store, bytes_model)
    n = keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE).states
    assert keep_chunk_states(store.get("book.txt@256"), model=bytes_model, store=store, size=SIZE).removed == 0
    assert len(list(store.chunk_states(snapshot))) == n + 1  # its last one is short
    shorter = read(store, bytes_model, TEXT[:250])
    assert keep_chunk_states(shorter, model=bytes_model, store=store, size=SIZE).removed == n - 1
    assert [one.bytes for one in store.chunk_states(shorter)] == [100, 200, 250]


def test_equal_chunks_and_documents_have_states_of_their_own(store: rs.Store, bytes_model: Model) -> None:
    text = ("x" * 99 + "\n") * 3
    first, second = (read(store, bytes_model, text + tail, name) for name, tail in (("a.txt", "A"), ("b.txt", "B")))
    for snapshot in (first, second):
        assert keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE).states == 4
    assert len({one.id for one in [*store.chunk_states(first), *store.chunk_states(second)]}) == 8


def test_readings_go_on_as_if_there_were_none(store: rs.Store, bytes_model: Model) -> None:
    keep_chunk_states(read(store, bytes_model), model=bytes_model, store=store, size=64)
    known = store.get("book.txt")
    assert store.reach(known.model, known.start_digest, None, 100) is None  # the first snapshot is at token 128
    other = read(store, bytes_model, TEXT[:64] + "Another story. ", "other.txt")
    assert other.parent is None and other.start is None
    assert {entry.how for entry in store.family()} == {"ingest"} == {entry.how for entry in store.list()}
    assert {entry.how for entry in store.list(chunk_states=True)} == {"ingest", "cells"}
    assert {entry.how for entry in store.family("book.txt")} == {"ingest"}


def test_they_go_with_the_readings_of_their_document(store: rs.Store, bytes_model: Model) -> None:
    snapshot = read(store, bytes_model)
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE)
    n = len(list(store.chunk_states(snapshot)))
    assert store.verify(read_data=True).damaged == []
    store.prune()
    assert len(list(store.chunk_states(snapshot))) == n
    one = next(store.chunk_states(snapshot))
    store.rm(one.id)
    assert store.prune().snapshots == 1 and len(list(store.chunk_states(snapshot))) == n - 1
    for entry in list(store.list("book.txt")):
        store.rm(entry.id)
    assert store.prune().objects >= n - 1
    assert list(store.chunk_states(snapshot)) == [] and store.verify(read_data=True).damaged == []


def test_a_damaged_one_is_found(store: rs.Store, bytes_model: Model) -> None:
    snapshot = read(store, bytes_model)
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE)
    (stored,) = next(store.chunk_states(snapshot)).objects
    path = next(store.path.glob(f"objects/*/{stored.name}"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert [stored.name in damage.path for damage in store.verify(read_data=True).damaged] == [True]


def test_an_export_takes_them_along(store: rs.Store, tmp_path: Path, bytes_model: Model) -> None:
    snapshot = read(store, bytes_model)
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE)
    there = {one.id for one in store.chunk_states(snapshot)}
    for refs, only, expected in (
        (["book.txt"], False, there),
        (["book.txt"], True, set()),
        (["book.txt@128"], False, {one.id for one in store.chunk_states(snapshot) if one.bytes <= 128}),
    ):
        file = io.BytesIO()
        store.export(refs, file, only=only)
        other = rs.Store(tmp_path / f"{only}{len(expected)}", create=True)
        file.seek(0)
        other.import_(file)
        assert {one.id for one in other.chunk_states(snapshot)} == expected
        other.prune()
        assert {one.id for one in other.chunk_states(snapshot)} == expected and other.verify(
            read_data=True
        ).damaged == []


def test_without_a_kept_text_there_are_none(store: rs.Store, bytes_model: Model) -> None:
    with pytest.raises(InputError, match="expected its text in the store, found none"):
        keep_chunk_states(read(store, bytes_model, keep_text=False), model=bytes_model, store=store)


def test_an_instruction_is_what_a_document_starts_from(store: rs.Store, bytes_model: Model) -> None:
    told = "Of the letter below, find who wrote it."
    snapshot = read(store, bytes_model, instruction=f"  {told}\n")
    ids = [*bytes_model.tokenizer.encode(f"{told}\n\n"), *bytes_model.tokenizer.encode(TEXT)]
    _, state = bytes_model.forward(torch.tensor([ids]), bytes_model.start()[1])
    assert snapshot.state().digest() == state.digest() and snapshot.bytes == len(TEXT)
    (start,) = snapshot.starts()
    text = store.text(start)
    assert (start.how, start.document, text and b"".join(text.pieces())) == (
        "instruction",
        f"instruction: {told}",
        f"{told}\n\n".encode(),
    )
    assert read(store, bytes_model, instruction=told).id == snapshot.id == read(store, bytes_model).id
    with pytest.raises(UsageError, match="found another start"):
        read(store, bytes_model, instruction="Something else.")
    keep_chunk_states(snapshot, model=bytes_model, store=store, size=SIZE)
    one = list(store.chunk_states(snapshot))[1]
    ids = [
        *bytes_model.tokenizer.encode(f"{told}\n\n"),
        *bytes_model.tokenizer.encode(TEXT[one.anchor_byte : one.bytes]),
    ]
    _, state = bytes_model.forward(torch.tensor([ids]), bytes_model.start()[1])
    assert one.state().digest() == state.digest()
    store.prune()
    assert store.get(start.id) == start and store.verify(read_data=True).damaged == []
    (found,) = rs.quote("Who wrote the letter?", snapshot=snapshot, store=store)
    assert all(source.document == "book.txt" for source in found.sources)  # an instruction is no document
    with pytest.raises(UsageError, match="found both"):
        rs.Reading(instruction="x", from_snapshot="book.txt")
    with pytest.raises(UsageError, match="expected some text"):
        read(store, bytes_model, name="c.txt", instruction=" ")


def test_from_the_program(program_folder: Path) -> None:
    Path("book.txt").write_text(TEXT)
    options = ("book.txt", "--chunk", 64, "--snapshot-every", 128, "--instruction", "Find the lamp.", "--cells")
    planned = json.loads(program("ingest", *options, "--dry-run", "--json").out)
    assert planned["chunk_states"]["states"] == 1 and planned["chunk_states"]["bytes"] > 0
    assert "1 state of chunks of 2,000 tokens, at most" in program("ingest", *options, "--dry-run").out
    assert not Path("store").exists()
    ended = program("ingest", *options)
    said = ended.err.index("1 state of chunks"), ended.err.index("1 chunk state, 1 of them new")
    assert ended.code == 0 and said[0] < said[1]
    again = json.loads(program("ingest", *options, "--json").out)
    assert again["chunk_states"] == {"states": 1, "made": 0, "removed": 0, "bytes": 0}
    assert json.loads(program("ingest", *options, "--dry-run", "--json").out)["resumed_from_token"] == again["tokens"]
    rows = [json.loads(line) for line in program("snapshots", "list", "--json", "--all").out.splitlines()]
    assert sorted({row["how"] for row in rows}) == ["cells", "ingest", "instruction"]
    assert "cells" not in program("snapshots", "list", "--json").out
    (chunk,) = (row for row in rows if row["how"] == "cells")
    shown = json.loads(program("snapshots", "show", chunk["id"], "--json").out)
    assert shown["text"] == {"from_token": 0, "to_token": again["tokens"], "from_byte": 0, "to_byte": len(TEXT)}
    assert program("snapshots", "rm", "--cells", "book.txt").out.split() == [chunk["id"]]
    assert [row for row in program("snapshots", "list", "--all", "--json").out.splitlines() if "cells" in row] == []
    assert program("ingest", "book.txt", "--cells", "--no-text").code == 2
