"""Random RWKV-7 checkpoints under the official names, with weights so sized that every tensor shows in the output."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from rwkv_stream.tokenizer import OWN_PATTERN

RANKS = {"w": 8, "a": 12, "v": 4, "g": 20}  # all different, so that none can stand for another
N = 64
PROSE = (
    "The keeper walked over an old stone bridge toward the light, while gulls cried and the wind came up from the sea. "
    "In 1883 twelve ships were lost near this coast; since then somebody has always kept the lamp burning at night.\n"
    "His daughter drew maps, wrote letters to captains in distant harbours, and knew every rock by its proper name.\n"
)


def official_weights(
    *, n_layer: int = 2, n_embd: int = 64, vocab_size: int = 256, d_ffn: int = 192, seed: int = 0
) -> dict[str, Tensor]:
    """fp32 tensors by official name, in official shapes; block 0 without the v0, v1, v2 that nothing reads."""
    generator = torch.Generator().manual_seed(seed)
    C = n_embd

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(1, 1, C, generator=generator)

    weights = {"emb.weight": normal(vocab_size, C)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(n_layer):
        block = f"blocks.{i}"
        norms += [f"{block}.ln1", f"{block}.ln2", f"{block}.att.ln_x"]
        weights |= {f"{block}.att.x_{j}": uniform(0, 1) for j in "rwkvag"}
        for j, rank in RANKS.items():
            if j != "v" or i > 0:
                weights[f"{block}.att.{j}1"] = normal(C, rank, scale=C**-0.5)
                weights[f"{block}.att.{j}2"] = normal(rank, C, scale=rank**-0.5)
        weights[f"{block}.att.w0"] = uniform(-8, 1)  # some channels remember hundreds of tokens, others few
        weights[f"{block}.att.a0"] = uniform(-2, 2)
        if i > 0:
            weights[f"{block}.att.v0"] = uniform(-2, 2)
        weights[f"{block}.att.k_k"] = uniform(0.5, 1.5)
        weights[f"{block}.att.k_a"] = uniform(0.5, 1.5)
        weights[f"{block}.att.r_k"] = normal(C // N, N, scale=0.3)
        for name in ("receptance", "key", "value", "output"):
            weights[f"{block}.att.{name}.weight"] = normal(C, C, scale=C**-0.5)
        weights[f"{block}.ffn.x_k"] = uniform(0, 1)
        weights[f"{block}.ffn.key.weight"] = normal(d_ffn, C, scale=C**-0.5)
        weights[f"{block}.ffn.value.weight"] = normal(C, d_ffn, scale=d_ffn**-0.5)
    for norm in norms:
        weights |= {f"{norm}.weight": normal(C, scale=0.2, around=1), f"{norm}.bias": normal(C, scale=0.2)}
    weights["head.weight"] = normal(vocab_size, C, scale=2 * C**-0.5)
    return weights


def save(weights: dict[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint in the container that the name's suffix says."""
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    if path.suffix == ".pth":
        torch.save(stored, path)
    else:
        safetensors.torch.save_file(stored, path)
    return path


def save_own_tokenizer(path: Path, vocab_size: int = 384) -> Path:
    """Train a byte-level BPE of our own kind on a little prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OWN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, "more prose is needed"
    tokenizer.save(str(path))
    return path
