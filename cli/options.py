"""Options that several commands share; the global ones may stand before or after the command."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import click

from rwkv_stream.cli import console, endings
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.model.loading import BACKENDS, DTYPES, WEIGHTS, Loading

F = TypeVar("F", bound=Callable[..., Any])


LOADING_FIELDS = {field.name for field in fields(Loading)} - {"path"}  # each is an option; the path is --model's

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def size(text: str) -> int:
    """Bytes as people write them: 3GB, 512MiB, 1000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise click.BadParameter(f"expected a size such as 3GB or 512MiB, found '{text}'")
    return int(float(match[1]) * UNITS[match[2]])


AGES = {"h": "hours", "d": "days", "w": "weeks"}


def age(text: str) -> datetime:
    """The moment that lies so long ago as people write it (12h, 30d, 8w), or at a date or time: with a zone, UTC where
    none is told."""
    match = re.fullmatch(r"(\d{1,6})\s*([hdw])", text.strip().lower())
    try:
        if match is not None:
            return datetime.now(timezone.utc) - timedelta(**{AGES[match[2]]: int(match[1])})
        found = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except (ValueError, OverflowError):
        raise click.BadParameter(f"expected an age such as 30d, or a date such as 2026-11-02, found '{text}'") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)


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
        option("-v", "--verbose", count=True, show_default=False, help="More on stderr."),
        option("--json", is_flag=True, help="JSON on stdout: one object, or one a line."),
    ]


def rule_options(function: F) -> F:
    """`--keep` and `--max-store-size`: the fields of `store.retention.Rule`."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--keep",
            type=click.IntRange(min=1),
            metavar="N",
            help="Thin the past: N snapshots at the most for each doubling of the distance behind the newest. "
            "[default: all]",
        ),
        click.option(
            "--max-store-size",
            type=size,
            metavar="SIZE",
            help="Thin the past as far as all files of the store fit. [default: no limit]",
        ),
    ]
    return with_options(options, function)


ELSEWHERE = "Options of all commands (--store, --model, --device, --json …): rwkv-stream --help"


class _GlobalOptionsMixin(click.Command):
    is_root = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = {name for param in self.params for name in param.opts}  # which mean something else here
        self._global = [option for option in _global_options(root=self.is_root) if own.isdisjoint(option.opts)]
        self.params += self._global

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The program's help lists the global options, that of a command says so."""
        own: Sequence[click.Parameter] = [param for param in self.get_params(ctx) if param not in self._global]
        shared = self._global if self.is_root else []
        for title, params in (("Options", own), ("Global options, before or after the command", shared)):
            rows = [record for param in params if (record := param.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)
        if not self.is_root:
            formatter.write_paragraph()
            formatter.write_text(ELSEWHERE)


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


def with_options(options: Sequence[Callable[[F], F]], function: F) -> F:
    """A command with these options, which its help lists in this order."""
    for option in reversed(options):
        function = option(function)
    return function


def reading_options(function: F) -> F:
    """`--encoding`, `--text-column`, `--id-column`, `--include` and `--exclude`: arguments of `readers.documents`."""

    def listed(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> list[str]:
        return list(value)

    options: list[Callable[[F], F]] = [
        click.option("--encoding", metavar="NAME", help="Encoding of the text. [default: found out]"),
        click.option(
            "--text-column",
            metavar="NAME",
            help="Of a table: the column to read. [default: text, or the only one]",
        ),
        click.option("--id-column", metavar="NAME", help="Of a table: the column that names its rows. [default: id]"),
        click.option(
            "--include",
            multiple=True,
            callback=listed,
            metavar="PATTERN",
            help="Of a folder: only files like this, as of .gitignore; may be repeated.",
        ),
        click.option(
            "--exclude",
            multiple=True,
            callback=listed,
            metavar="PATTERN",
            help="Of a folder: no files like this, beside what a .gitignore names; may be repeated.",
        ),
    ]
    return with_options(options, function)


def position_options(function: F) -> F:
    """`--nearest` and `--cache-size`: how a position that a REF names is taken."""

    def nearest(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        ctx.ensure_object(GlobalOptions).nearest = value

    def cache(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        n_bytes = None if value is None else 0 if value.strip() == "0" else size(value)
        ctx.ensure_object(GlobalOptions).cache_size = n_bytes

    return with_options(
        [
            click.option(
                "--nearest",
                is_flag=True,
                expose_value=False,
                callback=nearest,
                help="Take the nearest snapshot before a position, do not read on to it.",
            ),
            click.option(
                "--cache-size",
                metavar="SIZE",
                expose_value=False,
                callback=cache,
                help="Of states at positions, kept for the next time; 0: none. [default: 1GB or 5 % of the store]",
            ),
        ],
        function,
    )


READING_NAMES = ("encoding", "text_column", "id_column", "include", "exclude")
ANSWERING = {  # as `answers.prompts.FAMILIES` have it, which a test compares
    "max_tokens": "256; shipped model: 64",
    "temperature": "0",
    "top_p": "0.85",
    "top_k": "0",
    "presence_penalty": "0; Pile, Raven and World models: 0.4",
    "frequency_penalty": "0; Pile, Raven and World models: 0.4",
    "penalty_decay": "0.996",
}
CONTINUING = ANSWERING | {  # as `Sampling` has it
    "max_tokens": "256",
    "temperature": "1",
    "presence_penalty": "0",
    "frequency_penalty": "0",
}


def sampling_options(defaults: Mapping[str, str]) -> Callable[[F], F]:
    """`--max-tokens` … `--seed`, handed to the command as one argument `sampling`: the options that were given.

    defaults  words for what the options are that are not given
    """

    def option(name: str, help: str, **attributes: Any) -> Callable[[F], F]:
        default = defaults.get(name.removeprefix("--").replace("-", "_"))
        return click.option(name, help=help if default is None else f"{help} [default: {default}]", **attributes)

    options: list[Callable[[F], F]] = [
        option("--max-tokens", "Tokens to make at most.", type=click.IntRange(min=1)),
        option("--temperature", "0 is greedy.", type=click.FloatRange(min=0)),
        option("--top-p", "Smallest set of tokens with this probability.", type=click.FloatRange(0, 1)),
        option("--top-k", "At most so many tokens; 0 is no limit.", type=click.IntRange(min=0)),
        option("--presence-penalty", "Off the logit of every token made before.", type=float),
        option("--frequency-penalty", "Off the logit for each time a token was made.", type=float),
        option("--penalty-decay", "What is left of the counts after each token.", type=click.FloatRange(0, 1)),
        option("--stop", "End before this text; may be repeated.", multiple=True, metavar="TEXT"),
        option("--seed", "Same seed, same text. [default: another each time]", type=int),
    ]
    return functools.partial(with_options, options)


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
