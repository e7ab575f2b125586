"""The house rules on imports, read from the syntax tree and seen in a running interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "rwkv_stream": ROOT / "rwkv_stream",
    "rwkv_stream.cli": ROOT / "cli",
    "rwkv_stream.kernels": ROOT / "kernels",
}
FILES = [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for _, path in FILES]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def starts_with(names: set[str], prefix: str) -> set[str]:
    return {name for name in names if name == prefix or name.startswith(prefix + ".")}


@pytest.mark.parametrize(("package", "path"), FILES, ids=IDS)
def test_imports_go_down_only(package: str, path: Path) -> None:
    names = imported(ast.parse(path.read_text()))
    assert not starts_with(names, "cli"), "the bare name `cli` is not the package"
    assert not starts_with(names, "kernels"), "the bare name `kernels` is not the package"
    if package != "rwkv_stream.cli":
        for above in ("click", "rich", "rwkv_stream.cli"):
            assert not starts_with(names, above), f"{path} is below the cli and imports {above}"
    if package == "rwkv_stream.kernels":
        own = {name for name in starts_with(names, "rwkv_stream") if name != "rwkv_stream"}
        assert all(name.startswith(("rwkv_stream.kernels", "rwkv_stream.errors")) for name in own), own
    if path.name == "errors.py":
        assert names == set()


@pytest.mark.parametrize(
    ("package", "path"),
    [f for f in FILES if f[0] != "rwkv_stream.cli"],
    ids=[name for name, (package, _) in zip(IDS, FILES, strict=True) if package != "rwkv_stream.cli"],
)
def test_the_library_never_prints(package: str, path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [
        ast.unparse(call.func)
        for call in calls
        if ast.unparse(call.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert printing == []


@pytest.mark.parametrize(
    "statement",
    [
        "import rwkv_stream",
        "import rwkv_stream.cli",
        "from rwkv_stream.cli.ingest import command",
        "import rwkv_stream.store",
    ],
)
def test_light_imports_load_nothing_heavy(statement: str) -> None:
    probe = f"{statement}\nimport sys\nprint([m for m in ('torch', 'pyarrow', 'rich') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-Ic", probe], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n"


def test_every_public_name_resolves() -> None:
    import rwkv_stream

    for name in rwkv_stream.__all__:
        assert getattr(rwkv_stream, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rwkv_stream.no_such_name
