"""The figures of the model card: compression, recall, answers, retrieval, sampled text, what is written by heart.

    python benchmarks/model_card.py CORPUS [--model MODEL] [--measure recall,retrieval] [--json]

CORPUS is the folder of the training data, with `valid-books` and `valid-qa-fairytale` to measure on.

compression  bits per byte of the validation books, each read from the start state to its end, beside xz and zstd
recall       scores of tasks on what was read, with what guessing scores: means over seeds of the data
answers      F1, exact match, and the share of answers that stand in the passage, the question after the passage, before
             it, and both: on tales that were not trained on, and on the articles that `recipes/split.toml` reports on
retrieval    mean of 1 / rank of a question's section among those of its tale: by the model's vectors, by BM25, by both
             together (BM25 and WEIGHT cosines), and by a sentence encoder in the Hugging Face layout (--encoder)
sampling     of text sampled from the start state: known words, repetitions
memorized    the share of windows of 50 greedy tokens, of 10,000, that stand in the training data
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zstandard

import rwkv_stream as rs
from rwkv_stream.answers.prompts import family
from rwkv_stream.evaluation import answering, memorized, recall, retrieval
from rwkv_stream.evaluation.answering import Asked
from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.evaluation.retrieval import Searched
from rwkv_stream.evaluation.tasks import TASKS, Maker
from rwkv_stream.model import Model, load
from rwkv_stream.model.sampling import Sampler, Sampling
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.training import split
from rwkv_stream.training.data import records

CHUNK = 1024
SAMPLED_TOKENS = 2000
NGRAM = 20
RECALLED = {  # tokens of each task
    "copy": (128, 256, 1024, 4096),
    "look_up": (128, 256, 1024),
    "facts": (128, 512),
    "passkey": (4096, 16_384),
}
DEPTHS = (0, 25, 50, 75, 100)
CONTEXT_QUERIES = 5  # about so many questions are asked on a context, or contexts are made for the depths
WEIGHT = 2.0  # of cosines beside BM25
PROMPT_BOOKS = 40
WRITTEN_ROWS, WRITTEN_TOKENS = 50, 200
MEASURES = ("compression", "recall", "answers", "retrieval", "sampling", "memorized")
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


def recalled(model: Model, text: str, n: int, seeds: int) -> dict[str, Any]:
    """Name of a task → mean and spread of its score over seeds, and what guessing scores."""
    maker = Maker(model.tokenizer, family(model), Haystack.of("a validation book", [text.encode()], model.tokenizer))
    trunk, found = recall.Trunk(model, maker.haystack), {}
    for name, lengths in RECALLED.items():
        for length in lengths:
            scores, floors = [], []
            for seed in range(seeds):
                contexts = TASKS[name].contexts(maker, length, max(1, n // CONTEXT_QUERIES), DEPTHS, seed)
                trials = list(recall.trials(model, maker, contexts, trunk))
                scores.append([trial.score for trial in trials])
                floors += [trial.query.floor for trial in trials]
            means = [float(np.mean(some)) for some in scores]
            key = f"{name}, {length} tokens"
            found[key] = {
                "n": len(floors),
                "score": round(float(np.mean(means)), 4),
                "spread": round(float(np.std(means)), 4),
                "floor": round(float(np.mean(floors)), 6),
            }
            print(f"{key}: {found[key]}", file=sys.stderr)
    return found


def asked_of(corpus: Path) -> dict[str, list[Asked]]:
    """Questions that are reported on: of the validation tales, and of articles."""
    chosen = split.read(Path(__file__).parents[1] / "recipes" / "split.toml")
    squad = (r for r in records(corpus / "qa-squad.jsonl.zst") if chosen.part("qa-squad", r) == "report")
    tales = records(corpus / "valid-qa-fairytale.jsonl.zst")
    return {
        "tales": [Asked.of(record) for record in tales],
        "articles": [one for one in map(Asked.of, squad) if one.answers],
    }


def answered(model: Model, corpus: Path, n: int) -> dict[str, Any]:
    """Of n questions of each kind, drawn once: how they are answered by where they stand."""
    found: dict[str, Any] = {}
    for name, asked in asked_of(corpus).items():
        chosen = Random(name).sample(asked, min(n, len(asked)))
        for order in answering.ORDERS:
            judged = answering.judged(chosen, answering.answers(model, chosen, order))
            found[f"{name}, question {order}"] = {
                "n": judged.n,
                **{key: round(getattr(judged, key), 4) for key in ("f1", "exact", "quoted")},
            }
            print(f"{name}, {order}: {judged}", file=sys.stderr)
    return found


def mean_rank(documents: Sequence[Searched], scores: Sequence[retrieval.Scores]) -> float:
    pairs = zip(documents, scores, strict=True)
    return round(float(np.concatenate([retrieval.reciprocal_ranks(s, one.right) for one, s in pairs]).mean()), 4)


def vector_scores(documents: Sequence[Searched], embed: Callable[[list[str]], np.ndarray]) -> list[retrieval.Scores]:
    """Cosines, all texts embedded in one go."""
    texts = embed([text for one in documents for text in (*one.texts, *one.questions)])
    scores, at = [], 0
    for one in documents:
        n, m = len(one.texts), len(one.questions)
        scores.append(retrieval.cosines(one, texts[at : at + n], texts[at + n : at + n + m]))
        at += n + m
    return scores


def encoder(folder: Path) -> Callable[[list[str]], np.ndarray]:
    """A sentence encoder of mean pooled hidden states, of the first 256 tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embed(texts: list[str]) -> np.ndarray:
        found, order = (
            np.zeros((len(texts), network.config.hidden_size)),
            sorted(range(len(texts)), key=texts.__getitem__),
        )
        order = sorted(order, key=lambda i: len(texts[i]))
        for begin in range(0, len(order), 32):
            some = order[begin : begin + 32]
            given = tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden, mask = network(**given).last_hidden_state, given["attention_mask"][..., None]
            found[some] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return found

    return embed


def retrieved(model: Model, corpus: Path, folder: Path | None) -> dict[str, float]:
    documents = retrieval.searched(records(corpus / "valid-qa-fairytale.jsonl.zst"))
    words = [retrieval.bm25(one) for one in documents]
    own = vector_scores(documents, lambda texts: rs.embed(texts, model=model))
    mean = vector_scores(documents, lambda texts: rs.embed(texts, model=model, pooling="mean"))
    noise = [np.random.default_rng(0).normal(size=scores.shape) * np.std(own[0]) for scores in own]
    found = {
        "pooling": rows([], model=model).metadata["pooling"],
        "questions": sum(len(one.questions) for one in documents),
        "vectors": mean_rank(documents, own),
        "mean of hidden states": mean_rank(documents, mean),
        "BM25": mean_rank(documents, words),
        "BM25 and vectors": mean_rank(documents, [w + WEIGHT * v for w, v in zip(words, own, strict=True)]),
        "BM25 and noise": mean_rank(documents, [w + WEIGHT * v for w, v in zip(words, noise, strict=True)]),
    }
    if folder is not None:
        other = vector_scores(documents, encoder(folder))
        found["encoder"] = mean_rank(documents, other)
        found["BM25 and encoder"] = mean_rank(documents, [w + WEIGHT * v for w, v in zip(words, other, strict=True)])
    return found


def by_heart(model: Model, corpus: Path, rows: int, tokens: int) -> dict[str, float]:
    """Greedy text after prompts from the training books, looked for in all training data."""
    books = [model.tokenizer.encode(text) for text in islice(training_texts(corpus, "books-*"), PROMPT_BOOKS)]
    written = memorized.continued(model, memorized.prompts(books, rows, 0), tokens)
    known = (model.tokenizer.encode(text) for text in training_texts(corpus, "*"))
    return {
        "tokens": sum(map(len, written)),
        "windows_that_stand_in_training": round(memorized.share(written, known), 5),
    }


def training_texts(corpus: Path, pattern: str) -> Iterable[str]:
    for path in sorted(corpus.glob(f"{pattern}.jsonl.zst")):
        if not path.name.startswith("valid-"):
            for record in records(path):
                yield record.get("text") or record.get("context") or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", help="a checkpoint; the shipped model without it")
    parser.add_argument("--measure", default=",".join(MEASURES), help="some of these, with commas between them")
    parser.add_argument(
        "--items", type=int, default=500, help="of each task of recall, about, and questions of each kind"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the data of recall")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder to compare vectors with")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    model, corpus = load(given.model), given.corpus
    books = [record["text"] for record in records(corpus / "valid-books.jsonl.zst")]
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "compression": lambda: compression(model, books),
        "recall": lambda: recalled(model, books[0], given.items, given.seeds),
        "answers": lambda: answered(model, corpus, given.items),
        "retrieval": lambda: retrieved(model, corpus, given.encoder),
        "sampling": lambda: sampling_checks(model, sorted(corpus.glob("books-*.jsonl.zst")), 0),
        "memorized": lambda: by_heart(model, corpus, WRITTEN_ROWS, WRITTEN_TOKENS),
    }
    figures = {"fingerprint": model.fingerprint, **{name: measures[name]() for name in given.measure.split(",")}}
    if given.json:
        print(json.dumps(figures))
        return
    print(f"fingerprint {model.fingerprint}")
    for name in given.measure.split(","):
        print(f"\n{name}")
        for key, value in figures[name].items():
            shown = "  ".join(f"{a} {b}" for a, b in value.items()) if isinstance(value, dict) else value
            print(f"  {key.replace('_', ' '):34}{shown}")


if __name__ == "__main__":
    main()
