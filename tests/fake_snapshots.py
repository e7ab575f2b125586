"""Snapshots of a model that does not exist: enough of one for the store, which knows nothing of models."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rwkv_stream.model.state import State, layout
from rwkv_stream.store import NewSnapshot, Snapshot, Store
from rwkv_stream.store.layout import files
from rwkv_stream.store.records import INLINE_BYTES
from rwkv_stream.store.texts import Stretch


@dataclass(frozen=True)
class Shape:
    version: str = "7"
    n_layer: int = 2
    n_embd: int = 8
    n_head: int = 1
    head_size: int = 8


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


MODEL, OTHER_MODEL = digest("model"), digest("other model")
START = digest("zero state")
CHUNK = 16


def fake_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return State(
        {name: torch.randn(1, *shape, generator=generator) for name, shape in layout(Shape()).items()}  # type: ignore[arg-type]
    )


def fake_hidden(seed: int) -> torch.Tensor:
    return torch.randn(Shape().n_embd, generator=torch.Generator().manual_seed(seed + 1000))


def fake(tokens: int, /, text: str = "a text", **changes: Any) -> NewSnapshot:
    """A snapshot of the reading of `text` at `tokens`; three bytes a token."""
    new = NewSnapshot(
        document="book.txt",
        model=MODEL,
        model_path="/models/tiny.pth",
        tokenizer="bytes",
        start_digest=START,
        start=None,
        chain=digest(text, tokens),
        tokens=tokens,
        bytes=3 * tokens,
        chunk=CHUNK,
        leaf=tokens % CHUNK != 0,
        parent=None,
        how="ingest",
        exact=True,
        numerics={"device": "cpu", "threads": 1},
        encoding="utf-8",
        decided_byte=3 * tokens,
        text_digest=digest(text, "bytes", tokens),
        anchor_byte=3 * tokens - 1,
        anchor_token=tokens - 1,
    )
    return replace(new, **changes)


def fake_text(text: str, n_bytes: int) -> bytes:
    """What the reading of `text` has read: prose of so many bytes."""
    return (f"This is {text}. " * (n_bytes // 8 + 1)).encode()[:n_bytes]


def put(store: Store, new: NewSnapshot) -> Snapshot:
    """Its state is made of its chain, as the real one is."""
    seed = int(new.chain[:8], 16)
    return store.put(new, fake_state(seed), fake_hidden(seed))


def keep(store: Store, new: NewSnapshot, text: str, parent: Snapshot | None) -> NewSnapshot:
    """With the text of its reading, which goes on from that of its parent."""
    start = parent.bytes if parent is not None else 0
    writer = store.text_writer(parent.text if parent is not None else None, {}, has_lines=True)
    return replace(new, text=writer.write(Stretch(start, fake_text(text, new.bytes)[start:], [])))


def read(store: Store, document: str = "book.txt", text: str = "a text", n: int = 5, **changes: Any) -> list[Snapshot]:
    """What an ingest does: `n` snapshots, each the parent of the next, the head moved after each. Oldest first."""
    made: list[Snapshot] = []
    model = changes.get("model", MODEL)
    with store.writing(document, model):
        for i in range(1, n + 1):
            parent = made[-1] if made else None
            new = fake(i * CHUNK, text, document=document, parent=parent.id if parent is not None else None, **changes)
            made.append(put(store, keep(store, new, text, parent)))
            store.move_head(document, model, made[-1].id)
    return made


def short(store: Store, document: str = "note.txt", text: str = "a note") -> Snapshot:
    """What an ingest of a short text does: a snapshot without a state, its text in its record."""
    new = fake(20, text, document=document, decided_byte=-1)
    stretch = Stretch(0, fake_text(text, new.bytes), [])
    inlined = store.text_writer(None, {}, has_lines=True).inline(stretch, INLINE_BYTES)
    assert inlined is not None
    new = replace(new, text=inlined[0], inline_extent=inlined[1])
    seed = int(new.chain[:8], 16)
    head = document, new.encoding, new.chunk, ""
    with store.writing(document, MODEL):
        return store.put(new, fake_state(seed), fake_hidden(seed), head=head, keep_state=False)


def library(path: Path) -> Store:
    """A store of two documents and a fork, with tags; made in a folder where parts of it are, it becomes whole."""
    store = Store(path, create=True)
    made = read(store, n=4)
    read(store, "notes/other.log", "another text", n=2)
    start = {"start": made[1].id, "start_digest": made[1].state_digest, "chunk": 7, "how": "ask", "exact": False}
    fork = put(store, fake(7, "asked", document="a fork", decided_byte=-1, anchor_byte=0, anchor_token=0, **start))
    for name, snapshot in (("a fork", fork), ("half", made[1])):
        store.tag(name, snapshot.id, move=True)
    return store


def told(store: Store) -> dict[str, dict[str, Any]]:
    """All that a store says, but for times: each snapshot with its state, or the digest of one that is not kept, its
    text if it has any, each head and tag."""
    snapshots = [store.get(listed.id) for listed in store.list()]
    heads = map(store._files.read_head, files(store._files.heads))
    return {
        "snapshots": {
            s.id: [s.document, s.tokens, s.parent, s.start, s.state().digest() if s.keeps_state else s.state_digest]
            for s in snapshots
        },
        "heads": {head.document: head.snapshot for head in heads if head is not None},
        "tags": dict(store.tags()),
        "texts": {s.id: b"".join(text.pieces()).decode() for s in snapshots if (text := store.text(s)) is not None},
    }


def start_child(work: Callable[[], object], **environment: str) -> int:
    """Run `work` in a forked child; its process id. It ends with status 1 where something was raised."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(environment)
            torch.set_num_threads(1)  # no thread of the parent's pool lives on in the child
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is to see it
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return pid


def in_child(work: Callable[[], object], **environment: str) -> int:
    """Run `work` in a forked child to its end; the wait status, 0 where nothing was raised."""
    return os.waitpid(start_child(work, **environment), 0)[1]
