"""Head-only runs by one `recycle sweep` against their training and scoring alone, and against one `recycle train` each.

A network with random weights on digits, cut at 1.0. The sweep runs in this process, which times the rounds and the
validations in it, by turns as it is and with `--stacked`; a few of the runs are then trained again, each by a command
of its own. Medians over the turns.

    python benchmarks/sweep.py
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DIGITS
from safetensors.torch import load_file

import pipeline.train.fit
from pipeline.project import Project
from pipeline.runs.planned import Settings, list_runs
from pipeline.runs.record import Run
from pipeline.workflows.encode import encode_project
from pipeline.workflows.sweep import sweep_project
from pipeline.workflows.train import OpenCut


def main() -> None:
    """Print the seconds of each side, and their ratios."""
    options = parse()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the commands
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        encode_project(Project.load(write_params(options)))
        runs = list_runs(["1.0"], {"train.lr": options.rates, "train.seed": list(range(options.seeds))})
        turns = [(sweep_once(runs, stacked=True), sweep_once(runs)) for _ in range(options.turns)]
        stacked, single = (list(of_kind) for of_kind in zip(*turns, strict=True))
        imports = Timed(command)
        imports("-c", "import pipeline.workflows.sweep")
        alone = [seconds_alone(run.name, run.overrides) for run in single[-1].finished[: options.alone]]
    own, rest = median(single, "own"), median(single, "rest")
    start = imports.seconds + median(single, "opening")
    print(f"{options.backbone}, {options.threads} torch threads")
    print(f"{len(runs)} runs of {options.epochs} epochs of {options.samples} samples, median of {options.turns}")
    print(f"{'':26}{'seconds':>10} {'of the sweep':>14}")
    for name, seconds in {
        "sweep": start + rest,
        "its start": start,
        "training and scoring": own,
        "sweep without its start": rest,
        "stacked without its start": median(stacked, "rest"),
        **({"a command for each run": statistics.median(alone) * len(runs)} if alone else {}),
    }.items():
        print(f"{name:26}{seconds:10.2f} {seconds / (start + rest):14.3f}")
    print(f"sweep without its start / training and scoring: {rest / own:.3f}")
    ratios = sorted(one.rest / other.rest for one, other in turns)
    print(f"stacked / sweep, both without their starts: {statistics.median(ratios):.3f}")
    print(f"from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    print(f"stacked without its start / training and scoring: {median(stacked, 'rest') / own:.3f}")
    print("largest difference: " + ", ".join(f"{value:.1e} {name}" for name, value in differences(turns[-1]).items()))


@dataclass(frozen=True)
class Sweep:
    """The seconds of a sweep, and what it left."""

    finished: Sequence[Run]
    weights: Sequence[Mapping[str, torch.Tensor]]
    opening: float
    own: float
    """Training and scoring of single runs."""
    rest: float
    """All but `opening`."""


def sweep_once(runs: Sequence[Settings], *, stacked: bool = False) -> Sweep:
    """Train `runs` anew."""
    shutil.rmtree("results", ignore_errors=True)
    own = [timed_in(pipeline.train.fit, "train_round"), timed_in(pipeline.train.fit, "evaluate")]
    opening, whole = timed_in(OpenCut, "of"), Timed(sweep_project)
    finished = whole(Path("params.yaml"), {}, runs, stacked=stacked).finished
    for timed in [*own, opening]:
        timed.undo()
    weights = [load_file(Path("results/runs") / run.name / "model.safetensors") for run in finished]
    training = sum(timed.seconds for timed in own)
    return Sweep(finished, weights, opening.seconds, training, whole.seconds - opening.seconds)


def median(sweeps: Sequence[Sweep], what: str) -> float:
    return float(statistics.median(getattr(sweep, what) for sweep in sweeps))


def differences(turn: tuple[Sweep, Sweep]) -> dict[str, float]:
    """Return the largest differences between the runs of a stack and single runs."""
    stacked, single = turn
    pairs = list(zip(stacked.finished, single.finished, strict=True))
    losses = [
        abs(row["train/loss"] - other["train/loss"])
        for one, two in pairs
        for row, other in zip(one.history, two.history, strict=True)
    ]
    weights = [
        float((one[name] - two[name]).abs().max())
        for one, two in zip(stacked.weights, single.weights, strict=True)
        for name in one
    ]
    scores = [abs(one.value - two.value) for one, two in pairs]
    return {"of a score": max(scores), "of a loss": max(losses), "of a weight": max(weights)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000, help="digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0", help="timm:resnet18 has a smaller head")
    parser.add_argument("--pixels", type=int, default=96, help="size of the images")
    parser.add_argument("--turns", type=int, default=1, help="sweeps of each kind, by turns")
    parser.add_argument("--alone", type=int, default=3, help="runs that are trained by a command of their own too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def write_params(options: argparse.Namespace) -> Path:
    """Write the settings of the project into the current folder."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"source": DIGITS.source, "path": DIGITS.path, "seed": 0},
        "model": {"backbone": options.backbone, "weights": None},
        "preprocess": {"image_size": options.pixels},
        "task": {"kind": "classification"},
        "encode": {"cuts": [1.0], "channels_last": True, "workers": 0},
        "train": {"epochs": options.epochs, "channels_last": True},
    }
    settings["data"]["fraction"] = min(1.0, options.samples / 4000)
    path = Path("params.yaml")
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


class Timed:
    """A function whose calls are timed."""

    def __init__(self, function: Callable[..., Any], undo: Callable[[], None] = lambda: None) -> None:
        self.function, self.seconds, self.undo = function, 0.0, undo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


def timed_in(place: Any, name: str) -> Timed:
    """Have the function `name` of a module or class timed."""
    function = vars(place)[name]
    timed = Timed(getattr(place, name), lambda: setattr(place, name, function))
    setattr(place, name, timed)
    return timed


def command(*args: str) -> None:
    subprocess.run([sys.executable, *args], check=True, capture_output=True)


def seconds_alone(name: str, overrides: Any) -> float:
    """Train a run again by `recycle train`; check that it leaves the same weights."""
    weights = Path("results/runs") / name / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    given = [part for setting, value in overrides.items() for part in ("--set", f"{setting}={value}")]
    timed = Timed(command)
    timed("-m", "stages.cli", "train", "--cut", "1.0", *given)
    if weights.read_bytes() != before:
        raise SystemExit(f"run {name}: the sweep left other weights than recycle train")
    return timed.seconds


if __name__ == "__main__":
    main()
