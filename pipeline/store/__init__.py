"""States on disk: written once in immutable zarr v3 segments, read through memory maps."""

from pipeline.store.format import FORMAT, INPUT_PREFIX, SHAPE_PREFIX, STATE_PREFIX, segment_id
from pipeline.store.index import Rows
from pipeline.store.materialise import Scratch
from pipeline.store.reader import Reader
from pipeline.store.resident import Resident
from pipeline.store.store import Store
from pipeline.store.verify import verify
from pipeline.store.writer import SegmentInfo

__all__ = [
    "FORMAT",
    "INPUT_PREFIX",
    "SHAPE_PREFIX",
    "STATE_PREFIX",
    "Reader",
    "Resident",
    "Rows",
    "Scratch",
    "SegmentInfo",
    "Store",
    "segment_id",
    "verify",
]
