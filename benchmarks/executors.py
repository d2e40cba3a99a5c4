"""Executors of encode against each other: how fast each is, and that all store the same bytes.

The samples are images of noise, and the prefix is most of the work. Each worker has one thread. A rate counts from the
first part that is told of to the last, so that starting processes and building models is not in it; the whole takes
longer, and is shown beside it.

    python benchmarks/executors.py                                  # one process, and two
    python benchmarks/executors.py --executor '{kind: slurm, jobs: 2}' --executor '{kind: dask, address: "tcp://..."}'
"""

import argparse
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline.data import DataConfig, Row, Source
from pipeline.encode.unit import EncodeResult, Outcome
from pipeline.memory import keep_freed_memory
from pipeline.project import Project
from pipeline.workflows.encode import encode_project

HERE = Path(__file__).parent
EXECUTORS = ("{}", "{kind: local, processes: 2}")


class Noise(Source):
    """Images of noise, 96 x 96."""

    def __init__(self, config: DataConfig) -> None:
        self.count: int = config.options["count"]

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return Row(f"image {i}", None, {"label": "ab"[i % 2]})

    def content(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, (96, 96, 3), np.uint8)


def settings(samples: int, executor: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"source": "executors:Noise", "options": {"count": samples}},
        "model": {"backbone": "torchvision:resnet18", "weights": None},
        "preprocess": {"image_size": 96},
        "task": {"kind": "classification"},
        "encode": {"cuts": [0.75], "segment_samples": 64, "workers": 0, "executor": executor},
    }


def measure(samples: int, executor: dict[str, Any]) -> tuple[float, float, dict[str, bytes]]:
    """Encode in a new folder; return the rate in samples per second, the whole time, and the files."""
    told: list[tuple[float, int]] = []
    add = EncodeResult.add

    def timed(self: EncodeResult, outcome: Outcome, source: Source) -> None:
        told.append((time.perf_counter(), len(outcome.part.rows)))
        add(self, outcome, source)

    before = Path.cwd()
    with tempfile.TemporaryDirectory(dir=before) as folder:
        os.chdir(folder)
        try:
            Path("params.yaml").write_text(yaml.safe_dump(settings(samples, executor)))
            EncodeResult.add = timed  # type: ignore[method-assign]
            start = time.perf_counter()
            encode_project(Project.load(Path("params.yaml")))
            whole = time.perf_counter() - start
            root = Path("data/activations")
            files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        finally:
            EncodeResult.add = add  # type: ignore[method-assign]
            os.chdir(before)
    return sum(count for _, count in told[1:]) / (told[-1][0] - told[0][0]), whole, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--executor", action="append", help="as encode.executor; may be given several times")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    torch.set_num_threads(1)
    keep_freed_memory()  # as `recycle` does
    logging.basicConfig(format="    %(message)s")
    logging.getLogger("recycle").setLevel(logging.INFO)  # tells the rate of each worker
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    expected: dict[str, bytes] | None = None
    for text in options.executor or EXECUTORS:
        rate, whole, files = measure(options.samples, yaml.safe_load(text))
        expected = expected or files
        same = "the same bytes" if files == expected else "OTHER BYTES"
        print(f"{text:<40} {rate:8.1f} samples/s  {whole:6.1f} s in all  {len(files):5} files, {same}", flush=True)


if __name__ == "__main__":
    main()
