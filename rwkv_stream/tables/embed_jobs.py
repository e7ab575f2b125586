"""Vectors as the work of a job: a folder of parts, or one table.

>>> embed_job("rows/", ["articles.jsonl"], model=model, units=("sentence",)).run()
>>> embed_table(["books/"], Path("books.parquet"), model=model, units="sentence")
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rwkv_stream.tables import whitening
from rwkv_stream.tables.columns import citations
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.tables.jobs import Job, make_table
from rwkv_stream.tables.row_batches import RowBatches, Totals
from rwkv_stream.text.units import Failure, Source
from rwkv_stream.values import updated

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.tables.jobs import Fit

TRIAL_TEXT = "The keeper climbed the stair each evening, lit the lamp, and wrote the hour in a green book. "
TRIALS = 2  # calls of the model that are timed, after one that is not


@dataclass(frozen=True, slots=True)
class EmbeddingWork:
    """Rows of vectors, as `rows` gives them; with `whiten` a whitening is fitted on all of them, and applied."""

    model: Model
    embedding: Embedding
    whiten: bool = False
    doing = "embedding"

    @property
    def decides(self) -> dict[str, Any]:
        with contextlib.closing(self.rows((), lambda failure: None)) as described:
            metadata = described.metadata
        return {**metadata, "text": self.embedding.text, "whiten": self.whiten}

    @property
    def remake(self) -> Callable[[Model], EmbeddingWork]:
        return functools.partial(EmbeddingWork, embedding=self.embedding, whiten=self.whiten)

    @property
    def fit(self) -> Callable[[Sequence[Path]], Fit] | None:
        if not self.whiten:
            return None
        return functools.partial(whitening.fit_tables, model=self.model.fingerprint, pooling=self.embedding.pooling)

    def rows(self, documents: Iterable[Source], on_failure: Callable[[Failure], None]) -> RowBatches:
        return rows(documents, self.embedding, model=self.model, columns=citations(), on_failure=on_failure)

    def bytes_per_s(self) -> float:
        """Of English prose; of other texts perhaps half or twice as many."""
        _, head = self.embedding.resolved(self.model)
        model = self.model if head is None else self.model.first(head.layers)
        ids = list(model.tokenizer.encode(TRIAL_TEXT))
        budget = self.embedding.budget
        tokens = torch.tensor((ids * (budget // len(ids) + 1))[:budget])
        state = model.zero_state()
        began = 0.0
        for trial in range(1 + TRIALS):
            if trial == 1:
                began = time.perf_counter()
            hidden, _ = model.forward_packed(tokens, torch.tensor([budget]), state)
            hidden.sum().item()  # waits for a GPU
        per_token_s = (time.perf_counter() - began) / (TRIALS * budget)
        return len(TRIAL_TEXT.encode()) / len(ids) / per_token_s


def embedding_work(
    given: Embedding | None = None, *, model: Model, whiten: bool = False, **options: Any
) -> EmbeddingWork:
    """The work of an `Embedding`, or of one with these fields; as `embed_job`, with its arguments."""
    return EmbeddingWork(model, updated(given or Embedding(), options, "embedding").resolved(model)[0], whiten)


def embed_job(
    folder: str | Path,
    sources: Sequence[str],
    given: Embedding | None = None,
    *,
    model: Model,
    reading: Mapping[str, Any] | None = None,
    part_rows: int | None = None,
    part_bytes: int | None = None,
    whiten: bool = False,
    restart: bool = False,
    **options: Any,
) -> Job:
    """The rows of many documents as a folder of parts: a `Job`, with its arguments.

    given    an `Embedding`; options are its fields
    whiten   fit a whitening on all rows, keep it in the folder, and apply it, when all parts are made
    raises   as `Job`
    """
    work = embedding_work(given, model=model, whiten=whiten, **options)
    return Job(folder, sources, work, reading=reading, part_rows=part_rows, part_bytes=part_bytes, restart=restart)


def embed_table(
    sources: Sequence[str],
    output: Path,
    given: Embedding | None = None,
    *,
    model: Model,
    reading: Mapping[str, Any] | None = None,
    part_rows: int | None = None,
    whiten: bool = False,
    restart: bool = False,
    totals: Totals | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    **options: Any,
) -> Totals:
    """Write the rows of all documents to one table; it is there when it is whole. Until then the parts that were made
    are kept in a hidden folder beside it, and the next call goes on with them.

    given       an `Embedding`; options are its fields
    reading     arguments of `readers.documents`
    part_rows   documents in such a part; without it about as many as a minute makes
    whiten      fit a whitening on these rows, keep it beside the table, and apply it
    restart     leave parts that were made
    on_failure  told of each document that cannot be read; without it the first one raises
    raises      InputError where a source is missing or all documents fail; OutputError, UsageError, MismatchError;
                StoreLockedError where another call is at work on the same table
    """
    return make_table(
        output,
        sources,
        embedding_work(given, model=model, whiten=whiten, **options),
        reading=reading,
        part_rows=part_rows,
        restart=restart,
        totals=totals,
        on_failure=on_failure,
    )
