"""The model reads again the passages that fit a question, the question before and after them, and answers from these.

A state that has read a book has forgotten most of it; what is read just before it answers it has not. The question is
read before the passages too, so that it is known while they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.answers import prompts
from rwkv_stream.answers.quote import passages
from rwkv_stream.answers.strategy import Manner, Need, Reply, Span, Subject, completed

if TYPE_CHECKING:
    from rwkv_stream.answers.candidates import Text
    from rwkv_stream.answers.prompts import Question

PASSAGES = 3  # that are read again, in the order of the text


@dataclass(frozen=True, slots=True)
class Reread:
    """Read the passages of the document that fit the question, and nothing else, between the question and itself."""

    name = "reread"
    needs: frozenset[Need] = frozenset({"model", "text"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; without an answer where the texts don't speak of what is asked."""
        texts, model = subject.read_texts(), subject.loaded()
        form, start = prompts.family(model), model.start()[1]
        spoken = [spans_of(question.text, texts) for question in questions]
        found, asked = [spans for spans, _ in spoken], [i for i, (spans, _) in enumerate(spoken) if spans]
        filled = [prompts.around(form, questions[i].text, "\n\n".join(_read(texts, found[i]))) for i in asked]
        rows = completed(model, [questions[i] for i in asked], filled, [start] * len(asked), manner)
        made = {
            i: Reply(row.text.strip(), found[i], read=row.read, made=row.tokens, evidence=spoken[i][1])
            for i, row in zip(asked, rows, strict=True)
        }
        return [[made.get(i, Reply(None))] for i in range(len(questions))]


def _read(texts: Sequence[Text], spans: Sequence[Span]) -> list[str]:
    return [texts[span.text].read(span.byte_start, span.byte_end).decode() for span in spans]


def spans_of(question: str, texts: Sequence[Text], most: int = PASSAGES) -> tuple[tuple[Span, ...], float]:
    """The passages that fit a question, in the order of the texts; those that touch are one. None where the texts do
    not speak of what is asked. And how sure it is that the best of them holds the answer, 0 to 1."""
    found = passages(prompts.clean(question), texts, most)
    joined = list[Span]()
    for span in sorted(Span(one.text_index, one.sentences[0][0], one.sentences[-1][1]) for one in found):
        if joined and joined[-1].text == span.text and span.byte_start <= joined[-1].byte_end:
            joined[-1] = joined[-1]._replace(byte_end=max(span.byte_end, joined[-1].byte_end))
        else:
            joined.append(span)
    return tuple(joined), found[0].confidence if found else 0.0
