"""Summaries of what snapshots have read: made by forking their states, never by reading the text again.

| mode    | summaries                                                                                                |
|---------|----------------------------------------------------------------------------------------------------------|
| whole   | one, of all that the snapshot has read                                                                   |
| each    | one for each span between a snapshot and the next of the lineage, oldest first                           |
| rolling | at the end of each span one of all the text up to there, made from the one before, within a token budget |
| tree    | those of `each`, and each group of them joined, and groups of these, up to one                           |

A span is forked at its end: the state there has read all the text before, too, but remembers the latest best, and the
prompt says how much of it is meant. Spans lie edge to edge from byte 0 to the snapshot: where snapshots were removed,
the span after them begins at the nearest before that exists. States are forked in batches of ROWS.

Joining is a fresh reading of the summaries from the model's start state. Memory holds the positions of the snapshots, a
batch of states, and `group + 1` summaries a level.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rwkv_stream.answers import prompts
from rwkv_stream.answers.ask import Conversation
from rwkv_stream.answers.strategy import ROWS
from rwkv_stream.answers.summary import GROUP, OnFailure, Span, Summary, check_group, spans, tree
from rwkv_stream.errors import MismatchError, SnapshotError, UsageError
from rwkv_stream.model.generation import complete
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.reading.states import with_state
from rwkv_stream.store.records import check_model

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot

Mode = Literal["whole", "each", "rolling", "tree"]
MODES: tuple[Mode, ...] = ("whole", "each", "rolling", "tree")
WORD_BYTES = 6  # of a word with its space, roughly: prompts speak of words


def summarize(
    *,
    snapshot: Snapshot,
    model: Model,
    mode: Mode = "whole",
    since: Snapshot | None = None,
    sampling: Sampling | None = None,
    budget: int | None = None,
    group: int = GROUP,
    on_failure: OnFailure | None = None,
) -> Iterator[Summary]:
    """The summaries of a mode, as they are made: by position, a joined one after those it is of.

    since       only of what was read after this one, which the caller has checked (`check_since`); of mode whole the
                span from there is asked for
    sampling    default: that of the model's prompt family; the family's stop texts always hold
    budget      of `rolling`: tokens of a summary, both made and read again; default: the sampling's max_tokens
    group       of `tree`: how many are joined, 2 or more
    on_failure  told of each span whose snapshot cannot be used, which is then left out; without it that is raised
    raises      MismatchError if another model made the snapshot, UsageError; while iterating SnapshotError
    """
    check_model(snapshot, model)
    if mode not in MODES:
        raise UsageError(f"summarizing: expected a mode of {', '.join(MODES)}, found '{mode}'")
    if budget is not None and (mode != "rolling" or budget < 1):
        raise UsageError(f"summarizing: expected a budget of 1 or more, for mode rolling; found {budget}, {mode}")
    check_group(group)
    if mode == "whole" and since is None:
        return _whole(snapshot, model, sampling)
    if budget is not None and sampling is None:
        sampling = replace(prompts.family(model).sampling, max_tokens=budget)
    work = _Summarizer(snapshot, model, sampling, on_failure, since, is_whole=mode == "whole")
    if mode == "rolling":
        return work.rolling(budget)
    return work.tree(group) if mode == "tree" else work.each()


class Whole:
    """The summary of all that a snapshot has read, in pieces; afterwards it is in `summary`.

    >>> for piece in whole: print(piece, end="")
    """

    def __init__(self, snapshot: Snapshot, model: Model, sampling: Sampling | None = None) -> None:
        """Raises MismatchError if another model made the snapshot."""
        template = prompts.family(model).summary
        self._conversation = Conversation(snapshot, model, sampling=sampling, template=template)
        self._snapshot = snapshot

    def __iter__(self) -> Iterator[str]:
        return self._conversation.ask(prompts.SUMMARIES["whole"])

    @property
    def summary(self) -> Summary:
        answer, s = self._conversation.answer, self._snapshot
        assert answer is not None
        return Summary(s.document, 0, 0, 0, s.bytes, 0, s.tokens, s.id, answer.answer or "", answer.tokens)


def _whole(snapshot: Snapshot, model: Model, sampling: Sampling | None) -> Iterator[Summary]:
    whole = Whole(snapshot, model, sampling)
    for _ in whole:
        pass
    yield whole.summary


class _Summarizer:
    """Forks the snapshots of one lineage."""

    def __init__(
        self,
        snapshot: Snapshot,
        model: Model,
        sampling: Sampling | None,
        on_failure: OnFailure | None,
        since: Snapshot | None,
        *,
        is_whole: bool,
    ) -> None:
        self._snapshot, self._since, self._is_whole = snapshot, since, is_whole
        self._model = model
        self._family = prompts.family(model)
        self._sampling = sampling or self._family.sampling
        self._on_failure = on_failure

    def each(self) -> Iterator[Summary]:
        states = self._states()
        while batch := list(itertools.islice(states, ROWS)):
            tasks = [self._family.summarizing(_task(span)) for span, _ in batch]
            keys = [span.number for span, _ in batch]
            made = self._make(tasks, [state for _, state in batch], keys, self._sampling)
            for (span, _), (text, tokens) in zip(batch, made, strict=True):
                yield self._summary(span, text, tokens)

    def rolling(self, budget: int | None) -> Iterator[Summary]:
        budget = budget or self._sampling.max_tokens
        sampling = replace(self._sampling, max_tokens=min(budget, self._sampling.max_tokens))
        summary = ""
        for n, (span, state) in enumerate(self._states()):
            task = self._family.summarizing(prompts.SUMMARIES["rolling" if n else "whole"], summary)
            ((text, tokens),) = self._make([task], [state], [span.number], sampling)
            summary = self._cut(text, budget)
            yield replace(self._summary(span, summary, tokens), byte_start=0, token_start=0)

    def tree(self, group: int) -> Iterator[Summary]:
        return tree(self.each(), group, self._join)

    def _join(self, parts: list[Summary], index: int) -> Summary:
        texts = "\n\n".join(part.text for part in parts if part.text)
        first, last = parts[0], parts[-1]
        level = first.level + 1
        prompt = texts + self._family.summarizing(prompts.SUMMARIES["join"])
        key = level << 32 | index  # of no other summary's random numbers
        ((text, tokens),) = self._make([prompt], [self._model.start()[1]], [key], self._sampling)
        return replace(
            first,
            level=level,
            index=index,
            byte_end=last.byte_end,
            token_end=last.token_end,
            snapshot=last.snapshot,
            text=text,
            tokens=tokens,
            children=tuple(part.index for part in parts),
        )

    def _make(
        self, tasks: list[str], states: list[State], keys: list[int], sampling: Sampling
    ) -> Iterator[tuple[str, int]]:
        """For each row its text and the tokens made."""
        sampling = replace(sampling, stop=(*self._family.stop, *sampling.stop))
        for row in complete(self._model, tasks, states, sampling, keys):
            yield row.text.strip(), row.tokens

    def _states(self) -> Iterator[tuple[Span, State]]:
        """The spans, oldest first, with the state at the end of each."""
        found = spans(self._snapshot, self._since)
        if self._is_whole and self._since is not None:
            (*_, (last, end)) = found
            found = iter([(last._replace(byte_start=self._since.bytes, token_start=self._since.tokens), end)])
        for span, snapshot in found:
            try:
                state = with_state(snapshot, self._model).state()
            except (SnapshotError, MismatchError) as error:
                where = f"bytes {span.byte_start}-{span.byte_end}, snapshot {span.snapshot[:12]}"
                failure = type(error)(f"summarizing {where}: {error}")
                if self._on_failure is None:
                    raise failure from error
                self._on_failure(failure)
            else:
                yield span, state

    def _summary(self, span: Span, text: str, tokens: int) -> Summary:
        return Summary(self._snapshot.document, 0, *span, text, tokens)

    def _cut(self, text: str, budget: int) -> str:
        """The text, or so much of its beginning that it is `budget` tokens when it is read again."""
        tokenizer = self._model.tokenizer
        ids, n = tokenizer.encode(text), budget
        while len(tokenizer.encode(text)) > budget:
            text = tokenizer.decode(ids[:n]).decode(errors="ignore").strip()
            n -= 1
        return text


def _task(span: Span) -> str:
    if span.byte_start == 0:
        return prompts.SUMMARIES["whole"]
    words = max(1, (span.byte_end - span.byte_start) // WORD_BYTES)
    rounded = round(words, 2 - len(str(words)))
    return prompts.SUMMARIES["span"].replace("{words}", f"{rounded:,}")
