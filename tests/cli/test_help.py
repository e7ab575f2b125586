"""What `--help` says holds."""

from __future__ import annotations

import re
from dataclasses import fields

import click
import pytest

from rwkv_stream.answers.prompts import FAMILIES
from rwkv_stream.cli.options import ANSWERING, CONTINUING, ELSEWHERE
from rwkv_stream.cli.program import root
from rwkv_stream.model.sampling import Sampling


def made(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return command.make_context(name, [], parent, resilient_parsing=True, terminal_width=500, max_content_width=500)


def shown(*names: str) -> str:
    """The help of a command, on lines of any length."""
    command: click.Command = root
    context = made(command, "rwkv-stream")
    for name in names:
        assert isinstance(command, click.Group)
        found = command.get_command(context, name)
        assert found is not None
        command, context = found, made(found, name, context)
    return command.get_help(context)


@pytest.mark.parametrize("command", ["generate", "ask", "summarize"])
@pytest.mark.parametrize("field", [field.name for field in fields(Sampling) if field.name not in ("stop", "seed")])
def test_the_defaults_of_sampling_are_said(command: str, field: str) -> None:
    said = CONTINUING if command == "generate" else ANSWERING
    samplings = [Sampling()] if command == "generate" else [family.sampling for family in FAMILIES.values()]
    line = re.search(rf"--{field.replace('_', '-')} .*\[default: (.*?)\]", shown(command))
    assert line is not None and line[1] == said[field]
    assert {float(number) for number in re.findall(r"[\d.]+", line[1])} == {getattr(s, field) for s in samplings}


def test_options_of_all_commands_stand_once() -> None:
    assert "--gpu-memory" in shown() and ELSEWHERE not in shown()
    for names in (["ingest"], ["snapshots"], ["snapshots", "list"]):
        assert "--gpu-memory" not in shown(*names) and ELSEWHERE in shown(*names)
