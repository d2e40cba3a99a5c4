"""States on disk: written once in immutable zarr v3 segments, read through memory maps.

format/    the format on disk: names, codecs, metadata, keys
local/     segments on this disk: writing, caching, reading, batches
remote/    stores in buckets, mirrored on this disk
store      a folder of segments that share one recipe
upkeep/    whole stores: describe, verify, compact, collect garbage, remove samples, attachments

A module imports only from those above it. Other packages import only the names that are given here. Modules that handle
values need torch, and are imported when a name of theirs is first used.
"""

# ruff: noqa: F401
# mypy: implicit-reexport

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.store.format.codecs import CODECS
from pipeline.store.format.layout import find_stores, segment_id
from pipeline.store.format.names import (
    ATTACHMENTS,
    EXTRA_PREFIX,
    FORMAT,
    INPUT_PREFIX,
    PROBE,
    SHAPE_PREFIX,
    STATE_PREFIX,
    SUFFIX,
)
from pipeline.store.format.segment_files import ListedFile, folder_nbytes
from pipeline.store.local.files import own_entries
from pipeline.store.local.index import KeySet, Rows, first_rows
from pipeline.store.local.segment_cache import SegmentCache
from pipeline.store.local.temporary import discard, exclusive_lock, sweep, temporary_folder
from pipeline.store.remote.bucket import Bucket, check_url
from pipeline.store.remote.mirror import Remote
from pipeline.store.store import Store, exclusive_access, remove_store
from pipeline.store.upkeep.attachments import has_attachment, read_attachment, remove_attachment, write_attachment
from pipeline.store.upkeep.describe import describe, format_bytes, format_facts
from pipeline.store.upkeep.plans import UpkeepPlan, plan_compact, plan_gc, plan_removal
from pipeline.store.upkeep.projected import projected_nbytes

if TYPE_CHECKING:
    from pipeline.store.local.read_ahead import ReadAhead
    from pipeline.store.local.reader import Reader
    from pipeline.store.local.resident import Resident
    from pipeline.store.local.stored_tensor import round_trip
    from pipeline.store.upkeep.rewrite import apply_changes
    from pipeline.store.upkeep.verify import verify

_OF_VALUES = {
    "ReadAhead": "local.read_ahead",
    "Reader": "local.reader",
    "Resident": "local.resident",
    "round_trip": "local.stored_tensor",
    "apply_changes": "upkeep.rewrite",
    "verify": "upkeep.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _OF_VALUES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OF_VALUES[name]}"), name)
