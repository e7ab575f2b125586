"""Tokenizers: tokens, spans, anchors and `decided` are functions of the text alone, and what they promise."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import random
import re
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import rwkv_stream.text.tokenizer
from rwkv_stream.errors import InputError, TokenizerError
from rwkv_stream.text.tokenizer import (
    OWN_PATTERN,
    TextDecoder,
    TokenBlock,
    Tokenizer,
    find,
    from_file,
    raw_bytes,
    world,
)

INPUTS = Path(__file__).parents[3] / "shared/data/inputs"
TRAINING = "The keeper lit the lamp, and the sea was calm. It's 1883!\n\nWho is the keeper? Ünï — 漢字 <|end|> end\r\n"
FIELDS = ("ids", "ends", "decided", "anchor_bytes", "anchor_tokens")


def own_definition(tmp: Path, *, pattern: str = OWN_PATTERN, special: str = "<|end|>") -> Path:
    """Our own kind of BPE, trained on a few lines."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING] * 3, trainer)
    path = tmp / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def neox_definition(tmp: Path, name: str = "neox.json") -> Path:
    """All parts as in 20B_tokenizer.json: NFC, GPT-2's pre-tokens, trimmed offsets, runs of spaces as added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING, "The end.\n\n", "Not yet.\n\n"], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    path = tmp / name
    tokenizer.save(str(path))
    return path


def words_definition(tmp: Path) -> Path:
    """A tokenizer whose decoder looks at neighbours and which drops white space."""
    words = ["[UNK]", "the", "sea", "keep", "##er", "##s", ".", "calm", "\ufffd"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")  # type: ignore[call-arg]
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    path = tmp / "words.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    @functools.cache
    def make(kind: str) -> Tokenizer:
        if kind in ("world", "bytes"):
            return world() if kind == "world" else raw_bytes()
        define = {"bpe": own_definition, "neox": neox_definition, "json": words_definition}[kind]
        return from_file(define(tmp_path_factory.mktemp(kind)))

    return make


EXACT = ["world", "bytes", "bpe"]
PIECEWISE = ["neox", "json"]


@pytest.fixture(params=EXACT + PIECEWISE)
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_of: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> Tokenizer:
    """Each kind, with steps and pieces so small that short texts have many."""
    monkeypatch.setattr(rwkv_stream.text.tokenizer, "STEP_BYTES", 8)
    monkeypatch.setattr(rwkv_stream.text.tokenizer, "PIECE_BYTES", 32)
    made = tokenizer_of(request.param)
    assert made.kind == request.param
    return made


def joined(blocks: Iterator[TokenBlock]) -> TokenBlock:
    parts = list(blocks)
    if not parts:
        return TokenBlock(*(np.zeros(0, np.int32 if name == "ids" else np.int64) for name in FIELDS))
    return TokenBlock(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


def same(a: TokenBlock, b: TokenBlock) -> bool:
    return all(
        getattr(a, n).dtype == getattr(b, n).dtype and np.array_equal(getattr(a, n), getattr(b, n)) for n in FIELDS
    )


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# Text that is hard on tokenizers: long runs, white space of all kinds, marks, emoji, NUL, halves of words.
HARD = [
    *("a", "The keeper", "'s", "'", " ", "  ", "\n", "\r\n", "\n\n\n", "\t", "\u00a0", "\u2003", "\x00", "1", "12345"),
    *("é", "e\u0301", "\u0301", "漢字", "🙂", "👩‍👩‍👧", "가", "\u1100\u1161", "\ufffd", "\u2028", "\x85", "€", "न्"),
    *("<|end|>", "<|endoftext|>", "<|", "...", "!!!", "-" * 40, " " * 70, "x" * 60, "\n" * 20, "=" * 130, "extra"),
    *("ordinary", "á" * 30, "\u0301" * 30, "\x80", "ÿ", "\u200d", "_", "ab" * 40, "User: hi\n\nAssistant:", "\r"),
    *("\r\r", " \n ", "ﬁ", "\U0010ffff"),
]
hard_text = st.lists(st.sampled_from(HARD) | st.text(max_size=6), max_size=25).map("".join)
SOME = [
    TRAINING * 3,
    "".join(HARD),
    "The word is extraordinary. " * 8,
    "漢字かな交じり文。" * 12,
    "x" * 500,
    " " * 500,
    "e\u0301" * 100,
    "🙂" * 60,
]


# ---- all kinds ----


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", EXACT + PIECEWISE)
def test_the_stream_is_the_same_for_every_cut(
    kind: str, tokenizer_of: Callable[[str], Tokenizer], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rwkv_stream.text.tokenizer, "PIECE_BYTES", data.draw(st.sampled_from([4, 32, 100])))
        tokenizer = tokenizer_of(kind)
        text = data.draw(hard_text).encode()
        whole = joined(tokenizer.stream([text]))
        patch.setattr(rwkv_stream.text.tokenizer, "STEP_BYTES", data.draw(st.sampled_from([1, 7, 64, 4096])))
        pieces = cut(text, data.draw(st.lists(st.integers(0, 2000), max_size=30)))
        assert same(joined(tokenizer.stream(pieces)), whole)


@pytest.mark.parametrize("text", SOME, ids=range(len(SOME)))
def test_one_byte_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    data = text.encode()
    whole = joined(tokenizer.stream([data]))
    assert same(joined(tokenizer.stream(data[i : i + 1] for i in range(len(data)))), whole)
    assert tokenizer.encode(text) == whole.ids.tolist()


@pytest.mark.parametrize("text", SOME, ids=range(len(SOME)))
def test_arrays_hang_together(tokenizer: Tokenizer, text: str) -> None:
    n = len(text.encode())
    block = joined(tokenizer.stream([text.encode()]))
    if not len(block):
        assert tokenizer.kind == "json" and text.isspace()
        return
    starts = np.concatenate([[0], block.ends[:-1]])
    assert (starts <= block.ends).all()
    assert block.ends[-1] == n
    assert block.ids.min() >= 0 and block.ids.max() < tokenizer.vocab_size
    known = block.decided >= 0
    assert not (np.diff(known.astype(int)) > 0).any(), "what only the end fixes lies at the end"
    assert (np.diff(block.decided[known]) >= 0).all()
    assert (block.decided[known] >= block.ends[known]).all() and (block.decided[known] <= n).all()
    assert (block.anchor_bytes <= block.ends).all() and (np.diff(block.anchor_bytes) >= 0).all()
    assert (block.anchor_tokens <= np.arange(1, len(block) + 1)).all()
    token_ends = np.concatenate([[0], block.ends])
    gaps = block.anchor_bytes - token_ends[block.anchor_tokens]
    assert (gaps == 0).all() or tokenizer.kind == "json", "only what drops white space has a piece without tokens"
    assert (gaps >= 0).all()


@pytest.mark.parametrize("text", SOME, ids=range(len(SOME)))
def test_resuming_at_any_token_from_its_anchor(tokenizer: Tokenizer, text: str) -> None:
    data = text.encode()
    whole = joined(tokenizer.stream([data]))
    for i in range(0, len(whole), max(1, len(whole) // 40)):
        byte, token = int(whole.anchor_bytes[i]), int(whole.anchor_tokens[i])
        again = joined(tokenizer.stream([data[byte:]], byte=byte, token=token))
        assert same(again, whole[token:])


def continued(data: bytes, cut_at: int, rng: random.Random) -> bytes:
    """`data` to `cut_at`, then something else: valid UTF-8 even where the cut is inside a character."""
    end = cut_at
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    rest = data[cut_at:end]
    if rest:  # another last byte makes another character with the same beginning
        rest = rest[:-1] + bytes([rest[-1] ^ 1])
    return data[:cut_at] + rest + "".join(rng.choices(HARD, k=rng.randrange(12))).encode()


@pytest.mark.parametrize("text", SOME, ids=range(len(SOME)))
def test_decided_decides(tokenizer: Tokenizer, text: str) -> None:
    rng = random.Random(7)
    data = text.encode()
    whole = joined(tokenizer.stream([data]))
    decided = np.flatnonzero(whole.decided >= 0)
    for i in rng.sample(decided.tolist(), min(40, len(decided))):
        other = continued(data, int(whole.decided[i]), rng)
        assert same(joined(tokenizer.stream([other]))[: i + 1], whole[: i + 1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", EXACT + PIECEWISE)
def test_decided_and_anchors_of_any_text(
    kind: str, tokenizer_of: Callable[[str], Tokenizer], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rwkv_stream.text.tokenizer, "PIECE_BYTES", 32)
        tokenizer = tokenizer_of(kind)
        text = (data.draw(hard_text) + TRAINING).encode()
        whole = joined(tokenizer.stream([text]))
        i = data.draw(st.integers(0, len(whole) - 1))
        byte, token = int(whole.anchor_bytes[i]), int(whole.anchor_tokens[i])
        assert same(joined(tokenizer.stream([text[byte:]], byte=byte, token=token)), whole[token:])
        if whole.decided[i] >= 0:
            other = continued(text, int(whole.decided[i]), random.Random(data.draw(st.integers(0, 99))))
            assert same(joined(tokenizer.stream([other]))[: i + 1], whole[: i + 1])


def test_the_end_of_the_text_fixes_what_lies_within_the_look_ahead(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    text = b"word " * 60
    for kind in ("world", "bpe"):
        block = joined(tokenizer_of(kind).stream([text]))
        starts = np.concatenate([[0], block.ends[:-1]]) if kind == "world" else block.anchor_bytes
        beyond = starts + 128 > len(text)
        assert beyond.any() and not beyond.all()
        assert (block.decided == np.where(beyond, -1, starts + 128)).all()
    block = joined(tokenizer_of("bytes").stream([text]))
    assert (block.decided == block.ends).all()


@pytest.mark.parametrize("kind", [*EXACT, "neox"])
@settings(max_examples=100, deadline=None)
@given(text=hard_text | st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_decoding_gives_the_text_back(kind: str, tokenizer_of: Callable[[str], Tokenizer], text: str) -> None:
    tokenizer = tokenizer_of(kind)
    expected = unicodedata.normalize("NFC", text) if kind == "neox" else text
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).decode() == expected
    decoder = TextDecoder(tokenizer)
    assert "".join([decoder.feed(i) for i in ids]) + decoder.flush() == expected


@pytest.mark.parametrize("kind", EXACT)
def test_spans_are_the_bytes_of_the_tokens(kind: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of(kind)
    data = "".join(HARD).encode()
    block = joined(tokenizer.stream([data]))
    starts = [0, *block.ends.tolist()]
    for i, token in enumerate(block.ids.tolist()):
        assert tokenizer.decode([token]) == data[starts[i] : starts[i + 1]]


def paused(tokenizer: Tokenizer, data: bytes, places: list[int]) -> tuple[list[TokenBlock], list[tuple[int, int]]]:
    """The blocks of a text with pauses at these bytes; of each pause the bytes that had come, the tokens given."""
    blocks: list[TokenBlock] = []
    given: list[tuple[int, int]] = []
    seen = 0

    def pieces() -> Iterator[bytes]:
        nonlocal seen
        for a, b in itertools.pairwise([0, *places, len(data)]):
            seen = b
            yield from (piece for piece in (data[a:b], b"") if piece or b in places)

    for block in tokenizer.stream(pieces(), pauses=True):
        blocks.append(block)
        if not len(block):
            given.append((seen, sum(map(len, blocks))))
    return blocks, given


def test_a_pause_gives_what_is_fixed_and_changes_nothing(tokenizer: Tokenizer) -> None:
    data = "".join(HARD).encode() * 3
    whole = joined(tokenizer.stream([data]))
    rng = random.Random(5)
    for _ in range(5):
        places = sorted({rng.randrange(1, len(data)) for _ in range(6)})
        blocks, given = paused(tokenizer, data, places)
        assert same(joined(blocks), whole)
        assert [at for at, _ in given] == places
        if tokenizer.kind in ("world", "bytes"):
            assert all(n == np.sum((whole.decided >= 0) & (whole.decided <= at)) for at, n in given)


def test_nothing_gives_nothing(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.stream([])) == []
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == b""


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"lone surrogate '.udc80' at character 2"):
        tokenizer.encode("ab\udc80")


def test_ids_that_stand_for_no_text_give_none(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    assert world().decode([0, 65535, 34, -1, 10**6]) == b"!"
    assert raw_bytes().decode([33, 256]) == b"!"
    for kind, end in (("bpe", "<|end|>"), ("neox", "<|endoftext|>")):
        tokenizer = tokenizer_of(kind)
        (end_id,) = tokenizer.end_tokens
        assert end_id == tokenizer.start_token == 0
        assert tokenizer.decode([end_id, *tokenizer.encode(end), tokenizer.vocab_size]) == end.encode()


def test_start_and_end_tokens(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    assert (world().start_token, world().end_tokens) == (0, (0,))
    for kind in ("bytes", "json"):
        assert (tokenizer_of(kind).start_token, tokenizer_of(kind).end_tokens) == (None, ())


@pytest.mark.parametrize("kind", EXACT + PIECEWISE)
@pytest.mark.parametrize("line", [b"the keepers, ", b"x", "漢".encode(), b" "], ids=["words", "x", "kanji", "spaces"])
def test_memory_is_bounded_on_one_line(kind: str, line: bytes, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of(kind)
    piece = line * (30_000 // len(line))
    is_long = kind in ("world", "bytes") and line == b"the keepers, "
    n_pieces, limit = (70, 1_000_000) if is_long else (6, 16_000_000)  # 2.1 MB, which do not fit; else 180 kB
    tokenizer.encode("warm up")
    n_tokens = n_bytes = most = 0
    tracemalloc.start()
    for block in tokenizer.stream(piece for _ in range(n_pieces)):
        n_tokens += len(block)
        n_bytes = int(block.ends[-1])
        most = max(most, len(block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == n_pieces * len(piece) or (kind, line) == ("json", b" "), "which drops white space"
    assert most <= 65_536
    assert peak < limit


# ---- World ----


def vocabulary() -> dict[bytes, int]:
    path = resources.files("pyrwkv_tokenizer") / "rwkv_vocab_v20230424.txt"
    found = {}
    for line in path.read_bytes().decode().replace("\r\n", "\n").split("\n")[:-1]:
        token_id, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        value = ast.literal_eval(literal)
        value = value.encode() if isinstance(value, str) else value
        assert len(value) == int(length)
        found[value] = int(token_id)
    return found


VOCABULARY = functools.cache(vocabulary)


def greedy(data: bytes) -> list[int]:
    """The definition: the longest token that the rest begins with."""
    ids, at = [], 0
    while at < len(data):
        length = next(n for n in range(min(128, len(data) - at), 0, -1) if data[at : at + n] in VOCABULARY())
        ids.append(VOCABULARY()[data[at : at + length]])
        at += length
    return ids


@settings(max_examples=200, deadline=None)
@given(text=hard_text | st.text() | st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"])))
def test_world_is_the_greedy_longest_match(text: str) -> None:
    assert world().encode(text) == greedy(text.encode())


def test_world_on_each_of_its_tokens() -> None:
    texts = [token for token in VOCABULARY() if token.decode(errors="ignore").encode() == token]
    assert len(VOCABULARY()) - len(texts) == 486
    data = b"".join(texts)
    part = data[:200_000].decode(errors="ignore")
    assert world().encode(part) == greedy(part.encode())
    ids = world().encode(data.decode())
    assert world().decode(ids) == data


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("User: hi\n\nAssistant:", "24281 59 4571 261 5585 41693 59"),
        ("<think", "61 35762"),
        ("Hello, world! 你好，世界。🙂\n", "33155 45 40213 34 33 10464 11685 19137 10267 14610 10080 3319 2417 11"),
        ("\n", "11"),
        ("\n\n", "261"),
        ("\r\n\r\n", "19244"),
        ("\n\n\n", "3328"),
        ("\x00", "1"),
    ],
)
def test_world_vectors(text: str, ids: str) -> None:
    assert world().encode(text) == [int(i) for i in ids.split()]


def test_world_ids() -> None:
    assert world().id == "world:e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
    assert world().vocab_size == 65_536
    assert world() is world()
    assert all(world().decode([byte + 1]) == bytes([byte]) for byte in range(256))
    apart = world().encode("The word is extra") + world().encode("ordinary")
    assert world().encode("The word is extraordinary") != apart


def test_world_streams_half_characters() -> None:
    ids = [*world().encode("漢"), 228 + 1, 189 + 1, 160 + 1]
    decoder = TextDecoder(world())
    assert [decoder.feed(i) for i in ids] == ["漢", "", "", "你"]


# ---- our own BPE ----


def test_own_is_what_the_library_gives_for_the_whole_text(tmp_path: Path) -> None:
    path = own_definition(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(path))
    for text in SOME:
        text = text.replace("<|end|>", "<|fin|>")
        assert from_file(path).encode(text) == library.encode(text).ids


@settings(max_examples=200, deadline=None)
@given(text=hard_text | st.text())
def test_pre_tokens_of_the_own_pattern_are_short_tile_the_text_and_do_not_look_back(text: str) -> None:
    split = pre_tokenizers.Split(Regex(OWN_PATTERN), "isolated")
    spans = [span for _, span in split.pre_tokenize_str(text)]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert not spans or spans[-1][1] == len(text)
    assert all(end - start <= 25 for start, end in spans)
    if spans:
        start = spans[len(spans) // 2][0]
        rest = [(a + start, b + start) for _, (a, b) in split.pre_tokenize_str(text[start:])]
        assert rest == spans[len(spans) // 2 :]


def test_the_end_token_in_a_text_is_plain_text(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    for kind, literal in (("bpe", "<|end|>"), ("neox", "<|endoftext|>")):
        tokenizer = tokenizer_of(kind)
        ids = tokenizer.encode(f"the {literal}sea{literal}")
        assert 0 not in ids
        assert tokenizer.decode(ids) == f"the {literal}sea{literal}".encode()


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    definition = json.loads(path.read_text())
    change(definition)
    other = path.with_name(f"{path.stem}-edited.json")
    other.write_text(json.dumps(definition, indent=1))
    return other


def test_own_id_follows_the_definition_not_the_spelling(tmp_path: Path) -> None:
    path = own_definition(tmp_path)
    own = from_file(path)
    assert own.kind == "bpe" and own.id.startswith("bpe:") and len(own.id) == 4 + 64

    def merges_as_strings(definition: dict[str, Any]) -> None:
        definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
        definition["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
        definition["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}
        definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    again = from_file(edited(path, merges_as_strings))
    assert again.id == own.id
    assert again.encode(TRAINING) == own.encode(TRAINING)
    assert len(own.encode(TRAINING)) > 4

    def one_merge_less(definition: dict[str, Any]) -> None:
        definition["model"]["merges"].pop()

    assert from_file(edited(path, one_merge_less)).id != own.id


def test_another_pattern_or_normalizer_is_not_our_own(tmp_path: Path) -> None:
    assert from_file(own_definition(tmp_path, pattern=OWN_PATTERN.replace("24", "25"))).kind == "json"
    path = own_definition(tmp_path)
    assert from_file(edited(path, lambda d: d.update(normalizer={"type": "NFC"}))).kind == "json"
    assert from_file(edited(path, lambda d: d["added_tokens"][0].update(special=False))).kind == "json"
    assert from_file(edited(path, lambda d: d["pre_tokenizer"]["pretokenizers"].reverse())).kind == "json"
    no_decoder = from_file(edited(path, lambda d: d.update(decoder=None)))
    assert no_decoder.kind == "json"


# ---- 20B_tokenizer.json, by one that is made like it ----


def test_runs_of_spaces_are_tokens(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("neox")
    first = tokenizer.vocab_size - 23
    assert [tokenizer.encode(" " * n) for n in range(24, 1, -1)] == [[first + i] for i in range(23)]
    assert tokenizer.encode("a" + " " * 30)[1:] == [first, first + 18], "24 and 6"
    assert tokenizer.decode([first]) == b" " * 24


def test_nfc_loses_bytes(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("neox")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "caf\u00e9".encode()


def test_a_token_has_the_space_before_its_word(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("neox")
    data = b"the keeper lit  the lamp,\n\n and   the sea"
    block = joined(tokenizer.stream([data]))
    spans = [data[a:b] for a, b in itertools.pairwise([0, *block.ends.tolist()])]
    assert spans == [tokenizer.decode([i]) for i in block.ids.tolist()]


def test_a_blank_line_at_the_end_of_a_prompt_is_two_tokens(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("neox")
    (newline,) = tokenizer.encode("\n")
    *paragraph, blank_line = tokenizer.encode("The end.\n\n")
    assert tokenizer.decode([blank_line]) == b"\n\n"
    assert tokenizer.encode_prompt("The end.\n\n") == [*paragraph, newline, newline]
    assert tokenizer.encode_prompt("The end.\n\nNot") == tokenizer.encode("The end.\n\nNot")
    assert tokenizer.encode("The end.\n\nNot")[: len(paragraph) + 2] == [*paragraph, newline, newline]
    assert tokenizer.encode_prompt("") == []


@pytest.mark.parametrize("kind", [*EXACT, "json"])
def test_the_end_of_a_prompt_is_as_in_a_text(kind: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    text = "the sea.\n\n"
    assert tokenizer_of(kind).encode_prompt(text) == tokenizer_of(kind).encode(text)


# ---- any tokenizer.json ----


def pieces_by_hand(data: bytes, limit: int) -> list[bytes]:
    """The rule: the last edge from white space to a word within `limit` bytes, else `limit` on a character edge."""
    pieces = []
    while len(data) >= limit:
        window = data[:limit].decode(errors="ignore")
        edges = [i for i in range(1, len(window)) if window[i - 1].isspace() and not window[i].isspace()]
        piece = (window[: edges[-1]] if edges else window).encode()
        pieces.append(piece)
        data = data[len(piece) :]
    return [*pieces, data] if data else pieces


@pytest.mark.parametrize("kind", PIECEWISE)
@settings(max_examples=60, deadline=None)
@given(text=hard_text, limit=st.sampled_from([4, 16, 50, 200]))
def test_tokens_of_a_document_are_those_of_its_pieces(
    kind: str, tokenizer_of: Callable[[str], Tokenizer], text: str, limit: int
) -> None:
    tokenizer = tokenizer_of(kind)
    pieces = pieces_by_hand(text.encode(), limit)
    one_by_one = [tokenizer.encode(piece.decode()) for piece in pieces]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rwkv_stream.text.tokenizer, "PIECE_BYTES", limit)
        block = joined(tokenizer.stream([text.encode()]))
    assert block.ids.tolist() == list(itertools.chain(*one_by_one))
    starts = np.cumsum([0, *map(len, pieces)])
    n_tokens = np.cumsum([0, *map(len, one_by_one)])
    at = np.repeat(np.arange(len(pieces)), [len(ids) for ids in one_by_one])
    assert (block.anchor_bytes == starts[at]).all() and (block.anchor_tokens == n_tokens[at]).all()
    decided = starts[at] + limit
    assert (block.decided == np.where(decided > len(text.encode()), -1, decided)).all()


def test_pieces_are_64_kib(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    data = b"the sea  " * 20_000
    block = joined(tokenizer_of("neox").stream([data]))
    first, second, _ = map(len, pieces_by_hand(data, 65_536))
    assert 65_520 < first < 65_536
    assert set(block.anchor_bytes.tolist()) == {0, first, first + second}
    assert set(block.decided.tolist()) == {65_536, first + 65_536, -1}


def test_spans_of_a_normalising_tokenizer(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("neox")
    text = "cafe\u0301 x 漢 \u1100\u1161!"
    data = text.encode()
    block = joined(tokenizer.stream([data]))
    starts = [0, *block.ends.tolist()]
    spans = [data[a:b].decode() for a, b in itertools.pairwise(starts)]
    assert "".join(spans) == text
    assert "e\u0301" in [span[-2:] for span in spans], "a letter and its accent are one character after NFC"
    assert "\u1100\u1161" in spans


def test_spans_where_white_space_is_dropped(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("json")
    text = b"  the  keepers\n. calm \n"
    block = joined(tokenizer.stream([text]))
    assert block.ids.tolist() == [1, 3, 4, 5, 6, 7]
    starts = [0, *block.ends.tolist()]
    spans = [text[a:b] for a, b in itertools.pairwise(starts)]
    assert spans == [b"  the  ", b"keep", b"er", b"s\n", b". ", b"calm \n"]


def test_a_decoder_that_looks_at_neighbours(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("json")
    ids = tokenizer.encode("the keepers. calm sea")
    expected = tokenizer.decode(ids).decode()
    assert expected == "the keepers. calm sea"
    decoder = TextDecoder(tokenizer)
    told = [decoder.feed([i]) for i in ids]
    assert "".join(told) + decoder.flush() == expected
    assert told[:3] == ["the", " keep", "er"]
    replacement = tokenizer.encode("\ufffd")
    assert decoder.feed(replacement) == ""
    assert decoder.feed(ids[:1]) + decoder.flush() == "\ufffd the"
    assert decoder.feed(replacement) + decoder.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file, found: No such file"),
        (b"{", "expected a tokenizer.json"),
        (b"\xff\xfe", "expected a tokenizer.json"),
        (b"[]", "expected a tokenizer.json"),
        (b"{}", "expected a tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "expected a tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        from_file(path)
    assert str(path) in str(caught.value)


def test_tokenizers_that_cannot_be_relied_on(tmp_path: Path) -> None:
    path = own_definition(tmp_path)
    with pytest.raises(TokenizerError, match="random tokens"):
        from_file(edited(path, lambda d: d["model"].update(dropout=0.5)))

    def without_a_byte(definition: dict[str, Any]) -> None:
        del definition["model"]["vocab"]["\u0100"]

    with pytest.raises(TokenizerError, match="each of the 256 bytes, found 1 missing"):
        from_file(edited(path, without_a_byte))


# ---- the tokenizer of a model ----


def named_kind(folder: Path, vocab_size: int, given: str | None = None, **metadata: object) -> str:
    return find(given, folder / "model.pth", vocab_size, metadata).kind


def hugging_face(folder: Path, tokenizer_class: str) -> None:
    """A folder whose own code would do the tokenizing, were it run."""
    config = {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": [f"code.{tokenizer_class}", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code beside a model was run')\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<|rwkv_tokenizer_end_of_text|>": 0, "\n\n": 65530}))


def literals() -> list[str]:
    """As a GGUF has the World vocabulary."""
    words = sorted(VOCABULARY(), key=VOCABULARY().__getitem__)
    return ["<s>", *(repr(word)[2:-1] for word in words), *(f"[PAD{i}]" for i in range(65_530, 65_536))]


def test_what_is_given_goes_before_what_is_found(tmp_path: Path) -> None:
    own_definition(tmp_path)
    given = str(neox_definition(tmp_path))
    assert named_kind(tmp_path, 400) == "bpe"
    assert named_kind(tmp_path, 400, given) == "neox"
    assert named_kind(tmp_path, 400, "bytes") == "bytes"
    assert named_kind(tmp_path, 65_536, "world") == "world"


def test_a_tokenizer_lies_in_a_folder_or_beside_a_file(tmp_path: Path) -> None:
    own_definition(tmp_path)
    size = find(None, tmp_path, 400, {}).vocab_size
    assert find(None, tmp_path / "any.gguf", size, {}).kind == "bpe"
    message = rf"at most {size - 1} tokens, found {size} in '{tmp_path}/tokenizer\.json'; pass --tokenizer"
    with pytest.raises(TokenizerError, match=message):
        find(None, tmp_path / "any.gguf", size - 1, {})


@pytest.mark.parametrize(("vocab_size", "kind"), [(65_536, "world"), (256, "bytes")])
def test_a_tokenizer_is_known_by_the_size(tmp_path: Path, vocab_size: int, kind: str) -> None:
    assert named_kind(tmp_path, vocab_size) == kind


def test_an_unknown_size(tmp_path: Path) -> None:
    message = (
        rf"vocabulary of 777, found none in or beside it; put its tokenizer\.json into '{tmp_path}', or.*--tokenizer"
    )
    with pytest.raises(TokenizerError, match=message):
        named_kind(tmp_path, 777)


@pytest.mark.parametrize("vocab_size", [50_254, 50_277, 50_304])
def test_pile_models_say_which_file_to_get(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(TokenizerError, match=rf"get 20B_tokenizer\.json \(from .*\) and put it into '{tmp_path}'"):
        named_kind(tmp_path, vocab_size)
    neox_definition(tmp_path, "20B_tokenizer.json")
    assert named_kind(tmp_path, vocab_size) == "neox"


def test_files_for_other_models_of_the_folder_do_not_count(tmp_path: Path) -> None:
    neox_definition(tmp_path, "20B_tokenizer.json")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    assert named_kind(tmp_path, 50_277) == "neox"
    assert named_kind(tmp_path, 256) == "bytes"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_world_vocabulary_is_compared(tmp_path: Path, end: bytes) -> None:
    shipped = (resources.files("pyrwkv_tokenizer") / "rwkv_vocab_v20230424.txt").read_bytes()
    lines = shipped.replace(b"\r\n", b"\n").split(b"\n")[:-1]
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_bytes(b"".join(line + end for line in lines))
    assert named_kind(tmp_path, 65_536) == named_kind(tmp_path, 65_536, str(path)) == "world"
    lines[30_000] = lines[30_001]
    path.write_bytes(b"".join(line + end for line in lines))
    with pytest.raises(TokenizerError, match=rf"'{path}': expected the World vocabulary, found 65529 lines of another"):
        named_kind(tmp_path, 65_536)
    assert named_kind(tmp_path, 65_536, "world") == "world"


@pytest.mark.parametrize("name", ["RWKVWorldTokenizer", "Rwkv5Tokenizer", "Rwkv6Tokenizer", "RwkvTokenizer"])
def test_a_hugging_face_world_folder_runs_no_code(tmp_path: Path, name: str) -> None:
    hugging_face(tmp_path, name)
    tokenizer = find(None, tmp_path, 65_536, {"vocab_size": 65_536})
    assert tokenizer is world()
    assert tokenizer.encode("\n\n") == [261], "and not the row 65530 that the folder adds, which was never trained"


def test_the_vocabulary_of_a_hugging_face_world_folder(tmp_path: Path) -> None:
    hugging_face(tmp_path, "Rwkv6Tokenizer")
    words = sorted(VOCABULARY(), key=VOCABULARY().__getitem__)
    lines = ["b'<s>'", *map(repr, words)]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    assert find(None, tmp_path, 65_536, {}) is world()
    (tmp_path / "vocab.txt").write_text("\n".join([*lines[:300], "b'other'", *lines[301:]]) + "\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt': expected the World vocabulary, found 'other' as token 300"):
        find(None, tmp_path, 65_536, {})


@pytest.mark.parametrize("vocab_size", [65_536, 256])
def test_another_class_of_tokenizer_is_not_guessed(tmp_path: Path, vocab_size: int) -> None:
    hugging_face(tmp_path, "LlamaTokenizer")
    with pytest.raises(TokenizerError, match=r"found 'LlamaTokenizer' in its 'tokenizer_config\.json', and code"):
        find(None, tmp_path, vocab_size, {})
    own_definition(tmp_path)
    assert find(None, tmp_path, 65_536, {}).kind == "bpe"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_tokenizer_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json': expected a JSON object"):
        find(None, tmp_path, 65_536, {})


def gguf(tokens: object) -> dict[str, object]:
    """Metadata as of a converted World model; its end of turn is that of chats, a blank line."""
    return {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eot_token_id": 261}


def test_the_world_vocabulary_in_a_gguf(tmp_path: Path) -> None:
    own_definition(tmp_path)
    tokenizer = find(None, tmp_path / "model.gguf", 65_536, gguf(literals()))
    assert tokenizer is world(), "what is inside goes before what is beside"
    assert tokenizer.end_tokens == (0,)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (lambda world: [*world[:500], r"\xff\xfe", *world[501:]], r"'\xff\xfe' as token 500"),
        (lambda world: [*world[:65_530], "<think>", *world[65_531:]], "'<think>' as token 65530"),
        (lambda world: [*world[:300], "[PAD300]", *world[300:-1]], "'[PAD300]' as token 300"),
        (lambda world: world[:700], "the first 699 tokens of it only"),
        (lambda world: [], "the first 0 tokens of it only"),
        (lambda world: 65_536, "the first 0 tokens of it only"),
        (lambda world: list(range(65_536)), "'1' as token 1"),
    ],
    ids=["another word", "one more", "moved", "fewer", "none", "a number", "numbers"],
)
def test_another_vocabulary_in_a_gguf(tmp_path: Path, tokens: Callable[[list[str]], object], found: str) -> None:
    message = re.escape(f"model.gguf': expected the World vocabulary, found {found}; ")
    with pytest.raises(TokenizerError, match=message + ".*--tokenizer"):
        find(None, tmp_path / "model.gguf", 65_536, gguf(tokens(literals())))


@pytest.mark.parametrize("vocab_size", [65_536, 256, 50_304])
def test_a_bpe_in_a_gguf_is_not_guessed(tmp_path: Path, vocab_size: int) -> None:
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(TokenizerError, match=r"found one of kind 'gpt2' inside, .*normali.*; .*json"):
        find(None, tmp_path / "model.gguf", vocab_size, metadata)
    neox_definition(tmp_path, "tokenizer.json")
    if vocab_size != 256:
        assert find(None, tmp_path / "model.gguf", vocab_size, metadata).kind == "neox"


@pytest.mark.parametrize("metadata", [{}, {"tokenizer.ggml.model": "no_vocab"}])
def test_a_gguf_without_vocabulary(tmp_path: Path, metadata: dict[str, object]) -> None:
    assert named_kind(tmp_path, 256, **metadata) == "bytes"


# ---- generated text ----


def test_text_decoder_waits_for_whole_characters(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    data = "né漢🙂!".encode()
    decoder = TextDecoder(raw_bytes())
    told = [decoder.feed(byte) for byte in data]
    assert told == ["n", "", "é", "", "", "漢", "", "", "", "🙂", "!"]
    assert decoder.flush() == ""
    assert decoder.feed(list("é".encode()[:1])) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(list(b"ok")) == "ok", "after a flush it is as new"
    assert decoder.feed([0xE4, 0xB8, 0x41]) == "\ufffdA", "half a character that nothing completes"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=40), places=st.lists(st.integers(0, 40), max_size=6))
def test_text_decoder_gives_the_same_for_every_cut(data: bytes, places: list[int]) -> None:
    decoder = TextDecoder(raw_bytes())
    told = [decoder.feed(list(piece)) for piece in cut(data, places)]
    for piece in told:
        piece.encode()
    assert "".join(told) + decoder.flush() == data.decode("utf-8", "replace")


def test_a_real_book() -> None:
    path = INPUTS / "alice.txt"
    if not path.exists():
        pytest.skip(f"no '{path}'")
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    whole = joined(world().stream([data]))
    assert world().decode(whole.ids.tolist()) == data
    assert whole.ids.tolist() == greedy(data)
    rng = random.Random(1)
    pieces = cut(data, [rng.randrange(len(data)) for _ in range(300)])
    assert same(joined(world().stream(pieces)), whole)
