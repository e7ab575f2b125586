"""The model reads the passages that fit a question, between the question and itself, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import program

from rwkv_stream.answers import prompts
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.reread import reread
from rwkv_stream.answers.strategies import STRATEGIES, Posed, Subject
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate

STORY = (
    "The rain had stopped by noon. Old Jonas Weller kept the lighthouse at Marrow Point. He slept by day. "
    + "The sea was calm and grey. " * 12
    + "The ferry from Brindle came on Tuesdays. Its captain carried the post in a green bag. Nobody wrote to him."
)
QUESTION = "Who kept the lighthouse at Marrow Point?"


def test_the_answer_is_that_of_the_question_around_its_passages(bytes_model: Model) -> None:
    text = MemoryText(STORY)
    asked = [QUESTION, "Which planet did the astronauts colonise?", "In what did the captain carry the post?"]
    found = list(reread(asked, [text], bytes_model))
    form = prompts.family(bytes_model)
    for question, one in zip(asked, found, strict=True):
        if one.answer is None:
            continue
        assert all(text.read(p.byte_start, p.byte_end).decode() == p.text for p in one.passages)
        assert list(one.passages) == sorted(one.passages)
        prompt = prompts.around(form, question, "\n\n".join(p.text for p in one.passages))
        alone = generate(bytes_model, prompt, state=bytes_model.start()[1], sampling=prompts.answering(form))
        assert one.answer == "".join(alone).strip()
    assert [one.answer is None for one in found] == [False, True, False]
    assert any("Jonas Weller" in p.text for p in found[0].passages)
    assert any("green bag" in p.text for p in found[2].passages)
    assert found[1] == (None, (), 0)


def test_as_a_strategy_it_says_what_it_rests_on(bytes_model: Model) -> None:
    subject = Subject(bytes_model, "story", text=MemoryText(STORY))
    (reply,) = STRATEGIES["reread"].replies([Posed(QUESTION)], subject)
    (alone,) = reread([QUESTION], [MemoryText(STORY)], bytes_model)
    assert (reply.text, reply.spans) == (alone.answer, tuple((p.byte_start, p.byte_end) for p in alone.passages))


def test_from_the_program(program_folder: Path) -> None:
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    options = ("--from-snapshot", "story.txt", "--strategy", "reread", "--max-tokens", 4)
    said = json.loads(program("ask", QUESTION, *options, "--json").out)
    assert (said["strategy"], said["confidence"], said["tokens"]) == ("reread", None, 4)
    data = STORY.encode()
    for source in said["sources"]:
        assert data[source["byte_start"] : source["byte_end"]].decode() == source["text"]
        assert source["place"] == {"line": 1}
    shown = program("ask", QUESTION, *options).out
    assert f"  story.txt, line 1, bytes {said['sources'][0]['byte_start']:,} to " in shown
    Path("q.txt").write_text(f"{QUESTION}\nWhich planet did the astronauts colonise?\n")
    of_all = program("ask", "--questions", "q.txt", "--all", "--strategy", "reread", "--max-tokens", 4, "--json")
    rows = [json.loads(line) for line in of_all.out.splitlines()]
    assert [row["answer"] == said["answer"] for row in rows] == [True, False] and rows[1]["answer"] is None


@pytest.mark.parametrize("options", [("--k", 2), ("--save", "tag"), ("--prompt-template", "{question}")], ids=str)
def test_options_of_other_strategies_are_refused(program_folder: Path, options: tuple[object, ...]) -> None:
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    ended = program("ask", QUESTION, "--from-snapshot", "story.txt", "--strategy", "reread", *options)
    assert (ended.code, str(options[0]) in ended.err, ended.out) == (2, True, "")
