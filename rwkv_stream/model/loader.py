"""A checkpoint made ready to compute with: tensors read block by block, placed on devices, packed for the backend."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels import resolve
from rwkv_stream.kernels.layers.cpu import KINDS, Weight
from rwkv_stream.kernels.memory import give_back
from rwkv_stream.model import architectures, network, v7_cpu, v7_triton
from rwkv_stream.model.checkpoints import adapters, checkpoint
from rwkv_stream.model.checkpoints.fingerprints import Facts
from rwkv_stream.model.checkpoints.library import shipped
from rwkv_stream.model.checkpoints.sources import Source, Sources, of
from rwkv_stream.model.config import Config
from rwkv_stream.model.dtypes import DTYPES, LOW_RANKS, TABLES, dtype_in_memory
from rwkv_stream.model.loading import Loading
from rwkv_stream.model.model import Model
from rwkv_stream.model.placement import Stage, Streamed, n_resident, shares
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.text.tokenizer import find as find_tokenizer
from rwkv_stream.values import updated


def load(given: Loading | str | Path | None = None, **options: Any) -> Model:
    """Load a checkpoint, or without a path the model that the package ships.

    given    a `Loading`, or the path of one whose other fields are `options`
    raises   CheckpointError, TokenizerError, BackendError, UsageError
    """
    loading = updated(given if isinstance(given, Loading) else Loading(given), options, "loading a model")
    devices = devices_of(loading.device)
    where = devices[0]
    if loading.gpu_memory is not None and where.type != "cuda":
        raise UsageError(f"loading a model: expected a GPU for --gpu-memory, found device {where.type}")
    weights, dtype = loading.weights, loading.dtype
    if dtype == "auto":
        dtype = "bf16" if where.type == "cuda" or weights == "int8" else "fp32"
    if loading.threads is not None:
        torch.set_num_threads(loading.threads)
    file, chosen = _opened(loading)
    config = file.config
    name, wkv = resolve(config.version, loading.backend, where)
    if weights == "int8" and (name != "cpu" or dtype != "bf16"):
        raise UsageError(
            "loading a model: expected --dtype bf16 and the native kernels on the cpu for --weights int8, found "
            f"{dtype} and backend {name}"
        )
    fingerprint = checkpoint.fingerprint(file, chosen.id)
    file, initial, adapted = adapters.adapted(file, loading.lora, loading.lora_alpha, loading.initial_state)
    packed = _packing(weights, DTYPES[dtype], name)
    outer, stages = _ready(config, file.tensors, devices, loading.gpu_memory, DTYPES[dtype], packed, name)
    return Model(
        loading=loading,
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


def fingerprint_of(loading: Loading) -> str:
    """The fingerprint of the model that `load` would give. Raises CheckpointError, TokenizerError."""
    file, chosen = _opened(loading)
    _, _, adapted = adapters.adapted(file, loading.lora, loading.lora_alpha, loading.initial_state)
    return adapters.fingerprint(checkpoint.fingerprint(file, chosen.id), *adapted)


def _opened(loading: Loading) -> tuple[checkpoint.Checkpoint, Tokenizer]:
    file = checkpoint.read(shipped() if loading.path is None else loading.path)
    return file, find_tokenizer(loading.tokenizer, file.path, file.config.vocab_size, file.container.metadata)


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The tensors that a model was loaded from by canonical names, with its adapters, in the dtypes of its file.

    Mapped from the file where they are stored as they are; not to be written to. Raises CheckpointError.
    """
    file, given = checkpoint.read(model.path), model.loading
    file, initial, _ = adapters.adapted(file, given.lora, given.lora_alpha, given.initial_state)
    states = adapters.time_states_of(model.config, initial)
    tuned = states if any(z.any() for z in states.values()) else {}
    return {name: source.read() for name, source in file.tensors.items()} | tuned


def initial_of(config: Config, tensors: Mapping[str, Tensor]) -> State:
    """What a reading starts from, of batch 1: tuned, where these tensors have it, with gradients to them; else zero."""
    return adapters.initial_state(config, {name: of(z) for name, z in tensors.items()})


def with_tensors(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """The same model of other tensors, by canonical names: what `load` makes of a file that holds them."""
    sources = {name: of(z.detach().cpu()) for name, z in tensors.items()}
    packed = _packing(model.weights, model.dtype, model.backend)
    devices, memory = [stage.device for stage in model.stages], model.loading.gpu_memory
    outer, stages = _ready(model.config, sources, devices, memory, model.dtype, packed, model.backend)
    config, digest = model.config, checkpoint.tensors_digest(sources)
    facts = Facts((), digest, config.version, config.group_norm_eps, config.vocab_size, has_tokenizer=False)
    return replace(
        model,
        fingerprint=facts.fingerprint(model.tokenizer.id),
        initial=initial_of(model.config, tensors).to(model.device),
        outer=outer,
        stages=stages,
    )


def _packing(weights: str, dtype: torch.dtype, backend: str) -> torch.dtype | None:
    """What matrices are packed in, if they are."""
    kept = torch.int8 if weights == "int8" else dtype
    return kept if backend == "cpu" and kept in KINDS else None


def _ready(
    config: Config,
    tensors: Sources,
    devices: Sequence[torch.device],
    gpu_memory: int | None,
    dtype: torch.dtype,
    packed: torch.dtype | None,
    backend: str,
) -> tuple[network.Block, Sequence[Stage]]:
    """The tensors outside the blocks, with `ln0`, and the blocks in stages; matrices packed in a dtype, if any.

    One block is read after the other, so that no more than one stands in memory twice.
    """
    architecture = architectures.of(config.version)
    outer: dict[str, tuple[str, Source]] = {}
    blocks: list[dict[str, tuple[str, Source]]] = [{} for _ in range(config.n_layer)]
    for name, source in tensors.items():
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
            made = v7_cpu.Layers(made)
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


def devices_of(names: str) -> list[torch.device]:
    """The devices of `Loading.device`: one, or several GPUs, each once. Raises BackendError, UsageError."""
    devices = [_device(name) for name in names.split(",")]
    if len(set(devices)) < len(devices):  # `cuda` is one of them
        raise UsageError(f"choosing devices: expected one, or several GPUs and each once, found '{names}'")
    return devices


def _device(name: str) -> torch.device:
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
