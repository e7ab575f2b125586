"""Ways of answering questions on a text: one interface, and the names by which they are asked for.

>>> given = Subject(model, "book.txt", state=state, text=text)
>>> for reply in STRATEGIES["state"].replies([Posed("Who keeps the light?")], given): print(reply.text)

A strategy says what of a subject it needs, so that nobody reads a book into a state for one that looks into the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from rwkv_stream.answers import prompts
from rwkv_stream.answers.candidates import Text
from rwkv_stream.answers.quote import quotes
from rwkv_stream.answers.reread import reread
from rwkv_stream.errors import UsageError
from rwkv_stream.model.generation import complete

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State

ROWS = 16  # questions that are answered side by side

Need = Literal["state", "text", "passage"]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What questions are asked on, as far as it is there.

    state  of batch 1, after all of the document
    """

    model: Model
    document: str
    state: State | None = None
    text: Text | None = None


@dataclass(frozen=True, slots=True)
class Posed:
    """A question, and the passage that is known to answer it, if one is."""

    question: str
    passage: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: empty where the strategy finds none; the bytes of the document that it rests on; how likely it is
    right, 0 to 1, where the strategy can tell."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    confidence: float | None = None


class Strategy(Protocol):
    """A way of answering.

    name   by which it is asked for
    needs  what of a subject, and of what is posed, it cannot do without
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    def replies(self, posed: Sequence[Posed], subject: Subject) -> Iterator[Reply]:
        """A reply to each, in order, none of which knows of the others. Raises UsageError for what it needs and has
        not."""
        ...


@dataclass(frozen=True, slots=True)
class FromState:
    """Fork the state that has read the whole document, as `ask` does."""

    name = "state"
    needs: frozenset[Need] = frozenset({"state"})

    def replies(self, posed: Sequence[Posed], subject: Subject) -> Iterator[Reply]:
        if subject.state is None:
            raise UsageError(f"answering on '{subject.document}': expected a state that has read it, found none")
        template = prompts.family(subject.model).template
        filled = [prompts.fill(template, one.question) for one in posed]
        yield from _completed(subject.model, filled, subject.state)


@dataclass(frozen=True, slots=True)
class FromPassage:
    """Read the passage that is known to answer, and nothing else, before the question: what a perfect search would
    make of the same model."""

    name = "passage"
    needs: frozenset[Need] = frozenset({"passage"})

    def replies(self, posed: Sequence[Posed], subject: Subject) -> Iterator[Reply]:
        template, filled = prompts.family(subject.model).template, []
        for one in posed:
            if one.passage is None:
                raise UsageError(
                    f"answering on '{subject.document}': expected a passage with '{one.question:.40}', found none"
                )
            filled.append(one.passage + prompts.fill(template, one.question))
        yield from _completed(subject.model, filled, subject.model.start()[1])


def _completed(model: Model, filled: Sequence[str], state: State) -> Iterator[Reply]:
    """What the model writes after each prompt, as its family is asked."""
    sampling = prompts.answering(prompts.family(model))
    for begin in range(0, len(filled), ROWS):
        some = filled[begin : begin + ROWS]
        rows = complete(model, some, [state] * len(some), sampling, range(begin, begin + len(some)))
        yield from (Reply(row.text.strip()) for row in rows)


@dataclass(frozen=True, slots=True)
class FromText:
    """Quote the text of the document; no model is asked."""

    name = "quote"
    needs: frozenset[Need] = frozenset({"text"})

    def replies(self, posed: Sequence[Posed], subject: Subject) -> Iterator[Reply]:
        text = _text(subject)
        for one in posed:
            best = next(iter(quotes(one.question, [text])), None)
            yield (
                Reply("") if best is None else Reply(best.answer, ((best.byte_start, best.byte_end),), best.confidence)
            )


@dataclass(frozen=True, slots=True)
class FromPassages:
    """Read the passages of the document that fit the question, and nothing else, between the question and itself."""

    name = "reread"
    needs: frozenset[Need] = frozenset({"text"})

    def replies(self, posed: Sequence[Posed], subject: Subject) -> Iterator[Reply]:
        for found in reread((one.question for one in posed), [_text(subject)], subject.model):
            yield Reply(found.answer or "", tuple((one.byte_start, one.byte_end) for one in found.passages))


def _text(subject: Subject) -> Text:
    if subject.text is None:
        raise UsageError(f"answering on '{subject.document}': expected a text of it, found none")
    return subject.text


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy for strategy in (FromState(), FromPassage(), FromText(), FromPassages())
}


def named(name: str) -> Strategy:
    """The strategy of a name; raises UsageError where there is none."""
    if name not in STRATEGIES:
        raise UsageError(f"answering: expected a strategy of {', '.join(STRATEGIES)}, found '{name}'")
    return STRATEGIES[name]
