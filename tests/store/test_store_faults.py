"""The store under faults: out of space, bytes flipped, cut off, swapped or made up."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import os
import random
import resource
import shutil
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from fake_snapshots import (
    MODEL,
    OTHER_MODEL,
    START,
    digest,
    fake,
    fake_state,
    in_child,
    library,
    put,
    read,
    start_child,
    told,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import program

from rwkv_stream.errors import MismatchError, NotFoundError, SnapshotError
from rwkv_stream.files import TEMP_PREFIX, publishing
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ReadingReport, ingest
from rwkv_stream.store import Repaired, Report, Store, records
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.records import Head, Snapshot, StoredObject, Tag

Said = dict[str, dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine stops here: what was written is there, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def assert_nothing_stray(path: Path) -> None:
    assert [p for p in path.rglob("*") if p.name.startswith(TEMP_PREFIX)] == []
    assert list((path / "locks" / "writers").iterdir()) == []


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
                made.reader.objects.path(made.objects[0].name),
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
        damaged = victim.store.verify(read_data=True).damaged
        assert str(path.relative_to(victim.store.path)) in [damage.path for damage in damaged]
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


@pytest.mark.parametrize("kind", ["objects", "texts", "records", "refs/heads", "refs/tags"])
def test_two_swapped_files_are_found(store: Store, kind: str) -> None:
    one, two = read(store, n=2)
    read(store, "other.txt", "other", n=1)
    store.tag("one", one.id)
    store.tag("two", two.id)
    paths = sorted(p for p in (store.path / kind).rglob("*") if p.is_file())[:2]
    for _ in swapped(*paths):
        readers: dict[str, Callable[[], object]] = {
            "objects": lambda: [store.get(s.id).state() for s in list(store.list())],
            "texts": lambda: told(store),
            "records": lambda: [store.get(s.id) for s in list(store.list())],
            "refs/heads": lambda: store.get("book.txt"),
            "refs/tags": lambda: store.get("one"),
        }
        with pytest.raises(SnapshotError):
            readers[kind]()
        damaged = store.verify(read_data=True).damaged
        assert {str(p.relative_to(store.path)) for p in paths} <= {damage.path for damage in damaged}
    assert store.verify(read_data=True).damaged == []


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


def test_a_damaged_record_leaves_the_rest_usable(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_stream.store.store.now", lambda: "2025-01-01T00:00:00Z")  # what is made again is equal
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


RECORD = records.encode_record(
    Snapshot(
        **{f: getattr(fake(16), f) for f in fake(16).__slots__},
        id="",
        state_digest=digest("state"),
        state_bytes=10,
        objects=(StoredObject(digest("object"), "exact", 10),),
        created="2025-01-01T00:00:00Z",
        reader=StoreFiles(Path()),
    )
)
HEAD = records.encode_head(Head("book.txt", MODEL, digest("x"), "utf-8", "2025-01-01T00:00:00Z"))
TAG = records.encode_tag(Tag("here", digest("x"), "2025-01-01T00:00:00Z"))
DECODERS: dict[bytes, Callable[[bytes], object]] = {
    RECORD: lambda data: records.decode_record(data, StoreFiles(Path()), Path("x")),
    HEAD: lambda data: records.decode_head(data, Path("x")),
    TAG: lambda data: records.decode_tag(data, Path("x")),
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
    path = made.reader.objects.path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return replace(made, objects=(StoredObject(name, "exact", len(data)),), **changes)


def object_parts(made: Snapshot) -> tuple[dict[str, Any], bytes]:
    data = made.reader.objects.read(made.objects[0])
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
    for data in (packed(header, frames, version=2), packed(header | {"codec": "int2"}, frames)):
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
    store = Store(store.path, wait=True)
    rng = random.Random(5)
    for _ in range(12):
        listed = list(store.list())
        if listed:
            with contextlib.suppress(NotFoundError):
                store.rm(rng.choice(listed).id)
        assert store.verify().damaged == []
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert store.verify().damaged == []
    assert store.verify(read_data=True).damaged == []
    assert_nothing_stray(store.path)


# ---- any fault, then a repair, then on as before ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What is copied, and what every story has to end with."""
    return library(tmp_path_factory.mktemp("whole") / "a.store")


@pytest.fixture(scope="module")
def right(whole: Store) -> Said:
    return told(whole)


def copied(store: Store, folder: Path, name: str = "a.store") -> Path:
    return Path(shutil.copytree(store.path, folder / name))


def of_kind(path: Path, kind: str) -> tuple[Path, Path]:
    """A file of this kind in a copy of the library, and another one of that kind (of `format`: of the next kind)."""
    store = Store(path)
    first, middle, newest = (store.get(f"book.txt@{tokens}") for tokens in (16, 32, 64))
    files = store._files
    heads = [files.head_path(name, MODEL) for name in ("book.txt", "notes/other.log")]

    def object_of(snapshot: Snapshot) -> Path:
        return files.objects.path(snapshot.objects[0].name)

    def text_of(snapshot: Snapshot) -> Path:
        assert snapshot.text is not None
        return files.texts.path(snapshot.text)

    return {
        "format": (files.format, heads[0]),
        "record": (files.record_path(middle.id), files.record_path(newest.id)),
        "newest record": (files.record_path(newest.id), files.record_path(first.id)),
        "head": (heads[0], heads[1]),
        "tag": (files.tags / "half", files.tags / "a%20fork"),
        "object": (object_of(middle), object_of(newest)),
        "text": (text_of(middle), text_of(newest)),
        "newest object": (object_of(newest), object_of(first)),
    }[kind]


FILES = ["format", "record", "newest record", "head", "tag", "object", "newest object"]


def flip(data: bytes, start: int, stop: int) -> bytes:
    at = random.Random(len(data) + start).randrange(start, stop)
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def header_end(data: bytes) -> int:
    return 16 + int(struct.unpack_from("<8sII", data)[2])


SMALL_REGIONS: dict[str, Callable[[bytes], bytes]] = {
    "flip in the magic": lambda data: flip(data, 0, 8),
    "flip in the version": lambda data: flip(data, 8, 12),
    "flip in the map": lambda data: flip(data, 12, len(data) - 32),
    "flip in the checksum": lambda data: flip(data, len(data) - 32, len(data)),
}
OBJECT_REGIONS: dict[str, Callable[[bytes], bytes]] = {
    "flip in the magic": lambda data: flip(data, 0, 8),
    "flip in the version": lambda data: flip(data, 8, 12),
    "flip in the length": lambda data: flip(data, 12, 16),
    "flip in the header": lambda data: flip(data, 16, header_end(data)),
    "flip in a frame": lambda data: flip(data, header_end(data), len(data) - 4),
    "flip in a frame's checksum": lambda data: flip(data, len(data) - 4, len(data)),
}
LENGTHS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "a byte long": lambda data: data + b"\0",
}
WITHOUT_BYTES = ["missing", "swapped", "another's", "unreadable"]
FAULTS = [
    (kind, fault)
    for kind in FILES
    for fault in [*(OBJECT_REGIONS if "object" in kind else SMALL_REGIONS), *LENGTHS, *WITHOUT_BYTES]
    if (kind, fault) != ("format", "swapped")
]


def inflict(path: Path, kind: str, fault: str, patch: pytest.MonkeyPatch) -> Path:
    """Damage a file of this kind; which one."""
    victim, other = of_kind(path, kind)
    if fault == "missing":
        victim.unlink()
    elif fault == "swapped":
        data = victim.read_bytes()
        victim.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif fault == "another's":
        victim.write_bytes(other.read_bytes())
    elif fault == "unreadable":
        bad_sector(patch, victim)
    else:
        change = (OBJECT_REGIONS | SMALL_REGIONS | LENGTHS if "object" in kind else SMALL_REGIONS | LENGTHS)[fault]
        victim.write_bytes(change(victim.read_bytes()))
    return victim


def bad_sector(patch: pytest.MonkeyPatch, victim: Path) -> None:
    """Reading this file's bytes, wherever it is moved, fails as on a worn disk; opening it does not."""
    inode = victim.stat().st_ino

    class Worn(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            if os.fstat(self.fileno()).st_ino == inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return Worn(io.FileIO(file)) if mode == "rb" else real(file, mode, *args, **kwargs)

        return function

    patch.setattr(os, "fdopen", opened(os.fdopen))
    patch.setattr(io, "open", opened(io.open))


def in_place_or_aside(path: Path) -> set[str]:
    """Digests of all bytes kept, the catalog aside."""
    return {
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and not file.name.startswith("catalog.sqlite") and "locks" not in file.parts
    }


def assert_right_or_refused(path: Path, right: Said) -> None:
    """Whatever a user asks of a damaged store, the answer is right or an error that says so."""
    refused = (SnapshotError, NotFoundError)
    try:
        store = Store(path)
    except refused:
        return
    for listed in store.list():
        assert right["snapshots"][listed.id][:4] == [listed.document, listed.tokens, listed.parent, listed.start]
    book = {tokens: i for i, (document, tokens, *_) in right["snapshots"].items() if document == "book.txt"}
    refs = {
        **{"book.txt": book[64], "book.txt~1": book[48], "book.txt~2": book[32], "book.txt@20": book[16]},
        **{"book.txt@50%": book[32], "half": book[32], "a fork": right["tags"]["a fork"]},
        **{identity: identity for identity in right["snapshots"]},
    }
    for ref, identity in refs.items():
        with contextlib.suppress(*refused):
            found = store.get(ref)
            assert found.id == identity, ref
            assert found.state().digest() == right["snapshots"][identity][4]
    with contextlib.suppress(*refused):
        head = store.head("book.txt", MODEL)
        assert head is None or head.id == right["heads"]["book.txt"]
    assert set(store.tags()) <= set(right["tags"].items())


def is_told_by_files_alone(kind: str, fault: str) -> bool:
    """Whether no other file names the one that is gone: then only the catalog knows of it."""
    return fault != "missing" or kind not in ("head", "tag")


@pytest.mark.parametrize("is_with_catalog", [True, False], ids=["catalog", "no catalog"])
@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_a_fault_is_seen_repaired_and_read_over(
    whole: Store,
    right: Said,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    fault: str,
    is_with_catalog: bool,
) -> None:
    path = copied(whole, tmp_path)
    with monkeypatch.context() as patch:
        victim = inflict(path, kind, fault, patch)
        if not is_with_catalog:
            (path / "catalog.sqlite").unlink()
        assert_right_or_refused(path, right)
        name = str(victim.relative_to(path))
        try:
            damaged = [damage.path for damage in Store(path).verify(read_data=True).damaged]
        except (SnapshotError, NotFoundError):
            assert kind == "format"
        else:
            assert (name in damaged) == (is_with_catalog or is_told_by_files_alone(kind, fault)), damaged
    before = in_place_or_aside(path)
    with monkeypatch.context() as patch:
        if fault == "unreadable":
            bad_sector(patch, victim)
        repaired = Store.repair(path)
        assert repaired != Repaired() or not (is_with_catalog or is_told_by_files_alone(kind, fault))
        if is_with_catalog and "object" not in kind:
            assert name in [damage.path for damage in repaired.restored]
            assert repaired.lost == []
        assert Store(path).verify(read_data=True).damaged == []
        assert Store.repair(path) == Repaired()
    assert before <= in_place_or_aside(path), "nothing is deleted"
    if is_with_catalog and ("object" not in kind or fault == "swapped"):
        assert told(Store(path)) == right, "all was put right"
    library(path)
    assert told(Store(path)) == right
    assert Store(path).verify(read_data=True).damaged == []


@pytest.mark.parametrize(
    ("kind", "fault"), [(kind, fault) for kind in FILES for fault in ("flip in the magic", "truncated", "missing")]
)
def test_reading_on_over_a_fault_without_a_repair(
    whole: Store, right: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    """It heals what it makes again, or is refused; either way a repair then finds its work, and nothing is wrong."""
    path = copied(whole, tmp_path)
    inflict(path, kind, fault, monkeypatch)
    with contextlib.suppress(SnapshotError):
        library(path)
    assert_right_or_refused(path, right)
    Store.repair(path)
    library(path)
    assert told(Store(path)) == right
    assert Store(path).verify(read_data=True).damaged == []


# ---- the catalog ----

CATALOG_FAULTS: dict[str, Callable[[bytes], bytes]] = {
    **LENGTHS,
    "flip in the header": lambda data: flip(data, 0, 16),
    "no sqlite": lambda data: b"no sqlite" * 1000,
    "its second half is zeros": lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
    "its first page is zeros": lambda data: bytes(4096) + data[4096:],
}


@pytest.mark.parametrize("mend", ["use", "rebuild", "repair"])
@pytest.mark.parametrize("fault", ["missing", *CATALOG_FAULTS])
def test_a_damaged_catalog_costs_nothing(whole: Store, right: Said, tmp_path: Path, fault: str, mend: str) -> None:
    path = copied(whole, tmp_path)
    catalog = path / "catalog.sqlite"
    data = catalog.read_bytes()
    catalog.unlink()
    if fault != "missing":
        catalog.write_bytes(CATALOG_FAULTS[fault](data))
    if mend == "rebuild":
        Store(path).rebuild()
    elif mend == "repair":
        assert Store.repair(path) == Repaired()
    assert told(Store(path)) == right
    if mend != "use":
        assert Store(path).verify(read_data=True).damaged == []


def test_bytes_flipped_in_the_catalog(whole: Store, right: Said, tmp_path: Path) -> None:
    """What it says is right, or an error upon which it is made anew, or `verify` reports it and `rebuild` mends it."""
    path = copied(whole, tmp_path)
    catalog = path / "catalog.sqlite"
    data = catalog.read_bytes()
    rng = random.Random(0)
    places = rng.sample([at for at in range(len(data)) if data[at]], 200)
    for at in places:
        for suffix in ("-wal", "-shm"):
            catalog.with_name(catalog.name + suffix).unlink(missing_ok=True)
        catalog.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            assert_right_or_refused(path, right)
            assert told(Store(path)) == right
        except (AssertionError, KeyError, SnapshotError, NotFoundError) as error:
            damaged = Store(path).verify().damaged
            is_mended = not damaged and told(Store(path)) == right
            reported = {damage.path for damage in damaged}
            assert is_mended or catalog.name in reported, f"byte {at}: {error}"
            # What the catalog alone names may be missed, as the file of a tag; no whole file is blamed for it.
            assert not [name for name in reported - {catalog.name} if (path / name).exists()], f"byte {at}: {reported}"
    Store(path).rebuild()
    assert told(Store(path)) == right


@pytest.mark.parametrize("message", ["disk I/O error", "database or disk is full", "unable to open database file"])
def test_a_catalog_on_a_bad_disk(
    whole: Store, right: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The disk is at fault, not the store: said so, and no more is lost than the index."""
    path = copied(whole, tmp_path)

    def broken(*args: object, **kwargs: object) -> Any:
        raise sqlite3.OperationalError(message)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", broken)
        with pytest.raises(OSError, match=r"sqlite"):
            list(Store(path).list())
        with pytest.raises(OSError, match=r"sqlite"):
            library(path)
    library(path)
    assert told(Store(path)) == right
    assert Store(path).verify(read_data=True).damaged == []


# ---- pruning what a fault hides ----


HIDING = [
    (kind, fault, is_with_catalog)
    for kind in ("record", "newest record", "head", "tag")
    for fault in ("missing", "truncated", "swapped")
    for is_with_catalog in (True, False)
    if is_with_catalog or is_told_by_files_alone(kind, fault)
]


@pytest.mark.parametrize(("kind", "fault", "is_with_catalog"), HIDING)
def test_prune_refuses_where_it_cannot_know_what_is_referred_to(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str, is_with_catalog: bool
) -> None:
    """What a lost or damaged file referred to is not removed, nor the copy of it in the catalog."""
    path = copied(whole, tmp_path)
    inflict(path, kind, fault, monkeypatch)
    if not is_with_catalog:
        (path / "catalog.sqlite").unlink()
    before = in_place_or_aside(path)
    for dry_run in (True, False):
        with pytest.raises(SnapshotError, match="repair"):
            Store(path).prune(dry_run=dry_run)
    assert in_place_or_aside(path) == before
    Store.repair(path)
    if is_with_catalog:
        assert told(Store(path)) == told(whole)
    library(path)
    assert told(Store(path)) == told(whole)


def test_prune_after_an_import_died_whose_writer_is_forgotten(whole: Store, tmp_path: Path) -> None:
    path = copied(whole, tmp_path)
    staged = path / f"{TEMP_PREFIX}dead-import"
    (staged / "objects" / "ab").mkdir(parents=True)
    (staged / "objects" / "ab" / "abc").write_bytes(bytes(100))
    pruned = Store(path).prune(dry_run=True)
    assert Store(path).prune() == pruned
    assert not staged.exists()
    assert told(Store(path)) == told(whole)


# ---- files of a newer version ----


def newer(data: bytes) -> bytes:
    """The same small file, as a later version of the program would write it."""
    body = data[:8] + struct.pack("<I", 99) + data[12:-32]
    return body + hashlib.sha256(body).digest()


def newer_object(path: Path) -> set[Path]:
    """Let the object of the library's second snapshot be one of a later version, under its right name."""
    store = Store(path)
    snapshot = store.get("half")
    old = store._files.objects.path(snapshot.objects[0].name)
    data = old.read_bytes()
    data = data[:8] + struct.pack("<I", 99) + data[12:]
    name = hashlib.sha256(data).hexdigest()
    new = store._files.objects.path(name)
    new.parent.mkdir(exist_ok=True)
    old.rename(new)
    new.write_bytes(data)
    record = store._files.record_path(snapshot.id)
    stored = (StoredObject(name, "exact", len(data)),)
    record.write_bytes(records.encode_record(replace(snapshot, objects=stored)))
    return {new, record}


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "list": lambda path: list(Store(path).list()),
    "get": lambda path: Store(path).get("half").state(),
    "verify": lambda path: Store(path).verify(),
    "verify --read-data": lambda path: Store(path).verify(read_data=True),
    "rebuild": lambda path: Store(path).rebuild(),
    "prune": lambda path: Store(path).prune(),
    "repair": lambda path: Store.repair(path),
    "ingest": library,
    "rm": lambda path: Store(path).rm(Store(path).get("other.log").id),
    "export": lambda path: Store(path).export(["book.txt"], io.BytesIO()),
}
REFUSED = {
    "format": set(OPERATIONS),
    "record": {"get", "prune", "repair", "ingest", "export"},
    "newest record": {"prune", "repair", "ingest", "export"},
    "head": {"prune", "repair", "ingest", "export"},
    "tag": {"get", "prune", "repair", "ingest"},
    "object": {"get", "repair"},
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_of_a_newer_version_is_left_alone(whole: Store, tmp_path: Path, kind: str, operation: str) -> None:
    """Refused with 13 where it is needed; never taken for damage that may be put right, replaced or removed."""
    path = copied(whole, tmp_path)
    if kind == "object":
        files = newer_object(path)
    else:
        files = {of_kind(path, kind)[0]}
        for file in files:
            file.write_bytes(newer(file.read_bytes()))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    try:
        found = OPERATIONS[operation](path)
        assert operation not in REFUSED[kind]
        if isinstance(found, Report):
            assert "newer" in " ".join(damage.reason for damage in found.damaged)
    except MismatchError as error:
        assert operation in REFUSED[kind]
        assert "use a newer rwkv-stream" in str(error)
    for file in files:
        assert file.read_bytes() == before[file]
    if kind == "format":
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


# ---- machines that fail ----


class FailingDisk:
    """From the `at`-th step that changes the disk on, that one alone or every one fails for want of space."""

    STEPS = (
        *((os, name) for name in ("fsync", "replace", "mkdir", "link")),
        *((Path, "unlink"), (Catalog, "changing")),
    )

    def __init__(self, patch: pytest.MonkeyPatch, at: int, *, is_lasting: bool) -> None:
        self.at, self.is_lasting, self.passed = at, is_lasting, 0
        for holder, name in self.STEPS:
            patch.setattr(holder, name, self._counted(getattr(holder, name), is_freeing=name == "unlink"))
        for holder, name in ((os, "fdopen"), (io, "open")):
            patch.setattr(holder, name, self._opening(getattr(holder, name)))

    def step(self, *, is_freeing: bool = False) -> None:
        self.passed += 1
        if self.passed == self.at or (self.passed > self.at and self.is_lasting and not is_freeing):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _counted(self, real: Callable[..., Any], *, is_freeing: bool) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            self.step(is_freeing=is_freeing)
            return real(*args, **kwargs)

        return function

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        class Writer(io.BufferedWriter):
            def write(self, data: Any, /) -> int:
                super().write(data[: len(data) // 2])
                disk.step()
                return super().write(data[len(data) // 2 :])

            def flush(self) -> None:
                super().flush()
                if not self.closed:
                    disk.step()

        def function(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode in ("wb", "xb"):
                return Writer(io.FileIO(file, mode))
            return real(file, mode, *args, **kwargs)

        return function


def damage(path: Path) -> None:
    """A head and an object of a library spoilt, a tag lost."""
    head, object_, tag = (of_kind(path, kind)[0] for kind in ("head", "object", "tag"))
    head.write_bytes(b"rot")
    object_.write_bytes(b"rot")
    tag.unlink()


def leave_to_prune(path: Path) -> None:
    """What was superseded, removed and left behind in a library."""
    store = Store(path)
    read(store, "book.txt", "another edition", n=1)
    store.rm(store.get("other.log").id)


def export(path: Path) -> None:
    with publishing(path / "exported") as file:
        Store(path).export(["book.txt", "a fork"], file)


@functools.cache
def to_import() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        other, file = Store(Path(folder) / "other.store", create=True), io.BytesIO()
        read(other, "imported.txt", "an imported text", n=2)
        other.export(["imported.txt"], file)
    return file.getvalue()


def import_(path: Path) -> None:
    Store(path).import_(io.BytesIO(to_import()))


def untag(path: Path) -> None:
    with contextlib.suppress(NotFoundError):  # it was, by the try that failed
        Store(path).untag("half")


def rm(path: Path) -> None:
    chain = digest("another text", 32)
    state = fake_state(int(chain[:8], 16)).digest()
    with contextlib.suppress(NotFoundError):
        Store(path).rm(records.snapshot_id(MODEL, START, chain, 32, state))


CHANGES: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "ingest": (lambda path: None, lambda path: read(Store(path), "more.txt", "more", n=2)),
    "the first ingest": (shutil.rmtree, lambda path: read(Store(path, create=True), "more.txt", "more", n=1)),
    "tag": (lambda path: None, lambda path: Store(path).tag("new", Store(path).get("book.txt@16").id)),
    "untag": (lambda path: None, untag),
    "rm": (lambda path: None, rm),
    "rebuild": (lambda path: None, lambda path: Store(path).rebuild()),
    "prune": (leave_to_prune, lambda path: Store(path).prune()),
    "repair": (damage, Store.repair),
    "export": (lambda path: None, export),
    "import": (lambda path: None, import_),
}
EVERY_STEP_IN_CI = 4  # one of so many


@pytest.mark.parametrize("change", CHANGES)
def test_no_space_at_any_step(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, change: str
) -> None:
    """Each change fails as a whole or is done; what was there stays; once there is space it is done as ever."""
    prepare, work = CHANGES[change]
    path = copied(whole, tmp_path)
    prepare(path)
    before = shutil.copytree(path, tmp_path / "before") if path.exists() else None
    kept = told(Store(path)) if before is not None and change != "repair" else None
    work(path)
    after = told(Store(path))
    step = 1 if request.config.getoption("--all-moments") else EVERY_STEP_IN_CI
    at, n_failed, is_through = 1, 0, False
    while not is_through:
        shutil.rmtree(path)
        if before is not None:
            shutil.copytree(before, path)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, at, is_lasting=at // step % 2 == 1)
            try:
                work(path)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                n_failed += 1
            is_through = disk.passed < at
        at += step
        if kept is not None and change not in ("prune", "rm", "untag"):
            now = told(Store(path))
            assert kept["snapshots"].items() <= now["snapshots"].items()
            assert kept["heads"].items() <= now["heads"].items()
            assert kept["tags"].items() <= now["tags"].items()
        if change != "repair" and (path / "format").exists():
            assert Store(path).verify(read_data=True).damaged == []
        work(path)
        assert told(Store(path)) == after
        assert Store(path).verify(read_data=True).damaged == []
        Store(path).prune()
        assert_nothing_stray(path)
        assert told(Store(path)) == after
    assert n_failed > 0


@pytest.mark.parametrize("change", CHANGES)
def test_writes_that_are_cut_short(whole: Store, tmp_path: Path, change: str) -> None:
    """The system writes a part of what it was given, then no more: here at a limit on the size of files."""
    prepare, work = CHANGES[change]
    path = copied(whole, tmp_path)
    prepare(path)
    before = shutil.copytree(path, tmp_path / "before") if path.exists() else None
    work(path)
    after = told(Store(path))

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with contextlib.suppress(OSError):
            work(path)

    for size in (0, 13, 700, 1100, 5000, 40_000, 75_000):
        shutil.rmtree(path)
        if before is not None:
            shutil.copytree(before, path)
        assert in_child(functools.partial(limited, size)) == 0
        if change != "repair" and (path / "format").exists():
            assert Store(path).verify(read_data=True).damaged == []
        work(path)
        assert told(Store(path)) == after
        assert Store(path).verify(read_data=True).damaged == []
        assert_nothing_stray(path)


def test_an_export_into_a_file_that_takes_less_than_given(whole: Store) -> None:
    class Half(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def write(self, data: Any, /) -> int:
            taken = bytes(data)[: max(1, len(data) // 2)]
            self.data += taken
            return len(taken)

    whole_file, half = io.BytesIO(), Half()
    whole.export(["book.txt~3"], whole_file)
    with contextlib.suppress(OSError):
        report = whole.export(["book.txt~3"], half)  # type: ignore[arg-type]
        assert len(half.data) == report.bytes == len(whole_file.getvalue())


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


NOBODY = 65534


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users may look into, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody whom permissions bind")
@pytest.mark.parametrize(
    ("what", "tokens"),
    [("", 16), ("objects", 16), ("records", 16), ("refs/heads", 16), ("catalog.sqlite", 32), ("locks", 16)],
)
def test_permission_lost_while_reading(whole: Store, shared_folder: Path, what: str, tokens: int) -> None:
    """What was published stays; who may write again goes on."""
    path = copied(whole, shared_folder)
    inside = [path, *path.rglob("*")]
    for file in inside:
        os.chown(file, NOBODY, NOBODY)

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        store = Store(path)
        with pytest.raises(OSError, match=r"(?i)permission|read-only"):  # noqa: SIM117
            with store.writing("more.txt", MODEL):
                first = put(store, fake(16, "more", document="more.txt"))
                store.move_head("more.txt", MODEL, first.id)
                lost = [path / what, *(path / what).rglob("*")] if (path / what).is_dir() else [path / what]
                for file in lost:
                    file.chmod(0o555 if file.is_dir() else 0o444)
                second = put(store, fake(32, "more", document="more.txt", parent=first.id))
                store.move_head("more.txt", MODEL, second.id)

    assert in_child(child) == 0
    for file in [path, *path.rglob("*")]:
        file.chmod(0o755 if file.is_dir() else 0o644)
    store = Store(path)
    assert store.get("more.txt").tokens == tokens
    assert store.verify(read_data=True).damaged == []
    assert_nothing_stray(path)
    assert told(whole)["snapshots"].items() <= told(store)["snapshots"].items()
    assert [s.tokens for s in read(store, "more.txt", "more", n=2)] == [16, 32]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody whom permissions bind")
@pytest.mark.parametrize("kind", ["record", "head", "tag", "object", "text"])
def test_a_file_that_may_not_be_read_is_no_damage(whole: Store, shared_folder: Path, kind: str) -> None:
    """Who may not read it is told so; `repair` does not take what its user may not see for lost."""
    path = copied(whole, shared_folder)
    for file in [path, *path.rglob("*")]:
        os.chown(file, NOBODY, NOBODY)
    victim = of_kind(path, kind)[0]
    victim.chmod(0)
    os.chown(victim, 0, 0)

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        (path / "catalog.sqlite").unlink()
        with pytest.raises(PermissionError):
            Store.repair(path)

    assert in_child(child) == 0
    assert victim.exists()
    victim.chmod(0o644)
    assert Store.repair(path) == Repaired()
    assert told(Store(path)) == told(whole)


# ---- time ----


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock shows an earlier second than the one before."""
    seconds = itertools.count(2_000_000_000, -1)
    monkeypatch.setattr(time, "gmtime", lambda *_: time.localtime(next(seconds)))


def test_a_clock_that_goes_backwards(whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backwards(monkeypatch)
    store = library(tmp_path / "a.store")
    assert told(store) == told(whole)
    created = [store.get(f"book.txt@{tokens}").created for tokens in (16, 32, 48, 64)]
    assert created == sorted(created, reverse=True) and len(set(created)) == 4
    assert [store.get(ref).tokens for ref in ("book.txt", "book.txt~1", "book.txt~3", "book.txt@50%")] == [
        64,
        48,
        16,
        32,
    ]
    assert [s.tokens for s in store.list("book.txt", sort="tokens")] == [16, 32, 48, 64]
    library(store.path)
    assert told(store) == told(whole)
    assert store.prune().snapshots == 0
    assert store.verify(read_data=True).damaged == []


def test_a_head_lost_after_the_clock_went_backwards(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes on from another is newer than it, whatever the clock said."""
    backwards(monkeypatch)
    path = library(tmp_path / "a.store").path
    of_kind(path, "head")[0].write_bytes(b"rot")
    (path / "catalog.sqlite").unlink()
    Store.repair(path)
    assert told(Store(path)) == told(whole)


def test_a_reading_goes_on_though_the_clock_went_backwards(
    tmp_path: Path, bytes_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The keeper lit the lamp over the sea. " * 12)

    def reading(store: Store, **options: Any) -> ReadingReport:
        return ingest(
            str(text), name="text.txt", model=bytes_model, store=store, chunk=16, snapshot_every=64, **options
        )

    right = reading(Store(tmp_path / "right.store", create=True))
    backwards(monkeypatch)
    store = Store(tmp_path / "a.store", create=True)
    reading(store, max_tokens=200)
    went_on = reading(store)
    assert went_on.resumed_from_token == 192
    assert went_on.snapshot == right.snapshot
    assert {s.id for s in Store(tmp_path / "right.store").list()} <= {s.id for s in store.list()}
    assert reading(store).snapshots_written == 0


# ---- what the user sees ----

SEEN: dict[str, tuple[str, str, str, int, str]] = {  # fault: kind, fault, command, exit code, part of the message
    "no format": ("format", "missing", "list", 10, "expected a store, found none"),
    "a damaged format": ("format", "truncated", "list", 12, "run `rwkv-stream snapshots repair`"),
    "a newer store": ("format", "newer", "list", 13, "use a newer rwkv-stream"),
    "a damaged record": ("newest record", "truncated", "show book.txt", 12, "run `rwkv-stream snapshots repair`"),
    "a lost record": ("newest record", "missing", "show book.txt", 12, "expected a snapshot that exists"),
    "a newer record": ("newest record", "newer", "show book.txt", 13, "use a newer rwkv-stream"),
    "a damaged head": ("head", "truncated", "show book.txt", 12, "run `rwkv-stream snapshots repair`"),
    "a damaged tag": ("tag", "truncated", "show half", 12, "run `rwkv-stream snapshots repair`"),
    "a lost tag": ("tag", "missing", "show half", 10, "expected a tag, a document or an id, found none"),
    "a damaged object": ("object", "flip in a frame", "verify --read-data", 12, "found 1 damaged"),
    "a damaged object, exported": ("object", "flip in a frame", "export half -o x", 12, "changed since"),
    "a lost object": ("object", "missing", "verify", 12, "run `rwkv-stream snapshots repair`"),
    "a bad sector": ("object", "unreadable", "export half -o x", 12, "Input/output error"),
    "prune on damage": ("record", "truncated", "prune", 12, "expected every record and ref whole"),
    "repair": ("object", "flip in a frame", "repair", 0, "lost 1 snapshots"),
    "repair of a newer record": ("record", "newer", "repair", 13, "use a newer rwkv-stream"),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_the_user_sees(whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, fault, command, code, message = SEEN[name]
    path = copied(whole, tmp_path)
    monkeypatch.chdir(tmp_path)
    if fault == "newer":
        file = of_kind(path, kind)[0]
        file.write_bytes(newer(file.read_bytes()))
    else:
        inflict(path, kind, fault, monkeypatch)
    ended = program("snapshots", *command.split(), "--store", path)
    assert ended.code == code, ended.err
    assert message in ended.err
    assert not (tmp_path / "x").exists(), "no half of an export is left"


def test_a_full_disk_ends_with_1(whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(whole, tmp_path)
    with monkeypatch.context() as patch:
        FailingDisk(patch, 1, is_lasting=True)
        ended = program("snapshots", "tag", "book.txt", "new", "--store", path)
    assert ended.code == 1
    assert "No space left on device" in ended.err and "what was published is kept" in ended.err
    assert told(Store(path)) == told(whole)
