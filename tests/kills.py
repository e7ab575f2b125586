"""Processes that stop at a failpoint or are killed there, and what must hold of a store whatever was killed in it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rwkv_stream import files
from rwkv_stream.files import TEMP_PREFIX
from rwkv_stream.store import Store
from rwkv_stream.store.layout import files as files_of

LOCKS = {"locks/create", "locks/store", "locks/publish"}


def killed(status: int) -> bool:
    """Whether a wait status is that of a process that was killed; any other end must be a good one."""
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def at_failpoints(visit: Callable[[str], object]) -> None:
    """From now on, let this process (a child of the test's) call `visit` at each failpoint that it passes."""
    real = files.failpoint
    for name, module in list(sys.modules.items()):
        if name.startswith("rwkv_stream") and getattr(module, "failpoint", None) is real:
            module.failpoint = visit  # type: ignore[attr-defined]


def stop_at(name: str, stopped: Path) -> None:
    """From now on, let this process touch `stopped` at a failpoint and wait there until `stopped` is gone."""

    def visit(passed: str) -> None:
        if passed == name:
            hold(stopped)

    at_failpoints(visit)


def hold(stopped: Path) -> None:
    """Touch `stopped` and wait until it is gone."""
    stopped.touch()
    wait_until(lambda: not stopped.exists())


def wait_until(condition: Callable[[], bool], limit_s: float = 30) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for nothing"
        time.sleep(0.001)


def on_disk(path: Path) -> set[str]:
    """Every file of a store, relative to it."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def assert_sound(path: Path) -> None:
    """It opens, which clears up behind the dead, and agrees with itself down to the bytes of its objects."""
    store = Store(path)
    strays = [*path.rglob(f"{TEMP_PREFIX}*"), *(path / "locks" / "writers").iterdir()]
    assert strays == [], strays
    damaged = store.verify(read_data=True).damaged
    assert damaged == [], damaged


def assert_nothing_stray(path: Path) -> None:
    """Just pruned, it has the files that its heads and tags lead to, and no other."""
    store = Store(path)._files
    heads, tags = [*files_of(store.heads)], [*files_of(store.tags)]
    ids = [ref.snapshot for ref in (*map(store.read_head, heads), *map(store.read_tag, tags)) if ref is not None]
    wanted, derived = {store.format, store.catalog, *heads, *tags}, set[Path]()
    while ids:
        identity = ids.pop()
        record = store.read_record(identity)
        if record is not None and store.record_path(identity) not in wanted:
            wanted |= {store.record_path(identity)}
            wanted |= {store.objects.path(stored.name) for stored in record.objects}
            in_files = record.text if record.inline_extent is None else None
            extents = {extent.name for extent in store.texts.chain(in_files)}
            wanted |= set(map(store.texts.path, extents))
            derived |= set(map(store.texts.postings_path, extents))
            ids += [name for name in (record.parent, record.start) if name is not None]
    found = {name for name in on_disk(path) - LOCKS if not name.startswith("quarantine/")}
    found -= {str(file.relative_to(path)) for file in derived}
    differing = found ^ {str(file.relative_to(path)) for file in wanted}
    assert not differing, differing
