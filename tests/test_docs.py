"""What the documents show can be written so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline.project.settings import SECTIONS, Project

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = ("README.md", "docs/tasks.md", "docs/cluster.md")
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_settings_of_the_pages(block: str) -> None:
    shown = yaml.safe_load(block)
    assert shown
    needed = {"encode": {"cuts": [0.5]}}  # a block of some settings of a section stands for a file with the others
    for name, settings in shown.items():
        SECTIONS[name].model_validate(needed.get(name, {}) | settings)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("examples/*/params.yaml")))
def test_settings_of_the_examples(name: str) -> None:
    project = Project.load(ROOT / "examples" / name / "params.yaml")
    stages = yaml.safe_load((ROOT / "examples" / name / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert {"encode", "train", "report"} <= set(stages)
    for stage in stages.values():
        for setting in stage.get("params", []):
            section, _, field = setting.partition(".")
            assert not field or field in getattr(project, section).model_fields_set
