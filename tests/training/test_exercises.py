"""Exercises: their answers stand above them, and what is held out is never trained on."""

from __future__ import annotations

import dataclasses
import re

import pytest

from rwkv_stream.errors import UsageError
from rwkv_stream.training import exercises
from rwkv_stream.training.exercises import HELD_OUT, HELD_OUT_FACTS, TRAINED, Exercise, Exercises

KINDS = pytest.mark.parametrize("kind", Exercises.KINDS)
HELD = pytest.mark.parametrize("held_out", [False, True], ids=["trained", "held out"])


def text(exercise: Exercise) -> str:
    return "".join(piece.text for piece in exercise)


@KINDS
@HELD
def test_a_seed_decides_the_exercises(kind: str, held_out: bool) -> None:
    def made(seed: int) -> list[Exercise]:
        maker = Exercises(seed, held_out=held_out)
        return [maker.make(kind) for _ in range(5)]

    assert made(3) == made(3) != made(4)


@KINDS
@HELD
def test_each_answer_stands_in_what_is_above_it(kind: str, held_out: bool) -> None:
    maker = Exercises(7, held_out=held_out)
    for _ in range(40):
        above, answers = "", 0
        for piece in maker.make(kind):
            if piece.is_learnt:
                answers += 1
                assert piece.text.strip(" \n,.;").removeprefix("the ") in above, text(maker.make(kind))
                assert not above.endswith("\nAnswer:") or piece.text.endswith("\n")  # where it ends is learnt, too
            above += piece.text
        assert answers


@KINDS
def test_a_size_makes_them_longer(kind: str) -> None:
    short, long = ([len(text(Exercises(i).make(kind, size))) for i in range(20)] for size in (3, 12))
    assert sum(long) > 1.5 * sum(short)


def test_what_is_held_out_is_apart() -> None:
    for field in dataclasses.fields(TRAINED):
        shared = set(getattr(TRAINED, field.name)) & set(getattr(HELD_OUT, field.name))
        assert shared <= {""}, field.name
    sentences = {s for told, asks in exercises.FACTS.values() for s in (*told, *asks)}
    assert not sentences & {s for told, asks in HELD_OUT_FACTS.values() for s in (*told, *asks)}
    made = "".join(text(Exercises(i).make("facts")) for i in range(200))
    for told, asks in HELD_OUT_FACTS.values():
        for template in (*told, *asks):
            pattern = re.sub(r"\\{.\\}", r"[^.?\\n]+", re.escape(template))
            assert re.search(pattern, template.format(n="Ada", v="bread"))
            assert not re.search(pattern, made), template


def test_where_everything_is_in_the_end() -> None:
    """The moves again, by hand."""
    for seed in range(100):
        told, *asked = Exercises(seed).make("moves")
        where, held = dict[str, str](), dict[str, str]()
        for sentence in told.text.rstrip(".").split(". "):
            person, verb = sentence.split()[0], sentence.split(" ", 1)[1]
            if match := re.fullmatch(r"\w+ (?:went|moved|walked) to the (\w+)", sentence):
                where[person] = match[1]
            elif match := re.fullmatch(r"\w+ (?:took|picked up|got) the (\w+)", sentence):
                held[match[1]] = person
            else:
                assert verb.startswith("put the ") and held.pop(verb.split()[2]) == person
        expected = {f"Where is {person}?": f"the {place}" for person, place in where.items()}
        expected |= {f"Who has the {thing}?": person for thing, person in held.items()}
        expected |= {f"Where is the {thing}?": f"the {where[person]}" for thing, person in held.items()}
        found = dict(zip(asked[::2], asked[1::2], strict=True))
        questions = {q.text.split("Question: ")[1].split("\n")[0]: a.text.strip() for q, a in found.items()}
        assert questions == expected


def test_a_kind_that_is_none() -> None:
    with pytest.raises(UsageError, match="copies, lists"):
        Exercises(0).make("riddles")
