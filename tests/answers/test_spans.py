"""The short answer within passages: what the network sees, what it computes, what it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_stream.answers import english, spans
from rwkv_stream.answers.spans import KINDS, Passage, SpanHead, Vocabulary
from rwkv_stream.errors import InputError
from rwkv_stream.training import spans as training
from rwkv_stream.training.spans import Example, Network, right_spans

VOCABULARY = Vocabulary(["the", ".", "a", "was", "in", "of", "who", "lamp", "keeper", "sea"])
LAMP = Passage(["The sea was calm.", "In 1841 Edmund Brae lit the lamp.", "He slept."], 1, [0.2, 1.0, 0.1], [False] * 3)
SEA = Passage(["A storm rose."], 0, [0.3], [False])


def network(seed: int = 0, width: int = 8) -> Network:
    torch.manual_seed(seed)
    n_features = VOCABULARY.inputs("Who?", LAMP).features.shape[1]
    return Network(torch.randn(len(VOCABULARY.words) + 1, 6), n_features, len(KINDS), spans.DILATIONS, width).eval()


def example(question: str, passages: list[Passage], answers: list[str]) -> Example:
    seen = [VOCABULARY.inputs(question, passage) for passage in passages]
    right = []
    for passage, inputs in zip(passages, seen, strict=True):
        spelt = [passage.sentences[word.sentence][word.start : word.end] for word in inputs.words]
        right.append(right_spans(spelt, answers, [True] * len(spelt)))
    features, vectors = [x.features for x in seen], [x.vectors for x in seen]
    return Example(VOCABULARY.question(question), KINDS.index(english.kind_of(question)), features, vectors, right)


def test_numpy_computes_what_was_trained() -> None:
    made = network()
    head = SpanHead(VOCABULARY, training.weights(made))
    asked = {"Who lit the lamp in the storm?": [LAMP, SEA], "Sea?": [SEA]}
    examples = [example(question, passages, ["Edmund", "storm"]) for question, passages in asked.items()]
    with torch.no_grad():
        logits = made(training._batch(examples, len(VOCABULARY.words)))
    rows = iter(logits)
    for one, (question, passages) in zip(examples, asked.items(), strict=True):
        inputs = [VOCABULARY.inputs(question, passage) for passage in passages]
        for found in head.ends(one.question, one.kind, inputs):
            row = next(rows)
            np.testing.assert_allclose(found, row[: len(found)].numpy(), atol=1e-4)
            assert torch.isinf(row[len(found) :]).all()


def test_an_answer_of_one_passage_competes_with_those_of_all() -> None:
    head = SpanHead(VOCABULARY, training.weights(network()))
    both, alone = head.find("Who lit the lamp?", [LAMP, SEA]), head.find("Who lit the lamp?", [SEA])
    assert [span.passage for span in both] != [] and len(both) == 2
    assert both[0].log_probability >= both[1].log_probability
    of_sea = next(span for span in both if span.passage == 1)
    assert of_sea.log_probability < alone[0].log_probability < 0
    assert of_sea._replace(passage=0, log_probability=0) == alone[0]._replace(log_probability=0)
    assert head.find("Who?", []) == []


def test_it_learns_where_answers_stand() -> None:
    """Of many questions on a name in a noise of words, told by its capital."""
    words, rows = ["calm", "grey", "wide", "cold", "near", "still", "deep", "far"], []
    random = np.random.default_rng(0)
    for _ in range(64):
        said = [str(word) for word in random.choice(words, 9)]
        said[int(random.integers(9))] = "Brae"
        rows.append(example("Who was it?", [Passage([" ".join(said)], 0, [1.0], [False])], ["brae"]))
    made = network(width=16)
    before = training.loss(made, rows).item()
    training.train(made, rows, epochs=25)
    assert before > 3 and training.loss(made, rows).item() < before / 4
    (best,) = SpanHead(VOCABULARY, training.weights(made)).find(
        "Who was it?", [Passage(["far far still Brae deep"], 0, [1.0], [False])]
    )
    assert (best.first.start, best.last.end) == (14, 18)


def test_a_word_is_seen_with_what_matches_around_it() -> None:
    seen = VOCABULARY.inputs("When did they light lamps?", LAMP)
    spelt = [LAMP.sentences[word.sentence][word.start : word.end] for word in seen.words]
    assert spelt == [
        "The",
        "sea",
        "was",
        "calm",
        ".",
        "In",
        "1841",
        "Edmund",
        "Brae",
        "lit",
        "the",
        "lamp",
        ".",
        "He",
        "slept",
        ".",
    ]
    match, back, on = (seen.features[:, i] for i in (0, 8, 9))
    assert [word for word, is_match in zip(spelt, match, strict=True) if is_match] == ["lit", "lamp"]
    year = spelt.index("1841")
    assert on[year] == pytest.approx(3 / 20) and back[year] == 1
    assert seen.vectors[spelt.index("Edmund")] == len(VOCABULARY.words)


def test_a_stop_that_ends_no_sentence_is_part_of_its_word() -> None:
    told = ["It was Mr. J. Brae.", "“Come to me. Now,” he said at 5 p.m. on Friday."]
    spelt = [told[word.sentence][word.start : word.end] for word in spans.words(told)]
    assert spelt[:6] == ["It", "was", "Mr.", "J.", "Brae", "."]
    assert " ".join(spelt[6:]) == "“ Come to me . Now , ” he said at 5 p.m. on Friday ."
    rows = Vocabulary(["mr", "."]).inputs("Who?", Passage(told, 0, [1.0, 0.0], [False, False])).vectors
    assert rows[:6].tolist() == [2, 2, 0, 2, 2, 1]


def test_no_answer_ends_with_the_title_of_a_name() -> None:
    passage = Passage(["It was Mr. Brae of St. Ives, or Mr. or both."], 0, [1.0], [False])
    seen = VOCABULARY.inputs("Who was it?", passage)
    leads = [passage.sentences[0][seen.words[i].start : seen.words[i].end] for i in np.flatnonzero(seen.leads)]
    assert leads == ["Mr.", "St."]
    (logits,) = SpanHead(VOCABULARY, training.weights(network())).ends(VOCABULARY.question("Who?"), 0, [seen])
    assert np.isinf(logits[:, 1]).tolist() == seen.leads.tolist() and np.isfinite(logits[:, 0]).all()


def test_right_spans_are_all_places_of_an_answer_where_it_is_allowed() -> None:
    spelt = ["The", "Old-Keeper", ",", "the", "old", "keeper", "."]
    assert right_spans(spelt, ["old keeper!", ""], [True] * 7) == [(1, 1), (4, 5)]
    assert right_spans(spelt, ["old keeper"], [False] * 4 + [True] * 3) == [(4, 5)]


def test_the_likeliest_span_is_not_longer_than_an_answer() -> None:
    logits = np.zeros((40, 2), np.float32)
    logits[3, 0], logits[30, 1], logits[5, 1] = 5, 4, 1
    assert spans.best_span(logits) == (3, 5, 6.0)
    assert spans.best_span(np.ones((1, 2), np.float32)) == (0, 0, 2.0)


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = network()
    path = tmp_path / "spans.safetensors"
    training.save(path, VOCABULARY.words, made)
    head, exact = spans.read(path), SpanHead(VOCABULARY, training.weights(made))
    assert head.vocabulary.words == VOCABULARY.words
    (read,), (kept,) = (z.find("Who lit the lamp?", [LAMP]) for z in (head, exact))
    assert read.log_probability == pytest.approx(kept.log_probability, abs=0.1)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="span head"):
        spans.read(path)
