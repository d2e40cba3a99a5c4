"""Prediction over inputs in the store against the suffix's own rate.

Finished runs of a project over its own data set, or EfficientNet-Lite0 on digits as PNG files, 96 px, batches of 64.
Suffix: its forward pass in eval mode, without gradients, on the very batches in RAM. Predict: `recycle predict` over
the known inputs from their keys, those of files looked up by their stamps, to the finished Parquet file. Building the
model is not counted on either side, nor is the first round, for which a suffix is prepared. Both alternate in one
process; shown are medians of samples per second. Beside them: how many samples the prefix ran on.

    python benchmarks/predict.py
    python benchmarks/predict.py examples/scicite 0.5-null-0 0.67-null-0
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import digits
from PIL import Image

from pipeline.data.source import Chosen
from pipeline.project import Project
from pipeline.runs.finished import open_run
from pipeline.workflows import predict
from pipeline.workflows.encode import encode_project
from pipeline.workflows.train import train_project

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"source": "images", "path": "digits"},
    "model": {"backbone": "timm:tf_efficientnet_lite0", "weights": None},
    "encode": {"batch_size": 64},
    "train": {"epochs": 1, "batch_size": 64},
}


def main() -> None:
    """Print both rates and their ratio for each run."""
    options = parse()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    if options.project is not None:
        os.chdir(options.project)
        show(Project.load(Path("params.yaml")), options.runs, options)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_digits(options.samples)
        settings = SETTINGS | {
            "preprocess": {"image_size": options.pixels},
            "encode": SETTINGS["encode"] | {"cuts": options.cuts},
        }
        Path("params.yaml").write_text(yaml.safe_dump(settings))
        project = Project.load(Path("params.yaml"))
        encode_project(project)
        names = [str(cut) for cut in project.encode.cuts]
        for name in names:
            train_project(project, name)
        show(project, names, options)


def show(project: Project, names: Sequence[str], options: argparse.Namespace) -> None:
    """Print a line per run."""
    print(f"{options.threads} torch threads, medians of {options.rounds} rounds")
    print(f"{'run':>12} {'samples':>8} {'suffix, 1/s':>12} {'predict, 1/s':>13} {'ratio':>7} {'prefix ran on':>14}")
    for name in names:
        samples, suffix, predicted, ran = measure(project, name, options.rounds)
        print(f"{name:>12} {samples:8} {suffix:12.1f} {predicted:13.1f} {predicted / suffix:7.3f} {ran:14}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, nargs="?", help="folder of a params.yaml with finished runs")
    parser.add_argument("runs", nargs="*", help="their names")
    parser.add_argument("--samples", type=int, default=2048, help="digits, where no project is named")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.5, 0.75, 1.0], help="of the digits' network")
    parser.add_argument("--pixels", type=int, default=96, help="size of the digits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def write_digits(count: int) -> None:
    """Write digits as files, old enough to be known by their stamps."""
    source, before = digits(count), time.time() - 60
    for i in range(count):
        path = Path("digits", str(source.row(i).targets["label"]), f"{i:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        Image.fromarray(np.asarray(source.content(i))).save(data, "PNG")
        path.write_bytes(data.getvalue())
        os.utime(path, (before, before))


def measure(project: Project, name: str, rounds: int) -> tuple[int, float, float, int]:
    """Return how many samples are known, how many a second the suffix alone and a prediction do, and on how many the
    prefix ran."""
    run, source = open_run(project, name), project.part(None).source(None)
    rates: dict[str, list[float]] = {"suffix": [], "predict": []}
    with tempfile.TemporaryDirectory() as folder:
        known = np.flatnonzero(~run.store.plain.missing(project.keys_of(source).keys))
        source = Chosen(source, known, {})
        states = predict.SharedStates({"": run}, source, project.keys_of(source), Path(folder))
        batches = [batch for _, batch in states.read(np.arange(len(known)))]
        for round_ in range(rounds + 1):
            start = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    run.suffix(batch.state, **batch.inputs)
            middle = time.perf_counter()
            states.reader = project.reader(run.store.path)  # one that has proved no sample's bytes yet
            predict.predict_spans(source, project.keys_of(source), [states], Path(folder, "out.parquet"))
            end = time.perf_counter()
            if round_:
                rates["suffix"].append(len(known) / (middle - start))
                rates["predict"].append(len(known) / (end - middle))
    return len(known), statistics.median(rates["suffix"]), statistics.median(rates["predict"]), states.result.new[0]


if __name__ == "__main__":
    main()
