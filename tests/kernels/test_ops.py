"""The three ops of reading RWKV-7 on a CPU, by every instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import official_weights, save
from torch import Tensor

import rwkv_stream as rs
from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels import KERNELS, available
from rwkv_stream.kernels.layers import cpu, reference
from rwkv_stream.kernels.layers.cpu import INSTRUCTION_SETS, Weight, linear, norm_shift_mix, time_mix
from rwkv_stream.model.state import State

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(available()["cpu"] is not None, reason=f"no C++ kernels: {available()['cpu']}"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
GUARD = 7


@pytest.fixture(params=[*INSTRUCTION_SETS, "amx_bf16 in software"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The highest that may be used; what the processor lacks falls back to the next lower one."""
    number = [*INSTRUCTION_SETS, "amx_bf16 in software"].index(request.param)
    monkeypatch.setattr(cpu, "instruction_set", lambda: number)
    return number


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """NaN of this shape between bands of NaN, and the whole."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
    return whole[GUARD : GUARD + size].view(shape), whole


def is_guard_whole(whole: Tensor) -> bool:
    return bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all())


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


# ---- linear ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "rows", "columns"),
    [(1, 1, 1), (2, 31, 5), (5, 33, 64), (12, 32, 2), (13, 65, 127), (97, 7, 33), (200, 96, 96)],
)
def test_linear(instructions: int, dtype: torch.dtype, n: int, rows: int, columns: int) -> None:
    matrix = random(rows, columns) if dtype == torch.float32 else random(rows, columns).bfloat16()
    weight = Weight.packed(matrix, dtype)
    x = random(n, columns, seed=1).to(weight.input_dtype)
    exact = x.double() @ weight.matrix().double().T
    y, whole = guarded(n, rows)
    linear(x, weight, y)
    assert off(y, exact) < 1e-5
    assert is_guard_whole(whole)
    wanted = torch.empty(n, rows)
    reference.linear(x, weight.panels, weight.scales, rows, "none", False, wanted)
    assert off(wanted, exact) < 1e-5


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
def test_activations(instructions: int, activation: str, out: torch.dtype) -> None:
    weight, x = Weight.packed(5 * random(45, 20)), random(17, 20, seed=1)
    x[3], x[4] = torch.nan, 1e30  # far out as well
    y, whole = guarded(17, 45, dtype=out)
    linear(x, weight, y, activation)
    wanted = torch.empty(17, 45, dtype=out)
    reference.linear(x, weight.panels, None, 45, activation, False, wanted)
    torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-2 if out == torch.bfloat16 else 1e-5, atol=1e-6)
    assert is_guard_whole(whole)


def test_adding_and_strides(instructions: int) -> None:
    weight = Weight.packed(random(45, 20))
    x, y = random(17, 30, seed=1)[:, :20], random(17, 50, seed=2)
    before = y.clone()
    linear(x, weight, y[:, :45], add=True)
    assert off(y[:, :45] - before[:, :45], x.double() @ weight.matrix().double().T) < 1e-5
    assert torch.equal(y[:, 45:], before[:, 45:])


def strided(z: Tensor) -> Tensor:
    """The same tensor with no axis contiguous."""
    return torch.stack([z, torch.full_like(z, 7)], dim=-1)[..., 0]


def test_other_strides_give_the_same_bits() -> None:
    weight, x = Weight.packed(random(45, 20)), random(17, 20, seed=1)
    wanted = weight(x)
    assert torch.equal(weight(x.T.contiguous().T), wanted)
    assert torch.equal(weight(strided(x)), wanted)
    y = torch.empty(17, 45)
    linear(strided(x), weight, y)
    assert torch.equal(y, wanted)
    with pytest.raises(BackendError, match="contiguous"):
        linear(x, weight, torch.empty(45, 17).T)
    with pytest.raises(BackendError, match=r"\[\.\.\., 20\], found \[20, 17\]"):
        weight(x.T)

    segments, rows, kept = segments_of((3, 1, 5))
    x, norm, mix, x_prev = (
        random(9, 12),
        (random(12, seed=1), random(12, seed=2)),
        random(6, 12, seed=3),
        random(rows, 12),
    )
    deltas = [random(9, 12, seed=5 + m) for m in range(6)]
    results = []
    for form in (lambda z: z, strided):
        out, last = torch.empty(6, 9, 12), torch.empty(kept, 12)
        given = [tuple(map(form, z)) if isinstance(z, list | tuple) else form(z) for z in (norm, mix, deltas, x_prev)]
        norm_shift_mix(form(x), *given, tuple(map(form, segments)), out, last)
        results.append((out, last))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))
    with pytest.raises(BackendError, match="contiguous"):
        norm_shift_mix(x, norm, mix, deltas, x_prev, segments, strided(out), last)
    with pytest.raises(BackendError, match="contiguous"):
        norm_shift_mix(x, norm, mix, deltas, x_prev, segments, out, strided(last))

    projections, vectors, state = heads(9, 2, 8, rows, first_layer=False)
    results = []
    for form in (lambda z: z, strided):
        out, new = torch.empty(9, 16), torch.empty(kept, 2, 8, 8)
        given = [list(map(form, projections)), list(map(form, vectors)), 64e-5, form(state)]
        time_mix(*given, tuple(map(form, segments)), out, new)
        results.append((out, new))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*results, strict=True))
    with pytest.raises(BackendError, match="contiguous"):
        time_mix(projections, vectors, 64e-5, state, segments, out, strided(new))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_bits_in_any_call(instructions: int, dtype: torch.dtype) -> None:
    weight = Weight.packed(random(70, 51).bfloat16() if dtype != torch.float32 else random(70, 51), dtype)
    x = random(230, 51, seed=1)
    torch.set_num_threads(1)
    whole = weight(x)
    for n in (1, 2, 11, 12, 13, 96, 97, 229):
        assert torch.equal(weight(x[:n]), whole[:n])
        assert torch.equal(weight(x[-n:]), whole[-n:])
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(weight(x), whole)
        assert torch.equal(weight(x[:1]), whole[:1])


def test_tiles_are_checked_before_they_are_used() -> None:
    """On a processor without AMX the tiles in software, which are right, or another set, which is not far off."""
    if cpu.library().instruction_set(cpu.TILES_IN_SOFTWARE) != cpu.TILES_IN_SOFTWARE:
        pytest.skip("no tiles in software here")
    cpu.check_tiles(cpu.TILES_IN_SOFTWARE)
    cpu.check_tiles(INSTRUCTION_SETS.index("amx_bf16"))


def test_tiles_that_are_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu._linear

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        if arguments[-1] != cpu.TILES_IN_SOFTWARE:
            arguments[6][3, 5] += 0.01

    monkeypatch.setattr(cpu, "_linear", wrong)
    with pytest.raises(BackendError, match="RWKV_STREAM_INSTRUCTIONS=avx512_bf16"):
        cpu.check_tiles(INSTRUCTION_SETS.index("amx_bf16"))


def test_packing_gives_the_matrix_back() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrix = random(37, 19).to(dtype)
        assert torch.equal(Weight.packed(matrix).matrix(), matrix)
    matrix = random(37, 20)
    matrix[5] = 0
    weight = Weight.packed(matrix, torch.int8)
    assert weight.scales is not None
    assert bool(((weight.matrix() - matrix).abs() <= weight.scales[:, None] * 0.5001).all())
    assert weight.panels.abs().amax() == 127


# ---- norm_shift_mix ----

SEGMENTS = ((1,), (0,), (16,), (17, 1), (3, 0, 40, 1, 1, 15), (0, 0, 5, 0), (2049,))


def segments_of(lengths: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], int, int]:
    """Offsets, starts and targets of such segments: states in another order, every third one is not kept."""
    S = len(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    to, kept = torch.full((S,), -1), [s for s in range(S) if s % 3 != 2]
    to[kept] = torch.arange(len(kept)).flip(0)
    return (offsets, torch.arange(S).flip(0), to), S, len(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
@pytest.mark.parametrize("C", [5, 12, 24, 64])
@pytest.mark.parametrize("with_deltas", [False, True])
def test_norm_shift_mix(lengths: tuple[int, ...], C: int, with_deltas: bool, dtype: torch.dtype) -> None:
    segments, rows, kept = segments_of(lengths)
    n = sum(lengths)
    x, norm, mix = 3 * random(n, C) + 1, (random(C, seed=1), random(C, seed=2)), random(6, C, seed=3)
    x_prev = random(rows, 3, C, seed=4)[:, 1]  # as of one layer of a state
    (out, whole), (last, whole_last) = guarded(6, n, C, dtype=dtype), guarded(kept, C)
    deltas = [random(n, C, seed=5 + m) for m in range(6)] if with_deltas else []
    norm_shift_mix(x, norm, mix, deltas, x_prev, segments, out, last)
    wanted, wanted_last = torch.empty(6, n, C).double(), torch.empty(kept, C).double()
    reference.norm_shift_mix(
        x.double(),
        *(z.double() for z in norm),
        mix.double(),
        [z.double() for z in deltas],
        x_prev.double(),
        *segments,
        wanted,
        wanted_last,
    )
    assert off(last, wanted_last) < 1e-5
    if n:
        assert off(out, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert is_guard_whole(whole)
    assert is_guard_whole(whole_last)


# ---- time_mix ----


def heads(n: int, H: int, N: int, rows: int, *, first_layer: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    projections = [random(n, H * N, seed=i) for i in range(6 if first_layer else 8)]
    vectors = [random(H * N, seed=10 + i) for i in range(8)]
    return projections, vectors, random(rows, 2, H, N, N, seed=20)[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
@pytest.mark.parametrize(("H", "N"), [(3, 5), (2, 4), (1, 8), (3, 16), (2, 24), (2, 64)])
@pytest.mark.parametrize("first_layer", [True, False])
def test_time_mix(lengths: tuple[int, ...], H: int, N: int, dtype: torch.dtype, first_layer: bool) -> None:
    segments, rows, kept = segments_of(lengths)
    n = sum(lengths)
    if n > 1000 and (N != 16 or dtype != torch.float32):
        pytest.skip("one long segment is enough")
    projections, vectors, state = heads(n, H, N, rows, first_layer=first_layer)
    (out, whole), (new, whole_new) = guarded(n, H * N, dtype=dtype), guarded(kept, H, N, N)
    time_mix(projections, vectors, 64e-5, state, segments, out, new)
    wanted, wanted_new = torch.empty(n, H * N).double(), torch.empty(kept, H, N, N).double()
    doubles = ([z.double() for z in projections], [z.double() for z in vectors])
    reference.time_mix(*doubles, 64e-5, state.double(), *segments, wanted, wanted_new)
    assert off(new, wanted_new) < 1e-4
    if n:
        assert off(out, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert is_guard_whole(whole)
    assert is_guard_whole(whole_new)


def test_time_mix_does_not_depend_on_calls_and_threads() -> None:
    n, H, N = 150, 3, 16
    projections, vectors, state = heads(n, H, N, 1, first_layer=False)

    def read(first: int, end: int, S: Tensor) -> tuple[Tensor, Tensor]:
        out, new = torch.empty(end - first, H * N), torch.empty(1, H, N, N)
        one = (torch.tensor([0, end - first]), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        time_mix([z[first:end] for z in projections], vectors, 64e-5, S, one, out, new)
        return out, new

    torch.set_num_threads(1)
    whole, end_state = read(0, n, state)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        parts, S = [], state
        for first, end in ((0, 1), (1, 2), (2, 18), (18, 33), (33, 100), (100, 150)):
            out, S = read(first, end, S)
            parts.append(out)
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(S, end_state)


def test_nan_stays_where_it_is() -> None:
    projections, vectors, state = heads(40, 2, 16, 2, first_layer=True)
    projections[2][25, 3] = torch.nan  # v of head 0, in the second segment
    segments, out, new = (
        (torch.tensor([0, 20, 40]), torch.arange(2), torch.arange(2)),
        torch.empty(40, 32),
        torch.empty_like(state),
    )
    time_mix(projections, vectors, 64e-5, state, segments, out, new)
    assert out[:25].isfinite().all()
    assert out[:, 16:].isfinite().all()
    assert out[25:, :16].isnan().all()


# ---- the model ----


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("ops") / "model.safetensors"
    save(official_weights(), made)
    yield made


@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"weights": "int8"}], ids=str)
@pytest.mark.parametrize("version", KERNELS)
def test_a_model_gives_the_same_bits_however_it_is_called(
    version: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Over call sizes, batches, padding, packed segments and threads; and not far from plain torch in fp32."""
    path = save(official_weights(version=version), tmp_path / "model.pth")
    model, reference = rs.load(path, **options), rs.load(path, backend="reference", dtype="fp32")
    ids = torch.randint(model.config.vocab_size, (3, 140), generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    whole, end = model.forward(ids, logits="all")
    wanted, _ = reference.forward(ids, logits="all")
    assert float((whole - wanted).norm() / wanted.norm()) < {"fp32": 1e-5, "bf16": 0.02}.get(
        options.get("dtype", ""), 0.05
    )
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        parts, state = [], None
        for first, last in ((0, 1), (1, 17), (17, 63), (63, 64), (64, 140)):
            logits, state = model.forward(ids[:, first:last], state, logits="all")
            parts.append(logits)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert state is not None
        assert all(torch.equal(state[name], end[name]) for name in end)
    alone, _ = model.forward(ids[1:2], logits="all")
    assert torch.equal(alone[0], whole[1])
    lengths = torch.tensor([140, 0, 33])
    hidden, padded = model.forward(ids, lengths=lengths, logits="none")
    packed, states = model.forward_packed(torch.cat([ids[0], ids[2, :33]]), lengths[[0, 2]], model.zero_state(2))
    assert torch.equal(model.head(hidden[0]), whole[0])
    assert torch.equal(model.head(packed[140:]), whole[2, :33])
    every_second = torch.tensor([0, 9, 2, 9])[::2]
    spread = State({name: strided(tensor) for name, tensor in model.zero_state(3).items()})
    forms = lengths[every_second], every_second, torch.tensor([0, 9, 1])[::2]
    again, kept = model.forward_packed(torch.cat([ids[0], ids[2, :33]]), forms[0], spread, *forms[1:])
    assert torch.equal(again, packed)
    assert torch.equal(model.head(strided(packed)), model.head(packed))
    assert torch.equal(model.head(packed.T.contiguous().T), model.head(packed))
    assert all(torch.equal(kept[name], states[name]) for name in end)
    for name in end:
        assert torch.equal(padded[name][0], end[name][0])
        assert torch.equal(padded[name][1], model.zero_state()[name][0])
        assert torch.equal(padded[name][2], states[name][1])


def test_scratch_suffices_where_the_channel_mix_is_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all matrices the widest decides; behind what was asked for stands a band that nothing may write to."""
    path = save(official_weights(n_embd=256, d_ffn=32), tmp_path / "model.safetensors")
    bands = []

    def scratch(n_bytes: int) -> int:
        whole = torch.full((n_bytes + (1 << 20),), 0xAB, dtype=torch.uint8)
        bands.append((whole, whole[n_bytes:]))
        return whole.data_ptr()

    monkeypatch.setattr(cpu, "scratch", scratch)
    ids = torch.arange(96)[None]
    found, _ = rs.load(path, dtype="fp32").forward(ids, logits="all")
    wanted, _ = rs.load(path, dtype="fp32", backend="reference").forward(ids, logits="all")
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert bands and all(bool((band == 0xAB).all()) for _, band in bands)


def test_int8_is_for_the_native_kernels(path: Path) -> None:
    for options in ({"dtype": "fp32"}, {"backend": "reference"}, {"dtype": "fp16"}):
        with pytest.raises(UsageError, match="int8"):
            rs.load(path, weights="int8", **options)
    with pytest.raises(UsageError, match="weights auto, int8, found 'int4'"):
        rs.load(path, weights="int4")
    assert rs.load(path, weights="int8").numerics(64)["weights"] == "int8"


@pytest.mark.parametrize("name", [*INSTRUCTION_SETS, "mmx"])
def test_instructions_can_be_masked(path: Path, name: str) -> None:
    """Right without the newest ones; a name that is none is refused."""
    code = (
        "import sys, torch, rwkv_stream as rs\n"
        "m = rs.load(sys.argv[1], dtype='bf16')\n"
        "r = rs.load(sys.argv[1], dtype='fp32', backend='reference')\n"
        "ids = torch.arange(40)[None] % m.config.vocab_size\n"
        "x, y = m.forward(ids, logits='all')[0], r.forward(ids, logits='all')[0]\n"
        "print(float((x - y).norm() / y.norm()) < 0.02, m.numerics(1)['instructions'])\n"
    )
    environment = {**os.environ, "RWKV_STREAM_INSTRUCTIONS": name}
    ended = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
    if name in INSTRUCTION_SETS:
        assert ended.stderr == ""
        right, found = ended.stdout.split()
        assert right == "True"
        assert INSTRUCTION_SETS.index(found) <= INSTRUCTION_SETS.index(name)
    else:
        assert "RWKV_STREAM_INSTRUCTIONS: expected one of" in ended.stderr
