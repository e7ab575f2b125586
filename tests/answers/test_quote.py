"""Answers quoted from texts: they stand where they say, whatever kept the text; what it does not say has none."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from program import program

from rwkv_stream.answers.evidence import MemoryText
from rwkv_stream.answers.quote import quotes
from rwkv_stream.answers.strategies import quote
from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.store import Store

STORY = """The rain had stopped by noon, and the café was full — nobody left before two.

Chapter 2

Old Jonas Weller kept the lighthouse at Marrow Point. In the spring of 1841 his daughter Ada planted a walnut tree \
behind the tower. She watered it every evening.

The ferry from Brindle came on Tuesdays. Its captain, Henrik Aske, carried the post in a green leather bag. He never \
opened the letters.

“What became of the brass telescope?” asked the doctor. “We sold it to a baker in Lund,” said Ada.
"""
QUESTIONS = {
    "Who kept the lighthouse at Marrow Point?": "Jonas Weller",
    "In what did the captain carry the post?": "green leather bag",
    "When did Ada plant the walnut tree?": "1841",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_stands_where_it_says(question: str) -> None:
    text = MemoryText(STORY, "story")
    (best,) = quotes(question, [text])
    assert QUESTIONS[question] in text.read(best.sentence_start, best.sentence_end).decode()
    assert text.read(best.byte_start, best.byte_end).decode() == best.answer
    assert text.read(best.passage_start, best.passage_end).decode() == best.passage
    assert best.passage_start <= best.sentence_start <= best.byte_start < best.byte_end <= best.passage_end
    assert len(best.answer.split()) <= 15 and 0 < best.confidence <= 1 and best.document == "story"


def test_what_a_text_does_not_speak_of_has_no_answer() -> None:
    assert quotes("Which planet did the astronauts colonise with hydroponic farms?", [MemoryText(STORY)]) == []
    assert quotes("Who?", [MemoryText("")]) == []
    assert quotes("Who?", []) == []


def test_several_answers_and_texts() -> None:
    texts = [MemoryText("The weather was fine. Nothing happened.", "dull"), MemoryText(STORY, "story")]
    found = quotes("Who kept the lighthouse at Marrow Point?", texts, k=3)
    assert found[0].document == "story" and found[0].text_index == 1
    spans = [(z.text_index, z.sentence_start) for z in found]
    assert len(set(spans)) == len(spans)
    with pytest.raises(UsageError, match="at least 1"):
        quotes("Who?", texts, k=0)


def test_in_another_language_the_sentence_is_the_answer() -> None:
    text = MemoryText(
        "Der Regen hörte gegen Mittag auf. Der alte Jonas Weller bewachte den Leuchtturm von Marrow. Die Fähre kam "
        "am Dienstag. Sie brachte die Post in einer grünen Tasche."
    )
    (best,) = quotes("Wer bewachte den Leuchtturm von Marrow?", [text])
    assert best.answer == "Der alte Jonas Weller bewachte den Leuchtturm von Marrow."


def test_of_texts_in_several_languages_each_is_quoted_in_its_own_way() -> None:
    german = MemoryText("Es war Mittag. Jonas Weller bewachte damals den Leuchtturm von Marrow Point. Es war kalt.")
    found = quotes("Did Jonas Weller keep the light at Marrow Point?", [german, MemoryText(STORY), MemoryText("")], k=2)
    whole = {z.text_index: z.byte_end - z.byte_start == z.sentence_end - z.sentence_start for z in found}
    assert whole == {0: True, 1: False}


def test_a_passage_is_read_once() -> None:
    class Counted(MemoryText):
        reads = 0

        def read(self, byte_start: int, byte_end: int) -> bytes:
            self.reads += 1
            return super().read(byte_start, byte_end)

    text = Counted(STORY)
    assert quotes("Who kept the lighthouse at Marrow Point?", [text])
    assert text.reads == 2  # the sentences that are ranked, which lie close together, and the best one's passage


@pytest.fixture
def store(program_folder: Path) -> Store:
    """A store in the environment that has read the story."""
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64, "--snapshot-every", 256).code == 0
    return Store("store")


QUESTION, ANSWER = next(iter(QUESTIONS.items()))


def test_a_question_is_answered_with_its_place(store: Store) -> None:
    ended = program("ask", QUESTION, "--from-snapshot", "story.txt", "--strategy", "quote")
    assert ended.code == 0
    words, passage, place = ended.out.splitlines()
    assert words in passage and ANSWER in passage
    assert "from snapshot" in ended.err
    start = len(STORY[: STORY.index(words)].encode())
    assert place.startswith(f"  story.txt, line 5, bytes {start:,} to {start + len(words.encode()):,}; confidence 0.")


def test_json_says_what_stands_where(store: Store) -> None:
    ended = program("ask", QUESTION, "--from-snapshot", "story.txt", "--strategy", "quote", "--json", "--k", 2)
    answers = [json.loads(line) for line in ended.out.splitlines()]
    assert [one["rank"] for one in answers] == list(range(1, len(answers) + 1))
    for one in answers:
        (source,) = one["sources"]
        data = STORY.encode()
        assert data[source["byte_start"] : source["byte_end"]].decode() == source["text"]
        assert data[one["byte_start"] : one["byte_end"]].decode() == one["answer"]
        assert (one["strategy"], one["tokens"], source["document"]) == ("quote", 0, "story.txt")
        assert one["snapshot"] == source["snapshot"] == store.get("story.txt").id
        assert source["place"] == {"line": data[: one["byte_start"]].count(b"\n") + 1}


def test_a_snapshot_is_asked_for_what_it_has_read(store: Store) -> None:
    half = store.get("story.txt@256")
    (late,) = quote("In what did the captain carry the post?", snapshot=half, store=store)
    (early,) = quote(QUESTION, snapshot=half, store=store)
    assert late.answer is None or (late.byte_end or 0) <= half.bytes
    assert early.answer is not None and ANSWER in (early.sources[0].text or "")


def test_questions_of_a_file(store: Store) -> None:
    Path("q.txt").write_text("\n".join([*QUESTIONS, "Which planet did the astronauts colonise?"]))
    options = ("--from-snapshot", "story.txt", "--strategy", "quote")
    ended = program("ask", "--questions", "q.txt", *options)
    assert "(the text does not speak of this)" in ended.out and [q in ended.out for q in QUESTIONS] == [True] * 3
    assert program("ask", "--questions", "q.txt", *options, "-o", "a.parquet").code == 0
    rows = pq.read_table("a.parquet").to_pylist()
    assert [row["answer"] is None for row in rows] == [False, False, False, True]
    assert rows[0]["sources"][0]["place"]["line"] == 5


def test_where_no_text_was_kept_the_document_is_read_again(store: Store) -> None:
    kept = quote(QUESTION, snapshot=store.get("story.txt"), store=store)
    Path("same.txt").write_text(STORY)
    assert program("ingest", "same.txt", "--chunk", 128, "--no-text", "--store", "other").code == 0
    other = Store("other")
    snapshot = other.get("same.txt")
    assert other.text(snapshot) is None
    (again,) = quote(QUESTION, snapshot=snapshot, store=other)
    assert (again.answer, again.byte_start, again.sources[0].place) == (
        kept[0].answer,
        kept[0].byte_start,
        kept[0].sources[0].place,
    )
    Path("same.txt").write_text(STORY.replace("Ada", "Eve"))
    with pytest.raises(InputError, match="--strategy state"):
        quote(QUESTION, snapshot=snapshot, store=other)
    Path("same.txt").unlink()
    ended = program("ask", QUESTION, "--from-snapshot", "same.txt", "--strategy", "quote", "--store", "other")
    assert (ended.code, ended.out) == (1, "") and "--strategy state" in ended.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--strategy", "quote", "--temperature", "1"], "--temperature"),
        (["--strategy", "quote", "--save", "tag"], "--save"),
        (["--strategy", "quote", "--prompt-template", "{question}"], "--prompt-template"),
        (["--strategy", "state", "--k", "2"], "--k"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_options_of_the_other_strategy_are_refused(store: Store, options: list[str], told: str) -> None:
    ended = program("ask", QUESTION, "--from-snapshot", "story.txt", *options)
    assert (ended.code, told in ended.err, ended.out) == (2, True, "")


def test_a_model_that_has_not_learned_to_answer_is_not_asked(
    program_folder: Path, bpe_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bpe_model_path))
    Path("story.txt").write_text(STORY)
    assert program("ingest", "story.txt", "--chunk", 64).code == 0
    said = json.loads(program("ask", QUESTION, "--from-snapshot", "story.txt", "--json").out)
    assert (said["strategy"], ANSWER in said["sources"][0]["text"]) == ("quote", True)
    said = json.loads(program("ask", QUESTION, "--from-snapshot", "story.txt", "--json", "--max-tokens", 3).out)
    assert (said["strategy"], said["confidence"]) == ("state", None)


def test_several_documents_of_one_lineage(store: Store, bytes_model: Model) -> None:
    Path("part2.txt").write_text("The ship sank in the harbour of Vell. Its bell was found by divers.\n")
    assert program("ingest", "part2.txt", "--from-snapshot", "story.txt", "--chunk", 64).code == 0
    snapshot = store.get("part2.txt")
    (first,) = quote(QUESTION, snapshot=snapshot, store=store)
    (second,) = quote("Who found the bell of the ship?", snapshot=snapshot, store=store)
    assert [one.sources[0].document for one in (first, second)] == ["story.txt", "part2.txt"]


def test_all_documents_are_asked_each_once(store: Store) -> None:
    Path("ship.txt").write_text("The ship sank in the harbour of Vell. Its bell was found by divers.\n")
    assert program("ingest", "ship.txt", "--chunk", 64).code == 0
    for question, document in [(QUESTION, "story.txt"), ("Who found the bell of the ship?", "ship.txt")]:
        ended = program("ask", question, "--all", "--json")
        assert (ended.code, "from 2 documents" in ended.err) == (0, True)
        said = json.loads(ended.out)
        assert (said["sources"][0]["document"], said["snapshot"], said["strategy"]) == (document, None, "quote")


def test_a_damaged_text_is_named_and_the_others_are_asked(store: Store) -> None:
    tip = store.get("story.txt").text
    assert tip is not None
    Path("ship.txt").write_text("The ship sank in the harbour of Vell. Its bell was found by divers.\n")
    assert program("ingest", "ship.txt", "--chunk", 64).code == 0
    path = next(Path("store").glob(f"texts/*/{tip}"))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    Path("q.txt").write_text("Which letters did the captain never open?\nWho found the bell of the ship?\n")
    ended = program("ask", "--questions", "q.txt", "--all")
    assert (ended.code, ended.err.count(path.name)) == (3, 1), ended.err
    assert "divers" in ended.out
    assert program("ask", QUESTION, "--from-snapshot", "story.txt", "--strategy", "quote").code == 12


def test_the_end_of_a_paragraph_is_marked(program_folder: Path) -> None:
    """A title above what is quoted does not run into it."""
    Path("a.txt").write_text("The Bad Temper\n\nThe doctor at Nether Alder was named Philip Wray.\nHe drove a gig.\n")
    assert program("ingest", "a.txt", "--chunk", 64).code == 0
    asked = "ask", "What was the doctor at Nether Alder named?", "--from-snapshot", "a.txt", "--strategy", "quote"
    shown = " ".join(program(*asked).out.split())
    assert "The Bad Temper ¶ The doctor at Nether Alder was named Philip Wray. He drove a gig." in shown
