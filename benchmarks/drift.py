"""How far reading in 16 and 8 bits gets from reading in fp32 as the text grows long, with the shipped model.

    python benchmarks/drift.py [--tokens 1000000]

All read the same words side by side, each with its own state. At each mark: the logits of a chunk against those of fp32
(relative error, agreement of the likeliest token, mean KL in nats), and the relative error of the state.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from compare import CHUNK, closeness, machine
from memory import prose

import rwkv_stream as rs
from rwkv_stream.model.state import State
from rwkv_stream.text.chunker import chunks

RESULTS = Path(__file__).parent / "results" / "drift.json"
SETTINGS = {"fp32": {"dtype": "fp32"}, "bf16": {"dtype": "bf16"}, "int8": {"weights": "int8"}}
MARKS = (1024, 32_768, 262_144, 999_424)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    models = {name: rs.load(**options) for name, options in SETTINGS.items()}
    states = {name: model.start()[1] for name, model in models.items()}
    found: dict[str, Any] = {}
    words = chunks(models["fp32"].tokenizer.stream(prose(1 << 62, one_line=False)), CHUNK)
    for i, chunk in enumerate(itertools.islice(words, given.tokens // CHUNK), start=1):
        ids, logits = torch.from_numpy(chunk.ids)[None], {}
        for name, model in models.items():
            hidden, states[name] = model.forward(ids, states[name], logits="none")
            if i * CHUNK in MARKS:
                logits[name] = model.head(hidden[0])
        if logits:
            right, state = logits.pop("fp32"), states["fp32"]
            found[str(i * CHUNK)] = {name: errors(z, right, states[name], state) for name, z in logits.items()}
            print(i * CHUNK, json.dumps(found[str(i * CHUNK)]), flush=True)
    given.out.write_text(json.dumps({"machine": machine(), "tokens read": found}, indent=1, ensure_ascii=False) + "\n")


def errors(logits: torch.Tensor, right: torch.Tensor, state: State, right_state: State) -> dict[str, float]:
    return {
        **closeness(logits.numpy(), right.numpy()),
        **{name: float((z - right_state[name]).norm() / right_state[name].norm()) for name, z in state.items()},
    }


if __name__ == "__main__":
    main()
