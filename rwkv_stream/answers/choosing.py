"""Strategies that ask others: `auto` takes the one that fits, `vote` the answer that most of them give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rwkv_stream.answers import prompts
from rwkv_stream.answers.chunk_states import Cells, covers
from rwkv_stream.answers.nearest import Nearest
from rwkv_stream.answers.plain import FromState, Quote
from rwkv_stream.answers.reread import Reread
from rwkv_stream.answers.strategy import Manner, Need, Reply, Strategy, Subject
from rwkv_stream.text.terms import words

if TYPE_CHECKING:
    from rwkv_stream.answers.prompts import Question

_ARTICLES = {"a", "an", "the"}
NOT_LEARNED = "the model has not learned to answer"


@dataclass(frozen=True, slots=True)
class Auto:
    """Quote, where the model has not learned to answer. Else read again the passages of texts that speak of what is
    asked; else ask the states of the chunks, where there are some; else the state of the whole, unless a part of it is
    asked about."""

    name = "auto"
    needs: frozenset[Need] = frozenset({"model", "state", "kept text", "cells"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; each reply says which way was taken, and why."""
        if subject.texts and not prompts.has_learned_to_answer(subject.loaded().tokenizer.id):
            return _said(Quote().replies(questions, subject, manner), "quote", NOT_LEARNED)
        found: list[list[Reply]] = [[] for _ in questions]
        why = "its text was not kept"
        if subject.texts:
            self._ask(Reread(), found, questions, subject, manner, lambda z: f"the text speaks of it, {z.evidence:.2f}")
            why = "the text is not seen to speak of it"
        if covers(subject):
            self._ask(Cells(), found, questions, subject, manner, lambda _, why=why: why)  # type: ignore[misc]
            why += ", and the states of its chunks abstain"
        if not subject.is_part:
            self._ask(FromState(), found, questions, subject, manner, lambda _: why)
        return [some or [Reply(None, by=Reread.name, why=why)] for some in found]

    def _ask(
        self,
        strategy: Strategy,
        found: list[list[Reply]],
        questions: Sequence[Question],
        subject: Subject,
        manner: Manner,
        why: Callable[[Reply], str],
    ) -> None:
        """Let a strategy answer the questions that have no answer yet; the last one has the last word."""
        still = [i for i, replies in enumerate(found) if not replies]
        is_last = isinstance(strategy, FromState)
        if not still:
            return
        for i, replies in zip(still, strategy.replies([questions[i] for i in still], subject, manner), strict=True):
            if is_last or not prompts.abstains(replies[0].text or ""):
                found[i] = [replace(one, by=strategy.name, why=why(one)) for one in replies]


@dataclass(frozen=True, slots=True)
class Vote:
    """Ask in all the ways that look into the text, and take the answer that most agree on; of several that of the
    earliest way: rereading, going on from the nearest snapshot, the states of chunks where there are some, a quote."""

    name = "vote"
    needs: frozenset[Need] = frozenset({"model", "text", "snapshots", "cells"})

    def replies(self, questions: Sequence[Question], subject: Subject, manner: Manner) -> list[list[Reply]]:
        """As `Strategy.replies`; without an answer where no way finds one."""
        voters: list[Strategy] = [Reread(), Nearest(), *([Cells()] if covers(subject) else []), Quote()]
        one_each = replace(manner, k=1)
        told = [voter.replies(questions, subject, one_each) for voter in voters]
        return [
            [_elected([(voter.name, replies[i][0]) for voter, replies in zip(voters, told, strict=True)])]
            for i in range(len(questions))
        ]


def _elected(ballots: Sequence[tuple[str, Reply]]) -> Reply:
    """The reply that stands for most, with what all of them took."""
    read, made = sum(reply.read for _, reply in ballots), sum(reply.made for _, reply in ballots)
    votes: dict[str, list[tuple[str, Reply]]] = {}
    for name, reply in ballots:
        if not prompts.abstains(reply.text or ""):
            votes.setdefault(_key(reply.text or ""), []).append((name, reply))
    if not votes:
        return Reply(None, read=read, made=made)
    most = max(votes.values(), key=len)  # of equals the first
    name, reply = most[0]
    agree = ", ".join(other for other, _ in most)
    return replace(reply, read=read, made=made, by=name, why=f"{len(most)} of {len(ballots)} agree: {agree}")


def _key(text: str) -> str:
    """What is alike of answers that say the same: their words."""
    return " ".join(word for word in words(text) if word not in _ARTICLES) or text.strip()


def _said(replies: list[list[Reply]], by: str, why: str) -> list[list[Reply]]:
    return [[replace(one, by=by, why=why) for one in some] for some in replies]
