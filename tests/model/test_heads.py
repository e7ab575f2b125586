"""Heads: the vector that their formula says, and files that belong to one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_stream.errors import InputError, MismatchError
from rwkv_stream.model import Model, load
from rwkv_stream.model.heads import EPS, VectorHead, path_of, vector_head


def head_of(model: Model, *, layers: int = 1, dimension: int = 12, gates: int = 3, seed: int = 0) -> VectorHead:
    random, C = torch.Generator().manual_seed(seed), model.config.n_embd
    value, gate = (torch.randn(shape, generator=random) for shape in ((dimension, C), (gates, C)))
    return VectorHead(model.fingerprint, layers, value, gate)


@pytest.fixture
def model(bytes_model_path: Path, tmp_path: Path) -> Model:
    """One whose checkpoint has a folder of its own."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes_model_path.read_bytes())
    return load(path, device="cpu")


@pytest.fixture
def other(other_bytes_model_path: Path) -> Model:
    return load(other_bytes_model_path, device="cpu")


def test_a_vector_is_the_mean_of_values_by_gates(bytes_model: Model) -> None:
    head = head_of(bytes_model)
    hidden = torch.randn(5, bytes_model.config.n_embd, generator=torch.Generator().manual_seed(1))
    found = head.vectors(head.features(bytes_model)(hidden).sum(0, keepdim=True))[0]
    for i in range(12):
        weights = torch.sigmoid(hidden @ head.gate[i // 4])
        wanted = (weights * (hidden @ head.value[i])).sum() / (weights.sum() + EPS)
        torch.testing.assert_close(found[i], wanted)


def test_a_head_is_found_beside_its_checkpoint(model: Model, other: Model, tmp_path: Path) -> None:
    assert vector_head(model) is None
    head = head_of(model, layers=2)
    saved = head.save(tmp_path)
    found = vector_head(model)
    assert found is not None and found.digest == head.digest and found.layers == 2
    assert all(torch.equal(getattr(found, name), getattr(head, name)) for name in ("value", "gate"))
    assert head_of(model, layers=1).digest != head.digest != head_of(model, layers=2, seed=1).digest
    saved.rename(path_of(tmp_path, "vector", other.fingerprint))  # of another model of that folder
    assert vector_head(model) is None


def test_files_that_are_no_head_of_this_model(model: Model, other: Model, tmp_path: Path) -> None:
    place = path_of(tmp_path, "vector", model.fingerprint)
    head_of(other).save(tmp_path).rename(place)
    with pytest.raises(MismatchError, match=f"found 1 vector {other.fingerprint[:12]}"):
        vector_head(model)
    place.write_bytes(place.read_bytes()[:40])
    with pytest.raises(InputError, match="expected a file that `finetune` made"):
        vector_head(model)
    head = head_of(model)
    metadata = {"format": "1", "kind": "vector", "model": model.fingerprint, "layers": "1"}
    for change, layers in (({"gate": torch.zeros(5, 64)}, 1), ({"value": torch.zeros(12, 5)}, 1), ({}, 0), ({}, 3)):
        head.save(tmp_path)
        save_file({**load_file(place), **change}, place, {**metadata, "layers": str(layers)})
        with pytest.raises(InputError, match=r"expected matrices for 64 channels after 1 to 2 layers"):
            vector_head(model)
