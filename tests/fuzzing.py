"""Made-up bytes, and a child process with limited memory and time in which they are tried."""

from __future__ import annotations

import random
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path

from fake_snapshots import in_child
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MEMORY_BYTES = 3 << 28  # three times the state that needs no excuse for being large
CASE_S = 10


def within_bounds(work: Callable[[], object], memory: int = MEMORY_BYTES) -> None:
    """Run `work` in a child that may take so many bytes more than it has."""

    def child() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
        work()

    assert in_child(child) == 0


def cases(case: Callable[[random.Random], object], n: int, memory: int = MEMORY_BYTES) -> None:
    """Draw `n` cases, none of which may hang or take more memory."""

    @settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def each(rng: random.Random) -> None:
        signal.alarm(CASE_S)
        case(rng)
        signal.alarm(0)

    within_bounds(each, memory)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to three changes that know nothing of the format."""
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randint(0, len(data)), rng.choice([1, 1, 2, 4, 8, 32, 200])
        match rng.randrange(7):
            case 0 if data:
                at = min(at, len(data) - 1)
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + rng.randbytes(n) + data[at:]
            case 3:
                data = data[:at] + data[at + n :]
            case 4:
                data = data[:at] + rng.choice([b"\xff", b"\0", b"\x7f"]) * n + data[at + n :]
            case 5:
                other = rng.randint(0, len(data))
                data = data[:at] + data[other : other + n] + data[at:]
            case 6:
                data = data[:at] + struct.pack("<I", rng.choice([2**31, 2**32 - 1, 2**31 - 1, 65_536])) + data[at + 4 :]
    return data
