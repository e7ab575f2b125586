"""Buffers that threads keep between calls."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import official_weights, save

import rwkv_stream as rs
from rwkv_stream.kernels import available
from rwkv_stream.kernels.memory import HUGE_BYTES, Buffers
from rwkv_stream.model import v7_cpu


def test_a_call_of_the_same_size_finds_its_buffer_again() -> None:
    buffers = Buffers()
    first = buffers("x", torch.float32, 2048, 1024)
    assert first.shape == (2048, 1024) and first.dtype == torch.float32
    assert buffers("x", torch.float32, 2048, 1024).data_ptr() == first.data_ptr()
    assert buffers("x", torch.bfloat16, 1024, 1024).data_ptr() == first.data_ptr(), "a quarter is near enough"


def test_what_the_largest_call_needed_is_not_kept_for_ever() -> None:
    buffers = Buffers()
    buffers("x", torch.uint8, 16 * HUGE_BYTES)
    buffers("y", torch.uint8, HUGE_BYTES // 2)
    buffers("x", torch.uint8, 100)
    assert buffers.nbytes <= HUGE_BYTES
    buffers("y", torch.uint8, 1)
    assert buffers.nbytes == HUGE_BYTES // 2 + 100, "what is small is kept"


def test_threads_share_no_buffer() -> None:
    buffers, other = Buffers(), []
    mine = buffers("x", torch.uint8, 64)
    thread = threading.Thread(target=lambda: other.append(buffers("x", torch.uint8, 64)))
    thread.start()
    thread.join()
    assert other[0].data_ptr() != mine.data_ptr()


@pytest.mark.skipif(available()["cpu"] is not None, reason=f"no C++ kernels: {available()['cpu']}")
def test_decoding_keeps_nothing_of_a_long_reading(tmp_path: Path) -> None:
    save(official_weights(), tmp_path / "model.safetensors")
    model = rs.load(tmp_path / "model.safetensors")
    tokens = torch.arange(20_000)[None] % 256
    _, state = model.forward(tokens)
    needed = v7_cpu.buffer.nbytes
    model.forward(tokens[:, :1], state)
    assert v7_cpu.buffer.nbytes <= 5 * HUGE_BYTES < needed
