"""What every step reads: stretches of documents, packed one behind the other into lanes that carry their state.

A lane reads a stretch from its first token to its last, window after window; where it ends, the next begins in the
same window from the initial state. A stretch is a document, or of long ones a part, before which stands the tokenizer's
start token as `ingest` feeds it; behind the last token of a document stands the end token, which is learnt with it.
Which stretches follow each other is a function of the seed and of how many were drawn: a stopped run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import Encoded, TokenFile, encoded
from rwkv_stream.training.exercises import Exercises

IGNORED = -100  # a target that is not learnt


class Batch(NamedTuple):
    """What one step reads, of L lanes: S segments of stretches, laid end to end.

    tokens   int64 [n]
    targets  int64 [n], the tokens that follow; IGNORED where they are not learnt
    lengths  int64 [S]
    start    int64 [S], the lane whose state a segment goes on from, or L: the initial state
    keep     int64 [L], the last segment of each lane
    """

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    start: Tensor
    keep: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(z.to(device) for z in self))

    def of_lanes(self, begin: int, end: int) -> Batch:
        """What of it lanes `begin` to `end`, end excluded, read; they are counted from `begin`."""
        lasts = [-1, *self.keep.tolist()]
        first, last = lasts[begin] + 1, lasts[end] + 1
        edges, start = [0, *self.lengths.cumsum(0).tolist()], self.start[first:last]
        tokens = slice(edges[first], edges[last])
        return Batch(
            self.tokens[tokens],
            self.targets[tokens],
            self.lengths[first:last],
            torch.where(start == len(self.keep), end, start) - begin,
            self.keep[begin:end] - first,
        )


def laid_out(documents: Sequence[Encoded]) -> Batch:
    """Documents or parts of them, each a segment from the initial state, none of whose states is kept.

    The first token of each is only read, the last only learnt.
    """
    ids = [document.tokens for document in documents]
    targets = [np.where(z.is_learnt[1:], z.tokens[1:], IGNORED) for z in documents]
    tokens, wanted = (torch.from_numpy(np.concatenate(z)) for z in ([z[:-1] for z in ids], targets))
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens, wanted, torch.tensor([len(z) - 1 for z in ids]), torch.zeros(len(ids), dtype=torch.int64), none
    )


class Source(Protocol):
    """Gives stretches by number, without end."""

    @property
    def size(self) -> float:
        """Tokens that there are, for its share where none is given."""

    def stretch(self, number: int) -> Encoded:
        """A stretch: its first token is only read."""


class Shuffled:
    """Numbers below `count`, all of them once in each epoch, in an order that the seed decides."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self._count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count)
        return int(self._order[place])


def edges(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The tokens that stand before a document and behind it, where there are any."""
    return tokenizer.start_token, next(iter(tokenizer.end_tokens), None)


class Texts:
    """Stretches of at most `longest` tokens of the documents in a file, all of them once in each epoch, shuffled."""

    def __init__(self, file: TokenFile, longest: int, tokenizer: Tokenizer, seed: int) -> None:
        self._file, self._longest = file, longest
        self._start, self._end = edges(tokenizer)
        self._first = np.cumsum([0, *(-(-file.lengths // longest))])
        self._order = Shuffled(int(self._first[-1]), seed)

    @property
    def size(self) -> float:
        return float(self._file.lengths.sum())

    def stretch(self, number: int) -> Encoded:
        chosen = self._order[number]
        document = int(np.searchsorted(self._first, chosen, side="right")) - 1
        begin = (chosen - int(self._first[document])) * self._longest
        end, length = begin + self._longest, int(self._file.lengths[document])
        part = self._file.read(document, begin, min(end, length))
        return framed(part, self._start, self._end if end >= length else None)

    def beginning(self, document: int) -> Encoded:
        """The first stretch of a document."""
        end = min(self._longest, int(self._file.lengths[document]))
        return framed(self._file.read(document, 0, end), self._start, None)


class Made:
    """Exercises of some kinds in turn, each a stretch, made as they are asked for."""

    size = 0.0

    def __init__(self, kinds: Sequence[str], tokenizer: Tokenizer, seed: int, between: Between | None = None) -> None:
        """between  text that stands between what an exercise tells and what it asks"""
        self._kinds, self._tokenizer, self._seed, self._between = kinds, tokenizer, seed, between

    def stretch(self, number: int) -> Encoded:
        made = Exercises(self._seed * 1_000_003 + number).make(self._kinds[number % len(self._kinds)])
        parts = [encoded(made[:1], self._tokenizer.encode), encoded(made[1:], self._tokenizer.encode)]
        if self._between is not None:
            parts.insert(1, self._between(number))
        return framed(joined(parts), self._tokenizer.start_token, None)


class Between:
    """Text of some tokens, that is only read: from anywhere in a file, short ones more often than long ones."""

    def __init__(self, file: TokenFile, longest: int, seed: int) -> None:
        self._file, self._longest, self._seed = file, longest, seed
        self._ends = np.cumsum(file.lengths)

    def __call__(self, number: int) -> Encoded:
        """The text of a number."""
        rng = np.random.default_rng((self._seed, number, 1))
        length = int(np.exp(rng.uniform(np.log(8), np.log(self._longest))))
        place = int(rng.integers(int(self._ends[-1])))
        document = int(np.searchsorted(self._ends, place, side="right"))
        begin = place - int(self._ends[document] - self._file.lengths[document])
        found = self._file.read(document, begin, min(begin + length, int(self._file.lengths[document])))
        return Encoded(found.tokens, np.zeros(len(found.tokens), bool))


def joined(parts: Sequence[Encoded]) -> Encoded:
    """One behind the other."""
    return Encoded(np.concatenate([z.tokens for z in parts]), np.concatenate([z.is_learnt for z in parts]))


class Repeats:
    """Rows of tokens, each row two to four times, some with text between: all but the first are learnt.

    Such rows teach to copy at a distance, whatever is copied (Olsson et al. 2022, In-context Learning and Induction
    Heads). Half are drawn as often as a text has them, half evenly of those that it has.
    """

    size = 0.0
    DOCUMENTS = 64  # that are counted, drawn by the seed
    TOKENS = 1 << 16  # of each, at most

    def __init__(self, file: TokenFile, tokenizer: Tokenizer, seed: int, between: Between) -> None:
        """file  of the text whose frequencies are taken"""
        counts = np.zeros(tokenizer.vocab_size)
        for document in np.random.default_rng(seed).permutation(len(file.lengths))[: self.DOCUMENTS]:
            length = min(int(file.lengths[document]), self.TOKENS)
            counts += np.bincount(file.read(int(document), 0, length).tokens, minlength=len(counts))
        special = [z for z in (tokenizer.start_token, *tokenizer.end_tokens) if z is not None]
        counts[special] = 0
        self._sums, self._start, self._seed = np.cumsum(counts) / counts.sum(), tokenizer.start_token, seed
        self._known, self._between = np.flatnonzero(counts), between

    def stretch(self, number: int) -> Encoded:
        rng = np.random.default_rng((self._seed, number))
        length, times = int(rng.integers(4, 64)), int(rng.integers(2, 5))
        if rng.random() < 0.5:
            row = np.searchsorted(self._sums, rng.random(length), side="right")
        else:
            row = rng.choice(self._known, length)
        parts = [Encoded(row, np.zeros(length, bool))]
        is_apart = rng.random() < 0.5
        for i in range(1, times):
            if is_apart:
                parts.append(self._between(number * 4 + i))
            is_known = i > 1 and not is_apart  # the first token: by what came behind the row before
            parts.append(Encoded(row, (np.arange(length) > 0) | is_known))
        return framed(joined(parts), self._start, None)


def framed(found: Encoded, start: int | None, end: int | None) -> Encoded:
    """A stretch with the start token before it, which is not learnt, and the end token behind it, which is."""
    before, behind = [] if start is None else [start], [] if end is None else [end]
    learnt = bool(found.is_learnt[-1]) if len(found.is_learnt) else False
    return Encoded(
        np.concatenate([before, found.tokens, behind]).astype(np.int64),
        np.concatenate([[False] * len(before), found.is_learnt, [learnt] * len(behind)]).astype(bool),
    )


@dataclass
class Cursor:
    """How far the lanes are, as it is kept in a checkpoint.

    drawn  how many stretches each source has given, since the run began
    given  how many tokens each source has given, since the shares are these
    lanes  of each lane the source and number of its stretch, and how many tokens of it were read
    """

    drawn: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    lanes: list[tuple[str, int, int] | None] = field(default_factory=list)


class Lanes:
    """Draws stretches from sources by shares of tokens and packs them into windows."""

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, float], lanes: int, cursor: Cursor) -> None:
        """shares: name of a source → its share of the tokens, relative to the others."""
        total = sum(shares.values())
        self._sources, self._shares = sources, {name: share / total for name, share in shares.items() if share > 0}
        self.cursor = cursor
        cursor.lanes = [*cursor.lanes, *[None] * lanes][:lanes]
        self._open: dict[tuple[str, int], Encoded] = {}

    def window(self, tokens: int) -> Batch:
        """The next `tokens` tokens of every lane."""
        parts, start, keep = list[Encoded](), list[int](), list[int]()
        for lane in range(len(self.cursor.lanes)):
            room = tokens
            while room:
                at = self.cursor.lanes[lane]
                if at is None:
                    at = self._draw()
                name, number, place = at
                stretch = self._stretch(name, number)
                n = min(room, len(stretch.tokens) - 1 - place)
                if n > 0:
                    parts.append(stretch.part(place, place + n + 1))
                    start.append(lane if place else len(self.cursor.lanes))
                    room -= n
                is_over = place + n >= len(stretch.tokens) - 1
                self.cursor.lanes[lane] = None if is_over else (name, number, place + n)
                if is_over:
                    del self._open[name, number]
            keep.append(len(parts) - 1)
        return laid_out(parts)._replace(start=torch.tensor(start), keep=torch.tensor(keep))

    def _draw(self) -> tuple[str, int, int]:
        """The next stretch of the source that has given least for its share."""
        given = self.cursor.given
        name = min(self._shares, key=lambda z: given.get(z, 0) / self._shares[z])
        number = self.cursor.drawn.get(name, 0)
        self.cursor.drawn[name] = number + 1
        given[name] = given.get(name, 0) + len(self._stretch(name, number).tokens) - 1
        return name, number, 0

    def _stretch(self, name: str, number: int) -> Encoded:
        if (name, number) not in self._open:
            self._open[name, number] = self._sources[name].stretch(number)
        return self._open[name, number]
