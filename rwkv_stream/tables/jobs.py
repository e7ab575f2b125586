"""Jobs: embeddings of a corpus as a folder of parts that goes on where it was stopped.

A folder holds

    part-00000.parquet …    rows of a run of documents, in the order of the input
    _manifest.json          what decides the rows: inputs, options, model; and every part with the documents in it
    _progress/00000.json …  what came of each part, with the size and digest of its table, written when that is whole;
                            and the lock that claims parts
    failed.jsonl            documents that cannot be read, if there are any; written when a run ends
    _rows.whitening.safetensors  the whitening, where one was asked for

A whitening is fitted on all parts in their order, whoever made them, by the run that makes the last one. Each part is
then written again, whitened; its metadata says which it is, so that a run that was killed goes on there too.

All are published whole or not at all. How the corpus is cut into parts is decided once, from the inputs alone
(`parts`), so that it is the same however often a job is stopped and whoever writes a part. A part without its record,
or whose table is not the one that was recorded, is made again, and nothing else.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rwkv_stream.errors import InputError, MismatchError, OutputError, StoreLockedError, UsageError
from rwkv_stream.files import TEMP_PREFIX, failpoint, make_folder, publish
from rwkv_stream.tables import whitening
from rwkv_stream.tables.columns import citations
from rwkv_stream.tables.embedding import Embedding
from rwkv_stream.tables.embeddings import Counts, RowBatches, Totals, rows
from rwkv_stream.tables.parts import PART_BYTES, PART_DOCUMENTS, Corpus, DocumentRun, Part
from rwkv_stream.tables.writers import Writer
from rwkv_stream.text.readers import Document
from rwkv_stream.text.units import Failure
from rwkv_stream.values import updated

if TYPE_CHECKING:
    from rwkv_stream.model import Model

FORMAT = 1  # of a manifest
MANIFEST = "_manifest.json"
FAILED = "failed.jsonl"
PROGRESS = "_progress"
WHITENING = f"_rows{whitening.SUFFIX}"
_STEPS = ("written", "synced", "renamed", "published")
FAILPOINTS = (  # beside job.part.whitened
    *("job.part.begun", "job.part.rows", "job.part.whole", "job.part.recorded", "job.ended"),
    *(f"{kind}.{step}" for kind in ("table", "job") for step in _STEPS),
)
NUMERICS = ("version", "numerics")  # may differ between runs; rows then differ in their last bits

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PartRecord(Counts):
    """What came of a part, and the size in bytes and SHA-256 of its table."""

    failures: list[dict[str, str]] = field(default_factory=list)
    size: int = -1
    digest: str = ""


class Job:
    """The rows of many documents as a folder of parts.

    >>> job = Job("rows/", ["articles.jsonl"], model=model, units=("sentence",))
    >>> job.run()

    given     an `Embedding`; options are its fields
    reading   arguments of `readers.documents`
    whiten    fit a whitening on all rows, keep it in the folder, and apply it, when all parts are made
    raises    UsageError where the folder is another job's, MismatchError where it is another model's; InputError
              where a source is missing, OutputError

    decides   all that decides the rows, as the manifest has it
    """

    def __init__(
        self,
        folder: str | Path,
        sources: Sequence[str],
        given: Embedding | None = None,
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
        self.folder, self.model = Path(folder), model
        self.corpus = Corpus(tuple(sources), dict(reading or {}), part_documents, part_bytes)
        self._digests: dict[int, tuple[tuple[int, ...], str]] = {}
        self.embedding, self.whiten = updated(given or Embedding(), options, "embedding"), whiten
        with contextlib.closing(self._rows(())) as described:
            metadata = described.metadata
        self.decides: dict[str, Any] = {
            **metadata,
            "text": self.embedding.text,
            "inputs": list(sources),
            "reading": dict(self.corpus.reading),
            "part_documents": part_documents,
            "part_bytes": part_bytes,
            **({"whiten": True} if whiten else {}),
        }
        try:
            make_folder(self.folder / PROGRESS)
        except OSError as error:
            raise OutputError(f"embedding into '{folder}': {error.strerror or error}") from error
        with self.claims() as claims:
            claims.wait(0)
            self.parts = self._plan()

    def run(
        self,
        shard: tuple[int, int] = (0, 1),
        *,
        totals: Totals | None = None,
        on_failure: Callable[[Failure], None] | None = None,
    ) -> Totals:
        """Make what is missing of the parts i, i + n, i + 2 n, … for a shard (i, n); totals of all of them.

        on_failure  told of each document that cannot be read, now, not in an earlier run
        raises      StoreLockedError where another run is at work on some of these parts: the others are done;
                    UsageError where the inputs have changed since the folder was begun
        """
        i, n = shard
        if not 0 <= i < n:
            raise UsageError(f"embedding into '{self.folder}': expected a shard (i, n) with 0 <= i < n, found {shard}")
        totals = totals or Totals()
        totals.total_documents = sum(part.documents for part in self.parts[i::n])
        busy: list[str] = []
        with self.claims() as claims:
            if self.missing(shard):
                self._make(shard, claims, totals, on_failure, busy)
            else:
                for part in self.parts[i::n]:
                    self._count(part, totals)
            claims.wait(0)
            self._finish()
            if self.whiten and not self.missing():
                self._whiten_parts()
        failpoint("job.ended")
        if busy:
            raise StoreLockedError(
                f"embedding into '{self.folder}': expected to write {len(busy)} more parts, found another run at work "
                f"on {', '.join(busy[:3])}{' …' if len(busy) > 3 else ''}; run it again when that has ended"
            )
        return totals

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[Part]:
        """The parts of a shard that are not done."""
        i, n = shard
        return [part for part in self.parts[i::n] if self.record(part) is None]

    def record(self, part: Part) -> PartRecord | None:
        """What came of a part; None where it is still to be made, or its table is not the one that was made."""
        try:
            record = PartRecord(**json.loads(self._record(part).read_bytes()))
            found = self._found(part)
        except (OSError, ValueError, TypeError):  # there is none, or not all of it
            return None
        return record if found == (record.size, record.digest) else None

    def _found(self, part: Part) -> tuple[int, str]:
        """The size and digest of a part's table; read again only where the file is another than before."""
        table = self._table(part)
        status = table.stat()
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._digests.get(part.number, ((), ""))[0] != stamp:
            digest = hashlib.sha256()
            with table.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self._digests[part.number] = stamp, digest.hexdigest()
        return status.st_size, self._digests[part.number][1]

    # ---- what there is to do ----

    def _plan(self) -> list[Part]:
        """The parts, as the manifest has them; a new folder gets its manifest."""
        path = self.folder / MANIFEST
        if path.exists():
            manifest = _read(path)
            if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
                raise MismatchError(
                    f"embedding into '{self.folder}': expected a manifest of format {FORMAT} or older, found "
                    f"{manifest.get('format')}; update rwkv-stream"
                )
            self._compare(manifest["decides"])
            return [Part(**part) for part in manifest["parts"]]
        if any(self.folder.glob("*.parquet")):
            raise UsageError(
                f"embedding into '{self.folder}': expected a new folder or that of a job, found tables without a "
                f"{MANIFEST}; use another folder"
            )
        self._sweep("manifest-*")
        parts = [run.part() for run in self.corpus.runs()]
        manifest = {"format": FORMAT, "decides": self.decides, "parts": [asdict(part) for part in parts]}
        self._publish(path, _json(manifest), "manifest")
        return parts

    def _compare(self, decides: Mapping[str, Any]) -> None:
        wanted = json.loads(_json(self.decides))
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

    def walk(self) -> Iterator[tuple[Part, DocumentRun]]:
        """The parts with their documents, in one pass over the inputs; raises UsageError where these have changed."""
        for part, run in itertools.zip_longest(self.parts, self.corpus.runs(), fillvalue=None):
            if part is None or run is None:
                raise self._changed(part.first if part else "more documents")
            yield part, run
            self._check(part, run)

    def _check(self, part: Part, run: DocumentRun) -> None:
        if run.part() != part:
            raise self._changed(part.first)

    def _changed(self, where: str) -> UsageError:
        return UsageError(
            f"embedding into '{self.folder}': expected the inputs with which it was begun, found others at '{where}'; "
            "use another folder"
        )

    # ---- making parts ----

    def _make(
        self,
        shard: tuple[int, int],
        claims: Claims,
        totals: Totals,
        on_failure: Callable[[Failure], None] | None,
        busy: list[str],
    ) -> None:
        """Go through the inputs once; documents of parts that are done, or others', are passed over."""
        i, n = shard
        for part, run in self.walk():
            if part.number % n == i and not self._count(part, totals):
                if not claims.take(part.number + 1):
                    busy.append(part.name)
                elif not self._count(part, totals):  # not done by another in the meantime
                    self.write(part, run, totals, on_failure)
                claims.release(part.number + 1)

    def _count(self, part: Part, totals: Totals) -> bool:
        record = self.record(part)
        if record is None:
            return False
        totals.skip(record)
        return True

    def write(
        self, part: Part, run: DocumentRun, totals: Totals, on_failure: Callable[[Failure], None] | None = None
    ) -> None:
        """Make the table of a part that was claimed, then its record."""
        self._sweep(f"{part.name}-*")
        if self._record(part).exists() and self._table(part).exists():
            log.warning("'%s' is not the table that was made: it is made again", self._table(part))
        failures: list[dict[str, str]] = []

        def note(failure: Failure) -> None:
            failures.append({"document": failure.document, "error": str(failure.error)})
            if on_failure is not None:
                on_failure(failure)

        failpoint("job.part.begun")
        batches = self._rows(run, note)
        schema, metadata = batches.schema, batches.metadata
        with totals.of(batches), Writer(self._table(part), schema, metadata, temp_tag=part.name) as writer:
            for batch in batches:
                writer.write_batch(batch)
                failpoint("job.part.rows")
            self._check(part, run)
        failpoint("job.part.whole")
        counts = {field.name: getattr(batches, field.name) for field in fields(Counts)}
        self._note(part, PartRecord(**counts, failures=failures))
        failpoint("job.part.recorded")

    def _note(self, part: Part, record: PartRecord) -> None:
        """Keep what came of a part whose table is there now."""
        size, digest = self._found(part)
        self._publish(self._record(part), _json(asdict(replace(record, size=size, digest=digest))), part.name)

    def _rows(self, documents: Iterable[Document], on_failure: Callable[[Failure], None] | None = None) -> RowBatches:
        return rows(documents, self.embedding, model=self.model, columns=citations(), on_failure=on_failure)

    def _finish(self) -> None:
        """List what failed so far, in the order of the input."""
        self._sweep("failed-*")
        records = (self.record(part) for part in self.parts)
        lines = [json.dumps(f, ensure_ascii=False) + "\n" for r in records if r is not None for f in r.failures]
        if lines:
            self._publish(self.folder / FAILED, "".join(lines).encode(), "failed")

    def _whiten_parts(self) -> None:
        """Whiten the parts that are not; their rows are all there."""
        import pyarrow.parquet as pq

        path = self.folder / WHITENING
        tables = [self._table(part) for part in self.parts]
        if not path.exists():
            self._sweep("-*")
            fitted = whitening.fit_tables(tables, model=self.model.fingerprint, pooling=self.embedding.pooling)
            fitted.save(path)
        fitted = whitening.Whitening.load(path)
        for part, table in zip(self.parts, tables, strict=True):
            if pq.read_schema(table).metadata[b"whitening"].decode() != fitted.digest:
                self._sweep(f"{part.name}-*")
                record = self.record(part)
                assert record is not None, "no part is missing"
                with whitening.whitening_table(table, table, fitted, temp_tag=part.name):
                    failpoint("job.part.whitened")
                self._note(part, record)

    # ---- files ----

    def _table(self, part: Part) -> Path:
        return self.folder / f"{part.name}.parquet"

    def _record(self, part: Part) -> Path:
        return self.folder / PROGRESS / f"{part.number:05}.json"

    def _publish(self, path: Path, data: bytes, temp_tag: str) -> None:
        try:
            publish(path, data, kind="job", temp_tag=temp_tag)
        except OSError as error:
            raise OutputError(f"writing '{path}': {error.strerror or error}") from error

    def _sweep(self, pattern: str) -> None:
        """Remove temps that a dead run left, of a file that this one holds the lock of."""
        for folder in (self.folder, self.folder / PROGRESS):
            for stray in folder.glob(f"{TEMP_PREFIX}{pattern}"):
                stray.unlink()

    @contextlib.contextmanager
    def claims(self) -> Iterator[Claims]:
        """The locks that claim parts; given back at the end."""
        with (self.folder / PROGRESS / "lock").open("ab") as file:
            yield Claims(file)


class Worker:
    """Makes the parts it is told of, one after the other; told of them in rising order, it reads the inputs once.

    raises  as `Job.run`, but waits for another process that is at work on the same part
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._walk = job.walk()
        self._next = 0

    def make(self, number: int) -> None:
        """Make a part if it is not done."""
        job = self._job
        with job.claims() as claims:
            claims.wait(number + 1)
            if job.record(job.parts[number]) is None:
                part, run = self._reach(number)
                job.write(part, run, Totals())
        if number + 1 == len(job.parts):
            next(self._walk, None)  # there are no more documents than there were

    def _reach(self, number: int) -> tuple[Part, DocumentRun]:
        if number < self._next:
            self._walk, self._next = self._job.walk(), 0
        self._next = number + 1
        return next((part, run) for part, run in self._walk if part.number == number)


class Claims:
    """Locks on bytes of a file: byte 0 is the folder's, byte i + 1 that of part i."""

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


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"reading '{path}': expected what a job wrote, found: {error}; use another folder") from error
    return value
