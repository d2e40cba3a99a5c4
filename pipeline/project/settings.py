"""The settings of one params.yaml, and the paths of the project's files."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Section, load_sections
from pipeline.data import ROLES, DataConfig, SampleTable, Source, build, in_role, open_source, with_keys
from pipeline.encode.config import EncodeConfig
from pipeline.encode.keying import KeyedSamples, StatCache, key_contents
from pipeline.errors import ConfigError
from pipeline.keys import JSON, Recipe
from pipeline.models import ModelConfig, PreprocessConfig
from pipeline.project.contradictions import contradictions
from pipeline.project.tower_config import TowersConfig
from pipeline.project.views import view_name
from pipeline.store import Bucket, Remote, SegmentCache, Store
from pipeline.tasks import TaskConfig
from pipeline.tracked import SCHEME as TRACKED
from pipeline.tracked import open_tracked
from pipeline.train.config import TrainConfig

if TYPE_CHECKING:
    from pipeline.store import Reader

CutName = float | int | str

RUN_NAME = re.compile(r"\w[\w.#-]*")
"""Valid names of runs, which are names of folders too."""
UNPACKED = "unpacked"
"""Folder in `work_dir` with segments that training needs unpacked or fetched."""
MIRRORS = "mirror"
"""Folder in `work_dir` with the small files of remote stores."""

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
    """The settings of a project; its files are in the current folder."""

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
    work_dir: Path = Path(".recycle")
    params: Path = Path("params.yaml")
    overrides: Mapping[str, JSON] = field(default_factory=dict)
    """Settings that replace those of the file for this run, as in {"train.seed": 1}."""
    tower: str | None = None
    """Where there is an encoder for each role: the role whose encoder these settings describe; None for all of it."""

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, JSON] | None = None) -> "Project":
        """Read params.yaml; `overrides` ("train.seed": 1) replace its values.

        Raises:
            ConfigError: with one line per fault of the file.
        """
        sections: dict[str, Any] = load_sections(path, SECTIONS, overrides)
        project = cls(**sections, params=path, overrides=dict(overrides or {}))
        is_augmented = any(part.preprocess.augment is not None for part in project.parts)
        faults = contradictions(project.data, project.task, project.encode, project.train, project.towers, is_augmented)
        if faults:
            raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
        return project

    def overridden(self, overrides: Mapping[str, JSON]) -> "Project":
        """Return the project with `overrides` instead of its own; the file is read again.

        Raises:
            ConfigError: as `load`.
        """
        return Project.load(self.params, overrides)

    @property
    def parts(self) -> "list[Project]":
        """A project for each encoder: this one, or those of the towers."""
        return [self._of_tower(role) for role in ROLES] if self.towers.is_set and self.tower is None else [self]

    def part(self, tower: str | None) -> "Project":
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
        """Return the cut of params.yaml written as `name`."""
        for cut in self.encode.cuts:
            if str(cut) == name:
                return cut
        known = ", ".join(map(str, self.encode.cuts))
        raise ConfigError(f"the cut is {name!r}; encode.cuts has {known}; name one of these, or add it and encode")

    def at(self, cut: CutName) -> CutName:
        """Return the cut of this encoder in runs of `cut`: its own cut if it has one."""
        own = self.towers.of(self.tower).cut
        return cut if own is None else own

    @property
    def views(self) -> list[int | None]:
        """The views that are stored: None for the plain one, then the numbers of the augmented ones."""
        return [None, *range(self.encode.views or 0)]

    def store_name(self, cut: CutName) -> str:
        """Return the name of a cut's store, in messages and as a folder: CUT, or CUT/TOWER."""
        return str(cut) if self.tower is None else f"{cut}/{self.tower}"

    def store_path(self, cut: CutName, view: int | None = None) -> Path:
        """Return the folder of a cut's store, of its plain view or of an augmented one; each tower has its own.

        For a remote store it is that of its mirror.
        """
        plain = self.stores / self.store_name(cut)
        return plain if view is None else plain / view_name(view)

    @cached_property
    def remote(self) -> Remote | None:
        """The remote place of the stores; None for local stores.

        Raises:
            ConfigError: `encode.store` cannot be used.
        """
        return None if self.encode.store is None else self.remote_at(self.encode.store)

    def remote_at(self, url: str) -> Remote:
        """Return the stores below a URL, mirrored in `work_dir`.

        Raises:
            ConfigError: the URL cannot be used.
            StoreError: what DVC tracks there is not on its remote.
        """
        if url.startswith(TRACKED):
            tracked = open_tracked(url, self.work_dir / MIRRORS / "dvc" / "sizes.json")
            return Remote(tracked, self.work_dir / MIRRORS / "dvc" / tracked.digest)
        scheme, _, place = url.partition("://")
        return Remote(Bucket(url, self.encode.store_options), self.work_dir / MIRRORS / scheme / place.strip("/"))

    @property
    def stores(self) -> Path:
        """The folder of all stores: `activations`, or the mirror of `remote`."""
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

    def training_table(self) -> SampleTable:
        """Return the sample table with the share of training samples that `data.fraction` chooses.

        Raises:
            DataError: there is none, or it cannot be read.
        """
        table = SampleTable.read(self.samples)
        return table.share(self.data.fraction, self.data.seed, by_label=self.task.kind != "regression")

    def keys_of(self, source: Source, *, trust: bool = True) -> KeyedSamples:
        """Return the keys of `source`; files that were read before are read again only without `trust`."""
        cache = StatCache(self.work_dir / "keys.sqlite")
        return key_contents(source, workers=self.encode.workers or 1, cache=cache, trust=trust)

    def sample_table(self, source: Source, keyed: KeyedSamples) -> SampleTable:
        """Return the sample table of the good rows of `source`; raises as `build`."""
        good = keyed.good
        return build(source, keyed.keys[good], self.data, rows=good)

    def reader(self, store: Path) -> "Reader":
        """Return a reader of the store, or the stores, in the folder `store`.

        Segments that are compressed or remote are unpacked or fetched to `work_dir`.
        """
        from pipeline.store import Reader  # noqa: PLC0415  (torch is slow to import)

        cache = _segment_cache((self.work_dir / UNPACKED).absolute(), int(self.train.scratch_gb * 1e9))
        return Reader(store, cache=cache, check=self.train.check, remote=self.remote)

    @property
    def storage(self) -> str:
        """Codec and dtype of the stores, as the recipe names them."""
        return f"{self.encode.codec}:{self.encode.dtype}"

    def _of_tower(self, role: str) -> "Project":
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


@cache
def _segment_cache(root: Path, budget: int) -> SegmentCache:
    """Return the segment cache of a folder, shared by all readers of this process."""
    return SegmentCache(root, budget)
