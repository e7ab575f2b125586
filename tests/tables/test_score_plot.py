"""The picture of surprise: bins that keep every bit at constant memory, and `score --plot`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from program import program

from rwkv_stream.tables.plot import BINS, SurpriseMap
from rwkv_stream.tables.score import Surprise

LINES = [f"2026-11-21 10:00:{i % 60:02d} GET /index.html 200 {i}\n" for i in range(60)]


def unit(start: int, end: int, bits: float) -> Surprise:
    return Surprise("text", "line", 0, "", start, end, 0, 1, bits)


@pytest.mark.parametrize("n_bytes", [1, 1000, BINS, BINS + 1, 7 * BINS + 3, 1_000_003])
def test_bins_are_those_of_the_whole_text(n_bytes: int) -> None:
    """Against bits laid out byte by byte and summed once the length is known."""
    rng = np.random.default_rng(0)
    edges = [0, *sorted(set(rng.integers(1, n_bytes + 1, 500).tolist()) - {n_bytes}), n_bytes]
    of_byte = np.zeros(n_bytes)
    surprise = SurpriseMap()
    for start, end in itertools.pairwise(edges):
        bits = float(rng.random() * 20)
        of_byte[start:end] = bits / (end - start)
        surprise.add(unit(start, end, bits))
    assert len(surprise.bits) == BINS
    assert n_bytes <= surprise.width * BINS < max(2 * n_bytes, BINS + 1)
    padded = np.pad(of_byte, (0, surprise.width * BINS - n_bytes))
    np.testing.assert_allclose(surprise.bits, padded.reshape(BINS, -1).sum(axis=1), atol=1e-9)
    middles, bits = surprise.bits_per_byte()
    assert len(middles) == len(bits) == -(-n_bytes // surprise.width)
    np.testing.assert_allclose(bits[-1], of_byte[(len(bits) - 1) * surprise.width :].mean())


def test_a_unit_without_a_byte_keeps_its_bits() -> None:
    surprise = SurpriseMap()
    surprise.add(unit(5, 5, 3.0))
    assert surprise.bits.sum() == 3


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_model_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_STREAM_MODEL", str(bytes_model_path))
    Path("access.log").write_text("".join(LINES[:30]) + "kernel panic: $\\frac{1}{0 \x00\n" + "".join(LINES[30:]))
    return tmp_path


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_score_draws(log: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    plain = program("score", "access.log", "--top", 2)
    drawn = program("score", "access.log", "--top", 2, "--plot", f"out.{suffix}")
    assert drawn.code == 0, drawn.err
    assert drawn.out == plain.out
    assert Path(f"out.{suffix}").read_bytes().startswith(magic)
    assert sorted(path.name for path in log.iterdir()) == ["access.log", f"out.{suffix}"]


def test_the_picture_shows_the_surprise(log: Path) -> None:
    """Its red marks stand where the strangest units are."""
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    from matplotlib.image import imread

    def marks(at: int) -> np.ndarray:  # type: ignore[type-arg]
        surprise = SurpriseMap()
        for start in range(0, 1000, 10):
            surprise.add(unit(start, start + 10, 80.0 if start == at else 10.0))
        surprise.draw("marks.png", [Surprise("text", "line", 0, "", at, at + 10, 0, 1, 80.0)])
        pixels = imread("marks.png")
        red = (pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.3) & (pixels[..., 2] < 0.3)
        return np.nonzero(red)[1] / pixels.shape[1]

    assert marks(100).mean() < 0.3
    assert marks(900).mean() > 0.7


def test_without_matplotlib_the_extra_is_named_before_anything_is_scored(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = program("score", "access.log", "--plot", "out.png", "--model", "no-such-model")
    assert (ended.code, ended.out) == (1, "")
    assert "rwkv-stream[plot]" in ended.err
    assert not Path("out.png").exists()


def test_what_cannot_be_drawn(log: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert program("score", "access.log", "--plot", "out.bmp").code == 2
    ended = program("score", "access.log", "--plot", "no/such/folder/out.png")
    assert (ended.code, ended.out) == (1, "")
    assert "no/such/folder" in ended.err
    Path("logs").mkdir()
    for name in ("a.log", "b.log"):
        Path("logs", name).write_text("".join(LINES[:3]))
    assert program("score", "logs", "--plot", "out.png").code == 2
    assert not Path("out.png").exists()
