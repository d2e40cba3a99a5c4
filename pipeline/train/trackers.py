"""Experiment trackers such as TensorBoard, Weights & Biases and MLflow, driven by accelerate."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, tracking

from pipeline.errors import ConfigError
from pipeline.train.config import TrainConfig

PACKAGES = {"comet_ml": "comet-ml"}
"""Packages whose names are not those of their trackers."""
RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
"""Argument of each tracker for the name of the run; the others have none."""


def check_loggers(config: TrainConfig) -> None:
    """Raise ConfigError if a tracker of `train.loggers` is not installed."""
    available = {str(tracker) for tracker in tracking.get_available_trackers()}
    if missing := [name for name in config.loggers if name not in available]:
        packages = " ".join(PACKAGES.get(name, name) for name in missing)
        raise ConfigError(f"train.loggers has {', '.join(missing)}, not installed here: pip install {packages}")


@contextmanager
def tracked(
    accelerator: Accelerator, project: str, run: str, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[None]:
    """Start the trackers of `accelerator` for a run, with its settings as hyperparameters; finish them at the end.

    The run, resumed or not, logs all its figures: local files of an earlier one are removed.
    """
    if accelerator.log_with:
        if accelerator.is_main_process:
            shutil.rmtree(Path(accelerator.logging_dir), ignore_errors=True)
        values = {f"{section}.{name}": value for section, own in settings.items() for name, value in own.items()}
        accelerator.init_trackers(
            project,
            config={"run": run} | {name: _plain(value) for name, value in values.items()},
            init_kwargs={tracker: {argument: run} for tracker, argument in RUN_NAME.items()},
        )
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _plain(value: Any) -> int | float | str:
    """Return `value` if every tracker takes it as a hyperparameter, else as JSON."""
    return value if isinstance(value, (int, float, str)) else json.dumps(value)
