"""The section `train:` of params.yaml: how the suffix is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config import Section
from pipeline.train.adapter import AdapterSetting
from pipeline.train.loader import Residency
from pipeline.train.order import ViewOrder


class TrainConfig(Section):
    """How the suffix is trained. None of these settings concerns the store."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the training samples."""
    batch_size: int = Field(default=64, ge=1)
    """Units per step: samples, or pairs where the task learns from pairs. Several processes share them out."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    head_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the parameters that were not pretrained (the head); `lr` where not given."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay; biases and normalisation weights have none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or down to zero at the last step."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are scaled down to this norm; None leaves them."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches per optimiser step; the last step of an epoch takes those that are left."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, by accelerate."""
    channels_last: bool = False
    """Train image backbones in channels-last memory format: faster on most accelerators and CPUs."""
    adapter: AdapterSetting | None = None
    """Adapters train in place of the pretrained weights, which stay as they are: `lora`, or a section as
    `AdapterConfig` documents it. The run keeps plain weights, the adapters merged into them."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation metric after which training stops; None trains them all."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights the run ends with: the best by the task's validation metric, or the last."""
    shuffle: Literal["auto", "exact", "window"] = "auto"
    """"exact" draws each epoch's order from all orders. "window" draws batches from some segments at a time and reads
    the next ones ahead, whole, as a disk likes it. "auto" is exact while the store fits in half of the memory."""
    group_by_length: bool = False
    """Put samples of similar length in a batch, picked among 50 batches in a row: less padding to compute on."""
    check: bool = True
    """Prove every sample's bytes against their checksum when the run reads them for the first time."""
    scratch_gb: float = Field(default=64, gt=0)
    """Disk, in 10^9 bytes, for segments below .recycle/unpacked that are compressed (`encode.codec: zstd`) or lie
    elsewhere (`encode.store`). A store that needs more is drawn from in windows of segments (`shuffle`)."""
    residency: Residency = "auto"
    """Where states lie while training: "device" copies them all to the accelerator, "host" reads them from the disk's
    cache. "auto" copies them where they fit in half of the device's free memory."""
    views: ViewOrder = "cycle"
    """Which of the `encode.views` stored views of a sample an epoch trains on: "cycle" takes view `epoch mod views` of
    all samples, "random" draws one for each sample."""
    seed: int = 0
    """Seed of the order of batches, of views drawn, of dropout and of adapters' initial weights; the head's are drawn
    from `model.seed`."""
