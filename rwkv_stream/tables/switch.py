"""A set of files that takes the place of another one in a folder: killed at any step, there is never some of each.

The new set is made in a folder of its own, inside the one that it is for. When it is whole, it is renamed to READY:
from here on the step is taken, by whoever comes next. The old files are removed; READY is renamed to ARRIVING; its
files are moved out of it, and it is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rwkv_stream.files import failpoint, fsync_folder, remove

READY, ARRIVING = "_ready", "_arriving"
FAILPOINTS = ("switch.ready", "switch.cleared", "switch.arriving", "switch.moved", "switch.done")

Stale = Callable[[Path], Iterable[Path]]  # what the files of the folder READY take the place of


def switch(folder: Path, made: Path, stale: Stale) -> None:
    """Let the files in the folder `made` take the place of others in `folder`, which holds it."""
    fsync_folder(made)
    made.rename(folder / READY)
    fsync_folder(folder)
    failpoint("switch.ready")
    finish(folder, stale)


def finish(folder: Path, stale: Stale) -> None:
    """Take what is left of the steps of a switch, if one was begun."""
    ready, arriving = folder / READY, folder / ARRIVING
    if ready.is_dir():
        for path in stale(ready):
            remove(path)
            failpoint("switch.cleared")
        fsync_folder(folder)
        ready.rename(arriving)
        fsync_folder(folder)
        failpoint("switch.arriving")
    if arriving.is_dir():
        for path in sorted(arriving.iterdir()):
            if path.is_dir() and (folder / path.name).exists():  # a search index, which belongs to the old tables
                remove(folder / path.name)
            path.rename(folder / path.name)
            failpoint("switch.moved")
        fsync_folder(folder)
        arriving.rmdir()
        fsync_folder(folder)
        failpoint("switch.done")
