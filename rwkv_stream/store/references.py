"""References: which snapshot of a store `book.txt@50%` is.

| form                                          | the snapshot                                        |
|-----------------------------------------------|-----------------------------------------------------|
| a tag                                         | that one                                            |
| a document                                    | where its head stands                               |
| `@65536`, `@byte:1200000`, `@50%` after it    | at, or the nearest before, that token, byte or share |
| `~2` after it                                 | two before the newest, of those that exist          |
| an id                                         | that one                                            |

A document may be given by a trailing part of its name, an id by its first 8 digits or more. Whole names are tried
first; what then fits two snapshots is refused. `@` and `~` look at the head and its ancestors, never at readings that
it has left behind; a share is one of the bytes read so far.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rwkv_stream.errors import MismatchError, NotFoundError, UsageError
from rwkv_stream.store.catalog import Catalog, CatalogDamagedError, Link
from rwkv_stream.store.layout import ID_PREFIX, StoreFiles
from rwkv_stream.store.snapshot_codec import Snapshot, damaged, is_digest

_AT = re.compile(r"(.+)@(?:(\d{1,18})|byte:(\d{1,18})|(\d{1,3})(?:\.(\d{1,9}))?%)", re.DOTALL)
_BACK = re.compile(r"(.+)~(\d{1,18})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a lineage: at or before a token, or a byte (with a scale: so many parts of it), or so many back."""

    token: int | None = None
    byte: int | None = None
    scale: int | None = None
    back: int | None = None


def resolve(ref: str, model: str | None, files: StoreFiles, index: Catalog) -> Snapshot:
    """The snapshot that `ref` names, read from its record.

    model   fingerprint; chooses among the readings of a document
    raises  NotFoundError, UsageError where several fit, MismatchError where one of another model fits, SnapshotError
    """
    other: Snapshot | None = None
    for whole in (True, False):
        fits: dict[str, tuple[str, Snapshot]] = {}
        for label, snapshot in _fitting(ref, model, whole, files, index):
            if model in (None, snapshot.model):
                fits.setdefault(snapshot.id, (label, snapshot))
            else:
                other = other or snapshot
        if len(fits) > 1:
            candidates = "; ".join(f"{label} is {identity[:16]}" for identity, (label, _) in fits.items())
            raise UsageError(
                f"finding snapshot '{ref}': expected one, found {len(fits)}: {candidates}; "
                f"name one in full{' or pass --model' if model is None else ''}"
            )
        for _, snapshot in fits.values():
            return snapshot
    if other is not None:
        raise another_model(ref, other, str(model))
    raise NotFoundError(
        f"finding snapshot '{ref}' in store '{files.path}': expected a tag, a document or an id, found none; "
        "run `rwkv-stream snapshots list`"
    )


def another_model(ref: str, snapshot: Snapshot, model: str) -> MismatchError:
    """The error for a snapshot that `model` did not make."""
    return MismatchError(
        f"cannot use snapshot '{ref}': made by model {snapshot.model}, last seen at '{snapshot.model_path}', "
        f"this model is {model}; pass --model with the first one"
    )


def whole_name(document: str, index: Catalog) -> str:
    """The document meant by a trailing part, or what was given where there is none; UsageError where several are."""
    names = sorted({name for name, _ in _named(document, True, index) or _named(document, False, index)})
    if len(names) > 1:
        raise UsageError(f"finding document '{document}': expected one, found {', '.join(names)}; name one in full")
    return names[0] if names else document


def _fitting(
    ref: str, model: str | None, whole: bool, files: StoreFiles, index: Catalog
) -> Iterator[tuple[str, Snapshot]]:
    """What `ref` may mean, in the order of the table, each with words for it; by whole names or by abbreviations."""
    path = files.tag_path(ref) if whole else None
    if path is not None and (tag := files.read_tag(path)) is not None:
        yield f"tag '{ref}'", files.target(tag.snapshot, path)
    for document, place in _readings(ref):
        for name, reader in _named(document, whole, index):
            found = files.newest(name, reader)
            if found is not None:
                is_meant = model in (None, reader)
                snapshot = _at(ref, found[1], place, files, index) if is_meant else found[1]
                yield f"document '{name}' read by model {reader[:16]}", snapshot
    if is_digest(ref) if whole else ID_PREFIX.fullmatch(ref):
        for snapshot in files.with_prefix(ref):
            yield "id", snapshot


def _readings(ref: str) -> Iterator[tuple[str, _Place]]:
    """The ways to cut `ref` into a document and a place."""
    yield ref, _Place()
    if match := _AT.fullmatch(ref):
        document, token, byte, percent, decimals = match.groups()
        if token is not None:
            yield document, _Place(token=int(token))
        elif byte is not None:
            yield document, _Place(byte=int(byte))
        else:
            decimals = decimals or ""
            share, scale = int(percent + decimals), 100 * 10 ** len(decimals)
            if share > scale:
                raise UsageError(f"finding snapshot '{ref}': expected a share of at most 100 %")
            yield document, _Place(byte=share, scale=scale)
    if match := _BACK.fullmatch(ref):
        yield match[1], _Place(back=int(match[2]))


def _named(document: str, whole: bool, index: Catalog) -> list[tuple[str, str]]:
    """(document, model) of the heads that are named so, or else that end so; whole parts of a path go first."""
    if whole:
        return index.heads_named(document, whole=True)
    return index.heads_named(f"/{document}", whole=False) or index.heads_named(document, whole=False)


def _at(ref: str, newest: Snapshot, place: _Place, files: StoreFiles, index: Catalog) -> Snapshot:
    byte = place.byte if place.byte is None or place.scale is None else newest.bytes * place.byte // place.scale
    first = 0, 0
    for back, link in enumerate(_lineage(newest, files, index)):
        first = link.tokens, link.text_bytes
        if (
            (place.token is None or link.tokens <= place.token)
            and (byte is None or link.text_bytes <= byte)
            and (place.back is None or place.back == back)
        ):
            snapshot = files.read_record(link.id)
            if snapshot is None:
                raise damaged(files.record_path(link.id), "the record of a snapshot in the catalog", "none")
            if snapshot.removed:
                raise CatalogDamagedError(f"it has snapshot '{link.id}', which was removed")
            return snapshot
    raise NotFoundError(
        f"finding snapshot '{ref}': expected one there, found the document's first at token {first[0]}, byte {first[1]}"
    )


def _lineage(newest: Snapshot, files: StoreFiles, index: Catalog) -> Iterator[Link]:
    """A snapshot and its ancestors that exist: by the catalog, and by records that it does not have yet."""
    yield Link(newest.id, newest.parent, newest.tokens, newest.bytes, False)
    parent, tokens = newest.parent, newest.tokens
    while parent is not None:
        links = index.lineage(parent)
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
