"""How fast RWKV-7 is read and continued on one GPU, beside what that GPU could do at most; first, whether it is right.

    python benchmarks/gpu.py [--shape 7.2b] [--only prefill,decode] [--tokens 1000000] [--out PATH]

correctness  always runs, and first; where a check fails nothing is timed and the exit code is 1. Every Triton kernel
             against float64, at most twice as far from it as plain torch in the same dtype, and a rounding; the shipped
             model on the GPU in fp32 against the CPU; the same bits twice, and from a state that was put aside. Whether
             a model gives the same bits in one call as in two, which is up to torch's products, is told only
roofline     bf16 products by torch: a large square one, and the matrices of each shape; copying within the GPU
prefill      one sequence, in calls of the size that a short sweep finds best; its products and one large one are
             measured between the segments of the reading, and the recurrence alone on inputs of the same shape
decode       greedy steps of 1 to 512 rows; a step must at least read the weights, and read and write the states
wkv          the recurrence alone, and with its gradients, in turns with flash-linear-attention's, where installed
snapshots    `ingest` with a snapshot every 4,096 tokens, in turns with one at the end; the store lies in TMPDIR
rwkv         the PyPI package on the same weights, in a process of its own, since it changes settings of torch

Weights are random, of official shapes, in bf16, made on the GPU; before a shape is timed its logits are compared with
those of plain torch. Figures are medians with the lowest and highest, and are entered after each part, so that what was
measured stays when the rest is cut short. A figure that could not be had stands there with its reason.

With --device cpu and TRITON_INTERPRET=1 the program is rehearsed on a tiny shape: what it prints then measures nothing
and is written nowhere.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from compare import ROOT, TOLERANCE, PypiRwkv, closeness, machine, products, spread, tokens_of
from memory import prose
from torch import Tensor

if TYPE_CHECKING:
    import click

    from rwkv_stream.model import Config, Model
    from rwkv_stream.model.state import State

RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
STORY = ROOT / "samples" / "story.txt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PEER_ROUNDS = 3
PEER_S = 400  # for all of a peer, with the building of its kernels
PEER_READING_S = 10  # after which a slow peer has shown its rate
PREFILL_S = 180  # for all of a reading
STORED_S = 6  # of reading, in each round of `snapshots`

T = TypeVar("T")
Figures = dict[str, dict[str, Any]]  # name → median, lowest, highest and unit; or why there is none


@dataclass(frozen=True)
class Shape:
    """RWKV-7 as released; low ranks of w, a, v, g. Source: BlinkDL/RWKV-LM: RWKV-v7/README.md."""

    n_layer: int
    n_embd: int
    ranks: tuple[int, int, int, int]
    vocab_size: int = 65536


SHAPES = {
    "7.2b": Shape(32, 4096, (128, 128, 96, 480)),
    "1.5b": Shape(24, 2048, (96, 96, 64, 256)),
    "0.1b": Shape(12, 768, (64, 64, 32, 128)),
    "2.9b": Shape(32, 2560, (96, 96, 64, 320)),
    "tiny": Shape(2, 128, (32, 32, 16, 64), 1024),
}
STORED = ("7.2b", "0.1b", "tiny")  # shapes of `snapshots`
OF_PEERS = ("0.1b", "tiny")


@dataclass(frozen=True)
class Sizes:
    """How much is done; tokens unless it says otherwise."""

    lengths: tuple[int, ...]  # segments of the checks of kernels
    dtypes: tuple[str, ...]  # of these checks
    cut: int  # where calls of the recurrence are cut, on the grid of its blocks
    prompt: int
    continued: int
    story: int | None  # None: all of it
    call: int  # of the checks of models
    half: int  # of a text that is read in one call and in two
    rounds: int
    square: int  # rows of a large product
    copied: int  # bytes
    calls: tuple[int, ...]  # sweep
    sweep: int
    segments: int  # of a reading
    batches: tuple[int, ...]
    steps: int
    wkv: tuple[int, int]  # length, heads of 64
    stored: tuple[int, int]  # fewest and most
    every: int  # between snapshots
    peer: int


REAL = Sizes(
    lengths=(1, 2, 15, 16, 17, 63, 64, 65, 200, 1000),
    dtypes=("fp32", "bf16", "fp16"),
    cut=512,
    prompt=128,
    continued=256,
    story=None,
    call=1024,
    half=1024,
    rounds=5,
    square=8192,
    copied=1 << 30,
    calls=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    sweep=65536,
    segments=5,
    batches=(1, 8, 64, 512),
    steps=64,
    wkv=(65536, 64),
    stored=(65536, 1 << 20),
    every=4096,
    peer=65536,
)
REHEARSAL = Sizes(  # no bf16: the interpreter cuts bits off where GPUs round
    lengths=(1, 19),
    dtypes=("fp16",),
    cut=64,
    prompt=4,
    continued=2,
    story=20,
    call=16,
    half=4,
    rounds=1,
    square=64,
    copied=1 << 16,
    calls=(16, 32),
    sweep=32,
    segments=2,
    batches=(1, 2),
    steps=2,
    wkv=(64, 1),
    stored=(32, 32),
    every=16,
    peer=16,
)


@dataclass(frozen=True)
class Aim:
    bound: float
    is_least: bool = True

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {written(self.bound)}"

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value <= self.bound


OWN_PRODUCTS = "share of its products' rate"
IN_WKV = "share of the time in the recurrence"
OF_BANDWIDTH = "share of the bandwidth bound"
TO_FLA = "times as fast as flash-linear-attention"
TRAINED_TO_FLA = f"{TO_FLA} with gradients"
SLOWER = "slower by"
AIMS = {
    ("prefill 7.2b", OWN_PRODUCTS): Aim(0.60),
    ("prefill 7.2b", IN_WKV): Aim(0.12, is_least=False),
    ("decode 7.2b", f"B = 1, {OF_BANDWIDTH}"): Aim(0.85),
    ("decode 7.2b", "B = 512"): Aim(20_000),
    ("decode 1.5b", "B = 1"): Aim(399),
    ("wkv", TO_FLA): Aim(1.5),
    ("wkv", TRAINED_TO_FLA): Aim(1),
    ("snapshots 7.2b", SLOWER): Aim(0.02, is_least=False),
    ("snapshots 0.1b", SLOWER): Aim(0.02, is_least=False),
}


# ---- measuring ----


@dataclass(frozen=True)
class Device:
    where: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def is_gpu(self) -> bool:
        return self.where.type == "cuda"

    def timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds, and what came of it."""
        made: list[T] = []
        return self.seconds(lambda: made.append(work())), made.pop()

    def seconds(self, work: Callable[[], object], n: int = 1) -> float:
        """Of one of n calls, until the device has done them."""
        if not self.is_gpu:
            began = time.perf_counter()
            for _ in range(n):
                work()
            return (time.perf_counter() - began) / n
        torch.cuda.synchronize(self.where)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(n):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / n

    def repeated(self, work: Callable[[], object]) -> float:
        """Seconds of a short piece of work, once it is warm."""
        work()
        return self.seconds(work, 10 if self.is_gpu else 2)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.where, dtype=dtype or self.dtype)

    def forget_peak(self) -> None:
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.where)

    def peak_bytes(self) -> float:
        """Most memory of the GPU that tensors took since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self.where) if self.is_gpu else 0

    def give_back(self) -> None:
        """Memory that no tensor uses any more."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def product_s(self, rows: int, n_in: int, n_out: int) -> float:
        x, weight, y = self.normal(rows, n_in), self.normal(n_out, n_in), self.normal(rows, n_out)
        return self.repeated(lambda: torch.mm(x, weight.T, out=y))

    def products_s(self, shapes: Mapping[tuple[int, int], int], rows: int) -> float:
        """Seconds that torch takes for all products of one call."""
        return sum(count * self.product_s(rows, n_in, n_out) for (n_in, n_out), count in shapes.items())

    def square_flop_s(self) -> float:
        n = self.sizes.square
        return 2 * n**3 / self.product_s(n, n, n)

    def copy_bytes_s(self) -> float:
        """Bytes read and bytes written, together."""
        source = self.normal(self.sizes.copied // 4, dtype=torch.float32)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.repeated(lambda: target.copy_(source))


def figure(values: Sequence[float], unit: str = "") -> dict[str, Any]:
    return spread(values) | {"unit": unit}


def absent(reason: object) -> dict[str, Any]:
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return {"absent": lines[0][:200] if lines else type(reason).__name__}


# ---- models of random weights ----


def config_of(shape: Shape) -> Config:
    from rwkv_stream.model import Config

    C = shape.n_embd
    ranks = dict(zip("wavg", shape.ranks, strict=True))
    return Config("7", shape.n_layer, C, C // 64, 64, 4 * C, shape.vocab_size, tuple((j, ranks[j]) for j in "wagv"))


def random_weights(config: Config, device: torch.device) -> dict[str, Tensor]:
    """bf16, of one seed, in the ranges of trained ones: nothing grows with the length of a text."""
    from rwkv_stream.model import v7

    generator = torch.Generator(device).manual_seed(0)
    ranges = {"w0": (-6.0, 1.0), "a0": (-1.0, 1.0), "v0": (0.0, 1.0), "k_k": (0.6, 0.8), "k_a": (0.9, 1.1)}
    gains = {"emb": 0.5, "head": 2.0, "r_k": 0.4, "ffn": 0.7}

    def made(name: str, size: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        last = name.split(".")[-1]
        if len(size) == 1:
            of_norm = (-0.02, 0.02) if last == "bias" else (0.9, 1.1)
            low, high = ranges.get(last, (0.0, 1.0) if last.startswith("x_") else of_norm)
            return tensor.uniform_(low, high, generator=generator)
        fan_in = 1 if name == "emb.weight" else size[0] if last[-1] in "12" else size[1]
        gain = next((gain for part, gain in gains.items() if part in name), 0.5)
        return tensor.normal_(0, gain * fan_in**-0.5, generator=generator)

    return {name: made(name, size) for name, size in v7.shapes(config).items()}


def model_of(config: Config, weights: Mapping[str, Tensor], device: Device) -> Model:
    """What `load` would make of a checkpoint of these weights: the shipped model with other tensors, no file."""
    import rwkv_stream as rs
    from rwkv_stream.model import v7
    from rwkv_stream.model.checkpoints import sources
    from rwkv_stream.model.dtypes import dtype_in_memory
    from rwkv_stream.model.state import State
    from rwkv_stream.text import tokenizer

    def kept(name: str) -> Tensor:
        return weights[name].to(dtype_in_memory(name, sources.of(weights[name]), device.dtype))

    def block(i: int) -> dict[str, Tensor]:
        start = f"blocks.{i}."
        names = [name for name in weights if name.startswith(start) and ".ln0." not in name]
        return dict(v7.prepare({name.removeprefix(start): kept(name) for name in names}, config))

    outer = [name for name in weights if not name.startswith("blocks.") or ".ln0." in name]
    dtype = next(name for name, dtype in DTYPES.items() if dtype == device.dtype)
    shipped = rs.load(device=str(device.where), dtype=dtype, backend="triton", tokenizer="bytes")
    words = "world" if config.vocab_size == 65536 else "bytes"
    return dataclasses.replace(
        shipped,
        config=config,
        tokenizer=tokenizer.find(words, Path("random weights"), config.vocab_size, {}),
        fingerprint=hashlib.sha256(repr(config).encode()).hexdigest(),
        path="random weights",
        initial=State.initial(config, device=device.where),
        outer={name.removeprefix("blocks.0."): kept(name) for name in outer},
        stages=[shipped.stages[0]._replace(blocks=[block(i) for i in range(config.n_layer)])],
    )


def in_plain_torch(model: Model) -> Model:
    """The same tensors, computed with by the reference backend."""
    from rwkv_stream.kernels import resolve

    name, wkv = resolve(model.config.version, "reference", model.device)
    return dataclasses.replace(model, backend=name, wkv=wkv)


def all_logits(model: Model, ids: Tensor) -> Any:
    return model.forward(ids, logits="all")[0][0].float().cpu().numpy()


class Models:
    """Models of random weights, one at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._kept: tuple[str, Model] | None = None

    def get(self, name: str) -> Model:
        """Raises SystemExit where its logits are not those of plain torch."""
        if self._kept is None or self._kept[0] != name:
            self.drop()
            config = config_of(SHAPES[name])
            model = model_of(config, random_weights(config, self._device.where), self._device)
            ids = torch.tensor([tokens_of(min(256, self._device.sizes.call), config.vocab_size)])
            error = closeness(all_logits(model, ids), all_logits(in_plain_torch(model), ids))["error"]
            print(f"{name}: logits {error:.1e} from those of plain torch", flush=True)
            if not error <= TOLERANCE:
                print(f"{name}: expected an error of at most {TOLERANCE}, found {error:.3g}; nothing more is timed")
                raise SystemExit(1)
            self._kept = name, model
        return self._kept[1]

    def drop(self) -> None:
        self._kept = None
        self._device.give_back()


# ---- correctness ----


@dataclass(frozen=True)
class Check:
    """One that is not `needed` is told, and stops nothing."""

    name: str
    expected: str
    found: str
    is_right: bool
    needed: bool = True


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value that is wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def within_twice(name: str, found: Tensor, plain: Tensor, wanted: Tensor) -> Check:
    """Off by no more than twice what plain torch is in the same dtype, and a rounding: of fp32 sums, 3e-6."""
    rounding = 3e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    off, limit = distance(found, wanted), 2 * distance(plain, wanted) + rounding
    return Check(name, f"≤ {limit:.1e} from float64", f"{off:.1e}", off <= limit)


class Random:
    """Seeded fp32 tensors, the same on every device."""

    def __init__(self, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device

    def normal(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=self._generator)).to(self._device)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self.normal(*shape).sigmoid()


Tensors = tuple[Tensor, ...]


def of_recurrence(version: str, random: Random, n: int, R: int, H: int) -> tuple[Tensors, Tensors, Tensors]:
    """Inputs of n tokens, constants and R states, as `kernels.Recurrence` has them, as the model makes them."""
    N = 64
    size = (n, H * N) if version == "4" else (n, H, N)
    w = -torch.exp(random.normal(*size, scale=2, around=-2))
    k, v, u = random.normal(*size), random.normal(*size), random.normal(*size[1:])
    if version == "4":  # its keys reach tens
        sums = random.normal(R, H * N), random.normal(R, H * N).exp(), random.normal(R, H * N, scale=5)
        return (w, 8 * k, v), (u,), sums
    r, state = random.normal(*size), (random.normal(R, H, N, N),)
    if version == "6":
        return (r, w, k, v), (u,), state
    kk = torch.nn.functional.normalize(random.normal(*size), dim=-1)
    return (r, w.clamp(-0.6, 0), k, v, -kk, kk * random.between(0, 1, *size)), (), state


def one_by_one(
    version: str, given: tuple[Tensors, Tensors, Tensors], lengths: Sequence[int], start: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensors]:
    """Each segment through the sequential form: y in `dtype`, from inputs rounded to it; states in fp32 or better."""
    from rwkv_stream.kernels import KERNELS
    from rwkv_stream.kernels.recurrence import reference as wkv_ref

    form = wkv_ref.FORMS[KERNELS[version]][0]
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    inputs, constants, state = given
    ys, news = [], []
    for s, part in enumerate(zip(*(torch.split(z, list(lengths)) for z in inputs), strict=True)):
        rounded = [z[None].to(dtype).to(inner) for z in part]
        y, *new = form(*rounded, *(z.to(inner) for z in constants), *(z[start[s], None].to(inner) for z in state))
        ys.append(y[0].to(dtype))
        news.append(new)
    return torch.cat(ys), tuple(torch.cat(parts) for parts in zip(*news, strict=True))


def comparable(version: str, state: Tensors) -> Tensor:
    """One tensor; (num, den, max) is one of many ways to write the same sums."""
    num, *sums = state
    if version != "4":
        return num
    den, top = sums
    return torch.stack([num / den, den.log() + top])


def recurrences(device: Device) -> Iterator[Check]:
    """RWKV-4, 6 and 7 over segments of many lengths; then cut where the blocks of the kernels begin."""
    from rwkv_stream.kernels import resolve

    lengths = device.sizes.lengths
    offsets = torch.tensor([0, *lengths], device=device.where).cumsum(0)
    start, every = (torch.arange(len(lengths), device=device.where) % n for n in (3, len(lengths)))
    for version in ("4", "6", "7"):
        kernel = resolve(version, "triton", device.where)[1]
        given = of_recurrence(version, Random(device.where), sum(lengths), 3, 2)
        inputs, constants, state = given
        decay = 0 if version == "4" else 1  # that stays fp32
        wanted, wanted_state = one_by_one(version, given, lengths, start, torch.float64)
        for name in device.sizes.dtypes:
            dtype = DTYPES[name]
            rounded = tuple(z if i == decay else z.to(dtype) for i, z in enumerate(inputs))
            y, new = kernel.segments(rounded, constants, state, offsets, start, every)
            plain, plain_state = one_by_one(version, given, lengths, start, dtype)
            title = f"RWKV-{version} recurrence, {name}"
            yield within_twice(title, y, plain, wanted)
            found, of_plain, exact = (comparable(version, z) for z in (new, plain_state, wanted_state))
            yield within_twice(f"{title}, state", found.to(dtype), of_plain.to(dtype), exact)
            long, n = of_recurrence(version, Random(device.where), 2 * device.sizes.cut, 1, 1), device.sizes.cut
            row = tuple((z if i == decay else z.to(dtype))[None] for i, z in enumerate(long[0]))
            whole, end = kernel.rows(row, *long[1:])
            one, middle = kernel.rows(tuple(z[:, :n] for z in row), *long[1:])
            two, end_again = kernel.rows(tuple(z[:, n:] for z in row), long[1], middle)
            is_same = torch.equal(torch.cat([one, two], 1), whole) and all(map(torch.equal, end_again, end))
            yield same_bits(f"{title}, in two calls and in one", is_same)


def gradients(device: Device) -> Iterator[Check]:
    """Those of RWKV-7's inputs and of the states that segments of many lengths start from, from all their outputs."""
    from rwkv_stream.kernels import resolve

    lengths, random = device.sizes.lengths, Random(device.where)
    offsets = torch.tensor([0, *lengths], device=device.where).cumsum(0)
    start, every = (torch.arange(len(lengths), device=device.where) % n for n in (3, len(lengths)))
    inputs, _, state = of_recurrence("7", random, sum(lengths), 3, 2)
    leaves = [z.requires_grad_() for z in (*inputs, *state)]
    d_outputs = random.normal(*inputs[0].shape), random.normal(len(lengths), *state[0].shape[1:])
    segments = resolve("7", "triton", device.where)[1].segments

    def through(y: Tensor, new: Tensors) -> Tensors:
        outputs = y, *new
        return torch.autograd.grad(outputs, leaves, [d.to(z.dtype) for d, z in zip(d_outputs, outputs, strict=True)])

    def sequential(dtype: torch.dtype) -> Tensors:
        return through(*one_by_one("7", (inputs, (), state), lengths, start, dtype))

    wanted = sequential(torch.float64)
    for name in device.sizes.dtypes:
        dtype = DTYPES[name]
        rounded = tuple(z if i == 1 else z.to(dtype) for i, z in enumerate(inputs))
        found, plain = through(*segments(rounded, (), state, offsets, start, every)), sequential(dtype)
        for of, *made in zip((*"rwkvab", "state"), found, plain, wanted, strict=True):
            one, other, exact = made
            yield within_twice(f"RWKV-7 recurrence, {name}, gradient of {of}", one.to(dtype), other.to(dtype), exact)


def same_bits(name: str, is_same: bool, needed: bool = True, found: str = "others") -> Check:
    return Check(name, "the same bits", "the same bits" if is_same else found, is_same, needed)


def in_dtype(given: Any, dtype: torch.dtype) -> Any:
    """Arguments with their tensors, also those in tuples, in this dtype."""
    if isinstance(given, Tensor):
        return given.to(dtype)
    return tuple(in_dtype(z, dtype) for z in given) if isinstance(given, tuple) else given


class Segments(NamedTuple):
    """As `kernels.layers.reference` takes them, and the shapes of what it writes."""

    segments: Tensors
    sizes: tuple[tuple[int, ...], ...]

    def by(self, call: Callable[..., None], given: tuple[Any, ...], dtype: torch.dtype | None) -> Tensors:
        """out, and what is handed on: in fp32, out rounded to `dtype`; without one in float64."""
        inner = torch.float64 if dtype is None else torch.float32
        where = self.segments[0].device
        made = tuple(
            torch.empty(n, dtype=z, device=where) for n, z in zip(self.sizes, (dtype or inner, inner), strict=True)
        )
        call(*in_dtype(given, inner), *self.segments, *made)
        return made


def fused(device: Device) -> Iterator[Check]:
    """What lies between the products of RWKV-7, and a step of decoding; some segments have no token."""
    for name in device.sizes.dtypes:
        for title, lengths in ((name, [*device.sizes.lengths, 0]), (f"{name}, one token each", [1, 1, 0, 1])):
            yield from fused_over(device.where, DTYPES[name], title, lengths)


def fused_over(where: torch.device, dtype: torch.dtype, title: str, lengths: list[int]) -> Iterator[Check]:
    from rwkv_stream.kernels.layers import reference as ops_ref
    from rwkv_stream.kernels.layers import triton as rwkv7_triton

    n, S, R, H, N, eps = sum(lengths), len(lengths), 3, 2, 64, 64e-5
    C, random = H * N, Random(where)
    offsets = torch.tensor([0, *lengths], device=where).cumsum(0)
    segments = offsets, torch.arange(S, device=where) % R, torch.arange(S, device=where).flip(0)
    plan = rwkv7_triton.plan(*segments, dtype, where)

    x, norm = random.normal(n, C, scale=3, around=1), (random.normal(C, around=1), random.normal(C))
    mix, x_prev = random.between(0, 1, 6, C), random.normal(R, C)
    out, last = torch.empty(6, n, C, dtype=dtype, device=where), torch.empty(S, C, device=where)
    rwkv7_triton.norm_shift_mix(x, norm, mix, x_prev, plan, out, last)
    reference, given = Segments(segments, ((6, n, C), (S, C))), (x, *norm, mix, (), x_prev)
    plain, wanted = (reference.by(ops_ref.norm_shift_mix, given, z) for z in (dtype, None))
    yield within_twice(f"norm, shift and mixing, {title}", out, plain[0], wanted[0])
    yield within_twice(f"norm, shift and mixing, {title}: handed on", last, plain[1], wanted[1])

    reference = Segments(segments, ((n, C), (S, H, N, N)))
    for is_mixed in (False, True):
        projections = tuple(random.normal(n, C) for _ in range(8 if is_mixed else 6))
        ranges = ((-6.0, 1.0), (-2.0, 2.0), (-2.0, 2.0), (0.5, 1.5), (0.5, 1.5))  # w0 a0 v0 k_k k_a
        vectors = [random.between(low, high, C) for low, high in ranges]
        vectors += [random.normal(C, scale=0.3), random.normal(C, scale=0.2, around=1), random.normal(C, scale=0.2)]
        state, rounded = random.normal(R, H, N, N, scale=0.5), in_dtype(projections, dtype)
        out, new = torch.empty(n, C, dtype=dtype, device=where), torch.empty(S, H, N, N, device=where)
        kernel = rwkv7_triton.step if plan.is_step else rwkv7_triton.time_mix
        kernel(rounded, vectors, eps, state, plan, out, new)
        plain = reference.by(ops_ref.time_mix, (rounded, tuple(vectors), eps, state), dtype)
        wanted = reference.by(ops_ref.time_mix, (projections, tuple(vectors), eps, state), None)
        of_layer = f"time-mix of {'a later' if is_mixed else 'the first'} layer, {title}"
        yield within_twice(of_layer, out, plain[0], wanted[0])
        # What is written to the state has been rounded to the dtype of the projections.
        yield within_twice(f"{of_layer}: state", new.to(dtype), plain[1].to(dtype), wanted[1])

    z = random.normal(n, 777, scale=3).to(dtype)
    squared = (z.float().relu() ** 2).to(dtype)
    rwkv7_triton.relu2_(z)
    yield same_bits(f"squared relu, {title}", torch.equal(z, squared))


def greedy(model: Model, prompt: Tensor, n: int) -> list[int]:
    logits, state = model.forward(prompt)
    made: list[int] = []
    while True:
        made.append(int(logits[0].argmax()))
        if len(made) == n:
            return made
        logits, state = model.forward(torch.tensor([made[-1:]]), state)


def shipped(device: Device) -> Iterator[Check]:
    """The model that the package ships, on this device and on the CPU, in fp32."""
    import rwkv_stream as rs

    sizes, where = device.sizes, str(device.where)
    here = rs.load(device=where, dtype="fp32", backend="triton")
    there = rs.load(device="cpu", dtype="fp32", backend="auto")
    ids = torch.tensor([here.tokenizer.encode(STORY.read_text(encoding="utf8"))[: sizes.story]])

    prompt = ids[:, : sizes.prompt]
    found, wanted = (greedy(model, prompt, sizes.continued) for model in (here, there))
    equal = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), len(wanted))
    expected = f"{len(wanted)} tokens as on the CPU"
    yield Check("shipped model, greedy continuation", expected, f"{equal} as there", equal == len(wanted))

    states: dict[str, State | None] = {"here": None, "there": None}
    off, nats = 0.0, {"here": 0.0, "there": 0.0}
    for i in range(0, ids.shape[1], sizes.call):
        part, targets = ids[:, i : i + sizes.call], ids[0, i + 1 : i + sizes.call + 1]
        logits = {}
        for name, model in (("here", here), ("there", there)):
            made, states[name] = model.forward(part, states[name], logits="all")
            logits[name] = made[0].cpu()
            loss = torch.nn.functional.cross_entropy(logits[name][: len(targets)], targets, reduction="sum")
            nats[name] += float(loss)
        off = max(off, float((logits["here"] - logits["there"]).abs().max()))  # a NaN would show in the perplexity
    yield Check("shipped model, logits of the story", "≤ 1e-3 from the CPU's", f"{off:.1e}", off <= 1e-3)
    here_, there_ = (math.exp(z / (ids.shape[1] - 1)) for z in nats.values())
    is_right = abs(here_ / there_ - 1) < 5e-5
    yield Check("shipped model, perplexity of the story", f"{there_:.6g} to 4 digits", f"{here_:.6g}", is_right)

    n = sizes.half
    for name in sizes.dtypes[:2]:  # fp32 and bf16
        model = rs.load(device=where, dtype=name, backend="triton")
        in_one, _ = model.forward(ids[:, : 2 * n], logits="all")
        first, middle = model.forward(ids[:, :n], logits="all")
        again, middle_again = model.forward(ids[:, :n], logits="all")
        is_same = torch.equal(first, again) and middle.digest() == middle_again.digest()
        yield same_bits(f"shipped model, {name}, twice", is_same)
        second, end = model.forward(ids[:, n : 2 * n], middle, logits="all")
        resumed, end_again = model.forward(ids[:, n : 2 * n], middle.clone().to("cpu"), logits="all")
        is_same = torch.equal(second, resumed) and end.digest() == end_again.digest()
        yield same_bits(f"shipped model, {name}, going on from a state that was on the CPU", is_same)
        parted = torch.cat([first, second], 1)
        apart = f"{distance(parted, in_one):.1e} apart"
        # Torch's products may add in another order where a call has more tokens; ours may not.
        yield same_bits(f"shipped model, {name}, in two calls and in one", torch.equal(parted, in_one), False, apart)


def of_a_file(device: Device) -> Iterator[Check]:
    """That the models which are timed are what `load` makes of a file of their weights."""
    import rwkv_stream as rs

    config = config_of(SHAPES["tiny"])
    weights = random_weights(config, device.where)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        torch.save({name: z.cpu() for name, z in weights.items()}, path)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == device.dtype)
        loaded = rs.load(path, device=str(device.where), dtype=dtype, backend="triton", tokenizer="bytes")
    made = model_of(config, weights, device)
    pairs = list(zip((made.outer, *made.blocks), (loaded.outer, *loaded.blocks), strict=True))
    is_same = made.config == loaded.config and all(
        one.keys() == other.keys()
        and all(z.dtype == other[name].dtype and z.equal(other[name]) for name, z in one.items())
        for one, other in pairs
    )
    yield same_bits("random weights as `load` has them", is_same)


def correctness(device: Device) -> list[Check]:
    found = []
    for check in itertools.chain(
        recurrences(device), gradients(device), fused(device), of_a_file(device), shipped(device)
    ):
        mark = "right" if check.is_right else "WRONG" if check.needed else "told "
        print(f"{mark}  {check.name}: expected {check.expected}, found {check.found}", flush=True)
        found.append(check)
    return found


# ---- parts: each gives its figures, the most wanted first ----


def roofline(device: Device, _: Models, name: str) -> Figures:
    """For one shape: products of calls of some lengths, and how fast these bounds are themselves."""
    config = config_of(SHAPES[name])
    shapes = matrices(config)
    flop = 2 * elements(shapes)
    found = {
        "a large square product": figure(
            [device.square_flop_s() / 1e12 for _ in range(device.sizes.rounds)], "TFLOP/s"
        ),
        "copying": figure([device.copy_bytes_s() / 1e9 for _ in range(device.sizes.rounds)], "GB/s"),
    }
    for rows in device.sizes.calls[::2]:
        rates = [flop * rows / device.products_s(shapes, rows) / 1e12 for _ in range(3)]
        found[f"its products, {rows:,} tokens"] = figure(rates, "TFLOP/s")
    return found


def matrices(config: Config) -> Counter[tuple[int, int]]:
    """(in, out) → how many products of that size a token goes through, without the head."""
    from rwkv_stream.model import v7

    return products({name: torch.empty(size, device="meta") for name, size in v7.shapes(config).items()})


def elements(shapes: Mapping[tuple[int, int], int]) -> int:
    return sum(n_in * n_out * count for (n_in, n_out), count in shapes.items())


def read(model: Model, ids: Tensor, call: int, state: State | None = None) -> tuple[Tensor, State]:
    """ids [1, n] in calls of so many tokens; logits [1, V] of the last token."""
    assert ids.shape[1] > 0
    for i in range(0, ids.shape[1], call):
        logits, state = model.forward(ids[:, i : i + call], state, logits="last")
    assert state is not None
    return logits, state


def sweep(device: Device, model: Model, ids: Tensor) -> tuple[dict[int, float], Figures]:
    """Call, tokens → tokens/s; figures of each. Raises SystemExit where its size changes what is read."""
    rates: dict[int, float] = {}
    found: Figures = {}
    expected = None
    for call in device.sizes.calls:
        title = f"in calls of {call:,}"
        try:
            device.forget_peak()
            read(model, ids[:, :call], call)
            first = device.peak_bytes()
            spent, (logits, _) = device.timed(functools.partial(read, model, ids, call))
            expected = logits if expected is None else expected
            off = closeness(logits.cpu().numpy(), expected.cpu().numpy())["error"]
            if not off <= TOLERANCE:
                print(f"{title}: expected logits at most {TOLERANCE} from those of other calls, found {off:.3g}")
                raise SystemExit(1)
            rates[call] = ids.shape[1] / spent
            found[title] = figure([rates[call]], "tokens/s")
            if call == device.sizes.calls[0]:
                found[f"peak memory of {call:,} tokens, {title}"] = figure([first / 1e9], "GB")
                peak = device.peak_bytes() / 1e9
                found[f"peak memory of {ids.shape[1]:,} tokens, {title}"] = figure([peak], "GB")
        except torch.OutOfMemoryError as error:
            found[title] = absent(error)
            device.give_back()
    return rates, found


def prefill(device: Device, models: Models, name: str, tokens: int) -> Figures:
    model = models.get(name)
    config, sizes = model.config, device.sizes
    shapes = matrices(config)
    flop = 2 * elements(shapes)
    ids = torch.tensor([tokens_of(max(tokens, sizes.sweep), config.vocab_size)])
    rates, of_calls = sweep(device, model, ids[:, : sizes.sweep])
    if not rates:
        return dict.fromkeys((OWN_PRODUCTS, IN_WKV), absent("no size of calls fits in the GPU's memory")) | of_calls
    call = max(rates, key=lambda size: rates[size])
    n_calls = max(1, min(tokens, int(rates[call] * PREFILL_S)) // call)
    n_segments = min(sizes.segments, n_calls)
    ends = [n_calls * (i + 1) // n_segments * call for i in range(n_segments)]
    per_token, own, square, peaks = [], [], [], []
    state, begin = model.zero_state(), 0
    for end in ends:
        own.append(device.products_s(shapes, call) / call)
        square.append(flop / device.square_flop_s())
        device.forget_peak()
        spent, (logits, state) = device.timed(functools.partial(read, model, ids[:, begin:end], call, state))
        per_token.append(spent / (end - begin))
        peaks.append(device.peak_bytes() / 1e9)
        begin = end
    if not bool(logits.isfinite().all()):
        print(f"{name}: expected finite logits after {end:,} tokens, found others; nothing more is timed")
        raise SystemExit(1)
    rate = figure([1 / z for z in per_token], "tokens/s")
    found: Figures = {
        f"{end:,} tokens, in calls of {call:,}": rate,
        OWN_PRODUCTS: figure([bound / z for bound, z in zip(own, per_token, strict=True)]),
        "share of a large square product's rate": figure([z / y for z, y in zip(square, per_token, strict=True)]),
    }
    try:
        alone = wkv_layer_s(device, config, call) * config.n_layer / call
        found[IN_WKV] = figure([alone / z for z in per_token])
    except torch.OutOfMemoryError as error:
        found[IN_WKV] = absent(error)
    if end < tokens // call * call:
        reason = f"would have taken {tokens / rate['median']:,.0f} s; {end:,} were read"
        found[f"{tokens:,} tokens"] = absent(reason)
    found["peak memory of the first segment"] = figure(peaks[:1], "GB")
    found["peak memory of the last segment"] = figure(peaks[-1:], "GB")
    return found | of_calls


def of_wkv7(device: Device, T: int, H: int, decay: torch.dtype) -> Tensors:
    """r w k v a b [1, T, H, 64] as a model makes them; log-decays in a dtype of their own."""
    r, k, v = (device.normal(1, T, H, 64) for _ in range(3))
    w = (-math.exp(-0.5) * device.normal(1, T, H, 64, dtype=torch.float32).sigmoid_()).to(decay)
    kk = torch.nn.functional.normalize(device.normal(1, T, H, 64), dim=-1)
    return r, w, k, v, -kk, kk * device.normal(1, T, H, 64).sigmoid_()


def wkv_layer_s(device: Device, config: Config, T: int) -> float:
    """Seconds of the recurrence's kernels of one layer in a call of T tokens, cut into blocks beforehand."""
    from rwkv_stream.kernels.recurrence import triton as wkv_triton

    H, N = config.n_head, config.head_size
    inputs = tuple(z[0] for z in of_wkv7(device, T, H, torch.float32))
    state, row = torch.zeros(1, H, N, N, device=device.where), torch.zeros(1, dtype=torch.int32, device=device.where)
    offsets = torch.tensor([0, T], device=device.where)
    blocks = wkv_triton.blocks_of(offsets, wkv_triton.block_tokens(device.dtype))
    y, final = torch.empty_like(inputs[0]), torch.empty_like(state)
    return device.repeated(lambda: wkv_triton.wkv7(inputs, state, row, blocks, y, final, row))


def decode(device: Device, models: Models, name: str, batches: Sequence[int] | None = None) -> Figures:
    from rwkv_stream.model.dtypes import TABLES

    model, steps = models.get(name), device.sizes.steps
    parts = (model.outer, *model.blocks)
    weights = sum(z.nbytes for part in parts for key, z in part.items() if not key.endswith(TABLES))
    found: Figures = {}
    for B in batches or device.sizes.batches:
        try:
            rates, shares = [], []
            tokens = torch.arange(B, device=device.where)[:, None] % model.config.vocab_size
            made = [model.forward(tokens, model.zero_state(B))]
            state_bytes = made[0][1].nbytes
            for _ in range(device.sizes.rounds):
                copying = device.copy_bytes_s()
                spent = device.seconds(functools.partial(continue_greedily, model, made, steps)) / steps
                rates.append(B / spent)
                shares.append((weights + 2 * state_bytes) / copying / spent)
            found[f"B = {B}"] = figure(rates, "tokens/s")
            found[f"B = {B}, {OF_BANDWIDTH}"] = figure(shares)
        except torch.OutOfMemoryError as error:
            found |= dict.fromkeys((f"B = {B}", f"B = {B}, {OF_BANDWIDTH}"), absent(error))
        made = []
        device.give_back()
    return found


def continue_greedily(model: Model, made: list[tuple[Tensor, State]], steps: int) -> None:
    """Replace the only (logits [B, V], state) of a list by that of so many tokens later; no other state is kept."""
    for _ in range(steps):
        logits, state = made.pop()
        made.append(model.forward(logits.argmax(-1, keepdim=True), state))


def wkv(device: Device, models: Models) -> Figures:
    """RWKV-7's recurrence alone in one row, from the zero state, at the width of the 7.2B: in turns with fla's.

    Then with its gradients.
    """
    from rwkv_stream.kernels import resolve

    models.drop()
    T, H = device.sizes.wkv
    inputs = of_wkv7(device, T, H, device.dtype)
    state = torch.zeros(1, H, 64, 64, device=device.where)
    rows = resolve("7", "triton", device.where)[1].rows
    title = f"T = {T:,}, {H} heads of 64"

    def ours() -> tuple[Tensor, Tensor]:
        y, (new,) = rows(inputs, (), (state,))
        return y, new

    theirs = of_fla(inputs, state)
    found = in_turns(device, title, ours, theirs, TO_FLA)
    leaves = [z.requires_grad_() for z in (*inputs, state)]

    def trained(call: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], Tensors]:
        return lambda: torch.autograd.grad([z.float().sum() for z in call()], leaves)

    return found | in_turns(device, f"{title}, with gradients", trained(ours), trained(theirs), TRAINED_TO_FLA)


def in_turns(
    device: Device, title: str, ours: Callable[[], Tensors], theirs: Callable[[], Tensors], ratio: str
) -> Figures:
    """The times of both and their ratio; where theirs gives no figure, the reason."""
    expected = ours()
    try:
        reason = difference(expected, theirs())
    except Exception as error:  # noqa: BLE001 - whatever theirs raises is the reason that it has no figure
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        alone = [device.repeated(ours) for _ in range(device.sizes.rounds)]
        return {title: figure([1e3 * z for z in alone], "ms"), ratio: absent(reason)}
    turns = [(device.repeated(ours), device.repeated(theirs)) for _ in range(device.sizes.rounds)]
    return {
        title: figure([1e3 * mine for mine, _ in turns], "ms"),
        f"{title}, flash-linear-attention": figure([1e3 * other for _, other in turns], "ms"),
        ratio: figure([other / mine for mine, other in turns], "×"),
    }


def of_fla(inputs: Tensors, state: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """flash-linear-attention's form; its state is [key, value]. Calls raise ImportError where it is not installed."""

    def call() -> tuple[Tensor, Tensor]:
        chunk_rwkv7 = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
        named = dict(zip("rwkvab", inputs, strict=True))
        if "log_w" in inspect.signature(chunk_rwkv7).parameters:  # some releases take another `w`
            named["log_w"] = named.pop("w")
        given = state.transpose(-1, -2).contiguous()
        y, new = chunk_rwkv7(**named, scale=1.0, initial_state=given, output_final_state=True)
        return y, new.transpose(-1, -2)

    return call


def difference(ours: Tensors, theirs: Tensors) -> str | None:
    """How far two results are from one another, where that is too far."""
    off = max(
        float(((a.float() - b.float()).norm() / a.float().norm()).nan_to_num(nan=math.inf))
        for a, b in zip(ours, theirs, strict=True)
    )
    return None if off <= TOLERANCE else f"computes something else: {off:.2g} from ours, expected at most {TOLERANCE}"


def snapshots(device: Device, models: Models, name: str) -> Figures:
    from rwkv_stream.reading import ingest
    from rwkv_stream.store import Store

    model, every = models.get(name), device.sizes.every
    fewest, most = device.sizes.stored
    with tempfile.TemporaryDirectory() as folder:
        text, numbers = Path(folder) / "text.txt", itertools.count()
        with text.open("wb") as file:
            file.writelines(prose(most * 6, one_line=False))

        def rate(n: int, snapshot_every: int) -> float:
            place = Path(folder) / f"{next(numbers)}.store"
            began = time.perf_counter()
            report = ingest.ingest(
                str(text), model=model, store=Store(place, create=True), chunk=every, snapshot_every=snapshot_every,
                max_tokens=n,
            )  # fmt: skip
            spent = time.perf_counter() - began
            assert report.tokens == n and report.snapshots_written == n // snapshot_every
            shutil.rmtree(place)
            return n / spent

        rate(fewest, every)
        n = max(fewest, min(most, int(rate(fewest, fewest) * STORED_S))) // every * every
        turns = [(rate(n, every), rate(n, n)) for _ in range(device.sizes.rounds)]
    return {
        SLOWER: figure([without / with_ - 1 for with_, without in turns]),
        f"{n:,} tokens, a snapshot every {every:,}": figure([with_ for with_, _ in turns], "tokens/s"),
        f"{n:,} tokens, one snapshot": figure([without for _, without in turns], "tokens/s"),
    }


def rwkv(device: Device, models: Models, name: str) -> Figures:
    """Ours and the PyPI package's on the same weights: reading in the best of some sizes of calls, and continuing."""
    sizes, model = device.sizes, models.get(name)
    ids = torch.tensor([tokens_of(sizes.peer, model.config.vocab_size)])
    calls = [call for call in sizes.calls[::2] if call <= sizes.peer]
    read(model, ids[:, : calls[0]], calls[0])
    rates = [
        [sizes.peer / device.seconds(functools.partial(read, model, ids, call)) for _ in range(PEER_ROUNDS)]
        for call in calls
    ]
    found: Figures = {"rwkv-stream, reading": figure(max(rates, key=statistics.median), "tokens/s")}
    found |= {f"rwkv-stream, {key}": value for key, value in decode(device, models, name, (1,)).items()}
    try:
        version = importlib.metadata.version("rwkv")
    except importlib.metadata.PackageNotFoundError:
        return found | {"rwkv": absent("not installed")}
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(model.config, device.where)
        torch.save({key: z.cpu() for key, z in weights.items()}, Path(folder) / "model.pth")
        del weights
        wanted = all_logits(model, ids[:, :256])
        for dtype in ("fp16", "bf16") if device.is_gpu else ("fp32",):
            for kernels in ("1", "0") if device.is_gpu else ("0",):  # its own need a CUDA compiler
                label = f"rwkv {version}, {dtype}, {'its CUDA' if kernels == '1' else 'no'} kernels"
                lengths = calls if kernels == "1" else calls[:1]  # token by token, and slow
                order = [str(device.where), dtype, kernels, *map(str, (sizes.peer, sizes.steps, *lengths))]
                try:
                    answer = asked(folder, order, wanted)
                except PeerError as error:
                    found[label] = absent(error)
                    continue
                found |= {f"{label}, {key}": figure(values, "tokens/s") for key, values in answer.items()}
                break
    return found


class PeerError(Exception):
    """Why a peer has no figures."""


def asked(folder: str, order: list[str], wanted: Any) -> dict[str, list[float]]:
    """What a process with the PyPI package answers, where its logits are the ones wanted. Raises PeerError."""
    command = [sys.executable, str(Path(__file__).resolve()), "pypi-rwkv", folder, *order]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PEER_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"took more than {PEER_S} s") from error
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        raise PeerError(lines[-1] if lines else f"ended with {ran.returncode}")
    off = closeness(torch.load(Path(folder) / "logits.pt").numpy(), wanted)["error"]
    if not off <= 3 * TOLERANCE:
        raise PeerError(f"computes something else: {off:.2g} from ours, expected at most {3 * TOLERANCE}")
    answer: dict[str, list[float]] = json.loads(ran.stdout)
    return answer


class PypiRwkvOnDevice(PypiRwkv):
    def __init__(self, folder: Path, device: str, dtype: str, kernels: str) -> None:
        os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": kernels}
        module = importlib.import_module("rwkv.model")
        self.model = module.RWKV(model=str(folder / "model"), strategy=f"{device} {dtype}")


def pypi_rwkv(folder: str, device: str, dtype: str, kernels: str, *numbers: str) -> None:
    """The process with the PyPI package: rates on stdout, logits of the first tokens in a file."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path = [place for place in sys.path if place != str(Path(__file__).parent)]
    n, steps, *calls = map(int, numbers)
    runner = PypiRwkvOnDevice(Path(folder), device, dtype, kernels)
    vocab_size = len(torch.load(Path(folder) / "model.pth", mmap=True)["emb.weight"])
    ids = tokens_of(n, vocab_size)
    logits, _ = runner.model.forward(ids[:256], None, full_output=True)
    torch.save(logits.float().cpu(), Path(folder) / "logits.pt")

    def finished() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def reading(call: int) -> float:
        began, state, done = finished(), None, 0
        while done < n and time.perf_counter() - began < PEER_READING_S:
            _, state = runner.model.forward(ids[done : done + call], state)
            done += call
        return min(done, n) / (finished() - began)

    def continuing() -> float:
        began = finished()
        runner.decode(1, steps)
        return steps / (finished() - began)

    for call in calls:
        runner.model.forward(ids[:call], None)
    runner.decode(1, 4)
    of_calls = [[reading(call) for _ in range(PEER_ROUNDS)] for call in calls]
    found = {"reading": max(of_calls, key=statistics.median), "B = 1": [continuing() for _ in range(PEER_ROUNDS)]}
    print(json.dumps(found), file=answers, flush=True)


# ---- results ----


def about(device: Device) -> dict[str, Any]:
    """The machine and what runs on it."""
    packages = ("rwkv-stream", "torch", "triton", "flash-linear-attention", "rwkv")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    found: dict[str, Any] = {"versions": versions | {"cuda": torch.version.cuda}}
    found |= machine() if platform.machine() == "x86_64" else {"architecture": platform.machine()}
    if device.is_gpu:
        properties = torch.cuda.get_device_properties(device.where)
        found |= {"capability": f"{properties.major}.{properties.minor}", "memory_bytes": properties.total_memory}
        found["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        except (OSError, subprocess.CalledProcessError) as error:
            found["nvidia-smi"] = f"unknown: {error}"
    return found


@dataclass(frozen=True)
class Results:
    """What was measured, in a file by the name of the GPU and then of the entry; nowhere in a rehearsal."""

    device: Device
    out: Path

    def enter(self, entry: str, **found: Any) -> None:
        if not self.device.is_gpu:
            return
        from rwkv_stream.files import publish

        everything = json.loads(self.out.read_text()) if self.out.exists() else {}
        of_gpu = everything.setdefault(torch.cuda.get_device_name(self.device.where), {})
        of_gpu[entry] = {"machine": about(self.device), **found}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        publish(self.out, (json.dumps(everything, indent=1, ensure_ascii=False) + "\n").encode())

    def measured(self, entry: str, figures: Figures) -> None:
        shape = SHAPES.get(entry.split()[-1])
        self.enter(entry, shape=dataclasses.asdict(shape) if shape else None, figures=figures)
        show(entry, figures, is_rehearsal=not self.device.is_gpu)


def written(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(entry: str, figures: Figures, is_rehearsal: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{entry} (rehearsal: no measurement)" if is_rehearsal else entry)
    for heading in ("figure", "median", "lowest", "highest", "unit", "aim", ""):
        table.add_column(heading, justify="right" if heading in ("median", "lowest", "highest") else "left")
    for name, found in figures.items():
        aim = AIMS.get((entry, name))
        if "absent" in found:
            table.add_row(name, "–", "", "", found["absent"], str(aim or ""), "not measured" if aim else "")
            continue
        values = [written(found[key]) for key in ("median", "lowest", "highest")]
        met = "" if aim is None else "met" if aim.is_met(found["median"]) else "not met"
        table.add_row(name, *values, found["unit"], str(aim or ""), met)
    Console(width=160).print(table)


# ---- the program ----


def entries(shapes: Sequence[str], tokens: int) -> Iterator[tuple[str, str, Callable[[Device, Models], Figures]]]:
    """Part, entry, and what measures it, in the order in which they are done."""
    for name in shapes:
        yield "roofline", f"roofline {name}", functools.partial(roofline, name=name)
    for name in shapes:
        yield "prefill", f"prefill {name}", functools.partial(prefill, name=name, tokens=tokens)
    for name in shapes:
        yield "decode", f"decode {name}", functools.partial(decode, name=name)
    yield "wkv", "wkv", wkv
    for name in [name for name in STORED if name in shapes]:
        yield "snapshots", f"snapshots {name}", functools.partial(snapshots, name=name)
    for name in [name for name in OF_PEERS if name in shapes]:
        yield "rwkv", f"rwkv {name}", functools.partial(rwkv, name=name)


PARTS = ("correctness", "roofline", "prefill", "decode", "wkv", "snapshots", "rwkv")


def gpu(shape: Sequence[str], only: str | None, tokens: int, device: str, out: Path) -> None:
    import click

    chosen = tuple(only.split(",")) if only else PARTS
    if unknown := sorted({*chosen} - {*PARTS}):
        raise click.UsageError(f"--only: expected some of {','.join(PARTS)}, found {','.join(unknown)}")
    here = device_of(device)
    shapes = shape or ([name for name in SHAPES if name != "tiny"] if here.is_gpu else ["tiny"])
    if not here.is_gpu:
        print("REHEARSAL on the CPU: the figures below measure nothing, and are written nowhere")
        if [*shapes] != ["tiny"]:
            raise click.UsageError(f"--device cpu: expected --shape tiny, found {','.join(shapes)}")
        tokens = min(tokens, REHEARSAL.sweep)
    torch.set_float32_matmul_precision("highest")
    results, models = Results(here, out), Models(here)
    checks = correctness(here)
    results.enter("correctness", checks=[dataclasses.asdict(check) for check in checks])
    if wrong := [check for check in checks if check.needed and not check.is_right]:
        for check in wrong:
            print(f"{check.name}: expected {check.expected}, found {check.found}")
        print(f"{len(wrong)} of {len(checks)} checks failed: nothing is timed")
        raise SystemExit(1)
    for part, entry, measured in entries(shapes, tokens):
        if part not in chosen:
            continue
        print(f"== {entry}", flush=True)
        try:
            figures = measured(here, models)
        except torch.OutOfMemoryError as error:
            figures = {name: absent(error) for of, name in AIMS if of == entry} or {entry: absent(error)}
            models.drop()
        results.measured(entry, figures)


def device_of(name: str) -> Device:
    """The device and how much is done on it. Raises UsageError where it cannot serve."""
    import click

    from rwkv_stream.kernels import available

    if name == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise click.UsageError("--device cpu is for a rehearsal: expected TRITON_INTERPRET=1 in the environment")
        return Device(torch.device("cpu"), torch.float32, REHEARSAL)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.UsageError("expected a GPU to compute, found TRITON_INTERPRET=1 in the environment; unset it")
    if not torch.cuda.is_available():
        raise click.UsageError(f"--device {name}: found no GPU that torch {torch.__version__} can use")
    where = torch.device(name if ":" in name else f"{name}:{torch.cuda.current_device()}")
    if torch.cuda.get_device_capability(where) < (8, 0):
        raise click.UsageError(f"--device {name}: expected a GPU with bf16 (compute capability 8.0 or later)")
    if problem := available()["triton"]:
        raise click.UsageError(problem)
    torch.cuda.set_device(where)
    return Device(where, torch.bfloat16, REAL)


def command() -> click.Command:
    import click

    options: list[click.Parameter] = [
        click.Option(["--shape"], type=click.Choice(list(SHAPES)), multiple=True, help="Default: all but tiny."),
        click.Option(["--only"], help=f"Some of {','.join(PARTS)}; correctness always runs."),
        click.Option(
            ["--tokens"], type=click.IntRange(min=1), default=1_000_000, show_default=True, help="To prefill."
        ),
        click.Option(["--device"], default="cuda", show_default=True, help="cuda, cuda:i, or cpu for a rehearsal."),
        click.Option(["--out"], type=click.Path(path_type=Path), default=RESULTS, help="Figures are entered here."),
    ]
    text = (
        (__doc__ or "")
        .replace("\n\n    python", "\n\n\b\n    python")
        .replace("\n\ncorrectness", "\n\n\b\ncorrectness")
    )
    return click.Command("gpu", callback=gpu, params=options, help=text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pypi-rwkv"]:
        pypi_rwkv(*sys.argv[2:])
    else:
        command()()
