"""A run's metrics and plots, as DVC shows them: DVCLive's files in the run's folder, written after every epoch.

At the end, metrics.json has the scores of the weights that the run keeps.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from dvclive import env
from dvclive.live import Live


class RunLog(Live):
    """DVCLive that touches the run's folder alone, unless `dvc exp run` started the run and waits for its signals.

    By itself DVCLive initialises DVC in any git repository, stages what that writes, and needs a commit.
    """

    def __init__(self, folder: Path) -> None:
        self._in_experiment = env.DVC_EXP_BASELINE_REV in os.environ
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(str(folder), save_dvc_exp=False, dvcyaml=None, report=None)

    def log_epoch(self, row: dict[str, float]) -> None:
        """Write one epoch's figures."""
        for name, value in row.items():
            self.log_metric(name, value)
        if self._in_experiment:
            self.next_step()  # type: ignore[no-untyped-call]
        else:  # the same without a signal to editors below .dvc
            self.step = self.step  # from here on the summary has the step
            self.sync()  # type: ignore[no-untyped-call]
            self.step += 1

    def log_result(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Replace the figures of the last epoch in metrics.json by the `scores` of the kept weights, by split."""
        self.summary, self._step = {}, None  # without a step, none is added to the summary
        for split, of_split in scores.items():
            for name, value in of_split.items():
                self.log_metric(f"{split}/{name}", value, plot=False)

    def _init_dvc(self) -> None:
        if self._in_experiment:
            super()._init_dvc()

    def _init_studio(self) -> None:
        if self._in_experiment:
            super()._init_studio()  # type: ignore[no-untyped-call]
        else:
            self._studio_events_to_skip |= {"start", "data", "done"}
