"""`rwkv-stream finetune`: a model adapted to texts, records, questions or preferences."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example
from rwkv_stream.cli.train import KEPT, carry_out
from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from rwkv_stream.model.state import State
    from rwkv_stream.training.recipe import Data

RANK = 16
RATES = {"lora": 1e-3, "state": 5e-2, "whole": 1e-4}
EPOCHS = 3.0
HEAD_EPOCHS = 5.0
HEAD_TOKENS = 1 << 20
STRETCH = 1 << 16  # tokens of a document that are read in a row
WARMUP = 10  # steps
SAVE_EVERY = 50  # steps


@click.command(
    cls=Command,
    name="finetune",
    short_help="Adapt a model to texts.",
    epilog=example(
        "rwkv-stream finetune books/ -o my-lora --model rwkv7-g1-0.4b-20250324-ctx4096.pth --lora 16",
        'rwkv-stream finetune tickets.jsonl -o my-lora --template "{text}\\n\\nTeam: {team}" --learn team',
        "rwkv-stream finetune qa.jsonl -o my-state --state --form questions",
        "rwkv-stream finetune --preferences pairs.jsonl -o my-lora",
        "rwkv-stream finetune --head vector questions.jsonl books/ --model rwkv7-g1-0.4b-20250324-ctx4096.pth",
    ),
    kept=KEPT,
)
@click.argument("data", metavar="DATA...", nargs=-1)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Of the run and its result, but a head's; the same command goes on there.",
)
@click.option(
    "--lora", type=click.IntRange(min=1), metavar="RANK", help=f"Train a LoRA of this rank. [default: {RANK}]"
)
@click.option(
    "--lora-alpha", type=click.FloatRange(min=0, min_open=True), metavar="ALPHA", help="Its alpha. [default: RANK]"
)
@click.option("--state", is_flag=True, help="Train the state that readings start from (time_state) instead.")
@click.option("--whole", is_flag=True, help="Train all parameters instead.")
@click.option(
    "--head",
    type=click.Choice(["vector"]),
    help="Train a head instead, which `embed` then takes: pairs of question and context, or of passages that follow "
    "each other. It is kept beside the checkpoint.",
)
@click.option("--template", metavar="TEXT", help="Of records: text with {fields}. [default: {text}]")
@click.option("--learn", multiple=True, metavar="FIELD", help="Learn from this field alone; may be repeated.")
@click.option("--form", type=click.Choice(["text", "questions"]), default="text", help="Records with question, answer.")
@click.option("--preferences", metavar="FILE", help="Records with prompt, chosen, rejected, instead of DATA (DPO).")
@click.option("--from-snapshot", metavar="REF", help="With --state: begin with the state of this snapshot.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate. [default: " + ", ".join(f"{kind} {rate:g}" for kind, rate in RATES.items()) + "]",
)
@click.option(
    "--epochs", type=click.FloatRange(min=0, min_open=True), help=f"How often DATA is read. [default: {EPOCHS:g}]"
)
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens to read, instead of --epochs.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="T",
    help="Tokens of a lane in one step: gradients end at its edge, the state goes on.",
)
@click.option(
    "--lanes", type=click.IntRange(min=1), default=4, show_default=True, metavar="N", help="Documents in one step."
)
@click.option("--dry-run", is_flag=True, help="Only say how many tokens, how long, how much memory.")
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    data: tuple[str, ...],
    output: Path | None,
    head: str | None,
    lora: int | None,
    lora_alpha: float | None,
    state: bool,
    whole: bool,
    from_snapshot: str | None,
    preferences: str | None,
    rate: float | None,
    epochs: float | None,
    tokens: int | None,
    window: int,
    lanes: int,
    dry_run: bool,
    **records: Any,
) -> None:
    """Adapt the model of --model to DATA: files, folders or globs of texts, or records (.jsonl, .parquet).

    One of ten documents is held out; the loss on these is printed beside that of the model before. The result loads
    with --lora FOLDER/lora.pth and its alpha, --initial-state FOLDER/state.pth, or --model FOLDER. A head needs no
    option: `embed` finds it.
    """
    from rwkv_stream.training.recipe import Adapter, Recipe, Stage, Start, Validation

    given = {"lora": lora is not None, "state": state, "whole": whole, "head": head is not None}
    kinds = [kind for kind, is_given in given.items() if is_given]
    if len(kinds) > 1:
        raise UsageError(
            f"fine-tuning: expected one of --lora, --state, --whole and --head, found --{' and --'.join(kinds)}"
        )
    kind = kinds[0] if kinds else "lora"
    if (output is None) is not (kind == "head"):
        raise UsageError(
            "fine-tuning: expected -o FOLDER, found none"
            if output is None
            else "training a head: expected no -o, as it is kept beside the checkpoint, found one"
        )
    if lora_alpha is not None and kind != "lora":
        raise UsageError(f"fine-tuning: expected --lora with --lora-alpha, found --{kind}")
    if "lora" in settings.given:
        raise UsageError(
            "fine-tuning: expected a model without a LoRA, found --lora before the command; write the two as one with "
            "`rwkv-stream model convert` first"
        )
    if bool(data) is (preferences is not None):
        raise UsageError("fine-tuning: expected DATA or --preferences FILE, found " + ("both" if data else "neither"))
    if output is None:
        _train_head(settings, data, HEAD_EPOCHS if epochs is None else epochs, tokens or HEAD_TOKENS)
        return
    if epochs is not None and tokens is not None:
        raise UsageError("fine-tuning: expected --epochs or --tokens, found both")
    if from_snapshot is not None and kind != "state":
        raise UsageError(f"fine-tuning from a snapshot: expected --state, which begins with one, found --{kind}")
    path, start = _start(settings, from_snapshot)
    rank = lora or RANK
    recipe = Recipe(
        _data(data, preferences, **records),
        (
            Stage(
                tokens or 0,
                0.0 if tokens else epochs or EPOCHS,
                lanes,
                window,
                stretch=STRETCH,
                rate=rate or RATES[kind],
                warmup=WARMUP,
                schedule="cosine",
            ),
        ),
        model=Start(str(path.absolute())),
        adapter=Adapter(kind, rank, lora_alpha or float(rank)),  # type: ignore[arg-type]
        validation=Validation(held=0.1, longest=4096, documents=32),
        save_every=SAVE_EVERY,
    )
    carry_out(settings, recipe, Path(), output, dry_run=dry_run, state=start)


def _train_head(settings: GlobalOptions, data: tuple[str, ...], epochs: float, tokens: int) -> None:
    """Train a vector head on texts of so many tokens at most, and keep it beside the checkpoint."""
    from rwkv_stream.training import heads

    model = settings.load_model()
    found = itertools.chain.from_iterable(heads.pairs(Path(path)) for path in data)
    sample = heads.sample(found, tokens, model.tokenizer)
    shown = console.Bar(0, None)

    def show(unit: str) -> Callable[[int, int], None]:
        def told(done: int, of: int) -> None:
            nonlocal shown
            shown = console.Bar(done, of, (f"{done:,} {unit}",))

        return told

    with console.progress_bar(settings, "vector head", lambda _: shown):
        made = heads.trained(model, sample, epochs=epochs, read=show("tokens read"), step=show("steps"))
    path = made.head.save(model.folder)
    if settings.json:
        console.emit_json({"path": str(path), "held_pairs": made.n, "before": made.before, "after": made.after})
        return
    settings.notice(
        f"right text among those of its document, mean of 1 / rank over {made.n:,} held pairs: {made.before:.3f} by "
        f"the mean of hidden states, {made.after:.3f} by the head",
    )
    console.emit_lines([str(path)])


def _data(paths: tuple[str, ...], preferences: str | None, **records: Any) -> tuple[Data, ...]:
    from rwkv_stream.training.data import TABLES
    from rwkv_stream.training.recipe import Data

    if preferences is None:
        return tuple(Data(f"data{i}", path=path, **records) for i, path in enumerate(paths, 1))
    if not preferences.endswith(TABLES):
        raise UsageError(
            f"fine-tuning on '{preferences}': expected a file that ends in {', '.join(TABLES)}, found another"
        )
    return (Data("preferences", path=preferences, form="preferences"),)


def _start(settings: GlobalOptions, from_snapshot: str | None) -> tuple[Path, State | None]:
    """The checkpoint, and what its readings start from, where that is not its own to say."""
    if from_snapshot is not None:
        _, snapshot, model = settings.fork(from_snapshot)
        return Path(model.path), snapshot.load()[0]
    from rwkv_stream.model.checkpoints import adapters, checkpoint
    from rwkv_stream.model.checkpoints.library import find, shipped

    path = find(settings.model) if settings.model else shipped()
    initial = settings.loading.initial_state
    return path, None if initial is None else adapters.read_state(checkpoint.read(path), initial)
