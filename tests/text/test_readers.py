"""Readers: a text comes out as the same valid UTF-8 whatever is around it; what is no text is refused by name."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import itertools
import lzma
import os
import random
import re
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readings import reading, unprivileged

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.text.readers import SAMPLE_BYTES, Document, document, documents
from rwkv_stream.text.readers.streams import explained

INPUTS = Path(__file__).parents[3] / "shared/data/inputs"
PROSE = "The keeper lit the lamp; “ah”, said he, é 漢字 🙂.\r\n"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def read(path: Path | str, encoding: str | None = None) -> str:
    return opened(path, encoding)[0]


def opened(path: Path | str, encoding: str | None = None) -> tuple[str, str, int]:
    """The text, its encoding, the number of replaced bytes; every piece is checked to be whole characters."""
    with document(str(path)).text(encoding) as text:
        decoded = "".join(piece.decode() for piece in text)
        assert text.raw_bytes_read == text.raw_size == Path(path).stat().st_size
        return decoded, text.encoding, text.replaced_bytes


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes, name: str = "a.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    return write


class Dribble(io.RawIOBase):
    """A stdin whose bytes arrive a few at a time."""

    def __init__(self, data: bytes, seed: int) -> None:
        self.data, self.at, self.rng = data, 0, random.Random(seed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        n = min(len(buffer), self.rng.choice([1, 2, 3, 100, 5000]), len(self.data) - self.at)
        buffer[:n] = self.data[self.at : self.at + n]
        self.at += n
        return n


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, seed: int = 0) -> Document:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Dribble(data, seed))))
    return document("-", name="piped")


# ---- encodings ----


def test_utf8_comes_through(file: Callable[..., Path]) -> None:
    text = PROSE * 5000 + "\x00end\r"
    assert opened(file(text.encode())) == (text, "utf-8", 0)


@pytest.mark.parametrize("n", range(6))
def test_a_character_on_the_edge_of_the_sample(file: Callable[..., Path], n: int) -> None:
    text = "x" * (SAMPLE_BYTES - n) + "🙂漢é" * 3
    assert opened(file(text.encode())) == (text, "utf-8", 0)


@pytest.mark.parametrize(
    ("bom", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("n_lines", [1, 3000])
def test_byte_order_marks(file: Callable[..., Path], bom: bytes, encoding: str, n_lines: int) -> None:
    text = PROSE * n_lines + "\ufeff: a mark in the middle stays"
    path = file(bom + text.encode(encoding))
    assert opened(path) == (text, encoding, 0)
    assert opened(path, encoding) == (text, encoding, 0), "the encoding of a record gives the same text"
    named = encoding.removesuffix("-le").removesuffix("-be").replace("utf-8", "utf-8-sig")
    assert opened(path, named) == (text, encoding, 0)


def test_only_the_first_character_is_a_byte_order_mark(file: Callable[..., Path]) -> None:
    text = "x" * SAMPLE_BYTES + "\ufeff, read at the start of a piece"
    assert opened(file(text.encode())) == (text, "utf-8", 0)
    assert read(file(codecs.BOM_UTF8 * 2 + b"twice")) == "\ufefftwice"


def test_utf16_without_a_mark_is_little_endian_where_named(file: Callable[..., Path]) -> None:
    path = file(PROSE.encode("utf-16-le") * 20)
    assert opened(path, "utf-16") == (PROSE * 20, "utf-16-le", 0)
    with pytest.raises(InputError, match="--encoding utf-16-le"):
        read(path)


SENTENCES = {
    "cp1252": "Les élèves étaient très fatigués après une journée passée à étudier. Où irons-nous, dit l'aîné?\n",
    "cp1251": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n",
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "gb18030": "天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n",
    "big5": "天下大勢，分久必合，合久必分。周末七國分爭，並入於秦。\n",
}


@pytest.mark.parametrize("encoding", SENTENCES)
@pytest.mark.parametrize("n_lines", [30, 3000])
def test_other_encodings_are_found(file: Callable[..., Path], encoding: str, n_lines: int) -> None:
    text = SENTENCES[encoding] * n_lines
    decoded, found, replaced = opened(file(text.encode(encoding)))
    assert (decoded, replaced) == (text, 0)
    assert opened(file(text.encode(encoding)), encoding)[0] == text
    assert opened(file(text.encode(encoding)), found)[0] == text


@pytest.mark.parametrize("offset", range(3))
def test_another_encoding_with_a_character_on_the_edge_of_the_sample(file: Callable[..., Path], offset: int) -> None:
    text = "x" * offset + SENTENCES["cp932"].replace("\n", ", ") * 2000
    decoded, encoding, _ = opened(file(text.encode("cp932")))
    assert (decoded, encoding) == (text, "cp932")


def test_the_encoding_waits_while_all_is_ascii(file: Callable[..., Path]) -> None:
    start = "word " * (SAMPLE_BYTES // 5 + 1)
    for text, encoding, replaced in (
        (start + SENTENCES["cp1252"] * 30, "cp1252", 0),
        (start + SENTENCES["cp932"] * 3000, "cp932", 0),
        (start + "caf\ufffd " + SENTENCES["cp1252"] * 30, "utf-8", 1),
        (start, "ascii", 0),
    ):
        data = text.replace("\ufffd", "\udcff").encode(encoding, "surrogateescape")
        assert opened(file(data))[::2] == (text, replaced)
    assert opened(file(start.encode()))[1] == "ascii"
    late = start.encode() + SENTENCES["cp1252"].encode("cp1252") + b"x" * SAMPLE_BYTES + "é".encode() * 999
    assert opened(file(late))[1] != "utf-8", "the 64 KiB that begin with the first byte over 127 decide alone"


def test_what_decides_the_encoding_does_not_depend_on_how_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word ~ \x1b[0m " * 6000 + SENTENCES["cp932"] * 200
    for seed in range(2):
        with piped(monkeypatch, text.encode("cp932"), seed).text() as found:
            assert found.encoding == "ascii"
            assert b"".join(found).decode() == text
            assert (found.encoding, found.encoding_source) == ("cp932", "guess")


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("iso2022_jp_ext", SENTENCES["cp932"]),
        ("iso2022_jp_2", SENTENCES["cp932"] + "한국어 中国话们\n"),
        ("iso2022_kr", "노인은 먼 곳에서 왔고 모두 불 주위에 조용히 앉아 있었다.\n"),
        ("hz", SENTENCES["gb18030"]),
    ],
)
def test_escape_sequences_are_unmistakable(file: Callable[..., Path], encoding: str, text: str, is_late: bool) -> None:
    before = "Subject: x\n" * (SAMPLE_BYTES // 10 if is_late else 3)
    data = before.encode() + text.encode(encoding)
    with document(str(file(data))).text() as found:
        assert b"".join(found).decode() == before + text
        assert (found.encoding, found.encoding_source, found.replaced_bytes) == (encoding, "escape sequence", 0)
    assert read(file(data), encoding) == before + text, "the encoding of a record gives the same text"


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 65_536])
def test_chinese_by_iso_2022(file: Callable[..., Path], read_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.text.readers.encodings.READ_BYTES", read_bytes)

    def shifted(text: str) -> bytes:
        return b"\x0e" + bytes(byte & 0x7F for byte in text.encode("gb2312")) + b"\x0f"

    data = b"From: a\r\n\x1b$)A" + shifted("天下大势") + b", " + shifted("分久必合") + b"\r\n"
    assert opened(file(data)) == ("From: a\r\n天下大势, 分久必合\r\n", "iso2022_cn", 0)
    data = b"\x1b$)A" + shifted("天") + b"\x1b$*H\x1bN!! \x1b$)G\x0e!!\x0f\n\x0e\x1b$)A" + shifted("下")[1:-2]
    expected = "天" + "\ufffd" * 4 + " " + "\ufffd" * 2 + "\n\ufffd"
    assert opened(file(data), "iso-2022-cn") == (expected, "iso2022_cn", 7), "of two characters, and one cut short"


def test_what_looks_like_an_escape_sequence_is_none(file: Callable[..., Path]) -> None:
    for text in (
        "\x1b[1mbold\x1b(B\x1b[m of a terminal\n",
        '(format t "~{~a~^, ~}" list)\n',
        "cd ~/src; grep '~{' ~}\n" + "x" * SAMPLE_BYTES + " ~{<:Ky~}",
        "a ~{<:Ky~} after ~ home\n" * 2,
        "\x1b$B odd\n",
    ):
        assert opened(file(text.encode())) == (text, "ascii", 0)


def test_utf8_with_latin_parts_is_utf8(file: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    good, bad = SENTENCES["cp1252"].encode() * 2, SENTENCES["cp1252"].encode("cp1252") * 3
    text, encoding, replaced = opened(file(good + bad))
    assert text.startswith(SENTENCES["cp1252"] * 2) and text.count("\ufffd") == replaced == 39
    assert encoding == "utf-8" and "39 bytes could not be decoded" in caplog.text


@pytest.mark.parametrize(
    ("bad", "replaced"),
    [
        (b"\xff", 1),
        (b"\xe4\xb8", 2),
        (b"\xf0\x9f\x99", 3),
        (b"\xc0\x80", 2),
        (b"\xed\xa0\x80", 3),
        (b"\xf5\x80\x80\x80", 4),
    ],
)
def test_each_undecodable_byte_is_one_replacement(file: Callable[..., Path], bad: bytes, replaced: int) -> None:
    before, after = "x" * SAMPLE_BYTES, "é \ufffd and on"
    expected = before + "\ufffd" * replaced + after
    assert opened(file(before.encode() + bad + after.encode())) == (expected, "utf-8", replaced)
    assert opened(file(bad + after.encode()), "utf-8") == (expected[len(before) :], "utf-8", replaced)


def test_an_incomplete_character_at_the_end(file: Callable[..., Path]) -> None:
    whole = "lamp 漢字".encode()
    assert opened(file(whole[:-1])) == ("lamp 漢\ufffd\ufffd", "utf-8", 2)
    assert opened(file("caf\xe9".encode()[:-1])) == ("caf\ufffd", "utf-8", 1)


def test_one_bad_byte_does_not_make_utf8_something_else(file: Callable[..., Path]) -> None:
    data = PROSE.encode() * 40
    text, encoding, replaced = opened(file(data + b"\xff" + data))
    assert (text, encoding, replaced) == (PROSE * 40 + "\ufffd" + PROSE * 40, "utf-8", 1)


def test_undecodable_bytes_in_other_encodings(file: Callable[..., Path]) -> None:
    assert opened(file(b"a\x81b"), "cp1252") == ("a\ufffdb", "cp1252", 1)
    assert opened(file(b"a\x82"), "shift_jis") == ("a\ufffd", "shift_jis", 1)
    assert opened(file(b"a\x00\x00\xd8b\x00"), "utf-16-le") == ("a\ufffd\ufffdb", "utf-16-le", 2)
    assert opened(file(b"\\ud800x"), "unicode_escape")[::2] == ("\ufffdx", 1)
    assert opened(file("é".encode()), "ascii") == ("\ufffd\ufffd", "ascii", 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(st.binary(max_size=8) | st.text(max_size=8).map(str.encode), max_size=20).map(b"".join),
    encoding=st.sampled_from(["utf-8", "utf-16-le", "shift_jis", "gb18030", "utf-32-be", "cp1252"]),
    read_bytes=st.sampled_from([1, 2, 3, 7]),
)
def test_any_bytes_in_any_reads(tmp_path: Path, data: bytes, encoding: str, read_bytes: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"plain text first " + data)  # so that no magic matches
    text, _, replaced = opened(path, encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_stream.text.readers.encodings.READ_BYTES", read_bytes)
        assert opened(path, encoding) == (text, encoding, replaced)
    if encoding == "utf-8":
        whole = path.read_bytes()
        assert text.replace("\ufffd", "") == whole.decode(errors="ignore").replace("\ufffd", "")
        assert replaced == len(whole) - len(whole.decode(errors="ignore").encode())
    else:
        assert replaced <= text.count("\ufffd")


@pytest.mark.parametrize("name", ["klingon", "base64", "rot13", "undefined", "idna", "", "utf-8\x00"])
def test_an_unknown_encoding_is_a_usage_error(file: Callable[..., Path], name: str) -> None:
    path = file(b"text")
    if name:
        with pytest.raises(UsageError, match="expected the name of an encoding"):
            document(str(path)).text(name)
    with pytest.raises(UsageError, match="expected the name of an encoding"):
        document(str(path), encoding=name)


def test_the_users_encoding_stays_with_the_document(file: Callable[..., Path]) -> None:
    path = file("é".encode("latin-1"))
    with document(str(path), encoding="latin-1").text() as text:
        assert b"".join(text) == "é".encode()
        assert text.encoding == "iso8859-1"


# ---- compression ----


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_text_whatever_its_name(file: Callable[..., Path], kind: str) -> None:
    text = PROSE * 4000
    assert opened(file(COMPRESS[kind](text.encode()))) == (text, "utf-8", 0)


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_in_a_row(file: Callable[..., Path], kind: str) -> None:
    data = PROSE.encode() * 900
    cuts = [0, 1, 5, 40_000, 40_001, 40_001, len(data)]
    members = [COMPRESS[kind](data[a:b]) for a, b in itertools.pairwise(cuts)]
    assert opened(file(b"".join(members))) == (data.decode(), "utf-8", 0)


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_that_arrive_a_few_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = PROSE.encode() * 900
    packed = COMPRESS[kind](data[:30_000]) + COMPRESS[kind](data[30_000:])
    for seed in range(3):
        with piped(monkeypatch, packed, seed).text() as text:
            assert b"".join(text) == data


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("n_lost", [1, 5, 300, -10])
def test_truncated(file: Callable[..., Path], kind: str, n_lost: int) -> None:
    rng = random.Random(0)
    packed = COMPRESS[kind](bytes(rng.choices(range(97, 123), k=200_000)))
    packed = packed[: len(packed) - n_lost] if n_lost > 0 else packed[: -n_lost + 20]
    text, (loss,) = reading(str(file(packed)))
    assert re.search(r"'.*a\.txt': expected whole compressed data, found that it ends too early", loss)
    assert len(text) > 130_000 or kind == "bz2" or n_lost < 0, "whole blocks are read; those of bz2 have 900 kB"


@pytest.mark.parametrize("kind", COMPRESS)
def test_damaged(file: Callable[..., Path], kind: str) -> None:
    rng = random.Random(0)
    packed = bytearray(COMPRESS[kind](bytes(rng.choices(range(97, 123), k=200_000))))
    for i in range(len(packed) // 2, len(packed) // 2 + 40):
        packed[i] ^= 0x5A
    text, losses = reading(str(file(bytes(packed))))
    assert re.search(r"reading '.*a\.txt': expected whole compressed data", losses[0])
    assert text or kind in ("bz2", "zstd"), "blocks of 128 kB and of 900"


def test_a_gzip_with_a_wrong_checksum(file: Callable[..., Path]) -> None:
    packed = bytearray(gzip.compress(PROSE.encode() * 100))
    packed[-6] ^= 1
    text, (loss,) = reading(str(file(bytes(packed))))
    assert "CRC check failed" in loss
    assert text == PROSE * 100, "what is wrong may be anywhere in it"


def test_zstd_with_skippable_frames_and_unknown_sizes(file: Callable[..., Path]) -> None:
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    frame = stream.compress(PROSE.encode() * 50) + stream.flush()
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    assert read(file(skippable + frame + skippable + frame)) == PROSE * 100


def test_compressed_emptiness(file: Callable[..., Path]) -> None:
    for kind in COMPRESS:
        assert read(file(COMPRESS[kind](b""))) == ""


# ---- memory ----


@pytest.mark.parametrize("kind", ["plain", "gzip", "zstd", "xz", "bz2"])
def test_memory_does_not_grow_with_the_file(file: Callable[..., Path], kind: str) -> None:
    data = b"x" * 20_000_000  # on one line, and as compressible as can be
    path = file(COMPRESS[kind](data) if kind != "plain" else data)
    n_bytes = 0
    tracemalloc.start()
    with document(str(path)).text() as text:
        for piece in text:
            assert len(piece) <= 65_536
            n_bytes += len(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes == len(data)
    assert peak < 10_000_000  # xz keeps 8 MiB as its dictionary, zstd makes up to 4 MiB from 128 bytes


def test_progress_is_known_while_reading(file: Callable[..., Path]) -> None:
    path = file(PROSE.encode() * 10_000)
    with document(str(path)).text() as text:
        seen = [text.raw_bytes_read]
        seen += [text.raw_bytes_read for _ in text]
        assert text.raw_size == path.stat().st_size
    assert seen[0] == PROSE.encode().index("“".encode()) + SAMPLE_BYTES
    assert seen == sorted(seen) and seen[-1] == text.raw_size
    assert len(set(seen)) > 5


# ---- what is no text ----

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PNG, "found an image; pass a text"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), "found a program"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504),
            "found an old or password-protected Microsoft Office document",
        ),
        (b"SQLite format 3\x00" + bytes(50), "found an SQLite database"),
        (gzip.compress(gzip.compress(b"text")), "found compressed data inside compressed data; unpack it once"),
        (gzip.compress(PNG), "found an image"),
        (bytes(1000), "found binary data; if it is text, name its encoding"),
        (random.Random(0).randbytes(5000), "found binary data"),
        (bytes(range(1, 32)) * 20, "found binary data"),
    ],
)
def test_binary_files_are_refused(file: Callable[..., Path], data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"reading '.*a\.txt': expected text, {message}"):
        read(file(data))


@pytest.mark.parametrize("data", [b"", b"x", b"\x00", b"\n", b"a\x00b\x00" + b"c" * 20, b"\x1b[31mred\x1b[0m\n" * 50])
def test_small_and_odd_texts_are_texts(file: Callable[..., Path], data: bytes) -> None:
    assert read(file(data)) == data.decode()


def test_names_of_files_say_nothing(file: Callable[..., Path]) -> None:
    for name in ("a.md", "b.rst", "c.log", "d", "e.png"):
        assert read(file(PROSE.encode(), name)) == PROSE


# ---- where texts are found ----


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reading '.*nothing\.txt': .*No such file or directory; check the path"):
        document(str(tmp_path / "nothing.txt"))
    for source in ("", "a\x00b"):
        with pytest.raises(InputError, match="expected a file or folder"):
            document(source)


def test_a_file_that_vanishes(file: Callable[..., Path]) -> None:
    path = file(b"text")
    found = document(str(path))
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        found.text()


def test_a_folder(file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("notes/b.txt", "notes/a/z.md", "notes/a/y.log.gz", "notes/c", "notes/.hidden", "notes/.git/config"):
        file(gzip.compress(b"text") if name.endswith("gz") else b"text", name)
    file(PNG, "notes/picture.txt")
    file(b"", "notes/empty.txt")
    (tmp_path / "notes/d.txt").symlink_to("b.txt")
    (tmp_path / "notes/loop").symlink_to("..")
    (tmp_path / "notes/broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "notes/fifo")
    monkeypatch.chdir(tmp_path)
    expected = ["notes/a/y.log.gz", "notes/a/z.md", "notes/b.txt", "notes/c", "notes/d.txt"]
    expected.insert(3, "notes/broken")
    assert [d.name for d in documents(["notes"])] == expected
    assert [d.name for d in documents(["notes/"])] == expected
    assert [d.name for d in documents([".", "notes/c"])] == [*("./" + name for name in expected), "notes/c"]
    for found in documents(["notes"]):
        assert found.reopenable
        text, losses = reading(found)
        assert (text, losses == []) == (("", False) if found.name == "notes/broken" else ("text", True))


def test_a_folder_says_what_it_leaves_out(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", ".git/config", ".x", *(f"{i}.tmp" for i in range(5))):
        file(b"text", f"notes/{name}")
    file(SENTENCES["cp1251"].encode("utf-16-le"), "notes/russian.txt")
    file(b"", "notes/empty.txt")
    with tarfile.open(tmp_path / "notes/b.tar", "w") as archive:
        archive.add(tmp_path / "notes/a.txt", "in.txt")
        archive.add(tmp_path / "notes/.x", ".y")
    monkeypatch.chdir(tmp_path)
    assert [d.name for d in documents(["notes"], exclude=["*.tmp"])] == ["notes/a.txt", "notes/b.tar/in.txt"]
    assert caplog.messages == [
        "'notes': left out: 3 hidden (notes/.git/, notes/.x, notes/b.tar/.y); 5 excluded (notes/0.tmp, notes/1.tmp, "
        "notes/2.tmp, …); 1 empty (notes/empty.txt); 1 without text (notes/russian.txt); what is named itself is read"
    ]
    caplog.clear()
    assert [d.name for d in documents(["notes/b.tar"])] == ["notes/b.tar/in.txt"]
    assert caplog.messages == ["'notes/b.tar': left out: 1 hidden (notes/b.tar/.y); what is named itself is read"]


def test_patterns_choose_the_files_of_a_folder(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "b.md", "lib/c.py", "lib/tests/d.py", "tests/e.py", "tests/f.md"):
        file(b"text", f"src/{name}")
    monkeypatch.chdir(tmp_path)

    def named(*sources: str, **patterns: list[str]) -> list[str]:
        return [d.name.removeprefix("src/") for d in documents(sources or ["src"], **patterns)]

    assert named(include=["*.py"]) == ["a.py", "lib/c.py", "lib/tests/d.py", "tests/e.py"]
    assert named(include=["*.py", "*.md"], exclude=["tests/"]) == ["a.py", "b.md", "lib/c.py"]
    assert named(exclude=["/tests", "!*.md"]) == ["a.py", "b.md", "lib/c.py", "lib/tests/d.py"]
    assert named("src/b.md", include=["*.py"]) == ["b.md"], "what is named is read"
    for wrong in ("", "#", "!"):
        with pytest.raises(UsageError, match=r"expected a pattern as of \.gitignore"):
            named(include=[wrong])


def test_what_git_ignores_is_left_out(
    file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (
        "a.py",
        "a.log",
        "build/b.py",
        "src/c.py",
        "src/keep.log",
        "src/gen/d.py",
        "src/e.tmp",
        "src/build/f.py",
    ):
        file(b"text", f"repo/{name}")
    file(b"*.log\n/build/\n!\n\\\n*.tmp\n", "repo/.gitignore")
    file(b"gen\n!keep.log\n", "repo/src/.gitignore")
    file(b"*.py", ".gitignore")  # outside the repository
    (tmp_path / "repo/.git").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [d.name for d in documents(["repo"])] == [
        "repo/a.py",
        "repo/src/build/f.py",
        "repo/src/c.py",
        "repo/src/keep.log",
    ]
    assert "4 ignored by .gitignore (repo/a.log, repo/build/, repo/src/e.tmp, …)" in caplog.text
    assert [d.name for d in documents(["repo/src"])] == ["repo/src/build/f.py", "repo/src/c.py", "repo/src/keep.log"]
    assert [d.name for d in documents(["repo/build"])] == ["repo/build/b.py"], "what is named is read"


def test_a_folder_without_text(file: Callable[..., Path], tmp_path: Path) -> None:
    file(PNG, "notes/picture.png")
    file(b"", "notes/empty.txt")
    file(b"text", "notes/.hidden.txt")
    with pytest.raises(InputError, match="expected a folder with text, found none; left out: 1 hidden"):
        list(documents([str(tmp_path / "notes")]))


def test_a_damaged_file_in_a_folder_is_a_document_that_fails(file: Callable[..., Path], tmp_path: Path) -> None:
    file(b"text", "notes/a.txt")
    file(gzip.compress(PROSE.encode() * 10)[:40], "notes/b.gz")
    first, second = documents([str(tmp_path / "notes")])
    with first.text() as text:
        assert b"".join(text) == b"text"
    text, (loss,) = reading(second)
    assert "ends too early" in loss and (PROSE * 10).startswith(text)


def test_globs(file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/er/d.txt", ".hidden.txt"):
        file(b"text", name)
    file(PNG, "picture.txt")
    file(b"text", "odd[1].txt")
    monkeypatch.chdir(tmp_path)
    assert [d.name for d in documents(["*.txt"])] == ["a.txt", "b.txt", "odd[1].txt"]
    assert [d.name for d in documents(["**/*.txt"])] == ["a.txt", "b.txt", "deep/er/d.txt", "odd[1].txt"]
    assert [d.name for d in documents(["*"])] == ["a.txt", "b.txt", "c.md", "odd[1].txt"]
    assert document("odd[1].txt").name == "odd[1].txt", "a file of that name comes first"
    with pytest.raises(InputError, match="expected files that match the pattern with text, found none"):
        list(documents(["*.rst"]))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "check its permissions"),
        (errno.ENOENT, "check the path"),
        (errno.ECONNREFUSED, "check the address, and that the server can be reached"),
        (errno.ENOSPC, "make room in '/.*'"),
        (errno.EIO, "try again"),
    ],
)
def test_what_to_do_fits_what_the_system_said(number: int, advice: str) -> None:
    with pytest.raises(InputError, match=f"reading 'a': .*{os.strerror(number)}; {advice}"), explained("a"):
        raise OSError(number, os.strerror(number))


def test_permissions(file: Callable[..., Path], tmp_path: Path) -> None:
    secret = file(b"text", "notes/secret.txt")
    closed = file(b"text", "notes/more/closed/a.txt").parent
    secret.chmod(0)
    closed.chmod(0)
    try:
        with unprivileged(tmp_path):
            found = document(str(secret))
            with pytest.raises(InputError, match=r"secret\.txt': .*Permission denied; check its permissions"):
                found.text()
            (locked,) = documents([str(tmp_path / "notes/more")])
            with pytest.raises(InputError, match=r"reading folder '.*closed': expected to list it, found: Permission"):
                locked.text()
            with pytest.raises(InputError, match="Permission denied"):
                document(str(closed / "a.txt"))
    finally:
        closed.chmod(0o755)


def test_one_name_for_one_document(file: Callable[..., Path], tmp_path: Path) -> None:
    path = file(b"text", "notes/a.txt")
    assert document(str(path), name="x").name == "x"
    assert document(str(path.parent), name="x").name == "x", "a folder of one text is one document"
    file(b"text", "notes/b.txt")
    with pytest.raises(UsageError, match="expected one source, found several"):
        list(documents([str(path.parent)], name="x"))
    with pytest.raises(UsageError, match="expected one document, found several"):
        document(str(path.parent))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_bytes(b"text")
    (found,) = documents([str(tmp_path)])
    assert found.name.endswith("/caf\\xe9.txt")
    assert found.name.encode()
    with found.text() as text:
        assert list(text) == [b"text"]


# ---- stdin and pipes ----


@pytest.mark.parametrize("seed", range(4))
def test_stdin_as_it_arrives(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    data = PROSE * 3000
    found = piped(monkeypatch, data.encode(), seed)
    assert (found.name, found.reopenable) == ("piped", False)
    with found.text() as text:
        assert b"".join(text).decode() == data
        assert (text.raw_size, text.raw_bytes_read) == (None, len(data.encode()))
    assert not sys.stdin.closed, "stdin is not ours to close"


def test_stdin_needs_a_name() -> None:
    with pytest.raises(UsageError, match="expected a name for the document, found none; pass --name"):
        document("-")


def test_stdin_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="reading stdin: expected an open stream"):
        document("-", name="x").text()


def test_stdin_is_decided_as_a_file_is(file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("x" * 2000 + SENTENCES["cp1252"] * 100).encode("cp1252")
    expected = opened(file(data))
    for seed in range(3):
        with piped(monkeypatch, data, seed).text() as text:
            assert (b"".join(text).decode(), text.encoding, text.replaced_bytes) == expected
    with pytest.raises(InputError, match="reading 'piped': expected text, found an image"):
        piped(monkeypatch, PNG).text()


def test_a_slow_pipe_begins_at_once_where_the_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    go_on = threading.Event()

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(b"the first line of the text\n")
            assert go_on.wait(20)
            pipe.write(b"the second\n")

    writer = threading.Thread(target=write)
    writer.start()
    found = document(str(path))
    assert not found.reopenable
    with found.text("utf-8") as text:
        assert text.raw_size is None
        first = b""
        while len(first) < 27:
            first += next(text)
        assert first == b"the first line of the text\n"
        go_on.set()
        assert b"".join(text) == b"the second\n"
    writer.join()


# ---- files of other people ----


def test_the_sample_texts() -> None:
    if not INPUTS.exists():
        pytest.skip(f"no '{INPUTS}'")
    found = {Path(d.name).name: d for d in documents([str(INPUTS)])}
    assert set(found) >= {"alice.txt", "access.log", "pep-0008.rst", "udhr-german-latin1.txt", "udhr-japanese-sjis.txt"}
    for name, encoding in (("udhr-german-latin1.txt", "latin-1"), ("udhr-japanese-sjis.txt", "cp932")):
        assert opened(INPUTS / name)[::2] == ((INPUTS / name).read_bytes().decode(encoding), 0)
    alice = (INPUTS / "alice.txt").read_bytes()
    assert alice.startswith(codecs.BOM_UTF8) and b"\r\n" in alice
    assert opened(INPUTS / "alice.txt") == (alice[3:].decode(), "utf-8", 0)
