"""A corpus cut into parts, decided once from the inputs alone, whoever goes through them, and kept in a manifest.

A part ends with the document with which it holds so many documents or bytes of their text (`Cut`), or with the inputs.
The manifest is JSON Lines: a header, then each part with the *spans* that its documents are: so many documents of one
file from the n-th on, and a digest over the name, id and text of each as its reader gives them, without compression,
containers and encodings. One rule for all kinds of input: a member that was appended to a gzip file, a Parquet file
that was written anew with more rows, a folder with more files, or stdin again, have grown if the documents that were
there are the same ones, in their order.

A document that could not be read is known by the reason, and may be read later, or be gone: then its span is another
one, and its part is made again. So the last row of a log that was being written is in the end read as it is.

Inputs that have grown are cut further: documents behind those that are known, of a file or of none that is known, make
parts of their own, a *generation*, whose numbers go on. Within a generation parts are in the order of the inputs. So
the inputs are held against the manifest in one pass over both, whatever their length: a generation is a subsequence of
the inputs, and each has its place in the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.text.readers import Document, Text, documents

if TYPE_CHECKING:
    from rwkv_stream.text.readers.places import Place

PART_ROWS = 20_000  # at most, where nobody says how many: a part's spans and failures are held


@dataclass(frozen=True, slots=True)
class Span:
    """So many documents of a file, from the n-th on (from 0), the bytes of their text, and a digest over them; those
    that could not be read, by their numbers, and a digest over the others."""

    path: str
    first: int
    documents: int
    size: int
    digest: str
    failed: tuple[int, ...] = ()
    rest: str = ""

    @property
    def words(self) -> str:
        last = self.first + self.documents
        which = f"document {last}" if self.documents == 1 else f"documents {self.first + 1} to {last}"
        return f"{which} of '{self.path}'"


@dataclass(frozen=True, slots=True)
class Part:
    """A run of documents: how many, and a digest over their spans."""

    number: int
    generation: int
    documents: int
    digest: str

    @property
    def name(self) -> str:
        return f"part-{self.number:05}"


@dataclass(frozen=True, slots=True)
class Cut:
    """How large parts are: documents, and bytes of text; None: as many as there are."""

    part_rows: int | None
    part_bytes: int | None

    def is_full(self, rows: int, size: int) -> bool:
        return any(limit is not None and n >= limit for n, limit in ((rows, self.part_rows), (size, self.part_bytes)))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sources and how they are read (arguments of `readers.documents`); of those that can be read but once, copies."""

    sources: tuple[str, ...]
    reading: Mapping[str, Any]
    copies: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> Iterator[tuple[str, Iterator[Document]]]:
        """Each file with its documents, which are to be taken before the next is asked for."""
        yield from itertools.groupby(self._documents(), lambda document: document.path or "")

    def _documents(self) -> Iterator[Document]:
        if not self.copies:
            yield from documents(self.sources, rows=True, **self.reading)
            return
        name = self.reading.get("name")
        if name is not None and len(self.sources) > 1:
            raise UsageError(f"naming a document '{name}': expected one source, found several; read them singly")
        for source in self.sources:
            if source not in self.copies:
                yield from documents([source], rows=True, **self.reading)
                continue
            reading = {**self.reading, "name": name or source}
            for document in documents([self.copies[source]], rows=True, **reading):
                yield replace(document, path=source)


# ---- what a document is known by ----


class Watched:
    """A document whose digest is known once it has been read; `size` counts the bytes of its text, `losses` are the
    first of the `n_losses` parts of it that could not be read."""

    def __init__(self, document: Document) -> None:
        self.name, self.place, self._document = document.name, document.place, document
        self.size = self.n_losses = 0
        self.losses: list[InputError] = []
        self.error: InputError | None = None
        self._hash = hashlib.sha256(json.dumps([document.name, document.id]).encode() + b"\0")

    def text(self) -> WatchedText:
        try:
            return WatchedText(self._document.text(), self)
        except InputError as error:
            self.fail(error)
            raise

    def see(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.size += len(piece)

    def fail(self, error: InputError) -> None:
        """What cannot be read is known by the reason."""
        self.error = error
        self._hash.update(b"\0" + str(error).encode("utf-8", "surrogatepass"))

    def digest(self) -> bytes:
        return self._hash.digest()

    def read(self) -> Watched:
        """All of it, for the digest alone."""
        with contextlib.suppress(InputError), self.text() as text:
            for _ in text:
                pass
        return self


class WatchedText(Iterator[bytes]):
    """A text as `units.read` wants it, seen by its document as it goes by."""

    def __init__(self, text: Text, document: Watched) -> None:
        self._text, self._document = text, document
        self.place, self.losses, self.has_lines = text.place, text.losses, text.has_lines

    def on_section(self, told: Callable[[int, Place], object]) -> None:
        """Let it be told where sections begin, as those of `readers.Text.on_section` are."""
        self._text.on_section.append(told)

    @property
    def n_losses(self) -> int:
        return self._text.n_losses

    def __next__(self) -> bytes:
        try:
            piece = next(self._text)
        except InputError as error:
            self._document.fail(error)
            raise
        self._document.see(piece)
        return piece

    def __enter__(self) -> WatchedText:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._document.losses, self._document.n_losses = self._text.losses, self._text.n_losses
        self._text.close()


class Seen:
    """Documents of a file that were read, as a span; `failed`: those that could not be read before."""

    def __init__(self, path: str, first: int, failed: Iterable[int] = ()) -> None:
        self.path, self.first = path, first
        self.documents = self.size = 0
        self.error: InputError | None = None  # of the last one that could not be read
        self._failed_before, self._failed = frozenset(failed), list[int]()
        self._hash, self._rest = hashlib.sha256(), hashlib.sha256()

    def add(self, document: Watched) -> None:
        number = self.first + self.documents
        if document.error is not None:
            self.error = document.error
            self._failed.append(number)
        self._hash.update(document.digest())
        if document.error is None and number not in self._failed_before:
            self._rest.update(document.digest())
        self.documents += 1
        self.size += document.size

    def span(self) -> Span:
        rest = self._rest.hexdigest() if self._failed else ""
        return Span(self.path, self.first, self.documents, self.size, self._hash.hexdigest(), tuple(self._failed), rest)

    def is_repaired(self, span: Span) -> bool:
        """Whether these are the documents of a span, but for some that could not be read before, and now can, or are
        not there: the last row of a file that was being written."""
        lost = range(self.first + self.documents, span.first + span.documents)
        return bool(span.failed) and {*self._failed, *lost} <= {*span.failed} and self._rest.hexdigest() == span.rest


class ChangedError(UsageError):
    """Inputs that are not those that a job was begun with, nor have they grown."""


# ---- a manifest ----


class Manifest:
    """The file that holds a header and the parts. Raises UsageError where it is not as it was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[Part] = []
        self._offsets: list[int] = []  # of the generations
        try:
            self._file = path.open("rb")  # as long as this object lives, though another may take its place
            self.header: dict[str, Any] = dict(json.loads(self._file.readline()))
            at = self._file.tell()
            while line := self._file.readline():
                part, _ = _parsed(line)
                if part.number != len(self.parts) or part.generation not in (self._n, self._n - 1):
                    raise ValueError(f"part {part.number} of generation {part.generation}")
                if part.generation == self._n:
                    self._offsets.append(at)
                self.parts.append(part)
                at = self._file.tell()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"reading '{path}': expected what a job wrote, found: {error}; pass --restart, or use another folder"
            ) from error

    @property
    def _n(self) -> int:
        return len(self._offsets)

    def generation(self, number: int) -> Iterator[tuple[Part, list[Span]]]:
        """The parts of a generation with the spans that they are."""
        at = self._offsets[number]
        while True:
            self._file.seek(at)
            line = self._file.readline()
            if not line:
                return
            at = self._file.tell()
            part, spans = _parsed(line)
            if part.generation != number:
                return
            yield part, spans

    def spans(self, number: int) -> Iterator[Span]:
        for _, spans in self.generation(number):
            yield from spans

    def grown(self, corpus: Corpus, cut: Cut, repaired: dict[Span, Span]) -> Iterator[tuple[Part, list[Span]]]:
        """The parts that inputs which have grown make anew; `repaired` is given the spans of which more can be read
        than before, and what they are now. Raises ChangedError for other changes, when it comes there."""
        return _cut(_new(corpus, [self.spans(n) for n in range(self._n)], repaired), cut, len(self.parts), self._n)

    def all(self, repaired: Mapping[Span, Span]) -> Iterator[tuple[Part, list[Span]]]:
        """The parts with their spans, or with what these are now."""
        for number in range(self._n):
            for part, spans in self.generation(number):
                now = [found for span in spans if (found := repaired.get(span, span)).documents]
                yield _part(part.number, part.generation, now), now


def cut(corpus: Corpus, how: Cut) -> Iterator[tuple[Part, list[Span]]]:
    """The parts of a corpus, with the spans that they are."""
    return _cut(_new(corpus, [], {}), how, 0, 0)


def line(part: Part, spans: Iterable[Span]) -> bytes:
    """Of a manifest."""
    value = {"part": part.number, "generation": part.generation, "spans": [astuple(span) for span in spans]}
    return json.dumps(value).encode() + b"\n"


def _parsed(data: bytes) -> tuple[Part, list[Span]]:
    value = json.loads(data)
    spans = [
        Span(path, first, documents, size, digest, tuple(failed), rest)
        for path, first, documents, size, digest, failed, rest in value["spans"]
    ]
    return _part(int(value["part"]), int(value["generation"]), spans), spans


def _part(number: int, generation: int, spans: Sequence[Span]) -> Part:
    digest = hashlib.sha256("".join(span.digest for span in spans).encode()).hexdigest()
    return Part(number, generation, sum(span.documents for span in spans), digest)


def _new(
    corpus: Corpus, generations: Sequence[Iterator[Span]], repaired: dict[Span, Span]
) -> Iterator[tuple[str, int, Watched]]:
    """The documents that are in none of the generations, read: each with its file and its number there."""
    waiting = [next(generation, None) for generation in generations]
    for path, found in corpus.files():
        known = 0
        while (span := next((s for s in waiting if s and (s.path, s.first) == (path, known)), None)) is not None:
            seen = Seen(path, known, span.failed)
            for document in itertools.islice(found, span.documents):
                seen.add(Watched(document).read())
            if seen.is_repaired(span) and seen.span() != span:
                repaired[span] = seen.span()
            else:
                check(span, seen)
            i = waiting.index(span)
            known, waiting[i] = known + span.documents, next(generations[i], None)
        for number, document in enumerate(found, known):
            yield path, number, Watched(document).read()
    for span in waiting:
        if span is not None:
            raise ChangedError(f"expected {span.words}, with which it was begun, found none in their place")


def check(span: Span, seen: Seen) -> None:
    """Raises ChangedError where these are not the documents of a span."""
    if seen.span() == span:
        return
    if seen.documents < span.documents:
        found = f"no more than {seen.first + seen.documents}"
    elif seen.size != span.size:
        found = f"{seen.size:,} bytes of text instead of {span.size:,}"
        found += f" ({seen.error})" if seen.error is not None else ""
    else:
        found = "as many bytes, but others"
    raise ChangedError(f"expected {span.words} as it was begun with, found {found}")


def _cut(
    new: Iterable[tuple[str, int, Watched]], how: Cut, number: int, generation: int
) -> Iterator[tuple[Part, list[Span]]]:
    spans: list[Span] = []
    seen = Seen("", 0)
    rows = size = 0
    for path, first, document in new:
        is_full = how.is_full(rows, size)
        if is_full or (path, first) != (seen.path, seen.first + seen.documents):
            if seen.documents:
                spans.append(seen.span())
            seen = Seen(path, first)
        if is_full:
            yield _part(number, generation, spans), spans
            number, spans, rows, size = number + 1, [], 0, 0
        seen.add(document)
        rows, size = rows + 1, size + document.size
    if seen.documents:
        spans.append(seen.span())
        yield _part(number, generation, spans), spans


# ---- the documents of a part ----


class Walk:
    """One pass over the inputs that takes spans from them, in the order of the inputs."""

    def __init__(self, corpus: Corpus) -> None:
        self._files = corpus.files()
        self._path, self._at = "", 0
        self._documents: Iterator[Document] = iter(())

    def take(self, span: Span) -> Iterator[Document]:
        """The documents of a span; fewer where there are no more."""
        while self._path != span.path or self._at > span.first:
            following = next(self._files, None)
            if following is None:
                return
            (self._path, self._documents), self._at = following, 0
        while self._at < span.first + span.documents and (document := next(self._documents, None)) is not None:
            self._at += 1
            if self._at > span.first:
                yield document


class DocumentRun:
    """The documents of one part; `check`, after they have been read, raises ChangedError where they are others."""

    def __init__(self, walk: Walk, spans: Sequence[Span]) -> None:
        self._walk, self._spans = walk, spans
        self._seen: list[Seen] = []

    def __iter__(self) -> Iterator[Watched]:
        """Each is to be read to its end before the next is asked for."""
        for span in self._spans:
            seen = Seen(span.path, span.first)
            for document in self._walk.take(span):
                watched = Watched(document)
                yield watched
                seen.add(watched)
            self._seen.append(seen)

    def check(self) -> None:
        for span, seen in zip(self._spans, self._seen, strict=True):
            check(span, seen)
