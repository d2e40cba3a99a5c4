"""Samples of different lengths in one batch: right padding on the way in, trimming on the way out.

A state is stored without padding. Padded batches are the fast way to compute it, and give the same values only where
the network ignores padding; so whether to pad is decided by trying it on real samples of this data set, never assumed.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Sample: TypeAlias = "dict[str, Tensor]"
"""The inputs of one sample by name, without a batch axis."""

TOLERANCE = 1e-4
"""Largest difference, relative to the state's largest value, that another batch shape may cause in fp32."""


@dataclass(frozen=True)
class Trimming:
    """How the states of a padded batch become states without padding.

    `axes` gives for each ragged state tensor its ragged axis (without the batch axis) and the input whose length it
    has: the size of its first axis (tokens, frames, rows). `pads` is False where the network lets padding leak into a
    state: then only samples of equal shapes share a batch.
    """

    pads: bool = True
    axes: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def __call__(self, state: "Mapping[str, Tensor]", samples: Sequence[Sample]) -> "dict[str, Tensor | list[Tensor]]":
        """Return `state` sample by sample where it is ragged; a tensor of one shape for all stays whole."""
        trimmed: dict[str, Tensor | list[Tensor]] = dict(state)
        for name, (axis, source) in self.axes.items():
            trimmed[name] = [state[name][i].narrow(axis, 0, len(sample[source])) for i, sample in enumerate(samples)]
        return trimmed


def pad_batch(samples: Sequence[Sample], pad: Mapping[str, float]) -> "dict[str, Tensor]":
    """Stack `samples` along a new first axis, padded on the right to the longest with `pad[name]`, or 0."""
    batch = {}
    for name in samples[0]:
        tensors = [sample[name] for sample in samples]
        longest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
        padded = tensors[0].new_full((len(tensors), *longest), pad.get(name, 0))
        for row, tensor in zip(padded, tensors, strict=True):
            row[tuple(slice(n) for n in tensor.shape)] = tensor
        batch[name] = padded
    return batch


def shapes(sample: Sample) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a sample's inputs: samples with equal shapes share a batch without padding."""
    return tuple(tuple(tensor.shape) for tensor in sample.values())


def length(sample: Sample) -> int:
    """Return the number of positions of a sample: the tokens of a text, the frames or values of a sound."""
    return max((len(tensor) for tensor in sample.values() if tensor.dim()), default=1)


def token_count(batch: Sample) -> int:
    """Return the number of tokens of a batch of texts of one length; 0 of anything else."""
    return max((t.numel() for t in batch.values() if t.dim() == 2 and not t.is_floating_point()), default=0)


def batches_by_length(samples: Sequence[Sample], *, size: int, tokens: int | None, pads: bool) -> Iterator[list[int]]:
    """Divide samples into batches of similar length, or of equal shapes unless `pads`; yield their indices.

    A batch has up to `size` samples or, if `tokens` is given, up to so many positions with padding, one sample at
    least.
    """
    order = sorted(range(len(samples)), key=lambda i: (shapes(samples[i]), i))
    for _, group in itertools.groupby(order, lambda i: None if pads else shapes(samples[i])):
        alike = list(group)
        for part in divide_lengths([length(samples[i]) for i in alike], size=size, tokens=tokens):
            yield alike[part]


def divide_lengths(lengths: Sequence[int], *, size: int, tokens: int | None) -> Iterator[slice]:
    """Yield the batches of samples of these lengths, in their order; `size` and `tokens` as in `batches_by_length`."""
    begin = longest = 0
    for end, own in enumerate(lengths):
        longest = max(longest, own)
        full = end - begin == size if tokens is None else (end - begin + 1) * longest > tokens
        if end > begin and full:
            yield slice(begin, end)
            begin, longest = end, own
    if lengths:
        yield slice(begin, len(lengths))


def find_trimming(
    prefix: Callable[..., Sample],
    samples: Sequence[Sample],
    pad: Mapping[str, float],
    *,
    tolerance: float = TOLERANCE,
    run: Callable[[Sequence[Callable[[], Sample]]], Sequence[Sample]] | None = None,
) -> Trimming:
    """Determine, on the shortest and the longest of `samples`, how the states of a padded batch are trimmed.

    The reference is the state of each sample in a batch of one. A state axis that has the length of a ragged input in
    both is cut to that length; if the trimmed state of the shorter sample then differs from the reference, padding
    leaks and is not used. `tolerance` is relative to the state's largest value; `run` makes several calls
    of `prefix`, one after the other if not given.
    """
    from pipeline.split.tree import difference  # noqa: PLC0415  (slow to import, for a command with nothing to do)

    by_size = sorted(samples, key=lambda sample: sum(tensor.numel() for tensor in sample.values()))
    short, long = by_size[0], by_size[-1]
    if shapes(short) == shapes(long):
        return Trimming()
    batches = [pad_batch(some, pad) for some in ([short], [long], [short, long])]
    calls = [partial(prefix, **batch) for batch in batches]
    alone_short, alone_long, together = run(calls) if run else [call() for call in calls]
    axes = {}
    for name, tensor in alone_short.items():
        differing = [a for a, (m, n) in enumerate(zip(tensor.shape, alone_long[name].shape, strict=True)) if m != n]
        if not differing:
            continue
        lengths = tensor.shape[differing[0]], alone_long[name].shape[differing[0]]
        of_lengths = [n for n in short if short[n].dim() and (len(short[n]), len(long[n])) == lengths]
        if len(differing) > 1 or not of_lengths:
            return Trimming(pads=False)
        axes[name] = (differing[0] - 1, of_lengths[0])
    trimming = Trimming(axes=axes)
    padded = trimming(together, [short, long])
    same = all(difference(tensor[0], padded[name][0]) <= tolerance for name, tensor in alone_short.items())
    return trimming if same else Trimming(pads=False)
