"""Where numbers cease to be finite: of a model that gives NaN or infinity, in which layer, and in which tensor.

The state after a call tells the layer: what is not finite stays in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError
from rwkv_stream.kernels.layers.cpu import Weight

if TYPE_CHECKING:
    from rwkv_stream.model.state import State


class Named(Protocol):
    """What is said of a model."""

    @property
    def path(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...


def first_odd(hidden: Tensor) -> Tensor:
    """Which token of hidden states [T, C] is the first that is not finite: int64 [], T where all are."""
    odd = ~hidden.isfinite().all(-1)
    return torch.where(odd.any(), odd.int().argmax(), len(hidden))


def not_finite(model: Named, doing: str, state: State | None, token: int | None = None) -> BackendError:
    """Raised for what a model gives from `token` on; `state` is one that it gave there or later."""
    where = "" if token is None else f" from token {token:,} on"
    layer = None if state is None else odd_layer(state)
    where += ", first behind the last layer's state" if layer is None else f", first in layer {layer}"
    advice = "fp16 overflows with some models: pass --dtype bf16 or fp32" if model.dtype == torch.float16 else ""
    advice = advice or f"`rwkv-stream doctor --model {model.path}` says if its weights are the reason"
    return BackendError(
        f"{doing}: expected finite numbers of the model '{model.path}' ({model.fingerprint[:12]}), found NaN or "
        f"infinity{where}; {advice}"
    )


def odd_layer(state: State) -> int | None:
    """The first layer whose part of a state is not finite; None where all is."""
    odd = torch.stack([~z.isfinite().reshape(*z.shape[:2], -1).all(2).all(0) for z in state.values()]).any(0)
    return int(odd.int().argmax()) if odd.any() else None


def odd_tensors(outer: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of a model's tensors that are not finite; those of a layer as they are in memory."""
    return [
        prefix + name
        for prefix, block in [("", outer), *((f"blocks.{i}.", block) for i, block in enumerate(blocks))]
        for name, tensor in block.items()
        if not _is_finite(tensor)
    ]


def _is_finite(tensor: Tensor | Weight) -> bool:
    """A sum is not finite where a number is not; of a large matrix it takes no memory, as `isfinite` would."""
    if isinstance(tensor, Weight):
        tensor = tensor.panels if tensor.scales is None else tensor.scales
    return not tensor.is_floating_point() or bool(tensor.sum(dtype=torch.float64).isfinite())
