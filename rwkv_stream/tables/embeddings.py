"""Embeddings: one vector for each sentence, chunk or whole document, pooled from what the model makes of its tokens.

>>> rs.embed(["one text", "another"], model=model)
>>> for batch in rows(documents, model=model, units=("sentence", "document")): ...
>>> embed_table(["books/"], Path("books.parquet"), model=model, units="sentence")

A document is read once, from its start; what it has said before a unit is the unit's context, unless `isolated`.
Reading and tokenising, the model, and whoever takes the rows work at the same time. Memory does not grow with the
number or size of documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.files import scratch
from rwkv_stream.tables import whitening
from rwkv_stream.tables.columns import citations, embedding
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.pooling import CallResult, Pool
from rwkv_stream.tables.prefetch import prefetched
from rwkv_stream.tables.writers import Writer, check_output
from rwkv_stream.text.readers import document, documents
from rwkv_stream.text.units import Failure, Source
from rwkv_stream.values import updated

if TYPE_CHECKING:
    import pyarrow as pa

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
    return np.concatenate(vectors) if vectors else np.zeros((0, model.config.n_embd), np.float32)


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


@dataclass(slots=True)
class Counts:
    """How many documents, failures, rows and tokens, and parts that were lost of documents that are read."""

    documents: int = 0
    failed: int = 0
    rows: int = 0
    tokens: int = 0
    losses: int = 0


class RowBatches(Iterator["pa.RecordBatch"]):
    """Record batches, made ahead on threads; the schema and the metadata of a table of them; totals so far."""

    def __init__(
        self,
        schema: pa.Schema,
        metadata: Mapping[str, str],
        results: Generator[CallResult | Failure, None, None],
        on_failure: Callable[[Failure], None] | None,
    ) -> None:
        self.schema, self.metadata = schema, metadata
        self.documents = self.failed = self.rows = self.tokens = self.losses = 0
        self._results = results
        self._on_failure = on_failure

    def __next__(self) -> pa.RecordBatch:
        while True:
            result = next(self._results)
            if isinstance(result, Failure):
                self.losses += result.n_lost
                self.failed += not result.n_lost
                if self._on_failure is None:
                    raise result.error
                self._on_failure(result)
                continue
            self.documents += result.documents
            self.tokens += result.tokens
            if result.batch.num_rows:
                self.rows += result.batch.num_rows
                return result.batch

    def close(self) -> None:
        """Stop the threads; rows that were not taken are lost."""
        self._results.close()


class Totals:
    """Totals so far, which another thread may read at any moment."""

    def __init__(self) -> None:
        self.total_documents: int | None = None
        self.skipped = 0  # documents that an earlier run did; they count in the totals …
        self._skipped_tokens = 0  # … and their tokens
        self._counts = Counts()
        self._running: RowBatches | None = None

    @property
    def documents(self) -> int:
        return self._counts.documents + (self._running.documents if self._running else 0)

    @property
    def failed(self) -> int:
        return self._counts.failed + (self._running.failed if self._running else 0)

    @property
    def losses(self) -> int:
        return self._counts.losses + (self._running.losses if self._running else 0)

    @property
    def rows(self) -> int:
        return self._counts.rows + (self._running.rows if self._running else 0)

    @property
    def tokens(self) -> int:
        return self._counts.tokens + (self._running.tokens if self._running else 0)

    @property
    def tokens_now(self) -> int:
        """Those of this run."""
        return self.tokens - self._skipped_tokens

    @contextlib.contextmanager
    def of(self, batches: RowBatches) -> Iterator[RowBatches]:
        """Rows that are being made; closed at the end."""
        self._running = batches
        try:
            yield batches
        finally:
            batches.close()
            self._running = None
            self.add(batches)

    def skip(self, counts: Counts) -> None:
        """What an earlier run did."""
        self.skipped += counts.documents + counts.failed
        self._skipped_tokens += counts.tokens
        self.add(counts)

    def add(self, counts: Counts | RowBatches) -> None:
        for field in fields(Counts):
            setattr(self._counts, field.name, getattr(self._counts, field.name) + getattr(counts, field.name))


def embed_table(
    sources: Sequence[str],
    output: Path,
    given: Embedding | None = None,
    *,
    model: Model,
    reading: Mapping[str, Any] | None = None,
    whiten: bool = False,
    totals: Totals | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    **options: Any,
) -> Totals:
    """Write the rows of all documents to one table; it is there when it is whole.

    given       an `Embedding`; options are its fields
    reading     arguments of `readers.documents`
    whiten      fit a whitening on these rows, keep it beside the table, and apply it
    on_failure  told of each document that cannot be read; without it the first one raises
    raises      InputError where a source is missing or all documents fail; OutputError, UsageError, MismatchError
    """
    check_output(output)
    chosen, totals = updated(given or Embedding(), options, "embedding"), totals or Totals()

    def write(path: Path) -> None:
        found = documents(sources, rows=True, **(reading or {}))
        batches = rows(found, chosen, model=model, columns=citations(), on_failure=on_failure)
        with totals.of(batches), Writer(path, batches.schema, batches.metadata) as writer:
            for batch in batches:
                writer.write_batch(batch)
            if batches.failed and not batches.documents:
                raise InputError(
                    f"embedding into '{output}': all {batches.failed} documents failed; nothing was written"
                )

    if not whiten:
        write(output)
        return totals
    with scratch(output.parent) as folder:
        plain = folder / "plain.parquet"
        write(plain)
        fitted = whitening.fit_tables([plain], model=model.fingerprint, pooling=chosen.pooling)
        with whitening.whitening_table(plain, output, fitted):
            fitted.save(output.with_suffix(whitening.SUFFIX))
    return totals
