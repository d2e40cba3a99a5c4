"""Heads of Hugging Face's networks: the class that has one, the names of its outputs, and their order."""

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel

from pipeline.errors import ModelError, first_few
from pipeline.models.config import ModelConfig
from pipeline.models.weights import CheckpointLayout
from pipeline.tasks.base import Head

HEADS = {
    "classes": {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
        "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    },
    "tokens": {"AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"},
    "span": {"AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING"},
    "language": {"AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING"},
}
"""Kind of the head -> the library's classes that have it, each with its mapping from the configurations it is for."""
GENERIC = re.compile(r"LABEL_\d+")
"""Hugging Face's default names of outputs."""


def label_settings(head: Head) -> dict[str, Any]:
    """Return the settings for the number and the names of the outputs."""
    if head.kind in ("embedding", "language"):
        return {}
    problem = {} if head.problem is None else {"problem_type": head.problem}
    if not head.labels:
        return problem | {"num_labels": 2 if head.kind == "span" else head.size}  # a span: where it starts, and ends
    numbers = {label: number for number, label in enumerate(head.labels)}
    return problem | {"id2label": {number: label for label, number in numbers.items()}, "label2id": numbers}


def auto_class(settings: Any, config: ModelConfig, head: Head) -> Any:
    """Return the library's class for networks of `settings` with this head; raises ModelError if there is none."""
    if head.kind == "embedding":
        return AutoModel
    custom_classes = getattr(settings, "auto_map", None) or {}  # classes of the repository's own code
    for name, mapping in HEADS[head.kind].items():
        if type(settings) in getattr(transformers, mapping) or name in custom_classes:
            return getattr(transformers, name)
    raise ModelError(
        f"{config.backbone}: the library has no {' or '.join(HEADS[head.kind])} of {settings.model_type}, which the "
        "task needs; choose another backbone or another task"
    )


def arrange_head(
    model: Any, names: Sequence[str], head: Head, build: Callable[[Any], nn.Module], fresh: frozenset[str]
) -> tuple[frozenset[str], str | None]:
    """Put the outputs of a checkpoint's own head, called `names`, in the order of the task's labels.

    If the labels are others, `build` initialises a new head. A head that is `fresh` (not from a file), or whose outputs
    have no names, stays as it is. Returns the names of fresh tensors, and a remark on what was done.
    """
    if not head.labels or len(names) != len(head.labels) or tuple(names) == head.labels:
        return fresh, None
    sizes = classifier_layout(model, build).sizes
    if sizes.keys() & fresh or all(GENERIC.fullmatch(name) for name in names):
        return fresh, None
    places = {name: number for number, name in enumerate(names)}
    tensors, known = model.state_dict(), places.keys() == set(head.labels)
    drawn = {} if known else build(copy.deepcopy(model.config)).state_dict()
    for name, axis in sizes.items():
        order = torch.tensor([places.get(label, 0) for label in head.labels])
        tensors[name].copy_(tensors[name].index_select(axis, order) if known else drawn[name])
    theirs, ours = first_few(names), first_few(head.labels)
    message = f"the checkpoint's head is for {theirs}, in this order; the task's labels are {ours}"
    if known:
        return fresh, f"{message}: its outputs were put in their order"
    return fresh | sizes.keys(), f"{message}: so the head is new"


def classifier_layout(model: Any, build: Callable[[Any], nn.Module]) -> CheckpointLayout:
    """Return which tensors of `model` are its classifier's; `build` makes a network of a configuration."""
    return CheckpointLayout.of(lambda size: build(_sized(model.config, size)))


def _sized(settings: Any, size: int) -> Any:
    sized = copy.deepcopy(settings)
    sized.num_labels = size
    return sized
