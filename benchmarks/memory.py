"""Peak memory of `rwkv-stream ingest` against the length of the text, as the operating system counts it.

    python benchmarks/memory.py [--out benchmarks/results/memory.json]

Each case runs the program as a child on a text made by a seeded generator (a file, stdin, or one line without end) and
reads the child's maximum resident set from `wait4`. Lengths are in tokens of the shipped model, of random bf16 weights
of the 0.1B shape, or in bytes for the one-layer byte model that this script makes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

WORDS = (Path(__file__).parents[1] / "samples" / "story.txt").read_text(encoding="utf8").split()
PROGRAM = [sys.executable, "-Im", "rwkv_stream.cli"]


def prose(n_bytes: int, one_line: bool, seed: int = 0) -> Iterator[bytes]:
    """About `n_bytes` of words of the sample story, in pieces."""
    rng = random.Random(seed)
    made = 0
    while made < n_bytes:
        words = rng.choices(WORDS, k=2000)
        piece = (" ".join(words) + (" " if one_line else "\n")).encode()
        made += len(piece)
        yield piece


def byte_model(path: Path) -> Path:
    """A one-layer RWKV-7 over raw bytes with seeded random weights."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    C, V, F, R = 64, 256, 256, 8
    tensors = {"emb.weight": torch.randn(V, C) * 0.1, "head.weight": torch.randn(V, C) * 0.1}
    for norm in ("blocks.0.ln0", "blocks.0.ln1", "blocks.0.ln2", "blocks.0.att.ln_x", "ln_out"):
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones(C), torch.zeros(C)
    att = "blocks.0.att."
    for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
        tensors[att + name] = torch.rand(1, 1, C)
    for name in ("w", "a", "g"):
        tensors[att + f"{name}1"], tensors[att + f"{name}2"] = torch.randn(C, R) * 0.1, torch.randn(R, C) * 0.1
    tensors[att + "r_k"] = torch.randn(1, C) * 0.1
    for name in ("receptance", "key", "value", "output"):
        tensors[att + f"{name}.weight"] = torch.randn(C, C) * 0.1
    tensors["blocks.0.ffn.x_k"] = torch.rand(1, 1, C)
    tensors["blocks.0.ffn.key.weight"], tensors["blocks.0.ffn.value.weight"] = (
        torch.randn(F, C) * 0.1,
        torch.randn(C, F) * 0.1,
    )
    save_file(tensors, path)
    return path


def base_model(path: Path) -> tuple[Path, float]:
    """Random weights of the 0.1B shape, and how many MiB they are."""
    import torch
    from compare import SHAPES, weights_of

    weights = weights_of(SHAPES["0.1b"])
    torch.save(weights, path)
    return path, sum(tensor.nbytes for tensor in weights.values()) / 2**20


def bare_mib() -> float:
    """Peak resident set of a process that only imports torch."""
    child = subprocess.Popen([sys.executable, "-c", "import torch"])
    return os.wait4(child.pid, 0)[2].ru_maxrss / 1024


def measure(arguments: list[str], stdin: Iterator[bytes] | None) -> dict[str, float]:
    """Run the program with `--json`; its report and its peak resident set in MiB."""
    started = time.perf_counter()
    child = subprocess.Popen(
        [*PROGRAM, "ingest", "--json", *arguments], stdin=subprocess.PIPE if stdin else None, stdout=subprocess.PIPE
    )
    if stdin is not None:
        assert child.stdin is not None
        try:
            for piece in stdin:
                child.stdin.write(piece)
            child.stdin.close()
        except BrokenPipeError:  # --max-tokens: the child has seen enough
            pass
    assert child.stdout is not None
    report = json.loads(child.stdout.read())
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"ingest failed with status {status}")
    return {
        "tokens": report["tokens"],
        "snapshots": report["snapshots_written"],
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "wall_s": time.perf_counter() - started,
        "rate_tok_s": report["rate_tok_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here as JSON")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink every length, for a quick look")
    options = parser.parse_args()
    short, long = int(50_000 * options.scale), int(1_000_000 * options.scale)
    line_bytes, line_tokens = int(50_000_000 * options.scale), int(200_000 * options.scale)

    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "long.txt"
        with text.open("wb") as file:
            file.writelines(prose(long * 6, one_line=False))
        line = Path(folder) / "line.txt"
        with line.open("wb") as file:
            file.writelines(prose(line_bytes, one_line=True))
        # In a process apart: a child that is measured counts the peak of its parent too.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            model = apart.submit(byte_model, Path(folder) / "bytes.safetensors").result()
            base, weights_mib = apart.submit(base_model, Path(folder) / "base.pth").result()
        bytewise = [str(line), "--model", str(model)]
        in_base = [str(text), "--model", str(base), "--tokenizer", "world", "--dtype", "bf16"]
        cases: list[tuple[str, list[str], Iterator[bytes] | None]] = [
            (f"file, {short} tokens", [str(text), "--max-tokens", str(short)], None),
            (f"file, {long} tokens", [str(text), "--max-tokens", str(long)], None),
            (
                f"stdin, {short} tokens",
                ["-", "--name", "a", "--max-tokens", str(short)],
                prose(long * 6, one_line=False),
            ),
            (f"stdin, {long} tokens", ["-", "--name", "b", "--max-tokens", str(long)], prose(long * 6, one_line=False)),
            (
                f"one line of {line_bytes} bytes, first {line_tokens} tokens",
                [str(line), "--max-tokens", str(line_tokens)],
                None,
            ),
            (
                f"byte model, {short} bytes of one line",
                [*bytewise, "--max-tokens", str(short)],
                None,
            ),
            (f"byte model, one line of {line_bytes} bytes", bytewise, None),
            (f"0.1B, {short} tokens", [*in_base, "--max-tokens", str(short)], None),
            (f"0.1B, {long} tokens", [*in_base, "--max-tokens", str(long)], None),
        ]
        for number, (title, arguments, stdin) in enumerate(cases):
            results[title] = measure([*arguments, "--store", str(Path(folder) / f"{number}.store")], stdin)
            figures = results[title]
            print(f"{title:55} {figures['peak_rss_mib']:8.1f} MiB {figures['rate_tok_s']:10,.0f} tok/s", flush=True)

    peaks = [figures["peak_rss_mib"] for figures in results.values()]
    growth = {
        "file": peaks[1] / peaks[0] - 1,
        "stdin": peaks[3] / peaks[2] - 1,
        "one line against a short file": peaks[4] / peaks[0] - 1,
        "byte model": peaks[6] / peaks[5] - 1,
        "0.1B": peaks[8] / peaks[7] - 1,
    }
    for title, value in growth.items():
        print(f"growth, {title}: {value:+.2%}")
    above = {"import torch": bare_mib(), "weights": weights_mib}
    print(f"0.1B, above torch and the weights: {peaks[8] - sum(above.values()):.1f} MiB of {above}")
    if options.out:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        options.out.write_text(
            json.dumps({"machine": machine, "cases": results, "growth": growth, "mib": above}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
