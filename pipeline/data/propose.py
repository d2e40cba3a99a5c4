"""A look at a file or folder: the section `data:` that reads it, and the task that its labels suggest."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.formats import parse
from pipeline.data.proposal import MEDIA, DataProposal, percentile, propose_table
from pipeline.data.records import KINDS, is_saved, kind_of, read_text
from pipeline.data.source import LeftOut
from pipeline.data.tagged import NO_WORDS
from pipeline.data.tagged import parse as parse_tag
from pipeline.data.walk import files_by_split, is_hidden
from pipeline.errors import ConfigError, DataError

FILES = 20_000
"""Maximum number of files of a folder whose names are looked at."""
LINES = 400
"""Number of lines of a text file that tell whether it has a tag per word."""


def propose(path: Path) -> DataProposal:
    """Return settings that read the data set at `path`.

    Recognised: folders of images or sounds (a folder per class, or a table that names the files), tables (CSV, TSV,
    JSON Lines, JSON, Parquet, saved by Hugging Face datasets), CoNLL files, SQuAD's JSON, tables of pixels, and NumPy
    arrays; a folder may have a folder or a file per split.

    Raises:
        ConfigError: nothing of this is there, or no field looks like content or label; the message says what is.
        DataError: a file cannot be read.
    """
    if is_saved(path):
        return propose_table(path, path)
    if not path.is_dir():
        return _of_file(path, path)
    extensions = Counter(islice(_suffixes(path), FILES))
    counts = {source: sum(extensions[suffix] for suffix in folder.extensions) for source, (_, folder) in MEDIA.items()}
    source = max(counts, key=lambda source: counts[source])
    if counts[source]:
        return _of_media(path, source)
    try:
        first = files_by_split(path, LeftOut())[0][0]
    except ConfigError:
        readable = [entry for entry in sorted(path.iterdir()) if entry.is_file() and not is_hidden(entry.name)]
        if len(readable) == 1:
            return _of_file(readable[0], readable[0])
        known = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in extensions.most_common(5))
        raise ConfigError(
            f"{path} has no images, no sounds, and no files called after splits (train.csv); it has "
            f"{known or 'no files'}; name one file, or order them so"
        ) from None
    return _of_file(path, first)


def _suffixes(folder: Path) -> Iterator[str]:
    for _, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.splitext(name)[1].lower() for name in names if not is_hidden(name))


def _of_media(path: Path, source: str) -> DataProposal:
    """Return the settings of a folder of images or sounds: those of its table, if one names the files."""
    content, folder = MEDIA[source]
    tables = [file for file in sorted(path.iterdir()) if kind_of(file) in KINDS and file.is_file()]
    if len(tables) == 1:
        with suppress(ConfigError, DataError):  # a table of something else
            proposal = propose_table(tables[0], tables[0])
            if proposal.content == content:
                return proposal
    try:
        files = folder(path)
    except DataError as error:
        raise ConfigError(
            f"{error}; put the files into a folder per class ({path}/cat/1.jpg, or {path}/train/cat/1.jpg and "
            f"{path}/test/cat/2.jpg), or add a table that names each file and its label"
        ) from error
    return DataProposal({"source": source, "path": str(path)}, "classification", content, samples=len(files))


def _of_file(path: Path, first: Path) -> DataProposal:
    """Return the settings of the data set at `path`; `first` is its first file."""
    settings: dict[str, Any] = {"path": str(path)}
    kind = kind_of(first)
    if kind in (".npz", ".npy"):
        return DataProposal({"source": "arrays", **settings}, "classification", "array")
    if kind == ".json" and _is_squad(first):
        return DataProposal({"source": "squad", **settings}, "answers", "text")
    if (kind == ".tsv" or kind not in KINDS) and (words := _conll_words(first)):
        return DataProposal({"source": "conll", **settings}, "tagging", "text", words=words)
    return propose_table(path, first)


def _is_squad(file: Path) -> bool:
    content = parse(read_text(file, ".json"), f"{file} cannot be read as .json")
    articles = content.get("data") if isinstance(content, dict) else None
    first = articles[0] if isinstance(articles, list) and articles else None
    return isinstance(first, dict) and "paragraphs" in first


def _conll_words(file: Path) -> int:
    """Return the number of words of a long sentence if the file has a word and its tag on each line, else 0."""
    lengths, length = list[int](), 0
    for line in read_text(file, "text").splitlines()[:LINES]:
        columns = line.split()
        if not columns or line.startswith(NO_WORDS):
            lengths, length = [*lengths, length], 0
        elif len(columns) < 2 or parse_tag(columns[-1]) is None:
            return 0
        else:
            length += 1
    return percentile(lengths)
