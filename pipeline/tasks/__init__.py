"""Tasks: heads, targets, losses and scores.

Each task has its own module, imported on demand: the libraries of losses and scores are slow to import.
"""

from pipeline.errors import ConfigError
from pipeline.files import load_function
from pipeline.tasks.base import IGNORED, Column, Head, Kind, PredictionContext, Prepared, Ragged, Table, Task
from pipeline.tasks.config import Layers, Pooling, TaskConfig
from pipeline.tasks.scores import Metrics, read_tensor

__all__ = [
    "IGNORED",
    "PredictionContext",
    "Column",
    "Head",
    "Kind",
    "Layers",
    "Metrics",
    "Pooling",
    "Prepared",
    "Ragged",
    "Table",
    "Task",
    "TaskConfig",
    "open_task",
    "read_tensor",
]

_KINDS = {
    "classification": "pipeline.tasks.classification:Classification",
    "multi-label": "pipeline.tasks.multi_label:MultiLabel",
    "regression": "pipeline.tasks.regression:Regression",
    "similarity": "pipeline.tasks.similarity:Similarity",
    "tagging": "pipeline.tasks.tagging:Tagging",
    "answers": "pipeline.tasks.answers:Answers",
    "lm": "pipeline.tasks.lm:LanguageModelling",
    "preference": "pipeline.tasks.preference:Preference",
}


def open_task(config: TaskConfig) -> Task:
    """Return the task that `config` describes; raises ConfigError if a name or an option in it does not exist."""
    task = load_function(_KINDS.get(config.kind, config.kind), "task.kind", "config: TaskConfig")(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task.kind is {config.kind!r}, which returned {type(task).__name__}; expected a Task")
    return task
