"""What is to be known to load a model, as one value: the command line makes it, Python gives it, Ray ships it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rwkv_stream.errors import UsageError

DTYPES = ("auto", "fp32", "bf16", "fp16")
WEIGHTS = ("auto", "int8")
BACKENDS = ("auto", "reference", "cpu", "triton")


@dataclass(frozen=True, slots=True)
class Loading:
    """What a model is loaded from and for.

    path           of the checkpoint; None: the model that the package ships
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
    raises         UsageError for values that make no sense, whatever machine this is
    """

    path: str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    gpu_memory: int | None = None
    tokenizer: str | Path | None = None
    lora: str | Path | None = None
    lora_alpha: float | None = None
    initial_state: str | Path | None = None

    def __post_init__(self) -> None:
        names = self.device.split(",")
        for name in names:
            if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
                raise UsageError(f"choosing a device: expected auto, cpu, cuda or cuda:i, found '{name}'")
        if len(names) > 1 and (len(set(names)) < len(names) or not all(name.startswith("cuda") for name in names)):
            raise UsageError(f"choosing devices: expected one, or several GPUs and each once, found '{self.device}'")
        for name, choices in (("dtype", DTYPES), ("weights", WEIGHTS), ("backend", BACKENDS)):
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"loading a model: expected {name} {', '.join(choices)}, found '{value}'")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"loading a model: expected 1 thread or more, found {self.threads}")
        if self.gpu_memory is not None and self.gpu_memory < 1:
            raise UsageError(f"loading a model: expected GPU memory of 1 byte or more, found {self.gpu_memory}")
        if self.lora_alpha is not None and self.lora is None:
            raise UsageError(
                f"loading a model: expected a LoRA file for alpha {self.lora_alpha}, found none; pass --lora too"
            )
