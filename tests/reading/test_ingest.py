"""Readings: what is read again, what is not, and that the result is that of a fresh reading to the bit."""

from __future__ import annotations

import errno
import io
import math
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_stream.errors import (
    InputError,
    MismatchError,
    NotFoundError,
    SnapshotError,
    StoppedError,
    StoreLockedError,
    UsageError,
)
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ReadingProgress, ReadingReport, Readings, estimate, ingest
from rwkv_stream.reading.reading import Reading
from rwkv_stream.store import NewSnapshot, Snapshot, Store, recode
from rwkv_stream.text import readers

T = 16
EVERY = 64
WORDS = [
    *("the", "keeper", "of", "light", "walked", "over", "an", "old", "stone", "bridge", "toward", "sea;", "while"),
    *("gulls", "cried", "“storm”,", "and", "1883", "ships", "é", "漢字"),
]


def prose(n_bytes: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    text = ""
    while len(text.encode()) < n_bytes:
        text += rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n"])
    return text.encode()[:n_bytes].decode(errors="ignore")


class Desk:
    """A model, a store and a file to write texts into."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.store = Store(folder / "a.store", create=True)

    def read(
        self, text: str | bytes, name: str = "book.txt", store: Store | None = None, **options: object
    ) -> ReadingReport:
        path = self.folder / "text"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        options = {"chunk": T, "snapshot_every": EVERY, **options}
        return ingest(str(path), name=name, model=self.model, store=store or self.store, **options)

    def fresh(self, text: str | bytes, **options: object) -> Snapshot:
        """The last snapshot of an uninterrupted reading in a store of its own."""
        count = sum(1 for _ in self.folder.glob("fresh-*"))
        store = Store(self.folder / f"fresh-{count}", create=True)
        report = self.read(text, name="other name", store=store, **options)
        return store.get(report.snapshot)


@pytest.fixture(params=["bytes", "bpe"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(request.getfixturevalue(f"{request.param}_model"), tmp_path)


def same_state(a: Snapshot, b: Snapshot) -> bool:
    if not (a.keeps_state and b.keeps_state):  # made when asked for: test_states.py
        return a.state_digest == b.state_digest
    left, right = a.state(), b.state()
    return (
        list(left) == list(right)
        and all(torch.equal(left[n], right[n]) for n in left)
        and torch.equal(a.last_hidden(), b.last_hidden())
    )


def lineage(store: Store, ref: str) -> list[Snapshot]:
    newest = store.get(ref)
    return [newest, *store.ancestors(newest)]


def test_a_clock_that_stands_still(tmp_path: Path, bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 5.0)
    path = tmp_path / "a.txt"
    path.write_text("some text")
    store = Store(tmp_path / "store", create=True)
    report = ingest(path, model=bytes_model, store=store)
    assert report.elapsed_s == 0 and report.tokens == 9
    assert estimate(path, model=bytes_model, store=None).elapsed_s > 0


def test_what_is_no_path_and_what_is_only_a_name(tmp_path: Path, bytes_model: Model) -> None:
    from rwkv_stream.answers.ask import ask
    from rwkv_stream.tables.score import score

    store = Store(tmp_path / "store", create=True)
    wrong: Any = 5
    with pytest.raises(UsageError, match="reading 5: expected a path or a URL, found int"):
        ingest(wrong, model=bytes_model, store=store)
    wrong = "store"
    with pytest.raises(UsageError, match="expected a Store, found a path"):
        ingest(tmp_path / "a.txt", model=bytes_model, store=wrong)
    for call in (
        lambda: ask("Who?", snapshot=wrong, model=bytes_model),
        lambda: score(tmp_path / "a.txt", snapshot=wrong, model=bytes_model),
    ):
        with pytest.raises(UsageError, match=r"expected what `store.get\(REF\)` gives"):
            call()


def test_snapshots_lie_on_the_grid_and_at_the_end(desk: Desk) -> None:
    report = desk.read(prose(1000))
    tokens = [s.tokens for s in lineage(desk.store, "book.txt")]
    assert tokens[0] == report.tokens == len(desk.model.tokenizer.encode(prose(1000)))
    assert tokens[1:] == list(range(tokens[0] // EVERY * EVERY if tokens[0] % EVERY else tokens[0] - EVERY, 0, -EVERY))
    assert report.snapshots_written == len(tokens)
    assert report.exact
    assert desk.store.verify().damaged == []


def test_the_state_is_that_of_the_same_calls_made_by_hand(desk: Desk) -> None:
    text = prose(700)
    report = desk.read(text)
    ids = torch.tensor([desk.model.tokenizer.encode(text)])
    _, state = desk.model.start()
    for start in range(0, ids.shape[1], T):
        hidden, state = desk.model.forward(ids[:, start : start + T], state, logits="none")
    snapshot = desk.store.get(report.snapshot)
    assert all(torch.equal(state[name], snapshot.state()[name]) for name in state)
    assert torch.equal(hidden[0, -1], snapshot.last_hidden())


def test_ids_do_not_depend_on_name_store_interval_or_piece_size(desk: Desk) -> None:
    text = prose(1500)
    report = desk.read(text)
    other = desk.fresh(text, snapshot_every=3 * T)
    assert other.id == report.snapshot
    common = {s.tokens: s.id for s in lineage(desk.store, "book.txt")}
    for snapshot in lineage(Store(desk.folder / "fresh-0"), "other name"):
        assert common.get(snapshot.tokens, snapshot.id) == snapshot.id


def test_a_finished_text_does_nothing(desk: Desk) -> None:
    first = desk.read(prose(1000))
    again = desk.read(prose(1000))
    assert (again.snapshot, again.resumed_from_token, again.snapshots_written) == (first.snapshot, first.tokens, 0)


@pytest.mark.parametrize("n_tokens", [EVERY, 2 * T, EVERY - 1, EVERY + 1])
def test_a_text_that_ends_on_or_beside_a_chunk_edge(desk: Desk, n_tokens: int) -> None:
    encode = desk.model.tokenizer.encode
    beginnings = ((prose(2000, seed), n) for seed in range(20) for n in range(1, 400))
    text, end = next((text, n) for text, n in beginnings if len(encode(text[:n])) == n_tokens)
    cut = text[:end]
    first = desk.read(cut)
    assert first.tokens == n_tokens
    assert desk.read(cut).snapshots_written == 0
    grown = desk.read(text)
    assert grown.snapshot == desk.fresh(text).id
    assert grown.resumed_from_token == expected_resume(desk, cut, text)


def expected_resume(desk: Desk, before: str | bytes, after: str | bytes) -> int:
    """The largest snapshot edge (or the whole) whose tokens both texts begin with."""
    old, new = (
        desk.model.tokenizer.encode(t if isinstance(t, str) else t.decode(errors="replace")) for t in (before, after)
    )
    if old == new:
        return len(old)
    edges = set(range(EVERY, len(old) + 1, EVERY)) | ({len(old)} if len(old) % T == 0 else set())
    return max((e for e in edges if e <= len(new) and old[:e] == new[:e]), default=0)


def check_change(desk: Desk, before: str, after: str) -> None:
    desk.read(before)
    report = desk.read(after)
    fresh = desk.fresh(after)
    assert report.snapshot == fresh.id
    assert same_state(desk.store.get("book.txt"), fresh)
    assert report.resumed_from_token == expected_resume(desk, before, after)
    assert desk.store.verify().damaged == []


def test_grown_text(desk: Desk) -> None:
    check_change(desk, prose(1500)[:1000], prose(1500))


def test_truncated_text(desk: Desk) -> None:
    check_change(desk, prose(1500), prose(1500)[:900])


def test_text_replaced_altogether(desk: Desk) -> None:
    check_change(desk, prose(900), prose(900, seed=5))


@pytest.mark.parametrize("offset", [-40, -3, -1, 0, 1, 2, 5, 30, 100, 127, 128, 129, 160])
def test_an_edit_around_a_chunk_edge(desk: Desk, offset: int) -> None:
    text = prose(1200).encode()
    desk.read(text)
    edge = desk.store.get(f"book.txt@{3 * EVERY}")
    at = edge.bytes + offset
    edited = (text[:at] + b"Zq" + text[at:]).decode(errors="ignore")
    check_change(desk, text.decode(), edited)


def test_a_word_that_grows_across_the_end(desk: Desk) -> None:
    check_change(desk, prose(800) + " light", prose(800) + " lighthouse and more")


def test_a_text_of_another_name_with_the_same_beginning(desk: Desk) -> None:
    text = prose(3000)
    desk.read(text)
    other = text[:1500] + prose(800, seed=9)
    report = desk.read(other, name="second.txt")
    assert report.snapshot == desk.fresh(other).id
    assert report.resumed_from_token == expected_resume(desk, text, other) > 0
    assert desk.store.get("book.txt").document == "book.txt"


def test_a_file_that_ends_inside_a_character(desk: Desk) -> None:
    whole = ("漢字 é " * 60).encode()
    desk.read(whole[:-3])
    report = desk.read(whole)
    assert report.snapshot == desk.fresh(whole).id
    assert report.replaced_bytes == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_equals_a_fresh_reading(
    bpe_model: Model, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    desk = Desk(bpe_model, tmp_path_factory.mktemp("edit"))
    text = prose(data.draw(st.integers(1, 1800)), seed=data.draw(st.integers(0, 3)))
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 200)))
    middle = data.draw(st.sampled_from(["", "x", " ", "\n\n", "light", "漢", prose(150, seed=4)]))
    after = text[:start] + middle + text[end:]
    if after:
        check_change(desk, text, after)


def test_other_numerics_are_told_and_marked(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    text = prose(1500)
    desk.read(text, max_tokens=2 * EVERY)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        report = desk.read(text)
    finally:
        torch.set_num_threads(threads)
    assert not report.exact
    assert report.resumed_from_token == 2 * EVERY
    assert "numerics" in caplog.text
    assert not desk.store.get("book.txt").exact
    assert desk.store.get(f"book.txt@{EVERY}").exact
    assert not desk.read(text + prose(300)).exact, "what follows an inexact snapshot is inexact"


def test_chunk_is_kept_for_ever(desk: Desk) -> None:
    desk.read(prose(500))
    with pytest.raises(UsageError, match=f"chunks of {T} tokens"):
        desk.read(prose(600), chunk=2 * T)
    assert ingest(
        str(desk.folder / "text"), name="book.txt", model=desk.model, store=desk.store, snapshot_every=EVERY
    ).tokens
    assert desk.store.get("book.txt").chunk == T
    desk.read(prose(600), chunk=2 * T, restart=True)
    assert desk.store.get("book.txt").chunk == 2 * T


def test_snapshot_every_must_be_on_the_grid(desk: Desk) -> None:
    with pytest.raises(UsageError, match="multiple of the chunk"):
        desk.read(prose(100), snapshot_every=T + 1)


def test_restart_reads_all_again(desk: Desk) -> None:
    first = desk.read(prose(900))
    seen: list[ReadingProgress] = []
    again = desk.read(prose(900), restart=True, on_progress=seen.append)
    assert again.resumed_from_token == 0
    assert seen[-1].tokens == first.tokens
    assert again.snapshot == first.snapshot


def test_max_tokens_leaves_a_leaf_that_is_not_continued(desk: Desk) -> None:
    text = prose(1500)
    part = desk.read(text, max_tokens=EVERY + 5)
    assert part.tokens == EVERY + 5
    assert desk.store.get("book.txt").leaf
    whole = desk.read(text)
    assert whole.resumed_from_token == EVERY
    assert whole.snapshot == desk.fresh(text).id


def test_from_snapshot_starts_a_new_document(desk: Desk) -> None:
    desk.read(prose(500))
    second = prose(400, seed=3)
    report = desk.read(second, name="second", from_snapshot="book.txt")
    ids = torch.tensor([desk.model.tokenizer.encode(second)])
    state = desk.store.get("book.txt").state()
    for start in range(0, ids.shape[1], T):
        _, state = desk.model.forward(ids[:, start : start + T], state, logits="none")
    snapshot = desk.store.get(report.snapshot)
    assert report.tokens == ids.shape[1]
    assert all(torch.equal(state[name], snapshot.state()[name]) for name in state)
    assert snapshot.id != desk.fresh(second).id
    assert desk.read(second, name="second", from_snapshot="book.txt").snapshots_written == 0


def test_a_reading_goes_on_from_exact_states_only(desk: Desk) -> None:
    text = prose(900)
    whole = desk.read(text)
    desk.store.recode("int8")
    assert "int8" in {desk.store.get(entry.id).codec for entry in desk.store.list()}
    grown = text + prose(300, seed=1)
    head = desk.store.get(whole.snapshot)
    exact = (one for one in (head, *head.ancestors()) if one.is_kept_exactly)
    last = next(one for one in exact if not one.leaf and one.decided_byte >= 0)
    assert desk.read(grown).resumed_from_token >= last.tokens > 0
    edited = text[:450] + "~" + text[451:]
    report = desk.read(edited)
    assert report.resumed_from_token == 0, "what stands before the edit is kept as int8"
    assert report.snapshot == desk.fresh(edited).id


def test_a_start_that_is_only_near_must_be_asked_for(desk: Desk) -> None:
    desk.read(prose(900))
    desk.store.recode("int8")
    near = next(one for one in desk.store.get("book.txt").ancestors() if not one.is_kept_exactly)
    second = prose(400, seed=3)
    with pytest.raises(UsageError, match=r"expected an exact state, found one kept as int8; pass --approx"):
        desk.read(second, name="second", from_snapshot=near.id)
    report = desk.read(second, name="second", from_snapshot=near.id, approximate=True)
    assert desk.store.get(report.snapshot).start_digest == near.state().digest() != near.state_digest
    assert desk.read(second, name="second").snapshots_written == 0


def test_what_a_reading_started_from_stays_exact(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.read(prose(900))
    *_, start = desk.store.get("book.txt").ancestors()
    second = prose(30, seed=3)
    desk.read(second, name="second", from_snapshot=start.id)
    desk.store.recode("int8")
    assert desk.store.get(start.id).is_kept_exactly
    monkeypatch.setattr(recode, "_starts", lambda index: set())  # as an import may bring it
    desk.store.recode("int8")
    with pytest.raises(
        MismatchError, match=r"expected the state that it was started from, found .* kept as int8 since"
    ):
        desk.read(second.replace("e", "o"), name="second")


def test_stdin_goes_on_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    text = prose(1500)

    def pipe(content: str) -> ReadingReport:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        return ingest("-", name="piped", model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY)

    pipe(text[:900])
    report = pipe(text)
    assert report.snapshot == desk.fresh(text).id
    assert report.resumed_from_token == expected_resume(desk, text[:900], text) > 0
    assert pipe(text).snapshots_written == 0


def test_an_interrupted_reading_keeps_whole_chunks(desk: Desk) -> None:
    text = prose(2000)
    stop = StopRequest()

    def interrupt(progress: ReadingProgress) -> None:
        if progress.tokens == EVERY + 2 * T:
            stop(signal.SIGTERM, None)

    with pytest.raises(StoppedError) as caught:
        desk.read(text, on_progress=interrupt, stop=stop)
    assert caught.value.exit_code == 143
    assert desk.store.get("book.txt").tokens == EVERY + 2 * T
    report = desk.read(text)
    assert report.resumed_from_token == EVERY + 2 * T
    assert report.snapshot == desk.fresh(text).id


def test_an_exception_in_the_middle_loses_nothing(desk: Desk) -> None:
    def fail(progress: ReadingProgress) -> None:
        if progress.tokens == EVERY + T:
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError):
        desk.read(prose(2000), on_progress=fail)
    assert desk.store.get("book.txt").tokens == EVERY
    assert desk.store.verify().damaged == []
    assert desk.read(prose(2000)).resumed_from_token == EVERY


# ---- beside the model ----


def test_a_slow_disk_slows_the_reading_and_piles_nothing_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a snapshot is being stored the model goes on, but not beyond the next one."""
    read, stored, ahead, threads = [0], [0], list[int](), set[threading.Thread]()
    put = Store.put

    def slow_put(store: Store, new: NewSnapshot, *args: Any, **options: Any) -> Snapshot:
        threads.add(threading.current_thread())
        time.sleep(0.05)
        ahead.append(read[0] - new.tokens)
        stored[0] += 1
        return put(store, new, *args, **options)

    monkeypatch.setattr(Store, "put", slow_put)
    report = desk.read(prose(2000), on_progress=lambda progress: read.__setitem__(0, progress.tokens))
    assert stored[0] == report.snapshots_written > 3
    assert max(ahead) > 0, "the model went on meanwhile"
    assert max(ahead) <= EVERY
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), SnapshotError("a parent is damaged")]
)
def test_an_error_of_the_writer_stops_the_reading_with_its_cause(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    put, read = Store.put, [0]

    def failing_put(store: Store, new: NewSnapshot, *args: Any, **options: Any) -> Snapshot:
        if new.tokens == 2 * EVERY:
            raise fault
        return put(store, new, *args, **options)

    def note(progress: ReadingProgress) -> None:
        read[0] = progress.tokens
        time.sleep(0.02)  # as a larger model would take

    monkeypatch.setattr(Store, "put", failing_put)
    with pytest.raises(type(fault)) as caught:
        desk.read(prose(3000), on_progress=note)
    assert caught.value is fault
    assert 2 * EVERY <= read[0] <= 2 * EVERY + 2 * T, "not only at the next snapshot"
    monkeypatch.undo()
    assert desk.store.get("book.txt").tokens == EVERY
    report = desk.read(prose(3000))
    assert (report.resumed_from_token, report.snapshot) == (EVERY, desk.fresh(prose(3000)).id)


def test_documents_read_together_are_as_if_read_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing gets to the disk the model goes on; a text that was read a moment ago is found all the same."""
    texts = [f"{i} {prose(30)}" for i in range(5)]
    texts += [texts[2], prose(3000), "", f"{texts[4]} and more"]
    paths = [desk.folder / f"{i}.txt" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    put, may_go_on = Store.put, threading.Event()

    def held_put(*args: Any, **options: Any) -> Snapshot:
        may_go_on.wait()
        return put(*args, **options)

    monkeypatch.setattr(Store, "put", held_put)
    with Readings(desk.model, desk.store, Reading(chunk=T, snapshot_every=EVERY)) as readings:
        begun = [readings.read(readers.document(str(path))) for path in paths[:5]]
        assert not any(one.is_done for one in begun)
        may_go_on.set()
        begun += [readings.read(readers.document(str(path))) for path in paths[5:7]]
        with pytest.raises(InputError, match="expected some text"):
            readings.read(readers.document(str(paths[7])))
        begun.append(readings.read(readers.document(str(paths[8]))))
        reports = [one.report() for one in begun]
    monkeypatch.undo()
    for report, text in zip(reports, [text for text in texts if text], strict=True):
        assert report.snapshot == desk.fresh(text).id
        assert desk.store.get(report.document).id == report.head == report.snapshot
    assert reports[5].shared_with == str(paths[2])
    assert reports[5].snapshots_written == 0
    assert desk.store.verify(read_data=True).damaged == []


def test_a_document_whose_snapshot_fails_stops_no_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put

    def failing_put(store: Store, new: NewSnapshot, *args: Any, **options: Any) -> Snapshot:
        if new.document.endswith("1.txt"):
            raise SnapshotError("a parent is damaged")
        return put(store, new, *args, **options)

    monkeypatch.setattr(Store, "put", failing_put)
    for i in range(3):
        (desk.folder / f"{i}.txt").write_text(f"{i} {prose(30)}")
    with Readings(desk.model, desk.store, Reading()) as readings:
        begun = [readings.read(readers.document(str(desk.folder / f"{i}.txt"))) for i in range(3)]
        with pytest.raises(SnapshotError, match="a parent is damaged"):
            begun[1].report()
        assert [begun[i].report().snapshots_written for i in (0, 2)] == [1, 1]
    assert len(list(desk.store.heads())) == 2


def test_surprise_is_sampled_on_the_way(desk: Desk) -> None:
    text = prose(3000)
    report = desk.read(text, chunk=64, snapshot_every=128, name="sampled.txt")
    ids = torch.tensor([desk.model.tokenizer.encode(text)])
    bits, count, state, expected = 0.0, 0, desk.model.start()[1], {}
    for start in range(0, report.tokens, 64):
        chunk = ids[:, start : start + 64]
        logits, state = desk.model.forward(chunk, state, logits="all")
        surprise = -logits[0, :-1].double().log_softmax(-1).gather(1, chunk[0, 1:, None]) / math.log(2)
        n = min(-(-chunk.shape[1] // 32), chunk.shape[1] - 1)
        bits, count = bits + surprise[-n:].sum().item() if n else bits, count + n
        expected[start + chunk.shape[1]] = bits, count
    for snapshot in lineage(desk.store, "sampled.txt"):
        assert snapshot.sampled_tokens == expected[snapshot.tokens][1] > 0
        assert snapshot.sampled_bits == pytest.approx(expected[snapshot.tokens][0], rel=1e-5)


def test_a_resumed_reading_records_what_an_uninterrupted_one_does(desk: Desk) -> None:
    text = prose(2000)
    desk.read(text, max_tokens=3 * EVERY + 5)
    desk.read(text)
    last = desk.fresh(text)
    fresh = {s.tokens: s for s in (last, *last.ancestors())}
    for snapshot in lineage(desk.store, "book.txt"):
        if snapshot.tokens in fresh:
            other = fresh[snapshot.tokens]
            assert (snapshot.sampled_bits, snapshot.sampled_tokens) == (other.sampled_bits, other.sampled_tokens)


def test_what_a_shared_beginning_saved_is_reported(desk: Desk) -> None:
    beginning = prose(1500)
    first = desk.read(beginning + prose(500, seed=1), name="first.txt")
    assert (first.resumed_from_token, first.shared_with) == (0, None)
    assert first.saved_s == 0
    second = desk.read(beginning + prose(500, seed=2), name="second.txt")
    assert second.resumed_from_token >= EVERY
    assert second.shared_with == "first.txt"
    assert second.saved_s == pytest.approx(second.resumed_from_token / second.rate_tok_s)
    again = desk.read(beginning + prose(500, seed=2), name="second.txt")
    assert (again.shared_with, again.saved_s) == (None, None)


def test_an_empty_document(desk: Desk) -> None:
    with pytest.raises(InputError, match="expected some text"):
        desk.read(b"")
    assert list(desk.store.list()) == []


def test_a_one_byte_document(desk: Desk) -> None:
    report = desk.read(b"x")
    assert (report.tokens, report.bytes) == (1, 1)
    assert desk.read(b"x").snapshots_written == 0


def test_undecodable_bytes_are_counted(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    report = desk.read(
        b"good " * 20_000 + "漢字 ".encode() + b"\xff\xfe bad", max_tokens=None, chunk=1024, snapshot_every=16 * 1024
    )
    assert report.replaced_bytes == 2
    assert "2 bytes could not be decoded" in caplog.text


def test_an_ascii_text_that_grows_into_another_encoding_goes_on(desk: Desk) -> None:
    start, rest = (
        "the keeper of an old light " * 20,
        "Les élèves étaient très fatigués après une journée passée à étudier. ",
    )
    assert desk.read(start).encoding == "ascii"
    grown = desk.read((start + rest).encode("cp1252"))
    assert grown.resumed_from_token > 0 and grown.replaced_bytes == 0
    head = desk.store.get("book.txt")
    assert head.encoding == grown.encoding != "ascii"
    assert head.id == desk.fresh((start + rest).encode("cp1252")).id == desk.fresh(start + rest).id
    bad = (start + rest).encode("cp1252") + "漢".encode() * 99
    assert desk.read(bad).encoding == grown.encoding, "what was decided is kept"


def test_one_writer_of_a_document(desk: Desk) -> None:
    with Store(desk.store.path).writing("book.txt", desk.model.fingerprint), pytest.raises(StoreLockedError):
        desk.read(prose(200))


def test_estimate_writes_nothing_and_says_what_ingest_does(desk: Desk) -> None:
    path = desk.folder / "plan.txt"
    path.write_text(prose(1500))
    plan = estimate(str(path), model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY)
    assert list(desk.store.list()) == []
    report = ingest(str(path), model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY)
    assert (plan.tokens, plan.bytes, plan.snapshots) == (report.tokens, report.bytes, report.snapshots_written)
    assert plan.elapsed_s > 0
    again = estimate(str(path), model=desk.model, store=desk.store, snapshot_every=EVERY)
    assert (again.tokens, again.snapshots, again.resumed_from_token) == (report.tokens, 0, report.tokens)


# ---- what a document keeps to ----


@pytest.mark.parametrize("options", [{"max_tokens": EVERY + 5}, {"max_tokens": 4 * T, "snapshot_every": T}], ids=str)
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_shorter_reading_of_the_same_tokens_leaves_the_head_where_it_is(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, int]
) -> None:
    text = prose(2000)
    long = desk.read(text)
    at_first = [s.id for s in lineage(desk.store, "book.txt")]
    if source == "file":
        short = desk.read(text, **options)
    else:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        rest = {"chunk": T, "snapshot_every": EVERY, **options}
        short = ingest("-", name="book.txt", model=desk.model, store=desk.store, **rest)
    assert (short.head, short.head_tokens) == (long.snapshot, long.tokens) == (long.head, long.head_tokens)
    assert [s.id for s in lineage(desk.store, "book.txt")] == at_first
    assert short.tokens == options["max_tokens"]
    assert short.snapshot == desk.store.get(short.snapshot).id == desk.fresh(text, **options).id
    again = desk.read(text, **options)
    assert (again.snapshot, again.head, again.snapshots_written) == (short.snapshot, long.snapshot, 0)
    desk.store.prune()
    assert [s.id for s in lineage(desk.store, "book.txt")] == at_first
    assert desk.read(text).snapshots_written == 0


def test_a_shorter_reading_that_is_interrupted_leaves_the_head_too(desk: Desk) -> None:
    long = desk.read(prose(3000))
    stop = StopRequest()

    def interrupt(progress: ReadingProgress) -> None:
        if progress.tokens == EVERY + 2 * T:
            stop(signal.SIGTERM, None)

    with pytest.raises(StoppedError):
        desk.read(prose(3000), max_tokens=EVERY + 3 * T, snapshot_every=T, on_progress=interrupt, stop=stop)
    assert desk.store.get("book.txt").id == long.snapshot
    assert {s.tokens for s in desk.store.list()} >= {EVERY + T, EVERY + 2 * T}


def test_a_shorter_reading_of_other_tokens_moves_the_head(desk: Desk) -> None:
    """The head is the furthest reading of the present text."""
    text = prose(2000)
    desk.read(text)
    edited = desk.read("Zq" + text, max_tokens=EVERY + 5)
    assert edited.head == edited.snapshot == desk.store.get("book.txt").id
    cut_off = desk.read("Zq" + text[:200], max_tokens=2000)
    assert cut_off.head == cut_off.snapshot == desk.store.get("book.txt").id


def second_part(desk: Desk) -> tuple[ReadingReport, ReadingReport]:
    first = desk.read(prose(500))
    return first, desk.read(prose(900, seed=3), name="second", from_snapshot="book.txt")


def test_going_on_keeps_what_a_document_started_from(desk: Desk) -> None:
    first, second = second_part(desk)
    grown = desk.read(prose(1500, seed=3), name="second")
    assert grown.resumed_from_token >= EVERY
    assert desk.store.get("second").start == first.snapshot
    assert grown.snapshot == desk.read(prose(1500, seed=3), name="third", from_snapshot="book.txt").snapshot
    edited = desk.read("Zq" + prose(1500, seed=3), name="second")
    assert edited.resumed_from_token == 0
    assert desk.store.get("second").start == first.snapshot
    assert edited.snapshot == desk.read("Zq" + prose(1500, seed=3), name="third").snapshot
    assert second.snapshot != grown.snapshot


def test_another_start_needs_a_restart_that_says_what_it_leaves(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    first, second = second_part(desk)
    other = desk.read(prose(300, seed=8), name="other.txt")
    with pytest.raises(UsageError, match=f"started from snapshot {first.snapshot}.*--restart") as caught:
        desk.read(prose(1500, seed=3), name="second", from_snapshot="other.txt")
    assert second.snapshot in str(caught.value)
    with pytest.raises(UsageError, match="started from the model's own start"):
        desk.read(prose(900), from_snapshot="other.txt")
    assert desk.store.get("second").id == second.snapshot
    assert not caplog.records
    again = desk.read(prose(900, seed=3), name="second", from_snapshot="other.txt", restart=True)
    assert second.snapshot in caplog.text
    assert desk.store.get("second").id == again.snapshot != second.snapshot
    assert desk.store.get("second").start == other.snapshot
    plain = desk.read(prose(900, seed=3), name="second", restart=True)
    assert plain.snapshot == desk.fresh(prose(900, seed=3)).id


def test_a_start_that_is_gone(desk: Desk) -> None:
    first, _ = second_part(desk)
    desk.store.rm(first.snapshot)
    assert desk.read(prose(1500, seed=3), name="second").resumed_from_token >= EVERY
    with pytest.raises(NotFoundError, match=f"{first.snapshot}.*--restart"):
        desk.read("Zq" + prose(1500, seed=3), name="second")
    assert desk.read("Zq" + prose(1500, seed=3), name="second", restart=True).tokens


@pytest.mark.parametrize("order", [(T, 2 * T), (2 * T, T)], ids=str)
@pytest.mark.parametrize("n_tokens", [5, T])
def test_documents_of_one_short_text_keep_their_own_chunks(
    desk: Desk, caplog: pytest.LogCaptureFixture, order: tuple[int, int], n_tokens: int
) -> None:
    text = prose(2000)
    short = next(text[:n] for n in range(1, 400) if len(desk.model.tokenizer.encode(text[:n])) == n_tokens)
    reports = [desk.read(short, name=f"by {chunk}", chunk=chunk) for chunk in order]
    assert reports[0].snapshot == reports[1].snapshot
    for chunk in order:
        grown = desk.read(text, name=f"by {chunk}", chunk=None)
        assert grown.exact
        assert grown.snapshot == desk.fresh(text, chunk=chunk).id
        assert desk.read(text, name=f"by {chunk}", chunk=chunk).snapshots_written == 0
    assert not caplog.records


# ---- what is asked for ----


@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name in ("chunk", "snapshot_every", "max_tokens") for value in (0, -1, 1.5, "64")),
        {"chunk": 64, "snapshot_every": 96},
        {"snapshots_every": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("work", [ingest, estimate])
def test_options_that_make_no_sense(desk: Desk, work: Any, options: dict[str, Any]) -> None:
    (desk.folder / "text").write_text(prose(300))
    with pytest.raises(UsageError, match="reading: expected"):
        work(str(desk.folder / "text"), model=desk.model, store=desk.store, **options)


def test_a_path_and_a_reading_as_a_value(desk: Desk) -> None:
    path = desk.folder / "a.txt"
    path.write_text(prose(900))
    reading = Reading(chunk=T, snapshot_every=EVERY)
    report = ingest(path, reading, model=desk.model, store=desk.store, max_tokens=EVERY)
    assert (report.document, report.tokens) == (str(path), EVERY)
    assert ingest(path, reading, model=desk.model, store=desk.store).snapshot == desk.fresh(prose(900)).id
    assert estimate(path, reading, model=desk.model, store=desk.store).snapshots == 0
