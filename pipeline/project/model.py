"""The model of a project: task, backbone with head, its split at a cut, and the stores of that cut."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data import SampleTable, Source
from pipeline.device import check_compiler, pick_device, warn_of_emulation
from pipeline.encode.encoder import Encoder
from pipeline.encode.ragged import Sample, pad_batch
from pipeline.errors import AbsentError, ConfigError, InputRefusedError, ModelError, StoreError
from pipeline.keys import JSON, Recipe
from pipeline.models import Backbone, Preprocess, load, network_inputs
from pipeline.models.fingerprint import fingerprint, is_installed, module_fingerprints
from pipeline.models.language import LanguageModel
from pipeline.precision import HALF, ComputeFormat, as_inputs, weights_dtype, widen
from pipeline.project import recipe_cache
from pipeline.project.placement import load_placed
from pipeline.project.pretrained_suffix import PretrainedSuffix, SavedSplit, built_modules, write_pretrained_suffix
from pipeline.project.recipe import IRRELEVANT, recipe_of
from pipeline.project.settings import CutName, Project
from pipeline.project.stored_inputs import inputs_of
from pipeline.project.views import Views, view_name
from pipeline.split import Placement, Prefix, Suffix, divide, flops_around, recompute_blocks, split
from pipeline.store import SUFFIX, Store, remove_attachment
from pipeline.tasks import Head, Task, open_task
from pipeline.train.adapter import adapt
from pipeline.train.loader import Batch, Loader, StoredRows

log = logging.getLogger("recycle")


@dataclass(frozen=True)
class LoadedModel:
    """The task and the backbone of a project, with a head for the targets of its samples."""

    project: Project
    task: Task
    head: Head
    """The head that the task needs for these samples."""
    backbone: Backbone
    code: str | None
    """Digest of the code and attributes of the preprocessing, if it is the user's own."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Digests of the modules by path, computed before the first forward pass; empty unless the network is whole."""
    built_modules: Mapping[str, str] = field(default_factory=dict)
    """As `built_modules` gives them, computed at the same time; empty unless the network is whole."""
    weights_key: str | None = None
    """As `recipe_cache.weights_key`, before the weights were read; None where they come from a store."""
    pretrained_suffix: PretrainedSuffix | None = None
    """What the weights come from where those before the cut are not loaded; None of the whole network."""

    @classmethod
    def open(
        cls, project: Project, table: SampleTable, *, suffix_of: CutName | None = None, encodes: bool = False
    ) -> "LoadedModel":
        """Build the model that `project` describes; the head is drawn from `model.seed`.

        If it `encodes`, its weights are where `encode.placement` says.
        If the cut `suffix_of` is given, only the suffix may have weights, from the store of this cut: where these are
        known to be those that params.yaml names, or where it names weights that are not on this machine.

        Raises:
            AbsentError: neither this machine nor the store has the weights.
        """
        task = open_task(project.task)
        head = task.head(table)
        if suffix_of is None:
            return cls._build(project, task, head, encodes)
        if store := recipe_cache.store_of_known_weights(project, suffix_of):
            try:
                return cls._of_suffix(project, task, head, store)
            except (AbsentError, ModelError) as reason:
                log.info("%s; the whole network is built", reason)
        try:
            return cls._build(project, task, head)
        except AbsentError as absent:
            try:
                loaded = cls._of_suffix(project, task, head, project.open_store(suffix_of))
            except (AbsentError, StoreError) as reason:
                raise type(reason)(f"{absent}; {reason}") from absent
            log.warning("%s; the pretrained weights that %s carries are used", absent, project.store_path(suffix_of))
            return loaded

    @classmethod
    def with_head(cls, project: Project, head: Head) -> "LoadedModel":
        """Build the model that encodes `project`, with a `head` determined in another process."""
        return cls._build(project, open_task(project.task), head, encodes=True)

    @classmethod
    def _build(cls, project: Project, task: Task, head: Head, encodes: bool = False) -> "LoadedModel":
        files = recipe_cache.weights_key(project)
        backbone = load_placed(project, head) if encodes else load(project.model, project.preprocess, head)
        modules, built = module_fingerprints(backbone.model, IRRELEVANT), built_modules(backbone)
        task, code = task.of_width(backbone.width), _code(backbone)
        return cls(project, task, head, backbone, code, modules=modules, built_modules=built, weights_key=files)

    @classmethod
    def _of_suffix(cls, project: Project, task: Task, head: Head, store: Store) -> "LoadedModel":
        suffix = PretrainedSuffix.of(store, project.model, head)
        backbone = suffix.build(project.model, project.preprocess, head)
        task = task.of_width(backbone.width)
        return cls(project, task, head, backbone, _code(backbone), pretrained_suffix=suffix)

    @property
    def compute_dtype(self) -> str:
        """Name of the type that prefixes compute in; raises ConfigError as `ComputeFormat.of`."""
        return ComputeFormat.of(
            torch.device("cpu"), self.backbone.dtype, self.project.encode.precision, channels_last=False
        ).precision

    def to_device(self) -> torch.device:
        """Return the device that runs prefixes; move the model there, unless its weights stay in their files."""
        config, device = self.project.encode, pick_device(self.project.encode.device)
        setting = "encode.precision" if config.precision else "model.dtype"
        warn_of_emulation(setting, self.compute_dtype, device)
        if config.compile:
            check_compiler("encode.compile", device)
        if not self.backbone.is_mapped:
            self.backbone.model.to(device)
        if config.channels_last:
            self.backbone.model.to(memory_format=torch.channels_last)
        return device

    def split(self, cut: CutName, example: dict[str, Tensor], *, share: bool = False) -> tuple[Prefix, Suffix]:
        """Split the model at `cut`, proved on `example`; the suffix may `share` its weights with the model.

        Raises:
            ModelError: the network refuses the example; the message names the settings that decide it.
            SplitError: it cannot be split there.
        """
        try:
            prefix, suffix = split(self.backbone.model, at=cut, example=example, share=share)
        except InputRefusedError as error:
            raise ModelError(f"{self.backbone.name}: {error}; {self.backbone.preprocess.advice()}") from error
        return prefix, suffix

    def keep_pretrained_suffix(self, store: Store, saved: SavedSplit) -> None:
        """Write the pretrained suffix beside the plain `store` of a cut where `encode.suffix` asks for it."""
        if self.project.encode.suffix:
            write_pretrained_suffix(store, self.backbone, self.built_modules, self.project.model, self.head, saved)
        else:
            remove_attachment(store, SUFFIX)

    def split_at_cuts(
        self, samples: list[Sample], device: torch.device | None = None
    ) -> tuple[list[Prefix], list[list[Recipe]], list[SavedSplit]]:
        """Return the prefix of every cut, proved on two `samples`, `recipes[view][cut]`, and what each suffix needs.

        A network whose weights stay in their files is divided into sections, which compute on `device` (None: the CPU).
        """
        if self.backbone.is_mapped:
            dtype = None if self.project.model.dtype == "auto" else self.backbone.dtype
            divide(self.backbone.model, self.on_device(samples), Placement(device or torch.device("cpu"), dtype))
        example = self.on_device(samples)
        prefixes, saved = list[Prefix](), list[SavedSplit]()
        for cut in self.project.encode.cuts:
            prefix, suffix = self.split(cut, example, share=True)
            prefixes.append(prefix)
            saved.append(SavedSplit.of(suffix))
        return prefixes, [list(of_view) for of_view in zip(*map(self.recipes, prefixes), strict=True)], saved

    def count_flops(self, prefixes: Sequence[Prefix], samples: list[Sample]) -> list[tuple[int, int]] | None:
        """Return the operations per sample before and after the cuts of `prefixes`, counted on two `samples`."""
        return flops_around(self.backbone.model, [prefix.cut for prefix in prefixes], self.on_device(samples))

    def encoder(
        self, source: Source, prefixes: Sequence[Prefix], stores: Sequence[Sequence[Store]], trimming_rows: np.ndarray
    ) -> Encoder:
        """Return the encoder that runs units in this process, into `stores[view][cut]`."""
        views = [self.preprocess(view) for view in self.project.views]
        return Encoder(source, views, prefixes, stores, self.project.encode, trimming_rows)

    def preprocess(self, view: int | None) -> Preprocess:
        """Return the preprocessing of a view; None is the plain view."""
        plain = self.backbone.preprocess
        return plain if view is None else plain.view(view)

    def open_store(self, cut: CutName, table: SampleTable) -> tuple[Views, Prefix | None, Suffix]:
        """Return the stores of `cut` and the model split there; neither raw data nor another recipe's store is read.

        There is no prefix where only the suffix has weights.

        Raises:
            ConfigError: the cut was never encoded.
            StaleStoreError: the store was encoded under another recipe; the message names the first field that differs.
        """
        views = self.project.views
        stores = [self._open(cut, view) for view in views]
        plain, *augmented = stores
        opened = Views.of(plain, augmented, table)
        if self.pretrained_suffix is not None:
            for store, view in zip(stores, views, strict=True):
                store.check_recipe(self._of_view(plain.recipe, view))
            suffix = self.pretrained_suffix.suffix(self.backbone)
            self._widen(suffix, suffix)
            return opened, None, suffix
        example = inputs_of(self.stored_batch(opened, _first_and_last(opened)), plain.path)
        prefix, suffix = self.split(cut, as_inputs(example, self.backbone.dtype))
        for store, recipe in zip(stores, self.recipes(prefix), strict=True):
            store.check_recipe(recipe)
        recipe_cache.remember_weights(self.project, [plain], self.weights_key)
        self._widen(suffix, suffix)
        return opened, prefix, suffix

    def trainable(self, store: Views, suffix: Suffix) -> Suffix:
        """Return the suffix to train, with adapters if `train.adapter` is set.

        Raises:
            ConfigError: `train.adapter` names a layer that cannot be adapted, or no block can be recomputed.
            TrainError: no layer after the cut can be adapted.
        """
        train, backbone = self.project.train, self.backbone
        if train.adapter is not None:
            batch = self.stored_batch(store, _first_and_last(store))
            self._widen(backbone.model, suffix)
            suffix = adapt(
                backbone.model, suffix, batch.state, batch.inputs, train.adapter, fresh=backbone.fresh, seed=train.seed
            )
        if train.gradient_checkpointing and not recompute_blocks(suffix):
            raise ConfigError(
                f"train.gradient_checkpointing is true, and after the cut {suffix.cut} there is no block that can be "
                "computed again; set it to false"
            )
        if isinstance(backbone.model, LanguageModel):
            log.info("cut %s: %s", suffix.cut, backbone.model.training_note(suffix))
        return suffix

    def stored_batch(self, store: Views, rows: np.ndarray) -> Batch:
        """Return the states and inputs of `rows` (n,) int64 of the table as one batch on the CPU, without targets."""
        samples = StoredRows(store.first_places(rows), self.project.reader(store.path))
        return next(iter(Loader(samples, {}, [np.arange(len(rows))], pad=self.backbone.preprocess.pad)))

    def recipes(self, prefix: Prefix) -> list[Recipe]:
        """Return the recipes of the states of `prefix` under the settings of this project, one for each view."""
        project = self.project
        plain = recipe_of(
            prefix,
            self._preprocessing(None),
            storage=project.storage,
            compute_dtype=self.compute_dtype,
            modules=self.modules,
        )
        return [self._of_view(plain, view) for view in project.views]

    def on_device(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Return `samples` as inputs of the network, on its device."""
        device = next(self.backbone.model.parameters()).device
        weights = weights_dtype(self.backbone.model.parameters())
        batch = as_inputs(network_inputs(pad_batch(samples, self.backbone.preprocess.pad)), weights)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def _widen(self, module: nn.Module, suffix: Suffix) -> None:
        """Convert what `module` has of weights of 16 bits to float32, in place; those of `suffix` become exact."""
        if self.backbone.dtype not in HALF:
            return
        own, trained = widen(module).state_dict(keep_vars=True), suffix.state_dict().keys()
        with torch.no_grad():
            for name in self.backbone.exact.keys() & own.keys() & trained:
                own[name].copy_(self.backbone.exact[name])

    def _open(self, cut: CutName, view: int | None) -> Store:
        """Open a store; refuse one whose settings differ before the model is run on inputs of their shape."""
        path = self.project.store_path(cut, view)
        if self.project.remote is None and not path.exists():
            raise ConfigError(f"cut {cut}: there is no store at {path}; encode it (dvc repro encode)")
        known = self.pretrained_suffix
        store = self.project.open_store(cut, view) if known is None or view is not None else known.store
        settings = dataclasses.replace(store.recipe, storage=self.project.storage, compute_dtype=self.compute_dtype)
        store.check_recipe(self._of_view(settings, view))
        return store

    def _of_view(self, recipe: Recipe, view: int | None) -> Recipe:
        name = None if view is None else view_name(view)
        return dataclasses.replace(recipe, preprocessing=self._preprocessing(view), view=name)

    def _preprocessing(self, view: int | None) -> dict[str, JSON]:
        """Return the preprocessing of a view, as the recipe describes it."""
        code: dict[str, JSON] = {} if self.code is None else {"code": self.code}
        return {**self.preprocess(view).recipe(), **code}


def _first_and_last(store: Views) -> np.ndarray:
    return np.asarray([0, len(store.keys) - 1])


def _code(backbone: Backbone) -> str | None:
    """Return the digest of the code and attributes of the preprocessing, if it is the user's own."""
    own = not is_installed(type(backbone.preprocess).__module__)
    return fingerprint(backbone.preprocess) if own else None
