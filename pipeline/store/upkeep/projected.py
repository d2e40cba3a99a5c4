"""The size of a store of a whole data set, projected from a store of some of its samples."""

from pipeline.store.format.codecs import BESIDE
from pipeline.store.format.names import OFFSETS
from pipeline.store.format.segment_files import file_sizes
from pipeline.store.store import Store


def projected_nbytes(store: Store, positions: float, *, segments: int, samples: int, to_positions: float) -> int:
    """Return the bytes that `segments` with so many `samples` take, projected from those of `store`.

    Metadata grows with the number of segments, a ragged tensor with its positions (tokens, frames), everything else
    with the number of samples. `positions` are those of the samples in `store`, `to_positions` those of all `samples`.
    """
    per_segment = per_sample = per_position = 0
    for segment in store.segments():
        sizes = file_sizes(store.path / segment)
        ragged = {name.partition("/")[0].removesuffix(OFFSETS) for name in sizes if OFFSETS in name}
        for name, size in sizes.items():
            array, _, file = name.partition("/")
            if file in ("", "zarr.json"):
                per_segment += size
            elif not array.endswith(OFFSETS) and _tensor(array) in ragged:
                per_position += size
            else:
                per_sample += size
    own = max(1, len(store.keys()))
    return round(
        per_segment / max(1, len(store.segments())) * segments
        + per_sample / own * samples
        + per_position / max(1.0, positions) * to_positions
    )


def _tensor(array: str) -> str:
    """Return the name of the tensor that an array belongs to."""
    return next((array.removesuffix(suffix) for suffix in BESIDE if array.endswith(suffix)), array)
