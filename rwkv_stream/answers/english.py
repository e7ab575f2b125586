"""What rankers and readers know of English: classes of words, and what kind of answer a question asks for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from rwkv_stream.text import terms

LANGUAGE = "en"
# Classes of words that tell of an answer, and kinds of questions; `word_classes.txt` has the words.
CLASSES = ("number", "time", "place", "cause", "person", "feeling", "speech", "pronoun", "manner", "naming")
KINDS = ("who", "when", "where", "why", "number", "how", "feeling", "happened", "speech", "name", "what", "which")
_PARTS = {"number": ("numeral",), "time": ("calendar",)}  # of a class: lists that belong to it, too


@cache
def listed(name: str) -> frozenset[str]:
    """The words of a class, or of those that tell what is asked for."""
    lists = terms.listed(Path(__file__).with_name("word_classes.txt"))
    return frozenset(" ".join(lists[part] for part in (name, *_PARTS.get(name, ()))).split())


def kind_of(question: str) -> str:
    """What a question asks for: one of `KINDS`, "" for none of them."""
    words = terms.words(question)
    for at, word in enumerate(words):
        after = words[at + 1 : at + 4]
        rest = words[at + 1 :]
        if word in ("who", "whom", "whose"):
            return "who"
        if word in ("when", "where", "why"):
            return word
        if word == "how":
            if after[:1] and after[0] in listed("after_how"):
                return "number"
            return "feeling" if listed("asked_feeling") & set(rest) else "how"
        if word in ("what", "which"):
            for asked, kind in (("asked_time", "when"), ("asked_place", "where"), ("asked_number", "number")):
                if listed(asked) & set(after[:2]):
                    return kind
            if listed("asked_person") & set(after[:1]):
                return "who"
            if listed("asked_name") & set(rest):
                return "name"
            if {"happened", "happen", "happens"} & set(after):
                return "happened"
            return "speech" if listed("asked_speech") & set(rest) else word
    return ""
