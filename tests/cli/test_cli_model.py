"""`rwkv-stream model` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_layouts import save_layout
from program import program
from tiny_models import official_weights, save

from rwkv_stream.kernels.layers.cpu import Weight
from rwkv_stream.model import load
from rwkv_stream.model.checkpoints import checkpoint, library
from rwkv_stream.model.checkpoints.sources import Source


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv(library.VARIABLE, str(folder))
    return folder


def test_info_reads_no_tensor(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = official_weights(version="6", n_embd=128, head_size=16, n_layer=3)
    path = save(weights, models / "six.pth")
    real = checkpoint.read

    def unreadable(path: Path) -> checkpoint.Checkpoint:
        file = real(path)
        for name, source in file.tensors.items():
            file.tensors[name] = Source(source.shape, source.dtype, lambda: pytest.fail("a tensor was read"))  # type: ignore[index]
        return file

    monkeypatch.setattr(checkpoint, "read", unreadable)
    ended = program("model", "info", "six", "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    count = sum(tensor.numel() for tensor in weights.values())
    assert found["path"] == str(path) and found["file_bytes"] == path.stat().st_size
    wanted = {"version": "6", "container": "pth", "dtypes": ["fp32"], "layers": 3, "width": 128, "heads": 8}
    wanted |= {"head_size": 16, "ffn_width": 192, "vocabulary": 256, "parameters": count, "fingerprint": None}
    wanted |= {"tokenizer": "bytes (256 tokens)", "tokenizer_problem": None, "group_norm_eps": 64e-5}
    assert {name: found[name] for name in wanted} == wanted
    assert found["memory_bytes"]["fp32"] == 4 * count > found["memory_bytes"]["bf16"] == found["memory_bytes"]["fp16"]
    assert found["state_bytes"] == 4 * 3 * (2 * 128 + 128 * 16)
    assert "reference" in found["backends"]
    ended = program("model", "info", "six")
    assert ended.code == 0 and "RWKV" not in ended.err and "version\t6" in ended.out


def test_memory_is_what_loading_takes(models: Path) -> None:
    path = save(official_weights(), models / "seven.pth")
    found = json.loads(program("model", "info", str(path), "--json").out)
    for dtype, expected in found["memory_bytes"].items():
        model = load(path, device="cpu", dtype=dtype)
        tensors = (z for part in (model.outer, *model.blocks) for z in part.values())
        tensors = (z.panels if isinstance(z, Weight) else z for z in tensors)
        held = sum({z.untyped_storage().data_ptr(): z.untyped_storage().nbytes() for z in tensors}.values())
        assert expected <= held < 1.2 * expected, dtype  # panels are filled up; of a large model that is nothing


def test_a_fingerprint_is_computed_where_it_is_asked_for(models: Path) -> None:
    path = save(official_weights(), models / "seven.pth")
    found = json.loads(program("model", "info", "seven", "--json", "--fingerprint").out)
    assert found["fingerprint"] == load(path, device="cpu").fingerprint


def test_a_model_without_a_tokenizer_is_described(models: Path) -> None:
    save(official_weights(vocab_size=50_277, n_layer=1), models / "pile.pth")
    found = json.loads(program("model", "info", "pile", "--json").out)
    assert found["tokenizer"] is None and "20B_tokenizer.json" in found["tokenizer_problem"]
    assert program("model", "info", "pile").code == 0


def test_without_a_name_it_is_the_shipped_one(models: Path) -> None:
    found = json.loads(program("model", "info", "--json").out)
    assert found["path"] == str(library.shipped()) and found["version"] == "7"


def test_the_list_names_what_is_damaged(models: Path) -> None:
    assert program("model", "list").out == ""
    save(official_weights(version="4"), models / "four.safetensors")
    save_layout(models / "folder", official_weights(version="5.2"), "5.2", "rwkv_hf")
    (models / "bad.pth").write_bytes(b"words")
    ended = program("model", "list", "--json")
    assert ended.code == 0
    rows = {row["name"]: row for row in map(json.loads, ended.out.splitlines())}
    assert {name: row["version"] for name, row in rows.items()} == {"bad": None, "folder": "5.2", "four": "4"}
    assert "another kind of file" in rows["bad"]["problem"] and rows["four"]["problem"] is None
    ended = program("model", "list")
    assert ended.code == 0 and "four\tRWKV-4" in ended.out and "another kind of file" in ended.out


def test_convert_and_a_name_for_other_commands(models: Path, tmp_path: Path) -> None:
    save(official_weights(version="5.2", head_size=16), models / "five.pth")
    out = tmp_path / "five.safetensors"
    ended = program("model", "convert", "five", "-o", out, "--dtype", "bf16", "--json")
    assert ended.code == 0, ended
    done = json.loads(ended.out)
    assert done == {"path": str(out), "size_bytes": out.stat().st_size, "resumed_from_byte": 0, "tokenizer": None}
    assert json.loads(program("model", "info", out, "--json").out)["dtypes"] == ["bf16", "fp32"]
    assert program("model", "convert", "five", "-o", out).code == 1
    (tmp_path / "book.txt").write_text("The keeper walked over the bridge. " * 40)
    store = tmp_path / "store"
    assert program("ingest", tmp_path / "book.txt", "--model", "five", "--store", store).code == 0
    ended = program("generate", "--from-snapshot", "book.txt", "--store", store, "--max-tokens", 3)
    assert ended.code == 0, ended  # the model's path is remembered
    ended = program("ingest", tmp_path / "book.txt", "--model", "six", "--store", store)
    assert ended.code == 1 and "there are: 'five'" in ended.err
