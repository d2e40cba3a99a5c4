"""States on disk: written once in immutable zarr v3 segments, read through memory maps."""

from pipeline.store.ahead import Ahead
from pipeline.store.attachments import has_attachment, read_attachment, remove_attachment, write_attachment
from pipeline.store.codecs import CODECS
from pipeline.store.describe import describe, readable, tell
from pipeline.store.format import (
    EXTRA_PREFIX,
    FORMAT,
    INPUT_PREFIX,
    PROBE,
    SHAPE_PREFIX,
    STATE_PREFIX,
    SUFFIX,
    find_stores,
    segment_id,
)
from pipeline.store.index import Rows
from pipeline.store.keyset import KeySet, first_rows
from pipeline.store.listing import Listed
from pipeline.store.listing import segment_nbytes as folder_nbytes
from pipeline.store.materialise import Scratch
from pipeline.store.objects import Bucket, Objects, Patience, check_place
from pipeline.store.reader import Reader
from pipeline.store.remote import Remote
from pipeline.store.resident import Resident
from pipeline.store.scratch import claim, discard, sweep
from pipeline.store.scratch import scratch as temporary_folder
from pipeline.store.store import Store, alone, own_entries, remove
from pipeline.store.trial import through
from pipeline.store.upkeep import Upkeep, plan_compact, plan_gc, plan_removal
from pipeline.store.verify import verify
from pipeline.store.writer import SegmentInfo

__all__ = [
    "Bucket",
    "Objects",
    "Patience",
    "Remote",
    "check_place",
    "Ahead",
    "CODECS",
    "EXTRA_PREFIX",
    "FORMAT",
    "INPUT_PREFIX",
    "PROBE",
    "SHAPE_PREFIX",
    "STATE_PREFIX",
    "SUFFIX",
    "KeySet",
    "Listed",
    "Reader",
    "Resident",
    "Rows",
    "Scratch",
    "SegmentInfo",
    "Store",
    "Upkeep",
    "alone",
    "claim",
    "describe",
    "discard",
    "find_stores",
    "folder_nbytes",
    "first_rows",
    "has_attachment",
    "own_entries",
    "plan_compact",
    "plan_gc",
    "plan_removal",
    "read_attachment",
    "readable",
    "remove",
    "remove_attachment",
    "segment_id",
    "sweep",
    "tell",
    "temporary_folder",
    "through",
    "verify",
    "write_attachment",
]
