"""A source may raise anything, or kill the process that reads it: the sample is set aside, or the run is ended."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from encoded import ARRAYS, encode, quarantine, stored
from torch.utils.data import get_worker_info

from pipeline.data import DataConfig, Row, Source
from pipeline.errors import BadSampleError
from pipeline.store import Store

pytestmark = pytest.mark.slow


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Panic(BaseException):
    """Such as a library in Rust raises: no `Exception`."""


class Troubled(Source):
    """Arrays, some of which raise in their content, one in its row, and one that is nothing."""

    def __init__(self, config: DataConfig) -> None:
        self.faults: dict[int, BaseException] = {
            1: ValueError("two\nlines"),
            2: UnprintableError(),
            3: RuntimeError(),
            4: Panic("at the disk"),
            5: MemoryError(),
            6: BadSampleError("a hole: here"),
            7: OSError("long " * 1000),
        }

    def __len__(self) -> int:
        return 20

    def row(self, i: int) -> Row:
        if i == 8:
            raise KeyError("label")
        return Row(f"shot {i}", None, {"label": tiny.CLASSES[i % 3]})

    def content(self, i: int) -> np.ndarray:
        if i in self.faults:
            raise self.faults[i]
        if i == 9:
            return None  # type: ignore[return-value]
        return np.full((3, 8, 8), -1.0 if i in (10, 11) else i + 1.0, np.float32)


def test_a_source_may_raise_anything(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {"source": f"{__name__}:Troubled", "path": None}
    model = {"backbone": "tiny:logarithmic"}
    assert encode(folder, data=data, model=model, preprocess=ARRAYS).exit_code == 3
    found = quarantine(folder)
    reasons = {int(row["row"]): row["reason"] for row in found.values()}
    assert reasons.pop(7) == "OSError: " + ("long " * 1000)[: 300 - len("OSError: ")] + "..."
    assert reasons == {
        1: "ValueError: two lines",
        2: "UnprintableError: its message cannot be printed",
        3: "RuntimeError",
        4: "Panic: at the disk",
        5: "MemoryError",
        6: "a hole: here",
        8: "KeyError: 'label'",
        9: "TypeError: object of type 'NoneType' has no len()",
        10: "its state holds NaN or infinity",
        11: "its state holds NaN or infinity",
    }
    assert found["row 8"]["traceback"].startswith("test_bad_sources.py:")
    assert " row < keying.py:" in found["row 8"]["traceback"]
    assert found["shot 4"]["traceback"].startswith("test_bad_sources.py:")
    assert [found[f"shot {i}"]["key"] != "" for i in (4, 10, 11)] == [False, True, True]
    assert found["shot 10"]["traceback"] == ""
    assert stored(folder) == 9
    assert "2 x its state holds NaN or infinity (first: shot 10), 1 x ValueError (first: shot 1)" in caplog.text


class Deadly(Source):
    """Arrays; one of them kills the worker process that reads it."""

    def __init__(self, config: DataConfig) -> None:
        self.deadly: int = config.options["deadly"]

    def __len__(self) -> int:
        return 40

    def row(self, i: int) -> Row:
        return Row(f"shot {i}", None, {"label": tiny.CLASSES[i % 3]})

    def content(self, i: int) -> np.ndarray:
        if i == self.deadly and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((3, 8, 8), i + 1.0, np.float32)


def test_a_worker_that_dies_is_told_and_nothing_is_lost(folder: Path) -> None:
    """In a process of its own: torch may raise in the midst of the standard library, which then warns."""

    def run(**settings: object) -> tuple[int, str]:
        data = {"source": f"{__name__}:Deadly", "path": None, "options": {"deadly": 39}}
        sizes: dict[str, Any] = {"cuts": [0.5], "batch_size": 2, "segment_samples": 2}
        tiny.write_params(folder, data=data, preprocess=ARRAYS, encode=sizes | settings)
        process = tiny.recycle(folder, "encode")
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    code, said = run(workers=1)
    assert code == 1, said
    assert "encode.workers is 1, and one of these processes died (DataLoader worker (pid" in said
    assert "Set fewer workers" in said
    committed = tiny.files(folder / "data/activations")
    assert len(Store.open(folder / "data/activations/0.5").keys()) >= 20
    assert run(workers=0)[0] == 0
    assert stored(folder) == 40
    assert committed.items() < tiny.files(folder / "data/activations").items()
