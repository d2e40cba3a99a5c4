"""Arrays that end the process that reads them, where a file says so; for the workers of an encode alone."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import tiny

from pipeline.data import DataConfig, Row, Source

ONCE, ALWAYS, SLOW = "once", "always", "slow"
"""Names of files in the project's folder: ONCE-<row>, ALWAYS-<row>, and SLOW, which makes every row take its time."""


class Perilous(Source):
    def __init__(self, config: DataConfig) -> None:
        self.rows: int = config.options["rows"]

    def __len__(self) -> int:
        return self.rows

    def row(self, i: int) -> Row:
        return Row(f"row {i}", None, {"label": tiny.CLASSES[i % 3]})

    def content(self, i: int) -> np.ndarray:
        has_begun = any(Path(".recycle/jobs").glob("*/marks/*"))  # before that the coordinator makes keys
        if has_begun and Path(SLOW).exists():
            time.sleep(0.2)
        if has_begun and Path(f"{ALWAYS}-{i}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if has_begun and Path(f"{ONCE}-{i}").exists():
            Path(f"{ONCE}-{i}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.random.default_rng(i).random((3, 8, 8), np.float32)


def settings(rows: int, **executor: object) -> dict[str, dict[str, object]]:
    """Changes to the sections of `tiny.write_params`: units of four rows, at two cuts."""
    return {
        "data": {"source": f"{__name__}:Perilous", "path": None, "options": {"rows": rows}, "validation": 0.0},
        "preprocess": {"kind": "array", "image_size": None},
        "encode": {"cuts": [0.5, 1.0], "batch_size": 2, "segment_samples": 4, "executor": executor},
    }
