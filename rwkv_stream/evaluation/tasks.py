"""What a model is asked about a text that it has read, made from a seed and as long as one likes.

The tasks with RULER's names are its tasks (Hsieh et al. 2024, arXiv 2404.06654; templates: NVIDIA/RULER:
scripts/data/synthetic/constants.py), put to a model in the form in which its family is asked, without worked examples.
What differs: keys and words are made up, so that no model has seen them; of variables there are four chains, where one
chain would let anybody score who names all variables.

A context is read once and may be asked several things. Its length in tokens counts all that is read before an answer.
`floor` is the score of one who guesses: who takes any of what the context offers as an answer, and where it offers
nothing else than what is right, any of what there could be.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from rwkv_stream.answers.prompts import Family, fill
from rwkv_stream.errors import UsageError
from rwkv_stream.evaluation.haystack import Haystack
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.exercises import Exercises

ROW, CUE = 10, 2  # words that are copied, and how many of them are given again
KEYS = 4  # of needles, values of one key, keys of one question
CHAINS, HOPS = 4, 4
ASKED = 4  # facts of a text
COMMON, SHORT_TOKENS = 10, 4096  # common words; below so many tokens they and the others are fewer
REPEATS, SHORT_REPEATS = (30, 3), (6, 1)  # of common words, of others
TOP, CODED_LETTERS, LEAST_CODED = 3, 6, 74  # with fewer words the third and fourth may be as frequent
NUMBERS = range(1_000_000, 10_000_000)
PASSKEYS = range(10_000, 100_000)
MARGIN_TOKENS = 16  # by which the prompts of a list may differ
FACT_PROMPT = "How many days did it take Whoungmoang Cheelt to finish the whole of it?"  # as long as any of them

Part = range | Sequence[int]
"""Tokens of a context: a range of the haystack's, or its own."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked: the text that is read after the context; all right answers, each to be named; the guesser's score;
    where in the context the answer stands, in percent, if in one place."""

    prompt: str
    answers: tuple[str, ...]
    floor: float
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What is read before: `opening` tokens, which all contexts of a task have in common, then the parts."""

    opening: tuple[int, ...]
    parts: tuple[Part, ...]
    queries: tuple[Query, ...]

    @property
    def tokens(self) -> int:
        return len(self.opening) + sum(map(len, self.parts))


@dataclass(frozen=True, slots=True)
class Maker:
    """What contexts are made with: a model's tokens, the form in which it is asked, and the text around."""

    tokenizer: Tokenizer
    form: Family
    haystack: Haystack

    def ask(self, question: str, begun: str = "") -> str:
        """The prompt for a question, with what the answer begins with."""
        return fill(self.form.template, question) + begun

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def opening(self, text: str) -> tuple[int, ...]:
        start = self.tokenizer.start_token
        return (*([] if start is None else [start]), *self.encode(text))

    def reserve(self, prompt: str) -> int:
        return len(self.tokenizer.encode_prompt(prompt))

    def hidden(
        self, opening: str, needles: Sequence[str], shares: Sequence[float], queries: Sequence[Query], length: int
    ) -> Context:
        """The haystack with needles in it, in their order, each behind a sentence that ends about there.

        shares  of the haystack before each needle, 0 to 1, rising
        """
        begin, hidden = self.opening(opening), [self.encode(f" {needle}") for needle in needles]
        around = length - len(begin) - sum(map(len, hidden)) - max(self.reserve(query.prompt) for query in queries)
        _check_room(around, len(needles))
        places = [self.haystack.sentence_end(int(share * around)) for share in shares]
        parts: list[Part] = [range(places[0])]
        for needle, place, following in zip(hidden, places, [*places[1:], around], strict=True):
            parts += [needle, range(place, following)]
        return Context(begin, tuple(part for part in parts if len(part)), tuple(queries))

    def largest(
        self, opening: str, text: Callable[[int], str], least: int, prompt: str, length: int
    ) -> tuple[int, list[int]]:
        """The largest n whose text still fits between the opening and the prompt, by halving, and its tokens."""
        room = length - len(self.opening(opening)) - self.reserve(prompt)
        fitting = self.encode(text(least))
        _check_room(room - len(fitting), 0)
        low, high = least, 2 * least
        while len(found := self.encode(text(high))) <= room:
            low, high, fitting = high, 2 * high, found
        while high - low > 1:
            middle = (low + high) // 2
            found = self.encode(text(middle))
            if len(found) <= room:
                low, fitting = middle, found
            else:
                high = middle
        return low, fitting


class _TooShortError(Exception):
    """A length that does not hold what is to be in it, by so many tokens."""

    def __init__(self, missing: int) -> None:
        super().__init__(missing)
        self.missing = missing


def _check_room(left: int, least: int) -> None:
    if left < least:
        raise _TooShortError(least - left)


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of contexts.

    make    one, of so many tokens; in it a query for each depth, or one at the depth, or some at none
    sweeps  whether each depth needs a context of its own
    asks    in words
    """

    make: Callable[[Maker, Random, int, Sequence[float]], Context]
    asks: str
    sweeps: bool = False

    def contexts(
        self, maker: Maker, length: int, trials: int, depths: Sequence[float], seed: int
    ) -> Iterator[tuple[int, Context]]:
        """So many contexts (of each depth), each with its number: the same whatever their number is.

        raises  UsageError where the length does not hold one
        """
        name = self.make.__name__
        for chosen in [[depth] for depth in depths] if self.sweeps else [list(depths)]:
            for trial in range(trials):
                key = f"{name} {length} {chosen if self.sweeps else ''} {seed} {trial}"
                try:
                    context = self.make(maker, Random(key), length, chosen)
                except _TooShortError as error:
                    raise UsageError(
                        f"making '{name}': expected {length + error.missing} tokens or more, found {length}; ask for "
                        "other lengths or tasks"
                    ) from None
                yield trial, context


# ---- needles ----


def _names(random: Random, n: int) -> list[str]:
    """Different made-up words."""
    made = Exercises(random.getrandbits(32), held_out=True)
    found: dict[str, None] = {}
    while len(found) < n:
        found[made.word()] = None
    return list(found)


def _needle(key: str, value: int) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


ONE_HIDDEN = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n"
)
SOME_HIDDEN = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
)


def _number_query(maker: Maker, keys: Sequence[str], values: Sequence[int], floor: float, depth: float | None) -> Query:
    """For the values of some keys."""
    told = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    many = len(values) > 1
    what, number, are = ("are all", "numbers", "are") if many else ("is", "number", "is")
    prompt = maker.ask(
        f"What {what} the special magic {number} for {told} mentioned in the provided text?",
        f" The special magic {number} for {told} mentioned in the provided text {are}",
    )
    return Query(prompt, tuple(map(str, values)), floor, depth)


def niah_single(maker: Maker, random: Random, length: int, depths: Sequence[float]) -> Context:
    """A number for a key, at a depth of the haystack."""
    (key,), value, (depth,) = _names(random, 1), random.choice(NUMBERS), depths
    query = _number_query(maker, [key], [value], 1 / len(NUMBERS), depth)
    return maker.hidden(ONE_HIDDEN, [_needle(key, value)], [depth / 100], [query], length)


def niah_multikey(maker: Maker, random: Random, length: int, depths: Sequence[float]) -> Context:
    """Numbers for four keys, of which one is asked for, at a depth; the others stand anywhere."""
    keys, values, (depth,) = _names(random, KEYS), random.sample(NUMBERS, KEYS), depths
    shares = [depth / 100, *(random.random() for _ in range(KEYS - 1))]
    query = _number_query(maker, keys[:1], values[:1], 1 / KEYS, depth)
    order = sorted(range(KEYS), key=shares.__getitem__)
    needles = [_needle(keys[i], values[i]) for i in order]
    return maker.hidden(ONE_HIDDEN, needles, sorted(shares), [query], length)


def niah_multivalue(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Four numbers for one key, all asked for."""
    (key,), values = _names(random, 1), random.sample(NUMBERS, KEYS)
    query = _number_query(maker, [key], values, KEYS / len(NUMBERS), None)
    shares = sorted(random.random() for _ in values)
    return maker.hidden(SOME_HIDDEN, [_needle(key, value) for value in values], shares, [query], length)


def niah_multiquery(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Numbers for four keys, all asked for at once."""
    keys, values = _names(random, KEYS), random.sample(NUMBERS, KEYS)
    query = _number_query(maker, keys, values, KEYS / len(NUMBERS), None)
    order = random.sample(range(KEYS), KEYS)
    shares = sorted(random.random() for _ in values)
    return maker.hidden(SOME_HIDDEN, [_needle(keys[i], values[i]) for i in order], shares, [query], length)


def vt(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Chains of variables, each given the value of the one before; for each value all that have it are asked for."""
    n = HOPS + 1
    names: dict[str, None] = {}
    while len(names) < CHAINS * n:
        names["".join(random.choices(string.ascii_uppercase, k=5))] = None
    chains = [list(names)[i : i + n] for i in range(0, CHAINS * n, n)]
    values = random.sample(PASSKEYS, CHAINS)
    told, queries = [0] * CHAINS, list[Query]()
    needles = list[str]()
    for i in random.sample([i for i in range(CHAINS) for _ in range(n)], CHAINS * n):  # the order of each chain is kept
        chain, at = chains[i], told[i]
        needles.append(f"VAR {chain[at]} = {f'VAR {chain[at - 1]}' if at else values[i]}.")
        told[i] += 1
    for chain, value in zip(chains, values, strict=True):
        prompt = maker.ask(
            f"Find all variables that are assigned the value {value} in the text above.",
            f" According to the chain(s) of variable assignment in the text above, {n} variables are assigned the "
            f"value {value}, they are:",
        )
        queries.append(Query(prompt, tuple(chain), 1 / CHAINS))
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return maker.hidden(opening, needles, sorted(random.random() for _ in needles), queries, length)


def passkey(maker: Maker, random: Random, length: int, depths: Sequence[float]) -> Context:
    """A five-digit key in a sentence of its own, at a depth of the haystack."""
    key, (depth,) = random.choice(PASSKEYS), depths
    query = Query(maker.ask("What is the pass key?"), (str(key),), 1 / len(PASSKEYS), depth)
    return maker.hidden("", [f"The pass key is {key}. Remember it."], [depth / 100], [query], length)


# ---- lists ----


def cwe(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """A numbered list in which ten words stand more often than the others: those ten."""
    repeats, seed = SHORT_REPEATS if length < SHORT_TOKENS else REPEATS, random.getrandbits(64)
    common, others = _names(Random(f"{seed} names"), COMMON), list[str]()
    more = Exercises(random.getrandbits(32), held_out=True)

    def listed(n: int) -> str:
        seen = {*common, *others}
        while len(others) < n - COMMON:
            if (word := more.word()) not in seen:
                others.append(word)
                seen.add(word)
        words = common * repeats[0] + others[: n - COMMON] * repeats[1]
        Random(f"{seed} order").shuffle(words)
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))

    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    prompt = maker.ask(
        "What are the 10 most common words in the above list?",
        " The top 10 words that appear most often in the list are:",
    )
    n, tokens = maker.largest(opening, listed, COMMON + 1, prompt, length)
    return Context(maker.opening(opening), (tokens,), (Query(prompt, tuple(common), COMMON / n),))


def fwe(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Made-up words whose frequencies fall with the square of their rank, dots the most frequent: the next three."""
    seed, words = random.getrandbits(64), dict[str, None]()

    def counts(n: int) -> Counter[str]:
        ranks = np.arange(1, math.isqrt(n) + 1)
        drawn = (n * ranks**-2.0 / (math.pi**2 / 6)).astype(int)  # zeta(2)
        drawn = drawn[drawn > 0]
        while len(words) < len(drawn):
            words["".join(random.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
        return Counter(dict(zip(["...", *list(words)[: len(drawn) - 1]], drawn.tolist(), strict=True)))

    def coded(n: int) -> str:
        text = sorted(counts(n).elements())
        Random(f"{seed} order").shuffle(text)
        return " ".join(text)

    opening = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. "
    )
    prompt = maker.ask(
        "Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text?",
        " According to the coded text above, the three most frequently appeared words are:",
    )
    n, tokens = maker.largest(opening, coded, LEAST_CODED, prompt, length)
    found = counts(n)
    del found["..."]
    answers = tuple(word for word, _ in found.most_common(TOP))
    return Context(maker.opening(opening), (tokens,), (Query(prompt, answers, TOP / len(found)),))


def look_up(
    maker: Maker, random: Random, length: int, depths: Sequence[float], *, wording: str = "What is {}?"
) -> Context:
    """A list of made-up keys with numbers; the number of the key at each depth of the list is asked for."""
    made = Exercises(random.getrandbits(32), held_out=True)
    digits, lines, seen, tokens = 4, list[tuple[str, str]](), set[str](), list[int]()
    room = length - len(maker.opening("")) - maker.reserve(maker.ask(wording.format(made.name()))) - MARGIN_TOKENS
    while True:
        if 2 * len(lines) >= 10**digits:
            digits += 1  # of so many pairs the values are still to differ
        key, value = made.name(), str(random.randrange(10 ** (digits - 1), 10**digits))
        if key in seen or value in seen:
            continue
        line = maker.encode(f"{key}: {value}\n")
        if len(tokens) + len(line) > room:
            break
        lines.append((key, value))
        seen |= {key, value}
        tokens += line
    _check_room(room, len(tokens) + MARGIN_TOKENS if len(lines) < 2 else 0)
    asked = {round(depth / 100 * (len(lines) - 1)): depth for depth in depths}
    queries = [
        Query(maker.ask(wording.format(lines[i][0])), (lines[i][1],), 1 / len(lines), depth)
        for i, depth in asked.items()
    ]
    return Context(maker.opening(""), (tokens,), tuple(queries))


def facts(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Sentences on made-up people, whose templates training never sees, and questions for some of the facts."""
    seed = random.getrandbits(32)

    def told(n: int) -> str:
        return Exercises(seed, held_out=True).facts(n)[0].text

    n, tokens = maker.largest("", told, 1, maker.ask(FACT_PROMPT), length)
    document = Exercises(seed, held_out=True).facts(n)
    answers = [i for i, piece in enumerate(document) if piece.is_learnt]
    floor = 1 / len({document[i].text for i in answers})
    asked = {document[i - 1].text: document[i].text.strip() for i in random.sample(answers, min(ASKED, len(answers)))}
    queries = [
        Query(maker.ask(question.partition("Question: ")[2].partition("\nAnswer:")[0]), (value,), floor)
        for question, value in asked.items()
    ]
    return Context(maker.opening(""), (tokens,), tuple(queries))


def copy(maker: Maker, random: Random, length: int, _depths: Sequence[float]) -> Context:
    """Made-up words in a row, then the haystack, then the first two again: the rest of the row is to follow."""
    words = _names(random, ROW)
    row = maker.encode(" ".join(words) + ".\n\n")
    prompt = "\n\n" + " ".join(words[:CUE])
    around = length - len(maker.opening("")) - len(row) - maker.reserve(prompt)
    _check_room(around, 1)
    query = Query(prompt, (" ".join(words[CUE:]),), 1 / math.factorial(ROW - CUE))
    return Context(maker.opening(""), (row, range(around)), (query,))


TASKS: Mapping[str, Task] = {
    "niah_single": Task(niah_single, "the one number that is hidden in a text", sweeps=True),
    "niah_multikey": Task(niah_multikey, "one of four numbers, by its key", sweeps=True),
    "niah_multivalue": Task(niah_multivalue, "four numbers of one key"),
    "niah_multiquery": Task(niah_multiquery, "four numbers, by their keys"),
    "vt": Task(vt, "which variables have a value, through four assignments"),
    "cwe": Task(cwe, "the ten words that a list has most often"),
    "fwe": Task(fwe, "the three most frequent words of a coded text"),
    "passkey": Task(passkey, "a key that is told once in a text", sweeps=True),
    "look_up": Task(look_up, "the number of a key in a list"),
    "facts": Task(facts, "what was told of made-up people"),
    "copy": Task(copy, "a row of words again, after a text"),
}
