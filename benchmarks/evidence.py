"""How well evidence is found, on documents that nothing was trained or chosen on, beside BM25 and without the ranker.

    python benchmarks/evidence.py CORPUS                 # CORPUS: the folder of the training data
    python benchmarks/evidence.py CORPUS --out FOLDER    # evidence.parquet and evidence.png there, too

Articles (SQuAD) and tales (FairytaleQA), each whole document by itself, and each put into 3 MB of books. A sentence is
right that holds an answer of an annotator in the passage that the question was asked on; "±1" counts its neighbours.
BM25 is that of sentences, k1 1.2, b 0.75, with Snowball stems and without stop words; the blend is the score that the
ranker's candidates are found by; the quote is the sentence that the short answer stands in, of the passage that the
ranker puts first. Then: how it goes in 1, 3 and 10 MB of books, what a question about another text is
told, what becomes of ten questions in each of several languages, and the time of the process for a question. The table
has a row for every question in every text that it was asked of; the picture shows how often passages of a confidence
hold the answer, how many questions get one for how many right, and how many questions about other texts get one.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import Stemmer

from rwkv_stream.answers import english, quote, ranker
from rwkv_stream.answers.candidates import Text
from rwkv_stream.answers.english import kind_of
from rwkv_stream.answers.evidence import MemoryText, find, ranked
from rwkv_stream.evaluation import evidence
from rwkv_stream.evaluation.evidence import KINDS, Document, Judged
from rwkv_stream.text import terms
from rwkv_stream.training import split

ROOT = Path(__file__).parents[1]
LANGUAGES = ROOT / "tests" / "answers" / "lighthouse.json"
ANSWERS = (0, 2, 3, 4, 5, 6, 7, 9, 10, 11)  # the sentence that answers each question
SHELF = 3_000_000  # characters
SHELF_FILE = 4  # of the books; the ranker saw others
HAYSTACKS = (1_000_000, SHELF, 10_000_000)  # characters
BINS = 10  # of confidence, of like many questions

Values = np.ndarray[Any, Any]
NONE: Values = np.zeros(0, np.float32)
Pair = tuple[bool, bool]


class Bm25:
    """An index of the sentences of a text, for BM25 by itself."""

    def __init__(self, text: MemoryText) -> None:
        self._stemmer = Stemmer.Stemmer("english")
        self.spans = evidence.spans(text)
        counts = [Counter(self.terms(text.read(*span).decode())) for span in self.spans]
        self.lengths = np.array([sum(z.values()) for z in counts])
        self.hits: dict[str, tuple[list[int], list[int]]] = {}
        for i, found in enumerate(counts):
            for term, n in found.items():
                at, often = self.hits.setdefault(term, ([], []))
                at.append(i)
                often.append(n)

    def terms(self, text: str) -> list[str]:
        words = terms.words(text)
        return self._stemmer.stemWords([z for z in words if z not in terms.stop_words("en")])

    def scores(self, question: str, others: Sequence[Bm25] = ()) -> list[Values]:
        """Of the sentences of this text, and of others that are searched with it."""
        indexes = (self, *others)
        n, length = sum(len(z.lengths) for z in indexes), sum(z.lengths.sum() for z in indexes)
        found = [np.zeros(len(z.lengths)) for z in indexes]
        for term in set(self.terms(question)):
            df = sum(len(z.hits.get(term, ((), ()))[0]) for z in indexes)
            for z, scores in zip(indexes, found, strict=True):
                at, often = (np.array(column, int) for column in z.hits.get(term, ((), ())))
                damped = 1.2 * (0.25 + 0.75 * z.lengths[at] * n / length)
                scores[at] += np.log1p((n - df + 0.5) / (df + 0.5)) * often * 2.2 / (often + damped)
        return found


@dataclass
class Asked:
    """A question, how it was judged, and whether what BM25 alone finds first, and what is quoted, are right: the
    sentence, and it or one beside it."""

    judged: Judged
    bm25: Pair = (False, False)
    quote: Pair = (False, False)

    @functools.cached_property
    def scores(self) -> Values:
        """Of the candidates, by the ranker."""
        return ranker.shipped().scores(self.judged.values) if len(self.judged.right) else NONE

    @functools.cached_property
    def order(self) -> Values:
        """The candidates as they are ranked."""
        return np.argsort(-self.scores, kind="stable")

    @functools.cached_property
    def confidence(self) -> float:
        """That of the first; 0 where nothing was found."""
        if not len(self.order):
            return 0.0
        one = self.judged
        return float(ranker.shipped().confidence(one.values, self.scores, one.sentences)[self.order[0]])

    @property
    def is_told(self) -> bool:
        return self.confidence >= ranker.shipped().threshold("en", self.judged.sentences)


def asked(documents: Sequence[Document], shelf: evidence.Shelf | None, *, with_others: bool = True) -> list[Asked]:
    """All questions that have an answer, each on its document, alone or put into a shelf; with BM25 and quotes, too."""
    random, found, used = Random(0), [], ranker.shipped()
    books = [Bm25(text) for text in shelf.texts] if shelf and with_others else []
    for document in documents:
        own = MemoryText(document.text)
        index = Bm25(own) if with_others else None
        text, start = shelf.with_text(own, random) if shelf else (own, 0)
        for question, right in zip(document.questions, evidence.right(document, own), strict=True):
            if not right:
                continue
            judged = evidence.judged(question.text, document.kind, text, right, start, kept=used.kept)
            one = Asked(judged)
            if index is not None:
                one.bm25 = first_of_bm25(index, question.text, books, right)
                one.quote = quoted(question.text, text, {(a + start, b + start) for a, b in right})
            found.append(one)
    return found


def quoted(question: str, text: Text, right: set[evidence.Span]) -> Pair:
    """Whether the sentence that is quoted is right, and whether it or a neighbour is."""
    for passage in ranked(question, [text]).passages([text]):
        one = quote.of_passage(question, passage, text.document)
        near = any(one.passage_start <= a and b <= one.passage_end for a, b in right)
        return (one.sentence_start, one.sentence_end) in right, near
    return False, False


def first_of_bm25(index: Bm25, question: str, books: Sequence[Bm25], right: frozenset[evidence.Span]) -> Pair:
    """Whether the sentence that BM25 finds first is right, and whether it or a neighbour is."""
    scores = index.scores(question, books)
    best = int(np.argmax(scores[0]))
    is_own = scores[0].max() >= max((z.max() for z in scores[1:]), default=0)
    near = {index.spans[z] for z in (best - 1, best, best + 1) if 0 <= z < len(index.spans)}
    return is_own and index.spans[best] in right, is_own and bool(near & right)


def percent(values: Sequence[float]) -> str:
    return f"{100 * float(np.mean(values)):.1f}" if len(values) else "–"


def show(title: str, rows: Sequence[Sequence[object]]) -> None:
    print(f"\n{title}\n")
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if not i:
            print("|" + "---|" * len(row))
    sys.stdout.flush()


def methods(questions: Sequence[Asked]) -> dict[str, tuple[Values, Values, Values]]:
    """For each method: whether the first sentence is right, one of the first five is, the first passage holds it."""
    judged = [z.judged for z in questions]
    ranks = [z.order for z in questions]
    return {
        "BM25": beside([z.bm25 for z in questions]),
        "blend": (
            np.array([z.right[:1].any() for z in judged]),
            np.array([z.right[:5].any() for z in judged]),
            np.array([z.held[:1].any() for z in judged]),
        ),
        "ranker": (
            np.array([z.right[r[:1]].any() for z, r in zip(judged, ranks, strict=True)]),
            np.array([z.right[r[:5]].any() for z, r in zip(judged, ranks, strict=True)]),
            np.array([z.held[r[:1]].any() for z, r in zip(judged, ranks, strict=True)]),
        ),
        "quote": beside([z.quote for z in questions]),
    }


def beside(found: Sequence[Pair]) -> tuple[Values, Values, Values]:
    """As `methods` gives it, of what gives one sentence alone."""
    first, near = np.array(found, bool).reshape(-1, 2).T
    return first, np.array([]), near


def elsewhere(documents: Sequence[Document], shelf: evidence.Shelf) -> list[tuple[str, Asked]]:
    """Every question asked of a text that it is not about, with the kind of that text."""
    random, found, used = Random(0), [], ranker.shipped()
    texts = {z.name: MemoryText(z.text) for z in documents}
    for document in documents:
        for question in document.questions:
            if question.answers:
                kind = random.choice(("article", "tale", "book"))
                names = [z.name for z in documents if z.kind == kind and z.name != document.name]
                text: Text = shelf if kind == "book" else texts[random.choice(names)]
                judged = evidence.judged(question.text, document.kind, text, frozenset(), kept=used.kept)
                found.append((kind, Asked(judged)))
    return found


def table(asked_in: Mapping[str, Sequence[Asked]], others: Sequence[tuple[str, Asked]]) -> pa.Table:
    """A row for each question in each text: what kind it is, how sure the first passage is, and whether it is right."""
    rows = [(where, False, z) for where, questions in asked_in.items() for z in questions]
    rows += [(f"another {kind}", True, z) for kind, z in others]
    return pa.table(
        {
            "text": [where for where, _, _ in rows],
            "about_another_text": [is_other for _, is_other, _ in rows],
            "document": [z.judged.kind for _, _, z in rows],
            "asked_for": [kind_of(z.judged.question) for _, _, z in rows],
            "sentences": pa.array([z.judged.sentences for _, _, z in rows], pa.int32()),
            "confidence": pa.array([z.confidence for _, _, z in rows], pa.float32()),
            "told": [z.is_told for _, _, z in rows],
            "sentence_right": [bool(z.judged.right[z.order[:1]].any()) for _, _, z in rows],
            "passage_right": [bool(z.judged.held[z.order[:1]].any()) for _, _, z in rows],
        }
    )


def calibration(rows: pa.Table) -> evidence.Calibration:
    return evidence.calibration(rows["confidence"].to_numpy(), rows["passage_right"].to_numpy(), BINS)


def draw(rows: pa.Table, path: Path) -> None:
    """The picture: reliability, right of those that are told, told of those about other texts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    calibrated, answered, silent = figure.subplots(1, 3)
    calibrated.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    alone = rows.filter(pc.equal(rows["text"], "alone"))
    limits = np.linspace(0, 0.99, 100)
    for kind, color in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
        some = alone.filter(pc.equal(alone["document"], kind))
        found = calibration(some)
        calibrated.errorbar(
            found.confidence,
            found.right,
            found.half_widths,
            color=color,
            marker="o",
            markersize=3,
            label=f"{kind}s, mean error {found.error:.3f}",
        )
        sure, right = some["confidence"].to_numpy(), some["passage_right"].to_numpy()
        told = [sure >= limit for limit in limits if (sure >= limit).sum() >= 20]
        answered.plot([z.mean() for z in told], [right[z].mean() for z in told], color=color, label=f"{kind}s")
        shown = some["told"].to_numpy()
        answered.plot(shown.mean(), right[shown].mean(), color=color, marker="o")
    others = rows.filter(rows["about_another_text"])
    for name in sorted(set(others["text"].to_pylist())):
        sure = others.filter(pc.equal(others["text"], name))["confidence"].to_numpy()
        silent.plot(limits, [(sure >= limit).mean() for limit in limits], label=name)
    for axes, x, y in (
        (calibrated, "confidence", "passages that hold the answer"),
        (answered, "questions that get a quote (dot: as shipped)", "of these, right"),
        (silent, "least confidence", "questions about another text that get a quote"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def languages() -> list[tuple[str, int, int, int]]:
    """For each language: questions, those whose first sentence is right, those that find nothing."""
    rows = []
    for language, one in json.loads(LANGUAGES.read_text("utf-8")).items():
        text = MemoryText("\n\n".join(one["text"]))
        found = [find(question, [text], k=1) for question in one["questions"]]
        right = [z and z[0].sentence == one["text"][a] for z, a in zip(found, ANSWERS, strict=True)]
        rows.append((language, len(found), sum(map(bool, right)), sum(not z for z in found)))
    return rows


def cost(documents: Sequence[Document], shelf: evidence.Shelf) -> list[tuple[object, ...]]:
    """Process time in ms and peak memory in MiB of a question, in the shelf and in ten of them; ms of the import."""
    questions = [z.text for document in documents for z in document.questions[:5]]
    rows: list[tuple[object, ...]] = [("text", "median ms", "95 % below, ms", "peak, MiB")]
    for name, text in (("3 MB", shelf), ("30 MB", evidence.Shelf(shelf.texts * 10))):
        times = [timed(question, text) for question in questions[:100]]
        tracemalloc.start()
        ranked(questions[0], [text])
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        rows.append((name, f"{np.median(times):.1f}", f"{np.quantile(times, 0.95):.1f}", f"{peak:.1f}"))
    probe = (
        "import time; at = time.process_time(); import rwkv_stream.answers.evidence, rwkv_stream.answers.ranker as r;"
        "r.shipped(); print(1000 * (time.process_time() - at))"
    )
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    return [*rows, ("import", f"{float(shown):.0f}", "", "")]


def timed(question: str, text: Text) -> float:
    begun = time.process_time()
    ranked(question, [text])
    return 1000 * (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, help="where the table and the picture are written")
    given = parser.parse_args()
    documents = list(evidence.documents(given.corpus, split.read(ROOT / "recipes" / "split.toml"), "report"))
    shelf = evidence.shelf(given.corpus, SHELF, SHELF_FILE)
    alone, among_books = asked(documents, None), asked(documents, shelf)
    rows: list[Sequence[object]] = [("text", "method", "sentence", "one of five", "±1")]
    for where, questions in (("alone", alone), ("in 3 MB of books", among_books)):
        for kind in KINDS:
            some = [z for z in questions if z.judged.kind == kind]
            for name, measured in methods(some).items():
                rows.append((f"{kind}, {where}, n = {len(some)}", name, *map(percent, measured)))
    show("First sentence right, right one among five, first passage right, in %", rows)

    rows = [("asked for", *(f"{kind}: n, BM25, blend, ranker, quote" for kind in KINDS))]
    for kind_of_question in (*english.KINDS, ""):
        row = [kind_of_question or "other"]
        for kind in KINDS:
            some = [z for z in alone if z.judged.kind == kind and kind_of(z.judged.question) == kind_of_question]
            shares = [percent(measured[0]) for measured in methods(some).values()]
            row.append(f"{len(some)}: {', '.join(shares)}")
        rows.append(row)
    show("First sentence right by kind of question, alone", rows)

    rows = [("text", "evidence given", "of these, ±1 holds the answer", "mean confidence")]
    for where, questions in (("alone", alone), ("in 3 MB of books", among_books)):
        for kind in KINDS:
            some = [z for z in questions if z.judged.kind == kind]
            given_for = [z for z in some if z.is_told]
            held = [bool(z.judged.held[z.order[0]]) for z in given_for]
            rows.append(
                (
                    f"{kind}, {where}",
                    percent([z.is_told for z in some]),
                    percent(held),
                    percent([z.confidence for z in given_for]),
                )
            )
    others = elsewhere(documents, shelf)
    for kind in ("article", "tale", "book"):
        some_quoted = [z.is_told for where, z in others if where == kind]
        rows.append((f"another {kind}, n = {len(some_quoted)}", percent(some_quoted), "", ""))
    rows.append((f"another text, n = {len(others)}", percent([z.is_told for _, z in others]), "", ""))
    show("Evidence given, in %", rows)
    hidden = {0: alone, SHELF: among_books}
    rows = [("books, MB", *(f"{kind}: sentence, ±1, told, right of these" for kind in KINDS))]
    for characters in (0, *HAYSTACKS):
        if characters not in hidden:
            more = evidence.shelf(given.corpus, characters, SHELF_FILE)
            hidden[characters] = asked(documents, more, with_others=False)
        row = [str(characters // 1_000_000)]
        for kind in KINDS:
            some = [z for z in hidden[characters] if z.judged.kind == kind]
            sentence, _, near = methods(some)["ranker"]
            told = np.array([z.is_told for z in some])
            row.append(", ".join(map(percent, (sentence, near, told, near[told]))))
        rows.append(row)
    show("The ranker in haystacks", rows)
    for kind in KINDS:
        made = table({"alone": [z for z in alone if z.judged.kind == kind]}, [])
        print(f"expected calibration error, {kind}, alone: {calibration(made).error:.3f}")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        names = {n: f"{n // 1_000_000} MB of books" if n else "alone" for n in hidden}
        made = table({names[n]: questions for n, questions in hidden.items()}, others)
        pq.write_table(made, given.out / "evidence.parquet", compression="zstd")
        draw(made, given.out / "evidence.png")
    show("Ten questions in each language", [("language", "questions", "first right", "nothing found"), *languages()])
    show("Process time and memory of a question", cost(documents, shelf))


if __name__ == "__main__":
    main()
