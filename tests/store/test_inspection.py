"""Looking at snapshots: figures against ones computed otherwise, warnings at their thresholds, trees, the commands."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fake_snapshots import CHUNK, MODEL, OTHER_MODEL, digest, fake, fake_hidden, fake_state, put, read
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import PROSE
from torch import Tensor

from rwkv_stream.answers.ask import Conversation, keep_fork
from rwkv_stream.cli import console, snapshots
from rwkv_stream.cli.program import root
from rwkv_stream.errors import MismatchError, NotFoundError, SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Snapshot, Store, inspection
from rwkv_stream.store.catalog import SORTS, Listed
from rwkv_stream.store.inspection import (
    LINEAGE,
    SETTLED_CHUNKS,
    Distance,
    Loss,
    Span,
    diff,
    distance,
    inspect,
    trained_tokens,
    tree,
)
from rwkv_stream.store.objects import Objects
from rwkv_stream.store.records import StoredObject
from rwkv_stream.tables.score import score

SETTLED = SETTLED_CHUNKS * CHUNK
TEXT = (PROSE * 8)[:2600]


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a.store", create=True)


@dataclass
class Library:
    """`book.txt` read, `sequel.txt` read as going on from its middle, a conversation at its end kept as `asked`."""

    path: Path
    store: Store
    model: Model


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory, bytes_model_path: Path, bytes_model: Model) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    store = Store(folder, create=True)
    text = folder.with_name("text")
    text.write_text(TEXT)
    common: dict[str, Any] = {"model": bytes_model, "store": store, "chunk": 64, "snapshot_every": 512}
    ingest(str(text), name="book.txt", **common)
    ingest(str(text), name="sequel.txt", from_snapshot=store.get("book.txt@50%").id, max_tokens=600, **common)
    conversation = Conversation(store.get("book.txt"), bytes_model, sampling=Sampling(max_tokens=3))
    list(conversation.ask("Who keeps the lamp?"))
    keep_fork("asked", conversation.fork(), store.get("book.txt"), model=bytes_model, store=store)
    store.tag("half", store.get("book.txt@50%").id)
    return folder


@pytest.fixture
def library(shelf: Path, tmp_path: Path, bytes_model: Model) -> Library:
    path = tmp_path / "books.store"
    shutil.copytree(shelf, path)
    return Library(path, Store(path), bytes_model)


def put_with(store: Store, tokens: int, state: State, hidden: Tensor | None = None, **changes: Any) -> Snapshot:
    return store.put(
        fake(tokens, digest(*changes.items()), **changes), state, fake_hidden(1) if hidden is None else hidden
    )


def norms_of(state: State) -> inspection.Norms:
    return inspection.layer_norms({name: tensor.numpy() for name, tensor in state.items()})


def scaled(state: State, factor: float, name: str = "att_kv", layer: int = 1) -> State:
    changed = state.clone()
    changed[name][0, layer] *= factor
    return changed


# ---- one snapshot ----


def test_norms_are_those_of_the_layers(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    found = inspect(snapshot, library.store.ancestors(snapshot))
    assert list(found.norms) == ["att_x_prev", "att_kv", "ffn_x_prev"]
    for name, tensor in snapshot.state().items():
        expected = [torch.linalg.norm(layer.double()).item() for layer in tensor[0]]
        assert found.norms[name] == pytest.approx(expected, rel=1e-12)
    parent = next(library.store.ancestors(snapshot))
    assert found.ancestors[0] == inspection.Ancestor(parent.id, parent.tokens, norms_of(parent.state()))


def test_what_it_adds_is_counted_from_the_nearest_ancestor_that_exists(library: Library) -> None:
    store = library.store
    first, third = store.get("book.txt@512"), store.get("book.txt@1536")
    store.untag("half")
    store.rm(store.get("book.txt@1024").id)
    found = inspect(third, store.ancestors(third))
    assert found.added == Span(512, 1536, 512, 1536)
    assert found.text == Span(0, 1536, 0, 1536)
    assert found.nearest_ancestor == first.id != third.parent
    alone = inspect(first, store.ancestors(first))
    assert (alone.nearest_ancestor, alone.added, alone.ancestors) == (None, Span(0, 512, 0, 512), [])


def test_bits_per_byte_come_from_the_sample(store: Store) -> None:
    first = put_with(store, 32, fake_state(1), sampled_bits=400.0, sampled_tokens=100, bytes=64)
    changes = {"sampled_bits": 1000.0, "sampled_tokens": 160, "bytes": 160, "parent": first.id}
    second = put_with(store, 64, fake_state(2), **changes)
    found = inspect(second, [first])
    assert found.loss == Loss(1000 / 160 * 64 / 160, 160)
    assert found.added_loss == Loss(600 / 60 * 32 / 96, 60)
    assert inspect(first, []).added_loss == Loss(2.0, 100)


def test_bits_per_byte_are_about_those_of_the_whole_text(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    path = library.path.with_name("text")
    path.write_text(TEXT)
    scored = score(str(path), model=library.model)
    for _ in scored:
        pass
    found = inspect(snapshot, library.store.ancestors(snapshot))
    assert found.loss is not None and found.loss.sampled_tokens == snapshot.sampled_tokens > len(TEXT) / 40
    assert found.loss.bits_per_byte == pytest.approx(scored.bits_per_byte, rel=0.2)


def test_older_records_have_no_bits_per_byte(store: Store) -> None:
    made = read(store, n=2)
    found = inspect(made[1], made[:1])
    assert (found.loss, found.added_loss, found.warnings) == (None, None, [])


@pytest.mark.parametrize(
    ("factor", "layer", "before", "is_warned"),
    [(4.1, 1, SETTLED, True), (3.9, 1, SETTLED, False), (4.1, 0, SETTLED, True), (4.1, 1, SETTLED - CHUNK, False)],
    ids=["more than 4 times", "less", "another layer", "while the state fills"],
)
def test_a_norm_that_runs_away_is_warned_of(
    store: Store, factor: float, layer: int, before: int, is_warned: bool
) -> None:
    state = fake_state(1)
    first = put_with(store, before, state)
    second = put_with(store, before + CHUNK, scaled(state, factor, layer=layer), parent=first.id)
    norms = norms_of(state)["att_kv"]
    assert inspect(second, [first]).warnings == (
        [f"norm: 'att_kv' of layer {layer} is {factor * norms[layer]:.4g}, {norms[layer]:.4g} at token {before}"]
        if is_warned
        else []
    )


def test_a_norm_that_creeps_away_is_seen_against_the_farthest(store: Store) -> None:
    lineage = [put_with(store, SETTLED, fake_state(1))]
    for i in range(1, 5):
        state = scaled(fake_state(1), 1.5**i, "ffn_x_prev")
        lineage.append(put_with(store, SETTLED + i * CHUNK, state, parent=lineage[-1].id))
    warned = [bool(inspect(s, lineage[:i][::-1]).warnings) for i, s in enumerate(lineage)]
    assert warned == [False, False, False, False, True]
    found = inspect(lineage[4], lineage[3::-1])
    assert [ancestor.id for ancestor in found.ancestors] == [lineage[3].id, lineage[0].id]
    assert "'ffn_x_prev' of layer 1" in found.warnings[0] and f"at token {SETTLED}" in found.warnings[0]


def test_no_state_is_compared_that_is_farther_back_than_so_many(store: Store) -> None:
    made = put_with(store, SETTLED + 1001, fake_state(1))
    ancestors = [replace(made, tokens=SETTLED + 1000 - i) for i in range(LINEAGE + 5)]
    for i in (0, LINEAGE - 1):
        ancestors[i] = put_with(store, ancestors[i].tokens, fake_state(1))
    compared = inspect(made, ancestors).ancestors
    assert [one.tokens for one in compared] == [ancestors[0].tokens, ancestors[LINEAGE - 1].tokens]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_warned_of(store: Store, value: float) -> None:
    state, hidden = fake_state(1), fake_hidden(1)
    state["att_kv"][0, 1, 0, 2, 3] = value
    hidden[2] = value
    made = put_with(store, SETTLED, state, hidden)
    found = inspect(made, [])
    assert found.norms["att_kv"][1] is None and found.norms["att_kv"][0] is not None
    assert found.warnings == ["not finite: 'att_kv' of layer 1", "not finite: the last hidden state"]
    after = put_with(store, SETTLED + CHUNK, fake_state(1), parent=made.id)
    assert inspect(after, [made]).warnings == []


@pytest.mark.parametrize(
    ("share", "before", "added", "is_warned"),
    [(1.26, 256, 256, True), (1.24, 256, 256, False), (3.0, 255, 256, False), (3.0, 256, 255, False)],
    ids=["26 % more", "24 % more", "few before", "few in it"],
)
def test_a_loss_that_rises_is_warned_of(store: Store, share: float, before: int, added: int, is_warned: bool) -> None:
    first = put_with(store, 32, fake_state(1), sampled_bits=6.0 * before, sampled_tokens=before)
    sampled = {"sampled_bits": 6.0 * before + 6.0 * share * added, "sampled_tokens": before + added}
    second = put_with(store, 64, fake_state(1), parent=first.id, **sampled)
    warnings = [f"loss: {2 * share:.3f} bits per byte of what it adds, 2.000 before"] if is_warned else []
    assert inspect(second, [first]).warnings == warnings


def spoil(snapshot: Snapshot) -> None:
    path = snapshot.reader.objects.path(snapshot.objects[0].name)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def test_norms_and_drift_are_recorded_on_the_way(library: Library, tmp_path: Path) -> None:
    """They are those of the states, also of a reading that was stopped and went on."""
    lineage = [library.store.get("book.txt"), *library.store.ancestors(library.store.get("book.txt"))]
    text = tmp_path / "text"
    text.write_text(TEXT)
    stopped = Store(tmp_path / "stopped.store", create=True)
    common: dict[str, Any] = {"model": library.model, "store": stopped, "chunk": 64, "snapshot_every": 512}
    for limit in (1024, None):
        ingest(str(text), name="book.txt", max_tokens=limit, **common)
    for snapshot, before in itertools.zip_longest(lineage, lineage[1:]):
        state = snapshot.state()
        assert snapshot.norms == {
            name: [pytest.approx(layer.double().norm().item()) for layer in tensor[0]] for name, tensor in state.items()
        }
        moved = {}
        if before is not None:
            old = before.state()
            moved = {n: ((t.double() - old[n]).norm() / old[n].double().norm()).item() for n, t in state.items()}
        assert snapshot.drift == pytest.approx(moved)
        assert (stopped.get(snapshot.id).norms, stopped.get(snapshot.id).drift) == (snapshot.norms, snapshot.drift)


def test_the_way_to_a_snapshot_is_told_span_by_span(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    found = inspect(snapshot, library.store.ancestors(snapshot))
    assert [one.span.to_token for one in found.spans] == [*range(512, len(TEXT), 512), len(TEXT)]
    bits = [one.loss.bits_per_byte * (one.span.to_byte - one.span.from_byte) for one in found.spans if one.loss]
    assert sum(bits) == pytest.approx(found.loss.bits_per_byte * snapshot.bytes, rel=0.02) if found.loss else False
    last = found.spans[-1]
    assert last.norms["att_kv"] == pytest.approx(snapshot.state()["att_kv"].double().norm().item())
    curves = found.curves()
    assert curves["norm of att_kv"][-1] == last.norms["att_kv"]
    assert curves["drift of att_kv"][0] is None and curves["drift of att_kv"][-1] == last.drift["att_kv"]
    assert len(curves["bits per byte"]) == len(found.spans)


def test_older_records_have_no_curves(store: Store) -> None:
    made = read(store, n=3)
    assert inspect(made[-1], store.ancestors(made[-1])).curves() == {}


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ("/models/rwkv7-g1-0.4b-20250324-ctx4096.pth", 4096),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.safetensors", 4096),
        ("RWKV-5-World-3B-v2-20231113-ctx4k.pth", 4096),
        ("rwkv-4-raven_ctx8192", 8192),
        ("/models-ctx4096/tiny.pth", None),
        ("rwkv7-ctx4096b.pth", None),
    ],
)
def test_a_file_is_named_by_the_length_that_its_model_was_trained_on(path: str, tokens: int | None) -> None:
    assert trained_tokens(path) == tokens


def test_a_text_beyond_the_training_is_warned_of_with_its_own_loss(store: Store) -> None:
    parent, warned = None, []
    for n, bits in ((1, 96.0), (2, 192.0), (3, 384.0)):
        tokens = n * CHUNK
        new = fake(tokens, model_path="tiny-ctx32.pth", parent=parent, sampled_bits=bits, sampled_tokens=tokens)
        snapshot = put(store, new)
        parent = snapshot.id
        warned.append([w for w in inspect(snapshot, store.ancestors(snapshot)).warnings if w.startswith("length")])
    assert warned == [
        [],
        [],
        [
            "length: token 48 is past the 32 that the model was trained on; "
            "bits per byte: 2.000 up to there, 4.000 since"
        ],
    ]


def test_damage(store: Store) -> None:
    made = read(store, n=3)
    spoil(made[1])
    found = inspect(made[2], store.ancestors(made[2]))
    assert [warning.split(":")[0] for warning in found.warnings] == [
        f"not compared with snapshot {made[1].id[:12]} at token {2 * CHUNK}"
    ]
    assert (found.ancestors, found.nearest_ancestor) == ([], made[1].id)
    with pytest.raises(SnapshotError):
        inspect(made[1], store.ancestors(made[1]))


def test_an_object_is_decoded_once_for_all_that_it_holds(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = library.store.get("book.txt")
    state, hidden = snapshot.load()
    assert state.digest() == snapshot.state_digest and torch.equal(hidden, snapshot.last_hidden())
    assert all(torch.equal(state[name], tensor) for name, tensor in snapshot.state().items())
    reads: list[str] = []
    read = Objects.read

    def counted(self: Objects, stored: StoredObject) -> bytes:
        reads.append(stored.name)
        return read(self, stored)

    monkeypatch.setattr(Objects, "read", counted)
    Conversation(snapshot, library.model)
    assert len(reads) == 1
    text = library.path.with_name("a text")
    text.write_text("The keeper")
    list(score(str(text), model=library.model, snapshot=snapshot))
    assert len(reads) == 2
    assert run(library, "generate", "--from-snapshot", "book.txt", "--max-tokens", 1).exit_code == 0
    assert len(reads) == 3


# ---- two snapshots ----


def test_a_snapshot_does_not_differ_from_itself(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    found = diff(snapshot, snapshot, library.model)
    assert found.is_equal
    assert (found.kl_bits, found.changes) == (0.0, [])
    assert {part.distance.relative for part in found.layers} == {found.last_hidden.relative} == {0.0}
    assert {part.distance.cosine for part in found.layers} == {found.last_hidden.cosine} == {1.0}


def test_differences_are_those_of_the_tensors(library: Library) -> None:
    a, b = library.store.get("half"), library.store.get("book.txt")
    found = diff(a, b, library.model)
    assert not found.is_equal
    assert [(part.tensor, part.layer) for part in found.layers] == [
        (name, layer) for name in ("att_x_prev", "att_kv", "ffn_x_prev") for layer in range(2)
    ]
    for part in found.layers:
        x, y = (s.state()[part.tensor][0, part.layer].numpy().astype("f8").ravel() for s in (a, b))
        norm_x, norm_y = (x @ x) ** 0.5, (y @ y) ** 0.5
        assert part.distance.relative == pytest.approx(((x - y) @ (x - y)) ** 0.5 / norm_x, rel=1e-12)
        assert part.distance.cosine == pytest.approx(x @ y / norm_x / norm_y, rel=1e-12)
        assert part.distance.relative > 0
    assert found.last_hidden == distance(a.last_hidden(), b.last_hidden())


def test_the_next_token_is_compared_as_in_float64(library: Library) -> None:
    a, b = library.store.get("half"), library.store.get("book.txt")
    found = diff(a, b, library.model, top=5)
    weight = library.model.outer["head.weight"].matrix().double()
    p, q = ((weight @ s.last_hidden().double()).softmax(0) for s in (a, b))
    assert found.kl_bits == pytest.approx((p * (p / q).log2()).sum().item(), rel=1e-4)
    assert found.kl_bits > 0.01
    assert found.kl_bits != pytest.approx(diff(b, a, library.model).kl_bits, rel=1e-3), "it is not symmetric"
    expected = sorted(range(256), key=lambda token: -abs(p[token] - q[token]).item())[:5]
    assert [change.token for change in found.changes] == expected
    for change in found.changes:
        assert (change.a, change.b) == pytest.approx((p[change.token].item(), q[change.token].item()), rel=1e-4)
        assert change.text == bytes([change.token]).decode("utf-8", "replace")
    assert diff(a, b, library.model, top=0).changes == []
    assert len(diff(a, b, library.model, top=1000).changes) <= 256


def test_snapshots_of_two_models_are_not_compared(library: Library, store: Store) -> None:
    book = library.store.get("book.txt")
    other = replace(put(store, fake(16)), model_path="/models/other.pth")
    for a, b in ((book, other), (other, book)):
        with pytest.raises(MismatchError) as caught:
            diff(a, b, library.model)
        assert all(part in str(caught.value) for part in (book.model, MODEL, book.model_path, "/models/other.pth"))
    with pytest.raises(MismatchError, match=library.model.fingerprint):
        diff(other, other, library.model)


ZERO, ONE, NAN = torch.zeros(3), torch.ones(3), torch.full((3,), math.nan)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ONE, ONE, Distance(0.0, 1.0)),
        (ONE, -ONE, Distance(2.0, -1.0)),
        (ONE, ZERO, Distance(1.0, None)),
        (ZERO, ZERO, Distance(0.0, None)),
        (ZERO, ONE, Distance(None, None)),
        (NAN, ONE, Distance(None, None)),
        (ONE, NAN, Distance(None, None)),
    ],
    ids=["equal", "opposite", "b zero", "both zero", "a zero", "a not finite", "b not finite"],
)
def test_distance(a: Tensor, b: Tensor, expected: Distance) -> None:
    found = distance(a, b)
    assert (found.relative, found.cosine) == (
        pytest.approx(expected.relative) if expected.relative is not None else None,
        pytest.approx(expected.cosine) if expected.cosine is not None else None,
    )


def test_a_hidden_state_that_is_not_finite_has_no_divergence(library: Library) -> None:
    book = library.store.get("book.txt")
    state, hidden = book.load()
    hidden[3] = math.nan
    new = {f: getattr(book, f) for f in fake(16).__dataclass_fields__} | {"chain": digest("nan")}
    odd = library.store.put(type(fake(16))(**new), state, hidden)
    found = diff(book, odd, library.model)
    assert (found.kl_bits, found.last_hidden) == (None, Distance(None, None))
    json.loads(run(library, "snapshots", "diff", book.id, odd.id, "--json").stdout, parse_constant=pytest.fail)
    json.loads(run(library, "snapshots", "show", odd.id, "--json").stdout, parse_constant=pytest.fail)


# ---- lineage ----


def drawn(store: Store, document: str | None = None) -> list[str]:
    """The tree, a line a snapshot."""
    heads = [at for _, _, at in store.heads()]
    return [
        "".join("| " if goes_on else "  " for goes_on in line.rails)
        + ("o " if line.is_first else "| ")
        + f"{line.entry.document}@{line.entry.tokens}"
        for line in tree(store.family(document), heads)
    ]


def begun(store: Store, name: str, start: Snapshot, n: int = 1) -> list[Snapshot]:
    return read(store, name, name, n, start=start.id, start_digest=start.state_digest)


def test_a_tree_of_forks(store: Store) -> None:
    book = read(store, n=4)
    sequel = begun(store, "sequel", book[1], 2)
    begun(store, "of the sequel", sequel[1])
    begun(store, "at the end", book[3])
    read(store, "unrelated", "another text", 1)
    forest = [
        "o book.txt@16",
        "| book.txt@32",
        "| o sequel@16",
        "| | sequel@32",
        "|   o of the sequel@16",
        "| book.txt@48",
        "| book.txt@64",
        "  o at the end@16",
    ]
    assert drawn(store) == [*forest, "o unrelated@16"]
    assert drawn(store, "book.txt") == forest
    assert drawn(store, "unrelated") == ["o unrelated@16"]
    assert drawn(store, "sequel") == ["o book.txt@16", "| book.txt@32", *(f"  {line[2:]}" for line in forest[2:5])]
    assert drawn(store, "of the sequel")[-1].strip() == "o of the sequel@16"
    assert drawn(store, "no such document") == []


def test_a_removed_snapshot_has_no_line_and_what_follows_joins_its_origin(store: Store) -> None:
    book = read(store, n=4)
    begun(store, "sequel", book[1])
    begun(store, "early", book[0])
    store.rm(book[1].id)
    assert drawn(store, "book.txt") == [
        "o book.txt@16",
        "| o sequel@16",
        "| o early@16",
        "| book.txt@48",
        "| book.txt@64",
    ]
    store.rm(book[0].id)
    assert drawn(store, "book.txt") == ["o book.txt@48", "| book.txt@64", "o sequel@16", "o early@16"]


def test_the_line_that_leads_to_the_head_goes_straight_on(store: Store) -> None:
    old = read(store, n=3)
    other = [put(store, fake(t, "edited", parent=old[0].id if t == 32 else None)) for t in (32,)]
    other.append(put(store, fake(48, "edited", parent=other[0].id, document="same beginning")))
    assert drawn(store) == [
        "o book.txt@16",
        "| o book.txt@32",
        "| | same beginning@48",
        "| book.txt@32",
        "| book.txt@48",
    ]
    store.move_head("book.txt", MODEL, other[0].id)
    assert drawn(store)[1:] == ["| o book.txt@32", "| | book.txt@48", "| book.txt@32", "| same beginning@48"]


def test_of_two_documents_that_begin_alike_the_first_ones_own_line_goes_straight_on(store: Store) -> None:
    book = read(store, n=2)
    twin = put(store, fake(32, "another", parent=book[0].id, document="a twin"))
    store.move_head("a twin", MODEL, twin.id)
    assert drawn(store) == ["o book.txt@16", "| o a twin@32", "| book.txt@32"]


def test_a_fork_whose_first_snapshot_was_removed_is_still_a_fork(store: Store) -> None:
    book = read(store, n=1)
    store.rm(begun(store, "sequel", book[0], 3)[0].id)
    assert drawn(store) == ["o book.txt@16", "  o sequel@32", "  | sequel@48"]


@st.composite
def forests(draw: st.DrawFn) -> list[Listed]:
    """Snapshots of random parents and starts, some of them removed, some of whose origins are unknown."""
    made: list[Listed] = []
    for i in range(draw(st.integers(1, 12))):
        parent, start = (draw(st.none() | st.sampled_from([e.id for e in made] + ["x"])) for _ in range(2))
        size = draw(st.integers(0, 3))
        made.append(
            Listed(
                f"{i:064}",
                draw(st.sampled_from("ab")),
                i,
                i,
                size,
                parent,
                start,
                str(i),
                MODEL,
                "ingest",
                False,
                False,
                size == 0,
            )
        )
    return made


@given(forests(), st.lists(st.integers(0, 12).map("{:064}".format), max_size=3))
@settings(deadline=None, max_examples=200)
def test_every_snapshot_has_one_line_below_its_origin(forest: list[Listed], heads: list[str]) -> None:
    lines = list(tree(forest, heads))
    by_id = {entry.id: entry for entry in forest}
    assert sorted(line.entry.id for line in lines) == sorted(entry.id for entry in forest if not entry.removed)
    last: dict[int, str] = {}  # the snapshot drawn last at each depth
    for line in lines:
        depth = len(line.rails)
        above = last.get(depth - 1) if line.is_first else last[depth]
        origin: Listed | None = line.entry
        while origin is not None and (origin is line.entry or origin.removed):
            origin = by_id.get(origin.parent if origin.parent in by_id else origin.start)  # type: ignore[arg-type]
        assert above == (origin.id if origin is not None else None)
        last[depth] = line.entry.id
    for i, line in enumerate(lines):  # a rail goes on exactly as far down as its line of descent
        for depth, goes_on in enumerate(line.rails):
            later = [one for one in lines[i + 1 :] if len(one.rails) <= depth]
            assert goes_on == (bool(later) and len(later[0].rails) == depth and not later[0].is_first)


def test_a_family_is_no_more_than_it_says(store: Store) -> None:
    book = read(store, n=3)
    sequel = begun(store, "one/sequel", book[1], 2)
    begun(store, "another/sequel", book[0])
    read(store, "unrelated", "another text", 2)
    store.rm(sequel[0].id)
    family = list(store.family("one/sequel"))
    assert {entry.id for entry in family} == {s.id for s in (*book[:2], *sequel)}
    assert {entry.id for entry in family if entry.removed} == {sequel[0].id}
    assert len(list(store.family())) == 8
    assert {document for document, _, _ in store.heads()} == {"book.txt", "one/sequel", "another/sequel", "unrelated"}
    with pytest.raises(UsageError, match="another/sequel, one/sequel"):
        list(store.family("sequel"))


# ---- the commands ----


def run(library: Library, *arguments: object) -> Result:
    return CliRunner().invoke(root, ["--store", str(library.path), *map(str, arguments)])


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_orders_are_those_of_the_catalog() -> None:
    assert tuple(SORTS) == snapshots.SORTS


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_list(library: Library, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(console, "BLOCK_LINES", block)
    listed = rows(run(library, "snapshots", "list", "--json"))
    fields = {
        "id",
        "document",
        "tokens",
        "bytes",
        "size_bytes",
        "parent",
        "created",
        "model",
        "leaf",
        "edge",
        "how",
        "start",
        "tags",
        "keeps_state",
    }
    assert set(listed[0]) == fields
    assert [entry["id"] for entry in listed] == [entry.id for entry in library.store.list()]
    assert {entry["document"]: entry["tags"] for entry in listed if entry["tags"]} == {
        "book.txt": ["half"],
        "asked": ["asked"],
    }
    plain = run(library, "snapshots", "list").stdout.splitlines()
    assert len(plain) == len(listed) + 1
    (asked,) = (entry for entry in listed if entry["document"] == "asked")
    cells = next(line.split("\t") for line in plain if line.startswith(asked["id"][:12]))
    assert cells == [
        *(asked["id"][:12], "asked", str(asked["tokens"]), f"{asked['bytes']} B", console.size(asked["size_bytes"])),
        *("-", asked["created"][:16].replace("T", " "), asked["model"][:8], "leaf [asked]"),
    ]


def test_list_in_another_order_of_fewer(library: Library) -> None:
    by_tokens = rows(run(library, "snapshots", "list", "--sort", "tokens", "--reverse", "--json"))
    tokens = [entry["tokens"] for entry in by_tokens]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 4
    tagged = rows(run(library, "snapshots", "list", "--tagged", "--json"))
    assert {entry["tags"][0] for entry in tagged} == {"half", "asked"} and len(tagged) == 2
    assert {entry["document"] for entry in rows(run(library, "snapshots", "list", "sequel.txt", "--json"))} == {
        "sequel.txt"
    }


def test_a_model_on_the_command_line_chooses_that_of_the_environment_hides_nothing(
    library: Library, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path, other_bytes_model_path: Path
) -> None:
    put(library.store, fake(16, model=OTHER_MODEL))
    everything = rows(run(library, "snapshots", "list", "--json"))
    ours = rows(run(library, "--model", bytes_model_path, "snapshots", "list", "--json"))
    assert ours == [entry for entry in everything if entry["model"] == library.model.fingerprint] != everything
    assert rows(run(library, "snapshots", "list", "--json", "--model", other_bytes_model_path)) == []
    shown = run(library, "snapshots", "show", "book.txt", "--model", other_bytes_model_path)
    assert isinstance(shown.exception, MismatchError)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(other_bytes_model_path))
    assert rows(run(library, "snapshots", "list", "--json")) == everything
    assert run(library, "snapshots", "show", "book.txt").exit_code == 0


def test_show(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    (shown,) = rows(run(library, "snapshots", "show", "book.txt", "--json"))
    assert {name: shown[name] for name in snapshot.facts()} == json.loads(json.dumps(snapshot.facts()))
    assert (shown["heads"], shown["tags"]) == (["book.txt"], [])
    last = snapshot.tokens // 512 * 512
    assert shown["added"] == {
        "from_token": last,
        "to_token": snapshot.tokens,
        "from_byte": last,
        "to_byte": snapshot.bytes,
    }
    assert shown["loss"]["sampled_tokens"] == snapshot.sampled_tokens
    assert len(shown["norms"]["att_kv"]) == 2
    lines = run(library, "snapshots", "show", "half").stdout.splitlines()
    assert "tags\thalf" in lines
    assert any(line.startswith("adds\ttokens 512 to 1,024, bytes 512 to 1,024 to snapshot ") for line in lines)
    (norms,) = rows(run(library, "snapshots", "show", "half", "--json"))
    assert any(line.startswith(f"1\t{norms['norms']['att_x_prev'][1]:.4g} (x") for line in lines)
    asked = run(library, "snapshots", "show", "asked").stdout
    assert "bits per byte\tnot recorded\n" in asked and "\nhead of\t-\n" in asked


def test_show_draws_what_was_recorded_on_the_way(library: Library, tmp_path: Path) -> None:
    picture = tmp_path / "way.png"
    shown = run(library, "snapshots", "show", "book.txt", "--plot", picture)
    (line,) = (line.split("\t") for line in shown.stdout.splitlines() if line.startswith("norm of att_kv\t"))
    curve = inspect(library.store.get("book.txt"), library.store.ancestors(library.store.get("book.txt"))).curves()
    assert line[-1] == console.sparkline(curve["norm of att_kv"]) and len(line[-1]) == len(curve["norm of att_kv"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = run(library, "snapshots", "show", "book.txt", "--plot", tmp_path / "way.txt")
    assert isinstance(refused.exception, UsageError)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([1.0, 2.0, 3.0, None, 8.0], "▁▂▃ █"),
        ([2.0, 2.0], "▁▁"),
        ([], ""),
        ([float(n // 2) for n in range(192)], "".join("▁▂▃▄▅▆▇█"[round(n / 47 * 7)] for n in range(48))),
    ],
)
def test_sparklines(values: list[float | None], drawn: str) -> None:
    assert console.sparkline(values) == drawn


def test_show_says_what_is_recorded_of_a_damaged_snapshot(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    spoil(snapshot)
    for arguments in (["--json"], []):
        result = run(library, "snapshots", "show", "book.txt", *arguments)
        assert isinstance(result.exception, SnapshotError)
        assert snapshot.chain in result.stdout and "bits per byte" not in result.stdout
        assert '"added"' not in result.stdout


def test_show_prints_warnings(library: Library) -> None:
    snapshot = library.store.get("book.txt")
    spoil(next(library.store.ancestors(snapshot)))
    result = run(library, "snapshots", "show", "book.txt")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("warning: not compared with snapshot")


def test_tree(library: Library) -> None:
    lines = run(library, "snapshots", "tree", "book.txt").stdout.splitlines()
    assert [line.split(" ", 1)[0] for line in lines[:2]] == ["o", "|"]
    assert any(line.endswith("[half]") and line.startswith("| ") for line in lines)
    assert any(line.startswith("| o ") and "sequel.txt@512" in line for line in lines)
    assert any(line.endswith("sequel.txt@600 leaf head") for line in lines)
    assert lines[-1].startswith("  o ") and lines[-1].endswith("leaf [asked]")
    drawn_rows = rows(run(library, "snapshots", "tree", "book.txt", "--json"))
    assert [row["id"][:12] in line for row, line in zip(drawn_rows, lines, strict=True)] == [True] * len(lines)
    assert [(row["heads"], row["depth"]) for row in drawn_rows if row["heads"]] == [
        (["sequel.txt"], 1),
        (["book.txt"], 0),
    ]


def test_a_head_of_another_name_is_named(library: Library) -> None:
    half = library.store.get("half")
    library.store.move_head("copy.txt", half.model, half.id)
    assert "[half] head of copy.txt\n" in run(library, "snapshots", "tree").stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_square_brackets_are_text_and_long_lines_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    console.emit_table(("document",), [["notes[red].txt"]])
    console.emit_styled([[("o ", "blue"), ("notes[red].txt", ""), (" [tag]", "yellow")], [("x" * 50, "")]])
    lines = re.sub(r"\x1b\[\d*m", "", screen.getvalue()).splitlines()
    assert [line.strip() for line in lines] == ["document", "notes[red].txt", "o notes[red].txt [tag]", "x" * 39 + "…"]


def test_diff(library: Library) -> None:
    a, b = library.store.get("half"), library.store.get("book.txt")
    (told,) = rows(run(library, "snapshots", "diff", "half", "book.txt", "--json"))
    found = diff(a, b, library.model)
    assert (told["a"]["id"], told["b"]["id"], told["model"]) == (a.id, b.id, library.model.fingerprint)
    assert told["kl_bits"] == found.kl_bits
    assert told["layers"][3]["distance"] == {
        "relative": found.layers[3].distance.relative,
        "cosine": found.layers[3].distance.cosine,
    }
    assert [change["token"] for change in told["changes"]] == [change.token for change in found.changes]
    text = run(library, "snapshots", "diff", "half", "book.txt", "--top", 3).stdout
    assert f"KL(A|B) {found.kl_bits:.4g} bits\n" in text
    assert text.splitlines()[0].split("\t") == [
        "layer", "att_x_prev", "cosine", "att_kv", "cosine", "ffn_x_prev", "cosine",
    ]  # fmt: skip
    assert len(text.split("in B\n")[1].splitlines()) == 3
    same = run(library, "snapshots", "diff", "half", "half").stdout
    assert "KL(A|B) 0 bits" in same and "in B" not in same


def test_diff_of_two_models(library: Library, bytes_model_path: Path) -> None:
    other = put(library.store, fake(16))
    result = run(library, "snapshots", "diff", "half", other.id)
    assert isinstance(result.exception, MismatchError)
    assert MODEL in str(result.exception) and library.model.fingerprint in str(result.exception)
    missing = run(library, "snapshots", "diff", "half", "nobook")
    assert isinstance(missing.exception, NotFoundError)


def test_lists_and_trees_load_no_torch(library: Library) -> None:
    probe = (
        "import sys\nfrom rwkv_stream.cli.program import root\n"
        f"for command in ('list', 'tree'):\n    root.main(['--store', {str(library.path)!r}, 'snapshots', command], "
        "standalone_mode=False)\nassert not {'torch', 'rich', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-Ic", probe], check=True, capture_output=True)
