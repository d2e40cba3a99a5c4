"""Sources of samples, and the table that says what is known of each of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.data.arrays import open_arrays, open_pixels
from pipeline.data.config import DataConfig
from pipeline.data.labelled import ROLES, Pairs, Texts
from pipeline.data.language import Chats, Completions
from pipeline.data.media import open_media
from pipeline.data.proposal import DataProposal
from pipeline.data.propose import propose
from pipeline.data.source import SPLITS, Content, Row, Source, Stamp, in_role, role_of, rows_in_role, with_keys
from pipeline.data.squad import open_squad
from pipeline.data.table import SampleTable, build, remarks, write_table
from pipeline.data.tagged import open_conll, open_tagged
from pipeline.data.vision import open_torchvision
from pipeline.errors import ConfigError
from pipeline.files import check_sha256, load_function, locate

__all__ = [
    "ROLES",
    "SPLITS",
    "Content",
    "DataConfig",
    "DataProposal",
    "Row",
    "SampleTable",
    "write_table",
    "Source",
    "Stamp",
    "build",
    "in_role",
    "open_source",
    "propose",
    "remarks",
    "role_of",
    "rows_in_role",
    "with_keys",
]

_OPEN: Mapping[str, Callable[[DataConfig, Path], Source]] = {
    "images": open_media,
    "audio": open_media,
    "text": Texts,
    "pairs": Pairs,
    "completions": Completions,
    "chat": Chats,
    "conll": open_conll,
    "tagged": open_tagged,
    "squad": open_squad,
    "pixels": open_pixels,
    "arrays": open_arrays,
    "torchvision": open_torchvision,
}


def open_source(config: DataConfig) -> Source:
    """Open the data set that `config` describes, after its digest is checked.

    Raises:
        ConfigError: a setting names nothing that exists; the message names what does.
        DataError: the data cannot be read as described.
    """
    if config.download and config.path is not None:
        Path(config.path).expanduser().mkdir(parents=True, exist_ok=True)
    path = None if config.path is None else locate(config.path, "data.path")
    if path is not None:
        check_sha256(path, config.sha256, "data")
    if config.source in _OPEN and path is not None:
        source = _OPEN[config.source](config, path)
    else:
        source = load_function(config.source, "data.source", "config: DataConfig")(config)
    if not isinstance(source, Source):
        raise ConfigError(f"data.source {config.source!r} returned {type(source).__name__}; expected a Source")
    return source if config.key is None else with_keys(source, {None: config.key}, "data.key")
