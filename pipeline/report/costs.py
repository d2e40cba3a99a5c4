"""results/encode.json: the contents of a project's stores, and the time to encode them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.encode.rate import EncodeRate
from pipeline.encode.unit import EncodeResult
from pipeline.files import write_whole
from pipeline.project import Project
from pipeline.store import Store, first_rows

FILE = "encode.json"


@dataclass(frozen=True)
class CutCost:
    """Costs of one cut, as `encode` measured them; None is unknown."""

    state_bytes_per_sample: float | None = None
    encode_seconds: float | None = None
    """Read, forward and write time of all samples for this cut alone, without overlap."""
    frozen_seconds_per_sample: float | None = None
    """Forward time of the layers before the cut: their cost in every epoch without recycling."""
    flops_before: float | None = None
    """Operations of one sample's forward pass before the cut."""
    flops_after: float | None = None


class EncoderResult(NamedTuple):
    """The stores of one encoder after an encode."""

    project: Project
    """The encoder: one of a project's `parts`."""
    stores: Sequence[Sequence[Store]]
    """Its stores, `stores[view][cut]`."""
    result: EncodeResult
    """What encoding did."""
    flops: Sequence[tuple[int, int]] | None = None
    """Operations per sample before and after each of its cuts; None where they were not counted."""
    rate: EncodeRate | None = None
    """None where nothing was encoded."""


def write_costs(project: Project, results: Sequence[EncoderResult]) -> None:
    """Write contents and costs of the stores of all encoders, by store name.

    The costs per state are those of the encode that computed most samples under the recipe.
    """
    path = project.results / FILE
    before = _read(path)
    cuts: dict[str, Any] = {}
    for one in results:
        cuts |= _of_encoder(one, before)
    write_whole(path, json.dumps({"bad": len(results[-1].result.keyed.bad), "cuts": cuts}, indent=2) + "\n")


def read_costs(project: Project) -> dict[str, CutCost]:
    """Return the costs of each cut, as far as they are known: stores may come from another machine."""
    path = project.results / FILE
    known = _read(path)
    stores = {str(cut): [part.store_name(part.at(cut)) for part in project.parts] for cut in project.encode.cuts}
    is_bounded = all(project.towers.of(part.tower).trains for part in project.parts)
    return {
        cut: _sum([known[name] for name in names], is_bounded=is_bounded)
        for cut, names in stores.items()
        if known.keys() >= set(names)
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the costs by store; empty where there are none, or where earlier versions were killed while writing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["cuts"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _of_encoder(encoded: EncoderResult, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return contents and costs of the stores of one encoder; `before` are those of an earlier encode.

    All states of a sample count, one for each augmented view.
    """
    project, stores, result, flops, rate = encoded
    cuts = {}
    for number, (cut, *by_view) in enumerate(zip(project.encode.cuts, *stores, strict=True)):
        name = project.store_name(cut)
        keys = np.concatenate([store.keys() for store in by_view])
        samples = len(first_rows(keys))
        training = (by_view[1:] or by_view)[0]
        measured = {"recipe": training.recipe.digest, **result.costs.of(number)}
        if rate is not None:
            measured["rate"] = asdict(rate)
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
        if flops is not None:
            cuts[name]["flops_per_sample"] = dict(zip(("before", "after"), flops[number], strict=True))
        elif before.get(name, {}).get("measured", {}).get("recipe") == measured["recipe"]:
            cuts[name] |= {key: value for key, value in before[name].items() if key == "flops_per_sample"}
    return cuts


def _sum(stores: Sequence[Mapping[str, Any]], *, is_bounded: bool) -> CutCost:
    """Add up the costs of the stores of a run; a figure missing for one store is None.

    Operations bound the speed-ups only where everything after the cut trains (`is_bounded`).
    """
    seconds = [store["encode_seconds"] for store in stores]
    # nothing runs before the cut 0
    forward = [
        0.0 if store["at"].startswith("the inputs") else store["measured"]["seconds_per_sample"].get("forward")
        for store in stores
    ]
    flops = [store.get("flops_per_sample", {}) if is_bounded else {} for store in stores]
    total, counts = max(1, sum(store["samples"] for store in stores)), [store["samples"] for store in stores]

    def mean(values: Sequence[float | None]) -> float | None:
        pairs = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
        return sum(value * count for value, count in pairs) / total if len(pairs) == len(counts) else None

    return CutCost(
        state_bytes_per_sample=mean([store["state_bytes_per_sample"] for store in stores]),
        encode_seconds=None if None in seconds else sum(seconds),
        frozen_seconds_per_sample=mean(forward),
        flops_before=mean([one.get("before") for one in flops]),
        flops_after=mean([one.get("after") for one in flops]),
    )
