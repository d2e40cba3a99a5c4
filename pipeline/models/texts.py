"""Texts -> token ids, by the tokenizer of a Hugging Face directory; no padding, that is the batch's affair."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import BadSampleError, ConfigError
from pipeline.files import PACKAGE, locate
from pipeline.keys import JSON, digest
from pipeline.models.config import PreprocessConfig
from pipeline.models.preprocess import Preprocess

UNBOUNDED = 1_000_000
"""A tokenizer that states no longest input gives a number far above this."""


class TextPreprocess(Preprocess):
    """A text, or a text and its partner -> `input_ids`, `attention_mask`, ... (T,) int64."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, inputs: tuple[str, ...]) -> None:
        self.tokenizer, self.max_length, self.inputs = tokenizer, max_length, inputs
        self._digest = tokenizer_digest(tokenizer)

    def __call__(self, content: object) -> dict[str, Tensor]:
        texts = content if isinstance(content, tuple) else (content,)
        if not all(isinstance(text, str) for text in texts):
            raise BadSampleError(f"content is {type(content).__name__}; expected a text or two")
        if not all(str(text).strip() for text in texts):
            raise BadSampleError("the text is empty")
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        return {name: torch.tensor(encoded[name], dtype=torch.int64) for name in self.inputs}

    def excess(self, content: object, sample: dict[str, Tensor]) -> int:
        """Return by how many tokens a text is longer than `max_length`."""
        if len(sample[self.inputs[0]]) < self.max_length:
            return 0
        texts = content if isinstance(content, tuple) else (content,)
        return len(self.tokenizer(*texts, verbose=False)[self.inputs[0]]) - self.max_length

    @property
    def pad(self) -> dict[str, float]:
        """Value that fills up an input, by input name."""
        values = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {name: values.get(name) or 0 for name in self.inputs}

    def recipe(self) -> Mapping[str, JSON]:
        return {
            "kind": "text",
            "inputs": list(self.inputs),
            "max_length": self.max_length,
            "tokenizer": self._digest,
        }

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(source: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory (of a package, too) or hub repository.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    if source.startswith(PACKAGE):
        source = str(locate(source, "preprocess.tokenizer"))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, **{"trust_remote_code": False, "local_files_only": Path(source).is_dir()} | arguments
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"no tokenizer can be loaded from {source} ({_first_line(error)}); set preprocess.tokenizer"
        ) from error
    return tokenizer


def make_text_preprocess(
    config: PreprocessConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    positions: int | None = None,
) -> TextPreprocess:
    """Return what makes the inputs of `model` from a text, with the tokenizer of `config` unless one is given.

    `positions` is how many tokens the network can tell apart, where it is known.
    """
    if tokenizer is None:
        if config.tokenizer is None:
            raise ConfigError("preprocess.tokenizer is not set; the backbone brings none; set a directory or hub name")
        tokenizer = load_tokenizer(config.tokenizer)
    accepted = inspect.signature(model.forward).parameters
    inputs = tuple(name for name in tokenizer.model_input_names if name in accepted)
    if not inputs:
        raise ConfigError(f"{type(model).__name__}.forward takes none of {', '.join(tokenizer.model_input_names)}")
    return TextPreprocess(tokenizer, longest_input(config.max_length, tokenizer, positions), inputs)


def longest_input(asked: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int:
    """Return the longest input in tokens: what was asked for, or what the tokenizer states.

    Raises:
        ConfigError: neither says, or it was asked for more than the network has positions.
    """
    stated = tokenizer.model_max_length if tokenizer.model_max_length < UNBOUNDED else None
    length = asked or stated
    if length is None:
        raise ConfigError(f"preprocess.max_length is not set and the tokenizer states none; set it (up to {positions})")
    if positions is not None and length > positions:
        if asked is None:
            return positions
        raise ConfigError(
            f"preprocess.max_length is {length}; the backbone has {positions} positions; set at most that"
        )
    return int(length)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of all that decides the ids of a text, but for the longest input."""
    if not tokenizer.is_fast:
        return digest({"class": type(tokenizer).__name__, "vocabulary": dict(tokenizer.get_vocab())})
    # Truncation and padding are settings of the last call, not of the tokenizer.
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return digest(state)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
