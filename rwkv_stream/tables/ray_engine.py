"""Ray: a job's parts made by processes on as many machines as a Ray cluster has.

>>> run(Job("rows/", ["articles.jsonl"], model=model), workers=4)

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
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_stream.errors import BackendError, InputError, RwkvStreamError, UsageError
from rwkv_stream.tables.jobs import Job, Part, Progress, Worker
from rwkv_stream.text.units import Failure

if TYPE_CHECKING:
    from rwkv_stream.model import Loading, Model

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
    progress: Progress | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Progress:
    """Make what is missing of a shard, as `Job.run` does, by 1 to `workers` actors.

    raises   as `Job.run`, but waits where another run is at work on a part; UsageError where Ray is not installed;
             BackendError where actors keep dying

    Uses the cluster that this process is connected to, that of RAY_ADDRESS, or one of its own for as long as it runs.
    """
    ray = _ray()
    if workers < 1:
        raise UsageError(f"embedding with Ray: expected 1 worker or more, found {workers}")
    model = job.model
    arguments = {
        "arguments": {name: _portable(value) for name, value in job.arguments.items()},
        "loading": _loading(model),
        "folder": str(Path.cwd()),
    }
    progress = progress or Progress()
    i, n = shard
    missing = job.missing(shard)
    progress.total_documents = sum(part.documents for part in job.parts[i::n])
    waiting = {part.number for part in missing}
    for part in job.parts[i::n]:
        if part.number not in waiting and (done := job.done(part)) is not None:
            progress.skip(done)
    attempts = 0
    with contextlib.ExitStack() as stack:
        if missing:
            stack.enter_context(_connected(ray, workers * _threads()))
        while missing:
            error: Exception | None = None
            try:
                for number in _pipeline(missing, workers, model, arguments):
                    _report(job, job.parts[number], waiting, progress, on_failure)
            except ray.exceptions.RayError as failure:
                error = failure
            left = job.missing(shard)
            for part in missing:  # that an actor made before the pipeline ended
                if part not in left:
                    _report(job, part, waiting, progress, on_failure)
            attempts = attempts + 1 if len(left) == len(missing) else 0
            if left and attempts == ATTEMPTS:
                raise BackendError(
                    f"embedding into '{job.folder}' with Ray: expected workers that live to make a part, found "
                    f"{ATTEMPTS} times in a row that one died; the last one: {error}; run with --engine local"
                ) from error
            if left:
                log.warning("a worker of Ray was lost; going on with %d parts that are missing", len(left))
            missing = left
    job.run(shard)  # nothing is left to make: it lists the failures, and whitens
    return progress


def _report(
    job: Job, part: Part, waiting: set[int], progress: Progress, on_failure: Callable[[Failure], None] | None
) -> None:
    """Count a part that is done, once."""
    done = job.done(part)
    if done is None or part.number not in waiting:
        return
    waiting.remove(part.number)
    progress.add(done)
    if on_failure is not None:
        for failed in done.failures:
            on_failure(Failure(failed["document"], InputError(failed["error"])))


def _pipeline(parts: Sequence[Part], workers: int, model: Model, arguments: dict[str, Any]) -> Iterator[int]:
    """The numbers of the parts as they are done; raises what a part raised, and RayError where an actor is lost."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    numbers = [part.number for part in parts]
    made = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _Actor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(workers, len(numbers)), max_tasks_in_flight_per_actor=IN_FLIGHT
        ),
        num_cpus=_threads(),
        num_gpus=len(model.stages) if model.device.type == "cuda" else 0,
        max_restarts=0,
    )
    for row in made.iter_rows():
        if row["error"] is not None:
            raise row["error"]
        yield int(row["item"])


class _Actor:
    """Makes parts in a process of its own."""

    def __init__(self, arguments: dict[str, Any], loading: Loading, folder: str) -> None:
        self._arguments, self._loading, self._folder = arguments, loading, folder
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Errors of ours are handed over as they are: Ray raises those that it meets as its own, and so are deaths."""
        error = None
        numbers = [int(number) for number in batch["item"]]
        try:
            for number in numbers:
                self._ready().make(number)
        except RwkvStreamError as failure:
            error = failure
        return {"item": numbers, "error": [error] * len(numbers)}

    def _ready(self) -> Worker:
        if self._worker is None:
            from rwkv_stream.model import load

            os.chdir(self._folder)
            self._worker = Worker(Job(model=load(self._loading), **self._arguments))
        return self._worker


def _loading(model: Model) -> Loading:
    """What gives the same numerics in another process, wherever the shipped model lies there."""
    given = model.loading
    path = None if given.path is None else str(Path(given.path).absolute())
    return replace(given, path=path, backend=model.backend, threads=_threads())


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _portable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            "embedding with Ray: expected the package ray, found none; pip install 'rwkv-stream[ray]'"
        ) from error
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
    with _signals_kept():
        ray.init(include_dashboard=False if own else None, log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts a handler of its own in the place of SIGTERM's."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
