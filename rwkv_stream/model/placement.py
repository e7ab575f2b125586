"""Where the layers of a model lie: on one device, on several as stages of a pipe, or partly in host memory.

The stages of a pipe each keep the state of their own layers, so a stage can read the next chunk while later stages
still read the last one: nothing is waited for but a chunk's own residual stream. A layer that is streamed from host
memory is copied while the one before it is computed, into one of two places on the device that take turns; reading long
chunks hides the copies.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.config import Config
from rwkv_stream.model.network import Block
from rwkv_stream.model.state import State


class Stage(NamedTuple):
    """Consecutive layers and the device that they are computed on."""

    device: torch.device
    blocks: Sequence[Block]


def first(stages: Sequence[Stage], n_layer: int) -> list[Stage]:
    """The stages of the first layers, in the same memory."""
    kept = []
    for device, blocks in stages:
        n = min(n_layer, len(blocks))
        n_layer -= n
        if n:
            kept.append(Stage(device, blocks.first(n) if isinstance(blocks, Streamed) else type(blocks)(blocks[:n])))  # type: ignore[call-arg]
    return kept


def shares(n_layer: int, n_stages: int) -> list[int]:
    """How many layers each stage has: as equal as can be, the first ones the larger."""
    return [n_layer // n_stages + (i < n_layer % n_stages) for i in range(n_stages)]


class PipedState(State):
    """The state in parts, each on the device of its stage; whoever asks for a tensor gets it joined on the first."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[State]) -> None:
        self.parts = tuple(parts)

    def __getitem__(self, name: str) -> Tensor:
        tensors = [part[name] for part in self.parts]
        return torch.cat([tensor.to(tensors[0].device) for tensor in tensors], dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts[0])

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def batch(self) -> int:
        return self.parts[0].batch

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device | str) -> State:
        return State(dict(self)).to(device)


def parts_of(state: State, stages: Sequence[Stage]) -> Sequence[State]:
    """The state of each stage's layers, on its device."""
    if len(stages) == 1:
        return [state.to(stages[0].device)]
    counts = [len(stage.blocks) for stage in stages]
    if isinstance(state, PipedState) and [part["att_x_prev"].shape[1] for part in state.parts] == counts:
        return [part.to(stage.device) for part, stage in zip(state.parts, stages, strict=True)]
    split = {name: torch.split(tensor, counts, dim=1) for name, tensor in state.items()}
    return [
        State({name: tensors[i].to(stage.device) for name, tensors in split.items()}) for i, stage in enumerate(stages)
    ]


def joined(parts: Sequence[State]) -> State:
    """The state whose parts these are."""
    return parts[0] if len(parts) == 1 else PipedState(parts)


def computing_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While kernels are asked for that do not say where: Triton's and recordings go to the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class HostCopy:
    """A state and other tensors on their way to host memory, beside what their devices are asked for next.

    What is in host memory already, and nobody writes to, goes nowhere.
    """

    def __init__(self, state: State, *others: Tensor) -> None:
        self._events: list[Any] = []
        parts = state.parts if isinstance(state, PipedState) else (state,)
        self._parts = [State({name: self._started(tensor) for name, tensor in part.items()}) for part in parts]
        self._others = [self._started(tensor) for tensor in others]

    def _started(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        stream = _copying(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            there.copy_(tensor, non_blocking=True)
            self._events.append(stream.record_event())
        tensor.record_stream(stream)  # its memory is not given to others before
        return there

    def result(self) -> tuple[State, list[Tensor]]:
        """The state and the others, once they are there."""
        for event in self._events:
            event.synchronize()
        return State(dict(joined(self._parts))), self._others


@functools.cache
def _copying(device: torch.device) -> Any:
    """The stream of a GPU on which states leave it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


ALIGNED = 256  # bytes: where tensors of a layer begin
CALL_TOKENS = 1024  # whose activations are counted; those of longer calls come on top


class _Layout(NamedTuple):
    """Of a layer in one piece of memory: where each tensor begins, its dtype and shape."""

    tensors: tuple[tuple[str, int, torch.dtype, torch.Size], ...]
    n_bytes: int

    @staticmethod
    def of(block: Mapping[str, Tensor]) -> _Layout:
        tensors, end = [], 0
        for name, tensor in block.items():
            tensors.append((name, end, tensor.dtype, tensor.shape))
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return _Layout(tuple(tensors), end)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in memory uint8 [n_bytes or more]."""
        return {
            name: memory[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, start, dtype, shape in self.tensors
        }


class Streamed(Sequence[Block]):
    """Layers of which the first `n_resident` stay on the device; the others lie in host memory, pinned for a GPU.

    Iterating gives each on the device, in order. A streamed layer's tensors are overwritten when the second one after
    it is asked for. One iteration at a time: another thread's waits.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, n_resident: int) -> None:
        self._resident = [{name: z.to(device) for name, z in block.items()} for block in blocks[:n_resident]]
        self._layouts = [_Layout.of(block) for block in blocks[n_resident:]]
        self._host = []
        for layout, block in zip(self._layouts, blocks[n_resident:], strict=True):
            memory = torch.empty(layout.n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
            for name, view in layout.views(memory).items():
                view.copy_(block[name])
            self._host.append(memory)
        largest = max((layout.n_bytes for layout in self._layouts), default=0)
        self._places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in self._host[:2]]
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def first(self, n: int) -> Streamed:
        """The first n of these layers, in the same memory, and by the same lock."""
        part, streamed = copy.copy(self), max(0, n - len(self._resident))
        part._resident = self._resident[:n]
        part._layouts, part._host = self._layouts[:streamed], self._host[:streamed]
        part._places = self._places[:streamed]
        return part

    def __len__(self) -> int:
        return len(self._resident) + len(self._host)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        """Layers where they lie."""
        streamed = [layout.views(memory) for layout, memory in zip(self._layouts, self._host, strict=True)]
        return [*self._resident, *streamed][index]

    def __iter__(self) -> Iterator[Block]:
        with self._lock:
            arrived = [self._fetch(i) for i in range(len(self._places))]
            yield from self._resident
            for i, layout in enumerate(self._layouts):
                if self._stream is not None:
                    torch.cuda.current_stream(self._device).wait_event(arrived[i % 2])
                yield layout.views(self._places[i % 2])
                if i + 2 < len(self._layouts):
                    arrived[i % 2] = self._fetch(i + 2)

    def _fetch(self, i: int) -> Any:
        """Copy a layer to its place once all that the device has been asked for is done: the event of its arrival."""
        memory = self._host[i]
        place = self._places[i % 2][: len(memory)]
        if self._stream is None:
            return place.copy_(memory)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.copy_(memory, non_blocking=True)
            return self._stream.record_event()


def n_resident(config: Config, blocks: Sequence[Block], outer_bytes: int, dtype: torch.dtype, n_bytes: int) -> int:
    """How many layers fit in `n_bytes` of a device beside two that change, outer tensors and a call's activations.

    Raises UsageError where not even those fit.
    """
    sizes = [_Layout.of(block).n_bytes for block in blocks]
    per_token = dtype.itemsize * (14 * config.n_embd + config.d_ffn) + 40 * config.n_embd
    needed = outer_bytes + CALL_TOKENS * per_token
    if needed + sum(sizes) <= n_bytes:
        return len(blocks)
    needed += 2 * max(sizes)
    if needed > n_bytes:
        raise UsageError(
            f"placing layers: expected {needed / 1e9:.2f} GB of GPU memory or more for two layers, the head and the "
            f"activations of {CALL_TOKENS} tokens, found {n_bytes / 1e9:.2f} GB; raise --gpu-memory"
        )
    count = 0
    while needed + sizes[count] <= n_bytes:
        needed += sizes[count]
        count += 1
    return count
