"""Flow 1: raw data -> sample -> key -> prefix -> state -> segment -> store.

`encode` plans what each store lacks, and has the units of the plan run by the encoder. A unit is committed whole, and
the plan depends on nothing but the keys and what is committed: a rerun after a kill makes the same segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from pipeline.data.source import Source
from pipeline.encoder import EncodeConfig, Encoded, Encoder
from pipeline.feed import Keyed, dead_workers_told
from pipeline.models import Preprocess
from pipeline.quarantine import BadSample, name_of
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
) -> Encoded:
    """Bring every sample of `source` into the store of every cut; what is there already is not made again.

    `prefixes` and `stores` go together, one per cut, all prefixes split from one model on the device to use.
    """
    done = Encoded.begun(keyed, len(stores))
    units = plan(keyed.keys, keyed.good, stores, config.segment_samples)
    encoder = Encoder(source, preprocess, prefixes, stores, config, probes=keyed.outside_in())
    total = sum(len(unit.rows) for unit in units)
    with (
        dead_workers_told(encoder.workers),
        closing(encoder.run(units, done)) as running,  # whatever ends this, what was computed is written first
        tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05) as progress,
    ):
        for unit, bad in running:
            done.keyed.bad.extend(other for sample in bad for other in _alike(sample, source, keyed.keys))
            for cut in unit.cuts:
                done.new[cut] += len(unit.rows) - len(bad)
            progress.update(len(unit.rows))
    return done


def _alike(sample: BadSample, source: Source, keys: np.ndarray) -> list[BadSample]:
    """`sample` and every other row with the same content, each under its own name."""
    rows = np.flatnonzero((keys == keys[sample.row]).all(1)).tolist()
    return [replace(sample, row=row, source=name_of(source, row)) for row in rows]
