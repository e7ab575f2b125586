"""Places where a remote store may lie: a server that speaks S3, and file systems that fail at will."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class BrokenError(Exception):
    """A connection that breaks after so many bytes."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__(n_bytes)
        self.n_bytes = n_bytes


@dataclass
class Line:
    """What goes over a connection, and what becomes of it.

    sent, got  path and bytes of each transfer that was begun
    put, get   given the path and the bytes of one, return what arrives, or raise BrokenError
    changed    is called after each change of the remote
    """

    put: Callable[[str, bytes], bytes] = lambda path, data: data
    get: Callable[[str, bytes], bytes] = lambda path, data: data
    changed: Callable[[], object] = lambda: None
    sent: list[tuple[str, int]] = field(default_factory=list)
    got: list[tuple[str, int]] = field(default_factory=list)


class Far(MemoryFileSystem):  # type: ignore[misc]
    """A file system of folders: a file under its name may be half, so it is sent under another and renamed."""

    protocol = ("far",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    line: ClassVar[Line] = Line()
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace(f"{cls.protocol[0]}://", "memory://")))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        path = self._strip_protocol(path)
        with self.lock:
            self.line.sent.append((path, len(value)))
            try:
                value = self.line.put(path, value)
            except BrokenError as broken:
                if "memory" not in self.protocol:
                    super().pipe_file(path, value[: broken.n_bytes])
                raise ConnectionResetError("connection reset by peer") from broken
            super().pipe_file(path, value)
            self.line.changed()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        path = self._strip_protocol(path)
        data = super().cat_file(path, start, end)
        with self.lock:
            self.line.got.append((path, len(data)))
            try:
                return self.line.get(path, data)
            except BrokenError as broken:
                raise ConnectionResetError("connection reset by peer") from broken

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        with self.lock:
            self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))
            self.line.changed()


class FarBucket(Far):
    """A bucket: a file is whole or absent."""

    protocol = ("farbucket", "memory")


for _kind in (Far, FarBucket):
    fsspec.register_implementation(_kind.protocol[0], _kind, clobber=True)


@contextmanager
def far(line: Line) -> Iterator[Line]:
    """The two of them, empty, by a connection."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Far, FarBucket):
            patch.setattr(kind, "store", {})
            patch.setattr(kind, "pseudo_dirs", [""])
            patch.setattr(kind, "line", line)
        yield line


def laid_out(files: dict[str, Any], root: str, folder: Path) -> Path:
    """What lies under a path of such a file system, in a folder."""
    for name, file in files.items():
        if name.startswith(f"{root}/"):
            path = folder / name[len(root) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    return folder


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a bucket, on a server of this process that speaks S3; the environment leads its clients there."""
    for package in ("s3fs", "moto", "flask_cors", "boto3"):
        pytest.importorskip(package, reason=f"the package {package} is absent: pip install -e '.[dev]'")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        import logging

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        patch.setitem(os.environ, "AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="bucket")
        try:
            yield "s3://bucket"
        finally:
            server.stop()
