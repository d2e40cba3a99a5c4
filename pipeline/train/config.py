"""The section `train:` of params.yaml: how the suffix is trained."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from pipeline.config import Section
from pipeline.train.order import ViewOrder

Logger: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "swanlab", "trackio"]


DEFAULT_OPTIMIZER = "AdamW"
Residency: TypeAlias = Literal["auto", "device", "host"]


class AdapterConfig(Section):
    """Adapters that train in place of the pretrained weights after the cut; new layers train in full beside them.

    Everything else after the cut is frozen: weights, biases, and the running statistics of batch normalisation, which
    stays in eval mode as it does before the cut.
    """

    kind: Literal["lora", "peanut"] = "lora"
    """`lora` (arXiv:2106.09685) adds a low-rank product to the weights of linear layers and convolutions. `peanut`
    (arXiv:2410.01870) is a bottleneck like Houlsby's adapters (down-projection, ReLU, up-projection that starts at
    zero) for linear layers: it reads the frozen weight instead of the activations and can therefore be merged. It
    builds a whole weight at every step, which takes longer than training that weight; `lora` is cheaper."""
    rank: int = Field(default=8, ge=1)
    """Width of the low-rank product or of the bottleneck."""
    alpha: int = Field(default=16, ge=1)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input; only for lora."""
    targets: list[str] | None = None
    """Layers to adapt, by path or by the end of the path ("query" is every layer of that name). null: every layer after
    the cut that the method can adapt."""

    def _faults(self) -> Iterator[str]:
        if self.dropout and self.kind != "lora":
            yield f"{self.kind} has no dropout; set adapter.dropout to 0, or adapter.kind to lora"


AdapterSetting = Annotated[
    AdapterConfig, BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
]
"""The section, or just the kind: `adapter: lora`."""


class TrainConfig(Section):
    """How the suffix is trained. No effect on the store."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training samples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps of the run, over which the schedule goes; it replaces `epochs`."""
    eval_every: int | None = Field(default=None, ge=1)
    """Validate, log and save after every so many optimizer steps, and after the last one, in place of the end of an
    epoch. An interrupted run continues from there; `patience` and `keep` count these validations."""
    batch_size: int = Field(default=64, ge=1)
    """Units per step: samples, or pairs if the task learns from pairs. Several processes share them."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the parameters that are not pretrained (the head); null for `lr`."""
    optimizer: str = DEFAULT_OPTIMIZER
    """Optimizer: a class of torch.optim by its name, such as SGD."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, as in {betas: [0.9, 0.95]} or {momentum: 0.9}."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay, as the optimizer has it: decoupled for AdamW, part of the gradient for SGD. Biases and
    normalisation weights have none. Optimizers without it refuse it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Norm to which larger gradients are scaled down; null for no limit."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step; the last step of an epoch takes the remaining ones."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of accelerate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that train, of their gradients and of the optimizer's states. "bfloat16" takes half the
    memory, and updates below 1/256 of a weight are lost in rounding."""
    gradient_checkpointing: bool = False
    """Compute what is inside the blocks after the cut again in the backward pass in place of keeping it: less memory,
    and about a third more time. Blocks with batch normalisation keep it."""
    compile: bool = False
    """Compile the layers after the cut by torch.compile, which takes a minute or more at the start. On a CPU it needs a
    C++ compiler."""
    channels_last: bool = False
    """Train image backbones in channels-last memory format: faster on most accelerators and CPUs."""
    adapter: AdapterSetting | None = None
    """Train adapters in place of the pretrained weights, which stay frozen: `lora` or `peanut`, or a section with its
    settings. The run keeps plain weights, with the adapters merged into them."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations (epochs, unless `eval_every` is set) without a better score; null trains to the
    end."""
    keep: Literal["best", "last"] = "best"
    """Weights that the run keeps: those of the best validation score, or the last."""
    shuffle: Literal["auto", "exact", "window"] = "auto"
    """"exact" draws each epoch's order from all orders. "window" draws batches from a few segments at a time while
    whole segments are read ahead. "auto" is exact if the store fits in half of the memory."""
    group_by_length: bool = False
    """Put samples of similar length in a batch, chosen among 50 consecutive batches: less padding."""
    check: bool = True
    """Verify each sample's checksum when the run reads it for the first time."""
    scratch_gb: float = Field(default=64, gt=0)
    """Disk space, in 10^9 bytes, for segments below .recycle/unpacked that are compressed (`encode.codec: zstd`) or
    remote (`encode.store`). A larger store is read in windows of segments (`shuffle`)."""
    residency: Residency = "auto"
    """Where states are during training: "device" copies all of them to the accelerator, "host" reads them through the
    page cache. "auto" copies them if they fit in half of the free device memory."""
    views: ViewOrder = "cycle"
    """Which of the `encode.views` stored views of a sample an epoch uses: "cycle" uses view `epoch mod views` of all
    samples, "random" draws one per sample."""
    loggers: Annotated[tuple[Logger, ...], Field(strict=False)] = ()
    """Experiment trackers that get the settings and the figures of a run, beside DVCLive's files: as in [tensorboard].
    Each needs its package; `pip install 'layer-recycling[loggers]'` has the first three. Local files are in
    .recycle/logs/<run>. No effect on the run."""
    seed: int = 0
    """Seed of the batch order, of drawn views, of dropout and of the adapters' initial weights; those of the head come
    from `model.seed`."""

    def _faults(self) -> Iterator[str]:
        options = self.optimizer_options
        if own := sorted({"params", "lr", "weight_decay"} & options.keys()):
            yield f"optimizer_options has {', '.join(own)}; remove it: lr and weight_decay are settings of train"
        elif (self.optimizer, options) != (DEFAULT_OPTIMIZER, {}):  # which has no fault, and torch is slow to import
            from pipeline.train.optimizer_kinds import fault_of, has_weight_decay  # noqa: PLC0415

            if (fault := fault_of(self.optimizer, options)) is not None:
                yield fault
            elif "weight_decay" in self.model_fields_set and not has_weight_decay(self.optimizer):
                yield f"weight_decay is {self.weight_decay}, which {self.optimizer} does not take; remove it"
