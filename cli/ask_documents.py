"""`rwkv-stream ask --documents`: many questions on many documents that nothing has read, as a table or a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from rwkv_stream.cli import jobs
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.jobs import JOB_OPTIONS, job_options
from rwkv_stream.cli.options import READING_NAMES, F, given, reading_options, with_options

DEFAULTS: tuple[object, ...] = (None, (), [], False, "local")  # of the options of jobs and of reading


def documents_options(function: F) -> F:
    """`--documents`, and the options of jobs and of reading that go with it; for `ask`."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--documents",
            multiple=True,
            metavar="SOURCE",
            help="Ask each document of this file, folder, glob, URL or stdin (-) by itself; may be repeated.",
        ),
        job_options,
        click.option("--name", help="Name of the document; stdin needs one. [default: the path as typed]"),
        reading_options,
    ]
    return with_options(options, function)


def ask(
    settings: GlobalOptions,
    arguments: dict[str, Any],
    *,
    strategy: str,
    k: int | None,
    questions: str | None,
    output: str | None,
    others: Mapping[str, object],
) -> bool:
    """Ask the documents that are named, and whether there are any. Their options are taken out of the arguments.

    others  values of what does not go with documents, by what a user calls it
    raises  as `jobs.run`; click.UsageError
    """
    documents = arguments.pop("documents")
    if not documents:
        for name in (*JOB_OPTIONS, "name", *READING_NAMES):
            if arguments.pop(name) not in DEFAULTS:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --documents")
        return False
    unwanted = [name for name, value in others.items() if value]
    if unwanted:
        raise click.UsageError(f"--documents are asked by themselves: leave out {unwanted[0]}")
    if questions is None or output is None:
        raise click.UsageError("--documents takes --questions FILE and -o FILE|DIR/")
    chosen = given(arguments)
    if strategy in ("auto", "quote") and chosen:
        name = next(iter(chosen)).replace("_", "-")
        raise click.UsageError(f"--strategy quote asks no model: it takes no --{name}; pass --strategy reread or state")
    if strategy not in ("auto", "quote") and k is not None:
        raise click.UsageError(f"--k counts quotes; --strategy {strategy} makes one answer")
    how = jobs.given(arguments, output, "asking")
    from rwkv_stream.answers import ask_jobs, prompts

    asked = tuple(prompts.questions(questions))
    if strategy in ("auto", "quote"):
        work = ask_jobs.AskingWork(asked, k=k or 1)
    else:
        way, model = ask_jobs.named(strategy), settings.load_model()
        sampling = replace(prompts.family(model).sampling, **chosen)
        work = ask_jobs.AskingWork(asked, way, model=model, sampling=sampling)
    jobs.run(settings, how, documents, work, arguments, "asked")
    return True
