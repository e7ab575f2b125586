"""Models: a checkpoint made ready to compute with, and the one call that reads tokens.

>>> model = load()
>>> tokens = torch.tensor([model.tokenizer.encode("The sea was")])
>>> logits, state = model.forward(tokens)

What a version computes stands in its own module (`v7`), how its recurrence is computed in `rwkv_stream.kernels`, what
a file may look like in `checkpoint`. Weights need no gradient, so nothing is recorded unless a given state asks for it.
"""

from __future__ import annotations

import importlib.resources
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError, TokenizerError, UsageError
from rwkv_stream.kernels import abi_version, packed, resolve
from rwkv_stream.model import checkpoint, v7
from rwkv_stream.model.config import Config
from rwkv_stream.state import State, layout
from rwkv_stream.tokenizer import Tokenizer, from_file, raw_bytes, world

__all__ = ["Config", "Model", "load"]

DTYPES = {name: dtype for dtype, name in checkpoint.DTYPES.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model; nothing in it changes.

    fingerprint    of the checkpoint's tensors and the tokenizer, whatever dtype they are loaded in
    dtype          of the matrices; vectors are fp32, `emb.weight` has the file's dtype, of which only rows are used
    outer, blocks  tensors outside the blocks (with `ln0`) and of each block, named as `v7` takes them
    wkv            the recurrence, as `backend` computes it
    """

    config: Config
    tokenizer: Tokenizer
    fingerprint: str
    path: str
    device: torch.device
    dtype: torch.dtype
    backend: str
    outer: Mapping[str, Tensor] = field(repr=False)
    blocks: Sequence[v7.Block] = field(repr=False)
    wkv: v7.Wkv = field(repr=False)

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
        """Read tokens int64 [B, T] from `state` (batch B, unchanged; without one the zero state); out, new state.

        logits   "all": fp32 [B, T, V]; "last": [B, V] of each row's last token; "none": hidden fp32 [B, T, C] after
                 ln_out. The head runs for no other position.
        lengths  int64 [B]: only so many tokens of each row are read, what follows in the row is padding; out means
                 nothing there. "last" takes 1 or more.
        raises   UsageError for arguments of another shape or dtype, or tokens outside the vocabulary
        """
        self._check(tokens, state, logits, lengths)
        tokens = tokens.to(self.device)
        state = self.zero_state(len(tokens)) if state is None else state.to(self.device)
        lengths = None if lengths is None else lengths.to(self.device)
        hidden, new_state = v7.forward(self.outer, self.blocks, tokens, state, self.wkv, lengths)
        if logits == "none":
            return hidden, new_state
        if logits == "last":
            rows = torch.arange(len(tokens), device=self.device)
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
        keep    int64 [K]: the segments whose state comes back (default: all)
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
        if lengths.dtype != torch.int64 or len(start) != S or int(lengths.sum()) != len(tokens) or (lengths < 1).any():
            raise UsageError(
                f"reading segments: expected lengths of 1 or more, one for each start of {len(start)}, that add up to "
                f"{len(tokens)} tokens, found {_form(lengths)} with sum {int(lengths.sum())}"
            )
        tokens, lengths, start, keep = (z.to(self.device) for z in (tokens, lengths, start, keep))
        wkv = packed(self.backend, self.wkv)
        return v7.forward_packed(self.outer, self.blocks, tokens, lengths, state.to(self.device), start, keep, wkv)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden states [..., C]."""
        return v7.linear(hidden, self.outer["head.weight"])

    def zero_state(self, batch: int = 1) -> State:
        """The state before the first token."""
        return State.zeros(self.config, batch, self.device)

    def start(self) -> tuple[Tensor | None, State]:
        """What a reading starts from: the zero state, fed the family's start token; its hidden state [C], else None."""
        if self.start_token is None:
            return None, self.zero_state()
        hidden, state = self.forward(torch.tensor([[self.start_token]]), logits="none")
        return hidden[0, 0], state

    def numerics(self, chunk: int) -> dict[str, str | int]:
        """All that decides the last bits of a state that is computed in calls of `chunk` tokens and one row."""
        return {
            "device": self.device.type,
            "processor": _processor(self.device),
            "dtype": checkpoint.DTYPES[self.dtype],
            "matmul": torch.get_float32_matmul_precision(),
            "backend": self.backend,
            "kernels": abi_version(),
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
    backend: str = "auto",
    threads: int | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Load a checkpoint, or without a path the model that the package ships.

    device     auto (a GPU if there is one), cpu or cuda[:i]
    dtype      of the matrices: auto (bf16 on a GPU, else fp32), fp32, bf16 or fp16
    backend    auto, or a name of `kernels.available()`
    threads    set for the whole process
    tokenizer  world, bytes or the path of a tokenizer.json; else the tokenizer.json beside the checkpoint, else by
               the size of the vocabulary
    raises     CheckpointError, TokenizerError, BackendError, UsageError
    """
    where = _device(device)
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" else "fp32"
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
    chosen = _tokenizer(tokenizer, file.path, config.vocab_size)
    name, wkv = resolve(config.version, backend, where, config.head_size)
    ready = {name: _ready(name, tensor, where, DTYPES[dtype]) for name, tensor in file.tensors.items()}
    outer = {name: tensor for name, tensor in ready.items() if not name.startswith("blocks.")}
    outer |= {f"ln0.{part}": ready.pop(f"blocks.0.ln0.{part}") for part in ("weight", "bias")}
    blocks: list[dict[str, Tensor]] = [{} for _ in range(config.n_layer)]
    for full_name, tensor in ready.items():
        if full_name.startswith("blocks."):
            _, i, rest = full_name.split(".", 2)
            blocks[int(i)][rest] = tensor
    return Model(
        config=config,
        tokenizer=chosen,
        fingerprint=checkpoint.fingerprint(file, chosen.id),
        path=str(file.path),
        device=where,
        dtype=DTYPES[dtype],
        backend=name,
        outer=outer,
        blocks=blocks,
        wkv=wkv,
    )


def _ready(name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of its own to compute with: where a file happens to map a tensor would show in the last bits."""
    if name == "emb.weight":
        dtype = tensor.dtype
    elif tensor.ndim == 1 or name.endswith(".att.r_k"):
        dtype = torch.float32
    ready = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    if dtype == torch.float16 and not ready.isfinite().all():
        raise UsageError(
            f"loading a model: expected weights that fit in fp16, found a larger one in '{name}'; pass --dtype bf16"
        )
    return ready


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise UsageError(f"choosing a device: expected auto, cpu, cuda or cuda:i, found '{name}'")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not found:
            raise BackendError(
                f"using device '{name}': expected a CUDA GPU, found none that torch {torch.__version__} can use; "
                "pass --device cpu"
            )
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= found:
            raise BackendError(f"using device '{name}': expected cuda:0 to cuda:{found - 1}; pass one of these")
    return device


def _tokenizer(given: str | Path | None, path: Path, vocab_size: int) -> Tokenizer:
    beside = path.with_name("tokenizer.json")
    by_name = {"world": world, "bytes": raw_bytes}
    by_size = {65_536: world, 256: raw_bytes}
    if given is not None:
        chosen = by_name[given]() if isinstance(given, str) and given in by_name else from_file(given)
    elif beside.exists():
        chosen = from_file(beside)
    elif vocab_size in by_size:
        chosen = by_size[vocab_size]()
    else:
        raise TokenizerError(
            f"loading model '{path}': expected a tokenizer for its vocabulary of {vocab_size}, found no "
            "'tokenizer.json' beside it; pass --tokenizer with its own (20B_tokenizer.json for Pile models)"
        )
    if chosen.vocab_size > vocab_size:
        raise TokenizerError(
            f"loading model '{path}': expected a tokenizer of at most {vocab_size} tokens, found {chosen.vocab_size} "
            f"in '{given or beside}'; pass --tokenizer with the one it was trained with"
        )
    return chosen


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
