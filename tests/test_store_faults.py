"""The store under faults: killed at every step, out of space, bytes flipped, cut off, swapped or made up."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from fake_snapshots import MODEL, OTHER_MODEL, digest, fake, fake_state, in_child, put, read, start_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkv_stream import snapshot_codec
from rwkv_stream.catalog import Catalog
from rwkv_stream.errors import MismatchError, NotFoundError, SnapshotError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.snapshot_codec import Head, Snapshot, StoredObject, Tag
from rwkv_stream.store import FAILPOINTS, Store

N_MOMENTS = 12


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not lose what was written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# ---- killed ----


def live_through(path: Path, said: Path) -> None:
    """A life that passes every step of a store; says in the file `said` what it has been promised."""
    with said.open("a", buffering=1) as out:
        store = Store(path, create=True)
        for name, n in (("book.txt", 3), ("web.log", 1)):
            with store.writing(name, MODEL):
                made: list[Snapshot] = []
                for i in range(1, n + 1):
                    made.append(put(store, fake(16 * i, name, document=name, parent=made[-1].id if made else None)))
                    store.move_head(name, MODEL, made[-1].id)
                    out.write(f"+{made[-1].id}\n")
            store.tag("here", made[-1].id, move=True)
            store.untag("here")
            out.write(f"-{made[-1].id}\n")
            store.rm(made[-1].id)
        store.rebuild()
        out.write("end\n")


def check_after_a_kill(path: Path, said: Path) -> None:
    """It opens, it agrees with itself, nothing that was promised is lost, and life can be lived to its end."""
    with contextlib.suppress(NotFoundError):  # killed before there was a store
        store = Store(path)
        assert store.verify().damaged == []
        assert_nothing_stray(path)
        listed = list(store.list())
        for snapshot in listed:
            assert snapshot.state().digest() == snapshot.state_digest
            assert snapshot == store.get(snapshot.id)
        promised = said.read_text().split()
        kept = {line[1:] for line in promised if line[0] == "+"} - {line[1:] for line in promised if line[0] == "-"}
        assert kept <= {snapshot.id for snapshot in listed}
        for document in ("book.txt", "web.log"):
            head = store.head(document, MODEL)
            assert head is None or head in listed
    live_through(path, said)
    assert said.read_text().endswith("end\n")
    store = Store(path)
    assert [(s.document, s.tokens) for s in store.list()] == [("book.txt", 16), ("book.txt", 32)]
    assert store.get("book.txt").tokens == 32
    assert store.head("web.log", MODEL) is None
    assert store.verify().damaged == []
    assert_nothing_stray(path)


def assert_nothing_stray(path: Path) -> None:
    assert [p for p in path.rglob("*") if p.name.startswith(TEMP_PREFIX)] == []
    assert list((path / "locks" / "writers").iterdir()) == []


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("passing", [1, 2])
@pytest.mark.parametrize("name", [name for name in FAILPOINTS if not name.startswith("recover.")])
def test_killed_at_a_failpoint(tmp_path: Path, name: str, passing: int) -> None:
    path, said = tmp_path / "a.store", tmp_path / "said"
    status = in_child(lambda: live_through(path, said), **{FAILPOINT_VARIABLE: f"{name}:{passing}"})
    assert killed(status) or passing > 1, f"{name} is not passed"
    check_after_a_kill(path, said)


@pytest.mark.parametrize("name", [name for name in FAILPOINTS if name.startswith("recover.")])
@pytest.mark.parametrize("first", ["object.written", "record.renamed", "head.synced", "rm.uncatalogued"])
def test_killed_while_clearing_up_behind_one_that_was_killed(tmp_path: Path, name: str, first: str) -> None:
    path, said = tmp_path / "a.store", tmp_path / "said"
    assert killed(in_child(lambda: live_through(path, said), **{FAILPOINT_VARIABLE: first}))
    assert killed(in_child(lambda: Store(path), **{FAILPOINT_VARIABLE: name}))
    check_after_a_kill(path, said)


@pytest.mark.parametrize("moment", range(N_MOMENTS))
def test_killed_at_a_moment(tmp_path: Path, moment: int) -> None:
    path, said = tmp_path / "a.store", tmp_path / "said"
    rng = random.Random(moment)
    for _ in range(3):
        pid = start_child(lambda: live_through(path, said))
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    check_after_a_kill(path, said)


def test_temp_files_of_a_live_writer_stay(store: Store, tmp_path: Path) -> None:
    with store.writing():
        assert store._session is not None
        mine = store.path / "refs" / "heads" / f"{TEMP_PREFIX}{store._session.tag}-1"
        mine.touch()
        said = tmp_path / "said"
        assert killed(in_child(lambda: read(Store(store.path)), **{FAILPOINT_VARIABLE: "object.written"}))
        other = Store(store.path)
        assert list(store.path.rglob(f"{TEMP_PREFIX}*")) == [mine]
        assert other.verify().damaged == []
        mine.unlink()
    assert_nothing_stray(store.path)
    assert not said.exists()


# ---- machines that fail ----


def failing(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, at: int) -> Callable[[], int]:
    """Let the `at`-th call of a function fail for want of space; gives the number of calls so far."""
    real, calls = getattr(holder, name), [0]

    def function(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, function)
    return lambda: calls[0]


@pytest.mark.parametrize(("holder", "name"), [(os, "fsync"), (os, "replace"), (Path, "mkdir"), (Catalog, "changing")])
def test_no_space_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    at, is_through = 0, False
    while not is_through:
        at += 1
        path, said = tmp_path / f"{at}.store", tmp_path / f"{at}.said"
        with monkeypatch.context() as patch:
            n_calls = failing(patch, holder, name, at)
            with contextlib.suppress(OSError):
                live_through(path, said)
            is_through = n_calls() < at
        check_after_a_kill(path, said)
    assert at > 5


def test_a_catalog_that_cannot_be_written_for_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read(store, n=2)
    with monkeypatch.context() as patch:

        def full(*args: object, **kwargs: object) -> Iterator[None]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(Catalog, "changing", full)
        with pytest.raises(OSError, match="No space left"):
            read(store, "other.txt", "other", n=1)
        assert len(list((store.path / "locks" / "writers").iterdir())) == 1, "the next one has to clear up"
    again = Store(store.path)
    assert_nothing_stray(store.path)
    assert again.verify().damaged == []
    assert again.get("other.txt").tokens == 16, "what was published is not lost"
    assert again.get("book.txt") == first[-1]


def test_reading_from_a_full_disk_without_a_catalog(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read(store, n=3)
    (store.path / "catalog.sqlite").unlink()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Catalog, "rebuild", full)
    assert [s.tokens for s in store.list()] == [16, 32, 48]
    assert store.get("book.txt~1").tokens == 32
    assert "cannot be written" in caplog.text


def test_an_unreadable_block_is_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    [made] = read(store, n=1)
    real = os.open

    def bad_disk(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == made.objects[0].name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", bad_disk)
    with pytest.raises(SnapshotError, match="Input/output error"):
        made.state()
    assert len(store.verify().damaged) == 1


# ---- damaged bytes ----


class Victim:
    """A store of two snapshots, a head and a tag; one file of each kind, and what reads it."""

    def __init__(self, path: Path) -> None:
        self.store = Store(path, create=True)
        first, made = read(self.store, n=2)
        self.store.tag("here", made.id)
        self.made, self.first = made, first
        self.head_path = next((path / "refs" / "heads").iterdir())
        self.readers: dict[str, tuple[Path, list[Callable[[], object]]]] = {
            "format": (path / "format", [lambda: Store(path), lambda: Store(path, create=True)]),
            "object": (
                snapshot_codec.object_path(made.folder, made.objects[0].name),
                [made.state, made.last_hidden, self.store.get("here").state],
            ),
            "record": (
                path / "records" / made.id[:2] / made.id,
                [
                    lambda: self.store.get(made.id),
                    lambda: self.store.get("here"),
                    lambda: self.store.head("book.txt", MODEL),
                ],
            ),
            "parent's record": (
                path / "records" / first.id[:2] / first.id,
                [lambda: list(self.store.ancestors(made)), lambda: self.store.get("book.txt~1")],
            ),
            "head": (
                self.head_path,
                [lambda: self.store.head("book.txt", MODEL), lambda: self.store.get("book.txt~1")],
            ),
            "tag": (path / "refs" / "tags" / "here", [lambda: self.store.get("here")]),
        }


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim") / "a.store")


KINDS = ["format", "object", "record", "parent's record", "head", "tag"]


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_byte_is_found(victim: Victim, kind: str) -> None:
    path, readers = victim.readers[kind]
    whole = path.read_bytes()
    rng = random.Random(0)
    try:
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(SnapshotError):
                rng.choice(readers)()
        assert str(path.relative_to(victim.store.path)) in [damage.path for damage in victim.store.verify().damaged]
    finally:
        path.write_bytes(whole)
    for reader in readers:
        reader()
    assert victim.store.verify().damaged == []


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_length_is_found(victim: Victim, kind: str) -> None:
    path, readers = victim.readers[kind]
    whole = path.read_bytes()
    try:
        for other in (
            *(whole[:n] for n in range(0, len(whole), 7)),
            whole[:-1],
            whole + b"\0",
            whole + whole,
            whole[1:],
        ):
            path.write_bytes(other)
            for reader in readers:
                with pytest.raises(SnapshotError):
                    reader()
            assert victim.store.verify().damaged != []
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["object", "record"])
def test_a_missing_file_is_found(victim: Victim, kind: str) -> None:
    path, readers = victim.readers[kind]
    whole = path.read_bytes()
    path.unlink()
    try:
        for reader in readers[1:] if kind == "record" else readers:
            with pytest.raises(SnapshotError):
                reader()
        assert str(path.relative_to(victim.store.path)) in [damage.path for damage in victim.store.verify().damaged]
    finally:
        path.write_bytes(whole)


def swapped(one: Path, two: Path) -> Iterator[None]:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    yield
    one.write_bytes(a)
    two.write_bytes(b)


@pytest.mark.parametrize("kind", ["objects", "records", "refs/heads", "refs/tags"])
def test_two_swapped_files_are_found(store: Store, kind: str) -> None:
    one, two = read(store, n=2)
    read(store, "other.txt", "other", n=1)
    store.tag("one", one.id)
    store.tag("two", two.id)
    paths = sorted(p for p in (store.path / kind).rglob("*") if p.is_file())[:2]
    for _ in swapped(*paths):
        readers: dict[str, Callable[[], object]] = {
            "objects": lambda: [s.state() for s in store.list()],
            "records": lambda: [store.get(s.id) for s in list(store.list())],
            "refs/heads": lambda: store.get("book.txt"),
            "refs/tags": lambda: store.get("one"),
        }
        with pytest.raises(SnapshotError):
            readers[kind]()
        assert {str(p.relative_to(store.path)) for p in paths} <= {d.path for d in store.verify().damaged}
    assert store.verify().damaged == []


def test_a_ref_to_nothing_is_damage(store: Store) -> None:
    made = read(store, n=2)
    store.tag("here", made[0].id)
    for path in (store.path / "records").rglob("*"):
        if path.is_file():
            path.unlink()
    for ref in ("book.txt", "here"):
        with pytest.raises(SnapshotError, match="a snapshot that exists"):
            store.get(ref)
    with pytest.raises(NotFoundError):
        store.get(made[0].id)


def test_a_damaged_record_leaves_the_rest_usable(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    made = read(store, n=3)
    (store.path / "records" / made[1].id[:2] / made[1].id).write_bytes(b"rot")
    assert store.rebuild() == 2
    assert "left out of the catalog" in caplog.text
    assert [s.tokens for s in store.list()] == [16, 48]
    assert store.get("book.txt") == made[2]
    with pytest.raises(SnapshotError):
        store.get("book.txt~1")
    read(store, n=3)
    assert store.verify().damaged == []
    assert store.get("book.txt~1") == made[1]


# ---- bytes that somebody made up ----

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def sealed(magic: bytes, body: bytes, version: int = 1) -> bytes:
    data = magic + struct.pack("<I", version) + body
    return data + hashlib.sha256(data).digest()


def unsealed(data: bytes) -> dict[str, Any]:
    values = msgpack.unpackb(data[12:-32])
    assert isinstance(values, dict)
    return values


RECORD = snapshot_codec.encode_record(
    Snapshot(
        **{f: getattr(fake(16), f) for f in fake(16).__slots__},
        id="",
        state_digest=digest("state"),
        state_bytes=10,
        objects=(StoredObject(digest("object"), "exact", 10),),
        created="2025-01-01T00:00:00Z",
        folder=Path(),
    )
)
HEAD = snapshot_codec.encode_head(Head("book.txt", MODEL, digest("x"), "utf-8", "2025-01-01T00:00:00Z"))
TAG = snapshot_codec.encode_tag(Tag("here", digest("x"), "2025-01-01T00:00:00Z"))
DECODERS: dict[bytes, Callable[[bytes], object]] = {
    RECORD: lambda data: snapshot_codec.decode_record(data, Path(), Path("x")),
    HEAD: lambda data: snapshot_codec.decode_head(data, Path("x")),
    TAG: lambda data: snapshot_codec.decode_tag(data, Path("x")),
}


def reads_or_refuses(decode: Callable[[], object]) -> None:
    with contextlib.suppress(SnapshotError, MismatchError):
        decode()


@settings(max_examples=300, deadline=None)
@given(whole=st.sampled_from([RECORD, HEAD, TAG]), data=st.data())
def test_made_up_values_with_a_right_checksum(whole: bytes, data: st.DataObject) -> None:
    values = unsealed(whole)
    for name in data.draw(st.lists(st.sampled_from(sorted(values)), max_size=3)):
        values[name] = data.draw(VALUES)
    if data.draw(st.booleans()):
        values.pop(data.draw(st.sampled_from(sorted(values))))
    body = data.draw(st.one_of(st.just(msgpack.packb(values)), VALUES.map(msgpack.packb), st.binary(max_size=60)))
    version = data.draw(st.sampled_from([0, 1, 1, 1, 2, 2**32 - 1]))
    magic = data.draw(st.sampled_from([whole[:8], whole[:8], b"rwkv-xyz"]))
    reads_or_refuses(lambda: DECODERS[whole](sealed(magic, body, version)))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_made_up_files(data: bytes) -> None:
    for decode in DECODERS.values():
        with pytest.raises(SnapshotError):
            decode(data)


@pytest.mark.parametrize(
    "body", [b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 60_000]
)
def test_lengths_that_lie_take_no_memory(body: bytes) -> None:
    with pytest.raises(SnapshotError):
        DECODERS[RECORD](sealed(b"rwkv-rec", body))


def with_object(store: Store, made: Snapshot, data: bytes, **changes: Any) -> Snapshot:
    """The snapshot, with an object of these bytes under their right name in its record."""
    name = hashlib.sha256(data).hexdigest()
    path = snapshot_codec.object_path(made.folder, name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return replace(made, objects=(StoredObject(name, "exact", len(data)),), **changes)


def object_parts(made: Snapshot) -> tuple[dict[str, Any], bytes]:
    data = snapshot_codec.read_object(made)
    length = struct.unpack_from("<8sII", data)[2]
    return msgpack.unpackb(data[16 : 16 + length]), data[16 + length :]


def packed(
    header: object, frames: bytes, *, magic: bytes = b"rwkv-obj", version: int = 1, length: int | None = None
) -> bytes:
    body = msgpack.packb(header)
    return struct.pack("<8sII", magic, version, len(body) if length is None else length) + body + frames


@pytest.fixture
def made(store: Store) -> Snapshot:
    return put(store, fake(16))


def test_an_object_put_together_again_is_the_same(store: Store, made: Snapshot) -> None:
    assert with_object(store, made, packed(*object_parts(made))) == made


@pytest.mark.parametrize(
    "lie",
    [
        {"length": 0},
        {"length": 2**32 - 1},
        {"length": 65_537},
        {"magic": b"rwkv-rec"},
    ],
    ids=str,
)
def test_objects_with_a_false_start(store: Store, made: Snapshot, lie: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError):
        with_object(store, made, packed(*object_parts(made), **lie)).state()


def test_an_object_of_a_newer_version_or_codec(store: Store, made: Snapshot) -> None:
    header, frames = object_parts(made)
    for data in (packed(header, frames, version=2), packed(header | {"codec": "int8"}, frames)):
        with pytest.raises(MismatchError, match="newer"):
            with_object(store, made, data).state()


def lying_tensors() -> Iterator[tuple[str, Callable[[list[Any]], Any]]]:
    yield "huge shape", lambda t: [[t[0][0], [1, 2**31, 2**31], t[0][2]], *t[1:]]
    yield "negative shape", lambda t: [[t[0][0], [1, -2, -8], t[0][2]], *t[1:]]
    yield "no shape", lambda t: [[t[0][0], [], t[0][2]], *t[1:]]
    yield "nine axes", lambda t: [[t[0][0], [1] * 9, t[0][2]], *t[1:]]
    yield "other shape", lambda t: [[t[0][0], [1, 8, 2], t[0][2]], *t[1:]]
    yield "two of one name", lambda t: [t[0], t[0], *t[1:]]
    yield "no last hidden state", lambda t: t[:-1]
    yield "nothing", lambda t: []
    yield "not a list", lambda t: {"a": t}
    yield "a frame more", lambda t: [["more", [1], 4], *t]
    yield "lengths moved", lambda t: [[*t[0][:2], t[0][2] + 1], [*t[1][:2], t[1][2] - 1], *t[2:]]
    yield "name of another tensor", lambda t: [["att_kv", *t[0][1:]], ["att_x_prev", *t[1][1:]], *t[2:]]


@pytest.mark.parametrize("lie", [pytest.param(lie, id=name) for name, lie in lying_tensors()])
def test_objects_whose_header_lies(store: Store, made: Snapshot, lie: Callable[[list[Any]], Any]) -> None:
    header, frames = object_parts(made)
    with pytest.raises(SnapshotError):
        with_object(store, made, packed(header | {"tensors": lie(header["tensors"])}, frames)).state()


@pytest.mark.parametrize("name", ["model", "start_digest", "chain", "tokens", "state_digest"])
def test_the_object_of_another_snapshot(store: Store, made: Snapshot, name: str) -> None:
    header, frames = object_parts(made)
    other = {"tokens": 17, "model": OTHER_MODEL}.get(name, digest("other"))
    with pytest.raises(SnapshotError, match=name):
        with_object(store, made, packed(header | {name: other}, frames)).state()


def test_frames_that_are_not_what_the_header_says(store: Store, made: Snapshot) -> None:
    header, frames = object_parts(made)
    names = [t[0] for t in header["tensors"]]
    sizes = [t[2] for t in header["tensors"]]
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
    raw = fake_state(int(made.chain[:8], 16))
    first = header["tensors"][0]

    def with_first(frame: bytes) -> Snapshot:
        tensors = [[first[0], first[1], len(frame)], *header["tensors"][1:]]
        return with_object(store, made, packed(header | {"tensors": tensors}, frame + frames[sizes[0] :]))

    n_bytes = raw[names[0]].nbytes
    assert with_first(frames[: sizes[0]]).state().digest() == made.state_digest
    bomb = compress(bytes(1 << 28))
    for frame in (
        bomb,
        compress(bytes(n_bytes)),
        frames[: sizes[0]] + b"\0",
        b"",
        b"no zstd",
        frames[: sizes[0] - 4],
    ):
        with pytest.raises(SnapshotError):
            with_first(frame).state()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_made_up_headers(store: Store, data: st.DataObject) -> None:
    snapshot = put(store, fake(16))
    header, frames = object_parts(snapshot)
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        header[name] = data.draw(VALUES)
    reads_or_refuses(with_object(store, snapshot, packed(header, frames)).state)


# ---- several at once ----


def test_removing_while_others_read_the_same_text(store: Store) -> None:
    """Two processes publish and move heads to snapshots that this one keeps removing."""

    def child(name: str) -> None:
        other = Store(store.path, wait=True)  # `rm` holds the head for a moment
        for _ in range(4):
            with contextlib.suppress(NotFoundError):  # removed between its record and its head
                read(other, name, "a shared text", n=6)

    pids = [start_child(lambda name=name: child(name)) for name in ("one", "two")]  # type: ignore[misc]
    store.wait = True
    rng = random.Random(5)
    for _ in range(12):
        listed = list(store.list())
        if listed:
            with contextlib.suppress(NotFoundError):
                store.rm(rng.choice(listed).id)
        assert store.verify().damaged == []
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert store.verify().damaged == []
    assert_nothing_stray(store.path)
    for snapshot in store.list():
        assert snapshot.state().digest() == snapshot.state_digest
