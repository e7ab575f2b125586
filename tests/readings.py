"""A document read to its end: its text, and what of it could not be read."""

from __future__ import annotations

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
    assert all(len(line.splitlines()) == 1 and line.startswith("reading '") for line in losses)
    return read, losses
