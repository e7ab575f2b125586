"""Bringing a damaged store back to one that verifies: what can be put right is, the rest is moved aside.

Nothing is deleted. What is in the way of a good file, or is itself no good, goes to `quarantine/<time>-<tag>/` under
the path that it had. Sources of good bytes: the copies of records, heads and tags in the catalog, and files that are
whole but lie under another's name, there or where a repair that was killed had moved them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rwkv_stream.errors import MismatchError, SnapshotError
from rwkv_stream.files import failpoint, fsync_folder, make_folder
from rwkv_stream.store import records
from rwkv_stream.store.catalog import Catalog, CatalogDamagedError
from rwkv_stream.store.layout import StoreFiles, files, publishing_failpoints
from rwkv_stream.store.objects import held_object
from rwkv_stream.store.records import Head, Snapshot, Tag, now
from rwkv_stream.store.sealed import SMALL_FILE_LIMIT, encode_format, is_digest, read_file
from rwkv_stream.store.sessions import Sessions
from rwkv_stream.store.texts import FILE_LIMIT, decode
from rwkv_stream.store.verify import Damage, hash_file, index_texts

FAILPOINTS = (
    *publishing_failpoints("repair.file"),
    "repair.begin",
    "repair.moved",
    "repair.records",
    "repair.objects",
    "repair.texts",
    "repair.done",
)

_UNFINISHED = "unfinished"  # a file in the quarantine folder of a repair that has not come to its end

Table = Literal["records", "heads", "tags"]


@dataclass(frozen=True, slots=True)
class Lost:
    """A snapshot whose state is gone: the tokens that are to be read again for it."""

    snapshot: str
    document: str
    from_token: int
    to_token: int


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was put right, what was moved aside (paths relative to the store), what is lost, and how many postings were
    made again."""

    restored: list[Damage] = field(default_factory=list)
    quarantined: list[Damage] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    indexed: int = 0


def repair(sessions: Sessions) -> Repaired:
    """Put right what can be, and make the catalog anew; see `Store.repair`."""
    store = sessions.store
    with sessions.alone() as session, sessions.publishing(), contextlib.ExitStack() as stack:
        quarantine = store.quarantine / f"{now().replace(':', '')}-{session.tag[:8]}"
        try:
            catalog: Catalog | None = stack.enter_context(sessions.keeper.open(writable=True))
            assert catalog is not None
            catalog.check()
        except CatalogDamagedError:
            catalog = None
        report = _Repair(store, catalog, quarantine, sessions).run()
        stack.close()
        sessions.keeper.rebuild()
    return report


class _Repair:
    """One pass over a store in which nobody else is at work.

    catalog  the catalog as it is, None where it cannot be read: a source of copies, believed only with their checksums
    """

    def __init__(self, store: StoreFiles, catalog: Catalog | None, quarantine: Path, sessions: Sessions) -> None:
        self.store, self.catalog, self.quarantine, self.sessions = store, catalog, quarantine, sessions
        self.report = Repaired()
        self.decoders: dict[Table, Callable[[bytes, Path], Snapshot | Head | Tag]] = {
            "records": store.decode_record,
            "heads": store.decode_head,
            "tags": store.decode_tag,
        }
        self.folders: dict[Table, Path] = {"records": store.records, "heads": store.heads, "tags": store.tags}
        self.gone_heads = set[Path]()
        self.unfinished = [path.parent for path in sorted(store.quarantine.glob(f"*/{_UNFINISHED}"))]

    def run(self) -> Repaired:
        failpoint("repair.begin")
        self._format()
        for table in self.folders:
            self._small_files(table)
        self._parents()
        failpoint("repair.records")
        self._objects()
        failpoint("repair.objects")
        self._texts()
        failpoint("repair.texts")
        self._heads()
        for path in list(files(self.store.tags)):
            self._tag(path)
        self._finish()
        failpoint("repair.done")
        return self.report

    def publish(self, path: Path, data: bytes) -> None:
        self.sessions.publish(path, data, "repair.file")

    # ---- small files by themselves ----

    def _format(self) -> None:
        path = self.store.format
        try:
            self.store.check_format()
        except (SnapshotError, FileNotFoundError) as error:
            if path.exists():
                self._keep_aside(path)
            self.publish(path, encode_format())
            self._note(self.report.restored, path, str(error))

    def _small_files(self, table: Table) -> None:
        """Each file whole and under its own name; what the catalog has and no file says is put back."""
        displaced = [path for folder in self._moved_before(self.folders[table]) for path in files(folder)]
        if table == "heads":
            self.gone_heads = {self.store.heads / path.name for path in displaced}
        for path in list(files(self.folders[table])):
            try:
                self.decoders[table](read_file(path, SMALL_FILE_LIMIT), path)
            except (MismatchError, PermissionError):
                raise
            except (SnapshotError, OSError) as error:
                if not self._put_back(table, path, self._copy(table, path.name), str(error)):
                    displaced.append(self._move_aside(path, str(error)))
                    if table == "heads":
                        self.gone_heads.add(path)
        for path in displaced:
            self._send_home(table, path)
        if self.catalog is not None:
            for name, data in self.catalog.copies(table):
                path = self._home(table, name)
                if not path.exists():
                    self._put_back(table, path, data, "missing; the catalog had it")
        self.gone_heads = {path for path in self.gone_heads if not path.exists()}

    def _copy(self, table: Table, name: str) -> bytes | None:
        return self.catalog.copy(table, name) if self.catalog is not None else None

    def _home(self, table: Table, name: str) -> Path:
        return self.store.record_path(name) if table == "records" else self.folders[table] / name

    def _put_back(self, table: Table, path: Path, data: bytes | None, reason: str) -> bool:
        """Publish a copy of the small file at `path`, if it is a good one; what lies there is kept aside."""
        if data is None or self._home(table, path.name) != path:
            return False
        try:
            self.decoders[table](data, path)
        except (SnapshotError, MismatchError):
            return False
        if path.exists():
            self._keep_aside(path)
        make_folder(path.parent)
        self.publish(path, data)
        self._note(self.report.restored, path, reason)
        return True

    def _send_home(self, table: Table, path: Path) -> None:
        """A file moved aside that is whole, but lay under another's name, is put where it belongs."""
        try:
            data = read_file(path, SMALL_FILE_LIMIT)
            home = self._own_path(table, data, path)
        except (SnapshotError, MismatchError, OSError):
            return  # it is as damaged as was noted when it was moved aside
        if home is not None and not home.exists():
            self._put_back(table, home, data, "it lay under another name")

    def _own_path(self, table: Table, data: bytes, path: Path) -> Path | None:
        if table == "records":
            return self.store.record_path(records.decode_record(data, self.store, path).id)
        if table == "heads":
            head = records.decode_head(data, path)
            return self.store.head_path(head.document, head.model)
        return self.store.tag_path(records.decode_tag(data, path).name)

    # ---- what they refer to ----

    def _records(self) -> Iterator[Snapshot]:
        for path in list(files(self.store.records)):
            record = self.store.read_record(path.name)
            assert record is not None
            yield record

    def _parents(self) -> None:
        """A lineage ends where a record is lost; a new reading of the text proves what lies before it, and joins it."""
        for record in self._records():
            if record.parent is None or self.store.record_path(record.parent).exists():
                continue
            path = self.store.record_path(record.id)
            self._keep_aside(path)
            self.publish(path, records.encode_record(replace(record, parent=None)))
            self._note(self.report.restored, path, f"its parent '{record.parent}' is lost: its lineage begins here")

    def _objects(self) -> None:
        """Objects under their own names; a snapshot whose object is lost becomes a removed one."""
        displaced = self._displaced(self.store.objects.folder, self.store.objects.path)
        for record in self._records():
            if not record.keeps_state:
                continue
            path = self.store.objects.path(held_object(record).name)
            self._bring_home(path, displaced)
            try:
                self.store.arrays(record)
            except SnapshotError as error:
                self._lose(record, path, str(error))

    def _displaced(self, folder: Path, home: Callable[[str], Path]) -> dict[str, Path]:
        """Move aside what does not lie under the digest of its bytes; where that and what was moved before is now, by
        its digest."""
        displaced: dict[str, Path] = {}
        for moved in self._moved_before(folder):
            displaced |= {hash_file(path): path for path in files(moved)}
        for path in list(files(folder)):
            reason, digest = "expected bytes that agree with the file's name, found others", ""
            try:
                digest = hash_file(path)
            except PermissionError:
                raise
            except OSError as error:
                reason = str(error)
            if not digest or home(digest) != path:
                displaced[digest] = self._move_aside(path, reason)
        return displaced

    def _bring_home(self, path: Path, displaced: dict[str, Path]) -> None:
        """Put a missing file back where its bytes were found under another name."""
        if not path.exists() and path.name in displaced:
            make_folder(path.parent)
            displaced[path.name].replace(path)
            fsync_folder(path.parent)
            self._note(self.report.restored, path, "it lay under another name")

    def _texts(self) -> None:
        """Extents under their own names; a snapshot some of whose text is lost has none. Postings are made again."""
        texts = self.store.texts
        displaced = self._displaced(texts.folder, texts.path)
        for digest, path in list(displaced.items()):
            with contextlib.suppress(SnapshotError):  # it is no extent
                decode(read_file(path, FILE_LIMIT), texts.path(digest))
                self._bring_home(texts.path(digest), displaced)
        for path in list(files(texts.folder)):
            try:
                texts.read(path.name)
            except SnapshotError as error:
                self._move_aside(path, str(error))
        for path in list(files(texts.postings_folder)):
            if not is_digest(path.name) or texts.postings_path(path.name) != path:
                self._move_aside(path, "expected postings, found another file")
        for path in list(files(self.store.cache)):
            if not self.store.is_cached(path):
                self._move_aside(path, "expected a state that was made, found another file")
        order = sorted((record.tokens, record.id) for record in self._records() if record.text is not None)
        for _, identity in order:  # none before the one that it goes on from
            record = self.store.read_record(identity)
            assert record is not None
            gap = self.store.text_gap(record) or self.store.start_gap(record)
            if gap is not None and not record.keeps_state:
                self._lose(record, None, gap[1])
            elif gap is not None:
                path = self.store.record_path(identity)
                self._keep_aside(path)
                self.publish(path, records.encode_record(replace(record, text=None, inline_extent=None)))
                self._note(self.report.restored, path, "its text is lost: ingest keeps it again")
        self.report = replace(self.report, indexed=index_texts(self.sessions, ()))

    def _lose(self, record: Snapshot, path: Path | None, reason: str) -> None:
        """The record keeps its place in the lineage; what may be left of its object, at `path`, is moved aside."""
        record_path = self.store.record_path(record.id)
        self._keep_aside(record_path)
        self.publish(record_path, records.encode_record(record.tombstone()))
        if path is not None and path.exists():
            self._move_aside(path, reason)
        self._note_lost(record)

    def _heads(self) -> None:
        """Heads stand at what exists: at the nearest ancestor, or else the newest snapshot of the document's name."""
        nameless: dict[Path, Head | None] = dict.fromkeys(self.gone_heads)
        for path in list(files(self.store.heads)):
            head = self.store.read_head(path)
            assert head is not None
            target = self.store.read_record(head.snapshot)
            if target is not None and not target.removed:
                continue
            ancestors = self.store.ancestors(target) if target is not None else iter(())
            nearest = next((ancestor for ancestor in ancestors if not ancestor.removed), None)
            if nearest is not None:
                self._move_head(path, head, nearest)
            else:
                nameless[path] = head
        newest: dict[Path, Snapshot] = {}
        passed = {record.parent for record in self._records() if not record.removed} if nameless else set()

        def age(record: Snapshot) -> tuple[bool, str, int]:
            return record.id not in passed, record.created, record.tokens

        for record in self._records() if nameless else ():
            path = self.store.head_path(record.document, record.model)
            if path in nameless and not record.removed:
                newest[path] = max(record, newest.get(path, record), key=age)
        for path, head in nameless.items():
            if path in newest:
                self._move_head(path, head, newest[path])
            elif head is not None:
                self._move_aside(path, f"no snapshot of '{head.document}' is left")

    def _move_head(self, path: Path, head: Head | None, snapshot: Snapshot) -> None:
        if head is None:
            head = Head(snapshot.document, snapshot.model, snapshot.id, snapshot.encoding, now(), snapshot.chunk)
        else:
            self._keep_aside(path)
        self.publish(path, records.encode_head(replace(head, snapshot=snapshot.id, moved=now(), mark=None)))
        self._note(self.report.restored, path, f"'{head.document}' now stands at token {snapshot.tokens}")

    def _tag(self, path: Path) -> None:
        tag = self.store.read_tag(path)
        assert tag is not None
        target = self.store.read_record(tag.snapshot)
        if target is None or target.removed:
            self._move_aside(path, f"the snapshot of tag '{tag.name}' is lost")

    # ---- aside ----

    def _moved_before(self, folder: Path) -> list[Path]:
        """Where repairs that were killed had moved the files of a folder."""
        return [aside / folder.relative_to(self.store.path) for aside in self.unfinished]

    def _finish(self) -> None:
        """Say what killed repairs had found lost, and that all is done."""
        said = {lost.snapshot for lost in self.report.lost}
        for folder in self._moved_before(self.store.records):
            for path in files(folder):
                record = self.store.read_record(path.name) if is_digest(path.name) else None
                if record is not None and record.removed and record.id not in said:
                    self._note_lost(record)
        for folder in (*self.unfinished, self.quarantine):
            (folder / _UNFINISHED).unlink(missing_ok=True)

    def _note_lost(self, record: Snapshot) -> None:
        nearest = next((ancestor for ancestor in self.store.ancestors(record) if not ancestor.removed), None)
        from_token = nearest.tokens if nearest is not None else 0
        self.report.lost.append(Lost(record.id, record.document, from_token, record.tokens))

    def _move_aside(self, path: Path, reason: str) -> Path:
        aside = self._aside(path)
        path.replace(aside)
        fsync_folder(aside.parent)
        fsync_folder(path.parent)
        failpoint("repair.moved")
        self._note(self.report.quarantined, path, reason)
        return aside

    def _keep_aside(self, path: Path) -> None:
        """Keep the bytes of a file that is about to be replaced."""
        aside = self._aside(path)
        try:
            os.link(path, aside)
        except OSError:  # a filesystem without links, or a file that is none
            path.replace(aside)
        fsync_folder(aside.parent)

    def _aside(self, path: Path) -> Path:
        aside = self.quarantine / path.relative_to(self.store.path)
        make_folder(aside.parent)
        (self.quarantine / _UNFINISHED).touch()
        fsync_folder(self.quarantine)
        number = 0
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{path.name}.{number}")
        return aside

    def _note(self, notes: list[Damage], path: Path, reason: str) -> None:
        notes.append(Damage(os.fspath(path.relative_to(self.store.path)), reason))
