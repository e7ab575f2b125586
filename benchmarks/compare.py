"""How fast one model of random weights is read and continued here and by other programs, on the CPU.

    python benchmarks/compare.py [--shape 0.1b] [--peers-python PATH] [--out benchmarks/results/compare.json]

A fast wrong answer does not count: before anything is timed, every contestant's logits of the same 512 tokens are
compared with those of the reference backend in fp32. Where a contestant of our own is off, nothing is timed; a peer
that is off is shown and takes no part in the ratios.

Every contestant is a process of its own, with its own threads, that loads once and then waits for its turn: only one
computes at a time. Rounds alternate them, and in each round the machine's bounds are measured anew: the matrix products
of the model's own shapes by torch, and the rate of reading memory. Figures are medians with the lowest and highest;
ratios are medians of the ratios within a round.

Peers: PyPI `rwkv` (RWKV-4 to 7), `llama-cpp-python` (RWKV-7, from a GGUF that is made here of the same weights),
`transformers` (RWKV-4, the one that it has). Each runs under the first interpreter of --peers-python, or else this one,
that has it; llama-cpp-python and numpy may so live in an environment of their own. Weights and GGUF tensors of some
kinds are made by the helpers of the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import click
    from torch import Tensor

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compare.json"
CHUNK = 1024  # tokens a call
DECODE_STEPS = 64
BATCHES = (1, 8, 32)
TOLERANCE = 0.02  # of logits: |difference| / |reference|
TOLERANCE_8_BIT = 0.03  # of weights that are rounded to 8 bits, ours and theirs
CHECKED = 512  # tokens
TEXT = b"The keeper lit the lamp at dusk, counted the ships that passed, and wrote each name into the book. "
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "BF16": 2, "F16": 2, "int8": 1, "Q8_0": 34 / 32}
PEERS = {  # package, module, settings, and the versions of RWKV that it has or that this program can give it
    "rwkv": ("rwkv", "rwkv", ("fp32", "bf16"), {"4", "5.2", "6", "7"}),
    "llama.cpp": ("llama-cpp-python", "llama_cpp", ("F16", "BF16", "Q8_0"), {"7"}),
    "transformers": ("transformers", "transformers.models.rwkv", ("fp32", "bf16"), {"4"}),
}


@dataclass(frozen=True)
class Shape:
    version: str
    n_layer: int
    n_embd: int
    d_ffn: int
    vocab_size: int = 65536


SHAPES = {
    "0.1b": Shape("7", 12, 768, 3072),
    "0.4b": Shape("7", 24, 1024, 4096),
    "1.5b": Shape("7", 24, 2048, 8192),
    "v4-169m": Shape("4", 12, 768, 3072, 50277),
    "v5-0.4b": Shape("5.2", 24, 1024, 3584),
    "v6-1.6b": Shape("6", 24, 2048, 7168),
    "tiny": Shape("7", 3, 128, 512, 1024),  # to try this program
}
RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}


# ---- weights ----


def of_the_tests(name: str) -> Any:
    """A module of theirs."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def weights_of(shape: Shape) -> dict[str, Tensor]:
    """Random, of one seed, under the official names, so sized that every tensor shows in the output; bf16."""
    import torch

    if shape.version != "7":
        sizes = {"n_layer": shape.n_layer, "n_embd": shape.n_embd, "d_ffn": shape.d_ffn}
        tiny_models = of_the_tests("tiny_models")
        made = tiny_models.official_weights(version=shape.version, vocab_size=shape.vocab_size, **sizes)
        # Those are for few layers: in many, what each adds would make the rounding of the one before larger.
        added = ("att.output.weight", "ffn.value.weight")
        made |= {name: tensor * 0.3 for name, tensor in made.items() if name.endswith(added)}
        made |= {name: tensor * (64 / shape.n_embd) for name, tensor in made.items() if name.endswith("time_maa_w1")}
        return {name: tensor.bfloat16() for name, tensor in made.items()}
    generator = torch.Generator().manual_seed(0)
    C, F, V = shape.n_embd, shape.d_ffn, shape.vocab_size
    place = torch.linspace(0, 1, C)

    def normal(*size: int, scale: float, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(*size, generator=generator)

    def matrix(rows: int, columns: int, gain: float) -> Tensor:
        return normal(rows, columns, scale=gain * columns**-0.5)

    def vector(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(C, generator=generator)).view(1, 1, C)

    made = {"emb.weight": normal(V, C, scale=0.5), "head.weight": matrix(V, C, 2)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(shape.n_layer):
        depth = i / max(1, shape.n_layer - 1)
        block = {f"att.x_{j}": (1 - place ** (1 - 0.8 * depth)).view(1, 1, C) for j in "rwkvag"}
        for j, rank in RANKS.items():
            block |= {f"att.{j}1": normal(C, rank, scale=C**-0.5), f"att.{j}2": normal(rank, C, scale=0.5 * rank**-0.5)}
        block["att.w0"] = (6 * place ** (1 + depth**0.3) - 5.5).view(1, 1, C) + vector(-1, 1)
        block |= {"att.a0": vector(-1, 1), "att.v0": vector(0, 1)}
        block |= {"att.k_k": vector(0.6, 0.8), "att.k_a": vector(0.9, 1.1)}
        block["att.r_k"] = normal(C // 64, 64, scale=0.05)
        block |= {f"att.{name}.weight": matrix(C, C, 0.5) for name in ("receptance", "key", "value", "output")}
        block["ffn.x_k"] = vector(0, 1)
        block |= {"ffn.key.weight": matrix(F, C, 0.7), "ffn.value.weight": matrix(C, F, 0.7)}
        if i == 0:  # nothing reads them
            block = {name: value for name, value in block.items() if name not in ("att.v0", "att.v1", "att.v2")}
        made |= {f"blocks.{i}.{name}": value for name, value in block.items()}
        norms += [f"blocks.{i}.{name}" for name in ("ln1", "ln2", "att.ln_x")]
    for norm in norms:
        made |= {f"{norm}.weight": normal(C, scale=0.05, around=1), f"{norm}.bias": normal(C, scale=0.02)}
    return {name: tensor.bfloat16() for name, tensor in made.items()}


def write_gguf(folder: Path, weights: Mapping[str, Tensor], kind: str) -> None:
    """What llama.cpp's converter makes of RWKV-7, without a vocabulary."""
    gguf_files = of_the_tests("gguf_files")
    floats = {name: tensor.float() for name, tensor in weights.items()}
    ranks = {"decay": "w", "iclr": "a", "value_residual_mix": "v", "gate": "g"}
    changes = {f"attention.{name}_lora_rank": RANKS[j] for name, j in ranks.items()}
    changes |= {"feed_forward_length": len(floats["blocks.0.ffn.key.weight"]), "vocab_size": len(floats["emb.weight"])}
    keys = gguf_files.gguf_keys(floats, **changes) | {"tokenizer.ggml.model": "no_vocab"}
    tensors = gguf_files.gguf_tensors(floats)
    gguf_files.write_gguf(folder / f"{kind}.gguf", keys, tensors, kind=gguf_files.Kind[kind])


def products(weights: Mapping[str, Tensor]) -> Counter[tuple[int, int]]:
    """(in, out) of the matrices of all blocks → how many there are."""
    found: Counter[tuple[int, int]] = Counter()
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
            found[tensor.shape[1], tensor.shape[0]] += 1
        elif re.search(r"[wavg][12]$", name) and tensor.ndim == 2:
            found[tensor.shape[0], tensor.shape[1]] += 1
    return found


# ---- contestants, each in a process of its own, whose interpreter may have little more than numpy ----


class Runner(Protocol):
    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """After each token, [T, V], from the zero state."""

    def read(self, ids: list[int]) -> None:
        """From the zero state in calls of CHUNK, the head for the last token of each."""

    def decode(self, batch: int, n: int) -> None:
        """`n` greedy steps of `batch` rows from the zero state."""


class Ours:
    def __init__(self, folder: Path, setting: str, threads: int) -> None:
        import rwkv_stream as rs

        special = {"reference": {"dtype": "fp32", "backend": "reference"}, "int8": {"dtype": "bf16", "weights": "int8"}}
        options: dict[str, Any] = {"backend": "cpu", "dtype": setting} | special.get(setting, {})  # never a slower one
        options |= {"device": "cpu", "threads": threads, "tokenizer": str(folder / "tokenizer.json")}
        self.model = rs.load(folder / "model.pth", **options)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        import torch

        return self.model.forward(torch.tensor([ids]), logits="all")[0][0].numpy()

    def read(self, ids: list[int]) -> None:
        import torch

        tokens, state = torch.tensor([ids]), self.model.zero_state()
        for start in range(0, len(ids), CHUNK):
            _, state = self.model.forward(tokens[:, start : start + CHUNK], state, logits="last")

    def decode(self, batch: int, n: int) -> None:
        import torch

        tokens, state = torch.zeros(batch, 1, dtype=torch.int64), self.model.zero_state(batch)
        for _ in range(n):
            logits, state = self.model.forward(tokens, state, logits="last")
            tokens = logits.argmax(-1, keepdim=True)


class PypiRwkv:
    def __init__(self, folder: Path, setting: str, threads: int) -> None:
        import torch

        if "blocks.0.att.r_k" in torch.load(folder / "model.pth", mmap=True):
            os.environ["RWKV_V7_ON"] = "1"
        os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        torch.set_num_threads(threads)
        self.model = importlib.import_module("rwkv.model").RWKV(model=str(folder / "model"), strategy=f"cpu {setting}")

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        made: NDArray[np.float32] = self.model.forward(ids, None, full_output=True)[0].float().numpy()
        return made

    def read(self, ids: list[int]) -> None:
        state = None
        for start in range(0, len(ids), CHUNK):
            _, state = self.model.forward(ids[start : start + CHUNK], state)

    def decode(self, batch: int, n: int) -> None:
        if batch > 1:
            raise NotImplementedError("one row only")
        token, state = 0, None
        for _ in range(n):
            logits, state = self.model.forward([token], state)
            token = int(logits.argmax())


class LlamaCpp:
    def __init__(self, folder: Path, setting: str, threads: int) -> None:
        self.api, self.threads = importlib.import_module("llama_cpp"), threads
        self.api.llama_backend_init()
        options = self.api.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(str(folder / f"{setting}.gguf").encode(), options)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the file")
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.batch = self.api.llama_batch_init(CHUNK, 0, 1)
        self.contexts: dict[int, Any] = {}

    def fresh(self, rows: int) -> Any:
        """A context for so many rows, at the zero state."""
        if rows not in self.contexts:
            options = self.api.llama_context_default_params()
            options.n_ctx, options.n_batch, options.n_seq_max = 1 << 17, CHUNK, rows
            options.n_threads = options.n_threads_batch = self.threads
            self.contexts[rows] = self.api.llama_init_from_model(self.model, options)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.contexts[rows]), True)
        return self.contexts[rows]

    def call(self, context: Any, entries: Sequence[tuple[int, int, int, bool]]) -> NDArray[np.float32]:
        """Read (token, place, row, wanted) each: the logits that are wanted."""
        self.batch.n_tokens = len(entries)
        for i, (token, place, row, wanted) in enumerate(entries):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, place, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        if status := self.api.llama_decode(context, self.batch):
            raise RuntimeError(f"llama_decode returned {status}")
        n = sum(wanted for *_, wanted in entries)
        made: NDArray[np.float32] = np.ctypeslib.as_array(self.api.llama_get_logits(context), (n, self.vocab_size))
        return made

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        return np.array(self.call(self.fresh(1), [(token, i, 0, True) for i, token in enumerate(ids)]))

    def read(self, ids: list[int]) -> None:
        context = self.fresh(1)
        for start in range(0, len(ids), CHUNK):
            end = min(len(ids), start + CHUNK)
            self.call(context, [(ids[i], i, 0, i + 1 == end) for i in range(start, end)])

    def decode(self, batch: int, n: int) -> None:
        context, tokens = self.fresh(batch), [0] * batch
        for place in range(n):
            logits = self.call(context, [(token, place, row, True) for row, token in enumerate(tokens)])
            tokens = logits.argmax(-1).tolist()


class Transformers:
    def __init__(self, folder: Path, setting: str, threads: int) -> None:
        import torch
        from transformers import RwkvConfig, RwkvForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        weights = torch.load(folder / "model.pth", mmap=True)
        F, C = weights["blocks.0.ffn.key.weight"].shape
        layers = sum(name.endswith("ln1.weight") for name in weights)
        sizes = {"vocab_size": len(weights["emb.weight"]), "hidden_size": C, "intermediate_size": F}
        config = RwkvConfig(**sizes, num_hidden_layers=layers, context_length=1 << 20, rescale_every=0)
        with torch.device("meta"):
            model = RwkvForCausalLM(config)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]
        named = of_the_tests("hf_layouts").rwkv_hf(weights)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in named.items()}, assign=True)
        self.model = model.eval()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        import torch

        made: NDArray[np.float32] = self.model(torch.tensor([ids])).logits[0].float().numpy()
        return made

    def read(self, ids: list[int]) -> None:
        import torch

        tokens, state = torch.tensor([ids]), None
        for start in range(0, len(ids), CHUNK):
            part = self.model.rwkv(tokens[:, start : start + CHUNK], state=state, use_cache=True)
            state = part.state
            self.model.head(part.last_hidden_state[:, -1])

    def decode(self, batch: int, n: int) -> None:
        import torch

        tokens, state = torch.zeros(batch, 1, dtype=torch.int64), None
        for _ in range(n):
            made = self.model(tokens, state=state, use_cache=True)
            tokens, state = made.logits.argmax(-1), made.state


RUNNERS: dict[str, Callable[[Path, str, int], Runner]] = {
    "rwkv-stream": Ours,
    "rwkv": PypiRwkv,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def serve(name: str, setting: str, folder: str, threads: str) -> None:
    """Answer requests, a JSON object a line; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path = [place for place in sys.path if place != str(Path(__file__).parent)]
    runner = RUNNERS[name](Path(folder), setting, int(threads))
    print("{}", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "logits":
                np.save(request["out"], runner.logits(request["tokens"]))
                answer = {}
            case "prefill":
                ids = tokens_of(request["n"], request["vocab"])
                began = time.perf_counter()
                runner.read(ids)
                answer = {"seconds": time.perf_counter() - began}
            case "decode":
                began = time.perf_counter()
                runner.decode(request["batch"], request["n"])
                answer = {"seconds": time.perf_counter() - began}
            case other:
                raise ValueError(other)
        print(json.dumps(answer), file=answers)


def tokens_of(n: int, vocab_size: int) -> list[int]:
    made: list[int] = np.random.default_rng(0).integers(0, vocab_size, n).tolist()
    return made


class ContestantError(Exception):
    """A contestant's process has ended; says why."""


class Contestant:
    """A process that has the model loaded. Raises ContestantError."""

    def __init__(self, name: str, setting: str, folder: Path, *, threads: int, python: str = sys.executable) -> None:
        self.name, self.setting = name, setting
        self.is_ours = name == "rwkv-stream"
        self.log = folder / f"{name} {setting}.log"
        command = [python, str(Path(__file__).resolve()), "contestant", name, setting, str(folder), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.answer()

    @property
    def batches(self) -> tuple[int, ...]:
        return BATCHES[:1] if self.name in ("rwkv", "transformers") else BATCHES  # one cannot, one takes minutes

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            lines = self.log.read_text(errors="replace").split("\n")
            reason = next((text.strip() for text in reversed(lines) if text.strip()), "no reason given")
            raise ContestantError(f"{self.name} {self.setting} ended with {self.process.returncode}: {reason[:200]}")
        found: dict[str, float] = json.loads(line)
        return found

    def ask(self, **request: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        file = self.log.with_suffix(".npy")
        self.ask(do="logits", tokens=ids, out=str(file))
        made: NDArray[np.float32] = np.load(file)
        file.unlink()
        return made

    def prefill(self, n: int, vocab_size: int) -> float:
        """Tokens per second."""
        return n / self.ask(do="prefill", n=n, vocab=vocab_size)["seconds"]

    def decode(self, batch: int, n: int = DECODE_STEPS) -> float:
        """Tokens per second of all rows."""
        return batch * n / self.ask(do="decode", batch=batch, n=n)["seconds"]

    def peak_rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# ---- measuring ----


def closeness(found: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """Relative error, share of equal choices, mean KL divergence in nats, of logits [T, V]."""
    kl = same = square = norm = 0.0
    for mine, theirs in zip(found.astype(np.float64), reference.astype(np.float64), strict=True):
        square, norm = square + ((mine - theirs) ** 2).sum(), norm + (theirs**2).sum()
        same += mine.argmax() == theirs.argmax()
        p, q = (z - z.max() - np.log(np.exp(z - z.max()).sum()) for z in (theirs, mine))
        kl += (np.exp(p) * (p - q)).sum()
    error = float(np.sqrt(square / norm))
    return {"error": error, "argmax": float(same / len(found)), "kl": float(kl / len(found))}


def seconds_of(work: Callable[[], object], at_least: float = 0.05) -> float:
    """Seconds of one call, repeated for a while."""
    work()
    began, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < at_least or n < 2:
        work()
        n += 1
    return spent / n


def bounds(shapes: Mapping[tuple[int, int], int]) -> dict[str, float]:
    """Seconds for the products of CHUNK tokens in either dtype, and for reading a byte."""
    import torch

    made = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        made[name] = 0.0
        for (n_in, n_out), count in shapes.items():
            x, weight = torch.ones(CHUNK, n_in, dtype=dtype), torch.ones(n_out, n_in, dtype=dtype)
            made[name] += count * seconds_of(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
    x = torch.ones(1 << 26)
    return made | {"byte": seconds_of(x.sum, 0.2) / x.nbytes}


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def machine() -> dict[str, Any]:
    flags = Path("/proc/cpuinfo").read_text().split("flags")[1].split("\n")[0].split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "python": platform.python_version(),
    }


def installed(pythons: Sequence[str], package: str, module: str) -> tuple[str, str] | None:
    """The first interpreter that has a package, and its version."""
    code = f"import {module}, importlib.metadata as m; print('\\n' + m.version({package!r}))"
    for python in pythons:
        ran = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if ran.returncode == 0:
            return python, ran.stdout.split()[-1]
    return None


def prepare(shape: Shape, folder: Path) -> dict[str, Tensor]:
    """Write the checkpoint, and a tokenizer for its vocabulary; the weights."""
    import torch
    from tokenizers import Tokenizer, models

    weights = weights_of(shape)
    torch.save(weights, folder / "model.pth")
    Tokenizer(models.WordLevel({str(i): i for i in range(shape.vocab_size)}, unk_token="0")).save(
        str(folder / "tokenizer.json")
    )
    return weights


def started(
    folder: Path,
    weights: Mapping[str, Tensor],
    model_version: str,
    threads: int,
    pythons: Sequence[str],
    wanted: Sequence[str] = (),
) -> tuple[list[Contestant], dict[str, str], dict[str, str]]:
    """All contestants there are, of our own only the `wanted`; versions of packages; name → why it is not one."""
    import rwkv_stream as rs

    versions = {name: version(name) for name in ("rwkv-stream", "torch", "numpy")}
    settings = ["fp32", "bf16"] + ["int8"] * ("weights" in inspect.signature(rs.load).parameters)
    contestants: list[Contestant] = []
    absent: dict[str, str] = {}
    for setting in settings:
        if wanted and setting not in wanted:
            absent[f"rwkv-stream {setting}"] = "left out"
            continue
        try:
            contestants.append(Contestant("rwkv-stream", setting, folder, threads=threads))
        except ContestantError as error:
            raise SystemExit(str(error)) from error
    for name, (package, module, settings_, known) in PEERS.items():
        found = installed(pythons, package, module)
        if found is None:
            absent[name] = "not installed"
            continue
        if model_version not in known:
            absent[name] = "has no such version on a CPU, or this program does not convert it"
            continue
        python, versions[package] = found
        for setting in settings_:
            print(f"loading {name} {setting}", flush=True)
            try:
                if name == "llama.cpp":
                    write_gguf(folder, weights, setting)
                contestants.append(Contestant(name, setting, folder, threads=threads, python=python))
            except (ContestantError, ImportError) as error:
                absent[f"{name} {setting}"] = str(error)
    return contestants, versions, absent


def checked(
    contestants: list[Contestant], folder: Path, shape: Shape, threads: int, absent: dict[str, str]
) -> list[dict[str, Any]]:
    """How close each is to the reference; SystemExit where one of ours is off. Peers that fail become absent."""
    text = (TEXT * 8)[: CHECKED // 2]
    ids = tokens_of(CHECKED // 2, shape.vocab_size) + list(text)
    judge = Contestant("rwkv-stream", "reference", folder, threads=threads)
    reference = judge.logits(ids)
    judge.close()
    rows: list[dict[str, Any]] = []
    for each in list(contestants):
        row: dict[str, Any] = {"name": each.name, "setting": each.setting}
        try:
            row |= closeness(each.logits(ids), reference)
        except ContestantError as error:
            if each.is_ours:
                raise
            absent[f"{each.name} {each.setting}"] = str(error)
            contestants.remove(each)
            continue
        row["tolerance"] = TOLERANCE_8_BIT if row["setting"] in ("int8", "Q8_0") else TOLERANCE
        row["correct"] = row["error"] <= row["tolerance"]
        rows.append(row)
        print(f"{each.name} {each.setting}: error {row['error']:.1e}, argmax {row['argmax']:.1%}", flush=True)
    if off := [row for row in rows if row["name"] == "rwkv-stream" and not row["correct"]]:
        for row in off:
            wanted = f"expected an error of at most {row['tolerance']}"
            print(f"rwkv-stream {row['setting']}: {wanted}, found {row['error']:.3g}")
        raise SystemExit(1)
    return rows


def race(
    contestants: Sequence[Contestant], shape: Shape, shapes: Counter[tuple[int, int]], sizes: Mapping[str, int]
) -> tuple[list[dict[str, float]], list[list[dict[str, float]]]]:
    """Of each round the bounds, and of each contestant tokens/s of reading (`prefill`) and at each batch."""

    def turn(each: Contestant, n: int, steps: int) -> dict[str, float]:
        figures = {"prefill": each.prefill(n, shape.vocab_size)}
        return figures | {f"decode {batch}": each.decode(batch, steps) for batch in each.batches}

    lengths = [sizes["tokens"] if each.is_ours else sizes["peer_tokens"] for each in contestants]
    for each, n in zip(contestants, lengths, strict=True):  # to warm up
        turn(each, min(n, 2 * CHUNK), 4)
    limits, turns = [], []
    for i in range(sizes["rounds"]):
        print(f"round {i + 1} of {sizes['rounds']}", flush=True)
        limits.append(bounds(shapes))
        turns.append([turn(each, n, DECODE_STEPS) for each, n in zip(contestants, lengths, strict=True)])
    return limits, turns


def add_figures(
    rows: list[dict[str, Any]],
    turns: Sequence[Sequence[Mapping[str, float]]],
    limits: Sequence[Mapping[str, float]],
    n_read: int,
) -> None:
    """Medians with spread, shares of the bounds and ratios to the best peer that is right; n_read: weights a step."""
    for i, row in enumerate(rows):
        for key in turns[0][i]:
            row[key] = spread(turn[i][key] for turn in turns)
        row["prefill_share"] = statistics.median(
            turn[i]["prefill"] * limit["bf16"] / CHUNK for turn, limit in zip(turns, limits, strict=True)
        )
        row["decode_share"] = statistics.median(
            turn[i]["decode 1"] * n_read * WEIGHT_BYTES[row["setting"]] * limit["byte"]
            for turn, limit in zip(turns, limits, strict=True)
        )
    for key in ("prefill", *(f"decode {batch}" for batch in BATCHES)):
        peers = [i for i, row in enumerate(rows) if row["name"] != "rwkv-stream" and row["correct"] and key in row]
        if peers:
            best = max(peers, key=lambda i: rows[i][key]["median"])
            for i, row in enumerate(rows):
                if key in row and row["correct"]:
                    row[f"{key} ratio"] = spread(turn[i][key] / turn[best][key] for turn in turns)


def show(shape: str, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{shape}, {result['threads']} threads, tokens per second")
    headings = ("contestant", "setting", "prefill", "of bf16 GEMM", "decode", *(f"B = {b}" for b in BATCHES[1:]))
    for heading in (*headings, "error", "argmax", "KL", "prefill ×", "decode ×"):
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")

    def rate(figures: Mapping[str, float] | None) -> str:
        if figures is None:
            return "–"
        return f"{figures['median']:,.0f}\n{figures['lowest']:,.0f}…{figures['highest']:,.0f}"

    def ratio(row: Mapping[str, Any], key: str) -> str:
        return f"{row[key]['median']:.2f}" if key in row else "–"

    for row in result["contestants"]:
        table.add_row(
            row["name"],
            row["setting"] if row["correct"] else f"{row['setting']}, wrong",
            rate(row["prefill"]),
            f"{row['prefill_share']:.0%}",
            *(rate(row.get(f"decode {batch}")) for batch in BATCHES),
            f"{row['error']:.1e}",
            f"{row['argmax']:.1%}",
            f"{row['kl']:.1e}",
            ratio(row, "prefill ratio"),
            ratio(row, "decode 1 ratio"),
        )
    console = Console(width=160)
    console.print(table)
    limits = result["bounds"]
    console.print(
        f"bounds: {limits['bf16_tok_s']['median']:,.0f} tokens/s by bf16 products ({limits['bf16_flop_s'] / 1e9:,.0f} "
        f"GFLOP/s), {limits['fp32_tok_s']['median']:,.0f} by fp32 ({limits['fp32_flop_s'] / 1e9:,.0f} GFLOP/s); "
        f"reading {limits['read_bytes_s'] / 1e9:,.1f} GB/s"
    )
    for name, reason in result["absent"].items():
        console.print(f"{name}: {reason}")


def compare(
    shape: str,
    threads: int,
    rounds: int,
    tokens: int,
    peer_tokens: int,
    setting: Sequence[str],
    peers_python: Sequence[str],
    out: Path,
) -> None:
    import torch

    torch.set_num_threads(threads)
    form = SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = prepare(form, folder)
        shapes = products(weights)
        n_products = sum(n_in * n_out * count for (n_in, n_out), count in shapes.items())
        n_read = n_products + weights["head.weight"].numel()
        pythons = [*peers_python, sys.executable]
        contestants, versions, absent = started(folder, weights, form.version, threads, pythons, setting)
        del weights
        sizes = {"rounds": rounds, "tokens": tokens, "peer_tokens": peer_tokens}
        try:
            rows = checked(contestants, folder, form, threads, absent)
            limits, turns = race(contestants, form, shapes, sizes)
        except ContestantError as error:
            raise SystemExit(str(error)) from error
        finally:
            for each in contestants:
                each.close()
    add_figures(rows, turns, limits, n_read)
    found: dict[str, Any] = {"read_bytes_s": 1 / statistics.median(limit["byte"] for limit in limits)}
    for kind in ("bf16", "fp32"):
        found[f"{kind}_tok_s"] = spread(CHUNK / limit[kind] for limit in limits)
        found[f"{kind}_flop_s"] = 2 * n_products * found[f"{kind}_tok_s"]["median"]
    result = {
        "machine": machine(),
        "versions": versions,
        "shape": asdict(form),
        "threads": threads,
        **sizes,
        "bounds": found,
        "contestants": rows,
        "absent": absent,
    }
    show(shape, result)
    results = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(results | {shape: result}, indent=1, ensure_ascii=False) + "\n")


def command() -> click.Command:
    import click

    count = click.IntRange(min=1)
    options: list[click.Parameter] = [
        click.Option(["--shape"], type=click.Choice(list(SHAPES)), default="0.1b", show_default=True),
        click.Option(["--threads"], type=count, default=os.cpu_count(), show_default=True),
        click.Option(["--rounds"], type=count, default=3, show_default=True),
        click.Option(["--tokens"], type=count, default=65536, show_default=True, help="Read by rwkv-stream a round."),
        click.Option(["--peer-tokens"], type=count, default=8192, show_default=True, help="Read by peers a round."),
        click.Option(["--setting"], multiple=True, help="Of rwkv-stream, only these: fp32, bf16, int8."),
        click.Option(
            ["--peers-python"],
            multiple=True,
            type=click.Path(exists=True, dir_okay=False),
            help="An interpreter that has peers.",
        ),
        click.Option(["--out"], type=click.Path(path_type=Path), default=RESULTS, help="Figures are entered here."),
    ]
    text = (__doc__ or "").replace("\n\n    python", "\n\n\b\n    python")
    return click.Command("compare", callback=compare, params=options, help=text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["contestant"]:
        serve(*sys.argv[2:])
    else:
        command()()
