"""Files that are still written to, through their rotations: what is appended, in order, and where each byte stood.

`read` never waits: it gives whole lines, or nothing for now. An incomplete line waits until it is whole, until another
file goes on in its place, or until it is longer than READ_BYTES.

| rotation | seen by | what is done |
|---|---|---|
| renamed | its path leads elsewhere | it is read until the next file has content, and to its end |
| copied, then cut | it is shorter than what was read, or begins otherwise | first what its copy has more is read |
| packed | it is gone | its packed copy is read |

Rotated files are those beside it with its name and a number or a date (`app.log.1`, `app.log-20261129.gz`,
`app.2026-11-29.log`): a number is the larger the older, dates are in order, other marks go by the time of the last
change. A file is known again by its content: its first KiB, and the last KiB that was read of it. Its number in the
file system says only where to look first.

What cannot be found any more is a gap, told to `on_gap` at once. This module knows no text: bytes, not characters.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import select
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple, Protocol

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.streams import READ_BYTES, File, Opened, printable

log = logging.getLogger(__name__)

SEEN_BYTES = 1024  # of a file's beginning, and of what was read last
SCANS = 8  # until a folder is seen twice without a change
INDEX_LIMIT = 100_000  # a larger number is a date
YEAR = 1000  # so does a date begin, or a time in seconds
COMPARED_LIMIT = 4096
_PACKED = r"(?P<packed>\.(?:gz|bz2|xz|zst))?"
_MARK = r"[.\-_](?P<{}>\d(?:[\dT:.+_\-]*\d)?Z?)"

OnGap = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a text stands in the files that it is read from.

    path           the file's name by then
    device, inode  its number
    offset, skip   its byte from which decoding goes on, and how much of the text decoded from there is read already
    end            its byte up to which it was read by then ...
    head, tail     ... and digests of the first, and of the last SEEN_BYTES before that
    seen, modified  its size, and the time of its last change (ns), when it was last looked at
    pending, decoder  what the decoder held: bytes (hex) of an incomplete character, and its state
    """

    path: str
    device: int
    inode: int
    offset: int
    end: int
    head: str
    tail: str
    seen: int
    modified: int
    skip: int = 0
    pending: str = ""
    decoder: int = 0

    @property
    def read_to(self) -> int:
        """About which byte of the file the text ends at; just that in UTF-8."""
        return min(self.offset + self.skip, self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipeMark:
    """Where a text stands that came through a pipe.

    whole  1 where it has all that the pipe gave
    """

    whole: int
    pending: str = ""
    decoder: int = 0


def as_map(mark: Mark | PipeMark) -> dict[str, str | int]:
    """A mark as a store keeps it."""
    return {"kind": "file" if isinstance(mark, Mark) else "pipe", **asdict(mark)}


def from_map(values: Mapping[str, str | int]) -> Mark | PipeMark:
    """The mark that a store kept; raises ValueError for anything else."""
    kinds: dict[str | int | None, type[Mark] | type[PipeMark]] = {"file": Mark, "pipe": PipeMark}
    kind = kinds.get(values.get("kind"))
    given = {name: value for name, value in values.items() if name != "kind"}
    if (
        kind is None
        or given.keys() != {f.name for f in fields(kind)}
        or any((f.type == "str") != isinstance(given[f.name], str) for f in fields(kind))
    ):
        raise ValueError(f"expected a place in a file or a pipe, found {str(dict(values))[:200]}")
    bytes.fromhex(str(given["pending"]))
    return kind(**given)  # type: ignore[arg-type]


class Source(Protocol):
    """What a text is followed through: a file with its rotations, or a pipe."""

    is_over: bool

    @property
    def mark(self) -> Mark | PipeMark: ...
    def read(self) -> bytes: ...
    def waiting(self) -> int: ...
    def close(self) -> None: ...


# ---- a file, and what rotations left beside it ----


class Listed(NamedTuple):
    """A file of a family; `number` is that of a name that counts rotations."""

    path: str
    is_packed: bool
    number: int | None
    device: int
    inode: int
    size: int
    modified: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode

    @property
    def version(self) -> tuple[int, ...]:
        """Of what it holds, as a new file may get the number of one that is gone."""
        return self.device, self.inode, self.size, self.modified


def family(path: str) -> list[Listed]:
    """The rotated files of a path, oldest first, and last the file itself, where it is there.

    The folder is looked at until two looks agree, as a rotation renames several files one after the other.
    raises  OSError where the folder cannot be read
    """
    found, before = _scan(path), None
    for _ in range(SCANS):
        names = [(one.path, one.identity) for one in found]
        if names == before:
            break
        found, before = _scan(path), names
    return found


def _scan(path: str) -> list[Listed]:
    folder, name = os.path.split(path)
    pattern = _pattern(name)
    rotated: dict[str, tuple[tuple[int, ...], Listed]] = {}
    own: list[Listed] = []
    with os.scandir(folder or ".") as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found is None and entry.name != name:
                continue
            try:
                status = entry.stat()
            except OSError:  # it was renamed since: the next look will tell
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            numbers = () if found is None else _numbers(found["whole"] or found["part"])
            number = numbers[0] if len(numbers) == 1 else None
            packed = None if found is None else found["packed"]
            place = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            listed = Listed(os.path.join(folder, entry.name), packed is not None, number, *place)  # noqa: PTH118
            if found is None:
                own.append(listed)
            else:  # a file that is being packed is whole, its copy is not yet
                bare = entry.name.removesuffix(packed or "")
                if packed is None or bare not in rotated:
                    rotated[bare] = numbers, listed
    return [*_in_order(rotated.values(), {one.identity for one in own}), *own]


def _pattern(name: str) -> re.Pattern[str]:
    stem, ending = os.path.splitext(name)  # noqa: PTH122 -- of a name, not of a path
    part = f"|{re.escape(stem)}{_MARK.format('part')}{re.escape(ending)}" if ending else "|(?P<part>(?!))"
    return re.compile(f"(?:{re.escape(name)}{_MARK.format('whole')}{part}){_PACKED}")


def _numbers(mark: str) -> tuple[int, ...]:
    """One that counts rotations, or those of a date: year, month, day, and what else there is."""
    first, *rest = re.findall(r"\d{1,18}", mark)
    if int(first) < INDEX_LIMIT:
        return tuple(map(int, (first, *rest)))
    return tuple(map(int, (first[:4], *re.findall(r"\d\d?", first[4:]), *rest)))


def _in_order(rotated: object, own: set[tuple[int, int]]) -> list[Listed]:
    """Oldest first, each file once."""
    groups: dict[str, list[tuple[tuple[int, ...], Listed]]] = {"index": [], "date": [], "time": []}
    seen = set(own)
    for numbers, listed in rotated:  # type: ignore[attr-defined]
        if listed.identity not in seen:
            seen.add(listed.identity)
            is_date = len(numbers) > 1 and numbers[0] >= YEAR
            groups["index" if listed.number is not None else "date" if is_date else "time"].append((numbers, listed))
    groups["index"].sort(key=lambda one: -one[0][0])
    groups["date"].sort(key=lambda one: (one[0], one[1].path))
    groups["time"].sort(key=lambda one: (one[1].modified, one[1].path))
    filled = sorted(filter(None, groups.values()), key=lambda group: max(one.modified for _, one in group))
    return [listed for group in filled for _, listed in group]


def _missing(found: list[Listed], first: int | None, last: int | None) -> list[int]:
    """The numbers between those of two rotated files that no file has."""
    if first is None or last is None:
        return []
    return sorted(set(range(last + 1, first)) - {one.number for one in found})


class _File:
    """One file, opened: what comes next is peeked at and taken.

    head, tail  the first, and the last SEEN_BYTES before `offset`
    expected    a size that it is known to have had; what lies behind `read_to` and is not there is lost
    """

    def __init__(self, listed: Listed) -> None:
        """raises  FileNotFoundError where another file has that path by now, InputError, OSError"""
        self.path, self.is_packed = listed.path, listed.is_packed
        self._opened: Opened | None = None
        self._descriptor = os.open(listed.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(self._descriptor)
            self.device, self.inode = status.st_dev, status.st_ino
            if (self.device, self.inode) != listed.identity:
                raise FileNotFoundError(errno.ENOENT, "another file has its name", listed.path)
            if listed.is_packed:
                self._opened = Opened(File(f"/dev/fd/{self._descriptor}"), printable(listed.path))
        except BaseException:
            os.close(self._descriptor)
            raise
        self.offset = self.seen = self.expected = self.read_to = 0
        self.modified = status.st_mtime_ns
        self.head = self.tail = b""

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """So far; of a packed file as far as it was unpacked."""
        return self.offset if self.is_packed else os.fstat(self._descriptor).st_size

    def peek(self) -> bytes:
        """The next bytes, READ_BYTES at most; fewer only at the end so far. Raises InputError, once, for damage."""
        if self._opened is None:
            return os.pread(self._descriptor, READ_BYTES, self.offset)
        return self._opened.peek(READ_BYTES) or self._opened.read(READ_BYTES)  # which raises what was met before

    def take(self, data: bytes) -> bytes:
        """The first bytes of what was peeked at."""
        left = len(data) if self._opened is not None else 0
        while left and self._opened is not None:
            left -= len(self._opened.read(left))
        self.offset += len(data)
        self.head = (self.head + data)[:SEEN_BYTES] if len(self.head) < SEEN_BYTES else self.head
        self.tail = (self.tail + data[-SEEN_BYTES:])[-SEEN_BYTES:]
        self.seen = max(self.seen, self.offset)
        return data

    def seek(self, offset: int) -> None:
        """Go on from a byte, or from the end where that comes before; InputError for damage before it."""
        if self._opened is None:
            self.offset = min(offset, self.size)
            self.head = os.pread(self._descriptor, min(SEEN_BYTES, self.offset), 0)
            start = max(0, self.offset - SEEN_BYTES)
            self.tail = os.pread(self._descriptor, self.offset - start, start)
        while self.offset < offset and self._opened is not None and (data := self.peek()):
            self.take(data[: offset - self.offset])

    def is_cut(self) -> bool:
        """Whether what was read of it is not there any more."""
        if self._opened is not None:
            return False
        status = os.fstat(self._descriptor)
        if status.st_size < self.offset:
            return True
        start = self.offset - len(self.tail)
        if self.tail != os.pread(self._descriptor, len(self.tail), start):
            return True
        if self.head != os.pread(self._descriptor, len(self.head), 0):
            return True
        self.seen, self.modified = max(self.seen, status.st_size), status.st_mtime_ns
        return False

    def skip_hole(self) -> int:
        """Go on behind a hole at its start, as one that writes on where it stood leaves in a file that was cut."""
        if self._opened is not None or os.pread(self._descriptor, 1, 0) != b"\0":
            return 0
        try:
            self.seek(os.lseek(self._descriptor, 0, os.SEEK_DATA))
        except OSError:  # no data, or a file system without holes
            return 0
        return self.offset

    @property
    def mark(self) -> Mark:
        return Mark(
            path=printable(self.path),
            device=self.device,
            inode=self.inode,
            offset=self.offset,
            end=self.offset,
            head=_digest(self.head),
            tail=_digest(self.tail),
            seen=max(self.seen, self.expected),
            modified=self.modified,
        )


Alike = Literal["all", "part", "other"]


def compare(listed: Listed, mark: Mark) -> Alike:
    """Whether a file holds all that was read of the one of a mark, or the first part of that and no more.

    raises  OSError; InputError where that cannot be seen for damage
    """
    with contextlib.closing(_File(listed)) as file:
        file.seek(min(SEEN_BYTES, mark.end))
        if file.offset < min(SEEN_BYTES, mark.end) or _digest(file.head) != mark.head:
            return "other"
        file.seek(mark.end)
        if file.offset < mark.end:
            return "part"
        return "all" if _digest(file.tail) == mark.tail else "other"


def _n_whole(data: bytes) -> int:
    """Bytes that need not wait: of whole lines, or of one that is too long."""
    return data.rfind(b"\n") + 1 or (len(data) if len(data) == READ_BYTES else 0)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FollowedFile:
    """What is appended to a path, whatever file is there, after what its rotations left.

    is_over  never: more may come
    """

    is_over = False

    def __init__(self, path: str, on_gap: OnGap, mark: Mark | None = None, first: Listed | None = None) -> None:
        """Begin where a mark says, or with a file of the family, or with its oldest.

        raises  InputError where the folder cannot be read
        """
        self.path, self._on_gap = path, on_gap
        self._file: _File | None = None
        self._left: _File | None = None  # the one before, which somebody may still write to
        self._newer_than: int | None = None  # where the file of the mark was not found
        self._done = set[tuple[int, ...]]()  # files that cannot be read, or hold nothing
        self._compared: dict[tuple[Listed, str, int], Alike] = {}
        self._hole: list[int] = []
        self._is_refused = self._is_missed = False
        if mark is not None:
            self._resume(mark, is_known_whole=False)
        elif first is not None:
            found = self._family()
            self._done.update(one.version for one in found[: found.index(first)])
        elif not self._family():
            log.warning("'%s' is not there yet: waiting for it", printable(path))

    @property
    def is_found(self) -> bool:
        """Whether there is a file to read, or just read."""
        return self._file is not None

    @property
    def identity(self) -> tuple[int, int] | None:
        """Of the file that was read last."""
        return None if self._file is None else self._file.identity

    @property
    def mark(self) -> Mark:
        """Where the next byte stands."""
        assert self._file is not None, "nothing was read"
        return self._file.mark

    def close(self) -> None:
        self._check_left()
        for file in (self._file, self._left):
            if file is not None:
                file.close()
        self._file = self._left = None

    def waiting(self) -> int:
        """Bytes that are written and not read, at least; packed ones do not count."""
        if self._file is None:
            return 0
        self._file.seen = max(self._file.seen, self._file.size)
        n_bytes = max(0, self._file.size - self._file.offset)
        if self._leads_here():
            return n_bytes
        found = self._family()
        ours = self._index(found)
        later = found if ours is None else found[ours + 1 :]
        return n_bytes + sum(one.size for one in later if not one.is_packed and self._is_newer(one))

    def read(self) -> bytes:
        """What comes next, whole lines of one file; nothing where nothing has come."""
        while True:
            file, data = self._file, b""
            if file is not None:
                try:
                    data = file.peek()
                except InputError as error:
                    self._lose(str(error))
                    continue
                if file.is_cut():
                    self._resume(file.mark, is_known_whole=True)
                    continue
                if n := _n_whole(data):
                    return file.take(data[:n])
            later = self._later()
            if not later:
                break
            if file is not None and file.peek() != data:  # it was written to until the next one was begun
                continue
            if file is not None and data:
                return file.take(data)
            if (begun := self._go_on(later)) is None:
                break
            if begun:
                return begun
        self._check_left()
        return b""

    def _go_on(self, later: list[Listed]) -> bytes | None:
        """Begin the next file; no bytes where another one is to be tried, None where nothing has come.

        A file is not left before something of the next one can be read: what was read of a file tells which it is.
        """
        listed = later[0]
        try:
            file = _File(listed)
        except FileNotFoundError:  # it was renamed since
            return None
        except (InputError, OSError) as error:
            return b"" if self._refuse(listed, error) else None
        try:
            hole = file.skip_hole()
            data = file.peek()
        except InputError as error:
            self._lose(str(error))
            data = b""
        n = len(data) if len(later) > 1 else _n_whole(data)
        if not n:
            file.close()
            if len(later) > 1:
                self._done.add(listed.version)
            return b"" if len(later) > 1 else None
        if hole:
            log.warning("'%s': %d bytes of a hole at its start are skipped", printable(listed.path), hole)
        if self._hole:
            numbers = ", ".join(map(str, self._hole[:10]))
            self._lose(f"of the rotated files of '{printable(self.path)}' {len(self._hole)} are not there: {numbers}")
        self._leave()
        self._file, self._newer_than, self._hole, self._is_refused = file, None, [], False
        log.info("following '%s'", printable(listed.path))
        return file.take(data[: _n_whole(data) or n])

    # ---- which file ----

    def _family(self) -> list[Listed]:
        try:
            return family(self.path)
        except OSError as error:
            raise InputError(
                f"following '{printable(self.path)}': expected its folder, found: {error.strerror}; check the path"
            ) from error

    def _leads_here(self) -> bool:
        """Whether the path still leads to the file that is being read."""
        try:
            status = os.stat(self.path)  # noqa: PTH116 -- of what may be no path of this system's
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    def _is_newer(self, listed: Listed) -> bool:
        """Whether a file is one that came after what was read."""
        limit = self._file.modified if self._file is not None else self._newer_than
        return limit is None or listed.modified > limit or listed.path == self.path

    def _index(self, found: list[Listed]) -> int | None:
        """Which of a family the file is that is being read, or its copy."""
        assert self._file is not None
        same = next((i for i, one in enumerate(found) if one.identity == self._file.identity), None)
        return same if same is not None else self._locate(found, self._file.mark)[0]

    def _later(self) -> list[Listed]:
        """The files with content that come after the one that is being read."""
        if self._file is not None and not self._file.is_packed and self._leads_here():
            return []
        found = self._family()
        ours = self._index(found) if self._file is not None else None
        later = [one for one in found if self._is_newer(one)] if ours is None else found[ours + 1 :]
        later = [one for one in later if one.size and one.version not in self._done]
        missing = _missing(found, found[ours].number, later[0].number) if ours is not None and later else []
        is_first_look = missing and self._hole != missing  # files may be being renamed just now
        self._hole = missing
        return [] if is_first_look else later

    def _refuse(self, listed: Listed, error: InputError | OSError) -> bool:
        """Say that a file cannot be opened; whether it is done with, else it is to be tried again."""
        reason = str(error) if isinstance(error, InputError) else error.strerror
        if listed.path != self.path:
            self._done.add(listed.version)
            self._lose(f"'{printable(listed.path)}' cannot be read: {reason}", listed.size)
            return True
        if not self._is_refused:
            self._is_refused = True
            log.warning("'%s' cannot be read: %s; trying again", printable(listed.path), reason)
        return False

    def _leave(self) -> None:
        """Be done with the file that is being read."""
        file = self._file
        if file is None:
            return
        missing = file.expected - max(file.offset, file.read_to)
        if missing > 0:
            self._lose(f"'{printable(file.path)}' was cut, and what was written to it before is in no copy", missing)
        self._check_left()
        if self._left is not None:
            self._left.close()
        self._left, self._file = file, None

    def _check_left(self) -> None:
        left = self._left
        if left is not None and (late := left.size - left.offset) > 0 and not left.is_cut():
            self._lose(f"'{printable(left.path)}' was written to after the next file had been begun", late)
            left.seek(left.size)

    # ---- the same file again ----

    def _resume(self, mark: Mark, *, is_known_whole: bool) -> None:
        """Go on from a mark, in the file itself or in its copy.

        is_known_whole  whether nothing is known to lie behind the mark but what was seen there
        """
        if self._file is not None:
            self._file.close()
            self._file = None
        found = self._family()
        i, _ = self._locate(found, mark)
        missing = mark.seen - mark.read_to
        if i is not None:
            try:
                file = _File(found[i])
                file.seek(mark.offset)
            except FileNotFoundError:
                self._resume(mark, is_known_whole=is_known_whole)
                return
            file.expected, file.read_to = mark.seen, mark.read_to
            self._file = file
            return
        self._newer_than = mark.modified
        if missing > 0 or not is_known_whole:
            known = f"{missing:,} bytes or more" if missing > 0 else "how much it had more is not known"
            self._lose(
                f"'{printable(mark.path)}' was read to byte {mark.read_to:,}, and neither it nor a copy of it is "
                f"there any more ({known})"
            )

    def _locate(self, found: list[Listed], mark: Mark) -> tuple[int | None, Alike]:
        """Which file of a family is the one of a mark, or its copy, and how much of what was read it holds."""
        own = [i for i, one in enumerate(found) if one.identity == (mark.device, mark.inode)]
        others = [i for i in reversed(range(len(found))) if i not in own and mark.end]  # any begins with nothing
        alike = {i: self._compare(found[i], mark) for i in own}
        for i in own:
            if alike[i] == "all":
                return i, "all"
        for i in others:
            alike[i] = self._compare(found[i], mark)
            if alike[i] == "all":
                return i, "all"
        return next(((i, "part") for i in others if alike[i] == "part" and found[i].path != self.path), (None, "other"))

    def _compare(self, listed: Listed, mark: Mark) -> Alike:
        key = listed, mark.tail, mark.end
        if key not in self._compared:
            if len(self._compared) >= COMPARED_LIMIT:
                self._compared.clear()
            try:
                self._compared[key] = compare(listed, mark)
            except (InputError, OSError) as error:
                log.info("'%s' cannot be looked into: %s", printable(listed.path), error)
                return "other"
        return self._compared[key]

    def _lose(self, what: str, n_bytes: int | None = None) -> None:
        self._on_gap(what if n_bytes is None else f"{what}: {n_bytes:,} bytes are missing")


# ---- a pipe ----


class FollowedPipe:
    """What comes through a pipe, or any descriptor that can be waited for.

    is_over  whether it has ended, or was told to end
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = b""
        self.is_over = False

    @property
    def mark(self) -> PipeMark:
        return PipeMark(whole=int(self.is_over and not self._held))

    def waiting(self) -> int:
        return len(self._held)

    def read(self) -> bytes:
        """What comes next, whole lines; nothing where nothing has come, or at the end."""
        while not self.is_over:
            if not select.select([self._descriptor], [], [], 0)[0]:
                return b""
            data = os.read(self._descriptor, READ_BYTES - len(self._held))
            if not data:
                break
            self._held += data
            n_whole = self._held.rfind(b"\n") + 1
            if n_whole or len(self._held) == READ_BYTES:
                return self._take(n_whole or len(self._held))
        self.is_over = True
        return self._take(len(self._held))

    def wait(self, seconds: float) -> None:
        """Until something comes, but no longer."""
        select.select([self._descriptor], [], [], seconds)

    def end(self) -> None:
        """Take it for ended."""
        self.is_over = True

    def _take(self, n: int) -> bytes:
        data, self._held = self._held[:n], self._held[n:]
        return data

    def close(self) -> None:
        """Not ours to close."""
