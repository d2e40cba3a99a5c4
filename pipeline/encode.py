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
from pipeline.encoded import Encoded
from pipeline.encoder import EncodeConfig, Encoder
from pipeline.feed import Keyed, dead_workers_told
from pipeline.models import Preprocess
from pipeline.quarantine import BadSample, name_of
from pipeline.split import Prefix
from pipeline.store import Store
from pipeline.unit import Unit, plan


def encode(
    source: Source,
    keyed: Keyed,
    views: Sequence[Preprocess],
    prefixes: Sequence[Prefix],
    stores: Sequence[Sequence[Store]],
    config: EncodeConfig,
    *,
    rows: np.ndarray | None = None,
    done: Encoded | None = None,
) -> Encoded:
    """Bring the samples `rows` of `source` (all, if None) into the stores; what is there already is not made again.

    There is a prefix per cut, all split from one model on the device to use, and a preprocessing per view;
    `stores[view][cut]` takes what they give together. A sample is read and decoded once for all of them. What is done
    is added to `done`, and samples that were set aside before are left out.
    """
    done = done or Encoded.begun(keyed, len(prefixes))
    wanted = done.keyed.good if rows is None else np.intersect1d(rows, done.keyed.good)
    units = plan(keyed.keys, wanted, [store for view in stores for store in view], config.segment_samples)
    encode_units(Encoder(source, views, prefixes, stores, config, probes=keyed.outside_in()), units, done)
    return done


def encode_units(encoder: Encoder, units: Sequence[Unit], done: Encoded) -> None:
    """Have `encoder` run `units`, which are planned from the keys of `done`, and add to `done` what was done."""
    total = sum(len(part.rows) for unit in units for part in encoder.parts(unit))
    with (
        dead_workers_told(encoder.workers),
        closing(encoder.run(units, done)) as running,  # whatever ends this, what was computed is written first
        tqdm(total=total, desc="encode", unit="sample", disable=None, smoothing=0.05, leave=None) as progress,
    ):
        for part, bad in running:
            if bad:
                known = {sample.row for sample in done.keyed.bad}
                alike = [other for sample in bad for other in _alike(sample, encoder.source, done.keyed)]
                done.keyed.bad.extend(sample for sample in alike if sample.row not in known)
            for cut in part.cuts:
                done.new[cut] += len(part.rows) - len(bad)
            progress.update(len(part.rows))


def _alike(sample: BadSample, source: Source, keyed: Keyed) -> list[BadSample]:
    """`sample` and every other row with the same content, each under its own name."""
    rows = keyed.meant(np.flatnonzero((keyed.keys == keyed.keys[sample.row]).all(1)))
    return [replace(sample, row=row, source=name_of(source, row)) for row in rows.tolist()]
