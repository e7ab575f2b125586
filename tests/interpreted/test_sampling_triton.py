"""The sampler of the Triton kernels, run by Triton's interpreter: against the plain distribution of `test_sampling`.

Run in a process of its own by `tests/kernels/test_triton.py`: the interpreter is to be asked for before the import.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by tests/kernels/test_triton.py with TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")

# ruff: noqa: E402
import triton.language as tl
from test_sampling import plain_distribution
from tiny_models import official_weights, save

from rwkv_stream.errors import BackendError
from rwkv_stream.kernels.sampling import triton as on_device
from rwkv_stream.kernels.sampling.triton import _limits, _weights
from rwkv_stream.model import generation, load
from rwkv_stream.model.sampling import Sampling, random_numbers
from rwkv_stream.model.state import State
from rwkv_stream.text import tokenizer

CPU = torch.device("cpu")
V = 40
TILE = 16  # so that V is no multiple of it

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "TILE", TILE)
    monkeypatch.setattr(on_device, "PENALTY_TILE", TILE)


def sampler(s: Sampling, rows: int, vocab_size: int = V) -> on_device.Sampler:
    return on_device.Sampler(
        rows, vocab_size, CPU, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
        presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty, penalty_decay=s.penalty_decay,
    )  # fmt: skip


def normal(seed: int, *shape: int, is_tied: bool = False) -> Tensor:
    z = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (2 * z).round() / 2 if is_tied else z


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).random(shape))


def assert_drawn(token: int, share: float, p: list[float]) -> None:
    """The share falls on the token in the order of ids, or not farther beside it than fp32 explains."""
    edges = np.array([0.0, *np.cumsum(p)]) / sum(p)
    assert p[token] > 0
    assert edges[token] - 1e-5 <= share <= edges[token + 1] + 1e-5


@triton.jit
def kept_weights(
    logits, out, scale, top_p, top_k,
    V: tl.constexpr, TOP_P: tl.constexpr, TOP_K: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """What `choose` draws from, fp64 [V] of one row."""
    at = tl.arange(0, P)
    largest = tl.max(tl.load(logits + at, at < V, -float("inf")), 0)
    cut, allowed = _limits(logits, V, largest, top_p, top_k, TOP_P, TOP_K, TILE)
    before = tl.zeros((), tl.int32)
    for i in range(tl.cdiv(V, TILE)):
        at, weights, before = _weights(logits, i, V, largest, scale, cut, allowed, before, TOP_K, TILE)
        tl.store(out + at, weights, at < V)


@pytest.mark.parametrize("top_k", [0, 1, 3, 17, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.85, 0.999, 1.0])
def test_what_is_kept_and_its_chances(top_p: float, top_k: int) -> None:
    for seed, temperature in enumerate((0.3, 1.0, 1.7, 1.0)):
        s = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        logits = normal(seed, V, is_tied=seed % 2 == 1)
        if seed == 3:
            logits[::3], logits[1::3] = 0.0, -0.0  # which are equally likely
        out = torch.full((V,), math.nan, dtype=torch.float64)
        kept_weights[(1,)](
            logits, out, 1 / temperature, top_p, min(top_k, V), V=V, TOP_P=top_p < 1, TOP_K=top_k > 0, TILE=TILE,
            P=triton.next_power_of_2(V),
        )  # fmt: skip
        wanted = np.array(plain_distribution(logits.tolist(), [], s))
        assert ((out.numpy() > 0) == (wanted > 0)).all()
        assert np.allclose((out / out.sum()).numpy(), wanted, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_shares_fall_on_tokens_in_the_order_of_ids(temperature: float) -> None:
    n, s = 150, Sampling(temperature=temperature, top_p=1)
    logits = normal(1, V)
    p = plain_distribution(logits.tolist(), [], s)
    shares = torch.cat([torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), (torch.arange(n).double() + 0.5) / n])
    tokens = sampler(s, len(shares))(logits.expand(len(shares), V), shares)
    assert tokens.dtype == torch.int64
    assert (tokens[0], tokens[1]) == (0, V - 1)
    assert (tokens[2:].diff() >= 0).all()
    for token, share in zip(tokens.tolist(), shares.tolist(), strict=True):
        assert_drawn(token, share, p)


@pytest.mark.usefixtures("small_tiles")
def test_ties_of_top_k_go_by_id_in_all_tiles() -> None:
    """Those in tiles behind the last one that is kept are not drawn, though others there are."""
    logits, s, n = torch.ones(V), Sampling(top_p=1, top_k=12), 24
    logits[[30, 38]] = 1.5
    shares = (torch.arange(n).double() + 0.5) / n
    tokens = sampler(s, n)(logits.expand(n, V), shares).tolist()
    for token, share in zip(tokens, shares.tolist(), strict=True):
        assert_drawn(token, share, plain_distribution(logits.tolist(), [], s))
    assert set(tokens) == {*range(10), 30, 38}


def test_frequencies_are_the_chances() -> None:
    """Chi-squared: its mean is the number of degrees of freedom, its variance twice that."""
    n, s = 2000, Sampling(temperature=0.7, top_p=1)
    logits = normal(0, 8)
    counts = sampler(s, n, 8)(logits.expand(n, 8), uniform(0, n)).bincount(minlength=8)
    p = torch.tensor(plain_distribution(logits.tolist(), [], s)).double()
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 7 + 5 * math.sqrt(2 * 7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("penalty_decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("penalties", [(0.4, 0.0), (0.0, 0.7), (0.3, 0.2), (-0.5, 0.0)])
def test_penalties(penalties: tuple[float, float], penalty_decay: float) -> None:
    s = Sampling(
        top_p=0.9, top_k=9, presence_penalty=penalties[0], frequency_penalty=penalties[1], penalty_decay=penalty_decay
    )
    logits, shares, made = normal(2, 1, V), uniform(3, 6, 1), []
    before, choosing = logits.clone(), sampler(s, 1)
    for share in shares:
        token = int(choosing(logits, share))
        assert_drawn(token, share.item(), plain_distribution(logits[0].tolist(), made, s))
        made.append(token)
    assert len(set(made)) > 1
    assert torch.equal(logits, before), "the logits were written to"


@pytest.mark.usefixtures("small_tiles")
def test_penalised_logits() -> None:
    logits, out = normal(4, 2, V), torch.full((2, V), math.nan)
    counts = torch.full((2, V), -1.0)
    counts[0, 3], counts[1, 39], counts[1, 0] = 0.0, 2.5, 1.0
    on_device.penalise[2, triton.cdiv(V, TILE)](logits, V, counts, 0.5, 0.25, 0.5, out, V=V, TILE=TILE)
    wanted = logits.clone()
    wanted[0, 3] -= 0.5
    wanted[1, 39] -= 0.5 + 0.25 * 2.5
    wanted[1, 0] -= 0.75
    assert torch.equal(out, wanted)
    assert sorted(set(counts.flatten().tolist())) == [-1.0, 0.0, 0.5, 1.25]
    assert (counts[0, 3], counts[1, 39], counts[1, 0]) == (0.0, 1.25, 0.5)


@pytest.mark.usefixtures("small_tiles")
def test_rows_do_not_depend_on_the_batch_and_may_leave() -> None:
    s = Sampling(top_p=0.8, top_k=5, presence_penalty=0.5, frequency_penalty=0.5, penalty_decay=0.9)
    steps, leaves = 4, 2
    logits, shares = normal(5, steps, 4, V + 3)[..., :V], uniform(6, steps, 4)
    alone = [
        [int(one(logits[t, i : i + 1], shares[t, i : i + 1])) for t in range(steps)]
        for i, one in enumerate(sampler(s, 1) for _ in range(4))
    ]
    together, live, found = sampler(s, 4), [0, 1, 2, 3], [[], [], [], []]
    for t in range(steps):
        if t == leaves:
            together.keep([3, 1])
            live = [3, 1]
        for i, token in zip(live, together(logits[t, live], shares[t, live]).tolist(), strict=True):
            found[i].append(token)
    assert found == [row[: steps if i in live else leaves] for i, row in enumerate(alone)]


def test_rows_may_be_apart() -> None:
    s, shares = Sampling(top_p=0.8), uniform(9, 3)
    wide = normal(8, 3, V + 5)
    wide[:, V:] = 1e9
    assert torch.equal(sampler(s, 3)(wide[:, :V], shares), sampler(s, 3)(wide[:, :V].contiguous(), shares))


@pytest.mark.parametrize(("top_p", "top_k", "is_tied"), [(0.85, 50, True), (0.999, 0, False), (1.0, 0, False)])
def test_a_vocabulary_of_65536(top_p: float, top_k: int, is_tied: bool) -> None:
    n, s = 65_536, Sampling(top_p=top_p, top_k=top_k, temperature=1.2)
    logits, shares = normal(7, 1, n, is_tied=is_tied), uniform(8, 1)
    token = int(sampler(s, 1, n)(logits, shares))
    x = logits[0].double().numpy()
    order = np.argsort(-x, kind="stable")
    p = np.exp(x - x.max())
    if top_p < 1:
        kept = x >= x[order[np.searchsorted(p[order].cumsum(), top_p * p.sum())]]
        p = np.where(kept, p, 0)
    if top_k:
        p[order[top_k:]] = 0
    assert_drawn(token, shares.item(), (p ** (1 / s.temperature)).tolist())


def test_all_of_a_large_vocabulary_are_equally_likely() -> None:
    n = 65_536
    logits = torch.zeros(1, n)
    for share in (0.0, 0.25, 0.7, 1 - 2**-53):
        assert int(sampler(Sampling(top_p=1), 1, n)(logits, torch.tensor([share]).double())) == int(share * n)


# ---- greedy, extremes and what is not finite ----


@pytest.mark.usefixtures("small_tiles")
def test_greedy_takes_the_first_of_the_most_likely_after_the_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5]])

    def tokens(n: int, **options: float) -> list[int]:
        choosing = sampler(Sampling(temperature=0, **options), 1, 3)
        return [int(choosing(logits)) for _ in range(n)]

    assert tokens(3) == [1, 1, 1]
    assert tokens(3, presence_penalty=1) == [1, 2, 1]
    assert tokens(5, frequency_penalty=1, penalty_decay=1) == [1, 2, 1, 2, 0]
    equal = torch.full((1, V), -1.0)
    equal[0, 19::3], equal[0, 20::3] = -0.0, 0.0
    assert sampler(Sampling(temperature=0), 1)(equal).tolist() == [19]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [1e-320, 1e-8, 1e8, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits, n = torch.linspace(-50, 50, V), 20
    logits[7] = -math.inf
    shares = (torch.arange(n).double() + 0.5) / n
    tokens = sampler(Sampling(temperature=temperature, top_p=1), n)(logits.expand(n, V), shares).tolist()
    assert set(tokens) == {V - 1} if temperature < 1 else len(set(tokens)) == n
    assert 7 not in tokens


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", [0, 1])
def test_what_is_not_finite(temperature: float) -> None:
    s = Sampling(temperature=temperature, presence_penalty=0.1)
    logits = normal(0, 5, V)
    logits[0, 39] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, 1:] = -math.inf
    tokens = sampler(s, 5)(logits, uniform(0, 5)).tolist()
    assert tokens[:4] == [-1, -1, -1, 0]
    assert tokens[4] >= 0


# ---- tasks ----


def batch(s: Sampling, indices: list[int], logits: Tensor) -> tuple[generation.Batch, list[generation.Row]]:
    """Rows that will choose from these logits."""
    model: Any = SimpleNamespace(
        backend="triton", config=SimpleNamespace(vocab_size=V), device=CPU, last_device=CPU,
        tokenizer=tokenizer.raw_bytes(), head=lambda hidden: hidden, path="m", fingerprint="ab", dtype=torch.float32,
    )  # fmt: skip
    made = generation.Batch(model)
    state = State({"nothing": torch.zeros(1, 1)})
    added = zip(indices, logits, strict=True)
    rows = [made.add((), state, s, last_hidden=row, index=index) for index, row in added]
    return made, rows


@pytest.mark.usefixtures("small_tiles")
def test_tasks_choose_with_the_random_numbers_of_each_row() -> None:
    s = Sampling(top_p=0.9, frequency_penalty=0.2, seed=4)
    logits = normal(0, 3, V)
    choosing, rows = batch(s, [5, 0, 9], logits)
    choosing._read_prompts()
    numbers, plain = [random_numbers(s, index) for index in (5, 0, 9)], sampler(s, 3)
    for places in ([0, 1, 2], [0, 1, 2], [0, 2]):
        if len(places) < 3:
            choosing.drop(rows[1])
            plain.keep(places)
        shares = torch.tensor([numbers[place].random() for place in places]).double()
        choosing._tokens = choosing._choose()
        assert choosing._tokens == plain(logits[places], shares).tolist()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0, "presence_penalty": 1}])
def test_tasks_explain_what_is_not_finite(options: dict[str, float]) -> None:
    logits = normal(0, 2, V)
    logits[1, 3] = math.nan
    with pytest.raises(BackendError, match="choosing a token: expected finite numbers of the model"):
        batch(Sampling(**options), [0, 1], logits)[0].step()


def test_text_is_made_with_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save(official_weights(), tmp_path / "model.safetensors"), device="cpu", backend="triton")
    given: list[torch.Size] = []
    call = on_device.Sampler.__call__

    def seen(*arguments: Any) -> Tensor:
        given.append(arguments[1].shape)
        return call(*arguments)

    monkeypatch.setattr(on_device.Sampler, "__call__", seen)
    s = Sampling(seed=1, max_tokens=3)
    texts = ["".join(generation.generate(model, "The", sampling=s, index=index)) for index in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert given == [(1, 256)] * 9
    _, state = model.start()
    rows = generation.complete(model, ["The", "The"], [state, state], s, [0, 1])
    assert [row.text for row in rows] == [texts[0], texts[2]]
