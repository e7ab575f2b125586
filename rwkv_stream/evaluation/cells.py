"""What is measured as one: a task at a length, a document's bits, a strategy's answers on a document, a file of pairs.

A cell is a mapping that can become JSON, with all that decides what comes of it, but for the numerics: the model, the
seed, digests of its inputs. `key` names it among the cells of an evaluation. Its trials are rows of SCHEMA.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from rwkv_stream.answers.prompts import family
from rwkv_stream.answers.strategies import STRATEGIES, named
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.evaluation import questions, recall, retrieval
from rwkv_stream.evaluation.answering import overlap_f1
from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.evaluation.questions import QuestionRow, Texts, groups, rows, whole
from rwkv_stream.evaluation.similarity import Pair, pairs
from rwkv_stream.evaluation.tasks import TASKS, Maker
from rwkv_stream.extras import needed
from rwkv_stream.tables.embeddings import embed
from rwkv_stream.tables.score import score
from rwkv_stream.text.readers import Document, documents

if TYPE_CHECKING:
    from rwkv_stream.model import Model

Cell = Mapping[str, Any]
Trial = dict[str, Any]
T = TypeVar("T")

OTHERS = {  # beside TASKS: what each needs
    "position": "documents",
    "qa": "--data",
    "retrieval": "--data",
    "similarity": "--pairs",
}
RETRIEVAL = ("vectors", "bm25")
SIMILARITY = ("vectors", "words")
FIRST_BIN = 64  # tokens
PAIR_ROWS = 256

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("method", pa.string()),  # a strategy of answering, or of finding
        ("length", pa.int64()),  # tokens that were asked for; of positions where the bin ends
        ("depth", pa.float64()),  # percent
        ("trial", pa.int64()),
        ("document", pa.string()),
        ("id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("floor", pa.float64()),
        ("exact", pa.bool_()),
        ("quoted", pa.bool_()),
        ("confidence", pa.float64()),
        ("gold", pa.float64()),
        ("tokens", pa.int64()),
        ("computed", pa.int64()),
        ("bytes", pa.int64()),
        ("bits", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured, and on what.

    tasks       of TASKS and OTHERS; empty: all that there are inputs for
    lengths     of contexts, in tokens
    depths      of needles, in percent
    trials      contexts of each length (and depth)
    haystack    a source that `readers` reads; None is the packaged story
    sources     documents whose bits are counted by position; reading: how they are read
    data        questions; texts: what they are about; limit: of so many documents, the first
    strategies  of answering
    pairs       of texts, with scores
    raises      UsageError for what makes no sense, and where a task's inputs are not there
    """

    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (1024, 4096)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    trials: int = 5
    seed: int = 0
    haystack: str | None = None
    sources: tuple[str, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    texts: Path | None = None
    limit: int | None = None
    strategies: tuple[str, ...] = ("state", "passage", "quote")
    pairs: Path | None = None

    def __post_init__(self) -> None:
        given = {"documents": bool(self.sources), "--data": self.data is not None, "--pairs": self.pairs is not None}
        for name in self.tasks:
            if name not in (*TASKS, *OTHERS):
                raise UsageError(f"evaluating: expected tasks of {', '.join((*TASKS, *OTHERS))}, found '{name}'")
            if name in OTHERS and not given[OTHERS[name]]:
                raise UsageError(f"evaluating: expected {OTHERS[name]} for the task {name}, found none")
        for strategy in self.strategies:
            named(strategy)
        for what, values, low, high in (("lengths", self.lengths, 1, 1 << 40), ("depths", self.depths, 0, 100)):
            if not values or not all(low <= value <= high for value in values) or len({*values}) < len(values):
                raise UsageError(
                    f"evaluating: expected {what} from {low} to {high}, each once, found {', '.join(map(str, values))}"
                )
        if "-" in (*self.sources, self.haystack):
            raise UsageError(
                "evaluating: expected files, which are read more than once, found stdin; write it to a file"
            )
        if self.trials < 1:
            raise UsageError(f"evaluating: expected 1 trial or more, found {self.trials}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tasks, each once."""
        given = {"documents": bool(self.sources), "--data": self.data is not None, "--pairs": self.pairs is not None}
        return tuple(dict.fromkeys(self.tasks)) or (*TASKS, *(name for name, need in OTHERS.items() if given[need]))


def check_installed(chosen: Iterable[str]) -> None:
    """Raise UsageError where a task is beyond what is installed."""
    if "retrieval" in chosen:
        with needed("bm25s", "eval", "finding passages by words", UsageError):
            import bm25s  # noqa: F401


# ---- which cells there are ----


def cells(measures: Measures, lost: Callable[[InputError], None]) -> Iterator[Cell]:
    """The cells of what is asked for, each with its key; `lost` is told of rows that are none.

    raises  InputError where an input is missing, UsageError for a length that does not hold a task
    """
    asked, model_id = measures.asked, {"model": measures.model.fingerprint}
    chosen = asked.chosen
    recalled = [name for name in chosen if name in TASKS]
    if recalled:
        for task in recalled:
            next(
                TASKS[task].contexts(measures.maker, min(asked.lengths), 1, asked.depths, asked.seed)
            )  # or it is too short
            for length in asked.lengths:
                yield {
                    "key": f"{task} {length}", "kind": "recall", "task": task, "length": length,
                    "depths": list(map(float, asked.depths)), "trials": asked.trials, "seed": asked.seed,
                    "haystack": measures.maker.haystack.digest, **model_id,
                }  # fmt: skip
    if "position" in chosen:
        for number, document in enumerate(documents(asked.sources, **asked.reading)):
            if not document.reopenable:
                raise UsageError(
                    f"evaluating on '{document.name}': expected a file, which is read more than once, found a pipe"
                )
            yield {
                "key": f"position {document.name}", "kind": "position", "number": number, "document": document.name,
                "digest": _text_digest(document), **model_id,
            }  # fmt: skip
    if asked.data is not None and {"qa", "retrieval"} & {*chosen}:
        yield from _of_data(asked, model_id, lost)
    if asked.pairs is not None and "similarity" in chosen:
        digest, n_pairs = _digest(asked.pairs), 0
        for pair in pairs(asked.pairs):
            if isinstance(pair, InputError):
                lost(pair)
            n_pairs += isinstance(pair, Pair)
        if not n_pairs:
            raise InputError(f"reading '{asked.pairs}': expected pairs of texts with scores, found none")
        for method in SIMILARITY:
            yield {"key": f"similarity {method}", "kind": "similarity", "method": method, "pairs": digest, **model_id}


def _of_data(asked: Evaluation, model_id: Mapping[str, str], lost: Callable[[InputError], None]) -> Iterator[Cell]:
    assert asked.data is not None
    data = asked.data
    digests = {"data": _digest(data), "texts": None if asked.texts is None else _digest(asked.texts)}

    def noted() -> Iterator[QuestionRow]:
        for row in rows(data):
            if isinstance(row, QuestionRow):
                yield row
            else:
                lost(row)

    spans, searchable, first = list[tuple[int, int, str]](), list[tuple[int, int, str]](), 0
    for group in itertools.islice(groups(noted()), asked.limit):
        span = (first, len(group), group[0].document)
        spans.append(span)
        if len(_passages(group)) > 1:
            searchable.append(span)
        first += len(group)
    if not spans:
        raise InputError(f"reading '{asked.data}': expected rows with questions, found none")
    methods = [("qa", strategy, spans) for strategy in asked.strategies if "qa" in asked.chosen]
    methods += [("retrieval", method, searchable) for method in RETRIEVAL if "retrieval" in asked.chosen]
    for kind, method, of in methods:
        for first, n, document in of:
            yield {
                "key": f"{kind} {method} {document} {first}", "kind": kind, "method": method, "document": document,
                "first": first, "rows": n, **digests, **model_id,
            }  # fmt: skip


def _passages(group: Iterable[QuestionRow]) -> list[str]:
    """The passages that answer something, each once."""
    return list(dict.fromkeys(row.passage for row in group if row.passage is not None and row.answers))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"reading '{path}': {error.strerror or error}") from error
    return digest.hexdigest()


def _text_digest(document: Document) -> str:
    """Of a text; of one that cannot be read the reason: it is said when it is measured."""
    digest = hashlib.sha256()
    try:
        with document.text() as text:
            for piece in text:
                digest.update(piece)
    except InputError as error:
        digest.update(str(error).encode(errors="replace"))
    return digest.hexdigest()


# ---- what comes of them ----


class _Forward(Generic[T]):
    """Items of inputs, by number: gone through once, if they are asked for in rising order."""

    def __init__(self, begin: Callable[[], Iterator[T]]) -> None:
        self._begin, self._at = begin, 0
        self._items = begin()

    def take(self, first: int, n: int) -> list[T]:
        if first < self._at:
            self._at, self._items = 0, self._begin()
        found = list(itertools.islice(self._items, first - self._at, first - self._at + n))
        self._at = first + n
        return found


class Measures:
    """The trials of cells; what several of them need is opened once.

    losses  what of the inputs could not be read, though the rest was
    """

    def __init__(self, model: Model, asked: Evaluation) -> None:
        self.model, self.asked = model, asked
        self.losses: list[InputError] = []
        self._texts = None if asked.texts is None else Texts(asked.texts, self.losses)
        self._kinds: Mapping[str, Callable[[Cell], Iterator[Trial]]] = {
            "recall": self._recall,
            "position": self._position,
            "qa": self._qa,
            "retrieval": self._retrieval,
            "similarity": self._similarity,
        }

    def trials(self, cell: Cell) -> Iterator[Trial]:
        """Rows of SCHEMA; what is left out is null. Raises InputError for inputs that are not there or damaged."""
        yield from self._kinds[cell["kind"]](cell)

    @functools.cached_property
    def maker(self) -> Maker:
        """What contexts are made with."""
        tokenizer = self.model.tokenizer
        return Maker(tokenizer, family(self.model), Haystack.read(self.asked.haystack, tokenizer))

    @functools.cached_property
    def _trunk(self) -> recall.Trunk:
        return recall.Trunk(self.model, self.maker.haystack)

    @functools.cached_property
    def _rows(self) -> _Forward[QuestionRow]:
        assert self.asked.data is not None
        return _Forward(functools.partial(_whole_rows, self.asked.data))

    @functools.cached_property
    def _documents(self) -> _Forward[Document]:
        return _Forward(functools.partial(documents, self.asked.sources, **self.asked.reading))

    def _recall(self, cell: Cell) -> Iterator[Trial]:
        task = TASKS[cell["task"]]
        contexts = task.contexts(self.maker, cell["length"], cell["trials"], cell["depths"], cell["seed"])
        for trial in recall.trials(self.model, self.maker, contexts, self._trunk):
            query = trial.query
            yield {
                "task": cell["task"], "length": cell["length"], "depth": query.depth, "trial": trial.number,
                "question": query.prompt, "answers": list(query.answers), "answer": trial.answer,
                "score": trial.score, "floor": query.floor, "tokens": trial.tokens, "computed": trial.computed,
            }  # fmt: skip

    def _position(self, cell: Cell) -> Iterator[Trial]:
        (document,) = self._documents.take(cell["number"], 1)
        bins: dict[int, list[float]] = {}
        scored = score(document, model=self.model, unit="token")
        for unit in scored:
            end = max(FIRST_BIN, 1 << unit.token_start.bit_length())
            sums = bins.setdefault(end, [0, 0, 0])
            for i, more in enumerate((1, unit.byte_end - unit.byte_start, unit.bits)):
                sums[i] += more
        self.losses += scored.losses
        for end, (tokens, n_bytes, bits) in sorted(bins.items()):
            yield {
                "task": "position", "document": cell["document"], "length": end, "tokens": int(tokens),
                "computed": int(tokens), "bytes": int(n_bytes), "bits": bits,
            }  # fmt: skip

    def _qa(self, cell: Cell) -> Iterator[Trial]:
        group = self._rows.take(cell["first"], cell["rows"])
        for found in questions.judged(group, STRATEGIES[cell["method"]], self.model, self._texts):
            row, reply = found.row, found.reply
            yield {
                "task": "qa", "method": cell["method"], "document": row.document, "id": row.id,
                "question": row.question, "answers": list(row.answers), "answer": reply.text or "", "score": found.f1,
                "exact": found.exact, "quoted": found.is_quoted, "confidence": reply.confidence,
                "tokens": found.tokens, "computed": found.tokens,
            }  # fmt: skip

    def _retrieval(self, cell: Cell) -> Iterator[Trial]:
        """A question's passage among those of its document: 1 / rank."""
        group = self._rows.take(cell["first"], cell["rows"])
        texts = _passages(group)
        asked = [row for row in group if row.answers and row.passage is not None]
        right = [texts.index(row.passage) for row in asked if row.passage is not None]
        one = retrieval.Searched(tuple(texts), tuple(row.question for row in asked), tuple(right))
        if cell["method"] == "bm25":
            scores = retrieval.bm25(one)
        else:
            vectors = embed([*one.texts, *one.questions], model=self.model).astype(np.float64)
            scores = retrieval.cosines(one, vectors[: len(texts)], vectors[len(texts) :])
        ranks = retrieval.reciprocal_ranks(scores, one.right)
        floor = float(np.mean(1 / np.arange(1, len(texts) + 1)))  # of a random order
        for row, rank in zip(asked, ranks.tolist(), strict=True):
            yield {
                "task": "retrieval", "method": cell["method"], "document": row.document, "id": row.id,
                "question": row.question, "score": rank, "floor": floor,
            }  # fmt: skip

    def _similarity(self, cell: Cell) -> Iterator[Trial]:
        assert self.asked.pairs is not None
        found = (pair for pair in pairs(self.asked.pairs) if isinstance(pair, Pair))
        while some := list(itertools.islice(found, PAIR_ROWS)):
            if cell["method"] == "words":
                scores = [overlap_f1(*pair.texts) for pair in some]
            else:
                vectors = embed([text for pair in some for text in pair.texts], model=self.model).astype(np.float64)
                unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
                scores = (unit[::2] * unit[1::2]).sum(axis=1).tolist()
            for pair, value in zip(some, scores, strict=True):
                yield {
                    "task": "similarity", "method": cell["method"], "id": pair.id, "question": pair.texts[0],
                    "answer": pair.texts[1], "score": value, "gold": pair.gold,
                }  # fmt: skip


def _whole_rows(path: Path) -> Iterator[QuestionRow]:
    return whole(rows(path))
