"""Search: the rows of embeddings nearest to a query.

>>> for hit in search("Who keeps the light?", "books.parquet", model=model, k=5): print(hit.score, hit.text)

A table is a Parquet file of `embed`, or a folder of such part files in the order of their names. It is scanned block
by block, BLOCK_BYTES of vectors at a time; the k best are kept, and only their row groups are read again, for the
text. So memory depends on k and on the size of a row group (64 MiB), not on the number of rows.

A row's cosine is summed in fp64 in an order that depends on the dimension alone: equal vectors have equal scores,
wherever they stand, and of equals the first row of the table comes first.

A folder of more than ROWS rows is searched through an approximate index (`vector_index`), which the first search puts
beside the parts. The rows that it proposes are scored as above, from the table; it may miss some of the nearest.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import heapq
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
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
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.tables import vector_index
    from rwkv_stream.text.readers import Document

    Array = npt.NDArray[np.float32]

BLOCK_BYTES = 4 << 20
ROWS = 1_000_000  # a folder of more is indexed
DECIDES = ("model", "pooling", "normalized", "whitening", "start")  # metadata that parts must agree in
COLUMNS = ("document", "unit", "index", "text", "byte_start", "byte_end", "token_start", "token_end")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hit:
    """A row of the table; `score` is its cosine with the query, `place` what further columns say of it (page, line …).

    text is None where the table has none. `search` says how the row was found, "exact" or "approximate".
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
    search: str = "exact"


@dataclass(frozen=True, slots=True, order=True)
class _Found:
    """A row that may be among the nearest; the greater one is nearer."""

    score: float
    order: int  # minus its number

    @property
    def row(self) -> int:
        return -self.order


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group: `first` of the table's rows and so many."""

    part: Path
    number: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Described:
    """A part as it was when it was opened."""

    metadata: dict[str, str]
    dimension: int
    size: int
    mtime_ns: int
    group_rows: tuple[int, ...]


def search(
    query: str | Array,
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
    raises     InputError (no such table, or none of ours), MismatchError (a newer format, parts made in unlike ways)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._parts = sorted(part for part in self.path.glob("*.parquet") if not part.name.startswith("."))
        if not self.path.is_dir():
            self._parts = [self.path]
        if not self._parts:
            raise InputError(f"searching '{path}': expected .parquet files in the folder, found none")
        self._found = [self._described(self._parts[0])]
        self.metadata, self.dimension = self._found[0].metadata, self._found[0].dimension
        for part in self._parts[1:]:
            self._found.append(self._described(part))
            metadata, dimension = self._found[-1].metadata, self._found[-1].dimension
            for name in DECIDES:
                if metadata.get(name) != self.metadata.get(name):
                    raise MismatchError(
                        f"searching '{path}': expected parts that were made alike, found {name} "
                        f"'{self.metadata.get(name)}' in '{self._parts[0].name}' and '{metadata.get(name)}' in "
                        f"'{part.name}'; search them singly"
                    )
            if dimension != self.dimension:
                raise InputError(f"searching '{part}': expected vectors of {self.dimension}, found {dimension}")
        self._groups: list[_Group] = []
        self.rows = 0
        for part, found in zip(self._parts, self._found, strict=True):
            for number, rows in enumerate(found.group_rows):
                self._groups.append(_Group(part, number, self.rows, rows))
                self.rows += rows

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
        vector: Array = vectors[0]
        return vector

    def nearest(self, query: Array, *, k: int = 10, unit: str | None = None, exact: bool = False) -> list[Hit]:
        """The k rows, of this unit if one is given, with the largest cosine to query [D], best first.

        exact   even if the table is a folder of more than ROWS rows; so it is, too, where there can be no index
        raises  UsageError for a k below 1, a query of another dimension, and a unit that the table does not have
        """
        if k < 1:
            raise UsageError(f"searching: expected k to be 1 or more, found {k}")
        if query.shape != (self.dimension,):
            raise UsageError(f"searching: expected a query of [{self.dimension}], found {list(query.shape)}")
        length = float(np.sqrt(np.square(query, dtype=np.float64).sum()))
        scaled = query.astype(np.float64) / (length or 1)
        index = None if exact or self.rows <= ROWS or not self.path.is_dir() else self._index()
        if index is not None:
            found = self._approximately(index, scaled, k, unit)
            if len(found) == k:
                return self._hits(found, "approximate")
        return self._hits(self._exactly(scaled, k, unit), "exact")

    def _exactly(self, query: npt.NDArray[np.float64], k: int, unit: str | None) -> list[_Found]:
        best: list[_Found] = []
        units: set[str] = set()
        for first, part, batch in self._blocks():
            scores = _cosines(batch, query, part)
            wanted = np.arange(len(scores))
            if unit is not None:
                here = _units(batch)
                units.update(here)
                wanted = wanted[here == unit]
            for i in wanted[np.argsort(-scores[wanted], kind="stable")[:k]].tolist():
                found = _Found(float(scores[i]), -(first + i))
                if len(best) < k:
                    heapq.heappush(best, found)
                elif found > best[0]:
                    heapq.heapreplace(best, found)
                else:
                    break  # the rest of this block is no nearer
        self._check_unit(unit, units)
        return sorted(best, reverse=True)

    def _approximately(
        self, index: vector_index.VectorIndex, query: npt.NDArray[np.float64], k: int, unit: str | None
    ) -> list[_Found]:
        """Those that the index proposes, scored by the table; fewer than k where it cannot find so many."""
        self._check_unit(unit, index.units)
        scores: dict[int, float] = {}
        for group, rows in self._by_group(index.nearest(query, 2 * k + 10, unit).tolist()):
            batch = _taken(group, ["embedding"], rows)
            scores.update(zip(rows, _cosines(batch, query, group.part).tolist(), strict=True))
        first_rows = heapq.nlargest(k, (_Found(score, -row) for row, score in scores.items()))
        found = (_Found(one.score, -row) for one in first_rows for row in (one.row, *index.repeats(one.row)[: k - 1]))
        return heapq.nlargest(k, found)

    def _index(self) -> vector_index.VectorIndex | None:
        from rwkv_stream.tables.vector_index import Part, VectorIndex

        firsts = itertools.accumulate((sum(found.group_rows) for found in self._found), initial=0)
        parts = [
            Part(part.name, found.size, found.mtime_ns, first, sum(found.group_rows))
            for part, found, first in zip(self._parts, self._found, firsts, strict=False)
        ]
        try:
            return VectorIndex(self.path, parts, self.dimension, self._vectors)
        except ImportError:
            reason = "an index needs usearch; pip install 'rwkv-stream[index]'"
        except BlockingIOError:
            reason = "another process is making the index"
        except OSError as error:
            reason = f"there can be no index, {error.strerror or error}"
        log.warning("searching '%s': all %d rows, exactly; %s", self.path, self.rows, reason)
        return None

    def _vectors(self, first: int, end: int) -> Iterator[tuple[int, npt.NDArray[np.object_], Array]]:
        """Rows of the table, block by block: the first one's number, units [n], vectors [n, D]."""
        for number, part, batch in self._blocks(first, end):
            yield number, _units(batch), _embedding(batch, part)

    def _check_unit(self, unit: str | None, units: set[str]) -> None:
        if unit is not None and units and unit not in units:
            raise UsageError(f"searching '{self.path}': expected unit {' or '.join(sorted(units))}, found '{unit}'")

    def _blocks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, Path, pa.RecordBatch]]:
        """Units and vectors of the rows from first to end, in order: the first one's number, its part, batch."""
        end = self.rows if end is None else end
        size = max(1, BLOCK_BYTES // (4 * self.dimension))
        wanted = (group for group in self._groups if group.first < end and first < group.first + group.rows)
        for part, groups in itertools.groupby(wanted, lambda group: group.part):
            with _opened(part) as file:
                for group in groups:
                    row = group.first
                    for batch in file.iter_batches(size, row_groups=[group.number], columns=["unit", "embedding"]):
                        skipped = max(0, first - row)
                        here = batch[skipped : max(skipped, end - row)]
                        if here.num_rows:
                            yield row + skipped, part, here
                        row += batch.num_rows

    def _by_group(self, rows: Iterable[int]) -> Iterator[tuple[_Group, list[int]]]:
        """Rows by the row groups that they are in."""
        place = functools.partial(bisect.bisect_right, [group.first + group.rows for group in self._groups])
        for at, here in itertools.groupby(sorted(rows), place):
            yield self._groups[at], list(here)

    def _hits(self, found: Sequence[_Found], search: str) -> list[Hit]:
        rows: dict[int, dict[str, Any]] = {}
        for group, here in self._by_group(one.row for one in found):
            with _opened(group.part) as file:
                columns = [name for name in file.schema_arrow.names if name != "embedding"]
            rows.update(zip(here, _taken(group, columns, here).to_pylist(), strict=True))
        hits = []
        for rank, one in enumerate(found, 1):
            row = rows[one.row]
            place = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
            hits.append(Hit(rank, one.score, **{name: row[name] for name in COLUMNS}, place=place, search=search))
        return hits

    def _described(self, part: Path) -> _Described:
        """Raises where a part is none of ours."""
        import pyarrow as pa

        from rwkv_stream.tables.embeddings import FORMAT

        with _explained(part):
            seen = part.stat()
        with _opened(part) as file:
            schema = file.schema_arrow
            group_rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
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
        dimension = schema.field("embedding").type.list_size
        return _Described(metadata, dimension, seen.st_size, seen.st_mtime_ns, group_rows)

    def _budget(self) -> int:
        try:
            return int(self.metadata["budget"])
        except ValueError as error:
            raise InputError(f"searching '{self.path}': expected a budget in its metadata, found: {error}") from error

    def _whitening(self) -> Any:
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


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow.parquet as pq

    with _explained(part), pq.ParquetFile(part) as file:
        yield file


@contextlib.contextmanager
def _explained(part: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"searching '{part}': expected a Parquet file of `embed`, found: {reason}") from error


def _start_name(start: Snapshot | State) -> str:
    """As the metadata of `embed` names it."""
    from rwkv_stream.model.state import State

    return f"state {start.digest()}" if isinstance(start, State) else start.id


def _taken(group: _Group, columns: Sequence[str], rows: Sequence[int]) -> pa.Table:
    """Of a row group these columns of these rows."""
    with _opened(group.part) as file:
        return file.read_row_group(group.number, columns=columns).take([row - group.first for row in rows])


def _units(batch: pa.RecordBatch) -> npt.NDArray[np.object_]:
    return np.array(batch.column("unit").to_pylist(), dtype=object)


def _embedding(batch: pa.RecordBatch | pa.Table, part: Path) -> Array:
    """The vectors [n, D] of rows of a part."""
    from rwkv_stream.tables.embeddings import embedding

    if batch.column("embedding").null_count:
        raise InputError(f"searching '{part}': expected a vector in every row, found rows without; embed it again")
    return embedding(batch)


def _cosines(batch: pa.RecordBatch | pa.Table, query: npt.NDArray[np.float64], part: Path) -> npt.NDArray[np.float64]:
    """Cosines [n] of rows with query [D] of length 1; 0 for a vector of zeros."""
    vectors = _embedding(batch, part).astype(np.float64)
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
    from rwkv_stream.text.units import Window

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
