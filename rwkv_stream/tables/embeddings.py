"""Embeddings: one vector for each sentence, chunk or whole document, pooled from what the model makes of its tokens.

>>> rs.embed(["one text", "another"], model=model)
>>> for batch in rows(documents, model=model, units=("sentence", "document")): ...

A document is read once, from its start; what it has said before a unit is the unit's context, unless `isolated`.
Reading and tokenising, the model, and whoever takes the rows work at the same time. Memory does not grow with the
number or size of documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.tables.columns import embedding
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.pooling import Pool
from rwkv_stream.tables.prefetch import prefetched
from rwkv_stream.tables.row_batches import RowBatches
from rwkv_stream.text.readers import document
from rwkv_stream.text.units import Failure, Source
from rwkv_stream.values import updated

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.tables.columns import Columns, Float32s

PIECES_AHEAD = 64
BATCHES_AHEAD = 4


def embed(
    texts: Iterable[str | Path | Source], given: Embedding | None = None, *, model: Model, **options: Any
) -> Float32s:
    """The vectors [n, D] of texts, of files named by a Path, or of documents, in order.

    given    an `Embedding`; options are its fields
    raises   UsageError, MismatchError; InputError for a document that cannot be read and for a text without a token
    """
    if isinstance(texts, str | Path) or not isinstance(texts, Iterable):
        raise UsageError(f"embedding: expected a list of texts, found {texts!r:.40}; pass [text]")
    sources = (_source(i, text) for i, text in enumerate(texts))
    with contextlib.closing(rows(sources, given, model=model, **{"text": False, **options})) as batches:
        vectors = [embedding(batch) for batch in batches]
    dimension = batches.schema.field("embedding").type.list_size
    return np.concatenate(vectors) if vectors else np.zeros((0, dimension), np.float32)


def _source(number: int, text: str | Path | Source) -> Source:
    if isinstance(text, Path):
        return document(str(text))
    if isinstance(text, str):
        return _Text(f"text {number}", text)
    if not (hasattr(text, "name") and callable(getattr(text, "text", None))):
        raise UsageError(f"embedding: expected texts, paths or documents, found {text!r:.40} at {number}")
    return text


@dataclass(frozen=True, slots=True)
class _Text:
    """A document in memory."""

    name: str
    string: str

    def text(self) -> contextlib.AbstractContextManager[Iterable[bytes]]:
        try:
            return contextlib.nullcontext([self.string.encode()])
        except UnicodeEncodeError as error:
            raise InputError(f"embedding '{self.name}': expected Unicode characters, found {error}") from error


def rows(
    documents: Iterable[Source],
    given: Embedding | None = None,
    *,
    model: Model,
    columns: Columns | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    **options: Any,
) -> RowBatches:
    """The rows of documents as record batches: documents in order, a document's units in the order of their ends.

    given       an `Embedding`; options are its fields
    columns     further columns: what a person would cite of a unit (page, line, id …), null where it has no such
    on_failure  told of each document that cannot be read, and of each part of one; without it the first one raises
    raises      UsageError, MismatchError; while iterating InputError
    """
    chosen = updated(given or Embedding(), options, "embedding")
    pool = Pool(model, chosen, columns)
    pieces = prefetched(chosen.pieces(documents, model.tokenizer), PIECES_AHEAD)
    return RowBatches(pool.schema, pool.metadata, prefetched(pool.batches(pieces), BATCHES_AHEAD), on_failure)
