"""What the network gives each sample before training, for tasks that compare the trained network with it.

It is the suffix itself on stored states, before its first step: no second network is held, and no frozen layer runs.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from pipeline.precision import autocast
from pipeline.project.towers import Tower
from pipeline.runs.finished import PRECISIONS
from pipeline.runs.input_states import stored_batches
from pipeline.store import KeySet

FILE = "reference.safetensors"
KEYS, VALUES = "keys", "values"


def compute_reference(tower: Tower, suffix: nn.Module, device: torch.device) -> np.ndarray:
    """Return what `suffix` gives each row of `tower`, (M,) float32, in the precision of training."""
    loaded, places = tower.loaded, tower.store.first_places(np.arange(len(tower.rows)))
    reader, values = loaded.project.reader(tower.store.path), np.empty(len(tower.rows), np.float32)
    suffix.eval()
    for index, batch in stored_batches(loaded, places, reader, device):
        with torch.no_grad(), autocast(PRECISIONS[loaded.project.train.precision], device):
            output = suffix(batch.state, **batch.inputs)
        values[index] = loaded.task.reference_of(output).float().cpu().numpy()
    return values


def write_reference(folder: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Keep the reference of a run in its folder: `values` (N,) of the samples with these keys (N, 16) uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({KEYS: np.ascontiguousarray(keys), VALUES: values}, folder / FILE)


def read_reference(folder: Path, keys: np.ndarray) -> np.ndarray:
    """Return the reference of samples, (N,) float32; NaN for those that the run did not have."""
    kept = load_file(folder / FILE)
    rows = KeySet(kept[KEYS]).find(keys)
    return np.where(rows >= 0, kept[VALUES][rows], np.float32(np.nan)).astype(np.float32)
