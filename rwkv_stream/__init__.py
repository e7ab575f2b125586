"""rwkv-stream: read a text once through an RWKV model, keep exact snapshots of its state, fork any of them.

>>> import rwkv_stream as rs
>>> model, store = rs.load(), rs.Store("books.store", create=True)
>>> report = rs.ingest("book.txt", model=model, store=store)
>>> rs.ask("Who gave Edmund the lamp?", snapshot=store.get("book.txt"), model=model).answer

Names are looked up on first use, so that importing the package loads neither torch nor pyarrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rwkv_stream.errors import (
    BackendError,
    CheckpointError,
    InputError,
    MismatchError,
    NotFoundError,
    OutputError,
    PartialFailureError,
    RwkvStreamError,
    SnapshotError,
    StoppedError,
    StoreLockedError,
    TokenizerError,
    UsageError,
)

if TYPE_CHECKING:
    from rwkv_stream.answers.ask import ask
    from rwkv_stream.answers.extracts import extracts
    from rwkv_stream.answers.strategies import quote
    from rwkv_stream.answers.summaries import summarize
    from rwkv_stream.model import Loading, Model, load
    from rwkv_stream.model.generation import generate
    from rwkv_stream.model.sampling import Sampling
    from rwkv_stream.model.state import State
    from rwkv_stream.reading.follow import follow
    from rwkv_stream.reading.ingest import ingest
    from rwkv_stream.reading.positions import snapshot_at
    from rwkv_stream.reading.reading import Reading
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.tables.embedding import Embedding
    from rwkv_stream.tables.embeddings import embed
    from rwkv_stream.tables.score import score
    from rwkv_stream.tables.search import search

_HOMES = {
    "Embedding": "tables.embedding",
    "embed": "tables.embeddings",
    "Loading": "model",
    "Model": "model",
    "load": "model",
    "follow": "reading.follow",
    "ingest": "reading.ingest",
    "Reading": "reading.reading",
    "snapshot_at": "reading.positions",
    "Sampling": "model.sampling",
    "State": "model.state",
    "Snapshot": "store",
    "Store": "store",
    "summarize": "answers.summaries",
    "ask": "answers.ask",
    "quote": "answers.strategies",
    "extracts": "answers.extracts",
    "generate": "model.generation",
    "score": "tables.score",
    "search": "tables.search",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "Embedding",
    "InputError",
    "Loading",
    "MismatchError",
    "Model",
    "NotFoundError",
    "OutputError",
    "PartialFailureError",
    "Reading",
    "RwkvStreamError",
    "Sampling",
    "Snapshot",
    "SnapshotError",
    "State",
    "StoppedError",
    "Store",
    "StoreLockedError",
    "TokenizerError",
    "UsageError",
    "ask",
    "embed",
    "extracts",
    "follow",
    "generate",
    "ingest",
    "load",
    "quote",
    "score",
    "search",
    "snapshot_at",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rwkv_stream' has no attribute '{name}'")
    return getattr(importlib.import_module(f"rwkv_stream.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
