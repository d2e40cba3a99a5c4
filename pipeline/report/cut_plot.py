"""The picture of `recycle cuts`: figures of every cut over the share of the blocks that it recycles."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Line = Sequence[float | None]
"""A figure of every cut; None where it is unknown."""


def draw_cuts(shares: Sequence[float], panels: Mapping[str, Mapping[str, Line]], path: Path) -> None:
    """Draw a panel for each label of `panels`, with a line for each of its figures, as a PNG.

    `shares` are those of the blocks before each cut, 0 to 1. Panels without a known figure are left out.
    """
    import matplotlib  # noqa: PLC0415  (slow to import)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    known = {
        label: {name: line for name, line in lines.items() if any(value is not None for value in line)}
        for label, lines in panels.items()
    }
    known = {label: lines for label, lines in known.items() if lines}
    figure, axes = plt.subplots(len(known), figsize=(7, 2.4 * len(known)), sharex=True, squeeze=False, dpi=150)
    for axis, (label, lines) in zip(axes[:, 0], known.items(), strict=True):
        for name, line in lines.items():
            values = [math.nan if value is None else value for value in line]
            axis.plot([100 * share for share in shares], values, marker=".", label=name)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize="small")
    axes[-1, 0].set_xlabel("blocks before the cut, %")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
