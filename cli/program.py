"""The tree of commands, and what becomes of whatever ends one."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from rwkv_stream.cli import console, endings
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Group
from rwkv_stream.errors import RwkvStreamError
from rwkv_stream.interrupts import Interruption

COMMANDS = (
    "ingest",
    "snapshots",
    "ask",
    "summarize",
    "generate",
    "embed",
    "score",
    "search",
    "train",
    "finetune",
    "model",
    "eval",
    "bench",
    "doctor",
)

EPILOG = """\b
Exit codes:
  0  done                     11  store locked (--wait waits)
  1  failed                   12  snapshot damaged
  2  usage                    13  snapshot or table of another model or a newer format
  3  some inputs failed       130 interrupted (SIGINT)
  10 no such store/snapshot   143 terminated (SIGTERM)

\b
Example:
  rwkv-stream ingest samples/story.txt
  rwkv-stream ask "Who gave Edmund the lamp with the green panes?" --from-snapshot story.txt
"""


class _Root(Group):
    """Loads the module of a command only when that command, or the list of commands, is asked for."""

    is_root = True

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"rwkv_stream.cli.{name}").command
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with endings.system_errors():
            context: click.Context = super().make_context(*args, **kwargs)
            return context

    def invoke(self, ctx: click.Context) -> object:
        with endings.system_errors():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"rwkv-stream {version('rwkv-stream')}")
        ctx.exit()


@click.group(
    cls=_Root,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.pass_context
def root(ctx: click.Context) -> None:
    """Read books, logs and corpora once through an RWKV model, keep exact snapshots of its state, and fork any of
    them to ask, generate or score."""
    ctx.ensure_object(GlobalOptions)


def _yield_at_barriers() -> None:
    """Let torch's threads sleep when they wait for each other, unless the environment says how they are to wait.

    libgomp reads this when torch is loaded. By itself it spins for 3 ms at each barrier, as long as there are no more
    threads than processors; beside one other busy process that takes ten times the time of the computation. This
    number is what it spins where there are more threads.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def run() -> int:
    """Do what the arguments say and return the exit code; raises Interruption outside of a command."""
    _yield_at_barriers()
    try:
        endings.open_streams()
        result = root.main(standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except RwkvStreamError as error:
        console.error(str(error))
        return error.exit_code
    except click.Abort as abort:  # click's word for a KeyboardInterrupt
        if isinstance(abort.__cause__, Interruption):
            raise abort.__cause__ from None
        console.error("interrupted")
        return 130
    finally:
        endings.close_stdout()
