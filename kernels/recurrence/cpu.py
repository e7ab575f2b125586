"""The C++ form of the recurrences: float32, any shape, threads over tiles of heads; that of RWKV-7 backward, too.

The recurrence of RWKV-7 (`csrc/wkv.cpp`) is wrapped as `torch.library` ops with fake implementations and gradients (of
the state too), as training needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError
from rwkv_stream.kernels.native import library, once

Tensors = tuple[Tensor, ...]

_NAMES = {4: "w k v u num den max", 6: "r w k v u state", 7: "r w k v a b state"}


def _pointers(tensors: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y, new state, and for the backward pass exp(w), S a, and states between blocks (empty unless `keep`)."""
    B, T, H, N = r.shape
    inputs = tuple(z.contiguous() for z in (r, w, k, v, a, b, state))
    decay, y, new_state = torch.empty_like(inputs[1]), torch.empty_like(inputs[0]), torch.empty_like(inputs[6])
    offsets = torch.arange(0, B * T + 1, T)
    if not keep:
        _run(offsets, inputs, (None, None), (decay, y, new_state, None, None))
        return y, new_state, r.new_empty(0), r.new_empty(0), r.new_empty(0)
    sa, states = torch.empty_like(y), y.new_empty(B, library().wkv7_kept(T), H, N, N)
    _run(offsets, inputs, (None, None), (decay, y, new_state, sa, states))
    return y, new_state, decay, sa, states


def _run(
    offsets: Tensor,
    inputs: tuple[Tensor, ...],
    rows: tuple[Tensor | None, Tensor | None],
    outputs: tuple[Tensor | None, ...],
    version: int = 7,
) -> None:
    """Call wkv6_forward or wkv7_forward: offsets int64 [S + 1]; inputs [n, H, N], u, and the state; `from`, `to`;
    decay, y, state, and of RWKV-7 sa and the states that are kept."""
    H, N = inputs[0].shape[-2:]
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library().wkv7_scratch(N, 0))
    tensors = _pointers((*inputs, *rows, *outputs, scratch))
    forward = library().wkv7_forward if version == 7 else library().wkv6_forward
    forward(len(offsets) - 1, offsets.data_ptr(), H, N, threads, *tensors)


def _backward(
    r: Tensor,
    decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    sa: Tensor,
    states: Tensor,
    dy: Tensor,
    d_new_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of r, w, k, v, a, b and the state."""
    B, T, H, N = r.shape
    inputs = tuple(z.contiguous() for z in (r, decay, k, v, a, b, sa, states, dy, d_new_state))
    dr, dw, dk, dv, da, db = (torch.empty_like(inputs[0]) for _ in range(6))
    d_state = torch.empty_like(inputs[9])
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * library().wkv7_scratch(N, 1))
    outputs = (dr, dw, dk, dv, da, db, d_state)
    library().wkv7_backward(B, T, H, N, threads, *_pointers((*inputs, *outputs, scratch)))
    return outputs


def _register() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Register the ops; `rwkv_stream::wkv7_forward` is differentiable where `keep` is true."""
    forward = torch.library.custom_op("rwkv_stream::wkv7_forward", _forward, mutates_args=(), device_types="cpu")
    backward = torch.library.custom_op("rwkv_stream::wkv7_backward", _backward, mutates_args=(), device_types="cpu")

    @forward.register_fake
    def _(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        B, T, H, N = r.shape
        of_tokens, of_states = ((B, T, H, N), (B, library().wkv7_kept(T), H, N, N)) if keep else ((0,), (0,))
        y, new_state = torch.empty(r.shape), torch.empty(state.shape)
        return y, new_state, torch.empty(of_tokens), torch.empty(of_tokens), torch.empty(of_states)

    @backward.register_fake
    def _(
        r: Tensor,
        decay: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        sa: Tensor,
        states: Tensor,
        dy: Tensor,
        d_new_state: Tensor,
    ) -> tuple[Tensor, ...]:
        return *(torch.empty(r.shape) for _ in range(6)), torch.empty(d_new_state.shape)

    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
    ) -> None:
        r, _, k, v, a, b, _, _ = inputs
        _, _, decay, sa, states = output
        ctx.mark_non_differentiable(decay, sa, states)
        ctx.save_for_backward(r, decay, k, v, a, b, sa, states)

    def gradients(
        ctx: torch.autograd.Function, dy: Tensor, d_new_state: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        return *backward(*ctx.saved_tensors, dy, d_new_state), None

    forward.register_autograd(gradients, setup_context=setup_context)
    return forward


_op: Callable[[], Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]] = once(_register)


def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-7 recurrence over T tokens, as `reference.wkv7_recurrent` defines it.

    r w k v a b : [B, T, H, N] fp32 on the CPU, w is log-decay, w <= 0
    state       : [B, H, N value, N key] fp32, read only
    returns     : y [B, T, H, N] and the new state, both fp32 and new
    raises      : BackendError for other shapes, dtypes or devices
    """
    if r.ndim != 4 or r.shape[1] < 1:
        raise BackendError(f"cannot run the C++ recurrence: expected r as [B, T >= 1, H, N], found {list(r.shape)}")
    _check(7, (r, w, k, v, a, b), (), (state,), len(r))
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in (r, w, k, v, a, b, state))
    y, new_state, *_ = _op()(r, w, k, v, a, b, state, keep)
    return y, new_state


def _rows7(inputs: Tensors, constants: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
    y, new_state = wkv7(*inputs, *state)
    return y, (new_state,)


def _segments(
    version: int, inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
) -> tuple[Tensor, Tensors]:
    """As `kernels.Recurrence` defines it, without gradients; the bits of a segment are as if alone.

    Raises BackendError as `wkv7`.
    """
    _check(version, inputs, constants, state, len(state[0]))
    to = torch.full((len(offsets) - 1,), -1)
    to[keep] = torch.arange(len(keep))
    return _forward_only(version, inputs, constants, state, offsets, (start.contiguous(), to), len(keep))


def _rows(version: int, inputs: Tensors, constants: Tensors, state: Tensors) -> tuple[Tensor, Tensors]:
    """Rows of equal length as segments, without gradients. Raises BackendError as `wkv7`."""
    B, T = inputs[0].shape[:2]
    _check(version, inputs, constants, state, B)
    flat = tuple(z.flatten(0, 1) for z in inputs)
    y, new = _forward_only(version, flat, constants, state, torch.arange(0, B * T + 1, T), (None, None), B)
    return y.view(B, T, *y.shape[1:]), new


def _forward_only(
    version: int,
    inputs: Tensors,
    constants: Tensors,
    state: Tensors,
    offsets: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    n_kept: int,
) -> tuple[Tensor, Tensors]:
    given = tuple(z.contiguous() for z in (*inputs, *constants))
    y = torch.empty_like(given[0])
    if version == 4:
        joined = torch.stack(state, dim=1)  # [R, 3, C]
        new_state = joined.new_empty(n_kept, *joined.shape[1:])
        tensors = _pointers((*given, joined, *rows, y, new_state))
        library().wkv4_forward(len(offsets) - 1, offsets.data_ptr(), y.shape[-1], torch.get_num_threads(), *tensors)
        return y, new_state.unbind(1)
    new_state = state[0].new_empty(n_kept, *state[0].shape[1:])
    outputs = (torch.empty_like(y), y, new_state) + ((None, None) if version == 7 else ())
    _run(offsets, (*given, state[0].contiguous()), rows, outputs, version)
    return y, (new_state,)


def _check(version: int, inputs: Tensors, constants: Tensors, state: Tensors, rows: int) -> None:
    """Raise BackendError unless these are inputs of one shape, constants and a state of so many rows."""
    first = inputs[0]
    per_row = first.shape[-1:] if version == 4 else (*first.shape[-2:], first.shape[-1])
    expected = [tuple(first.shape)] * len(inputs)
    expected += [tuple(first.shape[-1:] if version == 4 else first.shape[-2:])] * len(constants)
    expected += [(rows, *per_row)] * len(state)
    for name, tensor, shape in zip(_NAMES[version].split(), (*inputs, *constants, *state), expected, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise BackendError(
                f"cannot run the C++ recurrence: expected {name} as float32 {list(shape)} on the cpu, "
                f"found {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
            )


FORMS = {  # version → over rows, over segments
    4: (functools.partial(_rows, 4), functools.partial(_segments, 4)),
    6: (functools.partial(_rows, 6), functools.partial(_segments, 6)),
    7: (_rows7, functools.partial(_segments, 7)),
}
