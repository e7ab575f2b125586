"""`rwkv-stream embed`: texts in, vectors out, as one table or as a job of many parts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example, reading_options
from rwkv_stream.errors import InputError, PartialFailureError, UsageError

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.tables.jobs import Job
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


@click.command(
    cls=Command,
    name="embed",
    short_help="Make vectors of texts.",
    kept="files and parts that are whole are kept, of others nothing is left; run it again to go on",
    epilog=example(
        "rwkv-stream embed samples/ -o samples.parquet --unit sentence,document",
        "rwkv-stream embed articles.jsonl --text-column body --id-column url -o articles/",
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR/",
    required=True,
    help="A .parquet or .jsonl file; or a folder, which makes it a job: parts, and going on where it was stopped.",
)
@click.option(
    "--unit",
    default="document",
    show_default=True,
    metavar="KIND,...",
    help="What a row stands for: sentence, chunk, document, or several of these.",
)
@click.option(
    "--pooling",
    type=click.Choice(["auto", "head", "mean", "last"]),
    default="auto",
    show_default=True,
    help="Of a unit's tokens: by the model's vector head (auto: where there is one), their mean, or the last.",
)
@click.option("--isolated", is_flag=True, help="Read each unit on its own, not as going on from the text before it.")
@click.option("--chunk", type=click.IntRange(min=1), metavar="T", help="Tokens of the unit chunk. [default: 1024]")
@click.option("--language", default="en", show_default=True, help="Of the sentences, as a code of two letters.")
@click.option("--no-text", is_flag=True, help="Leave the columns of the text and of its beginning empty.")
@click.option("--whiten", is_flag=True, help="Spread the vectors evenly; what was fitted is kept beside the table.")
@click.option(
    "--part-rows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Documents in a part, the least that a kill loses. [default: about a minute's work, by a trial]",
)
@click.option("--restart", is_flag=True, help="Make it anew; what is there stays until the new one is whole.")
@click.option("--shard", callback=_shard, metavar="i/n", help="Of a job: only each n-th part, from the i-th on.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Of a job: this process, or processes on a Ray cluster (that of RAY_ADDRESS, else one on this machine).",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="With --engine ray: at most. [default: 2]")
@click.option("--from-snapshot", metavar="REF", help="Read each document as going on from this snapshot.")
@click.option("--name", help="Name of the document; stdin needs one. [default: the path as typed]")
@reading_options
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    sources: tuple[str, ...],
    output: str,
    unit: str,
    pooling: str,
    isolated: bool,
    chunk: int | None,
    language: str,
    no_text: bool,
    whiten: bool,
    part_rows: int | None,
    restart: bool,
    shard: tuple[int, int] | None,
    engine: str,
    workers: int | None,
    from_snapshot: str | None,
    **reading: Any,
) -> None:
    """Write a vector for each sentence, chunk or whole document of every SOURCE (file, folder, glob, URL, or - for
    stdin); of tables and archives each row and member is a document. Prints the number of rows.

    A run that was stopped goes on when it is started again, and a folder grows when its inputs have grown: new rows
    and files become new parts. Changed or removed inputs are refused.
    """
    is_job = output.endswith("/") or Path(output).is_dir()
    _check_usage(output, shard, engine, workers, is_job=is_job)
    from rwkv_stream.tables.embedding import Embedding
    from rwkv_stream.tables.writers import check_output
    from rwkv_stream.text.chunker import CHUNK_TOKENS

    embedding = Embedding(
        units=unit,
        pooling=pooling,
        isolated=isolated,
        chunk=CHUNK_TOKENS if chunk is None else chunk,
        language=language,
        text=not no_text,
    )
    if not is_job:
        check_output(output)
    if from_snapshot is not None:
        _, snapshot, model = settings.fork(from_snapshot)
        embedding = replace(embedding, start=snapshot)
    else:
        model = settings.load_model()
    from rwkv_stream.tables.embed_jobs import embed_job, embed_table
    from rwkv_stream.tables.row_batches import Totals

    how: dict[str, Any] = {
        "model": model,
        "reading": reading,
        "part_rows": part_rows,
        "whiten": whiten,
        "restart": restart,
    }
    totals = Totals()
    job, n_parts = None, None
    began = time.monotonic()
    with console.Errors() as errors, console.progress_bar(settings, output, functools.partial(_bar, totals)):

        def on_failure(failure: Failure) -> None:
            errors.show(str(failure.error))

        if is_job:
            job = embed_job(output, sources, embedding, **how)
            n_parts = _run(job, shard or (0, 1), engine, workers, totals, on_failure)
        else:
            embed_table(sources, Path(output), embedding, totals=totals, on_failure=on_failure, **how)
    _report(settings, totals, output, model, time.monotonic() - began, n_parts)
    _check_failures(totals, job)


def _check_usage(output: str, shard: tuple[int, int] | None, engine: str, workers: int | None, *, is_job: bool) -> None:
    if shard is not None and not is_job:
        raise UsageError(f"embedding into '{output}': expected a folder for --shard, found a file; end its name with /")
    if engine == "ray" and not is_job:
        raise UsageError(f"embedding into '{output}': expected a folder for --engine ray, found a file; end it with /")
    if workers is not None and engine != "ray":
        raise UsageError("embedding: expected --engine ray for --workers, found the local engine")


def _check_failures(totals: Totals, job: Job | None) -> None:
    """Raise InputError where all documents failed, PartialFailureError where some did."""
    from rwkv_stream.tables.jobs import FAILED

    listed = "" if job is None else f"; they are listed in '{job.place / FAILED}'"
    if totals.failed and not totals.documents:
        raise InputError(f"embedding: all {totals.failed} documents failed{listed}")
    if totals.failed:
        n_all = totals.failed + totals.documents
        raise PartialFailureError(f"{totals.failed} of {n_all} documents failed{listed}; the rest are embedded")
    if totals.losses:
        raise console.partly(totals.losses, "embedded", listed)


def _run(
    job: Job,
    shard: tuple[int, int],
    engine: str,
    workers: int | None,
    totals: Totals,
    on_failure: Callable[[Failure], None],
) -> int:
    """Make a shard's parts; how many it has."""
    if engine == "ray":
        from rwkv_stream.tables import ray_engine

        ray_engine.run(job, shard, workers=workers or ray_engine.WORKERS, totals=totals, on_failure=on_failure)
    else:
        job.run(shard, totals=totals, on_failure=on_failure)
    i, n = shard
    return len(job.parts[i::n])


def _report(
    settings: GlobalOptions, totals: Totals, output: str, model: Model, elapsed_s: float, n_parts: int | None
) -> None:
    counts = {name: getattr(totals, name) for name in ("rows", "documents", "failed", "losses", "tokens")}
    if settings.json:
        more = {} if n_parts is None else {"parts": n_parts}
        console.emit_json({"output": output, **counts, **more, "elapsed_s": elapsed_s, "model": model.fingerprint})
    else:
        click.echo(totals.rows)
        settings.notice(
            f"{console.counted(totals.rows, 'row')} of {console.counted(totals.documents, 'document')} in '{output}'; "
            f"{console.counted(totals.tokens, 'token')}, {elapsed_s:.1f} s",
        )


def _bar(totals: Totals, elapsed_s: float) -> console.Bar:
    """Documents, rows, tokens/s."""
    done = totals.documents + totals.failed
    of_all = "" if totals.total_documents is None else f" of {totals.total_documents:,}"
    figures = (
        f"{done:,}{of_all} documents",
        f"{totals.rows:,} rows",
        f"{totals.tokens_now / elapsed_s:,.0f} tok/s",
        f"{totals.failed:,} failed" if totals.failed else "",
    )
    return console.Bar(done, totals.total_documents, figures, totals.skipped)
