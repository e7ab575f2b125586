"""Whether a model uses what it has read: contexts are read, forked and asked, and the answers scored.

A context is read once, however much is asked about it, and what several contexts begin with is read once, too: a state
holds it, and is forked. So a needle at three quarters of a text costs a quarter of it. With the native kernels a fork
has the same bits as a reading from the start.

An answer is decoded greedily, without penalties, until the family's stop text or a length in proportion to what is
right. Its score is the share of the right answers that stand in it as whole words, in any case (RULER's
`string_match_all`, which takes parts of words, too).

Memory holds KEPT states of openings and ROWS of contexts, and the tokens of the one that is read; not its haystack.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.evaluation.tasks import Context, Maker, Part, Query
from rwkv_stream.model import Model
from rwkv_stream.model.generation import PREFILL_TOKENS, Batch, read
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State

ROWS = 16  # queries that are answered side by side
KEPT = 8  # states of one opening
SPARE_TOKENS = 16  # of an answer, beside twice what is right


@dataclass(frozen=True, slots=True)
class Trial:
    """An answer and its score, 0 to 1.

    number    of the context among those of its length and depth
    tokens    that a model has read before it answers
    computed  of them, those that were read for this trial: others were shared
    """

    number: int
    query: Query
    answer: str
    score: float
    tokens: int
    computed: int


def score(answer: str, right: Sequence[str]) -> float:
    """The share of right answers that stand in an answer as whole words, in any case."""
    return sum(bool(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", answer, re.IGNORECASE)) for one in right) / len(right)


class Trunk:
    """States after one opening and so much of the haystack, of which the last ones used are kept."""

    def __init__(self, model: Model, haystack: Haystack) -> None:
        self._model, self._haystack = model, haystack
        self._opening: tuple[int, ...] = ()
        self._states: dict[int, State] = {}  # by tokens of the haystack; 0 always, the others as they were used

    def at(self, opening: tuple[int, ...], place: int) -> tuple[State, int]:
        """The state after so many tokens of the haystack, and how many tokens had to be read for it."""
        computed = 0
        if opening != self._opening or not self._states:
            state = self._model.zero_state()
            if opening:
                _, state = read(self._model, opening, state)
            self._opening, self._states, computed = opening, {0: state}, len(opening)
        nearest = max(kept for kept in self._states if kept <= place)
        state = self._states[nearest]
        if nearest:
            self._states[nearest] = self._states.pop(nearest)  # the last used
        if nearest < place:
            state, n = _read(self._model, state, [range(nearest, place)], self._haystack)
            computed += n
            self._states[place] = state
            if len(self._states) > KEPT:
                del self._states[next(kept for kept in self._states if kept)]
        return state, computed


def trials(model: Model, maker: Maker, contexts: Iterable[tuple[int, Context]], trunk: Trunk) -> Iterator[Trial]:
    """The trials of contexts with their numbers, in order. Raises BackendError where logits are not finite."""
    waiting: list[tuple[int, Context, State, int]] = []
    n_waiting = 0
    for number, context in contexts:
        lead, rest = _split(context)
        state, computed = trunk.at(context.opening, lead)
        state, n = _read(model, state, rest, maker.haystack)
        waiting.append((number, context, state, computed + n))
        n_waiting += len(context.queries)
        if n_waiting >= ROWS:
            yield from _answered(model, maker, waiting)
            waiting, n_waiting = [], 0
    yield from _answered(model, maker, waiting)


def _answered(model: Model, maker: Maker, read: Sequence[tuple[int, Context, State, int]]) -> Iterator[Trial]:
    batch, tokenizer = Batch(model), model.tokenizer
    rows = []
    for number, context, state, computed in read:
        for query in context.queries:
            prompt = tokenizer.encode_prompt(query.prompt)
            n_right = len(tokenizer.encode("".join(f" {i}. {right}" for i, right in enumerate(query.answers, 1))))
            sampling = Sampling(temperature=0, max_tokens=2 * n_right + SPARE_TOKENS, stop=maker.form.stop)
            row = batch.add(prompt, state, sampling)
            rows.append((number, query, row, context.tokens + len(prompt), computed + len(prompt)))
            computed = 0  # for the first query alone
    for _ in batch.run():
        pass
    for number, query, row, tokens, computed in rows:
        yield Trial(number, query, row.text.strip(), score(row.text, query.answers), tokens, computed)


def _split(context: Context) -> tuple[int, tuple[Part, ...]]:
    """How much of the haystack's beginning follows the opening, and the parts after that."""
    first = context.parts[0] if context.parts else ()
    return (first.stop, context.parts[1:]) if isinstance(first, range) and not first.start else (0, context.parts)


def _read(model: Model, state: State, parts: Iterable[Part], haystack: Haystack) -> tuple[State, int]:
    """The state after the tokens of the parts, and how many they are; in calls of PREFILL_TOKENS."""
    computed, held = 0, np.empty(0, np.int64)
    for piece in _pieces(parts, haystack):
        held = np.concatenate([held, piece])
        while len(held) >= PREFILL_TOKENS:
            _, state = read(model, held[:PREFILL_TOKENS].tolist(), state)
            computed, held = computed + PREFILL_TOKENS, held[PREFILL_TOKENS:]
            model.trim()
    if len(held):
        _, state = read(model, held.tolist(), state)
    return state, computed + len(held)


def _pieces(parts: Iterable[Part], haystack: Haystack) -> Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    for part in parts:
        for begin in range(0, len(part), PREFILL_TOKENS):
            some = part[begin : begin + PREFILL_TOKENS]
            yield haystack.tokens(some.start, some.stop) if isinstance(some, range) else np.array(some, np.int64)
