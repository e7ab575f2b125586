"""Units: a document as tokens, and which of these make a sentence, a chunk or the whole document.

A token belongs to the sentence that holds its first byte that is not white space; a token of white space alone to the
one around it, if any. A sentence of more than SENTENCE_TOKENS tokens is cut after so many, at the edge of a character;
one whose only token began in the sentence before has no token, and is left out. Chunks are blocks of a fixed number of
tokens, and the unit `document` is all tokens.

Memory holds some 64 KiB of text and its tokens, whatever the size of a document. This module knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.text.chunker import CHUNK_TOKENS
from rwkv_stream.text.sentences import Splitter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.tokenizer import TokenBlock, Tokenizer

    Int64s = NDArray[np.int64]

KINDS = ("sentence", "chunk", "document")  # of units that end with the same token the smaller one comes first
SENTENCE_TOKENS = 2048
EXCERPT_CHARS = 200
_EXCERPT_BYTES = 16 * EXCERPT_CHARS  # of text, in which there may be runs of white space

Place = Mapping[str, int | str]  # what a person would cite: line, page, chapter, row, id


class Source(Protocol):
    """What is read: a named text, as `readers.Document` is.

    Where what `text` opens has a method `place`, it is asked for the Place of each unit's first byte, in ascending
    order.
    """

    @property
    def name(self) -> str: ...
    def text(self) -> AbstractContextManager[Iterable[bytes]]: ...


@dataclass(frozen=True, slots=True)
class Unit:
    """What one vector stands for. `index` counts the units of its kind in the document, spans are the document's.

    text     of a sentence or chunk
    excerpt  of a document: its beginning in one line, as `excerpt` gives it
    """

    kind: str
    index: int
    text: str | None
    excerpt: str | None
    byte_start: int
    byte_end: int
    token_start: int
    token_end: int
    place: Place


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tokens that follow those of the piece before, or begin a reading of their own.

    ids           int64 [n], token numbers token_start to token_start + n of the document
    is_first      the reading begins here, from the start state
    is_last       the document ends with it
    units         those that end in it, in the order of their ends
    open_tokens   the token numbers at which the units begin that go on after it
    """

    document: str
    token_start: int
    ids: Int64s
    is_first: bool
    is_last: bool
    units: tuple[Unit, ...]
    open_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that cannot be read, or not to its end, of which the units that ended before stay; or, where
    `n_lost`, parts of one that is read but for them, of which this is the first or only one."""

    document: str
    error: InputError
    n_lost: int = 0


def lost(document: str, losses: Sequence[InputError], n_losses: int) -> Iterator[Failure]:
    """What could not be read of a document that is read but for it; of all that was lost the first are known."""
    for i, loss in enumerate(losses):
        yield Failure(document, loss, n_lost=1 if i else 1 + n_losses - len(losses))


class Window:
    """The part of a text, as it streams past, that is still needed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._base = 0  # the byte of the document at which the buffer begins

    def push(self, piece: bytes) -> None:
        self._buffer += piece

    def drop(self, byte: int) -> None:
        """Forget what lies before `byte`."""
        del self._buffer[: byte - self._base]
        self._base = byte

    def bytes(self, start: int, end: int) -> bytes:
        return bytes(self._buffer[start - self._base : end - self._base])

    def text(self, start: int, end: int) -> str:
        return self.bytes(start, end).decode("utf-8", "replace")


def check_kinds(kinds: Sequence[str], chunk: int, isolated: bool) -> None:
    """Refuse with UsageError what `read` cannot do: other kinds, chunks without a token, several kinds isolated."""
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise UsageError(f"embedding: expected units of {', '.join(KINDS)}, each once, found '{','.join(kinds)}'")
    if isolated and len(kinds) > 1:
        raise UsageError("embedding isolated units: expected one kind, for others overlap; embed them one by one")
    if chunk < 1:
        raise UsageError(f"embedding chunks: expected 1 token or more, found {chunk}")


def read(
    documents: Iterable[Source],
    tokenizer: Tokenizer,
    *,
    kinds: Sequence[str] = ("document",),
    chunk: int = CHUNK_TOKENS,
    isolated: bool = False,
    language: str = "en",
    text: bool = True,
) -> Generator[Piece | Failure, None, None]:
    """The documents as pieces, in order; one without a token is a Failure, so is one that cannot be read.

    kinds     of KINDS, one or more
    chunk     tokens
    isolated  every unit is a reading of its own, what belongs to none enters no row; for one kind alone
    language  of the sentences, as in `Splitter`
    text      give the text of sentences and chunks, the excerpt of documents
    raises    UsageError
    """
    check_kinds(kinds, chunk, isolated)
    return _read(documents, tokenizer, kinds, chunk, isolated, language, text)


def _read(
    documents: Iterable[Source],
    tokenizer: Tokenizer,
    kinds: Sequence[str],
    chunk: int,
    isolated: bool,
    language: str,
    text: bool,
) -> Generator[Piece | Failure, None, None]:
    for document in documents:
        reading = _Reading(document.name, kinds, chunk, language, text)
        try:
            for piece in reading.pieces(document, tokenizer):
                yield from _alone(piece, kinds[0], chunk) if isolated else (piece,)
            yield from lost(document.name, reading.losses, reading.n_losses)
        except InputError as error:
            yield Failure(document.name, error)


def _alone(piece: Piece, kind: str, chunk: int) -> Iterator[Piece]:
    """The units of a piece, which are of one kind, as readings of their own."""
    if kind == "document":
        yield piece
        return
    end = piece.token_start + len(piece.ids)
    parts: list[tuple[int, int, tuple[Unit, ...]]] = [(u.token_start, u.token_end, (u,)) for u in piece.units]
    parts += [(token, end, ()) for token in piece.open_tokens]
    if piece.is_last and not parts:  # white space, which is in no unit: read alone, so that the document ends
        yield replace(piece, is_first=True)
    for i, (first, last, units) in enumerate(parts):
        start = max(first, piece.token_start)
        yield Piece(
            document=piece.document,
            token_start=start,
            ids=piece.ids[start - piece.token_start : last - piece.token_start],
            is_first=first == start,
            is_last=piece.is_last and i == len(parts) - 1,
            units=units,
            open_tokens=() if units else (first,),
        )


@dataclass(slots=True)
class _Begun:
    """A unit from its first token on; its ends are -1 until they are known."""

    kind: str
    index: int
    byte_start: int
    token_start: int
    byte_end: int = -1
    token_end: int = -1
    place: Place = field(default_factory=dict)


class _Reading:
    """One document: tokens and sentences that wait for each other, and the units that have begun."""

    def __init__(self, name: str, kinds: Sequence[str], chunk: int, language: str, text: bool) -> None:
        self._name, self._kinds, self._chunk, self._with_text = name, kinds, chunk, text
        self._splitter = Splitter(language) if "sentence" in kinds else None
        self._window = Window()
        self._beginning = bytearray()
        self._spans: list[tuple[int, int]] = []  # sentences that wait for their tokens
        self._ids, self._ends = np.zeros(0, np.int64), np.zeros(0, np.int64)  # tokens that wait for their sentence
        self._token = self._byte = 0  # where those begin
        self._n_sentences = 0
        self._open: list[_Begun] = []  # the chunk and the document that go on

    def pieces(self, document: Source, tokenizer: Tokenizer) -> Iterator[Piece]:
        """Raises InputError."""
        block: TokenBlock | None = None
        with document.text() as text:
            place: Callable[[int], Place] = getattr(text, "place", lambda byte: {})
            for following in tokenizer.stream(self._seen(text)):
                if block is not None:
                    yield from self._told(block, place, is_last=False)
                block = following
            if block is None:
                raise InputError(f"embedding '{self._name}': expected some text, found none")
            self.losses: list[InputError] = getattr(text, "losses", [])
            self.n_losses: int = getattr(text, "n_losses", 0)
            yield from self._told(block, place, is_last=True)

    def _seen(self, text: Iterable[bytes]) -> Iterator[bytes]:
        for piece in text:
            self._window.push(piece)
            if self._with_text and len(self._beginning) < _EXCERPT_BYTES:
                self._beginning += piece[:_EXCERPT_BYTES] if self._beginning else piece.lstrip()[:_EXCERPT_BYTES]
            if self._splitter is not None:
                self._spans += self._splitter.push(piece)
            yield piece
        if self._splitter is not None:
            self._spans += self._splitter.finish()

    def _told(self, block: TokenBlock, place: Callable[[int], Place], is_last: bool) -> Iterator[Piece]:
        """The tokens up to which all is known, and the units that end there."""
        ids, ends = np.concatenate([self._ids, block.ids]), np.concatenate([self._ends, block.ends])
        starts = np.concatenate([[self._byte], ends[:-1]])
        begun = self._sentences(starts, ends, is_last)
        n = len(ids)
        if self._splitter is not None and not is_last:
            n = begun[-1].token_end - self._token if begun else 0
        self._ids, self._ends = ids[n:], ends[n:]
        if not n:
            return
        first, self._token, self._byte = self._token, self._token + n, int(ends[n - 1])
        if "chunk" in self._kinds:
            numbers = range(-(-first // self._chunk), -(-self._token // self._chunk))
            begun += [_Begun("chunk", i, int(starts[i * self._chunk - first]), i * self._chunk) for i in numbers]
        if "document" in self._kinds and first == 0:
            begun.append(_Begun("document", 0, 0, 0))
        for unit in sorted(begun, key=lambda unit: unit.byte_start):
            unit.place = place(unit.byte_start)
        units = self._open + begun
        for unit in units:
            limit = self._chunk if unit.kind == "chunk" else math.inf
            if unit.token_end < 0 and (is_last or unit.token_start + limit <= self._token):
                unit.token_end = int(min(unit.token_start + limit, self._token))
                unit.byte_end = int(ends[unit.token_end - 1 - first])
        ended = [unit for unit in units if unit.token_end >= 0]
        self._open = [unit for unit in units if unit.token_end < 0]
        yield Piece(
            document=self._name,
            token_start=first,
            ids=ids[:n],
            is_first=first == 0,
            is_last=is_last,
            units=tuple(map(self._unit, sorted(ended, key=lambda unit: (unit.token_end, KINDS.index(unit.kind))))),
            open_tokens=tuple(unit.token_start for unit in self._open),
        )
        self._window.drop(min([self._byte, *(unit.byte_start for unit in self._open if unit.kind == "chunk")]))

    def _unit(self, unit: _Begun) -> Unit:
        text = shown = None
        if self._with_text and unit.kind == "document":
            beginning = self._beginning[:_EXCERPT_BYTES].decode("utf-8", "ignore")
            shown = excerpt(beginning, is_whole=len(self._beginning) < _EXCERPT_BYTES)
        elif self._with_text:
            text = self._window.text(unit.byte_start, unit.byte_end)
        return Unit(
            unit.kind,
            unit.index,
            text,
            shown,
            unit.byte_start,
            unit.byte_end,
            unit.token_start,
            unit.token_end,
            unit.place,
        )

    def _sentences(self, starts: Int64s, ends: Int64s, is_last: bool) -> list[_Begun]:
        """The sentences all of whose tokens have come."""
        n_whole = sum(is_last or byte_end <= ends[-1] for _, byte_end in self._spans)
        spans, self._spans = self._spans[:n_whole], self._spans[n_whole:]
        owned = np.maximum(ends, starts + 1)  # an empty token belongs where it stands
        begun: list[_Begun] = []
        last = 0
        for byte_start, byte_end in spans:
            first = max(last, int(np.searchsorted(owned, byte_start, side="right")))
            last = int(np.searchsorted(starts, byte_end, side="left"))
            while first < last:
                cut, byte_cut, byte_next = last, byte_end, byte_end
                if last - first > SENTENCE_TOKENS:
                    cut, byte_cut, byte_next = self._cut(first + SENTENCE_TOKENS, starts, byte_start, byte_end)
                begun.append(
                    _Begun(
                        "sentence",
                        self._n_sentences,
                        byte_start,
                        self._token + first,
                        byte_cut,
                        self._token + cut,
                    )
                )
                self._n_sentences += 1
                byte_start = byte_next
                first = max(cut, int(np.searchsorted(owned, byte_start, side="right")))
        return begun

    def _cut(self, token: int, starts: Int64s, byte_start: int, byte_end: int) -> tuple[int, int, int]:
        """Cut a sentence at or before `token`: the token, where the words before it end and the next ones begin."""
        while self._window.bytes(int(starts[token]), int(starts[token]) + 1)[0] & 0xC0 == 0x80:
            token -= 1
        at = int(starts[token])
        before, after = self._window.text(byte_start, at), self._window.text(at, byte_end)
        return token, byte_start + len(before.rstrip().encode()), byte_end - len(after.lstrip().encode())


def excerpt(text: str, *, is_whole: bool = True) -> str:
    """The beginning of a text in one line, EXCERPT_CHARS at most, cut between words; an ellipsis says that it was cut.

    is_whole  nothing follows the text
    """
    shown = " ".join(text.split())
    if is_whole and len(shown) <= EXCERPT_CHARS:
        return shown
    words, space, _ = shown[: EXCERPT_CHARS - 1].rpartition(" ")
    return f"{words} …" if space else f"{shown[: EXCERPT_CHARS - 1]}…"
