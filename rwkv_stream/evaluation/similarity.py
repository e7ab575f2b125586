"""Whether vectors of two texts are near where people find the texts alike: pairs with scores, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError
from rwkv_stream.training.data import read_records

if TYPE_CHECKING:
    import numpy.typing as npt

FIELDS = ("sentence1", "sentence2")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts, and how alike people found them."""

    id: str
    texts: tuple[str, str]
    gold: float

    @classmethod
    def of(cls, record: Mapping[str, Any], number: int) -> Pair:
        """That of a record, the n-th. Raises InputError that says what is wrong with it."""
        first, second = (record.get(name) for name in FIELDS)
        gold = record.get("score")
        if not isinstance(first, str) or not isinstance(second, str) or not first.strip() or not second.strip():
            raise InputError(f"expected the texts {' and '.join(FIELDS)}, found {first!r:.40} and {second!r:.40}")
        if isinstance(gold, bool) or not isinstance(gold, int | float) or not math.isfinite(gold):
            raise InputError(f"expected a number as 'score', found {gold!r:.40}")
        return cls(str(record.get("id", number)), (first, second), float(gold))


def pairs(path: Path) -> Iterator[Pair | InputError]:
    """The rows of a file, and what is wrong with those that are no pairs."""
    for number, (record, _) in enumerate(read_records(path), 1):
        try:
            if isinstance(record, str):
                raise InputError(record)
            yield Pair.of(record, number)
        except InputError as error:
            yield InputError(f"reading '{path}', row {number}: {error}")


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation of two rows of numbers, of equals the mean of their ranks; NaN where one of them is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if any(np.ptp(found) == 0 for found in ranks):
        return math.nan
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
