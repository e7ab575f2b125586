"""Remote files: whatever `fsspec` opens by a URL (s3, gs, http, memory, …), read forward through its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from rwkv_stream.errors import InputError
from rwkv_stream.filesystems import answered, open_url
from rwkv_stream.text.readers.streams import Raw

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:::[^:]*)?://")
_LISTED = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Remote:
    url: str

    def open(self, name: str) -> Raw:
        system, path = _system(self.url)
        with answered():
            file = system.open(path, "rb")
        is_seekable = bool(file.seekable())

        def read1(size: int) -> bytes:
            with answered():
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
        with answered():
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
    return open_url(url, f"reading '{url}'", InputError)
