"""Which files of a folder are data: none that is hidden, shards of a split in their order, the rest by count."""

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.data.source import LeftOut, find_split
from pipeline.errors import ConfigError, DataError, first_few

HIDDEN = "hidden"
_OF_SYSTEMS = frozenset(
    {"__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found", "@eadir"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""What systems and tools leave in folders, in lower case; a name that begins with a dot is theirs, too."""
_DATA = "data"
"""Folder in which hubs keep the files of a data set."""
_OF = re.compile(r"(?<!\d)(?P<number>\d+)[-_]of[-_](?P<count>\d+)(?P<digest>-[0-9a-f]{16})?")
_NUMBER = re.compile(r"(?<![^._-])(?<!\d\.)(?P<number>\d+)(?=[._-])")


class _Shard(NamedTuple):
    """A file that may be one of several of a split."""

    number: int
    path: Path
    name: str
    """What all shards of the split are called, with `*` for the number."""
    digits: int = 0
    total: int | None = None
    """How many there are, where the name says it."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to the operating system or a tool."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def visible(folder: Path, root: Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """Return the visible entries of `folder` by name, and count hidden ones; raises DataError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"data.path {folder} cannot be read: {error.strerror}") from error
    for entry in found:
        if is_hidden(entry.name):
            left_out.add(HIDDEN, Path(entry).relative_to(root).as_posix())
    return [entry for entry in found if not is_hidden(entry.name)]


def files_below(folder: Path, root: Path, is_wanted: Callable[[str], bool], left_out: LeftOut) -> list[str]:
    """Return the files below `folder` that are wanted, relative to `root`, sorted; others are counted by extension.

    Links to folders are followed, but not to a folder that contains them.
    """
    above = frozenset(_identity(parent) for parent in (root.resolve(), *root.resolve().parents))
    names = []
    for path in _walk(folder, root, above, left_out):
        if is_wanted(path):
            names.append(Path(path).relative_to(root).as_posix())
        else:
            left_out.add(Path(path).suffix.lower() or "without extension", Path(path).relative_to(root).as_posix())
    return sorted(names)


def _walk(folder: Path, root: Path, above: frozenset[tuple[int, int]], left_out: LeftOut) -> Iterator[str]:
    try:
        own = _identity(folder)
    except OSError as error:
        raise DataError(f"data.path {folder} cannot be read: {error.strerror}") from error
    if own in above and folder != root:
        left_out.add("links to a folder they lie in", folder.relative_to(root).as_posix())
        return
    for entry in visible(folder, root, left_out):
        if entry.is_dir():
            yield from _walk(Path(entry), root, above | {own}, left_out)
        elif entry.is_file() or entry.is_symlink():  # a link to nothing is a sample that cannot be read
            yield entry.path
        else:
            left_out.add("neither file nor folder", Path(entry).relative_to(root).as_posix())


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def files_by_split(path: Path, left_out: LeftOut, suffixes: Collection[str] = ()) -> list[tuple[Path, str | None]]:
    """Return the files of a data set, each with its split: the one at `path`, or those of a folder that name a split.

    A part of a name is the split, as in train.txt, eng.train.conll or dev-v1.1.json, or the folder's name is; files may
    be in the folder "data", too, and in numbered shards, as in train-00000-of-00002.parquet. Other files, and those
    with none of `suffixes` if any are given, are counted.

    Raises:
        ConfigError: the folder has no such file.
        DataError: a shard is missing, or files of one split are no shards of each other.
    """
    if not path.is_dir():
        return [(path, None)]
    found: dict[str, list[_Shard]] = {}
    for file, split in _of_splits(path, left_out):
        where = file.relative_to(path).as_posix()
        if suffixes and not any(suffix in suffixes for suffix in file.suffixes):
            left_out.add(file.suffix.lower() or "without extension", where)
        elif split is None:
            left_out.add("not called after a split", where)
        else:
            found.setdefault(split, []).append(_shard(file, where))
    if not found:
        example = f"train{next(iter(suffixes), '.txt')}"
        raise ConfigError(f"data.path is {path}, a folder without a file called after a split, such as {example}")
    return [(file, split) for split, shards in found.items() for file in _in_order(path, split, shards)]


def _of_splits(path: Path, left_out: LeftOut) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of a folder with the split that their own name or their folder's gives."""
    for entry in visible(path, path, left_out):
        if not entry.is_dir():
            yield Path(entry), _split_of(entry.name)
        elif entry.name == _DATA or find_split(entry.name):
            for inner in visible(Path(entry), path, left_out):
                if inner.is_dir():
                    left_out.add("folders", f"{entry.name}/{inner.name}")
                else:
                    yield Path(inner), find_split(entry.name) or _split_of(inner.name)
        else:
            left_out.add("folders", entry.name)


def _split_of(name: str) -> str | None:
    return next((split for part in re.split(r"[._-]", name) if (split := find_split(part))), None)


def _shard(file: Path, where: str) -> _Shard:
    folder, _, name = where.rpartition("/")
    before = f"{folder}/" if folder else ""
    if found := _OF.search(name):
        general = f"{before}{name[: found.start()]}*-of-{found['count']}{name[found.end() :]}"
        return _Shard(int(found["number"]), file, general, len(found["number"]), int(found["count"]))
    numbers = list(_NUMBER.finditer(name))
    if len(numbers) != 1:
        return _Shard(0, file, before + name)
    general = f"{before}{name[: numbers[0].start()]}*{name[numbers[0].end() :]}"
    return _Shard(int(numbers[0]["number"]), file, general, len(numbers[0]["number"]))


def _in_order(path: Path, split: str, shards: list[_Shard]) -> list[Path]:
    """Return the files of a split by their number; all must be there, and be shards of one another."""
    shards = sorted(shards)
    first, numbers = shards[0], [shard.number for shard in shards]
    for one, other in itertools.pairwise(shards):
        if one.name != other.name or one.number == other.number:
            names = " and ".join(shard.path.relative_to(path).as_posix() for shard in (one, other))
            raise DataError(
                f"{path}: {names} are both the {split} split, and no shards of each other (such as "
                f"{split}-00000-of-00002{one.path.suffix}); join them into one file, or move what is a copy or another "
                "data set out of the folder"
            )
    begin = 1 if first.total in numbers else 0
    expected = range(numbers[0], numbers[-1] + 1) if first.total is None else range(begin, begin + first.total)
    if missing := sorted(set(expected) - set(numbers)):
        names = first_few(first.name.replace("*", str(number).zfill(first.digits)) for number in missing)
        raise DataError(
            f"{path}: {len(missing)} shards of the split {split} are missing ({names}); {len(shards)} are there; "
            "fetch the others"
        )
    return [shard.path for shard in shards]
