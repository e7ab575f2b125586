"""Writes docs/cli.md, the reference of the command line, from the program's own help.

    python docs/generate_cli.py

A test compares the page with what this makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from rwkv_stream.cli.options import ELSEWHERE
from rwkv_stream.cli.program import root

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100

HEAD = """# The command line

Written by `python docs/generate_cli.py` from the program's `--help`; a test keeps it so.
Options that every command takes stand once, under [`rwkv-stream`](#rwkv-stream).
They may be given before or after the command.
"""


def commands(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, click.Context]]:
    """The command and those below it, each with its whole name."""
    context = command.make_context(
        name, [], parent, resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context.command_path, context
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from commands(found, context, below)


def section(path: str, context: click.Context) -> str:
    """One command's help; without the options that all have, but for the program's own."""
    shown = context.command.get_help(context)
    if context.parent is not None:
        before, found, after = shown.partition(f"\n{ELSEWHERE}\n")
        assert found, path
        shown = before.rstrip() + "\n" + after
    level = "#" * (1 + len(path.split()))
    return f"\n{level} `{path}`\n\n```text\n{shown.rstrip()}\n```\n"


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(path, context) for path, context in commands(root, None, "rwkv-stream"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
