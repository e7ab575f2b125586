"""Damage, drawn at random: whatever part of a file is hit, the others are read, or a line names what is lost.

A file holds units, each with words of its own. A mutation of structure (members, offsets, markup, quotes, checksums)
knows which unit it hit: the words of every other are in the text, or something is told. Never is a whole unit that was
not touched missing without a word.
"""

from __future__ import annotations

import functools
import gzip
import io
import random
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from made_files import arc_record, docx, epub, json_lines, pdf, record, tarred, xhtml, zipped
from readings import reading

from rwkv_stream.text.readers import documents

pytest.importorskip("lxml")
pytest.importorskip("pypdf")
pytest.importorskip("docx")
pytest.importorskip("warcio")

UNITS = 6
Mutation = tuple[bytes, set[int]]  # a file, and the units that were hit


def words(unit: int) -> str:
    rng = random.Random(unit)
    return " ".join(f"u{unit}w{i}x{rng.randrange(10**6)}" for i in range(40))


def hit(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """One flip, cut, drop or repeat within a range."""
    end = len(data) if end is None else end
    at, n = rng.randrange(start, end), rng.choice([1, 1, 2, 8, 40])
    n = min(n, end - at)
    match rng.randrange(4):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + n :]
        case 2:
            return data[:at] + data[at : at + n] * 2 + data[at + n :]
        case _:
            return data[:at] + rng.randbytes(n) + data[at + n :]


def of_parts(parts: dict[str, bytes], rng: random.Random, unit_of: Callable[[str], int | None]) -> Mutation:
    """A package with a part that is damaged, missing, or there twice."""
    name = rng.choice([name for name in parts if parts[name]])
    unit = unit_of(name)
    touched = {unit} if unit is not None else set()
    members = list(parts.items())
    i = [member for member, _ in members].index(name)
    match rng.randrange(3):
        case 0:
            members[i] = name, hit(rng, parts[name])
        case 1:
            del members[i]
        case _:
            members.append(members[i])
    return zipped(members), touched


def packed_parts(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed_members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def number(name: str) -> int | None:
    found = re.search(r"u(\d)\.", name)
    return int(found[1]) if found else None


def an_epub(rng: random.Random) -> Mutation:
    chapters = {f"u{i}.xhtml": xhtml(f"<h1>Chapter {i}</h1><p>{words(i)}</p>") for i in range(UNITS)}
    data = epub(chapters, contents=[(name, f"Chapter {i}") for i, name in enumerate(chapters)])
    if rng.random() < 0.3:
        return in_a_zip(data, rng, number)
    return of_parts(packed_parts(data), rng, number)


def in_a_zip(data: bytes, rng: random.Random, unit_of: Callable[[str], int | None]) -> Mutation:
    """A hit in the bytes of a member, or in its header, or in the directory, which is every member's."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        i = rng.randrange(len(infos) + 1)
        if i == len(infos):
            return hit(rng, data, archive.start_dir), set()
        start = infos[i].header_offset
        end = infos[i + 1].header_offset if i + 1 < len(infos) else archive.start_dir
    unit = unit_of(infos[i].filename)
    at = rng.randrange(start, end)
    changed = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]  # what lies behind stays there
    return changed, set() if unit is None else {unit}


@functools.cache
def whole_docx() -> bytes:
    return docx([words(i) for i in range(UNITS)])


def a_docx(rng: random.Random) -> Mutation:
    parts = packed_parts(whole_docx())
    if rng.random() < 0.5:
        text = parts["word/document.xml"]
        unit = rng.randrange(UNITS)
        at = text.index(f"u{unit}w0".encode())
        start, end = text.rindex(b"<w:p>", 0, at), text.index(b"</w:p>", at) + 6
        parts["word/document.xml"] = hit(rng, text, start, end)
        return zipped(parts), {unit}
    text = parts.pop("word/document.xml")
    damaged, touched = of_parts(parts, rng, lambda _: None)
    return zipped([*packed_members(damaged), ("word/document.xml", text)]), touched


def a_pdf(rng: random.Random) -> Mutation:
    data = pdf([[words(i)] for i in range(UNITS)])
    starts = [found.start() for found in re.finditer(rb"\d+ 0 obj", data)]
    i = rng.randrange(len(starts))
    start, end = starts[i], starts[i + 1] if i + 1 < len(starts) else data.index(b"xref")
    unit = {(i - 3) // 2} if i >= 3 else set()
    if rng.random() < 0.2:
        return data[:start] + data[end:], unit
    return hit(rng, data, start, end), unit


def a_zip(rng: random.Random) -> Mutation:
    members = {f"u{i}.txt": words(i).encode() for i in range(UNITS)}
    return in_a_zip(zipped(members), rng, number) if rng.random() < 0.7 else of_parts(members, rng, number)


def a_tar(rng: random.Random) -> Mutation:
    data = tarred({f"u{i}.txt": words(i).encode() for i in range(UNITS)})
    unit = rng.randrange(UNITS)
    size = data.index(b"u1.txt")
    start = unit * size
    match rng.randrange(3):
        case 0:
            at = rng.randrange(start, start + 512)
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], {unit}
        case 1:
            return data[:start] + data[start + size :], {unit}
        case _:
            return data[: start + size] + data[start : start + size] + data[start + size :], {unit}


def a_warc(rng: random.Random) -> Mutation:
    return crawled(rng, record, b"")


def an_arc(rng: random.Random) -> Mutation:
    return crawled(rng, arc_record, arc_record("filedesc://a.arc", b"1 0 e.org\n"))


def crawled(rng: random.Random, made: Callable[[str, bytes], bytes], first: bytes) -> Mutation:
    records = [made(f"http://e.org/{i}", f"<html><p>{words(i)}".encode()) for i in range(UNITS)]
    unit = rng.randrange(UNITS)
    match rng.randrange(3):
        case 0:
            end = records[unit].index(b"u%dw0" % unit)
            records[unit] = hit(rng, records[unit], 0, end)
        case 1:
            del records[unit]
        case _:
            records.insert(unit, records[unit])
    if first:
        records.insert(0, first)
    packed = map(gzip.compress, records) if rng.random() < 0.5 else records
    return b"".join(packed), {unit}


def a_gz_warc(rng: random.Random) -> Mutation:
    records = [gzip.compress(record(f"http://e.org/{i}", f"<html><p>{words(i)}".encode())) for i in range(UNITS)]
    unit = rng.randrange(UNITS)
    records[unit] = hit(rng, records[unit])
    return b"".join(records), {unit}


def a_csv(rng: random.Random) -> Mutation:
    rows = [f'{i},"{words(i)}",x\r\n'.encode() for i in range(UNITS)]
    unit = rng.randrange(UNITS)
    structure = [i for i, byte in enumerate(rows[unit]) if byte in b'",\r\n']
    at = rng.choice(structure)
    row = rows[unit]
    rows[unit] = row[:at] + rng.choice([b"", row[at : at + 1] * 2, b'"', b"x"]) + row[at + 1 :]
    # a line end that is lost makes one row of two
    touched = {unit, unit + 1} if at >= len(row) - 2 else {unit}
    return b"id,text,more\r\n" + b"".join(rows), touched


def a_jsonl(rng: random.Random) -> Mutation:
    rows = [json_lines([{"id": i, "text": words(i)}]) for i in range(UNITS)]
    unit = rng.randrange(UNITS)
    rows[unit] = hit(rng, rows[unit][:-1]) + b"\n"
    return b"".join(rows), {unit}


READERS = {
    "a.epub": an_epub,
    "a.docx": a_docx,
    "a.pdf": a_pdf,
    "a.zip": a_zip,
    "a.tar": a_tar,
    "a.warc": a_warc,
    "a.arc": an_arc,
    "a.warc.gz": a_gz_warc,
    "a.csv": a_csv,
    "a.jsonl": a_jsonl,
}


def told(path: str, rows: bool) -> tuple[str, list[str]]:
    texts: list[str] = []
    losses: list[str] = []
    for found in documents([path], rows=rows):
        text, lost = reading(found)
        texts.append(text)
        losses += lost
    return "\n".join(texts), losses


def mutations(make: Callable[[random.Random], Mutation], name: str, n: int) -> Iterator[tuple[int, Mutation]]:
    for seed in range(n):
        yield seed, make(random.Random(f"{name} {seed}"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", READERS)
def test_a_part_that_was_not_touched_is_read_or_told_of(tmp_path: Path, pytestconfig: pytest.Config, name: str) -> None:
    path = tmp_path / name
    silent: list[str] = []
    for seed, (data, touched) in mutations(
        READERS[name], name, 2000 if pytestconfig.getoption("--all-moments") else 100
    ):
        path.write_bytes(data)
        text, losses = told(str(path), rows=seed % 2 == 1)
        missing = missing_units(text, touched)
        if missing and not losses:
            silent.append(f"mutation {seed}: units {missing} are missing, and nothing is told")
    assert silent == []


def missing_units(text: str, touched: set[int]) -> Sequence[int]:
    found = set(re.findall(r"u\dw\d+x\d+", text))
    return [i for i in range(UNITS) if i not in touched and not found.issuperset(words(i).split())]
