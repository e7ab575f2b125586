"""The recurrences of RWKV-4 and of RWKV-5 and 6 in all their forms against ones written independently in numpy float64.

What holds for every version (segments, cuts, padding, threads) is shown for RWKV-7, too.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from forms import recurrence
from torch import Tensor

from rwkv_stream import kernels
from rwkv_stream.errors import BackendError
from rwkv_stream.kernels import PADDING, native
from rwkv_stream.kernels.recurrence import reference

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 197)

needs_cpp = pytest.mark.skipif(
    kernels.available()["cpu"] is not None, reason=f"C++ kernels: {kernels.available()['cpu']}"
)
forms = pytest.mark.parametrize("form", ["recurrent", "chunked", pytest.param("cpu", marks=needs_cpp)])
versions = pytest.mark.parametrize("version", ["4", "6"])
all_versions = pytest.mark.parametrize("version", ["4", "6", "7"])


class Given(NamedTuple):
    """Arguments of `Recurrence.rows`."""

    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    state: tuple[Tensor, ...]

    def cut(self, rows: slice) -> tuple[Tensor, ...]:
        return tuple(z[:, rows] for z in self.inputs)


def given(
    version: str, T: int, B: int = 2, H: int = 3, N: int = 16, decay: float | None = None, seed: int = 0
) -> Given:
    """As the model makes them, after a text; `decay` fixes every log-decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    shape = (B, T, H * N) if version == "4" else (B, T, H, N)
    w = -torch.exp(normal(*shape, scale=2) - 2) if decay is None else torch.full(shape, decay)
    k, v, u = normal(*shape), normal(*shape), normal(*shape[2:])
    if version == "4":  # its keys reach tens
        sums = normal(B, H * N), normal(B, H * N).exp(), normal(B, H * N, scale=5)
        return Given((w, 8 * k, v), (u,), sums)
    r, state = normal(*shape), (normal(B, H, N, N),)
    if version == "6":
        return Given((r, w, k, v), (u,), state)
    kk = torch.nn.functional.normalize(normal(*shape), dim=-1)
    return Given((r, w.clamp(-0.6, 0), k, v, -kk, kk * torch.sigmoid(normal(*shape))), (), state)


def before_anything(version: str, B: int = 2, H: int = 3, N: int = 16) -> tuple[Tensor, ...]:
    """The state before the first token."""
    zero = torch.zeros(B, H * N)
    return (zero, zero, zero - 1e30) if version == "4" else (torch.zeros(B, H, N, N),)


def in_numpy(version: str, given: Given) -> tuple[np.ndarray, list[np.ndarray]]:
    """y and the new state, in float64 from the sums themselves, with no running maximum and no blocks."""
    inputs, (u,), state = ([z.double().numpy() for z in part] for part in given)
    if version == "4":
        w, k, v = inputs
        num, den, top = state
        y = np.zeros_like(v)
        for t in range(v.shape[1]):  # numpy's long double has the range that these sums need
            scale = np.exp(top.astype(np.longdouble)) if t == 0 else 1
            num, den = num * scale, den * scale
            itself = np.exp((u + k[:, t]).astype(np.longdouble))
            y[:, t] = (num + itself * v[:, t]) / (den + itself)
            decay, written = np.exp(w[:, t]), np.exp(k[:, t].astype(np.longdouble))
            num, den = decay * num + written * v[:, t], decay * den + written
        return y, [num / den, np.log(den)]
    r, w, k, v = inputs
    S, y = state[0].copy(), np.zeros_like(r)
    for t in range(r.shape[1]):
        kv = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        y[:, t] = np.einsum("bhk,bhkv->bhv", r[:, t], S + u[:, :, None] * kv)
        S = np.exp(w[:, t])[..., None] * S + kv
    return y, [S]


def comparable(version: str, state: tuple[Tensor, ...]) -> list[np.ndarray]:
    """(num, den, max) is one of many ways to write the same sums."""
    parts = [z.double().numpy() for z in state]
    return [parts[0] / parts[1], np.log(parts[1]) + parts[2]] if version == "4" else parts


def error(found: Tensor | np.ndarray, expected: np.ndarray | Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    found, wanted = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def gradients(
    version: str,
    segments: kernels.Segments,
    lengths: list[int],
    *,
    H: int = 3,
    N: int = 16,
    dtype: torch.dtype = torch.float32,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Those of inputs, constants and a state of three rows, from y and from the states of all segments but the second.

    dtype      that inputs are rounded to, but for decays
    precision  that all is computed in; None: the dtypes that it has
    """
    arguments = given(version, sum(lengths), B=1, H=H, N=N)
    decay = 0 if version == "4" else 1
    inputs = [z[0] if i == decay else z[0].to(dtype) for i, z in enumerate(arguments.inputs)]
    state = given(version, 1, B=3, H=H, N=N, seed=1).state
    leaves = [z.to(precision or z.dtype, copy=True).requires_grad_() for z in (*inputs, *arguments.constants, *state)]
    n, S = len(inputs), len(lengths)
    parts = tuple(leaves[:n]), tuple(leaves[n : -len(state)]), tuple(leaves[-len(state) :])
    offsets, start = torch.tensor([0, *lengths]).cumsum(0), torch.arange(S) * 2 % 3
    y, new = segments(*parts, offsets, start, torch.tensor([S - 1, 0, *range(2, S - 1)]))
    generator = torch.Generator().manual_seed(2)
    d_outputs = [torch.randn(z.shape, generator=generator) for z in (y, *new)]
    d_outputs[0] = d_outputs[0].to(dtype)
    return torch.autograd.grad((y, *new), leaves, [d.to(z.dtype) for d, z in zip(d_outputs, (y, *new), strict=True)])


def alone(
    version: str,
    inputs: tuple[Tensor, ...],
    constants: tuple[Tensor, ...],
    state: tuple[Tensor, ...],
    offsets: Tensor,
    start: Tensor,
    keep: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Segments as `kernels.Recurrence` defines them, each for itself through the sequential form."""
    lengths, form = offsets.diff().tolist(), reference.FORMS[kernels.KERNELS[version]][0]
    outputs = [
        form(*(z[None] for z in part), *constants, *(z[i][None] for z in state))
        for i, part in zip(start.tolist(), zip(*(z.split(lengths) for z in inputs), strict=True), strict=True)
    ]
    new = tuple(torch.cat([outputs[i][1 + n] for i in keep.tolist()]) for n in range(len(state)))
    return torch.cat([y[0] for y, *_ in outputs]), new


@forms
@versions
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_compute_the_recurrence(version: str, form: str, T: int) -> None:
    arguments = given(version, T)
    copies = [z.clone() for part in arguments for z in part]
    y, state = recurrence(version, form).rows(*arguments)
    wanted_y, wanted_state = in_numpy(version, arguments)
    assert error(y, wanted_y) < 3e-6
    for found, wanted in zip(comparable(version, state), wanted_state, strict=True):
        assert error(found, wanted) < 3e-6
    assert same(tuple(z for part in arguments for z in part), tuple(copies)), "an input was written to"


@forms
@versions
@pytest.mark.parametrize(("H", "N"), [(3, 1), (1, 5), (2, 8), (3, 4), (1, 64)])
def test_any_size(version: str, form: str, H: int, N: int) -> None:
    arguments = given(version, 37, H=H, N=N)
    y, state = recurrence(version, form).rows(*arguments)
    wanted_y, wanted_state = in_numpy(version, arguments)
    assert error(y, wanted_y) < 3e-6
    assert error(comparable(version, state)[-1], wanted_state[-1]) < 3e-6


@forms
@versions
@pytest.mark.parametrize("decay", [0.0, -1e-6, -5.0, -30.8, -87.5, -1000.0, -1e6, -float("inf")])
def test_decays_of_any_strength(version: str, form: str, decay: float) -> None:
    """RWKV-6 decays have no bound: no factor may overflow, no sum of decays may lose the small ones beside it."""
    arguments = given(version, 40, decay=decay)
    if decay < -30:  # a token forgets all, those between forget little
        for z in (arguments.inputs[0 if version == "4" else 1],):
            z[:, 1::3] = -0.01
    y, state = recurrence(version, form).rows(*arguments)
    with np.errstate(divide="ignore"):
        wanted_y, _ = in_numpy(version, arguments)
    assert error(y, wanted_y) < 3e-6
    assert all(torch.isfinite(part).all() for part in state)


@forms
@versions
def test_the_state_before_anything(version: str, form: str) -> None:
    arguments = given(version, 20)._replace(state=before_anything(version))
    y, state = recurrence(version, form).rows(*arguments)
    wanted_y, wanted_state = in_numpy(version, arguments)
    assert error(y, wanted_y) < 3e-6
    assert error(comparable(version, state)[-1], wanted_state[-1]) < 3e-6


@forms
@pytest.mark.parametrize("scale", [80.0, 1000.0])
def test_large_keys_of_rwkv_4_do_not_overflow(form: str, scale: float) -> None:
    (w, k, v), constants, _ = given("4", 40)
    arguments = Given((w, k / 8 * scale, v), constants, before_anything("4"))
    y, state = recurrence("4", form).rows(*arguments)
    wanted_y, _ = in_numpy("4", arguments)
    assert error(y, wanted_y) < 1e-4  # exponents of a thousand have 6e-5 between two floats
    assert all(torch.isfinite(part).all() for part in state)


@forms
@all_versions
def test_padding_leaves_the_state_as_it_is(version: str, form: str) -> None:
    kernel = recurrence(version, form)
    for state in (given(version, 5).state, before_anything(version)):
        arguments = given(version, 5)._replace(state=state)
        padded = tuple(
            z if value is None else torch.full_like(z, value)
            for z, value in zip(arguments.inputs, kernel.padding, strict=True)
        )
        _, new = kernel.rows(padded, arguments.constants, state)
        for found, wanted in zip(new, state, strict=True):
            assert torch.equal(found, wanted)


@forms
@all_versions
def test_cuts_do_not_matter(version: str, form: str) -> None:
    kernel, arguments = recurrence(version, form), given(version, 96)
    whole_y, whole_state = kernel.rows(*arguments)
    parts, state = [], arguments.state
    for rows in (slice(0, 48), slice(48, 49), slice(49, 96)):
        y, state = kernel.rows(arguments.cut(rows), arguments.constants, state)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole_y) < 3e-6
    for found, wanted in zip(state, whole_state, strict=True):
        assert error(found, wanted) < 3e-6
    if form != "chunked":  # one order of operations, however the text is cut
        assert torch.equal(torch.cat(parts, 1), whole_y)
        assert same(state, whole_state)


@pytest.mark.parametrize("form", [pytest.param("cpu", marks=needs_cpp), "chunked"])
@all_versions
def test_segments_are_as_if_alone(version: str, form: str) -> None:
    """Any lengths, starting states given by row, final states of some: with the native kernels bit for bit."""
    lengths = [1, 40, 2, 3, 64, 1, 65, 8]
    kernel, arguments = recurrence(version, form), given(version, sum(lengths), B=1)
    states = given(version, 1, B=3, seed=1).state
    offsets, start = torch.tensor([0, *lengths]).cumsum(0), torch.arange(len(lengths)) * 2 % 3
    keep = torch.tensor([6, 0, 7])
    inputs = tuple(z[0] for z in arguments.inputs)
    y, new = kernel.segments(inputs, arguments.constants, states, offsets, start, keep)
    alone = [
        kernel.rows(
            arguments.cut(slice(int(offsets[i]), int(offsets[i + 1]))),
            arguments.constants,
            tuple(part[start[i]][None] for part in states),
        )
        for i in range(len(lengths))
    ]
    wanted_y = torch.cat([y[0] for y, _ in alone])
    wanted_new = tuple(torch.cat([alone[i][1][n] for i in keep.tolist()]) for n in range(len(states)))
    if form == "cpu":
        assert torch.equal(y, wanted_y)
        assert same(new, wanted_new)
    assert error(y, wanted_y) < 3e-6
    for found, wanted in zip(new, wanted_new, strict=True):
        assert error(found, wanted) < 3e-6


@needs_cpp
@versions
def test_threads_do_not_change_a_bit(version: str) -> None:
    arguments, results = given(version, 300), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        y, state = recurrence(version, "cpu").rows(*arguments)
        results.append((y, *state))
    assert all(same(result, results[0]) for result in results[1:])


@needs_cpp
@pytest.mark.parametrize("N", [16, 5])
@versions
def test_outputs_are_written_in_full_and_nothing_beside_them(version: str, N: int) -> None:
    """Outputs and scratch start as NaN between guard bands: all is written, and nothing read before that."""
    T, H, guard = 19, 3, 64
    arguments = given(version, T, H=H, N=N)
    offsets, library = torch.tensor([0, T, 2 * T]), native.library()
    bands: list[Tensor] = []

    def banded(count: int) -> Tensor:
        bands.append(torch.full((count + 2 * guard,), float("nan")))
        return bands[-1][guard : guard + count]

    def pointers(*tensors: Tensor) -> list[int]:
        return [z.data_ptr() for z in tensors]

    y, size = banded(arguments.inputs[0].numel()), sum(part.numel() for part in arguments.state)
    decay, new_state, given_state = banded(y.numel()), banded(size), torch.stack(arguments.state, dim=1)
    before = pointers(*arguments.inputs, *arguments.constants, given_state)
    if version == "4":
        library.wkv4_forward(2, offsets.data_ptr(), H * N, 1, *before, None, None, *pointers(y, new_state))
        written = [y, new_state]
    else:
        after = pointers(decay, y, new_state, banded(library.wkv7_scratch(N, 0)))
        library.wkv6_forward(2, offsets.data_ptr(), H, N, 1, *before, None, None, *after)
        written = [decay, y, new_state]
    assert all(torch.isfinite(output).all() for output in written)
    for band in bands:
        assert band[:guard].isnan().all()
        assert band[-guard:].isnan().all()
    assert torch.equal(y.view(arguments.inputs[0].shape), recurrence(version, "cpu").rows(*arguments)[0])


@versions
def test_gradients_of_the_form_over_blocks(version: str) -> None:
    """Every gradient, that of the state included, against float64 autograd through the sequential form."""
    number = kernels.KERNELS[version]
    tensors = [z for part in given(version, 35) for z in part]

    def gradients(function: int, dtype: torch.dtype) -> list[Tensor]:
        leaves = [z.to(dtype, copy=True).requires_grad_() for z in tensors]
        outputs = reference.FORMS[number][function](*leaves)
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(z.shape, generator=generator).to(dtype) for z in outputs])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    found, wanted = gradients(1, torch.float32), gradients(0, torch.float64)
    assert len(found) == len(wanted) == len(tensors)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 3e-5


@pytest.mark.parametrize("form", [pytest.param("cpu", marks=needs_cpp), "chunked"])
@all_versions
def test_gradients_of_segments(version: str, form: str) -> None:
    found = gradients(version, recurrence(version, form).segments, [1, 17, 2, 33])
    wanted = gradients(version, functools.partial(alone, version), [1, 17, 2, 33], precision=torch.float64)
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < (3e-6 if version == "7" else 3e-5)


@needs_cpp
@versions
def test_rows_have_gradients_where_the_kernels_have_none(version: str) -> None:
    arguments = given(version, 35)
    arguments.state[0].requires_grad_()
    y, _ = recurrence(version, "cpu").rows(*arguments)
    expected, *_ = reference.FORMS[kernels.KERNELS[version]][0](*(z for part in arguments for z in part))
    found, wanted = (torch.autograd.grad(z.sum(), arguments.state[0])[0] for z in (y, expected))
    assert error(found, wanted) < 3e-5


@needs_cpp
@all_versions
def test_wrong_shapes_and_dtypes_are_refused(version: str) -> None:
    arguments = given(version, 2)
    flat = [z for part in arguments for z in part]
    for index in range(len(flat)):
        for wrong in (lambda z: z.double(), lambda z: z[..., :-1]):
            changed = list(flat)
            changed[index] = wrong(changed[index])
            parts = iter(changed)
            with pytest.raises(BackendError, match=r"cannot run the C\+\+ recurrence: expected"):
                recurrence(version, "cpu").rows(*(tuple(next(parts) for _ in part) for part in arguments))


def test_padding_is_told_for_every_input() -> None:
    assert {number: len(values) for number, values in PADDING.items()} == {4: 3, 6: 4, 7: 6}
