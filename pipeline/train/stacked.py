"""Several runs of a small suffix at once, which differ only in learning rates, weight decay and seed.

A step of a small suffix is mostly overhead: reading a batch, calling modules, updating parameters. Here a batch is read
once for all runs of a seed, the batches of all seeds go through all suffixes in one call (`torch.func.vmap`), and one
update serves all runs. Curves and scores are those of single runs within rounding. Nothing is saved before the end.

K runs: S seeds with R runs each; B batch.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector

from pipeline.errors import RecyclingError, TrainError
from pipeline.split import Suffix
from pipeline.split.forward import state_kept
from pipeline.tasks import Task, read_tensor
from pipeline.train.checkpoint import Progress, save_trained
from pipeline.train.config import TrainConfig
from pipeline.train.fit import training_row
from pipeline.train.loader import Batch, Loader
from pipeline.train.objective import Objective, to_device
from pipeline.train.rounds import Batches, Rounds
from pipeline.train.stacked_steps import OPTIMIZERS, OneProduct, StackedOptimizer, by_seed

log = logging.getLogger("recycle")

MOST_PARAMETERS = 2**20
"""Parameters of the largest suffix that is stacked: with gradients and moments, 32 times so many are 0.5 GB."""
MOST_FLOPS = 10**8
"""Of a step, that is a few milliseconds of a core: in longer ones there is little overhead to save."""
TOLERANCE = 1e-3
"""Largest difference of loss, gradient and buffers from those of a single run, relative to the largest element."""


@dataclass(frozen=True)
class StackedRun:
    """A run of a stack; runs of one seed have the same batches."""

    config: TrainConfig
    training: Batches
    checkpoint: Path


def fit_stacked(
    suffix: nn.Module,
    task: Task,
    runs: Sequence[StackedRun],
    validation: Iterable[Batch],
    *,
    device: torch.device,
    fresh: frozenset[str] = frozenset(),
) -> list[str | None]:
    """Train `runs`, sorted by seed, from the weights of `suffix`; save each so that `fit` has nothing left to train.

    Returns the message of each run that failed, None for the others. `fresh` is as for `fit`.

    Raises:
        TrainError: trained at once, the runs would not be those of `fit`; the message is the reason.
    """
    stack = Stack(suffix, task, runs, device, fresh)
    progress = [Progress(initial=scores[task.monitor]) for scores in stack.evaluate(validation)]
    failed: list[str | None] = [None for _ in runs]
    kept: list[dict[str, Tensor]] = [{} for _ in runs]
    config, rounds = runs[0].config, stack.rounds
    for number in range(len(rounds)):
        began = time.perf_counter()
        losses = stack.train_round(number)
        seconds = (time.perf_counter() - began) / len(runs)
        for k, scores in enumerate(stack.evaluate(validation)):
            if failed[k] or progress[k].exhausted(len(rounds), config.patience):
                continue
            try:
                row = training_row(losses[k], seconds, runs[k].config, rounds, number)
            except TrainError as error:
                failed[k] = str(error)
                continue
            row |= {f"validation/{name}": value for name, value in scores.items()}
            if progress[k].take(row, scores[task.monitor], higher=task.higher_is_better) or config.keep == "last":
                kept[k] = stack.weights(k)
        log.info("%s of %d runs at once: %.3f s for each", rounds.name(number), len(runs), seconds)
    for run, message, own, weights in zip(runs, failed, progress, kept, strict=True):
        if message is None:
            save_trained(run.checkpoint, own, weights, config.keep)
    return failed


def checked(suffix: nn.Module, task: Task, runs: Sequence[StackedRun]) -> Suffix:
    """Return `suffix`; raise TrainError where it, the settings or the task rule out that `runs` are trained at once."""
    config, size = runs[0].config, sum(item.numel() for item in suffix.parameters())
    several = len({run.config.seed for run in runs}) > 1
    reasons = {
        f"train.optimizer is {config.optimizer}, not {' or '.join(OPTIMIZERS)}": config.optimizer not in OPTIMIZERS,
        f"train.precision is {config.precision}": config.precision != "no",
        "train.adapter is set": config.adapter is not None,
        "the loss learns or remembers": task.loss_module is not None,
        f"the suffix has {size:,} parameters; the limit is {MOST_PARAMETERS:,}": size > MOST_PARAMETERS,
        "epochs of the seeds differ in length": len({len(run.training) for run in runs}) > 1,
        "each seed would hold its own segments, which are read ahead": several
        and any(isinstance(run.training, Loader) and run.training.reads_ahead for run in runs),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise TrainError(reason)
    if not isinstance(suffix, Suffix):
        raise TrainError("there are several encoders")
    return suffix


@dataclass(frozen=True)
class _Part:
    """Runs of S seeds with R runs each: their places among the K, batches of each seed, tensors by name (S, R, ...)."""

    places: slice
    feeds: Sequence[Batches]
    tensors: Mapping[str, Tensor]


class Stack:
    """One suffix, and K values of each of its parameters and buffers, by name (K, ...)."""

    def __init__(
        self, suffix: nn.Module, task: Task, runs: Sequence[StackedRun], device: torch.device, fresh: frozenset[str]
    ) -> None:
        """Give all runs the values of `suffix`; raises TrainError as `fit_stacked`."""
        self._suffix, self._task, self._config = checked(suffix, task, runs), task, runs[0].config
        self._device, self._count, self._recorded = device, len(runs), list[torch.Size]()
        self.rounds = Rounds.of(self._config, len(runs[0].training))
        objective = Objective(suffix, task)
        to_device(objective, device)
        state = {id(item) for item in suffix.state_dict(keep_vars=True).values()}
        self._buffers = [name for name, item in suffix.named_buffers() if id(item) in state]
        own = dict(suffix.named_parameters()) | {name: suffix.get_buffer(name) for name in self._buffers}
        known = {id(item): name for name, item in own.items()}
        everything = [*suffix.named_parameters(remove_duplicate=False), *suffix.named_buffers(remove_duplicate=False)]
        self._names = {name: known[id(item)] for name, item in everything if id(item) in known}
        self._tensors = {name: item.detach().expand(len(runs), *item.shape).clone() for name, item in own.items()}
        configs = [run.config for run in runs]
        self._optimizer = StackedOptimizer(self._tensors, objective, configs, fresh, self.rounds.steps)
        self._parts, seeds, begin = list[_Part](), groupby(runs, key=lambda run: run.config.seed), 0
        for size, group in groupby([list(own_runs) for _, own_runs in seeds], key=len):
            feeds = [own_runs[0].training for own_runs in group]
            places = slice(begin, begin := begin + size * len(feeds))
            tensors = {name: by_seed(self._tensors[name][places], size) for name in self._buffers}
            self._parts.append(_Part(places, feeds, tensors | self._optimizer.leaves(places, size)))
        self._verify(objective, next(iter(runs[0].training)))

    def train_round(self, number: int) -> list[float]:
        """Train all runs on the batches of one round; return the mean loss of each."""
        self._suffix.train()
        totals_K, count = torch.zeros(self._count, device=self._device), 0
        feeds = [self.rounds.of_training(feed, number) for part in self._parts for feed in part.feeds]
        for given in zip(*feeds, strict=True):
            batches = iter(batch for batch, _ in given)
            for part in self._parts:
                losses = self._losses(part.tensors, list(islice(batches, len(part.feeds))))
                torch.autograd.backward(losses.sum() / self._config.gradient_accumulation)
                totals_K[part.places] += losses.detach()
            count += 1
            if given[0][1]:
                self._optimizer.step()
        return (totals_K / count).tolist()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> list[dict[str, float]]:
        """Return the metrics of each run over `batches`."""
        self._suffix.eval()
        metrics = [self._task.metrics() for _ in range(self._count)]
        tensors = {name: tensor.unsqueeze(0) for name, tensor in self._tensors.items()}
        for batch in batches:
            (outputs,) = self._outputs(tensors, [batch])
            for own, output in zip(metrics, outputs.cpu(), strict=True):
                own.update(output, batch.targets)
        return [own.compute() for own in metrics]

    @torch.no_grad()
    def weights(self, k: int) -> dict[str, Tensor]:
        """Return a copy of the state dict of run `k`."""
        for name, item in [*self._suffix.named_parameters(), *self._suffix.named_buffers()]:
            if name in self._tensors:
                item.copy_(self._tensors[name][k])
        return {name: item.clone() for name, item in self._suffix.state_dict().items()}

    def _losses(self, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> Tensor:
        """Return the loss of each run, (S * R,); losses and their miners need not work under vmap."""
        found = zip(self._outputs(tensors, batches), batches, strict=True)
        return torch.stack([self._task.loss(output, batch.targets) for outputs, batch in found for output in outputs])

    def _outputs(self, tensors: Mapping[str, Tensor], batches: Sequence[Batch]) -> Sequence[Tensor]:
        """Return the outputs of the runs with `tensors` (S, R, ...) for a batch of each seed, S times (R, B, ...)."""
        shapes = [[item.shape for item in (*batch.state.values(), *batch.inputs.values())] for batch in batches]
        if any(own != shapes[0] for own in shapes):
            each = ({name: tensor[s : s + 1] for name, tensor in tensors.items()} for s in range(len(batches)))
            return [self._outputs(own, [batch])[0] for own, batch in zip(each, batches, strict=True)]
        first = batches[0]
        if shapes[0] != self._recorded:
            self._suffix.record(first.state, **first.inputs)
            self._recorded = shapes[0]
        state = {name: torch.stack([batch.state[name] for batch in batches]) for name in first.state}
        inputs = {
            name: torch.stack([batch.inputs[name] for batch in batches])
            for name, item in first.inputs.items()
            if not item.is_floating_point()  # those have no values
        }

        def output(own: Mapping[str, Tensor], state: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
            values = {place: own[name] for place, name in self._names.items()}  # tied ones are tied again
            given = {**first.inputs, **inputs}
            return read_tensor(functional_call(self._suffix, values, (state,), given, tie_weights=False))

        with OneProduct():
            outputs: Tensor = vmap(vmap(output, in_dims=(0, None, None)))(tensors, state, inputs)
        return outputs.unbind()

    def _verify(self, objective: Objective, batch: Batch) -> None:
        """Compare the first step with that of a single run; raise TrainError as `fit_stacked`.

        Parameters without a gradient are left as they are, as by an optimizer.
        """
        from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415  (imports triton)

        objective.train()
        named = {name: item for name, item in self._suffix.named_parameters() if item.requires_grad}
        self._suffix.record(batch.state, **batch.inputs)  # else its operations are counted too
        with state_kept(self._suffix):
            random = _random_state(self._device)
            with FlopCounterMode(display=False) as counter:
                alone = objective(batch)
                gradients = torch.autograd.grad(alone, list(named.values()), allow_unused=True)
            if (flops := counter.get_total_flops()) > MOST_FLOPS:
                raise TrainError(f"a step has {flops:.1e} floating-point operations; the limit is {MOST_FLOPS:.0e}")
            if not torch.equal(random, _random_state(self._device)):
                raise TrainError("the layers or the loss draw random numbers, as dropout does")
            buffers = [self._suffix.get_buffer(name).clone() for name in self._buffers]
        used = [name for name, item in zip(named, gradients, strict=True) if item is not None]
        one = {name: item.detach()[:1].clone() for name, item in self._parts[0].tensors.items()}
        try:
            leaves = [one[name].requires_grad_() for name in used]
            losses = self._losses(one, [batch])
            found = torch.autograd.grad(losses.sum(), leaves)
        except (RuntimeError, TypeError, ValueError, RecyclingError) as error:
            raise TrainError(f"torch.func.vmap does not run these layers ({str(error).splitlines()[0]})") from error
        expected = [alone, parameters_to_vector(item for item in gradients if item is not None), *buffers]
        of_first = [losses[0], parameters_to_vector(item[0, 0] for item in found)]
        of_first += [one[name][0, 0] for name in self._buffers]
        if any(map(_differ, expected, of_first)):
            raise TrainError("under torch.func.vmap, these layers return other values")
        self._optimizer.leave_out(named.keys() - set(used))


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the random numbers of the CPU and of `device`."""
    of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return torch.cat([torch.get_rng_state(), *of_device])


def _differ(one: Tensor, other: Tensor) -> bool:
    one, other = one.detach().double(), other.detach().double()
    return not torch.allclose(one, other, rtol=0, atol=TOLERANCE * float(one.abs().max()), equal_nan=True)
