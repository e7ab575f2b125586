"""A log that is written to and rotated, in each of the ways that are in use."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

WAYS = ("renamed", "renamed, packed at once", "renamed, packed later", "dated", "copied and cut")


class Log:
    """A log file, what was written to it so far, and its rotation in one way."""

    def __init__(self, folder: Path, way: str, name: str = "app.log") -> None:
        self.path, self.way = folder / name, way
        self.lines = self.rotations = 0
        self.written = b""
        self.path.touch()

    def line(self) -> bytes:
        self.lines += 1
        return b"2026-11-%02d 10:00:00 line %06d of the log, \xc3\xa9\n" % (1 + self.lines % 28, self.lines)

    def write(self, n_lines: int = 1) -> None:
        self.append(b"".join(self.line() for _ in range(n_lines)))

    def append(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)
        self.written += data

    def rotate(self, before_the_cut: Callable[[], object] | None = None) -> None:
        """Rotate; `before_the_cut` is what the writer does between copy and cut."""
        self.rotations += 1
        if self.way == "dated":
            self.path.rename(self.path.with_name(f"{self.path.name}-2026{self.rotations:04}"))
            self.path.touch()
            return
        for n in range(self.rotations, 0, -1):
            for packed in ("", ".gz"):
                old = self.path.with_name(f"{self.path.name}.{n}{packed}")
                if old.exists():
                    old.rename(self.path.with_name(f"{self.path.name}.{n + 1}{packed}"))
        first = self.path.with_name(f"{self.path.name}.1")
        if self.way == "copied and cut":
            shutil.copyfile(self.path, first)
            if before_the_cut is not None:
                before_the_cut()
            with self.path.open("r+b") as file:
                file.truncate()
            return
        if self.way == "renamed, packed later":
            pack(self.path.with_name(f"{self.path.name}.2"))
        self.path.rename(first)
        self.path.touch()
        if self.way == "renamed, packed at once":
            pack(first)


def pack(path: Path) -> None:
    """As gzip does."""
    if path.exists():
        packed = path.with_name(f"{path.name}.gz")
        with path.open("rb") as file, gzip.open(packed, "wb") as out:
            shutil.copyfileobj(file, out)
        shutil.copystat(path, packed)
        path.unlink()
