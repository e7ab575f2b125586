"""What holds for the product whatever the version of the model: reading is decoding, resumed is uninterrupted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pypi_rwkv
import pytest
import torch
from fake_snapshots import in_child
from hf_layouts import OF_VERSION, save_layout
from kills import killed
from tiny_models import PROSE, VERSIONS, official_weights, save

from rwkv_stream.answers.ask import ask
from rwkv_stream.files import FAILPOINT_VARIABLE
from rwkv_stream.model import Model, load
from rwkv_stream.model.checkpoints.convert import convert
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.reading.ingest import ingest
from rwkv_stream.store import Store
from rwkv_stream.tables.score import score

T = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=VERSIONS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / f"rwkv-{request.param}.safetensors"
    loaded = load(save(official_weights(version=request.param, head_size=16, seed=2), path), device="cpu")
    assert loaded.config.version == request.param
    return loaded


def text_of(n_bytes: int, seed: int = 0) -> str:
    words = PROSE.split()
    rng = random.Random(seed)
    return " ".join(rng.choice(words) for _ in range(n_bytes // 4))[:n_bytes]


def continued(model: Model, logits: torch.Tensor, state: object, n_tokens: int) -> list[int]:
    """The greedy continuation, one token a call."""
    made = []
    for _ in range(n_tokens):
        made.append(int(logits[0].argmax()))
        logits, state = model.forward(torch.tensor([made[-1:]]), state)
    return made


def test_reading_in_chunks_and_token_by_token_go_on_alike(model: Model) -> None:
    """4,096 tokens, 1,280 for versions whose recurrence another has: the same greedy continuation, and logits within
    1e-4."""
    n = 4096 if model.config.version in ("4", "6", "7") else 1280
    tokens = torch.tensor([list(text_of(n).encode())])
    state = model.zero_state()
    for chunk in tokens.split(n // 4, dim=1):
        logits, state = model.forward(chunk, state)
    one = model.zero_state()
    for token in tokens.split(1, dim=1):
        one_logits, one = model.forward(token, one)
    assert (logits - one_logits).abs().max() <= 1e-4
    made = continued(model, logits, state, 64)
    assert made == continued(model, one_logits, one, 64)
    assert len(set(made)) > 8, "a continuation of one byte shows nothing"


def read(model: Model, store: Path, text: Path, **options: object) -> object:
    return ingest(
        str(text),
        name="book.txt",
        model=model,
        store=Store(store, create=True),
        chunk=T,
        snapshot_every=4 * T,
        **options,
    )


def contents(path: Path) -> dict[str, str]:
    """Id → digest of the state that is read back, of every snapshot."""
    store = Store(path)
    return {listed.id: store.get(listed.id).state().digest() for listed in store.list()}


@pytest.mark.parametrize("moment", ["ingest.chunk:9", "ingest.publish:3", "ingest.published:2"])
def test_killed_and_resumed_is_as_never_stopped(model: Model, tmp_path: Path, moment: str) -> None:
    text = tmp_path / "book.txt"
    text.write_text(text_of(1500))
    model.forward(torch.zeros(1, T, dtype=torch.int64))  # loads the kernels, not in each child
    read(model, tmp_path / "whole", text)
    expected = contents(tmp_path / "whole")
    assert len(expected) == 6  # of 1,500 tokens, at every 256th and the last
    work: Callable[[], object] = lambda: read(model, tmp_path / "killed", text)  # noqa: E731
    assert killed(in_child(work, **{FAILPOINT_VARIABLE: moment}))
    assert not killed(in_child(work))
    assert contents(tmp_path / "killed") == expected


def test_a_text_that_grew_is_read_on(model: Model, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(text_of(900))
    read(model, tmp_path / "grown", text)
    with text.open("a") as file:
        file.write(text_of(600, seed=1))
    report = read(model, tmp_path / "grown", text)
    assert report.resumed_from_token == 768  # the third snapshot; that of the end is a leaf
    read(model, tmp_path / "whole", text)
    grown, whole = contents(tmp_path / "grown"), contents(tmp_path / "whole")
    assert whole.items() <= grown.items()


def test_forks_of_a_snapshot(model: Model, tmp_path: Path) -> None:
    """A fork goes on as the reading did; asked together or alone, questions have one answer; the snapshot stays."""
    text = tmp_path / "book.txt"
    text.write_text(text_of(1000))
    read(model, tmp_path / "store", text)
    store = Store(tmp_path / "store")
    middle, end = store.get("book.txt@512"), store.get("book.txt")
    tokens = torch.tensor([list(text.read_bytes())])
    _, direct = model.forward(tokens[:, 512:], middle.state())
    for name, tensor in end.state().items():
        assert (direct[name] - tensor).abs().max() <= 1e-3, name
    before = middle.state().digest()
    sampling = Sampling(max_tokens=12, temperature=1, seed=4)
    questions = ["Who kept the light?", "When?", "What did his daughter draw?"]
    together = [answer.answer for answer in ask(questions, snapshot=middle, model=model, sampling=sampling)]
    again = [answer.answer for answer in ask(questions[:1], snapshot=middle, model=model, sampling=sampling)]
    assert len(set(together)) == 3
    assert again == together[:1]
    assert store.get("book.txt@512").state().digest() == before


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_a_snapshot_serves_with_any_form_of_its_model(version: str, tmp_path: Path) -> None:
    """Made with a `.pth`, asked with its conversion and with its Hugging Face folder, and read on."""
    head_size = 64 if version == "7" else 16  # flash-linear-attention's eps of the head norm is by the head size
    weights = official_weights(version=version, head_size=head_size, seed=2)
    pth = save(weights, tmp_path / "model.pth")
    convert(pth, tmp_path / "model.safetensors")
    folder = save_layout(tmp_path / "folder", weights, version, OF_VERSION[version][0])
    models = [load(path, device="cpu") for path in (pth, tmp_path / "model.safetensors", folder)]
    text = tmp_path / "book.txt"
    text.write_text(text_of(600))
    read(models[0], tmp_path / "store", text)
    snapshot = Store(tmp_path / "store").get("book.txt")
    sampling = Sampling(max_tokens=8, temperature=0)
    assert len({ask("When?", snapshot=snapshot, model=model, sampling=sampling).answer for model in models}) == 1
    text.write_text(text_of(600) + text_of(300, seed=1))
    for model in models[1:]:
        report = read(model, tmp_path / "store", text)
        assert report.resumed_from_token > 0 and report.exact


def test_segments_and_rows_of_one_call_are_as_if_alone(model: Model) -> None:
    lengths = [1, 17, 40, 6]
    tokens = torch.randint(256, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    _, state = model.forward(tokens[None, :9].repeat(4, 1))
    hidden, new = model.forward_packed(tokens, torch.tensor(lengths), state)
    padded = torch.zeros(4, 40, dtype=torch.int64)
    for row, segment in zip(padded, tokens.split(lengths), strict=True):
        row[: len(segment)] = segment
    of_rows, new_of_rows = model.forward(padded, state, logits="none", lengths=torch.tensor(lengths))
    for i, segment in enumerate(tokens.split(lengths)):
        alone, alone_state = model.forward(segment[None], state.row(i), logits="none")
        assert (hidden.split(lengths)[i] - alone[0]).abs().max() <= 1e-5
        assert (of_rows[i, : len(segment)] - alone[0]).abs().max() <= 1e-5
        for name in new:
            for found in (new[name][i], new_of_rows[name][i]):
                assert (found - alone_state[name][0]).abs().max() <= 1e-4 * max(1, float(found.abs().max())), name


def test_surprise_is_that_of_the_logits(model: Model, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(text_of(300))
    scored = score(str(text), model=model)
    for _ in scored:
        pass
    tokens = torch.tensor([list(text.read_bytes())])
    logits, _ = model.forward(tokens, logits="all")
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    assert scored.bits == pytest.approx(float(nats) / 0.6931471805599453, rel=1e-4)


# ---- a second opinion ----


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6", "7"])
def test_the_rwkv_package_says_the_same(version: str, tmp_path: Path) -> None:
    """Random weights of a narrow 0.1B shape; logits and final states within 1e-4 and 1e-3."""
    weights = official_weights(version=version, n_layer=12, n_embd=128, d_ffn=448, vocab_size=300, seed=9)
    tokens = torch.randint(300, (96,), generator=torch.Generator().manual_seed(1))
    theirs, their_state = pypi_rwkv.forward(weights, version, tokens.tolist(), tmp_path)
    path = save(weights, tmp_path / "model.pth")
    logits, state = load(path, device="cpu", tokenizer="bytes").forward(tokens[None])
    assert (logits[0] - theirs).abs().max() <= 1e-4
    by_layer = [part[0, i] for i in range(12) for part in state.values()]
    for mine, other in zip(by_layer, their_state, strict=True):
        assert (mine - other.view(mine.shape)).abs().max() <= 1e-3
