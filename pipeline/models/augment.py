"""Random changes of an image, by the names of torchvision.transforms.v2, repeatable from a seed."""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import v2

from pipeline.errors import BadSampleError

Step: TypeAlias = Mapping[str, Mapping[str, Any]]
"""One transform: {name: arguments}."""

KNOWN: Mapping[str, type[v2.Transform]] = {
    name: kind
    for name, kind in vars(v2).items()
    if inspect.isclass(kind) and issubclass(kind, v2.Transform) and kind is not v2.Transform and name[0] != "_"
}
"""Names allowed in settings; nothing else of torchvision, or of Python, can be reached."""
ENUMS = {"interpolation": v2.InterpolationMode, "policy": v2.AutoAugmentPolicy}
"""Arguments that are written as text and read as a constant."""
INNER = "transforms"
"""The argument of RandomApply, RandomChoice, RandomOrder and Compose that holds transforms itself."""
PROBES = (64, 1024)
"""Sides of the images that transforms are tried on; a crop may ask for more pixels than the first one has."""


class Augment:
    """Transforms, one after the other, as a pure function of an image and a seed. Can be pickled."""

    def __init__(self, steps: Sequence[Step]) -> None:
        """Make the transforms of `steps`; raises ValueError if a name or an argument is wrong."""
        self._transforms = _make_all(steps)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Return `image` (3, H, W), uint8 or float32, changed: (3, H', W') of the same type.

        The transforms draw only from torch's CPU generator, whose state is restored. Raises BadSampleError if one
        cannot be used on this image.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for transform in self._transforms:
                name, before = type(transform).__name__, image
                try:
                    image = transform(before)
                except Exception as error:  # as many faults as there are transforms
                    raise BadSampleError(f"{name} cannot be used on an image {tuple(before.shape)}: {error}") from error
                if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3 or image.dtype != before.dtype:
                    is_tensor = isinstance(image, Tensor)
                    found = f"{tuple(image.shape)} of {image.dtype}" if is_tensor else type(image).__name__
                    raise BadSampleError(f"{name} returns {found}; an image stays (3, H, W) of {before.dtype}")
        return image


def check_steps(steps: Sequence[Step]) -> None:
    """Check the transforms of `steps` on generated images; raises ValueError with the remedy if one does not work."""
    augment, fault = Augment(steps), ""
    for side in PROBES:
        try:
            augment(torch.arange(3 * side * side).remainder(251).to(torch.uint8).view(3, side, side), seed=0)
            return
        except BadSampleError as error:
            fault = str(error)
    raise ValueError(f"{fault}; change its arguments or remove it")


def as_steps(value: object) -> list[object]:
    """Return transforms, however they are written, as a list of {name: arguments}; what is none is left as it is."""
    steps: list[object] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str):
            steps.append({item: {}})
        elif isinstance(item, Mapping):
            steps += [{name: _with_inner_steps(arguments)} for name, arguments in item.items()]
        else:
            steps.append(item)
    return steps


def _with_inner_steps(arguments: object) -> object:
    if isinstance(arguments, Mapping):
        return {name: as_steps(value) if name == INNER else value for name, value in arguments.items()}
    return {} if arguments is None else arguments


def _make_all(steps: Sequence[Step]) -> list[v2.Transform]:
    if not all(
        isinstance(step, Mapping) and all(isinstance(inner, Mapping) for inner in step.values()) for step in steps
    ):
        raise ValueError(f"{steps!r} are no transforms; write each as its name, or as {{name: {{argument: value}}}}")
    return [_make(name, arguments) for step in steps for name, arguments in step.items()]


def _make(name: str, arguments: Mapping[str, Any]) -> v2.Transform:
    if name not in KNOWN:
        near = ", ".join(get_close_matches(name, KNOWN, n=3)) or "none; see its documentation"
        raise ValueError(f"torchvision.transforms.v2 has no transform {name!r} (near: {near}); name one that it has")
    try:
        given = {key: _make_all(value) if key == INNER else value for key, value in arguments.items()}
        given |= {key: ENUMS[key](value) for key, value in given.items() if key in ENUMS and isinstance(value, str)}
        return KNOWN[name](**given)
    except Exception as error:  # each transform checks its arguments in its own way
        takes = ", ".join(inspect.signature(KNOWN[name]).parameters) or "no arguments"
        raise ValueError(f"{name} with {dict(arguments)}: {error}; it takes {takes}") from error
