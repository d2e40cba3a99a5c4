"""Where the weights of a network are while it encodes: in memory, or in their files (`encode.placement`)."""

import logging

import torch

from pipeline.device import free_memory, pick_device
from pipeline.errors import ConfigError, NotMappableError
from pipeline.memory import free_bytes
from pipeline.models import Backbone, load
from pipeline.project.settings import Project
from pipeline.tasks import Head

log = logging.getLogger("recycle")


def load_placed(project: Project, head: Head) -> Backbone:
    """Return the backbone that `load` returns, with its weights where `encode.placement` says.

    Raises:
        ConfigError: it is "stream", and these weights cannot stay in their files; the message says why.
        AbsentError, ModelError: as `load`.
    """
    placement = project.encode.placement
    if placement == "memory" or (placement == "auto" and not _is_too_large(project)):
        return load(project.model, project.preprocess, head)
    try:
        _check(project)
        return load(project.model, project.preprocess, head, mapped=True)
    except NotMappableError as reason:
        if placement == "stream":
            raise ConfigError(f"encode.placement is stream, but {reason}; or set it to memory") from reason
        log.warning("%s; so they are loaded into memory, which may be too small for them", reason)
        return load(project.model, project.preprocess, head)


def _check(project: Project) -> None:
    for name in ("compile", "channels_last"):
        if getattr(project.encode, name):
            raise NotMappableError(f"encode.{name} is true, which copies all weights; set it to false")
    device = pick_device(project.encode.device)
    if not torch._has_compatible_shallow_copy_type(torch.empty(0), torch.empty(0, device=device)):
        raise NotMappableError(f"a block's weights cannot be put on {device} in place; set encode.device to cpu")


def _is_too_large(project: Project) -> bool:
    """Return whether weights that could stay in their files, with the batches, exceed the free memory of the device."""
    if project.model.library != "hf" or project.model.weights is None:
        return False
    from pipeline.models.hf import checkpoint_of  # noqa: PLC0415  (slow to import)

    try:
        size = checkpoint_of(project.model).size
    except (ConfigError, OSError):
        return False  # `load` says what is wrong, or takes weights in other files
    device = pick_device(project.encode.device)
    free = free_bytes() if device.type == "cpu" else free_memory(device)
    if device.type != "cpu" and not free:  # it is unknown
        return False
    needed = size + int(project.encode.memory_gb * 1e9)
    if needed > free:
        log.info("%.1f GB of weights and batches exceed the free memory, %.1f GB: streamed", needed / 1e9, free / 1e9)
    return needed > free
