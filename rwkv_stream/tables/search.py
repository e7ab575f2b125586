"""Search: the rows of embeddings nearest to a query.

>>> for hit in search("Who keeps the light?", "books.parquet", model=model, k=5): print(hit.score, hit.text)

A table (`vector_table`) is scanned block by block; the k best are kept, and only their row groups are read again, for
the text. So memory depends on k and on the size of a row group (64 MiB), not on the number of rows.

A row's cosine is summed in fp64 in an order that depends on the dimension alone: equal vectors have equal scores,
wherever they stand, and of equals the first row of the table comes first.

A folder of more than ROWS rows is searched through an approximate index (`vector_index`), which the first search puts
beside the parts. The rows that it proposes are scored as above, from the table; it may miss some of the nearest.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import BackendError, InputError, MismatchError, UsageError
from rwkv_stream.tables.columns import UNIT_COLUMNS
from rwkv_stream.tables.vector_table import VectorTable

if TYPE_CHECKING:
    import numpy.typing as npt

    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.tables import vector_index
    from rwkv_stream.tables.columns import Float32s
    from rwkv_stream.tables.whitening import Whitening

    Float64s = npt.NDArray[np.float64]

ROWS = 1_000_000  # a folder of more is indexed

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of the table; `score` is its cosine with the query, `place` what further columns say of it (page, line …).

    text is None of a document, whose beginning is its excerpt; both are None in a table without text.
    `search` says how the row was found, "exact" or "approximate".
    """

    rank: int
    score: float
    document: str
    unit: str
    index: int
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    text: str | None
    excerpt: str | None
    place: dict[str, Any] = field(default_factory=dict)
    search: str = "exact"


@dataclass(frozen=True, slots=True, order=True)
class _Candidate:
    """A row that may be among the nearest; the greater one is nearer."""

    score: float
    order: int  # minus its number

    @property
    def row(self) -> int:
        return -self.order


def search(
    query: str | npt.ArrayLike,
    path: str | Path,
    *,
    model: Model | None = None,
    k: int = 10,
    unit: str | None = None,
    exact: bool = False,
    start: Snapshot | State | None = None,
) -> list[Hit]:
    """The k rows nearest to a query, best first, of a file of embeddings or a folder of its parts.

    query   text, or a vector [D]
    model   that made the embeddings; a text needs it
    unit    only rows of this one
    exact   also in a folder with an index
    start   what the embedded documents were read as going on from; for a text
    raises  as `Vectors`, `Vectors.embed` and `Vectors.nearest` do
    """
    vectors = Vectors(path)
    if isinstance(query, str):
        if model is None:
            raise UsageError(f"searching '{path}': expected a model, which a query in words needs, found none")
        query = vectors.embed(query, model, start=start)
    return vectors.nearest(query, k=k, unit=unit, exact=exact)


class Vectors:
    """A table of embeddings, opened for search.

    metadata   of the file: what made its vectors
    dimension  of a vector
    raises     as `VectorTable` does
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._table = VectorTable(path)
        self.metadata, self.dimension, self.rows = self._table.metadata, self._table.dimension, self._table.rows

    @property
    def start(self) -> str:
        """The id of the snapshot that documents were read as going on from; "" where there was none."""
        return self.metadata.get("start", "")

    def embed(self, query: str, model: Model, *, start: Snapshot | State | None = None) -> Float32s:
        """The vector [D] of a query, made as the table's rows were.

        start   what the table's documents were read as going on from
        raises  MismatchError for another model or start, InputError for a query without a token or a whitening that
                is not beside the table
        """
        from rwkv_stream.tables.embeddings import embed

        made_by = self.metadata["model"]
        if model.fingerprint != made_by:
            raise MismatchError(
                f"searching '{self.path}': expected the model of its vectors, {made_by}, found {model.fingerprint} at "
                f"'{model.path}'; pass --model with the first one"
            )
        given = "" if start is None else _start_name(start)
        if given != self.start:
            raise MismatchError(
                f"searching '{self.path}': expected a query that goes on from '{self.start}' as its rows do, "
                f"found '{given}'"
            )
        if not query.strip():
            raise UsageError("searching: expected a query, found none")
        vectors = embed(
            [query],
            model=model,
            pooling=self.metadata["pooling"],
            normalize=self.metadata["normalized"] == "true",
            whitening=self._whitening() if self.metadata["whitening"] else None,
            budget=self._budget(),
            start=start,
        )
        vector: Float32s = vectors[0]
        return vector

    def nearest(self, query: npt.ArrayLike, *, k: int = 10, unit: str | None = None, exact: bool = False) -> list[Hit]:
        """The k rows, of this unit if one is given, with the largest cosine to query [D], best first.

        exact   even if the table is a folder of more than ROWS rows; so it is, too, where there can be no index
        raises  UsageError for a k below 1, a query of another dimension, and a unit that the table does not have
        """
        if k < 1:
            raise UsageError(f"searching: expected k to be 1 or more, found {k}")
        vector = np.asarray(query)
        if vector.shape != (self.dimension,):
            raise UsageError(f"searching: expected a query of [{self.dimension}], found {list(vector.shape)}")
        length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
        scaled = vector.astype(np.float64) / (length or 1)
        index = None if exact or self.rows <= ROWS or not self.path.is_dir() else self._index()
        if index is not None:
            found = self._approximately(index, scaled, k, unit)
            if len(found) == k:
                return self._hits(found, "approximate")
        return self._hits(self._exactly(scaled, k, unit), "exact")

    def _exactly(self, query: Float64s, k: int, unit: str | None) -> list[_Candidate]:
        best: list[_Candidate] = []
        units: set[str] = set()
        for block in self._table.blocks():
            scores = _cosines(block.vectors, query)
            wanted = np.arange(len(scores))
            if unit is not None:
                here = block.units
                units.update(here)
                wanted = wanted[here == unit]
            for i in wanted[np.argsort(-scores[wanted], kind="stable")[:k]].tolist():
                candidate = _Candidate(float(scores[i]), -block.rows[i])
                if len(best) < k:
                    heapq.heappush(best, candidate)
                elif candidate > best[0]:
                    heapq.heapreplace(best, candidate)
                else:
                    break  # the rest of this block is no nearer
        self._check_unit(unit, units)
        return sorted(best, reverse=True)

    def _approximately(
        self, index: vector_index.VectorIndex, query: Float64s, k: int, unit: str | None
    ) -> list[_Candidate]:
        """Those that the index proposes, scored by the table; fewer than k where it cannot find so many."""
        self._check_unit(unit, index.units)
        scores: dict[int, float] = {}
        for block in self._table.take(index.nearest(query, 2 * k + 10, unit).tolist(), ["embedding"]):
            scores.update(zip(block.rows, _cosines(block.vectors, query).tolist(), strict=True))
        firsts = heapq.nlargest(k, (_Candidate(score, -row) for row, score in scores.items()))
        alike = (
            _Candidate(first.score, -row) for first in firsts for row in (first.row, *index.repeats(first.row)[: k - 1])
        )
        return heapq.nlargest(k, alike)

    def _index(self) -> vector_index.VectorIndex | None:
        from rwkv_stream.tables.vector_index import PartStamp, VectorIndex

        parts = self._table.parts
        firsts = itertools.accumulate((part.rows for part in parts), initial=0)
        stamps = [
            PartStamp(part.path.name, part.size, part.mtime_ns, first, part.rows)
            for part, first in zip(parts, firsts, strict=False)
        ]
        try:
            return VectorIndex(self.path, stamps, self.dimension, self._blocks)
        except BackendError as error:
            reason = str(error)
        except BlockingIOError:
            reason = "another process is making the index"
        except OSError as error:
            reason = f"there can be no index, {error.strerror or error}"
        log.warning("searching '%s': all %d rows, exactly; %s", self.path, self.rows, reason)
        return None

    def _blocks(self, first: int, end: int) -> Iterator[tuple[int, npt.NDArray[np.object_], Float32s]]:
        """Rows of the table, block by block: the first one's number, units [n], vectors [n, D]."""
        for block in self._table.blocks(first, end):
            yield block.rows[0], block.units, block.vectors

    def _check_unit(self, unit: str | None, units: set[str]) -> None:
        if unit is not None and units and unit not in units:
            raise UsageError(f"searching '{self.path}': expected unit {' or '.join(sorted(units))}, found '{unit}'")

    def _hits(self, nearest: Sequence[_Candidate], search: str) -> list[Hit]:
        rows: dict[int, dict[str, Any]] = {}
        for block in self._table.take(candidate.row for candidate in nearest):
            rows.update(zip(block.rows, block.batch.to_pylist(), strict=True))
        hits = []
        for rank, candidate in enumerate(nearest, 1):
            row = rows[candidate.row]
            place = {name: value for name, value in row.items() if name not in UNIT_COLUMNS and value is not None}
            unit = {name: row[name] for name in UNIT_COLUMNS}
            hits.append(Hit(rank, candidate.score, **unit, place=place, search=search))
        return hits

    def _budget(self) -> int:
        try:
            return int(self.metadata["budget"])
        except ValueError as error:
            raise InputError(f"searching '{self.path}': expected a budget in its metadata, found: {error}") from error

    def _whitening(self) -> Whitening:
        from rwkv_stream.tables.whitening import SUFFIX, Whitening

        folder = self.path if self.path.is_dir() else self.path.parent
        own = f"{self.path.stem}{SUFFIX}"
        for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: (path.name != own, path.name)):
            whitening = Whitening.load(path)
            if whitening.digest == self.metadata["whitening"]:
                return whitening
        raise InputError(
            f"searching '{self.path}': expected its whitening {self.metadata['whitening'][:12]} in '{folder}' as "
            f"*{SUFFIX}, found none; put it beside the table"
        )


def _start_name(start: Snapshot | State) -> str:
    """As the metadata of `embed` names it."""
    from rwkv_stream.model.state import State

    return f"state {start.digest()}" if isinstance(start, State) else start.id


def _cosines(vectors: Float32s, query: Float64s) -> Float64s:
    """Cosines [n] of vectors [n, D] with query [D] of length 1; 0 for a vector of zeros."""
    x = vectors.astype(np.float64)
    products = (x * query).sum(axis=1)  # a product of matrices may differ in the last bit from row to row
    lengths = np.sqrt(np.square(x).sum(axis=1))
    cosines: Float64s = products / np.where(lengths > 0, lengths, 1)
    return cosines
