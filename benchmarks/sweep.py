"""Head-only runs by one `recycle sweep` against their training and scoring alone, and against one `recycle train` each.

A network with random weights on digits, cut at 1.0. The sweep runs in this process, which times the rounds and the
validations in it; a few of the runs are then trained again, each by a command of its own.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DIGITS

import pipeline.train.fit
from pipeline.project import Project
from pipeline.runs.planned import list_runs
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
        rounds, validations = timed_in(pipeline.train.fit, "train_round"), timed_in(pipeline.train.fit, "evaluate")
        opening = timed_in(OpenCut, "of")
        whole = Timed(sweep_project)
        finished = whole(Path("params.yaml"), {}, runs).finished
        imports = Timed(command)
        imports("-c", "import pipeline.workflows.sweep")
        alone = [seconds_alone(run.name, run.overrides) for run in finished[: options.alone]]
    count, own, start = len(finished), rounds.seconds + validations.seconds, imports.seconds + opening.seconds
    sweep = imports.seconds + whole.seconds
    print(f"{options.backbone}, {options.threads} torch threads")
    print(f"{count} runs of {options.epochs} epochs of {options.samples} samples")
    print(f"{'':26}{'seconds':>10} {'of the sweep':>14}")
    for name, seconds in {
        "sweep": sweep,
        "its start": start,
        "training and scoring": own,
        "sweep without its start": sweep - start,
        "a command for each run": statistics.median(alone) * count,
    }.items():
        print(f"{name:26}{seconds:10.2f} {seconds / sweep:14.3f}")
    print(f"sweep without its start / training and scoring: {(sweep - start) / own:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000, help="digits")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0", help="timm:resnet18 has a smaller head")
    parser.add_argument("--pixels", type=int, default=96, help="size of the images")
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

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


def timed_in(place: Any, name: str) -> Timed:
    """Have the function `name` of a module or class timed."""
    timed = Timed(getattr(place, name))
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
