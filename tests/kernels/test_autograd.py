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


def segments(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where they begin, and that each starts from its own row of the state and leaves it there."""
    rows = torch.arange(len(lengths))
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)), rows, rows


def plain_time_mix(
    projections: Sequence[Tensor], vectors: Sequence[Tensor], state: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out, new_state = torch.zeros_like(projections[0]), torch.zeros_like(state)
    reference.time_mix(projections, vectors, EPS, state, *segments(lengths), out, new_state)
    return out, new_state


def plain_norm_shift_mix(
    x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, x_prev: Tensor, lengths: Sequence[int]
) -> Tensor:
    out, last = x.new_zeros(len(mix), *x.shape), torch.zeros_like(x_prev)
    reference.norm_shift_mix(x, weight, bias, mix, (), x_prev, *segments(lengths), out, last)
    return out


def time_mix_inputs(
    lengths: Sequence[int], H: int, N: int, dtype: torch.dtype, *, is_first: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Projections, vectors, and the state before each segment, which is zero for the first."""
    projections = [random(sum(lengths), H * N, seed=i, dtype=dtype) for i in range(6 if is_first else 8)]
    state = random(len(lengths), H, N, N, seed=40)
    state[0] = 0
    return projections, [random(H * N, seed=20 + i) for i in range(8)], state


@pytest.mark.parametrize("is_first", [True, False], ids=["first layer", "other layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "N"),
    [((1,), 64), ((16, 1), 64), ((1, 37, 16, 15), 64), ((33, 2, 31), 32), ((20, 17), 16), ((5, 20), 8), ((20, 20), 4)],
    ids=str,
)
def test_time_mix(lengths: tuple[int, ...], N: int, dtype: torch.dtype, is_first: bool) -> None:
    S, H, n_tokens = len(lengths), 2, sum(lengths)
    projections, vectors, state = time_mix_inputs(lengths, H, N, dtype, is_first=is_first)
    d_out, d_state = random(n_tokens, H * N, seed=50, dtype=dtype), random(S, H, N, N, seed=51)

    exact = [z.double().requires_grad_() for z in (*projections, *vectors, state)]
    n = len(projections)
    wanted = plain_time_mix(exact[:n], exact[n:-1], exact[-1], lengths)
    wanted_d = torch.autograd.grad(wanted, exact, (d_out.double(), d_state.double()), allow_unused=True)

    leaves = [z.clone().requires_grad_() for z in (*projections, *vectors, state)]
    out, new_state = autograd.time_mix(leaves[:n], leaves[n:-1], EPS, leaves[-1], segments(lengths)[0])
    found_d = torch.autograd.grad((out, new_state), leaves, (d_out, d_state))
    assert out.dtype == dtype and off(out, wanted[0]) < LIMITS[dtype]
    assert off(new_state, wanted[1]) < 3e-6
    for i, (found, expected) in enumerate(zip(found_d, wanted_d, strict=True)):
        if expected is None:
            assert is_first and i == n + 2 and not found.any(), "v0 is not read there"
        else:
            assert off(found, expected) < (LIMITS[dtype] if i < n else 3e-6), i


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "C", "M"),
    [((1,), 64, 6), ((64, 64), 64, 1), ((65, 1, 130), 96, 6), ((2, 130, 63, 1), 20, 2), ((3, 1), 7, 1)],
    ids=str,
)
def test_norm_shift_mix(lengths: tuple[int, ...], C: int, M: int, dtype: torch.dtype) -> None:
    S, n = len(lengths), sum(lengths)
    tensors = [random(*shape, seed=i) for i, shape in enumerate([(n, C), (C,), (C,), (M, C), (S, C)])]
    d_out = random(M, n, C, seed=9, dtype=dtype)
    exact = [z.double().requires_grad_() for z in tensors]
    wanted = plain_norm_shift_mix(*exact, lengths)
    wanted_d = torch.autograd.grad(wanted, exact, d_out.double())
    x, weight, bias, mix, x_prev = leaves = [z.clone().requires_grad_() for z in tensors]
    offsets = segments(lengths)[0]
    out, last = autograd.norm_shift_mix(x, (weight, bias), mix, x_prev, offsets, dtype)
    assert off(torch.stack(out), wanted) < LIMITS[dtype]
    assert off(last, F.layer_norm(exact[0][offsets[1:] - 1], (C,), *exact[1:3], 1e-5)) < 3e-6
    for name, found, expected in zip(
        ("x", "weight", "bias", "mix", "x_prev"), torch.autograd.grad(out, leaves, tuple(d_out)), wanted_d, strict=True
    ):
        assert off(found, expected) < 3e-6, name


@pytest.mark.parametrize("is_first", [True, False])
def test_gradcheck_of_the_plain_forms(is_first: bool) -> None:
    projections, vectors, state = time_mix_inputs((1, 2), 2, 4, torch.float64, is_first=is_first)
    used = [z.double().requires_grad_() for i, z in enumerate(vectors) if not (is_first and i == 2)]

    def time_mix(*z: Tensor) -> tuple[Tensor, Tensor]:
        n = len(projections)
        given = list(z[n:-1])
        if is_first:
            given.insert(2, torch.zeros_like(given[0]))
        return plain_time_mix(z[:n], given, z[-1], (1, 2))

    leaves = [z.requires_grad_() for z in projections]
    assert torch.autograd.gradcheck(time_mix, (*leaves, *used, state.double().requires_grad_()))
    shapes = [(3, 5), (5,), (5,), (2, 5), (2, 5)]
    tensors = [random(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *z: plain_norm_shift_mix(*z, (1, 2)), tensors)


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
    lengths = (70, 3, 130)
    projections, vectors, state = time_mix_inputs(lengths, 2, 32, torch.bfloat16, is_first=False)
    x, mix, x_prev = random(sum(lengths), 64, seed=3), random(6, 64, seed=4), random(3, 64, seed=5)
    offsets = segments(lengths)[0]

    def everything() -> list[Tensor]:
        leaves = [z.clone().requires_grad_() for z in (*projections, *vectors, state, x, mix)]
        out, new_state = autograd.time_mix(leaves[:8], leaves[8:16], EPS, leaves[16], offsets)
        norm = vectors[0], vectors[1]
        mixed, _ = autograd.norm_shift_mix(leaves[17], norm, leaves[18], x_prev, offsets, torch.bfloat16)
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
    lengths = (19, 1, 70)
    projections, vectors, state = time_mix_inputs(lengths, 3, N, torch.float32, is_first=False)
    offsets = segments(lengths)[0]
    leaves = [z.requires_grad_() for z in (*projections, *vectors, state)]
    outputs = autograd.time_mix(leaves[:8], leaves[8:16], EPS, leaves[16], offsets)
    found = torch.autograd.grad(outputs, leaves, [torch.ones(z.shape) for z in outputs])
    x = random(sum(lengths), N, seed=1).requires_grad_()
    norm = vectors[0][:N], vectors[1][:N]
    mixed, last = autograd.norm_shift_mix(x, norm, x[:2], random(3, N, seed=2), offsets, x.dtype)
    found += torch.autograd.grad(mixed, x, [torch.ones(z.shape) for z in mixed])
    assert torch.isfinite(last).all()
    assert all(torch.isfinite(z).all() for z in (*outputs, *found))
    assert len(bands) > 15
    for whole, count in bands:
        assert whole[:guard].isnan().all() and whole[guard + count :].isnan().all()


def test_the_library_keeps_as_many_states_as_it_says() -> None:
    assert [native.library().wkv7_kept(T) for T in (1, 16, 17, 512)] == [1, 1, 2, 32]
    assert [native.library().time_mix_kept(n, S) for n, S in ((1, 1), (16, 1), (512, 3))] == [1, 2, 35]
