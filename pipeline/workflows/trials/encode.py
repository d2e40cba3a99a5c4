"""A real encode of some hundred samples, scaled to the data set."""

import time
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data import SampleTable, Source, rows_in_role
from pipeline.encode.decoding import Chunk, decode_rows, finished_samples
from pipeline.encode.encoder import compute_format
from pipeline.encode.keying import KeyedSamples
from pipeline.encode.ragged import length, pad_batch, shapes
from pipeline.encode.unit import EncodeResult
from pipeline.memory import release_freed_memory
from pipeline.models import Preprocess, network_inputs
from pipeline.project import CutName, Project
from pipeline.project.extrapolation import SEED, padded_positions, predict_lengths, units_of
from pipeline.project.views import split_numbers
from pipeline.split import Capture
from pipeline.store import (
    ATTACHMENTS,
    SUFFIX,
    Store,
    folder_nbytes,
    projected_nbytes,
)
from pipeline.workflows.encode import OpenEncode, encode_views, open_encode, rows_to_encode

LENGTH_SECONDS, LENGTHS_AT_ONCE = 3.0, 256
"""Time in which lengths are counted beyond the sample, and the number of rows counted at a time."""


@dataclass(frozen=True, eq=False)
class EncodeTrial:
    """The encode of the sample by one encoder, and the factors from the sample to the data set."""

    project: Project
    stores: list[list[Store]]
    shares: list[float]
    """Share of the blocks before each cut."""
    result: EncodeResult
    lengths: np.ndarray
    """Positions of each row of the source, (N,) int64; ones where all samples have one shape."""
    states: int
    """States of the data set at one cut, all views."""
    padding: float
    """Positions per state with padding in the data set over those in the sample, which the forward time grows with."""
    size: float
    """The same without padding, which the time of writing grows with."""
    nbytes: list[int]
    """Bytes of all states at each cut."""

    def number(self, cut: CutName) -> int:
        """Return the number of this encoder's cut in runs of `cut`."""
        return self.project.encode.cuts.index(self.project.at(cut))

    def seconds(self, cut: CutName) -> dict[str, float]:
        """Return the seconds per state of the data set of each step of an encode of one cut."""
        steps: dict[str, float] = self.result.costs.of(self.number(cut))["seconds_per_sample"]
        forward = steps["forward"] * self.padding if self.shares[self.number(cut)] else 0.0
        return {"read": steps["read"], "forward": forward, "write": steps["write"] * self.size}

    @property
    def wall_seconds(self) -> float:
        """Seconds of an encode of the data set at all cuts at once."""
        costs = self.result.costs
        return costs.elapsed / max(1, costs.samples) * self.states * self.padding

    def beside_bytes(self, cut: CutName, *, suffix: bool) -> int:
        """Return the bytes of what lies beside the states of a cut, with or without the pretrained suffix."""
        stores = [of_view[self.number(cut)] for of_view in self.stores]
        folders = [store.path / name for store in stores for name in ATTACHMENTS if suffix or name != SUFFIX]
        return sum(folder_nbytes(folder) for folder in folders if folder.is_dir())


def try_encode(
    part: Project, source: Source, keyed: KeyedSamples, table: SampleTable, wanted: np.ndarray
) -> EncodeTrial:
    """Encode the rows `wanted` (n,) of `source` that are one encoder's, and scale what it took to all rows."""
    of_part = None if part.tower is None else rows_in_role(source, keyed.good, part.tower)
    everything = replace(keyed, rows=of_part)
    sample = replace(keyed, rows=everything.selected(wanted))
    opened = open_encode(part, source, sample, table, replace_stores=False)
    rows, lengths = sample.good, np.ones(len(keyed.keys), np.int64)
    if shapes(opened.samples[0]) != shapes(opened.samples[-1]):
        lengths = _lengths(opened.loaded.backbone.preprocess, source, everything, rows)
    release_freed_memory()
    _warm_up(opened)
    result = encode_views(opened.encoder(source, sample), part, source, sample, table, opened.stores)
    good = 1 - (len(result.keyed.bad) - len(sample.bad)) / len(rows)
    return _scaled(part, opened, result, everything, lengths, table, good)


def _lengths(preprocess: Preprocess, source: Source, keyed: KeyedSamples, rows: np.ndarray) -> np.ndarray:
    """Return the positions of each row, (N,) int64, from those of the sample's `rows` and of as many as time allows."""
    others = np.random.default_rng(SEED).permutation(np.setdiff1d(keyed.good, rows))
    lengths, known = list[int](), list[np.ndarray]()
    end = time.monotonic() + LENGTH_SECONDS
    for some in (rows, *np.array_split(others, len(others) // LENGTHS_AT_ONCE + 1)):
        (decoded,) = decode_rows(source, Chunk(some, [preprocess]))
        lengths += [length(sample) for sample in finished_samples(preprocess, decoded)]
        known.append(decoded.rows)
        if time.monotonic() > end:
            break
    return predict_lengths(keyed.sizes, np.concatenate(known), lengths)


def _warm_up(opened: OpenEncode) -> None:
    """Run the prefixes on a whole batch: a first pass of its size prepares kernels, and takes memory."""
    encode, preprocess = opened.loaded.project.encode, opened.loaded.backbone.preprocess
    samples = opened.samples * (encode.batch_size // len(opened.samples) if encode.batch_tokens is None else 1)
    inputs = network_inputs(pad_batch(samples or opened.samples, preprocess.pad))
    for _ in range(2):
        compute_format(opened.prefixes, encode).run(Capture(opened.prefixes), inputs)


def _scaled(
    part: Project,
    opened: OpenEncode,
    result: EncodeResult,
    everything: KeyedSamples,
    lengths: np.ndarray,
    table: SampleTable,
    good: float,
) -> EncodeTrial:
    """Scale `result` to the rows of `everything`, of which the share `good` can be decoded."""
    keys, groups = everything.keys, split_numbers(everything.keys, table)
    is_padded = result.costs.padded > result.costs.positions
    totals = {"states": 0.0, "positions": 0.0, "padded": 0.0}
    sampled = dict(totals)
    nbytes = [0] * len(part.encode.cuts)
    wanted = rows_to_encode(part, everything, table)
    for of_view, all_rows, own in zip(opened.stores, wanted, rows_to_encode(part, result.keyed, table), strict=True):
        units, tried = (units_of(rows, keys, groups, part.encode.segment_samples) for rows in (all_rows, own))
        for of, into in ((units, totals), (tried, sampled)):
            into["states"] += sum(map(len, of))
            into["positions"] += (positions := float(sum(lengths[unit].sum() for unit in of)))
            into["padded"] += padded_positions(of, lengths, part.encode) if is_padded else positions
        held = float(sum(lengths[unit].sum() for unit in tried))
        for cut, store in enumerate(of_view):
            nbytes[cut] += projected_nbytes(
                store,
                held,
                segments=len(units),
                samples=round(good * sum(map(len, units))),
                to_positions=good * float(sum(lengths[unit].sum() for unit in units)),
            )
    states = good * totals["states"]
    per_state = {name: (totals[name] / totals["states"]) / (sampled[name] / sampled["states"]) for name in sampled}
    return EncodeTrial(
        part,
        opened.stores,
        [prefix.cut.share for prefix in opened.prefixes],
        result,
        lengths,
        round(states),
        per_state["padded"],
        per_state["positions"],
        nbytes,
    )
