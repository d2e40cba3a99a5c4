"""The section `train:` of params.yaml: how the suffix is trained."""

from typing import Literal

from pydantic import Field

from pipeline.config import Section
from pipeline.train.adapter import AdapterSetting
from pipeline.train.loader import Residency
from pipeline.train.order import ViewOrder


class TrainConfig(Section):
    """How the suffix is trained. No effect on the store."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training samples."""
    batch_size: int = Field(default=64, ge=1)
    """Units per step: samples, or pairs if the task learns from pairs. Several processes share them."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the parameters that are not pretrained (the head); null for `lr`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of AdamW; biases and normalisation weights have none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Norm to which larger gradients are scaled down; null for no limit."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimiser step; the last step of an epoch takes the remaining ones."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of accelerate."""
    channels_last: bool = False
    """Train image backbones in channels-last memory format: faster on most accelerators and CPUs."""
    adapter: AdapterSetting | None = None
    """Train adapters in place of the pretrained weights, which stay frozen: `lora` or `peanut`, or a section with its
    settings. The run keeps plain weights, with the adapters merged into them."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better validation score; null trains all epochs."""
    keep: Literal["best", "last"] = "best"
    """Epoch whose weights the run keeps: the best by validation score, or the last."""
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
    seed: int = 0
    """Seed of the batch order, of drawn views, of dropout and of the adapters' initial weights; those of the head come
    from `model.seed`."""
