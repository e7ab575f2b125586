"""A model that gives NaN is one error that names the model, the layer and the token, whatever was asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from program import program
from tiny_models import VERSIONS, official_weights, save

from rwkv_stream.model import load
from rwkv_stream.model.finite import first_odd, odd_layer, odd_tensors

TEXT = "the keeper lit the lamp z and went to sleep\n"  # a token for each byte
Z = TEXT.index("z")
WHERE = {
    "emb.weight": (Z, "first in layer 0"),
    "blocks.0.att.value.weight": (0, "first in layer 0"),
    "blocks.1.ffn.value.weight": (0, "first behind the last layer's state"),
    "blocks.1.att.key.weight": (0, "first in layer 1"),
    "ln_out.weight": (0, "first behind the last layer's state"),
    "head.weight": (None, "first behind the last layer's state"),
}


def broken(path: Path, tensor: str, version: str = "7", value: float = float("nan")) -> Path:
    """A model one of whose tensors, or of the embeddings the row of `z`, is not finite."""
    weights = official_weights(version=version)
    (weights[tensor][ord("z")] if tensor == "emb.weight" else weights[tensor])[...] = value
    return save(weights, path)


@pytest.mark.parametrize("tensor", WHERE)
def test_one_error_in_all_commands(tmp_path: Path, tensor: str) -> None:
    path, text = broken(tmp_path / "nan.pth", tensor), tmp_path / "a.txt"
    other = tmp_path / "b.txt"
    text.write_text(TEXT)
    other.write_text(TEXT)
    token, where = WHERE[tensor]
    store = ("--store", tmp_path / "store", "--model", path)
    commands = {
        "ingest": ("ingest", text, *store),
        "ingest of several": ("ingest", text, other, *store),
        "score": ("score", text, *store),
        "score to a table": ("score", text, "-o", tmp_path / "o.jsonl", *store),
        "embed": ("embed", text, "--unit", "sentence", "-o", tmp_path / "o.parquet", *store),
        "a job": ("embed", text, "-o", f"{tmp_path / 'job'}/", *store),
    }
    for name, arguments in commands.items():
        if tensor == "head.weight" and name in ("embed", "a job"):
            continue  # which do not use it
        ended = program(*arguments)
        assert (ended.code, ended.out) == (1, ""), (name, ended)
        (line,) = ended.err.splitlines()
        assert f"of the model '{path}'" in line and where in line, (name, line)
        if token is not None:
            assert f"from token {token} on" in line or (name.startswith("score") and f"token {token + 1} on" in line)
        assert f"doctor --model {path}" in line
    assert not list(tmp_path.glob("o.*")) and not list(tmp_path.rglob("*.state"))
    assert tensor.partition("blocks.")[2][:2] in program("doctor", "--model", path).out.partition("tensors: ")[2]


def test_what_text_is_made_of(tmp_path: Path, bytes_model_path: Path) -> None:
    path = broken(tmp_path / "nan.pth", "blocks.1.att.value.weight")
    model = load(path, device="cpu")
    for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 0}):
        with pytest.raises(Exception, match=r"choosing a token: expected finite numbers .* first in layer 1"):
            list(model.generate("The", **sampling))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_layer_is_found_for_every_version(tmp_path: Path, version: str, backend: str) -> None:
    path = broken(tmp_path / "nan.pth", "blocks.1.ffn.key.weight", version, float("inf"))
    model = load(path, device="cpu", backend=backend)
    hidden, state = model.forward(torch.tensor([[1, 2, 3]]), logits="none")
    assert not hidden.isfinite().any() and first_odd(hidden[0]) == 0 and odd_layer(state) is None
    assert odd_tensors(model.outer, model.blocks) == ["blocks.1.ffn.key.weight"]
    sound = load(save(official_weights(version=version), tmp_path / "a.pth"), device="cpu", backend=backend)
    assert (
        odd_tensors(sound.outer, sound.blocks) == []
        and int(first_odd(sound.forward(torch.tensor([[1, 2]]), logits="none")[0][0])) == 2
    )


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"dtype": "bf16"}])
def test_packed_weights(tmp_path: Path, options: dict[str, str]) -> None:
    model = load(broken(tmp_path / "nan.pth", "blocks.1.ffn.key.weight"), device="cpu", **options)
    assert odd_tensors(model.outer, model.blocks) == ["blocks.1.ffn.key.weight"]


def test_doctor_finds_what_only_shows_in_a_text(tmp_path: Path) -> None:
    weights = official_weights()
    weights["blocks.1.ffn.value.weight"][...] = 3e38
    said = program("doctor", "--model", save(weights, tmp_path / "large.pth")).out
    assert "weights finite; NaN or infinity from token 0 of a short text on, first in the last layer" in said
    assert "finite: weights, and what is made" in program("doctor").out
