"""The figures of the model card: compression of the validation books, and what freely sampled text looks like.

    python benchmarks/model_card.py CORPUS [--model MODEL] [--json]

CORPUS is the folder of `books-*.jsonl.zst` (training) and `valid-books.jsonl.zst` (validation).
Every book is read from the model's start state to its end, the state carried all the way.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import zstandard

from rwkv_stream.model import Model, load
from rwkv_stream.model.sampling import Sampler, Sampling
from rwkv_stream.training.data import records

CHUNK = 1024
SAMPLED_TOKENS = 2000
NGRAM = 20
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def bits(model: Model, ids: list[int]) -> float:
    """Bits that the model needs for the tokens, from its start state."""
    last, state = model.start()
    total = 0.0
    for begin in range(0, len(ids), CHUNK):
        chunk = torch.tensor([ids[begin : begin + CHUNK]])
        hidden, state = model.forward(chunk, state, logits="none")
        before = torch.cat([last[None], hidden[0, :-1]])  # the hidden state that predicts each token
        total += F.cross_entropy(model.head(before), chunk[0], reduction="sum").item()
        last = hidden[0, -1]
    return total / math.log(2)


def compression(model: Model, books: list[str]) -> dict[str, float]:
    """Bits per byte of the books: the model's, and those of xz -9e and zstd -19 over all of them together."""
    text = "".join(books).encode()
    tokens = [model.tokenizer.encode(book) for book in books]
    return {
        "bytes": len(text),
        "tokens": sum(map(len, tokens)),
        "model_bits_per_byte": round(sum(bits(model, ids) for ids in tokens) / len(text), 4),
        "xz_9e_bits_per_byte": round(8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text), 4),
        "zstd_19_bits_per_byte": round(8 * len(zstandard.compress(text, 19)) / len(text), 4),
    }


def sample(model: Model, count: int, seed: int) -> list[int]:
    """`count` tokens from the start state with the default sampling."""
    sampler = Sampler(Sampling(seed=seed), 0, model.config.vocab_size)
    last, state = model.start()
    ids: list[int] = []
    while len(ids) < count:
        ids.append(sampler(model.head(last).numpy()))
        hidden, state = model.forward(torch.tensor([ids[-1:]]), state, logits="none")
        last = hidden[0, -1]
    return ids


def sampling_checks(model: Model, training_books: list[Path], seed: int) -> dict[str, float]:
    """Share of sampled words that occur in the training books; how often the commonest 20-gram of tokens occurs."""
    known: set[str] = set()
    for path in training_books:
        for record in records(path):
            known.update(WORD.findall(record["text"].lower()))
    ids = sample(model, SAMPLED_TOKENS, seed)
    words = WORD.findall(model.tokenizer.decode(ids).decode(errors="replace").lower())
    ngrams = Counter(tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1))
    return {
        "sampled_tokens": len(ids),
        "sampled_words": len(words),
        "words_in_training_books": round(float(np.mean([word in known for word in words])), 4),
        "most_repeats_of_a_20_gram": max(ngrams.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the figures of the model card.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", help="a checkpoint; the shipped model without it")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    model = load(given.model)
    books = [record["text"] for record in records(given.corpus / "valid-books.jsonl.zst")]
    figures = {
        "fingerprint": model.fingerprint,
        **compression(model, books),
        **sampling_checks(model, sorted(given.corpus.glob("books-*.jsonl.zst")), given.seed),
    }
    if given.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' '):32}{value}")


if __name__ == "__main__":
    main()
