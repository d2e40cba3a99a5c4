"""Commands do not import packages that they do not use: torch alone takes longer than what some of them do."""

import json
import os
from pathlib import Path

import pytest
import tiny

from pipeline.project import Project
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project
from stages.cli import COMMANDS

HEAVY = ("torch", "transformers", "timm", "torchvision", "torchmetrics", "vl_convert", "dask", "zarr", "dvclive", "dvc")
CODE = """
import sys
from stages import cli
try:
    cli.main({arguments})
finally:
    print([name for name in {heavy} if name in sys.modules])
"""
TRAINING = """
import sys
import torch
import pipeline.workflows.train
from pipeline.tasks import TaskConfig, open_task
scores = open_task(TaskConfig(kind="classification")).metrics()
scores.update(torch.eye(3), {"label": torch.arange(3)})
scores.compute()
print([name for name in ("torchmetrics", "transformers", "vl_convert", "dask", "zarr") if name in sys.modules])
"""
COLLECTED = """
import gc, sys
from pipeline.memory import import_for_good
first = import_for_good("json.tool"), gc.get_freeze_count(), gc.isenabled()
later = [object() for _ in range(3)], import_for_good("json.tool"), gc.get_freeze_count()
print([first[0] is later[1] is sys.modules["json.tool"], first[1] > 1000, first[2], later[2] == first[1]])
"""


def printed(code: str, folder: Path = Path()) -> str:
    """Return the last line that `code` prints in a process of its own."""
    return tiny.python(folder, "-c", code).communicate()[0].splitlines()[-1]


def heavy_imports(folder: Path, *arguments: str) -> str:
    """Return which heavy packages `recycle` imports for `arguments`."""
    return printed(CODE.format(arguments=list(arguments), heavy=HEAVY), folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(command: str, tmp_path: Path) -> None:
    assert heavy_imports(tmp_path, command, "--help") == "[]"


@pytest.mark.slow
def test_commands_that_compute_nothing_import_no_torch(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [{"text": text, "label": label} for text in ("one", "two good", "three bad", "bad") for label in "ab"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in text_folder.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    settings = {
        "data": {"source": "text", "path": "texts.jsonl", "text": "text", "label": "label", "validation": 0.5},
        "model": {"backbone": "hf:bert"},
        "preprocess": {"kind": "text", "image_size": None},
        "encode": {"cuts": [1.0]},
        "train": {"weight_decay": 0.1},
    }
    project = Project.load(tiny.write_params(tmp_path, **settings))
    encode_project(project)
    train_project(project, "1.0")
    found = {
        verb: heavy_imports(tmp_path, *verb.split())
        for verb in ("encode", "report", "store info", "store gc --dry-run")
    }
    assert found == {"encode": "[]", "report": "['vl_convert']", "store info": "[]", "store gc --dry-run": "[]"}


def test_training_a_classifier_imports_no_unused_packages() -> None:
    assert printed(TRAINING) == "[]"


def test_imported_modules_are_left_out_of_garbage_collection_once() -> None:
    assert printed(COLLECTED) == "[True, True, True, True]"
