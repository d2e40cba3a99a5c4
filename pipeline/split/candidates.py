"""The places where a model can be cut, and the cost of the layers before and after each: timed, and as predicted."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.errors import SplitError
from pipeline.split.blocks import boundaries, find_blocks, resolve
from pipeline.split.cut import Cut
from pipeline.split.forward import Trace, eval_run, observed_calls, synchronise, trace
from pipeline.split.layout import batch_size, regroup
from pipeline.split.plan import make_plan
from pipeline.split.splittable import check_model
from pipeline.split.splitting import prove_state, read_example
from pipeline.split.tree import Args, Kwargs

REPEATS = 5


@dataclass(frozen=True)
class Candidate:
    """A possible cut, with its costs.

    Attributes:
        cut: the place.
        flops: floating-point operations of one sample's forward pass before it: matrix products, convolutions and
            attention, as `torch.utils.flop_counter` counts them.
        flops_after: those after it.
        parameters: how many parameters the prefix freezes; None where the cut is refused.
        state_bytes: size of one sample's state, stored in 16 bits per number, at the example's lengths; None where the
            cut is refused.
        refused: why the model cannot be split there, or None.
    """

    cut: Cut
    flops: int
    flops_after: int
    parameters: int | None = None
    state_bytes: int | None = None
    refused: str | None = None


def candidates(model: nn.Module, example: Any) -> list[Candidate]:
    """Return the block boundaries where `model` can be cut, in execution order, from the inputs to the head.

    Each is planned and its state proved as by `split`; refused ones are listed with the reason.

    Raises:
        InputRefusedError: the model's own code fails on the example.
        SplitError: the example holds no batch of at least 2 samples, or the model cannot be split anywhere.
    """
    check_model(model)
    args, kwargs = read_example(example)
    seen = trace(model, args, kwargs)
    cuts = boundaries(model, seen.calls, find_blocks(model, seen.calls))
    counted = _count_flops(model, cuts, args, kwargs)
    found = []
    for cut, flops in zip(tqdm(cuts, desc="cuts", disable=None), counted, strict=True):
        try:
            found.append(Candidate(cut, *flops, *_sizes(model, cut, seen, args, kwargs)))
        except SplitError as error:
            found.append(Candidate(cut, *flops, refused=str(error)))
    return found


def places(model: nn.Module, cuts: Sequence[float | str], example: Any) -> list[Cut]:
    """Return the place in `model` that each of `cuts` names, as `split` takes them; nothing is proved.

    Raises:
        NoSuchCutError: one names no place in the model.
    """
    args, kwargs = read_example(example)
    seen = trace(model, args, kwargs)
    blocks = find_blocks(model, seen.calls)
    return [resolve(model, at, seen.calls, blocks) for at in cuts]


def flops_around(model: nn.Module, cuts: Sequence[Cut], example: Any) -> list[tuple[int, int]] | None:
    """Return the operations per sample of a forward pass before and after each of `cuts`; None if uncountable."""
    args, kwargs = read_example(example)
    try:
        return _count_flops(model, cuts, args, kwargs)
    except Exception:  # the network runs; the counter need not be able to follow it
        return None


def _count_flops(model: nn.Module, cuts: Sequence[Cut], args: Args, kwargs: Kwargs) -> list[tuple[int, int]]:
    """Return the operations per sample of one forward pass before and after each of the cuts."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: PLC0415  (imports triton)

    counted: dict[tuple[str, int], int] = {}

    def on_call(path: str, index: int, args: Args, kwargs: Kwargs) -> None:
        counted[path, index] = counter.get_total_flops()

    attention = lambda q, k, v, *_, **__: int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]  # noqa: E731
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    paths = {cut.path for cut in cuts}
    with eval_run(model, args, kwargs), observed_calls(model, on_call, paths=paths), counter:
        model(*args, **kwargs)
    batch = batch_size(args, kwargs)
    total, before = counter.get_total_flops() // batch, [counted[cut.path, cut.call] // batch for cut in cuts]
    return [(flops, total - flops) for flops in before]


def _sizes(model: nn.Module, cut: Cut, seen: Trace, args: Args, kwargs: Kwargs) -> tuple[int, int]:
    """Return how many parameters the prefix freezes, and the bytes of one sample's state."""
    planned = make_plan(model, cut, seen, args, kwargs)
    slots, *_ = prove_state(model, planned, seen.output, (args, kwargs), regroup(args, kwargs))
    weights = dict(model.named_parameters())
    frozen = sum(weights[name].numel() for name in set(planned.plan.frozen.values()))
    return frozen, sum(2 * torch.Size(slot.spec.shape).numel() for slot in slots)


def seconds_per_sample(prefix: Callable[..., object], batch: Mapping[str, Tensor]) -> float:
    """Return the median forward time of `prefix` on `batch` over its samples, after a warm-up."""
    count = max(len(tensor) for tensor in batch.values())
    device = next(iter(batch.values())).device
    times = []
    for _ in range(REPEATS + 1):
        synchronise(device)
        start = time.perf_counter()
        prefix(**batch)
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / count
