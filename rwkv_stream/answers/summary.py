"""What a summary is, whoever makes it: of which stretch of a document, and how summaries stand in a tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from rwkv_stream.answers.answer import as_cell, place_type
from rwkv_stream.errors import RwkvStreamError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.text.postings import Postings
    from rwkv_stream.text.readers.places import Place

GROUP = 8  # summaries joined into one
Why = Literal["central", "frequent", "strange"]
Ranges = Sequence[tuple[int, int]]  # bytes of a text, rising
OnFailure = Callable[[RwkvStreamError], None]


class Text(Protocol):
    """A text whose sentences are indexed, as `KeptText` and `MemoryText` are."""

    @property
    def document(self) -> str: ...
    @property
    def byte_end(self) -> int: ...
    def read(self, byte_start: int, byte_end: int) -> bytes: ...
    def place(self, byte: int) -> Place: ...
    def postings(self, byte_start: int = 0) -> Iterator[Postings]: ...


@dataclass(frozen=True, slots=True)
class Extract:
    """A sentence, or a line of a log, that was taken from a document for a summary of it.

    byte_start, byte_end  where it stands there
    text                  what stands there
    place                 where it begins, as a person would cite it; None where that is not known
    why                   central: a sentence that says much of what the text says; of the lines of a log the first of a
                          frequent template, or of a strange one
    template              of such a line: what the lines have in common
    count                 of such a line: how many lines do
    bits                  of such a line: the surprisal of a word of the template, on average
    """

    byte_start: int
    byte_end: int
    text: str
    place: Place | None
    why: Why = "central"
    template: str | None = None
    count: int | None = None
    bits: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of the bytes and tokens start..end of a document.

    level     0: of a span itself; n + 1: of what summaries of level n are of
    index     of level 0 the span's place in the lineage (0 for a whole); else the place in its level
    snapshot  the one that stands at the end of the text
    tokens    made for it
    children  the indices, in the level below, of those joined
    extracts  what was taken from the text, where it is made of that, in the order of `text`
    """

    document: str
    level: int
    index: int
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    snapshot: str
    text: str
    tokens: int
    children: tuple[int, ...] = ()
    extracts: tuple[Extract, ...] = ()


class Span(NamedTuple):
    """What one snapshot of a lineage has read since the one before it."""

    number: int
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    snapshot: str


def spans(snapshot: Snapshot, since: Snapshot | None = None) -> Iterator[tuple[Span, Snapshot]]:
    """The spans from each snapshot of a lineage to the next, oldest first, with the one at the end of each.

    since  only what was read after this one
    """
    byte, token = (since.bytes, since.tokens) if since is not None else (0, 0)
    for number, end in enumerate(reversed([*snapshot.lineage()])):
        if end.tokens > token:
            yield Span(number, byte, end.bytes, token, end.tokens, end.id), end
            byte, token = end.bytes, end.tokens


def check_since(snapshot: Snapshot, since: Snapshot, store: Store) -> None:
    """Raise UsageError unless a snapshot has read what another one has, and more."""
    from rwkv_stream.reading.passes import HashedText

    doing = f"summarizing what '{snapshot.document}' has since snapshot {since.id[:12]}"
    if since.tokens >= snapshot.tokens:
        raise UsageError(
            f"{doing}: expected one before token {snapshot.tokens:,}, found token {since.tokens:,}: nothing is new"
        )
    if all(ancestor.id != since.id for ancestor in snapshot.lineage()):  # it may be a leaf that was taken on the way
        text = store.text(snapshot)
        alike = (since.model, since.start_digest) == (snapshot.model, snapshot.start_digest)
        if not alike or text is None or not HashedText(text.pieces()).begins_as(since):
            raise UsageError(f"{doing}: expected an earlier one of the same text, found one of '{since.document}'")


def check_group(group: int) -> None:
    """Raises UsageError for groups that nothing is joined in."""
    if group < 2:
        raise UsageError(f"summarizing: expected groups of 2 or more, found {group}")


def tree(leaves: Iterable[Summary], group: int, join: Callable[[list[Summary], int], Summary]) -> Iterator[Summary]:
    """The leaves, and groups of them joined, and groups of these, up to one; each after those that it is of.

    All summaries but those of a level that has one only are joined, `group` at a time, and at the end of a level 2 to
    `group + 1`, so that none is joined alone. Holds `group + 1` summaries a level.
    join  makes one of several, and is told how many of its level there are before it
    """
    levels: list[list[Summary]] = [[]]  # of each level what is not joined yet
    joined = [0]  # of each level how many were made by joining

    def joining(level: int, count: int) -> Summary:
        parts, levels[level] = levels[level][:count], levels[level][count:]
        if level + 1 == len(levels):
            levels.append([])
            joined.append(0)
        summary = join(parts, joined[level + 1])
        joined[level + 1] += 1
        levels[level + 1].append(summary)
        return summary

    def carry(level: int) -> Iterator[Summary]:
        while len(levels[level]) == group + 2:  # two at least are left for the end
            yield joining(level, group)
            level += 1

    for leaf in leaves:
        yield leaf
        levels[0].append(leaf)
        yield from carry(0)
    level = 0
    while level + 1 < len(levels) or len(levels[level]) > 1:
        yield joining(level, len(levels[level]))
        level += 1
        yield from carry(level)


def as_row(summary: Summary) -> dict[str, Any]:
    """A row of such a table: as `asdict` gives it, with ids of places as texts."""
    row = asdict(summary)
    for one in row["extracts"]:
        one["place"] = as_cell(one["place"])
    return row


def summary_schema() -> pa.Schema:
    """The columns of a table of Summary."""
    import pyarrow as pa

    span = [("byte_start", pa.int64()), ("byte_end", pa.int64())]
    counts = [
        ("level", pa.int64()),
        ("index", pa.int64()),
        *span,
        ("token_start", pa.int64()),
        ("token_end", pa.int64()),
    ]
    texts = [("snapshot", pa.string()), ("text", pa.string())]
    children = ("children", pa.list_(pa.int64()))
    of_log = [("template", pa.string()), ("count", pa.int64()), ("bits", pa.float64())]
    extract = pa.struct([*span, ("text", pa.string()), ("place", place_type()), ("why", pa.string()), *of_log])
    extracts = ("extracts", pa.list_(extract))
    return pa.schema([("document", pa.string()), *counts, *texts, ("tokens", pa.int64()), children, extracts])
