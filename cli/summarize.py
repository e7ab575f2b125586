"""`rwkv-stream summarize`: fork snapshots and say what they have read."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import ANSWERING, Command, example, given, sampling_options
from rwkv_stream.errors import (
    OutputError,
    PartialFailureError,
    RwkvStreamError,
    SnapshotError,
)

if TYPE_CHECKING:
    from rwkv_stream.answers.summaries import Summary
    from rwkv_stream.model import Model

SUFFIXES = (".md", ".parquet", ".jsonl")


@click.command(
    cls=Command,
    name="summarize",
    short_help="Summarize what snapshots have read.",
    epilog=example(
        "rwkv-stream summarize --from-snapshot story.txt",
        "rwkv-stream summarize --from-snapshot story.txt@50% --each",
        "rwkv-stream summarize --from-snapshot book.txt --rolling --budget 200",
        "rwkv-stream summarize --from-snapshot book.txt --tree -o book.md",
    ),
)
@click.option("--from-snapshot", metavar="REF", required=True, help="The snapshot to fork.")
@click.option("--each", is_flag=True, help="One for each span from a snapshot to the next, oldest first.")
@click.option(
    "--rolling", is_flag=True, help="Carry one summary from span to span; shows the last, with --each all of them."
)
@click.option("--tree", is_flag=True, help="One for each span, and groups of them joined, up to one.")
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Of --rolling: length of the summary. [default: --max-tokens]",
)
@click.option(
    "--group", type=click.IntRange(min=2), metavar="K", help="Of --tree: summaries joined into one. [default: 8]"
)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write .md, .parquet or .jsonl.")
@sampling_options(ANSWERING)
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    from_snapshot: str,
    each: bool,
    rolling: bool,
    tree: bool,
    budget: int | None,
    group: int | None,
    output: Path | None,
    **arguments: Any,
) -> None:
    """Summarize what the snapshot that REF names has read, without reading it again.

    Streamed to stdout. A span whose snapshot is damaged is left out and told of (exit code 3).
    """
    from rwkv_stream.tables.writers import check_output

    if tree and (each or rolling):
        raise click.UsageError("--tree has the summary of each span; leave out --each and --rolling")
    if budget is not None and not rolling:
        raise click.UsageError("--budget goes with --rolling")
    if group is not None and not tree:
        raise click.UsageError("--group goes with --tree")
    if output is not None:
        check_output(output, SUFFIXES)
    chosen = given(arguments)
    if budget is not None:
        chosen.setdefault("max_tokens", budget)

    _, snapshot, model = settings.fork(from_snapshot)
    from rwkv_stream.answers import prompts
    from rwkv_stream.answers.summaries import GROUP, Mode, Whole, summarize

    sampling = replace(prompts.family(model).sampling, **chosen)
    mode: Mode = "tree" if tree else "rolling" if rolling else "each" if each else "whole"
    if mode == "whole" and output is None and not settings.json:
        console.emit_stream(Whole(snapshot, model, sampling))
        return

    failures: list[RwkvStreamError] = []

    def fail(error: RwkvStreamError) -> None:
        console.error(str(error))
        failures.append(error)

    made = summarize(
        snapshot=snapshot,
        model=model,
        mode=mode,
        sampling=sampling,
        budget=budget,
        group=group or GROUP,
        on_failure=fail,
    )
    shown = _checked(_last(made) if rolling and not each else made, from_snapshot)
    if output is not None:
        count = _write(output, shown, model, mode)
        settings.notice(f"{count:,} {'summary' if count == 1 else 'summaries'} in '{output}'")
    else:
        for summary in shown:
            if settings.json:
                console.emit_json(asdict(summary))
            elif mode == "rolling" and not each:
                click.echo(summary.text)
            else:
                console.emit_paragraphs((0, [(_place(summary), "bold")]), (2, [(summary.text, "")]))
            console.flush()
    if failures:
        raise PartialFailureError(f"{len(failures)} spans have no usable snapshot; the rest are summarized")


def _last(summaries: Iterable[Summary]) -> Iterator[Summary]:
    last = None
    for summary in summaries:
        last = summary
    if last is not None:
        yield last


def _checked(summaries: Iterable[Summary], ref: str) -> Iterator[Summary]:
    """The same; SnapshotError at the end where there was none."""
    any_summary = False
    for summary in summaries:
        any_summary = True
        yield summary
    if not any_summary:
        raise SnapshotError(
            f"summarizing '{ref}': expected a snapshot that is whole, found none; run `rwkv-stream snapshots verify`"
        )


def _place(summary: Summary) -> str:
    level = f"level {summary.level}, " if summary.level else ""
    return f"{level}bytes {summary.byte_start:,} to {summary.byte_end:,}"


def _write(output: Path, summaries: Iterator[Summary], model: Model, mode: str) -> int:
    from rwkv_stream.answers.summaries import summary_schema
    from rwkv_stream.tables.writers import Writer

    if output.suffix == ".md":
        return _write_markdown(output, summaries, mode)
    metadata = {"model": model.fingerprint, "tokenizer": model.tokenizer.id, "mode": mode}
    with Writer(output, summary_schema(), metadata) as writer:
        writer.write(map(asdict, summaries))
    return writer.rows


def _write_markdown(output: Path, summaries: Iterator[Summary], mode: str) -> int:
    """A heading for each summary, its text quoted; of a tree the more a summary joins, the higher its heading."""
    from rwkv_stream.files import publishing

    count = 0
    try:
        with publishing(output, kind="table") as file:
            for count, summary in enumerate(summaries, start=1):
                if count == 1:
                    file.write(f"# Summary of {summary.document}\n".encode())
                depth = max(2, 6 - summary.level) if mode == "tree" else 2
                place = _place(summary)
                quoted = textwrap.indent(summary.text, "> ", lambda _: True)
                file.write(f"\n{'#' * depth} {place[0].upper()}{place[1:]}\n\n{quoted}\n".encode())
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"writing '{output}': {reason}; nothing was written under that name") from error
    return count
