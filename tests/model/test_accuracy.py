"""Every version, from every container, in every dtype and form, against known logits; the table of docs/accuracy.md.

    pytest tests/model/test_accuracy.py --write-accuracy

writes the table anew from what it measures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from forms import recurrence
from reference_numpy import Reference
from tiny_models import save, save_any_tokenizer
from torch import Tensor

from rwkv_stream.kernels import available
from rwkv_stream.model import Model, load
from rwkv_stream.model.dtypes import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs" / "accuracy.md"
READ, ONE_BY_ONE = 70, 24  # tokens: beyond a block, and of those in calls of one; all of them for the table
LIMIT = 1e-4  # of a logit, in fp32
QUANTISED_LIMIT = 0.08  # what five bits of a weight make of logits that were computed from whole weights

FILES = {  # file → version, container, known outputs
    **{
        f"rwkv{v}-tiny.pth": (v, "official .pth", f"rwkv{v}-tiny.npz") for v in ("4", "5.0", "5.2", "6", "7")
    },
    "tiny-rwkv-4v0-660K-FP32.bin": ("4", "rwkv.cpp", "expected-logits-4v0-660K.bin"),
    "tiny-rwkv-5v1-730K-FP32.bin": ("5.0", "rwkv.cpp", "expected-logits-5v1-730K.bin"),
    "tiny-rwkv-5v2-730K-FP32.bin": ("5.2", "rwkv.cpp", "expected-logits-5v2-730K.bin"),
    "tiny-rwkv-6v0-3m-Q5_1.bin": ("6", "rwkv.cpp Q5_1", "expected-logits-6v0-3m.bin"),
    "tiny-rwkv-7v0-834K-FP32.bin": ("7", "rwkv.cpp", "expected-logits-7v0-834K.bin"),
    **{
        f"synth/synth-{v}.pth": (v.replace("7.0", "7"), "official .pth", f"synth/synth-{v}.npz")
        for v in ("4", "5.0", "5.1", "5.2", "6", "7.0", "7a")
    },
    **{
        f"synth/hf-synth-{v}": (v.replace("7.0", "7"), "Hugging Face", f"synth/synth-{v}.npz")
        for v in ("4", "5.2", "6", "7.0")
    },
    "synth/synth-rwkv6.gguf": ("6", "GGUF", "synth/synth-6.npz"),
    "synth/synth-rwkv7.gguf": ("7", "GGUF", "synth/synth-7.0.npz"),
    **{
        f"synth/synth-{v}.pth as safetensors": (v.replace("7.0", "7"), "safetensors", f"synth/synth-{v}.npz")
        for v in ("4", "5.0", "5.1", "5.2", "6", "7.0", "7a")
    },
}  # fmt: skip


HEAD = """# Accuracy

The largest difference of a logit to outputs of other people's programs on the same weights: BlinkDL's `rwkv` package in
fp32 (96 to 197 tokens), and rwkv.cpp's own logits of three tokens for its files. Each checkpoint is read token by token
(recurrent), in one call of blocks (chunk), in one call of the C++ kernel, in calls of 48, 1 and the rest, and as the
longest of a batch of three rows of unequal length. fp32 may differ by 1e-4, 16 bits, in the mean, by twice what code
that keeps everything in 16 bits differs. A v5 file of rwkv.cpp has a GroupNorm eps of 1e-5, as that program has, any
other 64e-5. The known logits of the Q5_1 file are those of its weights before they were quantised.

Made by `pytest tests/model/test_accuracy.py --write-accuracy`.
"""


class Measured(NamedTuple):
    version: str
    container: str
    file: str
    dtype: str
    differences: dict[str, float]  # form → the largest of a logit's


MEASURED: list[Measured] = []


@pytest.fixture(autouse=True, scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    MEASURED.clear()
    yield
    if request.config.getoption("--write-accuracy"):
        assert len(MEASURED) == len(FILES) * len(DTYPES), "not all was measured; the table is left as it was"
        DOCS.write_text(written(MEASURED))


def token_by_token(model: Model, tokens: Tensor) -> Tensor:
    return in_calls(model, tokens, [1] * len(tokens))


def in_calls(model: Model, tokens: Tensor, lengths: list[int]) -> Tensor:
    """Logits [T, V], read in calls of these lengths."""
    parts, state = [], None
    for part in tokens.split(lengths):
        logits, state = model.forward(part[None], state, logits="all")
        parts.append(logits[0])
    return torch.cat(parts)


def split(model: Model, tokens: Tensor) -> Tensor:
    T = len(tokens)
    return in_calls(model, tokens, [48, 1, T - 49] if T > 49 else [1] * T)


def in_a_batch(model: Model, tokens: Tensor) -> Tensor:
    """As the longest row of three."""
    T = len(tokens)
    rows = torch.stack([tokens.flip(0), tokens, tokens.roll(1)])
    lengths = torch.tensor([max(1, T // 2), T, max(1, T // 3)])
    return model.forward(rows, logits="all", lengths=lengths)[0][1]


def at_once(model: Model, tokens: Tensor) -> Tensor:
    return in_calls(model, tokens, [len(tokens)])


def in_form(model: Model, form: str) -> Model:
    return dataclasses.replace(model, wkv=recurrence(model.config.version, form), backend=form)


FORMS = {  # column → backend that the model is loaded for, and how it reads
    "recurrent": ("reference", lambda model, tokens: token_by_token(in_form(model, "recurrent"), tokens)),
    "chunk": ("reference", lambda model, tokens: at_once(in_form(model, "chunked"), tokens)),
    "C++": ("cpu", at_once),
    "48+1+rest": ("auto", split),
    "batch of 3": ("auto", in_a_batch),
}


def opened(folder: Path, file: str, dtype: str, work: Path) -> tuple[dict[str, Model], np.ndarray, Tensor]:
    """The model for each backend that is here, the logits that are known [T, V] or [1, V] of the last token, and the
    tokens [T]."""
    version, container, known = FILES[file]
    path = folder / file.removesuffix(" as safetensors")
    if container == "safetensors":
        path = save(torch.load(path, weights_only=True), work / "model.safetensors", dtype_of(path))
    if known.endswith(".npz"):
        data = np.load(folder / known)
        logits, tokens = data["logits"], torch.from_numpy(data["tokens"]).long()
    else:
        logits, tokens = np.fromfile(folder / known, "<f4")[None], torch.tensor([34, 105, 110])
    tokenizer = save_any_tokenizer(work / "tokens.json", logits.shape[1])
    backends = [name for name in ("reference", "cpu", "auto") if name != "cpu" or available()["cpu"] is None]
    models = {name: load(path, device="cpu", dtype=dtype, tokenizer=tokenizer, backend=name) for name in backends}
    assert {model.config.version for model in models.values()} == {version}
    return models, logits, tokens


def dtype_of(path: Path) -> torch.dtype:
    return torch.load(path, weights_only=True)["head.weight"].dtype


@pytest.mark.parametrize("file", FILES)
def test_logits_are_the_known_ones(tiny_rwkv: Path, file: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """fp32 within 1e-4; 16 bits at most twice as far off, in the mean, as code that keeps everything in 16 bits."""
    version, container, _ = FILES[file]
    for dtype in DTYPES:
        models, known, tokens = opened(tiny_rwkv, file, dtype, tmp_path)
        n_read = dict.fromkeys(FORMS, READ) | {"recurrent": ONE_BY_ONE}
        if request.config.getoption("--write-accuracy"):
            n_read = dict.fromkeys(FORMS, len(tokens))
        errors = {
            name: error_of(form(models[backend], tokens[: n_read[name]]).double().numpy(), known)
            for name, (backend, form) in FORMS.items()
            if backend in models
        }
        differences = {name: float(np.abs(error).max()) for name, error in errors.items()}
        MEASURED.append(
            Measured(version, container, Path(file).name.removesuffix(" as safetensors"), dtype, differences)
        )
        if dtype == "fp32":
            assert max(differences.values()) <= (QUANTISED_LIMIT if "Q5_1" in container else LIMIT), differences
        elif container == "official .pth":
            weights = {name: z.double().numpy() for name, z in torch.load(tiny_rwkv / file, weights_only=True).items()}
            plain_code = Reference(weights, version, rounded=rounding(DTYPES[dtype]))
            plain = error_of(plain_code(tokens[: max(n_read.values())].tolist())[1], known)
            for name, error in errors.items():
                assert rms(error) <= 2 * rms(plain[: len(error)]) + 1e-5, (name, dtype)
        else:  # the file of another container holds the same weights, so it gives the same
            assert all(rms(error) < 0.05 * np.abs(known).max() for error in errors.values()), dtype


def error_of(logits: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Logits [n, V] of the first tokens, against those that are known [T, V], or [1, V] of the last one."""
    return logits[-len(known) :] - known[: len(logits)]


def rounding(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(dtype).double().numpy()


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def written(measured: list[Measured]) -> str:
    forms = list(FORMS)
    lines = [HEAD, "| version | container | checkpoint | dtype | " + " | ".join(forms) + " |"]
    lines.append("|---|---|---|---|" + "---:|" * len(forms))
    for row in sorted(measured, key=lambda row: (row.version, row.container, row.file, list(DTYPES).index(row.dtype))):
        cells = [row.version, row.container, f"`{row.file}`", row.dtype]
        cells += [f"{row.differences[form]:.1e}" if form in row.differences else "-" for form in forms]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
