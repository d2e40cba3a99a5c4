"""What `recycle plan` predicts, beside what `recycle encode` and `recycle train` then take.

    python benchmarks/plan.py . examples/faq examples/cars         # projects, whose data is in place
    python benchmarks/plan.py --apply examples/cars                 # under the settings that plan recommends
    python benchmarks/plan.py --cuts 0.5,1.0 --epochs 2 examples/faq

Each project is worked on in a temporary copy of its settings, from a store that is empty. Every command is a process of
its own. Shown are predicted / measured, and their ratio; of an epoch the median, without validation.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OWN = ("data", "results", "params.yaml", "activations", "samples.parquet", "quarantine.csv")
"""Entries of a project, and of its folder data, that are not linked."""


def main() -> None:
    """Print a table for each project."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("projects", type=Path, nargs="+", help="folders with a params.yaml")
    parser.add_argument("--apply", action="store_true", help="write the recommended settings first")
    parser.add_argument("--cuts", help="cuts to train, joined by commas; without it, all; none trains nothing")
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    for project in options.projects:
        with tempfile.TemporaryDirectory() as name:
            folder = copied(project, Path(name))
            print(f"\n{project.resolve().name}, load {os.getloadavg()[0]:.1f}")
            measure(folder, options)


def copied(project: Path, folder: Path) -> Path:
    """Copy the settings of a project to `folder`, and link its data."""
    shutil.copy(project / "params.yaml", folder)
    (folder / "data").mkdir()
    inner = (project / "data").iterdir() if (project / "data").is_dir() else ()
    for entry in (*project.iterdir(), *inner):
        if entry.name not in OWN and not entry.name.startswith(".") and entry.resolve() not in folder.parents:
            (folder / entry.relative_to(project)).symlink_to(entry.resolve())
    return folder


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run plan, encode and train in `folder`; print what was predicted beside what was measured."""
    planned = recycle(folder, "plan", *(["--apply"] if options.apply else []))
    plan = json.loads((folder / "results/plan.json").read_text())
    print(f"plan {planned:.0f} s; recommended: {plan['settings']['recommended']}")
    encoded = recycle(folder, "encode")
    costs = json.loads((folder / "results/encode.json").read_text())["cuts"]
    forecast = plan["forecast"]
    elapsed = max(store["samples"] / store["measured"]["rate"]["samples_per_second"] for store in costs.values())
    print(f"encode of all cuts: {compared(forecast['encode_seconds'], elapsed)} s (the command {encoded:.0f} s)")
    chosen = None if options.cuts is None else options.cuts.split(",")
    for cut in forecast["cuts"]:
        name = str(cut["cut"])
        stores = [store for key, store in costs.items() if key == name or key.startswith(f"{name}/")]
        nbytes = sum(store["state_bytes_per_sample"] * store["samples"] for store in stores) / 1e6
        seconds = sum(store["encode_seconds"] for store in stores)
        line = f"cut {name:6} MB {compared(cut['state_bytes'] / 1e6, nbytes)}"
        line += f"   encode s {compared(cut['encode_seconds'], seconds)}"
        if chosen is None or name in chosen:
            line += f"   epoch s {compared(cut['epoch_seconds'], epoch(folder, name, options.epochs))}"
        print(line, flush=True)


def epoch(folder: Path, cut: str, epochs: int) -> float:
    """Train a run; return its seconds per epoch."""
    recycle(folder, "train", "--cut", cut, "--set", f"train.epochs={epochs}", "--name", "measured")
    run: dict[str, Any] = json.loads((folder / "results/runs/measured/run.json").read_text())
    return float(statistics.median(row["train/seconds"] for row in run["history"]))


def compared(predicted: float | None, measured: float) -> str:
    """Return both figures and their ratio."""
    if predicted is None:
        return f"      - / {measured:8.2f}       "
    return f"{predicted:8.2f} / {measured:8.2f} ({predicted / measured:.3f})"


def recycle(folder: Path, *arguments: str) -> float:
    """Run a command in `folder`; return its seconds."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "stages.cli", *arguments]
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
