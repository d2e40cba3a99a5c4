"""Names of files, folders and arrays of a store; reading files that anybody may have written, within limits.

<store>/recipe.json
<store>/suffix/                             pretrained weights after the cut; may be absent
<store>/probe/                              outputs of the prefix for fixed inputs; may be absent
<store>/items/                              fields of the items of data sets, in stores of the library
<store>/<segment id>/zarr.json              zarr v3 group, written last: without it there is no segment
<store>/<segment id>/<array>/zarr.json      keys | sums | state.<name> | input.<name> | shape.<name>
| extra.<name> | <tensor>.offsets (ragged) | <tensor>.scales (int8)
<store>/<segment id>/<array>/c.0.0          mappable: the one chunk, in little-endian C order, and its crc32c
<store>/<segment id>/<array>/c.3.0          compressed: one of several chunks along the first axis
"""

import os
import re
import stat
from pathlib import Path
from typing import Final

from pipeline.errors import CorruptStoreError

FORMAT: Final = 2
RECIPE_FILE = "recipe.json"
METADATA_FILE = "zarr.json"
SUFFIX, PROBE = "suffix", "probe"
ATTACHMENTS = (SUFFIX, PROBE)
"""Folders of a store that hold no states."""
OF_LIBRARY = ("items", ".unpacked")
"""Folders of a store of the library: fields of its items, which exist nowhere else, and unpacked segments."""
SEGMENT_ID = re.compile(r"[0-9a-f]{32}")

KEYS, SUMS = "keys", "sums"
STATE_PREFIX, INPUT_PREFIX, SHAPE_PREFIX, EXTRA_PREFIX = "state.", "input.", "shape.", "extra."
OFFSETS, SCALES = ".offsets", ".scales"
TENSOR_NAME = re.compile(r"(state|input|shape|extra)\.[A-Za-z0-9_.\-]{1,200}")
SAMPLE_AXIS = "sample"
CHUNK_SEPARATOR = "."
CHECKSUM_BYTES = 4

MAX_METADATA_BYTES = 1 << 22
MAX_BESIDE_BYTES = 1 << 28
"""Size of arrays that are read into memory whole: keys, sums, offsets, scales."""
MAX_EMPTY_BYTES = 1 << 31
"""Size that an array without values may claim, its axes of length 0 counted as 1; no file confirms such a claim."""
MAX_AXES = 32
MAX_RATIO = 1 << 14
"""A chunk holds at most this many times the bytes of its file; zeros compress to four times as many."""
SPARSE_ABOVE = 1 << 30
"""Larger chunk files must be on disk, and not mostly holes, which take long to read."""
REMEDY = "remove the segment's folder and encode again"


def read_file(where: Path | str, limit: int | None = None) -> bytes:
    """Return the bytes of a regular file; opening anything else may block for ever, or have effects.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is longer than `limit` bytes.
    """
    if not stat.S_ISREG(os.stat(where).st_mode):
        raise OSError(None, "no file", str(where))
    with open(os.open(where, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return data


def corrupt(where: Path | str, fault: str) -> CorruptStoreError:
    """Return the error for a file or folder `where` that differs from what was written."""
    return CorruptStoreError(f"{where} {fault}; {REMEDY}")


def unreadable(where: Path | str, error: OSError) -> CorruptStoreError:
    """Return the error for a file or folder `where` that cannot be read."""
    return CorruptStoreError(f"{where}: cannot be read ({error.strerror}); {REMEDY}")
