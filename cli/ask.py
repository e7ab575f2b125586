"""`rwkv-stream ask`: answer questions, quoted from the text that a snapshot has read or by the model from its state."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import ask_documents, console
from rwkv_stream.cli.ask_documents import documents_options
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import ANSWERING, Command, example, given, position_options, sampling_options
from rwkv_stream.errors import PartialFailureError, RwkvStreamError, SnapshotError

if TYPE_CHECKING:
    from rwkv_stream.answers.answer import Answer, Source
    from rwkv_stream.answers.ask import Conversation
    from rwkv_stream.answers.prompts import Question
    from rwkv_stream.answers.strategy import Subject
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.text.parts import Part

AUTO, QUOTE, REREAD, STATE = "auto", "quote", "reread", "state"
STRATEGIES = (AUTO, QUOTE, REREAD, "nearest", "cells", "map-reduce", "vote", STATE)
NOT_SPOKEN_OF = "the text does not speak of this"


@click.command(
    cls=Command,
    name="ask",
    short_help="Answer questions from a snapshot.",
    epilog=example(
        'rwkv-stream ask "Who gave Edmund the lamp with the green panes?" --from-snapshot story.txt',
        "rwkv-stream ask --questions questions.jsonl --from-snapshot story.txt@50% -o answers.jsonl",
        "rwkv-stream ask --interactive --from-snapshot story.txt",
        "rwkv-stream ask --questions questions.jsonl --documents articles/ -o answers/",
    ),
)
@click.argument("question", required=False)
@click.option("--from-snapshot", metavar="REF", help="The snapshot to ask.")
@position_options
@click.option("--all", "is_all", is_flag=True, help="Ask all documents of the store.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default=AUTO,
    show_default=True,
    help="quote: words of the text itself, with their place; the model reads, and answers: reread, the passages that "
    "fit the question; nearest, on from the snapshot before the best passage; cells, into the state of each chunk "
    "(`ingest --cells`), the surest; map-reduce, from what these answer; vote, what most ways answer; state, from the "
    "snapshot alone. auto: quote, where the model has not learned to answer, as the shipped one, else what fits.",
)
@click.option("--until", metavar="REF", help="Only what this earlier snapshot of the reading had read.")
@click.option(
    "--within",
    metavar="PART",
    help="Only this part of the document: chapter:3..7, page:12, line:100..200, row:5, or a chapter's title.",
)
@click.option("--k", type=click.IntRange(min=1), help="Quotes for each question, the best first. [default: 1]")
@click.option(
    "--questions", metavar="FILE", help="Questions, one a line, or JSON Lines with question and id; - is stdin."
)
@documents_options
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR/",
    help="Write .jsonl or .parquet; of --documents a folder, too, a job of parts.",
)
@click.option("--interactive", is_flag=True, help="Ask on; from the state every question knows the ones before it.")
@click.option("--save", metavar="TAG", help="Keep the forked state, question and answer read, under this tag.")
@click.option("--prompt-template", metavar="TEXT", help="Prompt with {question} in it. [default: the model family's]")
@sampling_options(ANSWERING)
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    question: str | None,
    from_snapshot: str | None,
    is_all: bool,
    strategy: str,
    until: str | None,
    within: str | None,
    k: int | None,
    questions: str | None,
    output: str | None,
    interactive: bool,
    save: str | None,
    prompt_template: str | None,
    **arguments: Any,
) -> None:
    """Answer QUESTION (- reads it from stdin), or many, from what a snapshot, or the whole store, has read.

    With --documents nothing is to be read before: each is asked by itself, and has a row for each question. A run that
    was stopped goes on when it is started again, and a folder grows when its documents have.
    """
    others = {
        "QUESTION": question, "--from-snapshot": from_snapshot, "--all": is_all, "--until": until, "--within": within,
        "--interactive": interactive, "--save": save, "--prompt-template": prompt_template,
    }  # fmt: skip
    if ask_documents.ask(
        settings, arguments, strategy=strategy, k=k, questions=questions, output=output, others=others
    ):
        return
    from rwkv_stream.answers import prompts
    from rwkv_stream.answers.kept import until as until_of
    from rwkv_stream.answers.strategies import named
    from rwkv_stream.tables.writers import check_output
    from rwkv_stream.text.parts import Part

    _check_usage(question, questions, interactive, from_snapshot, is_all, until or within, output, save)
    if output is not None:
        check_output(output)
    if prompt_template is not None:
        prompts.check_template(prompt_template)
    if save is not None:
        settings.open_store().check_tag(save)
    turns: Iterator[Question]
    if questions is not None:
        turns = _questions(questions)
    elif interactive:
        turns = map(prompts.Question, _turns())
    else:
        turns = iter([prompts.Question(prompts.clean(sys.stdin.read() if question == "-" else question or ""))])
    chosen = given(arguments)
    of_model = [*chosen, *(["prompt_template"] if prompt_template else []), *(["save"] if save else [])]
    part = None if within is None else Part.of(within, "--within")
    store, snapshot = (settings.open_store(), None) if from_snapshot is None else settings.somewhere(from_snapshot)
    if snapshot is not None and until is not None:
        snapshot = until_of(until, snapshot, store)
    why = None
    if strategy == AUTO:
        strategy, why = _fitting(snapshot, of_model, part, is_conversation=interactive)
    _check(strategy, snapshot, of_model, k, part)
    model = None
    if snapshot is not None and "model" in named(strategy).needs:
        model = settings.model_of(snapshot)
    if snapshot is not None and from_snapshot is not None:
        if model is not None:
            snapshot = settings.take(store, until or from_snapshot, model)
        else:
            snapshot = settings.nearest_to(store, until or from_snapshot, snapshot.model)
            settings.say_taken(snapshot)
    if why is not None:
        settings.notice(f"by {strategy}: {why}")
    if strategy == STATE and questions is None:
        assert snapshot is not None and model is not None
        _converse(settings, store, snapshot, model, turns, chosen, prompt_template, output, save)
        return
    with _subject(settings, strategy, store, snapshot, model, part) as (given_subject, on_damage):
        from rwkv_stream.answers.strategies import answers
        from rwkv_stream.answers.strategy import Manner

        model = given_subject.model
        sampling = None if model is None or not chosen else replace(prompts.family(model).sampling, **chosen)
        found = answers(
            turns, named(strategy), given_subject, Manner(k or 1, sampling, prompt_template), snapshot=snapshot,
            rows=1 if interactive else None, on_damage=on_damage,
        )  # fmt: skip
        _emit(settings, _noted(settings, found), output, with_question=questions is not None)


def _check_usage(
    question: str | None,
    questions: str | None,
    interactive: bool,
    from_snapshot: str | None,
    is_all: bool,
    bounds: str | None,
    output: str | None,
    save: str | None,
) -> None:
    """Raise click.UsageError for options that do not go together, whatever the strategy."""
    if sum((question is not None, questions is not None, interactive)) != 1:
        raise click.UsageError("ask takes one of QUESTION, --questions FILE and --interactive")
    if (from_snapshot is None) != is_all:
        raise click.UsageError("ask takes one of --from-snapshot REF and --all")
    if is_all and bounds:
        raise click.UsageError("--until and --within are of one document: ask takes --from-snapshot REF with them")
    if save is not None and questions is not None:
        raise click.UsageError("--save keeps one fork; --questions makes many")
    if output is not None and interactive:
        raise click.UsageError("--interactive answers on the terminal, not into a file")


def _fitting(
    snapshot: Snapshot | None, of_model: list[str], part: Part | None, *, is_conversation: bool
) -> tuple[str, str | None]:
    """The strategy that fits the model of a snapshot, or all documents, and the options, and why, if that is to be
    said; `auto` where the questions are to decide."""
    from rwkv_stream.answers import prompts
    from rwkv_stream.answers.choosing import NOT_LEARNED

    if snapshot is None:
        return QUOTE, None
    if {"save", "prompt_template"} & {*of_model}:
        return STATE, None
    if prompts.has_learned_to_answer(snapshot.tokenizer):
        return STATE if is_conversation and part is None else AUTO, None
    if of_model:
        return STATE if part is None else REREAD, None
    return QUOTE, NOT_LEARNED


def _noted(settings: GlobalOptions, found: Iterable[Answer]) -> Iterator[Answer]:
    """The same answers; in the end it is said by which strategies they were found, where one chose among others."""
    ways: dict[str, list[str]] = {}
    for answer in found:
        yield answer
        if answer.why is not None:
            ways.setdefault(answer.strategy, []).append(answer.why)
    several = sum(map(len, ways.values())) > 1
    for way, reasons in ways.items():
        settings.notice(f"by {way}: {console.counted(len(reasons), 'question') if several else reasons[0]}")


def _check(strategy: str, snapshot: Snapshot | None, of_model: list[str], k: int | None, part: Part | None) -> None:
    """Raise click.UsageError for options that a strategy does not take."""
    from rwkv_stream.answers.strategies import named

    if part is not None and not named(strategy).needs & {"text", "kept text"}:
        raise click.UsageError(
            f"--within looks into the text; --strategy {strategy} asks a state, which has read all: --until asks an "
            "earlier one"
        )
    if strategy == QUOTE and of_model:
        raise click.UsageError(f"--strategy quote asks no model: it takes no --{of_model[0].replace('_', '-')}")
    if strategy != QUOTE and k is not None:
        raise click.UsageError(f"--k counts quotes; --strategy {strategy} makes one answer")
    if strategy != STATE and {"save", "prompt_template"} & {*of_model}:
        raise click.UsageError("--save and --prompt-template are of --strategy state")
    if snapshot is None and named(strategy).needs & {"state", "snapshots", "cells"}:
        raise click.UsageError(f"--all looks into texts; --strategy {strategy} asks the states of one document")


@contextlib.contextmanager
def _subject(
    settings: GlobalOptions,
    strategy: str,
    store: Store,
    snapshot: Snapshot | None,
    model: Model | None,
    part: Part | None,
) -> Iterator[tuple[Subject, Callable[[SnapshotError], None] | None]]:
    """What is asked, with all that the strategy needs of it: a snapshot, or all documents, of which damaged ones are
    told and left out."""
    from rwkv_stream.answers.kept import all_texts
    from rwkv_stream.answers.strategies import named, subject
    from rwkv_stream.answers.strategy import Subject

    needs = named(strategy).needs
    if snapshot is not None:
        with subject(snapshot, store, needs, model, part) as given_subject:
            yield given_subject, None
        return
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(console.Errors())

        def show(error: RwkvStreamError) -> None:
            errors.show(str(error))

        by = None if settings.model is None else settings.model_fingerprint()
        texts = stack.enter_context(all_texts(store, by, show))
        settings.notice(f"from {console.counted(len(texts), 'document')}")
        model = settings.load_model() if "model" in needs else None
        yield Subject(f"the documents of '{store.path}'", model, texts=texts), show
        if errors.n:
            raise PartialFailureError(f"the texts of {console.counted(errors.n, 'document')} were not asked")


def _converse(
    settings: GlobalOptions,
    store: Store,
    snapshot: Snapshot,
    model: Model,
    turns: Iterator[Question],
    chosen: dict[str, Any],
    template: str | None,
    output: str | None,
    save: str | None,
) -> None:
    """Answer turn after turn from a fork of the snapshot, which may be kept in the end."""
    from rwkv_stream.answers import ask, prompts

    sampling = replace(prompts.family(model).sampling, **chosen)
    conversation = ask.Conversation(snapshot, model, sampling=sampling, template=template)
    try:
        for turn in turns:
            _answer(settings, conversation, turn.text, output)
    finally:
        if save is not None and conversation.answer is not None:
            saved = ask.keep_fork(save, conversation.fork(), snapshot, model=model, store=store)
            settings.notice(f"saved {saved.id[:12]} as '{save}'")


def _emit(settings: GlobalOptions, answers: Iterable[Answer], output: str | None, *, with_question: bool) -> None:
    """Show answers as they come, or write them to a file."""
    from rwkv_stream.answers.answer import answer_schema, as_row
    from rwkv_stream.tables.writers import Writer

    if output is None:
        for answer in answers:
            _show(settings, answer, with_question=with_question and answer.rank == 1)
        return
    with Writer(output, answer_schema()) as writer:
        writer.write(map(as_row, answers))
    settings.notice(f"{console.counted(writer.rows, 'answer')} in '{output}'")


def _questions(source: str) -> Iterator[Question]:
    """The questions of a file, of which the first is read now."""
    import itertools

    from rwkv_stream.answers import prompts

    asked = prompts.questions(source)
    return itertools.chain([next(asked)], asked)


def _turns() -> Iterator[str]:
    """The questions of a person at the terminal, or of a pipe, one a line, until the end of input."""
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


def _answer(settings: GlobalOptions, conversation: Conversation, question: str, output: str | None) -> None:
    """Answer one question, streamed unless a whole object is wanted."""
    from rwkv_stream.answers.answer import answer_schema
    from rwkv_stream.tables.writers import Writer

    pieces = conversation.ask(question)
    if settings.json or output is not None:
        for _ in pieces:
            pass
        assert conversation.answer is not None
        if output is None:
            _show(settings, conversation.answer, with_question=False)
        else:
            with Writer(output, answer_schema()) as writer:
                writer.write([asdict(conversation.answer)])
        return
    console.emit_stream(pieces)


def _show(settings: GlobalOptions, answer: Answer, *, with_question: bool) -> None:
    if settings.json:
        console.emit_json(asdict(answer) | settings.taken)
        return
    title = [(0, [(answer.question, "bold")])] if with_question else []
    indent = 2 if with_question or answer.rank > 1 else 0
    if answer.byte_start is None:
        cited = [(indent + 2, [(_cited(source), "cyan")]) for source in answer.sources if source.text is not None]
        text = f"({NOT_SPOKEN_OF})" if answer.answer is None else answer.answer
        console.emit_paragraphs(*title, (indent, [(text, "")]), *cited)
    else:
        console.emit_paragraphs(*title, *_quoted(answer, indent))


def _quoted(answer: Answer, indent: int) -> list[tuple[int, console.Parts]]:
    """The words that answer, then the passage with these marked, a ¶ where a paragraph ends, then its place."""
    (source,) = answer.sources
    assert source.text is not None and answer.byte_start is not None and answer.byte_end is not None
    passage = source.text.encode()
    start, end = answer.byte_start - source.byte_start, answer.byte_end - source.byte_start
    before, words, behind = (
        " ".join(re.sub(r"\s*\n\s*\n\s*", " ¶ ", part.decode()).split())
        for part in (passage[:start], passage[start:end], passage[end:])
    )
    gap_before = " " * passage[:start].decode()[-1:].isspace()
    gap_behind = " " * passage[end:].decode()[:1].isspace()
    cited = _cited(replace(source, byte_start=answer.byte_start, byte_end=answer.byte_end))
    return [
        (indent, [(words, "bold")]),
        (indent + 2, [(before + gap_before, "dim"), (words, "bold"), (gap_behind + behind, "dim")]),
        (indent + 2, [(f"{cited}; confidence {answer.confidence:.2f}", "cyan")]),
    ]


def _cited(source: Source) -> str:
    """Where a source stands."""
    place = f", {console.named(source.place)}" if source.place else ""
    return f"{source.document}{place}, bytes {source.byte_start:,} to {source.byte_end:,}"
