"""What this machine makes of this model: reading, decoding and snapshots, beside what the machine could do at most.

Every figure is a median over rounds in one process. The bounds are measured in the same process: the rate of a matrix
product of the model's own shape and dtype, in turns with reading, and of reading memory. Nothing is timed before the
model has been seen to give the same logits in calls of different lengths: a fast wrong answer is no figure.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.model.dtypes import TABLES
from rwkv_stream.model.state import State
from rwkv_stream.reading import ingest
from rwkv_stream.store import Store
from rwkv_stream.text.chunker import CHUNK_TOKENS

if TYPE_CHECKING:
    from rwkv_stream.model import Model

BATCHES = (1, 8, 32)
DECODE_TOKENS = 16  # per round and row
SUM_BYTES = 1 << 28
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # of a logit, of the largest


@dataclass(frozen=True, slots=True)
class Figures:
    """
    gemm_flop_s       of a product [chunk, C] × [C, d_ffn] in the model's dtype
    read_bytes_s      of memory, by a sum
    prefill_tok_s     reading, in calls of one chunk, without the head
    prefill_share     of what the products of the weights alone would take at `gemm_flop_s`
    decode_tok_s      batch → tokens/s of all rows together, with the head
    decode_share      batch → of what reading the weights once a step would take at `read_bytes_s`
    ingest_tok_s      a text through tokenizer, model and store, with a snapshot at its end
    snapshot_bytes    on disk
    restore_s         from disk to a state that can be forked
    weight_bytes      of all that a step reads; state_bytes of one row
    peak_rss_bytes    of this process
    """

    gemm_flop_s: float
    read_bytes_s: float
    prefill_tok_s: float
    prefill_share: float
    decode_tok_s: dict[int, float]
    decode_share: dict[int, float]
    ingest_tok_s: float
    snapshot_bytes: int
    restore_s: float
    weight_bytes: int
    state_bytes: int
    peak_rss_bytes: int


def bench(model: Model, *, tokens: int = 8192, rounds: int = 5) -> Figures:
    """Measure `model` on about `tokens` tokens.

    raises  BackendError where its logits depend on the length of calls, UsageError for less than 1 token or round
    """
    for name, value in (("tokens", tokens), ("rounds", rounds)):
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"measuring '{model.path}': expected {name} to be 1 or more, found {value!r}")
    _check(model)
    chunk = min(CHUNK_TOKENS, tokens)
    read = [(name, z) for part in (model.outer, *model.blocks) for name, z in part.items() if not name.endswith(TABLES)]
    weight_bytes = sum(z.nbytes for _, z in read)
    others = ("head.weight", ".mix", ".mix_x")  # which is for few tokens; which are vectors in rows
    products = sum(z.numel() for name, z in read if z.ndim > 1 and not name.endswith(others))
    ids = torch.randint(model.config.vocab_size, (1, chunk), generator=torch.Generator().manual_seed(0))
    state = model.zero_state()
    reading: list[float] = []
    gemm: list[float] = []
    n_calls = max(1, tokens // chunk // rounds)
    for _ in range(rounds):
        gemm.append(_gemm(model, chunk))
        reading.append(_timed(lambda: _read(model, ids, state, n_calls)) / n_calls)
    decoding = {B: statistics.median(_decode(model, B) for _ in range(rounds)) for B in BATCHES}
    prefill = chunk / statistics.median(reading)
    with tempfile.TemporaryDirectory() as name:
        ingest_tok_s, snapshot_bytes, restore_s = _stored(model, Path(name), tokens, rounds)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before memory is taken to be read
    flop_s = 1 / statistics.median(gemm)
    bytes_s = 1 / statistics.median(_sum(model.device) for _ in range(rounds))
    return Figures(
        gemm_flop_s=flop_s,
        read_bytes_s=bytes_s,
        prefill_tok_s=prefill,
        prefill_share=prefill * 2 * products / flop_s,
        decode_tok_s=decoding,
        decode_share={B: rate / B * weight_bytes / bytes_s for B, rate in decoding.items()},
        ingest_tok_s=ingest_tok_s,
        snapshot_bytes=snapshot_bytes,
        restore_s=restore_s,
        weight_bytes=weight_bytes,
        state_bytes=state.nbytes,
        peak_rss_bytes=peak_rss_bytes,
    )


def _check(model: Model) -> None:
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    whole, _ = model.forward(ids, logits="all")
    parts, state = [], None
    for part in (ids[:, :48], ids[:, 48:49], ids[:, 49:]):
        logits, state = model.forward(part, state, logits="all")
        parts.append(logits)
    off = float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max())
    if not off <= TOLERANCE[model.dtype]:
        raise BackendError(
            f"measuring '{model.path}': expected the same logits in calls of 64 and of 48, 1 and 15 tokens, found them "
            f"{off:.1e} apart; a model that is wrong is not timed: try --backend reference"
        )


def _timed(work: Callable[[], object]) -> float:
    """Seconds, to the end of what the device was given."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _gemm(model: Model, chunk: int) -> float:
    """Seconds for one floating-point operation of a product of the model's shape."""
    C, d_ffn = model.config.n_embd, model.config.d_ffn
    x = torch.ones(chunk, C, dtype=model.dtype, device=model.device)
    weight = torch.ones(d_ffn, C, dtype=model.dtype, device=model.device)
    n = max(1, int(2e9 / (2 * chunk * C * d_ffn)))
    torch.nn.functional.linear(x, weight)
    spent = _timed(lambda: [torch.nn.functional.linear(x, weight) for _ in range(n)])
    return spent / (n * 2 * chunk * C * d_ffn)


def _sum(device: torch.device) -> float:
    """Seconds for a byte that is read."""
    source = torch.zeros(SUM_BYTES // 4, device=device)
    source.sum()
    return _timed(source.sum) / SUM_BYTES


def _read(model: Model, ids: torch.Tensor, state: State, n_calls: int) -> None:
    for _ in range(n_calls):
        _, state = model.forward(ids, state, logits="none")


def _decode(model: Model, B: int) -> float:
    """Tokens/s of all rows."""
    ids, state = torch.zeros(B, 1, dtype=torch.int64), model.zero_state(B)
    _, state = model.forward(ids, state)

    def steps() -> None:
        now = state
        for _ in range(DECODE_TOKENS):
            logits, now = model.forward(ids, now)
            logits.argmax(-1)

    return B * DECODE_TOKENS / _timed(steps)


def _stored(model: Model, folder: Path, tokens: int, rounds: int) -> tuple[float, int, float]:
    """Tokens/s of reading a text into a store, bytes of its snapshot, seconds to restore it."""
    text = folder / "text.txt"
    text.write_text("The keeper lit the lamp, and the ships went by in the dark. " * (tokens // 10 + 1))
    report = ingest.ingest(str(text), model=model, store=Store(folder / "store", create=True), max_tokens=tokens)
    snapshot = Store(folder / "store").get(report.snapshot)
    restoring = statistics.median(_timed(lambda: snapshot.load()) for _ in range(rounds))
    return report.tokens / report.elapsed_s, snapshot.size_bytes, restoring
