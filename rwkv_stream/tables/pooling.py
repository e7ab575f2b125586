"""Float32s pooled from hidden states: documents laid end to end, read in calls of `budget` tokens.

A document may be cut by the edge of a call, its state is carried on, and the last call is filled up. Two things make a
row the same, bit for bit with the native kernels, alone or in any company:

* every call has the same number of tokens, so that a token's matrix products are computed in one way whatever lies
  beside it; seen with torch's CPU libraries for 8 rows or more and any number of threads, hence BUDGET_MULTIPLE.
  Another budget may change the last bits;
* hidden states, or what a head makes of them, are summed as whole multiples of 1 / SCALE, in int64. Such sums are
  exact, so that a mean knows nothing of the calls that its tokens came in.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rwkv_stream.errors import BackendError, MismatchError, UsageError
from rwkv_stream.model.finite import first_odd, not_finite
from rwkv_stream.model.state import State
from rwkv_stream.reading.states import with_state
from rwkv_stream.tables.columns import FORMAT, UNIT_COLUMNS, schema
from rwkv_stream.tables.row_batches import CallResult
from rwkv_stream.tables.whitening import unit_length
from rwkv_stream.text.units import Failure, Piece, Unit

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.model.heads import VectorHead
    from rwkv_stream.tables.columns import Columns
    from rwkv_stream.tables.embedding import Embedding

SCALE = 2.0**24

T = TypeVar("T")


class Pool:
    """Pieces in, rows out. A row does not depend on what else a stream holds: streams may be cut as one likes.

    columns  further columns: what a person would cite of a unit (page, line, id …), null where it has no such
    raises   UsageError for a start of several rows; MismatchError for a start or a whitening of another model
    """

    def __init__(self, model: Model, embedding: Embedding, columns: Columns | None = None) -> None:
        embedding, head = embedding.resolved(model)
        whitening = embedding.whitening
        if whitening is not None and (whitening.model, whitening.pooling) != (model.fingerprint, embedding.pooling):
            raise MismatchError(
                f"whitening: expected one for pooling {embedding.pooling} by model {model.fingerprint[:12]}, found "
                f"{whitening.pooling} by {whitening.model[:12]}; fit it again"
            )
        self.model, self.embedding = model, embedding
        self.start, self._start_name = _start(model, embedding)
        self._head = head
        self.schema = schema(model.config.n_embd if head is None else head.dimension, columns)
        self._columns = columns or {}

    @property
    def metadata(self) -> dict[str, str]:
        """What enters the file: all that decides the vectors, and how documents were read."""
        from importlib.metadata import version

        model, embedding = self.model, self.embedding
        decides: dict[str, object] = {
            "format": FORMAT,
            "version": version("rwkv-stream"),
            "model": model.fingerprint,
            "tokenizer": model.tokenizer.id,
            "pooling": embedding.pooling,
            "normalized": embedding.normalize,
            "whitening": "" if embedding.whitening is None else embedding.whitening.digest,
            "start": self._start_name,
            "budget": embedding.budget,
            "numerics": model.numerics(embedding.budget),
            "units": ",".join(embedding.units),
            "isolated": embedding.isolated,
            "chunk": embedding.chunk,
            "language": embedding.language,
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in decides.items()}

    def batches(self, pieces: Iterable[Piece | Failure]) -> Generator[CallResult | Failure, None, None]:
        """What each model call completes, and each failure as it comes."""
        stream = _Stream(self.model, self.embedding, self.start, self._head)
        for piece in pieces:
            if isinstance(piece, Failure):
                yield piece
                continue
            for pooled in stream.read(piece):
                yield self._result(pooled)
        for pooled in stream.finish():
            yield self._result(pooled)

    def _result(self, pooled: _Pooled) -> CallResult:
        import pyarrow as pa

        vectors = pooled.vectors.cpu().numpy()
        vectors = unit_length(vectors) if self.embedding.normalize else vectors.astype(np.float32)
        if self.embedding.whitening is not None:
            vectors = self.embedding.whitening.apply(vectors)
        columns: dict[str, Any] = {
            "document": [span.document for span in pooled.units],
            "unit": [span.unit.kind for span in pooled.units],
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
        }
        for name in UNIT_COLUMNS[2:]:
            columns[name] = [getattr(span.unit, name) for span in pooled.units]
        for name, kind in self._columns.items():
            values = [span.unit.place.get(name) for span in pooled.units]
            if kind == pa.string():  # an id may be a number here and a word there
                values = [None if value is None else str(value) for value in values]
            columns[name] = values
        arrays = [pa.array(columns[field.name], type=field.type) for field in self.schema]
        return CallResult(pa.RecordBatch.from_arrays(arrays, schema=self.schema), pooled.tokens, pooled.documents)


def _start(model: Model, embedding: Embedding) -> tuple[State, str]:
    """The state of batch 1 that documents are read from, and its name in the metadata."""
    start, name = embedding.start, ""
    if start is None:
        _, state = model.start()
    elif isinstance(start, State):
        state, name = start, f"state {start.digest()}"
    else:
        state, name = with_state(start, model).state(), start.id
    if state.batch != 1:
        raise UsageError(f"embedding: expected a state of one row to start from, found {state.batch}")
    return state.to(model.device), name


@dataclass(frozen=True, slots=True)
class _UnitSpan:
    """A unit of a document, and which tokens of the stream are its own."""

    document: str
    unit: Unit
    first: int
    last: int  # exclusive


@dataclass(frozen=True, slots=True)
class _Pooled:
    """What a model call completed: units that ended in it, their vectors fp64 [n, C], its tokens, documents ended."""

    units: list[_UnitSpan]
    vectors: Tensor
    tokens: int
    documents: int


class _Stream:
    """Pieces laid end to end and read in calls of `budget` tokens; tokens are counted from the start of the stream."""

    def __init__(self, model: Model, embedding: Embedding, start: State, head: VectorHead | None) -> None:
        self._model, self._start, self._head = model, start, head
        if head is not None:
            self._model, self._start = model.first(head.layers), start.first(head.layers)
            self._features = head.features(self._model)
        self._budget, self._takes_last = embedding.budget, embedding.pooling == "last"
        self._done = 0  # tokens that were read
        self._tokens = torch.zeros(self._budget, dtype=torch.int64)  # of the coming call …
        self._filled = 0
        self._lengths: list[int] = []  # … its segments …
        self._starts: list[int] = []  # … and whether each goes on (1) or begins (0)
        self._carried: State | None = None  # after the last token that was read
        width = model.config.n_embd if head is None else head.n_features
        self._sum = torch.zeros(width, dtype=torch.int64, device=self._model.last_device)  # up to there
        self._sum_at: dict[int, Tensor] = {}  # up to where units begin that go on
        self._waiting: deque[_UnitSpan] = deque()
        self._open: list[int] = []  # where units begin whose end is not known
        self._document_ends: deque[int] = deque()

    def read(self, piece: Piece) -> Iterator[_Pooled]:
        at = self._done + self._filled
        start = at - piece.token_start
        self._waiting += [
            _UnitSpan(piece.document, unit, start + unit.token_start, start + unit.token_end) for unit in piece.units
        ]
        self._open = [start + token for token in piece.open_tokens]
        if piece.is_last:
            self._document_ends.append(at + len(piece.ids))
        ids, begins = torch.from_numpy(piece.ids), piece.is_first
        while len(ids):
            if begins or not self._lengths:
                self._starts.append(0 if begins else 1)
                self._lengths.append(0)
            n = min(len(ids), self._budget - self._filled)
            self._tokens[self._filled : self._filled + n] = ids[:n]
            self._lengths[-1] += n
            self._filled += n
            ids, begins = ids[n:], False
            if self._filled == self._budget:
                yield self._call()

    def finish(self) -> Iterator[_Pooled]:
        if self._filled:
            # What the rest of the call holds, tokens of an earlier one, makes no difference.
            self._lengths.append(self._budget - self._filled)
            self._starts.append(0)
            yield self._call()

    def _call(self) -> _Pooled:
        """Read the tokens."""
        state = self._start
        if self._starts[0]:
            assert self._carried is not None
            state = State({name: torch.cat([z, self._carried[name]]) for name, z in state.items()})
        hidden, self._carried = self._model.forward_packed(
            self._tokens,
            torch.tensor(self._lengths),
            state,
            torch.tensor(self._starts),
            torch.tensor([len(self._lengths) - 1]),
        )
        if not hidden.isfinite().all():
            raise self._not_finite(hidden, state)
        features = hidden if self._head is None else self._features(hidden)
        sums = torch.cat([self._sum[None], (features.double() * SCALE).round().long()]).cumsum(0)  # [budget + 1, width]
        done, n = self._done, self._filled
        self._done, self._filled, self._lengths, self._starts = done + n, 0, [], []
        ended = _pop_due(self._waiting, lambda span: span.last <= self._done)
        n_documents = len(_pop_due(self._document_ends, lambda end: end <= self._done))
        first = torch.tensor([span.first for span in ended], dtype=torch.int64, device=hidden.device) - done
        last = torch.tensor([span.last for span in ended], dtype=torch.int64, device=hidden.device) - done
        if self._takes_last:
            pooled = hidden[last - 1].double()
        else:
            before = sums[first.clamp(min=0)]
            for i, span in enumerate(ended):
                if span.first < done:
                    before[i] = self._sum_at[span.first]
            pooled = (sums[last] - before).double() / SCALE
            pooled = pooled / (last - first)[:, None] if self._head is None else self._head.vectors(pooled)
        begun = {*self._open, *(span.first for span in self._waiting)}
        self._sum_at = {
            at: self._sum_at[at] if at < done else sums[at - done].clone() for at in begun if at < self._done
        }
        self._sum = sums[n].clone()
        return _Pooled(ended, pooled, n, n_documents)

    def _not_finite(self, hidden: Tensor, state: State) -> BackendError:
        """Of the segment in which the first token is that is not finite, read again by itself."""
        place = int(first_odd(hidden))
        i = next(i for i, end in enumerate(itertools.accumulate(self._lengths)) if end > place)
        row = state.row(self._starts[i])
        _, odd = self._model.forward(self._tokens[None, sum(self._lengths[:i]) : place + 1], row, logits="none")
        at = self._done + place
        span = next((span for span in self._waiting if span.last > at), None)
        if span is None:  # of a document whose end is not known
            return not_finite(self._model, "embedding", odd)
        token = span.unit.token_start + at - span.first
        return not_finite(self._model, f"embedding '{span.document}'", odd, token)


def _pop_due(waiting: deque[T], is_due: Callable[[T], bool]) -> list[T]:
    due = []
    while waiting and is_due(waiting[0]):
        due.append(waiting.popleft())
    return due
