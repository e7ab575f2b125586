"""Vectors of words from which words stand near them: what stands near alike gets alike vectors.

The positive pointwise mutual information of two words within WINDOW words of each other, the nearer the more, with
contexts smoothed by 3/4, and the first directions of its singular value decomposition, each by the root of its value
(Levy & Goldberg & Dagan 2015, TACL: "Improving distributional similarity with lessons learned from word embeddings").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

WINDOW = 5
SMOOTHING = 0.75
_WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words and marks of a text in lower case."""
    return _WORD.findall(text.lower())


def word_vectors(
    texts: Iterable[str], n_words: int, dimension: int, *, seed: int = 0
) -> tuple[list[str], NDArray[np.float32]]:
    """The `n_words` commonest words, the commonest first, and their vectors of length 1 [words + 1, D]; the last, of
    all other words, is zero.

    Takes 8 bytes for each pair of words, and 4 for each word of the texts.
    """
    counts: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    read = list[NDArray[np.int32]]()
    for text in texts:
        found = words_of(text)
        counts.update(found)
        read.append(np.array([numbers.setdefault(word, len(numbers)) for word in found], np.int32))
    words = [word for word, _ in counts.most_common(n_words)]
    V = len(words)
    row_of = np.full(len(numbers), -1, np.int64)
    row_of[[numbers[word] for word in words]] = np.arange(V)
    together = np.zeros(V * V, np.float32)
    for text_words in read:
        rows = row_of[text_words]
        for distance in range(1, WINDOW + 1):
            left, right = rows[:-distance], rows[distance:]
            known = (left >= 0) & (right >= 0)
            pairs, n = np.unique(left[known] * V + right[known], return_counts=True)
            together[pairs] += n / distance
    near = torch.from_numpy(together.reshape(V, V))
    near = near + near.T
    of_word = near.sum(1)
    of_context = of_word**SMOOTHING
    expected = of_word[:, None] * (of_context / of_context.sum())
    information = torch.log(near / expected).clamp(min=0).nan_to_num(nan=0, posinf=0)
    torch.manual_seed(seed)
    directions, values, _ = torch.svd_lowrank(information, q=dimension + dimension // 4, niter=3)
    vectors = torch.nn.functional.normalize(directions[:, :dimension] * values[:dimension].sqrt(), dim=1)
    return words, torch.cat([vectors, vectors.new_zeros(1, dimension)]).numpy()
