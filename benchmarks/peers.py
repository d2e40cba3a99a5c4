"""Other ways to read random batches of the same samples, each with the ratio to it that is asked of the store."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import zarr

Order = Callable[[int], list[np.ndarray]]
Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]
Peer = Callable[[Path, np.ndarray, np.ndarray, Order, int], Batches]

SHARD = 512


def memory_map(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Take sorted rows from one memory map of all the bytes."""
    states.tofile(path)
    mapped = np.memmap(path, states.dtype, "r", shape=states.shape)

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in map(np.sort, order(epoch)):
            yield torch.from_numpy(np.take(mapped, rows, axis=0)), torch.from_numpy(labels[rows])

    return read


def in_ram(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Index a tensor."""
    states_tensor, labels_tensor = torch.from_numpy(states), torch.from_numpy(labels)

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order(epoch):
            index = torch.from_numpy(rows)
            yield states_tensor[index], labels_tensor[index]

    return read


def hf_datasets(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Index an Arrow file in torch format."""
    import datasets  # noqa: PLC0415

    features = datasets.Features(
        {"hidden": datasets.Array3D(states.shape[1:], "float16"), "label": datasets.Value("int64")}
    )
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=features) as writer:
        for begin in range(0, len(states), SHARD):
            part = slice(begin, begin + SHARD)
            writer.write_batch({"hidden": list(states[part]), "label": labels[part].tolist()})
        writer.finalize()
    table = datasets.Dataset.from_file(str(path)).with_format("torch")

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order(epoch):
            found = table[rows.tolist()]
            yield found["hidden"], found["label"]

    return read


def hdf5(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Read sorted rows of a contiguous data set."""
    import h5py  # noqa: PLC0415

    with h5py.File(path, "w") as file:
        file["hidden"] = states
    hidden = h5py.File(path, "r")["hidden"]

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in map(np.sort, order(epoch)):
            yield torch.from_numpy(hidden[rows]), torch.from_numpy(labels[rows])

    return read


def webdataset(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Stream tar shards through a shuffle buffer of 1,000."""
    import webdataset as wds  # noqa: PLC0415

    path.mkdir()
    with contextlib.redirect_stdout(io.StringIO()), wds.ShardWriter(f"{path}/%06d.tar", maxcount=SHARD) as sink:
        for i, (state, label) in enumerate(zip(states, labels, strict=True)):
            sink.write({"__key__": f"{i:09d}", "hidden.npy": state, "label.cls": int(label)})
    shards = sorted(map(str, path.glob("*.tar")))

    def read(epoch: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        stream = wds.WebDataset(shards, shardshuffle=len(shards), seed=epoch).shuffle(1000).decode()
        pairs = stream.to_tuple("hidden.npy", "label.cls").batched(batch, partial=False)
        return ((torch.as_tensor(hidden), torch.as_tensor(label)) for hidden, label in pairs)

    return read


def litdata(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Stream optimised chunks in shuffled order, without workers."""
    import litdata as ld  # noqa: PLC0415

    logging.getLogger("litdata").setLevel(logging.ERROR)
    writer = ld.streaming.writer.BinaryWriter(str(path), chunk_bytes="64MB")
    for i, (state, label) in enumerate(zip(states, labels, strict=True)):
        writer[i] = {"hidden": torch.from_numpy(state), "label": int(label)}
    writer.done()
    writer.merge()
    data = ld.StreamingDataset(str(path), shuffle=True, drop_last=True)

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for found in ld.StreamingDataLoader(data, batch_size=batch, num_workers=0):
            yield found["hidden"], found["label"]

    return read


def zarr_oindex(path: Path, states: np.ndarray, labels: np.ndarray, order: Order, batch: int) -> Batches:
    """Index a zarr array with chunks of one segment, as zarr does it."""
    array = zarr.create_array(
        path, shape=states.shape, chunks=(SHARD, *states.shape[1:]), dtype=states.dtype, compressors=None
    )
    array[...] = states

    def read(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in order(epoch):
            yield torch.from_numpy(array.oindex[rows]), torch.from_numpy(labels[rows])

    return read


PEERS: dict[str, tuple[float, Peer]] = {
    "numpy take, one memory map": (0.8, memory_map),
    "tensor in RAM, index": (1.5, in_ram),
    "HF datasets, torch format": (3.0, hf_datasets),
    "h5py, contiguous": (3.0, hdf5),
    "webdataset, shuffle buffer 1,000": (10.0, webdataset),
    "litdata, no workers": (10.0, litdata),
    "zarr oindex, chunk = 512 samples": (100.0, zarr_oindex),
}
STREAMS = ("webdataset, shuffle buffer 1,000", "litdata, no workers")
