"""The C++ form of the recurrence: float32, any shape, forward and backward, threads over tiles of heads.

The library (`csrc/wkv7.cpp`) is found beside this module, loaded on first use and wrapped as `torch.library` ops
with fake implementations and gradients (of the state too). It is linked to no OpenMP runtime and binds the one that
torch has loaded, so that a process holds one runtime and one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError

ABI_VERSION = 3
LIBRARY = "librwkv_stream_cpu.so"

_OPENMP = re.compile(r"(/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*)$", re.MULTILINE)
_INPUTS = ("r", "w", "k", "v", "a", "b")


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process. Raises BackendError where they cannot be listed."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise BackendError(f"cannot look for torch's OpenMP runtime: {error}; use --backend reference") from error
    return sorted(set(_OPENMP.findall(maps)))


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendError with the reason where it is missing, broken or another version."""
    path = importlib.resources.files("rwkv_stream.kernels") / LIBRARY
    if not path.is_file():
        raise BackendError(
            f"cannot load the C++ kernels: expected '{path}', found no such file; "
            "install with a C++ compiler at hand (RWKV_STREAM_NATIVE=1 shows why one fails) or use --backend reference"
        )
    runtimes = openmp_runtimes()
    if len(runtimes) != 1:
        raise BackendError(
            "cannot load the C++ kernels: expected one OpenMP runtime in the process (torch's), "
            f"found {', '.join(runtimes) or 'none'}; use --backend reference"
        )
    try:
        ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"cannot load the C++ kernels from '{path}': {error}; use --backend reference") from error
    found = loaded.abi_version()
    if found != ABI_VERSION:
        raise BackendError(
            f"cannot use the C++ kernels in '{path}': expected interface {ABI_VERSION}, found {found}; install again"
        )
    size, pointer, integer = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    loaded.wkv7_scratch.argtypes, loaded.wkv7_scratch.restype = [size, size, integer], size
    loaded.wkv7_forward.argtypes = [size, pointer, size, size, integer, *[pointer] * 14]
    loaded.wkv7_forward.restype = None
    loaded.wkv7_backward.argtypes, loaded.wkv7_backward.restype = [size] * 4 + [integer] + [pointer] * 19, None
    return loaded


def _pointers(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, new state, and for the backward pass exp(w) and S a (empty unless `keep`)."""
    B, T, _, _ = r.shape
    inputs = tuple(z.contiguous() for z in (r, w, k, v, a, b, state))
    decay, y, new_state = torch.empty_like(inputs[1]), torch.empty_like(inputs[0]), torch.empty_like(inputs[6])
    sa = torch.empty_like(inputs[0]) if keep else None
    _run(torch.arange(0, B * T + 1, T), inputs, (None, None), (decay, y, new_state, sa))
    return y, new_state, decay if keep else r.new_empty(0), r.new_empty(0) if sa is None else sa


def _run(
    offsets: Tensor,
    inputs: tuple[Tensor, ...],
    rows: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
) -> None:
    """Call wkv7_forward: offsets int64 [S + 1]; inputs [..., H, N] and the state; `from`, `to`; decay, y, state, sa."""
    H, N = inputs[0].shape[-2:]
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library().wkv7_scratch(1, N, 0))
    tensors = _pointers((*inputs, *rows, *outputs, scratch))
    library().wkv7_forward(len(offsets) - 1, offsets.data_ptr(), H, N, threads, *tensors)


def _backward(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    sa: Tensor,
    dy: Tensor,
    d_new_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of r, w, k, v, a, b and the state."""
    B, T, H, N = r.shape
    inputs = tuple(z.contiguous() for z in (r, decay, k, v, a, b, state, sa, dy, d_new_state))
    dr, dw, dk, dv, da, db, dsa = (torch.empty_like(inputs[0]) for _ in range(7))
    d_state = torch.empty_like(inputs[6])
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library().wkv7_scratch(T, N, 1))
    outputs = (dr, dw, dk, dv, da, db, d_state)
    library().wkv7_backward(B, T, H, N, threads, *_pointers((*inputs, *outputs, dsa, scratch)))
    return outputs


@functools.cache
def _op() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Register the ops, once; `rwkv_stream::wkv7_forward` is differentiable where `keep` is true."""
    forward = torch.library.custom_op("rwkv_stream::wkv7_forward", _forward, mutates_args=(), device_types="cpu")
    backward = torch.library.custom_op("rwkv_stream::wkv7_backward", _backward, mutates_args=(), device_types="cpu")

    @forward.register_fake
    def _(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept = (torch.empty(r.shape), torch.empty(r.shape)) if keep else (r.new_empty(0), r.new_empty(0))
        return torch.empty(r.shape), torch.empty(state.shape), *kept

    @backward.register_fake
    def _(
        r: Tensor,
        decay: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor,
        sa: Tensor,
        dy: Tensor,
        d_new_state: Tensor,
    ) -> tuple[Tensor, ...]:
        return *(torch.empty(r.shape) for _ in range(6)), torch.empty(state.shape)

    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
    ) -> None:
        r, _, k, v, a, b, state, _ = inputs
        _, _, decay, sa = output
        ctx.mark_non_differentiable(decay, sa)
        ctx.save_for_backward(r, decay, k, v, a, b, state, sa)

    def gradients(
        ctx: torch.autograd.Function, dy: Tensor, d_new_state: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *backward(*ctx.saved_tensors, dy, d_new_state), None

    forward.register_autograd(gradients, setup_context=setup_context)
    return forward


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-7 recurrence over T tokens, as `wkv_ref.wkv7_recurrent` defines it.

    r w k v a b : [B, T, H, N] fp32 on the CPU, w is log-decay, w <= 0
    state       : [B, H, N value, N key] fp32, read only
    returns     : y [B, T, H, N] and the new state, both fp32 and new
    raises      : BackendError for other shapes, dtypes or devices
    """
    if r.ndim != 4 or r.shape[1] < 1:
        raise BackendError(f"cannot run the C++ recurrence: expected r as [B, T >= 1, H, N], found {list(r.shape)}")
    _check((r, w, k, v, a, b, state), r.shape[0])
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in (r, w, k, v, a, b, state))
    y, new_state, _, _ = _op()(r, w, k, v, a, b, state, keep)
    return y, new_state


def wkv7_packed(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    state: Tensor,
    start: Tensor,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same over segments laid end to end, as `kernels.packed` defines it; the bits of a segment are as if alone."""
    _check((r, w, k, v, a, b, state), len(state))
    inputs = tuple(z.contiguous() for z in (r, w, k, v, a, b, state))
    decay, y = torch.empty_like(inputs[1]), torch.empty_like(inputs[0])
    new_state = state.new_empty(len(keep), *state.shape[1:])
    to = torch.full((len(offsets) - 1,), -1)
    to[keep] = torch.arange(len(keep))
    _run(offsets, inputs, (start.contiguous(), to), (decay, y, new_state, None))
    return y, new_state


def _check(tensors: tuple[Tensor, ...], rows: int) -> None:
    """Raise BackendError unless these are r w k v a b of one shape and a state of so many rows."""
    r = tensors[0]
    for name, tensor in zip((*_INPUTS, "state"), tensors, strict=True):
        expected = (rows, *r.shape[-2:], r.shape[-1]) if name == "state" else tuple(r.shape)
        if tuple(tensor.shape) != expected or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise BackendError(
                f"cannot run the C++ recurrence: expected {name} as float32 {list(expected)} on the cpu, "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
            )
