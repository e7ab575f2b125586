"""An approximate index of the vectors in a folder of parts: HNSW graphs of `usearch`, in a folder `_index` beside them.

    lock                held by the process that builds
    <digest>/           a segment: a run of rows of the table; the digest names them and the parts that they are in
        segment.json    its units, and how many bytes each of their files has
        0.usearch …     of a unit: a graph over its distinct vectors in fp16, keyed by the first row that has each
        0.repeats …     of a unit: int64 [m, 2], a further row with such a vector after the first; sorted

A segment appears whole, by a rename. So a folder that has all segments of the parts as they are now is an index of
them, whoever built it and however often that was interrupted; another folder lacks some, and just these are built.
One segment is built at a time: memory does not depend on the number of rows. Searched, the files are mapped.

Rows with equal vectors stand for one in a graph, which would otherwise be worth little where most rows are alike, as
in a log. Vectors without a direction (zeros, infinities) are left out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import BackendError
from rwkv_stream.extras import needed
from rwkv_stream.files import TEMP_PREFIX, failpoint, fsync_folder, make_folder, remove

if TYPE_CHECKING:
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]
    Blocks = Callable[[int, int], Iterable[tuple[int, npt.NDArray[np.object_], npt.NDArray[np.float32]]]]

FOLDER = "_index"
FORMAT = 1
SEGMENT_ROWS = 1 << 18
SEGMENT_BYTES = 128 << 20  # of vectors
EXPANSION = 64, 256  # vectors kept in view while one is added, and in a search

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartStamp:
    """A file of the table as it was, and where its first row stands in it."""

    name: str
    size: int
    mtime_ns: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Segment:
    name: str
    first: int
    end: int


class VectorIndex:
    """The index of a folder of parts, built as far as it is not there.

    blocks   (first, end) -> the rows of this run, block by block: the first one's number, units [n], vectors [n, D]
    raises   BackendError without usearch; OSError where it can be neither found nor written, BlockingIOError where
             another process is building it
    """

    def __init__(self, folder: Path, parts: Sequence[PartStamp], dimension: int, blocks: Blocks) -> None:
        _index_type()
        self._folder = folder / FOLDER
        segments = _segments(parts, dimension)
        missing = [segment for segment in segments if not (self._folder / segment.name).is_dir()]
        if missing:
            make_folder(self._folder)
            with self._building({segment.name for segment in segments}):
                log.warning(
                    "indexing '%s': %d rows; the next search has it, until the parts change",
                    folder,
                    sum(segment.end - segment.first for segment in missing),
                )
                for segment in missing:
                    if not (self._folder / segment.name).is_dir():  # else made while this process came to the lock
                        _build(self._folder, segment, dimension, blocks)
        self._graphs = [graph for segment in segments for graph in _opened(self._folder / segment.name)]

    @property
    def units(self) -> set[str]:
        return {graph.unit for graph in self._graphs}

    def nearest(self, query: npt.NDArray[np.floating[Any]], n: int, unit: str | None = None) -> Numbers:
        """About the n distinct vectors nearest to a query [D], by the first rows that have them; best first."""
        graphs = [graph for graph in self._graphs if unit in (None, graph.unit)]
        found = [graph.index.search(query.astype(np.float32), n) for graph in graphs]
        if not found:
            return np.zeros(0, np.int64)
        keys = np.concatenate([matches.keys for matches in found]).astype(np.int64)
        return keys[np.argsort(np.concatenate([matches.distances for matches in found]), kind="stable")[:n]]

    def repeats(self, row: int) -> Numbers:
        """The rows, in order, that have the vector of such a first row again in its unit and segment."""
        for graph in self._graphs:
            if graph.first <= row < graph.end:
                start, end = np.searchsorted(graph.repeats[:, 0], (row, row + 1))
                if start < end:
                    return graph.repeats[start:end, 1]
        return np.zeros(0, np.int64)

    @contextlib.contextmanager
    def _building(self, wanted: set[str]) -> Iterator[None]:
        """Alone, behind the dead; what the parts no longer want is removed at the end."""
        with (self._folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._clear(lambda name: name.startswith(TEMP_PREFIX))
            yield
            self._clear(lambda name: name not in wanted)

    def _clear(self, is_stale: Callable[[str], bool]) -> None:
        for path in sorted(self._folder.iterdir()):
            if path.name != "lock" and is_stale(path.name):
                remove(path)


def _segments(parts: Sequence[PartStamp], dimension: int) -> list[_Segment]:
    """Runs of equally many rows; parts that are added at the end leave all but the last as they are."""
    n_rows = parts[-1].first + parts[-1].rows
    step = max(1, min(SEGMENT_ROWS, SEGMENT_BYTES // (2 * dimension)))
    segments = []
    for first in range(0, n_rows, step):
        end = min(first + step, n_rows)
        touched = [asdict(part) for part in parts if part.first < end and first < part.first + part.rows]
        decides = json.dumps([FORMAT, dimension, first, end, touched])
        segments.append(_Segment(hashlib.sha256(decides.encode()).hexdigest()[:32], first, end))
    return segments


def _build(folder: Path, segment: _Segment, dimension: int, blocks: Blocks) -> None:
    units: dict[str, _Growing] = {}
    for first, names, vectors in blocks(segment.first, segment.end):
        for unit in dict.fromkeys(names.tolist()):
            rows = np.flatnonzero(names == unit)
            units.setdefault(unit, _Growing(dimension)).add(first + rows, vectors[rows])
    temp = folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}"
    try:
        temp.mkdir()  # the umask applies
        described = {}
        for number, (unit, growing) in enumerate(units.items()):
            described[unit] = growing.save(temp / f"{number}.usearch", temp / f"{number}.repeats")
        (temp / "segment.json").write_text(
            json.dumps({"first": segment.first, "end": segment.end, "units": described}, ensure_ascii=False)
        )
        for path in temp.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(temp)
        failpoint("index.written")
        temp.rename(folder / segment.name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            remove(temp)
        raise
    fsync_folder(folder)
    failpoint("index.published")


class _Growing:
    """What a segment will have of one unit."""

    def __init__(self, dimension: int) -> None:
        self._index = _index_type()(ndim=dimension, metric="cos", dtype="f16", expansion_add=EXPANSION[0])
        self._firsts: dict[bytes, int] = {}  # by a digest of the vector
        self._repeats = array("q")

    def add(self, rows: Numbers, vectors: npt.NDArray[np.float32]) -> None:
        """Rows [n] in rising order and their vectors [n, D]."""
        lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=1))
        new = []
        for i in np.flatnonzero((lengths > 0) & np.isfinite(lengths)).tolist():
            row = int(rows[i])
            first = self._firsts.setdefault(hashlib.blake2b(vectors[i].tobytes(), digest_size=16).digest(), row)
            if first == row:
                new.append(i)
            else:
                self._repeats.extend((first, row))
        if new:
            self._index.add(rows[new].astype(np.uint64), (vectors[new] / lengths[new, None]).astype(np.float32))

    def save(self, index: Path, repeats: Path) -> dict[str, int]:
        """Write both files; the sizes they have."""
        pairs = np.frombuffer(self._repeats, np.int64).reshape(-1, 2)
        pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tofile(repeats)
        try:
            self._index.save(index)
        except RuntimeError as error:  # as usearch says that a disk is full
            raise OSError(f"writing '{index}': {error}") from error
        return {"usearch_bytes": index.stat().st_size, "repeats_bytes": repeats.stat().st_size}


def _index_type() -> Any:
    """That of usearch. It brings an OpenMP runtime of its own; the C++ kernels must be there before they see two."""
    from rwkv_stream.kernels import native

    with contextlib.suppress(BackendError):  # they are not there; whoever wants them is told so
        native.library()
    with needed("usearch", "index", "indexing vectors", BackendError):
        from usearch.index import Index

    return Index


@dataclass(frozen=True, slots=True)
class _Graph:
    """What a segment has of one unit, mapped."""

    unit: str
    first: int
    end: int
    index: Any
    repeats: Numbers  # [m, 2]


def _opened(folder: Path) -> Iterator[_Graph]:
    """Raises OSError for a segment that is not as it was written."""
    try:
        described = json.loads((folder / "segment.json").read_bytes())
        for number, (unit, sizes) in enumerate(described["units"].items()):
            paths = {name: folder / f"{number}.{name}" for name in ("usearch", "repeats")}
            found = {f"{name}_bytes": path.stat().st_size for name, path in paths.items()}
            if found != sizes:
                raise ValueError(f"{found} of unit {unit}, not {sizes}")
            index = _index_type().restore(paths["usearch"], view=True, expansion_search=EXPANSION[1])
            repeats = np.zeros(0, np.int64)
            if sizes["repeats_bytes"]:
                repeats = np.memmap(paths["repeats"], np.int64, "r")
            yield _Graph(unit, described["first"], described["end"], index, repeats.reshape(-1, 2))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OSError(f"damaged index '{folder}', found {error}; remove it") from error
