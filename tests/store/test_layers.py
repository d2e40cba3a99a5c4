"""Imports inside the store go one way: along the lists of modules in each package's docstring."""

import ast
import re
from pathlib import Path

import pytest

STORE = Path(__file__).parents[2] / "pipeline/store"
LAYERS = ["format", "local", "remote", "store", "upkeep"]
MODULES = [path for path in sorted(STORE.rglob("*.py")) if path.stem != "__init__"]


def listed(package: Path) -> list[str]:
    """The modules that a package's docstring maps, in order."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return re.findall(r"^(\w+)/? {2,}\S", docstring, re.MULTILINE)


def place(name: str) -> tuple[int, int]:
    """Layer, and place in the layer's own list."""
    layer, _, module = name.removeprefix("pipeline.store.").partition(".")
    return LAYERS.index(layer), listed(STORE / layer).index(module) if module else 0


@pytest.mark.parametrize("package", [STORE, *(STORE / layer for layer in LAYERS if layer != "store")])
def test_docstrings_map_their_folder(package):
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(listed(package)) == sorted(there - {"__init__"})


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(STORE)))
def test_imports_go_one_way(path):
    own = place(".".join(("pipeline.store", *path.relative_to(STORE).with_suffix("").parts)))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline.store"):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in whole if node.module in [f"pipeline.store.{layer}" for layer in LAYERS[:3]] else [node.module]:
                assert place(name) < own, f"{path.name} imports {name}, which is not before it"
