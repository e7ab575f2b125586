"""Forks of a state: text made in pieces and in batches, conversations, and scores against plain computations."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkv_stream import tasks, tokenizer
from rwkv_stream.errors import InputError, MismatchError, UsageError
from rwkv_stream.prompts import FAMILIES, Question
from rwkv_stream.sampling import Sampling
from rwkv_stream.state import State
from rwkv_stream.tasks import Conversation, Surprise, answer_schema, ask, generate, score, score_schema
from rwkv_stream.writers import Writer

TEXT = "The keeper lit the lamp. The sea was calm;\n\n  the wind came from the north. “Who is it?” asked é漢字.\r\n" * 3


class Scripted:
    """A model that says what it is told: token i of the script, whatever it has read; its state counts tokens."""

    def __init__(self, script: Iterable[int], words: tokenizer.Tokenizer | None = None) -> None:
        self.tokenizer = words or tokenizer.raw_bytes()
        self.config = SimpleNamespace(vocab_size=self.tokenizer.vocab_size, n_embd=1)
        self.device = self.last_device = torch.device("cpu")
        self.script = torch.tensor([*script, 0])

    def forward(self, tokens: Tensor, state: State, logits: str = "last", lengths: Tensor | None = None) -> Any:
        hidden = state["position"][:, None] + torch.arange(1, tokens.shape[1] + 1)[:, None]
        new = State({"position": hidden[:, -1]})
        return (hidden if logits == "none" else self.head(hidden[:, -1])), new

    def forward_packed(self, tokens: Tensor, lengths: Tensor, state: State, start: Tensor) -> Any:
        within = torch.cat([torch.arange(1, n + 1) for n in lengths.tolist()])
        hidden = state["position"][start].repeat_interleave(lengths, 0) + within[:, None]
        return hidden, State({"position": hidden[lengths.cumsum(0) - 1]})

    def head(self, hidden: Tensor) -> Tensor:
        following = self.script[hidden[..., 0].long().clamp(max=len(self.script) - 1)]
        return torch.nn.functional.one_hot(following, self.config.vocab_size).float()

    def start(self) -> tuple[Tensor, State]:
        return torch.zeros(1), State({"position": torch.zeros(1, 1)})

    def pieces(self, **options: Any) -> Iterator[str]:
        options = {"temperature": 0, "max_tokens": len(self.script) - 1, **options}
        hidden, state = self.start()
        model: Any = self
        return generate(model, state=state, last_hidden=hidden, sampling=Sampling(**options))


@dataclasses.dataclass
class Taken:
    """What tasks use of a snapshot, without a store."""

    model: str
    tensors: State
    hidden: Tensor
    bytes: int
    document: str = "book.txt"
    id: str = "5" * 64
    model_path: str = "models/tiny.safetensors"

    def load(self) -> tuple[State, Tensor]:
        return self.tensors.clone(), self.hidden.clone()

    def state(self) -> State:
        return self.load()[0]


def read(model: Any, text: str, start: State | None = None) -> tuple[Tensor, State]:
    """The hidden state [C] of the last token of `text`, and the state, from one call."""
    state = model.start()[1] if start is None else start
    hidden, state = model.forward(torch.tensor([model.tokenizer.encode(text)]), state, logits="none")
    return hidden[0, -1], state


def taken(model: Any, text: str = TEXT) -> Any:
    hidden, state = read(model, text)
    return Taken(model.fingerprint, state, hidden, len(text.encode()))


def plainly(
    model: Any, hidden: Tensor, state: State, n: int, ends: Callable[[str], bool] = lambda _: False
) -> list[int]:
    """Greedy tokens, one call each."""
    tokens: list[int] = []
    logits = model.head(hidden)
    while len(tokens) < n and not ends(model.tokenizer.decode(tokens).decode("utf-8", "replace")):
        token = int(logits.argmax())
        if token in model.tokenizer.end_tokens:
            break
        tokens.append(token)
        out, state = model.forward(torch.tensor([tokens[-1:]]), state, logits="last")
        logits = out[0]
    return tokens


@pytest.fixture(params=["bytes_model", "bpe_model"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# ---- generate ----


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
    monkeypatch.setattr(tasks, "PREFILL_TOKENS", 7)
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


# ---- ask ----

QUESTIONS = ["Who?", "What did the keeper do when the sea was calm and the wind came?", "Why “é”?", "a", "Where is it?"]


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 1, "seed": 5}, {"presence_penalty": 1, "seed": 1}]
)
def test_a_batch_answers_as_one_by_one(model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    s = Sampling(max_tokens=12, **options)
    snapshot = taken(model)
    alone = [ask(Question(q, index=i), snapshot=snapshot, model=model, sampling=s) for i, q in enumerate(QUESTIONS)]
    for rows, prefill in ((32, 2048), (2, 2048), (3, 12)):
        monkeypatch.setattr(tasks, "ROWS", rows)
        monkeypatch.setattr(tasks, "PREFILL_TOKENS", prefill)
        assert list(ask(QUESTIONS, snapshot=snapshot, model=model, sampling=s)) == alone
    assert len({answer.answer for answer in alone}) > 1


def test_rows_end_each_at_their_own_time(model: Any) -> None:
    """The stops are frequent bytes, so that some rows leave the batch early and others go on."""
    snapshot = taken(model)
    questions = [f"Question {i}" for i in range(12)]
    s = Sampling(max_tokens=25, temperature=1, seed=2, stop=tuple("aeiouty\n"))
    together = list(ask(questions, snapshot=snapshot, model=model, sampling=s))
    assert len({answer.tokens for answer in together}) > 3
    for i, (question, answer) in enumerate(zip(questions, together, strict=True)):
        assert answer == ask(Question(question, index=i), snapshot=snapshot, model=model, sampling=s)


def test_an_answer_is_that_of_plain_calls(model: Any) -> None:
    snapshot = taken(model)
    answer = ask(
        "Who is\r\n\r\nit? ",
        snapshot=snapshot,
        model=model,
        template="[{question}]",
        sampling=Sampling(temperature=0, max_tokens=15),
    )
    tokens = plainly(model, *read(model, "[Who is\nit?]", snapshot.state()), 15, lambda text: "\n" in text)
    text = model.tokenizer.decode(tokens).decode("utf-8", "replace").split("\n")[0]
    assert (answer.answer, answer.tokens) == (text.strip(), len(tokens))
    assert (answer.question, answer.snapshot, answer.id) == ("Who is\r\n\r\nit? ", snapshot.id, None)
    assert dataclasses.asdict(answer)["sources"] == (
        {"document": "book.txt", "byte_start": 0, "byte_end": len(TEXT.encode()), "snapshot": snapshot.id},
    )


def test_the_family_decides_unless_told_otherwise(model: Any) -> None:
    snapshot = taken(model)
    family = FAMILIES["rwkv-stream"]
    plain = Sampling(temperature=0, max_tokens=family.sampling.max_tokens, stop=family.stop)
    told = ask("Who?", snapshot=snapshot, model=model, sampling=plain, template="\n\nQuestion: {question}\nAnswer:")
    assert ask("Who?", snapshot=snapshot, model=model) == told


def scripted(script: bytes) -> tuple[Any, Any]:
    """A model that says `script` after any prompt of 16 bytes, and a snapshot of it."""
    model: Any = Scripted(b"." * 16 + script)
    model.fingerprint = model.path = "scripted"
    return model, Taken("scripted", State({"position": torch.zeros(1, 1)}), torch.zeros(1), 0)


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_familys_stop_ends_every_answer(stop: tuple[str, ...]) -> None:
    model, snapshot = scripted(b" the keeper\nand more")
    s = Sampling(temperature=0, stop=stop)
    answers = ask(["Q"], snapshot=snapshot, model=model, sampling=s, template="{question}" + "." * 15)
    assert [answer.answer for answer in answers] == ["the keeper"]


@given(pieces=st.lists(st.text(st.sampled_from("a \n\u2003"), max_size=4)))
def test_stripped_pieces_are_the_stripped_text(pieces: list[str]) -> None:
    shown = list(tasks._stripped(pieces))
    assert "".join(shown) == "".join(pieces).strip()
    assert all(shown)


def test_bad_questions(model: Any) -> None:
    snapshot = taken(model)
    with pytest.raises(UsageError, match="empty"):
        ask(" \n", snapshot=snapshot, model=model)
    with pytest.raises(UsageError, match="empty"):
        list(ask(["Who?", ""], snapshot=snapshot, model=model))
    with pytest.raises(UsageError, match="template"):
        ask("Who?", snapshot=snapshot, model=model, template="Q:")


def test_questions_without_end_are_answered_as_they_come(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ROWS", 2)
    drawn = itertools.count()
    answers = ask(
        (f"Q{i}?" for i in drawn), snapshot=taken(model), model=model, sampling=Sampling(max_tokens=2, temperature=0)
    )
    assert [answer.question for answer in itertools.islice(answers, 3)] == ["Q0?", "Q1?", "Q2?"]
    assert next(drawn) == 4


def test_another_models_snapshot(bytes_model: Any) -> None:
    snapshot = taken(bytes_model)
    snapshot.model = "f" * 64
    uses = [
        lambda: ask("Who?", snapshot=snapshot, model=bytes_model),
        lambda: ask(["Who?"], snapshot=snapshot, model=bytes_model),
        lambda: Conversation(snapshot, bytes_model),
        lambda: score("nothing.txt", model=bytes_model, snapshot=snapshot),
    ]
    for use in uses:
        with pytest.raises(MismatchError) as caught:
            use()
        for part in ("f" * 64, bytes_model.fingerprint, snapshot.model_path):
            assert part in str(caught.value)


# ---- conversations ----


def test_each_turn_knows_the_turns_before(model: Any) -> None:
    snapshot = taken(model)
    s = Sampling(temperature=0, max_tokens=10)
    conversation = Conversation(snapshot, model, sampling=s)
    state, heard = snapshot.state(), ""
    for turn, question in enumerate(QUESTIONS[:3]):
        shown = list(conversation.ask(question))
        prompt = f"\n\nQuestion: {question}\nAnswer:"
        hidden, state = read(model, prompt, state)
        tokens = plainly(model, hidden, state, 10, lambda text: "\n" in text)
        text = model.tokenizer.decode(tokens).decode("utf-8", "replace").split("\n")[0].strip()
        assert conversation.answer is not None
        assert "".join(shown) == conversation.answer.answer == text
        if turn == 0:
            assert conversation.answer == ask(question, snapshot=snapshot, model=model, sampling=s)
        spoken = f" {text}" if text else ""
        heard += prompt + spoken
        if spoken:
            hidden, state = read(model, spoken, state)
        fork = conversation.fork()
        assert fork.text == heard
        assert model.tokenizer.decode(fork.tokens).decode() == heard
        for name in state:
            torch.testing.assert_close(fork.state[name], state[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fork.last_hidden, hidden, atol=1e-4, rtol=1e-4)


def test_turns_have_their_own_random_numbers_and_read_the_last_answer(model: Any) -> None:
    snapshot = taken(model)
    s = Sampling(seed=3, max_tokens=8)
    conversation = Conversation(snapshot, model, sampling=s, template="<{question}>")
    state, heard = snapshot.state(), ""
    for index, question in enumerate(QUESTIONS[:3]):
        shown = "".join(conversation.ask(question))
        made = "".join(generate(model, f"{heard}<{question}>", state=state, sampling=s, index=index))
        assert shown == made.split("\n")[0].strip()
        state = read(model, f"{heard}<{question}>", state)[1]
        heard = f" {shown}" if shown else ""


def test_an_interrupted_answer_is_what_was_shown() -> None:
    model, snapshot = scripted(b"one two three four")
    conversation = Conversation(snapshot, model, template="{question}" + "." * 14)
    pieces = conversation.ask("Q?")
    assert [next(pieces) for _ in range(5)] == ["o", "n", "e", " t", "w"]
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.answer is not None
    assert conversation.answer.answer == "one tw"
    assert conversation.fork().text == "Q?.............. one tw"


# ---- score ----


def plain_bits(model: Any, text: str, start: tuple[Tensor | None, State]) -> list[float]:
    """Bits of each token of the text from all logits at once; NaN for a first token without a prediction."""
    hidden, state = start
    ids = model.tokenizer.encode(text)
    logits = model.forward(torch.tensor([ids]), state, logits="all")[0][0].double()
    before = logits[:-1] if hidden is None else torch.cat([model.head(hidden)[None].double(), logits[:-1]])
    nats = -torch.log_softmax(before, -1)[range(len(before)), ids[len(ids) - len(before) :]]
    return [math.nan] * (len(ids) - len(before)) + (nats / math.log(2)).tolist()


def unsure(words: tokenizer.Tokenizer, *, starts: bool = False) -> Any:
    """A model that finds all tokens equally likely; unless it `starts` the first has no prediction."""
    model: Any = Scripted([], words)
    model.head = lambda hidden: torch.zeros(*hidden.shape[:-1], words.vocab_size)
    if not starts:
        model.start = lambda: (None, State({"position": torch.zeros(1, 1)}))
    return model


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.mark.parametrize("continued", [False, True])
def test_bits_are_those_of_all_logits_at_once(
    model: Any, book: Path, continued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "CHUNK_TOKENS", 50)
    monkeypatch.setattr(tasks, "HEAD_TOKENS", 7)
    snapshot = taken(model, "Before that. ") if continued else None
    bits = plain_bits(model, TEXT, (snapshot.hidden, snapshot.tensors) if snapshot else model.start())
    first = sum(math.isnan(b) for b in bits)
    assert first == (0 if continued or model.start_token is not None else 1)
    result = score(str(book), model=model, unit="token", snapshot=snapshot)
    units = list(result)
    assert [unit.bits for unit in units] == pytest.approx(bits[first:], abs=1e-3)
    assert [unit.token_start for unit in units] == list(range(first, len(bits)))
    data = TEXT.encode()
    assert [data[u.byte_start : u.byte_end].decode("utf-8", "replace") for u in units] == [u.text for u in units]
    assert b"".join(data[u.byte_start : u.byte_end] for u in units) == data[units[0].byte_start :]
    assert result.tokens == len(units)
    assert result.bits_per_byte == pytest.approx(sum(bits[first:]) / (len(data) - units[0].byte_start))


def test_every_unit_has_the_same_bits_in_all(model: Any, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "CHUNK_TOKENS", 32)
    results = {unit: score(str(book), model=model, unit=unit) for unit in ("token", "line", "chunk")}  # type: ignore[arg-type]
    units = {name: list(result) for name, result in results.items()}
    assert len(units["token"]) > len(units["chunk"]) > 1
    assert (
        len({result.tokens for result in results.values()}) == len({result.bytes for result in results.values()}) == 1
    )
    for result in results.values():
        assert result.bits == pytest.approx(results["token"].bits)
    of_token = {unit.token_start: unit.bits for unit in units["token"]}
    for name in ("line", "chunk"):
        for unit in units[name]:
            span = range(unit.token_start, unit.token_end)
            assert unit.bits == pytest.approx(sum(of_token.get(i, 0) for i in span))
        assert [u.token_end for u in units[name]][:-1] == [u.token_start for u in units[name]][1:]


def test_lines_are_those_of_the_text(model: Any, book: Path) -> None:
    lines = list(score(str(book), model=model, unit="line"))
    data = TEXT.encode()
    wanted = [(i, line) for i, line in enumerate(TEXT.split("\n")) if line]
    found = [(unit.index, unit.text) for unit in lines if unit.text]
    assert found == [(i, line.rstrip("\r")) for i, line in wanted]
    for unit in lines:
        assert data[unit.byte_start : unit.byte_end].decode().rstrip("\r\n") == unit.text
        assert unit.byte_start == 0 or data[unit.byte_start - 1 : unit.byte_start] == b"\n"


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab;.\n\r\t é漢"), min_size=1, max_size=200),
    cut=st.integers(2, 40),
    longest=st.integers(1, 60),
)
def test_each_token_is_in_one_line_whatever_the_text(
    text: str, cut: int, longest: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """World tokens such as ";\\n\\n" span lines; every token is 16 bits for a model that knows nothing."""
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(text.encode())
    model = unsure(tokenizer.world(), starts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "CHUNK_TOKENS", cut)
        patch.setattr(tasks, "LINE_TOKENS", longest)
        result = score(str(path), model=model, unit="line")
        lines = list(result)
    ids = model.tokenizer.encode(text)
    assert result.bits == pytest.approx(16 * len(ids))
    position = byte = 0
    for unit in lines:
        assert unit.token_start == position
        assert 0 < unit.token_end - unit.token_start <= longest
        assert unit.bits == pytest.approx(16 * (unit.token_end - unit.token_start))
        assert unit.byte_start >= byte
        assert text.encode()[byte : unit.byte_start].strip() == b"", "only white space is in no line's unit"
        assert text.encode()[: unit.byte_start].count(b"\n") == unit.index
        assert b"\n" not in text.encode()[unit.byte_start : unit.byte_end - 1]
        position, byte = unit.token_end, unit.byte_end
    assert position == len(ids)
    assert text.encode()[byte:].strip() == b""


def test_a_line_without_end_is_scored_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "LINE_TOKENS", 100)
    longest = 0

    class Window(tasks._Window):
        def home(self, start: int, end: int) -> int:
            nonlocal longest
            longest = max(longest, len(self._buffer))
            return super().home(start, end)

    monkeypatch.setattr(tasks, "_Window", Window)
    path = tmp_path / "long.txt"
    path.write_bytes(b"x" * 200_000)
    result = score(str(path), model=unsure(tokenizer.raw_bytes()), unit="line")
    parts = list(result)
    assert result.bits == pytest.approx(8 * 199_999)
    assert {unit.index for unit in parts} == {0}
    assert {unit.text for unit in parts} == {"x" * 100}
    assert [unit.byte_start for unit in parts] == list(range(0, 200_000, 100))
    assert longest < 2 * 65_536 + 4096


def test_tokens_that_begin_with_newlines_are_in_the_line_of_their_word(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n+\w+"), "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("zero\n\ntwo and two\nthree\n\n")
    model = unsure(tokenizer.from_file(tmp_path / "tokenizer.json"))
    lines = list(score(str(tmp_path / "text.txt"), model=model, snapshot=None))
    assert [(unit.index, unit.text, unit.token_start) for unit in lines] == [(2, "two and two", 1), (3, "three", 3)]
    assert [(unit.byte_start, unit.byte_end) for unit in lines] == [(6, 18), (18, 24)]


def test_the_strangest(model: Any, book: Path) -> None:
    for unit in ("token", "line"):
        result = score(str(book), model=model, unit=unit, top=5)  # type: ignore[arg-type]
        units = list(result)
        by_strangeness = sorted(units, key=lambda u: (-u.bits / max(1, u.byte_end - u.byte_start), u.byte_start))
        assert result.strangest == by_strangeness[:5]
    assert score(str(book), model=model).strangest == []


def test_of_equally_strange_units_the_first_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "same.txt"
    path.write_text("abc\n" * 20)
    result = score(str(path), model=unsure(tokenizer.raw_bytes()), unit="line", top=3)
    list(result)
    assert [unit.index for unit in result.strangest] == [1, 2, 3]  # the first line's first byte has no prediction


def test_texts_with_nothing_to_score(bytes_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"text\.txt.*found none"):
        list(score(str(path), model=bytes_model))
    path.write_bytes(b"a")
    result = score(str(path), model=bytes_model)
    assert list(result) == []
    assert result.bits_per_byte is None
    with pytest.raises(UsageError, match=r"token, line, chunk.*'word'"):
        score(str(path), model=bytes_model, unit="word")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="top"):
        score(str(path), model=bytes_model, top=-1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_schemas_fit_their_rows(model: Any, book: Path, tmp_path: Path, suffix: str) -> None:
    scores, answers = tmp_path / f"scores{suffix}", tmp_path / f"answers{suffix}"
    with Writer(scores, score_schema()) as writer:
        writer.write(dataclasses.asdict(unit) for unit in score(str(book), model=model))
    with Writer(answers, answer_schema()) as writer:
        s = Sampling(max_tokens=2, temperature=0)
        writer.write(
            dataclasses.asdict(a) for a in ask(["Who?", "Where?"], snapshot=taken(model), model=model, sampling=s)
        )
    assert writer.rows == 2
    assert set(score_schema().names) == {field.name for field in dataclasses.fields(Surprise)}
