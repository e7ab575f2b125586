"""The model goes on from the snapshot before a passage, reads up to the passage's end, and answers.

What a state read last it has not forgotten, and what came before the passage it knows too: who "he" is, and where they
are. What that costs is the way from the snapshot to the passage; questions that go the same way share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rwkv_stream.answers.kept import ReadText
from rwkv_stream.answers.reread import spans_of
from rwkv_stream.answers.strategy import Manner, Need, Reply, Span, Subject, completed, prompted
from rwkv_stream.reading.states import start_of, with_state

if TYPE_CHECKING:
    from rwkv_stream.answers.prompts import Question
    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.text.tokenizer import Tokenizer

_PIECE_BYTES = 1 << 16  # of text that are read at once


@dataclass(slots=True)
class _Way:
    """From a snapshot, or from the start of a text, to the end of a passage.

    question  which of the questions takes it
    tokens    all of them
    shared    the first so many are those of the way before, too, and `state` has read them
    """

    question: int
    span: Span
    evidence: float
    tokens: list[int]
    shared: int = 0
    state: State | None = None
    read: int = 0  # tokens that were read for the state


@dataclass(frozen=True, slots=True)
class Nearest:
    """Go on from the snapshot at or before the passage that fits the question best, to the end of the passage."""

    name = "nearest"
    needs: frozenset[Need] = frozenset({"model", "text", "snapshots"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; without an answer where the texts don't speak of what is asked."""
        texts, model = subject.read_texts(), subject.loaded()
        ways: dict[tuple[int, str | None], _Ways] = {}
        for i, question in enumerate(questions):
            spans, evidence = spans_of(question.text, texts, most=1)
            for span in spans:
                text = texts[span.text]
                if not isinstance(text, ReadText):
                    raise subject.lacks("snapshots of it")
                rung = _rung(text, span.byte_start)
                of_rung = ways.setdefault((span.text, rung.id if rung else None), _Ways(text, rung))
                of_rung.ways.append(_Way(i, span, evidence, _tokens(text, rung, span.byte_end, model.tokenizer)))
        taken = [way for of_rung in ways.values() for way in of_rung.read(model)]
        asked = [questions[way.question] for way in taken]
        prompts = [
            [*way.tokens[way.shared :], *model.tokenizer.encode_prompt(prompted(model, question, manner))]
            for way, question in zip(taken, asked, strict=True)
        ]
        rows = completed(model, asked, prompts, [way.state for way in taken if way.state is not None], manner)
        made = {
            way.question: Reply(
                row.text.strip(), (way.span,), read=way.read + row.read, made=row.tokens, evidence=way.evidence
            )
            for way, row in zip(taken, rows, strict=True)
        }
        return [[made.get(i, Reply(None))] for i in range(len(questions))]


@dataclass(slots=True)
class _Ways:
    """The ways that begin at one snapshot of a text; None: at its start."""

    text: ReadText
    rung: Snapshot | None
    ways: list[_Way] = field(default_factory=list)

    def read(self, model: Model) -> list[_Way]:
        """The ways, what each has in common with the next one read: once, however many there are."""
        from rwkv_stream.model.generation import read

        assert self.text.reading is not None
        if self.rung is None:
            first = state = start_of(self.text.reading, model)
        else:
            first = state = with_state(self.rung, model).state().to(model.device)
        self.ways.sort(key=lambda way: (way.span.byte_end, way.question))
        at: list[int] = []  # what `state` has read
        for way, following in itertools.zip_longest(self.ways, self.ways[1:]):
            if way.tokens[: len(at)] != at:
                at, state = [], first
            common = len(at) if following is None else max(len(at), _common(way.tokens, following.tokens))
            if more := way.tokens[len(at) : common]:
                _, state = read(model, more, state)
                way.read = len(more)
                at = way.tokens[:common]
            way.shared, way.state = len(at), state
        return self.ways


def _rung(text: ReadText, byte: int) -> Snapshot | None:
    """The last snapshot of a reading that stands at or before a byte; None where the first stands behind it."""
    assert text.reading is not None
    # tokens that the end of the text decided are other ones where it goes on
    return next((one for one in text.reading.lineage() if one.bytes <= byte and one.decided_byte >= 0), None)


def _tokens(text: ReadText, rung: Snapshot | None, byte_end: int, tokenizer: Tokenizer) -> list[int]:
    """The tokens between a snapshot and a byte, as the reading of a text that ends there has them."""
    byte, token, skip = (0, 0, 0) if rung is None else (rung.anchor_byte, rung.anchor_token, rung.tokens)

    def pieces() -> Iterator[bytes]:
        for begin in range(byte, byte_end, _PIECE_BYTES):
            yield text.read(begin, min(begin + _PIECE_BYTES, byte_end))

    blocks = tokenizer.stream(pieces(), byte=byte, token=token)
    return [token for block in blocks for token in block.ids.tolist()][max(0, skip - token) :]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two begin with."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
