"""An evaluation as a folder: cells measured one after the other, which goes on where it was stopped, and grows.

A folder holds

    plan.jsonl       the cells that it was asked for, in order, one a line
    cells/           a job (`tables.jobs`) whose documents are these, each a part: the trials of a cell
    trials.parquet   the trials of all cells that are measured
    report.html      and what else `report` writes

A cell that is measured stays; asked for more lengths, tasks, documents or strategies, the folder gets more cells. A
cell that would be measured otherwise than it was, by another seed, text or model, is refused by name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rwkv_stream.errors import InputError, MismatchError, OutputError, UsageError
from rwkv_stream.evaluation.cells import SCHEMA, Cell, Evaluation, Measures, cells
from rwkv_stream.files import make_folder, publish
from rwkv_stream.tables.jobs import Job, Worker, join
from rwkv_stream.tables.row_batches import CallResult, RowBatches
from rwkv_stream.text.units import Failure, Source

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.tables.jobs import Fit

PLAN, CELLS, TRIALS = "plan.jsonl", "cells", "trials.parquet"
BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class EvaluationWork:
    """A job's work: the documents are cells, the rows their trials."""

    model: Model
    asked: Evaluation
    measures: Measures
    doing = "evaluating"
    fit: Callable[[Any], Fit] | None = None

    @property
    def decides(self) -> dict[str, Any]:
        from importlib.metadata import version

        numerics = json.dumps(self.model.numerics(1))
        return {"version": version("rwkv-stream"), "model": self.model.fingerprint, "numerics": numerics}

    @property
    def remake(self) -> Callable[[Model], EvaluationWork]:
        return functools.partial(_work, asked=self.asked)

    def rows(self, documents: Iterable[Source], on_failure: Callable[[Failure], None]) -> RowBatches:
        return RowBatches(SCHEMA, self.decides, self._results(documents), on_failure)

    def _results(self, documents: Iterable[Source]) -> Generator[CallResult | Failure, None, None]:
        for document in documents:
            with document.text() as text:
                cell = json.loads(b"".join(text))
            trials = self.measures.trials(cell)
            try:
                while some := list(islice(trials, BATCH_ROWS)):
                    tokens = sum(trial.get("computed") or 0 for trial in some)
                    yield CallResult(pa.RecordBatch.from_pylist(some, schema=SCHEMA), tokens, 0)
            except InputError as error:
                yield Failure(cell["key"], error)
                continue
            for loss in self.measures.losses:
                yield Failure(cell["key"], loss, 1)
            self.measures.losses.clear()
            yield CallResult(pa.RecordBatch.from_pylist([], schema=SCHEMA), 0, 1)

    def bytes_per_s(self) -> float:
        """Of no matter: a part is a cell."""
        return 1.0


def _work(model: Model, asked: Evaluation) -> EvaluationWork:
    return EvaluationWork(model, asked, Measures(model, asked))


@dataclass(slots=True)
class Progress:
    """How many of the cells that were asked for are measured, and how many were before; the one at work."""

    total: int = 0
    done: int = 0
    before: int = 0
    key: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """The cells that are measured, and their trials; what of the inputs was lost."""

    cells: list[Cell] = field(default_factory=list)
    trials: Path = Path(TRIALS)
    failures: list[InputError] = field(default_factory=list)


def run(asked: Evaluation, model: Model, folder: Path, progress: Progress | None = None) -> Measured:
    """Measure what is asked for and not measured yet in the folder; all that is measured there.

    raises  UsageError, MismatchError where the folder is another evaluation's, InputError where an input is missing,
            OutputError, BackendError for a model that gives no finite numbers
    """
    progress = progress or Progress()
    failures = list[InputError]()
    work = _work(model, asked)
    wanted = {cell["key"]: cell for cell in cells(work.measures, failures.append)}
    plan = _planned(folder, wanted)
    reading = {"text_column": "cell", "id_column": "key"}
    job = Job(folder / CELLS, [PLAN], work, reading=reading, part_rows=1, copies={PLAN: str(folder / PLAN)})
    numbers = dict(zip(plan, (part.number for part in job.parts), strict=True))
    progress.total = len(wanted)
    progress.done = progress.before = sum(job.record(job.parts[numbers[key]]) is not None for key in wanted)
    worker = Worker(job)
    for key in sorted(wanted, key=numbers.__getitem__):
        part = job.parts[numbers[key]]
        if job.record(part) is None:
            progress.key = key
            worker.make(part.number)
            progress.done += 1
    tables, measured = list[Path](), list[Cell]()
    for key, cell in plan.items():
        record = job.record(job.parts[numbers[key]])
        if record is not None:
            tables.append(job.table(job.parts[numbers[key]]))
            measured.append(cell)
            failures += [InputError(failed["error"]) for failed in record.failures]
    join(tables, folder / TRIALS)
    return Measured(measured, folder / TRIALS, failures)


def _planned(folder: Path, wanted: Mapping[str, Cell]) -> dict[str, Cell]:
    """The plan of a folder with what it lacks of the wanted cells, written; by key."""
    path = folder / PLAN
    plan = {cell["key"]: cell for cell in _plan(path)}
    for key, cell in wanted.items():
        begun = plan.get(key, cell)
        differing = [name for name in {*cell, *begun} if cell.get(name) != begun.get(name)]
        if "model" in differing:
            raise MismatchError(
                f"evaluating into '{folder}': expected the model {begun['model'][:12]} that began it, found "
                f"{cell['model'][:12]}; pass --model with that one, or use another folder"
            )
        if differing:
            name = min(differing)
            raise UsageError(
                f"evaluating into '{folder}': '{key}' was begun with {name} {json.dumps(begun.get(name))}, found "
                f"{json.dumps(cell.get(name))}; use the same inputs and options, or another folder"
            )
    plan |= wanted
    lines = "".join(json.dumps({"key": key, "cell": json.dumps(cell)}) + "\n" for key, cell in plan.items())
    try:
        make_folder(folder)
        publish(path, lines.encode())
    except OSError as error:
        raise OutputError(f"writing '{path}': {error.strerror or error}") from error
    return plan


def _plan(path: Path) -> Iterator[Cell]:
    if not path.exists():
        return
    try:
        for line in path.read_bytes().splitlines():
            cell = json.loads(json.loads(line)["cell"])
            yield {**cell, "key": str(cell["key"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"reading '{path}': expected what an evaluation wrote, found: {error}; use another folder"
        ) from error
