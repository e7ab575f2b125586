"""Sentences: where they end in four languages, and that nothing depends on how the text arrives."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_stream.text.sentences import WINDOW, Splitter, is_abbreviation

SPLIT: dict[str, tuple[str, list[str]]] = {
    "English": (
        "en",
        [
            "Dr. Smith went to Washington, D.C. on Jan. 5th.",
            "He paid $3.50, i.e. too much, for Fig. 3.",
            '"Is it true?" she asked.',
            "Mr. J. R. R. Tolkien wrote it...",
            "What?!",
            "Really.",
        ],
    ),
    "German": (
        "de",
        [
            "Das ist z. B. gut.",
            "Am 3. Oktober 1990 wurde Deutschland vereint.",
            "Dr. Müller kam um 5 Uhr.",
            "„Wo bist du?“, fragte er.",
        ],
    ),
    "Japanese": ("ja", ["吾輩は猫である。", "名前はまだ無い。", "とんと見当がつかぬ!", "何でも薄暗い所で泣いていた。"]),
    "Chinese": ("zh", ["今天天气很好。", "我们去公园吧!", "然后走了……再见。"]),
}


def split(text: str, *, language: str = "en", piece: int = 1 << 30) -> list[str]:
    """The sentences of a text that arrives in pieces of so many characters."""
    data, splitter = text.encode(), Splitter(language)
    spans = [span for at in range(0, len(text), piece) for span in splitter.push(text[at : at + piece].encode())]
    spans += splitter.finish()
    assert splitter.decided == len(data)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    return [data[start:end].decode() for start, end in spans]


@pytest.mark.parametrize("name", SPLIT)
def test_sentences_of_four_languages(name: str) -> None:
    language, sentences = SPLIT[name]
    assert split(("" if language in ("ja", "zh") else " ").join(sentences), language=language) == sentences


def test_blank_lines_end_sentences_and_other_line_breaks_do_not() -> None:
    text = "CHAPTER I\r\n \r\nIt was a dark and\r\nstormy night. It\nrained.\n\n\n\nThe end\n"
    wanted = ["CHAPTER I", "It was a dark and\r\nstormy night.", "It\nrained.", "The end"]
    assert split(text) == wanted


def test_an_unknown_language_has_no_abbreviations() -> None:
    assert split("Dr. Who came. He left.", language="xx") == ["Dr.", "Who came.", "He left."]


@pytest.mark.parametrize("space", ["\u2028", "\u3000", "\xa0", "\x85", "\u2009"])
def test_white_space_of_several_bytes(space: str) -> None:
    """Some of it makes the library panic between a letter and a full stop."""
    assert split(f"Plan A{space}. Was it?{space}Yes.") == [f"Plan A{space}.", "Was it?", "Yes."]


def test_spans_end_with_words() -> None:
    assert split("\n \n  One.\u3000 Two. \n \n") == ["One.", "Two."]
    assert split(" \n\n ") == split("") == []


@pytest.mark.parametrize("piece", [1000, WINDOW, 100_000])
def test_a_text_without_line_breaks_is_split_in_bounded_memory(piece: int) -> None:
    sentences = [f"Sentence number {i} goes on for a while and ends." for i in range(20_000)]
    assert split(" ".join(sentences), piece=piece) == sentences
    splitter = Splitter()
    for _ in range(100):
        splitter.push(b"word " * 1000)
        assert len(splitter._held) <= WINDOW + 5000


def test_what_has_no_end_is_cut_between_words_or_anywhere() -> None:
    parts = split("word " * 10_000)
    assert set(" ".join(parts).split(" ")) == {"word"}
    assert [len(part) for part in parts[:2]] == [WINDOW // 5 * 5 - 1] * 2
    assert [len(part) for part in split("é" * (2 * WINDOW + 1))] == [WINDOW, WINDOW, 1]


PARTS = [
    "a",
    "B.",
    " ",
    ". ",
    "! ",
    '"',
    "\n",
    "\n\n",
    "\r\n",
    "。",
    "「",
    "Dr. ",
    "é",
    "😀",
    "\t",
    "1. ",
    "- ",
    "\u3000",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=60), st.integers(1, 9))
def test_the_way_a_text_arrives_makes_no_difference(parts: list[str], piece: int) -> None:
    text = "".join(parts)
    found = split(text)
    assert split(text, piece=piece) == found
    assert all(sentence == sentence.strip() != "" for sentence in found)
    assert "".join("".join(found).split()) == "".join(text.split()), "only white space lies between sentences"


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 3))
def test_windows_are_the_texts_own(piece: int, n_ends: int) -> None:
    text = (("long words follow one another " * 900) + ". ") * n_ends + "and then nothing " * 2000
    assert split(text, piece=piece) == split(text)


def test_abbreviations_are_those_of_the_language() -> None:
    assert [is_abbreviation(word) for word in ("Mr", "Capt", "p.m", "lamp", "East")] == [True, True, True, False, False]
    assert is_abbreviation("bzw", "de") and not is_abbreviation("bzw")
