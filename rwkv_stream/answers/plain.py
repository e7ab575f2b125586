"""Ways of one step: ask the state of the whole, ask after a passage that is known to answer, or quote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.answers import prompts
from rwkv_stream.answers.quote import quotes
from rwkv_stream.answers.strategy import Manner, Need, Reply, Span, Subject, completed, prompted

if TYPE_CHECKING:
    from rwkv_stream.answers.prompts import Question


@dataclass(frozen=True, slots=True)
class FromState:
    """Fork the state that has read the whole document."""

    name = "state"
    needs: frozenset[Need] = frozenset({"model", "state"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        state, model = subject.read_state(), subject.loaded()
        filled = [prompted(model, question, manner) for question in questions]
        rows = completed(model, questions, filled, [state] * len(filled), manner)
        return [[Reply(row.text.strip(), None, read=row.read, made=row.tokens)] for row in rows]


@dataclass(frozen=True, slots=True)
class FromPassage:
    """Read the passage that is known to answer, and nothing else, before the question: what a perfect search would
    make of the same model."""

    name = "passage"
    needs: frozenset[Need] = frozenset({"model", "passage"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        filled, model = list[str](), subject.loaded()
        for question in questions:
            if question.passage is None:
                raise subject.lacks(f"a passage with '{question.text:.40}'")
            filled.append(question.passage + prompted(model, question, manner))
        rows = completed(model, questions, filled, [model.start()[1]] * len(filled), manner)
        return [[Reply(row.text.strip(), read=row.read, made=row.tokens)] for row in rows]


@dataclass(frozen=True, slots=True)
class Quote:
    """Quote the text of the document; no model is asked."""

    name = "quote"
    needs: frozenset[Need] = frozenset({"text"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        return [self._replies(question, subject, manner.k) for question in questions]

    def _replies(self, question: Question, subject: Subject, k: int) -> list[Reply]:
        found = quotes(prompts.clean(question.text), subject.read_texts(), k)
        return [
            Reply(
                one.answer,
                (Span(one.text_index, one.passage_start, one.passage_end),),
                Span(one.text_index, one.byte_start, one.byte_end),
                one.confidence,
            )
            for one in found
        ] or [Reply(None)]
