"""A corpus cut into parts: runs of documents, decided once from the inputs alone, whoever goes through them.

A part ends with a file when it holds `part_bytes` or more, and after `part_documents` documents in any case.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_stream.text.readers import Document, documents

PART_DOCUMENTS = 10_000
PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A run of documents: how many, the name of the first, and a digest of their names and of their files' identity."""

    number: int
    first: str
    documents: int
    digest: str

    @property
    def name(self) -> str:
        return f"part-{self.number:05}"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sources, how they are read (arguments of `readers.documents`), and how large parts of them are."""

    sources: tuple[str, ...]
    reading: Mapping[str, Any]
    part_documents: int = PART_DOCUMENTS
    part_bytes: int = PART_BYTES

    def runs(self) -> Iterator[DocumentRun]:
        """The documents in the runs that make parts; each is to be used up before the next is asked for."""
        number = n_documents = n_bytes = 0
        path: str | None = None

        def part_of(document: Document) -> int:
            nonlocal number, n_documents, n_bytes, path
            is_new = document.path != path
            if n_documents == self.part_documents or (is_new and n_bytes >= self.part_bytes):
                number, n_documents, n_bytes = number + 1, 0, 0
            if is_new:
                path = document.path
                n_bytes += _size(document.path, self.part_bytes)
            n_documents += 1
            return number

        for number_of_run, run in itertools.groupby(documents(self.sources, rows=True, **self.reading), part_of):
            yield DocumentRun(number_of_run, run)


class DocumentRun:
    """The documents of one part, which notes what goes by."""

    def __init__(self, number: int, run: Iterator[Document]) -> None:
        self._number, self._run = number, run
        self._first = ""
        self._n = 0
        self._hash = hashlib.sha256()
        self._path: str | None = None

    def __iter__(self) -> Iterator[Document]:
        for document in self._run:
            if not self._n:
                self._first = document.name
            if not self._n or document.path != self._path:
                self._path = document.path
                self._hash.update(_identity(document.path).encode() + b"\0")
            self._hash.update(document.name.encode("utf-8", "surrogateescape") + b"\0")
            self._n += 1
            yield document

    def part(self) -> Part:
        """What they are together; goes through those that are left."""
        for _ in self:
            pass
        return Part(self._number, self._first, self._n, self._hash.hexdigest())


def _size(path: str | None, unknown: int) -> int:
    try:
        return Path(path or "").stat().st_size
    except (OSError, ValueError):
        return unknown  # a URL, or what reading will complain of


def _identity(path: str | None) -> str:
    try:
        found = Path(path or "").stat()
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"
