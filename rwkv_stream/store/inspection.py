"""What a snapshot is beside others: what it adds, how large its state is, how well the text was foretold, where it
drifts; how two of them differ; how those of a store descend from each other.

Reads snapshots, changes nothing. Norms, differences and divergences are computed on the CPU in float64.

`inspect` compares a snapshot with its nearest ancestor, and with the farthest of the last LINEAGE that had read
SETTLED_CHUNKS chunks, before which a state still fills. It warns of

| warning      | when                                                                                       |
|--------------|--------------------------------------------------------------------------------------------|
| not finite   | a value of the state or of the last hidden state is infinite or no number                  |
| norm         | a layer's norm is more than NORM_FACTOR times that of such an ancestor                     |
| loss         | bits per byte of what it adds are more than LOSS_FACTOR times those of the text before it, |
|              | both from LOSS_TOKENS sampled tokens or more: of fewer, chance alone moves them as far     |
| not compared | the state of that ancestor is damaged, or of a newer format                                |
| length       | the text is longer than those that the model was trained on                                |
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from rwkv_stream.errors import MismatchError, SnapshotError
from rwkv_stream.store.records import CHUNK_STATE, LAST_HIDDEN, check_model

if TYPE_CHECKING:
    from torch import Tensor

    from rwkv_stream.model import Model
    from rwkv_stream.store.catalog import Listed
    from rwkv_stream.store.codecs import Float32s
    from rwkv_stream.store.records import Arrays, Snapshot

LINEAGE = 64  # ancestors looked back at
SETTLED_CHUNKS = 4
NORM_FACTOR = 4.0
LOSS_FACTOR = 1.25
LOSS_TOKENS = 256
_TRAINED = re.compile(r"[-_]ctx(?P<number>\d{1,7})(?P<k>k?)(?![0-9A-Za-z])")

Norms = dict[str, list[float | None]]  # tensor → Frobenius norm of each layer, None where a value is not finite


# ---- one snapshot ----


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a document: tokens and bytes of decoded text, ends excluded."""

    from_token: int
    to_token: int
    from_byte: int
    to_byte: int


@dataclass(frozen=True, slots=True)
class Loss:
    """Bits per byte of a stretch of text, estimated from a sample of its tokens."""

    bits_per_byte: float
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An ancestor that a snapshot was compared with."""

    id: str
    tokens: int
    norms: Norms


@dataclass(frozen=True, slots=True)
class Along:
    """What was recorded of the text between two snapshots, and of the state at its end.

    loss   None: not recorded
    norms  of each tensor, all layers together; empty: not recorded
    drift  ‖A − B‖ / ‖A‖ of each tensor since the snapshot before; empty: not recorded
    """

    span: Span
    loss: Loss | None
    norms: dict[str, float | None]
    drift: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What there is to say of a snapshot beyond its record.

    text              what it has read
    added             what of that it adds to its nearest ancestor
    nearest_ancestor  id of the nearest ancestor that exists, None: it has none
    loss              of all that it has read, None: not recorded
    added_loss        of what it adds, None: not recorded
    norms             none where its state is not kept
    ancestors         those compared, nearest first
    spans             the way there, oldest first
    trained_tokens    length of the texts that its model was trained on, by its file's name; None: not known
    """

    text: Span
    added: Span
    nearest_ancestor: str | None
    loss: Loss | None
    added_loss: Loss | None
    norms: Norms
    ancestors: list[Ancestor]
    spans: list[Along]
    trained_tokens: int | None
    warnings: list[str]

    def curves(self) -> dict[str, list[float | None]]:
        """What was recorded on the way, by name, a value a span; those of which there are two or more."""
        found: dict[str, list[float | None]] = {
            "bits per byte": [one.loss.bits_per_byte if one.loss is not None else None for one in self.spans]
        }
        for what in ("norms", "drift"):
            for name in dict.fromkeys(name for one in self.spans for name in getattr(one, what)):
                label = f"{what.removesuffix('s')} of {name}"
                found[label] = [getattr(one, what).get(name) for one in self.spans]
        return {name: values for name, values in found.items() if sum(value is not None for value in values) > 1}


def inspect(snapshot: Snapshot, ancestors: Iterable[Snapshot]) -> Inspection:
    """Look at a snapshot beside its ancestors, as `Store.ancestors` gives them: those that exist, nearest first.

    raises  SnapshotError where its own object, or the record of an ancestor, is damaged; MismatchError for one of a
            newer format
    """
    way = list(ancestors)
    lineage = way[:LINEAGE]
    nearest = lineage[0] if lineage else None
    norms, warnings = Norms(), list[str]()
    if snapshot.keeps_state:
        norms, last_hidden = _norms_of(snapshot)
        warnings = _not_finite(norms, last_hidden)
    compared: list[Ancestor] = []
    settled = [ancestor for ancestor in lineage if ancestor.tokens >= SETTLED_CHUNKS * ancestor.chunk]
    for ancestor in dict.fromkeys([*lineage[:1], *settled[-1:]]) if norms else ():
        try:
            before, _ = _norms_of(ancestor)
        except (SnapshotError, MismatchError) as error:
            warnings.append(f"not compared with snapshot {ancestor.id[:12]} at token {ancestor.tokens}: {error}")
            continue
        compared.append(Ancestor(ancestor.id, ancestor.tokens, before))
        if ancestor in settled:
            warnings += _grown(norms, before, ancestor.tokens)
    loss, added_loss = _loss(snapshot, None), _loss(snapshot, nearest)
    if nearest is not None:
        warnings += _risen(added_loss, _loss(nearest, None))
    spans = [*along(snapshot, way)]
    trained = trained_tokens(snapshot.model_path)
    warnings += _past_training(spans, trained)
    is_chunk = snapshot.how == CHUNK_STATE
    token, byte = (snapshot.anchor_token, snapshot.anchor_byte) if is_chunk else (0, 0)
    start = (nearest.tokens, nearest.bytes) if nearest is not None else (token, byte)
    return Inspection(
        text=Span(token, token + snapshot.tokens, byte, snapshot.bytes),
        added=Span(start[0], token + snapshot.tokens, start[1], snapshot.bytes),
        nearest_ancestor=nearest.id if nearest is not None else None,
        loss=loss,
        added_loss=added_loss,
        norms=norms,
        ancestors=compared,
        spans=spans,
        trained_tokens=trained,
        warnings=warnings,
    )


def along(snapshot: Snapshot, ancestors: Iterable[Snapshot]) -> Iterator[Along]:
    """The way to a snapshot, oldest span first, as the records of it and its ancestors (nearest first) tell it."""
    way = [snapshot, *ancestors][::-1]
    if snapshot.how == CHUNK_STATE:
        return  # it has come no way
    for before, at in itertools.pairwise([None, *way]):
        assert at is not None
        tokens, n_bytes = (before.tokens, before.bytes) if before is not None else (0, 0)
        norms = {
            name: None if None in layers else math.hypot(*(norm for norm in layers if norm is not None))
            for name, layers in at.norms.items()
        }
        yield Along(Span(tokens, at.tokens, n_bytes, at.bytes), _loss(at, before), norms, dict(at.drift))


def trained_tokens(model_path: str) -> int | None:
    """Length in tokens of the texts that a model was trained on, as official checkpoints carry it in their names."""
    found = _TRAINED.search(PurePath(model_path).name)
    return None if found is None else int(found["number"]) * (1024 if found["k"] else 1)


def _past_training(spans: Sequence[Along], trained: int | None) -> list[str]:
    """Says so where a text is longer than those that the model was trained on, and what became of its loss there."""
    if trained is None or not spans or spans[-1].span.to_token <= trained:
        return []
    reached = f"length: token {spans[-1].span.to_token:,} is past the {trained:,} that the model was trained on"
    inside = _mean_loss([one for one in spans if one.span.to_token <= trained] or spans[:1])
    outside = _mean_loss([one for one in spans[1:] if one.span.to_token > trained])
    if inside is None or outside is None:
        return [f"{reached}; how its loss went there is not recorded"]
    return [f"{reached}; bits per byte: {inside:.3f} up to there, {outside:.3f} since"]


def _mean_loss(spans: Sequence[Along]) -> float | None:
    """Bits per byte of all of them that have some."""
    known = [(one.loss.bits_per_byte, one.span.to_byte - one.span.from_byte) for one in spans if one.loss is not None]
    n_bytes = sum(size for _, size in known)
    return sum(bits * size for bits, size in known) / n_bytes if n_bytes else None


def _norms_of(snapshot: Snapshot) -> tuple[Norms, Float32s]:
    """Those of its state, and its last hidden state."""
    arrays = snapshot.arrays()
    last_hidden = arrays.pop(LAST_HIDDEN)
    return layer_norms(arrays), last_hidden


def layer_norms(state: Arrays) -> Norms:
    """Frobenius norms of each tensor [1, L, ...] of a state, layer by layer."""
    return {name: [_norm(layer) for layer in array[0]] for name, array in state.items()}


def _norm(layer: Float32s) -> float | None:
    values = layer.astype("f8")
    return _finite(math.sqrt((values * values).sum()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _loss(snapshot: Snapshot, since: Snapshot | None) -> Loss | None:
    """Of the text up to a snapshot, or of what it adds to an ancestor; None where no token of it was sampled."""
    bits, sampled = snapshot.sampled_bits, snapshot.sampled_tokens
    tokens, n_bytes = snapshot.tokens, snapshot.bytes
    if since is not None:
        bits, sampled = bits - since.sampled_bits, sampled - since.sampled_tokens
        tokens, n_bytes = tokens - since.tokens, n_bytes - since.bytes
    if sampled <= 0 or n_bytes <= 0:
        return None
    return Loss(bits / sampled * tokens / n_bytes, sampled)


def _not_finite(norms: Norms, last_hidden: Float32s) -> list[str]:
    found = [
        f"not finite: '{name}' of layer {layer}"
        for name, layers in norms.items()
        for layer, norm in enumerate(layers)
        if norm is None
    ]
    return found if bool((abs(last_hidden) < math.inf).all()) else [*found, "not finite: the last hidden state"]


def _grown(norms: Norms, before: Norms, token: int) -> list[str]:
    return [
        f"norm: '{name}' of layer {layer} is {norm:.4g}, {before[name][layer]:.4g} at token {token}"
        for name, layers in norms.items()
        for layer, norm in enumerate(layers)
        if norm is not None and (old := before[name][layer]) is not None and norm > NORM_FACTOR * old
    ]


def _risen(added: Loss | None, before: Loss | None) -> list[str]:
    if added is None or before is None or min(added.sampled_tokens, before.sampled_tokens) < LOSS_TOKENS:
        return []
    if added.bits_per_byte <= LOSS_FACTOR * before.bits_per_byte:
        return []
    return [f"loss: {added.bits_per_byte:.3f} bits per byte of what it adds, {before.bits_per_byte:.3f} before"]


# ---- two snapshots ----


@dataclass(frozen=True, slots=True)
class Distance:
    """How far tensor B is from tensor A. None: not defined, as one of them is zero or not finite."""

    relative: float | None  # ‖A − B‖ / ‖A‖
    cosine: float | None


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """Of one tensor of the state in one layer."""

    layer: int
    tensor: str
    distance: Distance


@dataclass(frozen=True, slots=True)
class TokenChange:
    """Probabilities of a token coming next; `text` has U+FFFD for bytes that are no character by themselves."""

    token: int
    text: str
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How snapshot B differs from snapshot A.

    is_equal  whether all values of the states are equal, bit for bit
    kl_bits   KL(A‖B) of the distributions of the next token; None where one is not finite
    changes   the tokens whose probability differs most, most first; none without `kl_bits`
    """

    is_equal: bool
    layers: list[LayerDifference]
    last_hidden: Distance
    kl_bits: float | None
    changes: list[TokenChange]


def diff(a: Snapshot, b: Snapshot, model: Model, *, top: int = 10) -> Difference:
    """Compare the states of two snapshots, and what `model`, which made both, expects after each.

    raises  MismatchError for snapshots of different models, or of another than this one; SnapshotError
    """
    if a.model != b.model:
        raise MismatchError(
            f"comparing snapshots {a.id[:12]} and {b.id[:12]}: expected one model's, found {a.model}, last seen at "
            f"'{a.model_path}', and {b.model}, last seen at '{b.model_path}'"
        )
    check_model(a, model)
    (state_a, hidden_a), (state_b, hidden_b) = a.load(), b.load()
    layers = [
        LayerDifference(layer, name, distance(left, right))
        for name in state_a
        for layer, (left, right) in enumerate(zip(state_a[name][0], state_b[name][0], strict=True))
    ]
    log_p, log_q = (_next_token(model, hidden) for hidden in (hidden_a, hidden_b))
    p, q = log_p.exp(), log_q.exp()
    kl_bits = _finite((p * (log_p - log_q)).sum().item() / math.log(2))
    changes = [
        TokenChange(token, model.tokenizer.decode([token]).decode("utf-8", "replace"), p[token].item(), q[token].item())
        for token in (p - q).abs().topk(min(top, len(p))).indices.tolist()
        if kl_bits is not None and p[token] != q[token]
    ]
    return Difference(a.state_digest == b.state_digest, layers, distance(hidden_a, hidden_b), kl_bits, changes)


def distance(a: Tensor, b: Tensor) -> Distance:
    """Between two tensors of one shape."""
    a, b = a.double().flatten(), b.double().flatten()
    norm_a, norm_b, norm = (z.norm().item() for z in (a, b, a - b))
    if norm_a == 0 or not math.isfinite(norm_a * norm_b):
        return Distance(0.0 if norm == 0 else None, None)
    if norm_b == 0:
        return Distance(1.0, None)
    cosine = (a @ b).item() / (norm_a * norm_b)
    return Distance(norm / norm_a, 1.0 if norm == 0 else max(-1.0, min(1.0, cosine)))


def _next_token(model: Model, last_hidden: Tensor) -> Tensor:
    """Log-probabilities float64 [V] of the token that follows a last hidden state [C]."""
    return model.head(last_hidden.to(model.device)).double().cpu().log_softmax(-1)


# ---- lineage ----


@dataclass(frozen=True, slots=True)
class Placed:
    """A snapshot in a drawn tree.

    rails     for each line of descent left of its own, outermost first: whether that goes on further down
    is_first  whether its own line begins here: a reading from its start, or a fork of the snapshot above
    """

    entry: Listed
    rails: tuple[bool, ...]
    is_first: bool


def tree(entries: Iterable[Listed], heads: Iterable[str]) -> Iterator[Placed]:
    """The snapshots of a family as the lines of a tree, each followed by what forks there, then by what goes on.

    entries  as `Store.family` gives them; a removed one has no line, what descends from it joins its own origin
    heads    ids where heads stand: where a line of descent parts, what leads to one of them goes straight on
    """
    by_id = {entry.id: entry for entry in entries}
    below: dict[str | None, list[Listed]] = {}
    for entry in by_id.values():
        origin = entry.parent if entry.parent in by_id else entry.start
        below.setdefault(origin if origin in by_id else None, []).append(entry)
    leading: set[str] = set()  # to a head
    for head in heads:
        at: str | None = head
        while at in by_id and at not in leading:
            leading.add(at)
            at = by_id[at].parent

    stack = [Placed(entry, (), True) for entry in reversed(_living(below, None))]
    while stack:
        placed = stack.pop()
        entry = placed.entry
        yield placed
        children = _living(below, entry.id)
        going_on = max(
            (child for child in children if child.parent is not None and child.start == entry.start),
            key=lambda child: (child.document == entry.document, child.id in leading, child.created),
            default=None,
        )
        if going_on is not None:
            stack.append(Placed(going_on, placed.rails, False))
        rails = (*placed.rails, going_on is not None)
        stack.extend(Placed(child, rails, True) for child in reversed(children) if child is not going_on)


def _living(below: dict[str | None, list[Listed]], origin: str | None) -> list[Listed]:
    """What comes next after a snapshot (None: first of all), those of a removed one in its place."""
    living: list[Listed] = []
    stack = below.get(origin, [])[::-1]
    while stack:
        entry = stack.pop()
        if entry.removed:
            stack.extend(reversed(below.get(entry.id, [])))
        else:
            living.append(entry)
    return living
