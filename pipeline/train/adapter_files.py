"""LoRA as the files of peft: what training added to the weights of a network of transformers, in factors of low rank.

A run keeps plain weights, adapters merged into them. The difference of such a weight from the pretrained one has
the adapter's rank, so a truncated singular value decomposition gives its two factors back.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError

NAME = "default"
RESIDUAL = 1e-3
"""Largest part of a difference, by its norm, that its factors may leave out: rounding of the merged weights."""
MORE, PASSES = 8, 4
"""Further directions, and passes, of the randomised decomposition, which make it exact for such matrices."""


def inject_adapter(network: Any, trained: Mapping[str, Tensor], rank: int) -> nn.Module:
    """Return the peft model of `network`, in place, whose adapters make its weights the `trained` ones, by name.

    Layers that changed in another way, such as a new head, are saved whole.

    Raises:
        ModelError: a layer changed otherwise than by an adapter of this rank, and cannot be saved whole.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (slow to import)
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    factors, whole = dict[str, tuple[Tensor, Tensor]](), set[str]()
    for name, item in network.named_parameters():
        if name not in trained or torch.equal(item.float(), trained[name].float()):
            continue
        path, _, leaf = name.rpartition(".")
        module = network.get_submodule(path)
        found = None
        if leaf == "weight" and isinstance(module, nn.Linear | Conv1D):
            delta = trained[name].float() - item.float()
            found = factorise(delta.T if isinstance(module, Conv1D) else delta, rank)
        if found is None:
            whole.add(path)
        else:
            factors[path] = found
    if "" in whole:
        raise ModelError(
            "the network changed in parameters of its own, which peft's files cannot hold; export it whole"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(factors),
        modules_to_save=sorted(whole) or None,
        fan_in_fan_out=any(isinstance(network.get_submodule(path), Conv1D) for path in factors),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # by peft
        adapted: nn.Module = get_peft_model(network, config)
    inside = dict(network.named_modules())
    with torch.no_grad():
        for path, (first, second) in factors.items():
            layer: Any = inside[path]
            layer.lora_A[NAME].weight.copy_(first)
            layer.lora_B[NAME].weight.copy_(second)
        for path in whole:
            copy: Any = inside[path]
            for name, item in copy.modules_to_save[NAME].named_parameters():
                item.copy_(trained[f"{path}.{name}"])
    return adapted


def factorise(delta: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Return A (rank, in) and B (out, rank) with B @ A = `delta` (out, in); None where it has a higher rank."""
    most = min(delta.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(delta, q=min(most, rank + MORE), niter=PASSES)
    rank = min(rank, most)
    root = sizes[:rank].sqrt()
    first, second = (right[:, :rank] * root).T, left[:, :rank] * root
    if (delta - second @ first).norm() > RESIDUAL * delta.norm():
        return None
    return first.contiguous(), second.contiguous()


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the files of a peft model to the existing `folder`."""
    adapted.save_pretrained(folder)
