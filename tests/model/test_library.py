"""The models folder, and bringing models into it from a hub: resumed, checked, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, serving
from tiny_models import official_weights, save, save_own_tokenizer

from rwkv_stream.errors import CheckpointError, UsageError
from rwkv_stream.files import TEMP_PREFIX
from rwkv_stream.model import load
from rwkv_stream.model.checkpoints import library

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra `hub`)")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv(library.VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(official_weights(n_layer=1), tmp_path_factory.mktemp("weights") / "model.safetensors").read_bytes()


@pytest.fixture
def hub(weights: bytes) -> Iterator[Hub]:
    with serving(Hub("owner/small", {"README.md": b"# Small", "small.pth": weights})) as served:
        yield served


def program(hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its settings when it is imported. It writes 10 MB at a time."""
    code = (
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 4096; from rwkv_stream.cli import main; main()"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, "model", *arguments],
        env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def strays(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(TEMP_PREFIX)]


# ---- names ----


def test_a_name_is_a_file_without_its_suffix_or_a_folder(models: Path, weights: bytes) -> None:
    (models / "own").mkdir(parents=True)
    for path in (models / "small.safetensors", models / "own" / "model.safetensors", models / ".hidden.pth"):
        path.write_bytes(weights)
    assert [name for name, _ in library.models()] == ["own", "small"]
    assert library.find("small") == library.find("small.safetensors") == models / "small.safetensors"
    assert library.find("own") == models / "own" / "model.safetensors"
    assert load(library.find("small"), device="cpu").config.n_layer == 1
    with pytest.raises(CheckpointError, match=r"found neither; there are: 'own', 'small'"):
        library.find("other")
    (models / "small.pth").write_bytes(weights)
    with pytest.raises(UsageError, match=r"small\.pth.*small\.safetensors"):
        library.find("small")
    assert library.find("small.pth") == models / "small.pth"


def test_a_path_goes_before_a_name(
    models: Path, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.mkdir()
    (models / "small.pth").write_bytes(weights)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.pth").write_bytes(weights)
    assert library.find("small.pth") == Path("small.pth")
    assert library.find("no/such.pth") == Path("no/such.pth")  # reading it says what is wrong


def test_without_a_folder_there_are_no_models(models: Path) -> None:
    assert library.models() == []
    with pytest.raises(CheckpointError, match="none at all"):
        library.find("small")


# ---- from a hub ----


def test_a_repository_with_one_model(models: Path, hub: Hub, weights: bytes) -> None:
    ended = program(hub, "pull", "owner/small", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["path"] == str(models / "small.pth")
    assert (models / "small.pth").read_bytes() == weights
    assert strays(models) == []
    before = len(hub.asked)
    assert program(hub, "pull", "owner/small").returncode == 0
    assert not [path for method, path, _ in hub.asked[before:] if method == "GET" and "resolve" in path]
    (models / "small.pth").write_bytes(b"mine")
    ended = program(hub, "pull", "owner/small")
    assert ended.returncode == 1 and "expected no such file, or the same, found another" in ended.stderr
    assert (models / "small.pth").read_bytes() == b"mine"


def test_a_hugging_face_folder_with_its_tokenizer(models: Path, hub: Hub, weights: bytes, tmp_path: Path) -> None:
    tokenizer = save_own_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    shards = {f"model-0000{i}-of-00002.safetensors": weights + b"%d" % i for i in (1, 2)}
    hub.files |= {"config.json": b"{}", "tokenizer.json": tokenizer, **shards, "model.safetensors.index.json": b"{}"}
    ended = program(hub, "pull", "owner/small")
    assert ended.returncode == 0, ended.stderr
    names = {path.name for path in (models / "small").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}


def test_a_file_of_several_with_the_tokenizer_beside_it(models: Path, hub: Hub, weights: bytes, tmp_path: Path) -> None:
    hub.files |= {"large.pth": weights + b"x"}
    ended = program(hub, "pull", "owner/small")
    assert ended.returncode == 2 and "small.pth, large.pth" in ended.stderr and "--file" in ended.stderr
    assert program(hub, "pull", "owner/small", "--file", "large.pth").returncode == 0
    assert (models / "large.pth").read_bytes() == weights + b"x"
    hub.files["tokenizer.json"] = save_own_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    assert program(hub, "pull", "owner/small", "--file", "small.pth").returncode == 0
    assert {path.name for path in (models / "small").iterdir()} == {"small.pth", "tokenizer.json"}
    ended = program(hub, "pull", "owner/small", "--file", "README.md")
    assert ended.returncode == 2 and "found 'README.md'" in ended.stderr


def test_a_broken_download_goes_on_in_another_process(models: Path, hub: Hub, weights: bytes) -> None:
    hub.drop_after = 30_000
    ended = program(hub, "pull", "owner/small")
    assert ended.returncode == 1 and "run the same command again" in ended.stderr, ended.stderr
    assert not (models / "small.pth").exists()
    (partial,) = strays(models)
    kept = (models / partial).stat().st_size
    assert kept > 20_000
    hub.drop_after, hub.down, before = None, False, len(hub.asked)
    assert program(hub, "pull", "owner/small").returncode == 0
    (asked,) = [part for method, path, part in hub.asked[before:] if method == "GET" and path.endswith("small.pth")]
    assert asked == f"bytes={kept}-"
    assert (models / "small.pth").read_bytes() == weights
    assert strays(models) == []


def test_a_server_that_cannot_go_on_sends_all_again(models: Path, hub: Hub, weights: bytes) -> None:
    hub.drop_after = 30_000
    assert program(hub, "pull", "owner/small").returncode == 1
    hub.drop_after, hub.down, hub.deaf = None, False, True
    assert program(hub, "pull", "owner/small").returncode == 0
    assert (models / "small.pth").read_bytes() == weights


def test_other_bytes_than_the_hub_states_are_not_kept(models: Path, hub: Hub, weights: bytes) -> None:
    hub.corrupt = True
    ended = program(hub, "pull", "owner/small")
    assert ended.returncode == 1 and f"expected bytes of checksum {hub.etag('small.pth')}" in ended.stderr
    assert not (models / "small.pth").exists()
    assert program(hub, "pull", "owner/small").returncode == 0
    assert (models / "small.pth").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["owner/other"], {}, "expected a repository, found none"),
        (["owner/small", "--revision", "nope"], {}, "expected that revision, found none"),
        (["owner/small"], {"gated": True}, "accept its terms"),
        (["owner/small"], {"without_checksums": True}, "state size and checksum"),
        (["owner/small"], {"files": {"README.md": b"only words"}}, "found README.md"),
    ],
)
def test_what_the_hub_does_not_give(
    models: Path, hub: Hub, arguments: list[str], change: dict[str, object], message: str
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    ended = program(hub, "pull", *arguments)
    assert ended.returncode == 1 and message in ended.stderr, ended.stderr
    assert not models.exists() or not [*models.iterdir()]


def test_names_of_the_server_stay_inside_the_folder(models: Path, hub: Hub, weights: bytes, tmp_path: Path) -> None:
    hub.files = {"../../escaped.pth": weights}
    ended = program(hub, "pull", "owner/small")
    assert not (tmp_path / "escaped.pth").exists() and not (tmp_path.parent / "escaped.pth").exists()
    assert ended.returncode in (0, 1)
    assert set(tmp_path.rglob("*.pth")) <= {models / "escaped.pth"}


def test_a_file_in_a_subfolder(models: Path, hub: Hub, weights: bytes, tmp_path: Path) -> None:
    """It is named by its own name, and the tokenizer beside it there goes with it, not that of the repository."""
    hub.files |= {"sub/a.b.pth": weights, "tokenizer.json": b"{}"}
    ended = program(hub, "pull", "owner/small", "--file", "sub/a.b.pth")
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in models.iterdir()] == ["a.b.pth"]
    hub.files["sub/tokenizer.json"] = save_own_tokenizer(tmp_path / "tokenizer.json").read_bytes()
    (models / "a.b.pth").unlink()
    assert program(hub, "pull", "owner/small", "--file", "sub/a.b.pth").returncode == 0
    assert {path.name for path in (models / "a.b").iterdir()} == {"a.b.pth", "tokenizer.json"}


@pytest.mark.parametrize("file", ["", "..", ".pth", "..pth", "...pth", "sub/..pth", ".small.pth", "small.pth/", "sub/"])
def test_a_file_that_gives_no_name(models: Path, hub: Hub, weights: bytes, tmp_path: Path, file: str) -> None:
    before = {*tmp_path.iterdir()}
    beside = f"{file.rpartition('/')[0]}/tokenizer.json".removeprefix("/")
    hub.files |= {beside: b"{}"} | ({file: weights} if not file.endswith("/") else {})
    ended = program(hub, "pull", "owner/small", "--file", file)
    assert ended.returncode == 2 and f"found '{file}'" in ended.stderr, ended.stderr
    assert {*tmp_path.iterdir()} == before


def test_without_the_client_the_extra_is_named(models: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from rwkv_stream.cli import main\n"
        "sys.argv = ['rwkv-stream', 'model', 'pull', 'owner/small']; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1 and "pip install 'rwkv-stream[hub]'" in ended.stderr
