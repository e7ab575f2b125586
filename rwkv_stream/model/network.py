"""What all versions share: the pass over the blocks, for rows of tokens and for segments laid end to end.

    x = LN(emb[token]; ln0)
    in every block:  x = x + TimeMix(LN(x; ln1)),  x = x + ChannelMix(LN(x; ln2))
    hidden = LN(x; ln_out)

Shapes: B batch, T time, C width, H heads, N head size, C = H N. A `Block` is the mapping of one layer's tensors without
`blocks.{i}.`, as the version's `prepare` leaves them; vectors are 1-D fp32, matrices may be of 16 bits. The residual
stream, the norms, the nonlinearities and everything around the recurrence are fp32. `previous` is always the input of
the token before, after its LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.kernels import Recurrence
from rwkv_stream.kernels.ops import Weight
from rwkv_stream.kernels.wkv_ref import padded_with
from rwkv_stream.model.config import Config, Shapes
from rwkv_stream.state import State

Block = Mapping[str, Any]  # of Tensor, or Weight where matrices are packed

LN_EPS = 1e-5


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

    def before_wkv(self, h: Tensor, previous: Tensor, block: Block, v_first: Tensor | None) -> Before:
        """Time-mix up to the recurrence: h, previous [B, T, C]; v_first is what layer 0 gave (RWKV-7)."""

    def after_wkv(self, y: Tensor, before: Before, block: Block, group_norm_eps: float) -> Tensor:
        """The rest of time-mix: y as the recurrence gives it → [B, T, C], to be added to the residual stream."""

    def channel_mix(self, h: Tensor, previous: Tensor, block: Block, tokens: Tensor, embedded: Tensor) -> Tensor:
        """h, previous, and embedded (the output of ln0) [B, T, C], tokens [B, T] → [B, T, C], to be added."""


class Before(NamedTuple):
    """What time-mix hands to the recurrence (`inputs` per token, `constants`), and what it needs again after it."""

    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()
    gate: Tensor | float = 1.0
    v_first: Tensor | None = None


class Flat(NamedTuple):
    """Tokens int64 [n] of segments laid end to end: offsets [S + 1], start [S], to [S]; rows of the new state."""

    tokens: Tensor
    segments: tuple[Tensor, Tensor, Tensor]
    n_kept: int


def layer_norm(x: Tensor, block: Block, name: str) -> Tensor:
    weight, bias = block[f"{name}.weight"], block[f"{name}.bias"]
    return F.layer_norm(x, x.shape[-1:], weight, bias, LN_EPS)


def group_norm(y: Tensor, block: Block, eps: float) -> Tensor:
    """Every head for itself: y [B, T, H, N] → [B, T, C]."""
    B, T, H, N = y.shape
    normed = F.group_norm(y.reshape(B * T, H * N), H, block["att.ln_x.weight"], block["att.ln_x.bias"], eps)
    return normed.view(B, T, H * N)


def linear(x: Tensor, weight: Tensor | Weight) -> Tensor:
    """`weight x` in the weight's dtype, returned in fp32; weight `[out, in]`."""
    if isinstance(weight, Weight):
        if torch.is_grad_enabled() and x.requires_grad:
            return linear(x, weight.matrix())
        product: Tensor = weight(x)
        return product
    return F.linear(x.to(weight.dtype), weight).float()


def low_rank(
    x: Tensor, w1: Tensor | Weight, w2: Tensor | Weight, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`activation(x @ w1) @ w2` in fp32; w1 `[in, rank]`, w2 `[rank, out]`, packed the other way round."""
    z = linear(x, w1 if isinstance(w1, Weight) else w1.T)
    if activation is not None:
        z = activation(z)
    return linear(z, w2 if isinstance(w2, Weight) else w2.T)


def with_token_mixing(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """`time_mix_*` of RWKV-4 and 5, which weigh the token itself, as `x_*`, which weigh the one before."""
    mixed = {name: value for name, value in block.items() if ".time_mix_" in name}
    others = {name: value for name, value in block.items() if name not in mixed}
    return others | {name.replace("time_mix_", "x_"): 1 - value for name, value in mixed.items()}


def gated_channel_mix(h: Tensor, previous: Tensor, block: Block) -> Tensor:
    """Channel-mix of RWKV-4 to 6, with mixing vectors `ffn.x_k`, `ffn.x_r` (0 means the token itself)."""
    d = previous - h
    k = torch.relu(linear(h + d * block["ffn.x_k"], block["ffn.key.weight"])) ** 2
    r = torch.sigmoid(linear(h + d * block["ffn.x_r"], block["ffn.receptance.weight"]))
    return r * linear(k, block["ffn.value.weight"])


def shift(h: Tensor, x_prev: Tensor) -> Tensor:
    """The input of the previous token for each token of rows: h `[B, T, C]`, x_prev `[B, C]` → `[B, T, C]`."""
    return torch.cat([x_prev.unsqueeze(1), h[:, :-1]], dim=1)


class Rows:
    """B rows of T tokens; of row b the first lengths[b] are its own, what follows does not touch its state."""

    def __init__(self, tokens: Tensor, state: State, lengths: Tensor | None) -> None:
        self.tokens = tokens
        self.state, self._lengths = state, lengths
        self._is_padding = None
        if lengths is not None:
            self._is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]

    def shifted(self, h: Tensor, name: str, i: int) -> tuple[Tensor, Tensor]:
        """h [B, T, C] → that of the token before [B, T, C], and what the token after the last will see [B, C]."""
        x_prev = self.state[name][:, i]
        if self._lengths is None:
            return shift(h, x_prev), h[:, -1].clone()  # not a view, which would keep all of h
        known = torch.cat([x_prev.unsqueeze(1), h], dim=1)
        return known[:, :-1], known[torch.arange(len(h), device=h.device), self._lengths]

    def flat(self) -> Flat:
        """The tokens that are read, end to end."""
        B, T = self.tokens.shape
        rows = torch.arange(B)
        if self._lengths is None or self._is_padding is None:
            return Flat(self.tokens.flatten(), (torch.arange(0, B * T + 1, T), rows, rows), B)
        return Flat(self.tokens[~self._is_padding], (F.pad(self._lengths.cumsum(0), (1, 0)), rows, rows), B)

    def unflat(self, hidden: Tensor) -> Tensor:
        """hidden [n, C] of the flat tokens → [B, T, C], zero at padding."""
        if self._is_padding is None:
            return hidden.view(*self.tokens.shape, -1)
        rows = hidden.new_zeros(*self.tokens.shape, hidden.shape[-1])
        rows[~self._is_padding] = hidden
        return rows

    def wkv(self, recurrence: Recurrence, before: Before, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = before.inputs
        if self._is_padding is not None:
            inputs = padded_with(recurrence.padding, inputs, self._is_padding)
        y, new = recurrence.rows(inputs, before.constants, tuple(z[:, i] for z in self.state.recurrence))
        return y, new


class Segments:
    """Segments of several texts laid end to end as one row: only token shift and recurrence know their edges.

    tokens  int64 [n]; lengths int64 [S], each 1 or more, together n
    state   of batch R; start int64 [S], the row of it that each segment starts from
    keep    int64 [K], the segments whose state comes back
    """

    def __init__(self, tokens: Tensor, state: State, lengths: Tensor, start: Tensor, keep: Tensor) -> None:
        self.tokens = tokens[None]
        self.state, self._start, self._keep = state, start, keep
        ends = lengths.cumsum(0)
        self._offsets, self._firsts, self._lasts = F.pad(ends, (1, 0)), ends - lengths, (ends - 1)[keep]

    def shifted(self, h: Tensor, name: str, i: int) -> tuple[Tensor, Tensor]:
        """h [1, n, C] → that of the token before [1, n, C], and what the tokens after the kept ends will see [K, C]."""
        previous = h.roll(1, dims=1)
        previous[0, self._firsts] = self.state[name][self._start, i]
        return previous, h[0, self._lasts]

    def flat(self) -> Flat:
        """The tokens, as they are."""
        to = torch.full_like(self._start, -1)
        to[self._keep] = torch.arange(len(self._keep))
        return Flat(self.tokens[0], (self._offsets, self._start, to), len(self._keep))

    def unflat(self, hidden: Tensor) -> Tensor:
        """hidden [n, C] → [1, n, C]."""
        return hidden.unsqueeze(0)

    def wkv(self, recurrence: Recurrence, before: Before, i: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs, state = tuple(z[0] for z in before.inputs), tuple(z[:, i] for z in self.state.recurrence)
        y, new = recurrence.segments(inputs, before.constants, state, self._offsets, self._start, self._keep)
        return y.unsqueeze(0), new


def forward(
    architecture: Architecture,
    config: Config,
    outer: Block,
    blocks: Sequence[Block],
    given: Rows | Segments,
    recurrence: Recurrence,
) -> tuple[Tensor, State]:
    """Read the given tokens [B, T]: hidden [B, T, C] fp32 after ln_out, new state. The given state is unchanged.

    outer: the tensors outside the blocks, and `ln0` (`emb.weight`, `ln0.*`, `ln_out.*`)
    """
    embedded = layer_norm(F.embedding(given.tokens, outer["emb.weight"]).float(), outer, "ln0")
    x, v_first = embedded, None
    new: dict[str, list[Tensor]] = {name: [] for name in given.state}
    for i, block in enumerate(blocks):
        h = layer_norm(x, block, "ln1")
        previous, att_x_prev = given.shifted(h, "att_x_prev", i)
        before = architecture.before_wkv(h, previous, block, v_first)
        v_first = before.v_first
        y, kv = given.wkv(recurrence, before, i)
        x = x + architecture.after_wkv(y, before, block, config.group_norm_eps)
        h = layer_norm(x, block, "ln2")
        previous, ffn_x_prev = given.shifted(h, "ffn_x_prev", i)
        x = x + architecture.channel_mix(h, previous, block, given.tokens, embedded)
        for parts, part in zip(new.values(), (att_x_prev, *kv, ffn_x_prev), strict=True):
            parts.append(part)
    return layer_norm(x, outer, "ln_out"), State({name: torch.stack(parts, dim=1) for name, parts in new.items()})
