"""What ends the program beside its own errors: signals at any moment, memory that is short, streams that are closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from kills import wait_until
from program import program, started

from rwkv_stream.cli import console
from rwkv_stream.cli.options import Command
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.model import Model
from rwkv_stream.model.loading import Loading

PROGRAM = [sys.executable, "-Im", "rwkv_stream.cli"]
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
BEGINNING = """
import sys
from rwkv_stream.cli import main
sys.argv[0] = "rwkv-stream"
"""
AT_AN_IMPORT = """
import signal
class Signals:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal({number})
sys.meta_path.insert(0, Signals())
main()
"""
SLOW_EXPORT = """
import time
from rwkv_stream.store import Store
export = Store.export
def slow(*arguments, **options):
    export(*arguments, **options)
    time.sleep(60)
Store.export = slow
main()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, bytes_model_path: Path) -> Path:
    """A store with `book.txt` in it, beside the text."""
    folder = tmp_path_factory.mktemp("book")
    text = folder / "book.txt"
    text.write_text("The keeper lit the lamp. The sea was calm and the wind came from the north.\n" * 20)
    store = folder / "store"
    options = ("--chunk", 64, "--snapshot-every", 512, "--model", bytes_model_path, "--store", store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda number, handler: None)
        ended = program("ingest", text, "--name", "book.txt", *options)
    assert ended.code == 0, ended.err
    return store


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path, store: Path) -> Path:
    """An empty folder, the current one, a store and a model in the environment."""
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.setenv("RWKV_STREAM_STORE", str(store))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    return tmp_path


def child(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def stray() -> list[str]:
    return [path.name for path in Path().iterdir() if path.name.startswith(TEMP_PREFIX)]


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        *((module, *SIGNALS[0]) for module in ("click", "numpy")),
        *((module, *SIGNALS[1]) for module in ("click", "rwkv_stream.cli.generate", "torch", "numpy")),
    ],
)
def test_from_the_first_instruction(module: str, number: signal.Signals, code: int) -> None:
    """Torch goes on without numpy where numpy's import is broken off, and says nothing of what broke it off."""
    program = BEGINNING + AT_AN_IMPORT.format(module=module, number=int(number))
    ended = child([sys.executable, "-Ic", program, "generate", "--from-snapshot", "book.txt", "--max-tokens", "100000"])
    out, err = ended.communicate(timeout=120)
    assert ended.returncode == code, err
    assert out == ""
    assert len(err.splitlines()) == 1 and number.name in err and "kept" in err


def writer(name: str) -> subprocess.Popen[str]:
    Path("long.txt").write_text("The keeper walked over the bridge. " * 30_000)
    Path("questions.txt").write_text("Who lit the lamp?\n")
    ask = ["ask", "--questions", "questions.txt", "--from-snapshot", "book.txt", "--max-tokens", "1000000"]
    if name == "score":
        return started("score", "long.txt", "-o", "out.parquet")
    if name == "ask":
        return started(*ask, "-o", "out.jsonl")
    return child([sys.executable, "-Ic", BEGINNING + SLOW_EXPORT, "snapshots", "export", "book.txt", "-o", "out"])


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("score", *SIGNALS[0]), *((name, *SIGNALS[1]) for name in ("score", "ask", "export"))],
)
def test_a_writer_that_is_stopped_leaves_nothing(name: str, number: signal.Signals, code: int) -> None:
    process = writer(name)
    before = set(Path().iterdir()) - {*map(Path, stray())}
    wait_until(lambda: bool(stray()) or process.poll() is not None)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    said = [line for line in err.splitlines() if not line.startswith("from snapshot ")]
    assert out == "" and len(said) == 1 and number.name in said[0]
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["score", "ask", "export"])
def test_the_next_writer_sweeps_what_a_killed_one_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("short.txt").write_text("The sea was calm.\n")
    Path("questions.txt").write_text("Who lit the lamp?\n")
    ask = ["ask", "--questions", "questions.txt", "--from-snapshot", "book.txt", "--max-tokens", "2"]
    command = {
        "score": ["score", "short.txt", "-o", "out.parquet"],
        "ask": [*ask, "-o", "out.jsonl"],
        "export": ["snapshots", "export", "book.txt", "-o", "out"],
    }[name]
    monkeypatch.setenv(FAILPOINT_VARIABLE, "file.written" if name == "export" else "table.written")
    process = started(*command)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len(stray()) == 1
    monkeypatch.delenv(FAILPOINT_VARIABLE)
    ended = program(*command)
    assert ended.code == 0, ended.err
    assert stray() == []


# ---- streams ----


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line, "sh", *PROGRAM], capture_output=True, text=True, errors="replace", check=False, timeout=120
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    generate = "-q generate --from-snapshot book.txt --max-tokens 100000"
    ended = shell(f'{{ "$@" {generate}; echo "code $?" >&2; }} | head -c 1')
    assert (ended.stderr, len(ended.stdout)) == ("code 0\n", 1)


@pytest.mark.parametrize("arguments", ["snapshots list", "--json snapshots list", "snapshots export book.txt -o -"])
@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
def test_what_cannot_be_written_is_an_error_in_one_line(arguments: str, where: str) -> None:
    ended = shell(f'"$@" {arguments} {where}')
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ("closed" if where == ">&-" else "No space left") in ended.stderr


def test_other_streams_that_are_closed() -> None:
    listed = program("snapshots", "list").out
    assert listed
    ended = shell('"$@" snapshots list <&- 2>&-')
    assert (ended.returncode, ended.stdout) == (0, listed)
    assert shell('"$@" snapshots show nothing 2>&-').returncode == 10


def test_a_stdout_that_is_not_utf_8() -> None:
    Path("ü 漢.txt").write_text("Größe 漢字.\n")
    for options in ([], ["--json"]):
        ended = started("score", "ü 漢.txt", "--top", "1", *options, encoding="latin-1")
        shown, said = ended.communicate(timeout=60)
        assert (ended.returncode, said) == (0, "")
        if options:
            assert json.loads(shown)["top"][0]["text"] == "Größe 漢字."
        else:
            assert "Größe \\u6f22\\u5b57." in shown


# ---- memory ----


def short_of(message: str | None) -> object:
    def forward(*_: object, **__: object) -> object:
        if message is None:
            return torch.empty(1 << 50)
        raise torch.OutOfMemoryError(message)

    return forward


@pytest.mark.parametrize(
    ("message", "options", "named", "unnamed"),
    [
        (None, [], {"--dtype bf16", "--weights int8", "--chunk"}, {"--gpu-memory"}),
        (None, ["--dtype", "bf16"], {"--weights int8", "--chunk"}, {"--dtype"}),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB",
            [],
            {"--gpu-memory", "--dtype bf16", "--chunk", "2.00 GiB"},
            {"--weights"},
        ),
    ],
)
def test_memory_that_is_short_names_the_options_that_help(
    message: str | None, options: list[str], named: set[str], unnamed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("text.txt").write_text("The sea was calm.\n")
    monkeypatch.setattr(Model, "forward", short_of(message))
    ended = program("ingest", "text.txt", "--store", "new", *options)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (1, "", 1), ended.err
    assert all(words in ended.err for words in named)
    assert not any(words in ended.err for words in unnamed)


def test_another_failure_of_torch_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> object:
        raise RuntimeError("shapes differ")

    Path("text.txt").write_text("The sea was calm.\n")
    monkeypatch.setattr(Model, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes differ"):
        program("score", "text.txt")


# ---- options ----


def test_every_field_of_loading_is_an_option() -> None:
    theirs = {"store", "model", "quiet", "verbose", "json"}
    options = {param.name for param in Command("any").params}
    assert options == {field.name for field in fields(Loading)} - {"path"} | theirs


def test_bytes_of_a_name_that_are_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    ended = program("snapshots", "list", "--store", "no\udcff.store")
    assert ended.code == 10 and r"'no\xff.store'" in ended.err
    console.emit_json({"name": "no\udcff"})
    assert json.loads(capsys.readouterr().out) == {"name": "no\udcff"}
