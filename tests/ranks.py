"""What torchrun starts in tests: one of several processes that train projects, one after the other.

    torchrun --nproc-per-node 2 ranks.py FOLDER...

Each folder has a params.yaml and its stores; the run is called "shared".
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.project import Project
from pipeline.tasks import Head
from pipeline.train.processes import together
from pipeline.workflows.train import train_project

NAME = "shared"


class SmoothNet(nn.Module):
    """Four blocks without batch norm, dropout or a parameter whose gradient is nothing but rounding; a head for two.

    The second head is never used, as poolers often are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [3, 8, 8, 12, 12]
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3), nn.Tanh()) for i, o in pairwise(widths)))
        self.classifier = nn.Linear(widths[-1], classes)
        self.unused = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(x).mean((2, 3)))


def smooth_net(head: Head) -> nn.Module:
    return SmoothNet(head.size or 6)


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    with together():
        for folder in folders:
            os.chdir(folder)
            train_project(Project.load(Path("params.yaml")), "0.5", NAME)


if __name__ == "__main__":
    main(sys.argv[1:])
