"""Make the ranker of evidence, `rwkv_stream/answers/ranker.json`, from the training data in the folder CORPUS.

    python recipes/ranker.py CORPUS              # about ten minutes of one core
    python recipes/ranker.py CORPUS --ablate     # beside it what each part of it is worth, on documents of the report

What `split.toml` reports on is trained on nowhere; the threshold is chosen on what settings are chosen on. LightGBM
grows the trees (`pip install lightgbm`); the package evaluates them without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from rwkv_stream.answers import english, ranker
from rwkv_stream.answers.candidates import candidates
from rwkv_stream.answers.evidence import MemoryText, sentences
from rwkv_stream.evaluation import evidence
from rwkv_stream.evaluation.evidence import KINDS, Document, Judged
from rwkv_stream.training import split

FILE = Path(__file__).parents[1] / "rwkv_stream" / "answers" / "ranker.json"
ABOUT = (
    "Ranks sentences that may answer a question. Made by recipes/ranker.py from FairytaleQA (Apache-2.0) and SQuAD "
    "(CC BY-SA 4.0, its texts from Wikipedia), which it may be held to be adapted from: see NOTICE. "
    "kept: share of answering sentences that hold a word (stem) of their question; trees: nodes [feature, limit, left, "
    "right] and leaves [value]; confidence: a logistic regression; thresholds: of confidence, by language."
)
# Of the questions: asked on the document alone, on it among books, on some sentences of it, and of other texts.
SHARES, HELD_SHARES = (1, 0.3, 0.2, 0.2), (1, 1, 0.5, 1)
EXCERPT = (8, 60)  # sentences
NEUTRAL = 0.12  # share that is asked as of another language than English
SHELF = 2_000_000  # characters of books
PARAMETERS = {
    "objective": "lambdarank",
    "lambdarank_truncation_level": 5,
    "num_leaves": 24,
    "learning_rate": 0.06,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "min_data_in_leaf": 80,
    "lambda_l2": 5,
    "max_bin": 63,
    "num_threads": 1,
    "deterministic": True,
    "verbosity": -1,
}
TREES, SEEDS = 150, range(3)
LEARNT = 25  # first candidates of a question that trees learn from
RIDGE = 1e-3
OTHER_LANGUAGES = 0.15  # the threshold where confidence was never measured: little is kept silent there
SILENT = 0.955  # share of questions about other texts that are to get no evidence, when the threshold is chosen


def lightgbm() -> Any:
    try:
        import lightgbm as library
    except ImportError:
        sys.exit("growing trees: expected the package lightgbm, found none; pip install lightgbm")
    return library


def asked(
    documents: Sequence[Document],
    shelf: evidence.Shelf,
    kept: Mapping[str, float],
    seed: int,
    shares: Sequence[float],
    neutral: float = 0.0,
) -> list[Judged]:
    """Questions on documents, asked in the four ways of `SHARES`; those without any candidate are left out."""
    texts = {document.name: MemoryText(document.text) for document in documents}
    found = []
    for document in documents:
        random = Random(f"{seed} {document.name}")
        text = texts[document.name]
        among_books, start = shelf.with_text(text, random)
        for question, right in zip(document.questions, evidence.right(document, text), strict=True):
            if right and random.random() < shares[0]:
                alone = evidence.judged(
                    question.text, document.kind, text, right, kept=kept, neutral=random.random() < neutral
                )
                found.append(alone)
            if right and random.random() < shares[1]:
                there = evidence.judged(
                    question.text,
                    document.kind,
                    among_books,
                    right,
                    start,
                    kept=kept,
                    neutral=random.random() < neutral,
                )
                found.append(there)
            if right and random.random() < shares[2]:
                part, at = evidence.excerpt(text, min(right), random.randint(*EXCERPT), random)
                excerpt = evidence.judged(
                    question.text,
                    document.kind,
                    part,
                    right,
                    -at,
                    kept=kept,
                    neutral=random.random() < neutral,
                )
                found.append(excerpt)
            if right and random.random() < shares[3]:
                other = texts[random.choice(sorted(texts.keys() - {document.name}))]
                some = evidence.excerpt(other, random.choice(evidence.spans(other)), random.randint(*EXCERPT), random)[
                    0
                ]
                elsewhere = random.choices((shelf, other, some), (4, 3, 3))[0]
                nowhere = evidence.judged(question.text, document.kind, elsewhere, frozenset(), kept=kept)
                found.append(nowhere)
    return [one for one in found if len(one.right)]


def asked_so(shares: Sequence[float], *given: Any, neutral: float = 0.0) -> list[Judged]:
    """What `asked` gives for each way by itself, one after the other."""
    ways = [[share * (way == at) for at in range(len(shares))] for way, share in enumerate(shares)]
    return [one for way in ways for one in asked(*given, way, neutral)]


def grown(questions: Sequence[Judged], seed: int) -> list[list[list[float]]]:
    """Trees that rank the sentences that answer first."""
    library = lightgbm()
    useful = [one for one in questions if one.right[:LEARNT].any()]
    data = library.Dataset(
        np.concatenate([one.values[:LEARNT] for one in useful]),
        np.concatenate([one.right[:LEARNT] for one in useful]).astype(int),
        group=[len(one.right[:LEARNT]) for one in useful],
    )
    booster = library.train(PARAMETERS | {"seed": seed}, data, TREES)
    return [nodes(tree["tree_structure"]) for tree in booster.dump_model()["tree_info"]]


def nodes(tree: Mapping[str, Any]) -> list[list[float]]:
    """A tree of LightGBM as the list of its nodes, each before those below it."""
    found: list[list[float]] = []

    def add(node: Mapping[str, Any]) -> int:
        at = len(found)
        found.append([])
        if "leaf_value" in node:
            found[at] = [float(f"{node['leaf_value']:.4g}")]
        else:
            left, right = add(node["left_child"]), add(node["right_child"])
            found[at] = [node["split_feature"], float(f"{node['threshold']:.6g}"), left, right]
        return at

    add(tree)
    return found


def fitted(values: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The weights of a logistic regression on features [n, F], by Newton's method."""
    weights = np.zeros(values.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(values @ weights, -30, 30)))
        slope = values.T @ (right - p) / len(values) - RIDGE * weights
        bend = (values * (p * (1 - p))[:, None]).T @ values / len(values) + RIDGE * np.eye(len(weights))
        weights += np.linalg.solve(bend, slope)
    return weights


Scored = tuple[Judged, np.ndarray[Any, Any]]  # a question's candidates, with their scores


def confidence(made: ranker.Ranker, questions: Sequence[Scored]) -> dict[str, float]:
    """Weights that tell whether one of the three best passages holds the answer, by questions that no tree has seen."""
    rows, right, columns = [], [], []
    for one, scores in questions:
        columns, found = ranker.certainty(made.names, one.values, scores, one.sentences)
        first = np.argsort(-scores, kind="stable")[:3]
        rows.append(found[first])
        right.append(one.held[first])
    weights = fitted(np.concatenate(rows).astype(float), np.concatenate(right))
    return {name: float(f"{weight:.4g}") for name, weight in zip(columns, weights, strict=True)}


def thresholds(made: ranker.Ranker, questions: Sequence[Scored]) -> list[float]:
    """Of short texts and of long ones: the confidence that questions about other texts seldom reach."""
    sure: tuple[list[float], list[float]] = ([], [])
    for one, scores in questions:
        if not one.right.any():
            found = made.confidence(one.values, scores, one.sentences)
            sure[one.sentences >= ranker.LONG].append(float(found[np.argmax(scores)]))
    return [round(float(np.quantile(found, SILENT)), 2) for found in sure]


def table(name: str, first: Callable[[Judged], int], questions: Sequence[Judged]) -> None:
    """Print how often the sentence that is ranked first answers, and its passage, for each kind of document."""
    shown = []
    for kind in KINDS:
        found = [(one.right[first(one)], one.held[first(one)]) for one in questions if one.kind == kind]
        sentence, passage = 100 * np.mean(found, axis=0) if found else (np.nan, np.nan)
        shown.append(f"{kind} n {len(found)} {sentence:.1f} / {passage:.1f}")
    print(f"{name:40} {'   '.join(shown)}", flush=True)


GROUPS = {  # features that are left out together
    "windows": ("bm25_*", "cover_*", "cover3*", "kept3*", "odds3*", "before_alone", "after_alone", "rarest_near"),
    "what answers keep of questions": ("kept*", "odds*"),
    "related words": ("soft*", "grams*", "all_grams*"),
    "order of words": ("adjacent", "in_order", "spread", "first_hit"),
    "lengths": ("length*", "words", "rarity", "new"),
    "names, numbers, marks": ("names", "names_held", "numbers", "numbers_missing", "quote", "asks"),
    "kinds of questions and words": ("kind", "fits*", "after", *english.CLASSES),
    "differences from the best": ("*_below",),
}


def ablate(
    train: Sequence[Judged],
    report: Sequence[Judged],
    names: Sequence[str],
    ranked: Callable[[Sequence[Judged], int], ranker.Ranker],
) -> None:
    """Print what each step is worth: noise beside the blend, a linear ranker, trees by three seeds and by kind of
    question, trees on noise, trees without each group of features."""
    draw = np.random.default_rng(0)
    train = [one for one in train if one.right.any()]
    everything = np.concatenate([one.values for one in train])
    mean, spread = everything.mean(axis=0), everything.std(axis=0) + 1e-6
    labels = np.concatenate([one.right for one in train])
    linear = fitted((everything - mean) / spread, labels)
    noise = 0.15 * everything[:, 0].std()

    def noisy(one: Judged) -> Judged:
        """The blend and its rank, and noise for all else."""
        values = draw.normal(size=one.values.shape).astype(np.float32)
        values[:, :2] = one.values[:, :2]
        return replace(one, values=values)

    def without(one: Judged, left_out: Sequence[int]) -> Judged:
        values = one.values.copy()
        values[:, left_out] = 0
        return replace(one, values=values)

    table("blend", lambda one: 0, report)
    table(
        "blend and noise", lambda one: int(np.argmax(one.values[:, 0] + draw.normal(0, noise, len(one.right)))), report
    )
    table("linear", lambda one: int(np.argmax(((one.values - mean) / spread) @ linear)), report)
    made = [ranked(train, seed) for seed in range(3)]
    for seed, trees in enumerate(made):
        table(f"trees, seed {seed}", lambda one, trees=trees: int(np.argmax(trees.scores(one.values))), report)
    for kind in (*english.KINDS, ""):
        some_kind = [one for one in report if english.kind_of(one.question) == kind]
        for seed, trees in enumerate(made):
            table(
                f"{kind or 'other'}, seed {seed}",
                lambda one, trees=trees: int(np.argmax(trees.scores(one.values))),
                some_kind,
            )
    blind = ranked([noisy(one) for one in train], 0)
    table("trees on the blend and noise", lambda one: int(np.argmax(blind.scores(noisy(one).values))), report)
    for name, parts in GROUPS.items():
        left_out = [i for i, feature in enumerate(names) if any(fnmatchcase(feature, part) for part in parts)]
        some = ranked([without(one, left_out) for one in train], 0)
        table(
            f"trees without {name}",
            lambda one, some=some, left_out=left_out: int(np.argmax(some.scores(without(one, left_out).values))),
            report,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--ablate", action="store_true", help="show what each part is worth, instead of writing")
    given = parser.parse_args()
    lightgbm()
    chosen = split.read(Path(__file__).with_name("split.toml"))
    train = list(evidence.documents(given.corpus, chosen, "train"))
    kept = evidence.kept_words(train)
    names = feature_names(train[0], kept)
    questions = asked_so(SHARES, train, evidence.shelf(given.corpus, SHELF, 0), kept, 0, neutral=NEUTRAL)
    print(f"{len(questions)} questions on {len(train)} documents, {len(names)} features", flush=True)
    made: dict[str, Any] = {
        "about": ABOUT,
        "thresholds": {"": [OTHER_LANGUAGES] * 2},
        "confidence": {},
        "features": names,
        "kept": kept,
    }

    def ranked(some: Sequence[Judged], seed: int = 0) -> ranker.Ranker:
        return ranker.Ranker.of(made | {"trees": grown(some, seed)})

    if given.ablate:
        report = list(evidence.documents(given.corpus, chosen, "report"))
        ablate(questions, asked(report, evidence.Shelf([]), kept, 1, (1, 0, 0, 0)), names, ranked)
        return
    made["trees"] = [tree for seed in SEEDS for tree in grown(questions, seed)]
    used = ranker.Ranker.of(made)
    tune = list(evidence.documents(given.corpus, chosen, "tune"))
    held = [
        (one, used.scores(one.values))
        for one in asked_so(HELD_SHARES, tune, evidence.shelf(given.corpus, SHELF, 3), kept, 1)
    ]
    made["confidence"] = confidence(used, held)
    made["thresholds"]["en"] = thresholds(ranker.Ranker.of(made), held)
    scored = dict(held)
    table("chosen on", lambda one: int(np.argmax(scored[one])), [one for one in scored if one.right.any()])
    text = json.dumps(made, separators=(",", ":"))
    FILE.write_text(text.replace("]],[[", "]],\n[[").replace(',"', ',\n"') + "\n")
    print(f"thresholds {made['thresholds']}; {FILE}: {FILE.stat().st_size} bytes")


def feature_names(document: Document, kept: Mapping[str, float]) -> list[str]:
    """The names of the features, as a question on a document shows them."""
    text = MemoryText(document.text)
    found = candidates(document.questions[0].text, [text])
    return ranker.features(found, sentences(found, [text]), kept)[0]


if __name__ == "__main__":
    main()
