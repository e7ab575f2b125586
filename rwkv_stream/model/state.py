"""What the RNN carries: named tensors with a leading batch axis, laid out once, here, for every version.

| version | tensor                          | shape             | axes                                          |
|---------|---------------------------------|-------------------|-----------------------------------------------|
| all     | `att_x_prev`                    | `[B, L, C]`       | last input of time-mix, after its LayerNorm    |
| 4       | `att_num`, `att_den`, `att_max` | `[B, L, C]` each  | the sums are `num exp(max)` and `den exp(max)` |
| 5, 6    | `att_kv`                        | `[B, L, H, N, N]` | `S[head, key, value]`                          |
| 7       | `att_kv`                        | `[B, L, H, N, N]` | `S[head, value, key]`                          |
| all     | `ffn_x_prev`                    | `[B, L, C]`       | last input of channel-mix, after its LayerNorm |

All tensors are fp32. Before the first token they are zero, but `att_max`, which is -1e30 (infinities would meet).
Source of the axes: BlinkDL/ChatRWKV: rwkv_pip_package/src/rwkv/model.py; BlinkDL/RWKV-LM: RWKV-v7/rwkv_v7_demo_rnn.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from rwkv_stream.model.config import Config


START = {"att_max": -1e30}  # where it is not zero


def layout(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape without the batch axis, in canonical (stored and hashed) order."""
    L, C, H, N = config.n_layer, config.n_embd, config.n_head, config.head_size
    if config.version == "4":
        return dict.fromkeys(("att_x_prev", "att_num", "att_den", "att_max", "ffn_x_prev"), (L, C))
    return {"att_x_prev": (L, C), "att_kv": (L, H, N, N), "ffn_x_prev": (L, C)}


class State(Mapping[str, "Tensor"]):
    """An immutable mapping from name to fp32 tensor `[B, L, ...]`. Models return new states, never write into one."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def initial(cls, config: Config, batch: int = 1, device: torch.device | str = "cpu") -> State:
        """The state before the first token."""
        import torch

        return cls(
            {
                name: torch.full((batch, *shape), START.get(name, 0.0), device=device)
                for name, shape in layout(config).items()
            }
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def batch(self) -> int:
        return next(iter(self._tensors.values())).shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def recurrence(self) -> tuple[Tensor, ...]:
        """The parts that the recurrence carries, `[B, L, ...]`, in order."""
        return tuple(tensor for name, tensor in self.items() if not name.endswith("_x_prev"))

    def first(self, n_layer: int) -> State:
        """That of the first layers."""
        return State({name: tensor[:, :n_layer] for name, tensor in self.items()})

    def clone(self) -> State:
        return State({name: tensor.clone() for name, tensor in self.items()})

    def to(self, device: torch.device | str) -> State:
        """This state on a device; itself where it is there already."""
        import torch

        if all(tensor.device == torch.device(device) for tensor in self.values()):
            return self
        return State({name: tensor.to(device) for name, tensor in self.items()})

    def row(self, index: int) -> State:
        """One row as a state of batch 1."""
        return State({name: tensor[index : index + 1].clone() for name, tensor in self.items()})

    def repeat(self, batch: int) -> State:
        """This state of batch 1 as `batch` equal rows (a fork for each question)."""
        return State({name: tensor.expand(batch, *tensor.shape[1:]).contiguous() for name, tensor in self.items()})

    def digest(self) -> str:
        """That of the tensors' values."""
        import torch

        return digest({name: z.detach().to("cpu", torch.float32).contiguous().numpy() for name, z in self.items()})


def digest(arrays: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """SHA-256 over name, shape and little-endian fp32 bytes of every tensor of a state, in order."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(f"{name} {list(array.shape)}\n".encode())
        found.update(array.astype("<f4", copy=False).tobytes())
    return found.hexdigest()
