"""What RWKV-7 is read with on a CPU: products with packed matrices, what lies between them, and all layers in one call.

`rwkv_stream::linear`, `::norm_shift_mix` and `::time_mix` are `torch.library` ops without gradients that write into
given tensors; on the CPU they are the C++ kernels (`csrc/linear.cpp`, `csrc/rwkv7.cpp`), elsewhere the plain torch of
`reference`, which also says what they compute. A row's result is the same bits whatever the call that it is in and the
number of threads. `rwkv7_layers` composes them in C++: a call of Python for each would cost more than the rest of a
token.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels.layers import LAYER_NORM_EPS, reference
from rwkv_stream.kernels.memory import pages
from rwkv_stream.kernels.native import library, once

PANEL = 32
PANELS_AT_ONCE = 64  # while packing: a head has thousands
ACTIVATIONS = tuple(reference.ACTIVATIONS)  # in the order of `csrc/products.h`
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
TILES_IN_SOFTWARE = len(INSTRUCTION_SETS)  # AMX for tests, on any x86-64
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_SCHEMAS = (
    "linear(Tensor x, Tensor panels, Tensor? scales, int rows, str activation, bool add, Tensor(a!) y) -> ()",
    "norm_shift_mix(Tensor x, Tensor weight, Tensor bias, Tensor mix, Tensor[] deltas, Tensor x_prev, Tensor offsets, "
    "Tensor start, Tensor to, Tensor(a!) out, Tensor(b!) last) -> ()",
    "time_mix(Tensor[] projections, Tensor[] vectors, float eps, Tensor state, Tensor offsets, Tensor start, "
    "Tensor to, Tensor(a!) out, Tensor(b!) new_state) -> ()",
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A matrix [rows, columns] in panels of 32 rows, as `csrc/linear.cpp` reads it.

    panels  fp32 [P, columns, 32, 1], bf16 or int8 [P, pairs of columns, 32, 2], filled up with zeros to whole panels
            and to multiples of 16 columns or pairs
    scales  fp32 [rows] of int8 panels: the matrix is scales * int8, its largest in each row 127
    """

    panels: Tensor
    scales: Tensor | None
    shape: tuple[int, int]

    @staticmethod
    def packed(matrix: Tensor, dtype: torch.dtype | None = None) -> Weight:
        """Pack `matrix` [rows, columns] of fp32 or bf16 as it is, or quantized to int8."""
        rows, columns = matrix.shape
        dtype, n_panels = dtype or matrix.dtype, -(-rows // PANEL)
        if dtype not in KINDS or (dtype != torch.int8 and matrix.dtype != dtype):
            raise BackendError(f"packing a matrix: expected fp32, bf16 or int8, found {matrix.dtype} for {dtype}")
        step, multiple = (1, 16) if dtype == torch.float32 else (2, 32)
        steps = -(-columns // multiple) * multiple // step
        panels = pages(n_panels, steps, PANEL, step, dtype=dtype)
        scales = torch.empty(rows) if dtype == torch.int8 else None
        for first in range(0, n_panels, PANELS_AT_ONCE):
            part = matrix[first * PANEL : (first + PANELS_AT_ONCE) * PANEL]
            if scales is not None:
                scale = scales[first * PANEL : first * PANEL + len(part)]
                part = part.float()
                torch.div(part.abs().amax(1), 127, out=scale)
                part = (part / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(dtype)
            whole = part.new_zeros(-(-len(part) // PANEL) * PANEL, steps * step)
            whole[: len(part), :columns] = part
            panels[first : first + PANELS_AT_ONCE] = whole.view(-1, PANEL, steps, step).transpose(1, 2)
        return Weight(panels, scales, (rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.panels.dtype

    @property
    def input_dtype(self) -> torch.dtype:
        """Of what it is multiplied with."""
        return torch.float32 if self.dtype == torch.float32 else torch.bfloat16

    @property
    def fields(self) -> list[int]:
        """As `csrc/products.h` has `Matrix`."""
        scales = 0 if self.scales is None else self.scales.data_ptr()
        return [self.panels.data_ptr(), scales, *self.shape, KINDS[self.dtype]]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def matrix(self) -> Tensor:
        """The matrix [rows, columns] itself, in `input_dtype`; int8 as the numbers that it stands for, in fp32."""
        rows, columns = self.shape
        matrix = self.panels.transpose(1, 2).reshape(-1, self.panels.shape[1] * self.panels.shape[3])[:rows, :columns]
        return matrix if self.scales is None else matrix.float() * self.scales[:, None]

    def __call__(self, x: Tensor, activation: str = "none", dtype: torch.dtype = torch.float32) -> Tensor:
        """activation(the matrix times x [..., columns]) as `dtype` [..., rows]; x is rounded to `input_dtype`."""
        if x.shape[-1] != self.shape[1]:
            raise BackendError(f"multiplying: expected x as [..., {self.shape[1]}], found {list(x.shape)}")
        given = x.to(self.input_dtype).reshape(-1, self.shape[1])
        y = given.new_empty(len(given), self.shape[0], dtype=dtype)
        linear(given, self, y, activation)
        return y.view(*x.shape[:-1], self.shape[0])


def linear(x: Tensor, weight: Weight, y: Tensor, activation: str = "none", *, add: bool = False) -> None:
    """y = activation(weight x), or y += it: x [n, columns] of `weight.input_dtype`, y [n, rows] fp32 or bf16."""
    _ops().linear(x, weight.panels, weight.scales, weight.shape[0], activation, add, y)


def norm_shift_mix(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    mix: Tensor,
    deltas: Sequence[Tensor],
    x_prev: Tensor,
    segments: Sequence[Tensor],
    out: Tensor,
    last: Tensor,
) -> None:
    """out[m] = h + (h of the token before - h) (mix[m] + deltas[m]), h = LayerNorm(x), as in `reference`."""
    _ops().norm_shift_mix(x, *norm, mix, deltas, x_prev, *segments, out, last)


def time_mix(
    projections: Sequence[Tensor],
    vectors: Sequence[Tensor],
    eps: float,
    state: Tensor,
    segments: Sequence[Tensor],
    out: Tensor,
    new_state: Tensor,
) -> None:
    """Everything of RWKV-7's heads from the projections to the input of the output matrix; see `reference.time_mix`."""
    _ops().time_mix(projections, vectors, eps, state, *segments, out, new_state)


VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")
LOW_RANKS = "wagv"


def layer_table(blocks: Sequence[Mapping[str, Any]]) -> Tensor:
    """What `rwkv7_layers` knows of each layer: addresses and sizes, int64 [L, ...] as `csrc/rwkv7.cpp` has `Layer`.

    The blocks are as `v7.prepare` leaves them, every matrix packed; they must live as long as the table.
    """
    table = []
    for i, block in enumerate(blocks):
        vectors = ["ln1.weight", "ln1.bias", "att.mix", "ln2.weight", "ln2.bias", "ffn.mix"]
        vectors += [f"att.{name}" for name in VECTORS]
        row = [0 if i == 0 and name == "att.v0" else block[name].data_ptr() for name in vectors]
        names = [f"att.{name}.weight" for name in ("receptance", "key", "value", "output")]
        names += [f"att.{j}{part}" for part in "12" for j in LOW_RANKS]
        for name in (*names, "ffn.key.weight", "ffn.value.weight"):
            weight: Weight | None = block.get(name)
            if weight is None and (i > 0 or name not in ("att.v1", "att.v2")):
                raise BackendError(f"making a table of layers: layer {i} has no '{name}'")
            row += [0] * 5 if weight is None else weight.fields
        table.append(row)
    return torch.tensor(table)


def rwkv7_layers(
    table: Tensor,
    eps: float,
    x: Tensor,
    state: Sequence[Tensor],
    new_state: Sequence[Tensor],
    segments: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> None:
    """All layers of RWKV-7 on x fp32 [n, C], the residual stream, in place.

    table      by `layer_table`
    state      att_x_prev [R, L, C], att_kv [R, L, H, N, N], ffn_x_prev [R, L, C]; new_state the same of K rows
    segments   as `reference` has them
    buffers    mixed [6, n, C], projections fp32 [8, n, C], ranks [n, their sum], out [n, C] and hidden [n, d_ffn], in
               the dtype that products read; undefined before and after
    """
    offsets, start, to = _contiguous(*segments)
    state = _contiguous(*state)
    _check_written(x, *new_state, *buffers)
    H, N = state[1].shape[2:4]
    threads, widest = torch.get_num_threads(), max(z.shape[-1] for z in buffers)
    room = max(library().linear_scratch(widest), library().time_mix_scratch(N) * 4, 2 * x.shape[1] * 4)
    library().rwkv7_layers(
        len(to),
        offsets.data_ptr(),
        start.data_ptr(),
        to.data_ptr(),
        len(table),
        H,
        N,
        LAYER_NORM_EPS,
        eps,
        table.data_ptr(),
        x.data_ptr(),
        *(z.data_ptr() for z in (*state, *new_state, *buffers)),
        buffers[0].dtype == torch.bfloat16,
        instruction_set(),
        threads,
        scratch(threads * room),
    )


def _register() -> torch._ops._OpNamespace:
    library()
    ops = torch.library.Library("rwkv_stream", "FRAGMENT")  # type: ignore[no-untyped-call]
    native = {"linear": _linear, "norm_shift_mix": _norm_shift_mix, "time_mix": _time_mix}
    for schema in _SCHEMAS:
        name = ops.define(schema)  # type: ignore[no-untyped-call]
        ops.impl(name, getattr(reference, name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        ops.impl(name, native[name], "CPU")  # type: ignore[no-untyped-call]
    _kept.append(ops)  # it takes its ops with it when it goes
    return torch.ops.rwkv_stream


_ops: Callable[[], torch._ops._OpNamespace] = once(_register)


_kept: list[torch.library.Library] = []
_scratch = threading.local()


def scratch(n_bytes: int) -> int:
    """The address of at least so many bytes at a multiple of 64, kept for this thread's next call.

    What is asked for grows with the width of a matrix and the number of threads, never with the length of a call.
    """
    kept: Tensor | None = getattr(_scratch, "tensor", None)
    if kept is None or kept.nbytes < n_bytes:
        _scratch.tensor = kept = torch.empty(n_bytes, dtype=torch.uint8)
    return kept.data_ptr()


@functools.cache
def instruction_set() -> int:
    """What products use, an index of INSTRUCTION_SETS: the newest of the processor's, up to RWKV_STREAM_INSTRUCTIONS.

    Raises UsageError where that is no name of one, BackendError where AMX computes something else than its manual says.
    """
    name = os.environ.get("RWKV_STREAM_INSTRUCTIONS", INSTRUCTION_SETS[-1])
    if name not in INSTRUCTION_SETS:
        raise UsageError(f"RWKV_STREAM_INSTRUCTIONS: expected one of {', '.join(INSTRUCTION_SETS)}, found '{name}'")
    found: int = library().instruction_set(INSTRUCTION_SETS.index(name))
    if INSTRUCTION_SETS[found] == "amx_bf16":
        check_tiles(found)
    return found


def check_tiles(number: int) -> None:
    """Raise BackendError unless the tiles of this instruction set give what those in software do."""
    weight = Weight.packed(torch.linspace(-1, 1, 70 * 100).view(70, 100).bfloat16())
    x = torch.linspace(1, -1, 50 * 100).sin().view(50, 100).bfloat16()
    found, wanted = torch.empty(50, 70), torch.empty(50, 70)
    for limit, y in ((number, found), (TILES_IN_SOFTWARE, wanted)):
        _linear(x, weight.panels, None, 70, "none", False, y, limit)
    if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
        off = float((found - wanted).abs().max())
        raise BackendError(
            f"checking AMX: expected products as its manual says, found them {off:.1e} off; "
            "set RWKV_STREAM_INSTRUCTIONS=avx512_bf16 and report this processor"
        )


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Copies of those that are not; the kernels go by addresses and know no strides."""
    return [z.contiguous() for z in tensors]


def _with_whole_rows(x: Tensor) -> Tensor:
    """x [n, ...], copied unless each of its rows is contiguous; the rows may be apart."""
    return x if _has_whole_rows(x) else x.contiguous()


def _has_whole_rows(x: Tensor) -> bool:
    return len(x) == 0 or x[0].is_contiguous()


def _check_written(*tensors: Tensor, by_rows: bool = False) -> None:
    """Raise BackendError unless these, or by_rows their rows, are contiguous: what a copy gets would be lost."""
    for z in tensors:
        if not (_has_whole_rows(z) if by_rows else z.is_contiguous()):
            raise BackendError(
                f"writing a result: expected a contiguous tensor, found {list(z.shape)} with strides {list(z.stride())}"
            )


def _linear(
    x: Tensor,
    panels: Tensor,
    scales: Tensor | None,
    rows: int,
    activation: str,
    add: bool,
    y: Tensor,
    limit: int | None = None,
) -> None:
    threads, columns = torch.get_num_threads(), x.shape[1]
    x = _with_whole_rows(x)
    _check_written(y, by_rows=True)
    library().linear(
        len(x),
        rows,
        columns,
        KINDS[panels.dtype],
        instruction_set() if limit is None else limit,
        x.data_ptr(),
        x.stride(0),
        panels.data_ptr(),
        None if scales is None else scales.data_ptr(),
        ACTIVATIONS.index(activation),
        y.data_ptr(),
        y.stride(0),
        y.dtype == torch.bfloat16,
        add,
        threads,
        scratch(threads * library().linear_scratch(columns)),
    )


def _norm_shift_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mix: Tensor,
    deltas: Sequence[Tensor],
    x_prev: Tensor,
    offsets: Tensor,
    start: Tensor,
    to: Tensor,
    out: Tensor,
    last: Tensor,
) -> None:
    threads, C = torch.get_num_threads(), x.shape[1]
    x, weight, bias, mix, offsets, start, to, *deltas = _contiguous(x, weight, bias, mix, offsets, start, to, *deltas)
    x_prev = _with_whole_rows(x_prev)
    _check_written(out)
    _check_written(last, by_rows=True)
    library().norm_shift_mix(
        len(to),
        offsets.data_ptr(),
        start.data_ptr(),
        to.data_ptr(),
        C,
        len(mix),
        LAYER_NORM_EPS,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr(),
        mix.data_ptr(),
        (ctypes.c_void_p * len(deltas))(*(z.data_ptr() for z in deltas)) if deltas else None,
        x_prev.data_ptr(),
        x_prev.stride(0),
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        last.data_ptr(),
        last.stride(0),
        threads,
        scratch(threads * 2 * C * 4),
    )


class _TimeMix(ctypes.Structure):
    _fields_ = (*((f"pointer_{i}", ctypes.c_void_p) for i in range(16)), ("eps", ctypes.c_float))


def _time_mix(
    projections: Sequence[Tensor],
    vectors: Sequence[Tensor],
    eps: float,
    state: Tensor,
    offsets: Tensor,
    start: Tensor,
    to: Tensor,
    out: Tensor,
    new_state: Tensor,
) -> None:
    projections, vectors = _contiguous(*projections), _contiguous(*vectors)
    offsets, start, to = _contiguous(offsets, start, to)
    state = _with_whole_rows(state)
    _check_written(out)
    _check_written(new_state, by_rows=True)
    pointers = [z.data_ptr() for z in projections]
    pointers += [0] * (8 - len(pointers))
    threads, (H, N) = torch.get_num_threads(), state.shape[1:3]
    library().time_mix(
        len(to),
        offsets.data_ptr(),
        start.data_ptr(),
        to.data_ptr(),
        H,
        N,
        ctypes.byref(_TimeMix(*pointers, *(z.data_ptr() for z in vectors), eps)),
        state.data_ptr(),
        state.stride(0),
        new_state.data_ptr(),
        new_state.stride(0),
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        threads,
        scratch(threads * library().time_mix_scratch(N) * 4),
    )
