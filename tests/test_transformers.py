"""The models as transformers sees them: what it generates, against what the same model makes by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_layouts import OF_VERSION, save_layout
from tiny_models import VERSIONS, official_weights, save

from rwkv_stream.errors import UsageError
from rwkv_stream.model import Model, load

transformers = pytest.importorskip("transformers", reason="no transformers: pip install 'rwkv-stream[transformers]'")

from rwkv_stream.transformers import CACHE, RwkvStreamForCausalLM, StateCache  # noqa: E402

N_NEW = 24
GREEDY = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(text: str) -> torch.Tensor:
    return torch.tensor([list(text.encode())])


def greedy(model: Model, tokens: torch.Tensor) -> list[int]:
    """The continuation by this package's own `forward`, a token a call."""
    logits, state = model.forward(tokens)
    made = []
    for _ in range(N_NEW):
        made.append(int(logits.argmax()))
        logits, state = model.forward(torch.tensor([made[-1:]]), state)
    return made


@pytest.fixture(scope="module", params=VERSIONS)
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RwkvStreamForCausalLM:
    weights = official_weights(version=request.param, n_embd=32, head_size=16, d_ffn=64)
    path = save(weights, tmp_path_factory.mktemp("model") / "model.pth")
    return RwkvStreamForCausalLM.from_pretrained(path, device="cpu")


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> RwkvStreamForCausalLM:
    path = save(official_weights(), tmp_path_factory.mktemp("seven") / "model.pth")
    return RwkvStreamForCausalLM.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("version", OF_VERSION)
def test_auto_classes_load_folders(tmp_path: Path, version: str) -> None:
    weights = official_weights(version=version, n_layer=3)
    expected = greedy(load(save(weights, tmp_path / "model.pth"), device="cpu"), ids("The keeper"))
    for i, layout in enumerate(OF_VERSION[version]):
        folder = save_layout(tmp_path / str(i), weights, version, layout)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, device="cpu")
        assert isinstance(model, RwkvStreamForCausalLM)
        made = model.generate(ids("The keeper"), **GREEDY)
        assert made[0].tolist() == [*b"The keeper", *expected]
    assert transformers.RwkvForCausalLM.__module__.startswith("transformers.")


def test_a_folder_in_canonical_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv_stream"}))
    save(official_weights(), tmp_path / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert (model.config.vocab_size, model.config.hidden_size, model.config.num_hidden_layers) == (256, 64, 2)


def test_greedy_is_the_model_s_own(wrapped: RwkvStreamForCausalLM) -> None:
    expected = greedy(wrapped.rwkv, ids("The old bridge"))
    assert len(set(expected)) > 4, "a continuation of one byte shows nothing"
    made = wrapped.generate(ids("The old bridge"), **GREEDY)[0]
    assert made.dtype == torch.int64
    assert made.tolist() == [*b"The old bridge", *expected]
    assert wrapped.generate(ids("The old bridge"), use_cache=False, **GREEDY)[0].tolist() == made.tolist()


def test_prefill_and_decode_are_one_pass(wrapped: RwkvStreamForCausalLM) -> None:
    tokens = ids("The keeper of the lamp wrote it down.")
    whole = wrapped(tokens)
    assert whole.logits.dtype == torch.float32
    assert whole.logits.shape == (1, tokens.shape[1], 256)
    first = wrapped(tokens[:, :20])
    parts, cache = [first.logits], first[CACHE]
    before = cache.state.digest()
    for token in tokens[:, 20:].split(1, dim=1):
        output = wrapped(token, **{CACHE: cache})
        parts.append(output.logits)
        cache = output[CACHE]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=0, atol=1e-4)
    assert first[CACHE].state.digest() == before  # what was given is unchanged
    assert cache.get_seq_length() == tokens.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_are_each_alone(wrapped: RwkvStreamForCausalLM, side: str) -> None:
    texts = ["The keeper of the lamp", "A storm", "gulls cried over it"]
    T = max(map(len, texts))
    tokens, mask = torch.full((3, T), 255), torch.zeros(3, T, dtype=torch.int64)
    for i, text in enumerate(texts):
        place = slice(T - len(text), T) if side == "left" else slice(0, len(text))
        tokens[i, place], mask[i, place] = ids(text)[0], 1
    output = wrapped(tokens, attention_mask=mask)
    for i, text in enumerate(texts):
        alone = wrapped(ids(text))
        torch.testing.assert_close(output.logits[i][mask[i].bool()], alone.logits[0], rtol=0, atol=1e-4)
        for name, tensor in alone[CACHE].state.items():
            torch.testing.assert_close(output[CACHE].state[name][i], tensor[0], rtol=1e-4, atol=1e-4)
    assert not output.logits[~mask.bool()].any()
    if side == "left":
        made = wrapped.generate(tokens, attention_mask=mask, **GREEDY)[:, T:].tolist()
        assert made == [greedy(wrapped.rwkv, ids(text)) for text in texts]


def test_going_on_from_a_returned_cache(wrapped: RwkvStreamForCausalLM) -> None:
    options = {**GREEDY, "max_new_tokens": 10, "return_dict_in_generate": True}
    first = wrapped.generate(ids("The old bridge"), **options)
    longer = torch.cat([first.sequences, ids(" and the sea")], 1)
    expected = wrapped.generate(longer, **GREEDY)
    for _ in range(2):  # a cache can be continued many times
        made = wrapped.generate(longer, **{CACHE: first[CACHE]}, **GREEDY)
        assert made.tolist() == expected.tolist()


def test_a_state_of_this_package_is_a_cache(seven: RwkvStreamForCausalLM) -> None:
    state = seven.rwkv.forward(ids("The old bridge"))[1]
    expected = greedy(seven.rwkv, ids("The old bridge and"))
    made = seven.generate(ids(" and"), **{CACHE: StateCache(state)}, **GREEDY)
    assert made[0].tolist() == [*b" and", *expected]
    rows = seven.generate(ids(" and").repeat(2, 1), **{CACHE: StateCache(state)}, **GREEDY)
    assert rows[1].tolist() == made[0].tolist()
    assert seven(ids(" and"), past_key_values=StateCache(state)).past_key_values.state["att_kv"].shape[0] == 1


def test_a_cache_has_its_newer_and_its_older_name(seven: RwkvStreamForCausalLM) -> None:
    cache = seven(ids("The old"))[CACHE]
    expected = seven(ids("The old bridge")).logits[:, -7:]
    for name in ("cache", "past_key_values"):
        torch.testing.assert_close(seven(ids(" bridge"), **{name: cache}).logits, expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match=f"pass {CACHE} alone"):
        seven(ids(" bridge"), cache=cache, past_key_values=cache)


def test_options_are_those_of_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv_stream"}))
    path = save(official_weights(), tmp_path / "model.safetensors")
    expected = load(path, device="cpu", weights="int8")
    for model in (
        RwkvStreamForCausalLM.from_pretrained(path, device="cpu", weights="int8"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device="cpu", weights="int8"),
    ):
        assert (model.rwkv.weights, model.dtype) == ("int8", torch.bfloat16)
        assert torch.equal(model(ids("The old")).logits[0, -1], expected.forward(ids("The old"))[0][0])


def test_beam_search_finds_what_a_search_by_hand_finds(seven: RwkvStreamForCausalLM) -> None:
    """Three beams of four tokens, whose states must follow their tokens."""
    prompt, width, steps = ids("The old bridge"), 3, 4
    beams = [(0.0, prompt)]
    for _ in range(steps):
        candidates = []
        for score, tokens in beams:
            scores = seven.rwkv.forward(tokens)[0][0].log_softmax(0).topk(width)
            for value, token in zip(scores.values.tolist(), scores.indices.tolist(), strict=True):
                candidates.append((score + value, torch.cat([tokens, torch.tensor([[token]])], 1)))
        beams = sorted(candidates, key=lambda beam: -beam[0])[:width]
    options = {**GREEDY, "max_new_tokens": steps, "num_beams": width, "num_return_sequences": width}
    made = seven.generate(prompt, **options)
    assert made.tolist() == [tokens[0].tolist() for _, tokens in beams]


def test_sampling(seven: RwkvStreamForCausalLM) -> None:
    options = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3}
    torch.manual_seed(1)
    made = seven.generate(ids("The old bridge"), **options)
    assert made.shape == (3, 14 + N_NEW)
    assert len({tuple(row) for row in made.tolist()}) == 3
    torch.manual_seed(1)
    assert seven.generate(ids("The old bridge"), **options).tolist() == made.tolist()


def test_loss_and_last_logits(seven: RwkvStreamForCausalLM) -> None:
    tokens = ids("The old bridge")
    labels = tokens.clone()
    labels[:, :5] = -100
    output = seven(tokens, labels=labels)
    log_probabilities = output.logits[0].log_softmax(-1)
    expected = -sum(float(log_probabilities[t - 1, tokens[0, t]]) for t in range(5, 14)) / 9
    assert float(output.loss) == pytest.approx(expected, rel=1e-5)
    last = seven(tokens, logits_to_keep=2)
    torch.testing.assert_close(last.logits, output.logits[:, -2:], rtol=0, atol=1e-5)
    assert seven(tokens, return_dict=False)[0].shape == (1, 14, 256)
    assert seven(tokens, use_cache=False).past_key_values is None


def test_a_model_stays_where_it_was_loaded(seven: RwkvStreamForCausalLM) -> None:
    assert seven.to("cpu") is seven and seven.float() is seven
    for call in (seven.half, lambda: seven.to("meta")):
        with pytest.raises(UsageError, match="pass device= and dtype="):
            call()


def test_hidden_states_are_what_each_layer_and_the_head_read(wrapped: RwkvStreamForCausalLM) -> None:
    tokens = ids("The old bridge").repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    output = wrapped(tokens, attention_mask=mask, output_hidden_states=True)
    hidden = output.hidden_states
    assert [z.shape for z in hidden] == [(2, 14, 32)] * (wrapped.config.num_hidden_layers + 1)
    assert wrapped(tokens).hidden_states is None
    exact, _ = wrapped.rwkv.forward(tokens[1:, 5:], logits="none")
    torch.testing.assert_close(hidden[-1][1, 5:], exact[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.logits, wrapped(tokens, attention_mask=mask).logits, rtol=0, atol=1e-4)
    embedded = wrapped.emb(tokens)[0].float()
    norm = wrapped.get_submodule("blocks.0.ln0")
    normed = torch.nn.functional.layer_norm(embedded, (32,), norm.weight, norm.bias)
    torch.testing.assert_close(hidden[0][0], normed)


def test_what_is_refused(seven: RwkvStreamForCausalLM, tmp_path: Path) -> None:
    tokens = ids("The")
    hole = torch.tensor([[1, 0, 1]])
    for call, said in (
        (lambda: seven(tokens, output_attentions=True), "output_attentions"),
        (lambda: seven(tokens, attention_mask=hole), "padding between"),
        (lambda: seven(tokens, attention_mask=hole[:, :2]), "attention_mask"),
        (lambda: seven(tokens, past_key_values=transformers.DynamicCache()), "StateCache"),
        (lambda: seven(tokens, labels=tokens, logits_to_keep=1), "labels"),
        (lambda: seven(tokens.repeat(3, 1), past_key_values=seven(tokens.repeat(2, 1)).past_key_values), "3 rows"),
        (lambda: RwkvStreamForCausalLM.from_pretrained("someone/rwkv"), "model pull someone/rwkv"),
        (lambda: RwkvStreamForCausalLM.from_pretrained(seven.rwkv.path, device_map="auto"), "device_map"),
        (lambda: RwkvStreamForCausalLM.from_pretrained(seven.rwkv.path, dtype=torch.int8), "found 'torch.int8'"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
