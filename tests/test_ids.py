"""Processes that share the tests among them find the same ones, in the same order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STARTED = time.time()


def test_another_collection_finds_the_same_tests(request: pytest.FixtureRequest) -> None:
    """Later, in another process, with another order of sets."""
    time.sleep(max(0, STARTED + 2 - time.time()))
    own = [item.nodeid for item in request.session.items]
    files = dict.fromkeys(name.split("::")[0] for name in own)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "--assert=plain", "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONHASHSEED": "12345"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:]
    names = set(own)
    assert [line for line in run.stdout.splitlines() if line in names] == own
    assert [name for name in own if re.search(r"\bat 0x[0-9a-f]+", name)] == []
