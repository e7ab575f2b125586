"""Snapshots at edges of documents: leaves on the way, beside a grid that stays as it is; references that find them."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from made_files import epub
from tiny_models import VERSIONS, official_weights, save

from rwkv_stream.errors import NotFoundError, StoppedError, UsageError
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.kernels import available
from rwkv_stream.model import Model, load
from rwkv_stream.reading.ingest import MOST_EDGES, ReadingProgress, ReadingReport, estimate, ingest
from rwkv_stream.reading.passes import ChainedChunk, HashedText, chained_chunks, forward_chunks
from rwkv_stream.reading.prove import prove
from rwkv_stream.store import Snapshot, Store
from rwkv_stream.text import readers
from rwkv_stream.text.chunker import chunks
from rwkv_stream.text.edges import Edges
from rwkv_stream.text.tokenizer import raw_bytes

T, EVERY = 16, 64
LENGTHS = (40, 90, 16 * 4 - 12, 7, 130, 55)  # of chapters, in bytes beside their titles
WORDS = "the keeper of the old light " * 9
TEXT = "".join(f"\n\nChapter {i}\n\n{WORDS[:n]}" for i, n in enumerate(LENGTHS, 1)).strip()


class Desk:
    """A model, and a folder of files and stores."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder

    def store(self, name: str = "a.store") -> Store:
        return Store(self.folder / name, create=True)

    def read(self, text: str, store: Store, name: str = "book.txt", **options: object) -> ReadingReport:
        path = self.folder / "text"
        path.write_text(text)
        options = {"chunk": T, "snapshot_every": EVERY, **options}
        return ingest(str(path), name=name, model=self.model, store=store, **options)


@pytest.fixture(params=["bytes", "bpe"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(request.getfixturevalue(f"{request.param}_model"), tmp_path)


def lineage(store: Store, ref: str = "book.txt") -> list[Snapshot]:
    return list(store.get(ref).lineage())


def starts() -> list[int]:
    return [TEXT.index(f"Chapter {i}\n") for i in range(1, len(LENGTHS) + 1)]


def test_the_grid_is_what_it_is_without_edges(desk: Desk) -> None:
    """Heads and snapshots of the grid have the same ids; edges have those of readings that end there."""
    plain, edged = desk.store("plain"), desk.store("edged")
    without, report = desk.read(TEXT, plain), desk.read(TEXT, edged, snapshot_at="chapter")
    assert (report.snapshot, report.edges) == (without.snapshot, len(LENGTHS) - 1)
    every = lineage(edged)
    assert [s.id for s in every if not s.edge or s.tokens % EVERY == 0] == [s.id for s in lineage(plain)]
    edges = [s for s in every if s.edge]
    assert [s.bytes for s in reversed(edges)] == starts()[1:]
    for edge in edges:
        alone = desk.read(TEXT, desk.store(f"to {edge.tokens}"), max_tokens=edge.tokens)
        ended = desk.store(f"to {edge.tokens}").get(alone.snapshot)
        differing = {"edge", "parent", "drift", "created", "text", "reader"}
        for field in dataclasses.fields(ended):
            if field.name not in differing:
                assert getattr(ended, field.name) == getattr(edge, field.name), field.name
        assert torch.equal(ended.last_hidden(), edge.last_hidden())
        assert edge.leaf == (edge.tokens % T != 0)
    text = edged.text(every[0])
    assert text is not None and b"".join(text.pieces()).decode() == TEXT
    assert edged.verify(read_data=True).damaged == []


def test_edges_are_addresses(desk: Desk) -> None:
    store = desk.store()
    desk.read(TEXT, store, snapshot_at="chapter")
    for i, byte in list(enumerate(starts(), 1))[1:]:
        line = TEXT[:byte].count("\n") + 1
        for ref in (f"chapter:{i}", f'chapter:"chapter {i}"', f"line:{line}", f"byte:{byte}"):
            found = store.get(f"book.txt@{ref}")
            assert (found.bytes, found.edge) == (byte, True), ref
    assert store.get(f"book.txt@byte:{starts()[4] - 1}").bytes < starts()[4]
    proof = prove(store.get("book.txt@chapter:5"), model=desk.model, store=store)
    assert proof.equal and proof.checked == 1
    assert prove(store.get("book.txt"), model=desk.model, store=store, from_start=True).equal
    with pytest.raises(UsageError, match=r"finding snapshot 'book.txt@chapter:9' in 'book.txt': expected chapter 9"):
        store.get("book.txt@chapter:9")
    with pytest.raises(NotFoundError, match="found the document's first at token"):
        store.get("book.txt@chapter:1")
    with pytest.raises(UsageError, match="expected page 2, found none; what it has is line:"):
        store.get("book.txt@page:2")
    desk.read(TEXT[40:], store, name="untold", keep_text=False)
    with pytest.raises(UsageError, match="expected the text of 'untold' to be kept"):
        store.get("untold@line:2")


def test_times_of_a_log_are_addresses(tmp_path: Path, bytes_model: Model) -> None:
    lines = [f"2026-11-02T{hour:02}:{minute:02}:00 served\n" for hour in (9, 10) for minute in range(0, 60, 10)]
    desk, store = Desk(bytes_model, tmp_path), Store(tmp_path / "s", create=True)
    report = desk.read("".join(lines), store, name="a.log", snapshot_at=r"T\d\d:[03]0")
    assert report.edges == 3
    at = store.get("a.log@time:2026-11-02T10:00")
    assert at.bytes == len("".join(lines[:6])) and at.edge
    assert store.get("a.log@time:2026-11-02T10:05").bytes <= len("".join(lines[:7]))
    with pytest.raises(UsageError, match="found lines from 11-02T09:00:00 to 11-02T10:50:00"):
        store.get("a.log@time:2026-11-03")


def test_chapters_and_pages_of_a_book(tmp_path: Path, bytes_model: Model) -> None:
    names = ("One", "Two", "The Whale")
    body = b"<html><body><p>It was told of the light, again.</p></body></html>"
    data = epub({f"{i}.xhtml": body for i in range(3)}, contents=[(f"{i}.xhtml", t) for i, t in enumerate(names)])
    path, store = tmp_path / "book.epub", Store(tmp_path / "s", create=True)
    path.write_bytes(data)
    report = ingest(path, name="book.epub", model=bytes_model, store=store, chunk=T, snapshot_at="chapter")
    assert report.edges == 2
    whale = store.get('book.epub@chapter:"The Whale"')
    text = store.text(whale)
    assert text is not None and store.get("book.epub@chapter:3").id == whale.id
    assert store.text(store.get("book.epub")).place(whale.bytes) == {"chapter": "The Whale"}  # type: ignore[union-attr]


def test_a_document_keeps_its_edges(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    store = desk.store()
    desk.read(TEXT[:200], store, snapshot_at="chapter")
    grown = desk.read(TEXT, store)
    assert [s.bytes for s in lineage(store) if s.edge] == starts()[:0:-1]
    assert grown.resumed_from_token > 0 and not caplog.records
    assert desk.read(TEXT, store, snapshot_at="chapter").snapshots_written == 0 and not caplog.records
    other = desk.read(TEXT, store, snapshot_at="heading")
    assert other.snapshots_written == 0
    assert "pass --restart" in caplog.text
    assert store.edges("book.txt", desk.model.fingerprint) == "heading"
    desk.read(TEXT, store, restart=True)
    assert store.edges("book.txt", desk.model.fingerprint) == ""


def test_edges_behind_what_another_document_shares(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Readings match snapshots of the grid through those at edges, and go on from them."""
    store = desk.store()
    desk.read(TEXT, store, snapshot_at="chapter")
    other = desk.read(TEXT[:-20] + " and no more", store, name="other")
    plain = desk.read(TEXT[:-20] + " and no more", desk.store("plain"), name="other")
    deepest = max(s.tokens for s in lineage(store) if s.tokens % EVERY == 0 and s.bytes < len(TEXT) - 30)
    assert other.resumed_from_token >= deepest > 0
    assert other.snapshot == plain.snapshot


def test_a_reading_that_is_interrupted_goes_on_with_its_edges(desk: Desk) -> None:
    store, stop = desk.store(), StopRequest()

    def interrupt(progress: ReadingProgress) -> None:
        if progress.tokens > 5 * T:
            stop(signal.SIGTERM, None)

    with pytest.raises(StoppedError):
        desk.read(TEXT, store, snapshot_at="chapter", on_progress=interrupt, stop=stop)
    assert store.get("book.txt").tokens % T == 0
    desk.read(TEXT, store)
    assert [s.bytes for s in lineage(store) if s.edge] == starts()[:0:-1]


def test_an_estimate_counts_them(desk: Desk) -> None:
    path = desk.folder / "text"
    path.write_text(TEXT)
    options = {"chunk": T, "snapshot_every": EVERY, "snapshot_at": "chapter"}
    plan = estimate(str(path), name="book.txt", model=desk.model, store=desk.store(), **options)
    assert plan.snapshots == desk.read(TEXT, desk.store(), snapshot_at="chapter").snapshots_written


def test_what_has_no_such_edges_is_told(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    assert desk.read(TEXT, desk.store(), snapshot_at="page").edges == 0
    assert "expected to keep a snapshot at each page, found none" in caplog.text
    with pytest.raises(UsageError, match="regular expression, found '\\('"):
        desk.read(TEXT, desk.store(), snapshot_at="(")


# ---- how they are computed ----


@pytest.mark.parametrize("limit", range(20, 40))
def test_edges_do_not_depend_on_how_the_text_arrives(limit: int) -> None:
    """Nor do those of a reading that ends in the midst of a heading."""
    data, seen = b"the keeper\n\n# One\n\nof lights\n\n# Two\n\nand more of it", []
    for size in (1, 3, len(data)):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        with readers.document(__file__).text() as plain:  # only that it has lines is asked of it
            edges = Edges("heading", plain)
        hashed = HashedText(edges.pieces(pieces))
        cut = [*chained_chunks(hashed, raw_bytes(), 8, max_tokens=limit, edges=edges)]
        seen.append([(len(item.chunk.ids), [len(one.chunk.ids) for one in item.edges], item.at_edge) for item in cut])
    assert seen[0] == seen[1] == seen[2]
    ends = [8 * i + n for i, (_, within, _) in enumerate(seen[0]) for n in within]
    ends += [8 * i + n for i, (n, _, at_edge) in enumerate(seen[0]) if at_edge]
    assert sorted(ends) == [edge for edge in (12, 30) if edge <= limit]


@pytest.mark.skipif(available()["cpu"] is not None, reason="the native kernels are not built")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_chunk_that_is_read_in_pieces_has_the_bits_of_one_that_is_not(version: str, tmp_path: Path) -> None:
    model = load(save(official_weights(version=version), tmp_path / "m.safetensors"), device="cpu")
    assert model.keeps_bits_in_pieces
    (chunk,) = chunks(model.tokenizer.stream([TEXT.encode()[:100]]), 200)
    ends = (1, 2, 19, 64, 65, 99)
    pieces = ChainedChunk(chunk, b"", "", tuple(ChainedChunk(chunk.first(n), b"", "") for n in ends))
    *parts, whole = forward_chunks(model, [pieces], model.start()[1])
    for n, part in zip((*ends, 100), (*parts, whole), strict=True):
        alone = next(forward_chunks(model, [ChainedChunk(chunk.first(n), b"", "")], model.start()[1]))
        assert part.state.digest() == alone.state.digest(), n
        assert torch.equal(part.hidden, alone.hidden)


def test_elsewhere_what_comes_before_an_edge_is_read_once_more(
    tmp_path: Path, bytes_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(bytes_model_path, device="cpu", backend="reference")
    assert not model.keeps_bits_in_pieces
    text = "".join(f"{i}\n" for i in range(100, 130))
    desk = Desk(model, tmp_path)
    options = {"chunk": 64, "snapshot_every": 64}
    plain = desk.read(text, desk.store("plain"), **options)
    report = desk.read(text, desk.store("edged"), snapshot_at=r"\d", **options)
    assert report.snapshot == plain.snapshot
    assert report.edges == MOST_EDGES + MOST_EDGES + 1, "in two chunks, and where they meet"
    assert f"{29 - report.edges} snapshots at a line like '\\d' are left out" in caplog.text
    for edge in (s for s in lineage(desk.store("edged")) if s.edge and s.tokens < 64):
        assert desk.read(text, desk.store(f"{edge.tokens}"), max_tokens=edge.tokens, **options).snapshot == edge.id
