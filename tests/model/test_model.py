"""The model in all its forms against known outputs and a numpy float64 recurrence; checkpoints, good and bad."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from forms import recurrence
from reference_numpy import Reference
from tiny_models import RANKS, VERSIONS, official_weights, save, save_any_tokenizer, save_own_tokenizer
from torch import Tensor

from rwkv_stream import files
from rwkv_stream.errors import BackendError, CheckpointError, TokenizerError, UsageError
from rwkv_stream.kernels import available
from rwkv_stream.kernels.layers.cpu import Weight
from rwkv_stream.model import Config, Loading, Model, architectures, load, network
from rwkv_stream.model.checkpoints import checkpoint, fingerprints
from rwkv_stream.model.state import State

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS = {  # the lengths of calls that read 197 tokens: below, at and above a block, each from a state that is not zero
    "in one call": (197,),
    "in blocks and less": (64, 1, 64, 3, 65),
    "by tokens, then across blocks": (*[1] * 24, 63, 65, 16, 16, 3, 3, 3, 3, 1),
}
LOGIT_LIMIT, STATE_LIMIT = 1e-4, 1e-3
NO_CPP = available()["cpu"]
FORMS = ["recurrent", "chunked", pytest.param("cpu", marks=pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP)))]
STATE_NAMES = {  # those of the .npz files → ours
    "att_x": "att_x_prev", "S": "att_kv", "num": "att_num", "den": "att_den", "exp": "att_max", "ffn_x": "ffn_x_prev"
}  # fmt: skip
SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Known:
    """A checkpoint, tokens [T], and what they give: logits [T, V] and the final state by our names, without batch."""

    path: Path
    tokens: Tensor
    logits: np.ndarray
    state: Mapping[str, np.ndarray]
    weights: Mapping[str, np.ndarray]
    version: str

    def load(self, dtype: str = "fp32", backend: str = "auto") -> Model:
        return load(self.path, device="cpu", dtype=dtype, backend=backend, tokenizer=self.path.with_name("tokens.json"))


def _from_npz(file: Path, folder: Path, version: str) -> Known:
    data = np.load(file.with_suffix(".npz"))
    n_layer = sum(key.endswith(".att_x") for key in data)
    state = {
        ours: np.stack([data[f"state.{i}.{theirs}"] for i in range(n_layer)])
        for theirs, ours in STATE_NAMES.items()
        if f"state.0.{theirs}" in data
    }
    stored = torch.load(file, weights_only=True)
    (folder / file.name).symlink_to(file)
    save_any_tokenizer(folder / "tokens.json", len(stored["emb.weight"]))
    weights = {name: tensor.double().numpy() for name, tensor in stored.items()}
    tokens = torch.from_numpy(data["tokens"]).long()
    return Known(folder / file.name, tokens, data["logits"], state, weights, version)


def _from_numpy(folder: Path, version: str, head_size: int) -> Known:
    made = official_weights(version=version, n_embd=128 if head_size < 64 else 64, head_size=head_size, seed=head_size)
    weights = {name: tensor.numpy() for name, tensor in made.items()}
    tokens = torch.randint(256, (197,), generator=torch.Generator().manual_seed(5))
    _, logits, state = Reference(weights, version)(tokens.tolist())
    save_any_tokenizer(folder / "tokens.json", 256)
    return Known(save(made, folder / "model.pth"), tokens, logits, state, weights, version)


FILES = [f"rwkv{version}-tiny" for version in ("4", "5.0", "5.2", "6", "7")]
FILES += [f"synth/synth-{version}" for version in ("4", "5.0", "5.1", "5.2", "6", "7.0", "7a")]
OWN = [f"{version}, {size} a head" for version in VERSIONS for size in (64, 16)]


@pytest.fixture(scope="session", params=[*FILES, *OWN])
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("known")
    if request.param in OWN:
        version, size = request.param.split(", ")
        return _from_numpy(folder, version, int(size.split()[0]))
    version = re.sub("rwkv|-tiny|synth/synth-", "", request.param)
    return _from_npz(request.getfixturevalue("tiny_rwkv") / f"{request.param}.pth", folder, version.replace("7.0", "7"))


@pytest.fixture(scope="session")
def known_model(known: Known) -> Model:
    model = known.load()
    assert model.config.version == known.version
    return model


@pytest.fixture(scope="session")
def plain_model(known: Known) -> Model:
    """In plain torch: loaded for the native kernels, RWKV-7 computes with these whatever its recurrence."""
    return known.load(backend="reference")


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return official_weights(seed=7)


@pytest.fixture
def two_heads(tmp_path: Path) -> Model:
    return load(save(official_weights(n_embd=128, seed=4), tmp_path / "model.safetensors"), device="cpu")


def in_form(model: Model, form: str) -> Model:
    return dataclasses.replace(model, wkv=recurrence(model.config.version, form), backend=form)


def tokens_of(n_rows: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


def read_in_calls(model: Model, tokens: Tensor, lengths: Iterable[int]) -> tuple[Tensor, State]:
    """Logits [T, V] of tokens [T], read from the zero state in calls of these lengths, until none is left; the final
    state."""
    parts, state = [], model.zero_state()
    for length in lengths:
        part, tokens = tokens[:length], tokens[length:]
        logits, state = model.forward(part[None], state, logits="all")
        parts.append(logits[0])
        if not len(tokens):
            return torch.cat(parts), state
    raise AssertionError(f"{len(tokens)} tokens are left")


def largest(found: Tensor, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found.double().numpy() - expected).max())


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


# ---- against known outputs ----


@pytest.mark.parametrize(
    ("form", "calls"),
    [
        ("recurrent", "by tokens, then across blocks"),  # it knows no blocks
        *(("chunked", calls) for calls in CALLS),
        *(pytest.param("cpu", calls, marks=FORMS[2].marks) for calls in CALLS),
    ],
)
def test_known_outputs(known: Known, known_model: Model, plain_model: Model, form: str, calls: str) -> None:
    model = in_form(known_model if form == "cpu" else plain_model, form)
    logits, state = read_in_calls(model, known.tokens, CALLS[calls])
    assert largest(logits, known.logits) <= LOGIT_LIMIT
    for name, expected in known.state.items():
        assert largest(state[name][0], expected) <= STATE_LIMIT, name


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_of_rwkv_cpp(tiny_rwkv: Path, form: str, length: int) -> None:
    expected = np.fromfile(tiny_rwkv / "expected-logits-7v0-834K.bin", "<f4")
    model = in_form(load(tiny_rwkv / "rwkv7-tiny.pth", device="cpu"), form)
    logits, _ = read_in_calls(model, torch.tensor([34, 105, 110]), repeat(length))
    assert largest(logits[-1], expected) <= LOGIT_LIMIT


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=FORMS[2].marks)])
def test_backends_as_loaded(known: Known, backend: str) -> None:
    model = known.load(backend=backend)
    assert model.backend == backend
    for tokens, length in ((known.tokens[:20], 1), (known.tokens, 197)):
        logits, _ = read_in_calls(model, tokens, repeat(length))
        assert largest(logits, known.logits[: len(tokens)]) <= LOGIT_LIMIT


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_shows(version: str, tmp_path: Path) -> None:
    """A mistake in any term is seen above, because each tensor moves the logits by more than their limit."""
    weights, tokens = official_weights(version=version, head_size=16, seed=7), tokens_of(1, 24)
    logits, _ = load(save(weights, tmp_path / "a.pth"), device="cpu").forward(tokens)
    for name, tensor in weights.items():
        other, _ = load(save(weights | {name: tensor.flip(-1)}, tmp_path / "b.pth"), device="cpu").forward(tokens)
        assert (logits - other).abs().max() > 100 * LOGIT_LIMIT, name


@pytest.mark.parametrize("known", OWN, indirect=True)  # the files: `test_accuracy.py`
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_sixteen_bits_are_no_worse_than_twice_plain_code(known: Known, dtype: str) -> None:
    """Plain code keeps the residual stream and all that goes into or comes out of a product in 16 bits."""
    tokens = known.tokens[:80]
    wanted = known.logits[: len(tokens)]

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(x)).to(SIXTEEN[dtype]).double().numpy()

    _, plain_logits, _ = Reference(known.weights, known.version, rounded=rounded)(tokens.tolist())
    plain = rms(plain_logits - wanted)  # not the largest: a norm of almost nothing makes that a matter of luck
    model = known.load(dtype)
    assert {tensor.dtype for block in model.blocks for tensor in block.values()} >= {torch.float32, SIXTEEN[dtype]}
    for form, length in (("recurrent", 1), ("chunked", 65), ("cpu", 80)):
        if form != "cpu" or NO_CPP is None:
            logits, state = read_in_calls(in_form(model, form), tokens, repeat(length))
            assert {tensor.dtype for tensor in (logits, *state.values())} == {torch.float32}
            assert rms(logits.double().numpy() - wanted) <= 2 * plain + 1e-5, form


# ---- one call ----


@pytest.mark.parametrize("form", FORMS)
def test_the_given_state_is_never_changed(two_heads: Model, form: str) -> None:
    model = in_form(two_heads, form)
    _, state = model.forward(tokens_of(3, 70))
    before = state.clone()
    for n_tokens in (1, 65):
        first, new = model.forward(tokens_of(3, n_tokens, seed=1), state)
        again, _ = model.forward(tokens_of(3, n_tokens, seed=1), state)
        assert torch.equal(first, again)
        for name in state:
            assert torch.equal(state[name], before[name])
            assert not torch.equal(new[name], before[name])
            new[name].fill_(9)  # nor is what comes back a view of it
            assert torch.equal(state[name], before[name])


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_unequal_length_are_as_if_alone(two_heads: Model, form: str) -> None:
    model = in_form(two_heads, form)
    lengths = [1, 17, 64, 70, 3]
    tokens = tokens_of(len(lengths), 70)
    _, start = model.forward(tokens_of(len(lengths), 9, seed=1))
    hidden, state = model.forward(tokens, start, logits="none", lengths=torch.tensor(lengths))
    last, _ = model.forward(tokens, start, lengths=torch.tensor(lengths))
    for i, length in enumerate(lengths):
        alone, alone_state = model.forward(tokens[i : i + 1, :length], start.row(i), logits="none")
        assert (hidden[i, :length] - alone[0]).abs().max() <= 1e-5
        assert (last[i] - model.head(alone[0, -1])).abs().max() <= 1e-5
        for name in state:
            assert (state[name][i] - alone_state[name][0]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_length_zero_keeps_its_state(two_heads: Model, form: str) -> None:
    model = in_form(two_heads, form)
    _, start = model.forward(tokens_of(2, 9))
    _, state = model.forward(tokens_of(2, 5), start, logits="none", lengths=torch.tensor([0, 5]))
    for name in state:
        assert torch.equal(state[name][0], start[name][0])
        assert not torch.equal(state[name][1], start[name][1])


@pytest.mark.parametrize("form", FORMS)
def test_segments_of_one_call_are_as_if_alone(two_heads: Model, form: str) -> None:
    """Started from a state by row, final states of some; the given state is left as it is."""
    model = in_form(two_heads, form)
    lengths, start, keep = torch.tensor([1, 17, 64, 2, 44]), torch.tensor([1, 0, 1, 1, 0]), torch.tensor([4, 0])
    tokens = tokens_of(1, 128)[0]
    _, state = model.forward(tokens_of(2, 9, seed=1))
    before = state.digest()
    hidden, new = model.forward_packed(tokens, lengths, state, start, keep)
    assert state.digest() == before
    for i, segment in enumerate(tokens.split(lengths.tolist())):
        alone, alone_state = model.forward(segment[None], state.row(int(start[i])), logits="none")
        assert (hidden.split(lengths.tolist())[i] - alone[0]).abs().max() <= 1e-5
        for row in (keep == i).nonzero()[:, 0].tolist():
            for name in new:
                assert (new[name][row] - alone_state[name][0]).abs().max() <= 1e-5, name


def test_a_segment_knows_nothing_of_its_neighbours_and_place(two_heads: Model) -> None:
    """In calls of one size, with the native kernels, bit for bit, for any number of threads."""
    if NO_CPP is not None:
        pytest.skip(NO_CPP)
    words, others, state = tokens_of(1, 37)[0], tokens_of(1, 64 - 37, seed=1)[0], two_heads.zero_state()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first, ended = two_heads.forward_packed(torch.cat([words, others]), torch.tensor([37, 27]), state.repeat(2))
        middle, also_ended = two_heads.forward_packed(
            torch.cat([others[:20], words, others[20:]]), torch.tensor([1, 19, 37, 7]), state.repeat(4)
        )
        assert torch.equal(first[:37], middle[20:57]), threads
        assert ended.row(0).digest() == also_ended.row(2).digest()


def test_one_segment_is_a_row(two_heads: Model) -> None:
    tokens = tokens_of(1, 64)
    hidden, state = two_heads.forward(tokens, logits="none")
    packed, packed_state = two_heads.forward_packed(tokens[0], torch.tensor([64]), two_heads.zero_state())
    assert torch.equal(packed, hidden[0])
    assert packed_state.digest() == state.digest()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_all_last_and_none_agree(two_heads: Model, form: str, n_tokens: int) -> None:
    model, tokens = in_form(two_heads, form), tokens_of(2, n_tokens)
    results = {wanted: model.forward(tokens, logits=wanted) for wanted in ("all", "last", "none")}
    logits, hidden = results["all"][0], results["none"][0]
    assert logits.shape == (2, n_tokens, 256) and hidden.shape == (2, n_tokens, 128)
    assert torch.equal(model.head(hidden), logits)
    for other in (hidden[..., :-1], hidden.mT, torch.tensor(1.0)):
        with pytest.raises(UsageError, match="computing logits: expected hidden states"):
            model.head(other)
    assert (results["last"][0] - logits[:, -1]).abs().max() <= 1e-5  # fewer rows, another order of sums
    assert all(torch.equal(results["none"][1][name], state[name]) for _, state in results.values() for name in state)


def test_the_head_runs_for_no_other_position(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    head = Model.head
    monkeypatch.setattr(Model, "head", lambda model, hidden: seen.append(tuple(hidden.shape)) or head(model, hidden))
    for wanted in ("none", "last", "all"):
        bytes_model.forward(tokens_of(2, 5), logits=wanted)
    assert seen == [(2, 64), (2, 5, 64)]


def test_what_comes_back_is_free_of_gradients_and_may_be_used(bytes_model: Model) -> None:
    logits, state = bytes_model.forward(tokens_of(1, 5))
    assert not logits.requires_grad
    for tensor in state.values():
        assert not tensor.requires_grad and not tensor.is_inference()


@pytest.mark.parametrize("n_tokens", [1, 70])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_the_model(form: str, n_tokens: int, tmp_path: Path) -> None:
    """The derivative along a direction, of the state and of one weight of each kind, against the reference's."""
    weights = official_weights(n_embd=128, seed=3)
    moved = ["blocks.0.att.w1", "blocks.0.att.key.weight", "blocks.1.att.v2", "blocks.1.att.k_k", "blocks.0.ffn.x_k"]
    tokens = tokens_of(1, n_tokens)
    generator = torch.Generator().manual_seed(1)
    start = {"att_kv": torch.randn(2, 2, 64, 64, generator=generator)}
    start |= {name: torch.randn(2, 128, generator=generator) for name in ("att_x_prev", "ffn_x_prev")}
    probe = torch.randn(n_tokens, 128, generator=generator) / n_tokens
    directions = {name: torch.randn(z.shape, generator=generator) for name, z in (start | weights).items()}

    parameters = {name: tensor.squeeze((0, 1)) if tensor.ndim == 3 else tensor for name, tensor in weights.items()}
    leaves = {name: parameters[name].requires_grad_() for name in moved}
    state = State({name: start[name][None].requires_grad_() for name in ("att_x_prev", "att_kv", "ffn_x_prev")})
    outer = parameters | {f"ln0.{part}": parameters[f"blocks.0.ln0.{part}"] for part in ("weight", "bias")}
    blocks = [{name[9:]: z for name, z in parameters.items() if name.startswith(f"blocks.{i}.")} for i in range(2)]
    config = load(save(weights, tmp_path / "model.pth"), device="cpu").config
    given = network.Rows(tokens, state, None)
    version = architectures.of("7")
    blocks = [version.prepare(block, config) for block in blocks]
    stream, new = network.layers(version, config, blocks, network.embed(outer, tokens), given, recurrence("7", form))
    hidden = network.layer_norm(stream.x, outer, "ln_out")
    ((hidden[0] * probe).sum() + (new["att_kv"][0] * directions["att_kv"]).sum() / 1e4).backward()

    def value(name: str, step: float) -> float:
        values = {key: tensor.detach().double().numpy() for key, tensor in (weights | start).items()}
        values[name] = values[name] + step * directions[name].double().numpy()
        ref_hidden, _, ref_new = Reference({key: values[key] for key in weights})(
            tokens[0].tolist(), {key: values[key] for key in start}
        )
        kv = np.sum(ref_new["att_kv"] * directions["att_kv"].numpy()) / 1e4
        return float(np.sum(ref_hidden * probe.numpy()) + kv)

    for name, leaf in (leaves | dict(state)).items():
        assert leaf.grad is not None, name
        found = float((leaf.grad.double().reshape(-1) * directions[name].double().reshape(-1)).sum())
        expected = (value(name, 1e-5) - value(name, -1e-5)) / 2e-5
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name


def test_a_state_that_wants_gradients_gets_them(bytes_model: Model) -> None:
    state = State({name: tensor.requires_grad_() for name, tensor in bytes_model.zero_state().items()})
    logits, _ = bytes_model.forward(tokens_of(1, 70), state)
    logits.sum().backward()
    assert all(float(tensor.grad.abs().max()) > 0 for tensor in state.values())


def packed(model: Model, lengths: list[int], **rows: list[int]) -> object:
    given = {name: torch.tensor(row) for name, row in rows.items()}
    return model.forward_packed(tokens_of(1, 3)[0], torch.tensor(lengths), model.zero_state(2), **given)


BAD_CALLS: dict[str, tuple[Callable[[Model], object], str]] = {
    "int32": (lambda m: m.forward(tokens_of(1, 3).int()), r"expected int64 \[B, T\].* found int32 \[1, 3\]"),
    "one axis": (lambda m: m.forward(tokens_of(1, 3)[0]), r"found int64 \[3\]"),
    "no token": (lambda m: m.forward(tokens_of(1, 3)[:, :0]), r"found int64 \[1, 0\]"),
    "token too large": (lambda m: m.forward(torch.tensor([[3, 256]])), "ids from 0 to 255, found 256"),
    "token below zero": (lambda m: m.forward(torch.tensor([[3, -1]])), "ids from 0 to 255, found -1"),
    "logits": (lambda m: m.forward(tokens_of(1, 3), logits="first"), "found 'first'"),
    "rows of the state": (lambda m: m.forward(tokens_of(2, 3), m.zero_state(3)), "a state of 2 rows"),
    "state of another shape": (
        lambda m: m.forward(tokens_of(1, 3), State.initial(dataclasses.replace(m.config, n_layer=3))),
        r"found att_x_prev \[1, 3, 64\]",
    ),
    "state in halves": (
        lambda m: m.forward(tokens_of(1, 3), State({name: z.half() for name, z in m.zero_state().items()})),
        "fp32",
    ),
    "number of lengths": (lambda m: m.forward(tokens_of(2, 3), lengths=torch.tensor([3])), r"int64 \[2\], found"),
    "length too large": (lambda m: m.forward(tokens_of(1, 3), lengths=torch.tensor([4])), r"from 1 to 3, found \[4\]"),
    "last of nothing": (lambda m: m.forward(tokens_of(1, 3), lengths=torch.tensor([0])), r"from 1 to 3, found \[0\]"),
    "segments that do not add up": (lambda m: packed(m, [1, 1]), "add up to 3 tokens, found .* with sum 2"),
    "an empty segment": (lambda m: packed(m, [0, 3]), "lengths of 1 or more"),
    "a start too many": (lambda m: packed(m, [1, 2], start=[0, 0, 0]), "one for each start of 3"),
    "a start without a state": (lambda m: packed(m, [1, 2], start=[0, 2]), "expected start as int64 from 0 to 1"),
    "a segment to keep that is none": (lambda m: packed(m, [1, 2], keep=[-1]), "expected keep as int64 from 0 to 1"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_bad_calls(bytes_model: Model, kind: str) -> None:
    call, message = BAD_CALLS[kind]
    with pytest.raises(UsageError, match=message):
        call(bytes_model)


def test_start_and_zero_state(bytes_model: Model, bpe_model: Model) -> None:
    hidden, state = bytes_model.start()  # bytes have no start token
    assert hidden is None and bytes_model.start_token is None
    assert all(not tensor.any() for tensor in state.values())
    hidden, state = bpe_model.start()
    expected, expected_state = bpe_model.forward(torch.tensor([[0]]), logits="none")
    assert torch.equal(hidden, expected[0, -1])
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    assert bpe_model.zero_state(3).batch == 3


def test_generate_continues_a_state(bpe_model: Model) -> None:
    tokens = torch.tensor([bpe_model.tokenizer.encode("the old stone bridge")])
    _, state = bpe_model.forward(tokens[:, :-1])
    options = {"max_tokens": 8, "temperature": 0}
    whole = "".join(bpe_model.generate("the old stone bridge", state=bpe_model.zero_state(), **options))
    assert whole
    assert "".join(bpe_model.generate(tokens[0, -1:].tolist(), state=state, **options)) == whole
    hidden, state = bpe_model.forward(tokens, logits="none")
    assert "".join(bpe_model.generate(state=state, last_hidden=hidden[0, -1], **options)) == whole


# ---- loading ----


def test_dimensions_come_from_the_shapes(tmp_path: Path) -> None:
    made = official_weights(n_layer=3, n_embd=128, vocab_size=300, d_ffn=320)
    model = load(save(made, tmp_path / "a.pth"), tokenizer="bytes", device="cpu")
    ranks = tuple((name, RANKS[name]) for name in "wagv")
    assert model.config == Config(
        "7", n_layer=3, n_embd=128, n_head=2, head_size=64, d_ffn=320, vocab_size=300, low_ranks=ranks
    )
    assert load(save(official_weights(n_layer=1), tmp_path / "b.pth")).config.n_layer == 1


def test_tensors_are_copies_for_computing(bytes_model: Model) -> None:
    for tensor in [*bytes_model.outer.values(), *(z for block in bytes_model.blocks for z in block.values())]:
        held = tensor.panels if isinstance(tensor, Weight) else tensor
        assert held.is_contiguous() and held.data_ptr() % 64 == 0
        assert not held.requires_grad


def test_containers_and_unused_tensors_make_no_difference(weights: dict[str, Tensor], tmp_path: Path) -> None:
    paths = [save(weights, tmp_path / "a.pth"), save(weights, tmp_path / "a.safetensors")]
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    shutil.copy(paths[0], tmp_path / "pth in disguise.safetensors")
    shapes = {"v0": (1, 1, 64), "v1": (64, 12), "v2": (12, 64)}  # as the training code saves them, and nothing reads
    unused = {f"blocks.0.att.{name}": torch.full(shape, 9.0) for name, shape in shapes.items()}
    save(dict(reversed((weights | unused).items())), tmp_path / "trained.pth")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}, tmp_path / "parameters.pth")
    flat = {name: tensor.squeeze((0, 1)) if tensor.ndim == 3 else tensor for name, tensor in weights.items()}
    save(flat, tmp_path / "flat.safetensors")
    names = ["old.pth", "pth in disguise.safetensors", "trained.pth", "parameters.pth", "flat.safetensors"]
    models = [load(path, device="cpu") for path in [*paths, *(tmp_path / name for name in names)]]
    expected, _ = models[0].forward(tokens_of(1, 20))
    for model in models:
        assert model.fingerprint == models[0].fingerprint
        assert torch.equal(model.forward(tokens_of(1, 20))[0], expected)


def test_the_shipped_model_is_the_default() -> None:
    model = load(device="cpu")
    assert Path(model.path).is_file()
    assert model.path.endswith("rwkv_stream/shipped/model.safetensors")
    assert (model.tokenizer.kind, model.start_token) == ("bpe", 0)
    assert model.config.vocab_size == model.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "beside", "given", "expected"),
    [
        (256, None, None, "bytes"),
        (384, 384, None, "bpe"),
        (300, None, "bytes", "bytes"),
        (384, 384, "bytes", "bytes"),
        (400, None, "tokenizer of 384", "bpe"),
        (300, None, None, "vocabulary of 300.*--tokenizer"),
        (300, 384, None, "at most 300 tokens, found 384"),
        (256, None, "world", "at most 256 tokens, found 65536 in 'world'"),
        (256, None, "no such file", "no such file"),
    ],
)
def test_the_tokenizer_is_found(
    tmp_path: Path, vocab_size: int, beside: int | None, given: str | None, expected: str
) -> None:
    path = save(official_weights(n_layer=1, vocab_size=vocab_size), tmp_path / "model.pth")
    if beside is not None:
        save_own_tokenizer(tmp_path / "tokenizer.json", beside)
    if given == "tokenizer of 384":
        given = str(save_own_tokenizer(tmp_path / "given.json", 384))
    if len(expected) > 5:
        with pytest.raises(TokenizerError, match=expected):
            load(path, tokenizer=given)
    else:
        assert load(path, tokenizer=given).tokenizer.kind == expected


def test_the_world_tokenizer_belongs_to_its_vocabulary(tmp_path: Path) -> None:
    made = official_weights(n_layer=1, vocab_size=65_536)
    model = load(save(made, tmp_path / "model.pth", torch.bfloat16), device="cpu")
    assert (model.tokenizer.kind, model.start_token) == ("world", 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "fp8"}, UsageError, "expected dtype auto, fp32, bf16, fp16, found 'fp8'"),
        ({"device": "tpu"}, UsageError, "expected auto, cpu, cuda or cuda:i, found 'tpu'"),
        ({"threads": 0}, UsageError, "1 thread or more"),
        ({"colour": "red"}, UsageError, "expected options path, device, .* found colour"),
        ({"backend": "abacus"}, UsageError, "expected backend auto, reference, cpu, triton, found 'abacus'"),
    ],
)
def test_bad_options(bytes_model_path: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    for given in (bytes_model_path, Loading(bytes_model_path)):
        with pytest.raises(error, match=message):
            load(given, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(bytes_model_path: Path) -> None:
    assert load(bytes_model_path).device == torch.device("cpu")
    with pytest.raises(BackendError, match=r"expected a CUDA GPU, found none.*--device cpu"):
        load(bytes_model_path, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(known: Known) -> None:
    with pytest.raises(BackendError, match=r"expected cuda:0 to cuda:"):
        load(known.path, device="cuda:4000")
    assert load(known.path).dtype == torch.bfloat16
    model = load(known.path, device="cuda", dtype="fp32")
    logits, state = model.forward(known.tokens[None], logits="all")
    assert {tensor.device.type for tensor in (logits, *state.values())} == {"cuda"}
    assert largest(logits[0].cpu(), known.logits) <= LOGIT_LIMIT
    for name, expected in known.state.items():
        assert largest(state[name][0].cpu(), expected) <= STATE_LIMIT, name


def test_threads_are_set_and_told(bytes_model_path: Path) -> None:
    model = load(bytes_model_path, device="cpu", threads=2)
    assert torch.get_num_threads() == model.numerics(64)["threads"] == 2


def test_numerics_tell_what_differs(bytes_model_path: Path) -> None:
    one = load(bytes_model_path, device="cpu", backend="reference")
    two = load(bytes_model_path, device="cpu", backend="reference", dtype="bf16")
    assert one.numerics(64) == load(bytes_model_path, device="cpu", backend="reference").numerics(64)
    assert {k for k, v in one.numerics(64).items() if two.numerics(64)[k] != v} == {"dtype"}
    assert {k for k, v in one.numerics(64).items() if one.numerics(32)[k] != v} == {"chunk"}
    assert all(type(value) in (str, int) for value in one.numerics(64).values())


def test_fp16_refuses_weights_that_do_not_fit(weights: dict[str, Tensor], tmp_path: Path) -> None:
    weights["blocks.1.ffn.value.weight"][3, 4] = 1e5
    path = save(weights, tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"'blocks.1.ffn.value.weight'; pass --dtype bf16"):
        load(path, dtype="fp16")
    assert load(path, dtype="bf16").dtype == torch.bfloat16


# ---- bad files ----


class Code:
    """Unpickling this makes a file, if it is allowed to."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle 2", "pickle 5"])
def test_code_in_a_checkpoint_is_not_run(weights: dict[str, Tensor], tmp_path: Path, form: str, suffix: str) -> None:
    path, canary = tmp_path / f"model{suffix}", tmp_path / "canary"
    held = weights | {"blocks.0.att.note": Code(canary)}
    with path.open("wb") as file:
        if form.startswith("pickle"):
            pickle.dump(held, file, protocol=int(form[-1]))
        else:
            torch.save(held, file, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match=r"model\..*pickled code.*refuses to run code") as caught:
            load(path)
    assert not canary.exists()
    assert caught.value.exit_code == 1
    if form == "zip":
        torch.load(_renamed(path), weights_only=False)
        assert canary.exists(), "the file does hold code"


def _renamed(path: Path) -> Path:
    return path.rename(path.with_name("elsewhere.pt"))


def changed(
    change: Callable[[dict[str, Tensor]], object], dtype: torch.dtype = torch.float32
) -> Callable[[Path], object]:
    """A file of the weights after `change`."""

    def make(path: Path) -> None:
        weights = official_weights()
        change(weights)
        save(weights, path, dtype)

    return make


def cut(n_bytes: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        data = save(official_weights(), path).read_bytes()
        path.write_bytes(data[:n_bytes])

    return make


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": (".pth", lambda path: None, "no such file or directory"),
    "folder": (".pth", lambda path: path.mkdir(), "is a directory"),
    "empty": (".pth", lambda path: path.touch(), "another kind of file"),
    "text": (".pth", lambda path: path.write_text("this is not a model"), "another kind of file"),
    "pth cut near its end": (".pth", cut(-10), "damaged"),
    "pth cut in the middle": (".pth", cut(100_000), "damaged"),
    "pth cut at its start": (".pth", cut(20), "damaged"),
    "safetensors cut near its end": (".safetensors", cut(-10), "damaged"),
    "safetensors cut in its header": (".safetensors", cut(100), "damaged"),
    "a list": (".pth", lambda path: torch.save([torch.zeros(3)], path), "a dict of tensors by name, found list"),
    "a training run": (
        ".pth",
        lambda path: torch.save({"step": 3, "model": official_weights()}, path),
        r"found int under 'step'.*state_dict\(\)",
    ),
    "integers": (
        ".pth",
        changed(lambda w: None, torch.int8),
        "fp32, bf16, fp16, found '.*' in int8",
    ),
    "stretched": (
        ".pth",
        lambda path: torch.save(official_weights() | {"head.weight": torch.zeros(1, 64).expand(10**9, 64)}, path),
        "expected tensors of at most",
    ),
    "converted for ChatRWKV": (
        ".pth",
        lambda path: torch.save(official_weights() | {"_strategy": "cpu fp32", "_version": 0.7}, path),
        "converted for ChatRWKV",
    ),
    "other names": (".pth", lambda path: torch.save({"wte.weight": torch.zeros(4, 4)}, path), "'wte.weight'.*RWKV"),
    "nothing": (".pth", lambda path: torch.save({}, path), "nothing.*RWKV"),
    "missing tensor": (".pth", changed(lambda w: w.pop("blocks.1.att.g2")), "found 'blocks.1.att.g2' missing"),
    "missing head": (".safetensors", changed(lambda w: w.pop("head.weight")), "'head.weight' missing"),
    "missing embedding": (".pth", changed(lambda w: w.pop("emb.weight")), "'emb.weight'"),
    "missing block": (
        ".pth",
        changed(lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.0.") and "att.r_k" not in name]),
        "blocks.0",
    ),
    "block far away": (
        ".pth",
        changed(lambda w: w.update({"blocks.99999.att.k_k": torch.zeros(64)})),
        "blocks 0 to 99999, found 3 of them",
    ),
    "unexpected tensor": (
        ".pth",
        changed(lambda w: w.update({"blocks.1.att.time_state": torch.zeros(1, 64, 64)})),
        "found 'blocks.1.att.time_state' besides",
    ),
    "another shape": (
        ".pth",
        changed(lambda w: w.update({"blocks.1.ffn.value.weight": torch.zeros(64, 100)})),
        r"'blocks.1.ffn.value.weight' as \[64, 192\], found \[64, 100\]",
    ),
    "heads that do not fit": (
        ".pth",
        changed(lambda w: w.update({"blocks.0.att.r_k": torch.zeros(3, 64)})),
        "3 heads of 64.*found width 64",
    ),
    "r_k flattened": (
        ".pth",
        changed(lambda w: w.update({"blocks.0.att.r_k": torch.zeros(64)})),
        r"'blocks.0.att.r_k' as \[H, N\], found \[64\]",
    ),
    "no vocabulary": (".pth", changed(lambda w: w.update({"emb.weight": torch.zeros(0, 64)})), r"found \[0, 64\]"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, kind: str) -> None:
    suffix, make, message = BAD_FILES[kind]
    path = tmp_path / f"model{suffix}"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


# ---- fingerprint ----


def test_the_fingerprint_is_what_it_says(weights: dict[str, Tensor], tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = weights[name].numpy()
        array = array.reshape(-1) if array.shape[:2] == (1, 1) else array
        digest.update(f"{name} fp32 {list(array.shape)}\n".encode() + array.astype("<f4").tobytes())
    expected = hashlib.sha256(f"rwkv-stream model 1\n{digest.hexdigest()}\nbytes\n".encode()).hexdigest()
    assert load(save(weights, tmp_path / "model.pth")).fingerprint == expected


def test_the_dtype_of_loading_is_not_in_the_fingerprint(bytes_model_path: Path) -> None:
    assert len({load(bytes_model_path, device="cpu", dtype=dtype).fingerprint for dtype in ("fp32", "bf16")}) == 1


def test_the_stored_dtype_is_in_the_fingerprint(weights: dict[str, Tensor], tmp_path: Path) -> None:
    exact = {name: tensor.bfloat16() for name, tensor in weights.items()}  # the same values in both files
    half, full = save(exact, tmp_path / "a.pth", torch.bfloat16), save(exact, tmp_path / "b.pth")
    assert load(half).fingerprint != load(full).fingerprint
    assert load(half).fingerprint == load(save(exact, tmp_path / "c.safetensors", torch.bfloat16)).fingerprint


@pytest.mark.parametrize("name", official_weights())
def test_any_changed_tensor_changes_the_fingerprint(weights: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    before = load(save(weights, tmp_path / "a.pth")).fingerprint
    weights[name].view(-1)[-1] += 0.5
    assert load(save(weights, tmp_path / "b.pth")).fingerprint != before


def test_the_tokenizer_is_in_the_fingerprint(bpe_model_path: Path) -> None:
    assert load(bpe_model_path).fingerprint != load(bpe_model_path, tokenizer="bytes").fingerprint


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and the file in it that the first load makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv-stream" / "fingerprints.json"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever tensors are hashed."""
    calls: list[int] = []
    digest = checkpoint.tensors_digest
    monkeypatch.setattr(checkpoint, "tensors_digest", lambda tensors: calls.append(len(tensors)) or digest(tensors))
    return calls


def aged(path: Path, seconds: int = 100) -> Path:
    stamp = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(stamp, stamp))
    return path


def test_the_fingerprint_is_remembered(
    weights: dict[str, Tensor], tmp_path: Path, cache: Path, hashed: list[int]
) -> None:
    path = aged(save(weights, tmp_path / "model.pth"))
    first = load(path).fingerprint
    assert cache.is_file()
    assert (load(path).fingerprint, len(hashed)) == (first, 1)
    assert load(path, tokenizer="bytes").fingerprint == first
    weights["head.weight"][0, 0] += 1
    aged(save(weights, path), seconds=50)
    assert load(path).fingerprint != first
    assert len(hashed) == 2


def test_a_file_that_has_just_changed_is_not_remembered(
    weights: dict[str, Tensor], tmp_path: Path, cache: Path, hashed: list[int]
) -> None:
    path = save(weights, tmp_path / "model.pth")
    load(path)
    load(path)
    assert len(hashed) == 2
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"PATH": 3}', b'{"PATH": [[1, 2, 3], "ab"]}'])
def test_a_damaged_cache_is_made_again(
    weights: dict[str, Tensor], tmp_path: Path, cache: Path, hashed: list[int], damage: bytes
) -> None:
    path = aged(save(weights, tmp_path / "model.pth"))
    expected = load(path).fingerprint
    cache.write_bytes(damage.replace(b"PATH", str(path).encode()))
    assert [load(path).fingerprint, load(path).fingerprint] == [expected, expected]
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    weights: dict[str, Tensor], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(save(weights, tmp_path / "model.pth"))
    cache.parents[1].write_text("a file where the folder should be")
    first = load(path).fingerprint
    cache.parents[1].unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fingerprints, "publish", full)
    assert load(path).fingerprint == first
    assert fingerprints.publish is not files.publish


def test_a_file_that_changes_while_it_is_read(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(weights, tmp_path / "model.pth")
    digest = checkpoint.tensors_digest
    monkeypatch.setattr(checkpoint, "tensors_digest", lambda tensors: (digest(tensors), aged(path))[0])
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        load(path)


def test_safetensors_written_elsewhere_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"format": "pt", "made by": "somebody"})
    assert load(path).fingerprint == load(save(weights, tmp_path / "model.pth")).fingerprint
