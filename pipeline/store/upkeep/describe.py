"""What a store holds, in figures and in words."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.keys import Recipe
from pipeline.store.format.codecs import BESIDE
from pipeline.store.format.layout import ArraySpec
from pipeline.store.format.metadata import read_array_spec, read_segment_spec
from pipeline.store.format.segment_files import folder_nbytes
from pipeline.store.local.index import first_rows
from pipeline.store.local.temporary import sweep
from pipeline.store.store import Store


@dataclass(frozen=True)
class TensorFacts:
    """One tensor over all segments.

    Attributes:
        dtypes: types of the values; where they are stored in another one as `float16 in int8`.
        shapes: of a sample, `5 x 6`; `2 x *` where the lengths of an axis differ.
        bytes: size of its files, with those of its offsets and scales.
    """

    dtypes: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class StoreFacts:
    """A store in figures; sizes in bytes, of files.

    Attributes:
        samples: distinct ones.
        copies: rows that hold a sample which another row holds too.
        segments: samples of each segment, ascending.
        set_aside: distinct samples found bad that no segment holds.
        leftovers: temporary folders of dead writers.
    """

    path: str
    recipe: Recipe
    samples: int
    copies: int
    segments: tuple[int, ...]
    bytes: int
    tensors: dict[str, TensorFacts]
    set_aside: int
    leftovers: int


def describe(store: Store) -> StoreFacts:
    """Return what `store` holds, read from its metadata and keys.

    Raises:
        CorruptStoreError: they are not those that were written.
    """
    keys, bad, nbytes = store.keys(), store.set_aside(), 0
    sizes, tensors = [], dict[str, TensorFacts]()
    for segment in store.segments():
        path = store.path / segment
        spec = read_segment_spec(path)
        sizes.append(spec.samples)
        nbytes += folder_nbytes(path)
        for name in spec.tensors:
            tensors[name] = _added(tensors.get(name, TensorFacts()), path / name, read_array_spec(path / name))
    distinct, bad = len(first_rows(keys)), bad[first_rows(bad)]
    return StoreFacts(
        store.where,
        store.recipe,
        distinct,
        len(keys) - distinct,
        tuple(sorted(sizes)),
        nbytes,
        dict(sorted(tensors.items())),
        int(store.missing(bad).sum()),
        sweep(store.path, remove=False),
    )


def format_facts(facts: StoreFacts) -> Iterator[str]:
    """Yield the lines that describe a store to users."""
    recipe = facts.recipe
    yield f"{facts.path}: {facts.samples:,} samples, {format_bytes(facts.bytes)}{_each(facts.bytes, facts.samples)}"
    yield f"  cut {recipe.cut}, {recipe.storage}, computed in {recipe.compute_dtype}, view {recipe.view or 'plain'}"
    yield f"  weights {recipe.weights}, architecture {recipe.architecture}, format {recipe.format}"
    yield f"  preprocessing {json.dumps(recipe.preprocessing)}"
    if facts.segments:
        middle = statistics.median(facts.segments)
        yield (
            f"  {len(facts.segments):,} segments of {facts.segments[0]:,} to {facts.segments[-1]:,} samples, "
            f"half of them of {middle:,.0f} or more"
        )
    for name, tensor in facts.tensors.items():
        kinds = f"{' and '.join(tensor.dtypes)}, {' and '.join(tensor.shapes)}"
        yield f"  {name}: {kinds}; {format_bytes(tensor.bytes)}{_each(tensor.bytes, facts.samples)}"
    if facts.copies:
        yield f"  {facts.copies:,} rows hold samples that other rows hold too"
    if facts.set_aside:
        yield f"  {facts.set_aside:,} samples were found bad and are not stored"
    if facts.leftovers:
        yield f"  {facts.leftovers:,} temporary folders of writers that were killed"


def format_bytes(nbytes: float) -> str:
    """Return a size for users: `1.5 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _each(nbytes: int, samples: int) -> str:
    return f", {format_bytes(nbytes / samples)} a sample" if samples else ""


def _added(facts: TensorFacts, array: Path, spec: ArraySpec) -> TensorFacts:
    """Return the facts of a tensor with those of one more segment."""
    axes = [*map(str, spec.entry)]
    if spec.axis is not None:
        axes.insert(spec.axis, "*")
    stored = spec.codec.name if spec.codec.is_packed else spec.stored
    dtype = spec.dtype if spec.dtype == stored else f"{spec.dtype} in {stored}"
    nbytes = sum(folder_nbytes(array.with_name(f"{array.name}{end}")) for end in ("", *BESIDE))
    return TensorFacts(
        tuple(dict.fromkeys([*facts.dtypes, dtype])),
        tuple(dict.fromkeys([*facts.shapes, " x ".join(axes) or "one number"])),
        facts.bytes + nbytes,
    )
