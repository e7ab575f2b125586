"""The program as a user meets it: exit codes, streams, options before and after the command, and every bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from program import program, started

from rwkv_stream import errors
from rwkv_stream.cli import main
from rwkv_stream.cli.program import COMMANDS, root

TEXT = "The keeper lit the lamp. The sea was calm and the wind came from the north.\n" * 40
PROGRAM = [sys.executable, "-Im", "rwkv_stream.cli"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    def call(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rwkv-stream", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ending:
                main()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Outcome(int(ending.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> Path:
    """A book, a store and a model in the environment; the book is read."""
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "books.store"))
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def read(book: Path, run: Callable[..., Outcome]) -> Outcome:
    outcome = run("ingest", "book.txt", "--chunk", 64, "--snapshot-every", 512)
    assert outcome.code == 0, outcome.err
    return outcome


def test_help_is_quick_and_loads_no_torch() -> None:
    """Half a second of the processor's time, which other work on the machine does not lengthen."""
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "ingest" in shown and "Exit codes" in shown
    assert best < 0.5


def test_version(run: Callable[..., Outcome]) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert re.fullmatch(r"rwkv-stream \d+\.\d+\.\d+\n", outcome.out)


def commands() -> list[list[str]]:
    found = []
    for name in COMMANDS:
        command = root.get_command(None, name)  # type: ignore[arg-type]
        found.append([name])
        found += [[name, sub] for sub in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_and_a_line_in_the_readme(
    run: Callable[..., Outcome], command: list[str]
) -> None:
    outcome = run(*command, "--help")
    assert outcome.code == 0
    assert "rwkv-stream " + " ".join(command) in outcome.out.split("Example")[1]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for parts in re.findall(r"`rwkv-stream (\w+) ([\w/]+)", readme):  # `snapshots list/show/…` is a line for each
        readme += "".join(f"\nrwkv-stream {parts[0]} {part}" for part in parts[1].split("/"))
    assert re.search(rf"rwkv-stream {' '.join(command)}\b", readme)


def test_exit_codes_are_those_of_the_table() -> None:
    shown = root.epilog or ""
    for error in (
        errors.RwkvStreamError,
        errors.UsageError,
        errors.PartialFailureError,
        errors.NotFoundError,
        errors.StoreLockedError,
        errors.SnapshotError,
        errors.MismatchError,
    ):
        assert re.search(rf"\b{error.exit_code} ", shown), error


def test_ingest_prints_the_id_and_nothing_else(read: Outcome, run: Callable[..., Outcome]) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}\n", read.out)
    again = run("ingest", "book.txt")
    assert again.out == read.out
    assert "already read" in again.err


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_global_options_stand_before_or_after(run: Callable[..., Outcome], read: Outcome, before: bool) -> None:
    arguments = (
        ["--json", "--store", "books.store", "ingest", "book.txt"]
        if before
        else ["ingest", "book.txt", "--json", "--store", "books.store"]
    )
    report = json.loads(run(*arguments).out)
    expected = {
        "document",
        "snapshot",
        "tokens",
        "bytes",
        "snapshots_written",
        "resumed_from_token",
        "exact",
        "replaced_bytes",
        "elapsed_s",
        "rate_tok_s",
        "model",
    }
    assert expected <= set(report)
    assert (report["tokens"], report["bytes"], report["resumed_from_token"]) == (len(TEXT), len(TEXT), len(TEXT))


def test_a_shorter_reading_says_where_the_head_stands(run: Callable[..., Outcome], read: Outcome) -> None:
    outcome = run("ingest", "book.txt", "--max-tokens", 70)
    assert re.fullmatch(r"[0-9a-f]{64}\n", outcome.out) and outcome.out != read.out
    assert f"the head stands further on, at token {len(TEXT):,}" in outcome.err
    assert f"snapshots tag {outcome.out[:12]} NAME" in outcome.err
    assert json.loads(run("snapshots", "show", "book.txt", "--json").out)["id"] == read.out.strip()
    assert json.loads(run("snapshots", "show", outcome.out[:12], "--json").out)["tokens"] == 70


def test_an_argument_wins_over_the_environment(run: Callable[..., Outcome], read: Outcome, tmp_path: Path) -> None:
    assert run("--store", tmp_path / "none.store", "snapshots", "list").code == 10


def test_stdin_needs_a_name(run: Callable[..., Outcome], book: Path) -> None:
    assert run("ingest", "-", stdin=TEXT.encode()).code == 2
    assert run("ingest", "-", "--name", "piped", stdin=TEXT.encode()).code == 0
    assert run("snapshots", "show", "piped", "--json").code == 0


def test_a_folder_is_read_document_by_document(run: Callable[..., Outcome], book: Path) -> None:
    folder = book.parent / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text("first note " * 20)
    (folder / "b.md").write_text("second note " * 20)
    outcome = run("ingest", "notes", "--json")
    assert [json.loads(line)["document"] for line in outcome.out.splitlines()] == ["notes/a.txt", "notes/b.md"]


def test_dry_run_writes_nothing(run: Callable[..., Outcome], book: Path) -> None:
    outcome = run("ingest", "book.txt", "--dry-run", "--json")
    assert json.loads(outcome.out)["tokens"] == len(TEXT)
    assert not (book.parent / "books.store").exists()


def test_snapshots_commands(run: Callable[..., Outcome], read: Outcome) -> None:
    listed = [json.loads(line) for line in run("snapshots", "list", "--json").out.splitlines()]
    assert {"id", "document", "tokens", "bytes", "size_bytes", "parent", "created", "model", "leaf"} <= set(listed[0])
    assert [s["tokens"] for s in listed] == sorted(s["tokens"] for s in listed)
    assert run("snapshots", "tag", "book.txt@50%", "half").code == 0
    half = json.loads(run("snapshots", "show", "half", "--json").out)
    assert half["tokens"] == len(TEXT) // 2 // 512 * 512
    assert "[half]" in run("snapshots", "tree").out
    assert run("snapshots", "rm", "half").code == 2
    assert run("snapshots", "tag", "--delete", "half").code == 0
    assert run("snapshots", "rm", half["id"][:10]).code == 0
    assert run("snapshots", "show", half["id"][:10]).code == 10
    assert run("snapshots", "rebuild").code == 0
    verified = run("snapshots", "verify", "--json")
    assert verified.code == 0
    assert json.loads(verified.out)["damaged"] == []


def test_doctor_names_the_kernels(run: Callable[..., Outcome], book: Path) -> None:
    facts = json.loads(run("doctor", "--json").out)
    assert facts["kernel reference"] == "ready"
    assert "kernel cpu" in facts


# ---- bad input: its own message, the right code, nothing lost ----


def checkpoint_with_code(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {path.parent / 'canary'}",)

    path.write_bytes(pickle.dumps({"emb.weight": Evil()}))


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda folder: None, "missing"),
    "folder without text": (lambda folder: (folder / "bad").mkdir(), "text"),
    "binary file": (
        lambda folder: (folder / "bad").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40),
        "text",
    ),
    "empty document": (lambda folder: (folder / "bad").write_bytes(b""), "expected some text"),
    "damaged gzip": (lambda folder: (folder / "bad").write_bytes(b"\x1f\x8b\x08\x00" + b"\x01" * 200), "compressed"),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_bad_sources(run: Callable[..., Outcome], read: Outcome, tmp_path: Path, kind: str) -> None:
    make, message = BAD_SOURCES[kind]
    make(tmp_path)
    before = run("snapshots", "list").out
    outcome = run("ingest", "missing" if kind == "missing file" else "bad")
    assert outcome.code == 1, outcome
    assert message in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.out == ""
    assert run("snapshots", "list").out == before


def test_some_of_several_fail(run: Callable[..., Outcome], book: Path) -> None:
    (book.parent / "bad").write_bytes(b"")
    outcome = run("ingest", "bad", "book.txt")
    assert outcome.code == 3
    assert len(outcome.out.splitlines()) == 1
    assert "1 of 2 documents failed" in outcome.err


def test_two_documents_of_one_name(run: Callable[..., Outcome], book: Path) -> None:
    outcome = run("ingest", "book.txt", "book.txt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "found 'book.txt' twice" in outcome.err


BAD_MODELS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda path, good: None, "no such"),
    "a text": (lambda path, good: path.write_text("this is not a model"), "checkpoint"),
    "pickled code": (lambda path, good: checkpoint_with_code(path), "code"),
    "truncated": (lambda path, good: path.write_bytes(good.read_bytes()[:-1000]), ""),
    "another architecture": (
        lambda path, good: __import__("torch").save({"transformer.wte.weight": __import__("torch").zeros(4, 4)}, path),
        "RWKV",
    ),
}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [(kind, ".pth") for kind in BAD_MODELS] + [(kind, ".safetensors") for kind in ("missing", "a text", "truncated")],
)
def test_bad_models(run: Callable[..., Outcome], book: Path, bytes_model_path: Path, kind: str, suffix: str) -> None:
    path = book.parent / f"model{suffix}"
    make, message = BAD_MODELS[kind]
    make(path, bytes_model_path)
    outcome = run("ingest", "book.txt", "--model", path)
    assert outcome.code == 1, outcome
    assert message in outcome.err
    assert path.name in outcome.err
    assert not (book.parent / "canary").exists(), "code in a checkpoint was run"
    assert not (book.parent / "books.store").exists()


def test_references_that_name_nothing_or_two(run: Callable[..., Outcome], read: Outcome) -> None:
    unknown = run("generate", "--from-snapshot", "nobook.txt")
    assert unknown.code == 10
    assert "nobook.txt" in unknown.err
    for folder in ("a", "b"):
        Path(folder).mkdir()
        (Path(folder) / "same.txt").write_text(f"in {folder} " * 30)
        assert run("ingest", f"{folder}/same.txt").code == 0
    ambiguous = run("generate", "--from-snapshot", "same.txt")
    assert ambiguous.code == 2
    assert "a/same.txt" in ambiguous.err and "b/same.txt" in ambiguous.err
    assert run("generate", "--from-snapshot", "a/same.txt", "--max-tokens", 1).code == 0


def test_no_store(run: Callable[..., Outcome], book: Path) -> None:
    outcome = run("snapshots", "list")
    assert outcome.code == 10
    assert "books.store" in outcome.err


def test_a_snapshot_of_another_model(run: Callable[..., Outcome], read: Outcome, other_bytes_model_path: Path) -> None:
    outcome = run("generate", "--from-snapshot", read.out.strip(), "--model", other_bytes_model_path)
    assert outcome.code == 13
    assert outcome.out == ""


def test_a_damaged_snapshot(run: Callable[..., Outcome], read: Outcome) -> None:
    for path in Path("books.store/objects").rglob("*"):
        if path.is_file():
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.chmod(0o644)
            path.write_bytes(bytes(data))
    outcome = run("generate", "--from-snapshot", "book.txt")
    assert (outcome.code, outcome.out) == (12, "")
    assert run("snapshots", "verify", "--read-data").code == 12


def test_empty_question(run: Callable[..., Outcome], read: Outcome) -> None:
    outcome = run("ask", "  ", "--from-snapshot", "book.txt")
    assert (outcome.code, outcome.out) == (2, "")
    assert "question" in outcome.err


def test_unwritable_output(run: Callable[..., Outcome], read: Outcome) -> None:
    outcome = run("score", "book.txt", "-o", "no/such/folder/scores.parquet")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no/such/folder" in outcome.err


def test_usage_errors(run: Callable[..., Outcome], read: Outcome) -> None:
    assert run("ingest").code == 2
    assert run("ingest", "book.txt", "--no-such-option").code == 2
    assert run("no-such-command").code == 2
    assert run("score", "book.txt", "-o", "scores.xlsx").code == 2
    assert run("ingest", "book.txt", "--chunk", 100).code == 2
    assert run("ingest", "book.txt", "--encoding", "no-such-code").code == 2


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root")
def test_a_full_disk(read: Outcome, book: Path, bytes_model_path: Path) -> None:
    disk = book.parent / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        command = ["ingest", book, "--store", disk / "s", "--chunk", "64", "--snapshot-every", "64"]
        ended = started(*command)
        _, said = ended.communicate(timeout=60)
        assert ended.returncode == 1
        assert "No space left" in said
        assert "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True, capture_output=True)
        assert (
            subprocess.run([*PROGRAM, "snapshots", "verify", "--store", str(disk / "s")], check=False).returncode == 0
        )
        again, _ = started(*command, "--json").communicate(timeout=60)
        assert json.loads(again)["tokens"] == len(TEXT)
    finally:
        subprocess.run(["umount", disk], check=False)


def unprivileged(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a child that file permissions bind, as they do not bind root."""
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("running a child without root's rights needs setpriv")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_read_only_store_can_be_asked_but_not_written(read: Outcome, book: Path) -> None:
    store = book.parent / "books.store"
    inside = [store, *store.rglob("*")]
    before = {path: path.read_bytes() for path in inside if path.is_file()}
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        asked = unprivileged([*PROGRAM, "generate", "--from-snapshot", "book.txt@50%", "--max-tokens", "2"])
        assert asked.returncode == 0, asked.stderr
        (book.parent / "more.txt").write_text("more " * 100)
        written = unprivileged([*PROGRAM, "ingest", "more.txt"])
        assert written.returncode == 1
        assert "books.store" in written.stderr and "Traceback" not in written.stderr
        assert unprivileged([*PROGRAM, "snapshots", "verify"]).returncode == 0
        assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    finally:
        for path in inside:
            path.chmod(0o755)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_whole(book: Path, number: signal.Signals, code: int) -> None:
    command = ["ingest", "-", "--name", "endless", "--chunk", "64", "--snapshot-every", "512"]
    child = started(*command, stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.write(TEXT * 30)  # more than the 64 KiB from which the encoding is decided
    child.stdin.flush()
    deadline = time.time() + 60
    listing = [*PROGRAM, "snapshots", "list", "endless", "--json"]
    while not (listed := subprocess.run(listing, capture_output=True, text=True, check=False).stdout):
        assert time.time() < deadline
        time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert "Traceback" not in err
    newest = json.loads(subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert newest["tokens"] % 64 == 0
    assert newest["tokens"] >= json.loads(listed.splitlines()[0])["tokens"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "app.log"
    path.with_name("app.log.1").write_bytes(b"the first line\n" * 30)
    path.write_bytes(b"the last line\n" * 30)
    return path


def test_a_log_is_followed(run: Callable[..., Outcome], log: Path) -> None:
    command = "ingest", "--follow", log, "--name", "app", "--chunk", "64", "--snapshot-every", "128"
    first = run(*command, "--max-tokens", "100", "--json")
    assert first.code == 0, first.err
    assert [json.loads(first.out)[name] for name in ("tokens", "n_losses")] == [100, 0]
    log.with_name("app.log.1").unlink()
    log.write_bytes(b"another line\n" * 300)
    again = run(*command, "--max-tokens", "300")
    assert again.code == 3, again.err
    assert "neither it nor a copy of it is there any more" in again.err
    assert again.out.strip() == json.loads(run("snapshots", "show", "app", "--json").out)["id"]
    assert run("ingest", log, "--name", "app").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-text",),
        ("--cells",),
        ("--dry-run",),
        ("--text-column", "text"),
        ("other.log",),
    ],
)
def test_what_following_does_not_take(run: Callable[..., Outcome], log: Path, arguments: tuple[str, ...]) -> None:
    ended = run("ingest", "--follow", log, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "--follow" in ended.err


def test_lines_that_alert(run: Callable[..., Outcome], log: Path) -> None:
    assert run("score", log, "--follow").code == 2
    assert run("score", log, "--follow", "--alert-bits", "1", "--top", "3").code == 2
    assert run("ingest", log, "--snapshot-seconds", "3").code == 2


def test_a_closed_pipe_is_not_an_error(read: Outcome) -> None:
    child = subprocess.Popen([*PROGRAM, "snapshots", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 0


@pytest.mark.parametrize("command", [("embed", "-o", "o.jsonl"), ("score",), ("ingest",)])
@pytest.mark.usefixtures("program_folder")
def test_ten_errors_of_a_kind_are_shown(command: tuple[str, ...]) -> None:
    lines = [f'{{"id": {i}, "t": "w"}}\n' for i in range(300)]
    Path("some.jsonl").write_text("".join([*lines, "no JSON\n", '{"t": "a", "body": "word"}\n']))
    Path("none.jsonl").write_text("".join(lines[:20]))
    ended = program("--store", "st", *command, "some.jsonl", "--text-column", "body")
    told = [line for line in ended.err.splitlines() if "error:" in line]
    assert ended.code == 3
    assert sum("expected a column 'body'" in line for line in told) == 10
    assert sum("290 more such as: reading" in line for line in told) == 1 and sum("JSON" in line for line in told) == 1
    ended = program("--store", "st", *command, "none.jsonl", "--text-column", "body")
    assert ended.code == 1
    assert ended.err.count("expected a column 'body', found columns id, t; check --text-column") == 1
