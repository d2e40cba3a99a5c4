"""What an accelerator computes is what the CPU computes, within rounding: `make gpu` runs these on a real one.

They need neither DVC nor what other tests share. `test_make_gpu.py` runs them on the accelerator of device.cpp.
"""

import copy

import pytest
import torch

from pipeline.device import pick_device

DEVICE = pick_device("auto")
if DEVICE.type == "cpu":
    pytest.skip("there is no accelerator here", allow_module_level=True)
pytestmark = pytest.mark.gpu

import numpy as np  # noqa: E402
from common import Encoding  # noqa: E402
from encode import Photos  # noqa: E402
from networks import RandomIds, classifier, encoder  # noqa: E402

from pipeline.encode.config import EncodeConfig  # noqa: E402
from pipeline.encode.transfer import Transfer  # noqa: E402
from pipeline.store import Reader  # noqa: E402
from pipeline.tasks import TaskConfig, open_task  # noqa: E402
from pipeline.train.config import TrainConfig  # noqa: E402
from pipeline.train.fit import open_accelerator, train_round  # noqa: E402
from pipeline.train.loader import Loader, StoredRows, choose_source  # noqa: E402
from pipeline.train.objective import Objective, prepare  # noqa: E402
from pipeline.train.optimizer import open_optimizer, schedule  # noqa: E402
from pipeline.train.rounds import Rounds  # noqa: E402

SAMPLES, BATCH = 24, 4
NETWORKS = {
    "images": (Photos, lambda: classifier("torchvision:resnet18", 64, None)),
    "texts": (lambda count: RandomIds(16, count), lambda: encoder(2, 64)),
}


def encoding(kind, device, precision="float32"):
    source, backbone = NETWORKS[kind]
    torch.manual_seed(0)
    config = EncodeConfig(cuts=[0.5], batch_size=BATCH, segment_samples=10, workers=0, precision=precision)
    return Encoding(source(SAMPLES), backbone(), config, device)


def states(store):
    return Reader(store.path).gather(store.rows(store.keys()))


@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_results_of_many_batches_arrive_whole_and_in_order(size):
    found = []
    with Transfer(DEVICE) as transfer:
        for number in range(30):
            work = transfer.to_device({"x": torch.full((size,), float(number))})["x"]
            for _ in range(20):
                work = work + 1
            transfer.to_host([{"y": work}], lambda results: found.append(results[0]["y"].cpu().clone()))
            transfer.after(lambda number=number: found.append(number))
    assert found[1::2] == list(range(30))
    assert all(torch.equal(y, torch.full((size,), number + 20.0)) for number, y in enumerate(found[::2]))


@pytest.mark.parametrize(("precision", "bound"), [("float32", 5e-3), ("bfloat16", 0.1)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_states_are_the_cpu_s(kind, precision, bound, tmp_path):
    expected = states(encoding(kind, "cpu").encode(tmp_path / "cpu"))
    found = states(encoding(kind, DEVICE, precision).encode(tmp_path / "device"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name].float() - tensor.float()).abs().max() <= bound * tensor.float().abs().max(), name


@pytest.mark.parametrize(("residency", "precision"), [("device", "no"), ("host", "no"), ("host", "bf16")])
def test_losses_are_the_cpu_s(residency, precision, tmp_path):
    made = encoding("images", "cpu")
    store = made.encode(tmp_path / "store")
    places, reader, task = store.rows(store.keys()), Reader(store.path), open_task(TaskConfig())
    targets = {"label": np.arange(SAMPLES) % 2}
    batches = np.split(np.arange(SAMPLES), SAMPLES // BATCH)
    config = TrainConfig(precision=precision, lr=1e-4, batch_size=BATCH)
    objective = Objective(copy.deepcopy(made.suffix), task).train()
    optimizer, losses = open_optimizer(objective, config, frozenset()), []
    for batch in Loader(StoredRows(places, reader), targets, batches):
        loss = objective(batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    accelerator = open_accelerator(config, tmp_path)
    source = choose_source(places, reader, DEVICE, residency)
    loader = Loader(StoredRows(places, source), targets, batches, device=DEVICE)
    objective = Objective(made.suffix, task)
    model, rounds = prepare(objective, loader, accelerator), Rounds.of(config, len(loader))
    optimizer = open_optimizer(objective, config, frozenset())
    optimizer, scheduler = accelerator.prepare(optimizer, schedule(optimizer, config, rounds.steps))
    row = train_round(model, loader, optimizer, scheduler, accelerator, config, rounds, 0)
    assert row["train/loss"] == pytest.approx(np.mean(losses), rel=0.02 if precision == "no" else 0.1)
