"""References to positions on the command line: what is taken, what that cost, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Ended, program

TEXT = "".join(f"In the year {year} the miller counted {year * 7 % 1000} sacks. " for year in range(40))


@pytest.fixture
def shelf(program_folder: Path) -> Path:
    (program_folder / "mill.txt").write_text(TEXT)
    (program_folder / "note.txt").write_text("The miller slept.")
    assert program("ingest", "mill.txt", "note.txt", "--chunk", 64, "--snapshot-every", 512).code == 0
    return program_folder


def taken(ended: Ended) -> dict[str, object]:
    assert ended.code == 0, ended.err
    found: dict[str, object] = json.loads(ended.out.splitlines()[0])["taken"]
    return found


GENERATE = ("generate", "--max-tokens", 2, "--seed", 1)


def test_what_was_taken_and_what_it_cost_is_said(shelf: Path) -> None:
    ended = program(*GENERATE, "--from-snapshot", "mill.txt@700")
    assert "token 700 of 'mill.txt'; 188 tokens read for its state" in ended.err
    again = program(*GENERATE, "--from-snapshot", "mill.txt@700")
    assert "token 700 of 'mill.txt'\n" in again.err and again.out == ended.out
    near = program(*GENERATE, "--from-snapshot", "mill.txt@700", "--nearest")
    assert "token 512 of 'mill.txt'; the nearest before 'mill.txt@700'" in near.err
    assert "17 tokens read for its state" in program(*GENERATE, "--from-snapshot", "note.txt").err
    assert "token 5 of 'mill.txt'" in program(*GENERATE, "--from-snapshot", "mill.txt@5").err, "before the first"
    assert program(*GENERATE, "--from-snapshot", "mill.txt@0").code == 10


@pytest.mark.parametrize(
    "command",
    [
        GENERATE,
        ("ask", "Who?", "--strategy", "state", "--max-tokens", 2),
        ("summarize", "--style", "generate", "--max-tokens", 2),
        ("score", "note.txt"),
        ("embed", "note.txt", "-o", "vectors.parquet"),
    ],
    ids=lambda command: str(command[0]),
)
def test_every_command_that_loads_a_model(shelf: Path, command: tuple[object, ...]) -> None:
    found = taken(program(*command, "--from-snapshot", "mill.txt@600", "--cache-size", 0, "--json"))
    assert (found["tokens"], found["bytes"], found["tokens_read"], found["nearest"]) == (600, 600, 88, False)
    found = taken(program(*command, "--from-snapshot", "mill.txt@600", "--nearest", "--json"))
    assert (found["tokens"], found["tokens_read"], found["nearest"]) == (512, 0, True)


def test_those_that_load_none_take_the_nearest_and_say_so(shelf: Path) -> None:
    quoted = program("ask", "How many sacks in the year 12?", "--from-snapshot", "mill.txt@600", "--strategy", "quote")
    assert "'mill.txt@600': the nearest snapshot before is" in quoted.err and "token 512" in quoted.err
    shown = program("snapshots", "show", "mill.txt@600", "--json")
    assert json.loads(shown.out)["tokens"] == 512 and "nearest snapshot before" in shown.err
    assert "nearest" not in program("snapshots", "show", "mill.txt@512").err
    assert "makes it from the text when it is asked for" in program("snapshots", "show", "note.txt").out


def test_it_is_listed_named_and_removed(shelf: Path) -> None:
    identity = str(taken(program(*GENERATE, "--from-snapshot", "mill.txt@600", "--json"))["snapshot"])
    assert identity not in program("snapshots", "list", "--json").out
    listed = program("snapshots", "list", "mill", "--all", "--json").out
    assert identity not in program("snapshots", "list", "note.txt", "--all", "--json").out
    (row,) = (json.loads(line) for line in listed.splitlines() if identity in line)
    assert (row["how"], row["tokens"], row["document"], row["leaf"]) == ("position", 600, "mill.txt", True)
    assert program("snapshots", "show", identity, "--json").code == 0
    assert program("snapshots", "tag", identity, "here").code == 0
    assert program("snapshots", "prune").code == 0
    assert taken(program(*GENERATE, "--from-snapshot", "here", "--json"))["tokens"] == 600
    other = str(taken(program(*GENERATE, "--from-snapshot", "mill.txt@601", "--json"))["snapshot"])
    assert program("snapshots", "rm", other).code == 0
    assert program("snapshots", "show", other).code == 10


def test_a_conversation_and_vectors_keep_where_they_began(shelf: Path) -> None:
    said = ("ask", "Who?", "--strategy", "state", "--max-tokens", 2, "--from-snapshot")
    assert program(*said, "mill.txt@600", "--save", "talk").code == 0
    assert program("embed", "note.txt", "-o", "a.parquet", "--from-snapshot", "mill.txt@700").code == 0
    for path in (shelf / "store" / "cache").rglob("*"):
        if path.is_file():
            path.unlink()
    assert program("search", "sleep", "a.parquet").code == 0
    assert program(*said, "talk").code == 0
    assert program("snapshots", "verify", "--read-data").code == 0
