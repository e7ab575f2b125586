"""`bench`: its figures hang together, and a model that is wrong is not timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from program import program

from rwkv_stream.bench import BATCHES, bench
from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels import Recurrence
from rwkv_stream.model import Model, load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_figures(bytes_model: Model) -> None:
    found = bench(bytes_model, tokens=256, rounds=2)
    assert set(found.decode_tok_s) == set(found.decode_share) == set(BATCHES)
    for name, value in dataclasses.asdict(found).items():
        for figure in value.values() if isinstance(value, dict) else [value]:
            assert figure > 0, name
    assert found.prefill_share < 5  # the bound is measured apart, and noisy
    matrices = sum(z.numel() for block in bytes_model.blocks for z in block.values() if z.ndim == 2)
    matrices -= 7 * bytes_model.config.n_embd * bytes_model.config.n_layer  # att.mix, ffn.mix: vectors laid together
    assert found.prefill_share == pytest.approx(found.prefill_tok_s * 2 * matrices / found.gemm_flop_s)
    assert found.state_bytes == bytes_model.zero_state().nbytes
    assert found.snapshot_bytes < 2 * found.state_bytes


def test_a_model_that_is_wrong_is_not_timed(bytes_model_path: Path) -> None:
    """One whose recurrence forgets the state between calls."""
    model = load(bytes_model_path, backend="reference")
    right = model.wkv

    def forgetful(inputs, constants, state):  # type: ignore[no-untyped-def]
        return right.rows(inputs, constants, tuple(torch.zeros_like(part) for part in state))

    wrong = dataclasses.replace(model, wkv=Recurrence(forgetful, right.segments, right.padding))
    with pytest.raises(BackendError, match="a model that is wrong is not timed"):
        bench(wrong, tokens=128, rounds=1)


@pytest.mark.parametrize("counts", [{"tokens": 0}, {"tokens": -5}, {"rounds": 0}], ids=str)
def test_counts_that_make_no_sense(bytes_model: Model, counts: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="to be 1 or more, found"):
        bench(bytes_model, **counts)


def test_the_command(bytes_model_path: Path) -> None:
    ended = program("bench", "--model", bytes_model_path, "--tokens", 128, "--rounds", 1, "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["decode_tok_s"].keys() == {str(B) for B in BATCHES}
    ended = program("bench", "--model", bytes_model_path, "--tokens", 128, "--rounds", 1)
    assert ended.code == 0 and "tok/s" in ended.out
