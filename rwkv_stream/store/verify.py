"""Whether the files of a store are what was written, and agree with each other and with the catalog."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_stream.errors import MismatchError, SnapshotError, StoreLockedError
from rwkv_stream.store.catalog import Catalog, CatalogAbsentError, CatalogDamagedError, Entry, entry
from rwkv_stream.store.layout import StoreFiles, files
from rwkv_stream.store.objects import HEADER_LIMIT, check_header, held_object
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, is_digest, read_file
from rwkv_stream.store.sessions import Sessions

log = logging.getLogger(__name__)

_READ_BLOCK_BYTES = 1 << 20
_REBUILD = "run `rwkv-stream snapshots rebuild`"


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what was written; `path` is relative to the store."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What was found: how many files were checked, which are damaged, and how many postings were made again."""

    checked: int
    damaged: list[Damage]
    indexed: int = 0


def verify(sessions: Sessions, *, read_data: bool) -> Report:
    """Check every file of a store and its catalog; see `Store.verify`."""
    report = check_store(sessions, read_data=read_data)
    damaged = {damage.path for damage in report.damaged}
    return replace(report, indexed=index_texts(sessions, damaged))


def index_texts(sessions: Sessions, damaged: Container[str]) -> int:
    """Make the postings again that are missing or damaged, of texts that are not; how many that were."""
    texts, n_indexed = sessions.store.texts, 0
    with contextlib.ExitStack() as stack:
        for path in files(texts.folder) if sessions.writable else ():
            if os.fspath(path.relative_to(sessions.store.path)) in damaged:
                continue
            try:
                texts.postings(path.name)
            except SnapshotError:
                try:
                    if sessions.current is None:
                        stack.enter_context(sessions.writing())  # one for all
                except StoreLockedError as error:
                    log.info("postings are left to be made again: %s", error)
                    break
                with contextlib.suppress(SnapshotError):  # an extent before it is damaged, or it was removed since
                    n_indexed += sessions.save_postings(path.name, texts.made_postings(path.name))
    return n_indexed


def check_store(sessions: Sessions, *, read_data: bool) -> Report:
    """Check every file of a store and its catalog, and change nothing."""
    store, quiet = sessions.store, sessions.quiet
    with contextlib.ExitStack() as stack:
        try:
            catalog = stack.enter_context(sessions.keeper.open(writable=sessions.writable))
        except CatalogAbsentError:
            return check_files(store, None, quiet, read_data=read_data)
        except CatalogDamagedError as error:
            report = check_files(store, None, quiet, read_data=read_data)
            return Report(report.checked + 1, [*report.damaged, Damage(store.catalog.name, f"{error}; {_REBUILD}")])
        return check_files(store, catalog, quiet, read_data=read_data)


def check_files(
    store: StoreFiles,
    catalog: Catalog | None,
    quiet: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    read_data: bool,
) -> Report:
    """Check every file; others may write meanwhile.

    catalog      the catalog, None where there is none or it cannot be read
    quiet      a block during which nothing is published; what looks like damage is looked at again in one
    read_data  read objects and texts too, and decode what they hold
    """
    checked = 0
    damaged: dict[str, str] = {}
    for found in _Verification(store, catalog, quiet, read_data).run():
        checked += 1
        damaged.update((os.fspath(path.relative_to(store.path)), reason) for path, reason in found)
    return Report(checked, [Damage(path, reason) for path, reason in sorted(damaged.items())])


_Found = Iterator[tuple[Path, str]]


class _Verification:
    def __init__(
        self,
        store: StoreFiles,
        catalog: Catalog | None,
        quiet: Callable[[], contextlib.AbstractContextManager[None]],
        read_data: bool,
    ) -> None:
        self.store, self.catalog, self.quiet, self.read_data = store, catalog, quiet, read_data

    def run(self) -> Iterator[list[tuple[Path, str]]]:
        """What is wrong with one file after the other; mostly nothing."""
        yield self._confirmed(self._format, self.store.format)
        for folder, check in (
            (self.store.records, self._record),
            (self.store.heads, self._head),
            (self.store.tags, self._tag),
            (self.store.objects.folder, self._object),
            (self.store.texts.folder, self._text),
            (self.store.texts.postings_folder, self._postings),
            (self.store.cache, self._cached),
        ):
            for path in files(folder):
                yield self._confirmed(check, path)
        if self.catalog is not None:
            yield self._confirmed(self._catalog, self.store.catalog)

    def _confirmed(self, check: Callable[[Path], _Found], path: Path) -> list[tuple[Path, str]]:
        found: list[tuple[Path, str]] = []
        for block in (contextlib.nullcontext, self.quiet):
            with block():
                try:
                    found = list(check(path))
                except FileNotFoundError:  # removed since it was listed
                    found = []
                except CatalogDamagedError as error:
                    found = [(self.store.catalog, f"{error}; {_REBUILD}")]
                except (SnapshotError, MismatchError, OSError) as error:
                    found = [(path, str(error))]
            if not found:
                break
        return found

    def _format(self, path: Path) -> _Found:
        self.store.check_format()
        yield from ()

    def _record(self, path: Path) -> _Found:
        data = read_file(path, SMALL_FILE_LIMIT)
        snapshot = self.store.decode_record(data, path)
        if (
            self.catalog is not None
            and self._entered(snapshot.id) != entry(snapshot, "", data)
            and not any(files(self.store.markers))  # a session under way brings it in with its next ref
        ):
            yield self.store.catalog, f"it disagrees with the record of snapshot '{snapshot.id}'; {_REBUILD}"
        if snapshot.parent is not None and not self.store.record_path(snapshot.parent).exists():
            yield self.store.record_path(snapshot.parent), f"missing; snapshot '{snapshot.id}' goes on from it"
        if snapshot.keeps_state:
            name, _, size_bytes = held_object(snapshot)
            stored = self.store.objects.path(name)
            try:
                if self.read_data:
                    self.store.arrays(snapshot)
                else:
                    check_header(read_file(stored, HEADER_LIMIT, is_prefix=True), snapshot, stored)
                    if stored.stat().st_size != size_bytes:
                        yield stored, f"expected {size_bytes} bytes, found {stored.stat().st_size}"
            except FileNotFoundError:
                yield stored, f"missing; it holds the state of snapshot '{snapshot.id}'"
            except (SnapshotError, MismatchError) as error:
                yield stored, str(error)

        if (gap := self.store.text_gap(snapshot)) is not None:
            yield gap
        if (gap := self.store.start_gap(snapshot)) is not None:
            yield gap

    def _entered(self, identity: str) -> Entry | None:
        """What the catalog has of a record, but for the stamp."""
        assert self.catalog is not None
        entered = self.catalog.entry(identity)
        return entered._replace(stamp="") if entered is not None else None

    def _head(self, path: Path) -> _Found:
        head = self.store.read_head(path)
        if head is not None:
            yield from self._target(path, head.snapshot)
            if self.catalog is not None and (head.document, head.model) not in self.catalog.heads_at(head.snapshot):
                yield self.store.catalog, f"it disagrees with the head of '{head.document}'; {_REBUILD}"

    def _tag(self, path: Path) -> _Found:
        tag = self.store.read_tag(path)
        if tag is not None:
            yield from self._target(path, tag.snapshot)
            if self.catalog is not None and tag.name not in self.catalog.tags_at(tag.snapshot):
                yield self.store.catalog, f"it disagrees with the tag '{tag.name}'; {_REBUILD}"

    def _target(self, path: Path, identity: str) -> _Found:
        record_path = self.store.record_path(identity)
        try:
            record = self.store.read_record(identity)
        except (SnapshotError, MismatchError) as error:
            yield record_path, str(error)
            return
        if record is None:
            yield record_path, f"missing; '{path.relative_to(self.store.path)}' refers to it"
        elif record.removed:
            yield path, f"it refers to snapshot '{identity}', which was removed"

    def _object(self, path: Path) -> _Found:
        if self.read_data and self.store.objects.path(hash_file(path)) != path:
            yield path, "expected bytes that agree with the file's name, found others"
        elif not is_digest(path.name) or self.store.objects.path(path.name) != path:
            yield path, "expected an object, found another file"

    def _text(self, path: Path) -> _Found:
        texts = self.store.texts
        if not is_digest(path.name) or texts.path(path.name) != path:
            yield path, "expected kept text, found another file"
        elif self.read_data:
            texts.read(path.name)
        else:
            texts.extent(path.name)

    def _postings(self, path: Path) -> _Found:
        if not is_digest(path.name) or self.store.texts.postings_path(path.name) != path:
            yield path, "expected postings, found another file"

    def _cached(self, path: Path) -> _Found:
        if not self.store.is_cached(path):
            yield path, "expected a state that was made, found another file"

    def _catalog(self, path: Path) -> _Found:
        """What the catalog has and no file says."""
        assert self.catalog is not None
        self.catalog.check()
        for identity, _ in self.catalog.copies("records"):
            if not self.store.record_path(identity).exists():
                yield self.store.record_path(identity), "missing; the catalog has it"
        for document, model, _ in self.catalog.heads():
            head_path = self.store.head_path(document, model)
            if not head_path.exists():
                yield head_path, "missing; the catalog has it"
        for name, _ in self.catalog.tags():
            tag_path = self.store.tag_path(name)
            if tag_path is None:
                yield path, f"it has a tag '{name}', which cannot be one; {_REBUILD}"
            elif not tag_path.exists():
                yield tag_path, "missing; the catalog has it"


def hash_file(path: Path) -> str:
    """SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
