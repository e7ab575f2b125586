"""`rwkv-stream ask`: fork a snapshot and answer questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import ANSWERING, Command, example, given, sampling_options

if TYPE_CHECKING:
    from rwkv_stream.answers.ask import Answer, Conversation
    from rwkv_stream.answers.prompts import Question


@click.command(
    cls=Command,
    name="ask",
    short_help="Answer questions from a snapshot.",
    epilog=example(
        'rwkv-stream ask "Who gave Edmund the lamp with the green panes?" --from-snapshot story.txt',
        "rwkv-stream ask --questions questions.jsonl --from-snapshot story.txt@50% -o answers.jsonl",
        "rwkv-stream ask --interactive --from-snapshot story.txt",
    ),
)
@click.argument("question", required=False)
@click.option("--from-snapshot", metavar="REF", required=True, help="The snapshot to fork.")
@click.option(
    "--questions", metavar="FILE", help="Questions, one a line, or JSON Lines with question and id; - is stdin."
)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write .jsonl or .parquet.")
@click.option("--interactive", is_flag=True, help="Converse: every question knows the ones before it.")
@click.option("--save", metavar="TAG", help="Keep the forked state, question and answer read, under this tag.")
@click.option("--prompt-template", metavar="TEXT", help="Prompt with {question} in it. [default: the model family's]")
@sampling_options(ANSWERING)
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    question: str | None,
    from_snapshot: str,
    questions: str | None,
    output: Path | None,
    interactive: bool,
    save: str | None,
    prompt_template: str | None,
    **arguments: Any,
) -> None:
    """Fork the snapshot that REF names and answer QUESTION (- reads it from stdin), or many as batches."""
    from rwkv_stream.answers import prompts
    from rwkv_stream.tables.writers import Writer, check_output

    if sum((question is not None, questions is not None, interactive)) != 1:
        raise click.UsageError("ask takes one of QUESTION, --questions FILE and --interactive")
    if save is not None and questions is not None:
        raise click.UsageError("--save keeps one fork; --questions makes many")
    if output is not None and interactive:
        raise click.UsageError("--interactive answers on the terminal, not into a file")
    if output is not None:
        check_output(output)
    if prompt_template is not None:
        prompts.check_template(prompt_template)
    if save is not None:
        settings.open_store().check_tag(save)
    if question == "-":
        question = sys.stdin.read()
    if question is not None:
        question = prompts.clean(question)
    asked = None if questions is None else _questions(questions)
    chosen = given(arguments)

    store, snapshot, model = settings.fork(from_snapshot)
    from rwkv_stream.answers import ask

    sampling = replace(prompts.family(model).sampling, **chosen)
    if asked is not None:
        answers = ask.ask(asked, snapshot=snapshot, model=model, sampling=sampling, template=prompt_template)
        if output is None:
            for answer in answers:
                _show(settings, answer, with_question=True)
            return
        with Writer(output, ask.answer_schema()) as writer:
            writer.write(asdict(answer) for answer in answers)
        settings.notice(f"{console.counted(writer.rows, 'answer')} in '{output}'")
        return

    conversation = ask.Conversation(snapshot, model, sampling=sampling, template=prompt_template)
    try:
        for turn in _turns() if interactive else [question or ""]:
            _answer(settings, conversation, turn, output)
    finally:
        if save is not None and conversation.answer is not None:
            saved = ask.keep_fork(save, conversation.fork(), snapshot, model=model, store=store)
            settings.notice(f"saved {saved.id[:12]} as '{save}'")


def _questions(source: str) -> Iterator[Question]:
    """The questions of a file, of which the first is read now."""
    import itertools

    from rwkv_stream.answers import prompts

    asked = prompts.questions(source)
    return itertools.chain([next(asked)], asked)


def _turns() -> Iterator[str]:
    """The questions of a person at the terminal, or of a pipe, one a line, until the end of input."""
    import contextlib

    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing for `input`)
        click.echo("One question a line; Ctrl-D ends.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(settings: GlobalOptions, conversation: Conversation, question: str, output: Path | None) -> None:
    """Answer one question, streamed unless a whole object is wanted."""
    from rwkv_stream.answers import ask
    from rwkv_stream.tables.writers import Writer

    pieces = conversation.ask(question)
    if settings.json or output is not None:
        for _ in pieces:
            pass
        assert conversation.answer is not None
        if output is None:
            _show(settings, conversation.answer, with_question=False)
        else:
            with Writer(output, ask.answer_schema()) as writer:
                writer.write([asdict(conversation.answer)])
        return
    console.emit_stream(pieces)


def _show(settings: GlobalOptions, answer: Answer, *, with_question: bool) -> None:
    if settings.json:
        console.emit_json(asdict(answer))
    elif with_question:
        console.emit_titled(answer.question, answer.answer)
    else:
        click.echo(answer.answer)
