"""What is known of English: kinds of questions, classes of words."""

from __future__ import annotations

import pytest

from rwkv_stream.answers.english import CLASSES, KINDS, kind_of, listed


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Who was it?", "who"),
        ("How many men came?", "number"),
        ("How did the king feel about it?", "feeling"),
        ("What did the fox say?", "speech"),
        ("What happened when he left?", "happened"),
        ("In what year was it?", "when"),
        ("Which city is it?", "where"),
        ("What was the name of the ship?", "name"),
        ("Which boat is called Patience?", "name"),
        ("Somehow he whose name is lost came.", "who"),
        ("Name it.", ""),
    ],
)
def test_kinds_of_questions(question: str, kind: str) -> None:
    assert kind_of(question) == kind
    assert kind in (*KINDS, "")


def test_numerals_and_the_calendar_are_part_of_larger_classes() -> None:
    assert {"seven", "dozen"} < listed("numeral") < listed("number") - {"may"}
    assert {"may", "monday"} < listed("calendar") < listed("time")
    assert all(listed(name) for name in CLASSES)
