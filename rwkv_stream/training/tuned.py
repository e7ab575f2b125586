"""What of a model is trained: all of it, low-rank additions to its matrices (LoRA), or the state that readings start from.

Each gives the tensors that the network reads as functions of fp32 parameters, and the tensors of the file in which the
result is kept, as the loader takes them (`--model`, `--lora`, `--initial-state`).
Source of the names of adapters: JL-er/RWKV-PEFT: rwkvt/peft/rwkvLinear.py, merge/merge_state.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.checkpoints.adapters import A, B
from rwkv_stream.model.checkpoints.checkpoint import time_states
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State

MATRIX = re.compile(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output|gate)\.weight")  # that LoRA adds to


class Tuned(Protocol):
    """
    config      of the model
    parameters  fp32 leaves by name, in the order in which the optimiser has them
    """

    config: Config
    parameters: dict[str, Tensor]

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the model by official name, vectors 1-D, with gradients to the parameters."""

    def initial(self) -> State:
        """What a reading starts from, of batch 1."""

    def file(self) -> dict[str, Tensor]:
        """The tensors of the result."""


class Whole:
    """All parameters of a model."""

    def __init__(self, config: Config, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.parameters = {name: z.float().requires_grad_() for name, z in tensors.items()}
        self._device = next(iter(self.parameters.values())).device

    def tensors(self) -> Mapping[str, Tensor]:
        return self.parameters

    def initial(self) -> State:
        return State.initial(self.config, 1, self._device)

    def file(self) -> dict[str, Tensor]:
        """In bf16, by official names and shapes."""
        return {name: official(name, z, self.config).to(torch.bfloat16) for name, z in self.parameters.items()}


def official(name: str, tensor: Tensor, config: Config) -> Tensor:
    """A tensor of RWKV-7 in the shape of its file: vectors that mix are kept as (1, 1, C)."""
    is_mixing = config.version.startswith("7") and tensor.ndim == 1 and not name.endswith((".weight", ".bias"))
    return tensor.detach().view(1, 1, -1) if is_mixing else tensor.detach()


class LoRA:
    """`W + alpha / rank B A` for the matrices of every block; A is drawn, B is zero, so that training begins at W."""

    def __init__(
        self, config: Config, base: Mapping[str, Tensor], initial: State, rank: int, alpha: float, seed: int
    ) -> None:
        """base  the model's tensors, which stay as they are

        raises  UsageError for a rank that is not above 0
        """
        if rank < 1:
            raise UsageError(f"beginning a LoRA: expected a rank of 1 or more, found {rank}")
        self.config, self._base, self._initial = config, base, initial
        self._scale, self.parameters = alpha / rank, {}
        generator = torch.Generator().manual_seed(seed)
        for name, z in base.items():
            if MATRIX.fullmatch(name):
                target, (n_out, n_in) = name.removesuffix(".weight"), z.shape
                bound = 1 / math.sqrt(n_in)  # kaiming_uniform_(a=√5), as RWKV-PEFT begins
                drawn = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
                self.parameters[target + A] = drawn.to(z.device).requires_grad_()
                self.parameters[target + B] = torch.zeros(n_out, rank, device=z.device).requires_grad_()

    def tensors(self) -> Mapping[str, Tensor]:
        merged = dict(self._base)
        for name, a in self.parameters.items():
            if name.endswith(A):
                target = name.removesuffix(A)
                base, b = self._base[f"{target}.weight"].float(), self.parameters[target + B]
                merged[f"{target}.weight"] = torch.addmm(base, b, a, alpha=self._scale)
        return merged

    def initial(self) -> State:
        return self._initial

    def file(self) -> dict[str, Tensor]:
        return {name: z.detach() for name, z in self.parameters.items()}


class InitialState:
    """The matrices that the recurrence starts from; RWKV-4 has none."""

    def __init__(self, config: Config, base: Mapping[str, Tensor], initial: State) -> None:
        """base  the model's tensors, which stay as they are; initial: where training begins

        raises  UsageError for RWKV-4
        """
        if config.version == "4":
            raise UsageError("tuning a state: expected a model of RWKV-5 to 7, found RWKV-4, which has no matrix to tune")
        self.config, self._base, self._begun = config, base, initial
        kv = initial["att_kv"][0] if config.version.startswith("7") else initial["att_kv"][0].mT  # as files have it
        self.parameters = {
            name: kv[i].detach().clone().contiguous().requires_grad_() for i, name in enumerate(time_states(config))
        }

    def tensors(self) -> Mapping[str, Tensor]:
        return self._base

    def initial(self) -> State:
        kv = torch.stack(list(self.parameters.values()))
        kv = kv if self.config.version.startswith("7") else kv.mT
        return State({**self._begun, "att_kv": kv[None].contiguous()})

    def file(self) -> dict[str, Tensor]:
        return {name: z.detach() for name, z in self.parameters.items()}

