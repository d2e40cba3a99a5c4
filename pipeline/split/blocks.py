"""The blocks of a network, its repeated units in execution order, and the cut that a user's `at` names."""

import difflib

from torch import nn

from pipeline.errors import NoSuchCutError
from pipeline.split.cut import Cut
from pipeline.split.forward import Call

FEW_BLOCKS = 4
MOST = 0.5  # an inner container that holds more than this share of a block's parameters is a stage of smaller blocks
SHARED = 0.3  # a module that holds more than this share of the model and is called often is a layer with shared weights


def find_blocks(model: nn.Module, calls: list[Call]) -> list[Call]:
    """Return the blocks of `model` in execution order, without the head that runs after the last one."""
    finder = _BlockFinder(model, calls)
    finder.visit("")
    blocks = sorted(finder.without_stems(), key=lambda call: call.start)
    if len(blocks) < FEW_BLOCKS:
        blocks = finder.shared_layer() or max(blocks, finder.top_level(), key=len)
    return _without_head(model, calls, blocks)


def boundaries(model: nn.Module, calls: list[Call], blocks: list[Call]) -> list[Cut]:
    """Return the cuts between blocks: number k is after k blocks, number 0 at the inputs.

    The last one is before the head. Where there is none, in a bare encoder, it is before the last block.
    """
    head = _head(model, calls, blocks) if blocks else None
    starts = [calls[0], *blocks[1:], *([head] if head else [])]
    return [Cut(call.path, call.index, before, len(blocks)) for before, call in enumerate(starts)]


def resolve(model: nn.Module, at: float | str, calls: list[Call], blocks: list[Call]) -> Cut:
    """Return the cut that `at` names: a share of the blocks, their number, or a module path; see `split`.

    Raises:
        NoSuchCutError: there is no such share or number, or no such module is called; the message names the nearest.
    """
    if isinstance(at, str):
        return _by_path(model, at, calls, blocks)
    cuts = boundaries(model, calls, blocks)
    last = len(cuts) - 1
    if 0 <= at <= 1:
        return cuts[min(round(at * len(blocks)), last)]
    if isinstance(at, int) and 2 <= at <= last:
        return cuts[at]
    numbers = f" and 2..{last} (a whole number of blocks)" if last >= 2 else ""
    nearest = cuts[max(0, min(round(at), last))]
    raise NoSuchCutError(
        f"cut {at!r} is outside 0..1 (a share of the blocks){numbers}; give one of these, or a module path; "
        f"the nearest is {nearest.name or 0!r}"
    )


def _by_path(model: nn.Module, at: str, calls: list[Call], blocks: list[Call]) -> Cut:
    path, mark, number = at.partition("#")
    called = [call for call in calls if call.path == path]
    if mark and not number.isdecimal():
        raise NoSuchCutError(
            f"cut {at!r}: {number!r} after # is no number of a call; give {path!r}, or {path + '#2'!r}"
        )
    index = int(number or 0)
    if index < len(called):
        call = _block_entered(model, called[index], calls, blocks)
        return Cut(call.path, call.index, sum(block.start < call.start for block in blocks), len(blocks))
    if called:
        raise NoSuchCutError(
            f"cut {at!r}: module {path!r} is called {len(called)} time(s) on the example; use 0..{len(called) - 1}"
        )
    names = list(dict.fromkeys(call.path for call in calls if call.path))
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or [block.path for block in blocks[:3]]
    known = path in dict(model.named_modules())
    fault = "is never called on the example" if known else "does not exist"
    raise NoSuchCutError(f"cut {at!r}: module {path!r} {fault}; the nearest are {', '.join(map(repr, near))}")


def _block_entered(model: nn.Module, call: Call, calls: list[Call], blocks: list[Call]) -> Call:
    """Return the block that `call` begins with, if only plain `nn.Sequential`s are entered between; else `call`.

    So a stage of a network and its first block are one cut.
    """
    for entered in calls[calls.index(call) :] if call.path else []:
        if entered in blocks:
            return entered if entered.start < call.end else call
        if type(model.get_submodule(entered.path)) is not nn.Sequential:
            break
    return call


def _head(model: nn.Module, calls: list[Call], blocks: list[Call]) -> Call | None:
    """Return the first call with parameters that starts after the last block ended."""
    end = max((block.end for block in blocks), default=0)
    later = (call for call in calls if call.start > end)
    return next((call for call in later if parameter_count(model.get_submodule(call.path))), None)


def _without_head(model: nn.Module, calls: list[Call], blocks: list[Call]) -> list[Call]:
    """Drop a trailing classifier: a container of single layers at the end, else a single layer that nothing follows."""
    if not blocks or _head(model, calls, blocks) is not None:
        return blocks
    last = _parent(blocks[-1].path)
    tail = [block for block in blocks if _parent(block.path) == last]
    if len(tail) < len(blocks) and all(is_layer(model.get_submodule(block.path)) for block in tail):
        return [block for block in blocks if block not in tail]
    return blocks[:-1] if len(blocks) > 1 and is_layer(model.get_submodule(blocks[-1].path)) else blocks


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def is_layer(module: nn.Module) -> bool:
    """Return whether `module` is a single layer (a convolution with its norm), too small to be a block among blocks.

    A module that takes the place of one says so: `is_single_layer`.
    """
    declared = getattr(module, "is_single_layer", False) is True
    return declared or sum(parameter.dim() > 1 for parameter in module.parameters()) <= 1


def parameter_count(module: nn.Module) -> int:
    """Return how many numbers the parameters of `module` hold."""
    return sum(parameter.numel() for parameter in module.parameters())


class _BlockFinder:
    """Walks the containers of a model and collects their called, parameter-holding children."""

    def __init__(self, model: nn.Module, calls: list[Call]) -> None:
        self.model = model
        self.calls = calls
        self.called: dict[str, list[Call]] = {}
        for call in calls:
            self.called.setdefault(call.path, []).append(call)
        self.found: list[Call] = []

    def visit(self, path: str) -> None:
        module = self.model.get_submodule(path)
        containers = {path: module} if _is_container(module) else self.containers(path, module)
        for prefix, container in containers.items():
            owner = _parent(prefix)
            if path not in (owner, prefix) and any(is_layer(child) for child in container.children()):
                self.consider(owner)  # layers inside a module that is in no container itself
                continue
            for name, _ in container.named_children():
                self.consider(f"{prefix}.{name}" if prefix else name)

    def consider(self, path: str) -> None:
        module = self.model.get_submodule(path)
        if not parameter_count(module):
            return
        if _is_container(module) or self.is_stage(path, module):
            self.visit(path)
        else:
            self.found += [call for call in self.entries(path) if call not in self.found]

    def entries(self, path: str) -> list[Call]:
        """Return the one call of the module at `path`; none if it is called repeatedly.

        `block.forward(...)` called directly runs no hook: it is entered at the first module inside that does.
        """
        calls = self.called.get(path)
        if calls is None:
            inside = [c for c in self.calls if c.path.startswith(f"{path}.") and len(self.called[c.path]) == 1]
            return inside[:1]
        return calls if len(calls) == 1 else []

    def without_stems(self) -> list[Call]:
        """Return what was found, without containers of single layers (a stem, a downsampling) beside larger blocks."""
        composed = {_parent(call.path) for call in self.found if not is_layer(self.model.get_submodule(call.path))}
        return [call for call in self.found if not composed or _parent(call.path) in composed]

    def is_stage(self, path: str, module: nn.Module) -> bool:
        """Return whether `module` is mostly one container of blocks of one type, each of them called."""
        return any(
            parameter_count(inner) > MOST * parameter_count(module)
            and _is_homogeneous(inner)
            and not any(is_layer(child) for child in inner.children())
            and all(f"{inner_path}.{name}" in self.called for name, _ in inner.named_children())
            for inner_path, inner in self.containers(path, module).items()
        )

    def containers(self, path: str, module: nn.Module) -> dict[str, nn.Module]:
        """Return the outermost plain containers strictly inside `module`."""
        found: dict[str, nn.Module] = {}
        for name, inner in module.named_modules(prefix=path):
            if name != path and _is_container(inner) and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = inner
        return found

    def shared_layer(self) -> list[Call]:
        """Return the calls of one big layer that is called repeatedly (ALBERT): each call is a block."""
        total = parameter_count(self.model)
        for path, calls in self.called.items():
            if path and len(calls) >= FEW_BLOCKS and parameter_count(self.model.get_submodule(path)) > SHARED * total:
                return calls
        return []

    def top_level(self) -> list[Call]:
        """Return the calls of the children of a small model without repeated units."""
        found: list[Call] = []
        for name, child in self.model.named_children():
            for path in [f"{name}.{key}" for key, _ in child.named_children()] if _is_container(child) else [name]:
                if parameter_count(self.model.get_submodule(path)):
                    found += (self.called.get(path) or self.entries(path))[:1]
        return sorted(found, key=lambda call: call.start)


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList)


def _is_homogeneous(container: nn.Module) -> bool:
    kinds = [type(child) for child in container.children() if parameter_count(child)]
    return len(kinds) > 1 and len(set(kinds)) == 1
