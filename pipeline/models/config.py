"""The sections `model:` and `preprocess:` of params.yaml."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

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
    """The pretrained network and the source of its weights."""

    backbone: str
    """"torchvision:NAME", "timm:NAME", "hf:DIRECTORY" or "hf:HUB/NAME" (the directory may be in a package:
    "hf:package:PKG/inner/path"), or "module:function", your own function, which receives the head and returns an
    `nn.Module` or a `Backbone`."""
    weights: str | None = PRETRAINED
    """"pretrained" for the library's own weights of that name (hf: those of the directory or repository), a file
    (.safetensors, .pth, .pt, .bin; "package:PKG/inner/path" for one in an installed package), or null for random
    weights drawn from `seed`. A "module:function" loads its own weights unless this names a file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights before the cut, in memory and in computation: "auto" is the type that the weights have where
    they come from. Those after the cut train in float32 all the same, from the values they came with (`train.dtype`).
    """
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """SHA-256 digest of the weights file, in hex; checked before the file is read."""
    revision: str | None = None
    """hf: commit, tag or branch of the hub repository."""
    trust_remote_code: bool = False
    """hf: run the Python code of the repository. It can do anything; leave this off unless you have read it."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for the library: of the constructor (torchvision, timm), or fields of the configuration (hf),
    as in {hidden_dropout_prob: 0.0}."""
    seed: int = Field(default=0, ge=0)
    """Seed of all weights that no file provides: those of the new head, or all of them."""

    @field_validator("backbone")
    @classmethod
    def _named(cls, backbone: str) -> str:
        library, _, name = backbone.partition(":")
        if library in LIBRARIES and not name:
            raise ValueError(f"expected a name after {library}:")
        if library not in LIBRARIES and not is_function(backbone):
            raise ValueError(f"expected {', '.join(f'{known}:NAME' for known in LIBRARIES)} or module:function")
        return backbone

    def _faults(self) -> Iterator[str]:
        for name in ("revision", "trust_remote_code"):
            if getattr(self, name) and self.library != "hf":
                yield f"{name} is {getattr(self, name)!r}, which only hf: backbones use; remove it"
        if self.sha256 and self.library != "hf" and not self.has_file:
            yield f"sha256 is set, but weights is {self.weights!r}, which is no file; remove it or name the file"
        if self.sha256 and self.weights is None:
            yield "sha256 is set, but weights is null; remove it or name the file"

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
    def has_weights_in_files(self) -> bool:
        """True if the weights come from files, not from a seed or the user's own code."""
        return self.weights is not None and (self.library != "function" or self.has_file)

    @property
    def has_file(self) -> bool:
        """Return whether `weights` names a file."""
        return self.weights is not None and self.weights != PRETRAINED


class PreprocessConfig(Section):
    """How a content becomes the network's inputs. Unset values are those of the backbone."""

    kind: Literal["image", "audio", "text", "array"] | None = None
    """What contents are. Library backbones define it; a "module:function" needs it. "array" passes an array on
    unchanged, in float32."""
    image_size: int | None = Field(default=None, ge=1)
    """image: side of the square input, in pixels."""
    resize: Literal["crop", "squash"] = "crop"
    """image: "crop" keeps the proportions and cuts out the centre; "squash" keeps the whole image and changes its
    proportions."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """image: share of the shorter side that the crop covers. Libraries commonly evaluate with about 0.875."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """image: how pixels are interpolated when resizing."""
    mean: Triple | None = None
    """image: mean of the red, green and blue values (0..1), which is subtracted."""
    std: Triple | None = None
    """image: standard deviation of these values, by which they are divided."""
    augment: Steps | None = None
    """image: random transforms of the training samples, in this order, by their names and arguments in
    torchvision.transforms.v2: [{RandomResizedCrop: {size: 224, scale: [0.5, 1.0]}}, RandomHorizontalFlip]. They receive
    the whole decoded image (a crop first makes the later ones cheaper); unless the result has the input size, it is
    resized and cropped like any image. Needs `encode.views`."""
    rate: int | None = Field(default=None, ge=1)
    """audio: samples per second of the network's input; hf: backbones define it."""
    seconds: float | None = Field(default=None, gt=0)
    """audio: length of the input; longer sounds are cut off at the end, shorter ones are padded with silence. Unset:
    sounds keep their length and a batch is padded to its longest, for backbones that take a mask."""
    tokenizer: str | None = None
    """text: directory or hub name of the tokenizer; hf: backbones include theirs."""
    max_length: int | None = Field(default=None, ge=2)
    """text: maximum input length in tokens, special tokens included."""
    long_texts: Literal["cut", "refuse"] = "cut"
    """text: what happens to texts longer than `max_length`: "cut" truncates them at the end, "refuse" sets them aside
    as bad samples (`encode.max_bad`)."""

    @field_validator("augment")
    @classmethod
    def _can_augment(cls, augment: list[dict[str, dict[str, Any]]] | None) -> list[dict[str, dict[str, Any]]] | None:
        if augment is not None:
            from pipeline.models.augment import check_steps  # noqa: PLC0415

            check_steps(augment)
            digest(augment)
        return augment

    def _faults(self) -> Iterator[str]:
        if self.augment is not None and self.kind not in (None, "image"):
            yield f"augment is set, but kind is {self.kind!r}; only images can be augmented; remove it"
        for name in ("rate", "seconds"):
            if getattr(self, name) is not None and self.kind not in (None, "audio"):
                yield f"{name} is {getattr(self, name)}, but kind is {self.kind!r}; it is for audio; remove it"
        if self.resize == "squash" and self.crop != 1.0:
            yield f"crop is {self.crop}, which resize squash does not use; remove it or set resize: crop"
        if self.std is not None and min(self.std) <= 0:
            yield f"std is {list(self.std)}; expected numbers above 0"
