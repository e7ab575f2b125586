"""Snapshots on disk: written one durable step at a time, found by many names, believed only with their checksums."""

from rwkv_stream.store.catalog import Listed
from rwkv_stream.store.exchange import Pulled, Pushed
from rwkv_stream.store.prune import Pruned
from rwkv_stream.store.records import NewSnapshot, Snapshot
from rwkv_stream.store.repair import Lost, Repaired
from rwkv_stream.store.retention import Rule, Thinned
from rwkv_stream.store.store import FAILPOINTS, Store
from rwkv_stream.store.transfer import Exported, Imported
from rwkv_stream.store.verify import Damage, Report

__all__ = [
    "FAILPOINTS",
    "Damage",
    "Exported",
    "Imported",
    "Listed",
    "Lost",
    "NewSnapshot",
    "Pruned",
    "Pulled",
    "Pushed",
    "Repaired",
    "Report",
    "Rule",
    "Snapshot",
    "Store",
    "Thinned",
]
