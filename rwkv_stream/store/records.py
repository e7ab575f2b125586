"""What a store records: a snapshot, the head of a document, a tag; as values, and as the bytes of their small files."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rwkv_stream.errors import MismatchError, UsageError
from rwkv_stream.store.codecs import EXACT
from rwkv_stream.store.sealed import (
    HEAD,
    RECORD,
    TAG,
    Checks,
    check,
    damaged,
    is_count,
    is_digest,
    is_text,
    seal,
    unseal,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store.codecs import Float32s
    from rwkv_stream.store.texts import KeptText

    Arrays = dict[str, Float32s]

ExtentBytes = bytes
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # of a moment, UTC; in its order
LAST_HIDDEN = "last_hidden"  # among the tensors of a state
INLINE_BYTES = 2048  # of an extent in a record, which so takes one block of 4 KiB

# How a snapshot was made (`how`): by reading a document, or an instruction before one, by asking, by reading one
# stretch of a document and nothing else, or by reading on to a position that was asked for.
READING, INSTRUCTION, CONVERSATION, CHUNK_STATE, POSITION = "ingest", "instruction", "ask", "cells", "position"


class StoredObject(NamedTuple):
    """One object that holds a snapshot's state: its name (SHA-256 of its bytes), how it is coded, its size."""

    name: str
    codec: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSnapshot:
    """What is known of a snapshot before it is stored; `bytes` and all offsets count the decoded UTF-8 text."""

    document: str
    model: str  # fingerprint
    model_path: str  # where that model was last seen
    tokenizer: str
    start_digest: str  # of the state before the first token, start token not yet fed
    start: str | None  # id of the snapshot whose state that was (`--from-snapshot`)
    chain: str  # chain digest of the token ids
    tokens: int
    bytes: int
    chunk: int
    leaf: bool  # off the chunk grid: can be forked, not continued
    parent: str | None
    how: str
    exact: bool
    numerics: Mapping[str, str | int] = field(hash=False)
    encoding: str
    decided_byte: int  # bytes of text that fix the tokens, -1: all of it and its end
    text_digest: str  # of the text through `decided_byte`
    anchor_byte: int  # where tokenising may begin anew; of a chunk state, where its stretch begins
    anchor_token: int
    sampled_bits: float = 0.0  # surprise of the model, summed over every so manyth token since the start
    sampled_tokens: int = 0  # how many tokens that were, 0: not known
    text: str | None = None  # name of the last extent of its kept text, None: not kept
    edge: bool = False  # at an edge of the document (`ingest --snapshot-at`)
    inline_extent: ExtentBytes | None = field(default=None, repr=False)  # that extent, where it is in no file
    # Of each tensor of the state, by name; empty: not known, None: not finite, or nothing to compare with.
    norms: Mapping[str, Sequence[float | None]] = field(default_factory=dict, hash=False)  # Frobenius, layer by layer
    drift: Mapping[str, float | None] = field(default_factory=dict, hash=False)  # relative, since the snapshot before


class SnapshotReader(Protocol):
    """What a snapshot is read with beyond its record: the files of its store."""

    def arrays(self, snapshot: Snapshot) -> Arrays:
        """As `Snapshot.arrays`."""

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """The snapshots that it goes on from, nearest first, removed ones too."""

    def starts(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        """As `Snapshot.starts`."""

    def text(self, snapshot: Snapshot) -> KeptText | None:
        """As `Store.text`; postings that have to be made are not saved."""


@dataclass(frozen=True, slots=True)
class StateElsewhere:
    """A reader of snapshots that has the state of one from elsewhere; all else as another reader has it.

    snapshot  its id
    load      gives its tensors, as `arrays`
    """

    reader: SnapshotReader
    snapshot: str
    load: Callable[[], Arrays]

    def arrays(self, snapshot: Snapshot) -> Arrays:
        return self.load() if snapshot.id == self.snapshot else self.reader.arrays(snapshot)

    def ancestors(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        return self.reader.ancestors(snapshot)

    def starts(self, snapshot: Snapshot) -> Iterator[Snapshot]:
        return self.reader.starts(snapshot)

    def text(self, snapshot: Snapshot) -> KeptText | None:
        return self.reader.text(snapshot)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(NewSnapshot):
    """A snapshot in a store. Its facts are plain fields, by which two are equal; `load` reads its tensors."""

    id: str
    state_digest: str
    state_bytes: int  # of the decoded tensors, `last_hidden` included
    objects: tuple[StoredObject, ...]  # none: made from its text when asked for; or removed, where it has no text
    created: str  # UTC, ISO 8601
    reader: SnapshotReader = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of its objects on disk."""
        return sum(stored.size_bytes for stored in self.objects)

    @property
    def removed(self) -> bool:
        """Whether only its place in the lineage is left."""
        return not self.objects and self.text is None

    @property
    def last_extent(self) -> str | None:
        """The file of the last extent of its text; None where it has no text, or that lies in the record."""
        return self.text if self.inline_extent is None else None

    @property
    def keeps_state(self) -> bool:
        """Whether its state is in the store; else `rs.snapshot_at` makes it from the text, if it was not removed."""
        return bool(self.objects)

    @property
    def codec(self) -> str | None:
        """How its state is kept; None where it is not."""
        return self.objects[0].codec if self.objects else None

    @property
    def is_kept_exactly(self) -> bool:
        """Whether what `load` gives is the state, bit for bit; else it is near it."""
        return self.codec == EXACT

    def load(self) -> tuple[State, Tensor]:
        """The state, batch 1, and the hidden state fp32 [C] of the last token after `ln_out`, both on the CPU; as near
        as its codec keeps them.

        raises  SnapshotError if one bit is not as it was stored, MismatchError for a codec of a newer version,
                UsageError where the state is not kept
        """
        import torch

        from rwkv_stream.model.state import State

        tensors = {name: torch.from_numpy(array) for name, array in self.arrays().items()}
        last_hidden = tensors.pop(LAST_HIDDEN)
        return State(tensors), last_hidden

    def arrays(self) -> Arrays:
        """What `load` gives, by name, without torch: the tensors of the state, and `last_hidden`; raises as it does."""
        return self.reader.arrays(self)

    def state(self) -> State:
        """The first of what `load` gives."""
        return self.load()[0]

    def last_hidden(self) -> Tensor:
        """The second of what `load` gives."""
        return self.load()[1]

    def ancestors(self) -> Iterator[Snapshot]:
        """The snapshots it goes on from that exist, nearest first, each read from its record.

        raises  SnapshotError, MismatchError for a newer format
        """
        return (ancestor for ancestor in self.reader.ancestors(self) if not ancestor.removed)

    def lineage(self) -> Iterator[Snapshot]:
        """Itself, then its `ancestors`; raises as they do."""
        return itertools.chain((self,), self.ancestors())

    def starts(self) -> Iterator[Snapshot]:
        """The snapshot whose state its reading started from, the one that that started from, and so on to the first
        reading or to one that is not here; removed ones too.

        raises  SnapshotError, MismatchError for a newer format
        """
        return self.reader.starts(self)

    def tombstone(self) -> Snapshot:
        """What is left of it once it is removed: its place in the lineage."""
        return replace(self, objects=(), text=None, inline_extent=None)

    def facts(self) -> dict[str, Any]:
        """Everything recorded, ready for JSON."""
        apart = ("id", "reader", "objects", "text", "inline_extent", *_MAPS)
        names = [f.name for f in fields(self) if f.name not in apart]
        return {
            "id": self.id,
            **{name: getattr(self, name) for name in names},
            "size_bytes": self.size_bytes,
            "keeps_state": self.keeps_state,
            "kept_text": self.text,
            **{name: dict(getattr(self, name)) for name in _MAPS},
            "objects": [stored._asdict() for stored in self.objects],
        }


@dataclass(frozen=True, slots=True)
class Head:
    """The newest snapshot of a document by a model; encoding, chunk and edges are the document's own, as documents of
    the same tokens share their snapshots.

    mark  where that snapshot stands in the files that the document follows, as their reader says it; None where it
          follows none, or where that is not known
    """

    document: str
    model: str
    snapshot: str
    encoding: str
    moved: str  # UTC, ISO 8601
    chunk: int = 0  # tokens of a model call, 0: as the snapshot has it
    mark: Mapping[str, str | int] | None = field(default=None, hash=False)
    snapshot_at: str = ""  # edges of the document at which there are snapshots, as of `text.edges`; "" for none

    def view(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot where it stands, as the document has it: with its own encoding, on its own chunk grid."""
        chunk = self.chunk or snapshot.chunk
        leaf = snapshot.leaf if chunk == snapshot.chunk else snapshot.tokens % chunk != 0
        return replace(snapshot, encoding=self.encoding, chunk=chunk, leaf=leaf)


@dataclass(frozen=True, slots=True)
class Tag:
    """A name for one snapshot."""

    name: str
    snapshot: str
    created: str  # UTC, ISO 8601


def snapshot_id(model: str, start_digest: str, chain: str, tokens: int, state_digest: str) -> str:
    """Who a snapshot is: nothing of clock, path, document, parent or codec enters."""
    text = "\n".join(("rwkv-stream snapshot", model, start_digest, chain, str(tokens), state_digest))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_model(snapshot: Snapshot, model: Model) -> None:
    """Raise MismatchError if another model made the snapshot, UsageError for the name of one."""
    if isinstance(snapshot, str | os.PathLike):
        raise UsageError(f"using snapshot '{snapshot}': expected what `store.get(REF)` gives, found a name")
    if snapshot.model != model.fingerprint:
        raise MismatchError(
            f"using snapshot {snapshot.id[:12]}: expected its model {snapshot.model}, last seen at "
            f"'{snapshot.model_path}', found {model.fingerprint} at '{model.path}'; pass --model with the first one"
        )


def now() -> str:
    """This second, UTC, ISO 8601."""
    return time.strftime(TIME_FORMAT, time.gmtime())


# ---- as bytes ----


_MAPS = ("numerics", "norms", "drift")
_RECORD_NAMES = [f.name for f in fields(Snapshot) if f.name not in ("id", "reader")]


def encode_record(snapshot: Snapshot) -> bytes:
    """UsageError where names in it are too long or are not text."""
    values = {name: getattr(snapshot, name) for name in _RECORD_NAMES}
    return seal(RECORD, values | {name: dict(values[name]) for name in _MAPS})


def decode_row(data: bytes, reader: SnapshotReader, where: Path, identity: str) -> Snapshot:
    """As `decode_record`, for bytes that were decoded before: only their checksum is looked at again."""
    return _snapshot(identity, reader, unseal(RECORD, data, where))


def decode_record(data: bytes, reader: SnapshotReader, where: Path) -> Snapshot:
    """The snapshot of a record; SnapshotError if the bytes are damaged, MismatchError if of a newer version."""
    values = unseal(RECORD, data, where)
    check(values, _RECORD_CHECKS, where)
    inline = values["inline_extent"]
    if inline is not None and hashlib.sha256(inline).hexdigest() != values["text"]:
        raise damaged(where, "the text that it names", "another")
    identity = snapshot_id(
        values["model"], values["start_digest"], values["chain"], values["tokens"], values["state_digest"]
    )
    return _snapshot(identity, reader, values)


def _snapshot(identity: str, reader: SnapshotReader, values: dict[str, Any]) -> Snapshot:
    objects = tuple(StoredObject(*stored) for stored in values["objects"])
    return Snapshot(**values | {"id": identity, "reader": reader, "objects": objects})


def encode_head(head: Head) -> bytes:
    return seal(HEAD, {f.name: getattr(head, f.name) for f in fields(head)})


def decode_head(data: bytes, where: Path) -> Head:
    """Raises as `decode_record` does."""
    values = unseal(HEAD, data, where)
    check(values, _HEAD_CHECKS, where)
    return Head(**values)


def encode_tag(tag: Tag) -> bytes:
    return seal(TAG, {f.name: getattr(tag, f.name) for f in fields(tag)})


def decode_tag(data: bytes, where: Path) -> Tag:
    """Raises as `decode_record` does."""
    values = unseal(TAG, data, where)
    check(values, _TAG_CHECKS, where)
    return Tag(**values)


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_digest_or_none(value: Any) -> bool:
    return value is None or is_digest(value)


def _is_model(value: Any) -> bool:
    return type(value) is str and bool(value) and value.isascii() and value.isprintable() and " " not in value


def _is_mark(value: Any) -> bool:
    return value is None or (type(value) is dict and _is_numerics(value))


def _is_numerics(value: Any) -> bool:
    return type(value) is dict and all(type(k) is str and type(v) in (str, int) for k, v in value.items())


def _is_length(value: Any) -> bool:
    return value is None or (type(value) is float and 0 <= value < math.inf)


def _is_norms(value: Any) -> bool:
    return type(value) is dict and all(
        type(name) is str and type(layers) is list and all(map(_is_length, layers)) for name, layers in value.items()
    )


def _is_drift(value: Any) -> bool:
    return type(value) is dict and all(type(name) is str and _is_length(part) for name, part in value.items())


def _is_objects(value: Any) -> bool:
    return type(value) is list and all(
        type(item) is list and len(item) == 3 and is_digest(item[0]) and is_text(item[1]) and is_count(item[2])
        for item in value
    )


_RECORD_CHECKS: Checks = dict.fromkeys(_RECORD_NAMES, is_text) | {
    "model": _is_model,
    "start_digest": is_digest,
    "start": _is_digest_or_none,
    "chain": is_digest,
    "tokens": is_count,
    "bytes": is_count,
    "chunk": is_count,
    "leaf": _is_bool,
    "parent": _is_digest_or_none,
    "exact": _is_bool,
    "numerics": _is_numerics,
    "decided_byte": lambda value: value == -1 or is_count(value),
    "anchor_byte": is_count,
    "anchor_token": is_count,
    "sampled_bits": lambda value: type(value) is float and 0 <= value < math.inf,
    "sampled_tokens": is_count,
    "text": _is_digest_or_none,
    "inline_extent": lambda value: value is None or (type(value) is bytes and len(value) <= INLINE_BYTES),
    "norms": _is_norms,
    "drift": _is_drift,
    "edge": _is_bool,
    "state_digest": is_digest,
    "state_bytes": is_count,
    "objects": _is_objects,
}


_HEAD_CHECKS: Checks = {f.name: is_text for f in fields(Head)} | {
    "snapshot": is_digest,
    "chunk": is_count,
    "mark": _is_mark,
}
_TAG_CHECKS: Checks = {f.name: is_text for f in fields(Tag)} | {"snapshot": is_digest}


def check_new(new: NewSnapshot) -> None:
    """UsageError unless a record of `new` could be read back."""
    for name in (f.name for f in fields(NewSnapshot)):
        value = getattr(new, name)
        if not _RECORD_CHECKS[name](dict(value) if name in _MAPS else value):
            raise UsageError(f"storing a snapshot: expected another value of '{name}', found {str(value)[:80]!r}")


IDENTITY_CHECKS: Checks = {
    name: _RECORD_CHECKS[name] for name in ("model", "start_digest", "chain", "tokens", "state_digest")
}
