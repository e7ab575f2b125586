"""Make the network that finds short answers, `rwkv_stream/answers/spans.safetensors`, from the data in CORPUS.

    python recipes/spans.py CORPUS             # about a quarter of an hour of one core; after recipes/ranker.py
    python recipes/spans.py CORPUS --measure   # how good the one in the package is on what is reported on

What `split.toml` reports on is trained on nowhere. Passages are those that rankers find that never saw the question's
document: two of them, each grown on half of the documents.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import ranker as ranking
import torch

from rwkv_stream.answers import english, ranker, spans
from rwkv_stream.answers.candidates import candidates
from rwkv_stream.answers.evidence import MemoryText, ranked, sentences
from rwkv_stream.answers.passages import Found, around
from rwkv_stream.evaluation import evidence
from rwkv_stream.evaluation.answering import overlap_f1, words
from rwkv_stream.evaluation.evidence import Document
from rwkv_stream.training import data, split
from rwkv_stream.training import spans as training
from rwkv_stream.training.spans import Example, Network
from rwkv_stream.training.word_vectors import word_vectors

FILE = Path(__file__).parents[1] / "rwkv_stream" / "answers" / "spans.safetensors"
ABOUT = (
    "Finds short answers in passages. Made by recipes/spans.py from FairytaleQA (Apache-2.0) and SQuAD (CC BY-SA 4.0, "
    "its texts from Wikipedia), which it may be held to be adapted from: see NOTICE."
)
READ = {
    "encyclopedia": 6,
    "stories": 3,
    "books-00": 14,
    "books-02": 14,
    "textbooks": 8,
    "speeches": 2,
}  # million characters
WORDS, DIMENSION = 10_000, 64
EPOCHS, SEED = 8, 0
PASSAGES = 1  # of a question, while it trains


def texts(corpus: Path, chosen: split.Split) -> Iterator[str]:
    """What word vectors are made of."""
    for name, millions in READ.items():
        left, file = millions * 1_000_000, f"{name}.jsonl.zst"
        for record in data.records(corpus / file):
            if left > 0 and chosen.part(file, record) == "train":
                left -= len(record["text"])
                yield record["text"]


def found(
    document: Document, used: ranker.Ranker, most: int
) -> Iterator[tuple[evidence.Question, list[Found], list[list[bool]]]]:
    """The answerable questions on a document, with the passages that a ranker finds, and which of their sentences stand
    in the passage that each was asked on."""
    text = MemoryText(document.text)
    for question in document.questions:
        if not question.answers:
            continue
        some = candidates(question.text, [text])
        if not len(some):
            continue
        values = ranker.features(some, sentences(some, [text]), used.kept)[1]
        scores = used.scores(values)
        order = np.argsort(-scores, kind="stable")
        passages = list(islice(around(some.best(order), scores[order], np.zeros(len(order)), [text]), most))
        first, last = (len(document.text[:at].encode()) for at in question.passage)
        yield question, passages, [[first <= start < last for start, _ in one.sentences] for one in passages]


def examples(documents: Sequence[Document], used: ranker.Ranker, vocabulary: spans.Vocabulary) -> Iterator[Example]:
    """What is learnt from: questions whose answer stands in one of the passages."""
    for document in documents:
        for question, passages, allowed in found(document, used, PASSAGES):
            seen = [vocabulary.inputs(question.text, one.passage) for one in passages]
            right = [
                training.right_spans(
                    [one.passage.sentences[word.sentence][word.start : word.end] for word in inputs.words],
                    question.answers,
                    [inside[word.sentence] for word in inputs.words],
                )
                for one, inputs, inside in zip(passages, seen, allowed, strict=True)
            ]
            if any(right):
                yield Example(
                    vocabulary.question(question.text),
                    spans.KINDS.index(english.kind_of(question.text)),
                    [inputs.features for inputs in seen],
                    [inputs.vectors for inputs in seen],
                    right,
                )


def halves(documents: Sequence[Document], corpus: Path) -> tuple[ranker.Ranker, ranker.Ranker]:
    """Rankers grown on every other document: that for the documents at even places, and that for the others."""
    kept = evidence.kept_words(documents)
    names = ranking.feature_names(documents[0], kept)
    shelf = evidence.shelf(corpus, ranking.SHELF, 0)
    made = []
    for odd in (1, 0):
        questions = ranking.asked(documents[odd::2], shelf, kept, 0, (0.3, 0, 0, 0))
        trees = ranking.grown(questions, 0)
        made.append(
            ranker.Ranker.of({"kept": kept, "features": names, "trees": trees, "confidence": {}, "thresholds": {}})
        )
    return made[0], made[1]


def measure(head: spans.SpanHead, documents: Sequence[Document], name: str) -> None:
    """Print F1 and exact match of answers from whole documents, for questions whose answer stands there word for word:
    of the best passage of all, and of those of which the text is said to speak."""
    used = ranker.shipped()
    judged: dict[str, list[tuple[float, float, float]]] = {}
    for document in documents:
        text = MemoryText(document.text)
        for question, right in zip(document.questions, evidence.right(document, text), strict=True):
            if not right:
                continue
            some = ranked(question.text, [text])
            answer, is_told = "", False
            for one in islice(some.passages([text]), 1):
                asked = some.candidates.asked
                is_told = one.confidence >= used.threshold(asked.language, asked.sentences)
                span = head.find(question.text, [one.passage])[0]
                answer = one.read(one.byte(span.first, span.first.start), one.byte(span.last, span.last.end))
            f1 = max(overlap_f1(answer, wanted) for wanted in question.answers)
            exact = any(words(answer) == words(wanted) for wanted in question.answers)
            judged.setdefault(document.kind, []).append((f1, exact, is_told))
    for kind, rows in judged.items():
        f1, exact, is_told = (np.array(column) for column in zip(*rows, strict=True))
        told = f"quoted {100 * is_told.mean():.1f} %, their F1 {100 * f1[is_told].mean():.1f}"
        print(
            f"{name} {kind}: n {len(rows)}, F1 {100 * f1.mean():.1f}, exact {100 * exact.mean():.1f}; {told}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure the network that is there")
    given = parser.parse_args()
    chosen = split.read(Path(__file__).with_name("split.toml"))
    part: split.Part = "report" if given.measure else "tune"
    if not given.measure:
        make(given.corpus, chosen)
    measure(spans.read(FILE), list(evidence.documents(given.corpus, chosen, part)), part)


def make(corpus: Path, chosen: split.Split) -> None:
    """Train the network and write its file."""
    torch.set_num_threads(1)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {text}", flush=True)

    listed, vectors = word_vectors(texts(corpus, chosen), WORDS, DIMENSION)
    vocabulary = spans.Vocabulary(listed)
    say(f"vectors of {len(listed)} words")
    train = list(evidence.documents(corpus, chosen, "train"))
    rankers = halves(train, corpus)
    say("rankers")
    made = list(chain.from_iterable(examples(train[odd::2], rankers[odd], vocabulary) for odd in (0, 1)))
    say(f"{len(made)} questions")
    network = Network(torch.from_numpy(vectors), made[0].features[0].shape[1], len(spans.KINDS), spans.DILATIONS)
    training.train(
        network,
        made,
        epochs=EPOCHS,
        seed=SEED,
        step=lambda done, of, loss: say(f"step {done} of {of}: {loss:.3f}") if done % 200 == 0 else None,
    )
    training.save(FILE, listed, network, {"about": ABOUT})
    say(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
