"""Folders: which of their files are read, in the order of names, and what is said of the others.

Left out are hidden files, links to folders, what a `.gitignore` of the folder, of those in it, or of the repository
around it names, and what patterns exclude; patterns are those of `.gitignore`, of paths below the folder. What is named
itself is always read.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_stream.errors import UsageError
from rwkv_stream.text.readers.streams import reversible

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORED = ".gitignore"
IGNORED_BYTES = 2**20  # read of such a file
NAMES = 3  # shown of what is left out for one reason


class LeftOut:
    """What was left out of a folder or archive, by the reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, why: str, name: str) -> None:
        self._counts[why] += 1
        if len(self._names[why]) < NAMES:
            self._names[why].append(name)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        shown = []
        for why, n in self._counts.items():
            more = ", …" if n > NAMES else ""
            shown.append(f"{n:,} {why} ({', '.join(self._names[why])}{more})")
        return "; ".join(shown)


@dataclass(frozen=True, slots=True)
class Patterns:
    """What is wanted of a folder: files that any of `include` matches, if there are any, and none of `exclude`. Raises
    UsageError for a pattern that is none."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not _patterns(pattern):
                    raise UsageError(
                        f"reading with {option} '{pattern}': expected a pattern as of .gitignore, such as '*.py' or "
                        "'build/', found none"
                    )

    def matcher(self) -> Callable[[str], str | None]:
        """Why a path below the folder is left out, where it is; a folder's ends in a slash."""
        include, exclude = (_spec(patterns) if patterns else None for patterns in (self.include, self.exclude))

        def why(path: str) -> str | None:
            if exclude is not None and exclude.match_file(path):
                return "excluded"
            is_wanted = include is None or path.endswith("/") or include.match_file(path)
            return None if is_wanted else "not included"

        return why


class _Ignoring(NamedTuple):
    """The patterns of a `.gitignore`; a path below the folder is `start` and what is behind `skip` characters to it."""

    spec: GitIgnoreSpec
    start: str
    skip: int


def files(folder: str, patterns: Patterns, left: LeftOut) -> Iterator[tuple[str, OSError | None]]:
    """The paths of the files below `folder` that are wanted, without following links to folders; of a folder that
    cannot be listed its own, with the error."""
    unwanted = patterns.matcher()

    def walk(below: str, ignoring: Sequence[_Ignoring]) -> Iterator[tuple[str, OSError | None]]:
        at = os.path.join(folder, below) if below else folder  # noqa: PTH118 -- as it was typed
        try:
            with os.scandir(at) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield at, error
            return
        own = _ignoring(Path(at), "", len(below) + 1 if below else 0)
        ignoring = [*ignoring, own] if own is not None else ignoring
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            path = f"{below}/{entry.name}" if below else entry.name
            shown = f"{path}/" if is_folder else path
            why = "hidden" if entry.name.startswith(".") else unwanted(shown) or _ignored(shown, ignoring)
            why = why or (None if is_folder else _no_file(entry.path))
            if why is not None:
                left.add(why, reversible(entry.path) + "/" * is_folder)
            elif is_folder:
                yield from walk(path, ignoring)
            else:
                yield entry.path, None

    around = list(_around(Path(os.path.abspath(folder))))  # noqa: PTH100 -- `resolve` would follow links
    return walk("", around if _ignored("", around) is None else [])


def _ignored(path: str, ignoring: Sequence[_Ignoring]) -> str | None:
    """Why it is left out where git leaves it out: the last pattern that matches decides, of the nearest file."""
    for spec, start, skip in reversed(ignoring):
        found = spec.check_file(start + path[skip:]).include
        if found is not None:
            return f"ignored by {IGNORED}" if found else None
    return None


def may_be_file(path: str) -> bool:
    """Whether there is a regular file, or a link that cannot be followed: reading it will say why."""
    return _no_file(path) is None


def _no_file(path: str) -> str | None:
    """What is there in the place of a file; None where there may be one."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 -- Path takes an empty name for the current folder
    except OSError:
        return None
    if stat.S_ISREG(mode):
        return None
    return "links to folders" if stat.S_ISDIR(mode) else "no files but pipes or devices"


def _around(folder: Path) -> Iterator[_Ignoring]:
    """What the repository ignores that `folder` lies in, from its root on."""
    root = next((path for path in (folder, *folder.parents) if (path / ".git").exists()), folder)
    above = [path for path in folder.parents if path.is_relative_to(root)]
    for path in reversed(above):
        found = _ignoring(path, f"{folder.relative_to(path).as_posix()}/", 0)
        if found is not None:
            yield found


def _ignoring(folder: Path, start: str, skip: int) -> _Ignoring | None:
    """The patterns in the `.gitignore` of a folder, None where there is none that can be read."""
    try:
        with (folder / IGNORED).open("rb") as file:
            lines = os.fsdecode(file.read(IGNORED_BYTES)).splitlines()
    except OSError:
        return None
    return _Ignoring(_spec(lines), start, skip)


def _spec(lines: Iterable[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    return GitIgnoreSpec([pattern for line in lines for pattern in _patterns(line)])


def _patterns(line: str) -> list[Any]:
    """The pattern of a line; nothing where it is none, which git passes over."""
    from pathspec import GitIgnoreSpec

    try:
        return [pattern for pattern in GitIgnoreSpec.from_lines([line]).patterns if pattern.include is not None]
    except ValueError:
        return []
