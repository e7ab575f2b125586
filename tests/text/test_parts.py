"""Where lines and times stand in a kept text of several extents."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from rwkv_stream.errors import UsageError
from rwkv_stream.store.texts import KeptText, Stretch, Texts, TextWriter
from rwkv_stream.text import parts
from rwkv_stream.text.parts import Part
from rwkv_stream.text.times import NO_YEAR, line_time

START = datetime(2026, 11, 2, 23, 0)


def kept(folder: Path, data: bytes, size: int) -> KeptText:
    """A text in extents of so many bytes, the edges of which are anywhere in lines."""
    texts = Texts(folder / "texts", folder / "postings")

    def publish(name: str, extent: bytes, postings: bytes) -> None:
        texts.path(name).parent.mkdir(parents=True, exist_ok=True)
        texts.path(name).write_bytes(extent)

    writer = TextWriter(texts, None, {}, has_lines=True, publish=publish)
    for start in range(0, len(data), size):
        writer.write(Stretch(start, data[start : start + size], []))
    assert writer.name is not None
    return KeptText(texts, "a.log", writer.name, len(data), lambda *_: None)


def start(text: KeptText, kind: str, which: str) -> int:
    return Part.at(kind, which, "finding").bytes(text)[0]


@pytest.mark.parametrize("size", [7, 50, 1000])
def test_lines_are_found_by_what_extents_say(tmp_path: Path, size: int) -> None:
    data = b"".join(b"line %d\n" % i for i in range(1, 61)) + b"\n\nlast"
    text = kept(tmp_path, data, size)
    ends = [0, *itertools.accumulate(len(line) for line in data.splitlines(keepends=True))]
    assert [text.byte_of_line(i + 1) for i in range(len(ends))] == [*ends[:-1], None]
    assert start(text, "line", "63") == len(data) - 4
    with pytest.raises(UsageError, match=r"finding 'a.log': expected line 64, found 63 lines"):
        start(text, "line", "64")
    assert kept(tmp_path, b"a\n", size).byte_of_line(2) is None


FORMS = {
    "iso": lambda at: f"{at:%Y-%m-%dT%H:%M:%S}Z INFO",
    "brackets": lambda at: f"[{at:%Y-%m-%d %H:%M:%S}.250] x",
    "slashes": lambda at: f"{at:%Y/%m/%d %H:%M:%S} x",
    "syslog": lambda at: f"{at:%b} {at.day:2} {at:%H:%M:%S} host sshd[12]: x",
    "access": lambda at: f'10.0.0.1 - ann [{at:%d/%b/%Y:%H:%M:%S} +0000] "GET / HTTP/1.1" 200',
    "error": lambda at: f"[{at:%a %b %d %H:%M:%S}.123456 {at.year}] [core] x",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [37, 400])
def test_the_first_line_at_or_after_a_time(
    tmp_path: Path, form: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a new year, with lines between that begin with no time."""
    monkeypatch.setattr(parts, "_PIECE_BYTES", 128)
    first = datetime(2026, 12, 31, 22, 0)
    times = [first + timedelta(minutes=10 * i) for i in range(30)]
    lines = [f"{FORMS[form](at)}\n" + "  at frame\n" * (3 * (i % 4 == 1)) for i, at in enumerate(times)]
    text = kept(tmp_path, "".join(lines).encode(), size)
    starts = [0, *itertools.accumulate(map(len, lines))]
    for i in (0, 1, 2, 11, 12, 13, 29):
        assert start(text, "time", times[i].isoformat()) == starts[i]
        if i or form != "syslog":  # before the first line, which tells no year, is a year behind it
            assert start(text, "time", (times[i] - timedelta(minutes=3)).isoformat()) == starts[i]
    with pytest.raises(UsageError, match=r"expected time 2027-01-03, found lines from 12-31T22:00:00 to 01-01T02:50"):
        start(text, "time", "2027-01-03")


def test_zones(tmp_path: Path) -> None:
    data = b"2026-11-02T10:00:00+02:00 a\n2026-11-02T11:00:00+02:00 b\n2026-11-02T12:00:00+02:00 c\n"
    text = kept(tmp_path, data, 1000)
    assert start(text, "time", "2026-11-02T11:00") == data.index(b"b") - 26, "the log's own clock"
    assert start(text, "time", "2026-11-02T09:00:00Z") == data.index(b"b") - 26
    assert start(text, "time", "2026-11-02T12:00:00+03:00") == data.index(b"b") - 26


@pytest.mark.parametrize(
    ("line", "time"),
    [
        (b"2026-02-30 10:00:00 no such day", None),
        (b"Call me Ishmael.", None),
        (b"Foo  2 10:00:00 host", None),
        (b"<13>Feb 29 10:00:00 host", datetime(NO_YEAR, 2, 29, 10)),
        (b"2026-11-02T10:00:60,5 x", datetime(2026, 11, 2, 10, 0, 59, 500_000)),
        (b"2026-11-02 10:00 -0130 x", datetime(2026, 11, 2, 10, tzinfo=timezone(timedelta(hours=-1, minutes=-30)))),
    ],
)
def test_times_of_lines(line: bytes, time: datetime | None) -> None:
    assert line_time(line) == time


def test_what_cannot_be_found(tmp_path: Path) -> None:
    text = kept(tmp_path, b"no times\n# One\ntext\n", 9)
    with pytest.raises(UsageError, match="expected a time such as 2026-11-02T10:00, found 'noon'"):
        start(text, "time", "noon")
    with pytest.raises(UsageError, match="expected time 2026-11-02, found no line that begins with one"):
        start(text, "time", "2026-11-02")
    with pytest.raises(UsageError, match="expected page 1, found none; what it has is line:"):
        start(text, "page", "1")
    with pytest.raises(UsageError, match="finding: expected two numbers"):
        start(text, "page", "one")
