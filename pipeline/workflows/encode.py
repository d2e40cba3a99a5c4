"""Encode: raw data -> keys -> sample table; what each store lacks -> prefixes -> states -> stores."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data import SampleTable, Source, remarks, rows_in_role
from pipeline.encode import quarantine
from pipeline.encode.decoding import Chunk, decode_rows, decode_samples
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.quarantine import BadSample
from pipeline.encode.ragged import Sample
from pipeline.encode.rate import EncodeRate
from pipeline.encode.run import Executor, encode
from pipeline.encode.unit import EncodeResult
from pipeline.errors import DataError
from pipeline.keys import Recipe
from pipeline.project import CutName, Project, recipe_cache
from pipeline.project.stores import open_stores, write_dvc_markers
from pipeline.project.views import rows_by_view, split_numbers
from pipeline.report.costs import EncoderResult, write_costs
from pipeline.store import Store, first_rows

if TYPE_CHECKING:
    from pipeline.encode.encoder import Encoder
    from pipeline.project.model import LoadedModel
    from pipeline.split import Prefix

log = logging.getLogger("recycle")

EXAMPLE_SAMPLES = 2
"""Number of samples on which a split is proved; a single one is taken twice."""


def encode_project(project: Project, *, rehash: bool = False, replace_stores: bool = False) -> bool:
    """Encode every sample that a store lacks; write the sample table, the quarantine and the costs.

    Unchanged files are not read, and no model is built where nothing is to do; `rehash` reads all files and checks all
    stores again. Returns whether the number of bad samples stays within `encode.max_bad`.

    Raises:
        StaleStoreError: a store has another recipe, and neither `replace_stores` nor `encode.replace` allows to remove
            it.
    """
    replace_stores = replace_stores or project.encode.replace
    source = project.source()
    if left_out := source.left_out():
        log.warning("left out of the data set: %s", left_out)
    keyed = project.keys_of(source, trust=not rehash)
    if not len(keyed.good):
        quarantine.write(project.quarantine, keyed.bad, keyed.keys)  # `sample_table` fails: no sample is left
    table, bad = project.sample_table(source, keyed), keyed.bad
    results: list[EncoderResult] = []
    for part in project.parts:
        rows = None if part.tower is None else rows_in_role(source, keyed.good, part.tower)
        own = replace(keyed, bad=bad, rows=rows)
        results.append(_encode_part(part, source, own, table, rehash=rehash, replace_stores=replace_stores))
        bad = results[-1].result.keyed.bad
    if len(bad) > len(keyed.bad):
        table = project.sample_table(source, replace(keyed, bad=bad))
    for remark in remarks(table):
        log.warning("%s", remark)
    if lost := len(keyed.keys) - len(bad) - len(table):
        log.warning("%d samples left out: the other half of their pair is set aside", lost)
    replace(table, views=project.encode.views).write(project.samples)
    quarantine.write(project.quarantine, bad, keyed.keys)
    write_costs(project, results)
    for part_result in results:
        write_dvc_markers(part_result.project, part_result.stores)
    for part_result in results:
        log_summary(part_result)
    return _log_bad_samples(project, bad, len(keyed.keys))


def _encode_part(
    project: Project, source: Source, keyed: KeyedSamples, table: SampleTable, *, rehash: bool, replace_stores: bool
) -> EncoderResult:
    """Encode what the stores of one encoder lack; build no model where they are known to lack nothing."""
    cache_key = recipe_cache.cache_key(project, table)
    wanted = [keyed.keys[rows] for rows in rows_to_encode(project, keyed, table)]
    stores = None if rehash else recipe_cache.complete_stores(project, cache_key, wanted)
    if stores is not None:
        _warn_of_duplicate_cuts(project.encode.cuts, stores[0])
        return EncoderResult(project, stores, EncodeResult.empty(keyed, len(project.encode.cuts)))
    result = _encode_missing(project, source, keyed, table, replace_stores=replace_stores)
    if recipe_cache.cache_key(project, table) == cache_key:
        recipe_cache.remember(project, cache_key, result.stores)
    return result


def _encode_missing(
    project: Project, source: Source, keyed: KeyedSamples, table: SampleTable, *, replace_stores: bool
) -> EncoderResult:
    """Build the model, split it at every cut, and encode what the stores of these recipes lack."""
    from pipeline.cluster import Job, open_executor  # noqa: PLC0415  (slow to import, and often nothing is to do)
    from pipeline.encode.encoder import compute_format  # noqa: PLC0415

    opened = open_encode(project, source, keyed, table, replace_stores=replace_stores)
    loaded, flops = opened.loaded, opened.loaded.count_flops(opened.prefixes, opened.samples)
    _warn_of_duplicate_cuts(project.encode.cuts, opened.stores[0])
    if project.encode.executor.is_here:
        executor: Executor = opened.encoder(source, keyed)
    else:
        job = Job.of(loaded, source, opened.example, keyed.trimming_rows, opened.recipes)
        executor = open_executor(job, project.encode.executor)
    result = encode_views(executor, project, source, keyed, table, opened.stores)
    known = flops if project.encode.executor.is_here else None  # another machine may have another peak
    rate = EncodeRate.of(result.costs, compute_format(opened.prefixes, project.encode), known, opened.samples)
    return EncoderResult(project, opened.stores, result, flops, rate)


class OpenEncode(NamedTuple):
    """The model of one encoder, split at every cut, and its stores opened for writing."""

    loaded: "LoadedModel"
    example: list[int]
    """Rows of `samples`."""
    samples: list[Sample]
    """Samples on which the splits are proved: the shortest and the longest one."""
    prefixes: "list[Prefix]"
    recipes: list[list[Recipe]]
    """`recipes[view][cut]`, as `stores`."""
    stores: list[list[Store]]

    def encoder(self, source: Source, keyed: KeyedSamples) -> "Encoder":
        """Return the encoder that runs units in this process."""
        return self.loaded.encoder(source, self.prefixes, self.stores, keyed.trimming_rows)


def open_encode(
    project: Project, source: Source, keyed: KeyedSamples, table: SampleTable, *, replace_stores: bool
) -> OpenEncode:
    """Build the model, split it at every cut, open the stores of these recipes, and write what lies beside them.

    Raises:
        DataError: no sample can be decoded.
        StaleStoreError: as `open_stores`.
    """
    from pipeline.project.model import LoadedModel  # noqa: PLC0415  (slow to import, and often nothing is to do)
    from pipeline.project.probe import keep_or_check_probes  # noqa: PLC0415

    loaded = LoadedModel.open(project, table, encodes=True)
    device = loaded.to_device() if project.encode.executor.is_here else None
    example, samples = find_example(loaded, source, keyed)
    prefixes, recipes, saved_splits = loaded.split_at_cuts(samples, device)
    stores = open_stores(project, recipes, replace_stores=replace_stores)
    for view, of_view in zip(project.views, stores, strict=True):
        keep_or_check_probes(of_view, prefixes, loaded.preprocess(view), samples, project.encode)
    for store, saved in zip(stores[0], saved_splits, strict=True):
        loaded.keep_pretrained_suffix(store, saved)
    recipe_cache.remember_weights(project, stores[0], loaded.weights_key)
    return OpenEncode(loaded, example, samples, prefixes, recipes, stores)


def find_example(loaded: "LoadedModel", source: Source, keyed: KeyedSamples) -> tuple[list[int], list[Sample]]:
    """Return the shortest and the longest sample that can be decoded, and their rows; a split is proved on them."""
    preprocess = loaded.backbone.preprocess
    rows: list[int] = []
    samples: list[Sample] = []
    for row in keyed.outside_in().tolist():
        found = decode_samples(source, preprocess, np.asarray([row]))
        rows, samples = rows + [row] * len(found), samples + found
        if len(samples) == EXAMPLE_SAMPLES:
            return rows, samples
    if samples:
        return rows * EXAMPLE_SAMPLES, samples * EXAMPLE_SAMPLES
    bad = decode_rows(source, Chunk(keyed.good, [preprocess]))[0].bad
    quarantine.write(loaded.project.quarantine, [*keyed.bad, *bad], keyed.keys)
    raise DataError(
        f"none of the {len(bad)} samples can be decoded: {quarantine.summary(bad)}; see {loaded.project.quarantine}, "
        "and what data.path and data.source say"
    )


def encode_views(
    executor: Executor,
    project: Project,
    source: Source,
    keyed: KeyedSamples,
    table: SampleTable,
    stores: Sequence[Sequence[Store]],
) -> EncodeResult:
    """Encode what `stores[view][cut]` lack; return what was done.

    With augmented views, a sample that turns out bad can move others (the rest of its group) to another split; what
    the stores then lack is encoded too.
    """
    result = EncodeResult.empty(keyed, len(project.encode.cuts))
    while True:
        found = len(result.keyed.bad)
        result = encode(
            executor,
            source,
            result,
            stores,
            rows_to_encode(project, result.keyed, table),
            segment_samples=project.encode.segment_samples,
            segment_groups=split_numbers(keyed.keys, table),
        )
        if len(project.views) == 1 or len(result.keyed.bad) == found:
            return result
        table = project.sample_table(source, replace(result.keyed, rows=None))


def rows_to_encode(project: Project, keyed: KeyedSamples, table: SampleTable) -> list[np.ndarray]:
    """Return the rows that each view stores: all rows if the plain view is the only one."""
    if len(project.views) == 1:
        return [keyed.good]
    plain, augmented = map(keyed.selected, rows_by_view(keyed.keys, table))
    return [plain, *[augmented] * (len(project.views) - 1)]


def _warn_of_duplicate_cuts(names: Sequence[CutName], stores: Sequence[Store]) -> None:
    """Warn of cuts that name one block boundary, as shares do in a shallow network; each has a store of its own."""
    known: dict[str, CutName] = {}
    for name, store in zip(names, stores, strict=True):
        place = store.recipe.cut
        if place in known:
            log.warning("encode.cuts has %r and %r, which name one place: %s; keep one", known[place], name, place)
        known[place] = name


def log_summary(encoded: EncoderResult) -> None:
    """Log what was encoded for each cut, and how many texts were truncated."""
    project, stores, result, _, rate = encoded
    keys = result.keyed.keys[result.keyed.good]
    keys = keys[first_rows(keys)]
    for cut, new, promoted, *by_view in zip(project.encode.cuts, result.new, result.promoted, *stores, strict=True):
        there = sum(int((~store.missing(keys)).sum()) for store in by_view) - new
        name = project.store_name(cut)
        log.info("cut %s: %d samples encoded, %d were there", name, new, there)
        if promoted:
            log.info("cut %s: beyond float16, stored in a wider type: %s", name, ", ".join(sorted(promoted)))
    if rate is not None:
        log.info("rate: %s", rate)
    if result.cut_off:
        longest = stores[0][0].recipe.preprocessing.get("max_length")
        log.warning(
            "%d of the texts encoded now are longer than preprocess.max_length, %s tokens, and were cut off at the end "
            "(the longest by %d); raise it as far as the backbone allows, or divide them",
            *(len(result.cut_off), longest, max(result.cut_off)),
        )


def _log_bad_samples(project: Project, bad: Sequence[BadSample], total: int) -> bool:
    """Log what was set aside; return whether at most as many of `total` samples are bad as allowed."""
    allowed = project.encode.tolerated(total)
    if bad:
        log.warning("%d bad samples set aside in %s: %s", len(bad), project.quarantine, quarantine.summary(bad))
    if len(bad) > allowed:
        log.error(
            "%d bad samples, encode.max_bad allows %d of %d; mend or remove them, or raise it", len(bad), allowed, total
        )
    return len(bad) <= allowed
