"""Search: exact against a plain sort, the query made as the rows were, other tables refused, the text around hits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from program import program

import rwkv_stream as rs
from rwkv_stream.cli.search import _line
from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.store import Store
from rwkv_stream.tables.columns import embedding
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.tables.search import Hit, Vectors
from rwkv_stream.tables.surroundings import surroundings
from rwkv_stream.tables.whitening import SUFFIX, Whitening
from rwkv_stream.text.readers import documents

TEXTS = {
    "keeper.txt": "The keeper lit the lamp. The sea was calm. Gulls cried over the stone bridge.\n",
    "log.txt": "Error: disk full on host 7. The job was killed. It ran again at noon.\n",
    "same.txt": "The keeper lit the lamp.",
    "café.txt": "Ein Café am Meer, früh am Morgen. Die Möwen schreien laut.\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    for name, text in TEXTS.items():
        Path(name).write_text(text)
    return tmp_path


def table(path: Path, model: Model, names: Sequence[str] = tuple(TEXTS), **options: object) -> pa.Table:
    """Embed files and write them as the program does, in row groups of 3."""
    batches = rows(documents(names), model=model, **{"units": ("sentence", "document"), **options})  # type: ignore[arg-type]
    made = pa.Table.from_batches(list(batches), batches.schema).replace_schema_metadata(dict(batches.metadata))
    path.parent.mkdir(exist_ok=True)
    pq.write_table(made, path, row_group_size=3)
    return made


def random_table(path: Path, vectors: np.ndarray, like: pa.Table) -> None:  # type: ignore[type-arg]
    """A table with these vectors [n, D]; row i is of document str(i)."""
    n = len(vectors)
    words = ("document", "unit", "text", "excerpt", "embedding")
    columns = {name: [0] * n for name in like.schema.names if name not in words} | {"excerpt": [None] * n}
    columns |= {"document": [str(i) for i in range(n)], "unit": ["sentence"] * n, "text": ["x"] * n}  # type: ignore[dict-item]
    at = like.schema.get_field_index("embedding")
    flat = pa.array(vectors.ravel(), pa.float32())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    field = like.schema.field(at).with_type(columns["embedding"].type)  # type: ignore[attr-defined]
    pq.write_table(pa.table(columns, schema=like.schema.set(at, field)), path, row_group_size=100)


def test_a_text_finds_itself_first_and_of_equals_the_first(folder: Path, bytes_model: Model) -> None:
    made = table(folder / "all.parquet", bytes_model).filter(pc.field("document") == "same.txt")
    vectors = Vectors(folder / "all.parquet")
    query = vectors.embed(TEXTS["same.txt"], bytes_model)
    assert [row.tobytes() for row in embedding(made)] == [query.tobytes()] * 2
    hits = vectors.nearest(query, k=4)
    # Alone in its document or as the first sentence of one, as a sentence and as a document: the same vector.
    assert [(hit.document, hit.unit) for hit in hits[:3]] == [
        ("keeper.txt", "sentence"),
        ("same.txt", "sentence"),
        ("same.txt", "document"),
    ]
    assert hits[0].score == hits[1].score == hits[2].score == pytest.approx(1, abs=1e-6)
    assert hits[3].score < hits[2].score
    assert [hit.rank for hit in hits] == [1, 2, 3, 4]


def test_hits_are_those_of_a_sort_for_every_k(
    folder: Path, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = table(folder / "like.parquet", bytes_model, ["log.txt"])
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((997, 64)).astype(np.float32)
    vectors[[500, 3, 700]] = vectors[40]  # equals, in several blocks and row groups
    random_table(folder / "random.parquet", vectors, like)
    monkeypatch.setattr("rwkv_stream.tables.vector_table.BLOCK_BYTES", 17 * 4 * 64)  # of 17 rows
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit[40]
    opened = Vectors("random.parquet")
    for k in (1, 2, 4, 50, 997, 2000):
        hits = opened.nearest(vectors[40], k=k)
        order = np.lexsort((np.arange(997), -cosines.round(9)))[:k]
        assert [hit.document for hit in hits] == [str(i) for i in order]
        np.testing.assert_allclose([hit.score for hit in hits], cosines[order], atol=1e-9)
    assert [hit.document for hit in opened.nearest(vectors[40], k=4)] == ["3", "40", "500", "700"]


def test_from_python_by_words_or_a_vector(folder: Path, bytes_model: Model) -> None:
    table(folder / "all.parquet", bytes_model)
    hits = rs.search("gulls", "all.parquet", model=bytes_model, k=3, unit="sentence")
    vectors = Vectors("all.parquet")
    query = vectors.embed("gulls", bytes_model)
    assert hits == rs.search(query, "all.parquet", k=3, unit="sentence") == vectors.nearest(query, k=3, unit="sentence")
    assert [(hit.rank, hit.unit, hit.search) for hit in hits] == [(rank, "sentence", "exact") for rank in (1, 2, 3)]
    with pytest.raises(UsageError, match="a query in words needs"):
        rs.search("gulls", "all.parquet")


def test_parts_of_a_folder_are_one_table(folder: Path, bytes_model: Model) -> None:
    table(folder / "all.parquet", bytes_model)
    names = list(TEXTS)
    table(folder / "parts/part-0.parquet", bytes_model, names[:2])
    table(folder / "parts/part-1.parquet", bytes_model, names[2:])
    (folder / "parts/.tmp-0.parquet").write_bytes(b"what a killed job left")
    whole, parts = Vectors("all.parquet"), Vectors("parts")
    query = whole.embed("gulls", bytes_model)
    assert parts.nearest(query, k=50) == whole.nearest(query, k=50)
    assert len(whole.nearest(query, k=50)) == pq.read_table("all.parquet").num_rows


def test_the_unit_filter(folder: Path, bytes_model: Model) -> None:
    table(folder / "all.parquet", bytes_model)
    vectors = Vectors("all.parquet")
    query = vectors.embed("gulls", bytes_model)
    everything = vectors.nearest(query, k=50)
    for unit in ("sentence", "document"):
        expected = [hit.score for hit in everything if hit.unit == unit]
        assert [hit.score for hit in vectors.nearest(query, k=50, unit=unit)] == expected
    with pytest.raises(UsageError, match="document or sentence"):
        vectors.nearest(query, unit="chunk")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_query_is_pooled_and_whitened_as_the_rows(folder: Path, bytes_model: Model, pooling: str) -> None:
    plain = table(folder / "plain.parquet", bytes_model, pooling=pooling)
    whitening = Whitening.fit([embedding(plain)], model=bytes_model.fingerprint, pooling=pooling)
    table(folder / "white.parquet", bytes_model, pooling=pooling, whitening=whitening)
    vectors = Vectors("white.parquet")
    with pytest.raises(InputError, match="beside the table"):
        vectors.embed("gulls", bytes_model)
    whitening.save(folder / f"white{SUFFIX}")
    hits = vectors.nearest(vectors.embed(TEXTS["log.txt"], bytes_model), k=1)
    assert (hits[0].document, hits[0].unit) == ("log.txt", "document")
    assert hits[0].score == pytest.approx(1, abs=1e-6)


def test_vectors_of_another_model_are_refused(folder: Path, bytes_model: Model, other_bytes_model_path: Path) -> None:
    table(folder / "all.parquet", bytes_model)
    from rwkv_stream.model import load

    other = load(other_bytes_model_path, device="cpu")
    ended = program("search", "gulls", "all.parquet", "--model", other_bytes_model_path)
    assert (ended.code, ended.out) == (13, "")
    assert bytes_model.fingerprint in ended.err
    assert other.fingerprint in ended.err


def test_parts_made_in_unlike_ways_are_refused(folder: Path, bytes_model: Model) -> None:
    table(folder / "parts/a.parquet", bytes_model, ["log.txt"])
    table(folder / "parts/b.parquet", bytes_model, ["log.txt"], pooling="last")
    with pytest.raises(MismatchError, match="pooling"):
        Vectors("parts")


def test_a_newer_format_is_refused(folder: Path, bytes_model: Model) -> None:
    made = table(folder / "all.parquet", bytes_model, ["log.txt"])
    pq.write_table(made.replace_schema_metadata({**made.schema.metadata, b"format": b"2"}), "all.parquet")
    with pytest.raises(MismatchError, match="format"):
        Vectors("all.parquet")


def test_what_is_no_table_of_embeddings(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    pq.write_table(pa.table({"text": ["a"]}), folder / "foreign.parquet")
    for path in ("nothing.parquet", "empty", "broken.parquet", "foreign.parquet"):
        ended = program("search", "gulls", path)
        assert (ended.code, ended.out) == (1, ""), path
        assert path in ended.err
        assert len(ended.err.splitlines()) == 1


def test_a_table_that_goes_on_from_a_snapshot(folder: Path, bytes_model: Model) -> None:
    import rwkv_stream as rs

    store = Store("books.store", create=True)
    rs.ingest("keeper.txt", model=bytes_model, store=store)
    start = store.get("keeper.txt")
    table(folder / "all.parquet", bytes_model, ["log.txt"], start=start)
    vectors = Vectors("all.parquet")
    with pytest.raises(MismatchError, match=start.id):
        vectors.embed(TEXTS["log.txt"], bytes_model)
    ended = program("search", TEXTS["log.txt"], "all.parquet", "--unit", "document", "--json", "--store", "books.store")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["score"] == pytest.approx(1, abs=1e-6)


def test_the_text_around_a_hit(folder: Path, bytes_model: Model) -> None:
    table(folder / "all.parquet", bytes_model, ["café.txt", "keeper.txt"])
    hits = Vectors("all.parquet").nearest(embedding(pq.read_table("all.parquet"))[0], k=50)
    for around in (1, 3, 10, 1000):
        found = surroundings(hits, documents(["café.txt", "keeper.txt"]), around)
        for hit in hits:
            data = TEXTS[hit.document].encode()
            end = hit.byte_start if hit.text is None else hit.byte_end
            expected = data[max(0, hit.byte_start - around) : end + around].decode("utf-8", "ignore")
            assert found[hit.rank] == expected
    Path("keeper.txt").write_text("Something else, and longer than what was here before, when it was read. " * 2)
    left = surroundings(hits, documents(["keeper.txt"]), 10)
    assert [hit.unit for hit in hits if hit.rank in left] == ["document"]  # which has no text to be compared
    assert surroundings(hits, documents(["log.txt"]), 10) == {}


def test_the_text_around_hits_of_a_long_document(folder: Path) -> None:
    """It comes in many pieces, and spans lie across their edges, overlap, and stand at both ends."""
    text = "".join(f"line {i} of the log\n" for i in range(60_000))
    Path("long.log").write_text(text)
    starts = [0, 5, 900_000, 899_990, len(text) - 30, *range(65_520, len(text) - 30, 65_536)]
    hits = [
        Hit(rank, 0.5, "long.log", "chunk", 0, at, at + 30, 0, 1, text[at : at + 30], None)
        for rank, at in enumerate(starts)
    ]
    for some in (hits, [hits[0], hits[4]]):  # close together, and with many pieces between them
        found = surroundings(some, documents(["long.log"]), 50)
        assert found == {hit.rank: text[max(0, hit.byte_start - 50) : hit.byte_end + 50] for hit in some}


def test_the_program(folder: Path, bytes_model: Model) -> None:
    table(folder / "all.parquet", bytes_model)
    ended = program("search", "The keeper lit the lamp.", "all.parquet", "--k", 2, "--unit", "sentence", "--around", 9)
    assert ended.code == 0, ended.err
    lines = [line.split("\t") for line in ended.out.splitlines()]
    assert lines[0] == ["rank", "score", "document", "id", "unit", "bytes", "text"]
    assert lines[1] == ["1", "1.0000", "keeper.txt", "", "sentence 0", "0-24", "The keeper lit the lamp. The sea …"]
    assert lines[2][2:] == ["same.txt", "", "sentence 0", "0-24", "The keeper lit the lamp."]
    ended = program("search", "keeper", "all.parquet", "--k", 3, "--json", "--from-text", "keeper.txt")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["rank"] for row in shown] == [1, 2, 3]
    assert all((row["around"] is None) == (row["document"] != "keeper.txt") for row in shown)
    assert program("search", " ", "all.parquet").code == 2
    assert program("search", "keeper", "all.parquet", "--from-text", "no-such-file").code == 1


def test_a_hit_is_shown_by_its_id_and_its_beginning() -> None:
    place = {"row": 7, "id": 42}
    hit = Hit(1, 0.5, "a.jsonl", "sentence", 0, 0, 900, 0, 1, "word " * 180, None, place)
    assert _line(hit, None, 0) == ("1", "0.5000", "a.jsonl", "42", "sentence 0", "0-900", "word " * 39 + "…")
    of_document = replace(hit, unit="document", text=None, excerpt="It begins so …")
    for around in (None, "It begins"):
        assert _line(of_document, around, 80)[-2:] == ("0-900", "It begins so …")


@pytest.mark.parametrize("output", ["all.parquet", "all.vectors/"])
def test_documents_are_shown_by_their_beginning(folder: Path, bytes_model_path: Path, output: str) -> None:
    """Of a file and of a row, in a table and in a job; not where text was to be left out."""
    text = "\n The  keeper\tlit the lamp. " + "He wrote the hour in a green book. " * 200
    Path("rows.jsonl").write_text(json.dumps({"id": 42, "text": text}) + "\n")
    Path("keeper.txt").write_text(text)
    Path("short.txt").write_text(" The\nsea. ")
    sources = ["rows.jsonl", "keeper.txt", "short.txt"]
    assert program("embed", *sources, "--unit", "document", "-o", output).code == 0
    ended = program("search", "keeper", output, "--json")
    shown = {row["document"][:10]: row for row in map(json.loads, ended.out.splitlines())}
    of_file, of_row, short = shown["keeper.txt"], shown["rows.jsonl"], shown["short.txt"]  # a row's number follows
    assert of_row["place"]["id"] == "42"
    assert of_row["text"] is None
    assert of_row["excerpt"] == of_file["excerpt"]
    assert of_file["excerpt"].startswith("The keeper lit the lamp. He wrote the hour")
    assert 190 < len(of_file["excerpt"]) <= 200
    assert of_file["excerpt"].endswith(("book. …", "hour …", "green …", "the …", "wrote …", "a …", "in …", "He …"))
    assert short["excerpt"] == "The sea."
    seen = program("search", "keeper", output).out
    assert seen.count(of_file["excerpt"]) == 2

    assert program("embed", *sources, "--unit", "document", "--no-text", "-o", output, "--restart").code == 0
    assert {json.loads(row)["excerpt"] for row in program("search", "keeper", output, "--json").out.splitlines()} == {
        None
    }
