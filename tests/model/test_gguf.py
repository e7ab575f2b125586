"""GGUF and rwkv.cpp: whatever their converters made of a model is the model again, and no file does harm."""

from __future__ import annotations

import math
import random
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import cases, mutated
from gguf_files import CPP_KINDS, K_BLOCKS, Kind, gguf_keys, gguf_tensors, write_gguf, write_rwkv_cpp
from gguf_files import gguf as package
from tiny_models import official_weights, save
from torch import Tensor

import rwkv_stream
from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.checkpoints import checkpoint, containers, gguf, rwkv_cpp
from rwkv_stream.model.checkpoints.sources import MappedFile

OURS = {"rwkv6": "6", "rwkv7": "7"}
# The largest error of rounding to this type, as a share of the largest value in the block; fp16 scales add a little.
ERRORS = {
    Kind.F16: 0,
    Kind.BF16: 2**-8,
    Kind.Q8_0: 0.5 / 127,
    Kind.Q6_K: 0.5 / 31,
    Kind.Q5_1: 1 / 31,
    Kind.Q5_K: 1 / 31,
    Kind.Q5_0: 1 / 16,
    Kind.Q4_1: 1 / 15,
    Kind.Q4_K: 1 / 15,
    Kind.Q4_0: 1 / 8,
    Kind.Q3_K: 0.5 / 3,
    Kind.Q2_K: 1 / 3,
}
REFERENCE_TYPES = [kind for kind in Kind if kind not in (*ERRORS, Kind.F32)]


def weights_of(architecture: str, **sizes: Any) -> dict[str, Tensor]:
    if architecture == "rwkv6":
        sizes = {"head_size": 16, **sizes}
    return official_weights(version=OURS[architecture], **sizes)


def written(path: Path, weights: dict[str, Tensor], **changes: Any) -> Path:
    return write_gguf(path, gguf_keys(weights, **changes), gguf_tensors(weights))


def read(path: Path) -> dict[str, Tensor]:
    """What a file holds, by official names, in canonical shapes."""
    return {name: canonical(source.read()) for name, source in containers.open_container(path).official().items()}


def canonical(tensor: Tensor) -> Tensor:
    return tensor[0, 0] if tensor.ndim == 3 and tensor.shape[:2] == (1, 1) else tensor


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], canonical(tensor).float(), rtol=0, atol=0, msg=name)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    return str(caught.value)


# ---- GGUF ----


@pytest.mark.parametrize("architecture", OURS)
def test_a_gguf_is_the_model_that_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    weights = weights_of(architecture)
    path = written(tmp_path / "a.gguf", weights)

    assert_same(read(path), weights)
    official = checkpoint.read(save(weights, tmp_path / "a.safetensors"))
    found = checkpoint.read(path)
    assert found.config == official.config
    assert checkpoint.fingerprint(found, "") == checkpoint.fingerprint(official, "")
    tokens = torch.arange(40)[None] * 5 % 256
    logits, _ = rwkv_stream.load(path, device="cpu").forward(tokens, logits="all")
    expected, _ = rwkv_stream.load(official.path, device="cpu").forward(tokens, logits="all")
    assert torch.equal(logits, expected)


def test_rwkv6_with_its_mixing_vectors_apart_as_older_files_have_them(tmp_path: Path) -> None:
    weights = weights_of("rwkv6")
    tensors = gguf_tensors(weights, fused=False)
    assert "blk.0.time_mix_lerp_w.weight" in tensors
    assert_same(read(write_gguf(tmp_path / "a.gguf", gguf_keys(weights), tensors)), weights)


def test_mixing_vectors_both_apart_and_in_one_are_refused(tmp_path: Path) -> None:
    weights = weights_of("rwkv6")
    tensors = gguf_tensors(weights) | gguf_tensors(weights, fused=False)
    found = refusal(write_gguf(tmp_path / "a.gguf", gguf_keys(weights), tensors))
    assert "each tensor once" in found and "att.time_maa_" in found


@pytest.mark.parametrize("rescale_every", [0, 1, 2, 6])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_what_was_stored_halved_after_every_n_layers_is_multiplied_back(
    rescale_every: int, kind: Kind, tmp_path: Path
) -> None:
    weights = {name: tensor.half().float() for name, tensor in weights_of("rwkv6", n_layer=5).items()}
    for name in weights:
        if name.endswith(("output.weight", "value.weight")):
            weights[name] = weights[name].clamp(-8, 8).mul(16).round().div(16)  # exact in fp16, halved or not
    keys = gguf_keys(weights, rescale_every_n_layers=rescale_every)
    tensors = gguf_tensors(weights, rescale_every=rescale_every)
    last = "blk.4.channel_mix_value.weight"
    assert (tensors[last] != gguf_tensors(weights)[last]).any() == (0 < rescale_every < 5)
    found = read(write_gguf(tmp_path / "a.gguf", keys, tensors, kind=kind))
    assert_same({name: tensor.float() for name, tensor in found.items()}, weights)


def test_a_factor_that_float16_does_not_hold(tmp_path: Path) -> None:
    weights = weights_of("rwkv6", n_layer=20, n_embd=32, vocab_size=8, d_ffn=32)
    for name in weights:
        if name.endswith(("output.weight", "value.weight")):
            weights[name] = weights[name].sign()
    keys, tensors = gguf_keys(weights, rescale_every_n_layers=1), gguf_tensors(weights, rescale_every=1)
    found = read(write_gguf(tmp_path / "a.gguf", keys, tensors, kind=Kind.F16))
    name = "blocks.19.ffn.value.weight"
    assert found[name].dtype == torch.float16
    assert torch.equal(found[name].float(), weights[name])


def test_v0_v1_v2_of_block_0_are_not_read(tmp_path: Path) -> None:
    weights = weights_of("rwkv7")
    for has_v in (True, False):
        tensors = gguf_tensors(weights, block_0_has_v=has_v)
        assert ("blk.0.time_mix_v1.weight" in tensors) == has_v
        found = read(write_gguf(tmp_path / f"{has_v}.gguf", gguf_keys(weights), tensors))
        assert not any(f"blocks.0.att.v{i}" in found for i in "012")
        assert_same(found, weights)


def test_a_single_head_whose_axis_was_lost_when_the_file_was_quantised(tmp_path: Path) -> None:
    weights = weights_of("rwkv6", head_size=64)
    tensors = gguf_tensors(weights)
    for i in range(2):
        tensors[f"blk.{i}.time_mix_first.weight"] = tensors[f"blk.{i}.time_mix_first.weight"].reshape(64)
    path = write_gguf(tmp_path / "a.gguf", gguf_keys(weights), tensors)
    assert_same(read(path), weights)


def test_a_head_size_that_only_the_tensors_say(tmp_path: Path) -> None:
    weights = weights_of("rwkv6")
    assert_same(read(written(tmp_path / "a.gguf", weights, **{"wkv.head_size": None})), weights)


def test_another_alignment(tmp_path: Path) -> None:
    weights = weights_of("rwkv7")
    path = write_gguf(tmp_path / "a.gguf", gguf_keys(weights), gguf_tensors(weights), alignment=1024)
    assert_same(read(path), weights)


def test_keys_are_plain_values(tmp_path: Path) -> None:
    weights = weights_of("rwkv7")
    tokens = ["<s>", "\\n", "\\xe4", "ä", ""]
    keys = gguf_keys(weights) | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 3], "a.minus": -7}
    metadata = containers.open_container(write_gguf(tmp_path / "a.gguf", keys, gguf_tensors(weights))).metadata
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["tokenizer.ggml.token_type"] == [1, 3]
    assert (metadata["a.minus"], metadata["rwkv7.wkv.head_size"]) == (-7, 64)
    assert metadata["rwkv7.attention.layer_norm_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_count": 3}, "'rwkv7.block_count' 2, as the tensors say, found 3"),
        ({"block_count": None}, "'rwkv7.block_count' 2, as the tensors say, found None"),
        ({"embedding_length": 128}, "'rwkv7.embedding_length' 64, as the tensors say, found 128"),
        ({"wkv.head_size": None}, "'rwkv7.wkv.head_size' as a count, found None"),
        ({"wkv.head_size": 0}, "'rwkv7.wkv.head_size' as a count, found 0"),
        ({"wkv.head_size": "64"}, "'rwkv7.wkv.head_size' as a count, found 64"),
        ({"wkv.head_size": 48}, "'blk.0.time_mix_r_k.weight' as vectors of 48, found [64]"),
        ({"attention.layer_norm_epsilon": 64e-5}, "'rwkv7.attention.layer_norm_epsilon' 1e-05, found 0.00063999"),
        ({"attention.layer_norm_epsilon": None}, "'rwkv7.attention.layer_norm_epsilon' 1e-05, found None"),
        ({"rescale_every_n_layers": -1}, "'rwkv7.rescale_every_n_layers' as a count, found -1"),
    ],
)
def test_keys_that_contradict_the_tensors_or_ask_for_other_computations(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert f"expected {told}" in refusal(written(tmp_path / "a.gguf", weights_of("rwkv7"), **changes))


def test_a_head_size_of_rwkv6_that_its_tensors_contradict(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", weights_of("rwkv6"), **{"wkv.head_size": 32})
    assert "expected 'rwkv6.wkv.head_size' 16, as the tensors say, found 32" in refusal(path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("arwkv7", "a hybrid with RMSNorm and SwiGLU layers, which is not supported"),
        ("rwkv6qwen2", "a hybrid with RMSNorm and SwiGLU layers, which is not supported"),
        ("llama", "which is no RWKV model"),
    ],
)
def test_other_architectures_are_refused_by_name(architecture: str, reason: str, tmp_path: Path) -> None:
    keys = {"general.architecture": architecture, f"{architecture}.block_count": 1}
    path = write_gguf(tmp_path / "a.gguf", keys, {"token_embd.weight": np.zeros((4, 32), np.float32)})
    assert f"expected the architecture rwkv6 or rwkv7, found '{architecture}', {reason}" in refusal(path)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    weights = weights_of("rwkv7")
    keys = gguf_keys(weights) | {"split.count": 2}
    assert "found a part of one; join" in refusal(write_gguf(tmp_path / "a.gguf", keys, gguf_tensors(weights)))


@pytest.mark.parametrize(
    ("tensor", "shape", "told"),
    [
        ("blk.0.time_mix_lerp_fused.weight", (5, 1, 1, 64), "as 6 vectors, found [5, 1, 1, 64]"),
        ("blk.1.time_mix_w1.weight", (512,), "as a matrix, found [512]"),
        ("blk.1.something.weight", (64,), "'blocks.1.something.weight' besides"),
        ("something.weight", (64,), "'something.weight' besides"),
        ("blk.01.time_mix_w1.weight", (8, 64), "'blk.01.time_mix_w1.weight' besides"),
        ("emb.weight", (256, 64), "expected each tensor once, found 'emb.weight' again"),
        ("blk.1.attn_norm.weight", (32,), "expected tensor 'blocks.1.ln1.weight' as [64], found [32]"),
    ],
)
def test_tensors_that_the_architecture_does_not_have(
    tensor: str, shape: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    weights = weights_of("rwkv7")
    tensors = gguf_tensors(weights) | {tensor: np.ones(shape, np.float32)}
    changes = {"block_count": 3} if ".01." in tensor else {}
    assert told in refusal(write_gguf(tmp_path / "a.gguf", gguf_keys(weights, **changes), tensors))


# ---- types ----


@pytest.fixture(scope="module")
def wide() -> dict[str, Tensor]:
    """With rows of 256 values, the blocks of the K types."""
    return weights_of("rwkv7", n_layer=1, n_embd=256, vocab_size=16, d_ffn=256)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.name)
def test_every_type_is_within_its_rounding(kind: Kind, wide: dict[str, Tensor], tmp_path: Path) -> None:
    expected = gguf_tensors(wide)
    path = write_gguf(tmp_path / "a.gguf", gguf_keys(wide), expected, kind=kind)
    rounded = set()
    for name, source in containers.open_container(path).sources.items():
        value, found = torch.from_numpy(expected[name]), source.read()
        if not torch.equal(found.float(), value):
            rounded.add(name)
            assert found.dtype == {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
            assert_rounded(found, value, kind)
    assert {"token_embd.weight", "blk.0.time_mix_key.weight", "blk.0.channel_mix_value.weight"} <= rounded


def assert_rounded(found: Tensor, expected: Tensor, kind: Kind) -> None:
    blocks = expected.reshape(-1, 256 if kind in K_BLOCKS else 32)
    errors = (found.float().reshape(blocks.shape) - blocks).abs().amax(1)
    assert (errors <= (ERRORS[kind] + 2**-9) * blocks.abs().amax(1)).all()
    assert errors.any()


@pytest.mark.parametrize("kind", REFERENCE_TYPES, ids=lambda kind: kind.name)
def test_all_other_types_are_read_as_the_package_does_or_refused(kind: Kind, tmp_path: Path) -> None:
    block, block_bytes = package.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 120, (3, 2 * block_bytes), np.uint8)
    path = tmp_path / "a.gguf"
    writer = package.GGUFWriter(path, "rwkv7")
    writer.add_tensor("a", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        expected = package.dequantize(raw, kind)
    except NotImplementedError:
        assert f"found type {int(kind)}" in refusal(path)
        return
    source = containers.open_container(path).sources["a"]
    assert (source.shape, source.dtype) == ((3, 2 * block), torch.float32)
    np.testing.assert_array_equal(source.read().numpy(), expected)


def test_opening_reads_no_tensor_and_plain_ones_stay_in_the_file(wide: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = gguf_tensors(wide)
    tensors["output.weight"] = np.full((16, 256), np.nan, np.float32)
    path = write_gguf(tmp_path / "a.gguf", gguf_keys(wide), tensors, kind=Kind.F16)
    opened = containers.open_container(path).official()
    start = path.read_bytes().index(np.full(16 * 256, np.nan, np.float16).tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(wide["head.weight"].half().numpy().tobytes())
    assert torch.equal(opened["head.weight"].read(), wide["head.weight"].half())
    assert opened["head.weight"].read().data_ptr() == opened["head.weight"].read().data_ptr()


def test_only_quantised_tensors_need_the_package(
    wide: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        kind: write_gguf(tmp_path / f"{kind.name}.gguf", gguf_keys(wide), gguf_tensors(wide), kind=kind)
        for kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0)
    }
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf._block.cache_clear()
    for kind in (Kind.F32, Kind.F16, Kind.BF16):
        assert read(paths[kind]).keys() == wide.keys()
    assert "expected the package gguf" in (told := refusal(paths[Kind.Q8_0]))
    assert "pip install 'rwkv-stream[gguf]'" in told


# ---- rwkv.cpp ----

CPP_VERSIONS = ["4", "5.0", "5.1", "5.2", "6", "7"]
UNDONE = re.compile(r"att\.time_(decay|first)$")  # of which rwkv.cpp stores an exponential


@pytest.mark.parametrize("file_version", [100, 101])
@pytest.mark.parametrize("version", CPP_VERSIONS)
def test_a_bin_is_the_model_that_it_was_made_of(version: str, file_version: int, tmp_path: Path) -> None:
    weights = official_weights(version=version, head_size=16 if version != "7" else 64)
    path = write_rwkv_cpp(tmp_path / "a.bin", weights, version=file_version)
    found = read(path)
    for name in weights:
        if UNDONE.search(name) and version not in ("6", "7"):
            torch.testing.assert_close(found.pop(name), weights[name], rtol=1e-5, atol=1e-5)
    assert_same(found, {name: weights[name] for name in found})
    assert found.keys() >= {name for name in weights if not UNDONE.search(name)}

    read_back, official = checkpoint.read(path), checkpoint.read(save(weights, tmp_path / "a.pth"))
    assert read_back.config.group_norm_eps == (1e-5 if version.startswith("5") else 64e-5)
    assert replace(read_back.config, group_norm_eps=64e-5) == official.config


@pytest.mark.parametrize("kind", [kind for kind in CPP_KINDS if kind != "FP32"])
def test_every_type_of_a_bin_is_within_its_rounding(kind: str, tmp_path: Path) -> None:
    weights = official_weights(version="5.2", head_size=16)
    found = read(write_rwkv_cpp(tmp_path / "a.bin", weights, kind=kind))
    for i in range(2):
        for name in ("att.key.weight", "att.gate.weight", "ffn.key.weight", "ffn.value.weight"):
            name = f"blocks.{i}.{name}"
            assert_rounded(found[name], weights[name], Kind[kind.replace("FP", "F")])


def test_blocks_of_rwkv_cpp_are_those_of_the_package(tmp_path: Path) -> None:
    """The format that rwkv.cpp's page gives for Q5_1, and those of the other types, decoded one value at a time."""
    rng = np.random.default_rng(0)
    for kind, (n, value) in BLOCKS.items():
        raw = rng.integers(0, 256, n, np.uint8)
        raw[:4].view(np.float16)[:] = rng.standard_normal(2)
        (tmp_path / kind).write_bytes(raw.tobytes())
        source, n_bytes = gguf.stored(MappedFile(tmp_path / kind), 0, "a", (32,), rwkv_cpp.GGML_KINDS[CPP_KINDS[kind]])
        assert n_bytes == n
        d, m = (float(x) for x in raw[:4].view(np.float16))
        expected = [value(raw, d, m, j) for j in range(32)]
        np.testing.assert_allclose(source.read().numpy(), expected, rtol=1e-6, atol=1e-6)


def nibble(raw: Any, start: int, j: int) -> int:
    return int(raw[start + j % 16]) >> (4 if j >= 16 else 0) & 15


def fifth_bit(raw: Any, start: int, j: int) -> int:
    return (int.from_bytes(raw[start : start + 4].tobytes(), "little") >> j & 1) << 4


BLOCKS: dict[str, tuple[int, Callable[[Any, float, float, int], float]]] = {
    "Q4_0": (18, lambda raw, d, m, j: d * (nibble(raw, 2, j) - 8)),
    "Q4_1": (20, lambda raw, d, m, j: d * nibble(raw, 4, j) + m),
    "Q5_0": (22, lambda raw, d, m, j: d * ((nibble(raw, 6, j) | fifth_bit(raw, 2, j)) - 16)),
    "Q5_1": (24, lambda raw, d, m, j: d * (nibble(raw, 8, j) | fifth_bit(raw, 4, j)) + m),
    "Q8_0": (34, lambda raw, d, m, j: d * float(raw[2 + j].view(np.int8))),
}


def test_a_decay_that_was_rounded_to_nothing_stays_finite(tmp_path: Path) -> None:
    weights = official_weights(version="5.2", head_size=16)
    weights["blocks.0.att.time_decay"][0, 0] = 6.0
    found = read(write_rwkv_cpp(tmp_path / "a.bin", weights))["blocks.0.att.time_decay"]
    assert found.isfinite().all()
    assert torch.exp(-torch.exp(found[0, 0])) == 0


def bin_tensor(name: bytes = b"a", dims: tuple[int, ...] = (8,), kind: int = 0) -> bytes:
    return struct.pack(f"<3I{len(dims)}I", len(dims), len(name), kind, *dims) + name


def bin_header(*, version: int = 101) -> bytes:
    return b"fmgg" + struct.pack("<5I", version, 8, 8, 1, 0)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (bin_header(version=99), "version 100 or 101 of rwkv.cpp's format, found 99"),
        (bin_header()[:12], "expected 20 bytes more at byte 4, found 8"),
        (bin_header() + b"\1", "expected 12 bytes more at byte 24, found 1"),
        (bin_header(version=100) + bin_tensor(dims=(32,), kind=2) + bytes(18), "in type 2 of version 100, which"),
        (bin_header() + bin_tensor(kind=4) + bytes(99), "in type 4 of version 101, which"),
        (bin_header() + bin_tensor(kind=2**32 - 1) + bytes(99), "in type 4294967295"),
        (bin_header() + bin_tensor(dims=(1,) * 5) + bytes(99), "at most 4 axes of a tensor, found 5"),
        (bin_header() + bin_tensor(name=b"a" * 65) + bytes(99), "at most 64 bytes of a tensor's name, found 65"),
        (bin_header() + bin_tensor(dims=(2**31, 2**31)), "'a' to end within"),
        (bin_header() + (bin_tensor() + bytes(32)) * 2, "expected each tensor once, found 'a' twice"),
        (bin_header() + bin_tensor() + bytes(32), "found embeddings of [] and 0 layers"),
        (bin_header() + bin_tensor(b"emb.weight", (8, 8)) + bytes(256), "found embeddings of [8, 8] and 0 layers"),
    ],
)
def test_bins_that_lie(data: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    assert told in refusal(path)


@pytest.mark.parametrize("shape", [(5, 1, 64), (6, 64, 64), (384,)])
def test_mixing_vectors_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    data = bin_header()[:8] + struct.pack("<4I", 8, 8, 1, 0) + bin_tensor(b"emb.weight", (8, 8)) + bytes(256)
    data += bin_tensor(b"blocks.0.att.x_rwkvag", shape[::-1]) + bytes(4 * math.prod(shape))
    (tmp_path / "a.bin").write_bytes(data)
    assert f"'blocks.0.att.x_rwkvag' as 6 vectors, found {list(shape)}" in refusal(tmp_path / "a.bin")


# ---- the shared checkpoints ----


@pytest.mark.parametrize(("file", "official"), [("synth-rwkv6", "synth-6"), ("synth-rwkv7", "synth-7.0")])
def test_shared_ggufs(file: str, official: str, tiny_rwkv: Path) -> None:
    expected = torch.load(tiny_rwkv / f"synth/{official}.pth", weights_only=True)
    assert_same(read(tiny_rwkv / f"synth/{file}.gguf"), expected)


TRAINED = {"4": "4v0-660K-FP32", "5.0": "5v1-730K-FP32", "5.2": "5v2-730K-FP32", "7": "7v0-834K-FP32"}


@pytest.mark.parametrize("version", TRAINED)
def test_shared_bins(version: str, tiny_rwkv: Path) -> None:
    expected = torch.load(tiny_rwkv / f"rwkv{version}-tiny.pth", weights_only=True)
    found = read(tiny_rwkv / f"tiny-rwkv-{TRAINED[version]}.bin")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_max_ulp(found[name].numpy(), canonical(tensor).numpy(), 3)


def test_the_shared_bin_in_blocks(tiny_rwkv: Path) -> None:
    expected = torch.load(tiny_rwkv / "rwkv6-tiny.pth", weights_only=True)
    found = read(tiny_rwkv / "tiny-rwkv-6v0-3m-Q5_1.bin")
    assert_same({name: tensor.bfloat16().float() for name, tensor in found.items()}, expected)


@pytest.mark.parametrize("version", TRAINED)
def test_logits_are_those_that_rwkv_cpp_expects(version: str, tiny_rwkv: Path) -> None:
    model = rwkv_stream.load(tiny_rwkv / f"tiny-rwkv-{TRAINED[version]}.bin", device="cpu", dtype="fp32")
    expected = np.fromfile(tiny_rwkv / f"expected-logits-{TRAINED[version].removesuffix('-FP32')}.bin", "<f4")
    prompt = torch.tensor([list(b'"in')])
    whole, _ = model.forward(prompt)
    assert np.abs(whole[0].numpy() - expected).max() < 1e-4
    state = None
    for token in prompt[0]:
        one_by_one, state = model.forward(token[None, None], state)
    assert np.abs(one_by_one[0].numpy() - expected).max() < 1e-4


# ---- files that somebody made up ----


def header(
    *, magic: bytes = b"GGUF", version: int = 3, n_tensors: int = 0, n_keys: int = 0, rest: bytes = b""
) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes = b"a", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**63
DATA = bytes(256)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (header(version=1), "GGUF of version 2 or 3, found version 1"),
        (header(version=3 << 24), "found one for big-endian machines"),
        (header()[:20], "expected 16 bytes more at byte 8, found 12 to the end of the file"),
        (header(n_tensors=HUGE), f"at most 65536 tensors, found {HUGE}"),
        (header(n_keys=HUGE), f"values of keys, found {HUGE}"),
        (header(n_keys=1000), "found 0 to the end of the file"),
        (header(n_keys=1, rest=struct.pack("<Q", HUGE)), f"expected {HUGE} bytes more"),
        (header(n_keys=1, rest=text(b"\xff") + DATA), "expected UTF-8"),
        (header(n_keys=1, rest=text(b"a") + struct.pack("<I", 99)), "a type of value that GGUF has, found 99"),
        (header(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 0, HUGE)), f"found {HUGE + 1}"),
        (header(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 19)), "to the end of the file"),
        (header(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 12, 1 << 19)), "expected 4194304 bytes more"),
        (header(n_keys=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "found 9"),
        (header(n_keys=2, rest=(text(b"a") + struct.pack("<IB", 0, 1)) * 2), "expected each key once, found 'a' twice"),
        (header(n_tensors=1, rest=tensor(b"a" * 65) + DATA), "at most 64 bytes of a tensor's name, found 65"),
        (header(n_tensors=1, rest=tensor(dims=(1,) * 5) + DATA), "at most 4 axes of 'a', found 5"),
        (header(n_tensors=1, rest=tensor(dims=()) + DATA), "'a' with 1 to 4 axes"),
        (header(n_tensors=1, rest=tensor(dims=(32, 0)) + DATA), "found [0, 32]"),
        (header(n_tensors=1, rest=tensor(dims=(2**32, 2**32)) + DATA), "'a' to end within"),
        (header(n_tensors=1, rest=tensor(dims=(HUGE, 2)) + DATA), "'a' to end within"),
        (
            header(n_tensors=1, rest=tensor(dims=(33,), kind=int(Kind.Q8_0)) + DATA),
            "the last a multiple of 32, found [33]",
        ),
        (header(n_tensors=1, rest=tensor(kind=999) + DATA), "found type 999"),
        (header(n_tensors=1, rest=tensor(kind=4) + DATA), "found type 4"),
        (header(n_tensors=1, rest=tensor(offset=2**64 - 32) + DATA), "'a' to end within"),
        (header(n_tensors=1, rest=tensor(offset=5) + DATA), "'a' at a multiple of 32, found 5"),
        (header(n_tensors=2, rest=tensor() * 2 + DATA), "each tensor once, found 'a' twice"),
        (header(n_tensors=3, rest=b"".join(map(tensor, [b"a", b"b", b"c"])) + DATA), "that do not overlap"),
        (
            header(n_keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 0)),
            "general.alignment as a multiple of 8, found 0",
        ),
    ],
)
def test_headers_that_lie(data: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    assert told in refusal(path)


def changed_counts(rng: random.Random, data: bytes) -> bytes:
    """One to three whole numbers of a header replaced by such as do harm."""
    for _ in range(rng.randint(1, 3)):
        at = 4 * rng.randrange(max(1, len(data) // 4)) + rng.choice([0, 0, 0, 1, 2, 3])
        value = rng.choice([0, 1, 2, 3, 8, 9, 31, 33, 2**20, 2**31, 2**32 - 1, 2**33, 2**63, 2**64 - 1, len(data)])
        new = struct.pack("<I" if value < 2**32 and rng.random() < 0.5 else "<Q", value)
        data = data[:at] + new + data[at + len(new) :]
    return data


def made_up(path: Path, whole: bytes, n_header: int) -> Callable[[random.Random], None]:
    """A case: a file with a damaged header is read whole, all of it from the file, or refused."""

    def case(rng: random.Random) -> None:
        begin, rest = whole[:n_header], whole[n_header:]
        damage = rng.choice([mutated, changed_counts])
        data = damage(rng, begin) + rest if rng.random() < 0.9 else mutated(rng, whole)
        path.write_bytes(data)
        try:
            opened = checkpoint.read(path)
        except CheckpointError as error:
            assert str(error).startswith(f"loading checkpoint '{path}': ")
            return
        assert sum(source.nbytes for source in opened.container.sources.values()) <= 32 * len(data)
        for source in opened.tensors.values():
            tensor = source.read()
            assert (tuple(tensor.shape), tensor.dtype) == (source.shape, source.dtype)

    return case


@pytest.fixture
def n_cases(request: pytest.FixtureRequest) -> int:
    return 10_000 if request.config.getoption("--all-moments") else 2_000


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", OURS)
def test_made_up_ggufs(architecture: str, kind: Kind, n_cases: int, tmp_path: Path) -> None:
    weights = weights_of(architecture, n_layer=1, vocab_size=8, d_ffn=32)
    keys = gguf_keys(weights) | {"tokenizer.ggml.tokens": [f"<{i}>" for i in range(8)], "z.numbers": [1, 2, 3]}
    path = write_gguf(tmp_path / "a.gguf", keys, gguf_tensors(weights), kind=kind)
    whole = path.read_bytes()
    first = min(source_start(path))
    cases(made_up(path, whole, first), n_cases // 4)


def source_start(path: Path) -> list[int]:
    return [tensor.data_offset for tensor in package.GGUFReader(path).tensors]


@pytest.mark.parametrize("version", ["5.2", "7"])
def test_made_up_files_of_rwkv_cpp(version: str, n_cases: int, tmp_path: Path) -> None:
    weights = official_weights(version=version, n_layer=1, vocab_size=8, d_ffn=32)
    path = write_rwkv_cpp(tmp_path / "a.bin", weights, kind="Q5_1")
    cases(made_up(path, whole := path.read_bytes(), len(whole)), n_cases // 4)
