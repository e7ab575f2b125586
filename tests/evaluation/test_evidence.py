"""Questions on whole documents: how documents are put together, and which sentences are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import zstandard

from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.evaluation import evidence
from rwkv_stream.training.split import Split, key

PASSAGES = ("Norse raiders came to Ely in 911. Rollo led them.", "The abbey was built in 1083. Rollo was dead by then.")
TALE = "Once a fox lived in Ely.\n\nThe fox ate\na goose. The goose was old. Ünal laughed."


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(zstandard.compress("".join(json.dumps(z) + "\n" for z in records).encode()))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    def asked(passage: str, question: str, *answers: str) -> dict[str, Any]:
        return {
            "title": "Ely",
            "context": passage,
            "question": question,
            "answer": "",
            "answers": list(answers),
            "unanswerable": not answers,
        }

    write(
        tmp_path / evidence.ARTICLES,
        [
            asked(PASSAGES[0], "Who led the raiders?", "Rollo"),
            asked(PASSAGES[1], "When was the abbey built?", "1083", "in 1083"),
            asked(PASSAGES[0], "Who fled?"),
        ],
    )
    on_tale = {
        "document": "tales/fox",
        "context": "The fox ate a goose. The goose was old.",
        "question": "What was eaten?",
    }
    for stories, questions in evidence.TALES:
        is_held = stories.startswith("valid")
        write(tmp_path / stories, [] if is_held else [{"id": "tales/fox", "text": TALE}])
        write(tmp_path / questions, [] if is_held else [on_tale | {"answers": ["a goose"]}])
    write(tmp_path / evidence.BOOKS.format(0), [{"text": "A bell rang. " * 60}, {"text": "No lamp was lit. " * 60}])
    return tmp_path


def test_articles_are_joined_from_their_passages(corpus: Path) -> None:
    article, tale = evidence.documents(corpus, Split(), "train")
    assert (article.name, article.kind, article.text) == ("Ely", "article", "\n\n".join(PASSAGES))
    assert [(z.text, article.text[slice(*z.passage)], z.answers) for z in article.questions] == [
        ("Who led the raiders?", PASSAGES[0], ("Rollo",)),
        ("Who fled?", PASSAGES[0], ()),
        ("When was the abbey built?", PASSAGES[1], ("1083", "in 1083")),
    ]
    assert tale.text[slice(*tale.questions[0].passage)] == "The fox ate\na goose. The goose was old."
    of_ely = key({"title": "Ely"})
    assert [z.kind for z in evidence.documents(corpus, Split(tune=(of_ely,)), "train")] == ["tale"]
    assert [z.kind for z in evidence.documents(corpus, Split(tune=(of_ely,)), "tune")] == ["article"]


def test_sentences_are_right_that_hold_an_answer_within_the_passage(corpus: Path) -> None:
    found = {}
    for document in evidence.documents(corpus, Split(), "train"):
        text = MemoryText(document.text)
        for question, spans in zip(document.questions, evidence.right(document, text), strict=True):
            found[question.text] = {text.read(*span).decode() for span in spans}
    assert found == {
        "Who led the raiders?": {"Rollo led them."},
        "Who fled?": set(),
        "When was the abbey built?": {"The abbey was built in 1083."},
        "What was eaten?": {"The fox ate\na goose."},
    }


def test_a_text_is_put_into_a_shelf_and_cut_out_of_a_text(corpus: Path) -> None:
    shelf = evidence.shelf(corpus, 1200, 0)
    own = MemoryText(TALE)
    for seed in range(4):
        joined, start = shelf.with_text(own, Random(seed))
        assert joined.read(start, start + own.byte_end) == TALE.encode()
        spans = evidence.spans(joined)
        assert spans == sorted(spans)
        assert {(a - start, b - start) for a, b in spans} >= set(evidence.spans(own))
        around = evidence.spans(own)[2]
        part, begin = evidence.excerpt(own, around, 2, Random(seed))
        assert len(evidence.spans(part)) == 2
        assert (around[0] - begin, around[1] - begin) in evidence.spans(part)


def test_candidates_are_judged_by_the_place_of_the_document(corpus: Path) -> None:
    tale = list(evidence.documents(corpus, Split(), "train"))[1]
    own = MemoryText(tale.text)
    (answers,) = evidence.right(tale, own)
    joined, start = evidence.shelf(corpus, 1200, 0).with_text(own, Random(1))
    judged = evidence.judged("What goose was eaten by the fox?", "tale", joined, answers, start, kept={})
    assert judged.right.sum() == 1
    assert judged.held.sum() >= 2, "neighbours hold it, too"
    assert judged.values.shape[0] == len(judged.right)
    assert judged.sentences == len(evidence.spans(joined))
    assert not evidence.judged("What goose?", "tale", joined, frozenset(), kept={}).right.any()


def test_words_are_learnt_by_how_often_answers_have_them() -> None:
    texts = [f"The hero{i} took a sword. A horse came." for i in range(12)]
    documents = [
        evidence.Document(
            str(i), "tale", text, (evidence.Question("What type of thing took he?", (0, 40), ("sword",)),)
        )
        for i, text in enumerate(texts)
    ]
    kept = evidence.kept_words(documents)
    assert set(kept) == {"type", "thing", "take"}
    assert kept["take"] > 0.8 > 0.3 > kept["type"]
    assert evidence.kept_words(documents[:3] * 4) == {}, "words of few documents are names"


def test_confidence_is_compared_with_what_was_right() -> None:
    sure = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3])
    found = evidence.calibration(sure, np.array([True, False, True, False, False, False]), 2)
    assert found.confidence.tolist() == pytest.approx([0.2, 0.8])
    assert found.right.tolist() == pytest.approx([0, 2 / 3])
    assert found.half_widths.tolist() == pytest.approx([0, 1.96 * math.sqrt(2 / 9 / 3)])
    assert found.error == pytest.approx((0.2 + (0.8 - 2 / 3)) / 2)
