from pathlib import Path

import pytest
import tiny
import torch

pytest_plugins = ["services.s3", "services.faulty", "services.dask", "services.slurm", "services.ssh"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="Try faults at length: kills, flipped bits, hostile stores.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow modules first: with several processes, none of them is then left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors lose more to many threads than they gain."""
    torch.set_num_threads(1)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A Hugging Face directory of a tiny random BERT with a classifier of 3, and a tokenizer of ten words."""
    tiny.write_text_network(tmp_path / "bert")
    return tmp_path / "bert"
