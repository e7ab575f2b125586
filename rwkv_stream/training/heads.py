"""A vector head on a frozen model: texts that belong together get near vectors, others far ones.

Pairs are a question and the text that answers it, or a passage and the one that follows it. In a batch stand several
pairs of one document, whose texts are the hard ones to tell apart, and of each text is told which of all is its own
(InfoNCE, van den Oord et al. 2018, arXiv 1807.03748). Beside that, similarities may follow those of a teacher.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.heads import EPS, VectorHead
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import TABLES, records, texts
from rwkv_stream.training.split import Split

GATES = 8
LARGEST = 512  # dimensions of a vector
LONGEST = 400  # tokens of a text; what follows is left out
CALL_TOKENS = 2048
BATCH = 64  # pairs
TOGETHER = 16  # of them, of one document
RATE = 2e-3
WARMUP = 50  # steps
SHARPNESS = 20.0  # of cosines: 1 / temperature
ALIKE = 5.0  # weight of similarities of first texts, and of second ones, that are not a teacher's
PASSAGE = 400  # characters of a text that stand together, or more


class Pair(NamedTuple):
    """Two texts that belong together, and what they are of: pairs of one document are hard to tell apart."""

    first: str
    second: str
    document: str


def pairs(path: Path, split: Split | None = None) -> Iterator[Pair]:
    """The pairs of a file or folder: of records with `question` and `context` these two, of others and of texts the
    title and the first passage, and passages that follow each other.

    split   of records, whose part "train" is taken
    raises  InputError
    """
    if not path.name.endswith(TABLES):
        for i, document in enumerate(texts(path)):
            yield from _passages("".join(text for text, _ in document), None, f"{path} {i}")
        return
    for i, record in enumerate(records(path)):
        if split is not None and split.part(path.name.partition(".")[0], record) != "train":
            continue
        question, context, text, title = (record.get(name) for name in ("question", "context", "text", "title"))
        if isinstance(question, str) and isinstance(context, str):
            yield Pair(question.strip(), context.strip(), str(record.get("document") or title or path))
        elif isinstance(text, str):
            yield from _passages(text, title, f"{path} {i}")
        else:
            raise InputError(
                f"reading '{path}', row {i + 1}: expected the texts 'question' and 'context', or 'text', found "
                f"{', '.join(record) or 'no field'}"
            )


def _passages(text: str, title: str | None, document: str) -> Iterator[Pair]:
    before = title
    passage = ""
    for paragraph in [*re.split(r"\n\s*\n", text), ""]:
        passage = f"{passage}\n\n{paragraph}".strip()
        if passage and (len(passage) >= PASSAGE or not paragraph):
            if before:
                yield Pair(before, passage, document)
            before, passage = passage, ""


class Sample(NamedTuple):
    """Pairs as numbers of texts, and the tokens of these; pairs of each document, those held out apart."""

    texts: list[str]
    ids: list[list[int]]
    train: list[list[tuple[int, int]]]
    held: list[list[tuple[int, int]]]

    @property
    def n_pairs(self) -> int:
        return sum(map(len, self.train))


def sample(found: Iterable[Pair], tokens: int, tokenizer: Tokenizer, seed: int = 0) -> Sample:
    """Pairs whose texts have about `tokens` tokens at most, a tenth of the documents held out.

    Raises UsageError where there are too few to train on.
    """
    numbers, ids = dict[str, int](), list[list[int]]()
    documents, size = dict[str, list[tuple[int, int]]](), 0
    for first, second, document in found:
        for text in (first, second):
            if text not in numbers:
                numbers[text] = len(numbers)
                ids.append(list(tokenizer.encode(text))[:LONGEST])
                size += len(ids[-1])
        if first != second and ids[numbers[first]] and ids[numbers[second]]:
            documents.setdefault(document, []).append((numbers[first], numbers[second]))
        if size >= tokens:
            break
    rows = list(documents.values())
    Random(seed).shuffle(rows)
    if len(rows) == 1:  # one book: its beginning is learnt from, its end held out
        cut = len(rows[0]) // 10
        rows = [rows[0][-cut:], rows[0][:-cut]]
    n_held = max(1, len(rows) // 10)
    made = Sample(list(numbers), ids, rows[n_held:], rows[:n_held])
    if made.n_pairs < BATCH:
        raise UsageError(
            f"training a vector head: expected {BATCH} pairs of texts or more, found {made.n_pairs}; pass records with "
            "question and context, or longer texts"
        )
    return made


class Features:
    """What a model says of the tokens of texts: the residual stream after some layers, as fp16 in a file."""

    def __init__(
        self, model: Model, layers: int, ids: Sequence[Sequence[int]], done: Callable[[int, int], None]
    ) -> None:
        """Compute it, each text read from the start; `done` is told how many tokens of how many."""
        part = model.first(layers)
        self._offsets = np.cumsum([0, *map(len, ids)])
        n_tokens, self.channels = int(self._offsets[-1]), part.config.n_embd
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it is gone with this object)
        self._all = np.memmap(self._file, np.float16, "w+", shape=(n_tokens, self.channels))
        _, start = part.start()
        begin = 0
        while begin < len(ids):
            end = begin + 1
            while end < len(ids) and self._offsets[end + 1] - self._offsets[begin] <= CALL_TOKENS:
                end += 1
            lengths = torch.tensor([len(z) for z in ids[begin:end]])
            tokens = torch.tensor([token for z in ids[begin:end] for token in z])
            zeros = torch.zeros(len(lengths), dtype=torch.int64)
            hidden, _ = part.forward_packed(tokens, lengths, start, zeros, zeros[:1])
            self._all[self._offsets[begin] : self._offsets[end]] = hidden.cpu().numpy()
            done(int(self._offsets[end]), n_tokens)
            begin = end

    def of(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of some texts, laid end to end, fp32 [n, C], and to which of them each token belongs, int64 [n]."""
        spans = [slice(*self._offsets[i : i + 2]) for i in numbers]
        lengths = torch.tensor([span.stop - span.start for span in spans])
        rows = np.concatenate([self._all[span] for span in spans]).astype(np.float32)
        return torch.from_numpy(rows), torch.repeat_interleave(torch.arange(len(lengths)), lengths)


class _Head(torch.nn.Module):
    """`model.heads.VectorHead` with gradients."""

    def __init__(self, dimension: int, channels: int) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.randn(dimension, channels) / math.sqrt(channels))
        self.gate = torch.nn.Parameter(torch.randn(GATES, channels) / channels)

    def forward(self, hidden: Tensor, texts: Tensor) -> Tensor:
        """Vectors of length 1 [texts, D]; as `Features.of` gives hidden and texts."""
        n, gates = int(texts[-1]) + 1, torch.sigmoid(hidden @ self.gate.T)
        values = (hidden @ self.value.T).view(len(hidden), GATES, -1) * gates[..., None]
        sums = hidden.new_zeros(n, *values.shape[1:]).index_add(0, texts, values)
        weights = hidden.new_zeros(n, GATES).index_add(0, texts, gates)
        return F.normalize((sums / (weights[..., None] + EPS)).flatten(1), dim=-1)


@dataclass(frozen=True, slots=True)
class Trained:
    """A head, and the mean of 1 / rank of a held pair's second text among those of its document, of n pairs.

    before  by the mean of the same hidden states; after: by the head
    """

    head: VectorHead
    before: float
    after: float
    n: int


def trained(
    model: Model,
    given: Sample,
    *,
    epochs: float,
    seed: int = 0,
    layers: int | None = None,
    teacher: Tensor | None = None,
    read: Callable[[int, int], None] = lambda done, of: None,
    step: Callable[[int, int], None] = lambda done, of: None,
) -> Trained:
    """A head that reads pairs so often as `epochs` says; measured on the held ones.

    layers   after which it reads the residual stream (default: half of them)
    teacher  vectors of length 1 [texts, any]: similarities within a batch follow theirs, too
    read     is told how many tokens of how many the model has read; step: how many steps of how many are done
    """
    layers = max(1, model.config.n_layer // 2) if layers is None else layers
    features = Features(model, layers, given.ids, read)
    torch.manual_seed(seed)
    random, head = Random(seed), _Head(min(features.channels, LARGEST), features.channels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    steps = max(1, round(epochs * given.n_pairs / BATCH))
    batches = _batches(given.train, random)
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (done + 1) / WARMUP) * (1 - done / steps)
        optimizer.zero_grad()
        torch.autograd.backward(_loss(head, features, next(batches), teacher))
        optimizer.step()
        step(done + 1, steps)
    with torch.no_grad():
        before, n = mean_reciprocal_rank(lambda numbers: _means(*features.of(numbers)), given.held)
        after, _ = mean_reciprocal_rank(lambda numbers: head(*features.of(numbers)), given.held)
    return Trained(VectorHead(model.fingerprint, layers, head.value.detach(), head.gate.detach()), before, after, n)


def _loss(head: _Head, features: Features, batch: Sequence[tuple[int, int]], teacher: Tensor | None) -> Tensor:
    """Of one batch: which second text belongs to each first one; how similarities differ from a teacher's."""
    firsts, seconds = [first for first, _ in batch], sorted({second for _, second in batch})
    own = torch.tensor([seconds.index(second) for _, second in batch])
    a, b = head(*features.of(firsts)), head(*features.of(seconds))
    scores = SHARPNESS * a @ b.T
    loss = F.cross_entropy(scores, own)
    if teacher is not None:
        ta, tb = teacher[firsts], teacher[seconds]
        wanted = torch.softmax(SHARPNESS * ta @ tb.T, dim=-1)
        loss = loss + F.kl_div(torch.log_softmax(scores, dim=-1), wanted, reduction="batchmean")
        loss = loss + ALIKE * (F.mse_loss(a @ a.T, ta @ ta.T) + F.mse_loss(b @ b.T, tb @ tb.T))
    return loss


def _means(hidden: Tensor, texts: Tensor) -> Tensor:
    """The mean of each text's hidden states, at length 1."""
    return F.normalize(hidden.new_zeros(int(texts[-1]) + 1, hidden.shape[1]).index_add(0, texts, hidden), dim=-1)


def _batches(documents: Sequence[Sequence[tuple[int, int]]], random: Random) -> Iterator[list[tuple[int, int]]]:
    """Batches without end, epoch after epoch: pairs of a document stand together, up to TOGETHER of them."""
    batch: list[tuple[int, int]] = []
    while True:
        groups = []
        for pairs_of in documents:
            order = random.sample(pairs_of, len(pairs_of))
            groups += [order[i : i + TOGETHER] for i in range(0, len(order), TOGETHER)]
        random.shuffle(groups)
        for group in groups:
            batch += group
            if len(batch) >= BATCH:
                yield batch[:BATCH]
                batch = batch[BATCH:]


def reciprocal_ranks(scores: Tensor, right: Sequence[int]) -> Tensor:
    """1 / rank of the right one of each row of scores [m, n]; among equal scores it is taken to stand in the middle."""
    own = scores.gather(1, torch.tensor(right)[:, None])
    return 1 / (1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2)


def mean_reciprocal_rank(
    vectors: Callable[[Sequence[int]], Tensor], documents: Sequence[Sequence[tuple[int, int]]]
) -> tuple[float, int]:
    """The mean of 1 / rank of each first text's second among all seconds of its document, and of how many."""
    ranks = list[float]()
    for pairs_of in documents:
        seconds = sorted({second for _, second in pairs_of})
        if len(seconds) < 2:
            continue
        scores = vectors([first for first, _ in pairs_of]) @ vectors(seconds).T
        ranks += reciprocal_ranks(scores, [seconds.index(second) for _, second in pairs_of]).tolist()
    return sum(ranks) / max(1, len(ranks)), len(ranks)
