"""A snapshot is forked and asked: one question, many in batches, or a conversation that can be kept.

Questions are answered in batches, so memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
from torch import Tensor

from rwkv_stream.answers import prompts
from rwkv_stream.answers.answer import Answer, read_by
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import answers, named, subject
from rwkv_stream.answers.strategy import Manner, Strategy
from rwkv_stream.errors import NotFoundError, UsageError
from rwkv_stream.model.generation import Batch, read, stripped
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.reading.positions import keep
from rwkv_stream.reading.states import with_state
from rwkv_stream.store import NewSnapshot, Store
from rwkv_stream.store.records import CONVERSATION, check_model, snapshot_id
from rwkv_stream.text.chunker import CHAIN_START, chain

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot


@dataclass(frozen=True, slots=True)
class Fork:
    """Where a conversation stands: what was read since the snapshot (text and tokens), and the state after it."""

    state: State
    last_hidden: Tensor
    tokens: tuple[int, ...]
    text: str


class Conversation:
    """One fork of a snapshot, asked question after question; each answer knows the turns before it.

    >>> for piece in conversation.ask("Who keeps the light?"): print(piece, end="")
    >>> conversation.answer.tokens
    """

    def __init__(
        self, snapshot: Snapshot, model: Model, *, sampling: Sampling | None = None, template: str | None = None
    ) -> None:
        """Raises MismatchError if another model made the snapshot."""
        snapshot = with_state(snapshot, model)
        self.answer: Answer | None = None
        form = prompts.family(model)
        self._template = form.template if template is None else prompts.check_template(template)
        self._sampling = prompts.answering(form, sampling)
        self._snapshot, self._model = snapshot.id, model
        self._sources = read_by(snapshot)
        self._state, hidden = snapshot.load()
        self._hidden = hidden.to(model.device)
        self._tokens: list[int] = []
        self._unread: list[int] = []  # the last answer: read with the next question
        self._text = ""
        self._turns = 0

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces; afterwards it is in `answer`. What was shown is what the next turn knows."""
        asked = Question(question, index=self._turns)
        prompt = prompts.fill(self._template, asked.text)
        return self._answer(asked, prompt)

    def _answer(self, question: Question, prompt: str) -> Iterator[str]:
        self._read([*self._unread, *self._model.tokenizer.encode_prompt(prompt)])
        self._text += prompt
        self._turns += 1
        batch = Batch(self._model)
        row = batch.add((), self._state, self._sampling, last_hidden=self._hidden, index=question.index)
        pieces: list[str] = []
        try:
            for piece in stripped(piece for _, piece in batch.run()):
                pieces.append(piece)
                yield piece
        finally:
            text = "".join(pieces)
            self.answer = Answer(
                question.text, text, self._snapshot, "state", None, row.tokens, self._sources, question.id
            )
            spoken = f" {text}" if text else ""
            self._unread = self._model.tokenizer.encode(spoken)
            self._text += spoken

    def fork(self) -> Fork:
        """The conversation so far, its last answer read too."""
        self._read(self._unread)
        self._unread = []
        return Fork(self._state, self._hidden, tuple(self._tokens), self._text)

    def _read(self, tokens: list[int]) -> None:
        if tokens:
            self._hidden, self._state = read(self._model, tokens, self._state)
            self._tokens += tokens


@overload
def ask(  # type: ignore[overload-overlap]  # a str is an iterable of str, too
    question: str | Question,
    *,
    snapshot: Snapshot,
    model: Model,
    store: Store | None = None,
    strategy: str = "state",
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Answer: ...
@overload
def ask(
    question: Iterable[str | Question],
    *,
    snapshot: Snapshot,
    model: Model,
    store: Store | None = None,
    strategy: str = "state",
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Iterator[Answer]: ...
def ask(
    question: str | Question | Iterable[str | Question],
    *,
    snapshot: Snapshot,
    model: Model,
    store: Store | None = None,
    strategy: str = "state",
    sampling: Sampling | None = None,
    template: str | None = None,
) -> Answer | Iterator[Answer]:
    """Fork the snapshot and answer: one question now, several in batches, their answers in order as batches are done.

    Every question has its own fork and knows nothing of the others. Plain texts get their place as index.
    strategy  of `strategies.STRATEGIES`; all but `state` look into the text, in the store
    sampling  default: that of the model's prompt family, which is greedy; the family's stop texts always hold
    template  the prompt, with {question} in it; default: the family's
    raises    MismatchError if another model made the snapshot, UsageError for no or an empty question, a bad template
    """
    check_model(snapshot, model)
    manner = Manner(sampling=sampling, template=None if template is None else prompts.check_template(template))
    way = named(strategy)
    if store is None and way.needs - {"model", "state"}:
        raise UsageError(
            f"asking by {strategy}: expected the store that '{snapshot.document}' was read into, found none"
        )
    if isinstance(question, str | Question) or not isinstance(question, Iterable):
        (answer,) = _answers([question], way, manner, snapshot, model, store)
        return answer
    return _answers(question, way, manner, snapshot, model, store)


def _answers(
    questions: Iterable[str | Question],
    way: Strategy,
    manner: Manner,
    snapshot: Snapshot,
    model: Model,
    store: Store | None,
) -> Iterator[Answer]:
    numbered = itertools.starmap(_numbered, enumerate(questions))
    with subject(snapshot, store, way.needs, model) as given:
        yield from answers(numbered, way, given, manner, snapshot=snapshot)


def _numbered(index: int, question: str | Question) -> Question:
    if isinstance(question, Question):
        return question
    if not isinstance(question, str):
        raise UsageError(f"asking: expected questions as texts, found {question!r:.40}")
    return Question(question, index=index)


def keep_fork(tag: str, fork: Fork, snapshot: Snapshot, *, model: Model, store: Store) -> Snapshot:
    """Keep where a conversation stands, under a tag: a leaf that starts from `snapshot` and read the conversation.

    raises  UsageError for a tag that is taken, StoreLockedError, OSError of a full disk; nothing is kept then
    """
    text = fork.text.encode()
    ids = np.array(fork.tokens, dtype=np.int64)
    new = NewSnapshot(
        document=tag,
        model=model.fingerprint,
        model_path=model.path,
        tokenizer=model.tokenizer.id,
        start_digest=snapshot.state_digest,
        start=snapshot.id,
        chain=chain(CHAIN_START, ids).hex(),
        tokens=len(ids),
        bytes=len(text),
        chunk=len(ids),
        leaf=True,  # made token by token: forked, never continued
        parent=None,
        how=CONVERSATION,
        exact=False,
        numerics=model.numerics(1),
        encoding="utf-8",
        decided_byte=-1,
        text_digest=hashlib.sha256(text).hexdigest(),
        anchor_byte=0,
        anchor_token=0,
    )
    with store.writing():
        store.check_tag(tag)
        keep(snapshot, store)
        is_new = not _has(store, snapshot_id(new.model, new.start_digest, new.chain, new.tokens, fork.state.digest()))
        kept = store.put(new, fork.state, fork.last_hidden)
        try:
            store.tag(tag, kept.id)
        except BaseException:  # somebody took the name in the meantime, perhaps
            if is_new:
                store.rm(kept.id)
            raise
    return kept


def _has(store: Store, identity: str) -> bool:
    try:
        store.get(identity)
    except NotFoundError:
        return False
    return True
