"""Formats: what every kind of file says, in order and with the places a person would cite, and what hostile ones do."""

from __future__ import annotations

import bz2
import codecs
import difflib
import gzip
import importlib.util
import io
import json
import logging
import pickle
import random
import re
import signal
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from made_files import (
    arc_record,
    deflated,
    docx,
    epub,
    json_lines,
    parquet,
    pdf,
    record,
    tarred,
    xhtml,
    zipped,
)
from program import Ended, program
from readings import reading

from rwkv_stream.errors import InputError, StoppedError, UsageError
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Store
from rwkv_stream.text.readers import Document, document, documents
from rwkv_stream.text.readers.places import LOOKBACK_BYTES, Lines, Sections

INPUTS = Path(__file__).parents[3] / "shared/data/inputs"
PROSE = "The keeper lit the lamp; “ah”, said he, é 漢字 🙂."
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
EXTRAS = {"books": ("lxml", "pypdf", "docx"), "web": ("lxml", "warcio"), "remote": ("fsspec",)}


def extra(name: str) -> pytest.MarkDecorator:
    missing = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"the extra '{name}' is not installed: no {', '.join(missing)}")


books, web, remote = extra("books"), extra("web"), extra("remote")


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return write


def read(found: Document | str, encoding: str | None = None) -> str:
    with (document(found) if isinstance(found, str) else found).text(encoding) as text:
        return b"".join(text).decode()


def cited(found: Document | str) -> list[tuple[dict[str, Any], str]]:
    """The text cut at the bytes where the place changes; asked for while it is read, so that all of it is in reach."""
    parts: list[tuple[dict[str, Any], bytes]] = []
    at = 0
    with (document(found) if isinstance(found, str) else found).text() as text:
        for piece in text:
            for byte in range(len(piece)):
                place = text.place(at + byte)
                if not parts or parts[-1][0] != place:
                    parts.append((place, b""))
                parts[-1] = place, parts[-1][1] + piece[byte : byte + 1]
            at += len(piece)
    return [(place, part.decode()) for place, part in parts]


def error(found: Document | str) -> str:
    """The first line that says what cannot be read."""
    return reading(found)[1][0]


# ---- places ----


def test_lines(file: Callable[..., str]) -> None:
    text = "one\ntwo\r\n\n\nfive\rstill five"
    assert cited(file("a.txt", text.encode())) == [
        ({"line": 1}, "one\n"),
        ({"line": 2}, "two\r\n"),
        ({"line": 3}, "\n"),
        ({"line": 4}, "\n"),
        ({"line": 5}, "five\rstill five"),
    ]


@pytest.mark.parametrize("step", [3, 7, 100_003])
def test_lines_far_behind_what_has_been_read(step: int) -> None:
    rng = random.Random(0)
    data = bytes(rng.choices(b"ab\n", k=LOOKBACK_BYTES * 2))
    lines, at = Lines(), 0
    for start in range(0, len(data), 65_536):
        lines.push(data[start : start + 65_536])
        while at < start - 700_000:
            if step > 7 or rng.random() < 0.001:
                assert lines.at(at) == {"line": 1 + data.count(b"\n", 0, at)}
            at += step
    assert lines.at(len(data)) == {"line": 1 + data.count(b"\n")}


@pytest.mark.parametrize(
    "push", [lambda places, i: places.begin(40 * i, {"row": i}), lambda places, i: places.push(b"x" * 40)]
)
def test_places_nobody_asks_for_are_forgotten(push: Callable[[Any, int], None]) -> None:
    places: Any = Sections() if "begin" in push.__code__.co_names else Lines()
    sizes = []
    for i in range(200_000):
        push(places, i)
        if i % 50_000 == 49_999:
            sizes.append(len(places._begun if isinstance(places, Sections) else places._pieces))
    assert max(sizes) <= LOOKBACK_BYTES // 40 + 2


# ---- pages ----


@books
def test_a_page(file: Callable[..., str]) -> None:
    page = f"""<!DOCTYPE html><html><head><title>no</title><style>no</style></head><body>
    <nav><ul><li>no<li>no</ul></nav><script>if (a < b) no</script>
    <p>Before   any\nheading&nbsp;here&mdash;<b>bold</b>and<i> slanted</i> .</p>
    <h1>Of <em>Lamps</em></h1><p>{PROSE}<p>Second<br>line<br><br>apart
    <h2></h2><ul><li>one</li><li>two</li></ul>
    <h2>Tables</h2><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
    <pre>
  kept   as
    it is</pre><div hidden>no</div><div style="color:red;display: none">no</div><template>no</template>
    <div>last</div><div>line</div></body></html>"""
    assert cited(file("a.html", page.encode())) == [
        ({}, "Before any heading\xa0here—boldand slanted .\n\n"),
        ({"chapter": "Of Lamps"}, f"Of Lamps\n\n{PROSE}\n\nSecond\nline\n\napart\n\none\ntwo\n\n"),
        ({"chapter": "Tables"}, "Tables\n\na\tb\n1\t2\n\n  kept   as\n    it is\n\nlast\nline"),
    ]


@books
@pytest.mark.parametrize("name", ["a.html", "a.txt", "a", "a.pdf"])
def test_a_page_whatever_its_name(file: Callable[..., str], name: str) -> None:
    found = document(file(name, b"\n <!-- c --><HTML lang=en><p>seen"))
    assert (found.kind, read(found)) == ("html", "seen")


@books
def test_a_text_about_html_is_text(file: Callable[..., str]) -> None:
    text = "How to write <html>: begin with <!DOCTYPE html>"
    assert read(file("a.txt", text.encode())) == text
    assert read(file("a.html", text.encode())) == text, "nothing at its start says that it is a page"
    assert read(file("fragment.html", b"<p>one</p><p>two")) == "one\n\ntwo"


@books
@pytest.mark.parametrize(
    ("declared", "encoding", "found"),
    [
        ("windows-1251", "cp1251", "cp1251"),
        ("iso-8859-1", "cp1252", "cp1252"),
        ("utf-8", "utf-8", "utf-8"),
        ("windows-1251", "utf-8", "utf-8"),
        ("shift_jis", "cp932", "cp932"),
        ("utf-7", "utf-8", "utf-8"),
        ("no-such", "utf-8", "utf-8"),
    ],
)
def test_the_encoding_a_page_declares(file: Callable[..., str], declared: str, encoding: str, found: str) -> None:
    text = {"cp1251": "Все счастливые семьи", "cp1252": "Où irons-nous, l’aîné?", "cp932": "吾輩は猫である"}.get(
        encoding, PROSE
    )
    page = f'<html><head><meta http-equiv="Content-Type" content="text/html; charset={declared}"></head><p>{text}'
    path = file("a.html", page.encode(encoding))
    with document(path).text() as opened:
        assert b"".join(opened).decode() == text
        assert opened.encoding == found
    assert read(path, found) == text, "the encoding of a record gives the same text"


@books
def test_a_page_in_utf16(file: Callable[..., str]) -> None:
    assert read(file("a.html", codecs.BOM_UTF16_LE + f"<html><p>{PROSE}".encode("utf-16-le"))) == PROSE


@books
@pytest.mark.parametrize("seed", range(4))
def test_a_page_is_the_same_however_it_arrives(
    file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    words = [
        "<p>",
        "</p>",
        "<h2>",
        "</h2>",
        " lamp ",
        "é&amp;",
        "&nbsp;",
        "<pre>\n",
        "</pre>",
        "<br/>",
        "漢字",
        "<!-- x -->",
    ]
    data = ("<html>" + "".join(rng.choices(words, k=60_000))).encode()
    expected = cited_edges(document(file("a.html", data)))
    assert cited_edges(document(file("a.gz", gzip.compress(data[:9]) + gzip.compress(data[9:])))) == expected
    for n_bytes in (7, 1000):
        raw = io.BufferedReader(_Dribble(data, n_bytes))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
        assert cited_edges(document("-", name="x")) == expected


def cited_edges(found: Document) -> list[tuple[dict[str, Any], bytes]]:
    """Like `cited`, asked only at the ends of words."""
    parts: list[tuple[dict[str, Any], bytes]] = []
    at = 0
    with found.text() as text:
        for piece in text:
            for word in re.findall(rb"\S+\s*|\s+", piece):
                if not parts or parts[-1][0] != text.place(at):
                    parts.append((text.place(at), b""))
                parts[-1] = parts[-1][0], parts[-1][1] + word
                at += len(word)
    return parts


class _Dribble(io.RawIOBase):
    """A stdin whose bytes arrive a few at a time."""

    def __init__(self, data: bytes, n_bytes: int) -> None:
        self.file, self.n_bytes = io.BytesIO(data), n_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self.file.readinto(buffer[: self.n_bytes])


# ---- books ----

CHAPTERS = {
    "cover.xhtml": xhtml('<div><img src="cover.png" alt=""/></div>'),
    "a.xhtml": xhtml(f"<h1>I</h1><p>{PROSE}&nbsp;&mdash; <span epub:type='pagebreak'>169</span>and on.</p>"),
    "b.xhtml": xhtml("<p>Still the first.</p><h2 id='two'>II</h2><p>Second.</p><p id='deep'>Deep.</p>"),
    "c d.xhtml": xhtml("<p>Third<br/>line</p>"),
}
CONTENTS = [
    ("a.xhtml", "Chapter <i>One</i>"),
    ("b.xhtml#two", "Chapter\n Two"),
    ("b.xhtml#deep", "A part of two"),
    ("c%20d.xhtml", "Three"),
]
BOOK = [
    ({"chapter": "Chapter One"}, f"I\n\n{PROSE}\xa0— and on.\n\n" + "Still the first.\n\n"),
    ({"chapter": "Chapter Two"}, "II\n\nSecond.\n\n"),
    ({"chapter": "A part of two"}, "Deep.\n\n"),
    ({"chapter": "Three"}, "Third\nline"),
]


@books
def test_a_book_of_epub_3(file: Callable[..., str]) -> None:
    found = document(file("book.epub", epub(CHAPTERS, contents=CONTENTS)))
    assert (found.kind, cited(found)) == ("epub", BOOK)
    with found.text() as text:
        shares = [text.raw_bytes_read for _ in text]
        assert shares == sorted(shares) and shares[-1] == text.raw_size


@books
def test_a_book_of_epub_2(file: Callable[..., str]) -> None:
    contents = [(href, re.sub("<.*?>", "", title)) for href, title in CONTENTS]
    assert cited(file("book.epub", epub(CHAPTERS, contents=contents, version=2))) == BOOK


@books
def test_a_book_without_contents_has_its_headings(file: Callable[..., str]) -> None:
    found = file("book.epub", epub({"a.xhtml": xhtml("<p>x</p><h1>One</h1><p>y</p>"), "b.xhtml": xhtml("<p>z</p>")}))
    assert cited(found) == [({}, "x\n\n"), ({"chapter": "One"}, "One\n\ny\n\nz")]


@books
def test_a_book_is_read_in_the_order_of_its_spine(file: Callable[..., str]) -> None:
    assert read(file("book.epub", epub(CHAPTERS, spine=["c d.xhtml", "a.xhtml"]))).startswith("Third\nline\n\nI\n\n")


@books
@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<p>one & two <b>bold</p><p>three<br>four", "one & two bold\n\nthree\nfour"),
        ("<title/><p>a<script src='x'/>b</p></div>", "ab"),
        ("<p>a&nbsp;b&eacute;&bogus;c</p>", "a\xa0bé&bogus;c"),
    ],
)
def test_chapters_that_are_no_xml(file: Callable[..., str], body: str, text: str) -> None:
    assert read(file("book.epub", epub({"a.xhtml": xhtml(body)}))) == text


@books
def test_a_chapter_in_another_encoding(file: Callable[..., str]) -> None:
    chapter = xhtml("<p>caf\xe9</p>").decode().replace('"utf-8"', '"iso-8859-1"').encode("latin-1")
    assert read(file("book.epub", epub({"a.xhtml": chapter}))) == "café"


@books
def test_pages(file: Callable[..., str]) -> None:
    pages = [
        ["The first page has words that are hyphen-", "ated, and well-", "Known ones."],
        [],
        ["caf\xe9 page three"],
    ]
    found = document(file("a.pdf", pdf(pages)))
    assert found.kind == "pdf"
    assert cited(found) == [
        ({"page": 1}, "The first page has words that are hyphenated, and well-\nKnown ones.\n"),
        ({"page": 3}, "café page three"),
    ]


@books
def test_a_document_of_word(file: Callable[..., str]) -> None:
    data = docx(["before", ("Title", "Of Lamps"), PROSE, ("Heading 2", "A\ttable"), [["a", "b"], ["c", "d"]], "after"])
    assert cited(file("a.docx", data)) == [
        ({}, "before\n\n"),
        ({"chapter": "Of Lamps"}, f"Of Lamps\n\n{PROSE}\n\n"),
        ({"chapter": "A table"}, "A\ttable\n\na\tb\nc\td\nafter\n\n"),
    ]


@books
def test_what_word_hides_and_what_it_shows(file: Callable[..., str]) -> None:
    """Insertions, links, content controls and text boxes are text; deletions, and what is said twice, are not."""
    body = (
        "<w:p><w:r><w:t>a</w:t></w:r><w:ins><w:r><w:t>b</w:t></w:r></w:ins><w:del><w:r><w:delText>x</w:delText></w:r>"
        "</w:del><w:hyperlink><w:r><w:t>c</w:t></w:r></w:hyperlink><w:moveFrom><w:r><w:t>x</w:t></w:r></w:moveFrom></w:p>"
        "<w:sdt><w:sdtContent><w:p><w:r><w:t>d</w:t><w:br/><w:t>e</w:t></w:r></w:p></w:sdtContent></w:sdt>"
        '<w:p><w:r><mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:Choice>'
        "<w:p><w:r><w:t>box</w:t></w:r></w:p></mc:Choice><mc:Fallback><w:p><w:r><w:t>box</w:t></w:r></w:p></mc:Fallback>"
        "</mc:AlternateContent><w:t>f</w:t></w:r></w:p>"
    )
    packed = zipfile.ZipFile(io.BytesIO(docx(["MARK"])))
    parts = {name: packed.read(name) for name in packed.namelist()}
    parts["word/document.xml"] = re.sub(
        rb"<w:p>.*MARK.*?</w:p>", body.encode(), parts["word/document.xml"], flags=re.DOTALL
    )
    assert read(file("a.docx", zipped(parts))).split("\n\n") == ["abc", "d\ne", "f", "box", ""]


# ---- tables ----

ROWS = [{"id": i, "text": f"row {i}: {PROSE}", "n": 1.5} for i in range(1, 60)]
TABLES = {
    "a.jsonl": json_lines(ROWS),
    "a.ndjson": b"\n" + json_lines(ROWS).replace(b"\n", b"\r\n"),
    "a.jsonl.gz": gzip.compress(json_lines(ROWS)),
    "a.csv": "\ufeffid,text,n\r\n".encode() + b"".join(f'{r["id"]},"{r["text"]}",1.5\r\n'.encode() for r in ROWS),
    "a.tsv": b"n\ttext\tid\n" + b"".join(f"1.5\t{r['text']}\t{r['id']}\n".encode() for r in ROWS),
    "b.csv": b"id;text\n\n" + b"".join(f'{r["id"]};"{r["text"]}"\n'.encode() for r in ROWS),
    "a.parquet": parquet({name: [row[name] for row in ROWS] for name in ("n", "text", "id")}, row_group_size=7),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_one_document_of_rows(file: Callable[..., str], name: str) -> None:
    path = file(name, TABLES[name])
    found = document(path)
    assert found.kind in ("jsonl", "csv", "parquet")
    ids = [str(row["id"]) if found.kind == "csv" else row["id"] for row in ROWS]
    parts = cited(found)
    assert [place for place, _ in parts] == [{"row": i, "id": id} for i, id in enumerate(ids, 1)]
    assert "".join(part for _, part in parts) == "\n".join(str(row["text"]) for row in ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_each_row_is_a_document(file: Callable[..., str], name: str) -> None:
    path = file(name, TABLES[name])
    found = list(documents([path], rows=True))
    assert [d.name for d in found] == [f"{path}#{i}" for i in range(1, len(ROWS) + 1)]
    assert {(d.kind, d.reopenable) for d in found} == {("row", True)}
    for row, d in zip(ROWS, found, strict=True):
        assert str(d.id) == str(row["id"])
        assert d.place == {"row": row["id"], "id": d.id}
        assert read(d) == read(d) == row["text"]
        with d.text() as text:
            next(text)
            assert text.place(3) == d.place


def test_rows_of_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TABLES["a.jsonl.gz"])))
    found = list(documents(["-"], name="piped", text_column="text", rows=True))
    assert [(d.name, read(d)) for d in found] == [(f"piped#{row['id']}", row["text"]) for row in ROWS]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"plain text")))
    (one,) = documents(["-"], name="piped", rows=True)
    assert (one.name, read(one)) == ("piped", "plain text")


def test_columns(file: Callable[..., str]) -> None:
    path = file("a.jsonl", json_lines([{"uid": "x1", "body": "one", "text": "two"}, {"uid": [1], "body": "é"}]))
    assert read(document(path, text_column="body")) == "one\né"
    first, second = documents([path], text_column="body", id_column="uid", rows=True)
    assert (first.id, second.id) == ("x1", "[1]")
    assert read(file("b.jsonl", json_lines([{"id": "a", "body": "the only text", "n": 2}]))) == "the only text"
    assert read(document(file("c.jsonl", json_lines([{"k": "a", "v": "b"}])), id_column="k", text_column="v")) == "b"


def test_a_named_column_makes_a_table_of_a_text(file: Callable[..., str]) -> None:
    lines = file("events.log", json_lines([{"message": "one"}, {"message": "two"}]))
    assert read(lines).startswith('{"message"'), "a log of JSON is text as long as nobody says otherwise"
    assert read(document(lines, text_column="message")) == "one\ntwo"
    assert read(document(file("x", b"n|message\n1|one\n"), text_column="message")) == "one"
    assert read(document(file("notes.txt", b"no message here"), text_column="message")) == "no message here"


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        (
            "a.csv",
            b"a,b\n1,2\n",
            {},
            "expected a column 'text', or one alone that holds text, found columns a, b; name it",
        ),
        (
            "a.csv",
            b"a,text\n1,2\n",
            {"text_column": "x"},
            "expected a column 'x', found columns a, text; check --text-column",
        ),
        (
            "a.csv",
            b"a,text\n1,2\n",
            {"id_column": "x"},
            "expected a column 'x', found columns a, text; check --id-column",
        ),
        ("a.jsonl", json_lines([{"a": "x", "b": "y"}]), {}, "expected a column 'text', or one alone that holds text"),
        (
            "a.jsonl",
            json_lines([{"a": 1}] * 3),
            {"text_column": "x"},
            "expected a column 'x', found columns a; check --text-column",
        ),
        ("a.jsonl", b"not\njson\n", {}, "expected rows, found 2 that are none; the first is row 1: expected JSON"),
        ("a.parquet", parquet({"a": [1], "b": [2]}), {}, "expected a column 'text', or one alone"),
        (
            "a.parquet",
            parquet({"a": [1], "b": ["x"]}),
            {"text_column": "a"},
            "expected text in column 'a', found int64",
        ),
    ],
)
def test_columns_that_are_not_there(
    file: Callable[..., str], name: str, data: bytes, options: dict[str, str], message: str
) -> None:
    assert re.search(message, error(document(file(name, data), **options)))  # type: ignore[arg-type]


BAD_ROWS = (
    b'{"id": 1, "text": "good"}\n\nnot json\n["text"]\n{"id": 4}\n{"id": 5, "text": null}\n{"id": 6, "text": 7}\n'
    + b"[" * 100_000
    + b'\n{"id": 8, "text": "\\ud800 fine"}\n{"id": 9, "text": "cut'
)


def test_bad_rows_are_left_out_and_told_of(file: Callable[..., str]) -> None:
    path = file("a.jsonl", BAD_ROWS)
    with document(path).text() as text:
        assert b"".join(text).decode() == "good\n\ufffd fine"
        assert text.replaced_bytes == 1
        losses = [str(loss) for loss in text.losses]
    assert losses[0].startswith(f"reading '{path}', row 2: expected JSON, found an error")
    assert [re.search(r"row \d+", loss)[0] for loss in losses] == [f"row {i}" for i in (2, 3, 4, 6, 7, 9)]  # type: ignore[index]


def test_a_bad_row_is_a_document_that_fails(file: Callable[..., str]) -> None:
    found = list(documents([file("a.jsonl", BAD_ROWS)], rows=True))
    assert [d.place["row"] for d in found] == list(range(1, 10))
    assert [read(found[i]) for i in (0, 4, 7)] == ["good", "", "\ufffd fine"]
    for i, message in (
        (1, "expected JSON"),
        (2, "expected a JSON object, found an array"),
        (3, "expected a column 'text', found columns id"),
        (5, "expected text in column 'text', found a number"),
        (6, "expected JSON"),
        (8, "expected JSON"),
    ):
        assert re.search(rf"reading '.*a\.jsonl#{i + 1}': {message}", error(found[i]))


def test_csv_with_odd_rows(file: Callable[..., str]) -> None:
    data = b'id,text,x\n1,"a ""b""\r\nc",\n2,short\n3,too,long,row\n4,"""",\n5\n'
    text, losses = reading(file("a.csv", data))
    assert text == 'a "b"\r\nc\nshort\n"'
    assert [loss.partition("', ")[2] for loss in losses] == [
        "row 3: expected 3 columns, found 4",
        "row 5: expected 3 columns, found 1",
    ]


def test_rows_without_end(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.tables.ROW_BYTES", 200_000)
    long = file("a.jsonl", b'{"text": "' + b"x" * 900_000 + b'"}\n{"text": "ok"}\n')
    assert read(long) == "ok"
    first, second = documents([long], rows=True)
    assert "a.jsonl#1': expected at most" in error(first) and read(second) == "ok"
    path = file("one line.csv", b"id,text\n1,ok\n2," + b"," * 400_000 + b"\n3,fine\n")
    text, (loss,) = reading(path)
    assert text == "ok\nfine" and "row 2: expected a row of at most" in loss
    row, lost, last = documents([path], rows=True)
    assert (read(row), read(last)) == ("ok", "fine")
    assert lost.name == f"{path}#2" and "expected a row of at most" in error(lost)


def test_a_damaged_table_ends_with_a_document_that_fails(file: Callable[..., str]) -> None:
    data = gzip.compress(json_lines({"id": i, "text": random.Random(i).randbytes(99).hex()} for i in range(2000)))
    *rows, last = documents([file("a.jsonl.gz", data[: len(data) // 2])], rows=True)
    assert len(rows) > 500 and all(read(d) for d in rows[::50])
    assert "ends too early" in error(last)


# ---- archives ----

MEMBERS = {
    "notes/b.txt": b"second in the alphabet, first here",
    "a.md": PROSE.encode(),
    "notes/": b"",
    "empty.txt": b"",
    ".hidden.txt": b"no",
    "__MACOSX/a.md": b"no",
    "picture.png": PNG,
    "old.log.gz": gzip.compress(b"packed twice"),
    "table.jsonl": json_lines([{"text": "r1", "id": "x"}, {"text": "r2", "id": "y"}]),
}
EXPECTED = {
    "notes/b.txt": "second in the alphabet, first here",
    "a.md": PROSE,
    "old.log.gz": "packed twice",
    "table.jsonl": "r1\nr2",
}
ARCHIVES: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "a.zip": zipped,
    "a.tar": tarred,
    "a.tar.gz": lambda members: tarred(members, "w:gz"),
    "a.tgz": lambda members: tarred(members, "w:gz"),
    "a.tar.xz": lambda members: tarred(members, "w:xz"),
    "no name": lambda members: tarred(members, "w:bz2"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_are_documents(file: Callable[..., str], name: str) -> None:
    path = file(name, ARCHIVES[name](MEMBERS))
    found = list(documents([path]))
    assert {d.name: read(d) for d in found} == {f"{path}/{member}": text for member, text in EXPECTED.items()}
    assert [d.name for d in found] == [f"{path}/{member}" for member in EXPECTED], "in the order of the archive"
    assert {d.reopenable for d in found} == {True}
    for d in [*found, *reversed(found)]:
        assert read(d) == EXPECTED[d.name.removeprefix(path + "/")], "in any order, any number of times"
    assert cited(found[-1]) == [({"row": 1, "id": "x"}, "r1\n"), ({"row": 2, "id": "y"}, "r2")]
    assert [d.name for d in documents([path], rows=True)][-2:] == [f"{path}/table.jsonl#1", f"{path}/table.jsonl#2"]
    renamed = [d.name for d in documents([path], name="mine")]
    assert renamed == [f"mine/{member}" for member in EXPECTED]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_members_in_order_cost_one_pass(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = file(name, ARCHIVES[name]({f"{i}.txt": random.Random(i).randbytes(8000).hex().encode() for i in range(60)}))
    n_opened = 0
    original = Path.open

    def counted(self: Path, *arguments: Any, **options: Any) -> Any:
        nonlocal n_opened
        n_opened += str(self) == path
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", counted)
    for d in list(documents([path])):
        with d.text() as text:
            next(text)  # the rest of a member is left
    assert n_opened == 3, "once for its names, once to list it, once to read it"


def test_members_from_several_threads(file: Callable[..., str]) -> None:
    paths = [
        file(name, ARCHIVES[name]({f"{i}": f"{name} {i}".encode() for i in range(40)}))
        for name in ("a.zip", "a.tar.gz")
    ]
    found = list(documents(paths))
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = found[:]
        random.Random(seed).shuffle(order)
        wrong.extend(d.name for d in order if read(d) != f"{Path(d.path or '').name} {d.name.rpartition('/')[2]}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_archive_that_changes_between_readings(file: Callable[..., str]) -> None:
    path = file("a.zip", zipped({"a.txt": b"old"}))
    (found,) = documents([path])
    assert read(found) == "old"
    file("a.zip", zipped({"a.txt": b"new text"}))
    assert read(found) == "new text"
    file("a.zip", zipped({}))
    assert "expected whole data, found damage" in error(found)


def test_documents_can_be_sent_to_another_process(file: Callable[..., str]) -> None:
    paths = [file("a.zip", zipped(MEMBERS)), file("a.jsonl", TABLES["a.jsonl"]), file("a.txt", b"text")]
    found = list(documents(paths, rows=True))
    assert [read(d) for d in pickle.loads(pickle.dumps(found))] == [read(d) for d in found]


def test_archives_in_archives(file: Callable[..., str]) -> None:
    inner = {"x.txt": b"inner", "deeper.tar": tarred({"y.txt": b"too deep"})}
    path = file(
        "a.tar.gz", tarred({"in.zip": zipped(inner), "in.tar.gz": tarred(inner, "w:gz"), "z.txt": b"last"}, "w:gz")
    )
    found = {d.name.removeprefix(path + "/"): d for d in documents([path])}
    assert list(found) == ["in.zip/x.txt", "in.zip/deeper.tar", "in.tar.gz/x.txt", "in.tar.gz/deeper.tar", "z.txt"]
    for name in ("in.zip/deeper.tar", "in.tar.gz/deeper.tar"):
        assert "expected an archive in an archive at the most, found a deeper one" in error(found[name])
    for name, text in (
        ("in.zip/x.txt", "inner"),
        ("in.tar.gz/x.txt", "inner"),
        ("z.txt", "last"),
        ("in.zip/x.txt", "inner"),
    ):
        assert read(found[name]) == text


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_names_that_lead_out_of_an_archive(
    file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [
        "../escaped.txt",
        "/tmp/escaped.txt",
        "a/../../escaped.txt",
        "..\\escaped.txt",
        "C:\\escaped.txt",
        "a\nb",
        "x" * 1001,
    ]
    path = file(name, ARCHIVES[name](dict.fromkeys(bad, b"evil") | {"good..txt": b"good"}))
    before = sorted(tmp_path.rglob("*"))
    *failing, good = documents([path])
    assert read(good) == "good"
    assert len(failing) == len(bad)
    for found in failing:
        assert "expected a path below the archive's own folder, found another" in error(found)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.txt").exists()


def test_links_and_holes_in_an_archive(file: Callable[..., str], tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for type, target in (
            (tarfile.SYMTYPE, "/etc/passwd"),
            (tarfile.LNKTYPE, "/etc/passwd"),
            (tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(f"link{type.decode()}")
            info.type, info.linkname = type, target
            archive.addfile(info)
        info = tarfile.TarInfo("plain.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    hard, found = documents([file("a.tar", packed.getvalue())])
    assert "expected '/etc/passwd' before it in the archive, found none to link to" in error(hard)
    assert (Path(found.name).name, read(found)) == ("plain.txt", "text")
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive_:
        archive_.writestr(link, "/etc/passwd")
        archive_.writestr("plain.txt", "text")
    (found,) = documents([file("a.zip", packed.getvalue())])
    assert Path(found.name).name == "plain.txt"


def test_a_name_twice_in_a_zip(file: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = zipped([("a.txt", b"one"), ("a.txt", b"two")])
    with caplog.at_level(logging.WARNING):
        (found,) = documents([file("a.zip", data)])
    assert read(found) == "two"
    assert "holds 'a.txt' more than once; the last is read" in caplog.text


def test_a_zip_with_a_password(file: Callable[..., str]) -> None:
    data = bytearray(zipped({"a.txt": b"secret", "b.txt": b"open"}))
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1
    locked, free = documents([file("a.zip", bytes(data))])
    assert "expected an archive without a password" in error(locked)
    assert read(free) == "open"


def test_an_archive_without_text(file: Callable[..., str], tmp_path: Path) -> None:
    path = file("x/a.zip", zipped({"picture.png": PNG, "b.zip": zipped({})}))
    assert "expected a ZIP archive with text, found none in it" in error(document(path))
    with pytest.raises(InputError, match="expected a folder with text, found none"):
        list(documents([str(tmp_path / "x")]))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.9])
def test_an_archive_that_breaks_off(file: Callable[..., str], name: str, keep: float) -> None:
    members = {f"{i}.txt": random.Random(i).randbytes(3000).hex().encode() for i in range(20)}
    data = ARCHIVES[name](members)
    found = list(documents([file(name, data[: int(len(data) * keep)])]))
    n_read = 0
    for d in found:
        text, losses = reading(d)
        if losses:
            assert re.search("expected a? ?whole|ends too early", losses[0])
            assert not text or members[Path(d.name).name].startswith(text.encode())
        else:
            assert text.encode() == members[Path(d.name).name]
            n_read += 1
    assert n_read < 20 and n_read in (len(found) - 1, len(found) - 2)


def test_a_tar_with_a_damaged_header(file: Callable[..., str]) -> None:
    data = bytearray(tarred({"a.txt": b"first", "b.txt": b"second"}))
    data[1024 + 100] ^= 0x55
    first, rest = documents([file("a.tar", bytes(data))])
    assert read(first) == "first"
    assert "expected a whole tar archive, found damage (an end without the mark of one)" in error(rest)


def test_a_member_that_is_damaged(file: Callable[..., str]) -> None:
    data = bytearray(zipped({"a.txt": random.Random(0).randbytes(500).hex().encode(), "b.txt": b"whole"}))
    data[200] ^= 0x55
    damaged, whole = documents([file("a.zip", bytes(data))])
    assert "expected" in error(damaged)
    assert read(whole) == "whole"


def test_one_document_of_an_archive(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(document(file("a.zip", zipped({"only.txt": b"text"})))) == "text"
    with pytest.raises(UsageError, match="expected one document, found several"):
        document(file("b.zip", zipped(MEMBERS)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(zipped(MEMBERS))))
    assert "expected one text, found a ZIP archive; pass it as a file" in error(document("-", name="x"))


# ---- WARC ----

PAGE = f"<html><head><title>no</title></head><h1>Lamps</h1><p>{PROSE}</p></html>".encode()
CRAWL = [
    record("", b"software: x\r\n", type="warcinfo"),
    record("http://e.org/", PAGE),
    record("http://e.org/", b"GET / HTTP/1.1\r\n\r\n", type="request"),
    record("http://e.org/gone", b"<html>gone", status="404 Not Found"),
    record("http://e.org/p.png", PNG),
    record("http://e.org/gz", gzip.compress(PAGE), headers=[("Content-Encoding", "gzip")]),
    record("http://e.org/deflate", zlib.compress(PAGE), headers=[("Content-Encoding", "deflate")]),
    record(
        "http://e.org/chunks", b"5\r\n<html\r\n6\r\n>chunk\r\n0\r\n\r\n", headers=[("Transfer-Encoding", "chunked")]
    ),
    record(
        "http://e.org/ru",
        "<html>Все семьи".encode("cp1251"),
        headers=[("Content-Type", "text/html; charset=windows-1251")],
    ),
    record("http://e.org/", b"plain text of it", type="conversion"),
    record("http://e.org/empty", b""),
]
SEEN = [
    (2, "http://e.org/", f"Lamps\n\n{PROSE}"),
    (6, "http://e.org/gz", f"Lamps\n\n{PROSE}"),
    (7, "http://e.org/deflate", f"Lamps\n\n{PROSE}"),
    (8, "http://e.org/chunks", "chunk"),
    (9, "http://e.org/ru", "Все семьи"),
    (10, "http://e.org/", "plain text of it"),
]


@web
@pytest.mark.parametrize(
    "pack",
    [b"".join, lambda crawl: b"".join(map(gzip.compress, crawl)), lambda crawl: gzip.compress(b"".join(crawl))],
    ids=["plain", "a member a record", "one member"],
)
def test_records_are_documents(file: Callable[..., str], pack: Callable[[list[bytes]], bytes]) -> None:
    path = file("a.warc", pack(CRAWL))
    found = list(documents([path]))
    assert [(d.name, d.id, read(d)) for d in found] == [(f"{path}#{n}", uri, text) for n, uri, text in SEEN]
    for d, (_, _, text) in reversed(list(zip(found, SEEN, strict=True))):
        assert read(d) == text
    assert cited(found[0])[0] == ({"id": "http://e.org/", "chapter": "Lamps"}, f"Lamps\n\n{PROSE}")
    assert cited(found[-1])[0][0] == {"id": "http://e.org/", "line": 1}


@web
def test_records_that_cannot_be_read(file: Callable[..., str]) -> None:
    crawl = [record("http://e.org/br", b"x", headers=[("Content-Encoding", "br")]), record("http://e.org/", PAGE)]
    brotli, page = documents([file("a.warc", b"".join(crawl))])
    assert "expected a body that is plain, or packed with gzip, found 'br'" in error(brotli)
    assert read(page)


@web
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) - 60], "damage"),
        (lambda data: data[: len(data) - 10], "expected a whole WARC file, found that it ends too early"),
        (lambda data: data.replace(b"Content-Length: 16\r", b"Content-Length: 12\r"), "record 10 has a wrong length"),
        (lambda data: data.replace(b"Content-Length: 16\r", b"Content-Length: x6\r"), "found damage"),
        (lambda data: data + b"WARC/1.0\r\n" + b"x" * 3_000_000, "a header of more than 1 MiB"),
        (lambda data: data + b"nonsense\r\n\r\n", "found damage"),
    ],
)
def test_damaged_records(
    file: Callable[..., str], capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], message: str
) -> None:
    path = file("a.warc", damage(b"".join(CRAWL[:10])))
    *found, last = documents([path])
    assert [read(d) for d in found[:5]] == [text for _, _, text in SEEN[:5]]
    assert last.name == path and re.search(message, error(last))
    assert capfd.readouterr().err == ""


# ---- remote files ----


@remote
def test_urls(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in {
        "b.txt": b"two",
        "a.jsonl.gz": gzip.compress(TABLES["a.jsonl"]),
        "sub/c.zip": zipped(MEMBERS),
        "p.png": PNG,
    }.items():
        memory.pipe(f"/formats/{name}", data)
    root = "memory://formats"
    assert read(f"{root}/b.txt") == "two"
    found = list(documents([root]))
    assert [d.name for d in found] == [
        "memory:///formats/a.jsonl.gz",
        "memory:///formats/b.txt",
        *(f"memory:///formats/sub/c.zip/{member}" for member in EXPECTED),
    ]
    assert [read(d) for d in found[2:]] == list(EXPECTED.values())
    assert {d.reopenable for d in found} == {True}
    assert cited(found[0])[3][0] == {"row": 4, "id": 4}
    assert [read(d) for d in documents([f"{root}/*.txt"])] == ["two"]
    with found[1].text() as text:
        assert (b"".join(text), text.raw_bytes_read, text.raw_size) == (b"two", 3, 3)
    memory.rm("/formats", recursive=True)
    assert "expected a readable file, found: FileNotFoundError" in error(found[1])
    with pytest.raises(InputError, match="with text, found none"):
        list(documents([f"{root}/*.txt"]))


ARC = [
    arc_record("filedesc://a.arc", b"1 0 InternetArchive\nURL IP-address Archive-date Content-type Archive-length\n"),
    arc_record("http://e.org/", b"<p>first page<script>no</script>"),
    arc_record("http://e.org/none", b"<p>not found", "404 Not Found"),
    arc_record("dns:e.org", b"20040102030405\ne.org. 1 IN A 1.2.3.4\n"),
    arc_record("https://e.org/b", b"<p>second page"),
]


@pytest.mark.parametrize("pack", [b"".join, lambda records: b"".join(map(gzip.compress, records))])
def test_arc_the_older_form_of_warc(file: Callable[..., str], pack: Callable[[list[bytes]], bytes]) -> None:
    found = list(documents([file("a.arc", pack(ARC))]))
    assert [(d.name.rpartition("/")[2], d.id, read(d)) for d in found] == [
        ("a.arc#2", "http://e.org/", "first page"),
        ("a.arc#5", "https://e.org/b", "second page"),
    ]


def test_a_record_of_arc_with_a_wrong_length(file: Callable[..., str]) -> None:
    path = file("a.arc", b"".join(ARC).replace(b"first page", b"first and longer page"))
    *found, damaged = documents([path])
    assert [read(d) for d in found][-1] == "second page"
    assert "record 2 has a wrong length" in error(damaged)


@remote
def test_urls_that_lead_nowhere() -> None:
    for url, message in (
        ("nosuch://x/y", "expected a URL that fsspec knows"),
        ("memory://formats/missing.txt", "found: FileNotFoundError"),
        ("http://127.0.0.1:9/x.txt", "expected a readable file, found: "),
    ):
        with pytest.raises(InputError, match=message):
            read(url)


@books
@remote
def test_a_remote_book(tmp_path: Path) -> None:
    (tmp_path / "book.epub").write_bytes(epub(CHAPTERS, contents=CONTENTS))
    (tmp_path / "a.pdf").write_bytes(pdf([["page one"]]))
    assert cited(f"file://{tmp_path}/book.epub") == BOOK
    assert cited(f"file://{tmp_path}/a.pdf") == [({"page": 1}, "page one")]


# ---- extras ----


@pytest.mark.parametrize(
    ("module", "name", "data", "message"),
    [
        ("lxml.etree", "a.html", b"<html><p>x", r"package lxml, found none; pip install 'rwkv-stream\[books\]'"),
        ("lxml.etree", "a.epub", epub(CHAPTERS), r"package lxml, .*rwkv-stream\[books\]'"),
        ("pypdf", "a.pdf", pdf([["x"]]), r"package pypdf, .*rwkv-stream\[books\]'"),
        (
            "lxml.etree",
            "a.docx",
            zipped({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x/>"}),
            "package lxml",
        ),
        ("warcio.statusandheaders", "a.warc", b"".join(CRAWL), r"package warcio, .*rwkv-stream\[web\]'"),
    ],
)
def test_what_is_not_installed(
    file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, module: str, name: str, data: bytes, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert re.search(message, error(file(name, data)))


def test_fsspec_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(InputError, match=r"package fsspec, .*rwkv-stream\[remote\]'"):
        document("s3://bucket/x.txt")


# ---- hostile files ----

ENTITIES = (
    '<!DOCTYPE html [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;"><!ENTITY f SYSTEM "file:///etc/passwd">]>'
)


def entity_book(encoding: str = "utf-8") -> bytes:
    chapter = xhtml("<p>&b;&f;</p>").decode().replace("<!DOCTYPE html>", ENTITIES).replace("utf-8", encoding)
    return epub({"a.xhtml": chapter.encode(encoding)})


def bomb(pack: Any, n_mib: int = 3) -> bytes:
    block = b"x" * 2**20
    return b"".join(pack.compress(block) for _ in range(n_mib)) + bytes(pack.flush())


def entity_document() -> bytes:
    packed = zipfile.ZipFile(io.BytesIO(docx(["text"])))
    parts = {name: packed.read(name) for name in packed.namelist()}
    parts["word/document.xml"] = parts["word/document.xml"].replace(
        b"?>", b"?>" + ENTITIES.replace("html", "w:document").encode(), 1
    )
    return zipped(parts)


def locked_pdf() -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf([["secret"]]))))
    writer.encrypt("password", algorithm="RC4-128")
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def locked_book() -> bytes:
    encryption = (
        b'<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><EncryptedData><CipherData>'
        b'<CipherReference URI="OEBPS/a.xhtml"/></CipherData></EncryptedData></encryption>'
    )
    return epub({"a.xhtml": b"\x93\x01garbage"}, others={"META-INF/encryption.xml": encryption})


HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "gzip bomb": ("a.txt", lambda: bomb(zlib.compressobj(9, zlib.DEFLATED, 31)), "a decompression bomb; unpack it"),
    "bzip2 bomb": ("a.bz2", lambda: bomb(bz2.BZ2Compressor()), "a decompression bomb"),
    "epub bomb": ("a.epub", lambda: epub({"a.xhtml": xhtml("<p>" + "x" * 3_000_000)}), "a decompression bomb"),
    "docx bomb": (
        "a.docx",
        lambda: zipped({"[Content_Types].xml": b"<x/>", "word/document.xml": b" " * 3_000_000}),
        "a decompression bomb",
    ),
    "pdf bomb": ("a.pdf", lambda: pdf([deflated([b" " * 2**20] * 80)]), "damage (LimitReachedError"),
    "entities": ("a.epub", entity_book, "expected XML without entities of its own, found such in 'OEBPS/a.xhtml'"),
    "entities in UTF-16": ("a.epub", lambda: entity_book("utf-16"), "expected XML without entities of its own"),
    "entities in DOCX": ("a.docx", entity_document, "expected XML without entities of its own, found such in 'word/"),
    "PDF with a password": ("a.pdf", locked_pdf, "expected a PDF without a password, found one"),
    "EPUB with a lock": ("a.epub", locked_book, "expected an EPUB without copy protection, found encrypted chapters"),
    "PDF of pictures": ("a.pdf", lambda: pdf([[], []]), "expected a PDF with text, found 2 pages without any"),
    "EPUB that is text": ("a.epub", lambda: b"no book", "expected an EPUB, as its name says, found plain text"),
    "PDF that is text": ("a.pdf", lambda: b"no book", "expected a PDF document, as its name says, found plain text"),
    "EPUB that is cut": ("a.epub", lambda: epub(CHAPTERS)[:500], "expected a whole ZIP archive, found damage"),
    "PDF that is cut": ("a.pdf", lambda: pdf([["x"]])[:200], "expected a whole PDF document, found damage"),
    "Parquet that is cut": (
        "a.parquet",
        lambda: TABLES["a.parquet"][:600],
        "expected a whole Parquet table, found damage",
    ),
    "EPUB without chapters": ("a.epub", lambda: epub({}), "expected chapters in the spine"),
    "EPUB that leads out": (
        "a.epub",
        lambda: zipped({"META-INF/container.xml": b'<c xmlns="x"><rootfile full-path="../../etc/passwd"/></c>'}),
        "expected '../../etc/passwd' in it, found none",
    ),
    "EPUB with a huge chapter": (
        "a.epub",
        lambda: epub({"a.xhtml": xhtml("<p>" + random.Random(0).randbytes(700_000).hex())}),
        "expected 'OEBPS/a.xhtml' to have at most 1 MiB",
    ),
    "page without end": ("a.html", lambda: b"<html>" + b"<p>x" * 300_000, "damage (more than 1 MiB)"),
    "page of one comment": ("a.html", lambda: b"<html><!--" + b"x" * 5_000_000, "a tag or comment of over"),
    "page of one tag": ("a.html", lambda: b"<html><p title='" + b"x" * 5_000_000, "a tag or comment of over"),
    "spreadsheet": (
        "a.xlsx",
        lambda: zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""}),
        "an Excel workbook",
    ),
    "OpenDocument": ("a.odt", lambda: zipped({"mimetype": b"x", "content.xml": b""}), "found an OpenDocument file"),
}


@books
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(
    file: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.streams.FREE_BYTES", 2**20)
    if "huge" in name:
        monkeypatch.setattr("rwkv_stream.text.readers.epub.zip_part.__defaults__", (2**20,))
    if "page" in name:
        monkeypatch.setattr("rwkv_stream.text.readers.markup.PAGE_BYTES", 2**20)
        monkeypatch.setattr("rwkv_stream.text.readers.markup.PART_BYTES", 2**18)
    path = file(HOSTILE[name][0], HOSTILE[name][1]())
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    message = error(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert HOSTILE[name][2] in message and path in message
    assert peak < (36_000_000 if "page" in name else 180_000_000)
    assert "root:" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_of_a_bomb(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.streams.FREE_BYTES", 2**20)
    path = file("a.tar.gz", tarred({"a.txt": b"good", "b.txt": b"x" * 3_000_000, "c.txt": b"never reached"}, "w:gz"))
    good, bad, rest = documents([path])
    assert read(good) == "good"
    assert "a decompression bomb" in error(bad)
    assert rest.name == path and "a decompression bomb" in error(rest)


def test_a_zip_of_a_bomb(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.streams.FREE_BYTES", 2**20)
    (found,) = documents([file("a.zip", zipped({"a.txt": b"good", "b.txt": b"x" * 3_000_000}))])
    assert "a decompression bomb" in error(found)


def test_what_is_only_very_compressible_is_read(file: Callable[..., str]) -> None:
    """Up to 64 MiB nothing is called a bomb."""
    assert read(file("a.txt", gzip.compress(b"x" * 2**25))) == "x" * 2**25


def test_a_large_file_that_must_be_jumped_about_in(file: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.streams.SPOOL_BYTES", 10_000)
    members = {"a.txt": random.Random(0).randbytes(20_000).hex().encode()}
    (whole,) = documents([file("a.zip", zipped(members))])
    assert len(read(whole)) == 40_000, "a file is jumped about in where it is"
    assert "where the whole file is needed, found more" in error(
        document(file("a.zip.gz", gzip.compress(zipped(members))))
    )


SEEDS: dict[str, Callable[[], bytes]] = {
    "a.epub": lambda: epub(CHAPTERS, contents=CONTENTS),
    "a.pdf": lambda: pdf([["page one"] * 5, ["page two"]]),
    "a.docx": lambda: docx([("Heading 1", "One"), PROSE, [["a", "b"]]]),
    "a.zip": lambda: zipped(MEMBERS),
    "a.tar.gz": lambda: tarred(MEMBERS, "w:gz"),
    "a.tar": lambda: tarred(MEMBERS),
    "a.warc": lambda: b"".join(CRAWL),
    "a.arc": lambda: b"".join([*ARC, arc_record("http://e.org/c", f"<p>{PROSE}".encode())]),
    "a.parquet": lambda: TABLES["a.parquet"],
    "a.csv": lambda: TABLES["a.csv"],
    "a.jsonl": lambda: TABLES["a.jsonl"],
    "a.html": lambda: PAGE * 5,
}


def mutated(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    if rng.random() < 0.3:
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.choice([1, 2, 20])):
        at = rng.randrange(len(out))
        match rng.randrange(4):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(b"\x00\x7f\x80\xff<>\n")
            case 2:
                del out[at : at + rng.randrange(20)]
            case _:
                out[at:at] = rng.randbytes(5)
        if not out:
            break
    return bytes(out)


@books
@web
@pytest.mark.parametrize("name", SEEDS)
def test_damage_is_an_input_error_and_nothing_else(
    file: Callable[..., str], pytestconfig: pytest.Config, name: str
) -> None:
    rng = random.Random(name)
    data = SEEDS[name]()
    parts = dict(zip_parts(data)) if name in ("a.epub", "a.docx") else {}
    n_failed = 0
    for _ in range(1000 if pytestconfig.getoption("--all-moments") else 60):
        changed = mutated(rng, data)
        if parts and rng.random() < 0.7:  # behind the checksums
            part = rng.choice([part for part in parts if part.endswith(("ml", ".opf", ".rels")) and parts[part]])
            changed = zipped({**parts, part: mutated(rng, parts[part])})
        for found in documents([file(name, changed)], rows=rng.random() < 0.3):
            try:
                read(found)
            except InputError as failure:
                n_failed += 1
                assert len(str(failure).splitlines()) == 1
    assert n_failed


def zip_parts(data: bytes) -> Iterable[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        for name in packed.namelist():
            yield name, packed.read(name)


# ---- memory ----


def peak_of(work: Callable[[], int]) -> tuple[int, int]:
    tracemalloc.start()
    result = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


def large(name: str, n: int) -> bytes:
    """A file with some n kilobytes of text."""
    line = PROSE * 16 + "\n"
    if name == "a.jsonl":
        return json_lines({"id": i, "text": line} for i in range(n))
    if name == "a.csv":
        return b"id,text\n" + b"".join(f'{i},"{line}"\n'.encode() for i in range(n))
    if name == "a.tar":
        return tarred({"a.txt": line.encode() * n})
    if name == "a.warc":
        return record("http://e.org/", line.encode() * n, headers=())
    if name == "a.zip":
        return zipped({"a.txt": line.encode() * n})
    return epub({f"{i}.xhtml": xhtml(f"<p>{line}</p>" * 20) for i in range(n // 20)})


def n_bytes_of(path: str, rows: bool) -> int:
    n_bytes = 0
    for found in documents([path], rows=rows):
        with found.text() as text:
            for piece in text:
                assert len(piece) <= 65_540
                n_bytes += len(piece)
    return n_bytes


@books
@web
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, False) for name in ("a.jsonl", "a.csv", "a.tar", "a.warc", "a.zip", "a.epub")),
        ("a.jsonl", True),
        ("a.csv", True),
    ],
)
def test_memory_does_not_grow_with_the_file(file: Callable[..., str], name: str, rows: bool) -> None:
    peaks = []
    for n in (1500, 6000):
        path = file(name, large(name, n))
        n_bytes, peak = peak_of(partial(n_bytes_of, path, rows))
        assert n_bytes > n * 900
        peaks.append(peak)
    assert peaks[1] < peaks[0] * 1.2 + 500_000
    assert peaks[1] < 8_000_000


def test_memory_of_a_parquet_table(file: Callable[..., str]) -> None:
    import pyarrow as pa

    def at_most(n_rows: int) -> int:
        path = file("a.parquet", parquet({"id": range(n_rows), "text": [f"{i}" * 100 for i in range(n_rows)]}, 100_000))
        low = pa.total_allocated_bytes()
        high = 0
        for i, _ in enumerate(documents([path], rows=True)):
            if i % 100 == 0:
                high = max(high, pa.total_allocated_bytes())
        return high - low

    assert at_most(80_000) < at_most(10_000) + 12_000_000


# ---- ingest and score ----


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> Iterator[Callable[..., Ended]]:
    """The program, in an empty folder with a store."""
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "formats.store"))
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield program
    for number, handler in handlers.items():
        signal.signal(number, handler)


@books
@web
@pytest.mark.parametrize("name", SEEDS)
def test_a_reading_goes_on_whatever_the_format(
    file: Callable[..., str], bytes_model: Any, tmp_path: Path, name: str
) -> None:
    """Stopped after some tokens and run again, each document is proven by its bytes and ends like one read at once."""
    once, twice = (Store(tmp_path / store, create=True) for store in ("once", "twice"))
    found = [d for d in documents([file(name, SEEDS[name]())]) if len(read(d)) > 30]
    assert found
    for d in found:
        chunk = max(8, len(read(d)) // 8)
        reading = partial(ingest, d, model=bytes_model, chunk=chunk, snapshot_every=chunk)
        whole = reading(store=once)
        reading(store=twice, max_tokens=2 * chunk + 3)
        rest = reading(store=twice)
        assert (rest.snapshot, rest.bytes) == (whole.snapshot, len(read(d).encode()))
        assert rest.resumed_from_token >= 2 * chunk, "from there, or further where another document says the same"
        again = reading(store=twice)
        assert again.snapshot == whole.snapshot
        assert again.resumed_from_token == again.tokens == whole.tokens


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a.parquet", "pyarrow.parquet.ParquetFile"),
        ("a.zip", "zipfile.ZipExtFile.read1"),
        pytest.param("a.pdf", "pypdf.PdfReader", marks=books),
        pytest.param("a.html", "rwkv_stream.text.readers.markup.Prose.data", marks=books),
    ],
)
def test_an_interruption_is_no_damage(
    file: Callable[..., str], monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    found = next(documents([file(name, SEEDS[name]())]))

    def interrupted(*_: object, **__: object) -> None:
        raise StoppedError("interrupted", signal.SIGTERM)

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(StoppedError):
        read(found)


@books
def test_ingest_of_good_and_bad_files(run: Callable[..., Ended], file: Callable[..., str]) -> None:
    file("in/book.epub", epub(CHAPTERS, contents=CONTENTS))
    file("in/bad.pdf", pdf([[], []]))
    file("in/bad.epub", b"no book")
    file("in/c.zip", zipped({"../evil": b"evil", "fine.txt": b"fine text"}))
    file("in/table.csv", b"n,body,mark\n1,first row,x\n2,second row,y\n")
    ended = run("ingest", "in", "--text-column", "body", "--id-column", "mark", "--json")
    assert ended.code == 3
    done = {report["document"]: report["bytes"] for report in map(json.loads, ended.out.splitlines())}
    assert done == {
        "in/book.epub": len(read("in/book.epub").encode()),
        "in/c.zip/fine.txt": 9,
        "in/table.csv": len("first row\nsecond row"),
    }
    lines = ended.err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert "3 of 6 documents failed; the rest are read" in lines[-1]
    for line, said in zip(lines, ("in/bad.epub", "in/bad.pdf", "in/c.zip/../evil"), strict=False):
        assert f"reading '{said}': expected" in line
    assert run("ingest", "in/bad.pdf").code == 1
    assert run("ingest", "in/table.csv").code == 1


@books
def test_score_of_good_and_bad_files(run: Callable[..., Ended], file: Callable[..., str]) -> None:
    import pyarrow.parquet as pq

    file("in/a.jsonl", TABLES["a.jsonl"])
    file("in/bad.pdf", pdf([[], []]))
    file("in/c.zip", zipped({"one.txt": b"one\n", "two.txt": b"two\n"}))
    ended = run("score", "in", "-o", "out.parquet", "--json")
    assert ended.code == 3
    names = ["in/a.jsonl", "in/c.zip/one.txt", "in/c.zip/two.txt"]
    assert [json.loads(line)["document"] for line in ended.out.splitlines()] == names
    assert "error: reading 'in/bad.pdf': expected a PDF with text" in ended.err
    assert "1 of 4 documents failed; the rest are scored" in ended.err
    rows = pq.read_table("out.parquet").to_pylist()
    assert [row["document"] for row in rows] == [names[0]] * len(ROWS) + names[1:]
    assert [row["text"] for row in rows[: len(ROWS)]] == [row["text"] for row in ROWS], "a row of the table is a line"
    alone = run("score", "in/c.zip", "--top", "1")
    assert alone.code == 0 and alone.out.splitlines()[1].endswith("bits per byte\tin/c.zip/one.txt")
    assert run("score", "in/bad.pdf", "-o", "bad.parquet").code == 1 and not Path("bad.parquet").exists()
    assert run("score", "in/a.jsonl", "--text-column", "nothing").code == 1


# ---- files of other people ----


@pytest.fixture
def inputs() -> Path:
    if not INPUTS.is_dir():
        pytest.skip(f"no '{INPUTS}'")
    return INPUTS


def words(path: Path) -> list[str]:
    return re.findall(r"\w+", read(str(path)).replace("’", "'").replace("_", " ").lower())


@books
@web
def test_every_sample_is_read(inputs: Path) -> None:
    found = {d.name.removeprefix(f"{inputs}/"): d for d in documents([str(inputs)])}
    kinds = {name: d.kind for name, d in found.items()}
    assert (
        kinds.items()
        >= {
            "alice.txt": "text",
            "alice.html": "html",
            "childrens-literature.epub": "epub",
            "pdflatex-4-pages.pdf": "pdf",
            "multicolumn.pdf": "pdf",
            "access.log": "text",
            "pep-0008.rst": "text",
            "example.warc.gz#3": "html",
            "udhr-japanese-sjis.txt": "text",
        }.items()
    )
    files = {path.name for path in inputs.iterdir()}
    assert {name.partition("#")[0] for name in found} == files
    for name, d in found.items():
        text = read(d)
        assert len(text) > 150 and "\ufffd" not in text, name
        assert read(d) == text


@books
def test_the_page_says_what_the_text_says(inputs: Path) -> None:
    truth, page = words(inputs / "alice.txt"), words(inputs / "alice.html")
    matcher = difflib.SequenceMatcher(None, truth, page, autojunk=False)
    in_order = sum(block.size for block in matcher.get_matching_blocks())
    assert in_order >= 0.99 * len(truth)
    assert len(page) < 1.02 * len(truth), "no scripts, no styles"


@books
def test_places_in_the_samples(inputs: Path) -> None:
    """Spans are checked by cutting the text at them."""
    page = {place.get("chapter"): text for place, text in cited_pieces(document(str(inputs / "alice.html")))}
    assert page["CHAPTER I. Down the Rabbit-Hole"].startswith("CHAPTER I. Down the Rabbit-Hole\n\nAlice was beginning")
    assert page["CHAPTER XII. Alice’s Evidence"].startswith("CHAPTER XII. Alice’s Evidence\n\n‘Here!’ cried Alice")
    found = cited_pieces(document(str(inputs / "childrens-literature.epub")))
    book = {place.get("chapter"): text for place, text in found}
    assert book["INTRODUCTORY"].startswith("INTRODUCTORY") and len(book) > 20
    pages = cited_pieces(document(str(inputs / "pdflatex-4-pages.pdf")))
    assert [place for place, _ in pages] == [{"page": n} for n in (1, 2, 3, 4)]
    assert pages[0][1].startswith("Hello, here is some text without a meaning.")
    rst = (inputs / "pep-0008.rst").read_text().splitlines(keepends=True)
    assert cited_pieces(document(str(inputs / "pep-0008.rst"))) == [
        ({"line": i}, line) for i, line in enumerate(rst, 1)
    ]


def cited_pieces(found: Document) -> list[tuple[dict[str, Any], str]]:
    """Like `cited`, for long texts: asked where lines begin."""
    parts: list[tuple[dict[str, Any], str]] = []
    at = 0
    with found.text() as text:
        for piece in text:
            for line in piece.splitlines(keepends=True):
                place = text.place(at)
                if not parts or parts[-1][0] != place:
                    parts.append((place, ""))
                parts[-1] = place, parts[-1][1] + line.decode()
                at += len(line)
    return parts
