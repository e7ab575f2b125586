"""How well evidence is found, on documents that nothing was trained or chosen on, beside BM25 and without the ranker.

    python benchmarks/evidence.py CORPUS        # CORPUS: the folder of the training data

Articles (SQuAD) and tales (FairytaleQA), each whole document by itself, and each put into 3 MB of books. A sentence is
right that holds an answer of an annotator in the passage that the question was asked on; "±1" counts its neighbours.
BM25 is that of sentences, k1 1.2, b 0.75, with Snowball stems and without stop words; the blend is the score that the
ranker's candidates are found by. Then: what a question about another text is told, what becomes of ten questions in
each of several languages, and the time of the process for a question.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import Stemmer

from rwkv_stream.answers import ranker
from rwkv_stream.answers.candidates import Text
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

Values = np.ndarray[Any, Any]


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
    """A question, how it was judged, and what BM25 alone finds first: the sentence, and one beside it."""

    judged: Judged
    bm25: bool
    bm25_near: bool
    confidence: float

    @property
    def is_told(self) -> bool:
        return self.confidence >= ranker.shipped().threshold("en", self.judged.sentences)


def asked(documents: Sequence[Document], shelf: evidence.Shelf | None) -> list[Asked]:
    """All questions that have an answer, each on its document, alone or put into a shelf."""
    random, found, used = Random(0), [], ranker.shipped()
    books = [Bm25(text) for text in shelf.texts] if shelf else []
    for document in documents:
        own = MemoryText(document.text)
        index = Bm25(own)
        text, start = shelf.with_text(own, random) if shelf else (own, 0)
        for question, right in zip(document.questions, evidence.right(document, own), strict=True):
            if not right:
                continue
            scores = index.scores(question.text, books)
            best = int(np.argmax(scores[0]))
            is_own = scores[0].max() >= max((z.max() for z in scores[1:]), default=0)
            near = {index.spans[z] for z in (best - 1, best, best + 1) if 0 <= z < len(index.spans)}
            judged = evidence.judged(question.text, document.kind, text, right, start, kept=used.kept)
            sure = 0.0
            if len(judged.right):
                ranks = used.scores(judged.values)
                sure = float(used.confidence(judged.values, ranks, judged.sentences)[np.argmax(ranks)])
            found.append(Asked(judged, is_own and index.spans[best] in right, is_own and bool(near & right), sure))
    return found


def order(judged: Judged) -> Values:
    return np.argsort(-ranker.shipped().scores(judged.values), kind="stable")


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
    ranks = [order(z.judged) if len(z.judged.right) else np.zeros(0, int) for z in questions]
    judged = [z.judged for z in questions]
    return {
        "BM25": (np.array([z.bm25 for z in questions]), np.array([]), np.array([z.bm25_near for z in questions])),
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
    }


def elsewhere(documents: Sequence[Document], shelf: evidence.Shelf) -> list[tuple[str, bool]]:
    """Every question asked of a text that it is not about: the kind of text, and whether there is evidence."""
    random, found = Random(0), []
    texts = {z.name: MemoryText(z.text) for z in documents}
    for document in documents:
        for question in document.questions:
            if question.answers:
                kind = random.choice(("article", "tale", "book"))
                names = [z.name for z in documents if z.kind == kind and z.name != document.name]
                text: Text = shelf if kind == "book" else texts[random.choice(names)]
                found.append((kind, bool(find(question.text, [text], k=1))))
    return found


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

    rows = [("asked for", *(f"{kind}: n, BM25, blend, ranker" for kind in KINDS))]
    for kind_of_question in (
        "who",
        "when",
        "where",
        "why",
        "number",
        "how",
        "feeling",
        "happened",
        "speech",
        "what",
        "which",
        "",
    ):
        row = [kind_of_question or "other"]
        for kind in KINDS:
            some = [z for z in alone if z.judged.kind == kind and ranker.kind_of(z.judged.question) == kind_of_question]
            shares = [percent(measured[0]) for measured in methods(some).values()]
            row.append(f"{len(some)}: {', '.join(shares)}")
        rows.append(row)
    show("First sentence right by kind of question, alone", rows)

    rows = [("text", "evidence given", "of these, ±1 holds the answer", "mean confidence")]
    for where, questions in (("alone", alone), ("in 3 MB of books", among_books)):
        for kind in KINDS:
            some = [z for z in questions if z.judged.kind == kind]
            given_for = [z for z in some if z.is_told]
            held = [bool(z.judged.held[order(z.judged)[0]]) for z in given_for]
            rows.append(
                (
                    f"{kind}, {where}",
                    percent([z.is_told for z in some]),
                    percent(held),
                    percent([z.confidence for z in given_for]),
                )
            )
    quoted = elsewhere(documents, shelf)
    for kind in ("article", "tale", "book"):
        some_quoted = [z for where, z in quoted if where == kind]
        rows.append((f"another {kind}, n = {len(some_quoted)}", percent(some_quoted), "", ""))
    rows.append((f"another text, n = {len(quoted)}", percent([z for _, z in quoted]), "", ""))
    show("Evidence given, in %", rows)
    show("Ten questions in each language", [("language", "questions", "first right", "nothing found"), *languages()])
    show("Process time and memory of a question", cost(documents, shelf))


if __name__ == "__main__":
    main()
