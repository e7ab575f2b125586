"""The `rwkv-stream` program: arguments in, data on stdout, everything else on stderr, an exit code.

Commands live one to a module and import what is heavy inside their functions, so that `--help` never loads torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.options import Group, Settings
from rwkv_stream.errors import RwkvStreamError

COMMANDS = (
    "ingest",
    "snapshots",
    "ask",
    "summarize",
    "generate",
    "embed",
    "score",
    "search",
    "model",
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

    def invoke(self, ctx: click.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(0) from None


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"rwkv-stream {version('rwkv-stream')}")
        ctx.exit()


@click.group(
    cls=_Root, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.pass_context
def root(ctx: click.Context) -> None:
    """Read books, logs and corpora once through an RWKV model, keep exact snapshots of its state, and fork any of
    them to ask, generate or score."""
    ctx.ensure_object(Settings)


def main() -> NoReturn:
    """Run the program; every ending is an exit code of the table in `--help`."""
    try:
        result = root.main(standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as ending:
        sys.exit(ending.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except RwkvStreamError as error:
        console.complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # the machine's: a full disk, a failing one
        console.complain(f"{error.strerror or error}: '{error.filename or 'unknown file'}'; what was published is kept")
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        console.complain("interrupted")
        sys.exit(130)
