"""A question is read into the kept state of every chunk of a text, each of which has read its chunk and nothing else.

`cells` takes the answer of the state that is surest of how to begin it, among those that do not abstain: of the least
entropy of the first token (OPRM: Ben-Kish et al. 2025, arXiv 2505.07793). `map-reduce` lets every state answer, and
the model answer once more from what they said. States are read ROWS at a time, so that a thousand take no more memory
than ten; a stretch of the text of which no state was kept, as behind the last one, is read when it is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rwkv_stream.answers import prompts
from rwkv_stream.answers.kept import ReadText
from rwkv_stream.answers.strategy import ROWS, ChunkState, Manner, Need, Reply, Span, Subject, completed
from rwkv_stream.reading.isolated import CHUNK_TOKENS
from rwkv_stream.reading.states import start_of

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.answers.prompts import Question
    from rwkv_stream.model import Model
    from rwkv_stream.model.sampling import Sampling
    from rwkv_stream.model.state import State

PARTS = 16  # answers of chunks that are joined into one


class _Asked(NamedTuple):
    """Some states that have read one of the questions.

    question   which
    spans      what the states have read before
    hidden     [n, C], of the last token of the prompt; state: batch n
    entropies  of the first token of the answer, in nats [n]
    read       tokens
    """

    question: int
    spans: list[Span]
    hidden: Tensor
    state: State
    entropies: list[float]
    read: int


class _Part(NamedTuple):
    """What one state answers."""

    entropy: float
    text: str
    span: Span


@dataclass(frozen=True, slots=True)
class Cells:
    """Ask the states of all chunks; the surest answers."""

    name = "cells"
    needs: frozenset[Need] = frozenset({"model", "text", "cells"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; without an answer where all states abstain."""
        model = subject.loaded()
        sampling = prompts.answering(prompts.family(model), manner.sampling)
        best: list[_Part | None] = [None] * len(questions)
        read, made = [0] * len(questions), [0] * len(questions)
        for asked in _asked(questions, subject, manner):
            i, found = asked.question, best[asked.question]
            read[i] += asked.read
            for j in sorted(range(len(asked.spans)), key=asked.entropies.__getitem__):
                if found is not None and asked.entropies[j] >= found.entropy:
                    break
                ((text, tokens),) = _answers(model, asked, [j], sampling, questions[i].index)
                made[i] += tokens
                if not prompts.abstains(text):
                    best[i] = _Part(asked.entropies[j], text, asked.spans[j])
                    break
        return [
            [Reply(None if one is None else one.text, () if one is None else (one.span,), read=read[i], made=made[i])]
            for i, one in enumerate(best)
        ]


@dataclass(frozen=True, slots=True)
class MapReduce:
    """Let the states of all chunks answer, and the model answer from the surest of these."""

    name = "map-reduce"
    needs: frozenset[Need] = frozenset({"model", "text", "cells"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; without an answer where all states abstain."""
        model = subject.loaded()
        form, start = prompts.family(model), model.start()[1]
        sampling = prompts.answering(form, manner.sampling)
        parts: list[list[_Part]] = [[] for _ in questions]
        read, made = [0] * len(questions), [0] * len(questions)
        for asked in _asked(questions, subject, manner):
            i = asked.question
            read[i] += asked.read
            told = _answers(model, asked, range(len(asked.spans)), sampling, questions[i].index)
            for (text, tokens), entropy, span in zip(told, asked.entropies, asked.spans, strict=True):
                made[i] += tokens
                if not prompts.abstains(text):
                    parts[i].append(_Part(entropy, text, span))
            parts[i] = sorted(parts[i], key=lambda part: part.entropy)[:PARTS]
        for some in parts:
            some.sort(key=lambda part: part.span)
        several = [i for i, some in enumerate(parts) if len({part.text for part in some}) > 1]
        filled = [
            prompts.around(form, questions[i].text, "\n".join(dict.fromkeys(part.text for part in parts[i])))
            for i in several
        ]
        rows = completed(model, [questions[i] for i in several], filled, [start] * len(several), manner)
        joined = dict(zip(several, rows, strict=True))
        replies = list[list[Reply]]()
        for i, some in enumerate(parts):
            row = joined.get(i)
            answer = row.text.strip() if row is not None else some[0].text if some else None
            more = (row.read, row.tokens) if row is not None else (0, 0)
            replies.append([Reply(answer, tuple(z.span for z in some), read=read[i] + more[0], made=made[i] + more[1])])
        return replies


def covers(subject: Subject) -> bool:
    """Whether there are chunk states of every text that is looked into."""
    return bool(subject.texts) and {one.span.text for one in subject.chunks} == {*range(len(subject.texts))}


def _asked(questions: Sequence[Question], subject: Subject, manner: Manner) -> Iterator[_Asked]:
    """ROWS states at a time, having read each of the questions."""
    from rwkv_stream.model.generation import joined

    if not covers(subject):
        raise subject.lacks("states of its chunks, which `ingest --cells` keeps")
    model = subject.loaded()
    filled = [prompts.of_part(prompts.family(model), question.text, manner.template) for question in questions]
    tokens = [model.tokenizer.encode_prompt(prompt) for prompt in filled]
    chunks = iter(subject.chunks)
    while some := list(itertools.islice(chunks, ROWS)):
        loaded = [_state(chunk, subject, model) for chunk in some]
        states = joined([state.to(model.device) for state, _ in loaded])
        late = sum(n for _, n in loaded)
        for i, prompt in enumerate(tokens):
            hidden, state = _read(model, prompt, states)
            log_p = model.head(hidden).log_softmax(-1)
            entropies = -(log_p.exp() * log_p).sum(-1)
            read = len(prompt) * len(some) + (late if i == 0 else 0)
            yield _Asked(i, [chunk.span for chunk in some], hidden, state, entropies.tolist(), read)


def _state(chunk: ChunkState, subject: Subject, model: Model) -> tuple[State, int]:
    """The state that has read a chunk, and how many tokens were read for it now."""
    from rwkv_stream.model.generation import read

    if chunk.snapshot is not None:
        return chunk.snapshot.state(), 0
    text = subject.texts[chunk.span.text]
    assert isinstance(text, ReadText) and text.reading is not None
    tokens = model.tokenizer.encode(text.read(*chunk.span[1:]).decode(errors="replace"))
    if len(tokens) > CHUNK_TOKENS:
        raise subject.lacks(
            f"states of the chunks of '{text.document}' from byte {chunk.span.byte_start:,} to "
            f"{chunk.span.byte_end:,}, which `ingest --cells` keeps"
        )
    return read(model, tokens, start_of(text.reading, model))[1], len(tokens)


def _read(model: Model, prompt: Sequence[int], states: State) -> tuple[Tensor, State]:
    """A prompt read into forks of some states, in calls of PREFILL_TOKENS: hidden [n, C] of its last token, states."""
    import torch

    from rwkv_stream.model.generation import PREFILL_TOKENS, joined, read
    from rwkv_stream.model.state import State

    rows = max(1, PREFILL_TOKENS // len(prompt))
    hidden: list[Tensor] = []
    after: list[State] = []
    for first in range(0, states.batch, rows):
        few = State({name: tensor[first : first + rows] for name, tensor in states.items()})
        if len(prompt) > PREFILL_TOKENS:
            last, state = read(model, prompt, few)
            hidden.append(last[None])
        else:
            lengths = torch.full((few.batch,), len(prompt))
            of_all, state = model.forward_packed(torch.tensor(prompt).repeat(few.batch), lengths, few)
            hidden.append(of_all[(lengths.cumsum(0) - 1).to(of_all.device)])
        after.append(state)
    return torch.cat(hidden), joined(after)


def _answers(
    model: Model, asked: _Asked, which: Sequence[int], sampling: Sampling, index: int
) -> list[tuple[str, int]]:
    """What some of the states that were asked write, and how many tokens that takes."""
    from rwkv_stream.model.generation import Batch

    batch = Batch(model)
    rows = [batch.add((), asked.state.row(j), sampling, last_hidden=asked.hidden[j], index=index) for j in which]
    for _ in batch.run():
        pass
    return [(row.text.strip(), row.tokens) for row in rows]
