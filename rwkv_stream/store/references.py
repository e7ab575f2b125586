"""References: which snapshot of a store `book.txt@50%` is.

| form                                          | the snapshot                                        |
|-----------------------------------------------|-----------------------------------------------------|
| a tag                                         | that one                                            |
| a document                                    | where its head stands                               |
| `@65536`, `@byte:1200000`, `@50%` after it    | at, or the nearest before, that token, byte or share |
| `@chapter:7`, `@chapter:"The Whale"`,         | at, or the nearest before, where that begins; with   |
| `@page:120`, `@line:2000000`, `@row:5`,       | a time, the first line that is not before it         |
| `@time:2026-11-02T10:00` after it             |                                                      |
| `~2` after it                                 | two before the newest, of those that exist          |
| an id                                         | that one                                            |

A document may be given by the last parts of its path, or these without their suffix; an id by its first 8 digits or
more. Whole names are tried first, then paths' last parts and ids, then stems; what then fits two snapshots is refused.
A reading that fails, as `a@5` does where `a` begins later, hides no other, such as a document that is named `a@5`.
`@` and `~` look at the head and its ancestors, never at readings that it has left behind; a share is one of the bytes
read so far. What a text has of chapters, pages, lines, rows and times is looked up in the text that was kept.
"""

from __future__ import annotations

import difflib
import itertools
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rwkv_stream.errors import MismatchError, NotFoundError, RwkvStreamError, UsageError
from rwkv_stream.store.catalog import Catalog, CatalogDamagedError, Link
from rwkv_stream.store.layout import ID_PREFIX, StoreFiles
from rwkv_stream.store.records import Snapshot
from rwkv_stream.store.sealed import damaged, is_digest

_AT = re.compile(
    r"(.+)@(?:(\d{1,18})|byte:(\d{1,18})|(\d{1,3})(?:\.(\d{1,9}))?%|(chapter|page|line|row|time):(.+))", re.DOTALL
)
_SHORT = re.compile("[0-9a-f]{1,7}")
_BACK = re.compile(r"(.+)~(\d{1,18})", re.DOTALL)
_NEAR_NAMES = 3

_Naming = Literal["whole", "ending", "stem"]  # how a document is given, in the order in which that is tried
_NAMINGS: tuple[_Naming, ...] = ("whole", "ending", "stem")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a lineage: at or before a token, or a byte (with a scale: so many parts of it), or where a part of the
    text begins (its kind, and which), or so many back."""

    token: int | None = None
    byte: int | None = None
    scale: int | None = None
    part: tuple[str, str] | None = None
    back: int | None = None


class Found(NamedTuple):
    """What a reference names.

    snapshot     that stands there, or nearest before it; None where the document's first stands behind it
    head         where its document stands, as that has it; None for a tag or an id
    token, byte  the position that was asked for, if one was
    """

    snapshot: Snapshot | None
    head: Snapshot | None = None
    token: int | None = None
    byte: int | None = None

    @property
    def near(self) -> Snapshot:
        """One of the same reading."""
        near = self.snapshot or self.head
        assert near is not None
        return near

    @property
    def is_there(self) -> bool:
        """Whether the snapshot stands just where it was asked for, as far as that is known without the text."""
        at, end = self.snapshot, self.head
        if at is None:
            return False
        token_is = self.token is None or at.tokens == (self.token if end is None else min(self.token, end.tokens))
        return token_is and (self.byte is None or at.bytes == (self.byte if end is None else min(self.byte, end.bytes)))


def resolve(ref: str, model: str | None, files: StoreFiles, catalog: Catalog) -> Snapshot:
    """The snapshot that `ref` names, or the nearest before, read from its record.

    model   fingerprint; chooses among the readings of a document
    raises  NotFoundError, UsageError where several fit, MismatchError where one of another model fits, SnapshotError
    """
    found = _Resolution(ref, model, files, catalog).run().snapshot
    assert found is not None
    return found


def locate(ref: str, model: str | None, files: StoreFiles, catalog: Catalog) -> Found:
    """As `resolve`, with the position that was asked for, before which there need be no snapshot."""
    return _Resolution(ref, model, files, catalog, is_anywhere=True).run()


@dataclass(slots=True)
class _Resolution:
    """What was found on the way: readings that failed, ways to cut `ref` that are settled, what is another model's: a
    snapshot, and documents, which are not looked at before all else has failed."""

    ref: str
    model: str | None
    files: StoreFiles
    catalog: Catalog
    failures: list[RwkvStreamError] = field(default_factory=list)
    settled: set[_Place] = field(default_factory=set)
    other: Snapshot | None = None
    elsewhere: list[tuple[str, str]] = field(default_factory=list)
    is_anywhere: bool = False

    def run(self) -> Found:
        for naming in _NAMINGS:
            fits: dict[str, tuple[str, Found]] = {}
            for label, found in self._fitting(naming):
                snapshot = found.near
                if self.model in (None, snapshot.model):
                    fits.setdefault(snapshot.id, (label, found))
                else:
                    self.other = self.other or snapshot
            if len(fits) > 1:
                candidates = "; ".join(f"{label} is {identity[:16]}" for identity, (label, _) in fits.items())
                raise UsageError(
                    f"finding snapshot '{self.ref}': expected one, found {len(fits)}: {candidates}; "
                    f"name one in full{' or pass --model' if self.model is None else ''}"
                )
            for _, found in fits.values():
                return found
        if self.failures:
            raise self.failures[0]
        for name, reader in self.elsewhere:
            if self.other is None and (newest := self.files.newest(name, reader)) is not None:
                self.other = newest[1]
        if self.other is not None:
            raise another_model(self.ref, self.other, str(self.model))
        near = _near(self.ref, self.catalog)
        short = "; an id is given by its first 8 digits or more" if _SHORT.fullmatch(self.ref) else ""
        raise NotFoundError(
            f"finding snapshot '{self.ref}' in store '{self.files.path}': expected a tag, a document or an id, found "
            f"none{near and f', near it {near}'}{short}; run `rwkv-stream snapshots list`"
        )

    def _fitting(self, naming: _Naming) -> Iterator[tuple[str, Found]]:
        """What `ref` may mean, in the order of the table, each with words for it."""
        path = self.files.tag_path(self.ref) if naming == "whole" else None
        if path is not None and (tag := self.files.read_tag(path)) is not None:
            yield f"tag '{self.ref}'", Found(self.files.target(tag.snapshot, path))
        for document, place in _readings(self.ref):
            if place not in self.settled:
                yield from self._of_document(naming, document, place)
        if is_digest(self.ref) if naming == "whole" else naming == "ending" and ID_PREFIX.fullmatch(self.ref):
            for snapshot in self.files.with_prefix(self.ref):
                yield "id", Found(snapshot)

    def _of_document(self, naming: _Naming, document: str, place: _Place) -> Iterator[tuple[str, Found]]:
        for name, reader in _named(document, naming, self.catalog):
            if self.model not in (None, reader):
                self.elsewhere.append((name, reader))
                continue
            found = self.files.newest(name, reader)
            if found is None:
                continue
            self.settled.add(place)
            try:
                token, byte = _position(self.ref, place, found[1], self.files)
                try:
                    snapshot = _at(self.ref, found[1], place.back, token, byte, self.files, self.catalog)
                except NotFoundError:
                    if not self.is_anywhere or place.back is not None or 0 in (token, byte):
                        raise
                    snapshot = None
            except (NotFoundError, UsageError) as error:
                self.failures.append(error)
            else:
                label = f"document '{name}' read by model {reader[:16]}"
                yield label, Found(snapshot, found[0].view(found[1]), token, byte)


def another_model(ref: str, snapshot: Snapshot, model: str) -> MismatchError:
    """The error for a snapshot that `model` did not make."""
    return MismatchError(
        f"cannot use snapshot '{ref}': made by model {snapshot.model}, last seen at '{snapshot.model_path}', "
        f"this model is {model}; pass --model with the first one"
    )


def whole_name(document: str, catalog: Catalog) -> str:
    """The document meant by a part of its name, or what was given where there is none; UsageError where several are."""
    for naming in _NAMINGS:
        names = sorted({name for name, _ in _named(document, naming, catalog)})
        if len(names) > 1:
            raise UsageError(f"finding document '{document}': expected one, found {', '.join(names)}; name one in full")
        if names:
            return names[0]
    return document


def _readings(ref: str) -> Iterator[tuple[str, _Place]]:
    """The ways to cut `ref` into a document and a place."""
    yield ref, _Place()
    if match := _AT.fullmatch(ref):
        document, token, byte, percent, decimals, kind, which = match.groups()
        if kind is not None:
            yield document, _Place(part=(kind, which))
        elif token is not None:
            yield document, _Place(token=int(token))
        elif byte is not None:
            yield document, _Place(byte=int(byte))
        else:
            decimals = decimals or ""
            yield document, _Place(byte=int(percent + decimals), scale=100 * 10 ** len(decimals))
    if match := _BACK.fullmatch(ref):
        yield match[1], _Place(back=int(match[2]))


def _named(document: str, naming: _Naming, catalog: Catalog) -> list[tuple[str, str]]:
    """(document, model) of the heads that are named so, whose path ends so, or does without its suffix."""
    if naming == "whole":
        return catalog.heads_named(document)
    if naming == "ending":
        return catalog.heads_ending(f"/{document}")
    return [(name, model) for name, model, _ in catalog.heads() if f"/{_stem(name)}".endswith(f"/{document}")]


def _stem(document: str) -> str:
    """Without its suffix; nothing where it has none."""
    stem, suffix = posixpath.splitext(document)
    return stem if suffix else ""


def _near(ref: str, catalog: Catalog) -> str:
    """Words for the tags and documents whose names are nearly what was given; none without any."""
    names = [name for name, _ in catalog.tags()] + [name for name, _, _ in catalog.heads()]
    by_part: dict[str, str] = {}
    for name in reversed(names):
        last = posixpath.basename(name)
        by_part |= dict.fromkeys((name, last, _stem(last)), name)
    cuts = [document for document, _ in _readings(ref)]
    parts = itertools.chain.from_iterable(difflib.get_close_matches(cut, by_part, _NEAR_NAMES) for cut in cuts)
    return ", ".join(f"'{name}'" for name in dict.fromkeys(by_part[part] for part in parts))


def _position(ref: str, place: _Place, newest: Snapshot, files: StoreFiles) -> tuple[int | None, int | None]:
    """The token, or the byte, that a place is in a document that stands at a snapshot; neither for so many back.

    raises  UsageError where the text has no such place, or was not kept; SnapshotError for damage
    """
    byte = place.byte
    if place.part is not None:
        from rwkv_stream.text.parts import Part

        part = Part.at(*place.part, f"finding snapshot '{ref}' in")
        text = files.text(newest)
        if text is None:
            raise UsageError(
                f"finding snapshot '{ref}': expected the text of '{newest.document}' to be kept, found none; ingest it "
                "without --no-text"
            )
        byte = part.bytes(text)[0]
    elif byte is not None and place.scale is not None:
        if byte > place.scale:
            raise UsageError(f"finding snapshot '{ref}': expected a share of at most 100 %")
        byte = newest.bytes * byte // place.scale
    return place.token, byte


def _at(
    ref: str,
    newest: Snapshot,
    back: int | None,
    token: int | None,
    byte: int | None,
    files: StoreFiles,
    catalog: Catalog,
) -> Snapshot:
    first = 0, 0
    for steps, link in enumerate(_lineage(newest, files, catalog)):
        first = link.tokens, link.text_bytes
        if (
            (token is None or link.tokens <= token)
            and (byte is None or link.text_bytes <= byte)
            and (back is None or back == steps)
        ):
            snapshot = files.read_record(link.id)
            if snapshot is None:
                raise damaged(files.record_path(link.id), "the record of a snapshot in the catalog", "none")
            if snapshot.removed:
                raise CatalogDamagedError(f"it has snapshot '{link.id}', which was removed")
            return snapshot
    raise NotFoundError(
        f"finding snapshot '{ref}': expected one there, found the document's first at token {first[0]}, byte {first[1]}"
        "; a smaller `ingest --snapshot-every` makes more"
    )


def _lineage(newest: Snapshot, files: StoreFiles, catalog: Catalog) -> Iterator[Link]:
    """A snapshot and its ancestors that exist: by the catalog, and by records that it does not have yet."""
    yield Link(newest.id, newest.parent, newest.tokens, newest.bytes, False)
    parent, tokens = newest.parent, newest.tokens
    while parent is not None:
        links = catalog.lineage(parent)
        first = next(links, None)
        if first is None:
            record = files.read_record(parent)
            if record is None:
                return
            files.check_descent(record.id, record.tokens, tokens)
            first = Link(record.id, record.parent, record.tokens, record.bytes, record.removed)
        for link in itertools.chain([first], links):
            if link.tokens >= tokens:
                raise CatalogDamagedError(f"it has snapshot '{link.id}' at token {link.tokens} before token {tokens}")
            parent, tokens = link.parent, link.tokens
            if not link.removed:
                yield link
