"""Conversion: the same model in one safetensors file, byte-stable, gone on with where it was stopped, or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_snapshots import in_child
from gguf_files import gguf_keys, gguf_tensors, write_gguf
from hf_layouts import OF_VERSION, save_layout
from kills import killed
from tiny_models import VERSIONS, official_weights, save, save_own_tokenizer

from rwkv_stream.errors import CheckpointError, OutputError, UsageError
from rwkv_stream.files import FAILPOINT_VARIABLE, TEMP_PREFIX
from rwkv_stream.kernels.layers.cpu import Weight
from rwkv_stream.model import load
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.model.checkpoints.convert import FAILPOINTS, convert
from rwkv_stream.model.checkpoints.sources import Source
from rwkv_stream.model.dtypes import DTYPE_NAMES


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    return save(official_weights(), tmp_path / "model.pth")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.safetensors"


@pytest.fixture(autouse=True)
def folder_of_out(out: Path) -> None:
    out.parent.mkdir()


def strays(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(TEMP_PREFIX)]


def fingerprint(path: Path) -> str:
    return checkpoint.fingerprint(checkpoint.read(path), "any")


@pytest.mark.parametrize("container", ["pth", "hf", "gguf"])
@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_the_same_model(version: str, container: str, tmp_path: Path, out: Path) -> None:
    weights = official_weights(version=version, seed=3)
    if container == "pth":
        source = save(weights, tmp_path / "a.pth", torch.bfloat16)
    elif container == "hf":
        if version not in OF_VERSION:
            pytest.skip(f"no Hugging Face layout for {version}")
        source = save_layout(tmp_path / "folder", weights, version, OF_VERSION[version][-1])
    else:
        if version not in ("6", "7"):
            pytest.skip(f"no GGUF for {version}")
        pytest.importorskip("gguf", reason="the package `gguf` is not installed (extra `gguf`)")
        source = write_gguf(tmp_path / "a.gguf", gguf_keys(weights), gguf_tensors(weights))
    done = convert(source, out)
    assert (done.path, done.size, done.resumed_from, done.tokenizer) == (out, out.stat().st_size, 0, None)
    assert fingerprint(out) == fingerprint(source)
    assert checkpoint.read(out).config == checkpoint.read(source).config
    tokens = torch.arange(1, 30)[None]
    (logits, _), (wanted, _) = (load(path, device="cpu").forward(tokens) for path in (out, source))
    assert torch.equal(logits, wanted)
    assert not strays(tmp_path)


def test_another_eps_is_kept(tmp_path: Path, out: Path) -> None:
    """Of RWKV-HF's `head_size_divisor`."""
    source = save_layout(
        tmp_path / "folder", official_weights(version="5.2"), "5.2", "rwkv_hf", config={"head_size_divisor": 4}
    )
    convert(source, out)
    assert checkpoint.read(out).config.group_norm_eps == checkpoint.read(source).config.group_norm_eps != 64e-5
    assert fingerprint(out) == fingerprint(source)


def test_the_bytes_depend_on_tensors_and_dtype_alone(pth: Path, tmp_path: Path, out: Path) -> None:
    convert(pth, out)
    (tmp_path / "elsewhere").mkdir()
    other = save(dict(reversed(official_weights().items())), tmp_path / "elsewhere" / "b.safetensors")
    convert(other, tmp_path / "elsewhere" / "out.safetensors")
    assert out.read_bytes() == (tmp_path / "elsewhere" / "out.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_in_another_dtype_it_is_what_loading_makes_of_it(pth: Path, out: Path, dtype: str) -> None:
    convert(pth, out, dtype=dtype)
    stored = {source.dtype for name, source in checkpoint.read(out).tensors.items() if name.endswith("key.weight")}
    assert [DTYPE_NAMES[kind] for kind in stored] == [dtype]
    loaded, wanted = load(out, device="cpu", dtype=dtype), load(pth, device="cpu", dtype=dtype)
    for block, wanted_block in zip(loaded.blocks, wanted.blocks, strict=True):
        for name, z in block.items():
            is_packed = isinstance(z, Weight)
            assert torch.equal(*((w.matrix() if is_packed else w) for w in (z, wanted_block[name]))), name
    assert (loaded.fingerprint == wanted.fingerprint) == (dtype == "fp32")


@pytest.mark.parametrize("failpoint", [*FAILPOINTS, "convert.tensor:7", "convert.tensor:40"])
def test_killed_and_run_again_it_goes_on(pth: Path, out: Path, tmp_path: Path, failpoint: str) -> None:
    whole = tmp_path / "whole.safetensors"
    convert(pth, whole)
    assert killed(in_child(lambda: convert(pth, out), **{FAILPOINT_VARIABLE: failpoint}))
    assert not out.exists()
    done = convert(pth, out)
    assert done.resumed_from > 0
    assert out.read_bytes() == whole.read_bytes()
    assert not strays(tmp_path)


def test_what_another_source_has_left_is_not_gone_on_with(pth: Path, out: Path, tmp_path: Path) -> None:
    assert killed(in_child(lambda: convert(pth, out), **{FAILPOINT_VARIABLE: "convert.tensor:9"}))
    save(official_weights(seed=5), pth)
    assert convert(pth, out).resumed_from == 0
    assert fingerprint(out) == fingerprint(pth)
    assert not strays(tmp_path)


def test_each_tensor_is_read_once(pth: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: watched(real(path), order))
    convert(pth, out)
    assert len(order) == len(set(order)) == len(checkpoint.read(pth).tensors)


def watched(file: checkpoint.Checkpoint, order: list[str]) -> checkpoint.Checkpoint:
    def wrapped(name: str, source: Source) -> Source:
        def read() -> torch.Tensor:
            order.append(name)
            return source.read()

        return Source(source.shape, source.dtype, read)

    return dataclasses.replace(file, tensors={name: wrapped(name, source) for name, source in file.tensors.items()})


def test_weights_that_do_not_fit_in_sixteen_bits(tmp_path: Path, out: Path) -> None:
    weights = official_weights()
    weights["blocks.1.ffn.key.weight"][3, 4] = 1e6
    source = save(weights, tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"found a larger one in 'blocks\.1\.ffn\.key\.weight'; pass --dtype bf16"):
        convert(source, out, dtype="fp16")
    assert [*out.parent.iterdir()] == []


def test_a_full_disk_is_told_and_gone_on_with(pth: Path, out: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(OutputError, match="make room and run the same command again"):
            convert(pth, out)

    assert not killed(in_child(limited))
    assert not out.exists()
    assert convert(pth, out).resumed_from > 50_000
    assert fingerprint(out) == fingerprint(pth)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


REFUSED: dict[str, tuple[Callable[[Path, Path], object], type[Exception], str]] = {
    "a file that is there": (
        lambda pth, out: put(out, b"mine") or convert(pth, out),
        OutputError,
        "found one; remove it",
    ),
    "another suffix": (lambda pth, out: convert(pth, out.with_suffix(".pth")), UsageError, "ends in .safetensors"),
    "another dtype": (lambda pth, out: convert(pth, out, dtype="int8"), UsageError, "found 'int8'"),
    "no such folder": (lambda pth, out: convert(pth, out.parent / "no" / out.name), OutputError, "no such file"),
    "no model": (lambda pth, out: put(pth, b"words") or convert(pth, out), CheckpointError, "another kind of file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(pth: Path, out: Path, kind: str) -> None:
    work, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        work(pth, out)
    assert [path.name for path in out.parent.iterdir()] == (["model.safetensors"] if out.exists() else [])
    assert not out.exists() or out.read_bytes() == b"mine"


def test_its_own_tokenizer_goes_with_it(tmp_path: Path, out: Path) -> None:
    source = save(official_weights(vocab_size=384), tmp_path / "model.pth")
    tokenizer = save_own_tokenizer(tmp_path / "tokenizer.json", 384)
    done = convert(source, out)
    assert done.tokenizer == out.with_name("tokenizer.json")
    assert done.tokenizer.read_bytes() == tokenizer.read_bytes()
    assert load(out, device="cpu").fingerprint == load(source, device="cpu").fingerprint
    out.unlink()
    done.tokenizer.write_text("{}")
    with pytest.raises(OutputError, match=r"expected no 'tokenizer\.json' of another model beside it"):
        convert(source, out)
    assert os.listdir(out.parent) == ["tokenizer.json"]  # noqa: PTH208


def too_large(pth: Path, out: Path) -> None:
    weights = official_weights(vocab_size=384)
    weights["blocks.1.ffn.key.weight"][3, 4] = 1e6
    save(weights, pth)
    convert(pth, out, dtype="fp16")


def changed_meanwhile(pth: Path, out: Path) -> None:
    convert(pth, out, progress=lambda done, size: os.utime(pth, ns=(done, done)))


def ended_by_a_full_disk(pth: Path, out: Path) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        convert(pth, out)


@pytest.mark.parametrize("there", ["none", "the same"])
@pytest.mark.parametrize(
    ("refused", "error"),
    [(too_large, UsageError), (changed_meanwhile, CheckpointError), (ended_by_a_full_disk, OutputError)],
)
def test_what_is_refused_late_leaves_the_tokenizers_as_they_were(
    tmp_path: Path, out: Path, refused: Callable[[Path, Path], None], error: type[Exception], there: str
) -> None:
    pth = save(official_weights(vocab_size=384), tmp_path / "model.pth")
    data = save_own_tokenizer(tmp_path / "tokenizer.json", 384).read_bytes()
    tokenizer = out.with_name("tokenizer.json")
    if there == "the same":
        tokenizer.write_bytes(data)
    with pytest.raises(error):
        refused(pth, out)
    left = {path.name: path.read_bytes() for path in out.parent.iterdir() if path not in strays(out.parent)}
    assert left == ({"tokenizer.json": data} if there == "the same" else {})
    assert bool(strays(out.parent)) == (refused is ended_by_a_full_disk), "what can be gone on with"


def test_a_tokenizer_that_came_meanwhile_is_not_replaced(tmp_path: Path, out: Path) -> None:
    pth = save(official_weights(vocab_size=384), tmp_path / "model.pth")
    save_own_tokenizer(tmp_path / "tokenizer.json", 384)
    tokenizer = out.with_name("tokenizer.json")
    with pytest.raises(OutputError, match=r"expected no 'tokenizer\.json' of another model beside it"):
        convert(pth, out, progress=lambda done, size: put(tokenizer, b"{}"))
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == {"tokenizer.json": b"{}"}
