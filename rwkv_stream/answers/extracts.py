"""Summaries taken from the text itself: the sentences that say most of what it says, with their places.

A sentence is worth what the words in it say of the text: those that come again and again, but not in most sentences
(centrality), as far as the sentences that were chosen before have not said them (novelty), for its length. The
beginning counts for more, and a second sentence of the same chapter for less (coverage); where there are no chapters an
eighth of the text, STRETCH_BYTES at least, is taken for one. No model is needed. Of a log (`log_templates`) the most
frequent and the strangest lines are told instead.

A text passes twice, its postings one extent at a time: for how many sentences hold each word, by a hash of it, and then
for the sentences of each eighth that are worth most, of which the summary is chosen. So memory does not grow with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from rwkv_stream.answers import log_templates
from rwkv_stream.answers.answer import readings
from rwkv_stream.answers.summary import (
    GROUP,
    Extract,
    OnFailure,
    Ranges,
    Span,
    Summary,
    Text,
    check_group,
    check_since,
    spans,
    tree,
)
from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.reading.texts import text_of
from rwkv_stream.text import terms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.store import Snapshot, Store

Mode = Literal["whole", "each", "tree"]
MODES: tuple[Mode, ...] = ("whole", "each", "tree")
WORDS = 120  # of a summary
MOST = 64  # sentences of a stretch among which is chosen
FEWEST = 8  # words of a sentence that says something
BUCKETS = 1 << 18  # of words by their hash

# Chosen by `benchmarks/extracts.py --tune`.
FREQUENCY = 0.3  # power of the number of sentences that hold a word
LENGTH = 0.7  # power of a sentence's length that its worth is shared among
SAID = 0.2  # what is left of a word's worth once it was said
BEGINNING = 5.0  # how much more the beginning counts, which fades to 1/e in
FADING = 0.05  # this share of the text, FADING_BYTES at most
# Not of what was measured, which is short and has no chapters: of a book more is to be told than its beginning.
FADING_BYTES = 4096
COVERED = 2.0  # what each sentence takes away from others of its chapter
STRETCHES = 8  # of a text
STRETCH_BYTES = 1 << 15  # of a stretch that is taken for a chapter where there are none


def extract(text: Text, ranges: Ranges | None = None, words: int = WORDS) -> list[Extract]:
    """The sentences that say most of a text, in their order; at least one where there is any.

    ranges  bytes where the sentences begin; default: all
    words   that they have together at most, unless the first of the text alone has more
    raises  SnapshotError for a damaged text
    """
    ranges = [(0, text.byte_end)] if ranges is None else ranges
    worth = _worth(text, ranges)
    best = _best(text, ranges, worth, words)
    chapters = [_chapter(text, one) for one in best]
    chosen = [(best[i].byte_start, best[i].byte_end) for i in _chosen(best, chapters, worth, words)]
    if not chosen:
        chosen = _first(text, ranges, words)
    return [
        Extract(start, end, text.read(start, end).decode(), text.place(start) or None) for start, end in sorted(chosen)
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A sentence with its worth alone, the eighth of the text where it begins, what is taken for its chapter where the
    text has none, and the words in it by their hash."""

    worth: float
    weight: float
    byte_start: int
    byte_end: int
    length: int
    stretch: int
    chapter: int
    words: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Sentences:
    """Sentences of one extent that begin in the ranges.

    starts, ends, lengths  [s]: bytes, and words of each
    offsets                int64 [s]: bytes of the ranges before each
    buckets, at            int64 [h]: the words, no stop words, and which of the sentences each is in
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    buckets: NDArray[np.int64]
    at: NDArray[np.int64]


def _sentences(text: Text, ranges: Ranges) -> Iterator[_Sentences]:
    stopped: dict[str, frozenset[bytes]] = {}
    before = 0
    for first, last in ranges:
        for postings in text.postings(first):
            if not len(postings):
                continue
            if postings.starts[0] >= last:
                break
            language = postings.language
            if language not in stopped:
                analyzer = terms.Analyzer(language)
                stopped[language] = frozenset(analyzer.term(word).encode() for word in analyzer.stop_words)
            inside = (postings.starts >= first) & (postings.starts < last)
            found, of_terms, at = postings.every_hit()
            buckets = np.array(
                [-1 if term in stopped[language] else zlib.crc32(term) % BUCKETS for term in found], np.int64
            )[of_terms]
            kept = inside[at] & (buckets >= 0)
            number = np.cumsum(inside) - 1
            starts = postings.starts[inside]
            lengths, ends = postings.lengths[inside], postings.ends[inside]
            yield _Sentences(starts, ends, lengths, starts - first + before, buckets[kept], number[at[kept]])
        before += last - first


def _worth(text: Text, ranges: Ranges) -> NDArray[np.float64]:
    """First pass: what each word is worth, [BUCKETS]; one that stands in one sentence only says nothing of the text."""
    found, n = np.zeros(BUCKETS, np.int64), 0
    for some in _sentences(text, ranges):
        found += np.bincount(some.buckets, minlength=BUCKETS)
        n += len(some.starts)
    often = np.maximum(found, 1)
    return np.where(found > 1, often**FREQUENCY * np.log1p(n / often), 0.0)


def _best(text: Text, ranges: Ranges, worth: NDArray[np.float64], words: int) -> list[_Candidate]:
    """Second pass: the sentences of each stretch that are worth most, in the order of the text; of those that say the
    same the first."""
    size = max(sum(last - first for first, last in ranges), 1)
    best: list[list[_Candidate]] = [[] for _ in range(STRETCHES)]
    for some in _sentences(text, ranges):
        fits = (some.lengths >= FEWEST) & (some.lengths <= words)
        begins = np.exp(some.offsets / -min(size * FADING, FADING_BYTES))
        weight = (1 + BEGINNING * begins) / np.maximum(some.lengths, 1) ** LENGTH
        gain = np.bincount(some.at, worth[some.buckets], len(some.starts)) * weight
        stretch = some.offsets * STRETCHES // size
        order = np.lexsort((np.arange(len(gain)), -gain))
        of_sentence = np.argsort(some.at, kind="stable")
        bounds = np.searchsorted(some.at[of_sentence], np.arange(len(some.starts) + 1))
        for number in np.unique(stretch).tolist():
            here = order[(stretch[order] == number) & fits[order] & (gain[order] > 0)]
            held = {one.words.tobytes(): one for one in best[number]}
            floor = best[number][-1].worth if len(best[number]) == MOST else 0.0
            n_new = 0
            for i in here.tolist():
                if n_new == MOST or gain[i] <= floor:
                    break
                of_it = np.sort(some.buckets[of_sentence[bounds[i] : bounds[i + 1]]])
                if of_it.tobytes() not in held:
                    held[of_it.tobytes()] = _Candidate(
                        float(gain[i]),
                        float(weight[i]),
                        int(some.starts[i]),
                        int(some.ends[i]),
                        int(some.lengths[i]),
                        number,
                        int(some.offsets[i]) // max(size // STRETCHES, STRETCH_BYTES),
                        of_it,
                    )
                    n_new += 1
            best[number] = sorted(held.values(), key=lambda one: (-one.worth, one.byte_start))[:MOST]
    found: dict[bytes, _Candidate] = {}
    for one in sorted((one for some in best for one in some), key=lambda one: one.byte_start):
        found.setdefault(one.words.tobytes(), one)
    return list(found.values())


def _chapter(text: Text, one: _Candidate) -> str | int:
    """What a sentence is of: its chapter, else the stretch of the text."""
    chapter = text.place(one.byte_start).get("chapter")
    return one.chapter if chapter is None else str(chapter)


def _chosen(
    best: Sequence[_Candidate], chapters: Sequence[str | int], worth: NDArray[np.float64], words: int
) -> list[int]:
    """Which of the sentences, one after the other that adds most to those before."""
    if not best:
        return []
    sizes = [len(one.words) for one in best]
    found, of_words = np.unique(np.concatenate([one.words for one in best]), return_inverse=True)
    of_sentences = np.repeat(np.arange(len(best)), sizes)
    ends = np.cumsum(sizes)
    left = worth[found]
    weight = np.array([one.weight for one in best])
    lengths = np.array([one.length for one in best])
    numbers = {chapter: number for number, chapter in enumerate(dict.fromkeys(chapters))}
    chapter = np.array([numbers[one] for one in chapters])
    covered = np.zeros(len(numbers))
    is_open = np.ones(len(best), bool)
    chosen: list[int] = []
    while True:
        is_open &= lengths <= words
        gain = np.bincount(of_sentences, left[of_words], len(best)) * weight / (1 + COVERED * covered[chapter])
        gain[~is_open] = 0
        i = int(gain.argmax())
        if gain[i] <= 0:
            return chosen
        chosen.append(i)
        is_open[i] = False
        words -= int(lengths[i])
        covered[chapter[i]] += 1
        left[of_words[ends[i] - sizes[i] : ends[i]]] *= SAID


def _first(text: Text, ranges: Ranges, words: int) -> list[tuple[int, int]]:
    """The first sentences, where none says more than another: the first one, and those after it that fit."""
    first: list[tuple[int, int]] = []
    for some in _sentences(text, ranges):
        for start, end, length in zip(some.starts.tolist(), some.ends.tolist(), some.lengths.tolist(), strict=True):
            if first and length > words:
                return first
            first.append((start, end))
            words -= length
    return first


def extracts(
    *,
    snapshot: Snapshot,
    store: Store,
    mode: Mode = "whole",
    since: Snapshot | None = None,
    words: int = WORDS,
    group: int = GROUP,
    on_failure: OnFailure | None = None,
) -> Iterator[Summary]:
    """The summaries of a mode of the text that a snapshot has read, taken from it, each with its `extracts`.

    since       only of what was read after this one, of the same lineage
    mode        whole: one; each: one for each span from a snapshot to the next, oldest first; tree: these, and for each
                group of them one of their text, and so on up to one, which comes last
    words       of each at most; of logs so many templates are told as `log_templates` says
    group       of `tree`: how many are joined, 2 or more
    on_failure  told of each span whose text is damaged, which is then left out; without it that is raised
    raises      UsageError; while iterating SnapshotError, and InputError where no text was kept and the document is not
                to be had any more
    """
    if mode not in MODES:
        raise UsageError(f"extracting: expected a mode of {', '.join(MODES)}, found '{mode}'")
    if words < 1:
        raise UsageError(f"extracting: expected 1 word or more, found {words}")
    check_group(group)
    return _extracts(snapshot, since, store, mode, words, group, on_failure)


def _extracts(
    snapshot: Snapshot,
    since: Snapshot | None,
    store: Store,
    mode: Mode,
    words: int,
    group: int,
    on_failure: OnFailure | None,
) -> Iterator[Summary]:
    read = next(readings(snapshot))
    before = None if since is None else next(readings(since))
    if before is not None:
        check_since(read, before, store)
    with text_of(read, store) as text:
        is_log = log_templates.is_log(text)
        of: dict[tuple[int, int], Ranges] = {}  # by level and index, of what is not joined yet

        def taken(ranges: Ranges) -> tuple[Extract, ...]:
            return tuple(log_templates.templates(text, ranges) if is_log else extract(text, ranges, words))

        def leaves() -> Iterator[Summary]:
            start = (before.bytes, before.tokens) if before is not None else (0, 0)
            whole = Span(0, start[0], read.bytes, start[1], read.tokens, read.id)
            for span in [whole] if mode == "whole" else (span for span, _ in spans(read, before)):
                try:
                    found = taken([(span.byte_start, span.byte_end)])
                except SnapshotError as error:
                    failure = SnapshotError(f"summarizing bytes {span.byte_start}-{span.byte_end}: {error}")
                    if on_failure is None:
                        raise failure from error
                    on_failure(failure)
                    continue
                of[0, span.number] = [(span.byte_start, span.byte_end)]
                yield Summary(read.document, 0, *span, told(found), 0, (), found)

        def join(parts: list[Summary], index: int) -> Summary:
            first, last = parts[0], parts[-1]
            ranges = _merged([one for part in parts for one in of.pop((part.level, part.index))])
            of[first.level + 1, index] = ranges
            found = taken(ranges)
            return replace(
                first,
                level=first.level + 1,
                index=index,
                byte_end=last.byte_end,
                token_end=last.token_end,
                snapshot=last.snapshot,
                text=told(found),
                children=tuple(part.index for part in parts),
                extracts=found,
            )

        yield from tree(leaves(), group, join) if mode == "tree" else leaves()


def _merged(ranges: Ranges) -> Ranges:
    """The same ranges, those that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def told(extracts: Sequence[Extract]) -> str:
    """What was taken, each in a line: of a log how many lines follow a frequent template, or a strange line."""
    return "\n".join(
        f"{one.count:,} × {one.template}" if one.why == "frequent" else " ".join(one.text.split()) for one in extracts
    )
