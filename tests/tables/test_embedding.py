"""The value that says how vectors are made: what makes no sense is refused, wherever it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rwkv_stream as rs
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.tables.embed_jobs import embed_job, embed_table
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.values import updated

BAD: list[tuple[dict[str, Any], str]] = [
    ({"units": ()}, "expected units of"),
    ({"units": ("word",)}, "found 'word'"),
    ({"units": ("chunk", "chunk")}, "each once"),
    ({"units": ("sentence", "chunk"), "isolated": True}, "expected one kind"),
    ({"pooling": "max"}, "auto, head, mean, last, found 'max'"),
    ({"chunk": 0}, "1 token or more"),
    ({"chunk": 2.5}, "chunk as a whole number"),
    ({"budget": 0}, "multiple of 16"),
    ({"budget": 24}, "multiple of 16"),
    ({"budget": "64"}, "budget as a whole number"),
    ({"pool": "mean"}, "expected options units, .* found pool"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(map(str, options)) for options, _ in BAD])
def test_the_same_error_from_every_way_in(
    tmp_path: Path, bytes_model: Model, options: dict[str, Any], message: str
) -> None:
    ways = (
        lambda: updated(Embedding(), options, "embedding"),
        lambda: rs.embed(["a"], model=bytes_model, **options),
        lambda: rows([], model=bytes_model, **options),
        lambda: embed_table(["a"], tmp_path / "a.parquet", model=bytes_model, **options),
        lambda: embed_job(tmp_path / "job", ["a"], model=bytes_model, **options),
    )
    for way in ways:
        with pytest.raises(UsageError, match=message):
            way()
    assert list(tmp_path.iterdir()) == []


def test_units_as_words_or_with_commas() -> None:
    assert Embedding(units="sentence,document") == Embedding(units=["sentence", "document"])
    assert updated(Embedding(units="chunk"), {"chunk": 7}, "embedding") == Embedding(units=("chunk",), chunk=7)


def test_a_value_and_its_options_are_the_same(bytes_model: Model) -> None:
    options: dict[str, Any] = {"pooling": "last", "budget": 32, "normalize": False}
    wanted = rs.embed(["One text.", "Another."], model=bytes_model, **options)
    assert np.array_equal(rs.embed(["One text.", "Another."], rs.Embedding(**options), model=bytes_model), wanted)


def test_a_vector_to_search_for_may_be_a_list(tmp_path: Path, bytes_model: Model) -> None:
    (tmp_path / "book.txt").write_text("The lamp was lit.")
    embed_table([str(tmp_path / "book.txt")], tmp_path / "book.parquet", model=bytes_model)
    (vector,) = rs.embed(["The lamp was lit."], model=bytes_model)
    assert rs.search(vector.tolist(), tmp_path / "book.parquet")[0].score == pytest.approx(1)
    for query in (None, [1.0, 2.0]):
        with pytest.raises(UsageError, match="expected a query of"):
            rs.search(query, tmp_path / "book.parquet")  # type: ignore[arg-type]


def test_paths_and_what_is_no_text(tmp_path: Path, bytes_model: Model) -> None:
    path = tmp_path / "book.txt"
    path.write_text("The lamp was lit.")
    found = rs.embed([path, "The lamp was lit."], model=bytes_model, budget=32)
    assert np.array_equal(found[0], found[1])
    assert next(rs.score(path, model=bytes_model)).document == str(path)
    for texts in ("a text", path, None, 5, [5], [None]):
        with pytest.raises(UsageError, match="expected"):
            rs.embed(texts, model=bytes_model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="missing"):
        rs.embed([tmp_path / "missing.txt"], model=bytes_model)
