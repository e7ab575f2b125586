"""Text out of a model: stops, seeds, whole characters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TEXT, Scripted, plainly, read

from rwkv_stream.errors import UsageError
from rwkv_stream.model import generation
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling
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
