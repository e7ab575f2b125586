"""Chunks: blocks of T tokens with edges at multiples of T from the document's start, and the digests that name them.

Chunk edges are a function of the tokens alone, never of read sizes, so that a reading that goes on from a chunk edge
makes the same model calls as one that never stopped. This module knows no text and no model.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.tokenizer import TokenBlock

CHUNK_TOKENS = 1024  # T unless a document says otherwise
CHAIN_START = bytes(32)
_OF_TOKENS = "starts", "ends", "decided", "anchor_bytes", "anchor_tokens"  # of a chunk's, beside its ids


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """n ≤ T tokens (n < T only at the end of the text, or at a pause) and where they stand in the document.

    ids           int64 [n], C-contiguous, not shared with other chunks but those of `first`
    starts, ends  int64 [n]: byte span of each token in the decoded UTF-8 text
    decided       int64 [n]: bytes of text that fix the token and all before it; -1 where only the end of the text did
    anchor_bytes, anchor_tokens  int64 [n]: last place at or before the token's end where tokenising may start anew
    is_paused     the text goes on: a chunk that begins at the same token, and holds these, follows
    """

    start_token: int
    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    decided: NDArray[np.int64]
    anchor_bytes: NDArray[np.int64]
    anchor_tokens: NDArray[np.int64]
    is_paused: bool = False

    @property
    def end_token(self) -> int:
        return self.start_token + len(self.ids)

    @property
    def byte_end(self) -> int:
        return int(self.ends[-1])

    @property
    def decided_byte(self) -> int:
        """Of the last token, as of `decided`."""
        return int(self.decided[-1])

    @property
    def anchor_byte(self) -> int:
        return int(self.anchor_bytes[-1])

    @property
    def anchor_token(self) -> int:
        return int(self.anchor_tokens[-1])

    def held(self) -> Chunk:
        """With the spans and anchors of its last token alone, a sixth of the memory: its ids, and where it ends."""
        return replace(self, **{name: getattr(self, name)[-1:].copy() for name in _OF_TOKENS})

    def first(self, n: int) -> Chunk:
        """Its first n tokens, as a text whose reading ends there has them."""
        return replace(self, **{name: getattr(self, name)[:n] for name in ("ids", *_OF_TOKENS)})


def chunks(
    blocks: Iterable[TokenBlock], size: int, *, skip: int = 0, start_token: int = 0, start_byte: int = 0
) -> Iterator[Chunk]:
    """Cut a stream of tokens into chunks of `size`; where a block has no tokens, those since the last edge are given as
    a chunk that is paused.

    skip         tokens of the stream to drop first (those between the anchor where it starts and the first chunk)
    start_token  tokens of the document before the first chunk, a multiple of `size`
    start_byte   byte offset where the first chunk starts
    raises       InputError where the stream ends within the tokens to skip
    """
    assert start_token % size == 0, "chunks are cut on the document's grid"
    pending: list[TokenBlock] = []
    n_pending = 0
    for block in blocks:
        if not len(block):
            if pending:
                yield replace(_chunk(pending, start_token, start_byte), is_paused=True)
            continue
        if skip:
            n_dropped = min(skip, len(block))
            block, skip = block[n_dropped:], skip - n_dropped
        while n_pending + len(block) >= size:
            n_taken = size - n_pending
            chunk = _chunk([*pending, block[:n_taken]], start_token, start_byte)
            yield chunk
            start_token, start_byte = chunk.end_token, chunk.byte_end
            block, pending, n_pending = block[n_taken:], [], 0
        if len(block):
            pending.append(block)
            n_pending += len(block)
    if skip:
        raise InputError(
            f"reading on from token {start_token}: expected the text that was read before, "
            f"found one that ends {skip} tokens earlier; it changed while it was being read, run again"
        )
    if pending:
        yield _chunk(pending, start_token, start_byte)


def _chunk(parts: list[TokenBlock], start_token: int, start_byte: int) -> Chunk:
    ends = np.concatenate([part.ends for part in parts])
    return Chunk(
        start_token=start_token,
        ids=np.concatenate([part.ids for part in parts], dtype=np.int64),
        starts=np.concatenate([[start_byte], ends[:-1]], dtype=np.int64),
        ends=ends,
        decided=np.concatenate([part.decided for part in parts]),
        anchor_bytes=np.concatenate([part.anchor_bytes for part in parts]),
        anchor_tokens=np.concatenate([part.anchor_tokens for part in parts]),
    )


def chain(previous: bytes, ids: NDArray[np.integer]) -> bytes:
    """The chain digest after one more chunk: SHA-256 of the digest before it and its ids as little-endian int32."""
    return hashlib.sha256(previous + ids.astype("<i4").tobytes()).digest()


class PrefixDigest:
    """SHA-256 of the first n bytes of a text, for growing n, while it streams past; holds what is not hashed yet."""

    def __init__(self) -> None:
        self.seen = 0  # bytes that went past
        self._sha256 = hashlib.sha256()
        self._hashed = 0
        self._held: deque[memoryview] = deque()

    def pieces(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, seen."""
        for piece in pieces:
            self._held.append(memoryview(piece))
            self.seen += len(piece)
            yield piece

    def at(self, byte: int) -> str:
        """Hex digest of the first `byte` bytes, of all seen where `byte` is -1; `byte` must not decrease.

        Raises InputError where the text ended before `byte`.
        """
        if byte == -1:
            byte = self.seen
        assert byte >= self._hashed, "a prefix digest cannot go back"
        if byte > self.seen:
            raise InputError(
                f"checking the text against its snapshot: expected at least {byte} bytes, found {self.seen}; "
                "it changed while it was being read, run again"
            )
        while self._hashed < byte:
            piece = self._held.popleft()
            n_wanted = byte - self._hashed
            self._sha256.update(piece[:n_wanted])
            self._hashed += min(n_wanted, len(piece))
            if len(piece) > n_wanted:
                self._held.appendleft(piece[n_wanted:])
        return self._sha256.copy().hexdigest()
