"""What is made small: the cross-entropy of the next token, read window by window with the state carried along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import resolve
from rwkv_stream.kernels.layers import autograd
from rwkv_stream.model import network, v7
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State
from rwkv_stream.training import fused

Gradient = Callable[[Tensor, Tensor, float], Tensor]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `head` over hidden states, a chunk of tokens at a time: logits are never whole in memory.

    The gradient is computed in the forward pass, where the chunk's logits are at hand.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: Gradient) -> Tensor:
        """hidden [tokens, C], weight fp32 [V, C], targets int64 [tokens] → scalar, in nats a token.

        Products are made in the dtype of `hidden`.
        """
        count, rounded = len(targets), weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, count, HeadLoss.CHUNK):
            x, d_x, of_part = (z[start : start + HeadLoss.CHUNK] for z in (hidden, d_hidden, targets))
            logits = x @ rounded.T
            total += gradient(logits, of_part, 1 / count).double().sum()
            if any(ctx.needs_input_grad):
                torch.mm(logits, rounded, out=d_x)
                d_weight += logits.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradients[0], d_weight * gradients[0], None, None


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """`kernels.layers.autograd.softmax_gradient_` in plain torch."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    gradient = torch.softmax(logits.float(), dim=-1)
    gradient[torch.arange(len(targets)), targets] -= 1
    logits.copy_(gradient * scale)
    return losses


class Network:
    """The parameters, and the loss that they give on windows of tokens.

    Where the C++ kernels work they compute all between two products, else plain torch does.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16, backend: str = "auto"
    ) -> None:
        """Parameters fp32 by official name, vectors 1-D; products are made in a dtype, of a copy of the matrices."""
        self.parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        self.config: Config = v7.config("7", {name: tuple(tensor.shape) for name, tensor in parameters.items()})
        self._dtype = dtype
        name, self._recurrence = resolve("7", backend, "cpu")
        self._is_fused = name == "cpu"

    def start(self, lanes: int) -> State:
        """The state before the first token."""
        return State.initial(self.config, lanes)

    def loss(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Mean nats a token of predicting tokens [B, T + 1] from the state before them; the new state, detached."""
        p = self.parameters
        outer = {name.removeprefix("blocks.0."): tensor for name, tensor in p.items()}
        architecture: network.Architecture = v7
        rows = network.Rows(tokens[:, :-1], state, None)
        if self._is_fused:
            architecture, rows = fused, fused.Rows(tokens[:, :-1], state, self.config.group_norm_eps)
        blocks, stream = map(self._block, range(self.config.n_layer)), network.embed(outer, rows.tokens)
        stream, new = network.layers(architecture, self.config, blocks, stream, rows, self._recurrence)
        hidden = network.layer_norm(stream.x, p, "ln_out").flatten(0, 1).to(self._dtype)
        gradient: Gradient = autograd.softmax_gradient_ if self._is_fused else softmax_gradient_
        given = hidden, p["head.weight"], tokens[:, 1:].flatten(), gradient
        loss: Tensor = HeadLoss.apply(*given)  # type: ignore[no-untyped-call]
        return loss, State({name: tensor.detach() for name, tensor in new.items()})

    def _block(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors, matrices in the dtype of products (those of bf16 are summed in fp32)."""
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): t for name, t in self.parameters.items() if name.startswith(prefix)}
        block = {
            name: t.to(self._dtype) if t.ndim == 2 and name != "att.r_k" else t
            for name, t in own.items()
            if not name.startswith("ln0")
        }
        return v7.prepare(block, self.config)
