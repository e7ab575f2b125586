"""Evidence: that what is found is what is defined, in many languages, whatever the extents, at constant memory."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rwkv_stream.answers import candidates as candidates_module
from rwkv_stream.answers import evidence as evidence_module
from rwkv_stream.answers import ranker
from rwkv_stream.answers.candidates import MOST, REACH, WINDOWS, candidates
from rwkv_stream.answers.evidence import MemoryText, find, ranked
from rwkv_stream.errors import UsageError
from rwkv_stream.text import terms
from rwkv_stream.text.postings import Postings

LIGHTHOUSE = json.loads(Path(__file__).with_name("lighthouse.json").read_text("utf-8"))
ANSWERS = (0, 2, 3, 4, 5, 6, 7, 9, 10, 11)  # the sentence that answers each question
STORY = (Path(__file__).parents[2] / "samples" / "story.txt").read_text("utf-8")
QUESTIONS = [
    json.loads(z) for z in (Path(__file__).parents[2] / "samples" / "questions.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def story() -> MemoryText:
    return MemoryText(STORY, "story.txt")


@pytest.mark.parametrize("language", LIGHTHOUSE)
def test_answers_are_found_in_many_languages(language: str) -> None:
    sentences = LIGHTHOUSE[language]["text"]
    text = MemoryText("\n\n".join(sentences))
    found = [find(question, [text]) for question in LIGHTHOUSE[language]["questions"]]
    assert all(found), "no text is said not to speak of what it speaks of"
    right = [z[0].sentence == sentences[answer] for z, answer in zip(found, ANSWERS, strict=True)]
    assert sum(right) >= 9, right


def test_questions_on_the_story_find_their_passages(story: MemoryText) -> None:
    right = 0
    for asked in QUESTIONS:
        found = find(asked["question"], [story])
        right += any(z.passage_start < asked["byte_end"] and z.passage_end > asked["byte_start"] for z in found[:1])
    assert right >= 0.6 * len(QUESTIONS)


def test_evidence_is_a_sentence_in_its_passage(story: MemoryText) -> None:
    data = STORY.encode()
    found = find("How many locks were there on the Orrin Cut?", [story], k=3)
    assert len(found) == 3
    assert "seventeen" in found[0].sentence
    for one in found:
        assert (one.text_index, one.document) == (0, "story.txt")
        assert one.sentence == data[one.byte_start : one.byte_end].decode()
        assert one.passage == data[one.passage_start : one.passage_end].decode()
        assert one.sentence in one.passage
        assert 0 <= one.confidence <= 1
    assert [z.score for z in found] == sorted((z.score for z in found), reverse=True)
    for a in found:
        for b in found[found.index(a) + 1 :]:
            assert not a.passage_start <= b.byte_start < a.passage_end, "what a passage shows is not shown again"
    assert find("How many locks were there on the Orrin Cut?", [story], k=1) == found[:1]


def test_a_passage_ends_with_the_text() -> None:
    (found,) = find("Who gave Edmund the green lamp?", [MemoryText("Mary gave Edmund the green lamp.")])
    assert (found.passage_start, found.passage_end) == (found.byte_start, found.byte_end) == (0, 32)
    assert found.passage == found.sentence


def test_the_text_that_speaks_of_it_is_found_among_several(story: MemoryText) -> None:
    sentences = LIGHTHOUSE["en"]["text"]
    other = MemoryText("\n\n".join(sentences), "lighthouse.txt")
    for texts, index in (([story, other], 1), ([other, story], 0)):
        found = find("How many sailors did Clara save?", texts)
        assert (found[0].text_index, found[0].document, found[0].sentence) == (index, "lighthouse.txt", sentences[5])
    german = MemoryText("\n\n".join(LIGHTHOUSE["de"]["text"]), "leuchtturm.txt")
    found = find("Wie viele Matrosen rettete Clara?", [story, other, german])
    assert found[0].document == "leuchtturm.txt"


def test_texts_that_do_not_speak_of_it_give_nothing(story: MemoryText) -> None:
    for question in ("What is the boiling point of nitrogen?", "xyzzy?", "", "???", "\n"):
        assert find(question, [story]) == []
    assert find("Who?", []) == find("Who was it?", [MemoryText("")]) == []


def test_questions_of_stop_words_alone_are_asked(story: MemoryText) -> None:
    told = ranked("Who is he?", [story])
    assert len(told.candidates) == len(told.values) == len(told.scores) == MOST
    assert set(told.candidates.asked.words) == {"who", "is", "he"}
    find("Who is he?", [story])


def test_of_a_long_question_the_end_counts(story: MemoryText) -> None:
    question = " ".join(f"word{i}" for i in range(5000)) + " How many locks were there on the Orrin Cut?"
    found = ranked(question, [story]).candidates
    assert len(found.asked.words) == candidates_module.MOST_WORDS
    assert {"locks", "orrin", "cut"} < set(found.asked.words)


def test_a_wrong_number_of_sentences_is_told(story: MemoryText) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        find("Who?", [story], k=0)


def brute_force(question: str, text: str) -> dict[int, float]:
    """First scores by their definition: sentence → score, of all that a window with a hit holds."""
    kept = MemoryText(text)
    spans = [span for p in kept.postings() for span in zip(p.starts.tolist(), p.ends.tolist(), strict=True)]
    analyzer = terms.Analyzer("en")
    held = [analyzer.terms(kept.read(*span).decode()) for span in spans]
    sought = dict.fromkeys(analyzer.term(w) for w in terms.words(question) if w not in analyzer.stop_words)
    n, mean = len(held), sum(map(len, held)) / len(held)
    found = {}
    for i in range(n):
        score = 0.0
        for before, after, weight, k1, b in WINDOWS:
            window = [z for s in held[max(i - before, 0) : i + after + 1] for z in s]
            for term in sought:
                df = sum(term in s for s in held)
                count = window.count(term)
                damped = k1 * (1 - b + b * len(window) / (mean * (before + after + 1)))
                score += weight * math.log1p((n - df + 0.5) / (df + 0.5)) * count * (k1 + 1) / (count + damped)
        if score:
            found[spans[i][0]] = score
    return found


def made_text(sentences: int, seed: int = 0) -> str:
    words = random.Random(seed)
    names = ["Edmund", "lamp", "lock", "river", "goose", "letter", "stone", "bell"]
    fill = [f"word{i}" for i in range(200)]
    made = []
    for _ in range(sentences):
        drawn = [*words.choices(fill, k=words.randrange(3, 12)), *words.sample(names, words.choice((0, 0, 0, 1, 2)))]
        words.shuffle(drawn)
        made.append(f"The {' '.join(drawn)}.")
    return "\n\n".join(made)


def test_first_scores_are_what_they_are_defined_to_be() -> None:
    text, question = made_text(100), "Where did Edmund find the green lamp, the goose and the bells?"
    wanted = brute_force(question, text)
    found = candidates(question, [MemoryText(text)])
    told = dict(zip(found.spans[:, REACH, 0].tolist(), found.scores.tolist(), strict=True))
    assert told == pytest.approx(wanted, rel=1e-4)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_nothing_depends_on_extents_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = made_text(800)
    assert len(text) > 2 * 16_384
    questions = ("Where did Edmund find the lamp?", "What did the goose do with the letter and the stone?")
    whole = [ranked(question, [MemoryText(text)]) for question in questions]
    monkeypatch.setattr(evidence_module, "_EXTENT", 1000)
    monkeypatch.setattr(candidates_module, "_BLOCK", 24)
    cut = MemoryText(text)
    assert sum(len(postings) > 0 for postings in cut.postings()) > 20
    for question, found in zip(questions, whole, strict=True):
        again = ranked(question, [cut])
        assert again.candidates.spans.tolist() == found.candidates.spans.tolist()
        np.testing.assert_allclose(again.values, found.values, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(again.scores, found.scores, rtol=1e-5, atol=1e-5)


class Long:
    """A text that is the same one so many times over, in an extent each."""

    def __init__(self, text: MemoryText, times: int) -> None:
        self.document = "long"
        self._text, self._times = text, times

    def read(self, byte_start: int, byte_end: int) -> bytes:
        first, last = byte_start // self._text.byte_end, (byte_end - 1) // self._text.byte_end
        at = first * self._text.byte_end
        joined = self._text.read(0, self._text.byte_end) * (last - first + 1)
        return joined[byte_start - at : byte_end - at]

    def postings(self) -> Iterator[Postings]:
        for time in range(self._times):
            for postings in self._text.postings():
                at = time * self._text.byte_end
                yield replace(postings, starts=postings.starts + at, ends=postings.ends + at)


def test_memory_does_not_grow_with_the_text() -> None:
    text = MemoryText(made_text(4000))
    ranker.shipped()

    def peak(times: int) -> int:
        tracemalloc.start()
        assert len(ranked("Where did Edmund find the lamp and the letter?", [Long(text, times)]).scores)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(40) < 1.1 * peak(8)


def test_trees_are_evaluated_as_they_are_written() -> None:
    folder = Path(ranker.__file__).parent
    written = json.loads((folder / "ranker.json").read_text("utf-8"))
    made = ranker.shipped()
    values = np.random.default_rng(0).normal(0.5, 1, (20, len(made.names))).astype(np.float32)

    def value(tree: list[list[float]], row: list[float]) -> float:
        node = tree[0]
        while len(node) > 1:
            feature, limit, left, right = node
            node = tree[int(left if row[int(feature)] <= np.float32(limit) else right)]
        return node[0]

    wanted = [sum(value(tree, row) for tree in written["trees"]) for row in values.tolist()]
    assert made.scores(values).tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert len(set(wanted)) > 10


def test_the_ranker_names_the_features_that_it_is_given(story: MemoryText) -> None:
    found = candidates(QUESTIONS[0]["question"], [story])
    made = ranker.shipped()
    names, values = ranker.features(found, evidence_module.sentences(found, [story]), made.kept)
    assert tuple(names) == made.names
    assert values.shape == (len(found), len(names))
    certain, told = ranker.certainty(names, values, made.scores(values), found.asked.sentences)
    written = json.loads((Path(ranker.__file__).parent / "ranker.json").read_text("utf-8"))
    assert certain == list(written["confidence"])
    assert told.shape == (len(found), len(made.weights))


def test_importing_evidence_loads_neither_torch_nor_pyarrow() -> None:
    probe = (
        "import rwkv_stream.answers.evidence as e; e.find('Who sat?', [e.MemoryText('Ann sat there.')]); import sys;"
        "print([m for m in ('torch', 'pyarrow', 'lightgbm') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"
