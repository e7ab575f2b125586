"""How good summaries taken from the text are, beside other ways of choosing sentences, on meetings with summaries.

    python benchmarks/extracts.py CORPUS          # CORPUS: the folder of the training data; some minutes of one core
    python benchmarks/extracts.py CORPUS --tune   # what weights would be better, on the part that they are chosen on

The summaries of whole meetings of `sum-meetings` and `valid-sum-meetings`, each with the transcript. What
`recipes/split.toml` reports on is reported on; of the meetings that it leaves to training, on which nothing here is
trained, those whose key begins with 0 to 7 are chosen on, the others are reported on.

Every method takes sentences in the order of its choice, as long as they fit into so many words, and gives them in the
order of the text:

extract     `rwkv_stream.answers.extracts`
lead-3      the first three sentences, however long
lead        the first sentences
textrank    Mihalcea and Tarau 2004: PageRank over words in common, by the logarithms of the lengths
random      of five seeds the mean
oracle      the sentence that most adds to the mean of ROUGE-1, -2 and -L, one after the other: a ceiling

Intervals are the 2.5 % and 97.5 % quantiles of the mean difference over documents that were drawn with replacement.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_stream.answers import extracts
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.evaluation.rouge import rouge, words
from rwkv_stream.text import terms
from rwkv_stream.training import data, split

ROOT = Path(__file__).parents[1]
FILES = {"sum-meetings": "meetings", "valid-sum-meetings": "valid-meetings"}
TUNE_DIGITS = "01234567"
SEEDS = 5
DRAWS, SEED = 10_000, 0
DAMPING, ENOUGH = 0.85, 1e-9  # of PageRank
GRID = {
    "FREQUENCY": (0.2, 0.3, 0.5),
    "LENGTH": (0.4, 0.55, 0.7),
    "SAID": (0.1, 0.2, 0.4),
    "BEGINNING": (2.0, 5.0, 8.0),
    "FADING": (0.03, 0.05, 0.1),
    "COVERED": (0.5, 1.0, 2.0),
}

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Meeting:
    """A transcript, its sentences as bytes and words of each, as ROUGE compares them, and the words of its summary."""

    file: str
    name: str
    text: MemoryText
    spans: list[tuple[int, int]]
    lengths: list[int]
    compared: list[list[str]]
    reference: list[str]

    def fitting(self, order: Iterable[int], budget: int) -> list[int]:
        """Sentences in an order, as far as they fit, in that of the text."""
        chosen = []
        for i in order:
            if self.lengths[i] <= budget:
                chosen.append(i)
                budget -= self.lengths[i]
        return sorted(chosen)


def meetings(corpus: Path, part: str) -> Iterator[Meeting]:
    """Those that are chosen on ("tune") or reported on ("report")."""
    chosen = split.read(ROOT / "recipes" / "split.toml")
    for file, texts in FILES.items():
        transcripts = {record["id"]: record["text"] for record in data.records(corpus / f"{texts}.jsonl.zst")}
        for record in data.records(corpus / f"{file}.jsonl.zst"):
            if "context" in record:  # a question on a part of the meeting
                continue
            of = chosen.part(f"{file}.jsonl.zst", record)
            if of == "train":
                of = "tune" if split.key(record)[0] in TUNE_DIGITS else "report"
            if of == part:
                yield meeting(file, record["document"], transcripts[record["document"]], record["answer"])


def meeting(file: str, name: str, transcript: str, summary: str) -> Meeting:
    text = MemoryText(transcript, name)
    spans: list[tuple[int, int]] = []
    lengths: list[int] = []
    for postings in text.postings():
        spans += zip(postings.starts.tolist(), postings.ends.tolist(), strict=True)
        lengths += postings.lengths.tolist()
    compared = [words(text.read(*span).decode()) for span in spans]
    return Meeting(file, name, text, spans, lengths, compared, words(summary))


# ---- methods: which sentences ----


def extracted(given: Meeting, budget: int) -> list[int]:
    places = {start: i for i, (start, _) in enumerate(given.spans)}
    return [places[one.byte_start] for one in extracts.extract(given.text, words=budget)]


def textrank(given: Meeting, budget: int) -> list[int]:
    n = len(given.spans)
    analyzer = terms.Analyzer("en")
    found = [{*analyzer.terms(given.text.read(*span).decode())} for span in given.spans]
    number = {term: i for i, term in enumerate(dict.fromkeys(itertools.chain.from_iterable(found)))}
    holds = np.zeros((n, len(number)), np.float32)
    for i, some in enumerate(found):
        holds[i, [number[term] for term in some]] = 1
    logs = np.log(np.maximum([len(some) for some in found], 1))
    both = logs[:, None] + logs
    alike = np.where(both > 0, (holds @ holds.T) / np.where(both > 0, both, 1), 0.0)
    np.fill_diagonal(alike, 0)
    sums = alike.sum(axis=1, keepdims=True)
    moves = np.where(sums > 0, alike / np.where(sums > 0, sums, 1), 1 / n)
    rank, before = np.full(n, 1 / n), np.zeros(n)
    while np.abs(rank - before).sum() > ENOUGH:
        rank, before = (1 - DAMPING) / n + DAMPING * (rank @ moves), rank
    return given.fitting(np.argsort(-rank, kind="stable").tolist(), budget)


def shuffled(given: Meeting, budget: int, seed: int) -> list[int]:
    order = list(range(len(given.spans)))
    random.Random(f"{seed} {given.name}").shuffle(order)
    return given.fitting(order, budget)


def oracle(given: Meeting, budget: int) -> list[int]:
    chosen: list[int] = []
    best = 0.0
    while True:
        room = budget - sum(given.lengths[i] for i in chosen)
        open_ = [i for i in range(len(given.spans)) if i not in chosen and given.lengths[i] <= room]
        scored = [(float(scores(given, sorted([*chosen, i])).mean()), -i) for i in open_]
        if not scored or max(scored)[0] <= best:
            return sorted(chosen)
        best, i = max(scored)
        chosen.append(-i)


METHODS: dict[str, Callable[[Meeting, int], list[int]]] = {
    "extract": extracted,
    "lead-3": lambda given, budget: [0, 1, 2][: len(given.spans)],
    "lead": lambda given, budget: given.fitting(range(len(given.spans)), budget),
    "textrank": textrank,
    **{f"random {seed}": lambda given, budget, seed=seed: shuffled(given, budget, seed) for seed in range(SEEDS)},
    "oracle": oracle,
}


def scores(given: Meeting, chosen: Sequence[int]) -> Values:
    """ROUGE-1, -2, -L of sentences, in %."""
    return 100 * np.array(rouge([word for i in chosen for word in given.compared[i]], given.reference))


def interval(differences: Values) -> tuple[Values, Values]:
    """Of the mean of paired differences [documents, 3]."""
    n = len(differences)
    drawn = np.random.default_rng(SEED).integers(0, n, (DRAWS, n))
    means = differences[drawn].mean(axis=1)
    return np.quantile(means, 0.025, axis=0), np.quantile(means, 0.975, axis=0)


def report(found: Sequence[Meeting], budget: int) -> None:
    chosen = {name: [method(one, budget) for one in found] for name, method in METHODS.items()}
    made = {name: np.array([scores(*pair) for pair in zip(found, some, strict=True)]) for name, some in chosen.items()}
    lengths = {
        name: np.mean([sum(one.lengths[i] for i in which) for one, which in zip(found, some, strict=True)])
        for name, some in chosen.items()
    }
    randoms = [f"random {seed}" for seed in range(SEEDS)]
    made["random"] = np.mean([made.pop(name) for name in randoms], axis=0)
    lengths["random"] = np.mean([lengths.pop(name) for name in randoms])
    print(
        f"n = {len(found)} meetings, {np.mean([sum(one.lengths) for one in found]):,.0f} words each, of summaries",
        end=" ",
    )
    print(f"{np.mean([len(one.reference) for one in found]):.0f}; at most {budget} words\n")
    print("| method | words | ROUGE-1 | ROUGE-2 | ROUGE-L | extract is better by |\n|---|---|---|---|---|---|")
    for name, values in made.items():
        low, high = interval(made["extract"] - values)
        better = ", ".join(f"{a:.2f} to {b:.2f}" for a, b in zip(low, high, strict=True))
        columns = " | ".join(f"{value:.2f}" for value in values.mean(axis=0))
        print(f"| {name} | {lengths[name]:.0f} | {columns} | {'' if name == 'extract' else better} |")
    print()


def tune(found: Sequence[Meeting], budget: int) -> None:
    """Each weight in turn, the others as they are; then twice as many drawn at random."""

    def mean(**weights: float) -> tuple[float, Values]:
        before = {name: getattr(extracts, name) for name in weights}
        for name, value in weights.items():
            setattr(extracts, name, value)
        values = np.mean([scores(one, extracted(one, budget)) for one in found], axis=0)
        for name, value in before.items():
            setattr(extracts, name, value)
        return float(values.mean()), values

    drawn = random.Random(SEED)
    tried = [{}, *({name: value} for name, values in GRID.items() for value in values)]
    tried += [{name: drawn.choice(values) for name, values in GRID.items()} for _ in range(2 * len(tried))]
    for score, values, weights in sorted(((*mean(**weights), weights) for weights in tried), key=lambda one: -one[0]):
        print(f"{score:.2f}  {' '.join(f'{value:5.2f}' for value in values)}  {weights or 'as they are'}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("corpus", type=Path)
    arguments.add_argument("--words", type=int, default=extracts.WORDS, help="of a summary at most")
    arguments.add_argument("--tune", action="store_true", help="try other weights")
    given = arguments.parse_args()
    if given.tune:
        tune(list(meetings(given.corpus, "tune")), given.words)
        return
    found = list(meetings(given.corpus, "report"))
    for file in FILES:
        print(f"{file}: ", end="")
        report([one for one in found if one.file == file], given.words)
    print("both: ", end="")
    report(found, given.words)


if __name__ == "__main__":
    main()
