"""An index in sqlite of what a store's files say, so that lists, chains and names need not open every file.

It holds nothing that the files do not: a record's row is the record file itself beside the columns that are searched.
It may be deleted at any time, and is made anew when it is missing, damaged or of another version. Who may write when,
and the making anew, are `store.py`'s matter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import failpoint
from rwkv_stream.snapshot_codec import Head, Snapshot, Tag

FAILPOINTS = ("catalog.begin", "catalog.written", "catalog.committed")

_VERSION = 1
_TABLES = (
    """CREATE TABLE records (
        id TEXT PRIMARY KEY, document TEXT NOT NULL, model TEXT NOT NULL, start_digest TEXT NOT NULL, parent TEXT,
        tokens INTEGER NOT NULL, text_bytes INTEGER NOT NULL, created TEXT NOT NULL, removed INTEGER NOT NULL,
        record BLOB NOT NULL
    )""",
    "CREATE TABLE heads (document TEXT, model TEXT, snapshot TEXT NOT NULL, PRIMARY KEY (document, model))",
    "CREATE TABLE tags (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL)",
)
_INDEXES = (
    "CREATE INDEX records_by_parent ON records (parent, model, start_digest)",
    "CREATE INDEX records_by_age ON records (created, document, tokens, id)",
    "CREATE INDEX records_by_document ON records (document)",
    "CREATE INDEX heads_by_snapshot ON heads (snapshot)",
    "CREATE INDEX tags_by_snapshot ON tags (snapshot)",
)
_FILL_CACHE_KIB = 65_536  # while it is made anew; less makes sqlite write pages twice
_MACHINE_ERRORS = {
    "database or disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "unable to open database file": errno.EACCES,
    "attempt to write a readonly database": errno.EROFS,
    "database is locked": errno.EBUSY,
}
_BUSY_TIMEOUT_S = 60.0


class CatalogDamagedError(SnapshotError):
    """The file is absent, not sqlite, of another version or contradicts itself; the store then makes it anew."""


class Row(NamedTuple):
    """What the catalog holds of a record."""

    id: str
    document: str
    model: str
    start_digest: str
    parent: str | None
    tokens: int
    text_bytes: int
    created: str
    removed: int
    record: bytes


class Link(NamedTuple):
    """A record's place in its chain."""

    id: str
    parent: str | None
    tokens: int
    text_bytes: int
    removed: int


def row(snapshot: Snapshot, record: bytes) -> Row:
    """The row of a record file and what it says."""
    s = snapshot
    return Row(s.id, s.document, s.model, s.start_digest, s.parent, s.tokens, s.bytes, s.created, s.removed, record)


class Catalog:
    """One connection. Every method raises CatalogDamagedError, and OSError where the machine is at fault."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, *, writable: bool) -> Iterator[Catalog]:
        """An existing catalog of this version."""
        if not path.exists():
            raise CatalogDamagedError("absent")
        with _connected(path, "rw" if writable else "ro") as connection:
            with _translated():
                (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != _VERSION:
                raise CatalogDamagedError(f"version {version}")
            yield cls(connection)

    @classmethod
    @contextlib.contextmanager
    def in_memory(cls, fill: Callable[[Catalog], None]) -> Iterator[Catalog]:
        """A catalog for a store that cannot be written to."""
        with _connected(None, "memory") as connection:
            catalog = cls(connection)
            catalog._refill(fill)
            yield catalog

    @classmethod
    def rebuild(cls, path: Path, fill: Callable[[Catalog], None]) -> None:
        """Make the catalog anew, in one transaction; a file that sqlite cannot use is removed first."""
        try:
            with _connected(path, "rwc") as connection:
                cls(connection)._refill(fill)
        except CatalogDamagedError:
            for suffix in ("-wal", "-shm", ""):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            with _connected(path, "rwc") as connection:
                cls(connection)._refill(fill)

    def _refill(self, fill: Callable[[Catalog], None]) -> None:
        with _translated():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA cache_size = -{_FILL_CACHE_KIB}")
        with self.changing():
            for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                self._db.execute(f'DROP TABLE "{name}"')
            for statement in _TABLES:
                self._db.execute(statement)
            fill(self)
            for statement in _INDEXES:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")

    # ---- writing, inside `changing` ----

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """One durable transaction; undone if the block raises."""
        with _translated():
            self._db.execute("BEGIN IMMEDIATE")
            failpoint("catalog.begin")
            try:
                yield
                failpoint("catalog.written")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            failpoint("catalog.committed")

    def put_record(self, values: Row) -> None:
        self._db.execute(f"INSERT OR REPLACE INTO records VALUES ({', '.join('?' * len(values))})", values)

    def put_head(self, head: Head) -> None:
        self._db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (head.document, head.model, head.snapshot))

    def drop_head(self, document: str, model: str) -> None:
        self._db.execute("DELETE FROM heads WHERE document = ? AND model = ?", (document, model))

    def put_tag(self, tag: Tag) -> None:
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?)", (tag.name, tag.snapshot))

    def drop_tag(self, name: str) -> None:
        self._db.execute("DELETE FROM tags WHERE name = ?", (name,))

    # ---- reading ----

    def count(self) -> int:
        """How many records, removed ones too."""
        return int(next(self._query("SELECT count(*) FROM records"))[0])

    def ids(self) -> Iterator[str]:
        """Of every record, removed ones too."""
        return (identity for (identity,) in self._query("SELECT id FROM records ORDER BY id"))

    def row(self, snapshot_id: str) -> Row | None:
        return next(map(Row._make, self._query("SELECT * FROM records WHERE id = ?", snapshot_id)), None)

    def listed(
        self, document: str | None, model: str | None, after: tuple[str, str, int, str] | None
    ) -> Iterator[tuple[tuple[str, str, int, str], bytes]]:
        """((created, document, tokens, id), record file) of what is not removed, oldest first, `after` such a place.

        A document's are those published under its name and those its heads descend from.
        """
        where, values = ["NOT removed"], list[str | int]()
        if document is not None:
            where.append(
                "id IN (WITH RECURSIVE lineage (id) AS ("
                "SELECT snapshot FROM heads WHERE document = ?"
                " UNION SELECT parent FROM records JOIN lineage USING (id) WHERE parent IS NOT NULL)"
                " SELECT id FROM lineage UNION ALL SELECT id FROM records WHERE document = ?)"
            )
            values += [document, document]
        if model is not None:
            where.append("model = ?")
            values.append(model)
        if after is not None:
            where.append("(created, document, tokens, id) > (?, ?, ?, ?)")
            values += after
        order = "ORDER BY created, document, tokens, id"
        found = self._query(
            f"SELECT created, document, tokens, id, record FROM records WHERE {' AND '.join(where)} {order}", *values
        )
        return (((created, name, tokens, identity), record) for created, name, tokens, identity, record in found)

    def lineage(self, snapshot_id: str) -> Iterator[Link]:
        """This record and its ancestors, removed ones too, as far as the catalog knows them; endless in a ring."""
        return map(
            Link._make,
            self._query(
                "WITH RECURSIVE lineage (id, parent, tokens, text_bytes, removed) AS ("
                "SELECT id, parent, tokens, text_bytes, removed FROM records WHERE id = ?"
                " UNION ALL SELECT r.id, r.parent, r.tokens, r.text_bytes, r.removed FROM lineage AS l"
                " JOIN records AS r ON r.id = l.parent)"
                " SELECT * FROM lineage",
                snapshot_id,
            ),
        )

    def descendants(self, model: str, start_digest: str, parent: str | None) -> Iterator[tuple[str, bytes]]:
        """(id, record file) of those whose nearest ancestor that is not removed is `parent` (None: that have none)."""
        return self._query(
            "WITH RECURSIVE below (id, removed, tokens) AS ("
            "SELECT id, removed, tokens FROM records WHERE parent IS ? AND model = ? AND start_digest = ?"
            " UNION ALL SELECT r.id, r.removed, r.tokens FROM below AS b"
            " JOIN records AS r ON r.parent = b.id WHERE b.removed AND r.tokens > b.tokens)"
            " SELECT id, record FROM below JOIN records USING (id) WHERE NOT below.removed ORDER BY below.tokens, id",
            parent,
            model,
            start_digest,
        )

    def heads(self) -> Iterator[tuple[str, str, str]]:
        """(document, model, snapshot), by document."""
        return self._query("SELECT * FROM heads ORDER BY document, model")

    def heads_named(self, ending: str, *, whole: bool) -> list[tuple[str, str]]:
        """(document, model) of the heads whose document is named so, or ends so."""
        if whole:
            return list(self._query("SELECT document, model FROM heads WHERE document = ?", ending))
        return list(
            self._query(
                "SELECT document, model FROM heads WHERE substr(document, -length(?)) = ? ORDER BY document, model",
                ending,
                ending,
            )
        )

    def heads_at(self, snapshot_id: str) -> list[tuple[str, str]]:
        """(document, model) of the heads that stand at a snapshot."""
        return list(self._query("SELECT document, model FROM heads WHERE snapshot = ? ORDER BY 1, 2", snapshot_id))

    def tags(self) -> Iterator[tuple[str, str]]:
        """(name, snapshot), by name."""
        return self._query("SELECT * FROM tags ORDER BY name")

    def tags_at(self, snapshot_id: str) -> list[str]:
        return [name for (name,) in self._query("SELECT name FROM tags WHERE snapshot = ? ORDER BY 1", snapshot_id)]

    def _query(self, sql: str, *values: str | int | None) -> Iterator[Any]:
        with _translated():
            for found in self._db.execute(sql, values):  # noqa: UP028 - `yield from` closes the cursor, perhaps too late
                yield found


@contextlib.contextmanager
def _connected(path: Path | None, mode: str) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit; the last one to close writes the WAL back."""
    uri = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode={mode}"
    if path is not None and mode == "ro" and not path.with_name(f"{path.name}-wal").exists():
        uri += "&immutable=1"  # sqlite would make a -wal beside the file, which a read-only folder does not allow
    with _translated():
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        with _translated():
            connection.execute("PRAGMA synchronous=FULL")
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """sqlite's errors as OSError where disk or rights are at fault, as CatalogDamagedError otherwise."""
    try:
        yield
    except sqlite3.OperationalError as error:
        for text, number in _MACHINE_ERRORS.items():
            if text in str(error):
                raise OSError(number, f"{os.strerror(number)} ({error})", "catalog.sqlite") from error
        raise CatalogDamagedError(str(error)) from error
    except sqlite3.DatabaseError as error:
        raise CatalogDamagedError(str(error)) from error
