"""Ray: a job's parts made by processes on as many machines as a Ray cluster has.

>>> run(embed_job("rows/", ["articles.jsonl"], model=model), workers=4)

A Ray Data pipeline over the numbers of the missing parts: an actor holds the model and makes a part as the local engine
does, reading and tokenising on threads beside the model, and publishes it in the job's folder; what comes back to the
driver is the number of a part that is done. No text, token or vector passes through Ray. Each actor goes through the
inputs once, as a shard does.

A part is done when its record is there, whoever made it, and parts are claimed by locks: so a part that is tried again
gives its rows once. When an actor dies, the pipeline ends, and a new one begins over what is missing then. Actors are
not restarted one by one, since Ray would wait for the place of one whose machine is gone.

The inputs, the model and the job's folder have the same paths on all machines, on a file system whose locks hold
between these.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_stream import interrupts
from rwkv_stream.errors import BackendError, InputError, RwkvStreamError, UsageError
from rwkv_stream.extras import needed
from rwkv_stream.tables.jobs import Job, Worker
from rwkv_stream.tables.parts import Part
from rwkv_stream.tables.row_batches import Totals
from rwkv_stream.text.units import Failure

if TYPE_CHECKING:
    from rwkv_stream.model import Loading, Model
    from rwkv_stream.tables.jobs import Work
    from rwkv_stream.tables.parts import Corpus

WORKERS = 2
IN_FLIGHT = 2  # parts that an actor is given at a time; with fewer Ray Data never asks for more actors
OBJECTS_BYTES = 100 << 20  # of Ray's object store, which holds numbers of parts; it wants 75 MiB or more
ATTEMPTS = 3  # pipelines in a row that make no part before they are given up

log = logging.getLogger(__name__)


def run(
    job: Job,
    shard: tuple[int, int] = (0, 1),
    *,
    workers: int = WORKERS,
    totals: Totals | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Totals:
    """Make what is missing of a shard, as `Job.run` does, by 1 to `workers` actors.

    raises   as `Job.run`, but waits where another run is at work on a part; BackendError where Ray is not
             installed, where actors keep dying, and where one would compute with other numerics than this process

    Uses the cluster that this process is connected to, that of RAY_ADDRESS, or one of its own for as long as it runs.
    """
    ray = _ray(job.work.doing)
    if workers < 1:
        raise UsageError(f"{job.work.doing} with Ray: expected 1 worker or more, found {workers}")
    totals = totals or Totals()
    i, n = shard
    missing = job.missing(shard)
    totals.total_documents = sum(part.documents for part in job.parts[i::n])
    waiting = {part.number for part in missing}
    for part in job.parts[i::n]:
        if part.number not in waiting and (record := job.record(part)) is not None:
            totals.skip(record)
    attempts = 0
    with contextlib.ExitStack() as stack:
        if missing:
            stack.enter_context(_connected(ray, workers * _threads(job.work.model)))
        while missing:
            error: Exception | None = None
            try:
                for number in _pipeline(job, missing, workers):
                    _report(job, job.parts[number], waiting, totals, on_failure)
            except ray.exceptions.RayError as failure:
                error = failure
            left = job.missing(shard)
            for part in missing:  # that an actor made before the pipeline ended
                if part not in left:
                    _report(job, part, waiting, totals, on_failure)
            attempts = attempts + 1 if len(left) == len(missing) else 0
            if left and attempts == ATTEMPTS:
                raise BackendError(
                    f"{job.work.doing} into '{job.folder}' with Ray: expected workers that live to make a part, found "
                    f"{ATTEMPTS} times in a row that one died; the last one: {error}; run with --engine local"
                ) from error
            if left:
                log.warning("a worker of Ray was lost; going on with %d parts that are missing", len(left))
            missing = left
    job.run(shard)  # nothing is left to make: it lists the failures, and whitens
    return totals


def _report(
    job: Job, part: Part, waiting: set[int], totals: Totals, on_failure: Callable[[Failure], None] | None
) -> None:
    """Count a part that is done, once."""
    record = job.record(part)
    if record is None or part.number not in waiting:
        return
    waiting.remove(part.number)
    totals.add(record)
    if on_failure is not None:
        for failed in record.failures:
            on_failure(Failure(failed["document"], InputError(failed["error"])))


def _pipeline(job: Job, parts: Sequence[Part], workers: int) -> Iterator[int]:
    """The numbers of the parts as they are done; raises what a part raised, and RayError where an actor is lost."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    numbers, model = [part.number for part in parts], job.work.model
    made = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _Actor,
        fn_constructor_kwargs={"sent": SentJob.of(job)},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(workers, len(numbers)), max_tasks_in_flight_per_actor=IN_FLIGHT
        ),
        num_cpus=_threads(model),
        num_gpus=len(model.stages) if model is not None and model.device.type == "cuda" else 0,
        max_restarts=0,
    )
    for row in made.iter_rows():
        if row["error"] is not None:
            raise row["error"]
        yield int(row["item"])


@dataclass(frozen=True, slots=True)
class SentJob:
    """A job on its way to another process.

    remake   the work, of a model
    loading  of the model, where there is one
    restart  whether it is made beside the job that is there
    cwd      the folder that relative paths are of
    decides  what decides the rows, as the job that sends it has it
    """

    folder: str
    corpus: Corpus
    remake: Callable[[Any], Work]
    loading: Loading | None
    restart: bool
    cwd: str
    decides: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job) -> SentJob:
        is_beside = job.place != job.folder
        loading = None if job.work.model is None else _loading(job.work.model)
        return cls(str(job.folder), job.corpus, job.work.remake, loading, is_beside, str(Path.cwd()), job.decides)

    def open(self) -> Job:
        """The job in this process. Raises BackendError where its rows would have other bits."""
        os.chdir(self.cwd)
        model = None
        if self.loading is not None:
            from rwkv_stream.model import load

            model = load(self.loading)
        job = Job(
            self.folder,
            self.corpus.sources,
            self.remake(model),
            reading=self.corpus.reading,
            restart=self.restart,
            grows=False,
            copies=self.corpus.copies,
        )
        ours, theirs = _numerics(job.decides), _numerics(self.decides)
        differing = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if differing:
            found = ", ".join(f"{name} {ours.get(name)!r} instead of {theirs.get(name)!r}" for name in differing)
            raise BackendError(
                f"{job.work.doing} into '{self.folder}' with Ray: expected the numerics of the job on every worker, "
                f"found on {platform.node()} {found}; use machines that are alike, or --engine local"
            )
        return job


class _Actor:
    """Makes parts in a process of its own."""

    def __init__(self, sent: SentJob) -> None:
        self._sent = sent
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Errors of ours are handed over as they are: Ray raises those that it meets as its own, and so are deaths."""
        error = None
        numbers = [int(number) for number in batch["item"]]
        try:
            if self._worker is None:
                self._worker = Worker(self._sent.open())
            for number in numbers:
                self._worker.make(number)
        except RwkvStreamError as failure:
            error = failure
        return {"item": numbers, "error": [error] * len(numbers)}


def _loading(model: Model) -> Loading:
    """What gives the same numerics in another process, where Ray shows as many GPUs as the model has, numbered anew.

    Relative paths stay so, and the shipped model is the one that lies there.
    """
    device = model.device.type
    if device == "cuda":
        device = ",".join(f"cuda:{i}" for i in range(len(model.stages)))
    return replace(model.loading, device=device, backend=model.backend, threads=_threads(model))


def _numerics(decides: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the last bits of rows, by name."""
    return {"version": decides["version"], **json.loads(decides.get("numerics", "{}"))}


def _threads(model: Model | None) -> int:
    """Of a process that does such work."""
    if model is None:
        return 1
    import torch

    return torch.get_num_threads()


def _ray(doing: str) -> Any:
    with needed("ray", "ray", f"{doing} with Ray", BackendError):
        import ray
        import ray.data
    return ray


@contextlib.contextmanager
def _connected(ray: Any, num_cpus: int) -> Iterator[None]:
    """A connection to Ray; what begins here ends here."""
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each run
    own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": num_cpus, "object_store_memory": OBJECTS_BYTES}
    with interrupts.handlers_kept():  # Ray replaces that of SIGTERM
        ray.init(include_dashboard=False if own else None, log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()
