"""Prediction over inputs in the store against the suffix's own rate.

EfficientNet-Lite0 on digits as PNG files, 96 px, batches of 64. Suffix: its forward pass in eval mode, without
gradients, on the very batches in RAM. Predict: `recycle predict` over the known files from their keys, which are looked
up by their stamps, to the finished Parquet file; building the model is not counted on either side, nor is the first
batch, for which a suffix is prepared. Both alternate in one process; shown are medians of samples per second. Beside
them: how many samples the prefix ran on.

    python benchmarks/predict.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from common import digits
from PIL import Image

from pipeline.data import SampleTable, open_source
from pipeline.flow import encode_project, train_project
from pipeline.predict import flow as predict
from pipeline.project import Project
from pipeline.report.runs import FinishedRun, open_run
from pipeline.train.loader import Batch, Loader

SETTINGS = {
    "data": {"source": "images", "path": "digits"},
    "model": {"backbone": "timm:tf_efficientnet_lite0", "weights": None},
    "preprocess": {"image_size": 96},
    "encode": {"cuts": [0.5, 0.75, 1.0], "batch_size": 64},
    "train": {"epochs": 1, "batch_size": 64},
}


def main() -> None:
    """Print both rates and their ratio for each cut."""
    options = parse()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_digits(options.samples)
        Path("params.yaml").write_text(yaml.safe_dump(SETTINGS))
        project = Project.load(Path("params.yaml"))
        encode_project(project)
        print(f"{options.samples} samples, {options.threads} torch threads, medians of {options.rounds} rounds")
        print(f"{'cut':>5} {'suffix, 1/s':>12} {'predict, 1/s':>13} {'ratio':>7} {'prefix ran on':>14}")
        for cut in project.encode.cuts:
            train_project(project, str(cut))
            suffix, predicted, ran = measure(project, str(cut), options.rounds)
            print(f"{cut:5} {suffix:12.0f} {predicted:13.0f} {predicted / suffix:7.3f} {ran:14}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2048)
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


def measure(project: Project, name: str, rounds: int) -> tuple[float, float, int]:
    """Return samples per second of the suffix alone and of a prediction, and how many samples the prefix ran on."""
    run, source = open_run(project, name), open_source(project.data)
    batches = in_ram(run)
    count = len(run.table)
    states = predict.SharedStates({"": run}, source, project.keys_of(source), Path(f"new-{name}"))
    rates: dict[str, list[float]] = {"suffix": [], "predict": []}
    for round_ in range(rounds + 1):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                run.suffix(batch.state, **batch.inputs)
        middle = time.perf_counter()
        states.reader = project.reader(run.store.path)  # one that has proved no sample's bytes yet
        predict.predict_spans(source, project.keys_of(source), [states], Path("out.parquet"))
        end = time.perf_counter()
        if round_:
            rates["suffix"].append(count / (middle - start))
            rates["predict"].append(count / (end - middle))
    return statistics.median(rates["suffix"]), statistics.median(rates["predict"]), states.done.new[0]


def in_ram(run: FinishedRun) -> list[Batch]:
    table: SampleTable = run.table
    rows = np.array_split(np.arange(len(table)), range(64, len(table), 64))
    return list(Loader(run.store, table.keys, {}, rows))


if __name__ == "__main__":
    main()
