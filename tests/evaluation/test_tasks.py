"""Every task: one who reads the prompt scores 1, one who guesses the floor, and the length is what was asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any

import pytest

from rwkv_stream.answers.prompts import FAMILIES
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.evaluation import haystack as haystacks
from rwkv_stream.evaluation import recall
from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.evaluation.tasks import TASKS, Context, Maker
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.text import tokenizer as tokenizers
from rwkv_stream.training import exercises

DEPTHS = (0.0, 50.0, 100.0)
TEXT = "".join(f"In the year {year} the miller of the valley counted {year * 7 % 1000} sacks. " for year in range(900))


@pytest.fixture(scope="module", params=["bytes", "world"])
def maker(request: pytest.FixtureRequest) -> Maker:
    found = tokenizers.raw_bytes() if request.param == "bytes" else tokenizers.world()
    form = FAMILIES["rwkv-stream" if request.param == "bytes" else "world"]
    return Maker(found, form, Haystack.of("sacks", [TEXT.encode()], found))


def text_of(maker: Maker, context: Context) -> str:
    """What is read, decoded."""
    tokens = list(context.opening)
    for part in context.parts:
        tokens += maker.haystack.tokens(part.start, part.stop).tolist() if isinstance(part, range) else part
    return maker.tokenizer.decode(tokens).decode()


def contexts(maker: Maker, name: str, length: int, trials: int, seed: int = 0) -> list[Context]:
    return [context for _, context in TASKS[name].contexts(maker, length, trials, DEPTHS, seed)]


# ---- those who read: each task solved from the text alone ----


def needles(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", text):
        found.setdefault(key, []).append(value)
    return found


def numbers(text: str, prompt: str) -> list[str]:
    told = re.search(r"special magic numbers? for (.*) mentioned in the provided text\?", prompt)
    assert told is not None
    return [value for key in re.split(r", and |, ", told[1]) for value in needles(text)[key]]


def variables(text: str, prompt: str) -> list[str]:
    values: dict[str, str] = {}
    for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
        values[name] = values.get(value, value)
    asked = re.search(r"assigned the value (\d+)", prompt)
    assert asked is not None
    return [name for name, value in values.items() if value == asked[1]]


def list_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+\. (\w+)", text))


def coded_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\b[a-z]+\b", text.partition("coded words. ")[2]))


def pairs(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+): (\d+)$", text, re.MULTILINE))


def fact_values(text: str) -> dict[str, list[str]]:
    """Question → what may be right, by the templates that the facts were told in."""
    found: dict[str, list[str]] = {}
    for kind, (told, asks) in exercises.HELD_OUT_FACTS.items():
        for template, ask in ((template, ask) for template in told for ask in asks):
            pattern = re.escape(template).replace(r"\{n\}", r"(?P<n>[A-Z]\w+(?: [A-Z]\w+)?)").replace(r"\{v\}", "(.+?)")
            for match in re.finditer(pattern, text):
                value = next(group for group in match.groups() if group != match["n"])
                found.setdefault(ask.format(n=match["n"]), []).append(f"the {value}" if kind == "room" else value)
    return found


def row(text: str) -> list[str]:
    return text.partition(".\n\n")[0].split()


READERS: dict[str, Callable[[str, str], list[str]]] = {
    **dict.fromkeys(("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"), numbers),
    "vt": variables,
    "cwe": lambda text, _: [word for word, _ in list_words(text).most_common(10)],
    "fwe": lambda text, _: [word for word, _ in coded_words(text).most_common(3)],
    "passkey": lambda text, _: re.findall(r"The pass key is (\d{5})\.", text),
    "look_up": lambda text, prompt: [pairs(text)[re.findall(r"What is (\w+)\?", prompt)[0]]],
    "facts": lambda text, prompt: next(v for ask, v in fact_values(text).items() if ask in prompt),
    "copy": lambda text, _: [" ".join(row(text)[2:])],
}


class Reading:
    """Stands for `Batch`: answers by what was read, as long as an answer may be; a state is the tokens."""

    def __init__(self, name: str, maker: Maker) -> None:
        self._name, self._tokenizer = name, maker.tokenizer

    def add(self, prompt: list[int], state: tuple[int, ...], sampling: Sampling) -> SimpleNamespace:
        text, asked = (self._tokenizer.decode(tokens).decode() for tokens in (state, prompt))
        answer = self._tokenizer.encode(" " + " and ".join(READERS[self._name](text, asked)))
        return SimpleNamespace(text=self._tokenizer.decode(answer[: sampling.max_tokens]).decode())

    def run(self) -> Iterator[None]:
        return iter(())


@pytest.mark.parametrize("name", TASKS)
def test_one_who_reads_scores_1(maker: Maker, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the model is given, forks of what is read once among it."""
    monkeypatch.setattr(recall, "Batch", lambda _: Reading(name, maker))
    monkeypatch.setattr(recall, "read", lambda _, tokens, state: (None, (*state, *tokens)))
    model: Any = SimpleNamespace(tokenizer=maker.tokenizer, zero_state=tuple, trim=lambda: None)
    made = TASKS[name].contexts(maker, 2600, 2, DEPTHS, 0)
    found = list(recall.trials(model, maker, made, recall.Trunk(model, maker.haystack)))
    assert len(found) >= 2 and [trial.score for trial in found] == [1] * len(found)


# ---- those who guess: any of what the text offers, as many as are right ----

Guess = Callable[[Random, int], list[str]]


def any_of(found: Iterable[str]) -> Guess:
    options = sorted({*found})
    return lambda random, n: random.sample(options, n)


def any_numbers(n_digits: int) -> Guess:
    return lambda random, n: [str(random.randrange(10 ** (n_digits - 1), 10**n_digits)) for _ in range(n)]


def any_order(words: list[str]) -> Guess:
    return lambda random, _: [" ".join(random.sample(words, len(words)))]


GUESSERS: dict[str, Callable[[str], Guess]] = {
    **dict.fromkeys(("niah_single", "niah_multivalue", "niah_multiquery"), lambda _: any_numbers(7)),
    "passkey": lambda _: any_numbers(5),
    "niah_multikey": lambda text: any_of(value for found in needles(text).values() for value in found),
    "vt": lambda text: any_of(re.findall(r"VAR ([A-Z]{5}) =", text)),
    "cwe": lambda text: any_of(list_words(text)),
    "fwe": lambda text: any_of(coded_words(text)),
    "look_up": lambda text: any_of(pairs(text).values()),
    "facts": lambda text: any_of(value for found in fact_values(text).values() for value in found),
    "copy": lambda text: any_order(row(text)[2:]),
}


@pytest.mark.parametrize("name", TASKS)
def test_one_who_guesses_scores_the_floor(name: str) -> None:
    """Within four standard errors of the mean of so many guesses."""
    bytes_only = tokenizers.raw_bytes()
    maker = Maker(bytes_only, FAMILIES["rwkv-stream"], Haystack.of("sacks", [TEXT.encode()], bytes_only))
    random, scores, floors = Random(0), list[float](), list[float]()
    for context in contexts(maker, name, 2000, 3):
        guess = GUESSERS[name](text_of(maker, context))
        for query in context.queries:
            for _ in range(400):
                scores.append(recall.score(" and ".join(guess(random, len(query.answers))), query.answers))
                floors.append(query.floor)
    floor = mean(floors)
    assert mean(scores) == pytest.approx(floor, abs=4 * stdev(scores) / len(scores) ** 0.5 + 1e-4)
    assert floor < 0.5


# ---- what contexts are ----


@pytest.mark.parametrize("name", TASKS)
def test_contexts_are_as_long_as_asked_and_a_function_of_the_seed(maker: Maker, name: str) -> None:
    for length in (2000, 5000):
        made = contexts(maker, name, length, 1, seed=3)
        for context in made:
            longest = max(context.tokens + maker.reserve(query.prompt) for query in context.queries)
            assert 0.9 * length <= longest <= length
            is_exact = any(isinstance(part, range) for part in context.parts)
            assert longest == length or not is_exact
        assert made == contexts(maker, name, length, 1, seed=3)
        assert made != contexts(maker, name, length, 1, seed=4)
        more = [context for number, context in TASKS[name].contexts(maker, length, 2, DEPTHS, 3) if number == 0]
        assert made == more, "further trials change none"


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_is_too_short_is_said(maker: Maker, name: str) -> None:
    with pytest.raises(UsageError, match=rf"making '{name}': expected \d+ tokens or more, found 20; ask for"):
        contexts(maker, name, 20, 1)


@pytest.mark.parametrize("depth", [0, 30, 100])
def test_needles_stand_behind_sentences_at_their_depth(maker: Maker, depth: int) -> None:
    (_, context), *_ = TASKS["niah_single"].contexts(maker, 3000, 1, [depth], 0)
    text = text_of(maker, context)
    at = text.index(" One of the special magic numbers")
    before = text[:at].partition("afterwards.\n")[2]
    assert before == "" or before.endswith(".")
    assert len(before) / (len(text) - 300) == pytest.approx(depth / 100, abs=0.12)
    assert context.queries[0].depth == depth


def test_the_order_of_a_chain_is_kept_and_every_chain_is_asked(maker: Maker) -> None:
    (context,) = contexts(maker, "vt", 3000, 1)
    text, seen = text_of(maker, context), set[str]()
    for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text):
        assert value.isdecimal() or value in seen
        seen.add(name)
    assert len(context.queries) == 4 and len({name for query in context.queries for name in query.answers}) == 20


def test_keys_and_templates_are_not_those_of_training(maker: Maker) -> None:
    trained = [sentence.partition("{")[0] for told, _ in exercises.FACTS.values() for sentence in told]
    for context in contexts(maker, "facts", 3000, 3):
        assert not any(len(begin) > 3 and begin in text_of(maker, context) for begin in trained)


# ---- the haystack ----


def test_a_haystack_begins_again_and_knows_where_sentences_end() -> None:
    found = tokenizers.raw_bytes()
    hay = Haystack.of("h", [b"One. Two 3.5", b" e.g! \xe5\xa5\xbd\xe3\x80\x82X"], found)
    text = b"One. Two 3.5 e.g! \xe5\xa5\xbd\xe3\x80\x82X\n"
    assert bytes(hay.tokens(0, 2 * len(text)).tolist()) == 2 * text
    ends = [0, 4, 17, text.index(b"X"), len(text)]
    assert hay.ends.tolist() == ends
    for turn in range(2):
        for place in range(len(text)):
            expected = max(end for end in ends if end <= place) + turn * len(text)
            assert hay.sentence_end(place + turn * len(text)) == expected


def test_a_text_without_sentences_is_cut_anywhere() -> None:
    found = tokenizers.raw_bytes()
    assert Haystack.of("h", [b"x" * 3000], found).sentence_end(1500) == 1500


def test_of_a_long_text_the_beginning_is_taken_which_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(haystacks, "HAYSTACK_BYTES", 10)
    assert len(Haystack.of("h", [b"12345678", "9ä".encode() * 3], tokenizers.raw_bytes()).ids) == 10
    assert "only its first" in caplog.text
    with pytest.raises(InputError, match="expected some text, found none"):
        Haystack.of("h", [], tokenizers.raw_bytes())


def test_the_packaged_haystack_is_the_sample_story() -> None:
    story = (Path(__file__).parents[2] / "samples/story.txt").read_bytes()
    found = tokenizers.raw_bytes()
    assert Haystack.read(None, found).digest == Haystack.of("story", [story], found).digest


@pytest.mark.parametrize(
    "name", ["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "passkey"]
)
def test_a_long_context_takes_no_more_memory_than_a_short_one(name: str) -> None:
    bytes_only = tokenizers.raw_bytes()
    maker = Maker(bytes_only, FAMILIES["rwkv-stream"], Haystack.of("sacks", [TEXT.encode()], bytes_only))
    held = [
        max(sum(len(part) for part in context.parts if not isinstance(part, range)) for context in made)
        for made in (contexts(maker, name, length, 1) for length in (3000, 3_000_000))
    ]
    assert held[1] < 1.2 * held[0]
