"""Checkpoints: the state of a training run, written atomically after every round."""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import TrainError
from pipeline.files import write_whole
from pipeline.store import exclusive_lock
from pipeline.train import processes

PROGRESS = "progress.json"


@dataclass
class Progress:
    """Progress of a run, saved after every round beside accelerate's state."""

    rounds: int = 0
    """Rounds that have been trained."""
    best: float = float("nan")
    best_round: int = 0
    """The round with the best score, counted from 1."""
    initial: float | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def take(self, row: dict[str, float], value: float, *, higher: bool = True) -> bool:
        """Add the figures of a round; return whether `value` is the best so far (the lowest unless `higher`).

        While the score is NaN, as without validation samples, every round counts as the best: the last one is kept.
        """
        self.rounds += 1
        self.history.append(row)
        better = math.isnan(self.best) or (value > self.best if higher else value < self.best)
        if better:
            self.best, self.best_round = value, self.rounds
        return better

    def exhausted(self, rounds: int, patience: int | None) -> bool:
        """Return whether training is over: all `rounds` are done, or the last `patience` did not improve."""
        waited = self.rounds - self.best_round
        return self.rounds >= rounds or (patience is not None and waited >= patience)


@contextmanager
def claimed_checkpoint(checkpoint: Path) -> Iterator[bool]:
    """Lock the checkpoint folder of a run; yield False where another process trains it.

    Who removes the folder does so with the lock, once the run is finished. So check that it is not, with the lock.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(checkpoint) as is_ours:
        yield is_ours


@contextmanager
def exclusive_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """Lock the checkpoint folder of a run, or raise TrainError; of several processes, the main one holds the lock."""
    if processes.rank() > 0:
        yield checkpoint
        return
    with claimed_checkpoint(checkpoint) as is_ours:
        if not is_ours:
            raise TrainError(
                f"{checkpoint} is in use: another process trains a run with these settings; wait for its end, or "
                "change a setting (start several processes of one run with torchrun)"
            )
        yield checkpoint


def resume(accelerator: Accelerator, checkpoint: Path) -> Progress:
    """Load the latest checkpoint, if there is one; the number of processes may have changed."""
    accelerator.register_save_state_pre_hook(partial(_save_plain, accelerator))
    accelerator.register_load_state_pre_hook(partial(_load_plain, accelerator))
    folders = [folder for name in (".", "latest", "previous") if ((folder := checkpoint / name) / PROGRESS).exists()]
    if not folders:
        return Progress()
    if folders[0] != checkpoint:  # else `save_trained` has left it
        accelerator.load_state(str(folders[0]))
    return Progress(**json.loads((folders[0] / PROGRESS).read_text()))


def save(
    accelerator: Accelerator, weights: Mapping[str, Tensor], checkpoint: Path, progress: Progress, *, better: bool
) -> None:
    """Commit a round: everything is written to a temporary folder, which then replaces `latest` by renames.

    `weights`, given by the main process, are those that the run would keep after this round. Every process adds the
    state of its random numbers.
    """
    beside, latest, previous = (checkpoint / name for name in ("beside", "latest", "previous"))
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside), safe_serialization=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (beside / PROGRESS).write_text(json.dumps(asdict(progress)))
    kept = _plain(weights)
    for name in ["last", "best"] if better else ["last"]:
        save_file(kept, checkpoint / f".{name}.safetensors")
        os.replace(checkpoint / f".{name}.safetensors", checkpoint / f"{name}.safetensors")
    shutil.rmtree(previous, ignore_errors=True)
    if latest.exists():
        os.rename(latest, previous)
    os.rename(beside, latest)
    shutil.rmtree(previous, ignore_errors=True)


def save_trained(checkpoint: Path, progress: Progress, weights: Mapping[str, Tensor], keep: str) -> None:
    """Save a run that needs no more training, with the `weights` that it keeps, the "best" or the "last"."""
    save_file(_plain(weights), checkpoint / f"{keep}.safetensors")
    write_whole(checkpoint / PROGRESS, json.dumps(asdict(progress)))


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` as a file holds them: in plain order, each with memory of its own; copied only where needed."""
    kept, known = dict[str, Tensor](), set[int]()
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()  # it may lie channels last
        kept[name] = plain.clone() if plain.data_ptr() in known else plain
        known.add(plain.data_ptr())
    return kept


def _save_plain(accelerator: Accelerator, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    """Save models under their own names, without the wrapper for several processes."""
    weights[:] = [accelerator.unwrap_model(model).state_dict() for model in models]


def _load_plain(accelerator: Accelerator, models: list[nn.Module], folder: str) -> None:
    models[:] = [accelerator.unwrap_model(model) for model in models]
