"""The texts that a model is made from: sources of documents, and documents as tokens in a work folder.

A document is a list of pieces, of which some are learnt from and the others only read. Its tokens are those of its
pieces, each tokenised alone as `ask` tokenises a prompt and what follows it. A file of tokens is an Arrow file with a
row a document, which is mapped and not read, so that memory does not grow with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from rwkv_stream.errors import InputError
from rwkv_stream.files import publishing
from rwkv_stream.text.readers import documents
from rwkv_stream.text.readers.encodings import Decision, Decoded
from rwkv_stream.text.readers.streams import File, Opened
from rwkv_stream.text.readers.tables import json_objects

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.training.recipe import Data
    from rwkv_stream.training.split import Part, Split

TABLES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".ndjson", ".parquet")  # whose records have fields
QUESTION = "\n\nQuestion: {question}\nAnswer:"
SUMMARY_QUESTION = "What is the text about?"
NOT_IN_TEXT = "Not in this text."
FIRST = 3  # questions that stand before a passage
BATCH_TOKENS = 1 << 20  # of a record batch, which is written whole

_log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Text, and whether it is learnt from."""

    text: str
    is_learnt: bool = False


Document = Sequence[Piece]


def files(data: Data, folder: Path) -> list[Path]:
    """The files of a source, its path being relative to `folder`. Raises InputError where there is none."""
    path = folder / data.path
    found = [path] if path.exists() else sorted(path.parent.glob(path.name))
    if not found:
        raise InputError(f"reading the data '{data.name}': expected files at '{path}', found none")
    return found


def read(data: Data, folder: Path, split: Split | None = None, part: Part = "train") -> Iterator[Document]:
    """The documents of a source, those that belong to a part of the split.

    raises  InputError for files that are missing or damaged, and for records without the fields that are named
    """
    if data.template is not None:
        fields = [name for _, name, _, _ in Formatter().parse(data.template) if name is not None]
        if unknown := set(data.learn) - set(fields):
            raise InputError(
                f"reading the data '{data.name}': expected to learn fields of the template, {', '.join(fields)}, found "
                f"'{min(unknown)}'"
            )
    for path in files(data, folder):
        if not path.name.endswith(TABLES):
            yield from texts(path)
            continue
        found = records(path)
        if split is not None:
            name = path.name.partition(".")[0]
            found = (record for record in found if split.part(name, record) == part)
        if data.form == "preferences":
            for record in found:
                yield from preference(record, path)
        elif data.form in ("questions", "questions twice"):
            yield from questions(found, is_passage_learnt=not data.learn, twice=data.form == "questions twice")
        elif data.template is not None:
            yield from (filled(data.template, record, data.learn, path) for record in found)
        else:
            yield from ([Piece(_field(record, data.text, path), True)] for record in found)


def texts(path: Path) -> Iterator[Document]:
    """Whatever `ingest` reads; of a folder, what cannot be read is said and left out."""
    for document in documents([str(path)]):
        try:
            with document.text() as text:
                yield [Piece(b"".join(text).decode(), True)]
                for loss in text.losses:
                    _log.warning("%s", loss)
        except InputError as error:
            if not path.is_dir():
                raise
            _log.warning("%s", error)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a Parquet or JSON Lines file, compressed or not. Raises InputError where one is damaged."""
    for number, (record, n_replaced) in enumerate(read_records(path), 1):
        if isinstance(record, str):
            raise InputError(f"reading '{path}', row {number}: {record}")
        if n_replaced:
            raise InputError(f"reading '{path}', about row {number}: expected UTF-8, found bytes that are none")
        yield record


def read_records(path: Path) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """Each record of such a file, or why it is none; with how many bytes so far were no UTF-8, and became U+FFFD.

    raises  InputError where the file cannot be read, or read on
    """
    if path.name.endswith(".parquet"):
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(256):
                    yield from ((record, 0) for record in batch.to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"reading '{path}': expected a Parquet file, found {error}") from error
        return
    with Opened(File(str(path)), str(path)) as opened:
        text = Decoded(opened.read, Decision("utf-8", "named"), str(path))
        for record, _ in json_objects(text):
            yield record, text.replaced_bytes


def _field(record: Mapping[str, Any], name: str, path: Path) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(
            f"reading '{path}': expected records with the text '{name}', found {', '.join(record) or 'no field'}"
        )
    return value


def filled(template: str, record: Mapping[str, Any], learn: Sequence[str], path: Path) -> Document:
    """A template with `{fields}` of a record; only the fields of `learn` are learnt from, without any all of it."""
    made = []
    for text, name, _, _ in Formatter().parse(template):
        if text:
            made.append(Piece(text, not learn))
        if name is not None:
            made.append(Piece(_field(record, name, path), not learn or name in learn))
    return made


def preference(record: Mapping[str, Any], path: Path) -> tuple[Document, Document]:
    """A prompt with the answer that is preferred, and with the other one; the answers are learnt from."""
    prompt, *answers = (_field(record, name, path) for name in ("prompt", "chosen", "rejected"))
    if not all(answers):
        raise InputError(f"reading '{path}': expected two answers to a prompt, found an empty one to {prompt[:80]!r}")
    chosen, rejected = ([Piece(prompt), Piece(answer, True)] for answer in answers)
    return chosen, rejected


def questions(
    found: Iterable[Mapping[str, Any]], *, is_passage_learnt: bool, twice: bool = False
) -> Iterator[Document]:
    """Passages (or titles), each with all the questions that follow each other on it, in the form in which `ask` puts
    them; a summary answers `SUMMARY_QUESTION`. The answers are learnt from, the passage where it is said.

    twice  the questions stand before the passage too, at most FIRST of them in one document
    """
    for passage, group in groupby(found, key=lambda record: record.get("context") or record.get("title") or ""):
        pairs = [_question(record) for record in group]
        for some in [pairs[i : i + FIRST] for i in range(0, len(pairs), FIRST)] if twice else [pairs]:
            before = "".join(QUESTION.partition("\nAnswer")[0].format(question=question) for question, _ in some)
            made = [Piece(f"{before.strip()}\n\n")] if twice else []
            made.append(Piece(passage, is_passage_learnt))
            for question, answer in some:
                made += asked(question, answer)
            yield made


def asked(question: str, answer: str) -> tuple[Piece, Piece]:
    """A question in the form in which `ask` puts it, and its answer, which is learnt together with what ends it."""
    return Piece(QUESTION.format(question=question)), Piece(f" {answer}\n", True)


def _question(record: Mapping[str, Any]) -> tuple[str, str]:
    question = record.get("question") or SUMMARY_QUESTION
    answer = record.get("long_answer") or record.get("answer") or record.get("summary") or NOT_IN_TEXT
    return question.strip(), answer.strip()


# ---- tokens ----


class Encoded(NamedTuple):
    """A document's tokens int64 [n], and which are learnt from, bool [n]."""

    tokens: NDArray[np.int64]
    is_learnt: NDArray[np.bool_]

    def part(self, begin: int, end: int) -> Encoded:
        return Encoded(self.tokens[begin:end], self.is_learnt[begin:end])


def encoded(document: Document, encode: Callable[[str], Sequence[int]]) -> Encoded:
    """A document's tokens, piece by piece."""
    ids = [encode(piece.text) for piece in document]
    learnt = [np.full(len(part), piece.is_learnt) for part, piece in zip(ids, document, strict=True)]
    return Encoded(np.concatenate([np.asarray(part, dtype=np.int64) for part in ids]), np.concatenate(learnt))


_SCHEMA = pa.schema({"tokens": pa.list_(pa.uint32()), "is_learnt": pa.list_(pa.bool_())})


def write(path: Path, found: Iterable[Encoded], origin: str = "") -> int:
    """Publish documents as a file of tokens; returns how many tokens there are.

    origin  what they follow from, which the file keeps
    """
    schema = _SCHEMA.with_metadata({"origin": origin})
    count, waiting, size = 0, list[Encoded](), 0
    with publishing(path) as file, pa.ipc.new_file(file, schema) as writer:

        def flush() -> None:
            offsets = np.cumsum([0, *(len(z.tokens) for z in waiting)]).astype(np.int32)
            columns = (np.concatenate([z.tokens for z in waiting]).astype(np.uint32), [z.is_learnt for z in waiting])
            arrays = [columns[0], np.concatenate(columns[1])]
            lists = [pa.ListArray.from_arrays(offsets, array) for array in arrays]
            writer.write_batch(pa.record_batch(lists, schema=schema))
            waiting.clear()

        for document in found:
            if not len(document.tokens):
                continue
            waiting.append(document)
            count, size = count + len(document.tokens), size + len(document.tokens)
            if size >= BATCH_TOKENS:
                flush()
                size = 0
        if waiting:
            flush()
    return count


class TokenFile:
    """A mapped file of tokens; `lengths` int64 [documents], `origin` as it was written."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
            self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            self.origin = (file.schema.metadata or {}).get(b"origin", b"").decode()
        offsets = [batch.column(0).offsets.to_numpy().astype(np.int64) for batch in self._batches]
        self._offsets = offsets
        self._first = np.cumsum([0, *(len(z) - 1 for z in offsets)])
        self.lengths = np.concatenate([np.diff(z) for z in offsets]) if offsets else np.zeros(0, np.int64)

    def read(self, document: int, begin: int, end: int) -> Encoded:
        """Tokens begin to end of a document."""
        i = int(np.searchsorted(self._first, document, side="right")) - 1
        first = int(self._offsets[i][document - self._first[i]])
        tokens, learnt = (column.values.slice(first + begin, end - begin) for column in self._batches[i].columns)
        return Encoded(
            tokens.to_numpy(zero_copy_only=False).astype(np.int64), learnt.to_numpy(zero_copy_only=False).astype(bool)
        )
