"""The kernels of training (`kernels.layers.autograd`): values and gradients against plain torch in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import available, native
from rwkv_stream.kernels.layers import autograd, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(available()["cpu"] is not None, reason=f"no C++ kernels: {available()['cpu']}"),
]

EPS = 64e-5
DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 4e-3}  # a rounding to bf16 is 2^-9 at most


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-30))


def segments(B: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(0, B * T + 1, T), torch.arange(B), torch.arange(B)


def plain_time_mix(projections: Sequence[Tensor], vectors: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    B, T, C = projections[0].shape
    out, new_state = state.new_zeros(B * T, C), torch.zeros_like(state)
    flat = [z.reshape(-1, C) for z in projections]
    reference.time_mix(flat, vectors, EPS, state, *segments(B, T), out, new_state)
    return out.view(B, T, C), new_state


def plain_norm_shift_mix(x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, x_prev: Tensor) -> Tensor:
    B, T, C = x.shape
    out, last = x.new_zeros(len(mix), B * T, C), torch.zeros_like(x_prev)
    reference.norm_shift_mix(x.reshape(-1, C), weight, bias, mix, (), x_prev, *segments(B, T), out, last)
    return out.view(len(mix), B, T, C)


def time_mix_inputs(
    B: int, T: int, H: int, N: int, dtype: torch.dtype, *, is_first: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    projections = [random(B, T, H * N, seed=i, dtype=dtype) for i in range(6 if is_first else 8)]
    return projections, [random(H * N, seed=20 + i) for i in range(8)], random(B, H, N, N, seed=40)


@pytest.mark.parametrize("is_first", [True, False], ids=["first layer", "other layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 64), (16, 64), (37, 64), (33, 32), (20, 16), (20, 8), (20, 4), (17, 5)])
def test_time_mix(T: int, N: int, dtype: torch.dtype, is_first: bool) -> None:
    B, H = 2, 2
    projections, vectors, state = time_mix_inputs(B, T, H, N, dtype, is_first=is_first)
    d_out, d_state = random(B, T, H * N, seed=50, dtype=dtype), random(B, H, N, N, seed=51)

    exact = [z.double().requires_grad_() for z in (*projections, *vectors, state)]
    n = len(projections)
    wanted = plain_time_mix(exact[:n], exact[n:-1], exact[-1])
    wanted_d = torch.autograd.grad(wanted, exact, (d_out.double(), d_state.double()), allow_unused=True)

    leaves = [z.clone().requires_grad_() for z in (*projections, *vectors, state)]
    out, new_state = autograd.time_mix(leaves[:n], leaves[n:-1], EPS, leaves[-1])
    found_d = torch.autograd.grad((out, new_state), leaves, (d_out, d_state))
    assert out.dtype == dtype and off(out, wanted[0]) < LIMITS[dtype]
    assert off(new_state, wanted[1]) < 3e-6
    for i, (found, expected) in enumerate(zip(found_d, wanted_d, strict=True)):
        if expected is None:
            assert is_first and i == n + 2 and not found.any(), "v0 is not read there"
        else:
            assert off(found, expected) < (LIMITS[dtype] if i < n else 3e-6), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "C", "M"), [(1, 64, 6), (64, 64, 1), (65, 96, 6), (130, 20, 2), (3, 7, 1)])
def test_norm_shift_mix(T: int, C: int, M: int, dtype: torch.dtype) -> None:
    B = 2
    tensors = [random(*shape, seed=i) for i, shape in enumerate([(B, T, C), (C,), (C,), (M, C), (B, C)])]
    d_out = random(M, B, T, C, seed=9, dtype=dtype)
    exact = [z.double().requires_grad_() for z in tensors]
    wanted = plain_norm_shift_mix(*exact)
    wanted_d = torch.autograd.grad(wanted, exact, d_out.double())
    x, weight, bias, mix, x_prev = leaves = [z.clone().requires_grad_() for z in tensors]
    last = torch.full((B, C), torch.nan)
    out = autograd.norm_shift_mix(x, (weight, bias), mix, x_prev, last, dtype)
    assert off(torch.stack(out), wanted) < LIMITS[dtype]
    assert off(last, F.layer_norm(exact[0][:, -1], (C,), *exact[1:3], 1e-5)) < 3e-6
    for name, found, expected in zip(
        ("x", "weight", "bias", "mix", "x_prev"), torch.autograd.grad(out, leaves, tuple(d_out)), wanted_d, strict=True
    ):
        assert off(found, expected) < 3e-6, name


@pytest.mark.parametrize("is_first", [True, False])
def test_gradcheck_of_the_plain_forms(is_first: bool) -> None:
    projections, vectors, state = time_mix_inputs(1, 3, 2, 4, torch.float64, is_first=is_first)
    used = [z.double().requires_grad_() for i, z in enumerate(vectors) if not (is_first and i == 2)]

    def time_mix(*z: Tensor) -> tuple[Tensor, Tensor]:
        n = len(projections)
        given = list(z[n:-1])
        if is_first:
            given.insert(2, torch.zeros_like(given[0]))
        return plain_time_mix(z[:n], given, z[-1])

    leaves = [z.requires_grad_() for z in projections]
    assert torch.autograd.gradcheck(time_mix, (*leaves, *used, state.double().requires_grad_()))
    shapes = [(1, 3, 5), (5,), (5,), (2, 5), (1, 5)]
    tensors = [random(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(plain_norm_shift_mix, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 77), (300, 129)])
def test_relu2(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, d = random(*shape, seed=0, dtype=dtype).requires_grad_(), random(*shape, seed=1, dtype=dtype)
    exact = z.detach().double().requires_grad_()
    wanted = torch.relu(exact) ** 2
    y = autograd.relu2(z)
    assert off(y, wanted) < LIMITS[dtype]
    (found,), (expected,) = torch.autograd.grad(y, z, d), torch.autograd.grad(wanted, exact, d.double())
    assert off(found, expected) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 5, 256, 1003])
def test_softmax_gradient(V: int, dtype: torch.dtype) -> None:
    logits, targets = 20 * random(7, V, seed=0, dtype=dtype), torch.arange(7) % V
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact, targets, reduction="none")
    (expected,) = torch.autograd.grad(wanted.sum() * 0.25, exact)
    losses = autograd.softmax_gradient_(logits, targets, 0.25)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-3)


def test_threads_do_not_change_a_bit() -> None:
    projections, vectors, state = time_mix_inputs(3, 70, 2, 32, torch.bfloat16, is_first=False)
    x, mix = random(3, 70, 64, seed=3), random(6, 64, seed=4)

    def everything() -> list[Tensor]:
        leaves = [z.clone().requires_grad_() for z in (*projections, *vectors, state, x, mix)]
        out, new_state = autograd.time_mix(leaves[:8], leaves[8:16], EPS, leaves[16])
        mixed = autograd.norm_shift_mix(
            leaves[17], (vectors[0], vectors[1]), leaves[18], x[:, 0], torch.empty(3, 64), torch.bfloat16
        )
        outputs = [out, new_state, *mixed]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(z) for z in outputs])]

    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(one, everything(), strict=True))


@pytest.mark.parametrize("N", [64, 5])
def test_nothing_is_written_beside_the_outputs(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the kernels are given to write, scratch too, begins as NaN between guard bands."""
    guard, bands = 64, []

    def banded(make: str) -> None:
        plain = getattr(Tensor, make)

        def new(self: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
            sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            count = torch.Size(sizes).numel()
            whole = plain(self, count + 2 * guard, dtype=dtype or self.dtype).fill_(torch.nan)
            bands.append((whole, count))
            return whole[guard : guard + count].view(sizes)

        monkeypatch.setattr(Tensor, make, new)

    banded("new_empty")
    monkeypatch.setattr(torch, "empty_like", lambda z: z.new_empty(*z.shape))
    projections, vectors, state = time_mix_inputs(2, 19, 3, N, torch.float32, is_first=False)
    leaves = [z.requires_grad_() for z in (*projections, *vectors, state)]
    outputs = autograd.time_mix(leaves[:8], leaves[8:16], EPS, leaves[16])
    found = torch.autograd.grad(outputs, leaves, [torch.ones(z.shape) for z in outputs])
    x = random(2, 70, N, seed=1).requires_grad_()
    mixed = autograd.norm_shift_mix(x, (vectors[0][:N], vectors[1][:N]), x[0, :2], x[:, 0], x.new_empty(2, N), x.dtype)
    found += torch.autograd.grad(mixed, x, [torch.ones(z.shape) for z in mixed])
    assert all(torch.isfinite(z).all() for z in (*outputs, *found))
    assert len(bands) > 15
    for whole, count in bands:
        assert whole[:guard].isnan().all() and whole[guard + count :].isnan().all()


def test_the_library_keeps_as_many_states_as_it_says() -> None:
    assert [native.library().wkv7_kept(T) for T in (1, 16, 17, 512)] == [1, 1, 2, 32]
