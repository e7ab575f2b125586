"""A run by several processes, as torchrun starts them: each reads some of the lanes, all take the same steps.

Every process draws the windows of all lanes from the same cursor and computes its own share of them, so the data are
those of one process; it carries the states of its own lanes. Gradients are sums over the learnt tokens of all lanes,
divided by their number, and are the same bits everywhere, and so are parameters and optimisers. The first process
writes the checkpoint, with the states of all lanes: whatever their number, processes go on from it. One that dies ends
the others (torchrun sees to it), and they go on from there when they are started again.

Each process holds the whole model: data parallelism (PyTorch Distributed, arXiv 2006.15704) without its buckets.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.model.state import State
from rwkv_stream.training.lanes import Batch
from rwkv_stream.training.recipe import Stage
from rwkv_stream.training.run import Run


@contextlib.contextmanager
def processes(device: str) -> Iterator[int]:
    """Join the processes that torchrun started, for a run on a kind of `device`; gives this one's rank.

    GPUs are taken in turn: "cuda" is this process's own then. Without torchrun there is one process, of rank 0.
    """
    if not is_one_of_several():
        yield 0
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def is_one_of_several() -> bool:
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """What is within is done by the first process, then by the others, which find what it has made."""
    if is_one_of_several() and dist.get_rank():
        dist.barrier()
    yield
    if is_one_of_several() and not dist.get_rank():
        dist.barrier()


class DistributedRun(Run):
    """A `Run` of which each process computes some of the lanes; all of them make it and advance it together."""

    def __init__(self, *given: Any, **options: Any) -> None:
        """Raises UsageError as `Run`, for preferences, and where a stage has fewer lanes than there are processes."""
        super().__init__(*given, **options)
        fewest = min(stage.lanes for stage in self.recipe.stages)
        if self.recipe.is_of_preferences or fewest < dist.get_world_size():
            found = "preferences" if self.recipe.is_of_preferences else f"a stage of {fewest}"
            raise UsageError(
                f"training by {dist.get_world_size()} processes: expected texts, and a lane for each process in every "
                f"stage, found {found}; start fewer"
            )

    def _go_on(self, kept: dict[str, Any]) -> None:
        super()._go_on(kept)
        self._state = self._own(self._state)

    def _begin(self, index: int, stage: Stage) -> None:
        super()._begin(index, stage)
        self._state = self._own(self._state)

    def _backward(self, batch: Batch, learnt: int) -> Tensor:
        begin, end = _share(len(batch.keep), dist.get_rank())
        loss, self._state = self.network.loss(batch.of_lanes(begin, end), self._state, max(1, learnt))
        torch.autograd.backward(loss)
        parameters = self.tuned.parameters.values()
        gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in parameters]
        sums = torch.cat([loss.detach().view(1), *(z.flatten() for z in gradients)])
        dist.all_reduce(sums)
        parts = torch.split(sums, [1, *(z.numel() for z in gradients)])
        for parameter, part in zip(parameters, parts[1:], strict=True):
            parameter.grad = part.view_as(parameter)
        return sums[0]

    def save(self) -> None:
        """Publish what `Run.save` does, once for all processes."""
        own, self._state = self._state, self._gathered()
        if not dist.get_rank():
            super().save()
        self._state = own
        dist.barrier()

    def _own(self, state: State) -> State:
        """Of the states of all lanes those of this process."""
        begin, end = _share(state.batch, dist.get_rank())
        return State({name: z[begin:end].contiguous() for name, z in state.items()})

    def _gathered(self) -> State:
        """The states of all lanes, of which every process has a share."""
        lanes, gathered = self.recipe.stages[self._stage_index].lanes, {}
        for name, own in self._state.items():
            parts = []
            for rank in range(dist.get_world_size()):
                begin, end = _share(lanes, rank)
                part = own.contiguous() if rank == dist.get_rank() else own.new_empty(end - begin, *own.shape[1:])
                dist.broadcast(part, rank)
                parts.append(part)
            gathered[name] = torch.cat(parts)
        return State(gathered)


def _share(lanes: int, rank: int) -> tuple[int, int]:
    """The lanes of a process, end excluded: as equal as can be."""
    processes = dist.get_world_size()
    return lanes * rank // processes, lanes * (rank + 1) // processes


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether `stop` says so in any of the processes, which hear of it before the same step."""
    if not is_one_of_several():
        return stop

    def is_asked() -> bool:
        flag = torch.tensor(float(stop()), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    return is_asked
