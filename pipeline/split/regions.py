"""Blocks that run in a way of their own: recomputed in the backward pass, or compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from pipeline.split.cut import Output
from pipeline.split.prefix import Prefix
from pipeline.split.replay import Stub
from pipeline.split.suffix import Suffix

SHAPES = 4
"""Kinds of inputs for which a block is compiled at most, on average."""


class Recomputed:
    """A module's `forward` whose intermediate values are computed again in the backward pass, not kept (checkpointing).

    Random numbers are drawn again from the same state.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


def recompute_blocks(suffix: Suffix) -> int:
    """Let `suffix` recompute its blocks in the backward pass; return their number. It computes the same values.

    A block stays as it is if it holds the cut, is a single layer, or normalises by statistics of batches, which it
    would count twice.
    """
    count = 0
    for path in suffix.plan.blocks:
        block: Any = suffix.get_submodule(path)
        is_whole = path in suffix.plan.after and not suffix.frozen.lacks(block)
        is_layer = next(block.children(), None) is None
        if not is_whole or is_layer or any(keeps_statistics(module) for module in block.modules()):
            continue
        count += 1
        # At the cut, what `forward` is given is incomplete: the stub there stays outside.
        holder = block.forward if isinstance(block.forward, Stub) else block
        if not isinstance(holder.forward, Recomputed):
            holder.forward = Recomputed(holder.forward)
    return count


def keeps_statistics(module: nn.Module) -> bool:
    """Return whether `module` normalises by statistics of batches, and keeps their running mean."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def compile_blocks(prefixes: Sequence[Prefix]) -> int:
    """Compile the blocks of the common model of `prefixes` that run before a cut, in place; return their number.

    A block that holds a cut, or a tensor that crosses one, is not compiled.
    """
    model = prefixes[0].model
    observed = {prefix.cut.path for prefix in prefixes}
    observed |= {slot.source.path for prefix in prefixes for slot in prefix.slots if isinstance(slot.source, Output)}
    before = {path for prefix in prefixes for path, _ in prefix.modules()}
    chosen = [
        path
        for path in prefixes[0].blocks
        if path in before and not any(inner.startswith(f"{path}.") for inner in observed)
    ]
    from torch._dynamo import config  # noqa: PLC0415  (imports the compiler)

    compiler: Any = config
    # Blocks of one class share a limit, beyond which the others would run as they are.
    compiler.recompile_limit = max(compiler.recompile_limit, SHAPES * len(chosen))
    for path in chosen:
        block: Any = model.get_submodule(path)
        if not hasattr(block.forward, "_torchdynamo_orig_callable"):  # else it is compiled already
            block.forward = torch.compile(block.forward)
    return len(chosen)
