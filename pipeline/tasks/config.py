"""The section `task:` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.config import Section
from pipeline.files import is_function

SCORES = {
    "classification": ("accuracy", "macro_f1"),
    "multi-label": ("average_precision", "micro_f1", "macro_f1"),
    "regression": ("rmse", "mae", "r2", "pearson", "spearman"),
    "similarity": ("precision_at_1", "reciprocal_rank", "r_precision"),
    "tagging": ("f1", "precision", "recall", "accuracy"),
    "answers": ("f1", "exact_match"),
}
"""What each task is scored by; the first is its `monitor` unless another is set."""

LOWER_IS_BETTER = frozenset({"rmse", "mae"})
"""Scores that are errors."""

REGRESSION_LOSSES = ("mse", "l1", "huber")

LABEL_LOSSES = frozenset(
    {"arcface", "cosface", "normalized_softmax", "proxy_anchor", "soft_triple", "sub_center_arcface"}
)
"""Losses that hold trainable vectors for every label of the training split."""

_USED_BY: dict[str, frozenset[str]] = {
    "classification": frozenset({"label_smoothing", "class_weights", "monitor"}),
    "multi-label": frozenset({"label_smoothing", "class_weights", "monitor"}),
    "regression": frozenset({"loss", "loss_options", "monitor"}),
    "similarity": frozenset({"loss", "loss_options", "miner", "miner_options", "symmetric", "pooling", "layers"})
    | {"samples_per_label", "monitor", "seed"},
    "tagging": frozenset({"label_smoothing", "monitor"}),
    "answers": frozenset({"max_answer", "monitor"}),
    "module:function": frozenset({"options"}),
}
_DEFAULT_LOSS = {"similarity": "multiple_negatives", "regression": "mse"}


def _default_loss(settings: dict[str, Any]) -> str:
    return _DEFAULT_LOSS.get(settings.get("kind", ""), "")


class TaskConfig(Section):
    """What is learnt, by which loss, and what decides which epoch is best."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: str = "classification"
    """"classification" (one label per sample), "multi-label" (any number of them), "regression" (a number, or several),
    "similarity" (an embedding in which what belongs together is near: pairs, or samples under one label), "tagging" (a
    tag for every word: entities), "answers" (the span of a text that answers a question), or the user's own
    "module:function", which is called with this section and returns a `Task`."""
    monitor: str | None = None
    """Score on the validation split that decides which epoch is best. classification: accuracy (default) or macro_f1;
    multi-label: average_precision (default), micro_f1 or macro_f1; regression: rmse (default), mae, r2, pearson or
    spearman, of which the first two are better the lower; similarity: precision_at_1 (default), reciprocal_rank or
    r_precision; tagging: f1 of entities (default), precision, recall or accuracy of tags; answers: f1 of words
    (default) or exact_match."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """classification, tagging: share of each target that is spread over all classes. multi-label: share of each yes and
    no that becomes a maybe."""
    class_weights: Literal["balanced"] | None = None
    """classification, multi-label: "balanced" weighs each class as if all were equally frequent in the training
    split (multi-label: as if as many samples had a label as not)."""
    max_answer: int = Field(default=30, ge=1)
    """answers: longest answer that is looked for, in tokens."""
    loss: str = Field(default_factory=_default_loss)
    """regression: "mse" (the default), "l1" or "huber", on standardised numbers.
    similarity: a loss of pytorch-metric-learning. For pairs and labels: "multiple_negatives" (the others of the
    batch are the negatives; also called "ntxent"), "contrastive", "triplet_margin", "multi_similarity", "circle",
    "supcon"; for labels alone: "arcface", "cosface", "normalized_softmax", "proxy_anchor", "soft_triple",
    "sub_center_arcface", which need `layers`."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """regression, similarity: arguments of the loss, as in {delta: 0.5}, {temperature: 0.05} or {margin: 0.2}."""
    miner: str | None = None
    """similarity: what picks the informative pairs of a batch for the loss: "batch_hard", "batch_easy_hard",
    "multi_similarity", "triplet_margin", "pair_margin", "angular" or "distance_weighted"."""
    miner_options: dict[str, Any] = Field(default_factory=dict)
    """similarity: arguments of the miner, as in {type_of_triplets: semihard}."""
    symmetric: bool = False
    """similarity of pairs: also look for the anchor of each positive, and take the mean of both losses."""
    pooling: Literal["mean", "cls", "pooled"] | None = None
    """similarity: how the vectors of a sample become one: the mean over its tokens, the first token, or what the
    backbone itself pools. Unset: mean for texts, the backbone's own for images."""
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """similarity: widths of linear layers after pooling, ReLU between them; the last is the embedding's size. Empty:
    the embedding is what was pooled."""
    samples_per_label: int = Field(default=4, ge=2)
    """similarity of labels: samples of one label that come together, as one of the `train.batch_size` units of a
    batch, so that each has positives."""
    seed: int = Field(default=0, ge=0)
    """similarity: seed of the loss's own weights."""
    options: dict[str, Any] = Field(default_factory=dict)
    """module:function: settings of the user's own."""

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        kind = "module:function" if is_function(self.kind) else self.kind
        if kind not in _USED_BY:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(_USED_BY)}")
        unused = self.model_fields_set - {"kind"} - _USED_BY[kind]
        faults = [
            f"{name} is {getattr(self, name)!r}, which kind {self.kind} does not use; remove it"
            for name in sorted(unused)
            if getattr(self, name)
            != type(self).model_fields[name].get_default(call_default_factory=True, validated_data={"kind": self.kind})
        ]
        if self.monitor is not None and self.monitor not in SCORES.get(kind, (self.monitor,)):
            faults.append(f"monitor is {self.monitor!r}; {kind} has {', '.join(SCORES[kind])}")
        if kind == "regression" and self.loss not in REGRESSION_LOSSES:
            faults.append(f"loss is {self.loss!r}; regression has {', '.join(REGRESSION_LOSSES)}")
        if self.miner_options and self.miner is None:
            faults.append(f"miner_options is {self.miner_options!r}, but no miner is set; set one")
        if self.loss in LABEL_LOSSES and not self.layers:
            faults.append(f"layers is empty; loss {self.loss} must know the embedding's size: set it, as in [256]")
        if faults:
            raise ValueError("; ".join(faults))
        return self
