"""`rwkv-stream ask`: answer questions, quoted from the text that a snapshot has read or by the model from its state."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import ask_documents, console
from rwkv_stream.cli.ask_documents import documents_options
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import ANSWERING, Command, example, given, sampling_options
from rwkv_stream.errors import PartialFailureError, RwkvStreamError

if TYPE_CHECKING:
    from rwkv_stream.answers.answer import Answer, Source
    from rwkv_stream.answers.ask import Conversation
    from rwkv_stream.answers.prompts import Question

AUTO, QUOTE, REREAD, STATE = STRATEGIES = ("auto", "quote", "reread", "state")
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
@click.option("--all", "is_all", is_flag=True, help="Ask all documents of the store.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default=AUTO,
    show_default=True,
    help="quote: words of the text itself, with their place; reread: the model reads the passages that fit the "
    "question, and answers; state: it answers from the snapshot's state alone; auto: quote, where the model has not "
    "learned to answer, as the shipped one, else state.",
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
        "QUESTION": question, "--from-snapshot": from_snapshot, "--all": is_all, "--interactive": interactive,
        "--save": save, "--prompt-template": prompt_template,
    }  # fmt: skip
    if ask_documents.ask(
        settings, arguments, strategy=strategy, k=k, questions=questions, output=output, others=others
    ):
        return
    from rwkv_stream.answers import prompts
    from rwkv_stream.tables.writers import check_output

    if sum((question is not None, questions is not None, interactive)) != 1:
        raise click.UsageError("ask takes one of QUESTION, --questions FILE and --interactive")
    if (from_snapshot is None) != is_all:
        raise click.UsageError("ask takes one of --from-snapshot REF and --all")
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
    of_state = [*chosen, *(["prompt_template"] if prompt_template else []), *(["save"] if save else [])]
    if strategy == AUTO:
        strategy = QUOTE if from_snapshot is None else STATE if of_state else _fitting(settings, from_snapshot)
    if strategy == QUOTE and of_state:
        raise click.UsageError(f"--strategy quote asks no model: it takes no --{of_state[0].replace('_', '-')}")
    if strategy in (STATE, REREAD) and k is not None:
        raise click.UsageError(f"--k counts quotes; --strategy {strategy} makes one answer")
    if strategy == REREAD and (save is not None or prompt_template is not None):
        raise click.UsageError("--save and --prompt-template are of --strategy state")
    if strategy == STATE and from_snapshot is None:
        raise click.UsageError("--all looks into texts; --strategy state asks one snapshot")
    if strategy in (QUOTE, REREAD):
        turns = map(prompts.Question, _turns() if interactive else [question or ""]) if asked is None else asked
        reader = None if strategy == QUOTE else chosen
        _from_texts(settings, from_snapshot, turns, k or 1, reader, output, with_question=asked is not None)
        return

    assert from_snapshot is not None
    store, snapshot, model = settings.fork(from_snapshot)
    from rwkv_stream.answers import ask

    sampling = replace(prompts.family(model).sampling, **chosen)
    if asked is not None:
        answers = ask.ask(asked, snapshot=snapshot, model=model, sampling=sampling, template=prompt_template)
        _emit(settings, answers, output, with_question=True)
        return

    conversation = ask.Conversation(snapshot, model, sampling=sampling, template=prompt_template)
    try:
        for turn in _turns() if interactive else [question or ""]:
            _answer(settings, conversation, turn, output)
    finally:
        if save is not None and conversation.answer is not None:
            saved = ask.keep_fork(save, conversation.fork(), snapshot, model=model, store=store)
            settings.notice(f"saved {saved.id[:12]} as '{save}'")


def _fitting(settings: GlobalOptions, ref: str) -> str:
    """The strategy that fits the model of a snapshot."""
    from rwkv_stream.answers import prompts

    return STATE if prompts.has_learned_to_answer(settings.snapshot(ref)[1].tokenizer) else QUOTE


def _from_texts(
    settings: GlobalOptions,
    ref: str | None,
    questions: Iterator[Question],
    k: int,
    reader: dict[str, Any] | None,
    output: str | None,
    *,
    with_question: bool,
) -> None:
    """Answer from the text that REF has read, or from all: with k quotes, for which no model is loaded, or by the model
    that reads passages again, with the sampling options in `reader`."""
    from rwkv_stream.answers import prompts, quote

    with contextlib.ExitStack() as stack:
        errors, asked, on_damage, model = stack.enter_context(console.Errors()), None, None, None

        def show(error: RwkvStreamError) -> None:
            errors.show(str(error))

        if ref is None:
            by, on_damage = None if settings.model is None else settings.model_fingerprint(), show
            texts = stack.enter_context(quote.all_texts(settings.open_store(), by, show))
            settings.notice(f"from {console.counted(len(texts), 'document')}")
            model = None if reader is None else settings.load_model()
        else:
            if reader is None:
                store, snapshot = settings.snapshot(ref)
                settings.say_taken(snapshot)
            else:
                store, snapshot, model = settings.fork(ref)
            texts, asked = stack.enter_context(quote.read_texts(snapshot, store)), snapshot.id
        answers: Iterator[Answer]
        if model is None:
            answers = (one for question in questions for one in quote.answers(question, texts, k, asked, on_damage))
        else:
            from rwkv_stream.answers import reread

            sampling = replace(prompts.family(model).sampling, **(reader or {}))
            groups = [questions] if with_question else ([question] for question in questions)  # a person's one by one
            answers = (one for some in groups for one in reread.answers(some, texts, model, sampling, asked))
        _emit(settings, answers, output, with_question=with_question)
        if errors.n:
            raise PartialFailureError(f"the texts of {console.counted(errors.n, 'document')} were not asked")


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
        console.emit_json(asdict(answer))
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
    """The words that answer, then the passage with these marked, then its place."""
    (source,) = answer.sources
    assert source.text is not None and answer.byte_start is not None and answer.byte_end is not None
    passage = source.text.encode()
    start, end = answer.byte_start - source.byte_start, answer.byte_end - source.byte_start
    before, words, behind = (
        " ".join(part.decode().split()) for part in (passage[:start], passage[start:end], passage[end:])
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
