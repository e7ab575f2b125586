"""Jobs: rows of a corpus as a folder of parts that goes on where it was stopped, and grows with its inputs.

A folder holds

    part-00000.parquet …    rows of a run of documents
    _manifest.jsonl         what decides the rows, how large parts are, and what the documents of each are known by
    _progress/00000.json …  what came of each part, with the size and digest of its table, written when that is whole
    _lock                   locks that claim parts
    failed.jsonl            documents that cannot be read, if there are any; written when a run ends

All are published whole or not at all. How the corpus is cut into parts is decided once, from the inputs alone, by
rows and bytes (`parts`), so that it is the same however often a job is stopped and whoever writes a part. A part
without its record, or whose table is not the one that was recorded, is made again, and nothing else. Each run holds
the inputs against the manifest first: new documents become further parts, what was changed or removed is refused.

What a job makes of a part is a `Work`, and this module knows no more of it. A work may have a *fit*, which is made of
the rows of all parts and then applied to each, as a whitening is. Then parts are kept as they were made in `_plain/`;
when none is missing the fit is made, and all fitted tables take the place of those before by one `switch`. So a table
that is there is fitted by what lies beside it, and after growth all are fitted anew from the plain ones.

A restart is made in `_restart/`, as a folder of its own; the old job stays until the new one is whole, and is then
switched for it. A table is a job in a hidden folder beside it, whose parts are joined at the end. What is unfinished in
either of these is only kept while it fits: another run, of other inputs or options, begins it anew.

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
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rwkv_stream.errors import InputError, MismatchError, OutputError, StoreLockedError, UsageError
from rwkv_stream.files import (
    TEMP_PREFIX,
    failpoint,
    fsync_folder,
    make_folder,
    publish,
    publishing,
    remove,
    scratch,
    sweep,
)
from rwkv_stream.tables import switch
from rwkv_stream.tables.parts import (
    PART_ROWS,
    ChangedError,
    Corpus,
    Cut,
    DocumentRun,
    Manifest,
    Part,
    Span,
    Walk,
    Watched,
    cut,
    line,
)
from rwkv_stream.tables.row_batches import Counts, RowBatches, Totals
from rwkv_stream.tables.writers import Writer, check_output
from rwkv_stream.text.readers import READ_BYTES, documents
from rwkv_stream.text.readers.streams import File, Stdin
from rwkv_stream.text.units import Failure

if TYPE_CHECKING:
    import pyarrow as pa

    from rwkv_stream.model import Model

FORMAT = 2  # of a manifest
MANIFEST = "_manifest.jsonl"
FAILED = "failed.jsonl"
PROGRESS = "_progress"
PLAIN = "_plain"
FITTED = "_fitted.json"
RESTART = "_restart"
LOCK = "_lock"
MAKING = "_fitting"  # fitted tables that are not whole yet
PART_S = 60  # of work, about, in a part
TABLE_ROWS = 1024  # of a table that is copied, at a time
FOLDER_BYTE, USE_BYTE, PART_BYTE = 0, 1, 2  # of the lock: the folder's, that of those at work in it, those of parts
_STEPS = ("written", "synced", "renamed", "published")
FAILPOINTS = (  # those of `switch` beside
    *("job.part.begun", "job.part.rows", "job.part.whole", "job.part.recorded", "job.ended"),
    *(f"{kind}.{step}" for kind in ("table", "job") for step in _STEPS),
)
NUMERICS = ("version", "numerics")  # may differ between runs; rows then differ in their last bits

log = logging.getLogger(__name__)


class Fit(Protocol):
    """What was made of the rows of all parts, and is applied to each.

    suffix    of its file's name
    metadata  of a table that it was applied to, beside what that had
    """

    @property
    def suffix(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def save(self, path: Path) -> None: ...
    def apply_to_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch: ...


class Work(Protocol):
    """What a job does with documents.

    doing    in a word, of messages: "embedding"
    model    whose work it is; None where none is asked
    decides  all that decides the rows, the model's fingerprint as `model` among it; can become JSON; the first that is
             another than a folder was begun with is named
    remake   the same work of another process, which has loaded the model; can be pickled
    fit      of Parquet files of all rows, in order; None where rows stay as they were made
    """

    @property
    def doing(self) -> str: ...
    @property
    def model(self) -> Model | None: ...
    @property
    def decides(self) -> Mapping[str, Any]: ...
    @property
    def remake(self) -> Callable[[Any], Work]: ...
    @property
    def fit(self) -> Callable[[Sequence[Path]], Fit] | None: ...
    def rows(self, documents: Iterable[Watched], on_failure: Callable[[Failure], None]) -> RowBatches: ...
    def bytes_per_s(self) -> float:
        """How fast it is, about, by a short trial."""
        ...


@dataclass(slots=True)
class PartRecord(Counts):
    """What came of a part, and the size in bytes and SHA-256 of its table; `key` says of which work and documents."""

    failures: list[dict[str, str]] = field(default_factory=list)
    key: str = ""
    size: int = -1
    digest: str = ""


class Job:
    """The rows of many documents as a folder of parts.

    >>> job = Job("rows/", ["articles.jsonl"], work)
    >>> job.run()

    reading     arguments of `readers.documents`
    part_rows   documents in a part, and bytes of their text, whichever comes first; without either, about as many as a
    part_bytes  minute makes, by a trial. They are decided once
    restart     make it anew, whatever the inputs and options were; what is there stays until the new job is whole
    table       what the parts are joined to in the end: what is in the folder and does not fit may be left
    grows       False where the inputs are taken to be those of the manifest, as by a worker that is sent a job
    raises      UsageError where the folder is another job's, or inputs have changed, MismatchError where it is another
                model's; InputError where a source is missing, OutputError

    parts    of the inputs as they are now
    """

    def __init__(
        self,
        folder: str | Path,
        sources: Sequence[str],
        work: Work,
        *,
        reading: Mapping[str, Any] | None = None,
        part_rows: int | None = None,
        part_bytes: int | None = None,
        restart: bool = False,
        table: Path | None = None,
        grows: bool = True,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.work, self.is_restart = Path(folder), work, restart
        self.place = self.folder  # where it is made
        self._doing = f"{work.doing} into '{table or folder}'"
        for name, given in (("part_rows", part_rows), ("part_bytes", part_bytes)):
            if given is not None and given < 1:
                raise UsageError(f"{self._doing}: expected {name} of 1 or more, found {given}")
        if table is None:
            self._check_apart(sources)
        self._cut = Cut(part_rows, part_bytes)
        self._is_kept, self._grows = table is None, grows
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}
        self._held = contextlib.ExitStack()  # copies of inputs
        self.corpus = Corpus(tuple(sources), dict(reading or {}), copies or {})
        self.decides: dict[str, Any] = {**work.decides, "reading": dict(self.corpus.reading)}
        self._key = _digest({name: value for name, value in self.decides.items() if name not in NUMERICS})
        is_new = not self.folder.exists()
        self.claims = self._use()
        try:
            self._open()
        except BaseException:
            self._held.close()
            if is_new and not (self.folder / MANIFEST).exists():
                _remove_empty(self.folder)
            raise
        finally:
            self.claims.release(FOLDER_BYTE)

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
                    UsageError where the inputs have changed since the run began
        """
        i, n = shard
        if not 0 <= i < n:
            raise UsageError(f"{self._doing}: expected a shard (i, n) with 0 <= i < n, found {shard}")
        totals = totals or Totals()
        totals.total_documents = sum(part.documents for part in self.parts[i::n])
        busy: list[str] = []
        with self._held:
            missing = {part.number for part in self.parts[i::n] if not self._count(part, totals)}
            for part, run in self.walk(missing):
                with self.claims.taking(PART_BYTE + part.number) as is_taken:
                    if not is_taken:
                        busy.append(part.name)
                    elif not self._count(part, totals):  # not done by another in the meantime
                        self.write(part, run, totals, on_failure)
            with self.claims.waiting(FOLDER_BYTE):
                self._end()
        failpoint("job.ended")
        if busy:
            raise StoreLockedError(
                f"{self._doing}: expected to write {len(busy)} more parts, found another run at work "
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
            if record.key != self._part_key(part):
                return None
            found = self._found(self.table(part))
        except (OSError, ValueError, TypeError):  # there is none, or not all of it
            return None
        return record if found == (record.size, record.digest) else None

    def _is_recorded(self, part: Part) -> bool:
        """Whether there is a record of a part, of these documents as far as can be seen."""
        try:
            return bool(json.loads(self._record(part).read_bytes())["key"] == self._part_key(part))
        except OSError:
            return False
        except (ValueError, TypeError, KeyError):  # damaged
            return True

    def table(self, part: Part) -> Path:
        """Of a part as it was made."""
        folder = self.place if self.work.fit is None else self.place / PLAIN
        return folder / f"{part.name}.parquet"

    def _found(self, table: Path) -> tuple[int, str]:
        """The size and digest of a table; read again only where the file is another than before."""
        status = table.stat()
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._digests.get(table, ((), ""))[0] != stamp:
            digest = hashlib.sha256()
            with table.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self._digests[table] = stamp, digest.hexdigest()
        return status.st_size, self._digests[table][1]

    def _part_key(self, part: Part) -> str:
        return _digest([self._key, part.digest])

    # ---- what there is to do ----

    def _check_apart(self, sources: Sequence[str]) -> None:
        """Raises UsageError for a folder within an input, which would grow with each run."""
        for source in sources:
            if Path(source).is_dir() and Path(source).resolve() in (self.folder / LOCK).resolve().parents:
                raise UsageError(
                    f"{self._doing}: expected a folder that is not in one of its inputs, found it in '{source}', with "
                    "which its parts would be read; use another folder"
                )

    def _use(self) -> Claims:
        """The folder, made and locked; it is in use for as long as this object lives."""
        try:
            while True:
                make_folder(self.folder)
                claims = Claims(self.folder / LOCK)
                claims.wait(FOLDER_BYTE)
                if claims.is_named():  # else it was a table's, which was whole and removed
                    claims.share(USE_BYTE)
                    return claims
        except OSError as error:
            raise OutputError(f"{self._doing}: {error.strerror or error}") from error

    def _open(self) -> None:
        """Under the folder's lock: find the place, and decide what is to be made there."""
        switch.finish(self.folder, self._stale)
        restart, is_begun = self.folder / RESTART, (self.folder / MANIFEST).exists()
        if self._is_kept and not is_begun and any(self.folder.glob("*.parquet")):
            raise UsageError(
                f"{self._doing}: expected a new folder or that of a job, found tables without a {MANIFEST}; use "
                "another folder"
            )
        if self.is_restart and self._is_kept:
            self.place = restart
            switch.finish(restart, self._stale)
            if is_begun:
                n = len([*self.folder.glob("part-*.parquet")])
                log.warning("'%s' is made anew; its %d parts stay until the new ones are whole", self.folder, n)
        elif restart.exists():
            log.warning("'%s': its restart has not ended, pass --restart to go on with that", self.folder)
        with self._output_errors(self.place):
            sweep(self.folder)  # copies of stdin
            for name in (PROGRESS, *([] if self.work.fit is None else [PLAIN])):
                make_folder(self.place / name)
            self._copy_sources()
        self._plan()

    def _copy_sources(self) -> None:
        """Keep what can be read but once, stdin and pipes, for as long as this process is at work."""
        copies = dict(self.corpus.copies)
        once = [source for source in self.corpus.sources if source not in copies and _is_read_once(source)]
        if "-" in once and self.corpus.reading.get("name") is None:
            next(documents(["-"]))  # which says what it wants
        for number, source in enumerate(once):
            folder = self._held.enter_context(scratch(self.folder)) / str(number)
            folder.mkdir()
            path = folder / (Path(source).name or "stdin")
            stream = Stdin().open(source) if source == "-" else File(source).open(source)
            with contextlib.closing(stream), path.open("wb") as file:
                while block := stream.read1(READ_BYTES):
                    file.write(block)
            copies[source] = str(path)
        self.corpus = replace(self.corpus, copies=copies)

    def _plan(self) -> None:
        """Decide upon the parts, or upon further ones."""
        path = self.place / MANIFEST
        self._sweep("manifest-*")
        given = self._cut
        if path.exists() and self.is_restart and not self._is_kept:
            self._leave(f"{self._doing}: asked to make it anew")
        if path.exists():
            try:
                self._grow(path)
            except (UsageError, MismatchError) as error:
                if self._is_kept and self.place == self.folder:
                    raise
                self._leave(str(error))
                self._cut = given
            else:
                return
        if self._cut == Cut(None, None):
            size = max(1, PART_S * self.work.bytes_per_s())
            self._cut = Cut(PART_ROWS, 1 << round(math.log2(size)))  # trials that differ a little agree
        self._publish_manifest(cut(self.corpus, self._cut), self.decides)

    def _grow(self, path: Path) -> None:
        """Take the parts from the manifest, and add those of new documents to it."""
        manifest = Manifest(path)
        self._compare(manifest.header)
        self._manifest, self.parts = manifest, manifest.parts
        if not self._grows:
            return
        n_before = len(self.parts)
        repaired: dict[Span, Span] = {}
        decides = manifest.header["decides"]  # its numerics are those of most parts
        try:
            new = manifest.grown(self.corpus, self._cut, repaired)
            first = next(new, None)
            if first is not None:
                self._publish_manifest(itertools.chain(manifest.all({}), [first], new), decides)
        except ChangedError as error:
            raise ChangedError(
                f"{self._doing}: {error}; pass --restart to make it anew, or use another folder"
            ) from error
        if repaired:
            log.warning(
                "'%s': what could not be read before can be read now; it is made again, with its part", self.folder
            )
            self._publish_manifest(self._manifest.all(repaired), decides)
        if new_parts := self.parts[n_before:]:
            n_documents = sum(part.documents for part in new_parts)
            log.warning(
                "'%s': the inputs have grown; new documents: %d, new parts: %d",
                self.folder,
                n_documents,
                len(new_parts),
            )

    def _publish_manifest(self, parts: Iterable[tuple[Part, Sequence[Span]]], decides: Mapping[str, Any]) -> None:
        header = {"format": FORMAT, "decides": decides, "inputs": list(self.corpus.sources), **asdict(self._cut)}
        path = self.place / MANIFEST
        with self._output_errors(path), publishing(path, kind="job", temp_tag="manifest") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for part, spans in parts:
                file.write(line(part, spans))
        self._manifest = Manifest(path)
        self.parts = self._manifest.parts

    def _compare(self, header: Mapping[str, Any]) -> None:
        """Raise where the folder is another job's; parts are as large as they were decided to be."""
        found = header.get("format")
        if found != FORMAT:
            raise MismatchError(
                f"{self._doing}: expected a manifest of format {FORMAT}, found {found}; "
                + ("update rwkv-stream" if isinstance(found, int) and found > FORMAT else "pass --restart")
            )
        decides = header["decides"]
        wanted = json.loads(json.dumps(self.decides))
        differing = [name for name in {**wanted, **decides} if wanted.get(name) != decides.get(name)]
        if "model" in differing and "model" in wanted and "model" in decides:
            raise MismatchError(
                f"{self._doing}: expected the model {decides['model'][:12]} that began it, found "
                f"{wanted['model'][:12]}; pass --model with that one, --restart, or use another folder"
            )
        given = {name: value for name, value in asdict(self._cut).items() if value is not None}
        begun = {name: header[name] for name in asdict(self._cut)}
        for name in (*differing, *(name for name in given if given[name] != begun[name])):
            if name not in NUMERICS:
                raise UsageError(
                    f"{self._doing}: it was begun with {name} {json.dumps({**decides, **begun}.get(name))}, found "
                    f"{json.dumps({**wanted, **given}.get(name))}; use the same options, --restart, or another folder"
                )
        self._cut = Cut(**begun)
        sources = iter(self.corpus.sources)
        for source in header["inputs"]:
            if source not in sources:  # which goes on behind the one before
                raise ChangedError(
                    f"{self._doing}: expected the inputs with which it was begun, in their order, others between them "
                    f"if you like, found '{source}' left out or elsewhere; name it, pass --restart, or use another "
                    "folder"
                )
        if differing:
            log.warning(
                "'%s' was begun under another %s; rows may differ in their last bits from part to part",
                self.folder,
                " and ".join(differing),
            )

    def _leave(self, reason: str) -> None:
        """Remove what was made of another job; raises StoreLockedError where that is at work."""
        reason = reason.partition(";")[0]
        if not self.claims.take(USE_BYTE):
            raise StoreLockedError(f"{reason}; another run is at work on what was begun, wait for its end")
        log.warning("%s; what was made of it is left, and it begins anew", reason)
        for folder in (self.place / PROGRESS, self.place / PLAIN, self.place):
            for path in sorted(folder.glob("*")):
                if path.name not in (LOCK, MANIFEST, PROGRESS, PLAIN) and not path.name.startswith(TEMP_PREFIX):
                    remove(path)
        (self.place / MANIFEST).unlink()  # the last: what is there is never another job's
        self.claims.share(USE_BYTE)

    def walk(self, numbers: Iterable[int]) -> Iterator[tuple[Part, DocumentRun]]:
        """Parts with their documents, in rising order, in one pass over the inputs for each generation."""
        wanted, n_left = set(numbers), len(set(numbers))
        for generation in sorted({self.parts[number].generation for number in wanted}):
            inputs = Walk(self.corpus)
            for part, spans in self._manifest.generation(generation):
                if part.number in wanted:
                    n_left -= 1
                    yield part, DocumentRun(inputs, spans)
                if not n_left:  # others may end the job now, and move it
                    return

    # ---- making parts ----

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
        table = self.table(part)
        self._sweep(f"{part.name}-*")
        if table.exists() and self._is_recorded(part):
            log.warning("'%s' is not the table that was made: it is made again", table)
        failures: list[dict[str, str]] = []

        def note(failure: Failure) -> None:
            failures.append({"document": failure.document, "error": str(failure.error)})
            if on_failure is not None:
                on_failure(failure)

        failpoint("job.part.begun")
        batches = self.work.rows(run, note)
        schema, metadata = batches.schema, batches.metadata
        with totals.of(batches), Writer(table, schema, metadata, temp_tag=part.name) as writer:
            for batch in batches:
                writer.write_batch(batch)
                failpoint("job.part.rows")
            try:
                run.check()
            except ChangedError as error:
                raise ChangedError(f"{self._doing}: {error}; they changed while it ran: run it again") from error
        failpoint("job.part.whole")
        counts = {field.name: getattr(batches, field.name) for field in fields(Counts)}
        size, digest = self._found(table)
        record = PartRecord(**counts, failures=failures, key=self._part_key(part), size=size, digest=digest)
        self._publish(self._record(part), _json(asdict(record)), part.name)
        failpoint("job.part.recorded")

    # ---- when parts are made ----

    def _end(self) -> None:
        """Under the folder's lock: list what failed; where no part is missing, fit them, put the job in its place."""
        if self.place != self.folder and not (self.place / MANIFEST).exists():
            self.place = self.folder  # another shard was the last
        self._manifest = Manifest(self.place / MANIFEST)  # which another run may have seen grow
        self.parts = self._manifest.parts
        self._list_failures()
        if self.missing():
            return
        if self.work.fit is not None and self._is_kept and not self._is_fitted():
            self._fit_parts()
        if self.place != self.folder:
            switch.switch(self.folder, self.place, self._stale)
            self.place = self.folder

    def failures(self) -> Iterator[Failure]:
        """What could not be read so far, in the order of the parts."""
        for part in self.parts:
            record = self.record(part)
            for failed in record.failures if record is not None else ():
                yield Failure(failed["document"], InputError(failed["error"]))

    def _list_failures(self) -> None:
        path = self.place / FAILED
        self._sweep("failed-*")
        failures = self.failures()
        first = next(failures, None)
        if first is None:
            path.unlink(missing_ok=True)
            return
        with self._output_errors(path), publishing(path, kind="job", temp_tag="failed") as file:
            for failure in itertools.chain([first], failures):
                value = {"document": failure.document, "error": str(failure.error)}
                file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")

    def _is_fitted(self) -> bool:
        """Whether the tables that are there are those that the parts were fitted to."""
        try:
            fitted = json.loads((self.place / FITTED).read_bytes())
            if fitted["parts"] != self._made():
                return False
            for name, found in fitted["files"].items():
                if list(self._found(self.place / name)) != found:
                    log.warning("'%s' is not the table that was made: it is made again", self.place / name)
                    return False
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or not all of it
            return False
        return True

    def _made(self) -> str:
        """A digest over the tables of all parts as they were made."""
        return _digest([self._found(self.table(part)) for part in self.parts])

    def _fit_parts(self) -> None:
        """Fit the parts, and let the fitted tables take the place of those before."""
        assert self.work.fit is not None
        making = self.place / MAKING
        tables = [self.table(part) for part in self.parts]
        fit = self.work.fit(tables)
        with self._output_errors(making):
            if making.exists():
                remove(making)
            making.mkdir()
            fit.save(making / f"_rows{fit.suffix}")
        for table in tables:
            join([table], making / table.name, fit)
            failpoint("job.part.fitted")
        files = {path.name: self._found(path) for path in sorted(making.iterdir())}
        self._publish(making / FITTED, _json({"parts": self._made(), "files": files}), "")
        switch.switch(self.place, making, self._stale)

    def _stale(self, ready: Path) -> list[Path]:
        """What a new set of files takes the place of: fitted tables, or the whole job."""
        folder = ready.parent
        names = [FITTED] if not (ready / MANIFEST).exists() else [MANIFEST, FITTED, FAILED, PROGRESS, PLAIN]
        found = [path for name in names if (path := folder / name).exists()]
        return [*found, *sorted(folder.glob("part-*.parquet")), *sorted(folder.glob("_rows.*"))]

    # ---- files ----

    def _record(self, part: Part) -> Path:
        return self.place / PROGRESS / f"{part.number:05}.json"

    def _publish(self, path: Path, data: bytes, temp_tag: str) -> None:
        with self._output_errors(path):
            publish(path, data, kind="job", temp_tag=temp_tag)

    @contextlib.contextmanager
    def _output_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"writing '{path}': {error.strerror or error}") from error

    def _sweep(self, pattern: str) -> None:
        """Remove temps that a dead run left, of a file that this one holds the lock of."""
        for folder in (self.place, self.place / PROGRESS, self.place / PLAIN):
            for stray in folder.glob(f"{TEMP_PREFIX}{pattern}"):
                stray.unlink()


class Worker:
    """Makes the parts it is told of, one after the other; told of them in rising order, it reads the inputs once.

    raises  as `Job.run`, but waits for another process that is at work on the same part
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._walk: Iterator[tuple[Part, DocumentRun]] = iter(())

    def make(self, number: int) -> None:
        """Make a part if it is not done."""
        job = self._job
        with job.claims.waiting(PART_BYTE + number):
            if job.record(job.parts[number]) is None:
                part, run = self._reach(number)
                job.write(part, run, Totals())

    def _reach(self, number: int) -> tuple[Part, DocumentRun]:
        for part, run in self._walk:
            if part.number == number:
                return part, run
            if part.number > number:
                break
        self._walk = self._job.walk(range(number, len(self._job.parts)))
        return next(self._walk)


def make_table(
    output: Path,
    sources: Sequence[str],
    work: Work,
    *,
    reading: Mapping[str, Any] | None = None,
    part_rows: int | None = None,
    restart: bool = False,
    totals: Totals | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Totals:
    """Write the rows of all documents to one table; it is there when it is whole, beside what was fitted.

    Until then its parts are kept, and the next call goes on with them.

    restart     leave such parts
    on_failure  told of each document that cannot be read; without it the first one raises
    raises      as `Job`, and InputError where all documents fail
    """
    check_output(output)
    folder = output.with_name(f".{output.name}.parts")
    totals = totals or Totals()

    def tell(failure: Failure) -> None:
        if on_failure is None:
            raise failure.error
        on_failure(failure)

    try:
        job = Job(folder, sources, work, reading=reading, part_rows=part_rows, restart=restart, table=output)
        for failure in job.failures():  # of an earlier run
            tell(failure)
        job.run(totals=totals, on_failure=tell)
        with job.claims.waiting(FOLDER_BYTE):
            if job.missing():
                raise StoreLockedError(
                    f"{work.doing} into '{output}': expected all parts, found that another run has seen the inputs "
                    "grow meanwhile; run it again"
                )
            if totals.failed and not totals.documents:
                remove(folder)
                raise InputError(
                    f"{work.doing} into '{output}': all {totals.failed} documents failed; nothing was written"
                )
            _publish_table(output, job)
            if job.claims.take(USE_BYTE):  # else another run is about to publish the same table
                remove(folder)
    except BaseException:
        _remove_empty(folder)
        raise
    return totals


def _publish_table(output: Path, job: Job) -> None:
    """Join the parts of a job, all made. What was fitted is there before the table, as that of an older one is."""
    tables = [job.table(part) for part in job.parts]
    if job.work.fit is None:
        join(tables, output)
        return
    fit = job.work.fit(tables)
    new, own = output.with_suffix(f".new{fit.suffix}"), output.with_suffix(fit.suffix)
    fit.save(new)
    join(tables, output, fit)
    new.replace(own)
    fsync_folder(own.parent)
    failpoint("job.fit.renamed")


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a job of which no part was made, unless another run is at work in it."""
    if folder.exists() and not any(folder.glob(f"{PROGRESS}/*.json")):
        with contextlib.suppress(OSError):
            claims = Claims(folder / LOCK)
            if claims.take(USE_BYTE):
                remove(folder)


def join(tables: Sequence[Path], output: Path, fit: Fit | None = None) -> None:
    """Write the rows of Parquet files of one schema to one table, with a fit applied to them."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(tables[0])
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    with Writer(output, schema.remove_metadata(), {**metadata, **(fit.metadata if fit else {})}) as writer:
        for table in tables:
            with pq.ParquetFile(table) as file:
                for batch in file.iter_batches(TABLE_ROWS):
                    writer.write_batch(batch if fit is None else fit.apply_to_rows(batch))


class Claims:
    """Locks on bytes of a file: of the folder, of those at work in it, of each part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a+b")  # as long as this object lives

    def is_named(self) -> bool:
        """Whether the file still has its name."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def take(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # held: EAGAIN or EACCES
            return False
        return True

    def wait(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)

    def share(self, byte: int) -> None:
        """Hold it beside others that share it."""
        fcntl.lockf(self._file, fcntl.LOCK_SH, 1, byte)

    def release(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    @contextlib.contextmanager
    def taking(self, byte: int) -> Iterator[bool]:
        """Whether it could be taken, for as long as the block lasts."""
        is_taken = self.take(byte)
        try:
            yield is_taken
        finally:
            if is_taken:
                self.release(byte)

    @contextlib.contextmanager
    def waiting(self, byte: int) -> Iterator[None]:
        self.wait(byte)
        try:
            yield
        finally:
            self.release(byte)


def _is_read_once(source: str) -> bool:
    """Whether it is stdin or a pipe."""
    if source == "-":
        return True
    try:
        return not stat.S_ISREG(mode := os.stat(source).st_mode) and not stat.S_ISDIR(mode)  # noqa: PTH116 -- a URL is no Path
    except (OSError, ValueError):
        return False  # a URL or a pattern, or what reading it will complain of


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"
