"""Of what is damaged the smallest part is lost and named, and the rest is read: a test for each kind of damage."""

from __future__ import annotations

import gzip
import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from made_files import docx, epub, json_lines, ncx, parquet, pdf, record, tarred, xhtml, zipped
from program import program
from readings import reading, unprivileged

from rwkv_stream.text.readers import document, documents

pytest.importorskip("lxml")
pytest.importorskip("pypdf")
pytest.importorskip("docx")
pytest.importorskip("warcio")

Write = Callable[[str, bytes], str]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return write


def read(path: str) -> str:
    text, losses = reading(path)
    assert losses == []
    return text


def parts_of(packed: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---- tables ----


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_quote_that_is_never_closed(file: Write, name: str, delimiter: str) -> None:
    rows = (("id", "text"), ("1", 'a "quoted" b'), ("2", '"open only'), ("3", "c"), ("4", f'"closed{delimiter} here"'))
    path = file(name, "".join(delimiter.join(row) + "\n" for row in rows).encode())
    expected = ['a "quoted" b', '"open only', "c", f"closed{delimiter} here"]
    text, (loss,) = reading(path)
    assert text == "\n".join(expected)
    assert "row 2: the quote before field 2 is never closed" in loss
    found = list(documents([path], rows=True))
    assert [reading(d)[0] for d in found] == expected
    assert [len(reading(d)[1]) for d in found] == [0, 1, 0, 0]


def test_a_quote_that_is_never_closed_is_looked_for_within_bounds(file: Write) -> None:
    text, losses = reading(file("a.csv", b'id,text\n1,"open\n' + b"2,fine\n" * 400_000))
    assert text.count("fine") == 400_000 and len(losses) == 1


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b'id,"text\n(long)"\n1,a\n', ["a"]),
        (b'id;"text, long"\n1;a\n', ["a"]),
        (b"\n\nid,text\n1,a\n", ["a"]),
        (b"\xef\xbb\xbfsep=;\r\nid;text\r\n1;a,b\r\n", ["a,b"]),
        (b"id,text\r1,a\r2,b\r", ["a", "b"]),
        (b"# exported\n#\nid,text\n1,a\n", ["a"]),
        (b"#id,text\n1,a\n", ["a"]),
        (b'id|text\n1|"a\r\nb"\n\n2|""\n', ["a\r\nb", ""]),
    ],
)
def test_headers_of_csv(file: Write, data: bytes, texts: list[str]) -> None:
    path = file("a.csv", data)
    column = "text\n(long)" if b"(long)" in data else "text, long" if b"text, long" in data else "text"
    found = list(documents([path], text_column=column, rows=True))
    assert [reading(d)[0] for d in found] == texts


def test_the_first_rows_of_json_decide_the_column(file: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"meta": "x"}, {"meta": "y", "text": "one"}, {"text": "two"}]
    text, losses = reading(file("a.jsonl", json_lines(rows)))
    assert (text, len(losses)) == ("one\ntwo", 1) and "row 1: expected a column 'text'" in losses[0]
    with caplog.at_level(logging.WARNING):
        assert reading(file("b.jsonl", json_lines([{"n": 1}, {"b": "one", "c": "x"}, {"b": "two"}])))[0] == "one\ntwo"
    assert "taken from column 'b'" in caplog.text


def test_ids_that_are_no_text(file: Write) -> None:
    (found,) = documents([file("a.jsonl", b'{"id": "k\\ud800", "text": "t"}\n')], rows=True)
    assert found.id == "k\ufffd" and str(found.id).encode()
    import uuid

    import pyarrow as pa

    ids = {"a": pa.array([b"k1", b"\xff\x00"]), "b": pa.array([uuid.UUID(int=7).bytes] * 2, pa.binary(16))}
    for name, expected in (("a", ["k1", "ff00"]), ("b", [uuid.UUID(int=7).bytes.hex()] * 2)):
        data = parquet({"id": ids[name], "text": ["one", "two"]})
        found_rows = list(documents([file("a.parquet", data)], rows=True))
        assert [row.id for row in found_rows] == expected


def test_an_id_past_the_dates_of_python(file: Write) -> None:
    import pyarrow as pa

    ids = pa.array([2**62, 0], pa.timestamp("us"))
    text, (loss,) = reading(file("a.parquet", parquet({"id": ids, "text": ["one", "two"]})))
    assert text == "one\ntwo" and "row 1: its id is left out" in loss
    found = list(documents([file("a.parquet", parquet({"id": ids, "text": ["one", "two"]}))], rows=True))
    assert [row.id for row in found] == [None, "1970-01-01 00:00:00"]


def test_a_column_of_bytes_is_text_where_it_is_named(file: Write) -> None:
    path = file("a.parquet", parquet({"id": [1, 2], "body": [b"one", "zwö".encode()]}))
    with document(path, text_column="body").text() as text:
        assert b"".join(text).decode() == "one\nzwö"
    path = file("b.parquet", parquet({"id": [b"k", b"\xff"], "text": [b"one", b"zw\xf6 \xff"]}))
    with document(path).text() as text:
        assert (b"".join(text).decode(), text.replaced_bytes) == ("one\nzw\ufffd \ufffd", 2)


def test_a_row_group_that_is_damaged(file: Write) -> None:
    rows = [f"row {i} " + os.urandom(40).hex() for i in range(40)]
    data = bytearray(parquet({"text": rows}, row_group_size=10))
    import pyarrow.parquet as pq

    column = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 200] = bytes(200)
    text, losses = reading(file("a.parquet", bytes(data)))
    assert "row 11: expected 10 whole rows from 11 on" in losses[0]
    assert text == "\n".join(rows[:10] + rows[20:])


# ---- books ----

BODIES = [f"<h1>Head {i}</h1><p>Body of chapter {i}.</p>" for i in (1, 2, 3)]
CHAPTERS = {f"c{i}.xhtml": xhtml(body) for i, body in enumerate(BODIES, 1)}
WHOLE = "\n\n".join(f"Head {i}\n\nBody of chapter {i}." for i in (1, 2, 3))


def book(change: Callable[[dict[str, bytes]], object], **options: object) -> bytes:
    parts = parts_of(epub(CHAPTERS, **options))  # type: ignore[arg-type]
    change(parts)
    return zipped(parts)


def package(old: str, new: str) -> Callable[[dict[str, bytes]], object]:
    return lambda parts: parts.update({"OEBPS/book.opf": parts["OEBPS/book.opf"].replace(old.encode(), new.encode())})


@pytest.mark.parametrize(
    "type",
    [
        *("text/xml", "application/xml", "text/x-oeb1-document", "application/octet-stream", "", "application/xhtml"),
        *("application/xhtml+xml; charset=utf-8", "APPLICATION/XHTML+XML", "application/html+xml"),
    ],
)
def test_a_chapter_is_told_by_its_bytes(file: Write, type: str) -> None:
    change = package('href="c2.xhtml" media-type="application/xhtml+xml"', f'href="c2.xhtml" media-type="{type}"')
    assert read(file("a.epub", book(change))) == WHOLE


def test_the_fallback_of_an_item(file: Write) -> None:
    item = '<item id="c2.xhtml" href="c2.xhtml" media-type="application/xhtml+xml"/>'
    pdf_item = '<item id="c2.xhtml" href="c2.pdf" media-type="application/pdf" fallback="x"/>'
    change = package(item, pdf_item + item.replace('id="c2.xhtml"', 'id="x"'))

    def both(parts: dict[str, bytes]) -> None:
        change(parts)
        parts["OEBPS/c2.pdf"] = b"%PDF-1.4"

    assert read(file("a.epub", book(both))) == WHOLE


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda parts: parts.pop("OEBPS/c2.xhtml"), "'c2.xhtml' in it, found no such part"),
        (package('idref="c2.xhtml"', 'idref="nosuch"'), "the item 'nosuch' of its spine, found none in its manifest"),
        (package('href="c2.xhtml"', 'href="http://e.org/c2.xhtml"'), "found one outside of it"),
        (
            lambda parts: parts.update({"OEBPS/c2.xhtml": b'<!DOCTYPE html [<!ENTITY a "b">]>' + CHAPTERS["c2.xhtml"]}),
            "without entities of its own, found such in 'OEBPS/c2.xhtml'",
        ),
        (lambda parts: parts.update({"OEBPS/c2.xhtml": b"\x00\x01 no markup"}), ""),
    ],
)
def test_a_chapter_that_cannot_be_read(file: Write, change: Callable[[dict[str, bytes]], object], found: str) -> None:
    text, losses = reading(file("a.epub", book(change)))
    assert "Body of chapter 1." in text and text.endswith("Head 3\n\nBody of chapter 3.")
    assert not found or (len(losses) == 1 and found in losses[0])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (
            '<itemref idref="c2.xhtml"/>',
            "",
            "'OEBPS/c2.xhtml', which its contents name, in its spine, found it not there",
        ),
        ('<itemref idref="c2.xhtml"/>', '<imref idref="c2.xhtml"/>', "which its contents name, in its spine"),
        ('idref="c2.xhtml"/>', 'idref="c2.xhtml">', "a whole 'OEBPS/book.opf', found damage"),
    ],
)
def test_a_package_that_is_damaged(file: Write, old: str, new: str, found: str) -> None:
    contents = [(name, f"Chapter {i}") for i, name in enumerate(CHAPTERS, 1)]
    text, losses = reading(file("a.epub", book(package(old, new), contents=contents)))
    assert len(losses) == 1 and found in losses[0]
    assert all(f"Body of chapter {i}." in text for i in (1, 3))
    assert reading(file("b.epub", book(lambda parts: None, contents=contents)))[1] == []


class Unmarked(zipfile.ZipInfo):
    """A member whose name is in cp437, or in bytes that are read as that."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 -- of zipfile
        return self.filename.encode("cp437"), self.flag_bits


@pytest.mark.parametrize(
    ("href", "part"),
    [
        ("/OEBPS/c2.xhtml", "c2.xhtml"),
        ("Text\\c2.xhtml", "Text/c2.xhtml"),
        ("C2.XHTML", "c2.xhtml"),
        ("c%202.xhtml", "c%202.xhtml"),
        ("c%202.xhtml", "c 2.xhtml"),
        ("%C3%96l.xhtml", "O\u0308l.xhtml"),
        ("%C3%96l.xhtml", "Öl.xhtml".encode().decode("cp437")),
        ("m%C3%A8re.xhtml", "mère.xhtml".encode("cp1252").decode("cp437")),
        ("./x/../c2.xhtml", "c2.xhtml"),
    ],
)
def test_parts_are_found_as_reading_systems_find_them(file: Write, href: str, part: str) -> None:
    def change(parts: dict[str, bytes]) -> None:
        package('href="c2.xhtml"', f'href="{href}"')(parts)
        parts[f"OEBPS/{part}"] = parts.pop("OEBPS/c2.xhtml")

    data = book(change)
    if not part.isascii() and "\u0308" not in part:  # as archives have it that do not mark UTF-8
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in parts_of(data).items():
                archive.writestr(Unmarked(name), content)
        data = packed.getvalue()
    assert read(file("a.epub", data)) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.pop("OEBPS/toc.ncx"),
        lambda parts: parts.update({"OEBPS/toc.ncx": b""}),
        lambda parts: parts.update({"OEBPS/toc.ncx": ncx([])}),
        lambda parts: parts.update({"OEBPS/toc.ncx": b'<!DOCTYPE ncx [<!ENTITY a "b">]>' + parts["OEBPS/toc.ncx"]}),
    ],
)
def test_contents_that_cannot_be_read(
    file: Write, caplog: pytest.LogCaptureFixture, change: Callable[[dict[str, bytes]], object]
) -> None:
    data = book(change, contents=[("c1.xhtml", "One")], version=2)
    with caplog.at_level(logging.WARNING), document(file("a.epub", data)).text() as text:
        assert b"".join(text).decode() == WHOLE
        assert text.place(len(WHOLE)) == {"chapter": "Head 3"}
        assert text.losses == []
    assert re.search("headings name|headings do", caplog.text)


# ---- DOCX ----

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def word(body: str, others: Mapping[str, bytes] | None = None, relations: str = "", w: str = W) -> bytes:
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    return zipped(
        {
            "[Content_Types].xml": b"<Types/>",
            "_rels/.rels": f'<Relationships><Relationship Id="r1" Type="{office}/officeDocument" '
            'Target="word/document.xml"/></Relationships>'.encode(),
            "word/document.xml": f'<w:document xmlns:w="{w}" xmlns:m="urn:m" xmlns:r="{office}"><w:body>{body}'
            "</w:body></w:document>".encode(),
            "word/_rels/document.xml.rels": f"<Relationships>{relations}</Relationships>".encode(),
            **(others or {}),
        }
    )


def p(text: str, more: str = "") -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r>{more}</w:p>"


@pytest.mark.parametrize("target", ["NULL", "#mark", "media/image1.png", "../../x"])
def test_a_relationship_to_nothing(file: Write, target: str) -> None:
    relations = f'<Relationship Id="r5" Type="x/image" Target="{target}"/>'
    assert read(file("a.docx", word(p("text"), relations=relations))) == "text\n\n"


@pytest.mark.parametrize(
    "type",
    [
        "application/vnd.ms-word.document.macroEnabled.main+xml",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.template.main+xml",
    ],
)
def test_other_types_of_word(file: Write, type: str) -> None:
    parts = parts_of(docx(["text"]))
    main = b"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    assert main in parts["[Content_Types].xml"]
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(main, type.encode())
    assert read(file("a.docm", zipped(parts))) == "text\n\n"


def test_strict_documents(file: Write) -> None:
    data = word(p("strict"), w="http://purl.oclc.org/ooxml/wordprocessingml/main")
    assert read(file("a.docx", data)) == "strict\n\n"


def test_cells_stay_in_their_columns(file: Write) -> None:
    def row(*cells: str) -> str:
        return "<w:tr>" + "".join(f"<w:tc>{p(cell)}</w:tc>" for cell in cells) + "</w:tr>"

    wide = f'<w:tr><w:tc><w:tcPr><w:gridSpan w:val="2"/></w:tcPr>{p("wide")}</w:tc><w:tc>{p("z")}</w:tc></w:tr>'
    table = "<w:tbl>" + row("", "2024", "2025") + row("Costs", "3", "") + row("", "", "") + wide + "</w:tbl>"
    assert read(file("a.docx", word(table + p("x")))) == "\t2024\t2025\nCosts\t3\t\n\t\t\nwide\t\tz\nx\n\n"


def test_equations(file: Write) -> None:
    def r(text: str) -> str:
        return f"<m:r><m:t>{text}</m:t></m:r>"

    fraction = f"<m:f><m:num>{r('a+b')}</m:num><m:den>{r('c')}</m:den></m:f>"
    power = f"<m:sSup><m:e>{r('x')}</m:e><m:sup>{r('2')}</m:sup></m:sSup>"
    root = f"<m:rad><m:deg/><m:e>{r('y')}</m:e></m:rad>"
    total = (
        f'<m:nary><m:naryPr><m:chr m:val="∑"/></m:naryPr><m:sub>{r("i=1")}</m:sub><m:sup>{r("n")}</m:sup>'
        f"<m:e>{r('i')}</m:e></m:nary>"
    )
    body = p("Let ", f"<m:oMath>{r('z=')}{fraction}{r('+')}{power}{root}{total}</m:oMath>")
    assert read(file("a.docx", word(body))) == "Let z=(a+b)/c+x^2√(y)∑_(i=1)^n i\n\n"


def test_notes_and_embedded_texts_stand_at_their_place(file: Write) -> None:
    others = {
        "word/footnotes.xml": f'<w:footnotes xmlns:w="{W}"><w:footnote w:id="2">{p("a note")}</w:footnote>'
        "</w:footnotes>".encode(),
        "word/part.html": b"<html><body><p>embedded</p></body></html>",
    }
    relations = (
        '<Relationship Id="r7" Type="x/footnotes" Target="footnotes.xml"/>'
        '<Relationship Id="r8" Type="x/aFChunk" Target="part.html"/>'
    )
    reference = '<w:r><w:footnoteReference w:id="2"/></w:r>'
    body = p("before", reference) + '<w:altChunk r:id="r8"/>' + p("after")
    assert read(file("a.docx", word(body, others, relations))) == "before [a note]\n\nembedded\n\nafter\n\n"
    text, losses = reading(file("b.docx", word(body, {}, relations)))
    assert text == "before\n\nafter\n\n"
    assert "a footnote '2', found none" in losses[0] and "'word/part.html', found none" in losses[1]


@pytest.mark.usefixtures("program_folder")
@pytest.mark.parametrize(("n", "counted"), [(1, "1 loss in"), (1500, "1500 losses in")])
def test_commands_count_more_losses_than_they_name(n: int, counted: str) -> None:
    references = "".join(f'<w:r><w:footnoteReference w:id="{i}"/></w:r>' for i in range(n))
    Path("a.docx").write_bytes(word(p("The sea was calm.", references)))
    for command in (["ingest"], ["score"], ["embed", "-o", "out.jsonl"], ["embed", "-o", "job/"]):
        ended = program(*command, "a.docx")
        assert ended.code == 3
        assert f"{counted} documents" in ended.err
        assert len(
            [line for line in ended.err.splitlines() if "a footnote '" in line and "more such" not in line]
        ) == min(n, 10)


def test_a_part_of_word_that_is_no_xml(file: Write) -> None:
    parts = parts_of(word(p("one") + p("two") + p("three")))
    parts["word/document.xml"] = parts["word/document.xml"].replace(b"two</w:t>", b"two</w:x>")
    text, losses = reading(file("a.docx", zipped(parts)))
    assert "one" in text and "two" in text and "expected a whole 'word/document.xml', found damage" in losses[0]


# ---- PDF ----


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"/Filter /FlateDecode", b"/Filter /NoSuchDecode", "found damage"),
        (b"/Contents 5 0 R", b"/Contents 99 0 R", "without contents"),
        (b"/Contents 5 0 R", b"/Xontents 5 0 R", "without contents"),
    ],
)
def test_a_page_that_cannot_be_read(file: Write, old: bytes, new: bytes, found: str) -> None:
    data = pdf([["page one"], ["page two"], ["page three"]])
    text, (loss,) = reading(file("a.pdf", data.replace(old, new, 1)))
    assert text.split() == ["page", "two", "page", "three"]
    assert f"page 1: expected a whole page, found {found.removeprefix('found ')}" in loss.replace(
        "one without", "without"
    )


def test_a_page_whose_contents_break_off(file: Write) -> None:
    data = bytearray(pdf([["page one"], ["page two"]]))
    at = data.index(b"stream\n") + 30
    data[at : at + 4] = b"\xff\xff\xff\xff"
    text, losses = reading(file("a.pdf", bytes(data)))
    assert "page two" in text and "page 1" in losses[0]


def test_a_page_that_stands_for_another(file: Write) -> None:
    data = pdf([["page one"], ["page two"], ["page three"]]).replace(b"4 0 R 6 0 R", b"4 0 R 4 0 R", 1)
    text, losses = reading(file("a.pdf", data))
    assert (
        "page three" in text and len(losses) == 1 and "page 2: expected a whole page, found page 1 again" in losses[0]
    )


def test_soft_hyphens(file: Write) -> None:
    assert read(file("a.pdf", pdf([["an extraordi\xad", "nary d\xaday, a Sunday\xad", "Market"]]))) == (
        "an extraordinary day, a SundayMarket"
    )


@pytest.mark.parametrize("name", ["a.pdf", "a.bin"])
def test_bytes_before_a_pdf(file: Write, name: str) -> None:
    found = document(file(name, b"junk before\n" * 20 + pdf([["page one"]])))
    assert (found.kind, reading(found)[0]) == ("pdf", "page one")
    assert document(file("notes.md", b"# How PDF begins\n\n%PDF-1.7 stands at the start.\n")).kind == "text"


# ---- encodings ----


@pytest.mark.parametrize(
    ("label", "encoding", "text"),
    [
        ("gb2312", "gb18030", "朱镕基与㐀。囍"),
        ("gbk", "gb18030", "朱镕基与㐀。囍"),
        ("x-gbk", "gb18030", "囍"),
        ("euc-kr", "cp949", "똠방각하 펲시콜라"),
        ("ks_c_5601-1987", "cp949", "똠방각하"),
        ("shift_jis", "cp932", "①髙橋～㈱"),
        ("big5", "big5hkscs", "香港嘅深水埗"),
        ("iso-8859-9", "cp1254", "“ğüş”"),
        ("tis-620", "cp874", "“ภาษาไทย”"),
        ("x-cp1251", "cp1251", "Привет"),
        ("windows-949", "cp949", "똠방각하"),
        ("x-mac-cyrillic", "mac-cyrillic", "Привет"),
        ("x-euc-jp", "euc_jp", "吾輩は猫である"),
        ("utf-8", "cp1252", "café naïve “q”"),
    ],
)
def test_labels_mean_what_browsers_take_them_for(file: Write, label: str, encoding: str, text: str) -> None:
    page = f'<html><head><meta charset="{label}"></head><body><p>{text}</p></body></html>'.encode(encoding)
    assert read(file("a.html", page)) == text
    served = record(
        "http://e.org/", f"<p>{text}".encode(encoding), headers=[("Content-Type", f"text/html; charset={label}")]
    )
    (found,) = documents([file("a.warc", served)])
    assert reading(found)[0] == text


@pytest.mark.parametrize(
    "start",
    [
        "<title>t</title>",
        '<meta name="x">',
        '<div class="c">',
        "<script>var a=1;</script>",
        '<link rel="s">',
        "<center>",
        "<!-- c -->",
        "text first ",
        "<img src=x>",
    ],
)
def test_what_is_served_as_html_is_html(file: Write, start: str) -> None:
    (found,) = documents([file("a.warc", record("http://e.org/", f"{start}<p>seen<script>no</script>".encode()))])
    assert found.kind == "html" and reading(found)[0].endswith("seen")


def test_mostly_valid_utf8_stays_utf8(file: Write) -> None:
    data = "emoji 😀 ok\n".encode() * 5 + b"cesu \xed\xa0\xbd\xed\xb8\x80 end\n"
    with document(file("a.log", data)).text() as text:
        assert b"".join(text).decode() == "emoji 😀 ok\n" * 5 + "cesu " + "\ufffd" * 6 + " end\n"
        assert (text.encoding, text.encoding_source, text.replaced_bytes) == ("utf-8", "valid UTF-8", 6)


def test_a_guessed_encoding_is_said(file: Write, caplog: pytest.LogCaptureFixture) -> None:
    hungarian = "Őszintén szólva, nem hittem volna, hogy ilyen gyorsan megérkezik a hűvös őszi szél a völgybe."
    with caplog.at_level(logging.INFO), document(file("a.txt", hungarian.encode("cp1250"))).text() as text:
        assert b"".join(text).decode() == hungarian
        assert text.encoding_source == "guess"
    assert [(entry.levelname, "cp1250 (guess)" in entry.getMessage()) for entry in caplog.records] == [
        ("WARNING", True)
    ]


# ---- logs ----

LOG = "".join(f"2026-03-01 12:00:{i:02} request {i} served\n" for i in range(60)).encode()


@pytest.mark.parametrize(
    "data",
    [
        bytes(70_000) + LOG,
        LOG + bytes(5000) + LOG,
        LOG + bytes(range(256)) * 4 + b"\n" + LOG,
        bytes(900_000) + LOG,
    ],
)
def test_holes_and_garbage_in_logs(file: Write, tmp_path: Path, data: bytes) -> None:
    file("logs/a.log", data)
    (found,) = documents([str(tmp_path / "logs")])
    assert reading(found)[0].replace("\0", "").endswith(LOG.decode())


def test_a_hole_too_long_is_told_of(file: Write, tmp_path: Path) -> None:
    file("logs/a.log", bytes(5_000_000) + LOG)
    file("logs/b.log", LOG)
    hole, found = documents([str(tmp_path / "logs")])
    assert "nothing but NULs in its first" in reading(hole)[1][0] and reading(found)[0] == LOG.decode()


# ---- folders ----


def test_what_cannot_be_followed_or_listed(file: Write, tmp_path: Path) -> None:
    file("docs/a.txt", b"text")
    locked = Path(file("docs/locked/b.txt", b"text")).parent
    outside = Path(file("outside/o.txt", b"text")).parent
    (tmp_path / "docs/self").symlink_to("self")
    (tmp_path / "docs/link.txt").symlink_to("../outside/o.txt")
    for folder in (locked, outside):
        folder.chmod(0)
    try:
        with unprivileged(tmp_path):
            found = [(Path(d.name).name, *reading(d)) for d in documents([str(tmp_path / "docs")])]
    finally:
        for folder in (locked, outside):
            folder.chmod(0o755)
    assert [(name, text) for name, text, _ in found] == [
        ("a.txt", "text"),
        ("link.txt", ""),
        ("locked", ""),
        ("self", ""),
    ]
    assert [len(losses) for _, _, losses in found] == [0, 1, 1, 1]
    assert "Too many levels" in found[3][2][0] and "Permission denied" in found[1][2][0] + found[2][2][0]


def test_names_that_differ_in_undecodable_bytes(tmp_path: Path) -> None:
    names = [b"caf\xe9.txt", b"caf\xe8.txt", b"caf\\xe9.txt", b"caf\\\\xe9.txt", b"a\nb", b"a\\u000ab", b"a\\\nb"]
    for i, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(str(i).encode())
    found = {d.name: reading(d)[0] for d in documents([str(tmp_path)])}
    assert len(found) == len(names) and set(found.values()) == set(map(str, range(len(names))))
    assert found[f"{tmp_path}/caf\\xe9.txt"] == "0"
    assert all(name.isprintable() for name in found)


def test_a_number_that_python_does_not_read_costs_no_row(file: Write) -> None:
    digits = b"9" * 5000
    path = file("a.jsonl", b'{"id": %b, "text": "one"}\n{"id": 2, "n": [-%b], "text": "two"}\n' % (digits, digits))
    found = list(documents([path], rows=True))
    assert [reading(row) for row in found] == [("one", []), ("two", [])]
    assert [row.id for row in found] == [digits.decode(), 2]


def test_a_row_that_is_nested_too_deep(file: Write) -> None:
    deep = b'{"id": 2, "x": %b%b, "text": "deep"}\n' % (b"[" * 100_000, b"]" * 100_000)
    text, losses = reading(file("a.jsonl", b'{"text": "one"}\n' + deep + b'{"text": "three"}\n'))
    assert text == "one\nthree"
    assert losses == [f"reading '{file('b', b'')[:-1]}a.jsonl', row 2: expected JSON, found it nested too deep"]


@pytest.mark.parametrize(("keep", "n_whole"), [(0.97, 4), (0.9, 3), (0.7, 2)])
def test_a_pdf_whose_end_is_missing(file: Write, keep: float, n_whole: int) -> None:
    """As of a download that broke off: the directory is at its end."""
    data = pdf([[f"words of page {i} " + os.urandom(300).hex()] for i in range(4)])
    text, losses = reading(file("a.pdf", data[: int(len(data) * keep)]))
    assert [f"words of page {i} " in text for i in range(n_whole)] == [True] * n_whole
    assert "its end is missing" in "".join(losses)


# ---- archives ----


def test_a_name_twice_and_hard_links_in_a_tar(file: Write, caplog: pytest.LogCaptureFixture) -> None:
    import tarfile

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in (("a.txt", "old"), ("b.txt", "b"), ("./a.txt", "new")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.LNKTYPE, "b.txt"
        archive.addfile(link)
        again = tarfile.TarInfo("again.txt")
        again.type, again.linkname = tarfile.LNKTYPE, "link.txt"
        archive.addfile(again)
    path = file("a.tar", packed.getvalue())
    with caplog.at_level(logging.WARNING):
        found = list(documents([path]))
    texts = {d.name.removeprefix(f"{path}/"): reading(d) for d in found}
    assert texts == {name: (text, []) for name, text in (
        ("b.txt", "b"), ("./a.txt", "new"), ("link.txt", "b"), ("again.txt", "b")
    )}  # fmt: skip
    assert "holds 'a.txt' more than once" in caplog.text
    assert [reading(d) for d in reversed(found)] == [texts[d.name.removeprefix(f"{path}/")] for d in reversed(found)]


def test_a_damaged_header_in_a_tar_costs_one_member(file: Write) -> None:
    data = bytearray(tarred({f"{i}.txt": f"text {i}".encode() for i in range(5)}))
    data[2 * 1024 + 100] ^= 0x55
    *found, lost = documents([file("a.tar", bytes(data))])
    assert [reading(d)[0] for d in found] == ["text 0", "text 1", "text 3", "text 4"]
    assert "member 3" in reading(lost)[1][0]


def test_the_checksum_of_a_tar_in_a_zip_is_looked_at(file: Write) -> None:
    """It is known at the end alone, behind that of the tar: its members are read, and the damage is told."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:  # stored as they are
        for name, data in (("a.txt", b"first"), ("in.tar", tarred({"b.txt": b"second"})), ("c.txt", b"third")):
            archive.writestr(name, data)
    path = file("a.zip", packed.getvalue().replace(b"second", b"recond"))
    told = {d.name.removeprefix(f"{path}/"): reading(d) for d in documents([path])}
    assert [told[name] for name in ("a.txt", "in.tar/b.txt", "c.txt")] == [("first", []), ("recond", []), ("third", [])]
    assert "Bad CRC-32" in told["in.tar"][1][0]


def test_what_stands_behind_the_end_of_a_tar(file: Write) -> None:
    path = file("a.tar", tarred({"a.txt": b"first"}) + tarred({"b.txt": b"second"}))
    found, lost = documents([path])
    assert reading(found) == ("first", [])
    assert "more behind the mark of its end, which is not read" in reading(lost)[1][0]


def test_what_stands_behind_a_gzip_and_what_is_cut(file: Write, caplog: pytest.LogCaptureFixture) -> None:
    packed = gzip.compress(LOG)
    with caplog.at_level(logging.WARNING):
        assert read(file("a.log.gz", packed + b"garbage here")) == LOG.decode()
    assert f"'{file('a.log.gz', packed)}': 12 bytes behind the compressed data are left out" in caplog.text
    text, (loss,) = reading(file("b.log.gz", packed[:-30]))
    assert text and LOG.decode().startswith(text) and "ends too early" in loss


def test_damage_in_one_of_several_gzip_members(file: Write) -> None:
    lines = [os.urandom(4000).hex() + "\n" for _ in range(4)]
    members = [gzip.compress(line.encode()) for line in lines]
    damaged = bytearray(members[1])
    damaged[len(damaged) // 2] ^= 0xFF
    text, losses = reading(file("a.gz", members[0] + bytes(damaged) + members[2] + members[3]))
    assert losses and text.startswith(lines[0]) and text.endswith(lines[2] + lines[3])


def crawl(n: int) -> list[bytes]:
    return [
        record(f"http://e.org/{i}", f"<html><p>page {i} {os.urandom(2000).hex()}".encode()) for i in range(1, n + 1)
    ]


def test_damage_of_a_record_names_that_record(file: Write) -> None:
    members = [gzip.compress(part) for part in crawl(8)]
    *found, rest = documents([file("a.warc.gz", b"".join(members[:7]) + members[7][:900])])
    assert [d.name.rpartition("#")[2] for d in found] == [str(i) for i in range(1, 9)]
    texts = [reading(d) for d in found]
    assert all(losses == [] for _, losses in texts[:7]) and re.search("a.warc.gz#8'", texts[7][1][0])
    assert reading(rest)[1]


def test_a_damaged_record_costs_one_record(file: Write) -> None:
    members = [gzip.compress(part) for part in crawl(6)]
    damaged = bytearray(members[2])
    damaged[len(damaged) // 2] ^= 0xFF
    members[2] = bytes(damaged)
    found = list(documents([file("a.warc.gz", b"".join(members))]))
    read_pages = {re.match(r"page (\d)", reading(d)[0])[1] for d in found if reading(d)[0]}  # type: ignore[index]
    assert read_pages >= set("12456") and any(reading(d)[1] for d in found)
    plain = b"".join(crawl(6)).replace(b"Content-Length: 4", b"Content-Length: x4", 2).replace(b": x4", b": 4", 1)
    found = list(documents([file("b.warc", plain)]))
    read_pages = {re.match(r"page (\d)", reading(d)[0])[1] for d in found if reading(d)[0]}  # type: ignore[index]
    assert read_pages == set("13456") and "record 2" in reading(found[-1])[1][0]


def test_half_characters_of_all_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800"}\n{"text": "b"}\n{"text": "\\udc00\\ud801"}\n')
    (document,) = documents([str(path)])
    with document.text() as text:
        assert b"".join(text).decode().count("\ufffd") == text.replaced_bytes == 3


def test_short_utf_16_without_a_mark_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes("Half an hour.".encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes(b"One \x01 control \x02 character.")
    assert [document.name for document in documents([str(tmp_path)])] == [str(tmp_path / "b.txt")]
    assert "a.txt" in caplog.text
