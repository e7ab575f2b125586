"""RWKV-7 as it is trained on a CPU: the parts of `network.layers` by kernels that compute all between two products.

The equations are those of `model/v7.py`; products are torch's, in the dtype of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import Recurrence
from rwkv_stream.kernels.layers import autograd
from rwkv_stream.model import network, v7
from rwkv_stream.model.network import Block, Projections, Sublayer, TokenShift
from rwkv_stream.model.state import State

UNUSED = v7.UNUSED
config, shapes, prepare = v7.config, v7.shapes, v7.prepare
VECTORS = ("w0", "a0", "v0", "k_k", "k_a", "r_k", "ln_x.weight", "ln_x.bias")


class Segments(network.Segments):
    """Segments with two kernels: norm, shift and mixtures; and the heads. The next `x_prev` has no gradient."""

    def __init__(self, eps: float, *given: Tensor | State) -> None:
        """eps: of the heads' norm; `given` as for `network.Segments`."""
        super().__init__(*given)  # type: ignore[arg-type]
        self._eps = eps

    def token_shift(self, x: Tensor, block: Block, sublayer: Sublayer, i: int) -> tuple[TokenShift, Tensor]:
        """x [1, n, C] → how its tokens are mixed, and what the tokens after the kept ends will see [K, C]."""
        norm = block[f"{sublayer.norm}.weight"], block[f"{sublayer.norm}.bias"]
        x_prev, last = self.state[sublayer.x_prev][self._start, i], x.new_empty(len(self._keep), x.shape[-1])

        def mix(vectors: Tensor, deltas: Sequence[Tensor] = ()) -> Sequence[Tensor]:
            dtype = block[sublayer.reader].dtype
            mixed, lasts = autograd.norm_shift_mix(x[0], norm, vectors, x_prev, self._offsets, dtype)
            torch.index_select(lasts, 0, self._keep, out=last)
            return [z.unsqueeze(0) for z in mixed]

        return mix, last

    def wkv(self, recurrence: Recurrence, projections: Projections, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From the projections to the input of the output matrix, the recurrence among what lies between."""
        inputs, state = [z[0] for z in projections.inputs], self.state["att_kv"][self._start, i]
        out, kv = autograd.time_mix(inputs, projections.constants, self._eps, state, self._offsets)
        return out.unsqueeze(0), (kv[self._keep],)


def before_wkv(mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
    """Token shift and projections: r k v w a g [B, T, C], then for all layers but the first v_mix and v_first."""
    xr, xw, xk, xv, xa, xg = mix(block["att.mix"])
    r, k, v = (F.linear(x, block[f"att.{name}.weight"]) for x, name in ((xr, "receptance"), (xk, "key"), (xv, "value")))
    w = torch.tanh(xw @ block["att.w1"]) @ block["att.w2"]
    a = xa @ block["att.a1"] @ block["att.a2"]
    g = torch.sigmoid(xg @ block["att.g1"]) @ block["att.g2"]
    vectors = tuple(block.get(f"att.{name}", block["att.w0"]) for name in VECTORS)  # the first layer reads no v0
    if v_first is None:
        return Projections((r, k, v, w, a, g), vectors, v_first=v)
    v_mix = xv @ block["att.v1"] @ block["att.v2"]
    return Projections((r, k, v, w, a, g, v_mix, v_first), vectors, v_first=v_first)


def after_wkv(y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
    """The output matrix."""
    return F.linear(y, block["att.output.weight"])


def channel_mix(mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
    """[B, T, C], to be added."""
    (xk,) = mix(block["ffn.mix"])
    return F.linear(autograd.relu2(F.linear(xk, block["ffn.key.weight"])), block["ffn.value.weight"])
