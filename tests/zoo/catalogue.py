"""All models of the zoo."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

LISTS = ("torchvision_models", "timm_models", "transformers_models", "language_models", "own_modules")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how it is made, and a batch of a given size for it."""

    group: str
    name: str
    make: Callable[[], nn.Module]
    example: Callable[[int], Any]
    parameters: int = 0
    """How many weights it has, where that is known before it is made: large models must not meet in memory."""
    member: Callable[[], str] = str
    """Which model of the family `name` was made, where the catalogue holds families; told after `make`."""


def entries() -> list[Entry]:
    """Return every model, list by list; the libraries are imported here, no model is made."""
    return [entry for name in LISTS for entry in importlib.import_module(f"zoo.{name}").entries()]
