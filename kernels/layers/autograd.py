"""What training RWKV-7 on a CPU computes between its products: the C++ kernels of `csrc/training.cpp`, with gradients.

The n tokens are S segments laid end to end, of which `offsets` int64 [S + 1] says where each begins. Inputs are fp32 or
bf16 as the products that made them, results what the next products read; everything is computed in fp32. `reference`
says what `norm_shift_mix` and `time_mix` compute. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_stream.kernels.layers import LAYER_NORM_EPS, cpu
from rwkv_stream.kernels.native import library

BLOCK_TOKENS = 64  # of a partial sum, as `csrc/training.cpp` has it


def norm_shift_mix(
    x: Tensor, norm: tuple[Tensor, Tensor], mix: Tensor, x_prev: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor]:
    """M tensors [n, C] of a dtype from x fp32 [n, C] and mix [M, C]; x_prev [S, C] is the norm before each segment.

    Beside them the norm of each segment's last token [S, C], from which no gradient comes back.
    """
    *mixed, last = _NormShiftMix.apply(x, *norm, mix, x_prev, offsets, dtype)  # type: ignore[no-untyped-call]
    return tuple(mixed), last


def time_mix(
    projections: Sequence[Tensor], vectors: Sequence[Tensor], eps: float, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The input of the output matrix [n, C], and the new state: projections and vectors as `reference.time_mix` have
    them, each projection [n, C] of one dtype; state fp32 [S, H, N, N], that before each segment.
    """
    out: tuple[Tensor, Tensor] = _TimeMix.apply(eps, offsets, state, *vectors, *projections)  # type: ignore[no-untyped-call]
    return out


def relu2(z: Tensor) -> Tensor:
    """relu(z)²."""
    y: Tensor = _Relu2.apply(z)  # type: ignore[no-untyped-call]
    return y


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Cross-entropy of each row of logits [n, V], fp32 [n]; in their place its gradient times `scale`."""
    (n, V), threads = logits.shape, torch.get_num_threads()
    losses, scratch = torch.empty(n), torch.empty(threads * V)
    given = (n, V, _is_narrow(logits), targets.data_ptr(), scale, logits.data_ptr(), losses.data_ptr())
    library().softmax_gradient(*given, threads, scratch.data_ptr())
    return losses


def _is_narrow(z: Tensor) -> bool:
    return z.dtype == torch.bfloat16


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if z is None else z.data_ptr() for z in tensors]


class _NormShiftMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mix: Tensor,
        x_prev: Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        x, x_prev, rows = x.contiguous(), x_prev.contiguous(), torch.arange(len(x_prev))
        out, last = x.new_empty(len(mix), *x.shape, dtype=dtype), torch.empty_like(x_prev)
        cpu.norm_shift_mix(x, (weight, bias), mix, (), x_prev, (offsets, rows, rows), out, last)
        ctx.save_for_backward(x, weight, bias, mix, x_prev, offsets)
        ctx.mark_non_differentiable(last)
        return *out.unbind(), last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mix, x_prev, offsets = ctx.saved_tensors
        C, S, threads = x.shape[1], len(x_prev), torch.get_num_threads()
        d_out = tuple(z.contiguous() for z in gradients[:-1])
        blocks = torch.zeros_like(offsets)
        torch.cumsum((offsets.diff() + BLOCK_TOKENS - 1) // BLOCK_TOKENS, 0, out=blocks[1:])
        dx, d_x_prev = torch.empty_like(x), torch.empty_like(x_prev)
        sums, scratch = x.new_empty(int(blocks[-1]), 2 + len(mix), C), x.new_empty(threads * 6 * C)
        pointers = (ctypes.c_void_p * len(d_out))(*(z.data_ptr() for z in d_out))
        library().norm_shift_mix_backward(
            *(S, *_pointers((offsets, blocks)), C, len(mix), _is_narrow(d_out[0]), LAYER_NORM_EPS),
            *_pointers((x, weight, bias, mix, x_prev)),
            *(pointers, *_pointers((dx, d_x_prev, sums)), threads, scratch.data_ptr()),
        )
        d_weight, d_bias, *d_mix = sums.sum(0)
        return dx, d_weight, d_bias, torch.stack(d_mix), d_x_prev, None, None


class _Given(ctypes.Structure):
    _fields_ = (*((f"pointer_{i}", ctypes.c_void_p) for i in range(16)), ("eps", ctypes.c_float))


class _TimeMix(torch.autograd.Function):
    N_VECTORS = 8

    @staticmethod
    def forward(ctx: Any, eps: float, offsets: Tensor, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        tensors = tuple(z.contiguous() for z in tensors)
        vectors, projections = tensors[: _TimeMix.N_VECTORS], tensors[_TimeMix.N_VECTORS :]
        state, r = state.contiguous(), projections[0]
        (S, H, N, _), threads = state.shape, torch.get_num_threads()
        out, new_state = torch.empty_like(r), torch.empty_like(state)
        sa, y = state.new_empty(2, *r.shape)
        states = state.new_empty(library().time_mix_kept(len(r), S), H, N, N)
        scratch = state.new_empty(threads * library().time_mix_training_scratch(N))
        library().time_mix_forward(
            *(S, offsets.data_ptr(), H, N, ctypes.byref(_given(projections, vectors, eps)), _is_narrow(r)),
            *_pointers((state, new_state, sa, y, states, out)),
            *(threads, scratch.data_ptr()),
        )
        ctx.save_for_backward(sa, y, states, offsets, *tensors)
        ctx.eps = eps
        return out, new_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sa, y, states, offsets, *tensors = ctx.saved_tensors
        vectors, projections = tensors[: _TimeMix.N_VECTORS], tensors[_TimeMix.N_VECTORS :]
        d_out, d_new_state = (z.contiguous() for z in gradients)
        S, (H, N), threads = len(offsets) - 1, states.shape[1:3], torch.get_num_threads()
        d_projections = [torch.empty_like(z) for z in projections]
        sums, d_state = y.new_empty(S, _TimeMix.N_VECTORS, H * N), y.new_empty(S, H, N, N)
        scratch = y.new_empty(threads * library().time_mix_training_scratch(N))
        outputs = (ctypes.c_void_p * 8)(*(z.data_ptr() for z in d_projections))
        library().time_mix_backward(
            *(S, offsets.data_ptr(), H, N),
            *(ctypes.byref(_given(projections, vectors, ctx.eps)), _is_narrow(projections[0])),
            *_pointers((sa, y, states, d_out, d_new_state)),
            *(outputs, sums.data_ptr(), d_state.data_ptr(), threads, scratch.data_ptr()),
        )
        d_vectors = [None if z is None else d.view(z.shape) for z, d in zip(vectors, sums.sum(0).unbind(), strict=True)]
        return None, None, d_state, *d_vectors, *d_projections


def _given(projections: Sequence[Tensor], vectors: Sequence[Tensor], eps: float) -> _Given:
    none = [None] * (8 - len(projections))
    return _Given(*_pointers((*projections, *none, *vectors)), eps)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z = z.contiguous()
        ctx.save_for_backward(z)
        return _relu2(z, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _relu2(ctx.saved_tensors[0], gradients[0].contiguous())


def _relu2(z: Tensor, dy: Tensor | None) -> Tensor:
    y = torch.empty_like(z)
    library().relu2(z.numel(), _is_narrow(z), *_pointers((z, dy, y)), torch.get_num_threads())
    return y
