"""The params.yaml of a new project, with comments: from a look at its data, or from an example."""

import io
import math
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from pipeline.data import DataProposal
from pipeline.errors import ConfigError

EXAMPLES = "share/layer-recycling/examples"
"""Folder of the examples in an installation, relative to sysconfig's data folder; a checkout has them in examples/."""
TOKENS_PER_WORD = 1.5
LONGEST = 512
"""Largest `preprocess.max_length` that is proposed: the maximum of most encoders of text."""
_TRAIN: dict[str, dict[str, Any]] = {
    "image": {"epochs": 10, "batch_size": 64, "lr": 0.0005, "head_lr": 0.003},
    "text": {"epochs": 5, "batch_size": 32, "lr": 0.0001, "head_lr": 0.001},
    "audio": {"epochs": 10, "batch_size": 32, "lr": 0.0001, "head_lr": 0.001},
}
FEWEST_STEPS, FEWEST_BATCHES = 300, 8
"""Steps of a run, and batches of an epoch, that few samples are to give too, by smaller batches and more epochs."""
SMALLEST_BATCH, MOST_EPOCHS, TRAINING = 8, 40, 0.8
_COMMENTS = {
    "data": {"validation": "share held out where the data set has no validation split"},
    "model": {"backbone": "or torchvision:NAME, timm:NAME, hf:DIRECTORY, hf:HUB/NAME, module:function"},
    "preprocess": {"max_length": "tokens; longer texts are truncated"},
    "task": {"kind": "or classification, multi-label, regression, similarity, tagging, answers, lm"},
    "encode": {"cuts": "shares of the blocks to recycle; add 0, full fine-tuning, to compare; 1.0: head only"},
    "train": {
        "lr": "of pretrained layers after the cut",
        "head_lr": "of the new head",
        "patience": "stop after so many epochs without a better validation score",
    },
}


def propose_params(data: DataProposal, task: str, model: Mapping[str, Any]) -> CommentedMap:
    """Return the sections of params.yaml for a data set, a task (`task.kind`) and the settings of a backbone."""
    length = 384 if task == "answers" else 2 ** math.ceil(math.log2(max(32, data.words * TOKENS_PER_WORD)))
    preprocess = {"max_length": min(LONGEST, length)} if data.content == "text" else {}
    with_layers = {"layers": ["skip"]} if task == "similarity" else {}
    train = _training(data)
    schedule = {"patience": max(3, train["epochs"] // 4), "schedule": "cosine", "warmup": 0.1}
    sections: dict[str, dict[str, Any]] = {
        "data": {**data.settings, "validation": 0.2},
        "model": dict(model),
        "preprocess": preprocess,
        "task": {"kind": task, **with_layers},
        "encode": {"cuts": [0.5, 0.75, 1.0], "batch_size": 64 if data.content == "image" else 32},
        "train": {**train, **schedule},
    }
    params = CommentedMap()
    for name, settings in sections.items():  # also the empty ones, which dvc.yaml names
        params[name] = _commented(settings, _COMMENTS[name])
    params.yaml_set_start_comment("Settings of the pipeline; docs/settings.md of Layer Recycling describes them all.")
    if data.unused:
        params["data"].yaml_add_eol_comment(f"fields that are not used: {', '.join(data.unused)}", "source")
    return params


def _training(data: DataProposal) -> dict[str, Any]:
    """Return epochs, batch size and rates: the usual ones, but for few samples smaller batches and more epochs."""
    usual = _TRAIN.get(data.content, _TRAIN["image"])
    if not data.samples:
        return usual
    training = TRAINING * data.samples
    batch = min(usual["batch_size"], max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, training / FEWEST_BATCHES)))))
    needed = math.ceil(FEWEST_STEPS / math.ceil(training / batch))
    return {**usual, "epochs": min(MOST_EPOCHS, max(usual["epochs"], needed)), "batch_size": batch}


def read_example(name: str) -> CommentedMap:
    """Return the params.yaml of an example, with its comments.

    Raises:
        ConfigError: there is no such example; the message names those that exist.
    """
    folders = [Path(__file__).parents[2] / "examples", Path(sysconfig.get_path("data")) / EXAMPLES]
    known = {file.parent.name: file for folder in reversed(folders) for file in folder.glob("*/params.yaml")}
    if name not in known:
        raise ConfigError(f"--template is {name!r}; the examples are {', '.join(sorted(known)) or 'not installed'}")
    params: CommentedMap = YAML().load(known[name].read_text(encoding="utf-8"))
    return params


def dump_params(params: CommentedMap) -> str:
    """Return the text of params.yaml."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(params, text)
    return text.getvalue()


def _commented(settings: Mapping[str, Any], comments: Mapping[str, str]) -> CommentedMap:
    commented = CommentedMap()
    for name, value in settings.items():
        if isinstance(value, list):
            commented[name] = sequence = CommentedSeq(value)
            sequence.fa.set_flow_style()
        else:
            commented[name] = value
        if name in comments:
            commented.yaml_add_eol_comment(comments[name], name)
    return commented
