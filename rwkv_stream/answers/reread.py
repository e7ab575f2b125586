"""The model reads again the passages that fit a question, the question before and after them, and answers from these.

A state that has read a book has forgotten most of it; what is read just before it answers it has not. The question is
read before the passages too, so that it is known while they are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rwkv_stream.answers import prompts
from rwkv_stream.answers.answer import Answer, Source
from rwkv_stream.answers.quote import passages
from rwkv_stream.model.generation import complete

if TYPE_CHECKING:
    from rwkv_stream.answers.candidates import Text
    from rwkv_stream.answers.prompts import Question
    from rwkv_stream.answers.quote import ReadText
    from rwkv_stream.model import Model
    from rwkv_stream.model.sampling import Sampling

NAME = "reread"  # of this strategy
PASSAGES = 3  # that are read again, in the order of the text
ROWS = 16  # questions that are answered side by side


class Passage(NamedTuple):
    """What was read again: which of the texts it is of, where it stands there, and what it says."""

    text_index: int
    byte_start: int
    byte_end: int
    text: str


class Reread(NamedTuple):
    """An answer, the passages that it rests on, and how many tokens were made; without passages there is none."""

    answer: str | None
    passages: tuple[Passage, ...]
    tokens: int


def reread(
    questions: Iterable[str], texts: Sequence[Text], model: Model, sampling: Sampling | None = None
) -> Iterator[Reread]:
    """An answer to each question, in order, from the model's own start: it has read nothing but the passages.

    sampling  default: that of the model's prompt family; the family's stop texts always hold
    raises    SnapshotError for a damaged text
    """
    form, rest, index = prompts.family(model), iter(questions), 0
    chosen = prompts.answering(form) if sampling is None else replace(sampling, stop=(*form.stop, *sampling.stop))
    _, start = model.start()
    while some := list(itertools.islice(rest, ROWS)):
        found = [_passages(question, texts) for question in some]
        asked = [i for i, passages_of in enumerate(found) if passages_of]
        filled = [prompts.around(form, some[i], "\n\n".join(one.text for one in found[i])) for i in asked]
        rows = complete(model, filled, [start] * len(asked), chosen, [index + i for i in asked])
        answered = dict(zip(asked, rows, strict=True))
        for i, passages_of in enumerate(found):
            row = answered.get(i)
            yield Reread(None, (), 0) if row is None else Reread(row.text.strip(), passages_of, row.tokens)
        index += len(some)


def _passages(question: str, texts: Sequence[Text]) -> tuple[Passage, ...]:
    """The passages that fit a question, in the order of the texts; those that touch are one."""
    found = passages(question, texts, PASSAGES)
    places = sorted((one.text_index, one.sentences[0][0], one.sentences[-1][1]) for one in found)
    joined = list[tuple[int, int, int]]()
    for index, start, end in places:
        if joined and joined[-1][0] == index and start <= joined[-1][2]:
            joined[-1] = (index, joined[-1][1], max(end, joined[-1][2]))
        else:
            joined.append((index, start, end))
    return tuple(Passage(i, start, end, texts[i].read(start, end).decode()) for i, start, end in joined)


def answers(
    questions: Iterable[Question],
    texts: Sequence[ReadText],
    model: Model,
    sampling: Sampling | None = None,
    snapshot: str | None = None,
) -> Iterator[Answer]:
    """As `reread`, from texts that `quote.read_texts` or `quote.all_texts` gave; `snapshot` is that which is asked."""
    first, second = itertools.tee(questions)
    found = reread((one.text for one in first), [one.text for one in texts], model, sampling)
    for asked, reply in zip(second, found, strict=True):
        sources = []
        for passage in reply.passages:
            read = texts[passage.text_index]
            place = read.text.place(passage.byte_start) or None
            span = passage.byte_start, passage.byte_end
            sources.append(Source(read.text.document, *span, passage.text, place, read.snapshot))
        yield Answer(asked.text, reply.answer, snapshot, NAME, None, reply.tokens, tuple(sources), asked.id)
