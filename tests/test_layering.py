"""Imports go down only: a module imports from lower floors alone, and each large library through one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ("layer_recycling", "pipeline", "stages")

FLOORS = [
    {"layer_recycling"},
    {"stages.cli"},
    {
        "stages.adopt",
        "stages.encode",
        "stages.train",
        "stages.report",
        "stages.cuts",
        "stages.export",
        "stages.fetch",
        "stages.init",
        "stages.plan",
        "stages.store",
        "stages.sweep",
    }
    | {"stages.evaluate", "stages.predict"},
    {"stages.options"},
    {"pipeline.workflows"},
    {"pipeline.cluster", "pipeline.library", "pipeline.report"},
    {"pipeline.runs"},
    {"pipeline.project"},
    {"pipeline.encode", "pipeline.tracked", "pipeline.train"},
    {"pipeline.models", "pipeline.store"},
    {"pipeline.data", "pipeline.tasks"},
    {"pipeline.split"},
    {"pipeline.keys", "pipeline.files"},
    {"pipeline.config", "pipeline.device", "pipeline.memory", "pipeline.precision"},
    {"pipeline.errors"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}

DOORS = {
    "click": {"stages"},
    "dask": {"pipeline.cluster"},
    "dask_jobqueue": {"pipeline.cluster"},
    "distributed": {"pipeline.cluster"},
    "dvclive": {"pipeline.train.run_log"},
    "accelerate": {
        "pipeline.workflows.train",
        "pipeline.train.checkpoint",
        "pipeline.train.fit",
        "pipeline.train.objective",
        "pipeline.train.parallel",
        "pipeline.train.processes",
        "pipeline.train.trackers",
    },
    "jinja2": {"pipeline.report.page"},
    "nervaluate": {"pipeline.tasks"},
    "numcodecs": {"pipeline.store"},
    "soundfile": {"pipeline.models"},
    "soxr": {"pipeline.models"},
    "sqlite3": {"pipeline.encode.keying"},
    "peft": {"pipeline.train.adapter", "pipeline.train.adapter_files"},
    "pyarrow": {"pipeline.data", "pipeline.runs.predictions"},
    "pytorch_metric_learning": {"pipeline.tasks"},
    "timm": {"pipeline.models"},
    "torchmetrics": {"pipeline.tasks"},
    "torchvision": {"pipeline.data", "pipeline.models"},  # its data sets, and its networks
    "transformers": {"pipeline.models", "pipeline.train.adapter", "pipeline.train.adapter_files"},
    "dvc": {"pipeline.tracked"},
    "dvc_objects": {"pipeline.tracked"},
    "vl_convert": {"pipeline.report.charts"},
    "obstore": {"pipeline.store"},
    "zarr": {"pipeline.store"},
}
"""Library -> the rooms and modules that may import it."""


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(path for house in HOUSE for path in ROOT.glob(f"{house}/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def room(module: str) -> str:
    """`pipeline.split.phantom` is in the room `pipeline.split`: a package is one room."""
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """Every module a file imports, type-only imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= (
                {node.module}
                if node.module not in ("pipeline", "stages")
                else {f"{node.module}.{a.name}" for a in node.names}
            )
    return names


MODULES = [(name, path) for name, path in modules() if "." in name or name == "layer_recycling"]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_go_down(name: str, path: Path) -> None:
    assert room(name) in FLOOR, f"{name} stands on no floor; add it to FLOORS"
    for imported in imports(path):
        if imported.split(".")[0] in HOUSE and room(imported) != room(name):
            assert FLOOR[room(imported)] > FLOOR[room(name)], f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_one_library_one_door(name: str, path: Path) -> None:
    for imported in imports(path):
        doors = DOORS.get(imported.split(".")[0])
        inside = doors is None or not doors.isdisjoint({name, room(name), name.split(".", maxsplit=1)[0]})
        assert inside, f"{name} imports {imported}; only {doors} may"


@pytest.mark.parametrize("package", sorted({room(name) for name, _ in MODULES}))
def test_no_circles_inside_a_package(package: str) -> None:
    inside = {name: imports(path) for name, path in MODULES if room(name) == package}
    graph = {name: {other for other in inside if other != name and other in found} for name, found in inside.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"imports go in a circle: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
