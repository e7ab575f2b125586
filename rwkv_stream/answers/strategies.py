"""Ways of answering questions on a text, by the names by which they are asked for, and the answers that they give.

>>> with subject(snapshot, store, STRATEGIES["quote"].needs) as given:
...     for answer in answers([Question("Who keeps the light?")], STRATEGIES["quote"], given): print(answer.answer)

`ask`, `eval` and Python go this way. Only those that need a model load torch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rwkv_stream.answers.answer import Answer, Source, read_by, readings
from rwkv_stream.answers.choosing import Auto, Vote
from rwkv_stream.answers.chunk_states import Cells, MapReduce
from rwkv_stream.answers.kept import ReadText, chunk_states, read_texts
from rwkv_stream.answers.nearest import Nearest
from rwkv_stream.answers.plain import FromPassage, FromState, Quote
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.reread import Reread
from rwkv_stream.answers.strategy import ROWS, ChunkState, Manner, Need, Reply, Span, Strategy, Subject
from rwkv_stream.errors import SnapshotError, UsageError

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.text.parts import Part


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        FromState(),
        FromPassage(),
        Quote(),
        Reread(),
        Nearest(),
        Cells(),
        MapReduce(),
        Vote(),
        Auto(),
    )
}


def named(name: str) -> Strategy:
    """The strategy of a name; raises UsageError where there is none."""
    if name not in STRATEGIES:
        raise UsageError(f"answering: expected a strategy of {', '.join(STRATEGIES)}, found '{name}'")
    return STRATEGIES[name]


@contextlib.contextmanager
def subject(
    snapshot: Snapshot,
    store: Store | None,
    needs: frozenset[Need],
    model: Model | None = None,
    within: Part | None = None,
) -> Iterator[Subject]:
    """What a snapshot has of the things that are needed, while this context lasts.

    store   that it is of; None where nothing but its state is needed
    within  the part of its document that is looked into
    raises  as `kept.read_texts`; UsageError for a part where no text is looked into
    """
    if within is not None and not needs & {"text", "kept text"}:
        raise UsageError(
            f"answering on '{snapshot.document}': expected a strategy that looks into its text for --within, found one "
            "that asks a state, which has read all; --until asks an earlier one"
        )
    with contextlib.ExitStack() as stack:
        texts, chunks = list[ReadText](), list[ChunkState]()
        is_kept = "kept text" in needs and all(one.text is not None for one in readings(snapshot))
        if "text" in needs or within is not None or is_kept:
            assert store is not None
            texts = stack.enter_context(read_texts(snapshot, store, within))
            chunks = chunk_states(texts, store) if "cells" in needs else []
        state = None
        if "state" in needs:
            from rwkv_stream.reading.states import with_state

            state = snapshot.state() if model is None else with_state(snapshot, model).state()
        yield Subject(snapshot.document, model, state, texts, chunks, within is not None)


def replies(
    questions: Iterable[Question],
    strategy: Strategy,
    subject: Subject,
    manner: Manner | None = None,
    *,
    rows: int | None = None,
    on_damage: Callable[[SnapshotError], None] | None = None,
) -> Iterator[tuple[Question, list[Reply]]]:
    """The candidates for each question, in order, as they are found.

    rows       questions that are read side by side; None: ROWS
    on_damage  is told of a damaged text, which is taken out of the subject's; without it SnapshotError is raised
    """
    rest = iter(questions)
    while some := list(itertools.islice(rest, rows or ROWS)):
        yield from zip(some, _replies(some, strategy, subject, manner or Manner(), on_damage), strict=True)


def _replies(
    questions: Sequence[Question],
    strategy: Strategy,
    subject: Subject,
    manner: Manner,
    on_damage: Callable[[SnapshotError], None] | None,
) -> list[list[Reply]]:
    while True:
        try:
            return strategy.replies(questions, subject, manner)
        except SnapshotError as error:
            whole = [text for text in subject.texts if not (isinstance(text, ReadText) and text.is_damaged)]
            if on_damage is None or len(whole) == len(subject.texts):
                raise
            on_damage(error)
            if not whole:
                return [[Reply(None)] for _ in questions]
            assert isinstance(subject.texts, list)
            subject.texts[:] = whole


def answers(
    questions: Iterable[Question],
    strategy: Strategy,
    subject: Subject,
    manner: Manner | None = None,
    *,
    snapshot: Snapshot | None = None,
    rows: int | None = None,
    on_damage: Callable[[SnapshotError], None] | None = None,
) -> Iterator[Answer]:
    """Answers to each question, best first, in order, with the parts of documents that they rest on; as `replies`.

    subject   whose texts are of a store
    snapshot  that is asked; None where several documents are
    raises    UsageError for k < 1 or an empty question, SnapshotError
    """
    manner = manner or Manner()
    if manner.k < 1:
        raise UsageError(f"answering: expected at least 1 answer to be asked for, found k={manner.k}")
    whole = () if snapshot is None else read_by(snapshot)
    asked = None if snapshot is None else snapshot.id
    found = replies(questions, strategy, subject, manner, rows=rows, on_damage=on_damage)
    for question, candidates in found:
        for rank, reply in enumerate(candidates, 1):
            sources = whole if reply.spans is None else tuple(_source(span, reply, subject) for span in reply.spans)
            first, end = (None, None) if reply.stands is None else reply.stands[1:]
            yield Answer(
                question.text, reply.text, asked, reply.by or strategy.name, reply.confidence, reply.made, sources,
                question.id, rank, first, end, reply.why,
            )  # fmt: skip


def _source(span: Span, reply: Reply, subject: Subject) -> Source:
    """A part of a text, as it stands there; SnapshotError where what is quoted does not."""
    text = subject.texts[span.text]
    assert isinstance(text, ReadText)
    data = text.read(span.byte_start, span.byte_end)
    first = span.byte_start
    if reply.stands is not None:
        first = reply.stands.byte_start
        quoted = data[first - span.byte_start : reply.stands.byte_end - span.byte_start]
        if quoted != (reply.text or "").encode():
            raise SnapshotError(
                f"quoting '{text.document}': expected '{reply.text:.80}' at byte {first}, found "
                f"'{quoted.decode(errors='replace'):.80}'; run `rwkv-stream snapshots verify --read-data`"
            )
    place = text.place(first) or None
    by = text.reading.id if text.reading is not None else None
    return Source(text.document, span.byte_start, span.byte_end, data.decode(), place, by)


def quote(question: str | Question, *, snapshot: Snapshot, store: Store, k: int = 1) -> list[Answer]:
    """The k best answers to a question from the texts that a snapshot has read, best first; one without an answer where
    they don't speak of what is asked. No model is needed.

    raises  UsageError for k < 1 or an empty question, InputError where no text was kept and the document is not to be
            had any more, SnapshotError for a damaged text
    """
    asked = question if isinstance(question, Question) else Question(question)
    strategy = STRATEGIES["quote"]
    with subject(snapshot, store, strategy.needs) as given:
        return list(answers([asked], strategy, given, Manner(k), snapshot=snapshot))
