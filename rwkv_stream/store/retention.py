"""Which snapshots of a reading stay as it goes on, and which go.

Snapshots stand on lattices that lie in each other: every other one of those at multiples of 1,024 tokens is at a
multiple of 2,048, and so on. With `keep` a snapshot stays while it is no farther behind the newest than `keep` times
its stride, the largest power of two that divides its position. So there are at most `keep`, and at least half as many,
for each doubling of the distance, as far as they were ever made; what goes would go at every later look, too, and holes
are as even as the lattice. A limit of bytes takes those first that the smallest `keep` would take.

Whatever the rule there stay: the newest, and that from which the reading can go on; what is tagged or at an edge of the
document; what readings were started from; what other documents have read. Of what goes its place in the lineage stays.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rwkv_stream.errors import OutputError, UsageError
from rwkv_stream.files import failpoint, fsync_folder
from rwkv_stream.store import records
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.layout import publishing_failpoints
from rwkv_stream.store.records import Snapshot
from rwkv_stream.store.sessions import Sessions

FAILPOINTS = ("thin.uncatalogued", *publishing_failpoints("thin.record"), "thin.object.removed")
MEASURED_EVERY = 16  # snapshots between two looks at the files of the store
_AT_ONCE = 64  # that are removed together
_NOT_YET = ""  # the stamp of a file that is about to be published


@dataclass(frozen=True, slots=True)
class Rule:
    """What is to stay.

    keep       so many snapshots for each doubling of the distance behind the newest; None: all
    max_bytes  of all files of a store but for its catalog, which is derived; None: no limit
    raises     UsageError for numbers below 1
    """

    keep: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("max_store_size", self.max_bytes)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"thinning snapshots: expected {name} to be 1 or more, found {value!r}")

    def __bool__(self) -> bool:
        return self.keep is not None or self.max_bytes is not None


class Candidate(NamedTuple):
    """A snapshot that may go: where it stands, and its bytes on disk."""

    id: str
    tokens: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Thinned:
    """What a rule takes of a reading.

    snapshots, bytes  that go
    hole     most tokens from a snapshot that stays, or the start, to the next: what the worst fork reads
    reread   tokens that are read again to have all that go
    """

    document: str
    model: str
    snapshots: int
    bytes: int
    hole: int
    reread: int


def need(tokens: int, newest: int) -> float:
    """The smallest `keep` with which a snapshot stays."""
    return (newest - tokens) / (tokens & -tokens)


def going(candidates: Iterable[tuple[float, Candidate]], keep: int | None, n_over: int) -> tuple[list[Candidate], int]:
    """Of candidates, each with its `need`, those that go by a rule, and how many bytes too many are left then.

    n_over  bytes that are to become free
    """
    gone: list[Candidate] = []
    for needed, candidate in sorted(candidates, key=lambda one: (-one[0], one[1])):
        if n_over <= 0 and (keep is None or needed <= keep):
            break
        gone.append(candidate)
        n_over -= candidate.n_bytes
    return gone, n_over


def newest(head: Snapshot, count: int) -> Iterator[str]:
    """The newest `count` snapshots of a reading, and one more where none of them can be read on from."""
    may_go_on = False
    for number, snapshot in enumerate(head.lineage()):
        if number >= count and may_go_on:
            return
        may_go_on |= _goes_on(snapshot)
        yield snapshot.id


def _goes_on(snapshot: Snapshot) -> bool:
    return not snapshot.leaf and snapshot.decided_byte >= 0  # else a longer text may have other tokens


class Thinning:
    """The snapshots of one reading as it goes on, in a session that holds its head; all stay without a rule."""

    def __init__(self, sessions: Sessions, document: str, model: str, rule: Rule, last: Snapshot | None) -> None:
        """`last` is the one that the reading goes on from; what comes before it may go."""
        self._sessions, self._reading, self._rule = sessions, (document, model), rule
        self._candidates: dict[str, Candidate] = {}
        self._superseded: dict[str, Candidate] = {}
        self._n_held = self._left = 0  # bytes of the store's files, as far as is known, and how long that is believed
        self._last: list[Snapshot] = []  # the newest, and that from which the reading can go on
        for snapshot in reversed([*last.lineage()] if rule and last is not None else []):
            self.add(snapshot)

    def add(self, snapshot: Snapshot) -> None:
        """One that is newer than all before."""
        if not self._rule:
            return
        self._last.append(snapshot)
        on = next((i for i in range(len(self._last) - 1, -1, -1) if _goes_on(self._last[i])), 0)
        before, self._last = self._last[:on], self._last[on:]
        for one in before:
            if not one.edge:
                self._candidates[one.id] = Candidate(one.id, one.tokens, one.size_bytes)

    def supersede(self, head: Snapshot) -> None:
        """Let the end of a shorter reading of the document go first, now that its head has moved on."""
        if head.leaf and not head.edge:
            self._superseded[head.id] = Candidate(head.id, head.tokens, head.size_bytes)

    def thin(self) -> None:
        """Remove what `keep` takes."""
        if self._rule.keep is not None and self._last:
            gone, _ = going(self._needs(self._last[-1].tokens), self._rule.keep, 0)
            self._drop(gone)

    @contextlib.contextmanager
    def room(self, tokens: int, n_bytes: int) -> Iterator[None]:
        """Room for so many bytes at a token of the reading, which the block writes; other threads wait for theirs.

        raises  OutputError where what must stay leaves none; nothing was removed then
        """
        if self._rule.max_bytes is None:
            yield
            return
        with self._sessions.room:
            self._make_room(tokens, n_bytes, self._rule.max_bytes)
            yield
            self._n_held += n_bytes

    def _make_room(self, tokens: int, n_bytes: int, limit: int) -> None:
        self._left -= 1
        if self._left < 0:
            self._measure()
        while True:
            gone, n_over = going(self._needs(tokens), None, self._n_held + n_bytes - limit)
            if n_over > 0 and self._left < MEASURED_EVERY:
                self._measure()  # what was written may be smaller than it was taken for
            elif n_over > 0:
                raise _too_much(
                    f"reading '{self._reading[0]}' at token {tokens:,}",
                    limit,
                    self._n_held - sum(one.n_bytes for one in gone),
                    f" beside {n_bytes:,} for what comes next",
                    "a larger --snapshot-every, --no-text or another --snapshot-at, or run `rwkv-stream snapshots "
                    "prune --max-store-size`, which thins other documents too",
                )
            elif len(self._drop(gone)) == len(gone):
                return

    def _measure(self) -> None:
        self._n_held, self._left = self._sessions.store.size_bytes(), MEASURED_EVERY

    def _needs(self, tokens: int) -> list[tuple[float, Candidate]]:
        superseded = [(math.inf, one) for one in self._superseded.values()]
        return [*superseded, *((need(one.tokens, tokens), one) for one in self._candidates.values())]

    def _drop(self, gone: Sequence[Candidate]) -> set[str]:
        done = set(drop(self._sessions, [one.id for one in gone], but_of=self._reading))
        self._n_held -= sum(one.n_bytes for one in gone if one.id in done)
        for one in gone:  # what is held stays so while this reading goes on
            (self._superseded if one.id in self._superseded else self._candidates).pop(one.id)
        return done


def drop(sessions: Sessions, identities: Sequence[str], *, but_of: tuple[str, str] | None = None) -> list[str]:
    """Remove the states of snapshots, whose places in the lineage stay; those that went.

    What is tagged, what heads stand at, what readings were started from, and what other documents than that of `but_of`
    have read, stays.
    """
    done: list[str] = []
    for at in range(0, len(identities), _AT_ONCE):
        with sessions.publishing():
            done += _drop(sessions, identities[at : at + _AT_ONCE], but_of)
    return done


def _drop(sessions: Sessions, identities: Sequence[str], but_of: tuple[str, str] | None) -> list[str]:
    """In this order: catalog, records, objects; each durable before the next."""
    store = sessions.store
    held = sessions.ask(lambda catalog: catalog.held(identities, but_of))
    known = [store.read_record(identity) for identity in identities if identity not in held]
    gone = [one for one in known if one is not None and not one.removed]
    if not gone:
        return []
    tombstones = [(one.tombstone(), records.encode_record(one.tombstone())) for one in gone]

    def change(catalog: Catalog) -> None:
        for one, data in tombstones:
            catalog.put_record(one, _NOT_YET, data)

    sessions.commit(change)
    failpoint("thin.uncatalogued")
    sessions.publish_files([(store.record_path(one.id), data) for one, data in tombstones], "thin.record")
    folders = set()
    for one in gone:
        for stored in one.objects:
            path = store.objects.path(stored.name)
            path.unlink(missing_ok=True)
            folders.add(path.parent)
            failpoint("thin.object.removed")
    for folder in sorted(folders):
        fsync_folder(folder)
    return [one.id for one in gone]


# ---- a store as a whole ----


class Plan(NamedTuple):
    """What a rule takes of a store: ids, bytes of their files, and the same by reading."""

    ids: list[str]
    n_bytes: int
    readings: list[Thinned]


def plan(sessions: Sessions, rule: Rule, n_held: int) -> Plan:
    """What a rule takes of a store whose files are so many bytes.

    raises  OutputError where what must stay is more than the rule's limit
    """
    store = sessions.store
    heads = sessions.ask(lambda catalog: [*catalog.heads()])
    needs: dict[str, float] = {}
    found: dict[str, Snapshot] = {}
    stays: set[str] = set()
    lineages: dict[tuple[str, str], list[Snapshot]] = {}
    for document, model, _ in heads:
        standing = store.newest(document, model)
        assert standing is not None
        head = standing[0].view(standing[1])
        lineage = lineages[document, model] = [*head.lineage()]
        stays.update(newest(head, 1))
        for one in lineage:
            found[one.id] = one
            needs[one.id] = min(need(one.tokens, head.tokens), needs.get(one.id, math.inf))
            if one.edge:
                stays.add(one.id)
    stays |= sessions.ask(lambda catalog: catalog.named([*found]))
    candidates = [
        (needs[one.id], Candidate(one.id, one.tokens, _freed(one))) for one in found.values() if one.id not in stays
    ]
    gone, n_over = going(candidates, rule.keep, 0 if rule.max_bytes is None else n_held - rule.max_bytes)
    n_bytes = sum(one.n_bytes for one in gone)
    if n_over > 0 and rule.max_bytes is not None:
        other = "or remove tags and documents first (`snapshots tag --delete`, `snapshots rm`)"
        raise _too_much(f"pruning store '{store.path}'", rule.max_bytes, n_held - n_bytes, "", other)
    ids = {one.id for one in gone}
    readings = [_thinned(*reading, lineage, ids) for reading, lineage in lineages.items()]
    return Plan([one.id for one in gone], n_bytes, [one for one in readings if one.snapshots])


def _freed(snapshot: Snapshot) -> int:
    """Bytes of files that are free once it is removed."""
    record, tombstone = records.encode_record(snapshot), records.encode_record(snapshot.tombstone())
    return snapshot.size_bytes + len(record) - len(tombstone)


def _thinned(document: str, model: str, lineage: Sequence[Snapshot], gone: set[str]) -> Thinned:
    """What goes of a lineage, its newest first."""
    n = n_bytes = hole = reread = before = missing = 0
    for one in reversed(lineage):
        if one.id in gone:
            n, n_bytes, missing = n + 1, n_bytes + _freed(one), one.tokens - before
        else:
            hole, reread = max(hole, one.tokens - before), reread + missing
            before, missing = one.tokens, 0
    return Thinned(document, model, n, n_bytes, hole, reread)


def _too_much(doing: str, limit: int, n_kept: int, beside: str, other: str) -> OutputError:
    return OutputError(
        f"{doing}: expected the store to fit --max-store-size, {limit:,} bytes, found {n_kept:,} bytes that must stay"
        f"{beside}; pass a larger --max-store-size, {other}"
    )
