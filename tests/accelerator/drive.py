"""Runs commands of `recycle` in one process, on the accelerator of device.py where its build folder is named.

    python -m accelerator.drive FOLDER '[["encode"], ["train", "--cut", "0.5"]]' FOLDER ...

Prints, last, how many operations and copies the accelerator ran, and how many copies beside its operations.
"""

import json
import os
import sys

if os.environ.get("ACCELERATOR_BUILD"):
    from accelerator.device import device
else:
    device = None

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from pipeline.tasks import Head
from stages.cli import recycle


class TiedNet(nn.Module):
    """Blocks on images, of which the third and the fourth share a weight, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.layers[3].weight = self.layers[2].weight
        self.classifier = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.classifier(x)


def tied_net(head: Head) -> nn.Module:
    return TiedNet(head.size or 0)


def main(given: list[str]) -> None:
    torch.set_num_threads(1)
    for folder, commands in zip(given[::2], given[1::2], strict=True):
        os.chdir(folder)
        for command in json.loads(commands):
            AcceleratorState._reset_state()  # a process has one precision
            recycle(command, prog_name="recycle", standalone_mode=False)
    print(json.dumps([0] * 3 if device is None else [device.operations(), device.copies(), device.late_copies()]))


if __name__ == "__main__":
    main(sys.argv[1:])
