"""Postings: which sentences of a text hold which terms, made while the text streams past, at constant memory.

A text is indexed in extents: `Indexer.cut` gives the postings of the sentences that were decided since the last cut.
They are a function of the text and of where it was cut, never of how it arrived.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from rwkv_stream.text import terms
from rwkv_stream.text.sentences import Splitter

if TYPE_CHECKING:
    from numpy.typing import NDArray

KNOWN_AFTER = 16_384  # characters from which a language is decided
_BATCH = 1 << 16  # bytes that are split at once
_MOST = 1 << 28  # bytes of postings before compression; those of 1 MiB of text hold some 500 kB
_HEAD = struct.Struct("<qIIIIHHB")  # first byte, sentences, terms, hits; bytes of terms, language, version; planes
_WIDTH = 4  # bytes of a number in a column


@dataclass(frozen=True, eq=False)
class Postings:
    """Sentences of one extent, in order, and their terms.

    language      ISO 639-1 code, whose stems the terms are; "" where there is none
    starts, ends  int64 [S]: bytes of the document
    lengths       int32 [S]: terms in it, one that comes again counted again
    """

    language: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lengths: NDArray[np.int32]
    _terms: bytes = field(repr=False)  # all of them, sorted
    _term_ends: NDArray[np.int64] = field(repr=False)  # [terms] in `_terms`
    _hit_ends: NDArray[np.int64] = field(repr=False)  # [terms] in the two below
    _steps: NDArray[np.uint8] = field(repr=False)  # [planes, hits]: from one sentence of a term to its next
    _counts: NDArray[np.uint8] = field(repr=False)  # [hits]
    _before: int | None = field(default=None, repr=False)  # of a part: sentences before it, which have hits too

    def __len__(self) -> int:
        return len(self.starts)

    def count(self, term: str) -> int:
        """In how many sentences a term stands."""
        if self._before is not None:
            return len(self.hits(term)[0])
        first, end = self._span(term)
        return end - first

    def hits(self, term: str) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Sentences that hold a term, rising, int32 [h], and how often each does (255 for more), uint8 [h]."""
        first, end = self._span(term)
        sentences, counts = np.cumsum(_joined(self._steps[:, first:end]), dtype=np.int32), self._counts[first:end]
        if self._before is None:
            return sentences, counts
        sentences = sentences - np.int32(self._before)
        here = (sentences >= 0) & (sentences < len(self))
        return sentences[here], counts[here]

    def within(self, byte_start: int, byte_end: int) -> Postings:
        """Those of the sentences that lie within these bytes."""
        first = int(np.searchsorted(self.starts, byte_start))
        end = max(first, int(np.searchsorted(self.ends, byte_end, side="right")))
        if (first, end) == (0, len(self)):
            return self
        part = slice(first, end)
        starts, ends, lengths = self.starts[part], self.ends[part], self.lengths[part]
        return replace(self, starts=starts, ends=ends, lengths=lengths, _before=first + (self._before or 0))

    def every_hit(self) -> tuple[list[bytes], NDArray[np.int64], NDArray[np.int64]]:
        """All terms as UTF-8, sorted; which of them each hit is of, int64 [h], and the sentence it is in, int64 [h].

        Not of a part.
        """
        assert self._before is None
        found = [self._term(at) for at in range(len(self._term_ends))]
        sizes = np.diff(self._hit_ends, prepend=0)
        steps = _joined(self._steps)
        reached = np.cumsum(steps)
        first = self._hit_ends - sizes
        return found, np.repeat(np.arange(len(found)), sizes), reached - np.repeat(reached[first] - steps[first], sizes)

    def _span(self, term: str) -> tuple[int, int]:
        """The hits of a term; of one that does not stand here none."""
        sought, n = term.encode(), len(self._term_ends)
        at = bisect_left(range(n), sought, key=self._term)
        if at == n or self._term(at) != sought:
            return 0, 0
        return int(self._hit_ends[at - 1]) if at else 0, int(self._hit_ends[at])

    def _term(self, at: int) -> bytes:
        return self._terms[self._term_ends[at - 1] if at else 0 : self._term_ends[at]]

    def to_bytes(self) -> bytes:
        """All of it, compressed; of a part there are none."""
        assert self._before is None, "a part is not written"
        language, version = self.language.encode(), terms.version().encode()
        first = int(self.starts[0]) if len(self) else 0
        sizes = (len(self), len(self._term_ends), len(self._counts), len(self._terms), len(language), len(version))
        columns = (
            self.starts - np.r_[first, self.ends][: len(self)],
            self.ends - self.starts,
            self.lengths,
            np.diff(self._term_ends, prepend=0),
            np.diff(self._hit_ends, prepend=0),
        )
        parts = [_HEAD.pack(first, *sizes, len(self._steps)), language, version, self._terms]
        parts += [_planes(column, _WIDTH).tobytes() for column in columns]
        parts += [self._steps.tobytes(), self._counts.tobytes()]
        return zstandard.ZstdCompressor(level=9).compress(b"".join(parts))

    @staticmethod
    def from_bytes(data: bytes) -> Postings:
        """What `to_bytes` wrote. Raises ValueError for what is damaged, or was written by another version."""
        try:
            if not 0 < zstandard.frame_content_size(data) <= _MOST:
                raise ValueError("postings: expected a frame that says its size")
            content = zstandard.ZstdDecompressor().decompress(data)
        except zstandard.ZstdError as error:
            raise ValueError(f"postings: {error}") from error
        if len(content) < _HEAD.size:
            raise ValueError("postings: cut short")
        first, S, n, hits, terms_size, language_size, version_size, planes = _HEAD.unpack_from(content)
        sizes = [language_size, version_size, terms_size, *[_WIDTH * S] * 3, *[_WIDTH * n] * 2, planes * hits, hits]
        if len(content) != _HEAD.size + sum(sizes) or not 1 <= planes <= _WIDTH:
            raise ValueError("postings: sizes that do not add up")
        at, fields = _HEAD.size, []
        for size in sizes:
            fields.append(content[at : at + size])
            at += size
        language, version, all_terms = fields[:3]
        if version != terms.version().encode():
            raise ValueError(f"postings: of version {version!r}")
        gaps, spans, lengths, term_sizes, hit_sizes = (
            _joined(np.frombuffer(column, np.uint8).reshape(_WIDTH, -1)) for column in fields[3:8]
        )
        ends = first + np.cumsum(gaps + spans)
        term_ends, hit_ends = np.cumsum(term_sizes), np.cumsum(hit_sizes)
        steps = np.frombuffer(fields[8], np.uint8).reshape(planes, -1)
        if (term_sizes.sum(), hit_sizes.sum()) != (terms_size, hits) or not (hit_sizes > 0).all():
            raise ValueError("postings: terms whose sizes do not add up")
        if hits and np.add.reduceat(_joined(steps), hit_ends - hit_sizes).max() >= S:
            raise ValueError("postings: hits beyond the last sentence")
        return Postings(
            language.decode(),
            ends - spans,
            ends,
            lengths.astype(np.int32),
            all_terms,
            term_ends,
            hit_ends,
            steps,
            np.frombuffer(fields[9], np.uint8),
        )


class Indexer:
    """Push the pieces of one document; take the postings of the sentences that they decide.

    >>> indexer = Indexer()
    >>> indexer.push(b"It rained. It st")
    >>> indexer.push(b"opped raining.")
    >>> postings = indexer.cut(final=True)
    >>> postings.language, postings.hits("rain")[0].tolist()
    ('en', [0, 1])

    language  ISO 639-1 code; None until the first 16,384 characters, or the end, decide it, and with it sentences
    decided   byte of the document where the text begins whose sentences have not been told
    """

    def __init__(self, *, byte: int = 0, language: str | None = None) -> None:
        """To go on: `byte` and `language` are `decided` and `language` as they were, and the text goes on there."""
        self.decided = byte
        self._base = byte  # of the splitter
        self.language = language
        self._held = bytearray()  # the text from `decided` on
        self._given = 0  # bytes of it that the splitter has
        self._splitter: Splitter | None = None
        self._analyzer: terms.Analyzer | None = None
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._lengths: list[int] = []
        self._numbers: dict[str, int] = {}  # of terms
        self._found: list[int] = []  # the terms of all sentences in a row, by their numbers

    def push(self, piece: bytes) -> None:
        """Take the next piece of the text: valid UTF-8, whole characters."""
        self._held += piece
        if len(self._held) - self._given >= _BATCH:
            self._split(final=False)

    def cut(self, *, final: bool = False) -> Postings:
        """The postings of the sentences that were decided since the last cut; `final`: the text ends here."""
        self._split(final=final)
        number_of_terms, S = len(self._numbers), len(self._starts)
        lengths = np.array(self._lengths, np.int32)
        order = sorted(self._numbers)
        ranks = np.empty(number_of_terms, np.int64)
        ranks[[self._numbers[term] for term in order]] = np.arange(number_of_terms)
        pairs = ranks[np.array(self._found, np.int64)] * S + np.repeat(np.arange(S), lengths)
        pairs, counts = np.unique(pairs, return_counts=True)
        of_terms, sentences = np.divmod(pairs, max(S, 1))
        hit_ends = np.searchsorted(of_terms, np.arange(number_of_terms), side="right")
        steps = np.diff(sentences, prepend=0)
        begin = np.r_[0, hit_ends][:number_of_terms]
        steps[begin] = sentences[begin]
        encoded = [term.encode() for term in order]
        made = Postings(
            self.language or "",
            np.array(self._starts, np.int64),
            np.array(self._ends, np.int64),
            lengths,
            b"".join(encoded),
            np.cumsum([len(term) for term in encoded], dtype=np.int64),
            hit_ends,
            _planes(steps, max(1, (int(steps.max(initial=0)).bit_length() + 7) // 8)),
            np.minimum(counts, 255).astype(np.uint8),
        )
        self._starts, self._ends, self._lengths, self._numbers, self._found = [], [], [], {}, []
        return made

    def _split(self, *, final: bool) -> None:
        """Give the splitter what it has not had, and keep the sentences that it decides."""
        if self.language is None:
            text = self._held.decode()
            if len(text) < KNOWN_AFTER and not final:
                return
            self.language = terms.language_of(text[:KNOWN_AFTER])
        if self._splitter is None or self._analyzer is None:
            self._splitter, self._analyzer = Splitter(self.language), terms.Analyzer(self.language)
        new = bytes(self._held[self._given :])
        for start, end in self._splitter.finish(new) if final else self._splitter.push(new):
            start, end = start + self._base, end + self._base
            found = self._analyzer.terms(self._held[start - self.decided : end - self.decided].decode())
            self._starts.append(start)
            self._ends.append(end)
            self._lengths.append(len(found))
            self._found += [self._numbers.setdefault(term, len(self._numbers)) for term in found]
        decided = self._base + self._splitter.decided
        del self._held[: decided - self.decided]
        self.decided = decided
        self._given = len(self._held)


def _planes(values: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """Whole numbers [n] by the places of their bytes [width, n], the lowest first: small ones compress well."""
    return np.ascontiguousarray(values.astype("<u4").view(np.uint8).reshape(-1, _WIDTH).T[:width])


def _joined(planes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The numbers of such planes."""
    values: NDArray[np.int64] = planes[0].astype(np.int64)
    for place in range(1, len(planes)):
        values |= planes[place].astype(np.int64) << 8 * place
    return values
