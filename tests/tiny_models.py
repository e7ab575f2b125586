"""Random checkpoints of every version, under the official names, so sized that every tensor shows in the output."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from rwkv_stream.text.tokenizer import OWN_PATTERN

RANKS = {"w": 8, "a": 12, "v": 4, "g": 20}  # all different, so that none can stand for another
N = 64
PROSE = (
    "The keeper walked over an old stone bridge toward the light, while gulls cried and the wind came up from the sea. "
    "In 1883 twelve ships were lost near this coast; since then somebody has always kept the lamp burning at night.\n"
    "His daughter drew maps, wrote letters to captains in distant harbours, and knew every rock by its proper name.\n"
)


VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7", "7a")


class _Random:
    """Tensors of width C, sized so that each shows in the output."""

    def __init__(self, C: int, seed: int) -> None:
        self.C = C
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return around + scale * torch.randn(*shape, generator=self._generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*(shape or (1, 1, self.C)), generator=self._generator)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """What takes a vector of about 1 to one of about 1."""
        return self.normal(rows, columns, scale=columns**-0.5)


def official_weights(
    *,
    version: str = "7",
    n_layer: int = 2,
    n_embd: int = 64,
    head_size: int = N,
    vocab_size: int = 256,
    d_ffn: int = 192,
    seed: int = 0,
) -> dict[str, Tensor]:
    """fp32 tensors by official name, in official shapes; no v0, v1, v2 in block 0 of RWKV-7: nothing reads them."""
    random = _Random(n_embd, seed)
    weights = {"emb.weight": random.normal(vocab_size, n_embd)}
    norms = ["blocks.0.ln0", "ln_out"]
    for i in range(n_layer):
        norms += [f"blocks.{i}.{name}" for name in (("ln1", "ln2") if version == "4" else ("ln1", "ln2", "att.ln_x"))]
        if version in ("7", "7a"):
            block = _block_7(random, n_embd // head_size, head_size, d_ffn, vocab_size, version == "7a")
        elif version == "6":
            block = _block_6(random, n_embd // head_size, head_size)
        else:
            block = _block_4_5(random, version, n_embd // head_size, head_size)
        if version not in ("7", "7a"):
            block |= {"ffn.key.weight": random.matrix(d_ffn, n_embd), "ffn.value.weight": random.matrix(n_embd, d_ffn)}
            block["ffn.receptance.weight"] = random.matrix(n_embd, n_embd)
        if i == 0:
            block = {name: value for name, value in block.items() if name not in ("att.v0", "att.v1", "att.v2")}
        weights |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    for norm in norms:
        weights |= {f"{norm}.weight": random.normal(n_embd, scale=0.2, around=1)}
        weights |= {f"{norm}.bias": random.normal(n_embd, scale=0.2)}
    weights["head.weight"] = random.normal(vocab_size, n_embd, scale=2 * n_embd**-0.5)
    return weights


def _square(random: _Random, *names: str) -> dict[str, Tensor]:
    return {f"att.{name}.weight": random.matrix(random.C, random.C) for name in names}


def _block_4_5(random: _Random, version: str, H: int, size: int) -> dict[str, Tensor]:
    per_head = {"4": (random.C,), "5.0": (H,), "5.1": (H,), "5.2": (H, size)}[version]
    block = {"att.time_decay": random.uniform(-6, 1, *per_head)}  # some channels remember hundreds of tokens
    block["att.time_first" if version in ("4", "5.0") else "att.time_faaaa"] = random.normal(*per_head, scale=0.5)
    mixed = "kvr" if version in ("4", "5.0") else "kvrg"
    block |= {f"att.time_mix_{j}": random.uniform(0, 1) for j in mixed}
    block |= {f"ffn.time_mix_{j}": random.uniform(0, 1) for j in "kr"}
    block |= _square(random, "receptance", "key", "value", "output", *(["gate"] if "g" in mixed else []))
    return block


def _block_6(random: _Random, H: int, size: int) -> dict[str, Tensor]:
    C, D, E = random.C, 6, 10
    block = {f"att.time_maa_{j}": random.uniform(0, 1) for j in "xwkvrg"}
    block |= {"att.time_maa_w1": random.matrix(C, 5 * D) * (C / D / 25) ** 0.5}
    block |= {"att.time_maa_w2": random.normal(5, D, C, scale=0.3 * D**-0.5)}
    block |= {"att.time_decay": random.uniform(-6, 1), "att.time_faaaa": random.normal(H, size, scale=0.5)}
    block |= {
        "att.time_decay_w1": random.normal(C, E, scale=C**-0.5),
        "att.time_decay_w2": random.normal(E, C, scale=0.5),
    }
    block |= {f"ffn.time_maa_{j}": random.uniform(0, 1) for j in "kr"}
    return block | _square(random, "receptance", "key", "value", "gate", "output")


def _block_7(random: _Random, H: int, size: int, d_ffn: int, vocab_size: int, deep: bool) -> dict[str, Tensor]:
    C = random.C
    block = {f"att.x_{j}": random.uniform(0, 1) for j in "rwkvag"}
    for j, rank in RANKS.items():
        block[f"att.{j}1"] = random.normal(C, rank, scale=C**-0.5)
        block[f"att.{j}2"] = random.normal(rank, C, scale=rank**-0.5)
    block["att.w0"] = random.uniform(-8, 1)  # some channels remember hundreds of tokens, others few
    block |= {"att.a0": random.uniform(-2, 2), "att.v0": random.uniform(-2, 2)}
    block |= {"att.k_k": random.uniform(0.5, 1.5), "att.k_a": random.uniform(0.5, 1.5)}
    block["att.r_k"] = random.normal(H, size, scale=0.3)
    block |= _square(random, "receptance", "key", "value", "output")
    block["ffn.x_k"] = random.uniform(0, 1)
    block |= {"ffn.key.weight": random.matrix(d_ffn, C), "ffn.value.weight": random.matrix(C, d_ffn)}
    if deep:
        R = 8
        block |= {"ffn.s1": random.normal(C, R, scale=C**-0.5), "ffn.s2": random.normal(R, d_ffn, scale=R**-0.5)}
        block |= {"ffn.s_emb.weight": random.normal(vocab_size, R * R, scale=0.3 * R**-0.5)}
        block |= {"ffn.s_emb_x.weight": random.normal(R * R, C, scale=0.3 * (R * C) ** -0.5)}
        block["ffn.s0"] = random.uniform(0.5, 1.5, 1, 1, d_ffn)
    return block


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


def save_any_tokenizer(path: Path, vocab_size: int) -> Path:
    """A tokenizer for a vocabulary of any size, whose words are numbers."""
    words = {str(i): i for i in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(path))
    return path
