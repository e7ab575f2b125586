"""Models: a checkpoint made ready to compute with, and the one call that reads tokens.

>>> model = load()
>>> tokens = torch.tensor([model.tokenizer.encode("The sea was")])
>>> logits, state = model.forward(tokens)

What a version computes stands in its own module (`v4` to `v7`, joined by `network`), how its recurrence is computed in
`rwkv_stream.kernels`, what a file may look like in `checkpoint`. Weights need no gradient, so nothing is recorded
unless a given state asks for it.
"""

from __future__ import annotations

import importlib.resources
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels import Recurrence, kernel_version, resolve
from rwkv_stream.kernels.memory import give_back, sent
from rwkv_stream.kernels.ops import INSTRUCTION_SETS, KINDS, Weight, instruction_set
from rwkv_stream.model import adapters, architectures, checkpoint, network, v7_ops, v7_triton
from rwkv_stream.model.config import Config
from rwkv_stream.model.placement import (
    PipedState,
    Stage,
    Streamed,
    computing_on,
    joined,
    n_resident,
    parts_of,
    shares,
)
from rwkv_stream.model.sources import Source
from rwkv_stream.state import State, layout
from rwkv_stream.tokenizer import Tokenizer
from rwkv_stream.tokenizer import find as find_tokenizer

__all__ = ["Config", "Model", "load"]

DTYPES = {name: dtype for dtype, name in checkpoint.DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model; nothing in it changes.

    fingerprint    of the checkpoint's tensors, the tokenizer and the adapters, whatever dtype they are loaded in
    dtype          of the matrices; vectors are fp32, `emb.weight` has the file's dtype, of which only rows are used
    weights        what large matrices are kept in: "auto", which is dtype, or "int8" with a scale for each row
    initial        the state before the first token, of batch 1: zero, or tuned
    outer          tensors outside the blocks (with `ln0`), as the version's module takes them
    stages         the blocks, and where they are computed; `device` is that of the first
    wkv            the recurrence, as `backend` computes it
    """

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
        self._check(tokens, state, logits, lengths)
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
        self._check(tokens[None], None, "none", None)
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
        tokens, lengths, start, keep = (sent(z, self.device) for z in (tokens, lengths, start, keep))
        hidden, new_state = self._read(network.Segments(tokens, state, lengths, start, keep))
        return hidden[0], new_state

    def _read(self, given: network.Rows | network.Segments) -> tuple[Tensor, State]:
        """Hidden [B, T, C] after ln_out, on the device of the last stage; new state."""
        parts, new = parts_of(given.state, self.stages), []
        with_gradients = torch.is_grad_enabled() and any(z.requires_grad for part in parts for z in part.values())
        is_flat = not with_gradients and (self._is_packed or self._is_v7_triton)
        laid = given.flat() if is_flat else given
        stream = network.embed(self.outer, laid.tokens)
        for stage, part in zip(self.stages, parts, strict=True):
            with computing_on(stage.device):
                here = laid if part is laid.state else laid.at(stage.device, part)
                stream, part = self._through(stage.blocks, stream.to(stage.device), here)
            new.append(part)
        hidden = network.layer_norm(stream.x, self.outer, "ln_out")
        return given.unflat(hidden[0]) if is_flat else hidden, joined(new)

    def _through(
        self, blocks: Sequence[network.Block], stream: network.Stream, given: network.Given
    ) -> tuple[network.Stream, State]:
        if isinstance(given, network.Flat) and isinstance(blocks, v7_ops.Layers):
            return v7_ops.layers(self.config, blocks, stream, given)
        if isinstance(given, network.Flat) and self._is_v7_triton:
            return v7_triton.layers(self.config, blocks, self.dtype, stream, given)
        architecture = architectures.of(self.config.version)
        return network.layers(architecture, self.config, blocks, stream, given, self.wkv)

    @property
    def _is_packed(self) -> bool:
        return isinstance(self.outer["head.weight"], Weight)

    @property
    def _is_v7_triton(self) -> bool:
        return self.backend == "triton" and self.config.version == "7"

    def head(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden states [..., C], on the device of the last stage."""
        return network.linear(hidden.to(self.last_device), self.outer["head.weight"])

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
            "dtype": checkpoint.DTYPES[self.dtype],
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
        """Continue a prompt or a state as pieces of text; `sampling` are the fields of `Sampling`. See `tasks`."""
        from rwkv_stream import tasks
        from rwkv_stream.sampling import Sampling

        return tasks.generate(self, prompt, state=state, last_hidden=last_hidden, sampling=Sampling(**sampling))

    def _check(self, tokens: Tensor, state: State | None, logits: str, lengths: Tensor | None) -> None:
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


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    weights: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    gpu_memory: int | None = None,
    tokenizer: str | Path | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    initial_state: str | Path | None = None,
) -> Model:
    """Load a checkpoint, or without a path the model that the package ships.

    device         auto (a GPU if there is one), cpu, cuda[:i], or several GPUs with commas between them, that share the
                   layers: a text's chunks flow through them
    dtype          of the matrices: auto (bf16 on a GPU and with weights int8, else fp32), fp32, bf16 or fp16
    weights        auto, as dtype says, or int8: large matrices rounded to 8 bits with a scale for each row; on the CPU
    backend        auto, or a name of `kernels.available()`
    threads        set for the whole process
    gpu_memory     bytes of each GPU for weights and one call: layers that do not fit are streamed from host memory
    tokenizer      world, bytes or the path of a tokenizer.json; else what is in or beside the checkpoint, else by the
                   size of the vocabulary (`tokenizer.find`)
    lora           a LoRA file of RWKV-PEFT, merged while loading, with the alpha that it was trained with; `adapters`
    initial_state  a file with the tuned state that every reading starts from; else the checkpoint's own, else zero
    raises         CheckpointError, TokenizerError, BackendError, UsageError
    """
    devices = _devices(device)
    where = devices[0]
    if gpu_memory is not None and where.type != "cuda":
        raise UsageError(f"loading a model: expected a GPU for --gpu-memory, found device {where.type}")
    if weights not in ("auto", "int8"):
        raise UsageError(f"loading a model: expected weights auto or int8, found '{weights}'")
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" or weights == "int8" else "fp32"
    if dtype not in DTYPES:
        raise UsageError(f"loading a model: expected dtype auto, {', '.join(DTYPES)}, found '{dtype}'")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"loading a model: expected 1 thread or more, found {threads}")
        torch.set_num_threads(threads)
    if path is None:
        path = str(importlib.resources.files("rwkv_stream") / "models" / "default" / "model.safetensors")
    file = checkpoint.read(path)
    config = file.config
    chosen = find_tokenizer(tokenizer, file.path, config.vocab_size, file.container.metadata)
    name, wkv = resolve(config.version, backend, where)
    if weights == "int8" and (name != "cpu" or dtype != "bf16"):
        raise UsageError(
            "loading a model: expected --dtype bf16 and the native kernels on the cpu for --weights int8, found "
            f"{dtype} and backend {name}"
        )
    fingerprint = checkpoint.fingerprint(file, chosen.id)
    file, initial, adapted = adapters.adapted(file, lora, lora_alpha, initial_state)
    kept = torch.int8 if weights == "int8" else DTYPES[dtype]
    packed = kept if name == "cpu" and kept in KINDS else None
    outer, stages = _ready(file, devices, gpu_memory, DTYPES[dtype], packed, name)
    return Model(
        config=config,
        tokenizer=chosen,
        fingerprint=adapters.fingerprint(fingerprint, *adapted),
        path=str(file.path),
        device=where,
        dtype=DTYPES[dtype],
        weights=weights,
        backend=name,
        initial=initial.to(where),
        outer=outer,
        stages=stages,
        wkv=wkv,
    )


# Rows of these are used, not the whole; and small tensors beside the vectors that are computed with in fp32.
TABLES = ("emb.weight", "ffn.s_emb.weight")
LOW_RANKS = re.compile(r"att\.([wagv]|time_decay_w|maa_[wkvrg]?)[12]|ffn\.s[12]")  # [in, out]
FP32 = ("att.r_k", "att.time_decay", "att.time_first", "att.time_faaaa")


def dtype_in_memory(name: str, source: Source, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept in while the model is loaded with this dtype."""
    if name.endswith(TABLES):
        return source.dtype
    return torch.float32 if len(source.shape) == 1 or name.endswith(FP32) else dtype


def _ready(
    file: checkpoint.Checkpoint,
    devices: Sequence[torch.device],
    gpu_memory: int | None,
    dtype: torch.dtype,
    packed: torch.dtype | None,
    backend: str,
) -> tuple[network.Block, Sequence[Stage]]:
    """The tensors outside the blocks, with `ln0`, and the blocks in stages; matrices packed in a dtype, if any.

    One block is read after the other, so that no more than one stands in memory twice.
    """
    architecture, config = architectures.of(file.config.version), file.config
    outer: dict[str, tuple[str, Source]] = {}
    blocks: list[dict[str, tuple[str, Source]]] = [{} for _ in range(config.n_layer)]
    for name, source in file.tensors.items():
        if name.endswith(checkpoint.TIME_STATE):
            continue  # no weight: `Model.initial`
        if not name.startswith("blocks."):
            outer[name] = name, source
        elif name.startswith("blocks.0.ln0."):
            outer[name.removeprefix("blocks.0.")] = name, source
        else:
            _, i, rest = name.split(".", 2)
            blocks[int(i)][rest] = name, source

    host = torch.device("cpu")
    first = devices[0] if gpu_memory is None else host  # whose rows are looked up there
    places = {"emb.weight": first, "head.weight": devices[-1], "ln_out.weight": devices[-1], "ln_out.bias": devices[-1]}

    def ready(sources: dict[str, tuple[str, Source]], device: torch.device, is_block: bool) -> network.Block:
        part: dict[str, Any] = {
            rest: _copied(name, source.read(), places.get(rest, device), dtype_in_memory(name, source, dtype))
            for rest, (name, source) in sources.items()
        }
        if is_block:
            part = dict(architecture.prepare(part, config))
        if packed is not None:
            part = _packed(part, packed)
            give_back()
        return part

    around = ready(outer, devices[0], False)
    stages, begin = [], 0
    for device, count in zip(devices, shares(config.n_layer, len(devices)), strict=True):
        kept = device if gpu_memory is None else host
        made: Sequence[network.Block] = [ready(block, kept, True) for block in blocks[begin : begin + count]]
        if packed is not None and config.version == "7":
            made = v7_ops.Layers(made)
        elif backend == "triton" and config.version == "7" and gpu_memory is None:
            made = v7_triton.Layers(made)
        elif gpu_memory is not None:
            others = sum(z.nbytes for z in around.values() if z.device == device)
            made = Streamed(made, device, n_resident(config, made, others, dtype, gpu_memory))
        stages.append(Stage(device, made))
        begin += count
    return around, stages


def _packed(part: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same with packed matrices, each taking the place of the tensor that it is made from."""
    for name, tensor in part.items():
        if tensor.ndim == 2 and name.endswith(".weight") and not name.endswith(TABLES):
            part[name] = Weight.packed(tensor, dtype)
        elif LOW_RANKS.fullmatch(name):
            part[name] = Weight.packed(tensor.T)  # rounded to 8 bits they would cost more than they save
    return part


def _copied(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of its own to compute with: where a file happens to map a tensor would show in the last bits."""
    ready = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    if dtype == torch.float16 and not ready.isfinite().all():
        raise UsageError(
            f"loading a model: expected weights that fit in fp16, found a larger one in '{name}'; pass --dtype bf16"
        )
    return ready


def _devices(names: str) -> list[torch.device]:
    """One device, or several GPUs, each once."""
    devices = [_device(name) for name in names.split(",")]
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(device.type != "cuda" for device in devices)):
        raise UsageError(f"choosing devices: expected one, or several GPUs and each once, found '{names}'")
    return devices


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise UsageError(f"choosing a device: expected auto, cpu, cuda or cuda:i, found '{name}'")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        _pin_libraries()
        if not found:
            raise BackendError(
                f"using device '{name}': expected a CUDA GPU, found none that torch {torch.__version__} can use; "
                "pass --device cpu"
            )
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= found:
            raise BackendError(f"using device '{name}': expected cuda:0 to cuda:{found - 1}; pass one of these")
    return device


def _pin_libraries() -> None:
    """For the whole process: sums of products in fp32, in an order that is the same each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False


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
