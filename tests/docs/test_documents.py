"""What the documents say of the program is true: every command line in them is one, and every link leads somewhere."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import click
import pytest
from program import program

from rwkv_stream.cli.program import root

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "samples/README.md",
        ROOT / "rwkv_stream/shipped/README.md",
    ]
)
NO_COMMANDS = {"rwkv-stream snapshot"}  # the first of the lines that an id is the hash of
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def fenced(text: str) -> Iterator[str]:
    """The lines of code blocks, those that end in a backslash joined."""
    for block in re.findall(r"^```(?:sh|console|text|bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"^    (\S.*)$", text, re.MULTILINE)


def inline(text: str) -> Iterator[str]:
    """Code within lines; alternatives (`snapshots tag/rm`) one by one."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(rwkv-stream [^`]*)`", outside):
        words = code.split(" ")
        spread = [word.split("/") if re.fullmatch(r"[a-z]+(/[a-z]+)+", word) else [word] for word in words[:3]]
        for chosen in product(*spread):
            yield " ".join([*chosen, *words[3:]])


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of each call of the program in a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words = [*lexer, ";"]
    while "rwkv-stream" in words:
        words = words[words.index("rwkv-stream") + 1 :]
        end = next(i for i, word in enumerate(words) if word and set(word) <= set("|&;<>"))
        yield words[:end]


def parse(arguments: list[str]) -> None:
    """Raises click's errors for what the program would refuse before it does anything."""
    context = root.make_context("rwkv-stream", list(arguments))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def shown(path: Path) -> list[str]:
    """The lines that call the program; of a console those behind its prompt."""
    text = path.read_text(encoding="utf-8")
    found = []
    for line in fenced(text):
        is_call = re.match(r"(\$ )?([A-Z_]+=\S+ |.*\| |.*&& )*(\./|\S*/bin/)?rwkv-stream (?!: )", line)
        if is_call and not line.startswith(("Usage:", "rwkv-stream:")):
            found.append(line.removeprefix("$ "))
    return found


CALLS = [(path, line) for path in DOCUMENTS for line in shown(path)]


@pytest.mark.parametrize(("path", "line"), CALLS, ids=[f"{path.name}-{line[:60]}" for path, line in CALLS])
def test_every_command_line_is_one(path: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = list(calls(line))
    assert made
    for arguments in made:
        for name in arguments:
            if re.fullmatch(r"[\w-]+\.[a-z]+", name):
                (tmp_path / name).touch()  # some are opened while they are parsed
        parse(arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_named_in_sentences_exist(path: Path) -> None:
    for line in set(inline(path.read_text(encoding="utf-8"))) - NO_COMMANDS:
        for arguments in calls(line.replace("…", "")):
            try:
                parse(arguments)
            except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
                continue  # the sentence names a command, not a call of it
            except click.BadOptionUsage as error:
                assert "requires an argument" in error.message, line
            except click.exceptions.Exit as ending:
                assert ending.exit_code == 0, line


def test_the_parser_finds_what_is_wrong() -> None:
    assert list(calls("zcat a.gz | rwkv-stream ingest - --name 'a b' && rwkv-stream doctor  # why")) == [
        ["ingest", "-", "--name", "a b"],
        ["doctor"],
    ]
    for wrong in (["ingest", "a", "--no-such-option"], ["no-such-command"], ["snapshots", "list", "a", "b", "c"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_reference_of_the_command_line_is_that_of_the_program() -> None:
    """Compared under the click that the constraints name: others word their help otherwise."""
    pinned = re.search(r"^click==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or pinned[1] != importlib.metadata.version("click"):
        pytest.skip("the page was written under another version of click")
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run `python docs/generate_cli.py`"


def test_every_command_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = " ".join([*inline(readme), *shown(ROOT / "README.md")])
    for name in root.list_commands(click.Context(root)):
        assert f"rwkv-stream {name}" in named, name


def test_what_the_readme_shows_of_the_samples_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    lines = [line for line in shown(ROOT / "README.md") if "story.txt" in line]
    assert len(lines) >= 3
    for line in lines:
        for arguments in calls(line):
            ended = program(*arguments)
            assert ended.code == 0, f"{line}\n{ended.err}"
            assert ended.out.strip(), line
            assert arguments[0] == "ingest" or "from snapshot " in ended.err, "which was taken is said"
