"""A causal network with its own head -> the loss of each token, without the logits of all tokens at once.

The network's own code computes everything, in two parts: all before the head's linear layer once, and what follows it
(soft-capping, scaling) on the logits of some tokens at a time. Gradients are computed from logits that are computed
again. `torch.nn.functional.linear_cross_entropy` does this too, but for nothing after the linear layer, and not token
by token. Networks that cannot be divided so give all logits at once.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.tasks.base import Head

# B batch, T token, N counted token, D channel, V vocabulary

MASK = "completion_mask"
"""Input of each token: 1 where the network is to write it, 0 where it is given, -1 for padding."""
LOGITS_AT_ONCE = 2**23
"""Number of logits that are held at a time."""
ROWS_AT_ONCE = 2**13
"""Rows of the head's gradient that are computed at a time where they must be converted."""


@dataclass(frozen=True)
class HeadParts:
    """How the forward of a network is divided at its head.

    Attributes:
        head: name of the linear layer, a child of the network.
        body: path of the module whose output the head begins with.
    """

    head: str
    body: str

    @classmethod
    def of(cls, network: Any) -> "HeadParts | None":
        """Find the parts of a network on the meta device; None where its forward cannot be divided."""
        head = network.get_output_embeddings()
        name = next((name for name, child in network.named_children() if child is head), None)
        if name is None or type(head).forward is not nn.Linear.forward:
            return None
        paths = {module: path for path, module in network.named_modules()}
        for body in (network.base_model, network.get_decoder()):
            path = paths.get(body, "")
            inside = {id(item) for module in (body, head) for item in module.parameters()}
            if path and body is not head and all(id(item) in inside for item in network.parameters()):
                parts = cls(name, path)
                if parts._work(network):
                    return parts
        return None

    def hidden(self, network: nn.Module, **inputs: Any) -> Tensor:
        """Return what the head's linear layer is given, (B, T, D)."""
        given: list[Tensor] = []

        def take(hidden_BTD: Tensor) -> Tensor:
            given.append(hidden_BTD)
            return hidden_BTD[..., :1].detach()

        twin = _with_forward(network, self.head, take)
        type(twin).forward(twin, **inputs)
        (hidden_BTD,) = given
        return hidden_BTD

    def finish(self, network: nn.Module, logits_NV: Tensor) -> Tensor:
        """Return the logits of the network, (N, V), from those that the head's linear layer gives."""
        twin = _with_forward(self._without_body(network, len(logits_NV)), self.head, lambda _: logits_NV[None])
        finished: Tensor = type(twin).forward(twin).logits[0]
        return finished

    def _without_body(self, network: nn.Module, tokens: int) -> nn.Module:
        head: Any = network.get_submodule(self.head)
        output = _Output([head.weight.new_zeros(1, 1, head.in_features).expand(1, tokens, -1)])
        return _with_forward(network, self.body, lambda *_, **__: output)

    def _work(self, network: nn.Module) -> bool:
        """Return whether the head is called once, with what the body gives, and nothing else decides the logits."""
        head: Any = network.get_submodule(self.head)
        logits_NV = torch.empty(3, head.out_features, device="meta")
        try:
            with torch.no_grad():
                hidden_1ND = self.hidden(self._without_body(network, 3))
                finished_NV = self.finish(network, logits_NV)
        except Exception:  # the network's own code meets stand-ins, and may raise anything
            return False
        return hidden_1ND.shape == (1, 3, head.in_features) and finished_NV.shape == logits_NV.shape


class _Output(tuple[Tensor, ...]):
    """Hidden states (B, T, D) alone: other fields that a network may read are None."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class _StandIn(nn.Module):
    """A module with the attributes of another one, but not its hooks, and with another `forward`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__.update(module=module, forward=forward)  # not a child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def _with_forward(network: nn.Module, path: str, forward: Callable[..., Any]) -> nn.Module:
    """Return a shallow copy of `network` in which the module at `path` has another `forward`; the rest is shared."""
    if not path:
        return _StandIn(network, forward)
    name, _, rest = path.partition(".")
    twin = copy.copy(network)
    twin._modules = {**network._modules, name: _with_forward(network.get_submodule(name), rest, forward)}
    return twin


def as_language_model(network: Any, blueprint: nn.Module, head: Head) -> "LanguageModel":
    """Return `network` with the losses of a language head; `blueprint` is the network on the meta device.

    Raises ModelError if it has no logits for token ids alone, or a token changes the logits of earlier ones; not tried
    where `network` has no weights.
    """
    model = LanguageModel(network, HeadParts.of(blueprint), on_all=head.on_all)
    if head.untied and model.is_tied:
        own = network.get_output_embeddings()
        own.weight = nn.Parameter(own.weight.detach().clone())
    if not any(item.is_meta for item in network.parameters()):
        _check_causal(network)
    return model


def _check_causal(network: Any) -> None:
    ids_2T = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % network.config.get_text_config().vocab_size
    training = network.training
    try:
        with torch.no_grad():
            first_TV, second_TV = network.eval()(input_ids=ids_2T).logits[:, :-1]
    except Exception as error:  # the network's own code, which may raise anything
        raise ModelError(
            f"{type(network).__name__} has no logits for token ids alone, which language models need; choose another "
            f"backbone: {error}"
        ) from error
    network.train(training)
    if not torch.allclose(first_TV, second_TV, rtol=1e-3, atol=1e-3 * float(first_TV.abs().max())):
        raise ModelError(
            f"{type(network).__name__} is no language model as it is configured: a token changes the logits of the "
            "tokens before it; set model.options to {is_decoder: true} if it has that option, or choose another "
            "backbone"
        )


class LanguageModel(nn.Module):
    """A causal network -> per token (B, T, 3) float32: loss, distance to the likeliest, whether it is counted.

    The loss is the cross entropy of the token given those before it, in nats. The distance is that of its logit to the
    largest one, 0 where the token is (among) the likeliest. Tokens that are not counted have zeros: the first of each
    text, padding, and, unless all are trained on, those with 0 in the mask.
    """

    def __init__(self, backbone: nn.Module, parts: HeadParts | None, *, on_all: bool) -> None:
        """Divide `backbone` by `parts`; None computes all logits at once."""
        super().__init__()
        self.backbone, self.parts, self.on_all = backbone, parts, on_all

    @property
    def is_tied(self) -> bool:
        """True if the head and the token embeddings are one tensor."""
        network: Any = self.backbone
        return network.get_output_embeddings().weight is network.get_input_embeddings().weight

    @property
    def head_weight(self) -> str:
        """Name of the head's weight."""
        network: Any = self.backbone
        head = network.get_output_embeddings()
        return next(f"backbone.{path}.weight" for path, module in network.named_modules() if module is head)

    def training_note(self, suffix: nn.Module) -> str:
        """Return a sentence about the head in `suffix`, of a network like this one: what trains, and what stays."""
        network: Any = suffix.get_submodule("backbone")
        trains = network.get_output_embeddings().weight.requires_grad
        if not self.is_tied:
            return f"the head {'trains' if trains else 'stays as it is'}"
        if trains:
            return "the head shares its weights with the token embeddings, and they train as one"
        return (
            "the head shares its weights with the token embeddings, and stays as it is; task.untie_head: true gives it "
            "its own, which train"
        )

    def forward(self, input_ids: Tensor, completion_mask: Tensor, **inputs: Any) -> Tensor:
        counted_BT = completion_mask >= (0 if self.on_all else 1)
        counted_BT = counted_BT & (torch.arange(counted_BT.shape[1], device=counted_BT.device) > 0)
        before_BT, targets_N = counted_BT.roll(-1, 1), input_ids[counted_BT].long()
        inputs["input_ids"] = input_ids
        if self.parts is None:
            values_N2 = _values(self.backbone(**inputs).logits[before_BT], targets_N)
        else:
            head = self.backbone.get_submodule(self.parts.head)
            hidden_ND = self.parts.hidden(self.backbone, **inputs)[before_BT]
            finish = partial(self.parts.finish, self.backbone)
            values_N2 = HeadLosses.apply(hidden_ND, head.weight, head.bias, targets_N, finish)
        output_BT3 = values_N2.new_zeros(*counted_BT.shape, 3)
        output_BT3[counted_BT] = F.pad(values_N2, (0, 1), value=1.0)
        return output_BT3


def _values(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the loss of each target, and the distance of its logit to the largest, which has no gradient: (N, 2)."""
    logits_NV = logits_NV.float()
    with torch.no_grad():
        distance_N = logits_NV.amax(1) - logits_NV.gather(1, targets_N[:, None])[:, 0]
    return torch.stack([F.cross_entropy(logits_NV, targets_N, reduction="none"), distance_N], dim=1)


class HeadLosses(torch.autograd.Function):
    """Hidden states (N, D) -> `_values` (N, 2) of the logits of a linear layer, some tokens at a time.

    In its backward pass the logits are computed again, and the gradient of the weight is added up in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        device = hidden_ND.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        ctx.finish = finish
        values_N2 = hidden_ND.new_empty(len(hidden_ND), 2, dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            linear = _Linear(weight_VD, bias_V, ctx.dtype)
            for part in _parts(len(hidden_ND), len(weight_VD)):
                values_N2[part] = _values(finish(linear(hidden_ND[part])), targets_N[part])
        return values_N2

    @staticmethod
    def backward(ctx: Any, gradient_N2: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        linear = _Linear(weight_VD, bias_V, ctx.dtype)
        of_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        of_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        of_bias_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for part in _parts(len(hidden_ND), len(weight_VD)):
            with torch.enable_grad():
                logits_NV = linear(hidden_ND[part]).requires_grad_()
                values_N2 = _values(ctx.finish(logits_NV), targets_N[part])
            (of_logits_NV,) = torch.autograd.grad(values_N2, logits_NV, gradient_N2[part])
            del logits_NV, values_N2
            if of_hidden_ND is not None:
                of_hidden_ND[part] = of_logits_NV @ linear.weight_VD
            if of_weight_VD is not None:
                _add_product(of_weight_VD, of_logits_NV, hidden_ND[part].to(ctx.dtype))
            if of_bias_V is not None:
                of_bias_V += of_logits_NV.sum(0)
        return of_hidden_ND, of_weight_VD, of_bias_V, None, None


class _Linear:
    """A linear layer that computes in `dtype`, without a graph."""

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> None:
        self.weight_VD = weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(dtype)

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        return F.linear(hidden_ND.detach().to(self.weight_VD.dtype), self.weight_VD, self.bias_V)


def _parts(tokens: int, words: int) -> Iterator[slice]:
    """Divide tokens so that those of a part have at most `LOGITS_AT_ONCE` logits."""
    size = max(1, LOGITS_AT_ONCE // words)
    return (slice(begin, begin + size) for begin in range(0, tokens, size))


def _add_product(total_VD: Tensor, left_NV: Tensor, right_ND: Tensor) -> None:
    """Add the product of the transposed `left_NV` and `right_ND` to `total_VD`, which may be of a wider type."""
    if total_VD.dtype == left_NV.dtype:
        total_VD.addmm_(left_NV.T, right_ND)
        return
    for begin in range(0, len(total_VD), ROWS_AT_ONCE):
        rows = slice(begin, begin + ROWS_AT_ONCE)
        total_VD[rows] += left_NV[:, rows].T @ right_ND
