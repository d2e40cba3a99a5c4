"""States on disk: written once in immutable zarr v3 segments, read through memory maps."""

from pipeline.store.format import FORMAT, segment_id
from pipeline.store.index import Rows
from pipeline.store.reader import Reader
from pipeline.store.store import Store
from pipeline.store.verify import verify
from pipeline.store.writer import SegmentInfo

__all__ = ["FORMAT", "Reader", "Rows", "SegmentInfo", "Store", "segment_id", "verify"]
