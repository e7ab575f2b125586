"""Reading what goes on: a file that is written to, through its rotations, or a pipe, for as long as the program runs.

A followed document is what was read of it, one after the other. Its text is kept: what a reading has read is taken from
the store when it goes on, and what comes then from the files, on from the mark that its head has beside the snapshot.
So neither a kill nor a rotation loses or doubles a line, and the states are those of the whole text read in one go.

Nothing is fixed by time: tokens that what comes may still change wait for it. A timed snapshot holds those that are
fixed by then, as a leaf; the reading goes on from the last edge of the grid.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import sys
import time
from codecs import IncrementalDecoder
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rwkv_stream.errors import InputError, SnapshotError, StoppedError, UsageError
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.reading.ingest import Beginning, ReadingProgress, ReadingReport, Readings
from rwkv_stream.reading.passes import HashedText
from rwkv_stream.reading.reading import Reading
from rwkv_stream.text import follow as files
from rwkv_stream.text.follow import FollowedFile, FollowedPipe, Mark, PipeMark
from rwkv_stream.text.readers import LOSSES, remote
from rwkv_stream.text.readers.encodings import codec, decided, incremental_decoder, utf8
from rwkv_stream.text.readers.places import Lines, Place
from rwkv_stream.text.readers.streams import READ_BYTES, printable, reversible
from rwkv_stream.values import updated

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.reading.ingest import Shared
    from rwkv_stream.reading.keeping import Keeping
    from rwkv_stream.reading.passes import ChainedChunk
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText

log = logging.getLogger(__name__)

POLL_S = 1.0  # between looks at a file that nothing was written to
ENCODING = "utf-8"  # unless another is named: to find it out would be to wait for 64 KiB
LAG_S = 10.0  # behind what is written, from which that is told
SEEN_LIMIT = 4096  # times at which sizes were seen

Wait = Callable[[float], object]


class Followed:
    """A document that goes on: a file with its rotations, or a pipe.

    source            a path, or "-" for stdin
    snapshot_seconds  after so long something new is to be seen in a snapshot; None: only where one is due anyway
    raises            UsageError for what cannot be followed
    """

    reopenable = False
    id = kind = None

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        encoding: str | None = None,
        snapshot_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Wait | None = None,
    ) -> None:
        if source == "-" and name is None:
            raise UsageError("following stdin: expected a name for the document, found none; pass --name")
        if snapshot_seconds is not None and snapshot_seconds <= 0:
            raise UsageError(f"following: expected snapshot_seconds above 0, found {snapshot_seconds}")
        if remote.is_url(source) or os.path.isdir(source):  # noqa: PTH112 -- of what may be no path of this system's
            raise UsageError(f"following '{printable(source)}': expected a file, a pipe or -, found none of them")
        self.path = None if source == "-" else source
        self.name = name or reversible(source)
        self.encoding = None if encoding is None else codec(encoding)
        self.place: Place = {}
        self.snapshot_seconds, self.clock, self.wait = snapshot_seconds, clock, wait

    @property
    def is_pipe(self) -> bool:
        if self.path is None:
            return True
        try:
            return not stat.S_ISREG(os.stat(self.path).st_mode)  # noqa: PTH116
        except OSError:  # a file that is yet to come
            return False

    def open_pipe(self) -> FollowedPipe:
        """Raises InputError."""
        if self.path is None:
            if sys.stdin is None:
                raise InputError("following stdin: expected an open stream, found none; pass a file")
            return FollowedPipe(sys.stdin.fileno())
        try:
            return FollowedPipe(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise InputError(f"following '{self.name}': expected a pipe, found: {error.strerror}") from error


def opened_after(document: Followed, store: Store | None = None, snapshot: Snapshot | None = None) -> FollowedText:
    """A followed document, open behind a snapshot where that is its head, else from the start of the file that is
    there; what lies before is not given.

    raises  InputError, UsageError for a document that stands elsewhere
    """
    mark: Mark | PipeMark | None = None
    encoding = document.encoding or ENCODING
    if store is not None and snapshot is not None:
        head = store.head(snapshot.document, snapshot.model)
        values = store.mark(snapshot.document, snapshot.model)
        if head is not None and head.id == snapshot.id and values is not None:
            mark, encoding = _known(values, snapshot.document), head.encoding

    def open_source(on_gap: Callable[[str], object]) -> FollowedFile | FollowedPipe:
        if document.is_pipe:
            return document.open_pipe()
        assert document.path is not None
        if isinstance(mark, Mark):
            return FollowedFile(document.path, on_gap, mark)
        return FollowedFile(document.path, on_gap, first=next(iter(files.family(document.path)[-1:]), None))

    return FollowedText(document, encoding, open_source, None, mark)


class FollowedText(Iterator[bytes]):
    """An open followed document: the pieces of its text as UTF-8, an empty one where it waits, or where a snapshot is
    due. As a `Text`.

    `step` gives what there is by now; to iterate is to wait for more.
    """

    stop: StopRequest | None = None  # which a pipe ends with
    has_lines = True

    def __init__(
        self,
        document: Followed,
        encoding: str,
        open_source: Callable[[Callable[[str], object]], FollowedFile | FollowedPipe],
        before: KeptText | None = None,
        mark: Mark | PipeMark | None = None,
        *,
        ends: bool = False,
    ) -> None:
        """
        open_source   is given what is to be told of gaps
        before, mark  the text that was read, and where it ends
        ends          with what is there by now
        """
        self.encoding, self.encoding_source = encoding, "named"
        self.on_section: list[Callable[[int, Place], object]] = []
        self.replaced_bytes = self.n_losses = 0
        self.losses: list[InputError] = []
        self._document, self._ends = document, ends
        self._source = source = open_source(self.lose)
        self._before = before.pieces() if before is not None else iter(())
        self._n_before = before.byte_end if before is not None else 0
        self._n_bytes = self._n_read = 0  # of the text so far; and of the source, undecoded
        self._decoder: IncrementalDecoder | None = None
        self._skip = mark.skip if isinstance(mark, Mark) and self._is_found else 0
        self._mark = mark if self._is_found else None
        self._resumed_in = source.identity if isinstance(source, FollowedFile) else None
        self._marks: deque[tuple[int, Mark]] = deque()  # the bytes where what was read at one time begins
        self._lines = Lines()
        self._seen_at = (document.clock(), self._n_before)  # when a snapshot was due, and where
        self._paused = self._paused_for_snapshot = self._n_before  # the bytes where it did
        self._is_said = False

    @property
    def _is_found(self) -> bool:
        return not isinstance(self._source, FollowedFile) or self._source.is_found

    @property
    def raw_bytes_read(self) -> int:
        return self._n_before + self._n_read

    @property
    def raw_size(self) -> int:
        """All that is written by now, at least."""
        return self.raw_bytes_read + self._source.waiting()

    def lose(self, what: str) -> None:
        """A gap: told at once, and counted."""
        loss = InputError(f"following '{self._document.name}': {what}")
        log.warning("%s", loss)
        self.n_losses += 1
        if self.n_losses <= LOSSES:
            self.losses.append(loss)

    def say_replaced(self) -> None:
        """Say once how many bytes could not be decoded so far."""
        if self.replaced_bytes and not self._is_said:
            self._is_said = True
            log.warning(
                "'%s': %d bytes could not be decoded and became U+FFFD", self._document.name, self.replaced_bytes
            )

    def place(self, byte: int) -> Place:
        """As `Text.place`."""
        return self._lines.at(byte)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> FollowedText:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the text ----

    def __next__(self) -> bytes:
        while (piece := self.step()) is None:
            if self._ends:
                raise StopIteration
            self._wait()
        return piece

    def step(self) -> bytes | None:
        """The next piece; an empty one where nothing has come since, once, and where a snapshot is due; then None.
        StopIteration at the end of a pipe. Never waits."""
        piece = next(self._before, None)
        while piece is None:
            if self._is_due() and self._n_bytes > self._paused_for_snapshot:
                self._paused_for_snapshot = self._n_bytes
                return b""
            if isinstance(self._source, FollowedPipe) and self.stop is not None and self.stop.signal_number is not None:
                self._source.end()
            data = self._source.read()
            if data:
                self._n_read += len(data)
                piece = self._decoded(data) or None
            elif self._source.is_over:
                raise StopIteration
            elif self._n_bytes > self._paused:
                self._paused = self._n_bytes
                return b""
            else:
                return None
        self._n_bytes += len(piece)
        self._lines.push(piece)
        return piece

    def take_due(self) -> bool:
        """Whether a snapshot of what is new is due; the next one is, after so many seconds more."""
        is_due = self._is_due()
        if is_due:
            self._seen_at = self._document.clock(), self._n_bytes
        return is_due

    def _is_due(self) -> bool:
        every, (at, byte) = self._document.snapshot_seconds, self._seen_at
        return every is not None and self._n_bytes > byte and self._document.clock() - at >= every

    def _wait(self) -> None:
        seconds, every = POLL_S, self._document.snapshot_seconds
        if every is not None and self._n_bytes > self._paused_for_snapshot:
            seconds = min(seconds, max(self._seen_at[0] + every - self._document.clock(), 0))
        if self._document.wait is not None:
            self._document.wait(seconds)
        elif isinstance(self._source, FollowedPipe):
            self._source.wait(seconds)
        else:
            time.sleep(seconds)

    def _decoded(self, data: bytes) -> bytes:
        """The text of what was read, but for what was in it before."""
        if self._decoder is None:
            self._decoder = self._begun(data)
        held, state = self._decoder.getstate()
        decoder_state = state if isinstance(state, int) else 0
        text = self._decoder.decode(data)
        if self._is_at_start:
            text = text.removeprefix("\ufeff")
        piece, n_replaced = utf8(text)
        self.replaced_bytes += n_replaced
        if isinstance(self._source, FollowedFile):
            if self._source.identity != self._resumed_in:
                self._skip = 0
            self._note(data, held, decoder_state)
        skipped, self._skip = min(self._skip, len(piece)), max(0, self._skip - len(piece))
        return piece[skipped:]

    @property
    def _is_at_start(self) -> bool:
        """Whether what is decoded next is the beginning of the document."""
        return self._n_bytes == self._skip

    def _begun(self, data: bytes) -> IncrementalDecoder:
        """The decoder, in the state that the mark says."""
        if self._is_at_start:
            found = decided(data, self.encoding)
            if found is None:
                raise InputError(
                    f"following '{self._document.name}': expected text in {self.encoding}, found binary data; "
                    "pass --encoding if it is text"
                )
            self.encoding = found.name  # utf-16 is one of two
        decoder = incremental_decoder(self.encoding)
        if self._mark is not None:
            decoder.setstate((bytes.fromhex(self._mark.pending), self._mark.decoder))
        return decoder

    # ---- where it stands ----

    def _note(self, data: bytes, held: bytes, state: int) -> None:
        """Note where the bytes of a piece stand, together with those before it where they are few."""
        mark = self._source.mark
        assert isinstance(mark, Mark)
        byte = self._n_bytes - self._skip
        last = self._marks[-1][1] if self._marks else None
        same = last is not None and (last.device, last.inode) == (mark.device, mark.inode) and last.end <= mark.end
        if last is not None and same and mark.end - last.offset <= READ_BYTES:
            byte, begun = self._marks.pop()
        else:
            begun = replace(mark, offset=mark.end - len(data), pending=held.hex(), decoder=state)
        self._marks.append((byte, replace(mark, offset=begun.offset, pending=begun.pending, decoder=begun.decoder)))

    def mark(self, byte: int) -> dict[str, str | int]:
        """Where a byte of the text stands, that will not decrease: the end of what was read before it."""
        if isinstance(self._source, FollowedPipe):
            is_whole = self._source.mark.whole and byte == self._n_bytes
            held, state = self._decoder.getstate() if self._decoder is not None else (b"", 0)
            if not is_whole:
                return files.as_map(PipeMark(whole=0))
            return files.as_map(PipeMark(whole=1, pending=held.hex(), decoder=state if isinstance(state, int) else 0))
        while len(self._marks) > 1 and self._marks[1][0] < byte:
            self._marks.popleft()
        if not self._marks:
            assert isinstance(self._mark, Mark), "nothing was read of the files"
            return files.as_map(self._mark)
        start, mark = self._marks[0]
        return files.as_map(replace(mark, skip=byte - start))


class _Following(Beginning):
    """Where a reading of a followed document begins: in the text that is kept of it, and in the files behind that."""

    pauses = True

    def __init__(
        self, document: Followed, model: Model, store: Store | None, reading: Reading, shared: Shared | None = None
    ) -> None:
        super().__init__(document, model, store, reading, shared)
        self.followed = document
        self._before: KeptText | None = None
        self._mark: Mark | PipeMark | None = None
        self._first: files.Listed | None = None
        self._text: FollowedText | None = None
        head = self.plan.head
        if head is not None and self.plan.limit < head.tokens:
            raise UsageError(
                f"following '{document.name}': expected --max-tokens beyond token {head.tokens}, where it stands, "
                f"found {self.plan.limit}"
            )
        if self.plan.snapshot_at:  # what is read up to a pause has been hashed, and edges before that would be too late
            raise UsageError(
                f"following '{document.name}': expected a document without snapshots at edges, found one with them at "
                f"'{self.plan.snapshot_at}'; follow it without --snapshot-at, or under another --name"
            )

    def check_way(self) -> None:
        """A document may be followed that was read without."""

    def by_bytes(self) -> tuple[Snapshot | None, FollowedText | None]:
        """The newest snapshot on the grid that holds for the kept text and what is there of the files."""
        head = self.plan.head
        if head is None:
            return None, None
        assert self.store is not None
        values = self.store.mark(head.document, self.model.fingerprint)
        on_grid = (s for s in self.lineage() if s.tokens % self.plan.chunk == 0 and s.decided_byte >= 0)
        edges = (s for s in on_grid if s.is_kept_exactly)
        newest = next(edges, None)
        if values is None:
            self._first = self._found(newest or head)
            return newest, None
        self._before, self._mark = self.store.text(head), self._known(values)
        if self._before is None:
            raise SnapshotError(
                f"following '{head.document}': expected its text, which is read again to go on, found none; "
                "pass --restart to read the files that are there"
            )
        self.known_to = head.bytes
        if head.tokens == self.plan.limit:
            return head, self._opened(ends=True)
        if newest is None or newest.decided_byte <= head.bytes:
            return newest, None
        if not self._is_pipe:
            with self._opened(ends=True, is_told=False) as text:
                if HashedText(text).begins_as(newest):
                    return newest, None
        return next((s for s in edges if s.decided_byte <= head.bytes), None), None

    def by_tokens(
        self, base: Snapshot | None, chunks: Iterator[ChainedChunk], keeping: Keeping | None = None
    ) -> tuple[Snapshot | None, list[ChainedChunk]]:
        """No other: to look for one would be to wait for text."""
        return base, []

    def text(self) -> FollowedText:
        self._text = self._opened()
        return self._text

    def guarded(self, items: Iterator[ChainedChunk], stop: StopRequest) -> Iterator[ChainedChunk]:
        """What a pipe gave is read to its end: it gives nothing twice. Where the text waits, the tokens since the last
        edge are read where a snapshot is due."""
        text = self._text
        assert text is not None
        if self._is_pipe:
            text.stop = stop
        else:
            items = stop.guard(items)
        return (item for item in items if not item.chunk.is_paused or text.take_due())

    def mark(self, byte: int) -> Mapping[str, str | int] | None:
        assert self._text is not None
        return self._text.mark(byte)

    @functools.cached_property
    def _is_pipe(self) -> bool:
        return self.followed.is_pipe

    def _known(self, values: Mapping[str, str | int]) -> Mark | PipeMark:
        mark = _known(values, self.document.name)
        if isinstance(mark, PipeMark) != self._is_pipe:
            was, now = ("a pipe", "a file") if self._is_pipe is False else ("a file", "a pipe")
            raise UsageError(
                f"following '{self.document.name}': it was followed through {was}, found {now}; pass --restart to "
                "read that from its start, or another --name"
            )
        return mark

    def _opened(self, *, first: files.Listed | None = None, ends: bool = False, is_told: bool = True) -> FollowedText:
        document, first = self.followed, first or self._first

        def open_source(on_gap: Callable[[str], object]) -> FollowedFile | FollowedPipe:
            told = on_gap if is_told else (lambda _: None)
            if self._is_pipe:
                pipe = document.open_pipe()
                if isinstance(self._mark, PipeMark) and not self._mark.whole:
                    told("the program that read it was ended; what the pipe gave behind its last snapshot is missing")
                return pipe
            assert document.path is not None
            return FollowedFile(document.path, told, self._mark if isinstance(self._mark, Mark) else None, first)

        encoding = self.plan.encoding or document.encoding or ENCODING
        return FollowedText(document, encoding, open_source, self._before, self._mark, ends=ends)

    def _found(self, snapshot: Snapshot) -> files.Listed | None:
        """The file with whose start a document begins that was read without being followed."""
        document = self.followed
        if not self._is_pipe:
            assert document.path is not None
            for first in reversed(files.family(document.path)):
                with self._opened(first=first, ends=True, is_told=False) as text:
                    if HashedText(text).begins_as(snapshot):
                        return first
        raise UsageError(
            f"following '{document.name}': it stands at token {snapshot.tokens}, and it is not known where in the "
            "files that is: none of them begins as it does; pass --restart to read those that are there, or another "
            "--name"
        )


def _known(values: Mapping[str, str | int], document: str) -> Mark | PipeMark:
    try:
        return files.from_map(values)
    except ValueError as error:
        raise SnapshotError(
            f"following '{document}': {error}; pass --restart to read the files that are there"
        ) from error


def follow(
    source: str | os.PathLike[str] | Followed,
    reading: Reading | None = None,
    *,
    model: Model,
    store: Store,
    name: str | None = None,
    snapshot_seconds: float | None = None,
    on_progress: Callable[[ReadingProgress], None] | None = None,
    stop: StopRequest | None = None,
    **options: Any,
) -> ReadingReport:
    """Read a file, its rotated files first, and what is written to it from then on; or what comes through a pipe.

    It ends at the end of a pipe, after `max_tokens`, and where `stop` says so.

    snapshot_seconds  keep a snapshot of what is new after so many seconds, besides those of the grid
    options           fields of `Reading`, in the place of those of `reading`
    raises            as `ingest`; StoppedError once what is whole is kept
    """
    reading = updated(reading or Reading(), options, "reading")
    if not reading.keep_text:
        raise UsageError("following a document: expected its text to be kept, as rotated files go away; omit --no-text")
    if not isinstance(source, Followed):
        path = os.fsdecode(source)
        source = Followed(path, name=name, encoding=reading.encoding, snapshot_seconds=snapshot_seconds)
    stop = stop or StopRequest()
    lag = Lag(source.name, source.clock)

    def note(progress: ReadingProgress) -> None:
        lag.note(progress.bytes, progress.raw_size or 0)
        if on_progress is not None:
            on_progress(progress)

    with Readings(model, store, reading, stop) as readings:
        report = readings.read(source, note, _Following).report()
    if stop.signal_number is not None:  # a pipe is ended, and what it gave kept
        raise StoppedError(
            f"following '{source.name}': interrupted; all that came of it is kept, and the same command goes on from "
            "there",
            stop.signal_number,
        )
    return report


class Lag:
    """How far a reading is behind what is written, and for how long it has been; tells where that is worth it."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._seen: deque[tuple[int, float]] = deque()  # sizes, and when each was first seen
        self._told_s = 0.0

    def note(self, read: int, written: int) -> tuple[int, float]:
        """Bytes behind, and the seconds since the next of them was seen to be there."""
        now = self._clock()
        if not self._seen or (written > self._seen[-1][0] and now - self._seen[-1][1] >= POLL_S):
            self._seen.append((written, now))
        while len(self._seen) > 1 and self._seen[0][0] <= read:
            self._seen.popleft()
        if len(self._seen) > SEEN_LIMIT:
            self._seen = deque([*self._seen][::2])
        behind = max(written - read, 0)
        seconds = now - self._seen[0][1] if behind else 0.0
        if seconds >= max(LAG_S, 2 * self._told_s):
            log.warning("'%s': %s bytes behind what is written, for %.0f s", self._name, f"{behind:,}", seconds)
            self._told_s = seconds
        elif self._told_s and seconds < POLL_S:
            log.warning("'%s': caught up with what is written", self._name)
            self._told_s = 0.0
        return behind, seconds
