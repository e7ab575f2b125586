"""Sentences that may answer a question: found by the words of the question in postings, of texts of any length.

A sentence scores by BM25 of its own and of windows around it. Postings pass one extent at a time, twice: for how rare
each word is in all texts together, then for the scores. Only windows that hold a word of the question are computed, and
of all sentences the best few are kept, so memory does not grow with the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rwkv_stream.text import terms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.postings import Postings

REACH = 5  # sentences on each side that a sentence is seen with
WIDTH = 2 * REACH + 1
MOST = 100  # candidates
MOST_WORDS = 64  # of a question that are sought
_BLOCK = 8192  # sentences that are scored at once, or those of one extent
# Sentences before and after, weight in the sum, BM25's k1 and b.
WINDOWS = (
    (0, 0, 1.0, 0.6, 0.3),
    (1, 0, 0.3, 0.9, 0.4),
    (0, 1, 0.15, 0.9, 0.4),
    (2, 2, 0.2, 0.9, 0.4),
    (5, 5, 0.1, 0.9, 0.4),
)


class Text(Protocol):
    """A text whose sentences are indexed: bytes of decoded UTF-8, and postings in order, one extent at a time."""

    @property
    def document(self) -> str: ...

    def read(self, byte_start: int, byte_end: int) -> bytes: ...

    def postings(self) -> Iterator[Postings]: ...


@dataclass(frozen=True, eq=False)
class Asked:
    """The words of a question that are sought, and what all texts together say of them.

    words      those that are no stop words, each once; all, where there are no others
    languages  language of a text → the term of each word there
    written    language of each text, as the first of its extents that has sentences says
    rarity     float32 [T]: the idf of each word
    sentences  in all texts
    mean       length of a sentence, in terms
    """

    question: str
    language: str
    words: tuple[str, ...]
    languages: dict[str, tuple[str, ...]]
    written: tuple[str, ...]
    rarity: NDArray[np.float32]
    sentences: int
    mean: float


@dataclass(frozen=True, eq=False)
class Candidates:
    """The n sentences that score best, best first, each with REACH neighbours on both sides.

    scores   float32 [n]
    texts    int32 [n]: the text of each
    spans    int64 [n, WIDTH, 2]: bytes of the sentence and its neighbours; -1 beyond the ends of the text
    lengths  int32 [n, WIDTH]: their terms
    counts   float32 [n, T, WIDTH]: how often each word of the question stands in each
    """

    asked: Asked
    scores: NDArray[np.float32]
    texts: NDArray[np.int32]
    spans: NDArray[np.int64]
    lengths: NDArray[np.int32]
    counts: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)

    def best(self, order: NDArray[np.integer]) -> Candidates:
        """These candidates, in this order."""
        rows = (self.scores, self.texts, self.spans, self.lengths, self.counts)
        return Candidates(self.asked, *(row[order] for row in rows))


def candidates(question: str, texts: Sequence[Text]) -> Candidates:
    """The sentences of all texts that may answer a question; none where no word of it stands there."""
    asked = _asked(question, texts)
    found = Candidates(
        asked,
        np.zeros(0, np.float32),
        np.zeros(0, np.int32),
        np.zeros((0, WIDTH, 2), np.int64),
        np.zeros((0, WIDTH), np.int32),
        np.zeros((0, len(asked.words), WIDTH), np.float32),
    )
    for number, text in enumerate(texts if asked.words else ()):
        for block in _blocks(text, asked):
            more = _scored(block, number, asked)
            rows = (getattr(found, name) for name in ("scores", "texts", "spans", "lengths", "counts"))
            joined = Candidates(asked, *(np.concatenate(pair) for pair in zip(rows, more, strict=True)))
            found = joined.best(np.argsort(-joined.scores, kind="stable")[:MOST])
    return found


def bm25(
    counts: NDArray[np.float32],
    lengths: NDArray[np.floating],
    mean: float,
    rarity: NDArray[np.float32],
    k1: float,
    b: float,
) -> NDArray[np.float32]:
    """BM25 of counts [T, n] in texts of so many terms [n], `mean` on average: [n]."""
    damped = k1 * (1 - b + b * lengths / mean)
    each = counts * np.float32(k1 + 1) / (counts + damped.astype(np.float32))
    found: NDArray[np.float32] = np.einsum("t,tn->n", rarity, each)  # BLAS warns of invalid values that are not there
    return found


def _asked(question: str, texts: Sequence[Text]) -> Asked:
    """First pass: how rare the words are."""
    languages: dict[str, tuple[str, ...]] = {}
    words: tuple[str, ...] = ()
    written = list[str]()
    sentences = length = 0
    found = np.zeros(0, np.int64)
    for number, text in enumerate(texts):
        for postings in text.postings():
            if not len(postings):
                continue
            if len(written) == number:
                written.append(postings.language)
            if not languages:
                words = _sought(question, postings.language)
                found = np.zeros(len(words), np.int64)
            if postings.language not in languages:
                analyzer = terms.Analyzer(postings.language)
                languages[postings.language] = tuple(analyzer.term(word) for word in words)
            found += np.array([postings.count(term) for term in languages[postings.language]], np.int64)
            sentences += len(postings)
            length += int(postings.lengths.sum())
        written += [""] * (number + 1 - len(written))
    language = next(iter(languages), "")
    rarity = np.log1p((sentences - found + 0.5) / (found + 0.5)).astype(np.float32)
    return Asked(
        question, language, words, languages, tuple(written), rarity, sentences, max(length / max(sentences, 1), 1.0)
    )


def _sought(question: str, language: str) -> tuple[str, ...]:
    """The words of a question that are sought: of several with one term the first; of very many the last."""
    analyzer = terms.Analyzer(language)
    words = terms.words(question, language)
    content = [word for word in words if word not in analyzer.stop_words] or words
    return tuple({analyzer.term(word): word for word in reversed(content)}.values())[:MOST_WORDS][::-1]


@dataclass(frozen=True, eq=False)
class _Block:
    """Sentences in a row; those from `first` to `end` are to be scored, the others are their neighbours.

    hits  for each word of the question: the sentences of the block that hold it, and how often
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lengths: NDArray[np.integer]
    hits: tuple[tuple[NDArray[np.integer], NDArray[np.integer]], ...]
    first: int
    end: int


def _blocks(text: Text, asked: Asked) -> Iterator[_Block]:
    """The sentences of a text, extents joined so that each has its neighbours."""
    nothing = np.zeros(0, np.int64)
    block = _Block(nothing, nothing, nothing, ((nothing, nothing),) * len(asked.words), 0, 0)
    held: list[Postings] = []
    for postings in text.postings():
        if len(postings):
            held.append(postings)
            if len(block.starts) + sum(map(len, held)) >= _BLOCK:
                block = _joined(block, held, asked)
                kept = len(block.starts) - 2 * REACH
                yield replace(block, end=kept + REACH)
                hits = tuple((s[s >= kept] - kept, c[s >= kept]) for s, c in block.hits)
                block = _Block(block.starts[kept:], block.ends[kept:], block.lengths[kept:], hits, REACH, 0)
                held = []
    block = _joined(block, held, asked)
    if block.end > block.first:
        yield block


def _joined(block: _Block, held: list[Postings], asked: Asked) -> _Block:
    """A block and the sentences after it, all of which are to be scored."""
    at, hits = len(block.starts), [[pair] for pair in block.hits]
    for postings in held:
        for pairs, term in zip(hits, asked.languages[postings.language], strict=True):
            sentences, counts = postings.hits(term)
            pairs.append((sentences + at, counts))
        at += len(postings)
    return _Block(
        np.concatenate([block.starts, *(postings.starts for postings in held)]),
        np.concatenate([block.ends, *(postings.ends for postings in held)]),
        np.concatenate([block.lengths, *(postings.lengths for postings in held)]),
        tuple((np.concatenate([s for s, _ in pairs]), np.concatenate([c for _, c in pairs])) for pairs in hits),
        block.first,
        at,
    )


def _scored(block: _Block, text: int, asked: Asked) -> tuple[NDArray[np.generic], ...]:
    """Second pass: the best sentences of a block, as the fields of `Candidates` in their order."""
    n, T = len(block.starts), len(asked.words)
    hit = np.zeros(n + WIDTH + 1, np.int32)
    for sentences, _ in block.hits:
        hit[sentences + REACH + 1] = 1
    near = np.cumsum(hit)
    touched = near[WIDTH : WIDTH + n] - near[:n] > 0  # no window of a touched sentence reaches beyond its own run
    at = np.flatnonzero(touched)
    place = np.cumsum(touched) - 1
    counts = np.zeros((T, len(at)), np.float32)
    for j, (sentences, how_often) in enumerate(block.hits):
        counts[j, place[sentences]] = how_often
    sums = np.concatenate([np.zeros((T, 1), np.float32), np.cumsum(counts, axis=1)], axis=1)
    length_sums = np.concatenate([[0], np.cumsum(block.lengths)])
    rank = np.arange(len(at))
    scores = np.zeros(len(at), np.float32)
    for before, after, weight, k1, b in WINDOWS:
        window = sums[:, np.minimum(rank + after + 1, len(at))] - sums[:, np.maximum(rank - before, 0)]
        lengths = length_sums[np.minimum(at + after + 1, n)] - length_sums[np.maximum(at - before, 0)]
        scores += np.float32(weight) * bm25(window, lengths, (before + after + 1) * asked.mean, asked.rarity, k1, b)
    own = np.flatnonzero((at >= block.first) & (at < block.end))
    chosen = own[np.argsort(-scores[own], kind="stable")[:MOST]]
    around = at[chosen][:, None] + np.arange(-REACH, REACH + 1)
    inside = (around >= 0) & (around < n)
    around = np.clip(around, 0, n - 1)
    spans = np.where(inside[:, :, None], np.stack([block.starts[around], block.ends[around]], axis=2), -1)
    seen = inside & touched[around]
    cube = np.where(seen[:, None, :], counts[:, np.where(seen, place[around], 0)].transpose(1, 0, 2), 0)
    return (
        scores[chosen],
        np.full(len(chosen), text, np.int32),
        spans,
        np.where(inside, block.lengths[around], 0).astype(np.int32),
        cube.astype(np.float32),
    )
