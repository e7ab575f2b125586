"""What makes a step of gradients: AdamW, or Muon for the matrices of blocks, and a running mean of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv_stream.training import recipe


class Optimizers:
    """The optimisers of a run, as one; a group's `scale` multiplies the rate.

    Weight decay acts on matrices only; `w0` learns at twice the rate
    (BlinkDL/RWKV-LM: RWKV-v7/train_temp/src/model.py).
    Muon (Jordan et al. 2024) takes the matrices of blocks, at AdamW's rates (its updates are scaled to AdamW's size).
    """

    def __init__(self, parameters: Mapping[str, Tensor], settings: recipe.Optimizer) -> None:
        decayed, plain, fast, turned = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for name, tensor in parameters.items():
            is_matrix = tensor.ndim == 2 and name.endswith(".weight")
            if is_matrix and name.startswith("blocks.") and settings.name == "muon":
                turned.append(tensor)
            else:
                (fast if name.endswith(".w0") else decayed if is_matrix else plain).append(tensor)
        groups = [
            {"params": params, "weight_decay": decay, "scale": scale}
            for params, decay, scale in ((decayed, settings.weight_decay, 1.0), (plain, 0.0, 1.0), (fast, 0.0, 2.0))
            if params
        ]
        self._all: list[torch.optim.Optimizer] = []
        if groups:
            self._all.append(torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-12, fused=True))
        if turned:
            group = {"params": turned, "scale": 1.0}
            decay = settings.weight_decay
            self._all.append(torch.optim.Muon([group], weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        self._parameters, self._clip = list(parameters.values()), settings.clip

    def step(self, rate: float) -> float:
        """Clip the gradients, apply them and forget them; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state_dict(self) -> list[dict[str, object]]:
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, kept: list[dict[str, object]]) -> None:
        for optimizer, state in zip(self._all, kept, strict=True):
            optimizer.load_state_dict(state)


class Average:
    """A running mean of parameters (EMA): `decay` of it stays in every step; the first steps count alike."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters, self._decay, self.steps = parameters, decay, 0
        self.mean = {name: z.detach().clone() for name, z in parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        share = 1 - min(self._decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(list(self.mean.values()), list(self._parameters.values()), share)

    def load(self, mean: Mapping[str, Tensor], steps: int) -> None:
        self.mean, self.steps = dict(mean), steps
