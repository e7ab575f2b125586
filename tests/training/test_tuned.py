"""Fine-tuning: what is trained of a checkpoint, the files that come of it, and who else reads them; preferences."""

from __future__ import annotations

import json
from pathlib import Path

import pypi_rwkv
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import VERSIONS, official_weights, save
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model, load
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.model.checkpoints.convert import convert
from rwkv_stream.model.state import State
from rwkv_stream.training.lanes import Batch
from rwkv_stream.training.loss import Network
from rwkv_stream.training.recipe import Adapter, Data, Optimizer, Recipe, Stage, Validation
from rwkv_stream.training.recipe import Start as From
from rwkv_stream.training.run import Run, train
from rwkv_stream.training.start import start
from rwkv_stream.training.tuned import InitialState, LoRA, Tuned, Whole, tuned

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "The miller went to the mill. A fox sat under the old oak. "
ALPHA = 12.0


def parts(path: Path) -> tuple[checkpoint.Checkpoint, dict[str, Tensor], State]:
    file = checkpoint.read(path)
    return file, {name: z.read() for name, z in file.tensors.items()}, State.initial(file.config)


def trained(kind: str, path: Path, steps: int = 6) -> tuple[Tuned, float]:
    """An adapter after a few steps, and the loss on `tokens()` that it ends with."""
    file, base, initial = parts(path)
    adapter = tuned(Adapter(kind, rank=4, alpha=ALPHA), file.config, base, initial, seed=1)  # type: ignore[arg-type]
    network, batch = Network(adapter, torch.float32), whole()
    optimizer = torch.optim.Adam(list(adapter.parameters.values()), lr=1e-2 if kind == "lora" else 5e-2)
    first = last = network.loss(batch, network.start(1))[0].item()
    for _ in range(steps):
        torch.autograd.backward(network.loss(batch, network.start(1))[0])
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        last = network.loss(batch, network.start(1))[0].item()
    assert last < first - 0.01
    return adapter, last


def tokens() -> Tensor:
    return torch.tensor(list((2 * TEXT).encode()))


def whole() -> Batch:
    ids = tokens()
    return Batch(ids[:-1], ids[1:], torch.tensor([len(ids) - 1]), torch.tensor([1]), torch.tensor([0]))


def loss_of(model: Model) -> float:
    logits, _ = model.forward(tokens()[None, :-1], logits="all")
    return F.cross_entropy(logits[0], tokens()[1:]).item()


def written(adapter: Tuned, folder: Path) -> Path:
    path = folder / adapter.file_name
    path.write_bytes(adapter.file())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_lora_gives_the_trained_loss_where_it_is_loaded(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(official_weights(version=version), tmp_path / "base.pth", dtype)
    adapter, loss = trained("lora", base)
    path = written(adapter, tmp_path)
    model = load(base, device="cpu", dtype="fp32", lora=path, lora_alpha=ALPHA)
    assert loss_of(model) == pytest.approx(loss, abs=1e-5)
    convert(base, tmp_path / "merged.safetensors", lora=path, lora_alpha=ALPHA)
    merged = load(tmp_path / "merged.safetensors", device="cpu", dtype="fp32")
    assert loss_of(merged) == pytest.approx(loss, abs=1e-5)


def test_a_lora_has_the_names_and_shapes_of_rwkv_peft(tmp_path: Path) -> None:
    """As `JL-er/RWKV-PEFT: merge/merge.py` reads them: a dict of tensors, A [r, in] and B [out, r] of each matrix."""
    adapter, _ = trained("lora", save(official_weights(), tmp_path / "base.pth"))
    found = torch.load(written(adapter, tmp_path), weights_only=True)
    matrices = [f"att.{name}" for name in ("receptance", "key", "value", "output")] + ["ffn.key", "ffn.value"]
    sizes = {"ffn.key": (192, 64), "ffn.value": (64, 192)}
    expected = {}
    for i in range(2):
        for name in matrices:
            n_out, n_in = sizes.get(name, (64, 64))
            expected |= {f"blocks.{i}.{name}.lora_A": (4, n_in), f"blocks.{i}.{name}.lora_B": (n_out, 4)}
    assert {name: tuple(z.shape) for name, z in found.items()} == expected


@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "4"])
def test_a_state_gives_the_trained_loss_where_it_is_loaded(version: str, tmp_path: Path) -> None:
    base = save(official_weights(version=version), tmp_path / "base.pth")
    adapter, loss = trained("state", base)
    path = written(adapter, tmp_path)
    assert loss_of(load(base, device="cpu", dtype="fp32", initial_state=path)) == pytest.approx(loss, abs=1e-5)
    convert(base, tmp_path / "own.safetensors", initial_state=path)
    assert loss_of(load(tmp_path / "own.safetensors", device="cpu", dtype="fp32")) == pytest.approx(loss, abs=1e-5)


def test_rwkv_4_has_no_state_to_tune(tmp_path: Path) -> None:
    file, base, initial = parts(save(official_weights(version="4"), tmp_path / "base.pth"))
    with pytest.raises(UsageError, match="expected a model of RWKV-5 to 7, found RWKV-4"):
        InitialState(file.config, base, initial)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (4, 0.0)])
def test_a_lora_of_nothing(tmp_path: Path, rank: int, alpha: float) -> None:
    file, base, initial = parts(save(official_weights(), tmp_path / "base.pth"))
    with pytest.raises(UsageError, match="expected a rank of 1 or more, alpha above 0"):
        LoRA(file.config, base, initial, rank, alpha, seed=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_loads_as_a_model(version: str, tmp_path: Path) -> None:
    base = save(official_weights(version=version), tmp_path / "base.pth", torch.bfloat16)
    file, tensors, _ = parts(base)
    path = written(Whole(file.config, tensors), tmp_path)
    assert load(path, device="cpu").fingerprint == load(base, device="cpu").fingerprint, "untrained, it is the same"
    before = {name: z.clone() for name, z in tensors.items()}
    trained("whole", base)
    assert all(torch.equal(z, before[name]) for name, z in tensors.items()), "what is read stays as it is"


def test_training_begins_at_the_model_itself(tmp_path: Path) -> None:
    file, base, initial = parts(save(official_weights(), tmp_path / "base.pth"))
    begun = State({**initial, "att_kv": torch.randn_like(initial["att_kv"])})
    for kind, state in (("lora", initial), ("whole", initial), ("state", initial), ("state", begun)):
        adapter = tuned(Adapter(kind), file.config, base, state, seed=0)  # type: ignore[arg-type]
        losses = [
            network.loss(whole(), network.start(1))[0].item()
            for network in (Network(z, torch.float32) for z in (adapter, Tuned(file.config, base, state)))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), kind


# ---- a second opinion ----


@pytest.mark.parametrize(
    ("version", "kind"), [("5.2", "state"), ("6", "lora"), ("6", "state"), ("7", "lora"), ("7", "state")]
)
def test_the_rwkv_package_says_the_same(version: str, kind: str, tmp_path: Path) -> None:
    """Logits within 1e-4 of a LoRA that was merged into a .pth, and from a tuned state (RWKV-7: given to `forward`)."""
    # a 0.1B shape, by which the package knows versions
    weights = official_weights(version=version, n_layer=12, n_embd=128, d_ffn=448, seed=9)
    base = save(weights, tmp_path / "base.pth")
    adapter, _ = trained(kind, base, steps=1)
    path, out = written(adapter, tmp_path), tmp_path / "merged.safetensors"
    begun = None
    if kind == "lora":
        model = load(base, device="cpu", dtype="fp32", lora=path, lora_alpha=ALPHA)
        convert(base, out, lora=path, lora_alpha=ALPHA)
    else:
        model = load(base, device="cpu", dtype="fp32", initial_state=path)
        if version == "7":
            begun = torch.load(path, weights_only=True)
        convert(base, out, **({} if begun else {"initial_state": path}))  # type: ignore[arg-type]
    theirs, _ = pypi_rwkv.forward(load_file(out), version, tokens().tolist(), tmp_path, begun)
    logits, _ = model.forward(tokens()[None])
    assert (logits[0] - theirs).abs().max() <= 1e-4


# ---- preferences ----


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Of two answers the one that ends in an exclamation mark is preferred."""
    words = ["mill", "fox", "oak", "bell", "night", "miller", "stone", "sea", "lamp", "wind"]
    records = [
        {"prompt": f"Say {a} and {b}: ", "chosen": f"{a} {b}!", "rejected": f"{a} {b}?"}
        for a in words
        for b in words[:4]
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_of_preferences(pairs: Path, base: Path, work: Path, kind: str, **changes: float) -> Run:
    stage = Stage(epochs=4, lanes=4, window=64, rate=1e-2, warmup=2, schedule="constant")
    recipe = Recipe(
        (Data("pairs", path=pairs.name, form="preferences"),),
        (stage,),
        From(str(base)),
        Adapter(kind, rank=4, alpha=8.0),  # type: ignore[arg-type]
        optimizer=Optimizer(),
        validation=Validation(held=0.2),
        save_every=10,
        **changes,  # type: ignore[arg-type]
    )
    begun = start(recipe, pairs.parent, work)
    return Run(work, begun.recipe, begun.tokenizer, begun.tuned, begun.before, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["lora", "state", "whole"])
def test_what_is_preferred_becomes_likelier(kind: str, pairs: Path, bytes_model_path: Path) -> None:
    run = run_of_preferences(pairs, bytes_model_path, pairs.parent / "work", kind)
    before = run.evaluate()
    assert before is not None and (before.documents, before.accuracy) == (8, 0.5), "nothing gained yet"
    assert before.loss == pytest.approx(0.693147, abs=1e-5)
    train(run)
    after = run.evaluate()
    assert after is not None and after.accuracy == 1.0 and after.loss < 0.6
    assert run.evaluate(run.before) == before
    assert run.measured[-1].accuracy == 1.0 and run.measured[-1].learnt > 0


def test_the_loss_of_preferences_is_that_of_their_likelihoods(pairs: Path, bytes_model_path: Path) -> None:
    """-log sigmoid(beta (log-ratio of the preferred - log-ratio of the other)), answers alone, by `Model.forward`."""
    run = run_of_preferences(pairs, bytes_model_path, pairs.parent / "work", "lora", beta=0.7)
    train(run, stop=lambda: run.step >= 5)
    after = load(bytes_model_path, device="cpu", lora=run.result, lora_alpha=8.0)
    record = json.loads(pairs.read_text().splitlines()[4])  # the first that is held out

    def likelihood(model: Model, answer: str) -> float:
        prompt, ids = len(record["prompt"]), torch.tensor(list((record["prompt"] + answer).encode()))
        logits, _ = model.forward(ids[None], logits="all")
        return -F.cross_entropy(logits[0, prompt - 1 : -1], ids[prompt:], reduction="sum").item()

    models = load(bytes_model_path, device="cpu"), after
    gains = [likelihood(models[1], z) - likelihood(models[0], z) for z in (record["chosen"], record["rejected"])]
    wanted = -F.logsigmoid(torch.tensor(0.7 * (gains[0] - gains[1]))).item()
    run.recipe = Recipe(
        run.recipe.data, run.recipe.stages, validation=Validation(held=0.2, documents=1), beta=run.recipe.beta
    )
    found = run.evaluate()
    assert found is not None and found.documents == 1 and found.loss == pytest.approx(wanted, abs=1e-4)


def test_preferences_go_on_to_the_same_bits(pairs: Path, bytes_model_path: Path) -> None:
    whole_run = run_of_preferences(pairs, bytes_model_path, pairs.parent / "whole", "lora")
    train(whole_run)
    cut = run_of_preferences(pairs, bytes_model_path, pairs.parent / "cut", "lora")
    train(cut, stop=lambda: cut.step >= 7)
    goes_on = run_of_preferences(pairs, bytes_model_path, pairs.parent / "cut", "lora")
    assert goes_on.step == 7
    train(goes_on)
    assert [row.loss for row in goes_on.measured] == [row.loss for row in whole_run.measured]
    assert goes_on.result.read_bytes() == whole_run.result.read_bytes()
