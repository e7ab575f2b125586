"""The network of `answers.spans` is trained here: on questions, passages that were found for them, and right spans.

The loss is what all right beginnings, and all right ends, lack of the whole probability among the words of all passages
of a question (Clark & Gardner 2018, arXiv 1710.10723: shared normalisation, and a marginal over all occurrences).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rwkv_stream.files import publish

RATE, WEIGHT_DECAY = 2e-3, 0.01
WARMUP = 0.05  # of the steps
VECTORS_RATE = 0.2  # of that of the rest: word vectors are good from the start
BATCH = 16  # questions
DROPOUT = 0.25  # of channels, alike for all words of a passage
CHANNELS = 64
ALIKE = 30  # words by which passages of a batch may differ in length at random


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A question, passages, and where in them the answer stands.

    question   int [q], kind: as `SpanHead.ends` takes them
    features   of each passage fp32 [n, F]; vectors: int [n]
    right      of each passage its right spans, first and last word; one passage has some at least
    """

    question: NDArray[np.int64]
    kind: int
    features: Sequence[NDArray[np.float32]]
    vectors: Sequence[NDArray[np.int64]]
    right: Sequence[Sequence[tuple[int, int]]]

    @property
    def longest(self) -> int:
        """Words of its longest passage."""
        return max(map(len, self.vectors))


class Network(nn.Module):
    """`answers.spans.SpanHead` with gradients: names and shapes of its parameters are those of that one's weights."""

    def __init__(
        self, vectors: Tensor, n_features: int, n_kinds: int, dilations: Sequence[int], channels: int = CHANNELS
    ) -> None:
        """`vectors` fp32 [V + 1, E], the last row that of unknown words."""
        super().__init__()
        C, E = channels, vectors.shape[1]
        self.vectors = nn.Parameter(vectors.clone())
        self.question = nn.ModuleDict(
            {
                "in": nn.Linear(E, C),
                "near": nn.Conv1d(C, C, 3, padding=1),
                "weigh": nn.Linear(C, 1),
                "look": nn.Linear(C, C),
                "ends": nn.Linear(C, 2 * C),
            }
        )
        self.kinds = nn.Parameter(torch.randn(n_kinds, C) / math.sqrt(C))
        self.passage = nn.ModuleDict(
            {"in": nn.Linear(E, C), "features": nn.Linear(n_features, C), "look": nn.Linear(C, C)}
        )
        self.mix = nn.Linear(4 * C + 1, C)
        self.convolutions = nn.ModuleList(nn.Conv1d(C, C, 5, padding=2 * d, dilation=d) for d in dilations)
        self.ends = nn.Linear(C, 2)

    def forward(self, batch: _Batch) -> Tensor:
        """Logits [passages, words, 2]; those beyond a passage's end are -inf."""
        scale = self.ends.in_features**-0.5
        asked = self.question["in"](self._dropped(self.vectors[batch.question] * 3)) * batch.is_asked[..., None]
        asked = torch.relu(asked + _over_words(self.question["near"], asked)) + self.kinds[batch.kind][:, None]
        weights = self.question["weigh"](asked)[..., 0].masked_fill(~batch.is_asked, -math.inf).softmax(1)
        summary = (weights[..., None] * asked).sum(1)
        own = batch.own
        word = self.passage["in"](self._dropped(self.vectors[batch.vectors] * 3))
        z = torch.relu(word + self.passage["features"](self._dropped(batch.features)))
        likeness = torch.einsum("pnc,pqc->pnq", self.passage["look"](z), self.question["look"](asked)[own]) * scale
        likeness = likeness.masked_fill(~batch.is_asked[own][:, None], -math.inf)
        seen, best = likeness.softmax(-1) @ asked[own], likeness.amax(-1, keepdim=True)
        mixed = torch.cat([z, seen, z * seen, z * summary[own][:, None], best], dim=-1)
        there = batch.is_word[..., None]
        y = torch.relu(self.mix(self._dropped(mixed))) * there
        for convolution in self.convolutions:
            y = y + torch.relu(_over_words(convolution, self._dropped(y))) * there
        pointers = self.question["ends"](summary).view(len(summary), 2, -1)[own]
        logits: Tensor = self.ends(y) + torch.einsum("pnc,pec->pne", y, pointers) * scale
        return logits.float().masked_fill(~there, -math.inf)

    def _dropped(self, x: Tensor) -> Tensor:
        """Some channels of each passage [passages, words, C] are left out, while it trains."""
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, x.shape[2]) >= DROPOUT
        return x * kept / (1 - DROPOUT)


def _over_words(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution over the words of [passages, words, C]."""
    result: Tensor = convolution(x.transpose(1, 2)).transpose(1, 2)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Questions [Q, q] and all their passages [P, n], filled up with unknown words; own [P]: whose each passage is."""

    question: Tensor
    kind: Tensor
    is_asked: Tensor
    features: Tensor
    vectors: Tensor
    is_word: Tensor
    own: Tensor


def _batch(examples: Sequence[Example], unknown: int) -> _Batch:
    passages = [(i, j) for i, example in enumerate(examples) for j in range(len(example.vectors))]
    n, P = max(example.longest for example in examples), len(passages)
    features = np.zeros((P, n, examples[0].features[0].shape[1]), np.float32)
    vectors = np.full((P, n), unknown)
    for row, (i, j) in enumerate(passages):
        length = len(examples[i].vectors[j])
        features[row, :length], vectors[row, :length] = examples[i].features[j], examples[i].vectors[j]
    lengths = torch.tensor([len(examples[i].vectors[j]) for i, j in passages])
    asked = torch.tensor([len(example.question) for example in examples])
    question = np.full((len(examples), int(asked.max())), unknown)
    for row, example in enumerate(examples):
        question[row, : len(example.question)] = example.question
    return _Batch(
        torch.from_numpy(question),
        torch.tensor([example.kind for example in examples]),
        torch.arange(question.shape[1]) < asked[:, None],
        torch.from_numpy(features),
        torch.from_numpy(vectors),
        torch.arange(n) < lengths[:, None],
        torch.tensor([i for i, _ in passages]),
    )


def loss(network: Network, examples: Sequence[Example]) -> Tensor:
    """The mean over questions, in nats, of beginnings and ends together."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(_batch(examples, len(network.vectors) - 1))
    total, row = logits.new_zeros(()), 0
    for example in examples:
        own = logits[row : row + len(example.vectors)]
        row += len(example.vectors)
        for end in (0, 1):
            every = own[..., end].flatten()
            right = sorted({p * own.shape[1] + s[end] for p, spans in enumerate(example.right) for s in spans})
            total = total + torch.logsumexp(every, 0) - torch.logsumexp(every[right], 0)
    mean: Tensor = total / len(examples)
    return mean


def train(
    network: Network,
    examples: Sequence[Example],
    *,
    epochs: int,
    seed: int = 0,
    step: Callable[[int, int, float], None] = lambda done, of, loss: None,
) -> None:
    """Train a network on each example so often as `epochs` says; the rate falls to zero.

    step  is told how many steps of how many are done, and the loss of the last
    """
    torch.manual_seed(seed)
    rest = [z for name, z in network.named_parameters() if name != "vectors"]
    groups = [
        {"params": [network.vectors], "lr": 0.0, "weight_decay": 0.0, "share": VECTORS_RATE},
        {"params": rest, "lr": 0.0, "weight_decay": WEIGHT_DECAY, "share": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    random, done, steps = Random(seed), 0, epochs * math.ceil(len(examples) / BATCH)
    network.train()
    for _ in range(epochs):
        for batch in _batches(examples, random):
            for group in optimizer.param_groups:
                group["lr"] = RATE * group["share"] * min(1, (done + 1) / (WARMUP * steps)) * (1 - done / steps)
            optimizer.zero_grad()
            found = loss(network, batch)
            torch.autograd.backward(found)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            done += 1
            step(done, steps, found.item())
    network.eval()


def _batches(examples: Sequence[Example], random: Random) -> Iterator[list[Example]]:
    """All of them once, those of like length together: less is filled up."""
    order = sorted(examples, key=lambda example: example.longest + ALIKE * random.random())
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    random.shuffle(batches)
    return iter(batches)


def right_spans(spelt: Sequence[str], answers: Sequence[str], allowed: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last word of every occurrence of an answer among words, of those that begin where it is allowed.

    Case and marks do not count.
    """
    letters = [(part, i) for i, word in enumerate(spelt) for part in _parts(word)]
    found = set()
    for sought in filter(None, map(_parts, answers)):
        for at in range(len(letters) - len(sought) + 1):
            stretch = letters[at : at + len(sought)]
            if [part for part, _ in stretch] == sought and allowed[stretch[0][1]]:
                found.add((stretch[0][1], stretch[-1][1]))
    return sorted(found)


def _parts(text: str) -> list[str]:
    return "".join(z if z.isalnum() else " " for z in text.lower()).split()


def weights(network: Network) -> dict[str, NDArray[np.float32]]:
    """Its weights by the names of `answers.spans.SpanHead`."""
    named = {name: z.detach().float().numpy() for name, z in network.named_parameters()}
    return {"question.kinds" if name == "kinds" else name: z for name, z in named.items()}


def save(
    path: Path, vocabulary: Sequence[str], network: Network, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Publish a network as a file for `answers.spans.read`: word vectors of 8 bits with a scale each, the rest fp16.

    about  texts for the file's metadata
    """
    tensors = {name: z.astype(np.float16) for name, z in weights(network).items()}
    vectors = weights(network)["vectors"]
    scale = np.maximum(np.abs(vectors).max(axis=1), 1e-6) / 127
    tensors["vectors"] = np.round(vectors / scale[:, None]).astype(np.int8)
    tensors["vectors.scale"] = scale.astype(np.float16)
    tensors["words"] = np.frombuffer("\n".join(vocabulary).encode(), np.uint8)
    publish(path, safetensors.numpy.save(tensors, dict(about)))
