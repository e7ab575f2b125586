"""A second opinion: the PyPI package `rwkv` of the models' author."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from fake_snapshots import in_child
from tiny_models import save
from torch import Tensor


def forward(
    weights: Mapping[str, Tensor],
    version: str,
    tokens: list[int],
    folder: Path,
    begun: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits of the last token and the final state, in fp32. `begun` is a tuned state of RWKV-7.

    In a forked child: the package chooses its code by the environment, at import.
    """
    pytest.importorskip("rwkv", reason="the PyPI package `rwkv` is not installed (extra `dev`)")
    in_order = dict(sorted(weights.items(), key=lambda item: ".ln" not in item[0]))  # by which it knows versions
    path, out = save(in_order, folder / "theirs.pth"), folder / "theirs.out"

    def work() -> None:
        gc.freeze()  # the package collects garbage after each layer; not ours
        from rwkv.model import RWKV

        model = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
        state = None
        if begun is not None:
            state = model.generate_zero_state()
            for i in range(len(begun)):
                state[3 * i + 1] = begun[f"blocks.{i}.att.time_state"]
        with torch.no_grad():
            logits, state = model.forward(tokens, state)
        torch.save((logits.float(), [z.float() for z in state]), out)

    variables = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "7" else "0"}
    assert in_child(work, **variables) == 0
    logits, state = torch.load(out, weights_only=True)
    return logits, state
