"""The commands of the benchmarks that documents name: the script is there, and has every option."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")])
SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))
COMMAND = re.compile(r"benchmarks/([\w/]+\.py)([^`\n]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES} | {
    str(path.relative_to(ROOT)): ast.get_docstring(ast.parse(path.read_text())) or "" for path in SCRIPTS
}
COMMANDS = [(source, *match.groups()) for source, text in TEXTS.items() for match in COMMAND.finditer(text)]


def options(script: Path) -> set[str]:
    """What the script gives to argparse or click as names of options."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    names = [z for call in calls if ast.unparse(call.func).lower().endswith(("argument", "option")) for z in call.args]
    constants = (node for name in names for node in ast.walk(name) if isinstance(node, ast.Constant))
    texts = (node.value for node in constants if isinstance(node.value, str))
    return {part for text in texts for part in text.split("/") if part.startswith("--")}


@pytest.mark.parametrize(("source", "name", "rest"), COMMANDS, ids=[f"{s}: {n}{r}"[:80] for s, n, r in COMMANDS])
def test_a_benchmark_has_the_options_that_documents_name(source: str, name: str, rest: str) -> None:
    script = ROOT / "benchmarks" / name
    assert script.is_file(), f"{source} names benchmarks/{name}, which is not there"
    unknown = set(OPTION.findall(rest)) - options(script) - {"--help"}
    assert not unknown, f"{source}: benchmarks/{name} has no option {', '.join(sorted(unknown))}"
