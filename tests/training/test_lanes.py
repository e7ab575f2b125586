"""Lanes: stretches of documents in windows, by shares, each once an epoch, and on from any place."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
from tiny_models import save_own_tokenizer

from rwkv_stream.text import tokenizer
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training import data
from rwkv_stream.training.data import Encoded, TokenFile
from rwkv_stream.training.lanes import IGNORED, Cursor, Lanes, Made, Repeats, Source, Texts, framed

LENGTHS = (5, 40, 1, 100, 17, 64, 33)
FIRST = np.cumsum((1, *LENGTHS))  # token of each document, all tokens being different


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Whose start and end token is 0."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    save_own_tokenizer(path)
    return tokenizer.from_file(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Documents whose tokens say where they stand; every third is not learnt."""
    path = tmp_path_factory.mktemp("tokens") / "x.arrow"
    documents = [Encoded(FIRST[i] + np.arange(n), np.arange(n) % 3 != 1) for i, n in enumerate(LENGTHS)]
    data.write(path, documents)
    return TokenFile(path)


def test_stretches_are_all_of_the_documents_once_an_epoch(file: TokenFile, own: Tokenizer) -> None:
    texts, count = Texts(file, 32, own, seed=1), sum(-(-n // 32) for n in LENGTHS)
    epochs = [[texts.stretch(epoch * count + i) for i in range(count)] for epoch in range(2)]
    for stretches in epochs:
        assert all(z.tokens[0] == 0 and not z.is_learnt[0] for z in stretches), "the start token"
        inner = np.sort(np.concatenate([z.tokens[z.tokens > 0] for z in stretches]))
        assert inner.tolist() == list(range(1, FIRST[-1]))
        ends = [int(z.tokens[-2]) for z in stretches if z.tokens[-1] == 0]
        assert sorted(ends) == (FIRST[1:] - 1).tolist(), "the end token"
    first, second = ([int(z.tokens[1]) for z in stretches] for stretches in epochs)
    assert first != second and sorted(first) == sorted(second)
    assert first == [int(Texts(file, 32, own, seed=1).stretch(i).tokens[1]) for i in range(count)]


def windows(lanes: Lanes, n: int, tokens: int = 16) -> list[list[tuple[int, list[tuple[int, int]]]]]:
    """Of each window its segments: the lane from whose state it goes on (or how many there are), tokens and targets."""
    found = []
    for _ in range(n):
        batch = lanes.window(tokens)
        pairs = list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))
        ends = batch.lengths.cumsum(0).tolist()
        parts = [pairs[end - n : end] for end, n in zip(ends, batch.lengths.tolist(), strict=True)]
        found.append(list(zip(batch.start.tolist(), parts, strict=True)))
    return found


def test_lanes_read_each_stretch_to_its_end_and_begin_anew(file: TokenFile, own: Tokenizer) -> None:
    texts: dict[str, Source] = {"x": Texts(file, 32, own, seed=0)}
    lanes, read = Lanes(texts, {"x": 1}, 3, Cursor()), dict[int, list[tuple[int, int]]]()
    whole = list[list[tuple[int, int]]]()
    for window in windows(lanes, 12):
        assert sum(len(pairs) for _, pairs in window) == 3 * 16
        lane = room = 0
        for start, pairs in window:
            assert start in (lane, 3), "a segment goes on from its own lane, or begins"
            if start == 3:
                if lane in read:
                    whole.append(read[lane])
                read[lane] = []
            read[lane] += pairs
            room += len(pairs)
            if room == 16:
                lane, room = lane + 1, 0
        assert lane == 3
    stretches = [Texts(file, 32, own, seed=0).stretch(i) for i in range(lanes.cursor.drawn["x"])]
    wanted = [
        list(zip(z.tokens[:-1], np.where(z.is_learnt[1:], z.tokens[1:], IGNORED), strict=True)) for z in stretches
    ]
    assert Counter(map(str, [[(int(a), int(b)) for a, b in pairs] for pairs in wanted])) >= Counter(map(str, whole))
    assert len(whole) > 10


def test_the_last_segment_of_each_lane_is_kept(file: TokenFile, own: Tokenizer) -> None:
    lanes = Lanes({"x": Texts(file, 8, own, seed=0)}, {"x": 1}, 4, Cursor())
    batch = lanes.window(20)
    ends = batch.lengths.cumsum(0)
    assert ends[batch.keep].tolist() == [20, 40, 60, 80] and len(batch.lengths) > 8


def test_shares_of_tokens_are_met(file: TokenFile, own: Tokenizer) -> None:
    sources: dict[str, Source] = {
        "x": Texts(file, 32, own, 0),
        "made": Made(("copies", "facts"), own, 0),
        "again": Repeats(file, own, 0),
        "none": Texts(file, 32, own, 1),
    }
    shares = {"x": 3.0, "made": 5.0, "again": 2.0, "none": 0.0}
    lanes = Lanes(sources, shares, 2, Cursor())
    for _ in range(150):
        lanes.window(64)
    given = lanes.cursor.given
    assert given.keys() == {"x", "made", "again"}
    for name, tokens in given.items():
        assert tokens / sum(given.values()) == pytest.approx(shares[name] / 10, abs=0.02), name


def test_repeats_are_drawn_as_often_as_the_text_has_them(file: TokenFile, own: Tokenizer) -> None:
    made = [Repeats(file, own, seed=0).stretch(i) for i in range(200)]
    counts = np.histogram(np.concatenate([z.tokens[1:] for z in made]), bins=FIRST)[0]
    assert counts / counts.sum() == pytest.approx(np.array(LENGTHS) / sum(LENGTHS), abs=0.04)
    for stretch in made:
        tokens, learnt = stretch.tokens[1:], stretch.is_learnt[1:]
        length = int(np.argmax(learnt)) - 1
        assert (tokens[length:] == tokens[:-length]).all() and learnt[length + 1 :].all() and not learnt[:length].any()


def test_a_cursor_goes_on_where_it_was(file: TokenFile, own: Tokenizer) -> None:
    def sources() -> dict[str, Source]:
        return {"x": Texts(file, 32, own, 0), "made": Made(("lists",), own, 0)}

    lanes = Lanes(sources(), {"x": 1, "made": 2}, 3, Cursor())
    windows(lanes, 5)
    kept = copy.deepcopy(lanes.cursor)
    assert windows(Lanes(sources(), {"x": 1, "made": 2}, 3, kept), 8) == windows(lanes, 8)


def test_a_document_is_framed() -> None:
    found = framed(Encoded(np.array([5, 6]), np.array([False, True])), 0, 9)
    assert found.tokens.tolist() == [0, 5, 6, 9] and found.is_learnt.tolist() == [False, False, True, True]
    assert framed(found, None, None).tokens.dtype == np.int64
    unlearnt = framed(Encoded(np.array([5]), np.array([False])), None, 1)
    assert unlearnt.is_learnt.tolist() == [False, False]
