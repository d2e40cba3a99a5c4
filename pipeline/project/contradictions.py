"""Settings of several sections of params.yaml that contradict each other."""

from pipeline.data import ROLES, DataConfig
from pipeline.encode.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.files import is_function
from pipeline.project.tower_config import TowersConfig
from pipeline.store import check_url
from pipeline.tasks import TaskConfig
from pipeline.tracked import SCHEME as TRACKED
from pipeline.tracked import Place
from pipeline.train.config import TrainConfig


def contradictions(
    data: DataConfig,
    task: TaskConfig,
    encode: EncodeConfig,
    train: TrainConfig,
    towers: TowersConfig,
    is_augmented: bool,
) -> list[str]:
    """Return one line for each contradiction; `is_augmented` says whether any preprocessing has an `augment`."""
    return [
        *_of_store(encode),
        *_of_views(encode, train, is_augmented),
        *_of_batches(data, task, train),
        *_of_texts(data, task),
        *_of_towers(data, task, towers),
    ]


def _of_store(encode: EncodeConfig) -> list[str]:
    """Return why `encode.store` cannot hold stores."""
    if encode.store is None:
        return ["encode.store_options is set, but encode.store is not"] if encode.store_options else []
    try:
        if encode.store.startswith(TRACKED):
            Place.of(encode.store)
        else:
            check_url(encode.store, encode.store_options)
    except ConfigError as error:
        return [f"encode.store: {error}"]
    return []


def _of_views(encode: EncodeConfig, train: TrainConfig, is_augmented: bool) -> list[str]:
    """Return contradictions between the settings of views."""
    faults = []
    if is_augmented and encode.views is None:
        faults.append(
            "preprocess.augment is set, but encode.views is not: each sample is encoded once, and its state cannot "
            "change from epoch to epoch; set encode.views to the number of views to store (such as 4), or remove "
            "preprocess.augment"
        )
    if encode.views is not None and not is_augmented:
        faults.append(
            f"encode.views is {encode.views}, but preprocess.augment is not set: all views would be equal; "
            "set preprocess.augment, or remove encode.views"
        )
    if encode.views is None and train.views != "cycle":
        faults.append(f"train.views is {train.views!r}, but there are no views; set encode.views, or remove it")
    return faults


def _of_batches(data: DataConfig, task: TaskConfig, train: TrainConfig) -> list[str]:
    """Return where a loss has nothing to compare."""
    if task.kind != "similarity":
        return []
    faults = []
    if train.batch_size == 1 and task.memory is None:
        faults.append(
            "train.batch_size is 1: one pair, or one label, per step leaves nothing to tell it from; set 2 or "
            "more, or task.memory"
        )
    from pipeline.tasks.losses import choose  # noqa: PLC0415 (slow to import, and few projects need it)

    if data.source == "pairs" and choose("loss", task.loss, task.distance).compares != "pairs":
        faults.append(f"task.loss is {task.loss!r}, which needs labels; for pairs set another loss")
    return faults


def _of_texts(data: DataConfig, task: TaskConfig) -> list[str]:
    """Return where the samples of a source are of no use to the task."""
    if is_function(task.kind) or is_function(data.source):
        return []
    if task.kind == "preference":
        needs = "task preference needs two answers; set data.chosen and data.rejected of source completions or chat"
        return [f"data.chosen is not set; {needs}"] if data.chosen is None else []
    if data.chosen is not None:
        return [f"data.chosen is {data.chosen!r}, for task preference; set task.kind to it, or remove the field"]
    return [] if task.kind == "lm" else _of_labelled_texts(data, task)


def _of_labelled_texts(data: DataConfig, task: TaskConfig) -> list[str]:
    if data.source in ("completions", "chat"):
        return [f"data.source is {data.source!r}, for language models; set task.kind to lm, or another source"]
    if data.source == "text" and data.labelled and data.label is None:
        return [f"data.label is not set; task {task.kind} needs it; name the field, or set task.kind to lm"]
    return []


def _of_towers(data: DataConfig, task: TaskConfig, towers: TowersConfig) -> list[str]:
    """Return where towers have nothing to do."""
    if not towers.is_set:
        return []
    faults = []
    if task.kind != "similarity":
        faults.append(f"task.kind is {task.kind!r}; towers embed pairs: set similarity, or remove towers")
    if not (data.source == "pairs" or is_function(data.source)):
        faults.append(
            f"data.source is {data.source!r}; towers embed the anchors and the positives of pairs: set pairs, "
            "or a module:function whose samples have roles, or remove towers"
        )
    if not any(towers.of(role).trains for role in ROLES):
        faults.append("towers: none trains; set trains: true for one")
    return faults
