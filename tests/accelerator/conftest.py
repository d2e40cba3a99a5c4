import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """The folder with the built accelerator."""
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("the accelerator is built by c++ and ninja, which are not both here")
    folder = request.config.cache.mkdir(f"accelerator-{torch.__version__}-{sys.version_info.minor}")
    started = tiny.python(folder, "-c", "import accelerator.device", ACCELERATOR_BUILD=str(folder))
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    return folder
