"""Keeping states in another codec than they were written in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rwkv_stream.errors import NotFoundError, UsageError
from rwkv_stream.files import failpoint, fsync_folder
from rwkv_stream.store import records
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.codecs import EXACT, codec_named
from rwkv_stream.store.objects import encode_arrays, held_object
from rwkv_stream.store.records import Snapshot
from rwkv_stream.store.sessions import Sessions

log = logging.getLogger(__name__)

FAILPOINTS = ("recode.record.written", "recode.object.removed")


@dataclass(frozen=True, slots=True)
class Recoded:
    """What was kept in another codec, or would be: how many states, and their bytes on disk before and after."""

    snapshots: int
    exact: int  # that stay as they are
    bytes_before: int
    bytes_after: int


def recode(sessions: Sessions, codec: str, *, document: str | None, keep_exact: int, dry_run: bool) -> Recoded:
    """Keep states in another codec; see `Store.recode`."""
    if codec_named(codec).name == EXACT:
        raise UsageError(
            "keeping states in another codec: expected one of fewer bytes, found 'exact'; what was left out is not "
            "there any more: ingest the document again, which writes exact states"
        )
    if keep_exact < 1:
        raise UsageError(f"keeping states in another codec: expected to keep 1 exact or more, found {keep_exact}")
    store = sessions.store
    with sessions.alone() as session, sessions.publishing():
        with sessions.catalog() as catalog:
            listed = [entry.id for entry in catalog.listed(document, None, "tokens", False, True)]
            kept = {identity for _, identity in catalog.tags()} | _starts(catalog)
            heads = list(catalog.heads())
        if document is not None and not listed:
            raise NotFoundError(
                f"keeping the states of '{document}' as {codec}: expected snapshots of it in store '{store.path}', "
                "found none; run `rwkv-stream snapshots list`"
            )
        for name, model, _ in heads:
            found = store.newest(name, model)
            assert found is not None
            kept.update(_kept(found[0].view(found[1]), keep_exact))
        n = before = after = 0
        for identity in listed:
            snapshot = store.live(identity)
            if identity in kept or not snapshot.is_kept_exactly:
                continue
            stored = held_object(snapshot)
            arrays = store.arrays(snapshot)
            try:
                data = encode_arrays(snapshot, arrays, snapshot.state_digest, codec)
            except UsageError as error:
                log.warning("snapshot %s stays exact: %s", identity[:12], error)
                continue
            n, before, after = n + 1, before + stored.size_bytes, after + len(data)
            if not dry_run:
                made = store.objects.write(data, codec, temp_tag=session.tag)
                sessions.publish_record(identity, records.encode_record(replace(snapshot, objects=(made,))), "record")
                sessions.commit()
                failpoint("recode.record.written")
                path = store.objects.path(stored.name)
                path.unlink()
                fsync_folder(path.parent)
                failpoint("recode.object.removed")
        return Recoded(n, len(listed) - n, before, after)


def _starts(catalog: Catalog) -> set[str]:
    """What readings were started from, which they need should their text change at its beginning."""
    return {entry.start for entry in catalog.listed(None, None, "tokens", False, True) if entry.start is not None}


def _kept(head: Snapshot, count: int) -> Iterator[str]:
    """The newest `count` snapshots of a reading, and one more where none of them can be read on from."""
    may_go_on = False
    for number, snapshot in enumerate(head.lineage()):
        if number >= count and may_go_on:
            return
        may_go_on |= not snapshot.leaf and snapshot.decided_byte >= 0  # else a longer text may have other tokens
        yield snapshot.id
