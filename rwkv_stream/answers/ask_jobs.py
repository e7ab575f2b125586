"""Many questions on many documents as the work of a job (`tables.jobs`): a row for each document and answer.

>>> work = AskingWork(tuple(questions("questions.jsonl")))
>>> Job("answers/", ["corpus/"], work).run()

Each document is asked by itself, whatever stands in the others. Its text is indexed in a temporary folder and looked
into, or, for the strategy `state`, read by the model as `ingest` reads it. The questions are held.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from rwkv_stream.answers import prompts, strategies
from rwkv_stream.answers.answer import Answer, Source, answer_schema, as_row
from rwkv_stream.answers.indexed import indexed
from rwkv_stream.answers.kept import ReadText
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategy import Manner, Subject
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.tables.parts import Watched
from rwkv_stream.tables.row_batches import CallResult, RowBatches
from rwkv_stream.text.readers import document as opened
from rwkv_stream.text.units import Failure, lost

if TYPE_CHECKING:
    import pyarrow as pa

    from rwkv_stream.model import Model
    from rwkv_stream.model.sampling import Sampling
    from rwkv_stream.tables.jobs import Fit

Strategy = Literal["quote", "reread", "state"]
STRATEGIES: tuple[Strategy, ...] = ("quote", "reread", "state")
BATCH_ROWS = 64
TRIAL_TEXT = "The keeper climbed the stair each evening, lit the lamp, and wrote the hour in a green book. "
TRIAL_SENTENCES, TRIAL_QUESTIONS = 20, 4  # of a document that is asked for a trial, after one that is not timed


def named(strategy: str) -> Strategy:
    """The strategy of a name; raises UsageError where there is none."""
    for one in STRATEGIES:
        if one == strategy:
            return one
    raise UsageError(f"asking: expected a strategy of {', '.join(STRATEGIES)}, found '{strategy}'")


def document_schema() -> pa.Schema:
    """The columns of a table of answers on documents: those of `answer_schema`, and the document."""
    import pyarrow as pa

    return pa.schema([("document", pa.string()), *answer_schema()])


@dataclass(frozen=True, slots=True)
class AskingWork:
    """
    questions  each is asked of each document
    strategy   quote, without a model; reread, state: by the model
    k          quotes for each question at most, the best first
    sampling   of the model; default: that of its prompt family
    raises     UsageError for what does not go together
    """

    questions: tuple[Question, ...]
    strategy: Strategy = "quote"
    k: int = 1
    model: Model | None = None
    sampling: Sampling | None = None
    doing = "asking"
    fit: Callable[[Any], Fit] | None = None

    def __post_init__(self) -> None:
        named(self.strategy)
        if (self.model is None) != (self.strategy == "quote"):
            raise UsageError(f"asking: expected a model unless the text is quoted, found strategy {self.strategy}")
        if not self.questions or self.k < 1:
            n = len(self.questions)
            raise UsageError(f"asking: expected a question and a k of 1 or more, found {n} questions and k={self.k}")
        for question in self.questions:
            prompts.clean(question.text)

    @property
    def decides(self) -> dict[str, Any]:
        from importlib.metadata import version

        asked = json.dumps([[one.text, one.id] for one in self.questions]).encode()
        digest = hashlib.sha256(asked).hexdigest()
        decides: dict[str, Any] = {"strategy": self.strategy, "questions": f"{len(self.questions)} ({digest[:16]})"}
        if self.model is None:
            decides["k"] = self.k
        else:
            decides["sampling"] = None if self.sampling is None else asdict(self.sampling)
            decides["model"] = self.model.fingerprint
            decides["numerics"] = json.dumps(self.model.numerics(1))
        return {**decides, "version": version("rwkv-stream")}

    @property
    def remake(self) -> Callable[[Any], AskingWork]:
        return functools.partial(
            _work, questions=self.questions, strategy=self.strategy, k=self.k, sampling=self.sampling
        )

    def rows(self, documents: Iterable[Watched], on_failure: Callable[[Failure], None]) -> RowBatches:
        decides = self.decides.items()
        metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in decides}
        return RowBatches(document_schema(), metadata, self._results(documents), on_failure)

    def _results(self, documents: Iterable[Watched]) -> Generator[CallResult | Failure, None, None]:
        import pyarrow as pa

        schema = document_schema()
        for document in documents:
            try:
                answers = self._answers(document)
                while some := list(itertools.islice(answers, BATCH_ROWS)):
                    rows = [{"document": document.name, **as_row(one)} for one in some]
                    tokens = sum(one.tokens for one in some)
                    yield CallResult(pa.RecordBatch.from_pylist(rows, schema=schema), tokens, 0)
            except InputError as error:
                yield Failure(document.name, error)
                continue
            yield from lost(document.name, document.losses, document.n_losses)
            yield CallResult(pa.RecordBatch.from_pylist([], schema=schema), 0, 1)

    def _answers(self, document: Watched) -> Iterator[Answer]:
        """Raises InputError, before the first, where the document cannot be read."""
        manner, way = Manner(self.k, self.sampling), strategies.named(self.strategy)
        if self.model is not None and self.strategy == "state":
            from rwkv_stream.reading.passes import state_of

            with document.text() as pieces:
                state, _ = state_of(self.model, pieces, document.name)
            whole = (Source(document.name, 0, document.size, None, None, None),)
            found = strategies.answers(self.questions, way, Subject(document.name, self.model, state), manner)
            yield from (replace(one, sources=whole) for one in found)
            return
        with indexed(document) as text:
            given = Subject(document.name, self.model, texts=[ReadText(text, None)])
            yield from strategies.answers(self.questions, way, given, manner)

    def bytes_per_s(self) -> float:
        """Of documents of some pages; of longer ones more, of shorter ones less."""
        text = TRIAL_TEXT * TRIAL_SENTENCES
        tried = replace(self, questions=self.questions[:TRIAL_QUESTIONS])
        took_s = 0.0
        with TemporaryDirectory(prefix="rwkv-stream-") as folder:
            path = Path(folder, "trial.txt")
            path.write_text(text, encoding="utf-8")
            for _ in range(2):
                began = time.perf_counter()
                for _ in tried._answers(Watched(opened(path))):
                    pass
                took_s = time.perf_counter() - began
        return len(text.encode()) * len(tried.questions) / len(self.questions) / took_s


def _work(
    model: Model | None, *, questions: tuple[Question, ...], strategy: Strategy, k: int, sampling: Sampling | None
) -> AskingWork:
    return AskingWork(questions, strategy, k, model, sampling)
