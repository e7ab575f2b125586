"""What was stored is what reading again gives, bit for bit, and what is not is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rwkv_stream.errors import InputError, MismatchError
from rwkv_stream.model import Model
from rwkv_stream.model.state import State
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.reading.prove import prove
from rwkv_stream.store import NewSnapshot, Snapshot, Store, recode

TEXT = "".join(f"In the year {year} the miller counted {year * 7 % 1000} sacks. " for year in range(40))
EVERY = {"chunk": 64, "snapshot_every": 256}


class Desk:
    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.store = model, folder, Store(folder / "a.store", create=True)

    def read(self, text: str, name: str = "mill", **options: object) -> Snapshot:
        path = self.folder / f"{name}.txt"
        path.write_text(text)
        report = ingest(path, model=self.model, store=self.store, name=name, **(EVERY | options))
        return self.store.get(report.snapshot)


@pytest.fixture(params=["bytes", "bpe"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(request.getfixturevalue(f"{request.param}_model"), tmp_path)


def test_every_snapshot_of_a_reading(desk: Desk) -> None:
    head = desk.read(TEXT)
    lineage = [head, *desk.store.ancestors(head)]
    assert len(lineage) > 3
    for before, snapshot in zip([*lineage[1:], None], lineage, strict=True):
        proof = prove(snapshot, model=desk.model, store=desk.store)
        assert proof.equal and proof.differs is None and proof.numerics == ()
        assert (proof.from_token, proof.to_token) == (before.tokens if before is not None else 0, snapshot.tokens)
        assert (proof.checked, proof.same_up_to) == (1, snapshot.tokens)
    whole = prove(head, model=desk.model, store=desk.store, from_start=True)
    assert whole.equal and whole.from_token == 0 and whole.checked == len(lineage)


@pytest.mark.parametrize("max_tokens", [49, 51])
def test_a_reading_that_was_cut_before_what_decides_its_tokens(
    bpe_model: Model, tmp_path: Path, max_tokens: int
) -> None:
    """Within a character, and behind one."""
    desk = Desk(bpe_model, tmp_path)
    cut = desk.read("漢字の塔 é " * 60, chunk=16, snapshot_every=16, max_tokens=max_tokens)
    with pytest.raises(InputError, match="ends before what decided them"):
        prove(cut, model=desk.model, store=desk.store)


def test_a_document_that_was_started_from_another(desk: Desk) -> None:
    desk.read(TEXT)
    second = desk.read(TEXT[::-1], "second", from_snapshot="mill")
    assert prove(second, model=desk.model, store=desk.store, from_start=True).equal
    desk.store.recode("int8", keep_exact=1)
    assert prove(second, model=desk.model, store=desk.store, from_start=True).equal, "heads stay exact"


def test_a_state_kept_nearly_is_proven_by_its_digest(desk: Desk) -> None:
    head = desk.read(TEXT)
    desk.store.recode("int8")
    proof = prove(desk.store.get(head.id), model=desk.model, store=desk.store, from_start=True)
    assert proof.equal and proof.checked > 3


@pytest.mark.parametrize("processor", [None, "another"])
def test_what_differs_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch, processor: str | None) -> None:
    """A snapshot in the middle holds another state than reading gives, as after a fault of the processor, or as another
    one would have made it."""
    put = Store.put

    def spoilt(store: Store, new: NewSnapshot, state: State, *rest: Any, **options: Any) -> Snapshot:
        if new.tokens == 512:
            state = State({name: tensor + 0.5 for name, tensor in state.items()})
            new = replace(new, numerics=dict(new.numerics) | ({"processor": processor} if processor else {}))
        return put(store, new, state, *rest, **options)

    monkeypatch.setattr(Store, "put", spoilt)
    head = desk.read(TEXT)
    monkeypatch.undo()
    wrong = next(one for one in head.ancestors() if one.tokens == 512)
    proof = prove(head, model=desk.model, store=desk.store, from_start=True)
    assert not proof.equal and proof.differs == (wrong.id, 512) and proof.same_up_to == 256
    assert proof.largest == pytest.approx(0.5, rel=1e-3)
    assert proof.numerics == (("processor",) if processor else ())
    assert prove(head, model=desk.model, store=desk.store).equal, "the last stretch alone"


def test_without_text_nothing_is_proven(desk: Desk) -> None:
    head = desk.read(TEXT, keep_text=False)
    with pytest.raises(InputError, match="expected its text to be kept, found none; ingest 'mill' again without"):
        prove(head, model=desk.model, store=desk.store)


def test_a_start_that_is_only_near_proves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, first = desk.store.ancestors(desk.read(TEXT))
    second = desk.read(TEXT[:300], "second", from_snapshot=first.id)
    monkeypatch.setattr(recode, "_starts", lambda index: set())
    desk.store.recode("int8")
    with pytest.raises(MismatchError, match="expected the state that its document was started from, found snapshot"):
        prove(second, model=desk.model, store=desk.store, from_start=True)
