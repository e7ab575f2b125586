"""Tables: the rows of JSON lines, CSV, TSV and Parquet as texts with ids, at constant memory.

The text is in the column that was named, else in `text`, else in the only one that holds text; the id in the one that
was named, else in `id` where there is one. Rows count from 1, without the header line; those without a text count.

* JSON lines: the columns are those of the first SAMPLE_ROWS rows, whichever of these are whole.
* CSV: a field is quoted where it begins with a quote and its closing one stands before a delimiter or the end of a
  line, within FIELD_CHARS; else the quote is text, and the row is told of. Before the header may stand empty lines,
  Excel's `sep=;` and comments (`#`); the delimiter is the one that the header has most of, outside its quotes.
* Parquet: bytes are text where their column was named, ids of bytes are text or hexadecimal. A row group that is
  damaged is left out.

JSON lines and CSV are held row by row, of at most ROW_BYTES; of Parquet some 1 MiB of rows and what pyarrow holds of
the two columns: a page of each, and its dictionary.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.encodings import utf8
from rwkv_stream.text.readers.kinds import is_tab_separated
from rwkv_stream.text.readers.streams import DamageError, Opened, printable, said

log = logging.getLogger(__name__)

ROW_BYTES = 16 * 2**20
MOST_DIGITS = 4300  # of a whole number that Python reads
FIELD_CHARS = 2**20
SAMPLE_ROWS = 100
SAMPLE_BYTES = 2**20
BATCH_BYTES = 2**20
BATCH_ROWS = 4096
_DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of columns, None where they were not given."""

    text: str | None = None
    id: str | None = None


class TableRow(NamedTuple):
    """A row; `text` is empty where it has none, `problem` says why it is no row, `flaw` what is odd with one that is.

    share  of the table that has been read by then, None where the count of bytes tells
    """

    number: int
    id: str | int | None
    text: str
    problem: str | None = None
    share: float | None = None
    flaw: str | None = None


def rows(kind: str, opened: Opened, pieces: Iterable[bytes], columns: Columns, hint: str | None) -> Iterator[TableRow]:
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


def _json_rows(pieces: Iterable[bytes], columns: Columns, name: str) -> Iterator[TableRow]:
    values = json_objects(pieces)
    wanted, text = columns.text or "text", None
    held: list[dict[str, Any] | str] = []  # until the column of the text is known
    n_bytes = number = 0
    for value, size in values:
        if text is None and (held or not isinstance(value, str)):
            held.append(value)
            n_bytes += size
            if len(held) < SAMPLE_ROWS and n_bytes < SAMPLE_BYTES and wanted not in value:
                continue
            text = columns.text or _json_text(held, columns, name)
        else:
            held.append(value)
        for number, waiting in enumerate(held, number + 1):  # noqa: B020
            yield _json_row(number, waiting, text, columns)
        held.clear()
    if held:
        text = _json_text(held, columns, name)
        for number, waiting in enumerate(held, number + 1):  # noqa: B020
            yield _json_row(number, waiting, text, columns)


def _json_text(values: Sequence[dict[str, Any] | str], columns: Columns, name: str) -> str:
    """The column of the text in the first rows."""
    whole = [value for value in values if isinstance(value, dict)]
    names = list(dict.fromkeys(column for value in whole for column in value))
    if columns.text is not None or "text" in names:
        return _chosen(names, [], Columns(columns.text), name)[0]
    found = Counter(column for value in whole for column, cell in value.items() if isinstance(cell, str))
    found.pop(columns.id or "id", None)
    best = max(found.values(), default=0)
    text = _chosen(names, [column for column in found if found[column] == best], Columns(), name)[0]
    log.warning("'%s': the text is taken from column '%s', which is the one that holds text", name, printable(text))
    return text


def _json_row(number: int, value: dict[str, Any] | str, text: str | None, columns: Columns) -> TableRow:
    if isinstance(value, str):
        return TableRow(number, None, "", value)
    assert text is not None, "rows that are whole have decided it"
    missing = next((column for column in (text, columns.id) if column is not None and column not in value), None)
    id, cell = _id(value.get(columns.id or "id")), value.get(text)
    if missing is not None:
        return TableRow(number, id, "", f"expected a column '{missing}', found {_shown(list(value))}")
    if cell is not None and not isinstance(cell, str):
        return TableRow(number, id, "", f"expected text in column '{text}', found {_type(cell)}")
    return TableRow(number, id, cell or "")


def _json(line: bytes) -> Any:
    """What a line says; numbers of more digits than Python reads stay as they are written, and cost no row."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(line, parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else digits)


def json_objects(pieces: Iterable[bytes]) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """Of JSON lines the object of each row, or why it is none; and its size in bytes."""
    for line in _lines(pieces):
        if line is None:
            yield f"expected at most {ROW_BYTES >> 20} MiB, found more", ROW_BYTES
        elif line.strip():
            try:
                value = _json(line)
            except RecursionError:
                yield "expected JSON, found it nested too deep", len(line)
                continue
            except ValueError as error:
                yield f"expected JSON, found an error: {error}", len(line)
                continue
            yield value if isinstance(value, dict) else f"expected a JSON object, found {_type(value)}", len(line)


def _id(value: Any) -> str | int | None:
    """An id as it is where it is text or a whole number, bytes as text or hexadecimal, dates as text, else JSON."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
        value = value.hex() if "\ufffd" in text or not text.isprintable() else text
    elif isinstance(value, uuid.UUID):
        value = str(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    is_json = isinstance(value, bool | float | dict | list)
    text = json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
    return utf8(text)[0].decode()  # JSON may hold half a character


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


def _csv_rows(pieces: Iterable[bytes], columns: Columns, name: str, delimiter: str | None) -> Iterator[TableRow]:
    table = _Csv(pieces)
    header = table.header(delimiter)
    if header is None:
        return
    text, id = _chosen(header, header, columns, name)
    i_text, i_id = header.index(text), header.index(id) if id is not None else None
    for number, (cells, problem) in enumerate(table, 1):
        if cells is None:
            yield TableRow(number, None, "", problem)
        elif not max(i_text, i_id or 0) < len(cells) <= len(header):
            found = f"expected {len(header)} columns, found {len(cells)}"
            yield TableRow(number, None, "", f"{found}; {problem}" if problem else found)
        else:
            yield TableRow(number, cells[i_id] if i_id is not None else None, cells[i_text], flaw=problem)


class _Csv(Iterator[tuple["list[str] | None", "str | None"]]):
    """The rows of CSV as their fields, and what is odd with them; None for a row of more than ROW_BYTES."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = ""
        self._at = 0  # where the next row begins
        self._newline = "\n"
        self._delimiter = ","

    def header(self, delimiter: str | None) -> list[str] | None:
        """The names of the columns, None where there are no lines; what stands before them is passed over."""
        while len(self._held) < FIELD_CHARS and "\n" not in self._held and self._read():
            pass
        self._newline = "\n" if "\n" in self._held else "\r"
        comment = ""
        while (end := self._line_end(self._at)) is not None and self._at < len(self._held):
            line = self._held[self._at : end].strip("\ufeff\r")
            if found := re.fullmatch("sep=(.)", line, re.IGNORECASE):
                delimiter = found[1]
            elif line.startswith("#"):
                comment = line
            elif line.strip():
                break
            self._at = end + 1
        if delimiter is None:
            unquoted = self._unquoted()
            delimiter = max(_DELIMITERS, key=unquoted.count)  # of equals the first
        self._delimiter = delimiter
        if comment and comment.count(delimiter) == self._unquoted().count(delimiter) > 0:
            return comment.split(delimiter)  # as `#id,text`
        row, _ = next(self, (None, None))
        return row

    def _unquoted(self) -> str:
        """What the first row has outside quotes."""
        quoted = False
        at = self._at
        while (end := self._line_end(at)) is not None:
            line = self._held[at:end]
            quoted ^= line.count('"') % 2 == 1
            if not quoted or end - self._at > FIELD_CHARS or end >= len(self._held):
                break
            at = end + 1
        row = self._held[self._at : end if not quoted else self._line_end(self._at)]
        return re.sub('"[^"]*"', "", row)

    def __next__(self) -> tuple[list[str] | None, str | None]:
        while True:
            if self._at > FIELD_CHARS // 8:
                self._held, self._at = self._held[self._at :], 0
            end = self._line_end(self._at)
            if end is None:
                return self._overlong()
            if self._at >= len(self._held):
                raise StopIteration
            line = self._held[self._at : end]
            if line.strip("\r"):
                break
            self._at = end + 1
        if '"' in line:
            return self._quoted_row()
        self._at = end + 1
        return self._ended(line).split(self._delimiter), None

    def _quoted_row(self) -> tuple[list[str] | None, str | None]:
        fields: list[str] = []
        flaw = None
        at = self._at
        while True:
            if self._char(at) == '"':
                closing = self._closing(at)
                if closing is not None:
                    fields.append(self._held[at + 1 : closing].replace('""', '"'))
                    at = closing + 1
                    if self._char(at) == self._delimiter:
                        at += 1
                        continue
                    break
                flaw = flaw or f"the quote before field {len(fields) + 1} is never closed, and is taken as text"
            end = self._line_end(at)
            if end is None:
                return self._overlong()
            stop = self._held.find(self._delimiter, at, end)
            if stop < 0:
                fields.append(self._ended(self._held[at:end]))
                at = end
                break
            fields.append(self._held[at:stop])
            at = stop + 1
        if at - self._at > ROW_BYTES:
            return self._overlong()
        end = self._line_end(at)  # a carriage return may stand before it
        self._at = len(self._held) if end is None else end + 1
        return fields, flaw

    def _closing(self, start: int) -> int | None:
        """The quote that closes a field; None where there is none before a delimiter or the end of a line, or where
        another field begins before it."""
        at = start + 1
        while at - start <= FIELD_CHARS:
            found = self._held.find('"', at)
            if found < 0:
                at = len(self._held)
                if not self._read():
                    return None
                continue
            following = self._char(found + 1)
            if following == '"':
                at = found + 2
                continue
            is_end = following in ("", self._newline) or (following == "\r" and self._char(found + 2) == "\n")
            if is_end or following == self._delimiter:
                return found
            if found - 1 > start and self._held[found - 1] in (self._delimiter, self._newline):
                return None
            at = found + 1
        return None

    def _ended(self, line: str) -> str:
        return line.removesuffix("\r") if self._newline == "\n" else line

    def _line_end(self, start: int) -> int | None:
        """Where the line ends that holds `start`; None where that is more than ROW_BYTES away."""
        at = start
        while (end := self._held.find(self._newline, at)) < 0:
            at = len(self._held)
            if at - start > ROW_BYTES:
                return None
            if not self._read():
                return at
        return end if end - start <= ROW_BYTES else None

    def _overlong(self) -> tuple[None, str]:
        """Pass over the rest of a line."""
        while (end := self._held.find(self._newline, self._at)) < 0:
            self._held, self._at = "", 0
            if not self._read():
                break
        self._at = end + 1
        return None, f"expected a row of at most {ROW_BYTES >> 20} MiB, found a longer one"

    def _char(self, at: int) -> str:
        while at >= len(self._held) and self._read():
            pass
        return self._held[at : at + 1]

    def _read(self) -> bool:
        piece = next(self._pieces, b"")
        self._held += piece.decode()
        return bool(piece)


# ---- Parquet ----


def _parquet_rows(opened: Opened, columns: Columns) -> Iterator[TableRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(opened.file(), pre_buffer=False, buffer_size=BATCH_BYTES) as table:
            schema = table.schema_arrow
            texts = [field.name for field in schema if _holds_text(field.type)]
            text, id = _chosen(schema.names, texts, columns, opened.name)
            if text not in texts and not _holds_bytes(schema.field(text).type):
                raise InputError(
                    f"reading '{opened.name}': expected text in column '{text}', found {schema.field(text).type}; "
                    "check --text-column"
                )
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            n_rows = sum(group.num_rows for group in groups)
            n_bytes = sum(group.total_byte_size for group in groups)
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * n_rows // max(1, n_bytes)))
            before = 0
            for i, group in enumerate(groups):
                number = before
                try:
                    for row in _group_rows(table, i, text, id, batch_rows):
                        number += 1
                        yield row._replace(number=number, share=number / n_rows)
                except (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError) as error:
                    lost = f"expected {group.num_rows} whole rows from {before + 1} on, found damage after "
                    yield TableRow(number + 1, None, "", f"{lost}{number - before} ({said(error)})")
                before += group.num_rows
    except (pa.ArrowException, ValueError, KeyError, NotImplementedError) as error:
        raise DamageError(said(error)) from error


def _group_rows(table: Any, i: int, text: str, id: str | None, batch_rows: int) -> Iterator[TableRow]:
    """The rows of a row group, without numbers."""
    import pyarrow as pa

    wanted = [text] if id is None or id == text else [text, id]
    for batch in table.iter_batches(batch_size=batch_rows, row_groups=[i], columns=wanted, use_threads=False):
        cells = batch.column(text).cast(pa.large_binary()).to_pylist()
        ids = _ids(batch.column(id)) if id is not None else [(None, None)] * len(cells)
        for cell, (row_id, flaw) in zip(cells, ids, strict=True):
            yield TableRow(0, row_id, str(cell or b"", "utf-8", "surrogateescape"), flaw=flaw)


def _ids(column: Any) -> Iterator[tuple[str | int | None, str | None]]:
    """The ids of a column, and what is odd with each."""
    import pyarrow as pa

    if _holds_text(column.type):
        column = column.cast(pa.large_binary())
    for cell in column:
        try:
            yield _id(cell.as_py()), None
        except (ValueError, OverflowError) as error:  # a date that Python has no number for
            yield None, f"its id is left out: {said(error)}"


def _value_type(type: Any) -> Any:
    import pyarrow as pa

    return type.value_type if pa.types.is_dictionary(type) else type


def _holds_text(type: Any) -> bool:
    import pyarrow as pa

    type = _value_type(type)
    return any(is_text(type) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _holds_bytes(type: Any) -> bool:
    import pyarrow as pa

    type = _value_type(type)
    return any(
        is_bytes(type)
        for is_bytes in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, _is_fixed)
    )


def _is_fixed(type: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_fixed_size_binary(type))
