"""Questions on documents, as rows of a file: read, grouped by document, answered by strategies, and judged.

A row has `question` and `answers` (or `answer`), and may have `id`, `document` (or `title`), `context`, the passage
that answers, and `unanswerable`. Rows of one document that follow each other are asked together, so that it is read
once. Its text is that of a second file: of its row with that `id`, or all of it where it is no table and has that name;
without such a file it is the passages of its rows, each once.
"""

from __future__ import annotations

import codecs
import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import replies
from rwkv_stream.answers.strategies import subject as subject_of
from rwkv_stream.answers.strategy import Reply, Strategy, Subject
from rwkv_stream.errors import InputError
from rwkv_stream.evaluation.answering import is_quoted, overlap_f1, words
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.reading.isolated import keep_chunk_states
from rwkv_stream.reading.passes import state_of
from rwkv_stream.store import Store
from rwkv_stream.text.postings import Indexer, Postings
from rwkv_stream.text.readers import Document, documents
from rwkv_stream.training.data import read_records

if TYPE_CHECKING:
    from rwkv_stream.model import Model

SPOOL_BYTES = 8 << 20  # of a text that are held in memory
BLOCK_BYTES = 1 << 20  # of a text that is searched for an answer, at a time …
OVERLAP_BYTES = 1 << 12  # … and how much of the one before again; a longer answer may be missed at an edge


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A question; answers: right ones, none where the document does not say."""

    id: str
    document: str
    question: str
    answers: tuple[str, ...]
    passage: str | None

    @classmethod
    def of(cls, record: Mapping[str, Any], number: int) -> QuestionRow:
        """That of a record, the n-th. Raises InputError that says what is wrong with it."""
        question, passage = record.get("question"), record.get("context")
        if not isinstance(question, str) or not question.strip():
            raise InputError("expected the text 'question', found " + _told(question))
        given = record.get("answers") or [record[name] for name in ("answer",) if record.get(name) is not None]
        if record.get("unanswerable"):
            given = []
        elif not isinstance(given, list) or not given or not all(isinstance(answer, str) for answer in given):
            raise InputError("expected texts as 'answers', or 'unanswerable', found " + _told(given))
        if passage is not None and not isinstance(passage, str):
            raise InputError("expected 'context' to be a text, found " + _told(passage))
        name = str(number) if record.get("id") is None else str(record["id"])
        document = next((record[field] for field in ("document", "title") if record.get(field) is not None), name)
        return cls(name, str(document), question, tuple(given), passage)


def _told(value: object) -> str:
    return "none" if value in (None, []) else f"{value!r:.60}"


def rows(path: Path) -> Iterator[QuestionRow | InputError]:
    """The rows of a file, and what is wrong with those that are none."""
    for number, (record, _) in enumerate(read_records(path), 1):
        try:
            if isinstance(record, str):
                raise InputError(record)
            yield QuestionRow.of(record, number)
        except InputError as error:
            yield InputError(f"reading '{path}', row {number}: {error}")


def whole(found: Iterable[QuestionRow | InputError]) -> Iterator[QuestionRow]:
    return (row for row in found if isinstance(row, QuestionRow))


def groups(found: Iterable[QuestionRow]) -> Iterator[list[QuestionRow]]:
    """Rows that follow each other and have one document."""
    for _, group in groupby(found, key=lambda row: row.document):
        yield list(group)


class Texts:
    """The rows of a file of texts by their ids, or a text by its name: gone through once, if asked for in its order.

    losses  is told what of a text could not be read
    """

    def __init__(self, path: Path, losses: list[InputError]) -> None:
        self.path, self._losses = path, losses
        self._rows: Iterator[Document] = iter(())

    def find(self, name: str) -> SpooledText:
        """The text of an id. Raises InputError where there is none."""
        for is_second in (False, True):
            if is_second:
                self._rows = documents([str(self.path)], rows=True, id_column="id", text_column="text")
            for document in self._rows:
                if name in _names(document):
                    with document.text() as text:
                        found = SpooledText(name, text)
                        self._losses += text.losses
                    return found
        raise InputError(f"reading the texts '{self.path}': expected one with the id '{name}', found none")


def _names(document: Document) -> tuple[str, ...]:
    return (document.name, Path(document.name).name) if document.id is None else (str(document.id),)


class SpooledText:
    """A text that is read again and again, held in memory as far as it is short; a `strategies.Text`."""

    def __init__(self, document: str, pieces: Iterable[bytes]) -> None:
        self.document, self.byte_end = document, 0
        self._file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 -- as long as this object lives
        self._indexed = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
        self._sizes: list[int] = []  # of its postings, in bytes
        for piece in pieces:
            self.byte_end += self._file.write(piece)

    def read(self, byte_start: int, byte_end: int) -> bytes:
        self._file.seek(byte_start)
        return self._file.read(byte_end - byte_start)

    def postings(self) -> Iterator[Postings]:
        """The postings, one block at a time: made when they are first asked for."""
        if not self._sizes:
            self._index()
        begin = 0
        for size in self._sizes:
            self._indexed.seek(begin)
            begin += size
            yield Postings.from_bytes(self._indexed.read(size))

    def _index(self) -> None:
        indexer, decoder = Indexer(), codecs.getincrementaldecoder("utf-8")()
        for piece in self.pieces():
            indexer.push(decoder.decode(piece).encode())
            self._sizes.append(self._indexed.write(indexer.cut().to_bytes()))
        self._sizes.append(self._indexed.write(indexer.cut(final=True).to_bytes()))

    def pieces(self) -> Iterator[bytes]:
        for begin in range(0, self.byte_end, BLOCK_BYTES):
            yield self.read(begin, begin + BLOCK_BYTES)

    def holds(self, answer: str) -> bool:
        """Whether the words of an answer stand in the text, one after the other."""
        return any(
            is_quoted(answer, self.read(max(0, begin - OVERLAP_BYTES), begin + BLOCK_BYTES).decode(errors="ignore"))
            for begin in range(0, max(1, self.byte_end), BLOCK_BYTES)
        )


def text_of(group: Sequence[QuestionRow], texts: Texts | None) -> SpooledText:
    """The text of the document that rows are about. Raises InputError where there is none."""
    name = group[0].document
    if texts is not None:
        return texts.find(name)
    passages = dict.fromkeys(row.passage for row in group if row.passage is not None)
    if not passages:
        raise InputError(f"asking about '{name}': expected rows with 'context', or texts with its text, found neither")
    return SpooledText(name, ["\n\n".join(passages).encode(errors="replace")])


@dataclass(frozen=True, slots=True)
class Judged:
    """A reply to a row: F1 and exact match with the nearest right answer, None where none is right; whether it stands
    in the text that the strategy had; tokens that were read of that."""

    row: QuestionRow
    reply: Reply
    f1: float | None
    exact: bool | None
    is_quoted: bool
    tokens: int


def judged(group: Sequence[QuestionRow], strategy: Strategy, model: Model, texts: Texts | None) -> Iterator[Judged]:
    """The replies of a strategy to the rows of one document; rows without a passage are left out where it needs one."""
    wants_passage = "passage" in strategy.needs
    asked = [row for row in group if row.passage is not None or not wants_passage]
    if not asked:
        return
    text = None if wants_passage else text_of(group, texts)
    posed = (Question(row.question, row.id, i, row.passage) for i, row in enumerate(asked))
    with _subject(group[0].document, text, strategy, model) as (subject, tokens):
        for row, (_, (reply, *_)) in zip(asked, replies(posed, strategy, subject), strict=True):
            yield _judged(row, reply, text, tokens)
            tokens = 0  # the document was read for the first


@contextlib.contextmanager
def _subject(
    document: str, text: SpooledText | None, strategy: Strategy, model: Model
) -> Iterator[tuple[Subject, int]]:
    """A text with all that a strategy needs of it, and how many tokens of it were read for that."""
    if text is None or not strategy.needs & {"snapshots", "cells"}:
        reads = text is not None and "state" in strategy.needs
        state, tokens = state_of(model, text.pieces(), document) if text is not None and reads else (None, 0)
        yield Subject(document, model, state, [] if text is None else [text]), tokens
        return
    with tempfile.TemporaryDirectory(prefix="rwkv-stream-") as folder:
        path = Path(folder, "text")
        with path.open("wb") as file:
            file.writelines(text.pieces())
        store = Store(Path(folder, "store"), create=True)
        report = ingest(path, name="text", model=model, store=store, encoding="utf-8")
        snapshot, tokens = store.get(report.snapshot), report.tokens
        if "cells" in strategy.needs:
            keep_chunk_states(snapshot, model=model, store=store)
            tokens += report.tokens
        with subject_of(snapshot, store, strategy.needs, model) as subject:
            yield subject, tokens


def _judged(row: QuestionRow, reply: Reply, text: SpooledText | None, tokens: int) -> Judged:
    answer, f1, exact = reply.text or "", None, None
    if row.answers:
        f1 = max(overlap_f1(answer, right) for right in row.answers)
        exact = any(words(answer) == words(right) for right in row.answers)
    quoted = is_quoted(answer, row.passage or "") if text is None else text.holds(answer)
    return Judged(row, reply, f1, exact, quoted, tokens)
