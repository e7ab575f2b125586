"""Whether a model uses what it has read: copies, look-ups, facts and pass keys from a seed, and its score on them.

An item is tokens with an answer at their end. It is right if a model that is given all before the answer, and decodes
greedily, writes the answer: if each of the answer's tokens is the likeliest after those before it. Beside stands what
guessing scores: `floor` is the chance of an item for one who knows which answers there are, and takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from rwkv_stream.model import Model
from rwkv_stream.training.data import Document, Piece
from rwkv_stream.training.exercises import Exercises, asked

ROW = 20  # tokens that are copied
CUE = 2  # of them, that are given again
READ_TOKENS = 8192  # of a call: so many rows of one length as fit
CHUNK = 1024  # tokens of a row in a call


@dataclass(frozen=True, slots=True)
class Item:
    """tokens  what is read; the last `n_answer` are the answer; floor: the chance of one who guesses."""

    tokens: tuple[int, ...]
    n_answer: int
    floor: float


@dataclass(frozen=True, slots=True)
class Score:
    """Of n items: the share that is right, of their answers' tokens the share that is, and what guessing scores."""

    n: int
    exact: float
    tokens: float
    floor: float


def copies(model: Model, text: str, distance: int, n: int, seed: int) -> Iterator[Item]:
    """Twenty different tokens of a text, drawn at random, then the text, then the first two again: the rest is asked.

    distance  tokens from the row to its repetition
    """
    ids, random = model.tokenizer.encode(text), Random(f"copies {distance} {seed}")
    known = sorted({*ids} - {*model.tokenizer.end_tokens})
    for _ in range(n):
        row = random.sample(known, ROW)
        begin = random.randrange(max(1, len(ids) - distance))
        between = ids[begin : begin + distance - ROW]
        yield Item((*_start(model), *row, *between, *row), ROW - CUE, 1 / len(known))


def look_ups(model: Model, pairs: int, n: int, seed: int, *, wording: str = "What is {}?") -> Iterator[Item]:
    """A list of made-up keys, never seen in training, with four-digit values, and a question for one of them."""
    random, made = Random(f"look-ups {pairs} {seed}"), Exercises(seed, held_out=True)
    for _ in range(n):
        keys = made.names(pairs)
        values = [str(z) for z in random.sample(range(1000, 10_000), pairs)]
        asks = random.randrange(pairs)
        listed = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
        document = [Piece(listed), asked(wording.format(keys[asks])), Piece(f" {values[asks]}", True)]
        yield _item(model, document, 1 / pairs)


def facts(model: Model, n: int, seed: int) -> Iterator[Item]:
    """Made-up people in sentences whose templates training never sees, and a question for one of the facts."""
    made, random = Exercises(seed, held_out=True), Random(f"facts {seed}")
    for _ in range(n):
        document = made.make("facts")
        answers = [i for i, piece in enumerate(document) if piece.is_learnt]
        asks = random.choice(answers)
        yield _item(
            model, [document[0], document[asks - 1], document[asks]], 1 / len({document[i].text for i in answers})
        )


def passkeys(model: Model, text: str, length: int, n: int, seed: int) -> Iterator[Item]:
    """A five-digit key in a sentence of its own, at any depth of `length` tokens of a text, and the question for it."""
    ids, random = model.tokenizer.encode(text), Random(f"passkeys {length} {seed}")
    for _ in range(n):
        key = str(random.randint(10_000, 99_999))
        needle = model.tokenizer.encode(f" The pass key is {key}. Remember it. ")
        question = model.tokenizer.encode(asked("What is the pass key?").text)
        answer = model.tokenizer.encode(f" {key}")
        around = length - len(needle) - len(question) - len(answer)
        begin, depth = random.randrange(max(1, len(ids) - around)), random.randrange(around)
        before, behind = ids[begin : begin + depth], ids[begin + depth : begin + around]
        tokens = (*_start(model), *before, *needle, *behind, *question, *answer)
        yield Item(tokens, len(answer), 1 / 90_000)


def _start(model: Model) -> tuple[int, ...]:
    return () if model.start_token is None else (model.start_token,)


def _item(model: Model, document: Document, floor: float) -> Item:
    """A document whose last piece is the answer, each piece tokenised alone."""
    ids = [model.tokenizer.encode(piece.text) for piece in document]
    return Item((*_start(model), *(z for part in ids for z in part)), len(ids[-1]), floor)


@torch.no_grad()
def score(model: Model, items: Iterable[Item], done: Callable[[int], None] = lambda _: None) -> Score:
    """Read the items, several of about one length in a call; `done` is told how many."""
    found, waiting = sorted(items, key=lambda item: len(item.tokens)), list[Item]()
    right = tokens = n_tokens = 0
    for i, item in enumerate(found, 1):
        waiting.append(item)
        following = found[i : i + 1]
        if not following or (len(waiting) + 1) * len(following[0].tokens) > READ_TOKENS:
            hits = _hits(model, waiting)
            right += sum(bool(hit.all()) for hit in hits)
            tokens, n_tokens = tokens + int(sum(hit.sum() for hit in hits)), n_tokens + sum(map(len, hits))
            done(len(waiting))
            waiting = []
    return Score(len(found), right / len(found), tokens / n_tokens, sum(item.floor for item in found) / len(found))


def _hits(model: Model, items: Sequence[Item]) -> list[Tensor]:
    """Of each item's answer, which tokens are the likeliest; rows are padded behind, where nobody looks."""
    lengths = torch.tensor([len(item.tokens) - 1 for item in items])
    rows = torch.zeros(len(items), int(lengths.max()), dtype=torch.int64)
    for row, item in zip(rows, items, strict=True):
        row[: len(item.tokens) - 1] = torch.tensor(item.tokens[:-1])
    state, parts = model.zero_state(len(items)), []
    kept = max(item.n_answer for item in items)
    first = max(0, int(lengths.min()) - kept) // CHUNK * CHUNK  # no answer begins before
    for begin in range(0, rows.shape[1], CHUNK):
        hidden, state = model.forward(rows[:, begin : begin + CHUNK], state, logits="none")
        if begin >= first:
            parts.append(hidden)
    hidden = torch.cat(parts, dim=1)
    hits = []
    for i, item in enumerate(items):
        end = len(item.tokens) - 1 - first
        likeliest = model.head(hidden[i, end - item.n_answer : end]).argmax(-1)
        hits.append(likeliest.cpu() == torch.tensor(item.tokens[-item.n_answer :]))
    return hits
