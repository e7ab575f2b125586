"""The model reads the passages that fit a question, between the question and itself, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import program

from rwkv_stream.answers import prompts
from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import STRATEGIES, replies
from rwkv_stream.answers.strategy import Reply, Subject
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate

STORY = (
    "The rain had stopped by noon. Old Jonas Weller kept the lighthouse at Marrow Point. He slept by day. "
    + "The sea was calm and grey. " * 12
    + "The ferry from Brindle came on Tuesdays. Its captain carried the post in a green bag. Nobody wrote to him."
)
QUESTION = "Who kept the lighthouse at Marrow Point?"


def test_the_answer_is_that_of_the_question_around_its_passages(bytes_model: Model) -> None:
    text, tokenizer = MemoryText(STORY), bytes_model.tokenizer
    asked = [QUESTION, "Which planet did the astronauts colonise?", "In what did the captain carry the post?"]
    subject = Subject("story", bytes_model, texts=[text])
    found = [one for _, (one,) in replies(map(Question, asked), STRATEGIES["reread"], subject)]
    form = prompts.family(bytes_model)
    told = [[text.read(*span[1:]).decode() for span in one.spans or ()] for one in found]
    for question, one, passages in zip(asked, found, told, strict=True):
        if one.text is None:
            continue
        assert one.spans and list(one.spans) == sorted(one.spans)
        prompt = prompts.around(form, question, "\n\n".join(passages))
        alone = generate(bytes_model, prompt, state=bytes_model.start()[1], sampling=prompts.answering(form))
        assert one.text == "".join(alone).strip()
        assert one.read == len(tokenizer.encode_prompt(prompt)) and one.made > 0
    assert [one.text is None for one in found] == [False, True, False]
    assert any("Jonas Weller" in passage for passage in told[0])
    assert any("green bag" in passage for passage in told[2])
    assert found[1] == Reply(None)


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
