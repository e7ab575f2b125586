"""What an answer is, whatever way it was found: the text, how sure it is, and the parts of documents it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rwkv_stream.store.records import CONVERSATION, INSTRUCTION

if TYPE_CHECKING:
    import pyarrow as pa

    from rwkv_stream.store import Snapshot
    from rwkv_stream.text.readers.places import Place


@dataclass(frozen=True, slots=True)
class Source:
    """A part of a document that an answer rests on.

    text      what stands there, where the answer is quoted
    place     where that begins, as a person would cite it; None where that is not known
    snapshot  that has read the document; None where none did
    """

    document: str
    byte_start: int
    byte_end: int
    text: str | None
    place: Place | None
    snapshot: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """
    answer      None where the text does not speak of what is asked
    snapshot    that was asked; None where all documents of a store were, or documents that no snapshot has read
    strategy    how it was found
    confidence  that it is right, 0 to 1; None where the strategy cannot tell
    tokens      that were made for it
    id          the question's, where it has one
    rank        among several answers to one question, from 1
    byte_start, byte_end  where the answer itself stands in the document of its first source, if it is quoted
    why         that strategy was taken, where one chose among several
    """

    question: str
    answer: str | None
    snapshot: str | None
    strategy: str
    confidence: float | None
    tokens: int
    sources: tuple[Source, ...]
    id: str | None = None
    rank: int = 1
    byte_start: int | None = None
    byte_end: int | None = None
    why: str | None = None


def readings(snapshot: Snapshot) -> Iterator[Snapshot]:
    """The snapshots of documents that a snapshot has read, the last first: its own, then those of the readings that it
    started from. Conversations that were kept on the way are no documents, nor are instructions."""
    return (one for one in (snapshot, *snapshot.starts()) if one.how not in (CONVERSATION, INSTRUCTION))


def read_by(snapshot: Snapshot) -> tuple[Source, ...]:
    """All that a snapshot has read, as sources."""
    return tuple(Source(one.document, 0, one.bytes, None, None, one.id) for one in readings(snapshot))


def as_row(value: Answer) -> dict[str, Any]:
    """A row of such a table: as `asdict` gives it, with ids as texts."""
    row = asdict(value)
    for source in row["sources"]:
        source["place"] = as_cell(source["place"])
    return row


def as_cell(place: Place | None) -> Place | None:
    """A place as a column of `place_type` holds it, where ids that are numbers are texts."""
    return {**place, "id": str(place["id"])} if place is not None and "id" in place else place


def place_type() -> pa.DataType:
    """Of a column of a Place."""
    import pyarrow as pa

    numbers = [(name, pa.int64()) for name in ("line", "page", "row")]
    return pa.struct([*numbers, ("chapter", pa.string()), ("id", pa.string())])


def answer_schema() -> pa.Schema:
    """The columns of a table of Answer."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("id", "question", "answer", "snapshot", "strategy")]
    span = [("byte_start", pa.int64()), ("byte_end", pa.int64())]
    source = [
        ("document", pa.string()),
        *span,
        ("text", pa.string()),
        ("place", place_type()),
        ("snapshot", pa.string()),
    ]
    measured = [("confidence", pa.float64()), ("tokens", pa.int64()), ("rank", pa.int64()), *span]
    return pa.schema([*texts, *measured, ("sources", pa.list_(pa.struct(source))), ("why", pa.string())])
