"""The section `task:` of params.yaml."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from pipeline.config import Section
from pipeline.files import is_function
from pipeline.tasks.heads import Layer, parse

SCORES = {
    "classification": ("accuracy", "macro_f1"),
    "multi-label": ("average_precision", "micro_f1", "macro_f1"),
    "regression": ("rmse", "mae", "r2", "pearson", "spearman"),
    "tagging": ("f1", "precision", "recall", "accuracy"),
    "answers": ("f1", "exact_match"),
    "lm": ("loss", "perplexity", "token_accuracy"),
    "preference": ("loss", "reward_accuracy", "reward_margin"),
}
"""Scores of each task; the first is the default `monitor`. Those of similarity: `retrieval_scores`."""

LOWER_IS_BETTER = frozenset({"rmse", "mae", "loss", "perplexity"})
"""Scores that are errors."""

REGRESSION_LOSSES = ("mse", "l1", "huber")

_USED_BY: dict[str, frozenset[str]] = {
    "classification": frozenset({"label_smoothing", "class_weights", "layers", "monitor"}),
    "multi-label": frozenset({"label_smoothing", "class_weights", "layers", "monitor"}),
    "regression": frozenset({"loss", "loss_options", "layers", "monitor"}),
    "similarity": frozenset({"loss", "loss_options", "distance", "miner", "miner_options", "memory", "symmetric"})
    | {"pooling", "layers", "samples_per_label", "precision_at", "monitor", "seed"},
    "tagging": frozenset({"label_smoothing", "layers", "monitor"}),
    "answers": frozenset({"max_answer", "monitor"}),
    "lm": frozenset({"loss_on", "untie_head", "monitor"}),
    "preference": frozenset({"loss", "beta", "label_smoothing", "untie_head", "monitor"}),
    "module:function": frozenset({"options"}),
}
_DEFAULT_LOSS = {"similarity": "multiple_negatives", "regression": "mse", "preference": "dpo"}


def retrieval_scores(precision_at: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the scores of similarity."""
    return (*(f"precision_at_{k}" for k in precision_at), "reciprocal_rank", "r_precision")


def _checked(layer: Layer) -> Layer:
    parse(layer)
    return layer


Pooling: TypeAlias = Literal["mean", "cls", "max", "pooled"]
Layers: TypeAlias = Annotated[tuple[Annotated[Layer, BeforeValidator(_checked)], ...], Field(strict=False)]


class TaskConfig(Section):
    """The task: what is learnt, with which loss, and the score that selects the best epoch."""

    kind: str = "classification"
    """"classification" (one label per sample), "multi-label" (any number of labels), "regression" (one number or
    several), "similarity" (an embedding in which matching samples are near: pairs, or samples of one label), "tagging"
    (a tag per word, for entities), "answers" (the span of a text that answers a question), "lm" (the next token, by a
    language model), "preference" (the better of two answers, by a language model), or "module:function", your own
    function, which receives this section and returns a `Task`."""
    monitor: str | None = None
    """Validation score that selects the best epoch. classification: accuracy (default) or macro_f1; multi-label:
    average_precision (default), micro_f1 or macro_f1; regression: rmse (default), mae, r2, pearson or spearman, of
    which the first two are better when lower; similarity: precision_at_1 (default; or another k of `precision_at`),
    reciprocal_rank or r_precision; tagging: f1 of entities (default), precision, recall, or accuracy of tags; answers:
    f1 of words (default) or exact_match; lm: loss (default) or perplexity, better when lower, or token_accuracy;
    preference: loss (default, better when lower), reward_accuracy or reward_margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """classification, tagging: share of each target that is spread over all classes. multi-label: each target moves
    from 0 or 1 towards one half by this share. preference by dpo: share of the pairs that are taken to be the wrong way
    round."""
    class_weights: Literal["balanced"] | None = None
    """classification, multi-label: "balanced" weights each class as if all were equally frequent in the training split
    (multi-label: as if half of the samples had each label)."""
    max_answer: int = Field(default=30, ge=1)
    """answers: maximum length of a predicted answer, in tokens."""
    loss_on: Literal["completions", "all"] = "completions"
    """lm: the tokens that are trained on and scored: "completions" (what the network is to write: of chats, the
    messages of the assistant; of plain texts, everything) or "all". It changes no state."""
    beta: float = Field(default=0.1, gt=0)
    """preference: dpo, ipo: weight of staying near the network before training; orpo: weight of the preference."""
    untie_head: bool = False
    """lm, preference: give the head weights of its own where the network shares them with the token embeddings. Where
    layers are recycled, shared weights are frozen, the head's too; its own ones train."""
    loss: str = Field(default_factory=lambda settings: _DEFAULT_LOSS.get(settings.get("kind", ""), ""))
    """regression: "mse" (default), "l1" or "huber", on standardised numbers. preference: "dpo" (default,
    arXiv:2305.18290), "ipo" (arXiv:2310.12036), or "orpo" (arXiv:2403.07691), which also trains on the better answers
    and needs no reference. similarity: a loss of
    pytorch-metric-learning. For pairs and labels: "multiple_negatives" (default: the rest of the batch are the
    negatives; also called "ntxent"), "contrastive", "online_contrastive" (only pairs harder than the hardest of the
    other kind), "triplet_margin", "multi_similarity", "circle", "supcon". For labels: "fastap", and, with trained
    vectors per label, "arcface", "cosface", "sub_center_arcface", "softmax", "normalized_softmax", "center" (softmax
    plus a pull towards the label's centre), "proxy_anchor", "proxy_nca", "soft_triple"."""
    loss_options: dict[str, Any] = Field(default_factory=dict)
    """regression, similarity: arguments of the loss, as in {delta: 0.5}, {temperature: 0.05} or {margin: 0.2}. The
    message for an unknown argument lists the known ones."""
    distance: Literal["cosine", "dot", "euclidean", "manhattan"] = "cosine"
    """similarity: distance used by the loss, the miner and the scores. All but "cosine" depend on the embeddings'
    lengths. Losses that are defined on cosines refuse the others."""
    miner: str | None = None
    """similarity: selects the informative pairs of a batch for the loss: "triplet_margin" (all triplets within the
    margin, or those of {type_of_triplets: hard} or semihard), "batch_hard" (the furthest positive and the nearest
    negative of each sample), "batch_easy_hard", "multi_similarity", "pair_margin", "hdc" (the hardest share), "angular"
    or "distance_weighted"."""
    miner_options: dict[str, Any] = Field(default_factory=dict)
    """similarity: arguments of the miner, as in {type_of_triplets: semihard}. Its margin is that of the loss unless
    set."""
    memory: int | None = Field(default=None, ge=1)
    """similarity: compare each batch also with this many embeddings of earlier steps (cross-batch memory,
    arXiv:1912.06798): many more negatives than fit in a batch. It must hold at least one batch. For losses on pairs
    except "fastap"."""
    symmetric: bool = False
    """similarity of pairs: also retrieve the anchor of each positive, and average both losses."""
    pooling: Pooling | None = None
    """similarity: how the vectors of a sample become one: "mean" or "max" over its tokens, "cls" for the first token,
    "pooled" for the backbone's own pooling. Unset: mean for texts, the backbone's own for images."""
    layers: Layers = ()
    """Layers of the head, in order. Numbers are widths of linear layers with ReLU between them, as in [512, 256]; other
    layers have names, as in [{skip: {dropout: 0.1}}, {linear: 256}]. similarity: the layers after pooling; empty, the
    pooled vector is the embedding. classification, multi-label, regression, tagging: layers between the features and a
    new last linear layer, which continues numbers or an mlp, as in [{dropout: 0.2}, {mlp: [256]}]; empty, the network's
    own classifier."""
    samples_per_label: int = Field(default=4, ge=2)
    """similarity of labels: K samples of one label form one unit, so that each sample has positives. `train.batch_size`
    counts units: with P units a batch has P x K samples of up to P labels."""
    precision_at: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = (1,)
    """similarity: the values of k for precision@k, as in [1, 5, 10]."""
    seed: int = Field(default=0, ge=0)
    """similarity: seed of the loss's own weights."""
    options: dict[str, Any] = Field(default_factory=dict)
    """module:function: your own settings."""

    def _faults(self) -> Iterator[str]:
        kind = "module:function" if is_function(self.kind) else self.kind
        if kind not in _USED_BY:
            yield f"kind is {self.kind!r}; expected one of {', '.join(_USED_BY)}"
            return
        defaults = type(self).model_construct(kind=self.kind)
        for name in sorted(self.model_fields_set - {"kind"} - _USED_BY[kind]):
            if getattr(self, name) != getattr(defaults, name):
                yield f"{name} is {getattr(self, name)!r}, which kind {self.kind} does not use; remove it"
        known = retrieval_scores(self.precision_at) if kind == "similarity" else SCORES.get(kind)
        if self.monitor is not None and known is not None and self.monitor not in known:
            yield f"monitor is {self.monitor!r}; {kind} has {', '.join(known)}"
        if kind == "regression" and self.loss not in REGRESSION_LOSSES:
            yield f"loss is {self.loss!r}; regression has {', '.join(REGRESSION_LOSSES)}"
        if self.miner_options and self.miner is None:
            yield f"miner_options is {self.miner_options!r}, but no miner is set; set one"
