"""Encodes of a small project: what is stored, and what is set aside."""

import csv
from pathlib import Path

import tiny
from click.testing import CliRunner, Result

from pipeline.data import SampleTable
from pipeline.store import Store
from stages import cli

ARRAYS = {"kind": "array", "image_size": None}


def encode(folder: Path, *options: str, **changes: dict[str, object]) -> Result:
    tiny.write_params(folder, **changes)
    return CliRunner().invoke(cli.recycle, ["encode", *options])


def quarantine(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of the quarantine by source."""
    with (folder / "data/quarantine.csv").open(encoding="utf-8", newline="") as file:
        return {row["source"]: row for row in csv.DictReader(file)}


def stored(folder: Path, cut: str = "0.5") -> int:
    keys = len(Store.open(folder / "data/activations" / cut).keys())
    assert keys == len({bytes(key) for key in SampleTable.read(folder / "data/samples.parquet").keys})
    return keys
