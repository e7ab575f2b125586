"""Search: the rows of embeddings nearest to a query, exactly, whatever their number.

>>> table = Vectors("books.parquet")
>>> for hit in table.nearest(table.embed("Who keeps the light?", model), k=5): print(hit.score, hit.document, hit.text)

A table is a Parquet file of `embed`, or a folder of such part files in the order of their names. It is scanned block
by block, BLOCK_BYTES of vectors at a time; the k best are kept, and only their row groups are read again, for the
text. So memory depends on k and on the size of a row group (64 MiB), not on the number of rows.

A row's cosine is summed in fp64 in an order that depends on the dimension alone: equal vectors have equal scores,
wherever they stand, and of equals the first row of the table comes first.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError, MismatchError, UsageError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rwkv_stream.model import Model
    from rwkv_stream.readers import Document
    from rwkv_stream.state import State
    from rwkv_stream.store import Snapshot

    Array = npt.NDArray[np.float32]

BLOCK_BYTES = 4 << 20
DECIDES = ("model", "pooling", "normalized", "whitening", "start")  # metadata that parts must agree in
COLUMNS = ("document", "unit", "index", "text", "byte_start", "byte_end", "token_start", "token_end")


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of the table; `score` is its cosine with the query, `place` what further columns say of it (page, line …).

    text is None where the table has none.
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
    place: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """A row that may be among the nearest; the greater one is nearer."""

    score: float
    order: int  # minus the rows before it
    part: int
    group: int
    row: int  # of the group


class Vectors:
    """A table of embeddings, opened for search.

    metadata   of the file: what made its vectors
    dimension  of a vector
    raises     InputError (no such table, or none of ours), MismatchError (a newer format, parts made in unlike ways)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._parts = sorted(part for part in self.path.glob("*.parquet") if not part.name.startswith("."))
        if not self.path.is_dir():
            self._parts = [self.path]
        if not self._parts:
            raise InputError(f"searching '{path}': expected .parquet files in the folder, found none")
        self.metadata, self.dimension = self._described(self._parts[0])
        for part in self._parts[1:]:
            metadata, dimension = self._described(part)
            for name in DECIDES:
                if metadata.get(name) != self.metadata.get(name):
                    raise MismatchError(
                        f"searching '{path}': expected parts that were made alike, found {name} "
                        f"'{self.metadata.get(name)}' in '{self._parts[0].name}' and '{metadata.get(name)}' in "
                        f"'{part.name}'; search them singly"
                    )
            if dimension != self.dimension:
                raise InputError(f"searching '{part}': expected vectors of {self.dimension}, found {dimension}")

    @property
    def start(self) -> str:
        """The id of the snapshot that documents were read as going on from; "" where there was none."""
        return self.metadata.get("start", "")

    def embed(self, query: str, model: Model, *, start: Snapshot | State | None = None) -> Array:
        """The vector [D] of a query, made as the table's rows were.

        start   what the table's documents were read as going on from
        raises  MismatchError for another model or start, InputError for a query without a token or a whitening that
                is not beside the table
        """
        from rwkv_stream.embeddings import embed

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
        vector: Array = vectors[0]
        return vector

    def nearest(self, query: Array, *, k: int = 10, unit: str | None = None) -> list[Hit]:
        """The k rows, of this unit if one is given, with the largest cosine to query [D], best first.

        raises  UsageError for a k below 1, a query of another dimension, and a unit that the table does not have
        """
        if k < 1:
            raise UsageError(f"searching: expected k to be 1 or more, found {k}")
        if query.shape != (self.dimension,):
            raise UsageError(f"searching: expected a query of [{self.dimension}], found {list(query.shape)}")
        length = float(np.sqrt(np.square(query, dtype=np.float64).sum()))
        scaled = query.astype(np.float64) / (length or 1)
        best: list[_Found] = []
        units: set[str] = set()
        n_seen = 0
        for part, group, row, batch in self._blocks():
            scores = _cosines(batch, scaled, self._parts[part])
            wanted = np.arange(len(scores))
            if unit is not None:
                here = np.array(batch.column("unit").to_pylist(), dtype=object)
                units.update(here)
                wanted = wanted[here == unit]
            for i in wanted[np.argsort(-scores[wanted], kind="stable")[:k]].tolist():
                found = _Found(float(scores[i]), -(n_seen + i), part, group, row + i)
                if len(best) < k:
                    heapq.heappush(best, found)
                elif found > best[0]:
                    heapq.heapreplace(best, found)
                else:
                    break  # the rest of this block is no nearer
            n_seen += len(scores)
        if unit is not None and units and unit not in units:
            raise UsageError(f"searching '{self.path}': expected unit {' or '.join(sorted(units))}, found '{unit}'")
        return self._hits(sorted(best, reverse=True))

    def _blocks(self) -> Iterator[tuple[int, int, int, pa.RecordBatch]]:
        """The units and vectors of all rows in order: part, row group, first row in it, batch."""
        size = max(1, BLOCK_BYTES // (4 * self.dimension))
        for number, part in enumerate(self._parts):
            with _opened(part) as file:
                for group in range(file.num_row_groups):
                    row = 0
                    for batch in file.iter_batches(size, row_groups=[group], columns=["unit", "embedding"]):
                        yield number, group, row, batch
                        row += batch.num_rows

    def _hits(self, found: Sequence[_Found]) -> list[Hit]:
        rows: dict[_Found, dict[str, Any]] = {}
        for part, group in sorted({(one.part, one.group) for one in found}):
            here = [one for one in found if (one.part, one.group) == (part, group)]
            with _opened(self._parts[part]) as file:
                columns = [name for name in file.schema_arrow.names if name != "embedding"]
                taken = file.read_row_group(group, columns=columns).take([one.row for one in here])
            rows.update(zip(here, taken.to_pylist(), strict=True))
        hits = []
        for rank, one in enumerate(found, 1):
            row = rows[one]
            place = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
            hits.append(Hit(rank, one.score, **{name: row[name] for name in COLUMNS}, place=place))
        return hits

    def _described(self, part: Path) -> tuple[dict[str, str], int]:
        """The metadata of a part and the dimension of its vectors; raises where they are not ours."""
        import pyarrow as pa

        from rwkv_stream.embeddings import FORMAT

        with _opened(part) as file:
            schema = file.schema_arrow
        metadata = {name.decode(): value.decode("utf-8", "replace") for name, value in (schema.metadata or {}).items()}
        missing = [name for name in (*COLUMNS, "embedding") if name not in schema.names]
        missing += [name for name in ("model", "pooling", "normalized", "whitening", "budget") if name not in metadata]
        if missing or not pa.types.is_fixed_size_list(schema.field("embedding").type):
            found = f"none of {', '.join(missing)}" if missing else f"vectors of type {schema.field('embedding').type}"
            raise InputError(f"searching '{part}': expected a table that `embed` wrote, found {found}")
        if metadata.get("format", FORMAT) != FORMAT:
            raise MismatchError(
                f"searching '{part}': expected format {FORMAT}, found {metadata['format']}; update rwkv-stream"
            )
        return metadata, schema.field("embedding").type.list_size

    def _budget(self) -> int:
        try:
            return int(self.metadata["budget"])
        except ValueError as error:
            raise InputError(f"searching '{self.path}': expected a budget in its metadata, found: {error}") from error

    def _whitening(self) -> Any:
        from rwkv_stream.whitening import SUFFIX, Whitening

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


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(part) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"searching '{part}': expected a Parquet file of `embed`, found: {reason}") from error


def _start_name(start: Snapshot | State) -> str:
    """As the metadata of `embed` names it."""
    from rwkv_stream.state import State

    return f"state {start.digest()}" if isinstance(start, State) else start.id


def _cosines(batch: pa.RecordBatch, query: npt.NDArray[np.float64], part: Path) -> npt.NDArray[np.float64]:
    """Cosines [n] of rows with query [D] of length 1; 0 for a vector of zeros."""
    from rwkv_stream.embeddings import embedding

    if batch.column("embedding").null_count:
        raise InputError(f"searching '{part}': expected a vector in every row, found rows without; embed it again")
    vectors = embedding(batch).astype(np.float64)
    products = (vectors * query).sum(axis=1)  # a product of matrices may differ in the last bit from row to row
    lengths = np.sqrt(np.square(vectors).sum(axis=1))
    cosines: npt.NDArray[np.float64] = products / np.where(lengths > 0, lengths, 1)
    return cosines


# ---- the text around a hit ----


def surroundings(hits: Sequence[Hit], documents: Iterator[Document], around: int) -> dict[int, str]:
    """By rank, the text of hits with `around` bytes before and after, cut from those of the documents that they name.

    Of a unit without text (a document) only its first `around` bytes. Left out: hits of documents that are not there,
    that cannot be read, or no longer hold the row's text at its span. Each document is read once, to its last hit.
    """
    found: dict[int, str] = {}
    wanted: dict[str, list[Hit]] = {}
    for hit in hits:
        wanted.setdefault(hit.document, []).append(hit)
    for document in documents:
        if document.name in wanted:
            with contextlib.suppress(InputError):  # the row's own text serves
                found.update(_cut(document, wanted.pop(document.name), around))
        if not wanted:
            break
    return found


def _cut(document: Document, hits: Sequence[Hit], around: int) -> dict[int, str]:
    from rwkv_stream.units import Window

    def span(hit: Hit) -> tuple[int, int]:
        end = hit.byte_end if hit.text is not None else min(hit.byte_end, hit.byte_start)
        return max(0, hit.byte_start - around), end + around

    waiting = sorted(hits, key=span)
    window = Window()
    n_bytes = 0
    found: dict[int, str] = {}

    def take(limit: int | None) -> None:
        """Cut what lies before byte `limit`, or all that waits."""
        for hit in [hit for hit in waiting if limit is None or span(hit)[1] <= limit]:
            waiting.remove(hit)
            start, end = span(hit)
            if hit.text is None or hit.text.strip() in window.text(hit.byte_start, hit.byte_end):
                found[hit.rank] = window.bytes(start, end).decode("utf-8", "ignore")

    with document.text() as text:
        for piece in text:
            window.push(piece)
            n_bytes += len(piece)
            take(n_bytes)
            if not waiting:
                return found
            window.drop(min(n_bytes, min(span(hit)[0] for hit in waiting)))
        take(None)
    return found
