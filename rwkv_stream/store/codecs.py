"""How the tensors of a state become bytes: exactly, or in fewer, with an error that `snapshots certify` measures.

`int16` and `int8` keep a whole number for each value and one scale for each 128 values that lie beside each other, two
rows of a head's matrix where heads are of 64. Rotating rows first (a randomised Hadamard transform) made their
errors no smaller on the states that were tried, and the bytes, which zstd then packs no more, up to twice as many;
bfloat16 took the bytes of `int16` at a thousand times its error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Float32s = npt.NDArray[np.float32]

EXACT = "exact"
BLOCK = 128  # values that share a scale


class Codec(Protocol):
    """How one tensor becomes bytes, before they are compressed, and back."""

    @property
    def name(self) -> str: ...

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """How many bytes a tensor of this shape becomes."""

    def encode(self, array: Float32s) -> bytes:
        """The bytes of a tensor. Raises UsageError for values that it cannot hold."""

    def decode(self, data: bytes, shape: tuple[int, ...]) -> Float32s:
        """The tensor of bytes that `encode` gave, as near as it can."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The four bytes of every fp32 value."""

    name = EXACT

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * 4

    def encode(self, array: Float32s) -> bytes:
        return _split(array)

    def decode(self, data: bytes, shape: tuple[int, ...]) -> Float32s:
        values: Float32s = _join(data, "<f4").reshape(shape)
        return values


@dataclass(frozen=True, slots=True)
class Integers:
    """A signed integer for every value, after an fp32 scale for every BLOCK of them, by which it is to be multiplied.

    The largest magnitude of a block is the largest integer: no value is off by more than half a scale.
    """

    name: str
    itemsize: int

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        return 4 * -(-n // BLOCK) + self.itemsize * n

    def encode(self, array: Float32s) -> bytes:
        import numpy as np

        values = array.reshape(-1).astype(np.float64)
        if not np.isfinite(values).all():
            raise UsageError(f"coding a state as {self.name}: expected finite numbers, found others")
        blocks = np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
        most = (1 << (8 * self.itemsize - 1)) - 1
        scales = (np.abs(blocks).max(axis=1) / most).astype("<f4")
        numbers = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).clip(-most, most)
        kept = numbers.reshape(-1)[: len(values)].astype(f"<i{self.itemsize}")
        return _split(scales) + _split(kept)

    def decode(self, data: bytes, shape: tuple[int, ...]) -> Float32s:
        import numpy as np

        n = math.prod(shape)
        n_scales = -(-n // BLOCK)
        scales = np.repeat(_join(data[: 4 * n_scales], "<f4"), BLOCK)[:n]
        values: Float32s = (_join(data[4 * n_scales :], f"<i{self.itemsize}") * scales).astype(np.float32)
        return values.reshape(shape)


CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (Exact(), Integers("int16", 2), Integers("int8", 1))}


def codec_named(name: str) -> Codec:
    """Raises UsageError where there is none of this name."""
    if name not in CODECS:
        raise UsageError(f"coding a state: expected a codec of {', '.join(CODECS)}, found '{name}'")
    return CODECS[name]


def _split(array: Any) -> bytes:
    """Values as planes of bytes, the first byte of each and so on: signs and exponents lie together, which zstd packs
    better."""
    planes: bytes = array.reshape(-1).view("u1").reshape(-1, array.dtype.itemsize).T.tobytes()
    return planes


def _join(planes: bytes, dtype: str) -> Any:
    import numpy as np

    itemsize = np.dtype(dtype).itemsize
    array = np.empty(len(planes) // itemsize, dtype)
    array.view("u1").reshape(-1, itemsize)[...] = np.frombuffer(planes, dtype="u1").reshape(itemsize, -1).T
    return array
