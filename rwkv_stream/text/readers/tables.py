"""Tables: the rows of JSON lines, CSV, TSV and Parquet as texts with ids, at constant memory.

The text is in the column that was named, else in `text`, else in the only one that holds text; the id in the one that
was named, else in `id` where there is one. Rows count from 1, without the header line; those without a text count.

JSON lines and CSV are held row by row, of at most ROW_BYTES; of Parquet some 1 MiB of rows and what pyarrow holds of
the two columns: a page of each, and its dictionary.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.kinds import is_tab_separated
from rwkv_stream.text.readers.streams import DamageError, Opened, printable, said

ROW_BYTES = 16 * 2**20
BATCH_BYTES = 2**20
BATCH_ROWS = 4096
_DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of columns, None where they were not given."""

    text: str | None = None
    id: str | None = None


class Row(NamedTuple):
    """A row; `text` is empty where it has none, `problem` says why it is no row.

    share  of the table that has been read by then, None where the count of bytes tells
    """

    number: int
    id: str | int | None
    text: str
    problem: str | None = None
    share: float | None = None


def rows(kind: str, opened: Opened, pieces: Iterable[bytes], columns: Columns, hint: str | None) -> Iterator[Row]:
    """The rows of a table, `pieces` its UTF-8 where it is text. Raises InputError, DamageError."""
    if kind == "jsonl":
        return _json_rows(pieces, columns, opened.name)
    if kind == "csv":
        return _csv_rows(pieces, columns, opened.name, "\t" if is_tab_separated(hint) else None)
    return _parquet_rows(opened, columns)


def _chosen(names: Sequence[str], texts: Sequence[str], columns: Columns, name: str) -> tuple[str, str | None]:
    """The column of the text and that of the id, of those in a table; `texts` are those that hold text."""
    text = columns.text or ("text" if "text" in names else None)
    if text is None:
        others = [column for column in texts if column != (columns.id or "id")]
        if len(others) != 1:
            raise InputError(
                f"reading '{name}': expected a column 'text', or one alone that holds text, found {_shown(names)}; "
                "name it with --text-column"
            )
        text = others[0]
    if columns.id is not None and columns.id not in names:
        raise InputError(
            f"reading '{name}': expected a column '{columns.id}', found {_shown(names)}; check --id-column"
        )
    if text not in names:
        raise InputError(f"reading '{name}': expected a column '{text}', found {_shown(names)}; check --text-column")
    return text, columns.id or ("id" if "id" in names else None)


def _shown(names: Sequence[str]) -> str:
    return "columns " + ", ".join(printable(name)[:40] for name in names[:12]) + (", …" if len(names) > 12 else "")


# ---- JSON lines ----


def _json_rows(pieces: Iterable[bytes], columns: Columns, name: str) -> Iterator[Row]:
    text = columns.text
    number = 0
    for line in _lines(pieces):
        if line is not None and not line.strip():
            continue
        number += 1
        if line is None:
            yield Row(number, None, "", f"expected at most {ROW_BYTES >> 20} MiB, found more")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, None, "", f"expected JSON, found an error: {error}")
            continue
        if not isinstance(value, dict):
            yield Row(number, None, "", f"expected a JSON object, found {_type(value)}")
            continue
        if text is None:
            texts = [column for column, cell in value.items() if isinstance(cell, str) and column != columns.id]
            text = _chosen(list(value), texts, Columns(), name)[0]
        missing = next((column for column in (text, columns.id) if column is not None and column not in value), None)
        id, cell = _id(value.get(columns.id or "id")), value.get(text)
        if missing is not None:
            yield Row(number, id, "", f"expected a column '{missing}', found {_shown(list(value))}")
        elif cell is not None and not isinstance(cell, str):
            yield Row(number, id, "", f"expected text in column '{text}', found {_type(cell)}")
        else:
            yield Row(number, id, cell or "")


def _id(value: Any) -> str | int | None:
    """An id as it is where it is text or a whole number, else as JSON."""
    if value is None or (isinstance(value, (str, int)) and not isinstance(value, bool)):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines, with their newlines; None for one of more than ROW_BYTES."""
    parts: list[bytes] = []
    n_held = 0
    for piece in pieces:
        start = 0
        while start < len(piece):
            end = piece.find(b"\n", start) + 1 or len(piece)
            n_held += end - start
            if n_held <= ROW_BYTES:
                parts.append(piece[start:end])
            else:
                parts.clear()
            if piece[end - 1] == 10:
                yield b"".join(parts) if n_held <= ROW_BYTES else None
                parts, n_held = [], 0
            start = end
    if n_held:
        yield b"".join(parts) if n_held <= ROW_BYTES else None


# ---- CSV ----


def _csv_rows(pieces: Iterable[bytes], columns: Columns, name: str, delimiter: str | None) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))  # the module's own, and for all that use it
    lines = _Records(pieces)
    number = 0
    try:
        header = next(lines, None)
        if header is None:
            return
        if delimiter is None:
            delimiter = max(_DELIMITERS, key=header.count)  # of equals the first
        names = next(csv.reader([header], delimiter=delimiter))
        text, id = _chosen(names, names, columns, name)
        i_text, i_id = names.index(text), names.index(id) if id is not None else None
        for cells in csv.reader(lines, delimiter=delimiter):
            lines.n_bytes = 0
            if not cells:
                continue  # an empty line
            number += 1
            if not max(i_text, i_id or 0) < len(cells) <= len(names):
                yield Row(number, None, "", f"expected {len(names)} columns, found {len(cells)}")
            else:
                yield Row(number, cells[i_id] if i_id is not None else None, cells[i_text])
    except csv.Error as error:
        raise InputError(
            f"reading '{name}': expected CSV, found at row {number + 1}, near line {lines.number}: {error}; "
            "check the quotes there"
        ) from error


class _Records(Iterator[str]):
    """Lines for a reader of CSV, which may take several for a row, but of at most ROW_BYTES together."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._lines = _lines(pieces)
        self.n_bytes = self.number = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.n_bytes += len(line or b"")
        if line is None or self.n_bytes > ROW_BYTES:
            raise csv.Error(f"a row of more than {ROW_BYTES >> 20} MiB")
        return line.decode()


# ---- Parquet ----


def _parquet_rows(opened: Opened, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(opened.file(), pre_buffer=False, buffer_size=BATCH_BYTES) as table:
            schema = table.schema_arrow
            texts = [field.name for field in schema if _holds_text(field.type)]
            text, id = _chosen(schema.names, texts, columns, opened.name)
            if text not in texts:
                raise InputError(
                    f"reading '{opened.name}': expected text in column '{text}', found {schema.field(text).type}; "
                    "check --text-column"
                )
            n_rows, n_bytes = table.metadata.num_rows, 0
            for i in range(table.metadata.num_row_groups):
                n_bytes += table.metadata.row_group(i).total_byte_size
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * n_rows // max(1, n_bytes)))
            number = 0
            wanted = [text] if id is None or id == text else [text, id]
            for batch in table.iter_batches(batch_size=batch_rows, columns=wanted, use_threads=False):
                cells = batch.column(text).cast(pa.large_binary()).to_pylist()
                ids = batch.column(id).to_pylist() if id is not None else [None] * len(cells)
                for cell, row_id in zip(cells, ids, strict=True):
                    number += 1
                    yield Row(number, _id(row_id), str(cell or b"", "utf-8", "replace"), share=number / n_rows)
    except (pa.ArrowException, ValueError, KeyError, NotImplementedError) as error:
        raise DamageError(said(error)) from error


def _holds_text(type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(type):
        type = type.value_type
    return any(is_text(type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
