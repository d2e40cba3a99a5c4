"""What every source promises: a class that the tests of each kind inherit."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import DataConfig, Source, Stamp, open_source
from pipeline.data.source import SPLITS
from pipeline.keys import content_key


class SourceContract:
    """A subclass writes a data set in `make` and says what it holds."""

    rows: int

    def make(self, folder: Path) -> dict[str, Any]:
        """Write a data set below `folder`; return the settings that describe it."""
        raise NotImplementedError

    @pytest.fixture
    def config(self, tmp_path: Path) -> DataConfig:
        return DataConfig(**self.make(tmp_path))

    @pytest.fixture
    def source(self, config: DataConfig) -> Source:
        return open_source(config)

    def test_has_its_rows(self, source: Source) -> None:
        assert len(source) == self.rows

    def test_rows_are_described(self, source: Source) -> None:
        described = [source.row(i) for i in range(len(source))]
        assert len({tuple(row.targets) for row in described}) == 1
        assert all(row.split is None or row.split in SPLITS for row in described)
        assert all(row.source and row.targets for row in described)
        values = [value for row in described for value in row.targets.values()]
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        assert all(type(value) in (str, int, float) for value in flat)

    def test_opened_again_it_is_the_same(self, config: DataConfig, source: Source) -> None:
        again = open_source(config)
        assert [again.row(i) for i in range(len(again))] == [source.row(i) for i in range(len(source))]
        assert keys(again) == keys(source)

    def test_a_stamp_is_of_the_file_that_is_the_content(self, source: Source) -> None:
        stamps = [source.stamp(i) for i in range(len(source))]
        for i, stamp in enumerate(stamps):
            assert stamp is None or Path(stamp.path).read_bytes() == source.content(i)
            assert stamp is None or stamp == Stamp.of(Path(stamp.path))

    def test_a_copy_reads_the_same(self, source: Source) -> None:
        assert keys(pickle.loads(pickle.dumps(source))) == keys(source)

    def test_threads_read_the_same(self, source: Source) -> None:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: content_key(source.content(i)), range(len(source)))) == keys(source)


def keys(source: Source) -> list[bytes]:
    return [content_key(source.content(i)) for i in range(len(source))]


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path)
