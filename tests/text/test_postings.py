"""Postings: what they hold, that nothing depends on how the text arrives, and that damage is told."""

from __future__ import annotations

import tracemalloc
import zlib
from itertools import pairwise

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_stream.text import postings as postings_module
from rwkv_stream.text.postings import KNOWN_AFTER, Indexer, Postings

TEXT = "It rained.\r\n\r\nThe rains — in Spain — stayed!  Rain, rain, RAIN. * * *\n\nÉté: 1,500 people's houses.\n"


def index(
    text: str, *, language: str | None = "en", piece: int = 1 << 30, cuts: tuple[int, ...] = ()
) -> list[Postings]:
    """The postings of a text that arrives in pieces of so many characters, cut after so many and at the end."""
    indexer, made = Indexer(language=language), []
    for first, end in pairwise((0, *cuts, len(text))):
        for at in range(first, end, piece):
            indexer.push(text[at : min(end, at + piece)].encode())
        made.append(indexer.cut(final=end == len(text) and len(made) == len(cuts)))
    assert indexer.decided == len(text.encode())
    return made


def told(postings: Postings) -> tuple[object, ...]:
    """All that postings hold."""
    return (postings.language, *(np.asarray(value).tolist() for value in list(vars(postings).values())[1:]))


def sentences_with(postings: Postings, text: str, term: str) -> dict[str, int]:
    data = text.encode()
    spans = [data[start:end].decode() for start, end in zip(postings.starts, postings.ends, strict=True)]
    found, counts = postings.hits(term)
    assert postings.count(term) == len(found)
    return {spans[i]: int(n) for i, n in zip(found, counts, strict=True)}


def test_hits_are_sentences_by_their_stems() -> None:
    (made,) = index(TEXT)
    assert sentences_with(made, TEXT, "rain") == {
        "It rained.": 1,
        "The rains — in Spain — stayed!": 1,
        "Rain, rain, RAIN.": 3,
    }
    assert sentences_with(made, TEXT, "1500") == {"Été: 1,500 people's houses.": 1}
    assert sentences_with(made, TEXT, "été") == {"Été: 1,500 people's houses.": 1}
    assert made.lengths.tolist() == [2, 5, 3, 0, 5]
    assert (
        sentences_with(made, TEXT, "sun") == sentences_with(made, TEXT, "rai") == sentences_with(made, TEXT, "") == {}
    )


def test_counts_stop_at_255_and_many_sentences_need_wide_steps() -> None:
    text = "No. " * 300 + "\n\n" + "yes " * 300 + "\n\n" + "So it is.\n\n" * 70_000 + "No."
    (made,) = index(text)
    assert made.hits("yes")[1].tolist() == [255]
    assert made.hits("no")[0].tolist() == [*range(300), 70_301]
    assert told(Postings.from_bytes(made.to_bytes())) == told(made)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_depends_on_how_the_text_arrives(data: st.DataObject) -> None:
    sentence = st.sampled_from(
        ["It rained. ", "猫がいた。", "Dr. Who?!\n", "\n \n", "Ça va… ", "x" * 20_000, " \t", "A. B"]
    )
    text = "".join(data.draw(st.lists(sentence, max_size=30)))
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3))))
    language = data.draw(st.sampled_from([None, "en", "ja"]))
    whole = index(text, language=language, cuts=cuts)
    assert [told(z) for z in index(text, language=language, cuts=cuts, piece=data.draw(st.integers(1, 99)))] == [
        told(z) for z in whole
    ]
    for made in whole:
        assert told(Postings.from_bytes(made.to_bytes())) == told(made)
    (uncut,) = index(text, language=language)
    assert np.concatenate([z.starts for z in whole]).tolist() == uncut.starts.tolist()
    assert np.concatenate([z.lengths for z in whole]).tolist() == uncut.lengths.tolist()


def test_a_text_goes_on_from_any_cut() -> None:
    text = ("It rained. Dr. Who stayed\nat home, i.e. here!\n\n" * 30 + "z" * 20_000 + "\n\n\n Été. ") * 2
    (whole,) = index(text, language=None)
    for cut in range(0, len(text), 1999):
        indexer = Indexer()
        indexer.push(text[:cut].encode())
        before = indexer.cut()
        after = Indexer(byte=indexer.decided, language=indexer.language)
        after.push(text.encode()[indexer.decided :])
        ended = after.cut(final=True)
        assert (before.language == "") == (len(text[:cut]) < KNOWN_AFTER), "only so much text tells a language"
        assert ended.language == "en"
        for name in ("starts", "ends", "lengths"):
            joined = np.concatenate([getattr(before, name), getattr(ended, name)])
            assert joined.tolist() == getattr(whole, name).tolist(), cut
        hits = np.concatenate([before.hits("rain")[0], ended.hits("rain")[0] + len(before)])
        assert hits.tolist() == whole.hits("rain")[0].tolist()


def test_an_empty_text_has_no_sentences() -> None:
    for text in ("", " \n\n\t"):
        (made,) = index(text, language=None)
        assert len(made) == 0
        assert len(made.hits("a")[0]) == 0
        assert told(Postings.from_bytes(made.to_bytes())) == told(made)


def test_damage_is_told() -> None:
    (made,) = index(TEXT * 20)
    good = zstandard.ZstdDecompressor().decompress(made.to_bytes())
    pack = zstandard.ZstdCompressor().compress
    for cut in range(0, len(good), 7):
        with pytest.raises(ValueError, match="postings"):
            Postings.from_bytes(pack(good[:cut]))
    for bad in (b"", b"no frame", made.to_bytes()[:-9], zlib.compress(good), pack(good + b"!")):
        with pytest.raises(ValueError, match="postings"):
            Postings.from_bytes(bad)
    refused = 0
    for at in range(8, len(good)):  # the first eight bytes are the place in the document
        changed = bytearray(good)
        changed[at] ^= 0x80
        try:
            read = Postings.from_bytes(pack(bytes(changed)))
        except ValueError:
            refused += 1
            continue
        for term in ("rain", "peopl"):
            hits, _ = read.hits(term)
            assert len(hits) == 0 or 0 <= hits.min() <= hits.max() < len(read)
    assert refused > postings_module._HEAD.size - 8


def test_sizes_are_checked_before_memory_is_taken() -> None:
    huge = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 29))
    (made,) = index(TEXT)
    head = bytearray(zstandard.ZstdDecompressor().decompress(made.to_bytes()))
    head[8:12] = b"\xff\xff\xff\xff"  # sentences
    tracemalloc.start()
    for bad in (huge, zstandard.ZstdCompressor().compress(bytes(head))):
        with pytest.raises(ValueError, match="postings"):
            Postings.from_bytes(bad)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_postings_of_other_stems_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = index(TEXT)
    data = made.to_bytes()
    monkeypatch.setattr(postings_module.terms, "version", lambda: "0 0")
    with pytest.raises(ValueError, match="of version"):
        Postings.from_bytes(data)


def test_memory_does_not_grow_and_postings_are_small() -> None:
    words = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("r", "st", "nd")]
    drawn = np.random.default_rng(0).choice(words, (6000, 12))
    piece = "".join(" ".join(row) + ". " for row in drawn).encode()

    def peak(pieces: int) -> int:
        indexer = Indexer(language="en")
        tracemalloc.start()
        for _ in range(pieces):
            indexer.push(piece)
            indexer.cut()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(4) < 1.1 * peak(2)
    (made,) = index(piece.decode())
    assert len(made.to_bytes()) < len(piece) / 2  # of random words; of a novel a sixth
