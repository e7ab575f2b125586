"""RWKV-7 by the Triton kernels: the equations of `v7`, layer by layer, for segments of tokens laid end to end.

Without gradients. Matrix products are torch's, in the dtype of the weights; what lies between two of them is one kernel
of `kernels.layers.triton`. The residual stream and the states are fp32. On a GPU a decoding step of few rows is
recorded as a CUDA graph, since asking for its kernels one by one takes longer than they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_stream.model.config import Config
from rwkv_stream.model.network import Block, PackedBatch, Stream
from rwkv_stream.model.state import State

if TYPE_CHECKING:
    from rwkv_stream.kernels.layers.triton import Plan

MIXTURES = "rwkvag"  # rows of `att.mix`
ACTIVATIONS = {"w": torch.tanh_, "g": torch.sigmoid_}  # between the two matrices of a low rank
RECORDED_ROWS = 16  # with more, the kernels take longer than asking for them


class Layers(list[Block]):
    """Blocks on one device, with their recorded decoding steps: rows → step, made when first wanted."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)
        self.lock = threading.Lock()
        self.steps: dict[tuple[int, bool], Step] = {}


def layers(
    config: Config, blocks: Iterable[Block], dtype: torch.dtype, stream: Stream, batch: PackedBatch
) -> tuple[Stream, State]:
    """As `network.layers`, for tokens [1, n] and matrices of a dtype; the stream is written over."""
    from rwkv_stream.kernels.layers import triton as rwkv7_triton  # only here: Triton is optional

    rows = stream.x.shape[1]
    if isinstance(blocks, Layers) and may_record(stream.x.device) and rows <= RECORDED_ROWS and batch.is_step:
        with blocks.lock:
            key = rows, stream.v_first is None
            if key not in blocks.steps:
                blocks.steps[key] = Step(config, blocks, dtype, stream, batch)
            return blocks.steps[key](stream, batch.state)
    plan = rwkv7_triton.plan(*batch.segments, dtype, stream.x.device)
    return _layers(config, blocks, stream, batch.state, plan, batch.n_kept)


class Step:
    """A step of as many rows as those given, recorded: it reads and writes memory of its own. Not for two threads."""

    def __init__(self, config: Config, blocks: Layers, dtype: torch.dtype, stream: Stream, batch: PackedBatch) -> None:
        from rwkv_stream.kernels.layers import triton as rwkv7_triton

        v_first = None if stream.v_first is None else torch.zeros_like(stream.v_first)
        self._stream = Stream(torch.zeros_like(stream.x), stream.embedded, v_first)
        self._state = batch.state.clone()
        plan = rwkv7_triton.plan(*batch.segments, dtype, stream.x.device)
        self._replay, (self._out, self._new) = recorded(
            lambda: _layers(config, blocks, self._stream, self._state, plan, batch.n_kept)
        )

    def __call__(self, stream: Stream, state: State) -> tuple[Stream, State]:
        """The stream after the layers, and their new state: copies, which nothing writes to later."""
        self._stream.x.copy_(stream.x)
        if self._stream.v_first is not None and stream.v_first is not None:
            self._stream.v_first.copy_(stream.v_first)
        for name, tensor in state.items():
            self._state[name].copy_(tensor)
        self._replay()
        v_first = None if self._out.v_first is None else self._out.v_first.clone()
        return Stream(self._out.x.clone(), stream.embedded, v_first), self._new.clone()


def may_record(device: torch.device) -> bool:
    """Whether work on a device can be recorded."""
    return device.type == "cuda"


def recorded(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Work on a GPU as a CUDA graph: what runs it again, on the same memory, and what it returns."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # compiles kernels and lets libraries allocate what they keep, which a recording may not
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph.replay, made


def _layers(
    config: Config, blocks: Iterable[Block], stream: Stream, state: State, plan: Plan, n_kept: int
) -> tuple[Stream, State]:
    from rwkv_stream.kernels.layers import triton as rwkv7_triton

    x, is_first = stream.x[0], stream.v_first is None
    (n, C), device, dtype = x.shape, x.device, plan.dtype
    time_mix = rwkv7_triton.step if plan.is_step else rwkv7_triton.time_mix
    mixed = torch.empty(6, n, C, dtype=dtype, device=device)
    r, k, v, w, a, g, v_mix, v_first = torch.empty(8, n, C, dtype=dtype, device=device)
    hidden = torch.empty(n, config.d_ffn, dtype=dtype, device=device)
    gated, product = mixed[:2]  # these two mixtures have been read by then
    if stream.v_first is not None:
        v_first = stream.v_first
    state = State({name: z.contiguous() for name, z in state.items()})
    new = State({name: z.new_empty(n_kept, *z.shape[1:]) for name, z in state.items()})
    for i, block in enumerate(blocks):
        att_x_prev, kv, ffn_x_prev = (z[:, i] for z in state.values())
        new_att_x_prev, new_kv, new_ffn_x_prev = (z[:, i] for z in new.values())
        is_mixed = i > 0 or not is_first  # all layers but the model's first
        v_here = v if is_mixed else v_first
        rwkv7_triton.norm_shift_mix(
            x, _norm(block, "ln1"), block["att.mix"], att_x_prev, plan, out=mixed, last=new_att_x_prev
        )
        for j, name, y in (("r", "receptance", r), ("k", "key", k), ("v", "value", v_here)):
            torch.mm(_of(mixed, j), block[f"att.{name}.weight"].T, out=y)
        for j, y in (("w", w), ("a", a), ("g", g), ("v", v_mix))[: 4 if is_mixed else 3]:
            z = torch.mm(_of(mixed, j), block[f"att.{j}1"])
            if j in ACTIVATIONS:
                ACTIVATIONS[j](z)
            torch.mm(z, block[f"att.{j}2"], out=y)
        projections = (r, k, v_here, w, a, g, v_mix, v_first)[: 8 if is_mixed else 6]
        v0 = block["att.v0"] if is_mixed else block["att.w0"]  # layer 0 has none, and reads none
        vectors = block["att.w0"], block["att.a0"], v0, *(block[f"att.{name}"] for name in ("k_k", "k_a", "r_k"))
        vectors += _norm(block, "att.ln_x")
        time_mix(projections, vectors, config.group_norm_eps, kv, plan, out=gated, new_state=new_kv)
        x += torch.mm(gated, block["att.output.weight"].T, out=product)
        rwkv7_triton.norm_shift_mix(
            x, _norm(block, "ln2"), block["ffn.mix"], ffn_x_prev, plan, out=mixed[:1], last=new_ffn_x_prev
        )
        torch.mm(mixed[0], block["ffn.key.weight"].T, out=hidden)
        rwkv7_triton.relu2_(hidden)
        x += torch.mm(hidden, block["ffn.value.weight"].T, out=product)
    return stream._replace(v_first=v_first), new


def _norm(block: Block, name: str) -> tuple[Tensor, Tensor]:
    return block[f"{name}.weight"], block[f"{name}.bias"]


def _of(mixed: Tensor, j: str) -> Tensor:
    """The mixture j of all tokens, [n, C]."""
    return mixed[MIXTURES.index(j)]
