"""Losses and miners of pytorch-metric-learning, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_metric_learning import losses, miners
from torch import nn

from pipeline.errors import ConfigError
from pipeline.tasks.config import LABEL_LOSSES

_IN_BATCH = {"temperature": 0.05}  # a scale of 20 on the cosines, as sentence encoders are usually trained

_LOSSES: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "multiple_negatives": (losses.NTXentLoss, _IN_BATCH),
    "ntxent": (losses.NTXentLoss, _IN_BATCH),
    "contrastive": (losses.ContrastiveLoss, {}),
    "triplet_margin": (losses.TripletMarginLoss, {}),
    "multi_similarity": (losses.MultiSimilarityLoss, {}),
    "circle": (losses.CircleLoss, {}),
    "supcon": (losses.SupConLoss, {}),
    "arcface": (losses.ArcFaceLoss, {}),
    "cosface": (losses.CosFaceLoss, {}),
    "normalized_softmax": (losses.NormalizedSoftmaxLoss, {}),
    "proxy_anchor": (losses.ProxyAnchorLoss, {}),
    "soft_triple": (losses.SoftTripleLoss, {}),
    "sub_center_arcface": (losses.SubCenterArcFaceLoss, {}),
}

_MINERS: dict[str, Any] = {
    "angular": miners.AngularMiner,
    "batch_easy_hard": miners.BatchEasyHardMiner,
    "batch_hard": miners.BatchHardMiner,
    "distance_weighted": miners.DistanceWeightedMiner,
    "multi_similarity": miners.MultiSimilarityMiner,
    "pair_margin": miners.PairMarginMiner,
    "triplet_margin": miners.TripletMarginMiner,
}


def make_loss(name: str, options: Mapping[str, Any], *, labels: int = 0, width: int = 0) -> nn.Module:
    """Return the loss `name`; one that holds vectors per label has them for `labels` labels, each of size `width`.

    Raises:
        ConfigError: there is no such loss, or it does not take these options.
    """
    if name not in _LOSSES:
        raise ConfigError(f"task.loss is {name!r}; expected one of {', '.join(sorted(_LOSSES))}")
    kind, defaults = _LOSSES[name]
    sizes = {"num_classes": labels, "embedding_size": width} if name in LABEL_LOSSES else {}
    return _make(kind, {**defaults, **options, **sizes}, "task.loss_options", options)


def make_miner(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Return the miner `name`.

    Raises:
        ConfigError: there is no such miner, or it does not take these options.
    """
    if name not in _MINERS:
        raise ConfigError(f"task.miner is {name!r}; expected one of {', '.join(sorted(_MINERS))}")
    return _make(_MINERS[name], options, "task.miner_options", options)


def _make(kind: Any, arguments: Mapping[str, Any], setting: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        made: nn.Module = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting} is {dict(options)}; {kind.__name__} does not take it: {error}") from error
    return made
