"""The Triton kernels, run by Triton's interpreter: against float64, and whole models against the CPU kernels.

Run in a process of its own by `tests/kernels/test_triton.py`: the interpreter is to be asked for before the import.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/kernels/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")

# ruff: noqa: E402
from test_recurrences import Given, alone, before_anything, comparable, error, given, gradients, same
from tiny_models import official_weights, save

from rwkv_stream import kernels
from rwkv_stream.kernels.recurrence import reference
from rwkv_stream.kernels.recurrence import triton as recurrence
from rwkv_stream.model import load
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.training.lanes import Batch
from rwkv_stream.training.loss import Network
from rwkv_stream.training.tuned import Whole

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECAY = {"4": 0, "6": 1, "7": 1}  # which input is the log-decay, which stays fp32

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def in_dtype(version: str, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(z if i == DECAY[version] else z.to(dtype) for i, z in enumerate(inputs))


def one_by_one(
    version: str, arguments: Given, states: tuple[Tensor, ...], lengths: list[int], start: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Each segment through the sequential form in `dtype` (state and decays in fp32 or better)."""
    ys, news = [], []
    form = reference.FORMS[kernels.KERNELS[version]][0]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for i, part in enumerate(zip(*(z[0].split(lengths) for z in arguments.inputs), strict=True)):
        inputs = tuple(z[None].to(dtype).to(state_dtype) for z in part)
        own = tuple(z[start[i]][None].to(state_dtype) for z in states)
        y, *new = form(*inputs, *(z.to(state_dtype) for z in arguments.constants), *own)
        ys.append(y[0].to(dtype))
        news.append(tuple(new))
    return torch.cat(ys), [torch.cat(parts) for parts in zip(*news, strict=True)]


# The dtype enters in conversions, the size in masks.
@pytest.mark.parametrize(("H", "N", "dtype"), [(1, 64, "fp32"), (1, 64, "bf16"), (2, 5, "fp32"), (2, 5, "fp16")])
@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_segments_of_any_length(version: str, H: int, N: int, dtype: str) -> None:
    """Mixed lengths and starting states; fp32 within 3e-6, 16 bits within twice what the rounded inputs make, and a
    rounding of each product."""
    arguments = given(version, sum(LENGTHS), B=1, H=H, N=N)
    states = given(version, 1, B=3, H=H, N=N, seed=1).state
    offsets, start = torch.tensor([0, *LENGTHS]).cumsum(0), torch.arange(len(LENGTHS)) * 2 % 3
    keep = torch.tensor([8, 0, 4])
    inputs = in_dtype(version, tuple(z[0] for z in arguments.inputs), DTYPES[dtype])
    copies = [z.clone() for z in (*inputs, *states)]
    y, new = recurrence.SEGMENTS[int(version)](inputs, arguments.constants, states, offsets, start, keep)
    assert same((*inputs, *states), tuple(copies)), "an input was written to"
    assert y.dtype == DTYPES[dtype] and all(part.dtype == torch.float32 for part in new)
    wanted_y, wanted = one_by_one(version, arguments, states, LENGTHS, start, torch.float64)
    found_state = comparable(version, new)
    wanted_state = comparable(version, tuple(part[keep] for part in wanted))
    if dtype == "fp32":
        limit_y = limit_state = 3e-6
    else:
        rounded_y, rounded = one_by_one(version, arguments, states, LENGTHS, start, DTYPES[dtype])
        unit = torch.finfo(DTYPES[dtype]).eps
        limit_y = 2 * error(rounded_y.float(), wanted_y) + unit
        rounded_state = comparable(version, tuple(part[keep] for part in rounded))
        limit_state = 2 * max(map(error, rounded_state, wanted_state)) + unit
    assert error(y.float(), wanted_y) <= limit_y
    assert max(map(error, found_state, wanted_state)) <= limit_state


@pytest.mark.parametrize("decay", [0.0, -1e-6, -0.6065, -30.8, -87.5, -1e6, -float("inf")])
@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_decays_of_any_strength(version: str, decay: float) -> None:
    if version == "7" and decay < -0.6066:
        pytest.skip("RWKV-7 has no such decays")
    arguments = given(version, 40, B=1, H=1, N=16, decay=decay)
    if decay < -30:
        arguments.inputs[DECAY[version]][:, 1::3] = -0.01
    y, new = recurrence.rows(int(version), *arguments)
    wanted, *_ = reference.FORMS[int(version)][0](*(z.double() for part in arguments for z in part))
    assert error(y, wanted) < 1e-5
    assert all(torch.isfinite(part).all() for part in new)


@pytest.mark.parametrize(
    ("H", "N", "dtype"), [(1, 64, "fp32"), (2, 32, "fp32"), (1, 5, "fp32"), (1, 64, "bf16"), (1, 64, "fp16")]
)
def test_gradients(H: int, N: int, dtype: str) -> None:
    """Those of segments against float64 autograd of the sequential form: the limits of
    `test_segments_of_any_length`."""
    size = {"H": H, "N": N, "dtype": DTYPES[dtype]}
    found = gradients("7", kernels.resolve("7", "triton", "cpu")[1].segments, [1, 17, 33], **size)
    one_by_one = functools.partial(alone, "7")
    wanted = gradients("7", one_by_one, [1, 17, 33], H=H, N=N, precision=torch.float64)
    plain = gradients("7", one_by_one, [1, 17, 33], precision=torch.float32, **size)
    unit = 3e-6 if dtype == "fp32" else torch.finfo(DTYPES[dtype]).eps
    for name, one, other, exact in zip(("r", "w", "k", "v", "a", "b", "state"), found, plain, wanted, strict=True):
        assert one.dtype == (DTYPES[dtype] if name in "rkvab" else torch.float32)
        assert error(one.float(), exact) <= 2 * error(other, exact) + unit, name


@pytest.mark.parametrize("decay", [0.0, -0.6065])
def test_gradients_of_decays_of_any_strength(decay: float) -> None:
    leaves = [z.requires_grad_() for part in given("7", 40, B=1, H=1, N=16, decay=decay) for z in part]
    y, (new,) = recurrence.rows(7, tuple(leaves[:6]), (), (leaves[6],))
    found = torch.autograd.grad(y.sum() + new.sum(), leaves)
    exact = [z.detach().double().requires_grad_() for z in leaves]
    y, new = reference.wkv7_recurrent(*exact)
    for one, other in zip(found, torch.autograd.grad(y.sum() + new.sum(), exact), strict=True):
        assert error(one, other) < 1e-5


def test_training_through_the_kernels(tmp_path: Path) -> None:
    """The loss of segments and the gradient of each parameter, as through plain torch."""
    file = checkpoint.read(save(official_weights(n_layer=1, head_size=32), tmp_path / "model.pth"))
    tokens = torch.randint(256, (32,), generator=torch.Generator().manual_seed(1))
    lanes = torch.tensor([21, 3, 7]), torch.tensor([2, 0, 1]), torch.tensor([1, 2])
    found = []
    for backend in ("triton", "reference"):
        tuned = Whole(file.config, {name: z.read() for name, z in file.tensors.items()})
        network = Network(tuned, torch.float32, backend)
        loss, state = network.loss(Batch(tokens[:-1], tokens[1:], *lanes), network.start(2))
        torch.autograd.backward(loss)
        found.append({name: z.grad for name, z in tuned.parameters.items()} | {"loss": loss.detach(), **state})
    for name, wanted in found[1].items():
        assert error(found[0][name], wanted) < 1e-4, name


@pytest.mark.parametrize("version", ["4", "6"])
def test_gradients_of_other_versions_are_plain_torch_s(version: str) -> None:
    arguments = given(version, 19, B=1, H=1, N=16)
    arguments.state[0].requires_grad_()
    found, wanted = (
        torch.autograd.grad(kernels.resolve(version, backend, "cpu")[1].rows(*arguments)[0].sum(), arguments.state[0])
        for backend in ("triton", "reference")
    )
    assert torch.equal(*found, *wanted)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_from_the_state_before_anything_in_cuts(version: str) -> None:
    arguments = given(version, 96, H=1, N=16)._replace(state=before_anything(version, H=1, N=16))
    whole, _ = recurrence.rows(int(version), *arguments)
    parts, state = [], arguments.state
    for rows in (slice(0, 48), slice(48, 49), slice(49, 96)):
        y, state = recurrence.rows(int(version), arguments.cut(rows), arguments.constants, state)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 3e-6
    again, _ = recurrence.rows(int(version), *arguments)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_outputs_are_written_in_full_and_nothing_beside_them(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the calls allocate starts as NaN between guard bands."""
    bands: list[Tensor] = []
    guard = 64

    def banded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        bands.append(torch.full((count + 2 * guard,), float("nan"), dtype=dtype))
        return bands[-1][guard : guard + count].view(shape)

    new, like = torch.Tensor.new_empty, torch.empty_like  # the interpreter's own calls name a device
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda z, *shape, **how: new(z, *shape, **how) if how else banded(shape, z.dtype)
    )
    monkeypatch.setattr(torch, "empty_like", lambda z, **how: like(z, **how) if how else banded(z.shape, z.dtype))
    arguments = given(version, 37, H=2, N=5)
    if version == "7":
        [z.requires_grad_() for part in arguments for z in part]
    y, state = recurrence.rows(int(version), *arguments)
    if version == "7":
        (y.sum() + state[0].sum()).backward()
    monkeypatch.undo()
    assert len(bands) >= 3
    assert torch.isfinite(y).all() and all(torch.isfinite(part).all() for part in state)
    assert version != "7" or all(torch.isfinite(z.grad).all() for part in arguments for z in part)
    for band in bands:
        assert band[:guard].isnan().all()
        assert band[-guard:].isnan().all()
    wanted, _ = reference.FORMS[int(version)][0](*(z for part in arguments for z in part))[:2]
    assert error(y.detach(), wanted.detach()) < 3e-6


@pytest.mark.parametrize("version", ["4", "5.0", "6", "7a"])
def test_whole_models(version: str, tmp_path: Path) -> None:
    """Logits and states of a call, of rows of unequal length and of segments, against the plain torch kernels; those
    of RWKV-7, which has more kernels, in `test_rwkv7_triton.py`."""
    weights = official_weights(version=version, n_layer=1 if version[0] in "56" else 2, head_size=32, seed=6)
    path = save(weights, tmp_path / "model.safetensors")
    models = [load(path, device="cpu", backend=backend) for backend in ("triton", "reference")]
    assert [model.backend for model in models] == ["triton", "reference"]
    tokens = torch.randint(256, (2, 45), generator=torch.Generator().manual_seed(1))
    (logits, state), (wanted, wanted_state) = (model.forward(tokens, logits="all") for model in models)
    assert (logits - wanted).abs().max() <= 1e-4
    for name in state:
        assert (state[name] - wanted_state[name]).abs().max() <= 1e-3, name
    lengths = torch.tensor([45, 7])
    (last, _), (wanted, _) = (model.forward(tokens, state, lengths=lengths) for model in models)
    assert (last - wanted).abs().max() <= 1e-4
    (hidden, _), (wanted, _) = (
        model.forward_packed(tokens.flatten(), torch.tensor([1, 33, 56]), state.row(0).repeat(3)) for model in models
    )
    assert (hidden - wanted).abs().max() <= 1e-4
    assert models[0].numerics(64)["kernels"] == f"{kernels.NUMERICS}, triton {triton.__version__}"


def test_only_a_gpu_or_the_interpreter_serves_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    name, recurrence = kernels.resolve("7", "triton", "cpu")
    assert name == "triton" and dataclasses.is_dataclass(recurrence)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(kernels.BackendError, match="computes on a GPU, found device 'cpu'"):
        kernels.resolve("7", "triton", "cpu")
