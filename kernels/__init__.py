"""How the recurrence is computed: which backends there are, which of them works here, and which one serves.

Importing this package loads no library and registers no op; the first use does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.errors import BackendError
from rwkv_stream.extras import missing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Tensors = tuple[Tensor, ...]
    Rows = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]
    Segments = Callable[[Tensors, Tensors, Tensors, Tensor, Tensor, Tensor], tuple[Tensor, Tensors]]

BACKENDS = ("triton", "cpu", "reference")
NUMERICS = 6  # goes up with every change that may change the last bit of a state or a logit

_log = logging.getLogger(__name__)


def available() -> dict[str, str | None]:
    """Backend → None where it can be used on this machine, else the reason why not."""
    return {name: _problem(name) for name in BACKENDS}


def kernel_version(backend: str) -> str | int:
    """Of the kernels of a backend: it is part of what decides the last bits of a state."""
    return f"{NUMERICS}, triton {importlib.metadata.version('triton')}" if backend == "triton" else NUMERICS


@dataclass(frozen=True, slots=True)
class Recurrence:
    """How a backend computes the recurrence of one version.

    rows      (inputs [B, T, ...], constants, state of B rows) → y, new state; the given state is unchanged
    segments  (inputs [n, ...], constants, state of R rows, offsets int64 [S + 1], start int64 [S], keep int64 [K]) → y,
              state of K rows: segment s is made of tokens offsets[s] to offsets[s + 1], one at least, and starts from
              row start[s] of the state; the states of the segments in `keep` come back
    padding   for each input, what it is at a token that leaves the state as it is; None where that does not matter

    Both are differentiable in inputs, constants and state. The gradients of RWKV-7 are the backend's own: in Triton of
    segments, in C++ of rows, to which segments are padded (`reference.segments`) where one is asked for. Calls of
    RWKV-4 to 6 that are asked for a gradient are computed in plain torch, whatever the backend.

    | version | inputs                                     | constants | state               |
    |---------|--------------------------------------------|-----------|---------------------|
    | 4       | w k v, each [B, T, C]                      | u [C]     | num den max, [B, C] |
    | 5, 6    | r w k v, each [B, T, H, N]                 | u [H, N]  | S [B, H, key, value]|
    | 7       | r w k v a b, each [B, T, H, N]             |           | S [B, H, value, key]|
    """

    rows: Rows
    segments: Segments
    padding: tuple[float | None, ...]


PADDING = {4: (0.0, -1e38, 0.0), 6: (None, 0.0, 0.0, 0.0), 7: (None, 0.0, 0.0, 0.0, 0.0, 0.0)}
KERNELS = {"4": 4, "5.0": 6, "5.1": 6, "5.2": 6, "6": 6, "7": 7, "7a": 7}  # version → whose recurrence it has


def resolve(version: str, backend: str, device: torch.device | str) -> tuple[str, Recurrence]:
    """The name and the functions of the backend that computes the recurrence of an RWKV `version` on `device`.

    `backend` is "auto" or one of BACKENDS. "auto" takes the fastest that works and says once if that is not the
    native one; a named backend is used or BackendError says why it cannot be.
    """
    import torch

    kind = torch.device(device).type
    if version not in KERNELS:
        raise BackendError(f"no kernel for RWKV version {version}: expected {', '.join(KERNELS)}")
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend '{backend}': expected one of {', '.join(('auto', *BACKENDS))}")
    if backend == "cpu" and kind != "cpu":
        raise BackendError(f"backend 'cpu' computes on the cpu, found device '{device}'; use --backend triton")
    if backend == "triton" and kind == "cpu" and not _is_interpreted():
        raise BackendError("backend 'triton' computes on a GPU, found device 'cpu'; use --backend cpu")
    number = KERNELS[version]
    if backend == "reference":
        return "reference", _reference(number)
    fastest = "cpu" if kind == "cpu" and backend != "triton" else "triton"
    problem = _problem(fastest)
    if problem is None:
        return fastest, _native(number) if fastest == "cpu" else _triton(number)
    if backend == fastest:
        raise BackendError(problem)
    _say_fallback(problem)
    return "reference", _reference(number)


def _native(number: int) -> Recurrence:
    from rwkv_stream.kernels.recurrence import cpu, reference

    rows, segments = cpu.FORMS[number]
    native = Recurrence(rows, segments, PADDING[number])
    if number != 7:
        return _differentiated_by(_reference(number), native)
    padded = functools.partial(reference.segments, rows, PADDING[number])
    return _differentiated_by(Recurrence(rows, padded, PADDING[number]), native)


def _triton(number: int) -> Recurrence:
    from rwkv_stream.kernels.recurrence import triton

    native = Recurrence(functools.partial(triton.rows, number), triton.SEGMENTS[number], PADDING[number])
    return native if number == 7 else _differentiated_by(_reference(number), native)


def _differentiated_by(differentiable: Recurrence, native: Recurrence) -> Recurrence:
    """The native recurrence; in calls that are asked for a gradient, the differentiable one."""
    import torch

    def of(inputs: Tensors, constants: Tensors, state: Tensors) -> Recurrence:
        is_asked = torch.is_grad_enabled() and any(z.requires_grad for z in (*inputs, *constants, *state))
        return differentiable if is_asked else native

    def rows(inputs: Tensors, constants: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        return of(inputs, constants, state).rows(inputs, constants, state)

    def segments(
        inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensors]:
        return of(inputs, constants, state).segments(inputs, constants, state, offsets, start, keep)

    return Recurrence(rows, segments, native.padding)


def _is_interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, as the tests let them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _reference(number: int) -> Recurrence:
    """Plain torch: the form over blocks, or for a single token the recurrence itself."""
    import torch

    from rwkv_stream.kernels.recurrence import reference

    recurrent, chunked = reference.FORMS[number]

    def rows(inputs: Tensors, constants: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
        form = recurrent if inputs[0].shape[1] == 1 else chunked
        with torch.autocast(inputs[0].device.type, enabled=False):  # which would round decays
            y, *new = form(*inputs, *constants, *state)
        return y, tuple(new)

    return Recurrence(rows, functools.partial(reference.segments, rows, PADDING[number]), PADDING[number])


def _problem(name: str) -> str | None:
    if name == "reference":
        return None
    if name == "triton":
        return _problem_of_triton()
    from rwkv_stream.kernels import native

    try:
        native.library()
    except BackendError as error:
        return str(error)
    return None


def _problem_of_triton() -> str | None:
    import torch

    if importlib.util.find_spec("triton") is None:
        return f"cannot use the GPU kernels: {missing('triton', 'gpu')}"
    if not torch.cuda.is_available() and not _is_interpreted():
        return f"cannot use the GPU kernels: found no GPU that torch {torch.__version__} can use"
    return None


@functools.cache
def _say_fallback(problem: str) -> None:
    _log.warning("using the plain torch kernels: %s", problem)
