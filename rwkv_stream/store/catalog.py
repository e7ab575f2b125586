"""An index in sqlite of what a store's files say, so that lists, chains and names need not open every file.

It holds nothing that the files do not: a row is the record, head or tag file itself beside the columns that are
searched and the file's stamp, by which a file that was replaced is told from one that is known. It may be deleted at
any time, and is made anew when it is missing, damaged or of another version: by `catalog_keeper.py`. Who may write
when is the matter of `sessions.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_stream.errors import SnapshotError
from rwkv_stream.files import failpoint
from rwkv_stream.store.records import CHUNK_STATE, Head, Snapshot, Tag

FAILPOINTS = ("catalog.begin", "catalog.written", "catalog.committed")

_VERSION = 6
_TABLES = (
    """CREATE TABLE records (
        id TEXT PRIMARY KEY, document TEXT NOT NULL, model TEXT NOT NULL, start_digest TEXT NOT NULL, start TEXT,
        parent TEXT, tokens INTEGER NOT NULL, chain TEXT NOT NULL, text_bytes INTEGER NOT NULL, leaf INTEGER NOT NULL,
        created TEXT NOT NULL, size_bytes INTEGER NOT NULL, removed INTEGER NOT NULL, text TEXT, how TEXT NOT NULL,
        edge INTEGER NOT NULL, stamp TEXT NOT NULL, file BLOB NOT NULL
    )""",
    "CREATE TABLE objects (name TEXT PRIMARY KEY, snapshot TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX objects_by_snapshot ON objects (snapshot)",  # needed while they are entered
    """CREATE TABLE heads (
        document TEXT NOT NULL, model TEXT NOT NULL, snapshot TEXT NOT NULL, id TEXT PRIMARY KEY, stamp TEXT NOT NULL,
        file BLOB NOT NULL
    )""",
    """CREATE TABLE tags (
        name TEXT NOT NULL, snapshot TEXT NOT NULL, id TEXT PRIMARY KEY, stamp TEXT NOT NULL, file BLOB NOT NULL
    )""",
)
_INDEXES = (
    "CREATE INDEX records_by_parent ON records (parent, model, start_digest, removed, tokens)",
    "CREATE INDEX records_by_start ON records (start) WHERE start IS NOT NULL",
    "CREATE INDEX records_by_chain ON records (chain)",
    "CREATE INDEX records_by_age ON records (created, document, tokens, id)",
    "CREATE INDEX records_by_document ON records (document, how)",
    "CREATE INDEX heads_by_document ON heads (document)",
    "CREATE INDEX heads_by_snapshot ON heads (snapshot)",
    "CREATE INDEX tags_by_snapshot ON tags (snapshot)",
)
_NO_CHUNK = f"how != '{CHUNK_STATE}'"  # of what lists, trees and lineages are made of
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


class CatalogAbsentError(CatalogDamagedError):
    """There is none, or one that was never filled, as its maker died, or that of an older version of the program."""


class Listed(NamedTuple):
    """A snapshot in a list, as the catalog has it; `Store.get` of its id gives all that is recorded."""

    id: str
    document: str
    tokens: int
    bytes: int  # of text
    size_bytes: int  # of its objects on disk
    parent: str | None
    start: str | None
    created: str
    model: str
    how: str
    leaf: bool
    edge: bool  # at one of the document
    removed: bool = False  # only its place in the lineage is kept

    @property
    def keeps_state(self) -> bool:
        """As `Snapshot.keeps_state`."""
        return self.size_bytes > 0


_LISTED = "id, document, tokens, text_bytes, size_bytes, parent, start, created, model, how, leaf, edge, removed"
SORTS = {
    "created": "created, document, tokens, id",
    "document": "document, tokens, id",
    "tokens": "tokens, id",
    "bytes": "text_bytes, id",
    "size": "size_bytes, id",
}


class Entry(NamedTuple):
    """What the catalog holds of a record."""

    id: str
    document: str
    model: str
    start_digest: str
    start: str | None
    parent: str | None
    tokens: int
    chain: str
    text_bytes: int
    leaf: bool
    created: str
    size_bytes: int
    removed: bool
    text: str | None  # where it lies in files of its own
    how: str
    edge: bool
    stamp: str
    file: bytes


class Link(NamedTuple):
    """A record's place in its chain."""

    id: str
    parent: str | None
    tokens: int
    text_bytes: int
    removed: int


def entry(snapshot: Snapshot, stamp: str, file: bytes) -> Entry:
    """The entry of a record: what its file says, the file's stamp, the file."""
    s = snapshot
    return Entry(
        s.id, s.document, s.model, s.start_digest, s.start, s.parent, s.tokens, s.chain, s.bytes, s.leaf, s.created,
        s.size_bytes, s.removed, s.last_extent, s.how, s.edge, stamp, file,
    )  # fmt: skip


class Catalog:
    """One connection. Every method raises CatalogDamagedError, and OSError where the machine is at fault."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, *, writable: bool) -> Iterator[Catalog]:
        """An existing catalog of this version."""
        if not path.exists():
            raise CatalogAbsentError("absent")
        with _connected(path, "rw" if writable else "ro") as connection:
            with _translated():
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version == tables == 0:
                raise CatalogAbsentError("empty")
            if 0 < version < _VERSION:
                raise CatalogAbsentError(f"version {version}")
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

    def put_record(self, snapshot: Snapshot, stamp: str, file: bytes) -> None:
        values = entry(snapshot, stamp, file)
        self._db.execute(f"INSERT OR REPLACE INTO records VALUES ({', '.join('?' * len(values))})", values)
        self._db.execute("DELETE FROM objects WHERE snapshot = ?", (snapshot.id,))
        self._db.executemany(
            "INSERT OR REPLACE INTO objects VALUES (?, ?)", ((stored.name, snapshot.id) for stored in snapshot.objects)
        )

    def drop_record(self, identity: str) -> None:
        self._db.execute("DELETE FROM records WHERE id = ?", (identity,))
        self._db.execute("DELETE FROM objects WHERE snapshot = ?", (identity,))

    def put_head(self, head: Head, name: str, stamp: str, file: bytes) -> None:
        values = head.document, head.model, head.snapshot, name, stamp, file
        self._db.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?, ?, ?)", values)

    def drop_head(self, document: str, model: str) -> None:
        self._db.execute("DELETE FROM heads WHERE document = ? AND model = ?", (document, model))

    def put_tag(self, tag: Tag, name: str, stamp: str, file: bytes) -> None:
        values = tag.name, tag.snapshot, name, stamp, file
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?, ?)", values)

    def drop_tag(self, name: str) -> None:
        self._db.execute("DELETE FROM tags WHERE name = ?", (name,))

    # ---- reading ----

    def check(self) -> None:
        """CatalogDamagedError unless its pages are whole, and its indexes agree with its tables."""
        (found,) = next(self._query("PRAGMA integrity_check(1)"))
        if found != "ok":
            raise CatalogDamagedError(found)

    def count(self) -> int:
        """How many records, removed ones too."""
        return int(next(self._query("SELECT count(*) FROM records"))[0])

    def entry(self, snapshot_id: str) -> Entry | None:
        return next(map(Entry._make, self._query("SELECT * FROM records WHERE id = ?", snapshot_id)), None)

    def listed(
        self, document: str | None, model: str | None, sort: str, reverse: bool, chunk_states: bool
    ) -> Iterator[Listed]:
        """What is not removed; a document's are those published under its name and those its heads descend from.

        chunk_states  those of stretches of documents among them
        """
        where, values = ["NOT removed"], list[str | int]()
        if not chunk_states:
            where.append(_NO_CHUNK)
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
        order = SORTS[sort]
        if reverse:
            order = ", ".join(f"{column} DESC" for column in order.split(", "))
        found = self._query(
            f"SELECT {_LISTED} FROM records WHERE {' AND '.join(where)} ORDER BY {order}",
            *values,
        )
        return _as_listed(found)

    def family(self, document: str | None) -> Iterator[Listed]:
        """Removed or not, in order of age: all, or those of a document (as `listed` has them), what they go on or
        started from, and what goes on or started from them."""
        if document is None:
            return _as_listed(
                self._query(f"SELECT {_LISTED} FROM records WHERE {_NO_CHUNK} ORDER BY {SORTS['created']}")
            )
        return _as_listed(
            self._query(
                "WITH RECURSIVE own (id) AS ("
                f"SELECT id FROM records WHERE document = ?1 AND {_NO_CHUNK}"
                " UNION SELECT snapshot FROM heads WHERE document = ?1"
                " UNION SELECT parent FROM own JOIN records USING (id) WHERE parent IS NOT NULL),"
                " above (id) AS (SELECT start FROM own JOIN records USING (id) WHERE start IS NOT NULL"
                " UNION SELECT o.id FROM above JOIN records AS r USING (id)"
                " JOIN records AS o ON o.id IN (r.parent, r.start)),"
                " below (id) AS (SELECT id FROM own"
                " UNION SELECT r.id FROM below AS b JOIN records AS r ON r.parent = b.id OR r.start = b.id)"
                f" SELECT {_LISTED} FROM records WHERE id IN (SELECT id FROM above UNION SELECT id FROM below)"
                f" AND {_NO_CHUNK}"
                f" ORDER BY {SORTS['created']}",
                document,
            )
        )

    def lineage(self, snapshot_id: str) -> Iterator[Link]:
        """This record and its ancestors, removed ones too, as far as the catalog knows them; endless in a ring."""
        found = self._query(
            "WITH RECURSIVE lineage (id, parent, tokens, text_bytes, removed) AS ("
            "SELECT id, parent, tokens, text_bytes, removed FROM records WHERE id = ?"
            " UNION ALL SELECT r.id, r.parent, r.tokens, r.text_bytes, r.removed FROM lineage AS l"
            " JOIN records AS r ON r.id = l.parent)"
            " SELECT * FROM lineage",
            snapshot_id,
        )
        return (Link(id, parent, *_numbers(tokens, n_bytes, removed)) for id, parent, tokens, n_bytes, removed in found)

    def reach(self, model: str, start_digest: str, parent: str | None, limit: int) -> int | None:
        """Most tokens, up to `limit`, of those whose nearest ancestor that is neither removed nor at an edge is
        `parent` (None: of those that have none); None without any."""
        (reach,) = next(
            self._query(
                "WITH RECURSIVE origin (id, tokens) AS (VALUES (?1, -1)"
                " UNION ALL SELECT r.id, r.tokens FROM origin AS o JOIN records AS r ON r.parent IS o.id"
                " AND r.model = ?2 AND r.start_digest = ?3 AND (r.removed OR r.edge) AND r.tokens > o.tokens)"
                " SELECT max((SELECT max(tokens) FROM records AS r WHERE r.parent IS o.id"
                f" AND r.model = ?2 AND r.start_digest = ?3 AND r.removed = 0 AND r.tokens <= ?4 AND {_NO_CHUNK}))"
                " FROM origin AS o",
                parent,
                model,
                start_digest,
                limit,
            )
        )
        return None if reach is None else int(reach)

    def with_chain(self, model: str, start_digest: str, tokens: int, chain: str) -> list[tuple[str, bytes]]:
        """(id, record file) of the snapshots, not removed, that stand after these tokens."""
        return list(
            self._query(
                "SELECT id, file FROM records WHERE chain = ? AND tokens = ? AND model = ? AND start_digest = ?"
                " AND NOT removed ORDER BY id",
                chain,
                tokens,
                model,
                start_digest,
            )
        )

    def chunk_states(self, document: str, model: str, start_digest: str) -> list[tuple[str, bytes]]:
        """(id, record file) of the states of a document's stretches, in the order of the text."""
        return list(
            self._query(
                "SELECT id, file FROM records WHERE document = ? AND how = ? AND model = ? AND start_digest = ?"
                " AND NOT removed ORDER BY text_bytes, id",
                document,
                CHUNK_STATE,
                model,
                start_digest,
            )
        )

    def state_bytes(self) -> int:
        """Of all states on disk."""
        return int(next(self._query("SELECT coalesce(sum(size_bytes), 0) FROM records"))[0])

    def made_from(self, snapshot_id: str) -> list[str]:
        """The documents that were started from a snapshot, and whose own states are not kept."""
        found = self._query(
            "SELECT DISTINCT document FROM records WHERE start = ? AND NOT removed AND size_bytes = 0 ORDER BY 1",
            snapshot_id,
        )
        return [document for (document,) in found]

    def stamp(self, table: str, name: str) -> str | None:
        """The stamp that the file of this name had when it was entered: in `records`, `heads` or `tags`."""
        return next((stamp for (stamp,) in self._query(f"SELECT stamp FROM {table} WHERE id = ?", name)), None)

    def copies(self, table: str) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the files entered in `records`, `heads` or `tags`."""
        return self._query(f"SELECT id, file FROM {table} ORDER BY id")

    def copy(self, table: str, name: str) -> bytes | None:
        """The content of one such file, None where it is not known."""
        return next((file for (file,) in self._query(f"SELECT file FROM {table} WHERE id = ?", name)), None)

    def mark_unreached(self) -> int:
        """Note, for `unreached`, the records that no head or tag, nor what these go on or started from, reaches; how
        many that are. The states of a document's stretches go with its readings."""
        with _translated():
            self._db.execute(
                "CREATE TEMP TABLE unreached AS"
                " WITH RECURSIVE reached (id) AS ("
                "SELECT snapshot FROM heads UNION SELECT snapshot FROM tags"
                " UNION SELECT o.id FROM reached JOIN records AS r USING (id)"
                " JOIN records AS o ON o.id IN (r.parent, r.start))"
                ", kept (document, model, start_digest) AS ("
                f"SELECT DISTINCT document, model, start_digest FROM records WHERE {_NO_CHUNK}"
                " AND id IN (SELECT id FROM reached))"
                " SELECT id, tokens FROM records WHERE id NOT IN (SELECT id FROM reached)"
                f" AND ({_NO_CHUNK} OR removed OR (document, model, start_digest) NOT IN kept)"
            )
        return int(next(self._query("SELECT count(*) FROM unreached"))[0])

    def unreached(self) -> Iterator[tuple[str, int]]:
        """(id, tokens) of the records marked; none comes before one that goes on from it."""
        return self._query("SELECT id, tokens FROM unreached ORDER BY tokens DESC, id")

    def drop_unreached(self) -> None:
        """Drop the records marked; inside `changing`."""
        self._db.execute("DELETE FROM objects WHERE snapshot IN (SELECT id FROM unreached)")
        self._db.execute("DELETE FROM records WHERE id IN (SELECT id FROM unreached)")

    def is_needed(self, name: str) -> bool:
        """Whether a record that is not marked names this object."""
        found = self._query("SELECT 1 FROM objects WHERE name = ? AND snapshot NOT IN (SELECT id FROM unreached)", name)
        return next(found, None) is not None

    def mark_texts(self, chain: Callable[[str], Iterable[str]]) -> None:
        """Note, for `is_text_needed`, the extents that the records which are not marked lead to.

        chain  the names of an extent and those before it, nearest first
        """
        with _translated():
            self._db.execute("CREATE TEMP TABLE texts (name TEXT PRIMARY KEY) WITHOUT ROWID")
        tips = "SELECT DISTINCT text FROM records WHERE text IS NOT NULL AND id NOT IN (SELECT id FROM unreached)"
        for (tip,) in self._query(tips):
            for name in chain(tip):
                with _translated():
                    if not self._db.execute("INSERT OR IGNORE INTO temp.texts VALUES (?)", (name,)).rowcount:
                        break  # what comes before it is there

    def is_text_needed(self, name: str) -> bool:
        """Whether such a record leads to this extent."""
        return next(self._query("SELECT 1 FROM temp.texts WHERE name = ?", name), None) is not None

    def named(self, identities: Sequence[str]) -> set[str]:
        """Of these snapshots those that are tagged, that a head stands at, or that a reading was started from."""
        return {
            identity
            for some in _few(identities)
            for (identity,) in self._query(
                f"SELECT snapshot FROM tags WHERE snapshot IN ({_marks(some)})"
                f" UNION SELECT snapshot FROM heads WHERE snapshot IN ({_marks(some)})"
                f" UNION SELECT start FROM records WHERE start IN ({_marks(some)})",
                *(some * 3),
            )
        }

    def held(self, identities: Sequence[str], but_of: tuple[str, str] | None) -> set[str]:
        """As `named`, and where a document (and its model) is given, those that other documents have read."""
        held = self.named(identities)
        if but_of is not None:
            for some in _few(identities):
                found = self._query(
                    "WITH RECURSIVE other (id) AS ("
                    "SELECT snapshot FROM heads WHERE NOT (document = ? AND model = ?)"
                    " UNION SELECT parent FROM other JOIN records USING (id) WHERE parent IS NOT NULL)"
                    f" SELECT id FROM other WHERE id IN ({_marks(some)})",
                    *but_of,
                    *some,
                )
                held.update(identity for (identity,) in found)
        return held

    def heads(self) -> Iterator[tuple[str, str, str]]:
        """(document, model, snapshot), by document."""
        return self._query("SELECT document, model, snapshot FROM heads ORDER BY document, model")

    def heads_named(self, document: str) -> list[tuple[str, str]]:
        """(document, model) of the heads of a document, by its whole name."""
        return list(self._query("SELECT document, model FROM heads WHERE document = ? ORDER BY model", document))

    def heads_ending(self, ending: str) -> list[tuple[str, str]]:
        """(document, model) of the heads whose document's name ends so."""
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
        return self._query("SELECT name, snapshot FROM tags ORDER BY name")

    def tags_at(self, snapshot_id: str) -> list[str]:
        return [name for (name,) in self._query("SELECT name FROM tags WHERE snapshot = ? ORDER BY 1", snapshot_id)]

    def _query(self, sql: str, *values: str | int | None) -> Iterator[Any]:
        with _translated():
            for found in self._db.execute(sql, values):  # noqa: UP028 - `yield from` closes the cursor, perhaps too late
                yield found


def _few(identities: Sequence[str]) -> Iterator[list[str]]:
    """As many as a statement takes values, three times each."""
    for at in range(0, len(identities), 300):
        yield list(identities[at : at + 300])


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))


def _as_listed(found: Iterator[Any]) -> Iterator[Listed]:
    for *columns, leaf, edge, removed in found:
        _numbers(*columns[2:5])
        yield Listed._make((*columns, bool(leaf), bool(edge), bool(removed)))


def _numbers(first: object, second: object, third: object) -> tuple[int, int, int]:
    """Three columns of numbers. Raises CatalogDamagedError: sqlite gives back whatever a damaged file says."""
    if isinstance(first, int) and isinstance(second, int) and isinstance(third, int):
        return first, second, third
    found = ", ".join(repr(value)[:40] for value in (first, second, third))
    raise CatalogDamagedError(f"reading the catalog: expected three numbers, found {found}")


@contextlib.contextmanager
def _connected(path: Path | None, mode: str) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit; the last one to close writes the WAL back."""
    uri = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode={mode}"
    if path is not None and mode == "ro" and not path.with_name(f"{path.name}-wal").exists():
        uri += "&immutable=1"  # sqlite would make a -wal beside the file, which a read-only folder does not allow
    with _translated():
        connection = sqlite3.connect(
            uri,
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,  # a list may be drawn by one thread after the other
        )
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
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # sqlite quotes what it cannot read
        raise CatalogDamagedError(str(error)) from error
