"""Checkpoints of every version in every container: one set of canonical tensors, one fingerprint; what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import cases
from hf_layouts import LAYOUTS, OF_VERSION, config_of, fla_6, fla_7, rwkv_hf, save_folder, save_layout
from tiny_models import VERSIONS, official_weights, save
from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model import load
from rwkv_stream.model.checkpoints import checkpoint, containers
from rwkv_stream.model.checkpoints.checkpoint import version_of

LAID_OUT = [(version, layout) for version, layouts in OF_VERSION.items() for layout in layouts]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def weights_of(version: str, **options: Any) -> dict[str, Tensor]:
    """Heads of 16 where a version lets one choose, so that more than one is there."""
    heads = {} if version == "7" else {"head_size": 16}
    return official_weights(**({"version": version, "n_embd": 64} | heads | options))


def canonical(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: (tensor.view(-1) if tensor.shape[:2] == (1, 1) and tensor.ndim == 3 else tensor).to(dtype)
        for name, tensor in weights.items()
    }


def same(path: Path, expected: Mapping[str, Tensor]) -> None:
    found = checkpoint.read(path).tensors
    assert list(found) == sorted(expected)
    for name, source in found.items():
        tensor = source.read()
        assert (tensor.shape, tensor.dtype) == (source.shape, source.dtype)
        assert tensor.is_contiguous()
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def fingerprint(path: Path) -> str:
    return checkpoint.fingerprint(checkpoint.read(path), "bytes")


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1500


# ---- containers and layouts ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_all_files_of_a_model_are_one(tmp_path: Path, version: str, dtype: str) -> None:
    weights = weights_of(version)
    paths = [save(weights, tmp_path / name, DTYPES[dtype]) for name in ("a.pth", "a.safetensors")]
    stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in weights.items()}
    torch.save(stored, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in reversed(stored.items())}, tmp_path / "b.pth")
    paths += [tmp_path / "old.bin", tmp_path / "b.pth"]
    paths.append(save_folder(tmp_path / "folder", stored, {"model_type": "rwkv"}, dtype=DTYPES[dtype]))
    for path in paths:
        assert checkpoint.read(path).config.version == version
        same(path, canonical(weights, DTYPES[dtype]))
    assert len({fingerprint(path) for path in paths}) == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("version", "layout"), LAID_OUT)
def test_a_layout_holds_the_same_model(tmp_path: Path, version: str, layout: str, dtype: str) -> None:
    weights = weights_of(version, n_layer=3)
    expected = fingerprint(save(weights, tmp_path / "a.pth", DTYPES[dtype]))
    for i, options in enumerate([{}, {"parts": 3}, {"container": "pytorch_model.bin"}]):
        folder = save_layout(tmp_path / str(i), weights, version, layout, dtype=DTYPES[dtype], **options)
        assert checkpoint.read(folder).container.kind == "hf"
        same(folder, canonical(weights, DTYPES[dtype]))
        assert fingerprint(folder) == expected


def test_parts_may_be_torch_files(tmp_path: Path) -> None:
    weights = weights_of("4")
    folder = save_layout(tmp_path / "a", weights, "4", "rwkv_hf", parts=2, container="pytorch_model.bin")
    same(folder, canonical(weights))


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    folder = save_layout(tmp_path / "a", weights_of("4"), "4", "rwkv_hf")
    (folder / "pytorch_model.bin").write_bytes(b"something else")
    assert checkpoint.read(folder).config.version == "4"


def test_files_of_a_folder_may_be_links(tmp_path: Path) -> None:
    """As the hub's cache has them."""
    weights = weights_of("7")
    folder = save_layout(tmp_path / "snapshot", weights, "7", "fla_7", parts=2)
    for i, file in enumerate([*folder.iterdir()]):
        blob = file.rename(tmp_path / f"blob{i}")
        file.symlink_to(blob)
    same(folder, canonical(weights))


def test_storage_may_be_shared_and_strided(tmp_path: Path) -> None:
    weights = weights_of("7")
    for form in (True, False):
        made = {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
        both = torch.stack([weights["emb.weight"], weights["head.weight"]])
        made |= {"emb.weight": both[0], "head.weight": both[1]}
        torch.save(made, tmp_path / "a.pth", _use_new_zipfile_serialization=form)
        same(tmp_path / "a.pth", canonical(weights))


@pytest.mark.parametrize("form", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("as_parameters", [True, False])
def test_the_head_may_be_tied_to_the_embeddings(tmp_path: Path, form: bool, as_parameters: bool) -> None:
    weights = weights_of("7")
    weights["head.weight"] = weights["emb.weight"]
    made = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()} if as_parameters else dict(weights)
    made["head.weight"] = made["emb.weight"]
    torch.save(made, tmp_path / "tied.pth", _use_new_zipfile_serialization=form)
    assert (tmp_path / "tied.pth").stat().st_size < sum(tensor.nbytes for tensor in weights.values())
    same(tmp_path / "tied.pth", canonical(weights))
    weights["head.weight"] = weights["head.weight"].clone()
    tokens = torch.tensor([[1, 2, 3]])
    tied, alone = (
        load(path, device="cpu") for path in (tmp_path / "tied.pth", save(weights, tmp_path / "alone.safetensors"))
    )
    assert torch.equal(tied.forward(tokens)[0], alone.forward(tokens)[0])


def test_a_state_dict_with_its_metadata(tmp_path: Path) -> None:
    """Which torch pickles as an OrderedDict with an attribute."""
    module = torch.nn.Linear(3, 4)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    found = containers.open_container(tmp_path / "a.pth").sources
    assert torch.equal(found["weight"].read(), module.weight.detach())
    assert torch.equal(found["bias"].read(), module.bias.detach())


GROWTH = """
import os, sys
from pathlib import Path
from rwkv_stream.model.checkpoints import checkpoint

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

def read(path):
    found = checkpoint.read(path)
    assert len(checkpoint.tensors_digest(found.tensors)) == 64
    return [source.read() for source in found.tensors.values()]

small, *paths = sys.argv[1:]
read(small)  # imports, and what allocators keep
for path in paths:
    if os.fork() == 0:
        before = anonymous()
        held = read(path)
        print(sum(tensor.nbytes for tensor in held), anonymous() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_tensors_stay_in_their_files(tmp_path: Path) -> None:
    """Opening, hashing and reading one after the other takes no memory of its own, in a process that does no more."""
    weights = weights_of("7", vocab_size=80_000)  # 39 MiB
    big = sum(tensor.nbytes for tensor in weights.values())
    small = save(weights_of("7"), tmp_path / "small.pth")
    aligned, crooked = (older_form(weights, tmp_path / f"old-{bytes_off}.pth", bytes_off) for bytes_off in (0, 1))
    paths = [save(weights, tmp_path / "a.pth"), save(weights, tmp_path / "a.safetensors"), aligned, crooked]
    child = [sys.executable, "-Ic", GROWTH, small, *paths]
    # a large block goes back to the system when it is freed, so that what is counted is what is held
    ran = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"})
    assert ran.returncode == 0, ran.stderr
    for path, line in zip(paths, ran.stdout.splitlines(), strict=True):
        held, growth = map(int, line.split())
        assert held == big
        assert growth < (big if path == crooked else 0) + big // 4, path.name


def older_form(weights: dict[str, Tensor], path: Path, bytes_off: int) -> Path:
    """Save in torch's older form, which aligns nothing: each tensor begins so many bytes behind a multiple of four."""
    made = OrderedDict(weights)
    for padding in range(64):  # the pickles hold addresses as well, of whatever length
        made._metadata = {"": "x" * padding}  # as Module.state_dict has it
        torch.save(made, path, _use_new_zipfile_serialization=False)
        if (
            path.stat().st_size % 4 == bytes_off
        ):  # up to the end stand whole tensors and their lengths, eight bytes each
            return path
    raise AssertionError(path)


# ---- the dimensions, and what config.json says ----


@pytest.mark.parametrize("version", VERSIONS)
def test_one_block_is_enough_to_know_the_version(tmp_path: Path, version: str) -> None:
    config = checkpoint.read(save(weights_of(version, n_layer=1), tmp_path / "a.pth")).config
    assert (config.version, config.n_layer, config.n_embd) == (version, 1, 64)
    assert config.n_head == (64 if version == "4" else 1 if version == "7" else 4)
    assert config.group_norm_eps == 64e-5


def test_the_order_of_the_keys_is_nothing() -> None:
    for version in VERSIONS:
        names = [(name, tuple(tensor.shape)) for name, tensor in weights_of(version).items()]
        for seed in range(5):
            random.Random(seed).shuffle(names)
            assert version_of(dict(names)) == version


@pytest.mark.parametrize("version", ["5.0", "5.1"])
@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1)])
def test_one_decay_a_head_with_more_axes(tmp_path: Path, version: str, shape: tuple[int, ...]) -> None:
    weights = weights_of(version)
    per_head = ("time_decay", "time_first", "time_faaaa")
    wide = {name: tensor.view(shape) if name.endswith(per_head) else tensor for name, tensor in weights.items()}
    path = save(wide, tmp_path / "a.pth")
    assert checkpoint.read(path).config.version == version
    same(path, canonical(weights))


@pytest.mark.parametrize("form", ["time_first", "time_faaaa"])
def test_the_name_of_the_bonus_decides(tmp_path: Path, form: str) -> None:
    weights = weights_of("5.1")
    made = {name.replace("time_faaaa", form): tensor for name, tensor in weights.items()}
    assert checkpoint.read(save(made, tmp_path / "a.pth")).config.is_bonus_log == (form == "time_first")


def test_finch_decay_as_hugging_face_first_makes_it(tmp_path: Path) -> None:
    weights = weights_of("6")
    made = rwkv_hf(weights)
    made |= {name: tensor.view(4, 16) for name, tensor in made.items() if name.endswith(".time_decay")}
    folder = save_folder(tmp_path / "a", made, config_of(weights, "6", "rwkv_hf"))
    same(folder, canonical(weights))


def test_block_0_of_goose_may_hold_what_is_not_read(tmp_path: Path) -> None:
    weights = weights_of("7")
    unused = {f"blocks.0.att.v{i}": weights[f"blocks.1.att.v{i}"] for i in range(3)}
    path = save(dict(reversed((weights | unused).items())), tmp_path / "a.pth")
    same(path, canonical(weights))
    assert fingerprint(path) == fingerprint(save(weights, tmp_path / "b.pth"))


def test_fla_orders_differ_in_every_part(tmp_path: Path) -> None:
    """Any of the five exchanged for another one would be seen."""
    weights = weights_of("6")
    C = 64
    parts = [*weights["blocks.0.att.time_maa_w1"].view(C, 5, -1).unbind(1)]
    assert all(not torch.equal(one, other) for i, one in enumerate(parts) for other in parts[:i])
    taken_as_official = fla_6(weights)["model.layers.0.attn.x_proj.0.linear.weight"].t()
    assert not torch.equal(taken_as_official, weights["blocks.0.att.time_maa_w1"])
    folder = save_layout(tmp_path / "a", weights, "6", "fla_6")
    found = checkpoint.read(folder).tensors
    assert torch.equal(found["blocks.0.att.time_maa_w1"].read(), weights["blocks.0.att.time_maa_w1"])
    assert torch.equal(found["blocks.1.att.time_maa_w2"].read(), weights["blocks.1.att.time_maa_w2"])


def test_fla_names_the_two_mixers_differently(tmp_path: Path) -> None:
    weights = weights_of("7")
    made = fla_7(weights)
    assert "model.layers.1.ffn.key.weight" in made and "model.layers.1.attn.k_proj.weight" in made
    assert not any(".0.attn.v_lora." in name for name in made)
    renamed = {name.replace("ffn.key", "ffn.k_proj"): tensor for name, tensor in made.items()}
    folder = save_folder(tmp_path / "a", renamed, config_of(weights, "7", "fla_7"))
    refused(folder, r"found 'model.layers.0.ffn.k_proj.weight', 'model.layers.1.ffn.k_proj.weight' besides")


EPS = [  # version, layout, what config.json says → eps
    ("5.2", "rwkv_hf", {}, 64e-5),
    ("5.2", "rwkv_hf", {"head_size_divisor": None}, 64e-5),
    ("5.2", "rwkv_hf", {"head_size_divisor": 8}, 64e-5),
    ("5.2", "rwkv_hf", {"head_size_divisor": 4}, 16e-5),
    ("6", "rwkv_hf", {"head_size_divisor": 16}, 256e-5),
    ("6", "fla_6", {"norm_eps": 1e-5}, 64e-5),
    ("7", "fla_7", {"norm_eps": 1e-5}, 64e-5),
    ("4", "rwkv_hf", {"head_size_divisor": 4}, 64e-5),
]


@pytest.mark.parametrize(("version", "layout", "said", "eps"), EPS)
def test_group_norm_eps(tmp_path: Path, version: str, layout: str, said: dict[str, Any], eps: float) -> None:
    weights = weights_of(version)
    folder = save_layout(tmp_path / "a", weights, version, layout, config=said)
    assert checkpoint.read(folder).config.group_norm_eps == pytest.approx(eps, rel=1e-12)
    same_model = fingerprint(folder) == fingerprint(save(weights, tmp_path / "a.pth"))
    assert same_model == (eps == 64e-5), "the same tensors mean another model"


def test_group_norm_eps_of_smaller_heads_in_fla(tmp_path: Path) -> None:
    weights = official_weights(head_size=16)
    folder = save_layout(tmp_path / "a", weights, "7", "fla_7", config={"head_dim": 16})
    assert checkpoint.read(folder).config.group_norm_eps == pytest.approx(16e-5)
    assert checkpoint.read(save(weights, tmp_path / "a.pth")).config.group_norm_eps == 64e-5


def test_our_own_files_say_their_group_norm_eps(tmp_path: Path) -> None:
    path, stored = tmp_path / "a.safetensors", weights_of("5.2")
    for said, eps in (("1e-05", 1e-5), ("0.00064", 64e-5)):
        safetensors.torch.save_file(stored, path, metadata={"group_norm_eps": said})
        assert checkpoint.read(path).config.group_norm_eps == eps
    for said in ("much", "-1", "nan", "inf", "0"):
        safetensors.torch.save_file(stored, path, metadata={"group_norm_eps": said})
        refused(path, f"expected a number as 'group_norm_eps', found '{said}'")


REFUSED_CONFIGS = [
    ("7", "fla_7", {"tie_word_embeddings": True}, "'tie_word_embeddings' False .* found True"),
    ("4", "rwkv_hf", {"layer_norm_epsilon": 1e-6}, "'layer_norm_epsilon' 1e-05 .* found 1e-06"),
    ("7", "fla_7", {"norm_eps": 1e-3}, "'norm_eps' 1e-05 .* found 0.001"),
    ("7", "fla_7", {"norm_eps": "small"}, "a number as 'norm_eps', found 'small'"),
    ("7", "fla_7", {"norm_eps": True}, "a number as 'norm_eps', found 'True'"),
    ("7", "fla_7", {"hidden_act": "gelu"}, "'hidden_act' sqrelu .* found gelu"),
    ("7", "fla_7", {"attn": {"layers": [1], "num_heads": 4}}, r"a hybrid \(model_type 'rwkv7'\)"),
    ("7", "transformers_7", {"use_deep_embed": True}, "'use_deep_embed' False .* found True"),
    ("7", "fla_7", {"quantization_config": {"bits": 4}}, "'quantization_config' None .* found"),
    ("6", "rwkv_hf", {"model_type": "rwkv6_moe"}, r"'rwkv6_moe' \(Flock of Finches, a mixture of experts\)"),
    ("6", "rwkv_hf", {"model_type": "rwkv6qwen2"}, r"a hybrid \(model_type 'rwkv6qwen2'\)"),
    ("7", "fla_7", {"model_type": "arwkv7"}, r"a hybrid \(model_type 'arwkv7'\)"),
    ("5.2", "rwkv_hf", {"head_size_divisor": 0}, "a number as 'head_size_divisor', found '0'"),
]


@pytest.mark.parametrize(("version", "layout", "said", "message"), REFUSED_CONFIGS)
def test_what_config_says_is_honoured_or_refused(
    tmp_path: Path, version: str, layout: str, said: dict[str, Any], message: str
) -> None:
    refused(save_layout(tmp_path / "a", weights_of(version), version, layout, config=said), message)


# ---- what is refused by name ----


def with_names(*names: str, version: str = "7", without: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(version).items() if not name.endswith(without)}
    return shapes | {f"blocks.0.{name}": (8, 64) for name in names}


BY_NAME: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "7b": (with_names("qkv.x.weight", version="7a"), r"RWKV-7b \(attention over all tokens\), whose state grows"),
    "v8": (with_names("ffn.enn.weight"), "RWKV-8 rc00, a research version"),
    "rosa": (with_names("rosa.emb.weight"), "RWKV-8 with ROSA, a research version"),
    "x060a": (with_names("att.gate_w1", version="6", without=("gate.weight",)), r"experiment on RWKV-6 \(x060a\)"),
    "x060b": (
        with_names("att.time_maa_rkvw_w1", version="6", without=("gate.weight",)),
        r"experiment on RWKV-6 \(x060b or c\)",
    ),
    "experts": (with_names("ffn.experts.0.key.weight", version="6"), "a mixture of experts, whose routing"),
    "tuned state": (
        {f"blocks.{i}.att.time_state": (4, 16, 16) for i in range(2)},
        "a tuned initial state, which is no",
    ),
    "nothing": ({}, "nothing"),
    "another model": (
        {"transformer.wte.weight": (256, 64)},
        "'transformer.wte.weight'.* none of RWKV's official names",
    ),
}


@pytest.mark.parametrize("kind", BY_NAME)
def test_what_is_not_run_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    shapes, message = BY_NAME[kind]
    refused(save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.pth"), message)


def test_converted_for_chatrwkv(tmp_path: Path) -> None:
    for form in (True, False):
        path = tmp_path / "a.pth"
        held = weights_of("5.2") | {"_strategy": "cpu fp32", "_version": 0.8}
        torch.save(held, path, _use_new_zipfile_serialization=form)
        refused(path, "converted for ChatRWKV")


@pytest.mark.parametrize(("version", "layout"), LAID_OUT)
def test_files_in_the_hugging_face_layout_need_their_folder(tmp_path: Path, version: str, layout: str) -> None:
    path = save(LAYOUTS[layout](weights_of(version)), tmp_path / "model.safetensors")
    refused(path, "a model in the Hugging Face layout without its 'config.json'; pass the folder")


@pytest.mark.parametrize(("version", "layout"), LAID_OUT)
def test_unknown_and_missing_tensors_of_a_layout(tmp_path: Path, version: str, layout: str) -> None:
    weights = weights_of(version)
    made, config = LAYOUTS[layout](weights), config_of(weights, version, layout)
    name = next(name for name in made if ".1." in name)
    refused(save_folder(tmp_path / "a", made | {f"{name}.new": torch.zeros(3)}, config), f"'{name}.new' besides")
    made.pop(name)
    refused(save_folder(tmp_path / "b", made, config), "'blocks.1.* missing")


def test_tensors_that_cannot_be_rearranged(tmp_path: Path) -> None:
    for version, layout, name, shape, message in (
        ("7", "fla_7", "model.layers.1.attn.w_lora.lora.0.weight", (3,), r"as \[n, n\], found \[3\]"),
        ("7", "fla_7, first revision", "model.layers.1.attn.x_x", (5, 64), r"as \[6, n\], found \[5, 64\]"),
        ("6", "fla_6", "model.layers.1.attn.x_proj.2.weight", (64, 31), "five low ranks in .*, found 31 rows"),
        ("6", "fla_6", "model.layers.0.attn.x_proj.0.linear.weight", (0, 64), "five low ranks in .*, found 0 rows"),
    ):
        weights = weights_of(version)
        made = LAYOUTS[layout](weights) | {name: torch.zeros(shape)}
        folder = save_folder(tmp_path / f"{layout}{len(name)}", made, config_of(weights, version, layout))
        refused(folder, message)


# ---- bad files ----


class Code:
    """Unpickling this makes a folder, if it is allowed to."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", [True, False])
def test_code_in_a_folder_is_not_run(tmp_path: Path, form: bool, parts: int) -> None:
    weights, canary = weights_of("4"), tmp_path / "canary"
    folder = save_layout(tmp_path / "a", weights, "4", "rwkv_hf", parts=parts, container="pytorch_model.bin")
    last = sorted(folder.glob("*.bin"))[-1]
    held = torch.load(last, weights_only=True) | {"note": Code(canary)}
    torch.save(held, last, _use_new_zipfile_serialization=form)
    refused(folder, rf"in '{last.name}': .*pickled code \(posix.mkdir\).*refuses to run code")
    assert not canary.exists()
    torch.load(last, weights_only=False)
    assert canary.exists(), "the file does hold code"


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.bytearray", "os.system", "torch.load", "torch._utils._x"])
def test_a_pickle_gets_nothing_that_it_names(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    for pickled in (
        f"\x80\x02c{module}\n{attribute}\n(K\x01tR.".encode("latin1"),
        b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(attribute)])
        + attribute.encode() + b"\x93K\x01\x85R.",
    ):  # fmt: skip
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
        refused(tmp_path / "a.pth", f"pickled code \\({name}\\)")
        (tmp_path / "old.pth").write_bytes(pickled)
        refused(tmp_path / "old.pth", f"pickled code \\({name}\\)")


def archive_of(pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("a/data.pkl", pickled)
            for name, data in members.items():
                archive.writestr(f"a/{name}", data)

    return make


def deep(depth: int) -> bytes:
    return b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."


BAD_PTH: dict[str, tuple[Callable[[Path], object], str]] = {
    "compressed": (archive_of(b"\x80\x02}." + bytes(10**6), zipfile.ZIP_DEFLATED), "damaged.*is compressed"),
    "no end": (archive_of(b"\x80\x02}"), "damaged"),
    "no pickle": (archive_of(b""), "damaged"),
    "big-endian": (archive_of(b"\x80\x02}.", byteorder=b"big"), "damaged.*not little-endian"),
    "a list": (archive_of(b"\x80\x02]."), "a dict of tensors by name, found list"),
    "a key too deep to hash": (archive_of(deep(900_000)), "damaged.*other keys than names"),
    "a million opcodes": (archive_of(b"\x80\x02" + b"N" * (1 << 20)), "damaged.*a pickle without end"),
    "a pickle of megabytes": (archive_of(b"\x80\x02}." + bytes(1 << 22)), "damaged.*bytes of directory or pickle"),
    "a hundred thousand members": (
        archive_of(b"\x80\x02}.", **{f"data/{i:030}": b"" for i in range(60_000)}),
        "damaged.*bytes of directory or pickle",
    ),
    "a memo of gigabytes": (archive_of(b"\x80\x02}r\xff\xff\xff\x7f."), "nothing"),
    "a string of gigabytes": (archive_of(b"\x80\x02}X\xff\xff\xff\x7fabc."), "damaged"),
    "old, cut": (
        lambda path: (
            torch.save(weights_of("4"), path, _use_new_zipfile_serialization=False),
            path.write_bytes(path.read_bytes()[:-8]),
        ),
        "damaged.*ends behind its storage or the file",
    ),
    "integers": (lambda path: torch.save({"emb.weight": torch.zeros(3, 3).int()}, path), "'emb.weight' in int32"),
    "doubles": (lambda path: torch.save({"emb.weight": torch.zeros(3, 3).double()}, path), "'emb.weight' in float64"),
}


@pytest.mark.parametrize("kind", BAD_PTH)
def test_bad_pth_files(tmp_path: Path, kind: str) -> None:
    make, message = BAD_PTH[kind]
    make(tmp_path / "a.pth")
    refused(tmp_path / "a.pth", message)


@dataclass(frozen=True)
class Storage:
    """What torch would pickle as a storage of so many elements."""

    length: int
    kind: str = "FloatStorage"


class Stored:
    """What torch would pickle as a tensor with these arguments."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, (*self.arguments, False, {})


class Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        if isinstance(value, Storage):
            return "storage", getattr(torch, value.kind), "0", "cpu", value.length
        return None


NUMBERED = torch.arange(16.0)


def archive_with(tensor: Stored) -> bytes:
    """An archive of that tensor as `emb.weight`, and of a storage of 16 fp32 numbers."""
    pickled, archive = io.BytesIO(), io.BytesIO()
    Pickler(pickled, protocol=2).dump({"emb.weight": tensor})
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a/data.pkl", pickled.getvalue())
        members.writestr("a/data/0", NUMBERED.numpy().tobytes())
    return archive.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (16,), (1,)),
        (3, (2, 5), (6, 1)),
        (15, (), ()),
        (0, (4, 4), (1, 4)),
        (99, (3, 0), (1, 1)),
        (5, (3, 2), (0, 0)),
    ],
)
def test_a_tensor_is_what_its_file_says(
    tmp_path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(archive_with(Stored(Storage(16), offset, shape, strides)))
    found = containers.open_container(path).sources["emb.weight"].read()
    expected = NUMBERED.as_strided(shape, strides, offset) if 0 not in shape else torch.empty(shape)
    assert found.is_contiguous() and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("length", "offset", "shape", "strides", "message"),
    [
        (16, 0, (17,), (1,), "a tensor that ends behind its storage"),
        (16, 1, (16,), (1,), "a tensor that ends behind its storage"),
        (16, 16, (), (), "a tensor that ends behind its storage"),
        (16, 0, (2, 2), (15, 1), "a tensor that ends behind its storage"),
        (17, 0, (17,), (1,), "'emb.weight' ends behind its storage or the file"),
        (2**62, 0, (2**60,), (1,), "'emb.weight' ends behind its storage or the file"),
        (16, -1, (2,), (1,), "a length that is none"),
        (16, 4, (2,), (-1,), "a length that is none"),
        (16, 0, (2.0,), (1,), "a length that is none"),
        (16, 0, (2**63,), (0,), "a length that is none"),
        (-16, 0, (1,), (1,), "a length that is none"),
        (16, 0, (2, 2), (1,), "a tensor without storage or shape"),
        (16, 0, (1,) * 9, (1,) * 9, "a tensor without storage or shape"),
        (16, 0, (2**40,), (0,), "expected tensors of at most"),
    ],
)
def test_a_tensor_lies_inside_its_storage(
    tmp_path: Path, length: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], message: str
) -> None:
    (tmp_path / "a.pth").write_bytes(archive_with(Stored(Storage(length), offset, shape, strides)))
    refused(tmp_path / "a.pth", message)


def test_wrong_dtypes_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"emb.weight": torch.zeros(3, 3).to(torch.float8_e4m3fn)}, path)
    refused(path, "expected tensors in fp32, bf16, fp16, found 'emb.weight' in F8_E4M3")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is a directory without 'config.json'"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object, found: a list"),
    "config in part": (lambda folder: (folder / "config.json").write_text('{"a": '), "'config.json' as a JSON object"),
    "config too deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "'config.json' as a JSON obj"),
    "config of numbers": (lambda folder: (folder / "config.json").write_text("9" * 10**5), "'config.json' as a JSON"),
    "config that is long": (lambda folder: (folder / "config.json").write_text(" " * (1 << 24) + "{}"), "longer than"),
    "no index": (lambda folder: next(folder.glob("*.index.json")).unlink(), "or an index of their parts.* found none"),
    "a part missing": (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), "'model-00002-of-00003.s"),
    "a part cut": (
        lambda folder: (path := sorted(folder.glob("*.saf*"))[0]).write_bytes(path.read_bytes()[:-9]),
        "in 'model-00001-of-00003.safetensors': expected a whole safetensors file, found a damaged one",
    ),
    "a part of text": (lambda folder: sorted(folder.glob("*.saf*"))[0].write_text("x" * 99), "00001.*another kind"),
    "a part twice": (
        lambda folder: shutil.copy(*sorted(folder.glob("*.safetensors"))[:2]),
        "as 'model.safetensors.index.json' says, found .* missing",
    ),
    "a tensor in two parts": (
        lambda folder: add_tensor(sorted(folder.glob("*.safetensors"))[1], "head.weight", torch.zeros(3)),
        "each tensor in one part, found 'head.weight' again",
    ),
    "an empty index": (lambda folder: edit_index(folder, lambda index: index.clear()), "expected a 'weight_map'"),
    "an index of a list": (
        lambda folder: edit_index(folder, lambda index: index.update(weight_map=["a"])),
        "expected a 'weight_map'",
    ),
}  # fmt: skip


def add_tensor(path: Path, name: str, tensor: Tensor) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {name: tensor}, path)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_layout(tmp_path_factory.mktemp("sharded") / "model", weights_of("4"), "4", "rwkv_hf", parts=3)


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, sharded: Path, kind: str) -> None:
    make, message = BAD_FOLDERS[kind]
    folder = Path(shutil.copytree(sharded, tmp_path / "a"))
    make(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    "name", ["../b/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0b", 3]
)
def test_an_index_may_not_name_files_elsewhere(tmp_path: Path, sharded: Path, name: object) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "a"))
    for elsewhere in (tmp_path / "b", folder / "sub"):
        elsewhere.mkdir()
        shutil.copy(next(folder.glob("*.safetensors")), elsewhere / "model.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update({"head.weight": name}))
    refused(folder, "name files of its own folder, found|that 'model.safetensors.index.json' names, found none")


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model file, found"):
        checkpoint.read(str(tmp_path / "a\0b"))


# ---- the fingerprint ----


def test_the_version_is_in_the_fingerprint(tmp_path: Path) -> None:
    weights = weights_of("6")
    path = save(weights, tmp_path / "a.pth")
    digest = hashlib.sha256()
    for name, tensor in sorted(canonical(weights).items()):
        digest.update(f"{name} fp32 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    lines = ("rwkv-stream model 1", digest.hexdigest(), "bytes", "version 6")
    assert fingerprint(path) == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def test_the_digest_of_a_folder_is_remembered_until_one_of_its_files_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hashed: list[int] = []
    digest = checkpoint.tensors_digest
    monkeypatch.setattr(checkpoint, "tensors_digest", lambda tensors: hashed.append(len(tensors)) or digest(tensors))
    folder = save_layout(tmp_path / "a", weights_of("7"), "7", "fla_7", parts=2)
    for file in folder.iterdir():
        os.utime(file, (10**9, 10**9))
    first = fingerprint(folder)
    assert (fingerprint(folder), len(hashed)) == (first, 1)
    for i, file in enumerate(sorted(folder.iterdir())):
        os.utime(file, (10**9, 10**9 + 1))
        assert (fingerprint(folder), len(hashed)) == (first, 2 + i)


def test_a_part_that_changes_while_it_is_read(tmp_path: Path) -> None:
    folder = save_layout(tmp_path / "a", weights_of("7"), "7", "fla_7", parts=2)
    for change in (lambda file: os.utime(file, (10**9, 10**9)), lambda file: file.unlink()):
        found = checkpoint.read(folder)
        change(next(folder.glob("model-00002*")))
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            checkpoint.fingerprint(found, "bytes")


# ---- the reference files ----

REAL = {  # file → version
    "rwkv4-tiny.pth": "4",
    "rwkv5.0-tiny.pth": "5.0",
    "rwkv5.2-tiny.pth": "5.2",
    "rwkv6-tiny.pth": "6",
    "rwkv7-tiny.pth": "7",
    "synth/synth-4.pth": "4",
    "synth/synth-5.0.pth": "5.0",
    "synth/synth-5.1.pth": "5.1",
    "synth/synth-5.2.pth": "5.2",
    "synth/synth-6.pth": "6",
    "synth/synth-7.0.pth": "7",
    "synth/synth-7a.pth": "7a",
}


@pytest.mark.parametrize("name", REAL)
def test_reference_files(tiny_rwkv: Path, name: str) -> None:
    path = tiny_rwkv / name
    assert checkpoint.read(path).config.version == REAL[name]
    stored = torch.load(path, weights_only=True)
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    expected = {name: tensor for name, tensor in stored.items() if name not in unused}
    dtype = expected["emb.weight"].dtype
    same(path, canonical(expected, dtype))


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7.0"])
def test_reference_folders(tiny_rwkv: Path, version: str) -> None:
    folder, file = tiny_rwkv / "synth" / f"hf-synth-{version}", tiny_rwkv / "synth" / f"synth-{version}.pth"
    assert fingerprint(folder) == fingerprint(file)
    one, other = checkpoint.read(folder), checkpoint.read(file)
    assert one.config == other.config
    for name, source in one.tensors.items():
        assert torch.equal(source.read(), other.tensors[name].read())


# ---- made-up headers ----

MEMORY_BYTES = 1 << 26
NUMBERS = (-1, 0, 1, 2, 3, 63, 64, 65, 255, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**200)
WORDS = ("", "x", "../x", "a\0b", "F32", "F64", "I8", "BF16", "F8_E4M3", "emb.weight", "x" * 5000, "\u202e")


def mutated(rng: random.Random, data: bytes, end: int) -> bytes:
    """One to three changes that know nothing of the format, within the first `end` bytes."""
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(max(1, min(end, len(data)))), rng.choice([1, 1, 2, 4, 8, 32])
        match rng.randrange(6):
            case 0:
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data
            case 1:
                data = data[:at] + rng.randbytes(n) + data[at:]
            case 2:
                data = data[:at] + data[at + n :]
            case 3:
                data = data[:at] + rng.choice([b"\xff", b"\0", b"\x7f"]) * n + data[at + n :]
            case 4:
                other = rng.randrange(max(1, min(end, len(data))))
                data = data[:at] + data[other : other + n] + data[at:]
            case 5:
                data = (
                    data[:at] + struct.pack("<Q", rng.choice(NUMBERS) % 2**64)[: rng.choice([1, 4, 8])] + data[at + 8 :]
                )
    return data


def changed(rng: random.Random, values: Any) -> Any:
    """JSON with one to three values of any depth replaced, taken away or added."""
    for _ in range(rng.randint(1, 3)):
        place = values
        while isinstance(place, dict | list) and place:
            key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                continue
            match rng.randrange(5):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[rng.choice(WORDS)] = place[key]
                case 1:
                    place.append(place[key])
                case 2:
                    place[key] = rng.choice(WORDS)
                case 3:
                    place[key] = rng.choice([None, True, 1.5, [], {}, [[]], [1] * 100, {"a": 1}])
                case _:
                    place[key] = rng.choice(NUMBERS)
            break
    return values


def made_up_safetensors(rng: random.Random, whole: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", whole)
    if rng.random() < 0.4:
        return mutated(rng, whole, rng.choice([8, 8 + length]))
    header = json.dumps(changed(rng, json.loads(whole[8 : 8 + length])), ensure_ascii=rng.random() < 0.5).encode()
    claimed = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", claimed) + header + whole[8 + length :]


def made_up_zip(rng: random.Random, whole: bytes, scratch: Path) -> bytes:
    match rng.randrange(5):
        case 0:
            storage = Storage(rng.choice([0, 1, 3, 16, *NUMBERS]), rng.choice(["FloatStorage", "BFloat16Storage"]))
            axes = rng.choice([0, 1, 2, 3, 3, 9])
            shape, strides = (tuple(rng.choice([0, 1, 1, 2, 3, *NUMBERS]) for _ in range(axes)) for _ in range(2))
            return archive_with(Stored(storage, rng.choice([0, 1, *NUMBERS]), shape, strides))
        case 1:  # the directory at its end
            start = whole.index(b"PK\x01\x02")
            return whole[:start] + mutated(rng, whole[start:], len(whole) - start)
        case 2:
            return mutated(rng, whole, 2000)
        case _:  # the pickle, in an archive that is whole
            scratch.write_bytes(whole)
            made = scratch.with_suffix(".made")
            with zipfile.ZipFile(scratch) as old, zipfile.ZipFile(made, "w") as new:
                for member in old.infolist():
                    data = old.read(member)
                    if member.filename.endswith("data.pkl"):
                        data = mutated(rng, data, len(data))
                    elif rng.random() < 0.02:
                        data = data[: rng.randrange(1 + len(data))]
                    new.writestr(member.filename, data)
            return made.read_bytes()


def made_up_legacy(rng: random.Random, whole: bytes) -> bytes:
    return mutated(rng, whole, rng.choice([400, 8000, len(whole)]))  # most of the second are the pickles


def made_up_folder(rng: random.Random, folder: Path) -> None:
    files = sorted(folder.iterdir())
    path = rng.choice([file for file in files if file.suffix == ".json"] * 3 + files)
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        path.write_bytes(made_up_safetensors(rng, data))
    elif rng.random() < 0.3:
        path.write_bytes(mutated(rng, data, len(data)))
    else:
        path.write_text(json.dumps(changed(rng, json.loads(data))))


def lies_inside(path: Path) -> None:
    """Opens with all of its tensors inside the file, or is refused, as a model too; nothing else."""
    try:
        opened = containers.open_container(path)
        size = sum(file.stat().st_size for file in opened.files)
        assert sum(source.nbytes for source in opened.sources.values()) <= size
        for source in opened.sources.values():
            tensor = source.read()
            assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (source.shape, source.dtype, True)
        checkpoint.tensors_digest(checkpoint.read(path).tensors)
    except CheckpointError as error:
        assert len(str(error)) < 3000, "no error is as long as the file"


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "folder"])
def test_made_up_headers(request: pytest.FixtureRequest, tmp_path: Path, sharded: Path, kind: str) -> None:
    weights = official_weights(version="4", n_layer=1, n_embd=8, head_size=8, vocab_size=16, d_ffn=16)
    torch.save(weights, tmp_path / "zip")
    torch.save(weights, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, tmp_path / "safetensors")
    small = save_layout(tmp_path / "folder", weights, "4", "rwkv_hf", parts=2)
    before = {path: path.read_bytes() for path in [*tmp_path.glob("[zls]*"), *small.iterdir()]}
    n = 2500 if request.config.getoption("--all-moments") else 250

    def case(rng: random.Random) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
            path = Path(scratch) / "model"
            if kind == "folder":
                shutil.copytree(small, path)
                made_up_folder(rng, path)
            else:
                whole = before[tmp_path / kind]
                if kind == "safetensors":
                    path.write_bytes(made_up_safetensors(rng, whole))
                elif kind == "zip":
                    path.write_bytes(made_up_zip(rng, whole, Path(scratch) / "whole"))
                else:
                    path.write_bytes(made_up_legacy(rng, whole))
            lies_inside(path)

    for path in (tmp_path / "safetensors", tmp_path / "zip", tmp_path / "legacy", small):
        assert checkpoint.read(path).config.version == "4", "they are whole before they are changed"
    cases(case, n, MEMORY_BYTES)
    assert {path: path.read_bytes() for path in before} == before


# ---- memory ----

LOADS = """
import json, os, re, sys, torch, rwkv_stream as rs

def mib(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

small, *cases = sys.argv[1:]
for case in cases:
    path, options = json.loads(case)
    if os.fork() == 0:
        rs.load(small, tokenizer="bytes", **options)  # imports, pages of libraries, what allocators keep
        before = mib("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        model = rs.load(path, tokenizer="bytes", **options)
        print(mib("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory")
def test_loading_takes_little_more_than_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its peak, with the pages of the file: one layer stands in memory twice, the file is not mapped as a whole."""
    weights = official_weights(version="7", n_layer=32, n_embd=256, d_ffn=1024)
    small = save(weights_of("7"), tmp_path / "small.safetensors")
    paths = [save(weights, tmp_path / f"model.{suffix}", torch.bfloat16) for suffix in ("pth", "safetensors")]
    bytes_a_weight = {"fp32": 4, "bf16": 2, "int8": 1.1, "reference": 4}
    kinds = [{"dtype": "fp32"}, {"dtype": "bf16"}, {"weights": "int8"}, {"backend": "reference"}]
    cases = [(str(path), options) for path in paths for options in kinds]
    monkeypatch.setenv("XDG_CACHE_HOME", str(small))  # no fingerprint is remembered there: each load hashes its file
    child = [sys.executable, "-c", LOADS, str(small), *map(json.dumps, cases)]
    ran = subprocess.run(child, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    n_weights = sum(tensor.numel() for tensor in weights.values()) / 2**20
    for (path, options), took in zip(cases, ran.stdout.split(), strict=True):
        [kind] = options.values()
        in_memory = n_weights * bytes_a_weight[kind]
        assert in_memory > 25
        assert float(took) < 1.15 * in_memory + 20, (path, kind)
