"""What is made small: the cross-entropy of the next token, read window by window with the state carried along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwkv_stream.kernels import KERNELS, Recurrence, resolve
from rwkv_stream.kernels.layers import autograd
from rwkv_stream.model import architectures, network
from rwkv_stream.model.dtypes import dtype_in_memory
from rwkv_stream.model.state import State
from rwkv_stream.training import fused
from rwkv_stream.training.lanes import IGNORED, Batch
from rwkv_stream.training.tuned import Tuned

Tensors = tuple[Tensor, ...]
Gradient = Callable[[Tensor, Tensor, float], Tensor]


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of `head` over hidden states, a chunk of tokens at a time: logits are never whole in memory.

    The gradient is computed in the forward pass, where the chunk's logits are at hand.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, count: float, gradient: Gradient) -> Tensor:
        """hidden [tokens, C], weight fp32 [V, C], targets int64 [tokens] → scalar: the sum, in nats, over `count`.

        Products are made in the dtype of `hidden`.
        """
        rounded, is_needed = weight.to(hidden.dtype), ctx.needs_input_grad
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight) if is_needed[1] else None
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(targets), HeadLoss.CHUNK):
            x, d_x, of_part = (z[start : start + HeadLoss.CHUNK] for z in (hidden, d_hidden, targets))
            logits = x @ rounded.T
            total += gradient(logits, of_part, 1 / count).double().sum()
            if is_needed[0]:
                torch.mm(logits, rounded, out=d_x)
            if d_weight is not None:
                d_weight += logits.T @ x
        ctx.save_for_backward(d_hidden, d_weight)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * gradients[0], None if d_weight is None else d_weight * gradients[0], None, None, None


def softmax_gradient_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """`kernels.layers.autograd.softmax_gradient_` in plain torch."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    gradient = torch.softmax(logits.float(), dim=-1)
    gradient[torch.arange(len(targets)), targets] -= 1
    logits.copy_(gradient * scale)
    return losses


def _cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).float(), targets, reduction="none")


def rounded(recurrence: Recurrence, dtype: torch.dtype) -> Recurrence:
    """The recurrence of RWKV-7 with its inputs, but for decays, in the dtype of products; y in fp32."""

    def segments(
        inputs: Tensors, constants: Tensors, state: Tensors, offsets: Tensor, start: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensors]:
        r, w, *others = inputs
        given = r.to(dtype), w, *(z.to(dtype) for z in others)
        y, new = recurrence.segments(given, constants, state, offsets, start, keep)
        return y.float(), new

    return replace(recurrence, segments=segments)


class Network:
    """The loss that a model gives on windows of tokens, and its gradients.

    RWKV-7 on a CPU is computed by C++ kernels, all that is between two products; else plain torch does that, and the
    backend the recurrence. With `checkpoints`, layers are computed again in the backward pass instead of kept.
    """

    def __init__(
        self,
        tuned: Tuned,
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
        *,
        checkpoints: bool = False,
    ) -> None:
        """Products are made in a dtype, of a copy of the matrices.

        Raises BackendError for a backend that cannot be used.
        """
        self.tuned, self.config = tuned, tuned.config
        self._dtype, self._checkpoints = dtype, checkpoints
        self.device = next(iter(tuned.tensors().values())).device
        name, self._recurrence = resolve(self.config.version, backend, self.device)
        if name == "triton" and KERNELS[self.config.version] == 7:
            self._recurrence = rounded(self._recurrence, dtype)
        self._is_fused = name == "cpu" and self.config.version == "7"
        self._architecture = fused if self._is_fused else architectures.of(self.config.version)

    def start(self, lanes: int) -> State:
        """The state of lanes before the first token."""
        return detached(self.tuned.initial()).repeat(lanes)

    def loss(self, batch: Batch, state: State, count: float | None = None) -> tuple[Tensor, State]:
        """Nats of the learnt tokens over `count` (how many they are), and the new state of the lanes, detached.

        state  of the L lanes before the batch
        """
        hidden, head, new = self._read(batch, state)
        is_learnt = batch.targets != IGNORED
        chosen = hidden.to(self._dtype) if is_learnt.all() else hidden[is_learnt].to(self._dtype)
        gradient: Gradient = autograd.softmax_gradient_ if self._is_fused else softmax_gradient_
        given = chosen, head, batch.targets[is_learnt], count or max(1, len(chosen)), gradient
        loss: Tensor = HeadLoss.apply(*given)  # type: ignore[no-untyped-call]
        return loss, new

    def nats(self, batch: Batch, state: State) -> tuple[Tensor, State]:
        """Nats of each token, fp32 [n], 0 where it is not learnt, and the new state of the lanes, detached."""
        hidden, head, new = self._read(batch, state)
        is_learnt, weight = batch.targets != IGNORED, head.to(self._dtype)
        chosen, targets = hidden[is_learnt].to(self._dtype), batch.targets[is_learnt]
        chunks = zip(*(torch.split(z, HeadLoss.CHUNK) for z in (chosen, targets)), strict=True)
        parts = [checkpoint(_cross_entropy, x, weight, of_part, use_reentrant=False) for x, of_part in chunks]
        return hidden.new_zeros(len(hidden)).masked_scatter(is_learnt, torch.cat(parts)), new

    def _read(self, batch: Batch, state: State) -> tuple[Tensor, Tensor, State]:
        """What the head reads, fp32 [n, C], the head [V, C], and the new state of the lanes, detached."""
        tensors, initial = self.tuned.tensors(), self.tuned.initial()
        rows = State({name: torch.cat([z, initial[name]]) for name, z in state.items()})
        outer = {name.removeprefix("blocks.0."): z for name, z in tensors.items()}
        stream, new = network.embed(outer, batch.tokens[None]), list[State]()
        for i in range(self.config.n_layer):
            part = State({name: z[:, i : i + 1] for name, z in rows.items()})
            if self._checkpoints and torch.is_grad_enabled():
                stream, state = checkpoint(self._layer, i, tensors, stream, part, batch, use_reentrant=False)
            else:
                stream, state = self._layer(i, tensors, stream, part, batch)
            new.append(state)
        joined = {name: torch.cat([state[name].detach() for state in new], dim=1) for name in rows}
        return network.layer_norm(stream.x, tensors, "ln_out")[0], tensors["head.weight"], State(joined)

    def _layer(
        self, i: int, tensors: Mapping[str, Tensor], stream: network.Stream, state: State, batch: Batch
    ) -> tuple[network.Stream, State]:
        given = batch.tokens, state, batch.lengths, batch.start, batch.keep
        eps = self.config.group_norm_eps
        segments = fused.Segments(eps, *given) if self._is_fused else network.Segments(*given)
        block = self._block(i, tensors)
        return network.layers(self._architecture, self.config, [block], stream, segments, self._recurrence)

    def _block(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One layer's tensors, matrices in the dtype of products (those of bf16 are summed in fp32)."""
        prefix = f"blocks.{index}."
        block = {
            name.removeprefix(prefix): z.to(dtype_in_memory(name, z, self._dtype))
            for name, z in tensors.items()
            if name.startswith(prefix) and not name.startswith("blocks.0.ln0")
        }
        return self._architecture.prepare(block, self.config)


def detached(state: State) -> State:
    """The same without a way back for gradients."""
    return State({name: z.detach() for name, z in state.items()})
