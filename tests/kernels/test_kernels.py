"""The recurrence of RWKV-7 in all its forms against one written independently in numpy float64; gradients; backends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from rwkv_stream import kernels
from rwkv_stream.errors import BackendError
from rwkv_stream.kernels import native
from rwkv_stream.kernels.recurrence import cpu, reference

pytestmark = pytest.mark.usefixtures("one_thread")

Wkv = Callable[..., tuple[Tensor, Tensor]]
FORMS: dict[str, Wkv] = {"recurrent": reference.wkv7_recurrent, "chunked": reference.wkv7_chunked, "cpu": cpu.wkv7}
LENGTHS = (1, 2, 3, 16, 63, 64, 65, 197, 1000)
STRONGEST = -0.60653066  # the log-decay that the model approaches but does not reach

needs_cpp = pytest.mark.skipif(
    kernels.available()["cpu"] is not None, reason=f"C++ kernels: {kernels.available()['cpu']}"
)
forms = pytest.mark.parametrize("form", ["recurrent", "chunked", pytest.param("cpu", marks=needs_cpp)])


def inputs(T: int, B: int = 2, H: int = 2, N: int = 64, decay: float | None = None, seed: int = 0) -> list[Tensor]:
    """r w k v a b state as the model makes them: a = -kk, |kk| = 1, b = kk · rate; `decay` fixes every log-decay."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    r, k, v, free = normal(B, T, H, N), normal(B, T, H, N) * 0.3, normal(B, T, H, N), normal(B, T, H, N)
    w = STRONGEST * torch.sigmoid(2 * free) if decay is None else torch.full((B, T, H, N), decay)
    kk = torch.nn.functional.normalize(normal(B, T, H, N), dim=-1)
    return [r, w, k, v, -kk, kk * torch.sigmoid(normal(B, T, H, N)), normal(B, H, N, N) * 0.3]


def numpy_recurrence(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The paper's recurrence with plain loops, in float64."""
    r, w, k, v, a, b, state = (z.detach().double().numpy() for z in tensors)
    y, final = np.zeros_like(r), state.copy()
    for batch, head in np.ndindex(r.shape[0], r.shape[2]):
        S = final[batch, head]
        for t in range(r.shape[1]):
            at, bt, kt, vt, rt = (z[batch, t, head] for z in (a, b, k, v, r))
            S = S @ np.diag(np.exp(w[batch, t, head])) + np.outer(S @ at, bt) + np.outer(vt, kt)
            y[batch, t, head] = S @ rt
        final[batch, head] = S
    return y, final


def error(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    wanted = np.asarray(expected)
    return float(np.abs(found.detach().double().numpy() - wanted).max() / max(np.abs(wanted).max(), 1e-30))


@forms
@pytest.mark.parametrize("T", LENGTHS)
def test_forms_compute_the_recurrence(form: str, T: int) -> None:
    tensors = inputs(T)
    before = [z.clone() for z in tensors]
    y, state = FORMS[form](*tensors)
    wanted_y, wanted_state = numpy_recurrence(tensors)
    assert error(y, wanted_y) < 3e-6
    assert error(state, wanted_state) < 3e-6
    assert all(torch.equal(z, old) for z, old in zip(tensors, before, strict=True)), "an input was written to"


@forms
@pytest.mark.parametrize("N", [4, 5, 8, 16, 48])
def test_any_head_size(form: str, N: int) -> None:
    tensors = inputs(37, H=3, N=N)
    y, state = FORMS[form](*tensors)
    wanted_y, wanted_state = numpy_recurrence(tensors)
    assert error(y, wanted_y) < 3e-6
    assert error(state, wanted_state) < 3e-6


@forms
@pytest.mark.parametrize("decay", [STRONGEST, -1e-6, 0.0])
def test_decays_at_the_edges_of_the_range(form: str, decay: float) -> None:
    tensors = inputs(197, decay=decay)
    y, state = FORMS[form](*tensors)
    wanted_y, wanted_state = numpy_recurrence(tensors)
    assert error(y, wanted_y) < 1e-5
    assert error(state, wanted_state) < 1e-5


@pytest.mark.parametrize("form", ["recurrent", pytest.param("cpu", marks=needs_cpp)])
@pytest.mark.parametrize("decay", [-30.0, -86.9, -87.1, -1000.0, -float("inf")])
def test_decays_beyond_the_range(form: str, decay: float) -> None:
    tensors = inputs(20, decay=decay)
    y, state = FORMS[form](*tensors)
    wanted_y, wanted_state = numpy_recurrence(tensors)
    assert error(y, wanted_y) < 3e-6
    assert error(state, wanted_state) < 3e-6


@forms
def test_padding_leaves_the_state_as_it_is(form: str) -> None:
    """Decay 1 and nothing written, as model/v7.py pads short rows: exactly the same state."""
    r, _, _, _, a, _, state = inputs(5)
    zero = torch.zeros_like(r)
    _, new = FORMS[form](r, zero, zero, zero, a, zero, state)
    assert torch.equal(new, state)


@forms
def test_cuts_do_not_matter(form: str) -> None:
    *sequences, state = inputs(96)
    whole_y, whole_state = FORMS[form](*sequences, state)
    parts = []
    for first, last in ((0, 48), (48, 49), (49, 96)):
        y, state = FORMS[form](*(z[:, first:last] for z in sequences), state)
        parts.append(y)
    assert error(torch.cat(parts, 1), whole_y) < 3e-6
    assert error(state, whole_state) < 3e-6
    if form != "chunked":  # one order of operations, however the text is cut
        assert torch.equal(torch.cat(parts, 1), whole_y)
        assert torch.equal(state, whole_state)


@pytest.mark.parametrize("form", ["chunked", pytest.param("cpu", marks=needs_cpp)])
@pytest.mark.parametrize(("T", "N"), [(1, 64), (3, 64), (16, 64), (65, 64), (130, 64), (17, 8), (17, 4), (17, 5)])
def test_gradients(form: str, T: int, N: int) -> None:
    """Every gradient, that of the state included, against float64 autograd through the sequential form."""
    tensors = inputs(T, N=N)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(tensors[0].shape, generator=generator)
    d_state = torch.randn(tensors[6].shape, generator=generator)

    def gradients(function: Wkv, dtype: torch.dtype) -> list[Tensor]:
        leaves = [z.to(dtype, copy=True).requires_grad_() for z in tensors]
        y, state = function(*leaves)
        torch.autograd.backward([y, state], [dy.to(dtype), d_state.to(dtype)])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    found = gradients(FORMS[form], torch.float32)
    wanted = gradients(reference.wkv7_recurrent, torch.float64)
    assert len(found) == 7
    for name, one, other in zip(("r", "w", "k", "v", "a", "b", "state"), found, wanted, strict=True):
        assert error(one, other) < 1e-5, name


def test_chunked_gradcheck() -> None:
    tensors = [z.double().requires_grad_() for z in inputs(5, B=1, H=1, N=4)]
    assert torch.autograd.gradcheck(reference.wkv7_chunked, tensors)


@needs_cpp
def test_cpu_op_passes_torch_checks() -> None:
    """Schema, fake implementation and autograd registration, as torch.library checks them."""
    cpu.wkv7(*inputs(1))  # registers
    tensors = [z.requires_grad_() for z in inputs(3, B=1, H=1, N=4)]
    torch.library.opcheck(torch.ops.rwkv_stream.wkv7_forward.default, (*tensors, True), rtol=1e-4, atol=1e-5)


@needs_cpp
def test_ops_are_registered_once_whatever_threads_want_them_first() -> None:
    code = """
import threading, time, torch
from rwkv_stream.kernels.layers import cpu as layers
from rwkv_stream.kernels.recurrence import cpu as recurrence

made = []

def slowly(function):
    def call(*arguments, **options):
        made.append(str(arguments[0] if function is custom_op else arguments[1]).partition("(")[0])
        time.sleep(0.05)  # long enough for every other thread to come in between
        return function(*arguments, **options)
    return call

custom_op = torch.library.custom_op
torch.library.custom_op = slowly(custom_op)
torch.library.Library.define = slowly(torch.library.Library.define)
problems, start = [], threading.Barrier(8)

def first_use():
    start.wait()
    try:
        z = torch.ones(1, 1, 1, 4)
        recurrence.wkv7(z, -z, z, z, z, z, torch.zeros(1, 1, 4, 4))
        layers.Weight.packed(torch.eye(4))(torch.ones(1, 4))
    except Exception as error:
        problems.append(error)

threads = [threading.Thread(target=first_use) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not problems, problems
ours = [name for name in made if name.removeprefix("rwkv_stream::") in
        ("wkv7_forward", "wkv7_backward", "linear", "norm_shift_mix", "time_mix")]
assert len(set(ours)) >= 5 and ours.count("linear") == 1 and ours.count("rwkv_stream::wkv7_forward") == 1, ours
"""
    run = subprocess.run([sys.executable, "-Ic", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_cpp
def test_threads_do_not_change_a_bit() -> None:
    made = inputs(700, H=4)  # once: torch's own functions may differ in the last bit between numbers of threads

    def everything() -> list[Tensor]:
        tensors = [z.clone().requires_grad_() for z in made]
        y, state = cpu.wkv7(*tensors)
        (y.square().sum() + state.square().sum()).backward()
        return [y.detach(), state.detach(), *(z.grad for z in tensors if z.grad is not None)]

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("N", [64, 5])
def test_outputs_are_written_in_full_and_nothing_beside_them(N: int) -> None:
    """Outputs and scratch start as NaN between guard bands: all is written, and nothing read before that."""
    B, T, H, guard = 2, 19, 3, 64
    r, w, k, v, a, b, state = inputs(T, B=B, H=H, N=N)
    dy, d_state = torch.ones_like(r), torch.ones_like(state)
    library = native.library()
    bands: list[Tensor] = []

    def banded(count: int) -> Tensor:
        bands.append(torch.full((count + 2 * guard,), float("nan")))
        return bands[-1][guard : guard + count]

    def pointers(*tensors: Tensor) -> list[int]:
        return [z.data_ptr() for z in tensors]

    decay, y, sa, *d = (banded(r.numel()) for _ in range(9))
    states = banded(B * library.wkv7_kept(T) * H * N * N)
    new_state, d_old_state = banded(state.numel()), banded(state.numel())
    offsets = torch.tensor([0, T, 2 * T])
    outputs = pointers(decay, y, new_state, sa, states, banded(library.wkv7_scratch(N, 0)))
    inputs_of_forward = pointers(r, w, k, v, a, b, state)
    library.wkv7_forward(B, offsets.data_ptr(), H, N, 1, *inputs_of_forward, None, None, *outputs)
    scratch = banded(library.wkv7_scratch(N, 1))
    backward = pointers(r, decay, k, v, a, b, sa, states, dy, d_state, *d, d_old_state, scratch)
    library.wkv7_backward(B, T, H, N, 1, *backward)
    for output in (decay, y, sa, states, new_state, *d, d_old_state):
        assert torch.isfinite(output).all()
    for band in bands:
        assert band[:guard].isnan().all()
        assert band[-guard:].isnan().all()
    assert error(y.view(r.shape), numpy_recurrence([r, w, k, v, a, b, state])[0]) < 3e-6


def laid_end_to_end(lengths: list[int], N: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """r w k v a b [n, H, N], offsets, three states, and which of these each segment starts from."""
    *sequences, _ = inputs(sum(lengths), B=1, H=3, N=N)
    states = inputs(1, B=3, H=3, N=N)[-1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return [z[0] for z in sequences], offsets, states, torch.arange(len(lengths)) * 2 % 3


@pytest.mark.parametrize("N", [64, 5])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpp), "reference"])
def test_segments_are_as_if_alone(backend: str, N: int) -> None:
    """Any lengths, starting states given by row, final states of some: with the native kernels bit for bit."""
    lengths = [1, 70, 2, 3, 64, 1, 65, 8]
    sequences, offsets, states, start = laid_end_to_end(lengths, N)
    keep = torch.tensor([6, 0, 7])
    _, wkv = kernels.resolve("7", backend, "cpu")
    y, (new,) = wkv.segments(tuple(sequences), (), (states,), offsets, start, keep)
    alone = [
        wkv.rows(tuple(z[None, offsets[i] : offsets[i + 1]] for z in sequences), (), (states[start[i]][None],))
        for i in range(len(lengths))
    ]
    wanted_y, wanted_states = torch.cat([y[0] for y, _ in alone]), torch.cat([alone[i][1][0] for i in keep.tolist()])
    if backend == "cpu":
        assert torch.equal(y, wanted_y)
        assert torch.equal(new, wanted_states)
    assert error(y, wanted_y) < 3e-6
    assert error(new, wanted_states) < 3e-6


@needs_cpp
def test_states_that_nobody_keeps_are_not_written() -> None:
    sequences, offsets, states, start = laid_end_to_end([4, 9, 5], 64)
    segments = kernels.resolve("7", "cpu", "cpu")[1].segments
    y, (new,) = segments(tuple(sequences), (), (states,), offsets, start, torch.zeros(0, dtype=torch.int64))
    assert new.shape == (0, *states.shape[1:])
    assert torch.equal(y, segments(tuple(sequences), (), (states,), offsets, start, torch.arange(3))[0])


@needs_cpp
def test_views_are_read_as_what_they_show() -> None:
    tensors = inputs(9, B=2)
    strided = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in tensors[:6]]
    layers = torch.stack([torch.zeros_like(tensors[6]), tensors[6]], dim=1)[:, 1]
    assert not strided[0].is_contiguous()
    assert not layers.is_contiguous()
    for found, wanted in zip(cpu.wkv7(*strided, layers), cpu.wkv7(*tensors), strict=True):
        assert torch.equal(found, wanted)


@needs_cpp
@pytest.mark.parametrize("index", range(7))
def test_wrong_shapes_and_dtypes_are_refused(index: int) -> None:
    for wrong in (lambda z: z.double(), lambda z: z[..., :-1]):
        tensors = inputs(2, N=8)
        tensors[index] = wrong(tensors[index])
        with pytest.raises(BackendError, match=r"cannot run the C\+\+ recurrence: expected"):
            cpu.wkv7(*tensors)


@needs_cpp
def test_one_openmp_runtime_in_the_process() -> None:
    code = (
        "import torch; from rwkv_stream.kernels.recurrence import cpu\n"
        "z = torch.ones(1, 2, 2, 64); torch.set_num_threads(2); torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "cpu.wkv7(z, -z, z, z, z, z, torch.zeros(1, 2, 64, 64))\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(sorted({line.split()[-1] for line in maps.splitlines() if 'omp' in line.rsplit('/', 1)[-1]}))\n"
        "assert 'rwkv_stream_cpu' in maps"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert len(eval(run.stdout)) == 1, run.stdout


def test_import_has_no_side_effects() -> None:
    code = "import sys, rwkv_stream.kernels; sys.exit('torch' in sys.modules or 'ctypes.util' in sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_resolve_serves_what_is_asked_for() -> None:
    assert kernels.resolve("7", "reference", "cpu")[0] == "reference"
    name, wkv = kernels.resolve("7", "auto", "cpu")
    assert name == ("cpu" if kernels.available()["cpu"] is None else "reference")
    *sequences, state = tensors = inputs(1)
    assert error(wkv.rows(tuple(sequences), (), (state,))[0], numpy_recurrence(tensors)[0]) < 3e-6
    assert kernels.resolve("7", "auto", "cuda")[0] == "reference"


@pytest.mark.parametrize("T", [1, 70])
def test_reference_backend_takes_the_form_that_fits(T: int) -> None:
    *sequences, state = tensors = inputs(T, B=1)
    form = reference.wkv7_recurrent if T == 1 else reference.wkv7_chunked
    y, (new,) = kernels.resolve("7", "reference", "cpu")[1].rows(tuple(sequences), (), (state,))
    assert all(torch.equal(x, z) for x, z in zip((y, new), form(*tensors), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("7", "abacus", "cpu"), "unknown backend 'abacus'"),
        (("7", "cpu", "cuda"), "backend 'cpu' computes on the cpu, found device 'cuda'"),
        (("3", "auto", "cpu"), "no kernel for RWKV version 3"),
    ],
)
def test_impossible_backends_are_refused(arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        kernels.resolve(*arguments)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "LIBRARY", "no-such-library.so")
    native.library.cache_clear()
    kernels._say_fallback.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_a_missing_library_is_explained_and_only_auto_does_without(caplog: pytest.LogCaptureFixture) -> None:
    reason = kernels.available()["cpu"]
    assert reason is not None
    assert "no-such-library.so" in reason
    with pytest.raises(BackendError, match=r"no-such-library\.so"):
        kernels.resolve("7", "cpu", "cpu")
    for _ in range(2):
        assert kernels.resolve("7", "auto", "cpu")[0] == "reference"
    assert len([record for record in caplog.records if "plain torch" in record.message]) == 1, "said once"


@needs_cpp
def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    native.library.cache_clear()
    try:
        with pytest.raises(BackendError, match="expected interface 999, found"):
            native.library()
    finally:
        native.library.cache_clear()
