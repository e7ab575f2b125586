"""Answers quoted from texts: the few words that answer, in their sentence and passage, with their place. No model is
needed: what is said stands in the text, at the bytes that are named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from rwkv_stream.answers import english, evidence, spans
from rwkv_stream.answers.answer import Answer, Source, readings
from rwkv_stream.answers.prompts import Question, clean
from rwkv_stream.errors import InputError, RwkvStreamError, SnapshotError, UsageError
from rwkv_stream.reading.texts import text_of

if TYPE_CHECKING:
    from rwkv_stream.answers.candidates import Text
    from rwkv_stream.answers.passages import Found
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText
    from rwkv_stream.text.postings import Postings
    from rwkv_stream.text.readers.places import Place

NAME = "quote"  # of this strategy


@dataclass(frozen=True, slots=True)
class Quote:
    """An answer that stands in a text; all offsets are bytes of the decoded UTF-8.

    text_index                  which of the texts it is of
    answer                      the words that answer, as they stand there; of a text that is not English the sentence
    byte_start, byte_end        those
    sentence_start, sentence_end, passage_start, passage_end  their sentence, and that with its neighbours
    passage                     the text of the latter
    confidence                  that the passage holds the answer, 0 to 1
    """

    text_index: int
    document: str
    answer: str
    byte_start: int
    byte_end: int
    sentence_start: int
    sentence_end: int
    passage_start: int
    passage_end: int
    passage: str
    confidence: float


def passages(question: str, texts: Sequence[Text], most: int) -> list[Found]:
    """The passages that fit a question best, best first, as far as they don't overlap; none where the texts do not
    speak of what is asked."""
    chosen: list[Found] = []
    taken = set[tuple[int, int]]()
    for one in evidence.spoken_of(question, texts).passages(texts):
        if (one.text_index, one.span[0]) not in taken:
            taken |= {(one.text_index, start) for start, _ in one.sentences}
            chosen.append(one)
            if len(chosen) == most:
                break
    return chosen


def quotes(question: str, texts: Sequence[Text], k: int = 1) -> list[Quote]:
    """The k best answers that stand in the texts, best first; none where the texts do not speak of what is asked, which
    does not say that no text holds the answer.

    raises  UsageError for k < 1
    """
    if k < 1:
        raise UsageError(f"quoting: expected at least 1 answer to be asked for, found k={k}")
    return [_quote(question, one, texts[one.text_index].document) for one in passages(question, texts, k)]


def quote(question: str | Question, *, snapshot: Snapshot, store: Store, k: int = 1) -> list[Answer]:
    """The k best answers to a question from the texts that a snapshot has read, best first; one without an answer where
    they don't speak of what is asked.

    raises  UsageError for k < 1 or an empty question, InputError where no text was kept and the document is not to be
            had any more, SnapshotError for a damaged text
    """
    with read_texts(snapshot, store) as texts:
        return answers(question, texts, k, snapshot.id)


@contextlib.contextmanager
def read_texts(snapshot: Snapshot, store: Store) -> Iterator[list[ReadText]]:
    """The texts that a snapshot has read, the last first, while this context lasts. Raises as `quote` does."""
    with contextlib.ExitStack() as stack:
        yield [ReadText(one.id, Watched(stack.enter_context(text_of(one, store)))) for one in readings(snapshot)]


@contextlib.contextmanager
def all_texts(
    store: Store, model: str | None, on_failure: Callable[[RwkvStreamError], None]
) -> Iterator[list[ReadText]]:
    """The texts of all documents that stand in a store, each once, while this context lasts.

    model       fingerprint of the one whose readings count; None: of all, the furthest of each document
    on_failure  is told of a document whose text is not to be had
    """
    furthest: dict[str, Snapshot] = {}
    for document, by, identity in store.heads():
        if model in (None, by):
            try:
                head = store.get(identity)
            except SnapshotError as error:
                on_failure(error)
                continue
            if document not in furthest or furthest[document].tokens < head.tokens:
                furthest[document] = replace(head, document=document)
    with contextlib.ExitStack() as stack:
        texts = []
        for one in furthest.values():
            try:
                texts.append(ReadText(one.id, Watched(stack.enter_context(text_of(one, store)))))
            except (InputError, SnapshotError) as error:
                on_failure(error)
        yield texts


def answers(
    question: str | Question,
    texts: list[ReadText],
    k: int = 1,
    snapshot: str | None = None,
    on_damage: Callable[[SnapshotError], None] | None = None,
) -> list[Answer]:
    """As `quote`, from texts that `read_texts` or `all_texts` gave.

    snapshot   id of the one that is asked
    on_damage  is told of a damaged text, which is taken out of `texts`; without it SnapshotError is raised
    """
    asked = question if isinstance(question, Question) else Question(question)
    while True:
        try:
            return _answers(asked, texts, k, snapshot)
        except SnapshotError as error:
            whole = [one for one in texts if not one.text.is_damaged]
            if on_damage is None or len(whole) == len(texts):
                raise
            on_damage(error)
            texts[:] = whole


def _answers(asked: Question, texts: Sequence[ReadText], k: int, snapshot: str | None) -> list[Answer]:
    made = []
    for rank, found in enumerate(quotes(clean(asked.text), [one.text for one in texts], k), 1):
        read = texts[found.text_index]
        place = read.text.place(found.byte_start)
        source = Source(
            found.document, found.passage_start, found.passage_end, found.passage, place or None, read.snapshot
        )
        span = found.byte_start, found.byte_end
        made.append(
            Answer(asked.text, found.answer, snapshot, NAME, found.confidence, 0, (source,), asked.id, rank, *span)
        )
    return made or [Answer(asked.text, None, snapshot, NAME, None, 0, (), asked.id)]


class Watched:
    """A kept text that remembers whether it was found to be damaged, while it was read."""

    def __init__(self, text: KeptText) -> None:
        self.document = text.document
        self.is_damaged = False
        self._text = text

    def read(self, byte_start: int, byte_end: int) -> bytes:
        with self._watching():
            return self._text.read(byte_start, byte_end)

    def place(self, byte: int) -> Place:
        with self._watching():
            return self._text.place(byte)

    def postings(self) -> Iterator[Postings]:
        with self._watching():
            yield from self._text.postings()

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except SnapshotError:
            self.is_damaged = True
            raise


class ReadText(NamedTuple):
    """A text, and the snapshot that has read it."""

    snapshot: str
    text: Watched


def _quote(question: str, one: Found, document: str) -> Quote:
    start, end = one.span
    if one.language == english.LANGUAGE:
        (span,) = spans.shipped().find(question, [one.passage])
        start, end = one.byte(span.first, span.first.start), one.byte(span.last, span.last.end)
    within = next(i for i, (_, sentence_end) in enumerate(one.sentences) if start < sentence_end)
    first = one.sentences[max(within - 1, 0)][0]
    last = max(one.sentences[min(within + 1, len(one.sentences) - 1)][1], end)
    return Quote(
        one.text_index,
        document,
        one.read(start, end),
        start,
        end,
        *one.sentences[within],
        first,
        last,
        one.read(first, last),
        one.confidence,
    )
