"""What a way of answering is: given a subject and questions, candidates for each, with what they rest on.

A strategy says what of a subject it needs, so that nobody reads a book into a state, or loads a model, for one that
looks into the text. The ways there are stand in `strategies.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from rwkv_stream.answers import prompts
from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from rwkv_stream.answers.candidates import Text
    from rwkv_stream.answers.prompts import Question
    from rwkv_stream.model import Model
    from rwkv_stream.model.generation import Row
    from rwkv_stream.model.sampling import Sampling
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot

ROWS = 16  # questions, and states, that are read side by side

# "kept text" and "cells" are used where they are there: a text that was not kept is not read again for the first.
Need = Literal["model", "state", "text", "kept text", "snapshots", "cells", "passage"]


class Span(NamedTuple):
    """Bytes of one of the texts of a subject, end excluded."""

    text: int
    byte_start: int
    byte_end: int


class ChunkState(NamedTuple):
    """A stretch of a text, and the state that has read it and nothing else; None where none was kept."""

    span: Span
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What questions are asked on, as far as it is there.

    document  its name, for messages
    state     of batch 1, after all of it
    texts     that are looked into, of a store those with the snapshots that have read them; what is found to be damaged
              may be taken out
    chunks    all of the texts in stretches, of those whose states were kept
    is_part   whether only a part is asked about, so that a state which has read all is not to answer
    """

    document: str
    model: Model | None = None
    state: State | None = None
    texts: Sequence[Text] = ()
    chunks: Sequence[ChunkState] = ()
    is_part: bool = False

    def loaded(self) -> Model:
        """The model. Raises UsageError where there is none, as the others do."""
        if self.model is None:
            raise self.lacks("a model")
        return self.model

    def read_state(self) -> State:
        """The state."""
        if self.state is None:
            raise self.lacks("a state that has read it")
        return self.state

    def read_texts(self) -> Sequence[Text]:
        """The texts."""
        if not self.texts:
            raise self.lacks("a text of it")
        return self.texts

    def lacks(self, what: str) -> UsageError:
        """The error where something is needed and not there."""
        return UsageError(f"answering on '{self.document}': expected {what}, found none")


@dataclass(frozen=True, slots=True)
class Manner:
    """How it is answered.

    k         candidates for each question, as far as a strategy has more than one
    sampling  of what a model writes; None: that of its prompt family, whose stop texts always hold
    template  of the prompt, with {question} in it; None: the family's
    """

    k: int = 1
    sampling: Sampling | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A candidate for an answer.

    text        None where the strategy finds nothing that answers
    spans       what it rests on, in the order in which it was read; None: all that the state has read
    stands      where the answer itself stands, if it is quoted: within the only span
    confidence  that it is right, 0 to 1, where the strategy can tell
    evidence    how sure it is that what it rests on holds the answer, 0 to 1, where that was measured
    by, why     of strategies that choose among others: the one that was chosen, and the reason
    read, made  tokens that a model read for it, what the questions before it have read for it not counted, and wrote
    """

    text: str | None
    spans: tuple[Span, ...] | None = ()
    stands: Span | None = None
    confidence: float | None = None
    read: int = 0
    made: int = 0
    evidence: float | None = None
    by: str | None = None
    why: str | None = None


class Strategy(Protocol):
    """A way of answering.

    name   by which it is asked for
    needs  what of a subject, and of a question, it cannot do without
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """The candidates for each of ROWS questions at most, best first, one or more; none knows of the other
        questions. Raises UsageError for what it needs and has not, SnapshotError for a damaged text or state."""
        ...


def completed(
    model: Model,
    questions: Sequence[Question],
    filled: Sequence[str | Sequence[int]],
    states: Sequence[State],
    manner: Manner,
) -> list[Row]:
    """What the model writes after each question's prompt, read into a fork of its state."""
    from rwkv_stream.model.generation import complete

    sampling = prompts.answering(prompts.family(model), manner.sampling)
    return complete(model, filled, states, sampling, [question.index for question in questions])


def prompted(model: Model, question: Question, manner: Manner) -> str:
    """The prompt for a question after what was read."""
    return prompts.fill(manner.template or prompts.family(model).template, question.text)
