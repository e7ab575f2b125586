"""Text out of a model: stops, seeds, whole characters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import TEXT, Scripted, plainly, read
from tiny_models import official_weights, save

from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model, generation, load
from rwkv_stream.model.generation import Batch, Row, generate
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.model.state import State
from rwkv_stream.text import tokenizer


@pytest.mark.parametrize("prompt", ["The keeper", None])
def test_greedy_text_is_that_of_plain_calls(model: Any, prompt: str | None) -> None:
    hidden, state = read(model, TEXT)
    before = state.digest()
    made = "".join(
        generate(model, prompt, state=state, last_hidden=hidden, sampling=Sampling(temperature=0, max_tokens=40))
    )
    if prompt is not None:
        hidden, state = read(model, prompt, state)
    assert made == model.tokenizer.decode(plainly(model, hidden, state, 40)).decode("utf-8", "replace")
    assert read(model, TEXT)[1].digest() == before


def test_a_long_prompt_is_read_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sampling(temperature=0, max_tokens=20)
    whole = "".join(generate(model, TEXT, sampling=s))
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)
    assert "".join(generate(model, TEXT, sampling=s)) == whole
    assert "".join(generate(model, model.tokenizer.encode(TEXT), sampling=s)) == whole


def test_the_model_has_the_same_method(model: Any) -> None:
    _, state = read(model, TEXT)
    made = list(model.generate("The", state=state, max_tokens=9, temperature=0))
    assert made == list(generate(model, "The", state=state, sampling=Sampling(max_tokens=9, temperature=0)))


def test_a_seed_decides_the_text(model: Any) -> None:
    def text(**options: int) -> str:
        index = options.pop("index", 0)
        return "".join(generate(model, "The", sampling=Sampling(max_tokens=30, **options), index=index))

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=1), text(seed=2), text(seed=1, index=1)}) == 3


def test_nothing_to_continue(bytes_model: Any) -> None:
    with pytest.raises(UsageError, match="prompt"):
        generate(bytes_model, None, state=bytes_model.zero_state())
    with pytest.raises(UsageError, match="prompt"):
        generate(bytes_model)  # no start token
    with pytest.raises(UsageError, match=r"255.*999"):
        list(generate(bytes_model, [1, 999]))


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\n é漢😀"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab\n é"), min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_and_never_shows_a_part_of_it(text: str, stop: list[str]) -> None:
    found = [text.index(s) for s in stop if s in text]
    # of stops that begin at several places, the one that is complete first ends the text
    ends = min((text.index(s) + len(s) for s in stop if s in text), default=len(text))
    complete = [text[:ends].index(s) for s in stop if s in text[:ends]]
    expected = text[: min(complete)] if found else text
    if not text:
        return
    pieces = list(Scripted(text.encode()).pieces(stop=tuple(stop)))
    assert all(pieces)
    assert "".join(pieces) == expected


@settings(max_examples=100, deadline=None)
@given(data=st.binary(min_size=1, max_size=40))
def test_any_bytes_come_out_as_text(data: bytes) -> None:
    pieces = list(Scripted(data).pieces())
    assert "".join(pieces) == data.decode("utf-8", "replace")
    for piece in pieces:
        piece.encode()


def test_a_character_comes_whole_and_at_once() -> None:
    assert list(Scripted("aé漢😀b".encode()).pieces()) == ["a", "é", "漢", "😀", "b"]
    assert list(Scripted("é漢".encode()[:-1]).pieces()) == ["é", "\ufffd"]


def test_what_may_become_a_stop_is_held_until_it_is_none() -> None:
    assert list(Scripted(b"one\ntwo\n\nthree").pieces(stop=("\n\n",))) == [*"one", "\nt", "w", "o"]
    assert list(Scripted(b"one\n").pieces(stop=("\n\n",))) == [*"one", "\n"]


@pytest.mark.parametrize("stop", [("ab", "b"), ("b", "ab")])
def test_of_stops_that_end_together_the_longer_ends_the_text(stop: tuple[str, ...]) -> None:
    assert "".join(Scripted(b"xab").pieces(stop=stop)) == "x"


def test_a_stop_that_spans_tokens_and_one_inside_a_token() -> None:
    world = tokenizer.world()
    script = world.encode("The light") + world.encode("house\n") + world.encode("\nUser: hi")
    assert "".join(Scripted(script, world).pieces(stop=("\n\nUser:",))) == "The lighthouse"
    assert "".join(Scripted(script, world).pieces(stop=("use",))) == "The lightho"


def test_end_of_text_ends_it() -> None:
    world = tokenizer.world()
    assert "".join(Scripted([*world.encode("The end."), 0, *world.encode("More")], world).pieces()) == "The end."


# ---- rows that join and leave ----


SETTINGS = [
    Sampling(max_tokens=12, temperature=0),
    Sampling(max_tokens=17, temperature=1, seed=5),
    Sampling(max_tokens=9, temperature=0.7, top_k=20, frequency_penalty=0.5, seed=5, stop=("e", "\n")),
    Sampling(max_tokens=1, temperature=0),
    Sampling(max_tokens=14, temperature=0, presence_penalty=1),
]
PROMPTS = ["Who?", TEXT, "The keeper lit the lamp.", "é", TEXT[40:150]]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save(official_weights(), tmp_path_factory.mktemp("native") / "model.pth"), device="cpu", backend="cpu")


@functools.cache
def alone(model: Model, prompt: str, i: int) -> str:
    return "".join(generate(model, prompt, state=state_of(model), sampling=SETTINGS[i % 5], index=i))


@functools.cache
def state_of(model: Model) -> State:
    return read(model, "It was a dark night. ")[1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_join_and_leave_make_the_texts_of_lone_ones(
    native: Model, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """With the native kernels all bits are equal, so texts are too, whoever stands beside them, whenever they came."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", data.draw(st.sampled_from([1, 7, 64, 2048])))
    batch, rows, dropped = Batch(native), {}, set()
    shown: dict[Row, str] = {}
    n = 0
    while batch or n < 10:
        for _ in range(data.draw(st.integers(0, 3)) if batch else 1):
            if n < 10:
                prompt = PROMPTS[data.draw(st.integers(0, 4))]
                tokens = native.tokenizer.encode_prompt(prompt)
                row = batch.add(tokens, state_of(native), SETTINGS[n % 5], index=n)
                rows[row] = prompt
                n += 1
        if data.draw(st.integers(0, 9)) == 0:
            row = data.draw(st.sampled_from(list(rows)))
            batch.drop(row)
            dropped |= set() if row.ended else {row}
        for row, piece in batch.step():
            assert row not in dropped
            shown[row] = shown.get(row, "") + piece
    for row, prompt in rows.items():
        expected = alone(native, prompt, row.index)
        assert shown.get(row, "") == row.text
        assert expected.startswith(row.text) if row in dropped else row.text == expected and row.ended


def test_a_text_goes_on_beside_others_without_a_prompt(native: Model) -> None:
    hidden, state = read(native, TEXT)
    expected = "".join(generate(native, state=state, last_hidden=hidden, sampling=SETTINGS[0]))
    batch = Batch(native)
    batch.add(native.tokenizer.encode(TEXT), state, SETTINGS[1])
    batch.step()
    row = batch.add((), state, SETTINGS[0], last_hidden=hidden)
    assert len(batch) == 2
    batch.drop(row)
    batch.drop(row)  # it is gone already
    row = batch.add((), state, SETTINGS[0], last_hidden=hidden)
    assert list(batch.run())
    assert (row.text, row.ended, len(batch)) == (expected, True, 0)


def test_long_prompts_are_read_between_the_steps_of_others(native: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bounded pieces, and in turn; rows that share a state have none of their own until they are read."""
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 50)
    calls: list[tuple[int, int]] = []

    def forward_packed(self: Model, tokens: Any, lengths: Any, state: State, **options: Any) -> Any:
        calls.append((len(tokens), state.batch))
        return whole(self, tokens, lengths, state, **options)

    whole = Model.forward_packed
    monkeypatch.setattr(Model, "forward_packed", forward_packed)
    batch = Batch(native)
    short = batch.add(native.tokenizer.encode("Who?"), native.zero_state(), Sampling(temperature=0, max_tokens=30))
    batch.step()
    long = native.tokenizer.encode(TEXT)
    state = state_of(native)
    before = state.digest()
    others = [batch.add(long, state, Sampling(temperature=0, max_tokens=2), index=i) for i in range(32)]
    for n in range(2, 20):
        batch.step()
        assert short.tokens == n
        assert sum(row.tokens > 0 for row in others) == min(32, (n - 1) * 50 // len(long))
    for _ in batch.run():
        pass
    assert all(n_tokens <= 50 and n_states <= 2 for n_tokens, n_states in calls)
    assert sum(n_tokens for n_tokens, _ in calls) == 4 + 32 * len(long)
    assert len({row.text for row in others}) == 1
    assert state.digest() == before


def test_what_cannot_be_read_is_refused_before_it_joins(native: Model) -> None:
    batch = Batch(native)
    row = batch.add([65], native.zero_state(), SETTINGS[0])
    for tokens, state, said in (
        ([1, 256], native.zero_state(), "0 to 255, found 256"),
        ([-1], native.zero_state(), "found -1"),
        ([], native.zero_state(), "found neither"),
        ([1], native.zero_state(2), "one row, found 2"),
    ):
        with pytest.raises(UsageError, match=said):
            batch.add(tokens, state, SETTINGS[0])
    assert len(batch) == 1
    assert "".join(piece for _, piece in batch.run()) == row.text
