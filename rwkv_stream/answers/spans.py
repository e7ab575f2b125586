"""The short answer within passages that were found: where it begins and ends, by a small network, without torch.

The network reads a question and a few passages together: every word of them is a possible beginning and a possible
end, so a word of one passage competes with those of all others (Clark & Gardner 2018, arXiv 1710.10723). It knows of a
word its vector, made from which words stand near it in books, its form, and how it and its surroundings match the
question; passages look at the question's words (attention as of Seo et al. 2017, arXiv 1611.01603). `training.spans`
makes it; docs/answers.md has what it reaches.

Its words are English. Of a text in another language the sentence is the answer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from rwkv_stream.answers import english
from rwkv_stream.errors import InputError
from rwkv_stream.text import terms
from rwkv_stream.text.sentences import is_abbreviation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

SHIPPED = Path(__file__).with_name("spans.safetensors")
WORDS = 400  # of a passage that are looked at
LONGEST = 15  # words of an answer
FAR = 20  # words from which on a distance counts the same
QUESTION_WORDS = 30

_WORD = re.compile(r"\w+(?:[.,'’\-]\w+)*|[^\w\s]")
_STOP_WITHIN = re.compile(r"\.(?=[\s,;:]+\w)")
_TITLE = re.compile(r"[A-Z][a-z]+\.")
_YEAR = re.compile(r"1\d\d\d|20\d\d")
DILATIONS = (1, 2, 4, 1)  # of the passage's convolutions
KINDS = (*english.KINDS, "")  # of questions


class Passage(NamedTuple):
    """Sentences in a row, of which one was found.

    sentences  their texts
    found      which one
    scores     how well each fits the question, the best sentence of the search 1
    apart      whether each stands in another paragraph than the one that was found
    """

    sentences: Sequence[str]
    found: int
    scores: Sequence[float]
    apart: Sequence[bool]


class Word(NamedTuple):
    """A word or a mark of a passage: its sentence, and where in that it stands, in characters."""

    sentence: int
    start: int
    end: int


class Span(NamedTuple):
    """An answer: a passage, its first and last word, and the log of its probability among all spans."""

    passage: int
    first: Word
    last: Word
    log_probability: float


def words(sentences: Sequence[str]) -> list[Word]:
    """The words and marks of some sentences, at most WORDS. A stop that does not end a sentence is part of its word."""
    found = []
    for i, text in enumerate(sentences):
        end = 0
        for match in _WORD.finditer(text):
            if match.start() >= end:
                end = match.end()
                if _STOP_WITHIN.match(text, end) and _is_abbreviation(match[0]):
                    end += 1
                found.append(Word(i, match.start(), end))
    return found[:WORDS]


def _is_abbreviation(word: str) -> bool:
    return word.lower() not in terms.stop_words(english.LANGUAGE) and is_abbreviation(word, english.LANGUAGE)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What the network sees of a question and one passage.

    features  fp32 [n, F]; vectors: int [n], rows of the word vectors, the last of which is that of unknown words
    words     where each stands
    leads     bool [n]: whether it is the title of the name that follows, as "Mr." is, and so ends no answer
    """

    features: Array
    vectors: NDArray[np.int64]
    words: list[Word]
    leads: NDArray[np.bool_]


class Vocabulary:
    """The words that have vectors, the commonest first: how common a word is tells how much it says."""

    def __init__(self, listed: Sequence[str]) -> None:
        self.words = tuple(listed)
        self._ranks = {word: rank for rank, word in enumerate(listed)}
        self._most = np.log(len(listed) + 1)

    def row(self, word: str) -> int:
        """The row of a lower-case word's vector."""
        return self._ranks.get(word, len(self.words))

    def weight(self, word: str) -> float:
        """How much a lower-case word says: 0 the commonest, 1 one that is not known."""
        rank = self._ranks.get(word)
        return 1.0 if rank is None else float(np.log(rank + 1) / self._most)

    def question(self, text: str) -> NDArray[np.int64]:
        """The rows of a question's words, at most QUESTION_WORDS."""
        found = [match[0].lower() for match in _WORD.finditer(text) if match[0][0].isalnum()]
        return np.array([self.row(word) for word in found[:QUESTION_WORDS]] or [self.row("what")])

    def inputs(self, question: str, passage: Passage) -> Inputs:
        """What the network sees of a passage."""
        asked = terms.words(question, english.LANGUAGE)
        stop_words, term = _analyzer().stop_words, _analyzer().term
        weights = {term(word): self.weight(word) for word in asked if word not in stop_words}
        all_terms = {term(word) for word in asked}
        total = sum(weights.values()) + 1e-9
        found = words(passage.sentences)
        spelt = [passage.sentences[word.sentence][word.start : word.end] for word in found]
        known = [_known(word) for word in spelt]
        lower, own = [word.lower for word in known], [word.terms for word in known]
        of_sentence = [set[str]() for _ in passage.sentences]
        for place, word in zip(found, known, strict=True):
            of_sentence[place.sentence] |= word.terms & weights.keys()
        share = np.array([sum(weights[t] for t in here) for here in of_sentence]) / total
        whole = sum(weights[t] for t in set().union(*of_sentence)) / total
        n = len(found)
        sentence = np.array([word.sentence for word in found], np.int64)
        weight = np.array([max((weights[t] for t in here if t in weights), default=0.0) for here in own])
        matches = weight > 0
        columns = [
            matches,
            [not here.isdisjoint(all_terms) for here in own],
            weight,
            [self.weight(word) if word[0].isalnum() else 0.0 for word in lower],
            *(_near(weight, *box) for box in ((-4, 0), (1, 5), (-10, 0), (1, 11))),
            *_distances(matches),
            share[sentence] if n else [],
            np.array(passage.scores)[sentence] if n else [],
            sentence == passage.found,
            np.abs(sentence - passage.found) / 2,
            np.full(n, passage.scores[passage.found]),
            np.full(n, whole),
            np.array(passage.apart)[sentence] if n else [],
        ]
        forms = np.array([word.form for word in known], np.float32).reshape(n, -1)
        features = np.concatenate([np.array(columns, np.float32).T, forms], axis=1)
        names = [word[0].isupper() for word in (*spelt[1:], ".")]
        leads = np.array([bool(_TITLE.fullmatch(a)) and b for a, b in zip(spelt, names, strict=True)], bool)
        return Inputs(features, np.array([self.row(word) for word in lower], np.int64), found, leads)


def _near(weight: NDArray[np.floating], low: int, high: int) -> NDArray[np.floating]:
    """The sum of the weights from `low` words on to before `high`, for each word."""
    sums, i, n = np.concatenate([[0], np.cumsum(weight)]), np.arange(len(weight)), len(weight)
    result: NDArray[np.floating] = sums[np.clip(i + high, 0, n)] - sums[np.clip(i + low, 0, n)]
    return result


def _distances(matches: NDArray[np.bool_]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """How far it is from each word back to the nearest that matches, and on to the next, as shares of FAR."""
    i, at = np.arange(len(matches)), np.flatnonzero(matches)
    if not len(at):
        return np.ones(len(matches)), np.ones(len(matches))
    after = np.searchsorted(at, i)  # the first that stands here or further on
    back = np.where(after > 0, i - at[np.maximum(after - 1, 0)], FAR)
    on = np.where(after < len(at), at[np.minimum(after, len(at) - 1)] - i, FAR)
    return np.minimum(back, FAR) / FAR, np.minimum(on, FAR) / FAR


class _Known(NamedTuple):
    """What of a word does not depend on its place: lower case without the stop of an abbreviation, terms, form."""

    lower: str
    terms: frozenset[str]
    form: tuple[bool, ...]


@functools.lru_cache(maxsize=1 << 14)
def _known(word: str) -> _Known:
    lower = word.lower() if len(word) == 1 else word.lower().rstrip(".")
    analyzer = _analyzer()
    return _Known(
        lower,
        frozenset(analyzer.term(part) for part in terms.words(word, english.LANGUAGE)),
        _form(word, analyzer.stop_words),
    )


@functools.cache
def _analyzer() -> terms.Analyzer:
    return terms.Analyzer(english.LANGUAGE)


def _form(word: str, stop_words: frozenset[str]) -> tuple[bool, ...]:
    lower = word.lower()
    return (
        word[0].isupper(),
        word.isupper() and len(word) > 1,
        any(z.isdigit() for z in word),
        not word[0].isalnum(),
        lower in stop_words,
        lower in english.listed("numeral"),
        lower in english.listed("calendar"),
        bool(_YEAR.fullmatch(word)),
        len(word) > 7,
        word in ".!?",
        word in "\"“”'’",
        word == ",",
        lower.endswith(("ed", "ing")),
        lower.endswith("ly"),
    )


class SpanHead:
    """The network, from its weights by name, fp32.

    vectors [V + 1, E] · question.in, passage.in [C, E] · passage.features [C, F] · question.near [C, C, 3] ·
    question.kinds [kinds, C] · question.weigh [1, C] · passage.look, question.look [C, C] · mix [C, 4 C + 1] ·
    convolutions.0 to 3 [C, C, 5] · ends [2, C] · question.ends [2 C, C]; all but vectors and kinds with a bias
    """

    def __init__(self, vocabulary: Vocabulary, weights: dict[str, Array]) -> None:
        self.vocabulary = vocabulary
        self._weights = weights

    def find(self, question: str, passages: Sequence[Passage]) -> list[Span]:
        """The best answer of each passage, the best first."""
        inputs = [self.vocabulary.inputs(question, passage) for passage in passages]
        ends = self.ends(self.vocabulary.question(question), KINDS.index(english.kind_of(question)), inputs)
        logs = [_log_sum(np.concatenate([logits[:, i] for logits in ends])) for i in (0, 1)] if ends else []
        found = []
        for number, (logits, of_passage) in enumerate(zip(ends, inputs, strict=True)):
            if len(logits):
                first, last, score = best_span(logits)
                span = Span(number, of_passage.words[first], of_passage.words[last], score - sum(logs))
                found.append(span)
        return sorted(found, key=lambda span: -span.log_probability)

    def ends(self, question: NDArray[np.int64], kind: int, inputs: Sequence[Inputs]) -> list[Array]:
        """Of each passage fp32 [n, 2]: how likely, as logits, an answer begins and ends at each word."""
        w, vectors = self._weights, self._weights["vectors"]
        asked = self._linear("question.in", vectors[question] * 3)
        near = _relu(asked + _convolution(asked, w["question.near.weight"], w["question.near.bias"], 1))
        asked = near + w["question.kinds"][kind]
        summary = _softmax(self._linear("question.weigh", asked)[:, 0]) @ asked
        looked_at = self._linear("question.look", asked)
        pointers = self._linear("question.ends", summary).reshape(2, -1)
        C = len(summary)
        ends = []
        for given in inputs:
            word = self._linear("passage.in", vectors[given.vectors] * 3)
            z = _relu(word + self._linear("passage.features", given.features))
            likeness = self._linear("passage.look", z) @ looked_at.T / C**0.5
            seen = _softmax(likeness) @ asked
            best = likeness.max(axis=1, keepdims=True) if len(z) else likeness[:, :1]
            y = _relu(self._linear("mix", np.concatenate([z, seen, z * seen, z * summary, best], axis=1)))
            for i, dilation in enumerate(DILATIONS):
                name = f"convolutions.{i}"
                y = y + _relu(_convolution(y, w[f"{name}.weight"], w[f"{name}.bias"], dilation))
            logits = self._linear("ends", y) + y @ pointers.T / C**0.5
            logits[given.leads, 1] = -np.inf
            ends.append(logits)
        return ends

    def _linear(self, name: str, x: Array) -> Array:
        result: Array = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _log_sum(x: Array) -> float:
    most = float(x.max())
    return most + float(np.log(np.exp(x - most).sum()))


def _softmax(x: Array) -> Array:
    """Over the last axis."""
    x = np.exp(x - x.max(axis=-1, keepdims=True)) if x.size else x
    result: Array = x / x.sum(axis=-1, keepdims=True)
    return result


def _convolution(x: Array, weight: Array, bias: Array, dilation: int) -> Array:
    """x [n, C] → [n, C], zeros beyond both ends; weight [C, C, K] as PyTorch has it."""
    n, K = len(x), weight.shape[2]
    edge = np.zeros((K // 2 * dilation, x.shape[1]), x.dtype)
    padded = np.concatenate([edge, x, edge])
    result: Array = sum(padded[k * dilation : k * dilation + n] @ weight[:, :, k].T for k in range(K)) + bias
    return result


def best_span(logits: Array) -> tuple[int, int, float]:
    """The first and the last word of the likeliest answer of LONGEST words at most, and the sum of their logits."""
    starts, ends = logits[:, 0], logits[:, 1]
    reach = np.concatenate([ends, np.full(LONGEST - 1, -np.inf, ends.dtype)])
    windows = np.lib.stride_tricks.sliding_window_view(reach, LONGEST)
    sums = starts + windows.max(axis=1)
    first = int(sums.argmax())
    return first, first + int(windows[first].argmax()), float(sums[first])


@functools.cache
def shipped() -> SpanHead:
    """The head in the package."""
    return read(SHIPPED)


def read(path: Path) -> SpanHead:
    """Read a head that `training.spans` wrote. Raises InputError for a damaged one."""
    try:
        weights = load(path.read_bytes())
        listed = weights.pop("words").tobytes().decode().split("\n")
        scale = weights.pop("vectors.scale").astype(np.float32)
        vectors = weights.pop("vectors").astype(np.float32) * scale[:, None]
        return SpanHead(
            Vocabulary(listed), {**{n: z.astype(np.float32) for n, z in weights.items()}, "vectors": vectors}
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"loading the span head '{path}': expected a whole one, found: {error}") from error
