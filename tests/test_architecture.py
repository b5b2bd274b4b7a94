"""The house: which package may import which, no circles, few files at the root, short functions."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parents[1] / "crlseq"
# From the ground up; a file imports from its own package and from those below. The face, crlseq/__init__.py, names what
# users import, and nothing below it imports it.
FLOORS = (
    "errors", "_version", "threads", "config", "model", "storage", "data", "discovery", "training", "run", "readout",
    "prediction", "evaluation", "plotting", "export", "report", "pipeline", "experiments", "cli", "__main__",
)  # fmt: skip
LONGEST = 60  # lines of a function, its docstring aside
LARGEST = 400  # lines of a file
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Modules of crlseq that a file imports: at its top, within functions, and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    if module == "crlseq":
        return
    floor = FLOORS.index(module.split(".")[1])
    imported = imports_of(MODULES[module])
    assert "crlseq" not in imported, "the face is not for those below it"
    above = {name for name in imported if FLOORS.index(name.split(".")[1]) > floor}
    assert not above


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = nx.DiGraph((module, name) for module, path in MODULES.items() for name in imports_of(path) - {module})
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles


def test_few_files_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LARGEST
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = (node.end_lineno or 0) - node.lineno + 1 - len((docstring or "").splitlines())
            assert lines <= LONGEST, f"{node.name} has {lines} lines"


def test_the_model_is_torch_alone() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"anndata", "scanpy", "pandas", "typer", "h5py", "zarr"}
