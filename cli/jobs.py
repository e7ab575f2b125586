"""Jobs of the command line: their options, and a run of one with its bar, its report and its exit code."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import F, with_options
from rwkv_stream.errors import InputError, PartialFailureError, UsageError

if TYPE_CHECKING:
    from rwkv_stream.tables.jobs import Job, Work
    from rwkv_stream.tables.row_batches import Totals
    from rwkv_stream.text.units import Failure


def _shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`i/n` as (i - 1, n)."""
    if value is None:
        return None
    i, _, n = value.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise click.BadParameter(f"expected 1/N to N/N, found '{value}'", ctx, param)
    return int(i) - 1, int(n)


JOB_OPTIONS = ("part_rows", "restart", "shard", "engine", "workers")


def job_options(function: F) -> F:
    """`--part-rows`, `--restart`, `--shard`, `--engine` and `--workers`, for `given`."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--part-rows",
            type=click.IntRange(min=1),
            metavar="N",
            help="Documents in a part, the least that a kill loses. [default: about a minute's work, by a trial]",
        ),
        click.option("--restart", is_flag=True, help="Make it anew; what is there stays until the new one is whole."),
        click.option(
            "--shard", callback=_shard, metavar="i/n", help="Of a job: only each n-th part, from the i-th on."
        ),
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Of a job: this process, or processes on a Ray cluster (that of RAY_ADDRESS, else one on this "
            "machine).",
        ),
        click.option(
            "--workers", type=click.IntRange(min=1), metavar="N", help="With --engine ray: at most. [default: 2]"
        ),
    ]
    return with_options(options, function)


@dataclass(frozen=True, slots=True)
class Given:
    """Where rows go, a folder of parts or a table, and how they are made."""

    output: str
    is_job: bool
    part_rows: int | None
    restart: bool
    shard: tuple[int, int] | None
    engine: str
    workers: int | None


def given(arguments: dict[str, Any], output: str, doing: str) -> Given:
    """The options of `job_options`, taken out of a command's arguments. Raises UsageError for what makes no sense."""
    from rwkv_stream.tables.writers import check_output

    is_job = output.endswith("/") or Path(output).is_dir()
    found = Given(output, is_job, **{name: arguments.pop(name) for name in JOB_OPTIONS})
    where = f"{doing} into '{output}'"
    if found.shard is not None and not is_job:
        raise UsageError(f"{where}: expected a folder for --shard, found a file; end its name with /")
    if found.engine == "ray" and not is_job:
        raise UsageError(f"{where}: expected a folder for --engine ray, found a file; end it with /")
    if found.workers is not None and found.engine != "ray":
        raise UsageError(f"{doing}: expected --engine ray for --workers, found the local engine")
    if not is_job:
        check_output(output)
    return found


def run(
    settings: GlobalOptions,
    how: Given,
    sources: Sequence[str],
    work: Work,
    reading: Mapping[str, Any],
    done: str,
) -> None:
    """Make the rows of a work.

    done    what becomes of documents: "embedded"
    raises  as `Job` and `make_table`; InputError where all documents failed, PartialFailureError where some did
    """
    from rwkv_stream.tables.jobs import Job, make_table
    from rwkv_stream.tables.row_batches import Totals

    options: dict[str, Any] = {"reading": reading, "part_rows": how.part_rows, "restart": how.restart}
    totals = Totals()
    job, n_parts = None, None
    began = time.monotonic()
    with console.Errors() as errors, console.progress_bar(settings, how.output, functools.partial(_bar, totals)):

        def on_failure(failure: Failure) -> None:
            errors.show(str(failure.error))

        if how.is_job:
            job = Job(how.output, sources, work, **options)
            n_parts = _run(job, how, totals, on_failure)
        else:
            make_table(Path(how.output), sources, work, totals=totals, on_failure=on_failure, **options)
    _report(settings, totals, how.output, work, time.monotonic() - began, n_parts)
    _check_failures(totals, job, work, done)


def _check_failures(totals: Totals, job: Job | None, work: Work, done: str) -> None:
    """Raise InputError where all documents failed, PartialFailureError where some did."""
    from rwkv_stream.tables.jobs import FAILED

    listed = "" if job is None else f"; they are listed in '{job.place / FAILED}'"
    if totals.failed and not totals.documents:
        raise InputError(f"{work.doing}: all {totals.failed} documents failed{listed}")
    if totals.failed:
        n_all = totals.failed + totals.documents
        raise PartialFailureError(f"{totals.failed} of {n_all} documents failed{listed}; the rest are {done}")
    if totals.losses:
        raise console.partly(totals.losses, done, listed)


def _run(job: Job, how: Given, totals: Totals, on_failure: Callable[[Failure], None]) -> int:
    """Make a shard's parts; how many it has."""
    shard = i, n = how.shard or (0, 1)
    if how.engine == "ray":
        from rwkv_stream.tables import ray_engine

        ray_engine.run(job, shard, workers=how.workers or ray_engine.WORKERS, totals=totals, on_failure=on_failure)
    else:
        job.run(shard, totals=totals, on_failure=on_failure)
    return len(job.parts[i::n])


def _report(
    settings: GlobalOptions, totals: Totals, output: str, work: Work, elapsed_s: float, n_parts: int | None
) -> None:
    counts = {name: getattr(totals, name) for name in ("rows", "documents", "failed", "losses", "tokens")}
    if settings.json:
        more = {} if n_parts is None else {"parts": n_parts}
        model = None if work.model is None else work.model.fingerprint
        console.emit_json({"output": output, **counts, **more, "elapsed_s": elapsed_s, "model": model} | settings.taken)
    else:
        click.echo(totals.rows)
        tokens = "" if work.model is None else f"{console.counted(totals.tokens, 'token')}, "
        settings.notice(
            f"{console.counted(totals.rows, 'row')} of {console.counted(totals.documents, 'document')} in '{output}'; "
            f"{tokens}{elapsed_s:.1f} s",
        )


def _bar(totals: Totals, elapsed_s: float) -> console.Bar:
    """Documents, rows, tokens/s."""
    done = totals.documents + totals.failed
    of_all = "" if totals.total_documents is None else f" of {totals.total_documents:,}"
    figures = (
        f"{done:,}{of_all} documents",
        f"{totals.rows:,} rows",
        f"{totals.tokens_now / elapsed_s:,.0f} tok/s" if totals.tokens_now else "",
        f"{totals.failed:,} failed" if totals.failed else "",
    )
    return console.Bar(done, totals.total_documents, figures, totals.skipped)
