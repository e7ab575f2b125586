"""Models: a checkpoint made ready to compute with, and the one call that reads tokens.

>>> model = load()
>>> tokens = torch.tensor([model.tokenizer.encode("The sea was")])
>>> logits, state = model.forward(tokens)

What a version computes stands in its own module (`v4` to `v7`, joined by `network`), how its recurrence is computed in
`rwkv_stream.kernels`, what a file may look like in `checkpoint`. Weights need no gradient, so nothing is recorded
unless a given state asks for it.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.kernels import Recurrence, kernel_version
from rwkv_stream.kernels.layers.cpu import INSTRUCTION_SETS, Weight, instruction_set
from rwkv_stream.kernels.memory import give_back, sent
from rwkv_stream.model import architectures, network, v7_cpu, v7_triton
from rwkv_stream.model.config import Config
from rwkv_stream.model.dtypes import DTYPE_NAMES
from rwkv_stream.model.generation import generate
from rwkv_stream.model.loading import Loading
from rwkv_stream.model.placement import PipedState, Stage, computing_on, first, joined, parts_of
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State, layout
from rwkv_stream.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model; nothing in it changes.

    loading        what it was loaded from
    fingerprint    of the checkpoint's tensors, the tokenizer and the adapters, whatever dtype they are loaded in
    dtype          of the matrices; vectors are fp32, `emb.weight` has the file's dtype, of which only rows are used
    weights        what large matrices are kept in: "auto", which is dtype, or "int8" with a scale for each row
    initial        the state before the first token, of batch 1: zero, or tuned
    outer          tensors outside the blocks (with `ln0`), as the version's module takes them
    stages         the blocks, and where they are computed; `device` is that of the first
    wkv            the recurrence, as `backend` computes it
    """

    loading: Loading
    config: Config
    tokenizer: Tokenizer
    fingerprint: str
    path: str
    device: torch.device
    dtype: torch.dtype
    weights: str
    backend: str
    initial: State = field(repr=False)
    outer: Mapping[str, Tensor] = field(repr=False)
    stages: Sequence[Stage] = field(repr=False)
    wkv: Recurrence = field(repr=False)

    @property
    def blocks(self) -> Sequence[network.Block]:
        """The tensors of each block, where they lie."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def folder(self) -> Path:
        """That of its checkpoint, in which stands what belongs to it."""
        path = Path(self.path)
        return path if path.is_dir() else path.parent

    @property
    def last_device(self) -> torch.device:
        """That of hidden states and logits: of the last stage."""
        return self.stages[-1].device

    @property
    def start_token(self) -> int | None:
        return self.tokenizer.start_token

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        logits: Literal["all", "last", "none"] = "last",
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read tokens int64 [B, T] from `state` (batch B, unchanged; without one `zero_state`); out, new state.

        logits   "all": fp32 [B, T, V]; "last": [B, V] of each row's last token; "none": hidden fp32 [B, T, C] after
                 ln_out. The head runs for no other position.
        lengths  int64 [B]: only so many tokens of each row are read, what follows in the row is padding; out means
                 nothing there. "last" takes 1 or more.
        raises   UsageError for arguments of another shape or dtype, or tokens outside the vocabulary
        """
        self.check(tokens, state, logits, lengths)
        tokens = sent(tokens, self.device)
        state = self.zero_state(len(tokens)) if state is None else state
        lengths = None if lengths is None else sent(lengths, self.device)
        hidden, new_state = self._read(network.Rows(tokens, state, lengths))
        if logits == "none":
            return hidden, new_state
        if logits == "last":
            lengths = None if lengths is None else lengths.to(hidden.device)
            rows = torch.arange(len(tokens), device=hidden.device)
            hidden = hidden[:, -1] if lengths is None else hidden[rows, lengths - 1]
        return self.head(hidden), new_state

    def forward_packed(
        self,
        tokens: Tensor,
        lengths: Tensor,
        state: State,
        start: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read segments of several texts in one call: hidden fp32 [n, C] after ln_out, new state of batch K.

        tokens  int64 [n], the segments laid end to end; lengths int64 [S], each 1 or more, together n
        state   of batch R, unchanged; start int64 [S]: the row of it that each segment starts from (default: its own)
        keep    int64 [K]: the segments whose state comes back, each once (default: all)
        raises  UsageError for arguments of another shape or dtype, or tokens outside the vocabulary

        Matrix products are over all n tokens. In calls of one n (see `embeddings.BUDGET_MULTIPLE`) what a segment gives
        is, with the native kernels bit for bit, independent of its neighbours and its place.
        """
        S = len(lengths)
        start = torch.arange(S) if start is None else start
        keep = torch.arange(S) if keep is None else keep
        self.check(tokens[None], None, "none", None)
        self._check_state(state, state.batch)
        for name, index, rows in (("start", start, state.batch), ("keep", keep, S)):
            if index.dtype != torch.int64 or not all(0 <= row < rows for row in index.tolist()):
                raise UsageError(
                    f"reading segments: expected {name} as int64 from 0 to {rows - 1}, found {index.tolist()}"
                )
        if len(set(keep.tolist())) < len(keep):
            raise UsageError(f"reading segments: expected each segment once in keep, found {keep.tolist()}")
        if lengths.dtype != torch.int64 or len(start) != S or int(lengths.sum()) != len(tokens) or (lengths < 1).any():
            raise UsageError(
                f"reading segments: expected lengths of 1 or more, one for each start of {len(start)}, that add up to "
                f"{len(tokens)} tokens, found {_form(lengths)} with sum {int(lengths.sum())}"
            )
        tokens, lengths, start, keep = (sent(z.contiguous(), self.device) for z in (tokens, lengths, start, keep))
        hidden, new_state = self._read(network.Segments(tokens, state, lengths, start, keep))
        return hidden[0], new_state

    def _read(self, batch: network.Rows | network.Segments) -> tuple[Tensor, State]:
        """Hidden [B, T, C] after ln_out, on the device of the last stage; new state."""
        parts, new = parts_of(batch.state, self.stages), []
        with_gradients = torch.is_grad_enabled() and any(z.requires_grad for part in parts for z in part.values())
        is_packed = not with_gradients and (self.has_packed_weights or self._is_v7_triton)
        read = batch.packed() if is_packed else batch
        stream = network.embed(self.outer, read.tokens)
        for stage, part in zip(self.stages, parts, strict=True):
            with computing_on(stage.device):
                here = read if part is read.state else read.at(stage.device, part)
                stream, part = self._through(stage.blocks, stream.to(stage.device), here)
            new.append(part)
        hidden = network.layer_norm(stream.x, self.outer, "ln_out")
        return batch.unpacked(hidden[0]) if is_packed else hidden, joined(new)

    def _through(
        self, blocks: Sequence[network.Block], stream: network.Stream, batch: network.TokenBatch
    ) -> tuple[network.Stream, State]:
        if isinstance(batch, network.PackedBatch) and isinstance(blocks, v7_cpu.Layers):
            return v7_cpu.layers(self.config, blocks, stream, batch)
        if isinstance(batch, network.PackedBatch) and self._is_v7_triton:
            return v7_triton.layers(self.config, blocks, self.dtype, stream, batch)
        architecture = architectures.of(self.config.version)
        return network.layers(architecture, self.config, blocks, stream, batch, self.wkv)

    @property
    def has_packed_weights(self) -> bool:
        """Whether matrices are packed for the native kernels."""
        return isinstance(self.outer["head.weight"], Weight)

    @property
    def keeps_bits_in_pieces(self) -> bool:
        """Whether tokens give the same bits read in one call as in several, one after the other."""
        return self.has_packed_weights

    @property
    def _is_v7_triton(self) -> bool:
        return self.backend == "triton" and self.config.version == "7"

    def first(self, n_layer: int) -> Model:
        """The first layers, with the same weights: hidden states are the residual stream after them, of mean 0 and
        variance 1, and states hold these layers alone. Raises UsageError for a number of layers that it has not.
        """
        if not 1 <= n_layer <= self.config.n_layer:
            raise UsageError(f"taking the first layers: expected 1 to {self.config.n_layer}, found {n_layer}")
        stages = first(self.stages, n_layer)
        plain = {"weight": torch.ones, "bias": torch.zeros}
        norm = {f"ln_out.{name}": make(self.config.n_embd, device=stages[-1].device) for name, make in plain.items()}
        return replace(
            self,
            config=replace(self.config, n_layer=n_layer),
            initial=self.initial.first(n_layer),
            outer={**self.outer, **norm},
            stages=stages,
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden states [..., C], on the device of the last stage.

        Raises UsageError for tensors of another width.
        """
        if hidden.ndim == 0 or hidden.shape[-1] != self.config.n_embd:
            raise UsageError(
                f"computing logits: expected hidden states [..., {self.config.n_embd}], found {_form(hidden)}"
            )
        return network.linear(hidden.to(self.last_device), self.outer["head.weight"])

    def surprise(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Nats of tokens given what comes before them.

        hidden   [n, C], of the tokens before
        ids      int64 [n]
        returns  fp32 [n], on the device of the last stage: to ask for its values is to wait for them
        """
        logits = self.head(hidden)
        return torch.nn.functional.cross_entropy(logits, sent(ids, logits.device), reduction="none")

    def trim(self) -> None:
        """Give memory that calls have freed back to the system, or the peak would creep up over many long ones."""
        give_back()

    def zero_state(self, batch: int = 1) -> State:
        """The state before the first token, as `batch` rows: zero, where the model has no tuned one."""
        return self.initial.repeat(batch)

    def start(self) -> tuple[Tensor | None, State]:
        """What a reading starts from: `zero_state`, fed the family's start token; its hidden state [C], else None."""
        if self.start_token is None:
            return None, self.zero_state()
        hidden, state = self.forward(torch.tensor([[self.start_token]]), logits="none")
        return hidden[0, 0], state

    def numerics(self, chunk: int) -> dict[str, str | int]:
        """All that decides the last bits of a state that is computed in calls of `chunk` tokens and one row."""
        return {
            "device": self.device.type,
            "processor": " + ".join(sorted({_processor(stage.device) for stage in self.stages})),
            "dtype": DTYPE_NAMES[self.dtype],
            "weights": self.weights,
            "matmul": torch.get_float32_matmul_precision(),
            "backend": self.backend,
            "kernels": kernel_version(self.backend),
            "instructions": INSTRUCTION_SETS[instruction_set()] if self.backend == "cpu" else "torch's",
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "chunk": chunk,
            "batch": 1,
        }

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        state: State | None = None,
        last_hidden: Tensor | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Continue a prompt or a state as pieces of text; `sampling` are the fields of `Sampling`. See `generation`."""
        return generate(self, prompt, state=state, last_hidden=last_hidden, sampling=Sampling(**sampling))

    def check(self, tokens: Tensor, state: State | None, logits: str, lengths: Tensor | None) -> None:
        """Raise UsageError for arguments that `forward` does not take."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or 0 in tokens.shape:
            raise UsageError(f"reading tokens: expected int64 [B, T] with B, T ≥ 1, found {_form(tokens)}")
        B, T = tokens.shape
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise UsageError(
                f"reading tokens: expected ids from 0 to {self.config.vocab_size - 1}, found {low if low < 0 else high}"
            )
        if logits not in ("all", "last", "none"):
            raise UsageError(f"reading tokens: expected logits 'all', 'last' or 'none', found '{logits}'")
        if lengths is not None:
            least = 1 if logits == "last" else 0
            if lengths.dtype != torch.int64 or lengths.shape != (B,):
                raise UsageError(f"reading tokens: expected lengths as int64 [{B}], found {_form(lengths)}")
            if not all(least <= length <= T for length in lengths.tolist()):
                raise UsageError(f"reading tokens: expected lengths from {least} to {T}, found {lengths.tolist()}")
        if state is not None:
            self._check_state(state, B)

    def _check_state(self, state: State, rows: int) -> None:
        if isinstance(state, PipedState) and state.batch == rows:
            return  # made by a model, and not worth joining to look at it
        expected = {name: (rows, *shape) for name, shape in layout(self.config).items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected or any(tensor.dtype != torch.float32 for tensor in state.values()):
            raise UsageError(
                f"reading tokens: expected a state of {rows} rows, fp32 {_listed(expected)}, found "
                f"{_listed(found)}; pass one that this model made, `repeat`ed for each row"
            )


@functools.cache
def _processor(device: torch.device) -> str:
    """What torch and its libraries choose their code by."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    name = model[1] if model is not None else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
