"""Packages that only an extra of this one brings: `pip install 'rwkv-stream[EXTRA]'`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rwkv_stream.errors import RwkvStreamError


def missing(package: str, extra: str) -> str:
    """For a message: that a package is not there, and how to get it."""
    return f"expected the package {package}, found none; pip install 'rwkv-stream[{extra}]'"


@contextlib.contextmanager
def needed(package: str, extra: str, doing: str, kind: type[RwkvStreamError]) -> Iterator[None]:
    """Import a package of an extra in the block; raises `kind`, whose exit code is 1, where it is not installed.

    >>> with needed("matplotlib", "plot", f"drawing '{path}'", OutputError):
    ...     import matplotlib
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{doing}: {missing(package, extra)}") from error
