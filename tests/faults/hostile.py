"""Stores as an attacker would write them, and what comes of opening them.

A case is a list of edits of one segment of a golden store, kept as JSON: paths are relative to the store, the folder of
the segment is written `SEGMENT`. Whoever changes a store can also seal it, so most cases are sealed anew.
"""

import base64
import json
import math
import os
import random
import resource
import shutil
import traceback
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numcodecs import blosc

from pipeline.errors import RecyclingError
from pipeline.keys import digest
from pipeline.store import (
    CODECS,
    Reader,
    Resident,
    Rows,
    SegmentCache,
    Store,
    apply_changes,
    exclusive_access,
    plan_removal,
    segment_id,
    verify,
)
from pipeline.store.format.layout import ArraySpec
from pipeline.store.format.metadata import read_array_spec

GOLDEN = Path(__file__).parents[1] / "golden/stores"
GOLDEN_CODECS = ("raw", "zstd", "int8", "int8-channel", "int4-group")
MEMORY = 1 << 30
"""Bytes that opening a small hostile store may take."""
SCRATCH = 1 << 28
SMALL = 1 << 16


def base(codec: str, folder: Path, number: int = 0) -> tuple[Path, str]:
    """Copy a golden store with one of its segments to `folder`; return it and the segment's id."""
    source = GOLDEN / codec
    small = [path for path in sorted(source.iterdir()) if path.is_dir() and not _is_wide(path)]
    chosen = small[number % len(small)]
    shutil.copytree(chosen, folder / chosen.name)
    shutil.copy(source / "recipe.json", folder)
    return folder, chosen.name


def _is_wide(segment: Path) -> bool:
    return read_array_spec(segment / "state.x").nbytes > 1 << 20


class Victim:
    """A store that is being edited; `edits` repeats what was done."""

    def __init__(self, root: Path, segment: str) -> None:
        self.root, self.segment = root, segment
        self.edits: list[list[Any]] = []

    def do(self, kind: str, path: str, *what: Any) -> None:
        """Make one edit: write, remove, size, poke, link, fifo, folder, name."""
        self.edits.append([kind, path, *what])
        there = self.root / path.replace("SEGMENT", self.segment)
        if kind in ("write", "link", "fifo", "folder", "remove") and (there.is_symlink() or there.exists()):
            shutil.rmtree(there) if there.is_dir() and not there.is_symlink() else there.unlink()
        if kind == "write":
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(base64.b64decode(what[0]))
        elif kind == "size":
            os.truncate(there, what[0])
        elif kind == "poke":
            with there.open("r+b") as file:
                file.seek(what[0])
                file.write(base64.b64decode(what[1]))
        elif kind == "link":
            there.symlink_to(what[0].replace("OUTSIDE", str(self.root.parent)))
        elif kind == "fifo":
            os.mkfifo(there)
        elif kind == "folder":
            there.mkdir()
        elif kind == "name":
            there.rename(there.parent / what[0])
            self.segment = what[0]

    def write(self, path: str, data: bytes) -> None:
        self.do("write", path, base64.b64encode(data).decode())

    def metadata(self, node: str) -> Any:
        return json.loads(self.read(f"SEGMENT/{node}/zarr.json"))

    def read(self, path: str) -> bytes:
        """Return a small file; others may be endless."""
        there = self.root / path.replace("SEGMENT", self.segment)
        if there.is_symlink() or not there.is_file() or there.stat().st_size > SMALL:
            raise OSError(f"{there} is no small file")
        return there.read_bytes()

    def arrays(self) -> list[str]:
        return sorted(path.name for path in (self.root / self.segment).iterdir() if path.is_dir())

    def files(self) -> list[str]:
        found = [path for path in sorted(self.root.rglob("*")) if path.is_file() and not path.is_symlink()]
        return [str(path.relative_to(self.root)).replace(self.segment, "SEGMENT") for path in found]

    def seal(self) -> None:
        """Make recipe, names and seal fit what the store says now, as far as that can be done."""
        try:
            recipe = json.loads(self.read("recipe.json"))
            group = self.metadata(".")
            attributes = group["attributes"]
            names = ["keys", "sums"]
            for name in attributes["tensors"]:
                own = self.metadata(name)
                names += [name] + [f"{name}.offsets"] * ("ragged_axis" in own["attributes"])
                scaled = own["data_type"] == "int8" and "float" in own["attributes"]["dtype"]
                names += [f"{name}.scales"] * scaled
            attributes |= {"recipe": digest(recipe), "seal": ""}
            sealed = {"segment": attributes, "arrays": {name: self.metadata(name) for name in names}}
            attributes["seal"] = digest(sealed)
            self.write("SEGMENT/zarr.json", json.dumps(group).encode())
        except (KeyError, TypeError, ValueError, OSError, RecursionError):
            pass


def checksummed(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


# ---- what may be done to a store


NUMBERS = [
    0, 1, 2, 3, 4, 5, 7, 16, 17, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63,
    2**64, 10**30, 10**400, 1.5, 2.0, 1e308, -0.0, True, False,
]  # fmt: skip
TEXTS = [
    "", "x", "..", "../..", "/etc/passwd", "state.x", "state.../x", "state.x/../../y", "state." + "a" * 3000, "keys",
    "sums", "state.\x00", "state.é", "\ud800", "object", "float16", "bfloat16", "uint16", "int8", "int64", "bool",
    "float64",
    "complex64", "r16", "|O", "default", "regular", "v2", "bytes", "crc32c", "blosc", "gzip", "sharding_indexed",
    "vlen-utf8", "state.x.offsets", "0" * 32, "g" * 32, "numcodecs.pickle", "os.system", "__class__", "big",
]  # fmt: skip


def value(draw: random.Random) -> Any:
    deep: Any = 0
    for _ in range(draw.choice([3, 70, 900])):
        deep = [deep] if draw.random() < 0.9 else {"a": deep}
    numbers = [draw.choice(NUMBERS) for _ in range(draw.choice([0, 1, 2, 3, 4, 33]))]
    texts = [draw.choice(TEXTS) for _ in range(draw.choice([0, 1, 2]))]
    codecs = [{"name": name, "configuration": {}} for name in texts]
    special = [None, float("nan"), float("inf"), deep, {}, [], {"a": 1}]
    return draw.choice([draw.choice(NUMBERS), draw.choice(TEXTS), draw.choice(special), numbers, texts, codecs])


def places(node: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [where, *(place for name, child in inner for place in places(child, (*where, name)))]


def change_json(draw: random.Random, victim: Victim) -> None:
    """Replace, remove, add or repeat something in one file of metadata."""
    path = draw.choice([name for name in victim.files() if name.endswith(".json")] or ["recipe.json"])
    try:
        root = json.loads(victim.read(path))
        places_there = places(root)[1:]
    except (ValueError, OSError, RecursionError):
        return
    if not places_there:
        return
    *way, last = draw.choice(places_there)
    node = root
    for step in way:
        node = node[step]
    kind = draw.choice(["replace"] * 6 + ["remove", "add", "repeat", "nudge"])
    if kind == "remove":
        del node[last]
    elif kind == "add" and isinstance(node, dict):
        name = draw.choice(["storage_transformers", "dimension_names", "consolidated_metadata", "must_understand", "x"])
        node[name] = value(draw)
    elif kind == "nudge" and isinstance(node[last], int):
        node[last] += draw.choice([-1, 1])
    else:
        node[last] = value(draw)
    text = json.dumps(root)
    if kind == "repeat":
        text = text[:-1] + f', "{draw.choice(sorted(root))}": {json.dumps(value(draw))}}}'
    victim.write(path, text.encode("utf-8", "surrogatepass"))


def change_text(draw: random.Random, victim: Victim) -> None:
    path = draw.choice(victim.files())
    data = bytearray(victim.read(path))
    kind = draw.choice(["flip", "cut", "longer", "noise", "nothing", "repeat"])
    if kind == "flip" and data:
        for _ in range(draw.choice([1, 1, 3])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[draw.randrange(len(data) + 1) :]
    elif kind == "longer":
        data += bytes(draw.choice([1, 4, 4096]))
    elif kind == "noise":
        data = bytearray(draw.randbytes(len(data)))
    elif kind == "repeat":
        data *= 2
    else:
        data.clear()
    victim.write(path, bytes(data))


def change_kind(draw: random.Random, victim: Victim) -> None:
    """Put something else in the place of a file or a folder."""
    arrays = [f"SEGMENT/{name}" for name in victim.arrays()]
    path = draw.choice([*victim.files(), *arrays])
    targets = [
        "/dev/zero",
        "/dev/stdin",
        "/etc/passwd",
        "OUTSIDE",
        "OUTSIDE/secret",
        path.split("/")[-1],
        ".",
        "..",
        "nowhere",
    ]
    kind = draw.choice(["link", "link", "fifo", "folder", "remove", "size"])
    if kind == "link":
        victim.do("link", path, draw.choice(targets))
    elif kind == "size":
        if path not in arrays:
            victim.do("size", path, draw.choice([0, 1, 4, 1 << 20, 1 << 33, 1 << 42]))
    else:
        victim.do(kind, path)


def lie(draw: random.Random, victim: Victim) -> None:
    """Rewrite one array so that metadata, file sizes and checksums agree on something else."""
    name = draw.choice(victim.arrays())
    try:
        old = read_array_spec(victim.root / victim.segment / name)
    except RecyclingError:
        return
    shape = list(old.shape)
    for _ in range(draw.choice([0, 1, 1, 2])):
        shape[draw.randrange(len(shape))] = draw.choice([0, 1, 2, 3, 4, 5, 6, 100, 10**5, 2**31, 2**40, 2**62])
    if draw.random() < 0.2:
        shape = shape[:-1] or [4]
    if draw.random() < 0.2:
        shape.append(draw.choice([0, 1, 2, 2**33]))
    dtype, stored = old.dtype, old.stored
    if draw.random() < 0.3:
        pairs = [(d, s) for d, ways in STORED.items() for s in ways]
        dtype, stored = draw.choice(pairs)
    axis = draw.choice([old.axis] * 4 + [None, 0, 1])
    codec = draw.choice([old.codec] * 4 + [CODECS["raw"], CODECS["zstd"]])
    forge(draw, victim, name, ArraySpec(tuple(shape), dtype, stored, axis, codec))


STORED = {
    "float16": ("float16", "int8", "uint8"), "bfloat16": ("uint16", "int8", "uint8"),
    "float32": ("float32", "int8", "uint8"),
    "int64": ("int32", "int64"), "int32": ("int32",), "int8": ("int8",), "uint32": ("uint32",), "bool": ("bool",),
}  # fmt: skip


def forge(draw: random.Random, victim: Victim, name: str, spec: ArraySpec) -> None:
    """Write an array of these properties, with checksums that fit; what is too large for that is a file of holes."""
    zero: Any = False if spec.stored == "bool" else 0
    metadata = spec.metadata(name) | {"fill_value": zero, "storage_transformers": []}
    for old in [path for path in victim.files() if path.startswith(f"SEGMENT/{name}/c.")]:
        victim.do("remove", old)
    victim.write(f"SEGMENT/{name}/zarr.json", json.dumps(metadata).encode())
    for chunk in spec.chunk_files[:3] if spec.nbytes < 1 << 62 and spec.chunks < 1000 else []:
        path = f"SEGMENT/{name}/{chunk}"
        size = spec.nbytes if spec.codec.is_mappable else spec.chunk_nbytes
        if not spec.codec.is_mappable:
            plain = draw.randbytes(size) if size < 1 << 12 else bytes(min(size, 1 << 20))
            packed = bytearray(blosc.compress(plain, b"zstd", 3, blosc.BITSHUFFLE))
            if size != len(plain) and size < 1 << 32:
                packed[4:8] = size.to_bytes(4, "little")
                if draw.random() < 0.5:
                    packed[8:12] = size.to_bytes(4, "little")
            victim.write(path, checksummed(bytes(packed)))
        elif size < 1 << 16:
            victim.write(path, checksummed(content(draw, name, spec)))
        elif size < 1 << 43:
            victim.write(path, b"")
            victim.do("size", path, size + 4)


def content(draw: random.Random, name: str, spec: ArraySpec) -> bytes:
    count = math.prod(spec.shape)
    if name.endswith(".offsets") and spec.stored == "int64":
        edges = [0, 1, 2, 6, -1, 2**62, 2**63 - 1, -(2**63) + 1]
        return np.array([draw.choice(edges) for _ in range(count)], np.int64).tobytes()
    return draw.randbytes(spec.nbytes)


def change_chunk(draw: random.Random, victim: Victim) -> None:
    """Other values under a checksum that fits: offsets, scales, sums, packed bytes with a header of one's own."""
    chunks = [path for path in victim.files() if "/c." in path]
    if not chunks:
        return
    path = draw.choice(chunks)
    data = bytearray(victim.read(path)[:-4])
    if path.split("/")[1].endswith(".offsets"):
        edges = [0, 1, 2, 3, 6, 8, -1, 2**62, 2**63 - 1, -(2**63) + 1]
        data[:] = np.array([draw.choice(edges) for _ in range(len(data) // 8)], np.int64).tobytes()
    elif data:
        for _ in range(draw.choice([1, 1, 2, 8])):
            data[draw.randrange(min(len(data), draw.choice([16, 64, 1 << 16])))] = draw.randrange(256)
    victim.write(path, checksummed(bytes(data)))


def change_keys(draw: random.Random, victim: Victim) -> None:
    """Give the segment other keys and the name that they ask for."""
    count = draw.choice([0, 1, 2, 3, 4, 5, 1000])
    keys = np.frombuffer(draw.randbytes(16 * count), np.uint8).reshape(count, 16)
    spec = ArraySpec(keys.shape, "uint8", "uint8")
    for old in [path for path in victim.files() if path.startswith("SEGMENT/keys/c.")]:
        victim.do("remove", old)
    metadata = spec.metadata("keys") | {"fill_value": 0, "storage_transformers": []}
    victim.write("SEGMENT/keys/zarr.json", json.dumps(metadata).encode())
    if count:
        victim.write("SEGMENT/keys/c.0.0", checksummed(keys.tobytes()))
    victim.do("name", "SEGMENT", segment_id(keys))


ACCIDENTS = [*[change_json] * 6, *[change_text] * 2, *[change_kind] * 2]
FORGERIES = [*[lie] * 5, *[change_chunk] * 4, change_keys]


def mutate(draw: random.Random, victim: Victim) -> bool:
    """Edit a store in one to four ways; return whether somebody who knows the format meant it: other numbers then."""
    forged = draw.random() < 0.8
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        try:
            draw.choice(ACCIDENTS + FORGERIES if forged else ACCIDENTS)(draw, victim)
        except OSError:  # an earlier edit is in the way
            continue
    if forged:
        victim.seal()
    return forged


# ---- what comes of it


@dataclass(frozen=True)
class Truth:
    """What a store held before it was edited; None for `tensors` where an attacker may have written others."""

    keys: np.ndarray
    tensors: dict[str, torch.Tensor] | None

    @classmethod
    def of(cls, root: Path) -> "Truth":
        store = Store.open(root)
        return cls(store.keys(), Reader(root).gather(store.rows(store.keys())))

    def rows(self, store: Store) -> Rows:
        return store.rows(self.keys if self.tensors is not None else store.keys())

    def compare(self, result: dict[str, torch.Tensor]) -> str:
        if self.tensors is None:
            return "read"
        same = result.keys() == self.tensors.keys()
        same = same and all(torch.equal(result[name], wanted) for name, wanted in self.tensors.items())
        return "equal" if same else "FINDING other numbers"


def attempt(root: str, scratch: str, pristine: str, forged: bool, told: str) -> None:
    """Do all that is done with a store, within bounds of memory, and write the outcome to the file `told`.

    `pristine` is the store before it was edited. This is the body of a child process.
    """
    torch.set_num_threads(1)
    truth = Truth.of(Path(pristine))
    if forged:
        truth = replace(truth, tensors=None)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    outcome, before = {}, listing(Path(root))
    for step in (use_verify, use_tables, use_reader, use_scratch, use_resident, use_upkeep):
        if step is use_upkeep and listing(Path(root)) != before:
            outcome["store"] = "FINDING changed by being read"
        try:
            outcome[step.__name__] = step(Path(root), Path(scratch), truth)
        except RecyclingError as error:
            str(error).encode("utf-8", "backslashreplace")
            outcome[step.__name__] = "refused"
        except BaseException:
            outcome[step.__name__] = f"FINDING {traceback.format_exc()}"
    outcome["peak"] = str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    Path(told).write_text(json.dumps(outcome))


def listing(folder: Path, but: Collection[str] = ()) -> list[tuple[str, int, int]]:
    """Everything in a folder, with what tells that it was changed, but for some entries."""
    found = [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] not in but]
    return [(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in found]


def use_verify(root: Path, scratch: Path, truth: Truth) -> str:
    return "refused" if verify(Store.open(root)) else "sound"


def use_tables(root: Path, scratch: Path, truth: Truth) -> str:
    store = Store.open(root)
    store.set_aside()
    store.nbytes()
    return f"{len(store.keys())} keys"


def use_reader(root: Path, scratch: Path, truth: Truth) -> str:
    store = Store.open(root)
    return truth.compare(Reader(root).gather(truth.rows(store)))


def use_scratch(root: Path, scratch: Path, truth: Truth) -> str:
    store = Store.open(root)
    return truth.compare(Reader(root, cache=SegmentCache(scratch, SCRATCH)).gather(truth.rows(store)))


def use_upkeep(root: Path, scratch: Path, truth: Truth) -> str:
    """Take the first sample out: the one verb that reads a segment to write another."""
    store = Store.open(root)
    with exclusive_access(root):
        plan = plan_removal(root, store.keys()[:1])
        return "refused" if apply_changes(store, plan.changes) else "changed"


def use_resident(root: Path, scratch: Path, truth: Truth) -> str:
    store = Store.open(root)
    rows, reader = truth.rows(store), Reader(root)
    if Resident.nbytes(reader, rows) >= 1 << 24:
        return "large"
    return truth.compare(Resident(reader, rows, torch.device("cpu")).gather(rows))
