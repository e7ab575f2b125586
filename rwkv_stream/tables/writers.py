"""Tables of results, `.parquet` or `.jsonl` by their name: written by rows or record batches, under their final name
only when whole.

Memory holds one row group. A file that was there before stays until the new one takes its place, and for good if
writing fails. Parquet: zstd, row groups of at most 16 MiB before compression. JSON Lines: UTF-8, one object a line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from rwkv_stream.errors import OutputError, UsageError
from rwkv_stream.files import publishing

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".jsonl", ".parquet")
GROUP_BYTES = 16 << 20
BATCH_ROWS = 256  # rows held as Python objects
LOOSE_BATCHES = 32


def check_output(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse what cannot become a file, before there is anything to write.

    raises  UsageError for another suffix, OutputError where a folder has the name or there is none to hold the file
    """
    path = Path(path)
    if path.suffix not in suffixes:
        raise UsageError(f"writing '{path}': expected a name that ends with {' or '.join(suffixes)}")
    for is_wrong, reason in (
        (path.is_dir(), "this is a folder"),
        (not path.parent.is_dir(), os.strerror(errno.ENOENT)),
    ):
        if is_wrong:
            raise OutputError(f"writing '{path}': {reason}; nothing was written under that name")


class _Sink(Protocol):
    def write(self, rows: list[Mapping[str, Any]]) -> None: ...
    def write_batch(self, batch: pa.RecordBatch) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class Writer:
    """Writes rows to a table that appears when the block ends without an exception.

    >>> with Writer("scores.parquet", score_schema(), {"model": fingerprint}) as writer:
    ...     writer.write(dataclasses.asdict(unit) for unit in score(...))

    Columns are those of `schema`; `metadata` enters a Parquet file, JSON Lines has no place for it. `temp_tag` enters
    the name of the temp, as in `files.publishing`.
    Raises UsageError for another suffix, OutputError where the file cannot be written.
    """

    def __init__(
        self, path: str | Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None, *, temp_tag: str = ""
    ) -> None:
        check_output(path)
        self.path = Path(path)
        self._temp_tag = temp_tag
        self.rows = 0
        self._schema = schema.with_metadata(dict(metadata)) if metadata else schema
        self._names = list(schema.names)
        self._batch: list[Mapping[str, Any]] = []

    def __enter__(self) -> Writer:
        self._publishing = publishing(self.path, kind="table", temp_tag=self._temp_tag)
        try:
            with self._output_errors():
                file = self._publishing.__enter__()
                self._sink: _Sink = _Json(file) if self.path.suffix == ".jsonl" else _Parquet(file, self._schema)
        except BaseException as error:  # a signal, perhaps: __exit__ is not called
            with contextlib.suppress(OSError):
                self._publishing.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; each has at least the columns of the schema."""
        for row in rows:
            self._batch.append({name: row[name] for name in self._names})
            self.rows += 1
            if len(self._batch) == BATCH_ROWS:
                self._flush()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        """Add rows that are a record batch of the schema's columns."""
        self._flush()
        self.rows += batch.num_rows
        with self._output_errors():
            self._sink.write_batch(batch)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon(error)
            return
        try:
            self._flush()
            with self._output_errors():
                self._sink.finish()
                self._publishing.__exit__(None, None, None)
        except BaseException as failure:
            self._abandon(failure)
            raise

    def _abandon(self, error: BaseException) -> None:
        """Remove the temp; what closing it may have to say is not the reason."""
        self._sink.abandon()
        with contextlib.suppress(OSError):
            self._publishing.__exit__(type(error), error, error.__traceback__)

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        with self._output_errors():
            self._sink.write(batch)

    @contextlib.contextmanager
    def _output_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"writing '{self.path}': {reason}; nothing was written under that name") from error


class _Json:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, rows: list[Mapping[str, Any]]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for at in range(0, len(batch), BATCH_ROWS):
            self.write(batch[at : at + BATCH_ROWS].to_pylist())

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _Parquet:
    def __init__(self, file: IO[bytes], schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._group: list[pa.RecordBatch] = []
        self._n_loose = 0  # the last ones of the group, as they came
        self._group_bytes = 0

    def write(self, rows: list[Mapping[str, Any]]) -> None:
        import pyarrow as pa

        if rows:
            self.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))

    def write_batch(self, batch: pa.RecordBatch) -> None:
        if batch.nbytes > GROUP_BYTES and len(batch) > 1:
            half = len(batch) // 2
            self.write_batch(batch[:half])
            self.write_batch(batch[half:])
            return
        if self._group_bytes + batch.nbytes > GROUP_BYTES:
            self._end_group()
        self._group.append(batch)
        self._group_bytes += batch.nbytes
        self._n_loose += 1
        if self._n_loose == LOOSE_BATCHES:
            self._join()

    def _join(self) -> None:
        """Copy the loose batches into one: thousands of small buffers, held for long, would leave the heap of whoever
        makes them full of holes that nothing large fits into."""
        import pyarrow as pa

        loose = self._group[-self._n_loose :]
        self._group[-self._n_loose :] = pa.Table.from_batches(loose).combine_chunks().to_batches()
        self._n_loose = 0

    def _end_group(self) -> None:
        import pyarrow as pa

        if self._group:
            self._writer.write_table(pa.Table.from_batches(self._group), row_group_size=1 << 30)
        self._group, self._group_bytes, self._n_loose = [], 0, 0

    def finish(self) -> None:
        self._end_group()
        self._writer.close()

    def abandon(self) -> None:
        self._writer.is_open = False  # else it writes a footer when it is collected, and complains
