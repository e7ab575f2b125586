"""The trainer on a tiny corpus made here: data, loss, resume, export."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from forms import recurrence
from safetensors.torch import load_file
from tokenizers import Tokenizer

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.kernels import available
from rwkv_stream.kernels.layers import autograd
from rwkv_stream.model import load
from rwkv_stream.training import data, recipe
from rwkv_stream.training.data import Lanes
from rwkv_stream.training.loss import Gradient, HeadLoss, Network, softmax_gradient_
from rwkv_stream.training.parameters import Shape, initial_parameters
from rwkv_stream.training.recipe import Corpus, Recipe, Settings, Vocabulary
from rwkv_stream.training.run import Run, export, main, train

needs_cpp = pytest.mark.skipif(available()["cpu"] is not None, reason=f"C++ kernels: {available()['cpu']}")
pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = ("The miller went to the mill.", "A fox sat under the old oak.", "Nobody heard the bell at night.")
BOOKS = [{"title": f"Book {i}", "text": " ".join(SENTENCES[(i + j) % 3] for j in range(200))} for i in range(4)]
TALE = "The fox sat under the oak."
QUESTIONS: list[dict[str, Any]] = [
    {"context": TALE, "question": "Who sat under the oak?", "answer": "the fox"},
    {"context": TALE, "question": " Where did the fox sit? ", "answer": "under the oak\n"},
    {"title": "Mills", "question": "What is a mill?", "answer": "a house that grinds corn"},
    {"context": "Two pages.", "summary": "Pages."},
    {"question": "Without any passage?", "answer": "left out"},
]
SHARE_ALIKE = ("encyclopedia", "dialogues")
RECIPE = Recipe(
    Corpus("valid-books", ("valid-*", *SHARE_ALIKE)), Vocabulary(300), Settings(40, weights={"books-*": 2.0})
)
SMALL = Settings(40, n_layer=2, n_embd=64, lanes=2, window=32, segment=4, rate=1e-2, warmup=4)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(zstandard.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus, work = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("work")
    write(corpus / "books-00.jsonl.zst", BOOKS)
    write(corpus / "qa-fairytale.jsonl.zst", QUESTIONS)
    write(corpus / "valid-books.jsonl.zst", BOOKS[:1])
    write(corpus / "valid-stories.jsonl.zst", [{"text": "validation only"}])
    for name in SHARE_ALIKE:
        write(corpus / f"{name}.jsonl.zst", [{"text": "share alike"}])
    data.prepare(RECIPE, corpus, work)
    return work


@pytest.fixture
def work(prepared: Path, tmp_path: Path) -> Path:
    """A work folder of one's own with the prepared data."""
    for name in ("tokens", "tokenizer.json", "valid.u16", "valid.json"):
        (tmp_path / name).symlink_to(prepared / name)
    return tmp_path


def test_questions_follow_their_passage() -> None:
    assert list(data.documents(iter(QUESTIONS))) == [
        f"{TALE}\n\nQuestion: Who sat under the oak?\nAnswer: the fox"
        "\n\nQuestion: Where did the fox sit?\nAnswer: under the oak\n",
        "Mills\n\nQuestion: What is a mill?\nAnswer: a house that grinds corn\n",
        "Two pages.\n\nQuestion: What is the text about?\nAnswer: Pages.\n",
    ]


def test_only_training_files_are_read(prepared: Path) -> None:
    assert sorted(path.name for path in (prepared / "tokens").iterdir()) == ["books-00.u16", "qa-fairytale.u16"]


def test_token_files_hold_the_documents(prepared: Path) -> None:
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    assert tokenizer.token_to_id("<|end|>") == 0
    ids = np.fromfile(prepared / "tokens" / "books-00.u16", dtype="<u2")
    starts = np.flatnonzero(ids == 0)
    assert [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])] == [b["text"] for b in BOOKS]
    facts = json.loads((prepared / "valid.json").read_text())
    assert facts == {"bytes": len(BOOKS[0]["text"].encode()), "tokens": len(np.fromfile(prepared / "valid.u16", "<u2"))}


def test_a_folder_without_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected \*\.jsonl\.zst in"):
        data.prepare(RECIPE, tmp_path, tmp_path / "work")


def test_lanes_read_on_and_start_anew(prepared: Path) -> None:
    lanes = Lanes(prepared, lanes=2, window=16, segment=4, seed=3, weights={})
    steps = [lanes(step) for step in range(12)]
    again = Lanes(prepared, lanes=2, window=16, segment=4, seed=3, weights={})(7)
    assert torch.equal(steps[7][0], again[0])
    assert [fresh.tolist() for _, fresh in steps[:5]] == [
        [True, False],
        [False] * 2,
        [False, True],
        [False] * 2,
        [True, False],
    ]
    for (before, _), (after, fresh) in pairwise(steps):
        for lane in range(2):
            assert after[lane, 0] == (0 if fresh[lane] else before[lane, -1])
    assert not torch.equal(Lanes(prepared, 2, 16, 4, seed=4, weights={})(0)[0], steps[0][0])


def test_rate_rises_falls_and_can_finish_early() -> None:
    settings = Settings(1000, warmup=10, rate=1.0, final_rate=0.1)
    assert settings.rate_at(0) == pytest.approx(0.1)
    assert settings.rate_at(500) == pytest.approx(0.55)
    assert settings.rate_at(1000) == pytest.approx(0.1)
    early = Settings(1000, warmup=10, rate=1.0, final_rate=0.1, finish_from=500, finish_steps=100)
    assert early.last_step == 600
    assert early.rate_at(499) == settings.rate_at(499)
    assert early.rate_at(550) == pytest.approx((0.55 + 0.1) / 2)
    assert early.rate_at(600) == pytest.approx(0.1)


@pytest.mark.parametrize("gradient", [softmax_gradient_, pytest.param(autograd.softmax_gradient_, marks=needs_cpp)])
def test_head_loss_and_its_gradient(gradient: Gradient) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(HeadLoss.CHUNK + 5, 64, generator=generator).requires_grad_()
    weight = torch.randn(50, 64, generator=generator).requires_grad_()
    targets = torch.randint(50, (len(hidden),), generator=generator)
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    wanted_gradients = torch.autograd.grad(wanted, (hidden, weight))
    loss = HeadLoss.apply(hidden.bfloat16(), weight, targets, gradient)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    for found, expected in zip(torch.autograd.grad(loss, (hidden, weight)), wanted_gradients, strict=True):
        assert (found - expected).norm() < 2e-2 * expected.norm()  # products in bf16


def test_loss_goes_down(work: Path) -> None:
    run = Run(work, SMALL)
    before = run.evaluate(4)
    losses = [run.advance()[0] for _ in range(40)]
    assert losses[0] == pytest.approx(np.log(run.network.config.vocab_size), rel=0.05), (
        "an untrained model knows nothing"
    )
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert run.evaluate(4) < 0.7 * before


def test_a_stopped_run_continues_to_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for part in ("tokens", "tokenizer.json", "valid.u16", "valid.json"):
            (made / part).symlink_to(prepared / part)
        return made

    settings = Settings(9, n_layer=2, n_embd=64, lanes=2, window=16, segment=4, warmup=3)
    whole = Run(folder("whole"), settings)
    train(whole, save_every=100)
    cut = folder("cut")
    stopped = Run(cut, settings)
    train(stopped, save_every=2, stop=lambda: stopped.step >= 5)
    assert stopped.step == 5
    continued = Run(cut, None)
    assert continued.step == 5
    train(continued, save_every=100)
    assert continued.step == whole.step == 9
    for name, tensor in whole.network.parameters.items():
        assert torch.equal(tensor, continued.network.parameters[name]), name
    one, other = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole.work, cut))
    assert one["settings"] == other["settings"]
    assert all(torch.equal(x, y) for x, y in zip(one["state"].values(), other["state"].values(), strict=True))
    for index, moments in one["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, other["optimizer"]["state"][index][name]), name


def test_a_run_is_begun_once_and_continued_only_where_it_is(work: Path) -> None:
    with pytest.raises(UsageError, match="expected a run there, found none"):
        Run(work, None)
    Run(work, SMALL).save()
    with pytest.raises(UsageError, match="expected no run there, found a run"):
        Run(work, SMALL)


def test_training_without_token_files_is_refused(work: Path) -> None:
    (work / "tokens").unlink()
    with pytest.raises(InputError, match="run `prepare` first"):
        Run(work, SMALL)


@pytest.fixture
def exported(work: Path, tmp_path: Path) -> tuple[Run, Path]:
    run = Run(work, SMALL)
    train(run, save_every=100, stop=lambda: run.step >= 10)
    export(work, tmp_path / "model")
    return run, tmp_path / "model"


def test_export_has_official_names_and_shapes(exported: tuple[Run, Path]) -> None:
    run, folder = exported
    tensors = load_file(folder / "model.safetensors")
    C, F4, V = 64, 256, run.network.config.vocab_size
    vectors = [f"att.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")]
    block: dict[str, tuple[int, ...]] = dict.fromkeys([*vectors, "ffn.x_k"], (1, 1, C))
    block |= {f"{name}.{part}": (C,) for name in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {f"att.{name}{side}": (C, r) for name, r in (("w", 32), ("a", 32), ("g", 32)) for side in "1"}
    block |= {f"att.{name}2": (32, C) for name in "wag"}
    block |= {"att.r_k": (1, C), "ffn.key.weight": (F4, C), "ffn.value.weight": (C, F4)}
    expected: dict[str, tuple[int, ...]] = {"emb.weight": (V, C), "head.weight": (V, C)}
    expected |= {f"{name}.{part}": (C,) for name in ("blocks.0.ln0", "ln_out") for part in ("weight", "bias")}
    expected |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"blocks.1.att.v0": (1, 1, C), "blocks.1.att.v1": (C, 32), "blocks.1.att.v2": (32, C)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (folder / "tokenizer.json").read_bytes() == run.tokenizer.read_bytes()


def test_the_exported_model_is_the_trained_one(exported: tuple[Run, Path], work: Path) -> None:
    """Loss of the exported model through the sequential recurrence, beside the trainer's own."""
    run, folder = exported
    model = load(folder / "model.safetensors", device="cpu", dtype="fp32")
    model = dataclasses.replace(model, wkv=recurrence("7", "recurrent"))
    rows = torch.from_numpy(np.fromfile(work / "valid.u16", dtype="<u2").astype(np.int64)[:66].reshape(2, 33))
    own = run.network.loss(rows, run.network.start(2))[0].item()
    logits, _ = model.forward(rows[:, :-1], logits="all")
    assert F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item() == pytest.approx(own, abs=0.02)


def test_files_are_read_as_often_as_the_recipe_says(prepared: Path) -> None:
    def share(weights: dict[str, float]) -> float:
        lanes = Lanes(prepared, lanes=1, window=4, segment=1, seed=0, weights=weights)
        tales = {tuple(lanes(step)[0][0, 1:].tolist()) for step in range(300)}
        text = np.fromfile(prepared / "tokens" / "qa-fairytale.u16", dtype="<u2").tolist()
        return sum(list(part) in [text[i : i + 4] for i in range(len(text))] for part in tales) / len(tales)

    assert share({"qa-*": 0.0}) < share({}) < share({"books-*": 0.0})


def test_what_is_measured_on_has_to_be_there(tmp_path: Path) -> None:
    write(tmp_path / "books-00.jsonl.zst", BOOKS)
    with pytest.raises(InputError, match=r"expected '.*valid-books.jsonl.zst' to measure on"):
        data.prepare(RECIPE, tmp_path, tmp_path / "work")


def test_the_recipe_of_the_packaged_model() -> None:
    read = recipe.read(Path(__file__).parents[2] / "recipes" / "shipped.toml")
    assert {"encyclopedia", "dialogues", "qa-squad", "qa-dolly"} < set(read.corpus.exclude)
    assert read.training.last_step == 6639 and read.training.weights["books-*"] == 1.2
    assert read.tokenizer.vocab_size == 6144


WHOLE = """
[corpus]
validation = "valid-books"
exclude = []
[tokenizer]
vocab_size = 300
[training]
steps = 3
"""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected the tables corpus, tokenizer, training, found none"),
        ("[corpus", "cannot read the recipe"),
        (WHOLE + "[more]", "found corpus, tokenizer, training, more"),
        (WHOLE + "laines = 4", "expected one of steps, .*, found 'laines'"),
        (WHOLE + "lanes = 4.5", "expected 'lanes' as an integer, found 4.5"),
        (WHOLE + "lanes = true", "expected 'lanes' as an integer, found True"),
        (WHOLE + 'weights = {a = "b"}', "expected 'weights' as numbers"),
        (WHOLE.replace("steps = 3", ""), r"\[training\]: expected steps, found none"),
        (WHOLE.replace("[]", "3"), "expected 'exclude' as strings, found 3"),
    ],
    ids=("empty", "broken", "table", "key", "integer", "bool", "weights", "missing", "strings"),
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(InputError, match=problem):
        recipe.read(tmp_path / "recipe.toml")


def test_from_a_corpus_to_a_model_by_the_program(tmp_path: Path) -> None:
    write(tmp_path / "books-00.jsonl.zst", BOOKS)
    write(tmp_path / "valid-books.jsonl.zst", BOOKS[:1])
    settings = "steps = 3\nn_layer = 1\nn_embd = 64\nhead_size = 32\nlanes = 2\nwindow = 16\n"
    (tmp_path / "r.toml").write_text(WHOLE.replace("[]", '["valid-*"]').replace("steps = 3\n", settings))
    work = tmp_path / "work"
    main(["prepare", str(tmp_path / "r.toml"), str(tmp_path), str(work)])
    main(["train", str(work)])
    main(["export", str(work), str(tmp_path / "model")])
    model = load(tmp_path / "model" / "model.safetensors")
    assert (model.config.n_layer, model.config.n_embd, model.config.head_size) == (1, 64, 32)
    assert Run(work, None).step == 3


@needs_cpp
@pytest.mark.parametrize("head_size", [32, 64])
def test_the_kernels_give_the_gradients_of_the_equations(head_size: int) -> None:
    """Loss, next state and all gradients in fp32, over a window that goes on from a state, against plain torch."""
    torch.manual_seed(0)
    begun = initial_parameters(Shape(2, 64, 50, head_size))
    parameters = {name: z + 0.1 * torch.randn_like(z) for name, z in begun.items()}
    tokens, found = torch.randint(50, (3, 38)), []
    for backend in ("cpu", "reference"):
        network = Network({name: z.clone() for name, z in parameters.items()}, torch.float32, backend)
        _, state = network.loss(tokens.flip(1), network.start(3))
        loss, state = network.loss(tokens, state)
        loss.backward()
        found.append({"loss": loss, **state} | {name: z.grad for name, z in network.parameters.items()})
    for name, wanted in found[1].items():
        assert (found[0][name] - wanted).norm() < 1e-4 * wanted.norm(), name


@needs_cpp
def test_in_bf16_the_kernels_are_as_near_as_plain_torch() -> None:
    torch.manual_seed(0)
    parameters = initial_parameters(Shape(2, 64, 50, 32))
    parameters = {name: z + 0.1 * torch.randn_like(z) for name, z in parameters.items()}
    tokens, gradients = torch.randint(50, (3, 65)), {}
    for backend, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("cpu", torch.bfloat16)):
        network = Network({name: z.clone() for name, z in parameters.items()}, dtype, backend)
        network.loss(tokens, network.start(3))[0].backward()
        gradients[backend, dtype] = torch.cat([z.grad.flatten() for z in network.parameters.values()])
    exact, plain, found = gradients.values()
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()
