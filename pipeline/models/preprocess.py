"""What turns one content into the inputs of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import BadSampleError, ConfigError
from pipeline.keys import JSON

EXTRA = "extra."
"""Begins the names of what a preprocessing knows of a sample that the task needs and the network does not take."""


def network_inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a sample's or a batch's tensors that the network takes: all but the extras."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRA)}


class Preprocess(ABC):
    """A pure function of the content. Can be pickled: worker processes get a copy."""

    @property
    def pad(self) -> dict[str, float]:
        """Value that fills up an input or an extra to the longest of its batch, by name; 0 where not given."""
        return {}

    @abstractmethod
    def __call__(self, content: object) -> dict[str, Tensor]:
        """Return the inputs of one sample by name, without a batch axis, and beside them its extras (int64).

        An extra (`extra.NAME`) is stored with the state as the inputs are, and comes back to the task among the targets
        of a batch, under NAME.

        Raises:
            BadSampleError: the content cannot be used; the message says why.
        """

    def open(self, content: object) -> Any:
        """Do once what all views share (decoding); `begin` continues from it. Raises BadSampleError as `__call__`."""
        return content

    def begin(self, opened: Any) -> dict[str, Tensor]:
        """Do what must be done sample by sample, `finish` the rest; `opened` stays as it is. Raises as `__call__`."""
        return self(opened)

    def excess(self, content: object, sample: dict[str, Tensor]) -> int:
        """Return how many tokens of a text its inputs, `sample`, leave out; 0 where they hold all of the content."""
        return 0

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn what `begin` returned, stacked along a new first axis, into the inputs of a batch, on its device.

        It may write into `batch`. Sample by sample or in a batch, it gives the same values.
        """
        return batch

    def view(self, number: int) -> Preprocess:
        """Return the preprocessing of the augmented view `number`, from 0 on; `open` and `finish` are the plain one's.

        Raises ConfigError if there are no augmented views.
        """
        kind, remedy = type(self).__name__, "remove it, and encode.views"
        raise ConfigError(f"preprocess.augment is for images, and {kind} does not know it; {remedy}")

    @abstractmethod
    def recipe(self) -> Mapping[str, JSON]:
        """Return everything that decides the values of the inputs."""

    def former_recipe(self) -> Mapping[str, JSON]:
        """Return `recipe` as version 0.1.0 gave it, by which stores of that version are known."""
        return self.recipe()

    def advice(self) -> str:
        """Return which settings decide the inputs, and their values: for a network that refuses these inputs."""
        return "compare preprocess, and model.options, with what the network takes"

    def probe_contents(self) -> Sequence[object]:
        """Return fixed contents whose inputs show whether the preprocessing is still the same; none where unknown."""
        return ()

    def save(self, folder: Path) -> None:
        """Write what a network's own library reads of the preprocessing (a tokenizer) to the existing `folder`."""
        return None


class ArrayPreprocess(Preprocess):
    """Hands an array on as it is, in float32."""

    def __init__(self, input_name: str) -> None:
        self.input_name = input_name

    def __call__(self, content: object) -> dict[str, Tensor]:
        if not isinstance(content, np.ndarray):
            raise BadSampleError(f"content is {type(content).__name__}; preprocess.kind array expects an array")
        tensor = torch.from_numpy(np.array(content, np.float32))
        if not tensor.isfinite().all():
            raise BadSampleError("the array holds NaN or infinite values")
        return {self.input_name: tensor}

    def recipe(self) -> Mapping[str, JSON]:
        return {"kind": "array", "input": self.input_name}
