"""Stores pushed elsewhere and pulled from there: what travels, in which order, what connections that fail do to it."""

from __future__ import annotations

import os
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec", reason="the extra `remote` is not installed")

from fake_snapshots import CHUNK, MODEL, fake, in_child, keep, library, put, read, told
from program import program
from remotes import BrokenError, Far, FarBucket, Line, far, laid_out, s3_server

from rwkv_stream import filesystems
from rwkv_stream.errors import (
    InputError,
    MismatchError,
    NotFoundError,
    OutputError,
    SnapshotError,
    StoreLockedError,
    UsageError,
)
from rwkv_stream.store import Store, records, sealed
from rwkv_stream.store.layout import StoreFiles
from rwkv_stream.store.remote import TRIES, Remote
from rwkv_stream.store.verify import check_files

HEADS, TAGS = {"book.txt", "notes/other.log"}, {"a fork", "half"}


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def line() -> Iterator[Line]:
    with far(Line()) as made:
        yield made


def place(kind: str, request: pytest.FixtureRequest) -> str:
    """The URL of an empty one."""
    name = uuid.uuid4().hex
    if kind == "s3":
        return f"{request.getfixturevalue('bucket')}/{name}"
    return os.fspath(request.getfixturevalue("tmp_path") / name) if kind == "folder" else f"{kind}://{name}"


@pytest.fixture(params=["memory", "folder", "far"])
def url(request: pytest.FixtureRequest, line: Line) -> str:
    """An empty place for a remote."""
    return place(request.param, request)


@pytest.fixture(params=["memory", "folder", "far", "s3"])
def any_url(request: pytest.FixtureRequest, line: Line) -> str:
    """An empty place for a remote, on a server, too."""
    return place(request.param, request)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return library(tmp_path / "a.store")


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "b.store", create=True)


def go_on(store: Store, n: int = 1, text: str = "a text") -> None:
    """Read on in the book."""
    for _ in range(n):
        with store.writing("book.txt", MODEL):
            head = store.head("book.txt", MODEL)
            new = fake(head.tokens + CHUNK if head else CHUNK, text, parent=head.id if head else None)
            store.move_head("book.txt", MODEL, put(store, keep(store, new, text, head)).id)


# ---- what travels ----


def test_what_is_pushed_is_pulled_the_same(store: Store, other: Store, any_url: str) -> None:
    first = store.push(any_url)
    assert (first.added, first.known, {*first.heads}, {*first.tags}) == (7, 0, HEADS, TAGS)
    assert first.files == 7 + 6 and first.bytes > 0
    again = store.push(any_url)
    assert (again.added, again.known, again.files, again.bytes) == (0, 7, 0, 0)
    pulled = other.pull(any_url)
    assert told(other) == told(store)
    assert other.verify(read_data=True).damaged == []
    assert (pulled.added, pulled.files, pulled.bytes) == (7, first.files, first.bytes)
    assert (pulled.heads, pulled.tags, pulled.kept) == (first.heads, first.tags, [])
    again_pulled = other.pull(any_url)
    assert (again_pulled.added, again_pulled.known, again_pulled.files) == (0, 7, 0)


def test_only_what_is_missing_travels(store: Store, other: Store, url: str) -> None:
    store.push(url, ["book.txt@32"])
    first = other.pull(url)
    assert (first.added, first.heads, first.tags) == (2, ["book.txt"], ["half"])
    go_on(store)
    done = store.push(url)
    assert (done.added, done.known, done.files) == (6, 2, 6 + 5)
    assert other.pull(url).files == done.files
    assert told(other) == told(store)


def test_a_folder_that_was_pushed_to_opens_as_a_store(store: Store, tmp_path: Path) -> None:
    store.push(os.fspath(tmp_path / "remote"))
    opened = Store(tmp_path / "remote")
    assert told(opened) == told(store)
    assert opened.verify(read_data=True).damaged == []
    with pytest.raises(UsageError, match=r"only pushes write to, found '.*' in it.*snapshots pull` there"):
        store.push(os.fspath(tmp_path / "remote"))
    assert Store(tmp_path / "c.store", create=True).pull(os.fspath(tmp_path / "remote")).added == 7


def test_references_name_what_is_pulled(store: Store, other: Store, line: Line) -> None:
    store.push("far://x")
    line.got.clear()
    done = other.pull("far://x", ["book.txt~1", "a fork"])
    assert {(entry.document, entry.tokens) for entry in other.list()} == {
        *(("book.txt", 16 * n) for n in (1, 2, 3)),
        ("a fork", 7),
    }
    assert (done.heads, {*done.tags}) == (["book.txt"], {"a fork"})
    objects = {path for path, _ in line.got if "/objects/" in path}
    assert len(objects) == 4, "states that were not named stay there"
    with pytest.raises(NotFoundError, match="far://x"):
        other.pull("far://x", ["no such book"])


def test_a_start_and_states_of_chunks_go_along(store: Store, other: Store, tmp_path: Path) -> None:
    """What a fork started from, though no name of it was asked for; the states of stretches that a reading has read."""
    start = store.get("book.txt@32")
    cell = fake(8, "cell", chunk=8, how="cells", anchor_byte=0, anchor_token=0, bytes=24, leaf=True)
    put(store, cell)
    fork = fake(7, "q", document="f", start=start.id, start_digest=start.state_digest, how="ask")
    with store.writing():
        store.tag("kept", put(store, fork).id)
    url = os.fspath(tmp_path / "remote")
    store.push(url, ["kept"])
    other.pull(url)
    assert {(entry.document, entry.tokens) for entry in other.list(chunk_states=True)} == {
        ("f", 7),
        ("book.txt", 16),
        ("book.txt", 32),
        ("book.txt", 8),
    }


def test_a_store_gains_what_the_other_kept(store: Store, other: Store, tmp_path: Path) -> None:
    """Text and exact states, whichever side has them; what is removed on one comes back."""
    url = os.fspath(tmp_path / "remote")
    before = told(store)
    read(other, n=4, text="a text")
    for entry in [*other.list()]:
        snapshot = other.get(entry.id)
        record = other._files.record_path(entry.id)
        record.write_bytes(records.encode_record(replace(snapshot, text=None)))
    other.rebuild()
    other.recode("int8")
    assert other.push(url).added == 4
    assert store.push(url).known == 4
    third = Store(tmp_path / "c.store", create=True)
    third.pull(url)
    assert told(third) == before
    other.pull(url)
    assert told(other) == before


# ---- names ----


def test_a_head_goes_on_and_never_back(store: Store, other: Store, url: str) -> None:
    store.push(url)
    other.pull(url)
    go_on(other)
    assert other.push(url).added == 1
    assert store.push(url).further == ["book.txt"]
    go_on(store, 3, text="another end")
    refused = store.push(url)
    assert (refused.refused, refused.further, {*refused.tags}) == (["book.txt"], [], TAGS)
    third = Store(store.path.with_name("c.store"), create=True)
    third.pull(url)
    assert told(third) == told(other) | {"snapshots": told(third)["snapshots"], "texts": told(third)["texts"]}
    assert "book.txt" in store.push(url, force=True).heads
    assert (kept := third.pull(url)).kept == ["book.txt"] and kept.added == 3


def test_tags_stay_where_they_stand(store: Store, url: str) -> None:
    store.push(url)
    store.tag("half", store.get("book.txt").id, move=True)
    assert store.push(url).refused == ["half"]
    assert "half" in store.push(url, force=True).tags


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in ("memory", "folder") for way in ("further", "elsewhere", "behind")]
    + [("s3", "elsewhere")],
)
def test_two_push_at_the_same_time(
    tmp_path: Path, other: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    """Another push moves the head between our look at it and our move."""
    url, store = place(kind, request), Store(tmp_path / "a.store", create=True)
    go_on(store)
    store.push(url)
    other.pull(url)
    go_on(other, 2 if way == "further" else 1, text="a text" if way != "elsewhere" else "elsewhere")
    go_on(store, 1 if way == "further" else 2)
    ours = store.get("book.txt").id
    theirs = other.get("book.txt").id
    swap, others = Remote.swap, [other]

    def late(remote: Remote, name: str, *arguments: Any) -> bool:
        if others and name.startswith("refs/heads"):
            assert "book.txt" in others.pop().push(url).heads
        return swap(remote, name, *arguments)

    monkeypatch.setattr(Remote, "swap", late)
    done = store.push(url)
    third = Store(store.path.with_name("c.store"), create=True)
    third.pull(url)
    assert third.get("book.txt").id == (ours if way == "behind" else theirs)
    assert ("book.txt" in done.further, "book.txt" in done.refused, "book.txt" in done.heads) == (
        way == "further",
        way == "elsewhere",
        way == "behind",
    )
    assert third.verify(read_data=True).damaged == []


def test_that_two_cannot_be_told_from_one_is_said(store: Store, line: Line, caplog: pytest.LogCaptureFixture) -> None:
    store.push("far://x")
    assert "let one push to it" in caplog.text
    caplog.clear()
    store.push("farbucket://x")
    assert caplog.text == ""


# ---- connections that fail ----

FAR = ["far", "farbucket"]


def first_of_each_third(fault: Callable[[bytes], bytes], among: str = "/") -> Callable[[str, bytes], bytes]:
    """A fault in the first transfer of every third file of a kind."""
    seen: list[str] = []

    def change(path: str, data: bytes) -> bytes:
        file = path.partition(".tmp-")[0] + path.rpartition("/")[2].removeprefix(".tmp-")[:8]
        if among not in path or file in seen:
            return data
        seen.append(file)
        return fault(data) if len(seen) % 3 == 0 else data

    return change


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def broken(data: bytes) -> bytes:
    raise BrokenError(len(data) // 2)


@pytest.mark.parametrize("fault", [flipped, broken])
@pytest.mark.parametrize("place", FAR)
def test_every_third_transfer_fails(
    store: Store, other: Store, line: Line, place: str, fault: Callable[[bytes], bytes]
) -> None:
    """It is done again, and all is whole."""
    line.put = first_of_each_third(fault)
    assert store.push(f"{place}://x").added == 7
    assert len(line.sent) == 25 + 25 // 3
    line.get = first_of_each_third(fault, "/objects/")
    line.got.clear()
    assert other.pull(f"{place}://x").added == 7
    assert sum("/objects/" in path for path, _ in line.got) == 7 + 7 // 3
    assert told(other) == told(store)
    assert other.verify(read_data=True).damaged == []


@pytest.mark.parametrize("place", FAR)
def test_nothing_is_named_that_is_not_whole(store: Store, line: Line, place: str, tmp_path: Path) -> None:
    """After every single change of the remote, what lies there is a store without damage."""
    kind = {"far": Far, "farbucket": FarBucket}[place]
    moments = []

    def look() -> None:
        folder = laid_out(kind.store, "/x", tmp_path / f"moment-{len(moments)}")
        moments.append(
            check_files(StoreFiles(folder), None, read_data=True).damaged if (folder / "format").exists() else []
        )

    line.changed = look
    store.push(f"{place}://x")
    go_on(store)
    store.push(f"{place}://x")
    assert len(moments) >= 29
    assert not any(moments), moments


@pytest.mark.parametrize("fault", [flipped, broken])
@pytest.mark.parametrize("place", FAR)
def test_a_push_that_fails_goes_on(
    store: Store, other: Store, line: Line, place: str, fault: Callable[[bytes], bytes]
) -> None:
    """From the fifth object on nothing arrives; then it does. Nothing is sent twice but what was under way."""
    url, arrived = f"{place}://x", 0

    def put(path: str, data: bytes) -> bytes:
        nonlocal arrived
        if "/objects/" in path or "/texts/" in path:
            arrived += 1
            if arrived > 5:
                return fault(data)
        return data

    line.put = put
    with pytest.raises(OutputError, match=r"writing remote '(far|farbucket)://x/.*run it again"):
        store.push(url)
    files = (FarBucket if place == "farbucket" else Far).store
    assert not any("/records/" in path or "/refs/" in path for path in files)
    assert not other.path.joinpath("refs/heads").exists() or other.pull(url).added == 0
    first = Counter(n_bytes for path, n_bytes in line.sent if "/objects/" in path or "/texts/" in path)
    assert sum(first.values()) <= 5 + 4 * TRIES
    line.put = lambda path, data: data
    line.sent.clear()
    done = store.push(url)
    assert done.files == 13 - 5
    assert sum("/objects/" in path or "/texts/" in path for path, _ in line.sent) == 13 - 5
    other.pull(url)
    assert told(other) == told(store)


def test_a_pull_that_fails_goes_on(store: Store, other: Store, line: Line) -> None:
    """Of what came nothing is fetched again; of what came changed nothing is published."""
    store.push("far://x")
    names = sorted(path for path in Far.store if "/objects/" in path)
    for fault, error in ((broken, InputError), (flipped, SnapshotError)):
        line.get = lambda path, data: fault(data) if path == names[3] else data  # noqa: B023
        with pytest.raises(error, match=r"reading remote 'far://x/objects/"):
            other.pull("far://x")
        assert not (other.path / "objects" / names[3][-64:-62] / names[3][-64:]).exists()
        assert not [*other.list(), *other.heads(), *other.tags()]
    line.get = lambda path, data: data
    line.got.clear()
    done = other.pull("far://x")
    assert 1 <= done.files < 13
    assert sum("/objects/" in path or "/texts/" in path for path, _ in line.got) == done.files
    assert told(other) == told(store)
    assert not [*other.path.rglob(".tmp-*")]


def test_a_killed_push_goes_on_in_a_bucket(
    store: Store, other: Store, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its fourth file, and behind the last record: what had arrived is not sent again."""
    from moto.s3.models import S3Backend

    url, put_object, sent = f"{bucket}/killed", S3Backend.put_object, []

    def counted(backend: Any, bucket_name: str, key_name: str, *arguments: Any, **options: Any) -> Any:
        sent.append(key_name)
        return put_object(backend, bucket_name, key_name, *arguments, **options)

    monkeypatch.setattr(S3Backend, "put_object", counted)
    for failpoint in ("push.file:4", "push.recorded"):
        assert in_child(lambda: store.push(url), RWKV_STREAM_FAILPOINT=failpoint) != 0
        assert not [key for key in sent if "/refs/" in key]
    store.push(url)
    times = Counter(key for key in sent if "/refs/" not in key)
    assert len(times) == 1 + 13 + 7
    assert sum(times.values()) <= len(times) + 2 * 4
    other.pull(url)
    assert told(other) == told(store)


def test_a_damaged_file_is_not_sent(store: Store, line: Line) -> None:
    snapshot = store.get("book.txt@16")
    path = store._files.objects.path(snapshot.objects[0].name)
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(SnapshotError, match=r"changed since; run `rwkv-stream snapshots repair`"):
        store.push("far://x")
    assert not any(path.name[:60] in name or "/refs/" in name for name in Far.store)


# ---- what is not trusted ----


def replaced(line: Line, path: str, data: bytes) -> None:
    Far().pipe_file(path, data)


def test_names_of_a_remote_lead_nowhere_else(
    store: Store, other: Store, line: Line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.push("far://x")
    data = next(Far().cat_file(path) for path in Far.store if "/records/" in path)
    ls, evil = Far.ls, ("../../../evil", "..", "%2e%2e", "/etc/evil", "ab/../../../../evil", "0" * 64)

    def listing(self: Far, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        files = [{"name": f"{path}/{name}", "size": len(data), "type": "file"} for name in evil]
        folders = [{"name": f"{path}/{name}", "size": 0, "type": "directory"} for name in ("..", "ab", "../..")]
        return [*ls(self, path, detail=True), *files, *folders]

    monkeypatch.setattr(Far, "ls", listing)
    before = {path for path in tmp_path.rglob("*") if other.path not in path.parents}
    other.pull("far://x")
    assert {path for path in tmp_path.rglob("*") if other.path not in path.parents} == before
    assert told(other) == told(store)


def test_hostile_files_of_a_remote(store: Store, other: Store, line: Line) -> None:
    store.push("far://x")
    object_name = next(path for path in Far.store if "/objects/" in path)
    record = next(path for path in Far.store if "/records/" in path)
    head = next(path for path in Far.store if "/refs/heads/" in path)
    newer = sealed.seal(sealed.FORMAT, {})
    whole = {path: bytes(file.getvalue()) for path, file in Far.store.items()}
    cases: list[tuple[str, bytes | None, type[Exception], str]] = [
        (object_name, whole[object_name] + bytes(1 << 20), SnapshotError, "expected at most"),
        (object_name, None, SnapshotError, "expected the file that a record names, found none"),
        (record, bytes(sealed.SMALL_FILE_LIMIT + 1), SnapshotError, "at most 65536 bytes, found more"),
        (record, None, SnapshotError, "found|goes on from"),
        ("/x/format", newer[:8] + bytes([sealed.VERSION + 1]) + newer[9:], SnapshotError, "x/format"),
        (head, whole[head][:-1] + b"?", SnapshotError, ""),
    ]
    for path, data, error, message in cases:
        if data is None:
            Far.store.pop(path)
        else:
            Far().pipe_file(path, data)
        if path == head:  # left out: there are other names
            assert len(other.pull("far://x").heads) == 1
        else:
            with pytest.raises(error, match=message):
                other.pull("far://x")
            assert not [*other.heads(), *other.tags()]
        Far().pipe_file(path, whole[path])
    other.pull("far://x")
    assert told(other) == told(store)


def test_a_remote_of_a_newer_format(store: Store, other: Store, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sealed.VERSIONS, sealed.FORMAT, sealed.VERSION + 1)
        store.push("far://x")
    for work in (lambda: store.push("far://x"), lambda: other.pull("far://x")):
        with pytest.raises(MismatchError, match=r"far://x/format.*use a newer"):
            work()


def test_places_that_are_no_remotes(store: Store, other: Store, line: Line, tmp_path: Path) -> None:
    Far().pipe_file("/mine/letter.txt", b"dear")
    with pytest.raises(UsageError, match=r"expected nothing there, or a store, found 'letter.txt'"):
        store.push("far://mine")
    assert [*Far.store] == ["/mine/letter.txt"]
    for empty in ("far://mine", "far://nothing", os.fspath(tmp_path / "nothing")):
        with pytest.raises(NotFoundError, match=r"expected a store, found none; `rwkv-stream snapshots push`"):
            other.pull(empty)
    with pytest.raises(InputError, match="expected a URL that fsspec knows"):
        store.push("nosuch://x/y")


def test_fsspec_is_not_installed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InputError, match=r"package fsspec, .*rwkv-stream\[remote\]'"):
        store.push("s3://bucket/x")


def test_secrets_are_in_no_message(store: Store, line: Line) -> None:
    url = "far://user:hunter22@host/x?signature=s3cr3t&v=1"

    def put(path: str, data: bytes) -> bytes:
        raise OSError(f"403 for {url}: signature=s3cr3t of user:hunter22 is none")

    line.put = put
    with pytest.raises(OutputError) as caught:
        store.push(url)
    chain: BaseException | None = caught.value
    assert "far://host/x/format" in str(chain)
    for secret in ("hunter22", "s3cr3t", "user:"):
        assert secret not in str(chain)
    assert filesystems.shown("s3://bucket/a b") == "s3://bucket/a b"


# ---- beside others ----


def test_nothing_is_pruned_during_a_push(store: Store, line: Line) -> None:
    found = []

    def changed() -> None:
        if not found:
            with pytest.raises(StoreLockedError):
                Store(store.path).prune()
            found.append(read(Store(store.path), "meanwhile.txt", n=1))

    line.changed = changed
    assert store.push("far://x").added == 7
    assert found, "another may write meanwhile"
    with store._sessions.alone(), pytest.raises(StoreLockedError, match="clearing up"):
        Store(store.path).push("far://x")


def test_a_pull_of_a_document_that_is_written_to(store: Store, other: Store, line: Line) -> None:
    store.push("far://x")
    with Store(other.path).writing("book.txt", MODEL), pytest.raises(StoreLockedError):
        other.pull("far://x")
    done = other.pull("far://x")
    assert done.files == 0, "what had come is here"
    assert told(other) == told(store)


# ---- the program ----


def test_commands(program_folder: Path, line: Line) -> None:
    library(program_folder / "store")
    pushed = program("snapshots", "push", "far://x")
    assert (pushed.code, {*pushed.out.splitlines()}) == (0, HEADS | TAGS)
    assert "7 snapshots added, 0 were there; 13 files" in pushed.err
    cloned = program("snapshots", "clone", "far://x", "copy", "--json")
    assert cloned.code == 0 and '"added": 7' in cloned.out
    assert told(Store(program_folder / "copy")) == told(Store(program_folder / "store"))
    again = program("snapshots", "clone", "far://x", "copy")
    assert (again.code, "pull --store 'copy'" in again.err) == (2, True)
    copy = Store(program_folder / "copy")
    go_on(copy, 2, text="another end")
    assert program("snapshots", "push", "far://x", "--store", "copy").code == 0
    go_on(Store(program_folder / "store"))
    refused = program("snapshots", "push", "far://x", "book.txt")
    assert refused.code == 3
    assert "pushing 'book.txt': expected it there where this one goes on from" in refused.err
    kept = program("snapshots", "pull", "far://x", "book.txt")
    assert kept.code == 0 and "'book.txt' stays where it stands in this store" in kept.err
    assert program("snapshots", "push", "far://x", "--force").code == 0
    assert program("snapshots", "pull", "far://nothing").code == 10
