"""What cannot be written is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from program import program


@pytest.fixture(autouse=True)
def place(program_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a text and a store that has read it; from now on no model can be loaded."""
    Path("book.txt").write_text("The lamp was lit. The sea was calm.")
    Path("folder.parquet").mkdir()
    assert program("ingest", "book.txt").code == 0
    monkeypatch.setattr("rwkv_stream.model.load", lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(("output", "code"), [("out.csv", 2), ("no/such/out.parquet", 1), ("folder.parquet", 1)])
@pytest.mark.parametrize(
    "command",
    [
        ["embed", "book.txt", "-o"],
        ["score", "book.txt", "-o"],
        ["score", "book.txt", "--plot"],
        ["ask", "Who?", "--from-snapshot", "book.txt", "-o"],
        ["summarize", "--from-snapshot", "book.txt", "-o"],
    ],
    ids=lambda command: " ".join(command),
)
def test_outputs(command: list[str], output: str, code: int) -> None:
    if command[0] == "embed" and output == "folder.parquet":
        pytest.skip("a folder is that of a job")
    if "--plot" in command:
        output, code = output.replace(".parquet", ".svg"), 2 if output == "out.csv" else 1
        Path("folder.svg").mkdir()
    ended = program(*command, output)
    assert (ended.code, ended.out) == (code, "")
    assert output in ended.err


@pytest.mark.parametrize(
    "options", [["--unit", "word"], ["--unit", "sentence,chunk", "--isolated"], ["--unit", ""]], ids=" ".join
)
def test_how_vectors_are_made(options: list[str]) -> None:
    ended = program("embed", "book.txt", "-o", "out/", *options)
    assert (ended.code, ended.out) == (2, "")
    assert not Path("out").exists()
