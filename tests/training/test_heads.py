"""Heads are trained on pairs of texts; what they learn finds texts of documents that were held out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random

import pytest
import torch

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.training import heads
from rwkv_stream.training.heads import Pair
from rwkv_stream.training.split import Split, key

PARAGRAPH = ("The keeper lit the lamp and wrote the hour down. " * 5).strip()


def made(n: int) -> list[Pair]:
    """Of documents of four texts, each a row of one word among other words, asked for by the word alone."""
    random = Random(0)
    words = ["".join(random.choices("abcdefghij", k=4)) for _ in range(40)]
    pairs = []
    for i in range(n):
        chosen = random.sample(words, 4)
        pairs += [Pair(f"Where is {word}?", f"{i}: {' '.join([word] * 5)}.", f"{i}") for word in chosen]
    return pairs


def test_pairs_of_records_and_texts(tmp_path: Path) -> None:
    rows = [
        {"question": " Who? ", "context": "Anna came.", "document": "a"},
        {"question": "Who?", "context": "Ben came.", "title": "b"},
        {"title": "Lamps", "text": f"{PARAGRAPH}\n\n{PARAGRAPH}\n\nThe end."},
        {"text": "Short."},
    ]
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = list(heads.pairs(tmp_path / "r.jsonl.gz"))
    passage = f"{PARAGRAPH}\n\n{PARAGRAPH}"
    assert found == [
        Pair("Who?", "Anna came.", "a"),
        Pair("Who?", "Ben came.", "b"),
        Pair("Lamps", passage, f"{tmp_path / 'r.jsonl.gz'} 2"),
        Pair(passage, "The end.", f"{tmp_path / 'r.jsonl.gz'} 2"),
    ]
    reported = Split(report=(key(rows[1]), key(rows[2])))
    assert [z.first for z in heads.pairs(tmp_path / "r.jsonl.gz", reported)] == ["Who?"]
    (tmp_path / "t.txt").write_text(f"{PARAGRAPH}\n\n" * 4)
    assert [pair[:2] for pair in heads.pairs(tmp_path / "t.txt")] == [(passage, passage)]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(InputError, match="row 2: expected the texts 'question' and 'context', or 'text', found body"):
        list(heads.pairs(tmp_path / "bad.jsonl"))


def test_a_sample_holds_whole_documents_out(bytes_model: Model) -> None:
    given = made(40)
    found = heads.sample([*given, Pair("same", "same", "0"), Pair("a", "", "1")], 1 << 20, bytes_model.tokenizer)
    rows = [*found.train, *found.held]
    assert sorted((found.texts[a], found.texts[b]) for row in rows for a, b in row) == sorted(z[:2] for z in given)
    assert len(found.held) == 4
    assert [bytes(ids).decode() for ids in found.ids] == found.texts
    assert heads.sample(given, 4000, bytes_model.tokenizer).n_pairs < found.n_pairs
    assert len(heads.sample([z._replace(document="") for z in given], 1 << 20, bytes_model.tokenizer).held[0]) == 16
    with pytest.raises(UsageError, match="expected 64 pairs of texts or more, found 36"):
        heads.sample(given[:40], 1 << 20, bytes_model.tokenizer)


def test_a_head_learns_to_find(bytes_model: Model) -> None:
    given, told = heads.sample(made(60), 1 << 20, bytes_model.tokenizer), []
    found = heads.trained(bytes_model, given, epochs=12, read=lambda *z: told.append(z), step=lambda *z: told.append(z))
    assert found.n == 24 and found.head.layers == 1 and found.head.model == bytes_model.fingerprint
    assert found.after > 0.9 and found.after > found.before + 0.1
    n_tokens, steps = sum(map(len, given.ids)), round(12 * given.n_pairs / heads.BATCH)
    assert (n_tokens, n_tokens) in told and told[-steps:] == [(i + 1, steps) for i in range(steps)]
    again = heads.trained(bytes_model, given, epochs=12)
    assert torch.equal(again.head.value, found.head.value)


def test_a_teacher_says_which_texts_are_alike(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors by which everything is alike draw those of the head together."""
    monkeypatch.setattr(heads, "ALIKE", 100)
    given = heads.sample(made(30), 1 << 20, bytes_model.tokenizer)
    alike = torch.ones(len(given.texts), 1)
    spread = []
    for teacher in (None, alike):
        head = heads.trained(bytes_model, given, epochs=40, teacher=teacher).head
        features = heads.Features(bytes_model, 1, given.ids[:20], lambda *_: None)
        hidden, texts = features.of(range(20))
        sums = torch.zeros(20, head.n_features).index_add(0, texts, head.features(bytes_model)(hidden))
        vectors = torch.nn.functional.normalize(head.vectors(sums), dim=-1)
        spread.append((vectors @ vectors.T).mean().item())
    assert spread[1] > spread[0] + 0.1


def test_ranks() -> None:
    vectors = torch.eye(4)
    vectors[3] = torch.tensor([0.0, 0.6, 0.8, 0.0])
    score, n = heads.mean_reciprocal_rank(lambda numbers: vectors[list(numbers)], [[(3, 1), (3, 2)], [(0, 1)]])
    assert (score, n) == (pytest.approx((1 / 2 + 1) / 2), 2)
