"""Keeping states in another codec than they were written in."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from rwkv_stream.errors import NotFoundError, UsageError
from rwkv_stream.files import failpoint, fsync_folder
from rwkv_stream.store import records
from rwkv_stream.store.catalog import Catalog
from rwkv_stream.store.codecs import EXACT, codec_named
from rwkv_stream.store.objects import encode_arrays, held_object
from rwkv_stream.store.records import TIME_FORMAT
from rwkv_stream.store.retention import newest
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


def recode(
    sessions: Sessions,
    codec: str,
    *,
    document: str | None,
    keep_exact: int,
    older_than: datetime | None,
    dry_run: bool,
) -> Recoded:
    """Keep states in another codec; see `Store.recode`."""
    if codec_named(codec).name == EXACT:
        raise UsageError(
            "keeping states in another codec: expected one of fewer bytes, found 'exact'; what was left out is not "
            "there any more: ingest the document again, which writes exact states"
        )
    if older_than is not None and older_than.tzinfo is None:
        raise UsageError("keeping states in another codec: expected a moment with a zone as older_than, found none")
    before_then = None if older_than is None else older_than.astimezone(timezone.utc).strftime(TIME_FORMAT)
    if keep_exact < 1:
        raise UsageError(f"keeping states in another codec: expected to keep 1 exact or more, found {keep_exact}")
    store = sessions.store
    with sessions.alone() as session, sessions.publishing():
        with sessions.catalog() as catalog:
            found = [*catalog.listed(document, None, "tokens", False, True)]
            listed = [entry.id for entry in found]
            kept = {entry.id for entry in found if before_then is not None and entry.created >= before_then}
            kept |= {identity for _, identity in catalog.tags()} | _starts(catalog)
            heads = list(catalog.heads())
        if document is not None and not listed:
            raise NotFoundError(
                f"keeping the states of '{document}' as {codec}: expected snapshots of it in store '{store.path}', "
                "found none; run `rwkv-stream snapshots list`"
            )
        for name, model, _ in heads:
            standing = store.newest(name, model)
            assert standing is not None
            kept.update(newest(standing[0].view(standing[1]), keep_exact))
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
