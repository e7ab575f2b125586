"""Recipes: what a file may say, what is refused, and the rate of each step."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_stream.errors import InputError
from rwkv_stream.training import recipe
from rwkv_stream.training.recipe import Data, Recipe, Stage

ROOT = Path(__file__).parents[2]
WHOLE = """
[[data]]
name = "books"
path = "books"
[[stages]]
tokens = 1000
lanes = 2
"""


def read(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return recipe.read(tmp_path / "recipe.toml")


def test_a_short_recipe_is_whole(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE + "rate = 1\n[validation]\nheld = 0.1")
    assert found.data == (Data("books", path="books"),)
    assert found.stages == (Stage(1000, lanes=2, rate=1.0),)
    assert found.validation is not None and found.validation.held_every == 10


@pytest.mark.parametrize("path", ["recipes/shipped.toml", "recipes/reader.toml", "samples/train.toml"])
def test_recipes_of_the_repository_can_be_read(path: str) -> None:
    assert recipe.read(ROOT / path).steps > 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected data, stages, found none"),
        ("data = []\nstages = []", r"expected \[\[data\]\] and \[\[stages\]\], one or more"),
        ("[[data]", "expected TOML"),
        (WHOLE + "[more]\n", "found 'more'"),
        (WHOLE + "laines = 4", r"'stages', entry 1: expected one of tokens, .*, found 'laines'"),
        (WHOLE + "window = 4.5", "'window': expected an integer, found 4.5"),
        (WHOLE + "window = true", "'window': expected an integer, found True"),
        (WHOLE + "window = 0", "window and stretch of a stage of 1 or more"),
        (WHOLE.replace("tokens = 1000", ""), "expected tokens or epochs of a stage above 0"),
        (WHOLE + "epochs = 2", "expected tokens or epochs of a stage above 0, found 1000 and 2"),
        (WHOLE + 'schedule = "steps"', "expected constant or cosine or wsd, found 'steps'"),
        (WHOLE + "[stages.shares]\nbook = 1", "expected shares of books, found 'book'"),
        (WHOLE + "[stages.shares]\nbooks = 0", "expected a stage with a share of something"),
        (WHOLE.replace('name = "books"', ""), "'data', entry 1: expected name, found none"),
        (WHOLE.replace('path = "books"', ""), "expected a path, exercises or repeats for the data 'books'"),
        (WHOLE + '[[data]]\nname = "books"\npath = "b"', "expected different names of data, found books, books"),
        (WHOLE + '[[data]]\nname = "r"\nrepeats = "book"', "for 'r' to repeat, found 'book'"),
        (WHOLE + '[[data]]\nname = "p"\npath = "p"\nform = "preferences"', "expected preferences alone, found 2"),
        (WHOLE.replace('path = "books"', "path = 3"), "expected a string, found 3"),
        (WHOLE + "[optimizer]\nname = 'sgd'", "expected adamw or muon"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read(tmp_path, text)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a file, found: No such file or directory; check the path"):
        recipe.read(tmp_path / "no.toml")


def test_the_rate_rises_and_falls_as_the_schedule_says() -> None:
    common = {"lanes": 1, "window": 1, "rate": 1.0, "warmup": 10, "final_rate": 0.1}
    cosine = Stage(1000, schedule="cosine", **common)  # type: ignore[arg-type]
    assert [cosine.rate_at(step) for step in (0, 9, 500, 1000)] == pytest.approx([0.1, 1.0, 0.55, 0.1], abs=1e-3)
    wsd = Stage(1000, schedule="wsd", decay=0.2, **common)  # type: ignore[arg-type]
    assert [wsd.rate_at(step) for step in (4, 800, 900, 1000)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    constant = Stage(1000, schedule="constant", **common)  # type: ignore[arg-type]
    assert {constant.rate_at(step) for step in (10, 500, 999)} == {1.0}


def test_steps_belong_to_stages() -> None:
    stages = (Stage(100, lanes=2, window=10), Stage(101, lanes=1, window=50))
    found = Recipe((Data("x", path="x"),), stages)
    assert found.steps == 5 + 3
    assert [found.stage_at(step) for step in (0, 4, 5, 7, 8)] == [(0, 0), (0, 4), (1, 0), (1, 2), (2, 0)]
