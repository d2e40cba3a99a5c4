"""The section `towers:` of params.yaml: an encoder for each role that a sample has in its pair."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, field_validator, model_validator

from pipeline.config import Section
from pipeline.encode.config import check_cut
from pipeline.files import is_function
from pipeline.models import ModelConfig, PreprocessConfig
from pipeline.tasks import Layers, Pooling
from pipeline.train.loader import Residency


class TowerConfig(Section):
    """How the encoder of one role differs; what is not set is what the other sections say."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())

    model: ModelConfig | None = None
    """Its network, as the section `model` describes one."""
    preprocess: PreprocessConfig | None = None
    """How its contents become inputs, as the section `preprocess` says it. `encode.views` are those of towers whose
    preprocessing has an `augment`."""
    cut: float | int | str | None = None
    """Where it is split, whatever the cut of the run: 1.0 leaves its head alone after the cut. As `encode.cuts`."""
    pooling: Pooling | None = None
    """How its vectors become one, as `task.pooling`."""
    layers: Layers | None = None
    """Its head, as `task.layers`; [] for none. All towers must end in embeddings of one size."""
    trains: bool = True
    """Whether what follows its cut is trained. If not, its embeddings are those of the pretrained network."""
    key: str | None = None
    """Makes the keys of its samples, as `data.key`."""
    residency: Residency | None = None
    """Where its states lie while training, as `train.residency`."""

    @field_validator("cut")
    @classmethod
    def _is_cut(cls, cut: float | int | str | None) -> float | int | str | None:
        if cut is not None:
            check_cut(cut)
        return cut

    @field_validator("key")
    @classmethod
    def _is_function(cls, key: str | None) -> str | None:
        if key is not None and not is_function(key):
            raise ValueError("expected module:function")
        return key


class TowersConfig(Section):
    """Which encoder embeds the samples of each role; one embeds all of them where none is set."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    anchor: TowerConfig | None = None
    """The encoder of anchors (questions)."""
    positive: TowerConfig | None = None
    """The encoder of positives (answers)."""
    shared: bool = False
    """Train one set of weights for both: towers of one model and cut, which differ in preprocessing, keys or residency.
    """

    @property
    def is_set(self) -> bool:
        """Say whether there is an encoder for each role."""
        return self.anchor is not None or self.positive is not None

    def of(self, role: str | None) -> TowerConfig:
        """Return what is set for a role; nothing for None."""
        found: TowerConfig | None = None if role is None else getattr(self, role)
        return found or TowerConfig()

    @model_validator(mode="after")
    def _can_share(self) -> Self:
        if not self.shared:
            return self
        anchor, positive = self.of("anchor"), self.of("positive")
        faults = [
            f"shared is true, but {name} differs between anchor and positive; set it for neither"
            for name in ("model", "cut", "pooling", "layers", "trains")
            if getattr(anchor, name) != getattr(positive, name)
        ]
        if not self.is_set:
            faults.append("shared is true, but there are no towers; set anchor or positive, or remove it")
        if faults:
            raise ValueError("; ".join(faults))
        return self
