"""Pairs of which a field says whether the two belong together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import DataConfig, SampleTable, build, open_source
from pipeline.errors import DataError
from pipeline.keys import content_key
from pipeline.tasks import TaskConfig, open_task

RECORDS = [("a", "A", 1), ("a", "B", 0), ("b", "B", 1), ("c", "C", 1), ("c", "A", 0), ("d", "D", 0), ("e", "E", 1)]


def table(folder: Path, records: list[tuple[str, str, Any]], **settings: Any) -> SampleTable:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a, "same": same}) + "\n" for q, a, same in records))
    config = DataConfig(source="pairs", path=str(path), anchor="q", positive="a", label="same", **settings)
    source = open_source(config)
    keys = np.stack([np.frombuffer(content_key(source.content(i)), np.uint8) for i in range(len(source))])
    return build(source, keys, config)


def test_only_pairs_that_belong_together_share_a_group(tmp_path: Path) -> None:
    groups = table(tmp_path, RECORDS).targets["group"].reshape(-1, 2)
    belongs = np.array([same for *_, same in RECORDS], bool)
    assert np.array_equal(groups[:, 0] == groups[:, 1], belongs)
    assert groups[0, 0] == groups[1, 0] == groups[4, 1]  # a and A, wherever they are
    assert len(np.unique(groups)) == 6  # aA, bB, cC, d, D, eE


def test_the_two_of_a_pair_are_never_parted(tmp_path: Path) -> None:
    records = [(f"q{i}", f"a{(i + i % 2) % 40}", 1 - i % 2) for i in range(40)]
    made = table(tmp_path, records, validation=0.5)
    splits = made.split.reshape(-1, 2)
    assert (splits[:, 0] == splits[:, 1]).all()
    assert set(splits[:, 0]) == {"train", "validation"}
    share = made.share(0.5, 3)
    assert np.array_equal(np.unique(share.targets["pair"], return_counts=True)[1], [2] * (len(share) // 2))


def test_pairs_that_do_not_belong_together_are_negatives(tmp_path: Path) -> None:
    made = table(tmp_path, [*RECORDS, *((f"v{i}", f"V{i}", 1) for i in range(9))], validation=0.4)
    task = open_task(TaskConfig(kind="similarity", loss="contrastive"))
    targets = task.prepare(made)
    pair = {name: torch.from_numpy(values[2:4]) for name, values in targets.items()}  # a and B
    output = torch.tensor([[1.0, 0.2], [1.0, 0.1]], requires_grad=True)
    loss = task.loss(output.repeat(2, 1), {name: values.repeat(2) for name, values in pair.items()})
    assert loss.item() == pytest.approx(torch.cosine_similarity(*output, dim=0).item())  # pushed apart from cosine 1


@pytest.mark.parametrize(("yes", "no"), [(True, False), ("true", "False"), (1.0, 0.0), ("1", "0")])
def test_ways_to_say_so(tmp_path: Path, yes: object, no: object) -> None:
    assert table(tmp_path, [("a", "A", yes), ("b", "B", no)]).targets["belongs"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("said", [0.5, "maybe", None, 2])
def test_anything_else_is_told(tmp_path: Path, said: object) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl#1: label .*; expected 1, 1\.0, true, 0"):
        table(tmp_path, [("a", "A", "1" if isinstance(said, str) else 1), ("b", "B", said)])


def test_without_any_pair_that_belongs_together(tmp_path: Path) -> None:
    made = table(tmp_path, [(f"q{i}", f"a{i}", 0) for i in range(20)], validation=0.3)
    with pytest.raises(DataError, match="the train split has no pair that belongs together"):
        open_task(TaskConfig(kind="similarity")).prepare(made)
