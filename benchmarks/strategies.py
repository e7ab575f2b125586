"""How often each way of answering is right about long texts, and what it costs: tokens and CPU time.

    python benchmarks/strategies.py --model MODEL                  # 10 texts of 16,384 tokens, 20 questions each
    python benchmarks/strategies.py --model MODEL --kind facts     # told in a sentence each, asked in other words
    python benchmarks/strategies.py --model MODEL --tokens 4096 --texts 5 --json

A text is a haystack with blocks of four entries in it, far apart; each question asks for one entry of one block, so
that who has just read the block needs to look up one of four. Words, names and values are made up from a seed, of parts
of words that `training/exercises.py` holds out. An answer is right that begins with the value: a half-trained model
finds it and does not stop.

passage is the oracle: the block alone is read before the question. guess takes any value of the text that is of the
right kind, at random. What is read before a question comes, the text and the states of its chunks, is counted apart.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.training.exercises import HELD_OUT_FACTS, Exercises

if TYPE_CHECKING:
    from rwkv_stream.model import Model

STRATEGIES = ("state", "quote", "reread", "nearest", "cells", "map-reduce", "vote", "auto", "passage")
ENTRIES = 4
KINDS = ("look_ups", "facts")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, what is right, the block that tells it, and how often a guess among values of its kind is right."""

    question: str
    right: str
    passage: str
    guess: float


@dataclass(frozen=True, slots=True)
class Result:
    """Of one strategy: share right with its 95 % half-width, answers given, tokens and CPU ms of a question."""

    strategy: str
    n: int
    right: float
    half_width: float
    answered: float
    right_of_answered: float
    read: float
    made: float
    cpu_ms: float


def block(made: Exercises, kind: str) -> tuple[str, list[tuple[str, str]]]:
    """A text of four entries, and (question, right answer) of each."""
    if kind == "look_ups":
        keys, values = made.names(ENTRIES), [_digits(made) for _ in range(ENTRIES)]
        told = " ".join(f"The code of {key} is {value}." for key, value in zip(keys, values, strict=True))
        return told, [(f"What is the code of {key}?", value) for key, value in zip(keys, values, strict=True)]
    sentences, asked = list[str](), list[tuple[str, str]]()
    makers = {"place": made.place, "number": made.number, "person": made.person, "date": made.date}
    for name, (fact, make) in zip(made.names(ENTRIES), makers.items(), strict=True):
        (told, *_), (question, *_) = HELD_OUT_FACTS[fact]
        value = make()
        sentences.append(told.format(n=name, v=value))
        asked.append((question.format(n=name), value))
    return " ".join(sentences), asked


def _digits(made: Exercises) -> str:
    """A number of four digits."""
    return next(number for number in iter(made.number, None) if len(number) == 4)


def text_of(
    made: Exercises, haystack: Haystack, model: Model, kind: str, tokens: int, n: int
) -> tuple[str, list[Asked]]:
    """A text of about so many tokens with n blocks at equal distances, and a question on each."""
    blocks = [block(made, kind) for _ in range(n)]
    told = sum(len(model.tokenizer.encode(text)) for text, _ in blocks)
    gap = (tokens - told) // n
    if gap < 1:
        raise SystemExit(f"making a text: expected more than {told} tokens for {n} blocks, found {tokens}")
    parts, values = list[str](), [value for _, asked in blocks for _, value in asked]
    for i, (text, _) in enumerate(blocks):
        filler = model.tokenizer.decode(haystack.tokens(i * gap, (i + 1) * gap).tolist()).decode(errors="ignore")
        parts += [filler.strip(), text]
    asked = []
    for i, (text, pairs) in enumerate(blocks):
        question, right = pairs[i % ENTRIES]
        kin = values[i % ENTRIES :: ENTRIES] if kind == "facts" else values
        asked.append(Asked(question, right, text, kin.count(right) / len(kin)))
    return "\n\n".join(parts), asked


def measured(given: argparse.Namespace) -> Iterator[Result | dict[str, float]]:
    """What it took to read the texts, then a result for each strategy."""
    import rwkv_stream as rs
    from rwkv_stream.answers.prompts import Question, abstains
    from rwkv_stream.answers.strategies import named, replies, subject
    from rwkv_stream.answers.strategy import Manner
    from rwkv_stream.reading.isolated import keep_chunk_states

    model = rs.load(given.model)
    manner = Manner(sampling=rs.Sampling(temperature=0, max_tokens=given.max_tokens))
    made, haystack = Exercises(given.seed, held_out=True), Haystack.read(given.haystack, model.tokenizer)
    rows: dict[str, list[tuple[bool, bool, int, int]]] = {name: [] for name in given.strategies}
    cpu_s = dict.fromkeys(given.strategies, 0.0)
    guesses, tokens, ingest_s, chunks_s = list[float](), 0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = rs.Store(Path(folder, "store"), create=True)
        for i in range(given.texts):
            text, asked = text_of(made, haystack, model, given.kind, given.tokens, given.questions)
            path = Path(folder, f"{i}.txt")
            path.write_text(text)
            began = time.process_time()
            report = rs.ingest(
                path, name=path.name, model=model, store=store, encoding="utf-8", snapshot_every=given.snapshot_every
            )
            snapshot, tokens = store.get(report.snapshot), tokens + report.tokens
            ingest_s, began = ingest_s + time.process_time() - began, time.process_time()
            if {"cells", "map-reduce", "vote", "auto"} & {*given.strategies}:
                keep_chunk_states(snapshot, model=model, store=store, size=given.chunk)
            chunks_s += time.process_time() - began
            guesses += [one.guess for one in asked]
            questions = [Question(one.question, None, j, one.passage) for j, one in enumerate(asked)]
            for name in given.strategies:
                strategy = named(name)
                began = time.process_time()
                with subject(snapshot, store, strategy.needs, model) as of_text:
                    found = [reply for _, (reply, *_) in replies(questions, strategy, of_text, manner)]
                cpu_s[name] += time.process_time() - began
                for one, reply in zip(asked, found, strict=True):
                    answer = reply.text or ""
                    rows[name].append(
                        (
                            answer.casefold().startswith(one.right.casefold()),
                            not abstains(answer),
                            reply.read,
                            reply.made,
                        )
                    )
    yield {
        "texts": given.texts, "tokens": tokens, "ingest_cpu_s": round(ingest_s, 1), "chunks_cpu_s": round(chunks_s, 1)
    }  # fmt: skip
    for name, of_name in rows.items():
        right, answered, read, written = (np.array(column, float) for column in zip(*of_name, strict=True))
        yield Result(
            name, len(right), right.mean(), half_width(right), answered.mean(),
            right[answered > 0].mean() if answered.any() else math.nan, read.mean(), written.mean(),
            cpu_s[name] / len(right) * 1000,
        )  # fmt: skip
    mean = float(np.mean(guesses))
    yield Result("guess", len(guesses), mean, 0.0, 1.0, mean, 0, 0, 0)


def half_width(right: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Of the 95 % interval of a share (Wilson)."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a checkpoint (default: the shipped model)")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--questions", type=int, default=20, help="of each text (default: 20)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each text (default: 16384)")
    parser.add_argument("--chunk", type=int, default=2000, help="tokens of a chunk state (default: 2000)")
    parser.add_argument("--snapshot-every", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--haystack", metavar="SOURCE", help="text to hide blocks in (default: a short story)")
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=list(STRATEGIES), metavar="NAME,...")
    parser.add_argument("--max-tokens", type=int, default=8, help="of an answer (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = parser.parse_args()
    for found in measured(given):
        if given.json:
            print(json.dumps(found if isinstance(found, dict) else asdict(found)))
        elif isinstance(found, dict):
            print(f"{found['texts']} texts, {found['tokens']:,} tokens: {found['ingest_cpu_s']} s of CPU, chunk states "
                  f"{found['chunks_cpu_s']} s\n{'':12}{'n':>5}{'right %':>14}{'answered':>10}{'of these':>10}"
                  f"{'read':>9}{'made':>7}{'CPU ms':>9}")  # fmt: skip
        else:
            z = found
            print(f"{z.strategy:12}{z.n:5}{z.right:9.1%} ±{z.half_width:3.0%}{z.answered:10.0%}"
                  f"{z.right_of_answered:10.1%}{z.read:9,.0f}{z.made:7.1f}{z.cpu_ms:9.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
