"""Small files of every format that is read, made here; text in the order in which it is to be read."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence

# ---- archives ----


def zipped(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> bytes:
    """A ZIP archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def tarred(members: Mapping[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def record(
    uri: str,
    body: bytes,
    *,
    type: str = "response",
    status: str = "200 OK",
    headers: Sequence[tuple[str, str]] = (("Content-Type", "text/html"),),
) -> bytes:
    """A WARC record, uncompressed."""
    http = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
    block = http.encode() + body if type == "response" else body
    own = {
        "WARC-Type": type,
        "WARC-Record-ID": "<urn:uuid:00000000-0000-4000-8000-000000000000>",
        "WARC-Date": "2026-01-01T00:00:00Z",
        "WARC-Target-URI": uri,
        "Content-Type": "application/http; msgtype=response" if type == "response" else "text/plain",
        "Content-Length": str(len(block)),
    }
    head = "WARC/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in own.items()) + "\r\n"
    return head.encode() + block + b"\r\n\r\n"


def arc_record(address: str, body: bytes, status: str = "200 OK") -> bytes:
    """A record of an ARC file, uncompressed; with a scheme of its own one of no server, as the first is."""
    block = body
    if address.startswith("http"):
        block = f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\n\r\n".encode() + body
    return f"{address} 0.0.0.0 20040102030405 text/html {len(block)}\n".encode() + block + b"\n"


# ---- books ----

CONTAINER = b"""<?xml version="1.0"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""


def xhtml(body: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" '
        'xmlns:epub="http://www.idpf.org/2007/ops"><head><title>not seen</title></head><body>' + body + "</body></html>"
    ).encode()


def nav(links: Iterable[tuple[str, str]]) -> bytes:
    items = "".join(f'<li><a href="{href}">{title}</a></li>' for href, title in links)
    return xhtml(f'<nav epub:type="toc"><ol>{items}</ol></nav><nav epub:type="landmarks"><a href="a.xhtml">x</a></nav>')


def ncx(links: Iterable[tuple[str, str]]) -> bytes:
    points = "".join(
        f'<navPoint><navLabel><text>{title}</text></navLabel><content src="{href}"/></navPoint>'
        for href, title in links
    )
    return f'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{points}</navMap></ncx>'.encode()


def epub(
    chapters: Mapping[str, bytes],
    *,
    contents: Sequence[tuple[str, str]] = (),
    version: int = 3,
    spine: Sequence[str] | None = None,
    others: Mapping[str, bytes] | None = None,
) -> bytes:
    """An EPUB of XHTML chapters in the order of `spine`, or as given."""
    items = [f'<item id="{name}" href="{name}" media-type="application/xhtml+xml"/>' for name in chapters]
    parts = {f"OEBPS/{name}": data for name, data in chapters.items()}
    toc = ""
    if contents and version == 3:
        items.append('<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>')
        parts["OEBPS/nav.xhtml"] = nav(contents)
    elif contents:
        items.append('<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>')
        parts["OEBPS/toc.ncx"] = ncx(contents)
        toc = ' toc="ncx"'
    refs = "".join(f'<itemref idref="{name}"/>' for name in spine or chapters)
    package = (
        f'<package xmlns="http://www.idpf.org/2007/opf" version="{version}.0"><manifest>{"".join(items)}</manifest>'
        f"<spine{toc}>{refs}</spine></package>"
    )
    return zipped(
        {
            "mimetype": b"application/epub+zip",
            "META-INF/container.xml": CONTAINER,
            "OEBPS/book.opf": package.encode(),
            **parts,
            **(others or {}),
        }
    )


def deflated(pieces: Iterable[bytes]) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(piece) for piece in pieces) + packer.flush()


def pdf(pages: Sequence[Sequence[str] | bytes]) -> bytes:
    """A PDF with a font and pages of lines, or of content streams that are deflated already."""
    n = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(n))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {n} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for i, page in enumerate(pages):
        if not isinstance(page, bytes):
            lines = " ".join(f"({line}) Tj 0 -14 Td" for line in page)
            page = deflated([f"BT /F1 12 Tf 72 720 Td {lines} ET".encode("cp1252")] if page else [b""])
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>".encode(),
            b"<< /Filter /FlateDecode /Length %d >>\nstream\n%b\nendstream" % (len(page), page),
        ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return out + b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        len(objects) + 1,
        table,
        len(objects) + 1,
        len(out),
    )


def docx(paragraphs: Sequence[str | tuple[str, str] | list[list[str]]]) -> bytes:
    """A DOCX of paragraphs: text, (style, text), or the rows of a table."""
    from docx import Document

    document = Document()
    for paragraph in paragraphs:
        if isinstance(paragraph, str):
            document.add_paragraph(paragraph)
        elif isinstance(paragraph, tuple):
            document.add_paragraph(paragraph[1], style=paragraph[0])
        else:
            table = document.add_table(len(paragraph), len(paragraph[0]))
            for i, row in enumerate(paragraph):
                for j, cell in enumerate(row):
                    table.cell(i, j).text = cell
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


# ---- tables ----


def json_lines(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def parquet(columns: Mapping[str, Sequence[object]], row_group_size: int = 1000) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), file, row_group_size=row_group_size)
    return file.getvalue()
