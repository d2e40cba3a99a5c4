"""The safetensors files of a pretrained network whose weights can be used where they lie, memory-mapped."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from pipeline.errors import ModelError, NotMappableError
from pipeline.files import locate
from pipeline.models.config import ModelConfig

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in the files of one network, by name in the files: their bytes and types."""

    files: tuple[Path, ...]
    dtypes: dict[str, torch.dtype]
    sizes: dict[str, int]

    @classmethod
    def read(cls, config: ModelConfig, source: str, arguments: dict[str, Any]) -> "Checkpoint":
        """Read the headers of the files that `from_pretrained` reads for `source`, or of the file `config.weights`.

        Raises:
            ModelError: a file is damaged.
            NotMappableError: the weights are not in safetensors files.
        """
        if config.weights is None:
            raise NotMappableError("model.weights is null, so that they are drawn; name a file or a directory")
        files = [locate(config.weights, "model.weights")] if config.has_file else _files(source, arguments)
        if not files or any(file.suffix != SUFFIX for file in files):
            where = config.weights if config.has_file else config.backbone
            raise NotMappableError(f"the weights of {where} are in no {SUFFIX} files; save them so (save_pretrained)")
        dtypes, sizes = dict[str, torch.dtype](), dict[str, int]()
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                        item = opened.get_slice(name)
                        empty = opened.get_tensor(name)[:0] if item.get_shape() else opened.get_tensor(name)
                        dtypes[name], count = empty.dtype, torch.Size(item.get_shape()).numel()
                        sizes[name] = count * empty.element_size()
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} cannot be read: {error}") from error
        return cls(tuple(files), dtypes, sizes)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of most bytes; float32 where there is none."""
        counted = Counter[torch.dtype]()
        for name, dtype in self.dtypes.items():
            if dtype.is_floating_point:
                counted[dtype] += self.sizes[name]
        return max(counted, key=counted.__getitem__, default=torch.float32)

    def check(self, blueprint: nn.Module, config: ModelConfig, stated: torch.dtype | None) -> None:
        """Check that the tensors of the files are those of the network.

        `stated` is the type that the network's own configuration states, if it does.

        Raises:
            NotMappableError: they are not.
        """
        if getattr(getattr(blueprint, "config", None), "quantization_config", None) is not None:
            raise NotMappableError(f"the weights of {config.backbone} are quantized; use those in floating point")
        converters = [one for one in _conversions(blueprint) if isinstance(one, WeightConverter)]
        for name in self.dtypes:
            if any(one.rename_source_key(name)[1] is not None for one in converters):
                raise NotMappableError(
                    f"the weights of {config.backbone} are arranged anew when they are loaded ({name}); save them once "
                    "as the network has them, by save_pretrained(folder, save_original_format=False)"
                )
        if stated not in (None, self.dtype):
            stored, wanted = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, stated))
            raise NotMappableError(
                f"the weights of {config.backbone} are {stored} in their files, and its configuration says {wanted}; "
                f"set model.options to {{dtype: {stored}}}, and model.dtype to {wanted} to compute so"
            )


def _files(source: str, arguments: dict[str, Any]) -> list[Path]:
    """Return the files that `from_pretrained` reads for `source`; none where they are no safetensors files."""
    options = {**arguments, "_raise_exceptions_for_missing_entries": False}
    options.pop("trust_remote_code", None)
    if (single := cached_file(source, SAFE_WEIGHTS_NAME, **options)) is not None:
        return [Path(single)]
    if (index := cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)) is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if wrong := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index} names {wrong[0]!r}; a file of weights lies beside it")
    found = [cached_file(source, name, **options) for name in names]
    return [Path(file) for file in found if file is not None]


def _conversions(blueprint: Any) -> list[Any]:
    mapping: Any = get_model_conversion_mapping
    return list(mapping(blueprint))
