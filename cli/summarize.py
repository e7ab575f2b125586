"""`rwkv-stream summarize`: what snapshots have read, in sentences of the text itself or as the model says it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import ANSWERING, Command, example, given, position_options, sampling_options
from rwkv_stream.errors import (
    OutputError,
    PartialFailureError,
    RwkvStreamError,
    SnapshotError,
)

if TYPE_CHECKING:
    from rwkv_stream.answers.summaries import Mode
    from rwkv_stream.answers.summary import Extract, OnFailure, Summary

AUTO, EXTRACT, GENERATE = STYLES = ("auto", "extract", "generate")
SUFFIXES = (".md", ".parquet", ".jsonl")


@click.command(
    cls=Command,
    name="summarize",
    short_help="Summarize what snapshots have read.",
    epilog=example(
        "rwkv-stream summarize --from-snapshot story.txt",
        "rwkv-stream summarize --from-snapshot story.txt@50% --each",
        "rwkv-stream summarize --from-snapshot book.txt --tree -o book.md",
        "rwkv-stream summarize --from-snapshot book.txt --rolling --budget 200",
        "rwkv-stream summarize --from-snapshot app --since app~10",
    ),
)
@click.option("--from-snapshot", metavar="REF", required=True, help="The snapshot whose text is summarized.")
@position_options
@click.option("--since", metavar="REF", help="Only what was read after this snapshot of the same text.")
@click.option(
    "--style",
    type=click.Choice(STYLES),
    default=AUTO,
    show_default=True,
    help="extract: sentences of the text itself, with their places; of a log its most frequent and its strangest "
    "lines; generate: what the model says; auto: extract, where the model has not learned to answer, as the shipped "
    "one, else generate.",
)
@click.option("--each", is_flag=True, help="One for each span from a snapshot to the next, oldest first.")
@click.option(
    "--rolling", is_flag=True, help="Carry one summary from span to span; shows the last, with --each all of them."
)
@click.option("--tree", is_flag=True, help="One for each span, and groups of them joined, up to one.")
@click.option("--words", type=click.IntRange(min=1), metavar="N", help="Of an extract, at most. [default: 120]")
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
    since: str | None,
    style: str,
    each: bool,
    rolling: bool,
    tree: bool,
    words: int | None,
    budget: int | None,
    group: int | None,
    output: Path | None,
    **arguments: Any,
) -> None:
    """Summarize what the snapshot that REF names has read, without the model reading it again.

    Streamed to stdout. A span whose snapshot or text is damaged is left out and told of (exit code 3).
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
    of_model = [*(["rolling"] if rolling else []), *chosen]
    if style == AUTO:
        style = EXTRACT if words is not None else GENERATE if of_model else _fitting(settings, from_snapshot)
    if style == EXTRACT and of_model:
        raise click.UsageError(f"--style extract asks no model: it takes no --{of_model[0].replace('_', '-')}")
    if style == GENERATE and words is not None:
        raise click.UsageError("--words counts those of an extract; --max-tokens goes with --style generate")
    mode: Mode = "tree" if tree else "rolling" if rolling else "each" if each else "whole"
    with console.Errors() as errors:

        def fail(error: RwkvStreamError) -> None:
            errors.show(str(error))

        if style == EXTRACT:
            made, metadata = _extracted(settings, from_snapshot, since, mode, words, group, fail)
        else:
            if budget is not None:
                chosen.setdefault("max_tokens", budget)
            streamed = mode == "whole" and since is None and output is None and not settings.json
            generated = _generated(settings, from_snapshot, since, mode, chosen, budget, group, fail, streamed=streamed)
            if generated is None:
                return
            made, metadata = generated
        shown = _checked(_last(made) if rolling and not each else made, from_snapshot)
        if output is not None:
            count = _write(output, shown, metadata, mode)
            settings.notice(f"{count:,} {'summary' if count == 1 else 'summaries'} in '{output}'")
        else:
            for summary in shown:
                _show(settings, summary, is_one=mode == "whole" or (mode == "rolling" and not each))
        if errors.n:
            raise PartialFailureError(f"{console.counted(errors.n, 'span')} left out; the rest are summarized")


def _fitting(settings: GlobalOptions, ref: str) -> str:
    """The style that fits the model of a snapshot."""
    from rwkv_stream.answers import prompts

    return GENERATE if prompts.has_learned_to_answer(settings.somewhere(ref)[1].tokenizer) else EXTRACT


def _extracted(
    settings: GlobalOptions,
    ref: str,
    since: str | None,
    mode: Mode,
    words: int | None,
    group: int | None,
    fail: OnFailure,
) -> tuple[Iterator[Summary], dict[str, str]]:
    """Summaries taken from the text, and the metadata of a table of them; no model is loaded."""
    from rwkv_stream.answers.extracts import WORDS, extracts
    from rwkv_stream.answers.summary import GROUP

    assert mode != "rolling"
    store, snapshot = settings.snapshot(ref)
    settings.say_taken(snapshot)
    settings.notice("sentences and lines of the text itself (--style extract)")
    words = words or WORDS
    made = extracts(
        snapshot=snapshot,
        store=store,
        mode=mode,
        since=None if since is None else store.get(since, model=snapshot.model),
        words=words,
        group=group or GROUP,
        on_failure=fail,
    )
    return made, {"model": snapshot.model, "tokenizer": snapshot.tokenizer, "mode": mode, "style": EXTRACT}


def _generated(
    settings: GlobalOptions,
    ref: str,
    since: str | None,
    mode: Mode,
    chosen: dict[str, Any],
    budget: int | None,
    group: int | None,
    fail: OnFailure,
    *,
    streamed: bool,
) -> tuple[Iterator[Summary], dict[str, str]] | None:
    """Summaries that the model makes, and the metadata of a table of them; None where a whole one was streamed."""
    store, snapshot, model = settings.fork(ref)
    from rwkv_stream.answers import prompts
    from rwkv_stream.answers.summaries import Whole, summarize
    from rwkv_stream.answers.summary import GROUP, check_since

    before = None if since is None else store.get(since, model=snapshot.model)
    if before is not None:
        check_since(snapshot, before, store)

    sampling = replace(prompts.family(model).sampling, **chosen)
    if streamed:
        console.emit_stream(Whole(snapshot, model, sampling))
        return None
    made = summarize(
        snapshot=snapshot,
        model=model,
        mode=mode,
        since=before,
        sampling=sampling,
        budget=budget,
        group=group or GROUP,
        on_failure=fail,
    )
    return made, {"model": model.fingerprint, "tokenizer": model.tokenizer.id, "mode": mode, "style": GENERATE}


def _show(settings: GlobalOptions, summary: Summary, *, is_one: bool) -> None:
    """A summary on stdout, behind its span where it is one of several; below each extract where it stands."""
    indent = 0 if is_one else 2
    if settings.json:
        console.emit_json(asdict(summary) | settings.taken)
    elif not is_one:
        console.emit_paragraphs((0, [(_place(summary), "bold")]))
    if not settings.json and summary.extracts:
        for line, one in zip(summary.text.split("\n"), summary.extracts, strict=True):
            console.emit_paragraphs((indent, [(line, "")]), (indent + 2, [(_cited(one), "cyan")]))
    elif not settings.json:
        console.emit_paragraphs((indent, [(summary.text, "")]))
    console.flush()


def _cited(one: Extract) -> str:
    """Where an extract stands, and of a line of a log what it is taken for."""
    place = f"{console.named(one.place)}, " if one.place else ""
    at = f"{place}bytes {one.byte_start:,} to {one.byte_end:,}"
    if one.count is None:
        return at
    assert one.bits is not None
    if one.why == "frequent":
        return f"first at {at}"
    return f"{at}; strange, {one.bits:.1f} bits a word; {console.counted(one.count, 'line')} like this"


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


def _write(output: Path, summaries: Iterator[Summary], metadata: dict[str, str], mode: str) -> int:
    from rwkv_stream.answers.summary import as_row, summary_schema
    from rwkv_stream.tables.writers import Writer

    if output.suffix == ".md":
        return _write_markdown(output, summaries, mode)
    with Writer(output, summary_schema(), metadata) as writer:
        writer.write(map(as_row, summaries))
    return writer.rows


def _quoted(summary: Summary) -> str:
    """The text of a summary as Markdown: quoted, below each extract where it stands."""
    if not summary.extracts:
        return textwrap.indent(summary.text, "> ", lambda _: True)
    lines = zip(summary.text.split("\n"), summary.extracts, strict=True)
    return "\n\n".join(f"> {line}\n>\n> — {_cited(one)}" for line, one in lines)


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
                quoted = _quoted(summary)
                file.write(f"\n{'#' * depth} {place[0].upper()}{place[1:]}\n\n{quoted}\n".encode())
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"writing '{output}': {reason}; nothing was written under that name") from error
    return count
