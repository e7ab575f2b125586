"""Remote files: whatever `fsspec` opens by a URL (s3, gs, http, memory, …), read forward through its cache."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from rwkv_stream.errors import InputError, RwkvStreamError
from rwkv_stream.extras import needed
from rwkv_stream.text.readers.streams import Raw, said

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:::[^:]*)?://")
_LISTED = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Remote:
    url: str

    def open(self, name: str) -> Raw:
        system, path = _system(self.url)
        with _answered():
            file = system.open(path, "rb")
        is_seekable = bool(file.seekable())

        def read1(size: int) -> bytes:
            with _answered():
                return cast("bytes", file.read(size))

        return Raw(
            read1, file.size if is_seekable else None, file.close, file=cast("BinaryIO", file) if is_seekable else None
        )


def is_url(source: str) -> bool:
    return _URL.match(source) is not None


def urls(source: str) -> Iterator[tuple[str, str | None]] | None:
    """The files below a folder, with their paths in it, or of a pattern, sorted; None where `source` is one file.
    Raises InputError."""
    system, path = _system(source)
    if source.startswith(("http:", "https:")):
        return None  # a page with links is no folder, and a question mark no pattern
    try:
        with _answered():
            is_pattern = _LISTED.search(path) is not None
            if is_pattern:
                found = system.glob(path, detail=True)
            elif system.isdir(path):
                found = system.find(path, detail=True)
            else:
                return None
    except OSError as error:
        raise InputError(f"reading '{source}': expected to list it, found: {error.strerror}; check the URL") from error
    below = None if is_pattern else len(path.rstrip("/")) + 1
    return (
        (system.unstrip_protocol(file), None if below is None else file[below:])
        for file in sorted(found)
        if found[file]["type"] == "file"
    )


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it; raises InputError."""
    with needed("fsspec", "remote", f"reading '{url}'", InputError):
        from fsspec.core import url_to_fs
    try:
        return cast("tuple[Any, str]", url_to_fs(url))
    except ImportError as error:  # fsspec says which package its protocol needs
        raise InputError(f"reading '{url}': expected what its protocol needs, found: {error}") from error
    except ValueError as error:
        raise InputError(f"reading '{url}': expected a URL that fsspec knows, found: {error}") from error


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """Whatever a file system raises, as OSError: each has its own."""
    try:
        yield
    except RwkvStreamError:  # an interruption
        raise
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or _said(error)) from error
    except Exception as error:
        raise OSError(errno.EIO, _said(error)) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {said(error)}"
