"""The section `towers:` of params.yaml: an encoder for each role that a sample has in its pair."""

from collections.abc import Iterator

from pydantic import field_validator

from pipeline.config import Section
from pipeline.encode.config import check_cut
from pipeline.files import is_function
from pipeline.models import ModelConfig, PreprocessConfig
from pipeline.tasks import Layers, Pooling
from pipeline.train.config import Residency


class TowerConfig(Section):
    """How the encoder of one role differs from the other sections; unset values are theirs."""

    model: ModelConfig | None = None
    """Its network, as in the section `model`."""
    preprocess: PreprocessConfig | None = None
    """Its preprocessing, as in the section `preprocess`. `encode.views` applies to towers whose preprocessing has
    `augment`."""
    cut: float | int | str | None = None
    """Its cut, as in `encode.cuts`, in runs of every cut; 1.0 leaves only its head to train."""
    pooling: Pooling | None = None
    """Its pooling, as in `task.pooling`."""
    layers: Layers | None = None
    """Its head, as in `task.layers`; [] for none. All towers must produce embeddings of one size."""
    trains: bool = True
    """Train the suffix of this tower. If false, its embeddings are those of the pretrained network."""
    key: str | None = None
    """Function that makes the keys of its samples, as in `data.key`."""
    residency: Residency | None = None
    """Where its states are during training, as in `train.residency`."""

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
    """One encoder per role; if none is set, one encoder embeds all samples."""

    anchor: TowerConfig | None = None
    """Encoder of anchors (questions)."""
    positive: TowerConfig | None = None
    """Encoder of positives (answers)."""
    shared: bool = False
    """Train one set of weights for both roles. Their towers must have one model and cut; they may differ in
    preprocessing, keys and residency."""

    @property
    def is_set(self) -> bool:
        """Return whether there is an encoder for each role."""
        return self.anchor is not None or self.positive is not None

    def of(self, role: str | None) -> TowerConfig:
        """Return what is set for a role; nothing for None."""
        found: TowerConfig | None = None if role is None else getattr(self, role)
        return found or TowerConfig()

    def _faults(self) -> Iterator[str]:
        if not self.shared:
            return
        anchor, positive = self.of("anchor"), self.of("positive")
        for name in ("model", "cut", "pooling", "layers", "trains"):
            if getattr(anchor, name) != getattr(positive, name):
                yield f"shared is true, but {name} differs between anchor and positive; set it for neither"
        if not self.is_set:
            yield "shared is true, but there are no towers; set anchor or positive, or remove it"
