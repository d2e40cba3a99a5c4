"""Losses and miners of pytorch-metric-learning, by name; wrong names, options or distances raise ConfigError."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils.common_functions import TorchInitWrapper
from torch import Tensor, nn

from pipeline.errors import ConfigError, TrainError

# B batch, D channel, L label

Compares = Literal["pairs", "labels", "vectors"]
"""What a loss compares: samples with each other or with other samples; only with each other; or with label vectors."""


@dataclass(frozen=True)
class LossSpec:
    """A loss or miner: its class, the defaults that are ours, and how it stands to `task.distance`."""

    make: Any
    defaults: Mapping[str, Any] = field(default_factory=dict)
    compares: Compares = "pairs"
    distance: Literal["given", "cosine", "none"] = "given"
    """given: any, as an argument. cosine: its own, that of cosines. none: it compares no two embeddings."""
    miner: tuple[str, Mapping[str, Any]] | None = None
    """Miner that is part of what the loss is."""


class SoftmaxLoss(losses.NormalizedSoftmaxLoss):  # type: ignore[misc]
    """Cross entropy of a linear layer without bias: the library's, with nothing normalised."""

    def __init__(self, num_classes: int, embedding_size: int) -> None:
        super().__init__(num_classes, embedding_size, weight_init_func=TorchInitWrapper(nn.init.xavier_uniform_))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, L) for (B, D)."""
        logits: Tensor = embeddings @ self.W
        return logits


class CenterLoss(nn.Module):
    """Softmax loss, and half the squared distance of each sample to its label's centre times `weight`.

    Equations 4 and 5 of Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016:
    centres move towards the mean of a batch's samples by `rate`, not by the optimiser.
    """

    def __init__(self, num_classes: int, embedding_size: int, weight: float = 0.003, rate: float = 0.5) -> None:
        super().__init__()
        self.weight, self.rate = weight, rate
        self.softmax = SoftmaxLoss(num_classes, embedding_size)
        self.centers_LD: Tensor
        self.register_buffer("centers_LD", torch.zeros(num_classes, embedding_size))

    def forward(self, embeddings_BD: Tensor, labels_B: Tensor, indices_tuple: object = None) -> Tensor:
        apart_BD = embeddings_BD - self.centers_LD[labels_B]
        loss: Tensor = self.softmax(embeddings_BD, labels_B, indices_tuple)
        loss = loss + self.weight / 2 * apart_BD.square().sum(dim=1).mean()
        with torch.no_grad():
            moves_LD = torch.zeros_like(self.centers_LD).index_add_(0, labels_B, apart_BD)
            counts_L = torch.bincount(labels_B, minlength=len(moves_LD))
            self.centers_LD += self.rate * moves_LD / (1 + counts_L.unsqueeze(1))
        return loss


class Memory(losses.CrossBatchMemory):  # type: ignore[misc]
    """The library's cross-batch memory, whose place in its ring is part of its state."""

    def forward(self, embeddings: Tensor, labels: Tensor, enqueue_mask: Tensor | None = None) -> Tensor:
        """Return the loss of the samples not in `enqueue_mask` (all, if None) against the memory, these included."""
        kept = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if kept > self.memory_size:
            raise TrainError(
                f"task.memory is {self.memory_size} embeddings; a batch brings {kept}: set it to several batches, or "
                "lower train.batch_size"
            )
        loss: Tensor = super().forward(embeddings, labels, enqueue_mask=enqueue_mask)
        return loss

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.queue_idx, int(self.has_been_filled)])

    def set_extra_state(self, state: Tensor) -> None:
        place, filled = state.tolist()
        self.queue_idx, self.has_been_filled = place, bool(filled)


_IN_BATCH = {"temperature": 0.05}  # a scale of 20 on the cosines, as sentence encoders are usually trained
_MARGIN = {"margin": 0.2}

_LOSSES: dict[str, LossSpec] = {
    "multiple_negatives": LossSpec(losses.NTXentLoss, _IN_BATCH),
    "ntxent": LossSpec(losses.NTXentLoss, _IN_BATCH),
    "contrastive": LossSpec(losses.ContrastiveLoss),
    "online_contrastive": LossSpec(losses.ContrastiveLoss, miner=("multi_similarity", {"epsilon": 0.0})),
    "triplet_margin": LossSpec(losses.TripletMarginLoss, _MARGIN),
    "multi_similarity": LossSpec(losses.MultiSimilarityLoss),
    "circle": LossSpec(losses.CircleLoss, distance="cosine"),
    "supcon": LossSpec(losses.SupConLoss),
    "fastap": LossSpec(losses.FastAPLoss, compares="labels", distance="cosine"),
    "arcface": LossSpec(losses.ArcFaceLoss, compares="vectors", distance="cosine"),
    "cosface": LossSpec(losses.CosFaceLoss, compares="vectors", distance="cosine"),
    "sub_center_arcface": LossSpec(losses.SubCenterArcFaceLoss, compares="vectors", distance="cosine"),
    "normalized_softmax": LossSpec(losses.NormalizedSoftmaxLoss, compares="vectors", distance="cosine"),
    "softmax": LossSpec(SoftmaxLoss, compares="vectors", distance="none"),
    "center": LossSpec(CenterLoss, compares="vectors", distance="none"),
    "proxy_anchor": LossSpec(losses.ProxyAnchorLoss, compares="vectors"),
    "proxy_nca": LossSpec(losses.ProxyNCALoss, compares="vectors", distance="cosine"),
    "soft_triple": LossSpec(losses.SoftTripleLoss, compares="vectors", distance="cosine"),
}

_MINERS: dict[str, LossSpec] = {
    "angular": LossSpec(miners.AngularMiner, distance="cosine"),
    "batch_easy_hard": LossSpec(miners.BatchEasyHardMiner),
    "batch_hard": LossSpec(miners.BatchHardMiner),
    "distance_weighted": LossSpec(miners.DistanceWeightedMiner, distance="cosine"),
    "hdc": LossSpec(miners.HDCMiner),
    "multi_similarity": LossSpec(miners.MultiSimilarityMiner),
    "pair_margin": LossSpec(miners.PairMarginMiner),
    "triplet_margin": LossSpec(miners.TripletMarginMiner),
}

DISTANCES: Mapping[str, Callable[[], Any]] = {
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "euclidean": lambda: distances.LpDistance(normalize_embeddings=False, p=2),
    "manhattan": lambda: distances.LpDistance(normalize_embeddings=False, p=1),
}
"""`task.distance` -> makes what compares embeddings (B, D) and (R, D): how far or similar each two are, (B, R)."""

_MARGINS_OF_SIMILARITY = {
    losses.ContrastiveLoss: {"pos_margin": 1.0, "neg_margin": 0.0},
    miners.PairMarginMiner: {"pos_margin": 0.8, "neg_margin": 0.2},
}
"""Where near is large, as with cosines: the library's own defaults are margins of distances."""

_WORDS = {"type_of_triplets": ("all", "hard", "semihard", "easy")}
"""Options that the library does not check."""

_NOT_FROM_YAML = frozenset(
    {"num_classes", "embedding_size", "distance", "reducer", "collect_stats", "mat_based_loss", "weight_init_func"}
    | {"embedding_regularizer", "embedding_reg_weight", "weight_regularizer", "weight_reg_weight"}
)


def make_loss(name: str, options: Mapping[str, Any], distance: str, *, labels: int = 0, width: int = 0) -> nn.Module:
    """Return the loss `name`; one that holds vectors per label has them for `labels` labels, each of size `width`."""
    choice = choose("loss", name, distance)
    sizes = {"num_classes": labels, "embedding_size": width} if choice.compares == "vectors" else {}
    return _make(choice, options, distance, "task.loss_options", sizes)


def make_miner(
    name: str | None, options: Mapping[str, Any], distance: str, *, loss: str, loss_options: Mapping[str, Any]
) -> nn.Module | None:
    """Return the miner `name` for a loss, or the one that the loss brings; None if there is neither."""
    default = _LOSSES[loss].miner
    if name is None:
        return None if default is None else _make(_MINERS[default[0]], {}, distance, "task.miner_options", default[1])
    if default is not None:
        raise ConfigError(f"task.miner is {name!r}; {loss} brings its own: remove it, or set task.loss to contrastive")
    choice = choose("miner", name, distance)
    margin = {**_LOSSES[loss].defaults, **loss_options}.get("margin")
    shared = {} if margin is None or "margin" not in _options(choice.make) else {"margin": margin}
    return _make(choice, {**shared, **options}, distance, "task.miner_options", {})


def choose(setting: Literal["loss", "miner"], name: str, distance: str) -> LossSpec:
    """Return the loss or miner `name`; raises ConfigError if it does not exist, or does not compare by `distance`."""
    known = _LOSSES if setting == "loss" else _MINERS
    if name not in known:
        raise ConfigError(f"task.{setting} is {name!r}; expected one of {', '.join(sorted(known))}")
    if known[name].distance == "cosine" and distance != "cosine":
        free = ", ".join(sorted(other for other, choice in known.items() if choice.distance != "cosine"))
        raise ConfigError(
            f"task.distance is {distance!r}; the {setting} {name} is made for cosine: remove task.distance, or set "
            f"task.{setting} to one of {free}"
        )
    return known[name]


def _make(
    choice: LossSpec, options: Mapping[str, Any], distance: str, setting: str, others: Mapping[str, Any]
) -> nn.Module:
    known = _options(choice.make)
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"{setting} has {option}; {choice.make.__name__} takes {', '.join(known) or 'none'}")
        if (expected := _expected(option, known[option], value)) is not None:
            raise ConfigError(f"{setting}.{option} is {value!r}; {choice.make.__name__} expects {expected}")
    given = {**choice.defaults}
    if choice.distance == "given":
        measure = DISTANCES[distance]()
        given |= {"distance": measure, **(_MARGINS_OF_SIMILARITY.get(choice.make, {}) if measure.is_inverted else {})}
    try:
        module: nn.Module = choice.make(**{**given, **options, **others})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{setting} is {dict(options)}; {choice.make.__name__} does not take it: {error}") from error
    return module


def _expected(option: str, default: object, value: object) -> str | None:
    """Return what an option must be where `value` is not: the library would take anything, and fail later or never."""
    if option in _WORDS and value not in _WORDS[option]:
        return f"one of {', '.join(_WORDS[option])}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        return "a number"
    return None


def _options(kind: type) -> dict[str, Any]:
    """Return the names of what a class of the library can be told in params.yaml, with their defaults."""
    found: dict[str, Any] = {}
    for base in inspect.getmro(kind):
        parameters = inspect.signature(base).parameters if "__init__" in vars(base) else {}
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        named = {name: p.default for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        found |= {name: default for name, default in named.items() if name not in {*found, *_NOT_FROM_YAML}}
        if parameters and not passes_on:
            break
    return found
