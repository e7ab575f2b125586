"""How well `ask` answers about the sample story: overlap-F1 of its answers, beside a baseline without any model.

    python benchmarks/answers.py                          # reads the story with the shipped model, then asks
    python benchmarks/answers.py --store books.store      # the same, keeping (or going on from) that store
    python benchmarks/answers.py --answers answers.jsonl  # judges what `rwkv-stream ask -o answers.jsonl` wrote

Overlap-F1 is that of SQuAD: words in lower case, without punctuation and articles; F1 of the words that the answer and
the right answer share, 0 to 1, mean over all questions. "exact" is the share of questions where all words agree.
The baseline answers with the sentence of the story that has most words in common with the question.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv_stream.evaluation.answering import overlap_f1, words

SAMPLES = Path(__file__).parents[1] / "samples"
STORY = SAMPLES / "story.txt"
QUESTIONS = SAMPLES / "questions.jsonl"

# After a full stop, which a quotation mark may follow, but not that of a title; and between paragraphs.
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+|\n\n")


def sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in SENTENCE_END.split(text) if sentence.strip()]


def nearest_sentence(question: str, candidates: Sequence[str]) -> str:
    """The sentence with most different words in common with the question; of several the shortest, then the first."""
    asked = set(words(question))

    def rank(sentence: str) -> tuple[int, int]:
        found = words(sentence)
        return -len(asked & set(found)), len(found)

    return min(candidates, key=rank)


def judge(answers: Sequence[str], questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over all questions."""
    right = [question["answer"] for question in questions]
    f1 = [overlap_f1(a, r) for a, r in zip(answers, right, strict=True)]
    exact = [words(a) == words(r) for a, r in zip(answers, right, strict=True)]
    return {"f1": round(sum(f1) / len(f1), 4), "exact": round(sum(exact) / len(exact), 4)}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def written_answers(path: Path, questions: Sequence[dict[str, Any]]) -> list[str]:
    """The answers of a file in the order of the questions, found by `id`. Raises SystemExit where one is missing."""
    by_id = {str(row["id"]): row["answer"] for row in read_jsonl(path)}
    missing = [question["id"] for question in questions if question["id"] not in by_id]
    if missing:
        raise SystemExit(f"judging '{path}': expected an answer for each question, found none for {', '.join(missing)}")
    return [by_id[question["id"]] for question in questions]


def asked_answers(
    questions: Sequence[dict[str, Any]], model_path: str | None, store_path: Path
) -> tuple[list[str], dict[str, str]]:
    """The answers after reading the whole story, and which model and snapshot gave them."""
    import rwkv_stream as rs
    from rwkv_stream.answers.prompts import Question

    model = rs.load(model_path)
    store = rs.Store(store_path, create=True)
    report = rs.ingest(str(STORY), name=STORY.name, model=model, store=store)
    asked = [Question(question["question"], question["id"], i) for i, question in enumerate(questions)]
    answers = [answer.answer for answer in rs.ask(asked, snapshot=store.get(report.snapshot), model=model)]
    return answers, {"model": model.fingerprint, "snapshot": report.snapshot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a checkpoint (default: the shipped model)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="keep the reading here (default: nowhere)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="judge these answers instead of asking a model")
    parser.add_argument("--show", action="store_true", help="print every answer beside the right one")
    parser.add_argument("--json", action="store_true", help="one JSON object, with all answers")
    given = parser.parse_args()

    questions = read_jsonl(QUESTIONS)
    story = sentences(STORY.read_text(encoding="utf-8"))
    baseline = [nearest_sentence(question["question"], story) for question in questions]
    by_whom: dict[str, str] = {}
    if given.answers:
        answers = written_answers(given.answers, questions)
    elif given.store:
        answers, by_whom = asked_answers(questions, given.model, given.store)
    else:
        with tempfile.TemporaryDirectory() as folder:
            answers, by_whom = asked_answers(questions, given.model, Path(folder) / "answers.store")

    figures = {"ask": judge(answers, questions), "nearest_sentence": judge(baseline, questions)}
    pairs = [
        {
            "id": question["id"],
            "right": question["answer"],
            "answer": answer,
            "f1": overlap_f1(answer, question["answer"]),
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    if given.json:
        print(json.dumps({"questions": len(questions), **by_whom, **figures, "answers": pairs}, ensure_ascii=False))
        return
    if given.show:
        for pair in pairs:
            print(f"{pair['id']}  {pair['f1']:.2f}  {pair['right']}  |  {pair['answer']}")
    print(f"{len(questions)} questions{'f1':>17}{'exact':>9}")
    for name, means in figures.items():
        print(f"{name.replace('_', ' '):20}{means['f1']:9.4f}{means['exact']:9.4f}")


if __name__ == "__main__":
    main()
