import pytest


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether faults are tried at length (`make faults`); `make test` tries each kind a few times."""
    return bool(request.config.getoption("--faults"))
