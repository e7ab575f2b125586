"""A small learned ranker of sentences that may answer a question: what it sees, and how its trees are evaluated.

What it sees of the words that a question and a sentence share holds in every language; what kind of answer a question
asks for, and a sentence could be, is known for English alone. `recipes/ranker.py` makes `ranker.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.answers import english
from rwkv_stream.answers.candidates import REACH, WINDOWS, Candidates, bm25
from rwkv_stream.text import terms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_CAPITALISED = re.compile(r"\b[A-Z][\w]+")
_NUMBER = re.compile(r"\d+")
_KEPT_SENTENCES = 1024  # whose words are remembered for the next question
_SHORTEST = 4  # letters that two words begin with alike to be taken for related
LONG = 1000  # sentences: from there on more is found by chance
KEPT = 0.6  # of a word that training questions seldom had
_FITS = {  # kind of question → what a sentence that answers it often holds
    "who": ("names", "person"),
    "when": ("time", "numbers"),
    "where": ("place", "names"),
    "why": ("cause", "cause"),
    "number": ("numbers", "number"),
    "how": ("manner", "manner"),
    "feeling": ("feeling", "feeling"),
    "speech": ("speech", "quote"),
    "name": ("names", "naming"),
    "which": ("names", "names"),
}


def features(
    found: Candidates, sentences: Sequence[str], kept: Mapping[str, float], *, neutral: bool = False
) -> tuple[list[str], Floats]:
    """What the ranker sees of candidates [n ≥ 1], whose sentences are given: names [F], values [n, F].

    kept     how often a sentence that answers has a word of its question, by English stems
    neutral  leave out what is known for English alone
    """
    asked = found.asked
    analyzer = _analyzer(asked.language)
    is_english = asked.language == english.LANGUAGE and not neutral
    columns = _shared(found, np.array([kept.get(analyzer.term(z), KEPT) if is_english else KEPT for z in asked.words]))
    kind = english.kind_of(asked.question) if is_english else ""
    question = _Question.of(found, analyzer)
    rows = [_seen(question, _sentence(text, asked.language, is_english)) for text in sentences]
    seen = {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    columns |= seen
    for name in ("score", "bm25", "cover", "cover3", "soft", "odds", "odds3", "kept3", "grams", "all_grams"):
        columns[f"{name}_below"] = columns[name] - columns[name].max(initial=0)
    fits = _FITS.get(kind, ())
    columns["fits"] = np.minimum(sum((columns[name] for name in fits), np.zeros(len(found), np.float32)), 4)
    columns["fits_bm25"] = columns["fits"] * columns["bm25"]
    columns["kind"] = np.full(len(found), english.KINDS.index(kind) + 1 if kind else 0, np.float32)
    words = set(terms.words(asked.question)) if is_english else set()
    columns["after"] = np.full(
        len(found), bool({"after", "then", "once"} & words) - 1.0 * bool({"before"} & words), np.float32
    )
    return list(columns), np.stack([np.asarray(column, np.float32) for column in columns.values()], axis=1)


def _shared(found: Candidates, kept: NDArray[np.float64]) -> dict[str, Floats]:
    """What the counts of the question's words around each sentence say; `kept` of each word [T]."""
    asked, n = found.asked, len(found)
    total = max(float(asked.rarity.sum()), 1e-6)
    here = found.counts > 0
    columns: dict[str, Any] = {"score": found.scores / total, "rank": np.log1p(np.arange(n))}

    def sums(before: int, after: int, at: int = REACH) -> tuple[Floats, Floats]:
        part = slice(max(at - before, 0), at + after + 1)
        return found.counts[:, :, part].sum(axis=2).T, found.lengths[:, part].sum(axis=1)

    def share(before: int, after: int, at: int = REACH) -> Floats:
        held = here[:, :, max(at - before, 0) : at + after + 1].any(axis=2)
        return _weighed(held, asked.rarity) / total

    for before, after, _, k1, b in (*WINDOWS, (1, 1, 0, 0.9, 0.4)):
        name = "bm25" if not before + after else f"bm25_{before}_{after}"
        columns[name] = bm25(*sums(before, after), (before + after + 1) * asked.mean, asked.rarity, k1, b) / total
    for step in (-2, -1, 1, 2):
        columns[f"bm25_at_{step}"] = bm25(*sums(0, 0, REACH + step), asked.mean, asked.rarity, 0.6, 0.3) / total
    columns["cover"] = share(0, 0)
    for before, after in ((1, 0), (2, 0), (0, 1), (1, 1), (2, 2), (5, 5)):
        columns["cover3" if (before, after) == (1, 1) else f"cover_{before}_{after}"] = share(before, after)
    columns["before_alone"] = _weighed(here[:, :, REACH - 1] & ~here[:, :, REACH], asked.rarity) / total
    columns["after_alone"] = _weighed(here[:, :, REACH + 1] & ~here[:, :, REACH], asked.rarity) / total
    weights = kept * asked.rarity
    for name, reach in (("", 0), ("3", 1)):
        there = here[:, :, REACH - reach : REACH + reach + 1].any(axis=2)
        columns[f"kept{name}"] = _weighed(there, weights) / max(float(weights.sum()), 1e-6)
        columns[f"odds{name}"] = np.where(there, np.log(kept) + asked.rarity, np.log1p(-kept)).sum(axis=1)
    columns["matched"] = here[:, :, REACH].sum(axis=1)
    columns["missing"] = len(asked.words) - columns["matched"]
    rarest = int(np.argmax(asked.rarity)) if len(asked.words) else 0
    columns["rarest"] = here[:, rarest, REACH]
    columns["rarest_near"] = here[:, rarest, REACH - 1 : REACH + 2].any(axis=1)
    columns["repeats"] = found.counts[:, :, REACH].sum(axis=1) - columns["matched"]
    columns["length"] = np.log1p(found.lengths[:, REACH])
    columns["length_before"], columns["length_after"] = (np.log1p(found.lengths[:, REACH + z]) for z in (-1, 1))
    columns["words"] = np.full(n, len(asked.words))
    columns["rarity"] = np.full(n, total / max(len(asked.words), 1))
    return columns


def _weighed(values: Any, weights: NDArray[np.floating]) -> Floats:
    """Values [n, T] times their weights [T]: [n]. A product by BLAS would warn of invalid values that are none."""
    found: Floats = np.einsum("nt,t->n", values, weights).astype(np.float32)
    return found


@dataclass(frozen=True, eq=False)
class _Question:
    """A question as the ranker sees it: the words that are sought, their stems and shares in the rarity of all."""

    words: tuple[str, ...]
    stems: tuple[str, ...]
    shares: tuple[float, ...]
    all_stems: frozenset[str]
    grams: tuple[tuple[str, ...], ...]  # of each word: its runs of three characters, blanks around it
    all_grams: tuple[str, ...]
    names: frozenset[str]
    numbers: frozenset[str]

    @classmethod
    def of(cls, found: Candidates, analyzer: terms.Analyzer) -> _Question:
        asked = found.asked
        rest = asked.question.partition(" ")[2]  # the first word has a capital in any case
        names = {word.lower() for word in _CAPITALISED.findall(rest)} - analyzer.stop_words
        total = max(float(asked.rarity.sum()), 1e-6)
        return cls(
            asked.words,
            tuple(analyzer.term(word) for word in asked.words),
            tuple(float(z) / total for z in asked.rarity),
            frozenset(analyzer.terms(asked.question)),
            tuple(_grams(word) for word in asked.words),
            _grams(" ".join(terms.words(asked.question, asked.language))),
            frozenset(names),
            frozenset(_NUMBER.findall(asked.question)),
        )


@dataclass(frozen=True, eq=False)
class _Sentence:
    """What of a sentence does not depend on the question."""

    text: str
    stems: tuple[str, ...]
    distinct: frozenset[str]  # words
    joined: str
    alike: dict[str, tuple[str, ...]]  # words by their first letters
    content: tuple[str, ...]  # stems of words that are no stop words
    numbers: tuple[str, ...]
    names: tuple[str, ...]  # stems of capitalised words after the first letter
    classes: dict[str, frozenset[str]]  # words of each class


@lru_cache(maxsize=_KEPT_SENTENCES)
def _sentence(text: str, language: str, is_english: bool) -> _Sentence:
    analyzer = _analyzer(language)
    words = terms.words(text, language)
    stems = tuple(analyzer.term(word) for word in words)
    distinct = frozenset(words)
    alike: dict[str, tuple[str, ...]] = {}
    for word in sorted(distinct):
        if len(word) > _SHORTEST:
            alike[word[:_SHORTEST]] = (*alike.get(word[:_SHORTEST], ()), word)
    classes = {name: distinct & english.listed(name) if is_english else frozenset[str]() for name in english.CLASSES}
    if words and words[0] not in classes["pronoun"]:
        classes["pronoun"] = frozenset()
    return _Sentence(
        text,
        stems,
        distinct,
        f" {' '.join(words)} ",
        alike,
        tuple(stem for word, stem in zip(words, stems, strict=True) if word not in analyzer.stop_words),
        tuple(word for word in words if word[0].isdigit()),
        tuple(analyzer.term(word.lower()) for word in (_CAPITALISED.findall(text[1:]) if is_english else ())),
        classes,
    )


@lru_cache(maxsize=8)
def _analyzer(language: str) -> terms.Analyzer:
    return terms.Analyzer(language)


def _seen(question: _Question, sentence: _Sentence) -> dict[str, float]:
    """What the words of one sentence say."""
    at = [sentence.stems.index(stem) if stem in sentence.stems else -1 for stem in question.stems]
    hits = [z for z in at if z >= 0]
    pairs = list(pairwise(at))
    both = [(a, b) for a, b in pairs if a >= 0 and b >= 0]
    soft = grams = 0.0
    for word, share, place, own in zip(question.words, question.shares, at, question.grams, strict=True):
        alike = () if place >= 0 else sentence.alike.get(word[:_SHORTEST], ())
        soft += share if place >= 0 else share * max((_likeness(word, other) for other in alike), default=0.0)
        grams += share * sum([gram in sentence.joined for gram in own]) / len(own)
    seen = {
        "soft": soft,
        "grams": grams,
        "all_grams": sum([gram in sentence.joined for gram in question.all_grams]) / len(question.all_grams),
        "adjacent": sum(0 < b - a < 3 for a, b in both) / max(len(pairs), 1),
        "in_order": sum(a < b for a, b in both) / max(len(pairs), 1),
        "spread": (max(hits) - min(hits) + 1) / len(hits) if hits else 30.0,
        "first_hit": min(hits, default=50),
        "new": sum([stem not in question.all_stems for stem in sentence.content]),
        "names_held": len(question.names & sentence.distinct) / len(question.names) if question.names else -1.0,
        "numbers_missing": len(question.numbers - sentence.distinct) if question.numbers else -1.0,
        "numbers": sum([number not in question.numbers for number in sentence.numbers]),
        "quote": '"' in sentence.text or "“" in sentence.text or "«" in sentence.text,
        "asks": sentence.text.rstrip("\"”’'»").endswith(("?", "？")),
        "names": sum([name not in question.all_stems for name in sentence.names]),
    }
    for name, held in sentence.classes.items():
        seen[name] = len(held.difference(question.words))
    return seen


def _grams(text: str) -> tuple[str, ...]:
    """The runs of three characters of a text with blanks around it, each once."""
    text = f" {text} "
    return tuple({text[i : i + 3]: None for i in range(len(text) - 2)})


def _likeness(word: str, other: str) -> float:
    """Share of letters that two words begin with alike."""
    n = 0
    for a, b in zip(word, other, strict=False):
        if a != b:
            break
        n += 1
    return n / max(len(word), len(other))


CONFIDENCE = (  # features of `features` that confidence is told by, beside the score, its lead, and the best cover
    "bm25",
    "cover",
    "cover3",
    "cover_2_2",
    "soft",
    "rarest_near",
    "adjacent",
    "words",
    "rarity",
)


@dataclass(frozen=True, eq=False)
class Ranker:
    """Trees whose values add up to a score, and a logistic regression that tells how sure the best are.

    kept                     what `features` takes of words
    names                    features, in the order of columns
    roots                    int [trees]: each tree's first node
    feature, left, right     int [nodes]; a leaf is its own left and right
    limit, value             float32 [nodes]: what goes left is at most `limit`; `value` is of leaves
    depth                    steps from a root to the furthest leaf
    weights                  float [features of `certainty`, and one that always counts]
    thresholds               language ("" for the others) → confidence from which texts are said to speak of what is
                             asked: texts of fewer than LONG sentences, and others
    """

    kept: Mapping[str, float]
    names: tuple[str, ...]
    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    limit: Floats
    value: Floats
    depth: int
    weights: Floats
    thresholds: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Ranker:
        """The ranker of a file: every tree is a list of nodes, [feature, limit, left, right] or [value]."""
        roots: list[int] = []
        nodes: list[tuple[int, float, int, int, float]] = []
        depth = 0
        for tree in found["trees"]:
            first = len(nodes)
            roots.append(first)
            levels = [0] * len(tree)
            for at, node in enumerate(tree):
                if len(node) == 1:
                    nodes.append((0, 0.0, first + at, first + at, node[0]))
                    continue
                feature, limit, left, right = node
                levels[left] = levels[right] = levels[at] + 1
                nodes.append((feature, limit, first + left, first + right, 0.0))
            depth = max(depth, *levels)
        feature, limit, left, right, value = (np.array(column) for column in zip(*nodes, strict=True))
        return cls(
            found["kept"],
            tuple(found["features"]),
            np.array(roots),
            feature,
            left,
            right,
            limit.astype(np.float32),
            value.astype(np.float32),
            depth,
            np.array([*found["confidence"].values()], np.float32),
            found["thresholds"],
        )

    def scores(self, values: Floats) -> Floats:
        """The score of each candidate, by its features [n, F]: [n]."""
        rows = np.arange(len(values))[:, None]
        at = np.broadcast_to(self.roots, (len(values), len(self.roots)))
        for _ in range(self.depth):
            at = np.where(values[rows, self.feature[at]] <= self.limit[at], self.left[at], self.right[at])
        found: Floats = self.value[at].sum(axis=1)
        return found

    def threshold(self, language: str, sentences: int) -> float:
        """The confidence from which evidence is told, of texts of a language with so many sentences."""
        return self.thresholds.get(language, self.thresholds[""])[sentences >= LONG]

    def confidence(self, values: Floats, scores: Floats, sentences: int) -> Floats:
        """How likely the passage of each candidate holds the answer: [n], 0 to 1.

        values, scores  of the candidates, [n, F] and [n]
        sentences       in all texts
        """
        odds = np.exp(_weighed(certainty(self.names, values, scores, sentences)[1], self.weights))
        found: Floats = (odds / (1 + odds)).astype(np.float32)
        return found


@cache
def shipped() -> Ranker:
    """The ranker of this package."""
    return Ranker.of(json.loads(Path(__file__).with_name("ranker.json").read_text("utf-8")))


def certainty(names: Sequence[str], values: Floats, scores: Floats, sentences: int) -> tuple[list[str], Floats]:
    """What confidence is told by: names, and for each candidate values, the last of which is 1."""
    rarity = values[:, names.index("words")] * values[:, names.index("rarity")]
    at = {name: i for i, name in enumerate(names)}
    best = np.sort(scores)[-2:]
    others = np.where(scores == best[-1], best[0], best[-1])
    columns: dict[str, Any] = {name: values[:, at[name]] for name in CONFIDENCE}
    columns["words"] = np.log1p(columns["words"])
    # how much rarer what is found here is than the rarest that so many sentences hold by chance
    columns["beyond_chance"] = np.tanh((columns["cover"] * rarity - math.log(max(sentences, 1))) / 4)
    columns["beyond_chance3"] = np.tanh((columns["cover3"] * rarity - math.log(max(sentences, 1))) / 4)
    columns["score"] = scores
    columns["lead"] = scores - others
    columns["best_cover3"] = np.full(len(scores), values[:, at["cover3"]].max(initial=0))
    columns["always"] = np.ones(len(scores))
    return list(columns), np.stack([np.asarray(z, np.float32) for z in columns.values()], axis=1)
