"""A network with a batch of inputs to try it on, from a name or from params.yaml and its data."""

import dataclasses
import logging
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from pipeline.config import check_sections
from pipeline.data import SampleTable, Source, build, open_source
from pipeline.encode.decoding import decode_samples
from pipeline.encode.ragged import pad_batch
from pipeline.errors import ConfigError, DataError
from pipeline.keys import KEY_BYTES
from pipeline.models import ModelConfig, Preprocess, PreprocessConfig, load, network_inputs
from pipeline.precision import as_inputs
from pipeline.project import Project
from pipeline.project.model import LoadedModel
from pipeline.tasks import Head

log = logging.getLogger("recycle")

TOKENS = 128
"""Length of a drawn text, where the network takes as many."""
SIDE = 256
"""Side of a drawn image before it is preprocessed, in pixels."""


@dataclass(frozen=True)
class ProjectData:
    """The model of a project, with its samples and their targets."""

    loaded: LoadedModel
    source: Source
    table: SampleTable
    """Its keys say nothing of contents: reading all of them would take long."""
    rows: np.ndarray
    """Row of the source of each row of the table, (N,) int64."""


@dataclass(frozen=True)
class ModelExample:
    """A network and a batch of its inputs, on the CPU."""

    model: nn.Module
    inputs: dict[str, Tensor]
    data: ProjectData | None = None
    """The model and the samples that the inputs are from; None if the inputs were drawn."""


def from_name(
    backbone: str, weights: str | None, preprocess: Mapping[str, Any], *, classes: int, batch: int
) -> ModelExample:
    """Return a network by its name (`model.backbone`) with a classifier, and a drawn batch.

    `preprocess` has settings of that section of params.yaml. A "module:function" is given images, or texts if their
    length is set, unless it returns a Backbone with its own preprocessing.

    Raises:
        ConfigError: a setting is wrong, or no inputs can be drawn.
        ModelError: the network cannot be built.
    """
    sections: dict[str, Any] = check_sections(
        {"model": {"backbone": backbone, "weights": weights}, "preprocess": preprocess},
        {"model": ModelConfig, "preprocess": PreprocessConfig},
        "cuts",
    )
    if sections["model"].library == "function":
        kind = "text" if "max_length" in preprocess else "image"
        sections["preprocess"] = sections["preprocess"].model_copy(update={"kind": kind})
    return _drawn(sections["model"], sections["preprocess"], classes=classes, batch=batch)


def from_project(
    project: Project, weights: str | None, preprocess: Mapping[str, Any], *, classes: int, batch: int
) -> ModelExample:
    """Return the network of params.yaml, and a batch of its data: samples spread over the data set.

    Where the data cannot be opened, the batch is drawn, and the head is a classifier. `weights` and `preprocess` take
    the place of what params.yaml says.

    Raises:
        ConfigError, ModelError: as `from_name`.
        DataError: the samples cannot be decoded.
    """
    sha256 = project.model.sha256 if weights == project.model.weights else None
    project = dataclasses.replace(
        project,
        model=project.model.model_copy(update={"weights": weights, "sha256": sha256}),
        preprocess=project.preprocess.model_copy(update=dict(preprocess)),
    )
    try:
        source = open_source(project.data)
        # Any keys will do: the table is for the labels alone, of which contents say nothing. They hold the row, twice.
        keys = np.repeat(np.arange(len(source)), KEY_BYTES // 8).view(np.uint8).reshape(-1, KEY_BYTES)
        table = build(source, keys, project.data)
    except (ConfigError, DataError) as error:
        log.warning("%s; so the example is drawn, and %d classes are assumed", error, classes)
        return _drawn(project.model, project.preprocess, classes=classes, batch=batch)
    loaded = LoadedModel.open(project, table)
    preprocessing = loaded.backbone.preprocess
    samples = decode_samples(source, preprocessing, np.linspace(0, len(source) - 1, batch).astype(np.int64))
    if len(samples) < 2:
        raise DataError(f"fewer than 2 of {batch} samples of {project.data.path} can be decoded; see recycle encode")
    data = ProjectData(loaded, source, table, table.keys.view(np.int64)[:, 0])
    inputs = as_inputs(network_inputs(pad_batch(samples, preprocessing.pad)), loaded.backbone.dtype)
    return ModelExample(loaded.backbone.model, inputs, data)


def _drawn(model: ModelConfig, preprocess: PreprocessConfig, *, classes: int, batch: int) -> ModelExample:
    backbone = load(model, preprocess, Head("classes", classes))
    inputs = draw_inputs(backbone.preprocess, batch, preprocess.max_length or TOKENS)
    return ModelExample(backbone.model, as_inputs(inputs, backbone.dtype))


def draw_inputs(preprocess: Preprocess, batch: int, tokens: int) -> dict[str, Tensor]:
    """Return the inputs of `batch` drawn images, or of texts of so many tokens.

    Raises:
        ConfigError: it is not known what contents look like.
    """
    rng = np.random.default_rng(0)
    recipe = preprocess.recipe()
    if recipe.get("kind") == "image":
        contents: list[Any] = list(rng.integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8))
    elif recipe.get("kind") == "audio":
        contents = list(rng.standard_normal((batch, int(str(recipe["rate"]))), np.float32))
    elif recipe.get("kind") == "text":
        contents = [" ".join(words) for words in rng.choice(list(string.ascii_lowercase), (batch, tokens))]
    else:
        raise ConfigError(
            f"inputs of {type(preprocess).__name__} cannot be drawn: only data shows what they look like; "
            "describe model and data in params.yaml, and run without the name of a model"
        )
    samples = [preprocess(content) for content in contents]
    if recipe.get("kind") == "text":  # a letter is a token at least, and the tokenizer adds its own
        samples = [{name: ids[:tokens] for name, ids in sample.items()} for sample in samples]
    return pad_batch(samples, preprocess.pad)
