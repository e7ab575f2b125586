"""Tiny models for all tests, made here from a seed, and the way to the shared reference data where there is any."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; children inherit it

import pytest
import torch
from tiny_models import official_weights, save, save_own_tokenizer

from rwkv_stream.kernels import native
from rwkv_stream.model import Model, load

if "RWKV_STREAM_TEST_KERNELS" in os.environ:  # the folder of C++ kernels made in another way; see `make asan`
    native.where = lambda: Path(os.environ["RWKV_STREAM_TEST_KERNELS"]) / native.LIBRARY

SHARED = Path(__file__).parents[2] / "shared"


MEMORY = Path("/dev/shm")  # a file system without a disk, on Linux
ROOM = 4 << 30  # bytes that all tests together keep well under


def pytest_configure(config: pytest.Config) -> None:
    """Files of tests lie in memory where there is room: a sync, of which a store makes many, waits for no disk."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # pytest's variable for the root of its folders


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-moments", action="store_true", help="every kill, fault and made-up file, not the first few")
    parser.addoption("--write-accuracy", action="store_true", help="write the table of docs/accuracy.md anew")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes go by the name of their argument: what a compressor makes of them may hold the time, and processes that
    share the tests among them must find the same ones."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def folders_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the caches and stores of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        for variable in ("RWKV_STREAM_STORE", "RWKV_STREAM_MODEL"):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For a test that several processes, or its own calls of `set_num_threads`, would disturb."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bytes_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, one head, a token for each byte."""
    return save(official_weights(), tmp_path_factory.mktemp("bytes") / "bytes.safetensors")


@pytest.fixture(scope="session")
def other_bytes_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shape as `bytes_model_path`, with other weights."""
    return save(official_weights(seed=1), tmp_path_factory.mktemp("other") / "other.safetensors")


@pytest.fixture(scope="session")
def bpe_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, two heads, a BPE of our own kind in `tokenizer.json` beside it."""
    folder = tmp_path_factory.mktemp("bpe")
    save_own_tokenizer(folder / "tokenizer.json", vocab_size=384)
    return save(official_weights(n_embd=128, vocab_size=384, seed=2), folder / "bpe.pth")


@pytest.fixture(scope="session")
def bytes_model(bytes_model_path: Path) -> Model:
    return load(bytes_model_path, device="cpu")


@pytest.fixture(scope="session")
def bpe_model(bpe_model_path: Path) -> Model:
    return load(bpe_model_path, device="cpu")


@pytest.fixture(params=["bytes_model", "bpe_model"])
def model(request: pytest.FixtureRequest) -> Model:
    """Each of the two."""
    found: Model = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def program_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> Path:
    """The current folder, for the program in this process: a model and a store to be made are in the environment."""
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    monkeypatch.setenv("RWKV_STREAM_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # this process keeps its own
    return tmp_path


@pytest.fixture(scope="session")
def tiny_rwkv() -> Path:
    """The folder of small checkpoints with known outputs, which is no part of the repository."""
    folder = SHARED / "data" / "tiny-rwkv"
    if not folder.is_dir():
        pytest.skip(f"no reference data: '{folder}' is absent")
    return folder
