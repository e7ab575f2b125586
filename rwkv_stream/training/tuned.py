"""What of a model is trained: all of it, low-rank additions to its matrices (LoRA), or the state readings start from.

Each gives the tensors that the network reads as functions of fp32 parameters, and the file in which the result is kept,
as the loader takes it (`--model`, `--lora`, `--initial-state`).
Source of the names of adapters: JL-er/RWKV-PEFT: rwkvt/peft/rwkvLinear.py, merge/merge_state.py.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.checkpoints.adapters import A, B, time_states_of
from rwkv_stream.model.checkpoints.convert import metadata
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State
from rwkv_stream.training.recipe import Adapter

MATRIX = re.compile(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output|gate)\.weight")  # that LoRA adds to


class Tuned:
    """A model of which nothing is trained; those below train something of it.

    config      of the model
    parameters  fp32 leaves by name, in the order in which the optimiser has them
    file_name   of the result
    """

    file_name = ""

    def __init__(self, config: Config, base: Mapping[str, Tensor], initial: State) -> None:
        """base: the model's tensors by official name, vectors 1-D; initial: what a reading starts from, of batch 1."""
        self.config, self._initial = config, initial
        self._base = {name: z.float() if z.ndim == 1 else z for name, z in base.items()}  # as all is computed with
        self.parameters: dict[str, Tensor] = {}

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of the model by official name, vectors 1-D, with gradients to the parameters."""
        return self._base

    def initial(self) -> State:
        """What a reading starts from, of batch 1, with gradients to the parameters."""
        return self._initial

    def file(self) -> bytes:
        """The file of the result: a dict of tensors as torch saves it."""
        file = io.BytesIO()
        torch.save({name: z.detach().cpu() for name, z in self.parameters.items()}, file)
        return file.getvalue()


class Whole(Tuned):
    """All parameters of a model are trained."""

    file_name = "model.safetensors"

    def __init__(self, config: Config, base: Mapping[str, Tensor], initial: State | None = None) -> None:
        """base  of which the parameters are copies; initial: stays as it is (default: zero)"""
        copies = {name: z.to(torch.float32, copy=True).requires_grad_() for name, z in base.items()}
        device = next(iter(copies.values())).device
        super().__init__(config, copies, State.initial(config, 1, device) if initial is None else initial)
        self.parameters = self._base

    def file(self) -> bytes:
        """A checkpoint in bf16, by official names and shapes."""
        tensors = {
            name: official(name, z, self.config).to("cpu", torch.bfloat16).contiguous()
            for name, z in self.parameters.items()
        }
        return safetensors.torch.save(tensors, metadata(self.config))


def official(name: str, tensor: Tensor, config: Config) -> Tensor:
    """A tensor of RWKV-7 in the shape of its file: vectors that mix are kept as (1, 1, C)."""
    is_mixing = config.version.startswith("7") and tensor.ndim == 1 and not name.endswith((".weight", ".bias"))
    return tensor.detach().view(1, 1, -1) if is_mixing else tensor.detach()


class LoRA(Tuned):
    """`W + alpha / rank B A` for the matrices of every block; A is drawn, B is zero, so that training begins at W."""

    file_name = "lora.pth"

    def __init__(
        self, config: Config, base: Mapping[str, Tensor], initial: State, rank: int, alpha: float, seed: int
    ) -> None:
        """Raises UsageError for a rank below 1 or an alpha that is not above 0."""
        if rank < 1 or not alpha > 0:
            raise UsageError(f"beginning a LoRA: expected a rank of 1 or more, alpha above 0, found {rank} and {alpha}")
        super().__init__(config, base, initial)
        self._scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        for name, z in base.items():
            if MATRIX.fullmatch(name):
                target, (n_out, n_in) = name.removesuffix(".weight"), z.shape
                bound = 1 / math.sqrt(n_in)  # kaiming_uniform_(a=√5), as RWKV-PEFT begins
                drawn = torch.empty(rank, n_in).uniform_(-bound, bound, generator=generator)
                self.parameters[target + A] = drawn.to(z.device).requires_grad_()
                self.parameters[target + B] = torch.zeros(n_out, rank, device=z.device).requires_grad_()

    def tensors(self) -> Mapping[str, Tensor]:
        """Where nothing is recorded, sums are rounded to the file's dtype as the loader rounds them."""
        merged = dict(self._base)
        for name, a in self.parameters.items():
            if name.endswith(A):
                target = name.removesuffix(A)
                base, b = self._base[f"{target}.weight"], self.parameters[target + B]
                total = torch.addmm(base.float(), b, a, alpha=self._scale)
                merged[f"{target}.weight"] = total if torch.is_grad_enabled() else total.to(base.dtype)
        return merged


class InitialState(Tuned):
    """The matrices that the recurrence starts from are trained; RWKV-4 has none."""

    file_name = "state.pth"

    def __init__(self, config: Config, base: Mapping[str, Tensor], initial: State) -> None:
        """initial: of whose matrices the parameters are copies; the inputs of the token before the first stay zero

        raises  UsageError for RWKV-4
        """
        if config.version == "4":
            raise UsageError(
                "tuning a state: expected a model of RWKV-5 to 7, found RWKV-4, which has no matrix to tune; pass "
                "--lora or --whole"
            )
        device = initial["att_kv"].device
        super().__init__(config, base, State.initial(config, 1, device))
        states = time_states_of(config, initial)
        self.parameters = {name: z.detach().clone().requires_grad_() for name, z in states.items()}

    def initial(self) -> State:
        kv = torch.stack(list(self.parameters.values()))
        kv = kv if self.config.version.startswith("7") else kv.mT
        return State({**self._initial, "att_kv": kv[None].contiguous()})


def tuned(adapter: Adapter, config: Config, base: Mapping[str, Tensor], initial: State, seed: int) -> Tuned:
    """What of this model an adapter trains. Raises UsageError as the classes do."""
    if adapter.kind == "lora":
        return LoRA(config, base, initial, adapter.rank, adapter.alpha, seed)
    return InitialState(config, base, initial) if adapter.kind == "state" else Whole(config, base, initial)
