"""A log that is followed through rotations and kills: no line lost, none doubled, memory flat.

    python benchmarks/follow.py [--out benchmarks/results/follow.json] [--lines N] [--rotate-every N] [--kills N]

Lines of `samples/weblog.py` are written to a file, a quarter of them for each way of rotation: renamed, with a dated
name, packed with gzip at once, and copied and cut (the writer pauses between copy and cut). The program follows the
file as a child, which is killed with SIGKILL at seeded moments and started again at once. The writer does not wait for
it: rotated files pile up, and how far the reading is behind is told by the child's own lines.

In the end the kept text must be what was written, byte for byte, and the state that of reading it in one go. The peak
of the child's resident set is read from /proc (VmHWM), for the child that lived longest in the first and in the last
third of a way. A one-layer model over bytes with seeded random weights is used, which is made here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from memory import PROGRAM, byte_model

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))

import weblog

from rwkv_stream.store import Store

WAYS = ("renamed", "dated", "packed", "copied and cut")
NAME = "app"
CHUNK, EVERY = 8192, 131_072
POLL_S = 0.5


class Writer(threading.Thread):
    """Writes a log and rotates it."""

    def __init__(self, path: Path, whole: Path, way: str, lines: int, rotate_every: int, pace_s: float) -> None:
        super().__init__()
        self.path, self.whole, self.way = path, whole, way
        self.lines, self.rotate_every, self.pace_s = lines, rotate_every, pace_s
        self.rotations = 0

    def run(self) -> None:
        with self.whole.open("wb") as whole:
            for n, (entry, _) in enumerate(weblog.log(self.lines, WAYS.index(self.way)), 1):
                line = f"{entry}\n".encode()
                with self.path.open("ab") as file:
                    file.write(line)
                whole.write(line)
                if n % self.rotate_every == 0:
                    self.rotate()
                    time.sleep(self.pace_s)

    def rotate(self) -> None:
        self.rotations += 1
        if self.way == "dated":
            self.path.rename(self.path.with_name(f"{self.path.name}-2026{self.rotations:04}"))
            return
        for n in range(self.rotations, 0, -1):
            for old in self.path.parent.glob(f"{self.path.name}.{n}*"):
                packed = ".gz" if old.suffix == ".gz" else ""
                if old.name == f"{self.path.name}.{n}{packed}":
                    old.rename(self.path.with_name(f"{self.path.name}.{n + 1}{packed}"))
        first = self.path.with_name(f"{self.path.name}.1")
        if self.way == "copied and cut":
            shutil.copyfile(self.path, first)
            os.truncate(self.path, 0)
            return
        self.path.rename(first)
        if self.way == "packed":
            packed = first.with_name(f"{first.name}.gz")
            with first.open("rb") as file, gzip.open(packed, "wb") as out:
                shutil.copyfileobj(file, out)
            shutil.copystat(first, packed)
            first.unlink()


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found is not None else 0


def followed(folder: Path, model: Path, way: str, lines: int, rotate_every: int, kills: int) -> dict[str, Any]:
    rng = random.Random(way)
    store_path, errors = folder / "a.store", folder / "errors"
    (folder / "logs").mkdir()
    log = folder / "logs" / "app.log"
    log.touch()
    writer = Writer(log, folder / "whole.log", way, lines, rotate_every, pace_s=1)
    options = ["--threads", "1", "--model", str(model), "--store", str(store_path)]
    command = [*PROGRAM, *options, "ingest", "--follow", str(log), "--name", NAME]
    command += ["--chunk", str(CHUNK), "--snapshot-every", str(EVERY)]

    def start() -> subprocess.Popen[bytes]:
        with errors.open("ab") as file:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)

    def stands_at() -> int:
        if not (store_path / "format").exists():
            return 0
        store = Store(store_path)
        head = next((store.get(at) for document, _, at in store.heads() if document == NAME), None)
        return head.bytes if head is not None else 0

    started = time.monotonic()
    writer.start()
    child = start()
    peaks: list[tuple[int, int]] = []  # where the reading stood, and the child's peak
    thresholds: list[int] = []
    size = None
    done = 0
    while True:
        time.sleep(POLL_S)
        assert child.poll() is None, errors.read_text()[-2000:]
        at = stands_at()
        peaks.append((at, peak_bytes(child.pid)))
        if size is None and not writer.is_alive():
            size = (folder / "whole.log").stat().st_size
            thresholds = sorted(rng.randrange(size) for _ in range(kills - done))
        if size is None:  # kills while the log is written, too
            if done < kills // 3 and rng.random() < POLL_S / 5:
                child.send_signal(signal.SIGKILL)
                child.wait()
                done, child = done + 1, start()
            continue
        while thresholds and thresholds[0] < at:
            thresholds.pop(0)
            time.sleep(rng.random())
            child.send_signal(signal.SIGKILL)
            child.wait()
            done, child = done + 1, start()
        if size - at < EVERY and done >= kills:
            break
        if size - at < EVERY:
            child.send_signal(signal.SIGKILL)
            child.wait()
            done, child = done + 1, start()
            time.sleep(rng.random())
    for patience_s in (20, 40, 80, 160):  # what is whole of the last interval is kept when it is stopped
        time.sleep(patience_s)
        child.send_signal(signal.SIGTERM)
        status = child.wait()
        if size - stands_at() <= CHUNK:
            break
        child = start()
    elapsed_s = time.monotonic() - started
    store = Store(store_path)
    head = store.get(NAME)
    text = store.text(head)
    assert text is not None
    with (folder / "whole.log").open("rb") as file:
        same = all(piece == file.read(len(piece)) for piece in text.pieces())
    said = errors.read_text()
    behind = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes behind", said)]
    once = [*PROGRAM, *options[:-1], str(folder / "one.store"), "ingest", str(folder / "whole.log"), "--name", NAME]
    once += ["--encoding", "utf-8", "--chunk", str(CHUNK), "--snapshot-every", str(EVERY)]
    once += ["--max-tokens", str(head.tokens)]
    one_go = subprocess.run(once, capture_output=True, text=True, check=True)
    third = size // 3
    early = max((peak for at, peak in peaks if at < third), default=0)
    late = max((peak for at, peak in peaks if at > 2 * third), default=0)
    return {
        "way": way,
        "lines": lines,
        "rotations": writer.rotations,
        "bytes_written": size,
        "bytes_kept": head.bytes,
        "lines_kept": (folder / "whole.log").read_bytes()[: head.bytes].count(b"\n"),
        "text_is_what_was_written": same,
        "state_is_that_of_one_go": one_go.stdout.strip() == head.id,
        "kills": done,
        "exit_status": status,
        "gaps_told": said.count("missing") + said.count("is there any more"),
        "most_bytes_behind": max(behind, default=0),
        "peak_first_third_bytes": early,
        "peak_last_third_bytes": late,
        "elapsed_s": round(elapsed_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--lines", type=int, default=2_000_000, help="of all ways together (default: 2000000)")
    parser.add_argument("--rotate-every", type=int, default=50_000, metavar="LINES")
    parser.add_argument("--kills", type=int, default=20, help="of all ways together (default: 20)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    arguments = parser.parse_args()
    n = len(arguments.ways)
    results = []
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            model = byte_model(Path(folder) / "model.safetensors")
            found = followed(
                Path(folder), model, way, arguments.lines // n, arguments.rotate_every, arguments.kills // n
            )
        results.append(found)
        print(json.dumps(found), flush=True)
    whole = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "results": results}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    if not all(one["text_is_what_was_written"] and one["state_is_that_of_one_go"] for one in results):
        sys.exit("a line was lost or doubled")


if __name__ == "__main__":
    main()
