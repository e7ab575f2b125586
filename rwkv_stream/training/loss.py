"""What is made small: the cross-entropy of the next token, read window by window with the state carried along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import resolve
from rwkv_stream.model import network, v7
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State


def softmax_gradient(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy over rows, and its gradient by the logits divided by `count`: logits [rows, V]."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    hit = torch.arange(logits.shape[1]) == targets[:, None]
    return -torch.where(hit, log_p, 0.0).sum(), ((log_p.exp() - hit.float()) / count).to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `head` over hidden states, a chunk of tokens at a time: logits are never whole in memory.

    The gradient is computed in the forward pass, where the chunk's logits are at hand.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden [tokens, C], weight [V, C], targets int64 [tokens] → scalar, in nats a token."""
        x, W, count = hidden.to(torch.bfloat16), weight.to(torch.bfloat16), len(targets)
        d_hidden, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, count, HeadLoss.CHUNK):
            part = slice(start, start + HeadLoss.CHUNK)
            loss, d = softmax_gradient(x[part] @ W.T, targets[part], count)
            total += loss
            if any(ctx.needs_input_grad):
                torch.mm(d, W, out=d_hidden[part])
                d_weight += d.T @ x[part]
        ctx.save_for_backward(d_hidden, d_weight)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.float() * gradients[0], d_weight * gradients[0], None


class Network:
    """The parameters, and the loss that they give on windows of tokens."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters fp32 by official name, vectors 1-D."""
        self.parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        self.config: Config = v7.config("7", {name: tuple(tensor.shape) for name, tensor in parameters.items()})
        self._wkv = resolve("7", "auto", "cpu")[1]

    def start(self, lanes: int) -> State:
        """The state before the first token."""
        return State.initial(self.config, lanes)

    def loss(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Mean nats a token of predicting tokens [B, T + 1] from the state before them; the new state, detached."""
        p = self.parameters
        outer = {name.removeprefix("blocks.0."): tensor for name, tensor in p.items()}
        rows = network.Rows(tokens[:, :-1], state, None)
        blocks = (self._block(i) for i in range(self.config.n_layer))
        stream, new = network.layers(v7, self.config, blocks, network.embed(outer, rows.tokens), rows, self._wkv)
        hidden = network.layer_norm(stream.x, p, "ln_out").flatten(0, 1)
        loss: Tensor = HeadLoss.apply(hidden, p["head.weight"], tokens[:, 1:].flatten())  # type: ignore[no-untyped-call]
        return loss, State({name: tensor.detach() for name, tensor in new.items()})

    def _block(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors, matrices rounded to bf16 (products of bf16 are summed in fp32)."""
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): t for name, t in self.parameters.items() if name.startswith(prefix)}
        block = {
            name: t.to(torch.bfloat16) if t.ndim == 2 and name != "att.r_k" else t
            for name, t in own.items()
            if not name.startswith("ln0")
        }
        return v7.prepare(block, self.config)
