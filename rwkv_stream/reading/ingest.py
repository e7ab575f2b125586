"""Reading: the one place where reader, tokenizer, chunker, model and store are joined.

A reading is a fold over chunks: `state, chunk → state`. Chunk edges depend on the text alone and one model call is one
chunk, so a reading that goes on from a snapshot makes the same calls as one that never stopped, and ends with the same
bits. Snapshots are stored beside the model, on a thread, one at a time.

What this module adds is finding the last snapshot that still holds for a text:

1. by bytes: the newest chunk-edge snapshot of the document's head holds if the text is unchanged through the byte that
   fixed its tokens; then nothing before it is tokenised again;
2. by tokens: from there on, or from the start, snapshots of any document are matched by the chain digest of the token
   ids, chunk by chunk.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError, InterruptedReadingError, UsageError
from rwkv_stream.files import failpoint
from rwkv_stream.text import readers
from rwkv_stream.text.chunker import CHAIN_START, CHUNK_TOKENS, Chunk, PrefixDigest, chain, chunks
from rwkv_stream.text.readers import Document

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.model.placement import HostCopy
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.text.tokenizer import TokenBlock

log = logging.getLogger(__name__)

SNAPSHOT_EVERY_TOKENS = 16_384
FAILPOINTS = ("ingest.chunk", "ingest.publish", "ingest.published")
SAMPLE = 32  # of so many tokens of a chunk one, of its last, is scored on the way
TRIM_CHUNKS = 2  # freed memory goes back to the system so often
SEARCH_TOKENS = 262_144  # how far past the last match tokens are kept while a further snapshot may still match


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a reading is, after each chunk."""

    document: str
    tokens: int
    bytes: int
    raw_bytes_read: int
    raw_size: int | None
    resumed_from_token: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What one ingest did; `tokens` and `bytes` are the whole reading's, `rate_tok_s` counts what was computed.

    shared_with  the document whose snapshot it goes on from, where that is another
    saved_s      what the tokens before `resumed_from_token` would have taken at this rate; None where nothing was read
    """

    document: str
    snapshot: str
    tokens: int
    bytes: int
    snapshots_written: int
    resumed_from_token: int
    shared_with: str | None
    saved_s: float | None
    exact: bool
    replaced_bytes: int
    elapsed_s: float
    rate_tok_s: float
    model: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an ingest would do: all tokens of the text, seconds for those still to be read, bytes of new snapshots."""

    document: str
    tokens: int
    bytes: int
    resumed_from_token: int
    snapshots: int
    store_bytes: int
    elapsed_s: float
    model: str


class StopRequest:
    """Set by a signal handler, looked at between chunks; a signal during a wait for input ends the wait at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._waiting = False

    def __call__(self, signal_number: int, _frame: object) -> None:
        self.signal_number = signal_number
        if self._waiting:
            raise self.error()

    def error(self) -> InterruptedReadingError:
        assert self.signal_number is not None
        return InterruptedReadingError("interrupted; what is whole has been kept", self.signal_number)

    def guard(self, chunks: Iterator[_Located]) -> Iterator[_Located]:
        """The same chunks; raises InterruptedReadingError while waiting for one or before handing it out."""
        while True:
            with self.waiting():
                located = next(chunks, None)
            if located is None:
                return
            yield located

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in the block may take as long as it likes: a signal before, in or after it ends it."""
        self._waiting = True
        try:
            if self.signal_number is not None:
                raise self.error()
            yield
        finally:
            self._waiting = False
        if self.signal_number is not None:
            raise self.error()


@dataclass(frozen=True, slots=True)
class _Located:
    """A chunk, the chain digest after it, and the digest of the text that fixed its tokens."""

    chunk: Chunk
    chain: bytes
    text_digest: str


@dataclass(frozen=True, slots=True)
class _Start:
    """What a reading starts from: a state, the digest of it (before the start token), the snapshot it is from."""

    state: State
    digest: str
    snapshot: str | None


def ingest(
    source: str | Document,
    *,
    model: Model,
    store: Store,
    snapshot_every: int | None = None,
    chunk: int | None = None,
    name: str | None = None,
    restart: bool = False,
    from_snapshot: str | None = None,
    max_tokens: int | None = None,
    encoding: str | None = None,
    wait: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
) -> Report:
    """Read one document through the model into the store, going on from the last snapshot that still holds.

    snapshot_every  tokens between snapshots, a multiple of `chunk` (default 16,384, rounded down to one)
    chunk           tokens per model call, T (default: the document's own, else 1,024)
    restart         read from the start whatever the store has
    from_snapshot   REF: a new document that starts from that snapshot's state
    max_tokens      stop after so many tokens of the document
    raises          InputError, UsageError, NotFoundError, StoreLockedError, SnapshotError, MismatchError,
                    InterruptedReadingError (after keeping the chunks that are whole), OSError of a full disk
    """
    document = _named(source, name, encoding)
    stop = stop or StopRequest()
    with contextlib.ExitStack() as stack:
        with stop.waiting():  # for the lock
            stack.enter_context(store.writing(document.name, model.fingerprint, wait=wait))
        reading = _Reading(document, model, store, snapshot_every, chunk, restart, from_snapshot, max_tokens, encoding)
        return reading.run(on_progress, stop)


def estimate(
    source: str | Document,
    *,
    model: Model,
    store: Store | None,
    snapshot_every: int | None = None,
    chunk: int | None = None,
    name: str | None = None,
    restart: bool = False,
    from_snapshot: str | None = None,
    max_tokens: int | None = None,
    encoding: str | None = None,
) -> Estimate:
    """What `ingest` with these arguments would do; reads and tokenises the text, times one chunk, writes nothing."""
    document = _named(source, name, encoding)
    reading = _Reading(document, model, store, snapshot_every, chunk, restart, from_snapshot, max_tokens, encoding)
    return reading.estimate()


def _named(source: str | Document, name: str | None, encoding: str | None) -> Document:
    return source if isinstance(source, Document) else readers.document(source, name=name, encoding=encoding)


class _Reading:
    """One document, one model, one store: where to start, and the fold from there."""

    def __init__(
        self,
        document: Document,
        model: Model,
        store: Store | None,
        snapshot_every: int | None,
        chunk: int | None,
        restart: bool,
        from_snapshot: str | None,
        max_tokens: int | None,
        encoding: str | None,
    ) -> None:
        self.document, self.model, self.store, self.restart = document, model, store, restart
        self.max_tokens = max_tokens
        self.start = self._start(from_snapshot)
        head = store.head(document.name, model.fingerprint) if store is not None and not restart else None
        if head is not None and chunk is not None and chunk != head.chunk:
            raise UsageError(
                f"reading '{document.name}': it is read in chunks of {head.chunk} tokens, found --chunk {chunk}; "
                "leave the option away, or pass --restart to read it again from the start"
            )
        self.head = head
        self.chunk = chunk or (head.chunk if head is not None else CHUNK_TOKENS)
        self.snapshot_every = snapshot_every or max(self.chunk, SNAPSHOT_EVERY_TOKENS // self.chunk * self.chunk)
        if self.snapshot_every % self.chunk:
            raise UsageError(
                f"reading '{document.name}': expected --snapshot-every to be a multiple of the chunk of {self.chunk} "
                f"tokens, found {self.snapshot_every}"
            )
        self.encoding = head.encoding if head is not None and encoding is None else encoding
        self.numerics = model.numerics(self.chunk)
        self.replaced_bytes = self.written = 0

    def _start(self, from_snapshot: str | None) -> _Start:
        if from_snapshot is None:
            _, state = self.model.start()
            return _Start(state, self.model.zero_state().digest(), None)
        if self.store is None:
            raise UsageError("reading from a snapshot: expected a store, found none; pass --store")
        snapshot = self.store.get(from_snapshot, model=self.model.fingerprint)
        return _Start(snapshot.state().to(self.model.device), snapshot.state_digest, snapshot.id)

    # ---- finding the last snapshot that still holds ----

    def _proven_by_bytes(self) -> tuple[Snapshot | None, bool]:
        """The newest snapshot of the head that the text's bytes prove untokenised, and whether it is all there is."""
        head = self.head
        if head is None or not self.document.reopenable or head.start_digest != self.start.digest:
            return None, False
        assert self.store is not None
        limit = math.inf if self.max_tokens is None else self.max_tokens
        lineage = itertools.chain([head], self.store.ancestors(head))
        edge = next((s for s in lineage if not s.leaf and s.decided_byte >= 0 and s.tokens <= limit), None)
        with self.document.text(self.encoding) as text:
            digest = PrefixDigest()
            pieces = digest.pieces(text)
            if edge is not None and _digest_at(digest, pieces, edge.decided_byte) != edge.text_digest:
                return None, False
            if head.decided_byte >= 0:
                whole = head.tokens == limit and _digest_at(digest, pieces, head.decided_byte) == head.text_digest
            else:  # the end of the text fixed its tokens: it holds only where the text still ends
                whole = head.tokens <= limit and _digest_at(digest, pieces, head.bytes) == head.text_digest
                whole = whole and digest.seen == head.bytes and next(pieces, None) is None
            self.replaced_bytes = text.replaced_bytes
        return (head, True) if whole else (edge, False)

    def _matched_by_tokens(
        self, base: Snapshot | None, located: Iterator[_Located]
    ) -> tuple[Snapshot | None, list[_Located]]:
        """The last snapshot from `base` on whose tokens are the text's, and the chunks already drawn that follow it."""
        drawn: list[_Located] = []
        if self.restart or self.store is None:
            return base, drawn
        reading = self.model.fingerprint, self.start.digest
        reach = self._reach(base)
        while reach is not None and (item := next(located, None)) is not None:
            drawn.append(item)
            tokens = item.chunk.end_token
            match = self.store.match(*reading, tokens, item.chain.hex(), numerics=self.numerics)
            if match is not None:
                base, drawn = match, []
                reach = self._reach(base)
            elif tokens >= reach:
                break
        return base, drawn

    def _reach(self, base: Snapshot | None) -> int | None:
        """How far tokens are looked at for a snapshot that may come next after `base`."""
        assert self.store is not None
        tokens, parent = (base.tokens, base.id) if base is not None else (0, None)
        return self.store.reach(self.model.fingerprint, self.start.digest, parent, tokens + SEARCH_TOKENS)

    # ---- the text as chunks ----

    def _located(self, base: Snapshot | None) -> Iterator[_Located]:
        """The chunks after `base`; the text that `base` rests on is checked again on the way."""
        with self.document.text(self.encoding) as text:
            self.text = text
            digest = PrefixDigest()
            pieces: Iterator[bytes] = digest.pieces(text)
            if base is None:
                stream = self.model.tokenizer.stream(pieces)
                cut = chunks(_first(stream, 0, self.max_tokens), self.chunk)
                link = CHAIN_START
            else:
                stream = self.model.tokenizer.stream(
                    _from_byte(pieces, base.anchor_byte, digest), byte=base.anchor_byte, token=base.anchor_token
                )
                cut = chunks(
                    _first(stream, base.anchor_token, self.max_tokens),
                    self.chunk,
                    skip=base.tokens - base.anchor_token,
                    start_token=base.tokens,
                    start_byte=base.bytes,
                )
                link = bytes.fromhex(base.chain)
            unchecked = base
            for chunk in cut:
                if unchecked is not None and digest.at(unchecked.decided_byte) != unchecked.text_digest:
                    raise InputError(
                        f"reading '{self.document.name}': the text changed while it was being read; run again"
                    )
                unchecked = None
                link = chain(link, chunk.ids)
                yield _Located(chunk, link, digest.at(chunk.decided_byte))

    # ---- the fold ----

    def run(self, on_progress: Callable[[Progress], None] | None, stop: StopRequest) -> Report:
        assert self.store is not None
        started = time.perf_counter()
        base, is_whole = self._proven_by_bytes()
        if is_whole:
            assert base is not None
            return self._report(base, base, 0, started)
        located = self._located(base)
        base, drawn = self._matched_by_tokens(base, stop.guard(located))
        if base is not None and base.numerics != self.numerics:
            log.warning(
                "'%s' goes on from token %d under other numerics than it was read with (%s): "
                "what follows is not bit-equal to an uninterrupted reading",
                self.document.name,
                base.tokens,
                ", ".join(sorted(k for k in self.numerics if self.numerics[k] != base.numerics.get(k))),
            )
        last = self._fold(base, stop.guard(itertools.chain(drawn, located)), on_progress, started)
        self.replaced_bytes = self.text.replaced_bytes
        if last is None:
            raise InputError(f"reading '{self.document.name}': expected some text, found none")
        if self.head is None or self.head.id != last.id:
            self._move_head(last)
        return self._report(base, last, self.written, started)

    def _fold(
        self,
        base: Snapshot | None,
        located: Iterator[_Located],
        on_progress: Callable[[Progress], None] | None,
        started: float,
    ) -> Snapshot | None:
        """Read the chunks after `base`, publishing on the way; the last snapshot, or None for a text without tokens."""
        import torch

        from rwkv_stream.kernels.memory import give_back

        self.written = 0
        unpublished: _Position | None = None
        state = base.state().to(self.model.device) if base is not None else self.start.state
        exact = base is None or (base.exact and base.numerics == self.numerics)
        bits, tokens = (base.sampled_bits, base.sampled_tokens) if base is not None else (0.0, 0)
        sample = _Sample(torch.tensor(bits, dtype=torch.float64, device=self.model.last_device), tokens)
        with _Publisher(self._publish, base) as publisher:
            try:
                for item in located:
                    publisher.check()
                    hidden, state = self.model.forward(torch.from_numpy(item.chunk.ids)[None], state, logits="none")
                    sample = self._sampled(sample, hidden[0], item.chunk.ids)
                    unpublished = _Position(item, state, hidden[0, -1].clone(), exact, sample)
                    failpoint("ingest.chunk")
                    if item.chunk.end_token // self.chunk % TRIM_CHUNKS == 0:
                        give_back()  # or the peak would creep up with the length of the text
                    if on_progress is not None:
                        on_progress(self._progress(base, item.chunk, started))
                    if item.chunk.end_token % self.snapshot_every == 0:
                        publisher.publish(unpublished)
                        unpublished = None
            except InterruptedReadingError:
                if unpublished is not None and unpublished.item.chunk.end_token % self.chunk == 0:
                    publisher.publish(unpublished)
                publisher.wait()
                raise
            if unpublished is not None:
                publisher.publish(unpublished)
            return publisher.wait()

    def _sampled(self, sample: _Sample, hidden: Tensor, ids: np.ndarray[Any, np.dtype[np.int64]]) -> _Sample:
        """With the last tokens of a chunk: their surprise, given what comes before them; `hidden` is `[T, C]`."""
        import torch

        from rwkv_stream.kernels.memory import sent

        n = min(math.ceil(len(ids) / SAMPLE), len(ids) - 1)
        if n == 0:
            return sample
        logits = self.model.head(hidden[-n - 1 : -1])
        targets = sent(torch.from_numpy(ids[-n:]), logits.device)
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return _Sample(sample.bits + nats.double() / math.log(2), sample.tokens + n)

    def _publish(self, position: _Position, copy: HostCopy, parent: Snapshot | None) -> Snapshot:
        """Object, record, head, in this order, each durable before the next."""
        from rwkv_stream.store import NewSnapshot

        assert self.store is not None
        state, (last_hidden, bits) = copy.result()
        item = position.item
        new = NewSnapshot(
            document=self.document.name,
            model=self.model.fingerprint,
            model_path=self.model.path,
            tokenizer=self.model.tokenizer.id,
            start_digest=self.start.digest,
            start=self.start.snapshot,
            chain=item.chain.hex(),
            tokens=item.chunk.end_token,
            bytes=item.chunk.byte_end,
            chunk=self.chunk,
            leaf=item.chunk.end_token % self.chunk != 0,
            parent=parent.id if parent is not None else None,
            how="ingest",
            exact=position.exact,
            numerics=self.numerics,
            encoding=self.text.encoding,
            decided_byte=item.chunk.decided_byte,
            text_digest=item.text_digest,
            anchor_byte=item.chunk.anchor_byte,
            anchor_token=item.chunk.anchor_token,
            sampled_bits=bits.item(),
            sampled_tokens=position.sample.tokens,
        )
        failpoint("ingest.publish")
        snapshot = self.store.put(new, state, last_hidden)
        self._move_head(snapshot)
        failpoint("ingest.published")
        self.written += 1
        return snapshot

    def _move_head(self, snapshot: Snapshot) -> None:
        assert self.store is not None
        name, encoding = self.document.name, self.text.encoding
        self.store.move_head(name, self.model.fingerprint, snapshot.id, encoding=encoding)

    # ---- what is told ----

    def _progress(self, base: Snapshot | None, chunk: Chunk, started: float) -> Progress:
        return Progress(
            document=self.document.name,
            tokens=chunk.end_token,
            bytes=chunk.byte_end,
            raw_bytes_read=self.text.raw_bytes_read,
            raw_size=self.text.raw_size,
            resumed_from_token=base.tokens if base is not None else 0,
            elapsed_s=time.perf_counter() - started,
        )

    def _report(self, base: Snapshot | None, last: Snapshot, written: int, started: float) -> Report:
        elapsed_s = time.perf_counter() - started
        resumed = base.tokens if base is not None else 0
        rate_tok_s = (last.tokens - resumed) / elapsed_s
        if self.replaced_bytes:
            log.warning(
                "'%s': %d bytes could not be decoded and became U+FFFD", self.document.name, self.replaced_bytes
            )
        return Report(
            document=self.document.name,
            snapshot=last.id,
            tokens=last.tokens,
            bytes=last.bytes,
            snapshots_written=written,
            resumed_from_token=resumed,
            shared_with=base.document if base is not None and base.document != self.document.name else None,
            saved_s=resumed / rate_tok_s if rate_tok_s else None,
            exact=last.exact,
            replaced_bytes=self.replaced_bytes,
            elapsed_s=elapsed_s,
            rate_tok_s=rate_tok_s,
            model=self.model.fingerprint,
        )

    def estimate(self) -> Estimate:
        import torch

        base, is_whole = self._proven_by_bytes()
        located: Iterator[_Located] = iter(())
        if not is_whole:
            located = self._located(base)
            base, drawn = self._matched_by_tokens(base, located)
            located = itertools.chain(drawn, located)
        resumed, byte = (base.tokens, base.bytes) if base is not None else (0, 0)
        tokens, chunk_s = resumed, 0.0
        for item in located:
            if not chunk_s:
                ids = torch.from_numpy(item.chunk.ids)[None]
                for _ in range(2):  # the first call warms up
                    before = time.perf_counter()
                    self.model.forward(ids, self.start.state, logits="none")
                    chunk_s = (time.perf_counter() - before) / len(item.chunk.ids) * self.chunk
            tokens, byte = item.chunk.end_token, item.chunk.byte_end
        if tokens == 0:
            raise InputError(f"reading '{self.document.name}': expected some text, found none")
        snapshots = math.ceil(tokens / self.snapshot_every) - resumed // self.snapshot_every if tokens > resumed else 0
        return Estimate(
            document=self.document.name,
            tokens=tokens,
            bytes=byte,
            resumed_from_token=resumed,
            snapshots=snapshots,
            store_bytes=snapshots * self.start.state.nbytes,
            elapsed_s=(tokens - resumed) / self.chunk * chunk_s,
            model=self.model.fingerprint,
        )


@dataclass(frozen=True, slots=True)
class _Sample:
    """Surprise of the tokens that were scored since the start of the text, and how many that were.

    bits is fp64 [], where the logits are: to ask for its value is to wait for them.
    """

    bits: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class _Position:
    """A whole chunk that has been read: what a snapshot of this moment would hold."""

    item: _Located
    state: State
    last_hidden: Tensor
    exact: bool
    sample: _Sample


class _Publisher:
    """Publishes positions on a thread beside the model, each as the child of the one before.

    One is under way at a time: when the disk is slower than the model, the model waits, and no states pile up.
    """

    def __init__(
        self, publish: Callable[[_Position, HostCopy, Snapshot | None], Snapshot], last: Snapshot | None
    ) -> None:
        self._publish = publish
        self._last = last
        self._under_way: Future[Snapshot] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    def __enter__(self) -> _Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def publish(self, position: _Position) -> None:
        """Begin to publish, once what is under way is durable; raises what stopped that one."""
        from rwkv_stream.model.placement import HostCopy

        last = self.wait()
        copy = HostCopy(position.state, position.last_hidden, position.sample.bits)
        self._under_way = self._thread.submit(self._publish, position, copy, last)

    def check(self) -> None:
        """Raise what stopped the one under way, if it has ended; does not wait."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> Snapshot | None:
        """The last one published, once it is durable; raises what stopped it."""
        if self._under_way is not None:
            self._last, self._under_way = self._under_way.result(), None
        return self._last


def _first(blocks: Iterable[TokenBlock], token: int, limit: int | None) -> Iterator[TokenBlock]:
    """The blocks up to `limit` tokens of the document, the first block starting at `token`."""
    for block in blocks:
        if limit is not None and token + len(block.ids) >= limit:
            yield block[: limit - token]
            return
        token += len(block.ids)
        yield block


def _from_byte(pieces: Iterator[bytes], byte: int, digest: PrefixDigest) -> Iterator[bytes]:
    """The text from `byte` on; what lies before is hashed at once and not held."""
    position = 0
    for piece in pieces:
        position += len(piece)
        if position > byte:
            yield piece[max(0, byte - position + len(piece)) :]
        else:
            digest.at(position)


def _digest_at(digest: PrefixDigest, pieces: Iterator[bytes], byte: int) -> str | None:
    """SHA-256 of the first `byte` bytes, drawing as many pieces as that takes; None where the text is shorter."""
    while digest.seen < byte:
        if next(pieces, None) is None:
            return None
        digest.at(min(byte, digest.seen))
    return digest.at(byte)
