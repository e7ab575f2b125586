"""Embeddings: vectors against the model itself, rows that know nothing of their neighbours, threads that end."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import rwkv_stream as rs
from rwkv_stream.errors import BackendError, InputError, MismatchError, UsageError
from rwkv_stream.kernels import available
from rwkv_stream.model import Model, load
from rwkv_stream.model.heads import VectorHead, vector_head
from rwkv_stream.tables.columns import embedding, schema
from rwkv_stream.tables.embedding import BUDGET_MULTIPLE, Embedding
from rwkv_stream.tables.embeddings import rows
from rwkv_stream.tables.pooling import Pool
from rwkv_stream.tables.whitening import Whitening
from rwkv_stream.text.units import Failure, read

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVE = available()["cpu"] is None
WORDS = [
    "the",
    "keeper",
    "walked",
    "over",
    "an",
    "old",
    "stone",
    "bridge",
    "toward",
    "light",
    "while",
    "gulls",
    "cried",
]


@dataclass
class Text:
    name: str
    pieces: Iterable[bytes]

    def text(self) -> contextlib.AbstractContextManager[Iterable[bytes]]:
        return contextlib.nullcontext(self.pieces)


def texts(count: int, seed: int = 0) -> list[str]:
    """Of all lengths, among them single tokens and, of eighty or more, one of 5,000 tokens of a byte model."""
    rng = random.Random(seed)
    made = ["a", "é"]
    while len(made) < count:
        words = rng.choices(WORDS, k=rng.choice([1, 2, 5, 20, 60]))
        made.append(" ".join(words) + ". " + " ".join(words[::-1]).capitalize() + "!")
    if count >= 80:
        made[count // 2] = ("the wind " * 560)[:5000]
    rng.shuffle(made)
    return made


def table(documents: Iterable[str], **options: object) -> pa.Table:
    made = rows([Text(f"{i}", [text.encode()]) for i, text in enumerate(documents)], **options)
    return pa.Table.from_batches(list(made), made.schema)


def hidden_of(model: Model, ids: list[int]) -> np.ndarray:
    """Hidden states [T, C] of a reading of its own, in fp64."""
    _, state = model.start()
    hidden, _ = model.forward(torch.tensor([ids]), state, logits="none")
    return hidden[0].double().numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


# ---- what the vectors are ----


def test_the_mean_and_the_last_of_hidden_states(bpe_model: Model) -> None:
    given = texts(8)
    for pooling, pooled in (("mean", lambda h: h.mean(0)), ("last", lambda h: h[-1])):
        wanted = [pooled(hidden_of(bpe_model, bpe_model.tokenizer.encode(text))) for text in given]
        found = rs.embed(given, model=bpe_model, pooling=pooling, budget=64)
        assert found.dtype == np.float32
        assert np.abs(found - [unit(vector) for vector in wanted]).max() < 1e-5
        raw = rs.embed(given, model=bpe_model, pooling=pooling, budget=64, normalize=False)
        assert np.abs(raw - wanted).max() < 1e-5


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("unit", ["sentence", "chunk", "document"])
def test_a_document_of_white_space_is_counted(bytes_model: Model, unit: str, isolated: bool) -> None:
    """Also where it has no row; nothing that it holds enters the rows of others."""
    texts = [" \n ", "The lamp was lit. It was night.   ", "\n" * 5000, "A ship went by."]
    made = rows(
        [Text(f"{i}", [t.encode()]) for i, t in enumerate(texts)],
        model=bytes_model,
        units=[unit],
        budget=64,
        isolated=isolated,
    )
    found = pa.Table.from_batches(list(made), made.schema)
    assert (made.documents, made.failed) == (4, 0)
    with_rows = {"1", "3"} if unit == "sentence" else {"0", "1", "2", "3"}
    assert set(found["document"].to_pylist()) == with_rows
    for name in ("1", "3"):
        alone = table([texts[int(name)]], model=bytes_model, units=[unit], budget=64, isolated=isolated)
        assert found.filter(pc.field("document") == name)["embedding"].equals(alone["embedding"])


def test_what_stands_before_a_unit_is_its_context_unless_isolated(bytes_model: Model) -> None:
    text = "It rained all day. It rained all day."
    together = embedding(table([text], model=bytes_model, units=["sentence"], budget=64))
    hidden = hidden_of(bytes_model, list(text.encode()))
    assert np.abs(together - [unit(hidden[:18].mean(0)), unit(hidden[19:].mean(0))]).max() < 1e-5
    alone = embedding(table([text], model=bytes_model, units=["sentence"], budget=64, isolated=True))
    assert np.array_equal(alone[0], together[0])
    assert np.array_equal(alone[0], alone[1])


def test_several_units_in_one_pass_are_those_of_each(bytes_model: Model) -> None:
    given = texts(12)
    options = {"model": bytes_model, "budget": 64, "chunk": 50}
    both = table(given, units=["document", "sentence", "chunk"], **options)
    for kind in ("sentence", "chunk", "document"):
        one = table(given, units=[kind], **options)
        assert both.filter(pc.equal(both["unit"], kind)).equals(one)


def test_reading_goes_on_from_a_state(bytes_model: Model) -> None:
    _, state = bytes_model.start()
    _, state = bytes_model.forward(torch.tensor([list(b"It was late. ")]), state)
    found = rs.embed(["They slept."], model=bytes_model, budget=32, start=state)
    hidden = hidden_of(bytes_model, list(b"It was late. They slept."))[13:]
    assert np.abs(found[0] - unit(hidden.mean(0))).max() < 1e-5
    with pytest.raises(UsageError, match="a state of one row to start from, found 2"):
        rs.embed(["a"], model=bytes_model, start=state.repeat(2))


def test_reading_goes_on_from_a_snapshot(bytes_model: Model, other_bytes_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was late. ")
    store = rs.Store(tmp_path / "store", create=True)
    rs.ingest(str(tmp_path / "a.txt"), model=bytes_model, store=store)
    snapshot = store.get("a.txt")
    found = rows([Text("b", [b"They slept."])], model=bytes_model, budget=32, start=snapshot)
    hidden = hidden_of(bytes_model, list(b"It was late. They slept."))[13:]
    assert np.abs(embedding(next(found))[0] - unit(hidden.mean(0))).max() < 1e-5
    assert found.metadata["start"] == snapshot.id
    with pytest.raises(MismatchError, match="expected its model"):
        rs.embed(["a"], model=load(other_bytes_model_path), start=snapshot)


# ---- rows do not know their neighbours ----


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_rows_of_documents_are_the_same_in_any_company(bytes_model: Model) -> None:
    given = texts(80)
    options = {"model": bytes_model, "budget": 64}
    together = rs.embed(given, **options)
    assert np.array_equal(rs.embed(given[::-1], **options)[::-1], together)
    assert np.array_equal(np.concatenate([rs.embed([text], **options) for text in given]), together)
    shards = [rs.embed(given[i::3], **options) for i in range(3)]
    assert all(np.array_equal(shard, together[i::3]) for i, shard in enumerate(shards))


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_sums_do_not_depend_on_where_calls_cut_them(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to fp32 hides most of what the order of a sum does to it: so look before that."""
    pooled: list[np.ndarray] = []

    def keep(vectors: np.ndarray) -> np.ndarray:
        pooled.extend(vectors)
        return vectors.astype(np.float32)

    monkeypatch.setattr("rwkv_stream.tables.pooling.unit_length", keep)
    given = texts(50)
    rs.embed(given, model=bytes_model, budget=64)
    rs.embed(given[::-1], model=bytes_model, budget=64)
    assert np.array_equal(pooled[:50], pooled[:49:-1])


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
@pytest.mark.parametrize("options", [{}, {"isolated": True}, {"pooling": "last"}], ids=["context", "isolated", "last"])
def test_rows_of_sentences_are_the_same_in_any_company(bytes_model: Model, options: dict[str, object]) -> None:
    given = texts(60)
    options |= {"model": bytes_model, "budget": 48, "units": ["sentence"]}
    together = table(given, **options)
    backwards = table(given[::-1], **options)
    by_name = {name: together.filter(pc.equal(together["document"], str(name))) for name in range(60)}
    for i in range(60):
        other = backwards.filter(pc.equal(backwards["document"], str(59 - i)))
        assert np.array_equal(embedding(other), embedding(by_name[i])), i


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.skipif(not NATIVE, reason="")), "reference"])
def test_rows_hardly_depend_on_the_budget_and_the_backend(bytes_model_path: Path, backend: str) -> None:
    given = texts(16)
    model = load(bytes_model_path, backend=backend)
    wanted = [unit(hidden_of(model, list(text.encode())).mean(0)) for text in given]
    for budget in (16, 64, 1024):
        assert np.abs(rs.embed(given, model=model, budget=budget) - wanted).max() < 1e-5, budget
    assert np.abs(rs.embed(given[::-1], model=model, budget=64)[::-1] - wanted).max() < 1e-5


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_streams_may_be_cut_anywhere_between_documents(bytes_model: Model) -> None:
    """As workers do that get a few documents each."""
    pool, given = Pool(bytes_model, Embedding(budget=64)), texts(30)
    pieces = [list(read([Text("", [text.encode()])], bytes_model.tokenizer)) for text in given]
    made = [m.batch for few in (pieces[:7], pieces[7:8], pieces[8:]) for m in pool.batches(p for f in few for p in f)]
    assert np.array_equal(np.concatenate([embedding(b) for b in made]), rs.embed(given, model=bytes_model, budget=64))


# ---- tables ----


def test_a_table_is_as_the_contract_says(bytes_model: Model, tmp_path: Path) -> None:
    given = {"first": "One sentence. Another.", "second": "Größe ist egal!  Ja."}
    made = rows(
        [Text(name, [text.encode()]) for name, text in given.items()], model=bytes_model, units=["sentence", "document"]
    )
    found = pa.Table.from_batches(list(made), made.schema)
    C = bytes_model.config.n_embd
    assert made.schema == schema(C)
    assert [(field.name, str(field.type)) for field in found.schema] == [
        ("document", "string"),
        ("unit", "string"),
        ("index", "int64"),
        ("text", "string"),
        ("excerpt", "string"),
        ("byte_start", "int64"),
        ("byte_end", "int64"),
        ("token_start", "int64"),
        ("token_end", "int64"),
        ("embedding", f"fixed_size_list<item: float>[{C}]"),
    ]
    plain = found.drop_columns(["embedding"]).to_pylist()
    assert [(row["document"], row["unit"], row["index"], row["text"]) for row in plain] == [
        ("first", "sentence", 0, "One sentence."),
        ("first", "sentence", 1, "Another."),
        ("first", "document", 0, None),
        ("second", "sentence", 0, "Größe ist egal!"),
        ("second", "sentence", 1, "Ja."),
        ("second", "document", 0, None),
    ]
    for row in plain:
        if row["text"] is not None:
            assert given[row["document"]].encode()[row["byte_start"] : row["byte_end"]].decode() == row["text"]
    assert (made.rows, made.documents, made.failed) == (6, 2, 0)
    assert made.tokens == sum(len(text.encode()) for text in given.values())
    assert np.abs(np.linalg.norm(embedding(found), axis=1) - 1).max() < 1e-6
    pq.write_table(found, tmp_path / "a.parquet")
    assert np.array_equal(embedding(pq.read_table(tmp_path / "a.parquet")), embedding(found))


def test_metadata_tells_all_that_decides_the_vectors(bytes_model: Model) -> None:
    def metadata(**options: object) -> dict[str, str]:
        made = rows([], model=bytes_model, **options)
        assert list(made) == []
        return dict(made.metadata)

    plain = metadata()
    assert plain["model"] == bytes_model.fingerprint
    assert plain["tokenizer"] == "bytes"
    assert (plain["pooling"], plain["normalized"], plain["isolated"], plain["start"]) == ("mean", "true", "false", "")
    assert json.loads(plain["numerics"])["backend"] == bytes_model.backend
    assert all(isinstance(value, str) for value in plain.values())
    state = bytes_model.zero_state()
    for options in (
        {"pooling": "last"},
        {"normalize": False},
        {"isolated": True},
        {"budget": 64},
        {"chunk": 7},
        {"language": "de"},
        {"units": ["chunk"]},
        {"start": state},
    ):
        assert metadata(**options) != plain, options


def test_further_columns_hold_what_a_person_would_cite(bytes_model: Model) -> None:
    class Paged(list[bytes]):
        def place(self, byte: int) -> dict[str, int | str]:
            return {"page": byte // 10} if byte < 19 else {"chapter": "two", "id": byte}

    columns = {"page": pa.int64(), "chapter": pa.string(), "id": pa.string()}
    made = rows(
        [Text("a", Paged([b"1234567. 01234567. 01234567."])), Text("b", [b"No place."])],
        model=bytes_model,
        units=["sentence"],
        columns=columns,
    )
    found = pa.Table.from_batches(list(made))
    assert found.column_names[-3:] == ["page", "chapter", "id"]
    assert found["id"].to_pylist() == [None, None, "19", None]
    assert found["page"].to_pylist() == [0, 0, None, None]
    assert found["chapter"].to_pylist() == [None, None, "two", None]


# ---- failures, threads ----


def broken(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    raise InputError("the file ends too early")


def test_documents_that_cannot_be_read_are_told_of_and_the_rest_go_on(bytes_model: Model) -> None:
    documents = [Text("a", [b"One."]), Text("b", broken(b"Lost.")), Text("c", []), Text("d", [b"Two."])]
    failures: list[Failure] = []
    made = rows(documents, model=bytes_model, budget=32, on_failure=failures.append)
    found = pa.Table.from_batches(list(made))
    assert found["document"].to_pylist() == ["a", "d"]
    assert [failure.document for failure in failures] == ["b", "c"]
    assert (made.documents, made.failed) == (2, 2)
    assert np.array_equal(embedding(found), rs.embed(["One.", "Two."], model=bytes_model, budget=32))


def test_without_anybody_to_tell_a_failure_raises(bytes_model: Model) -> None:
    before = threading.active_count()
    with pytest.raises(InputError, match="ends too early"):
        rs.embed([Text("b", broken(b"One. " * 100))], model=bytes_model, budget=32)
    with pytest.raises(InputError, match="embedding 'text 1': expected some text, found none"):
        rs.embed(["a", "", "c"], model=bytes_model, budget=32)
    assert threading.active_count() == before


def test_what_goes_wrong_on_a_thread_is_raised_here(bytes_model: Model) -> None:
    def documents() -> Iterator[Text]:
        yield Text("a", [b"One."])
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        list(rows(documents(), model=bytes_model))
    outer = {**bytes_model.outer, "ln_out.weight": bytes_model.outer["ln_out.weight"] * float("nan")}
    with pytest.raises(BackendError, match="embedding 'text 0': expected finite numbers of the model"):
        rs.embed(["a"], model=dataclasses.replace(bytes_model, outer=outer))


def test_nobody_reads_far_ahead_and_threads_end_when_nobody_takes(bytes_model: Model) -> None:
    before, drawn = threading.active_count(), []

    def documents() -> Iterator[Text]:
        while True:
            drawn.append(None)
            yield Text("a", [b"On and on. " * 10])

    made = rows(documents(), model=bytes_model, budget=64, units=["sentence"])
    next(made)
    for _ in range(20):
        next(made)
    assert len(drawn) < 200
    made.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(made)


def test_a_signal_while_its_thread_starts(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is seen when the thread has started: seen in between, the thread would fail and say so."""

    class StoppedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StoppedError

    def begin(function: Callable[..., object], arguments: tuple[object, ...]) -> int:
        def held() -> None:
            may_begin.wait(10)
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 -- what the interpreter would tell the user
                failed.append(error)
            ended.set()

        number: int = start(held, ())
        signal.raise_signal(signal.SIGTERM)
        may_begin.set()
        return number

    failed: list[BaseException] = []
    may_begin, ended = threading.Event(), threading.Event()
    start = threading._start_new_thread  # type: ignore[attr-defined]
    monkeypatch.setattr(threading, "_start_new_thread", begin)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(StoppedError):
            list(rows([Text("a", [b"One."])], model=bytes_model))
    finally:
        signal.signal(signal.SIGTERM, before)
        may_begin.set()
    assert ended.wait(10)
    assert failed == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_stopped_while_its_thread_starts(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that begins only then finds nothing to compute, nor to free: torch may not be called at exit."""
    began: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        began.append(thread)
        raise KeyboardInterrupt

    drawn = []

    def documents() -> Iterator[Text]:
        drawn.append(None)
        yield Text("a", [b"One."])

    monkeypatch.setattr(threading.Thread, "start", start)
    made = rows(documents(), model=bytes_model)
    with pytest.raises(KeyboardInterrupt):
        next(made)
    monkeypatch.undo()
    for thread in began:
        thread.start()
        thread.join()
    assert (len(began), drawn) == (1, [])


def test_strings_that_are_no_texts(bytes_model: Model) -> None:
    with pytest.raises(UsageError, match=r"pass \[text\]"):
        rs.embed("one text", model=bytes_model)
    with pytest.raises(InputError, match="embedding 'text 0': expected Unicode characters"):
        rs.embed(["half a \ud83d"], model=bytes_model)


def test_nothing_in_nothing_out(bytes_model: Model) -> None:
    assert rs.embed([], model=bytes_model).shape == (0, bytes_model.config.n_embd)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling auto, head, mean, last, found 'max'"),
        ({"budget": 0}, "multiple of 16, found 0"),
        ({"budget": 3 * BUDGET_MULTIPLE + 1}, "multiple of 16, found 49"),
        ({"units": ["line"]}, "found 'line'"),
    ],
)
def test_bad_options(bytes_model: Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rs.embed(["a"], model=bytes_model, **options)


def test_the_shipped_model_embeds() -> None:
    found = rs.embed(["one text", "another", "one text"], model=rs.load(), budget=32)
    assert found.shape == (3, 192)
    assert np.array_equal(found[0], found[2])


# ---- whitening ----


def fitted(model: Model, made: np.ndarray) -> Whitening:
    return Whitening.fit(np.array_split(made, 5), model=model.fingerprint, pooling="mean")


def test_whitened_vectors_spread_evenly(bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_stream.tables.whitening.SHRINKAGE", 1e-9)
    rng = np.random.default_rng(0)
    made = (rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    whitening = Whitening.fit(np.array_split(made, 7), model="m", pooling="mean")
    spread = (made - whitening.mean) @ whitening.matrix
    assert np.abs(np.cov(spread.T) - np.eye(6)).max() < 5e-3
    assert np.abs(whitening.apply(made) - spread / np.linalg.norm(spread, axis=1, keepdims=True)).max() < 1e-6


def test_whitening_is_the_same_beside_the_model_and_afterwards(bytes_model: Model, tmp_path: Path) -> None:
    given = texts(100)
    plain = table(given, model=bytes_model, budget=64)
    fitted(bytes_model, embedding(plain)).save(tmp_path / "a.whitening.safetensors")
    whitening = Whitening.load(tmp_path / "a.whitening.safetensors")
    assert whitening.digest == fitted(bytes_model, embedding(plain)).digest
    assert (whitening.rows, whitening.model, whitening.pooling) == (100, bytes_model.fingerprint, "mean")
    at_once = table(given, model=bytes_model, budget=64, whitening=whitening)
    assert not np.allclose(embedding(at_once), embedding(plain), atol=1e-2)
    afterwards = pa.Table.from_batches([whitening.apply_to_rows(batch) for batch in plain.to_batches(max_chunksize=7)])
    assert afterwards.equals(at_once)
    assert rows([], model=bytes_model, whitening=whitening).metadata["whitening"] == whitening.digest


def test_whitening_of_another_model_or_pooling_is_refused(bytes_model: Model) -> None:
    whitening = fitted(bytes_model, rs.embed(texts(10), model=bytes_model, budget=64))
    other = dataclasses.replace(whitening, model="0" * 64)
    with pytest.raises(MismatchError, match="by model"):
        rs.embed(["a"], model=bytes_model, whitening=other)
    with pytest.raises(MismatchError, match="pooling last"):
        rs.embed(["a"], model=bytes_model, whitening=whitening, pooling="last")
    with pytest.raises(UsageError, match="length 1"):
        rs.embed(["a"], model=bytes_model, whitening=whitening, normalize=False)
    with pytest.raises(UsageError, match="2 vectors or more, found 1"):
        Whitening.fit([np.ones((1, 3), np.float32)], model="m", pooling="mean")


def test_files_that_hold_no_whitening(bytes_model: Model, bytes_model_path: Path, tmp_path: Path) -> None:
    whitening = fitted(bytes_model, rs.embed(texts(10), model=bytes_model, budget=64))
    whitening.save(tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "text": b"hello", "none": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="expected a file that `save` made"):
            Whitening.load(tmp_path / name)
    for missing in (tmp_path / "missing", bytes_model_path):
        with pytest.raises(InputError, match="loading whitening"):
            Whitening.load(missing)
    (tmp_path / "newer").write_bytes(data.replace(b'"format":"1"', b'"format":"2"'))
    with pytest.raises(MismatchError, match="expected format 1, found 2"):
        Whitening.load(tmp_path / "newer")


# ---- by a head ----


@pytest.fixture(scope="module")
def headed(bytes_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model of two layers with a head on the first."""
    folder = tmp_path_factory.mktemp("headed")
    (folder / "a.safetensors").write_bytes(bytes_model_path.read_bytes())
    model, random = load(folder / "a.safetensors", device="cpu"), torch.Generator().manual_seed(0)
    value, gate = (torch.randn(shape, generator=random) for shape in ((24, 64), (3, 64)))
    VectorHead(model.fingerprint, 1, value, gate).save(folder)
    return model


def test_vectors_by_a_head(headed: Model) -> None:
    """It is taken where it is there, by units that share a reading, wherever calls cut them."""
    given, head = texts(12), vector_head(headed)
    assert head is not None
    part = headed.first(1)
    wanted = []
    for text in given:
        hidden, _ = part.forward(torch.tensor([list(text.encode())]), logits="none")
        wanted.append(unit(head.vectors(head.features(part)(hidden[0]).double().sum(0, keepdim=True))[0].numpy()))
    for budget in (16, 48, 1024):
        assert np.abs(rs.embed(given, model=headed, budget=budget) - wanted).max() < 1e-5, budget
    assert np.array_equal(rs.embed(given, model=headed, pooling="head"), rs.embed(given, model=headed))
    assert rs.embed(given, model=headed, pooling="mean").shape == (12, 64)
    assert rs.embed([], model=headed).shape == (0, 24)


@pytest.mark.skipif(not NATIVE, reason="no native kernels")
def test_vectors_by_a_head_are_the_same_in_any_company(headed: Model) -> None:
    given = texts(40)
    options = {"model": headed, "budget": 48}
    together = rs.embed(given, **options)
    assert np.array_equal(rs.embed(given[::-1], **options)[::-1], together)
    assert np.array_equal(np.concatenate([rs.embed([text], **options) for text in given]), together)


def test_a_head_goes_on_from_a_state(headed: Model) -> None:
    """Of the whole model, whose first layers it takes."""
    _, state = headed.forward(torch.tensor([list(b"Before it. ")]))
    found = rs.embed(["What follows."], model=headed, start=state)
    both = table(["Before it. What follows."], model=headed, units=["sentence"])
    assert np.abs(found[0] - embedding(both)[1]).max() < 1e-5


def test_metadata_names_the_head_that_queries_need(headed: Model, bytes_model: Model, tmp_path: Path) -> None:
    head = vector_head(headed)
    assert head is not None
    described = rows([], model=headed).metadata
    assert described["pooling"] == f"head {head.digest[:16]}"
    assert rows([], model=headed, pooling=described["pooling"]).metadata == described
    assert rows([], model=bytes_model).metadata["pooling"] == "mean"
    with pytest.raises(UsageError, match=r"expected one beside '.*bytes\.safetensors', found none"):
        rows([], model=bytes_model, pooling="head")
    with pytest.raises(MismatchError, match=f"expected the head 0123 beside '.*', found {head.digest[:16]}"):
        rows([], model=headed, pooling="head 0123")
    vectors = rs.embed(texts(30), model=headed)
    whitening = Whitening.fit([vectors], model=headed.fingerprint, pooling=described["pooling"])
    assert np.isfinite(rs.embed(["a b"], model=headed, whitening=whitening)).all()
    with pytest.raises(MismatchError, match="fit it again"):
        rows([], model=headed, pooling="mean", whitening=whitening)
