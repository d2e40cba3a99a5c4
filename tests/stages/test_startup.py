"""What `recycle train` of a classifier needs does not import packages that it does not use."""

import subprocess
import sys

CODE = """
import sys
import torch
import pipeline.workflows.train
from pipeline.tasks import TaskConfig, open_task
scores = open_task(TaskConfig(kind="classification")).metrics()
scores.update(torch.eye(3), {"label": torch.arange(3)})
scores.compute()
print([name for name in ("torchmetrics", "transformers", "matplotlib", "dask", "zarr") if name in sys.modules])
"""


def test_training_a_classifier_imports_no_unused_packages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
