"""The sampler against a plain one written token by token, and what its random numbers depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_stream.errors import UsageError
from rwkv_stream.model.sampling import Sampler, Sampling

V = 40


def plain_distribution(logits: list[float], made: list[int], s: Sampling) -> list[float]:
    """The chances of each token after `made`, step by step in Python floats, from the description alone."""
    counts: dict[int, float] = {}
    for token in made:
        for other in counts:
            counts[other] *= s.penalty_decay
        counts[token] = counts.get(token, 0.0) + 1
    penalised = [
        x - (s.presence_penalty + counts[i] * s.frequency_penalty if i in counts else 0) for i, x in enumerate(logits)
    ]
    largest = max(penalised)
    if s.temperature == 0:
        return [float(i == penalised.index(largest)) for i in range(len(logits))]
    p = [math.exp(x - largest) for x in penalised]
    p = [x / sum(p) for x in p]
    if s.top_p < 1:
        total, cutoff = 0.0, 0.0
        for x in sorted(p, reverse=True):
            total, cutoff = total + x, x
            if total >= s.top_p:
                break
        p = [x if x >= cutoff else 0.0 for x in p]
    if s.top_k:
        best = sorted(range(len(p)), key=lambda i: (-p[i], i))[: s.top_k]
        p = [x if i in best else 0.0 for i, x in enumerate(p)]
    p = [(x / max(p)) ** (1 / s.temperature) for x in p]
    return [x / sum(p) for x in p]


def drawn(sampler: Sampler, logits: np.ndarray, n: int) -> list[int]:
    return [sampler(logits) for _ in range(n)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.0, 0.2, 0.85, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 1000]),
    penalties=st.sampled_from([(0.0, 0.0), (0.4, 0.0), (0.0, 0.7), (0.3, 0.2)]),
    penalty_decay=st.sampled_from([0.0, 0.5, 0.996, 1.0]),
)
def test_each_draw_is_that_of_the_plain_sampler(
    seed: int, temperature: float, top_p: float, top_k: int, penalties: tuple[float, float], penalty_decay: float
) -> None:
    s = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, presence_penalty=penalties[0],
        frequency_penalty=penalties[1], penalty_decay=penalty_decay, seed=seed,
    )  # fmt: skip
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 2
    uniform = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(5,))))
    sampler = Sampler(s, 5, V)
    made: list[int] = []
    for _ in range(12):
        p = plain_distribution(logits.tolist(), made, s)
        order = sorted(range(V), key=lambda i: (-plain_distribution(logits.tolist(), made, SAME(s))[i], i))
        u, total = uniform.random(), 0.0
        for expected in (i for i in order if p[i] > 0):
            total += p[expected]
            if total > u:
                break
        token = sampler(logits)
        assert token == expected
        made.append(token)


def SAME(s: Sampling) -> Sampling:  # noqa: N802
    """The same penalties and nothing cut: what tokens are ordered by."""
    return Sampling(
        temperature=1, top_p=1, presence_penalty=s.presence_penalty, frequency_penalty=s.frequency_penalty,
        penalty_decay=s.penalty_decay,
    )  # fmt: skip


def test_frequencies_are_the_chances() -> None:
    s = Sampling(temperature=0.7, top_p=0.9, top_k=6, seed=3)
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5
    n = 20_000
    counts = np.bincount(drawn(Sampler(s, 0, V), logits, n), minlength=V)
    p = np.array(plain_distribution(logits.tolist(), [], s))
    assert (counts[p == 0] == 0).all()
    assert np.abs(counts / n - p).max() < 5 * math.sqrt(0.25 / n)


def test_temperature_comes_after_top_p() -> None:
    # p = 0.5 0.3 0.2: top_p 0.8 keeps two; at temperature 10 before the cut three would be needed
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    assert set(drawn(Sampler(Sampling(temperature=10, top_p=0.79, seed=0), 0, 3), logits, 300)) == {0, 1}


def test_ties_at_the_edge_of_top_p_are_kept_and_those_of_top_k_go_by_id() -> None:
    logits = np.array([0, 1, 1, 1, 0], dtype=np.float32)
    assert set(drawn(Sampler(Sampling(top_p=0.01, seed=0), 0, 5), logits, 200)) == {1, 2, 3}
    assert set(drawn(Sampler(Sampling(top_p=0.01, top_k=2, seed=0), 0, 5), logits, 200)) == {1, 2}


def test_greedy_takes_the_most_likely_after_the_penalties() -> None:
    logits = np.array([1.0, 3.0, 2.5], dtype=np.float32)
    assert drawn(Sampler(Sampling(temperature=0), 0, 3), logits, 4) == [1, 1, 1, 1]
    assert drawn(Sampler(Sampling(temperature=0, presence_penalty=1), 0, 3), logits, 3) == [1, 2, 1]
    growing = Sampler(Sampling(temperature=0, frequency_penalty=1, penalty_decay=1), 0, 3)
    assert drawn(growing, logits, 5) == [1, 2, 1, 2, 0]  # 3 2.5 1 → 2 2.5 → 2 1.5 → 1 1.5 → 1 0.5 1 (the lower id)


def test_logits_are_left_unchanged() -> None:
    logits = np.linspace(-1, 1, V, dtype=np.float32)
    before = logits.copy()
    drawn(Sampler(Sampling(presence_penalty=1, frequency_penalty=1, seed=0), 0, V), logits, 5)
    assert (logits == before).all()


@pytest.mark.parametrize("temperature", [1e-320, 1e-8, 1e8])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = np.linspace(-50, 50, V, dtype=np.float32)
    tokens = drawn(Sampler(Sampling(temperature=temperature, top_p=1, seed=1), 0, V), logits, 50)
    assert set(tokens) == {V - 1} if temperature < 1 else len(set(tokens)) > 10


@pytest.mark.parametrize("options", [{}, {"presence_penalty": 1.0}, {"temperature": 0}, {"top_k": 3}])
def test_what_is_not_finite(options: dict[str, float]) -> None:
    for bad in ([math.nan, 1.0, 0.0], [2.0, 1.0, math.nan], [math.inf, 1.0, 0.0], [-math.inf] * 3):
        assert Sampler(Sampling(**options), 0, 3)(np.array(bad, dtype=np.float32)) == -1
    possible = np.array([-math.inf, 0.0, -math.inf], dtype=np.float32)
    assert drawn(Sampler(Sampling(**options), 0, 3), possible, 20) == [1] * 20


def test_random_numbers_are_keyed_by_seed_and_index() -> None:
    logits = np.zeros(V, dtype=np.float32)
    s = Sampling(top_p=1, seed=7)
    together = [Sampler(s, index, V) for index in range(3)]
    interleaved = list(zip(*[[sampler(logits) for sampler in together] for _ in range(20)], strict=True))
    for index in range(3):
        assert drawn(Sampler(s, index, V), logits, 20) == list(interleaved[index])
    assert len(set(interleaved)) == 3
    assert drawn(Sampler(Sampling(top_p=1, seed=8), 0, V), logits, 20) != list(interleaved[0])
    unseeded = Sampling(top_p=1)
    assert drawn(Sampler(unseeded, 0, V), logits, 20) != drawn(Sampler(unseeded, 0, V), logits, 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 1.1),
        ("top_p", -0.1), ("top_k", -1), ("presence_penalty", math.nan), ("frequency_penalty", math.inf),
        ("penalty_decay", 1.5), ("stop", ("",)), ("stop", "\n"), ("seed", -1),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})
