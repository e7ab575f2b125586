"""How fast `embed` is as a share of plain reading, and how well its vectors find texts, with the shipped model.

    python benchmarks/embed.py [--out benchmarks/results/embed.json]

Speed: documents of 20, 300 and 20,000 tokens cut from the sample story, embedded by the default options, against
calls of `Model.forward` of 1,024 tokens in the same process, in turns, so that what else the machine does meets both;
medians. Beside it, where sentence-transformers is installed, a MiniLM of random weights whose layers multiply as much
per token as the shipped model's (6 layers of width 192, feed-forward 960; at most 512 tokens), with the same tokenizer.

Usefulness: of the 48 documents of samples/documents.jsonl, how often a title's nearest document is its own, and
a paraphrase's, and a document's nearest paraphrase; the mean of 1 / rank; beside TF-IDF. Chance is 1 / 48. Whitening is
fitted on the sentences of the sample story, or on the documents themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rwkv_stream as rs
from rwkv_stream.model import Model
from rwkv_stream.tables.columns import embedding
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.tables.whitening import Whitening

SAMPLES = Path(__file__).parents[1] / "samples"
STORY = (SAMPLES / "story.txt").read_text(encoding="utf8")
LENGTHS = {"short": 20, "middle": 300, "long": 20_000}
UNITS = {"document": ("document",), "sentence and document": ("sentence", "document")}
CALL_TOKENS = 1024


@dataclass(frozen=True)
class Text:
    name: str
    string: str

    def text(self) -> nullcontext[list[bytes]]:
        return nullcontext([self.string.encode()])


# ---- speed ----


def cut(model: Model, n_tokens: int, total: int) -> list[str]:
    """Texts of `n_tokens` tokens, `total` together, from anywhere in the story."""
    ids = model.tokenizer.encode(STORY) * 3
    starts = np.random.default_rng(0).integers(0, len(ids) - n_tokens, max(1, total // n_tokens))
    return [model.tokenizer.decode(ids[i : i + n_tokens]).decode("utf-8", "replace") for i in starts]


def plain(model: Model, total: int) -> float:
    """Tokens per second of reading one text."""
    ids = torch.tensor(model.tokenizer.encode(STORY)[:CALL_TOKENS])[None]
    _, state = model.start()
    n_calls = max(1, total // CALL_TOKENS)
    began = time.perf_counter()
    for _ in range(n_calls):
        _, state = model.forward(ids, state, logits="none")
    return n_calls * CALL_TOKENS / (time.perf_counter() - began)


def embedded(model: Model, texts: Sequence[str], units: Sequence[str]) -> tuple[float, float]:
    """Tokens and rows per second."""
    began = time.perf_counter()
    made = rows([Text(f"{i}", text) for i, text in enumerate(texts)], model=model, units=units)
    for _ in made:
        pass
    seconds = time.perf_counter() - began
    return made.tokens / seconds, made.rows / seconds


def mini_lm(model: Model) -> Callable[[Sequence[str]], Any] | None:
    """A function that embeds texts through sentence-transformers; None where it is not installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    file = Path(model.path).with_name("tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="<|end|>", model_max_length=512)
    config = BertConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=960,
        max_position_embeddings=512,
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        layers = modules.Transformer(folder, max_seq_length=512)
    parts = [layers, modules.Pooling(192, "mean"), modules.Normalize()]
    made = SentenceTransformer(modules=parts, device="cpu")
    return lambda texts: made.encode(list(texts), batch_size=32, show_progress_bar=False)


def speed(model: Model, rounds: int, total: int) -> dict[str, dict[str, float]]:
    other = mini_lm(model)
    results = {}
    for name, n_tokens in LENGTHS.items():
        texts = cut(model, n_tokens, total)
        for title, units in UNITS.items():
            measured = []
            for _ in range(rounds):
                reading = plain(model, total)
                tokens, made = embedded(model, texts, units)
                measured.append({"plain_tok_s": reading, "tok_s": tokens, "rows_s": made, "share": tokens / reading})
            case = {key: statistics.median(m[key] for m in measured) for key in measured[0]}
            case["share_lowest"], case["share_highest"] = (
                min(m["share"] for m in measured),
                max(m["share"] for m in measured),
            )
            if other is not None and units == ("document",) and n_tokens <= 512:
                began = time.perf_counter()
                other(texts)
                case["minilm_tok_s"] = len(texts) * n_tokens / (time.perf_counter() - began)
            results[f"{name} ({n_tokens} tokens), {title}"] = case
            figures = "  ".join(f"{key} {value:,.2f}" for key, value in case.items())
            print(f"{name:7} {title:22} {figures}", flush=True)
    return results


# ---- engines ----


def engines(model: Model, rounds: int, total: int, workers: int = 2) -> dict[str, dict[str, float]]:
    """Tokens per second of one job by the local engine and by Ray, on a cluster that is there before, or
    with its start; actors load the model in either. {} without Ray. The rows are compared."""
    if importlib.util.find_spec("ray") is None:
        return {}
    import pyarrow.parquet as pq
    import ray

    from rwkv_stream.tables import ray_engine
    from rwkv_stream.tables.embed_jobs import embed_job

    measured: dict[str, list[float]] = {"local": [], "ray": [], "ray with start": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        lines = [json.dumps({"text": text}) for text in cut(model, LENGTHS["middle"], total)]
        source.write_text("\n".join(lines), encoding="utf8")
        size = max(1, len(lines) // (8 * workers))
        for turn in range(rounds):
            jobs = {
                name: embed_job(Path(folder, f"{name} {turn}"), [str(source)], model=model, part_rows=size)
                for name in measured
            }
            began = time.perf_counter()
            tokens = jobs["local"].run().tokens
            measured["local"].append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            ray_engine.run(jobs["ray with start"], workers=workers)
            measured["ray with start"].append(tokens / (time.perf_counter() - began))
            ray.init(num_cpus=workers, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
            began = time.perf_counter()
            ray_engine.run(jobs["ray"], workers=workers)
            measured["ray"].append(tokens / (time.perf_counter() - began))
            ray.shutdown()
            for part in jobs["local"].parts:
                tables = [pq.read_table(each.folder / f"{part.name}.parquet") for each in jobs.values()]
                assert all(table.equals(tables[0]) for table in tables)
    results = {name: {"tok_s": statistics.median(rates)} for name, rates in measured.items()}
    for name, case in results.items():
        print(f"{name:20} tok_s {case['tok_s']:,.0f}", flush=True)
    return {
        f"engine {name}, {workers} workers" if name != "local" else "engine local": c for name, c in results.items()
    }


# ---- usefulness ----


def tf_idf(texts: Iterable[str], corpus: Sequence[str]) -> np.ndarray:
    """Vectors of texts over the words of a corpus; smoothed as scikit-learn does by default."""
    words = [re.findall(r"\w+", text.lower()) for text in corpus]
    frequency = Counter(word for document in words for word in set(document))
    weight = {word: math.log((1 + len(words)) / (1 + n)) + 1 for word, n in frequency.items()}
    column = {word: i for i, word in enumerate(weight)}
    vectors = []
    for text in texts:
        vector = np.zeros(len(column))
        for word in re.findall(r"\w+", text.lower()):
            if word in column:
                vector[column[word]] += weight[word]
        vectors.append(vector / max(np.linalg.norm(vector), 1e-12))
    return np.array(vectors)


def found(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    """How often the nearest candidate is the query's own, which stands in the same row; the mean of 1 / rank."""
    likeness = queries @ candidates.T
    ranks = 1 + (likeness > np.diag(likeness)[:, None]).sum(1)
    return {"first": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}


def usefulness(model: Model) -> dict[str, dict[str, float]]:
    documents = [json.loads(line) for line in (SAMPLES / "documents.jsonl").read_text(encoding="utf8").splitlines()]
    parts = {part: [document[part] for document in documents] for part in ("title", "text", "paraphrase")}
    sentences = rows([Text("story", STORY)], model=model, units=["sentence"])

    def whitening(vectors: Iterable[np.ndarray]) -> Whitening:
        return Whitening.fit(vectors, model=model.fingerprint, pooling="mean")

    by_story = whitening(embedding(batch) for batch in sentences)
    by_texts = whitening([rs.embed(parts["text"], model=model)])
    ways: dict[str, Callable[[list[str]], np.ndarray]] = {
        "mean": lambda texts: rs.embed(texts, model=model),
        "last": lambda texts: rs.embed(texts, model=model, pooling="last"),
        "mean, whitened by the story": lambda texts: rs.embed(texts, model=model, whitening=by_story),
        "mean, whitened by the documents": lambda texts: rs.embed(texts, model=model, whitening=by_texts),
        "TF-IDF": lambda texts: tf_idf(texts, parts["text"]),
    }
    results = {}
    for name, way in ways.items():
        made = {part: way(texts) for part, texts in parts.items()}
        for query, candidate in (("title", "text"), ("paraphrase", "text"), ("text", "paraphrase")):
            figures = found(made[query], made[candidate])
            results[f"{name}: {query} to {candidate}"] = figures
            print(f"{name:32} {query:10} → {candidate:10}  first {figures['first']:.2f}  mrr {figures['mrr']:.2f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40_960, help="per measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["ray"], help="this case alone: the local engine against Ray")
    options = parser.parse_args()
    model = rs.load(threads=options.threads)
    if options.only == "ray":
        figures = {"ray": engines(model, options.rounds, options.tokens)}
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")
        return
    results: dict[str, object] = {
        "usefulness": usefulness(model),
        "speed": speed(model, options.rounds, options.tokens),
        "engines": engines(model, options.rounds, options.tokens),
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "numerics": model.numerics(CALL_TOKENS),
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
