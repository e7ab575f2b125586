"""A job of a million documents: its memory against one of ten thousand, and what ten kills leave of it.

    python benchmarks/job.py [--out benchmarks/results/job.json] [--documents N] [--model PATH]

Documents of 6 to 20 words, made by a seeded generator from word lists, stand in JSON Lines of 50,000 each. The program
embeds them as a child (`--unit document`) into a folder, three times:

* the first 10,000, and all of them; the resident set of the child is read from /proc every second, and its peak, which
  the system keeps (VmHWM), at the end: once the model runs, memory should not depend on the number of documents;
* all of them again, killed with SIGKILL at seeded moments and run again each time. Then every document must have one
  row, in order, equal to that of the run that nobody killed, bit for bit; and of the parts that a kill left whole, one
  at most may have been made again.

Parts are compared row group by row group, so that this script too stays small. Without `--model` a one-layer model
over bytes with seeded random weights is used, which is made here: it is the job that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from memory import PROGRAM, byte_model

SHARD_DOCUMENTS = 50_000
SMALL = 10_000
PART_ROWS = "10000"
PLACES = "harbour lighthouse bridge archive orchard station mill quarry theatre library market cellar".split()  # noqa: SIM905
PEOPLE = "keeper miller pilot clerk gardener printer weaver surveyor baker captain teacher mason".split()  # noqa: SIM905
DEEDS = "mended counted painted carried weighed sold lost found measured borrowed numbered locked".split()  # noqa: SIM905
THINGS = "lamp rope ledger boat clock map barrel letter lens kettle ladder wheel".split()  # noqa: SIM905
WORDS = (PLACES, PEOPLE, DEEDS, THINGS)


def write_shards(folder: Path, n_documents: int) -> list[str]:
    """The first `n_documents` of one endless sequence, as files; their ids count them."""
    folder.mkdir()
    rng = random.Random(0)
    shards = []
    for first in range(0, n_documents, SHARD_DOCUMENTS):
        shard = folder / f"{first // SHARD_DOCUMENTS:04}.jsonl"
        with shard.open("w") as file:
            for i in range(first, min(first + SHARD_DOCUMENTS, n_documents)):
                words = [rng.choice(WORDS[j % len(WORDS)]) for j in range(rng.randint(6, 20))]
                file.write(json.dumps({"id": f"{i:08}", "text": " ".join(words)}) + "\n")
        shards.append(str(shard))
    return shards


def resident(pid: int) -> dict[str, float]:
    """What /proc says of a process's memory, in MiB: now (VmRSS, RssAnon) and at most so far (VmHWM)."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "VmHWM"):
            found[name] = int(value.split()[0]) / 1024
    return found


class Run:
    """The program at work on a job."""

    def __init__(self, shards: list[str], out: Path, model: str | None) -> None:
        given = [] if model is None else ["--model", model]
        command = [
            *PROGRAM,
            "embed",
            *shards,
            "-o",
            f"{out}/",
            "--unit",
            "document",
            "--part-rows",
            PART_ROWS,
            "--json",
            "--threads",
            "1",
            *given,
        ]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.began = time.monotonic()

    def measured(self) -> dict[str, Any]:
        """Its report, when it has ended, and its memory on the way."""
        seen: dict[str, list[float]] = {"VmRSS": [], "RssAnon": [], "VmHWM": []}
        while self._child.poll() is None:
            for name, value in resident(self._child.pid).items():
                seen[name].append(value)
            time.sleep(1)
        assert self._child.stdout is not None
        if self._child.returncode:
            raise SystemExit(f"the job failed with status {self._child.returncode}")
        report = json.loads(self._child.stdout.read())
        return {
            **{name: report[name] for name in ("rows", "tokens", "parts", "elapsed_s")},
            "rate_rows_s": report["rows"] / report["elapsed_s"],
            "rate_tok_s": report["tokens"] / report["elapsed_s"],
            "peak_rss_mib": max(seen["VmHWM"]),
            "peak_rss_anon_mib": max(seen["RssAnon"]),
            # a tenth of the time each
            "rss_mib": [seen["VmRSS"][i * len(seen["VmRSS"]) // 10] for i in range(10)],
        }

    def kill_at(self, out: Path, parts: int, later_s: float) -> None:
        """So many seconds after the folder has so many parts."""
        while len(tables(out)) < parts:
            self._go_on()
            time.sleep(0.05)
        time.sleep(later_s)
        self._go_on()
        self._child.kill()
        self._child.communicate()
        assert self._child.returncode == -signal.SIGKILL

    def _go_on(self) -> None:
        if self._child.poll() is not None:
            raise SystemExit("the job ended before it was killed; make it longer with --documents")

    def end(self) -> None:
        if self._child.communicate() and self._child.returncode:
            raise SystemExit(f"the job failed with status {self._child.returncode}")


def tables(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity of each part that is there."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}


def killed(shards: list[str], out: Path, model: str | None, kills: int, parts: int, whole_s: float) -> dict[str, Any]:
    """Kill a job of so many parts `kills` times on its way and let it end; per kill the parts that were there, and
    those that were made again."""
    rng = random.Random(1)
    log = []
    began = time.monotonic()
    for kill in range(kills):
        before = tables(out)
        wanted = int((kill + rng.random()) / kills * (parts - 1))
        Run(shards, out, model).kill_at(out, wanted, rng.random() * whole_s / parts)
        after = tables(out)
        log.append({"parts": len(after), "made_again": sum(after[p] != before[p] for p in before)})
        print(f"killed with {len(after)} parts", flush=True)
    before = tables(out)
    Run(shards, out, model).end()
    after = tables(out)
    # What a run made again is what the kill before it had left without its record.
    again = [entry["made_again"] for entry in log[1:]] + [sum(after[p] != before[p] for p in before)]
    if max(again) > 1:
        raise SystemExit(f"expected at most one part made again after each kill, found {again}")
    for entry, n in zip(log, again, strict=True):
        entry["made_again"] = n
    return {"kills": log, "elapsed_s": time.monotonic() - began}


def groups(part: Path) -> Iterator[Any]:
    with pq.ParquetFile(part) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def check(whole: Path, other: Path, n_documents: int) -> None:
    """Each document has one row, in order, and it is the same in both folders."""
    parts = sorted(path.name for path in whole.glob("*.parquet"))
    if parts != sorted(path.name for path in other.glob("*.parquet")):
        raise SystemExit("expected the same parts in both folders, found others")
    n_rows = 0
    for part in parts:
        for one, two in zip(groups(whole / part), groups(other / part), strict=True):
            if not one.equals(two):
                raise SystemExit(f"expected equal rows, found others in {part} after row {n_rows}")
            if one["id"].to_pylist() != [f"{i:08}" for i in range(n_rows, n_rows + len(one))]:
                raise SystemExit(f"expected a row for each document in order, found others in {part} at row {n_rows}")
            n_rows += len(one)
    if n_rows != n_documents:
        raise SystemExit(f"expected {n_documents} rows, found {n_rows}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here as JSON")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--model", help="a checkpoint [default: a small one over bytes, made here]")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or str(byte_model(folder / "bytes.safetensors"))
        cases = {}
        for n in (SMALL, options.documents):
            cases[f"{n}"] = Run(write_shards(folder / f"shards-{n}", n), folder / f"rows-{n}", model).measured()
            print(f"{n:>9} documents: {json.dumps(cases[f'{n}'])}", flush=True)
        small, large = (cases[f"{n}"]["peak_rss_mib"] for n in (SMALL, options.documents))
        print(f"growth: {large / small - 1:+.2%}", flush=True)
        shards = [str(path) for path in sorted((folder / f"shards-{options.documents}").iterdir())]
        out = folder / "rows-killed"
        parts, whole_s = (cases[f"{options.documents}"][name] for name in ("parts", "elapsed_s"))
        kills = killed(shards, out, model, options.kills, parts, whole_s)
        check(folder / f"rows-{options.documents}", out, options.documents)
        print(f"killed {options.kills} times: one row for each document, in order, bit for bit the same")
    results = {
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
        "model": options.model or "one layer of width 64 over bytes, random weights",
        "documents": options.documents,
        "cases": cases,
        "growth": large / small - 1,
        "killed": {**kills, "rows": options.documents, "equal": True},
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
