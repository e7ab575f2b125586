"""Answers are judged as SQuAD judges them, and questions stand where their order says."""

from __future__ import annotations

import pytest

from rwkv_stream.answers.prompts import FAMILIES, around
from rwkv_stream.evaluation import answering
from rwkv_stream.evaluation.answering import Asked
from rwkv_stream.model import load

HAT = Asked("Anna wore a red hat. Ben had none.", "What did Anna wear?", ("a red hat", "the hat"))
SHIP = Asked("The ship left at nine.", "When did it leave?", ("at nine",))
NONE = Asked("The ship left at nine.", "Who was on board?", ())


def test_judged() -> None:
    found = answering.judged([HAT, SHIP, NONE], ["A RED hat!", "ship at ten", "nobody"])
    assert found.n == 2
    assert found.exact == pytest.approx(1 / 2)
    assert found.f1 == pytest.approx((1 + 2 * 1 / (3 + 2)) / 2)  # "ship at ten" and "at nine" share "at"
    assert found.quoted == pytest.approx(1 / 2)  # the words of the other do not follow each other


@pytest.mark.parametrize(
    ("answer", "is_quoted"),
    [("red hat", True), ("hat red", False), ("ed ha", False), ("the", False), ("Ben had", True)],
)
def test_is_quoted(answer: str, is_quoted: bool) -> None:
    assert answering.is_quoted(answer, HAT.passage) is is_quoted


def test_prompts_by_order() -> None:
    form, asked = FAMILIES["rwkv-stream"], (SHIP.question, SHIP.passage)
    assert around(form, *asked, "after") == "The ship left at nine.\n\nQuestion: When did it leave?\nAnswer:"
    assert around(form, *asked, "before") == "Question: When did it leave?\n\nThe ship left at nine.\nAnswer:"
    both = "Question: When did it leave?\n\nThe ship left at nine.\n\nQuestion: When did it leave?\nAnswer:"
    assert around(form, *asked) == both


def test_records() -> None:
    record = {"context": "C", "question": "Q", "answer": "x", "answers": ["x", "y"]}
    assert Asked.of(record).answers == ("x", "y")
    assert Asked.of({"context": "C", "question": "Q", "answer": "x"}).answers == ("x",)
    assert Asked.of({**record, "unanswerable": True}).answers == ()


def test_answers_do_not_depend_on_their_neighbours() -> None:
    model = load(device="cpu")
    together = list(answering.answers(model, [HAT, SHIP, NONE]))
    assert together[1] == next(answering.answers(model, [SHIP]))
    assert all("\n" not in answer and answer == answer.strip() for answer in together)
