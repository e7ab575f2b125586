"""Time a token and memory against the length of the text, the size of the model and the number of threads.

    python benchmarks/scaling.py [length] [size] [threads] [--scale 1] [--svg docs/scaling.svg]

length   `rwkv-stream ingest` with the shipped model as a child, on words of the sample story in seeded order: time a
         token as the program reports it, which leaves out start and end, and the child's peak resident set
size     reading through the API with random weights of official shapes, in a process for each shape and dtype
threads  the same, the smallest shape with 1, 2, 4 … threads

Rounds alternate the cases; figures are medians with the lowest and highest. The picture shows the lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compare import CHUNK, SHAPES, Contestant, Shape, machine, prepare, products, spread
from memory import measure, prose

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PICTURE = ROOT / "docs" / "scaling.svg"
LENGTHS = (10_000, 100_000, 1_000_000, 10_000_000)
BYTES_A_TOKEN = 6  # more than the words take
SIZES = ("0.1b", "0.4b", "1.5b")
DTYPES = ("fp32", "bf16")
READ_TOKENS = 8192


def length(scale: float, rounds: int) -> dict[str, Any]:
    """Tokens of a text → µs a token, peak resident set in MiB."""
    lengths = sorted({max(CHUNK, int(n * scale)) for n in LENGTHS})
    micros, peaks = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "words.txt"
        with text.open("wb") as file:
            file.writelines(prose(max(lengths) * BYTES_A_TOKEN, one_line=False))
        for turn in range(rounds):
            for n in lengths:
                store = folder / f"{turn} {n}.store"
                figures = measure([str(text), "--max-tokens", str(n), "--store", str(store)], None)
                micros[n].append(1e6 / figures["rate_tok_s"])
                peaks[n].append(figures["peak_rss_mib"])
                print(f"{n:9,} tokens  {micros[n][-1]:8.1f} µs a token  {peaks[n][-1]:6.1f} MiB", flush=True)
    return {str(n): {"us_token": spread(micros[n]), "peak_rss_mib": spread(peaks[n])} for n in lengths}


def size(scale: float, rounds: int) -> dict[str, Any]:
    """Shape and dtype → µs a token, that for a million weights that are multiplied, peak resident set in MiB."""
    cases = {f"{name} {dtype}": (SHAPES[name], dtype, os.cpu_count() or 1) for name in SIZES for dtype in DTYPES}
    return read(cases, int(READ_TOKENS * scale), rounds)


def threads(scale: float, rounds: int) -> dict[str, Any]:
    """Threads and dtype → the same."""
    cores = os.cpu_count() or 1
    counts = sorted({1 << i for i in range(cores.bit_length())} | {cores})
    cases = {f"{n} threads {dtype}": (SHAPES[SIZES[0]], dtype, n) for n in counts for dtype in DTYPES}
    return read(cases, int(READ_TOKENS * scale), rounds)


def read(cases: Mapping[str, tuple[Shape, str, int]], n: int, rounds: int) -> dict[str, Any]:
    """What `n` tokens take in each case of a shape, a dtype and a number of threads."""
    n = max(CHUNK, n)
    rates, started = defaultdict(list), {}
    weights: dict[Shape, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for title, (shape, dtype, n_threads) in cases.items():
            folder = Path(name, f"{shape.n_layer} x {shape.n_embd}")
            if shape not in weights:
                folder.mkdir()
                matrices = products(prepare(shape, folder))
                weights[shape] = sum(n_in * n_out * count for (n_in, n_out), count in matrices.items())
            started[title] = Contestant("rwkv-stream", dtype, folder, threads=n_threads)
            started[title].prefill(CHUNK, shape.vocab_size)
        for _ in range(rounds):
            for title, (shape, _, _) in cases.items():
                rates[title].append(started[title].prefill(n, shape.vocab_size))
                print(f"{title:20} {rates[title][-1]:10,.0f} tok/s", flush=True)
        peaks = {title: each.peak_rss_mib() for title, each in started.items()}
        for each in started.values():
            each.close()
    made_figures = {}
    for title, (shape, _, _) in cases.items():
        micros = spread(1e6 / rate for rate in rates[title])
        made_figures[title] = {
            "us_token": micros,
            "us_token_million_weights": micros["median"] / weights[shape] * 1e6,
            "peak_rss_mib": peaks[title],
        }
    return made_figures


def draw(path: Path, figures: Mapping[str, Any]) -> None:
    """Two small panels against the length of the text: µs a token, peak resident set."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same figures make the same file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    lengths = [int(n) for n in figures]
    for axes, key, title in zip(
        figure.subplots(1, 2), ("us_token", "peak_rss_mib"), ("µs a token", "peak resident set, MiB"), strict=True
    ):
        medians, lowest, highest = (
            [case[key][part] for case in figures.values()] for part in ("median", "lowest", "highest")
        )
        axes.fill_between(lengths, lowest, highest, color="0.85")
        axes.plot(lengths, medians, marker="o", color="tab:blue")
        axes.set_xscale("log")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(0, 1.3 * max(highest))
        axes.set_xlabel("tokens of the text")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


CASES = {"length": length, "size": size, "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="shrink every length, for a quick look")
    parser.add_argument("--out", type=Path, default=RESULTS, help="figures are entered here")
    parser.add_argument("--svg", type=Path, default=PICTURE, help="where the picture of the lengths goes")
    options = parser.parse_args()
    chosen = options.cases or list(CASES)
    if unknown := set(chosen) - CASES.keys():
        parser.error(f"expected {', '.join(CASES)}, found {', '.join(sorted(unknown))}")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in chosen:
        print(f"== {name}", flush=True)
        results[name] = {"machine": machine(), "rounds": options.rounds}
        results[name]["cases"] = CASES[name](options.scale, options.rounds)
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if "length" in chosen:
        draw(options.svg, results["length"]["cases"])


if __name__ == "__main__":
    main()
