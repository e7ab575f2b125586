"""Summaries taken from the text: they stand where they say, tell most of it, and of a log what its lines are."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from program import program

import rwkv_stream as rs
from rwkv_stream.answers import extracts, log_templates
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.extracts import extract
from rwkv_stream.answers.summary import Summary
from rwkv_stream.errors import SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.reading import keeping
from rwkv_stream.store import Store, texts
from rwkv_stream.text import terms
from rwkv_stream.text.readers.places import Place

TOPICS = ("lighthouse", "ferry", "orchard", "quarry")
SAID = "The council of Marrow decided that the {0} needs a new keeper, a new roof and money for the {0} before winter."
FILLING = "Then {} was with the {} of all the {} that had been at {} before {} was there."  # words that come but once


def chapter(topic: str, number: int, sentences: int = 20) -> str:
    """Sentences that say nothing of the others, and two among them that say what the chapter is of."""
    names = ("".join(letters) for letters in itertools.product("vwxz"[number], "aeiou", "bdfgkl", "aou", "mnprt"))
    filled = [FILLING.format(*itertools.islice(names, 5)) for _ in range(sentences)]
    filled[sentences // 2] = SAID.format(topic)
    filled[sentences // 4] = f"Nobody spoke of the {topic} for long, but the council had the {topic} in mind all day."
    return " ".join(filled)


BOOK = "\n\n".join(chapter(topic, number) for number, topic in enumerate(TOPICS)) + "\n"


class Chaptered(MemoryText):
    """A text whose paragraphs are chapters."""

    def place(self, byte: int) -> Place:
        return {"chapter": f"Of the {TOPICS[self.read(0, byte).count(chr(10).encode() * 2)]}"}


def length(text: str) -> int:
    return len(terms.words(text, "en"))


def test_sentences_stand_where_they_say_within_the_words() -> None:
    text = MemoryText(BOOK)
    for words in (30, 60, 120):
        found = extract(text, words=words)
        assert 0 < sum(length(one.text) for one in found) <= words
        assert [one.byte_start for one in found] == sorted({one.byte_start for one in found})
        for one in found:
            assert text.read(one.byte_start, one.byte_end).decode() == one.text
            assert one.place == {"line": BOOK[: one.byte_start].count("\n") + 1}
            assert one.why == "central" and one.template is None
    assert extract(text, words=60) == extract(MemoryText(BOOK), words=60)


def test_every_chapter_is_told_by_what_says_most_and_nothing_twice() -> None:
    found = [one.text for one in extract(Chaptered(BOOK), words=90)]
    assert [next(topic for topic in TOPICS if topic in one) for one in found] == list(TOPICS)
    repeated = SAID.format("ferry") + " " + BOOK + " " + SAID.format("ferry")
    found = [one.text for one in extract(MemoryText(repeated), words=200)]
    assert len(found) > 4 and found.count(SAID.format("ferry")) == 1


def test_what_was_said_is_worth_less() -> None:
    """Of the sentences on the harbour, which say much, one is enough."""
    harbour = "Harbour masters of {} mended moles, piers, quays, cranes, beacons and buoys."
    bridge = "It was he who then drew the bridge that is over the river at {}."
    sentences = [harbour.format(name) for name in ("Vell", "Lund", "Tarn")] + [bridge.format(name) for name in "AB"]
    found = [one.text for one in extract(MemoryText(" ".join(sentences)), words=32)]
    assert [("mended" in one, "bridge" in one) for one in found] == [(True, False), (False, True)]


def test_of_a_long_text_more_is_told_than_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    eighths = []
    for stretch_bytes in (len(BOOK), 1):
        monkeypatch.setattr(extracts, "STRETCH_BYTES", stretch_bytes)
        found = extract(MemoryText(BOOK), words=90)
        eighths.append([one.byte_start * 8 // len(BOOK) for one in found])
    assert len({*eighths[1]}) == len(eighths[1]) > len({*eighths[0]})


def test_the_beginning_counts_for_more() -> None:
    names = [f"Report {name} says that the harbour needs stones and the harbour needs boats." for name in "abcdefghijk"]
    (first, *_) = extract(MemoryText(" ".join(names)), words=14)
    assert first.byte_start == 0


def test_only_sentences_that_begin_in_the_ranges() -> None:
    text = MemoryText(BOOK)
    edges = [BOOK.index(chapter(topic, number)) for number, topic in enumerate(TOPICS)]
    ranges = [(edges[1] + 5, edges[2] + 5), (edges[3], edges[3] + 400)]
    found = extract(text, ranges, 200)
    assert found and all(any(start <= one.byte_start < end for start, end in ranges) for one in found)
    assert {topic for topic in TOPICS for one in found if f"the {topic} " in one.text} == {"ferry"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One word.", ["One word."]),
        ("Nothing comes twice. Every saying differs. Go home.", ["Nothing comes twice.", "Every saying differs."]),
        ("Endless " * 50, ["Endless " * 49 + "Endless"]),
        ("我们去了山上。昨天下雨。今天没有人。", ["我们去了山上。"]),
    ],
)
def test_where_nothing_says_more_than_the_rest_the_first_is_told(text: str, expected: list[str]) -> None:
    assert [one.text for one in extract(MemoryText(text), words=6)] == expected


def test_few_sentences_are_held_of_a_long_text() -> None:
    drawn = random.Random(0)
    words = ["harbour", "keeper", "lamp", "stone", "boat", "winter", "council", "roof", "letter", "bell"]
    many = " ".join(f"A{i} {' '.join(drawn.choices(words, k=8))}." for i in range(3000))
    text, ranges = MemoryText(many), [(0, len(many))]
    worth = extracts._worth(text, ranges)
    best = extracts._best(text, ranges, worth, 120)
    assert Counter(one.stretch for one in best) == dict.fromkeys(range(extracts.STRETCHES), extracts.MOST)
    best_of_all = max(best, key=lambda one: one.worth)
    assert best_of_all.stretch == 0 and len({one.words.tobytes() for one in best}) == len(best)


# ---- logs ----

KINDS = (
    "2026-01-{d:02} 12:{m:02}:00 INFO server: request {n} from 10.0.{m}.{d} for /pages/{n}/index.html took {m} ms",
    "2026-01-{d:02} 12:{m:02}:01 INFO server: cache {n:08x}1f written",
    "2026-01-{d:02} 12:{m:02}:02 WARN server: retry {m} of user{n}@example.org",
)
STRANGE = "2026-01-09 12:00:09 FATAL kernel: oops, unable to handle paging"


def log(lines: int, seed: int = 0) -> list[str]:
    drawn = random.Random(seed)
    kinds = drawn.choices(KINDS, (6, 3, 1), k=lines)
    return [kind.format(d=drawn.randint(1, 28), m=drawn.randint(10, 59), n=drawn.randint(1, 10**6)) for kind in kinds]


def test_a_line_is_masked_but_for_what_is_the_same_in_all_of_a_kind() -> None:
    assert [*dict.fromkeys(map(log_templates.template_of, KINDS_MADE))] == [
        "<time> INFO server: request <n> from <ip> for <path> took <n> ms",
        "<time> INFO server: cache <id> written",
        "<time> WARN server: retry <n> of <mail>",
    ]
    masked = log_templates.template_of(
        "Oct 11 22:14:15 host su[12]: facade 0xBEEF 3f2504e0-4f89-11d3-9a0c-0305e82c3301 fe80::1 -0.5% C:\\a\\b.exe"
    )
    assert masked == "<time> host su[<n>]: facade <id> <id> <ip> <n> <path>"


def words_of(line: str) -> set[str]:
    template = log_templates.template_of(line).lower()
    return {*re.findall("[a-z]+", re.sub("<[a-z]+>", " ", template))}


KINDS_MADE = [kind.format(d=3, m=17, n=4711) for kind in KINDS]


@pytest.mark.parametrize("counters", [4096, 32])
def test_templates_are_counted_exactly_however_few_are_kept(counters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_templates, "COUNTERS", counters)
    rare = [f"2026-01-01 00:00:00 DEBUG job: {'abcdefghij'[i // 10]}{'klmnopqrst'[i % 10]} done" for i in range(100)]
    lines = log(900) + rare
    random.Random(1).shuffle(lines)
    lines = [*rare[:50], *(line for line in lines if line not in rare[:50])]  # more than there are counters
    lines.insert(500, STRANGE)
    lines += [f"2026-01-02 00:00:0{i} ALERT {word}" for i, word in enumerate(("ada", "ben", "cid"))]
    text = MemoryText("\r\n".join(lines))
    found = log_templates.templates(text, [(0, text.byte_end)])
    counts = Counter(map(log_templates.template_of, lines))
    often = [one for one in found if one.why == "frequent"]
    assert [(one.template, one.count) for one in often[:3]] == counts.most_common(3)
    for one in found:
        assert one.template is not None and one.count == counts[one.template]
        first = next(i for i, line in enumerate(lines) if log_templates.template_of(line) == one.template)
        assert (one.text, one.place) == (lines[first], {"line": first + 1})
        assert text.read(one.byte_start, one.byte_end).decode().rstrip() == lines[first]
    strange = [one for one in found if one.why == "strange"]
    assert (strange[0].text, len(strange)) == (STRANGE, log_templates.STRANGE)
    holding = Counter(word for line in lines for word in words_of(line))
    bits = {
        log_templates.template_of(line): sum(math.log2(len(lines) / holding[word]) for word in words) / len(words)
        for line in lines
        if (words := words_of(line))
    }
    for one in often:
        assert one.bits == pytest.approx(bits.pop(one.template or ""))
    assert [one.bits for one in strange] == pytest.approx(sorted(bits.values(), reverse=True)[: log_templates.STRANGE])
    assert len({one.template for one in strange} & bits.keys()) == log_templates.STRANGE


def test_lines_belong_to_the_range_in_which_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_templates, "_READ_BYTES", 7)
    monkeypatch.setattr(log_templates, "LINE_BYTES", 10)
    data = "first line\n\nthe second is long\n  \nthird"
    text = MemoryText(data)
    whole = [*log_templates.lines(text, [(0, text.byte_end)])]
    assert [(one.text, data[one.byte_start : one.byte_end]) for one in whole] == [
        ("first line", "first line"),
        ("the second", "the second is long"),
        ("third", "third"),
    ]
    for cut in range(len(data)):
        parts = [[*log_templates.lines(text, [part])] for part in ((0, cut), (cut, len(data)))]
        assert parts[0] + parts[1] == whole == [*log_templates.lines(text, [(0, cut), (cut, len(data))])]


def test_prose_and_short_texts_are_no_logs() -> None:
    assert log_templates.is_log(MemoryText("\n".join(log(30))))
    assert not log_templates.is_log(MemoryText("\n".join(log(19))))
    assert not log_templates.is_log(MemoryText(BOOK.replace(". ", ".\n")))
    said = [f"[00:{i:02}:07] {'abcdefghijklmnopqrst'[i % 20]}{chr(97 + i // 20)} spoke" for i in range(60)]
    assert not log_templates.is_log(MemoryText("\n".join(said))), "what has times, but nothing in common"


# ---- of snapshots ----


@pytest.fixture
def book(tmp_path: Path, bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that has read the book in spans of 700 bytes and kept it in extents of 1000."""
    monkeypatch.setattr(texts, "EXTENT_BYTES", 1000)
    monkeypatch.setattr(keeping, "EXTENT_BYTES", 1000)
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    store = Store(tmp_path / "books.store", create=True)
    rs.ingest(str(path), model=bytes_model, store=store, name="book.txt", chunk=700, snapshot_every=700)
    return store


def made(store: Store, **how: object) -> list[Summary]:
    return list(rs.extracts(snapshot=store.get("book.txt"), store=store, **how))  # type: ignore[arg-type]


def test_what_is_kept_is_told_as_what_is_in_memory(book: Store) -> None:
    (whole,) = made(book, words=60)
    found = extract(MemoryText(BOOK), words=60)
    assert list(whole.extracts) == found
    assert whole.text == "\n".join(" ".join(one.text.split()) for one in found)
    snapshot = book.get("book.txt")
    assert (whole.byte_end, whole.token_end, whole.snapshot) == (snapshot.bytes, snapshot.tokens, snapshot.id)
    assert (whole.level, whole.tokens, whole.children) == (0, 0, ())


def test_a_tree_goes_from_the_spans_to_the_whole(book: Store) -> None:
    tree = made(book, mode="tree", words=40, group=3)
    leaves = [one for one in tree if one.level == 0]
    assert leaves == made(book, mode="each", words=40) and len(leaves) == -(-len(BOOK) // 700)
    for before, after in itertools.pairwise(leaves):
        assert before.byte_end == after.byte_start
    assert tree[-1].extracts == made(book, words=40)[0].extracts
    for node in tree:
        expected = extract(MemoryText(BOOK), [(node.byte_start, node.byte_end)], 40)
        assert list(node.extracts) == expected
        assert all(node.byte_start <= one.byte_start < node.byte_end for one in node.extracts)


def test_only_what_is_new_since_a_snapshot(book: Store) -> None:
    before, end = book.get("book.txt~2"), book.get("book.txt")
    (whole,) = made(book, since=before, words=40)
    assert (whole.byte_start, whole.byte_end, whole.token_start) == (before.bytes, end.bytes, before.tokens)
    assert list(whole.extracts) == extract(MemoryText(BOOK), [(before.bytes, end.bytes)], 40)
    every = made(book, mode="each", words=40)
    since = made(book, mode="each", words=40, since=before)
    assert [one.snapshot for one in since] == [one.snapshot for one in every[-2:]]
    assert since[0].byte_start == before.bytes


def test_what_is_new_since_a_leaf_that_was_taken_on_the_way(book: Store, tmp_path: Path, bytes_model: Model) -> None:
    path = tmp_path / "book.txt"
    options = {"model": bytes_model, "store": book, "name": "book.txt", "chunk": 700, "snapshot_every": 700}
    leaf = book.get(rs.ingest(str(path), max_tokens=1000, **options).snapshot)
    assert leaf.id not in {s.id for s in book.get("book.txt").lineage()}
    since = made(book, mode="each", words=40, since=leaf)
    assert [(one.byte_start, one.byte_end) for one in since][:2] == [(leaf.bytes, 1400), (1400, 2100)]
    (tmp_path / "other.txt").write_text("Another text. " * 30)
    other = rs.ingest(str(tmp_path / "other.txt"), model=bytes_model, store=book, chunk=700, snapshot_every=700)
    for ref in (other.snapshot, "book.txt"):
        with pytest.raises(UsageError, match="expected"):
            made(book, since=book.get(ref))


def test_arguments_that_make_no_sense(book: Store) -> None:
    for how in ({"mode": "rolling"}, {"words": 0}, {"group": 1}):
        with pytest.raises(UsageError):
            made(book, **how)


def test_a_damaged_text_costs_the_spans_that_need_it(book: Store) -> None:
    expected = made(book, mode="each", words=40)
    kept = texts.Texts(book.path / "texts", book.path / "postings")
    extent = list(kept.chain(book.get("book.txt").text))[1]
    for path in (kept.path(extent.name), kept.postings_path(extent.name)):
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
    failures: list[rs.RwkvStreamError] = []
    found = made(book, mode="tree", words=40, on_failure=failures.append)
    leaves = [one for one in found if one.level == 0]
    assert len(failures) > 0 and len(leaves) == len(expected) - len(failures)
    assert all(one in expected for one in leaves) and extent.name in str(failures[0])
    assert len([one for one in found if one.level == max(one.level for one in found)]) == 1
    with pytest.raises(SnapshotError, match=r"summarizing bytes \d+-\d+"):
        made(book, mode="each", words=40)


# ---- the program ----


@pytest.fixture
def folder(program_folder: Path, bpe_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that has not learned to answer, and a book and a log that it has read."""
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bpe_model_path))
    Path("book.txt").write_text(BOOK)
    Path("app.log").write_text("\n".join([*log(60), STRANGE]))
    assert program("ingest", "book.txt", "app.log", "--chunk", 512, "--snapshot-every", 512).code == 0
    return program_folder


def test_a_model_that_has_not_learned_to_answer_is_not_asked(folder: Path) -> None:
    ended = program("summarize", "--from-snapshot", "book.txt", "--words", 60)
    assert ended.code == 0 and "--style extract" in ended.err
    shown = ended.out.splitlines()
    for line, place in zip(shown[::2], shown[1::2], strict=True):
        at = BOOK.index(line)
        assert place == f"  line {BOOK[:at].count(chr(10)) + 1}, bytes {at:,} to {at + len(line):,}"
    row = json.loads(program("summarize", "--from-snapshot", "book.txt", "--words", 60, "--json").out)
    assert row["text"].splitlines() == [one["text"] for one in row["extracts"]] == shown[::2]
    generated = program("summarize", "--from-snapshot", "book.txt", "--max-tokens", 2, "--json")
    assert (generated.code, json.loads(generated.out)["extracts"]) == (0, [])


def test_a_log_is_told_by_its_templates(folder: Path) -> None:
    lines = program("summarize", "--from-snapshot", "app.log").out.splitlines()
    counts = Counter(map(log_templates.template_of, log(60)))
    assert lines[:6:2] == [f"{count} × {template}" for template, count in counts.most_common()]
    assert lines[6] == STRANGE and lines[7].startswith("  line 61, bytes ") and "bits a word; 1 line like" in lines[7]


def test_trees_as_tables_and_pages(folder: Path) -> None:
    options = ("summarize", "--from-snapshot", "book.txt", "--tree", "--words", 40)
    assert program(*options, "-o", "tree.parquet").code == program(*options, "-o", "tree.md").code == 0
    rows = pq.read_table("tree.parquet").to_pylist()
    assert pq.read_schema("tree.parquet").metadata[b"style"] == b"extract"
    assert max(row["level"] for row in rows) == rows[-1]["level"] > 0
    data = BOOK.encode()
    for one in (one for row in rows for one in row["extracts"]):
        assert data[one["byte_start"] : one["byte_end"]].decode() == one["text"]
        assert one["place"]["line"] == data[: one["byte_start"]].count(b"\n") + 1
    page = Path("tree.md").read_text()
    assert all(f"> {line}\n" in page for row in rows for line in row["text"].splitlines())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--style", "extract", "--temperature", "1"], "--temperature"),
        (["--style", "extract", "--rolling"], "--rolling"),
        (["--style", "generate", "--words", "9"], "--max-tokens"),
        (["--words", "9", "--rolling"], "--rolling"),
    ],
    ids=str,
)
def test_options_of_the_other_style_are_refused(folder: Path, options: list[str], told: str) -> None:
    ended = program("summarize", "--from-snapshot", "book.txt", *options)
    assert (ended.code, told in ended.err, ended.out) == (2, True, "")
