"""What codecs of states cost: how a model goes on after its state was restored from each, on the text that follows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rwkv_stream.errors import UsageError
from rwkv_stream.model.state import State
from rwkv_stream.store.codecs import CODECS
from rwkv_stream.store.objects import decode_arrays, encode_arrays
from rwkv_stream.store.records import LAST_HIDDEN, StoredObject, check_model

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot, Store

TOKENS = 512  # of the text behind a snapshot that are read
PIECE = 64  # tokens whose logits are held at a time
PLACES = 16  # snapshots of a reading that are measured, spread over it


@dataclass(frozen=True, slots=True)
class Certificate:
    """How a model goes on after its state was restored from a codec, beside the state itself.

    places, tokens   snapshots that were measured, and tokens read after all of them
    share            bytes on disk beside those of the fp32 values
    bits, exact_bits of surprise per byte of the text, after the restored state and after the state itself
    kl, worst_kl     divergence of the next token's chances, nats: mean, and largest
    flips            tokens whose most likely next token is another one
    write_ms, read_ms  median time of coding and of decoding one state
    """

    codec: str
    places: int
    tokens: int
    share: float
    bits: float
    exact_bits: float
    kl: float
    worst_kl: float
    flips: int
    write_ms: float
    read_ms: float


def certify(snapshot: Snapshot, *, model: Model, store: Store) -> list[Certificate]:
    """Measure every codec at the snapshots that one goes on from, as far as they are kept exactly and text stands
    behind them.

    raises  MismatchError for another model's snapshot; UsageError where nothing can be measured; SnapshotError
    """
    check_model(snapshot, model)
    measured: dict[str, list[_Place]] = {}
    for place, data in _places(snapshot, store):
        for codec, found in zip(CODECS, _measure(place, data, model), strict=True):
            measured.setdefault(codec, []).append(found)
    if not measured:
        raise UsageError(
            f"certifying codecs at snapshot {snapshot.id[:12]}: expected exact states with kept text behind them, "
            "found none; ingest a longer text, without --no-text"
        )
    return [_joined(codec, places) for codec, places in measured.items()]


def _places(snapshot: Snapshot, store: Store) -> Iterator[tuple[Snapshot, bytes]]:
    """Snapshots of a reading, spread over it, each with the text behind it."""
    text = store.text(snapshot)
    if text is None:
        return
    lineage = [one for one in store.ancestors(snapshot) if one.is_kept_exactly]
    step = max(1, math.ceil(len(lineage) / PLACES))
    for one in lineage[::step]:
        data = text.read(one.bytes, min(snapshot.bytes, one.bytes + 16 * TOKENS))
        if len(data) >= PIECE:
            yield one, data


@dataclass(frozen=True, slots=True)
class _Place:
    """At one snapshot: see Certificate; bits and KL are sums."""

    tokens: int
    text_bytes: int
    share: float
    bits: float
    exact_bits: float
    kl: float
    worst_kl: float
    flips: int
    write_s: float
    read_s: float


def _measure(snapshot: Snapshot, data: bytes, model: Model) -> list[_Place]:
    """What each codec costs at a snapshot behind which these bytes of text stand."""
    ids = model.tokenizer.encode(data.decode("utf-8", "ignore"))[: TOKENS + 1]
    n_bytes = len(model.tokenizer.decode(ids[1:]))
    arrays, costs = snapshot.arrays(), list[tuple[float, float, float]]()
    fp32_bytes, restored = sum(array.nbytes for array in arrays.values()), [arrays]
    for codec in CODECS:
        begun = time.perf_counter()
        coded = encode_arrays(snapshot, arrays, snapshot.state_digest, codec)
        written = time.perf_counter()
        held = replace(snapshot, objects=(StoredObject("", codec, len(coded)),))
        restored.append(decode_arrays(coded, held, Path(codec)))
        costs.append((len(coded) / fp32_bytes, written - begun, time.perf_counter() - written))
    names = [name for name in arrays if name != LAST_HIDDEN]
    state = State({name: torch.stack([torch.from_numpy(one[name][0]) for one in restored]) for name in names})
    state, tokens = state.to(model.device), torch.tensor(ids, device=model.device)
    bits, kl, worst, flips = (torch.zeros(len(restored), dtype=torch.float64) for _ in range(4))
    for begin in range(0, len(ids) - 1, PIECE):
        piece = tokens[begin : begin + PIECE + 1]
        logits, state = model.forward(piece[None, :-1].expand(len(restored), -1), state, logits="all")
        chances = logits.double().log_softmax(-1).cpu()  # [1 + codecs, T, V], the state itself first
        bits -= chances.gather(-1, piece[None, 1:, None].cpu().expand(len(restored), -1, 1)).sum((1, 2)) / math.log(2)
        divergence = (chances[:1].exp() * (chances[:1] - chances)).sum(-1).clamp(min=0)
        kl += divergence.sum(1)
        worst = torch.maximum(worst, divergence.amax(1))
        most_likely = chances.argmax(-1)
        flips += (most_likely != most_likely[:1]).sum(1)
    return [
        _Place(
            len(ids) - 1, n_bytes, share, float(bits[i]), float(bits[0]), float(kl[i]), float(worst[i]), int(flips[i]),
            write_s, read_s,
        )
        for i, (share, write_s, read_s) in enumerate(costs, 1)
    ]  # fmt: skip


def _joined(codec: str, places: Sequence[_Place]) -> Certificate:
    tokens, n_bytes = sum(one.tokens for one in places), sum(one.text_bytes for one in places)
    return Certificate(
        codec=codec,
        places=len(places),
        tokens=tokens,
        share=statistics.mean(one.share for one in places),
        bits=sum(one.bits for one in places) / n_bytes,
        exact_bits=sum(one.exact_bits for one in places) / n_bytes,
        kl=sum(one.kl for one in places) / tokens,
        worst_kl=max(one.worst_kl for one in places),
        flips=sum(one.flips for one in places),
        write_ms=1000 * statistics.median(one.write_s for one in places),
        read_ms=1000 * statistics.median(one.read_s for one in places),
    )
