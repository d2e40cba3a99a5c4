"""One params.yaml: its settings, and where its files lie."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipeline.config import Section, load_sections
from pipeline.data import ROLES, DataConfig, Source, in_role, open_source, with_keys
from pipeline.encode.config import EncodeConfig
from pipeline.encode.feed import Keyed, key_contents
from pipeline.encode.stat_cache import StatCache
from pipeline.errors import ConfigError
from pipeline.files import is_function
from pipeline.keys import JSON, Recipe
from pipeline.models import ModelConfig, PreprocessConfig
from pipeline.project.roles import TowersConfig
from pipeline.store import Bucket, Reader, Remote, SegmentCache, Store, check_url
from pipeline.tasks import TaskConfig
from pipeline.tracked import SCHEME as TRACKED
from pipeline.tracked import Place, open_tracked
from pipeline.train.config import TrainConfig
from pipeline.views import view_name

CutName = float | int | str

RUN_NAME = re.compile(r"\w[\w.#-]*")
"""What a run may be called: it is the name of a folder too."""
UNPACKED = "unpacked"
"""Folder below a project's scratch where segments are brought for training that are compressed or lie elsewhere."""
MIRRORS = "mirror"
"""Folder below a project's scratch where the small files of stores lie that lie elsewhere."""

SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "preprocess": PreprocessConfig,
    "task": TaskConfig,
    "encode": EncodeConfig,
    "train": TrainConfig,
    "towers": TowersConfig,
}


@dataclass(frozen=True)
class Project:
    """The settings of a project; its files lie in the folder it is run from."""

    data: DataConfig
    model: ModelConfig
    preprocess: PreprocessConfig
    task: TaskConfig
    encode: EncodeConfig
    train: TrainConfig
    towers: TowersConfig
    activations: Path = Path("data/activations")
    samples: Path = Path("data/samples.parquet")
    quarantine: Path = Path("data/quarantine.csv")
    results: Path = Path("results")
    scratch: Path = Path(".recycle")
    params: Path = Path("params.yaml")
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    """Settings that replace those of the file for this run, as in {"train.seed": 1}."""
    tower: str | None = None
    """Where there is an encoder for each role: the role whose encoder these settings describe; None for all of it."""

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, JSON] | None = None) -> Project:
        """Read params.yaml; `overrides` ("train.seed": 1) replace what it says.

        Raises:
            ConfigError: with one line per fault of the file.
        """
        sections: dict[str, Any] = load_sections(path, SECTIONS, overrides)
        project = cls(**sections, params=path, overrides=dict(overrides or {}))
        faults = [
            *project._faults_of_store(),
            *project._faults_of_views(),
            *project._faults_of_batches(),
            *project._faults_of_towers(),
        ]
        if faults:
            raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
        return project

    def overridden(self, overrides: Mapping[str, JSON]) -> Project:
        """Return the project with `overrides` instead of its own; the file is read again.

        Raises:
            ConfigError: as `load`.
        """
        return Project.load(self.params, overrides)

    @property
    def parts(self) -> list[Project]:
        """A project for each encoder: this one, or those of the towers."""
        return [self._of_tower(role) for role in ROLES] if self.towers.is_set and self.tower is None else [self]

    def part(self, tower: str | None) -> Project:
        """Return the project of the encoder that is called `tower`; None where there is one encoder.

        Raises:
            ConfigError: there is no such encoder.
        """
        parts = {part.tower: part for part in self.parts}
        if tower in parts:
            return parts[tower]
        if self.towers.is_set:
            raise ConfigError(f"the tower is {tower!r}; the towers are {', '.join(ROLES)}; choose one with --tower")
        raise ConfigError(f"the tower is {tower!r}, but params.yaml has no towers; leave --tower out")

    def source(self, inputs: str | None = None) -> Source:
        """Open the data set, or data of the same kind at the path `inputs`; of a tower, the samples in its role alone.

        Raises:
            ConfigError: a setting names nothing that exists; the message names what does.
            DataError: the data cannot be read as described, or no sample is in the tower's role.
        """
        functions: dict[str | None, str] = {
            role: key for role in ROLES if (key := self.towers.of(role).key) is not None
        }
        opened = open_source(self.data if inputs is None else self.data.of_inputs(inputs))
        source = with_keys(opened, functions, "towers.<role>.key")
        return source if self.tower is None else in_role(source, self.tower)

    def cut(self, name: str) -> CutName:
        """Return the cut of params.yaml that is written `name`."""
        for cut in self.encode.cuts:
            if str(cut) == name:
                return cut
        known = ", ".join(map(str, self.encode.cuts))
        raise ConfigError(f"the cut is {name!r}; encode.cuts has {known}; name one of these, or add it and encode")

    def at(self, cut: CutName) -> CutName:
        """Return where this encoder is split in runs of `cut`: there, unless it has a cut of its own."""
        own = self.towers.of(self.tower).cut
        return cut if own is None else own

    @property
    def views(self) -> list[int | None]:
        """The views that are stored: None for the plain one, then the numbers of the augmented ones."""
        return [None, *range(self.encode.views or 0)]

    def store_name(self, cut: CutName) -> str:
        """Return what the store of a cut is called, in messages and as a folder: CUT, or CUT/TOWER."""
        return str(cut) if self.tower is None else f"{cut}/{self.tower}"

    def store_path(self, cut: CutName, view: int | None = None) -> Path:
        """Return the folder of a cut's store, of its plain view or of an augmented one; each tower has its own.

        Of a store that lies elsewhere it is the mirror's.
        """
        plain = self.stores / self.store_name(cut)
        return plain if view is None else plain / view_name(view)

    @cached_property
    def remote(self) -> Remote | None:
        """Where the stores lie, unless they lie on this disk.

        Raises:
            ConfigError: `encode.store` cannot be used.
        """
        return None if self.encode.store is None else self.remote_at(self.encode.store)

    def remote_at(self, url: str) -> Remote:
        """Return the stores below a URL, mirrored below this project's scratch.

        Raises:
            ConfigError: the URL cannot be used.
            StoreError: what DVC tracks there is not on its remote.
        """
        if url.startswith(TRACKED):
            tracked = open_tracked(url, self.scratch / MIRRORS / "dvc" / "sizes.json")
            return Remote(tracked, self.scratch / MIRRORS / "dvc" / tracked.digest)
        scheme, _, place = url.partition("://")
        return Remote(Bucket(url, self.encode.store_options), self.scratch / MIRRORS / scheme / place.strip("/"))

    @property
    def stores(self) -> Path:
        """The folder that all stores lie in, or seem to: `activations`, or the mirror of `remote`."""
        return self.activations if self.remote is None else self.remote.mirror

    def open_store(self, cut: CutName, view: int | None = None, expected: Recipe | None = None) -> Store:
        """Open a cut's store, of its plain view or of an augmented one; raises as `Store.open`."""
        return Store.open(self.store_path(cut, view), expected, self.remote)

    def run_path(self, name: str) -> Path:
        """Return the folder of a finished run.

        Raises:
            ConfigError: no folder may be called so.
        """
        if not RUN_NAME.fullmatch(name):
            raise ConfigError(f"the run is called {name!r}; use letters, digits, '.', '_', '-' and '#'")
        return self.results / "runs" / name

    def keys_of(self, source: Source, *, trust: bool = True) -> Keyed:
        """Return the keys of `source`; files that were read before are read again only without `trust`."""
        cache = StatCache(self.scratch / "keys.sqlite")
        return key_contents(source, workers=self.encode.workers or 1, cache=cache, trust=trust)

    def reader(self, store: Path) -> Reader:
        """Return what reads the store or the stores below the folder `store`.

        Of those that are compressed or lie elsewhere, segments are brought to scratch.
        """
        scratch = _scratch((self.scratch / UNPACKED).absolute(), int(self.train.scratch_gb * 1e9))
        return Reader(store, cache=scratch, check=self.train.check, remote=self.remote)

    @property
    def storage(self) -> str:
        """Codec and dtype of the stores, as the recipe names them."""
        return f"{self.encode.codec}:{self.encode.dtype}"

    def _of_tower(self, role: str) -> Project:
        own = self.towers.of(role)
        preprocess = own.preprocess or self.preprocess
        head = {name: value for name in ("pooling", "layers") if (value := getattr(own, name)) is not None}
        cuts = {} if own.cut is None else {"cuts": [own.cut]}
        views = {} if preprocess.augment is not None else {"views": None}
        residency = {} if own.residency is None else {"residency": own.residency}
        return dataclasses.replace(
            self,
            model=own.model or self.model,
            preprocess=preprocess,
            task=self.task.model_copy(update=head),
            encode=self.encode.model_copy(update=cuts | views),
            train=self.train.model_copy(update=residency),
            tower=role,
        )

    def _faults_of_store(self) -> list[str]:
        """Say what keeps `encode.store` from being a place of stores."""
        if self.encode.store is None:
            return ["encode.store_options is set, but encode.store is not"] if self.encode.store_options else []
        try:
            if self.encode.store.startswith(TRACKED):
                Place.of(self.encode.store)
            else:
                check_url(self.encode.store, self.encode.store_options)
        except ConfigError as error:
            return [f"encode.store: {error}"]
        return []

    def _faults_of_views(self) -> list[str]:
        """Say how the settings of views contradict each other across sections."""
        faults, is_augmented = [], any(part.preprocess.augment is not None for part in self.parts)
        if is_augmented and self.encode.views is None:
            faults.append(
                "preprocess.augment is set, but encode.views is not: what is stored is encoded once, and cannot change "
                "at random from epoch to epoch; set encode.views to how many views are stored (such as 4), or remove "
                "preprocess.augment"
            )
        if self.encode.views is not None and not is_augmented:
            faults.append(
                f"encode.views is {self.encode.views}, but preprocess.augment is not set: all views would be equal; "
                "set preprocess.augment, or remove encode.views"
            )
        if self.encode.views is None and self.train.views != "cycle":
            faults.append(
                f"train.views is {self.train.views!r}, but there are no views; set encode.views, or remove it"
            )
        return faults

    def _faults_of_batches(self) -> list[str]:
        """Say where a loss has nothing to compare."""
        if self.task.kind != "similarity":
            return []
        faults = []
        if self.train.batch_size == 1 and self.task.memory is None:
            faults.append(
                "train.batch_size is 1: one pair, or one label, per step leaves nothing to tell it from; set 2 or "
                "more, or task.memory"
            )
        from pipeline.tasks.losses import choose_loss  # noqa: PLC0415 (slow to import, and few projects need it)

        if self.data.source == "pairs" and choose_loss(self.task.loss, self.task.distance).compares != "pairs":
            faults.append(f"task.loss is {self.task.loss!r}, which needs labels; for pairs set another loss")
        return faults

    def _faults_of_towers(self) -> list[str]:
        """Say where towers have nothing to do."""
        if not self.towers.is_set:
            return []
        faults = []
        if self.task.kind != "similarity":
            faults.append(f"task.kind is {self.task.kind!r}; towers embed pairs: set similarity, or remove towers")
        if not (self.data.source == "pairs" or is_function(self.data.source)):
            faults.append(
                f"data.source is {self.data.source!r}; towers embed the anchors and the positives of pairs: set pairs, "
                "or a module:function whose samples have roles, or remove towers"
            )
        if not any(self.towers.of(role).trains for role in ROLES):
            faults.append("towers: none trains; set trains: true for one")
        return faults


@cache
def _scratch(root: Path, budget: int) -> SegmentCache:
    """The one scratch of a folder: what all readers of the process bring counts in its budget."""
    return SegmentCache(root, budget)
