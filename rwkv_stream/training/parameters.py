"""The parameters of an RWKV-7 before it has learnt anything.

Source: BlinkDL/RWKV-LM: RWKV-v7/train_temp/src/model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the names and shapes of the parameters."""

    n_layer: int
    n_embd: int
    vocab_size: int
    head_size: int = 64


def ranks(n_embd: int) -> dict[str, int]:
    """Ranks of the four low-rank maps, as BlinkDL's trainer chooses them."""
    factors = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
    return {name: max(32, round(factor * math.sqrt(n_embd) / 32) * 32) for name, factor in factors.items()}


def _orthogonal(rows: int, columns: int, scale: float) -> Tensor:
    gain = math.sqrt(rows / columns) if rows > columns else 1.0
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain * scale)


def initial_parameters(shape: Shape) -> dict[str, Tensor]:
    """fp32 parameters by official name (vectors 1-D), drawn from torch's global generator."""
    L, C, V, N = shape.n_layer, shape.n_embd, shape.vocab_size, shape.head_size
    H = C // N
    n = torch.arange(C, dtype=torch.float32)
    ramp, linear = n / C, n / (C - 1) - 0.5
    zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    rank = ranks(C)
    p: dict[str, Tensor] = {
        "emb.weight": torch.empty(V, C).uniform_(-1e-4, 1e-4),
        "blocks.0.ln0.weight": torch.ones(C),
        "blocks.0.ln0.bias": torch.zeros(C),
    }
    for i in range(L):
        up, down = i / max(1, L - 1), 1 - i / L  # 0 → 1 and 1 → ~0 with depth
        block: dict[str, Tensor] = {}
        for name in ("ln1", "ln2"):
            block |= {f"{name}.weight": torch.ones(C), f"{name}.bias": torch.zeros(C)}
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            block[f"att.x_{name}"] = 1 - ramp ** (power * down)
        block["att.w0"] = -6 + 6 * (n / (C - 1)) ** (1 + up**0.3) + 0.5 + zigzag * 2.5
        block["att.a0"] = -0.19 + zigzag * 0.3 + linear * 0.4
        if i > 0:
            block["att.v0"] = 0.73 - linear * 0.4
        for name in "wavg" if i > 0 else "wag":
            block[f"att.{name}1"] = torch.zeros(C, rank[name])
            block[f"att.{name}2"] = _orthogonal(rank[name], C, 0.1)
        block["att.k_k"] = 0.71 - linear * 0.1
        block["att.k_a"] = torch.full((C,), 1.02)
        block["att.r_k"] = torch.full((H, N), -0.04)
        for name, scale in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
            block[f"att.{name}.weight"] = torch.empty(C, C).uniform_(-scale / C**0.5, scale / C**0.5)
        block["att.output.weight"] = torch.zeros(C, C)
        block["att.ln_x.weight"] = torch.full((C,), ((1 + i) / L) ** 0.7)
        block["att.ln_x.bias"] = torch.zeros(C)
        block["ffn.x_k"] = 1 - ramp ** (down**4)
        block["ffn.key.weight"] = _orthogonal(4 * C, C, 1.0)
        block["ffn.value.weight"] = torch.zeros(C, 4 * C)
        p |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    p |= {"ln_out.weight": torch.ones(C), "ln_out.bias": torch.zeros(C)}
    p["head.weight"] = torch.nn.init.orthogonal_(torch.empty(V, C), gain=0.5 * math.sqrt(V / C))
    return p
