"""The model goes on from the snapshot before the passage that fits, and answers as one who has read just so far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import program

import rwkv_stream as rs
from rwkv_stream.answers import prompts
from rwkv_stream.answers.prompts import Question
from rwkv_stream.answers.strategies import STRATEGIES, replies, subject
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate, read

FILLER = "The sea was calm and grey, and nobody came. "
STORY = (
    "Old Jonas Weller kept the lighthouse at Marrow Point. He slept by day. " + FILLER * 20 + "\n\n"
    "The ferry from Brindle came on Tuesdays. Its captain, née Aske, carried the post in a green bag. " + FILLER * 4
    + "The doctor's mare was called Juniper. " + FILLER * 9
)  # fmt: skip
QUESTIONS = [
    "What was the doctor's mare called?",
    "Which planet did the astronauts colonise?",
    "In what did the captain carry the post?",
    "Who kept the lighthouse at Marrow Point?",
    "On which day did the ferry from Brindle come?",
]


@pytest.fixture
def store(tmp_path: Path, bytes_model: Model) -> rs.Store:
    (tmp_path / "story.txt").write_text(STORY)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(tmp_path / "story.txt", name="story.txt", model=bytes_model, store=store, chunk=64, snapshot_every=256)
    return store


def test_it_answers_as_one_who_has_read_up_to_the_passage_and_no_more(store: rs.Store, bytes_model: Model) -> None:
    snapshot, strategy, form = store.get("story.txt"), STRATEGIES["nearest"], prompts.family(bytes_model)
    with subject(snapshot, store, strategy.needs, bytes_model) as given:
        together = [one for _, (one,) in replies(map(Question, QUESTIONS), strategy, given)]
        alone = [one for q in QUESTIONS for _, (one,) in replies([Question(q)], strategy, given)]
    assert [one.text is None for one in together] == [False, True, False, False, False]
    assert [(one.text, one.spans) for one in together] == [(one.text, one.spans) for one in alone]
    tokenizer = bytes_model.tokenizer
    for question, one in zip(QUESTIONS, alone, strict=True):
        if one.text is None:
            continue
        assert one.spans is not None
        ((_, start, end),) = one.spans
        _, state = read(bytes_model, tokenizer.encode(STORY.encode()[:end].decode()), bytes_model.start()[1])
        prompt = prompts.fill(form.template, question)
        expected = generate(bytes_model, prompt, state=state, sampling=prompts.answering(form))
        assert one.text == "".join(expected).strip()
        assert one.read == end - start // 256 * 256 + len(tokenizer.encode_prompt(prompt))  # a token is a byte
    # three of the passages lie behind one snapshot, and the way to them is read once
    assert sum(one.read for one in together) < sum(one.read for one in alone) - 256


def test_tokens_of_several_bytes_are_those_of_the_reading(tmp_path: Path, bpe_model: Model) -> None:
    """A snapshot may stand within a word: the reading's own tokens go on from there, not new ones."""
    (tmp_path / "story.txt").write_text(STORY)
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(tmp_path / "story.txt", name="story.txt", model=bpe_model, store=store, chunk=7, snapshot_every=7)
    strategy, form = STRATEGIES["nearest"], prompts.family(bpe_model)
    with subject(store.get("story.txt"), store, strategy.needs, bpe_model) as given:
        (_, (one,)) = next(replies([Question(QUESTIONS[0])], strategy, given))
    assert one.spans is not None
    ((_, start, end),) = one.spans
    _, state = read(bpe_model, bpe_model.tokenizer.encode(STORY.encode()[:end].decode()), bpe_model.start()[1])
    prompt = prompts.fill(form.template, QUESTIONS[0])
    assert one.text == "".join(generate(bpe_model, prompt, state=state, sampling=prompts.answering(form))).strip()
    assert one.read <= len(bpe_model.tokenizer.encode(STORY.encode()[start:end].decode())) + 7 + len(
        bpe_model.tokenizer.encode_prompt(prompt)
    )


def test_where_no_snapshot_is_left_before_it_the_start_is_taken(store: rs.Store, bytes_model: Model) -> None:
    strategy = STRATEGIES["nearest"]
    with subject(store.get("story.txt"), store, strategy.needs, bytes_model) as given:
        (_, (before,)) = next(replies([Question(QUESTIONS[0])], strategy, given))
    for entry in list(store.list()):
        if entry.id != store.get("story.txt").id:
            store.rm(entry.id)
    with subject(store.get("story.txt"), store, strategy.needs, bytes_model) as given:
        (_, (after,)) = next(replies([Question(QUESTIONS[0])], strategy, given))
    assert (before.text, before.spans) == (after.text, after.spans) and after.read > before.read + 256


def test_what_a_document_was_started_from_is_where_it_begins(
    store: rs.Store, tmp_path: Path, bytes_model: Model
) -> None:
    text = "The ship sank in the harbour of Vell. Its bell was found by divers. "
    (tmp_path / "part2.txt").write_text(text)
    rs.ingest(tmp_path / "part2.txt", name="part2.txt", model=bytes_model, store=store, from_snapshot="story.txt")
    strategy, form, question = STRATEGIES["nearest"], prompts.family(bytes_model), "Who found the bell of the ship?"
    with subject(store.get("part2.txt"), store, strategy.needs, bytes_model) as given:
        (_, (one,)) = next(replies([Question(question)], strategy, given))
    assert one.spans is not None
    ((index, _, end),) = one.spans
    _, state = read(bytes_model, bytes_model.tokenizer.encode(text[:end]), store.get("story.txt").state())
    expected = generate(
        bytes_model, prompts.fill(form.template, question), state=state, sampling=prompts.answering(form)
    )
    assert (index, one.text) == (0, "".join(expected).strip())


def test_from_the_program(program_folder: Path) -> None:
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64, "--snapshot-every", 256).code == 0
    options = ("--from-snapshot", "story.txt", "--strategy", "nearest", "--max-tokens", 4, "--json")
    said = json.loads(program("ask", QUESTIONS[0], *options).out)
    (source,) = said["sources"]
    assert (said["strategy"], said["tokens"], "Juniper" in source["text"]) == ("nearest", 4, True)
    assert STORY.encode()[source["byte_start"] : source["byte_end"]].decode() == source["text"]
