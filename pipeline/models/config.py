"""The sections `model:` and `preprocess:` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from pipeline.config import Section
from pipeline.files import is_function
from pipeline.keys import digest

LIBRARIES = ("torchvision", "timm", "hf")
PRETRAINED = "pretrained"

Triple = Annotated[tuple[float, float, float], Field(strict=False)]


def _as_steps(value: object) -> object:
    from pipeline.models.augment import as_steps  # noqa: PLC0415  (torchvision is slow to import)

    return value if value is None else as_steps(value)


Steps = Annotated[list[dict[str, dict[str, Any]]], BeforeValidator(_as_steps), Field(min_length=1)]
"""Transforms in their order, each {name: arguments}. A mapping of several and a name alone are read as such a list."""


class ModelConfig(Section):
    """Which pretrained network is fine-tuned, and where its weights come from."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    backbone: str
    """"torchvision:NAME", "timm:NAME", "hf:DIRECTORY" or "hf:HUB/NAME" (the directory may be a package's:
    "hf:package:PKG/inner/path"), or the user's own "module:function", which is called with the head and returns an
    `nn.Module` or a `Backbone`."""
    weights: str | None = PRETRAINED
    """"pretrained" for the library's own weights of that name (hf: those of the directory or repository), a file
    (.safetensors, .pth, .pt, .bin; "package:PKG/inner/path" for one that a package ships), or null for random weights
    from `seed`. A "module:function" loads its own unless this is a file."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 digest of the weights' file, in hex; checked before it is read."""
    revision: str | None = None
    """hf: commit, tag or branch of a hub repository."""
    trust_remote_code: bool = False
    """hf: run the Python code that the repository brings. It can do anything; leave it off unless you read it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further settings of the network, passed to the library: constructor arguments (torchvision, timm), or fields of
    the configuration (hf), as in {hidden_dropout_prob: 0.0}."""
    seed: int = Field(default=0, ge=0)
    """Seed of every weight that no file gives: the new head's, or all of them."""

    @field_validator("backbone")
    @classmethod
    def _named(cls, backbone: str) -> str:
        library, _, name = backbone.partition(":")
        if library in LIBRARIES and not name:
            raise ValueError(f"expected a name after {library}:")
        if library not in LIBRARIES and not is_function(backbone):
            raise ValueError(f"expected {', '.join(f'{known}:NAME' for known in LIBRARIES)} or module:function")
        return backbone

    @model_validator(mode="after")
    def _fits_library(self) -> Self:
        faults = [
            f"{name} is {getattr(self, name)!r}, which only hf: backbones use; remove it"
            for name in ("revision", "trust_remote_code")
            if getattr(self, name) and self.library != "hf"
        ]
        if self.sha256 and self.library != "hf" and not self.has_file:
            faults.append(
                f"sha256 is set, but weights is {self.weights!r}, which is no file; remove it or name the file"
            )
        if self.sha256 and self.weights is None:
            faults.append("sha256 is set, but weights is null; remove it or name the file")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def library(self) -> str:
        """Return "torchvision", "timm", "hf", or "function" for the user's own."""
        library = self.backbone.partition(":")[0]
        return library if library in LIBRARIES else "function"

    @property
    def name(self) -> str:
        """Return the name of the backbone within its library."""
        return self.backbone.partition(":")[2] if self.library != "function" else self.backbone

    @property
    def has_file(self) -> bool:
        """Say whether `weights` names a file."""
        return self.weights is not None and self.weights != PRETRAINED


class PreprocessConfig(Section):
    """How a content becomes the network's inputs. What is not set is the backbone's own."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: Literal["image", "audio", "text", "array"] | None = None
    """What contents are. The libraries' backbones know; for a "module:function" it must be set. "array" hands an array
    on as it is, in float32."""
    image_size: int | None = Field(default=None, ge=1)
    """image: side of the square that the network sees, in pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """image: "crop" keeps the proportions and cuts the centre out; "squash" keeps the whole image and not them."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """image: share of the shorter side that the crop covers. Libraries evaluate with about 0.875."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """image: how pixels are interpolated."""
    mean: Triple | None = None
    """image: mean of the red, green and blue values (0..1), subtracted."""
    std: Triple | None = None
    """image: their standard deviation, divided by."""
    augment: Steps | None = None
    """image: random changes of the training samples, in this order, by the names and arguments of
    torchvision.transforms.v2: [{RandomResizedCrop: {size: 224, scale: [0.5, 1.0]}}, RandomHorizontalFlip]. They get the
    whole decoded image (put a crop first: what follows then has less to do); what they leave is resized and cropped as
    any image where it is not the network's square already. Needs `encode.views`."""
    rate: int | None = Field(default=None, ge=1)
    """audio: samples per second that the network hears. hf: backbones state theirs."""
    seconds: float | None = Field(default=None, gt=0)
    """audio: length that the network hears; longer sounds are cut off at the end, shorter ones are followed by silence.
    Without it a sound is as long as it is, and a batch is filled up to its longest: for backbones that take a mask."""
    tokenizer: str | None = None
    """text: directory or hub name of the tokenizer. hf: backbones bring theirs."""
    max_length: int | None = Field(default=None, ge=2)
    """text: longest input in tokens, special tokens included; longer texts are cut off at the end."""

    @field_validator("augment")
    @classmethod
    def _can_augment(cls, augment: list[dict[str, dict[str, Any]]] | None) -> list[dict[str, dict[str, Any]]] | None:
        if augment is not None:
            from pipeline.models.augment import check_steps  # noqa: PLC0415

            check_steps(augment)
            digest(augment)
        return augment

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if self.augment is not None and self.kind not in (None, "image"):
            faults.append(f"augment is set, but kind is {self.kind!r}; only images can be augmented; remove it")
        faults += [
            f"{name} is {getattr(self, name)}, but kind is {self.kind!r}; it is for audio; remove it"
            for name in ("rate", "seconds")
            if getattr(self, name) is not None and self.kind not in (None, "audio")
        ]
        if self.resize == "squash" and self.crop != 1.0:
            faults.append(f"crop is {self.crop}, which resize squash does not use; remove it or set resize: crop")
        if self.std is not None and min(self.std) <= 0:
            faults.append(f"std is {list(self.std)}; expected numbers above 0")
        if faults:
            raise ValueError("; ".join(faults))
        return self
