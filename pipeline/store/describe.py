"""What a store holds, in figures and in words."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.keys import Recipe
from pipeline.store.format import OFFSETS, SCALES, ArraySpec
from pipeline.store.keyset import first_rows
from pipeline.store.listing import segment_nbytes
from pipeline.store.metadata import read_array_spec, read_segment_spec
from pipeline.store.scratch import leftovers
from pipeline.store.store import Store


@dataclass(frozen=True)
class TensorFacts:
    """One tensor over all segments.

    Attributes:
        dtypes: what the values are, where they differ from how they are stored as `float16 in int8`.
        shapes: of a sample, `5 x 6`; `2 x *` where the lengths of an axis differ.
        bytes: size of its files, with those of its offsets and scales.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Facts:
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

    def json(self) -> dict[str, object]:
        """Return the figures in JSON's own types."""
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: dataclasses.asdict(facts) for name, facts in self.tensors.items()}
        return raw | {"recipe": json.loads(self.recipe.to_json()), "tensors": tensors}


def describe(store: Store) -> Facts:
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
        nbytes += segment_nbytes(path)
        for name in spec.tensors:
            here = _tensor_facts(path / name, read_array_spec(path / name))
            tensors[name] = _together(tensors[name], here) if name in tensors else here
    distinct, bad = len(first_rows(keys)), bad[first_rows(bad)]
    waiting = int(store.missing(bad).sum())
    return Facts(
        store.where,
        store.recipe,
        distinct,
        len(keys) - distinct,
        tuple(sorted(sizes)),
        nbytes,
        dict(sorted(tensors.items())),
        waiting,
        len(leftovers(store.path)),
    )


def tell(facts: Facts) -> Iterator[str]:
    """Yield the lines that say the same."""
    recipe = facts.recipe
    yield f"{facts.path}: {facts.samples:,} samples, {readable(facts.bytes)}{_each(facts.bytes, facts.samples)}"
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
        yield f"  {name}: {kinds}; {readable(tensor.bytes)}{_each(tensor.bytes, facts.samples)}"
    if facts.copies:
        yield f"  {facts.copies:,} rows hold samples that other rows hold too"
    if facts.set_aside:
        yield f"  {facts.set_aside:,} samples were found bad and are not stored"
    if facts.leftovers:
        yield f"  {facts.leftovers:,} temporary folders of writers that were killed"


def readable(nbytes: float) -> str:
    """Return a size for people: `1.5 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _each(nbytes: int, samples: int) -> str:
    return f", {readable(nbytes / samples)} a sample" if samples else ""


def _tensor_facts(array: Path, spec: ArraySpec) -> TensorFacts:
    shape: list[object] = list(spec.shape[1:])
    if spec.axis is not None:
        shape.insert(spec.axis, "*")
    dtype = spec.dtype if spec.dtype == spec.stored else f"{spec.dtype} in {spec.stored}"
    beside = [array.with_name(f"{array.name}{end}") for end in (OFFSETS, SCALES)]
    nbytes = sum(segment_nbytes(path) for path in (array, *beside))
    return TensorFacts((dtype,), (" x ".join(map(str, shape)) or "one number",), nbytes)


def _together(first: TensorFacts, second: TensorFacts) -> TensorFacts:
    return TensorFacts(
        _distinct(first.dtypes, second.dtypes), _distinct(first.shapes, second.shapes), first.bytes + second.bytes
    )


def _distinct(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))
