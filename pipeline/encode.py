"""Flow 1: raw data -> sample -> key -> prefix -> state -> segment -> store.

`encode` plans what each store lacks, and has the units of the plan run by the encoder. A unit is committed whole, and
the plan depends on nothing but the keys and what is committed: a rerun after a kill makes the same segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Source
from pipeline.encoder import EncodeConfig, Encoded, Encoder
from pipeline.feed import BadSample, Keyed
from pipeline.models import Preprocess
from pipeline.split import Prefix
from pipeline.store import Store
from pipeline.unit import plan


def encode(
    source: Source,
    keyed: Keyed,
    preprocess: Preprocess,
    prefixes: Sequence[Prefix],
    stores: Sequence[Store],
    config: EncodeConfig,
    *,
    rows: np.ndarray | None = None,
    done: Encoded | None = None,
) -> Encoded:
    """Bring the samples `rows` of `source` (all, if None) into the store of every cut, those alone that are not there.

    `prefixes` and `stores` go together, one per cut, all prefixes split from one model on the device to use. What a
    call did is added to `done`, and samples that were set aside before are left out.
    """
    done = done or Encoded.nothing(keyed, cuts=len(stores))
    wanted = done.good if rows is None else np.intersect1d(rows, done.good)
    units = plan(keyed.keys, wanted, stores, config.segment_samples)
    encoder = Encoder(source, preprocess, prefixes, stores, config, probes=keyed.extremes())
    total = sum(len(unit.rows) for unit in units)
    with tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05) as progress:
        for unit, bad in encoder.run(units, done):
            done.bad += [other for sample in bad for other in _alike(sample, keyed.keys)]
            for cut in unit.cuts:
                done.new[cut] += len(unit.rows) - len(bad)
            progress.update(len(unit.rows))
    return done


def _alike(sample: BadSample, keys: np.ndarray) -> list[BadSample]:
    """`sample` and every other row with the same content."""
    rows = np.flatnonzero((keys == keys[sample.row]).all(1))
    return [BadSample(int(row), sample.source, sample.reason) for row in rows]
