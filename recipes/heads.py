"""Make the heads of the package's model, or of another one: `make heads CORPUS=folder [MODEL=checkpoint]`.

    python recipes/heads.py CORPUS [--model MODEL]

CORPUS is the folder of the training data. What `split.toml` reports on, or settings are chosen on, is left out.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from rwkv_stream.model import load
from rwkv_stream.training import heads, split

DATA = ("qa-fairytale.jsonl.zst", "qa-squad.jsonl.zst")
TOKENS = 1 << 21
EPOCHS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", help="a checkpoint; the shipped model without it")
    given = parser.parse_args()
    model, chosen = load(given.model), split.read(Path(__file__).with_name("split.toml"))
    found = itertools.chain.from_iterable(heads.pairs(given.corpus / name, chosen) for name in DATA)
    made = heads.trained(model, heads.sample(found, TOKENS, model.tokenizer), epochs=EPOCHS)
    print(
        f"vector: mean of 1 / rank over {made.n} held pairs {made.before:.3f} by the mean, {made.after:.3f} by the head"
    )
    print(made.head.save(model.folder))


if __name__ == "__main__":
    main()
