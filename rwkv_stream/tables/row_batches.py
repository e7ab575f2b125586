"""Rows that are being made: record batches with their schema, and totals of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rwkv_stream.text.units import Failure

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class CallResult:
    """Rows that were completed at once, as by a call of a model, maybe none; the tokens that it took, and how many
    documents ended with them."""

    batch: pa.RecordBatch
    tokens: int
    documents: int


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
