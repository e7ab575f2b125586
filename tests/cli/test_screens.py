"""What a person sees on a terminal: whole outputs, with ids, times and speeds masked."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from program import program

from rwkv_stream.answers import ask, summaries
from rwkv_stream.cli import console
from rwkv_stream.model import generation
from rwkv_stream.model.generation import Row


class _Terminal:
    """Lets the streams of `program` be terminals of some width."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        patch.setenv("TERM", "xterm")
        patch.setenv("NO_COLOR", "1")
        patch.setattr("io.TextIOWrapper", _Stream)

    def see(self, width: int, *arguments: object) -> list[str]:
        """The lines on stdout, then those on stderr."""
        self._patch.setenv("COLUMNS", str(width))
        ended = program(*arguments)
        assert ended.code == 0, ended.err
        out, err = (_plain(stream) for stream in (ended.out, ended.err))
        assert all(len(line.rstrip()) <= width for line in out)
        return [_masked(line).rstrip() for line in (*out, *err) if line.strip()]


def _plain(stream: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream).splitlines()


class _Stream(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def _masked(line: str) -> str:
    line = re.sub(r"[0-9a-f]{12,64}", lambda found: "#" * len(found[0]), line)
    line = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "YYYY-MM-DD hh:mm", line)
    line = re.sub(r"\b\d\.\d{4}\b", "N     ", line)  # a cosine, as wide as it was
    return re.sub(r"[\d,.]+ (s|tok/s)\b", r"N \1", line)


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> _Terminal:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "store"))
    Path("notes").mkdir()
    Path("notes/lamp.txt").write_text("The keeper lit the lamp.\n")
    Path("notes/a-name-that-is-longer-than-a-narrow-terminal-is-wide.txt").write_text("The sea was calm.\n")
    return _Terminal(monkeypatch)


def test_reading_a_folder_and_looking_at_it(terminal: _Terminal) -> None:
    long = "notes/a-name-that-is-longer-than-a-narrow-terminal-is-wide.txt"
    read = terminal.see(80, "ingest", "notes", "--snapshot-every", 1024)
    assert [line for line in read if "of 2" in line and "tok" in line and "[" in line] == [
        f"1 of 2 {long} [############]: 18 tokens; 1 snapshot, N s, N tok/s",
        "2 of 2 notes/lamp.txt [############]: 25 tokens; 1 snapshot, N s, N tok/s",
    ]
    assert read[-1] == "2 of 2 documents: 43 tokens, 2 snapshots, N s"
    again = terminal.see(80, "ingest", "notes")
    assert again[-2:] == [
        "2 of 2 notes/lamp.txt [############]: already read, 25 tokens; nothing to do",
        "2 of 2 documents (2 had been read already): 0 tokens, 0 snapshots, N s",
    ]

    assert terminal.see(80, "snapshots", "list") == [
        "id            document                     tokens  text  created           marks",
        "############  notes/a-name-that-is-longer  18      18 B  YYYY-MM-DD hh:mm  text",
        "              -than-a-narrow-terminal-is-",
        "              wide.txt",
        "############  notes/lamp.txt               25      25 B  YYYY-MM-DD hh:mm  text",
        "left out: parent, model, size; a wider terminal, a pipe or --json has them",
    ]
    assert terminal.see(60, "snapshots", "list", "lamp.txt") == [
        "id            document        tokens  text  marks",
        "############  notes/lamp.txt  25      25 B  text",
        "left out: parent, model, size, created; a wider terminal, a pipe or --json has them",
    ]
    wide = terminal.see(120, "snapshots", "list", "lamp.txt")
    assert wide[0].split() == ["id", "document", "tokens", "text", "size", "parent", "created", "model", "marks"]
    assert len(wide) == 2


def test_what_is_shown_of_a_snapshot(terminal: _Terminal) -> None:
    terminal.see(80, "ingest", "notes/lamp.txt")
    shown = terminal.see(80, "snapshots", "show", "lamp.txt")
    names = [line[:15].strip() for line in shown if line[:1].strip() and line[:1].isalpha()]
    assert names[: names.index("at") + 1] == [
        *(
            "field",
            "id",
            "document",
            "head of",
            "tags",
            "has read",
            "state",
            "text",
            "can be",
            "exact",
            "made",
            "model",
        ),
        *("adds", "bits per byte", "of what it adds", "read last", "at"),
    ]
    assert "read last        The keeper lit the lamp." in shown
    assert "at               line 1" in shown
    assert "state_digest" in "\n".join(terminal.see(120, "-v", "snapshots", "show", "lamp.txt"))

    terminal.see(80, "--store", "without", "ingest", "notes/lamp.txt", "--no-text")
    show = ("snapshots", "show", "lamp.txt")
    assert "read last        The keeper lit the lamp." in terminal.see(80, "--store", "without", *show)
    Path("notes/lamp.txt").write_text("The keeper lit no lamp..\n")
    assert "read last        The keeper lit the lamp." in terminal.see(80, *show), "as it was kept"
    changed = " ".join(" ".join(terminal.see(80, "--store", "without", *show)).split())
    assert "not to be shown: not kept, and the document is no file here any more, or another text" in changed


@pytest.mark.parametrize(
    ("cut", "shown"),
    [
        ({"is_cut_before": True}, "… sat on the"),
        ({"is_cut_behind": True}, "at sat on …"),
        ({}, "at sat on the"),
    ],
    ids=["before", "behind", "whole"],
)
def test_an_excerpt_is_cut_between_words(cut: dict[str, bool], shown: str) -> None:
    assert console.excerpt("at sat\non the", **cut) == shown
    assert console.excerpt("", **cut) == ""


LONG = (
    "The keeper climbed the stair each evening, lit the lamp, and wrote the hour in a green book that nobody else has "
    "read.\n\nThe sea was calm."
)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says LONG, whatever it is asked."""
    monkeypatch.setattr(ask, "stripped", lambda pieces: iter(re.split("(?<= )", LONG)))
    complete = generation.complete

    def completed(*arguments: Any) -> list[Row]:
        rows = complete(*arguments)
        for row in rows:
            monkeypatch.setattr(row, "text", LONG)
        return rows

    for module in (generation, summaries):
        monkeypatch.setattr(module, "complete", completed)


@pytest.fixture
def read(terminal: _Terminal) -> _Terminal:
    Path("keeper.txt").write_text("The keeper lit the lamp. " * 90)
    terminal.see(80, "ingest", "keeper.txt", "--chunk", 1024, "--snapshot-every", 1024)
    return terminal


LINES = {
    60: [
        "The keeper climbed the stair each evening, lit the lamp, and",
        "wrote the hour in a green book that nobody else has read.",
        "The sea was calm.",
    ],
    80: [
        "The keeper climbed the stair each evening, lit the lamp, and wrote the hour in a",
        "green book that nobody else has read.",
        "The sea was calm.",
    ],
    120: [
        "The keeper climbed the stair each evening, lit the lamp, and wrote the hour in a green book that nobody else "
        "has read.",
        "The sea was calm.",
    ],
}
INDENTED = {
    60: [
        "  The keeper climbed the stair each evening, lit the lamp,",
        "  and wrote the hour in a green book that nobody else has",
        "  read.",
        "  The sea was calm.",
    ],
    80: [
        "  The keeper climbed the stair each evening, lit the lamp, and wrote the hour in",
        "  a green book that nobody else has read.",
        "  The sea was calm.",
    ],
    120: [f"  {line}" for line in LINES[120]],
}
FROM = "from snapshot ############, token 2,250 of 'keeper.txt'"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_answers_and_summaries(read: _Terminal, said: None, width: int) -> None:
    Path("asked.txt").write_text("Who lit the lamp, and in which book did he write the hour of it?\nWas it calm?\n")
    of = "--from-snapshot", "keeper.txt", "--max-tokens", 4
    assert read.see(width, "ask", "Who?", *of, "--strategy", "state") == [*LINES[width], FROM]
    asked = ["Who lit the lamp, and in which book did he write the hour of it?"]
    if width == 60:
        asked = ["Who lit the lamp, and in which book did he write the hour of", "it?"]
    assert read.see(width, "ask", "--questions", "asked.txt", *of, "--strategy", "state") == [
        *asked,
        *INDENTED[width],
        "Was it calm?",
        *INDENTED[width],
        FROM,
    ]
    assert read.see(width, "summarize", *of) == [*LINES[width], FROM]
    spans = "bytes 0 to 1,024", "bytes 1,024 to 2,048", "bytes 2,048 to 2,250"
    each = [line for span in spans for line in (span, *INDENTED[width])]
    assert read.see(width, "summarize", "--each", *of) == [*each, FROM]
    assert read.see(width, "summarize", "--tree", *of) == [*each, "level 1, bytes 0 to 2,250", *INDENTED[width], FROM]


def test_hits(read: _Terminal) -> None:
    made = read.see(80, "embed", "notes", "keeper.txt", "--unit", "sentence,document", "-o", "t.parquet")
    assert (made[0], made[-1]) == ("95", "95 rows of 3 documents in 't.parquet'; 2,293 tokens, N s")
    lit = "The keeper lit the lamp."

    def search(width: int, *options: object) -> list[str]:
        return read.see(width, "search", lit, "t.parquet", *options)

    assert search(60, "--k", 2, "--unit", "sentence") == [
        "rank  score   document        text",
        "1     N       notes/lamp.txt  The keeper lit the lamp.",
        "2     N       keeper.txt      The keeper lit the lamp. The",
        *["                              keeper lit the lamp. The"] * 2,
        "                              keeper lit the lamp. The …",
        "left out: bytes, unit; a wider terminal, a pipe or --json has them",
    ]
    assert search(80, "--k", 3, "--unit", "document") == [
        "rank  score   document                   unit        text",
        f"1     N       notes/lamp.txt             document 0  {lit}",
        f"2     N       keeper.txt                 document 0  {lit}",
        *[f"                                                     {lit}"] * 6,
        "                                                     The keeper lit the …",
        "3     N       notes/a-name-that-is-long  document 0  The sea was calm.",
        "              er-than-a-narrow-terminal",
        "              -is-wide.txt",
        "left out: bytes; a wider terminal, a pipe or --json has them",
    ]
    assert search(120, "--k", 2, "--around", 0) == [
        "rank  score   document        unit        bytes  text",
        f"1     N       notes/lamp.txt  sentence 0  0-24   {lit}",
        f"2     N       keeper.txt      sentence 0  0-24   {lit}",
    ]


def test_a_streamed_line_is_broken_between_words() -> None:
    def broken(text: str, size: int) -> str:
        return "".join(console._wrapped((text[i : i + size] for i in range(0, len(text), size)), 10))

    for size in (1, 3, 100):
        assert broken("one two three\n  four   five six\n\nseven", size) == "one two\nthree\n  four\nfive six\n\nseven"
        assert broken("abcdefghijklmnop qr", size) == "abcdefghij\nklmnop qr"
        assert broken("吾輩は猫である。", size) == "吾輩は猫で\nある。"
