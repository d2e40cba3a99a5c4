"""results/encode.json: what the stores of a project hold, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.encode.encoded import Encoded
from pipeline.errors import DataError
from pipeline.project import Project
from pipeline.report.summary import Cost
from pipeline.store import Store, first_rows

FILE = "encode.json"


class Made(NamedTuple):
    """What became of one encoder's samples."""

    project: Project
    """The encoder: one of a project's `parts`."""
    stores: Sequence[Sequence[Store]]
    """Its stores, `stores[view][cut]`."""
    done: Encoded
    """What was done to fill them."""


def write_costs(project: Project, made: Sequence[Made]) -> None:
    """Write what the encoders of a project hold and cost, by the names of their stores.

    Of all runs under a recipe, the one that encoded most says what a state costs.
    """
    path = project.results / FILE
    before: dict[str, Any] = json.loads(path.read_text())["cuts"] if path.exists() else {}
    cuts: dict[str, Any] = {}
    for one in made:
        cuts |= _of_encoder(one, before)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bad": len(made[-1].done.keyed.bad), "cuts": cuts}, indent=2) + "\n")


def read_costs(project: Project) -> dict[str, Cost]:
    """Return what runs of each cut start from, as far as it was encoded.

    Raises:
        DataError: nothing was.
    """
    path = project.results / FILE
    if not path.exists():
        raise DataError(f"{path} does not exist; encode first (dvc repro encode)")
    known: dict[str, Any] = json.loads(path.read_text())["cuts"]
    stores = {str(cut): [part.store_name(part.at(cut)) for part in project.parts] for cut in project.encode.cuts}
    return {cut: _sum([known[name] for name in names]) for cut, names in stores.items() if known.keys() >= set(names)}


def _of_encoder(made: Made, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stores of one encoder hold and cost; `before` is what an earlier run said.

    A sample has one state, or several where there are augmented views; all of them count.
    """
    project, stores, done = made
    cuts = {}
    for number, (cut, *by_view) in enumerate(zip(project.encode.cuts, *stores, strict=True)):
        name = project.store_name(cut)
        keys = np.concatenate([store.keys() for store in by_view])
        samples = len(first_rows(keys))
        training = (by_view[1:] or by_view)[0]
        measured = {"recipe": training.recipe.digest, **done.costs.of(number)}
        known = before.get(name, {}).get("measured", measured)
        if known["recipe"] == measured["recipe"] and known["samples"] > measured["samples"]:
            measured = known
        cuts[name] = {
            "at": training.recipe.cut,
            "samples": samples,
            "state_bytes_per_sample": sum(store.nbytes() for store in by_view) / max(1, samples),
            "encode_seconds": sum(measured["seconds_per_sample"].values()) * len(keys) if measured["samples"] else None,
            "measured": measured,
        }
    return cuts


def _sum(stores: Sequence[Mapping[str, Any]]) -> Cost:
    """Add up stores that one run starts from."""
    seconds = [store["encode_seconds"] for store in stores]
    nbytes = sum(store["state_bytes_per_sample"] * store["samples"] for store in stores)
    return Cost(nbytes / max(1, sum(store["samples"] for store in stores)), None if None in seconds else sum(seconds))
