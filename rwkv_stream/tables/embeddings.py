"""Embeddings: one vector for each sentence, chunk or whole document, pooled from what the model makes of its tokens.

>>> rs.embed(["one text", "another"], model=model)
>>> for batch in rows(documents, model=model, units=("sentence", "document")): ...

A document is read once, from its start; what it has said before a unit is the unit's context, unless `isolated`.
Documents are laid end to end and read in calls of `budget` tokens; one may be cut by the edge of a call, its state is
carried on, and the last call is filled up. Two things make a row the same, bit for bit with the native kernels, alone
or in any company:

* every call has the same number of tokens, so that a token's matrix products are computed in one way whatever lies
  beside it; seen with torch's CPU libraries for 8 rows or more and any number of threads, hence BUDGET_MULTIPLE.
  Another budget may change the last bits;
* hidden states are summed as whole multiples of 1 / SCALE, in int64. Such sums are exact, so that a mean knows nothing
  of the calls that its tokens came in.

Reading and tokenising, the model, and whoever takes the rows work at the same time. Memory does not grow with the
number or size of documents.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.model.state import State
from rwkv_stream.store.snapshot_codec import check_model
from rwkv_stream.tables.whitening import Whitening, unit_length
from rwkv_stream.text.chunker import CHUNK_TOKENS
from rwkv_stream.text.units import Failure, Piece, Source, Unit, read

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot

    Vectors = npt.NDArray[np.float32]
    Columns = Mapping[str, pa.DataType]

FORMAT = "1"  # of a table's metadata
POOLINGS = ("mean", "last")
BUDGET = 1024  # tokens of a model call
BUDGET_MULTIPLE = 16
SCALE = 2.0**24
AHEAD_PIECES = 64
AHEAD_BATCHES = 4
JOIN_S = 5.0

T = TypeVar("T")


def embed(texts: Iterable[str | Source], *, model: Model, **options: Any) -> Vectors:
    """The vectors [n, D] of texts or documents, in order; `options` are those of `rows`.

    raises  UsageError, MismatchError; InputError for a document that cannot be read and for a text without a token
    """
    if isinstance(texts, str):
        raise UsageError("embedding: expected texts, found one string; pass [text]")
    sources = (_Given(f"text {i}", text) if isinstance(text, str) else text for i, text in enumerate(texts))
    with contextlib.closing(rows(sources, model=model, **{"text": False, **options})) as batches:
        made = [embedding(batch) for batch in batches]
    return np.concatenate(made) if made else np.zeros((0, model.config.n_embd), np.float32)


@dataclass(frozen=True, slots=True)
class _Given:
    name: str
    string: str

    def text(self) -> contextlib.AbstractContextManager[Iterable[bytes]]:
        try:
            return contextlib.nullcontext([self.string.encode()])
        except UnicodeEncodeError as error:
            raise InputError(f"embedding '{self.name}': expected Unicode characters, found {error}") from error


def rows(
    documents: Iterable[Source],
    *,
    model: Model,
    units: Sequence[str] = ("document",),
    pooling: str = "mean",
    isolated: bool = False,
    chunk: int = CHUNK_TOKENS,
    budget: int = BUDGET,
    start: Snapshot | State | None = None,
    normalize: bool = True,
    whitening: Whitening | None = None,
    language: str = "en",
    text: bool = True,
    columns: Columns | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Rows:
    """The rows of documents as record batches: documents in order, a document's units in the order of their ends.

    units, chunk, isolated, language, text  as in `units.read`
    pooling     of the last layer's hidden states, after ln_out: their mean, or that of the last token
    budget      tokens of a model call, a multiple of BUDGET_MULTIPLE
    start       every document is read as going on from this state (batch 1)
    normalize   give vectors the length 1
    whitening   applied to vectors of length 1, which it leaves so
    columns     further columns: what a person would cite of a unit (page, line, id …), null where it has no such
    on_failure  told of each document that cannot be read; without it the first one raises
    raises      UsageError, MismatchError; while iterating InputError
    """
    pool = Pool(
        model,
        pooling=pooling,
        budget=budget,
        start=start,
        normalize=normalize,
        whitening=whitening,
        columns=columns,
    )
    pieces = read(documents, model.tokenizer, kinds=units, chunk=chunk, isolated=isolated, language=language, text=text)
    read_as = {"units": ",".join(units), "isolated": isolated, "chunk": chunk, "language": language}
    batches = _ahead(pool.batches(_ahead(pieces, AHEAD_PIECES)), AHEAD_BATCHES)
    return Rows(pool.schema, pool.metadata(**read_as), batches, on_failure)


def schema(dimension: int, columns: Columns | None = None) -> pa.Schema:
    """The columns of a table of rows, and the further ones."""
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("document", "unit")]
    spans = [(name, pa.int64()) for name in ("byte_start", "byte_end", "token_start", "token_end")]
    embedding = ("embedding", pa.list_(pa.float32(), dimension))
    return pa.schema(
        [*texts, ("index", pa.int64()), ("text", pa.string()), *spans, embedding, *(columns or {}).items()]
    )


def embedding(batch: pa.RecordBatch | pa.Table) -> Vectors:
    """The vectors [n, D] of rows."""
    column = batch.column("embedding")
    parts = getattr(column, "chunks", [column])
    flat = [part.flatten().to_numpy() for part in parts]
    return np.concatenate(flat).reshape(batch.num_rows, column.type.list_size)


def whitened(batch: pa.RecordBatch, whitening: Whitening) -> pa.RecordBatch:
    """The rows with their vectors whitened, as if `rows` had been given it."""
    import pyarrow as pa

    vectors = whitening.apply(embedding(batch))
    at = batch.schema.get_field_index("embedding")
    made = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    return batch.set_column(at, batch.schema.field(at), made.cast(batch.schema.field(at).type))


@dataclass(frozen=True, slots=True)
class Made:
    """Rows that a model call completed, maybe none; its tokens, and how many documents ended in it."""

    batch: pa.RecordBatch
    tokens: int
    documents: int


class Rows(Iterator["pa.RecordBatch"]):
    """Record batches, made ahead on threads; the schema and the metadata of a table of them; totals so far."""

    def __init__(
        self,
        schema: pa.Schema,
        metadata: Mapping[str, str],
        made: Generator[Made | Failure, None, None],
        on_failure: Callable[[Failure], None] | None,
    ) -> None:
        self.schema, self.metadata = schema, metadata
        self.documents = self.failed = self.rows = self.tokens = 0
        self._made = made
        self._on_failure = on_failure

    def __next__(self) -> pa.RecordBatch:
        while True:
            made = next(self._made)
            if isinstance(made, Failure):
                self.failed += 1
                if self._on_failure is None:
                    raise made.error
                self._on_failure(made)
                continue
            self.documents += made.documents
            self.tokens += made.tokens
            if made.batch.num_rows:
                self.rows += made.batch.num_rows
                return made.batch

    def close(self) -> None:
        """Stop the threads; rows that were not taken are lost."""
        self._made.close()


class Pool:
    """Pieces in, rows out. A row does not depend on what else a stream holds: streams may be cut as one likes.

    Arguments and errors are those of `rows`.
    """

    def __init__(
        self,
        model: Model,
        *,
        pooling: str = "mean",
        budget: int = BUDGET,
        start: Snapshot | State | None = None,
        normalize: bool = True,
        whitening: Whitening | None = None,
        columns: Columns | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise UsageError(f"embedding: expected pooling {' or '.join(POOLINGS)}, found '{pooling}'")
        if budget < 1 or budget % BUDGET_MULTIPLE:
            raise UsageError(f"embedding: expected a budget that is a multiple of {BUDGET_MULTIPLE}, found {budget}")
        if whitening is not None and (whitening.model, whitening.pooling) != (model.fingerprint, pooling):
            raise MismatchError(
                f"whitening: expected one for pooling {pooling} by model {model.fingerprint[:12]}, found "
                f"{whitening.pooling} by {whitening.model[:12]}; fit it again"
            )
        if whitening is not None and not normalize:
            raise UsageError("whitening: it takes and gives vectors of length 1; leave them normalised")
        self._start = ""
        if start is None:
            _, state = model.start()
        elif isinstance(start, State):
            state, self._start = start, f"state {start.digest()}"
        else:
            check_model(start, model)
            state, self._start = start.state(), start.id
        if state.batch != 1:
            raise UsageError(f"embedding: expected a state of one row to start from, found {state.batch}")
        self.start = state.to(model.device)
        self.model, self.pooling, self.budget = model, pooling, budget
        self._normalize, self._whitening, self._columns = normalize, whitening, columns or {}
        self.schema = schema(model.config.n_embd, columns)

    def metadata(self, **read_as: object) -> dict[str, str]:
        """What enters the file: all that decides the vectors, and how documents were read (arguments of `read`)."""
        from importlib.metadata import version

        decides = {
            "format": FORMAT,
            "version": version("rwkv-stream"),
            "model": self.model.fingerprint,
            "tokenizer": self.model.tokenizer.id,
            "pooling": self.pooling,
            "normalized": self._normalize,
            "whitening": "" if self._whitening is None else self._whitening.digest,
            "start": self._start,
            "budget": self.budget,
            "numerics": self.model.numerics(self.budget),
        }
        return {name: v if isinstance(v, str) else json.dumps(v) for name, v in {**decides, **read_as}.items()}

    def batches(self, pieces: Iterable[Piece | Failure]) -> Generator[Made | Failure, None, None]:
        """What each model call completes, and each failure as it comes."""
        stream = _Stream(self)
        for piece in pieces:
            if isinstance(piece, Failure):
                yield piece
                continue
            for made in stream.read(piece):
                yield self._made(*made)
        for made in stream.finish():
            yield self._made(*made)

    def _made(self, ended: list[_Placed], pooled: Tensor, tokens: int, documents: int) -> Made:
        import pyarrow as pa

        vectors = pooled.cpu().numpy()
        vectors = unit_length(vectors) if self._normalize else vectors.astype(np.float32)
        if self._whitening is not None:
            vectors = self._whitening.apply(vectors)
        columns: dict[str, Any] = {
            "document": [placed.document for placed in ended],
            "unit": [placed.unit.kind for placed in ended],
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
        }
        for name in ("index", "text", "byte_start", "byte_end", "token_start", "token_end"):
            columns[name] = [getattr(placed.unit, name) for placed in ended]
        for name, kind in self._columns.items():
            found = [placed.unit.place.get(name) for placed in ended]
            if kind == pa.string():  # an id may be a number here and a word there
                found = [None if value is None else str(value) for value in found]
            columns[name] = found
        arrays = [pa.array(columns[field.name], type=field.type) for field in self.schema]
        return Made(pa.RecordBatch.from_arrays(arrays, schema=self.schema), tokens, documents)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A unit of a document, and which tokens of the stream are its own."""

    document: str
    unit: Unit
    first: int
    last: int  # exclusive


class _Stream:
    """Pieces laid end to end and read in calls of `budget` tokens; tokens are counted from the start of the stream."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._done = 0  # tokens that were read
        self._tokens = torch.zeros(pool.budget, dtype=torch.int64)  # of the coming call …
        self._filled = 0
        self._lengths: list[int] = []  # … its segments …
        self._starts: list[int] = []  # … and whether each goes on (1) or begins (0)
        self._carried: State | None = None  # after the last token that was read
        C, device = pool.model.config.n_embd, pool.model.last_device
        self._sum = torch.zeros(C, dtype=torch.int64, device=device)  # up to there
        self._sum_at: dict[int, Tensor] = {}  # up to where units begin that go on
        self._waiting: deque[_Placed] = deque()
        self._open: list[int] = []  # where units begin whose end is not known
        self._document_ends: deque[int] = deque()

    def read(self, piece: Piece) -> Iterator[tuple[list[_Placed], Tensor, int, int]]:
        at = self._done + self._filled
        start = at - piece.token_start
        self._waiting += [
            _Placed(piece.document, unit, start + unit.token_start, start + unit.token_end) for unit in piece.units
        ]
        self._open = [start + token for token in piece.open_tokens]
        if piece.is_last:
            self._document_ends.append(at + len(piece.ids))
        ids, begins = torch.from_numpy(piece.ids), piece.is_first
        while len(ids):
            if begins or not self._lengths:
                self._starts.append(0 if begins else 1)
                self._lengths.append(0)
            n = min(len(ids), self._pool.budget - self._filled)
            self._tokens[self._filled : self._filled + n] = ids[:n]
            self._lengths[-1] += n
            self._filled += n
            ids, begins = ids[n:], False
            if self._filled == self._pool.budget:
                yield self._call()

    def finish(self) -> Iterator[tuple[list[_Placed], Tensor, int, int]]:
        if self._filled:
            # What the rest of the call holds, tokens of an earlier one, makes no difference.
            self._lengths.append(self._pool.budget - self._filled)
            self._starts.append(0)
            yield self._call()

    def _call(self) -> tuple[list[_Placed], Tensor, int, int]:
        """Read the tokens: the units that end with them, their vectors fp64 [n, C], tokens, documents that end."""
        state = self._pool.start
        if self._starts[0]:
            assert self._carried is not None
            state = State({name: torch.cat([z, self._carried[name]]) for name, z in state.items()})
        hidden, self._carried = self._pool.model.forward_packed(
            self._tokens,
            torch.tensor(self._lengths),
            state,
            torch.tensor(self._starts),
            torch.tensor([len(self._lengths) - 1]),
        )
        if not hidden.isfinite().all():
            raise UsageError("embedding: expected finite hidden states, found others; load the model with --dtype fp32")
        sums = torch.cat([self._sum[None], (hidden.double() * SCALE).round().long()]).cumsum(0)  # [budget + 1, C]
        done, n = self._done, self._filled
        self._done, self._filled, self._lengths, self._starts = done + n, 0, [], []
        ended = _taken(self._waiting, lambda placed: placed.last <= self._done)
        n_documents = len(_taken(self._document_ends, lambda end: end <= self._done))
        first = torch.tensor([placed.first for placed in ended], dtype=torch.int64, device=hidden.device) - done
        last = torch.tensor([placed.last for placed in ended], dtype=torch.int64, device=hidden.device) - done
        if self._pool.pooling == "last":
            pooled = hidden[last - 1].double()
        else:
            before = sums[first.clamp(min=0)]
            for i, placed in enumerate(ended):
                if placed.first < done:
                    before[i] = self._sum_at[placed.first]
            pooled = (sums[last] - before) / (SCALE * (last - first)[:, None])
        begun = {*self._open, *(placed.first for placed in self._waiting)}
        self._sum_at = {
            at: self._sum_at[at] if at < done else sums[at - done].clone() for at in begun if at < self._done
        }
        self._sum = sums[n].clone()
        return ended, pooled, n, n_documents


def _taken(waiting: deque[T], is_due: Callable[[T], bool]) -> list[T]:
    taken = []
    while waiting and is_due(waiting[0]):
        taken.append(waiting.popleft())
    return taken


# ---- at the same time ----


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing that a thread hands over, with the reason if it is not the end of its items."""

    error: BaseException | None


def _start(thread: threading.Thread) -> None:
    """Start a thread. Signals wait meanwhile: were `start` left by what a handler raises, the thread would fail."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ahead(items: Generator[T, None, None], size: int) -> Generator[T, None, None]:
    """The same items, made on a thread of their own, up to `size` of them before they are asked for."""
    line: queue.Queue[T | _End] = queue.Queue(size)
    stopped = threading.Event()
    claimed = threading.Lock()

    def make() -> None:
        if not claimed.acquire(blocking=False):
            return
        try:
            with contextlib.closing(items):
                for item in items:
                    line.put(item)
                    if stopped.is_set():
                        break
        except BaseException as error:  # noqa: BLE001 -- raised again where the items are taken
            line.put(_End(error))
        else:
            line.put(_End(None))

    def stop() -> None:
        if claimed.acquire(blocking=False):  # stopped before the thread did anything: it would free the items too late
            items.close()
            return
        stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                line.get_nowait()
        if thread.is_alive():
            thread.join(JOIN_S)

    # A daemon, so that nobody waits for a reader that waits for its input; yet one that computes is waited for.
    thread = threading.Thread(target=make, daemon=True)
    atexit.register(stop)
    try:
        _start(thread)
        while not isinstance(item := line.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop()
        atexit.unregister(stop)
