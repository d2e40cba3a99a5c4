"""Plans of what to remove and what to merge; each is shown to the user before `apply_changes` carries it out.

gc             segments none of whose samples a sample table refers to
compact        small segments, as many increments leave them, into larger ones
rm-samples     named samples, in any segment

gc and compact also remove segments whose samples are all in other segments, as an interrupted command leaves them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.keys import KEY_BYTES, Recipe
from pipeline.store.format.codecs import parse_storage
from pipeline.store.format.layout import committed_segments
from pipeline.store.format.metadata import read_array_spec, read_segment_spec
from pipeline.store.format.names import METADATA_FILE
from pipeline.store.format.segment_files import folder_nbytes, read_keys
from pipeline.store.local.index import KeySet
from pipeline.store.local.temporary import sweep


@dataclass(frozen=True)
class Change:
    """Segments to replace by one that holds what is kept of them, or by none where nothing is.

    Attributes:
        kept: by segment id the rows that are kept, (n,) int64, in their order.
        samples: how many rows go.
        bytes: about how many bytes of files that frees.
        forgotten: keys, in hex, that are also taken out of the lists of bad samples.
        holders: other segments that hold every sample of these; proved before anything goes.
    """

    kept: dict[str, np.ndarray]
    samples: int
    bytes: int
    forgotten: frozenset[str] = frozenset()
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class UpkeepPlan:
    """What one command will do to a store.

    Attributes:
        left: one line for each kind of segment that stays although it might go, and why.
        leftovers: temporary folders of dead writers, which go too.
    """

    changes: list[Change] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    leftovers: int = 0

    @property
    def segments(self) -> int:
        """How many segments go."""
        return sum(len(change.kept) for change in self.changes)

    @property
    def new_segments(self) -> int:
        """How many segments replace them."""
        return sum(any(len(rows) for rows in change.kept.values()) for change in self.changes)

    @property
    def samples(self) -> int:
        """How many samples go, copies of others among them."""
        return sum(change.samples for change in self.changes)

    @property
    def bytes(self) -> int:
        """About how many bytes that frees."""
        return sum(change.bytes for change in self.changes)


def plan_gc(root: Path, used: KeySet, written: float, *, rewrite: bool = False) -> UpkeepPlan:
    """Plan to remove the segments of which no sample is `used`, and with `rewrite` the unused samples of others.

    `written` is when the sample table was written: segments that are not older stay, because an unfinished encode
    commits segments that its table will name only at its end.

    Raises:
        CorruptStoreError: keys cannot be read.
    """
    keys = _keys(root)
    changes = _redundant(root, keys)
    young = partly = unused = 0
    for segment, own in _without(keys, changes):
        kept = np.flatnonzero(used.contains(own))
        if len(kept) == len(own):
            continue
        if (root / segment / METADATA_FILE).stat().st_mtime >= written:
            young += 1
        elif len(kept) == 0 or rewrite:
            changes.append(_dropping(root, segment, own, kept))
        else:
            partly += 1
            unused += len(own) - len(kept)
    left = []
    if young:
        left.append(
            f"{young} segments with samples that no table names are not older than the sample table: an encode that "
            "has not ended may have made them; end it, then collect again"
        )
    if partly:
        left.append(f"{partly} segments hold {unused} samples that no table names beside others; --rewrite takes them")
    return UpkeepPlan(changes, left, sweep(root, remove=False))


def plan_compact(root: Path, recipe: Recipe, target: int) -> UpkeepPlan:
    """Plan to merge segments of less than half of `target` samples into some of at most `target`.

    Only arrays that can be laid end to end as they are can be merged; scales per channel belong to one segment.

    Raises:
        CorruptStoreError: metadata or keys cannot be read.
    """
    keys = _keys(root)
    changes = _redundant(root, keys)
    groups: dict[tuple[object, ...], list[str]] = {}
    unmergeable = 0
    codec, _ = parse_storage(recipe.storage)
    for segment, own in _without(keys, changes):
        if len(own) * 2 < target:
            specs = {name: read_array_spec(root / segment / name) for name in read_segment_spec(root / segment).tensors}
            if not codec.is_mergeable and any(spec.codec.beside for spec in specs.values()):
                unmergeable += 1
                continue
            layout = tuple((name, replace(spec, shape=spec.shape[1:])) for name, spec in specs.items())
            groups.setdefault(layout, []).append(segment)
    for group in groups.values():
        changes += [_merging(root, some, keys) for some in _stretches(group, keys, target) if len(some) > 1]
    left = [f"{unmergeable} small segments have scales per channel, which cannot be merged"] if unmergeable else []
    return UpkeepPlan(changes, left)


def plan_removal(root: Path, keys: np.ndarray) -> UpkeepPlan:
    """Plan to take the samples `keys` (n, 16) uint8 out of every segment that holds them, or lists them as bad.

    Raises:
        CorruptStoreError: metadata or keys cannot be read.
    """
    unwanted, named = KeySet(keys), frozenset(key.tobytes().hex() for key in keys)
    changes = []
    for segment, own in _keys(root).items():
        kept = np.flatnonzero(~unwanted.contains(own))
        if len(kept) < len(own) or not named.isdisjoint(read_segment_spec(root / segment).set_aside):
            changes.append(_dropping(root, segment, own, kept, named))
    return UpkeepPlan(changes)


def _keys(root: Path) -> dict[str, np.ndarray]:
    return {segment: read_keys(root / segment) for segment in committed_segments(root)}


def _without(keys: dict[str, np.ndarray], changes: Sequence[Change]) -> Iterator[tuple[str, np.ndarray]]:
    gone = {segment for change in changes for segment in change.kept}
    return ((segment, own) for segment, own in keys.items() if segment not in gone)


def _redundant(root: Path, keys: dict[str, np.ndarray]) -> list[Change]:
    """Plan to remove segments all of whose samples others hold, the smallest first."""
    names = list(keys)
    all_keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *keys.values()])
    owner = np.repeat(np.arange(len(names)), [len(own) for own in keys.values()])
    first = KeySet(all_keys).find(all_keys)
    copies = np.bincount(first)
    if copies.max(initial=0) < 2:
        return []
    ends = np.cumsum([len(own) for own in keys.values()])[:-1]
    samples = [np.unique(part) for part in np.split(first, ends)]
    stays = np.ones(len(names), np.bool_)
    for number in sorted(range(len(names)), key=lambda number: (len(samples[number]), names[number])):
        if (copies[samples[number]] > 1).all():
            copies[samples[number]] -= 1
            stays[number] = False
    others, owner = KeySet(all_keys[stays[owner]]), owner[stays[owner]]
    changes = []
    for segment in (names[number] for number in np.flatnonzero(~stays)):
        holders = tuple(names[number] for number in np.unique(owner[others.find(keys[segment])]))
        none = np.empty(0, np.int64)
        changes.append(Change({segment: none}, len(keys[segment]), folder_nbytes(root / segment), holders=holders))
    return changes


def _dropping(
    root: Path, segment: str, own: np.ndarray, kept: np.ndarray, forgotten: frozenset[str] = frozenset()
) -> Change:
    gone = len(own) - len(kept)
    return Change({segment: kept}, gone, folder_nbytes(root / segment) * gone // len(own), forgotten)


def _merging(root: Path, segments: Sequence[str], keys: dict[str, np.ndarray]) -> Change:
    """Plan to lay segments end to end; of a sample that several hold, the first one is taken."""
    all_keys = np.concatenate([keys[segment] for segment in segments])
    first = KeySet(all_keys).find(all_keys) == np.arange(len(all_keys))
    ends = np.cumsum([len(keys[segment]) for segment in segments])[:-1]
    kept = {name: np.flatnonzero(own) for name, own in zip(segments, np.split(first, ends), strict=True)}
    doubled = len(all_keys) - int(first.sum())
    nbytes = [folder_nbytes(root / segment) for segment in segments]
    saved = [file for segment in segments[1:] for file in (root / segment).rglob(METADATA_FILE)]
    metadata = sum(file.stat().st_size for file in saved)
    return Change(kept, doubled, metadata + sum(nbytes) * doubled // len(all_keys))


def _stretches(segments: Sequence[str], keys: dict[str, np.ndarray], target: int) -> Iterator[list[str]]:
    """Divide segments, in their order, into stretches of at most `target` samples."""
    stretch: list[str] = []
    for segment in segments:
        if sum(len(keys[other]) for other in stretch) + len(keys[segment]) > target:
            yield stretch
            stretch = []
        stretch.append(segment)
    yield stretch
