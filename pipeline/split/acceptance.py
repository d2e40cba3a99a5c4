"""The trial that a suffix's fast path must pass before it is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.split.check import tolerance
from pipeline.split.fast import FastPath
from pipeline.split.layout import difference
from pipeline.split.modes import random_state_kept
from pipeline.split.prefix import Prefix
from pipeline.split.sources import Source
from pipeline.split.suffix import Suffix
from pipeline.split.tree import Args, Kwargs, tensors


def take_fast_path(prefix: Prefix, suffix: Suffix, batches: Sequence[tuple[Args, Kwargs]]) -> None:
    """Give `suffix` a fast path if on all `batches`, in eval and in train mode, it does exactly what the phantoms do.

    Same means: outputs, running statistics, and stored tensors left as they are. Otherwise phantoms go on to serve.
    """
    training = suffix.training
    for dense in (False, True):
        fast = FastPath(suffix.root, suffix.cut, suffix.frozen, dense=dense)
        if _passes(prefix, suffix, fast, batches):
            suffix.fast = fast
            break
        fast.remove()
    suffix.train(training)


def _passes(prefix: Prefix, suffix: Suffix, fast: FastPath, batches: Sequence[tuple[Args, Kwargs]]) -> bool:
    for args, kwargs in batches:
        state = prefix(*args, **kwargs)
        for mode in (False, True):
            if not _agrees(suffix.train(mode), fast, suffix.values(state), args, kwargs):
                return False
    return True


def _agrees(suffix: Suffix, fast: FastPath, values: Mapping[Source, Tensor], args: Args, kwargs: Kwargs) -> bool:
    script = fast.script(values, args, kwargs)
    if script is None:
        return False
    with _undone(suffix.root):
        expected = tensors(suffix.replay({source: value.clone() for source, value in values.items()}, args, kwargs))
        buffers = {name: item.clone() for name, item in suffix.root.named_buffers()}
    versions = {source: value._version for source, value in values.items() if source not in suffix.written}
    try:
        with _undone(suffix.root):
            found = tensors(fast.run(script, values, args, kwargs))
            same = _same(expected, found) and _same(buffers, dict(suffix.root.named_buffers()))
    except Exception:  # the model's own code meets dummies: whatever it raises, it needs the phantoms
        return False
    return same and all(values[source]._version == version for source, version in versions.items())


def _same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return expected.keys() == found.keys() and all(
        difference(tensor.detach(), found[name].detach()) <= tolerance(tensor.dtype)
        for name, tensor in expected.items()
    )


@contextmanager
def _undone(root: nn.Module) -> Iterator[None]:
    """Run with a fixed seed, and leave the random state and the buffers of `root` as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    with random_state_kept(root):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, former in buffers:
                    buffer.copy_(former)
