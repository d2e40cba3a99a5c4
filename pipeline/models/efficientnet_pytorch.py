"""Checkpoints of the package efficientnet_pytorch, under the names of timm's networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
EXPANDING = PLAIN | {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def with_timm_names(state: Mapping[str, Tensor], names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return `state` under the `names` of the same network in timm; unchanged if it comes from elsewhere.

    The package counts all blocks (`_blocks.1._expand_conv`), timm the stages and their blocks (`blocks.1.0.conv_pw`).
    """
    blocks = sorted({tuple(map(int, name.split(".")[1:3])) for name in names if name.startswith("blocks.")})
    if "_conv_stem.weight" not in state or not blocks:
        return state
    renamed = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        if layer == "_blocks":
            number, layer, rest = rest.split(".", 2)
            stage, index = blocks[int(number)]
            table = EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else PLAIN
            renamed[f"blocks.{stage}.{index}.{table.get(layer, layer)}.{rest}"] = tensor
        else:
            renamed[f"{OUTER.get(layer, layer)}.{rest}"] = tensor
    return renamed
