"""Parts of a document that are looked into alone, and readings that are asked as of an earlier snapshot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_files import epub
from program import program

import rwkv_stream as rs
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model
from rwkv_stream.store.texts import KeptText
from rwkv_stream.text.parts import Part

Made = Callable[..., KeptText]
SENTENCES = [f"The keeper of tower {i} was called {name}." for i, name in enumerate(("Aske", "Lund", "Vell", "Orrin"))]


@pytest.fixture
def made(tmp_path: Path, bytes_model: Model) -> Made:
    """The kept text of a file of these bytes."""
    store = rs.Store(tmp_path / "store", create=True)

    def keep(name: str, data: bytes) -> KeptText:
        (tmp_path / name).write_bytes(data)
        rs.ingest(tmp_path / name, name=name, model=bytes_model, store=store, chunk=64, snapshot_every=64)
        text = store.text(store.get(name))
        assert text is not None
        return text

    return keep


def book(*titles: str) -> bytes:
    return epub(
        {f"c{i}.xhtml": f"<html><body><p>{SENTENCES[i]}</p></body></html>".encode() for i in range(len(titles))},
        contents=[(f"c{i}.xhtml", title) for i, title in enumerate(titles)],
    )


def part(text: KeptText, asked: str) -> str:
    return text.read(*Part.of(asked, "--within").bytes(text)).decode().strip()


def test_chapters_are_counted_as_their_titles_count_them(made: Made) -> None:
    text = made("a.epub", book("To the reader", "Chapter 1. The mill", "CHAPTER II", "III: 39 steps"))
    assert [part(text, f"chapter:{i}") for i in (1, 2, 3)] == SENTENCES[1:]
    assert part(text, "chapter:to the reader") == SENTENCES[0]
    assert part(text, "chapter:The Mill") == SENTENCES[1] and part(text, "chapter:39 steps") == SENTENCES[3]
    both = part(text, "chapter:1..2")
    assert both.startswith(SENTENCES[1]) and both.endswith(SENTENCES[2])
    assert part(text, "chapter:CHAPTER II..III: 39 steps").split("\n")[0] == SENTENCES[2]
    for wrong in ("chapter:4", "chapter:1..9", "chapter:The end"):
        with pytest.raises(UsageError, match=r"--within 'a.epub': expected chapter.*found 4 chapters: 'To the reader'"):
            part(text, wrong)


def test_chapters_without_numbers_are_counted_in_order(made: Made) -> None:
    text = made("b.epub", book("The mill", "39 steps", "Mix it", "The end"))
    assert [part(text, f"chapter:{i}") for i in (1, 2, 3, 4)] == SENTENCES
    with pytest.raises(UsageError, match="expected chapter 5, found 4 chapters"):
        part(text, "chapter:5")


def test_lines_and_rows(made: Made) -> None:
    text = made("c.txt", "\n".join(SENTENCES).encode())
    assert part(text, "line:2..3") == "\n".join(SENTENCES[1:3]) and part(text, "line:4..99") == SENTENCES[3]
    with pytest.raises(UsageError, match="expected line 5, found 4 lines"):
        part(text, "line:5")
    with pytest.raises(UsageError, match="expected chapter 1, found none; what it has is line:"):
        part(text, "chapter:1")
    table = made(
        "d.csv", "\n".join(["text,name", *(f"{told},{i}" for i, told in enumerate(["x", *SENTENCES]))]).encode()
    )
    assert SENTENCES[1] in part(table, "row:3..4") and SENTENCES[3] not in part(table, "row:3..4")
    with pytest.raises(UsageError, match="expected row 9, found rows 1 to 5"):
        part(table, "row:9")
    with pytest.raises(UsageError, match="expected line 1, found none; what it has is row:"):
        part(table, "line:1")


@pytest.mark.parametrize("wrong", ["chapter", "chapter:", "verse:3", "page:x", "line:7..3", "chapter:7..3", "row:1.."])
def test_what_is_no_part_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--within: expected"):
        Part.of(wrong, "--within")


def test_a_part_of_postings_has_its_sentences_and_their_terms_alone() -> None:
    *_, whole = MemoryText(" ".join(SENTENCES)).postings()
    edge = len(f"{SENTENCES[0]} ")
    few = whole.within(edge, int(whole.ends[2]))
    assert few.starts.tolist() == whole.starts[1:3].tolist() and few.lengths.tolist() == whole.lengths[1:3].tolist()
    assert (few.count("keeper"), few.count("ask"), whole.count("keeper")) == (2, 0, 4)
    sentences, counts = few.hits("keeper")
    assert (sentences.tolist(), counts.tolist()) == ([0, 1], [1, 1])
    assert np.array_equal(few.within(int(whole.starts[2]), int(whole.ends[2])).hits("vell")[0], [0])
    assert len(whole.within(edge + 1, edge + 3)) == 0


def test_only_the_part_is_quoted(program_folder: Path) -> None:
    Path("e.epub").write_bytes(book("One", "Two", "Three", "Four"))
    assert program("ingest", "e.epub", "--chunk", 64, "--snapshot-every", 64).code == 0
    asked = ("ask", "What was the keeper of the tower called?", "--from-snapshot", "e.epub", "--json")
    for strategy in ("auto", "quote", "reread", "nearest"):
        options = () if strategy in ("auto", "quote") else ("--max-tokens", 2)
        said = json.loads(program(*asked, "--strategy", strategy, "--within", "chapter:3", *options).out)
        assert "Vell" in said["sources"][0]["text"] and "Lund" not in said["sources"][0]["text"], strategy
    said = json.loads(program("ask", "Which planet?", *asked[2:], "--within", "chapter:3").out)
    assert (said["answer"], said["why"]) == (None, "the text is not seen to speak of it")  # the state has read all
    for wrong, told in (("chapter:7", "found 4 chapters"), ("page:1", "what it has is chapter:"), ("x", "expected")):
        ended = program(*asked, "--within", wrong, "--strategy", "quote")
        assert (ended.code, ended.out) == (2, "") and told in ended.err, ended.err
        assert ended.err.splitlines()[-1].startswith("error: --within")
    ended = program(*asked, "--within", "chapter:3", "--strategy", "state")
    assert (ended.code, "--until" in ended.err) == (2, True)


def test_a_reading_is_asked_as_of_an_earlier_snapshot(program_folder: Path) -> None:
    text = " ".join(SENTENCES)
    for name, told in (("story.txt", text), ("part2.txt", "Nothing more is known of them."), ("other.txt", "No.")):
        Path(name).write_text(told)
        start = ("--from-snapshot", "story.txt") if name == "part2.txt" else ()
        assert program("ingest", name, "--chunk", 16, "--snapshot-every", 16, *start).code == 0
    store = rs.Store("store")
    early = store.get("story.txt@64")
    asked = ("ask", "What was the keeper of tower 3 called?", "--json", "--from-snapshot")
    for ref in ("story.txt", "part2.txt"):
        said = json.loads(program(*asked, ref, "--until", "story.txt@64", "--strategy", "quote").out)
        assert said["snapshot"] == early.id and all(one["byte_end"] <= early.bytes for one in said["sources"])
    until = program(*asked, "story.txt", "--until", "story.txt@64", "--strategy", "state", "--max-tokens", 3).out
    assert until == program(*asked, "story.txt@64", "--strategy", "state", "--max-tokens", 3).out
    until = program(*asked, "story.txt", "--until", "story.txt@70", "--strategy", "state", "--max-tokens", 3).out
    assert (json.loads(until)["taken"]["tokens"], json.loads(until)["sources"][0]["byte_end"]) == (70, 70)
    for ref in ("other.txt", "part2.txt"):
        ended = program(*asked, "story.txt", "--until", ref)
        assert (ended.code, ended.out) == (2, "") and f"--until '{ref}': expected a snapshot that" in ended.err
    assert program("ask", "Who?", "--all", "--until", "story.txt").code == 2
