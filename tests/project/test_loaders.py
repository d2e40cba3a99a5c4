"""What a run is fed: windows of segments beyond memory, batches of similar length, unpacked states, checked bytes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from pipeline.data import SampleTable
from pipeline.errors import CorruptStoreError
from pipeline.memory import memory_bytes
from pipeline.project import Project
from pipeline.project.loaders import open_loaders
from pipeline.project.model import LoadedModel
from pipeline.project.towers import open_tower
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """48 tiny images in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    tiny.write_images(tmp_path / "photos", range(48))
    return tmp_path


def prepared(folder: Path, encode: dict[str, object], train: dict[str, object]) -> Project:
    settings = {"cuts": [0.5], "segment_samples": 8} | encode
    project = Project.load(tiny.write_params(folder, encode=settings, train={"epochs": 1, "batch_size": 4} | train))
    assert encode_project(project)
    return project


def loaders(project: Project, memory: int | None = None):
    table = SampleTable.read(project.samples)
    tower = open_tower(project, 0.5, table)
    return table, tower.store, *open_loaders([tower], table, CPU, memory)[:2]


@pytest.mark.parametrize("encode", [{}, {"codec": "zstd"}])
def test_a_store_beyond_memory_is_drawn_from_in_windows(folder, caplog, encode) -> None:
    project = prepared(folder, encode, {})
    with caplog.at_level(logging.INFO, "recycle"):
        table, views, training, _ = loaders(project, memory=4 * sum(store.nbytes() for store in views_of(project)))
        assert "batches are drawn from" not in caplog.text
        table, views, training, _ = loaders(project, memory=1000)
    assert "batches are drawn from 1 segments at a time" in caplog.text
    segments = views.places.segment
    for epoch in range(2):
        training.set_epoch(epoch)
        seen = [batch.rows.numpy() for batch in training]
        assert sorted(np.concatenate(seen)) == table.rows("train").tolist()
        changes = np.count_nonzero(np.diff(segments[np.concatenate(seen)]))
        assert changes < 3 * len(np.unique(segments)), "a segment is used up before the next one"


def views_of(project: Project):
    table = SampleTable.read(project.samples)
    return LoadedModel.open(project, table).open_store(0.5, table)[0].stores


def test_windows_do_not_change_what_batches_hold(folder) -> None:
    project = prepared(folder, {}, {})
    _, _, exact, _ = loaders(project)
    _, _, windowed, _ = loaders(project, memory=1000)

    def states(loader) -> dict[int, torch.Tensor]:
        return {
            row: one for batch in loader for row, one in zip(batch.rows.tolist(), batch.state["input"], strict=True)
        }

    expected, found = states(exact), states(windowed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[row], found[row]) for row in expected)


def test_stopping_early_ends_reading_ahead(folder) -> None:
    project = prepared(folder, {}, {})
    _, _, training, _ = loaders(project, memory=1000)
    iterator = iter(training)
    next(iterator)
    iterator.close()
    assert len(list(training)) == len(training)


def test_a_damaged_segment_is_found_while_it_is_trained_from(folder) -> None:
    project = prepared(folder, {}, {"check": True})
    table = SampleTable.read(project.samples)
    (store,) = views_of(project)
    rows = store.rows(table.keys)
    segment = rows.segments[rows.segment[table.rows("train")[5]]]
    chunk = next((store.path / segment).glob("state.*/c.*"))
    damaged = bytearray(chunk.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    chunk.write_bytes(damaged)
    with pytest.raises(CorruptStoreError, match="other bytes in row"):
        train_project(project, "0.5")


def test_memory_is_that_of_the_machine_or_less() -> None:
    assert 1 << 28 < memory_bytes() < 1 << 50
