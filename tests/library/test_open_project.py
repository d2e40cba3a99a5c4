"""A project's stores in a loop of one's own: the batches and outputs that `recycle train` has."""

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import layer_recycling as lr
from pipeline.data import SampleTable
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.project.towers import open_tower
from pipeline.workflows.encode import encode_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(8))
    loaded = Project.load(tiny.write_params(tmp_path))
    encode_project(loaded)
    return loaded


def test_a_project_opens_by_splits_with_its_targets(project: Project) -> None:
    stores, suffix, labels = lr.open_project("params.yaml", cut=0.5)
    assert labels == tiny.CLASSES
    table = SampleTable.read(project.samples)
    assert {name: len(store) for name, store in stores.items()} == {
        name: len(table.rows(name)) for name in ("train", "validation")
    }
    tower = open_tower(project, 0.5, table)
    _, validation, _ = open_loaders([tower], table, torch.device("cpu"))
    suffix.eval()
    own = tower.suffix.eval()
    expected = {int(row): own(b.state, **b.inputs)[i] for b in validation for i, row in enumerate(b.rows)}
    held_out = stores["validation"]
    for batch in DataLoader(held_out.dataset(), 3, collate_fn=held_out.collate):
        functional.cross_entropy(suffix(**batch), batch["label"])
    outputs = suffix(**held_out.collate(held_out.dataset().__getitems__(range(len(held_out)))))
    for row, output in zip(table.rows("validation").tolist(), outputs, strict=True):
        torch.testing.assert_close(output, expected[row], rtol=0, atol=1e-6)


def test_a_cut_must_be_named_and_the_folder_be_the_current_one(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(lr.RecyclingError, match=r"encode\.cuts has 0, 0\.5, 1\.0"):
        lr.open_project()
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(lr.RecyclingError, match="its folder"):
        lr.open_project(tmp_path / "params.yaml", cut=0.5)
