"""Tokenizers, and the preprocessing of texts that a head needs with them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.files import PACKAGE, locate
from pipeline.models.config import PreprocessConfig
from pipeline.models.language_texts import LanguagePreprocess
from pipeline.models.texts import SpanPreprocess, TextPreprocess, WordPreprocess, first_line
from pipeline.tasks.base import Head

UNBOUNDED = 1_000_000
"""A tokenizer without a maximum length has a number far above this one."""

PREPROCESS: Mapping[str, type[TextPreprocess]] = {
    "tokens": WordPreprocess,
    "span": SpanPreprocess,
    "language": LanguagePreprocess,
}
"""Preprocessing by the kind of the head; other heads take whole texts."""


def load_tokenizer(source: str, **arguments: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory (of a package, too) or hub repository; raises ConfigError without one."""
    if source.startswith(PACKAGE):
        source = str(locate(source, "preprocess.tokenizer"))
    try:
        usual = {"trust_remote_code": False, "local_files_only": Path(source).is_dir()}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **usual | arguments)
    except (OSError, ValueError, ImportError) as error:
        remedy = "set preprocess.tokenizer"
        raise ConfigError(f"no tokenizer can be loaded from {source} ({first_line(error)}); {remedy}") from error
    if "gguf_file" not in arguments:
        return tokenizer
    with TemporaryDirectory() as folder:  # a store has it as a directory, from which it must be the same
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder)


def make_text_preprocess(
    config: PreprocessConfig,
    model: nn.Module,
    head: Head,
    tokenizer: PreTrainedTokenizerBase | None = None,
    positions: int | None = None,
) -> TextPreprocess:
    """Return the preprocessing of texts for `model`, with the tokenizer of `config` unless one is given.

    `head` decides the kind of content: one or two texts, words (tokens), a question and a text (span), a text, a
    completion or a chat (language). `positions` is the maximum number of tokens of the network, if known.
    """
    if tokenizer is None:
        if config.tokenizer is None:
            raise ConfigError("preprocess.tokenizer is not set; the backbone brings none; set a directory or hub name")
        tokenizer = load_tokenizer(config.tokenizer)
    accepted = inspect.signature(model.forward).parameters
    inputs = tuple(name for name in tokenizer.model_input_names if name in accepted)
    if not inputs:
        raise ConfigError(f"{type(model).__name__}.forward takes none of {', '.join(tokenizer.model_input_names)}")
    if head.kind in PREPROCESS and not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell what its tokens stand for, which the task needs; set "
            "preprocess.tokenizer to the directory of a fast one (with a tokenizer.json)"
        )
    make = PREPROCESS.get(head.kind, TextPreprocess)
    preprocess = make(tokenizer, longest_input(config.max_length, tokenizer, positions), inputs)
    preprocess.refuses_long = config.long_texts == "refuse"
    return preprocess


def longest_input(requested: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int:
    """Return the maximum length in tokens: the `requested` one, or that of the tokenizer.

    Raises ConfigError if neither is known, or more were requested than the network has positions.
    """
    stated = tokenizer.model_max_length if tokenizer.model_max_length < UNBOUNDED else None
    length = requested or stated
    if length is None:
        raise ConfigError(f"preprocess.max_length is not set and the tokenizer states none; set it (up to {positions})")
    if positions is not None and length > positions:
        if requested is None:
            return positions
        raise ConfigError(f"preprocess.max_length is {length}; the backbone has {positions} positions; set fewer")
    return int(length)
