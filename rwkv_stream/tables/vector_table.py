"""A table of embeddings on disk: a Parquet file of `embed`, or a folder of such part files in the order of their names.

Rows are counted through all parts. They are read block by block, BLOCK_BYTES of vectors at a time, or a few of them,
for which only their row groups are read. So memory depends on the size of a row group, not on the number of rows.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import InputError, MismatchError
from rwkv_stream.tables.columns import FORMAT, UNIT_COLUMNS, embedding

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rwkv_stream.tables.columns import Float32s

BLOCK_BYTES = 4 << 20
MADE_BY = ("model", "pooling", "normalized", "whitening", "budget")  # metadata that every part has
DECIDES = ("model", "pooling", "normalized", "whitening", "start")  # metadata that parts must agree in


@dataclass(frozen=True, slots=True)
class PartFile:
    """A part as it was when the table was opened."""

    path: Path
    metadata: dict[str, str]
    dimension: int
    size: int
    mtime_ns: int
    group_rows: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


@dataclass(frozen=True, slots=True)
class _RowGroup:
    """`first` of the table's rows and so many, in one row group of a part."""

    part: Path
    number: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a part: their numbers in the table, their columns."""

    rows: Sequence[int]
    part: Path
    batch: pa.RecordBatch | pa.Table

    @property
    def units(self) -> npt.NDArray[np.object_]:
        return np.array(self.batch.column("unit").to_pylist(), dtype=object)

    @property
    def vectors(self) -> Float32s:
        """Their vectors [n, D]. Raises InputError for a row without one."""
        if self.batch.column("embedding").null_count:
            raise InputError(
                f"searching '{self.part}': expected a vector in every row, found rows without; embed it again"
            )
        return embedding(self.batch)


class VectorTable:
    """A table of embeddings, opened.

    parts      its files, one or more
    metadata   of the first: what made the vectors
    dimension  of a vector
    raises     InputError (no such table, or none of ours), MismatchError (a newer format, parts made in unlike ways)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        paths = sorted(part for part in self.path.glob("*.parquet") if not part.name.startswith("."))
        if not self.path.is_dir():
            paths = [self.path]
        if not paths:
            raise InputError(f"searching '{path}': expected .parquet files in the folder, found none")
        first = _described(paths[0])
        self.parts = [first]
        self.metadata, self.dimension = first.metadata, first.dimension
        for part in paths[1:]:
            self.parts.append(_described(part))
            self._check_alike(self.parts[-1])
        self._groups: list[_RowGroup] = []
        self.rows = 0
        for part_file in self.parts:
            for number, rows in enumerate(part_file.group_rows):
                self._groups.append(_RowGroup(part_file.path, number, self.rows, rows))
                self.rows += rows

    def _check_alike(self, part: PartFile) -> None:
        for name in DECIDES:
            if part.metadata.get(name) != self.metadata.get(name):
                raise MismatchError(
                    f"searching '{self.path}': expected parts that were made alike, found {name} "
                    f"'{self.metadata.get(name)}' in '{self.parts[0].path.name}' and '{part.metadata.get(name)}' in "
                    f"'{part.path.name}'; search them singly"
                )
        if part.dimension != self.dimension:
            raise InputError(f"searching '{part.path}': expected vectors of {self.dimension}, found {part.dimension}")

    def blocks(self, first: int = 0, end: int | None = None) -> Iterator[Block]:
        """Units and vectors of the rows from first to end, in order."""
        end = self.rows if end is None else end
        size = max(1, BLOCK_BYTES // (4 * self.dimension))
        wanted = (group for group in self._groups if group.first < end and first < group.first + group.rows)
        for part, groups in itertools.groupby(wanted, lambda group: group.part):
            with _open_part(part) as file:
                for group in groups:
                    row = group.first
                    for batch in file.iter_batches(size, row_groups=[group.number], columns=["unit", "embedding"]):
                        skipped = max(0, first - row)
                        here = batch[skipped : max(skipped, end - row)]
                        if here.num_rows:
                            yield Block(range(row + skipped, row + skipped + here.num_rows), part, here)
                        row += batch.num_rows

    def take(self, rows: Iterable[int], columns: Sequence[str] | None = None) -> Iterator[Block]:
        """These rows by the row groups that they are in, in rising order; all columns but the vectors, or these."""
        place = functools.partial(bisect.bisect_right, [group.first + group.rows for group in self._groups])
        for at, grouped in itertools.groupby(sorted(rows), place):
            group, here = self._groups[at], list(grouped)
            with _open_part(group.part) as file:
                names = [name for name in file.schema_arrow.names if name != "embedding"]
                read = file.read_row_group(group.number, columns=names if columns is None else list(columns))
            yield Block(here, group.part, read.take([row - group.first for row in here]))


def _described(part: Path) -> PartFile:
    """Raises where a part is none of ours."""
    import pyarrow as pa

    with _table_errors(part):
        found = part.stat()
    with _open_part(part) as file:
        schema = file.schema_arrow
        group_rows = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
    metadata = {name.decode(): value.decode("utf-8", "replace") for name, value in (schema.metadata or {}).items()}
    missing = [name for name in (*UNIT_COLUMNS, "embedding") if name not in schema.names]
    missing += [name for name in MADE_BY if name not in metadata]
    if missing or not pa.types.is_fixed_size_list(schema.field("embedding").type):
        reason = f"none of {', '.join(missing)}" if missing else f"vectors of type {schema.field('embedding').type}"
        raise InputError(f"searching '{part}': expected a table that `embed` wrote, found {reason}")
    if metadata.get("format", FORMAT) != FORMAT:
        raise MismatchError(
            f"searching '{part}': expected format {FORMAT}, found {metadata['format']}; update rwkv-stream"
        )
    dimension = schema.field("embedding").type.list_size
    return PartFile(part, metadata, dimension, found.st_size, found.st_mtime_ns, group_rows)


@contextlib.contextmanager
def _open_part(part: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow.parquet as pq

    with _table_errors(part), pq.ParquetFile(part) as file:
        yield file


@contextlib.contextmanager
def _table_errors(part: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"searching '{part}': expected a Parquet file of `embed`, found: {reason}") from error
