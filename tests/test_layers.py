"""The house rules on imports, read from the syntax tree and seen in a running interpreter.

An import counts wherever it stands: within a function, and for types alone. A name that a package only hands on counts
as an import of the module that holds it.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "rwkv_stream": ROOT / "rwkv_stream",
    "rwkv_stream.cli": ROOT / "cli",
    "rwkv_stream.kernels": ROOT / "kernels",
}

# What each folder (or file of `rwkv_stream`) may import of the others; everyone may import COMMON.
COMMON = {"errors", "extras", "files", "filesystems", "interrupts", "values"}
LIBRARY = {"text", "model", "store", "reading", "tables", "answers", "training", "evaluation", "kernels", "bench"}
MAY_IMPORT = {
    "errors": set(),
    "extras": {"errors"},
    "files": {"errors"},
    "filesystems": {"errors", "extras"},
    "interrupts": {"errors"},
    "values": {"errors"},
    "kernels": set(),
    "text": set(),
    "model": {"text.tokenizer", "kernels"},
    "model.checkpoints": {"model.config", "model.architectures", "model.state", "model.dtypes"},
    "store": {"model.state", "model.config"},
    "reading": {"text", "model", "store"},
    "tables": {"text", "model", "store", "reading.passes", "reading.states"},
    "answers": {"text", "model", "store", "reading", "tables"},
    "training": {"text", "model", "model.checkpoints", "kernels"},
    "evaluation": LIBRARY - {"bench", "evaluation"},
    "bench": LIBRARY - {"bench"},
    "transformers": {"model"},
    "rwkv_stream": LIBRARY,  # its `__init__` hands names on
    "cli": LIBRARY | {"model.checkpoints", "rwkv_stream", "transformers"},
}
# What one module alone may import, beside its folder's row.
MODULES_MAY_IMPORT = {
    "model.loader": {"model.checkpoints"},
    "store.texts": {"text.postings", "text.utf8"},  # made from what it keeps, and made again where they are not there
    "store.references": {"text.parts"},  # where chapters, pages and times of a kept text begin
    "tables.vector_index": {"kernels.native"},  # whose OpenMP runtime is to be loaded before usearch's
}
# What a folder may import for types alone.
TYPES = {"store": {"model.model", "text.readers.places"}}
# What is imported on first use: only within functions, or for types.
LATE = {"store": {"torch", "model", "text"}}
# Packages from elsewhere, and the only folders that may import them.
OUTSIDE = {
    "click": {"cli"},
    "rich": {"cli"},
    "torch": set(MAY_IMPORT) - {"text", "rwkv_stream"} - COMMON,
}


@dataclass(frozen=True)
class Import:
    """One import, of a module by its full name: in a function or not, for types alone or not."""

    importer: str
    imported: str
    in_function: bool
    for_types: bool


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


PATHS = {
    module_name(package, path): path for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}


def home(module: str, name: str) -> str:
    """The module that `from module import name` is about."""
    if f"{module}.{name}" in PATHS:
        return f"{module}.{name}"
    if module in PATHS and PATHS[module].name == "__init__.py":
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.ImportFrom) and node.module and any(name == alias.name for alias in node.names):
                return home(node.module, name)
    return module


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(importer: str) -> Iterator[Import]:
    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{importer}: imports are absolute"
            for module in {home(node.module, alias.name) for alias in node.names}:
                yield Import(importer, module, in_function, for_types)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            within = is_for_types(node) and isinstance(node, ast.If) and child in node.body
            yield from walk(child, in_function, for_types or within)

    yield from walk(TREES[importer], False, False)


IMPORTS = [edge for module in PATHS for edge in imports(module)]


def short(module: str) -> str:
    """Without `rwkv_stream.`, as the table writes it."""
    return module.removeprefix("rwkv_stream.")


def room(module: str) -> str:
    """The row of the table that a module of ours belongs to."""
    name = short(module)
    return max((row for row in MAY_IMPORT if is_in(name, {row})), key=len)


def is_in(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def fault(edge: Import) -> str | None:
    """What is wrong with an import; None where it is allowed."""
    own, importer = room(edge.importer), short(edge.importer)
    late = edge.in_function or edge.for_types
    if is_in(edge.imported, {"cli", "kernels"}):
        return "the bare name is not the package"
    if edge.imported not in PATHS:
        package = edge.imported.split(".")[0]
        if package == "rwkv_stream":
            return "there is no such module"
        if own == "errors" and package not in ("__future__", "typing"):
            return "errors imports nothing"
        if package in OUTSIDE and own not in OUTSIDE[package]:
            return f"{own} never imports {package}"
        return f"{own} imports {package} within functions" if package in LATE.get(own, set()) and not late else None
    imported, other = short(edge.imported), room(edge.imported)
    if own == other:
        return None
    if is_in(imported, LATE.get(own, set())) and not late:
        return f"{own} imports {other} within functions"
    allowed = MAY_IMPORT[own] | MODULES_MAY_IMPORT.get(importer, set())
    if own not in COMMON:
        allowed = allowed | COMMON
    if edge.for_types:
        allowed = allowed | TYPES.get(own, set())
    # a folder within a folder has a row of its own: whoever may import the one may not yet import the other
    if is_in(imported, allowed) and (other in allowed or not other.count(".")):
        return None
    return f"{own} may not import {other}"


FAULTS = {(short(edge.importer), short(edge.imported)): text for edge in IMPORTS if (text := fault(edge))}


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """The modules of one circle, each imported by the next; empty where there is none."""
    graph: TopologicalSorter[str] = TopologicalSorter()
    for importer, imported in sorted(edges):
        graph.add(importer, imported)
    try:
        graph.prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


OWN = {
    (short(edge.importer), short(edge.imported))
    for edge in IMPORTS
    if edge.imported in PATHS and edge.imported != edge.importer
}


def test_every_import_is_in_the_table() -> None:
    assert {f"{importer} → {imported}: {text}" for (importer, imported), text in FAULTS.items()} == set()


def test_no_module_imports_itself_through_others() -> None:
    assert circle(OWN) == []


def test_the_table_has_no_circle_and_a_row_for_every_folder() -> None:
    assert {short(module).split(".")[0] for module in PATHS} - {"rwkv_stream"} <= set(MAY_IMPORT)
    graph = {row: {place.split(".")[0] for place in allowed} for row, allowed in MAY_IMPORT.items() if "." not in row}
    assert list(TopologicalSorter({row: below - {row} for row, below in graph.items()}).static_order())
    assert all(not is_in("cli", allowed) for allowed in MAY_IMPORT.values())


def handed_on(package: str) -> dict[str, str]:
    """Name that a package hands on → the module that holds it."""
    return {
        alias.name: node.module
        for node in ast.walk(TREES[package])
        if isinstance(node, ast.ImportFrom) and node.module and is_in(node.module, {package}) and node.module != package
        for alias in node.names
    }


@pytest.mark.parametrize("package", [m for m, path in PATHS.items() if path.name == "__init__.py" and handed_on(m)])
def test_no_module_has_the_name_of_what_its_package_hands_on(package: str) -> None:
    """Importing such a module would put it in the place of the function."""
    assert [name for name in handed_on(package) if f"{package}.{name}" in PATHS] == []


@pytest.mark.parametrize("package", ["rwkv_stream", "rwkv_stream.model"])
def test_names_on_first_use_are_those_that_types_see(package: str) -> None:
    module = importlib.import_module(package)
    homes = {
        name: home(package, name) for name in handed_on(package) if handed_on(package)[name] != "rwkv_stream.errors"
    }
    assert {name: home(f"{package}.{place}", name) for name, place in module._HOMES.items()} == homes
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("module", [module for module in PATHS if room(module) != "cli"])
def test_the_library_never_prints(module: str) -> None:
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    printing = [
        ast.unparse(call.func)
        for call in calls
        if ast.unparse(call.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert printing == []


LIGHT = {
    "import rwkv_stream": "torch pyarrow rich",
    "import rwkv_stream.cli": "torch pyarrow rich",
    "from rwkv_stream.cli.ingest import command": "torch pyarrow rich",
    "import " + ", ".join(module for module in PATHS if room(module) == "store"): "torch pyarrow rich",
    "import " + ", ".join(module for module in PATHS if room(module) == "text"): "torch rich",
    "import " + ", ".join(module for module in PATHS if short(module) in COMMON): "torch numpy pyarrow rich",
}


@pytest.mark.parametrize("statement", LIGHT, ids=["package", "cli", "command", "store", "text", "common"])
def test_light_imports_load_nothing_heavy(statement: str) -> None:
    probe = f"{statement}\nimport sys\nprint([m for m in {LIGHT[statement].split()} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-Ic", probe], capture_output=True, text=True, check=True).stdout
    assert loaded == "[]\n"
