"""Weights from a file into a network: matched by name, or else by position when every shape agrees."""

import logging
import pickle
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipeline.errors import ConfigError, ModelError, first_few
from pipeline.files import check_sha256, locate
from pipeline.models.config import ModelConfig
from pipeline.precision import HALF, weights_dtype

log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
WRAPPERS = ("state_dict", "model")
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
PLAIN = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
EXPANDING = PLAIN | {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
"""Names in the package efficientnet_pytorch -> in timm: of layers outside of blocks, in blocks, in expanding blocks."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside, and restore their state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def parameters_on_meta(on: bool = True) -> Iterator[None]:
    """If `on`, modules built inside have their parameters on the meta device, without values and memory.

    Buffers and other tensors have their values. Parameters stay tied, as they do not in accelerate's
    `init_empty_weights`.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and not is_lazy(param):
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(module, name, param)

    if not on:
        yield
        return
    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors`, by name, in place of the parameters and the buffers of `network`, without copying them.

    Others stay as they are, and tied parameters stay tied. Tensors that `network` has no name for are ignored.

    Raises:
        ValueError: one has another shape.
    """
    held = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    wrong = [name for name, item in held if name in tensors and tensors[name].shape != item.shape]
    if wrong:
        raise ValueError(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, another shape than the network's")
    given = {id(item): tensors[name] for name, item in held if name in tensors}
    parameters = {
        id(item): nn.Parameter(given[id(item)], item.requires_grad)
        for item in network.parameters()
        if id(item) in given
    }
    for module in network.modules():
        for name, item in module._parameters.items():
            module._parameters[name] = item if item is None else parameters.get(id(item), item)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else given.get(id(buffer), buffer)


def convert(network: nn.Module, dtype: torch.dtype, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Convert the floating-point tensors of the state dict of `network`, all or those of `names`, to `dtype` in place.

    Returns those that lost precision, as they were, by name. Buffers that are not saved keep their type, as in
    transformers.
    """
    wider = wider_than(network, dtype, names)
    for name, item in network.state_dict(keep_vars=True).items():
        if item.is_floating_point() and (names is None or name in names):
            item.data = item.data.to(dtype)
    return wider


def wider_than(network: nn.Module, dtype: torch.dtype, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors that `convert` would return, by name; nothing is converted."""
    return {
        name: item.detach()
        for name, item in network.state_dict(keep_vars=True).items()
        if item.is_floating_point() and item.dtype.itemsize > dtype.itemsize and not item.is_meta
        if names is None or name in names
    }


@dataclass(frozen=True)
class CheckpointLayout:
    """Tensors of a network with its classifier, in the order of its state dict."""

    shapes: Mapping[str, torch.Size]
    head: frozenset[str]
    """Names of the classifier's tensors: they may be absent from a file, or of another size."""

    @classmethod
    def of(cls, build: Callable[[int], nn.Module]) -> "CheckpointLayout":
        """Find the classifier of what `build(classes)` makes: the tensors whose size follows the classes."""
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in build(2).state_dict().items()}
            others = {name: tensor.shape for name, tensor in build(3).state_dict().items()}
        return cls(shapes, frozenset(name for name in shapes if shapes[name] != others.get(name)))

    @property
    def sizes(self) -> dict[str, int]:
        """Return the axis that counts the classes of each of the classifier's tensors that `of` found."""
        return {name: self.shapes[name].index(2) for name in self.head}


def read_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of the file that `config.weights` names, after its digest is checked. Nothing is unpickled.

    Raises:
        AbsentError: the file is missing.
        ConfigError: it is of unknown kind, or has another digest.
        ModelError: it holds no state dict.
    """
    path = locate(str(config.weights), "model.weights")
    check_sha256(path, config.sha256, "model")
    if path.suffix != ".safetensors" and path.suffix not in TORCH_SUFFIXES:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ConfigError(f"model.weights is {config.weights!r}; expected a name that ends in {known}")
    loaded = _read_tensors(path)
    state = {name.removeprefix("module."): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ModelError(f"model.weights {path} has no tensors by name, but {', '.join(map(str, loaded)) or 'nothing'}")
    return state


def _read_tensors(path: Path) -> Mapping[str, object]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.weights {path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        remedy = "save model.state_dict() alone"
        raise ModelError(f"model.weights {path} holds Python objects, which are never unpickled; {remedy}") from error
    except Exception as error:  # on damaged bytes the reader fails in many ways
        raise ModelError(f"model.weights {path} cannot be read: {type(error).__name__}: {error}") from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ModelError(f"model.weights {path} holds {type(loaded).__name__}; expected a state dict")
    return loaded


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], layout: CheckpointLayout, where: str) -> frozenset[str]:
    """Copy `state` into `model`; return the names of head tensors that it lacks or has in another shape.

    These keep their initial weights. `model` may lack the classifier of `layout`.
    Raises ModelError if any other tensor is missing, unexpected or of another shape.
    """
    state = with_timm_names(state, layout.shapes)
    if faults := _name_faults(state, layout):
        if (renamed := _by_position(state, layout)) is None:
            raise ModelError(f"{where} does not fit the backbone: {'; '.join(faults)}")
        log.warning("%s: no names match, but all %d shapes do in their order; matched by position", where, len(state))
        state = renamed
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    fresh = [name for name in own if name not in fitting and name in layout.head]
    if fresh:
        log.info("%s: the classifier is new (%s)", where, ", ".join(fresh))
    model.load_state_dict(own | fitting)
    if (dtype := weights_dtype(fitting.values())) in HALF:
        convert(model, dtype, fitting)
    return frozenset(fresh)


def _name_faults(state: Mapping[str, Tensor], layout: CheckpointLayout) -> list[str]:
    body = set(layout.shapes) - layout.head
    # Files from before batch norm counted its batches lack this count, which evaluation does not use.
    missing = [name for name in layout.shapes if name in body - set(state) and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in layout.shapes]
    shapes = {name: (tensor.shape, layout.shapes[name]) for name, tensor in state.items() if name in body}
    mismatched = [f"{name} {list(own)} for {list(known)}" for name, (own, known) in shapes.items() if own != known]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    return [f"{len(names)} {kind}: {first_few(names)}" for kind, names in kinds.items() if names]


def _by_position(state: Mapping[str, Tensor], layout: CheckpointLayout) -> dict[str, Tensor] | None:
    """Rename `state` to the names of `layout` in order; None unless shapes and kinds (weight, bias, ...) all agree."""
    for names in (list(layout.shapes), [name for name in layout.shapes if name not in layout.head]):
        if len(names) == len(state) and all(
            name in layout.head
            or (tensor.shape == layout.shapes[name] and other.rpartition(".")[2] == name.rpartition(".")[2])
            for name, (other, tensor) in zip(names, state.items(), strict=True)
        ):
            return dict(zip(names, state.values(), strict=True))
    return None


def with_timm_names(state: Mapping[str, Tensor], names: Iterable[str]) -> Mapping[str, Tensor]:
    """Return a `state` of the package efficientnet_pytorch under the `names` of timm; others unchanged.

    The package counts all blocks (`_blocks.1._expand_conv`), timm the stages and their blocks (`blocks.1.0.conv_pw`).
    """
    blocks = sorted({tuple(map(int, name.split(".")[1:3])) for name in names if name.startswith("blocks.")})
    if "_conv_stem.weight" not in state or not blocks:
        return state
    renamed = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        if layer == "_blocks":
            number, layer, rest = rest.split(".", 2)
            stage, index = blocks[int(number)]
            table = EXPANDING if f"_blocks.{number}._expand_conv.weight" in state else PLAIN
            renamed[f"blocks.{stage}.{index}.{table.get(layer, layer)}.{rest}"] = tensor
        else:
            renamed[f"{OUTER.get(layer, layer)}.{rest}"] = tensor
    return renamed
