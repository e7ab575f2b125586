"""The Python of docs/tables.md is run block after block on tables made here, and what it finds is what is there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from program import program

from rwkv_stream.model import Model
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.text.readers import documents

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"
THINGS = ("lamp", "mer calme", "Brücke", "gulls", "letters", "harbour — old", "stair", "wind", "map of rocks", "ship")
STORY = "".join(f"Number {i} was about the {thing}.{' ' if i % 3 else chr(10) * 2}" for i, thing in enumerate(THINGS))
ODD = "kernel panic: zzqx 0xdeadbeef"


@pytest.fixture
def names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path, bytes_model: Model
) -> dict[str, Any]:
    """What the page has defined at its end."""
    for library in ("duckdb", "pandas"):
        pytest.importorskip(library, reason=f"the page uses {library}, which is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    Path("story.txt").write_text(STORY)
    batches = rows(documents(["story.txt"]), model=bytes_model, units=("sentence", "document"))
    made = pa.Table.from_batches(list(batches), batches.schema).replace_schema_metadata(dict(batches.metadata))
    pq.write_table(made, "story.parquet", compression="zstd")
    log = [f"10:00:{i % 60:02d} GET /index.html 200\n" for i in range(50)]
    Path("access.log").write_text("".join([*log[:20], ODD + "\n", *log[20:]]))
    assert program("score", "access.log", "--unit", "line", "-o", "surprise.parquet", "--quiet").code == 0
    job_folder(monkeypatch)
    monkeypatch.setattr("rwkv_stream.model.load", lambda: bytes_model)  # the page takes the packaged one
    defined: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M):
        exec(compile(block, str(PAGE), "exec"), defined)
    return defined


def job_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with everything that `embed` and `search` put into one: of its three documents one fails."""
    Path("first.jsonl").write_text('{"text": "The lamp."}\n{"text": 5}\n')
    Path("second.jsonl").write_text('{"text": "The sea."}\n')
    embedding = ("embed", "first.jsonl", "second.jsonl", "--part-rows", 2, "-o", "vectors/", "--whiten")
    assert program(*embedding, "--quiet").code == 3
    monkeypatch.setattr("rwkv_stream.tables.search.ROWS", 1)
    found = program("search", "lamp", "vectors/", "--k", 1, "--json")
    is_indexed = importlib.util.find_spec("usearch") is not None
    assert json.loads(found.out)["search"] == ("approximate" if is_indexed else "exact"), found.err
    names = {path.name for path in Path("vectors").iterdir()}
    assert names == {
        *("part-00000.parquet", "part-00001.parquet", "_manifest.jsonl", "_progress", "_lock", "failed.jsonl"),
        *("_rows.whitening.safetensors", "_fitted.json", "_plain"),
        *(["_index"] if is_indexed else []),
    }


def test_the_page(names: dict[str, Any], bytes_model: Model) -> None:
    story = STORY.encode()
    assert names["made_by"]["model"] == bytes_model.fingerprint
    # spans select the text
    assert len(names["spans"]) == names["sentences"] == len(names["table"]) == len(THINGS)
    assert all(
        text == cut and f"about the {thing}" in cut
        for (_, text, cut), thing in zip(names["spans"], THINGS, strict=True)
    )
    frame = names["frame"]
    sentences = frame[frame["unit"] == "sentence"]
    assert (sentences["text"] == sentences["cut"]).all()
    whole = frame[frame["unit"] == "document"].iloc[0]
    assert whole["text"] is None or whole["text"] != whole["text"]
    assert whole["cut"].encode() == story[whole["byte_start"] : whole["byte_end"]]
    # nearest rows: a row itself first, and DuckDB agrees with numpy
    assert names["nearest"][0] == 0
    assert [index for index, *_ in names["neighbours"]] == names["nearest"].tolist()
    cosines = names["vectors"][names["nearest"]] @ names["vectors"][0]
    np.testing.assert_allclose([cosine for *_, cosine in names["neighbours"]], cosines, atol=1e-5)
    # a folder of parts
    read = [pq.read_table(path) for path in sorted(Path("vectors").glob("*.parquet"))]
    whole = pa.concat_tables(read)
    assert len(read) == 2 and whole["document"].to_pylist() == ["first.jsonl#1", "second.jsonl#1"]
    assert names["whole"].equals(whole) and names["lazy"].to_table().equals(whole)
    assert names["framed"]["document"].tolist() == whole["document"].to_pylist()
    assert names["counted"] == [(2,)]
    with pytest.raises(pa.ArrowInvalid, match=r"failed\.jsonl"):
        pq.read_table("vectors")  # else the page need not tell how
    # the product's own search
    assert [hit.search for hit in (*names["hits"], *names["near"])] == ["exact"] * 7
    assert len(names["made"]) == 1 + len(THINGS)
    # strangest lines
    lines = pq.read_table("surprise.parquet").to_pylist()
    expected = sorted(lines, key=lambda line: (-line["bits"] / (line["byte_end"] - line["byte_start"]), line["index"]))[
        :10
    ]
    assert names["strangest"]["text"].tolist() == [line["text"] for line in expected]
    assert [text for *_, text in names["strange_lines"]] == [line["text"] for line in expected]
    total = sum(line["bits"] for line in lines) / sum(line["byte_end"] - line["byte_start"] for line in lines)
    assert names["along"] == [(0, pytest.approx(total))]
