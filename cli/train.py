"""`rwkv-stream train`: a model from texts, by a recipe; and what `finetune` shares with it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example
from rwkv_stream.errors import OutputError, UsageError

if TYPE_CHECKING:
    import torch

    from rwkv_stream.model.state import State
    from rwkv_stream.training.held import Held
    from rwkv_stream.training.recipe import Recipe
    from rwkv_stream.training.run import Estimate, Measured, Run

KEPT = "the last checkpoint is kept, and the same command goes on from there"
SHOWN_STEPS = 20  # of which the progress shows the mean


@click.command(
    cls=Command,
    name="train",
    short_help="Train a model by a recipe.",
    epilog=example("rwkv-stream train samples/train.toml -o my-model", "rwkv-stream train recipe.toml --dry-run"),
    kept=KEPT,
)
@click.argument("config", metavar="CONFIG.toml", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Of the run and its result. [default: CONFIG without .toml]",
)
@click.option("--dry-run", is_flag=True, help="Only say how many tokens, how long, how much memory.")
@click.pass_obj
def command(settings: GlobalOptions, /, config: Path, output: Path | None, dry_run: bool) -> None:
    """Train the model that CONFIG.toml describes (docs/training.md), from texts, JSON lines or Parquet.

    The same command goes on where an earlier one was stopped, with the same losses. Prints the path of the result,
    which loads with --model FOLDER.
    """
    from rwkv_stream.training import recipe

    work = config.with_suffix("") if output is None else output
    if work == config:
        raise UsageError(f"training by '{config}': expected a name that ends in .toml, found another; pass -o")
    carry_out(settings, recipe.read(config), config.parent, work, dry_run=dry_run)


def carry_out(
    settings: GlobalOptions, recipe: Recipe, folder: Path, work: Path, *, dry_run: bool, state: State | None = None
) -> None:
    """Train by a recipe, whose paths are relative to `folder`, in the folder `work`, and show what came of it.

    Of several processes the first one shows it.
    """
    from rwkv_stream.training.distributed import processes
    from rwkv_stream.training.run import estimate

    with processes(settings.loading.device) as rank:
        if rank:
            settings = replace(settings, quiet=True)
        if dry_run:
            with tempfile.TemporaryDirectory() as scratch:
                plan = estimate(_begun(settings, recipe, folder, Path(scratch), state))
            if not rank:
                _show_estimate(settings, plan)
            return
        run = _begun(settings, recipe, folder, work, state)
        try:
            _train(settings, run)
        finally:
            if not rank:
                _draw(settings, run)
        if not rank:
            _show_result(settings, run)


def _device(settings: GlobalOptions) -> torch.device:
    """The one device to train on. Raises UsageError for several."""
    from rwkv_stream.model.loader import devices_of

    found = devices_of(settings.loading.device)
    if len(found) > 1:
        raise UsageError(f"training: expected one device, found {len(found)}; pass one of them")
    return found[0]


def _begun(settings: GlobalOptions, recipe: Recipe, folder: Path, work: Path, state: State | None) -> Run:
    import torch

    from rwkv_stream.training.distributed import DistributedRun, first_alone, is_one_of_several
    from rwkv_stream.training.run import Run
    from rwkv_stream.training.start import start

    given = settings.loading
    if given.dtype == "fp16":
        raise UsageError("training: expected products in bf16 or fp32, found --dtype fp16; pass one of these")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    with first_alone():
        begun = start(recipe, folder, work, tokenizer=given.tokenizer, state=state, device=_device(settings))
    dtype = torch.float32 if given.dtype == "fp32" else torch.bfloat16
    kind = DistributedRun if is_one_of_several() else Run
    return kind(work, begun.recipe, begun.tokenizer, begun.tuned, begun.before, dtype=dtype, backend=given.backend)


def _train(settings: GlobalOptions, run: Run) -> None:
    """To the end, or to a signal, which raises Interruption once all is saved."""
    from rwkv_stream.interrupts import Interruption, StopRequest
    from rwkv_stream.training.distributed import agreed
    from rwkv_stream.training.run import train

    if run.step:
        settings.notice(f"going on from step {run.step:,} of {run.recipe.steps:,} in '{run.work}'")
    stop = StopRequest()
    with _progress_bar(settings, run) as say, stop.receiving():
        train(run, stop=agreed(lambda: stop.signal_number is not None), say=say)
    if stop.signal_number is not None:
        raise Interruption(stop.signal_number)


@contextlib.contextmanager
def _progress_bar(settings: GlobalOptions, run: Run) -> Iterator[Callable[[Measured], None]]:
    """Tokens, loss, bits per byte, tokens/s and the time left; a line wherever the run is measured and saved."""
    total = sum(stage.steps * stage.lanes * stage.window for stage in run.recipe.stages)
    before = run.tokens

    def figures(name: str) -> float:
        rows = run.measured[-SHOWN_STEPS:]
        if name == "loss":
            return math.fsum(row.loss for row in rows) / len(rows)
        first = run.measured[-len(rows) - 1].tokens if len(run.measured) > len(rows) else 0
        return (rows[-1].tokens - first) / math.fsum(row.seconds for row in rows)

    def say(row: Measured) -> None:
        if row.held_loss is not None:
            held = f", held {row.held_loss:.4f}"
            held += "" if row.bits_per_byte is None else f" ({row.bits_per_byte:.4f} bits per byte)"
            held += "" if row.accuracy is None else f" (accuracy {row.accuracy:.3f})"
            settings.notice(
                f"step {row.step:,} of {run.recipe.steps:,}: {row.tokens:,} tokens, loss {figures('loss'):.4f}{held}, "
                f"{figures('rate'):,.0f} tok/s",
            )

    def state(_elapsed_s: float) -> console.Bar:
        if not run.measured:
            return console.Bar(0, None)
        held = next((row.bits_per_byte for row in reversed(run.measured) if row.bits_per_byte is not None), None)
        words = [f"{run.tokens:,} tokens", f"loss {figures('loss'):.3f}"]
        words += [] if held is None else [f"{held:.3f} bits/byte"]
        return console.Bar(run.tokens, total, [*words, f"{figures('rate'):,.0f} tok/s"], before)

    with console.progress_bar(settings, run.work.name, state):
        yield say


def _draw(settings: GlobalOptions, run: Run) -> None:
    from rwkv_stream.training.curves import draw

    if run.measured:
        try:
            draw(run.measured, run.work / "curves.png")
        except OutputError as error:
            settings.notice(f"note: {error}; the figures are in '{run.metrics}'")


def _show_estimate(settings: GlobalOptions, plan: Estimate) -> None:
    if settings.json:
        console.emit_json(asdict(plan))
        return
    rows = [(f"data '{name}'", f"{tokens:,} tokens") for name, tokens in plan.data.items()]
    rows += [
        ("parameters trained", f"{plan.parameters:,}"),
        ("tokens", f"{plan.tokens:,}"),
        ("steps", f"{plan.steps:,}"),
        ("time", f"{timedelta(seconds=round(plan.elapsed_s))} at {plan.tokens / plan.elapsed_s:,.0f} tok/s"),
        ("memory", console.size(plan.peak_memory_bytes)),
    ]
    console.emit_table(("what", "found"), rows)


def _show_result(settings: GlobalOptions, run: Run) -> None:
    """The path of the result, and what it gives on held texts beside what the model gave before."""
    after = run.evaluate()
    before = None if run.before is None else run.evaluate(run.before)
    if settings.json:
        facts: dict[str, Any] = {"path": str(run.result), "steps": run.step, "tokens": run.tokens}
        facts |= {"loss": run.measured[-1].loss if run.measured else None}
        console.emit_json(facts | {"held": after and asdict(after), "held_before": before and asdict(before)})
        return
    click.echo(run.result)
    if after is not None:
        settings.notice(_comparison(before, after))


def _comparison(before: Held | None, after: Held) -> str:
    def shown(name: str) -> str:
        values = [getattr(held, name) for held in (before, after) if held is not None]
        return " → ".join(f"{value:.4f}" for value in values)

    if after.accuracy is not None:
        return f"on {after.documents} held pairs: accuracy {shown('accuracy')}, loss {shown('loss')}"
    return (
        f"on {after.documents} held documents: loss {shown('loss')} nats a learnt token, {shown('bits_per_byte')} "
        "bits per byte"
    )
