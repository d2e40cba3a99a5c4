from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import DataConfig, Row, SampleTable, Source, build
from pipeline.errors import DataError
from pipeline.keys import content_key


class Listed(Source):
    """Rows given outright: (content, split, targets)."""

    def __init__(self, rows: list[tuple[str, str | None, dict[str, Any]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> Row:
        return Row(f"row {i}", self.rows[i][1], self.rows[i][2])

    def content(self, i: int) -> str:
        return self.rows[i][0]


def config(**settings: Any) -> DataConfig:
    return DataConfig(source="images", path="x", **settings)


def keys_of(source: Source, rows: list[int] | None = None) -> np.ndarray:
    rows = list(range(len(source))) if rows is None else rows
    return np.stack([np.frombuffer(content_key(source.content(i)), np.uint8) for i in rows])


def table_of(source: Source, **settings: Any) -> SampleTable:
    return build(source, keys_of(source), config(**settings))


def labelled(count: int, split: str | None = None) -> Listed:
    return Listed([(f"text {i}", split, {"label": f"l{i % 4}"}) for i in range(count)])


def paired(pairs: list[tuple[str, str]]) -> Listed:
    return Listed(
        [
            (text, None, {"pair": number, "role": role})
            for number, pair in enumerate(pairs)
            for text, role in zip(pair, ("anchor", "positive"), strict=True)
        ]
    )


def side(table: SampleTable) -> dict[bytes, str]:
    return {key.tobytes(): split for key, split in zip(table.keys, table.split.tolist(), strict=True)}


def test_the_share_held_out_is_about_what_was_asked() -> None:
    table = table_of(labelled(2000), validation=0.25)
    assert 0.22 < len(table.rows("validation")) / 2000 < 0.28
    assert len(table.rows("train")) + len(table.rows("validation")) == len(table) == 2000
    assert set(table_of(labelled(50), validation=0.0).split) == {"train"}


def test_adding_samples_moves_no_other() -> None:
    few, many = side(table_of(labelled(200))), side(table_of(labelled(400)))
    assert {key: many[key] for key in few} == few


def test_the_seed_decides() -> None:
    first, again, other = (table_of(labelled(200), seed=seed).split for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_duplicates_land_on_one_side() -> None:
    table = table_of(Listed([(f"text {i % 50}", None, {"label": "a"}) for i in range(200)]), validation=0.5)
    assert set(table.split) == {"train", "validation"}
    assert len({(key.tobytes(), split) for key, split in zip(table.keys, table.split, strict=True)}) == 50


def test_splits_of_the_data_set_are_kept() -> None:
    rows = labelled(100, "train").rows + labelled(120, "validation").rows[100:] + labelled(130, "test").rows[120:]
    assert np.unique(table_of(Listed(rows)).split, return_counts=True)[1].tolist() == [10, 100, 20]


def test_without_a_validation_split_some_training_rows_are_held_out() -> None:
    table = table_of(Listed(labelled(100, "train").rows + labelled(110, "test").rows[100:]), validation=0.3)
    assert len(table.rows("test")) == 10
    assert 15 < len(table.rows("validation")) < 45


def test_whole_labels_can_be_held_out() -> None:
    table = table_of(
        Listed([(f"t{i}", None, {"label": i % 20}) for i in range(200)]), hold_out="labels", validation=0.5
    )
    sides = [set(table.targets["label"][table.rows(split)].tolist()) for split in ("train", "validation")]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    with pytest.raises(DataError, match=r"data\.hold_out is 'labels', but the samples have pair, role"):
        table_of(paired([("q", "a")]), hold_out="labels")


def test_pairs_with_the_same_answer_or_question_are_one_group() -> None:
    table = table_of(paired([("q1", "a1"), ("q2", "a1"), ("q3", "a3"), ("q3", "a4"), ("q5", "a5")]))
    groups = table.targets["group"].tolist()
    assert groups[::2] == groups[1::2]
    assert [groups[::2].index(group) for group in groups[::2]] == [0, 0, 2, 2, 4]


def test_groups_are_not_parted_and_not_moved() -> None:
    pairs = [(f"q{i}", f"a{i // 3}") for i in range(120)]
    table, more = table_of(paired(pairs)), table_of(paired([*pairs, ("a new question", "a0"), ("q", "a new answer")]))
    for group in np.unique(table.targets["group"]):
        assert len(set(table.split[table.targets["group"] == group])) == 1
    assert side(table).items() <= side(more).items()


def test_a_pair_with_a_bad_half_is_left_out() -> None:
    source = paired([("q1", "a1"), ("q2", "a2"), ("q3", "a3")])
    good = [0, 1, 3, 4, 5]
    table = build(source, keys_of(source, good), config(), np.array(good))
    assert table.targets["pair"].tolist() == [0, 0, 2, 2]
    assert np.array_equal(table.keys, keys_of(source, [0, 1, 4, 5]))


@pytest.mark.parametrize("kind", [float, lambda i: [str(i)]])
def test_a_share_of_numbers_or_of_lists_is_a_share(kind: Callable[[int], Any]) -> None:
    """Each of them stands for itself: they are no labels, of each of which one sample would be kept."""
    table = table_of(Listed([(f"t{i}", "train", {"label": kind(i)}) for i in range(100)]), validation=0.0)
    assert len(table.share(0.2, 0)) == 20


def test_a_share_of_numbers_in_texts_is_a_share() -> None:
    table = table_of(Listed([(f"t{i}", "train", {"label": f"{i}.50"}) for i in range(100)]), validation=0.0)
    assert len(table.share(0.2, 0, by_label=False)) == 20
    assert len(table.share(0.2, 0)) == 100


@pytest.mark.parametrize("label", ["", "  ", None, float("nan")])
def test_samples_without_a_label_are_named(label: Any) -> None:
    rows = [("a", None, {"label": "x"}), ("b", None, {"label": label}), ("c", None, {"label": label})]
    with pytest.raises(DataError, match=r"2 samples have no label \(row 1, row 2\); give each one, or leave them out"):
        table_of(Listed(rows))


@pytest.mark.parametrize("label", ["a", 3, 0.5])
def test_file_gives_back_what_was_written(tmp_path: Path, label: str | float) -> None:
    table = table_of(Listed([(f"t{i}", None, {"label": label}) for i in range(20)]))
    table.write(tmp_path / "samples.parquet")
    read = SampleTable.read(tmp_path / "samples.parquet")
    assert np.array_equal(read.keys, table.keys)
    assert np.array_equal(read.split, table.split)
    assert read.source == table.source
    assert read.targets["label"].dtype == table.targets["label"].dtype
    assert np.array_equal(read.targets["label"], table.targets["label"])


def test_equal_tables_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        table_of(labelled(300)).write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_what_is_no_sample_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        SampleTable.read(tmp_path / "absent")
    (tmp_path / "text").write_text("text")
    with pytest.raises(DataError, match="cannot be read"):
        SampleTable.read(tmp_path / "text")


def test_rows_must_agree() -> None:
    with pytest.raises(DataError, match="row 1 has the targets score; expected label"):
        table_of(Listed([("a", None, {"label": 1}), ("b", None, {"score": 1})]))
    with pytest.raises(DataError, match="gives the split 'dev'"):
        table_of(Listed([("a", "dev", {"label": 1})]))
    with pytest.raises(DataError, match=r"1 samples have no label \(row 1\); give each one"):
        table_of(Listed([("a", None, {"label": "x"}), ("b", None, {"label": None})]))
    with pytest.raises(DataError, match="no usable sample"):
        build(labelled(3), np.zeros((0, 16), np.uint8), config(), np.array([], int))


@pytest.mark.parametrize(
    "lists", [[["a"], [], ["b", "c"]], [[1, 2], [3, 4], [5, 6]], [[0.5], [1], []], [[], [], []]], ids=str
)
def test_a_target_may_be_a_list(tmp_path: Path, lists: list[Any]) -> None:
    table = table_of(Listed([(f"t{i}", "train", {"tags": tags}) for i, tags in enumerate(lists)]))
    assert table.targets["tags"].shape == (3,)
    for name in ("one", "two"):
        table.write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = SampleTable.read(tmp_path / "one").targets["tags"]
    assert read.dtype == object
    assert read.tolist() == table.targets["tags"].tolist() == lists
    assert read[np.array([2, 0])].tolist() == [lists[2], lists[0]]


def test_lists_must_be_alike(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="target tags is a list in 1 of 2 rows"):
        table_of(Listed([("a", None, {"tags": ["x"]}), ("b", None, {"tags": "x"})]))
    with pytest.raises(DataError, match="lists of the target tags mix types"):
        table_of(Listed([("a", None, {"tags": ["x"]}), ("b", None, {"tags": [1]})])).write(tmp_path / "table")


def test_samples_of_a_group_are_not_parted() -> None:
    rows = [(f"t{i}", None, {"label": f"l{i % 3}", "group": f"patient {i // 5}"}) for i in range(200)]
    table = table_of(Listed(rows), validation=0.4)
    groups = [set(table.targets["group"][table.rows(split)].tolist()) for split in ("train", "validation")]
    assert not groups[0] & groups[1]
    assert all(len(group) > 5 for group in groups)
