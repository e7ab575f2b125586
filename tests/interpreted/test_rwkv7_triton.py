"""The Triton kernels of RWKV-7 around and with the recurrence, run by Triton's interpreter: each against float64, and
whole models against the CPU kernels.

Run in a process of its own by `tests/kernels/test_triton.py`: the interpreter is to be asked for before the import.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/kernels/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")

import triton.language as tl
from test_recurrences import error, same
from tiny_models import official_weights, save
from triton.runtime import interpreter

from rwkv_stream.kernels.layers import reference as plain_layers
from rwkv_stream.kernels.layers import triton as layers
from rwkv_stream.model import Model, load, network, v7_triton
from rwkv_stream.model.placement import Stage
from rwkv_stream.model.state import State
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Store

LENGTHS = [1, 2, 0, 15, 16, 17, 63, 0, 64, 65, 200, 0]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, LAYERS, HERE = 3, 3, 1  # of the states that calls are given; the layer that they read and write
EPS = 64e-5
GUARD = 64

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def normal(seed: int, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
    return around + scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def rounds_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the nearest, as GPUs do; the interpreter cuts bits off, which would double the errors."""
    convert = interpreter._convert_float

    def rounding(z: np.ndarray, dtype: object, to: object, mode: object) -> np.ndarray:
        if (dtype, to) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(z)).bfloat16().view(torch.uint16).numpy()
        return convert(z, dtype, to, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


class Segments(NamedTuple):
    """As `layers.reference` takes them; some states go nowhere, the others end in rows of another order."""

    offsets: Tensor
    start: Tensor
    to: Tensor
    n_kept: int

    @classmethod
    def of(cls, lengths: list[int]) -> Segments:
        S = len(lengths)
        is_kept = torch.arange(S) % 4 != 1
        to = torch.where(is_kept, is_kept.flip(0).cumsum(0).flip(0) - 1, -1)
        return cls(torch.tensor([0, *lengths]).cumsum(0), torch.arange(S) * 2 % ROWS, to, int(is_kept.sum()))

    def plan(self, dtype: torch.dtype) -> layers.Plan:
        return layers.plan(self.offsets, self.start, self.to, dtype, torch.device("cpu"))


@pytest.fixture
def banded() -> Iterator[Callable[..., Tensor]]:
    """Tensors of NaN between guard bands, which are looked at in the end."""
    bands: list[Tensor] = []

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel()
        bands.append(torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype))
        return bands[-1][GUARD : GUARD + count].view(shape)

    yield made
    assert bands
    for band in bands:
        assert band[:GUARD].isnan().all()
        assert band[-GUARD:].isnan().all()


@pytest.fixture
def banded_inside(banded: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls allocate for themselves is such tensors, too; the interpreter's own calls name a device."""
    new, like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda z, *shape, **how: new(z, *shape, **how) if how else banded(*torch.Size(shape), dtype=z.dtype),
    )
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda z, **how: like(z, **how) if "device" in how else banded(*z.shape, **{"dtype": z.dtype} | how),
    )


def alone_in(layers: Tensor) -> Tensor:
    """The layer that was written; the others are as they were."""
    assert layers[:, :HERE].isnan().all()
    assert layers[:, HERE + 1 :].isnan().all()
    return layers[:, HERE]


def within_twice(found: Tensor, plain: Tensor, wanted: Tensor) -> bool:
    """As near to the float64 result as twice what plain torch makes of the same rounded inputs, and a rounding."""
    unit = 3e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    print(f"off by {error(found.float(), wanted):.1e}, plain {error(plain.float(), wanted):.1e}, rounding {unit:.1e}")
    return error(found.float(), wanted) <= 2 * error(plain.float(), wanted) + unit


# ---- plans ----


def test_a_plan_says_where_states_are_taken_up_and_left() -> None:
    offsets, start = torch.tensor([0, 2, 2, 3, 36, 36]), torch.tensor([4, 1, 0, 2, 3])
    to = torch.tensor([1, 2, -1, 0, -1])
    plan = layers.plan(offsets, start, to, torch.bfloat16, torch.device("cpu"))
    assert plan.before.tolist() == [4, -1, 0, 2, *[-1] * 32, 1]
    assert plan.after.tolist() == [-1, 1, -1, *[-1] * 32, 0, 2]
    assert (plan.start.tolist(), plan.to.tolist()) == (start.tolist(), to.tolist())
    assert [z.tolist() for z in plan.blocks] == [[0, 2, 3, 35], [2, 1, 32, 1], [0, 1, 1, 2, 4], [1, 0, 1, 2, 0]]
    parts = (plan.before, plan.after, plan.start, plan.to, *plan.blocks)
    assert all(z.dtype == torch.int32 and z.storage_offset() % 4 == 0 for z in parts)
    assert not plan.is_step


@pytest.mark.parametrize(("lengths", "is_step"), [([1, 1], True), ([0, 1], True), ([2, 1], False)])
def test_a_plan_knows_steps(lengths: list[int], is_step: bool) -> None:
    assert Segments.of(lengths).plan(torch.float32).is_step == is_step


# ---- norm, token shift and mixing; activation ----


@dtypes
@pytest.mark.parametrize(("C", "M"), [(64, 6), (35, 1)])
def test_norm_shift_mix(C: int, M: int, dtype: torch.dtype, banded: Callable[..., Tensor]) -> None:
    segments, n = Segments.of(LENGTHS), sum(LENGTHS)
    x, norm = normal(0, n, C, scale=3, around=1), (normal(1, C, around=1), normal(2, C))
    mix, x_prev = normal(3, M, C).sigmoid(), normal(4, ROWS, LAYERS, C)
    copies = [z.clone() for z in (x, *norm, mix, x_prev)]
    out, last = banded(M, n, C, dtype=dtype), banded(segments.n_kept, LAYERS, C)
    layers.norm_shift_mix(x, norm, mix, x_prev[:, HERE], segments.plan(dtype), out, last[:, HERE])
    assert same((x, *norm, mix, x_prev), tuple(copies)), "an input was written to"

    def reference(precision: torch.dtype, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
        made, left = torch.empty(M, n, C, dtype=rounded), torch.empty(segments.n_kept, C, dtype=precision)
        given = [z.to(precision) for z in (x, *norm, mix)]
        plain_layers.norm_shift_mix(*given, (), x_prev[:, HERE].to(precision), *segments[:3], made, left)
        return made, left

    wanted, wanted_last = reference(torch.float64, torch.float64)
    plain, plain_last = reference(torch.float32, dtype)
    assert within_twice(out, plain, wanted)
    assert within_twice(alone_in(last), plain_last, wanted_last)


def test_norm_shift_mix_does_not_see_where_a_text_is_cut() -> None:
    x, norm, mix = normal(0, 40, 48), (normal(1, 48), normal(2, 48)), normal(3, 6, 48).sigmoid()
    zero = torch.zeros(1, 48)

    def of(lengths: list[int]) -> Tensor:
        outs, x_prev = [], zero
        for part in x.split(lengths):
            row = torch.zeros(1, dtype=torch.int64)
            plan = layers.plan(torch.tensor([0, len(part)]), row, row, torch.float32, torch.device("cpu"))
            out, last = torch.empty(6, len(part), 48), torch.empty(1, 48)
            layers.norm_shift_mix(part, norm, mix, x_prev, plan, out, last)
            outs.append(out)
            x_prev = last
        return torch.cat([*outs, x_prev.expand(6, 1, 48)], 1)

    assert torch.equal(of([40]), of([1, 16, 23]))


@dtypes
@pytest.mark.parametrize("shape", [(1, 5), (3, 2048), (7, 777)])
def test_relu2(shape: tuple[int, int], dtype: torch.dtype, banded: Callable[..., Tensor]) -> None:
    z = banded(*shape, dtype=dtype)
    z.copy_(normal(0, *shape, scale=3))
    wanted = (z.float().relu() ** 2).to(dtype)
    layers.relu2_(z)
    assert torch.equal(z, wanted)


# ---- time-mix ----


class TimeMix(NamedTuple):
    """Arguments of `layers.reference.time_mix` without segments, all fp32."""

    projections: tuple[Tensor, ...]
    vectors: tuple[Tensor, ...]
    state: Tensor  # [ROWS, LAYERS, H, N, N]

    @classmethod
    def of(cls, n: int, H: int, N: int, is_mixed: bool) -> TimeMix:
        C = H * N
        projections = tuple(normal(i, n, C) for i in range(8 if is_mixed else 6))
        projections[1][:, -1] = 0.0
        ranges = ((-6.0, 1.0), (-2.0, 2.0), (-2.0, 2.0), (0.5, 1.5), (0.5, 1.5))  # w0 a0 v0 k_k k_a
        uniform = (low + (high - low) * normal(20 + i, C).sigmoid() for i, (low, high) in enumerate(ranges))
        rest = normal(30, C, scale=0.3), normal(31, C, scale=0.2, around=1), normal(32, C, scale=0.2)
        return cls(projections, (*uniform, *rest), normal(40, ROWS, LAYERS, H, N, N, scale=0.5))

    def in_dtype(self, dtype: torch.dtype) -> TimeMix:
        return self._replace(projections=tuple(z.to(dtype) for z in self.projections))

    def reference(self, segments: Segments, precision: torch.dtype, rounded: torch.dtype) -> tuple[Tensor, Tensor]:
        """out and new state, computed in `precision`."""
        H, N = self.state.shape[2:4]
        state = self.state[:, HERE].to(precision)
        out = torch.empty(self.projections[0].shape, dtype=rounded)
        new = torch.empty(segments.n_kept, H, N, N, dtype=precision)
        given = [z.to(precision) for z in self.projections], [z.to(precision) for z in self.vectors]
        plain_layers.time_mix(*given, EPS, state, *segments[:3], out, new)
        return out, new

    def call(
        self, function: Callable[..., None], segments: Segments, banded: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same by one of the kernels' callers."""
        dtype = self.projections[0].dtype
        out = banded(*self.projections[0].shape, dtype=dtype)
        new = banded(segments.n_kept, *self.state.shape[1:])
        copies = [z.clone() for z in (*self.projections, *self.vectors, self.state)]
        given, written = self.state[:, HERE], new[:, HERE]
        function(self.projections, self.vectors, EPS, given, segments.plan(dtype), out, written)
        assert same((*self.projections, *self.vectors, self.state), tuple(copies)), "an input was written to"
        return out, alone_in(new)


@dtypes
@pytest.mark.usefixtures("banded_inside")
@pytest.mark.parametrize(("H", "N", "is_mixed"), [(1, 64, True), (3, 5, True), (2, 8, False)])
def test_time_mix(H: int, N: int, is_mixed: bool, dtype: torch.dtype, banded: Callable[..., Tensor]) -> None:
    segments, exact = Segments.of(LENGTHS), TimeMix.of(sum(LENGTHS), H, N, is_mixed)
    given = exact.in_dtype(dtype)
    out, new = given.call(layers.time_mix, segments, banded)
    wanted, wanted_state = exact.reference(segments, torch.float64, torch.float64)
    plain, plain_state = given.reference(segments, torch.float32, dtype)
    assert within_twice(out, plain, wanted)
    # What is written to the state has been rounded to the dtype of the projections.
    assert within_twice(new.to(dtype), plain_state.to(dtype), wanted_state)


@dtypes
@pytest.mark.parametrize(("H", "N", "is_mixed"), [(2, 64, True), (3, 5, True), (2, 8, False), (1, 200, True)])
def test_step(H: int, N: int, is_mixed: bool, dtype: torch.dtype, banded: Callable[..., Tensor]) -> None:
    lengths = [1, 1, 0, 1, 1, 0, 1, 1]
    segments, exact = Segments.of(lengths), TimeMix.of(sum(lengths), H, N, is_mixed)
    given = exact.in_dtype(dtype)
    out, new = given.call(layers.step, segments, banded)
    wanted, wanted_state = exact.reference(segments, torch.float64, torch.float64)
    plain, plain_state = given.reference(segments, torch.float32, dtype)
    assert within_twice(out, plain, wanted)
    assert within_twice(new, plain_state, wanted_state)
    handed_on = [s for s, length in enumerate(lengths) if length == 0 and segments.to[s] >= 0]
    assert handed_on
    for s in handed_on:
        assert torch.equal(new[segments.to[s]], exact.state[segments.start[s], HERE])


def test_step_after_step_is_what_time_mix_reads_at_once() -> None:
    n, H, N = 40, 2, 8
    given, row = TimeMix.of(n, H, N, is_mixed=True), torch.zeros(1, dtype=torch.int64)

    def read(function: Callable[..., None], tokens: slice, state: Tensor, out: Tensor) -> Tensor:
        part, new = [z[tokens] for z in given.projections], torch.empty_like(state)
        offsets = torch.tensor([0, len(part[0])])
        plan = layers.plan(offsets, row, row, torch.float32, torch.device("cpu"))
        function(part, given.vectors, EPS, state, plan, out[tokens], new)
        return new

    state = given.state[:1, HERE]
    at_once, one_by_one = torch.empty(n, H * N), torch.empty(n, H * N)
    whole = read(layers.time_mix, slice(0, n), state, at_once)
    for i in range(n):
        state = read(layers.step, slice(i, i + 1), state, one_by_one)
    assert error(one_by_one, at_once) < 3e-6
    assert error(state, whole) < 3e-6


def test_keys_of_zero_write_nothing() -> None:
    """Nothing to normalise: no division by zero, as `F.normalize` has it."""
    segments, given = Segments.of([1]), TimeMix.of(1, 1, 8, is_mixed=False)
    given.projections[1].zero_()
    for function in (layers.time_mix, layers.step):
        out, new = torch.empty(1, 8), torch.empty(1, 1, 8, 8)
        function(given.projections, given.vectors, EPS, given.state[:, HERE], segments.plan(out.dtype), out, new)
        wanted, wanted_state = given.reference(segments, torch.float64, torch.float64)
        assert error(out, wanted) < 3e-6
        assert error(new, wanted_state) < 3e-6


# ---- whole models ----


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = official_weights(n_embd=64, n_layer=2, head_size=32, seed=6)
    return save(weights, tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path, device="cpu", backend="triton")


@pytest.fixture(scope="module")
def other(path: Path) -> Model:
    """By the CPU kernels, or where these were not built by plain torch."""
    return load(path, device="cpu")


TOKENS = torch.randint(256, (2, 37), generator=torch.Generator().manual_seed(1))


def assert_near(found: tuple[Tensor, object], wanted: tuple[Tensor, object]) -> None:
    (out, state), (wanted_out, wanted_state) = found, wanted
    assert (out - wanted_out).abs().max() <= 1e-4
    for name in wanted_state:
        assert state[name].shape == wanted_state[name].shape
        assert (state[name] - wanted_state[name]).abs().max() <= 1e-4, name


def test_rows(model: Model, other: Model) -> None:
    found = model.forward(TOKENS, logits="all")
    assert_near(found, other.forward(TOKENS, logits="all"))
    again = model.forward(TOKENS, logits="all")
    assert torch.equal(found[0], again[0])
    assert same(tuple(found[1].values()), tuple(again[1].values()))


def test_rows_of_unequal_length(model: Model, other: Model) -> None:
    _, state = other.forward(TOKENS[:, :5])
    copies = state.clone()
    lengths = torch.tensor([37, 7])
    assert_near(model.forward(TOKENS, state, lengths=lengths), other.forward(TOKENS, state, lengths=lengths))
    lengths = torch.tensor([0, 7])
    (hidden, new), (wanted, wanted_state) = (
        m.forward(TOKENS, state, logits="none", lengths=lengths) for m in (model, other)
    )
    assert_near((hidden[1, :7], new), (wanted[1, :7], wanted_state))
    assert same(tuple(new.row(0).values()), tuple(state.row(0).values())), "a row that nothing was read in"
    assert same(tuple(state.values()), tuple(copies.values())), "the given state was written to"


def test_segments_of_several_texts(model: Model, other: Model) -> None:
    _, state = other.forward(TOKENS[:, :5])
    start, keep = torch.tensor([1, 0, 1, 1]), torch.tensor([3, 0])
    for lengths in ([1, 33, 35, 1], [1, 1, 1, 1]):
        tokens = TOKENS.flatten()[: sum(lengths)]
        arguments = (tokens, torch.tensor(lengths), state, start, keep)
        assert_near(model.forward_packed(*arguments), other.forward_packed(*arguments))


def test_one_token_at_a_time(model: Model) -> None:
    tokens = TOKENS[:, :20]
    wanted = model.forward(tokens, logits="all")
    logits, state = [], model.zero_state(2)
    for i in range(tokens.shape[1]):
        out, state = model.forward(tokens[:, i : i + 1], state, logits="all")
        logits.append(out)
    assert_near((torch.cat(logits, 1), state), wanted)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_of_16_bits(dtype: str, path: Path, model: Model) -> None:
    """As near to fp32 as twice what plain torch computes with the same weights; mean squares, since some token's
    GroupNorm divides almost nothing."""
    models = [load(path, device="cpu", backend=backend, dtype=dtype) for backend in ("triton", "reference")]
    for tokens in (TOKENS[:1], TOKENS[:, :1]):
        wanted, wanted_state = model.forward(tokens, logits="all")
        (found, state), (plain, plain_state) = (m.forward(tokens, logits="all") for m in models)
        unit = torch.finfo(models[0].dtype).eps
        assert (found - wanted).square().mean().sqrt() <= 2 * (plain - wanted).square().mean().sqrt() + unit
        for name, part in state.items():
            off, plain_off = (z - wanted_state[name] for z in (part, plain_state[name]))
            assert off.square().mean().sqrt() <= 2 * plain_off.square().mean().sqrt() + unit, name


def test_what_reads_which_model(model: Model, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV-7 goes through these kernels; 7a, other backends and gradients take the path that all versions share."""
    taken: list[str] = []
    for module in (v7_triton, network):
        layers = module.layers

        def seen(*arguments: object, name: str = module.__name__, layers: object = layers) -> object:
            taken.append(name.rsplit(".", 1)[1])
            return layers(*arguments)

        monkeypatch.setattr(module, "layers", seen)
    model.forward(TOKENS[:, :2])
    deep = save(official_weights(version="7a"), tmp_path / "7a.safetensors")
    load(deep, device="cpu", backend="triton").forward(TOKENS[:, :2])
    load(path, device="cpu", backend="reference").forward(TOKENS[:, :2])
    state = model.zero_state(2)
    for part in state.values():
        part.requires_grad_()
    model.forward(TOKENS[:, :2], state)
    assert taken == ["v7_triton", "network", "network", "network"]


def test_recorded_steps(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are recorded: the bits of steps that are not, one recording for each number of rows and stage, and
    results that later steps do not write to. A recording is stood in for by computing again into the same memory."""
    recordings: list[int] = []

    def recorded(work: Callable[[], tuple[network.Stream, State]]) -> tuple[Callable[[], None], object]:
        stream, state = work()
        recordings.append(stream.x.shape[1])

        def replay() -> None:
            fresh_stream, fresh_state = work()
            for old, new in ((stream.x, fresh_stream.x), (stream.v_first, fresh_stream.v_first)):
                old.copy_(new)
            for name in state:
                state[name].copy_(fresh_state[name])

        return replay, (stream, state)

    def steps(stepping: Model, rows: int) -> tuple[Tensor, State]:
        outs, state = [], stepping.zero_state(rows)
        for i in range(4):
            out, state = stepping.forward(TOKENS[:rows, i : i + 1], state)
            outs.append(out)
        return torch.stack(outs), state

    wanted = [steps(model, rows) for rows in (1, 2)]
    monkeypatch.setattr(v7_triton, "recorded", recorded)
    monkeypatch.setattr(v7_triton, "may_record", lambda device: True)
    halves = [Stage(model.device, v7_triton.Layers(model.blocks[i : i + 1])) for i in range(2)]
    for stages in (model.stages, halves):
        recording = dataclasses.replace(model, stages=stages)
        for rows, (out, state) in zip((1, 2), wanted, strict=True):
            for _ in range(2):
                found, new = steps(recording, rows)
                assert torch.equal(found, out)
                assert same(tuple(new.values()), tuple(state.values()))
    assert recordings == [1, 2, 1, 1, 2, 2]
    recording.forward(TOKENS[:, :1], lengths=torch.tensor([1, 0]), logits="none")
    assert recordings == [1, 2, 1, 1, 2, 2], "a row that is not read is no step"


def test_a_reading_that_was_stopped_ends_with_the_bits_of_one_that_was_not(model: Model, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_bytes(bytes(TOKENS.flatten().clamp(32, 126).tolist()) * 2)

    def read(name: str, until: int | None = None) -> dict[int, str]:
        store = Store(tmp_path / name, create=True)
        ingest(str(text), model=model, store=store, chunk=40, snapshot_every=40, max_tokens=until)
        return {store.get(listed.id).tokens: listed.id for listed in store.list()}

    whole = read("whole")
    assert sorted(whole) == [40, 80, 120, 148]
    assert sorted(read("stopped", 65)) == [40, 65]
    assert whole.items() <= read("stopped").items()
