"""What all versions share: the pass over the blocks, for rows of tokens and for segments laid end to end.

    x = LN(emb[token]; ln0)
    in every block:  x = x + TimeMix(LN(x; ln1)),  x = x + ChannelMix(LN(x; ln2))
    hidden = LN(x; ln_out)

Shapes: B batch, T time, C width, H heads, N head size, C = H N. A `Block` is the mapping of one layer's tensors without
`blocks.{i}.`, as the version's `prepare` leaves them; vectors are 1-D fp32, matrices may be of 16 bits. The residual
stream, the norms, the nonlinearities and everything around the recurrence are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import Recurrence
from rwkv_stream.kernels.layers.cpu import Weight, norm_shift_mix
from rwkv_stream.kernels.layers.reference import ACTIVATIONS
from rwkv_stream.kernels.recurrence.reference import padded_with
from rwkv_stream.model.config import LAYER_NORM_EPS, Config, Shapes
from rwkv_stream.model.state import State

Block = Mapping[str, Any]  # of Tensor, or Weight where matrices are packed


class Architecture(Protocol):
    """What the module of a version gives."""

    @property
    def UNUSED(self) -> tuple[str, ...]:  # noqa: N802
        """Tensors that files may hold and nothing reads."""

    def config(self, version: str, shapes: Shapes) -> Config:
        """The dimensions, from the canonical shapes of a checkpoint. Raises CheckpointError."""

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Name → canonical shape of every tensor of a checkpoint with these dimensions."""

    def prepare(self, block: Block, config: Config) -> dict[str, Tensor]:
        """One layer's tensors in the form that the functions below take."""

    def before_wkv(self, mix: TokenShift, block: Block, v_first: Tensor | None) -> Projections:
        """Time-mix up to the recurrence; v_first is what layer 0 gave (RWKV-7)."""

    def after_wkv(self, y: Tensor, projections: Projections, block: Block, group_norm_eps: float) -> Tensor:
        """The rest of time-mix: y as the recurrence gives it → [B, T, C], to be added to the residual stream."""

    def channel_mix(self, mix: TokenShift, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
        """tokens [B, T] and embedded [B, T, C], the output of ln0 → [B, T, C], to be added."""


class TokenShift(Protocol):
    """Token shift: what lies between the LayerNorm of each token, h, and that of the one before."""

    def __call__(self, vectors: Tensor, deltas: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        """h + (previous - h) (vector + delta) [B, T, C] for each of vectors [M, C], and deltas [B, T, C] where given.

        In the dtype that products read, where these are kernels'.
        """


class Projections(NamedTuple):
    """What time-mix hands to the recurrence (`inputs` per token, `constants`), and what it needs again after it."""

    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    gate: Tensor | float = 1.0
    v_first: Tensor | None = None


def layer_norm(x: Tensor, block: Block, name: str) -> Tensor:
    weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def group_norm(y: Tensor, block: Block, eps: float) -> Tensor:
    """Every head for itself: y [B, T, H, N] → [B, T, C]."""
    B, T, H, N = y.shape
    normed = F.group_norm(y.reshape(B * T, H * N), H, block["att.ln_x.weight"], block["att.ln_x.bias"], eps)
    return normed.view(B, T, H * N)


def linear(
    x: Tensor, weight: Tensor | Weight | torch.nn.Module, activation: str = "none", *, is_read_next: bool = False
) -> Tensor:
    """`activation(weight x)` with the product in the weight's dtype; weight `[out, in]`, activation of `ACTIVATIONS`.

    In fp32; where the next product reads it, in the dtype that this takes. A module is one that multiplies, such as
    `torch.nn.Linear`, which has the weight.
    """
    matrix: Any = weight
    if isinstance(weight, Weight):
        if not (torch.is_grad_enabled() and x.requires_grad):
            product: Tensor = weight(x, activation, weight.input_dtype if is_read_next else torch.float32)
            return product
        matrix = weight.matrix()
    elif isinstance(weight, torch.nn.Module):
        matrix = weight.weight
    given = x.to(matrix.dtype)
    product = weight(given) if isinstance(weight, torch.nn.Module) else F.linear(given, matrix)
    y: Tensor = ACTIVATIONS[activation](product.float())
    return y.to(matrix.dtype) if is_read_next else y


def low_rank(x: Tensor, w1: Tensor | Weight, w2: Tensor | Weight, activation: str = "none") -> Tensor:
    """`activation(x @ w1) @ w2` in fp32; w1 `[in, rank]`, w2 `[rank, out]`, packed the other way round."""
    z = linear(x, transposed(w1), activation, is_read_next=True)
    return linear(z, transposed(w2))


def transposed(weight: Tensor | Weight) -> Tensor | Weight:
    """A matrix `[in, out]` as `linear` takes it; it is packed the other way round."""
    return weight if isinstance(weight, Weight) else weight.T


def in_heads(z: Tensor, heads: Tensor) -> Tensor:
    """z [B, T, C] as [B, T, H, N], the shape of `heads` [H, N]."""
    return z.view(*z.shape[:-1], *heads.shape)


def mixing_rows(block: dict[str, Tensor], *names: str) -> Tensor:
    """These mixing vectors, taken out of the block, as the rows of one matrix."""
    return torch.stack([block.pop(name) for name in names])


def gated_channel_mix(mix: TokenShift, block: Block) -> Tensor:
    """Channel-mix of RWKV-4 to 6, with the mixing vectors of k and r in `ffn.mix`."""
    xk, xr = mix(block["ffn.mix"])
    k = linear(xk, block["ffn.key.weight"], "relu2", is_read_next=True)
    return linear(xr, block["ffn.receptance.weight"], "sigmoid") * linear(k, block["ffn.value.weight"])


def shift(h: Tensor, x_prev: Tensor) -> Tensor:
    """The input of the previous token for each token of rows: h `[B, T, C]`, x_prev `[B, C]` → `[B, T, C]`."""
    return torch.cat([x_prev.unsqueeze(1), h[:, :-1]], dim=1)


def token_shift(h: Tensor, previous: Tensor) -> TokenShift:
    """h, previous [B, T, C], mixed by plain torch."""
    d = previous - h

    def mix(vectors: Tensor, deltas: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        weights = [vector + delta for vector, delta in zip(vectors, deltas, strict=True)] if deltas else vectors
        return [h + d * weight for weight in weights]

    return mix


class Rows:
    """B rows of T tokens; of row b the first lengths[b] are its own, what follows does not touch its state."""

    def __init__(self, tokens: Tensor, state: State, lengths: Tensor | None) -> None:
        self.tokens = tokens
        self.state, self._lengths = state, lengths
        self._is_padding = None
        if lengths is not None:
            self._is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]

    def at(self, device: torch.device, state: State) -> Rows:
        """The same for layers on a device, with their state."""
        lengths = None if self._lengths is None else self._lengths.to(device)
        return Rows(self.tokens.to(device), state, lengths)

    def token_shift(self, x: Tensor, block: Block, sublayer: Sublayer, i: int) -> tuple[TokenShift, Tensor]:
        """x [B, T, C] → how its tokens are mixed, and what the token after the last will see [B, C]."""
        h, x_prev = layer_norm(x, block, sublayer.norm), self.state[sublayer.x_prev][:, i]
        if self._lengths is None:
            return token_shift(h, shift(h, x_prev)), h[:, -1].clone()  # not a view, which would keep all of h
        known = torch.cat([x_prev.unsqueeze(1), h], dim=1)
        return token_shift(h, known[:, :-1]), known[torch.arange(len(h), device=h.device), self._lengths]

    def packed(self) -> PackedBatch:
        """The tokens that are read, end to end."""
        B, T = self.tokens.shape
        rows = torch.arange(B)
        if self._lengths is None or self._is_padding is None:
            return PackedBatch(self.tokens.flatten(), self.state, (torch.arange(0, B * T + 1, T), rows, rows), B)
        offsets = F.pad(self._lengths.cumsum(0), (1, 0))
        return PackedBatch(self.tokens[~self._is_padding], self.state, (offsets, rows, rows), B)

    def unpacked(self, hidden: Tensor) -> Tensor:
        """hidden [n, C] of the flat tokens → [B, T, C], zero at padding."""
        if self._is_padding is None:
            return hidden.view(*self.tokens.shape, -1)
        rows = hidden.new_zeros(*self.tokens.shape, hidden.shape[-1])
        rows[~self._is_padding] = hidden
        return rows

    def wkv(self, recurrence: Recurrence, projections: Projections, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = projections.inputs
        if self._is_padding is not None:
            inputs = padded_with(recurrence.padding, inputs, self._is_padding)
        y, new = recurrence.rows(inputs, projections.constants, tuple(z[:, i] for z in self.state.recurrence))
        return y, new


class Segments:
    """Segments of several texts laid end to end as one row: only token shift and recurrence know their edges.

    tokens  int64 [n]; lengths int64 [S], each 1 or more, together n
    state   of batch R; start int64 [S], the row of it that each segment starts from
    keep    int64 [K], the segments whose state comes back
    """

    def __init__(self, tokens: Tensor, state: State, lengths: Tensor, start: Tensor, keep: Tensor) -> None:
        self.tokens = tokens[None]
        self.state, self._lengths, self._start, self._keep = state, lengths, start, keep
        ends = lengths.cumsum(0)
        self._offsets, self._firsts, self._lasts = F.pad(ends, (1, 0)), ends - lengths, (ends - 1)[keep]

    def at(self, device: torch.device, state: State) -> Segments:
        """The same for layers on a device, with their state."""
        parts = (z.to(device) for z in (self._lengths, self._start, self._keep))
        return Segments(self.tokens[0].to(device), state, *parts)

    def token_shift(self, x: Tensor, block: Block, sublayer: Sublayer, i: int) -> tuple[TokenShift, Tensor]:
        """x [1, n, C] → how its tokens are mixed, and what the tokens after the kept ends will see [K, C]."""
        h = layer_norm(x, block, sublayer.norm)
        previous = h.roll(1, dims=1)
        previous[0, self._firsts] = self.state[sublayer.x_prev][self._start, i]
        return token_shift(h, previous), h[0, self._lasts]

    def packed(self) -> PackedBatch:
        """The tokens, as they are."""
        to = torch.full_like(self._start, -1)
        to[self._keep] = torch.arange(len(self._keep), device=to.device)
        return PackedBatch(self.tokens[0], self.state, (self._offsets, self._start, to), len(self._keep))

    def unpacked(self, hidden: Tensor) -> Tensor:
        """hidden [n, C] → [1, n, C]."""
        return hidden.unsqueeze(0)

    def wkv(self, recurrence: Recurrence, projections: Projections, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs, state = tuple(z[0] for z in projections.inputs), tuple(z[:, i] for z in self.state.recurrence)
        y, new = recurrence.segments(inputs, projections.constants, state, self._offsets, self._start, self._keep)
        return y.unsqueeze(0), new


class PackedBatch:
    """Segments as the kernels take them, which mix their tokens; without gradients.

    tokens    int64 [n], the segments laid end to end
    state     of batch R
    segments  offsets int64 [S + 1], start int64 [S] and to int64 [S], as `kernels.layers.reference` has them
    n_kept    rows of the new state
    """

    def __init__(self, tokens: Tensor, state: State, segments: tuple[Tensor, Tensor, Tensor], n_kept: int) -> None:
        self.tokens = tokens[None]
        self.state, self.segments, self.n_kept = state, segments, n_kept

    @property
    def is_step(self) -> bool:
        """Whether these are rows of one token each, that go on from the rows of the state in order, all kept."""
        offsets, start, to = self.segments
        rows = torch.arange(self.n_kept + 1)
        there = len(to) == self.state.batch == self.n_kept == self.tokens.shape[1] and offsets.device.type == "cpu"
        return there and all(torch.equal(z, rows[: len(z)]) for z in (offsets, start, to))

    @functools.cached_property
    def _keep(self) -> Tensor:
        """int64 [K], the segments whose state comes back."""
        to = self.segments[2]
        keep = torch.empty(self.n_kept, dtype=torch.int64)
        keep[to[to >= 0]] = torch.nonzero(to >= 0)[:, 0]
        return keep

    def at(self, device: torch.device, state: State) -> PackedBatch:
        """The same for layers on a device, with their state; segments stay where they are."""
        return PackedBatch(self.tokens[0].to(device, non_blocking=True), state, self.segments, self.n_kept)

    def token_shift(self, x: Tensor, block: Block, sublayer: Sublayer, i: int) -> tuple[TokenShift, Tensor]:
        """x [1, n, C] → how its tokens are mixed, and what the tokens after the kept ends will see [K, C]."""
        reader: Weight = block[sublayer.reader]
        norm = block[f"{sublayer.norm}.weight"], block[f"{sublayer.norm}.bias"]
        x_prev, last = self.state[sublayer.x_prev][:, i], x.new_empty(self.n_kept, x.shape[-1])

        def mix(vectors: Tensor, deltas: Sequence[Tensor] = ()) -> Sequence[Tensor]:
            out = x.new_empty(len(vectors), *x.shape, dtype=reader.input_dtype)
            norm_shift_mix(x[0], norm, vectors, deltas, x_prev, self.segments, out[:, 0], last)
            return out.unbind()

        return mix, last

    def wkv(self, recurrence: Recurrence, projections: Projections, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs, state = tuple(z[0] for z in projections.inputs), tuple(z[:, i] for z in self.state.recurrence)
        offsets, start, _ = self.segments
        y, new = recurrence.segments(inputs, projections.constants, state, offsets, start, self._keep)
        return y.unsqueeze(0), new


TokenBatch = Rows | Segments | PackedBatch


class Sublayer(NamedTuple):
    """Of a block: its LayerNorm, the part of the state that shifts into it, and a matrix that reads what it mixes."""

    norm: str
    x_prev: str
    reader: str


TIME_MIX = Sublayer("ln1", "att_x_prev", "att.key.weight")
CHANNEL_MIX = Sublayer("ln2", "ffn_x_prev", "ffn.key.weight")


class Stream(NamedTuple):
    """What goes from layer to layer, [B, T, C]: the residual stream, the output of ln0, and v of layer 0 (RWKV-7)."""

    x: Tensor
    embedded: Tensor
    v_first: Tensor | None = None

    def to(self, device: torch.device) -> Stream:
        v_first = None if self.v_first is None else self.v_first.to(device, non_blocking=True)
        return Stream(self.x.to(device, non_blocking=True), self.embedded.to(device, non_blocking=True), v_first)


def embed(outer: Block, tokens: Tensor) -> Stream:
    """What layer 0 reads: tokens int64 [B, T]; outer holds `emb.weight`, on any device, and `ln0`."""
    rows = F.embedding(tokens.to(outer["emb.weight"].device), outer["emb.weight"]).to(tokens.device, non_blocking=True)
    embedded = layer_norm(rows.float(), outer, "ln0")
    return Stream(embedded, embedded)


def layers(
    architecture: Architecture,
    config: Config,
    blocks: Iterable[Block],
    stream: Stream,
    batch: TokenBatch,
    recurrence: Recurrence,
) -> tuple[Stream, State]:
    """Through these blocks, whose state is the batch's and stays unchanged: the stream after them, their new state."""
    x, embedded, v_first = stream
    new: dict[str, list[Tensor]] = {name: [] for name in batch.state}
    for i, block in enumerate(blocks):
        mix, att_x_prev = batch.token_shift(x, block, TIME_MIX, i)
        projections = architecture.before_wkv(mix, block, v_first)
        v_first = projections.v_first
        y, kv = batch.wkv(recurrence, projections, i)
        x = x + architecture.after_wkv(y, projections, block, config.group_norm_eps)
        mix, ffn_x_prev = batch.token_shift(x, block, CHANNEL_MIX, i)
        x = x + architecture.channel_mix(mix, block, batch.tokens, embedded)
        for parts, part in zip(new.values(), (att_x_prev, *kv, ffn_x_prev), strict=True):
            parts.append(part)
    return Stream(x, embedded, v_first), State({name: torch.stack(parts, dim=1) for name, parts in new.items()})
