"""Heads: small networks over what a model makes of its tokens, each in a file beside the checkpoint.

    FOLDER/heads/vector-0123456789ab.safetensors    of the checkpoint in FOLDER whose fingerprint begins so

A file holds tensors, and in its metadata format, kind and its model's whole fingerprint. `training.heads` makes it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rwkv_stream.errors import InputError, MismatchError
from rwkv_stream.files import make_folder, publish
from rwkv_stream.kernels.layers.cpu import Weight
from rwkv_stream.model.model import Model
from rwkv_stream.model.network import linear

FORMAT = "1"
FOLDER = "heads"
ADVICE = "make it again with `rwkv-stream finetune --head vector`"
EPS = 1e-3  # added to the gates' sums, so that a text whose gates are all closed has a vector


@dataclass(frozen=True, slots=True, eq=False)
class VectorHead:
    """A vector of a text out of its tokens: their values, each weighed by gates that the token itself opens.

        vector = sum_t sigmoid(gate h_t) (value h_t) / (EPS + sum_t sigmoid(gate h_t))

    where each of K gates weighs D / K of the values: attention pooling without a query (Lin et al. 2017, arXiv
    1703.03130), of sigmoids, so that a vector is a quotient of two sums, which need no memory of the tokens.

    model   fingerprint of the model that it belongs to
    layers  h is the residual stream after so many layers, of mean 0 and variance 1
    value   fp32 [D, C]; gate fp32 [K, C]
    """

    model: str
    layers: int
    value: Tensor = field(repr=False)
    gate: Tensor = field(repr=False)

    @property
    def dimension(self) -> int:
        """D, the length of its vectors."""
        return len(self.value)

    @property
    def n_features(self) -> int:
        """D + K, numbers that are summed over tokens."""
        return len(self.value) + len(self.gate)

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers and of the place that they are for."""
        parts = [self.value, self.gate]
        numbers = b"".join(z.detach().cpu().contiguous().numpy().tobytes() for z in parts)
        return hashlib.sha256(f"{self.model} {self.layers} {len(self.gate)} ".encode() + numbers).hexdigest()

    def features(self, model: Model) -> Callable[[Tensor], Tensor]:
        """What is summed over the tokens of a text: a function of hidden [n, C], where a model has it, → [n, D + K].

        Where a model's matrices are packed for the native kernels those of the head are, too: a token's features are
        then the same bits beside whatever tokens.
        """
        matrices, device = (self.value, self.gate), model.last_device
        placed = [Weight.packed(z) if model.has_packed_weights else z.to(device) for z in matrices]
        return functools.partial(self._features, *placed)

    def _features(self, value: Tensor | Weight, gate: Tensor | Weight, hidden: Tensor) -> Tensor:
        gates = linear(hidden, gate, "sigmoid")
        values = self._by_gate(linear(hidden, value)) * gates[..., None]
        return torch.cat([values.flatten(1), gates], dim=1)

    def vectors(self, sums: Tensor) -> Tensor:
        """The vectors [n, D] of texts, from the sums of their features [n, D + K]."""
        values, gates = sums[:, : self.dimension], sums[:, self.dimension :]
        return (self._by_gate(values) / (gates[..., None] + EPS)).flatten(1)

    def _by_gate(self, values: Tensor) -> Tensor:
        """values [n, D] → [n, K, D / K]."""
        return values.view(len(values), len(self.gate), self.dimension // len(self.gate))

    def save(self, folder: Path) -> Path:
        """Publish it for the checkpoint in a folder; the path."""
        path = path_of(folder, "vector", self.model)
        make_folder(path.parent)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("value", "gate")}
        metadata = {"format": FORMAT, "kind": "vector", "model": self.model, "layers": str(self.layers)}
        publish(path, save(tensors, metadata))
        return path


def path_of(folder: Path, kind: str, fingerprint: str) -> Path:
    """Where the head of this kind lies, of the model of this fingerprint whose checkpoint is in a folder."""
    return folder / FOLDER / f"{kind}-{fingerprint[:12]}.safetensors"


def vector_head(model: Model) -> VectorHead | None:
    """The vector head beside a model's checkpoint; None where there is none.

    Raises InputError for a file that is damaged, MismatchError for one of another model or format.
    """
    path = path_of(model.folder, "vector", model.fingerprint)
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "torch") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format"), metadata.get("kind"), metadata.get("model")
            if found != (FORMAT, "vector", model.fingerprint):
                raise MismatchError(
                    f"loading the head '{path}': expected format {FORMAT}, a vector head of model "
                    f"{model.fingerprint[:12]}, found {' '.join(str(z)[:12] for z in found)}; {ADVICE}"
                )
            layers = int(metadata["layers"])
            value, gate = (file.get_tensor(name).float() for name in ("value", "gate"))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"loading the head '{path}': expected a file that `finetune` made, found: {error}; {ADVICE}"
        ) from error
    D, K, C = len(value), len(gate), model.config.n_embd
    fits = value.shape == (D, C) and gate.shape == (K, C) and K > 0 and D % K == 0
    if not fits or not 1 <= layers <= model.config.n_layer:
        raise InputError(
            f"loading the head '{path}': expected matrices for {C} channels after 1 to {model.config.n_layer} layers, "
            f"found {list(value.shape)} and {list(gate.shape)} after {layers}; {ADVICE}"
        )
    return VectorHead(model.fingerprint, layers, value, gate)
