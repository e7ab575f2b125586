"""Exercises in using what stands above: copies, look-ups, facts, logs; made from a seed, without end.

An exercise is a document, of whose pieces only the answers are learnt from.
Names, words and values are made up; of the templates and the parts of words some are held out, so that what is reported
was never seen in training. Which kinds teach what, and in what order, is the recipe's matter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rwkv_stream.errors import UsageError
from rwkv_stream.training.data import Piece, asked

Exercise = list[Piece]


@dataclass(frozen=True, slots=True)
class Words:
    """What made-up words and things are put together from."""

    onsets: Sequence[str]
    codas: Sequence[str]
    things: Sequence[str]
    colours: Sequence[str]
    trades: Sequence[str]
    animals: Sequence[str]
    foods: Sequence[str]
    places: Sequence[str]


VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou", "ee")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAINED = Words(
    onsets=_words("b d f g k l m n p r s t v z br dr gr kr th sh st tr h j"),
    codas=("", "", "", *_words("n r l s m k th nd rt x ck")),
    things=_words("lantern key map ring book coin letter basket hammer violin compass mirror kettle rope feather "
                  "bottle drum scarf clock candle shell bell knife crown box lamp shovel umbrella chain glove"),
    colours=_words("red blue green yellow white black silver golden brown grey purple orange"),
    trades=_words("baker sailor teacher doctor farmer smith weaver miller painter judge hunter tailor guard pilot "
                  "clerk nurse carpenter gardener fisherman merchant"),
    animals=_words("horse dog cat goat cow parrot rabbit donkey sheep hen fox owl goose pig bear"),
    foods=_words("bread soup apples cheese rice fish honey cake beans eggs plums pears nuts butter"),
    places=_words("kitchen garden market harbour church school forest mill barn castle station library inn bridge "
                  "cellar tower field workshop"),
)  # fmt: skip
HELD_OUT = Words(
    onsets=_words("w y ch cl fl gl pl sk sl sp qu bl cr fr pr sw tw wh c"),
    codas=("", "", *_words("ng lt p b d ff rn sk mp ss")),
    things=_words("trumpet saddle telescope anchor ladder blanket chisel helmet teapot necklace wagon pencil ticket "
                  "jar needle"),
    colours=_words("crimson violet pink copper turquoise scarlet"),
    trades=_words("cobbler engineer librarian shepherd plumber surgeon jeweller mason lawyer printer"),
    animals=_words("camel turtle monkey falcon squirrel pony tiger swan"),
    foods=_words("pancakes grapes lentils mushrooms cherries pie noodles"),
    places=_words("museum bakery stable cave palace orchard theatre hospital meadow"),
)  # fmt: skip


# Of each kind of fact: how it is told, how it is asked for, and how its value is made.
FACTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "place": (
        ("{n} was born in {v}.", "{n} came from {v}.", "The birthplace of {n} is {v}."),
        ("Where was {n} born?", "Where did {n} come from?", "What is the birthplace of {n}?"),
    ),
    "trade": (
        ("{n} worked as a {v}.", "{n} was a {v}.", "By trade {n} was a {v}."),
        ("What was {n}'s job?", "What did {n} work as?"),
    ),
    "thing": (
        ("{n} owned a {v}.", "In the bag of {n} there was a {v}.", "{n} carried a {v} everywhere."),
        ("What did {n} own?", "What did {n} carry?"),
    ),
    "animal": (
        ("{n} had a {v}.", "{n} lived with a {v}."),
        ("What animal did {n} have?", "Which pet did {n} have?"),
    ),
    "number": (
        ("The room of {n} was number {v}.", "{n} paid {v} coins.", "{n} counted {v} stars."),
        ("Which number belongs to {n}?", "What number is told of {n}?"),
    ),
    "date": (
        ("{n} arrived on {v}.", "The wedding of {n} was on {v}."),
        ("When did {n} arrive?", "On which date was it for {n}?"),
    ),
    "person": (
        ("{n} married {v}.", "The friend of {n} was {v}.", "{n} wrote letters to {v}."),
        ("Who was close to {n}?", "Whom did {n} know?"),
    ),
    "food": (
        ("{n} liked to eat {v}.", "{n} bought {v}.", "For supper {n} had {v}."),
        ("What did {n} eat?", "What food did {n} want?"),
    ),
    "room": (
        ("{n} went to the {v}.", "{n} waited in the {v}.", "They saw {n} near the {v}."),
        ("Where was {n}?", "Where did {n} go?"),
    ),
    "word": (
        ("The password of {n} was {v}.", "{n} whispered the word {v}.", "{n} named the ship {v}."),
        ("What was the word of {n}?", "Which word belongs to {n}?"),
    ),
}
HELD_OUT_FACTS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "place": (("Everyone knew that {n} grew up in {v}.",), ("In what place did {n} grow up?",)),
    "trade": (("For many years {n} earned a living as a {v}.",), ("How did {n} earn a living?",)),
    "thing": (("Yesterday {n} found a {v} under the bed.",), ("What did {n} find under the bed?",)),
    "number": (("It took {n} exactly {v} days to finish.",), ("How many days did it take {n}?",)),
    "person": (("The teacher of {n} was called {v}.",), ("Who taught {n}?",)),
    "date": (("{n} left the country on {v}.",), ("When did {n} leave the country?",)),
    "food": (("Every morning {n} sold {v}.",), ("What did {n} sell?",)),
    "room": (("{n} hid behind the {v}.",), ("Where did {n} hide?",)),
}
FILLERS = (
    "The weather was mild that week.", "Nobody in the village spoke of it again.", "The road was long and dusty.",
    "It had rained for most of the morning.", "Many people came to look.", "There was much to do before winter.",
    "The old bell rang twice.", "The day passed slowly.", "Children played near the wall.",
    "A cold wind blew from the hills.", "Everyone was tired by then.",
)  # fmt: skip
# Between key and value: what stands before the key, between, behind the value, and between the entries.
LISTS = (
    ("", ": ", "", "\n"), ("", " = ", "", "\n"), ("", " -> ", "", "\n"), ("", "\t", "", "\n"), ("", ": ", "", ", "),
    ("", " is ", ".", " "), ("The code of ", " is ", ".", " "), ("The home of ", " is ", ".", "\n"),
    ("The friend of ", " is ", ".", " "), ("", " has ", ";", " "), ("We gave ", " the ", ".", " "),
)  # fmt: skip
LOOK_UPS = ("What is {}?", "{}?", "What is the value of {}?", "Which value belongs to {}?")
HELD_OUT_LOOK_UPS = ("Look up the entry of {}.",)
PRIORITIES = ("INFO", "INFO", "INFO", "WARN", "ERROR", "DEBUG")


class Exercises:
    """Makes exercises of a kind, from its own random numbers.

    held_out  of the parts of words, the things and the templates those that training never sees
    """

    KINDS = ("copies", "lists", "look_ups", "facts", "moves", "hops", "logs", "passkey")

    def __init__(self, seed: int, *, held_out: bool = False) -> None:
        self._random = random.Random(seed)
        self._is_held_out = held_out
        self._words = HELD_OUT if held_out else TRAINED
        self._facts = HELD_OUT_FACTS if held_out else FACTS
        self._values: dict[str, Callable[[], str]] = {
            "place": self.place,
            "trade": lambda: self._random.choice(self._words.trades),
            "thing": self.thing,
            "animal": lambda: f"{self._random.choice(self._words.animals)} called {self.name()}",
            "number": self.number,
            "date": self.date,
            "person": self.person,
            "food": lambda: self._random.choice(self._words.foods),
            "room": lambda: self._random.choice(self._words.places),
            "word": self.word,
        }

    def make(self, kind: str, size: int | None = None) -> Exercise:
        """One exercise; `size` is the number of entries, things to copy or sentences (default: drawn).

        raises  UsageError for a kind that is none
        """
        if kind not in self.KINDS:
            raise UsageError(f"making an exercise: expected one of {', '.join(self.KINDS)}, found '{kind}'")
        made: Exercise = getattr(self, kind)(size)
        return made

    # ---- words ----

    def word(self) -> str:
        """One to three syllables of consonants and vowels."""
        draw, syllables = self._random, self._random.choice((1, 2, 2, 2, 3))
        parts = []
        for i in range(syllables):
            parts += [draw.choice(self._words.onsets), draw.choice(VOWELS)]
            if i == syllables - 1 or draw.random() < 0.3:
                parts.append(draw.choice(self._words.codas))
        return "".join(parts)

    def name(self) -> str:
        return self.word().capitalize()

    def names(self, n: int) -> list[str]:
        """Different names."""
        return self._distinct(self.name, n)

    def person(self) -> str:
        return self.name() if self._random.random() < 0.6 else f"{self.name()} {self.name()}"

    def place(self) -> str:
        return self.name() + self._random.choice(("", "", " Bay", " Hill", "ville", "ton"))

    def thing(self) -> str:
        colour = f"{self._random.choice(self._words.colours)} " if self._random.random() < 0.7 else ""
        return colour + self._random.choice(self._words.things)

    def number(self) -> str:
        return str(self._random.randint(*self._random.choice(((2, 99), (100, 999), (1000, 9999)))))

    def date(self) -> str:
        year = f" {self._random.randint(1700, 2025)}" if self._random.random() < 0.5 else ""
        return f"{self._random.randint(1, 28)} {self._random.choice(MONTHS)}{year}"

    def _distinct(self, make: Callable[[], str], n: int) -> list[str]:
        """`n` different ones, fewer only where so many cannot be made."""
        found: dict[str, None] = {}
        for _ in range(20 * n):
            if len(found) == n:
                break
            found[make()] = None
        return list(found)

    def _entries(self, n: int) -> tuple[list[str], list[str]]:
        """Different keys, and a value of one kind for each."""
        keys = self._distinct(self._random.choice((self.name, self.name, self.person, self.word)), n)
        kind = self._random.choice([*self._values, "number", "word"])
        return keys, [self._values[kind]() for _ in keys]

    # ---- kinds ----

    def copies(self, size: int | None) -> Exercise:
        """Words, names, numbers and things in a row, and the row again up to three times, whole or from its middle."""
        draw = self._random
        makers = (self.word, self.name, self.number, self.thing)
        row = [draw.choice(makers)() for _ in range(size or draw.randint(3, 24))]
        between = draw.choice((" ", ", ", "\n"))
        made = [Piece(between.join(row) + "\n")]
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(max(1, len(row) // 2)) if draw.random() < 0.5 else 0
            made += [Piece(row[start]), Piece(between + between.join(row[start + 1 :]) + "\n", True)]
        return made

    def lists(self, size: int | None) -> Exercise:
        """A list of keys and values, then the same entries in another order, whose values are the answers."""
        draw = self._random
        keys, values = self._entries(size or draw.choice((2, 2, 3, 4, 4, 6, 8, 12, 16)))
        before, between, behind, apart = draw.choice(LISTS)
        made = [
            Piece(apart.join(f"{before}{k}{between}{v}{behind}" for k, v in zip(keys, values, strict=True)) + "\n\n")
        ]
        for _ in range(draw.choice((1, 2))):
            order = draw.sample(range(len(keys)), len(keys))
            for place in order:
                key = Piece(f"{before}{keys[place]}{between.rstrip(' ')}")
                gap = " " if between.endswith(" ") else ""
                made += [key, Piece(f"{gap}{values[place]}{behind}{apart}", True)]
            made.append(Piece("\n"))
        return made

    def look_ups(self, size: int | None) -> Exercise:
        """A list of keys and values, and questions for some of the values."""
        draw = self._random
        keys, values = self._entries(size or draw.choice((2, 3, 4, 6, 8, 12, 16, 24, 32)))
        before, between, behind, apart = draw.choice(LISTS)
        text = apart.join(f"{before}{k}{between}{v}{behind}" for k, v in zip(keys, values, strict=True))
        question = draw.choice(HELD_OUT_LOOK_UPS if self._is_held_out else LOOK_UPS)
        made = [Piece(text)]
        for place in draw.sample(range(len(keys)), min(len(keys), draw.choice((2, 4, 8)))):
            made += asked(question.format(keys[place]), values[place])
        return made

    def facts(self, size: int | None) -> Exercise:
        """Sentences about made-up people among others, and a question for each fact, half of them twice."""
        draw = self._random
        told, questions = list[str](), list[tuple[str, str]]()
        for person in self._distinct(self.person, size or draw.randint(1, 5)):
            for kind in draw.sample(sorted(self._facts), draw.choice((1, 2, 3))):
                (sentences, asks), value = self._facts[kind], self._values[kind]()
                told.append(draw.choice(sentences).format(n=person, v=value))
                shown = f"the {value}" if kind == "room" else value
                questions.append((draw.choice(asks).format(n=person), shown))
                if draw.random() < 0.3:
                    told.append(draw.choice(FILLERS))
        draw.shuffle(told)
        draw.shuffle(questions)
        made = [Piece(" ".join(told))]
        for question, value in questions + draw.sample(questions, len(questions) // 2):
            made += asked(question, value)
        return made

    def moves(self, size: int | None) -> Exercise:
        """People go from place to place and take things along; where and with whom everything is in the end."""
        draw = self._random
        people, things = self._distinct(self.name, draw.choice((2, 3))), draw.sample(self._words.things, 3)
        where, held, told = dict[str, str](), dict[str, str](), list[str]()
        for _ in range(size or draw.randint(4, 12)):
            person, thing = draw.choice(people), draw.choice(things)
            if person not in where or draw.random() < 0.55:
                where[person] = draw.choice(self._words.places)
                told.append(f"{person} {draw.choice(('went to', 'moved to', 'walked to'))} the {where[person]}.")
            elif thing not in held:
                held[thing] = person
                told.append(f"{person} {draw.choice(('took', 'picked up', 'got'))} the {thing}.")
            elif held[thing] == person:
                told.append(f"{person} put the {thing} down.")
                del held[thing]
        questions = [(f"Where is {person}?", f"the {place}") for person, place in where.items()]
        questions += [(f"Who has the {thing}?", person) for thing, person in held.items()]
        questions += [(f"Where is the {thing}?", f"the {where[person]}") for thing, person in held.items()]
        draw.shuffle(questions)
        made = [Piece(" ".join(told))]
        for question, value in questions:
            made += asked(question, value)
        return made

    def hops(self, size: int | None) -> Exercise:
        """People live in towns, towns have mayors: the mayor of a person's town."""
        draw = self._random
        towns = self._distinct(self.place, size or draw.randint(2, 5))
        mayors = dict(zip(towns, self._distinct(self.person, len(towns)), strict=False))
        homes = {person: draw.choice(list(mayors)) for person in self._distinct(self.name, len(mayors))}
        told = [f"The mayor of {town} is {mayor}." for town, mayor in mayors.items()]
        told += [f"{person} lives in {town}." for person, town in homes.items()]
        draw.shuffle(told)
        made = [Piece(" ".join(told))]
        for person in draw.sample(list(homes), len(homes)):
            made += asked(f"Who is the mayor of the town of {person}?", mayors[homes[person]])
        return made

    def logs(self, size: int | None) -> Exercise:
        """Lines of a log with a request each; what happened to some of the requests."""
        draw = self._random
        lines, found = list[str](), list[tuple[str, str]]()
        second = draw.randrange(80_000)
        for request in self._distinct(lambda: f"{draw.randrange(16**4):04x}", size or draw.randint(3, 12)):
            second += draw.randint(0, 40)
            level, user, ms = draw.choice(PRIORITIES), self.word(), draw.randint(2, 9999)
            clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
            lines.append(f"{clock} {level} request={request} user={user} took={ms}ms")
            found += [
                (f"Which user made request {request}?", user),
                (f"How long did request {request} take?", f"{ms}ms"),
            ]
        made = [Piece("\n".join(lines))]
        for question, value in draw.sample(found, min(len(found), 6)):
            made += asked(question, value)
        return made

    def passkey(self, size: int | None) -> Exercise:
        """A key between sentences of no matter."""
        draw = self._random
        key, n = str(draw.randint(10_000, 99_999)), size or draw.randint(4, 24)
        told = [draw.choice(FILLERS) for _ in range(n)]
        told.insert(draw.randrange(n + 1), f"The pass key is {key}. Remember it.")
        return [Piece(" ".join(told)), *asked("What is the pass key?", key)]
