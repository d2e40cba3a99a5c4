"""The six lines: split, encode, open, iterate, train, merge; and what a store refuses, keeps and reports."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from own_networks import CASES, SHAPE, Case, Items, loss_of, pad_texts
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, DataCollatorWithPadding

import layer_recycling as lr
from pipeline.library.table import faults_of_items
from pipeline.store import Store, verify

RATE = 0.05


def build(name: str) -> tuple[Case, nn.Module, Any]:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make()
    batch = case.live(case.items()[:4])
    example = batch if isinstance(batch, dict) else tuple(batch[:-1]) if len(batch) > 2 else batch[0]
    return case, model, example


def train_live(case: Case, prefix: lr.Prefix, suffix: lr.Suffix, order: list[list[int]]) -> None:
    optimizer = torch.optim.SGD(suffix.parameters(), lr=RATE)
    for indices in order:
        batch = case.live([case.items()[i] for i in indices])
        args, kwargs = ((), batch) if isinstance(batch, dict) else (tuple(batch[:-1]), {})
        named = {name: item for name, item in kwargs.items() if name in prefix.inputs.read}
        labels = kwargs.get("labels") if kwargs else batch[-1]
        loss_of(suffix(prefix(*args, **named), *args, **kwargs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_an_epoch_from_the_store_gives_the_weights_of_the_same_loop_over_live_states(name: str, tmp_path: Path) -> None:
    case, model, example = build(name)
    prefix, suffix = lr.split(model, at=case.at, example=example)
    live = copy.deepcopy(suffix) if name == "tuples" else lr.split(model, at=case.at, example=example)[1]
    dataset = Items(case.items())
    lr.encode(dataset, prefix, tmp_path / "states", collate_fn=case.collate, batch_size=4, dtype="float32")
    store = lr.open_store(tmp_path / "states", prefix, collate_fn=case.collate)

    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(1)).split(4)
    loader = DataLoader(store.dataset(), batch_sampler=[rows.tolist() for rows in order], collate_fn=store.collate)
    optimizer = torch.optim.SGD(suffix.parameters(), lr=RATE)
    for batch in loader:
        labels = batch.get("labels", batch.get("1", batch.get("2")))
        loss_of(suffix(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    train_live(case, prefix, live, [rows.tolist() for rows in order])

    for key, value in live.state_dict().items():
        torch.testing.assert_close(suffix.state_dict()[key], value, rtol=0, atol=1e-6)
    merged = lr.merge(copy.deepcopy(model), suffix)
    assert any(not torch.equal(item, model.state_dict()[key]) for key, item in merged.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_items_one_by_one_in_batches_and_by_the_loader_are_the_same(name: str, tmp_path: Path) -> None:
    case, model, example = build(name)
    prefix, suffix = lr.split(model, at=case.at, example=example)
    items = case.items()
    store = lr.encode(iter(items), prefix, tmp_path, collate_fn=case.collate, dtype="float32", batch_size=3)
    data = store.dataset([7, -1, 2])
    singly = store.collate([data[0], data[1], data[2]])
    at_once = store.collate(data.__getitems__([0, 1, 2]))
    assert singly.keys() == at_once.keys()
    torch.testing.assert_close(singly, at_once, rtol=0, atol=0)
    suffix.eval()
    model.eval()
    live = case.live([items[i] for i in (7, 9, 2)])
    args, kwargs = ((), live) if isinstance(live, dict) else (tuple(live[:-1]), {})
    expected, found = (loss_of(of, None if kwargs else live[-1]) for of in (model(*args, **kwargs), suffix(**at_once)))
    torch.testing.assert_close(found, expected)

    def labels(batch: dict[str, Any]) -> list[Any]:
        return batch[next(name for name in ("labels", "1", "2") if name in batch)].flatten().tolist()

    whole, epochs = store.collate(store.dataset().__getitems__(range(len(store)))), store.loader(4, shuffle=True)
    for _ in range(2):
        assert sorted(n for batch in epochs for n in labels(batch) if n >= 0) == sorted(
            n for n in labels(whole) if n >= 0
        )


class Failing(Items):
    """Its item 17 raises; item 5 has no finite state."""

    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise OSError("no such photo")
        return self.items[index]


def resnet(tmp_path: Path) -> tuple[lr.Prefix, lr.Suffix, list[Any]]:
    case, model, example = build("resnet")
    draw = torch.Generator().manual_seed(5)
    items = [(torch.randn(3, 32, 32, generator=draw), i % 3) for i in range(20)]
    return *lr.split(model, at=case.at, example=example), items


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_items_are_reported_by_their_numbers_and_the_rest_is_kept(workers: int, tmp_path: Path) -> None:
    prefix, _, items = resnet(tmp_path)
    items[5] = (torch.full((3, 32, 32), torch.nan), 1)
    items[6] = (items[5][0].clone(), 2)
    store = lr.encode(Failing(items), prefix, tmp_path, workers=workers)
    assert store.bad.keys() == {5, 6, 17}
    assert "no such photo" in store.bad[17]
    assert "NaN" in store.bad[5]
    assert store.table.index.tolist() == [i for i in range(20) if i not in (5, 6, 17)]
    assert store.collate(store.dataset().__getitems__(range(17)))["1"].tolist() == [i % 3 for i in store.table.index]
    assert lr.open_store(tmp_path, prefix).bad == store.bad
    with pytest.raises(lr.DataError, match="item 2 of an iterable"):
        lr.encode((items[i] if i < 2 else 1 / 0 for i in range(4)), prefix, tmp_path)


def test_only_new_contents_run_the_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, _, items = resnet(tmp_path)
    ran = tiny.count_forwards(monkeypatch)
    lr.encode(items[:8], prefix, tmp_path)
    again = [*items[:10], (items[0][0].clone(), 2), items[9]]
    store = lr.encode(again, prefix, tmp_path)
    assert sum(ran) == 10
    assert len(store) == 12
    assert [store.dataset()[i]["1"] for i in (0, 10)] == [0, 2]
    torch.testing.assert_close(store.dataset()[0]["state"], store.dataset()[10]["state"], rtol=0, atol=0)
    by_key = lr.encode(items, prefix, tmp_path / "by-key", key=lambda item: item[1])
    assert len(by_key) == 20
    assert sum(ran) == 13


def plain(items: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([item[0] for item in items]), "label": torch.tensor([item[1] for item in items])}


def halved(items: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([item[0] / 2 for item in items]), "label": torch.tensor([item[1] for item in items])}


@pytest.mark.parametrize("change", ["network", "collate_fn", "dtype", "cut", "codec"])
def test_a_stale_store_is_refused_by_the_name_of_what_changed(change: str, tmp_path: Path) -> None:
    prefix, _, items = resnet(tmp_path)
    lr.encode(items, prefix, tmp_path, collate_fn=plain)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    case, model, example = build("resnet")
    options: dict[str, Any] = {"collate_fn": plain}
    at, field = case.at, {"network": "weights", "dtype": "storage", "codec": "storage"}.get(change, change)
    if change == "network":
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
    elif change == "cut":
        at = "layer4"
    else:
        options |= {"collate_fn": {"collate_fn": halved}, "dtype": {"dtype": "bfloat16"}, "codec": {"codec": "zstd"}}[
            change
        ]
    other, _ = lr.split(model, at, example)
    with pytest.raises(lr.StaleStoreError, match=field):
        lr.encode(items, other, tmp_path, **options)
    if change in ("network", "cut", "collate_fn"):
        with pytest.raises(lr.StaleStoreError, match=field):
            lr.open_store(tmp_path, other, collate_fn=options["collate_fn"])
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("codec", ["zstd", "int8"])
def test_a_compressed_store_is_read_by_worker_processes(codec: str, tmp_path: Path) -> None:
    prefix, suffix, items = resnet(tmp_path)
    store = pickle.loads(pickle.dumps(lr.encode(items, prefix, tmp_path, codec=codec)))
    loader = DataLoader(store.dataset(), 8, collate_fn=store.collate, num_workers=2)
    assert sum(len(suffix(batch["state"])) for batch in loader) == 20


def gated(count: int) -> tuple[lr.Prefix, list[Any]]:
    _, model, example = build("tuples")
    values = torch.arange(count * 12.0).view(count, 2, 6) / (count * 12)
    return lr.split(model, "layers.2", example)[0], [(one[0], one[1], i) for i, one in enumerate(values)]


class Interrupted(Items):
    """Ends its process at item 1100, at once."""

    def __getitem__(self, index: int) -> Any:
        return os._exit(9) if index == 1100 else self.items[index]


def encode_gated(folder: str, *, killed: bool) -> None:
    prefix, items = gated(1200)
    lr.encode(Interrupted(items) if killed else items, prefix, folder, dtype="float32")


@pytest.mark.slow
def test_a_killed_encode_continues_and_two_processes_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(folder: str, killed: bool) -> Any:
        line = f"from test_library import encode_gated as e; e({folder!r}, killed={killed})"
        return tiny.python(tmp_path, "-c", line)

    kinds = {"killed": [True], "shared": [False, False]}
    running = {name: [start(name, killed) for killed in each] for name, each in kinds.items()}
    said = {name: [one.communicate()[0] for one in each] for name, each in running.items()}
    codes = {name: [one.returncode for one in each] for name, each in running.items()}
    assert codes == {"killed": [9], "shared": [0, 0]}, said
    prefix, items = gated(1200)
    ran = tiny.count_forwards(monkeypatch)
    for name, left in (("killed", 1200 - 1024), ("shared", 0)):
        ran.clear()
        store = lr.encode(items, prefix, tmp_path / name, dtype="float32")
        assert sum(ran) == left
        batch = store.collate(store.dataset().__getitems__(range(1200)))
        assert batch["2"].tolist() == list(range(1200))
        live = prefix(torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items]))
        torch.testing.assert_close(batch["state"], live)


def test_splits_share_states_and_are_named(tmp_path: Path) -> None:
    prefix, _, items = resnet(tmp_path)
    lr.encode(items[:12], prefix, tmp_path)
    lr.encode(items[12:], prefix, tmp_path, split="validation")
    assert [len(lr.open_store(tmp_path, prefix, split)) for split in ("train", "validation")] == [12, 8]
    held_out = lr.open_store(tmp_path, prefix, "validation").dataset()
    one_for_all = lr.open_store(tmp_path, prefix, "train").collate
    batch = next(iter(DataLoader(held_out, 8, collate_fn=one_for_all)))
    assert batch["1"].tolist() == [label for _, label in items[12:]]
    with pytest.raises(lr.StoreError, match="train, validation"):
        lr.open_store(tmp_path, prefix)
    with pytest.raises(lr.RecyclingError, match="split"):
        lr.encode(items, prefix, tmp_path, split="../elsewhere")


def test_other_fields_come_back_as_they_were(tmp_path: Path) -> None:
    prefix, _, items = resnet(tmp_path)
    rows = [
        {"x": x, "name": f"<{i}>", "mask": torch.ones(i + 1, 2), "weight": 0.5 * i, "of": None, "flag": i > 1}
        for i, (x, _) in enumerate(items[:3])
    ]
    store = lr.encode(rows, prefix, tmp_path)
    for row, item in zip(rows, lr.open_store(tmp_path, prefix).dataset(), strict=False):
        assert item.keys() - {"state"} == row.keys() - {"x"}
        torch.testing.assert_close(item.pop("mask"), row.pop("mask"))
        assert [item[name] for name in row if name != "x"] == [row[name] for name in row if name != "x"]
    batch = store.collate(store.dataset().__getitems__([2, 0]))
    assert batch["name"] == ["<2>", "<0>"]
    assert batch["mask"].shape == (2, 3, 2)
    assert batch["weight"].tolist() == [1.0, 0.0]
    more = [
        {"x": x, "time": 1_700_000_000.25 + i, "id": 2**53 - i, "tags": list(range(i))}
        for i, (x, _) in enumerate(items)
    ]
    more[1]["id"] = 0.5
    store = lr.encode(more, prefix, tmp_path)
    for row, item in zip(more, store.dataset(), strict=True):
        assert (item["time"], item["id"], item["tags"].tolist()) == (row["time"], row["id"], row["tags"])
    assert (
        store.collate(store.dataset().__getitems__([0, 1]))["time"].dtype
        == next(iter(store.loader(2)))["time"].dtype
        == torch.float32
    )
    with pytest.raises(
        lr.DataError, match="the field 'id' holds 18446744073709551616, and whole numbers go to 64 bits"
    ):
        lr.encode([{"x": items[0][0], "id": 2**64}], prefix, tmp_path)
    with pytest.raises(lr.DataError, match="the field 'name'"):
        lr.encode([{"x": items[0][0], "name": object()}], prefix, tmp_path)
    with pytest.raises(lr.DataError, match="no tensor 'x'"):
        lr.encode([{"image": items[0][0]}], prefix, tmp_path)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_store_with_items_is_sound(codec: str, tmp_path: Path) -> None:
    """`verify` had said to remove the folder that has the labels."""
    prefix, _, items = resnet(tmp_path)
    lr.encode(items, prefix, tmp_path / "states", codec=codec).dataset()[0]
    store = Store.open(tmp_path / "states")
    assert verify(store) == faults_of_items(store) == []
    file = tmp_path / "states/items/train.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")  # in a value of an item
    assert "other bytes than were written" in faults_of_items(store)[0]
    with pytest.raises(lr.CorruptStoreError, match="other bytes than were written"):
        lr.open_store(tmp_path / "states", prefix)


def test_labels_in_floating_point_keep_their_values_and_stay_out_of_the_state(tmp_path: Path) -> None:
    case, _, _ = build("bert")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)).eval()
    items = [{**item, "labels": 1000.1 + i} for i, item in enumerate(case.items())]
    batch = pad_texts(items[:4])
    prefix, suffix = lr.split(model, 0.5, batch)
    assert "labels" not in prefix.spec
    store = lr.encode(items, prefix, tmp_path, collate_fn=pad_texts, dtype="float32")
    found = suffix.eval()(**store.collate(store.dataset().__getitems__(range(4))))
    torch.testing.assert_close(found.loss, model(**batch).loss)


def test_a_hugging_face_data_set_with_its_collator_is_encoded_once_and_found_again(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["one", "two three", "good bad good two", "bad", "three three three one bad", "two"]
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    columns = {**tokenizer(words), "labels": [0, 1, 2, 0, 1, 2]}
    dataset, collator = datasets.Dataset.from_dict(columns), DataCollatorWithPadding(tokenizer)
    model = BertForSequenceClassification.from_pretrained(text_folder)
    prefix, suffix = lr.split(model, 0.5, dict(collator([dataset[i] for i in range(4)])))
    lr.encode(dataset, prefix, tmp_path / "states", collate_fn=collator, dtype="float32")
    tokenizer(words, padding="max_length", truncation=True, max_length=5)  # leaves its settings in the tokenizer
    ran = tiny.count_forwards(monkeypatch)
    store = lr.encode(dataset, prefix, tmp_path / "states", collate_fn=collator, dtype="float32")
    assert not ran
    batch = store.collate(store.dataset().__getitems__(range(6)))
    expected = model.eval()(**collator([dataset[i] for i in range(6)]))
    torch.testing.assert_close(suffix.eval()(**batch).loss, expected.loss)
    other = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    with pytest.raises(lr.StaleStoreError, match="collate_fn"):
        lr.open_store(tmp_path / "states", prefix, collate_fn=other)


def test_states_do_not_depend_on_the_caller_s_autocast(tmp_path: Path) -> None:
    prefix, _, items = resnet(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        store = lr.encode(items, prefix, tmp_path, dtype="float32")
    batch = store.collate(store.dataset().__getitems__(range(20)))
    torch.testing.assert_close(batch["state"], prefix(torch.stack([x for x, _ in items])), rtol=0, atol=1e-5)
