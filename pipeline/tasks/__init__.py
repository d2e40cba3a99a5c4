"""What is learnt: heads, targets, losses and scores.

Each task has its own module, imported when it is asked for: the libraries of losses and scores are slow to import.
"""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.files import load_function
from pipeline.tasks.base import Asked, Column, Head, Kind, Metrics, Table, Task, read_tensor
from pipeline.tasks.config import TaskConfig

__all__ = ["Asked", "Column", "Head", "Kind", "Metrics", "Table", "Task", "TaskConfig", "open_task", "read_tensor"]


def open_task(config: TaskConfig) -> Task:
    """Return the task that `config` describes.

    Raises:
        ConfigError: it names a loss, miner or function that does not exist, or options they do not take.
    """
    if config.kind == "classification":
        from pipeline.tasks.classification import Classification  # noqa: PLC0415

        return Classification(config)
    if config.kind == "similarity":
        from pipeline.tasks.similarity import Similarity  # noqa: PLC0415

        return Similarity(config)
    if config.kind == "multi-label":
        from pipeline.tasks.multi_label import MultiLabel  # noqa: PLC0415

        return MultiLabel(config)
    if config.kind == "regression":
        from pipeline.tasks.regression import Regression  # noqa: PLC0415

        return Regression(config)
    task = load_function(config.kind, "task.kind")(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task.kind is {config.kind!r}, which returned {type(task).__name__}; expected a Task")
    return task
