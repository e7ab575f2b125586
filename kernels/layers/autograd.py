"""What training RWKV-7 on a CPU computes between its products: the C++ kernels of `csrc/training.cpp`, with gradients.

Inputs are fp32 or bf16 as the products that made them, results what the next products read; everything is computed in
fp32. `reference` says what `norm_shift_mix` and `time_mix` compute. Results do not depend on the number of threads.
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
    x: Tensor, norm: tuple[Tensor, Tensor], mix: Tensor, x_prev: Tensor, last: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """M tensors [B, T, C] of a dtype from x fp32 [B, T, C] and mix [M, C]; x_prev [B, C] is the norm before each row.

    That of the last tokens is written to `last` [B, C], from which no gradient comes back.
    """
    mixed: tuple[Tensor, ...] = _NormShiftMix.apply(x, *norm, mix, x_prev, last, dtype)  # type: ignore[no-untyped-call]
    return mixed


def time_mix(
    projections: Sequence[Tensor], vectors: Sequence[Tensor], eps: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The input of the output matrix [B, T, C], and the new state: projections and vectors as `reference.time_mix` have
    them, each projection [B, T, C] of one dtype; state fp32 [B, H, N, N].
    """
    out: tuple[Tensor, Tensor] = _TimeMix.apply(eps, state, *vectors, *projections)  # type: ignore[no-untyped-call]
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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, x_prev: Tensor, last: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        (B, T, C), x = x.shape, x.contiguous()
        out, rows = x.new_empty(len(mix), B, T, C, dtype=dtype), torch.arange(B)
        segments = torch.arange(0, B * T + 1, T), rows, rows
        cpu.norm_shift_mix(x.view(-1, C), (weight, bias), mix, (), x_prev, segments, out.view(-1, B * T, C), last)
        ctx.save_for_backward(x, weight, bias, mix, x_prev.contiguous())
        return out.unbind()

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mix, x_prev = ctx.saved_tensors
        (B, T, C), threads = x.shape, torch.get_num_threads()
        d_out = tuple(z.contiguous() for z in d_out)
        dx, d_x_prev = torch.empty_like(x), torch.empty_like(x_prev)
        sums, scratch = x.new_empty(B * -(-T // BLOCK_TOKENS), 2 + len(mix), C), x.new_empty(threads * 6 * C)
        pointers = (ctypes.c_void_p * len(d_out))(*(z.data_ptr() for z in d_out))
        library().norm_shift_mix_backward(
            *(B, T, C, len(mix), _is_narrow(d_out[0]), LAYER_NORM_EPS),
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
    def forward(ctx: Any, eps: float, state: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        tensors = tuple(z.contiguous() for z in tensors)
        vectors, projections = tensors[: _TimeMix.N_VECTORS], tensors[_TimeMix.N_VECTORS :]
        state, r = state.contiguous(), projections[0]
        (B, T, C), (H, N), threads = r.shape, state.shape[1:3], torch.get_num_threads()
        out, new_state = torch.empty_like(r), torch.empty_like(state)
        sa, y = state.new_empty(2, B, T, C)
        states = state.new_empty(B, library().wkv7_kept(T), H, N, N)
        scratch = state.new_empty(threads * library().time_mix_training_scratch(N))
        library().time_mix_forward(
            *(B, T, H, N, ctypes.byref(_given(projections, vectors, eps)), _is_narrow(r)),
            *_pointers((state, new_state, sa, y, states, out)),
            *(threads, scratch.data_ptr()),
        )
        ctx.save_for_backward(sa, y, states, *tensors)
        ctx.eps = eps
        return out, new_state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sa, y, states, *tensors = ctx.saved_tensors
        vectors, projections = tensors[: _TimeMix.N_VECTORS], tensors[_TimeMix.N_VECTORS :]
        d_out, d_new_state = (z.contiguous() for z in gradients)
        (B, T, C), (H, N), threads = y.shape, states.shape[2:4], torch.get_num_threads()
        d_projections = [torch.empty_like(z) for z in projections]
        sums, d_state = y.new_empty(B, _TimeMix.N_VECTORS, C), y.new_empty(B, H, N, N)
        scratch = y.new_empty(threads * library().time_mix_training_scratch(N))
        outputs = (ctypes.c_void_p * 8)(*(z.data_ptr() for z in d_projections))
        library().time_mix_backward(
            *(B, T, H, N, ctypes.byref(_given(projections, vectors, ctx.eps)), _is_narrow(projections[0])),
            *_pointers((sa, y, states, d_out, d_new_state)),
            *(outputs, sums.data_ptr(), d_state.data_ptr(), threads, scratch.data_ptr()),
        )
        d_vectors = [None if z is None else d.view(z.shape) for z, d in zip(vectors, sums.sum(0).unbind(), strict=True)]
        return None, d_state, *d_vectors, *d_projections


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
