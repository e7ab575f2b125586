"""Options that several commands share; the global ones may stand before or after the command."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rwkv_stream.cli import console, endings
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.model.loading import BACKENDS, DTYPES, WEIGHTS, Loading

if TYPE_CHECKING:
    pass

F = TypeVar("F", bound=Callable[..., Any])


LOADING_FIELDS = {field.name for field in fields(Loading)} - {"path"}  # each is an option; the path is --model's

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def size(text: str) -> int:
    """Bytes as people write them: 3GB, 512MiB, 1000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise click.BadParameter(f"expected a size such as 3GB or 512MiB, found '{text}'")
    return int(float(match[1]) * UNITS[match[2]])


def _remember(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value is not None and value is not False and value != 0 and param.name is not None:
        options = ctx.ensure_object(GlobalOptions)
        if param.name in LOADING_FIELDS:
            options.given[param.name] = value
        else:
            setattr(options, param.name, value)


def _global_options(*, root: bool) -> list[click.Option]:
    """Fresh options; only the root's read the environment, so that an argument given anywhere wins over it."""

    def option(*names: str, envvar: str | None = None, **attributes: Any) -> click.Option:
        return click.Option(
            names,
            expose_value=False,
            callback=_remember,
            envvar=envvar if root else None,
            show_envvar=True,
            **attributes,
        )

    return [
        option(
            "--store",
            metavar="DIR",
            envvar="RWKV_STREAM_STORE",
            help="Folder of snapshots. [default: user data folder]",
        ),
        option(
            "--model",
            metavar="NAME|PATH",
            envvar="RWKV_STREAM_MODEL",
            help="Checkpoint. [default: the snapshot's, else the shipped one]",
        ),
        option(
            "--tokenizer", metavar="NAME|PATH", help="world, bytes or a tokenizer.json. [default: found with the model]"
        ),
        option("--lora", metavar="FILE", help="LoRA of RWKV-PEFT, merged while loading; needs --lora-alpha."),
        option("--lora-alpha", type=click.FloatRange(min=0, min_open=True), help="Alpha of the LoRA's training."),
        option("--initial-state", metavar="FILE", help="Tuned state (time_state) that readings start from."),
        option(
            "--device",
            metavar="auto|cpu|cuda[:i]",
            help="Where to compute; cuda:0,cuda:1 shares the layers out. [default: auto]",
        ),
        option(
            "--gpu-memory",
            type=size,
            metavar="SIZE",
            help="Of a GPU for weights: layers beyond are streamed. [default: all]",
        ),
        option("--backend", type=click.Choice(BACKENDS), help="Kernels. [default: auto]"),
        option("--dtype", type=click.Choice(DTYPES), help="Weights in memory. [default: auto]"),
        option("--weights", type=click.Choice(WEIGHTS), help="int8: 8 bits for large matrices. [default: auto]"),
        option("--threads", type=click.IntRange(min=1), help="CPU threads. [default: torch's]"),
        option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
        option("-v", "--verbose", count=True, help="More on stderr."),
        option("--json", is_flag=True, help="JSON on stdout: one object, or one a line."),
    ]


class _GlobalOptionsMixin(click.Command):
    is_root = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_params = list(self.params)
        own = {name for param in self.own_params for name in param.opts}  # which mean something else here
        self.params += [option for option in _global_options(root=self.is_root) if own.isdisjoint(option.opts)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, wanted in (("Options", True), ("Global options", False)):
            rows = [
                record
                for param in self.get_params(ctx)
                if isinstance(param, click.Option)
                and ((param in self.own_params or "--help" in param.opts) is wanted)
                and (record := param.get_help_record(ctx)) is not None
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


class Command(_GlobalOptionsMixin):
    """A command that takes the global options too; `kept` says what stays of its work when a signal stops it."""

    def __init__(
        self, *args: Any, kept: str = "what is whole has been kept, of the rest nothing is left", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kept = kept

    def invoke(self, ctx: click.Context) -> Any:
        options = ctx.ensure_object(GlobalOptions)
        console.show_log(options)
        with endings.command_errors(ctx, self.kept, options.given):
            return super().invoke(ctx)


class Group(_GlobalOptionsMixin, click.Group):
    """A group that takes the global options too."""

    command_class = Command


def example(*lines: str) -> str:
    """The epilog of a command: a real call."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _with(options: Sequence[Callable[[F], F]], function: F) -> F:
    """A command with these options, which its help lists in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def reading_options(function: F) -> F:
    """`--encoding`, `--text-column` and `--id-column`: arguments of `readers.documents`."""
    options: list[Callable[[F], F]] = [
        click.option("--encoding", metavar="NAME", help="Encoding of the text. [default: found out]"),
        click.option(
            "--text-column",
            metavar="NAME",
            help="Of a table: the column to read. [default: text, or the only one]",
        ),
        click.option("--id-column", metavar="NAME", help="Of a table: the column that names its rows. [default: id]"),
    ]
    return _with(options, function)


def sampling_options(function: F) -> F:
    """`--max-tokens` … `--seed`, handed to the command as one argument `sampling`: the options that were given."""
    options: list[Callable[[F], F]] = [
        click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens to make at most."),
        click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy."),
        click.option("--top-p", type=click.FloatRange(0, 1), help="Smallest set of tokens with this probability."),
        click.option("--top-k", type=click.IntRange(min=0), help="At most so many tokens; 0 is no limit."),
        click.option("--presence-penalty", type=float, help="Off the logit of every token made before."),
        click.option("--frequency-penalty", type=float, help="Off the logit for each time a token was made."),
        click.option(
            "--penalty-decay", type=click.FloatRange(0, 1), help="What is left of the counts after each token."
        ),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
        click.option("--seed", type=int, help="Same seed, same text."),
    ]
    return _with(options, function)


SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "penalty_decay",
    "stop",
    "seed",
)


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given, taken out of a command's arguments."""
    values = {name: arguments.pop(name) for name in SAMPLING_NAMES}
    return {name: value for name, value in values.items() if value not in (None, ())}
