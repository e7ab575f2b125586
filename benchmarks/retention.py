"""A log that is read into a store of bounded size: how large that grows, and which holes the thinned past has.

    python benchmarks/retention.py [--tokens 2000000] [--snapshot-every 4096] [--max-store-size 4000000] [--keep N]

The log is `samples/weblog.py`'s; the model has one layer, random weights and a token for each byte (`memory.py`). After
each chunk the bytes of the store's files are counted, but for the catalog, which is told by itself. Holes are told at
the end: in tokens, as a share of the position where each ends, and as a share of its distance from the newest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

from memory import byte_model

ROOT = Path(__file__).parents[1]


def log(path: Path, n_bytes: int) -> Path:
    """The first bytes of an access log."""
    sys.path.insert(0, str(ROOT / "samples"))
    from weblog import log as entries

    written = 0
    with path.open("wb") as file:
        for entry, _ in entries(1 << 30, seed=7, anomalies=0):
            line = f"{entry}\n".encode()[: n_bytes - written]
            file.write(line)
            written += len(line)
            if written == n_bytes:
                return path
    raise AssertionError("the log has an end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--snapshot-every", type=int, default=4096)
    parser.add_argument("--max-store-size", type=int, default=4_000_000)
    parser.add_argument("--keep", type=int, help="a rule beside the limit")
    parser.add_argument("--no-limit", action="store_true", help="for comparison: --keep alone, or nothing")
    arguments = parser.parse_args()
    import rwkv_stream as rs
    from rwkv_stream.store.layout import StoreFiles

    with tempfile.TemporaryDirectory() as folder:
        model = rs.load(byte_model(Path(folder) / "bytes.safetensors"), device="cpu")
        source = log(Path(folder) / "access.log", arguments.tokens)
        store = rs.Store(Path(folder) / "store", create=True)
        files, sizes = StoreFiles(store.path), [0]
        rule = {"keep": arguments.keep, "max_store_size": None if arguments.no_limit else arguments.max_store_size}
        before = time.process_time()
        report = rs.ingest(
            source,
            name="access.log",
            model=model,
            store=store,
            snapshot_every=arguments.snapshot_every,
            on_progress=lambda _: sizes.append(files.size_bytes()),
            **rule,
        )
        cpu_s = time.process_time() - before
        sizes.append(files.size_bytes())
        held = sorted(entry.tokens for entry in store.list("access.log"))
        holes = [(b - a, b) for a, b in itertools.pairwise([0, *held])]
        wide = [(hole, end) for hole, end in holes if hole > arguments.snapshot_every]
        newest = report.tokens
        parts = {
            name: sum(path.stat().st_size for path in store.path.glob(f"{name}/*/*"))
            for name in ("objects", "texts", "postings", "records")
        }
        parts["catalog"] = (store.path / "catalog.sqlite").stat().st_size
        print(
            json.dumps(
                {
                    "tokens": newest,
                    "snapshots_written": report.snapshots_written,
                    "snapshots_held": len(held),
                    "state_bytes": store.get("access.log").size_bytes,
                    "most_bytes": max(sizes),
                    "bytes": sizes[-1],
                    "bytes_of": parts,
                    "first_at": held[0],
                    "largest_hole": max(holes)[0],  # all of which the worst fork reads
                    "largest_hole_of_all": max(holes)[0] / newest,
                    "largest_hole_of_its_distance": max((n / (newest - end + n) for n, end in wide), default=0),
                    "cpu_s": round(cpu_s, 1),
                    "damaged": len(store.verify().damaged),
                }
            )
        )


if __name__ == "__main__":
    main()
