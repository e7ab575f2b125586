"""Chunks lie on the document's grid whatever the blocks; digests are those of the text and the ids."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_stream.errors import InputError
from rwkv_stream.text.chunker import CHAIN_START, Chunk, PrefixDigest, chain, chunks
from rwkv_stream.text.tokenizer import TokenBlock, raw_bytes, world

TEXT = ("The keeper lit the lamp, 漢字 é and the sea was calm. 🙂\r\n" * 12).encode()
ARRAYS = ("ids", "starts", "ends")


def same(a: Chunk, b: Chunk) -> bool:
    names = ("start_token", "decided_byte", "anchor_byte", "anchor_token")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ARRAYS) and all(
        getattr(a, n) == getattr(b, n) for n in names
    )


def whole_block() -> TokenBlock:
    (block,) = world().stream([TEXT])
    return block


def split(block: TokenBlock, places: list[int]) -> Iterator[TokenBlock]:
    edges = [0, *sorted(places), len(block)]
    for a, b in itertools.pairwise(edges):
        if a < b:
            yield block[a:b]


def test_what_is_held_of_a_chunk_and_its_beginnings() -> None:
    for c in chunks([whole_block()], 64):
        held, whole = c.held(), [*chunks([whole_block()[: c.end_token]], 64)][-1]
        assert np.array_equal(held.ids, c.ids)
        for chunk in (held, c.first(len(c.ids)), whole):
            assert (chunk.end_token, chunk.byte_end, chunk.decided_byte) == (c.end_token, c.byte_end, c.decided_byte)
            assert (chunk.anchor_byte, chunk.anchor_token) == (c.anchor_byte, c.anchor_token)
        n = len(c.ids) // 2 + 1
        [*_, part] = chunks([whole_block()[: c.start_token + n]], 64)
        assert same(c.first(n), part)
        assert sum(array.nbytes for array in (held.starts, held.ends, held.decided, held.anchor_bytes)) == 32


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_chunks_are_the_tokens_in_order(size: int) -> None:
    block = whole_block()
    found = list(chunks([block], size))
    assert [len(c.ids) for c in found[:-1]] == [size] * (len(found) - 1)
    assert 1 <= len(found[-1].ids) <= size
    assert [c.start_token for c in found] == list(range(0, len(block), size))
    assert [c.end_token for c in found] == [*range(size, len(block), size), len(block)]
    assert np.concatenate([c.ids for c in found]).tolist() == block.ids.tolist()
    assert np.concatenate([c.ends for c in found]).tolist() == block.ends.tolist()
    assert np.concatenate([c.starts for c in found]).tolist() == [0, *block.ends[:-1].tolist()]
    for c in found:
        assert c.ids.dtype == c.starts.dtype == c.ends.dtype == np.int64
        assert c.ids.flags.c_contiguous and c.ids.flags.writeable
        last = c.end_token - 1
        assert c.byte_end == block.ends[last]
        assert c.decided_byte == block.decided[last]
        assert (c.anchor_byte, c.anchor_token) == (block.anchor_bytes[last], block.anchor_tokens[last])
    assert found[-1].decided_byte == -1


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), places=st.lists(st.integers(0, 200), max_size=20))
def test_chunks_do_not_depend_on_the_blocks(size: int, places: list[int]) -> None:
    block = whole_block()
    whole = list(chunks([block], size))
    again = list(chunks(split(block, [min(p, len(block)) for p in places]), size))
    assert len(whole) == len(again)
    assert all(map(same, whole, again))


def test_a_pause_gives_what_waits_and_moves_no_edge() -> None:
    block = whole_block()
    whole = list(chunks([block], 16))
    pause = block[:0]
    found = list(chunks([pause, block[:21], pause, block[21:32], pause, block[32:40], pause, pause, block[40:]], 16))
    assert all(map(same, [c for c in found if not c.is_paused], whole))
    paused = [(c.start_token, c.end_token) for c in found if c.is_paused]
    assert paused == [(16, 21), (32, 40), (32, 40)], "none where nothing waits"
    for c in found:
        assert c.ids.tolist() == block.ids[c.start_token : c.end_token].tolist()


@pytest.mark.parametrize("size", [1, 16, 50])
@pytest.mark.parametrize("kind", ["world", "bytes"])
def test_going_on_from_a_chunk_edge_gives_the_same_chunks(size: int, kind: str) -> None:
    tokenizer = world() if kind == "world" else raw_bytes()
    whole = list(chunks(tokenizer.stream([TEXT]), size))
    for i, edge in enumerate(whole[: 40 if size == 1 else -1]):
        stream = tokenizer.stream([TEXT[edge.anchor_byte :]], byte=edge.anchor_byte, token=edge.anchor_token)
        rest = chunks(
            stream,
            size,
            skip=edge.end_token - edge.anchor_token,
            start_token=edge.end_token,
            start_byte=edge.byte_end,
        )
        rest_list = list(rest)
        assert len(rest_list) == len(whole) - i - 1
        assert all(map(same, rest_list, whole[i + 1 :]))


def test_no_tokens_no_chunks() -> None:
    assert list(chunks([], 8)) == []
    block = whole_block()
    assert list(chunks([block], 8, skip=len(block), start_token=8 * len(block), start_byte=len(TEXT))) == []


def test_a_text_that_ends_before_the_tokens_to_skip() -> None:
    with pytest.raises(InputError, match="ends 5 tokens earlier"):
        list(chunks([whole_block()[:11]], 16, skip=16, start_token=16))


def test_chunks_are_drawn_one_by_one() -> None:
    drawn = 0

    def blocks() -> Iterator[TokenBlock]:
        nonlocal drawn
        for block in split(whole_block(), list(range(10, 100, 10))):
            drawn += 1
            yield block

    cut = chunks(blocks(), 20)
    next(cut)
    assert drawn == 2


def test_chain() -> None:
    ids = np.array([1, 2, 65_535], np.int64)
    first = chain(CHAIN_START, ids)
    assert first == hashlib.sha256(bytes(32) + bytes([1, 0, 0, 0, 2, 0, 0, 0, 255, 255, 0, 0])).digest()
    assert chain(CHAIN_START, ids.astype(np.int32)) == first
    assert chain(first, ids) != first
    assert chain(chain(CHAIN_START, ids[:1]), ids[1:]) != first, "how the tokens are cut enters the chain"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_prefix_digest(data: st.DataObject) -> None:
    text = data.draw(st.binary(max_size=60))
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    digest = PrefixDigest()
    at = 0
    edges = [0, *places, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    for i, piece in enumerate(digest.pieces(pieces)):
        assert piece == pieces[i]
        assert digest.seen == edges[i + 1]
        at = data.draw(st.integers(at, digest.seen))
        assert digest.at(at) == digest.at(at) == hashlib.sha256(text[:at]).hexdigest()
        assert sum(map(len, digest._held)) == digest.seen - at, "what is hashed is not held"
    assert digest.at(-1) == hashlib.sha256(text).hexdigest()


def test_prefix_digest_of_a_text_that_became_shorter() -> None:
    digest = PrefixDigest()
    assert list(digest.pieces([b"abc"])) == [b"abc"]
    with pytest.raises(InputError, match="at least 4 bytes, found 3"):
        digest.at(4)
