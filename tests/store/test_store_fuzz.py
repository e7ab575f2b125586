"""Files that somebody made up: read right or refused with 12 or 13, in little time and memory, nothing else touched.

Every case is drawn by hypothesis through one source of chance, so that what fails is made smaller and can be repeated.
The cases run in a child whose memory is limited; `--all-moments` runs 10,000 of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zstandard
from fake_snapshots import MODEL, digest, library, read, short, told
from fuzzing import cases, mutated, within_bounds
from program import program

from rwkv_stream.errors import MismatchError, SnapshotError, UsageError
from rwkv_stream.store import Store, cache, records, sealed, texts
from rwkv_stream.store.layout import StoreFiles, files
from rwkv_stream.store.records import Head, Snapshot, StoredObject, Tag


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill does not lose what was written, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = library(tmp_path_factory.mktemp("whole") / "a.store")
    short(store)
    return store


@pytest.fixture
def share(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How many of so many cases are run."""
    return lambda n: n if request.config.getoption("--all-moments") else max(20, n * 15 // 100)


# ---- bytes ----


NASTY: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([-(2**63), -1, 0, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]),
    lambda rng: rng.choice([math.nan, math.inf, -math.inf, -0.0, 1e308]),
    lambda rng: rng.choice(["", "x", "x" * 60_000, "../../x", "/etc/passwd", "a\0b", "\u202e", "A" * 64, "f" * 64]),
    lambda rng: rng.choice([b"", b"\xff" * 64, bytes(60_000)]),
    lambda rng: digest(rng.random()),
    lambda rng: nested(rng.choice([2, 50, 600, 5000])),
    lambda rng: [[]] * rng.choice([1, 64, 65, 10_000]),
    lambda rng: {str(i): i for i in range(rng.choice([1, 1000]))},
    lambda rng: msgpack.ExtType(rng.choice([0, 5, 127]), b"x" * rng.choice([0, 4, 12, 300])),
    lambda rng: msgpack.Timestamp(rng.choice([0, 2**33])),
]


def nested(depth: int) -> msgpack.ExtType | list[Any]:
    inner: list[Any] = []
    for _ in range(min(depth, 500)):  # what the packer packs; `deep` makes the rest
        inner = [inner]
    return inner


def changed(rng: random.Random, values: Any) -> Any:
    """A map or list with one to three values of any depth replaced, taken away or added."""
    for _ in range(rng.randint(1, 3)):
        place = values
        while isinstance(place, dict | list) and place:
            key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
                place = place[key]
                continue
            match rng.randrange(6):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[rng.choice(["", "x", "codec", "objects", "__class__"])] = rng.choice(NASTY)(rng)
                case 1:
                    place.append(place[key])
                case _:
                    place[key] = rng.choice(NASTY)(rng)
            break
    return values


def repacked(rng: random.Random, body: bytes) -> bytes:
    """A msgpack map with some of its values, or some of its bytes, changed."""
    match rng.randrange(4):
        case 0:
            return mutated(rng, body)
        case 1:  # too deep for a packer
            key = msgpack.packb(rng.choice(["document", "tensors", "objects", "numerics"]))
            return b"\x81" + key + rng.choice([b"\x91", b"\x81\xa1x"]) * rng.choice([600, 20_000]) + b"\xc0"
        case _:
            packed: bytes = msgpack.packb(changed(rng, msgpack.unpackb(body)))
            return packed


def with_checksum(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


# ---- records, heads, tags, format ----


def small_files() -> dict[str, tuple[bytes, Callable[[bytes], Any], Callable[[Any], bytes] | None]]:
    """Of each kind: a file, what reads it, what writes what was read."""
    where = Path("x")
    now = "2025-01-01T00:00:00Z"
    head, tag = Head("book.txt", MODEL, digest("x"), "utf-8", now), Tag("here", digest("x"), now)
    return {
        "format": (sealed.encode_format(), lambda data: sealed.decode_format(data, where), None),
        "head": (
            records.encode_head(head),
            lambda data: records.decode_head(data, where),
            records.encode_head,
        ),
        "tag": (
            records.encode_tag(tag),
            lambda data: records.decode_tag(data, where),
            records.encode_tag,
        ),
    }


def small_case(
    rng: random.Random, whole: bytes, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes] | None
) -> None:
    match rng.randrange(4):
        case 0:
            data = mutated(rng, whole)
        case 1:
            data = with_checksum(mutated(rng, whole[:-32]))
        case 2:
            version = rng.choice([0, 1, 1, 2, 3, 2**32 - 1])
            data = with_checksum(whole[:8] + struct.pack("<I", version) + repacked(rng, whole[12:-32]))
        case _:
            data = with_checksum(whole[:12] + repacked(rng, whole[12:-32]))
    try:
        found = decode(data)
    except (SnapshotError, MismatchError) as error:
        assert len(str(error)) < 2000, "no error is as long as the file"
        return
    if encode is not None:
        written = msgpack.unpackb(encode(found)[12:-32])
        for name, value in msgpack.unpackb(data[12:-32]).items():
            assert written[name] == value, "what it read is what was there"
    if isinstance(found, Snapshot):
        json.dumps(found.facts())
        assert len({found}) == 1
        with contextlib.suppress(SnapshotError, MismatchError, UsageError):
            found.state()
        with contextlib.suppress(SnapshotError, MismatchError):
            text = found.reader.text(found)
            assert text is None or len(text.read(0, found.bytes)) == found.bytes


@pytest.mark.parametrize("kind", ["format", "head", "tag"])
def test_made_up_small_files(kind: str, share: Callable[[int], int]) -> None:
    data, decode, encode = small_files()[kind]
    cases(lambda rng: small_case(rng, data, decode, encode), share(600))


@pytest.mark.parametrize("version", range(1, sealed.VERSIONS[sealed.RECORD] + 1))
def test_made_up_records(whole: Store, version: int, share: Callable[[int], int]) -> None:
    added = sealed._ADDED[sealed.RECORD].items()
    later = {name: value for since, names in added if since > version for name, value in names.items()}
    known = {"sampled_bits": 7.5, "sampled_tokens": 3, "norms": {"att_kv": [2.5, None]}, "drift": {"att_kv": 0.5}}
    half = replace(whole.get("half" if "inline_extent" in later else "note.txt"), **known | later)
    data = records.encode_record(half)
    values = {name: value for name, value in msgpack.unpackb(data[12:-32]).items() if name not in later}
    data = with_checksum(data[:8] + struct.pack("<I", version) + msgpack.packb(values))

    def decode(data: bytes) -> Snapshot:
        return records.decode_record(data, whole._files, Path("x"))

    assert decode(data) == half
    cases(lambda rng: small_case(rng, data, decode, records.encode_record), share(1200))


# ---- objects ----


@dataclass
class Parts:
    """An object taken apart; put together again its lengths are right unless somebody lied."""

    header: dict[str, Any]
    frames: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> Parts:
        end = 16 + struct.unpack_from("<8sII", data)[2]
        header, frames, at = msgpack.unpackb(data[16:end]), [], end
        for _, _, size in header["tensors"]:
            frames.append(data[at : at + size])
            at += size
        return cls(header, frames)

    def joined(self, header: bytes | None = None, length: int | None = None, version: int = 1) -> bytes:
        packed = msgpack.packb(self.header) if header is None else header
        length = len(packed) if length is None else length
        return struct.pack("<8sII", b"rwkv-obj", version, length) + packed + b"".join(self.frames)

    def relength(self) -> Parts:
        for tensor, frame in zip(self.header["tensors"], self.frames, strict=True):
            tensor[2] = len(frame)
        return self


def frames(rng: random.Random, frame: bytes) -> bytes:
    """What may lie in the place of a zstd frame."""
    raw = zstandard.decompress(frame)
    match rng.randrange(10):
        case 0:
            return mutated(rng, frame)
        case 1:  # as long as it should be, other values
            return zstandard.compress(mutated(rng, raw)[: len(raw)].ljust(len(raw), b"\0"))
        case 2:  # far longer than it should be
            return zstandard.compress(bytes(1 << rng.choice([16, 20, 26])))
        case 3:  # far longer than it says
            return understated(1 << rng.choice([16, 20, 26]), len(raw))
        case 4:
            return zstandard.ZstdCompressor(write_content_size=False).compress(raw)
        case 5:
            return frame + rng.choice([b"\0", frame, b"\x50\x2a\x4d\x18\x04\0\0\0abcd"])
        case 6:  # a frame to be skipped
            return b"\x50\x2a\x4d\x18" + struct.pack("<I", rng.choice([0, 4, 2**32 - 1])) + b"abcd"
        case 7:  # it says that it holds terabytes
            return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", rng.choice([1 << 40, 2**64 - 1])) + frame[6:]
        case 8:  # a window of gigabytes
            return b"\x28\xb5\x2f\xfd\x00\xff" + frame[6:]
        case _:
            return zstandard.compress(raw[: rng.randrange(len(raw))])


def understated(size: int, said: int) -> bytes:
    """A frame of so many zeros, in runs of 128 KiB or less, that says it holds other than that."""
    runs = [1 << 17] * (size >> 17) or [size]
    blocks = [struct.pack("<I", run << 3 | 1 << 1 | (i == len(runs) - 1))[:3] + b"\0" for i, run in enumerate(runs)]
    return b"\x28\xb5\x2f\xfd\x80\x58" + struct.pack("<I", said) + b"".join(blocks)


def object_case(rng: random.Random, whole: bytes, snapshot: Snapshot, folder: Path) -> None:
    parts = Parts.of(whole)
    state_bytes = snapshot.state_bytes
    match rng.randrange(7):
        case 0:
            data = mutated(rng, whole)
        case 1:
            data = parts.joined(repacked(rng, msgpack.packb(parts.header)))
        case 2:
            data = parts.joined(
                length=rng.choice([0, 1, 65_536, 65_537, 2**31, 2**32 - 1]), version=rng.choice([0, 1, 9])
            )
        case 3:
            i = rng.randrange(len(parts.frames))
            parts.frames[i] = frames(rng, parts.frames[i])
            data = parts.relength().joined()
        case 4:  # frames change places, or one goes
            rng.shuffle(parts.frames)
            del parts.frames[: rng.randrange(2)]
            data = parts.joined()
        case 5:  # a bomb whose header and record agree with it
            size = 1 << rng.choice([16, 20, 26, 28, 29, 31])
            shape = rng.choice([[size // 4], [1, size // 64, 16], [2**31, 2**31], [size // 4, 2**31]])
            i = rng.randrange(len(parts.frames))
            parts.frames[i] = zstandard.compress(bytes(min(size, 1 << 26)))
            parts.header["tensors"][i][1] = shape
            data = parts.relength().joined()
            state_bytes = 4 * sum(math.prod(shape) for _, shape, _ in parts.header["tensors"])
        case _:  # lengths that add up, moved from one tensor to another
            one, two = rng.sample(parts.header["tensors"], 2)
            n = rng.randint(0, one[2])
            one[2], two[2] = one[2] - n, two[2] + n
            data = parts.joined()
    name = hashlib.sha256(data).hexdigest()
    path = StoreFiles(folder).objects.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    stored = StoredObject(name, "exact", rng.choice([len(data)] * 9 + [len(data) + 1]))
    lying = replace(snapshot, objects=(stored,), state_bytes=state_bytes, reader=StoreFiles(folder))
    try:
        state, last_hidden = lying.state(), lying.last_hidden()
    except (SnapshotError, MismatchError) as error:
        assert len(str(error)) < 2000
    else:
        assert state.digest() == snapshot.state_digest
        assert last_hidden.dtype.is_floating_point
    path.unlink()


def test_made_up_objects(whole: Store, tmp_path: Path, share: Callable[[int], int]) -> None:
    snapshot = whole.get("half")
    data = snapshot.reader.objects.read(snapshot.objects[0])
    assert Parts.of(data).joined() == data
    assert zstandard.decompress(understated(1 << 20, 1 << 20)) == bytes(1 << 20), "but for what it says it is good"
    cases(lambda rng: object_case(rng, data, snapshot, tmp_path), share(3000))


def test_bombs_take_no_memory(whole: Store, tmp_path: Path) -> None:
    """They are refused by what they say, before a byte is unpacked; what says little is given no more."""
    snapshot = whole.get("half")
    said: dict[str, tuple[list[int], bytes]] = {
        "terabytes": ([1 << 20, 1 << 18], b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + bytes(64)),
        "more than 64 times its size": ([1 << 27], zstandard.compress(bytes(1 << 24))),
        "more than it says": ([1, 2, 8], understated(1 << 26, 64)),
    }

    def work() -> None:
        for name, (shape, frame) in said.items():
            parts = Parts.of(snapshot.reader.objects.read(snapshot.objects[0]))
            parts.frames[0] = frame
            parts.header["tensors"][0][1] = shape
            data = parts.relength().joined()
            stored = StoredObject(hashlib.sha256(data).hexdigest(), "exact", len(data))
            path = StoreFiles(tmp_path).objects.path(stored.name)
            path.parent.mkdir(parents=True)
            path.write_bytes(data)
            state_bytes = 4 * sum(math.prod(shape) for _, shape, _ in parts.header["tensors"])
            with pytest.raises(SnapshotError):
                replace(snapshot, objects=(stored,), state_bytes=state_bytes, reader=StoreFiles(tmp_path)).state()
                pytest.fail(name)

    within_bounds(work, 32 << 20)


# ---- texts ----


def made_text(rng: random.Random, data: bytes, bombs: list[bytes]) -> bytes:
    """An extent with its header, its frame or any byte changed, under right checksums where they can be."""
    end = 16 + int.from_bytes(data[12:16], "little")
    header, frame = data[16:end], data[end + 32 :]
    match rng.randrange(4):
        case 0:
            return mutated(rng, data)
        case 1:
            header = repacked(rng, header)
        case 2:
            content = mutated(rng, zstandard.decompress(frame))
            frame = zstandard.compress(content)
            header = msgpack.packb(
                {**msgpack.unpackb(header), "frame": len(frame), "places": rng.choice([len(content), 7])}
            )
        case _:
            frame = rng.choice(bombs)
            header = msgpack.packb(
                {**msgpack.unpackb(header), "frame": len(frame), "places": 1 << rng.choice([20, 27])}
            )
    prefix = data[:12] + struct.pack("<I", len(header)) + header
    return prefix + hashlib.sha256(prefix).digest() + frame


def test_made_up_texts(whole: Store, share: Callable[[int], int]) -> None:
    data = next(files(whole._files.texts.folder)).read_bytes()
    bombs = [zstandard.compress(bytes(n)) for n in (0, 1 << 20, 1 << 27)]

    def case(rng: random.Random) -> None:
        made = made_text(rng, data, bombs)
        where = Path(hashlib.sha256(made).hexdigest())
        try:
            found = texts.decode(made, where)
        except (SnapshotError, MismatchError):
            return
        assert found.extent.size == len(found.text) and found.place_at(found.extent.byte_start) is not None

    cases(case, share(1000))


# ---- states that were made ----


def test_made_up_states(whole: Store, tmp_path: Path, share: Callable[[int], int]) -> None:
    """Whatever a file of the cache says: its state is the one that its record names, or it is made again."""
    half = whole.get("half")
    made = replace(half, how=records.POSITION, inline_extent=b"an extent", objects=())
    data = cache.encode(made, half.arrays())
    kept = cache.Cache(StoreFiles(tmp_path))
    path = kept.path("ab" * 32)
    path.parent.mkdir(parents=True)
    lengths = struct.unpack_from("<II", data, 12)

    def case(rng: random.Random) -> None:
        match rng.randrange(4):
            case 0:
                found = mutated(rng, data)
            case 1:
                found = with_checksum(mutated(rng, data[:-32]))
            case 2:
                found = with_checksum(data[:12] + struct.pack("<II", *(rng.choice([n, 0, 2**32 - 1]) for n in lengths)))
            case _:
                record = data[20 : 20 + lengths[0]]
                record = with_checksum(record[:12] + repacked(rng, record[12:-32]))
                head = data[:12] + struct.pack("<II", len(record), lengths[1]) + record
                found = with_checksum(head + data[20 + lengths[0] : -32])
        path.write_bytes(found)
        loaded = kept.load(path.name)
        list(kept.listed())
        if loaded is not None:
            snapshot, arrays = loaded
            assert snapshot.state_digest == half.state_digest
            assert all((arrays[name] == array).all() for name, array in half.arrays().items())

    cases(case, share(600))
    path.write_bytes(data)
    loaded = kept.load(path.name)
    assert loaded is not None and (loaded[0].id, loaded[0].inline_extent) == (half.id, b"an extent")


# ---- exports ----


Member = tuple[tarfile.TarInfo, bytes]


def members(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def packed(content: list[Member], *, is_ended: bool = True) -> bytes:
    """A tar of these members, whatever they say, byte by byte."""
    blocks = []
    for info, data in content:
        blocks += [info.tobuf(tarfile.GNU_FORMAT), data, bytes(-len(data) % 512)]
    return b"".join(blocks) + bytes(1024 if is_ended else 0)


def member(name: str, data: bytes = b"", **changes: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def of_object(data: bytes, kind: str = "objects") -> Member:
    name = hashlib.sha256(data).hexdigest()
    return member(f"{kind}/{name[:2]}/{name}", data)


def listing(path: Path) -> dict[str, str]:
    """All that lies in a folder, with digests, but for locks and what sqlite keeps beside the catalog."""
    return {
        str(found.relative_to(path)): hashlib.sha256(found.read_bytes()).hexdigest() if found.is_file() else "a folder"
        for found in path.rglob("*")
        if "locks" not in found.parts and not found.name.endswith(("-wal", "-shm"))
    }


@dataclass
class Hall:
    """An export, and a store of another folder that it is brought to."""

    whole: bytes
    folder: Path
    target: Store

    def __post_init__(self) -> None:
        self.before = listing(self.folder)

    def assert_refused(self, data: bytes, errors: Any = SnapshotError) -> None:
        with pytest.raises(errors):
            Store(self.target.path).import_(io.BytesIO(data))
        assert listing(self.folder) == self.before


@pytest.fixture
def hall(whole: Store, tmp_path: Path) -> Hall:
    file = io.BytesIO()
    whole.export(["book.txt", "other.log", "a fork", "note.txt"], file)
    folder = tmp_path / "hall"
    folder.mkdir()
    (folder / "beside").write_text("to stay as it is")
    target = Store(folder / "target.store", create=True)
    read(target, "mine.txt", "mine", n=2)
    return Hall(file.getvalue(), folder, target)


def test_an_export_taken_apart_is_one_again(hall: Hall, whole: Store) -> None:
    assert packed(members(hall.whole)) == hall.whole
    hall.target.import_(io.BytesIO(hall.whole))
    there = told(hall.target)
    assert told(whole)["snapshots"].items() <= there["snapshots"].items()
    assert hall.target.verify(read_data=True).damaged == []


GOOD_TAG = records.encode_tag(Tag("x", digest("x"), "now"))


def hostile_members() -> Iterator[tuple[str, Member]]:
    data = GOOD_TAG
    for name in (
        *(
            "/tmp/rwkv-was-here",
            "../was-here",
            "objects/../../was-here",
            "objects/ab/..",
            "refs/tags/..",
            "refs/tags/.",
        ),
        *("refs/tags/../../../was-here", "./format", "format/x", "objects", "objects/ab", "refs/tags/", "records//x"),
        *(
            "locks/store",
            "catalog.sqlite",
            "quarantine/x",
            ".tmp-x",
            "refs/tags/.tmp-x",
            "refs\\tags\\x",
            "x",
            " format",
        ),
        *("refs/tags/a b", "refs/tags/%2E%2E", "refs/tags/%2F", "refs/tags/é", "objects/ab/" + "ab" * 32, "FORMAT"),
        *("objects/AB/" + "AB" * 32, "objects/cd/" + "ab" * 32, "records/ab/" + "ab" * 31, "refs/heads/" + "a" * 63),
    ):
        yield f"a file {name}", member(name, data)
    for letter, kind in {
        **{"1": "hard link", "2": "symbolic link", "3": "character device", "4": "block device", "5": "folder"},
        **{"6": "pipe", "7": "contiguous file", "S": "sparse file", "D": "dump", "M": "volume", "V": "label"},
        **{"x": "pax header", "X": "Sun header", "g": "global header", "K": "long link", "Z": "what nobody knows"},
    }.items():
        yield f"a {kind}", member("refs/tags/x", data, type=letter.encode(), linkname="/etc/passwd")
    for letter in "xgKL":
        for size in (1 << 33, 1 << 62):
            yield f"a header {letter} of {size} bytes", member("x", type=letter.encode(), size=size)
    long_name = b"../" * 20 + b"was-here\0"
    yield "a long name that leads out", member("././@LongLink", long_name, type=b"L")
    for size in (1 << 16, 1 << 40, 1 << 62, -1, -(1 << 40)):
        yield f"a tag of {size} bytes", member("refs/tags/x", data, size=size)
        yield f"an object of {size} bytes", member(of_object(data)[0].name, data, size=size)
    yield "a size one too small", member("refs/tags/x", data, size=len(data) - 1)
    yield "a size one too large", member("refs/tags/x", data, size=len(data) + 1)
    yield "format again", member("format", sealed.encode_format())
    yield "a tag on what is not there", member("refs/tags/x", data)


HOSTILE = dict(hostile_members())


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(hall: Hall, name: str, is_first: bool) -> None:
    content = members(hall.whole)
    content.insert(1 if is_first else len(content), HOSTILE[name])
    within_bounds(lambda: hall.assert_refused(packed(content)), 64 << 20)
    assert listing(hall.folder) == hall.before
    assert not Path("/tmp/rwkv-was-here").exists()


def find(content: list[Member], start: str) -> int:
    return next(i for i, (info, _) in enumerate(content) if info.name.startswith(start))


def test_a_long_name_of_ours_is_read(hall: Hall) -> None:
    """Tags whose quoted names do not fit a header are there under a header of their own."""
    name = "long name " * 9 + "end"
    other = hall.target.get("mine.txt")
    hall.target.tag(name, other.id)
    file = io.BytesIO()
    hall.target.export([name], file)
    assert b"././@LongLink" in file.getvalue()
    target = Store(hall.folder / "third.store", create=True)
    file.seek(0)
    assert target.import_(file).tags == [name]


KINDS = ["format", "objects/", "texts/", "records/", "refs/heads/", "refs/tags/"]
FAULTS = [
    (kind, fault)
    for kind in KINDS
    for fault in ("missing", "twice", "empty", "flipped", "longer", "newer")
    if (fault != "missing" or not kind.startswith("refs/"))  # an export may have fewer names
    and (fault != "newer" or kind not in ("objects/", "texts/"))  # its name would be another, see below
]


@pytest.mark.parametrize(("kind", "fault"), FAULTS)
def test_a_fault_in_one_member(hall: Hall, kind: str, fault: str) -> None:
    content = members(hall.whole)
    i = find(content, kind)
    info, data = content[i]
    if fault == "missing":
        del content[i]
    elif fault == "twice":
        content.append(content[i])
    else:
        if fault == "newer":
            data = with_checksum(data[:8] + struct.pack("<I", 99) + data[12:-32])
        else:
            at = len(data) // 2
            flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
            data = {"empty": b"", "flipped": flipped, "longer": data + b"\0"}[fault]
        content[i] = member(info.name, data)
    hall.assert_refused(packed(content), MismatchError if fault == "newer" else SnapshotError)


def test_records_whose_object_or_parent_is_not_in_the_file(hall: Hall, whole: Store) -> None:
    newest = whole.get("book.txt")
    for gone in (newest.objects[0].name, str(newest.parent)):
        content = [(info, data) for info, data in members(hall.whole) if not info.name.endswith(gone)]
        assert len(content) == len(members(hall.whole)) - 1
        hall.assert_refused(packed(content))


def test_an_object_of_a_newer_version(hall: Hall, whole: Store) -> None:
    half = whole.get("half")
    data = half.reader.objects.read(half.objects[0])
    data = data[:8] + struct.pack("<I", 9) + data[12:]
    stored = of_object(data)
    record = replace(half, objects=(StoredObject(Path(stored[0].name).name, "exact", len(data)),))
    content = [(info, data) for info, data in members(hall.whole) if half.id not in info.name]
    path = whole._files.record_path(half.id).relative_to(whole.path)
    content[1:1] = [stored, member(str(path), records.encode_record(record))]
    hall.assert_refused(packed(content), MismatchError)


@pytest.mark.parametrize("n_bytes", [0, 1, 511, 512, 1024, 2048])
def test_what_is_no_archive(hall: Hall, n_bytes: int) -> None:
    for data in (bytes(n_bytes), b"\xff" * n_bytes, hall.whole[:n_bytes], b"\x1f\x8b" + bytes(n_bytes)):
        hall.assert_refused(data)


def test_archives_without_an_end(hall: Hall) -> None:
    content = members(hall.whole)
    hall.assert_refused(packed(content, is_ended=False))
    hall.assert_refused(packed(content, is_ended=False) + bytes(512))


def test_a_bomb_in_an_archive(hall: Hall, whole: Store) -> None:
    half = whole.get("half")
    parts = Parts.of(half.reader.objects.read(half.objects[0]))
    parts.frames[0] = zstandard.compress(bytes(1 << 26))
    parts.header["tensors"][0][1] = [1 << 30]
    stored = of_object(parts.relength().joined())
    size = stored[0].size
    state_bytes = 4 * sum(math.prod(shape) for _, shape, _ in parts.header["tensors"])
    record = replace(half, objects=(StoredObject(Path(stored[0].name).name, "exact", size),), state_bytes=state_bytes)
    content = [(info, data) for info, data in members(hall.whole) if half.id not in info.name]
    path = whole._files.record_path(half.id).relative_to(whole.path)
    content[1:1] = [stored, member(str(path), records.encode_record(record))]
    within_bounds(lambda: hall.assert_refused(packed(content)), 64 << 20)
    assert listing(hall.folder) == hall.before


def test_a_pipe_that_gives_little_at_a_time(hall: Hall, whole: Store) -> None:
    class Trickle(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def read(self, size: int | None = -1, /) -> bytes:
            return self.data.read(min(size or 1, 7))

    hall.target.import_(Trickle(hall.whole))  # type: ignore[arg-type]
    assert told(whole)["snapshots"].items() <= told(hall.target)["snapshots"].items()


def test_the_program_refuses_with_12_or_2(hall: Hall) -> None:
    path = hall.folder.parent / "x.snapshots"
    path.write_bytes(hall.whole[:-2000])
    ended = program("snapshots", "import", path, "--store", hall.target.path)
    assert ended.code == 12
    assert "importing snapshots" in ended.err and "Traceback" not in ended.err
    assert program("snapshots", "import", path.parent / "nowhere", "--store", hall.target.path).code == 2
    assert listing(hall.folder) == hall.before


def export_case(rng: random.Random, hall: Hall, whole_store: StoreFiles) -> None:
    content = members(hall.whole)
    match rng.randrange(6):
        case 0:
            data = mutated(rng, hall.whole)
        case 1:
            rng.shuffle(content)
            data = packed(content[: rng.randint(1, len(content))])
        case 2:
            i = rng.randrange(len(content))
            content[i] = member(content[i][0].name, mutated(rng, content[i][1]))
            data = packed(content)
        case 3:  # a small file changed under its checksum
            small = [i for i, (info, _) in enumerate(content) if not info.name.startswith(("objects/", "texts/"))]
            i = rng.choice(small)
            info, body = content[i]
            content[i] = member(info.name, with_checksum(body[:12] + repacked(rng, body[12:-32])))
            data = packed(content)
        case 4:  # an object or a text changed under its name, without a record of it, or in the place of another
            kind = rng.choice(["objects", "texts"])
            i = find(content, f"{kind}/")
            content[i] = of_object(mutated(rng, content[i][1]), kind)
            data = packed(content)
        case _:
            i = rng.randrange(len(content) + 1)
            content.insert(i, rng.choice(list(HOSTILE.values())))
            data = packed(content)
    try:
        hall.target.import_(io.BytesIO(data))
    except (SnapshotError, MismatchError):
        assert listing(hall.folder) == hall.before
        return
    assert hall.target.verify(read_data=True).damaged == []
    there = told(hall.target)
    for path in files(whole_store.records):  # what came in is what was sent
        if path.name in there["snapshots"]:
            record = whole_store.read_record(path.name)
            assert record is not None and there["snapshots"][path.name][4] == record.state_digest
    shutil.rmtree(hall.target.path)
    shutil.copytree(hall.folder.parent / "kept", hall.target.path)


def test_made_up_exports(hall: Hall, whole: Store, share: Callable[[int], int]) -> None:
    shutil.copytree(hall.target.path, hall.folder.parent / "kept")
    cases(lambda rng: export_case(rng, hall, whole._files), share(2000))
