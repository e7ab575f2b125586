"""A filesystem that remembers in which order a folder was written to, and what a power cut at any moment leaves of it.

`Recorder` wraps the functions through which the store writes and keeps a log. A `Disk` replays a log: it knows what the
folder looks like to programs, and what of it is surely on the disk. `Disk.after_power_cut` makes a folder that the disk
may hold then, by the rules that every POSIX filesystem keeps:

* the bytes of a file are there once the file was synced; else any part of them, here none or all
* a name in a folder (made, moved or removed) is there, or gone, once the folder was synced; else either way, each name
  for itself

sqlite's own writes cannot be seen from here: the catalog is what its last commit made it, or absent.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rwkv_stream.store import catalog

UNSEEN = ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm")


class Event(NamedTuple):
    """`kind`: make, sync, move, link, remove, folder, no folder, sync folder, catalog, told; paths are relative."""

    kind: str
    path: str = ""
    to: str = ""
    data: Any = None


class Recorder:
    """Logs what is done under `root` while the patch holds."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.log = root, list[Event]()
        self.open_paths: dict[int, str] = {}
        for name in ("open", "fsync", "replace", "rename", "unlink", "remove", "link", "mkdir", "rmdir", "close"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        patch.setattr(io, "open", self._wrapped("io_open", io.open))
        real = catalog.failpoint

        def failpoint(name: str) -> None:
            if name == "catalog.committed":
                self.log.append(Event("catalog", data=committed(root / UNSEEN[0])))
            real(name)

        patch.setattr(catalog, "failpoint", failpoint)

    def tell(self, data: Any) -> None:
        """Note in the log that somebody was told something."""
        self.log.append(Event("told", data=data))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            record = getattr(self, f"_{name}")
            return record(real, *args, **kwargs)

        return call

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path relative to the root; None for what is not under it or not ours to see."""
        if isinstance(path, int):
            return None
        base = Path(f"/proc/self/fd/{dir_fd}").readlink() if dir_fd is not None else Path.cwd()
        whole = base / os.fsdecode(path)
        if not whole.is_relative_to(self.root):
            return None
        relative = str(whole.relative_to(self.root))
        return None if relative in UNSEEN else relative

    def _open(self, real: Callable[..., int], path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        relative = self._inside(path, kwargs.get("dir_fd"))
        is_new = relative is not None and flags & os.O_CREAT and not (self.root / relative).exists()
        descriptor = real(path, flags, *args, **kwargs)
        if relative is not None:
            self.open_paths[descriptor] = relative
            if is_new:
                self.log.append(Event("make", relative))
        return descriptor

    def _io_open(self, real: Callable[..., Any], path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        relative = self._inside(path)
        is_new = relative is not None and not (self.root / relative).exists()
        file = real(path, mode, *args, **kwargs)
        if relative is not None and is_new:
            self.open_paths[file.fileno()] = relative
            self.log.append(Event("make", relative))
        return file

    def _close(self, real: Callable[..., None], descriptor: int) -> None:
        self.open_paths.pop(descriptor, None)
        real(descriptor)

    def _fsync(self, real: Callable[..., None], descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(self.root):
            relative = str(path.relative_to(self.root))
            if path.is_dir():
                self.log.append(Event("sync folder", relative))
            else:
                self.log.append(Event("sync", relative, data=path.read_bytes()))

    def _replace(self, real: Callable[..., None], source: Any, target: Any) -> None:
        a, b = self._inside(source), self._inside(target)
        real(source, target)
        if a is not None and b is not None:
            self.log.append(Event("move", a, b))

    _rename = _replace

    def _link(self, real: Callable[..., None], source: Any, target: Any, **kwargs: Any) -> None:
        a, b = self._inside(source), self._inside(target)
        real(source, target, **kwargs)
        if a is not None and b is not None:
            self.log.append(Event("link", a, b))

    def _unlink(self, real: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        relative = self._inside(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if relative is not None:
            self.log.append(Event("remove", relative))

    _remove = _unlink

    def _mkdir(self, real: Callable[..., None], path: Any, *args: Any, **kwargs: Any) -> None:
        relative = self._inside(path)
        real(path, *args, **kwargs)
        if relative is not None:
            self.log.append(Event("folder", relative))

    def _rmdir(self, real: Callable[..., None], path: Any, *, dir_fd: int | None = None) -> None:
        relative = self._inside(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if relative is not None:
            self.log.append(Event("no folder", relative))


def committed(path: Path) -> bytes:
    """What the catalog holds now, as one file."""
    beside = path.parent.with_name("catalog-copied")
    with sqlite3.connect(path) as db, sqlite3.connect(beside) as copy:
        db.backup(copy)
    db.close()
    copy.close()
    data = beside.read_bytes()
    beside.unlink()
    return data


Image = dict[str, bytes | None]  # a folder: name → bytes, None for a folder in it; parents first


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.synced = data  # what is surely on the disk


_FOLDER = object()


class Disk:
    """A folder as programs see it (`seen`) and as the disk surely has it (`kept`): name → file or folder."""

    def __init__(self, root: Path) -> None:
        self.seen: dict[str, Any] = {}
        self.catalog: bytes | None = None
        for path in sorted(root.rglob("*")) if root.exists() else ():
            relative = str(path.relative_to(root))
            if relative == UNSEEN[0]:
                self.catalog = committed(path)
            elif relative not in UNSEEN:
                self.seen[relative] = _FOLDER if path.is_dir() else _File(path.read_bytes())
        self.seen["."] = _FOLDER
        self.kept = dict(self.seen)

    def replay(self, event: Event) -> None:
        match event:
            case ("make", path, _, _):
                self.seen[path] = _File()
            case ("sync", path, _, data):
                self.seen[path].synced = data
            case ("move", path, to, _):
                self.seen[to] = self.seen.pop(path)
            case ("link", path, to, _):
                self.seen[to] = self.seen[path]
            case ("remove" | "no folder", path, _, _):
                del self.seen[path]
            case ("folder", path, _, _):
                self.seen[path] = _FOLDER
            case ("sync folder", path, _, _):
                for name in self._names(path):
                    self._keep(name)
            case ("catalog", _, _, data):
                self.catalog = data

    def _names(self, folder: str) -> set[str]:
        return {name for name in (*self.seen, *self.kept) if name != "." and str(Path(name).parent) == folder}

    def _keep(self, name: str) -> None:
        if name in self.seen:
            self.kept[name] = self.seen[name]
        else:
            self.kept.pop(name, None)

    def unsure(self) -> list[str]:
        """The names that may or may not be as programs see them."""
        names = {*self.seen, *self.kept}
        return sorted(
            name
            for name in names
            if self.seen.get(name) is not self.kept.get(name)
            and all(str(folder) in names for folder in Path(name).parents)
        )

    def after_power_cut(self, is_seen: Callable[[str], bool], *, has_catalog: bool = True) -> Image:
        """The folder, each unsure name as it was seen or as it was kept; unsynced bytes are lost."""
        names = {**self.kept}
        for name in self.unsure():
            if is_seen(name):
                if name in self.seen:
                    names[name] = self.seen[name]
                else:
                    names.pop(name, None)
        image: Image = {}
        for name in sorted(names):
            if name == "." or image.get(str(Path(name).parent), b"") is None:
                image[name] = None if names[name] is _FOLDER else names[name].synced
        if has_catalog and self.catalog is not None:
            image[UNSEEN[0]] = self.catalog
        return image


def power_cuts(before: Disk, log: list[Event], folder: Path, *, keeps_catalog: bool) -> Any:
    """(number of events until then, how, the folder) for cuts after each event; a folder lives for one step. Folders
    that were there before, since somebody was told something, are left out."""
    there: list[Image] = []
    rng = random.Random(0)
    ways: dict[str, Callable[[str], bool]] = {
        "nothing that was not synced": lambda name: False,
        "all names": lambda name: True,
        "some names": lambda name: rng.random() < 0.5,
        "other names": lambda name: rng.random() < 0.5,
    }
    for count, event in enumerate(log, start=1):
        before.replay(event)
        if event.kind == "told":
            there.clear()
        for way, is_seen in ways.items():
            image = before.after_power_cut(is_seen, has_catalog=keeps_catalog or way != "other names")
            if image in there:
                continue
            there.append(image)
            target = folder / "image"
            for name, data in image.items():
                if data is None:
                    (target / name).mkdir()
                else:
                    (target / name).write_bytes(data)
            yield count, way, target
            shutil.rmtree(target)
