"""The description of an encode for workers: small JSON, enough to build the coordinator's encoder again.

A worker reads no sample table and holds no keys: a unit contains its own.
"""

import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pipeline.config import check_sections
from pipeline.data import Source
from pipeline.encode.config import ExecutorConfig
from pipeline.encode.decoding import decode_samples
from pipeline.encode.encoder import Encoder
from pipeline.errors import ClusterError
from pipeline.files import write_whole
from pipeline.keys import JSON, Recipe
from pipeline.project import SECTIONS, Project
from pipeline.project.model import LoadedModel
from pipeline.store import Store
from pipeline.tasks import Head

FILE = "job.json"
KEPT_SECONDS = 7 * 24 * 3600
"""Age at which the folder of a run that failed is removed by the next one."""


class Job(BaseModel):
    """The description of the encoder of a project, or of one of its towers, for a worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """The project's, absolute: all paths of its settings are relative to it. Workers must see it."""
    home: Path
    """Folder below it for the reports of the workers of this run."""
    sections: dict[str, dict[str, Any]]
    """The settings that were set."""
    tower: str | None
    head: Head
    """The head that the task needs."""
    rows: int
    """Rows of the data set."""
    example: list[int]
    """Rows of the two samples on which the splits are proved."""
    trimming_rows: list[int]
    """Rows of the samples that determine how states are trimmed."""
    recipes: list[list[str]]
    """The expected recipes as JSON, by view and cut."""
    retries: int
    threads: int | None
    """Threads of torch in each worker; None leaves it to the worker's environment."""

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        source: Source,
        example: list[int],
        trimming_rows: np.ndarray,
        recipes: Sequence[Sequence[Recipe]],
    ) -> "Job":
        """Return the job of the coordinator's model `loaded` with its `recipes[view][cut]`."""
        project, folder = loaded.project, Path.cwd()
        sections = {name: getattr(project, name) for name in SECTIONS}
        return cls(
            folder=folder,
            home=folder / project.work_dir / "jobs" / secrets.token_hex(4),
            sections={name: one.model_dump(mode="json", exclude_unset=True) for name, one in sections.items()},
            tower=project.tower,
            head=replace(loaded.head, labels=()),  # they decide no state
            rows=len(source),
            example=example,
            trimming_rows=trimming_rows.tolist(),
            recipes=[[recipe.to_json() for recipe in of_view] for of_view in recipes],
            retries=project.encode.executor.retries,
            threads=_threads(project.encode.executor),
        )

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Create the folder of the job while it runs; it is kept after a failure."""
        for old in self.home.parent.glob("*"):
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        write_whole(self.home / FILE, self.model_dump_json())
        with _letting_go():
            yield
        shutil.rmtree(self.home, ignore_errors=True)

    def enter(self) -> None:
        """Go to the project's folder; raises ClusterError if it cannot be seen here."""
        if not (self.home / FILE).is_file():
            raise ClusterError(
                f"the project's folder {self.folder} cannot be seen there; put the project on a file system that all "
                "workers share, under the same path"
            )
        os.chdir(self.folder)

    def build(self, own: Mapping[str, JSON]) -> Encoder:
        """Build the project's encoder, in its folder; `own` are settings of `encode` that hold here alone.

        Raises:
            ClusterError: it is not the coordinator's; the message names the first field of the recipes that differs.
        """
        raw = self.sections | {"encode": {**self.sections["encode"], **own}}
        sections: Any = check_sections(raw, SECTIONS, str(self.home / FILE))
        project = Project(**sections, tower=self.tower)
        source = replace(project, tower=None).source()  # all towers count the rows of one
        if len(source) != self.rows:
            raise ClusterError(
                f"the data set has {len(source)} samples there, {self.rows} here; let data.path name "
                "the same files for all, and run again"
            )
        loaded = LoadedModel.with_head(project, self.head)
        device = loaded.to_device()
        example = decode_samples(source, loaded.backbone.preprocess, np.asarray(self.example))
        prefixes, recipes, _ = loaded.split_at_cuts(example, device)
        self._prove(recipes)
        stores = [
            [
                Store.create(project.store_path(cut, view), recipe, project.remote)
                for cut, recipe in zip(project.encode.cuts, of_view, strict=True)
            ]
            for view, of_view in zip(project.views, recipes, strict=True)
        ]
        return loaded.encoder(source, prefixes, stores, np.asarray(self.trimming_rows))

    def _prove(self, recipes: Sequence[Sequence[Recipe]]) -> None:
        for of_view, expected in zip(recipes, self.recipes, strict=True):
            for own, text in zip(of_view, expected, strict=True):
                if difference := own.first_difference(Recipe.from_json(text)):
                    field, there, here = difference
                    raise ClusterError(
                        f"its encoder has {field} = {there!r}, the coordinator's {here!r}; give all "
                        "workers the same weights, settings and versions of the libraries"
                    )


@contextmanager
def _letting_go() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C: a cancelled batch job cancels the workers that it started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _threads(config: ExecutorConfig) -> int | None:
    if config.threads is not None:
        return config.threads
    if config.kind == "local":
        return max(1, torch.get_num_threads() // (config.processes or 1))
    cores, processes = config.options.get("cores"), config.options.get("processes", 1)
    return max(1, cores // processes) if isinstance(cores, int) and isinstance(processes, int) else None
