"""The check whether a model can be split at all, with a remedy where it cannot, and copies of models."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pipeline.errors import SplitError
from pipeline.split.forward import eval_mode

WRAPPERS = {
    "OptimizedModule": ("torch.compile", "_orig_mod", "compile the suffix instead"),
    "DataParallel": ("nn.DataParallel", "module", "wrap the suffix in DistributedDataParallel instead"),
    "DistributedDataParallel": ("DistributedDataParallel", "module", "wrap the suffix instead"),
    "FullyShardedDataParallel": ("FullyShardedDataParallel", None, "shard the suffix instead"),
    "FSDPModule": ("fully_shard", None, "shard the suffix instead"),
    "DeepSpeedEngine": ("DeepSpeed", "module", "give the suffix to deepspeed.initialize instead"),
}
"""Class that runs another module in its own way -> its public name, the attribute of that module, what to do."""


def check_model(model: object) -> None:
    """Refuse a model that cannot be split or merged into at any cut.

    Raises:
        SplitError: `model` is no module, is wrapped or exported by something that runs it in its own way, or holds
            tensors without values of their own; the message says what to give instead.
    """
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise SplitError(f"the model is {found}, no nn.Module; give an instance of the module that holds the layers")
    for path, module in model.named_modules():
        _check_module(path, module)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if fault := _fault(tensor):
            raise SplitError(f"the model's tensor {name!r} {fault}")
    if next(model.parameters(), None) is None:
        raise SplitError(
            f"the model ({type(model).__name__}) has no parameters, so that nothing would train after a cut; give one "
            "that has, and of a quantized model the one in floating point"
        )
    try:
        with eval_mode(model):
            pass
    except NotImplementedError as error:
        raise SplitError(f"the model has no eval mode ({error}); give the module that it was exported from") from error


def _check_module(path: str, module: nn.Module) -> None:
    place = f"module {path!r} of the model" if path else "the model"
    if isinstance(module, torch.jit.ScriptModule):
        raise SplitError(
            f"{place} is a ScriptModule, whose forward is no Python code and takes no hooks; "
            "give the nn.Module that was scripted or traced"
        )
    wrapper = next((WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in WRAPPERS), None)
    if wrapper is not None:
        name, attribute, instead = wrapper
        remedy = f"put model.get_submodule({path!r}).{attribute} in its place" if path else f"give model.{attribute}"
        if attribute is None:
            remedy = f"split the model before {name} is applied to it"
        raise SplitError(f"{place} is wrapped by {name}; {remedy}, and {instead}")


def _fault(tensor: Tensor) -> str | None:
    """Return why a tensor of the model has no values that can be read and copied, or None."""
    if is_lazy(tensor):
        return "has no shape yet: its module is lazy; run the model on a batch before it is split"
    if tensor.is_meta:
        return (
            "is on the meta device, without values; load the weights first, as by "
            "model.load_state_dict(weights, assign=True)"
        )
    if bool(is_traceable_wrapper_subclass(tensor)):
        return (
            f"is a {type(tensor).__name__}, which holds its values in its own way; split the model before it is "
            "sharded or quantized, and do that to the suffix instead"
        )
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}; convert it by to_dense()"
    return None


def copy_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy of `model`, in which the objects of `memo` replace the originals of these ids.

    Where a module holds what cannot be copied, SplitError names it.
    """
    try:
        twin: nn.Module = copy.deepcopy(model, dict(memo))
    except (TypeError, RuntimeError, NotImplementedError) as error:
        path = _uncopied(model, memo)
        place = f"module {path!r} of the model" if path else "the model"
        raise SplitError(
            f"{place} cannot be copied ({type(error).__name__}: {error}); let it hold no locks, files or results of "
            "computation as attributes, or define its __deepcopy__"
        ) from error
    return twin


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
    """Return the path of the innermost module that cannot be copied."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for path in reversed(modules):
        try:
            copy.deepcopy(modules[path], dict(memo))
        except Exception:
            return path
    return ""
