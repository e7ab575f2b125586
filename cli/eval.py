"""`rwkv-stream eval`: what a model can do with what it has read."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example, reading_options
from rwkv_stream.errors import InputError, PartialFailureError

if TYPE_CHECKING:
    from rwkv_stream.evaluation.report import Report
    from rwkv_stream.evaluation.run import Progress

T = TypeVar("T")


def _listed(kind: Callable[[str], T]) -> Callable[[click.Context, click.Parameter, str | None], tuple[T, ...] | None]:
    """Values with commas between them."""

    def parsed(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[T, ...] | None:
        try:
            return None if value is None else tuple(kind(part.strip()) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(
                f"expected numbers with commas between them, found '{value}'", ctx, param
            ) from None

    return parsed


@click.command(
    cls=Command,
    name="eval",
    short_help="Measure what a model can do with what it has read.",
    kept="what is measured is kept; run it again with the same -o to go on",
    epilog=example(
        "rwkv-stream eval --task niah_single,vt --lengths 1024,4096 --trials 2 -o report/",
        "rwkv-stream eval book.txt --task position",
        "rwkv-stream eval --data questions.jsonl --texts texts.jsonl --task qa,retrieval -o report/",
    ),
)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the trials, the tables and the page; it goes on where it was stopped, and grows. [default: none "
    "is kept]",
)
@click.option(
    "--task",
    "tasks",
    metavar="NAME,...",
    callback=_listed(str),
    help="niah_single, niah_multikey, niah_multivalue, niah_multiquery, vt, cwe, fwe, passkey, look_up, facts, copy; "
    "position, qa, retrieval, similarity. [default: all that there are inputs for]",
)
@click.option("--lengths", metavar="N,...", callback=_listed(int), help="Tokens of a context. [default: 1024,4096]")
@click.option(
    "--depths",
    metavar="PERCENT,...",
    callback=_listed(float),
    help="Where in it a needle stands. [default: 0,25,50,75,100]",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    metavar="N",
    help="Contexts of each length, for needles of each depth. [default: 5]",
)
@click.option("--seed", type=int, help="Of what is made up. [default: 0]")
@click.option("--haystack", metavar="SOURCE", help="Text to hide things in, again and again. [default: a short story]")
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Rows with question and answers, and maybe id, document or title, context, unanswerable: .jsonl (also "
    "compressed) or .parquet.",
)
@click.option(
    "--texts",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Their documents: rows with id and text, or one text. [default: their contexts]",
)
@click.option(
    "--strategies", metavar="NAME,...", callback=_listed(str), help="Ways of answering. [default: state,passage,quote]"
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Questions on the first N documents. [default: all]"
)
@click.option(
    "--pairs", metavar="FILE", type=click.Path(path_type=Path), help="Rows with sentence1, sentence2 and score."
)
@reading_options
@click.pass_obj
def command(settings: GlobalOptions, /, sources: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Measure a model: what it recalls of contexts of any length (RULER's tasks and others), its bits per byte by
    position in each SOURCE, its answers to questions, and its vectors. Prints tables of means.
    """
    from rwkv_stream.evaluation.cells import Evaluation, check_installed

    reading = {name: options.pop(name) for name in ("encoding", "text_column", "id_column", "include", "exclude")}
    given = {name: value for name, value in options.items() if value is not None}
    asked = Evaluation(sources=sources, reading=reading, **given)
    check_installed(asked.chosen)
    from rwkv_stream.evaluation import report, run

    if output is not None:
        report.check_pictures()
    model = settings.load_model()
    progress = run.Progress()
    with (
        contextlib.nullcontext(output) if output is not None else tempfile.TemporaryDirectory() as folder,
        console.progress_bar(settings, "evaluating", lambda _: _bar(progress)),
    ):
        measured = run.run(asked, model, Path(folder), progress)
        found = report.report(measured.trials, model.path, model.fingerprint)
        if output is not None:
            report.write(found, measured.trials, output)
    with console.Errors() as errors:
        for failure in measured.failures:
            errors.show(str(failure))
    if measured.failures and not any(found.tables()):
        raise InputError(f"evaluating: all that was to be measured failed, {len(measured.failures):,} times")
    _show(settings, found)
    if output is not None:
        settings.notice(f"{len(measured.cells)} cells in '{output}', the page is '{output / report.PAGE}'")
    if n := len(measured.failures):
        what = "1 row or document" if n == 1 else f"{n:,} rows or documents"
        raise PartialFailureError(f"{what} failed; the rest is measured")


def _bar(progress: Progress) -> console.Bar:
    figures = (f"{progress.done:,} of {progress.total:,} cells", progress.key)
    return console.Bar(progress.done, progress.total or None, figures, progress.before)


def _show(settings: GlobalOptions, found: Report) -> None:
    if settings.json:
        console.emit_json(asdict(found))
        return
    for number, (title, columns, rows) in enumerate(found.tables()):
        click.echo(f"{'' if number == 0 else chr(10)}{title}")
        console.emit_table(columns, rows, folded=columns[0])
    if found.computed:
        settings.notice(
            f"{found.tokens:,} tokens of prompts, {found.computed:,} of them computed: "
            f"{found.tokens / found.computed:.2f} times as many without shared states"
        )
