"""ROUGE: how much a summary has in common with one that a person wrote (Lin 2004).

Words are runs of a-z and 0-9 in lower case, those of more than three letters as their Porter stems, as the package
rouge-score has them by `use_stemmer=True`; F is the harmonic mean of precision and recall.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import Stemmer

_WORD = re.compile(r"[a-z0-9]+")


class Rouge(NamedTuple):
    """F of the words, of pairs of words, and of the longest common subsequence, 0 to 1."""

    rouge_1: float
    rouge_2: float
    rouge_l: float


@cache
def _stemmer() -> Stemmer.Stemmer:
    return Stemmer.Stemmer("porter")


def words(text: str) -> list[str]:
    """What is compared."""
    return [_stemmer().stemWord(word) if len(word) > 3 else word for word in _WORD.findall(text.lower())]


def rouge(summary: Sequence[str], reference: Sequence[str]) -> Rouge:
    """ROUGE-1, -2 and -L of what `words` gave."""
    common = _longest(summary, reference)
    return Rouge(_of(1, summary, reference), _of(2, summary, reference), _f(common, len(summary), len(reference)))


def _of(n: int, summary: Sequence[str], reference: Sequence[str]) -> float:
    """F of runs of n words, one that comes again counted again."""
    ours, theirs = (Counter(zip(*(one[i:] for i in range(n)), strict=False)) for one in (summary, reference))
    return _f((ours & theirs).total(), ours.total(), theirs.total())


def _f(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _longest(first: Sequence[str], second: Sequence[str]) -> int:
    """Words of the longest common subsequence, in bits (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    mask = (1 << len(first)) - 1
    left = mask
    for word in second:
        met = left & places.get(word, 0)
        left = (left + met | left - met) & mask
    return len(first) - left.bit_count()
