"""Memory of loading and converting: a model of random bf16 weights in the shape of RWKV-7 1.5B, by container.

    python benchmarks/loading.py [--layers 24] [--out benchmarks/results/loading.json]

Each case runs in a process of its own; RssAnon (memory of its own, without what is mapped from files) is sampled every
20 ms, and compared with the file's size: for loading the whole of it, for converting what comes on top of a process
that has imported torch and does nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny_models import save_any_tokenizer  # noqa: E402

from rwkv_stream.model.config import Config  # noqa: E402
from rwkv_stream.model.v7 import shapes  # noqa: E402

SAMPLE_S = 0.02
CASES = {
    "idle": "import rwkv_stream.model",
    "load": "from rwkv_stream.model import load; load({path!r}, device='cpu', dtype='bf16', tokenizer={tokenizer!r})",
    "convert": "from rwkv_stream.model.checkpoints.convert import convert; convert({path!r}, {out!r})",
}


def weights(layers: int) -> dict[str, torch.Tensor]:
    config = Config(
        "7", n_layer=layers, n_embd=2048, n_head=32, head_size=64, d_ffn=8192, vocab_size=65_536,
        low_ranks=(("w", 96), ("a", 96), ("g", 256), ("v", 64)),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in shapes(config).items()
    }


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measured(code: str) -> dict[str, float]:
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-c", code])
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(SAMPLE_S)
    assert child.returncode == 0
    return {"peak_anon_bytes": peak, "elapsed_s": round(time.perf_counter() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path, help="also write the figures here as JSON")
    arguments = parser.parse_args()
    found: dict[str, object] = {
        "layers": arguments.layers,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = str(save_any_tokenizer(folder / "tokens.json", 65_536))
        idle = measured(CASES["idle"])
        found["idle"] = idle
        for kind in ("safetensors", "pth"):
            path = folder / f"model.{kind}"
            made = weights(arguments.layers)
            torch.save(made, path) if kind == "pth" else safetensors.torch.save_file(made, path)
            del made
            size, out = path.stat().st_size, folder / "out.safetensors"
            case = {"path": str(path), "tokenizer": tokenizer, "out": str(out)}
            loaded, converted = (measured(CASES[what].format(**case)) for what in ("load", "convert"))
            loaded["peak_share_of_file"] = round(loaded["peak_anon_bytes"] / size, 4)
            converted["over_idle_bytes"] = converted["peak_anon_bytes"] - idle["peak_anon_bytes"]
            found[kind] = {"file_bytes": size, "load": loaded, "convert": converted}
            print(kind, json.dumps(found[kind]))
            path.unlink()
            out.unlink()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
