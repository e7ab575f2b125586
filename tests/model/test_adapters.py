"""Adapters: LoRA files and tuned initial states against weights and states that are changed by hand; refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from program import program
from reference_numpy import Reference
from tiny_models import VERSIONS, official_weights, save
from torch import Tensor

from rwkv_stream.errors import CheckpointError, UsageError
from rwkv_stream.model import Model, load
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.model.checkpoints.adapters import merged
from rwkv_stream.tables.score import score

N = 16
TUNED = [version for version in VERSIONS if version != "4"]
TOKENS = torch.tensor([list(b"The keeper of the lamp wrote it down.")])
Weights = dict[str, Tensor]


def weights_of(version: str = "7") -> Weights:
    return official_weights(version=version, n_embd=32, head_size=N, d_ffn=64)


def lora_of(weights: Weights, *names: str, rank: int = 3, seed: int = 7) -> Weights:
    """A pair for each of these matrices."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in names:
        n_out, n_in = weights[f"{name}.weight"].shape
        pairs[f"{name}.lora_A"] = torch.randn(rank, n_in, generator=generator) * 0.2
        pairs[f"{name}.lora_B"] = torch.randn(n_out, rank, generator=generator) * 0.2
    return pairs


def states_of(n_layer: int = 2, seed: int = 5) -> Weights:
    """As state tuning saves them, [head, value, key]."""
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}.att.time_state": torch.randn(2, N, N, generator=generator) for i in range(n_layer)}


def read(model: Model) -> Tensor:
    return model.forward(TOKENS, logits="all")[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(weights_of(), tmp_path / "base.safetensors")


# ---- LoRA ----


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("version", VERSIONS)
def test_lora_is_added_to_its_matrices(tmp_path: Path, version: str, suffix: str) -> None:
    weights = weights_of(version)
    names = ["blocks.0.att.receptance", "blocks.1.ffn.key", "blocks.1.att.output"]
    pairs = lora_of(weights, *names)
    trained = {"blocks.1.ln2.weight": torch.full((32,), 1.5)}
    by_hand = {**weights, **trained}
    for name in names:
        by_hand[f"{name}.weight"] = (
            weights[f"{name}.weight"] + 6.0 / 3 * pairs[f"{name}.lora_B"] @ pairs[f"{name}.lora_A"]
        )
    expected = load(save(by_hand, tmp_path / "by-hand.safetensors"), device="cpu")
    path = save(weights, tmp_path / "base.pth")
    model = load(path, device="cpu", lora=save({**pairs, **trained}, tmp_path / f"lora{suffix}"), lora_alpha=6)
    assert (read(model) - read(load(path, device="cpu"))).abs().max() > 0.1
    torch.testing.assert_close(read(model), read(expected), rtol=0, atol=1e-4)


def test_the_sum_has_the_dtype_of_the_base_and_is_rounded_once(tmp_path: Path) -> None:
    weights, name = weights_of(), "blocks.1.att.key"
    pairs = lora_of(weights, name)
    file = checkpoint.read(save(weights, tmp_path / "base.pth", torch.bfloat16))
    tensors = merged(file, save(pairs, tmp_path / "lora.pth"), 8)[0].tensors
    found = tensors[f"{name}.weight"].read()
    product = pairs[f"{name}.lora_B"].double() @ pairs[f"{name}.lora_A"].double()
    exact = weights[f"{name}.weight"].bfloat16().double() + 8 / 3 * product
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()  # half a step of 8 bits
    others = tensors.keys() - {f"{name}.weight"}
    assert all(tensors[other] is file.tensors[other] for other in others)


def test_a_whole_vector_of_the_official_shape_replaces_the_model_s(tmp_path: Path, base: Path) -> None:
    vector = torch.linspace(0, 1, 32)
    file = merged(checkpoint.read(base), save({"blocks.0.att.x_r": vector.view(1, 1, 32)}, tmp_path / "v.pth"), None)[0]
    assert torch.equal(file.tensors["blocks.0.att.x_r"].read(), vector)


def test_a_whole_tensor_that_nothing_reads_is_left_out(tmp_path: Path, base: Path) -> None:
    extra = {"blocks.0.att.v0": torch.ones(1, 1, 32), "blocks.0.ln1.bias": torch.ones(32)}
    file = merged(checkpoint.read(base), save(extra, tmp_path / "v.pth"), None)[0]
    assert file.tensors.keys() == checkpoint.read(base).tensors.keys()


PAIR = lora_of(weights_of(), "blocks.1.att.key")
A, B = "blocks.1.att.key.lora_A", "blocks.1.att.key.lora_B"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A: PAIR[A]}, "found one of them"),
        ({B: PAIR[B]}, "found one of them"),
        ({A: PAIR[A], B: PAIR[B][:, :2]}, r"lora_B' as \[32, 3\], found \[32, 2\]"),
        ({A: PAIR[A][:, :31], B: PAIR[B]}, r"lora_A' as \[r, 32\], found \[3, 31\]"),
        ({A: PAIR[A], B: PAIR[B][:31]}, r"lora_B' as \[32, r\], found \[31, 3\]"),
        ({A: PAIR[A][:0], B: PAIR[B][:, :0]}, r"lora_A' as \[r, 32\], found \[0, 32\]"),
        ({A.replace("1", "2"): PAIR[A], B.replace("1", "2"): PAIR[B]}, "2 layers.*'blocks.2.att.key.lora_A'"),
        ({"blocks.1.att.gate.weight": torch.zeros(32, 32)}, "'blocks.1.att.gate.weight', which fits none"),
        ({"blocks.1.ln1.weight": torch.zeros(33)}, r"as \[32\], found \[33\]"),
        ({"blocks.1.att.ln_x.lora_A": PAIR[A], "blocks.1.att.ln_x.lora_B": PAIR[B]}, "'blocks.1.att.ln_x.lora_A' as"),
        ({**PAIR, "blocks.1.att.key.weight": torch.zeros(32, 32)}, "found both of 'blocks.1.att.key.weight'"),
        ({"blocks.1.att.key.init_lora_A": PAIR[A]}, "PiSSA"),
        ({"blocks.1.att.key.bone": torch.zeros(2, 16, 16)}, "Bone"),
        ({"blocks.1.att.key.disha": torch.zeros(16, 32)}, "DiSHA"),
        ({}, "without tensors"),
    ],
)
def test_lora_files_that_do_not_fit(tmp_path: Path, base: Path, tensors: Weights, said: str) -> None:
    path = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=f"merging LoRA '{path}' into '{base}': .*{said}"):
        load(base, device="cpu", lora=path, lora_alpha=8)


def test_alpha(tmp_path: Path, base: Path) -> None:
    path = save(PAIR, tmp_path / "lora.pth")
    with pytest.raises(UsageError, match="pass --lora-alpha"):
        load(base, device="cpu", lora=path)
    for alpha in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="number above 0"):
            load(base, device="cpu", lora=path, lora_alpha=alpha)
    with pytest.raises(UsageError, match="pass --lora too"):
        load(base, device="cpu", lora_alpha=8)


# ---- tuned initial states ----


@pytest.mark.parametrize("version", TUNED)
def test_a_reading_starts_from_the_tuned_state(tmp_path: Path, version: str) -> None:
    """Against the independent recurrence, whose axes are those of `state`."""
    weights, states = weights_of(version), states_of()
    path = save(weights, tmp_path / "base.safetensors")
    model = load(path, device="cpu", initial_state=save(states, tmp_path / "state.pth"))
    reference = Reference({name: value.numpy() for name, value in weights.items()}, version)
    start = reference.zero_state()
    tuned = torch.stack(list(states.values()))  # [L, H, value, key]
    start["att_kv"] = (tuned if version.startswith("7") else tuned.transpose(-1, -2)).double().numpy()
    expected = torch.from_numpy(reference(TOKENS[0].tolist(), start)[1])
    torch.testing.assert_close(read(model)[0].double(), expected, rtol=0, atol=1e-4)
    assert (read(model) - read(load(path, device="cpu"))).abs().max() > 0.1


@pytest.mark.parametrize("version", TUNED)
def test_a_checkpoint_with_its_own_tuned_state(tmp_path: Path, version: str) -> None:
    weights, states = weights_of(version), states_of()
    path = save(weights, tmp_path / "base.pth")
    whole = load(save({**weights, **states}, tmp_path / "whole.pth"), device="cpu")
    apart = load(path, device="cpu", initial_state=save(states, tmp_path / "state.safetensors"))
    assert torch.equal(read(whole), read(apart))
    assert whole.fingerprint not in (load(path, device="cpu").fingerprint, apart.fingerprint)
    other = save(states_of(seed=6), tmp_path / "other.pth")
    replaced = load(tmp_path / "whole.pth", device="cpu", initial_state=other)
    assert torch.equal(read(replaced), read(load(path, device="cpu", initial_state=other)))


def test_everything_that_begins_begins_there(tmp_path: Path, base: Path) -> None:
    model = load(base, device="cpu", initial_state=save(states_of(), tmp_path / "state.pth"))
    expected = model.forward(TOKENS, model.initial, logits="none")[0]
    assert torch.equal(model.forward(TOKENS, logits="none")[0], expected)
    assert torch.equal(model.start()[1]["att_kv"], model.initial["att_kv"])  # bytes have no start token
    assert model.zero_state(3)["att_kv"].shape == (3, 2, 2, N, N)
    packed = model.forward_packed(TOKENS[0], torch.tensor([TOKENS.shape[1]]), model.zero_state())[0]
    torch.testing.assert_close(packed, expected[0], rtol=0, atol=1e-5)
    made = "".join(model.generate("The keeper", max_tokens=20, temperature=0))
    assert made == "".join(model.generate("The keeper", state=model.initial, max_tokens=20, temperature=0))
    plain = load(base, device="cpu")
    assert made != "".join(plain.generate("The keeper", max_tokens=20, temperature=0))
    text = tmp_path / "text.txt"
    text.write_text("The keeper of the lamp wrote it down.\n")
    tuned, zero = (list(score(str(text), model=m)) for m in (model, plain))
    assert [surprise.bits for surprise in tuned] != [surprise.bits for surprise in zero]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda: states_of(1), "'blocks.1.att.time_state' missing"),
        (lambda: states_of(3), "'blocks.2.att.time_state' besides"),
        (lambda: {name: state[:, 1:] for name, state in states_of().items()}, r"as \[2, 16, 16\], found \[2, 15, 16\]"),
        (lambda: {**states_of(), "head.weight": torch.zeros(2, 2)}, "'head.weight' besides"),
        (lambda: {"head.weight": torch.zeros(2, 2)}, "made by state tuning"),
    ],
)
def test_states_that_do_not_fit(tmp_path: Path, base: Path, tensors: Callable[[], Weights], said: str) -> None:
    path = save(tensors(), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=f"reading the tuned state '{path}' for '{base}': .*{said}"):
        load(base, device="cpu", initial_state=path)


def test_rwkv_4_has_no_state_to_tune(tmp_path: Path) -> None:
    path = save(weights_of("4"), tmp_path / "four.pth")
    with pytest.raises(CheckpointError, match="RWKV-4, whose state has no matrix"):
        load(path, device="cpu", initial_state=save(states_of(), tmp_path / "state.pth"))
    with pytest.raises(CheckpointError, match="time_state"):
        load(save({**weights_of("4"), **states_of()}, tmp_path / "merged.pth"), device="cpu")


# ---- fingerprint ----


def test_each_adapter_is_another_model(tmp_path: Path, base: Path) -> None:
    plain = load(base, device="cpu").fingerprint
    lora, state = save(PAIR, tmp_path / "lora.pth"), save(states_of(), tmp_path / "state.pth")
    other_lora = save({**PAIR, A: PAIR[A] + 1}, tmp_path / "other-lora.pth")
    other_state = save(states_of(seed=6), tmp_path / "other-state.pth")
    adapted = [
        {"lora": lora, "lora_alpha": 8},
        {"lora": lora, "lora_alpha": 16},
        {"lora": other_lora, "lora_alpha": 8},
        {"initial_state": state},
        {"initial_state": other_state},
        {"lora": lora, "lora_alpha": 8, "initial_state": state},
    ]
    prints = [load(base, device="cpu", **options).fingerprint for options in adapted]
    assert len({plain, *prints}) == len(adapted) + 1
    again = save(PAIR, tmp_path / "same.safetensors")
    assert load(base, device="cpu", lora=again, lora_alpha=8.0).fingerprint == prints[0]
    assert load(base, device="cpu").fingerprint == plain


def test_a_snapshot_wants_the_adapters_that_made_it(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The keeper of the lamp wrote it down.\n")
    save(PAIR, Path("lora.pth"))
    save(states_of(), Path("state.pth"))
    adapters = ("--lora", "lora.pth", "--lora-alpha", "8", "--initial-state", "state.pth")
    options = ("--device", "cpu", "--store", "store")
    assert program("ingest", "book.txt", "--model", base, *adapters, *options).code == 0
    generate = ("generate", "--from-snapshot", "book.txt", "--max-tokens", "3", "--temperature", "0", *options)
    assert program(*generate, *adapters).code == 0
    without = program(*generate)
    assert (without.code, without.out) == (13, "")
    assert "without --lora or --initial-state; pass the --lora or --initial-state" in " ".join(without.err.split())
    partly = program(*generate, "--initial-state", "state.pth")
    assert (partly.code, partly.out) == (13, "")
    assert "with --initial-state 'state.pth'; pass the --lora or" in " ".join(partly.err.split())
    assert program(*generate, "--model", base).code == 13
    assert program(*generate, "--lora", "lora.pth").code == 2
