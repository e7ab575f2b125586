"""`train` and `finetune` as a user calls them."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from program import program
from tiny_models import official_weights, save

from rwkv_stream import interrupts
from rwkv_stream.model import load
from rwkv_stream.training.run import Measured, Run

pytestmark = pytest.mark.usefixtures("program_folder", "one_thread")

RECIPE = """
save_every = 2
[model]
n_layer = 1
n_embd = 64
[tokenizer]
vocab_size = 300
[validation]
held = 0.34
[[data]]
name = "texts"
path = "texts"
[[stages]]
tokens = 256
lanes = 2
window = 32
"""
SMALL = ("--lanes", 2, "--window", 32, "--tokens", 512)


@pytest.fixture(autouse=True)
def texts(program_folder: Path) -> Path:
    """Six texts in a folder, a recipe beside it, and the same as records."""
    folder = program_folder / "texts"
    folder.mkdir()
    tales = [f"The miller went to mill {i}. A fox sat under oak {i}. " * 8 for i in range(12)]
    for i, tale in enumerate(tales[:6]):
        (folder / f"{i}.txt").write_text(tale)
    (program_folder / "small.toml").write_text(RECIPE)
    records = [{"text": tale, "context": tale, "question": "Who sat?", "answer": "a fox"} for tale in tales]
    (program_folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_folder_of_texts_becomes_a_model(program_folder: Path) -> None:
    ended = program("train", "small.toml")
    assert (ended.code, ended.out) == (0, "small/model.safetensors\n"), ended.err
    assert "step 4 of 4: 256 tokens" in ended.err and "bits per byte" in ended.err
    assert len(pq.read_table("small/metrics.parquet")) == 4
    assert Path("small/curves.png").read_bytes().startswith(b"\x89PNG")
    read = program("ingest", "texts/0.txt", "--model", "small", "--json")
    assert read.code == 0 and json.loads(read.out)["tokens"] > 50, "the folder is a model"
    again = program("train", "small.toml", "--json")
    found = json.loads(again.out)
    assert (found["path"], found["steps"], found["held"]["documents"]) == ("small/model.safetensors", 4, 2)
    assert found["held_before"] is None


def test_an_estimate_writes_nothing(program_folder: Path) -> None:
    before = sorted(program_folder.rglob("*"))
    ended = program("train", "small.toml", "--dry-run", "--json")
    plan = json.loads(ended.out)
    assert (plan["tokens"], plan["steps"]) == (256, 4) and plan["data"]["texts"] > 100 and plan["elapsed_s"] > 0
    shown = program("finetune", "texts", "-o", "new", "--dry-run", *SMALL).out
    assert "parameters trained\t" in shown and "tokens\t512" in shown and "memory\t" in shown
    assert sorted(program_folder.rglob("*")) == before


def test_without_matplotlib_the_figures_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = program("train", "small.toml")
    assert ended.code == 0 and "pip install 'rwkv-stream[plot]'" in ended.err
    assert Path("small/metrics.parquet").exists() and not Path("small/curves.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_a_signal_ended_goes_on(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the losses of a run that never stopped."""
    advance = Run.advance

    def stopped(run: Run) -> Measured:
        row = advance(run)
        if row.step == 3:
            interrupts._handle(number, None)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", stopped)
        ended = program("train", "small.toml", "-o", "cut")
    assert ended.code == 128 + number and ended.out == ""
    assert "the last checkpoint is kept, and the same command goes on from there" in ended.err
    assert len(pq.read_table("cut/metrics.parquet")) == 3, "what was done is saved"
    assert "going on from step 3 of 4 in 'cut'" in program("train", "small.toml", "-o", "cut").err
    program("train", "small.toml", "-o", "whole")
    cut, whole = (pq.read_table(f"{name}/metrics.parquet")["loss"] for name in ("cut", "whole"))
    assert cut.equals(whole) and len(cut) == 4


def test_a_lora_of_texts(bytes_model_path: Path) -> None:
    ended = program("finetune", "records.jsonl", "-o", "new", "--lora", 4, "--lora-alpha", 8, "--rate", 0.01, *SMALL)
    assert (ended.code, ended.out) == (0, "new/lora.pth\n"), ended.err
    assert "on 1 held documents: loss " in ended.err
    before, after = ended.err.split("held documents: loss ")[1].split(" nats")[0].split(" → ")
    assert float(after) < float(before)
    model = load(bytes_model_path, device="cpu", lora="new/lora.pth", lora_alpha=8.0)
    text = json.loads(Path("records.jsonl").read_text().splitlines()[9])["text"]
    ids = torch.tensor([list(text.encode())])
    logits, _ = model.forward(ids, logits="all")
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss == pytest.approx(float(after), abs=1e-4), "as printed, with four places"
    again = program("finetune", "records.jsonl", "-o", "new", "--lora", 4, "--lora-alpha", 8, "--rate", 0.01, *SMALL)
    assert again.code == 0 and "going on from step 8 of 8" in again.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("records.jsonl", "--form", "questions", "--learn", "answer"),
        ("records.jsonl", "--template", "{question} {answer}", "--learn", "answer"),
        ("texts", "records.jsonl"),
    ],
    ids=["questions", "template", "several"],
)
def test_the_fields_of_records(arguments: tuple[str, ...]) -> None:
    ended = program("finetune", *arguments, "-o", "new", "--json", *SMALL)
    assert ended.code == 0, ended.err
    learnt = pq.read_table("new/metrics.parquet")["learnt"].to_pylist()
    assert (max(learnt) < 60) is ("--learn" in arguments)
    assert json.loads(ended.out)["held"]["documents"] == 1


def test_a_state_begins_with_a_snapshot(bytes_model_path: Path) -> None:
    assert program("ingest", "texts/0.txt").code == 0
    ended = program("finetune", "records.jsonl", "-o", "new", "--state", "--from-snapshot", "0.txt", "--json", *SMALL)
    found = json.loads(ended.out)
    assert found["path"] == "new/state.pth"
    assert found["held"]["loss"] < found["held_before"]["loss"]
    plain = program("finetune", "records.jsonl", "-o", "plain", "--state", "--json", *SMALL)
    assert json.loads(plain.out)["held_before"]["loss"] != found["held_before"]["loss"]
    from_plain = program(
        "finetune", "records.jsonl", "-o", "on", "--state", "--initial-state", "plain/state.pth", "--json", *SMALL
    )
    before = json.loads(from_plain.out)["held_before"]["loss"]
    assert before == pytest.approx(json.loads(plain.out)["held"]["loss"], abs=1e-5), "where the other ended"
    assert load(bytes_model_path, initial_state="new/state.pth").initial["att_kv"].any()


def test_the_whole_is_a_model(program_folder: Path) -> None:
    base = save(official_weights(version="6"), program_folder / "six.pth", torch.bfloat16)
    ended = program("finetune", "texts", "-o", "new", "--whole", "--model", base, "--json", *SMALL)
    assert json.loads(ended.out)["path"] == "new/model.safetensors", ended.err
    assert load("new/model.safetensors", tokenizer="bytes").config.version == "6"


def test_preferences(program_folder: Path) -> None:
    pairs = [{"prompt": f"{i}: ", "chosen": "yes", "rejected": "no"} for i in range(20)]
    (program_folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ended = program("finetune", "--preferences", "pairs.jsonl", "-o", "new", "--lanes", 1, "--window", 32)
    assert ended.code == 0 and "on 2 held pairs: accuracy 0.5000 → 1.0000, loss 0.6931 → 0." in ended.err, ended.err


def test_a_head_is_taken_by_embed(program_folder: Path, bytes_model_path: Path) -> None:
    (program_folder / "m").mkdir()
    (program_folder / "m" / "a.safetensors").write_bytes(bytes_model_path.read_bytes())
    rows = [{"question": f"Who is {i}?", "context": f"It is {i} {i}.", "document": str(i // 4)} for i in range(80)]
    (program_folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model", "m/a.safetensors")
    ended = program("finetune", "--head", "vector", "q.jsonl", "--epochs", 1, *model)
    (path,) = (program_folder / "m" / "heads").iterdir()
    assert ended.code == 0 and ended.out == f"{path}\n", ended.err
    assert "over 8 held pairs" in ended.err
    assert program("embed", "q.jsonl", "--text-column", "context", "-o", "v.parquet", *model).code == 0
    metadata = pq.read_schema("v.parquet").metadata
    assert metadata[b"pooling"].startswith(b"head ")
    found = program("search", "It is 7 7.", "v.parquet", *model)
    assert found.code == 0 and "q.jsonl#8" in found.out.splitlines()[1], found.err
    path.unlink()
    ended = program("search", "It is 7 7.", "v.parquet", *model)
    assert ended.code == 2 and "expected one beside" in ended.err, ended.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("texts", "--head", "vector", "-o", "x"), "expected no -o, as it is kept beside the checkpoint"),
        (("texts", "--head", "vector", "--state"), "found --state and --head"),
        (("texts",), "expected -o FOLDER, found none"),
        (("-o", "x"), "expected DATA or --preferences FILE, found neither"),
        (("texts", "--preferences", "p.jsonl", "-o", "x"), "expected DATA or --preferences FILE, found both"),
        (("texts", "-o", "x", "--lora", 3, "--whole"), "found --lora and --whole"),
        (("texts", "-o", "x", "--state", "--lora-alpha", 3), "expected --lora with --lora-alpha, found --state"),
        (("texts", "-o", "x", "--epochs", 1, "--tokens", 3), "expected --epochs or --tokens, found both"),
        (("texts", "-o", "x", "--from-snapshot", "a"), "expected --state, which begins with one, found --lora"),
        (("--preferences", "texts", "-o", "x"), "expected a file that ends in .jsonl"),
        (("texts", "-o", "x", "--dtype", "fp16"), "expected products in bf16 or fp32, found --dtype fp16"),
    ],
)
def test_what_makes_no_sense_is_refused(program_folder: Path, arguments: tuple[object, ...], problem: str) -> None:
    ended = program("finetune", *arguments)
    assert ended.code in (1, 2) and problem in ended.err
    assert not (program_folder / "x" / "checkpoint.pt").exists()


def test_a_lora_before_the_command_is_refused() -> None:
    ended = program("--lora", "x.pth", "finetune", "texts", "-o", "x")
    assert ended.code == 2 and "expected a model without a LoRA, found --lora before the command" in ended.err


def test_a_recipe_without_an_ending() -> None:
    Path("small").write_text(RECIPE)
    ended = program("train", "small")
    assert ended.code == 2 and "expected a name that ends in .toml, found another; pass -o" in ended.err
