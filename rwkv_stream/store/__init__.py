"""Snapshots on disk."""

from rwkv_stream.store.store import (
    FAILPOINTS,
    Damage,
    Exported,
    Imported,
    Listed,
    Lost,
    NewSnapshot,
    Pruned,
    Repaired,
    Report,
    Snapshot,
    Store,
)

__all__ = [
    "FAILPOINTS",
    "Damage",
    "Exported",
    "Imported",
    "Listed",
    "Lost",
    "NewSnapshot",
    "Pruned",
    "Repaired",
    "Report",
    "Snapshot",
    "Store",
]
