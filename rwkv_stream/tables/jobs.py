"""Jobs: embeddings of a corpus as one table, or as a folder of parts that goes on where it was stopped.

A folder holds

    part-00000.parquet …    rows of a run of documents, in the order of the input
    _manifest.json          what decides the rows: inputs, options, model; and every part with the documents in it
    _progress/00000.json …  what came of each part, written when its table is whole; and the lock that claims parts
    failed.jsonl            documents that cannot be read, if there are any; written when a run ends
    _rows.whitening.safetensors  the whitening, where one was asked for

A whitening is fitted on all parts in their order, whoever made them, by the run that makes the last one. Each part is
then written again, whitened; its metadata says which it is, so that a run that was killed goes on there too.

All are published whole or not at all. A part ends with a file when it holds PART_BYTES or more, and after
PART_DOCUMENTS documents in any case. That is decided once, from the inputs alone, so that it is the same however often
a job is stopped and whoever writes a part. A part without its record is made again, and nothing else.

Parts are claimed by locks on bytes of one file: of a dead process nothing stays locked, and two at work on the same
folder never write the same part. Such locks belong to a process, not a thread: one job at a time in a process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rwkv_stream.errors import InputError, MismatchError, OutputError, StoreLockedError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, make_folder, publish
from rwkv_stream.tables.embeddings import Rows, embedding, rows, whitened
from rwkv_stream.tables.whitening import SUFFIX, Whitening
from rwkv_stream.tables.writers import Writer
from rwkv_stream.text.readers import Document, documents
from rwkv_stream.text.units import Failure

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.tables.embeddings import Columns, Vectors

FORMAT = 1  # of a manifest
PART_DOCUMENTS = 10_000
PART_BYTES = 1 << 20
MANIFEST = "_manifest.json"
FAILED = "failed.jsonl"
PROGRESS = "_progress"
WHITENING = f"_rows{SUFFIX}"
WHITENED_ROWS = 1024  # at a time
_STEPS = ("written", "synced", "renamed", "published")
FAILPOINTS = (  # beside job.part.whitened
    *("job.part.begun", "job.part.rows", "job.part.whole", "job.part.recorded", "job.ended"),
    *(f"{kind}.{step}" for kind in ("table", "job") for step in _STEPS),
)
NUMERICS = ("version", "numerics")  # may differ between runs; rows then differ in their last bits

log = logging.getLogger(__name__)


def columns() -> Columns:
    """The further columns of every table: what a person would cite."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    return {"id": text, "page": number, "chapter": text, "line": number, "row": number}


class Progress:
    """Totals so far, which another thread may read at any moment."""

    def __init__(self) -> None:
        self.total_documents: int | None = None
        self.skipped = 0  # documents that an earlier run did; they count in the totals …
        self._skipped_tokens = 0  # … and their tokens
        self._done = _Totals()
        self._rows: Rows | None = None

    @property
    def documents(self) -> int:
        return self._done.documents + (self._rows.documents if self._rows else 0)

    @property
    def failed(self) -> int:
        return self._done.failed + (self._rows.failed if self._rows else 0)

    @property
    def rows(self) -> int:
        return self._done.rows + (self._rows.rows if self._rows else 0)

    @property
    def tokens(self) -> int:
        return self._done.tokens + (self._rows.tokens if self._rows else 0)

    @property
    def tokens_now(self) -> int:
        """Those of this run."""
        return self.tokens - self._skipped_tokens

    @contextlib.contextmanager
    def of(self, made: Rows) -> Iterator[Rows]:
        """Rows that are being made; closed at the end."""
        self._rows = made
        try:
            yield made
        finally:
            made.close()
            self._rows = None
            self.add(made)

    def skip(self, done: Done) -> None:
        """What an earlier run did."""
        self.skipped += done.documents + done.failed
        self._skipped_tokens += done.tokens
        self.add(done)

    def add(self, done: Done | Rows) -> None:
        for name in ("documents", "failed", "rows", "tokens"):
            setattr(self._done, name, getattr(self._done, name) + getattr(done, name))


@dataclass(slots=True)
class _Totals:
    documents: int = 0
    failed: int = 0
    rows: int = 0
    tokens: int = 0


def embed_table(
    sources: Sequence[str],
    output: Path,
    *,
    model: Model,
    reading: Mapping[str, Any] | None = None,
    whiten: bool = False,
    progress: Progress | None = None,
    on_failure: Callable[[Failure], None] | None = None,
    **options: Any,
) -> Progress:
    """Write the rows of all documents to one table; it is there when it is whole.

    reading     arguments of `readers.documents`
    whiten      fit a whitening on these rows, keep it beside the table, and apply it
    on_failure  told of each document that cannot be read; without it the first one raises
    options     of `embeddings.rows`
    raises      InputError where a source is missing or all documents fail; OutputError, UsageError, MismatchError
    """
    progress = progress or Progress()
    if not whiten:
        _written(sources, output, model, reading, progress, on_failure, options)
        return progress
    with tempfile.TemporaryDirectory(dir=_parent(output), prefix=TEMP_PREFIX) as folder:
        plain = Path(folder) / "plain.parquet"
        _written(sources, plain, model, reading, progress, on_failure, options)
        fitted = _fitted([plain], model, options)
        with _rewriting(plain, output, fitted):
            fitted.save(output.with_suffix(SUFFIX))
    return progress


def _fitted(tables: Sequence[Path], model: Model, options: Mapping[str, Any]) -> Whitening:
    """The whitening of the vectors of tables, summed in their order."""
    return Whitening.fit(
        itertools.chain.from_iterable(map(_vectors, tables)),
        model=model.fingerprint,
        pooling=options.get("pooling", "mean"),
    )


def _vectors(table: Path) -> Iterator[Vectors]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(WHITENED_ROWS, columns=["embedding"]):
            yield embedding(batch)


@contextlib.contextmanager
def _rewriting(plain: Path, output: Path, fitted: Whitening, *, temp_tag: str = "") -> Iterator[None]:
    """A whitened copy of a table, which appears when the block ends without an exception."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(plain) as table:
        schema = table.schema_arrow
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        metadata["whitening"] = fitted.digest
        with Writer(output, schema.remove_metadata(), metadata, temp_tag=temp_tag) as writer:
            for batch in table.iter_batches(WHITENED_ROWS):
                writer.write_batch(whitened(batch, fitted))
            yield


def _parent(output: Path) -> Path:
    if not output.parent.is_dir():
        raise OutputError(f"writing '{output}': expected a folder '{output.parent}', found none")
    return output.parent


def _written(
    sources: Sequence[str],
    output: Path,
    model: Model,
    reading: Mapping[str, Any] | None,
    progress: Progress,
    on_failure: Callable[[Failure], None] | None,
    options: Mapping[str, Any],
) -> None:
    found = documents(sources, rows=True, **(reading or {}))
    made = rows(found, model=model, columns=columns(), on_failure=on_failure, **options)
    with progress.of(made), Writer(output, made.schema, made.metadata) as writer:
        for batch in made:
            writer.write_batch(batch)
        if made.failed and not made.documents:
            raise InputError(f"embedding into '{output}': all {made.failed} documents failed; nothing was written")


# ---- a folder of parts ----


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


@dataclass(slots=True)
class Done(_Totals):
    """What came of a part."""

    failures: list[dict[str, str]] = field(default_factory=list)


class Job:
    """The rows of many documents as a folder of parts.

    >>> job = Job("rows/", ["articles.jsonl"], model=model, units=("sentence",))
    >>> job.run()

    reading   arguments of `readers.documents`
    whiten    fit a whitening on all rows, keep it in the folder, and apply it, when all parts are made
    options   of `embeddings.rows`
    raises    UsageError where the folder is another job's, MismatchError where it is another model's; InputError
              where a source is missing, OutputError
    """

    def __init__(
        self,
        folder: str | Path,
        sources: Sequence[str],
        *,
        model: Model,
        reading: Mapping[str, Any] | None = None,
        part_documents: int = PART_DOCUMENTS,
        part_bytes: int = PART_BYTES,
        whiten: bool = False,
        **options: Any,
    ) -> None:
        if "-" in sources:
            raise UsageError(
                "embedding into a folder: expected inputs that can be read again, found stdin; save it to a file, or "
                "write a table (-o NAME.parquet)"
            )
        self.folder = Path(folder)
        self._sources, self.model, self._options = list(sources), model, options
        self._reading = dict(reading or {})
        self._sizes = part_documents, part_bytes
        self._whiten = whiten
        described = self._rows(())
        described.close()
        self._decides = {
            **described.metadata,
            "text": options.get("text", True),
            "inputs": self._sources,
            "reading": self._reading,
            "part_documents": part_documents,
            "part_bytes": part_bytes,
            **({"whiten": True} if whiten else {}),
        }
        try:
            make_folder(self.folder / PROGRESS)
        except OSError as error:
            raise OutputError(f"embedding into '{folder}': {error.strerror or error}") from error
        with self._claims() as claims:
            claims.wait(0)
            self.parts = self._plan()

    def run(
        self,
        shard: tuple[int, int] = (0, 1),
        *,
        progress: Progress | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Progress:
        """Make what is missing of the parts i, i + n, i + 2 n, … for a shard (i, n); totals of all of them.

        on_failure  told of each document that cannot be read, now, not in an earlier run
        raises      StoreLockedError where another run is at work on some of these parts: the others are done;
                    UsageError where the inputs have changed since the folder was begun
        """
        i, n = shard
        if not 0 <= i < n:
            raise UsageError(f"embedding into '{self.folder}': expected a shard (i, n) with 0 <= i < n, found {shard}")
        progress = progress or Progress()
        progress.total_documents = sum(part.documents for part in self.parts[i::n])
        busy: list[str] = []
        with self._claims() as claims:
            if self.missing(shard):
                self._make(shard, claims, progress, on_failure, busy)
            else:
                for part in self.parts[i::n]:
                    self._count(part, progress)
            claims.wait(0)
            self._finish()
            if self._whiten and not self.missing():
                self._whiten_parts()
        failpoint("job.ended")
        if busy:
            raise StoreLockedError(
                f"embedding into '{self.folder}': expected to write {len(busy)} more parts, found another run at work "
                f"on {', '.join(busy[:3])}{' …' if len(busy) > 3 else ''}; run it again when that has ended"
            )
        return progress

    def _make(
        self,
        shard: tuple[int, int],
        claims: _Claims,
        progress: Progress,
        on_failure: Callable[[Failure], None] | None,
        busy: list[str],
    ) -> None:
        """Go through the inputs once; documents of parts that are done, or others', are passed over."""
        i, n = shard
        for part, seen in self._walk():
            if part.number % n == i and not self._count(part, progress):
                if not claims.take(part.number + 1):
                    busy.append(part.name)
                elif not self._count(part, progress):  # not done by another in the meantime
                    self._write(part, seen, progress, on_failure)
                claims.release(part.number + 1)

    def _walk(self) -> Iterator[tuple[Part, _Seen]]:
        """The parts with their documents, in one pass over the inputs; raises UsageError where these have changed."""
        for part, cut in itertools.zip_longest(self.parts, self._cut(), fillvalue=None):
            if part is None or cut is None:
                raise self._changed(part.first if part else "more documents")
            seen = _Seen(cut)
            yield part, seen
            seen.check(part, self)

    def _count(self, part: Part, progress: Progress) -> bool:
        done = self.done(part)
        if done is None:
            return False
        progress.skip(done)
        return True

    def _write(self, part: Part, seen: _Seen, progress: Progress, on_failure: Callable[[Failure], None] | None) -> None:
        for stray in self.folder.rglob(f"{TEMP_PREFIX}{part.name}-*"):
            stray.unlink()
        failures: list[dict[str, str]] = []

        def note(failure: Failure) -> None:
            failures.append({"document": failure.document, "error": str(failure.error)})
            if on_failure is not None:
                on_failure(failure)

        failpoint("job.part.begun")
        made = self._rows(seen, note)
        with progress.of(made), Writer(self._table(part), made.schema, made.metadata, temp_tag=part.name) as writer:
            for batch in made:
                writer.write_batch(batch)
                failpoint("job.part.rows")
            seen.check(part, self)
        failpoint("job.part.whole")
        done = Done(made.documents, made.failed, made.rows, made.tokens, failures)
        self._publish(self._record(part), _json(asdict(done)), part.name)
        failpoint("job.part.recorded")

    @property
    def arguments(self) -> dict[str, Any]:
        """Those that make the same job in another process, whose model is to be given."""
        part_documents, part_bytes = self._sizes
        sizes = {"part_documents": part_documents, "part_bytes": part_bytes}
        return {
            "folder": self.folder,
            "sources": self._sources,
            "reading": self._reading,
            "whiten": self._whiten,
            **sizes,
            **self._options,
        }

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[Part]:
        """The parts of a shard that are not done."""
        i, n = shard
        return [part for part in self.parts[i::n] if self.done(part) is None]

    def _rows(self, found: Iterable[Document], on_failure: Callable[[Failure], None] | None = None) -> Rows:
        return rows(found, model=self.model, columns=columns(), on_failure=on_failure, **self._options)

    # ---- what there is to do ----

    def _plan(self) -> list[Part]:
        """The parts, as the manifest has them; a new folder gets its manifest."""
        path = self.folder / MANIFEST
        if path.exists():
            found = _read(path)
            if not isinstance(found.get("format"), int) or found["format"] > FORMAT:
                raise MismatchError(
                    f"embedding into '{self.folder}': expected a manifest of format {FORMAT} or older, found "
                    f"{found.get('format')}; update rwkv-stream"
                )
            self._compare(found["decides"])
            return [Part(**part) for part in found["parts"]]
        if any(self.folder.glob("*.parquet")):
            raise UsageError(
                f"embedding into '{self.folder}': expected a new folder or that of a job, found tables without a "
                f"{MANIFEST}; use another folder"
            )
        for stray in self.folder.glob(f"{TEMP_PREFIX}manifest-*"):
            stray.unlink()
        parts = []
        for number, cut in enumerate(self._cut()):
            seen = _Seen(cut)
            parts.append(seen.drained(number))
        manifest = {"format": FORMAT, "decides": self._decides, "parts": [asdict(part) for part in parts]}
        self._publish(path, _json(manifest), "manifest")
        return parts

    def _compare(self, decides: Mapping[str, Any]) -> None:
        wanted = json.loads(_json(self._decides))
        differing = sorted(name for name in {*wanted, *decides} if wanted.get(name) != decides.get(name))
        if "model" in differing:
            raise MismatchError(
                f"embedding into '{self.folder}': expected the model {decides.get('model', '')[:12]} that began it, "
                f"found {self.model.fingerprint[:12]}; pass --model with that one, or use another folder"
            )
        for name in differing:
            if name not in NUMERICS:
                raise UsageError(
                    f"embedding into '{self.folder}': it was begun with {name} {json.dumps(decides.get(name))}, found "
                    f"{json.dumps(wanted.get(name))}; use the same options, or another folder"
                )
        if differing:
            log.warning(
                "'%s' was begun under another %s; rows may differ in their last bits from part to part",
                self.folder,
                " and ".join(differing),
            )

    def _cut(self) -> Iterator[Iterator[Document]]:
        """The documents in the runs that make parts; each is to be used up before the next is asked for."""
        limit_documents, limit_bytes = self._sizes
        number = n_documents = n_bytes = 0
        path: str | None = None

        def part_of(document: Document) -> int:
            nonlocal number, n_documents, n_bytes, path
            is_new = document.path != path
            if n_documents == limit_documents or (is_new and n_bytes >= limit_bytes):
                number, n_documents, n_bytes = number + 1, 0, 0
            if is_new:
                path = document.path
                n_bytes += _size(document.path, limit_bytes)
            n_documents += 1
            return number

        for _, run in itertools.groupby(documents(self._sources, rows=True, **self._reading), part_of):
            yield run

    def _changed(self, where: str) -> UsageError:
        return UsageError(
            f"embedding into '{self.folder}': expected the inputs with which it was begun, found others at '{where}'; "
            "use another folder"
        )

    # ---- what is done ----

    def _table(self, part: Part) -> Path:
        return self.folder / f"{part.name}.parquet"

    def _record(self, part: Part) -> Path:
        return self.folder / PROGRESS / f"{part.number:05}.json"

    def done(self, part: Part) -> Done | None:
        """What came of a part; None where it is still to be made."""
        if not (self._record(part).exists() and self._table(part).exists()):
            return None
        return Done(**_read(self._record(part)))

    def _finish(self) -> None:
        """List what failed so far, in the order of the input."""
        for stray in self.folder.glob(f"{TEMP_PREFIX}failed-*"):
            stray.unlink()
        done = (self.done(part) for part in self.parts)
        lines = [json.dumps(f, ensure_ascii=False) + "\n" for d in done if d is not None for f in d.failures]
        if lines:
            self._publish(self.folder / FAILED, "".join(lines).encode(), "failed")

    def _whiten_parts(self) -> None:
        """Whiten the parts that are not; their rows are all there."""
        import pyarrow.parquet as pq

        path = self.folder / WHITENING
        if not path.exists():
            for stray in self.folder.glob(f"{TEMP_PREFIX}-*"):
                stray.unlink()
            _fitted([self._table(part) for part in self.parts], self.model, self._options).save(path)
        fitted = Whitening.load(path)
        for part in self.parts:
            table = self._table(part)
            if pq.read_schema(table).metadata[b"whitening"].decode() == fitted.digest:
                continue
            for stray in self.folder.glob(f"{TEMP_PREFIX}{part.name}-*"):
                stray.unlink()
            with _rewriting(table, table, fitted, temp_tag=part.name):
                failpoint("job.part.whitened")

    def _publish(self, path: Path, data: bytes, temp_tag: str) -> None:
        try:
            publish(path, data, kind="job", temp_tag=temp_tag)
        except OSError as error:
            raise OutputError(f"writing '{path}': {error.strerror or error}") from error

    @contextlib.contextmanager
    def _claims(self) -> Iterator[_Claims]:
        with (self.folder / PROGRESS / "lock").open("ab") as file:
            yield _Claims(file)


class Worker:
    """Makes the parts it is told of, one after the other; told of them in rising order, it reads the inputs once.

    raises  as `Job.run`, but waits for another process that is at work on the same part
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._walk = job._walk()
        self._next = 0

    def make(self, number: int) -> None:
        """Make a part if it is not done."""
        job = self._job
        with job._claims() as claims:
            claims.wait(number + 1)
            if job.done(job.parts[number]) is None:
                part, seen = self._reach(number)
                job._write(part, seen, Progress(), None)
        if number + 1 == len(job.parts):
            next(self._walk, None)  # there are no more documents than there were

    def _reach(self, number: int) -> tuple[Part, _Seen]:
        if number < self._next:
            self._walk, self._next = self._job._walk(), 0
        self._next = number + 1
        return next((part, seen) for part, seen in self._walk if part.number == number)


class _Claims:
    """Byte 0 is the folder's, byte i + 1 that of part i."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def take(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # held: EAGAIN or EACCES
            return False
        return True

    def wait(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)

    def release(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)


class _Seen:
    """A run of documents that notes which went by."""

    def __init__(self, run: Iterator[Document]) -> None:
        self._run = run
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

    def drained(self, number: int) -> Part:
        for _ in self:
            pass
        return Part(number, self._first, self._n, self._hash.hexdigest())

    def check(self, part: Part, job: Job) -> None:
        if self.drained(part.number) != part:
            raise job._changed(part.first)


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


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"reading '{path}': expected what a job wrote, found: {error}; use another folder") from error
    return value
