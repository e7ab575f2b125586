"""Units: which tokens make a sentence, a chunk and a document, against rules written plainly here."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PROSE, save_own_tokenizer

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.text.sentences import Splitter
from rwkv_stream.text.tokenizer import Tokenizer, from_file, raw_bytes, world
from rwkv_stream.text.units import SENTENCE_TOKENS, Failure, Piece, Unit, read

MIXED = (
    "He said: “No.” She laughed!  Then\n it rained.\n\n  吾輩は猫である。\u3000名前はまだ無い。\n\n"
    "(One.) Two... 3.5 is a number.\t\tÄpfel! 😀😀 The end\n\n"
)


@dataclass
class Text:
    """A document that arrives in pieces."""

    name: str
    pieces: Iterable[bytes]

    def text(self) -> contextlib.AbstractContextManager[Iterable[bytes]]:
        return contextlib.nullcontext(self.pieces)


@pytest.fixture(scope="module", params=["bytes", "bpe", "world", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param in ("bytes", "world"):
        return {"bytes": raw_bytes, "world": world}[request.param]()
    path = save_own_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    if request.param == "json":  # of the generic kind, where tokens that end within a character are empty
        path.write_text(path.read_text().replace("{1,16}", "{1,15}"))
    found = from_file(path)
    assert found.kind == request.param
    return found


def whole(pieces: Iterable[Piece | Failure]) -> tuple[list[int], list[Unit]]:
    """The tokens of one document and its units, checked against what pieces promise."""
    ids: list[int] = []
    units: list[Unit] = []
    for piece in pieces:
        assert isinstance(piece, Piece)
        assert piece.token_start == len(ids)
        assert piece.is_first == (not ids)
        ids += piece.ids.tolist()
        units += piece.units
        assert all(piece.token_start < unit.token_end <= len(ids) for unit in piece.units)
    assert piece.is_last
    assert not piece.open_tokens
    return ids, units


def cut(text: str, tokenizer: Tokenizer, **options: object) -> tuple[list[int], list[Unit]]:
    return whole(read([Text("it", [text.encode()])], tokenizer, **options))


def spans_of_tokens(text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    ends = [int(end) for block in tokenizer.stream([text.encode()]) for end in block.ends]
    return list(zip([0, *ends], ends, strict=False))


def test_a_token_belongs_to_the_sentence_of_its_first_byte_that_is_no_space(tokenizer: Tokenizer) -> None:
    text, data = MIXED * 3, (MIXED * 3).encode()
    ids, units = cut(text, tokenizer, kinds=["sentence"])
    assert ids == tokenizer.encode(text)
    splitter = Splitter()
    sentences = [*splitter.push(data), *splitter.finish()]
    space = {i for i, byte in enumerate(data) if chr(byte).isspace() and byte < 128}
    space |= {at + i for at in range(len(data)) if data[at : at + 3] == "\u3000".encode() for i in range(3)}
    wanted: dict[tuple[int, int], list[int]] = {}
    for token, (start, end) in enumerate(spans_of_tokens(text, tokenizer)):
        home = next((at for at in range(start, end) if at not in space), start)
        for sentence in sentences:
            if sentence[0] <= home < sentence[1]:
                wanted.setdefault(sentence, []).append(token)
    assert [(u.byte_start, u.byte_end) for u in units] == list(wanted)
    assert [list(range(u.token_start, u.token_end)) for u in units] == list(wanted.values())
    assert [u.index for u in units] == list(range(len(units)))
    assert [u.text for u in units] == [data[u.byte_start : u.byte_end].decode() for u in units]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_chunks_and_the_document(tokenizer: Tokenizer, chunk: int) -> None:
    ids, units = cut(MIXED, tokenizer, kinds=["document", "chunk"], chunk=chunk)
    data, spans = MIXED.encode(), spans_of_tokens(MIXED, tokenizer)
    *chunks, document = units
    assert (document.kind, document.text, document.token_end) == ("document", None, len(ids))
    assert (document.byte_start, document.byte_end) == (0, len(data))
    assert [u.token_start for u in chunks] == list(range(0, len(ids), chunk))
    assert [u.token_end for u in chunks] == [min(u.token_start + chunk, len(ids)) for u in chunks]
    for unit in chunks:
        assert (unit.byte_start, unit.byte_end) == (spans[unit.token_start][0], spans[unit.token_end - 1][1])
        assert unit.text == data[unit.byte_start : unit.byte_end].decode("utf-8", "replace")


def test_units_come_in_the_order_of_their_ends() -> None:
    _, units = cut("One two. " * 500, raw_bytes(), kinds=["document", "sentence", "chunk"], chunk=100)
    keys = [(u.token_end, ["sentence", "chunk", "document"].index(u.kind)) for u in units]
    assert keys == sorted(keys)
    assert {u.kind for u in units} == {"document", "sentence", "chunk"}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 3))
def test_the_way_a_text_arrives_makes_no_difference(sizes: list[int], times: int) -> None:
    text = MIXED * times
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size].encode())
        at += size
    options = {"kinds": ["sentence", "chunk", "document"], "chunk": 16}
    assert whole(read([Text("it", pieces)], world(), **options)) == cut(text, world(), **options)


@pytest.mark.parametrize("filler", ["word ", "é", "水", " \t", ", - "])
def test_a_sentence_ends_at_2048_tokens_at_the_latest(filler: str) -> None:
    text = f"Start. A {filler * 5000}end. Next."
    for tokenizer in (raw_bytes(), world()):
        _, units = cut(text, tokenizer, kinds=["sentence"])
        assert (units[0].text, units[-1].text) == ("Start.", "Next.")
        assert all(0 < unit.token_end - unit.token_start <= SENTENCE_TOKENS for unit in units)
        assert max(unit.token_end - unit.token_start for unit in units) > SENTENCE_TOKENS - 8
        texts = [unit.text or "" for unit in units]
        assert "\ufffd" not in "".join(texts)
        assert all(part == part.strip() for part in texts)
        assert "".join("".join(texts).split()) == "".join(text.split())


def test_white_space_between_sentences_belongs_to_none() -> None:
    _, units = cut("One.   \n\n   Two.", raw_bytes(), kinds=["sentence"])
    assert [(u.token_start, u.token_end) for u in units] == [(0, 4), (12, 16)]


def test_a_sentence_without_a_token_of_its_own_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splitter, "_ends", lambda self, start, end: list(range(start + 1, end + 1)))  # each character
    ids, units = cut("the sea", world(), kinds=["sentence"])
    assert len(ids) == 2
    assert [(u.index, u.text, u.token_start) for u in units] == [(0, "t", 0), (1, "s", 1)]


@pytest.mark.parametrize("kind", ["sentence", "chunk", "document"])
def test_isolated_units_are_readings_of_their_own(kind: str) -> None:
    text = PROSE * 40
    ids, together = cut(text, raw_bytes(), kinds=[kind], chunk=1500)
    readings: list[list[int]] = []
    units: list[Unit] = []
    for piece in read([Text("it", [text.encode()])], raw_bytes(), kinds=[kind], chunk=1500, isolated=True):
        assert isinstance(piece, Piece)
        if piece.is_first:
            readings.append([])
        readings[-1] += piece.ids.tolist()
        units += piece.units
    assert units == together
    assert readings == [ids[unit.token_start : unit.token_end] for unit in units]
    assert piece.is_last


def test_documents_that_fail_do_not_stop_the_others() -> None:
    def breaks() -> Iterator[bytes]:
        yield b"It went well. " * 2000
        raise InputError("the file ends too early")

    documents = [Text("empty", []), Text("good", [b"Yes."]), Text("broken", breaks()), Text("last", [b"No."])]
    failed, names = [], []
    for piece in read(documents, raw_bytes(), kinds=["sentence", "document"]):
        if isinstance(piece, Failure):
            failed.append((piece.document, str(piece.error)))
        else:
            names += [(piece.document, unit.kind) for unit in piece.units]
    assert failed == [
        ("empty", "embedding 'empty': expected some text, found none"),
        ("broken", "the file ends too early"),
    ]
    assert [name for name in names if name[0] != "broken"] == [
        ("good", "sentence"),
        ("good", "document"),
        ("last", "sentence"),
        ("last", "document"),
    ]
    assert ("broken", "sentence") in names
    assert ("broken", "document") not in names


def test_places_are_asked_for_in_order_and_belong_to_the_first_byte() -> None:
    class Paged(list[bytes]):
        asked = 0

        def place(self, byte: int) -> dict[str, int]:
            assert byte >= self.asked
            self.asked = byte
            return {"page": byte // 1000}

    pages = Paged([b"A sentence of words. " * 50] * 30)
    _, units = whole(read([Text("it", pages)], raw_bytes(), kinds=["sentence", "chunk", "document"], chunk=333))
    assert len(units) > 1500
    assert all(unit.place == {"page": unit.byte_start // 1000} for unit in units)


def test_texts_may_be_left_out() -> None:
    _, units = whole(read([Text("it", [MIXED.encode()])], raw_bytes(), kinds=["sentence", "chunk"], text=False))
    assert {unit.text for unit in units} == {None}


def test_memory_does_not_grow_with_a_document() -> None:
    def peak(n: int) -> int:
        text = Text("it", (b"No end of it " * 5000 for _ in range(n)))
        tracemalloc.start()
        try:
            for _ in read([text], raw_bytes(), kinds=["sentence", "chunk", "document"]):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(60) < 1.15 * peak(15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, "units of sentence, chunk, document, each once, found ''"),
        ({"kinds": ["line"]}, "found 'line'"),
        ({"kinds": ["chunk", "chunk"]}, "found 'chunk,chunk'"),
        ({"kinds": ["chunk", "document"], "isolated": True}, "expected one kind"),
        ({"chunk": 0}, "expected 1 token or more, found 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read([], raw_bytes(), **options)


def test_ids_are_int64() -> None:
    piece = next(read([Text("it", [b"Yes."])], raw_bytes()))
    assert isinstance(piece, Piece)
    assert piece.ids.dtype == np.int64


def test_files_are_sources(tmp_path: Path) -> None:
    from rwkv_stream.text.readers import document

    (tmp_path / "a.txt").write_text("Yes. No.")
    _, units = whole(read([document(str(tmp_path / "a.txt"))], raw_bytes(), kinds=["sentence"]))
    assert [unit.text for unit in units] == ["Yes.", "No."]
