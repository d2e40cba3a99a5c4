"""The trial that a suffix's fast path must pass before it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.split.check import tolerance
from pipeline.split.fast import FastPath
from pipeline.split.layout import difference
from pipeline.split.modes import random_state_kept
from pipeline.split.prefix import State
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, tensors


@dataclass(frozen=True)
class Trial:
    """A batch with its state, and what the full model returns for it in eval mode."""

    args: Args
    kwargs: Kwargs
    state: State
    expected: Any


def take_fast_path(suffix: Suffix, trials: Sequence[Trial]) -> None:
    """Give `suffix` a fast path if it does exactly what it should: else phantoms go on to serve.

    On every trial in eval mode it must return what the full model does; on the first one, in train mode, what the
    phantoms do. Running statistics must come out the same, and stored tensors must be left as they are.
    """
    training = suffix.training
    for fills, dense in itertools.product((False, True), repeat=2):
        fast = FastPath(suffix.root, suffix.cut, suffix.frozen, dense=dense, fills=fills)
        if _passes(suffix, fast, trials):
            suffix.fast = fast
            break
        fast.remove()
    suffix.train(training)


def _passes(suffix: Suffix, fast: FastPath, trials: Sequence[Trial]) -> bool:
    suffix.eval()
    with torch.no_grad():
        if not all(_agrees(suffix, fast, trial) for trial in trials):
            return False
    return _agrees(suffix.train(), fast, trials[0])


def _agrees(suffix: Suffix, fast: FastPath, trial: Trial) -> bool:
    values = suffix.values(trial.state)
    if fast.script(values, trial.args, trial.kwargs) is None:
        return False
    with _undone(suffix.root):
        expected = tensors(_replayed(suffix, trial) if suffix.training else trial.expected)
        buffers = {name: item.clone() for name, item in suffix.root.named_buffers()}
    stored = {source: value.clone() for source, value in values.items() if source not in suffix.written}
    try:
        with _undone(suffix.root):
            begun = fast.begin(values, trial.args, trial.kwargs)
            found = tensors(fast.run(*begun)) if begun is not None else {}
            same = _same(expected, found) and _same(buffers, dict(suffix.root.named_buffers()))
    except Exception:  # the model's own code meets dummies: whatever it raises, it needs the phantoms
        return False
    return same and all(torch.equal(values[source], value) for source, value in stored.items())


def _replayed(suffix: Suffix, trial: Trial) -> Any:
    values = {source: value.clone() for source, value in suffix.values(trial.state).items()}
    return suffix.replay(values, trial.args, trial.kwargs)


def _same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return expected.keys() == found.keys() and all(
        difference(tensor.detach(), found[name].detach()) <= tolerance(tensor.dtype)
        for name, tensor in expected.items()
    )


@contextmanager
def _undone(root: nn.Module) -> Iterator[None]:
    """Run with a fixed seed, and leave the random state and the buffers of `root` as they were.

    A module may write into its buffer, or put another tensor in its place.
    """
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with random_state_kept(root):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, former in buffers:
                    module._buffers[name] = buffer.copy_(former)
