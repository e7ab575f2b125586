"""Runs: the loss goes down, stages follow each other, and a run that was stopped or killed ends with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import official_weights, save, save_own_tokenizer

from rwkv_stream.errors import UsageError
from rwkv_stream.model import load
from rwkv_stream.training import recipe as recipes
from rwkv_stream.training.optimizers import Average, Optimizers
from rwkv_stream.training.recipe import Adapter, Optimizer, Validation
from rwkv_stream.training.recipe import Start as Shape
from rwkv_stream.training.run import CHECKPOINT, METRICS, Run, estimate, train
from rwkv_stream.training.start import start

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ("The miller went to the mill.", "A fox sat under the old oak.", "Nobody heard the bell at night.")
BOOKS = [{"text": " ".join(SENTENCES[(i + j) % 3] for j in range(60 + 7 * i))} for i in range(9)]
RECIPE = """
save_every = 4
[model]
n_layer = 2
n_embd = 64
head_size = 32
[tokenizer]
vocab_size = 300
[optimizer]
average = 0.9
[validation]
held = 0.25
[[data]]
name = "books"
path = "books.jsonl"
[[data]]
name = "lists"
exercises = ["lists", "copies"]
[[stages]]  # windows grow
tokens = 256
lanes = 4
window = 16
stretch = 64
warmup = 2
shares.books = 0.8
shares.lists = 0.2
[[stages]]
tokens = 384
lanes = 2
window = 32
stretch = 128
warmup = 2
rate = 5e-3
shares.books = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(book) + "\n" for book in BOOKS))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def begin(folder: Path, work: str, **changes: Any) -> Run:
    recipe = replace(recipes.read(folder / "recipe.toml"), **changes)
    begun = start(recipe, folder, folder / work)
    return Run(folder / work, begun.recipe, begun.tokenizer, begun.tuned, begun.before)


def assert_same(one: Run, other: Run) -> None:
    """To the bit: losses, parameters, the running mean, the optimisers' moments and the states of the lanes."""
    assert [row.loss for row in one.measured] == [row.loss for row in other.measured]
    assert [row.bits_per_byte for row in one.measured] == [row.bits_per_byte for row in other.measured]
    kept = [torch.load(run.work / CHECKPOINT, weights_only=True) for run in (one, other)]
    for name in ("parameters", "average", "state"):
        for key, tensor in kept[0][name].items():
            assert torch.equal(tensor, kept[1][name][key]), f"{name} {key}"
    for a, b in zip(*(z["optimizers"] for z in kept), strict=True):
        for index, moments in a["state"].items():
            assert all(torch.equal(tensor, b["state"][index][key]) for key, tensor in moments.items())
    assert kept[0]["cursor"] == kept[1]["cursor"]
    results = [load_file(run.result) for run in (one, other)]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_loss_goes_down(folder: Path) -> None:
    stage = recipes.Stage(40 * 128, lanes=4, window=32, rate=1e-2, warmup=4, stretch=128, shares={"books": 1})
    run = begin(folder, "work", stages=(stage,), optimizer=Optimizer())
    before = run.evaluate()
    train(run)
    losses, after = [row.loss for row in run.measured], run.evaluate()
    vocab_size = run.tuned.config.vocab_size
    assert losses[0] == pytest.approx(np.log(vocab_size), rel=0.1), "an untrained model knows nothing"
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert before is not None and after is not None and before.documents == 2
    assert before.bits_per_byte is not None and after.bits_per_byte is not None
    assert after.bits_per_byte < 0.7 * before.bits_per_byte
    assert run.measured[-1].bits_per_byte == after.bits_per_byte


def test_windows_change_between_stages(folder: Path) -> None:
    run = begin(folder, "work")
    train(run)
    assert [(row.stage, row.tokens) for row in run.measured] == [
        *((0, 64 * i) for i in range(1, 5)),
        *((1, 256 + 64 * i) for i in range(1, 7)),
    ]
    assert [row.rate for row in run.measured][4:6] == [2.5e-3, 5e-3], "with its own warm-up"
    assert run.measured[0].learnt < 64, "of exercises only the answers are learnt"
    assert run.measured[-1].learnt >= 60
    table = pq.read_table(run.work / METRICS)
    assert table["step"].to_pylist() == list(range(1, 11))
    assert [z is not None for z in table["bits_per_byte"].to_pylist()] == [step in (4, 8, 10) for step in range(1, 11)]


@pytest.mark.parametrize("optimizer", [Optimizer(average=0.9), Optimizer("muon", average=0.5)], ids=["adamw", "muon"])
@pytest.mark.parametrize("stops", [(2,), (4,), (5, 7)], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, optimizer: Optimizer, stops: tuple[int, ...]) -> None:
    whole = begin(folder, "whole", optimizer=optimizer)
    train(whole)
    for at in stops:
        stopped = begin(folder, "cut", optimizer=optimizer)
        train(stopped, stop=lambda run=stopped, at=at: run.step >= at)  # type: ignore[misc]
        assert stopped.step == at
    goes_on = begin(folder, "cut", optimizer=optimizer)
    assert goes_on.step == stops[-1]
    train(goes_on)
    assert_same(whole, goes_on)


CHILD = """
import os, sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
torch.set_num_threads(1)
from test_run import begin, train
from rwkv_stream.files import FAILPOINT_VARIABLE
torch.optim.Adam([torch.zeros(1)])  # the first one imports much
for failpoint, folder in zip(sys.argv[3::2], sys.argv[4::2]):
    if os.fork() == 0:
        os.environ[FAILPOINT_VARIABLE] = f"checkpoint.{failpoint}"
        train(begin(Path(sys.argv[2]), folder))
    print(os.wait()[1])
"""


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path) -> None:
    """Killed in two places, in children of a process that has not trained, as torch wants it."""
    whole = begin(folder, "whole")
    train(whole)
    arguments = [str(Path(__file__).parent), str(folder), "written:2", "early", "renamed:2", "late"]
    ended = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == [str(int(signal.SIGKILL))] * 2, ended.stderr
    for work, step in (("early", 4), ("late", 8)):
        goes_on = begin(folder, work)
        assert goes_on.step == step
        train(goes_on)
        assert_same(whole, goes_on)


def test_what_is_done_cannot_become_another_recipe(folder: Path) -> None:
    run = begin(folder, "work")
    train(run, stop=lambda: run.step >= 5)
    first, second = run.recipe.stages
    for changes, named in (({"seed": 1}, "seed"), ({"stages": (replace(first, rate=1.0), second)}, "stages that are")):
        with pytest.raises(UsageError, match=f"expected the recipe that it began with, found other {named}"):
            begin(folder, "work", **changes)
    longer = begin(folder, "work", stages=(first, replace(second, tokens=640), second), save_every=100)
    train(longer)
    assert longer.step == 4 + 10 + 6, "what comes may change"


def test_the_result_loads_as_a_model(folder: Path) -> None:
    run = begin(folder, "work")
    train(run)
    model = load(run.result, device="cpu", dtype="fp32")
    text = "Nobody heard the bell."
    assert model.tokenizer.decode(model.tokenizer.encode(text)).decode() == text
    mean = torch.load(run.work / CHECKPOINT, weights_only=True)["average"]
    tensors = load_file(run.result)
    assert {z.dtype for z in tensors.values()} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(tensor.flatten(), mean[name].bfloat16().flatten()), name
    C, F4, V = 64, 256, model.config.vocab_size
    vectors = [f"att.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")]
    block: dict[str, tuple[int, ...]] = dict.fromkeys([*vectors, "ffn.x_k"], (1, 1, C))
    block |= {f"{name}.{part}": (C,) for name in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {f"att.{name}1": (C, 32) for name in "wag"} | {f"att.{name}2": (32, C) for name in "wag"}
    block |= {"att.r_k": (2, 32), "ffn.key.weight": (F4, C), "ffn.value.weight": (C, F4)}
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    expected |= {f"{name}.{part}": (C,) for name in ("blocks.0.ln0", "ln_out") for part in ("weight", "bias")}
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"blocks.1.att.v0": (1, 1, C), "blocks.1.att.v1": (C, 32), "blocks.1.att.v2": (32, C)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


def test_what_is_measured_is_what_score_says(folder: Path) -> None:
    """Bits per byte on a held text, as the program measures them with the result."""
    from rwkv_stream.tables.score import score

    run = begin(folder, "work", validation=Validation(held=0.12), optimizer=Optimizer())
    train(run)
    held = BOOKS[7]["text"]
    (folder / "held.txt").write_text(held)
    scored = score(str(folder / "held.txt"), model=load(run.result, device="cpu", dtype="fp32"))
    for _ in scored:
        pass
    assert scored.bits_per_byte is not None
    assert run.measured[-1].bits_per_byte == pytest.approx(scored.bits_per_byte, rel=5e-3), "weights rounded to bf16"


def test_an_estimate_saves_nothing(folder: Path) -> None:
    run = begin(folder, "work")
    found = estimate(run)
    assert (found.steps, found.tokens) == (10, 640)
    assert found.parameters == sum(z.numel() for z in run.tuned.parameters.values())
    assert found.elapsed_s > 0 and found.peak_memory_bytes > found.parameters * 4
    assert {path.name for path in run.work.iterdir()} == {"tokens", "tokenizer.json"}


def test_epochs_become_tokens(folder: Path) -> None:
    stage = recipes.Stage(epochs=2.5, shares={"books": 1})
    run = begin(folder, "work", stages=(stage,))
    (size,) = estimate(run).data.values()
    assert begin(folder, "work", stages=(stage,)).recipe.stages[0].tokens == np.ceil(2.5 * size)


def test_a_folder_of_other_data_is_refused(folder: Path) -> None:
    begin(folder, "work")
    lists = recipes.Data("lists", exercises=("lists",))
    with pytest.raises(UsageError, match=r"the data 'books': .* found another; remove it or take another folder"):
        begin(folder, "work", data=(recipes.Data("books", path="books.jsonl", template="{text}!"), lists))


def test_a_recipe_without_validation_measures_nothing(folder: Path) -> None:
    run = begin(folder, "work", validation=None)
    train(run, stop=lambda: run.step >= 4)
    assert run.evaluate() is None and run.measured[-1].held_loss is None


def test_an_adapter_needs_a_checkpoint_to_compare_with(folder: Path) -> None:
    data = (recipes.Data("p", path="p.jsonl", form="preferences"),)
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    with pytest.raises(UsageError, match="expected a model to compare with, found none"):
        begin(folder, "work", data=data, validation=None)


def test_a_recipe_may_name_a_checkpoint_and_an_adapter(folder: Path) -> None:
    (folder / "base").mkdir()
    save_own_tokenizer(folder / "base" / "tokenizer.json")
    weights = official_weights(n_embd=128, vocab_size=384, seed=2)
    bpe_model_path = save(weights, folder / "base" / "model.pth", torch.bfloat16)
    recipe = {"model": Shape(path=str(bpe_model_path)), "adapter": Adapter("lora", rank=4, alpha=8.0)}
    run = begin(folder, "work", **recipe)
    train(run)
    assert run.result.name == "lora.pth"
    assert (run.work / "tokenizer.json").read_bytes() == (bpe_model_path.parent / "tokenizer.json").read_bytes()
    assert load(bpe_model_path, lora=run.result, lora_alpha=8.0).fingerprint != load(bpe_model_path).fingerprint


# ---- optimisers ----


def test_muon_turns_the_matrices_of_blocks_and_adamw_the_rest() -> None:
    shapes = {"emb.weight": (8, 4), "blocks.0.att.key.weight": (4, 4), "blocks.0.att.w0": (4,), "ln_out.bias": (4,)}
    given = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    begun = {name: z.detach().clone() for name, z in given.items()}
    optimizers = Optimizers(given, Optimizer("muon", weight_decay=0.0, clip=1e9))
    for z in given.values():
        z.grad = torch.randn_like(z)
    norm = optimizers.step(1e-2)
    assert norm > 0 and all(z.grad is None for z in given.values())
    moved = {name: (given[name] - begun[name]).detach() for name in given}
    singular = torch.linalg.svdvals(moved["blocks.0.att.key.weight"])
    assert singular.max() / singular.min() < 2, "an orthogonal step"
    for name, step in (("emb.weight", 1e-2), ("ln_out.bias", 1e-2), ("blocks.0.att.w0", 2e-2)):
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], step), rtol=1e-3, atol=0)
    assert len(optimizers.state_dict()) == 2


def test_gradients_are_clipped_and_only_matrices_decay() -> None:
    given = {"blocks.0.att.key.weight": torch.ones(2, 2), "blocks.0.ln1.weight": torch.ones(2)}
    for z in given.values():
        z.requires_grad_().grad = torch.zeros_like(z)
    Optimizers(given, Optimizer(weight_decay=0.5)).step(0.1)
    assert given["blocks.0.att.key.weight"].eq(0.95).all() and given["blocks.0.ln1.weight"].eq(1).all()
    given["blocks.0.ln1.weight"].grad = torch.tensor([30.0, 40.0])
    assert Optimizers(given, Optimizer(clip=0.5)).step(0.0) == pytest.approx(50)


def test_the_running_mean_follows_the_weights() -> None:
    weight = {"w": torch.zeros(3)}
    average = Average(weight, 0.9)
    weight["w"] += 1
    average.step()
    assert average.mean["w"].tolist() == pytest.approx([10 / 11] * 3), "the first steps count alike"
    for _ in range(500):
        average.step()
    weight["w"] += 1
    average.step()
    assert average.mean["w"].tolist() == pytest.approx([1.1] * 3)
