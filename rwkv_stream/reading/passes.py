"""One pass over a document: its text, hashed as it goes past, as chunks of tokens, and these through a model.

Whatever computes on a document chunk by chunk goes this way. Chunk edges depend on the text alone and one model call is
one chunk, so that all who read a text from its start get the same bits. What stays out: stores, and where to start.

Where a document has edges (`text.edges`), what a reading that ends there would have is given on the way. The grid of
chunks stays what it is: a chunk is read in pieces only where that leaves its bits as they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rwkv_stream.errors import InputError
from rwkv_stream.text.chunker import CHAIN_START, CHUNK_TOKENS, Chunk, PrefixDigest, chain, chunks

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.text.edges import Edges
    from rwkv_stream.text.readers.places import Place
    from rwkv_stream.text.tokenizer import TokenBlock, Tokenizer

TRIM_CHUNKS = 2  # freed memory goes back to the system so often


class Named(Protocol):
    """What a reading asks of a document; as a `Document`."""

    @property
    def name(self) -> str: ...
    @property
    def reopenable(self) -> bool: ...
    @property
    def place(self) -> Place: ...


class OpenText(Protocol):
    """What a reading asks of an open document; as a `Text`."""

    on_section: list[Callable[[int, Place], object]]

    @property
    def has_lines(self) -> bool: ...
    @property
    def encoding(self) -> str: ...
    @property
    def encoding_source(self) -> str | None: ...
    @property
    def replaced_bytes(self) -> int: ...
    @property
    def losses(self) -> Sequence[InputError]: ...
    @property
    def n_losses(self) -> int: ...
    @property
    def raw_bytes_read(self) -> int: ...
    @property
    def raw_size(self) -> int | None: ...
    def __iter__(self) -> Iterator[bytes]: ...
    def say_replaced(self) -> None: ...
    def __enter__(self) -> OpenText: ...
    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class ChainedChunk:
    """A chunk, the chain digest after it, and the digest of the text that fixed its tokens.

    edges    beginnings of the chunk, as readings have them that end at an edge of the document in it
    at_edge  whether its own end is at an edge
    """

    chunk: Chunk
    chain: bytes
    text_digest: str
    edges: tuple[ChainedChunk, ...] = ()
    at_edge: bool = False

    def held(self) -> ChainedChunk:
        """With as much of the chunk as `Chunk.held` has."""
        return replace(self, chunk=self.chunk.held(), edges=tuple(edge.held() for edge in self.edges))


@dataclass(frozen=True, slots=True, eq=False)
class ChunkOutput:
    """What a model made of a chunk, or of its beginning up to an edge: each token's hidden state after `ln_out`
    `[T, C]`, and the state after the last; `is_part` of such a beginning."""

    item: ChainedChunk
    hidden: Tensor
    state: State
    is_part: bool = False


class HashedText:
    """The pieces of a text, hashed as they go past: `pieces` gives them, each once."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._digest = PrefixDigest()
        self._hashed = 0
        self.pieces: Iterator[bytes] = self._digest.pieces(pieces)

    def digest(self, byte: int) -> str:
        """SHA-256 of the first `byte` bytes, -1: of all that went past. `byte` must not decrease.

        raises  InputError where the text ended before
        """
        digest = self._digest.at(byte)
        self._hashed = self._digest.seen if byte < 0 else byte
        return digest

    def pieces_from(self, byte: int) -> Iterator[bytes]:
        """The text from `byte` on; what lies before is hashed at once and not held."""
        position = 0
        for piece in self.pieces:
            position += len(piece)
            if position > byte:
                yield piece[max(0, byte - position + len(piece)) :]
            else:
                self.digest(position)

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether the text is seen to fix the tokens of a snapshot: it is the text of the snapshot through the byte
        that fixed them, and ends there too if it was the end that did.

        Draws as many pieces as that takes. A text that was hashed beyond that byte shows nothing any more.
        """
        if not self.begins_as(snapshot):
            return False
        at_end = snapshot.decided_byte < 0
        return not at_end or (self._digest.seen == snapshot.bytes and next(self.pieces, None) is None)

    def begins_as(self, snapshot: Snapshot) -> bool:
        """The same, wherever the text ends."""
        byte = snapshot.bytes if snapshot.decided_byte < 0 else snapshot.decided_byte
        if byte < self._hashed:
            return False
        while self._digest.seen < byte:
            if next(self.pieces, None) is None:
                return False
            self.digest(min(byte, self._digest.seen))
        return self.digest(byte) == snapshot.text_digest


def chained_chunks(
    text: HashedText,
    tokenizer: Tokenizer,
    size: int,
    *,
    after: Snapshot | None = None,
    max_tokens: int | None = None,
    edges: Edges | None = None,
    pauses: bool = False,
) -> Iterator[ChainedChunk]:
    """Cut a text, of which nothing was drawn, into chunks of `size` tokens.

    after       begin after this snapshot, on an edge of the document's grid; the text that it rests on is hashed again
    max_tokens  end after so many tokens of the document
    edges       of the document, which see the text go past; a chunk waits until those in it are known
    pauses      where a piece of the text is empty, the tokens since the last edge that are fixed are given as a chunk
                that is paused
    raises      InputError where the text is not the one that `after` was made from; what reading the text raises
    """
    if after is None:
        stream = tokenizer.stream(text.pieces, pauses=pauses)
        cut = chunks(_first(stream, 0, max_tokens), size)
        link = CHAIN_START
    else:
        anchor = after.anchor_token
        pieces = text.pieces_from(after.anchor_byte)
        stream = tokenizer.stream(pieces, byte=after.anchor_byte, token=anchor, pauses=pauses)
        cut = chunks(
            _first(stream, anchor, max_tokens),
            size,
            skip=after.tokens - anchor,
            start_token=after.tokens,
            start_byte=after.bytes,
        )
        link = bytes.fromhex(after.chain)
    unchecked = after
    for chunk, ends in ((chunk, ()) for chunk in cut) if edges is None else _with_edges(cut, edges, text):
        if unchecked is not None and text.digest(unchecked.decided_byte) != unchecked.text_digest:
            raise InputError(
                f"reading on from token {unchecked.tokens}: expected the text that was read before, found another; "
                "it changed while it was being read, run again"
            )
        unchecked = None
        parts = [chunk.first(n) for n in ends if n < len(chunk.ids)]
        within = tuple(
            ChainedChunk(part, chain(link, part.ids), text.digest(part.decided_byte), at_edge=True) for part in parts
        )
        chained = chain(link, chunk.ids)
        yield ChainedChunk(chunk, chained, text.digest(chunk.decided_byte), within, at_edge=len(parts) < len(ends))
        if not chunk.is_paused:
            link = chained


def _with_edges(cut: Iterator[Chunk], edges: Edges, text: HashedText) -> Iterator[tuple[Chunk, Sequence[int]]]:
    """Chunks, each with how many of its tokens end at or before the edges in it, once those are known."""
    held: deque[Chunk] = deque()
    while (chunk := next(cut, None)) is not None or held:
        if chunk is not None:
            held.append(chunk)
        while held and (chunk is None or (len(held) > 1 and edges.decided >= held[1].ends[0])):
            first = held.popleft()
            # an edge within the first token behind the chunk is at the chunk's end: the last token before it ends there
            beyond = int(held[0].ends[0]) if held else first.byte_end + 1
            while edges.decided < beyond and next(text.pieces, None) is not None:
                pass  # a reading that ends early ends in the midst of a line
            ends = dict.fromkeys(int(np.searchsorted(first.ends, edge, "right")) for edge in edges.before(beyond))
            yield first, [*edges.taken([n for n in ends if 0 < n < len(first.ids)]), *({len(first.ids)} & ends.keys())]


def forward_chunks(model: Model, items: Iterable[ChainedChunk], state: State) -> Iterator[ChunkOutput]:
    """Read chunks on from a state, batch 1: one call of the model each, and before it what there is at edges in it.

    A chunk with edges is read in pieces where that leaves its bits as they are; else its beginning up to each edge is
    read by itself, once more. A chunk that is paused leads to a state of its own; what follows goes on from the one
    before.
    """
    import torch

    for n_chunks, item in enumerate(items, 1):
        ids = torch.from_numpy(item.chunk.ids)[None]
        read: list[Tensor] = []
        n_read = 0
        for edge in item.edges:
            end = len(edge.chunk.ids)
            hidden, after = model.forward(ids[:, n_read:end], state, logits="none")
            if model.keeps_bits_in_pieces:
                read, n_read, state = [*read, hidden[0]], end, after
                yield ChunkOutput(edge, torch.cat(read), after, is_part=True)
            else:
                yield ChunkOutput(edge, hidden[0], after, is_part=True)
        hidden, after = model.forward(ids[:, n_read:], state, logits="none")
        yield ChunkOutput(item, torch.cat([*read, hidden[0]]) if read else hidden[0], after)
        if not item.chunk.is_paused:
            state = after
        if n_chunks % TRIM_CHUNKS == 0:
            model.trim()


def state_of(model: Model, pieces: Iterable[bytes], document: str) -> tuple[State, int]:
    """The state that has read a text, in the calls of `ingest`, and its tokens.

    raises  InputError for an empty one, and what reading the text raises
    """
    _, state = model.start()
    tokens = 0
    for output in forward_chunks(model, chained_chunks(HashedText(pieces), model.tokenizer, CHUNK_TOKENS), state):
        state, tokens = output.state, output.item.chunk.end_token
    if not tokens:
        raise InputError(f"reading '{document}': expected some text, found none")
    return state, tokens


def _first(blocks: Iterable[TokenBlock], token: int, limit: int | None) -> Iterator[TokenBlock]:
    """The blocks up to `limit` tokens of the document, the first block starting at `token`."""
    for block in blocks:
        if limit is not None and token + len(block.ids) >= limit:
            yield block[: limit - token]
            return
        token += len(block.ids)
        yield block
