"""Codecs are measured by what the model says after a state was restored from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_stream.errors import UsageError
from rwkv_stream.evaluation import certify
from rwkv_stream.model import Model
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Store, codecs

TEXT = "".join(f"In the year {year} the miller counted {year * 7 % 1000} sacks. " for year in range(60))


@pytest.fixture
def store(tmp_path: Path, bytes_model: Model) -> Store:
    (tmp_path / "mill.txt").write_text(TEXT)
    store = Store(tmp_path / "a.store", create=True)
    ingest(tmp_path / "mill.txt", model=bytes_model, store=store, name="mill", chunk=64, snapshot_every=256)
    return store


def test_what_is_exact_costs_nothing_and_fewer_bits_cost_more(store: Store, bytes_model: Model) -> None:
    exact, int16, int8 = certify.certify(store.get("mill"), model=bytes_model, store=store)
    assert (exact.codec, int16.codec, int8.codec) == ("exact", "int16", "int8")
    assert (exact.kl, exact.worst_kl, exact.flips) == (0, 0, 0) and exact.bits == exact.exact_bits
    assert 0 < int16.kl < int8.kl and int16.worst_kl < int8.worst_kl
    assert int8.share < int16.share < exact.share
    assert exact.places == int8.places >= 4 and exact.tokens == int8.tokens > exact.places * certify.PIECE


def test_the_figures_are_those_of_plain_code(store: Store, bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one place, with the logits of all tokens at once."""
    monkeypatch.setattr(certify, "PLACES", 1)
    found = {one.codec: one for one in certify.certify(store.get("mill"), model=bytes_model, store=store)}["int8"]
    snapshot = next(store.ancestors(store.get("mill")))
    ids = bytes_model.tokenizer.encode(TEXT.encode()[snapshot.bytes :].decode())[: certify.TOKENS + 1]
    rows = []
    for codec in (codecs.CODECS["exact"], codecs.CODECS["int8"]):
        state = snapshot.state()
        near = {
            name: torch.from_numpy(codec.decode(codec.encode(np.ascontiguousarray(t.numpy())), tuple(t.shape)))
            for name, t in state.items()
        }
        logits, _ = bytes_model.forward(torch.tensor([ids[:-1]]), type(state)(near), logits="all")
        rows.append(logits[0].double().log_softmax(-1))
    kl = (rows[0].exp() * (rows[0] - rows[1])).sum(-1)
    bits = -sum(float(row[token]) for row, token in zip(rows[1], ids[1:], strict=True)) / np.log(2)
    assert found.tokens == len(ids) - 1
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-12)
    assert found.worst_kl == pytest.approx(float(kl.max()), rel=1e-3, abs=1e-12)
    assert found.bits == pytest.approx(bits / len(bytes_model.tokenizer.decode(ids[1:])), rel=1e-5)
    assert found.flips == int((rows[0].argmax(-1) != rows[1].argmax(-1)).sum())


def test_without_text_behind_exact_states_nothing_is_certified(store: Store, bytes_model: Model) -> None:
    first = [*store.ancestors(store.get("mill"))][-1]
    with pytest.raises(UsageError, match="expected exact states with kept text behind them, found none"):
        certify.certify(first, model=bytes_model, store=store)
