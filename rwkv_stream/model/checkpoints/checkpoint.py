"""Checkpoints: from a file or folder to canonical tensors and the dimensions of their model.

A container is opened (`containers`), which gives its tensors by official names; these tell the version.
Canonical are the official names, vectors as 1-D `(C)`, and no tensor that the model does not read: so a file, its
conversions and its Hugging Face form are one model. Versions that this program does not run are refused by name.
Source of the keys: BlinkDL/RWKV-LM (RWKV-v4neo to RWKV-v7, train_temp/src/model.py), BlinkDL/ChatRWKV (rwkv/model.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model import architectures
from rwkv_stream.model.checkpoints import fingerprints
from rwkv_stream.model.checkpoints.containers import open_container
from rwkv_stream.model.checkpoints.fingerprints import Facts, Stamp
from rwkv_stream.model.checkpoints.sources import Container, Source, Sources, a_few
from rwkv_stream.model.config import Config, Shapes
from rwkv_stream.model.dtypes import DTYPE_NAMES

TIME_STATE = ".att.time_state"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint; `identity` holds size, time of change (ns) and inode of each of its files before it was opened."""

    path: Path
    identity: tuple[Stamp, ...]
    config: Config
    tensors: Mapping[str, Source]
    container: Container


def read(path: str | Path) -> Checkpoint:
    """Open a checkpoint; its tensors are read as they are used. Raises CheckpointError."""
    path = Path(path).absolute()
    try:
        before = fingerprints.stamps(path.iterdir() if path.is_dir() else (path,))
        container = open_container(path)
        identity = tuple(before.get(file, (0, 0, 0)) for file in container.files)
        sources = container.official()
        version = version_of({name: source.shape for name, source in sources.items()})
        architecture = architectures.of(version)
        tensors = _canonical(sources, version, architecture.UNUSED)
        shapes = {name: source.shape for name, source in tensors.items()}
        config = architecture.config(version, shapes)
        tuned = time_states(config)
        expected = architecture.shapes(config)
        _check_shapes(shapes, expected | tuned if tuned.keys() <= shapes.keys() else expected, version)
        config = replace(config, group_norm_eps=container.group_norm_eps(version, config.head_size))
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"loading checkpoint '{path}': {error}") from error
    return Checkpoint(path, identity, config, tensors, container)


# ---- what the tensors are ----


def version_of(shapes: Shapes) -> str:
    """The RWKV version with these official names. Raises CheckpointError with the name of what is not run here."""

    def has(name: str) -> bool:
        return f"blocks.0.{name}" in shapes

    def refused(name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"expected a checkpoint of RWKV-4 to 7, found {name}, {reason}; pass another model")

    if any("rosa" in name.lower() for name in shapes):
        raise refused("RWKV-8 with ROSA", "a research version, whose state grows with the text, that is not supported")
    if any(".experts." in name for name in shapes):
        raise refused("a mixture of experts", "whose routing is not supported")
    if has("att.r_k"):
        if any(name.startswith("blocks.0.qkv.") for name in shapes):
            raise refused("RWKV-7b (attention over all tokens)", "whose state grows with the text and is not supported")
        if has("ffn.enn.weight"):
            raise refused("RWKV-8 rc00", "a research version that is not supported")
        return "7a" if has("ffn.s_emb.weight") else "7"
    if has("att.time_maa_x"):
        if has("att.gate.weight"):
            return "6"
        experiment = (
            "x060a" if has("att.gate_w1") else "x060b or c" if has("att.time_maa_rkvw_w1") else "of unknown kind"
        )
        raise refused(f"an experiment on RWKV-6 ({experiment})", "which is not supported")
    if has("att.ln_x.weight"):
        decay = shapes.get("blocks.0.att.time_decay", ())
        per_channel = len(decay) == 2 and decay[-1] > 1
        return "5.0" if not has("att.gate.weight") else "5.2" if per_channel else "5.1"
    if has("att.time_decay"):
        return "4"
    if shapes and all(name.endswith(TIME_STATE) for name in shapes):
        raise refused("a tuned initial state", "which is no model (see --initial-state)")
    raise refused(f"other tensors ({a_few({*shapes})})", "which have none of RWKV's official names")


def _canonical(sources: Sources, version: str, unused: tuple[str, ...]) -> dict[str, Source]:
    """By sorted name, without what is not read, vectors as 1-D."""
    return {name: _as_vector(name, sources[name], version) for name in sorted(sources) if name not in unused}


def _as_vector(name: str, source: Source, version: str) -> Source:
    shape = source.shape
    per_head = version in ("5.0", "5.1") and name.endswith((".att.time_decay", ".att.time_first", ".att.time_faaaa"))
    if (
        (len(shape) == 3 and shape[:2] == (1, 1))
        or (per_head and len(shape) > 1 and set(shape[1:]) == {1})  # (H, 1) or (H, 1, 1)
        or (
            version == "6" and name.endswith(".att.time_decay") and len(shape) == 2
        )  # (H, N), as first made by HF's code
    ):
        return source.map(lambda tensor: tensor.reshape(-1), (math.prod(shape),))
    return source


def _check_shapes(found: Shapes, expected: Shapes, version: str) -> None:
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"expected {len(expected)} tensors, found {a_few(missing)} missing; get the file again")
    if unexpected := found.keys() - expected.keys():
        raise CheckpointError(
            f"expected the tensors of RWKV-{version}, found {a_few(unexpected)} besides, which would not be used; "
            "pass the model without them"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"expected tensor '{name}' as {list(shape)}, found {list(found[name])}; get the file again"
            )


def time_states(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of a tuned initial state for this model, which its checkpoint may hold; RWKV-4 has none."""
    H, N = config.n_head, config.head_size
    blocks = range(config.n_layer if config.version != "4" else 0)
    return {f"blocks.{i}{TIME_STATE}": (H, N, N) for i in blocks}


# ---- fingerprint ----


def fingerprint(checkpoint: Checkpoint, tokenizer_id: str) -> str:
    """SHA-256 that tells models apart: of the canonical tensors as the file has them, what they mean, the tokenizer.

    The part for the tensors is remembered (`fingerprints`). Raises CheckpointError if a file changed since it was
    opened.
    """
    digest = _known_digest(checkpoint)
    if digest is None:
        digest = tensors_digest(checkpoint.tensors)
        fingerprints.remember(checkpoint.path, _facts(checkpoint, digest))
    check_unchanged(checkpoint)
    return _facts(checkpoint, digest).fingerprint(tokenizer_id)


def known_fingerprint(checkpoint: Checkpoint, tokenizer_id: str) -> str | None:
    """The same where it is remembered, else None; no tensor is read."""
    digest = _known_digest(checkpoint)
    return None if digest is None else _facts(checkpoint, digest).fingerprint(tokenizer_id)


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a file of the checkpoint changed since it was opened."""
    if tuple(fingerprints.stamps(checkpoint.container.files).values()) != checkpoint.identity:
        raise CheckpointError(
            f"loading checkpoint '{checkpoint.path}': the file changed while it was being read; run again"
        )


def _facts(checkpoint: Checkpoint, digest: str) -> Facts:
    config, inside = checkpoint.config, "tokenizer.ggml.model" in checkpoint.container.metadata
    return Facts(checkpoint.identity, digest, config.version, config.group_norm_eps, config.vocab_size, inside)


def _known_digest(checkpoint: Checkpoint) -> str | None:
    facts = fingerprints.recall(checkpoint.path)
    return facts.digest if facts is not None and facts.identity == checkpoint.identity else None


def tensors_digest(tensors: Sources) -> str:
    """SHA-256 of tensors by sorted name, each as its file has it."""
    digest = hashlib.sha256()
    for name, source in sorted(tensors.items()):
        digest.update(f"{name} {DTYPE_NAMES[source.dtype]} {list(source.shape)}\n".encode())
        digest.update(source.read().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
