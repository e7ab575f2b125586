"""The catalog made from a store's files, brought up to date and made anew. Whoever changes it holds `locks/publish`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rwkv_stream.errors import MismatchError, SnapshotError
from rwkv_stream.files import failpoint
from rwkv_stream.store.catalog import FAILPOINTS as CATALOG_FAILPOINTS
from rwkv_stream.store.catalog import Catalog, CatalogDamagedError
from rwkv_stream.store.layout import StoreFiles, files, stamp
from rwkv_stream.store.records import Head, Snapshot, Tag
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, read_file

FAILPOINTS = (*CATALOG_FAILPOINTS, "rebuild.begin", "rebuild.done")

log = logging.getLogger(__name__)


class CatalogKeeper:
    """What keeps the catalog of a store equal to its records, heads and tags.

    let_go  is called before the catalog is made anew, for which nobody else may have it open
    """

    def __init__(self, store: StoreFiles, let_go: Callable[[], None] = lambda: None) -> None:
        self._store, self._let_go = store, let_go

    def open(self, *, writable: bool) -> contextlib.AbstractContextManager[Catalog]:
        """The catalog as it is; CatalogDamagedError where it cannot be used."""
        return Catalog.open(self._store.catalog, writable=writable)

    def in_memory(self) -> contextlib.AbstractContextManager[Catalog]:
        """One made from the files, for a store that cannot be written to."""
        return Catalog.in_memory(self._fill)

    def rebuild(self) -> int:
        """Make it anew, from nothing; how many records it has."""
        log.info("making the catalog of store '%s' anew", self._store.path)
        failpoint("rebuild.begin")
        self._let_go()
        Catalog.rebuild(self._store.catalog, self._fill)
        failpoint("rebuild.done")
        with self.open(writable=True) as catalog:
            return catalog.count()

    def update(self) -> None:
        """Enter what is new or was replaced. What the catalog has and is gone or damaged stays: whoever removes a file
        takes it out of the catalog first, so that `repair` can put it back."""
        try:
            with self.open(writable=True) as catalog, catalog.changing():
                self._fill(catalog, skip_known=True)
        except CatalogDamagedError:
            self.rebuild()

    def change(self, records: Iterable[str], change: Callable[[Catalog], None] | None = None) -> None:
        """Bring records, by their ids, and a change into the catalog; into a new one where it is damaged."""
        try:
            self._change(records, change)
        except CatalogDamagedError:
            self.rebuild()
            self._change(records, change)

    def _change(self, records: Iterable[str], change: Callable[[Catalog], None] | None) -> None:
        with self.open(writable=True) as catalog, catalog.changing():
            for identity in sorted(records):
                self.enter(self._store.record_path(identity), catalog)
            if change is not None:
                change(catalog)

    def enter(self, path: Path, catalog: Catalog) -> None:
        """A record, head or tag file into the catalog; raises as reading it does."""
        mark = stamp(path)
        data = read_file(path, SMALL_FILE_LIMIT)
        entry = self._store.decode(path, data)
        if isinstance(entry, Head):
            catalog.put_head(entry, path.name, mark, data)
        elif isinstance(entry, Tag):
            catalog.put_tag(entry, path.name, mark, data)
        else:
            catalog.put_record(entry, mark, data)

    def _fill(self, catalog: Catalog, *, skip_known: bool = False) -> None:
        """All that the files say and that is whole."""
        folders = {"records": self._store.records, "heads": self._store.heads, "tags": self._store.tags}
        for table, folder in folders.items():
            for path in files(folder):
                with _left_out():
                    if not skip_known or catalog.stamp(table, path.name) != stamp(path):
                        self.enter(path, catalog)

    def snapshot(self, identity: str, record: bytes) -> Snapshot:
        """Of a row, whose record was decoded when it was entered."""
        try:
            return self._store.decode_row(identity, record)
        except SnapshotError as error:
            raise CatalogDamagedError(str(error)) from error


@contextlib.contextmanager
def _left_out() -> Iterator[None]:
    """What cannot be read is left out of the catalog: `verify` reports it, and using it raises."""
    try:
        yield
    except FileNotFoundError:
        pass  # removed since it was listed
    except (SnapshotError, MismatchError) as error:
        log.warning("left out of the catalog: %s", error)
