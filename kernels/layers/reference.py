"""What the ops of `cpu` compute, in plain torch.

Segments of tokens lie end to end: `offsets` int64 [S + 1] says which tokens each is made of (none, too), `start` int64
[S] the row of the given state that it goes on from, `to` int64 [S] the row of the new state that it ends in, -1 for
none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels.layers import LAYER_NORM_EPS
from rwkv_stream.kernels.recurrence.reference import wkv7_recurrent

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu2": lambda z: torch.relu(z) ** 2,
    "silu": F.silu,
}


def linear(x: Tensor, panels: Tensor, scales: Tensor | None, rows: int, activation: str, add: bool, y: Tensor) -> None:
    """y [n, rows] = activation(W x), or y += it: x [n, columns]; W in panels, see `cpu.Weight`."""
    matrix = panels.transpose(1, 2).reshape(-1, panels.shape[1] * panels.shape[3])[:rows, : x.shape[1]].float()
    z = x.float() @ matrix.T
    if scales is not None:
        z = z * scales
    z = ACTIVATIONS[activation](z)
    y.copy_(y + z if add else z)


def norm_shift_mix(
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
    """out [M, n, C] = h + (h of the token before - h) (mix [M, C] + deltas), with h = LayerNorm(x [n, C]).

    deltas are none, or M of them, fp32 [n, C].
    x_prev [R, C] holds the h before the segments, last [K, C] gets that of their last tokens.
    """
    h = F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)
    for s, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        known = torch.cat([x_prev[start[s], None], h[first:end]])
        weights = mix[:, None]
        if deltas:
            weights = weights + torch.stack([delta[first:end] for delta in deltas])
        out[:, first:end] = known[1:] + (known[:-1] - known[1:]) * weights
        if to[s] >= 0:
            last[to[s]] = known[-1]


def time_mix(
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
    """out [n, C] = (GroupNorm(y) + bonus) * gate, where y is what the recurrence of RWKV-7 makes of the projections.

    projections  r k v w a g, fp32 [n, C]: w and a are what the low ranks add to w0 and a0, g is the gate; in all layers
                 but the first also v_mix, what the low rank adds to v0, and v_first, the v of the first layer
    vectors      w0 a0 v0 k_k k_a r_k, and weight and bias of the GroupNorm, fp32 [C]
    state        fp32 [R, H, N value, N key]; new_state [K, H, N, N]
    """
    r, k, v, w, a, g, *mixed = projections
    w0, a0, v0, k_k, k_a, r_k, weight, bias = vectors
    H, N = state.shape[1:3]
    w = -math.exp(-0.5) * torch.sigmoid(w0 + w)
    a = torch.sigmoid(a0 + a)
    if mixed:
        v = v + (mixed[1] - v) * torch.sigmoid(v0 + mixed[0])
    kk = F.normalize((k * k_k).view(-1, H, N), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * k_a)
    r, w, k, v, a = (z.view(-1, H, N) for z in (r, w, k, v, a))
    inputs = (r, w, k, v, -kk, kk * a)
    y = torch.zeros_like(r)
    for s, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        S = state[start[s], None]
        if end > first:
            y_s, S = wkv7_recurrent(*(z[None, first:end] for z in inputs), S)
            y[first:end] = y_s[0]
        if to[s] >= 0:
            new_state[to[s]] = S[0]
    normed = F.group_norm(y.reshape(-1, H * N), H, weight, bias, eps)
    bonus = (r * k * r_k.view(H, N)).sum(-1, keepdim=True) * v
    out.copy_((normed + bonus.reshape(normed.shape)) * g)
