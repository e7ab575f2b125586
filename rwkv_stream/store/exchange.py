"""Snapshots to a store elsewhere (`push`) and from there (`pull`): what is not there yet, and nothing else.

Both go the same way. First the small files: what names lead to, and what the other side says of it, in a folder of our
own. Then objects and extents, which are named by their bytes; then records; then heads and tags, so that at every
moment all that a name leads to is there. Whoever is stopped goes on with what has not arrived.

A push holds the store as a writer does, so that nothing of it is pruned meanwhile. A head of the remote goes on, and
never back, whoever pushes beside us. A pull publishes what came once its bytes agree with its name, decodes every state
before the first record, and takes the rest over as an import does.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rwkv_stream.errors import (
    MismatchError,
    NotFoundError,
    OutputError,
    RwkvStreamError,
    SnapshotError,
    UsageError,
)
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder, publishing, scratch
from rwkv_stream.store import records, references, transfer
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.catalog_keeper import CatalogKeeper
from rwkv_stream.store.layout import StoreFiles, files, publishing_failpoints
from rwkv_stream.store.records import READING, Head, Snapshot, Tag
from rwkv_stream.store.remote import FAILPOINTS as REMOTE_FAILPOINTS
from rwkv_stream.store.remote import Entry, Remote
from rwkv_stream.store.sealed import (
    REPAIR,
    SMALL_FILE_LIMIT,
    VERSION,
    damaged,
    decode_format,
    encode_format,
    is_digest,
    read_file,
)
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.texts import FILE_LIMIT

FAILPOINTS = (
    *REMOTE_FAILPOINTS,
    "push.file",
    "push.sent",
    "push.recorded",
    "push.named",
    "pull.listed",
    *publishing_failpoints("pull.object"),
    *publishing_failpoints("pull.text"),
    "pull.checked",
    "pull.merged",
)

_LIVE = ("catalog.sqlite", "locks")  # what only a store has in which programs write
_TAG_FILE = re.compile(r"(?!\.)[\w%.-]{1,200}", re.ASCII)
_FOLDER = re.compile("[0-9a-f]{2}")
_ATTEMPTS = 10  # to move a head that others move, too

Progress = Callable[[int, int], object]  # is given bytes that have arrived, and bytes in all, as far as that is known

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: snapshots that are new there and that were there, names that stand there as here, names that are
    further there, names that stand elsewhere and stay there; files and bytes of states and text that were sent."""

    added: int
    known: int
    heads: list[str]
    tags: list[str]
    further: list[str]
    refused: list[str]
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Pulled(transfer.Imported):
    """What a pull did: as of an import; files and bytes of states and text that came."""

    files: int
    bytes: int


def push(
    sessions: Sessions, url: str, snapshots: Sequence[Snapshot] | None, *, force: bool, on_progress: Progress | None
) -> Pushed:
    """Send snapshots, None: all that heads and tags lead to, to the store at a URL; see `Store.push`."""
    remote, store = Remote(url), sessions.store
    with contextlib.ExitStack() as stack:
        stack.enter_context(sessions.unpruned())
        names = _names(store) if snapshots is None else []
        named = _targets(store, names) if snapshots is None else snapshots
        names = names or sessions.ask(lambda catalog: transfer.names_at(store, catalog, named))
        _begin(remote)
        staged = StoreFiles(stack.enter_context(scratch(Path(tempfile.gettempdir()))))
        order = sessions.ask(lambda catalog: _whole(store, catalog, named))
        return _Push(store, remote, staged, on_progress).run(order, names, force=force)


def pull(sessions: Sessions, url: str, refs: Sequence[str], *, on_progress: Progress | None) -> Pulled:
    """Take over what references name in the store at a URL, none: all that its names lead to; see `Store.pull`."""
    remote, store = Remote(url), sessions.store
    _check_format(remote)
    with sessions.writing() as session:
        staged = StoreFiles(store.path / f"{TEMP_PREFIX}{session.tag}-pull")
        staged.objects, staged.texts = store.objects, store.texts  # which come into the store at once
        staged.path.mkdir()
        try:
            return _Pull(sessions, remote, staged, session.tag, on_progress).run(refs)
        finally:
            shutil.rmtree(staged.path)
            fsync_folder(store.path)


def _names(store: StoreFiles) -> list[Head | Tag]:
    """All heads and tags."""
    heads, tags = map(store.read_head, files(store.heads)), map(store.read_tag, files(store.tags))
    return [name for name in (*heads, *tags) if name is not None]


def _targets(store: StoreFiles, names: Iterable[Head | Tag]) -> list[Snapshot]:
    ends = dict.fromkeys(name.snapshot for name in names)
    return [store.target(identity, store.record_path(identity)) for identity in ends]


def _whole(store: StoreFiles, catalog: Catalog, named: Iterable[Snapshot]) -> dict[str, int]:
    """The ids, with their tokens, of snapshots, of all that they go on or started from, and of the states of chunks
    that they have read; none before the one that it goes on from."""
    held: dict[str, int] = {}
    stack = [*named]
    while stack:
        snapshot = stack.pop()
        for one in (snapshot, *store.ancestors(snapshot)):
            if one.id in held:
                break  # what comes before it is there
            held[one.id] = one.tokens
        if snapshot.how == READING:
            held |= {one.id: one.tokens for one in transfer.chunk_states(store, catalog, snapshot)}
        if snapshot.start is not None and snapshot.start not in held:
            start = store.read_record(snapshot.start)
            stack += [start] if start is not None else []
    return dict(sorted(held.items(), key=lambda item: (item[1], item[0])))


def _begin(remote: Remote) -> None:
    """Make the remote a store of our version, where there is nothing yet."""
    there = remote.listed("")
    live = [name for name in _LIVE if name in there]
    if live:
        raise UsageError(
            f"pushing to '{remote.shown()}': expected a store that only pushes write to, found '{live[0]}' in it, as "
            "where programs read; run `rwkv-stream snapshots pull` there, or push elsewhere"
        )
    theirs = {name for name in there if not name.startswith(TEMP_PREFIX)} - StoreFiles(Path()).own_names()
    if theirs and "format" not in there:
        raise UsageError(f"pushing to '{remote.shown()}': expected nothing there, or a store, found '{min(theirs)}'")
    if "format" not in there or _check_format(remote) < VERSION:
        remote.put("format", encode_format())


def _check_format(remote: Remote) -> int:
    """The version of the store at a remote; NotFoundError where there is none."""
    data = remote.read("format")
    if data is None:
        raise NotFoundError(
            f"opening remote '{remote.shown()}': expected a store, found none; `rwkv-stream snapshots push` makes one"
        )
    return _decoded(remote, "format", lambda: decode_format(data, Path("format")))


def _decoded(remote: Remote, name: str, decode: Callable[[], T]) -> T:
    """What a file of the remote says; SnapshotError, MismatchError with its address."""
    try:
        return decode()
    except MismatchError as error:
        raise MismatchError(
            f"reading remote '{remote.shown(name)}': expected format {VERSION} or older, found a newer one; "
            "use a newer rwkv-stream"
        ) from error
    except SnapshotError as error:
        raise remote.damaged(name, "it as it was written", "bytes that were changed or cut short since") from error


class _Exchange:
    """What a push and a pull have in common: where they go, and the count of what has gone.

    staged  a store of small files: those of the one side that the other is to have
    """

    def __init__(self, store: StoreFiles, remote: Remote, staged: StoreFiles, on_progress: Progress | None) -> None:
        self.store, self.remote, self.staged = store, remote, staged
        self.n_files = self.n_bytes = self.total = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def name(self, path: Path) -> str:
        """The name at the remote of a file of the store."""
        return path.relative_to(self.store.path).as_posix()

    def count(self, n_bytes: int, *, n_files: int = 0, total: int = 0) -> None:
        """Note bytes, or files, that have arrived, and bytes that are to come."""
        with self._lock:
            self.n_bytes += n_bytes
            self.n_files += n_files
            self.total += total
            if self._on_progress is not None:
                self._on_progress(self.n_bytes, self.total)

    def listed(self, names: Iterable[str]) -> dict[str, Entry]:
        """What the remote has in the folders of these files, by name."""
        found: dict[str, Entry] = {}

        def look(folder: str) -> None:
            there = self.remote.listed(folder)
            with self._lock:
                found.update({f"{folder}/{name}": entry for name, entry in there.items() if entry is not None})

        self.remote.each(look, sorted({name.rpartition("/")[0] for name in names}))
        return found

    def save(self, path: Path, data: bytes) -> None:
        """Keep a small file in `staged`."""
        home = self.staged.path / path.relative_to(self.store.path)
        home.parent.mkdir(parents=True, exist_ok=True)
        home.write_bytes(data)

    def read_small(self, path: Path, entry: Entry) -> bytes | None:
        """A small file of the remote; not asked for where it is known to be the same here."""
        if entry.md5 is not None:
            with contextlib.suppress(FileNotFoundError, SnapshotError):
                data = read_file(path, SMALL_FILE_LIMIT)
                if hashlib.md5(data, usedforsecurity=False).hexdigest() == entry.md5:
                    return data
        return self.remote.read(self.name(path))


class _Push(_Exchange):
    def run(self, order: Mapping[str, int], names: Iterable[Head | Tag], *, force: bool) -> Pushed:
        if not self.remote.has_swap:
            log.warning(
                "remote '%s' cannot tell two that push at the same time from one: let one push to it",
                self.remote.shown(),
            )
        self._added = self._known = 0
        self._wanted: dict[str, bool] = {}  # names of objects → whether the remote may lead to them already
        self._tips: dict[str, bool] = {}  # likewise of the last extents of texts
        self._send(order)
        failpoint("push.sent")
        for _, level in itertools.groupby(order, order.get):  # none before the one that it goes on from
            self.remote.each(self._put_record, (path for path in map(self.staged.record_path, level) if path.exists()))
        failpoint("push.recorded")
        ended: dict[str, list[str]] = {"further": [], "refused": [], "heads": [], "tags": []}
        for name in names:
            how = self._named(name, force=force)
            ended[how].append(name.document if isinstance(name, Head) else name.name)
            failpoint("push.named")
        return Pushed(self._added, self._known, **ended, files=self.n_files, bytes=self.n_bytes)

    # ---- objects and texts ----

    def _send(self, order: Iterable[str]) -> None:
        there = self.listed(self.name(self.store.record_path(identity)) for identity in order)

        def plan(identity: str) -> None:
            self._plan(identity, there.get(self.name(self.store.record_path(identity))))

        self.remote.each(plan, order)
        del there
        extents: dict[str, bool] = {}
        for tip in sorted(self._tips, key=lambda tip: not self._tips[tip]):
            for extent in self.store.texts.chain(tip):
                if extent.name in extents:
                    break  # what comes before it is there
                extents[extent.name] = self._tips[tip]
        paths = {self.store.objects.path(name): is_known for name, is_known in self._wanted.items()}
        paths |= {self.store.texts.path(name): is_known for name, is_known in extents.items()}
        there = self.listed(map(self.name, paths))
        missing: list[Path] = []

        def look(path: Path) -> None:
            """Whether it is there: of what no record leads to yet, down to the bytes."""
            entry, size = there.get(self.name(path)), _size(path)
            if entry is None or entry.size != size or not (paths[path] or self.remote.has(self.name(path), path)):
                with self._lock:
                    missing.append(path)

        self.remote.each(look, paths)
        self.count(0, total=sum(map(_size, missing)))
        self.remote.each(self._send_file, sorted(missing))

    def _plan(self, identity: str, entry: Entry | None) -> None:
        """Find out what the remote is to have of a snapshot; what its record is to say there goes to `staged`."""
        path = self.store.record_path(identity)
        ours = self.store.read_record(identity)
        if ours is None:
            raise damaged(path, "a record", "none")
        theirs = None
        if entry is not None and (data := self.read_small(path, entry)) is not None:
            theirs = self._known_record(path, data)
        result = transfer.merged(theirs, ours)
        if result is not None:
            self.save(path, records.encode_record(result))
        final = result or theirs
        assert final is not None
        is_known = theirs is not None and not theirs.removed
        with self._lock:
            self._added += not is_known and not final.removed
            self._known += is_known
            for stored in ours.objects:
                if stored in final.objects:
                    self._wanted[stored.name] = is_known and result is None
            if ours.last_extent is not None and final.text == ours.text:
                self._tips[ours.last_extent] = is_known and result is None

    def _known_record(self, path: Path, data: bytes) -> Snapshot | None:
        """A record of the remote; a damaged one counts as none and is replaced."""
        try:
            return _decoded(self.remote, self.name(path), lambda: self.store.decode_record(data, path))
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return None

    def _send_file(self, path: Path) -> None:
        self.remote.send(self.name(path), path, on_bytes=self.count)
        self.count(0, n_files=1)
        failpoint("push.file")

    def _put_record(self, path: Path) -> None:
        self.remote.put(path.relative_to(self.staged.path).as_posix(), path.read_bytes())

    # ---- heads and tags ----

    def _named(self, name: Head | Tag, *, force: bool) -> str:
        """Let a head or tag of the remote stand where it stands here; what became of it, as a field of `Pushed`."""
        if isinstance(name, Head):
            path, data, kind = self.store.head_path(name.document, name.model), records.encode_head(name), "heads"
        else:
            tag_path = self.store.tag_path(name.name)
            assert tag_path is not None
            path, data, kind = tag_path, records.encode_tag(name), "tags"
        for _ in range(_ATTEMPTS):
            seen = self.remote.seen(self.name(path))
            theirs = self._known_name(path, seen.data)
            if theirs is not None and theirs.snapshot == name.snapshot:
                return kind
            if theirs is not None and not force and not self._goes_on(name, theirs):
                return "further" if self._goes_on(theirs, name) else "refused"
            self.remote.swap(self.name(path), seen, data)  # and look again, whoever was first
        raise OutputError(
            f"writing remote '{self.remote.shown(self.name(path))}': expected it to stay where it was put, found it "
            f"elsewhere {_ATTEMPTS} times; let the others push first"
        )

    def _known_name(self, path: Path, data: bytes | None) -> Head | Tag | None:
        """A head or tag of the remote; a damaged one counts as none and is replaced."""
        if data is None:
            return None
        try:
            found = _decoded(self.remote, self.name(path), lambda: self.store.decode(path, data))
        except SnapshotError as error:
            log.warning("%s; it is being replaced", error)
            return None
        assert not isinstance(found, Snapshot)
        return found

    def _goes_on(self, name: Head | Tag, before: Head | Tag) -> bool:
        """Whether a head goes on from another, by the records here and there; a missing one ends its lineage."""
        if isinstance(name, Tag):
            return False
        place = self._record(before.snapshot)
        at: str | None = name.snapshot
        while at is not None:
            if at == before.snapshot:
                return True
            record = self._record(at)
            if record is None or (place is not None and record.tokens <= place.tokens):
                return False
            at = record.parent
        return False

    def _record(self, identity: str) -> Snapshot | None:
        found = self.store.read_record(identity)
        if found is None:
            path = self.store.record_path(identity)
            data = self.remote.read(self.name(path))
            found = None if data is None else self._known_record(path, data)
        return found


class _Pull(_Exchange):
    def __init__(
        self, sessions: Sessions, remote: Remote, staged: StoreFiles, tag: str, on_progress: Progress | None
    ) -> None:
        super().__init__(sessions.store, remote, staged, on_progress)
        self._sessions, self._tag = sessions, tag

    def run(self, refs: Sequence[str]) -> Pulled:
        self._fetch_names_and_records()
        failpoint("pull.listed")
        order, names = self._chosen(refs)
        self._check(self._fetch(order))
        failpoint("pull.checked")
        heads = [name for name in names if isinstance(name, Head)]
        done = transfer.Merge(self._sessions, self.staged).take_over(heads)
        failpoint("pull.merged")
        return Pulled(done.added, done.known, done.heads, done.tags, done.kept, self.n_files, self.n_bytes)

    def _fetch_names_and_records(self) -> None:
        """Names first: what they lead to is there by then."""
        for folder, is_name in ((self.store.heads, is_digest), (self.store.tags, _TAG_FILE.fullmatch)):
            found = self.remote.listed(self.name(folder)).items()
            self._fetch_small((folder / name, entry) for name, entry in found if entry is not None and is_name(name))
        found = self.remote.listed("records").items()
        folders = [name for name, entry in found if entry is None and _FOLDER.fullmatch(name)]
        there = self.listed(f"records/{folder}/" for folder in folders).items()
        paths = ((self.store.record_path(name.rpartition("/")[2]), name, entry) for name, entry in there)
        self._fetch_small(
            (path, entry) for path, name, entry in paths if is_digest(path.name) and self.name(path) == name
        )

    def _fetch_small(self, found: Iterable[tuple[Path, Entry]]) -> None:
        """Stage small files, each decoded first; what is damaged is left out, and missed where something needs it."""

        def fetch(file: tuple[Path, Entry]) -> None:
            path, entry = file
            data = self.read_small(path, entry)
            if data is None:
                return  # removed since it was listed
            try:
                _decoded(self.remote, self.name(path), lambda: self.store.decode(path, data))
            except SnapshotError as error:
                log.warning("left out: %s", error)
                return
            self.save(path, data)

        self.remote.each(fetch, found)

    def _chosen(self, refs: Sequence[str]) -> tuple[Iterable[str], list[Head | Tag]]:
        """The ids of what is to be had, and its names; `staged` is left with nothing else."""
        staged, keeper = self.staged, CatalogKeeper(self.staged)
        keeper.rebuild()
        with keeper.open(writable=True) as catalog, self._as_of_remote():
            if refs:
                named = [references.resolve(ref, None, staged, catalog) for ref in refs]
                names = transfer.names_at(staged, catalog, named)
            else:
                names = _names(staged)
                named = _targets(staged, names)
            order = _whole(staged, catalog, named)
        wanted = {*map(staged.record_path, order)}
        wanted |= {path for name in names if isinstance(name, Tag) and (path := staged.tag_path(name.name)) is not None}
        for path in (*files(staged.records), *files(staged.tags)):
            if path not in wanted:
                path.unlink()
        return order, names

    @contextlib.contextmanager
    def _as_of_remote(self) -> Iterator[None]:
        """Errors about what was staged, as of where it is from."""
        try:
            yield
        except RwkvStreamError as error:
            message = str(error).replace(str(self.staged.path), self.remote.shown())
            raise type(error)(message.replace(REPAIR, "push it again from a store that has it")) from error

    # ---- objects and texts ----

    def _fetch(self, order: Iterable[str]) -> list[str]:
        """Bring what is not here of the states and texts of these; the ids of those that are to be taken over."""
        taken, sizes, tips = list[str](), dict[str, int](), set[str]()
        for identity in order:
            theirs, here = self.staged.read_record(identity), self.store.known(identity)
            assert theirs is not None
            result = transfer.merged(here, theirs)
            final = result or here
            assert final is not None
            if result is not None:
                taken.append(identity)
            for stored in theirs.objects:
                if stored in final.objects and _size(self.store.objects.path(stored.name)) != stored.size_bytes:
                    sizes[stored.name] = stored.size_bytes
            if theirs.last_extent is not None and final.text == theirs.text:
                tips.add(theirs.last_extent)
        self.count(0, total=sum(sizes.values()))
        self.remote.each(lambda name: self._fetch_object(name, sizes[name]), sizes)
        self.remote.each(lambda tip: self._fetch_text(tip, tips), sorted(tips))
        return taken

    def _fetch_object(self, name: str, size: int) -> None:
        self._fetch_file(self.store.objects.path(name), "pull.object", size, self.count)

    def _fetch_text(self, tip: str, tips: set[str]) -> None:
        """An extent and those before it, as far as to the last one of another text, which is that one's matter."""
        name: str | None = tip
        while name is not None and (name == tip or name not in tips):
            path = self.store.texts.path(name)
            if not path.exists():
                self._fetch_file(path, "pull.text", FILE_LIMIT, lambda n_bytes: self.count(n_bytes, total=n_bytes))
            name = _decoded(self.remote, self.name(path), lambda: self.store.texts.extent(path.name).previous)  # noqa: B023

    def _fetch_file(self, path: Path, kind: str, limit: int, on_bytes: Callable[[int], object]) -> None:
        make_folder(path.parent)
        with publishing(path, kind=kind, temp_tag=self._tag) as file:
            self.remote.fetch(self.name(path), file, limit, on_bytes=on_bytes)
        self.count(0, n_files=1)

    def _check(self, identities: Iterable[str]) -> None:
        """SnapshotError unless these are whole: what they go on from, their text, their states down to the values."""
        for identity in identities:
            snapshot = self.staged.read_record(identity)
            assert snapshot is not None
            name = self.name(self.store.record_path(identity))
            if snapshot.parent is not None and self.staged.read_record(snapshot.parent) is None:
                raise self.remote.damaged(name, f"the record of '{snapshot.parent}', which it goes on from", "none")
            if snapshot.objects:
                _decoded(self.remote, name, lambda: self.staged.arrays(snapshot))  # noqa: B023
            gap = self.staged.text_gap(snapshot)
            if gap is not None:
                raise self.remote.damaged(name, "its text", f"'{gap[0].name}': {gap[1]}")


def _size(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
