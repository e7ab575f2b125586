"""Reading into a store: the one place where reader, tokenizer, chunker, model and store are joined.

A reading is a fold over chunks: `state, chunk → state` (`passes`), from the last snapshot that still holds (`resume`).
A reading that goes on from a snapshot makes the same calls as one that never stopped, and ends with the same bits.
Snapshots are stored beside the model, on threads, one of a document at a time (`publisher`), while the next document is
read (`Readings`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rwkv_stream.errors import InputError, MismatchError, NotFoundError, SnapshotError, StoppedError, UsageError
from rwkv_stream.files import failpoint
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.model.finite import first_odd, not_finite
from rwkv_stream.reading import resume
from rwkv_stream.reading.isolated import keep_instruction, read_instruction
from rwkv_stream.reading.keeping import Keeping
from rwkv_stream.reading.passes import (
    ChainedChunk,
    ChunkOutput,
    HashedText,
    Named,
    OpenText,
    chained_chunks,
    forward_chunks,
)
from rwkv_stream.reading.positions import keep_position
from rwkv_stream.reading.publisher import Position, Publisher, Sample
from rwkv_stream.reading.reading import Reading
from rwkv_stream.reading.states import with_state
from rwkv_stream.store import NewSnapshot
from rwkv_stream.store.inspection import distance, layer_norms
from rwkv_stream.store.records import READING, snapshot_id
from rwkv_stream.store.texts import EXTENT_BYTES
from rwkv_stream.text import readers
from rwkv_stream.text.edges import KINDS, Edges
from rwkv_stream.text.readers import Document
from rwkv_stream.values import updated

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.model.placement import HostCopy
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot, Store

log = logging.getLogger(__name__)

FAILPOINTS = ("ingest.chunk", "ingest.publish", "ingest.published")
MOST_EDGES = 8  # in a chunk that is not read in pieces: what comes before each is read once more
LEAST_S = 1e-9  # a clock may stand still
MOST_UNDER_WAY, UNDER_WAY_BYTES = 32, 64 << 20  # documents whose last snapshot is being published, and their states
SAMPLE = 32  # of so many tokens of a chunk one, of its last, is scored on the way


@dataclass(frozen=True, slots=True)
class ReadingProgress:
    """Where a reading is, after each chunk."""

    document: str
    tokens: int
    bytes: int
    raw_bytes_read: int
    raw_size: int | None
    resumed_from_token: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class ReadingReport:
    """What one ingest did; `tokens` and `bytes` are the whole reading's, `rate_tok_s` counts what was computed.

    head         where the document stands, `head_tokens` tokens on: another snapshot than `snapshot` where that is a
                 shorter reading of the same tokens, which no name leads to then
    edges        of the snapshots written those at edges of the document (`Reading.snapshot_at`)
    shared_with  the document whose snapshot it goes on from, where that is another
    encoding_source  how the encoding was found: "named" where the document was read before
    losses       what of the text could not be read, a line each, the first 1,000 of `n_losses`
    saved_s      what the tokens before `resumed_from_token` would have taken at this rate; None where nothing was read
    """

    document: str
    snapshot: str
    tokens: int
    bytes: int
    head: str
    head_tokens: int
    snapshots_written: int
    edges: int
    resumed_from_token: int
    shared_with: str | None
    saved_s: float | None
    exact: bool
    replaced_bytes: int
    encoding: str
    encoding_source: str | None
    losses: tuple[str, ...]
    n_losses: int
    elapsed_s: float
    rate_tok_s: float
    model: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an ingest would do: all tokens of the text, seconds for those still to be read, bytes of new states."""

    document: str
    tokens: int
    bytes: int
    resumed_from_token: int
    snapshots: int
    store_bytes: int
    elapsed_s: float
    model: str


def ingest(
    source: str | os.PathLike[str] | Document,
    reading: Reading | None = None,
    *,
    model: Model,
    store: Store,
    name: str | None = None,
    on_progress: Callable[[ReadingProgress], None] | None = None,
    stop: StopRequest | None = None,
    **options: Any,
) -> ReadingReport:
    """Read one document through the model into the store, going on from the last snapshot that still holds.

    A document keeps to its T, to its encoding and to what it was started from. Its head never goes back: a reading that
    `max_tokens` ends before it, of the same tokens, leaves a snapshot that only its id leads to.

    options  fields of `Reading`, in the place of those of `reading`
    raises   InputError, UsageError, NotFoundError, StoreLockedError, SnapshotError, MismatchError,
             StoppedError (after keeping the chunks that are whole), OSError of a full disk
    """
    if isinstance(store, str | os.PathLike):
        raise UsageError(f"reading into '{store}': expected a Store, found a path; pass rs.Store(path, create=True)")
    reading = updated(reading or Reading(), options, "reading")
    document = _document(source, name, reading)
    with Readings(model, store, reading, stop) as readings:
        return readings.read(document, on_progress).report()


class Readings:
    """Documents read one after the other into a store, in one session.

    The model goes on with the next document while the last snapshot of those before is being published, and these are
    made durable together. What comes of a document is as if it had been read alone.
    """

    def __init__(self, model: Model, store: Store, reading: Reading, stop: StopRequest | None = None) -> None:
        self._model, self._store, self._reading = model, store, reading
        self._stop = stop or StopRequest()
        self._shared = Shared(model)
        self._under_way: deque[Begun] = deque()
        self._limit = max(1, min(MOST_UNDER_WAY, UNDER_WAY_BYTES // max(1, model.zero_state().nbytes)))

    def __enter__(self) -> Readings:
        with contextlib.ExitStack() as stack:
            with self._stop.waiting():  # for the lock
                stack.enter_context(self._store.writing(wait=self._reading.wait))
            if self._reading.instruction is not None:
                kept = keep_instruction(self._reading.instruction, model=self._model, store=self._store)
                self._reading = replace(self._reading, instruction=None, from_snapshot=kept.id)
            if self._reading.from_snapshot is not None:
                start = keep_position(self._reading.from_snapshot, model=self._model, store=self._store)
                if start is not None:
                    self._reading = replace(self._reading, from_snapshot=start.id)
            self._threads = stack.enter_context(ThreadPoolExecutor(self._limit, thread_name_prefix="publisher"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for begun in self._under_way:
                begun.settle()
        finally:
            self._stack.close()

    def read(
        self,
        document: Named,
        on_progress: Callable[[ReadingProgress], None] | None = None,
        begin: Callable[..., Beginning] | None = None,
    ) -> Begun:
        """Read a document; what is left is to wait for its report. Raises as `ingest`.

        begin  says where to begin, of a document that is no `Document`
        """
        for begun in list(self._under_way):
            is_needed = begun.document == document.name or self._reading.from_snapshot is not None
            if begun.is_done or is_needed or len(self._under_way) >= self._limit:
                begun.settle()
                self._under_way.remove(begun)
        with contextlib.ExitStack() as stack:
            with self._stop.waiting():  # for the lock
                stack.enter_context(
                    self._store.writing(document.name, self._model.fingerprint, wait=self._reading.wait)
                )
            self._shared.under_way = self._under_way
            begin = begin or Beginning
            beginning = begin(document, self._model, self._store, self._reading, self._shared)
            begun = _read(beginning, self._store, on_progress, self._stop, self._threads)
            begun.locks = stack.pop_all()
        self._under_way.append(begun)
        return begun


class Begun:
    """A document that has been read, and whose last snapshot may still be under way to the disk.

    place  digest of the start, tokens and chain where that stands; None where there is nothing under way
    """

    def __init__(
        self,
        document: str,
        finish: Callable[[], ReadingReport],
        publisher: Publisher | None = None,
        place: tuple[str, int, bytes] | None = None,
    ) -> None:
        self.document, self.place = document, place
        self.locks = contextlib.ExitStack()
        self._finish, self._publisher = finish, publisher

    @property
    def is_done(self) -> bool:
        """Whether `report` would not wait."""
        return self._publisher is None or self._publisher.is_done

    def settle(self) -> None:
        """Wait until it is durable, or has failed."""
        with self.locks:
            if self._publisher is not None:
                self._publisher.settle()

    def report(self) -> ReadingReport:
        """What was done, once it is durable; raises what stopped that."""
        self.settle()
        return self._finish()


class Shared:
    """What documents have in common that are read one after the other."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.under_way: Iterable[Begun] = ()

    @functools.cached_property
    def own(self) -> resume.Start:
        return resume.Start(self._model.zero_state().digest())

    @functools.cached_property
    def state(self) -> State:
        """After the start token."""
        return self._model.start()[1]


def estimate(
    source: str | os.PathLike[str] | Document,
    reading: Reading | None = None,
    *,
    model: Model,
    store: Store | None,
    name: str | None = None,
    **options: Any,
) -> Estimate:
    """What `ingest` with these arguments would do; reads and tokenises the text, times one chunk, writes nothing."""
    reading = updated(reading or Reading(), options, "reading")
    beginning = Beginning(_document(source, name, reading), model, store, reading)
    plan = beginning.plan
    base, whole = beginning.by_bytes()
    tokens, byte = _position(base)
    chunk_s, n_edges = 0.0, 0
    if whole is None:
        with beginning.text() as text:
            edges = beginning.edges(text)
            chunks = beginning.chunks(HashedText(edges.pieces(text) if edges is not None else text), base, edges)
            base, drawn = beginning.by_tokens(base, chunks)
            tokens, byte = _position(base)
            for item in itertools.chain(drawn, chunks):
                n_edges += len(item.edges) + (item.at_edge and item.chunk.end_token % plan.snapshot_every != 0)
                chunk_s = chunk_s or _timed(model, item) / len(item.chunk.ids) * plan.chunk
                tokens, byte = item.chunk.end_token, item.chunk.byte_end
    if tokens == 0:
        raise beginning.no_text()
    resumed, _ = _position(base)
    snapshots = math.ceil(tokens / plan.snapshot_every) - resumed // plan.snapshot_every if tokens > resumed else 0
    is_short = reading.keep_text and base is None and not n_edges and tokens < min(plan.snapshot_every, plan.limit)
    snapshots += n_edges
    return Estimate(
        document=beginning.document.name,
        tokens=tokens,
        bytes=byte,
        resumed_from_token=resumed,
        snapshots=snapshots,
        store_bytes=0 if is_short else snapshots * model.zero_state().nbytes,
        elapsed_s=(tokens - resumed) / plan.chunk * chunk_s,
        model=model.fingerprint,
    )


def _document(source: str | os.PathLike[str] | Document, name: str | None, reading: Reading) -> Document:
    if isinstance(source, Document):
        return source
    return readers.document(source, name=name, encoding=reading.encoding)


def _position(base: Snapshot | None) -> tuple[int, int]:
    """Tokens and bytes of the text before what is still to be read."""
    return (base.tokens, base.bytes) if base is not None else (0, 0)


def _timed(model: Model, item: ChainedChunk) -> float:
    """Seconds for one call of the model."""
    elapsed_s = 0.0
    for _ in range(2):  # the first call warms up
        before = time.perf_counter()
        model.forward(torch.from_numpy(item.chunk.ids)[None], model.zero_state(), logits="none")
        elapsed_s = time.perf_counter() - before
    return elapsed_s or LEAST_S


class Beginning:
    """Where a reading of a document begins: `resume` for this document, this model and this store, if there is one.

    left      where the document stands, if the reading is to leave that
    known_to  a byte before which the head does not move, as it stands there
    pauses    whether the text may wait for more, as an empty piece of it says
    """

    pauses = False

    def __init__(
        self,
        document: Named,
        model: Model,
        store: Store | None,
        reading: Reading,
        shared: Shared | None = None,
    ) -> None:
        self.document, self.model, self.store = document, model, store
        self.keeps_text, self.rule = reading.keep_text, reading.rule
        self.known_to = 0
        self._shared = shared or Shared(model)
        start = self._asked(reading)
        head = self._head(reading.restart)
        self.left = head if reading.restart else None
        self._kept_edges = ""
        if head is not None and not reading.restart:
            self.check_way()
            assert store is not None
            self._kept_edges = store.edges(document.name, model.fingerprint)
        self.plan = resume.plan(document.name, reading, head, start, self._shared.own, self._kept_edges)
        self.numerics = model.numerics(self.plan.chunk)

    def check_way(self) -> None:
        """Raise UsageError where the document is one that is followed."""
        assert self.store is not None
        if self.store.mark(self.document.name, self.model.fingerprint) is not None:
            raise UsageError(
                f"reading '{self.document.name}': it is what was read of files that are written to, and goes on with "
                "--follow; pass that, or --restart to read this text in its place, or another --name"
            )

    def guarded(self, items: Iterator[ChainedChunk], stop: StopRequest) -> Iterator[ChainedChunk]:
        """As `StopRequest.guard`."""
        return stop.guard(items)

    def mark(self, byte: int) -> Mapping[str, str | int] | None:
        """Where a byte stands in the files that the document follows."""
        return None

    def _asked(self, reading: Reading) -> resume.Start | None:
        ref = reading.from_snapshot
        if reading.instruction is not None:
            new, state, _ = read_instruction(reading.instruction, self.model)
            return resume.Start(
                state.digest(), snapshot_id(new.model, new.start_digest, new.chain, new.tokens, state.digest())
            )
        if ref is None:
            return None
        if self.store is None:
            raise UsageError("reading from a snapshot: expected a store, found none; pass --store")
        snapshot = self.store.get(ref, model=self.model.fingerprint)
        if snapshot.is_kept_exactly or not snapshot.keeps_state:
            return resume.Start(snapshot.state_digest, snapshot.id)
        if not reading.approximate:
            raise UsageError(
                f"reading '{self.document.name}' from snapshot {snapshot.id[:12]}: expected an exact state, found one "
                f"kept as {snapshot.codec}; pass --approx to start from that, or ingest its document again"
            )
        return resume.Start(snapshot.state().digest(), snapshot.id)

    def _head(self, is_restart: bool) -> Snapshot | None:
        """Where the document stands."""
        if self.store is None:
            return None
        try:
            return self.store.head(self.document.name, self.model.fingerprint)
        except SnapshotError as error:
            if not is_restart:
                raise
            log.warning("'%s' is to be left where it stands, which is not known: %s", self.document.name, error)
            return None

    def state(self) -> State:
        """The state before the first token, as the model is to be fed it."""
        snapshot_id = self.plan.start.snapshot
        if snapshot_id is None:
            return self._shared.state
        assert self.store is not None
        try:
            snapshot = self.store.get(snapshot_id, model=self.model.fingerprint)
        except NotFoundError as error:
            raise NotFoundError(
                f"reading '{self.document.name}': expected the snapshot that it was started from, {snapshot_id}, found "
                "none; pass --restart to read it from the model's own start"
            ) from error
        state, last_hidden = with_state(snapshot, self.model).load()
        if state.digest() != self.plan.start.digest:
            found = f"kept as {snapshot.codec} since" if snapshot.keeps_state else "made under other numerics"
            raise MismatchError(
                f"reading '{self.document.name}': expected the state that it was started from, found snapshot "
                f"{snapshot_id} {found}; pass --restart with --from-snapshot and --approx to read it from there again"
            )
        if not snapshot.keeps_state:  # what is started from it may be made from it
            self.store.put(snapshot, state, last_hidden)
        return state.to(self.model.device)

    def text(self) -> OpenText:
        assert isinstance(self.document, Document)
        return self.document.text(self.plan.encoding)

    @property
    def has_new_edges(self) -> bool:
        """Whether the document is to have snapshots at other edges than it had them at so far."""
        return self.plan.snapshot_at != self._kept_edges

    def edges(self, text: OpenText) -> Edges | None:
        """Those of a text, of which nothing was drawn, at which there are to be snapshots."""
        if not self.plan.snapshot_at:
            return None
        return Edges(self.plan.snapshot_at, text, None if self.model.keeps_bits_in_pieces else MOST_EDGES)

    def chunks(self, text: HashedText, base: Snapshot | None, edges: Edges | None) -> Iterator[ChainedChunk]:
        """The chunks after `base` of a text of which nothing was drawn; `edges` see it go past."""
        limit = None if math.isinf(self.plan.limit) else int(self.plan.limit)
        return chained_chunks(
            text, self.model.tokenizer, self.plan.chunk, after=base, max_tokens=limit, edges=edges, pauses=self.pauses
        )

    def lineage(self) -> Iterator[Snapshot]:
        """The document's head and its ancestors, nearest first."""
        if self.plan.head is not None:
            yield from self.plan.head.lineage()

    def by_bytes(self) -> tuple[Snapshot | None, OpenText | None]:
        """As `resume.by_bytes`; where the snapshot is all there is to the text, with the text, read and closed."""
        if self.plan.head is None or not self.document.reopenable:
            return None, None
        with self.text() as text:
            base, is_whole = resume.by_bytes(self.plan, self.lineage(), HashedText(text))
        return base, text if is_whole else None

    def by_tokens(
        self, base: Snapshot | None, chunks: Iterator[ChainedChunk], keeping: Keeping | None = None
    ) -> tuple[Snapshot | None, list[ChainedChunk]]:
        """As `resume.by_tokens`; of each snapshot that is found, `keeping` is told."""
        store = self.store
        if store is None or self.plan.is_restart:
            return base, []
        reading = self.model.fingerprint, self.plan.start.digest

        def match(item: ChainedChunk) -> Snapshot | None:
            for begun in self._shared.under_way:
                if begun.place == (self.plan.start.digest, item.chunk.end_token, item.chain):
                    begun.settle()
            return store.match(*reading, item.chunk.end_token, item.chain.hex(), numerics=self.numerics)

        def reach(parent: str | None, limit: int) -> int | None:
            places = [begun.place for begun in self._shared.under_way if begun.place is not None]
            found = [tokens for digest, tokens, _ in places if digest == self.plan.start.digest and tokens <= limit]
            known = store.reach(*reading, parent, limit)
            return max(found if known is None else [*found, known], default=None)

        def note(found: Snapshot) -> None:
            if keeping is not None:
                keeping.reach(found)

        return resume.by_tokens(base, (item.held() for item in chunks), match, reach, note)

    def move_head(self, store: Store, snapshot: Snapshot, text: OpenText) -> None:
        """Let the document stand there, with its own encoding, T and edges: the snapshot may be shared."""
        plan, name = self.plan, self.document.name
        own, at = self.model.fingerprint, plan.snapshot_at
        store.move_head(name, own, snapshot.id, encoding=text.encoding, chunk=plan.chunk, snapshot_at=at)

    def no_text(self) -> InputError:
        return InputError(f"reading '{self.document.name}': expected some text, found none")


def _read(
    beginning: Beginning,
    store: Store,
    on_progress: Callable[[ReadingProgress], None] | None,
    stop: StopRequest,
    threads: Executor,
) -> Begun:
    """Find where to begin, and read on from there; what is left is the head, and the report."""
    started = time.perf_counter()
    if beginning.left is not None:
        log.warning(
            "'%s' is read again from the start and leaves the reading of %d tokens at snapshot %s: "
            "tag that one to keep it",
            *(beginning.document.name, beginning.left.tokens, beginning.left.id),
        )
    base, whole = beginning.by_bytes()
    if whole is not None:
        assert base is not None
        if beginning.has_new_edges:
            _say_no_edges(beginning, base)
            beginning.move_head(store, base, whole)
        if beginning.keeps_text and base.text is None:
            with stop.waiting():
                _keep_whole(beginning, store, base)
        return Begun(
            beginning.document.name, functools.partial(_report, beginning, base, base, base, None, whole, started)
        )
    with contextlib.ExitStack() as stack:
        with stop.waiting():  # for the first of a slow source
            text = stack.enter_context(beginning.text())
        keeping = Keeping(store, beginning.document, text) if beginning.keeps_text else None
        edges = beginning.edges(text)
        pieces = keeping.pieces() if keeping is not None else text
        hashed = HashedText(edges.pieces(pieces) if edges is not None else pieces)
        if base is not None and keeping is not None:
            keeping.reach(base)
        chunks = beginning.chunks(hashed, base, edges)
        base, drawn = beginning.by_tokens(base, beginning.guarded(chunks, stop), keeping)
        if base is not None and beginning.has_new_edges:
            _say_no_edges(beginning, base)
        resumed_from_token, _ = _position(base)

        def note(item: ChainedChunk) -> None:
            if on_progress is not None:
                progress = ReadingProgress(
                    document=beginning.document.name,
                    tokens=item.chunk.end_token,
                    bytes=item.chunk.byte_end,
                    raw_bytes_read=text.raw_bytes_read,
                    raw_size=text.raw_size,
                    resumed_from_token=resumed_from_token,
                    elapsed_s=time.perf_counter() - started,
                )
                on_progress(progress)

        fold = _Fold(beginning, store, base, text, keeping, threads)
        at = fold.run(beginning.guarded(itertools.chain(drawn, chunks), stop), note)
        if edges is not None:
            _say_left(beginning, edges)
        head, name = beginning.plan.head, beginning.document.name
        if at is not None and not beginning.plan.leaves_head:  # its head moves with it
            if keeping is not None:
                keeping.close()

            def finish() -> ReadingReport:
                last = fold.publisher.wait()
                assert last is not None
                return _report(beginning, base, last, last, fold, text, started)

            place = beginning.plan.start.digest, at.chunk.end_token, at.chain
            return Begun(name, finish, fold.publisher, place)
        last = fold.publisher.wait()
        if last is None:
            raise beginning.no_text()
        if keeping is not None:
            if last.text is None:  # nothing was left to be read but the text
                store.keep_text(last.id, keeping.write(keeping.take(last.bytes)))
            keeping.close()
        with stop.waiting():
            is_shorter = beginning.plan.leaves_head and last.tokens == beginning.plan.limit
            stays = is_shorter and resume.is_prefix(last, beginning.lineage(), hashed)
    if head is None or not (stays or (head.id == last.id and not beginning.has_new_edges)):
        beginning.move_head(store, last, text)
        head = last
    return Begun(name, functools.partial(_report, beginning, base, last, head, fold, text, started))


def _say_no_edges(beginning: Beginning, base: Snapshot) -> None:
    log.warning(
        "'%s' goes on from token %d: before that a %s has a snapshot only where an earlier reading made one; pass "
        "--restart to read it all again with them",
        *(beginning.document.name, base.tokens, _edge_words(beginning.plan.snapshot_at)),
    )


def _say_left(beginning: Beginning, edges: Edges) -> None:
    name, at = beginning.document.name, _edge_words(beginning.plan.snapshot_at)
    if not edges.found:
        log.warning("'%s': expected to keep a snapshot at each %s, found none in it", name, at)
    if edges.left:
        log.warning(
            "'%s': %d snapshots at a %s are left out, where more than %d stand in a chunk of %d tokens; pass a smaller "
            "--chunk with --restart, or another --snapshot-at",
            *(name, edges.left, at, MOST_EDGES, beginning.plan.chunk),
        )


def _edge_words(snapshot_at: str) -> str:
    return snapshot_at if snapshot_at in KINDS else f"line like '{snapshot_at}'"


def _keep_whole(beginning: Beginning, store: Store, snapshot: Snapshot) -> None:
    """Keep the text of a snapshot that is all there is to it, and was read without."""
    own = beginning.document.name, beginning.model.fingerprint
    room = store.thinning(*own, beginning.rule, None).room(snapshot.tokens, snapshot.bytes)
    with beginning.text() as text, room:
        keeping = Keeping(store, beginning.document, text)
        keeping.reach(snapshot)
        if HashedText(keeping.pieces()).holds(snapshot):
            store.keep_text(snapshot.id, keeping.write(keeping.take(snapshot.bytes)))


def _report(
    beginning: Beginning,
    base: Snapshot | None,
    last: Snapshot,
    head: Snapshot,
    fold: _Fold | None,
    text: OpenText,
    started: float,
) -> ReadingReport:
    elapsed_s = time.perf_counter() - started
    document, (resumed, _) = beginning.document.name, _position(base)
    rate_tok_s = (last.tokens - resumed) / max(elapsed_s, LEAST_S)
    text.say_replaced()
    return ReadingReport(
        document=document,
        snapshot=last.id,
        tokens=last.tokens,
        bytes=last.bytes,
        head=head.id,
        head_tokens=head.tokens,
        snapshots_written=fold.written if fold is not None else 0,
        edges=fold.edges if fold is not None else 0,
        resumed_from_token=resumed,
        shared_with=base.document if base is not None and base.document != document else None,
        saved_s=resumed / rate_tok_s if rate_tok_s else None,
        exact=last.exact,
        replaced_bytes=text.replaced_bytes,
        encoding=text.encoding,
        encoding_source=text.encoding_source,
        losses=tuple(map(str, text.losses)),
        n_losses=text.n_losses,
        elapsed_s=elapsed_s,
        rate_tok_s=rate_tok_s,
        model=beginning.model.fingerprint,
    )


class _Fold:
    """Chunks through the model into the store, on from a snapshot or from the beginning."""

    def __init__(
        self,
        beginning: Beginning,
        store: Store,
        base: Snapshot | None,
        text: OpenText,
        keeping: Keeping | None,
        threads: Executor,
    ) -> None:
        self.publisher = Publisher(self._publish, base, threads)
        self.written = self.edges = 0
        plan = beginning.plan
        last = None if plan.leaves_head else base  # a shorter reading thins nothing
        own = beginning.document.name, beginning.model.fingerprint
        self._thinning = store.thinning(*own, beginning.rule, last)
        self._keeping = keeping
        self._beginning, self._store, self._base, self._text = beginning, store, base, text
        self._exact = base is None or base.exact
        self._known_to = beginning.known_to
        self._before: State | None = None  # the state that the next snapshot's is compared with
        if base is not None and (differing := resume.differing(base, beginning.numerics)):
            self._exact = False
            log.warning(
                "'%s' goes on from token %d under other numerics than it was read with (%s): "
                "what follows is not bit-equal to an uninterrupted reading",
                *(beginning.document.name, base.tokens, ", ".join(differing)),
            )

    def run(self, chunks: Iterator[ChainedChunk], note: Callable[[ChainedChunk], None]) -> ChainedChunk | None:
        """Read the chunks, publishing on the way; the last one, or None where there was none.

        The last snapshot may be under way when this returns.
        """
        try:
            return self._run(chunks, note)
        except BaseException:
            self.publisher.settle()
            raise

    def _run(self, chunks: Iterator[ChainedChunk], note: Callable[[ChainedChunk], None]) -> ChainedChunk | None:
        model, plan, base, publisher = self._beginning.model, self._beginning.plan, self._base, self.publisher
        item: ChainedChunk | None = None
        unpublished: Position | None = None
        bits, tokens = (base.sampled_bits, base.sampled_tokens) if base is not None else (0.0, 0)
        place = model.last_device
        sample = Sample(torch.tensor(bits, dtype=torch.float64, device=place), tokens, torch.tensor(-1, device=place))
        try:
            if (first := next(chunks, None)) is None:
                return None
            self._before = base.state() if base is not None else None
            state = self._before.to(model.device) if self._before is not None else self._beginning.state()
            for output in forward_chunks(model, itertools.chain((first,), chunks), state):
                publisher.check()
                sampled = self._sampled(sample, output)
                position = Position(output.item, output.state, output.hidden[-1].clone(), self._exact, sampled)
                if output.is_part:
                    publisher.publish(self._with_text(position))
                    continue
                item, unpublished = output.item, position
                failpoint("ingest.chunk")
                if item.chunk.is_paused:
                    if item.chunk.byte_end >= self._known_to:
                        publisher.publish(self._with_text(unpublished))
                    unpublished = None
                    continue
                sample = sampled
                note(item)
                if item.chunk.end_token % plan.snapshot_every == 0 or item.at_edge:
                    publisher.publish(self._with_text(unpublished))
                    unpublished = None
                elif item.chunk.byte_end < self._known_to:
                    unpublished = None
                elif self._keeping is not None and self._keeping.is_full(item.chunk.byte_end):
                    publisher.wait()
                    with self._thinning.room(item.chunk.end_token, EXTENT_BYTES):
                        self._keeping.write_full(item.chunk.byte_end)
        except StoppedError as stopped:
            if unpublished is not None and unpublished.item.chunk.end_token % plan.chunk == 0:
                publisher.publish(self._with_text(unpublished))
            last = publisher.wait()
            raise StoppedError(
                f"reading '{self._beginning.document.name}': interrupted; {_position(last)[0]:,} tokens of it are "
                "kept, and the same command goes on from there",
                stopped.signal_number,
            ) from None
        if unpublished is not None:
            keep_state = not self._is_short(unpublished)
            publisher.publish(replace(self._with_text(unpublished), keep_state=keep_state))
        return item

    def _is_short(self, position: Position) -> bool:
        """Whether the document ended before its first regular snapshot, where no longer text would go on, so that its
        kept text makes the state."""
        plan, chunk = self._beginning.plan, position.item.chunk
        ended = chunk.end_token < min(plan.snapshot_every, plan.limit) and chunk.decided_byte <= chunk.byte_end
        is_leaf = chunk.end_token % plan.chunk != 0 or chunk.decided_byte < 0
        return ended and is_leaf and self._base is None and self._keeping is not None

    def _with_text(self, position: Position) -> Position:
        """With the text since the last one."""
        if self._keeping is None:
            return position
        byte = position.item.chunk.byte_end
        mark = self._beginning.mark(byte) if byte >= self._known_to else None
        return replace(position, text=self._keeping.take(byte), mark=mark)

    def _sampled(self, sample: Sample, output: ChunkOutput) -> Sample:
        """With the last tokens of a chunk: their surprise, given what comes before them."""
        chunk, ids = output.item.chunk, output.item.chunk.ids
        odd = first_odd(output.hidden)
        odd = torch.where((sample.odd < 0) & (odd < len(ids)), chunk.start_token + odd, sample.odd)
        n = min(math.ceil(len(ids) / SAMPLE), len(ids) - 1)
        if n == 0:
            return Sample(sample.bits, sample.tokens, odd)
        nats = self._beginning.model.surprise(output.hidden[-n - 1 : -1], torch.from_numpy(ids[-n:]))
        return Sample(sample.bits + nats.double().sum() / math.log(2), sample.tokens + n, odd)

    def _publish(self, position: Position, copy: HostCopy, parent: Snapshot | None) -> Snapshot:
        """Text, object, record, head, in this order, each durable before the next."""
        state, (last_hidden, bits, odd) = copy.result()
        if odd >= 0 or not bits.isfinite():
            doing = f"reading '{self._beginning.document.name}'"
            raise not_finite(self._beginning.model, doing, state, int(odd) if odd >= 0 else None)
        n_text = len(position.text.text) if position.text is not None else 0
        n_state = parent.size_bytes if parent is not None else state.nbytes  # about
        with self._thinning.room(position.item.chunk.end_token, n_text + n_state):
            snapshot = self._put(position, state, last_hidden, bits.item(), parent)
        self.written += 1
        self.edges += position.item.at_edge
        plan = self._beginning.plan
        if not plan.leaves_head:
            self._thinning.add(snapshot)
            if self.written == 1 and plan.head is not None:
                self._thinning.supersede(plan.head)  # which the head has just left
            self._thinning.thin()
        return snapshot

    def _parent(self, last: Snapshot | None) -> str | None:
        """What a snapshot goes on from: the last one, unless that was taken by time, where no text goes on."""
        if last is None:
            return None
        return last.id if last.edge or last.tokens % self._beginning.plan.chunk == 0 else last.parent

    def _put(
        self, position: Position, state: State, last_hidden: Tensor, bits: float, parent: Snapshot | None
    ) -> Snapshot:
        chunk, plan, model = position.item.chunk, self._beginning.plan, self._beginning.model
        text, inline = None, None
        if position.text is not None:
            assert self._keeping is not None
            inlined = None if position.keep_state else self._keeping.inline(position.text)
            text, inline = inlined or (self._keeping.write(position.text), None)
        new = NewSnapshot(
            document=self._beginning.document.name,
            model=model.fingerprint,
            model_path=model.path,
            tokenizer=model.tokenizer.id,
            start_digest=plan.start.digest,
            start=plan.start.snapshot,
            chain=position.item.chain.hex(),
            tokens=chunk.end_token,
            bytes=chunk.byte_end,
            chunk=plan.chunk,
            leaf=chunk.end_token % plan.chunk != 0,
            parent=self._parent(parent),
            how=READING,
            exact=position.exact,
            numerics=self._beginning.numerics,
            encoding=self._text.encoding,
            decided_byte=chunk.decided_byte,
            text_digest=position.item.text_digest,
            anchor_byte=chunk.anchor_byte,
            anchor_token=chunk.anchor_token,
            sampled_bits=bits,
            sampled_tokens=position.sample.tokens,
            text=text,
            inline_extent=inline,
            norms=layer_norms({name: tensor.float().numpy() for name, tensor in state.items()}),
            drift={
                name: distance(before, state[name]).relative
                for name, before in (self._before.items() if self._before is not None else ())
            },
            edge=position.item.at_edge,
        )
        if new.edge or not new.leaf:
            self._before = state
        failpoint("ingest.publish")
        stays = plan.leaves_head or chunk.byte_end < self._known_to
        head = None if stays else (new.document, new.encoding, plan.chunk, plan.snapshot_at)
        snapshot = self._store.put(
            new, state, last_hidden, head=head, mark=position.mark, keep_state=position.keep_state
        )
        failpoint("ingest.published")
        return snapshot
