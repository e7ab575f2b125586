"""Followed documents: the states are those of the whole text read in one go, whatever ended a reading, and whenever."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_snapshots import in_child
from kills import killed
from rotations import WAYS, Log

from rwkv_stream.errors import StoppedError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.model import Model
from rwkv_stream.reading.follow import Followed, Lag, follow
from rwkv_stream.reading.ingest import ReadingReport, ingest
from rwkv_stream.store import Snapshot, Store

T, EVERY = 32, 128


class Clock:
    """Time that passes only while somebody waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """A model, a store, a log, and what happens to it whenever the reading waits."""

    def __init__(self, model: Model, folder: Path, way: str = "renamed") -> None:
        self.model, self.folder = model, folder
        self.store = Store(folder / "a.store", create=True)
        (folder / "logs").mkdir()
        self.log = Log(folder / "logs", way)
        self.clock = Clock()

    def follow(
        self, *events: Callable[[], object], source: str | None = None, every_s: float | None = None, **options: object
    ) -> ReadingReport | None:
        """Follow the log; each event happens when all before it was read. Then it is stopped: None."""
        stop = StopRequest()
        coming = iter(events)

        def wait(seconds: float) -> None:
            self.clock.now += seconds
            event = next(coming, None)
            if event is None:
                stop(signal.SIGTERM, None)
            else:
                event()

        path = source or str(self.log.path)
        document = Followed(path, name="app", snapshot_seconds=every_s, clock=self.clock, wait=wait)
        options = {"chunk": T, "snapshot_every": EVERY, **options}
        try:
            return follow(document, model=self.model, store=self.store, stop=stop, **options)
        except StoppedError as error:
            assert error.signal_number == signal.SIGTERM
            return None

    def head(self) -> Snapshot:
        head = self.store.head("app", self.model.fingerprint)
        assert head is not None
        return head

    def text(self, snapshot: Snapshot | None = None) -> bytes:
        kept = self.store.text(snapshot or self.head())
        assert kept is not None
        return b"".join(kept.pieces())

    def whole(self, text: bytes, **options: object) -> dict[int, Snapshot]:
        """The snapshots of a text read in one go, by tokens."""
        store = Store(self.folder / f"whole-{len(list(self.folder.iterdir()))}", create=True)
        path = self.folder / "whole.txt"
        path.write_bytes(text)
        options = {"chunk": T, "snapshot_every": EVERY, "encoding": "utf-8", **options}
        report = ingest(str(path), name="app", model=self.model, store=store, **options)
        return {s.tokens: s for s in store.get(report.snapshot).lineage()}

    def check(self, text: bytes | None = None) -> None:
        """The head and the snapshots before it are those of the text read in one go, and so is what was kept of it."""
        text = self.log.written if text is None else text
        head = self.head()
        found = {s.tokens: s for s in head.lineage()}
        whole = self.whole(text, max_tokens=head.tokens)
        assert whole.keys() <= found.keys(), "a snapshot of the grid is missing"
        for tokens, other in whole.items():
            snapshot = found[tokens]
            assert snapshot.id == other.id
            assert snapshot.state().digest() == other.state().digest()
            assert (snapshot.bytes, snapshot.decided_byte, snapshot.text_digest, snapshot.anchor_byte) == (
                *(other.bytes, other.decided_byte, other.text_digest, other.anchor_byte),
            )
            assert snapshot.exact
        assert self.text() == text[: head.bytes]
        assert self.store.verify(read_data=True).damaged == []


@pytest.fixture(params=["bytes", "bpe"])
def model(request: pytest.FixtureRequest) -> Model:
    found = request.getfixturevalue(f"{request.param}_model")
    assert isinstance(found, Model)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_log_is_read_through_its_rotations(way: str, bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path, way)
    write, rotate = desk.log.write, desk.log.rotate
    desk.log.write(3)
    desk.follow(lambda: write(2), rotate, lambda: write(3), lambda: (write(1), rotate(), write(1)))
    desk.check()
    n = len(desk.log.written)
    assert desk.head().tokens == n // T * T
    write(2), rotate(), write(2), rotate(), write(2)
    desk.follow(lambda: write(1))
    desk.check()
    assert desk.head().tokens == len(desk.log.written) // T * T


def test_any_schedule_of_kills(bytes_model: Model, tmp_path: Path) -> None:
    """Readings that die at any event, with whatever was published by then, over a log that goes on meanwhile."""

    class DeadError(BaseException):
        pass

    def die() -> None:
        raise DeadError

    rng = random.Random(3)
    for way in WAYS:
        folder = tmp_path / way
        folder.mkdir()
        desk = Desk(bytes_model, folder, way)

        def write(log: Log = desk.log) -> None:
            log.write(rng.randrange(4))

        for _ in range(6):
            events = [rng.choice([write, desk.log.rotate, die]) for _ in range(4)]
            with pytest.raises(DeadError):
                desk.follow(*events, die, every_s=rng.choice([None, 1]))
            desk.log.write(rng.randrange(3))
        desk.log.write(3)
        desk.follow()
        desk.check()
        assert desk.head().tokens == len(desk.log.written) // T * T


KILLED_AT = [
    *("ingest.chunk:9", "ingest.publish:2", "ingest.published:2", "text.renamed:2", "object.synced:2"),
    *("record.written:2", "record.published:2", "head.written:2", "head.renamed:2", "ingest.chunk:3"),
]


@pytest.mark.parametrize("way", ["renamed, packed at once", "copied and cut"])
def test_killed_at_failpoints_with_a_rotation_after_each(
    way: str, bytes_model: Model, tmp_path: Path, one_thread: None
) -> None:
    desk = Desk(bytes_model, tmp_path, way)

    def live() -> None:
        desk.store = Store(desk.store.path)
        desk.follow(lambda: None, lambda: None, every_s=0.5)

    for failpoint in KILLED_AT:
        desk.log.write(8)
        assert killed(in_child(live, **{FAILPOINT_VARIABLE: failpoint})), failpoint
        desk.log.rotate()
    desk.store = Store(desk.store.path)
    desk.log.write(1)
    desk.follow()
    desk.check()
    assert desk.head().tokens == len(desk.log.written) // T * T


def test_a_timed_snapshot_is_a_leaf_of_what_is_fixed(model: Model, tmp_path: Path) -> None:
    desk = Desk(model, tmp_path)
    seen: list[Snapshot] = []
    desk.log.write(2)

    def look() -> None:
        desk.store = Store(desk.store.path)
        head = desk.store.head("app", model.fingerprint)
        if head is not None:
            seen.append(head)

    desk.follow(*[lambda: (look(), desk.log.write(1))] * 6, look, every_s=1)
    leaves = [s for s in seen if s.tokens % T]
    assert leaves
    for leaf in leaves:
        assert leaf.leaf
        assert leaf.decided_byte > 0, "nothing is fixed by time"
        assert leaf.parent is None or desk.store.get(leaf.parent).tokens % EVERY == 0
        assert leaf.id == desk.whole(desk.log.written, max_tokens=leaf.tokens)[leaf.tokens].id
    desk.check()
    desk.follow(lambda: desk.log.write(4))
    assert all(s.tokens % T == 0 for s in desk.head().ancestors())
    desk.check()


def test_nothing_new_makes_no_snapshot(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.log.write(3)
    desk.follow(*[lambda: None] * 5, every_s=1)
    n = len(list(desk.store.list()))
    desk.follow(*[lambda: None] * 5, every_s=1)
    assert len(list(desk.store.list())) == n


def test_a_half_line_and_a_half_character_wait(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    append = desk.log.append
    desk.follow(lambda: append(b"one line\nand half a l\xc3"), lambda: append(b"\xa9ne\n" + b"x" * 40), every_s=0.5)
    assert desk.text() == "one line\nand half a léne\n".encode()[: desk.head().bytes]
    desk.follow(lambda: append(b"\n"))
    desk.check()


RAW = {
    "utf-8": b"\xef\xbb\xbfone \xff line \xc3\xa9\n" * 20,
    "cp1252": b"one line \xe9 \x93\n" * 20,
    "utf-16": ("one line é\n" * 20).encode("utf-16"),
    "shift_jis": "一行目のログ\n".encode("shift_jis") * 20,
}


@pytest.mark.parametrize("encoding", RAW)
def test_undecodable_bytes_and_other_encodings(encoding: str, bytes_model: Model, tmp_path: Path) -> None:
    desk, raw = Desk(bytes_model, tmp_path), RAW[encoding]
    size = len(raw) // 3
    desk.log.append(raw[:size])
    desk.follow(lambda: desk.log.append(raw[size : 2 * size]), encoding=encoding)
    desk.log.append(raw[2 * size :])
    desk.follow(encoding=encoding)
    whole = desk.whole(raw, encoding=encoding, max_tokens=desk.head().tokens)[desk.head().tokens]
    assert (desk.head().id, desk.head().encoding) == (whole.id, whole.encoding)
    n_bytes = len(raw.decode(encoding, errors="replace").encode())
    assert n_bytes - desk.head().bytes < T + 30


def test_what_is_missing_is_told_and_counted(
    bytes_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.log.write(4)
    desk.follow()
    before = desk.text()
    desk.log.path.unlink()
    desk.log.path.write_bytes(b"another file\n" * 30)
    with caplog.at_level(logging.WARNING):
        report = desk.follow(max_tokens=len(before) // EVERY * EVERY + 200)
    assert report is not None
    assert report.n_losses == 1
    assert "neither it nor a copy of it is there any more" in report.losses[0]
    assert any("neither it nor a copy" in record.message for record in caplog.records)
    desk.check(before + b"another file\n" * 30)


def test_a_gap_where_a_token_was_not_fixed_yet(bpe_model: Model, tmp_path: Path) -> None:
    """What fixed the last tokens of a snapshot is gone, and something else follows: it is read again from before."""
    desk = Desk(bpe_model, tmp_path)
    desk.log.write(40)
    desk.follow()
    grid = desk.head()
    assert grid.decided_byte > grid.bytes
    before = desk.text()
    desk.log.path.unlink()
    desk.log.path.write_bytes(b"another file\n" * 100)
    desk.follow()
    desk.check(before + b"another file\n" * 100)
    assert desk.head().bytes > grid.bytes


def test_a_document_that_was_read_before_is_followed(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.log.write(4)
    desk.log.rotate()
    first = len(desk.log.written)
    desk.log.write(5)
    ingest(str(desk.log.path), name="app", model=bytes_model, store=desk.store, chunk=T, snapshot_every=EVERY)
    desk.log.write(3)
    desk.follow()
    desk.check(desk.log.written[first:])
    with pytest.raises(UsageError, match="--follow"):
        ingest(str(desk.log.path), name="app", model=bytes_model, store=desk.store, chunk=T, snapshot_every=EVERY)


def test_one_that_begins_like_no_file_is_not_followed(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    path = tmp_path / "other.txt"
    path.write_bytes(b"another text " * 30)
    ingest(str(path), name="app", model=bytes_model, store=desk.store, chunk=T, snapshot_every=EVERY)
    desk.log.write(5)
    with pytest.raises(UsageError, match="none of them begins as it does"):
        desk.follow()
    desk.follow(restart=True)
    desk.check()


def test_the_newest_snapshot_is_removed(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.log.write(20)
    desk.follow()
    desk.store.rm(desk.head().id)
    assert desk.store.mark("app", bytes_model.fingerprint) is None
    desk.log.write(1)
    desk.follow()
    desk.check()


def test_max_tokens(bytes_model: Model, tmp_path: Path) -> None:
    desk = Desk(bytes_model, tmp_path)
    desk.log.write(10)
    report = desk.follow(max_tokens=100)
    assert report is not None and report.tokens == 100
    again = desk.follow(max_tokens=100)
    assert again is not None and (again.snapshot, again.snapshots_written) == (report.snapshot, 0)
    with pytest.raises(UsageError, match="beyond token 100"):
        desk.follow(max_tokens=50)
    desk.follow()
    desk.check()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "a pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # so that it has no end
    yield path, descriptor
    os.close(descriptor)


def test_a_pipe_is_kept_to_the_last_byte(
    bytes_model: Model, tmp_path: Path, fifo: tuple[Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(bytes_model, tmp_path)
    path, pipe = fifo
    lines = b"".join(b"line %d of a pipe \xc3\xa9\n" % i for i in range(40))

    def write(start: int, end: int) -> Callable[[], object]:
        return lambda: os.write(pipe, lines[start:end])

    desk.follow(write(0, 100), write(100, 300), source=str(path))
    cut = lines.index(b"\xa9", 320)
    assert desk.text() == lines[:300]
    desk.follow(write(300, cut), source=str(path))
    assert desk.text() == lines[: cut - 1], "a half character waits"
    with caplog.at_level(logging.WARNING):
        desk.follow(write(cut, len(lines)), source=str(path))
    assert desk.text() == lines
    assert not any("missing" in record.message for record in caplog.records)
    desk.check(lines)


def test_a_pipe_gives_nothing_twice(
    bytes_model: Model, tmp_path: Path, fifo: tuple[Path, int], caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(bytes_model, tmp_path)
    path, pipe = fifo

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.follow(lambda: os.write(pipe, b"some lines\n" * 15), die, source=str(path))
    assert desk.head().tokens == EVERY
    with caplog.at_level(logging.WARNING):
        desk.follow(lambda: os.write(pipe, b"more\n" * 10), source=str(path))
    assert any("behind its last snapshot is missing" in record.message for record in caplog.records)
    with pytest.raises(UsageError, match="found a file"):
        desk.follow()


def test_lag(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    lag = Lag("app", clock)
    assert lag.note(0, 100) == (100, 0.0)
    clock.now = 5
    assert lag.note(100, 100) == (0, 0.0)
    assert lag.note(100, 1000) == (900, 0.0)
    clock.now = 17
    assert lag.note(500, 2000) == (1500, 12.0)
    assert [r.message for r in caplog.records] == ["'app': 1,500 bytes behind what is written, for 12 s"]
    clock.now = 18
    assert lag.note(1500, 2000) == (500, 1.0)
    assert lag.note(2000, 2000) == (0, 0.0)
    assert caplog.records[-1].message == "'app': caught up with what is written"


def test_what_cannot_be_followed(bytes_model: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--name"):
        Followed("-")
    for source in ("https://example.org/app.log", str(tmp_path)):
        with pytest.raises(UsageError, match="expected a file, a pipe or -"):
            Followed(source)
    with pytest.raises(UsageError, match="--no-text"):
        Desk(bytes_model, tmp_path).follow(keep_text=False)
