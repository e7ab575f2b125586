"""Which documents are trained on, which settings are chosen on, and which figures are reported on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rwkv_stream.training import recipe

Part = Literal["train", "tune", "report"]


def key(record: Mapping[str, Any]) -> str:
    """A record's document as 16 hexadecimal digits: of its title, or the last part of its document's or own id.

    Case, blanks and punctuation do not count, so that an article and the questions on it fall in one part.
    """
    name = record.get("title") or str(record.get("document") or record.get("id", "")).rpartition("/")[2]
    letters = "".join(z for z in name.casefold() if z.isalnum())
    return hashlib.sha256(letters.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Split:
    """
    files   patterns of the names of files that are reported on whole
    report  keys of documents that are reported on, wherever they stand
    tune    keys of documents that thresholds and the like are chosen on, and that are not trained on
    """

    files: tuple[str, ...] = ()
    report: tuple[str, ...] = ()
    tune: tuple[str, ...] = ()

    def part(self, file: str, record: Mapping[str, Any]) -> Part:
        """The part to which a record of the file called `file` belongs."""
        if any(fnmatchcase(file, pattern) for pattern in self.files):
            return "report"
        found = key(record)
        return "report" if found in self.report else "tune" if found in self.tune else "train"


def read(path: Path) -> Split:
    """Read a split from a TOML file with the fields above. Raises InputError."""
    return recipe.table(f"split '{path}'", Split, recipe.load(path))
