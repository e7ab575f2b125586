"""A document read to its end: its text, and what of it could not be read; by a user for whom permissions hold."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers import Document, document


def reading(source: Document | str, encoding: str | None = None) -> tuple[str, list[str]]:
    """The text, empty where it cannot be read at all, and a line for each loss."""
    found = document(source) if isinstance(source, str) else source
    try:
        with found.text(encoding) as text:
            read = b"".join(text).decode()
            losses = [str(loss) for loss in text.losses]
    except InputError as error:
        read, losses = "", [str(error)]
    assert all(len(line.splitlines()) == 1 and line.startswith("reading ") for line in losses)
    return read, losses


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Be a user for whom permissions hold, and who can reach `folder`."""
    if os.geteuid() != 0:
        yield
        return
    for parent in [folder, *folder.parents]:
        if not parent.is_relative_to(tempfile.gettempdir()) or str(parent) == tempfile.gettempdir():
            break
        parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        if not os.access(folder, os.X_OK, effective_ids=True):
            pytest.skip(f"an unprivileged user cannot reach '{folder}'")
        yield
    finally:
        os.seteuid(0)
