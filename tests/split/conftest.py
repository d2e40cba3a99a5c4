"""One split per model and cut, shared by the tests of the contract."""

import copy
from types import SimpleNamespace

import pytest
import torch
from nets import NETS, halves
from zoo.proof import SEED, add_noise_to_constants, assert_same

from pipeline.split import split


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.cls.cuts, indirect=True, scope="class")


@pytest.fixture(scope="class")
def case(request):
    torch.manual_seed(SEED)
    tests = request.cls()
    model, example = tests.model(), tests.example(2)
    add_noise_to_constants(model)
    before = copy.deepcopy(model.state_dict())
    prefix, suffix = split(model, request.param, example)
    assert_same("weights of the model", before, model.state_dict(), 0.0)
    return SimpleNamespace(at=request.param, model=model, prefix=prefix, suffix=suffix, example=example)


@pytest.fixture(scope="module", params=NETS)
def shared(request):
    return halves(request.param)


@pytest.fixture
def net(shared):
    """A model with its halves; the suffix is a copy of its own for each test, in train mode."""
    return SimpleNamespace(**{**vars(shared), "suffix": copy.deepcopy(shared.suffix).train()})
